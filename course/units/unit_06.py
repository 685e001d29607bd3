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
# - prepend trained keys and values to every layer of a GPT-2, and say what untrained ones do;
# - train this prefix through an MLP, discard the MLP, and keep a file of about 200 kB;
# - gate the prefix so that the model starts out unchanged;
# - say what a prefix costs, and why a longer one is not necessarily better.
#
# **Prerequisites**: attention (unit 03), a training run (unit 04) and, for comparison, soft prompts (unit 05).
#
# **Time**: about 80 minutes, including 2 minutes of computation. 7 exercises, 2 predictions, one open question.
#
# ![Left, training loss curves of four methods: two prefixes, one computed by an MLP and one trained directly, start
# high and end lowest; a gated prompt and a soft prompt start low and change less. Right, the held-out loss for three
# lengths of the prefix, with three seeds each.](unit_06.png)

# %%
import copy
import os
from itertools import pairwise

import safetensors.torch
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import KVCache, load_gpt2
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.prompt_tuning import PromptTuning
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 15 minutes and 6 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 24))  # of each training run
BATCH = 4

# %% [markdown]
# ## Trained keys and values in every layer
#
# A soft prompt (unit 05) acts only at the input. The first layer reads its vectors like words, and the layers above see
# only what the frozen layers below compute from them. The gradient has a long way to go, and the prompt has little
# influence.
#
# What does a token see of the text before it? In each layer, only the **keys** and **values** of the earlier tokens.
# Once these are computed, it no longer matters which words they came from; that is why generation can keep them in a
# cache (unit 03). So no words are needed: prepend P keys and values of your own in *every* layer, and the model behaves
# as if it had read something. This is a **prefix** (Li and Liang 2021, arXiv:2101.00190, section 4.2). For one head,
# with q (T, hd) and K, V (T, hd) of the text:
#
# $$\mathrm{softmax}\!\left(\frac{q\,[P_K; K]^\top}{\sqrt{hd}} + \mathrm{mask}\right)[P_V; V]$$
#
# - $P_K$ and $P_V$ (P, hd): the prefix's keys and values, **trained**, separately for each layer and each head;
# - $[P_K; K]$ (P + T, hd): the concatenation of both.

# %% exercise="prefix_attention"

# %% [markdown]
# Try it with numbers that you can check by hand: the score of every key is 0 (q is zero), so all weights are equal.

# %%
attend = working("prefix_attention")

q = torch.zeros(1, 1, 2, 4)  # two tokens, one head
v = torch.ones(1, 1, 2, 4)
for length in (1, 3, 9):
    nothing = torch.zeros(1, 1, length, 4)
    y = attend(q, v, v, nothing, nothing)
    print(f"P = {length}: all values of the text are 1, the outputs are {y[0, 0, 0, 0]:.2f} and {y[0, 0, 1, 0]:.2f}")

# %% [markdown]
# ## Initialisation with zeros
#
# Most methods can start from the unchanged model that you loaded. How would you initialise a prefix?

# %% prediction="zero_prefix"

# %% [markdown]
# Before you look at the result, write a tool to measure it. The weights of a softmax add up to 1. The part that goes to
# the prefix is its **share**, $\lambda$. With it you can decompose prefix attention (He et al. 2022, arXiv:2110.04366,
# section 3.1):
#
# $$\text{prefix attention} = (1 - \lambda)\ \text{attention to the text} + \lambda\ \text{attention to the prefix}.$$
#
# There is one share per token and head: (B, H, T).

# %% exercise="prefix_share"

# %% [markdown]
# Does this decomposition hold? Test it on random numbers.

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
print("share of the prefix for each of 6 tokens:", [f"{s:.2f}" for s in part[0, 0, :, 0].tolist()])

# %% [markdown]
# (The first token sees nothing of the text but itself, so its share is large: a prefix affects the beginning of a text
# most.)
#
# ## One row for all layers
#
# A prefix is stored as one matrix, (P, 2 L d): for each virtual token a row with the K and V of every layer, in PEFT's
# layout. The model needs them by layer and head.

