# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 05: Prompts
#
# **By the end of this unit you can**
#
# - write a few-shot prompt, and say what it costs and how much a small model gains from it;
# - implement soft prompts: trained vectors prepended to the text, while the weights of the model stay frozen;
# - initialise one from noise, from the vocabulary or from a text, and say why the initialisation matters;
# - read what a soft prompt "says", and say why that explains little.
#
# **Prerequisites**: the loss and a training run (unit 04). Unit 03 shows what a block does with a token's vector.
#
# **Time**: about 80 minutes, including 2 minutes of computation. 6 exercises, 2 predictions, one open question.
#
# ![The loss after a short training run against the length of the soft prompt: longer prompts do better, but each
# further row adds less.](unit_05.png)

# %%
import copy
import os

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions, collate, completion_labels, prompt_text
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods.prompt_tuning import VirtualTokens
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 15 minutes and 5 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 24))

# %% [markdown]
# ## Prompting with words
#
# Unit 04 ended with a second model for one task, which had forgotten something. What if no weight changed at all, and
# only the model's *input* did?
#
# The first way needs no training. A language model continues whatever pattern it is given. So give it the pattern: some
# cards with their texts, and then a card without one. Brown et al. (2020, arXiv:2005.14165) call this few-shot
# learning; each example is a *shot*.

# %% exercise="few_shot_prompt"

# %%
few_shot = working("few_shot_prompt")

model, tokenizer = load_gpt2(MODEL)
dataset = load_dataset("story-cards")
context = model.config.n_positions
by_length = sorted(dataset.train[:500], key=lambda example: len(example.ref) + len(example.mr))
shots = [(example.mr, example.ref) for example in by_length[::5][:8]]  # short ones, so that some fit
print(few_shot(shots[:2], dataset.validation[0].mr, "Each card is told as a tale."))

# %% [markdown]
# Does it help? Measure the loss on the texts of held-out cards, with k shots in front of each card. Only the text after
# the last card counts. (The cards are 24 short ones, so that the same cards fit with different prompts. `collate` pads
# rows to a batch, and `completion_loss` is the mean loss over the labels that count, as in unit 04.)

# %%
judged = sorted(dataset.validation[:300], key=lambda example: len(example.ref) + len(example.mr))[:24]


def rows_with(shots, instruction=""):
    return [
        completion_labels(
            tokenizer.encode(few_shot(shots, example.mr, instruction)),
            [*tokenizer.encode(example.ref), tokenizer.eos_id],
        )
        for example in judged
    ]


def loss_with(shots, instruction=""):
    """The loss on the judged texts, and the length of the longest row; no loss if that exceeds the context."""
    rows = rows_with(shots, instruction)
    longest = max(len(ids) for ids, _ in rows)
    if longest > context:
        return None, longest
    return completion_loss(model, [collate(rows[i : i + 8], tokenizer.eos_id, context) for i in (0, 8, 16)]), longest


few = {"no shot": loss_with([]), "an instruction": loss_with([], "Each card is told as a tale.")}
for k in tqdm((1, 2, 3, 8), desc="shots"):
    few[f"{k} shot{'s' if k > 1 else ''}"] = loss_with(shots[:k])
few["1 shot, but of another card's text"] = loss_with([(shots[0][0], shots[3][1])])
few["a sentence about something else"] = loss_with([], "The parliament voted on the railway tax.")
few["a text without its card"] = loss_with([], shots[0][1])
for name, (loss, longest) in few.items():
    said = "does not fit" if loss is None else f"loss {loss:.2f}"
    print(f"{name:<36} longest row {longest:>4} of {context} tokens   {said}")

# %% [markdown]
# Notice three things.
#
# - Nothing was trained, so any reduction of the loss is free. But for the bundled model it is very small. Learning from
#   shots is an ability of large models (Brown et al. compare sizes up to 175 billion parameters; this one has six
#   million).
# - Look at the last three lines. A shot whose text belongs to another card helps as much as a correct one, and neither
#   helps much more than a sentence that has nothing to do with cards. A tale alone, without a card, helps more than all
#   of them: the model picks up what such texts sound like, but not what a card *means*. (Min et al. 2022,
#   arXiv:2202.12837, find something similar for much larger models: there, too, wrong labels in the examples cost
#   surprisingly little.)
# - Every shot takes up context for every card. Soon nothing more fits.
#
# Words are hard to optimise: you have to guess an instruction, and no gradient tells you how to improve it. Could you
# *train* a prompt?

