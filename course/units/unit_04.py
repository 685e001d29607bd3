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
# - say which tokens of a text a model is trained on, and make the labels that say so;
# - write AdamW and its learning-rate schedule, and train a whole GPT-2 with your own code;
# - measure what the model has learned, and what it has forgotten for it;
# - freeze a part of a model, and say what that saves in memory and costs in quality.
#
# **Prerequisites**: the loss of unit 03, and gradients. Unit 00 shows how checking works.
#
# **Time**: about 85 minutes, two of them computing. 5 exercises, 2 predictions, one open question.
#
# ![Two panels over the same training steps. On the left the loss on story cards falls, steeply at first. On the right
# the perplexity on real tales rises from its dotted starting line.](unit_04.png)

# %%
import copy
import math
import os

import torch
from tqdm import tqdm

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

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 20 minutes and 7 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 64))  # of the longest training run here

# %% [markdown]
# ## The task
#
# The bundled GPT-2 can go on with a tale. It cannot do what it is told. In this unit you teach it to: from a **story
# card**, which says what has to happen, it shall write the opening of a tale in which exactly that happens.
#
# Every method of this course is trained on these cards. What you measure today, with everything trained, is the
# baseline that the others have to beat.

# %%
base, tokenizer = load_gpt2(MODEL)
dataset = load_dataset("story-cards")
example = dataset.train[0]
print("card:", example.mr)
print("text:", example.ref)

# %% [markdown]
# What does the model make of a card before it has seen one? It gets the card and a line break, and writes on.

# %%
references = references_by_mr(dataset.validation)  # cards that no training ever sees
cards = list(references)[:12]
before = write_texts(base, tokenizer, cards)
print("card:  ", cards[0])
print("model: ", before[0][:300])

# %% [markdown]
# ## Which tokens count?
#
# Card and text stand in one row of tokens, and the model reads them all. But only the text is to be learned. The loss
# of unit 03 leaves out every position whose **label** is -100:
#
# $$L = -\frac{1}{N} \sum_{t:\ y_{t+1} \ne -100} \log p(y_{t+1} \mid x_{\le t}),$$
#
# with the input ids $x$ and the labels $y$, both of length T, and N the number of labels that count. It compares
# position t with the label t + 1: the shift is in there, once. This is the objective of the LoRA
# paper as well (Hu et al. 2021, section 2, equation 1: the sum runs over the completion, given the prompt).

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
# The last token of the prompt, the line break, is the first position that is asked for anything. And the last label of
# all is the end-of-text token: without it the model would never learn to stop.
#
# `Completions` does this for all 4,000 cards, and puts rows of similar length into a batch. What is shorter than the
# longest is padded, and the labels there are -100 as well.

# %%
training = Completions(dataset.train, tokenizer, base.config.n_positions)
held_out = Completions(dataset.validation[: 8 * 32 : 8], tokenizer, base.config.n_positions).batches(16)
batch = training.batch_at(0, 8, seed=0)
print("input ids:", tuple(batch.input_ids.shape))
print(f"labels that count: {float((batch.labels != -100).float().mean()):.0%}")
print(
    f"loss on {sum(len(b.input_ids) for b in held_out)} cards that are never trained on: "
    f"{completion_loss(base, held_out):.2f} nats per token"
)

# %% [markdown]
# ## How a weight moves
#
# One backward pass gives 5.9 million derivatives. What to do with them? Plain gradient descent takes a step against
# the gradient, $\theta \leftarrow \theta - \eta g$. In a transformer that works badly: the gradients of its tensors
# differ by orders of magnitude, and one learning rate $\eta$ has to serve them all.

# %%
probe = copy.deepcopy(base)
next_token_loss(probe(batch.input_ids), batch.labels).backward()
sizes = {name: float(p.grad.abs().mean()) for name, p in probe.named_parameters()}
for name in (min(sizes, key=sizes.get), "transformer.wte.weight", max(sizes, key=sizes.get)):
    print(f"{name:<36} mean |gradient| {sizes[name]:.1e}")
del probe

