# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 08: BitFit and selective tuning
#
# **By the end of this unit you can**
#
# - train a model's biases and nothing else, or only the part of a bias that belongs to the queries;
# - say which bias of the attention has no effect at all, and why an optimiser moves it all the same;
# - split a model into layers that are frozen, layers that train a little, and layers that train more;
# - measure how strongly a task pulls at each tensor, and give each tensor a learning rate of its own.
#
# **Prerequisites**: a training run (unit 04) and one block of GPT-2 (unit 03).
#
# **Time**: about 80 minutes, including 2 minutes of computation. 6 exercises, 2 predictions, one open question.
#
# ![Loss on unseen cards against the share of the model that is trained, on a logarithmic axis, for five choices: two
# biases per block, the LayerNorms, all biases, SPAFIT, everything. How far does the loss fall when only a small part of
# the model is trained?](unit_08.png)

# %%
import copy
import os

import torch
from torch import nn

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.spafit import SPAFIT
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), "gpt2" (needs a network connection, about 15 minutes and 7 GB of
# memory), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 24))

# %% [markdown]
# ## Nothing new to add
#
# Prompts and prefixes (units 05 and 06) use up context. Adapters (unit 07) add layers, which make every forward pass
# longer. Can you train only a little without adding *anything*?
#
# You can train a small part of what is already there. Unit 04 trained whole blocks. Ben Zaken et al. (2022, "BitFit",
# arXiv:2106.10199, section 3) instead train a little in every block. Every linear layer computes
#
# $$y = W x + b$$
#
# with a matrix $W$ (out, in) and a bias $b$ (out). Freeze every $W$ and train every $b$. How much of the model is that?

# %% prediction="share_of_biases"

# %% exercise="select_biases"

# %%
biases_of = working("select_biases")

shapes = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}
for name, (width, layers, heads) in shapes.items():
    with torch.device("meta"):  # shapes only, no values
        empty = GPT2(GPT2Config(n_embd=width, n_layer=layers, n_head=heads))
    count, total = sum(p.numel() for p in biases_of(empty).values()), sum(p.numel() for p in empty.parameters())
    print(f"{name:<12} {count:>9,} of {total:>13,} parameters are biases: {count / total:.3%}")

base, tokenizer = load_gpt2(MODEL)
total = sum(p.numel() for p in base.parameters())
count = sum(p.numel() for p in biases_of(base).values())
print(f"{'this model':<12} {count:>9,} of {total:>13,} parameters are biases: {count / total:.3%}")

# %% check="share_of_biases"

# %% [markdown]
# A bias is trained in place, so inference costs exactly what it cost before: the tuned model performs the same
# operations as the base model. Only the biases have to be stored for each task.
#
# ## A bias that has no effect
#
# Before you train them all, look closely at one of them. The bias of `c_attn` has 3 d entries: the first d are added to
# every query, the next d to every key, the last d to every value.

# %% prediction="a_bias_without_gradient"

# %%
dataset = load_dataset("story-cards")
context = base.config.n_positions
examples = Completions(dataset.train, tokenizer, context)
held_out = Completions(dataset.validation[:24], tokenizer, context).batches(8)
batch = examples.batch_at(0, 4, seed=0)

