# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 23: The folklore, tested
#
# **By the end of this unit you can**
#
# - compare two settings fairly: the same examples, the same number of parameters, and for each its own learning rate;
# - judge a claim from a few seeds: it holds, it does not hold, or it cannot be decided;
# - say how often such a verdict is wrong by chance;
# - read advice about LoRA together with the conditions under which it was found.
#
# **Prerequisites**: LoRA's arithmetic (unit 09), its hyperparameters (unit 10), and tuned learning rates (unit 14). It is
# an elective: no other unit needs it.
#
# **Time**: about 65 minutes, including one minute of computation. 5 exercises, 2 predictions, one open question.
#
# ![For each claim, a bar whose length is the mean difference of three seeds divided by their spread, clipped at 6. Bars
# above 1 are verdicts in favour of the claim, bars below -1 are verdicts against it, and between the two dotted lines
# nothing is decided.](unit_23.png)

# %%
import os
import random
from collections import Counter
from statistics import fmean

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.compare.folklore import FAILS, HOLDS, UNDECIDED, rate_sweeps, read_claims
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.lora import LoRA, delta_weight, lora_layers
from lora_from_scratch.methods.placement import linear_layers
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.linear_layers import weight_of
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (one minute on two cores), "gpt2" (needs a network connection and several minutes), or the path
# of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 20))  # of each training run

# %% [markdown]
# ## Advice
#
# Much advice about LoRA circulates. Some of it was measured by those who give it, some was repeated until it became
# common knowledge, and hardly any of it says how large the effect is and how much the seeds differ. These are the claims
# that were tried for this unit, in our own words, with someone who makes each.

# %%
claims = read_claims()
for one in claims:
    print(f"{one['claim']}  [{one['source']}]")

# %% [markdown]
# Raschka 2023 is the article *Practical Tips for Finetuning LLMs Using LoRA*; Schulman et al. 2025 is *LoRA Without
# Regret*, from Thinking Machines Lab. The advice was given for models hundreds of times larger than the bundled one. A
# claim that fails here may hold there. What carries over is the way to test it.
#
# ## A fair comparison
#
# A comparison of two settings should differ in one thing. Three others change easily without being noticed.
#
# **The number of examples.** With a larger batch, the same number of steps sees more examples. If batches are compared,
# fix the examples and let the number of steps follow.

# %% exercise="steps_per_epoch"

# %%
steps = working("steps_per_epoch")

for batch in (8, 16, 32):
    print(f"320 examples in batches of {batch:>2}: {steps(320, batch)} steps")

# %% [markdown]
# **The number of parameters.** LoRA on the attention with rank 8 has fewer parameters than LoRA on all matrices with
# rank 8. If the second is better, is it the place or the size? Hu et al. (2021, section 7.1) compare places at the same
# number of parameters, and so does Schulman. Beside a weight of shape (out, in), LoRA trains A (r, in) and B (out, r):
#
# $$\text{parameters} = r \sum_{\text{layers}} (\text{in} + \text{out})$$
#
# An example: a weight of (6, 4) with rank 3 takes 3 · 10 = 30 parameters. On a weight of (2, 2) a rank takes 4, and 30 / 4
# = 7.5: ranks 7 and 8 are equally near. The lower one is taken.

# %% exercise="matched_rank"

# %%
matched = working("matched_rank")

model, tokenizer = load_gpt2(MODEL)
config = model.config
shapes = {name: tuple(weight_of(layer).shape) for name, layer in linear_layers(model).items()}
attention = [shape for name, shape in shapes.items() if ".attn." in name]
mlp = [shape for name, shape in shapes.items() if ".mlp." in name]
ranks = {"attention": matched(8, attention + mlp, attention), "MLP": matched(8, attention + mlp, mlp)}
for name, layers in (("attention", attention), ("MLP", mlp), ("all", attention + mlp)):
    rank = ranks.get(name, 8)
    print(f"{name:<10} rank {rank:>2}: {rank * sum(out + into for out, into in layers):,} parameters")

# %% [markdown]
# **The learning rate.** If both settings have the same learning rate, it is the best one for at most one of them. So each
# setting gets its own, from a sweep whose best rate is not at the edge (unit 14). Sometimes the rate itself is the
# claim: the best rate of LoRA is said to be ten times that of full fine-tuning.

# %% exercise="best_rate_ratio"

# %% [markdown]
# The sweeps below are those of the benchmark behind this unit: 40 steps, neighbouring rates a factor of 2 apart.

