# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 13: QLoRA
#
# **When you are through, you can**
#
# - train a LoRA through weights of four bits, and keep nothing of them unpacked;
# - say for any model what fills the memory of a training step, and which of three means helps: fewer bits, computing
#   twice, or moving the optimiser out;
# - put the optimiser's state into a file, page by page;
# - say what quantisation costs before training and after it, and how much of that LoftQ gives back.
#
# **You need** LoRA (unit 09) and the 4-bit format (unit 12). Unit 00 helps with the memory, unit 02 with the SVD.
#
# **Time**: about 90 minutes. 6 exercises, 2 predictions, one open question.
#
# ![Left, stacked bars of the memory of a training step for full fine-tuning, LoRA, QLoRA and QLoRA with
# checkpointing, each shorter than the one before: LoRA loses gradients and optimiser, QLoRA most of the weights,
# checkpointing the activations; the logits stay. Right, how far a model is from the base before training: QLoRA, then
# LoftQ with more iterations or a higher rank, ever nearer.](unit_13.png)

# %%
import copy
import mmap
import os
import tempfile

import torch
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.support.linear_layers import weight_of
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.accounting import measured_memory, predicted_memory
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss, load_tales
from lora_from_scratch.finetune.paged_optimizer import update_in_place
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

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 10 minutes and 6 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 16))

# %% [markdown]
# ## Through the weights, not into them
#
# Unit 12 ended with weights that take four bits and are stuck: no gradient passes through rounding. QLoRA (Dettmers et
# al. 2023, arXiv:2305.14314, section 3, eq. 5 and 6) does not try. It trains a LoRA *beside* them:
#
# $$ y = \mathrm{dequant}(W)\, x + b + s\, B A\, x $$
#
# - $x$ (in), $y$ (out): what goes into the layer and what comes out, in 16 or 32 bits; $b$ (out) the bias;
# - $W$ (out, in): frozen, in four bits; $\mathrm{dequant}(W)$: the same matrix in the type of $x$;
# - $A$ (r, in), $B$ (out, r): trained, in 16 or 32 bits; $s = \alpha / r$.
#
# What does training need of $W$? With $g = \partial L / \partial y$ (out),
#
# $$ \frac{\partial L}{\partial x} = \mathrm{dequant}(W)^\top g + s\, A^\top B^\top g, \qquad
# \frac{\partial L}{\partial W} \text{: not needed, } W \text{ is frozen.} $$
#
# So the gradient goes *through* $W$, on its way to the LoRAs of the blocks below, but never *into* it. Rounding is
# in nobody's way.
#
# It sounds as if `F.linear(x, W.dequantize())` would do. Look at what autograd then keeps for the backward pass, in six
# layers one above the other.

# %%
base, tokenizer = load_gpt2(MODEL)
base.requires_grad_(False)
mlp = base.transformer.h[0].mlp.c_fc
square = quantize_4bit(base.transformer.h[0].attn.c_proj.weight.T.contiguous(), double_quant=True)


def kept_by(layer, depth=6):
    """Bytes of all tensors that autograd keeps of `depth` layers, one above the other."""
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
print(f"kept by six layers of F.linear: {plain_bytes:,} bytes, the size of {plain_bytes / full_size:.1f} W in 32 bits")

# %% [markdown]
# Each layer keeps its own dequantised $W$, because the backward pass wants it. At the end of the forward pass all of
# them are there at once: the model in 32 bits *and* the model in four. You have to tell autograd that $W$ can be made
# again.
#
# A `torch.autograd.Function` does that. You write both directions yourself, and what is not put into `ctx` is not kept.

# %% exercise="FourBitProduct"

# %%
product = working("FourBitProduct")

own_bytes, own_gradient = kept_by(lambda x: product.apply(x, None, square))
print(f"kept by six layers: {own_bytes:,} bytes")
print(f"the gradient differs from F.linear's by {(own_gradient - plain_gradient).abs().max():.0e}")

# %% [markdown]
# Nothing is kept, and the gradient is the same. The price: $W$ is dequantised twice in a training step. One layer's $W$
# is in memory at a time, for a moment, and that is all.

