# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 11: How LoRA works
#
# **By the end of this unit you can**
#
# - describe an update: how large it is, how many directions it uses, and whether another seed finds the same
#   directions;
# - measure what the update does to the weight, as the LoRA paper did for GPT-3, and say what the numbers depend on;
# - measure what a model has forgotten, and compare two methods *at equal quality*;
# - change the alpha of a training run without changing what is learned, and say how rank and learning rate interact.
#
# **Prerequisites**: LoRA (unit 09) and singular values (unit 02). Unit 10 helps.
#
# **Time**: about 90 minutes, including 2 minutes of computation. 6 exercises, 2 predictions, one open question.
#
# ![What three methods have forgotten against what they have learned in the same steps, three lines per method: LoRA of
# rank 8, LoRA of rank 64 and full fine-tuning. Which method forgets least at equal quality?](unit_11.png)

# %%
import copy
import os

import numpy as np
import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.defaults import learning_rate_for, warmup_steps_for
from lora_from_scratch.finetune.evaluation import text_drawn_from
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.linear_algebra.svd import truncate
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA, LoRALinear, delta_weight, initial_factors
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show, slider
from lora_from_scratch.support.progress_bar import tqdm

# %%
# The model: "bundled" (two minutes on two cores), "gpt2" (needs a network connection, about 20 minutes and 6 GB of
# memory), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 32))  # per training run
BATCH = 4

base, tokenizer = load_gpt2(MODEL)
dataset = load_dataset("story-cards")
context = base.config.n_positions
cards = Completions(dataset.train, tokenizer, context)
held_out = Completions(dataset.validation[: 8 * 12 : 8], tokenizer, context).batches(16)
print(f"{base.config.n_layer} blocks of width {base.config.n_embd}; {len(dataset.train):,} story cards for training")
print(f"loss of the base model on 12 held-out cards: {completion_loss(base, held_out):.2f}")

# %% [markdown]
# ## What is learned, and what is lost
#
# Unit 10 left three questions. A LoRA of rank 1 and one of rank 64 learn the same task, and the second gets further:
# did it find the direction that rank 1 found and some more, or something else altogether? What does the update $\Delta
# W = s B A$ add to W that W did not have? And what does the model lose meanwhile? In this unit you analyse trained
# updates.
#
# Before you train anything, decide what to measure. What is *learned* is easy to measure: the loss on held-out cards.
# What is *lost*? The base model was a good model of tales. Let it generate a few texts, and let the adapted model
# predict their tokens: where its predictions differ from the base model's, it has changed. With the base model's
# prediction $p$ over the V tokens of the vocabulary and the adapted model's $q$, at one position,
#
# $$ \mathrm{KL}(p \,\|\, q) = \sum_{v=1}^{V} p_v \ln \frac{p_v}{q_v} . $$
#
# It is large where the adapted model has become unlikely to predict what the base model expects. Averaged over text
# drawn from the base, it measures how far apart the two models are, in nats per token, and it needs no test set.

# %% exercise="kl_divergence"

# %%
kl = working("kl_divergence")

drawn = text_drawn_from(base, tokenizer, rows=4, tokens=64)
with torch.no_grad():
    base_logits = base(drawn)  # (4, 65, V)


def forgotten(model):
    """Divergence from the base model, averaged over the positions of the drawn texts."""
    model.eval()
    with torch.no_grad():
        return float(torch.as_tensor(kl(base_logits, model(drawn))).double().mean())


print("a generated text begins:", repr(tokenizer.decode(drawn[0, 1:25].tolist())))
print(f"base model, from itself: {forgotten(base):.3f} nats per token")
print(f"uniform prediction:       {torch.as_tensor(kl(base_logits, torch.zeros_like(base_logits))).mean():.3f}")

# %% [markdown]
# The second number gives you a scale: it belongs to a model that gives every token the same probability.
#
# ## Nine short runs
#
# Now train the models for the whole unit. There are three methods with three seeds each, because one seed proves
# nothing:
#
# - LoRA of rank 8, and LoRA of rank 64, on q and v of every block, with alpha 64, as in the paper's analysis (Hu et al.
#   2021, section 7);
# - full fine-tuning, which trains everything and does not restrict the rank.
#
# Each method uses the learning rate that was tuned for it. The seed determines the order of the cards and the initial
# A. The runs are short.

