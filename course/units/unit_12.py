# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 12: Quantisation
#
# **By the end of this unit you can**
#
# - store a weight matrix with 8 or 4 bits per weight and restore it, byte for byte compatible with bitsandbytes;
# - derive the 16 values of NF4, and explain why they are where they are;
# - count what a weight really costs, including the scales, and reduce 4.5 bits to 4.127;
# - say which errors in the weights affect the model, and how to measure the effect when perplexity is not precise
#   enough.
#
# **Prerequisites**: PyTorch tensors, the loss of a language model (unit 03) and, for one paragraph, the quantiles of
# the normal distribution. No knowledge of LoRA is needed.
#
# **Time**: about two hours. 8 exercises, 2 predictions, one open question.
#
# ![The weights of a matrix divided by the largest of their block: a bell around zero, with a small peak at each end.
# Below it the 16 values of three codebooks. NF4 is dense in the middle, like the bell; INT4 has equal steps; FP4 is
# crowded at zero and sparse further out. Which of them has the smallest error?](unit_12.png)

# %%
import math

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.metrics import load_tales
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.quantization.int8 import dequantize_int8, dynamic_map
from lora_from_scratch.quantization.nf4 import (
    NestedAbsmax,
    double_dequantize,
    fp4_codebook,
    int4_codebook,
    unpack_nibbles,
)
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# %% [markdown]
# ## What LoRA does not reduce
#
# LoRA removes most of the gradients and most of the optimiser state. What remains in memory are the frozen weights. For
# a model with 65 billion parameters these are 130 GB in 16 bits, more than a single graphics card holds.
#
# The frozen weights are only *read*. So the question of this unit is: **how few bits does a weight need if it never
# changes?** Dettmers et al. 2023 (QLoRA) show that four are enough, and fine-tune such a model in less than 48 GB
# instead of more than 780 (abstract and section 1). In this unit you build their storage format from the ground up.

# %%
model, tokenizer = load_gpt2("bundled")
layers = {name: m for name, m in model.named_modules() if isinstance(m, Conv1D)}
original = {name: layer.weight.detach().clone() for name, layer in layers.items()}
weight = original["transformer.h.2.mlp.c_fc"].T.contiguous()  # (out, in), the usual orientation

print(f"{len(layers)} matrices, {sum(w.numel() for w in original.values()):,} weights")
print(f"one of them: {tuple(weight.shape)}, from {weight.min():.2f} to {weight.max():.2f}, {weight.nbytes:,} bytes")

# %% [markdown]
# ## Eight bits and one scale
#
# An `int8` holds integers from -128 to 127, but weights are not integers. So you store two things: integers $q$, and
# one number that gives their scale. With the weights $x \in \mathbb{R}^n$ and their **absmax** $c = \max_i |x_i|$,
#
# $$ q_i = \mathrm{round}\!\left(\frac{127}{c}\, x_i\right), \qquad \hat{x}_i = \frac{c}{127}\, q_i $$
#
# (QLoRA, section 2, equations 1 and 2). $\hat x$ is the restored value. Each weight is off by at most half a step, $c /
# 254$.

# %% exercise="absmax_int8"

# %%
to_int8 = working("absmax_int8")


def relative_error(back, x):
    """||back - x|| / ||x|| for weights of any shape."""
    return float((back - x).norm() / x.norm())


q, absmax = to_int8(weight)
back = dequantize_int8(q, absmax)
print(f"{weight.nbytes:,} bytes become {q.nbytes + 4:,}; relative error {relative_error(back, weight):.2%}")
print(f"largest error {float((back - weight).abs().max()):.5f}, half a step {float(absmax) / 254:.5f}")

# %% [markdown]
# A quarter of the bytes, with an error of 1 to 2 %. That is hard to beat. What can go wrong?

# %% prediction="after_an_outlier"

# %%
spoiled = weight.clone()
spoiled[100, 7] = 300 * weight.abs().max()

q, absmax = to_int8(spoiled)
back = dequantize_int8(q, absmax)
print(f"the outlier {float(spoiled[100, 7]):.1f} is restored as {float(back[100, 7]):.1f}")
print(f"of the {weight.numel() - 1:,} others, {int((q != 0).sum()) - 1:,} are not 0")

# %% check="after_an_outlier"

