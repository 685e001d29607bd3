# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 00: Start here: what fine-tuning costs
#
# **By the end of this unit you can**
#
# - work with this course: write an answer, check it, read a verdict, open a hint, move on when you are stuck;
# - calculate what training a model needs: parameters, bytes of memory, bytes on disk;
# - say why fine-tuning GPT-3 takes more than a terabyte of memory, what LoRA takes instead, and which part LoRA
#   does *not* make smaller.
#
# **Prerequisites**: Python, and what a matrix, a gradient and a neural network are. No prior knowledge of LoRA is
# needed.
#
# **Time**: about 60 minutes. 5 exercises, 2 predictions, one open question.
#
# ![Left, a bar of the memory for training GPT-3 175B in full: 1.4 terabytes, of which the weights are a quarter; below
# it, where the bar for LoRA belongs, a question mark. Right, the file that is saved: 350 gigabytes after full
# fine-tuning, and a question mark for LoRA.](unit_00.png)

# %%
import tempfile
from pathlib import Path

import torch
from torch import nn

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.gpt2 import GPT2, GPT2Config, load_gpt2
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# %% [markdown]
# ## How this course works
#
# An exercise is a function (later also a class) whose body is missing. The text between the `"""` is its specification:
# shapes, units, which inputs must be refused. It contains everything you need to know.
#
# Below it is a cell with `check(...)`. Run it as often as you like. It tries your function on inputs that are drawn
# anew each time, and tells you what it found.
#
# Start small. The cost of fine-tuning always comes down to one question: **how many bytes is that?**

# %% exercise="tensor_bytes"

# %% [markdown]
# **Try the check three times** to see the three verdicts:
#
# 1. Run it before you write anything: the exercise is *not started*, which does not count as a failure.
# 2. Write `return sum(shape) * bytes_per_number`, which is wrong, run the cell and then the check.
# 3. Write the right answer.
#
# This is the second verdict, in case you skipped it. It names the case that failed, shows what went in and what came
# out, and says which idea is missing. It never shows the answer.


# %%
def adds_the_lengths(shape, bytes_per_number=4):
    return sum(shape) * bytes_per_number


check("tensor_bytes", seed=0, namespace={"tensor_bytes": adds_the_lengths})
# %% [markdown]
# `seed=0` draws the same inputs again, so that you can study one case for as long as you like. Without it, every run
# draws new ones.
#
# **Hints** open on request. Each exercise has three, each more revealing than the one before, and they cost no points.

# %%
hint("tensor_bytes")

# %% [markdown]
# **Stuck?** Take the library's version and move on: `tensor_bytes = library("tensor_bytes")`. Everything that follows
# works with it. It earns no points; you can come back at any time, and your own version earns them once it passes.
#
# Later cells say `working("tensor_bytes")`. That is *your* function if it passes its check, and the library's
# otherwise. So every experiment runs, whichever exercises you have solved.

# %%
bytes_of = working("tensor_bytes")
print(f"GPT-2's token embedding, 50,257 x 768 in float32: {bytes_of([50257, 768]) / 1e6:.0f} MB")

# %% [markdown]
# **Your progress** is stored on this computer: what passed, and how often you tried.

# %% volatile=true
progress("00")

# %% [markdown]
# ## Count the parameters
#
# A model is a list of tensors. Some are trained; others may be *frozen*: they take part in every computation, but the
# optimiser never changes them. In PyTorch a frozen parameter has `requires_grad == False`. The main difference between
# the methods of this course is which numbers they train, so this pair of counts is the first thing to ask about each of
# them.

# %% exercise="count_parameters"

# %% [markdown]
# Now count the parameters of the model that you will use throughout this course: a six-layer GPT-2 trained on fairy
# tales. Then adapt it with LoRA. Unit 09 explains what that does; for now it is enough that it freezes the model and
# puts a pair of thin matrices beside some of its weights.

# %%
count = working("count_parameters")

model, tokenizer = load_gpt2("bundled")
trained, total = count(model)
print(f"before:    {trained:>9,} of {total:,} parameters are trained")

LoRA(rank=4, targets=("c_attn.q", "c_attn.v")).adapt(model)
trained, total = count(model)
print(f"with LoRA: {trained:>9,} of {total:,} ({trained / total:.2%})")

# %% [markdown]
# Now GPT-3. It does not fit into your memory, but its *shapes* do: on PyTorch's device "meta" a tensor has a shape but
# no numbers. It has 96 layers of width 12,288 with 96 heads, and reads up to 2,048 tokens (Brown et al. 2020, table
# 2.1):

# %%
with torch.device("meta"):
    gpt3 = GPT2(GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048))