# %%
SEEDS = (0, 1, 2)
METHODS = {"LoRA, r = 8": 8, "LoRA, r = 64": 64, "full": 0}
RATES = {name: learning_rate_for("lora" if rank else "full", base.config) for name, rank in METHODS.items()}


def adapted(rank, seed, alpha=64, **options):
    """A copy of the base model with LoRA on q and v of every block; rank 0 for full fine-tuning."""
    model = copy.deepcopy(base)
    if rank:
        LoRA(rank=rank, alpha=alpha, targets=("c_attn.q", "c_attn.v"), seed=100 * rank + seed, **options).adapt(model)
    else:
        FullFineTuning(keep_base=False).adapt(model)
    return model


def train(model, rate, seed, bar, texts=cards, steps=STEPS, measure=None, every=0, **settings):
    """Train on batches of the texts; return the losses and the evaluations made during training."""

    def batch_at(step):
        bar.update()
        return texts.batch_at(step, BATCH, seed)

    plan = TrainingSettings(steps=steps, learning_rate=rate, warmup_steps=warmup_steps_for(steps), **settings)
    return Trainer(model, batch_at, plan, progress=False, evaluate=measure, evaluate_every=every).run()


# %% [markdown]
# From every run, keep the change of q and v in each block, and for LoRA its A and B. `c_attn` computes q, k and v side
# by side (unit 09), so q is the first third of the rows of $\Delta W$ (3d, d), and v is the last third.

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
    """The minimum and the maximum, as text."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


start = {"step": 0, "loss": completion_loss(base, held_out), "forgotten": 0.0}
runs = {}


def three_seeds(name):
    """Train a method with each seed; record the evaluations and the changes."""
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
# The rank of a LoRA's change is r, so there is no need to measure it. Its size is a different question.

# %% prediction="larger_change"


# %%
def over_blocks(numbers, part):
    """The median over the blocks of values given by part and block."""
    return float(np.median([float(numbers[part, block]) for block in BLOCKS]))


print("|change of the matrix| in the Frobenius norm, median over the blocks, three seeds")
for part in PARTS:
    print(f"{part}:  weight itself {over_blocks({place: w.norm() for place, w in W.items()}, part):.2f}")
    for name in METHODS:
        norms = [{place: c.norm() for place, c in runs[name, seed]["change"].items()} for seed in SEEDS]
        print(f"    {name:<13} {spread([over_blocks(each, part) for each in norms])}")

# %% check="larger_change"

# %% [markdown]
# LoRA has *learned less* in these steps, and yet it has changed its matrices far more. So the change made by full
# fine-tuning must be spread out, over all the matrices and over many directions. How many? The strict rank of unit 01
# does not tell you: the change has full rank, but most of its singular values are tiny. You need a rank that counts a
# weak direction as a fraction of one:

# %% exercise="effective_rank"

# %%
erank = working("effective_rank")

eranks = {"the weight": {place: erank(w) for place, w in W.items()}}
for name in METHODS:
    eranks[name] = {place: erank(change) for place, change in runs[name, 0]["change"].items()}
print(f"effective rank of the {base.config.n_embd} x {base.config.n_embd} matrices, median over the blocks (seed 0)")
for name, numbers in eranks.items():
    print(f"{name:<13}" + "".join(f"{part:>4} {over_blocks(numbers, part):>5.1f}" for part in PARTS))

# %%
figure, (axes,) = plotting.panels(1, width=6.5, height=3.4)
place = ("v", len(BLOCKS) // 2)
for style, name in enumerate(METHODS):
    colour, line = plotting.COLOURS[style], plotting.LINES[style]
    values = torch.linalg.svdvals(runs[name, 0]["change"][place])
    values = values[: METHODS[name] or len(values)]
    axes.semilogy(range(1, len(values) + 1), values, linestyle=line, color=colour, linewidth=1.8)
    at = {"LoRA, r = 8": 7, "LoRA, r = 64": 20, "full": len(values) // 3}[name]
    axes.annotate(
        name, (at + 1, values[at]), xytext=(6, 8), textcoords="offset points", color=colour, fontweight="bold"
    )
axes.set_ylim(top=3 * float(runs["LoRA, r = 8", 0]["change"][place].norm()))
plotting.label(
    axes, x="number of the singular value", y="singular value", title=f"The change of {place[0]}, block {place[1]}"
)
show(
    figure,
    "The singular values of the change of one matrix on a logarithmic axis: LoRA of rank 8 has eight large ones, rank "
    "64 has sixty-four that fall off, full fine-tuning has as many as the matrix is wide, all of them smaller.",
)

# %% [markdown]
# LoRA of rank 8 uses most of its eight directions. Rank 64 does *not* use its 64: most of them remain weak. Full
# fine-tuning spreads over more directions than either LoRA has. Biderman et al. (2024, arXiv:2405.09673, abstract) find
# the same on Llama-2-7B: full fine-tuning learns changes whose rank is 10 to 100 times that of typical LoRAs.
#
# Do the few strong directions do the work, then? Take the change of rank 64, keep only its first k directions in every
# matrix, and measure the loss.

# %%
RANKS = (0, 1, 2, 4, 8, 16, 64)


def loss_with(changes):
    """The held-out loss of the base model with these changes added to q and v."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for (part, block), change in changes.items():
            weight = model.transformer.h[block].attn.c_attn.weight  # (d, 3d)
            weight.T.chunk(3)["qkv".index(part)].add_(change)  # a view, so this changes the weight itself
    return completion_loss(model, held_out)


