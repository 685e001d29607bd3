# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 01: Rank
#
# **By the end of this unit you can**
#
# - determine by elimination how many rows of a matrix are independent, even when its entries carry rounding errors;
# - build a large matrix from a few columns and rows, and say how many numbers it takes to store it;
# - say what "low-rank" means in *low-rank adaptation*, and what it does not mean.
#
# **Prerequisites**: matrices and their product. Unit 00 shows how checking works.
#
# **Time**: about 75 minutes. 5 exercises, 2 predictions, one open question.
#
# ![The pivots of two matrices in the order in which elimination finds them, on a scale of powers of ten. Those of a
# product of rank 24 fall off a cliff after the 24th. Those of the Hilbert matrix fall evenly. A question mark asks
# where the pivots of a trained weight belong.](unit_01.png)

# %%
import numpy as np
import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# %% [markdown]
# ## How much is in a matrix?
#
# Unit 00 ended with a puzzle: 18.9 million numbers describe how every entry of GPT-3's query and value matrices
# changes, and there are $2 \cdot 96 \cdot 12288^2$ of those entries, about 29 billion. That can only work if the
# change is a very special kind of matrix. Which kind?
#
# Start with a matrix that is easy to write down.

# %% prediction="rank_of_counting"

# %%
M = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
print("the mean of the first and the last row:", ((M[0] + M[2]) / 2).tolist())
print("the middle row:                        ", M[1].tolist())

# %% check="rank_of_counting"

# %% [markdown]
# The **rank** of a matrix is the number of its independent rows: the most rows of which none is a sum of multiples of
# the others. Counting independent columns always gives the same number. With three rows you can see it; with 12,288
# you need a method.
#
# ## Elimination
#
# Take one row, the *pivot row*, and subtract multiples of it from all rows below, so that one column becomes zero
# there. What those rows had in common with the pivot row is now gone. Continue with the next row. Rows that were
# combinations of others end up as zeros, and the rows that are not zero at the end are independent.
#
# On paper any pivot that is not zero will do. On a computer the choice matters. Look at what a tiny pivot does in
# float32, which cannot tell 99,999,999 from 100,000,000:

# %%
bad = torch.tensor([[1e-8, 1.0], [1.0, 1.0]])
multiple = bad[1, 0] / bad[0, 0]
print("with 1e-8 as the pivot the second row becomes", (bad[1] - multiple * bad[0]).tolist())
print("with 1 as the pivot the first row becomes    ", (bad[0] - bad[0, 0] * bad[1]).tolist())

# %% [markdown]
# In the first line the original 1 of the second row is gone: $1 - 10^8$ was rounded to $-10^8$. So the largest
# remaining entry should be the pivot. *Complete pivoting* looks for it in all remaining rows and columns, and moves it
# into place by swapping.
#
# Implement it. It is the longest exercise of this unit; take it one line at a time. Two helpers are provided:
# `require_matrix` checks the input and converts its dtype, `rounding_tolerance` is the default tolerance.

# %% exercise="row_echelon"

# %%
echelon_of = working("row_echelon")

echelon, columns = echelon_of(M)
print(echelon)
print("the columns, in their new order:", columns.tolist())

# %% [markdown]
# The last row is zero: of the three rows only two are independent. All that remains is to count them.

# %% exercise="rank"

# %% exercise="rank_deficiency"

# %%
rank_of = working("rank")
missing = working("rank_deficiency")

for name, matrix in {
    "counting to nine": M,
    "the identity, 5 x 5": torch.eye(5),
    "ones, 5 x 5": torch.ones(5, 5),
    "random, 4 x 9": torch.randn(4, 9, generator=torch.Generator().manual_seed(0)),
}.items():
    print(f"{name:<20} rank {rank_of(matrix)}, {missing(matrix)} missing")

# %% [markdown]
# A random matrix has full rank: the probability that one row is exactly a combination of the others is zero.
#
# ## Rank in floating point
#
# "Exactly" is the problem. In floating point nothing is exact: a row that *should* be a combination of others misses it
# by a rounding error. Conversely, a row that misses it by so little may really be independent. The numbers alone cannot
# decide; all you can do is choose what counts as zero. That is the **tolerance**, and `row_echelon` uses
#
# $$\text{tolerance} = \max(m, n) \cdot \varepsilon \cdot \max_{ij} |M_{ij}|,$$
#
# where M is (m, n) and $\varepsilon$ is the gap between 1 and the next number: $1.2 \cdot 10^{-7}$ in float32,
# $2.2 \cdot 10^{-16}$ in float64. It grows with the matrix and with its entries, as rounding errors do (Golub and Van
# Loan, *Matrix Computations*, section 5.4 on numerical rank; numpy's `matrix_rank` uses the largest singular value in
# place of the largest entry).
#
# The classical test matrix is Hilbert's, $H_{ij} = 1 / (i + j + 1)$ with i and j from 0. It is known to be invertible
# at every size, so its rank is its size. Now compute it:


# %%
def hilbert(size, dtype=torch.float64):
    i = torch.arange(size, dtype=torch.float64)
    return (1 / (i[:, None] + i + 1)).to(dtype)


for size in (4, 8, 12, 16, 24):
    ranks = [rank_of(hilbert(size, dtype)) for dtype in (torch.float32, torch.float64)]
    print(f"{size:>2} x {size:<2}: rank {ranks[0]:>2} in float32, {ranks[1]:>2} in float64")

# %% [markdown]
# Both are right: the entries in memory are rounded, and whatever is left beyond those ranks could be rounding error
# alone. From here on "rank" means **numerical rank**, always relative to a tolerance.

# %% [markdown]
# ## Making a matrix of low rank
#
# Now build such a matrix. One column $b$ (m numbers) times one row $a$ (n numbers) is their **outer product**, the (m,
# n) matrix with the entries $b_i a_j$. All its rows are multiples of $a$, so its rank is 1. Add r of them:
#
# $$B A = \sum_{k=1}^{r} B_{:,k}\, A_{k,:}, \qquad B: (m, r), \quad A: (r, n).$$
#
# This is the matrix product, read in another order: not entry by entry but term by term.

# %% exercise="outer_product_sum"

# %% [markdown]
# Each term adds at most one independent row. So $\operatorname{rank}(BA) \le r$, whatever the numbers, and however
# large the matrix. Try it with 200 x 300 matrices: 60,000 entries, none of them zero.

# %%
product = working("outer_product_sum")
generator = torch.Generator().manual_seed(1)

for r in (1, 2, 4, 8):
    B = torch.randn(200, r, generator=generator)
    A = torch.randn(r, 300, generator=generator)
    BA = product(B, A)
    print(f"r = {r}: {int((BA != 0).sum()):,} entries, rank {rank_of(BA)}")

# %% [markdown]
# This is all that "low-rank" means in LoRA. The weight $W_0$ of a layer stays as it is, and LoRA learns a change of the
# form $\Delta W = BA$ (Hu et al. 2021, section 4.1, equation 3). The change can affect *every* entry of the
# weight, but it cannot be an *arbitrary* change.
#
# How many numbers does it take?

# %% exercise="low_rank_parameter_count"

# %%
numbers = working("low_rank_parameter_count")

side = 12288  # a query or value matrix of GPT-3
print(f"one matrix of GPT-3: {side * side:,} entries")
for r in (1, 4, 64, 6144):
    print(f"rank {r:>4}: {numbers(side, side, r):>11,} numbers, {numbers(side, side, r) / side**2:.3%}")
print(f"rank 4 on q and v of all 96 layers: {2 * 96 * numbers(side, side, 4):,}")

# %% [markdown]
# These are the 18.9 million of unit 00. There is also a limit: at a rank of half the side, the two factors have as many
# numbers as the matrix, and nothing is saved.

# %% [markdown]
# ## Do trained weights have a low rank?
#
# If a *change* of rank 4 is enough, perhaps the weights themselves have a low rank? Then much of a model would be
# redundant. Look first at what the rank is computed from: `row_echelon` finds pivot after pivot, each of them about the
# largest entry that is left. Here are the pivots of two 64 x 64 matrices, a product BA with r = 24 and Hilbert's, both
# in float64. The tolerance is 0, so that the elimination continues to the end. Where do the pivots of a trained weight
# belong?

# %% figure="unit_01.png"
generator = torch.Generator().manual_seed(2)
B, A = torch.randn(64, 24, generator=generator), torch.randn(24, 64, generator=generator)
STYLES = {"trained weight": 0, "Hilbert": 1, "product BA, r = 24": 2}  # colour and line of each curve
LABELS = {"trained weight": (36, 4), "Hilbert": (8.3, 1e-4), "product BA, r = 24": (26, 1e-4)}


def pivots_of(matrix):
    echelon, _ = echelon_of(matrix / matrix.abs().max(), tolerance=0.0)
    return echelon.diagonal().abs().clamp(min=1e-19)


pivots = {"Hilbert": pivots_of(hilbert(64)), "product BA, r = 24": pivots_of(product(B.double(), A.double()))}


