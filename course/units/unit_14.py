# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 14: Capstone
#
# **By the end of this unit you can**
#
# - say what a method costs in four respects before you train it, and whether that is within a budget;
# - compare methods fairly: each with its own learning rate, on the same cards, with a test of whether the difference
#   would hold on other cards;
# - choose a method for a job, train it, submit it, and justify the choice in writing;
# - say for every method in this course when *not* to use it.
#
# **Prerequisites**: units 04 to 13, or the library's versions: each method is one line here.
#
# **Time**: about two hours, including 4 minutes of computation, and an evening for the report. 5 exercises, 2
# predictions.
#
# ![One point per method: the bytes that it stores for each task against its BLEU on the hidden cards. A pale band joins
# the methods that no other method beats in both respects.](unit_14.png)

# %%
import os
import random

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.compare.capstone.budget import BRIEFS, COSTS, base_work, budget_of, cost_of
from lora_from_scratch.compare.capstone.hidden import hidden_cards
from lora_from_scratch.compare.capstone.leaderboard import Entry, board, house_entries, placed, submit
from lora_from_scratch.compare.shootout import contestants
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import references_by_mr
from lora_from_scratch.finetune.evaluation import write_texts
from lora_from_scratch.finetune.metrics import MentionFinder, completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), "gpt2" (needs a network connection, about 15 minutes and 5 GB of
# memory), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 80))

base, tokenizer = load_gpt2(MODEL)
config = base.config
dataset = load_dataset("story-cards")

# %% [markdown]
# ## The job
#
# Three customers want tales written from story cards. Each has a different constraint:

# %%
for brief, words in BRIEFS.items():
    print(f"{brief:<8} {words}")
    for name, limit in budget_of(brief, config).items():
        print(f"         {name} <= {limit:,}   ({COSTS[name]})")

# %% [markdown]
# You will take one of these briefs, choose a method within its budget, train it, and submit texts for cards whose
# references are not in this notebook. The entry with the best BLEU within the budget leads the leaderboard.
#
# The limits are shares of what full fine-tuning of the same model costs. The table below lists the costs of every
# method in the library with its tuned settings. Nothing is trained for this table: shapes are enough (unit 00).

# %%
methods = contestants()
costs = {name: cost_of(config, method) for name, method in methods.items()}
costs["lora, merged"] = cost_of(config, methods["lora"], merged=True)
print(f"{'':<18}{'trained':>10}{'memory':>12}{'added work':>12}{'saved':>12}")
for name, cost in costs.items():
    memory, saved = cost["training_memory"] / 2**20, cost["saved_bytes"] / 1024
    print(f"{name:<18}{cost['trained_parameters']:>10,}{memory:>8.1f} MiB{cost['added_work']:>12,}{saved:>8,.0f} KiB")

# %% [markdown]
# There are four kinds of cost, and each ranks the methods differently. NOLA trains the fewest numbers, and PEZ stores the
# fewest bytes, the ids of its tokens. Prompts add much work, because they are prepended to every text; VeRA and RandLoRA
# add even more as long as they are not merged. A prefix trains an MLP that is discarded afterwards (unit 06), so it stores
# less than it trains. QLoRA saves memory and nothing else. (The memory is that of a usual step. GaLore and LoRA-GA need
# more for the few steps in which they compute gradients of whole weights.) "Parameter-efficient" describes only one
# column.

# %% exercise="over_budget"

# %%
too_much = working("over_budget")

for brief in BRIEFS:
    limits = budget_of(brief, config)
    fitting = [name for name, cost in costs.items() if not too_much(cost, limits)]
    print(f"{brief:<8} {', '.join(fitting)}")

# %% [markdown]
# Why does the brief with a thousand tenants limit the bytes? Predict before you compute.

# %% prediction="thousand_customers"

# %%
checkpoints = 1000 * costs["full"]["saved_bytes"]
adapters = costs["full"]["saved_bytes"] + 1000 * costs["lora"]["saved_bytes"]
print(f"1,000 checkpoints:              {checkpoints / 2**30:6.2f} GiB")
print(
    f"one base and 1,000 LoRAs:       {adapters / 2**30:6.2f} GiB, smaller by a factor of {checkpoints / adapters:.0f}"
)

# %% check="thousand_customers"

# %% [markdown]
# ## A fair comparison
#
# Which of the methods within a budget is the best? Every unit so far compared methods, and each time the learning rate
# was given. It is the most common mistake in a comparison: a method at a learning rate tuned for another method looks
# worse than it is. So tune each method on its own, on held-out cards that are not the test cards, and ask of every
# sweep whether its result can be trusted.

# %% exercise="best_learning_rate"

# %%
best_rate = working("best_learning_rate")
training = Completions(dataset.train, tokenizer, config.n_positions)
held_out = Completions(dataset.validation[: 8 * 16 : 8], tokenizer, config.n_positions).batches(16)


def train(method, rate, steps, seed=0):
    """Adapt and train a fresh model; return it and its loss on held-out cards."""
    model, _ = load_gpt2(MODEL)
    method.adapt(model)
    examples = Completions(
        dataset.train, tokenizer, model.config.n_positions
    )  # a method may use up some of the context
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=defaults.warmup_steps_for(steps), seed=seed
    )
    Trainer(model, lambda step: examples.batch_at(step, 8, seed), settings, method=method, progress=False).run()
    return model, completion_loss(model, held_out)


