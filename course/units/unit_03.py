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
# Everything in this course is done to one model. Before you change its weights, you write it: about thirty lines of
# arithmetic, and then the numbers of a trained checkpoint flow through *your* functions and come out as a fairy tale.
#
# **Afterwards you can** cut a matrix product into attention heads, write causal attention with and without a cache,
# put a transformer block together, compute the loss that every fine-tuning in this course minimises, draw the next
# token with temperature, top-k and top-p, and say what the fused matrix `c_attn` holds: the one that LoRA adapts first.
#
# **You need** matrix products and the softmax. **It takes** about 90 minutes, and less than a minute of computing.
#
# ![Three heads of the bundled GPT-2 as squares of grey: each row is a token, each column a token that it may look at.
# Everything above the diagonal is white. One head marks the token before, one picks a few tokens, one spreads over the
# past.](unit_03.png)

# %%
import math
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from tqdm import tqdm

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.metrics import load_tales
from lora_from_scratch.gpt2 import generate, load_gpt2
from lora_from_scratch.gpt2.model import merge_heads
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.plotting import curve, label, panels

# %% [markdown]
# ## A text becomes numbers, and numbers become a text
#
# The bundled model is a GPT-2 with 6 layers of width 256, trained for this course on children's books that are in the
# public domain. Its tokenizer cuts a text into pieces that it knows.

# %%
model, tokenizer = load_gpt2("bundled")
config = model.config
SENTENCE = "The old king had three daughters. The youngest daughter met an old"
ids = torch.tensor([tokenizer.encode(SENTENCE)])
tokens = [tokenizer.decode([i]) for i in ids[0].tolist()]
print(tokens)
print("the first five as numbers:", ids[0, :5].tolist(), "of", config.vocab_size)

# %% [markdown]
# What does the model say to that? For each of the T tokens that it reads it gives V numbers, one for each token of the
# vocabulary: the **logits** of what comes next. A softmax makes probabilities of them.

# %%
with torch.no_grad():
    logits = model(ids)  # (B, T, V): 1 text, its tokens, the vocabulary
print("logits:", tuple(logits.shape))
for token in logits[0, -1].topk(5).indices.tolist():
    print(f"{tokenizer.decode([token])!r:12} {logits[0, -1].softmax(-1)[token]:6.1%}")

# %% [markdown]
# Nothing in there is more than sums, products and one exponential. Which ones? Start with the part that lets one token
# know of another.

# %% [markdown]
# ## Attention: who looks at whom
#
# Each token t asks a question, its **query** $q_t$. Each token s answers with a **key** $k_s$ and offers a **value**
# $v_s$. Where query and key point the same way, token t takes much of the value:
#
# $$y_t = \sum_{s \le t} a_{ts} v_s, \qquad
# a_{ts} = \operatorname{softmax}_s\!\left(\frac{q_t \cdot k_s}{\sqrt{hd}}\right)$$
#
# with $q_t, k_s, v_s, y_t \in \mathbb{R}^{hd}$ (Vaswani et al. 2017, section 3.2.1). The sum stops at t: a model that
# has to predict the next token must not look at it.
#
# One such weighted mean can ask one question at a time. So the width d is cut into H **heads** of hd = d / H columns,
# and each head does its own attention (section 3.2.2 there). PyTorch multiplies the last two axes and treats all axes
# before them as a batch: the heads have to move in front of the tokens.

# %%
x = torch.arange(12).view(1, 2, 6)  # (B, T, d): 2 tokens of width 6
print(x)
print("seen as (1, 2, 3, 2), still token by token:")
print(x.view(1, 2, 3, 2))

# %% [markdown]
# With 3 heads, head 0 has to get the columns 0 and 1 of *both* tokens: the numbers 0, 1, 6, 7. In the second print they
# are not side by side yet.

# %% exercise="split_heads"

# %% [markdown]
# The way back, `merge_heads`, is ready-made: it lays the heads of a token side by side again. Now for what a query may
# see. When a text is read at once there are as many queries as keys. But when it is written token by token, the keys of
# what was read before lie in a **cache**: then there are fewer queries than keys, and they stand at the *end*.

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
    print(f"hd = {width:3}: the scores spread by {scores.std():5.1f}; the root of hd is {math.sqrt(width):5.1f}")

# %% [markdown]
# The more columns, the larger the scores, and a softmax of large scores looks at one key and forgets the others. The
# $\sqrt{hd}$ in the equation takes that away, whatever the width of a head.

# %% exercise="causal_attention"

