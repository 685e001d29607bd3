# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 24: When adapters meet
#
# **By the end of this unit you can**
#
# - merge several LoRAs into one without error, and say what a merge of their factors computes instead;
# - explain why two adapters that work alone disturb each other, and try two remedies, TIES and DARE;
# - measure what is new in a fine-tuned weight: its intruder dimensions;
# - decide when to merge adapters, and when to keep them apart.
#
# **Prerequisites**: LoRA's arithmetic (unit 09), adapters that are exchanged (unit 10), and the singular value
# decomposition (unit 02). It is an elective: no other unit needs it.
#
# **Time**: about 75 minutes, including one minute of computation. 6 exercises, 2 predictions, one open question.
#
# ![A 64 x 64 part of one weight matrix, on which two adapters meet. Each entry is shaded by which of the two keeps it among
# its largest: most belong to neither, some to one, a few to both, with equal or with opposite signs.](unit_24.png)

# %%
import copy
import inspect
import os

import torch
from matplotlib import colormaps

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, parse_mr
from lora_from_scratch.finetune.evaluation import tale_perplexity
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.linear_algebra.subspace import subspace_similarity
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA, lora_layers
from lora_from_scratch.museum.averaged_factors import faulty_sum_of_loras
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.linear_layers import is_conv1d
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (one minute on two cores), "gpt2" (needs a network connection and several minutes), or the path
# of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 32))  # of each training run

# %% [markdown]
# ## Two adapters
#
# Adapters are small, and there are many. It is tempting to combine them: one for the language, one for the task, one for
# the style. Train two for opposite tasks, as in unit 10. The *writer* turns a story card into a tale. The *reader* is
# given a tale and names the value of the card's `ending`.

# %%
model, tokenizer = load_gpt2(MODEL)
config = model.config
dataset = load_dataset("story-cards")


def shortest(examples, number):
    return sorted(examples, key=lambda example: len(example.mr) + len(example.ref))[:number]


def questions(examples):
    endings = [(example.ref, parse_mr(example.mr).get("ending")) for example in examples]
    return [Example(tale, ending) for tale, ending in endings if ending]


def prepared(examples):
    return Completions(examples, tokenizer, config.n_positions)


tasks = {
    "writing": prepared(shortest(dataset.train, 800)),
    "reading": prepared(questions(shortest(dataset.train, 1200))),
}
held_out = {
    "writing": prepared(shortest(dataset.validation, 96)[::4]).batches(12),
    "reading": prepared(questions(shortest(dataset.validation, 600))[::16][:24]).batches(12),
}


def trained(method, task, rate=None):
    """A copy of the model, trained with this method, at its tuned rate if none is given."""
    tuned = copy.deepcopy(model)
    method.adapt(tuned)
    settings = TrainingSettings(
        steps=STEPS,
        learning_rate=rate or defaults.learning_rate_for(method.name, config),
        warmup_steps=defaults.warmup_steps_for(STEPS),
    )
    Trainer(tuned, lambda step: tasks[task].batch_at(step, 8, 0), settings, progress=False).run()
    return tuned


adapters = {}  # task: layer: (A, B), where B contains the scaling
for seed, task in enumerate(tqdm(tasks, desc="adapters", unit="run")):
    layers = lora_layers(trained(LoRA(rank=8, alpha=64, seed=seed), task))
    adapters[task] = {name: (one.lora_A.detach(), one.scaling * one.lora_B.detach()) for name, one in layers.items()}
updates = {task: {name: B @ A for name, (A, B) in pairs.items()} for task, pairs in adapters.items()}
names = list(updates["writing"])


# %%
@torch.no_grad()
def losses(changes):
    """The held-out loss of both tasks, when these updates (out, in) are added to the base."""
    merged = copy.deepcopy(model)
    for name, change in changes.items():
        layer = merged.get_submodule(name)
        layer.weight += change.T if is_conv1d(layer) else change
    return {task: completion_loss(merged, batches) for task, batches in held_out.items()}


results = {"the base": losses({}), "the writer": losses(updates["writing"]), "the reader": losses(updates["reading"])}


def table(rows):
    print("                           loss of writing   loss of reading")
    for name in rows:
        print(f"{name:<26} {results[name]['writing']:>15.2f} {results[name]['reading']:>17.2f}")


table(results)

