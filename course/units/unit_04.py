# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 04: Full fine-tuning
#
# **By the end of this unit you can**
#
# - say which tokens of a text a model is trained on, and build the corresponding labels;
# - write AdamW and its learning-rate schedule, and train a whole GPT-2 with your own code;
# - measure what the model has learned, and what has become of what it could do before;
# - freeze part of a model, and say what that saves in memory and costs in quality.
#
# **Prerequisites**: the loss of unit 03, and gradients. Unit 00 shows how checking works.
#
# **Time**: about 85 minutes, including 2 minutes of computation. 5 exercises, 2 predictions, one open question.
#
# ![The loss on unseen story cards after 20 training steps against the number of trained parameters in millions, for
# four runs: the last block, the last two blocks, all six blocks, everything. The loss falls from the first to the
# last.](unit_04.png)

# %%
import copy
import math
import os

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.accounting import memory_of
from lora_from_scratch.finetune.completions import Completions, prompt_text
from lora_from_scratch.finetune.data import references_by_mr
from lora_from_scratch.finetune.defaults import learning_rate_for
from lora_from_scratch.finetune.evaluation import tale_perplexity, write_texts
from lora_from_scratch.finetune.metrics import completion_loss, slot_error_rate
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.surgical import relative_gradient_norms
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 20 minutes and 7 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 64))  # of the longest training run here

# %% [markdown]
# ## The task
#
# The bundled GPT-2 can continue a tale, but it cannot follow instructions. In this unit you teach it to: given a
# **story card**, which says what has to happen, it should write the opening of a tale in which exactly that happens.
#
# Every method of this course is trained on these cards. What you measure here, with everything trained, is the baseline
# for the others.

# %%
base, tokenizer = load_gpt2(MODEL)
dataset = load_dataset("story-cards")
example = dataset.train[0]
print("card:", example.mr)
print("text:", example.ref)

# %% [markdown]
# What does the model do with a card before it has been trained on any? It gets the card and a line break, and
# continues. (`references_by_mr` groups the texts of the held-out cards by card; `write_texts` gives the model one card
# after the other and takes the most likely token each time.)

# %%
references = references_by_mr(dataset.validation)  # cards that are never used in training
cards = list(references)[:12]
before = write_texts(base, tokenizer, cards)
print("card:  ", cards[0])
print("model: ", before[0][:300])

# %% [markdown]
# ## Which tokens count?
#
# Card and text form one sequence of tokens, and the model reads all of it. But only the text is to be learned. The loss
# of unit 03 ignores every position whose **label** is -100:
#
# $$L = -\frac{1}{N} \sum_{t:\ y_{t+1} \ne -100} \log p(y_{t+1} \mid x_{\le t}),$$
#
# with the input ids $x$ and the labels $y$, both of length T, and N the number of labels that count. The loss compares
# position t with label t + 1, so it already contains the shift, once. This is also the objective of the LoRA paper (Hu
# et al. 2021, section 2, equation 1: the sum runs over the completion, given the prompt).

# %% exercise="completion_labels"

# %%
labels_of = working("completion_labels")

prompt = tokenizer.encode(prompt_text(example.mr))
completion = [*tokenizer.encode(example.ref), tokenizer.eos_id]
ids, labels = labels_of(prompt, completion)
for t in range(len(prompt) - 3, len(prompt) + 4):
    asked = "nothing" if labels[t + 1] == -100 else repr(tokenizer.decode([int(labels[t + 1])]))
    print(f"position {t:>2} reads {tokenizer.decode([int(ids[t])])!r:<12} and is asked for {asked}")

# %% [markdown]
# The last token of the prompt, the line break, is the first position that has to predict anything. The very last label
# is the end-of-text token: without it the model would never learn to stop.
#
# `Completions` does this for all 4,000 cards, and batches rows of similar length. Shorter rows are padded, and the
# labels of the padding are -100 as well.

