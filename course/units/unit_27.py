# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Unit 27: Rewards instead of references
#
# **By the end of this unit you can**
#
# - write a reward that a program computes, and look for what it does not measure;
# - train a language model on it: a policy gradient with a group baseline, as in GRPO;
# - estimate from samples how far a model has moved from its base;
# - compare LoRA of rank 1 and 8 with full fine-tuning on a reward, and say what each pays for it.
#
# **Prerequisites**: the next-token loss and sampling (unit 03), LoRA (units 09 and 10), and forgetting (unit 11). It is an
# elective: no other unit needs it.
#
# **Time**: about 75 minutes, including one and a half minutes of computation. 5 exercises, 2 predictions, one open
# question.
#
# ![The rewards of eight texts for each of eight prompts, as circles on one line per prompt, with a black mark at the mean
# of each group. The means differ between the prompts, and within each group the rewards spread on both sides of the
# mean.](unit_27.png)

# %%
import copy
import os
import re

import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.finetune.metrics import kl_divergence
from lora_from_scratch.finetune.rewards import (
    OTHER_PROMPTS,
    PROMPTS,
    RewardSettings,
    read_texts,
    score_on_rewards,
    train_on_rewards,
)
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.support import plotting
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.progress_bar import tqdm

# The model: "bundled" (one and a half minutes on two cores), "gpt2" (needs a network connection and much more time, and
# learning rates of its own), or the path of a checkpoint directory.
MODEL = os.environ.get("LORA_FROM_SCRATCH_MODEL", "bundled")
STEPS = int(os.environ.get("LORA_FROM_SCRATCH_STEPS", 12))  # of each training run

# %% [markdown]
# ## A reward
#
# So far, every task came with references: texts that the model learned to reproduce. Often there are none, but you can
# tell whether a text is good: the program passes its tests, the sum is right, the format is kept. A function that
# computes this is a *verifiable reward*. The model writes a text, the function gives it a number, and what was rewarded
# becomes more likely.
#
# The reward of this unit is a game: write without the letter e, the most frequent one in English.

# %% exercise="without_letter"

# %%
reward = working("without_letter")

model, tokenizer = load_gpt2(MODEL)
GROUP = 8  # texts per prompt


def written_by(one, prompts, seed):
    """GROUP sampled continuations of each prompt: the ids of the prompts, and those of the texts."""
    ids = [tokenizer.encode(prompt) for prompt in prompts for _ in range(GROUP)]
    return ids, generate(one, ids, max_new_tokens=24, temperature=1.0, eos_id=tokenizer.eos_id, seed=seed)


ids, texts = written_by(model, PROMPTS, seed=0)
rewards = torch.tensor([reward(tokenizer.decode(text)) for text in texts]).view(-1, GROUP)
for i in range(0, 12, 4):
    print(f"{rewards.flatten()[i]:.2f}  {PROMPTS[i // GROUP]}|{tokenizer.decode(texts[i])!r}")
print(f"mean of {len(texts)} texts: {rewards.mean():.2f}")

# %% [markdown]
# ## Better than the others of its group
#
# The function counts words, so it has no gradient. The gradient comes from the probabilities. Let x be a prompt, y a
# text that the model p samples for it, and r(y) its reward. The mean reward has the gradient (Williams 1992)
#
# $$\nabla \, \mathbb{E}_{y \sim p}\,[r(y)] = \sum_y r(y) \, \nabla p(y \mid x)
# = \mathbb{E}_{y \sim p}\,[r(y) \, \nabla \ln p(y \mid x)]$$
#
# because $\nabla p = p \, \nabla \ln p$. So sample some texts, and make each more likely in proportion to its reward. As
# it stands, *every* text with a positive reward becomes more likely, the bad ones only less so. The expectation does not
# change if a constant b is subtracted from the reward, since $\mathbb{E}\,[\nabla \ln p] = \nabla \sum_y p(y \mid x) = 0$.
# With b as the mean reward, only the texts that are better than usual become more likely.
#
# GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1) takes this mean over a group of G texts for the same prompt, and
# also divides by the standard deviation of the group. The result is called the *advantage* of a text. (With the text's own
# reward in b the estimate, before the division, is no longer exactly unbiased: it is too small by the factor (G - 1) / G.)
#
# An example: four texts have the rewards 0.5, 0.5, 1 and 0. Their mean is 0.5, so the advantages are 0, 0, 0.5 and -0.5.
# The mean of their squares is 0.125 and its root 0.354; divided by it, the advantages are 0, 0, 1.41 and -1.41.
#
# If all texts of a group have the same reward, there is nothing to learn from it. What does your function return then?
# Try eight rewards of 0.7: in float32 their mean need not be exactly 0.7.