# %% [markdown]
# Such outliers exist. In the hidden states of transformers with billions of parameters, a few features are up to twenty
# times as large as the rest, and one scale cannot serve both (Dettmers et al. 2022, *LLM.int8()*, section 4). Weights
# are more uniform, but the precision of a weight matrix, too, is limited by its largest entry.
#
# The solution is to limit the effect of an outlier to its neighbours. Split the numbers into **blocks**, each with its
# own scale (Dettmers et al. 2021, section 2.1). Read the matrix row by row as one long row of $n$ numbers; block $b$
# contains the numbers from $bB$ to $(b+1)B - 1$, where $B$ is the block size. The last block may be shorter.

# %% exercise="blockwise_absmax"

# %%
scales_of = working("blockwise_absmax")

scales, spoiled_scales = scales_of(weight, blocksize=64), scales_of(spoiled, blocksize=64)
print(f"{weight.numel():,} weights, {len(scales):,} scales, from {scales.min():.3f} to {scales.max():.3f}")
print(f"scales that the outlier changes: {int((scales != spoiled_scales).sum())}")

# %% [markdown]
# ## Which sixteen values?
#
# With 8 bits there are 255 levels, and equal steps are fine enough. With 4 bits there are 16. Where should they be?
#
# The list of values that the codes 0 to 15 stand for is a **codebook** $v \in \mathbb{R}^{16}$. A weight $x$ in a block
# with scale $c$ gets the code of the nearest value, and is restored as that value times the scale:
#
# $$ k = \arg\min_j \left| \frac{x}{c} - v_j \right|, \qquad \hat{x} = c\, v_k . $$
#
# There are two obvious codebooks. INT4 has equal steps. FP4 is a floating-point number of four bits, one for the sign,
# two for the exponent and one for the mantissa ("E2M1"), so its steps grow with the number.

# %%
for name, codebook in {"INT4": int4_codebook(), "FP4": fp4_codebook()}.items():
    values = codebook.sort().values.tolist()
    print(f"{name}: " + " ".join(f"{value:.2f}" for value in values))

# %% [markdown]
# (INT4's -8 lies outside the range from -1 to 1 and is never used. FP4 has two zeros and, next to them, 1/192, printed
# as 0.01: this is bitsandbytes' version, whose smallest number is far smaller than in the textbook's E2M1. Between it
# and the next value, 1/6, there is a gap wider than a step of INT4.)
#
# Now look at the values to store: the weights of a trained matrix, divided by the absmax of their block.

# %%
z = (weight.reshape(-1, 64) / scales_of(weight, blocksize=64)[:, None]).flatten()

figure, (axes,) = plotting.panels(1, width=6.5, height=2.6)
axes.hist(z.numpy(), bins=81, density=True, color="0.75", edgecolor="0.4", linewidth=0.4)
grid = torch.linspace(-1, 1, 200)
axes.plot(grid, torch.exp(-((grid / z.std()) ** 2) / 2) / (z.std() * math.sqrt(2 * math.pi)), "k--", linewidth=1.3)
axes.text(1.05 * float(z.std()), 0.95 / float(z.std()) / math.sqrt(2 * math.pi), "normal distribution", va="top")
plotting.label(axes, x="weight / absmax of its block of 64", y="density", title="Weights are close to normal")
show(
    figure,
    "Histogram of the weights of one matrix, each divided by the largest of its block: a bell between -1 and 1 that "
    "follows the dashed curve of a normal distribution, with a small bar at each end for the largest weight of every "
    "block.",
)

# %% [markdown]
# More than half of the weights are in the middle third. Equal steps use only a third of the codes there, and two thirds
# on the sides, where there are fewer weights. The idea of **NormalFloat** (NF4; QLoRA, section 3) is to divide the
# *probability* into equal parts instead of the range: if each value is used equally often, none of the 16 codes is
# wasted. (Whether that also minimises the error is another question, which you will measure.) A value is then a
# **quantile** of the normal distribution: $Q(p)$ is the number below which a share $p$ of all normally distributed
# numbers lies, so $Q(0.5) = 0$.
#
# There are two details. The outermost quantiles, $Q(0)$ and $Q(1)$, are infinite, so NF4 stops a little before them.
# And zero has to be exactly one of the values, for padding and pruned weights. As sixteen is even, the two sides cannot
# be symmetric: there are eight positive values, zero, and seven negative ones.

# %% [markdown]
# A smaller codebook by hand, with two positive values, zero and one negative value. On each side the probabilities go
# in equal steps from 0.5, whose quantile is zero, to 0.9. You need two quantiles, $Q(0.7) = 0.524$ and
# $Q(0.9) = 1.282$.
#
# - Positive: two equal steps from 0.5 to 0.9 are 0.7 and 0.9; the values are 0.524 and 1.282.
# - Negative: one step from 0.5 to 0.9; the value is -1.282.
# - All divided by the largest: -1, 0, 0.41, 1.

