# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 11: How LoRA works
#
# **When you are through, you can**
#
# - say what an update is made of: how large it is, in how many directions, and whether another seed finds the same;
# - measure what it does to the weight, as the LoRA paper did for GPT-3, and say what its numbers depend on;
# - measure what a model has forgotten, and compare two methods *at equal quality*;
# - change alpha or the rank of a training without changing what is learned.
#
# **You need** LoRA (unit 09) and singular values (unit 02). Unit 10 helps.
#
# **Time**: about 90 minutes, two of them computing. 6 exercises, 2 predictions, one open question.
#
# ![Left, the singular values of three updates of one matrix: those of LoRA are few and large, those of full
# fine-tuning many and small. Right, what is forgotten against what is learned, one line for each method: full
# fine-tuning gets furthest, and at equal quality the three are close.](unit_11.png)

# %%
import copy
import os

import numpy as np
import torch
from lora_from_scratch.finetune.tasks import load_dataset
from tqdm import tqdm

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.defaults import learning_rate_for, warmup_steps_for
from lora_from_scratch.finetune.evaluation import text_drawn_from
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.linear_algebra.svd import truncate
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA, LoRALinear, delta_weight, initial_factors
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider

# %%
# The model: "bundled" (two minutes on two cores), or "gpt2" (with a network; about 20 minutes and 6 GB of memory),
# or a checkpoint's directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 32))  # of one training
BATCH = 4

base, tokenizer = load_gpt2(MODEL)
dataset = load_dataset("story-cards")
context = base.config.n_positions
cards = Completions(dataset.train, tokenizer, context)
held_out = Completions(dataset.validation[: 8 * 12 : 8], tokenizer, context).batches(16)
print(f"{base.config.n_layer} blocks of width {base.config.n_embd}; {len(dataset.train):,} story cards to learn from")
print(f"loss of the base model on 12 cards that are never trained on: {completion_loss(base, held_out):.2f}")

# %% [markdown]
# ## What is learned, and what is lost
#
# Unit 10 left three questions. A LoRA of rank 1 and one of rank 64 learn the same task, and the second gets further:
# has it found the first one's direction and some more, or something else altogether? What does the update
# $\Delta W = s B A$ add to W that W did not have? And what does the model lose meanwhile? In this unit you take trained
# updates apart.
#
# Before you train anything, decide what to measure. What is *learned* is easy: the loss on held-out cards. What is
# *lost*? The base model was a good model of tales. Let it write a few texts, and ask the adapted model to predict
# them: where it predicts otherwise, it has moved. With the base model's prediction $p$ over the V tokens of the
# vocabulary and the adapted model's $q$, at one position,
#
# $$ \mathrm{KL}(p \,\|\, q) = \sum_{v=1}^{V} p_v \ln \frac{p_v}{q_v} . $$
#
# It counts what the base model expects and the adapted one has given up. Averaged over text drawn from the base, it
# is how far the two models are apart, in nats per token, and it needs no test set.

# %% exercise="kl_divergence"

# %%
kl = working("kl_divergence")

drawn = text_drawn_from(base, tokenizer, rows=4, tokens=64)
with torch.no_grad():
    base_logits = base(drawn)  # (4, 65, V)


def forgotten(model):
    """The divergence from the base model, mean over the positions of the drawn texts."""
    model.eval()
    with torch.no_grad():
        return float(torch.as_tensor(kl(base_logits, model(drawn))).double().mean())


print("a drawn text begins:", repr(tokenizer.decode(drawn[0, 1:25].tolist())))
print(f"the base model, from itself: {forgotten(base):.3f} nats per token")
print(f"a model that knows nothing:  {torch.as_tensor(kl(base_logits, torch.zeros_like(base_logits))).mean():.3f}")

# %% [markdown]
# The second number is the end of the scale: a model that gives every token the same probability.
#
# ## Nine short runs
#
# Now train, once for the whole unit. Three ways, three seeds each, because one seed proves nothing:
#
# - LoRA of rank 8, and LoRA of rank 64, on q and on v of every block, alpha 64, as in the paper's analysis (Hu et al.
#   2021, section 7);
# - full fine-tuning, where everything is trained and nothing asks for a low rank.
#
# Each has the learning rate that was tuned for its method. A seed draws the order of the cards and the first A. The
# runs are short; unit 10 has longer ones.

# %%
SEEDS = (0, 1, 2)
METHODS = {"LoRA, r = 8": 8, "LoRA, r = 64": 64, "full": 0}
RATES = {name: learning_rate_for("lora" if rank else "full", base.config) for name, rank in METHODS.items()}


def adapted(rank, seed, alpha=64, **options):
    """A copy of the base model with LoRA on q and v of every block; rank 0: to be trained as a whole."""
    model = copy.deepcopy(base)
    if rank:
        LoRA(rank=rank, alpha=alpha, targets=("c_attn.q", "c_attn.v"), seed=100 * rank + seed, **options).adapt(model)
    else:
        FullFineTuning(keep_base=False).adapt(model)
    return model