# %% [markdown]
# One prefix by hand: P = 2 virtual tokens, L = 2 layers, d = 4, H = 2 heads, so hd = 2. Let the first row contain the
# numbers 0, 1, ..., 15 and the second 100, 101, ..., 115. Each entry of the table is a (P, hd) block, with the rows
# separated by a semicolon:
#
# | | head 0 | head 1 |
# |---|---|---|
# | K of layer 0 | 0, 1; 100, 101 | 2, 3; 102, 103 |
# | V of layer 0 | 4, 5; 104, 105 | 6, 7; 106, 107 |
# | K of layer 1 | 8, 9; 108, 109 | 10, 11; 110, 111 |
# | V of layer 1 | 12, 13; 112, 113 | 14, 15; 114, 115 |

# %% exercise="split_prefix"

# %% [markdown]
# How many numbers is that? Li and Liang use P = 5 for table-to-text on GPT-2 medium (24 layers, d = 1024) and speak of
# 0.1 % of the parameters (section 6.1). But they do not train the prefix itself: they train a small network that
# computes it (section 4.3), with an embedding $E$ (P, d) and a hidden layer of width m:
#
# $$E \longrightarrow \mathrm{Linear}(d, m) \longrightarrow \tanh \longrightarrow \mathrm{Linear}(m, 2 L d).$$
#
# This is a **reparametrisation**: the same prefix expressed by different parameters.

# %% exercise="prefix_parameter_count"

# %%
count = working("prefix_parameter_count")

medium = 354_823_168  # GPT-2 medium
for name, hidden in {"kept, the prefix itself": None, "trained, with an MLP of m = 512": 512}.items():
    numbers = count(24, 1024, 5, hidden)
    print(f"{name:<33} {numbers:>12,}  {numbers / medium:6.2%} of GPT-2 medium")

# %% [markdown]
# About a tenth of a per cent is *kept*, and a hundred times as much is *trained*. If you compare methods by their
# number of trained parameters, you have to say which of the two you mean. (For LoRA, unit 09, they are the same.)
#
# ## The encoder
#
# Now write the module that holds all this. `enter`, which passes the prefix to the model as past keys and values, is
# provided; it uses your `split_prefix`. You write the encoder's parameters and the method that computes the prefix.
# `seeded_linear(in, out, generator)`, also provided, creates a linear layer with reproducible random weights.

# %% [markdown]
# A tiny encoder by hand: P = 2, L = 1, d = 2 and m = 1, so a row of the prefix has 2 L d = 4 numbers, two for K and two
# for V. Suppose that
#
# - the embedding has the rows (1, 0) and (0, 2);
# - the first linear layer has the weights (0.5, 0.5) and the bias 0, so the hidden layer is $\tanh(0.5) = 0.46$ for the
#   first row and $\tanh(1) = 0.76$ for the second;
# - the second linear layer multiplies this number by (1, 2, 0, -1) and adds the bias (0, 0, 1, 0).
#
# The prefix has the rows (0.46, 0.92, 1, -0.46) and (0.76, 1.52, 1, -0.76). The 4 + 3 + 8 = 15 numbers of the embedding
# and the two layers are trained to obtain these 8. Without an MLP, the 8 numbers are the embedding.

# %% exercise="PrefixEncoder"

# %% [markdown]
# After training the MLP is no longer needed. Its output does not depend on the text: compute it once, and discard the
# rest.

# %% exercise="fold_prefix"

# %% [markdown]
# Now put a prefix into the model, and measure its effect before any training.

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
    """A frozen copy of the base with a new prefix, or with a prefix of these values, (P, 2 L d)."""
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
# Two effects have to be separated. After a prefix of length P the text starts at position P, as in PEFT, and GPT-2 has
# a learned embedding for each position. So also compare with a model that has no prefix but shifted positions.


