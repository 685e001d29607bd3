# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 21: Editing representations
#
# **By the end of this unit you can**
#
# - edit hidden states in a subspace, as LoReFT does, and keep the rows that span it orthonormal;
# - find the positions at which to edit, in batches with padding, and measure which positions and blocks matter;
# - test an edit with dropout, in training and in evaluation mode;
# - search for a prompt of real tokens by gradients, and compare the search with a fair baseline.
#
# **Prerequisites**: the singular value decomposition (unit 02), soft prompts (unit 05), and LoRA (unit 09). It is an
# elective: no other unit needs it.
#
# **Time**: about 75 minutes, including a minute and a half of computation. 5 exercises, 2 predictions, one open
# question.
#
# ![The held-out loss of a one-word task when hidden states are edited after a single block. It is lower after the first
# blocks than after the last two.](unit_21.png)

# %%
import copy
import inspect
import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, parse_mr
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.loreft import EditedBlock, Intervention, LoReFT
from lora_from_scratch.methods.prompt_tuning import initial_prompt, nearest_tokens
from lora_from_scratch.museum.dropped_stream import FaultyEdit
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (a minute and a half on two cores), "gpt2" (needs a network connection and several minutes), or
# the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 30))  # of each training run
SEARCH_STEPS = 5 * STEPS // 2  # of each search for a prompt

# %% [markdown]
# ## Edits instead of updates
#
# LoRA changes weights, and through them every hidden state. *Representation fine-tuning* (Wu et al. 2024,
# arXiv:2404.03592) leaves all weights as they are and changes hidden states directly: after some blocks, at some
# positions, h is replaced by another vector. LoReFT (equation 2 there) changes it only in a subspace of r dimensions:
#
# $$h' = h + R^\top (W h + b - R h)$$
#
# | Symbol | Shape | What it is |
# |---|---|---|
# | h | (d,) | the hidden state of one token after a block |
# | R | (r, d) | its orthonormal rows span the subspace |
# | W, b | (r, d), (r,) | what the coordinates in the subspace are to become, as a function of h |
#
# R h are the coordinates of h in the subspace. The brackets contain by how much they are to change, and R^T carries
# that change back into the space of h. Since the rows of R are orthonormal (R R^T = I), the new coordinates are exactly
# what was asked for: R h' = R h + (W h + b - R h) = W h + b. Everything orthogonal to the subspace stays.
#
# Per edited block these are 2 r d + r numbers: 4,104 with r = 8 and d = 256.
#
# ### Rows that stay orthonormal
#
# A step of an optimiser moves R, and its rows are no longer orthonormal. After each step it is replaced by the nearest
# matrix whose rows are. An example: R has the rows (1, 0) and (0.6, 0.8), both of length 1, but not orthogonal.
# Gram-Schmidt keeps the first and turns the second to (0, 1); the nearest matrix turns both, by the same angle.

# %% exercise="orthonormal_rows"

# %%
nearest_rows = working("orthonormal_rows")

R = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
for name, rows in {"Gram-Schmidt": torch.eye(2), "nearest": nearest_rows(R)}.items():
    print(f"{name:<13} {rows.tolist()}, distance from R {(rows - R).norm():.3f}")

# %% [markdown]
# ### The edit
#
# An example with r = 1 and d = 2: h = (2, 5), R = (1, 0), W = (0, 1), b = 1. The coordinate of h is R h = 2. It is to
# become W h + b = 5 + 1 = 6, so it has to change by 4. The change of h is R^T 4 = (4, 0), and h' = (6, 5).
#
# DiReFT (equation 3 there) leaves out what makes this expensive: it adds R^T (W h + b), with any R. Write both. In a
# block several edits can meet, so the function returns the change alone.

# %% exercise="reft_change"

# %%
change = working("reft_change")