# %% [markdown]
# ## Prompting with vectors
#
# A token id has no gradient: there is no token 17.3. But the first thing that the model does with an id is to look up
# its embedding, and *that* is a vector, which can be changed in small steps. Lester et al. (2021, arXiv:2104.08691,
# section 2) prepend P vectors to the text and train only these:
#
# $$h_0 = [E;\, X] + [p_0; \dots; p_{P+T-1}]$$
#
# - $X$ (T, d): the embeddings of the text's T tokens;
# - $E$ (P, d): the soft prompt, **trained**;
# - $p_i$ (d): the model's own position embeddings, frozen like everything else.
#
# Everything above $h_0$ is the unchanged model. The P rows are called *virtual tokens*.

# %% exercise="prepend_prompt"

# %% [markdown]
# What does a soft prompt do before it is trained?

# %% prediction="typed_or_learned"

# %%
prepend = working("prepend_prompt")

table = model.transformer.wte.weight.detach()
instruction = tokenizer.encode("Each card is told as a tale.\n\n")
card = tokenizer.encode(prompt_text(dataset.validation[0].mr))
with torch.no_grad():
    typed = model(torch.tensor([[*instruction, *card]]))[0, len(instruction) :]
    vectors = prepend(table[instruction], model.transformer.wte(torch.tensor([card])))
    learned = model(inputs_embeds=vectors)[0, len(instruction) :]
    without = model(torch.tensor([card]))[0]
print(f"{len(instruction)} tokens typed, or {len(instruction)} rows prepended: the logits at the card's tokens")
print(f"differ by up to {(typed - learned).abs().max():.1e}; without any prompt by {(typed - without).abs().max():.1f}")

# %% check="typed_or_learned"

# %% [markdown]
# ## Initialisation
#
# So a soft prompt can be initialised from a text, from randomly drawn tokens, or from noise. Lester et al. (section
# 3.2) compare such initialisations; for classification they also start from the names of the classes.
#
# A text rarely has exactly P tokens. If its ids are 7, 3 and 9, a prompt of two rows consists of the rows 7 and 3 of
# the table, and one of five rows of 7, 3, 9, 7 and 3.

# %% exercise="initial_prompt"

# %%
initial = working("initial_prompt")

P = 20
words = tokenizer.encode(
    "Here is a card, and then the tale of it, as it was told in the old books, with all that is on it."
)
start = {
    init: initial(table, P, init, words if init == "text" else (), torch.Generator().manual_seed(0))
    for init in ("text", "vocabulary", "random")
}
print(f"an embedding of the model has a mean length of {table.norm(dim=1).mean():.1f}")
for init, E in start.items():
    print(f"{init:<11} rows of length {E.norm(dim=1).mean():.1f}")

# %% [markdown]
# N(0, 1) is a common default: `nn.Embedding` uses it, and therefore so does PEFT's random initialisation. Such a row is
# many times as long as any embedding that the model has ever read. Keep that in mind for the experiment.
#
# ## The module
#
# So far you have a function. The model needs a module that holds E and inserts it at the beginning of a text. The
# library provides the part that every kind of virtual token needs, `VirtualTokens` (prefix tuning, in the next unit,
# uses it as well). You write the part that is specific to soft prompts.
#
# An example with P = 2 and one text of T = 3 tokens: `enter` gets embeddings (1, 3, d), a mask with 5 columns, and the
# positions 2, 3, 4, which have been shifted already. It returns embeddings (1, 5, d), the same mask, and the positions
# 0, 1, 2, 3, 4.

# %% exercise="SoftPrompt"

# %%
Soft = working("SoftPrompt")

soft = Soft(start["vocabulary"].clone())
model.requires_grad_(False)
soft.put_into(model)
ids = torch.tensor([card])
print("logits", tuple(model(ids).shape), "for", len(card), "tokens: the virtual positions are left out of the result")
trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
total = sum(p.numel() for p in model.parameters())
print(f"trained: {trained}, {soft.embeddings.numel() / total:.3%} of the numbers, {soft.embeddings.nbytes:,} bytes")
print("room for text:", model.config.n_positions, "of", context, "tokens")
VirtualTokens.take_out_of(model)