short = max(2, STEPS // 5)
losses = {}
for rate in tqdm([2e-3, 8e-3, 3e-2]):
    _, losses[rate] = train(Adapter(variant="parallel"), rate, short)
    print(f"parallel adapter, {short} steps at {rate:.0e}: loss {losses[rate]:.2f}")
rate, believable = best_rate(losses)
print(f"best: {rate:.0e};", "it has neighbours on both sides" if believable else "it is at the edge: extend the sweep")

# %% [markdown]
# This sweep has a second weakness, which the code cannot detect: it has very few steps. The best rate of a short run need
# not be that of a long one. The course tuned 25 methods with 50 and with 500 steps (`benchmarks/learning_rates.md`): for
# four of them the best rates differ by a factor of three or more, and for three of these the long run wants the lower
# one. The course's own entries had 500 steps each, and rates that were tuned with 500 steps. The next table shows what
# they reach on the hidden cards, regardless of any budget:

# %%
house = house_entries("tenants", {})  # without a limit
print(board(placed(house)))

# %% [markdown]
# ## Which methods are not dominated?
#
# Ranking by BLEU ignores the cost, and ranking by cost ignores BLEU. Without weighing one against the other, you can
# only say which methods are **dominated**: another method is at least as good in every respect, and better in one. The
# remaining methods are the **Pareto front**, and you only have to choose among these.

# %% exercise="pareto_front"

# %% figure="unit_14.png"
front_of = working("pareto_front")

entries = [entry for entry in house if "merged" not in entry.name]
saved = torch.tensor([float(entry.cost["saved_bytes"]) for entry in entries])
quality = torch.tensor([entry.bleu for entry in entries])
front = sorted((int(place) for place in front_of(saved[:, None], quality)), key=lambda place: saved[place])

figure, (axes,) = plotting.panels(1, width=7.2, height=4.2)
axes.set_xscale("log")
axes.step(saved[front] / 1024, quality[front], where="post", color="0.9", linewidth=7, zorder=0)
plotting.label(
    axes, x="KiB stored per task (logarithmic)", y="BLEU on the hidden cards", title=("Quality against storage")
)
plotting.points(axes, {entry.name: (entry.cost["saved_bytes"] / 1024, entry.bleu) for entry in entries})
on_front = ", ".join(entries[place].name for place in front)
others = ", ".join(entry.name for place, entry in enumerate(entries) if place not in front)
show(
    figure,
    "One point per method: the KiB that it stores for each task, on a logarithmic axis, against its BLEU on the hidden "
    "cards. "
    f"A pale band joins those that no other method beats in both: {on_front}. Below it: {others}.",
)

# %% [markdown]
# A method off the front can still be useful. This figure considers storage and quality only; add the memory of training
# or the work per token, and other methods are on the front:

# %%
names = ("saved_bytes", "training_memory", "added_work")
more = torch.tensor([[float(entry.cost[name]) for name in names] for entry in entries])
now = {entries[int(place)].name for place in front_of(more, quality)}
print("on the front with three costs:", ", ".join(sorted(now)))
print("additional methods:", ", ".join(sorted(now - {entries[place].name for place in front})) or "none")

# %% [markdown]
# With enough kinds of cost, nearly every method is on the front. A budget turns this into a decision: costs do not
# matter as long as they stay below their limits.

# %% exercise="choose_method"

# %%
choose = working("choose_method")

candidates = {entry.name: {**entry.cost, "quality": entry.bleu} for entry in house}
for brief in BRIEFS:
    print(f"{brief:<8} {choose(candidates, budget_of(brief, config))}")

# %% [markdown]
# This is the choice among *these* settings. You can change the rank, the width or the set of layers, and there may be a
# better point between two of these.
#
# ## Your entry
#
# Take a brief, and change the next cell: the name, the method, its settings, the learning rate, the number of steps.
# The present settings are a modest start. You may use everything that you know from the previous units; your entry is
# judged by the leaderboard, and by your report.

# %%
BRIEF = "tenants"  # or "latency", "laptop"
NAME = "a modest start"
METHOD = LoRA(rank=3, alpha=24)
RATE = defaults.learning_rate_for("lora", config)
MERGED = False  # True: the update is merged into the weights, so that it adds no work

cost = cost_of(config, METHOD, merged=MERGED)
exceeded = too_much(cost, budget_of(BRIEF, config))
print("within the budget" if not exceeded else f"too expensive: {', '.join(exceeded)}")

# %%
model, loss = train(METHOD, RATE, STEPS)
print(f"loss on held-out cards after {STEPS} steps: {loss:.2f}")

# %% [markdown]
# Look at one text before you submit a hundred. (An instructor may give your class other cards, in a file `cards.txt`
# next to this notebook.)

# %%
cards = hidden_cards()
if os.path.exists("cards.txt"):
    with open("cards.txt", encoding="utf-8") as file:
        cards = file.read().split("\n")[:-1]
texts = dict(zip(cards, write_texts(model, tokenizer, cards), strict=True))
print("card:", cards[0])
print("text:", texts[cards[0]][:300])

# %%
if cards == hidden_cards():
    lines = submit(Entry(NAME, BRIEF, cost, texts), config)  # writes capstone.json, the file that you submit
    print(board(lines))

# %% [markdown]
# `lora-from-scratch leaderboard` shows all entries that you have submitted on this computer. If you study alone, please
# do not look at the references: everything is on your own disk. In a class, the instructor draws other cards and keeps
# their seed.
#
# ## Would it be first again?
#
# Two entries on the leaderboard differ by a point. Another hundred cards would give other numbers. Would they give the
# same order?

# %% prediction="two_points_ahead"

# %% [markdown]
# You have no other cards than these. But you can draw a hundred of them with replacement, as if each card stood for
# many of its kind, and see which entry wins; and repeat this a thousand times. This is the **bootstrap** (Efron 1979);
# Koehn (2004, *Statistical Significance Tests for Machine Translation Evaluation*) applied it to BLEU.

# %% exercise="paired_bootstrap"

# %% [markdown]
# Use it to answer a question: does the training seed matter? The method, the rate and the number of steps are the same;
# the only differences are the order of the cards and the initial A. Here slot errors are counted card by card, on
# validation cards.

# %%
compare = working("paired_bootstrap")
finder = MentionFinder(dataset.lexicon)
tests = list(references_by_mr(dataset.validation))[:60]


def slot_errors(model):
    """The negative number of slot errors of each card, so that more is better."""
    written = write_texts(model, tokenizer, tests)
    found = [finder.slot_errors(text, mr) for text, mr in zip(written, tests, strict=True)]
    return -torch.tensor([float(len(missing) + len(invented)) for missing, invented in found])


twin, _ = train(LoRA(rank=3, alpha=24, seed=1), RATE, STEPS, seed=1)
half, _ = train(METHOD, RATE, max(1, STEPS // 2))
mine, others = slot_errors(model), {"another seed": slot_errors(twin), "half the steps": slot_errors(half)}
places = torch.randint(len(tests), (1000, len(tests)), generator=torch.Generator().manual_seed(0))
print(f"yours: {-float(mine.mean()):.2f} slot errors per card")
for name, scores in others.items():
    share = compare(mine, scores, places)
    print(f"{name}: {-float(scores.mean()):.2f}; yours wins {share:.0%} of 1,000 draws of {len(tests)} cards")

# %% check="two_points_ahead"

# %% [markdown]
# The bootstrap answers one question: does the choice of *cards* decide the order? It does not take the seed into
# account. Two runs of the same method can differ by more than the cards explain, and then neither is better: each is
# one random sample. Before you write "A beats B", train both with three seeds.
#
# ## Which method to use when
#
# | Method | Use it if | Avoid it if |
# |---|---|---|
# | Full fine-tuning (04) | there is one task and enough memory; in very few steps it learns the most (unit 15) | there are many tasks: each has a whole checkpoint |
# | Few-shot prompt (05) | you cannot train at all, and the model is large | texts are long, or every token costs money |
# | Soft prompt (05) | a task has to fit into kilobytes, and the model is very large | the model is small: it learns slowly and uses up context |
# | Prefix, LLaMA-Adapter (06) | the weights must not be changed; LLaMA-Adapter's gate starts as the base model | the context is short, or quality has to grow with size |
# | Adapters (07) | training memory is scarce, and a little latency is acceptable | every millisecond counts: they cannot be merged |
# | BitFit, selective (08) | 0.1 % of the parameters has to be enough, and the task is close to what the model knows | the task is new to the model |
# | LoRA (09 to 11) | nearly always try it first: it merges, switches, batches, and is supported everywhere | the change needs a high rank: new facts, new words |
# | QLoRA (12, 13) | the base does not fit into memory otherwise | it does fit: each step takes longer, and the base is less precise |
#
# Three questions decide most cases. *How many tasks are there?* With many, use something small that is not merged.
# *What is scarce during training?* If it is memory, use a quantised base, checkpointing, and methods with short
# backward passes. *What is scarce at inference?* If it is latency, use a method that can be merged.
#
# The table covers what you have built. The library has more methods, most of them variants of LoRA, each made for one
# situation. The electives (units 15 to 27) explain most of them. Start from your situation:
#
# | Situation | Methods | What was measured here | Unit |
# |---|---|---|---|
# | No particular constraint | LoRA | the quality of full fine-tuning after 500 steps, with a thirtieth of the trained parameters | 09 to 11 |
# | LoRA does not reach the quality that you need, although its learning rate is tuned | first more rank or more layers, or full fine-tuning; LoRA+, DoRA, PiSSA, OLoRA, LoRA-GA | in unit 15 none of LoRA+, DoRA, PiSSA and OLoRA was ahead of LoRA at tuned rates; after 500 steps LoRA+ and DoRA were, by 0.7 and 1.4 BLEU, which is less than LoRA's own seeds differ, and LoRA-GA was not | 10, 15 |
# | The whole weights are to be trained, and the optimiser's state does not fit | GaLore | its optimiser keeps a fortieth of what that of full fine-tuning keeps; after 500 steps it has a BLEU of 74, LoRA of the same rank 81 | 04 |
# | As few trained numbers or stored bytes as possible, merged in the end | VeRA, Tied-LoRA, NOLA, FourierFT, RandLoRA; IA3, LayerNorm tuning, BitFit | after 500 steps, the first four have a BLEU of 69, 73, 42 and 71, RandLoRA with a quarter of LoRA's numbers 78, LoRA 81 (three seeds) | 16, 17, 08 |
# | Low rank is not enough: many facts to remember, or very long training | MoRA, ReLoRA, ReMoRA; full fine-tuning | they remember more random pairs than LoRA; on story cards they are as good, and forget more | 17, 04 |
# | Several LoRAs side by side, or scales and biases trained along with one | MultiLoRA, GLoRA | with five tasks at once, MultiLoRA was behind LoRA | 17 |
# | Some layers need more than others | AdaLoRA, if the run is long enough to find out which; SPAFIT, if you already know | AdaLoRA was ahead of flat ranks, and after 500 steps it forgot less than LoRA with each of three seeds | 18, 08 |
# | The angles between the neurons of a layer should stay as they are | OFT, BOFT | after 500 steps they have a BLEU of 81 and 80, LoRA 81, and forget more than LoRA with each of three seeds | none |
# | The base does not fit into memory | QLoRA; LoftQ for short runs; LQ-LoRA for a given number of bytes | a step of QLoRA takes 100 MiB instead of LoRA's 125; larger models gain more | 13, 19 |
# | The merged model has to stay in 4 bits or fewer | QA-LoRA | ahead at 2 bits; at 4 and 3 bits QLoRA that is rounded was better | 19 |
# | Activations fill the memory | LoRA-FA; checkpointing with any method | a step of LoRA-FA takes 108 MiB instead of LoRA's 125; after 500 steps it is as good, and forgets less | 15, 13 |
# | Texts are longer than the model's context | LongLoRA | after 30 steps, training with full attention was better | 20 |
# | Weights must not be changed | prefix, LLaMA-Adapter; LoReFT, DiReFT, which edit hidden states | for one word LoReFT is at least as good as LoRA of rank 1; for whole texts only if all positions are edited | 06, 21 |
# | The prompt has to consist of real tokens | PEZ | far better than random search with as many forward passes | 21 |
# | Many tenants share one base | LoRA, not merged, or soft prompts; several in each batch | with 32 adapters, seven times the throughput of one after another | 10, 22, 05 |
# | Several adapters have to become one | merging by concatenation, TIES, DARE | no merge was good at two tasks that are very different | 24 |
# | There are rewards, but no texts to imitate | LoRA with policy gradients | rank 1 was enough for an easy reward; all ranks lost their language | 27 |
# | The model does not process text | LoRA and other methods for linear layers, BitFit | with other class numbers, tuning the head alone was best | 25 |
#
# The third column comes from the atlas (`docs/atlas.md`), the units named in the last one, and the benchmarks; it holds for
# this small model. For each method, `docs/methods.md` says when to use it and lists its settings. The atlas compares all
# of them on one task: what each reaches, what it costs, and what it forgets. Read it as you read the leaderboard: a difference
# that is smaller than the spread of the seeds is not a difference, and another task may have another order. Unit 23
# tests common advice about LoRA in the same way. Any of these methods can be your entry, too: `docs/methods.md` names
# the module to import it from.
#
# ## What goes wrong in practice
#
# **Choosing on the test set.** Fifty people submit entries, all with the same method, and each is lucky or unlucky with
# the hundred cards. How good does the winner look?

# %%
rng = random.Random(0)
rates = [sum(rng.random() < 0.20 for _ in range(100)) / 100 for _ in range(50)]
print("every system has slot errors on 20 % of all cards")
print(f"the best of 50 has them on {min(rates):.0%} of its 100 cards, the worst on {max(rates):.0%}")

# %% [markdown]
# The best of many looks better than it is. A leaderboard that can be queried again and again is no longer a test; the
# score that counts is the one on cards that were used only once.
#
# **Only one kind of cost.** "Only 5,120 parameters" is true of the soft prompt above. What does it add to the work per
# token?

# %%
for name in ("prompt", "bitfit", "lora"):
    cost = costs[name]
    share = cost["added_work"] / base_work(config)
    print(f"{name:<8} trains {cost['trained_parameters']:>8,} and adds {share:6.1%} to the work per token")

# %% [markdown]
# **Memory that does not shrink with the parameters.** BitFit trains less than a tenth of what LoRA trains here. Does it
# need a tenth of the memory?

# %%
for name in ("full", "lora", "bitfit", "qlora"):
    print(f"{name:<8} {costs[name]['training_memory'] / 2**20:6.1f} MiB at the peak of a step")

# %% [markdown]
# The memory of weights and activations does not depend on how much is trained. Only gradients and optimiser state
# become smaller, and once those are negligible, fewer parameters save nothing more.
#
# ## Summary
#
# - A method has at least four kinds of cost: trained parameters, training memory, work per token, bytes per task. No
#   method is the cheapest in all of them.
# - Tune each method on its own; a best rate at the edge of a sweep cannot be trusted.
# - The Pareto front shows what can be said without weighing the costs; a budget decides among the rest.
# - A difference is worth reporting if it holds on other cards (bootstrap) and with other seeds (train again).
# - There are good reasons to try LoRA first. They no longer apply if the change has a high rank or the base does not
#   fit into memory.
#
# ## Go further
#
# - Lialin et al. 2023, *Scaling Down to Scale Up* (arXiv:2303.15647): a survey that compares costs.
# - He et al. 2021, *Towards a Unified View of Parameter-Efficient Transfer Learning* (arXiv:2110.04366).
# - Koehn 2004, *Statistical Significance Tests for Machine Translation Evaluation*.
# - Dodge et al. 2019, *Show Your Work: Improved Reporting of Experimental Results* (arXiv:1909.03004).
# - Sheng et al. 2023, *S-LoRA: Serving Thousands of Concurrent LoRA Adapters* (arXiv:2311.03285).

# %% [markdown] open_question="capstone_report" points=14
# ### The report
#
# Write one to two pages for the customer of your brief, who has not read this course.
#
# What did you choose, and why: where does the method act, what can be merged, what is stored? Show with numbers that
# your entry keeps within the limits of the brief: costs, scores, the spread over at least three seeds. Which learning
# rates did you try for it, and which other methods or settings (at least two), each with its own learning rate? Show
# two texts, one good and one bad; say what is wrong with the bad one, what you think the cause is, and how you would
# find out. What would you do with ten times the budget? When would you advise against your own choice?
#
# **Rubric.**
# - 2 points: the brief's limits are stated, and the entry is shown to keep within them, with numbers.
# - 2 points: at least two other methods or settings were tried, each with its own learning rate.
# - 2 points: the sweep of the chosen method's learning rate is shown, and the best rate is not at the edge.
# - 2 points: at least three seeds, with the spread, and no claim that the spread does not support.
# - 2 points: the choice is justified by how the method works (where it acts, what can be merged, what is stored).
# - 2 points: a bad text is shown, with a possible cause and a way to test it.
# - 1 point: a case in which another method would be the right one.
# - 1 point: the report can be understood by someone who has not taken the course.

# %% volatile=true
progress("14")