# %%
training = Completions(dataset.train, tokenizer, base.config.n_positions)
held_out = Completions(dataset.validation[: 8 * 32 : 8], tokenizer, base.config.n_positions).batches(16)
batch = training.batch_at(0, 8, seed=0)
print("input ids:", tuple(batch.input_ids.shape))
print(f"labels that count: {float((batch.labels != -100).float().mean()):.0%}")
print(
    f"loss on {sum(len(b.input_ids) for b in held_out)} cards not used in training: "
    f"{completion_loss(base, held_out):.2f} nats per token"
)

# %% [markdown]
# ## How a weight moves
#
# One backward pass gives 5.9 million derivatives. How should the weights change? Plain gradient descent takes a step
# against the gradient, $\theta \leftarrow \theta - \eta g$. For a transformer that works badly: the gradients of its
# tensors differ by orders of magnitude, but a single learning rate $\eta$ has to suit them all.

# %%
probe = copy.deepcopy(base)
next_token_loss(probe(batch.input_ids), batch.labels).backward()
sizes = {name: float(p.grad.abs().mean()) for name, p in probe.named_parameters()}
for name in (min(sizes, key=sizes.get), "transformer.wte.weight", max(sizes, key=sizes.get)):
    print(f"{name:<36} mean |gradient| {sizes[name]:.1e}")
del probe

# %% [markdown]
# **Adam** (Kingma and Ba 2015, algorithm 1) keeps two running means for each weight, m of its gradient and v of its
# squared gradient, and divides the first by the square root of the second. **AdamW** (Loshchilov and Hutter 2019,
# algorithm 2) also shrinks every weight a little, independently of these means. The exercise below has the equations.
# Before you implement them, predict what they do.

# %% prediction="first_adam_step"

# %% [markdown]
# One step by hand, the second of a run with $\eta = 0.1$, $\beta_1 = 0.9$, $\beta_2 = 0.99$ and $\lambda = 0.1$. A
# weight is at $\theta = 1$; its first gradient was 2, which left $m = 0.2$ and $v = 0.04$, and the second is
# $g = 0.5$:
#
# - $m = 0.9 \cdot 0.2 + 0.1 \cdot 0.5 = 0.23$ and $v = 0.99 \cdot 0.04 + 0.01 \cdot 0.5^2 = 0.0421$;
# - $\hat m = 0.23 / (1 - 0.9^2) = 1.2105$ and $\hat v = 0.0421 / (1 - 0.99^2) = 2.1156$;
# - $\theta = 1 - 0.1 \cdot 1.2105 / \sqrt{2.1156} - 0.1 \cdot 0.1 \cdot 1 = 1 - 0.0832 - 0.01 = 0.9068$.

# %% exercise="adamw_step"

# %%
step_of = working("adamw_step")

theta, zeros = torch.zeros(2), torch.zeros(2)
moved, m, v = step_of(theta, torch.tensor([0.001, 1.0]), zeros, zeros, 1, learning_rate=0.1, weight_decay=0.0)
moved = [round(float(place), 3) for place in moved]
print("gradients 0.001 and 1.0, learning rate 0.1; the first step moves the two weights from 0 to", moved)

# %% check="first_adam_step"

# %% [markdown]
# This property is surprising but useful: a tensor with tiny gradients learns as fast as one with huge ones. Watch both
# methods descend a valley whose walls are 100 times as steep as its floor: $f(a, b) = (a^2 + 100\, b^2) / 2$.


# %%
def slope(at):
    return torch.tensor([1.0, 100.0]) * at  # the gradient of f


plain = adam = torch.tensor([1.0, 1.0])
m = v = torch.zeros(2)
for t in range(1, 41):
    plain = plain - 0.015 * slope(plain)  # above 0.02 it would diverge
    adam, m, v = map(torch.as_tensor, step_of(adam, slope(adam), m, v, t, learning_rate=0.05, weight_decay=0.0))
    if t in (1, 5, 20, 40):
        print(
            f"step {t:>2}: gradient descent at {plain[0]:5.2f}, {plain[1]:5.2f}; Adam at {adam[0]:5.2f}, {adam[1]:5.2f}"
        )