# %% exercise="nf4_codebook"

# %%
NF4 = working("nf4_codebook")()

print("NF4:  " + " ".join(f"{value:.2f}" for value in NF4.tolist()))
print("gaps:  " + " ".join(f"{gap:.2f}" for gap in NF4.diff().tolist()))

# %% [markdown]
# The gaps are narrow in the middle and wide at the ends. These are the 16 numbers that the paper prints (appendix E),
# and that bitsandbytes uses.
#
# Before you measure, compare the three codebooks with weights that are close to normal:

# %% figure="unit_12.png"
CODEBOOKS = {"NF4": NF4, "INT4": int4_codebook(), "FP4": fp4_codebook()}

figure, (axes,) = plotting.panels(1, width=6.5, height=3.6)
axes.hist(z.numpy(), bins=81, density=True, color="0.8")
top = axes.get_ylim()[1]
for row, (name, codebook) in enumerate(CODEBOOKS.items()):
    middle = -(0.13 + 0.17 * row) * top
    inside = codebook[codebook.abs() <= 1]
    axes.vlines(inside, middle - 0.05 * top, middle + 0.05 * top, color=plotting.COLOURS[row], linewidth=1.8)
    axes.text(1.1, middle, name, va="center", color=plotting.COLOURS[row], fontweight="bold")
axes.set(xlim=(-1.05, 1.4), ylim=(-0.58 * top, top), yticks=[])
plotting.label(axes, x="weight / absmax of its block of 64", title="The weights, and three codebooks of 16 values")
show(
    figure,
    "A histogram of one matrix's weights divided by the absmax of their block, a bell around zero. Below it three rows "
    "of marks: NF4 dense in the middle, INT4 at equal steps, FP4 crowded at zero and sparse further out.",
)

# %% prediction="order_of_the_errors"

# %% [markdown]
# ## Packing the codes
#
# Computers do not address 4-bit numbers. Two codes share a byte: the first is in the high half (each half is called a
# *nibble*), the second in the low half. For example, the codes 3 and 10 are `0011` and `1010` in binary, and together
# the byte `00111010`.

# %% exercise="pack_nibbles"

# %% [markdown]
# Now combine the steps: scales, nearest values, bytes. The import cell at the top provides `normalize_blocks`, which
# divides every weight by the scale of its block, if you do not want to write that yourself. If you do, consider a block
# in which all weights are zero.
#
# This exercise uses what you have written so far. If a part is missing, use the library's version for now, for example
# `pack_nibbles = library("pack_nibbles")`.

# %% [markdown]
# Four weights by hand, as one block of 4. The largest magnitude is $c = 0.5$.
#
# | weight | divided by c | nearest value of NF4 | code | restored, times c |
# |---|---|---|---|---|
# | 0.30 | 0.60 | 0.56 | 13 | 0.28 |
# | -0.50 | -1.00 | -1.00 | 0 | -0.50 |
# | 0.03 | 0.06 | 0.08 | 8 | 0.04 |
# | -0.10 | -0.20 | -0.18 | 5 | -0.09 |
#
# Stored are two bytes, `11010000` (13 and 0) and `10000101` (8 and 5), or 208 and 133; and the scale 0.5.

# %% exercise="quantize_nf4"

# %% [markdown]
# Now the reverse, in a few simple lines. Dequantisation runs every time a layer is used, so the library's layers call a
# faster version (`quantization/fast_nf4.py`), which is tested to give exactly the same bits.

# %% exercise="dequantize_nf4"

# %%
quantize, dequantize = working("quantize_nf4"), working("dequantize_nf4")

packed, absmax = quantize(weight)
back = dequantize(packed, absmax, weight.shape)
print(f"{weight.nbytes:,} bytes become {packed.nbytes:,} of codes and {absmax.nbytes:,} of scales")
print("before:", [f"{value:.4f}" for value in weight[0, :6].tolist()])
print("after: ", [f"{value:.4f}" for value in back[0, :6].tolist()])

# %% [markdown]
# Do this for all matrices of the model, with each codebook. The last column says how much of the four bits is used: the
# *entropy* of the codes, $-\sum_k f_k \log_2 f_k$, where $f_k$ is the share of the weights with code $k$. It is 4 if
# all codes are equally frequent.


# %%
def error_and_entropy(x, codebook, blocksize=64):
    packed, absmax = quantize(x, blocksize, codebook)
    back = dequantize(packed, absmax, x.shape, blocksize, codebook=codebook)
    share = unpack_nibbles(packed).int().bincount(minlength=16) / x.numel()
    return relative_error(back, x), float(-(share * share.clamp(min=1e-9).log2()).sum())


