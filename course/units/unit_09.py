# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 09: LoRA
#
# **When you are through, you can**
#
# - write LoRA from nothing: the two thin matrices, their start, the layer, merging and unmerging without losing a
#   bit;
# - say why A begins random and B at zero, and what alpha / r is for;
# - put LoRA into a GPT-2, whose weights lie the other way round and whose q, k and v are one matrix;
# - train it beside full fine-tuning, and say what it saves and what it does not.
#
# **You need** the rank of a matrix (unit 01) and one block of GPT-2 (unit 03). Units 02, 04 and 07 help.
#
# **Time**: about 90 minutes. 7 exercises, 2 predictions, one open question.
#
# ![Left, the loss of LoRA and of full fine-tuning over the same training steps, two falling curves. Right, bars of
# what LoRA needs as a share of full fine-tuning: a few per cent of the trained numbers and of the bytes on disk,
# slightly more than all of the operations before merging, and exactly all of them after it.](unit_09.png)

# %%
import os

import safetensors.torch
import torch
from lora_from_scratch.finetune.tasks import load_dataset
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.evaluation import write_texts
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.placement import find_targets
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 15 minutes and 5 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 80))  # of each training run
BATCH = 8

# %% [markdown]
# ## A change that is thin
#
# Adapters (unit 07) learn well, but they stay in the way: every token goes through them for ever. Biases (unit 08)
# cost nothing, but they can only shift what comes out. Is there something that can turn a weight as training would,
# and that *goes away* when training is over?
#
# Look at what full fine-tuning does. It takes a weight $W_0$ and ends with another, $W_0 + \Delta W$. Nobody says
# that $\Delta W$ needs as many numbers as $W_0$. In unit 02 you saw that a change which is learned has a far lower
# rank than the weight that it changes. Aghajanyan et al. (2020, arXiv:2012.13255) had seen something of the kind
# before: trained in 200 random directions only, a RoBERTa reaches 90 % of what full training reaches on one task
# (MRPC).
#
# LoRA makes this the rule (Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. 3):
#
# $$y = W_0 x + \Delta W x, \qquad \Delta W = s\, B A, \qquad s = \frac{\alpha}{r}$$
#
# - $x$ (in) and $y$ (out): what goes into the layer and what comes out;
# - $W_0$ (out, in): the pretrained weight, **frozen**;
# - $A$ (r, in) and $B$ (out, r): the two thin matrices, **trained**. The rank r is small: 1, 4, 8;
# - $\alpha$: a number that you choose. We come to it.
#
# Begin with the change itself.

# %% exercise="delta_weight"

# %% [markdown]
# How thin is it? Take the matrix of GPT-3 that makes the queries, 12,288 x 12,288, with r = 4, and count (unit 01).
# For the layer that you will adapt below, multiply it out and ask for its rank.

# %%
delta = working("delta_weight")

width = 12288
print(f"GPT-3, one query matrix: {width * width:,} numbers; A and B: {2 * 4 * width:,}")

draw = torch.Generator().manual_seed(0)
A, B = torch.randn(4, 256, generator=draw), torch.randn(768, 4, generator=draw)
change = delta(A, B, 2.0)
print(f"the change: {tuple(change.shape)}, rank {torch.linalg.matrix_rank(change)}, {A.numel() + B.numel():,} numbers")

# %% [markdown]
# ## How it starts
#
# Before the first step the adapted model should *be* the pretrained one: whatever it knows is where you start from.
# So $B A$ has to be zero, and there are several ways to get that.

# %% prediction="both_at_zero"

# %% [markdown]
# To find out, take a problem that is small enough to try every start: a frozen $W_0$ of 16 to 24 features, and data
# from $W_0$ plus a change of rank 2. With $G = \partial L / \partial \Delta W$ (out, in), the gradient that full
# fine-tuning would have, the chain rule gives
#
# $$\frac{\partial L}{\partial A} = s\, B^\top G, \qquad \frac{\partial L}{\partial B} = s\, G A^\top .$$
#
# Each gradient has the *other* matrix in it.

