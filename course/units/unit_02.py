# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 02: The singular value decomposition
#
# **By the end of this unit you can**
#
# - decompose any matrix into directions, sorted by how much each matters, with code that you wrote yourself;
# - find the nearest matrix of rank $r$, and know its error before you compute it;
# - compare how many directions a trained weight needs, how many noise needs, and how many the *update* made by
#   fine-tuning needs.
#
# **Prerequisites**: unit 01 (or its idea: a matrix of rank $r$ is a sum of $r$ outer products), matrix products and
# norms.
#
# **Time**: about 90 minutes. 7 exercises, 2 predictions, one open question.
#
# ![Left, a drawn picture in grey: hills with a striped field, a tower, a pointed roof and a sun. Right, the same
# picture rebuilt from only 8 directions: large shapes and straight edges are there, slanted edges are smeared. How many
# directions does a weight of a language model need, and how many its fine-tuning?](unit_02.png)

# %%
import os

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.story_cards import story_cards
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.linear_algebra.rank import low_rank_parameter_count
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm


def doubles(*results):
    """Results of your functions, whatever they are made of, as float64 tensors."""
    return [torch.as_tensor(result, dtype=torch.float64) for result in results]


# %% [markdown]
# ## What a matrix does
#
# In unit 01 the rank was a whole number. Add a little noise to a matrix of rank 2 and that number jumps to full rank,
# although nothing that matters has changed. So ask a better question: not *how many* directions there are, but **how
# much each of them contributes**.
#
# Look at what a matrix does to a circle.


# %%
def draw_circle(M):
    turn = torch.linspace(0, 2 * torch.pi, 200)
    circle = torch.stack([turn.cos(), turn.sin()])  # (2, 200): one point per column
    U, S, Vh = torch.linalg.svd(M)
    figure, (before, after) = plotting.panels(2, width=4.4, height=3.2)
    for axes, curve, arrows, names in (
        (before, circle, Vh, ("$v_1$", "$v_2$")),
        (after, M @ circle, (U * S).T, (r"$\sigma_1 u_1$", r"$\sigma_2 u_2$")),
    ):
        axes.plot(*curve, color="0.4", linewidth=1.5)
        for arrow, name, colour in zip(arrows.tolist(), names, plotting.COLOURS, strict=False):
            axes.annotate("", arrow, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
            away = (0.25 * torch.tensor(arrow) / torch.tensor(arrow).norm() + torch.tensor(arrow)).tolist()
            axes.text(*away, name, color=colour, fontsize=13, ha="center", va="center")
        axes.set(xlim=(-2.7, 2.7), ylim=(-1.5, 1.5), aspect="equal")
    plotting.label(before, x="first input", y="second input", title="Inputs x of length 1")
    plotting.label(after, x="first output", y="second output", title="Outputs M x")
    return figure


show(
    draw_circle(torch.tensor([[-1.7, 0.9], [-0.4, -0.9]])),
    alt="Left, a circle of inputs with two arrows at right angles, v1 and v2. Right, the ellipse of outputs: the "
    "matrix has turned v1 into its longest half-axis, sigma1 u1, and v2 into its shortest, sigma2 u2, again at "
    "right angles.",
)

# %% [markdown]
# A circle becomes an ellipse, and two directions at right angles become its half-axes, which are *again at right
# angles*. This holds for every matrix $M$ of shape $(m, n)$ (Golub and Van Loan, section 2.4):
#
# $$M = \sum_{k=1}^{\min(m, n)} \sigma_k\, u_k v_k^\top = U\, \mathrm{diag}(S)\, V^\top,
# \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0.$$
#
# - $v_k$, of length $n$: the *right singular vectors*, directions of the input, at right angles to one another. They
#   are the rows of `Vh`, which is $V^\top$.
# - $u_k$, of length $m$: the *left singular vectors*, directions of the output, also at right angles to one another.
#   They are the columns of `U`.
# - $\sigma_k$, a number: the *singular value*, by which $M$ stretches $v_k$: $M v_k = \sigma_k u_k$. All of them
#   together are `S`.
#
# This is a sum of outer products, as in unit 01, but a sorted one. How do you find it?

# %% [markdown]
# ## Multiply, again and again
#
# Take $G = M^\top M$, of shape $(n, n)$. It is symmetric, and $G v_k = \sigma_k^2 v_k$: the $v_k$ are its
# *eigenvectors*, with the *eigenvalues* $\lambda_k = \sigma_k^2$. Write any vector $x$ as a combination of them. Every
# multiplication by $G$ stretches the part along $v_1$ most. So what happens to $x$?

# %%
G = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])  # eigenvalues 3 and 1; the eigenvector of 3 is (0.7071, -0.7071)
for times in (0, 1, 2, 4, 8):
    x = torch.linalg.matrix_power(G, times) @ torch.tensor([1.0, 0.0])
    unit = x / x.norm()
    print(f"G x, {times} times: ({x[0]:5.0f}, {x[1]:5.0f}), of length 1: ({unit[0]:.4f}, {unit[1]:7.4f})")