errors = {name: [] for name in CODEBOOKS}
used = {name: [] for name in CODEBOOKS}
for matrix in tqdm(original.values(), desc="matrices"):
    for name, codebook in CODEBOOKS.items():
        error, entropy = error_and_entropy(matrix.T.contiguous(), codebook)
        errors[name].append(error)
        used[name].append(entropy)

best = [min(errors, key=lambda name: errors[name][i]) for i in range(len(layers))]
for name in CODEBOOKS:
    mean, low, high = sum(errors[name]) / len(layers), min(errors[name]), max(errors[name])
    bits_used = sum(used[name]) / len(layers)
    print(
        f"{name:<5} error {mean:.2%} ({low:.2%} to {high:.2%}), best in {best.count(name):>2} of {len(layers)}", end=""
    )
    print(f"   {bits_used:.2f} bits used")

# %% check="order_of_the_errors"

# %% [markdown]
# Look at the last column, too. NF4 does not reach 4 bits: its values are quantiles of the normal distribution, but what
# is stored is normal numbers *divided by the largest of 64*, which is another distribution (Yoshida 2023,
# arXiv:2306.06965). Nor does using more bits make the error smaller: FP4 uses more of them than INT4 and has a larger
# error. "Optimal" in the paper refers to equal use, not to the smallest error.
#
# ## Your own codebook
#
# So is there a codebook with a smaller error than NF4? Any 16 values from -1 to 1 may be tried, if one of them is
# exactly zero: normal quantiles that stop at another probability than 0.9677083, a mixture of NF4 and equal steps, or
# values that are fitted to the stored weights `z`. The codebook below has equal use: its values are the quantiles of
# `z` itself instead of those of the normal distribution. Change `my_codebook`, write down whether you expect to win,
# and run the cell. It quantises all matrices, and `z` is only one of them: only a codebook that is better in every
# matrix wins.


# %%
def my_codebook():
    """The 16 values of your codebook, in any order. Change this."""
    values = torch.quantile(z[::4], (torch.arange(16) + 0.5) / 16)
    values[values.abs().argmin()] = 0
    return values


def compare_with_nf4(values):
    """Quantise every matrix with your codebook, and say whether its error is smaller than NF4's."""
    mine = torch.as_tensor(values, dtype=torch.float32)
    if mine.shape != (16,):
        return f"A codebook of four bits has the shape (16,); yours has {tuple(mine.shape)}."
    if not mine.abs().max() <= 1:
        return f"The values have to lie between -1 and 1; yours go from {mine.min():.2f} to {mine.max():.2f}."
    if not (mine == 0).any():
        return "None of your values is exactly zero, so a pruned weight would not stay zero."
    if torch.allclose(mine.sort().values, NF4, atol=1e-6):
        return "That is NF4 itself: change `my_codebook`."
    print("your values: " + " ".join(f"{value:.2f}" for value in mine.sort().values.tolist()))
    results = [error_and_entropy(matrix.T.contiguous(), mine) for matrix in original.values()]
    for name, found, bits_used in (("yours", *zip(*results, strict=True)), ("NF4", errors["NF4"], used["NF4"])):
        print(f"{name:<5} error {sum(found) / len(layers):.2%}   {sum(bits_used) / len(layers):.2f} bits used")
    better = sum(error < nf4 for (error, _), nf4 in zip(results, errors["NF4"], strict=True))
    print(f"smaller error than NF4 in {better} of {len(layers)} matrices")
    if better == len(layers):
        return "Your codebook wins."
    return "Undecided: it depends on the matrix." if better else "Your codebook loses."


print(compare_with_nf4(my_codebook()))

# %% [markdown]
# Equal use leaves too few values for the rare large weights. There are codebooks that beat NF4 in every matrix, if not
# by much. One question leads to them: a value stands for all weights that are closer to it than to its neighbours, so
# which number has the smallest squared error for these weights? If yours is better in `z` and worse elsewhere, do not
# fit it to this one matrix as closely, or fit it to all of them.

# %% [markdown]
# ## The scales cost bits as well
#
# Four bits per weight is not the whole cost: each block also has a scale, a float32. The scales can themselves be
# quantised to one byte each; a group of scales then needs a second scale, a float32. That is double quantisation, which
# you will build in the next exercise. Here you only count.

# %% exercise="bits_per_weight"

# %%
bits = working("bits_per_weight")