# %% [markdown]
# ## A model in four bits
#
# The library's `NF4Linear` is a module around this product: it holds the `QuantizedTensor` and the bias, and says in
# which type to compute. `NF4Linear.from_layer(layer)` makes one of a layer. What is left is to put one into the place
# of every matrix of a model.

# %% exercise="quantize_model"

# %%
quantize = working("quantize_model")

small = copy.deepcopy(base)
dense = quantize(small)
matrices = sum(layer.weight.nbytes for layer in dense.values())
packed = sum(layer.quantized.nbytes for layer in nf4_layers(small).values())
rest = sum(p.nbytes for p in small.parameters())
print(f"{len(dense)} matrices: {matrices:,} bytes become {packed:,}, {8 * packed / (matrices / 4):.3f} bits a weight")
print(f"all else stays as it is: {rest:,} bytes, most of them the embeddings")

# %% [markdown]
# Look at the last line. On a small model the embeddings are a large part, and in four bits they become the largest. On
# a model of billions they are a per cent or two.
#
# Now the recipe of QLoRA in six lines: quantise, put a LoRA around every 4-bit layer, train the LoRAs alone.


# %%
def with_lora(rank=8, seed=0, four_bits=True):
    """A copy of the base with a LoRA on every matrix, at its start (B = 0)."""
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
print(f"trained: {trained:,} numbers, {4 * trained:,} bytes; the frozen matrices take {packed:,} bytes")

# %% [markdown]
# The library's method `QLoRA` does this, and saves, merges and undoes as well (`lora-from-scratch finetune --method
# qlora`).
#
# On *every* matrix: the paper finds that this matters more than the rank. With LoRA on q and v alone it does not reach
# 16-bit fine-tuning, with LoRA on all linear layers it does (section 4, figure 2).

# %% [markdown]
# ## Where the memory goes
#
# The paper's case is a model of 65 billion parameters. In 16 bits, with 16-bit gradients and Adam's two numbers in 32:

# %%
n = 65e9
print(f"full:  {n * (2 + 2 + 8) / 1e9:.0f} GB for weights, gradients and optimiser")
print(f"QLoRA: {n * 4.127 / 8 / 1e9:.1f} GB for the weights; gradients and optimiser belong to the LoRA alone")

# %% [markdown]
# "More than 780 GB" and "less than 48 GB", says the paper (abstract, section 1). Is it the same for the model in
# front of you?

# %% prediction="an_eighth"

# %% [markdown]
# `finetune/accounting.py` counts the bytes of a training step in two ways. It *predicts* them from the shapes, and it
# *measures* them: it takes two steps with a random model of the same shape, and follows every tensor from its birth to
# its end. The peak is less than the sum of the parts, since they are not all there at the same moment. "Logits" are the
# predictions over the vocabulary, and what the loss needs beside them. The arithmetic is bfloat16 (autocast), the
# weights that are not in four bits are float32.

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
# Read the table by columns.
#
# - **Weights**: what you expected, as far as the embeddings allow.
# - **Gradients and optimiser**: LoRA has done away with them; four bits add nothing to that.
# - **Activations**: they fall from LoRA to QLoRA, though nothing was done about them. Autocast makes a 16-bit copy of
#   each 32-bit weight, and autograd keeps that copy, just as it kept $W$ above. Your layer keeps none.
# - **Logits**: tokens times vocabulary, the same for all.
#
# On this model the weights are no longer what fills the memory. What about the activations?

# %% [markdown]
# ## Compute twice, keep once
#
# You have just thrown a $W$ away and made it again. The same can be done with *activations*: keep what goes into a
# block, throw away what is in between, and compute the block once more when the backward pass comes there. That is
# **gradient checkpointing** (Chen et al. 2016, arXiv:1604.06174). For $L$ blocks that keep $a$ bytes each and have an
# input of $x$ bytes, $L a$ becomes about $L x + a$: one block is unpacked at a time.

# %% exercise="CheckpointFunction"

# %%
checkpoint = working("CheckpointFunction")

block = model.transformer.h[0]
x = torch.randn(2, 32, base.config.n_embd, generator=torch.Generator().manual_seed(0), requires_grad=True)
for layer in lora_layers(block).values():
    nn.init.normal_(layer.lora_B, std=0.01, generator=torch.Generator().manual_seed(1))