def train(model, rate, seed, bar, texts=cards, steps=STEPS, measure=None, every=0, **settings):
    """Train on batches of the texts; what was measured on the way, and the losses."""

    def batch_at(step):
        bar.update()
        return texts.batch_at(step, BATCH, seed)

    plan = TrainingSettings(steps=steps, learning_rate=rate, warmup_steps=warmup_steps_for(steps), **settings)
    return Trainer(model, batch_at, plan, progress=False, evaluate=measure, evaluate_every=every).run()


# %% [markdown]
# Of every run you keep the change of q and of v in each block, and for LoRA its A and B. `c_attn` makes q, k and v
# side by side (unit 09), so q is the first third of the rows of $\Delta W$ (3d, d), and v is the last.

# %%
PARTS = ("q", "v")
BLOCKS = range(base.config.n_layer)


def part_of(matrix, part):
    """The rows of q or v of a matrix (3d, d)."""
    return matrix.chunk(3)["qkv".index(part)]


def weight_of(model, block):
    return model.transformer.h[block].attn.c_attn.weight.detach().T  # (3d, d)


def changes_of(model):
    """The change (d, d) of q and v of every block, by part and block."""
    found = {}
    for block in BLOCKS:
        layer = model.transformer.h[block].attn.c_attn
        if isinstance(layer, LoRALinear):
            change = delta_weight(*layer.factors(), layer.scaling).detach()
        else:
            change = weight_of(model, block) - weight_of(base, block)
        found |= {(part, block): part_of(change, part).clone() for part in PARTS}
    return found


def factors_of(model, rank):
    """A (r, d) and the transpose of B (r, d) of q and v of every block; by name, part and block."""
    found = {}
    for block in BLOCKS:
        layer = model.transformer.h[block].attn.c_attn
        both = {"A": layer.lora_A.split(rank), "B": [B.T for B in layer.lora_B.chunk(len(PARTS))]}
        for which, pair in both.items():
            found |= {(which, part, block): M.detach().clone() for part, M in zip(PARTS, pair, strict=True)}
    return found


W = {(part, block): part_of(weight_of(base, block), part) for part in PARTS for block in BLOCKS}


# %%
def spread(values, digits=2):
    """The least to the most."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


start = {"step": 0, "loss": completion_loss(base, held_out), "forgotten": 0.0}
runs = {}


def three_seeds(name):
    """Train a method with each seed, and keep what was measured on the way and what was changed."""
    rank = METHODS[name]
    bar = tqdm(total=len(SEEDS) * STEPS, desc=name, unit="step")
    for seed in SEEDS:
        model = adapted(rank, seed)

        def measure(model=model):
            return {"loss": completion_loss(model, held_out), "forgotten": forgotten(model)}

        history = train(model, RATES[name], seed, bar, measure=measure, every=max(1, STEPS // 4))
        run = {"points": [start, *history.evaluations], "change": changes_of(model)}
        runs[name, seed] = run | ({"factors": factors_of(model, rank)} if rank else {})
    bar.close()
    return model


model = three_seeds("LoRA, r = 8")

# %%
model = three_seeds("LoRA, r = 64")

# %%
full_model = three_seeds("full")

# %%
print(f"before: loss {start['loss']:.2f}, forgotten 0\n{'':<14}held-out loss   forgotten, nats per token")
for name in METHODS:
    last = [runs[name, seed]["points"][-1] for seed in SEEDS]
    print(f"{name:<13} {spread([p['loss'] for p in last])}    {spread([p['forgotten'] for p in last])}")

# %% [markdown]
# ## How large, and in how many directions?
#
# The rank of a LoRA's change is r: no measurement needed. Its size is another matter.

# %% prediction="larger_change"


# %%
def over_blocks(numbers, part):
    """The median over the blocks of numbers that are given by part and block."""
    return float(np.median([float(numbers[part, block]) for block in BLOCKS]))


print("|change of the matrix| in the Frobenius norm, median over the blocks, three seeds")
for part in PARTS:
    print(f"{part}:  the weight itself {over_blocks({place: w.norm() for place, w in W.items()}, part):.2f}")
    for name in METHODS:
        norms = [{place: c.norm() for place, c in runs[name, seed]["change"].items()} for seed in SEEDS]
        print(f"    {name:<13} {spread([over_blocks(each, part) for each in norms])}")

# %% check="larger_change"

# %% [markdown]
# That is worth a second look. LoRA has *learned less* in these steps, and has changed its matrices far more. What
# full fine-tuning does must be spread out, over all the matrices and over many directions. How many? Rank in the
# strict sense of unit 01 does not say: for full fine-tuning it is full, with most of it tiny. A rank that counts a
# weak direction as a part of one:

# %% exercise="effective_rank"

# %%
erank = working("effective_rank")

eranks = {"the weight": {place: erank(w) for place, w in W.items()}}
for name in METHODS:
    eranks[name] = {place: erank(change) for place, change in runs[name, 0]["change"].items()}
print(f"effective rank of the {base.config.n_embd} x {base.config.n_embd} matrices, median over the blocks (seed 0)")
for name, numbers in eranks.items():
    print(f"{name:<13}" + "".join(f"{part:>4} {over_blocks(numbers, part):>5.1f}" for part in PARTS))

# %% [markdown]
# LoRA of rank 8 uses the eight directions that it has. Rank 64 does *not* use its 64: most of them stay weak. And
# full fine-tuning spreads over more directions than that LoRA has at all. Biderman et al. (2024, arXiv:2405.09673,
# abstract) find the same on Llama-2-7B: full fine-tuning learns changes whose rank is 10 to 100 times that of typical
# LoRAs.
#
# So is it the few strong directions that do the work? Take the change of rank 64, keep its first k directions in
# every matrix, and measure the loss.

# %%
RANKS = (0, 1, 2, 4, 8, 16, 64)


def loss_with(changes):
    """The held-out loss of the base model with these changes of q and v."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for (part, block), change in changes.items():
            weight = model.transformer.h[block].attn.c_attn.weight  # (d, 3d)
            weight.T.chunk(3)["qkv".index(part)].add_(change)  # a view: the weight itself changes
    return completion_loss(model, held_out)