change = runs["LoRA, r = 64", 0]["change"]
losses = [loss_with({place: truncate(c, k) for place, c in change.items()}) for k in tqdm(RANKS, desc="cutting")]
gain = losses[0] - losses[-1]
print("directions kept: " + " ".join(f"{k:>6}" for k in RANKS))
print("held-out loss:   " + " ".join(f"{loss:>6.2f}" for loss in losses))
print("share of gain:   " + " ".join(f"{(losses[0] - loss) / gain:>6.0%}" for loss in losses))

# %% [markdown]
# A handful of the 64 directions carries most of what was learned. So a small r *has room* for most of it, which is why
# a small r gets so far. Whether a LoRA with only that much room also *finds* these directions in the same number of
# steps is a separate question; in unit 10 the larger rank got further.

# %% [markdown]
# ## Does another run find the same directions?
#
# If a task requires certain directions, then every run should find them, whatever its rank and seed. To test this you
# have to compare *subspaces*, because r directions have no fixed order and no fixed signs. With the right singular
# vectors $V_A$ (n, i) of one matrix and $V_B$ (n, j) of another, the LoRA paper uses (section 7.2, eq. 4)
#
# $$ \phi(A, B, i, j) = \frac{\lVert V_A^\top V_B \rVert_F^2}{\min(i, j)} \in [0, 1] . $$

# %% [markdown]
# An example by hand, with n = 3. The directions of A are (1, 0, 0) and (0, 1, 0); those of B are (0, 1, 0) and
# (0.6, 0, 0.8). The entries of $V_A^\top V_B$ are the scalar products of each direction of A with each of B:
#
# $$ V_A^\top V_B = \begin{pmatrix} 0 & 0.6 \\ 1 & 0 \end{pmatrix}. $$
#
# - One direction of each: $\phi = 0$, although the first direction of B is the second of A.
# - Two of A and one of B: $\phi = (0^2 + 1^2) / 1 = 1$, because B's direction lies in the plane of the two of A.
# - Two of each: $\phi = (0.6^2 + 1^2) / 2 = 0.68$.

# %% exercise="subspace_similarity"

# %% [markdown]
# A number between 0 and 1 is easy to read, and easy to misread. Which values count as *small*?

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
# The paper looks at all sizes at once, with a heat map over i and j. Computing a decomposition for every entry would be
# very slow.

# %% exercise="similarity_grid"

