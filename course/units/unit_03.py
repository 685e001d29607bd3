# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 03: GPT-2
#
# This whole course works with one model. Before you change its weights, you write the model yourself, in about thirty
# lines of arithmetic. Then you run the weights of a trained checkpoint through *your* functions, and they write a fairy
# tale.
#
# **By the end of this unit you can**
#
# - split the result of a matrix product into attention heads, and write causal attention with and without a cache;
# - assemble a transformer block, and compute the loss that every fine-tuning in this course minimises;
# - sample the next token with temperature, top-k and top-p;
# - say what the fused matrix `c_attn`, the first one that LoRA adapts, contains.
#
# **Prerequisites**: matrix products and the softmax.
#
# **Time**: about 90 minutes, including less than a minute of computation.
#
# ![The attention of three heads of the bundled GPT-2 as grey squares: each row is a token, each column a token that it
# may attend to. Everything above the diagonal is white. One head attends to the previous token, one to a few tokens,
# one to all previous tokens alike.](unit_03.png)

# %%
import math
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.metrics import load_tales
from lora_from_scratch.gpt2 import generate, load_gpt2
from lora_from_scratch.gpt2.model import merge_heads
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.plotting import curve, label, panels, ranking
from lora_from_scratch.support.progress_bar import tqdm

# %% [markdown]
# ## From text to numbers and back
#
# The bundled model is a GPT-2 with 6 layers of width 256, trained for this course on public-domain children's books.
# Its tokenizer splits a text into pieces from its vocabulary.

# %%
model, tokenizer = load_gpt2("bundled")
config = model.config
SENTENCE = "The old king had three daughters. The youngest daughter met an old"
ids = torch.tensor([tokenizer.encode(SENTENCE)])
tokens = [tokenizer.decode([i]) for i in ids[0].tolist()]
print(tokens)
print("the first five as numbers:", ids[0, :5].tolist(), "of", config.vocab_size)

# %% [markdown]
# What does the model predict? For each of the T tokens that it reads it returns V numbers, one for each token of the
# vocabulary: the **logits** of the token that comes next. A softmax turns them into probabilities.

# %%
with torch.no_grad():
    logits = model(ids)  # (B, T, V): 1 text, its tokens, the vocabulary
print("logits:", tuple(logits.shape))
for token in logits[0, -1].topk(5).indices.tolist():
    print(f"{tokenizer.decode([token])!r:12} {logits[0, -1].softmax(-1)[token]:6.1%}")

# %% [markdown]
# Inside there is little more than sums, products and exponentials. Start with the part through which one token receives
# information from another.

# %% [markdown]
# ## Attention: which token attends to which
#
# Each token t asks a question, its **query** $q_t$. Each token s answers with a **key** $k_s$ and offers a **value**
# $v_s$. Where query and key point in the same direction, token t takes a large share of the value:
#
# $$y_t = \sum_{s \le t} a_{ts} v_s, \qquad
# a_{ts} = \operatorname{softmax}_s\!\left(\frac{q_t \cdot k_s}{\sqrt{hd}}\right)$$
#
# with $q_t, k_s, v_s, y_t \in \mathbb{R}^{hd}$ (Vaswani et al. 2017, section 3.2.1). The sum stops at t: a model that
# has to predict the next token must not see it.
#
# One such weighted mean answers a single question. So the width d is split into H **heads** of hd = d / H columns, and
# each head computes its own attention (section 3.2.2 there). PyTorch multiplies the last two axes and treats all axes
# before them as a batch, so the heads have to move in front of the tokens.

# %%
x = torch.arange(12).view(1, 2, 6)  # (B, T, d): 2 tokens of width 6
print(x)
print("viewed as (1, 2, 3, 2), still token by token:")
print(x.view(1, 2, 3, 2))

# %% [markdown]
# With 3 heads, head 0 has to get the columns 0 and 1 of *both* tokens: the numbers 0, 1, 6, 7. In the second output
# they are not yet next to each other.

# %% exercise="split_heads"

