# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 06: Prefix tuning
#
# **By the end of this unit you can**
#
# - give every layer of a GPT-2 a past that it never read, and say why a past of zeros is not the same as none;
# - train that past through an MLP, throw the MLP away, and keep a file of a few kilobytes;
# - put a gate in front of it that starts shut, so that the model begins as what it was;
# - say what a prefix costs, and why a longer one need not be a better one.
#
# **Prerequisites**: attention (unit 03), a training run (unit 04) and, for comparison, soft prompts (unit 05).
#
# **Time**: about 80 minutes, two of them computing. 7 exercises, 2 predictions, one open question.
#
# ![Left, loss curves of four methods: two prefixes, one made by an MLP and one learned directly, start high and end
# lowest; a gated prompt and a soft prompt start low and move less. Right, the held-out loss for three lengths of the
# prefix, with three seeds each.](unit_06.png)

# %%
import copy
import os
from itertools import pairwise

import safetensors.torch
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.prompt_tuning import PromptTuning
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 15 minutes and 6 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 24))  # of each training run
BATCH = 4

# %% [markdown]
# ## A past that was never read
#
# A soft prompt (unit 05) acts at one place: at the input. The first layer reads its vectors like words, and what the
# layers above get to see is whatever the frozen layers below make of them. That is a long way for a gradient and a
# narrow door for what you want to say.
#
# What does a token see of the text before it? In each layer, the **keys** and **values** of the tokens before, and
# nothing else. Once these are computed nobody asks any more which words they came from; that is why generation can
# keep them in a cache (unit 03). So you need no words. Put P keys and values of your own in front, in *every* layer,
# and the model behaves as if it had read something. This is a **prefix** (Li and Liang 2021, arXiv:2101.00190, section
# 4.2). For one head, with q (T, hd) and K, V (T, hd) of the text:
#
# $$\mathrm{softmax}\!\left(\frac{q\,[P_K; K]^\top}{\sqrt{hd}} + \mathrm{mask}\right)[P_V; V]$$
#
# - $P_K$ and $P_V$ (P, hd): the prefix's keys and values, **learned**, others in each layer and each head;
# - $[P_K; K]$ (P + T, hd): one below the other.

# %% exercise="prefix_attention"

# %% [markdown]
# Try it with numbers that you can follow: the score of every key is 0 (q is zero), so that all weights are equal.

# %%
attend = working("prefix_attention")

q = torch.zeros(1, 1, 2, 4)  # two tokens, one head
v = torch.ones(1, 1, 2, 4)
for length in (1, 3, 9):
    nothing = torch.zeros(1, 1, length, 4)
    y = attend(q, v, v, nothing, nothing)
    print(f"P = {length}: all values of the text are 1, and out come {y[0, 0, 0, 0]:.2f} and {y[0, 0, 1, 0]:.2f}")

# %% [markdown]
# ## Zeros
#
# Every method so far could start as the model that you loaded. What would you choose as the first values of a prefix?

# %% prediction="zero_prefix"

# %% [markdown]
# Before you look, get yourself an instrument. The weights of a softmax add up to 1. The part that goes to the prefix
# is its **share**, $\lambda$. With it you can take prefix attention apart (He et al. 2022, arXiv:2110.04366, section
# 3.1):
#
# $$\text{prefix attention} = (1 - \lambda)\ \text{attention to the text} + \lambda\ \text{attention to the prefix}.$$
#
# There is a share for each token and each head: (B, H, T).

# %% exercise="prefix_share"

# %% [markdown]
# Is the mixture true? Try it on random numbers.

# %%
share = working("prefix_share")
draw = torch.Generator().manual_seed(0)

q, k, v = torch.randn(3, 2, 4, 6, 8, generator=draw)  # each (B, H, T, hd)
prefix_k, prefix_v = torch.randn(2, 1, 4, 5, 8, generator=draw)
part = share(q, k, prefix_k)[..., None]
to_text = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
to_prefix = torch.softmax(q @ prefix_k.mT / 8**0.5, dim=-1) @ prefix_v
mixture = (1 - part) * to_text + part * to_prefix
print(f"the mixture and prefix attention differ by {(mixture - attend(q, k, v, prefix_k, prefix_v)).abs().max():.1e}")
print("the share that each of 6 tokens gives to the prefix:", [f"{s:.2f}" for s in part[0, 0, :, 0].tolist()])