# %% exercise="group_advantages"

# %% figure="unit_27.png"
advantages_of = working("group_advantages")

advantages = advantages_of(rewards)
figure, (axes,) = plotting.panels(1, width=7, height=4)
for row, group in enumerate(rewards.tolist()):
    axes.plot(group, [row] * GROUP, "o", color=plotting.COLOURS[0], fillstyle="none")
    axes.plot(sum(group) / GROUP, row, "|", color="black", markersize=20, markeredgewidth=2.5)
axes.set_yticks(range(len(PROMPTS)), PROMPTS)
axes.invert_yaxis()
plotting.label(axes, x="reward (share of words without e)", title="Each text is compared with the mean of its group")
show(
    figure,
    "The rewards of eight texts for each of eight prompts, as circles on one line per prompt, with a black mark at the mean "
    "of each group. The means differ between the prompts, and within each group the rewards spread on both sides of the "
    "mean.",
)

# %% [markdown]
# ## The probability of a text
#
# The gradient needs $\ln p(y \mid x) = \sum_t \ln p(y_t \mid x, y_{<t})$, with a gradient. Generation works without
# gradients, so the model reads prompt and text once more, all rows in one batch. `read_texts` does this; it pads the rows
# on the right. What remains is to pick out the right numbers. For a prompt of two tokens and a text of two:
#
# | place | 0 | 1 | 2 | 3 | 4 |
# |---|---|---|---|---|---|
# | token | prompt | prompt | text | text | padding |
# | predicted by the logits at | - | 0 | 1 | 2 | 3 |
# | counts | - | no | yes | yes | no |
#
# Here `begin` is 2 and `end` is 4. The result has a column for each of the places 1 to 4.

# %% exercise="token_log_probabilities"

# %%
log_probabilities_of = working("token_log_probabilities")

with torch.no_grad():
    logits, read, begin, end = read_texts(model, ids[:GROUP], texts[:GROUP])
    chosen = log_probabilities_of(logits, read, begin, end)
lengths = end - begin
print(f"tokens of the texts: {lengths.tolist()}")
print("ln p per token:     ", " ".join(f"{value:.2f}" for value in (chosen.sum(dim=1) / lengths).tolist()))

# %% [markdown]
# ## The loss
#
# Now put them together. With the advantages $A_i$ and the lengths $L_i$ of N texts,
#
# $$\text{loss} = - \frac{1}{N} \sum_i \frac{A_i}{L_i} \sum_t \ln p(y_{i,t} \mid x_i, y_{i,<t})$$
#
# The length is a choice. With the text's own length (GRPO), each *text* weighs the same, so a token of a long bad text is
# punished less than one of a short bad text, and bad texts tend to become longer. With the same number for all
# texts, each *token* weighs the same (Liu et al. 2025, arXiv:2503.20783, section 3). In this unit nearly all texts have 24
# tokens, and the library uses the second.
#
# GRPO's loss also contains the ratio of the new to the old probability, clipped, for several steps on the same texts. In
# the first step the ratio is 1, and the gradient is that of the loss above. We take one step for each batch. And it adds a
# penalty for moving away from the base, which is left out here, but measured below.

# %% exercise="policy_gradient_loss"

# %% [markdown]
# One step by hand, for the first prompt and with a LoRA of rank 1. Do the texts with positive advantages become more
# likely?