# %% [markdown]
# The inverse, `merge_heads`, is provided: it puts the heads of a token side by side again. Next: what may a query see?
# When a whole text is read at once, there are as many queries as keys. When it is generated token by token, the keys of
# the earlier tokens are in a **cache**: then there are fewer queries than keys, and they belong to the *last* tokens.

# %%
print("5 tokens, 3 of them in the cache:")
print("keys of the tokens    ", [0, 1, 2, 3, 4])
print("queries of the tokens ", [3, 4])

# %% exercise="causal_mask"

# %% [markdown]
# The scores are dot products of vectors with hd entries. How large do they get when the entries are about 1?

# %%
generator = torch.Generator().manual_seed(0)
for width in (4, 32, 256):
    q, k = torch.randn(2, 2000, width, generator=generator)
    scores = (q * k).sum(dim=-1)
    print(f"hd = {width:3}: standard deviation of the scores {scores.std():5.1f}; sqrt(hd) {math.sqrt(width):5.1f}")

# %% [markdown]
# The more columns, the larger the scores, and a softmax of large scores puts nearly all its weight on one key. The
# $\sqrt{hd}$ in the equation compensates for that, whatever the width of a head.

# %% exercise="causal_attention"

# %% [markdown]
# ### A picture of attention
#
# The result of attention is a mean of the values with the weights $a_{ts}$. How can you see the weights themselves? By
# choosing the values: with the identity matrix in place of v, the result *is* the matrix of weights.

# %%
causal_attention = working("causal_attention")


@torch.no_grad()
def attention_weights(ids):
    """The weights of every layer and head for one text: (L, H, T, T)."""
    T = ids.shape[1]
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[:T]
    layers = []
    for block in model.transformer.h:
        q, k, _ = block.attn.project(block.ln_1(x))  # each (1, H, T, hd)
        layers.append(causal_attention(q, k, torch.eye(T).expand(1, config.n_head, T, T))[0])
        x = block(x)
    return torch.stack(layers)


weights = attention_weights(ids)
print("weights:", tuple(weights.shape), "- each row sums to 1:", bool(torch.allclose(weights.sum(-1), torch.ones(()))))

# %% [markdown]
# There are 48 heads. Do some of them have a recognisable function? Measure for each how much of its weight goes, on
# average, to the previous token and to the token itself, and how evenly it is spread. (The entropy of a row indicates
# how many tokens it attends to; it is largest when all weights are equal.)

# %%
T = ids.shape[1]
before = weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)  # (L, H)
itself = weights.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(-1)
entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1)[..., 1:]
spread = (entropy / torch.arange(2, T + 1).log()).mean(-1)  # 1: all tokens equally

print("layer   before   itself   spread     (means over the heads)")
for layer in range(config.n_layer):
    print(f"{layer:5} {before[layer].mean():8.2f} {itself[layer].mean():8.2f} {spread[layer].mean():8.2f}")

# %% [markdown]
# A head with a spread near 1 takes the plain mean of everything so far: it has not learned where to look, or does not
# need to. Is there a layer of such heads in the table? The figure shows three heads: the one that attends most to the
# previous token, of the others the one that attends to the fewest tokens, and the one that spreads its attention most
# evenly.

# %% figure="unit_03.png"


def draw_weights(axes, matrix, title, names=True):
    axes.imshow(matrix.sqrt(), cmap="Greys", vmin=0, vmax=1)
    ticks = range(len(tokens)) if names else []
    axes.set_xticks(ticks, [token.strip() for token in tokens] if names else [], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [token.strip() for token in tokens] if names else [], fontsize=7)
    label(axes, x="attends to" if names else "", y="token" if names else "", title=title)


figure, axes = panels(3, width=3.5, height=3.9)
previous = int(before.argmax())  # heads counted through all layers
focused = spread.flatten().clone()
focused[previous] = 1  # so that a different head is chosen
kinds = {"previous token": previous, "few tokens": int(focused.argmin()), "all tokens alike": int(spread.argmax())}
for axis, (kind, number) in zip(axes, kinds.items(), strict=True):
    layer, head = divmod(number, config.n_head)
    draw_weights(axis, weights[layer, head], f"{kind}\nlayer {layer}, head {head}")
