# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 07: Adapters
#
# **By the end of this unit you can**
#
# - implement a bottleneck adapter that starts close to the identity, and say how its initialisation matters;
# - insert adapters into a GPT-2 at the places used in three papers, and remove them again without a trace;
# - say what adapters cost in parameters, in operations and in time.
#
# **Prerequisites**: one block of GPT-2 (unit 03) and a training run (unit 04).
#
# **Time**: about 75 minutes, including 2 minutes of computation. 6 exercises, 2 predictions, one open question.
#
# ![Bars of the trained parameters of four variants of adapters in GPT-2 medium, for a bottleneck of width 24. Houlsby's
# has twice as many as the other three, which are nearly equal: less than one per cent of the model.](unit_07.png)

# %%
import copy
import inspect
import os
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.adapters import PLACES, AdapterAfter
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 20 minutes and 7 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 32))  # of each training run
BATCH = 8

# %% [markdown]
# ## New layers in a frozen model
#
# In units 05 and 06 the model stayed as it was and got additional *input*. That is cheap, but it takes up context.
# Something new can also be added between the layers: freeze everything, and insert small layers of your own.
#
# A layer that is inserted into a stream of d numbers must return d numbers. A full matrix for that is expensive: with
# d = 1024, as in GPT-2 medium, it has 1024 x 1024 = 1,048,576 weights, and there are dozens of places. Houlsby et al.
# (2019, arXiv:1902.00751, section 2.1) project d down to a few numbers and back up again, 1024 -> 24 -> 1024. This
# shape is called a **bottleneck**. How many parameters does it have?

# %% exercise="adapter_parameter_count"

# %%
count = working("adapter_parameter_count")

print(f"a dense matrix:         {1024 * 1024:>9,}")
print(f"1024 -> 24 -> 1024:     {count(1024, 24, bias=False):>9,}")
print(f"with two biases:        {count(1024, 24):>9,}")

# %% [markdown]
# Now you can count the adapters in the LoRA paper's table (Hu et al. 2021, table 3; its formula is in section 5.1).
# Adapter-H is Houlsby's, with two adapters in each of the 24 blocks of GPT-2 medium. Adapter-L (Lin et al. 2020) has
# one in each, with a LayerNorm. The paper does not give the widths; these are the whole numbers that come closest.

# %%
rows = [
    ("Adapter-L, narrow", 0.37, {"width": 6, "adapters": 24, "norms": 24}),
    ("Adapter-L, wide", 11.09, {"width": 224, "adapters": 24, "norms": 24}),
    ("Adapter-H", 11.09, {"width": 112, "adapters": 48}),
]
print("                    width      counted   the paper prints")
for name, printed, given in rows:
    print(f"{name:<18}  {given['width']:>5}  {count(1024, **given):>11,}   {printed:>5.2f} M")

# %% [markdown]
# Two of the three agree to the last printed digit. No width gives the third one: the paper may have printed the
# previous row's number twice. Always recompute the numbers of a table before you compare with it.
#
# Move the slider: how many parameters would each variant add to GPT-2 medium, which has 354.8 M?


