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
from torch.nn import functional as F

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


def without_letter(text: str, letter: str = "e") -> float:
    """The share of words that do not contain a letter, as a verifiable reward (a lipogram).

    Args:
        text: any text; the reward of a text without words is 0.
        letter: a lower-case letter.
    """
    words = re.findall(r"[A-Za-z]+", text)
    return sum(letter not in word.lower() for word in words) / len(words) if words else 0.0


def group_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """The advantage of each text: its reward minus the mean of its group.

    Args:
        rewards: (P, G), the rewards of G texts for each of P prompts.
        normalize: whether to divide by the group's standard deviation, as in GRPO. Liu et al. 2025 (arXiv:2503.20783,
            section 3) omit this, because it gives more weight to groups whose rewards are nearly equal.

    Returns:
        (P, G). If all rewards of a group are equal, its advantages are 0 and it does not contribute to the loss.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / rewards.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
    return advantages


def log_probabilities(model: LanguageModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Tensor:
    """The log-probability of each text given its prompt, with gradients.

    Args:
        model: the language model.
        prompts: N prompts of at least one token id each.
        texts: N texts; the log-probability of an empty text is 0.

    Returns:
        (N,).
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # padded on the right
    place = torch.arange(longest, device=device)
    begin = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    end = torch.tensor([len(row) for row in rows], device=device)[:, None]
    written = (place >= begin) & (place < end)  # (N, T): the tokens of the text
    logits = model(ids)[:, :-1].float()
    chosen = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (N, T - 1)
    return (chosen * written[:, 1:]).sum(dim=1)


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
            loss = -(advantages * log_probabilities(model, ids, texts)).mean() / settings.new_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(method.trainable(model).values()), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_at(step, training)
        optimizer.step()
        method.after_step(model, step + 1, optimizer)
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return history


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