show(
    figure,
    "Three grey squares, with the tokens of a sentence on both axes; darker means more attention (its square root is "
    "drawn). Everything above the diagonal is white. Left: darkest just below the diagonal, at the previous token. "
    "Middle: a few dark cells, at the tokens that this head picks out. Right: an even staircase that becomes paler as "
    "the rows get longer.",
)

# %% [markdown]
# All three are empty above the diagonal: no token sees the future. Browse the layers with the slider. Do the heads of
# one layer do the same thing, or different things?


# %%
def draw_layer(layer):
    figure, axes = panels(config.n_head, width=1.35, height=1.7)
    for head, axis in enumerate(axes):
        draw_weights(axis, weights[layer, head], f"head {head}", names=False)
    return figure


slider(
    draw_layer,
    "layer",
    range(config.n_layer),
    config.n_layer - 2,
    "Eight small grey squares in a row, one for each head of the layer, as in the figure above: all are white above "
    "the diagonal, and differ in where below it they are dark.",
)

# %% [markdown]
# ## The block
#
# Attention moves information between tokens; then an MLP processes each token on its own: it expands to four times the
# width, applies a nonlinearity, and projects back. GPT-2's nonlinearity is the tanh approximation of the GELU
# (Hendrycks and Gimpel 2016, section 2).

# %% exercise="gelu"

# %% [markdown]
# Does it matter which of the two GELUs you use? See how far apart they are.

# %%
gelu = working("gelu")
z = torch.linspace(-4, 4, 801)
gap = (gelu(z) - F.gelu(z)).abs()
print(f"largest difference {gap.max():.5f}, at x = +/-{abs(z[gap.argmax()]):.2f}")

# %% [markdown]
# They are close. Remember this number for the experiment below.
#
# Now the block. In the original Transformer every sum is normalised (Vaswani et al. 2017, section 3.1). GPT-2 moved the
# normalisation to the *input* of each part (Radford et al. 2019, section 2.3), so that an unbroken chain of additions
# runs from the embeddings to the top: the **residual stream**, (B, T, d). Every layer reads from it and adds to it. It
# also gives small corrections to a layer, such as the methods of this course learn, a direct path to the output.

# %% exercise="transformer_block"

# %% [markdown]
# ## Your model
#
# Now put it all together. The checkpoint is nothing but a dictionary of names and tensors. A linear layer of GPT-2 is a
# **Conv1D**, `y = x W + b` with W of shape (in, out): the transpose of what `nn.Linear` stores.

# %%
checkpoint = {name.removeprefix("transformer."): tensor.detach() for name, tensor in model.state_dict().items()}
for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"):
    print(f"{name:24} {tuple(checkpoint[name].shape)}")

# %% prediction="where_is_the_key"

# %% [markdown]
# Here is the whole model as a function of token ids and the checkpoint, using your functions (or the library's, for
# those that do not pass their check yet). Look at `attention`: the function that splits the output of `c_attn` is
# passed in from outside, so that three hypotheses can be tried.

# %%
mine = SimpleNamespace(
    split_heads=working("split_heads"),
    causal_attention=working("causal_attention"),
    gelu=working("gelu"),
    transformer_block=working("transformer_block"),
    cut=lambda qkv: qkv.chunk(3, dim=-1),
)


def conv1d(x, w, name):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]  # (..., in) -> (..., out)


def block(x, w, layer, parts):
    """The residual stream (B, T, d) through one layer."""

    def norm(name):
        return lambda h: F.layer_norm(h, h.shape[-1:], w[f"h.{layer}.{name}.weight"], w[f"h.{layer}.{name}.bias"])

    def attention(h):
        q, k, v = parts.cut(conv1d(h, w, f"h.{layer}.attn.c_attn"))  # each (B, T, d)
        q, k, v = (parts.split_heads(part, config.n_head) for part in (q, k, v))  # each (B, H, T, hd)
        return conv1d(merge_heads(parts.causal_attention(q, k, v)), w, f"h.{layer}.attn.c_proj")

    def mlp(h):
        return conv1d(parts.gelu(conv1d(h, w, f"h.{layer}.mlp.c_fc")), w, f"h.{layer}.mlp.c_proj")

    return parts.transformer_block(x, norm("ln_1"), attention, norm("ln_2"), mlp)