# %% [markdown]
# ### A picture of attention
#
# The result of attention is a mean of the values with the weights $a_{ts}$. How can you see the weights themselves? You
# choose the values: with the identity matrix in the place of v, what comes out *is* the matrix of weights.

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
# 48 heads. Which of them do something that has a name? Measure for each how much of its weight goes, on average, to
# the token before and to the token itself, and how far it spreads. (The entropy of a row says how many tokens it
# looks at; that of an even spread is the largest there is.)

# %%
T = ids.shape[1]
before = weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)  # (L, H)
itself = weights.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(-1)
entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1)[..., 1:]
spread = (entropy / torch.arange(2, T + 1).log()).mean(-1)  # 1: all tokens alike

print("layer   before   itself   spread     (means over the heads)")
for layer in range(config.n_layer):
    print(f"{layer:5} {before[layer].mean():8.2f} {itself[layer].mean():8.2f} {spread[layer].mean():8.2f}")

# %% [markdown]
# A spread near 1 is a head that takes the plain mean of all that came before: it has not learned where to look, or has
# no need to. Is there a layer of such heads in the table? Here are three: the one that looks most at the token before,
# the one that looks at the fewest tokens of all others, and the one that spreads most.

# %% figure="unit_03.png"


def draw_weights(axes, matrix, title, names=True):
    axes.imshow(matrix.sqrt(), cmap="Greys", vmin=0, vmax=1)
    ticks = range(len(tokens)) if names else []
    axes.set_xticks(ticks, [token.strip() for token in tokens] if names else [], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [token.strip() for token in tokens] if names else [], fontsize=7)
    label(axes, x="looks at" if names else "", y="token" if names else "", title=title)


figure, axes = panels(3, width=3.5, height=3.9)
previous = int(before.argmax())  # heads counted through all layers
focused = spread.flatten().clone()
focused[previous] = 1  # another one
kinds = {"the token before": previous, "few tokens": int(focused.argmin()), "all alike": int(spread.argmax())}
for axis, (kind, number) in zip(axes, kinds.items(), strict=True):
    layer, head = divmod(number, config.n_head)
    draw_weights(axis, weights[layer, head], f"{kind}\nlayer {layer}, head {head}")
show(
    figure,
    "Three squares of grey, tokens of a sentence on both axes; darker means more attention (its square root is "
    "drawn). Above the diagonal all is white. Left: darkest just below the diagonal, the token before. Middle: a few "
    "dark cells, where this head has found what it looks for. Right: an even staircase that pales as the rows grow.",
)

# %% [markdown]
# All three are empty above the diagonal: nobody looks into the future. Look through the layers with the slider. Do the
# heads of one layer do the same, or different things?


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
    "Eight small squares of grey in a row, one for each head of the layer, in the form of the figure above: all are "
    "white above the diagonal, and differ in where below it they are dark.",
)

# %% [markdown]
# ## The block
#
# Attention moves information between tokens; then each token works on it alone, in an MLP: up to four times the width,
# a bend, and down again. GPT-2's bend is the tanh approximation of the GELU (Hendrycks and Gimpel 2016, section 2).

# %% exercise="gelu"

# %% [markdown]
# Why does it matter which of the two GELUs you take? See how far apart they are.

# %%
gelu = working("gelu")
z = torch.linspace(-4, 4, 801)
gap = (gelu(z) - F.gelu(z)).abs()
print(f"largest difference {gap.max():.5f}, at x = {abs(z[gap.argmax()]):.2f} and its mirror image")

# %% [markdown]
# Little. Keep that number in mind for the experiment below.
#
# Now the block. In the original Transformer every sum is normalised (Vaswani et al. 2017, section 3.1). GPT-2 moved the
# normalisation to the *input* of each part (Radford et al. 2019, section 2.3), so that an unbroken line of sums runs
# from the embeddings to the top: the **residual stream**, (B, T, d). Every layer reads from it and adds to it. That is
# also why a method that adds a small correction to a layer, as all of this course's do, has so direct a way to the
# output.

# %% exercise="transformer_block"

# %% [markdown]
# ## Your model
#
# Now put it together. The checkpoint is a dictionary of names and tensors, and nothing else. A linear layer of GPT-2 is
# a **Conv1D**, `y = x W + b` with W of shape (in, out): the transpose of what `nn.Linear` stores.

# %%
checkpoint = {name.removeprefix("transformer."): tensor.detach() for name, tensor in model.state_dict().items()}
for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"):
    print(f"{name:24} {tuple(checkpoint[name].shape)}")

# %% prediction="where_is_the_key"

