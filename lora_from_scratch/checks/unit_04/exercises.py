"""Unit 04, full fine-tuning: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_04.explanations import (
    explain_adamw,
    explain_freezing,
    explain_labels,
    explain_memory,
    explain_schedule,
)
from lora_from_scratch.checks.unit_04.probes import try_freezing, try_labels, try_memory, try_schedule
from lora_from_scratch.finetune.accounting import trainable_memory
from lora_from_scratch.finetune.adamw import adamw_step
from lora_from_scratch.finetune.completions import completion_labels
from lora_from_scratch.finetune.training import warmup_cosine
from lora_from_scratch.methods.full_finetuning import freeze_all_but_last

TITLE = "Full fine-tuning"
END = 0  # the end-of-text token of the drawn texts


# --- Labels ------------------------------------------------------------------------------------------


def label_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, prompt: list[int], completion: list[int], *sentences: str) -> Case:
        return Case(
            name, {"prompt_ids": list[Data](prompt), "completion_ids": list[Data](completion)}, sentences=sentences
        )

    def texts(prompt: int, completion: int) -> tuple[list[int], list[int]]:
        """No token twice; the completion ends with the end-of-text token."""
        ids = [int(i) + 1 for i in draw.permutation(60)[: prompt + completion - 1]]
        return ids[:prompt], [*ids[prompt:], END]

    both, masked, unshifted = "Concatenate prompt and completion", "The labels are -100 on the prompt", "not shifted"
    lengths, stop, none = "both of length P + C", "the last should be the end-of-text token", "there may be none"
    long, short = draw.integer(5, 7), draw.integer(2, 3)
    yield case("a prompt of two tokens, a completion of three", *texts(2, 3), both, masked, unshifted, lengths)
    yield case("a long prompt and a short completion", *texts(long, short), masked, lengths, unshifted)
    yield case("a short prompt and a long completion", *texts(short, long), both, stop)
    same = [int(i) + 1 for i in draw.permutation(60)[:3]]
    repeated = "a completion that repeats tokens of the prompt"
    yield case(repeated, [*same, END], [same[2], same[0], END], both, masked)
    yield case("no prompt", *texts(0, 4), none, unshifted)
    yield case("a completion with nothing but the end-of-text token", *texts(3, 1), stop)


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

    update, decay, refused = "the update", "weight decay", "what is refused"
    of_m, of_v = "a running mean of the gradient", "a running mean of its square"
    m_hat, v_hat, theta = "m and v start at 0 and are too small", "this corrects the bias", "theta <-"
    one, shape, kept = "One update of AdamW", "theta, any shape", "the next three tensors are not modified"
    raw, three, decoupled = (
        "without bias correction",
        "the new theta, m and v;",
        "The decay uses theta as it was before",
    )
    first = (m_hat, v_hat, theta, three, raw)
    yield Case("the first step: m and v are zeros, no weight decay", inputs(1, 4), update, first)
    yield Case("the third step", inputs(3, 5, betas=[0.7, 0.95]), update, (of_m, of_v, raw, one, kept))
    matrix = inputs(200, 2, 3, betas=[0.8, 0.995])
    yield Case("step 200 of a matrix, betas 0.8 and 0.995", matrix, update, (of_m, of_v, shape))
    yield Case("step 4 of a single number, without axes", inputs(4), update, (shape, m_hat, v_hat))
    still = inputs(2, 4, weight_decay=0.5) | {"gradient": torch.zeros(4), "m": torch.zeros(4)}
    yield Case("weight decay 0.5, and no gradient so far", still, decay, (theta, decoupled))
    together = inputs(3, 4, weight_decay=0.8, learning_rate=0.3)
    yield Case("weight decay 0.8 together with a gradient", together, decay, (decoupled, theta))
    small = inputs(2, 4, eps=0.05)
    small["gradient"], small["m"], small["v"] = 0.1 * numbers(4), 0.1 * numbers(4), 0.01 * numbers(4) ** 2
    yield Case("eps 0.05 with gradients of similar size", small, "eps", (theta,))
    nothing = inputs(1, 4, weight_decay=0.1)
    nothing["gradient"] = numbers(4) * torch.tensor([1, 0, 1, 0])
    yield Case("the first step, with a gradient of 0 in places", nothing, "eps", ("avoids division by zero",))
    for step in (0, -1):
        invalid = inputs(1, 3) | {"step": step}
        yield Case(f"step {step}", invalid, refused, ("ValueError: the step is below 1", "step: t, from 1"))


# --- The schedule ------------------------------------------------------------------------------------


def schedule_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, at: range, steps: int, warmup: int, *sentences: str) -> Case:
        return Case(name, {"at": list(at), "steps": steps, "warmup_steps": warmup}, part, sentences)

    rising, falling, refused = "warm-up", "the fall", "what is refused"
    rise, fall, count = "over the first W steps it rises", "from step W on it falls", "Steps are counted from 0"
    whole, none, upto, error = "The learning rate of one step", "With W = 0", "warmup_steps: W, 0 to T", "ValueError:"
    steps, warmup = draw.integer(14, 20), draw.integer(3, 6)
    yield case("the warm-up: 4 of 12 steps", rising, range(4), 12, 4, rise, count, whole)
    yield case("the warm-up of another run", rising, range(warmup), steps, warmup, rise, count)
    yield case("nothing but warm-up", rising, range(warmup), warmup, warmup, upto)
    yield case("after the warm-up, to the last step", falling, range(4, 12), 12, 4, fall, whole)
    yield case("after the warm-up of another run", falling, range(warmup, steps), steps, warmup, fall)
    yield case("no warm-up", falling, range(steps), steps, 0, none, fall)
    yield case("a run of one step, without a warm-up", falling, range(1), 1, 0, none)
    yield case("a step after the last", refused, range(steps, steps + 1), steps, warmup, error, "step: 0 to T - 1")
    yield case("step -1", refused, range(-1, 0), steps, warmup, error, "step: 0 to T - 1")
    yield case("more warm-up than steps", refused, range(1), steps, steps + 1, error, upto)
    yield case("a warm-up of -1 steps", refused, range(1), steps, -1, error, upto)


# --- Freezing ----------------------------------------------------------------------------------------


def freezing_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, blocks: int, layers: int, *sentences: str, **more: bool) -> Case:
        part = "what is trained" if 0 <= layers <= blocks else "what is refused"
        return Case(name, {"blocks": blocks, "layers": layers, **more}, part, sentences)

    sets, embeddings, before = "Train the last blocks and the final", "The embeddings come before", "whatever it was"
    limits, error = "layers: from 0", "ValueError: `layers` is negative"
    yield case("the last of three blocks", 3, 1, sets, embeddings, before)
    yield case("the last two of four blocks", 4, 2, sets, embeddings)
    yield case("the last of eleven blocks", 11, 1, sets)
    yield case("all of two blocks", 2, 2, limits, sets, embeddings)
    yield case("none of two blocks", 2, 0, limits, sets)
    yield case("a model that was frozen before", 2, 1, before, frozen_before=True)
    yield case("more blocks than there are", 2, 3, error)
    yield case("a negative number of blocks", 2, -1, error)


# --- Memory ------------------------------------------------------------------------------------------


def memory_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, *frozen: str, sentences: tuple[str, ...], **more: Data) -> Case:
        width = draw.integer(3, 6)
        given: dict[str, Data] = {"rows": width + draw.integer(5, 12), "width": width, "dtype": "float32"}
        return Case(name, given | {"frozen": list(frozen)} | more, part, sentences)

    trained, dtypes, shared = "what is trained", "dtypes", "shared tensors"
    embedding, weight, bias = "embedding.weight", "middle.weight", "middle.bias"
    first, none, two = "The bytes of gradients", "Frozen parameters need none", 'the bytes of "gradients"'
    own, counter, no_more = "a gradient of its own shape and dtype", "counts the steps of each *tensor*", "Weights and"
    once = "A parameter shared by several modules"
    yield case("all trained, in float32", trained, sentences=(first, two, counter, no_more, own))
    yield case("the embedding frozen", trained, embedding, sentences=(none, own))
    yield case("only a bias trained", trained, embedding, weight, sentences=(counter, none, own))
    yield case("nothing trained", trained, embedding, weight, bias, sentences=(none,))
    yield case("a model in bfloat16", dtypes, embedding, dtype="bfloat16", sentences=(own, counter))
    yield case("a model in float64", dtypes, weight, dtype="float64", sentences=(own, counter))
    yield case("a model with its embedding in bfloat16", dtypes, half=[embedding], sentences=(own,))
    yield case("an output layer that is the token embedding", shared, tied=True, sentences=(once,))


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
        explain=explain_labels,
        background=("prompt_ids: P token ids;", "completion_ids: C token ids;"),
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
        explain=explain_adamw,
        background=(
            "each operation being elementwise",
            "The paper's lambda",
            "gradient: g",
            "m, v: of the same shape",
            "zeros before the first",
            "learning_rate: eta",
            "betas: beta1",
            "weight_decay: lambda.",
        ),
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
        explain=explain_schedule,
        background=("With W warm-up steps out of T:", "steps: T."),
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
        explain=explain_freezing,
        background=("FT-Top2",),
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
        explain=explain_memory,
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