# %% [markdown]
# It turns towards $v_1$, and here it grows without bound, since $\lambda_1 > 1$. So divide it by its length at every step, and stop when it no longer
# moves. How many steps does that take? Relative to the part along $v_1$, the part along $v_2$ shrinks by the factor
# $\lambda_2 / \lambda_1$ at each step:

# %%
for ratio in (0.5, 0.9, 0.99, 0.998):
    steps = torch.log(torch.tensor(1e-12)) / torch.log(torch.tensor(ratio))
    print(f"lambda2 / lambda1 = {ratio:<5}: about {steps:>6,.0f} steps until it has shrunk to 1e-12")

# %% [markdown]
# Write this as a function. A loop that multiplies and divides is enough; the docstring has a trick that also makes it
# fast. Where several answers are right (either sign, any vector of a repeated eigenvalue), the check accepts any of
# them.
#
# These helpers are provided: `require_matrix` checks the input and converts its dtype, `_unit(x)` is x divided by its
# norm, `_first(size, like)` is the first basis vector with the dtype of `like`, `_sign_of_largest(x)` is the sign of
# the entry with the largest absolute value.

# %% exercise="dominant_eigenvector"

# %% [markdown]
# Once you have $v_1$, the other two follow: $M v_1$ is $\sigma_1 u_1$, and $u_1$ has length 1.

# %% exercise="dominant_singular_triplet"

# %% [markdown]
# Compare it with the library's decomposition, on a random matrix:

# %%
triplet = working("dominant_singular_triplet")
M = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
u, sigma, v = doubles(*triplet(M))
print(f"sigma: {sigma:.6f}, torch has {torch.linalg.svdvals(M)[0]:.6f}")
print(f"M v - sigma u: {(M @ v - sigma * u).norm():.1e},  M^T u - sigma v: {(M.T @ u - sigma * v).norm():.1e}")

# %% [markdown]
# ## Subtract it and start again
#
# Subtract $\sigma_1 u_1 v_1^\top$ from $M$. What is left has $\sigma_2$ as its largest singular value. This is
# *deflation*. It ends when only rounding error is left. What counts as rounding error? That is the tolerance of unit 01
# again.
#
# An example: $M = \begin{pmatrix} 2 & 1 \\ 1 & 2 \end{pmatrix}$ has $\sigma_1 = 3$ with $u_1 = v_1 = (1, 1) / \sqrt 2$.
# Subtract $3\, u_1 v_1^\top = \begin{pmatrix} 1.5 & 1.5 \\ 1.5 & 1.5 \end{pmatrix}$. What is left,
# $\begin{pmatrix} 0.5 & -0.5 \\ -0.5 & 0.5 \end{pmatrix}$, has $\sigma_2 = 1$ with $u_2 = v_2 = (1, -1) / \sqrt 2$.
# After the second subtraction nothing is left.

# %% exercise="svd_by_deflation"

# %% [markdown]
# A hard test is the Hilbert matrix of unit 01, whose singular values fall faster and faster: of the 12 x 12 matrix, the
# second is a fifth of the first, and the last less than a hundredth of the one before. Compare your decomposition with
# torch's:

# %%
deflation = working("svd_by_deflation")
i = torch.arange(12, dtype=torch.float64)
hilbert = 1 / (i[:, None] + i + 1)
U, S, Vh = doubles(*deflation(hilbert))
print("yours: ", " ".join(f"{value:.1e}" for value in S))
print("torch: ", " ".join(f"{value:.1e}" for value in torch.linalg.svdvals(hilbert)))
print(f"{len(S)} above rounding error. U^T U - I: {(U.T @ U - torch.eye(len(S), dtype=U.dtype)).abs().max():.1e}")

# %% [markdown]
# You have written a singular value decomposition. From here on the unit uses `torch.linalg.svd`, only because it is
# faster.

# %% [markdown]
# ## The nearest matrix of low rank
#
# Stop the sum after $r$ terms:
#
# $$M_r = \sum_{k=1}^{r} \sigma_k\, u_k v_k^\top, \qquad
# \lVert M - M_r \rVert_F = \sqrt{\sigma_{r+1}^2 + \sigma_{r+2}^2 + \dots}, \qquad
# \lVert M - M_r \rVert_2 = \sigma_{r+1}.$$
#
# $\lVert\cdot\rVert_F$, the *Frobenius* norm, is the root of the sum of all squared entries; $\lVert\cdot\rVert_2$, the
# *spectral* norm, is the largest factor by which a matrix stretches a vector. **No other matrix of rank $r$ is nearer,
# in either norm** (Eckart and Young 1936; Mirsky 1960). To find the best approximation, all you have to do is take a
# slice.

# %% exercise="truncate"

# %% [markdown]
# To see what that does, use a matrix that you can look at: a picture, drawn with a few formulas.


# %%
def paint(height=96, width=128):
    y, x = torch.meshgrid(torch.linspace(1, 0, height), torch.linspace(0, 1.33, width), indexing="ij")
    sky = 0.55 + 0.4 * y
    sun = ((x - 1.05) ** 2 + (y - 0.78) ** 2) < 0.012
    hills = y < 0.36 + 0.10 * torch.sin(5 * x) + 0.05 * torch.sin(13 * x + 1)
    field = 0.35 + 0.1 * torch.sin(60 * (x + 2 * y))
    tower = ((x - 0.42).abs() < 0.09) & (y > 0.25) & (y < 0.68 + 0.04 * torch.sign(torch.sin(105 * x)))
    window = ((x - 0.42).abs() < 0.025) & ((y - 0.55).abs() < 0.05)
    roof = (y < 0.80 - 1.3 * (x - 0.66).abs()) & (y > 0.33) & ((x - 0.66).abs() < 0.16)
    picture = torch.where(hills, field, sky)
    for shape, grey in ((sun, 1.0), (roof, 0.05), (tower, 0.15), (window, 0.9)):
        picture = torch.where(shape, torch.tensor(grey), picture)
    return picture.double()


picture = paint()
cut = working("truncate")


# %% figure="unit_02.png"
def draw_picture(rank):
    figure, axes = plotting.panels(2, width=4.4, height=3.7)
    stored = low_rank_parameter_count(*picture.shape, rank)
    for place, shown, title in (
        (axes[0], picture, f"The matrix: {picture.numel():,} numbers"),
        (axes[1], cut(picture, rank), f"Rank {rank}: {stored:,} numbers"),
    ):
        place.imshow(shown, cmap="gray", vmin=0, vmax=1)
        plotting.label(place, x=f"{picture.shape[1]} columns", y=f"{picture.shape[0]} rows", title=title)
        place.set(xticks=[], yticks=[])
    return figure


slider(
    draw_picture,
    "rank",
    (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 96),
    start=8,
    alt="Left, a drawn picture in grey: hills with a striped field, a tower, a pointed roof and a sun. Right, the "
    "same as a matrix of rank 8: large shapes and straight edges are there, slanted edges are smeared into "
    "horizontal and vertical streaks.",
)