# %%
class Shifted(nn.Module):
    """The base, reading a text as if P tokens came before it."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, ids):
        return base(ids, position_ids=torch.arange(ids.shape[1])[None] + self.length)


print(f"the base: {before:.3f} nats per token\n")
print("  P   only shifted   a prefix of zeros   from a new encoder (MLP)   N(0, 1)")
for length in (1, 16, 64):
    losses = [
        completion_loss(model, held_out)
        for model in (Shifted(length), zeros(length), with_prefix(length), with_prefix(length, hidden=None))
    ]
    print("{:>3}   {:>12.3f}   {:>17.3f}   {:>24.3f}   {:>7.3f}".format(length, *losses))

# %% check="zero_prefix"

# %% [markdown]
# Look at the first column as well: with a long prefix the shift of the positions alone raises the loss. At P = 64 it
# even costs more than the shift together with 64 zeros. A new encoder's prefix has small entries, and has about the
# same effect as zeros; large random numbers have a larger one.
#
# Where does the attention go? Your function tells you, layer by layer. Move the slider to make the prefix of zeros
# longer.


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
        axes, x="layer", y="share of the attention", title=f"P = {length}, all zeros: bars are layers, points are heads"
    )
    return figure


slider(
    draw_shares,
    "P",
    [1, 4, 16, 64],
    16,
    "Bars of the share of the attention that a prefix of zeros takes in each layer, and a point for each head. The "
    "heads of one layer differ a lot. With a longer prefix most bars grow, but not all.",
)

# %% [markdown]
# ## Training directly, or through an MLP?
#
# Why train through an MLP that is discarded afterwards? Li and Liang report that training the prefix directly is
# unstable and ends worse (section 4.3). Try both, with the same batches. The library's learning rate was chosen for the
# encoder with the MLP; training the prefix directly may need quite a different one, so try three, far apart.


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
# Is the best of the direct rates in the middle of the three? Then the range was wide enough; always check whether the
# best setting lies at the edge of what was tried.
#
# In the committed run it is in the middle, and comes *close* to the MLP. This explains much of the MLP's effect: Adam
# moves every number by about the learning rate per step (unit 04). A directly trained entry of the prefix moves by just
# that. An entry computed by the MLP depends on hundreds of numbers that all move, and their effects add up: the prefix
# moves far at a rate that looks small. The second line shows the drawback: at four times the rate, the steps overshoot.
# (This is also why `train` warms up for a quarter of this short run. "Prefix tuning is difficult to optimize", write Hu
# et al. 2021, section 3, about this method.)
#
# The remaining difference may be an effect of the MLP itself (all rows, layers and heads share it), or chance: this is
# one seed, a short run, and the best of three rates was chosen on the cards on which it is evaluated. Li and Liang
# report that direct training *ends* worse. Liu et al. (2022, *P-tuning v2*, arXiv:2110.07602) find that it depends on
# the task.

# %%
with torch.no_grad():
    new, after = fold(with_prefix(16).virtual_tokens), fold(trained.virtual_tokens)
    folded = with_prefix(16, values=after)
    same = torch.equal(folded(text), trained(text))
moved = (after - new).abs()
print(
    f"on average the prefix's entries have moved by {moved.mean():.2f}; {STEPS} steps of {rate:g} are "
    f"{STEPS * rate:.2f}"
)
print(f"after folding, the logits are bitwise identical: {same}")

# %% [markdown]
# ## Length of the prefix
#
# More virtual tokens mean more parameters. Are they better? Compare three lengths with the same number of steps, the
# same learning rate and three seeds each (for the initialisation and the order of the batches); with a single seed you
# could not tell whether a difference means anything.

# %%
LENGTHS = (1, 16, 64)
sweep = {16: [runs["MLP", 1][1]]}  # its first seed has already been trained


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
# From 1 to 16 the loss falls a lot. From 16 to 64 the prefix gets four times the parameters, but in the committed run
# the mean is *worse*, while the best seed is no worse than with 16. Is that a real effect? The last line says what
# three seeds allow you to claim, which is not much: more parameters do not help here, and may hurt. The experiment does
# not show *why*.
#
# The literature reports the same, with possible reasons. Li and Liang find improvements up to about 10 virtual tokens
# on table-to-text and up to 200 on summarisation, then slightly worse results with a *lower* training loss, that is,
# overfitting (section 7.1). Hu et al. (2021, section 5.5 and figure 2) find that on GPT-3 prefixes get worse beyond 32
# virtual tokens; they suspect that so many of them move the input away from what the model was trained on. In any case,
# **the length is a hyperparameter, not a budget to be used up.**
#
# ## Your own start
#
# In the committed run, a prefix of 16 virtual tokens that is trained directly stays behind the one computed by the MLP.
# Is the MLP needed to do better, or is a better start enough? All direct runs above began with numbers from N(0, 1).
# You may begin with any matrix (16, 2 L d): zeros as below, random numbers of another size (`torch.randn` with
# `generator=seeded(0)`), or what the frozen model computes for the first 16 tokens of a text that you choose, by
# `keys_and_values`. Change `my_start`, and `MY_RATE` if you like; write down what you expect, and run the cell. Your
# prefix is trained once, with the same batches as the MLP with seed 0. One run proves little, so your start wins only
# if its loss is below those of all three seeds of the MLP.

# %%
MY_RATE = best_direct * rate


def keys_and_values(words):
    """What the frozen model computes for the first 16 tokens of a text, in the layout of a prefix, (16, 2 L d)."""
    cache = KVCache()
    with torch.no_grad():
        base(torch.tensor([tokenizer.encode(words)[:16]]), cache=cache)
    parts = [part[0] for layer in cache.layers for part in layer]  # K and V of each layer, (H, P, hd)
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)


def my_start():
    """The initial prefix (16, 2 L d). Change this line."""
    return torch.zeros(16, 2 * config.n_layer * config.n_embd)


def compare_with_the_mlp(start, my_rate):
    """Train a prefix directly from your start, and say whether it is outside the range of the MLP's three seeds."""
    values, shape = torch.as_tensor(start()), (16, 2 * config.n_layer * config.n_embd)
    if values.shape != shape:
        return f"A start has the shape {shape}; yours has {tuple(values.shape)}."
    if my_rate == best_direct * rate and torch.equal(values, torch.randn(shape, generator=seeded(0))):
        return "That is the direct training from above: change `my_start`."
    model = with_prefix(16, values=values)
    untrained = completion_loss(model, held_out)
    _, loss = train(model, "your start", my_rate)
    print(f"your start: untrained {untrained:.3f}, after {STEPS} steps {loss:.3f}")
    print(f"the MLP with three seeds: {min(sweep[16]):.3f} to {max(sweep[16]):.3f}")
    if loss < min(sweep[16]):
        return "Your start wins."
    return "Undecided: within the spread." if loss <= max(sweep[16]) else "Your start loses."


