"""Reinforcement learning with any method: policy gradients with a group baseline.

For each prompt, the model generates a group of G texts, and a function assigns a reward to each. Texts with a reward
above the mean of their group become more likely, and texts below it become less likely:

    loss = - mean over all texts of  A_i * sum_t log p(token_t | what comes before it)
    A_i  = r_i - mean(r)  over the group; in GRPO, divided by the group's standard deviation

This is REINFORCE (Williams 1992) with the mean of the group as the baseline, or the first step of GRPO (Shao et al.
2024, arXiv:2402.03300, section 4.1): each batch is used for one step, so the ratio of the new to the old probability is
1 and clipping has no effect. The loss has no KL penalty; the divergence from the base model is only measured.

Schulman et al. 2025 ("LoRA Without Regret", section "Reinforcement learning") report that rank 1 is sufficient for such
training, because rewards carry little information: about one bit per text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_from_scratch.finetune.evaluation import tale_perplexity
from lora_from_scratch.finetune.metrics import kl_divergence
from lora_from_scratch.finetune.training import TrainingSettings, adamw, autocast, learning_rate_at
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.methods.method import Method
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel
from lora_from_scratch.support.progress_bar import tqdm

Reward = Callable[[str], float]

PROMPTS = (  # the beginnings of fairy tales, for the bundled model
    "Once upon a time there was a",
    "The king said to his son",
    "In the morning the fox",
    "A poor man had",
    "Long ago, in a dark wood,",
    "The old woman took",
    "One day the youngest brother",
    "When the sun was up,",
)
OTHER_PROMPTS = (  # for evaluation
    "There was once a king who",
    "The little girl went",
    "At night the wolf",
    "A soldier came",
    "Far away, beyond the sea,",
    "The miller asked",
    "Then the eldest sister",
    "As soon as it was dark,",
)


def without_letter(text: str, letter: str = "e") -> float:
    """The share of words that do not contain a letter, as a verifiable reward (a lipogram).

    A word is a run of letters from A to Z, in upper or lower case, so "don't" counts as two words. A capital letter is
    the same letter: "End" contains an e.

    Args:
        text: any text; the reward of a text without words is 0.
        letter: a lower-case letter.

    Returns:
        From 0 to 1. A word that occurs twice counts twice.
    """
    words = re.findall(r"[A-Za-z]+", text)
    return sum(letter not in word.lower() for word in words) / len(words) if words else 0.0


def group_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """The advantage of each text: its reward minus the mean of its group.

    If all rewards of a group are equal, its advantages are 0, with and without `normalize`. Rewards that differ only by
    rounding (a standard deviation below 1e-6) count as equal.

    Args:
        rewards: (P, G), the rewards of G texts for each of P prompts.
        normalize: whether to divide by the group's standard deviation, the square root of the mean squared advantage,
            as in GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1). Liu et al. 2025 (arXiv:2503.20783, section 3)
            omit this, because it gives more weight to groups whose rewards are nearly equal.

    Returns:
        (P, G).
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize:
        spread = rewards.std(dim=1, keepdim=True, correction=0)
        advantages = torch.where(spread > 1e-6, advantages / spread, 0.0)
    return advantages