# %% [markdown]
# Compare rank 8 with rank 64, two seeds of rank 64, and two random matrices. The paper does this for A, whose rows say
# which directions of the *input* are read. You can do it for B as well, whose columns say which directions of the
# *output* are written. All the runs started with different random A, so only training can have brought them closer
# together.

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
    "B, rank 8 against rank 64 and two seeds of rank 64 are far darker than two random matrices, whose map is almost "
    "white.",
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
# Compare each line with the last one. In **B**, runs that share nothing but the task have found common directions, many
# times more than by chance, whatever the rank and the seed. B starts at zero, so all of it is learned. In **A** the
# similarity is lower, and for rank 8 hardly more than chance. A starts random, at its full size, and in a short run the
# learned part is small in comparison: its subspace is mostly determined by the seed. Zhu et al. (2024,
# arXiv:2402.16842) conclude that B alone can be trained, with a random A, with hardly any loss in quality.
#
# The paper shows A, after a much longer training run (figure 3; GPT-3, layer 48 of 96): the first directions of rank 8
# and rank 64 have a similarity above 0.5, and the others hardly any. This is its explanation of why r = 1 does so well
# on GPT-3. Here, too, the similarity in A grows with training, starting from chance; but in runs this short, B shows it
# better. (Try five times the steps.) Rank 64 finds more of the common directions than rank 8: with 64 random rows, some
# are close to any direction.

# %% [markdown]
# ## What it does to the weight
#
# Does the update repeat what the weight already does, or add something new? Look at W in the update's own directions.
# With $U$ (m, r) and $V$ (n, r), the singular vectors of $\Delta W$,
#
# $$ \frac{\lVert \Delta W \rVert_F}{\lVert U^\top W V \rVert_F} $$
#
# is the **amplification factor** (Hu et al. 2021, section 7.3 and appendix H.4): how much stronger the update is than
# what W had in these directions before.

# %% exercise="amplification_factor"

# %%
amplification = working("amplification_factor")


def inside(matrix, of, r):
    """|U^T matrix V|_F, with the first r singular vectors of another matrix."""
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
# (Chance means: for random $U$ and $V$, $\lVert U^\top W V \rVert_F$ is about $r \lVert W \rVert_F / \sqrt{mn}$.)
#
# Compare this with three statements of the paper:
#
# 1. *The update has a stronger correlation with W than a random matrix.* This holds here too, but only slightly: the
#    first column is above the third. In the paper it is many times as large.
# 2. *It does not repeat the top directions of W; it uses directions that W does not emphasise.* This clearly holds here
#    too: the first column is far below the second.
# 3. *The amplification is large, and far smaller for r = 64 than for a small r.* This holds here too, with factors of
#    the same order.
#
# So does the factor tell you something about *adaptation*? Apply the same test to full fine-tuning, which solves the
# same task, and better.

# %%
print("amplification factor in the first 8 directions, median over the blocks, three seeds")
for name in ("LoRA, r = 8", "full"):
    factors = [{p: amplification(W[p], c, 8) for p, c in runs[name, seed]["change"].items()} for seed in SEEDS]
    print(f"{name:<12}" + "".join(f"   {part}: {spread([over_blocks(f, part) for f in factors])}" for part in PARTS))

# %% [markdown]
# Full fine-tuning does *not* amplify: its strongest directions remain weaker than what W had there. So a task does not
# need a large factor. The factor is large when the task has to be solved in a few directions of a few matrices: LoRA
# makes large changes in eight directions, full fine-tuning small ones everywhere. Shuttleworth et al. (2024,
# arXiv:2410.21228) study the same difference in large models, and find strong new singular vectors in LoRA's weights
# that full fine-tuning does not create ("intruder dimensions").
#
# Our steps are large (the rate was tuned for this small model), and the factor is proportional to the size of the
# update: the paper's update is a ninth of its weight, ours more than a third.

# %% [markdown]
# ## Rank and overfitting
#
# A small rank has few directions and so little room to memorise, and is often recommended against overfitting. Give
# each method twelve cards, show them many times, and compare the loss on these twelve with the loss on others.

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
# The larger the rank, the better the twelve cards are memorised, and the wider the gap. That is as expected. But look
# at the *other* cards: the method with the widest gap has the lowest loss on them. Rank 1 does not generalise better;
# it has learned less of everything. In these steps a small rank does not prevent overfitting; it slows training down.
# That helps if you train for too long, because a small rank takes longer to reach the point where the loss on other
# cards starts to rise. (One seed; try five times the steps.)