# %% [markdown]
# Move the slider. Shapes that run along rows and columns (tower, sky) appear at once; slanted or round ones
# (roof, sun, stripes) take many terms. A matrix that looks simple need not have low rank.
#
# To know the error you do not need the truncated matrix: the singular values are enough.

# %% exercise="approximation_error"

# %%
predicted = working("approximation_error")
for rank in (1, 8, 32):
    left = picture - torch.as_tensor(cut(picture, rank))
    print(
        f"rank {rank:>2}: Frobenius {predicted(picture, rank):.4f} (measured {left.norm():.4f}), "
        f"spectral {predicted(picture, rank, 'spectral'):.4f} (measured {torch.linalg.matrix_norm(left, 2):.4f})"
    )

# %% [markdown]
# ## How much is enough?
#
# The squares of the singular values add up to the squared Frobenius norm, $\sigma_1^2 + \sigma_2^2 + \dots =
# \lVert M \rVert_F^2$. Call that the *energy* of $M$. Then you can ask for the smallest rank that keeps, say, 90 %
# of it.

# %% exercise="rank_for_energy"

# %%
needed = working("rank_for_energy")
for share in (0.9, 0.99, 0.999):
    print(f"the picture, {share:.1%} of its energy: rank {needed(picture, share)} of {min(picture.shape)}")

# %% [markdown]
# A single direction holds 90 %, and you have seen what the picture looks like at rank 1 or 2: a grey smear. Keep that
# in mind when somebody says "90 % of the energy". Before you measure a weight, find out what such a number means.

# %% prediction="noise_energy"