def token_log_probabilities(logits: Tensor, ids: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """The log-probability of each token of each text, given everything before it; 0 for tokens outside the text.

    Each row consists of a prompt, a text and padding. The logits at place t predict the token at place t + 1. The
    result is finite even where a probability is too small for a float.

    Args:
        logits: (N, T, V), with gradients. Half precision is converted to float32 first.
        ids: (N, T), the tokens that the model has read.
        begin: (N,), the place of the text's first token, at least 1.
        end: (N,), the place after its last token. If it equals `begin`, the text is empty.

    Returns:
        (N, T - 1), for the tokens at the places 1 to T - 1.
    """
    place = torch.arange(1, ids.shape[1], device=ids.device)
    written = (place >= begin[:, None]) & (place < end[:, None])  # (N, T - 1)
    every = logits[:, :-1].float().log_softmax(dim=-1)  # (N, T - 1, V)
    chosen = every.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (N, T - 1)
    return chosen.masked_fill(~written, 0.0)


def policy_gradient_loss(
    log_probabilities: Tensor, advantages: Tensor, lengths: Tensor, divisor: int | None = None
) -> Tensor:
    """A loss whose gradient makes texts with positive advantages more likely, and texts with negative ones less likely.

        loss = - mean over all texts of  A_i / L_i * sum_t log p(token_t | what comes before it)

    The advantages are constants: no gradient flows into them.

    Args:
        log_probabilities: (N, T), of each token, with gradients, and 0 outside the text.
        advantages: (N,), A_i.
        lengths: (N,), the number of tokens of each text. An empty text counts in the mean with the value 0.
        divisor: None: L_i is the text's own length (GRPO, Shao et al. 2024, section 4.1). A number: it takes the place
            of every L_i, so that a token of a long text counts as much as one of a short text (Liu et al. 2025).

    Returns:
        A tensor without axes.
    """
    divided_by = lengths.clamp(min=1) if divisor is None else divisor
    return -(advantages.detach() * log_probabilities.sum(dim=1) / divided_by).mean()


def sampled_divergence(log_probabilities: Tensor, base_log_probabilities: Tensor, lengths: Tensor) -> Tensor:
    """An estimate of KL(p || base), how far a model p has moved from its base, from texts written by p: the mean of

        k3 = base / p - 1 - ln(base / p)

    over all tokens of all texts, in nats per token. Here p and base are the probabilities that the two models give to a
    token. The mean of ln(p / base) has the same expectation, but k3 is never negative, not even for a single token
    (Schulman 2020, "Approximating KL divergence"; GRPO, Shao et al. 2024, section 4.1).

    Args:
        log_probabilities: (N, T), ln p of each token of each text, and 0 outside the text.
        base_log_probabilities: (N, T), those of the base model for the same tokens, and 0 outside the text.
        lengths: (N,), the number of tokens of each text, not all 0.

    Returns:
        A tensor without axes. Every token counts equally, whether its text is long or short.
    """
    log_ratio = base_log_probabilities - log_probabilities
    k3 = log_ratio.exp() - 1 - log_ratio  # (N, T), 0 outside the text
    return k3.sum() / lengths.sum()


def read_texts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Let the model read prompts and texts as one batch: the arguments of `token_log_probabilities`.

    Args:
        model: the language model.
        prompts: N prompts of at least one token id each.
        texts: N texts.

    Returns:
        The logits (N, T, V), with gradients; the ids (N, T), padded on the right; where each text begins (N,) and ends
        (N,).
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    begin = torch.tensor([len(prompt) for prompt in prompts], device=device)
    end = torch.tensor([len(row) for row in rows], device=device)
    return model(ids), ids, begin, end


def log_probabilities(model: LanguageModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Tensor:
    """The log-probability of each text given its prompt, with gradients.

    Args:
        model: the language model.
        prompts: N prompts of at least one token id each.
        texts: N texts; the log-probability of an empty text is 0.

    Returns:
        (N,).
    """
    return token_log_probabilities(*read_texts(model, prompts, texts)).sum(dim=1)


@dataclass(frozen=True)
class RewardSettings:
    """Hyperparameters of `train_on_rewards`.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 60
    learning_rate: float = 1e-3
    prompts: int = 4  # per step
    group: int = 8  # G, texts per prompt
    new_tokens: int = 24  # per text
    normalize: bool = True  # see `group_advantages`
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("prompts", 1), ("group", 2), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass
class RewardHistory:
    """The mean reward of the texts of every step, generated before the step's update."""

    rewards: list[float] = field(default_factory=list)


def train_on_rewards(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    method: Method,
    reward: Reward,
    settings: RewardSettings,
    prompts: Sequence[str] = PROMPTS,
    progress: bool = True,
) -> RewardHistory:
    """Train an adapted model on rewards, in place. The random numbers of a step depend only on the seed and the step.

    Args:
        model: a model adapted by `method`.
        tokenizer: the model's tokenizer.
        method: the method whose parameters are trained.
        reward: a function of the generated text, without the prompt.
        settings: the hyperparameters.
        prompts: used in turn, `settings.prompts` in each step.
        progress: whether to show a progress bar.

    Returns:
        The mean reward of every step.
    """
    device = next(model.parameters()).device
    training = TrainingSettings(
        steps=settings.steps, learning_rate=settings.learning_rate, weight_decay=0.0, precision=settings.precision
    )
    optimizer = adamw(method.parameter_groups(model), training)
    peaks = [group["lr"] for group in optimizer.param_groups]
    history = RewardHistory()
    for step in tqdm(range(settings.steps), desc=f"{method.name} on rewards", disable=not progress):
        chosen = [prompts[(step * settings.prompts + i) % len(prompts)] for i in range(settings.prompts)]
        ids = [tokenizer.encode(prompt) for prompt in chosen for _ in range(settings.group)]
        with autocast(device, settings.precision):
            texts = generate(
                model,
                ids,
                max_new_tokens=settings.new_tokens,
                temperature=1.0,
                eos_id=tokenizer.eos_id,
                seed=settings.seed * 1_000_003 + step,
            )
        rewards = torch.tensor([reward(tokenizer.decode(text)) for text in texts]).view(-1, settings.group)
        history.rewards.append(rewards.mean().item())
        advantages = group_advantages(rewards, settings.normalize).flatten().to(device)
        model.train()
        with autocast(device, settings.precision):
            logits, read, begin, end = read_texts(model, ids, texts)
            each = token_log_probabilities(logits, read, begin, end)
            loss = policy_gradient_loss(each, advantages, end - begin, divisor=settings.new_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(method.trainable(model).values()), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_at(step, training)
        optimizer.step()
        method.after_step(model, step + 1, optimizer)
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return history


@dataclass(frozen=True)
class RewardScores:
    """What a model does after training on rewards. `texts` are those from which the first two numbers were computed."""

    reward: float  # the mean reward of the texts
    divergence: float  # KL(model || base) in nats per token, over the vocabulary, on the texts
    perplexity: float  # of the tales that ship with the project
    texts: list[str]


def score_on_rewards(
    model: LanguageModel,
    base: LanguageModel,
    tokenizer: AnyTokenizer,
    reward: Reward,
    *,
    prompts: Sequence[str] = OTHER_PROMPTS,
    texts: int = 8,
    new_tokens: int = 24,
    seed: int = 10**9,
) -> RewardScores:
    """Sample texts from a model, and compare it with its base on them.

    Args:
        model: the trained model.
        base: the model before training.
        tokenizer: the tokenizer of both.
        reward: a function of the generated text, without the prompt.
        prompts: those of the texts.
        texts: the number of texts for each prompt.
        new_tokens: the maximum number of tokens of a text.
        seed: of the samples.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts for _ in range(texts)]
    written = generate(
        model, ids, max_new_tokens=new_tokens, temperature=1.0, eos_id=tokenizer.eos_id, seed=seed
    )  # fmt: skip
    with torch.no_grad():
        logits, read, begin, end = read_texts(model, ids, written)
        every = kl_divergence(logits, read_texts(base, ids, written)[0])[:, :-1]  # (N, T - 1), of the next token
    place = torch.arange(1, read.shape[1], device=read.device)
    inside = (place >= begin[:, None]) & (place < end[:, None])
    continuations = [tokenizer.decode(text) for text in written]
    return RewardScores(
        reward=sum(map(reward, continuations)) / len(continuations),
        divergence=float(every[inside].mean()),
        perplexity=tale_perplexity(model, tokenizer),
        texts=continuations,
    )


def mean_reward(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    reward: Reward,
    *,
    prompts: Sequence[str] = PROMPTS,
    texts: int = 8,
    new_tokens: int = 24,
    seed: int = 10**9,
) -> float:
    """The mean reward of sampled texts, with the same number of texts for each prompt."""
    ids = [tokenizer.encode(prompt) for prompt in prompts for _ in range(texts)]
    written = generate(
        model, ids, max_new_tokens=new_tokens, temperature=1.0, eos_id=tokenizer.eos_id, seed=seed
    )  # fmt: skip
    return sum(reward(tokenizer.decode(text)) for text in written) / len(written)