for blocksize in (16, 64, 256, 4096):
    print(
        f"blocks of {blocksize:>4}: {bits(4, blocksize):.3f} bits, of which {bits(4, blocksize) - 4:.3f} for the scales"
    )

# %% [markdown]
# With blocks of 64 the scales cost half a bit per weight: for 65 billion parameters, 4 GB. Larger blocks cost less, but
# then an outlier affects more neighbours.
#
# The paper's solution is **double quantisation** (section 3): the scales are numbers too, so quantise *them*. 256
# scales, each for 64 weights, become bytes and share one second scale. Eight bits are enough if their levels are well
# placed: `dynamic_map()` has 256 of them, fine near zero and coarse at the ends.

# %%
table = dynamic_map()
print(f"{len(table)} values, {int((table < 0).sum())} of them negative, from {table[0]:.4f} to {table[-1]:.4f}")
print("next to zero:", [f"{value:.1e}" for value in table[126:131].tolist()])
print("at the end:  ", [f"{value:.3f}" for value in table[-4:].tolist()])

# %% [markdown]
# Nearly half of these values are negative, but scales never are. That is the purpose of the offset.

# %% exercise="double_quantize"

# %%
double = working("double_quantize")


def there_and_back(x, codebook, blocksize=64, nested=False):
    """Quantise and dequantise a weight, with double quantisation if `nested` is true."""
    packed, absmax = quantize(x, blocksize, codebook)
    if nested:
        absmax = double_dequantize(NestedAbsmax(*double(absmax)))
    return dequantize(packed, absmax, x.shape, blocksize, codebook=codebook)


for nested in (False, True):
    error = relative_error(there_and_back(weight, NF4, nested=nested), weight)
    print(f"{bits(double_quant=nested):.3f} bits, error {error:.3%}")

# %% [markdown]
# The overhead falls from 0.5 to 0.127 bits, and the error hardly changes. What could you buy with the bits that you
# saved? Smaller blocks. Move the slider, and compare the two curves at the same number of bits.

# %%
SIZES = (16, 32, 64, 128, 256, 512, 1024, 4096)
error_at = {
    (size, nested): relative_error(there_and_back(weight, NF4, size, nested), weight)
    for size in SIZES
    for nested in (False, True)
}


def at_block_size(chosen):
    figure, (left, right) = plotting.panels(2, width=4.6, height=3.0)
    flat = weight.reshape(-1, chosen)
    left.hist((flat / flat.abs().amax(dim=1, keepdim=True)).flatten().numpy(), 81, density=True, color="0.75")
    left.vlines(NF4, 0, left.get_ylim()[1], color=plotting.COLOURS[0], linewidth=0.9)
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    plotting.label(left, x=f"weight / absmax of its block of {chosen}", y="density", title="Lines: the values of NF4")
    for style, (nested, name) in enumerate({False: "plain", True: "doubly quantised"}.items()):
        xs = [bits(4, size, nested) for size in SIZES]
        ys = [100 * error_at[size, nested] for size in SIZES]
        right.plot(xs, ys, plotting.LINES[style], color=plotting.COLOURS[style], marker=".", linewidth=1.6)
        here = SIZES.index(chosen)
        right.plot(xs[here], ys[here], "o", markersize=9, color=plotting.COLOURS[style])
        side = {"xytext": (8, -2), "ha": "left"} if nested else {"xytext": (0, 8), "ha": "center"}
        right.annotate(name, (xs[0], ys[0]), textcoords="offset points", color=plotting.COLOURS[style], **side)
    right.margins(x=0.15, y=0.15)
    plotting.label(right, x="bits per weight", y="error (%)", title=f"Dots: blocks of {chosen}")
    return figure


slider(
    at_block_size,
    "block size",
    SIZES,
    64,
    "Left, a histogram of the weights divided by the absmax of their block, with lines at the 16 values of NF4: the "
    "larger the block, the narrower the bell, and the more lines lie outside it. Right, error against bits per weight "
    "for block sizes from 4096 to 16: both curves fall, and the one with double quantisation lies to the left of the "
    "plain one.",
)

# %%
for size, nested in ((128, False), (32, True)):
    kind = "doubly quantised" if nested else "plain"
    print(f"blocks of {size:>3}, {kind:<16} {bits(4, size, nested):.3f} bits, error {error_at[size, nested]:.3%}")

# %% [markdown]
# The cost is the same, the error smaller. The paper uses blocks of 64 and saves the bits.