# %% [markdown]
# ## Learning less, forgetting less?
#
# "LoRA learns less and forgets less" is the title of Biderman et al. (2024). Your nine runs contain the data to check
# it: how much was learned *and* how much was forgotten, measured four times during each run.

# %% figure="unit_11.png"
figure, (axes,) = plotting.panels(1, width=6.5, height=3.7)
for style, name in enumerate(METHODS):
    colour, line = plotting.COLOURS[style], plotting.LINES[style]
    for seed in SEEDS:
        points = runs[name, seed]["points"]
        xs, ys = [p["loss"] for p in points], [p["forgotten"] for p in points]
        axes.plot(xs, ys, marker="os^"[style], markersize=4, linestyle=line, color=colour, linewidth=1)
    last = runs[name, 0]["points"][-1]
    top = max(runs[name, seed]["points"][-1]["forgotten"] for seed in SEEDS)
    axes.annotate(
        name,
        (last["loss"], top),
        xytext=(0, 10 if name != "LoRA, r = 64" else -44),
        textcoords="offset points",
        color=colour,
        fontweight="bold",
        ha="center",
    )
axes.invert_xaxis()
axes.set_ylim(0, 1.2 * max(p["forgotten"] for run in runs.values() for p in run["points"]))
plotting.label(
    axes,
    x="held-out loss (nats per token); right is better",
    y="forgotten (nats per token)",
    title="Which method forgets least at equal quality?",
)
show(
    figure,
    "The divergence from the base model against the held-out loss, starting at the base model on the left: three "
    "lines for each method. At the end: "
    + "; ".join(
        f"{name}, held-out loss {spread([runs[name, seed]['points'][-1]['loss'] for seed in SEEDS])}, forgotten "
        f"{spread([runs[name, seed]['points'][-1]['forgotten'] for seed in SEEDS])}"
        for name in METHODS
    )
    + ".",
)

# %% [markdown]
# After the same number of steps, LoRA has learned less and forgotten less: so far the title holds. But a method that
# learns less and forgets less may simply have *changed* less; the same is true of full fine-tuning that is stopped
# early. The question is what is forgotten **at equal quality**. Take the worst of the nine final losses. All the other
# runs passed this loss on their way; what had they forgotten by then?


# %%
def forgotten_at(points, loss):
    """What was forgotten at this held-out loss, interpolated linearly between measurements."""
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
# more than the spread between seeds, and rank 8, which has to use its few directions most, as much or more. In longer
# runs it is the reverse: `benchmarks/forgetting.md` has both methods at their tuned rates, trained to the same BLEU,
# with three seeds, and LoRA is further from the base model.
#
# Does that contradict the paper? Less than it seems. The paper's own curve of learning against forgetting (section "The
# learning-forgetting tradeoff") puts LoRA and full fine-tuning on about the same line in several cases, at different
# places: LoRA learned less there. Where it found LoRA clearly better, the base was Llama-2-7B, the rate was lower by
# orders of magnitude, and training went on for up to billions of tokens. What you may conclude from either: **which
# method forgets less is not a property of its rank. It depends on how far you train, and with what steps.** Compare at
# equal quality, and show the curve.

# %% [markdown]
# ## Alpha, rank and learning rate
#
# All the measurements so far depend on three hyperparameters: alpha, rank and learning rate. Are they independent?
#
# $\Delta W = \frac{\alpha}{r} B A$. A larger alpha makes the change larger at once. A larger learning rate makes A and
# B grow faster. With Adam these are *the same hyperparameter*, provided that the initial A and B are scaled
# accordingly. By how much?