# %% [markdown]
# Here is the whole model as a function of token ids and the checkpoint, with your functions in it (or the library's,
# for those that do not pass their check yet). Read `attention`: what cuts the output of `c_attn` is given from outside,
# so that three guesses can be tried.

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
    return x @ w["wte.weight"].T  # the output matrix is the token embedding itself


# %% [markdown]
# Three ways in which q, k and v might lie in the 768 columns. Which gives the checkpoint's own logits?


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
# One of the three differs by nothing. Those are *your* functions, and a checkpoint that `transformers` loads as well.
# Only the output told you: the other two have the right shapes, run without a complaint and talk nonsense.
#
# What `c_attn` fuses, in one line: `W = [W_q | W_k | W_v]`, each (d, d), side by side on the **output** axis. When unit
# 09 adapts "the queries and the values", these are its first and last thirds.

# %% [markdown]
# ## The loss
#
# The model is trained to make the next token likely (Radford et al. 2019, section 2). For a text of token ids
# $x_0 \dots x_{T-1}$ and its logits $z \in \mathbb{R}^{T \times V}$ the loss is the mean over t of
#
# $$-\log \operatorname{softmax}(z_t)[x_{t+1}]$$
#
# in nats. Some labels must not count: padding, and later in the course the prompt. By convention their label is -100.

# %%
print(f"a model that knows nothing: log({config.vocab_size}) = {math.log(config.vocab_size):.2f} nats a token")

# %% exercise="next_token_loss"

# %% [markdown]
# Measure the model on text that it has never read: the beginnings of the tales that were written for this course.

# %%
next_token_loss = working("next_token_loss")
tales = torch.tensor([tokenizer.encode(tale)[:128] for tale in load_tales()])  # (8, 128)


@torch.no_grad()
def loss_of(parts, w=checkpoint):
    return float(next_token_loss(my_gpt2(tales, w, parts), tales))


right_loss = loss_of(mine)
print(f"loss {right_loss:.2f} nats a token: as if it had to choose between {math.exp(right_loss):.0f} tokens each time")

# %% [markdown]
# ## The experiment: one mistake at a time
#
# The model works. Now break it, in ways in which people do break it: one mistake at a time, in the same trained
# weights, and each time the loss on the tales. Guess first: which mistake costs most, and which would you never notice?

# %%
split_heads, transformer_block = working("split_heads"), working("transformer_block")
causal_mask = working("causal_mask")


def attend(q, k, v, scale=None, seen=None, axis=-1):
    """Attention with something changed; None: as it should be."""
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
shades = ["0.15" if name == "as it should be" else "0.6" for name in order]
axes.barh(order, [losses[name] for name in order], color=shades)
for place, name in enumerate(order):
    axes.annotate(f"{losses[name]:.2f}", (losses[name], place), xytext=(4, 0), textcoords="offset points", va="center")
axes.axvline(math.log(config.vocab_size), color="black", linestyle=":")
axes.annotate(
    "knows nothing",
    (math.log(config.vocab_size), 0),
    xytext=(-4, 0),
    textcoords="offset points",
    ha="right",
    va="center",
)
axes.set_ylim(len(order) - 0.4, -1)
label(axes, x="loss on the tales, in nats a token", title="The same weights, one mistake at a time")
show(
    figure,
    "Horizontal bars: the right model on top, then eleven mistakes by their loss from small to large; a "
    "dotted line marks the loss of a model that knows nothing. " + "; ".join(f"{n} {losses[n]:.2f}" for n in order),
)

# %%
for name in ("as it should be", "exact GELU"):
    print(f"{name:16} {losses[name]:.5f}")

# %% [markdown]
# Not one of the eleven stopped with an error. Most of them are models that run, write words, and look like a somewhat
# weaker model: without the bar on top you would not know that something is wrong. The wrong GELU cannot be seen in the
# loss at all; it moves it somewhere behind the decimal point, upwards or downwards. That is why every part in this
# course is compared with a reference to many digits, and why "it trains" is not a test.
#
# Did you expect the two bars that see the future to be the shortest? These weights were *trained* with the right mask:
# what a later token offers is noise to them. A model that is trained without the mask is the dangerous one: it learns
# to copy the answer, has a loss near 0, and writes rubbish, since there is no answer to copy when it writes.

# %% [markdown]
# ## How far back does it look?
#
# The context of the model is 256 tokens. Does it use them? Let every token see only the last w tokens, itself included,
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
label(axes, x="tokens that attention may see", y="loss (nats a token)", title="What the past is worth")
show(
    figure,
    "Loss on the tales over the number of tokens that attention may see, from 1 to 128 on a doubling scale: "
    + ", ".join(f"{w}: {value:.2f}" for w, value in zip(widths, by_width, strict=True)),
)