# %%
loss_of = working("policy_gradient_loss")

tuned = copy.deepcopy(model)
method = LoRA(rank=1, alpha=8, seed=0)
method.adapt(tuned)
optimizer = torch.optim.AdamW(method.trainable(tuned).values(), lr=3e-3, weight_decay=0.0)


def log_probabilities(one):
    return log_probabilities_of(*read_texts(one, ids[:GROUP], texts[:GROUP]))


before = log_probabilities(tuned)
loss = loss_of(before, advantages[0], lengths)
loss.backward()
optimizer.step()
with torch.no_grad():
    after = log_probabilities(tuned)
print("advantage   change of ln p, in nats")
for place in advantages[0].argsort(descending=True).tolist():
    print(f"{advantages[0, place]:>9.2f} {(after - before).sum(dim=1)[place]:>16.3f}")

# %% [markdown]
# ## How far from the base?
#
# Unit 11 measured what a model forgets by the divergence from its base. Here you want KL(p || base), where p is the
# trained model: how different the texts are that it now writes. You have samples of p, with the probabilities of each
# token under both models. The mean of $k_1 = \ln (p / \text{base})$ over samples estimates the divergence, but each token
# with $p < \text{base}$ contributes a negative number. Schulman's $k_3$ adds something whose expectation is zero,
#
# $$k_3 = \underbrace{\ln \frac{p}{\text{base}}}_{k_1} + \left( \frac{\text{base}}{p} - 1 \right), \qquad
# \mathbb{E}_p \left[ \frac{\text{base}}{p} \right] = \sum_v p_v \frac{\text{base}_v}{p_v} = 1$$
#
# and is never negative, since $e^d \geq 1 + d$ with $d = \ln (\text{base} / p)$. An example: for p = 1/2 and base = 1/4,
# k1 is 0.69 and k3 is 0.5 - 1 + 0.69 = 0.19. For p = 1/4 and base = 1/2, k1 is -0.69 and k3 is 2 - 1 - 0.69 = 0.31.

# %% exercise="sampled_divergence"

# %%
divergence_of = working("sampled_divergence")


def estimates(one, seed=5):
    """On texts that a model writes: the exact divergence over the vocabulary, and k1 and k3 of each token."""
    own_ids, own_texts = written_by(one, OTHER_PROMPTS, seed)
    with torch.no_grad():
        logits, read, begin, end = read_texts(one, own_ids, own_texts)
        base_logits = read_texts(model, own_ids, own_texts)[0]
        log_p, log_base = (log_probabilities_of(each, read, begin, end) for each in (logits, base_logits))
        place = torch.arange(1, read.shape[1])  # of the token that each column belongs to
        in_text = (begin[:, None] <= place) & (place < end[:, None])  # (N, T - 1)
        exact = kl_divergence(logits, base_logits)[:, :-1][in_text]
    k1 = (log_p - log_base)[in_text]
    k3 = (-k1).exp() - 1 + k1
    print(f"exact {exact.mean():.4f}")
    print(
        f"k1    {k1.mean():.4f}, standard deviation {k1.std():.4f}, {(k1 < 0).float().mean():.0%} of the tokens below 0"
    )
    print(f"k3    {divergence_of(log_p, log_base, end - begin):.4f}, standard deviation {k3.std():.4f}")


estimates(tuned)

# %% [markdown]
# The step has made all texts with a positive advantage more likely. Those log-probabilities are sums over the 24 tokens of
# texts that it has learned from; per token, and on new texts for other prompts, the model is still close to its base. k3 is near the exact
# value. k1 is farther off: its standard deviation is about twelve times as large, so for the same precision it would need
# over a hundred times as many tokens.
#
# ## Is one rank enough?
#
# Now train. Each run has 12 steps, each with 16 texts: 2 prompts, groups of 8. That is 192 texts in all.
# The reward is then measured on new texts for prompts that were not used in training.
#
# LoRA of rank 1, LoRA of rank 8 (both with alpha / r = 8) and full fine-tuning each get their own learning rate, from five
# that range from too small to too large: the smallest one whose reward, as a mean of three seeds, is within 0.02 of the method's best. It is at an
# end of the range for none of them (`python -m benchmarks.rewards`).