# %% [markdown]
# ## Their sum
#
# The simplest way to combine them is *task arithmetic* (Ilharco et al. 2023, arXiv:2212.04089): add the updates, each
# with a weight.
#
# $$W + w_1 B_1 A_1 + w_2 B_2 A_2$$
#
# Both updates have rank 8 in matrices with 256 rows or more, and they are nearly orthogonal: the cosine between them, as
# long vectors, is close to zero. Unit 11's measure compares subspaces: the eight directions of the input that each update
# reads, and the eight directions of the output that it writes to. They hardly overlap.

# %%
cosines = [
    torch.cosine_similarity(updates["writing"][n].flatten(), updates["reading"][n].flatten(), dim=0) for n in names
]
print(f"cosine of the two updates, mean over {len(names)} matrices: {float(torch.stack(cosines).mean()):.3f}")


def overlap(side):
    """Unit 11's phi of the eight directions that the two updates have on a side, and its mean for random directions."""
    one, other = ([update.T if side == "output" else update for update in updates[task].values()] for task in tasks)
    found = [subspace_similarity(W1, W2, 8, 8) for W1, W2 in zip(one, other, strict=True)]
    return sum(found) / len(found), sum(8 / W1.shape[1] for W1 in one) / len(one)


for side in ("input", "output"):
    found, by_chance = overlap(side)
    print(f"overlap of the two subspaces of the {side}: {found:.3f}; of random ones {by_chance:.3f}")

# %% prediction="sum_of_two"

# %% [markdown]
# Before you try, a second visit to the museum of faults. A popular library offers several ways to combine LoRAs. One of
# them, called *linear*, works like this function of ours. (It has one advantage: the result has the rank of a single
# LoRA.) Find out what it computes, for two LoRAs of rank 1, on paper.

# %%
print(inspect.getsource(faulty_sum_of_loras))

# %% [markdown]
# An example: A_1 = (1, 0), B_1 = (1, 0) as a column, A_2 = (0, 1), B_2 = (0, 1) as a column, and both weights are 1. The
# sum of the updates is the unit matrix. The function returns A = (1, 1) and B = (1, 1), and their product is a matrix of
# ones.
#
# Mend it. The result may be as large as it has to be.

# %% exercise="sum_of_loras"

# %% [markdown]
# The fault raises no error, and the result has the right shape. Write the test that finds it, and with it the mistakes
# that are close to it. The check runs it on several sound functions and several faulty ones.

# %% exercise="test_sum_of_loras"

# %%
combine, test_combine = working("sum_of_loras"), working("test_sum_of_loras")

for name, function in {"the exhibit": faulty_sum_of_loras, "yours": combine}.items():
    try:
        test_combine(function)
        print(f"{name}: passes")
    except AssertionError as error:
        print(f"{name}: fails ({error})")

name = names[0]
for label, function in {"the exhibit": faulty_sum_of_loras, "yours": combine}.items():
    A, B = function([adapters[task][name] for task in tasks], [1.0, 1.0])
    wanted = updates["writing"][name] + updates["reading"][name]
    error = (B @ A - wanted).norm() / wanted.norm()
    print(f"{label:<11} on {name}: rank {int(torch.linalg.matrix_rank(B @ A))}, error {error:.0%} of the sum")

# %% [markdown]
# Now on the whole model, with the weights (1, 1) and (1/2, 1/2).


# %%
def combined(function, weights):
    """The updates of the LoRA that this function makes of both."""
    pairs = {name: function([adapters[task][name] for task in tasks], weights) for name in names}
    return {name: B @ A for name, (A, B) in pairs.items()}


for weight in (1.0, 0.5):
    results[f"exhibit, weights {weight:g}"] = losses(combined(faulty_sum_of_loras, [weight, weight]))
    results[f"sum, weights {weight:g}"] = losses(combined(combine, [weight, weight]))
table(results)

# %% check="sum_of_two"

# %% [markdown]
# The exact sum is better than the exhibit on both tasks, with both pairs of weights. But it is no model of both tasks. As
# vectors the updates are nearly orthogonal, their subspaces hardly overlap, and still they disturb each other: each changes
# what all later layers see, and has never met the other in training.
#
# ## Less interference
#
# TIES (Yadav et al. 2023, arXiv:2306.01708) looks at single entries of the weights. Most entries of an update are small
# and can be left out. Of the large ones, some meet an entry of the other update with the opposite sign, and cancel. TIES
# has three steps: **trim** each update to its largest entries, **elect** a sign for each entry, and **merge** those that
# agree.

# %% exercise="trim"