# %% [markdown]
# (The first token sees nothing of the text but itself, so its share is large: a prefix changes the beginning of a text
# most.)
#
# ## One row, all layers
#
# What is stored of a prefix is one matrix, (P, 2 L d): for each virtual token a row with the K and V of every layer,
# as PEFT lays it out. A model needs them by layer and head.

# %% exercise="split_prefix"

# %% [markdown]
# How many numbers is that? Li and Liang use P = 5 for table-to-text on GPT-2 medium (24 layers, d = 1024) and speak of
# 0.1 % of the parameters (section 6.1). You can count more than that, because they do not train the prefix itself:
# they train a small network that makes it (section 4.3), with an embedding $E$ (P, d) and m numbers in between:
#
# $$E \longrightarrow \mathrm{Linear}(d, m) \longrightarrow \tanh \longrightarrow \mathrm{Linear}(m, 2 L d).$$
#
# This is a **reparametrisation**: other parameters for the same thing.

# %% exercise="prefix_parameter_count"

# %%
count = working("prefix_parameter_count")

medium = 354_823_168  # GPT-2 medium
for name, hidden in {"kept, the prefix itself": None, "trained, with an MLP of m = 512": 512}.items():
    numbers = count(24, 1024, 5, hidden)
    print(f"{name:<33} {numbers:>12,}  {numbers / medium:6.2%} of GPT-2 medium")

# %% [markdown]
# A tenth of a per cent is *kept*. A hundred times as much is *trained*. Whoever compares methods by their trained
# parameters has to say which of the two is meant. (For LoRA, unit 09, they are the same.)
#
# ## The encoder
#
# Now the module that holds all this. `enter`, which hands the prefix to the model as its past, is written already; it
# uses your `split_prefix`. What the encoder is made of, and what the prefix is, is yours.

# %% exercise="PrefixEncoder"

# %% [markdown]
# Once the training is over, nobody needs the MLP. Its output has always been the same whatever the text: compute it
# once, and throw the rest away.

# %% exercise="fold_prefix"

# %% [markdown]
# Now put a prefix into the model, and see what it is worth before anything is trained.

# %%
Encoder, fold = working("PrefixEncoder"), working("fold_prefix")

base, tokenizer = load_gpt2(MODEL)
config, total = base.config, sum(p.numel() for p in base.parameters())
dataset = load_dataset("story-cards")
examples = Completions(dataset.train, tokenizer, config.n_positions)
held_out = Completions(dataset.validation[: 8 * 16 : 8], tokenizer, config.n_positions).batches(16)
before = completion_loss(base, held_out)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def with_prefix(length, hidden=512, seed=0, values=None):
    """A frozen copy of the base with a new prefix in it, or with a prefix of these values, (P, 2 L d)."""
    model = copy.deepcopy(base).requires_grad_(False)
    encoder = Encoder(config, length, hidden if values is None else None, seeded(seed))
    if values is not None:
        encoder.embedding.data.copy_(values)
    encoder.put_into(model)
    return model


def zeros(length):
    return with_prefix(length, values=torch.zeros(length, 2 * config.n_layer * config.n_embd))


model = with_prefix(16)
print(f"the encoder trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} numbers")
print(f"the prefix has     {fold(model.virtual_tokens).numel():,}, {fold(model.virtual_tokens).numel() / total:.2%}")

# %% [markdown]
# One thing has to be kept apart. The text behind a prefix of P starts at position P, as in PEFT, and GPT-2 has learned
# an embedding for each position. So compare with a third model: no prefix at all, and only the positions shifted.


