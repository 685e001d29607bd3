# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 09: LoRA
#
# **By the end of this unit you can**
#
# - write LoRA from scratch: the two thin matrices, their initialisation, the layer, and exact merging and unmerging;
# - explain why A starts random and B starts at zero, and what alpha / r is for;
# - insert LoRA into a GPT-2, whose weights are stored transposed and whose q, k and v share one matrix;
# - train it next to full fine-tuning, and say what it saves and what it does not.
#
# **Prerequisites**: the rank of a matrix (unit 01) and one block of GPT-2 (unit 03). Units 02, 04 and 07 help.
#
# **Time**: about 100 minutes. 8 exercises, 2 predictions, one open question.
#
# ![Left, the loss of LoRA and of full fine-tuning over the same training steps, two falling curves. Right, bars of
# LoRA as a percentage of full fine-tuning: it trains a few per cent of the parameters and saves a few per cent of the
# bytes; its forward pass costs slightly more than 100 per cent before merging, and exactly 100 per cent after it.](unit_09.png)

# %%
import inspect
import os
from types import SimpleNamespace

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.evaluation import write_texts
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.placement import find_targets
from lora_from_scratch.museum.wide_start import FaultyLoRALayer
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), "gpt2" (needs a network connection, about 15 minutes and 5 GB of
# memory), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 80))  # per training run
BATCH = 8

# %% [markdown]
# ## A low-rank change
#
# Adapters (unit 07) learn well, but they stay in the model: every token passes through them. Biases (unit 08) cost
# nothing at inference, but they can only shift a layer's output. Is there a method that changes a weight as training
# would, and that *disappears* into the weight when training is over?
#
# Full fine-tuning takes a weight $W_0$ and ends with another, $W_0 + \Delta W$. Nothing says that $\Delta W$ needs as
# many parameters as $W_0$. In unit 02 you saw that a learned change has a far lower rank than the weight that it
# changes. Aghajanyan et al. (2020, arXiv:2012.13255) had seen something similar before: trained in only 200 random
# directions, a RoBERTa reaches 90 % of the performance of full training on one task (MRPC).
#
# LoRA builds this observation into the model (Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. 3):
#
# $$y = W_0 x + \Delta W x, \qquad \Delta W = s\, B A, \qquad s = \frac{\alpha}{r}$$
#
# - $x$ (in) and $y$ (out): the input and the output of the layer;
# - $W_0$ (out, in): the pretrained weight, **frozen**;
# - $A$ (r, in) and $B$ (out, r): the two thin matrices, **trained**. The rank r is small: 1, 4, 8;
# - $\alpha$: a number that you choose, explained below.
#
# Start with the change itself.

# %% exercise="delta_weight"

# %% [markdown]
# How much smaller is it? Count the parameters (unit 01) for the query matrix of GPT-3, 12,288 x 12,288, with r = 4.
# Then compute the change for the size of the layer that you will adapt below, and determine its rank.

# %%
delta = working("delta_weight")

width = 12288
print(f"GPT-3, one query matrix: {width * width:,} parameters; A and B: {2 * 4 * width:,}")

draw = torch.Generator().manual_seed(0)
A, B = torch.randn(4, 256, generator=draw), torch.randn(768, 4, generator=draw)
change = delta(A, B, 2.0)
print(
    f"the change: {tuple(change.shape)}, rank {torch.linalg.matrix_rank(change)}, {A.numel() + B.numel():,} parameters"
)

# %% [markdown]
# ## How to initialise it
#
# Before the first step, the adapted model should *be* the pretrained one, so that training starts from everything it
# knows. So $B A$ has to be zero, and there are several ways to achieve that.

# %% prediction="both_at_zero"

# %% [markdown]
# To find out, take a problem that is small enough to try every initialisation: a frozen $W_0$ with 16 inputs and 24
# outputs, and data from $W_0$ plus a change of rank 2. With $G = \partial L / \partial \Delta W$ (out, in), the
# gradient that full fine-tuning would use, the chain rule gives
#
# $$\frac{\partial L}{\partial A} = s\, B^\top G, \qquad \frac{\partial L}{\partial B} = s\, G A^\top .$$
#
# Each gradient contains the *other* matrix.

# %%
draw = torch.Generator().manual_seed(1)
W0 = torch.randn(24, 16, generator=draw)
x = torch.randn(256, 16, generator=draw)
y = x @ (W0 + 0.5 * torch.randn(24, 2, generator=draw) @ torch.randn(2, 16, generator=draw)).T


def train_from(A, B, steps=300, rate=1e-2):
    """Learn the change from this start; return the losses and the norms of the first gradients of A and B."""
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    optimizer = torch.optim.Adam([A, B], lr=rate)
    losses, first = [], None
    for _ in range(steps):
        loss = F.mse_loss(x @ (W0 + delta(A, B, 1.0)).T, y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        first = first or (A.grad.norm().item(), B.grad.norm().item())
        optimizer.step()
    return losses, *first


def random(rows, columns, seed=2):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 4


starts = {
    "A random, B zero": (random(2, 16), torch.zeros(24, 2)),
    "A zero, B random": (torch.zeros(2, 16), random(24, 2)),
    "both zero": (torch.zeros(2, 16), torch.zeros(24, 2)),
    "both random": (random(2, 16), random(24, 2)),
}
base_loss = F.mse_loss(x @ W0.T, y).item()
print(f"loss of W0 alone: {base_loss:.2f}\n")
print("start                initial loss   after 300 steps   |dL/dA|   |dL/dB| at first")
for name, (A, B) in starts.items():
    losses, at_a, at_b = train_from(A, B)
    print(f"{name:<18}  {losses[0]:>13.2f}   {losses[-1]:>15.4f}   {at_a:>7.3f}   {at_b:>7.3f}")

# %% check="both_at_zero"

# %% [markdown]
# Read the table row by row.
#
# - *A random, B zero*: starts at the loss of $W_0$. At first only B has a gradient; after one step B is no longer zero,
#   and A has a gradient too.
# - *A zero, B random*: starts at the loss of $W_0$ as well, and learns. Hayou et al. (2024, arXiv:2406.08447) find that
#   the first variant tolerates larger learning rates and reaches better results on average. Both are LoRA.
# - *both zero*: there is no gradient, at the start or later.
# - *both random*: learns, but does not start at $W_0$. On this problem that costs little. On a language model, a random
#   change to every layer destroys what the model has learned.
#
# ## Your own start
#
# Is "A random, B zero" the best start with $B A = 0$? Any A (2, 16) and B (24, 2) whose product is zero may be tried: a
# larger or a smaller A, rows of length 1 at right angles to each other, a row of A that is zero, or directions taken
# from the gradient $G$ below (its largest singular vectors, unit 02). Change `my_start`, write down what you expect,
# and run the cell. Your start and the usual one learn from the same data for each of three seeds.

# %%
G = 2 * (x @ W0.T - y).T @ x / y.numel()  # (24, 16), the gradient of the whole weight before the first step


def my_start(seed):
    """A (2, 16) and B (24, 2). Change this line; `seed` is there for what you draw at random."""
    return random(2, 16, seed), torch.zeros(24, 2)


def compare_with_the_usual_start(start, steps=100):
    """Train from your start and from the usual one with three seeds, and say which is better."""
    gains = []
    for seed in (2, 3, 4):
        mine, usual = tuple(start(seed)), (random(2, 16, seed), torch.zeros(24, 2))
        shapes = [tuple(one.shape) for one in mine]
        if shapes != [(2, 16), (24, 2)]:
            return f"A has to be (2, 16) and B (24, 2); yours are {shapes[0]} and {shapes[1]}."
        if (mine[1] @ mine[0]).abs().max() > 1e-6:
            return "Your B A is not zero, so your LoRA does not start as the model that it adapts."
        if all(map(torch.equal, mine, usual)):
            return "That is the usual start itself: change `my_start`."
        losses = [train_from(A, B, steps)[0][-1] for A, B in (usual, mine)]
        print(f"seed {seed}: after {steps} steps the usual start has the loss {losses[0]:.3f}, yours {losses[1]:.3f}")
        gains.append(losses[0] - losses[1])
    better, worse = min(gains) > 0, max(gains) < 0
    return "Better with all three seeds." if better else "Worse with all three." if worse else "Undecided."


print(compare_with_the_usual_start(my_start))

# %% [markdown]
# If yours is better, is it the better start, or does it only make up for a learning rate that is too small here? With a
# larger A the same step of B changes $B A$ more. Give both starts a larger `rate` in `train_from`, and look again.

# %% exercise="initial_factors"

# %% [markdown]
# Why 1/sqrt(in)? Each entry of $h = A x$ is a sum over all the inputs. With this bound its size does not depend on the
# width of the layer:

# %%
initial = working("initial_factors")

for inputs in (64, 256, 1024, 4096):
    A, B = initial(inputs, 64, 8, torch.Generator().manual_seed(0))
    h = torch.randn(500, inputs, generator=torch.Generator().manual_seed(1)) @ A.T
    print(f"in = {inputs:>4}: h has standard deviation {h.std():.3f}, B has {B.count_nonzero()} non-zero entries")

# %% [markdown]
# ## What alpha / r is for
#
# Why divide by r at all? So that you can change r without searching for a new learning rate. Adam's first step moves
# every entry of B by the learning rate, whatever the gradient. With r times as many entries, r times as many
# contributions add up. Measure it: to first order, by how much does the first step lower the loss for one gradient $G$?

# %%
G = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) / 256
alpha, rate = 16, 1e-3
scalings = {
    "alpha / r": lambda r: alpha / r,
    "alpha / sqrt(r)": lambda r: alpha / r**0.5,
    "alpha": lambda r: alpha,
}
print("the first step lowers the loss by" + "".join(f"{name:>18}" for name in scalings))
for r in (1, 4, 16, 64):
    A, B = initial(256, 256, r, torch.Generator().manual_seed(4))
    step = -rate * (G @ A.T).sign()  # Adam's first step of B; A's gradient is still zero
    gains = [-(G * delta(A, step, scale(r))).sum().item() for scale in scalings.values()]
    print(f"{f'r = {r}':<33}" + "".join(f"{gain:>18.4f}" for gain in gains))

# %% [markdown]
# With alpha / r, the first step lowers the loss by the same amount for every rank. With alpha alone, the reduction
# grows with r, and the learning rate that is right for r = 4 is far too large for r = 64. This is what the paper means:
# tuning alpha is roughly the same as tuning the learning rate, so it sets alpha once and does not tune it (section
# 4.1).
#
# The middle column is rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, section 3). Its argument concerns the whole of
# training and not only the first step: for large ranks, alpha / r makes the change too small for the rank to be of use.
# Up to r = 8 or 16 you will hardly see the difference. In practice, **know which of the three your code uses.**

# %% [markdown]
# ## The layer
#
# Now write the layer. It *wraps* the pretrained layer and leaves it unchanged, so nothing has to be copied, and it
# works for `Linear` and `Conv1D` alike. `__init__` is given and uses your `initial_factors`. You write `forward`,
# `merge` and `unmerge`. Read the docstring of the class first: it says what each of the three has to do.
#
# Three things to keep in mind:
#
# - do not form $B A$ in `forward`: $B(Ax)$ gives the same result with far fewer operations (the check does not count
#   them, but you will);
# - GPT-2's `Conv1D` stores its weight (in, out), the transpose of what your `delta_weight` returns;
# - after `merge` the weight contains the change, so `forward` must not add it again.
#
# An example with numbers: two inputs, two outputs, r = 1, alpha = 2, so s = 2.
#
# $$W_0 = \begin{pmatrix} 1 & 0 \\ 0 & 2 \end{pmatrix}, \quad A = \begin{pmatrix} 1 & 1 \end{pmatrix}, \quad
# B = \begin{pmatrix} 1 \\ 3 \end{pmatrix}, \quad x = \begin{pmatrix} 1 \\ 2 \end{pmatrix}$$
#
# - Not merged: $W_0 x = (1, 4)$; $A x = 3$; $s B (A x) = 2 \cdot (3, 9) = (6, 18)$; together $y = (7, 22)$.
# - Merged: $W_0 + s B A = \begin{pmatrix} 3 & 2 \\ 6 & 8 \end{pmatrix}$, and this times x is $(7, 22)$ again. A `Conv1D`
#   stores the transpose, $\begin{pmatrix} 3 & 6 \\ 2 & 8 \end{pmatrix}$.

# %% exercise="LoRALinear"

# %% [markdown]
# Try it on a layer of GPT-2. At the start it changes nothing; once B is not zero, it does. Merged, it computes the same
# as before, up to rounding; unmerged, the weight is restored bit for bit.

# %%
Layer = working("LoRALinear")

model, tokenizer = load_gpt2(MODEL)
base = model.transformer.h[0].attn.c_attn
x = torch.randn(5, base.in_features, generator=torch.Generator().manual_seed(0))
W0 = base.weight.detach().clone()

with torch.no_grad():
    layer = Layer(base, rank=8, alpha=64, generator=torch.Generator().manual_seed(0))
    print("at the start, identical output: ", torch.equal(layer(x), base(x)))
    layer.lora_B.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    changed = layer(x)
    print(f"with B, the output changes by    {(changed - base(x)).abs().max():.2f}")
    layer.merge()
    print(f"merged, the output differs by    {(layer(x) - changed).abs().max():.1e}")
    layer.unmerge()
    print("unmerged, W restored exactly:   ", torch.equal(base.weight, W0))

# %% [markdown]
# ## What merging saves
#
# An adapter (unit 07) is a parallel path with an activation function, so it can never become part of a matrix. LoRA's
# path is linear: $W_0 x + s B A x = (W_0 + s B A)\, x$. Once merged, there *is* no second path. Do not measure this
# with a clock: on a small model the noise is larger than the difference. Count multiplications and additions.

# %%
model.requires_grad_(False)
ids = torch.tensor([tokenizer.encode("Once upon a time there was a woodcutter who lived on an island.")])


total = sum(p.numel() for p in model.parameters())


def operations(model):
    with FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_total_flops()


def wrap(model, rank, alpha=64, seed=0, targets=("c_attn", "c_proj", "c_fc")):
    """A LoRA layer for each targeted matrix, by name. They are not in the model yet."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Layer(model.get_submodule(name), rank, alpha, generator=draw) for name in find_targets(model, targets)
    }


layers = wrap(model, rank=8)
print(f"{len(layers)} layers, the first three:")
for name in list(layers)[:3]:
    print("  ", name, tuple(layers[name].lora_A.shape), tuple(layers[name].lora_B.shape))

# %% [markdown]
# These layers exist, but the model does not use them yet. They have to be inserted.

# %% exercise="inject_lora"

# %%
inject = working("inject_lora")

plain = operations(model)
logits = model(ids)
inject(model, layers)
print("logits unchanged:", torch.equal(model(ids), logits))
unmerged = operations(model)
for layer in layers.values():
    layer.merge()
merged = operations(model)
for layer in layers.values():
    layer.unmerge()

print(f"operations of a forward pass of {ids.shape[1]} tokens")
for name, count in {"the base": plain, "with LoRA, r = 8": unmerged, "merged": merged}.items():
    print(f"{name:<17} {count:>12,}  {count / plain:.2%}")

# %% [markdown]
# A merged model is not just *almost* as cheap as the base: it is the base, with other values. Hu et al. (2021, table 1)
# measured the latency that adapters add on GPT-2 medium, at batch size 1 and length 128: 20.7 % for Adapter-L and 30.3
# % for Adapter-H; merged LoRA adds nothing. The overhead in operations above is small, but measured time would show
# more: many small products take longer than their number of operations suggests.

# %% [markdown]
# ## What is trained, and what is saved
#
# LoRA layers in the model do not mean that *only* they are trained. Count what an optimiser would train now, if the
# base were not frozen and you skipped the next exercise.

# %%
model.requires_grad_(True)  # the state after loading a model


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


print(f"trained: {trained(model):,} parameters, {trained(model) / total:.1%} of the base")

# %% [markdown]
# This is more than full fine-tuning trains. It would run without any error or warning.

# %% exercise="mark_only_lora_as_trainable"

# %%
mark = working("mark_only_lora_as_trainable")

mark(model)
print(f"trained: {trained(model):,} parameters, {trained(model) / total:.1%} of the base")

# %% [markdown]
# The same parameters are saved, by name. The base is not in the file, because everyone who loads it already has the
# base. In this way GPT-3's checkpoint shrank from 350 GB to 35 MB (Hu et al. 2021, section 4.2; r = 4, q and v).

# %% exercise="lora_state_dict"

# %%
state_of = working("lora_state_dict")

state = state_of(model)
print(len(state), "tensors, the first two:")
for name in list(state)[:2]:
    print("  ", name, tuple(state[name].shape))
print(f"file size: {len(safetensors.torch.save(state)):,} bytes")

# %% [markdown]
# ## LoRA against full fine-tuning
#
# Everything is in place. Train both methods on the same story cards, with the same batches in the same order, each at
# the learning rate that the library's own sweep chose for it (`benchmarks/learning_rates.md`): LoRA needs a far larger
# one. LoRA has rank 8 on every matrix of every block. The run is short, with one seed each; rely on the shape of the
# curves and the counts, not on the last digit of a loss.

# %%
dataset = load_dataset("story-cards")
context = model.config.n_positions
examples = Completions(dataset.train, tokenizer, context)
held_out = Completions(dataset.validation[:64], tokenizer, context).batches(16)


def train(model, method, times=1.0):
    settings = TrainingSettings(
        steps=STEPS,
        learning_rate=times * defaults.learning_rate_for(method, model.config),
        warmup_steps=defaults.warmup_steps_for(STEPS),
    )
    bar = tqdm(total=STEPS, desc=method, unit="step")

    def batch_at(step):
        bar.update()
        return examples.batch_at(step, BATCH, 0)

    losses = Trainer(model, batch_at, settings, progress=False).run().losses
    bar.close()
    return losses, completion_loss(model, held_out)


# %%
full, _ = load_gpt2(MODEL)
before = completion_loss(full, held_out)
results = {}
results["full"] = train(full, "full")
print(f"full fine-tuning: held-out loss {before:.3f} -> {results['full'][1]:.3f}")

# %%
results["lora"] = train(
    model, "lora"
)  # run this once: run again, it continues to train the LoRA that is trained already
print(f"LoRA:             held-out loss {before:.3f} -> {results['lora'][1]:.3f}")

# %%
sizes = {
    name: len(safetensors.torch.save(dict(s))) for name, s in (("full", full.state_dict()), ("lora", state_of(model)))
}
shares = {
    "trained parameters": trained(model) / trained(full),
    "bytes on disk": sizes["lora"] / sizes["full"],
    "forward pass, unmerged": unmerged / plain,
    "forward pass, merged": merged / plain,
}
for name, share in shares.items():
    print(f"{name:<23} {share:>8.2%} of full fine-tuning")
print(f"on disk: {sizes['lora']:,} bytes instead of {sizes['full']:,}")

# %% figure="unit_09.png"
figure, (left, right) = plotting.panels(2, width=5.2, height=3.2)
for style, (name, text) in enumerate({"lora": "LoRA, r = 8", "full": "full fine-tuning"}.items()):
    losses = plotting.smooth(results[name][0], 8)
    plotting.curve(left, losses, label="", style=style)
    at = STEPS // 4 if name == "lora" else STEPS // 2
    other = plotting.smooth(results["full" if name == "lora" else "lora"][0], 8)
    above = losses[at] >= other[at]
    left.annotate(
        text,
        (at + 1, losses[at]),
        xytext=(14, 24) if above else (-14, -20),
        textcoords="offset points",
        ha="left" if above else "right",
        color=plotting.COLOURS[style],
        fontweight="bold",
        arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.8},
    )
left.set_ylim(bottom=0)
plotting.label(left, x="step (running means over 8 steps)", y="loss, nats per token", title="Loss in training")
plotting.bars(right, {name: 100 * share for name, share in shares.items()}, unit="%")
for bar in right.patches:
    bar.set_color(plotting.COLOURS[0])  # LoRA's colour, as on the left
plotting.label(right, x="LoRA, per cent of full fine-tuning", title="What LoRA costs")
show(
    figure,
    f"Left, the training loss over {STEPS} steps: LoRA of rank 8 ends at {results['lora'][0][-1]:.2f} nats "
    f"and full fine-tuning at {results['full'][0][-1]:.2f}. Right, bars of LoRA's share of full fine-tuning: "
    + ", ".join(f"{name} {100 * share:.1f} per cent" for name, share in shares.items())
    + ".",
)

# %%
gap = results["lora"][1] - results["full"][1]
fallen = (before - results["lora"][1]) / (before - results["full"][1])
print(f"held-out loss: LoRA achieves {fallen:.0%} of full fine-tuning's reduction (difference {gap:+.3f})")

# %% [markdown]
# The last line shows how much a few per cent of the parameters achieve in the same number of steps. It does *not* show
# that one method is better. Both rates were chosen for 500 steps, and this run has 80: at twice its rate, full
# fine-tuning was clearly ahead of LoRA when this unit was written (one seed; run `train(load_gpt2(MODEL)[0], "full",
# times=2)[1]` in a new cell to see it). Every comparison of two methods is also a comparison of two learning rates, and
# a paper that tunes only its own method will favour it.
#
# Published results for longer runs on a larger model, GPT-2 medium on E2E (Hu et al. 2021, table 3, BLEU):
#
# | | trained | BLEU |
# |---|---|---|
# | full fine-tuning | 354.92 M | 68.2 |
# | Adapter-L | 11.09 M | 68.9 |
# | prefix-layer | 0.35 M | 69.7 |
# | LoRA, r = 4 on q and v | 0.35 M | 70.4 |
#
# (The paper prints 0.35 M; r = 4 on q and v of GPT-2 medium is 393,216 parameters.) LoRA is *better* here, but that is
# not a general rule: full fine-tuning of a large model on a small data set also overfits and forgets.
#
# LoRA does *not* reduce the memory of the weights, most of the memory of the activations (unit 00), or most of the time
# of a step. LoRA's backward pass still goes through every layer; it only skips the products that compute the gradients
# of the large weights.

# %% [markdown]
# ## Alpha after training: a volume control
#
# The scaling is not learned, so you can change it after training. At 0 the model is the base; at 1 it is what you
# trained. What happens above 1?

# %%
card = dataset.validation[0].mr


def turned_to(volume, write=True):
    """The loss on 32 held-out cards and a text, with every change multiplied by `volume`; restores the scaling."""
    usual = {name: layer.scaling for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.scaling = volume * usual[name]
    seen = completion_loss(model, held_out[:2]), write_texts(model, tokenizer, [card])[0] if write else ""
    for name, layer in layers.items():
        layer.scaling = usual[name]
    return seen


volumes = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2]
turned = {volume: turned_to(volume) for volume in tqdm(volumes, desc="volume")}


def knob(volume):
    figure, (left, right) = plotting.panels(2, width=4.8, height=3.2)
    left.plot(volumes, [turned[each][0] for each in volumes], color=plotting.COLOURS[0], linewidth=1.8)
    left.plot([volume], [turned[volume][0]], "o", color=plotting.COLOURS[1], markersize=9)
    left.annotate(f"{turned[volume][0]:.2f}", (volume, turned[volume][0]), xytext=(8, 8), textcoords="offset points")
    left.margins(y=0.15)
    plotting.label(
        left,
        x="alpha, as a multiple of the trained value",
        y="held-out loss, nats per token",
        title=("Loss against alpha"),
    )
    words = turned[volume][1].split()
    lines, line = [], ""
    for word in words[:60]:
        if len(line) + len(word) > 48:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    right.text(
        0, 0.95, "\n".join([*lines, line])[:560], va="top", fontsize=9, transform=right.transAxes, parse_math=False
    )
    right.set_axis_off()
    plotting.label(right, x="", title=f"Text at {volume:g}")
    return figure


print(card)
slider(
    knob,
    "times alpha",
    volumes,
    1,
    "Left, the loss on held-out cards against the scaling, from 0 (the base model) to 1 (as trained) to 2: it falls "
    "towards 1 and rises again well above 1. Right, the text that the model then writes for one card.",
)

# %% [markdown]
# Between 0 and 1 you fade the task in: half of the change already achieves a good part of the reduction. Near 1 the
# curve is flat, so alpha need not be exact. Well above 1, every layer overshoots: move the slider to 2 and read the
# text. (At 1, after so few steps, the text has the form of a tale but still gets items of the card wrong: more training
# is needed for that.)

# %% [markdown]
# ## q and v of a fused matrix
#
# One piece is missing. The paper adapts the query and value matrices, $W_q$ and $W_v$, and leaves $W_k$ unchanged.
# GPT-2 has no such matrices: `c_attn` computes q, k and v in one product, side by side on the output axis (unit 03).

# %% prediction="rank_four_twice"

# %% [markdown]
# Two LoRAs on two parts, each with its own A and B, are together *one* LoRA on the whole matrix: stack the two A, and
# put the two B where they belong. Where is that?

# %% exercise="block_diagonal_B"

# %% [markdown]
# Compare the two ways, and count the parameters.

# %%
blocks = working("block_diagonal_B")

draw = torch.Generator().manual_seed(5)
d, r = model.config.n_embd, 4
A_q, A_v = torch.randn(r, d, generator=draw) / d**0.5, torch.randn(r, d, generator=draw) / d**0.5
B_q, B_v = torch.randn(d, r, generator=draw), torch.randn(d, r, generator=draw)
A_both, B_both = torch.cat([A_q, A_v]), torch.cat([B_q, B_v])

parts = delta(A_both, blocks(B_both, ("q", "v"), ("q", "k", "v")), 1.0)
whole = delta(A_q, torch.randn(3 * d, r, generator=draw), 1.0)
for name, change, count in (
    ("r = 4 on q and on v", parts, A_both.numel() + B_both.numel()),
    ("r = 4 on c_attn", whole, r * d + 3 * d * r),
):
    norms = ", ".join(f"{part} {piece.norm():.0f}" for part, piece in zip("qkv", change.chunk(3), strict=True))
    print(f"{name:<20} {count:>6,} parameters, rank {torch.linalg.matrix_rank(change)}, norms of the change: {norms}")

# %% check="rank_four_twice"

# %% [markdown]
# **The same under another name.** loralib, the paper's own code, has `MergedLinear(r, alpha, enable_lora=[True, False,
# True])`. It applies the two B as a grouped convolution. That is a LoRA of rank 2r with a block-diagonal B; and because
# a LoRA of rank 2r divides its alpha by 2r and not by r, it needs *twice* the alpha to equal loralib's.

# %%
alpha = 16
x = torch.randn(6, d, generator=draw)

h = F.linear(x, A_both)  # (6, 2r)
# (6, 2d): group 1 reads the first r columns of h, group 2 the rest
grouped = F.conv1d(h.T[None], B_both[:, :, None], groups=2)[0].T
q, v = (alpha / r * grouped).chunk(2, dim=1)
loralib = torch.cat([q, torch.zeros_like(q), v], dim=1)

one = nn.Linear(d, 3 * d, bias=False)
nn.init.zeros_(one.weight)
for factor in (1, 2):
    layer = Layer(one, rank=2 * r, alpha=factor * alpha)
    with torch.no_grad():
        layer.lora_A.copy_(A_both)
        layer.lora_B.copy_(blocks(B_both, ("q", "v"), ("q", "k", "v")))
        difference = (layer(x) - loralib).abs().max() / loralib.abs().max()
    print(f"one LoRA of rank 2r with {factor} x alpha differs from loralib's by {difference:.1e} of the largest entry")

# %% [markdown]
# ## A fault in the start
#
# The layer below is ours, but its fault is that of a widely used tutorial. It is the low-rank path alone, for an
# `nn.Linear`, with A and B stored the other way round: $x A B$ with A (in, r) and B (r, out). Both ways are LoRA. Find
# the fault before you read on: compare the comment with what the line does.

# %%
print(inspect.getsource(FaultyLoRALayer))

# %% [markdown]
# `kaiming_uniform_` with $a = \sqrt 5$ draws uniform numbers up to 1/sqrt(fan_in), and it takes the *second* axis of a
# matrix for fan_in. That is right for a weight stored as (out, in). This A is stored as (in, r), so its bound is 1/sqrt(r):
# $\sqrt{\text{in} / r}$ times too wide.

# %%
print("              r   bound as it should be   the layer's    too wide by")
for name, inputs in (("c_attn", model.config.n_embd), ("mlp.c_proj", 4 * model.config.n_embd), ("GPT-2 small", 768)):
    for r in (1, 8, 64):
        largest = FaultyLoRALayer(inputs, 10, r, 16).A.abs().max().item()
        print(f"{name:<12} {r:>3} {inputs**-0.5:>23.3f} {largest:>13.3f} {largest * inputs**0.5:>13.1f}")

# %% [markdown]
# B is zero, so the layer starts as the base model, and no output tells you that something is wrong. But each step of B
# now changes $B A$ by several times as much, and by how much depends on the layer and on r: what alpha / r had achieved
# is lost. Train the LoRA of this unit with this start, at the learning rate that is right for the sound one and at 0.3
# times that rate.


# %%
def train_wide(times):
    """Train LoRA from an A that is wider by sqrt(in / r)."""
    wide, _ = load_gpt2(MODEL)
    wide_layers = wrap(wide, rank=8)
    with torch.no_grad():
        for layer in wide_layers.values():
            layer.lora_A *= (layer.base.in_features / 8) ** 0.5
    inject(wide, wide_layers)
    mark(wide)
    return train(wide, "lora", times)[1]


print(f"the base model:                       held-out loss {before:.3f}")
print(f"A as it should be, tuned rate:        held-out loss {results['lora'][1]:.3f}")
for times in (1.0, 0.3):
    print(f"A too wide, {times:.1f} times that rate:      held-out loss {train_wide(times):.3f}")

# %% [markdown]
# At the rate that was tuned for the sound start, the run is destroyed. At a smaller rate it reaches about the same loss.
# So the fault is easily overlooked: whoever tunes the learning rate with the faulty layer finds a good one, and it is
# wrong for everybody else's LoRA, and for another rank. When learning rates of two codes do not agree, compare the
# starts first.
#
# Only a test finds such a fault. Write one that would have found it. The check runs yours on several sound layers and on
# several faulty ones.

# %% exercise="test_lora_start"

# %%
test_start = working("test_lora_start")


def with_initial_factors(in_features, out_features, rank, alpha):
    A, B = initial(in_features, out_features, rank)
    return SimpleNamespace(A=A, B=B)


for name, kind in {"the exhibit": FaultyLoRALayer, "initial_factors": with_initial_factors}.items():
    try:
        test_start(kind)
        print(f"{name}: passes")
    except AssertionError as error:
        print(f"{name}: fails ({error})")

# %% [markdown]
# ## What goes wrong in practice
#
# **The scaling is lost, or applied twice.** A file contains A and B but not s. If you load it into code that uses
# another s, you have another model. It still runs and still writes text.

# %%
s = layers["transformer.h.0.attn.c_attn"].scaling
wrong = {
    "as trained, alpha / r": s,
    "left out, s = 1": 1.0,
    "alpha / sqrt(r)": s * 8**0.5,
    "alpha without r, or s applied twice": s * 8,
}
for name, scaling in wrong.items():
    print(f"{name:<36} s = {scaling:>5.1f}: held-out loss {turned_to(scaling / s, write=False)[0]:.2f}")

# %% [markdown]
# (Here r = 8 and alpha = 64, so two of the mistakes coincide.) This is why PEFT stores `adapter_config.json` next to
# the tensors: see unit 10.
#
# **Conv1D is transposed.** For `c_attn`, which is not square, a forgotten transpose raises an error at once. For the
# square `attn.c_proj` it does not.

# %%
for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):
    layer = layers[name]
    x = torch.randn(20, layer.base.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = layer(x) - layer.base(x)
        change = delta(layer.lora_A, layer.lora_B, layer.scaling)  # (out, in)
        assert isinstance(layer.base, Conv1D)  # stores its weight as (in, out)
        try:
            got = x @ (layer.base.weight + change) + layer.base.bias - layer.base(x)
            print(
                f"{name}: no error, but the change is wrong by {(got - wanted).norm() / wanted.norm():.0%} of its norm"
            )
        except RuntimeError as error:
            print(f"{name}: RuntimeError: {str(error).splitlines()[0]}")

# %% [markdown]
# **Unmerging by subtraction drifts.** A server that switches tasks could add the change of one task, subtract it, and
# go on with the next task. In bfloat16, with 8 significant bits, many weights do not come back to their original
# values, and they move further away with each task. Keeping $W_0$ needs memory for a copy, and restores every weight
# exactly.

# %%
layer = layers["transformer.h.0.attn.c_attn"]
with torch.no_grad():
    change = delta(layer.lora_A, layer.lora_B, layer.scaling).T
    for dtype in (torch.float32, torch.bfloat16):
        W0 = layer.base.weight.detach().to(dtype)
        W, tasks = W0.clone(), torch.Generator().manual_seed(0)
        for task in range(1, 11):
            other = torch.randn(change.shape, generator=tasks) * change.std()  # as large as the change that you trained
            W += other.to(dtype)
            W -= other.to(dtype)
            if task in (1, 10):
                moved, most = (W != W0).float().mean().item(), (W - W0).abs().max().item()
                print(f"{dtype!s:<15} after {task:>2}: {moved:>4.0%} of W has changed, by up to {most:.1e}")

    kept = nn.Linear(64, 64).bfloat16()
    W0 = kept.weight.detach().clone()
    layer = Layer(kept, 4, 8)
    layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        layer.merge()
        layer.unmerge()
    print("with W0 kept:   identical after ten rounds:", torch.equal(kept.weight, W0))

# %% [markdown]
# **Merging twice.** If `merge` is called twice and does not check, the change is in the weight twice, as if alpha were
# doubled. That is why your layer keeps track of whether it is merged.

# %%
layer = layers["transformer.h.0.attn.c_attn"]
once = layer.base.weight.detach().clone()
layer.merge()
first = layer.base.weight.detach().clone()
layer.merge()
print("the second merge of your layer changes W by", (layer.base.weight - first).abs().max().item())
layer.unmerge()
print(f"with the change added twice everywhere: held-out loss {turned[2][0]:.2f} instead of {turned[1][0]:.2f}")

# %% [markdown]
# **The bias gets into the weight.** If you compute the merged weight as `layer(identity)`, every row also contains the
# bias: the output then contains it not once but 1 + (the sum of x) times.

# %%
with torch.no_grad():
    inputs = layer.base.in_features
    by_identity = layer(torch.eye(inputs))  # (in, out): W0 + change, plus the bias in every row
    x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0))
    error = (x @ by_identity + layer.base.bias - layer(x)).norm() / layer(x).norm()
    print(f"the output is off by {error:.0%}")

# %% [markdown]
# ## Summary
#
# - LoRA freezes W and learns a low-rank change s B A, with r (in + out) parameters instead of in x out.
# - A random, B zero: starts as the base model and has a gradient. Both zero never learns; both random does not start as
#   the base model.
# - alpha / r makes the effect of the first step independent of the rank, so the learning rate can stay when r changes.
# - Merged, LoRA costs exactly what the base costs. Keep W0; do not subtract.
# - Always say where LoRA is applied: r = 4 on `c_attn` and r = 4 on q and on v have the same number of parameters and
#   are different models.
#
# ## Go further
#
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 4 (the method), table 1 (latency), table 3 (E2E), section 7.
# - Hayou et al. 2024, *The Impact of Initialization on LoRA Finetuning Dynamics* (arXiv:2406.08447): A or B at zero?
# - Hayou et al. 2024, *LoRA+* (arXiv:2402.12354): why B may learn faster than A.
# - Kalajdzievski 2023, *rsLoRA* (arXiv:2312.03732): alpha / sqrt(r), section 3.
# - `lora_from_scratch/methods/lora.py`: what you wrote, and the rest of the method.
#
# You chose rank 8, on every matrix, and it worked. Would rank 1 have been enough? And with a fixed number of
# parameters, do you spend them on one matrix with a high rank or on all matrices with a low rank? That is the next
# unit.

# %% [markdown] open_question="merge_or_not" points=4
# ### Open question
#
# A company serves one language model to 300 customers, each with its own LoRA (r = 16 on every matrix). Requests from
# different customers arrive mixed. An engineer proposes to merge each customer's LoRA "since merged LoRA costs
# nothing". Write about ten lines: what would that mean for memory and for the batches, when is merging right, and what
# would you do here? Also say what has to be kept so that a merged model can become the base again.
#
# **Rubric.**
# - 1 point: a merged weight serves one customer; 300 merged models need 300 times the memory, or a swap at each
#   request.
# - 1 point: unmerged, one base serves all customers, and rows of different customers can share a batch (the product
#   with the base weight is computed once).
# - 1 point: names the cost of not merging (a few per cent more operations, many small products) and a case where
#   merging is better.
# - 1 point: W0 (or the original checkpoint) has to be kept, because subtracting drifts, most of all in 16 bits.

# %% volatile=true
progress("09")
