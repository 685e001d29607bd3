# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 22: Serving a thousand adapters
#
# **By the end of this unit you can**
#
# - compute one batch in which every row has an adapter of another rank, in two ways, and say which suits which rows;
# - keep adapters, keys and values in one pool of pages that is never handed out twice;
# - decide which adapter to evict and which request to admit, so that no running request fails and none waits forever;
# - find a fault that lets one adapter read what another has computed, and prove it with a test;
# - predict from counts when many adapters are cheap to serve, and when they are not.
#
# **Prerequisites**: keys and values in GPT-2 (unit 03), LoRA's arithmetic (unit 09), and several adapters on one model
# (unit 10). It is an elective: no other unit needs it.
#
# **Time**: about 75 minutes, including a minute of computation. 6 exercises, 2 predictions, one open question.
#
# ![The pages of a server's memory (up) over the passes of the model (right). Each page is free, holds a part of an adapter,
# or holds keys and values of a text. Texts appear and vanish in many small pieces, adapters stay for a longer
# time.](unit_22.png)

# %%
import copy
import inspect
import random
import time
from pathlib import Path

import torch
from matplotlib import colormaps

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.metrics import load_tales
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.museum.shared_prefix import block_keys, faulty_block_keys
from lora_from_scratch.serving.adapter_reading import LayerFactors
from lora_from_scratch.serving.adapter_store import AdapterStore, AdapterVersion
from lora_from_scratch.serving.batched_lora import switch_task
from lora_from_scratch.serving.mixed_product import SEGMENT_FROM
from lora_from_scratch.serving.page_pool import OutOfPages, PageLayout, PagePool
from lora_from_scratch.serving.paged_gpt2 import PagedGPT2
from lora_from_scratch.serving.paged_model import Text
from lora_from_scratch.serving.scheduler import Request, Scheduler, peak_pages
from lora_from_scratch.serving.simulation import Job, simulate
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.linear_layers import in_and_out, is_conv1d

# %% [markdown]
# ## A thousand adapters
#
# A company trains an adapter for each of its customers: the same base, a thousand LoRAs of ranks from 4 to 32. Look at
# the sizes first.

# %%
model, tokenizer = load_gpt2("bundled")
layers = {name: in_and_out(module) for name, module in model.named_modules() if is_conv1d(module)}

draw = random.Random(0)
ranks = {f"adapter-{number:03}": draw.randint(4, 32) for number in range(1000)}
numbers_per_rank = sum(inputs + outputs for inputs, outputs in layers.values())
MB = 1e6
model_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
print(f"the model: {model_bytes / MB:.1f} MB, of which {len(layers)} matrices are adapted")
print(f"an adapter of rank 18: {4 * 18 * numbers_per_rank / MB:.2f} MB")
print(f"all {len(ranks):,} adapters: {4 * sum(ranks.values()) * numbers_per_rank / MB:,.0f} MB")

# %% [markdown]
# All adapters together are much larger than the model. But few of them are in use at any moment, and some much more often
# than others. A common model of such traffic is Zipf's law: adapter number k is asked for in proportion to 1/k.


# %%
def zipf(count, adapters, seed):
    """The adapters of this many requests."""
    names = list(ranks)[:adapters]
    return random.Random(seed).choices(names, [1 / (k + 1) for k in range(adapters)], k=count)


batch = zipf(32, 1000, seed=1)
different = sorted(dict.fromkeys(batch), key=batch.count, reverse=True)
print(f"in a batch of {len(batch)} requests: {len(different)} adapters, {', '.join(different[:3])}, ...")
print(f"their ranks: {sorted(ranks[name] for name in different)}")