# %% [markdown]
# Look at a part of one matrix, of which each update keeps its largest fifth.

# %% figure="unit_24.png"
trimmed = working("trim")

name = next(name for name in names if name.endswith("h.2.mlp.c_fc"))
kept = [trimmed(updates[task][name][:64, :64], 0.2) for task in tasks]
only = (kept[0] != 0).int() + (kept[1] != 0).int()
agree = kept[0] * kept[1]
picture = torch.where(agree < 0, 3.0, torch.where(agree > 0, 2.0, only.clamp(max=1).float()))
figure, (axes,) = plotting.panels(1, width=6.4, height=4.2)
image = axes.imshow(picture, cmap=colormaps["gray_r"].resampled(4), vmin=-0.5, vmax=3.5)
bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2, 3])
bar.ax.set_yticklabels(["neither", "one of them", "both, same sign", "both, opposite signs"])
plotting.label(axes, x="input", y="output", title="Whose entries are kept, of two adapters")
show(
    figure,
    "A 64 x 64 part of one weight matrix, on which two adapters meet. Each entry is shaded by which of the two keeps it "
    "among its largest: most belong to neither, some to one, a few to both, with equal or with opposite signs.",
)

# %%
signs = [torch.sign(trimmed(updates["writing"][n], 0.2) * trimmed(updates["reading"][n], 0.2)) for n in names]
both = sum(float((sign != 0).sum()) for sign in signs)
print(f"entries that both keep: {both / sum(sign.numel() for sign in signs):.1%}")
print(f"of these with opposite signs: {sum(float((sign < 0).sum()) for sign in signs) / both:.0%}")

# %% [markdown]
# Now elect and merge. An example with three updates of one entry: 5, -1 and -2. The sum is 2, so the elected sign is
# plus, although two of three are negative. Only the 5 agrees, and the mean of what agrees is 5.

# %% exercise="merge_agreeing"

# %% [markdown]
# DARE (Yu et al. 2024, arXiv:2311.03099) does without a choice: it drops entries at random, up to nine of ten, and
# rescales the others. Two updates that keep a tenth each rarely meet.

# %% exercise="drop_and_rescale"

# %%
merge, drop = working("merge_agreeing"), working("drop_and_rescale")


def ties(density, weights=(1.0, 1.0)):
    scaled = [{n: w * updates[task][n] for n in names} for w, task in zip(weights, tasks, strict=True)]
    return {n: merge(torch.stack([trimmed(one[n], density) for one in scaled])) for n in names}


def dare(rate):
    generator = torch.Generator().manual_seed(0)
    return {n: sum(drop(updates[task][n], rate, generator) for task in tasks) for n in names}


for density in (0.1, 0.3):
    results[f"TIES, density {density}"] = losses(ties(density))
for rate in (0.5, 0.9):
    results[f"DARE, drop rate {rate}"] = losses(dare(rate))
table([name for name in results if name.startswith(("the", "sum", "TIES", "DARE"))])

# %%
figure, (axes,) = plotting.panels(1, width=8, height=5)
axes.set_yscale("log")  # before the points, whose names are placed by it
plotting.points(axes, {name: (result["writing"], result["reading"]) for name, result in results.items()})
plotting.label(axes, x="held-out loss of writing", y="held-out loss of reading", title="Two tasks in one model")
show(
    figure,
    "Points of the loss of writing (right is worse) and the loss of reading (up is worse), of single and merged adapters: "
    + ", ".join(f"{name} {r['writing']:.2f} and {r['reading']:.2f}" for name, r in results.items())
    + ".",
)

# %% [markdown]
# The lower left corner, where a model of both tasks would be, is empty. On the bundled model TIES is no better than the
# plain mean, and with a drop rate of 0.9 DARE ruins both tasks: these methods were made for large models, whose updates
# are small compared with what the model knows.
#
# ### Your own merge
#
# The weights need not be equal. Choose weights, or a density for TIES, or something else, so that the *sum of both
# losses* is lower than that of the mean (weights 1/2). Say first which of the two adapters needs the larger weight, and
# why.


# %%
def my_merge():
    """The updates of your merge, by name. Change this line."""
    return {n: 0.5 * updates["writing"][n] + 0.5 * updates["reading"][n] for n in names}