def my_gpt2(ids, w, parts):
    """Token ids (B, T) to logits (B, T, V)."""
    x = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    for layer in range(config.n_layer):
        x = block(x, w, layer, parts)
    x = F.layer_norm(x, x.shape[-1:], w["ln_f.weight"], w["ln_f.bias"])
    return x @ w["wte.weight"].T  # the output matrix is the token embedding


# %% [markdown]
# Here are three ways in which q, k and v might be arranged in the 768 columns. Which one reproduces the model's own
# logits?


# %%
def head_by_head(qkv):
    """[q0 k0 v0 | q1 k1 v1 | ...]"""
    B, T, _ = qkv.shape
    return (part.reshape(B, T, -1) for part in qkv.view(B, T, config.n_head, 3, -1).unbind(dim=3))


def in_turn(qkv):
    """every 24th column"""
    B, T, _ = qkv.shape
    return (part.transpose(2, 3).reshape(B, T, -1) for part in qkv.view(B, T, -1, config.n_head, 3).unbind(dim=4))


for name, cut in {"a": head_by_head, "b": mine.cut, "c": in_turn}.items():
    guess = my_gpt2(ids, checkpoint, SimpleNamespace(**{**vars(mine), "cut": cut}))
    print(f"{name}: largest difference of a logit {(guess - logits).abs().max():.3f}")

# %% check="where_is_the_key"

# %% [markdown]
# One of the three agrees. It uses *your* functions and a checkpoint that `transformers` can load as well. Only the
# output shows which one is right: the other two have the right shapes, run without an error and produce nonsense.
#
# In one line, `c_attn` fuses `W = [W_q | W_k | W_v]`, each (d, d), side by side along the **output** axis. When unit 09
# adapts "the queries and the values", these are its first and last thirds.

# %% [markdown]
# ## The loss
#
# The model is trained to assign a high probability to the next token (Radford et al. 2019, section 2). For a text of
# token ids $x_0 \dots x_{T-1}$ and its logits $z \in \mathbb{R}^{T \times V}$ the loss is the mean over t of
#
# $$-\log \operatorname{softmax}(z_t)[x_{t+1}]$$
#
# in nats. Some positions must not count: padding, and later in the course the prompt. By convention their label is
# -100.

# %%
print(f"uniform guessing: log({config.vocab_size}) = {math.log(config.vocab_size):.2f} nats per token")

# %% exercise="next_token_loss"

# %% [markdown]
# Measure the model on text that it was not trained on: the beginnings of the tales that were written for this course.

# %%
next_token_loss = working("next_token_loss")
tales = torch.tensor([tokenizer.encode(tale)[:128] for tale in load_tales()])  # (8, 128)


@torch.no_grad()
def loss_of(parts, w=checkpoint):
    return float(next_token_loss(my_gpt2(tales, w, parts), tales))


right_loss = loss_of(mine)
print(f"loss {right_loss:.2f} nats per token: like guessing among {math.exp(right_loss):.0f} equally likely tokens")

# %% [markdown]
# ## The experiment: one mistake at a time
#
# The model works. Now break it with mistakes that people really make, one at a time and always with the same trained
# weights, and measure the loss on the tales each time. Guess first: which mistake costs most, and which would you never
# notice?

# %%
split_heads, transformer_block = working("split_heads"), working("transformer_block")
causal_mask = working("causal_mask")


def attend(q, k, v, scale=None, seen=None, axis=-1):
    """Attention with one thing changed; None leaves the part as it should be."""
    T = q.shape[2]
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = causal_mask(T, T) if seen is None else seen
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=axis)
    return weights.nan_to_num() @ v  # a softmax over nothing would be 0 / 0


def sees(offset):
    """Every token sees up to `offset` tokens ahead of itself."""
    return lambda q, k, v: attend(q, k, v, seen=torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(offset))


def post_norm(x, norm_1, attention, norm_2, mlp):
    x = norm_1(x + attention(x))
    return norm_2(x + mlp(x))