# %%
METHODS = {
    "LoRA, rank 1": (lambda seed: LoRA(rank=1, alpha=8, seed=seed), 1e-2),
    "LoRA, rank 8": (lambda seed: LoRA(rank=8, alpha=64, seed=seed), 3e-3),
    "full": (lambda seed: FullFineTuning(keep_base=False), 1e-3),
}
base_scores = score_on_rewards(model, model, tokenizer, reward)
print(f"the base: reward {base_scores.reward:.2f}, perplexity of the tales {base_scores.perplexity:.0f}")
for name, (make, rate) in METHODS.items():
    method, tuned = make(0), copy.deepcopy(model)
    method.adapt(tuned)
    print(f"{name}: {sum(p.numel() for p in method.trainable(tuned).values()):,} numbers are trained, rate {rate:g}")

# %% prediction="one_rank"

# %% prediction="price"


# %%
def trained(method, rate, reward, seed):
    """A copy of the model, trained on a reward, and the mean reward of each step."""
    tuned = copy.deepcopy(model)
    method.adapt(tuned)
    settings = RewardSettings(steps=STEPS, learning_rate=rate, prompts=2, precision="fp32", seed=seed)
    history = train_on_rewards(tuned, tokenizer, method, reward, settings, progress=False)
    return tuned, history.rewards


histories, scores, models = {}, {}, {}
for name, seed in tqdm([(name, seed) for name in METHODS for seed in (0, 1)], desc="training", unit="run"):
    make, rate = METHODS[name]
    models[name], histories[name, seed] = trained(make(seed), rate, reward, seed)
    scores[name, seed] = score_on_rewards(models[name], model, tokenizer, reward)

print("                      reward   KL(model || base)   perplexity of the tales")
print(f"{'the base':<20} {base_scores.reward:>7.2f} {0:>19.2f} {base_scores.perplexity:>25,.0f}")
for (name, seed), one in scores.items():
    print(f"{name + f', seed {seed}':<20} {one.reward:>7.2f} {one.divergence:>19.2f} {one.perplexity:>25,.0f}")

# %% check="one_rank"

# %% check="price"

# %%
figure, panels = plotting.panels(3, width=3.2, height=3)
for axes, (name, (_, rate)) in zip(panels, METHODS.items(), strict=True):
    for seed in (0, 1):
        axes.plot(range(1, STEPS + 1), histories[name, seed], linestyle=plotting.LINES[seed], color="black")
    axes.set_xticks(range(2, STEPS + 1, 2))
    axes.set_ylim(0, 1.05)
    plotting.label(axes, x="step", y="mean reward of 16 texts", title=f"{name}, rate {rate:g}")
show(
    figure,
    "Three panels with the mean reward against the step, two seeds each. "
    + ". ".join(
        f"{name}, seed {seed}: from {steps[0]:.2f} to {steps[-1]:.2f}, with {max(steps):.2f} as the highest and "
        f"{min(steps):.2f} as the lowest value"
        for (name, seed), steps in histories.items()
    )
    + ".",
)

# %% [markdown]
# (The solid line is seed 0, the dashed one seed 1.) Rank 1 climbs steadily. Full fine-tuning is faster at its rate, but one
# of its two runs falls to 0.03 on the way and recovers. Now read what the models write.

# %%
for name, seed in scores:
    print(f"{name + f', seed {seed}':<21} {scores[name, seed].texts[13][:85]!r}")