# %% [markdown]
# A case to test your answer on, with pencil and paper. Let r = 1 and all matrices be 1 x 1, with A = 0.5, B = 0.2,
# alpha = 4 and the learning rate 0.1. Then $\Delta W = 4 \cdot 0.2 \cdot 0.5 = 0.4$. The first step of Adam moves every
# entry by the learning rate (unit 04). Suppose that both gradients are negative: A becomes 0.6 and B becomes 0.3, so
# $\Delta W = 4 \cdot 0.3 \cdot 0.6 = 0.72$.
#
# Now let alpha be 1. If you multiply only A by 4, the start is right, $1 \cdot 0.2 \cdot 2 = 0.4$, but after the step
# $\Delta W$ is $1 \cdot 0.3 \cdot 2.1 = 0.63$. With the right A, B and learning rate it is 0.4 and then 0.72.

# %% exercise="exchange_alpha"

# %% [markdown]
# Test it on GPT-2 for a few steps: alpha 64; alpha 16, converted by your function; and alpha 16 with nothing else
# changed. There is no gradient clipping and no weight decay, because both depend on the scale of A and B.

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

bar = tqdm(total=3 * SHORT, desc="two values of alpha", unit="step")
print(f"batch loss at each of {SHORT} steps")
for name, model, its_rate in (
    ("alpha 64", adapted(8, 0), rate),
    ("alpha 16, converted", exchanged, float(new_rate)),
    ("alpha 16", adapted(8, 0, alpha=16), rate),
):
    losses = train(model, its_rate, 0, bar, steps=SHORT, **exact).losses
    print(f"{name:<20} learning rate {its_rate:.4f}: " + " ".join(f"{loss:.3f}" for loss in losses))
bar.close()

# %% [markdown]
# The first two lines are the same training run, up to rounding. So a sweep over alpha *and* the learning rate mostly
# measures the same thing twice. The paper sets alpha once and tunes the rate (section 4.1); do the same.
#
# What about the rank? The scaling decides whether a learning rate that is right for one rank is right for another. A
# small problem shows this: fit a matrix of 64 x 64, whose singular values decrease like 1/k, with $s B A$, using Adam
# at many learning rates. Move the slider over the three scalings of unit 09.

# %%
rates = torch.logspace(-3.5, 0, 13)
SCALINGS = {"alpha / r": lambda r: 8 / r, "alpha / sqrt(r)": lambda r: 8 / r**0.5, "alpha": lambda r: 8.0}


def fit(r, scaling, n=64, steps=60, rates=rates, seed=0):
    """The share of the target that is left after training with Adam, for every rate at once."""
    left, right = (torch.linalg.qr(noise(n, n, 3 * seed + k))[0] for k in (0, 1))
    target = left / torch.arange(1, n + 1) @ right
    draw = torch.Generator().manual_seed(3 * seed + 2)
    A = ((2 * torch.rand(r, n, generator=draw) - 1) / n**0.5).repeat(len(rates), 1, 1)
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
    plotting.label(axes, x="learning rate", y="share of the target that is left", title=f"s = {name}; dots: best rate")
    return figure


print("rates within 0.05 of the best result of their rank")
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
    "What is left of the target against the learning rate, one curve per rank, falling to a minimum and rising again. "
    "With s = alpha the minimum moves to the left as the rank grows; with the other two it hardly moves.",
)

# %% [markdown]
# With s = alpha the good rates move to the left as the rank grows, by a factor of four and more from r = 1 to r = 64:
# if you try a larger rank at the old rate, you will find that "larger ranks are worse". With alpha / r they stay, or
# move a little to the right. With alpha / sqrt(r) (rsLoRA), between the two, the *best* rate is about the same for all
# the ranks of this problem: the dots hardly move. rsLoRA's own argument concerns the trained LoRA (Kalajdzievski 2023,
# arXiv:2312.03732, section 3): for large ranks, alpha / r makes LoRA's contribution to the *outputs* too small, and the
# larger rank is not used. You have seen signs of this: rank 64 used less than half of its 64 directions, and its change
# was smaller than that of rank 8. Does a larger scaling help? Take the alpha for which both rules agree at r = 8.

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
# A larger scaling makes the change larger and spreads it over more directions, and the loss is lower after these few
# steps. That is one seed and one rate, though, and a larger learning rate would have had a similar effect. To say
# whether the larger *scaling* is better, you would have to tune the rate for each; you now know that scaling and rate
# are the same hyperparameter.
#
# ## Your own scaling
#
# Suppose that a rate is chosen once and then used for every rank. Which scaling makes the most of that one rate? In the
# small problem from above, take r = 1, 4, 16 and 64, find the rate at which the geometric mean of what they leave is
# smallest, and compare this mean with that of alpha / sqrt(r). (A geometric mean counts a factor of two the same at
# every rank.) Your scaling may be any function of r, but it has to be 8 at r = 1, like the others, so that they differ
# in nothing but how they depend on the rank. The one below decreases more slowly than alpha / sqrt(r). Change
# `my_scaling`, write down whether you expect to win, and run the cell. It fits a different target for each of three
# seeds, at 29 rates: only a scaling that wins with all three is better.