torch.manual_seed(0)
h, R = torch.randn(1, 3, 256), nearest_rows(torch.randn(8, 256))
W, b = torch.randn(8, 256) / 16, torch.randn(8)
edited = h + change(h, R, W, b)
print(f"R h' is W h + b, up to {(edited @ R.T - (h @ W.T + b)).abs().max():.0e}")
rest = torch.eye(256) - R.T @ R
print(f"outside of the subspace h' is h, up to {((edited - h) @ rest).abs().max():.0e}")

# %% [markdown]
# ## Where to edit
#
# The authors edit the first p and the last s tokens of the *prompt*, and write this f7+l7 for p = s = 7. What the model
# writes afterwards is not edited; the edits reach it through the keys and values of the prompt. A prompt ends with a
# line break here. In a batch the texts have different lengths, so there is padding, which may be on either side:
#
#     tokens      pad   pad     A   sad  tale    \n   sad
#     place        -1    -1     0     1     2     3     4
#     first 2                   x     x
#     last 2                                x     x

# %% exercise="prompt_positions"

# %% [markdown]
# ## A test for dropout
#
# Now to the museum of faults. Two well-known libraries add dropout to LoReFT's edit. Our copy of the fault:

# %%
print(inspect.getsource(FaultyEdit))

# %% [markdown]
# Look for the fault before you go on: what does the dropout act on, in which mode, and what would it do to a model
# with W = R and b = 0, which should not be changed at all?
#
# Then write the test that finds it, together with the mistakes that are close to it. The check runs your test on sound
# edits and on faulty ones.

# %% exercise="test_edit"

# %% [markdown]
# Mend the exhibit: change the last line of this copy, so that your test passes it.


# %%
class MyEdit(FaultyEdit):
    def forward(self, h):
        z = h @ self.W.T + self.b - h @ self.R.T
        return self.dropout(h + z @ self.R)


test_of_edits = working("test_edit")
for name, kind in {"the exhibit": FaultyEdit, "yours": MyEdit}.items():
    try:
        test_of_edits(kind)
        print(f"{name}: passes")
    except AssertionError as error:
        print(f"{name}: fails ({error})")


# %% [markdown]
# ## A few thousand numbers
#
# Two tasks show what such edits can do. In both the prompt ends with a line break.
#
# - *One word*: the prompt is a tale, and the answer how it ends, one of four words. Many benchmarks of the paper are of
#   this kind: a question, and an answer of a word or a letter.
# - *A tale*: the prompt is a story card, and the answer a whole tale.

# %%
model, tokenizer = load_gpt2(MODEL)
config = model.config
dataset = load_dataset("story-cards")
WORDS = {"happy": " happy", "sad": " sad", "a wedding": " wedding", "a feast": " feast"}


def shortest(examples, number):
    return sorted(examples, key=lambda example: len(example.mr) + len(example.ref))[:number]


def endings(examples, number):
    """Tales, and the word that says how they end; so many of each word."""
    asked = [
        Example(example.ref, WORDS[ending])
        for example in shortest(examples, len(examples))
        if (ending := parse_mr(example.mr).get("ending")) in WORDS
    ]
    return [example for word in WORDS.values() for example in [one for one in asked if one.ref == word][:number]]


def words_only(examples):
    """Nothing but the word is learned, not the end of the text behind it."""
    data = Completions(examples, tokenizer, config.n_positions)
    data.rows = [(ids[:-1], labels[:-1]) for ids, labels in data.rows]
    return data


def whole_tales(examples):
    return Completions(examples, tokenizer, config.n_positions)


tasks = {
    "one word": words_only(endings(dataset.train, 300)),
    "a tale": whole_tales(shortest(dataset.train, 800)),
}
held_out = {
    "one word": words_only(endings(dataset.validation, 24)).batches(24),
    "a tale": whole_tales(shortest(dataset.validation, 96)[::4]).batches(12),
}