# %%
noise = torch.randn(256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
S = torch.linalg.svdvals(noise)
print(f"the largest singular value {S[0]:.1f}, the middle one {S[127]:.1f}, the smallest {S[-1]:.2f}")
print(f"the first 128 of 256 directions hold {(S[:128] ** 2).sum() / (S**2).sum():.1%} of the energy")

# %% check="noise_energy"

# %% [markdown]
# ## The weights of a trained model
#
# So always compare with noise. Load the bundled GPT-2 and look at a weight of its third block, `mlp.c_fc`, which maps
# 256 numbers to 1,024, beside noise of the same shape and the same norm.

# %%
model, tokenizer = load_gpt2("bundled")
W = model.get_parameter("transformer.h.2.mlp.c_fc.weight").detach()
R = torch.randn(W.shape, generator=torch.Generator().manual_seed(2))
R *= W.norm() / R.norm()
print(f"shape {tuple(W.shape)}; rank for 90 %: weight {needed(W, 0.9)}, noise {needed(R, 0.9)} of {min(W.shape)}")

tails = {}
for name, matrix in (("weight", W), ("noise", R)):
    energy = torch.linalg.svdvals(matrix).double() ** 2
    tails[name] = (1 - energy.cumsum(0) / energy.sum()).clamp(min=0).sqrt()  # relative error at rank 1, 2, ...


# %%
def draw_weight(rank):
    figure, (left, middle, right) = plotting.panels(3, width=3.6, height=3.5)
    limit = float(3 * W.std())
    for axes, shown, title in ((left, W, "A corner of the weight"), (middle, cut(W, rank), f"The same at rank {rank}")):
        axes.imshow(shown[:64, :64], cmap="gray", vmin=-limit, vmax=limit)
        plotting.label(axes, x="64 outputs", y="64 inputs", title=title)
        axes.set(xticks=[], yticks=[])
    for (name, tail), line, colour, side in zip(tails.items(), ("-", "--"), plotting.COLOURS, (-1, 1), strict=False):
        right.plot(range(1, len(tail) + 1), tail, line, color=colour)
        right.plot(rank, tail[rank - 1], "o", color=colour)
        place = (110, float(tail[109]))
        right.annotate(
            name,
            place,
            xytext=(14 * side, 10 * side),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            ha="left" if side > 0 else "right",
            va="center",
        )
    plotting.label(right, x="rank", y="relative error", title="Error of the nearest matrix")
    right.set_ylim(0, 1)
    return figure


slider(
    draw_weight,
    "rank",
    (1, 4, 8, 16, 32, 64, 96, 128, 192, 256),
    start=32,
    alt="Left, a corner of a weight of GPT-2 as grey squares: it looks like noise. Middle, at low rank: paler. Right, "
    "relative error against rank for the weight and for noise of the same shape: two curves that fall slowly from "
    "1 to 0 at rank 256, that of the weight a little below that of noise.",
)

# %% [markdown]
# No picture appears here. A trained weight is **not** a matrix of low rank: it is only a little nearer to one than
# noise is. How much nearer differs from matrix to matrix, so look at all of them: `c_attn` (queries, keys and values),
# `attn.c_proj`, `mlp.c_fc` and `mlp.c_proj` in each of the six blocks. The smaller side is 256 everywhere.

# %%
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NAMES = [f"transformer.h.{layer}.{kind}.weight" for layer in range(model.config.n_layer) for kind in KINDS]
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
generator = torch.Generator().manual_seed(3)
noises = {name: torch.randn(before[name].shape, generator=generator) for name in NAMES}


def ranks_by_kind(matrices, share=0.9):
    """The ranks of the six matrices of each kind, sorted."""
    ranks = {name: needed(matrices[name], share) for name in NAMES}
    return {kind: sorted(ranks[name] for name in NAMES if kind in name) for kind in KINDS}


def print_ranks(ranks):
    print("rank for 90 % of the energy, of 256: lowest to highest of the six blocks")
    for kind in KINDS:
        print(f"{kind:12}" + "".join(f"   {name} {of[kind][0]:>3} to {of[kind][-1]:>3}" for name, of in ranks.items()))


ranks = {"weight": ranks_by_kind(before), "noise": ranks_by_kind(noises)}
print_ranks(ranks)

# %% [markdown]
# How far a weight lies below noise also depends on how it was trained. The matrices of this model were trained with
# Muon, whose updates have nearly equal singular values, which leads to flatter spectra than Adam (Liu et al. 2025,
# arXiv:2502.16982, compare the two). Whatever the optimiser, make it a habit to compare with noise.

# %% [markdown]
# ## The same for data: principal components
#
# Singular vectors also tell in which directions *data* vary. Let the rows of $X$, of shape $(N, d)$, be $N$ samples
# with their mean subtracted. Their covariance matrix is $X^\top X / (N - 1)$, of shape $(d, d)$; its eigenvectors are
# the $v_k$ of $X$, and the variance along $v_k$ is $\sigma_k^2 / (N - 1)$. That is *principal component analysis*.

# %% exercise="pca"

# %% [markdown]
# Apply it to something that cannot be seen directly: the 256 numbers by which the model represents each word at its
# input. Keep two directions of the 256, chosen by variance alone; the method is told nothing about the words.

# %%
words = "king queen prince princess woman boy girl dog cat fox two three four seven red green white black golden "
words += "said cried asked answered went came ran"
tokens = {word: tokenizer.encode(f" {word}") for word in words.split()}
tokens = {word: ids[0] for word, ids in tokens.items() if len(ids) == 1}  # words that are one token each
embeddings = model.transformer.wte.weight.detach()[list(tokens.values())].double()  # (N, 256)

mean, directions, variances = doubles(*working("pca")(embeddings, 2))
coordinates = (embeddings - mean) @ directions.T  # (N, 2)
share = variances.sum() / (embeddings - mean).square().sum() * (len(embeddings) - 1)
print(f"two of {embeddings.shape[1]} directions hold {share:.0%} of the variance of these {len(embeddings)} words")

figure, (axes,) = plotting.panels(1, width=6.4, height=4.6)
plotting.label(axes, x="first principal component", y="second principal component", title="Words of the bundled GPT-2")
plotting.points(axes, dict(zip(tokens, coordinates.tolist(), strict=True)))
show(
    figure,
    alt="A map of words by the first two principal components of their embeddings. Words of a kind lie near one "
    "another: people and animals, verbs of saying and going, numbers and colours.",
)

# %% [markdown]
# Kings are near foxes, numbers near colours, saying near going: the strongest directions reflect *grammar*, that is,
# which words can stand in the same place.

# %% [markdown]
# ## What fine-tuning changes
#
# Now the question on which this whole course rests. Fine-tuning turns a weight $W_0$ into $W_0 + \Delta W$. You saw
# that $W_0$ itself does not have low rank. What about $\Delta W$?

# %% prediction="lowest_rank"

# %% [markdown]
# Fine-tune all parameters of the model for about a minute: it learns to turn a *story card* into the opening of a tale.
# Nothing in this training asks for a low rank.

# %%
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 60))
cards = story_cards(train=480, validation=24, test=8)
print(cards.train[0].mr, "\n  ->", cards.train[0].ref)