def gradients_of(run):
    """The bytes that autograd keeps of one block, and the gradients of x and of the LoRAs."""
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
print(f"kept of one block: {usual:,} bytes as usual, {once:,} with checkpointing (x itself has {x.nbytes:,})")
print("the same gradients, bit for bit:", all(map(torch.equal, wanted, found)))
del model, block

# %% [markdown]
# Inside of GPT-2 the library uses PyTorch's own, which does the same for every block. It is the fourth row:

# %%
count("QLoRA + checkpointing", four_bit, True)
table(budgets)
saved = 1 - budgets["QLoRA + checkpointing"].total / budgets["LoRA"].total
print(f"\nfour bits and checkpointing together: {saved:.0%} less than LoRA")

# %% [markdown]
# Which of the two helps more depends on the model and on the batch. Weights grow with the square of the width,
# activations with the width times the tokens. Move the slider from the bundled shape to GPT-2 XL (1.5 billion
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
    """A bar for each method, cut into its parts; the names of the parts stand above the first bar that shows them."""
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
    "with checkpointing. Full: weights, gradients and an optimiser twice as large. LoRA: weights and activations. "
    "QLoRA: mostly activations. With checkpointing: little of anything.",
)

# %%
print("peak, as a share of LoRA's".ljust(28) + "".join(f"{size:>10}" for size in SIZES))
for name in WAYS:
    shares = [by_size[size, name].total / by_size[size, "LoRA"].total for size in SIZES]
    print(f"{name:<28}" + "".join(f"{share:>10.0%}" for share in shares))

# %% [markdown]
# ## What it costs in work
#
# Memory is bought with time. Clocks lie on a shared machine, so count: the multiplications and additions of one forward
# and backward pass, and how many weights are unpacked.

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
    print(f"{name:<22} {share:>5.0%} of LoRA's operations, every weight unpacked {unpacked / frozen:.2f} times")

# %% [markdown]
# - Four bits cost no product of matrices more, but every weight is unpacked twice (and a little less: the lowest layer
#   has nothing below it that wants a gradient), and unpacking is not counted in the first column. What people report
#   of larger models is about a third less memory for about a third more time.
# - Checkpointing adds one more forward pass: the blocks are computed three times instead of two, and unpacked three
#   times.
#
# So the order in which to spend time: first what is free, then what costs least for what it saves *on your model*.

# %% [markdown]
# ## The optimiser's state, page by page
#
# Even where the average fits, a long text may not, and a run that dies at step 9,000 has cost as much as one that
# works. QLoRA's third idea is a **paged optimiser** (section 3, "Paged Optimizers"): Adam's $m$ and $v$ are needed at
# one moment of a step only, so let the system move them out when there is no room. The paper uses CUDA's unified
# memory, which moves pages between the graphics card and the computer. You do the same one storey lower, between the
# computer's memory and a file, with what every operating system has: `mmap`. The pages of a mapped file come into
# memory when they are touched, and leave it when you say so.

# %% exercise="Pages"

# %% [markdown]
# Take one step of AdamW on a parameter whose $m$ and $v$ lie in a file. `update_in_place` is AdamW in place (your
# `adamw_step` of unit 04, writing into its arguments): made anew, $m$ and $v$ would be in memory again and not in the
# file.

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
print("after three steps, the bits of PyTorch's AdamW:", torch.equal(p, twin))

# %% [markdown]
# How much is there to move out? The column "optimiser" of the table says it.

# %%
for name, budget in budgets.items():
    print(
        f"{name:<22} optimiser {budget.optimizer / MIB:>5.1f} MiB, {budget.optimizer / budget.total:>4.0%} of the peak"
    )

# %% [markdown]
# With a LoRA there is little: paging is for full fine-tuning, for large ranks, and for the moment at which a long text
# needs everything. In the library it is `--optimizer paged-adamw`.