print(compare_with_the_mlp(my_start, MY_RATE))

# %% [markdown]
# There is a start that wins. One question leads to it: which keys and values does each layer already know how to use?
# If yours wins, find out why: would another text do as well, or random numbers of the same size? And how many starts
# did you try? The more there are, the more likely one wins by chance.
#
# ## A gate initialised to zero
#
# An untrained prefix has raised the loss every time: it *interferes* before it can help. LLaMA-Adapter (Zhang et al.
# 2023, arXiv:2303.16199, section 3.2) changes two things. The prompt gets a softmax of its own, so that it takes no
# attention away from the text. And its output is multiplied by a gate g, one number per head, which starts at zero:
#
# $$\mathrm{softmax}\!\left(\frac{q K^\top}{\sqrt{hd}} + \mathrm{mask}\right) V +
# \tanh(g)\ \mathrm{softmax}\!\left(\frac{q K_a^\top}{\sqrt{hd}}\right) V_a$$
#
# $K_a$ and $V_a$ (P, hd) are computed from P trained vectors by the layer's own frozen projections. Compare with the
# decomposition above: there is no factor $1 - \lambda$. The attention to the prompt, which has no mask, is provided as
# `prompt_attention(q, prompt_k, prompt_v)`.

# %% exercise="gated_prefix_attention"

# %% [markdown]
# By how much does the same random prompt change the output of the attention, once as a prefix and once with a gate?

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
    ways[f"with a gate of {g:g}"] = gated(q, k, v, prompt_k, prompt_v, torch.full((1, config.n_head, 1, 1), float(g)))
for name, y in ways.items():
    print(f"{name:<22} {(y - plain).norm() / plain.norm():7.2%}")

# %% prediction="who_learns_first"

# %%
method = LlamaAdapter(num_virtual_tokens=16)
model = copy.deepcopy(base)
method.adapt(model)
print(f"the base {before:.6f}, with gates of zero {completion_loss(model, held_out):.6f}")

batch = examples.batch_at(0, BATCH, 0)
optimizer = torch.optim.Adam(method.trainable(model).values(), lr=defaults.learning_rate_for("llama-adapter", config))
for step in (1, 2):
    logits = model(batch.input_ids)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
    sizes = {"gate": [], "prompt": []}
    for name, parameter in method.trainable(model).items():
        sizes[name.rpartition("_")[2]].append(float(parameter.grad.abs().max()))
    print(
        f"backward pass {step}: largest gradient of gates {max(sizes['gate']):.1e}, of prompts "
        f"{max(sizes['prompt']):.1e}"
    )
    optimizer.step()
    optimizer.zero_grad()