# %%
class Shifted(nn.Module):
    """The base, reading a text as if P tokens stood before it."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, ids):
        return base(ids, position_ids=torch.arange(ids.shape[1])[None] + self.length)


print(f"the base: {before:.3f} nats per token\n")
print("  P   only shifted   a prefix of zeros   what a new encoder makes   N(0, 1)")
for length in (1, 16, 64):
    losses = [
        completion_loss(model, held_out)
        for model in (Shifted(length), zeros(length), with_prefix(length), with_prefix(length, hidden=None))
    ]
    print("{:>3}   {:>12.3f}   {:>17.3f}   {:>24.3f}   {:>7.3f}".format(length, *losses))

# %% check="zero_prefix"

# %% [markdown]
# Read the first column as well: with a long prefix the shift alone costs something, before anybody has put a number
# into it. What a new encoder makes is small, and does about what zeros do; large random numbers do more.
#
# And where does the attention go? Your instrument tells, layer by layer. Move the slider: a longer prefix of zeros.


# %%
def shares(model, ids):
    """The mean share of the prefix in each layer and head, (L, H)."""
    read, rows = [], []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, given: read.append(given[0])) for block in model.transformer.h
    ]
    with torch.no_grad():
        model(ids)
        layers = working("split_prefix")(fold(model.virtual_tokens), config.n_layer, config.n_head)
        for block, x, (prefix_k, _) in zip(model.transformer.h, read, layers, strict=True):
            q, k, _ = block.attn.project(x)
            rows.append(share(q, k, prefix_k).mean(dim=(0, 2)))
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


text = held_out[0].input_ids[:4, :48]


def draw_shares(length):
    seen = shares(zeros(length), text)
    figure, (axes,) = plotting.panels(1, width=6.0, height=2.6)
    layers = range(len(seen))
    axes.bar(layers, seen.mean(dim=1).tolist(), color=plotting.COLOURS[4], width=0.6)
    for layer in layers:
        axes.plot([layer] * seen.shape[1], seen[layer].tolist(), ".", color="black", markersize=5)
    axes.set_xticks(layers)
    axes.set_ylim(0, 1)
    plotting.label(
        axes, x="layer", y="share of the attention", title=f"{length} zeros: bars are layers, points are heads"
    )
    return figure


slider(
    draw_shares,
    "P",
    [1, 4, 16, 64],
    16,
    "Bars of the share of the attention that a prefix of zeros takes in each layer, and a point for each head. The heads "
    "of one layer differ a lot. With a longer prefix all bars grow.",
)

# %% [markdown]
# ## Directly, or through an MLP?
#
# Why the detour through an MLP, if it is thrown away? Li and Liang write that training the prefix directly is unstable
# and ends worse (section 4.3). Try both, with the same batches. The library's rate was chosen for the encoder with the
# MLP; numbers that are learned directly may want quite another one, so they get three tries, far apart.


# %%
def train(model, what, rate, seed=0):
    settings = TrainingSettings(steps=STEPS, learning_rate=rate, warmup_steps=STEPS // 4, seed=seed)
    bar = tqdm(total=STEPS, desc=what, unit="step")

    def batch_at(step):
        bar.update()
        return examples.batch_at(step, BATCH, seed)

    losses = Trainer(model, batch_at, settings, progress=False).run().losses
    bar.close()
    return losses, completion_loss(model, held_out)


rate = defaults.learning_rate_for("prefix", config)
trained = with_prefix(16)
runs = {("MLP", 1): train(trained, "MLP", rate)}
runs["MLP", 4] = train(with_prefix(16), "MLP, rate x 4", 4 * rate)

# %%
for factor in (16, 64, 256):
    runs["direct", factor] = train(with_prefix(16, hidden=None), f"direct, rate x {factor}", factor * rate)

print(f"the base {before:.3f}; P = 16, {STEPS} steps\n")
print("the prefix is   learning rate   held-out loss")
for (way, factor), (_, loss) in runs.items():
    print(f"{way:<13}   {factor * rate:>13.2g}   {loss:>13.3f}")
best_direct = min((factor for way, factor in runs if way == "direct"), key=lambda factor: runs["direct", factor][1])

# %% [markdown]
# Is the best of the direct rates in the middle of the three? Then you have not stopped too early; always look whether a
# best setting lies at the edge of what was tried.
#
# When this unit was written it was in the middle, and came *near* to the MLP. So a good part of what the MLP does is
# this: Adam moves every number by about the learning rate in a step (unit 04). A number of the prefix is then one rate
# further on. Behind the MLP, it depends on hundreds of numbers which all move, and their effects add up: the prefix
# moves far at a rate that looks small. The second line is the other side of it: at four times the rate, the steps
# overshoot. (That is also why `train` spends a quarter of so short a run on warming up. With the library's usual 6 per
# cent, which is one step here, some seeds had shot up and did not come back in time. "Prefix tuning is difficult to
# optimize", say Hu et al. 2021, section 3, of this method.)
#
# What is left of the difference may be the MLP's own (all rows, layers and heads share it), or chance: this is one seed,
# a short run, and the best of three rates on the very cards that judge it. Li and Liang report that direct training
# *ends* worse. Liu et al. (2022, *P-tuning v2*, arXiv:2110.07602) find that it depends on the task.

# %%
with torch.no_grad():
    new, after = fold(with_prefix(16).virtual_tokens), fold(trained.virtual_tokens)
    folded = with_prefix(16, values=after)
    same = torch.equal(folded(text), trained(text))
moved = (after - new).abs()
print(
    f"the prefix's numbers have moved by {moved.mean():.2f} in the mean, {STEPS} steps of {rate:g} are {STEPS * rate:.2f}"
)
print(f"folded, the logits are the same bits: {same}")

# %% [markdown]
# ## Longer and longer
#
# More virtual tokens are more parameters. Are they better? Three lengths, the same steps, the same rate, and for each
# of them three seeds (the start and the order of the batches), because otherwise you would not know what a difference
# is worth.

# %%
LENGTHS = (1, 16, 64)
sweep = {16: [runs["MLP", 1][1]]}  # its first seed is trained already


def add_seeds(length):
    known = sweep.setdefault(length, [])
    for seed in range(len(known), 3):
        known.append(train(with_prefix(length, seed=seed), f"P = {length}", rate, seed)[1])


add_seeds(1)

# %%
add_seeds(16)

# %%
add_seeds(64)

# %%
print("  P   numbers kept   of the model   held-out loss of three seeds")
sweep = {length: sweep[length] for length in LENGTHS}
for length, results in sweep.items():
    kept = count(config.n_layer, config.n_embd, length)
    print(f"{length:>3}   {kept:>12,}   {kept / total:>12.2%}   {', '.join(f'{loss:.3f}' for loss in sorted(results))}")


# %%
def overlap(one, other):
    return max(one) >= min(other) and max(other) >= min(one)


means = {length: sum(results) / 3 for length, results in sweep.items()}
best = min(means, key=means.get)
print(f"the best mean has P = {best}")
for shorter, longer in pairwise(LENGTHS):
    verdict = "within the spread" if overlap(sweep[shorter], sweep[longer]) else "more than the spread"
    print(f"from P = {shorter:>2} to {longer:>2}: {means[longer] - means[shorter]:+.3f}, {verdict}")

# %% [markdown]
# From 1 to 16 it gains a lot. From 16 to 64 the prefix gets four times the parameters, and look what for: when this unit
# was written, the mean was *worse*, with one seed of the three as good as before. Is that an effect? The last line says
# what the seeds allow you to claim, and for three seeds it is not much. It is not the only try, though: with 32 steps and
# a warm-up of 2, which was how this experiment was set up first, each seed of 64 was worse than each of 16. So more
# parameters do not help here, and probably hurt; how much depends on how you train. *Why* you cannot see from this.
#
# The literature has the same, and reasons for it. Li and Liang: better up to about 10 virtual tokens on table-to-text and
# up to 200 on summarisation, then slightly worse, with a *lower* training loss, which is overfitting (section 7.1). Hu
# et al. (2021, section 5.5 and figure 2): on GPT-3 prefixes fall off beyond 32 virtual tokens; they suspect that so many
# of them move the input away from what the model was trained on. What follows in any case is the rule: **the length is a hyperparameter, and not a budget to be used up.**
#
# ## A gate that starts shut
#
# You have started above the base every time: a prefix *interferes* before it can help. LLaMA-Adapter (Zhang et al.
# 2023, arXiv:2303.16199, section 3.2) changes two things. The prompt gets a softmax of its own, so that it takes
# nothing away from the text. And what it gives goes through a gate g, one number for each head, that starts at zero:
#
# $$\mathrm{softmax}\!\left(\frac{q K^\top}{\sqrt{hd}} + \mathrm{mask}\right) V +
# \tanh(g)\ \mathrm{softmax}\!\left(\frac{q K_a^\top}{\sqrt{hd}}\right) V_a$$
#
# $K_a$ and $V_a$ (P, hd) are what the layer's own frozen projections make of P learned vectors. Compare with the
# mixture above: no $1 - \lambda$.

# %% exercise="gated_prefix_attention"

# %% [markdown]
# The same random prompt, as a prefix and behind a gate: by how much does the output of the attention change?

# %%
gated = working("gated_prefix_attention")

q, k, v = torch.randn(3, 2, config.n_head, 6, 32, generator=seeded(1))
prompt_k, prompt_v = torch.randn(2, 1, config.n_head, 16, 32, generator=seeded(2))
plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
ways = {
    "as a prefix": attend(q, k, v, prompt_k, prompt_v),
    "a prefix of zeros": attend(q, k, v, 0 * prompt_k, 0 * prompt_v),
}
for g in (0, 0.01, 0.5):
    ways[f"behind a gate of {g:g}"] = gated(q, k, v, prompt_k, prompt_v, torch.full((1, config.n_head, 1, 1), float(g)))
for name, y in ways.items():
    print(f"{name:<22} {(y - plain).norm() / plain.norm():7.2%}")

# %% prediction="who_learns_first"

# %%
method = LlamaAdapter(num_virtual_tokens=16)
model = copy.deepcopy(base)
method.adapt(model)
print(f"the base {before:.6f}, with shut gates {completion_loss(model, held_out):.6f}")

batch = examples.batch_at(0, BATCH, 0)
optimizer = torch.optim.Adam(method.trainable(model).values(), lr=defaults.learning_rate_for("llama-adapter", config))
for step in (1, 2):
    logits = model(batch.input_ids)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
    sizes = {"gate": [], "prompt": []}
    for name, parameter in method.trainable(model).items():
        sizes[name.rpartition("_")[2]].append(float(parameter.grad.abs().max()))
    print(
        f"backward pass {step}: largest gradient of a gate {max(sizes['gate']):.1e}, of a prompt {max(sizes['prompt']):.1e}"
    )
    optimizer.step()
    optimizer.zero_grad()

# %% check="who_learns_first"

# %% [markdown]
# Now train it beside a soft prompt of the same length, each at the library's rate for it, with the same batches.

# %%
others = {"gated": (method, "llama-adapter"), "soft prompt": (PromptTuning(num_virtual_tokens=16), "prompt")}
curves = {"MLP": runs["MLP", 1], "direct": runs["direct", best_direct]}
for name, (method, key) in others.items():
    model = copy.deepcopy(base)
    method.adapt(model)
    curves[name] = train(model, name, defaults.learning_rate_for(key, config))
print(f"the base {before:.3f}; P = 16, {STEPS} steps\n")
print("               first batch   last six   held out")
for name, (losses, loss) in curves.items():
    print(f"{name:<14} {losses[0]:>11.3f}   {sum(losses[-6:]) / len(losses[-6:]):>8.3f}   {loss:>8.3f}")

# %% figure="unit_06.png"
figure, (left, right) = plotting.panels(2, width=5.2, height=3.4)
names = {"MLP": "prefix, MLP", "direct": "prefix, direct", "gated": "gated", "soft prompt": "soft prompt"}
ends = {name: plotting.smooth(losses, 6) for name, (losses, _) in curves.items()}
lowest, highest = min(min(values) for values in ends.values()), max(max(values) for values in ends.values())
last = None
for style, name in enumerate(sorted(ends, key=lambda name: ends[name][-1])):
    left.plot(range(1, STEPS + 1), ends[name], plotting.LINES[style], color=plotting.COLOURS[style], linewidth=1.8)
    last = ends[name][-1] if last is None else max(ends[name][-1], last + 0.07 * (highest - lowest))
    left.text(1.03 * STEPS, last, names[name], color=plotting.COLOURS[style], fontweight="bold", va="center")
left.set_xlim(0, 1.42 * STEPS)
plotting.label(left, x="step (means of 6 steps)", y="loss, nats per token", title="Four ways to add 16 vectors")
for length, results in sweep.items():
    right.plot([length] * 3, results, "o", color=plotting.COLOURS[0], markersize=4)
right.plot(LENGTHS, list(means.values()), color=plotting.COLOURS[0], linewidth=1.8)
right.set_xscale("log", base=2)
right.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
right.text(
    0.5,
    0.93,
    "points: three seeds\nline: their mean",
    color=plotting.COLOURS[0],
    ha="center",
    va="top",
    transform=right.transAxes,
    fontweight="bold",
)
plotting.label(right, x="P, virtual tokens", y="held-out loss, nats per token", title="What a longer prefix is worth")
show(
    figure,
    f"Left, the training loss over {STEPS} steps of a prefix made by an MLP, a prefix learned directly, a gated prompt "
    "and a soft prompt; they end at "
    + ", ".join(f"{names[name]} {values[-1]:.2f}" for name, values in ends.items())
    + ". Right, the held-out loss over the number of virtual tokens, three seeds each, with means of "
    + ", ".join(f"{mean:.2f} at P = {length}" for length, mean in means.items())
    + ".",
)

# %% [markdown]
# The gated prompt begins where the base is and never has to climb down; the prefix begins higher and overtakes. At first
# only the gates learn, and the prompts wait for them, so a careful start is a slow one. But read the order of the four
# with care. The library's rates are for runs of 500 steps, and only the direct prefix has had three tries. With a rate
# of 5e-3, which the library had before, the gated prompt hardly left the base in 24 steps. What is certain is where they
# *begin*. Which one you want depends on what you cannot afford: a bad start, or a slow one. LLaMA-Adapter was made for
# following instructions without losing what the model knows, with 1.2 M numbers on a model of 7 B.
#
# Where does the trained prefix get its attention from?

# %%
start, end = shares(with_prefix(16), text), shares(trained, text)
print("layer   share of a new prefix   of the trained one   the heads from - to")
for layer, (one, other) in enumerate(zip(start, end, strict=True)):
    print(f"{layer:>5}   {one.mean():>21.0%}   {other.mean():>18.0%}   {other.min():>10.0%} - {other.max():.0%}")

# %% [markdown]
# Training has sorted the heads. Some give most of their attention to something that no text has ever said, others have
# learned to look past it; no gate was needed for that, only time. It is the strength of the method, and what Hu et al.
# hint at as its weakness.
#
# ## What it costs
#
# No stopwatch: count. For one text of 64 tokens, with 16 virtual ones: how many multiplications and additions does
# reading it take, how much room is left for text, and how many numbers does each further token have to look at?


# %%
def operations(model):
    ids = torch.arange(64)[None]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_total_flops()


def with_method(method):
    model = copy.deepcopy(base)
    method.adapt(model)
    return model


plain = operations(base)
candidates = {
    "the base": (base, 0),
    "soft prompt": (with_method(PromptTuning(num_virtual_tokens=16)), 16),
    "prefix, with its MLP": (trained, 16),
    "prefix, folded": (folded, 16),
    "gated prompt": (with_method(LlamaAdapter(num_virtual_tokens=16, top_layers=config.n_layer)), 16),
}
print("                       operations    more   room for text   keys and values behind 64 tokens")
for name, (model, more) in candidates.items():
    flops = operations(model)
    held = 2 * config.n_layer * config.n_embd * (64 + more)
    print(f"{name:<21} {flops:>11,}  {flops / plain - 1:>6.1%}   {model.config.n_positions:>13}   {held:>12,}")

# %% [markdown]
# - A **soft prompt** sends 16 more tokens through every matrix of every block.
# - A **prefix** is not read, only looked at: folded, it is cheap. With its MLP it is not; so fold it.
# - A **gated prompt** has to be projected, as the library does it in every pass; after training that could be stored.
#
# But each generated token looks at P keys more in each layer, for ever; and of the context, soft prompt and prefix
# take P places. (The gated prompt has no positions and takes none.)
#
# ## What goes wrong in practice
#
# **The MLP is saved too.** It is the larger part, and nobody will ever need it.

# %%
with_mlp = len(safetensors.torch.save(trained.virtual_tokens.state_dict()))
alone = len(safetensors.torch.save({"prompt_embeddings": after}))
print(f"the encoder: {with_mlp:,} bytes; the folded prefix: {alone:,} bytes, {alone / with_mlp:.1%}")

# %% [markdown]
# **The layout is another one.** A prefix in a file is one matrix. Software that puts all keys first and then all
# values has the same shape. Nothing complains.

# %%
width = config.n_embd
keys_first = torch.arange(2 * config.n_layer * width).view(config.n_layer, 2, width).transpose(0, 1).flatten()
print(f"as it was trained:         {completion_loss(folded, held_out):.3f}")
print(f"with the keys all in front: {completion_loss(with_prefix(16, values=after[:, keys_first]), held_out):.3f}")

# %% [markdown]
# **The mean is no prefix.** Sixteen vectors that all say something: what happens to somebody who keeps only a part of
# them, to save room?

# %%
for kept in (16, 12, 8, 4):
    print(f"the first {kept:>2} of 16: {completion_loss(with_prefix(kept, values=after[:kept]), held_out):.3f}")

# %% [markdown]
# **The text that used to fit.** The context is shorter by P, which you notice with the first long text.

# %%
long = torch.zeros(1, config.n_positions, dtype=torch.long)
print("the base reads it:", tuple(base(long).shape))
try:
    folded(long)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# **Somebody else's LLaMA-Adapter.** PEFT's version, on a GPT-2, leaves out the tanh and adds the prompt's part *behind*
# the output projection. The library can compute that too (`as_peft=True`), for files that come from there. It is
# another model: here with the same prompts and every gate at the same number.

# %%
with torch.no_grad():
    logits = {}
    for as_peft in (False, True):
        model = with_method(LlamaAdapter(num_virtual_tokens=16, as_peft=as_peft))
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.3)
        logits[as_peft] = model(text)
    change = (logits[False] - base(text)).norm()
    print(f"the two differ by {(logits[True] - logits[False]).norm() / change:.0%} of what the adapter changes")

# %% [markdown]
# ## Summary
#
# - A prefix is P keys and values of your own in front of the text's, in every layer: a past that was never read.
# - Zeros are not nothing: they take a share of the softmax. A gate of zero is nothing, and only the gate learns first.
# - The MLP that makes the prefix is far larger than it, lets it move fast at a small rate, and is thrown away.
# - Longer is not always better; the length is a hyperparameter.
# - Folded, it costs few operations; it still takes P places of the context, and every token looks at it.
#
# ## Go further
#
# - Li and Liang 2021, *Prefix-Tuning* (arXiv:2101.00190): sections 4 (the method) and 7 (what matters in it).
# - Zhang et al. 2023, *LLaMA-Adapter* (arXiv:2303.16199): the gate, and pictures as prompts.
# - Liu et al. 2022, *P-Tuning v2* (arXiv:2110.07602): prefixes in every layer for understanding tasks.
# - He et al. 2022, *Towards a unified view of parameter-efficient transfer learning* (arXiv:2110.04366): section 3.1
#   rewrites prefix attention as you did, and finds an adapter in it.
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): table 3. On E2E with GPT-2 medium a tuned prefix in every layer reaches
#   BLEU 69.7, full fine-tuning 68.2, LoRA 70.4; prefix and LoRA with 0.35 M numbers.
#
# Look at the mixture once more: $(1 - \lambda)$ of the old and $\lambda$ of something that depends on q alone. A prefix
# adds a small function of the token to what the layer computes, by way of the attention, and it pays for it with room
# in the context. If all you want is a small function of the token, why not write one, and put it between the layers?
# That is unit 07.

# %% [markdown] open_question="prefix_or_prompt" points=4
# ### Open question
#
# A company answers e-mails in 30 styles, one for each customer, with one frozen language model whose context of 1,024
# tokens is mostly full: an e-mail and the thread before it take 900 to 1,000. Requests of all customers arrive mixed
# and are answered in batches. Somebody proposes a prefix of 200 virtual tokens for each customer, "since more
# parameters are better and a prefix is only 0.1 % of the model". Write at most 150 words: what speaks for prefixes
# here, what is wrong with the proposal, and what would you do?
#
# **Rubric.**
#
# - 1 point: for prefixes: each row of a batch can have a past of its own, so that 30 customers share one model.
# - 1 point: 200 places of 1,024 are not there; the threads would have to be cut.
# - 1 point: more parameters are not always better: the length is to be chosen on held-out letters, from small ones up.
# - 1 point: a reasoned choice: a short prefix, folded; or a method that takes no context (a gated prompt, adapters,
#   LoRA), with what is lost by it.

# %% volatile=true
progress("06")