# %% [markdown]
# ## What quantisation costs
#
# So far only memory has changed. What of the model? Before any training, measure three things, as in unit 12: the
# **divergence** from the base model on the project's tales (nats a token), the loss on these tales, and the loss on the
# story cards that you will train for.

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
    """Divergence from the base and change of the loss on tales (both in millinats a token)."""
    seen = log_probabilities(model)
    divergence = (reference.exp() * (reference - seen)).sum(-1).mean()
    change = (reference - seen).gather(-1, tale_targets)
    return 1000 * float(divergence), 1000 * float(change.mean()), 1000 * float(change.std() / change.numel() ** 0.5)


before = completion_loss(base, held_out)
starts = {"QLoRA": with_lora()}
apart, change, spread = distance(starts["QLoRA"])
cards = completion_loss(starts["QLoRA"], held_out)
print(f"divergence            {apart:.1f} millinats a token")
print(f"loss on tales         {change:+.1f} millinats, with a standard error of {spread:.1f} over the tokens")
print(f"loss on story cards   {before:.3f} before, {cards:.3f} in four bits ({1000 * (cards - before):+.0f} millinats)")

# %% [markdown]
# A small price; on large models it is smaller still. The paper's, for the four codebooks of unit 12: mean perplexity
# 27.41 for NF4 with double quantisation, 34.34 for INT4 (table 2).
#
# But look at what training begins with. LoRA begins at the model, exactly: $B = 0$. QLoRA begins at the *quantised*
# model, a little beside it. And there is a LoRA, of rank $r$, that could hold something from the start. Could it not
# hold what was lost, $W - Q$?

# %% prediction="what_rank_eight_holds"