def adapted(method, prepare=None):
    """A copy of the model with this method; `prepare` may change it before it is trained."""
    tuned = copy.deepcopy(model)
    method.adapt(tuned)
    if prepare:
        prepare(tuned)
    return tuned


def trained(method, task, prepare=None, rate=None):
    """The same, trained on a task, with the method's tuned learning rate if none is given."""
    tuned = adapted(method, prepare)
    settings = TrainingSettings(
        steps=STEPS,
        learning_rate=rate or defaults.learning_rate_for(method.name, config),
        warmup_steps=defaults.warmup_steps_for(STEPS),
    )
    Trainer(tuned, lambda step: tasks[task].batch_at(step, 8, 0), settings, method=method, progress=False).run()
    return tuned


def loreft(**fields):
    return LoReFT(rank=8, **fields).for_tokenizer(tokenizer)


@torch.no_grad()
def share_right(tuned):
    """The share of the held-out tales whose word is the most likely one."""
    right = []
    for batch in held_out["one word"]:
        place = (batch.labels != -100).int().argmax(dim=1)  # of the word; the token before it predicts it
        rows = torch.arange(len(place))
        guess = tuned.eval()(batch.input_ids)[rows, place - 1].argmax(dim=-1)
        right.append(guess == batch.labels[rows, place])
    return float(torch.cat(right).float().mean())


plans = {
    "LoRA, rank 1": LoRA(rank=1, alpha=8),
    "LoReFT, l1": loreft(positions="l1"),
    "LoReFT, f7+l7": loreft(positions="f7+l7"),
    "LoReFT, all": loreft(positions="all"),
}
word_losses, lines = {}, ["one word         numbers   held-out loss   right"]
for name, method in tqdm(plans.items(), desc="one word", unit="run"):
    tuned = trained(method, "one word")
    word_losses[name] = completion_loss(tuned, held_out["one word"])
    numbers = sum(p.numel() for p in method.trainable(tuned).values())
    lines.append(f"{name:<16} {numbers:>7,} {word_losses[name]:>15.2f} {share_right(tuned):>7.0%}")
print("\n".join(lines))

# %% [markdown]
# With as many numbers, the edits of the first and last seven tokens are better than LoRA of rank 1, and edits at all
# positions are better still. (Three other seeds: losses of 0.33, 0.24 and 0.26 at f7+l7, of 0.15, 0.08 and 0.07 at all
# positions, and of 0.40, 0.47 and 0.67 with LoRA. LoRA of rank 8, with eight times the numbers, has 0.03 to 0.32. Each
# has its own tuned learning rate. After 40 steps it depends on the seed whether f7+l7 or LoRA of rank 1 is ahead.)
# The word is predicted at the last token of the prompt, which is edited itself, and the ending is told in the first or
# the last words of a tale.
#
# ### Which block?
#
# Now edit one block only, with 4,104 numbers, at all positions.

# %% figure="unit_21.png"
block_losses = []
for layer in tqdm(range(config.n_layer), desc="blocks", unit="run"):
    tuned = trained(loreft(positions="all", layers=(layer,)), "one word")
    block_losses.append(completion_loss(tuned, held_out["one word"]))
chance = float(torch.tensor(len(WORDS)).log())

figure, (axes,) = plotting.panels(1, width=6.4)
plotting.named_curve(axes, block_losses, "edited after this block", at=2, offset=(0, -18), side="left", style=0)
axes.axhline(chance, color="black", linestyle=":")
axes.annotate("guessing one of four words", (1, chance), xytext=(0, -14), textcoords="offset points")
axes.set_ylim(0, 1.1 * max(chance, *block_losses))
plotting.label(axes, x="block", y="held-out loss (nats)", title="4,104 numbers after one block")
show(
    figure,
    "The held-out loss of a one-word task when hidden states are edited after a single block, at all positions: "
    + ", ".join(f"block {block} {loss:.2f}" for block, loss in enumerate(block_losses, start=1))
    + f". Guessing one of four words would give {chance:.2f}.",
)