# %% [markdown]
# ## One product for mixed ranks
#
# In unit 10 you served several adapters in one batch: every row was multiplied by every A, and a mask kept what belonged
# to it. That is fine for a few adapters of the same rank. With many of them, most of this work is for nothing. There are
# two better ways, known by the names of Punica's kernels (Chen et al. 2023, arXiv:2310.18547); S-LoRA (Sheng et al. 2023,
# arXiv:2311.03285) extends both to mixed ranks.
#
# **Gather** (BGMV, batched gather matrix-vector multiplication), for rows of one token, as in decoding. All factors lie in one memory of numbered cells. A cell p holds
# one row A_p of some A, of length `in`, and one column of its s B, written as a row B_p of length `out`. An adapter of
# rank r is a list of r cells, in any place. Then
#
# $$y_i = s_k B_k A_k x_i = \sum_{p \,\in\, \text{cells of } k} (A_p \cdot x_i)\, B_p,$$
#
# where k is the adapter of row i. The work for a row depends only on the rank of its own adapter.
#
# A small example, with `in` = 2 and `out` = 3. The adapter has the cells 1 and 2, with A_1 = (3, 4), A_2 = (1, 0),
# B_1 = (1, 0, 2) and B_2 = (0, 5, 0). For x = (1, 2) the two inner products are 11 and 1, and y = 11 (1, 0, 2) +
# 1 (0, 5, 0) = (11, 5, 22).
#
# The cells that no row uses are not empty. They hold other adapters, or what was there before. (The check of this exercise
# looks at the result only. How much work each way needs is counted after the next one.)

# %% exercise="gather_product"

# %% [markdown]
# **Segments** (SGMV, segmented gather matrix-vector multiplication), for many rows with the same adapter. A prompt of 200 tokens has 200 such rows, and a popular adapter
# may be that of half the batch. Then two products of matrices are faster than a sum for each row.

# %% exercise="segment_product"

# %% [markdown]
# Try both on the batch above, in one layer, and count multiplications. "Padded" means that all adapters are filled up with
# zeros to the largest rank; "every A" is the way of unit 10.

# %%
gather, segments = working("gather_product"), working("segment_product")

inputs, outputs = layers["transformer.h.0.attn.c_attn"]
generator = torch.Generator().manual_seed(0)
A_cells = torch.randn(sum(ranks[name] for name in different), inputs, generator=generator)
B_cells = torch.randn(len(A_cells), outputs, generator=generator)
places = torch.randperm(len(A_cells), generator=generator).split([ranks[name] for name in different])
x = torch.randn(len(batch), inputs, generator=generator)
index = torch.tensor([different.index(name) for name in batch])

one = gather(x, A_cells, B_cells, [places[k] for k in index])
other = segments(x, [(A_cells[cells], B_cells[cells].T, 1.0) for cells in places], index)
print(f"largest difference of the two results: {(one - other).abs().max() / one.abs().max():.0e} of the largest entry")

own, largest = [ranks[name] for name in batch], max(ranks[name] for name in batch)
work = {
    "the base, W x": len(batch) * inputs * outputs,
    "gather or segments": sum(own) * (inputs + outputs),
    "padded": len(batch) * largest * (inputs + outputs),
    "every A, and a mask": len(batch) * len(A_cells) * (inputs + outputs),
}
for name, count in work.items():
    print(f"{name:<20} {count / 1e6:>6.2f} million multiplications")

# %% [markdown]
# The gather and the segments need the same number of multiplications. They differ in what is read: the gather reads the
# cells of an adapter for each of its rows, the segments once for all of them. The library's server
# (`serving/mixed_product.py`) uses segments from 8 rows on, and the gather for the others.
#
# ## Memory in pages
#
# The keys and values of a text grow with each token. An adapter is loaded when someone asks for it. Nobody knows in advance
# how much of either will be needed, so S-LoRA puts both into one pool, which is divided into pages, as PagedAttention
# (Kwon et al. 2023, arXiv:2309.06180) does for keys and values. In the library's pool a page holds the keys and values
# of 16 tokens, or two ranks of an adapter:

# %%
layout = PageLayout.for_model(model.config)


def pages_of(rank):
    """The number of pages of an adapter that changes every matrix."""
    return layout.place([(rank, width) for pair in layers.values() for width in pair])[1]


sizes = {name: pages_of(rank) for name, rank in ranks.items()}
print(f"a page: {4 * layout.size / MB:.2f} MB, the keys and values of {layout.tokens} tokens")
print(
    f"an adapter of rank 18: {pages_of(18)} pages, as much as the keys and values of {pages_of(18) * layout.tokens} tokens"
)

