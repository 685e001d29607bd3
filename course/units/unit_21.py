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
# **Time**: about 75 minutes, including a minute and a half of computation. 5 exercises, 2 predictions, one open question.
#
# ![FIGURE](unit_21.png)

# %%
import copy
import inspect
import os

import torch
from torch import nn
from torch.nn import functional as F

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, parse_mr
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.loreft import LoReFT, interventions
from lora_from_scratch.methods.prompt_tuning import initial_prompt, nearest_tokens
from lora_from_scratch.museum.dropped_stream import FaultyEdit
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (a minute and a half on two cores), "gpt2" (needs a network connection and several minutes), or the
# path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 48))  # of each training run
SEARCH_STEPS = 4 * STEPS  # of each search for a prompt

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
# R h are the coordinates of h in the subspace. The brackets contain by how much they are to change, and R^T carries that
# change back into the space of h. Since the rows of R are orthonormal (R R^T = I), the new coordinates are exactly what
# was asked for: R h' = R h + (W h + b - R h) = W h + b. Everything orthogonal to the subspace stays.
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
# The authors edit the first p and the last s tokens of the *prompt*, and write this f7+l7 for p = s = 7. What the
# model writes afterwards is not edited; the edits reach it through the keys and values of the prompt. A prompt ends with
# a line break here. In a batch the texts have different lengths, so there is padding, which may be on either side:
#
#     tokens   pad  pad   A    sad  tale  \n   sad
#     place     -1   -1   0     1    2     3    4
#     first 2              x     x
#     last 2                          x    x

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
# ## A prompt that can be read
#
# The other way to influence a frozen model from outside its weights is the prompt. A soft prompt (unit 05) is found
# easily by gradients, but no text has its rows. PEZ (Wen et al. 2023, arXiv:2302.03668) looks for p real tokens. It keeps
# a soft prompt P beside them, and in each step
#
# $$E_i = \text{the embedding nearest to } P_i \text{ by cosine}, \qquad g = \nabla_E \, \mathrm{loss}(E), \qquad
# P \leftarrow P - \mathrm{update}(g)$$
#
# The loss and its gradient are always those of real tokens, E; but it is P that the optimiser moves. An example with one
# row in the plane: the tokens have the embeddings (1, 0) and (0, 1), and P = (1, 0). Each step with the gradient
# g = (0, -1) and the rate 0.4 adds 0.4 to the second coordinate: P is (1, 0.4), (1, 0.8), (1, 1.2). The nearest token is
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
# Four searches get the same number of forward passes. *PEZ* is your function. *Rounded* trains a soft prompt and takes its
# nearest tokens at the end. *Random* draws eight random tokens each time and keeps the best. *Mutation* changes one
# token of its best prompt at random, and keeps the change if the loss falls. The last two need no gradients.

# %% prediction="readable_prompt"

# %%
search = working("hard_prompt_search")


def pez(seed):
    rows = start(seed).requires_grad_()
    return search(dragon_loss, rows, table, SEARCH_STEPS, torch.optim.AdamW([rows], lr=0.1, weight_decay=0.1))


def rounded(seed):
    rows = start(seed).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.1)
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
