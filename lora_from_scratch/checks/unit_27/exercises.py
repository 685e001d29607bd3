"""Unit 27, rewards instead of references: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_27.explanations import (
    explain_advantages,
    explain_divergence,
    explain_loss,
    explain_reward,
    explain_tokens,
)
from lora_from_scratch.checks.unit_27.probes import run_loss, run_tokens, same_loss, same_tokens
from lora_from_scratch.finetune.rewards import (
    group_advantages,
    policy_gradient_loss,
    sampled_divergence,
    token_log_probabilities,
    without_letter,
)

TITLE = "Rewards instead of references"

# --- without_letter, group_advantages ----------------------------------------------------------------


def reward_cases(draw: Draw) -> Iterator[Case]:
    def case(text: str, letter: str, *sentences: str) -> Case:
        given: dict[str, Data] = {"text": text} if letter == "e" else {"text": text, "letter": letter}
        return Case(f"{text!r}, letter {letter}", given, sentences=sentences)

    share, word, capital = "The share of words that do not", "A word is a run", "A capital letter is"
    none, other, limits, twice = (
        "the reward of a text without",
        "letter: a lower-case",
        "From 0 to 1",
        "A word that occurs",
    )
    yield case("The king had a red horse.", "e", share, limits, capital)
    yield case("A fox saw the END, it was odd.", "e", capital, share, word)
    yield case("with with the with with the", "e", twice, limits, share)
    yield case("Don't! It's ten o'clock", "t", word, other)
    yield case("snow-white\nfoxes,two owls", "w", word, other)
    yield case("a1b 22 e2 _i_", "e", word, share)
    yield case("the naïve Zoë", "e", word, share)
    yield case("... 12 ...", "e", none)
    yield case("", "e", none)
    yield case("AZURE Zeal", "z", capital, other)
    words = [draw.choice(("tree", "Wolf", "gold", "HEN", "fish", "Deer", "moon")) for _ in range(9)]
    yield case(" ".join([*words, "egg", "moon"]) + "!", "e", share, limits)
    yield case(" ".join([*words, "oak", "hen"]) + "?", "o", other, share)


def advantage_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, rewards: Tensor, normalize: bool, *sentences: str, part: str = "the advantages") -> Case:
        how = "normalised" if normalize else "not normalised"
        return Case(f"{name}, {how}", {"rewards": rewards, "normalize": normalize}, part, sentences)

    mean, scale, groups, shape = "its reward minus the mean", "normalize: whether to", "rewards: (P, G)", "(P, G)."
    equal, rounding = "If all rewards of a group are equal", "Rewards that differ only by rounding"
    yield case("the rewards 0, 1, 1, 0", torch.tensor([[0.0, 1.0, 1.0, 0.0]]), False, mean, shape)
    yield case("the rewards 0, 1, 1, 0", torch.tensor([[0.0, 1.0, 1.0, 0.0]]), True, scale, mean)
    two = torch.tensor([[0.0, 1.0, 1.0, 0.0], [10.0, 10.0, 10.0, 14.0]])
    yield case("two groups with different means", two, False, groups, mean)
    yield case("two groups with different means", two, True, groups, scale)
    square = torch.stack([draw.permutation(5).float() ** 2 + 3 * row for row in range(5)])
    yield case("five groups of five", square, False, groups, mean)
    yield case("five groups of five", square, True, scale, groups, shape)
    yield case("three groups of two, large rewards", 100 * draw.permutation(6).view(3, 2).float(), True, scale)
    some = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0]])
    yield case("all rewards of the first group are 0.5", some, False, equal, part="equal rewards")
    yield case("all rewards of the first group are 0.5", some, True, equal, part="equal rewards")
    near = torch.tensor([[0.5, 0.5, 0.5, 0.75], [0.0, 4.0, 0.0, 0.0]])
    yield case("a group of nearly equal rewards", near, True, scale)
    constant = ((torch.arange(60) + 1) / 61)[:, None].repeat(1, 11)
    constant[0, 0] = 1.0
    close = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5 + 2**-24], [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
    yield case("0.5 five times and 0.50000006", close, True, rounding, part="equal rewards")
    yield case("59 groups whose rewards are equal", constant, True, rounding, equal, part="equal rewards")


# --- token_log_probabilities, policy_gradient_loss, sampled_divergence -------------------------------


def token_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, logits: Tensor, ids: Tensor, begin: list[int], end: list[int], *sentences: str) -> Case:
        given: dict[str, Data] = {"logits": logits, "ids": ids, "begin": torch.tensor(begin), "end": torch.tensor(end)}
        return Case(name, given, sentences=sentences)

    chosen, row, shifted = "The log-probability of each token of each", "Each row consists", "The logits at place t"
    finite, given, half, ids = "The result is finite", "logits: (N, T, V)", "Half precision", "ids: (N, T)"
    zero = "0 for tokens outside"
    begin, end, empty, shape = "begin: (N,)", "end: (N,)", "If it equals", "(N, T - 1), for"
    log = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]]]).log()
    yield case(
        "probabilities 0.7, 0.2, 0.1 and so on", log, torch.tensor([[0, 1, 2]]), [1], [3], chosen, shifted, shape
    )
    logits, read = 2 * draw.normal(1, 5, 4), draw.integers(0, 3, 1, 5)
    yield case("one prompt of 3 tokens, a text of 2", logits, read, [3], [5], begin, row, shifted, given)
    yield case("one text of 2 tokens, and padding", logits, read, [1], [3], end, zero, row, shifted)
    logits, read = 2 * draw.normal(4, 7, 6), draw.integers(0, 5, 4, 7)
    yield case("four rows", logits, read, [1, 4, 2, 3], [7, 6, 3, 7], row, begin, end, chosen, ids, given, shape)
    yield case("an empty text among others", logits, read, [2, 4, 5, 1], [5, 4, 6, 7], empty, row)
    logits, read = 2 * draw.normal(4, 5, 5), torch.stack([draw.permutation(5) for _ in range(4)])
    yield case(
        "as many tokens in the vocabulary as places", logits, read, [1, 2, 1, 3], [4, 5, 5, 4], ids, chosen, given
    )
    far = torch.zeros(1, 4, 3)
    far[0, :, 2] = 300.0
    yield case("a token that is nearly impossible", far, torch.tensor([[2, 2, 1, 2]]), [1], [4], finite, chosen)
    half_logits = (4 * draw.normal(2, 4, 64)).bfloat16()
    yield case("logits in bfloat16", half_logits, draw.integers(0, 63, 2, 4), [1, 2], [4, 3], half)


def padded(draw: Draw, lengths: list[int], width: int) -> Tensor:
    """(N, width) log-probabilities of texts with these lengths, with zeros before and after them."""
    rows = torch.zeros(len(lengths), width)
    for row, length in zip(rows, lengths, strict=True):
        start = draw.integer(0, width - length)
        row[start : start + length] = -0.2 - 3 * draw.normal(length).abs()
    return rows


def loss_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, log: Tensor, advantages: list[float], lengths: list[int], *sentences: str, divisor: int = 0
    ) -> Case:
        given: dict[str, Data] = {
            "log_probabilities": log,
            "advantages": torch.tensor(advantages),
            "lengths": torch.tensor(lengths),
        }
        return Case(name, given | ({"divisor": divisor} if divisor else {}), sentences=sentences)

    likely, formula, constant = "A loss whose gradient", "loss = - mean over", "The advantages are constants"
    log, given, lengths, empty = (
        "log_probabilities: (N, T)",
        "advantages: (N,)",
        "lengths: (N,)",
        "An empty text counts",
    )
    own, number, scalar = "None: L_i is", "A number: it takes", "A tensor without axes"
    one = torch.tensor([[-1.0, -3.0]])
    yield case("one text of two tokens, advantage 1", one, [1.0], [2], likely, formula, scalar, own)
    two = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])
    yield case(
        "two texts of 3 and 1 tokens, advantages 1 and -1", two, [1.0, -1.0], [3, 1], own, likely, formula, lengths
    )
    yield case("the same, divisor 3", two, [1.0, -1.0], [3, 1], number, formula, divisor=3)
    sizes = [4, 1, 6, 2, 3, 5]
    values = padded(draw, sizes, 6)
    some = [1.5, -0.5, 2.0, -1.0, 0.25, -2.25]
    yield case("six texts", values, some, sizes, formula, given, log, constant, own, lengths, scalar)
    yield case("six texts, divisor 8", values, some, sizes, number, given, constant, log, divisor=8)
    sizes = [2, 0, 3]
    yield case("an empty text among three", padded(draw, sizes, 4), [1.0, 2.0, -1.5], sizes, empty, formula, lengths)
    yield case("all advantages are 0", padded(draw, [2, 2], 3), [0.0, 0.0], [2, 2], likely, given)


def divergence_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, log: Tensor, base: Tensor, lengths: list[int], *sentences: str) -> Case:
        given: dict[str, Data] = {
            "log_probabilities": log,
            "base_log_probabilities": base,
            "lengths": torch.tensor(lengths),
        }
        return Case(name, given, sentences=sentences)

    estimate, formula, mean = "An estimate of KL", "k3 = base / p", "over all tokens of all texts"
    never, equal, given = "but k3 is never negative", "Every token counts equally", "log_probabilities: (N, T), ln p"
    base, lengths, scalar = "base_log_probabilities:", "lengths: (N,)", "A tensor without axes"
    half, quarter = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    yield case("p is 1/2, base is 1/4", half, quarter, [1], formula, estimate, given, base, scalar)
    yield case("p is 1/4, base is 1/2", quarter, half, [1], never, formula, base)
    yield case("two equal models", half, half, [1], estimate, formula)
    long = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [-1.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[-2.0, -2.0, -2.0, -2.0], [-1.5, 0.0, 0.0, 0.0]])
    yield case("texts of 4 tokens and of 1 token", long, other, [4, 1], equal, mean, lengths)
    sizes = [3, 5, 1, 4]
    log = padded(draw, sizes, 7)
    shift = torch.where(log != 0, draw.normal(4, 7), 0.0)
    yield case("four texts with padding", log, log + shift, sizes, mean, formula, equal, given, base, lengths, never)
    sizes = [2, 0]
    log = padded(draw, sizes, 3)
    yield case("an empty text", log, 1.5 * log, sizes, lengths, mean, scalar)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        without_letter,
        idea="verifiable rewards",
        difficulty=1,
        minutes=5,
        points=1,
        hints=(
            "First find the words. A pattern of the module `re` describes a run of letters.",
            "Compare in lower case. And what is left to divide by, if there are no words?",
            'The pattern is `"[A-Za-z]+"`, and `re.findall` gives a list of words; count those in which the letter is '
            "not contained.",
        ),
        cases=reward_cases,
        explain=explain_reward,
        background=("text: any text",),
    ),
    Exercise(
        group_advantages,
        idea="policy gradients",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "The mean of each group is along the axis G. Keep this axis, so that you can subtract.",
            "What is the standard deviation of eight equal rewards, on paper and in float32? Print it for rewards of "
            "0.7.",
            "`rewards.std(dim=1, keepdim=True, correction=0)` divides by G; `torch.where` chooses between the quotient "
            "and 0.",
        ),
        cases=advantage_cases,
        explain=explain_advantages,
        tolerance=2e-3,
        background=("omit this, because it gives",),
    ),
    Exercise(
        token_log_probabilities,
        idea="policy gradients",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Which logits predict the token at place 1? The last logits predict a token that does not exist.",
            "For every token take one number out of its row of log-probabilities, and then set those of prompt and "
            "padding to 0: compare the places 1 to T - 1 with `begin` and `end`.",
            "`logits[:, :-1].float().log_softmax(dim=-1)` and `ids[:, 1:]` fit together; `gather` along the last axis "
            "takes the tokens; `masked_fill` sets to 0.",
        ),
        cases=token_cases,
        probe=run_tokens,
        agree=same_tokens,
        explain=explain_tokens,
    ),
    Exercise(
        policy_gradient_loss,
        idea="policy gradients",
        difficulty=3,
        minutes=9,
        points=2,
        hints=(
            "Sum the log-probabilities of each text first. Optimisers minimise: which sign makes texts with a positive "
            "advantage more likely?",
            "Divide each sum by the length of its text, or all of them by `divisor`; multiply by the advantages; and "
            "take the mean. What happens at a length of 0?",
            "`lengths.clamp(min=1)` avoids 0 / 0, and `advantages.detach()` is the same numbers without a gradient.",
        ),
        cases=loss_cases,
        probe=run_loss,
        agree=same_loss,
        explain=explain_loss,
    ),
    Exercise(
        sampled_divergence,
        idea="forgetting",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "The inputs are logarithms. How do you get ln(base / p) from them, and how base / p?",
            "Outside the text both logarithms are 0. What is k3 there? So what has to be left out of the sum?",
            "With `log_ratio = base_log_probabilities - log_probabilities`, k3 needs `log_ratio.exp()` and "
            "`log_ratio`; divide the sum over everything by the number of tokens.",
        ),
        cases=divergence_cases,
        explain=explain_divergence,
        background=("Here p and base are the",),
    ),
]

PREDICTIONS = [
    Prediction(
        "one_rank",
        question=(
            "Each method writes 192 texts in 12 steps and learns from their rewards. The base has a mean reward of "
            "0.58. What mean reward do the methods have afterwards, on new texts for other prompts?"
        ),
        choices={
            "a": "all three less than 0.75: a few hundred rewards are too little to learn from",
            "b": "full fine-tuning more than 0.9, LoRA of rank 8 less, and LoRA of rank 1 much less",
            "c": "all three more than 0.9",
        },
        answer="c",
        explanation=(
            "All three come close to 1, rank 1 among them. A reward says little about a text, and 12 steps with 16 "
            "texts each say little altogether. Here that little fits into one direction per matrix."
        ),
        replies={
            "a": "A few hundred bits of information are enough to make some tokens more likely and others less likely.",
            "b": "What has to be learned from these rewards is little, so there is no need for many directions.",
        },
        measured="12 steps on the bundled GPT-2, each method at its own rate, seeds 0 and 1",
        idea="verifiable rewards",
    ),
    Prediction(
        "price",
        question=(
            "Before training, the bundled model has a perplexity of 39 on the tales that ship with the project. What "
            "is it after 12 steps of LoRA of rank 1 on the reward?"
        ),
        choices={
            "a": "from 39 to 80: 24,576 numbers that have learned from 192 texts change little else",
            "b": "from 80 to 1,000",
            "c": "more than 10,000",
        },
        answer="c",
        explanation=(
            "The reward asks for nothing but words without an e, and nothing in the loss holds the model back. Twelve "
            "steps are enough for it to expect a few short words everywhere, so it gives nearly no probability to the "
            "words of a tale."
        ),
        replies={
            "a": "A small number of trained parameters doesn't limit how far they move the model's predictions.",
            "b": "At such a perplexity a model still expects many words with an e, and its reward would be lower.",
        },
        measured="12 steps on the bundled GPT-2, rate 0.01, seeds 0 and 1",
        idea="forgetting",
    ),
]