# %% [markdown]
# The bookkeeping is a list of free pages, and a table that says which pages each owner has, in order. It is little code,
# but every mistake in it makes two requests write into the same memory.

# %% exercise="PageTable"

# %%
Table = working("PageTable")

table = Table(6)
print("fox gets", table.allocate("fox", 2))
print("a text gets", table.allocate("text", 1))
table.release("fox")
print("fox is released. The text grows, and has", table.allocate("text", 3))

# %% [markdown]
# The text now has pages that held the adapter, wherever they are, and no memory was moved.
#
# ## Whose keys and values are these?
#
# Many prompts begin alike, with the same instructions for example. A server with a *prefix cache* keeps the pages of such
# a beginning after the request has ended, under a key that is made from the tokens. If the next prompt begins with the
# same tokens, its pages are found, and it need not be computed again. A key belongs to a full page, and depends on all
# tokens up to the end of that page, because the keys and values there depend on them.
#
# Our server has no prefix cache. vLLM has one, and when it was new, its keys were made like those of this function of
# ours, which is an exhibit for the museum of faults. What is wrong with it? Decide before you read on.

# %%
print(inspect.getsource(faulty_block_keys))

# %% [markdown]
# The argument `adapter` is not used. What does that do to a run? Let one adapter read three full pages of a tale, and
# another one the next token, on the pages of the first, as the cache would. The adapters of this unit are made at random
# when the store asks for them (it would read them from a directory).


# %%
class MadeAtRandom:
    """Takes the place of the store's reader of directories. In a folder "unscaled" the adapters lack their s = 2."""

    def read(self, directory):
        generator = torch.Generator().manual_seed(int(directory.name[-3:]))
        rank, scaling = ranks[directory.name], 1.0 if directory.parent.name == "unscaled" else 2.0

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        return {
            name: LayerFactors(normal(rank, inputs) / inputs**0.5, scaling * 0.2 * normal(rank, outputs) / rank**0.5)
            for name, (inputs, outputs) in layers.items()
        }


def new_store(pages):
    store = AdapterStore(model, PagePool(layout, pages))
    store.reader = MadeAtRandom()
    return store


def version(name):
    return AdapterVersion(name, Path(name), ())


store = new_store(400)
paged = PagedGPT2(model, store.pool)
SHARED = 3 * layout.tokens  # three full pages
beginnings = [tokenizer.encode(tale)[: SHARED + 1] for tale in load_tales()[:8]]


def next_token(reads, writes, tokens):
    """Log-probabilities of the token after these, of which one adapter reads the full pages and another the last one."""
    first, second = (store.acquire(version(name)).rows for name in (reads, writes))
    pages = store.pool.allocate("text", layout.pages_for_tokens(len(tokens)))
    paged([Text(tokens[:SHARED], 0, pages, first)])
    logits = paged([Text(tokens[SHARED:], SHARED, pages, second)])[0]
    store.pool.release("text")
    return logits.log_softmax(dim=-1)


def compare(found, wanted):
    """The mean Kullback-Leibler divergence from what is wanted, and how often another token is the most likely one."""
    pairs = list(zip(found, wanted, strict=True))
    nats = sum(float((right.exp() * (right - wrong)).sum()) for wrong, right in pairs) / len(pairs)
    other = sum(int(right.argmax() != wrong.argmax()) for wrong, right in pairs)
    return f"{nats:.2f} nats; another most likely token in {other} of {len(pairs)} cases"


names = list(ranks)[:4]
alone = {name: [next_token(name, name, tokens) for tokens in beginnings] for name in names}
pairs = [(one, other) for one in names for other in names if one != other]
wanted = [right for _, b in pairs for right in alone[b]]
print("How far from adapter b alone, for 12 pairs of adapters and 8 texts:")
print("b on the pages of a:", compare([next_token(a, b, t) for a, b in pairs for t in beginnings], wanted))
print("adapter a alone:    ", compare([one for a, _ in pairs for one in alone[a]], wanted))