# %% [markdown]
# This is *reward hacking*. The share of words without an e is nearly 1, and no sentence is left. Nothing in the reward says
# that the words should make sense, and repeating a few short ones is the easiest way to please it.
#
# So does one rank suffice? "LoRA Without Regret" (Schulman et al., Thinking Machines 2025) reports that reinforcement
# learning works at rank 1, and explains it by information: an episode with one reward teaches about one bit, so 192 texts
# teach a few hundred bits, and a LoRA of rank 1 has 24,576 numbers to store them in. The runs above agree. With a
# third seed the means are 1.00 for rank 1, 0.96 for rank 8 and 0.99 for full fine-tuning, with standard deviations of up to
# 0.05 (`benchmarks/rewards.md`). But this is an easy test. To make a few tokens more likely everywhere, one direction in
# each matrix is plenty. The runs say nothing about rewards for which a model has to learn something new.
#
# The price is the same for all three, too: at these rates each model ends several nats per token from its base. At a third
# of the rate less is lost and less is learned. In the benchmark, full fine-tuning at 3e-4 reaches 0.86 with a perplexity of
# about 120; rank 1 at 3e-3 reaches 0.66 with about 45, and rank 8 at 1e-3 0.69 with about 50. No run of
# the benchmark has a reward above 0.95 and keeps its language.
#
# ## What the reward misses
#
# Mend the reward. The texts repeat themselves, so let a word count only if it is new: multiply by the share of distinct
# words. What will the model do to please this one? Make a guess before you run the cell.


# %%
def distinct(text):
    """The share of different words among the words of a text."""
    words = re.findall("[a-z]+", text.lower())
    return len(set(words)) / len(words) if words else 0.0


def expected_by_base(text):
    """ln p per token that the base gives to the text, without its prompt: -3 to -5 for its own texts."""
    tokens = tokenizer.encode(text)
    if not tokens:
        return -10.0
    with torch.no_grad():
        every = log_probabilities_of(*read_texts(model, [[tokenizer.eos_id]], [tokens]))
    return float(every.sum()) / len(tokens)


def my_reward(text):
    """Your reward. Change this line."""
    return reward(text) * distinct(text)


make, rate = METHODS["LoRA, rank 1"]
mine = score_on_rewards(trained(make(0), rate, my_reward, 0)[0], model, tokenizer, reward)
table = {"the base": base_scores, "the first reward": scores["LoRA, rank 1", 0], "my_reward": mine}
print("                   without e   distinct words   KL(model || base)   perplexity of the tales")
for name, one in table.items():
    different = sum(map(distinct, one.texts)) / len(one.texts)
    print(f"{name:<18} {one.reward:>9.2f} {different:>16.2f} {one.divergence:>19.2f} {one.perplexity:>25,.0f}")
for text in mine.texts[::16]:
    print(repr(text[:100]))

# %% [markdown]
# With this reward the model gives up words. A text with one word, or a few, among many commas has no repetition, and its
# words have no e.
#
# ### Your own reward
#
# Change `my_reward`, so that the model writes texts of which at least 0.7 of the words lack an e, with at least 0.75
# distinct words, while the perplexity of the tales stays below 100. Say first how a model could please your reward without
# doing what you want. Three ideas: count only texts with enough words; use `expected_by_base`, the part of a penalty
# for the divergence that comes from the base (alone, it also favours monotonous texts); or a smaller learning rate, the
# `rate` above. The teaching notes have a reward that reaches all three.

# %%
reached = {
    "without e": mine.reward >= 0.7,
    "distinct words": sum(map(distinct, mine.texts)) / len(mine.texts) >= 0.75,
    "perplexity": mine.perplexity < 100,
}
print(", ".join(f"{name}: {'reached' if yes else 'not reached'}" for name, yes in reached.items()))

# %% [markdown]
# ## What goes wrong in practice
#
# **Logits that are not shifted.** Nothing fails, but these are the log-probabilities of other tokens. Compare with the loss
# that you expect of the model, here about 4 nats per token; a uniform guess has 8.3.

# %%
with torch.no_grad():
    every = logits.log_softmax(dim=-1)
    own_place = every.gather(-1, read[..., None]).squeeze(-1)[:, 1:][chosen != 0]
print(f"ln p per token: shifted {chosen[chosen != 0].mean():.2f}, not shifted {own_place.mean():.2f}")