_, gpt3_parameters = count(gpt3)
print(f"GPT-3: {gpt3_parameters:,} parameters, {2 * gpt3_parameters / 1e9:,.0f} GB in 16 bits")

# %% [markdown]
# ## What training holds in memory
#
# To *use* a model you need its weights. To *train* it with Adam you need, for each trained parameter $w$ at step $t$,
#
# - its gradient $g_t$;
# - two running means, $m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t$ and
#   $v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2$, each as large as $w$ ($\beta_1$ and $\beta_2$ are two numbers just
#   below 1; Kingma and Ba 2015, algorithm 1);
#
# and, for the model as a whole, the **activations**: the intermediate results of the forward pass that the backward
# pass will need.

# %% exercise="training_memory"

# %% [markdown]
# How much is it for GPT-3 when everything is trained? Leave the activations aside for a moment.

# %%
memory = working("training_memory")


def terabytes(parts):
    return ", ".join(f"{name} {size / 1e12:.2f}" for name, size in parts.items() if size)


for precision in ("float32", "bfloat16", "mixed"):
    parts = memory(gpt3_parameters, gpt3_parameters, precision=precision)
    print(f"{precision:>8}: {sum(parts.values()) / 1e12:.1f} TB ({terabytes(parts)})")

# %% [markdown]
# Compare the first line with the last: *mixed* precision, which is how large models are trained, needs as much memory
# as float32. The 16-bit weights and gradients save exactly as much as the optimiser's float32 copy costs.
#
# The LoRA paper says that fine-tuning GPT-3 with Adam took **1.2 TB**, and 350 GB with LoRA (Hu et al. 2021, section
# 4.2). It does not say how it counts. With 16 bits for everything you get 1.4 TB, and 1.05 TB without the gradients.
# 1.2 TB lies between the two, and 350 GB is what the weights take, in 16 bits.
#
# Either way it is the *trained* parameters that are expensive: a frozen one costs 2 bytes in 16 bits, a trained one
# costs 8, and 16 in mixed precision. An A100 has 80 GB.
#
# This unit fills in the two gaps in the following picture.

# %% figure="unit_00.png"
PARTS = {"weights": "", "gradients": "///", "optimizer": "...", "activations": "xx"}
SHADES = {"weights": "#0072B2", "gradients": "#E69F00", "optimizer": "#CFE8F5", "activations": "#FFFFFF"}


def stacked(axes, runs, unit, smallest=0.09):
    """A bar for each run, cut into its parts; a part is named if it takes at least this share of the axis."""
    widest = max(sum(parts.values()) for parts in runs.values()) / unit
    for place, parts in enumerate(runs.values()):
        left = 0.0
        for name, size in parts.items():
            width = size / unit
            colour = SHADES[name]
            axes.barh(place, width, 0.55, left, color=colour, hatch=PARTS[name], edgecolor="black", linewidth=0.7)
            if width >= smallest * widest:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(left + width / 2, place, name, ha="center", va="center", fontsize=8, bbox=box)
            left += width
        said = f"{left:,.0f}" if left >= 100 else f"{left:.1f}" if left else "?"
        axes.text(left + 0.01 * widest, place, said, va="center", fontweight="bold")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set(xlim=(0, 1.14 * widest), ylim=(len(runs) - 0.5, -0.5))


figure, (left, right) = plotting.panels(2, width=5.0, height=2.5)
stacked(left, {"full": memory(gpt3_parameters, gpt3_parameters, precision="bfloat16"), "LoRA": {}}, 1e9)
plotting.label(left, x="gigabytes of memory, without activations", title="To train GPT-3 in 16 bits")
stacked(right, {"full": {"weights": 2 * gpt3_parameters}, "LoRA": {}}, 1e9)
plotting.label(right, x="gigabytes", title="To save the result")
show(
    figure,
    "Left, a bar of the memory for training GPT-3 in 16 bits: about 1,400 gigabytes for full fine-tuning, a quarter "
    "each for weights and gradients and half for the optimiser; the bar for LoRA is missing, with a question mark in "
    "its place. Right, what is saved: 349 gigabytes for full fine-tuning, and again a question mark for LoRA.",
)

# %% [markdown]
# Now the activations. Add them up for one block and multiply.

# %% exercise="activation_bytes"

# %%
activations = working("activation_bytes")

for texts, tokens in ((1, 512), (1, 1024), (1, 2048), (8, 2048)):
    size = activations(texts, tokens, width=12288, heads=96, layers=96)
    print(f"GPT-3, {texts} x {tokens:>4} tokens: {size / 1e9:>5,.0f} GB of activations")