# %% [markdown]
# A caution before you read much into it: the model was trained with all of its context, so a narrow window also puts it
# into a situation that it has never met. The curve says what *this* model loses, not what a model with a short
# memory could learn. (And a window of 8 is not a
# memory of 8: what a token has read is read by the next layer, so that six layers reach 6 times 7 = 42 tokens back.)

# %% [markdown]
# ## Writing
#
# Logits are not yet a text. Taking the most likely token every time gives a text that repeats itself; drawing from the
# whole distribution lets, once in a while, one of thousands of nearly impossible tokens through, and the text never
# recovers. Between the two:
#
# - **temperature** $\tau$: $\operatorname{softmax}(z / \tau)$, sharper below 1, flatter above;
# - **top-k**: only the k most likely tokens (Fan et al. 2018, section 5);
# - **top-p** or nucleus: the fewest tokens that together reach probability p (Holtzman et al. 2020, section 3.1), many
#   where the model is unsure and few where it is sure.
#
# `filter_top_k` is ready-made. Here is what it does, and what a dropped token looks like:

# %%
from lora_from_scratch.gpt2.generation import filter_top_k

print(filter_top_k(torch.tensor([0.5, 2.0, 1.0, -1.0]), k=2))

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
    title = f"Temperature {temperature:g}: the dark ones are kept ({int(kept.sum())} in all)"
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
# Let it write. `write` is the plainest loop there is: read everything, draw one token, put it behind the text, again.

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
    "always the likeliest": {"temperature": 0},
    "temperature 0.8, p = 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature 2": {"temperature": 2.0},
}.items():
    print(f"[{name}]\n{write(PROMPT, 40, **options)}\n")

# %% [markdown]
# Your functions write. The likeliest word every time goes round in circles, a high temperature falls apart, and between
# the two stands nearly a tale. But `write` wastes almost all of its work.

# %% [markdown]
# ## What a KV cache saves
#
# For the 50th new token `write` reads the whole text again: all keys and values of all tokens, which are the same as
# one step before, since no token depends on a later one. So keep them. The **KV cache** holds k and v of every layer,
# each (B, H, S, hd); a step then reads *one* token, whose query meets all S keys.

# %% prediction="tokens_saved"

# %% [markdown]
# Count rather than measure seconds: a hook notes how many tokens each call of the model reads.


# %%
def tokens_read(use_cache):
    """How many tokens each step reads; and the text."""
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
# In multiplications: a token costs $12 L d^2$ for the matrices of the L blocks and $V d$ for the output, and each pair
# of a query and a key $2 L d$ for its score and its value. (Attention over T queries and S keys is counted in full,
# T times S, as a plain implementation computes it.)


# %%
def multiplications(tokens, keys):
    L, d, V = config.n_layer, config.n_embd, config.vocab_size
    return tokens * (12 * L * d * d + V * d) + 2 * L * d * tokens * keys


figure, (axes,) = panels(1, width=6, height=3.4)
cost_without = [multiplications(T, T) / 1e6 for T in without]
cost_with = [multiplications(T, S) / 1e6 for T, S in zip(with_cache, without, strict=True)]
curve(axes, cost_without, label="without a cache", style=0)
curve(axes, cost_with, label="with a cache", style=1)
label(axes, x="new token", y="million multiplications", title="What one more token costs")
show(
    figure,
    "Million multiplications for each new token, 1 to 64. Without a cache a rising line; with a cache the first token "
    "costs as much as without, since the prompt is read, and every other one a small, nearly constant number.",
)

# %% [markdown]
# What is the price? Memory: two numbers for each layer, column and token. And a duty: whoever changes how keys and
# values are made (a LoRA on `c_attn`, say) must do so *before* they go into the cache.

# %%
SHAPES = {"bundled": (6, 256, 256), "GPT-2 small": (12, 768, 1024), "GPT-2 XL": (48, 1600, 1024)}
for name, (layers, width, context) in SHAPES.items():
    mebibytes = 2 * layers * width * context * 2 / 2**20
    print(f"{name:12} a full context of {context:4} tokens in 16 bits: {mebibytes:7.1f} MiB for each text")

# %% [markdown]
# ## What goes wrong in practice
#
# **A leak that no loss shows.** The test for a causal mask takes two lines: change the last token, and see whether an
# earlier logit moves.