# %% [markdown]
# Gradient descent has to be slow along the floor so that it does not diverge along the walls. Adam moves diagonally:
# its two coordinates are equal, as if the valley were round. The price is memory: m and v are each as large as the
# model.
#
# ## The learning-rate schedule
#
# In the first steps every weight moves by about the learning rate, however little information its gradient contains, so
# these steps should be short: **warm-up**. At the end, when the noise of the batches dominates, steps should become
# short again. A linear rise followed by half a cosine does both.

# %% exercise="warmup_cosine"

# %%
rate_of = working("warmup_cosine")


def draw_schedule(warmup):
    figure, (axes,) = plotting.panels(1, width=6, height=3)
    rates = [float(rate_of(step, 64, warmup)) for step in range(64)]
    axes.plot(range(64), rates, color=plotting.COLOURS[0], linewidth=1.8)
    axes.set_ylim(0, 1.1)
    plotting.label(axes, x="step", y="fraction of the peak rate", title=f"{warmup} of 64 steps are warm-up")
    return figure


slider(
    draw_schedule,
    "warm-up",
    [0, 1, 4, 8, 16, 36],
    8,
    "The learning rate over 64 steps: a straight line up to 1, then half a cosine down to almost 0.",
)

# %% [markdown]
# ## The baseline
#
# You have labels, an optimiser and a schedule. Here is your `adamw_step` wrapped as a PyTorch optimiser: it stores m, v
# and the step number for each parameter, and otherwise only calls your function.