# %% [markdown]
# Twice as many texts need twice as many bytes. Texts of twice the *length* need more than that: the attention matrices,
# (T, T) for each head, grow with the square of the length. The activations of a single long text are therefore nearly
# as large as the weights. In practice they are not all kept: modern kernels never store the (T, T) matrices, and
# gradient checkpointing computes the rest a second time instead of keeping it (unit 13).

# %% [markdown]
# ## What is saved
#
# After training, the result is saved to disk. After full fine-tuning that is the whole model; for a hundred tasks, a
# hundred whole models. If the model was frozen, only what was trained has to be saved.

# %% prediction="size_of_the_change"

# %% exercise="checkpoint_bytes"

# %% [markdown]
# The experiment: adapt GPT-3 with LoRA as in the paper, with rank 4 on the matrices that compute queries and values.

# %%
stored = working("checkpoint_bytes")

gpt3 = gpt3.bfloat16()
whole = stored(gpt3)
LoRA(rank=4, targets=("c_attn.q", "c_attn.v")).adapt(gpt3)
gpt3_trained, gpt3_total = count(gpt3)
change = stored(gpt3, only_trained=True)
print(f"trained: {gpt3_trained:,} of {gpt3_total:,}, one in {gpt3_total / gpt3_trained:,.0f}")
print(f"saved:   {change / 1e6:.1f} MB instead of {whole / 1e9:,.0f} GB")

# %% check="size_of_the_change"

# %% [markdown]
# Here is the completed picture: on the left what has to be in memory, on the right what goes to disk. LoRA removes the
# gradients and the optimiser's states, three quarters of the left-hand bar, and leaves the weights as they are. On the
# right it removes all but one part in nine thousand.

# %%
runs = {
    "full": memory(gpt3_parameters, gpt3_parameters, precision="bfloat16"),
    "LoRA": memory(gpt3_total, gpt3_trained, precision="bfloat16"),
}
figure, (left, right) = plotting.panels(2, width=5.0, height=2.5)
stacked(left, runs, 1e9)
left.axvline(1200, color="black", linestyle=":", linewidth=1)
left.text(1190, 0.62, "the paper's\n1.2 TB", ha="right", va="center", fontsize=8)
plotting.label(left, x="gigabytes of memory, without activations", title="To train GPT-3 in 16 bits")
right.barh(["full", "LoRA"], [whole / 1e6, change / 1e6], 0.55, color=SHADES["weights"], edgecolor="black")
for place, size in enumerate((whole, change)):
    right.text(1.2 * size / 1e6, place, f"{size / 1e6:,.0f}", va="center", fontweight="bold")
right.set(xscale="log", xlim=(1, 1e7))
right.invert_yaxis()
plotting.label(right, x="megabytes (each mark is ten times the last)", title="To save the result")
show(
    figure,
    "Left, bars of memory for training GPT-3 in 16 bits: about 1,400 gigabytes for full fine-tuning, a quarter each "
    "for weights and gradients and half for the optimiser; about 350 with LoRA, all weights. A dotted line marks the "
    "paper's 1.2 terabytes. Right, on a scale of powers of ten, what is saved: 350,000 megabytes against 38.",
)

# %% [markdown]
# ## Count, then measure
#
# So far all of this was arithmetic. The bundled GPT-2 is small enough to measure: train it for one step and ask every
# tensor how large it is.

# %% prediction="what_stays"

# %% [markdown]
# The sizes of weights, gradients and Adam's states can be read directly. For the activations PyTorch has a hook that is
# called with each tensor as it is saved for the backward pass. Tensors can share memory, so each piece of memory counts
# once, and weights are left out.

# %%
ids = torch.tensor([tokenizer.encode("Once upon a time there was a king who had three daughters. " * 6)[:64]] * 4)


def one_step(method):
    """Adapt a fresh model, train it for one step on 4 texts of 64 tokens, and measure the bytes of each part."""
    model, _ = load_gpt2("bundled")
    method.adapt(model)
    model.train()
    optimizer = torch.optim.Adam(method.trainable(model).values())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model(ids), ids)
    loss.backward()
    optimizer.step()
    return model, {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(state.nbytes for each in optimizer.state.values() for state in each.values()),
        "activations": sum(kept.values()),
    }


methods = {
    "full": FullFineTuning(keep_base=False),
    "LoRA, all matrices": LoRA(rank=8),
    "LoRA, q and v": LoRA(rank=4, targets=("c_attn.q", "c_attn.v")),
}
adapted, measured = {}, {}
for name, method in tqdm(methods.items(), desc="one step each"):
    adapted[name], measured[name] = one_step(method)