# %%
draw = torch.Generator().manual_seed(1)
W0 = torch.randn(24, 16, generator=draw)
x = torch.randn(256, 16, generator=draw)
y = x @ (W0 + 0.5 * torch.randn(24, 2, generator=draw) @ torch.randn(2, 16, generator=draw)).T


def train_from(A, B, steps=300, rate=1e-2):
    """Learn the change from this start; the losses, and how large the first gradients of A and B are."""
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


def random(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)) / 4


starts = {
    "A random, B zero": (random(2, 16), torch.zeros(24, 2)),
    "A zero, B random": (torch.zeros(2, 16), random(24, 2)),
    "both zero": (torch.zeros(2, 16), torch.zeros(24, 2)),
    "both random": (random(2, 16), random(24, 2)),
}
base_loss = F.mse_loss(x @ W0.T, y).item()
print(f"the loss of W0 alone: {base_loss:.2f}\n")
print("start               loss at first   after 300 steps   |dL/dA|   |dL/dB| at first")
for name, (A, B) in starts.items():
    losses, at_a, at_b = train_from(A, B)
    print(f"{name:<18}  {losses[0]:>13.2f}   {losses[-1]:>15.4f}   {at_a:>7.3f}   {at_b:>7.3f}")

# %% check="both_at_zero"

# %% [markdown]
# Read the table row by row.
#
# - *A random, B zero*: begins at the loss of $W_0$. At first only B has a gradient; after one step B is not zero any
#   more, and A has one too.
# - *A zero, B random*: begins there as well, and learns. Why not this one? Hayou et al. (2024, arXiv:2406.08447) find
#   that the first kind bears larger learning rates and ends up better on average. Both are LoRA.
# - *both zero*: no gradient, now and for ever.
# - *both random*: learns, but does not begin at $W_0$. On this problem that costs little. On a language model a
#   random change of every layer destroys what you paid for.

# %% exercise="initial_factors"

# %% [markdown]
# Why 1/sqrt(in)? Each entry of $h = A x$ is a sum over all the inputs. With that bound it stays of one size however
# wide the layer is:

# %%
initial = working("initial_factors")

for inputs in (64, 256, 1024, 4096):
    A, B = initial(inputs, 64, 8, torch.Generator().manual_seed(0))
    h = torch.randn(500, inputs, generator=torch.Generator().manual_seed(1)) @ A.T
    print(
        f"in = {inputs:>4}: h has standard deviation {h.std():.3f}, B has {B.count_nonzero()} entries that are not zero"
    )

# %% [markdown]
# ## What alpha / r is for
#
# Why divide by r at all? Because you will want to change r without looking for a new learning rate. Adam's first step
# moves every entry of B by the learning rate, whatever the gradient. So *r times as many* entries move, and their
# effects add up. Put a number on it: by how much does the first step lower the loss, to first order, for one gradient
# $G$?

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
# With alpha / r the first step is worth the same for every rank. With alpha alone it grows like r, and the learning
# rate that is right for r = 4 is far too large for r = 64. That is what the paper means: tuning alpha is roughly the
# same as tuning the learning rate, so it sets alpha once and leaves it (section 4.1).
#
# The middle column is rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, section 3). Its argument is about the whole
# training and not its first step: for large ranks alpha / r makes the change too small to be worth the rank. Up to r
# = 8 or 16 you will hardly see the difference. What matters in practice: **know which of the three your code does.**

# %% [markdown]
# ## The layer
#
# Now the layer that does it. It *wraps* the pretrained layer and leaves it untouched, so that nothing has to be
# copied, and so that it works for a `Linear` and for a `Conv1D` alike. `__init__` is written; it uses your
# `initial_factors`. What the layer computes and how it is merged is yours. Read the docstring of the class first: it
# says what each of the three has to do.
#
# Three things to keep in mind:
#
# - build no $B A$ in `forward`: $B(Ax)$ is the same with far fewer operations (the check does not count them, you
#   will);
# - GPT-2's `Conv1D` stores its weight (in, out), the transpose of what your `delta_weight` returns;
# - after `merge` the change is in the weight, so `forward` must not add it once more.