# %%
class YourAdamW(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mine = self.state[p]
                m, v = mine.get("m", torch.zeros_like(p)), mine.get("v", torch.zeros_like(p))
                mine["step"] = mine.get("step", 0) + 1
                result = step_of(p.detach(), p.grad, m, v, mine["step"], learning_rate=group["lr"])
                new, mine["m"], mine["v"] = map(torch.as_tensor, result)
                p.copy_(new)


# %% [markdown]
# Train all weights of the model for 64 steps of 8 cards; the course's reference runs take 500. During training the
# model is tested on two things: the held-out cards, and tales that were written for this course and that the model has
# never read. How well does it predict the tales afterwards?
#
# Three ready-made parts do the rest. `Trainer` is the training loop: for each step it takes a batch, computes the loss
# and its gradients, and lets the optimiser take a step at the rate of the schedule. `completion_loss` is the mean loss
# over all labels of several batches that count. `tale_perplexity` is the exponential of the mean loss on the tales.

# %% prediction="tales_afterwards"

# %%
RATE = 2 * learning_rate_for("full", base.config)  # tuned for 500 steps; a short run tolerates a higher rate


def settings(steps, rate=RATE, warmup=4):
    return TrainingSettings(steps=steps, learning_rate=rate, warmup_steps=min(warmup, steps), schedule="cosine")


def measure(model):
    return {"cards": completion_loss(model, held_out), "tales": tale_perplexity(model, tokenizer)}


model = copy.deepcopy(base)
start = {"step": 0, **measure(model)}
print(", ".join(f"{name} {value:.4g}" for name, value in start.items()))
run = Trainer(
    model,
    lambda step: training.batch_at(step, 8, seed=0),
    settings(STEPS),
    optimizers=[YourAdamW(model.parameters(), RATE)],
    evaluate=lambda: measure(model),
    evaluate_every=math.ceil(STEPS / 4),
).run()
points = [start, *run.evaluations]

# %%
figure, (left, right) = plotting.panels(2, width=4.6, height=3.4)
steps = [point["step"] for point in points]
for axes, name, colour in ((left, "cards", 0), (right, "tales", 1)):
    values = [point[name] for point in points]
    axes.plot(steps, values, "-o", color=plotting.COLOURS[colour], linewidth=1.8)
    axes.axhline(values[0], color="0.5", linewidth=1, linestyle=":")
    axes.annotate("before", (steps[-1], values[0]), xytext=(0, 4), textcoords="offset points", ha="right", color="0.4")
    axes.set_xticks(steps)
    axes.set_ylim(0, 1.1 * max(values))
plotting.label(left, x="step", y="loss on unseen cards (nats per token)", title="What it learns")
plotting.label(right, x="step", y="perplexity on unseen tales", title="What it forgets")
show(
    figure,
    "Two panels over the training steps. Left: the loss on unseen story cards falls, steeply at first and then "
    "slower. Right: the perplexity on tales rises above its dotted starting line and keeps rising until the learning "
    "rate is small.",
)

# %% check="tales_afterwards"

# %% [markdown]
# Both curves come from the same steps. The model has not become smaller, and nothing asked it to forget; the loss asked
# for one thing only, and all weights were free to change for it. For every method in this course you will ask how much
# it gains on the cards, and how much it loses on the tales.
#
# Now read what it writes. The **slot error rate** counts slots of the card that are missing from the text, plus those
# in the text that are not on the card, divided by the number of all slots (Wen et al. 2015, equation 14); it can exceed
# 100 %.

# %%
after = write_texts(model, tokenizer, cards)
for mr, text in zip(cards[:2], after[:2], strict=True):
    print("card: ", mr)
    print("model:", text, "\n")
for name, texts in {"before": before, "after": after}.items():
    print(f"slot errors {name}: {slot_error_rate(texts, cards, dataset.lexicon):.0%} on {len(cards)} cards")

# %% [markdown]
# The style comes long before the content: the model first learns what these texts sound like, and only later to take
# the hero from the card. The loss falls fast for the former and slowly for the latter. With the 500 steps of the
# reference run the content comes too: run `lora-from-scratch finetune --method full` to see it.
#
# ## Training only part of the model
#
# The oldest way to train less is to train only the top of the model. The idea is that the first blocks handle words and
# grammar, which serve any task, while the last ones decide what to say. So freeze the lower blocks. In the LoRA paper
# the last two blocks of GPT-2 medium, 25.19 M of its 355 M parameters, reach a BLEU of 68.1 on another data-to-text
# task, against 68.2 for all of them (Hu et al. 2021, table 3; "FT-Top2").

# %% exercise="freeze_all_but_last"

# %% [markdown]
# Frozen parameters need no gradient, no m and no v. How many bytes does that save?

# %% exercise="trainable_memory"

# %%
freeze_of = working("freeze_all_but_last")
memory_for = working("trainable_memory")

model = copy.deepcopy(base)
for last in (0, 1, 2, 6):
    freeze_of(model, last)
    print(f"last {last} blocks: {sum(memory_for(model).values()) / 2**20:5.1f} MiB of gradients and optimiser")
model.requires_grad_(True)
print(
    f"everything:    {sum(memory_for(model).values()) / 2**20:5.1f} MiB; the weights themselves are "
    f"{sum(p.nbytes for p in model.parameters()) / 2**20:.1f} MiB"
)

# %% [markdown]
# There is a second saving that is easy to overlook. The backward pass goes from the loss downwards, and stops where
# nothing below is trained. The activations of the blocks below that point need not be kept either. `memory_of` counts
# all of it from the shapes, as you did in unit 00. Move the slider:

# %%
with torch.device("meta"):  # shapes without numbers: nothing is computed
    shapes = GPT2(base.config)
budgets = {}
for last in range(base.config.n_layer + 1):
    freeze_of(shapes, last)
    budgets[last] = memory_of(shapes, batch_size=8, tokens=96)


def draw_memory(last):
    figure, (axes,) = plotting.panels(1, width=6.5, height=2.6)
    parts = ("weights", "gradients", "optimizer", "activations")
    sizes = [getattr(budgets[last], part) / 2**20 for part in parts]
    axes.barh(parts, sizes, color=plotting.COLOURS[0], height=0.6)
    for place, size in enumerate(sizes):
        axes.annotate(f"{size:.1f}", (size, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(getattr(budget, part) for budget in budgets.values() for part in parts) / 2**20)
    plotting.label(axes, x="MiB, 8 texts of 96 tokens", title=f"Training the last {last} of {len(budgets) - 1} blocks")
    return figure


slider(
    draw_memory,
    "trained blocks",
    list(budgets),
    2,
    "Bars of the memory for weights, gradients, optimiser and activations, in MiB. All but the bar of the weights "
    "shrink with the number of blocks that are trained.",
)

# %% [markdown]
# ## What does freezing cost?
#
# Use the same cards, in the same order, with the same learning rate, for 20 steps each; only the set of trained
# parameters differs.

# %%
SHORT = math.ceil(STEPS / 3.2)


def open_only(model, prefixes):
    """Train the parameters whose names begin with one of these prefixes, and freeze the rest."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(prefixes))


def train_on_cards(prepare, steps=SHORT, rate=RATE, warmup=4, batch_at=lambda step: training.batch_at(step, 8, seed=0)):
    """A copy of the base model, prepared and trained, and its losses during training."""
    model = copy.deepcopy(base)
    prepare(model)
    losses = Trainer(model, batch_at, settings(steps, rate, warmup), progress=False).run().losses
    return model, losses


plans = {
    "last block": lambda model: freeze_of(model, 1),
    "last 2": lambda model: freeze_of(model, 2),
    f"all {base.config.n_layer} blocks": lambda model: freeze_of(model, base.config.n_layer),
    "everything": lambda model: None,
}
results = {}
for name, prepare in tqdm(plans.items()):
    model, _ = train_on_cards(prepare)
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    results[name] = (millions, completion_loss(model, held_out), tale_perplexity(model, tokenizer))
learned = model  # the last one, in which everything was trained
for name, (millions, loss, tales) in results.items():
    print(f"{name:<13} {millions:4.2f} M trained   loss on cards {loss:.2f}   perplexity on tales {tales:5.1f}")

# %% figure="unit_04.png"
figure, (axes,) = plotting.panels(1, width=6, height=3.4)
plotting.label(
    axes,
    x="trained parameters (millions)",
    y="loss on unseen cards (nats per token)",
    title="With fewer trained parameters the model learns less",
)
plotting.points(axes, {name: result[:2] for name, result in results.items()})
show(
    figure,
    "Points of trained parameters in millions against the loss on unseen cards after 20 steps: the last block, the "
    "last two, all six blocks, everything. The loss falls from the first to the last of them.",
)

# %% [markdown]
# Notice three things. First, more trained parameters give a lower loss here; the paper's 68.1 against 68.2 is for a
# much larger model, trained for much longer. Second, training fewer parameters also means forgetting less. Third, the
# step from all blocks to everything adds only the embeddings, and still lowers the loss. One possible reason is that
# words such as *goose-girl* are too rare in the books to have a useful embedding, and that the blocks above cannot make
# up for all of that.
#
# ## Surgical fine-tuning: which blocks?
#
# Why the last blocks, though? Lee et al. 2023 ("Surgical fine-tuning", section 4) let the gradient decide. The
# **relative gradient norm** of a tensor $p$ with the gradient $g$ is $\lVert g \rVert / \lVert p \rVert$: how strongly
# the task pulls at the tensor relative to its size. You implement it in unit 08; here it is provided. Vectors are left
# out of the figure: some biases are so close to zero that any gradient is huge in comparison.

# %%
pulls = relative_gradient_norms(base, [training.batch_at(step, 8, seed=1) for step in range(2)])
matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
groups = {"token embedding": pulls["transformer.wte.weight"], "positions": pulls["transformer.wpe.weight"]}
for number in range(base.config.n_layer):
    groups[f"block {number}"] = sum(pulls[f"transformer.h.{number}.{part}.weight"] for part in matrices) / 4

figure, (axes,) = plotting.panels(1, width=6, height=3)
plotting.ranking(axes, groups, digits=3)
plotting.label(
    axes, x="relative gradient norm (mean over the matrices)", title="How strongly the cards pull at each part"
)
show(
    figure,
    "Bars of the relative gradient norm on story cards, for the token embedding, the positions and each of the six "
    "blocks. " + "; ".join(f"{name} {value:.3f}" for name, value in groups.items()),
)

# %%
blocks = [name for name in groups if name.startswith("block")]
chosen = sorted(int(name.split()[1]) for name in sorted(blocks, key=groups.get)[-2:])
names = [f"transformer.h.{number}." for number in chosen]
model, _ = train_on_cards(lambda model: open_only(model, ("transformer.ln_f.", *names)))
print(f"blocks {chosen[0]} and {chosen[1]}, with the largest norms: loss {completion_loss(model, held_out):.2f}")
print(f"the last two blocks:                   loss {results['last 2'][1]:.2f}")

# %% [markdown]
# Compare the two numbers before you trust a heuristic. The gradient says where the loss is steepest *now*, for one tiny
# step; it does not say how far down it leads. Lee et al. find that the right blocks depend on what has changed: the
# first ones if the input looks different, the last ones if the answers do (their section 2). The cards change both:
# they are a new kind of text to read, and they ask for a new kind of answer.
#
# ## Your own plan
#
# Can you spend the same number of parameters better than on the last two blocks? You may train any tensors: one kind of
# matrix in every block, other blocks, an embedding. The names are those of `base.named_parameters()`. Change `planned`,
# write down whether you expect to win, and run the cell. It trains both plans with two orders of the cards, since one
# run proves little: only a plan that wins with both is better.


# %%
def planned(name):
    """Whether your plan trains the parameter of this name. Change this line."""
    return name.startswith(("transformer.h.4.", "transformer.h.5.", "transformer.ln_f."))


def train_planned(model):
    for name, p in model.named_parameters():
        p.requires_grad_(planned(name))


def compare_with_the_last_two(seeds=(0, 1)):
    """Train your plan and the last two blocks on the same cards in the same order, once for each seed."""
    trained = {"last two": copy.deepcopy(base), "yours": copy.deepcopy(base)}
    freeze_of(trained["last two"], 2)
    train_planned(trained["yours"])
    names = {who: {n for n, p in model.named_parameters() if p.requires_grad} for who, model in trained.items()}
    counts = {who: sum(p.numel() for p in m.parameters() if p.requires_grad) for who, m in trained.items()}
    print(f"your plan trains {counts['yours']:,} parameters; the last two blocks have {counts['last two']:,}")
    if names["yours"] == names["last two"]:
        return "These are the last two blocks themselves: change `planned`."
    if not 0 < counts["yours"] <= counts["last two"]:
        return "Train at least one parameter, and not more than the last two blocks have."
    gains = []
    for seed in seeds:
        losses = []
        for prepare in (plans["last 2"], train_planned):
            model, _ = train_on_cards(prepare, batch_at=lambda step, seed=seed: training.batch_at(step, 8, seed=seed))
            losses.append(completion_loss(model, held_out))
        gains.append(losses[0] - losses[1])
        print(f"order {seed}: the last two {losses[0]:.2f}, your plan {losses[1]:.2f}")
    better, worse = min(gains) > 0, max(gains) < 0
    return "Your plan wins." if better else "Your plan loses." if worse else "Undecided: one order each."


print(compare_with_the_last_two())

# %% [markdown]
# ## What goes wrong in practice
#
# **Wrong labels.** Here are three wrong ways to label a batch, evaluated with one trained model. None of them raises an
# error. Each gives a number that looks like a loss.

# %%
ids, right_labels, _ = held_out[0]
lengths = [int((row != -100).nonzero().max()) + 1 for row in right_labels]  # where each text ends
with_prompt, with_padding = right_labels.clone(), right_labels.clone()
for row, length in enumerate(lengths):
    with_prompt[row, :length] = ids[row, :length]
    with_padding[row, length:] = tokenizer.eos_id
twice = torch.cat([right_labels[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
versions = {
    "completions only": right_labels,
    "prompt counted": with_prompt,
    "padding counted": with_padding,
    "shifted twice": twice,
}
with torch.no_grad():
    for name, wrong in versions.items():
        count, loss = int((wrong[:, 1:] != -100).sum()), next_token_loss(learned(ids), wrong)
        print(f"{name:<17} {count:>5} labels, loss {loss:5.2f}")

# %% [markdown]
# The model is the same in all four lines. If the prompt counts, the loss is largely about cards, whose values are drawn
# at random and cannot be predicted. If padding counts, it is largely about what follows the end of a text, which is
# never needed. The last line is the dangerous one, because training reduces it:


# %%
def shifted_batch(step):
    ids, labels, _ = training.batch_at(step, 8, seed=0)
    return Batch(ids, torch.cat([labels[:, 1:], torch.full((len(ids), 1), -100)], dim=1))


broken, losses = train_on_cards(lambda model: None, batch_at=shifted_batch)
print("the loss falls:", " ".join(f"{loss:.1f}" for loss in losses[::4]))
print("the text:      ", write_texts(broken, tokenizer, cards[:1])[0][:160])

# %% [markdown]
# Every position has learned to predict the token after the next. Always look at texts, never only at the loss.
#
# **Weight decay as a penalty.** Two weights start at 1. Their gradients change sign at every step, so that they cancel
# out over time: they are 10 and -10 for the first weight, 0.1 and -0.1 for the second. Should decay treat the two
# differently?

# %%
for name, optimiser_class in {
    "penalty in the gradient (Adam)": torch.optim.Adam,
    "decoupled (AdamW)": torch.optim.AdamW,
}.items():
    weights = torch.nn.Parameter(torch.ones(2))
    optimiser = optimiser_class([weights], lr=0.01, weight_decay=0.1)
    for step in range(300):
        weights.grad = torch.tensor([10.0, 0.1]) * (-1) ** step
        optimiser.step()
    noisy, quiet = weights.tolist()
    print(f"{name:<31} large gradients {noisy:5.2f}   small gradients {quiet:5.2f}")

# %% [markdown]
# As part of the gradient the penalty is divided by the root of v like everything else: a weight with large gradients
# hardly decays, while one with small gradients is wiped out. Decoupled decay treats both alike (Loshchilov and Hutter
# 2019, section 2).
#
# **No bias correction.** m and v start at zero, so both are too small at first. Do the errors cancel? For a gradient
# that is always 1, the corrected step is exactly one learning rate. Without the correction:

# %%
for t in (1, 3, 10, 30, 100, 1000):
    print(f"step {t:>4}: {(1 - 0.9**t) / (1 - 0.999**t) ** 0.5:4.2f} learning rates")

# %% [markdown]
# v averages over many more steps than m, a hundred times as many, so it stays too small for longer, and the first
# steps, which should be short, are far too *long*.
#
# **eps in the wrong place.** Under the root, 1e-8 is no longer tiny: it corresponds to gradients of 1e-4.

# %%
for g in (1.0, 1e-3, 1e-5, 1e-7):
    behind, under = g / (g + 1e-8), g / (g * g + 1e-8) ** 0.5
    print(f"gradient {g:.0e}: step {behind:.3f} with eps outside the root, {under:.3f} with eps under the root")

# %% [markdown]
# You printed gradients of the bundled model at the beginning of this unit: some of them are of that size.
#
# **No warm-up.** Here is the same run at a learning rate of 0.003, far above the tuned one, with and without warm-up:

# %%
figure, (axes,) = plotting.panels(1, width=6, height=3.2)
for style, warmup in enumerate((0, 6)):
    _, losses = train_on_cards(lambda model: None, steps=12, rate=0.003, warmup=warmup)
    name = f"{warmup} steps of warm-up"
    if warmup:
        plotting.named_curve(axes, losses, name, at=6, offset=(-8, -14), side="right", style=style)  # below the line
    else:
        peak = 1 + max(range(1, 12), key=losses.__getitem__)
        plotting.named_curve(axes, losses, name, at=peak, offset=(8, 0), side="left", style=style)
    print(f"{name}:", " ".join(f"{loss:.1f}" for loss in losses))
axes.set_ylim(0, None)
plotting.label(axes, x="step", y="loss of the batch (nats per token)", title="A learning rate of 0.003")
show(
    figure,
    "Two loss curves over 12 steps at a learning rate of 0.003. With six steps of warm-up the loss falls at once; "
    "without, it first rises above its starting value and stays higher to the end.",
)

# %% [markdown]
# **Freezing after the optimiser was created.** The optimiser keeps the parameters that it was given, and only looks at
# their `.grad`.

# %%
torch.manual_seed(0)
layer = torch.nn.Linear(3, 1)
optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
layer(torch.ones(3)).backward()
optimiser.step()
layer.weight.requires_grad_(False)  # too late: m still has its momentum, and .grad is still there
frozen = layer.weight.clone()
optimiser.step()
print("a frozen weight has moved by", [round(x, 3) for x in (layer.weight - frozen)[0].tolist()])

layer = torch.nn.Linear(3, 1).requires_grad_(False)
layer.bias.requires_grad_(True)
optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
layer.weight.requires_grad_(True)  # unfrozen later; the optimiser does not know about it
opened = layer.weight.clone()
layer(torch.ones(3)).backward()
optimiser.step()
print(
    "a weight that was unfrozen later has a gradient:",
    layer.weight.grad is not None,
    "- and has moved:",
    not torch.equal(layer.weight, opened),
)

# %% [markdown]
# Freeze first, then create the optimiser. The library's `Trainer` does it in that order.
#
# **"I freeze everything except the output layer."** GPT-2 has no separate output layer: its weight *is* the token
# embedding.

# %%
model = copy.deepcopy(base)
open_only(model, ("transformer.wte.",))
next_token_loss(model(batch.input_ids), batch.labels).backward()
rows = int((model.transformer.wte.weight.grad.abs().sum(dim=1) > 0).sum())
millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.transformer.wte, model)]
print(f"trained: {millions[0]:.2f} M of {millions[1]:.2f} M parameters")
print(f"the batch reads {len(batch.input_ids.unique())} different tokens; {rows} rows of the embedding have a gradient")

# %% [markdown]
# Every row changes, even those of words that do not occur in the batch: as outputs they were candidates at every
# position. And since the matrix is also the input embedding, the frozen blocks above now read something different.
# Freezing the embedding freezes the output layer, and training one trains the other.
#
# ## Summary
#
# - Only the labels decide what a model is trained on; a wrong label raises no error, so look at the texts.
# - AdamW moves every weight by about the learning rate, whatever the size of its gradient; its weight decay is
#   independent of the gradient.
# - Warm-up keeps the first steps short, when long ones would do the most damage; the cosine ends the run with short
#   steps.
# - Full fine-tuning learns the task, needs three times the memory of the weights in addition to them, and forgets from
#   the first steps on.
# - Freezing lower blocks saves gradients, optimiser state and activations; how much it costs has to be measured.
#
# ## Go further
#
# - Loshchilov and Hutter 2019, *Decoupled weight decay regularization* (arXiv:1711.05101): sections 2 and 4.
# - Kingma and Ba 2015, *Adam* (arXiv:1412.6980): section 2.1 on the size of a step, section 3 on the bias.
# - Lee et al. 2023, *Surgical fine-tuning improves adaptation to distribution shifts* (arXiv:2210.11466): sections 2
#   and 4.
# - Howard and Ruder 2018, *Universal language model fine-tuning* (arXiv:1801.06146): section 3.2, on a separate rate
#   for each layer, and section 3.3 on gradual unfreezing.
#
# The result of full fine-tuning is a second model: 23 MB per task for this small one, 350 GB for GPT-3, and each copy
# has forgotten something. What if no weight of the model changed at all, and only its *input* were trained? That is
# unit 05.

# %% [markdown] open_question="fair_freezing" points=4
# **Open question.** A colleague shows the figure of this unit, loss against trained parameters, and concludes: "the
# more we train, the better." Write at most 150 words: name two ways in which the comparison is unfair to the runs that
# train fewer parameters, say how you would repeat it, and say for which purpose you would choose one of the *worse*
# points even if it remains worse.
#
# **Rubric.**
#
# - 2 points: two sound reasons, one each; for instance the learning rate was tuned for training everything and not for
#   the others, 20 steps are far from convergence, there is one seed and 32 cards, only the loss is considered.
# - 1 point: a repetition that corrects them: a learning rate tuned for each plan on validation cards, runs until the
#   loss is flat, several seeds, a test set that was not used for any decision.
# - 1 point: a suitable purpose: less forgetting on tales, memory, or many tasks that share the frozen part.