# %% [markdown]
# Compare what you calculated with what was measured, in bytes:

# %%
for name, parts in measured.items():
    trained, total = count(adapted[name])
    counted = memory(total, trained)
    said = [f"{part} {counted[part]:>10,} ({parts[part] - counted[part]:+})" for part in list(counted)[:3]]
    print(f"{name:<18}  " + "  ".join(said))

# %% [markdown]
# In brackets is how many bytes more were measured than calculated. Weights and gradients agree to the byte. The
# optimiser holds up to a few hundred more: for each tensor PyTorch's Adam also keeps the step number, in 4 bytes.
#
# And the activations?

# %%
figure, (axes,) = plotting.panels(1, width=8, height=3.0)
stacked(axes, measured, 1e6, smallest=0.07)
plotting.label(axes, x="megabytes, measured after one step on 4 x 64 tokens", title="The activations stay")
show(
    figure,
    "Bars of the measured memory of one training step of the bundled GPT-2. Full fine-tuning: weights, gradients, "
    "optimiser states twice as large, and activations. Both kinds of LoRA: the same weights, almost no gradients and "
    "optimiser states, and activations that are at least two thirds as large as before.",
)

# %%
before = measured["full"]["activations"]
for name, parts in measured.items():
    print(f"{name:<18} keeps {parts['activations'] / before:.0%} of the activations of full fine-tuning")

# %% check="what_stays"

# %% [markdown]
# Why are they smaller at all? The gradient of a weight matrix is computed from its *input*, which therefore has to be
# kept. A frozen matrix needs no gradient, so its input can be freed, unless something trained beside it needs it. With
# LoRA on q and v only, the inputs of the MLP's matrices are freed; with LoRA on every matrix, almost nothing is.
#
# So what LoRA saves depends on what fills your memory. (The paper's 350 GB do not include the activations.) With a
# large model and short texts, weights, gradients and optimiser states dominate, and LoRA saves two thirds to three
# quarters of the memory. With a small model and long texts, activations dominate, and LoRA helps little. Move the
# slider to larger models to see the balance shift.
#
# (The sum is a little pessimistic: during the backward pass activations are freed as gradients appear, so not all of
# it is in memory at the same moment.)

# %%
MODELS = {  # (layers, width, heads): Radford et al. 2019, table 2; Brown et al. 2020, table 2.1
    "GPT-2 small": (12, 768, 12),
    "GPT-2 medium": (24, 1024, 16),
    "GPT-2 large": (36, 1280, 20),
    "GPT-2 XL": (48, 1600, 25),
    "GPT-3 6.7B": (32, 4096, 32),
    "GPT-3 175B": (96, 12288, 96),
}


def what_fits(name):
    layers, width, heads = MODELS[name]
    total = 12 * layers * width**2 + (50257 + 1024) * width  # blocks and embeddings, without biases
    pairs = 2 * layers * 4 * 2 * width  # rank 4 beside q and v of each layer
    kept = activations(1, 1024, width, heads, layers)
    runs = {
        "full": memory(total, total, kept, "mixed"),
        "LoRA": memory(total + pairs, pairs, kept, "mixed"),
    }
    figure, (axes,) = plotting.panels(1, width=8, height=2.4)
    stacked(axes, runs, 1e9)
    axes.axvline(24, color="black", linestyle=":", linewidth=1)
    axes.text(24, 0.5, " a card of 24 GB", va="center", fontsize=8)
    plotting.label(axes, x="gigabytes, mixed precision, one text of 1,024 tokens", title=f"{name}: does it fit?")
    return figure


slider(
    what_fits,
    "model",
    list(MODELS),
    "GPT-2 XL",
    "Bars of the memory for training a GPT of the chosen size, in full and with LoRA, and a dotted line at 24 GB. For "
    "GPT-2 XL full fine-tuning exceeds the line and LoRA stays below it; both include the same activations.",
)

# %% [markdown]
# And on disk? Save what LoRA trained, and then the whole model, as real files.

# %%
model = adapted["LoRA, all matrices"]
with tempfile.TemporaryDirectory() as folder:
    methods["LoRA, all matrices"].save(model, Path(folder) / "lora")
    methods["full"].save(adapted["full"], Path(folder) / "full")
    for name, counted in (("lora", stored(model, only_trained=True)), ("full", stored(adapted["full"]))):
        file = next((Path(folder) / name).glob("*.safetensors"))
        print(f"{name}: {counted:>10,} bytes counted, {file.stat().st_size:>10,} in {file.name}")

# %% [markdown]
# The rest is the header: names, shapes and dtypes.