def draw_pivots(tolerance):
    figure, (axes,) = plotting.panels(1, width=7.5, height=3.8)
    axes.axhspan(1e-19, tolerance, color="0.9")
    axes.text(63.5, tolerance / 2, f"counts as zero: below {tolerance:.0e}", ha="right", va="top", fontsize=9)
    for name, values in pivots.items():
        count = int((values > tolerance).sum())
        place = STYLES[name]
        style = {"color": plotting.COLOURS[place], "linestyle": plotting.LINES[place], "linewidth": 1.8}
        axes.plot(range(1, 65), values.tolist(), **style)
        axes.text(*LABELS[name], f"{name}: rank {count}", color=style["color"], fontweight="bold")
    axes.set(yscale="log", ylim=(1e-19, 100), xlim=(0, 64.5))
    plotting.label(axes, x="pivot, in the order in which it is found", y="size, relative to the largest entry")
    return figure


figure = draw_pivots(64 * torch.finfo(torch.float64).eps)
figure.axes[0].text(63.5, 5, "a trained weight: ?", ha="right", color=plotting.COLOURS[0], fontweight="bold")
show(
    figure,
    "Sizes of the 64 pivots of two matrices on a scale of powers of ten, in units of each matrix's largest entry. The "
    "product of rank 24 has 24 pivots near 1, and the next is far smaller than the tolerance. The pivots of the "
    "Hilbert matrix fall evenly until they reach the tolerance. The curve of a trained weight is missing: a question "
    "mark.",
)

# %% prediction="rank_of_a_trained_weight"

# %%
model, _ = load_gpt2("bundled")
weights = {
    f"{kind}, layer {layer}": block.get_submodule(kind).weight.detach()
    for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for layer, block in enumerate(model.transformer.h)
}
ranks = {name: rank_of(weight) for name, weight in tqdm(weights.items(), desc="ranks")}

for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
    shape = tuple(weights[f"{kind}, layer 0"].shape)
    print(f"{kind:<12} {shape!s:<12} ranks of the layers:", [ranks[f"{kind}, layer {i}"] for i in range(6)])

# %% check="rank_of_a_trained_weight"

# %% [markdown]
# So the rank says the same of every trained weight. The pivots say more. Add those of a 64 x 64 corner of a trained
# weight to the figure:

# %%
pivots["trained weight"] = pivots_of(weights["attn.c_proj, layer 0"][:64, :64].double())
show(
    draw_pivots(64 * torch.finfo(torch.float64).eps),
    "Sizes of the 64 pivots of three matrices on a scale of powers of ten, in units of each matrix's largest entry. "
    "The product of rank 24 has 24 pivots near 1, and the next is far smaller than the tolerance. The pivots of the "
    "Hilbert matrix fall evenly until they reach the tolerance. Those of the trained weight stay within a few powers "
    "of ten of 1 to the end.",
)

# %% [markdown]
# The three curves end in three ways. The product falls off a **cliff**: 24 directions, then nothing but rounding error.
# Hilbert's matrix is a **slope**: nothing separates the pivots that count from those that do not, so its rank is
# whatever the tolerance makes it. The trained weight **does not fall to zero** at all.
#
# Move the tolerance. Which of the three ranks hardly depends on it?

# %%
slider(
    draw_pivots,
    "tolerance",
    [10.0**-k for k in range(1, 16)],
    1e-6,
    "The same three curves with an adjustable tolerance, now one millionth. The product has rank 24, as at any "
    "tolerance from one hundredth down to rounding error; the rank of the Hilbert matrix changes with nearly every "
    "step; the trained weight keeps full rank.",
)

# %% [markdown]
# ## Adding a change of low rank
#
# In the end LoRA adds its change to the weight: $W = W_0 + BA$. What does that do to the rank? The rank of a sum is at
# most the sum of the ranks, so it could rise by r; but the weight already has full rank, and keeps it. Nor does the sum
# show that something of rank 4 was added. Only if you know $W_0$ can you take the difference, and there it is:

# %%
W0 = weights["attn.c_proj, layer 0"].double()
generator = torch.Generator().manual_seed(3)
B = 0.01 * torch.randn(256, 4, generator=generator, dtype=torch.float64)
A = torch.randn(4, 256, generator=generator, dtype=torch.float64)
W = W0 + product(B, A)
print("rank of W0:    ", rank_of(W0))
print("rank of W:     ", rank_of(W))
print("rank of W - W0:", rank_of(W - W0, tolerance=1e-9))

# %% [markdown]
# ## What goes wrong in practice
#
# **The rank of a tensor is something else.** In tensor libraries "rank" can mean the number of axes. A matrix has two
# axes, whatever its rank.

# %%
print("axes:", M.ndim, " rank:", rank_of(M))

try:
    rank_of(torch.ones(2, 3, 4))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# **The determinant does not test the rank.** On paper it is zero exactly when the rank is not full. In floating point