# %% exercise="LoRALinear"

# %% [markdown]
# Try it on a layer of GPT-2. At the start it changes nothing at all; with a B that is not zero it does; merged, it
# computes the same as before, up to rounding; unmerged, every bit is where it was.

# %%
Layer = working("LoRALinear")

model, tokenizer = load_gpt2(MODEL)
base = model.transformer.h[0].attn.c_attn
x = torch.randn(5, base.in_features, generator=torch.Generator().manual_seed(0))
W0 = base.weight.detach().clone()

with torch.no_grad():
    layer = Layer(base, rank=8, alpha=64, generator=torch.Generator().manual_seed(0))
    print("at the start, the same bits:  ", torch.equal(layer(x), base(x)))
    layer.lora_B.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    changed = layer(x)
    print(f"with B, it changes by          {(changed - base(x)).abs().max():.2f}")
    layer.merge()
    print(f"merged, it differs by          {(layer(x) - changed).abs().max():.1e}")
    layer.unmerge()
    print("unmerged, the same bits of W: ", torch.equal(base.weight, W0))

# %% [markdown]
# ## What merging saves
#
# An adapter of unit 07 is a detour with a bend in it (its activation function), so it can never become part of a
# matrix. LoRA's detour is straight: $W_0 x + s B A x = (W_0 + s B A)\, x$. Merged, there *is* no detour. Do not take
# a stopwatch: on a small model it measures the weather. Count multiplications and additions.

# %%
model.requires_grad_(False)
ids = torch.tensor([tokenizer.encode("Once upon a time there was a woodcutter who lived on an island.")])


total = sum(p.numel() for p in model.parameters())


def operations(model):
    with FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_total_flops()