# %% [markdown]
# No error is raised, but what adapter b predicts with the pages of adapter a is far from what it predicts with its own:
# more than half as far as the predictions of adapter a are, and no nearer by the most likely token. What it writes
# depends on who asked before. The fault was in vLLM in March 2024 (issue 3264, mended by pull request 3263). Later it was reported in another form (issue 30931, for version 0.11.1): two adapters with the same name and
# different weights shared their pages. So the key must contain the name of the adapter *and* its version.
#
# Write the test that finds such faults. The check runs it on several sound functions and several faulty ones.

# %% exercise="test_block_keys"

# %%
test_keys = working("test_block_keys")

for name, function in {"the exhibit": faulty_block_keys, "the mended one": block_keys}.items():
    try:
        test_keys(function)
        print(f"{name}: passes")
    except AssertionError as error:
        print(f"{name}: fails ({error})")

# %% [markdown]
# Mended, it starts the chain of keys with the adapter:

# %%
print(inspect.getsource(block_keys).split('"""')[2].strip("\n"))

# %% [markdown]
# ## Which adapter has to go
#
# Loaded adapters stay in the pool, in case they are asked for again. When pages are missing, some of them have to go. The
# usual rule is LRU: evict the *least recently used* one. It has one exception: an adapter that a running request uses must
# stay.

# %% exercise="to_evict"

# %% [markdown]
# How often does a request find its adapter in the pool? That depends on the traffic.

# %% prediction="one_adapter_more"


# %%
def hit_rate(requests, room, rule):
    """The share of requests whose adapter is there, in a cache with room for this many adapters of one page."""
    cache, hits = [], 0  # the least recently used first
    for name in requests:
        if name in cache:
            hits += 1
            cache.remove(name)
        else:
            for old in rule([(adapter, 1, 0) for adapter in cache], len(cache) + 1 - room):
                cache.remove(old)
        cache.append(name)
    return hits / len(requests)


evict = working("to_evict")
few = list(ranks)[:64]
traffic = {
    "in turn": few * 50,
    "at random": random.Random(0).choices(few, k=3200),
    "Zipf": zipf(3200, 64, seed=0),
}
rooms = list(range(1, 65))
rates = {name: [hit_rate(requests, room, evict) for room in rooms] for name, requests in traffic.items()}
print(f"33 in turn, room for 32: {hit_rate(list(ranks)[:33] * 50, 32, evict):.0%}")
print(f"33 in turn, room for 33: {hit_rate(list(ranks)[:33] * 50, 33, evict):.0%}")
print("64 adapters, room for    8    16    32    48    63    64")
for name, found in rates.items():
    print(f"{name:<22}" + "".join(f"{found[room - 1]:>6.0%}" for room in (8, 16, 32, 48, 63, 64)))

# %% check="one_adapter_more"

# %%
figure, (axes,) = plotting.panels(1, width=7, height=3.8)
plotting.named_curve(axes, [100 * r for r in rates["Zipf"]], "Zipf", at=20, offset=(0, 8), side="right", style=0)
plotting.named_curve(
    axes, [100 * r for r in rates["at random"]], "equally popular", at=30, offset=(6, -12), side="left", style=1
)
plotting.named_curve(axes, [100 * r for r in rates["in turn"]], "in turn", at=58, offset=(0, 6), side="right", style=2)
plotting.label(
    axes,
    x="adapters that fit into the cache",
    y="hits, % of the requests",
    title="64 adapters, least recently used goes",
)
show(
    figure,
    "Hit rate against the number of adapters that fit, of 64. Zipf traffic: a steep rise that flattens, "
    f"{rates['Zipf'][15]:.0%} with room for 16. Equally popular adapters: a straight line. Adapters asked for in turn: zero "
    "up to 63, then nearly 100 % at 64.",
)