change = runs["LoRA, r = 64", 0]["change"]
losses = [loss_with({place: truncate(c, k) for place, c in change.items()}) for k in tqdm(RANKS, desc="cutting")]
gain = losses[0] - losses[-1]
print("directions kept: " + " ".join(f"{k:>6}" for k in RANKS))
print("held-out loss:   " + " ".join(f"{loss:>6.2f}" for loss in losses))
print("of the gain:     " + " ".join(f"{(losses[0] - loss) / gain:>6.0%}" for loss in losses))

# %% [markdown]
# A handful of the 64 directions carries most of what was learned. So a small r *has room* for it, and that is why it
# goes so far. Whether a LoRA that has no more than this room also *finds* it, in the same steps, is another question; in
# unit 10 the larger rank got further.

# %% [markdown]
# ## Does another training find the same directions?
#
# If a task needs certain directions, then every training should find them, whatever its rank and its seed. To test
# that you have to compare *subspaces*: r directions have no order and no signs. With the right singular vectors $V_A$
# (n, i) of one matrix and $V_B$ (n, j) of another, the LoRA paper takes (section 7.2, eq. 4)
#
# $$ \phi(A, B, i, j) = \frac{\lVert V_A^\top V_B \rVert_F^2}{\min(i, j)} \in [0, 1] . $$

# %% exercise="subspace_similarity"

# %% [markdown]
# A number between 0 and 1 is easy to read, and easy to misread. What is a *small* similarity?

# %% prediction="random_overlap"

# %%
similarity = working("subspace_similarity")