layer = base.transformer.h[base.config.n_layer // 2].attn.c_attn
gradient = torch.autograd.grad(next_token_loss(base(batch.input_ids), batch.labels), layer.bias)[0]
for part, piece in zip(("queries", "keys", "values"), gradient.chunk(3), strict=True):
    print(f"bias of the {part:<8} |gradient| {piece.norm():.1e}")

# %% check="a_bias_without_gradient"

# %% [markdown]
# Change the keys' bias however you like: the output stays the same.

# %%
changed = copy.deepcopy(base)
draw = torch.Generator().manual_seed(0)
with torch.no_grad():
    before = changed(batch.input_ids)
    for block in changed.transformer.h:
        keys = block.attn.c_attn.bias.chunk(3)[1]
        keys += torch.randn(keys.shape, generator=draw)
    print(f"with random changes to every keys' bias, logits of magnitude {before.abs().max():.0f}", end=" ")
    print(f"change by at most {(changed(batch.input_ids) - before).abs().max():.0e}")
del changed

# %% [markdown]
# So some of BitFit's trained parameters, one in eleven on GPT-2, have no effect. (Cordonnier et al. 2020,
# arXiv:2006.16362, point this out for attention in general.)
#
# ## Two biases per block
#
# Which biases matter most? Ben Zaken et al. measure how far each bias moves in training and keep two: the bias of the
# queries and that of the MLP's first layer, `c_fc`. That is 5 d of a block's 11 d, about half of 0.08 % of the model,
# and they report losing little by it.
#
# On GPT-2 this takes some work. The queries' bias is not a tensor of its own but a third of one, and PyTorch can only
# train a whole tensor. So you need a layer that replaces `c_attn`, holds the first third as a separate parameter, and
# can write it back.

# %% [markdown]
# One layer by hand, with d = 2. The bias of `c_attn` is [1, 2 | 3, 4 | 5, 6], and training changes `bias_q` from (1, 2)
# to (1.5, 1):
#
# | | `bias_q` | `base.bias` | `bias()` | `_unmerged` |
# |---|---|---|---|---|
# | new | 1, 2 | 1, 2, 3, 4, 5, 6 | 1, 2, 3, 4, 5, 6 | None |
# | trained | 1.5, 1 | 1, 2, 3, 4, 5, 6 | 1.5, 1, 3, 4, 5, 6 | None |
# | merged | 1.5, 1 | 1.5, 1, 3, 4, 5, 6 | 1.5, 1, 3, 4, 5, 6 | 1, 2, 3, 4, 5, 6 |
# | unmerged | 1.5, 1 | 1, 2, 3, 4, 5, 6 | 1.5, 1, 3, 4, 5, 6 | None |

# %% exercise="QueryBias"

# %%
Query = working("QueryBias")

layer = Query(base.transformer.h[0].attn.c_attn.requires_grad_(False))
x = torch.randn(5, base.config.n_embd, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    start = layer(x)
    layer.bias_q += 1
    q, k, v = (layer(x) - start).chunk(3, dim=-1)
    print(f"bias_q + 1 moves q by {q.mean():.2f}, k by {k.abs().max():.2f} and v by {v.abs().max():.2f}")
    layer.merge()
    print("merged, the base alone gives the same output: ", torch.equal(layer.base(x), layer(x)))
    layer.unmerge()
    print("unmerged, the base is as it was:              ", torch.equal(layer.base(x), start))

# %% [markdown]
# ## How far does it get?
#
# Compare three choices, each with three seeds: all biases; two biases per block; and the scales and biases of the
# LayerNorms, of which there are about as many as of the two biases. (Frankle et al. 2021, arXiv:2003.00152, got
# surprisingly far by training nothing but the normalisation layers of a network that was otherwise *random*; Zhao et
# al. 2024, arXiv:2312.11420, tune the LayerNorms of language models.) The learning rate was tuned for BitFit with all
# biases over 500 steps; it has not been tuned for the other two. In a run as short as this one, a quarter of the steps
# is warm-up.


# %%
def all_biases(model):
    for bias in biases_of(model).values():
        bias.requires_grad_(True)


def two_biases(model):
    for block in model.transformer.h:
        block.mlp.c_fc.bias.requires_grad_(True)
        block.attn.c_attn = Query(block.attn.c_attn)


def layer_norms(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


def train(prepare, rate, seed=0, optimizer_of=None, name="", warmup=STEPS // 4):
    """Train a frozen copy of the base after `prepare`; return it, the share that is trained, and its loss on cards."""
    model = copy.deepcopy(base).requires_grad_(False)
    prepare(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings = TrainingSettings(steps=STEPS, learning_rate=rate, warmup_steps=warmup, seed=seed)
    optimizers = [optimizer_of(model)] if optimizer_of else None
    with tqdm(total=STEPS, desc=name, unit="step") as bar:

        def batch_at(step):
            bar.update()
            return examples.batch_at(step, 4, seed)

        Trainer(model, batch_at, settings, optimizers=optimizers, progress=False).run()
    return model.eval(), trained / total, completion_loss(model, held_out)


base_loss = completion_loss(base, held_out)
RATE = defaults.learning_rate_for("bitfit", base.config)
results, models = {}, {}


def three_seeds(name, prepare):
    runs = [train(prepare, RATE, seed, name=f"{name}, seed {seed}") for seed in range(3)]
    models[name], results[name] = runs[0][0], (runs[0][1], [loss for _, _, loss in runs])


three_seeds("all biases", all_biases)

# %%
three_seeds("two biases a block", two_biases)

# %%
three_seeds("LayerNorms", layer_norms)

# %%
print(f"before: loss {base_loss:.2f}")
for name, (share, losses) in results.items():
    print(f"{name:<19} {share:.2%} trained, loss {min(losses):.2f} to {max(losses):.2f} (three seeds)")

# %% [markdown]
# ## Groups of layers
#
# Between "a little of every layer" and "all of the last layers" (unit 04) there is a middle way: the further a layer is
# from the input, the more of it is trained. SPAFIT (Arora and Wang 2024, arXiv:2405.00201) splits the layers into three
# groups: frozen; biases only; biases and LoRA. LoRA is the subject of the next unit; here it is ready-made, a method
# that trains a few per cent of a matrix. You write the split.

# %% exercise="stratify"

# %%
cut = working("stratify")

for name, group in zip(("frozen", "biases", "biases and LoRA"), cut(base.config.n_layer, 1, 1), strict=True):
    print(f"{name:<16} layers {list(group)}")

method = SPAFIT(frozen_layers=1, bias_layers=1)
method.adapt(base)
in_layer = [0] * base.config.n_layer
for name, p in method.trainable(base).items():
    in_layer[int(name.split(".")[2])] += p.numel()
biases, with_lora = in_layer[1], in_layer[-1]
method.undo(base)


def draw_groups(frozen):
    figure, (axes,) = plotting.panels(1, width=6.5, height=2.8)
    groups = cut(base.config.n_layer, frozen, 1)
    sizes = [0] * len(groups[0]) + [biases] * len(groups[1]) + [with_lora] * len(groups[2])
    axes.bar(range(len(sizes)), sizes, color=plotting.COLOURS[0])
    for layer, size in enumerate(sizes):
        axes.annotate(f"{size:,}", (layer, size), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_ylim(0, 1.15 * with_lora)
    title = f"{frozen} frozen, 1 with biases only: {sum(sizes) / total:.2%} of the model is trained"
    plotting.label(axes, x="layer, from the input to the output", y="trained parameters", title=title)
    return figure


slider(
    draw_groups,
    "frozen layers",
    list(range(base.config.n_layer - 1)),
    1,
    "Bars of the number of trained parameters in each layer: none in the frozen layers, a few in the layer that trains "
    "its biases, and many more in the layers after it, which have LoRA as well.",
)

# %% [markdown]
# Two more to compare: SPAFIT, and training everything.


# %%
models["SPAFIT"], share, loss = train(method.adapt, defaults.learning_rate_for("spafit", base.config), name="SPAFIT")
results["SPAFIT"] = share, [loss]

# %%
FULL = defaults.learning_rate_for("full", base.config)
models["everything"], share, loss = train(lambda model: model.requires_grad_(True), FULL, name="everything")
results["everything"] = share, [loss]
for name, (share, losses) in results.items():
    fallen = (base_loss - sum(losses) / len(losses)) / (base_loss - loss)
    print(f"{name:<19} {share:>7.2%} trained, {fallen:>4.0%} of full fine-tuning's reduction in loss")

# %% figure="unit_08.png"
figure, (axes,) = plotting.panels(1, width=7.2, height=3.8)
axes.set_xscale("log")
axes.axhline(base_loss, color="0.5", linewidth=1, linestyle=":")
for share, losses in results.values():
    axes.plot([100 * share] * 2, [min(losses), max(losses)], color=plotting.COLOURS[1], linewidth=4, alpha=0.6)
axes.annotate("before", (100, base_loss), xytext=(0, 4), textcoords="offset points", ha="right", color="0.4")
axes.set_ylim(0, 1.15 * base_loss)
plotting.label(
    axes,
    x="share of the model that is trained, per cent",
    y="loss on unseen cards, nats per token",
    title=f"How far do a few trained parameters get? {STEPS} steps",
)
plotting.points(axes, {name: (100 * share, sum(losses) / len(losses)) for name, (share, losses) in results.items()})
show(
    figure,
    f"Loss on unseen cards after {STEPS} steps against the share of the model that is trained, in per cent on a "
    "logarithmic axis. "
    + "; ".join(f"{name}, {share:.2%}: {sum(losses) / len(losses):.2f}" for name, (share, losses) in results.items())
    + f". Before: {base_loss:.2f}.",
)

# %% [markdown]
# A fraction of a per cent of the parameters, all of which existed before, achieves more than half of full fine-tuning's
# reduction in loss. Where these parameters are matters more than how many there are: there are more than twice as many
# biases as in the two-biases-per-block run, so compare how little the rest add. (Ben Zaken et al. lose little without
# them, on classification with BERT.) Compare the LayerNorms too, which have the fewest parameters; and the soft prompt
# of unit 05, which had hardly fewer parameters than they have and reduced the loss far less in as many steps.
#
# This short run does not show which choice is best in the end. Over the course's 500 steps the gap to full fine-tuning
# depends on the task; the sweeps in `benchmarks/` have those numbers. Hu et al. (2021, table 4) compare the methods on
# a larger model, GPT-3:
#
# | | trained | WikiSQL | MNLI |
# |---|---|---|---|
# | full fine-tuning | 175,255.8 M | 73.8 | 89.5 |
# | BitFit | 14.2 M | 71.3 | 91.0 |
# | LoRA | 4.7 M | 73.4 | 91.7 |
#
# BitFit loses nothing at choosing one of three classes (MNLI), but it does at writing SQL.
#
# ## Your own plan
#
# In the table of three seeds the LayerNorms have the lowest loss, with the fewest parameters. Can you spend as many
# parameters better? You may train any tensors, each as a whole: scales, biases, of some kinds or of some blocks. (A
# single matrix of a block has more parameters than all the LayerNorms together.) The names are those of
# `base.named_parameters()`. The plan below trains the biases of the LayerNorms without their scales, which is half of
# what you may spend. Change `my_plan`, write down whether you expect to win, and run the cell. Your plan is trained
# with two seeds, on the same cards and at the same learning rate as the LayerNorms were: only a plan that wins with
# both is better.


# %%
def my_plan(name):
    """Whether your plan trains the parameter of this name. Change this line."""
    return ".ln_" in name and name.endswith(".bias")


def compare_with_the_layer_norms(plan):
    """Train your plan with two seeds, and say whether it is better than the LayerNorms."""
    sizes = {name: p.numel() for name, p in base.named_parameters()}
    mine, usual = {name for name in sizes if plan(name)}, {name for name in sizes if ".ln_" in name}
    spent, budget = (sum(sizes[name] for name in names) for names in (mine, usual))
    print(f"your plan trains {spent:,} parameters; the LayerNorms have {budget:,}")
    if mine == usual:
        return "These are the LayerNorms themselves: change `my_plan`."
    if not 0 < spent <= budget:
        return "Train at least one parameter, and not more than the LayerNorms have."

    def prepare(model):
        for name, p in model.named_parameters():
            p.requires_grad_(name in mine)

    gains = []
    for seed, before in enumerate(results["LayerNorms"][1][:2]):
        after = train(prepare, RATE, seed, name=f"your plan, seed {seed}")[2]
        print(f"seed {seed}: the LayerNorms {before:.2f}, your plan {after:.2f}")
        gains.append(before - after)
    better, worse = min(gains) > 0, max(gains) < 0
    return "Your plan wins." if better else "Your plan loses." if worse else "Undecided: one seed each."


print(compare_with_the_layer_norms(my_plan))

# %% [markdown]
# There is a plan that beats the LayerNorms with both seeds. Two questions lead to it. A LayerNorm has a scale, which
# multiplies, and a bias, which adds: which of the two would you rather keep? And a bias that is added in front of a
# nonlinearity does more than shift: in which blocks would you spend the rest on such biases, if it is not enough for
# all of them? If your plan wins, change one of the two at a time to see which of them it owes more to.
#
# ## Surgical fine-tuning
#
# So far, a person has decided which tensors are trained. Now let the task decide. Unit 04 used **relative gradient
# norms** ready-made (Lee et al. 2023, "Surgical fine-tuning", arXiv:2210.11466; they call the method Auto-RGN):
#
# $$\mathrm{RGN}(p) = \frac{1}{N} \sum_{n=1}^{N} \frac{\lVert g_n \rVert}{\lVert p \rVert}$$
#
# - $p$: a tensor of the model, of any shape; $\lVert p \rVert$ its Euclidean norm;
# - $g_n$: the gradient of the loss of batch n with respect to $p$, of the same shape.
#
# A large value means that the task pulls hard at this tensor, relative to the tensor's size. (Here you measure the
# matrices only; what happens with vectors is shown below.)

# %% [markdown]
# Two tensors and two batches by hand. The tensor $p = (3, 4)$ has the norm 5, and its gradients are $g_1 = (0.3, 0.4)$,
# with the norm 0.5, and $g_2 = (0, 1)$, with the norm 1:
#
# $$\mathrm{RGN}(p) = \tfrac{1}{2} \left( \tfrac{0.5}{5} + \tfrac{1}{5} \right) = 0.15.$$
#
# Another tensor has the norm 50, and its gradients have the norms 1 and 2. They are twice as large, but the RGN is only
# $\frac{1}{2} (0.02 + 0.04) = 0.03$, because the tensor is ten times as large. (The norm of the *mean* gradient of $p$,
# (0.15, 0.7), would give 0.143: gradients of different batches may cancel in part, their norms do not.)

# %% exercise="relative_gradient_norms"

# %%
rgn_of = working("relative_gradient_norms")

for p in base.parameters():
    p.requires_grad_(p.ndim == 2)
norms = rgn_of(base, [examples.batch_at(step, 4, seed=1) for step in range(3)])
for name in sorted(norms, key=norms.get, reverse=True)[:4]:
    print(f"{norms[name]:.3f}  {name}")
print("...")
for name in sorted(norms, key=norms.get, reverse=True)[-2:]:
    print(f"{norms[name]:.3f}  {name}")

# %% [markdown]
# These norms become learning rates: the tensor at which the task pulls hardest gets the full rate, the others a share
# of it.

# %% exercise="auto_rgn_weights"

# %% exercise="surgical_parameter_groups"

# %%
shares_of = working("auto_rgn_weights")
groups_of = working("surgical_parameter_groups")

shares = shares_of(norms)
by_kind = {}
for name, share in shares.items():
    kind = ".".join(name.split(".")[3:-1]) if ".h." in name else name.split(".")[1]
    by_kind.setdefault(kind, []).append(share)
figure, (axes,) = plotting.panels(1, width=6.5, height=3.2)
for place, values in enumerate(by_kind.values()):
    axes.plot(values, [place] * len(values), "o", color=plotting.COLOURS[0], alpha=0.7)
axes.set_yticks(range(len(by_kind)), list(by_kind))
axes.invert_yaxis()
axes.set_xlim(0, 1.05)
plotting.label(axes, x="share of the learning rate (one point per layer)", title="Where the task pulls")
show(
    figure,
    "Points for each kind of tensor, one per layer, at the share of the learning rate that Auto-RGN gives it. Means: "
    + ", ".join(f"{kind} {sum(values) / len(values):.2f}" for kind, values in by_kind.items())
    + ".",
)

# %% [markdown]
# Does it help? Auto-RGN lowers every rate but one, so with the same top rate it trains less. For a fair comparison, try
# a second run in which the top rate is raised until the *mean* rate over all the parameters equals that of full
# fine-tuning. (The matrices are trained; the vectors stay as they are.)

# %%
parameters = dict(base.named_parameters())
mean_share = sum(share * parameters[name].numel() for name, share in shares.items()) / sum(
    parameters[name].numel() for name in shares
)


def open_named(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name in shares)


surgery = {"everything, one rate": results["everything"][1][0]}
for name, rate in {"Auto-RGN, same top rate": FULL, "Auto-RGN, same mean rate": FULL / mean_share}.items():

    def optimizer_of(model, rate=rate):
        return torch.optim.AdamW(groups_of(model, shares, rate, defaults.WEIGHT_DECAY))

    surgery[name] = train(open_named, rate, optimizer_of=optimizer_of, name=name)[2]
print(f"mean share of the rate: {mean_share:.2f}")
for name, loss in surgery.items():
    print(f"{name:<25} loss {loss:.2f}")

# %% [markdown]
# Compare the three with each other, and with the spread over seeds that you saw above. Lee et al. tune image
# classifiers after a distribution shift, with few examples, where training can spoil what the model already does well;
# there Auto-RGN beats a single rate. Here there is plenty of data and the task is new, and the norms were measured
# once, at the start, whereas Lee et al. measure them again in every epoch. These are single runs: do not draw
# conclusions from a small difference.
#
# ## What a bias cannot do
#
# Why is full fine-tuning still ahead? Feed one layer, in the middle of the model, the *same* inputs before and after
# training, and look at how its output has changed, token by token. How much of the change is the same for every token?

# %%
place = base.config.n_layer // 2
seen = []
hook = base.transformer.h[place].mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
with torch.no_grad():
    base(batch.input_ids)
hook.remove()
x = seen[0].reshape(-1, base.config.n_embd)

with torch.no_grad():
    for name in ("all biases", "everything"):
        change = models[name].transformer.h[place].mlp.c_fc(x) - base.transformer.h[place].mlp.c_fc(x)  # (tokens, 4 d)
        common = change.mean(dim=0).square().sum() / change.square().sum(dim=1).mean()
        print(f"{name:<12} {common:.0%} of the change in c_fc's output is the same for all tokens")

# %% [markdown]
# A bias shifts a layer's output by the same amount whatever the input. What the layer *responds to* is determined by W,
# which stays. So the first line must be 100 %. The second may surprise you: on the bundled model, most of what full
# fine-tuning does in so few steps is a shift as well. That is one reason why BitFit gets as far as it does; the other
# is that the nonlinearities after a layer turn a shift into something that differs from token to token. The remainder,
# up to 100 %, is what a bias in this layer cannot do: respond differently to different inputs.
#
# ## What goes wrong in practice
#
# **An optimiser moves parameters that have no effect.** The gradient of the keys' bias is zero up to rounding errors.
# Adam divides a gradient by its own magnitude. What do you get when you divide rounding errors by their magnitude?

# %%
tuned = models["all biases"]
moves = {"queries": [], "keys": [], "values": []}
for new, old in zip(tuned.transformer.h, base.transformer.h, strict=True):
    pieces = (new.attn.c_attn.bias - old.attn.c_attn.bias).detach().chunk(3)
    for part, piece in zip(moves, pieces, strict=True):
        moves[part].append(piece.abs().mean().item())
for part, sizes in moves.items():
    print(f"bias of the {part:<8} moved by {sum(sizes) / len(sizes):.4f} on average")

with torch.no_grad():
    for new, old in zip(tuned.transformer.h, base.transformer.h, strict=True):
        d = base.config.n_embd
        new.attn.c_attn.bias[d : 2 * d] = old.attn.c_attn.bias[d : 2 * d]
print(f"with the keys' biases restored: loss {completion_loss(tuned, held_out):.4f}", end=" ")
print(f"instead of {results['all biases'][1][0]:.4f}")

# %% [markdown]
# How far a parameter has moved does not tell you what it is worth. If you rank parameters by how far Adam has moved
# them, you rank noise along with the rest.
#
# **The learning rate of full fine-tuning.** Biases need a rate many times as large. With the rate that is right for
# full fine-tuning, they hardly move.

# %%
_, _, slow = train(all_biases, FULL, name="small rate")
print(
    f"all biases at {RATE:g}: loss {results['all biases'][1][0]:.2f}; at {FULL:g}: {slow:.2f}; before: {base_loss:.2f}"
)

# %% [markdown]
# **A tuned rate without its warm-up.** A learning rate is tuned together with a schedule. Here is the same rate with a
# single step of warm-up, in a run that is too short to recover from the first steps:

# %%
_, _, thrown = train(all_biases, RATE, name="no warm-up", warmup=1)
print(f"all biases with {STEPS // 4} steps of warm-up: loss {results['all biases'][1][0]:.2f}; with 1: {thrown:.2f}")

# %% [markdown]
# **One small tensor takes the whole rate.** Now measure the vectors as well, biases and scales. Some of them are so
# small that any gradient is huge in comparison.

# %%
for _, p in base.named_parameters():
    p.requires_grad_(bool(p.any()))  # a tensor of zeros has no relative size
everywhere = shares_of(rgn_of(base, [examples.batch_at(0, 4, seed=1)]))
matrices = [share for name, share in everywhere.items() if parameters[name].ndim == 2]
alone = list(shares.values())
print("the full rate goes to", max(everywhere, key=everywhere.get))
print(f"a matrix gets {sum(alone) / len(alone):.3f} of the rate without the vectors, ", end="")
print(f"{sum(matrices) / len(matrices):.3f} with them")

# %% [markdown]
# **Division by zero.** A fresh bias is zero. Code that adds a small number to the denominator to make the division
# "safe" gives that tensor the full learning rate. Yours raises an error:

# %%
fresh = copy.deepcopy(base).requires_grad_(True)
with torch.no_grad():
    fresh.transformer.ln_f.bias.zero_()
try:
    rgn_of(fresh, [batch])
except ValueError as error:
    print("ValueError:", error)
del fresh

# %% [markdown]
# **A schedule overwrites the groups' rates.** Many training loops set the learning rate of *every* group to the
# schedule's value. Your shares are then gone after the first step. The training loop of this course multiplies each
# group's own rate by the schedule.

# %%
model = nn.Linear(4, 4)
optimizer = torch.optim.AdamW(groups_of(model, {"weight": 1.0, "bias": 0.1}, 1e-3))
print("as created:          ", [f"{group['lr']:g}" for group in optimizer.param_groups])
for group in optimizer.param_groups:
    group["lr"] = 1e-3 * 0.5  # the schedule is at one half
print("after such a loop:   ", [f"{group['lr']:g}" for group in optimizer.param_groups])

# %% [markdown]
# ## Summary
#
# - BitFit trains the biases: 0.08 % of GPT-2 small, with nothing added, no cost at inference, and more than half of
#   full fine-tuning's reduction in loss in this run.
# - The keys' bias has no effect, because a softmax does not change when the same number is added to all its inputs;
#   Adam moves it anyway.
# - Where a parameter is matters more than how many there are; biases are in every layer.
# - SPAFIT trains more of a layer the further it is from the input; Auto-RGN derives each tensor's rate from gradients.
# - Use relative sizes with care: compared with something near zero, everything is large.
#
# ## Go further
#
# - Ben Zaken et al. 2022, *BitFit* (arXiv:2106.10199): sections 3 and 4.
# - Lee et al. 2023, *Surgical fine-tuning improves adaptation to distribution shifts* (arXiv:2210.11466).
# - Arora and Wang 2024, *SPAFIT* (arXiv:2405.00201).
# - Frankle et al. 2021, *Training BatchNorm and only BatchNorm* (arXiv:2003.00152).
# - `lora_from_scratch/methods/bitfit.py`: what you wrote, and the methods around it.
#
# Biases add no cost at inference, but they can only shift. Full fine-tuning changes the weights themselves, and needs a
# whole model for every task. Is there a method that changes a weight as training would, with few parameters, and that
# *disappears* into the weight when training is over? That is unit 09.

# %% [markdown] open_question="who_decides" points=4
# ### Open question
#
# A colleague wants to find out which tensors of a model to train for a new task and proposes: train everything once,
# rank the tensors by how far they have moved, keep the top tenth, and from then on train only these. Write about ten
# lines: what can go wrong with this ranking (you have seen one case), how would you rank the tensors instead, and how
# would you test that the chosen tenth is better than another tenth?
#
# **Rubric.**
# - 1 point: with Adam, the distance moved says little about the effect; the example is the keys' bias or a small
#   tensor.
# - 1 point: another ranking, together with its weakness: relative gradient norms (the slope at one moment, near-zero
#   tensors), or the loss after restoring a tensor.
# - 1 point: a control: a random tenth, or another rule, of equal size, each with its own tuned learning rate.
# - 1 point: seeds and unseen data: the difference has to exceed the spread over seeds, on cards that were not used for
#   any decision.

# %% volatile=true
progress("08")