# %% [markdown]
# Whether there is a cliff depends on the traffic, not on the cache alone. With Zipf traffic the rate falls gently when the
# room shrinks, because the popular adapters stay. With adapters that are asked for in turn, one place too few takes it from
# nearly all to nothing. Real traffic can be like that: a nightly job that goes through all customers. A field report by
# pioneer.ai describes a server with an LRU cache of 25 adapters whose throughput fell to a 44th when the adapters in use
# no longer fitted.
#
# ### Your own rule
#
# Write a rule that beats LRU on one of the three kinds of traffic, and see what it does to the others. You may evict by any
# order that you like (`adapters` has the least recently used first), but never one in use. Say first which traffic you
# want to improve, and what you expect of the other two. (A rule sees what is in the cache when a place is missing, and no
# counts of requests. What does that rule out for Zipf traffic?)


# %%
def my_rule(adapters, missing):
    """The names of the adapters to evict. Change this line."""
    return evict(adapters, missing)


print("room for 32 of 64      LRU   yours")
for name, requests in traffic.items():
    print(f"{name:<20}{rates[name][31]:>6.0%} {hit_rate(requests, 32, my_rule):>7.0%}")
if all(hit_rate(requests, 32, my_rule) == rates[name][31] for name, requests in traffic.items()):
    print("Yours is LRU: change `my_rule`.")

# %% [markdown]
# ## Who may join
#
# The batch changes at every pass of the model: finished requests leave, waiting requests join (continuous batching; Orca,
# Yu et al. 2022). A request that joins must be able to run to its end. If the pool is full in the middle of it, something
# has to be thrown away and computed again. So look ahead: if every request takes as many passes as it may, what is the
# largest number of pages that are ever in use at once? S-LoRA (section 5.2) adopts this rule from LightLLM, and the
# library's `peak_pages` computes it.
#
# `peak_pages(stored, left, adapters, layout)` takes a list of stored tokens, a list of passes left, and a list of pairs, one
# for each *different* adapter: its pages, and the number of passes for which it is needed. An example with 4 tokens in a
# page. Text a has stored 11 tokens and has 1 pass left. Text b has a prompt of 4 tokens and 9 passes left. Its first pass
# reads the whole prompt, so that afterwards 4 tokens are stored; before it, count one less, 3. Counted like this, every pass of
# a text stores one token:
#
# | after pass | tokens of a | pages of a | tokens of b | pages of b | together |
# |---:|---:|---:|---:|---:|---:|
# | 1 | 12 | 3 | 4 | 1 | 4 |
# | 2 | has finished | 0 | 5 | 2 | 2 |
# | 9 | | 0 | 12 | 3 | 3 |
#
# Each of them needs up to 3 pages, but never at the same time: the peak is 4, not 6.

# %%
small = PageLayout(1, 1, 4, (1,))  # 4 tokens in a page; the rest does not matter here
print(peak_pages([11, 3], [1, 9], [], small))
print(
    peak_pages([11, 3], [1, 9], [(2, 9)], small),
    "with an adapter of 2 pages that is needed for 9 passes",
)

# %% [markdown]
# An adapter needs its pages once, however many of the requests use it, and until the last of them has finished. Now write
# one step of the scheduler.

# %% exercise="joining"

# %% [markdown]
# With your page table, your eviction rule and your scheduler you have a server, apart from the model. `simulate` lets it
# serve 96 requests that all wait at the start, with a pool of 200 pages, and notes the owner of each page after each pass.

# %% figure="unit_22.png"
join = working("joining")
draw = random.Random(3)
jobs = [Job(name, draw.randint(8, 100), draw.randint(8, 60)) for name in zipf(96, 1000, seed=3)]
report = simulate(jobs, sizes, 200, layout, 32, table=Table, evict=evict, join=join)
shades = {type(None): 0, str: 1, int: 2}
picture = torch.tensor([[shades[type(owner)] for owner in owners] for owners in report.owners]).T
figure, (axes,) = plotting.panels(1, width=8, height=4)
image = axes.imshow(picture, cmap=colormaps["gray_r"].resampled(3), vmin=-0.5, vmax=2.5, aspect="auto", origin="lower")
bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2])
bar.ax.set_yticklabels(["free", "an adapter", "a text"])
plotting.label(axes, x="pass of the model", y="page", title="One pool for adapters, keys and values")
show(
    figure,
    "The pages of a server's memory (up) over the passes of the model (right). Each page is free, holds a part of an "
    "adapter, or holds keys and values of a text. Texts appear and vanish in many small pieces, adapters stay for a longer "
    "time.",
)
print(f"{report.passes} passes, {report.loads} loads, {report.evictions} evictions")