# %% [markdown]
# **No baseline.** A reward is its advantage plus the mean of its group. If every text is weighted by the mean alone, there
# is nothing to learn, and the expectation of the gradient is close to zero. On a sample it is not. Compare the lengths of
# the gradients for a LoRA of rank 1 on the 64 texts from above: without a baseline, the part from the means is five times
# as long as the part that compares the texts.

# %%
tuned = copy.deepcopy(model)
method = LoRA(rank=1, alpha=8, seed=0)
method.adapt(tuned)
every_logits, every_read, every_begin, every_end = read_texts(tuned, ids, texts)
every_chosen = log_probabilities_of(every_logits, every_read, every_begin, every_end)
centred = advantages_of(rewards, normalize=False)
for name, weights in {"rewards": rewards, "advantages": centred, "group means": rewards - centred}.items():
    loss = loss_of(every_chosen, weights.flatten(), every_end - every_begin, divisor=24)
    gradients = torch.autograd.grad(loss, list(method.trainable(tuned).values()), retain_graph=True)
    print(f"length of the gradient, weighted by the {name}: {torch.cat([g.flatten() for g in gradients]).norm():.3f}")

# %% [markdown]
# **Groups whose rewards are nearly equal.** Divided by the standard deviation, a difference of 0.01 counts as much as one
# of 1. Without the division it does not.

# %%
nearly = torch.tensor([[0.50, 0.50, 0.50, 0.51], [0.0, 0.0, 0.0, 1.0]])
for normalize in (True, False):
    rows = [[round(value, 4) for value in row] for row in advantages_of(nearly, normalize=normalize).tolist()]
    print(f"normalize={normalize}: {rows[0]} and {rows[1]}")

# %% [markdown]
# **k3 far away from the base.** It has the right expectation, but base / p is very large for a few rare tokens. The mean
# then depends on whether the sample contains them. For a model that repeats a few words, k1 is the better estimate.

# %%
estimates(models["LoRA, rank 1"])

# %% [markdown]
# **A learning rate chosen by the reward alone.** That is what happened above: the rates with the best rewards are those at
# which the language is lost. Look at the divergence and at samples for each rate before you choose.
#
# ## Summary
#
# - A policy gradient makes each sampled text more likely in proportion to its advantage; the reward needs no gradient.
# - The mean of the group is the baseline; a group of equal rewards teaches nothing, if rounding does not get in the way.
# - LoRA of rank 1 reached about the same reward as rank 8 and full fine-tuning, each at its own rate, on an easy reward.
# - All six runs of this notebook hacked it: a reward near 1, repeated words, and a perplexity that is over a hundred times the base's.
# - Measure what the reward leaves out: the divergence from the base, held-out text, and samples that you read.
#
# ## Go further
#
# - Williams 1992, *Simple statistical gradient-following algorithms for connectionist reinforcement learning*; Shao et al.
#   2024, *DeepSeekMath* (arXiv:2402.03300, section 4), which introduced GRPO; Liu et al. 2025, *Understanding R1-Zero-Like
#   Training* (arXiv:2503.20783).
# - Schulman 2020, *Approximating KL Divergence* (joschu.net/blog/kl-approx.html).
# - Schulman et al. 2025, *LoRA Without Regret* (Thinking Machines), section "Reinforcement learning".
# - `lora_from_scratch/finetune/rewards.py`: the whole trainer, with any method.

# %% [markdown] open_question="reward_design" points=4
# ### Open question
#
# A company trains a model for customer service on one reward: 1 if the customer closes the chat within five minutes, and 0
# otherwise. After training the mean reward has risen from 0.6 to 0.95. Write at most 150 words: what may the model have
# learned, which measurements would show it, and how would you change the training?
#
# **Rubric.**
#
# - 1 point: names a behaviour that raises the reward without helping, such as sending customers away or annoying them.
# - 1 point: measures what the reward leaves out: solved problems, ratings, or samples read by a person.
# - 1 point: measures the divergence from the base, or held-out quality, along the training.
# - 1 point: a change with its own weakness named: another or a combined reward, a penalty for divergence, stopping early.

# %% volatile=true
progress("27")