# %% [markdown]
# After the last block the edit is hardly better than guessing. What is changed at other positions reaches the last token
# through the attention of later blocks, and after the last block there are none. Which of the other blocks is best cannot
# be seen from one run each.
#
# ### Whole tales
#
# Now the other task. Before you train: what do the same edits do for the writing of tales?

# %% prediction="edits_for_tales"

# %%
tale_losses = {"no training": completion_loss(model, held_out["a tale"])}
rates = {"LoRA, rank 1": 1e-2, "LoReFT, f7+l7": 1e-2, "LoReFT, all": 2e-2}  # tuned for this task, on the bundled model
for name, rate in tqdm(rates.items(), desc="tales", unit="run"):
    tale_losses[name] = completion_loss(trained(plans[name], "a tale", rate=rate), held_out["a tale"])
for name, loss in tale_losses.items():
    print(f"{name:<16} held-out loss of tales {loss:.2f}")

# %% check="edits_for_tales"

# %% [markdown]
# At f7+l7 the edits gain less than half of what LoRA of rank 1 gains; other learning rates, from 0.005 to 0.1, change
# nothing about it. At all positions the same numbers do better than LoRA (with another seed, 1.67 against 2.00). So the
# edit is not what fails here, but where it is made. The atlas (`docs/atlas.md`), in which LoReFT loses clearly,
# has these positions and this task.
#
# Edits at all positions have a price: they are computed for every token that is written, not once for the prompt.
#
# ### Your own edits
#
# Choose positions, blocks and a rank with **at most 5,000 numbers**, so that tales have a lower loss than with the
# 24,624 numbers at f7+l7. Write down first which of the three you expect to matter most.


# %%
def my_edits():
    """Change this line. Positions: "l1", "f7+l7", ..., "all"; layers are counted from 0."""
    return LoReFT(rank=8, positions="f7+l7", layers=(2,))


def compare_with_the_authors_positions(method):
    method = method.for_tokenizer(tokenizer)
    tuned = trained(method, "a tale", rate=2e-2)
    numbers = sum(p.numel() for p in method.trainable(tuned).values())
    if numbers > 5000:
        return f"Your edits have {numbers:,} numbers, more than 5,000."
    mine, theirs = completion_loss(tuned, held_out["a tale"]), tale_losses["LoReFT, f7+l7"]
    word = "lower" if mine < theirs else "higher"
    return f"Your {numbers:,} numbers: {mine:.2f}, {word} than {theirs:.2f} with 24,624 numbers at f7+l7."


print(compare_with_the_authors_positions(my_edits()))

# %% [markdown]
# ### What the exhibit does to a run
#
# Put the exhibit's dropout into a model: with a probability of 0.1, on everything that comes out of an edited block, at
# all positions. Beside it the same probability on the change alone.


# %%
def dropout_after(kind):
    """What puts dropout behind every module of this kind."""

    def prepare(tuned):
        for module in tuned.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda one, inputs, output: F.dropout(output, 0.1, one.training))

    return prepare


@torch.no_grad()
def loss_in_training_mode(tuned):
    torch.manual_seed(0)
    batches = held_out["a tale"]
    return sum(float(next_token_loss(tuned.train()(b.input_ids), b.labels)) for b in batches) / len(batches)


print("dropout of 0.1            tales, training mode, before the first step   one word, after training")
for name, kind in {"none": (), "exhibit: h and change": EditedBlock, "mended: the change": Intervention}.items():
    before = loss_in_training_mode(adapted(plans["LoReFT, all"], dropout_after(kind)))
    after = word_losses["LoReFT, all"]
    if kind:
        after = completion_loss(trained(plans["LoReFT, all"], "one word", dropout_after(kind)), held_out["one word"])
    print(f"{name:<25} {before:>45.2f} {after:>26.2f}")

