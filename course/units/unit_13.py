# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 13: QLoRA
#
# **By the end of this unit you can**
#
# - train a LoRA through 4-bit weights without storing them unpacked;
# - say for any model what fills the memory of a training step, and which of three techniques helps: fewer bits,
#   recomputing activations, or moving the optimiser state out;
# - store the optimiser's state in a file, page by page;
# - say what quantisation costs before and after training, and how much of that LoftQ restores.
#
# **Prerequisites**: LoRA (unit 09) and the 4-bit format (unit 12). Unit 00 helps with the memory, unit 02 with the SVD.
#
# **Time**: about 90 minutes. 6 exercises, 2 predictions, one open question.
#
# ![Held-out loss after training, three seeds joined by lines, for LoRA on the full weights, QLoRA, and QLoRA that
# starts with LoftQ. Does training through 4-bit weights cost any quality?](unit_13.png)

# %%
import copy
import mmap
import os
import tempfile

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.accounting import measured_memory, predicted_memory
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss, load_tales
from lora_from_scratch.finetune.paged_optimizer import update_in_place
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import GPT2Config, load_gpt2
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import (
    LoRA,
    LoRALinear,
    delta_weight,
    inject_lora,
    lora_layers,
    mark_only_lora_as_trainable,
)
from lora_from_scratch.methods.placement import find_targets
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.quantization.nf4_linear import nf4_layers
from lora_from_scratch.quantization.quantized_tensor import QuantizedTensor, quantize_4bit
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.linear_layers import weight_of
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), "gpt2" (needs a network connection, about 10 minutes and 6 GB of
# memory), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 16))

# %% [markdown]
# ## Through the weights, not into them
#
# Unit 12 ended with weights that take four bits and can no longer be trained: no gradient passes through rounding.
# QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3, eq. 5 and 6) does not try to. It trains a LoRA *beside*
# them:
#
# $$ y = \mathrm{dequant}(W)\, x + b + s\, B A\, x $$
#
# - $x$ (in), $y$ (out): the input and the output of the layer, in 16 or 32 bits; $b$ (out): the bias;
# - $W$ (out, in): frozen, in four bits; $\mathrm{dequant}(W)$: the same matrix in the dtype of $x$;
# - $A$ (r, in), $B$ (out, r): trained, in 16 or 32 bits; $s = \alpha / r$.
#
# What does training need from $W$? With $g = \partial L / \partial y$ (out),
#
# $$ \frac{\partial L}{\partial x} = \mathrm{dequant}(W)^\top g + s\, A^\top B^\top g, \qquad
# \frac{\partial L}{\partial W} \text{: not needed, } W \text{ is frozen.} $$
#
# So the gradient goes *through* $W$, on its way to the LoRAs of earlier blocks, but never *into* it. Rounding does not
# stand in its way.
#
# `F.linear(x, W.dequantize())` looks like all you need. But look at what autograd then saves for the backward pass, in
# six consecutive layers.

# %%
base, tokenizer = load_gpt2(MODEL)
base.requires_grad_(False)
mlp = base.transformer.h[0].mlp.c_fc
square = quantize_4bit(base.transformer.h[0].attn.c_proj.weight.T.contiguous(), double_quant=True)


def kept_by(layer, depth=6):
    """Bytes of all tensors that autograd saves for `depth` consecutive layers."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(16, square.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = x
        for _ in range(depth):
            y = layer(y)
    y.square().mean().backward()
    return sum(kept.values()), x.grad


full_size = 4 * square.shape[0] * square.shape[1]
plain_bytes, plain_gradient = kept_by(lambda x: F.linear(x, square.dequantize()))
print(f"one W: {full_size:,} bytes in 32 bits, {square.nbytes:,} in four")
print(f"saved by six layers of F.linear: {plain_bytes:,} bytes, the size of {plain_bytes / full_size:.1f} W in 32 bits")

# %% [markdown]
# Each layer saves its own dequantised $W$, because the backward pass needs it. At the end of the forward pass all of
# them are in memory at once: the model in 32 bits *and* the model in four. You have to tell autograd that $W$ can be
# recomputed.
#
# A `torch.autograd.Function` does that. You write both directions yourself, and only what you store on `ctx` is kept.

# %% [markdown]
# Two input rows by hand, with in = 3 and out = 2. Let the dequantised $W$, the bias, the input and the gradient
# that arrives be
#
# $$ W = \begin{pmatrix} 1 & 0 & -2 \\ 0.5 & 1 & 0 \end{pmatrix}, \quad b = (1, -1), \quad
# x = \begin{pmatrix} 1 & 2 & 0 \\ 0 & 1 & 1 \end{pmatrix}, \quad
# \frac{\partial L}{\partial y} = \begin{pmatrix} 1 & 0 \\ 2 & -1 \end{pmatrix}. $$
#
# - Forward: the rows of $y$ are (1, 2.5) + b = (2, 1.5) and (-2, 1) + b = (-1, 0).
# - Backward: the rows of $\partial L / \partial x$ are 1 (1, 0, -2) + 0 (0.5, 1, 0) = (1, 0, -2) and
#   2 (1, 0, -2) - 1 (0.5, 1, 0) = (1.5, -1, -4).
# - The bias is added to both rows, so its gradient is the sum of both: (3, -1).
#
# Both gradients can be computed without $x$.

# %% exercise="FourBitProduct"

# %%
product = working("FourBitProduct")

own_bytes, own_gradient = kept_by(lambda x: product.apply(x, None, square))
print(f"saved by six layers: {own_bytes:,} bytes")
print(f"the gradient differs from F.linear's by {(own_gradient - plain_gradient).abs().max():.0e}")

# %% [markdown]
# Nothing is saved, and the gradient is the same. The cost: $W$ is dequantised twice per training step. Only one layer's
# $W$ is in memory at a time, and only for a moment.

# %% [markdown]
# ## A model in four bits
#
# The library's `NF4Linear` is a module around this product: it holds the `QuantizedTensor` and the bias, and specifies
# the dtype to compute in. `NF4Linear.from_layer(layer)` creates one from an existing layer. What remains is to replace
# every matrix of a model.

# %% exercise="quantize_model"

# %%
quantize = working("quantize_model")

small = copy.deepcopy(base)
dense = quantize(small)
matrices = sum(layer.weight.nbytes for layer in dense.values())
packed = sum(layer.quantized.nbytes for layer in nf4_layers(small).values())
rest = sum(p.nbytes for p in small.parameters())
print(f"{len(dense)} matrices: {matrices:,} bytes become {packed:,}, {8 * packed / (matrices / 4):.3f} bits per weight")
print(f"everything else is unchanged: {rest:,} bytes, most of them the embeddings")

# %% [markdown]
# Look at the last line. In a small model the embeddings are a large part, and once the matrices are in four bits they
# are the largest. In a model with billions of parameters they are a per cent or two.
#
# This is the recipe of QLoRA in six lines: quantise, put a LoRA around every 4-bit layer, train only the LoRAs.


# %%
def with_lora(rank=8, seed=0, four_bits=True):
    """A copy of the base with a freshly initialised LoRA (B = 0) on every matrix."""
    model = copy.deepcopy(base)
    if four_bits:
        quantize(model)
    draw = torch.Generator().manual_seed(seed)
    names = find_targets(model, "all-linear")
    inject_lora(model, {n: LoRALinear(model.get_submodule(n), rank, 8 * rank, generator=draw) for n in names})
    mark_only_lora_as_trainable(model)
    return model


model = with_lora()
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
del small, dense
print(f"trained: {trained:,} parameters, {4 * trained:,} bytes; the frozen matrices take {packed:,} bytes")

# %% [markdown]
# The library's method `QLoRA` does this, and also saves, merges and undoes (`lora-from-scratch finetune --method
# qlora`).
#
# The paper finds that it matters more to adapt *every* matrix than to use a high rank. With LoRA on q and v alone, it
# does not reach 16-bit fine-tuning; with LoRA on all linear layers it does (section 4, figure 2).

# %% [markdown]
# ## Where the memory goes
#
# The paper's example is a model with 65 billion parameters. In 16 bits, with 16-bit gradients and Adam's two values per
# parameter in 32 bits:

# %%
n = 65e9
print(f"full:  {n * (2 + 2 + 8) / 1e9:.0f} GB for weights, gradients and optimiser")
print(f"QLoRA: {n * 4.127 / 8 / 1e9:.1f} GB for the weights; gradients and optimiser state only for the LoRA")

# %% [markdown]
# The paper says "more than 780 GB" and "less than 48 GB" (abstract, section 1). Is the saving the same for this model?

# %% prediction="an_eighth"

# %% [markdown]
# `finetune/accounting.py` counts the bytes of a training step in two ways. It *predicts* them from the shapes, and it
# *measures* them: it takes two steps with a random model of the same shape, and tracks every tensor from its allocation
# until it is freed. The peak is less than the sum of the parts, because they are not all in memory at the same moment.
# "Logits" are the predictions over the vocabulary, and what the loss needs in addition. The arithmetic is bfloat16
# (autocast); the weights that are not in four bits are float32.

# %%
ROWS, TOKENS, MIB = 8, 96, 2**20
four_bit = QLoRA(rank=8, targets="all-linear", keep_base=False)
METHODS = {
    "full": (FullFineTuning(keep_base=False), False),
    "LoRA": (LoRA(rank=8, targets="all-linear"), False),
    "QLoRA": (four_bit, False),
}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "transient": "logits",
}
budgets, measured = {}, {}


def count(name, method, checkpointing):
    given = {"precision": "bf16", "gradient_checkpointing": checkpointing}
    budgets[name] = predicted_memory(base.config, method, ROWS, TOKENS, **given)
    torch.manual_seed(0)
    measured[name] = measured_memory(base.config, method, ROWS, TOKENS, **given).total


def table(names):
    print("MiB".ljust(22) + "".join(f"{title:>12}" for title in PARTS.values()) + "        peak    measured")
    for name in names:
        numbers = [getattr(budgets[name], part) for part in PARTS] + [budgets[name].total, measured[name]]
        print(f"{name:<22}" + "".join(f"{number / MIB:>12.1f}" for number in numbers))


for name, (method, checkpointing) in tqdm(METHODS.items(), desc="methods"):
    count(name, method, checkpointing)
table(METHODS)
print(f"\nQLoRA's peak is {budgets['QLoRA'].total / budgets['LoRA'].total:.0%} of LoRA's")

# %% check="an_eighth"

# %% [markdown]
# Read the table column by column.
#
# - **Weights**: as expected, apart from the embeddings.
# - **Gradients and optimiser**: LoRA has already removed nearly all of them; four bits change nothing here.
# - **Activations**: they decrease from LoRA to QLoRA, although nothing was done about them. Autocast makes a 16-bit
#   copy of each 32-bit weight, and autograd saves that copy, just as it saved $W$ above. Your layer saves none.
# - **Logits**: tokens times vocabulary, the same for all.
#
# In this model the weights are no longer what fills the memory. What about the activations?

# %% [markdown]
# ## Recompute instead of storing
#
# You have just discarded a $W$ and recomputed it. You can do the same with *activations*: store the input of a block,
# discard everything inside it, and compute the block again when the backward pass reaches it. That is **gradient
# checkpointing** (Chen et al. 2016, arXiv:1604.06174). For $L$ blocks that save $a$ bytes each and have an input of $x$
# bytes, $L a$ becomes about $L x + a$, because only one block is expanded at a time.

# %% [markdown]
# A block by hand: $h = w x$ and $y = h^2$, with the weight $w = 3$ and the input $x = 2$, so $h = 6$ and $y = 36$. The
# gradient that arrives is $\partial L / \partial y = 1$.
#
# - As usual, the forward pass keeps $x$ and $h$. The backward pass uses both:
#   $\partial L / \partial w = 2 h x = 24$ and $\partial L / \partial x = 2 h w = 36$.
# - With checkpointing, the forward pass keeps $x = 2$ and nothing else. The backward pass first computes
#   $h = 3 \cdot 2 = 6$ again, and then the same two gradients.
#
# If the block also had dropout, and it happened to set $h$ to zero the second time, both gradients would be zero: they
# would belong to another function than the one that gave 36.

# %% exercise="CheckpointFunction"

# %%
checkpoint = working("CheckpointFunction")

block = model.transformer.h[0]
x = torch.randn(2, 32, base.config.n_embd, generator=torch.Generator().manual_seed(0), requires_grad=True)
for layer in lora_layers(block).values():
    nn.init.normal_(layer.lora_B, std=0.01, generator=torch.Generator().manual_seed(1))


def gradients_of(run):
    """The bytes that autograd saves for one block, and the gradients of x and of the LoRAs."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    block.zero_grad()
    x.grad = None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(x)
    y.square().mean().backward()
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    size = sum(nbytes for place, nbytes in kept.items() if place not in weights)
    return size, [x.grad.clone(), *(p.grad.clone() for p in block.parameters() if p.requires_grad)]


usual, wanted = gradients_of(block)
once, found = gradients_of(lambda x: checkpoint.apply(block, x))
print(f"saved for one block: {usual:,} bytes as usual, {once:,} with checkpointing (x itself has {x.nbytes:,})")
print("the same gradients, bit for bit:", all(map(torch.equal, wanted, found)))
del model, block

# %% [markdown]
# For GPT-2, the library uses PyTorch's own checkpointing, which does the same for every block. It is the fourth row:

# %%
count("QLoRA + checkpointing", four_bit, True)
table(budgets)
saved = 1 - budgets["QLoRA + checkpointing"].total / budgets["LoRA"].total
print(f"\nfour bits and checkpointing together: {saved:.0%} less than LoRA")

# %% [markdown]
# Which of the two helps more depends on the model and the batch. Weights grow with the square of the width, activations
# with the width times the number of tokens. Move the slider from the bundled shape to GPT-2 XL (1.5 billion
# parameters), with 4 texts of 256 tokens each.

# %%
SIZES = {
    "bundled": GPT2Config(vocab_size=4096, n_positions=256, n_embd=256, n_layer=6, n_head=8),
    "small": GPT2Config(),
    "XL": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
WAYS = {**METHODS, "QLoRA + checkpointing": (four_bit, True)}
by_size = {}
for size, config in tqdm(SIZES.items(), desc="shapes"):
    for name, (method, checkpointing) in WAYS.items():
        by_size[size, name] = predicted_memory(config, method, 4, 256, gradient_checkpointing=checkpointing)


def stacked(axes, budgets, unit, of):
    """A stacked bar for each method; the name of a part is above the first bar that shows it."""
    named = set()
    for place, budget in enumerate(budgets):
        left = 0.0
        for style, (part, title) in enumerate(PARTS.items()):
            size = getattr(budget, part) / unit
            colour = plotting.COLOURS[style % len(plotting.COLOURS)]
            axes.barh(place, size, left=left, height=0.55, color=colour, edgecolor="white", linewidth=0.8)
            if title not in named and size > 0.1 * of:
                axes.text(left + size / 2, place - 0.33, title, ha="center", va="bottom", fontsize=8, color="0.25")
                named.add(title)
            left += size


def at_size(size):
    figure, (axes,) = plotting.panels(1, width=7.2, height=3.2)
    chosen = [by_size[size, name] for name in WAYS]
    unit, text = (2**20, "MiB") if chosen[0].total < 2**30 else (2**30, "GiB")
    widest = sum(getattr(chosen[0], part) for part in PARTS) / unit
    stacked(axes, chosen, unit, widest)
    axes.set_yticks(range(len(WAYS)), list(WAYS))
    axes.set_ylim(len(WAYS) - 0.5, -0.8)
    for place, budget in enumerate(chosen):
        end = sum(getattr(budget, part) for part in PARTS) / unit
        axes.text(end + 0.01 * widest, place, f"peak {budget.total / unit:,.1f} {text}", va="center", fontsize=9)
    axes.set_xlim(0, 1.22 * widest)
    plotting.label(axes, x=f"{text}, 4 texts of 256 tokens", title=f"GPT-2, {size}")
    return figure


slider(
    at_size,
    "shape",
    list(SIZES),
    "XL",
    "Stacked bars of the predicted memory of a training step of GPT-2 XL for full fine-tuning, LoRA, QLoRA and QLoRA "
    "with checkpointing. Full: weights, gradients, and optimiser state twice as large. LoRA: weights and activations. "
    "QLoRA: mostly activations. With checkpointing: all parts are small.",
)

# %%
print("peak, relative to LoRA's".ljust(28) + "".join(f"{size:>10}" for size in SIZES))
for name in WAYS:
    shares = [by_size[size, name].total / by_size[size, "LoRA"].total for size in SIZES]
    print(f"{name:<28}" + "".join(f"{share:>10.0%}" for share in shares))

# %% [markdown]
# The last row is not monotonic, because checkpointing does not reduce the logits, which take tokens times vocabulary.
# GPT-2 small has a vocabulary of 50,257 tokens and a small width: its logits are 30 % of LoRA's peak. They are 18 % in
# the bundled model, which has 4,096 tokens, and 4 % in GPT-2 XL, whose weights and activations are far larger.
#
# ## What it costs in computation
#
# Saving memory takes time. Time measurements are unreliable on a shared machine, so count instead: the multiplications
# and additions of one forward and backward pass, and how many weights are unpacked.

# %%
dataset = load_dataset("story-cards")
context = base.config.n_positions
examples = Completions(dataset.train, tokenizer, context)
held_out = Completions(dataset.validation[::8][:24], tokenizer, context).batches(12)  # 24 cards, one text each
batch = examples.batch_at(0, 4, 0)
unpack = QuantizedTensor.dequantize


def work(model, checkpointing):
    unpacked = []

    def counting(quantized, dtype=None):
        unpacked.append(quantized.shape.numel())
        return unpack(quantized, dtype)

    model.train().gradient_checkpointing = checkpointing
    QuantizedTensor.dequantize = counting
    try:
        with FlopCounterMode(display=False) as counter:
            next_token_loss(model(batch.input_ids), batch.labels).backward()
    finally:
        QuantizedTensor.dequantize = unpack
    return counter.get_total_flops(), sum(unpacked)


everything = copy.deepcopy(base).requires_grad_(True)
steps = {
    "full": work(everything, False),
    "LoRA": work(with_lora(four_bits=False), False),
    "QLoRA": work(with_lora(), False),
    "QLoRA + checkpointing": work(with_lora(), True),
}
del everything
frozen = matrices // 4
for name, (operations, unpacked) in steps.items():
    share = operations / steps["LoRA"][0]
    print(f"{name:<22} {share:>5.0%} of LoRA's operations, each weight unpacked {unpacked / frozen:.2f} times")

# %% [markdown]
# - Four bits add no matrix products, but every weight is unpacked twice (slightly less on average, because no gradient
#   is needed below the lowest layer), and unpacking is not counted in the first column.
# - Checkpointing adds one more forward pass: the work of three passes instead of two, and every weight is unpacked
#   three times.
#
# So start with what is free, then take what costs least for what it saves *on your model*.

# %% [markdown]
# ## The optimiser's state, page by page
#
# Even if the average text fits, a long one may not, and a run that fails at step 9,000 has cost as much as one that
# succeeds. QLoRA's third idea is a **paged optimiser** (section 3, "Paged Optimizers"): Adam's $m$ and $v$ are needed
# only at one moment of a step, so let the system move them out when memory is short. The paper uses CUDA's unified
# memory, which moves pages between the graphics card and the computer. You do the same one level lower, between the
# computer's memory and a file, with a feature of every operating system: `mmap`. The pages of a mapped file are loaded
# into memory when they are accessed, and released when you say so.

# %% exercise="Pages"

# %% [markdown]
# Take a step of AdamW on a parameter whose $m$ and $v$ are in a file. `update_in_place` is AdamW in place (your
# `adamw_step` of unit 04, writing into its arguments): newly created $m$ and $v$ would be in memory again and not in
# the file.

# %%
Paged = working("Pages")

p = nn.Parameter(torch.randn(400, 300, generator=torch.Generator().manual_seed(0)))
twin = nn.Parameter(p.detach().clone())
room = -(-2 * p.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
with tempfile.TemporaryFile() as file:
    file.truncate(room)
    pages = Paged(mmap.mmap(file.fileno(), room), 0, p)
theirs = torch.optim.AdamW([twin], lr=1e-2, foreach=False)
for step in range(1, 4):
    gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        given = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        update_in_place(p, gradient, pages.m, pages.v, step, **given)
    pages.release()
    twin.grad = gradient
    theirs.step()
print(f"m and v: {pages.m.nbytes + pages.v.nbytes:,} bytes, in {pages.length:,} bytes of pages")
print("after three steps, identical to PyTorch's AdamW:", torch.equal(p, twin))

# %% [markdown]
# How much is there to move out? See the "optimiser" column of the table.

# %%
for name, budget in budgets.items():
    print(
        f"{name:<22} optimiser {budget.optimizer / MIB:>5.1f} MiB, {budget.optimizer / budget.total:>4.0%} of the peak"
    )

# %% [markdown]
# With a LoRA there is little: paging is useful for full fine-tuning, for large ranks, and for the moment when a long
# text needs all the memory. The library's option is `--optimizer paged-adamw`.

# %% [markdown]
# ## What quantisation costs
#
# So far only the memory has changed. What about the model? Before any training, measure three things, as in unit 12:
# the **divergence** from the base model on the project's tales (nats per token), the loss on these tales, and the loss
# on the story cards that you will train on.

# %%
ids = [i for tale in load_tales() for i in (tokenizer.eos_id, *tokenizer.encode(tale))]
length = min(context, 256)
windows = torch.tensor(ids[: 6 * length]).view(6, length)


@torch.no_grad()
def log_probabilities(model):
    return torch.cat([torch.log_softmax(model.eval()(part)[:, :-1], dim=-1) for part in windows.split(2)])


reference = log_probabilities(base)
tale_targets = windows[:, 1:, None]


def distance(model):
    """Divergence from the base, and change of the loss on tales with its standard error (millinats per token)."""
    seen = log_probabilities(model)
    divergence = (reference.exp() * (reference - seen)).sum(-1).mean()
    change = (reference - seen).gather(-1, tale_targets)
    return 1000 * float(divergence), 1000 * float(change.mean()), 1000 * float(change.std() / change.numel() ** 0.5)


before = completion_loss(base, held_out)
starts = {"QLoRA": with_lora()}
apart, change, spread = distance(starts["QLoRA"])
cards = completion_loss(starts["QLoRA"], held_out)
print(f"divergence            {apart:.1f} millinats per token")
print(f"loss on tales         {change:+.1f} millinats, with a standard error of {spread:.1f} over the tokens")
print(f"loss on story cards   {before:.3f} before, {cards:.3f} in four bits ({1000 * (cards - before):+.0f} millinats)")

# %% [markdown]
# The cost is small; on large models it is smaller still. The paper's results for the codebooks of unit 12: mean
# perplexity 27.41 for NF4 with double quantisation, 34.34 for INT4 (table 2).
#
# But consider what training starts from. LoRA starts exactly at the base model: $B = 0$. QLoRA starts at the
# *quantised* model, which is slightly different. And there is a LoRA of rank $r$ that could hold something from the
# start. Could it hold what quantisation lost, $W - Q$?

# %% prediction="what_rank_eight_holds"

# %%
W = weight_of(base.transformer.h[base.config.n_layer // 3].attn.c_attn).detach()
error = W - quantize_4bit(W).dequantize()
noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
print(f"W is {tuple(W.shape)}. Share of the squared norm in the best matrix of rank r:")
print("".ljust(24) + "".join(f"{f'r = {r}':>9}" for r in (1, 8, 32, 128)))
for name, matrix in {"W itself": W, "W - Q": error, "noise of the same shape": noise}.items():
    energy = torch.linalg.svdvals(matrix).square().cumsum(0)
    print(f"{name:<24}" + "".join(f"{energy[r - 1] / energy[-1]:>9.1%}" for r in (1, 8, 32, 128)))

# %% check="what_rank_eight_holds"

# %% [markdown]
# What quantisation loses is hardly distinguishable from noise. That is bad news for every method that tries to restore
# it with a low rank, and good news for quantisation: the error does not favour any direction.
#
# Still, a tenth can be restored. **LoftQ** (Li et al. 2023, arXiv:2310.08659, section 3, algorithm 1) goes one step
# further. If $B A$ holds a part of $W$, that part need not be in $Q$; so quantise the remainder, and alternate, to make
# $\lVert W - Q - B A \rVert$ small:
#
# $$ Q_t = \mathrm{quant}(W - B_{t-1} A_{t-1}), \qquad B_t A_t = \mathrm{SVD}_r(W - Q_t), \qquad B_0 A_0 = 0 . $$

# %% exercise="loftq_init"

# %%
loftq = working("loftq_init")


def four_bits(matrix):
    return quantize_4bit(matrix, "nf4", 64, True)


alone = float((W - four_bits(W).dequantize()).norm() / W.norm())
print(f"||W - Q - B A|| / ||W||; without B A it is {alone:.2%}")
print("".ljust(10) + "".join(f"{f'T = {T}':>9}" for T in (1, 2, 5)))
for rank in (8, 64):
    errors = []
    for T in (1, 2, 5):
        Q, A, B = loftq(W, rank, T, four_bits)
        errors.append(float((W - Q.dequantize() - B @ A).norm() / W.norm()))
    print(f"{f'r = {rank}':<10}" + "".join(f"{error:>9.2%}" for error in errors))

# %% [markdown]
# Now put it into a model. A LoRA layer multiplies by its own scaling, which LoftQ does not take into account.

# %% exercise="begin_with_loftq"

# %%
begin = working("begin_with_loftq")


def with_loftq(rank, iterations):
    """QLoRA initialised with LoftQ."""
    model = with_lora(rank)
    for name, layer in tqdm(lora_layers(model).items(), desc=f"LoftQ, r = {rank}"):
        begin(layer, weight_of(base.get_submodule(name)), iterations, four_bits)
    return model


starts["LoftQ, r = 8, T = 1"] = with_loftq(8, 1)
starts["LoftQ, r = 8, T = 5"] = with_loftq(8, 5)
starts["LoftQ, r = 64, T = 1"] = with_loftq(64, 1)

# %%
apart = {}
print("initialisation".ljust(24) + "divergence   change of the loss on tales (millinats per token)")
for name, model in starts.items():
    apart[name], change, spread = distance(model)
    print(f"{name:<24}{apart[name]:>10.1f}   {change:>+6.1f} +- {spread:.1f}")

# %% [markdown]
# The divergence falls as LoftQ promises: a little with one iteration, more with five, and more still with a higher
# rank. The loss need not follow the same order: it adds up changes of both signs, and its change is hardly larger than
# its standard error (see unit 12 on perplexity).
#
# One thing does not depend on chance: a rank of 8 cannot restore most of what quantisation has lost. The table
# below your prediction shows why.

# %% [markdown]
# ## Your own ranks
#
# The best B A of rank 8 for each $W - Q$ is the second row of the table. It restores some of the error in every matrix.
# Can you restore more of the *model* with the same number of parameters? Give each matrix a rank of its own, 0
# included: rank $r$ on $W$ (out, in) costs $r$ (in + out) parameters. The plan below spends all of them on the first
# half of the blocks, since an error there passes through all the later ones. Change `my_rank`, write down whether you
# expect to win, and run the cell. It compares both plans by their divergence from the base on six pieces of the tales;
# only a plan that is closer to the base on each of them wins.

# %%
lost = {}  # for each matrix, Q and the singular value decomposition of W - Q
for name in lora_layers(starts["QLoRA"]):
    W = weight_of(base.get_submodule(name)).detach()
    Q = four_bits(W).dequantize()
    lost[name] = Q, torch.linalg.svd(W - Q, full_matrices=False)


def my_rank(name):
    """The rank of B A for the matrix of this name, such as "transformer.h.5.mlp.c_proj". Change this."""
    block = int(name.split(".h.")[1].split(".")[0])
    return 16 if block < base.config.n_layer // 2 else 0


def divergences(rank):
    """For each piece, the divergence from the base with Q + B A of these ranks (millinats per token)."""
    model = copy.deepcopy(base)
    for name, (Q, (U, S, Vh)) in lost.items():
        r = rank(name)
        model.get_submodule(name).weight.data = (Q + (U[:, :r] * S[:r]) @ Vh[:r]).T.contiguous()
    seen = log_probabilities(model)
    return (1000 * (reference.exp() * (reference - seen)).sum(-1).mean(-1)).tolist()


def compare_with_rank_eight(rank):
    """Restore with your ranks and with rank 8 everywhere, and say which model is closer to the base."""
    ranks = {name: rank(name) for name in lost}
    for name, r in ranks.items():
        if not isinstance(r, int) or r < 0:
            return f"A rank is a whole number, 0 or more; {name} has {r!r}."
    sizes = {name: sum(Q.shape) for name, (Q, _) in lost.items()}
    spent, budget = sum(ranks[name] * sizes[name] for name in lost), 8 * sum(sizes.values())
    print(f"your plan has {spent:,} parameters; rank 8 everywhere has {budget:,}")
    if spent > budget:
        return "That is more than rank 8 everywhere: lower a rank, or leave out a matrix."
    if set(ranks.values()) == {8}:
        return "That is rank 8 everywhere itself: change `my_rank`."
    usual, mine = divergences(lambda name: 8), divergences(ranks.get)
    for name, found in {"rank 8 everywhere": usual, "your plan": mine}.items():
        each = ", ".join(f"{value:.2f}" for value in found)
        print(f"{name:<18} divergence {sum(found) / len(found):.2f} ({each})")
    gains = [one - other for one, other in zip(usual, mine, strict=True)]
    better, worse = min(gains) > 0, max(gains) < 0
    return "Your plan wins." if better else "Your plan loses." if worse else "Undecided: it depends on the text."


print(compare_with_rank_eight(my_rank))

# %% [markdown]
# There is a plan that wins on all six pieces, by about a third of what rank 8 everywhere restores. To find it, do not
# guess where an error matters most: restore a single block, or one kind of matrix, with all the parameters, and see
# which choice brings the model closest to the base. How does the plan above compare, and what does that say about its
# argument?

# %% [markdown]
# ## And after training?
#
# What matters is the result of training, not the start. Train three models on the story cards, with the same batches
# and the same learning rate: LoRA on the full weights, QLoRA, and QLoRA initialised with LoftQ (r = 8, five
# iterations). Each has three seeds, which determine the order of the cards and the initial A (LoftQ's A does not depend
# on the seed). The runs are short.

# %%
starts = {name: starts[name] for name in ("LoftQ, r = 8, T = 5",)}  # the others are no longer needed
SEEDS = (0, 1, 2)
settings = {
    "steps": STEPS,
    "learning_rate": defaults.learning_rate_for("qlora", base.config),
    "warmup_steps": defaults.warmup_steps_for(STEPS),
}
make = {
    "LoRA": lambda seed: with_lora(seed=seed, four_bits=False),
    "QLoRA": lambda seed: with_lora(seed=seed),
    "LoftQ": lambda seed: copy.deepcopy(starts["LoftQ, r = 8, T = 5"]),
}
ends = {}


def train(name):
    """Train with each seed and append the held-out losses to `ends`; return the model of the first seed."""
    models, ends[name] = [], []
    for seed in tqdm(SEEDS, desc=name, unit="run"):
        model = make[name](seed)
        each = TrainingSettings(**settings, seed=seed)
        Trainer(model, lambda step, seed=seed: examples.batch_at(step, 4, seed), each, progress=False).run()
        ends[name].append(completion_loss(model, held_out))
        models = models or [model]
    return models[0]


train("LoRA")
print("LoRA: ", ", ".join(f"{loss:.3f}" for loss in ends["LoRA"]))

# %%
tuned = train("QLoRA")
print("QLoRA:", ", ".join(f"{loss:.3f}" for loss in ends["QLoRA"]))

# %%
train("LoftQ")
print("LoftQ:", ", ".join(f"{loss:.3f}" for loss in ends["LoftQ"]))

# %%
print(f"held-out loss after {STEPS} steps (it was {before:.3f} before)")
print("".ljust(8) + "three seeds".ljust(26) + "minus LoRA with the same seed")
for name, losses in ends.items():
    runs = ", ".join(f"{loss:.3f}" for loss in losses)
    differences = ", ".join(f"{loss - lora:+.3f}" for loss, lora in zip(losses, ends["LoRA"], strict=True))
    print(f"{name:<8}{runs:<26}{differences if name != 'LoRA' else ''}")
print("\nmean difference to LoRA, with the standard error over the pairs")
for name in ("QLoRA", "LoftQ"):
    pairs = torch.tensor(ends[name]) - torch.tensor(ends["LoRA"])
    print(f"{name:<8}{pairs.mean():+.3f} +- {pairs.std() / len(pairs) ** 0.5:.3f}")

# %% figure="unit_13.png"
figure, (axes,) = plotting.panels(1, width=6.4, height=3.4)
for seed, losses in enumerate(zip(*ends.values(), strict=True)):
    axes.plot(range(len(ends)), losses, marker="o", color=plotting.COLOURS[0], linewidth=1.2)
    axes.annotate(f"seed {seed}", (len(ends) - 1, losses[-1]), xytext=(8, 0), textcoords="offset points", va="center")
axes.set_xticks(range(len(ends)), ["LoRA, full weights", "QLoRA", "QLoRA with LoftQ"])
axes.margins(x=0.2, y=0.3)
plotting.label(
    axes, x="", y="held-out loss, nats per token", title="Does training through 4-bit weights cost any quality?"
)
show(
    figure,
    f"Held-out loss after {STEPS} steps, three seeds joined by lines: "
    + "; ".join(f"{name} {', '.join(f'{loss:.3f}' for loss in losses)}" for name, losses in ends.items())
    + ".",
)

# %% [markdown]
# The runs are paired: with the same seed, the three methods see the same batches. So judge a method by the differences
# to LoRA with the same seed, in which the effect of the order cancels, and not by the spread over seeds. With these
# settings no quantised model ended worse than LoRA; if anything, they were slightly better, but three pairs are too few
# to conclude that. (At a learning rate of 4e-3 instead of 3e-3, the differences had no common sign.) So, on this model
# and this task, **a few steps of training are enough to make up for the four bits**, because the LoRA that learns the
# task also learns to compensate for $Q$.
#
# This agrees with the paper's main result: with NF4 and LoRA on all layers, QLoRA reaches the quality of LoRA in 16
# bits (table 4: mean MMLU accuracy of LLaMA models with 7 to 65 billion parameters, 53.1 against 53.0; with FP4 52.2).
# It also agrees with LoftQ's own results: its large gains are at two bits, where QLoRA often does not train at all; at
# four bits the two are close (abstract, section 4). It does *not* prove that quantisation never costs anything: this
# was one small model and one easy task.

# %%
figure, (left, right) = plotting.panels(2, width=6.4, height=3.4)
widest = sum(getattr(budgets["full"], part) for part in PARTS) / MIB
stacked(left, list(budgets.values()), MIB, widest)
for place, (name, budget) in enumerate(budgets.items()):
    end = sum(getattr(budget, part) for part in PARTS) / MIB
    left.text(end + 0.01 * widest, place, f"peak {measured[name] / MIB:.0f}", va="center", fontsize=9)
left.set_yticks(range(len(budgets)), [name.replace(" + ", "\n+ ") for name in budgets])
left.set_ylim(len(budgets) - 0.5, -0.8)
left.set_xlim(0, 1.18 * widest)
plotting.label(left, x=f"MiB for {ROWS} texts of {TOKENS} tokens", title="What a training step holds")
places = range(len(apart))
right.barh(places, list(apart.values()), height=0.55, color=["0.55", *[plotting.COLOURS[0]] * (len(apart) - 1)])
right.set_yticks(places, [name.replace(", r", ",\nr") for name in apart])
right.invert_yaxis()
for place, value in enumerate(apart.values()):
    right.text(value, place, f" {value:.1f}", va="center")
right.set_xlim(0, 1.15 * max(apart.values()))
plotting.label(right, x="divergence from the base, millinats per token", title="Before the first step")
show(
    figure,
    "Left, stacked bars of the memory of a training step, in MiB: "
    + "; ".join(f"{name} peaks at {measured[name] / MIB:.0f}" for name in budgets)
    + ". LoRA has hardly any gradients and optimiser state, QLoRA small weights, and with checkpointing there are "
    "few activations. Right, the divergence from the base model before training, in millinats per token: "
    + ", ".join(f"{name} {value:.1f}" for name, value in apart.items())
    + ".",
)

# %% [markdown]
# ## What goes wrong in practice
#
# **Checkpointing a frozen model.** Your `CheckpointFunction`, like PyTorch's with `use_reentrant=True`, records a graph
# only if *x* requires a gradient. With LoRA the embeddings are frozen, so the x of the first block does not require
# one, and nothing at all is trained. This is a well-known problem (Hugging Face transformers, issues 23170 and 42489).

# %%
model = with_lora()
block = model.transformer.h[0]
x = base.transformer.wte(batch.input_ids)
try:
    checkpoint.apply(block, x).sum().backward()
except RuntimeError as error:
    print("RuntimeError:", str(error).splitlines()[0])
checkpoint.apply(block, x.detach().requires_grad_()).sum().backward()
trained = [p for p in block.parameters() if p.requires_grad]
print(f"with x.requires_grad_(): {sum(p.grad is not None for p in trained)} of {len(trained)} have a gradient")

# %% [markdown]
# In Hugging Face's libraries, `enable_input_require_grads()` solves this; PyTorch's newer form (`use_reentrant=False`),
# which this library uses, does not have the problem. It is worse if only the first block is checkpointed: the others
# then learn, the loss falls, and nobody notices that the first block does not.
#
# **Merging.** Into which weights do you merge what QLoRA has learned? There are three choices: the dequantised weights,
# which it was trained on; the full weights, which many people use because they have the file; and the dequantised
# weights quantised to four bits again, so that the model stays small.


# %%
def merged(how):
    """A plain model with the LoRA of `tuned` merged, and the relative error of the change."""
    model, lost, size = copy.deepcopy(base), 0.0, 0.0
    for name, layer in lora_layers(tuned).items():
        Q = layer.base.quantized.dequantize()
        change = delta_weight(layer.lora_A, layer.lora_B, layer.scaling).detach()
        W = weight_of(base.get_submodule(name)) if how == "full weights" else Q
        result = four_bits(W + change).dequantize() if how == "four bits again" else W + change
        model.get_submodule(name).weight.data = result.T.contiguous()
        lost, size = lost + (result - Q - change).square().sum(), size + change.square().sum()
    return model, float((lost / size).sqrt())


print(f"not merged: held-out loss {ends['QLoRA'][0]:.4f}")
for how in ("dequantised weights", "full weights", "four bits again"):
    plain, off = merged(how)
    print(f"{how:<20} held-out loss {completion_loss(plain, held_out):.4f}, relative error of the change {off:>4.0%}")

# %% [markdown]
# Only the first is the model that you trained. The second is off by $W - Q$, for which the LoRA has learned to
# compensate; the third is rounded a second time, and changes smaller than half a step are rounded away. How much this
# affects the loss depends on the size of the change: the result of long training with a large learning rate tolerates
# more than that of careful training.
#
# **Keeping the full weights.** `QLoRA` keeps them by default, so that `undo` can restore the base. That is right for a
# comparison on a small model, but it defeats the purpose if you want to save memory.

# %%
for keep in (False, True):
    kept = predicted_memory(base.config, QLoRA(rank=8, targets="all-linear", keep_base=keep), ROWS, TOKENS)
    print(f"keep_base={keep!s:<6} weights {kept.weights / MIB:>5.1f} MiB, peak {kept.total / MIB:.1f} MiB")

# %% [markdown]
# **LoftQ without the scaling.** Code that multiplies by alpha / r loads a file with LoftQ's A and B.

# %%
careless = copy.deepcopy(starts["LoftQ, r = 8, T = 5"])
with torch.no_grad():
    for layer in lora_layers(careless).values():
        layer.lora_B *= layer.scaling
print(
    f"s B A instead of B A, s = {layer.scaling:g}: divergence {distance(careless)[0]:.0f} millinats per token", end=""
)
print(f", correctly scaled {apart['LoftQ, r = 8, T = 5']:.1f}")

# %% [markdown]
# Also, a LoftQ adapter belongs to *its* Q. On a base that was quantised by other software, $B A$ corrects an error that
# is not there.
#
# **Counting parameters that do not exist.** The 4-bit weights are not PyTorch parameters. If you report the trained
# share relative to `model.parameters()`, you divide by the wrong number; in bitsandbytes, where the packed bytes *are*
# a parameter, it is wrong by another factor.

# %%
model = with_lora()
numel = sum(p.numel() for p in model.parameters())
learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
total = sum(p.numel() for p in base.parameters())
print(f"{learned / numel:.1%} of model.parameters(), {learned / total:.1%} of the base model's parameters")

# %% [markdown]
# **A file that is in memory.** On many systems `/tmp` is kept in memory. A paged optimiser with its file there moves
# pages from memory to memory, and saves nothing: give it a directory on a disk.

# %% [markdown]
# ## Summary
#
# - The gradient goes through a frozen W and not into it: W may have four bits, if it is dequantised twice per step and
#   never stored.
# - Memory has five parts. LoRA reduces gradients and optimiser state, four bits reduce the weights, checkpointing the
#   activations, and paging moves the optimiser state out. Find out which part is largest for you before you choose.
# - Memory is saved at the cost of computation: every weight is dequantised twice per step, or there is one more forward
#   pass.
# - What quantisation loses looks like noise: a low rank restores little of it, and iterating helps somewhat.
# - After training, no quantised model was worse than LoRA here. Compare runs with the same seed pair by pair, and use
#   several seeds.
#
# ## Go further
#
# - Dettmers et al. 2023, *QLoRA* (arXiv:2305.14314): section 3 (the method), section 4 (against 16 bits).
# - Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost* (arXiv:1604.06174): section 4, why it is enough to
#   store every square-root-of-L-th block.
# - Li et al. 2023, *LoftQ* (arXiv:2310.08659): section 3, algorithm 1.
# - Guo et al. 2023, *LQ-LoRA* (arXiv:2311.12023): different bits for each matrix; Xu et al. 2023, *QA-LoRA*
#   (arXiv:2309.14717): a merge that stays in four bits.
# - `benchmarks/qlora_memory.py`: the same memory as the operating system measures it.
#
# You can now train prompts, reparametrise prefixes, insert adapters, train biases, factorise changes, and do all of
# that on four bits. Suppose you are given a task, a number of parameters, an amount of memory and a time limit. Which
# method do you choose, and how do you justify it? That is the capstone, the next unit.

# %% [markdown] open_question="which_part_is_yours" points=4
# ### Open question
#
# A colleague fine-tunes a model of 1.5 billion parameters with LoRA on texts of 4,000 tokens and runs out of memory.
# "So I need QLoRA", she says. Write about ten lines: which numbers would you ask for first, how would you find out what
# fills her memory, in which order would you try four bits, checkpointing, a smaller batch with accumulation, and a
# paged optimiser, and what does each of them cost her? She also wants to merge the result and to deploy it in four
# bits: what do you tell her?
#
# **Rubric.**
# - 1 point: asks for memory by component first; at 4,000 tokens activations (and logits) outweigh 1.5 billion weights
#   in 16 bits.
# - 1 point: an order with reasons: checkpointing or smaller pieces of the batch before four bits; paging last, since a
#   LoRA's optimiser state is small.
# - 1 point: the costs: about one more forward pass; unpacking every weight in both directions; more steps, or slower
#   ones.
# - 1 point: merge into the weights that it was trained on; quantising again loses a part of the change, so measure it
#   (or use a method whose merge stays in four bits).

# %% volatile=true
progress("13")