# %% [markdown]
# ## What it does to the model
#
# An error in the weights is not an error of the model. So quantise all of its matrices, as QLoRA does (embeddings and
# normalisation layers stay as they are), and let it predict text that it was not trained on: the project's own tales.
#
# Measure two things for each token. The **loss**, whose mean gives the perplexity, is what the paper reports. The
# (Kullback-Leibler) **divergence** $\sum_t p_t \log (p_t / q_t)$, in nats like the loss, compares the whole prediction
# $p$ of the original with the quantised model's prediction $q$, over all tokens $t$ of the vocabulary; it is 0 only if
# nothing has changed.

# %%
ids = [i for tale in load_tales() for i in (tokenizer.eos_id, *tokenizer.encode(tale))]
windows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
targets = [part[:, 1:, None] for part in windows.split(3)]


@torch.no_grad()
def log_probabilities():
    return [torch.log_softmax(model(part)[:, :-1], dim=-1) for part in windows.split(3)]


def losses(predictions):
    pairs = zip(predictions, targets, strict=True)
    return torch.cat([-log_q.gather(-1, target).flatten() for log_q, target in pairs])


@torch.no_grad()
def compare(before, after):
    """Divergence (nats per token), and the change in each token's loss."""
    pairs = zip(before, after, strict=True)
    divergence = torch.cat([(log_p.exp() * (log_p - log_q)).sum(-1).flatten() for log_p, log_q in pairs])
    return float(divergence.mean()), losses(after) - losses(before)


base = log_probabilities()
print(f"{targets[0].shape[1] * len(windows):,} predictions, perplexity {losses(base).mean().exp():.2f}")

# %% [markdown]
# Add one more codebook from the paper: E3M0 has three bits of exponent and no mantissa, so its values are powers of
# two. And take one more precaution. Quantisation is deterministic, but where the blocks start is arbitrary. Start them
# at three different places to see how much of a result is chance.

# %%
powers = torch.tensor([0.0] + [2.0**-k for k in range(6, -1, -1)])
E3M0 = torch.cat([powers, -powers])
KINDS = {
    "INT4": (int4_codebook(), False),
    "FP4 (E2M1)": (fp4_codebook(), False),
    "FP4 (E3M0)": (E3M0, False),
    "NF4": (NF4, False),
    "NF4, double": (NF4, True),
}


def quantise_the_model(codebook, nested=False, blocksize=64, start=0):
    """Quantise and dequantise every matrix, with blocks starting at `start`; return the error over all weights."""
    off = size = 0.0
    for name, layer in layers.items():
        flat = original[name].T.reshape(-1).roll(-start)
        back = there_and_back(flat, codebook, blocksize, nested)
        off, size = off + (back - flat).square().sum(), size + flat.square().sum()
        layer.weight.data = back.roll(start).view(original[name].T.shape).T.contiguous()
    return float((off / size).sqrt())


measured = {name: [] for name in KINDS}
for name, (codebook, nested) in tqdm(KINDS.items(), desc="quantised models"):
    for start in (0, 21, 42):
        error = quantise_the_model(codebook, nested, start=start)
        measured[name].append((error, *compare(base, log_probabilities())))

# %%
PAPER = {"INT4": 34.34, "FP4 (E2M1)": 31.07, "FP4 (E3M0)": 29.48, "NF4, double": 27.41}

print("              weight    divergence in             perplexity            the paper's")
print("              error     millinats per token       (three starts)        perplexity")
for name, runs in measured.items():
    error, kl = sum(run[0] for run in runs) / 3, [1000 * run[1] for run in runs]
    ppl = sorted(float((losses(base) + change).mean().exp()) for _, _, change in runs)
    shown = f"{min(kl):.1f} to {max(kl):.1f}"
    said = f"{PAPER[name]:.2f}" if name in PAPER else "-"
    print(f"{name:<12}  {error:6.2%}    {sum(kl) / 3:5.1f} ({shown})".ljust(50), end="")
    print(f"{ppl[0]:.2f}, {ppl[1]:.2f}, {ppl[2]:.2f}".ljust(24) + said)

print("\nincrease in loss from one codebook to the next, in millinats (standard error over the tokens), three starts")
for one, other in (("NF4", "INT4"), ("INT4", "FP4 (E2M1)"), ("FP4 (E2M1)", "FP4 (E3M0)")):
    rises = [theirs[2] - mine[2] for mine, theirs in zip(measured[one], measured[other], strict=True)]
    said = [f"{1000 * rise.mean():.1f} ({1000 * rise.std() / math.sqrt(len(rise)):.1f})" for rise in rises]
    print(f"{one} to {other}:".ljust(26) + ", ".join(said))