c_proj_transposed = {n: w.T if n.endswith("attn.c_proj.weight") else w for n, w in checkpoint.items()}
MISTAKES = {
    "exact GELU": {"gelu": F.gelu},
    "scaled by the model's width": {"causal_attention": lambda q, k, v: attend(q, k, v, scale=config.n_embd**-0.5)},
    "not scaled": {"causal_attention": lambda q, k, v: attend(q, k, v, scale=1)},
    "sees the next token": {"causal_attention": sees(1)},
    "does not see itself": {"causal_attention": sees(-1)},
    "no mask at all": {"causal_attention": sees(10**6)},
    "queries and keys swapped": {"causal_attention": lambda q, k, v: attend(k, q, v)},
    "softmax over the queries": {"causal_attention": lambda q, k, v: attend(q, k, v, axis=-2)},
    "heads by one view": {"split_heads": lambda x, H: x.reshape(x.shape[0], H, x.shape[1], -1)},
    "c_proj transposed": {"w": c_proj_transposed},
    "post-norm": {"transformer_block": post_norm},
}

# %%
losses = {"as it should be": right_loss}
for name, change in tqdm(MISTAKES.items(), desc="mistakes"):
    w = change.get("w", checkpoint)
    losses[name] = loss_of(SimpleNamespace(**{**vars(mine), **change}), w)

# %%
order = ["as it should be", *sorted(MISTAKES, key=losses.get)]
figure, (axes,) = panels(1, width=7.5, height=4.4)
ranking(axes, {name: losses[name] for name in order}, line=("uniform guessing", math.log(config.vocab_size)))
label(axes, x="loss on the tales, in nats per token", title="The same weights, one mistake at a time")
show(
    figure,
    "Horizontal bars: the correct model on top, then eleven mistakes in order of increasing loss; a dotted line marks "
    "the loss of uniform guessing. " + "; ".join(f"{n} {losses[n]:.2f}" for n in order),
)

# %%
for name in ("as it should be", "exact GELU"):
    print(f"{name:16} {losses[name]:.5f}")

# %% [markdown]
# None of the eleven stops with an error. Most of them run, produce words, and look like a somewhat weaker model:
# without the bar on top you would not know that something is wrong. The wrong GELU is invisible in the loss: it changes
# only distant decimal places, upwards or downwards. That is why this course compares every part with a reference to
# many digits, and why "it trains" is not a test.
#
# Did you expect the two mistakes that see the future to have the lowest loss? These weights were *trained* with the
# right mask, so what later tokens contribute is noise to them. It is training without the mask that is dangerous: the
# model learns to copy the answer, reaches a loss near 0, and generates rubbish, because at generation time there is no
# answer to copy.

# %% [markdown]
# ## How far back does it look?
#
# The model's context is 256 tokens. Does it use all of it? Let every token see only the last w tokens, itself included,
# and measure again.


# %%
def window(w):
    def windowed(q, k, v):
        T = q.shape[2]
        older = torch.ones(T, T, dtype=torch.bool).tril(-w)
        return attend(q, k, v, seen=causal_mask(T, T) & ~older)

    return windowed


widths = [1, 2, 4, 8, 16, 32, 64, 128]
by_width = [
    loss_of(SimpleNamespace(**{**vars(mine), "causal_attention": window(w)})) for w in tqdm(widths, desc="window")
]

figure, (axes,) = panels(1, width=5.6, height=3.2)
axes.plot(widths, by_width, "o-", color="black")
axes.set_xscale("log", base=2)
axes.set_xticks(widths, [str(w) for w in widths])
for w, value in zip(widths, by_width, strict=True):
    axes.annotate(f"{value:.2f}", (w, value), xytext=(4, 6), textcoords="offset points")
axes.margins(x=0.1, y=0.2)
label(axes, x="tokens that attention may see", y="loss (nats per token)", title="How much the context helps")
show(
    figure,
    "Loss on the tales against the number of tokens that attention may see, from 1 to 128 on a doubling scale: "
    + ", ".join(f"{w}: {value:.2f}" for w, value in zip(widths, by_width, strict=True)),
)