# %% [markdown]
# ## What goes wrong in practice
#
# **A state dict lists shared tensors twice.** Many checkpoints list the output layer and the embedding under two names,
# although they are one tensor.

# %%
tied = nn.ModuleDict({"embedding": nn.Embedding(4096, 256), "head": nn.Linear(256, 4096, bias=False)})
tied["head"].weight = tied["embedding"].weight
print("in the state dict:", sum(t.numel() for t in tied.state_dict().values()))
print("in the model:     ", count(tied)[1])

# %% [markdown]
# **Saving a slice saves the whole tensor.** `weight[:8]` is a view of the whole weight, and `torch.save` writes all the
# memory behind the view. A copy is small.

# %%
weight = torch.zeros(4096, 256)
with tempfile.TemporaryDirectory() as folder:
    for name, piece in {"view": weight[:8], "copy": weight[:8].clone()}.items():
        file = Path(folder) / name
        torch.save(piece, file)
        print(
            f"{name}: {bytes_of(piece.shape):,} bytes of numbers, {round(file.stat().st_size, -3):,} bytes in the file"
        )

# %% [markdown]
# **Memory that suffices for the backward pass may not suffice for the step.** Adam creates m and v in its first step.
# If you measure memory after the backward pass and find that there is room, you can still run out of it one line later.

# %%
layer = nn.Linear(1000, 1000)
adam = torch.optim.Adam(layer.parameters())
layer(torch.ones(1, 1000)).sum().backward()
for moment in ("after backward", "after the step"):
    print(
        f"{moment}: {sum(t.nbytes for each in adam.state.values() for t in each.values()):>9,} bytes in the optimiser"
    )
    adam.step()

# %% [markdown]
# **Leaving a parameter out of the optimiser does not freeze it.** As long as it has `requires_grad`, its gradient is
# computed and kept, even if nothing uses it.

# %%
body, head = nn.Linear(1000, 1000), nn.Linear(1000, 10)
adam = torch.optim.Adam(head.parameters())  # only the head is meant to be trained
head(body(torch.ones(1, 1000))).sum().backward()
print(f"gradients that nothing uses: {sum(p.grad.nbytes for p in body.parameters()):,} bytes")
body.requires_grad_(False)  # this is freezing

# %% [markdown]
# **GB or GiB?** Disks are measured in GB of $10^9$ bytes; many tools report memory in GiB of $2^{30}$ bytes. At this
# size the difference is as large as the memory of a graphics card.

# %%
print(f"GPT-3 in 16 bits: {whole / 1e9:.0f} GB = {whole / 2**30:.0f} GiB")

# %% [markdown]
# ## Summary
#
# - Training with Adam keeps in memory: weights, gradients, two numbers for each trained parameter, and activations.
# - In 16 bits a frozen parameter costs 2 bytes and a trained one 8; in mixed precision, 2 and 16.
# - Freezing removes gradients and optimiser states. The weights stay, and so do most of the activations.
# - Fine-tuning GPT-3 takes more than a terabyte in full, and about 350 GB with LoRA, which is the weights alone.
# - The saved file shrinks with the number of trained parameters: from 350 GB to 38 MB.
#
# ## Go further
#
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 1, and section 4.2 on memory and disk.
# - Rajbhandari et al. 2020, *ZeRO* (arXiv:1910.02054): section 3, on where the memory goes.
# - Korthikanti et al. 2022, *Reducing Activation Recomputation* (arXiv:2205.05198): section 4.
# - `lora_from_scratch/finetune/accounting.py`: the exact memory account of a training step, tensor by tensor.
#
# You have seen that 18.9 million numbers describe how a model of 175 billion changes. How can so few numbers change
# *every* entry of a large matrix? The answer is a property of matrices, their **rank**, which is the subject of the
# next unit.

# %% [markdown] open_question="what_gets_cheaper" points=4
# ### Open question
#
# A colleague writes: "LoRA trains 10,000 times fewer parameters, so fine-tuning gets 10,000 times cheaper. I'll put our
# 13-billion-parameter model on my 24 GB card, with texts of 4,000 tokens." Answer in about ten lines, with numbers of
# your own: which costs fall by a factor of about 10,000, which do not, and what will happen on the card?
#
# **Rubric.**
# - 1 point: names what falls in proportion to the trained parameters (gradients, optimiser, the saved file).
# - 1 point: names what does not (weights; activations; the time of the forward pass and most of the backward pass).
# - 1 point: computes the size of the weights (26 GB in 16 bits) and sees that they alone do not fit.
# - 1 point: says something about the activations of long texts, or names a way out (fewer bits a weight,
#   checkpointing).