# %%
W = weight_of(base.transformer.h[base.config.n_layer // 3].attn.c_attn).detach()
error = W - quantize_4bit(W).dequantize()
noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
print(f"W is {tuple(W.shape)}. Share of the squared size that the best matrix of rank r holds:")
print("".ljust(24) + "".join(f"{f'r = {r}':>9}" for r in (1, 8, 32, 128)))
for name, matrix in {"W itself": W, "W - Q": error, "noise of that shape": noise}.items():
    energy = torch.linalg.svdvals(matrix).square().cumsum(0)
    print(f"{name:<24}" + "".join(f"{energy[r - 1] / energy[-1]:>9.1%}" for r in (1, 8, 32, 128)))

# %% check="what_rank_eight_holds"

# %% [markdown]
# What quantisation loses is hardly distinguishable from noise. That is bad news for every method that wants to repair
# it with a low rank, and good news for quantisation: it has no favourite direction.
#
# Still, a tenth is a tenth. **LoftQ** (Li et al. 2023, arXiv:2310.08659, section 3, algorithm 1) goes one step
# further. If $B A$ holds a part of $W$, that part need not be in $Q$; so quantise again what is left, and so on in
# turn, to make $\lVert W - Q - B A \rVert$ small:
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
# Now into a model. A LoRA layer multiplies by its own scaling, and LoftQ knows of none.

# %% exercise="begin_with_loftq"

# %%
begin = working("begin_with_loftq")


def with_loftq(rank, iterations):
    """QLoRA that begins with LoftQ."""
    model = with_lora(rank)
    for name, layer in tqdm(lora_layers(model).items(), desc=f"LoftQ, r = {rank}"):
        begin(layer, weight_of(base.get_submodule(name)), iterations, four_bits)
    return model


starts["LoftQ, r = 8, T = 1"] = with_loftq(8, 1)
starts["LoftQ, r = 8, T = 5"] = with_loftq(8, 5)
starts["LoftQ, r = 64, T = 1"] = with_loftq(64, 1)

# %%
apart = {}
print("the start".ljust(24) + "divergence   change of the loss on tales (millinats a token)")
for name, model in starts.items():
    apart[name], change, spread = distance(model)
    print(f"{name:<24}{apart[name]:>10.1f}   {change:>+6.1f} +- {spread:.1f}")

# %% [markdown]
# The divergence falls as LoftQ promises: some of the way with one iteration, more with five, and more still with a
# higher rank. The loss need not follow in order, and that is no contradiction: it adds up changes of both signs, and is
# hardly larger than its own standard error. (Unit 12: perplexity is blunt.)
#
# One thing does not depend on luck: a rank of 8 cannot give back most of it. Your prediction's table says why.

# %% [markdown]
# ## And after training?
#
# The start is not the end. Train three models on the story cards, with the same batches and the same learning rate:
# LoRA on the full weights, QLoRA, and QLoRA that begins with LoftQ (r = 8, five iterations). Three seeds, which draw
# the order of the cards and the first A (LoftQ's A is what it is). The runs are short.

# %%
starts = {name: starts[name] for name in ("LoftQ, r = 8, T = 5",)}  # the others are not needed any more
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
    """A run for each seed; their held-out losses go into `ends`. Returns the model of the first seed."""
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
by_seed = max(max(losses) - min(losses) for losses in ends.values())
by_method = max(abs(sum(losses) - sum(ends["LoRA"])) / 3 for losses in ends.values())
print(f"\nlargest difference between seeds {by_seed:.3f}, between means of methods {by_method:.3f}")

# %% [markdown]
# Compare the two numbers of the last line. When this unit was written, the seed mattered more than whether the base was
# quantised, and no quantised model ended behind LoRA: if anything they were a little ahead, by less than another seed
# changes (and at a rate of 4e-3 instead of 3e-3 with no common sign). So, on this model and this task: **what four bits
# cost is gone after a few steps of training**, since the LoRA that learns the task learns to live with $Q$ as well; and
# whether LoftQ's better start is still worth something at the end, three seeds cannot say.
#
# That is the paper's main result in small: with NF4 and LoRA on all layers, QLoRA reaches what LoRA in 16 bits reaches
# (table 4: mean MMLU accuracy of LLaMA models from 7 to 65 billion parameters 53.1 against 53.0; with FP4 52.2). And it
# agrees with LoftQ's own: its large gains are at two bits, where QLoRA often does not train at all; at four bits the
# two are close (abstract, section 4). It is *no* proof that quantisation never costs anything. These were three seeds,
# one small model, one easy task.

# %% figure="unit_13.png"
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
plotting.label(right, x="divergence from the base, millinats a token", title="Before the first step")
show(
    figure,
    "Left, stacked bars of the memory of a training step, in MiB: "
    + "; ".join(f"{name} has its peak at {measured[name] / MIB:.0f}" for name in budgets)
    + ". LoRA has no gradients and optimiser to speak of, QLoRA small weights, and with checkpointing few activations. "
    "Right, the divergence from the base model before training, in millinats a token: "
    + ", ".join(f"{name} {value:.1f}" for name, value in apart.items())
    + ".",
)

# %% [markdown]
# ## What goes wrong in practice
#
# **Checkpointing a frozen model.** Your `CheckpointFunction`, like PyTorch's with `use_reentrant=True`, makes a
# graph only if *x* needs a gradient. In LoRA the embeddings are frozen, so the x of the first block needs none, and
# nothing at all is trained. A classic (Hugging Face transformers, issues 23170 and 42489).

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
# In Hugging Face's libraries that is what `enable_input_require_grads()` does; PyTorch's newer form
# (`use_reentrant=False`), which the library here uses, has no such trap. It is worse when only the first block is
# checkpointed: then the others learn, the loss falls, and nobody notices the one that never does.
#
# **Merging.** With which weights do you merge what QLoRA has learned? There are three: the dequantised ones, which
# it was trained on; the full ones, which many take since they have the file at hand; and four bits again, so that
# the model stays small.


# %%
def merged(how):
    """A plain model with the LoRA of `tuned` merged; and how much of the change is not there afterwards."""
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
    print(
        f"{how:<20} held-out loss {completion_loss(plain, held_out):.4f}, off by {off:>4.0%} of the size of the change"
    )

# %% [markdown]
# Only the first is the model that you have trained. The second is off by $W - Q$, which the LoRA has learned to live
# with; the third rounds a second time, and what is smaller than half a step is rounded away. How much the loss minds
# depends on how large the change is: a long training with a large learning rate survives more than a careful one.
#
# **Keeping the full weights "just in case".** `QLoRA` keeps them by default, so that `undo` can give the base back. For
# a comparison on a small model that is right. For saving memory it is absurd.

# %%
for keep in (False, True):
    kept = predicted_memory(base.config, QLoRA(rank=8, targets="all-linear", keep_base=keep), ROWS, TOKENS)
    print(f"keep_base={keep!s:<6} weights {kept.weights / MIB:>5.1f} MiB, peak {kept.total / MIB:.1f} MiB")

# %% [markdown]
# **LoftQ without the scaling.** A file with LoftQ's A and B is loaded by code that multiplies by alpha / r.

# %%
careless = copy.deepcopy(starts["LoftQ, r = 8, T = 5"])
with torch.no_grad():
    for layer in lora_layers(careless).values():
        layer.lora_B *= layer.scaling
print(f"s B A instead of B A, s = {layer.scaling:g}: divergence {distance(careless)[0]:.0f} millinats a token", end="")
print(f", with care {apart['LoftQ, r = 8, T = 5']:.1f}")

# %% [markdown]
# And a LoftQ adapter belongs to *its* Q. On the base that somebody else has quantised, $B A$ repairs an error that
# is not there.
#
# **Counting what is not there.** The 4-bit weights are no parameters of PyTorch's. Whoever reports "trained share" as
# trained over `model.parameters()` divides by the wrong number; in bitsandbytes, where the packed bytes *are* a
# parameter, it is wrong by another factor.

# %%
model = with_lora()
numel = sum(p.numel() for p in model.parameters())
learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
total = sum(p.numel() for p in base.parameters())
print(f"{learned / numel:.1%} of model.parameters(), {learned / total:.1%} of the base model's parameters")

# %% [markdown]
# **A file that lies in memory.** On many systems `/tmp` is a piece of memory. A paged optimiser whose file is there
# moves its pages from memory to memory, and saves nothing: give it a directory on a disk.

# %% [markdown]
# ## Summary
#
# - The gradient goes through a frozen W and not into it: W may have four bits, if it is unpacked twice and kept never.
# - Memory has five parts. LoRA takes gradients and optimiser, four bits take the weights, checkpointing the
#   activations, and paging moves the optimiser. Look which part is yours before you choose.
# - Bits and bytes are paid for in work: every weight unpacked twice a step, or one more forward pass.
# - What quantisation loses looks like noise: a low rank gives little of it back, and iterating helps some.
# - After training, the seed mattered more than the four bits. Say so with three seeds, or do not say it.
#
# ## Go further
#
# - Dettmers et al. 2023, *QLoRA* (arXiv:2305.14314): section 3 (the method), section 4 (against 16 bits).
# - Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost* (arXiv:1604.06174): section 4, why every
#   square-root-of-L-th block is enough.
# - Li et al. 2023, *LoftQ* (arXiv:2310.08659): section 3, algorithm 1.
# - Guo et al. 2023, *LQ-LoRA* (arXiv:2311.12023): bits chosen for each matrix; Xu et al. 2023, *QA-LoRA*
#   (arXiv:2309.14717): a merge that stays in four bits.
# - `benchmarks/qlora_memory.py`: the same memory as the operating system sees it.
#
# You can now make prompts learn, fold prefixes, insert adapters, train biases, factor changes, and do all of that on
# four bits. Somebody gives you a task, so many parameters, so much memory and so many milliseconds. Which do you take,
# and how do you defend it? That is the capstone, the next unit.

# %% [markdown] open_question="which_part_is_yours" points=4
# ### Open question
#
# A colleague fine-tunes a model of 1.5 billion parameters with LoRA on texts of 4,000 tokens and runs out of memory.
# "So I need QLoRA", she says. Write about ten lines: which numbers would you ask for first, how would you find out
# what fills her memory, in which order would you try four bits, checkpointing, a smaller batch with accumulation,
# and a paged optimiser, and what does each of them cost her? She also wants to merge the result and to deploy it in
# four bits: what do you tell her?
#
# **Rubric.**
# - 1 point: memory by component first; at 4,000 tokens activations (and logits) outweigh 1.5 billion weights in 16
#   bits.
# - 1 point: an order with reasons: checkpointing or smaller pieces of the batch before four bits; paging last, since a
#   LoRA's optimiser state is small.
# - 1 point: the prices: about one more forward pass; unpacking every weight in both directions; more steps, or slower
#   ones.
# - 1 point: merging into the weights that it was trained on, and quantising again loses a part of the change:
#   measure it (or a method whose merge stays in four bits).

# %% volatile=true
progress("13")
