# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 16: Fewer numbers than rank one
#
# **By the end of this unit you can**
#
# - adapt a model with random matrices that are drawn from a seed, and say what VeRA, Tied-LoRA and NOLA train, save and
#   compute again;
# - count the numbers and the bytes of each, and say how they grow with the model;
# - write a sum of random matrices and its gradient without keeping the matrices;
# - find a fault in how a program draws its random numbers, mend it, and write the test that proves it.
#
# **Prerequisites**: LoRA's arithmetic (unit 09) and a training run with it (unit 10).
#
# **Time**: about 75 minutes, including one and a half minutes of computation. 6 exercises, 2 predictions, one open
# question.
#
# ![The number of trained numbers for one square weight against its width, from 64 to 12,288. LoRA of rank 1 doubles
# with the width, Tied-LoRA of rank 1 and VeRA of rank 256 grow half as fast in the end, and NOLA with 64 matrices is
# flat.](unit_16.png)

# %%
import inspect
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods import nola
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.nola import NOLA
from lora_from_scratch.methods.placement import find_targets, lora_parameter_count, target_sizes
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.tied_lora import TiedLoRA
from lora_from_scratch.methods.vera import VeRA
from lora_from_scratch.museum.reseeded_generator import faulty_random_combination
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (a minute and a half on two cores), "gpt2" (needs a network connection, about 15 minutes and 5 GB
# of memory), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 32))

# %% [markdown]
# ## The floor under LoRA
#
# LoRA cannot be made as small as you like. Rank 1 is the end, and rank 1 costs in + out numbers for each matrix:

# %%
model, tokenizer = load_gpt2(MODEL)
config = model.config
ALL = "all-linear"
sizes = target_sizes(model, ALL)
for targets in (ALL, ("mlp.c_proj",), ("h.0.attn.c_proj",)):
    found = target_sizes(model, targets)
    print(f"rank 1 on {targets!s:<22} matrices: {len(found):>2}, numbers: {lora_parameter_count(found, 1):>6,}")

# %% [markdown]
# For GPT-3 rank 1 on the q and v of 96 blocks is 4.7 million numbers. That is little for one task. It is not little if
# a million users have an adapter each.
#
# Where could numbers be saved? A and B together have in + out numbers for each unit of rank. The three methods of this
# unit do not train all of them:
#
# | | A and B | trained for each matrix |
# |---|---|---|
# | VeRA | random, frozen, the same for all matrices | two vectors |
# | Tied-LoRA | trained, the same for all matrices of a kind | two vectors |
# | NOLA | sums of random matrices | the coefficients of the sums |
#
# Two of them rest on one idea: *a random matrix costs nothing on disk*. A generator of random numbers is a
# deterministic program. Whoever has the seed, one integer, can compute the matrix again.
#
# ## VeRA: two vectors
#
# VeRA (Kopiczko et al. 2023, arXiv:2310.11454, eq. 2) freezes A and B as they were drawn and scales what passes through
# them:
#
# $$ y = W x + b + \mathrm{diag}(\lambda_b)\, B\, \mathrm{diag}(\lambda_d)\, A\, x $$
#
# - $A$ (r, in) and $B$ (out, r): random and frozen; one pair for all adapted matrices of the model;
# - $\lambda_d$ (r) and $\lambda_b$ (out): trained, for each matrix. $\lambda_b$ starts at 0, so that nothing changes;
#   $\lambda_d$ starts at 0.1.
#
# Start with the seed. PyTorch has one *global* generator, from which `torch.rand`, dropout and many others draw, and
# you can make generators of your own:

# %%
generator = torch.Generator().manual_seed(7)
print("a generator of its own:", torch.rand(3, generator=generator).tolist())
print("it goes on:            ", torch.rand(3, generator=generator).tolist())
print("seeded again:          ", torch.rand(3, generator=generator.manual_seed(7)).tolist())

# %% exercise="draw_projections"

# %% [markdown]
# The layers differ in size, so A and B are as large as the largest one needs.

# %%
draw = working("draw_projections")

most_inputs, most_outputs = max(i for i, _ in sizes), max(o for _, o in sizes)
A, B = draw(256, most_inputs, most_outputs, seed=0)
print(f"A {tuple(A.shape)} and B {tuple(B.shape)}: {A.numel() + B.numel():,} numbers, from the seed 0")
print(f"largest entry of A {A.abs().max():.4f}, of B {B.abs().max():.4f}")

# %% [markdown]
# Like LoRA, VeRA can be merged: the change of a weight is a matrix that can be added to it. No diagonal matrix has to
# be built for that.

# %% exercise="vera_delta_weight"

# %% [markdown]
# What rank does the change have? Try it on a matrix of the model, with random vectors in place of trained ones.

# %%
vera_change = working("vera_delta_weight")

inputs, outputs = sizes[0]
for r in (1, 16, 256):
    A, B = (matrix.double() for matrix in draw(r, most_inputs, most_outputs, seed=0))
    change = vera_change(A, B, torch.rand(r) + 0.1, torch.rand(outputs) + 0.1, inputs)
    numbers = r + outputs
    print(
        f"VeRA with r = {r:>3} on {inputs} x {outputs}: {numbers:>5,} trained numbers, "
        f"a change of rank {torch.linalg.matrix_rank(change)}; LoRA of that rank: {r * (inputs + outputs):>7,}"
    )

# %% [markdown]
# This is what VeRA buys: a high rank for the price of two vectors. What it gives up is the choice of the directions.
#
# ## Tied-LoRA: one A and B for many blocks
#
# Tied-LoRA (Renduchintala et al. 2023, arXiv:2311.09578, section 3) keeps the vectors and trains the shared matrices as
# well:
#
# $$ y = W x + b + s\, \mathrm{diag}(v)\, B\, \mathrm{diag}(u)\, A\, x $$
#
# - $A$ (r, in) and $B$ (out, r): trained, one pair for all matrices of a kind, in our library for all `c_attn`, for all
#   `c_fc`, and so on; $s = \alpha / r$;
# - $u$ (r) and $v$ (out): trained, for each matrix; both start at 1, and B at 0.

# %% exercise="tied_lora_parameter_count"

# %% [markdown]
# Compare your count with the tensors of an adapted model, and with the other two.

# %%
count_tied = working("tied_lora_parameter_count")

by_name = dict(zip(find_targets(model, ALL), sizes, strict=True))


def trained_numbers(method):
    """How many numbers this method trains on the model."""
    method.adapt(model)
    number = sum(p.numel() for p in method.trainable(model).values())
    method.undo(model)
    return number


print(f"counted: {count_tied(by_name, 1):,}, in the model: {trained_numbers(TiedLoRA(rank=1)):,}\n")
for name, number in {
    "LoRA, r = 1": lora_parameter_count(sizes, 1),
    "Tied-LoRA, r = 1": count_tied(by_name, 1),
    "VeRA, r = 256": sum(256 + o for _, o in sizes),
    "VeRA, r = 16": sum(16 + o for _, o in sizes),
}.items():
    print(f"{name:<17} {number:>7,} numbers, {4 * number:>7,} bytes in float32")

# %% [markdown]
# Both are below rank one, but not far. The vector on the outputs costs `out` numbers for each matrix, and that is half
# of what rank one costs on a square matrix.
#
# ## NOLA: only coefficients
#
# NOLA (Koohpayegani et al. 2023, arXiv:2310.02556, section 3) goes on to random matrices *in the place of single
# numbers*:
#
# $$ A = A_0 + \sum_{i=1}^k a_i U_i, \qquad B = \sum_{j=1}^k b_j V_j, \qquad y = W x + b + s\, B A x $$
#
# - $U_i$ (r, in) and $V_j$ (out, r): random, frozen, drawn from a seed of the layer; $A_0$ (r, in): drawn too;
# - $a$ (k) and $b$ (k): the trained coefficients, all 0 at the start; $s = \alpha / r$.
#
# A layer has 2 k numbers, *whatever its size and whatever the rank*.

# %% figure="unit_16.png"
widths = [64, 128, 256, 512, 768, 1024, 2048, 4096, 8192, 12288]
BLOCKS = 24
lines = {
    "LoRA, r = 1": [2 * d for d in widths],
    f"Tied-LoRA, r = 1, {BLOCKS} blocks": [2 * d / BLOCKS + 1 + d for d in widths],
    "VeRA, r = 256": [256 + d for d in widths],
    "NOLA, k = 64": [2 * 64 for _ in widths],
}
PLACES = {0: (9, (-8, 2), "right"), 1: (2, (4, -16), "left"), 2: (0, (0, 14), "left"), 3: (8, (0, 6), "right")}
figure, (axes,) = plotting.panels(1, width=6.8, height=3.8)
for style, (name, values) in enumerate(lines.items()):
    axes.plot(widths, values, linestyle=plotting.LINES[style], color=plotting.COLOURS[style], linewidth=1.8)
    place, offset, side = PLACES[style]
    axes.annotate(
        name,
        (widths[place], values[place]),
        xytext=offset,
        textcoords="offset points",
        ha=side,
        color=plotting.COLOURS[style],
        fontweight="bold",
    )
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks([64, 256, 1024, 4096, 12288], ["64", "256", "1,024", "4,096", "12,288"])
plotting.label(axes, x="width d of a square weight (d, d)", y="trained numbers", title="What one matrix costs")
show(
    figure,
    "The number of trained numbers for one square weight against its width, from 64 to 12,288. LoRA of rank 1 doubles "
    "with the width, Tied-LoRA of rank 1 and VeRA of rank 256 grow half as fast in the end, and NOLA with 64 matrices "
    "is flat.",
)

# %% [markdown]
# The price is paid in time: the $U_i$ and $V_j$ are not stored anywhere, on disk or in memory. Every forward pass draws
# them again, and so does every backward pass.
#
# ### From the museum
#
# This function computes the sum of random matrices. We wrote it for this course, with a fault that the code of a
# published method has. The sum is right.

# %%
print(inspect.getsource(faulty_random_combination))

# %% [markdown]
# Read it line by line. Which line does something that a caller would not expect? The gradient is not the point:
# PyTorch can follow every line. When you have found it, say what it does to a run.

# %% prediction="a_look_in_between"

# %% [markdown]
# Try it: four runs of eight steps on the bundled model, with this function and with the library's, each with and
# without a look at the validation loss in between. Everything is seeded at the start.

# %%
dataset = load_dataset("story-cards")


def shortest(examples, number):
    return sorted(examples, key=lambda example: len(example.mr) + len(example.ref))[:number]


writing = Completions(shortest(dataset.train, 800), tokenizer, config.n_positions)
held_out = Completions(shortest(dataset.validation, 96)[::4], tokenizer, config.n_positions).batches(12)


def training_losses(combination, look_after=None, steps=8):
    """The training losses of a run of NOLA with dropout in which the random matrices are combined by this function."""
    method = NOLA(basis=4, dropout=0.1)
    method.adapt(model)
    optimizer = torch.optim.AdamW(method.trainable(model).values(), lr=0.03)
    torch.manual_seed(0)
    losses = []
    with mock.patch.object(nola, "random_combination", combination):
        for step in range(steps):
            batch = writing.batch_at(step, 4, seed=0)
            loss = next_token_loss(model(batch.input_ids), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step + 1 == look_after:
                completion_loss(model, held_out[:1])  # in evaluation mode, without gradients
    method.undo(model)
    return losses


model.train()
runs = {
    (name, look): training_losses(combination, look)
    for name, combination in {"library": nola.random_combination, "museum": faulty_random_combination}.items()
    for look in (None, 4)
}
print("        library              museum")
print("step    plain    looked      plain    looked")
for step in range(8):
    plain, looked = ([f"{runs[name, look][step]:.4f}" for name in ("library", "museum")] for look in (None, 4))
    print(f"{step + 1:>4}   {plain[0]}   {looked[0]}     {plain[1]}   {looked[1]}")

# %% check="a_look_in_between"

# %% [markdown]
# (The two plain columns differ too, from the second step on: the seed is the same, and the masks are not. In the first
# step B is zero, so no mask matters.)
#
# So runs with this code cannot be repeated by anyone who validates more often. Nor can they be compared with another
# method "at the same seed": another k, another number of layers or one forward pass more, and all the dropout masks are
# others. `torch.manual_seed` seeds the generators of all GPUs as well. Where the order of the examples comes from the
# global generator, it changes too.
#
# The function is modelled on `gpt/src/model_nola.py` in the authors' repository (UCDvision/NOLA), which draws its
# matrices in this way in the forward and in the backward pass. The paper's results need not be wrong for that: a run
# with other masks is as good a run. But a seed promises that the run is the same one.
#
# Mend it.

# %% exercise="random_combination"

# %% [markdown]
# How would you have noticed? No result was wrong. A test has to ask for what the function leaves behind. Write it, so
# that the fault cannot come back. A good test fails for every faulty implementation and for no sound one, so do not
# test more than is promised: an implementation may draw other numbers than yours.

# %% exercise="test_random_combination"

# %%
prove = working("test_random_combination")
combine = working("random_combination")

for name, implementation in {"yours": combine, "the museum's": faulty_random_combination}.items():
    try:
        prove(implementation)
        print(f"{name}: passes")
    except AssertionError as error:
        print(f"{name}: fails {error}")

# %% [markdown]
# ### Backwards without the matrices
#
# If PyTorch records the sum, it keeps all k matrices for the backward pass: the gradient needs them. NOLA does not keep
# them. It draws them again, and so has to compute the gradient itself. With $G = \partial L / \partial B$, a matrix of
# the shape of B:
#
# $$ \frac{\partial L}{\partial b_j} = \sum_{o, r} G_{or}\, (V_j)_{or} $$
#
# An example with k = 2 matrices of shape (1, 2). Say that the seed gives $V_1 = (0.5, -0.2)$ and $V_2 = (0.1, 0.6)$.
# With $b = (2, 1)$ the sum is $B = (1.1, 0.2)$. If $G = (3, -1)$, the loss rises by 3 for each unit that the first
# entry of B rises. When $b_1$ rises by 1, B rises by $V_1$, and the loss by $3 \cdot 0.5 + (-1) \cdot (-0.2) = 1.7$.
# For $b_2$ it is $3 \cdot 0.1 - 1 \cdot 0.6 = -0.3$. So the gradient of $b$ is $(1.7, -0.3)$.

# %% exercise="coefficient_gradient"

# %% [markdown]
# Now both directions make a `torch.autograd.Function`, as in unit 13. What does it save for the backward pass?

# %%
backwards = working("coefficient_gradient")


class Combination(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients, shape, seed):
        ctx.k, ctx.seed = len(coefficients), seed
        return combine(coefficients, shape, seed)

    @staticmethod
    def backward(ctx, gradient):
        return backwards(gradient, ctx.k, ctx.seed), None, None


def kept(function, k=256, shape=(1024, 8)):
    """The gradient of the coefficients, and the bytes of all tensors that are kept for it."""
    bytes_kept = {}

    def keep(tensor):
        bytes_kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    coefficients = torch.ones(k, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(coefficients, shape, 0)
    result.sum().backward()
    return coefficients.grad, sum(bytes_kept.values())


recorded, memory = kept(faulty_random_combination)
own, own_memory = kept(Combination.apply)
print(f"recorded by PyTorch: {memory:>10,} bytes kept for one B (1024, 8) with k = 256")
print(f"drawn again:         {own_memory:>10,} bytes")
print(f"the two gradients differ by at most {(recorded - own).abs().max():.0e}")

# %% [markdown]
# ## How far do 200 numbers go?
#
# Now the three methods on the task of unit 10: write the opening of a tale from a story card; the measure is the loss on
# held-out cards, on the tale's tokens only. Each method has the learning rate that was best in runs of this length with
# seed 0, on a grid with factors of two: the rates differ by a factor of 20.

# %%
before = completion_loss(model, held_out)
print(f"held-out loss of the base: {before:.2f} nats per token")

METHODS = {  # by name: the method of a seed, and its learning rate
    "LoRA, r = 1": (lambda seed: LoRA(rank=1, alpha=8, seed=seed), 1e-2),
    "Tied-LoRA, r = 1": (lambda seed: TiedLoRA(rank=1, alpha=8, seed=seed), 1e-2),
    "VeRA, r = 16": (lambda seed: VeRA(rank=16, projection_seed=seed), 0.2),
    "VeRA, r = 256": (lambda seed: VeRA(rank=256, projection_seed=seed), 0.2),
    "NOLA, k = 64": (lambda seed: NOLA(basis=64, projection_seed=seed), 0.02),
    "NOLA, k = 16": (lambda seed: NOLA(basis=16, projection_seed=seed), 0.02),
    "NOLA, k = 4": (lambda seed: NOLA(basis=4, projection_seed=seed), 0.03),
    "NOLA, k = 1": (lambda seed: NOLA(basis=1, projection_seed=seed), 0.03),
    "LoRA, r = 1, one matrix": (lambda seed: LoRA(rank=1, alpha=8, targets=("h.5.mlp.c_proj",), seed=seed), 3e-2),
}
numbers = {name: trained_numbers(make(0)) for name, (make, _) in METHODS.items()}


def loss_after(method, rate, seed, keep_in=None):
    """The held-out loss after a run with this method. The model is the base again afterwards."""
    method.adapt(model)
    settings = TrainingSettings(
        steps=STEPS, learning_rate=rate, warmup_steps=defaults.warmup_steps_for(STEPS), seed=seed
    )
    Trainer(model, lambda step: writing.batch_at(step, 4, seed), settings, progress=False).run()
    loss = completion_loss(model, held_out)
    if keep_in is not None:
        method.save(model, keep_in)
    method.undo(model)
    return loss


# %% prediction="two_hundred"

# %%
folder = Path(tempfile.mkdtemp())
runs = [(name, 0) for name in METHODS] + [(name, 1) for name in ("LoRA, r = 1", "NOLA, k = 4")]
losses = {name: [] for name in METHODS}
for name, seed in tqdm(runs, desc="methods", unit="run"):
    make, rate = METHODS[name]
    losses[name].append(loss_after(make(seed), rate, seed, folder / name if seed == 0 else None))

print(f"{'':<24} numbers   held-out loss   share of LoRA's reduction   seeds")
means = {name: sum(seen) / len(seen) for name, seen in losses.items()}
for name, seen in losses.items():
    share = (before - means[name]) / (before - means["LoRA, r = 1"])
    print(
        f"{name:<24} {numbers[name]:>7,}   {means[name]:>13.2f}   {share:>25.0%}   {' '.join(f'{x:.2f}' for x in seen)}"
    )

# %% check="two_hundred"

# %%
figure, (axes,) = plotting.panels(1, width=7.4, height=4)
axes.set_xscale("log")
axes.axhline(before, color="0.5", linewidth=1)
axes.annotate(
    "the base",
    (0.99, before),
    xycoords=("axes fraction", "data"),
    xytext=(0, 3),
    textcoords="offset points",
    ha="right",
)
plotting.label(axes, x="trained numbers", y="held-out loss, nats per token", title=f"Few numbers, {STEPS} steps")
plotting.points(axes, {name: (numbers[name], means[name]) for name in METHODS})
show(
    figure,
    f"The held-out loss after {STEPS} steps against the number of trained numbers, on a logarithmic axis; the base has "
    f"{before:.2f}. " + ", ".join(f"{name}: {numbers[name]:,} numbers, {means[name]:.2f}" for name in METHODS) + ".",
)

# %% [markdown]
# What the figure shows, on the bundled model after 32 steps (another seed changes a loss by up to 0.2):
#
# - **The first numbers are worth the most.** NOLA's four points lie almost on a straight line, and the axis is
#   logarithmic: four times as many numbers lower the loss by another 0.3 to 0.5.
# - **200 numbers bring more than a quarter of what rank 1 brings**, 3,072 numbers almost three quarters. The paper's abstract
#   reports more: LLaMA-2 70B adapted with almost 20 times fewer numbers than LoRA of rank 1 needs, and as accurate. A
#   large model that nearly knows its task may need few directions (unit 10). This one is small, and its task is new.
# - **LoRA can be made small too**, by leaving out matrices. On one matrix it has 1,280 numbers and is behind NOLA with
#   768 numbers on all of them: few numbers everywhere do more than many in one place. Unit 10 found the same above rank
#   1.
# - **Random directions are good enough if there are many.** VeRA of rank 16 is as good as LoRA of rank 1 with little
#   more than half of its numbers, and VeRA of rank 256 is better, still with fewer numbers.
# - **Tied-LoRA trains its A and B and is behind both.** At rank 1 all matrices of a kind read one direction and write
#   one, apart from the scales. So freezing costs little here, and sharing a low rank costs much.
#
# ### Spend 200 numbers
#
# NOLA with k = 4 puts eight numbers on each of the 24 matrices. Is that the best way to spend them? You can put more of
# them on fewer matrices (a block has `attn.c_attn`, `attn.c_proj`, `mlp.c_fc` and `mlp.c_proj`; "h.5.mlp.c_proj" is a
# single matrix), and you can choose the rank, which costs no number. The plan below takes the two matrices of each
# block that write into the residual stream. Change `my_plan`, write down whether you expect to win, and run the cell.
# Two seeds each: only a plan that wins with both is better.


# %%
def my_plan(seed):
    """A method with at most 200 numbers, and its learning rate. Change this; keep `projection_seed=seed`."""
    return NOLA(rank=8, basis=8, targets=("c_proj",), projection_seed=seed), 0.05


def compare_with_eight_numbers_everywhere(plan):
    spent = trained_numbers(plan(0)[0])
    print(f"your plan trains {spent} numbers")
    if spent > 200:
        return "That is more than 200: lower k, or choose fewer matrices."
    usual = METHODS["NOLA, k = 4"][0]
    if plan(0)[0] == usual(0):
        return "That is k = 4 on every matrix itself: change `my_plan`."
    gains = []
    for seed in (0, 1):
        method, rate = plan(seed)
        loss = loss_after(method, rate, seed)
        print(f"seed {seed}: k = 4 on every matrix {losses['NOLA, k = 4'][seed]:.2f}, your plan {loss:.2f}")
        gains.append(losses["NOLA, k = 4"][seed] - loss)
    better, worse = min(gains) > 0, max(gains) < 0
    return "Your plan wins." if better else "Your plan loses." if worse else "Undecided: one seed each."


print(compare_with_eight_numbers_everywhere(my_plan))

# %% [markdown]
# There is a plan that beats k = 4 everywhere with both seeds. Two questions lead to it: which kind of matrix has the most
# inputs, and what does a layer's rank cost here? If your plan wins, find out whether it is the place or the rank: change
# one at a time.
#
# ## What a seed saves, and what it costs
#
# The adapters of the runs with seed 0 are on disk. A NOLA file should be tiny. Is it?

# %%
with_matrices = VeRA(rank=256, save_projection=True)
with_matrices.adapt(model)
with_matrices.save(model, folder / "VeRA, r = 256, with A and B")
with_matrices.undo(model)


def bytes_of(name):
    return (folder / name / "adapter_model.safetensors").stat().st_size


print(f"{'':<28} numbers   4 bytes each   the file")
for name in ("LoRA, r = 1", "VeRA, r = 256", "VeRA, r = 256, with A and B", "NOLA, k = 64", "NOLA, k = 4"):
    trained = numbers[name.removesuffix(", with A and B")]
    print(f"{name:<28} {trained:>7,}   {4 * trained:>12,}   {bytes_of(name):>8,}")

# %% [markdown]
# The seed saves what it promises: VeRA's matrices would be more than 20 times as large as what it learned. (PEFT saves
# them by default.) But at 200 numbers the numbers are no longer what the file holds. For each tensor, safetensors notes
# name, shape, dtype and place in a header, and 48 tensors of four numbers have 48 long names. An adapter this small
# wants a format of its own: one vector in a fixed order, and the seed. Then it is 772 bytes.
#
# And what does the seed cost? Every number of every U and V is drawn twice in a training step. That depends on the rank
# and on the model, not only on k:

# %%
each = sum(i + o for i, o in sizes)  # entries of all A and B for each unit of rank
for k in (4, 64, 256):
    print(
        f"NOLA, r = 8, k = {k:>3}: {2 * k:>3} numbers for each matrix, {2 * k * 8 * each:>11,} random numbers in each step"
    )

# %% [markdown]
# The next cell measures a step of each, in turns. The ratios differ between computers.


# %% volatile=true
def step_seconds(method):
    """Seconds for the forward and backward pass of one batch."""
    method.adapt(model)
    batch, start = writing.batch_at(0, 4, seed=0), time.perf_counter()
    next_token_loss(model(batch.input_ids), batch.labels).backward()
    seconds = time.perf_counter() - start
    method.undo(model)
    return seconds


names = ("LoRA, r = 1", "VeRA, r = 256", "NOLA, k = 4", "NOLA, k = 64")
contestants = {name: METHODS[name][0](0) for name in names} | {"NOLA, k = 256": NOLA(basis=256)}
rounds = [{name: step_seconds(method) for name, method in contestants.items()} for _ in range(4)]
least = {name: min(times[name] for times in rounds) for name in contestants}
for name, seconds in least.items():
    print(f"a step of {name:<14} takes {seconds / least['LoRA, r = 1']:.1f} times as long as LoRA's")

# %% [markdown]
# After training nothing of this is left, if you merge: the matrices are drawn once, and the model costs what it did.
# The cost comes back when adapters are exchanged in operation: a NOLA has to be drawn before it can be used.
#
# ## What goes wrong in practice
#
# **The seed is a part of the adapter.** The coefficients mean nothing without their matrices. Load the trained adapters
# with another seed. There is no error, and the result is worse than without an adapter.

# %%
for name, key in {"VeRA, r = 256": "projection_prng_key", "NOLA, k = 64": "projection_seed"}.items():
    found = []
    for seed in (0, 1):
        config_file = folder / name / "adapter_config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {key: seed}))
        method = load_adapter(model, folder / name)
        found.append(completion_loss(model, held_out))
        method.undo(model)
    print(
        f"{name:<14} held-out loss {found[0]:.2f} with its seed, {found[1]:.2f} with another one; the base {before:.2f}"
    )

# %% [markdown]
# The same happens when the seed is right and the numbers are not: on a GPU PyTorch's generator gives other numbers than
# on the CPU, and PyTorch does not promise the same numbers in every version. Draw on the CPU, in a dtype that is written
# down, and test that a known seed gives known numbers. If an adapter has to last for years, save the matrices.
#
# **One target more changes every matrix.** VeRA's A and B are as large as the largest adapted layer needs. Adapt the MLP
# as well, and the attention gets other matrices from the same seed.

# %%
for targets in (("c_attn", "attn.c_proj"), ALL):
    found = target_sizes(model, targets)
    A, B = draw(16, max(i for i, _ in found), max(o for _, o in found), seed=0)
    first = [f"{x:.4f}" for x in B[0, :3].tolist()]
    print(f"A {tuple(A.shape)!s:<11} within {A.abs().max():.3f}, B {tuple(B.shape)!s:<11} begins {', '.join(first)}")

# %% [markdown]
# **Nothing may be zero on both sides.** If A were only the sum of the U, all coefficients at 0 would make A and B zero,
# and then neither has a gradient. NOLA's $A_0$ prevents that. (So does Tied-LoRA's v = 1, as long as B is 0.)

# %%
x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
for name, A0 in {
    "with A0": torch.randn(2, 16, generator=torch.Generator().manual_seed(1)),
    "without": torch.zeros(2, 16),
}.items():
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    y = x @ (A0 + Combination.apply(a, (2, 16), 2)).T @ Combination.apply(b, (8, 2), 3).T
    (y - 1).square().mean().backward()
    print(f"{name:<8} gradient of a {a.grad.norm():.3f}, of b {b.grad.norm():.3f}")

# %% [markdown]
# **LoRA's learning rate.** Vectors that scale random matrices want larger steps than the matrices of LoRA. Whoever
# compares the methods at one rate measures the rate.

# %%
make, rate = METHODS["VeRA, r = 16"]
slow = loss_after(make(0), METHODS["LoRA, r = 1"][1], 0)
print(f"VeRA, r = 16: {slow:.2f} with LoRA's rate, {means['VeRA, r = 16']:.2f} with its own, {rate}")

# %% [markdown]
# ## Summary
#
# - Rank 1 is LoRA's floor: in + out numbers for each matrix. Below it, numbers are shared, frozen or drawn.
# - VeRA trains two vectors around frozen random matrices, Tied-LoRA trains the matrices too but shares them, NOLA trains
#   coefficients of random matrices: 2 k for each layer, whatever its size.
# - Here, each step down in loss takes four times as many numbers: 192 numbers reach more than a quarter of what rank 1
#   reaches. VeRA reaches all of it: a high rank with random directions replaces a low rank with trained ones.
# - A seed replaces any amount of random numbers on disk, and is paid for in time, twice in each training step. The file
#   of a tiny adapter is mostly names.
# - Draw from a generator of your own. What seeds the global generator changes everything else that is random.
#
# ## Go further
#
# - Kopiczko et al. 2023, *VeRA* (arXiv:2310.11454); Renduchintala et al. 2023, *Tied-LoRA* (arXiv:2311.09578);
#   Koohpayegani et al. 2023, *NOLA* (arXiv:2310.02556).
# - Li et al. 2018, *Measuring the Intrinsic Dimension of Objective Landscapes* (arXiv:1804.08838): training in a random
#   subspace of the whole network, the idea behind NOLA.
# - Aghajanyan et al. 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning*
#   (arXiv:2012.13255): how many numbers a task needs, and why fewer in larger models.
# - `lora_from_scratch/methods/vera.py`, `tied_lora.py` and `nola.py`: what you wrote, and the code around it.

# %% [markdown] open_question="a_million_adapters" points=4
# ### Open question
#
# A company adapts one model of 7 billion parameters for each of a million users, today with LoRA of rank 1: 10 MB each.
# A colleague proposes NOLA with k = 64, 115 kB of numbers: "nearly a hundred times smaller, and the paper says that
# it is as accurate". Write at most 150 words: what has to be measured before you agree, what the proposal costs while
# serving, and what you would have to promise to be able to load the adapters in five years.
#
# **Rubric.**
#
# - 1 point: the quality has to be measured on the company's own task, each method with its own learning rate, and
#   several seeds or users; a paper's result on another model and task does not carry over.
# - 1 point: names the cost while serving: the matrices have to be drawn (or kept in memory) for each user's adapter
#   before or during use, and the comparison has to include that time.
# - 1 point: the seed, the generator, its device, dtype and order are a part of the format; a test with known numbers,
#   or the matrices are saved once for all users.
# - 1 point: considers alternatives at the same size, such as fewer adapted matrices, fewer bits for each number, a
#   format without names, or sharing the random matrices among users.

# %% volatile=true
progress("16")