completions = Completions(cards.train, tokenizer, model.config.n_positions)
one_text_each = list({example.mr: example for example in cards.validation}.values())
held_out = Completions(one_text_each, tokenizer, model.config.n_positions).batches(8)
loss_before = completion_loss(model, held_out)

FullFineTuning(keep_base=False).adapt(model)
settings = TrainingSettings(steps=STEPS, learning_rate=5e-4, warmup_steps=4)
bar = tqdm(total=STEPS, desc="fine-tuning", unit="step")


def batch_at(step):
    bar.update()
    return completions.batch_at(step, batch_size=8, seed=0)


Trainer(model, batch_at, settings, progress=False).run()
bar.close()

after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
updates = {name: after[name] - before[name] for name in NAMES}
loss_after = completion_loss(model, held_out)
print(f"loss on cards not used in training, nats per token: {loss_before:.2f} before, {loss_after:.2f} after")

# %%
ranks["update"] = ranks_by_kind(updates)
print_ranks(ranks)
strict = [int(torch.linalg.matrix_rank(update)) for update in updates.values()]
print(f"rank of the updates in the sense of unit 01: {min(strict)} to {max(strict)}")

# %% check="lowest_rank"

# %% [markdown]
# The rank in the strict sense says nothing here; the energy does. But energy only describes the matrix. What matters is
# the *loss*. So truncate every update to rank $r$, put the model together again with $W_0 + (\Delta W)_r$, and measure.
# For comparison, truncate the fine-tuned weight $W_0 + \Delta W$ to rank $r$ instead. Embeddings, biases and norms stay
# as fine-tuning left them in both cases.

# %%
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def loss_with(weights):
    """The loss on the held-out cards with these matrices in the blocks."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    return completion_loss(model, held_out)


def factors(matrix):
    """The decomposition with the singular values multiplied into U, so that a slice truncates it to any rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left * values, right


split_updates = {name: factors(update) for name, update in updates.items()}
split_weights = {name: factors(after[name]) for name in NAMES}
loss_of_update, loss_of_weight = [], []
for r in tqdm(RANKS, desc="cutting", unit="rank"):
    loss_of_update.append(
        loss_with({name: before[name] + left[:, :r] @ right[:r] for name, (left, right) in split_updates.items()})
    )
    loss_of_weight.append(loss_with({name: left[:, :r] @ right[:r] for name, (left, right) in split_weights.items()}))
print("rank r:         " + " ".join(f"{r:>5}" for r in RANKS))
print("update cut to r:" + " ".join(f"{loss:>5.2f}" for loss in loss_of_update))
print("weight cut to r:" + " ".join(f"{loss:>5.2f}" for loss in loss_of_weight))
gain = loss_of_update[0] - loss_of_update[-1]
kept = {r: (loss_of_update[0] - loss) / gain for r, loss in zip(RANKS, loss_of_update, strict=True)}
print("share of the matrices' gain: " + ", ".join(f"rank {r} {kept[r]:.0%}" for r in (1, 4, 16, 64)))


# %%
def mean_energy(matrices):
    """The share of the energy in the first 1, 2, ... 256 directions, mean over the matrices of all blocks."""
    shares = []
    for name in NAMES:
        energy = torch.linalg.svdvals(matrices[name]).double() ** 2
        shares.append(energy.cumsum(0) / energy.sum())
    return torch.stack(shares).mean(dim=0)  # (256,)