# %% [markdown]
# W = R and b = 0 at the start, so the change is zero, and still the exhibit makes the model worse in training mode:
# what it drops are hidden states that the frozen blocks need. After training its loss is higher than with the same
# dropout on the change (one seed). In evaluation mode nothing is wrong, so a test of the trained model alone finds no
# fault.

# %% [markdown]
# ## A prompt that can be read
#
# The other way to influence a frozen model from outside its weights is the prompt. A soft prompt (unit 05) is found
# easily by gradients, but no text has its rows. PEZ (Wen et al. 2023, arXiv:2302.03668) looks for p real tokens. It
# keeps a soft prompt P beside them, and in each step
#
# $$E_i = \text{the embedding nearest to } P_i \text{ by cosine}, \qquad g = \nabla_E \, \mathrm{loss}(E), \qquad
# P \leftarrow P - \mathrm{update}(g)$$
#
# The loss and its gradient are always those of real tokens, E; but it is P that the optimiser moves. An example with
# one row in the plane: the tokens have the embeddings (1, 0) and (0, 1), and P = (1, 0). Each step with the gradient g
# = (0, -1) and the rate 0.4 adds 0.4 to the second coordinate: P is (1, 0.4), (1, 0.8), (1, 1.2). The nearest token is
# the first one for two steps, and then the second. If P were set back to E after each step, nothing would ever change.

# %% exercise="hard_prompt_search"

# %% [markdown]
# Search for eight tokens after which the model expects dragons. The loss is that of four sentences behind the prompt.

# %%
model.eval().requires_grad_(False)
table = model.transformer.wte.weight.detach()
P_TOKENS = 8


def sentences_of(texts):
    """Their tokens, padded on the right, and the labels."""
    rows = [tokenizer.encode(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    return ids, labels


wanted = sentences_of(
    [
        "A dragon came down from the mountain and breathed fire.",
        "The dragon lay asleep upon a heap of gold.",
        "There was a dragon that guarded the princess.",
        "The dragon spread its wings and flew over the village.",
    ]
)
others = sentences_of(
    [
        "The king had promised his kingdom to the man who killed the dragon.",
        "The dragon opened its eyes and saw the knight.",
        "Nobody dared to go near the cave of the dragon.",
    ]
)


def dragon_loss(E, texts=wanted):
    """The loss of the sentences behind a prompt with these embeddings (p, d)."""
    ids, labels = texts
    logits = model(inputs_embeds=torch.cat([E.expand(len(ids), -1, -1), table[ids]], dim=1))
    return F.cross_entropy(logits[:, len(E) - 1 : -1].flatten(0, 1), labels.flatten(), ignore_index=-100)


def start(seed):
    return initial_prompt(table, P_TOKENS, generator=torch.Generator().manual_seed(seed))


# %% [markdown]
# Four searches get the same number of forward passes. *PEZ* is your function. *Rounded* trains a soft prompt and takes
# its nearest tokens at the end. *Random* draws eight random tokens each time and keeps the best. *Mutation* changes one
# token of its best prompt at random, and keeps the change if the loss falls. The last two need no gradients.

# %% prediction="readable_prompt"

# %%
search = working("hard_prompt_search")


def pez(seed):
    rows = start(seed).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=defaults.learning_rate_for("pez", config), weight_decay=0.1)
    return search(dragon_loss, rows, table, SEARCH_STEPS, optimizer)


def rounded(seed):
    rows = start(seed).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=defaults.learning_rate_for("prompt", config))
    for _ in range(SEARCH_STEPS - 1):
        optimizer.zero_grad()
        loss = dragon_loss(rows)
        loss.backward()
        optimizer.step()
    soft_losses.append(loss.item())
    tokens = nearest_tokens(rows.detach(), table)
    with torch.no_grad():
        return tokens, dragon_loss(table[tokens]).item()