def compare_with_the_mean(changes):
    mine, mean = losses(changes), results["sum, weights 0.5"]
    for task in tasks:
        print(f"{task}: mean {mean[task]:.2f}, yours {mine[task]:.2f}")
    gain = sum(mean.values()) - sum(mine.values())
    if abs(gain) < 0.01:
        return "As good as the mean: change `my_merge`."
    return f"Yours is {'better' if gain > 0 else 'worse'} than the mean by {abs(gain):.2f}."


print(compare_with_the_mean(my_merge()))

# %% [markdown]
# ## What is new in a weight
#
# Why do merged LoRAs disturb what a model knows? Shuttleworth et al. (2024, arXiv:2410.21228) compare the singular
# vectors of a weight before and after fine-tuning. If fine-tuning only adjusts what is there, each leading vector
# afterwards is similar to one from before. A leading vector that is like *none* of the old ones they call an intruder
# dimension.

# %% exercise="intruder_dimensions"

# %% [markdown]
# The same task can be learned by full fine-tuning. The rates of both methods were tuned with 500 steps. For full fine-tuning
# that is 0.00025, with which 32 steps come near to LoRA's loss. For so few steps a higher rate is better (of 0.00025, 0.0005,
# 0.001 and 0.002 the third), so it is trained with four times the rate as well. Both methods change 24 matrices; look at
# the ten leading singular vectors of each, 240 in all.

# %% prediction="new_directions"

# %%
count = working("intruder_dimensions")

full_rate = defaults.learning_rate_for("full", config)
full = {
    f"full, {rate:g}": trained(FullFineTuning(keep_base=False), "writing", rate) for rate in (full_rate, 4 * full_rate)
}


def weight_of(of, name):
    """The weight (out, in)."""
    layer = of.get_submodule(name)
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()


LEADING = 10
of_writing = {"LoRA": updates["writing"]} | {
    name: {n: weight_of(tuned, n) - weight_of(model, n) for n in names} for name, tuned in full.items()
}
print("              intruders   of   largest singular value of the update, mean   loss of writing")
for name, changes in of_writing.items():
    new = sum(count(weight_of(model, n), weight_of(model, n) + changes[n], LEADING) for n in names)
    largest = sum(float(torch.linalg.matrix_norm(changes[n], 2)) for n in names) / len(names)
    tuned = full.get(name)
    loss = completion_loss(tuned, held_out["writing"]) if tuned else results["the writer"]["writing"]
    print(f"{name:<14} {new:>8} {LEADING * len(names):>4} {largest:>44.1f} {loss:>17.2f}")

# %% check="new_directions"

# %% [markdown]
# LoRA has only eight directions in each matrix, so it has to make them strong: the largest singular values of its update
# are several times those of full fine-tuning, which spreads its change over all directions. At the higher rate full
# fine-tuning has intruders as well, though fewer than LoRA, and a lower loss. (At 0.002 there were 81.) So it is not the low
# rank alone: a direction that is strong enough is an intruder, and at a low rank all of them have to be. Shuttleworth et al.
# find many in LoRA and hardly any in full fine-tuning, and that intruders are where the forgetting is. Try it: scale down the
# intruders alone, and look at what the model has learned and at the perplexity of tales, which rises when it forgets.


# %%
def with_intruders_scaled(name, factor):
    """The writer's update, with the intruders among the leading singular vectors multiplied by this factor."""
    W = weight_of(model, name)
    U, S, V = torch.linalg.svd(W + updates["writing"][name], full_matrices=False)
    known = torch.linalg.svd(W, full_matrices=False)[0]
    new = ((known.T @ U[:, :LEADING]).abs().amax(dim=0) < 0.6).nonzero().flatten()
    return updates["writing"][name] - (1 - factor) * (U[:, new] * S[new]) @ V[new]


def learned_and_forgotten(changes):
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in changes.items():
            layer = merged.get_submodule(name)
            layer.weight += change.T if is_conv1d(layer) else change
    return completion_loss(merged, held_out["writing"]), tale_perplexity(merged, tokenizer)


print("                                 loss of writing   perplexity of tales")
print(f"{'the base':<32} {results['the base']['writing']:>15.2f} {tale_perplexity(model, tokenizer):>21.1f}")
for factor in (1.0, 0.75, 0.5):
    loss, tales = learned_and_forgotten({n: with_intruders_scaled(n, factor) for n in names})
    print(f"{f'LoRA, intruders times {factor:g}':<32} {loss:>15.2f} {tales:>21.1f}")