# %% [markdown]
# The paper's column is table 2 of QLoRA: the mean perplexity of OPT, BLOOM, LLaMA and Pythia models with 125 million to
# 13 billion parameters on web text. The text differs from ours, so compare the order and not the size.
#
# Read your columns from left to right.
#
# - **Weight error and divergence agree**: the codebook with the smaller error changes the model less, and the three
#   starts hardly differ. Double quantisation costs next to nothing.
# - **Perplexity is not precise enough.** It gives the same order here, but look at the last lines: from NF4 to INT4 and
#   on to FP4 the loss rises by one or two standard errors over the tokens, so neighbours could swap places on another
#   text of this length. An error in the weights makes some tokens more likely and others less; in the loss these
#   changes cancel, in the divergence they do not. Perplexity needs far more text than a few thousand tokens to
#   distinguish codebooks.
# - **We agree with the paper on the best codebook only.** In the paper, E3M0 comes second and INT4 last. Here E3M0 is
#   last by far, and INT4 is better than FP4. Our weights are close to normal, for which powers of two are a poor
#   choice. Why is it different in the paper? Larger models may have heavier tails than ours, which hurts equal steps
#   most; and a mean of perplexities is dominated by the worst of the models. The table does not say which of the two it
#   was.

# %%
figure, (axes,) = plotting.panels(1, width=6.0, height=3.6)
places = {name: [(100 * run[0], 1000 * run[1]) for run in runs] for name, runs in measured.items()}
for runs in places.values():
    axes.plot(*zip(*runs, strict=True), ".", color="0.3", markersize=4, zorder=4)
del places["NF4, double"]  # coincides with NF4
axes.set(xscale="log", yscale="log", xticks=[10, 15, 20], yticks=[10, 20, 40])
axes.set(xticklabels=[10, 15, 20], yticklabels=[10, 20, 40])
axes.minorticks_off()
plotting.label(
    axes, x="error of the weights (%)", y="divergence (millinats per token)", title="Weight error and divergence agree"
)
plotting.points(axes, {name: runs[0] for name, runs in places.items()})
show(
    figure,
    "The weight error against the divergence of the quantised model, both on logarithmic axes: NF4 is lowest in both, "
    "E3M0 highest in both, INT4 and FP4 between, close to a rising line.",
)

# %% [markdown]
# ## What goes wrong in practice
#
# **One scale for a whole matrix.** It saves half a bit, and it is the first thing that many people try.

# %%
for blocksize, name in ((64, "blocks of 64"), (2**20, "one scale per matrix")):
    error = quantise_the_model(NF4, blocksize=blocksize)
    divergence, _ = compare(base, log_probabilities())
    print(f"{name:<20} error {error:.2%}, divergence {1000 * divergence:.1f} millinats per token")
for name, layer in layers.items():
    layer.weight.data = original[name]

# %% [markdown]
# **The last block is short.** A bias, or a matrix of 100 x 33, does not fill whole blocks. `view` raises an error,
# which is the better case. Cutting off the rest does not, and those weights then have no scale.

# %%
bias = torch.randn(100, generator=torch.Generator().manual_seed(0))
try:
    bias.view(-1, 64)
except RuntimeError as refused:
    print("view:", refused)