# %% [markdown]
# **Adam** (Kingma and Ba 2015, algorithm 1) keeps two running means for each weight, m of its gradient and v of its
# squared gradient, and divides the one by the root of the other. **AdamW** (Loshchilov and Hutter 2019, algorithm 2)
# lets every weight shrink a little besides, past all that. The exercise below has the equations. Before you write
# them, guess what they do.

# %% prediction="first_adam_step"

# %% exercise="adamw_step"

# %%
step_of = working("adamw_step")

theta, zeros = torch.zeros(2), torch.zeros(2)
moved, m, v = step_of(theta, torch.tensor([0.001, 1.0]), zeros, zeros, 1, learning_rate=0.1, weight_decay=0.0)
moved = [round(float(place), 3) for place in moved]
print("gradients 0.001 and 1.0, learning rate 0.1; the first step moves the two weights from 0 to", moved)

# %% check="first_adam_step"

# %% [markdown]
# That is a strange property, and a useful one. A tensor with tiny gradients learns as fast as one with huge ones. Watch
# both methods walk down a valley whose walls are 100 times as steep as its floor: $f(a, b) = (a^2 + 100\, b^2) / 2$.


# %%
def slope(at):
    return torch.tensor([1.0, 100.0]) * at  # the gradient of f


plain = adam = torch.tensor([1.0, 1.0])
m = v = torch.zeros(2)
for t in range(1, 41):
    plain = plain - 0.015 * slope(plain)  # above 0.02 it would leave the valley
    adam, m, v = map(torch.as_tensor, step_of(adam, slope(adam), m, v, t, learning_rate=0.05, weight_decay=0.0))
    if t in (1, 5, 20, 40):
        print(
            f"step {t:>2}: gradient descent at {plain[0]:5.2f}, {plain[1]:5.2f}; Adam at {adam[0]:5.2f}, {adam[1]:5.2f}"
        )

# %% [markdown]
# Gradient descent has to be slow on the floor so that it is not thrown off the walls. Adam walks diagonally: its two
# coordinates are the same, as if the valley were round. The price is memory: m and v are as large as the model, each.
#
# ## How fast, and when
#
# Since every weight moves by about the learning rate in the first steps, whatever its gradient knows, the first steps
# should be short: **warm-up**. And at the end, when the loss is dominated by the noise of the batches, steps should
# become short again. A line up and half a cosine down does both.

# %% exercise="warmup_cosine"

# %%
rate_of = working("warmup_cosine")


def draw_schedule(warmup):
    figure, (axes,) = plotting.panels(1, width=6, height=3)
    rates = [float(rate_of(step, 64, warmup)) for step in range(64)]
    axes.plot(range(64), rates, color=plotting.COLOURS[0], linewidth=1.8)
    axes.set_ylim(0, 1.1)
    plotting.label(axes, x="step", y="share of the highest rate", title=f"{warmup} of 64 steps are warm-up")
    return figure


slider(
    draw_schedule,
    "warm-up",
    [0, 1, 4, 8, 16, 36],
    8,
    "The learning rate over 64 steps: a straight line up to 1, then half a cosine that falls to almost 0.",
)

# %% [markdown]
# ## The baseline
#
# You have labels, an optimiser and a schedule. Here is your `adamw_step` as an optimiser of PyTorch's kind: it holds m,
# v and the number of the step for each parameter, and otherwise only calls you.


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
# It trains all weights of the model for 64 steps of 8 cards; the course's own runs take 500. While it learns, it is
# tested on two things: the held-out cards, and tales that were written for this course and that no model has read.
# What happens to the tales?

# %% prediction="tales_afterwards"

# %%
RATE = 2 * learning_rate_for("full", base.config)  # tuned for 500 steps; a short run can take more


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

# %% figure="unit_04.png"
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
    "Two panels over the training steps. Left: the loss on unseen story cards falls, steeply at first "
    "and then slower. Right: the perplexity on tales rises above its dotted starting line and goes on rising until the "
    "learning rate is small.",
)

# %% check="tales_afterwards"

# %% [markdown]
# Both curves come from the same steps. The model has not become smaller, and nobody asked it to forget; it was asked
# for one thing only, and all of its weights were free to move for that. How many nats of loss on the cards are bought
# with how much of the tales is what every method in this course will be asked.
#
# Now read what it writes. The **slot error rate** counts what is on the card and not in the text, and what is in the
# text and not on the card, over all slots (Wen et al. 2015, equation 14); it can exceed 100 %.