# %%
figure, (left, right) = plotting.panels(2, width=5.0, height=3.9)
labels = {"update of fine-tuning": (60, 1.03, "left"), "weight": (62, 0.66, "right"), "noise": (104, 0.62, "left")}
for style, (name, matrices) in enumerate(zip(labels, (updates, before, noises), strict=True)):
    colour, line = plotting.COLOURS[style], plotting.LINES[style]
    left.plot(range(1, 257), mean_energy(matrices), linestyle=line, color=colour, linewidth=1.8)
    x, y, side = labels[name]
    left.text(x, y, name, color=colour, fontweight="bold", ha=side, va="center")
plotting.label(left, x="directions kept, of 256", y="share of the energy", title="The update lies in few directions")
left.set(xlim=(0, 260), ylim=(0, 1.1), xticks=(1, 64, 128, 192, 256))

places = range(len(RANKS))  # one step to the right: twice the rank
for style, losses in enumerate((loss_of_update, loss_of_weight)):
    colour, line = plotting.COLOURS[style], plotting.LINES[style]
    right.plot(places, losses, marker="o", markersize=4, linestyle=line, color=colour, linewidth=1.8)
top = 2 * loss_before  # the weight's curve comes from far above
right.text(1.2, loss_of_update[1] + 0.35, "update cut to rank r", color=plotting.COLOURS[0], fontweight="bold")
right.text(4.8, 0.93 * top, "weight cut to rank r", color=plotting.COLOURS[1], fontweight="bold", ha="right")
right.axhline(loss_before, color="0.5", linewidth=1, linestyle=":")
right.text(0, loss_before + 0.1, "whole model before fine-tuning", color="0.3")
plotting.label(
    right, x="rank r", y="loss on story cards (nats per token)", title="A few carry most of what was learned"
)
right.set_xticks(places, [str(r) for r in RANKS])
right.set_ylim(0, top)
show(
    figure,
    alt=(
        "Left, share of the energy against the number of directions, mean over all matrices of the blocks: the update "
        "of fine-tuning rises far faster than the weight, which lies between it and noise, nearer to noise. Right, "
        "loss on story cards against rank: the first few directions of the update bring most of what was learned; the "
        "weight truncated to the same rank is far worse than the model before fine-tuning unless about half of the "
        "directions are kept."
    ),
)

# %% [markdown]
# Interpret this with care.
#
# - *An update can be truncated* after training: that is what you measured. It does not follow that training which is
#   *restricted* to rank $r$ finds an equally good update. That is the hypothesis of LoRA (Hu et al. 2021, section 4.1),
#   and units 09 and 10 test it.
# - The loss falls with every doubling of $r$, but less and less. There is no single rank at which "all" of the update
#   is included.
# - At $r = 0$ the loss is already below that before fine-tuning, because embeddings, biases and norms keep what they
#   have learned.
# - This is one model, one task and one short training run with AdamW. Another optimiser makes different updates.

# %% [markdown]
# ## What goes wrong in practice
#
# **`Vh` is not `V`.** With a square matrix, mixing them up raises no error:

# %%
square = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
left, values, rows = torch.linalg.svd(square)
print(f"U diag(S) Vh:   off by {(left * values @ rows - square).norm():.1e}")
print(f"U diag(S) Vh^T: off by {(left * values @ rows.T - square).norm():.1e}, and no error")

# %% [markdown]
# **Signs are arbitrary.** Compare products, never vectors. (The signs may differ between two checkpoints, two
# libraries, or two versions of one library.)

# %%
flipped_left, flipped_rows = -left, -rows  # just as right
print(f"the vectors differ by {(flipped_left - left).abs().max():.2f}")
print(f"their products by {(flipped_left * values @ flipped_rows - left * values @ rows).abs().max():.0e}")

# %% [markdown]
# **$M^\top M$ squares the singular values, and loses the small ones.** A value that is 1e-10 of the largest becomes
# 1e-20 of it, which float64 cannot represent beside 1. For the largest value (your power iteration) that does no harm.
# For the others it does:

# %%
generator = torch.Generator().manual_seed(5)
Q1, Q2 = torch.linalg.qr(torch.randn(2, 5, 3, dtype=torch.float64, generator=generator))[0]
M = Q1 * torch.tensor([1.0, 1e-5, 1e-10], dtype=torch.float64) @ Q2.T
gram = torch.linalg.eigvalsh(M.T @ M).flip(0)[:3].abs().sqrt()
print("true:          1.0e+00 1.0e-05 1.0e-10")
print("roots of M^T M:", " ".join(f"{value:.1e}" for value in gram))
print("by deflation:  ", " ".join(f"{value:.1e}" for value in doubles(deflation(M)[1])[0]))

# %% [markdown]
# **PCA without subtracting the mean** finds the mean as its first direction:

# %%
first = torch.linalg.svd(embeddings + 1)[2][0]  # the same words, moved by 1 in every direction
direction = (embeddings + 1).mean(dim=0)
print(f"cosine of the first direction and the mean: {abs(float(first @ direction / direction.norm())):.4f}")

# %% [markdown]
# **A lower rank need not save much.** Two factors of rank $r$ hold $r (m + n)$ numbers. That is less than $m n$ only
# for $r < m n / (m + n)$. Here the saving is 10 %:

# %%
r = needed(W, 0.9)
print(f"the weight: {W.numel():,} numbers. 90 % of its energy, as factors of rank {r}: ", end="")
print(f"{low_rank_parameter_count(*W.shape, r):,}")

# %% [markdown]
# ## Summary
#
# 1. Every matrix is a sorted sum of outer products at right angles: $M = \sum_k \sigma_k u_k v_k^\top$.
# 2. Power iteration finds the first term, deflation the others; squaring, tiny values and repeated values are where
#    they go wrong.
# 3. The first $r$ terms are the nearest matrix of rank $r$; its error follows from the singular values left out.
# 4. A share of the energy is meaningful only in comparison with noise. By that measure a trained weight does not have
#    low rank.
# 5. The update of fine-tuning lies in far fewer directions than the weight, and a few of them carry most of what was
#    learned.
#
# ## Go further
#
# - Eckart and Young 1936, *The approximation of one matrix by another of lower rank*: four pages.
# - Golub and Van Loan, *Matrix Computations*, 4th edition, sections 2.4 (the decomposition) and 8.2 (power
#   iteration).
# - Aghajanyan, Zettlemoyer and Gupta 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model
#   Fine-Tuning* (arXiv:2012.13255), sections 3 and 4.
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685), sections 4.1 and 7.2.
# - Martin and Mahoney 2021, *Implicit Self-Regularization in Deep Neural Networks* (arXiv:1810.01075), section 1: what
#   the spectra of trained weights look like compared with those of noise.

# %% [markdown] open_question="update_rank_argument" points=4
# **Open question.** A colleague measures the updates of a fine-tuned model: 90 % of their energy lies in about 60 of
# 256 directions. "So LoRA needs rank 60 here", she says. Another answers: "Your plot of the loss says that rank 8 is
# enough." What does each of the two measurements show, and what does it not show? Which experiment would settle the
# question? (Six to twelve sentences; use the numbers of this unit.)
#
# **Rubric.**
#
# - 1 point: energy is not loss; many weak directions can hold energy that does nothing for the task. Numbers from
#   the unit.
# - 1 point: a share of the energy is compared with that of noise, or of the weight, of the same shape.
# - 1 point: cutting a finished update is not the same as training within rank r (either may be better: training can
#   compensate for the restriction, or fail to find an equally good update); or: what embeddings, biases and norms
#   learned was kept.
# - 1 point: an experiment that would settle it: train with rank r for several values of r, everything else equal, the
#   learning rate tuned for each, the loss measured on cards not used in training, with more than one seed.

# %% [markdown]
# You have decomposed the matrices of six blocks without asking what they are for. What *is* `c_attn`, and why is it 256
# by 768? In unit 03 you build the model around these matrices, until your code computes exactly what the library's
# model computes from the checkpoint.

# %% volatile=true
progress("02")