# %% [markdown]
# These bytes are all that you store for a task. And because the model is the same for all tasks, texts of *different*
# tasks can share a batch, each with its own prompt prepended (Lester et al., figure 2). No method that changes weights
# can do that so easily.

# %%
with torch.no_grad():
    X = model.transformer.wte(ids)
    one, other = prepend(start["text"], X), prepend(start["vocabulary"], X)
    together = model(inputs_embeds=torch.cat([one, other]))
    apart = torch.cat([model(inputs_embeds=one), model(inputs_embeds=other)])
print(f"two tasks in one batch or in two: the logits differ by {(together - apart).abs().max():.1e}")

# %% [markdown]
# ## Labels for virtual positions
#
# The course's model omits the virtual positions from its result. Most libraries do not: their logits are (B, P + T, V),
# and the labels have to mark the first P positions as ones that do not count.

# %% exercise="prompt_labels"

# %%
labels_with = working("prompt_labels")

batch = Completions(dataset.train[:64], tokenizer, context - P).batch_at(0, 4, seed=0)
E = start["vocabulary"].clone().requires_grad_(True)
logits = model(inputs_embeds=prepend(E, model.transformer.wte(batch.input_ids)))  # (B, P + T, V)
print("logits", tuple(logits.shape[:2]), " labels", tuple(batch.labels.shape), "->", end=" ")
print(tuple(labels_with(batch.labels, P).shape))

# %% [markdown]
# What if you get it wrong? Here are three wrong versions that run without an error. The last column is the cosine
# between the gradient of E in each version and the correct one.

# %%
counted = torch.nn.functional.pad(batch.labels, (P, 0), value=tokenizer.eos_id)
typed_labels = batch.labels.clone()
versions = {
    "virtual positions at -100": (logits, labels_with(batch.labels, P)),
    "virtual positions count": (logits, counted),
    "logits cut at the end": (logits[:, : batch.labels.shape[1]], typed_labels),
    "one position off": (logits[:, P - 1 : -1], typed_labels),
}
right = None
for name, (some, labels) in versions.items():
    loss = next_token_loss(some, labels)
    gradient = torch.autograd.grad(loss, E, retain_graph=True)[0]
    right = gradient if right is None else right
    alike = torch.nn.functional.cosine_similarity(gradient.flatten(), right.flatten(), dim=0)
    print(f"{name:<26} {int((labels[:, 1:] != -100).sum()):>4} labels count   loss {loss:5.2f}   cosine {alike:+.2f}")

# %% [markdown]
# Each of the wrong ones looks like a loss and can be reduced by training. In the first of them the prompt is trained to
# predict filler tokens at its own positions; in the other two, the text is compared with the predictions for other
# tokens. None of them optimises your task, as the cosines show.
#
# ## The experiment
#
# Now train three initialisations of 20 rows with three seeds each, and full fine-tuning with one seed. For each seed
# the batches and their order are the same. The learning rates are the library's, tuned for each method. That of a soft
# prompt is a thousand times that of full fine-tuning: it cannot damage any weight. The rates are meant for 500 steps
# and these runs are far shorter, so they show how the methods start, not where they end.

# %% prediction="how_far_a_prompt_comes"

# %%
BATCH, LONGEST = 4, 60
examples = Completions(dataset.train, tokenizer, context - LONGEST)
held_out = Completions(dataset.validation[:24], tokenizer, context - LONGEST).batches(8)  # not the short cards above


def train(model, method, seed, bar, rate=None):
    """Train what is not frozen for STEPS steps and return the losses."""
    settings = TrainingSettings(
        steps=STEPS,
        learning_rate=rate or defaults.learning_rate_for(method, model.config),
        warmup_steps=STEPS // 4,  # a larger fraction than the 30 of 500 steps with which the rates were tuned
        seed=seed,
    )

    def batch_at(step):
        bar.update()
        return examples.batch_at(step, BATCH, seed)

    return Trainer(model, batch_at, settings, progress=False).run().losses