def wrap(model, rank, alpha=64, seed=0, targets=("c_attn", "c_proj", "c_fc")):
    """A LoRA layer for each matrix that is meant, by name. They are not in the model yet."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Layer(model.get_submodule(name), rank, alpha, generator=draw) for name in find_targets(model, targets)
    }


layers = wrap(model, rank=8)
print(f"{len(layers)} layers, the first three:")
for name in list(layers)[:3]:
    print("  ", name, tuple(layers[name].lora_A.shape), tuple(layers[name].lora_B.shape))

# %% [markdown]
# They stand beside the model, and the model does not know of them. Somebody has to put them in.

# %% exercise="inject_lora"

# %%
inject = working("inject_lora")

plain = operations(model)
logits = model(ids)
inject(model, layers)
print("the same logits as before:", torch.equal(model(ids), logits))
unmerged = operations(model)
for layer in layers.values():
    layer.merge()
merged = operations(model)
for layer in layers.values():
    layer.unmerge()

print(f"operations for {ids.shape[1]} tokens")
for name, count in {"the base": plain, "with LoRA, r = 8": unmerged, "merged": merged}.items():
    print(f"{name:<17} {count:>12,}  {count / plain:.2%}")

# %% [markdown]
# Merged is not just *almost* as cheap as the base: it is the base, with other numbers in it. Hu et al. (2021, table 1)
# measured what adapters add on GPT-2 medium, at batch 1 and length 128: 20.7 % for Adapter-L and 30.3 % for
# Adapter-H; LoRA merged, nothing. The percentage of operations above is small, and the clock would say more than
# that: many small products take longer than their operations say.

# %% [markdown]
# ## What is trained, and what is saved
#
# A layer that is in the model is not yet a model that trains it *alone*. Count what an optimiser would get now, if
# you forgot the next exercise and the base were not frozen already.

# %%
model.requires_grad_(True)  # as a model is after loading


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


print(f"trained: {trained(model):,} numbers, {trained(model) / total:.1%} of the base")

# %% [markdown]
# More than full fine-tuning. It would train happily, and nothing would tell you.

# %% exercise="mark_only_lora_as_trainable"

# %%
mark = working("mark_only_lora_as_trainable")

mark(model)
print(f"trained: {trained(model):,} numbers, {trained(model) / total:.1%} of the base")

# %% [markdown]
# And what goes to disk is the same numbers, by their names. The base is not in the file: everybody who loads it has
# that already. GPT-3's checkpoint shrank so from 350 GB to 35 MB (Hu et al. 2021, section 4.2; r = 4, q and v).

# %% exercise="lora_state_dict"

# %%
state_of = working("lora_state_dict")

state = state_of(model)
print(len(state), "tensors, the first two:")
for name in list(state)[:2]:
    print("  ", name, tuple(state[name].shape))
print(f"as a file: {len(safetensors.torch.save(state)):,} bytes")

# %% [markdown]
# ## LoRA against full fine-tuning
#
# You have everything. Train both on the same story cards, with the same batches in the same order, each at the learning
# rate that the library's own sweep chose for its method (`benchmarks/learning_rates.md`): LoRA wants a far larger one.
# LoRA has rank 8 on every matrix of every block. The run is short, one seed each; what is reliable after it is the
# shape of the curves and the counts, not the last digit of a loss. (Unit 10 trains longer, with three seeds.)

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
results["lora"] = train(model, "lora")  # run it once: a second time it goes on with the LoRA that is trained already
print(f"LoRA:             held-out loss {before:.3f} -> {results['lora'][1]:.3f}")

# %%
sizes = {
    name: len(safetensors.torch.save(dict(s))) for name, s in (("full", full.state_dict()), ("lora", state_of(model)))
}
shares = {
    "trained numbers": trained(model) / trained(full),
    "bytes on disk": sizes["lora"] / sizes["full"],
    "operations, not merged": unmerged / plain,
    "operations, merged": merged / plain,
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
plotting.label(left, x="step (the curves are means of 8 steps)", y="loss, nats per token", title="The same steps")
plotting.bars(right, {name: 100 * share for name, share in shares.items()}, unit="%")
for bar in right.patches:
    bar.set_color(plotting.COLOURS[0])  # LoRA's, as on the left
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
print(f"on held-out cards LoRA has come {fallen:.0%} of the way of full fine-tuning (difference in loss: {gap:+.3f})")

# %% [markdown]
# The last line says how far a few per cent of the numbers have carried you in the same steps. It does *not* say that
# one method is better. Both rates were chosen for 500 steps, and this run has 80: with twice its rate, full fine-tuning
# was clearly ahead of LoRA when this unit was written (one seed; `train(load_gpt2(MODEL)[0], "full", times=2)[1]` in a
# new cell shows it). Every comparison of two methods is also one of two learning rates, and a paper that tunes only its
# own method will win.
#
# What the literature says of longer runs on a larger model, GPT-2 medium on E2E (Hu et al. 2021, table 3, BLEU):
#
# | | trained | BLEU |
# |---|---|---|
# | full fine-tuning | 354.92 M | 68.2 |
# | Adapter-L | 11.09 M | 68.9 |
# | prefix-layer | 0.35 M | 69.7 |
# | LoRA, r = 4 on q and v | 0.35 M | 70.4 |
#
# (The paper prints 0.35 M; r = 4 on q and v of GPT-2 medium counts 393,216.) That LoRA is *better* there is no law:
# full fine-tuning of a large model on a small data set also overfits and forgets.
#
# What did *not* shrink: the weights in memory, most of the activations (unit 00), and most of the time of a step.
# LoRA's backward pass still goes through every layer; it is spared the products that make the large weights' gradients.

# %% [markdown]
# ## Alpha after training: a volume knob
#
# The scaling is a number outside of what was learned, so you can turn it afterwards. At 0 the model is the base; at 1
# it is what you trained. What is beyond?

# %%
card = dataset.validation[0].mr


def turned_to(volume, write=True):
    """The held-out loss (of 32 cards) and a text with every change times `volume`; afterwards it is as before."""
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
        left, x="alpha, as a multiple of the trained one", y="held-out loss, nats per token", title="The knob"
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
    plotting.label(right, x="", title=f"At {volume:g} it writes")
    return figure


print(card)
slider(
    knob,
    "times alpha",
    volumes,
    1,
    "Left, the loss on held-out cards over the scaling, from 0 (the base model) over 1 (as trained) to 2: it falls "
    "towards 1 and does not stay low far beyond. Right, the text that the model then writes for one card.",
)

# %% [markdown]
# Between 0 and 1 you fade the task in: half of the change is already a good part of the way. Near 1 the curve is flat,
# so alpha need not be exact. Far beyond, every layer overshoots: move the slider to 2 and read. (At 1, after so few
# steps, it has the form of a tale and still gets items of the card wrong: that takes a longer training.)

# %% [markdown]
# ## q and v of a fused matrix
#
# One piece is missing. The paper adapts the matrices of queries and values, $W_q$ and $W_v$, and leaves $W_k$ alone.
# GPT-2 has no such matrices: `c_attn` makes q, k and v in one product, side by side on the output axis (unit 03).

# %% prediction="rank_four_twice"

# %% [markdown]
# Two LoRAs on two parts, each with an A and a B of its own, are again *one* LoRA on the whole matrix: stack the two
# A, and put the two B where they belong. Where is that?

# %% exercise="block_diagonal_B"

# %% [markdown]
# Compare the two ways, and count.

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
    print(f"{name:<20} {count:>6,} numbers, rank {torch.linalg.matrix_rank(change)}, size of the change of {norms}")

# %% check="rank_four_twice"

# %% [markdown]
# **The same thing under another name.** loralib, the paper's own code, has `MergedLinear(r, alpha, enable_lora=[True,
# False, True])`. It lets the two B work as a grouped convolution. That is a LoRA of rank 2r with a block-diagonal B;
# and since a LoRA of rank 2r divides its alpha by 2r and not by r, it needs *twice* the alpha to equal loralib's.

# %%
alpha = 16
x = torch.randn(6, d, generator=draw)

h = F.linear(x, A_both)  # (6, 2r)
grouped = F.conv1d(h.T[None], B_both[:, :, None], groups=2)[
    0
].T  # (6, 2d): group 1 reads r numbers of h, group 2 the rest
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
# ## What goes wrong in practice
#
# **The scaling is lost, or counts twice.** A file holds A and B. It does not hold s. Load it into code with another
# idea of s, and you have another model; it runs, it even writes.

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
# (r = 8 and alpha = 64 here, so that two of the mistakes coincide.) PEFT's `adapter_config.json` stands beside the
# tensors for this reason: unit 10.
#
# **Conv1D is transposed.** For `c_attn`, which is not square, a forgotten transpose is an error at once. The square
# `attn.c_proj` says nothing.

# %%
for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):
    layer = layers[name]
    x = torch.randn(20, layer.base.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = layer(x) - layer.base(x)
        change = delta(layer.lora_A, layer.lora_B, layer.scaling)  # (out, in)
        assert isinstance(layer.base, Conv1D)  # its weight is (in, out)
        try:
            got = x @ (layer.base.weight + change) + layer.base.bias - layer.base(x)
            print(
                f"{name}: no error, and the change is wrong by {(got - wanted).norm() / wanted.norm():.0%} of its size"
            )
        except RuntimeError as error:
            print(f"{name}: RuntimeError: {str(error).splitlines()[0]}")

# %% [markdown]
# **Unmerging by subtraction drifts.** Add the change of a task, subtract it, and so on with the next task, as a server
# does that switches. In bfloat16, with eight bits for the digits, many weights do not come back as they were, and with
# each task they are further away. Keeping $W_0$ costs memory for a copy, and gives back every one.

# %%
layer = layers["transformer.h.0.attn.c_attn"]
with torch.no_grad():
    change = delta(layer.lora_A, layer.lora_B, layer.scaling).T
    for dtype in (torch.float32, torch.bfloat16):
        W0 = layer.base.weight.detach().to(dtype)
        W, tasks = W0.clone(), torch.Generator().manual_seed(0)
        for task in range(1, 11):
            other = torch.randn(change.shape, generator=tasks) * change.std()  # as large as the one that you trained
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
    print("with W0 kept:   the same bits after ten rounds:", torch.equal(kept.weight, W0))

# %% [markdown]
# **Merging twice.** Somebody merges, somebody else merges again, and the change is in the weight twice: the knob at
# 2. That is why your layer knows whether it is merged.

# %%
layer = layers["transformer.h.0.attn.c_attn"]
once = layer.base.weight.detach().clone()
layer.merge()
first = layer.base.weight.detach().clone()
layer.merge()
print("your layer, merged twice, moves the second time by", (layer.base.weight - first).abs().max().item())
layer.unmerge()
print(f"if it were added twice everywhere: held-out loss {turned[2][0]:.2f} instead of {turned[1][0]:.2f}")

# %% [markdown]
# **The bias gets into the weight.** Whoever merges by computing `layer(identity)` to get at the weight gets the bias
# along with it, in every row: the output then has it not once but 1 + (the sum of x) times.

# %%
with torch.no_grad():
    inputs = layer.base.in_features
    by_identity = layer(torch.eye(inputs))  # (in, out): W0 + change, and the bias in every row
    x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0))
    error = (x @ by_identity + layer.base.bias - layer(x)).norm() / layer(x).norm()
    print(f"the output is off by {error:.0%}")

# %% [markdown]
# ## Summary
#
# - LoRA freezes W and learns a change of low rank, s B A; r (in + out) numbers instead of in x out.
# - A random, B zero: it begins as the base and gets a gradient. Both zero never learn; both random begin elsewhere.
# - alpha / r makes the first step worth the same for every rank, so the learning rate can stay when r changes.
# - Merged, it costs what the base costs, operation for operation. Keep W0; do not subtract.
# - Say where it stands: r = 4 on `c_attn` and r = 4 on q and on v have equal counts and are different models.
#
# ## Go further
#
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 4 (the method), table 1 (latency), table 3 (E2E), section 7.
# - Hayou et al. 2024, *The Impact of Initialization on LoRA Finetuning Dynamics* (arXiv:2406.08447): A or B at zero?
# - Hayou et al. 2024, *LoRA+* (arXiv:2402.12354): why B may learn faster than A.
# - Kalajdzievski 2023, *rsLoRA* (arXiv:2312.03732): alpha / sqrt(r), section 3.
# - `lora_from_scratch/methods/lora.py`: what you wrote, and the rest of the method around it.
#
# You chose rank 8, on every matrix, and it worked. Would rank 1 have done? And if you may have only so many numbers,
# do you put them into one matrix with a high rank or into all of them with a low one? That is the next unit.

# %% [markdown] open_question="merge_or_not" points=4
# ### Open question
#
# A company serves one language model to 300 customers, each with a LoRA of its own (r = 16 on every matrix). Requests
# of different customers arrive mixed. An engineer proposes to merge each customer's LoRA "since merged LoRA costs
# nothing". Write about ten lines: what would that mean for memory and for the batches, when is merging right, and
# what would you do here? Say also what has to be kept so that a merged model can become the base again.
#
# **Rubric.**
# - 1 point: a merged weight serves one customer; 300 merged models are 300 times the memory, or a swap at each
#   request.
# - 1 point: not merged, one base serves all, and rows of different customers can share a batch (the base's product
#   once).
# - 1 point: names the price of not merging (a few per cent more operations, small products) and a case where merging
#   wins.
# - 1 point: W0 (or the untouched checkpoint) has to be kept, since subtracting drifts, most of all in 16 bits.