@torch.no_grad()
def by_chance(seed, mutate):
    generator = torch.Generator().manual_seed(seed)
    best = torch.randint(len(table), (P_TOKENS,), generator=generator)
    lowest = dragon_loss(table[best]).item()
    for _ in range(SEARCH_STEPS - 1):
        tokens = torch.randint(len(table), (P_TOKENS,), generator=generator)
        if mutate:
            place = torch.randint(P_TOKENS, (), generator=generator)
            tokens = torch.where(torch.arange(P_TOKENS) == place, tokens, best)
        loss = dragon_loss(table[tokens]).item()
        if loss < lowest:
            best, lowest = tokens, loss
    return best, lowest


searches = {
    "PEZ": pez,
    "rounded": rounded,
    "random": lambda seed: by_chance(seed, False),
    "mutation": lambda seed: by_chance(seed, True),
}
soft_losses = []
found = {name: [find(seed) for seed in (0, 1)] for name, find in tqdm(searches.items(), desc="searches", unit="search")}
with torch.no_grad():
    typed = tokenizer.encode(" Here is a tale of a dragon.")
    print(f"typed by hand  {dragon_loss(table[typed]):.2f}   {tokenizer.decode(typed)!r}")
print(f"soft           {min(soft_losses):.2f} to {max(soft_losses):.2f}, before it is rounded")
for name, results in found.items():
    for tokens, loss in results:
        print(f"{name:<14} {loss:.2f}   {tokenizer.decode(tokens.tolist())!r}")

# %% check="readable_prompt"

# %% [markdown]
# PEZ's prompts are the best by far, and they can be read, though they are words and no sentences. The soft prompt is
# much better than all of them until it is rounded; then it is about as good as chance. That is so after 75 steps:
# after six, when its rows have moved little from the embeddings at which they began, the rounded prompts had a loss of
# 3.96 and 3.69, and PEZ's of 3.71 and 3.83. The sentence that a person would type is no better than chance here.
#
# A step of PEZ also needs a backward pass, so in the same time the searches by chance could try two to three times as
# many prompts. That does not close the gap: with 300 passes a random search came to 4.24 and mutation to 3.86, with 900
# passes to 4.02 and 3.76; PEZ had 3.05 after 300 steps (seed 0).
#
# Does the prompt work for sentences that it was not made for, and does it make the model write about dragons?

# %%
best = {name: min(results, key=lambda one: one[1])[0] for name, results in found.items()}
best = {"no prompt": torch.tensor(tokenizer.encode("\n")), "typed by hand": torch.tensor(typed)} | best
print("prompt           three other sentences   texts with a dragon, of 16")
for name, tokens in best.items():
    with torch.no_grad():
        other = float(dragon_loss(table[tokens], others))
    prompts = [tokens.tolist()] * 16
    texts = [tokenizer.decode(text) for text in generate(model, prompts, max_new_tokens=24, temperature=0.8, top_k=50)]
    print(f"{name:<16} {other:>21.2f} {sum('dragon' in text for text in texts):>28}")

# %% [markdown]
# The prompt also helps with sentences that it was not made for, and the model writes about dragons after it. ("No
# prompt" is a line break.)
#
# ## What goes wrong in practice
#
# **Loading another R than was saved.** PyTorch keeps a matrix orthonormal by a parametrisation with two parts: a
# parameter, and a buffer called `base`. A file of the trained *parameters* lacks the buffer, and with `strict=False`
# nobody complains. (The authors' package therefore overwrites `base` when it loads an edit.)

# %%
torch.manual_seed(0)
saved, loaded = (orthogonal(nn.Linear(256, 8, bias=False)) for _ in range(2))
file = dict(saved.named_parameters())
loaded.load_state_dict(file, strict=False)
print(f"saved: {list(file)}; missing: {sorted(set(saved.state_dict()) - set(file))}")
print(f"the loaded R differs from the saved one by {(loaded.weight - saved.weight).norm() / saved.weight.norm():.0%}")