def train_prompt(E, seed=0, bar=None, **more):
    """The training losses, the final loss on unseen cards, and the trained prompt."""
    soft = Soft(E.clone())
    soft.put_into(model)
    losses = train(model, "prompt", seed, bar, **more)
    result = losses, completion_loss(model, held_out), soft.embeddings.detach().clone()
    VirtualTokens.take_out_of(model)
    return result


def start_of(init, seed, length=P):
    return initial(table, length, init, words if init == "text" else (), torch.Generator().manual_seed(seed))


# %%
before = completion_loss(model, held_out)
on_batches = completion_loss(model, [examples.batch_at(step, BATCH, 0) for step in range(STEPS)])  # training batches
runs = {}


def three_seeds(init):
    with tqdm(total=3 * STEPS, desc=f"from {init}", unit="step") as bar:
        runs[init] = [train_prompt(start_of(init, seed), seed, bar) for seed in range(3)]


three_seeds("text")

# %%
three_seeds("vocabulary")

# %%
three_seeds("random")

# %%
full = copy.deepcopy(model).requires_grad_(True)
with tqdm(total=STEPS, desc="full", unit="step") as bar:
    full_losses = train(full, "full", 0, bar)
full_loss = completion_loss(full, held_out)
del full

# %%
print(f"{'no prompt':<22} loss {before:.2f}")
for init, three in runs.items():
    losses = [loss for _, loss, _ in three]
    print(f"{'soft, from ' + init:<22} loss {min(losses):.2f} to {max(losses):.2f} (three seeds)")
print(f"{'full fine-tuning':<22} loss {full_loss:.2f}")
best = min(loss for three in runs.values() for _, loss, _ in three)
print(f"the best soft prompt achieves {(before - best) / (before - full_loss):.0%} of the gain of full fine-tuning")

# %% check="how_far_a_prompt_comes"

# %% [markdown]
# Does a longer prompt help? Train two other lengths, initialised from the vocabulary.

# %%
lengths = {P: [loss for _, loss, _ in runs["vocabulary"]]}
with tqdm(total=2 * STEPS, desc="lengths", unit="step") as bar:
    for length in (1, LONGEST):
        lengths[length] = [train_prompt(start_of("vocabulary", 0, length), 0, bar)[1]]
lengths = dict(sorted(lengths.items()))
for length, losses in lengths.items():
    print(f"P = {length:>2}: loss {' '.join(f'{loss:.2f}' for loss in losses)}, room for {context - length} tokens")

# %%
figure, (left,) = plotting.panels(1, width=6.5, height=3.6)
means = {"full": plotting.smooth(full_losses, 4)}
for init, three in runs.items():
    steps = zip(*(losses for losses, _, _ in three), strict=True)  # the losses of the three seeds at each step
    means[init] = plotting.smooth([sum(losses) / 3 for losses in steps], 4)