# %%
after = write_texts(model, tokenizer, cards)
for mr, text in zip(cards[:2], after[:2], strict=True):
    print("card: ", mr)
    print("model:", text, "\n")
for name, texts in {"before": before, "after": after}.items():
    print(f"slot errors {name}: {slot_error_rate(texts, cards, dataset.lexicon):.0%} on {len(cards)} cards")

# %% [markdown]
# The form is there long before the content: the model first learns how a tale on a card sounds, and only then to look
# up who its hero is. The loss fell fast for the one, and is in no hurry for the other. With the course's 500 steps the
# content comes too: `lora-from-scratch finetune --method full` does that run.
#
# ## Training less of it
#
# The oldest way to train less is to train the top. The first blocks know letters, words and grammar, which serve any
# task; the last ones decide what to say. So freeze the lower ones. In the LoRA paper the last two blocks of GPT-2
# medium, 25.19 M of its 355 M parameters, reach a BLEU of 68.1 on another data-to-text task, against 68.2 for all of
# them (Hu et al. 2021, table 3; "FT-Top2").

# %% exercise="freeze_all_but_last"

# %% [markdown]
# What is frozen needs no gradient and no m and v. How many bytes is that?

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
# nothing below is trained. The activations of the blocks down there need not be kept either. Move the slider:

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
# The same cards, the same order, the same learning rate, 20 steps each; only what is trained differs.

# %%
SHORT = math.ceil(STEPS / 3.2)