print("scales without the rest:", len(bias[: 100 // 64 * 64].view(-1, 64)), " scales needed:", len(scales_of(bias)))

# %% [markdown]
# **A block of zeros.** 0 / 0 is NaN. A search sorts it behind everything else (code 15, the value 1); `argmin` returns
# the first index (code 0, the value -1). Multiplied by a scale of 0 that still gives 0, so no test notices. But with
# double quantisation, a scale of 0 is restored as a value close to 0.

# %%
pruned = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
pruned[2] = 0
packed, absmax = quantize(pruned)
nested = double_dequantize(NestedAbsmax(*double(absmax)))
careless = packed.clone()
careless[64:96] = 0xFF  # the codes 15 and 15, which 0 / 0 becomes
for name, codes in (("handled", packed), ("0 / 0", careless)):
    plain_scales, nested_scales = (dequantize(codes, s, pruned.shape)[2].abs().max() for s in (absmax, nested))
    print(f"{name:<9} largest restored 'zero': {plain_scales:.4f}, doubly quantised {nested_scales:.4f}")

# %% [markdown]
# **The halves of the bytes are swapped.** Other formats put the first code into the *low* half. There is no error, each
# restored number is a possible weight, and the histogram is the same.

# %%
packed, absmax = quantize(weight)
swapped = (packed >> 4) | (packed << 4)
print(f"right order:   error {relative_error(dequantize(packed, absmax, weight.shape), weight):.0%}")
print(f"halves swapped: error {relative_error(dequantize(swapped, absmax, weight.shape), weight):.0%}")

# %% [markdown]
# **The scales are decoded wrongly.** The 8-bit codes are indices into a map that contains negative values, relative to
# an offset. If you forget the offset, or take the codes for equal steps from -1 to 1, the model still runs.

# %%
codes, second, offset = double(absmax)
wide = second.repeat_interleave(256)[: len(codes)]
readings = {
    "correctly": dynamic_map()[codes.int()] * wide + offset,
    "without the offset": dynamic_map()[codes.int()] * wide,
    "as equal steps": (codes.float() / 127.5 - 1) * wide + offset,
}
for name, scales in readings.items():
    print(f"{name:<19} error {relative_error(dequantize(packed, scales, weight.shape), weight):.1%}")

# %% [markdown]
# **The matrix is transposed.** GPT-2's layers store (in, out), most others (out, in). The blocks run along the rows, so
# the transposed matrix has different blocks. Both are valid, but a program for one cannot read the bytes of the other.

# %%
turned, turned_absmax = quantize(weight.T.contiguous())
same_code = unpack_nibbles(packed).view(weight.shape) == unpack_nibbles(turned).view(weight.T.shape).T
print(f"weights with the same code in both: {same_code.float().mean():.0%}")

# %% [markdown]
# **Ties.** `torch.round` rounds a half to the even neighbour; a codebook search rounds it to the lower value. With
# equal steps (INT4, or 8 bits in blocks), three or four in a thousand bfloat16 weights lie exactly on a midpoint;
# between NF4's uneven values hardly any do. If you always round up, you shift the mean, and your bytes differ from
# everyone else's.

# %%
half = torch.arange(-50, 50) + 0.5
for name, rounded in {"to even": torch.round(half), "always up": torch.floor(half + 0.5)}.items():
    print(f"{name:<16} mean error {float((rounded - half).mean()):+.2f}")

# %% [markdown]
# ## Summary
#
# - Absmax quantisation stores integers and a scale. The largest weight determines the scale, so one outlier costs all
#   the weights that share it their precision; this is why there are blocks.
# - A 4-bit code is an index into a codebook of 16 values. NF4's are quantiles of the normal distribution and an exact
#   zero; on real weights they beat equal steps, which beat FP4.
# - Scales cost 32 / 64 = 0.5 bits per weight, or 0.127 if they are quantised themselves.
# - The effect on the model follows the error in the weights. The divergence shows it; perplexity needs much more text.
# - Zeros, short blocks, nibbles, offsets and layout can each go wrong without an error message.
#
# ## Go further
#
# - Dettmers et al. 2023, *QLoRA* (arXiv:2305.14314): section 3 for NF4 and double quantisation, table 2, appendix E.
# - Dettmers et al. 2021, *8-bit Optimizers via Block-wise Quantization* (arXiv:2110.02861): sections 1.3 and 2.1.
# - Dettmers et al. 2022, *LLM.int8()* (arXiv:2208.07339): section 4, the outliers of large models.
# - Yoshida 2023, *NF4 Isn't Information Theoretically Optimal (and that's Good)* (arXiv:2306.06965).
# - Frantar et al. 2022, *GPTQ* (arXiv:2210.17323): rounding that takes the layer's inputs into account, not only the
#   weights.
#
# The weights are now small, but they can no longer be trained. Rounding is flat almost everywhere, so no gradient
# passes through it:

# %%
x = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
torch.round(x * 127 / x.detach().abs().max()).sum().backward()
print("gradient through rounding:", x.grad.tolist())

# %% [markdown]
# How do you fine-tune a model whose weights cannot be trained, and have to be unpacked before they can even be
# multiplied? That is **QLoRA**, the next unit.

# %% [markdown] open_question="four_bits_for_a_phone" points=4
# ### Open question
#
# A team wants to run a model with 7 billion parameters on a phone that has 4 GB for its weights. They propose INT4 with
# one scale per matrix, "since it is exactly 4 bits", and want to show with the perplexity on three web pages that
# nothing is lost. Write about ten lines: what you would store instead, how many GB that is, and how you would test it.
# When would INT4 in blocks be a better choice than NF4?
#
# **Rubric.**
# - 1 point: says what is wrong with one scale per matrix, and chooses a block size (and double quantisation or not).
# - 1 point: computes the bytes including the scales, and mentions what stays in 16 bits.
# - 1 point: criticises the test (too little text, changes in the loss cancel) and proposes a more precise one
#   (divergence, tasks, more text).
# - 1 point: describes a case for INT4 that follows from the hardware or from the weights.