# %% [markdown]
# **A prompt whose end is not found.** The last positions are counted from the first line break. A prompt without one,
# or with an earlier one than in training, is edited elsewhere, and no error is raised.

# %%
positions = working("prompt_positions")
line_break = tokenizer.encode("\n")[0]
for text in ("A tale with a sad ending.\n", "A tale with a sad ending.", "Question\nA tale with a sad ending.\n"):
    ids = torch.tensor([tokenizer.encode(text)])
    place = torch.arange(ids.shape[1])[None]
    last = ids[positions(ids, place, 0, 3, line_break)[1]]
    print(f"{text!r:<42} the last three: {tokenizer.decode(last.tolist())!r}")

# %% [markdown]
# **A random start.** In the authors' package W is random, so the model is another one before the first step. With W = R
# and b = 0 it is the base.

# %%
for first in ("base", "random"):
    tuned = adapted(loreft(positions="all", start=first))
    print(f"start={first!r:<9} loss of tales before the first step {completion_loss(tuned, held_out['a tale']):.2f}")

# %% [markdown]
# **Expecting to merge it.** An edit depends on the position, and on h after a whole block. No weight of the block can
# take it in, so the edits cost something in every forward pass, and serving software has to know them.
#
# **Taking ids for text.** A found prompt is a list of ids. Typed as a text, it may be split into other tokens, as some
# of these are, and then its loss can be another one.

# %%
for name, results in found.items():
    for tokens, loss in results:
        again = tokenizer.encode(tokenizer.decode(tokens.tolist()))
        with torch.no_grad():
            typed_loss = float(dragon_loss(table[torch.tensor(again)]))
        same_ids = "the same ids" if again == tokens.tolist() else f"{len(again)} other ids"
        print(f"{name:<10} {loss:.2f}, typed {typed_loss:.2f} ({same_ids})")

# %% [markdown]
# ## Summary
#
# - LoReFT sets r coordinates of a hidden state to W h + b, which needs orthonormal rows of R, and leaves the rest alone.
# - For one word behind the prompt, edits at f7+l7 are better than LoRA of rank 1 with as many numbers.
# - For whole tales they hardly help at these positions, and do better than LoRA of rank 1 at all positions.
# - Dropout belongs on the change: on the hidden state it harms a model that has not been changed at all.
# - PEZ computes gradients at real tokens and moves a soft prompt by them; it beats chance with the same forward passes.
#
# ## Go further
#
# - Wu et al. 2024, *ReFT: Representation Finetuning for Language Models* (arXiv:2404.03592); their package is
#   stanfordnlp/pyreft.
# - Wen et al. 2023, *Hard Prompts Made Easy* (arXiv:2302.03668); their code is YuxinWenRick/hard-prompts-made-easy.
# - Khashabi et al. 2022, *Prompt Waywardness* (arXiv:2112.08348): soft prompts whose nearest tokens say something else.
# - `lora_from_scratch/methods/loreft.py` and `lora_from_scratch/methods/pez.py`: both methods in full.

# %% [markdown] open_question="edits_or_weights" points=4
# ### Open question
#
# A team has tuned LoReFT with f7+l7 for a classifier of customer letters, and it is as good as LoRA with a fraction of
# the numbers. Now they want the same model to write the replies, half a page each, with LoReFT at the same positions.
# Write at most 150 words: what do you expect, why, which experiment would you do first, and what would you propose?
#
# **Rubric.**
#
# - 1 point: only the prompt is edited; a reply is influenced through keys and values alone, and less with every token.
# - 1 point: distinguishes a single decision at the last position of the prompt from the prediction of many tokens.
# - 1 point: an experiment that varies the positions (more, all) with tuned rates, and measures the loss of replies.
# - 1 point: a proposal with its costs: edits at all positions, or LoRA, which can be merged; one adapter per task.

# %% volatile=true
progress("21")