def noise(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


print("two random matrices, all of their rows      similarity   max(i, j) / n")
for rows, other, n in ((1, 1, 256), (8, 8, 256), (8, 64, 256), (64, 64, 256), (64, 64, 12288)):
    phi = float(similarity(noise(rows, n, 0), noise(other, n, 1), rows, other))
    print(f"{rows:>2} and {other:>2} directions of {n:>6,} dimensions {phi:>17.3f} {max(rows, other) / n:>15.3f}")

# %% check="random_overlap"

# %% [markdown]
# The paper looks at all sizes at once: a heat map over i and j. With a decomposition for every entry that takes
# forever.

# %% exercise="similarity_grid"

# %% [markdown]
# Compare rank 8 with rank 64; two seeds of rank 64; and two random matrices. The paper does it with A, whose rows say
# which directions of the *input* are read. You can do it with B as well, whose columns say which directions of the
# *output* are written to. All the runs began with different random A, so that nothing but the training can have
# brought them together.

# %%
grid_of = working("similarity_grid")
WIDE = 16


def similarity_maps(place):
    A8, A64, again = (runs[f"LoRA, r = {r}", seed]["factors"][place] for r, seed in ((8, 0), (64, 0), (64, 1)))
    pairs = {
        "rank 8 and rank 64": (A8, A64),
        "rank 64, two seeds": (again, A64),
        "two random matrices": (noise(*A64.shape, 0), noise(*A64.shape, 1)),
    }
    return {name: torch.as_tensor(grid_of(one, other, 8, WIDE)) for name, (one, other) in pairs.items()}


def draw_maps(place):
    figure, panels = plotting.panels(3, width=4.0, height=2.7)
    for axes, (name, grid) in zip(panels, similarity_maps(place).items(), strict=True):
        image = axes.imshow(grid, cmap="Greys", vmin=0, vmax=1, extent=(0.5, WIDE + 0.5, 8.5, 0.5), aspect="auto")
        for i, j in ((1, 1), (4, 4), (8, 8), (8, 16)):
            value = float(grid[i - 1, j - 1])
            side = {1: "left", WIDE: "right"}.get(j, "center")
            x = j + {"left": -0.4, "right": 0.4}.get(side, 0)
            axes.text(x, i, f"{value:.2f}", ha=side, va="center", color="white" if value > 0.5 else "black")
        axes.set_xticks((1, 4, 8, 12, 16))
        plotting.label(axes, x="j, directions of the second", y="i, directions of the first", title=name)
    figure.colorbar(image, ax=panels[-1], label="similarity")
    figure.suptitle("{} of {}, block {}".format(*place), x=0.01, ha="left")
    return figure


slider(
    draw_maps,
    "matrix",
    [
        (f"{which} of {part}, block {block}", (which, part, block))
        for which in "BA"
        for part in PARTS
        for block in BLOCKS
    ],
    ("B", "v", len(BLOCKS) - 1),
    "Three grey heat maps of the similarity of the first i directions of one adapter with the first j of another. In "
    "B, rank 8 against rank 64 and two seeds of rank 64 are far darker than two random matrices, for which all "
    "is almost white.",
)

# %%
pairs = {
    "rank 8, two seeds": [(("LoRA, r = 8", a), ("LoRA, r = 8", b)) for a, b in ((0, 1), (0, 2), (1, 2))],
    "rank 8 and rank 64": [(("LoRA, r = 8", s), ("LoRA, r = 64", s)) for s in SEEDS],
    "rank 64, two seeds": [(("LoRA, r = 64", a), ("LoRA, r = 64", b)) for a, b in ((0, 1), (0, 2), (1, 2))],
}
print("similarity of the first k directions with the first k, mean over q and v of all blocks, three pairs of runs")
print(f"{'':<23}" + "".join(f"{f'k = {k}':>15}" for k in (1, 2, 4, 8)))
for which in "AB":
    for name, chosen in pairs.items():
        means = []
        for one, other in ((runs[a]["factors"], runs[b]["factors"]) for a, b in chosen):
            grids = [torch.as_tensor(grid_of(one[p], other[p], 8, 8)) for p in one if p[0] == which]
            means.append(torch.stack(grids).mean(dim=0).diagonal())  # (8,)
        print(f"{which}: {name:<20}" + "".join(f"{spread([float(m[k - 1]) for m in means]):>15}" for k in (1, 2, 4, 8)))
print(f"{'chance':<23}" + "".join(f"{k / base.config.n_embd:>15.3f}" for k in (1, 2, 4, 8)))

# %% [markdown]
# Read it against the last line. In **B** the trainings that share nothing but the task have found common directions,
# many times more than chance allows, whatever the rank and the seed. B begins at zero: all that is in it has been
# learned. In **A** there is less, for rank 8 hardly more than chance. A begins random, at its full size, and in a
# short run its learned part is small beside that: its subspace is mostly the seed's. Zhu et al. (2024,
# arXiv:2402.16842) draw the conclusion, and train B alone, with a random A, at hardly any loss.
#
# The paper shows A, after a much longer training (figure 3; GPT-3, layer 48 of 96): the first direction of rank 8 and
# of rank 64 have a similarity above 0.5, and the others hardly any. That is its explanation of why r = 1 does so well
# on GPT-3. Here, too, the similarity in A grows with training, from chance; but in runs this short it is B that shows
# it. (Try five times the steps.) Rank 64 finds more of the common directions than rank 8: with 64 random rows there
# is something to begin with near every direction.

# %% [markdown]
# ## What it does to the weight
#
# Does the update repeat what the weight does already, or add something new? Look at W in the update's own directions.
# With $U$ (m, r) and $V$ (n, r), the singular vectors of $\Delta W$,
#
# $$ \frac{\lVert \Delta W \rVert_F}{\lVert U^\top W V \rVert_F} $$
#
# is the **amplification factor** (Hu et al. 2021, section 7.3 and appendix H.4): how much stronger the new is than
# what was there before.

# %% exercise="amplification_factor"

# %%
amplification = working("amplification_factor")


def inside(matrix, of, r):
    """|U^T matrix V|_F, with the r first singular vectors of another matrix."""
    U, _, Vh = torch.linalg.svd(of, full_matrices=False)
    return float((U[:, :r].T @ matrix @ Vh[:r].T).norm())


print("                 |W| in the directions of            |update|   factor")
print("                 the update     W     chance")
print("the paper, q of GPT-3, layer 48 (table 7)")
print("r = 4                  0.32    21.67    0.02              6.91     21.5")
print("r = 64                 1.90    37.71    0.33              3.57      1.9")
for part in PARTS:
    print(f"here, {part}, median over the blocks (seed 0)")
    for r in (8, 64):
        change = runs[f"LoRA, r = {r}", 0]["change"]
        columns = (
            {p: inside(W[p], c, r) for p, c in change.items()},
            {p: inside(w, w, r) for p, w in W.items()},
            {p: r / base.config.n_embd * w.norm() for p, w in W.items()},
            {p: c.norm() for p, c in change.items()},
            {p: amplification(W[p], c, r) for p, c in change.items()},
        )
        medians = [over_blocks(numbers, part) for numbers in columns]
        print("r = {:<16} {:>6.2f} {:>8.2f} {:>7.2f} {:>17.2f} {:>8.1f}".format(r, *medians))

# %% [markdown]
# (Chance: of random $U$ and $V$, $\lVert U^\top W V \rVert_F$ is about $r \lVert W \rVert_F / \sqrt{mn}$.)
#
# Three statements of the paper, held against this:
#
# 1. *The update has a stronger correlation with W than a random matrix.* Here too, but not by much: the first column is
#    above the third. In the paper it is many times as large.
# 2. *It does not repeat the top directions of W; it takes directions that W does not emphasise.* Here too, clearly: the
#    first column is far below the second.
# 3. *The amplification is large, and far smaller for r = 64 than for a small r.* Here too, and of the same order.
#
# Is the factor a discovery about *adaptation*, then? Put full fine-tuning to the same test. It solves the same
# task, and better.

# %%
print("amplification factor in the first 8 directions, median over the blocks, three seeds")
for name in ("LoRA, r = 8", "full"):
    factors = [{p: amplification(W[p], c, 8) for p, c in runs[name, seed]["change"].items()} for seed in SEEDS]
    print(f"{name:<12}" + "".join(f"   {part}: {spread([over_blocks(f, part) for f in factors])}" for part in PARTS))

# %% [markdown]
# Full fine-tuning amplifies *nothing*: its strongest directions stay weaker than what W had there. So a large factor
# is not what a task needs. It is what a task takes when it has to be done in a few directions of a few matrices: LoRA
# shouts in eight directions, full fine-tuning whispers everywhere. Shuttleworth et al. (2024, arXiv:2410.21228) look
# at the same difference in large models, and find in LoRA's weights strong new singular vectors that full fine-tuning
# does not make ("intruder dimensions").
#
# Our steps are large (the rate was tuned for this small model), and the size of the update goes straight into the
# factor: the paper's update is a ninth of its weight, ours more than a third.

# %% [markdown]
# ## Rank and overfitting
#
# Few directions, so little room to memorise: a small rank is often praised as a guard against overfitting. Give each
# method twelve cards, show them again and again, and compare the loss on these twelve with that on others.

# %%
FEW = 12
few = Completions(dataset.train[:FEW], tokenizer, context)
memorised = few.batches(FEW)
few_runs = {"LoRA, r = 1": 1, "LoRA, r = 64": 64, "full": 0}
bar = tqdm(total=len(few_runs) * STEPS, desc="twelve cards", unit="step")
print(f"{'':<14}{'after':>8} {'these cards':>12} {'other cards':>12} {'gap':>6}")
for name, rank in few_runs.items():
    model = adapted(rank, 0)

    def both(model=model):
        return {"these": completion_loss(model, memorised), "others": completion_loss(model, held_out)}

    rate = RATES["LoRA, r = 8" if rank else "full"]
    history = train(model, rate, 0, bar, texts=few, measure=both, every=max(1, STEPS // 2))
    for point in history.evaluations:
        these, others = point["these"], point["others"]
        print(f"{name:<14}{point['step']:>8} {these:>12.2f} {others:>12.2f} {others - these:>6.2f}")
bar.close()

# %% [markdown]
# The larger the room, the better the twelve cards are known, and the wider the gap. That much is as expected. But
# look at the *other* cards: the method with the widest gap has the lowest loss there. Rank 1 does not generalise
# better; it has learned less of everything. In these steps a small rank is no guard; it is a brake. A brake helps
# when one trains for too long: it takes the small rank longer to get to where the loss on other cards turns round.
# (One seed; try five times the steps.)

# %% [markdown]
# ## Learning less, forgetting less?
#
# "LoRA learns less and forgets less" is the title of Biderman et al. (2024). Your nine runs have the points to check
# it: how much is learned *and* how much is forgotten, four times on the way.

# %% figure="unit_11.png"
figure, (left, right) = plotting.panels(2, width=5.2, height=3.7)
place = ("v", len(BLOCKS) // 2)
for style, name in enumerate(METHODS):
    colour, line = plotting.COLOURS[style], plotting.LINES[style]
    values = torch.linalg.svdvals(runs[name, 0]["change"][place])
    values = values[: METHODS[name] or len(values)]
    left.semilogy(range(1, len(values) + 1), values, linestyle=line, color=colour, linewidth=1.8)
    at = {"LoRA, r = 8": 7, "LoRA, r = 64": 20, "full": len(values) // 3}[name]
    left.annotate(
        name, (at + 1, values[at]), xytext=(6, 8), textcoords="offset points", color=colour, fontweight="bold"
    )
    for seed in SEEDS:
        points = runs[name, seed]["points"]
        xs, ys = [p["loss"] for p in points], [p["forgotten"] for p in points]
        right.plot(xs, ys, marker="os^"[style], markersize=4, linestyle=line, color=colour, linewidth=1)
    last = runs[name, 0]["points"][-1]
    top = max(runs[name, seed]["points"][-1]["forgotten"] for seed in SEEDS)
    right.annotate(
        name,
        (last["loss"], top),
        xytext=(0, 10 if name != "LoRA, r = 64" else -44),
        textcoords="offset points",
        color=colour,
        fontweight="bold",
        ha="center",
    )
left.set_ylim(top=3 * float(runs["LoRA, r = 8", 0]["change"][place].norm()))
right.invert_xaxis()
right.set_ylim(0, 1.2 * max(p["forgotten"] for run in runs.values() for p in run["points"]))
plotting.label(left, x="singular value", y="its size", title=f"The change of {place[0]}, block {place[1]}: few or many")
plotting.label(
    right, x="held-out loss (nats per token); right is better", y="forgotten (nats per token)", title="What it costs"
)
show(
    figure,
    "Left, the singular values of the change of one matrix on a scale of powers: LoRA of rank 8 has eight large ones, "
    "rank 64 sixty-four that fall off, full fine-tuning as many as the matrix is wide, all of them smaller. Right, the "
    "divergence from the base model against the held-out loss, from the base model on the left: three lines "
    "for each method. Full fine-tuning gets furthest to the right; where lines stand above each other, LoRA's are not "
    "lower than those of full fine-tuning.",
)

# %% [markdown]
# After the same steps LoRA has learned less: so far the title holds. But whoever learns less and forgets less may
# simply have *done* less; stop full fine-tuning early, and it has done less too. The question is what is forgotten
# **at equal quality**. Take the worst loss that one of the nine runs ends with. All the others have passed it on
# their way; what had they forgotten by then?


# %%
def forgotten_at(points, loss):
    """What was forgotten when the held-out loss was this, in a straight line between two measurements."""
    down = sorted(points, key=lambda point: point["loss"])
    return float(np.interp(loss, [p["loss"] for p in down], [p["forgotten"] for p in down]))


level = max(run["points"][-1]["loss"] for run in runs.values())
print(f"forgotten when the held-out loss is {level:.2f}, and at the end; three seeds")
for name in METHODS:
    mine = [runs[name, seed]["points"] for seed in SEEDS]
    print(
        f"{name:<13} {spread([forgotten_at(p, level) for p in mine])}   at the end "
        f"{spread([p[-1]['forgotten'] for p in mine])}"
    )

# %% [markdown]
# At equal quality most of LoRA's advantage is gone: rank 64 has forgotten a little less than full fine-tuning, hardly
# by more than another seed changes, and rank 8, which has to push its few directions hardest, as much or more. In
# longer runs it is the other way round: `benchmarks/forgetting.md` has both methods at their tuned rates, trained to
# the same BLEU, with three seeds, and LoRA is the one that is further from the base model.
#
# Does that contradict the paper? Less than it seems. Its own curve of learning against forgetting (section "The
# learning-forgetting tradeoff") puts LoRA and full fine-tuning on about the same line in several cases, at different
# places: LoRA learned less there. Where it found LoRA clearly better, the base was Llama-2-7B, the rate was lower by
# orders of magnitude, and training went on for up to billions of tokens. What you may conclude from either: **which
# method forgets less is not a property of its rank. It depends on how far you go, and with what steps.** Compare at
# equal quality, and show the curve.

# %% [markdown]
# ## Alpha, rank and learning rate
#
# All that was measured so far hangs on three numbers that somebody chose. Are they three knobs, or fewer?
#
# $\Delta W = \frac{\alpha}{r} B A$. A larger alpha makes the change larger at once. A larger learning rate makes A
# and B grow faster. Under Adam these are *the same knob*, if the start is scaled along. By how much?

# %% exercise="exchange_alpha"

# %% [markdown]
# Put it to the test on GPT-2, for a few steps: alpha 64; alpha 16, exchanged by your function; and alpha 16 with
# nothing else changed. No clipping and no weight decay, which both would notice the difference.

# %%
exchange = working("exchange_alpha")
SHORT = max(2, STEPS // 5)
exact = {"schedule": "constant", "clip_norm": 0.0, "weight_decay": 0.0}
rate = RATES["LoRA, r = 8"]

exchanged, new_rate = adapted(8, 0, alpha=16), rate
for block in exchanged.transformer.h:
    layer = block.attn.c_attn
    A, B, new_rate = exchange(layer.lora_A.detach(), layer.lora_B.detach(), 64, rate, 16)
    with torch.no_grad():
        layer.lora_A.copy_(torch.as_tensor(A))
        layer.lora_B.copy_(torch.as_tensor(B))

bar = tqdm(total=3 * SHORT, desc="two alphas", unit="step")
print(f"loss of the batch at each of {SHORT} steps")
for name, model, its_rate in (
    ("alpha 64", adapted(8, 0), rate),
    ("alpha 16, exchanged", exchanged, float(new_rate)),
    ("alpha 16", adapted(8, 0, alpha=16), rate),
):
    losses = train(model, its_rate, 0, bar, steps=SHORT, **exact).losses
    print(f"{name:<20} learning rate {its_rate:.4f}: " + " ".join(f"{loss:.3f}" for loss in losses))
bar.close()

# %% [markdown]
# The first two lines are one training, written down twice. So a sweep over alpha *and* the learning rate mostly
# measures one thing twice. The paper sets alpha once and tunes the rate (section 4.1); do the same.
#
# And the rank? The scaling decides whether a rate that is right for one rank is right for another. A small problem
# shows it: fit a matrix of 64 by 64, whose singular values fall like 1/k, by $s B A$, with Adam at many rates. Move
# the slider over the three scalings of unit 09.

# %%
rates = torch.logspace(-3.5, 0, 13)
SCALINGS = {"alpha / r": lambda r: 8 / r, "alpha / sqrt(r)": lambda r: 8 / r**0.5, "alpha": lambda r: 8.0}


def fit(r, scaling, n=64, steps=60):
    """What is left of the target after Adam, for every rate at once."""
    target = torch.linalg.qr(noise(n, n, 0))[0] / torch.arange(1, n + 1) @ torch.linalg.qr(noise(n, n, 1))[0]
    A = ((2 * torch.rand(r, n, generator=torch.Generator().manual_seed(2)) - 1) / n**0.5).repeat(len(rates), 1, 1)
    pair = [A, torch.zeros(len(rates), n, r)]
    m, v = [0, 0], [0, 0]
    for t in range(1, steps + 1):
        A, B = pair
        G = scaling * B @ A - target  # (rates, n, n): the gradient of half the squared error
        for k, g in enumerate((scaling * B.mT @ G, scaling * G @ A.mT)):
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            step = m[k] / (1 - 0.9**t) / ((v[k] / (1 - 0.999**t)).sqrt() + 1e-12)
            pair[k] = pair[k] - (rates * (1 - (t - 1) / steps))[:, None, None] * step
    return ((scaling * pair[1] @ pair[0] - target).square().sum((1, 2)) / target.square().sum()).tolist()


fits = {name: {r: fit(r, scale(r)) for r in (1, 4, 16, 64)} for name, scale in SCALINGS.items()}


lowest = min(min(left_over) for by_rank in fits.values() for left_over in by_rank.values())


def draw_rates(name):
    figure, (axes,) = plotting.panels(1, width=6.5, height=3.4)
    for style, (r, left_over) in enumerate(fits[name].items()):
        axes.plot(rates, left_over, linestyle=plotting.LINES[style], color=plotting.COLOURS[style], linewidth=1.8)
        best = min(range(len(rates)), key=left_over.__getitem__)
        axes.plot(rates[best], left_over[best], "o", color=plotting.COLOURS[style])
        axes.annotate(
            f"r = {r}",
            (rates[best], left_over[best]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=plotting.COLOURS[style],
            fontweight="bold",
        )
    axes.set(xscale="log", yscale="log", ylim=(lowest / 2, 2))
    plotting.label(
        axes, x="learning rate", y="share of the target that is left", title=f"s = {name}; dots: the best rate"
    )
    return figure


print("rates that come within 0.05 of the best of their rank")
for name, by_rank in fits.items():
    good = {
        r: [float(rate) for rate, rest in zip(rates, left_over, strict=True) if rest < min(left_over) + 0.05]
        for r, left_over in by_rank.items()
    }
    print(f"s = {name:<16}" + "   ".join(f"r = {r}: {good[r][0]:.4f} to {good[r][-1]:.3f}" for r in good))
slider(
    draw_rates,
    "scaling",
    list(SCALINGS),
    "alpha",
    "What is left of the target over the learning rate, one curve for each rank, falling to a valley and rising again. "
    "With s = alpha the valley moves to the left as the rank grows; with the other two it hardly does.",
)

# %% [markdown]
# With s = alpha the good rates move to the left as the rank grows, both ends of them, by a factor of four and more
# from r = 1 to r = 64: whoever tries a larger rank at the old rate finds that "larger ranks are worse". With alpha /
# r they stay, or move a little to the right. With alpha / sqrt(r) (rsLoRA), between the two, the *best* rate is about
# the same for all the ranks of this problem: the dots hardly move. Its own argument is about the trained LoRA
# (Kalajdzievski 2023, arXiv:2312.03732, section 3): for large ranks alpha / r makes what LoRA adds to the *outputs*
# too small, and the larger rank is not used. You have seen a trace of it: of its 64 directions rank 64 hardly used
# half, and its change was smaller than that of rank 8. Does more scaling help it? Take the alpha with which both
# rules agree at r = 8.

# %%
bar = tqdm(total=STEPS, desc="rsLoRA", unit="step")
model = adapted(64, 0, alpha=64 / 8**0.5, rslora=True)
train(model, RATES["LoRA, r = 64"], 0, bar)
bar.close()
changed = changes_of(model)
print("rank 64, q and v together, median over the blocks")
for name, change, loss in (
    ("alpha / r, s = 1", runs["LoRA, r = 64", 0]["change"], runs["LoRA, r = 64", 0]["points"][-1]["loss"]),
    ("alpha / sqrt(r), s = 2.8", changed, completion_loss(model, held_out)),
):
    size, directions = (float(np.median([float(f(c)) for c in change.values()])) for f in (torch.norm, erank))
    print(f"{name:<25} |change| {size:.2f}, effective rank {directions:.1f}, held-out loss {loss:.3f}")
print(f"(three seeds with alpha / r: {spread([runs['LoRA, r = 64', s]['points'][-1]['loss'] for s in SEEDS], 3)})")

# %% [markdown]
# More scaling makes the change larger and spreads it over more of the directions, and these few steps learn more with
# it. That is one seed and one rate, though, and a larger rate would have done something of the kind. Whether the
# larger *scaling* is better you can say only after tuning the rate for each; you now know that they are the same
# knob.

# %% [markdown]
# ## What goes wrong in practice
#
# **Two adapters that have learned nothing are "similar".** Give rank 8 and rank 64 the same seed, as scripts do, and
# compare them before the first step.

# %%
d = base.config.n_embd
A8, A64, other = (
    initial_factors(d, d, r, torch.Generator().manual_seed(seed))[0] for r, seed in ((8, 0), (64, 0), (64, 1))
)
print(f"untrained, one seed:      similarity {float(similarity(A8, A64, 8, 64)):.2f}")
print(f"untrained, another seed:  similarity {float(similarity(A8, other, 8, 64)):.2f}")

# %% [markdown]
# The random numbers come row by row, so the A of rank 8 *is* the top of the A of rank 64, and its subspace lies in
# the other. Training moves A only a little; such a similarity stays, and says nothing of the task.
#
# **Directions that are not there.** A change of rank 8 is a matrix of d by d, and a decomposition of it returns d
# directions. The ninth is rounding. Does it look different from the eighth? Not to the eye; so it has to be refused.

# %%
change = runs["LoRA, r = 8", 0]["change"]["v", 0]
try:
    print(similarity(change, change, 9, 9))
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# **An update recovered from two checkpoints.** If you have only the merged weight, $W_0 + \Delta W$, you can subtract
# $W_0$. But both were rounded, often to bfloat16, and the rounding has every rank there is.

# %%
place = ("v", len(BLOCKS) // 2)
change = runs["LoRA, r = 8", 0]["change"][place]
for scale in (1, 0.1, 0.01):
    rounded = (W[place] + scale * change).bfloat16().float() - W[place].bfloat16().float()
    print(
        f"the change times {scale:<5g} effective rank {float(erank(scale * change)):>5.1f}, "
        f"recovered from bfloat16: {float(erank(rounded)):>5.1f}"
    )

# %% [markdown]
# For a change as large as ours the error is small; for one as small as that of most fine-tuning the noise is all you
# see.
#
# **Forgetting, measured at the wrong place or in the wrong direction.** On the cards the model is *meant* to differ
# from the base. And with p and q exchanged, what the model no longer says hardly counts.

# %%
task = held_out[0].input_ids[:6, :48]
with torch.no_grad():
    on_tales, on_task = full_model(drawn), (base(task), full_model(task))
for name, value in {
    "base to model, on text of the base": kl(base_logits, on_tales),
    "model to base, on text of the base": kl(on_tales, base_logits),
    "base to model, on the cards": kl(*on_task),
}.items():
    print(f"{name:<36} {float(torch.as_tensor(value).mean()):.2f} nats per token")

# %% [markdown]
# ## Summary
#
# - Low-rank is not small: LoRA's change is larger than that of full fine-tuning, in far fewer directions.
# - Trainings with different seeds and ranks find common directions, far above chance; of 64 directions few do the work.
# - The update amplifies what W does not emphasise, as in the paper; the factor measures LoRA's narrowness, too.
# - A small rank learns less; at *equal quality* little is left of what it spared. Compare curves, not end points.
# - Under Adam, alpha and the learning rate are one knob; alpha / r keeps the good rates about the same for all ranks.
#
# ## Go further
#
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 7, and appendices G and H for the subspaces.
# - Biderman et al. 2024, *LoRA learns less and forgets less* (arXiv:2405.09673): the sections on the tradeoff and on
#   the rank of full fine-tuning.
# - Kalajdzievski 2023, *A rank stabilization scaling factor for fine-tuning with LoRA* (arXiv:2312.03732): section 3.
# - Shuttleworth et al. 2024, *LoRA vs full fine-tuning: an illusion of equivalence* (arXiv:2410.21228).
# - Zhu et al. 2024, *Asymmetry in low-rank adapters of foundation models* (arXiv:2402.16842): A reads, B writes, and a
#   random A that is never trained does almost as well.
# - Roy and Vetterli 2007, *The effective rank: a measure of effective dimensionality*.
#
# You know now what the two thin matrices do. In memory they are next to nothing, and so are their gradients. What
# fills the memory is the weight beside them, which is frozen, and only ever read. Must a number that nobody changes
# have all of its 16 or 32 bits? That is unit 12.

# %% [markdown] open_question="equal_quality" points=4
# **Open question.** A blog post says: "LoRA protects the model's knowledge: after one epoch with r = 8 our model had
# lost 1 point on the old benchmark, and after one epoch of full fine-tuning 4 points." Write at most 150 words: what
# does this comparison leave open, what would you measure to decide it, and which result would convince you that LoRA
# does protect?
#
# **Rubric.**
#
# - 1 point: says that the two may not be of equal quality on the new task: LoRA may have done less of everything.
# - 1 point: names another choice that decides the outcome: learning rate (tuned for each?), alpha, rank, one seed.
# - 1 point: proposes a curve of forgetting against learning, or a comparison at equal quality, with several seeds.
# - 1 point: says which outcome would convince: at the same quality on the new task LoRA's loss on the old one is
#   smaller by more than the spread of the seeds.

# %% volatile=true
progress("11")