# %% figure="unit_07.png"
def draw_costs(width):
    costs = {
        "Houlsby: 2 per block": count(1024, width, adapters=48),
        "Pfeiffer: 1 per block": count(1024, width, adapters=24),
        "Lin: 1, with LayerNorm": count(1024, width, adapters=24, norms=24),
        "parallel: 1, no biases": count(1024, width, adapters=24, bias=False),
    }
    figure, (axes,) = plotting.panels(1, width=6.5, height=2.5)
    places = range(len(costs))
    axes.barh(places, [number / 1e6 for number in costs.values()], color=plotting.COLOURS[0], height=0.6)
    axes.set_yticks(places, costs)
    axes.invert_yaxis()
    for place, number in zip(places, costs.values(), strict=True):
        text = f"{number / 1e6:.2f} M, {number / 354.8e6:.2%}"
        axes.annotate(text, (number / 1e6, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.5 * max(costs.values()) / 1e6)
    plotting.label(axes, x="millions of trained parameters", title=f"GPT-2 medium, width {width}")
    return figure


slider(
    draw_costs,
    "width",
    [1, 6, 24, 64, 112, 224],
    24,
    "Bars of the trained parameters of four variants of adapters in GPT-2 medium. Houlsby's has twice as many as the "
    "others, which are nearly equal; all grow about in proportion to the width.",
)

# %% [markdown]
# ## The bottleneck
#
# With x (d), $W_{down}$ (width, d), $W_{up}$ (d, width) and the biases b (width) and b' (d), Houlsby's adapter is
# (section 2.1 and figure 2 of the paper)
#
# $$x \;\mapsto\; x + W_{up}\, \mathrm{gelu}(W_{down}\, x + b) + b' .$$
#
# Two things make it work. **It is nonlinear**: without the gelu, the two matrices could be multiplied into one. And
# **it adds x**: what does not pass through the bottleneck still gets through. If its weights are small, the adapter is
# *nearly the identity*, and the adapted model starts out almost exactly as the model that you loaded.

# %% [markdown]
# One adapter by hand, with d = 2, width 1, $W_{down} = (1, -1)$, $W_{up} = (0.2, -0.1)^\top$ and biases of zero:
#
# | x | $W_{down}\, x$ | gelu | $W_{up}$ times this | output |
# |---|---|---|---|---|
# | (3, 2) | 1 | 0.841 | (0.168, -0.084) | (3.168, 1.916) |
# | (2, 3) | -1 | -0.159 | (-0.032, 0.016) | (1.968, 3.016) |
#
# Without the gelu, the two changes would be equal and opposite. With it, the second x is changed far less than the
# first.

# %% exercise="BottleneckAdapter"

# %%
Bottleneck = working("BottleneckAdapter")

adapter = Bottleneck(256, 24, torch.Generator().manual_seed(0))
x = torch.randn(1000, 256, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    print(f"a new adapter changes numbers from N(0, 1) by at most {(adapter(x) - x).abs().max():.1e}")

# %% [markdown]
# Why only *nearly*? Being exactly the identity would seem even safer. Guess first.

# %% prediction="both_weights_zero"

# %% [markdown]
# To try it you need adapters in a model. Each module of the model is kept, and a wrapper is put around it. Here is the
# library's wrapper for an adapter that comes *after* its module:

# %%
print(inspect.getsource(AdapterAfter))

# %% [markdown]
# ## Sequential or parallel
#
# Where does an adapter go? A block computes $x + \mathrm{attn}(\mathrm{norm}(x))$, then the same with the MLP (unit
# 03). An adapter acts on what attention or MLP return, *before* that is added to the residual stream.
#
# | variant | place | source |
# |---|---|---|
# | houlsby | after the attention and after the MLP | Houlsby et al. 2019, figure 2 |
# | pfeiffer | only after the MLP | Pfeiffer et al. 2021, arXiv:2005.00247 |
# | parallel | in parallel with the MLP, with the same input | He et al. 2022, arXiv:2110.04366, section 3.3 |
#
# The third one does not have to wait for the MLP. He et al. define it with a relu and a scaling s:
#
# $$\mathrm{MLP}(x) + s\, W_{up}\, \mathrm{relu}(W_{down}\, x)$$

# %% exercise="ParallelAdapter"

# %% [markdown]
# Now its wrapper.

# %% exercise="AdapterBeside"

# %% [markdown]
# ## Inserting and removing adapters
#
# The library knows the names of the places. You write the function that inserts adapters there. Three helpers are
# provided: `adapter_places` lists the names of the modules to wrap, `new_adapter` creates an adapter, and
# `replace_module` puts a module in place of another.

# %%
for variant, parts in PLACES.items():
    print(f"{variant:<9} {[part or 'the whole block' for part in parts]}")

# %% [markdown]
# What you expect for a GPT-2 with 2 blocks, d = 4 and adapters of width 1: a bottleneck adapter has
# 4 + 1 + 4 + 4 = 13 parameters, a parallel one, which has no biases, 4 + 4 = 8.
#
# | variant | wrapped modules | parameters |
# |---|---|---|
# | houlsby | `transformer.h.0.attn`, `h.0.mlp`, `h.1.attn`, `h.1.mlp` | 4 x 13 = 52 |
# | pfeiffer | `transformer.h.0.mlp`, `h.1.mlp` | 2 x 13 = 26 |
# | parallel | `transformer.h.0.mlp`, `h.1.mlp` | 2 x 8 = 16 |
#
# With `layers=(1,)`, houlsby wraps only the last two of its four modules.

# %% exercise="insert_adapters"

# %%
insert = working("insert_adapters")

base, tokenizer = load_gpt2(MODEL)
d, total = base.config.n_embd, sum(p.numel() for p in base.parameters())
dataset = load_dataset("story-cards")
examples = Completions(dataset.train, tokenizer, base.config.n_positions)
held_out = Completions(dataset.validation[: 8 * 32 : 8], tokenizer, base.config.n_positions).batches(16)
before = completion_loss(base, held_out)


def adapted(variant, width, seed=0):
    """A copy of the base with adapters, in which only these are trained."""
    model = copy.deepcopy(base).requires_grad_(False)
    return model, insert(model, width, variant, generator=torch.Generator().manual_seed(seed))


print(f"the base, on cards not used in training: {before:.4f} nats per token")
for variant in ("houlsby", "pfeiffer", "parallel"):
    model, adapters = adapted(variant, 24)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loss = completion_loss(model, held_out)
    print(
        f"{variant:<9} {len(adapters):>2} adapters, {learned:>7,} parameters ({learned / total:.2%}), loss {loss:.4f}"
    )

# %% [markdown]
# The adapters are inserted, and the model still computes almost exactly the same. Next you will exchange adapters
# often. Removing them must leave no trace: the same modules, the same names.

# %% exercise="remove_adapters"

# %%
remove = working("remove_adapters")

model, _ = adapted("houlsby", 24)
print("with adapters:   ", [name for name in model.state_dict() if "h.0.mlp" in name][:2])
remove(model)
print("after removal:   ", [name for name in model.state_dict() if "h.0.mlp" in name][:2])
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
print("bitwise equal:   ", same)

# %% [markdown]
# ## How close to the identity?
#
# Draw the weights of Houlsby's adapters from wider and wider distributions, without any training. The loss shows what
# is left of the model. The other columns show the sizes of the first gradients.


# %%
def start_at(deviation):
    model, adapters = adapted("houlsby", 24)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters.values():
            for layer in (adapter.down, adapter.up):
                layer.weight.normal_(std=deviation, generator=generator)
    return model, adapters


def gradient_sizes(model, adapters):
    batch = examples.batch_at(0, 8, 0)
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(model(batch.input_ids)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
    names = ("down.weight", "up.weight", "up.bias")
    return [max(float(a.get_parameter(name).grad.abs().max()) for a in adapters.values()) for name in names]


print("deviation      untrained loss   largest gradient of W_down      W_up        b'")
for deviation in (0, 1e-3, 1e-2, 0.1, 0.3, 1):
    model, adapters = start_at(deviation)
    down, up, bias = gradient_sizes(model, adapters)
    loss = completion_loss(model, held_out)
    print(f"{deviation:>9g}   {loss:>17.3f}   {down:>26.1e}   {up:>7.1e}   {bias:>7.1e}")

# %% [markdown]
# Read the table from the bottom. Large initial weights break the model. Houlsby et al. observed the same: below 1e-2
# the standard deviation hardly matters, above it hurts (section 3.6). Small ones leave the model intact, and their
# gradients are smaller too, which is no problem for Adam (unit 04). In the first line two of the three gradients are
# exactly zero, and Adam cannot help with that. Now train from the first line and from the second.

# %%


def train(model, what, seed=0):
    settings = TrainingSettings(
        steps=STEPS,
        learning_rate=defaults.learning_rate_for("adapter", model.config),
        warmup_steps=defaults.warmup_steps_for(STEPS),
        seed=seed,
    )
    bar = tqdm(total=STEPS, desc=what, unit="step")

    def batch_at(step):
        bar.update()
        return examples.batch_at(step, BATCH, seed)

    losses = Trainer(model, batch_at, settings, progress=False).run().losses
    bar.close()
    return losses, completion_loss(model, held_out)


for name, deviation in {"all zero": 0, "nearly zero": 1e-3}.items():
    model, adapters = start_at(deviation)
    _, loss = train(model, name)
    moved = {
        part: any(bool(a.get_parameter(part).any()) for a in adapters.values()) for part in ("down.bias", "up.bias")
    }
    print(f"{name:<11}: loss {before:.2f} -> {loss:.2f}; b has changed: {moved['down.bias']}, b': {moved['up.bias']}")

# %% check="both_weights_zero"

# %% [markdown]
# ## Three variants, one budget
#
# Houlsby's variant has twice as many adapters. To compare places, not sizes, give it half the width. The runs are
# short, and one seed says little, so train the first variant with three seeds: judge the differences between variants
# by their spread.

# %%
WIDTHS = {"houlsby": 12, "pfeiffer": 24, "parallel": 24}
results = {}
for variant, width in WIDTHS.items():
    model, adapters = adapted(variant, width)
    results[variant] = train(model, variant)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{variant:<9} width {width}: {learned:,} parameters, held-out loss {before:.2f} -> {results[variant][1]:.3f}"
    )

others = [train(adapted("houlsby", WIDTHS["houlsby"], seed)[0], "houlsby", seed)[1] for seed in (1, 2)]
seeds = [results["houlsby"][1], *others]
spread = max(seeds) - min(seeds)
gap = max(r[1] for r in results.values()) - min(r[1] for r in results.values())
print(f"houlsby with three seeds: {', '.join(f'{loss:.3f}' for loss in seeds)}; spread {spread:.3f}")
print(f"best to worst variant: {gap:.3f}, {'more' if gap > spread else 'not more'} than the spread")

# %% [markdown]
# With little more than one per cent as many parameters as the model, all three variants learn the task. Which place is
# best would take longer runs to find out, each with a learning rate tuned for it; here one rate serves all three. He et
# al. (2022, section 4) find parallel adapters better than sequential ones, and the MLP a better place than the
# attention if there are many parameters to spend.
#
# ## The cost at inference
#
# A trained adapter has to be computed in every forward pass: because the gelu is nonlinear, it cannot be merged into a
# weight. How much time does that take? First count the multiplications, for the width of the LoRA paper's Adapter-H on
# GPT-2 medium: each weight of a matrix costs one multiplication per token.

# %%
share = count(1024, 112, adapters=48, bias=False) / (24 * 12 * 1024**2)
print(f"additional multiplications in the matrices of the blocks: {share:.1%}")

# %% prediction="time_of_adapters"

# %% [markdown]
# Measured times depend on the state of your machine, so count first. PyTorch executes a forward pass as a sequence of
# **kernels**: a matrix product is one, a gelu is one. Also count the **longest chain**: the largest number of kernels
# in a row that each need the result of the previous one. No amount of parallel hardware can shorten it.


# %%
class Kernels(TorchDispatchMode):
    """Counts the kernels, and the length of the chain that leads to each result. Views compute nothing."""

    def __init__(self):
        super().__init__()
        self.count, self.chain = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = [place(t) for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        first = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(first, torch.Tensor) and place(first) not in read:
            self.count += 1
            self.chain[place(first)] = 1 + max([self.chain.get(p, 0) for p in read], default=0)
        return result


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def kernels_of(model):
    ids = torch.arange(32)[None]
    with torch.no_grad(), Kernels() as seen:
        logits = model(ids)
    return seen.count, seen.chain[place(logits)]


# %%
def with_lora(merged):
    model = copy.deepcopy(base)
    method = LoRA(rank=8)
    method.adapt(model)
    if merged:
        method.merge(model)
    return model


candidates = {"the base": base}
candidates |= {f"{variant} adapters": adapted(variant, width)[0] for variant, width in WIDTHS.items()}
candidates |= {"LoRA": with_lora(False), "LoRA, merged": with_lora(True)}
chains = {}
print("                     kernels   longest chain")
for name, model in candidates.items():
    kernels, chains[name] = kernels_of(model)
    print(f"{name:<19}  {kernels:>7}   {chains[name]:>13}")

# %% [markdown]
# Each sequential adapter consists of four kernels in a row: down, gelu, up, and the sum. A parallel adapter has at
# least as many kernels, but most of them can run *while* the MLP runs, if hardware and software support that; by
# default PyTorch starts one after the other. (One of them only multiplies by s. Folding s into $W_{up}$ after training
# would save it.) LoRA without merging adds kernels as well; merged LoRA adds none.

# %%
figure, (left, right) = plotting.panels(2, width=5.2, height=3.3)
heights = {variant: plotting.smooth(losses, 6) for variant, (losses, _) in results.items()}
left.set_xlim(0, STEPS + 11)
lowest, highest = min(h[-1] for h in heights.values()), max(max(h) for h in heights.values())
last = None
for style, (variant, values) in enumerate(sorted(heights.items(), key=lambda item: item[1][-1])):
    left.plot(range(1, STEPS + 1), values, plotting.LINES[style], color=plotting.COLOURS[style], linewidth=1.8)
    at = values[-1] if last is None else max(values[-1], last + 0.08 * (highest - lowest))
    last = at
    left.text(STEPS + 1, at, variant, color=plotting.COLOURS[style], fontweight="bold", va="center")
plotting.label(left, x="step (means of 6 steps)", y="loss, nats per token", title="Three variants, one budget")
places = range(len(chains))
right.barh(places, list(chains.values()), color=plotting.COLOURS[0], height=0.6)
right.set_yticks(places, chains)
right.invert_yaxis()
for row, length in zip(places, chains.values(), strict=True):
    right.annotate(str(length), (length, row), xytext=(4, 0), textcoords="offset points", va="center")
right.axvline(chains["the base"], color="0.4", linewidth=1, linestyle=":")
right.set_xlim(0, 1.15 * max(chains.values()))
plotting.label(right, x="longest chain of kernels", title="Each kernel waits for the previous one")
show(
    figure,
    f"Left, the training loss of three variants of adapters over {STEPS} steps: all of them fall. Right, bars of the "
    "longest chain of kernels in a forward pass: " + ", ".join(f"{name} {n}" for name, n in chains.items()) + ".",
)

# %% check="time_of_adapters"

# %% [markdown]
# Now measure the time for one text of 128 tokens. The models take turns, so that a busy moment affects all of them, and
# the median of 15 rounds counts. The last column is for a single token, as in every step of generation. Your numbers
# will differ from these, and from run to run: look at their order, not at their digits.


# %% volatile=true
def milliseconds(tokens, rounds=15):
    ids = torch.arange(tokens)[None]
    taken = {name: [] for name in candidates}
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in candidates.items():
                started = time.perf_counter()
                model(ids)
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: sorted(times)[rounds // 2] for name, times in taken.items()}


long, short = milliseconds(128), milliseconds(1)
print("                     128 tokens            1 token")
for name in candidates:
    print(
        f"{name:<19}  {long[name]:6.2f} ms {long[name] / long['the base'] - 1:+7.1%}   "
        f"{short[name]:6.2f} ms {short[name] / short['the base'] - 1:+7.1%}"
    )

# %% [markdown]
# For comparison, this is what Hu et al. measured for GPT-2 medium on a GPU (2021, table 1):
#
# | one forward pass | 32 texts of 512 | 16 texts of 256 | 1 text of 128 |
# |---|---|---|---|
# | Adapter-L | +2.2 % | +5.0 % | +20.7 % |
# | Adapter-H | +3.0 % | +8.4 % | +30.3 % |
# | LoRA, merged | 0 | 0 | 0 |
#
# The rightmost column is the case of one person waiting for an answer. The bundled model is small and runs on a CPU,
# which starts a kernel faster than a GPU does; so the percentages need not agree, but their cause is the same.
#
# ## Your own plan
#
# In the committed run, Houlsby's adapters make the longest chain 48 kernels longer. Suppose that you may add only an
# eighth of that, and train no more parameters than Houlsby's variant of width 12. Can you still reach a lower loss? You
# choose the variant, the width and the blocks (`layers`, counted from 0). Change `my_plan`, write down whether you
# expect to win, and run the cell. It trains your plan once. One run proves little, so your plan wins only if its loss
# is below those of all three seeds of Houlsby's variant.


# %%
def my_plan(model, generator):
    """Insert the adapters of your plan. Change this line; keep `generator=generator`."""
    insert(model, 48, "parallel", layers=(0, 1, 2), generator=generator)


def compare_with_houlsby(plan):
    """Train your plan once, and say whether its loss is outside the range of Houlsby's three seeds."""
    mine = copy.deepcopy(base).requires_grad_(False)
    plan(mine, torch.Generator().manual_seed(0))
    models = (mine, candidates["houlsby adapters"])
    spent, most = (sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models)
    longer = kernels_of(mine)[1] - chains["the base"]
    longest = (chains["houlsby adapters"] - chains["the base"]) // 8
    print(f"your plan trains {spent:,} parameters of {most:,} allowed; its chain is {longer} longer, {longest} allowed")
    if not 0 < spent <= most:
        return "Insert at least one adapter, and stay within the parameters: choose a smaller width, or fewer blocks."
    if longer > longest:
        return "The chain is too long: leave out blocks, or choose another variant."
    _, loss = train(mine, "your plan")
    print(f"Houlsby's variant with three seeds: {min(seeds):.3f} to {max(seeds):.3f}; your plan: {loss:.3f}")
    better, worse = loss < min(seeds), loss > max(seeds)
    return "Your plan wins." if better else "Your plan loses." if worse else "Undecided: within the spread."


print(compare_with_houlsby(my_plan))

# %% [markdown]
# There is a plan that wins. Two questions lead to it: how many kernels does an adapter of each variant add to the
# chain, and if most blocks have to do without one, which should keep theirs? If your plan wins, find out whether it is
# the place or the width: change one at a time.
#
# ## What goes wrong in practice
#
# **Nothing is frozen.** `insert_adapters` only inserts adapters. If you start training right after it, you train
# everything.

# %%
model = copy.deepcopy(base)
adapters = insert(model, 24, "houlsby")
learned = sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"parameters in the adapters: {learned:,}; trained: {trained:,}")

# %% [markdown]
# **The optimiser was created first.** It has the parameters that the model had at that time.

# %%
model = copy.deepcopy(base)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
adapters = insert(model, 24, "houlsby")
known = {id(p) for group in optimizer.param_groups for p in group["params"]}
strangers = [p for adapter in adapters.values() for p in adapter.parameters() if id(p) not in known]
print(f"tensors of the adapters that the optimiser does not know: {len(strangers)} of {4 * len(adapters)}")

# %% [markdown]
# **x is added twice.** A bottleneck adapter adds x itself. If you put it *in parallel* with a module, the module's
# input is added to the module's output. The shapes fit, so there is no error.

# %%
Beside, Parallel = working("AdapterBeside"), working("ParallelAdapter")

for name, kind in {"parallel": Parallel, "bottleneck": Bottleneck}.items():
    model = copy.deepcopy(base)
    for block in model.transformer.h:
        block.mlp = Beside(block.mlp, kind(d, 24))
    print(f"a new {name:<10} parallel to each MLP: loss {before:.2f} -> {completion_loss(model, held_out):.2f}")

# %% [markdown]
# **The checkpoint has different names.** A wrapper adds a component to every name below it. If you save the whole model
# while it contains adapters, the plain model does not find its own weights.

# %%
model, _ = adapted("houlsby", 24)
plain = copy.deepcopy(base)
found = plain.load_state_dict(model.state_dict(), strict=False)
print(f"missing: {len(found.missing_keys)}, for instance {found.missing_keys[0]}")
print(f"unexpected: {next(n for n in found.unexpected_keys if 'adapter' not in n)}")

# %% [markdown]
# With `strict=False` this passes silently. Save only what was trained, or remove the adapters first.
#
# **"I merge it anyway."** Without the gelu, an adapter after `c_proj` would be a matrix, $I + W_{up} W_{down}$, which
# could be multiplied into the weight. How far off is that for a trained adapter?

# %%
model, adapters = adapted("pfeiffer", 24)
train(model, "pfeiffer")
adapter = adapters[f"transformer.h.{base.config.n_layer - 1}.mlp"]
x = torch.randn(500, d, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    change = adapter(x) - x
    linear = adapter.up(adapter.down(x))
    print(f"the linear version is off by {(linear - change).norm() / change.norm():.0%} of the change")

# %% [markdown]
# ## Summary
#
# - An adapter is a bottleneck with a nonlinearity and a skip connection: 1024 -> 24 -> 1024 has 49,152 weights instead
#   of 1,048,576.
# - It is initialised close to the identity: large weights break the model, and with both weights zero only a bias
#   learns.
# - It goes after attention and MLP (Houlsby), after the MLP (Pfeiffer), or in parallel with the MLP; a few lines of
#   code insert it.
# - It cannot be merged. Its operations are few, but each waits for the previous one, which is what takes the time.
# - Freeze, insert, then create the optimiser; and remove adapters before anything looks for the weights by name.
#
# ## Go further
#
# - Houlsby et al. 2019, *Parameter-efficient transfer learning for NLP* (arXiv:1902.00751): sections 2.1 and 3.6.
# - Pfeiffer et al. 2021, *AdapterFusion* (arXiv:2005.00247): one adapter per block, and how to combine tasks.
# - He et al. 2022, *Towards a unified view of parameter-efficient transfer learning* (arXiv:2110.04366): section 3
#   describes prefixes (unit 06), adapters and LoRA (unit 09) by one formula.
# - Rücklé et al. 2021, *AdapterDrop* (arXiv:2010.11918): omit the adapters of the lower blocks to save time.
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 3 and appendix B on latency.
#
# Remember one result of this unit: adapters that could learn nothing but a constant vector reduced the loss all the
# same. GPT-2 already has many such vectors, the biases of its layers. What if you train only these, without inserting
# anything and without any extra time? That is unit 08.

# %% [markdown] open_question="adapters_or_not" points=4
# ### Open question
#
# A hospital runs one language model for twelve departments, each with its own Houlsby adapters. Doctors type a question
# and wait; at night the same model summarises 40,000 letters in large batches. Somebody proposes to replace all
# adapters by twelve merged LoRAs "because LoRA is 30 % faster". Write at most 150 words: for which of the two uses is
# that true and why, what would the twelve merged models cost, and what would you measure before deciding?
#
# **Rubric.**
#
# - 1 point: for single questions the additional time is real: few tokens at once, and every kernel waits for another
#   one.
# - 1 point: for large batches it is a few per cent, because the operations themselves take the time.
# - 1 point: a merged weight belongs to one department: twelve copies of the model, or a change of weights in between;
#   adapters share one base.
# - 1 point: names a measurement that decides: time per token on their hardware at their batch sizes, together with the
#   quality of both methods on their task.

# %% volatile=true
progress("07")