# %%
changed = tales[:1, :20].clone()
changed[0, -1] = (changed[0, -1] + 1) % config.vocab_size
for name in ("as it should be", "sees the next token"):
    parts = SimpleNamespace(**{**vars(mine), **MISTAKES.get(name, {})})
    moved = (my_gpt2(tales[:1, :20], checkpoint, parts) - my_gpt2(changed, checkpoint, parts)).abs()
    print(f"{name:20} earlier logits move by {moved[0, :-1].max():.2f}")

# %% [markdown]
# **A transposed Conv1D.** `c_attn` is (256, 768): transposed by mistake, it stops with an error. `attn.c_proj` is
# (256, 256), and nothing stops you.

# %%
h = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(0))
for name in ("attn.c_attn", "attn.c_proj"):
    try:
        print(name, "transposed:", tuple((h @ checkpoint[f"h.0.{name}.weight"].T).shape), "- no error")
    except RuntimeError as error:
        print(name, "transposed:", str(error).split("(")[0].strip())

# %% [markdown]
# **Labels shifted twice, or never.** `transformers` shifts inside its loss, other code shifts the labels beforehand. Do
# both and the model learns to skip a token; do neither and it learns to repeat. All three are a number that falls.

# %%
with torch.no_grad():
    z = my_gpt2(tales, checkpoint, mine)
shifted = F.pad(tales[:, 1:], (0, 1), value=-100)
print(f"shifted once, in the loss: {next_token_loss(z, tales):.2f}")
print(f"shifted before as well:    {next_token_loss(z, shifted):.2f}")
print(f"never shifted:             {F.cross_entropy(z.flatten(0, 1), tales.flatten()):.2f}")

# %% [markdown]
# **Padding that counts.** Pad half of each text with token 0 and leave the labels as they are: the loss is now mostly
# about something else. With -100 it is the loss of the texts.

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
# **A nucleus without its last token.** Drop the token that *crosses* p and a confident model has nothing left: all
# logits are minus infinity, and the softmax of that is not a number.

# %%
sure = torch.tensor([6.0, 1.0, 0.0])
dropped = sure.masked_fill(sure.softmax(-1).cumsum(-1) > 0.9, -math.inf)  # these are in falling order already
print("one too few:", dropped.tolist(), "->", dropped.softmax(-1).tolist())
print("as it should be:", filter_top_p(sure, 0.9).softmax(-1).tolist())

# %% [markdown]
# ## Summary
#
# 1. Attention is a mean of values; its weights are a softmax of scaled scores over the keys up to the query's place.
# 2. `c_attn` is [W_q | W_k | W_v], (d, 3d), side by side on the output axis; each third is cut into heads afterwards.
# 3. A block reads the normalised residual stream and adds to the stream itself; GPT-2's GELU is the tanh one.
# 4. The loss compares the logits at t with the token at t + 1, shifted once, and leaves out every label of -100.
# 5. With a KV cache one more token costs one token; without it, the whole text again.
#
# ## Go further
#
# - Vaswani et al. 2017, *Attention Is All You Need*, section 3: the equations, the scale, post-norm.
# - Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*, section 2: what GPT-2 changed.
# - Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture*, section 3: why pre-norm trains without
#   a warm-up.
# - Holtzman et al. 2020, *The Curious Case of Neural Text Degeneration*, sections 3 and 4: why the likeliest text is a
#   bad text.
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*: heads that look at the token before, and
#   what they are for.
# - Shazeer 2019, *Fast Transformer Decoding*: why reading the cache, not multiplying, limits the speed of generation.

# %% [markdown] open_question="cache_and_adapters" points=4
# ### Open question
#
# You serve one GPT-2 to forty customers. Each has a fine-tuned version of their own, and all of their texts begin with
# the same long instruction of 200 tokens. Somebody proposes to compute the KV cache of the instruction once, with the
# model as it was, and to share it. Which of its keys and values are still right if a customer has trained
# (a) all weights, (b) the last two blocks, (c) only `attn.c_proj` of the last block, (d) only the value columns of
# `c_attn` in the last block? Say for each why, and what can be shared.
#
# **Rubric.**
#
# - 1 point: (a) none, because the embeddings and the first layer already change every key and value.
# - 1 point: (b) those of all blocks below the last two; the last two have to be computed for each customer.
# - 1 point: (c) all: this matrix works after its block's keys and values, and no block comes after it.
# - 1 point: (d) all but the values of the last block; its keys and everything below can be shared.

# %% [markdown]
# Every number in this unit was somebody else's: the weights are what they are. In the next unit you change them, all of
# them at once. The model then writes what you want. What does it forget for it?