# %% [markdown]
# Do not read too much into it: the model was trained with its full context, so a narrow window also puts it into a
# situation that it has never seen. The curve shows what *this* model loses, not what a model trained with a short
# window could learn. (A window of 8 does not limit the memory to 8 tokens either: each layer reads what the layer below
# has already gathered, so six layers reach 6 times 7 = 42 tokens back.)

# %% [markdown]
# ## Generating text
#
# Logits are not yet a text. Always taking the most likely token gives a text that repeats itself; sampling from the
# whole distribution lets through, once in a while, one of thousands of very unlikely tokens, and the text never
# recovers. Between these extremes are:
#
# - **temperature** $\tau$: $\operatorname{softmax}(z / \tau)$, sharper below 1, flatter above;
# - **top-k**: only the k most likely tokens (Fan et al. 2018, section 5);
# - **top-p** or nucleus sampling: the fewest tokens that together reach probability p (Holtzman et al. 2020, section
#   3.1), many where the model is unsure and few where it is sure.
#
# `filter_top_k` is provided. Here is what it does, and what a dropped token looks like:

# %%
from lora_from_scratch.gpt2.generation import filter_top_k

print(filter_top_k(torch.tensor([0.5, 2.0, 1.0, -1.0]), k=2))

# %% [markdown]
# Top-p by hand, for four tokens with the probabilities 0.15, 0.5, 0.05 and 0.3, and p = 0.7. From the most likely token
# down, with the sum of the probabilities before each:
#
# | token | probability | sum before it | below 0.7? |
# |---|---|---|---|
# | 1 | 0.5 | 0 | yes: keep |
# | 3 | 0.3 | 0.5 | yes: keep |
# | 0 | 0.15 | 0.8 | no: drop |
# | 2 | 0.05 | 0.95 | no: drop |
#
# So tokens 1 and 3 keep their logits, and tokens 0 and 2 get minus infinity, each in its own place.

# %% exercise="filter_top_p"

# %% [markdown]
# Move the temperature: how do the probabilities change, and how many tokens does p = 0.7 keep?

# %%
filter_top_p = working("filter_top_p")


def draw_temperature(temperature):
    z = logits[0, -1] / temperature
    likely = z.topk(12).indices
    kept = filter_top_p(z, 0.7) > -math.inf
    figure, (axes,) = panels(1, width=6.4, height=3.3)
    shades = ["0.25" if kept[i] else "0.8" for i in likely]
    axes.bar(range(12), z.softmax(-1)[likely], color=shades, edgecolor="0.25")
    axes.set_xticks(range(12), [tokenizer.decode([i]).strip() for i in likely.tolist()], rotation=45)
    title = f"Temperature {temperature:g}: dark bars are kept ({int(kept.sum())} in all)"
    label(axes, x=f"after '... {SENTENCE[-10:]}'", y="probability", title=title)
    return figure


slider(
    draw_temperature,
    "temperature",
    (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0),
    1.0,
    "The twelve most likely next tokens as bars of their probability, falling from left to right; the tokens that "
    "top-p with p = 0.7 keeps are dark, the others light. At a higher temperature the bars even out and more are kept.",
)

# %% exercise="sample_next_token"

# %% [markdown]
# Let it write. `write` is the simplest possible loop: read everything, sample one token, append it to the text, repeat.

# %%
sample_next_token = working("sample_next_token")