# %%
def my_scaling(r):
    """The factor s of B A at rank r, 8 at rank 1. Change this line."""
    return 8 / r**0.25


def left_at_one_rate(scaling, seed):
    """The geometric mean of what the four ranks leave at the best rate for all of them, and this rate."""
    many = torch.logspace(-3.5, 0, 29)
    left_over = torch.tensor([fit(r, scaling(r), rates=many, seed=seed) for r in (1, 4, 16, 64)])  # (ranks, rates)
    means = left_over.log().mean(dim=0).exp().nan_to_num(float("inf"))
    return float(means.min()), float(many[means.argmin()])


def compare_with_the_square_root(scaling):
    """Fit three targets with your scaling and with alpha / sqrt(r), and say which leaves less at one rate."""
    usual, ranks = SCALINGS["alpha / sqrt(r)"], (1, 4, 16, 64)
    if not all(scaling(r) > 0 for r in ranks):
        return "A scaling has to be positive at every rank."
    if abs(scaling(1) - 8) > 1e-6:
        return f"At r = 1 the scaling has to be 8, as for the other rules; yours is {scaling(1):g}."
    if all(abs(scaling(r) - usual(r)) < 1e-6 for r in ranks):
        return "That is alpha / sqrt(r) itself: change `my_scaling`."
    gains = []
    for seed in range(3):
        (before, usual_rate), (after, rate) = left_at_one_rate(usual, seed), left_at_one_rate(scaling, seed)
        print(f"seed {seed}: alpha / sqrt(r) leaves {before:.4f} at the rate {usual_rate:.3f}, ", end="")
        print(f"your scaling {after:.4f} at {rate:.3f}")
        gains.append(before - after)
    better, worse = min(gains) > 0, max(gains) < 0
    return "Your scaling wins." if better else "Your scaling loses." if worse else "Undecided: the seeds disagree."


print(compare_with_the_square_root(my_scaling))

# %% [markdown]
# There are scalings that beat alpha / sqrt(r) with all three seeds. Go back to the slider and look at the dots of
# r = 4, 16 and 64. With s = alpha the dot of r = 64 is far to the left of the other two. Are all three at the same rate
# with alpha / sqrt(r)? Look for a scaling with which they are. If yours wins by a few per cent only, ask what that is
# worth: neighbouring rates of this sweep differ by a third, and it is one small problem.

# %% [markdown]
# ## What goes wrong in practice
#
# **Untrained adapters can look similar.** Give rank 8 and rank 64 the same seed, as scripts often do, and compare them
# before the first step.

# %%
d = base.config.n_embd
A8, A64, other = (
    initial_factors(d, d, r, torch.Generator().manual_seed(seed))[0] for r, seed in ((8, 0), (64, 0), (64, 1))
)
print(f"untrained, same seed:       similarity {float(similarity(A8, A64, 8, 64)):.2f}")
print(f"untrained, different seeds: similarity {float(similarity(A8, other, 8, 64)):.2f}")

# %% [markdown]
# The random numbers are drawn row by row, so the A of rank 8 equals the first rows of the A of rank 64, and its
# subspace is contained in the other. Training moves A only a little, so this similarity remains, and says nothing about
# the task.
#
# **Directions that do not exist.** A change of rank 8 is a d x d matrix, and a decomposition of it returns d
# directions. The ninth is rounding error, although it looks no different from the eighth; so the function raises an
# error.