# %% [markdown]
# How large must the pool be? Simulations answer that in a second. The same requests with other pools, and 400 of them, so
# that adapters are asked for again:

# %%
draw = random.Random(4)
many = [Job(name, draw.randint(8, 100), draw.randint(8, 60)) for name in zipf(400, 1000, seed=4)]
tokens = sum(job.new for job in many)
print(f"{len(many)} requests, {len({job.adapter for job in many})} different adapters, {tokens:,} tokens")
print("pages   MB    passes   tokens per pass   loads   hits")
for pages in (100, 200, 400, 800, 1600):
    found = simulate(many, sizes, pages, layout, 32, table=Table, evict=evict, join=join)
    hits = 1 - found.loads / len(many)
    print(
        f"{pages:>5} {4 * pages * layout.size / MB:>4.0f} {found.passes:>9} {tokens / found.passes:>17.1f} {found.loads:>7} {hits:>6.0%}"
    )

# %% [markdown]
# Two things limit a small pool: fewer requests fit into a batch, so more passes are needed; and adapters are loaded more
# often. From 800 pages on the 32 rows are the limit, and more memory only saves loads. No pool can save the first load of
# each adapter: with 192 adapters and 400 requests at most 52 % can be hits.
#
# **Why nobody may overtake.** A rule that lets smaller requests join before one that does not fit would fill the batch
# better. Here is a large request, and in each pass three small ones arrive.


# %%
def large_request(overtaking, passes=200):
    """When the large request joins. Requests are (adapter, stored, left); the pool has 20 pages."""
    large, small = (None, 99, 100), (None, 7, 8)
    waiting, running = [large], [(None, 7 + k % 8, 8 - k % 8) for k in range(20)]
    for number in range(passes):
        waiting, behind = [*waiting, small, small, small], []
        while waiting:
            count = join(waiting, running, sizes, 20, 32, layout)
            running = running + waiting[:count]
            behind += waiting[count : count + 1] if overtaking else waiting[count:]
            waiting = waiting[count + 1 :] if overtaking else []
        if large in running:
            return f"joins in pass {number}"
        waiting, running = behind, [(adapter, stored + 1, left - 1) for adapter, stored, left in running if left > 1]
    return f"is still waiting after {passes} passes"


print("first come, first served: the large request", large_request(overtaking=False))
print("with overtaking:          the large request", large_request(overtaking=True))

# %% [markdown]
# ## Three ways to serve
#
# How much does the mixed batch gain? Compare it with the two ways that need no new code: *one adapter after another*, each
# in its own batch; and *merge and switch*, which adds each adapter to the weights before its requests (unit 10).

# %% prediction="thirty_two_adapters"

# %% [markdown]
# First by counting. A pass reads the model once, and the adapters: an adapter with at least 8 rows is a segment and read
# once, the others are read for each row. A switch reads and writes every adapted matrix, and reads two adapters.


# %%
def moved(rows_of_each, new, rank=18):
    """Passes and bytes of the three ways, if the adapters have these numbers of rows, each with `new` tokens."""
    adapter, matrices = 4 * rank * numbers_per_rank, 4 * sum(inputs * outputs for inputs, outputs in layers.values())
    reads = [adapter * (1 if rows >= SEGMENT_FROM else rows) for rows in rows_of_each]
    groups = len(rows_of_each)
    return {
        "mixed batch": (new, new * (model_bytes + sum(reads))),
        "one after another": (groups * new, new * (groups * model_bytes + sum(reads))),
        "merge and switch": (groups * new, groups * (new * model_bytes + 2 * matrices + 2 * adapter)),
    }