for init, name, at, offset, side, style in (
    ("text", "from text (solid), vocabulary (dashed)", STEPS, (0, -20), "right", 0),
    ("vocabulary", "", STEPS, (0, 0), "right", 1),
    ("random", "from noise", STEPS // 3 + 1, (8, 8), "left", 2),
    ("full", "full fine-tuning", STEPS // 2 + 1, (-8, -18), "right", 5),
):
    line = 0 if init == "full" else style
    plotting.named_curve(left, means[init], name, at=at, offset=offset, side=side, style=style, line=line)
left.axhline(on_batches, color="0.5", linewidth=1, linestyle=":")
left.set_ylim(0, None)
left.text(0.02, 0.02, "dotted: no prompt, same batches", transform=left.transAxes, color="0.4", fontsize=9)
plotting.label(
    left,
    x=("step (means of 4 steps; prompts also of 3 seeds)"),
    y="loss, nats per token",
    title="Soft prompts learn slowly",
)
show(
    figure,
    f"The training loss over {STEPS} steps. Full fine-tuning falls to {full_losses[-1]:.1f}. The losses of soft "
    "prompts from a text and from the vocabulary fall slowly, side by side; that of one from noise starts far above "
    "the loss without a prompt, falls below it, and stays above the other two.",
)

# %% figure="unit_05.png"
figure, (right,) = plotting.panels(1, width=6.0, height=3.4)
for length, losses in lengths.items():
    right.plot([length] * len(losses), losses, "o", color=plotting.COLOURS[0])
right.plot(list(lengths), [sum(losses) / len(losses) for losses in lengths.values()], color=plotting.COLOURS[0])
right.axhline(before, color="0.5", linewidth=1, linestyle=":")
right.annotate("no prompt", (LONGEST, before), xytext=(0, 3), textcoords="offset points", ha="right", color="0.4")
right.margins(y=0.15)
plotting.label(right, x="P, rows of the prompt", y="loss on unseen cards", title="Each further row adds less")
show(
    figure,
    "The loss on unseen cards against the length of the prompt: "
    + ", ".join(f"{length} rows {sum(losses) / len(losses):.2f}" for length, losses in lengths.items())
    + f"; without a prompt {before:.2f}.",
)

# %% [markdown]
# This is what you measured, and what the papers report:
#
# - **A soft prompt learns slowly.** It has a few thousand numbers, all at the very bottom, with the whole network
#   between them and the loss. The model itself still cannot read cards. For a large model the same method works well:
#   on T5 the gap to full fine-tuning closes at 11 billion parameters (Lester et al. 2021, figure 1), because such a
#   model can already do the task and only has to be told which one is wanted.
# - **The initialisation matters.** Noise starts out worse than no prompt at all, and spends its first steps recovering;
#   in the end it is better than no prompt, but behind the other two. Does a text beat random tokens? Not here, but this
#   is only one text (and the three seeds of "text" differ only in their batches). In Lester et al. (section 3.2, figure
#   3b) the initialisation matters for small models but not for the largest.
# - **The length matters** most for the first rows. Lester et al. find little gain beyond 20 (figure 3a).
#
# ## Your own start
#
# Can you find a better start for 20 rows? Any tensor (P, d) will do: the rows of another text, the mean of the
# embeddings in every row, noise that is as short as an embedding, a start from the vocabulary that is stretched. Change
# `my_start`, and `MY_RATE` if you like; write down what you expect, and run the cell. Your start and the one from the
# vocabulary see the same batches for each of three seeds, so compare them seed by seed.

# %%
MY_RATE = defaults.learning_rate_for("prompt", model.config)


def my_start(seed):
    """The initial prompt (P, d). Change this line; `seed` is there for what you draw at random."""
    return start_of("vocabulary", seed)


def compare_with_the_vocabulary(start, rate):
    """Train your start with three seeds, and say whether it is better than the one from the vocabulary."""
    first = torch.as_tensor(start(0))
    if first.shape != (P, table.shape[1]):
        return f"A start has the shape {(P, table.shape[1])}; yours has {tuple(first.shape)}."
    usual = defaults.learning_rate_for("prompt", model.config)
    if rate == usual and torch.equal(first, start_of("vocabulary", 0)):
        return "That is the start from the vocabulary itself: change `my_start`."
    gains = []
    with tqdm(total=3 * STEPS, desc="your start", unit="step") as bar:
        for seed, (_, loss, _) in enumerate(runs["vocabulary"]):
            _, mine, _ = train_prompt(start(seed), seed, bar, rate=rate)
            gains.append(loss - mine)
    for seed, gain in enumerate(gains):
        print(f"seed {seed}: your loss is {abs(gain):.3f} {'lower' if gain > 0 else 'higher'}")
    better, worse = min(gains) > 0, max(gains) < 0
    return "Better with all three seeds." if better else "Worse with all three." if worse else "Undecided."


print(compare_with_the_vocabulary(my_start, MY_RATE))

# %% [markdown]
# ## The cost of a soft prompt
#
# Twenty rows are cheap to train and to store. But they are read with *every* text, and they take up positions that text
# could use. Move the slider.

# %%
tokens = sorted(len(ids) for ids, _ in Completions(dataset.train, tokenizer, context).rows)
text = tokens[len(tokens) // 2]
d, layers = model.config.n_embd, model.config.n_layer


def operations(length):
    """Multiplications and additions of the blocks for one text of median length after a prompt."""
    positions = length + text
    return layers * (2 * positions * 12 * d * d + 4 * positions * positions * d)


def draw_costs(length):
    figure, (axes,) = plotting.panels(1, width=7, height=2.6)
    fits = sum(n + length <= context for n in tokens) / len(tokens)
    parts = {
        "room for text": 100 * (context - length) / context,
        "cards that fit": 100 * fits,
        "operations for one text": 100 * operations(length) / operations(0),
    }
    plotting.bars(axes, parts, unit="%")
    plotting.label(axes, x="per cent of the model without a prompt", title=f"A prompt of {length} rows")
    return figure


lengths_to_try = [length for length in (0, 1, 5, 20, 50, 100, 150, 200) if length < context]
slider(
    draw_costs,
    "rows",
    lengths_to_try,
    lengths_to_try[-2],
    f"Bars for a prompt of {lengths_to_try[-2]} rows, in per cent of the model without a prompt: the room left for "
    "text, the share of the cards that still fit, and the operations for one text, which are far above 100.",
)

# %% [markdown]
# ## Can you read a soft prompt?
#
# The rows are vectors in the space of the embeddings, so you can ask which token each of them is closest to.

# %% exercise="nearest_tokens"

# %%
nearest = working("nearest_tokens")


def spelled(E):
    return " ".join(repr(tokenizer.decode([int(token)])) for token in nearest(E, table))


for init in ("text", "random"):
    _, loss, E = runs[init][0]
    moved = (E - start_of(init, 0)).norm(dim=1).mean() / start_of(init, 0).norm(dim=1).mean()
    same = (nearest(E, table) == nearest(start_of(init, 0), table)).float().mean()
    cosine = (torch.nn.functional.normalize(E) @ torch.nn.functional.normalize(table).T).amax(dim=1).mean()
    print(f"from {init}: loss {loss:.2f}; rows have moved by {moved:.0%} of their length, {same:.0%} kept their token")
    print(
        f"    length of a row {E.norm(dim=1).mean():.1f}, of the longest embedding {table.norm(dim=1).max():.1f}; ",
        end="",
    )
    print(f"cosine to the nearest token {cosine:.2f}")
    print("   ", spelled(E), "\n")

# %% [markdown]
# Look at how far the rows have moved. At this learning rate they soon become several times as long as any embedding,
# even those that started as embeddings, and their nearest token is hardly closer than for rows that started as noise.
# So it is not length alone that makes noise a bad initialisation.
#
# It is tempting to read a meaning into the words. Test it: take the nearest *tokens* and type them. If they were what
# the prompt means, the loss would stay the same.

# %%
for init in ("text", "vocabulary"):
    _, loss, E = runs[init][0]
    typed = Soft(table[nearest(E, table)])
    typed.put_into(model)
    print(
        f"from {init:<11} trained {loss:.2f}, its nearest tokens typed {completion_loss(model, held_out):.2f}", end=""
    )
    VirtualTokens.take_out_of(model)
    first = Soft(start_of(init, 0))
    first.put_into(model)
    print(f", before training {completion_loss(model, held_out):.2f}; without a prompt {before:.2f}")
    VirtualTokens.take_out_of(model)

# %% [markdown]
# Compare the losses in each line: part of the gain survives, and part is lost. The lost part was in directions and
# lengths that no token has, so no text can reach it. (Khashabi et al. 2022, "Prompt Waywardness", arXiv:2112.08348, go
# further: a soft prompt can be trained to solve one task while its nearest tokens spell out the description of
# another.) If you want a prompt of real tokens, you have to train for that: PEZ (Wen et al. 2023, arXiv:2302.03668)
# computes its gradients at the nearest tokens.
#
# ## What goes wrong in practice
#
# **Using the learning rate of full fine-tuning.** It is meant for pretrained weights, which must not change too much. A
# prompt hardly moves with it.

# %%
rate = defaults.learning_rate_for("full", model.config)
with tqdm(total=STEPS, desc="small rate", unit="step") as bar:
    _, slow, E = train_prompt(start_of("vocabulary", 0), 0, bar, rate=rate)
usual = runs["vocabulary"][0][1]
print(f"at {defaults.learning_rate_for('prompt', model.config):g}: {usual:.2f};  at {rate:g}: {slow:.2f}", end="")
print(f";  the rows have moved by {(E - start_of('vocabulary', 0)).norm() / start_of('vocabulary', 0).norm():.1%}")

# %% [markdown]
# **Positions of the text that start at 0.** In training the first token of the text had position P. If you use the
# prompt with your own positions, counted from 0 for the text, the input differs from what the prompt was trained with.

# %%
E = runs["vocabulary"][0][2]
rows, labels, _ = held_out[0]  # the first eight unseen cards
X = prepend(E, model.transformer.wte(rows))
counts = {
    "the text starts at P": torch.arange(X.shape[1]),
    "the text starts at 0": torch.cat([torch.arange(P), torch.arange(rows.shape[1])]),
    "all of the prompt at 0": torch.cat([torch.zeros(P, dtype=torch.long), torch.arange(rows.shape[1])]),
}
with torch.no_grad():
    for name, where in counts.items():
        logits = model(inputs_embeds=X, position_ids=where[None].expand(len(X), -1))
        print(f"{name:<23} loss {next_token_loss(logits, labels_with(labels, P)):.3f}")

# %% [markdown]
# Neither mistake raises an error. How large the difference is depends on the model and on how long the prompt was
# trained.
#
# **A mask that ignores the prompt.** With padding there is an attention mask, with one column for each token. It needs
# P additional columns. Here a missing column is an error; other code silently truncates or pads the mask.

# %%
soft = Soft(E)
try:
    model(inputs_embeds=prepend(E, model.transformer.wte(rows)), attention_mask=torch.ones_like(rows))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# **A text that no longer fits.** A prompt of P rows takes P positions from every text. A card that used to fit now
# raises an error or, in other libraries, is truncated.

# %%
Soft(initial(table, context - 20, "random", (), torch.Generator().manual_seed(0))).put_into(model)
try:
    model(rows)
except ValueError as error:
    print("ValueError:", error)
VirtualTokens.take_out_of(model)

# %% [markdown]
# ## Summary
#
# - A hard prompt needs no training but takes up context; a small model gains little from it, and does not learn from it
#   what a card means.
# - A soft prompt is P trained vectors prepended to the embeddings; every typed text corresponds to one value of it.
# - It takes 20 kB per task here, forgets nothing (without it the model is unchanged), and learns slowly.
# - Initialise it from real embeddings: noise from N(0, 1) starts out worse than no prompt. Use a large learning rate.
# - Virtual positions have no labels, come first, and leave less room for the text.
#
# ## Go further
#
# - Lester et al. 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning* (arXiv:2104.08691): section 3.2.
# - Brown et al. 2020, *Language Models are Few-Shot Learners* (arXiv:2005.14165).
# - Min et al. 2022, *Rethinking the Role of Demonstrations* (arXiv:2202.12837): examples with wrong labels.
# - Khashabi et al. 2022, *Prompt Waywardness* (arXiv:2112.08348): why nearest tokens do not explain a soft prompt.
# - `lora_from_scratch/methods/prompt_tuning.py`: what you wrote, and the rest of the method.
#
# The prompt enters only once, at the bottom. To influence the sixth block it has to pass through the five below it,
# which were never trained to pass on such vectors. What if every layer had trained vectors of its own? That is unit 06.

# %% [markdown] open_question="words_or_vectors" points=4
# ### Open question
#
# A company uses a large model that it can only access through an API that takes text and returns text. It has 40
# examples of its task. A second company runs a model of six billion parameters on its own machines and has 20 tasks
# with 5,000 examples each. Advise both: hard prompt, soft prompt, or fine-tuning of the weights? Write about ten lines,
# and say for each what you would measure before deciding.
#
# **Rubric.**
# - 1 point: the first cannot train a soft prompt: a text API gives access to neither embeddings nor gradients.
# - 1 point: names what a few-shot prompt costs there: tokens in every request, context, and a choice of examples that
#   has to be tested on examples that are not in the prompt.
# - 1 point: for the second, weighs the advantages of 20 soft prompts (kilobytes per task, one model, mixed batches,
#   nothing forgotten) against slow learning and lost context.
# - 1 point: a measurement for each that could change the decision (quality on unseen examples with a spread, room for
#   text, cost of a request).

# %% volatile=true
progress("05")