loss, tales = learned_and_forgotten({n: 0.75 * updates["writing"][n] for n in names})
print(f"{'LoRA, the whole update times 0.75':<33} {loss:>14.2f} {tales:>21.1f}")
for name, tuned in full.items():
    loss, tales = completion_loss(tuned, held_out["writing"]), tale_perplexity(tuned, tokenizer)
    print(f"{name:<32} {loss:>15.2f} {tales:>21.1f}")

# %% [markdown]
# Scaling the intruders to three quarters gives back a good part of what was forgotten, and costs a little of what was
# learned, as Shuttleworth et al. report. But scaling the *whole* update to three quarters does better here in both
# respects: it has about the loss of full fine-tuning at the lower rate, and forgets hardly more. At the higher rate full
# fine-tuning has learned the most and forgotten the most, with a sixth of LoRA's intruders. On the bundled model the
# strength of the update explains what was forgotten at least as well as the number of its intruders. (One seed.)
#
# ## What goes wrong in practice
#
# **Merging merged weights twice.** Weights that contain an adapter are a new base. If you subtract another base from
# them, the "update" contains both adapters:

# %%
name = names[0]
other_base = weight_of(model, name) + updates["reading"][name]
wrong_update = other_base + updates["writing"][name] - weight_of(model, name)
extra = (wrong_update - updates["writing"][name]).norm() / updates["writing"][name].norm()
print(f"the update of the writer, taken from the wrong base, is off by {extra:.0%}")

# %% [markdown]
# **Trimming factors.** TIES and DARE are made for updates. The library of the exhibit applies them to A and to B, since
# the product is large. That is another method: an entry of B A depends on a whole row and a whole column.

# %%
A, B = adapters["writing"][name]
of_factors, of_update = trimmed(B, 0.2) @ trimmed(A, 0.2), trimmed(B @ A, 0.2)
for label, one in {"the update": of_update, "A and B": of_factors}.items():
    error = (one - B @ A).norm() / (B @ A).norm()
    print(f"{label:<11} trimmed to a fifth: {(one != 0).float().mean():.0%} of the entries are left, error {error:.0%}")

# %% [markdown]
# **Dropping more than the update can bear.** DARE works on large models whose updates are small. A single adapter,
# without any merge:

# %%
for rate in (0.5, 0.9):
    generator = torch.Generator().manual_seed(0)
    alone = losses({n: drop(updates["writing"][n], rate, generator) for n in names})["writing"]
    print(f"the writer alone, drop rate {rate}: {alone:.2f} instead of {results['the writer']['writing']:.2f}")

# %% [markdown]
# **Forgetting the scaling.** B A alone is not the update: multiply by alpha / r before you merge, for each adapter by
# its own.
#
# ## Summary
#
# - The weighted sum of LoRAs is a LoRA whose rank is the sum of their ranks; adding up A and B separately has cross terms.
# - Nearly orthogonal updates can still disturb each other: here the sum ruins one of the two tasks.
# - TIES trims and elects signs, DARE drops and rescales; on the bundled model neither gives a model of both tasks.
# - At a similar loss, LoRA has many intruder dimensions and full fine-tuning none; at a higher rate it has some, and forgets
#   more than LoRA.
# - If tasks are as different as these, keep the adapters apart and switch (unit 10), or train one on both tasks.
#
# ## Go further
#
# - Ilharco et al. 2023, *Editing Models with Task Arithmetic* (arXiv:2212.04089); Yadav et al. 2023, *TIES-Merging*
#   (arXiv:2306.01708); Yu et al. 2024, *Language Models are Super Mario* (arXiv:2311.03099), which is DARE.
# - Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv:2410.21228).
# - `lora_from_scratch/serving/`: many adapters on one model, without merging.

# %% [markdown] open_question="merge_or_switch" points=4
# ### Open question
#
# A company has one LoRA for a friendly tone and one for answers in French, trained separately on the same base, and
# wants friendly answers in French. They add both with weights of 1; the answers are in broken French. Write at most 150
# words: which explanations are possible, which measurement would tell them apart, and which alternatives would you try?
#
# **Rubric.**
#
# - 1 point: checks that the merge is exact: scaling, the same base, no cross terms.
# - 1 point: interference: neither adapter has seen the other's activations; varies the weights and measures both tasks.
# - 1 point: proposes a measurement: the loss of each task against the weight, agreement of signs, or intruders.
# - 1 point: alternatives: train one LoRA on both, train the second on top of the first, or switch instead of merging.

# %% volatile=true
progress("24")