# %%
change = runs["LoRA, r = 8", 0]["change"]["v", 0]
try:
    print(similarity(change, change, 9, 9))
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# **An update recovered from two checkpoints.** If you have only the merged weight, $W_0 + \Delta W$, you can subtract
# $W_0$. But both were rounded, often to bfloat16, and rounding errors have full rank.

# %%
place = ("v", len(BLOCKS) // 2)
change = runs["LoRA, r = 8", 0]["change"][place]
for scale in (1, 0.1, 0.01):
    rounded = (W[place] + scale * change).bfloat16().float() - W[place].bfloat16().float()
    print(
        f"change times {scale:<5g} effective rank {float(erank(scale * change)):>5.1f}, "
        f"recovered from bfloat16: {float(erank(rounded)):>5.1f}"
    )

# %% [markdown]
# For a change as large as ours the error is small; for one as small as in most fine-tuning, you see only the noise.
#
# **Forgetting measured on the wrong text or in the wrong direction.** On the cards, the model is *meant* to differ from
# the base. And with p and q exchanged, tokens that the model no longer predicts hardly count.

# %%
task = held_out[0].input_ids[:6, :48]
with torch.no_grad():
    on_tales, on_task = full_model(drawn), (base(task), full_model(task))
for name, value in {
    "base to model, on the base's text": kl(base_logits, on_tales),
    "model to base, on the base's text": kl(on_tales, base_logits),
    "base to model, on the cards": kl(*on_task),
}.items():
    print(f"{name:<36} {float(torch.as_tensor(value).mean()):.2f} nats per token")

# %% [markdown]
# ## Summary
#
# - Low rank does not mean small: LoRA's change is larger than that of full fine-tuning, in far fewer directions.
# - Runs with different seeds and ranks find common directions, far above chance; a few of 64 directions do most of the
#   work.
# - The update amplifies what W does not emphasise, as in the paper; the factor also reflects how few directions LoRA
#   has.
# - A small rank learns less; at *equal quality* little of its advantage in forgetting is left. Compare curves, not end
#   points.
# - With Adam, alpha and the learning rate are one hyperparameter; alpha / r keeps the good rates about the same for all
#   ranks.
#
# ## Go further
#
# - Hu et al. 2021, *LoRA* (arXiv:2106.09685): section 7, and appendices G and H for the subspaces.
# - Biderman et al. 2024, *LoRA learns less and forgets less* (arXiv:2405.09673): the sections on the tradeoff and on
#   the rank of full fine-tuning.
# - Kalajdzievski 2023, *A rank stabilization scaling factor for fine-tuning with LoRA* (arXiv:2312.03732): section 3.
# - Shuttleworth et al. 2024, *LoRA vs full fine-tuning: an illusion of equivalence* (arXiv:2410.21228).
# - Zhu et al. 2024, *Asymmetry in low-rank adapters of foundation models* (arXiv:2402.16842): A reads, B writes, and a
#   random A that is never trained works almost as well.
# - Roy and Vetterli 2007, *The effective rank: a measure of effective dimensionality*.
#
# You now know what the two thin matrices do. They take almost no memory, and neither do their gradients. What fills the
# memory is the frozen weight, which is only ever read. Does a number that never changes need all of its 16 or 32 bits?
# That is unit 12.

# %% [markdown] open_question="equal_quality" points=4
# **Open question.** A blog post says: "LoRA protects the model's knowledge: after one epoch with r = 8 our model had
# lost 1 point on the old benchmark, and after one epoch of full fine-tuning 4 points." Write at most 150 words: what
# does this comparison leave open, what would you measure to decide the question, and which result would convince you
# that LoRA does protect the model's knowledge?
#
# **Rubric.**
#
# - 1 point: says that the two models may not be of equal quality on the new task: LoRA may have done less of
#   everything.
# - 1 point: names another choice that affects the outcome: learning rate (was it tuned for each?), alpha, rank, a
#   single seed.
# - 1 point: proposes a curve of forgetting against learning, or a comparison at equal quality, with several seeds.
# - 1 point: says which outcome would convince: at the same quality on the new task, LoRA's loss on the old task is
#   smaller by more than the spread over the seeds.

# %% volatile=true
progress("11")