@torch.no_grad()
def write(prompt, new_tokens, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    text = tokenizer.encode(prompt)
    for _ in range(new_tokens):
        logits = my_gpt2(torch.tensor([text]), checkpoint, mine)[0, -1]
        text.append(int(sample_next_token(logits, generator=generator, **options)))
    return tokenizer.decode(text)


PROMPT = "Once upon a time there was a miller who"
for name, options in {
    "always the most likely token": {"temperature": 0},
    "temperature 0.8, p = 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature 2": {"temperature": 2.0},
}.items():
    print(f"[{name}]\n{write(PROMPT, 40, **options)}\n")

# %% [markdown]
# Your functions generate text. With the most likely token every time it goes round in circles, with a high temperature
# it falls apart, and in between it is almost a tale. But `write` wastes nearly all of its work.

# %% [markdown]
# ## What a KV cache saves
#
# For the 50th new token `write` reads the whole text again and recomputes the keys and values of all tokens, which have
# not changed since the previous step, because no token depends on a later one. So keep them. The **KV cache** holds k
# and v of every layer, each (B, H, S, hd); a step then reads *one* token, whose query is compared with all S keys.

# %% prediction="tokens_saved"

# %% [markdown]
# Count tokens instead of measuring seconds: a hook records how many tokens each call of the model reads.


# %%
def tokens_read(use_cache):
    """The number of tokens that each step reads, and the text."""
    read = []
    hook = model.register_forward_pre_hook(lambda module, given: read.append(given[0].shape[1]))
    prompt = tokenizer.encode(SENTENCE + " woman, who lived")[:16]
    text = generate(model, [prompt], max_new_tokens=64, use_cache=use_cache)
    hook.remove()
    return read, text


without, text_without = tokens_read(use_cache=False)
with_cache, text_with = tokens_read(use_cache=True)
print("without a cache:", without[:4], "...", sum(without), "tokens")
print("with a cache:   ", with_cache[:4], "...", sum(with_cache), "tokens")
print("the same text:", text_without == text_with, "- ratio", round(sum(without) / sum(with_cache), 1))

# %% check="tokens_saved"

# %% [markdown]
# In multiplications, a token costs $12 L d^2$ for the matrices of the L blocks and $V d$ for the output, and each pair
# of a query and a key costs $2 L d$ for its score and its value. (Attention over T queries and S keys is counted as T
# times S, as a plain implementation computes it.)


# %%
def multiplications(tokens, keys):
    L, d, V = config.n_layer, config.n_embd, config.vocab_size
    return tokens * (12 * L * d * d + V * d) + 2 * L * d * tokens * keys


figure, (axes,) = panels(1, width=6, height=3.4)
cost_without = [multiplications(T, T) / 1e6 for T in without]
cost_with = [multiplications(T, S) / 1e6 for T, S in zip(with_cache, without, strict=True)]
curve(axes, cost_without, label="without a cache", style=0)
curve(axes, cost_with, label="with a cache", style=1)
label(axes, x="new token", y="million multiplications", title="Cost of one more token")
show(
    figure,
    "Million multiplications for each new token, 1 to 64. Without a cache, a rising line; with a cache, the first "
    "token costs as much as without, because the prompt is read, and every later one costs a small, nearly constant "
    "number.",
)

# %% [markdown]
# The price is memory: two numbers for each layer, column and token. There is also a constraint: whatever changes how
# keys and values are computed (LoRA on `c_attn`, for example) must be applied *before* they are stored in the cache.

# %%
SHAPES = {"bundled": (6, 256, 256), "GPT-2 small": (12, 768, 1024), "GPT-2 XL": (48, 1600, 1024)}
for name, (layers, width, context) in SHAPES.items():
    mebibytes = 2 * layers * width * context * 2 / 2**20
    print(f"{name:12} a full context of {context:4} tokens in 16 bits: {mebibytes:7.1f} MiB for each text")

# %% [markdown]
# ## What goes wrong in practice
#
# **A leak that the loss does not show.** To test a causal mask, change the last token and see whether an earlier logit
# changes.

# %%
changed = tales[:1, :20].clone()
changed[0, -1] = (changed[0, -1] + 1) % config.vocab_size
for name in ("as it should be", "sees the next token"):
    parts = SimpleNamespace(**{**vars(mine), **MISTAKES.get(name, {})})
    moved = (my_gpt2(tales[:1, :20], checkpoint, parts) - my_gpt2(changed, checkpoint, parts)).abs()
    print(f"{name:20} earlier logits change by {moved[0, :-1].max():.2f}")

# %% [markdown]
# **A transposed Conv1D.** `c_attn` is (256, 768): if you transpose it by mistake, you get an error. `attn.c_proj` is
# (256, 256), and you get none.

# %%
h = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(0))
for name in ("attn.c_attn", "attn.c_proj"):
    try:
        print(name, "transposed:", tuple((h @ checkpoint[f"h.0.{name}.weight"].T).shape), "- no error")
    except RuntimeError as error:
        print(name, "transposed:", str(error).split("(")[0].strip())

