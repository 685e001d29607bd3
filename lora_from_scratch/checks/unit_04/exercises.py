"""Unit 04, full fine-tuning: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.finetune.accounting import trainable_memory
from lora_from_scratch.finetune.adamw import adamw_step
from lora_from_scratch.finetune.completions import completion_labels
from lora_from_scratch.finetune.training import warmup_cosine
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.full_finetuning import freeze_all_but_last

TITLE = "Full fine-tuning"
END = 0  # the end-of-text token of the drawn texts


# --- Labels ------------------------------------------------------------------------------------------


def try_labels(answer: Callable[..., Any], **texts: Any) -> Any:
    """The two rows of token ids, each given as a list of whole numbers or as a tensor."""
    result = answer(**texts)
    return [as_row(row) for row in result] if isinstance(result, list | tuple) else result


def as_row(row: Any) -> Any:
    whole = isinstance(row, list | tuple) and all(isinstance(number, int) for number in row)
    return torch.tensor(row, dtype=torch.int64) if whole else row


def label_cases(draw: Draw) -> Iterator[Case]:
    def texts(prompt: int, completion: int) -> dict[str, Data]:
        """No token twice; the completion ends with the end-of-text token."""
        ids = [int(i) + 1 for i in draw.permutation(60)[: prompt + completion - 1]]
        return {"prompt_ids": as_list(ids[:prompt]), "completion_ids": as_list([*ids[prompt:], END])}

    long, short = draw.integer(5, 7), draw.integer(2, 3)
    yield Case("a prompt of two tokens, a completion of three", texts(2, 3))
    yield Case("a long prompt and a short completion", texts(long, short))
    yield Case("a short prompt and a long completion", texts(short, long))
    same = [int(i) + 1 for i in draw.permutation(60)[:3]]
    yield Case(
        "a completion that repeats tokens of the prompt",
        {"prompt_ids": as_list([*same, END]), "completion_ids": as_list([same[2], same[0], END])},
    )
    yield Case("no prompt", texts(0, 4))
    yield Case("a completion with nothing but the end-of-text token", texts(3, 1))


def as_list(ids: list[int]) -> list[Data]:
    return list(ids)


# --- AdamW -------------------------------------------------------------------------------------------


def adamw_cases(draw: Draw) -> Iterator[Case]:
    def inputs(step: int, *shape: int, **settings: Data) -> dict[str, Data]:
        moments: dict[str, Data] = {name: torch.zeros(shape, dtype=torch.float64) for name in ("m", "v")}
        if step > 1:
            moments = {"m": 0.5 * numbers(*shape), "v": 0.2 + numbers(*shape) ** 2}
        given: dict[str, Data] = {"parameter": 2 * numbers(*shape), "gradient": numbers(*shape), **moments}
        usual: dict[str, Data] = {"learning_rate": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}
        return given | {"step": step} | usual | settings

    def numbers(*shape: int) -> Tensor:
        """Random numbers of both signs, none of them near zero."""
        drawn = draw.normal(*shape, dtype=torch.float64)
        return drawn + 0.3 * drawn.sign()

    update, decay = "the update", "weight decay"
    yield Case("the first step: m and v are zeros, no weight decay", inputs(1, 4), update)
    yield Case("the third step", inputs(3, 5), update)
    yield Case("step 200 of a matrix, betas 0.8 and 0.995", inputs(200, 2, 3, betas=[0.8, 0.995]), update)
    still = inputs(2, 4, weight_decay=0.5) | {"gradient": torch.zeros(4), "m": torch.zeros(4)}
    yield Case("weight decay 0.5, and no gradient so far", still, decay)
    yield Case("weight decay 0.8 together with a gradient", inputs(3, 4, weight_decay=0.8, learning_rate=0.3), decay)
    small = inputs(2, 4, eps=0.05)
    small["gradient"], small["m"], small["v"] = 0.1 * numbers(4), 0.1 * numbers(4), 0.01 * numbers(4) ** 2
    yield Case("eps 0.05 with gradients of similar size", small, "eps")
    yield Case("step 0", inputs(1, 3) | {"step": 0}, "what is refused")


# --- The schedule ------------------------------------------------------------------------------------


def try_schedule(answer: Callable[..., Any], at: list[int], steps: int, warmup_steps: int) -> Any:
    return [answer(step, steps, warmup_steps) for step in at]


def schedule_cases(draw: Draw) -> Iterator[Case]:
    def run(at: range, steps: int, warmup_steps: int) -> dict[str, Data]:
        return {"at": list(at), "steps": steps, "warmup_steps": warmup_steps}

    steps, warmup = draw.integer(14, 20), draw.integer(3, 6)
    yield Case("the warm-up: 4 of 12 steps", run(range(4), 12, 4), "warm-up")
    yield Case("the warm-up of another run", run(range(warmup), steps, warmup), "warm-up")
    yield Case("nothing but warm-up", run(range(warmup), warmup, warmup), "warm-up")
    yield Case("after the warm-up, to the last step", run(range(4, 12), 12, 4), "the fall")
    yield Case("after the warm-up of another run", run(range(warmup, steps), steps, warmup), "the fall")
    yield Case("no warm-up", run(range(steps), steps, 0), "the fall")
    yield Case("a step after the last", run(range(steps, steps + 1), steps, warmup), "what is refused")
    yield Case("more warm-up than steps", run(range(1), steps, steps + 1), "what is refused")


# --- Freezing ----------------------------------------------------------------------------------------


def try_freezing(answer: Callable[..., Any], blocks: int, layers: int, frozen_before: bool = False) -> Any:
    """Which parts of a tiny GPT-2 are trained after the call."""
    model = GPT2(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=blocks, n_head=1))
    model.requires_grad_(not frozen_before)
    answer(model, layers)
    body = model.transformer
    parts: dict[str, nn.Module] = {"token embedding": body.wte, "position embedding": body.wpe}
    parts |= {f"block {number}": block for number, block in enumerate(body.h)}
    parts["last LayerNorm"] = body.ln_f
    return {name: trained(part) for name, part in parts.items()}


def trained(part: nn.Module) -> str:
    flags = {p.requires_grad for p in part.parameters()}
    return "partly" if len(flags) > 1 else "trained" if flags == {True} else "frozen"


def freezing_cases(draw: Draw) -> Iterator[Case]:
    def model(blocks: int, layers: int, **more: bool) -> dict[str, Data]:
        return {"blocks": blocks, "layers": layers, **more}

    yield Case("the last of three blocks", model(3, 1), "what is trained")
    yield Case("the last two of four blocks", model(4, 2), "what is trained")
    yield Case("the last of eleven blocks", model(11, 1), "what is trained")
    yield Case("all of two blocks", model(2, 2), "what is trained")
    yield Case("none of two blocks", model(2, 0), "what is trained")
    yield Case("a model that was frozen before", model(2, 1, frozen_before=True), "what is trained")
    yield Case("more blocks than there are", model(2, 3), "what is refused")
    yield Case("a negative number of blocks", model(2, -1), "what is refused")


# --- Memory ------------------------------------------------------------------------------------------


def try_memory(
    answer: Callable[..., Any], rows: int, width: int, dtype: str, frozen: list[str], tied: bool = False
) -> Any:
    """Bytes for an embedding, a linear layer with a bias, and on request an output layer tied to the embedding."""
    model = nn.Module()
    embedding = nn.Embedding(rows, width)
    model.add_module("embedding", embedding)
    model.add_module("middle", nn.Linear(width, 2 * width))
    if tied:
        head = nn.Linear(width, rows, bias=False)
        head.weight = embedding.weight
        model.add_module("head", head)
    model.to(getattr(torch, dtype))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return answer(model)


def memory_cases(draw: Draw) -> Iterator[Case]:
    def model(*frozen: str, dtype: str = "float32", tied: bool = False) -> dict[str, Data]:
        width = draw.integer(3, 6)
        sizes: dict[str, Data] = {"rows": width + draw.integer(5, 12), "width": width}
        return {**sizes, "dtype": dtype, "frozen": list(frozen), "tied": tied}

    embedding, weight, bias = "embedding.weight", "middle.weight", "middle.bias"
    yield Case("all trained, in float32", model(), "what is trained")
    yield Case("the embedding frozen", model(embedding), "what is trained")
    yield Case("only a bias trained", model(embedding, weight), "what is trained")
    yield Case("nothing trained", model(embedding, weight, bias), "what is trained")
    yield Case("a model in bfloat16", model(embedding, dtype="bfloat16"), "dtypes")
    yield Case("a model in float64", model(weight, dtype="float64"), "dtypes")
    yield Case("an output layer that is the token embedding", model(tied=True), "shared tensors")


EXERCISES = [
    Exercise(
        completion_labels,
        idea="the loss",
        difficulty=1,
        minutes=6,
        points=2,
        hints=(
            "Write down a card of two tokens and a text of three. On which positions should the model be scored?",
            "Inputs and labels have the same length. Where nothing is to be learned, a label is -100 (`IGNORE_INDEX`).",
            "Do not shift anything: the loss already compares position t with label t + 1. `[x] * n` repeats x n "
            "times.",
        ),
        cases=label_cases,
        probe=try_labels,
        tolerance=0,
    ),
    Exercise(
        adamw_step,
        idea="optimisers",
        difficulty=3,
        minutes=20,
        points=4,
        hints=(
            "The docstring has five lines of mathematics. Write five lines of code in the same order.",
            "Keep m and v separate from m_hat and v_hat: which of them does the next step need?",
            "The decay depends on theta alone. Does it pass through the division? First of all, reject a step below 1.",
        ),
        cases=adamw_cases,
        tolerance=1e-5,
    ),
    Exercise(
        warmup_cosine,
        idea="optimisers",
        difficulty=2,
        minutes=10,
        points=2,
        hints=(
            "Three parts in a row: invalid arguments, the rise, the fall. The first can raise, the second can return "
            "early.",
            "For the fall, find a number that is 0 at step W and would be 1 at step T.",
            "Half a cosine goes from cos(0) = 1 to cos(pi) = -1. Shift and scale it so that it goes from 1 to 0.",
        ),
        cases=schedule_cases,
        probe=try_schedule,
    ),
    Exercise(
        freeze_all_but_last,
        idea="what is trained",
        difficulty=2,
        minutes=10,
        points=2,
        hints=(
            "Start from a known state: freeze everything, then unfreeze what should be trained.",
            "`module.requires_grad_(False)`, with the underscore, sets it for all parameters inside the module.",
            "`h[-n:]` gives the last n blocks, except for one value of n. Count from the front instead.",
        ),
        cases=freezing_cases,
        probe=try_freezing,
        tolerance=0,
    ),
    Exercise(
        trainable_memory,
        idea="memory",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Which parameters get a gradient? The optimiser keeps state for these, and for no others.",
            "For every byte of gradient, how many bytes do m and v take together?",
            "`p.element_size()` is the number of bytes of one entry. There is one step counter per tensor.",
        ),
        cases=memory_cases,
        probe=try_memory,
        tolerance=0,
    ),
]

PREDICTIONS = [
    Prediction(
        name="first_adam_step",
        question=(
            "Two weights are trained with Adam, with m and v starting at zero. In the first step the gradient of the "
            "second weight is 1,000 times that of the first. How many times as far does the second weight move?"
        ),
        answer=1.0,
        within=1.1,
        explanation=(
            "Just as far. In the first step m_hat is g and v_hat is the square of g, so m_hat / sqrt(v_hat) is the "
            "sign of g: every weight moves by the learning rate, whether its gradient is large or small. That is why "
            "Adam's learning rate is a step length, and why the first steps are the dangerous ones."
        ),
        replies={
            "below": (
                "A larger gradient does not make the step shorter: m_hat and sqrt(v_hat) grow by the same factor."
            ),
            "above": (
                "With SGD it would move 1,000 times as far. Adam divides by sqrt(v_hat), which grows with the "
                "gradient just as m_hat does."
            ),
        },
        idea="optimisers",
    ),
    Prediction(
        name="tales_afterwards",
        question=(
            "The bundled GPT-2 was trained on children's books. Now all of its weights are trained on story cards, "
            "whose texts are openings of tales. How well does it predict real tales, which it has never read, "
            "afterwards?"
        ),
        choices={
            "better": "better than before: the cards are tales too, and more practice helps",
            "same": "about as well as before, within 5 % in perplexity: so few steps change nothing elsewhere",
            "worse": "clearly worse than before",
        },
        answer="worse",
        explanation=(
            "It gets worse, from the beginning of the run. Nothing in the loss asks the model to keep what it knew, "
            "and every weight can change. The cards share the tales' subject, but they use only a few patterns, and "
            "the model now expects these everywhere."
        ),
        replies={
            "better": "The cards have the tales' subject but not their language, so the practice is in something else.",
            "same": (
                "Few steps are enough: with Adam each moves every weight by about the learning rate, and nothing "
                "holds the weights where they were."
            ),
        },
        measured="64 steps of 8 cards on the bundled GPT-2, seed 0",
        idea="forgetting",
    ),
]