def open_only(model, prefixes):
    """Train what has a name that begins like one of these, and freeze the rest."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(prefixes))


def train_on_cards(prepare, steps=SHORT, rate=RATE, warmup=4, batch_at=lambda step: training.batch_at(step, 8, seed=0)):
    """A copy of the base model, prepared and trained, and the losses on the way."""
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
learned = model  # the last of them: everything is trained
for name, (millions, loss, tales) in results.items():
    print(f"{name:<13} {millions:4.2f} M trained   loss on cards {loss:.2f}   perplexity on tales {tales:5.1f}")

# %%
figure, (axes,) = plotting.panels(1, width=6, height=3.4)
plotting.label(
    axes,
    x="trained parameters (millions)",
    y="loss on unseen cards (nats per token)",
    title="The less is trained, the less is learned in 20 steps",
)
plotting.points(axes, {name: result[:2] for name, result in results.items()})
show(
    figure,
    "Points of trained parameters in millions against the loss on unseen cards after 20 steps: the last block, the "
    "last two, all six blocks, everything. The loss falls from the first to the last of them.",
)

# %% [markdown]
# Three things to see. More trained parameters give a lower loss here; the 68.1 against 68.2 of the paper is a much
# larger model, trained for much longer. Less trained also means less forgotten. And look at the step from all blocks to
# everything: what it adds are the embeddings. One guess is that words such as *goose-girl* are too rare in the books to
# have an embedding worth the name, and that the blocks above cannot make up for all of that.
#
# ## Surgery: which blocks?
#
# Why the last ones, though? Lee et al. 2023 ("Surgical fine-tuning", section 4) let the gradient decide. The
# **relative gradient norm** of a tensor $p$ with the gradient $g$ is $\lVert g \rVert / \lVert p \rVert$: how strongly
# the task pulls at the tensor, beside how large it is. You build it in unit 08; here it is ready-made. Vectors
# are left out of the picture: some biases are so close to zero that any gradient is huge beside them.

# %%
pulls = relative_gradient_norms(base, [training.batch_at(step, 8, seed=1) for step in range(2)])
matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
groups = {"token embedding": pulls["transformer.wte.weight"], "positions": pulls["transformer.wpe.weight"]}
for number in range(base.config.n_layer):
    groups[f"block {number}"] = sum(pulls[f"transformer.h.{number}.{part}.weight"] for part in matrices) / 4

figure, (axes,) = plotting.panels(1, width=6, height=3)
axes.barh(list(groups), list(groups.values()), color=plotting.COLOURS[0], height=0.6)
for place, value in enumerate(groups.values()):
    axes.annotate(f"{value:.3f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
axes.invert_yaxis()
axes.set_xlim(0, 1.15 * max(groups.values()))
plotting.label(
    axes, x="relative gradient norm (mean over the matrices)", title="Where the cards pull at the base model"
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
print(f"blocks {chosen[0]} and {chosen[1]}, where the pull is strongest: loss {completion_loss(model, held_out):.2f}")
print(f"the last two blocks:                      loss {results['last 2'][1]:.2f}")

# %% [markdown]
# Compare the two numbers before you believe a heuristic. The gradient says where the loss is steepest *now*, for one
# tiny step; it does not say how far the way goes down from there. Lee et al. find that the right blocks depend on what
# has changed: the first ones when the input looks different, the last ones when the answers do (their section 2). The
# cards change both: a new kind of text to read, and new answers to it.
#
# ## What goes wrong in practice
#
# **Labels.** Three wrong ways to label a batch, and one trained model. None of them raises an error. Each gives a
# number that looks like a loss.

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
# The model is the same in all four lines. With the prompt the loss is about cards, whose values are drawn at random
# and cannot be predicted by anybody. With padding it is about what follows the end of a text, which nobody will ever
# ask. The last line is the dangerous one, because training brings it down:


# %%
def shifted_batch(step):
    ids, labels, _ = training.batch_at(step, 8, seed=0)
    return Batch(ids, torch.cat([labels[:, 1:], torch.full((len(ids), 1), -100)], dim=1))


broken, losses = train_on_cards(lambda model: None, batch_at=shifted_batch)
print("the loss falls:", " ".join(f"{loss:.1f}" for loss in losses[::4]))
print("the text:      ", write_texts(broken, tokenizer, cards[:1])[0][:160])

# %% [markdown]
# Every position has learned to say the token after the next. Always look at texts, never at the loss alone.
#
# **Weight decay as a penalty.** Two weights begin at 1. Their gradients change sign with every step, so they shake the
# weights and lead nowhere: by 10 for the first weight, by 0.1 for the second. Should decay treat them differently?

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
# In the gradient the penalty is divided by the root of v like everything else: a weight with large gradients hardly
# decays, one with small gradients is wiped out. Decoupled decay does the same to both (Loshchilov and Hutter 2019,
# section 2).
#
# **No bias correction.** m and v begin at zero, so both are too small at first. Do the errors cancel? For a gradient
# that is always 1 the corrected step is exactly one learning rate. Without the correction:

# %%
for t in (1, 3, 10, 30, 100, 1000):
    print(f"step {t:>4}: {(1 - 0.9**t) / (1 - 0.999**t) ** 0.5:4.2f} learning rates")

# %% [markdown]
# v forgets ten to a hundred times as slowly as m, so it is v that stays too small, and the steps are far too *long*,
# in the very steps in which they should be short.
#
# **eps in the wrong place.** Under the root, 1e-8 is not tiny any more: it stands for gradients of 1e-4.

# %%
for g in (1.0, 1e-3, 1e-5, 1e-7):
    behind, under = g / (g + 1e-8), g / (g * g + 1e-8) ** 0.5
    print(f"gradient {g:.0e}: step {behind:.3f} with eps behind the root, {under:.3f} with it under the root")

# %% [markdown]
# You printed the gradients of the bundled model at the beginning of this unit: many of them are of that size.
#
# **No warm-up.** The same run at a learning rate of 0.003, far above the tuned one, with and without it:

# %%
figure, (axes,) = plotting.panels(1, width=6, height=3.2)
for style, warmup in enumerate((0, 6)):
    _, losses = train_on_cards(lambda model: None, steps=12, rate=0.003, warmup=warmup)
    colour, name = plotting.COLOURS[style], f"{warmup} steps of warm-up"
    axes.plot(range(12), losses, plotting.LINES[style], color=colour, linewidth=1.8)
    place = max(range(1, 12), key=losses.__getitem__) if warmup == 0 else 5
    offset = (8, 0) if warmup == 0 else (-8, -14)  # beside the peak, below the other line
    where = {"xytext": offset, "textcoords": "offset points", "ha": "left" if warmup == 0 else "right"}
    axes.annotate(name, (place, losses[place]), color=colour, fontweight="bold", **where)
    print(f"{name}:", " ".join(f"{loss:.1f}" for loss in losses))
axes.set_ylim(0, None)
plotting.label(axes, x="step", y="loss of the batch (nats per token)", title="A learning rate of 0.003")
show(
    figure,
    "Two loss curves over 12 steps at a learning rate of 0.003. With six steps of warm-up the loss falls at "
    "once; without, it first rises above where it began and stays higher to the end.",
)

# %% [markdown]
# **Freezing after the optimiser is made.** The optimiser has the parameters that it was given, and looks at nothing
# but their `.grad`.

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
layer.weight.requires_grad_(True)  # opened later, and the optimiser never hears of it
opened = layer.weight.clone()
layer(torch.ones(3)).backward()
optimiser.step()
print(
    "a weight that was opened later has a gradient:",
    layer.weight.grad is not None,
    "- and has moved:",
    not torch.equal(layer.weight, opened),
)

# %% [markdown]
# Freeze first, then make the optimiser. The library's `Trainer` does it in that order.
#
# **"I freeze all but the output layer."** In GPT-2 there is no output layer: its weight *is* the token embedding.

# %%
model = copy.deepcopy(base)
open_only(model, ("transformer.wte.",))
next_token_loss(model(batch.input_ids), batch.labels).backward()
rows = int((model.transformer.wte.weight.grad.abs().sum(dim=1) > 0).sum())
millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.transformer.wte, model)]
print(f"trained: {millions[0]:.2f} M of {millions[1]:.2f} M parameters")
print(f"the batch reads {len(batch.input_ids.unique())} different tokens; {rows} rows of the embedding have a gradient")

# %% [markdown]
# Every row moves, that of a word which the batch never mentions too: as an output it was a candidate at every
# position. And since it is the input as well, the frozen blocks above read something else from now on. Freezing the
# embedding freezes the output layer, and opening the one opens the other.
#
# ## Summary
#
# - Only the labels decide what a model is trained on; a wrong label raises no error, so look at the texts.
# - AdamW moves every weight by about the learning rate, whatever the size of its gradient; decay goes past all that.
# - Warm-up keeps the first steps short, in which that is dangerous; the cosine ends the run quietly.
# - Full fine-tuning learns the task, costs three times its weights beside them, and forgets from the first steps on.
# - Freezing lower blocks saves gradients, optimiser state and activations; how much it costs has to be measured.
#
# ## Go further
#
# - Loshchilov and Hutter 2019, *Decoupled weight decay regularization* (arXiv:1711.05101): sections 2 and 4.
# - Kingma and Ba 2015, *Adam* (arXiv:1412.6980): section 2.1 on the size of a step, section 3 on the bias.
# - Lee et al. 2023, *Surgical fine-tuning improves adaptation to distribution shifts* (arXiv:2210.11466): sections 2
#   and 4.
# - Howard and Ruder 2018, *Universal language model fine-tuning* (arXiv:1801.06146): section 3.2,
#   a rate of its own for each layer, and section 3.3, gradual unfreezing.
#
# What you have trained is a second model: 23 MB for one task on this small one, 350 GB on GPT-3, and one copy for each
# task, each of them with something forgotten. What if no weight of the model moved at all, and only what it *reads*
# were learned? That is unit 05.

# %% [markdown] open_question="fair_freezing" points=4
# **Open question.** A colleague shows the figure of this unit, loss against trained parameters, and concludes: "the
# more we train, the better." Write at most 150 words: name two ways in which the comparison is unfair to the runs
# that train less, say how you would repeat it, and say for which purpose you would choose one of the *worse* points
# even if it stays worse.
#
# **Rubric.**
#
# - 2 points: two sound reasons, one each; for instance the learning rate was tuned for everything and not for the
#   others, 20 steps are far from the end, one seed and 32 cards, only the loss is looked at.
# - 1 point: a repetition that mends them: a rate tuned for each plan on validation cards, runs until the loss is flat,
#   several seeds, a test set that no decision has used.
# - 1 point: a purpose that fits: less forgotten on tales, memory, or many tasks that share the frozen part.