counts = (1, 2, 4, 8, 16, 32)
found = {count: moved([32 // count] * count, 32) for count in counts}
print("GB that are moved for 32 requests with 32 tokens each, and passes of the model")
print("adapters              " + "".join(f"{count:>12}" for count in counts))
for way in found[1]:
    cells = [found[count][way] for count in counts]
    print(f"{way:<22}" + "".join(f"{moved / 1e9:>6.1f} ({passes:>3})" for passes, moved in cells))
ratio = found[32]["merge and switch"][1] / found[32]["mixed batch"][1]
print(f"32 adapters: merge and switch moves {ratio:.1f} times as many bytes as the mixed batch")

# %% check="thirty_two_adapters"

# %% [markdown]
# With a single adapter all three are about equal. With each further adapter the other two ways read the whole model once
# more for every token. In the mixed batch the step is at 8 adapters, which have 4 rows each: from there on the gather reads
# an adapter for every row, however many rows share it.
#
# Then by the clock: 32 requests with 12 tokens each, on the library's server. The times differ in every run and
# on every computer; look at the ratios. All ways should give the same tokens, but for ties that rounding decides.


# %%
def served(scheduler, asked, new):
    """The tokens of these requests, which wait together at the start."""
    requests = [Request(prompt, new, version(name)) for name, prompt in asked]
    for request in requests:
        scheduler.submit(request)
    while scheduler.waiting or scheduler.running:
        scheduler.step()
    return [request.tokens for request in requests]


def one_after_another(scheduler, asked, new):
    names = dict.fromkeys(name for name, _ in asked)
    texts = {name: served(scheduler, [one for one in asked if one[0] == name], new) for name in names}
    return [texts[name].pop(0) for name, _ in asked]


def merge_and_switch(merged, asked, new):
    before, texts = {}, {}
    for name in dict.fromkeys(name for name, _ in asked):
        switch_task(merged, before, factors[name])
        prompts = [prompt for other, prompt in asked if other == name]
        texts[name] = [text[-new:] for text in generate(merged, prompts, max_new_tokens=new)]
        before = factors[name]
    return [texts[name].pop(0) for name, _ in asked]


server, NEW = Scheduler(model, new_store(1000), max_rows=32), 12
draw = random.Random(5)
prompts = [[draw.randrange(model.config.vocab_size) for _ in range(16)] for _ in range(32)]
made = {name: MadeAtRandom().read(Path(name)) for name in list(ranks)[:32]}
factors = {name: {layer: (one.A, one.B.T) for layer, one in adapter.items()} for name, adapter in made.items()}
results, seconds = {}, {}
for count in counts:
    asked = [(list(ranks)[row % count], prompt) for row, prompt in enumerate(prompts)]
    served(server, asked, 1)  # loads the adapters
    for way, run, on in (
        ("mixed batch", served, server),
        ("one after another", one_after_another, server),
        ("merge and switch", merge_and_switch, copy.deepcopy(model)),
    ):
        start = time.process_time()
        results[way, count] = run(on, asked, NEW)
        seconds[way, count] = time.process_time() - start
ways = ["mixed batch", "one after another", "merge and switch"]
equal = sum(results["mixed batch", count] == results[way, count] for count in counts for way in ways[1:])
print(f"the same tokens as in the mixed batch in {equal} of {2 * len(counts)} cases")

# %% volatile=true
print("tokens per second of processor time, and relative to the mixed batch")
print("adapters              " + "".join(f"{count:>14}" for count in counts))
for way in ways:
    speeds = [32 * NEW / seconds[way, count] for count in counts]
    relative = [seconds["mixed batch", count] / seconds[way, count] for count in counts]
    print(f"{way:<22}" + "".join(f"{speed:>7,.0f} ({part:.2f})" for speed, part in zip(speeds, relative, strict=True)))

# %% [markdown]
# With more adapters the other two ways lose most of their speed, as counted. The mixed batch loses much less than its
# bytes say, and the step at 8 adapters need not show, since a processor has to compute as well as to read. The
# library's own measurement, with Zipf traffic over 1,000 and over 4,000 adapters, in which several requests share an
# adapter (`benchmarks/serving.md`), has the mixed batch ahead of merging by factors of 5.2 and 5.3, ahead of one adapter
# after another by 5.7 and 5.8, and at half of the throughput of the base without adapters.
#
# ## What goes wrong in practice
#
# **The scaling is applied in one product only.** Punica's kernel for decoding, `add_lora_bgmv`, has an argument for the
# scaling, and its kernel for prompts, `add_lora_sgmv_cutlass`, has none (`ops/__init__.py` at 1495038). If B is stored
# without the scaling, prompts are read with s = 1 and tokens are written with s = alpha / r. Nothing fails. With s = 2:

# %%
found = [next_token(f"unscaled/{name}", name, tokens) for name in names for tokens in beginnings]
print("prompts without the scaling:", compare(found, [right for name in names for right in alone[name]]))

# %% [markdown]
# The remedy is to multiply s into B once, when the adapter is loaded. Then no product needs it.
#
# **Padding that reads what belongs to others.** A common way to avoid mixed ranks is to fill up the lists of cells with
# the number 0. But cell 0 belongs to somebody.

# %%
k = min(range(len(different)), key=lambda k: len(places[k]))
padded = torch.cat([places[k], torch.zeros(4, dtype=torch.long)])
right, wrong = gather(x[:1], A_cells, B_cells, [places[k]]), gather(x[:1], A_cells, B_cells, [padded])
owner = next(different[other] for other in range(len(different)) if 0 in places[other])
print(
    f"four cells of padding: {different[k]} is off by {(wrong - right).norm() / right.norm():.0%}, from a cell of {owner}"
)

# %% [markdown]
# **Looking only at the next pass.** If a request joins as soon as the pool has room for its next token, the pool is full
# some passes later, in the middle of the texts:


# %%
def only_the_next_pass(waiting, running, sizes, pages, max_rows, layout):
    now = [(adapter, stored, 1) for adapter, stored, _ in waiting]
    return join(now, [(adapter, stored, 1) for adapter, stored, _ in running], sizes, pages, max_rows, layout)


try:
    simulate(many, sizes, 100, layout, 32, table=Table, evict=evict, join=only_the_next_pass)
except OutOfPages as error:
    print(f"OutOfPages: {error}")

# %% [markdown]
# ## Summary
#
# - In a mixed batch the base is computed once for all rows; a gather or segments add each row's own adapter, of any rank.
# - Pages let adapters, keys and values share one pool. What a page holds belongs to one adapter, and to one version of it.
# - Least recently used is good for Zipf traffic; adapters that are asked for in turn defeat it as soon as one does not fit.
# - Look ahead before a request joins, and let nobody overtake: then no text fails half-way, and none waits forever.
# - With many adapters, merging and serving one after another read the model again for each of them; the batch does not.
#
# ## Go further
#
# - Chen et al. 2023, *Punica* (arXiv:2310.18547); Sheng et al. 2023, *S-LoRA* (arXiv:2311.03285); Kwon et al. 2023,
#   *PagedAttention* (arXiv:2309.06180).
# - `lora_from_scratch/serving/`, in the order of `docs/serving.md`: the server whose parts you have written, over HTTP.
# - Change `jobs`: what do longer prompts, or 4,000 adapters, do to the passes and to the loads?

# %% [markdown] open_question="a_server_for_customers" points=4
# ### Open question
#
# A company serves 400 customers, each with an adapter of rank 16, from one GPU. By day the traffic is like Zipf's law. At
# night a job goes through all customers, one request each, again and again. The server keeps 64 adapters and evicts the
# least recently used one; at night it is twenty times slower. Write at most 150 words: what happens, which number would you
# look at to be sure, and what would you change, at which cost?
#
# **Rubric.**
#
# - 1 point: adapters asked for in turn, more of them than there is room for: with LRU every request is a miss.
# - 1 point: a measurement: hit rate or loads per request, by day and by night, or a simulation with recorded requests.
# - 1 point: a remedy that fits: grouping the job's requests by adapter, several requests per adapter, or another rule.
# - 1 point: its cost: requests that wait, a smaller batch of texts if adapters get more memory, worse hit rates by day.

# %% volatile=true
progress("22")