# %%
ratio = working("best_rate_ratio")

sweeps = rate_sweeps()
for name, seeds in sweeps.items():
    for seed, losses in enumerate(seeds):
        print(f"{name:<4} seed {seed}: " + ", ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in losses.items()))
for seed, (lora, full) in enumerate(zip(sweeps["lora"], sweeps["full"], strict=True)):
    print(f"seed {seed}: LoRA's best rate is {ratio(lora, full):g} times that of full fine-tuning")

# %% [markdown]
# ## A verdict
#
# Train both settings with several seeds. The two runs of a seed see the same batches in the same order, so that their
# *difference* has less noise than either loss (unit 14 resampled pairs for the same reason). With three seeds there are
# three differences $d_1, d_2, d_3$, their mean $\bar d$ and their spread, $\max d - \min d$. The rule of this unit, our
# own, asks for a mean that is larger than the spread:
#
# $$\text{it holds if } \bar d > \max d - \min d$$
#
# An example: the differences 0.1, 0.3 and 0.2 are all in favour. Their mean is 0.2, and so is their spread: undecided.
# With 0.2, 0.3 and 0.25 the mean is 0.25 and the spread 0.1: it holds.
#
# Some claims say that something makes *no* difference. Small differences are always found, so such a claim needs a
# margin: the largest difference that does not matter. It is chosen before the measurement.

# %% exercise="verdict"

# %% [markdown]
# How often is a verdict wrong by chance? Suppose that two settings are equally good, and that the differences of three
# seeds are random numbers from a normal distribution with mean 0.

# %% prediction="by_chance"

# %%
judge = working("verdict")


def share_of_verdicts(effect, seeds, trials=4000):
    """How often each verdict is given if the differences are normal with this mean and the standard deviation 1."""
    rng = random.Random(0)
    counts = Counter(judge([rng.gauss(effect, 1) for _ in range(seeds)]) for _ in range(trials))
    return {kind: counts[kind] / trials for kind in (HOLDS, FAILS, UNDECIDED)}


print("effect   seeds   holds   does not hold   undecided")
for effect in (0, 1, 3):
    for seeds in (3, 5):
        shares = share_of_verdicts(effect, seeds)
        print(f"{effect:>6} {seeds:>7} {shares[HOLDS]:>7.1%} {shares[FAILS]:>15.1%} {shares[UNDECIDED]:>11.1%}")

# %% check="by_chance"

# %% [markdown]
# So if none of twenty pieces of advice had any effect, one or two would still get a verdict. And an effect as large as
# the standard deviation of the seeds is mostly missed with three seeds. With five seeds this rule becomes stricter still,
# because the spread of more numbers is larger: more seeds need another rule, such as a t test.
#
# ## Two claims, live
#
# Adapt the MLP rather than the attention, says Schulman, at equal numbers of parameters. Train both, three seeds each,
# and LoRA on all matrices as well. The learning rates are those that were best at 40 steps.

# %%
dataset = load_dataset("story-cards")


def shortest(examples, number):
    return sorted(examples, key=lambda example: len(example.mr) + len(example.ref))[:number]


training = Completions(shortest(dataset.train, 800), tokenizer, config.n_positions)
held_out = Completions(shortest(dataset.validation, 256)[::8], tokenizer, config.n_positions).batches(16)


def train(method, rate, seed):
    """Adapt and train a fresh model; return it and its loss on 32 held-out cards."""
    tuned, _ = load_gpt2(MODEL)
    method.adapt(tuned)
    settings = TrainingSettings(steps=STEPS, learning_rate=rate, warmup_steps=2, seed=seed)
    Trainer(tuned, lambda step: training.batch_at(step, 8, seed), settings, progress=False).run()
    return tuned, completion_loss(tuned, held_out)


SEEDS = (0, 1, 2)
places = {
    "all": (3e-3, {}),
    "attention": (6e-3, {"rank": ranks["attention"], "targets": ("c_attn", "attn.c_proj")}),
    "MLP": (6e-3, {"rank": ranks["MLP"], "targets": ("c_fc", "mlp.c_proj")}),
}
losses, adapted = {}, {}
for name, (rate, options) in tqdm(places.items(), desc="places", unit="place"):
    runs = [train(LoRA(seed=seed, **options), rate, seed) for seed in SEEDS]
    adapted[name], losses[name] = [tuned for tuned, _ in runs], [loss for _, loss in runs]
    print(f"{name:<10} " + ", ".join(f"{loss:.3f}" for loss in losses[name]))


def compare(advised, other):
    """The differences in favour of the advised setting, and the verdict."""
    differences = [b - a for a, b in zip(losses[advised], losses[other], strict=True)]
    print(f"{advised} against {other}: " + ", ".join(f"{d:+.3f}" for d in differences) + f": {judge(differences)}")


compare("MLP", "attention")
compare("all", "attention")

# %% [markdown]
# The second claim needs no further run: lower layers are said to change less than higher ones. "Change" has to be
# defined. Here it is the size of the update relative to the size of the weights, block by block.

# %% exercise="relative_change_by_block"

# %% prediction="which_blocks"

# %%
change_by_block = working("relative_change_by_block")


def changes_of(tuned):
    layers = lora_layers(tuned)
    weights = {name: weight_of(layer.base).detach() for name, layer in layers.items()}
    updates = {name: delta_weight(x.lora_A, x.lora_B, x.scaling).detach() for name, x in layers.items()}
    return change_by_block(weights, updates)


by_seed = [changes_of(tuned) for tuned in adapted["all"]]
for seed, changes in zip(SEEDS, by_seed, strict=True):
    print(f"seed {seed}: " + ", ".join(f"block {block}: {change:.2f}" for block, change in changes.items()))
half = config.n_layer // 2
differences = [fmean(list(changes.values())[half:]) - fmean(list(changes.values())[:half]) for changes in by_seed]
print("upper minus lower half: " + ", ".join(f"{d:+.3f}" for d in differences) + f": {judge(differences)}")

# %% check="which_blocks"

# %% [markdown]
# ## All claims
#
# The benchmark behind this unit (`benchmarks/folklore.py` in the repository) tried every claim in the same way: 40 steps
# unless the claim is about steps, three seeds, a tuned learning rate for each setting, and your verdict. First the claims
# that something is better, without the one about lower layers.

# %% figure="unit_23.png"
better = [one for one in claims if one["differences"] and one["margin"] is None and one["key"] != "lower-layers"]
ratios = [fmean(one["differences"]) / (max(one["differences"]) - min(one["differences"])) for one in better]
figure, (axes,) = plotting.panels(1, width=9.5, height=0.36 * len(better) + 1.2)
clipped = [max(-6, min(6, value)) for value in ratios]
axes.barh(range(len(better)), clipped, color=["0.75" if abs(value) <= 1 else "0.25" for value in ratios], height=0.6)
axes.set_yticks(range(len(better)), [one["claim"] for one in better])
axes.set_xlim(-6.2, 6.2)
axes.invert_yaxis()
for border in (-1, 1):
    axes.axvline(border, color="0.3", linewidth=1, linestyle=":")
plotting.label(axes, x="mean of three seeds / their spread (right: in favour of the claim)", title="Advice, tried")
show(
    figure,
    "For each claim, a bar whose length is the mean difference of three seeds divided by their spread, clipped at 6. Bars "
    "above 1 are verdicts in favour of the claim, bars below -1 are verdicts against it, and between the two dotted "
    "lines nothing is decided.",
)

# %%
for one in better:
    values = "; ".join(f"{name}: {fmean(numbers):.3g}" for name, numbers in one["sides"].items())
    print(f"{one['key']}: {one['verdict']} ({values})")

# %% [markdown]
# The values are means of three seeds; `compared` in each entry of `claims` says what was done. Now the claims that
# something makes no difference, or a difference of a certain size, with the largest deviation and the margin.

# %%
for one in claims:
    if one["differences"] and one["margin"] is not None:
        largest = max(map(abs, one["differences"]))
        print(f"{one['claim']}: {one['verdict']}\n    {largest:.3f} {one['unit']}, margin {one['margin']:.2g}")

# %% [markdown]
# Read the verdicts with their conditions:
#
# - After 40 steps nothing overfits yet: 80 cards are better seen four times than once, and more parameters are better,
#   even with 80 cards. So the advice against overfitting (a low rank, few epochs, dropout) cannot show here what it is
#   meant for.
# - LoRA forgets less than full fine-tuning, but it has also learned less, as the losses show. After 500 steps, at about
#   equal quality, LoRA forgets more (`benchmarks/forgetting.md` in the repository).
# - What QLoRA saves depends on the share that the weights of the blocks have in the memory. Here all weights together are
#   23 of 109 MiB; most of the rest are activations and logits.
# - The other language is the same cards with every letter replaced by another. Rank 1 is 0.78 nats per token behind
#   rank 32 there. On the cards themselves it is 0.58 behind rank 8, so most of the gap has nothing to do with the
#   language.
# - A verdict is no size. Dropout is worse by less than 0.01 nats per token here, with every seed.
#
# ### Your own claim
#
# Choose a piece of advice from the list, or one that you have heard, and try it: change the line below. Predict the
# verdict first. LoRA's `rank`, `alpha`, `targets` and `dropout` can differ from the base setting (rank 8, alpha 64, all
# matrices, no dropout), and so can the learning rate.
#
# The line below tests alpha = 2 r, at the learning rate of alpha = 8 r. Is that fair? Change the rate, and find the best
# one for alpha = 16.


# %%
def my_setting():
    """The options of LoRA that you test, and its learning rate. Change this line."""
    return {"rank": 8, "alpha": 16}, 3e-3


options, rate = my_setting()
losses["mine"] = [train(LoRA(seed=seed, **options), rate, seed)[1] for seed in SEEDS]
print("mine:", ", ".join(f"{loss:.3f}" for loss in losses["mine"]))
compare("mine", "all")

# %% [markdown]
# ## What goes wrong in practice
#
# **The same learning rate for both.** The line above, as it stands, is the most common mistake. The benchmark gave each
# alpha its own rate:

# %%
alpha = next(one for one in claims if one["key"] == "alpha")
for name, values in alpha["sides"].items():
    print(f"{name}: " + ", ".join(f"{value:.3f}" for value in values))
print(f"{alpha['claim']}: {alpha['verdict']}")

# %% [markdown]
# **One seed.** These claims could not be decided. In each line, what would you have concluded from a single seed?

# %%
for one in claims:
    if one["verdict"] == UNDECIDED:
        print(f"{one['claim']}: " + ", ".join(f"{d:+.3f}" for d in one["differences"]))

# %% [markdown]
# **A margin chosen afterwards.** The result "hardly depends on the seed" is true or not, depending on what hardly means:

# %%
seed_claim = next(one for one in claims if one["key"] == "seed")
for margin in (0.005, 0.02, 0.05):
    print(f"margin {margin}: {judge(seed_claim['differences'], margin)}")

# %% [markdown]
# **Too many claims.** Whoever tests twenty claims with this rule gets one or two verdicts by chance. A surprising one
# should be tried again, with new seeds, before it is believed.
#
# **Tuning with the seeds that are reported.** The benchmark chose its learning rates with the seeds that it reports,
# because runs are expensive. That favours the setting with the more finely tuned rate a little. With more time, tune with
# other seeds.
#
# ## Summary
#
# - A fair comparison fixes the examples, the parameters or whatever else is not compared, and tunes each side's rate.
# - The verdict compares the mean of paired differences with their spread; if nothing is clear, it says so.
# - With three seeds, this rule gives one verdict in twelve by chance, and misses effects as small as the seeds' noise.
# - Here the place of LoRA matters at equal parameters, and advice against overfitting fails where nothing overfits.
# - A verdict belongs to a model, a data set and a number of steps. It says nothing about the size of an effect.
#
# ## Go further
#
# - Schulman et al. 2025, *LoRA Without Regret* (Thinking Machines Lab); Biderman et al. 2024, *LoRA Learns Less and
#   Forgets Less* (arXiv:2405.09673); Hu et al. 2021 (arXiv:2106.09685), section 7.
# - Raschka 2023, *Practical Tips for Finetuning LLMs Using LoRA*; Hayou et al. 2024, *The Impact of Initialization on
#   LoRA Finetuning Dynamics* (arXiv:2406.08447).
# - `benchmarks/folklore.md` in the repository: the whole table. `python -m benchmarks.folklore` goes on where it stopped.

# %% [markdown] open_question="a_claim_of_your_own" points=4
# ### Open question
#
# A colleague writes: "We tried rank 16 and rank 64 with the same settings. Rank 64 has a loss of 1.31, rank 16 of 1.34. So
# higher ranks are better, and the paper that says that rank does not matter is wrong." Write at most 150 words: what may
# explain the difference, which runs you would ask for, and what they could conclude from them.
#
# **Rubric.**
#
# - 1 point: one seed each: the difference may be the spread of the seeds.
# - 1 point: one learning rate for both, tuned for neither or for one of them; alpha / r changes with the rank as well.
# - 1 point: asks for paired seeds and a sweep for each rank, and says beforehand which difference would matter.
# - 1 point: limits the conclusion to this model, data and number of steps; "no difference" needs a margin.

# %% volatile=true
progress("23")