# its size says little. The first matrix below is perfectly harmless, yet its determinant is too small for float32. The
# second, with 1 on the diagonal and -1 above it, is within $10^{-17}$ of a matrix of rank 59, yet its determinant is 1.

# %%
harmless = 0.001 * torch.eye(200)
treacherous = torch.eye(60, dtype=torch.float64) - torch.ones(60, 60, dtype=torch.float64).triu(1)
for name, matrix in {"harmless": harmless, "treacherous": treacherous}.items():
    seen = np.linalg.matrix_rank(matrix.numpy())
    print(f"{name:<11} determinant {torch.linalg.det(matrix):g}, rank {seen} of {len(matrix)} according to numpy")

# %% [markdown]
# **A tolerance without a scale.** `1e-6` is small beside 1 and enormous beside the entries of many gradients.

# %%
gradient = 1e-8 * torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
print("with 1e-6:        rank", rank_of(gradient, tolerance=1e-6))
print("with the default: rank", rank_of(gradient))

# %% [markdown]
# **Rounding turns a low rank into full rank.** Take a product of rank 4, store it in bfloat16 and load it again: each
# entry is changed a little by rounding, independently of the others, and the rank rises from 4 to (almost) full. The
# same happens if you merge an adapter into a weight and later try to recover it from the difference. Keep B and A.

# %%
rounded = product(B, A).bfloat16().float()
print("BA:                   rank", rank_of(product(B, A)))
print("BA, through bfloat16: rank", rank_of(rounded))
print(
    "the same, counting entries below 1 % of the largest as zero: rank",
    rank_of(rounded, 0.01 * float(rounded.abs().max())),
)

# %% [markdown]
# **Two views cannot be swapped.** `M[0], M[1] = M[1], M[0]` is how you swap two values in Python. Rows of a tensor,
# however, are views of the same memory: by the time of the second assignment, the first has already overwritten what it
# reads.

# %%
two = torch.tensor([[1, 2], [3, 4]])
two[0], two[1] = two[1], two[0]
print("swapped as views:  ", two.tolist())
two = torch.tensor([[1, 2], [3, 4]])
two[[0, 1]] = two[[1, 0]]
print("swapped by indices:", two.tolist())

# %% [markdown]
# **Elimination can be fooled.** The treacherous matrix from above is already in echelon form, and no pivot is smaller
# than 1. numpy's `matrix_rank` uses singular values, the subject of the next unit, and detects the missing direction.

# %%
print("by elimination:      rank", rank_of(treacherous))
print("by singular values:  rank", np.linalg.matrix_rank(treacherous.numpy()))

# %% [markdown]
# ## Summary
#
# - The rank is the number of independent rows; rows can be dependent even if no two are multiples of each other.
# - In floating point it needs a tolerance that is proportional to the entries and to the precision.
# - A product BA with inner size r has at most rank r and r (m + n) numbers, however large it is.
# - LoRA's change BA has low rank. The weight to which it is added does not, and neither does the sum.
# - Rank answers yes or no for each direction. It does not say how *much* is in a direction.
#
# ## Go further
#
# - Golub and Van Loan, *Matrix Computations*: section 3.4 on pivoting, section 5.4 on numerical rank.
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 4.1, where the rank enters.
# - Aghajanyan et al. 2020, *Intrinsic Dimensionality* (arXiv:2012.13255): the observation that motivated LoRA.
# - `lora_from_scratch/linear_algebra/rank.py` and `tests/test_rank.py`: the library's code, and the properties that
#   must hold for any matrix.
#
# All 24 matrices of the model have full rank. If no trained weight has low rank, why should the *change* made by
# fine-tuning have it? The figure has a hint: pivots can be small without being zero. The useful question is not how
# many directions there are, but how much is in each of them, and the singular values answer it.

# %% [markdown] open_question="nearly_low" points=4
# ### Open question
#
# Every weight of the bundled GPT-2 has full rank. A fellow student concludes: "So low-rank methods cannot work, since a
# matrix of rank 256 cannot be written with rank 8." Answer in about ten lines. What is right about this? What does LoRA
# write with rank 8? How would you define, and measure, that a matrix is *nearly* of rank 8?
#
# **Rubric.**
# - 1 point: what is right: a matrix of rank 256 is never equal to one of rank 8.
# - 1 point: it is not the weight that LoRA writes with low rank, but its change; the weight is kept.
# - 1 point: a definition of "nearly": the distance to the closest matrix of rank 8, or a tolerance, made precise.
# - 1 point: it is relative to something (the size of the matrix, or what the model's loss feels), with a way to
#   measure.