# %% check="who_learns_first"

# %% [markdown]
# Now train it, and for comparison a soft prompt of the same length, each at the library's rate for the method, with the
# same batches.

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
names = {"MLP": "prefix, MLP", "direct": "prefix, direct", "gated": "gated prompt", "soft prompt": "soft prompt"}
ends = {name: plotting.smooth(losses, 6) for name, (losses, _) in curves.items()}
lowest, highest = min(min(values) for values in ends.values()), max(max(values) for values in ends.values())
last = None
for style, name in enumerate(sorted(ends, key=lambda name: ends[name][-1])):
    left.plot(range(1, STEPS + 1), ends[name], plotting.LINES[style], color=plotting.COLOURS[style], linewidth=1.8)
    last = ends[name][-1] if last is None else max(ends[name][-1], last + 0.07 * (highest - lowest))
    left.text(1.03 * STEPS, last, names[name], color=plotting.COLOURS[style], fontweight="bold", va="center")
left.set_xlim(0, 1.42 * STEPS)
plotting.label(left, x="step (means of 6 steps)", y="loss, nats per token", title="Four ways to add 16 virtual tokens")
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
plotting.label(right, x="P, virtual tokens", y="held-out loss, nats per token", title="Is a longer prefix better?")
show(
    figure,
    f"Left, the training loss over {STEPS} steps of a prefix computed by an MLP, a prefix trained directly, a gated "
    "prompt "
    "and a soft prompt; they end at "
    + ", ".join(f"{names[name]} {values[-1]:.2f}" for name, values in ends.items())
    + ". Right, the held-out loss against the number of virtual tokens, three seeds each, with means of "
    + ", ".join(f"{mean:.2f} at P = {length}" for length, mean in means.items())
    + ".",
)

# %% [markdown]
# The gated prompt starts at the base's loss and has no disturbance to undo; the prefix starts higher and overtakes it.
# At first only the gates learn, and the prompts have to wait for them, so this cautious start is also a slow one. But
# do not read too much into the order of the four: the library's rates are meant for runs of 500 steps, and only the
# direct prefix was tried with three rates. What is certain is where they *start*. Which method to choose depends on
# which you can afford less: a bad start or a slow one. LLaMA-Adapter was designed for following instructions without
# losing what the model knows, with 1.2 M parameters for a model of 7 B.
#
# How much attention does the trained prefix get?

# %%
start, end = shares(with_prefix(16), text), shares(trained, text)
print("layer   share of a new prefix   of the trained one   range over heads")
for layer, (one, other) in enumerate(zip(start, end, strict=True)):
    print(f"{layer:>5}   {one.mean():>21.0%}   {other.mean():>18.0%}   {other.min():>10.0%} - {other.max():.0%}")

# %% [markdown]
# Training has differentiated the heads. Some give most of their attention to the prefix, others have learned to ignore
# it; this took no gate, only training.
#
# ## The cost of a prefix
#
# Count operations instead of measuring time. For one text of 64 tokens and 16 virtual tokens: how many multiplications
# and additions does reading it take, how much room is left for text, and how many stored numbers does each further
# token have to attend to?


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
print("                       operations    more   room for text   keys and values after 64 tokens")
for name, (model, more) in candidates.items():
    flops = operations(model)
    held = 2 * config.n_layer * config.n_embd * (64 + more)
    print(f"{name:<21} {flops:>11,}  {flops / plain - 1:>6.1%}   {model.config.n_positions:>13}   {held:>12,}")

# %% [markdown]
# - A **soft prompt** sends 16 additional tokens through every matrix of every block.
# - A **prefix** is not processed, only attended to: once folded, it is cheap. With its MLP it is not; so fold it.
# - A **gated prompt** has to be projected, which the library does in every pass; after training the result could be
#   stored.
#
# In addition, each generated token attends to P more keys in each layer, and soft prompt and prefix take up P positions
# of the context. (The gated prompt has no positions and takes none.)
#
# ## What goes wrong in practice
#
# **Saving the MLP as well.** It is by far the larger part, and is never needed again.