# %% [markdown]
# **Labels shifted twice, or never.** `transformers` shifts inside its loss; other code shifts the labels beforehand. If
# both happen, the model learns to skip a token; if neither does, it learns to repeat. In all three cases the loss falls
# during training.

# %%
with torch.no_grad():
    z = my_gpt2(tales, checkpoint, mine)
shifted = F.pad(tales[:, 1:], (0, 1), value=-100)
print(f"shifted once, in the loss: {next_token_loss(z, tales):.2f}")
print(f"shifted before as well:    {next_token_loss(z, shifted):.2f}")
print(f"never shifted:             {F.cross_entropy(z.flatten(0, 1), tales.flatten()):.2f}")

# %% [markdown]
# **Padding that counts.** Replace half of each text by padding with token 0 and use it as the label: the loss is now
# mostly about the padding. With -100 as the label it is the loss of the texts.

# %%
padded = tales.clone()
padded[:, 64:] = 0
labels = padded.clone()
labels[:, 64:] = -100
with torch.no_grad():
    z = my_gpt2(padded, checkpoint, mine)
print(f"the texts alone:    {next_token_loss(z[:, :64], tales[:, :64]):.2f}")
print(f"padding as -100:    {next_token_loss(z, labels):.2f}")
print(f"padding as token 0: {next_token_loss(z, padded):.2f}")

# %% [markdown]
# **A nucleus without its last token.** If you drop the token that *crosses* p, a confident model has nothing left: all
# logits are minus infinity, and their softmax is NaN.

# %%
sure = torch.tensor([6.0, 1.0, 0.0])
dropped = sure.masked_fill(sure.softmax(-1).cumsum(-1) > 0.9, -math.inf)  # already in descending order
print("one too few:", dropped.tolist(), "->", dropped.softmax(-1).tolist())
print("as it should be:", filter_top_p(sure, 0.9).softmax(-1).tolist())

# %% [markdown]
# ## Summary
#
# 1. Attention is a weighted mean of values; the weights are a softmax of scaled scores over the keys up to the query's
#    position.
# 2. `c_attn` is [W_q | W_k | W_v], (d, 3d), side by side along the output axis; each third is then split into heads.
# 3. A block reads the normalised residual stream and adds to the stream itself; GPT-2 uses the tanh approximation of
#   GELU.
# 4. The loss compares the logits at t with the token at t + 1, shifted once, and ignores every label of -100.
# 5. With a KV cache, generating one more token means reading one token; without it, reading the whole text again.
#
# ## Go further
#
# - Vaswani et al. 2017, *Attention Is All You Need*, section 3: the equations, the scale, post-norm.
# - Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*, section 2: what GPT-2 changed.
# - Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture*, section 3: why pre-norm trains without
#   a warm-up.
# - Holtzman et al. 2020, *The Curious Case of Neural Text Degeneration*, sections 3 and 4: why the most likely text is
#   a bad text.
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*: heads that attend to the previous token,
#   and what they are for.
# - Shazeer 2019, *Fast Transformer Decoding*: why reading the cache, not multiplying, limits the speed of generation.

# %% [markdown] open_question="cache_and_adapters" points=4
# ### Open question
#
# You serve one GPT-2 to forty customers. Each has their own fine-tuned version, and all of their texts begin with the
# same long instruction of 200 tokens. Somebody proposes to compute the KV cache of the instruction once, with the
# original model, and to share it. Which of its keys and values are still right if a customer has trained (a) all
# weights, (b) the last two blocks, (c) only `attn.c_proj` of the last block, (d) only the value columns of `c_attn` in
# the last block? Explain each answer, and say what can be shared.
#
# **Rubric.**
#
# - 1 point: (a) none, because the embeddings and the first layer already change every key and value.
# - 1 point: (b) those of all blocks below the last two; the last two have to be computed for each customer.
# - 1 point: (c) all: this matrix works after its block's keys and values, and no block comes after it.
# - 1 point: (d) all but the values of the last block; its keys and everything below can be shared.

# %% [markdown]
# In this unit you left the pretrained weights as they are. In the next unit you change all of them at once. The model
# then writes what you want. What happens to what it could do before?