# %%
with_mlp = len(safetensors.torch.save(trained.virtual_tokens.state_dict()))
alone = len(safetensors.torch.save({"prompt_embeddings": after}))
print(f"the encoder: {with_mlp:,} bytes; the folded prefix: {alone:,} bytes, {alone / with_mlp:.1%}")

# %% [markdown]
# **A different layout.** A prefix in a file is one matrix. In software that stores all keys first and then all values
# it has the same shape, so there is no error.

# %%
width = config.n_embd
keys_first = torch.arange(2 * config.n_layer * width).view(config.n_layer, 2, width).transpose(0, 1).flatten()
print(f"as it was trained:         {completion_loss(folded, held_out):.3f}")
print(f"with all keys first:       {completion_loss(with_prefix(16, values=after[:, keys_first]), held_out):.3f}")

# %% [markdown]
# **Truncating a trained prefix.** All sixteen rows were trained together. What happens if you keep only some of them,
# to save room?

# %%
for kept in (16, 12, 8, 4):
    print(f"the first {kept:>2} of 16: {completion_loss(with_prefix(kept, values=after[:kept]), held_out):.3f}")

# %% [markdown]
# **A text that no longer fits.** The context is shorter by P, which you notice with the first long text.

# %%
long = torch.zeros(1, config.n_positions, dtype=torch.long)
print("the base reads it:", tuple(base(long).shape))
try:
    folded(long)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# **A different LLaMA-Adapter.** PEFT's version for GPT-2 omits the tanh and adds the prompt's part *after* the output
# projection. The library can compute that too (`as_peft=True`), to load files from PEFT. It is a different model, as
# you can see with the same prompts and every gate at the same value.

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
# - A prefix consists of P trained keys and values that are prepended to those of the text, in every layer.
# - A prefix of zeros changes the model: it takes a share of the softmax. A gate of zero leaves the model unchanged;
#   then only the gate has a gradient at first.
# - The MLP that computes the prefix is far larger than the prefix, lets it move fast at a small learning rate, and is
#   discarded after training.
# - Longer is not always better; the length is a hyperparameter.
# - Once folded, a prefix costs few operations; it still takes P positions of the context, and every token attends to
#   it.
#
# ## Go further
#
# - Li and Liang 2021, *Prefix-Tuning* (arXiv:2101.00190): sections 4 (the method) and 7 (what matters in it).
# - Zhang et al. 2023, *LLaMA-Adapter* (arXiv:2303.16199): the gate, and images as prompts.
# - Liu et al. 2022, *P-Tuning v2* (arXiv:2110.07602): prefixes in every layer for understanding tasks.
# - He et al. 2022, *Towards a unified view of parameter-efficient transfer learning* (arXiv:2110.04366): section 3.1
#   rewrites prefix attention as you did, and shows that it resembles an adapter.
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): table 3. On E2E with GPT-2 medium a prefix in every layer reaches BLEU
#   69.7, full fine-tuning 68.2, LoRA 70.4; prefix and LoRA with 0.35 M numbers.
#
# Look at the decomposition once more: $(1 - \lambda)$ times the old output plus $\lambda$ times something that depends
# on the text only through q. So a prefix adds a small function of the token to what the layer computes, by way of the
# attention, and pays for it with context. If all you want is a small function of the token, why not put one between the
# layers? That is unit 07.

# %% [markdown] open_question="prefix_or_prompt" points=4
# ### Open question
#
# A company answers e-mails in 30 styles, one for each customer, with one frozen language model whose context of 1,024
# tokens is mostly full: an e-mail and the thread before it take 900 to 1,000 tokens. Requests from all customers arrive
# mixed and are answered in batches. Somebody proposes a prefix of 200 virtual tokens for each customer, "since more
# parameters are better and a prefix is only 0.1 % of the model". Write at most 150 words: what are the arguments for
# prefixes here, what is wrong with the proposal, and what would you do?
#
# **Rubric.**
#
# - 1 point: for prefixes: each row of a batch can have its own prefix, so that 30 customers share one model.
# - 1 point: there is no room for 200 of 1,024 positions; the threads would have to be truncated.
# - 1 point: more parameters are not always better: choose the length on held-out e-mails, starting from small values.
# - 1 point: a reasoned choice: a short prefix, folded; or a method that takes no context (a gated prompt, adapters,
#   LoRA), with its disadvantages.

# %% volatile=true
progress("06")
