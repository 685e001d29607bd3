"""Unit 03, GPT-2: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.gpt2.generation import filter_top_p, sample_next_token
from lora_from_scratch.gpt2.model import (
    IGNORE_INDEX,
    causal_attention,
    causal_mask,
    gelu,
    next_token_loss,
    split_heads,
    transformer_block,
)

TITLE = "GPT-2"
DRAWS = 24  # how often a token is drawn: enough to see every token whose probability is near one half

# --- Attention ---------------------------------------------------------------------------------------


def heads_cases(draw: Draw) -> Iterator[Case]:
    counting = torch.arange(12.0).view(1, 2, 6)  # two tokens: 0 to 5, and 6 to 11
    yield Case("the numbers 0 to 11: 2 tokens of width 6, 3 heads", {"x": counting, "n_head": 3})
    yield Case("3 tokens of width 8, 2 heads", {"x": draw.normal(1, 3, 8), "n_head": 2})
    yield Case("a batch of 2", {"x": draw.normal(2, 5, 6), "n_head": 3})
    yield Case("a single token", {"x": draw.normal(2, 1, 8), "n_head": 4})
    yield Case("a single head", {"x": draw.normal(2, 3, 4), "n_head": 1})


def mask_cases(draw: Draw) -> Iterator[Case]:
    yield Case("3 tokens, no cache", {"tokens": 3, "keys": 3}, "without a cache")
    tokens = draw.integer(4, 7)
    yield Case(f"{tokens} tokens, no cache", {"tokens": tokens, "keys": tokens}, "without a cache")
    yield Case("a single token, no cache", {"tokens": 1, "keys": 1}, "without a cache")
    yield Case("2 tokens after 3 cached ones", {"tokens": 2, "keys": 5}, "with a cache")
    cached = draw.integer(2, 5)
    yield Case(f"1 token after {cached} cached ones", {"tokens": 1, "keys": 1 + cached}, "with a cache")


def attention_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, batch: int, heads: int, tokens: int, keys: int, width: int) -> Case:
        q = 2 * draw.normal(batch, heads, tokens, width)
        k, v = 2 * draw.normal(batch, heads, keys, width), draw.normal(batch, heads, keys, width)
        return Case(name, {"q": q, "k": k, "v": v}, part)

    yield case("one head, 3 tokens, head width 2", "without a cache", 1, 1, 3, 3, 2)
    yield case("2 texts, 3 heads, 5 tokens, head width 6", "without a cache", 2, 3, 5, 5, 6)
    yield case("a single token", "without a cache", 1, 2, 1, 1, 3)
    yield case("2 tokens after 3 cached ones", "with a cache", 1, 2, 2, 5, 3)
    yield case("1 token after 4 cached ones", "with a cache", 2, 2, 1, 5, 3)


# --- The block ---------------------------------------------------------------------------------------


def gelu_cases(draw: Draw) -> Iterator[Case]:
    yield Case("-2, -1, 0, 1 and 2", {"x": torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])})
    yield Case("negative numbers", {"x": -0.5 - 3 * torch.rand(2, 8, generator=draw.generator)})
    yield Case("random numbers, three axes", {"x": draw.normal(2, 3, 4)})
    yield Case("large numbers", {"x": torch.tensor([[-1e4, -50.0], [50.0, 1e4]])})


def block_cases(draw: Draw) -> Iterator[Case]:
    for name, batch, tokens, width in (("1 text of 2 tokens", 1, 2, 4), ("2 texts of 3 tokens", 2, 3, 6)):
        inputs = {"x": 3 * draw.normal(batch, tokens, width) + 1}
        inputs |= {norm: draw.normal(2, width) for norm in ("norm_1", "norm_2")}
        inputs |= {"attention": 0.5 * draw.normal(width, width), "mlp": 0.5 * draw.normal(width, width)}
        yield Case(name, dict(inputs))
    silent = dict(inputs) | {"attention": torch.zeros(width, width), "mlp": torch.zeros(width, width)}
    yield Case("an attention and an MLP that return zeros", dict(silent))
    yield Case("only the MLP returns zeros", dict(inputs) | {"mlp": torch.zeros(width, width)})


def run_block(
    answer: Callable[..., Any], x: Tensor, norm_1: Tensor, attention: Tensor, norm_2: Tensor, mlp: Tensor
) -> Any:
    """Run the block on parts built from plain data: norms with a weight and a bias, attention as a causal mean."""

    def norm(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda h: F.layer_norm(h, h.shape[-1:], values[0], values[1])

    def mean_of_the_past(h: Tensor) -> Tensor:
        return h.cumsum(dim=1) / torch.arange(1, h.shape[1] + 1)[:, None] @ attention

    return answer(x, norm(norm_1), mean_of_the_past, norm(norm_2), lambda h: torch.tanh(h @ mlp))


# --- The loss ----------------------------------------------------------------------------------------


def loss_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, labels: Tensor) -> Case:
        return Case(name, {"logits": 2 * draw.normal(*labels.shape, 7), "labels": labels}, part)

    yield case("1 text of 4 tokens", "the shift", draw.integers(0, 6, 1, 4))
    yield case("2 texts of 5 tokens", "the shift", draw.integers(0, 6, 2, 5))
    uneven = draw.integers(0, 6, 2, 6)
    uneven[0, 2:] = IGNORE_INDEX
    yield case("2 texts, one padded at its end", "labels that do not count", uneven)
    prompts = draw.integers(0, 6, 3, 6)
    for row, length in enumerate((1, 3, 4)):
        prompts[row, :length] = IGNORE_INDEX
    yield case("3 texts whose prompts do not count", "labels that do not count", prompts)
    yield case("no label counts", "labels that do not count", torch.full((2, 3), IGNORE_INDEX))


def run_loss(answer: Callable[..., Any], logits: Tensor, labels: Tensor) -> Any:
    """The loss, and the gradient that training would use (None if no gradient can flow)."""
    logits.requires_grad_(True)
    loss = answer(logits, labels)
    flows = isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1
    gradient = torch.autograd.grad(loss, logits)[0] if flows else None
    return {"loss": loss, "gradient": gradient}


# --- Drawing a token ---------------------------------------------------------------------------------


def top_p_cases(draw: Draw) -> Iterator[Case]:
    order = draw.permutation(5)
    likely = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])[order].log()
    yield Case(
        "probabilities 0.4, 0.3, 0.15, 0.1, 0.05 in some order, p = 0.6", {"logits": likely, "p": 0.6}, "one row"
    )
    sure = torch.tensor([6.0, 1.0, 0.5, 0.0, -1.0])[order]
    yield Case("one token with a probability above p", {"logits": sure, "p": 0.5}, "one row")
    yield Case("random logits, p = 0.9", {"logits": 2 * draw.normal(12), "p": 0.9}, "one row")
    yield Case("p = 1 keeps everything", {"logits": draw.normal(6), "p": 1.0}, "one row")
    yield Case("several rows", {"logits": 2 * draw.normal(2, 3, 8), "p": draw.number(0.5, 0.8)}, "several rows")
    for p in (0.0, 1.5):
        yield Case(f"p = {p:g}, out of range", {"logits": draw.normal(4), "p": p}, "what is refused")


def sampling_cases(draw: Draw) -> Iterator[Case]:
    order = draw.permutation(6)

    def case(name: str, part: str, logits: list[float], **options: float) -> Case:
        return Case(name, {"logits": torch.tensor(logits)[order], "seed": draw.integer(0, 10**6), **options}, part)

    def logs(*probabilities: float) -> list[float]:
        return torch.tensor(probabilities).log().tolist()

    yield case(
        "two equally likely tokens, the others negligible", "temperature", [9.0, 9.0, -20.0, -20.0, -21.0, -22.0]
    )
    yield case("temperature 0.02", "temperature", [1.0, 0.5, -20.0, -20.5, -21.0, -21.5], temperature=0.02)
    yield case("temperature 100", "temperature", [0.0, -30.0, -1e4, -1e4, -1e4, -1e4], temperature=100)
    yield case("temperature 0", "temperature", [1.0, 0.9, 0.8, 0.0, 0.0, 0.0], temperature=0)
    falling = [1.0, 0.9, 0.7, 0.6, 0.5, 0.4]
    yield case("the 2 most likely", "the filters", falling, top_k=2)
    yield case("p = 0.6", "the filters", logs(0.4, 0.35, 0.1, 0.05, 0.05, 0.05), top_p=0.6)
    yield case(
        "the 3 most likely, then p = 0.45", "the filters", logs(0.4, 0.21, 0.19, 0.1, 0.06, 0.04), top_k=3, top_p=0.45
    )
    hot = [0.0, -5.0, -10.0, -1e4, -1e4, -1e4]
    yield case("temperature 50 and p = 0.5", "the filters", hot, temperature=50, top_p=0.5)
    yield case("a temperature below 0", "what is refused", falling, temperature=-1)


def draw_often(answer: Callable[..., Any], logits: Tensor, seed: int, **options: Any) -> Any:
    """Which tokens are drawn at all, and whether the same seed gives the same tokens again."""

    def drawn() -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(answer(logits, generator=generator, **options)) for _ in range(DRAWS)]

    tokens = drawn()
    again = drawn() if not options else tokens
    return {"tokens that come": sorted(set(tokens)), "the same again": tokens == again}


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        split_heads,
        idea="attention",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "Two steps: first split the last axis into two (which head, and which of its columns), then move one axis.",
            "A `view` never moves a number, it only indexes the numbers differently. In which order is the last axis "
            "split: heads outside and columns inside, or the other way round?",
            "`view` to four axes with the tokens still in second place, and `transpose` to swap tokens and heads.",
        ),
        cases=heads_cases,
    ),
    Exercise(
        causal_mask,
        idea="attention",
        difficulty=2,
        minutes=8,
        points=3,
        hints=(
            "Number all the tokens, including cached ones. Which number does the first query have, and which the last?",
            "Keys are numbered from 0 to S - 1, queries from S - T to S - 1. Compare every query with every key.",
            "Compare two `torch.arange`, one as a column (`[:, None]`) and one as a row (`[None, :]`): broadcasting "
            "gives the matrix.",
        ),
        cases=mask_cases,
    ),
    Exercise(
        causal_attention,
        idea="attention",
        difficulty=3,
        minutes=12,
        points=4,
        hints=(
            "Four steps: the scores of every query with every key, the scale, the mask, the weighted mean of the "
            "values.",
            "For the scores the last two axes of `k` have to be swapped. Before the softmax, `masked_fill` puts minus "
            "infinity wherever the mask does not allow a key.",
            "The scale depends on the width of one head, which is the size of the last axis of `q`. The softmax runs "
            "over the keys, which are the last axis of the scores.",
        ),
        cases=attention_cases,
    ),
    Exercise(
        gelu,
        idea="the transformer block",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "Write the docstring's formula as it is: `x` may have any shape, because every operation is elementwise.",
            "`torch.tanh` takes a tensor, `math.sqrt` a number.",
            "Mind the parentheses: the cube is inside the tanh, and the square root is of 2 / pi only.",
        ),
        cases=gelu_cases,
        tolerance=2e-5,
    ),
    Exercise(
        transformer_block,
        idea="the transformer block",
        difficulty=2,
        minutes=5,
        points=2,
        hints=(
            "Draw it: one straight line from left to right, and two detours that are added back to it.",
            "On each detour the normalisation comes first. The straight line has none.",
            "Two lines of code are enough. The second uses the result of the first in both places.",
        ),
        cases=block_cases,
        probe=run_block,
    ),
    Exercise(
        next_token_loss,
        idea="the loss",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Which logits have a label to be compared with? What is predicted at the last position, and what could "
            "predict the first token?",
            "Drop the last position of the logits and the first of the labels. Then both have T - 1 positions.",
            "`F.cross_entropy(..., ignore_index=-100, reduction='sum')` expects (N, V) and (N,). Divide by the number "
            "of labels that count, and make sure that you never divide by 0.",
        ),
        cases=loss_cases,
        probe=run_loss,
    ),
    Exercise(
        filter_top_p,
        idea="sampling",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Sort, decide in the sorted order, and map the decision back to the tokens' original positions.",
            "Whether a token is kept depends on the sum of the probabilities *before* it, excluding its own.",
            "`sort(descending=True)` gives the values and where they came from; `cumsum(dim=-1)` minus the "
            "probability is the sum before it; `scatter(-1, where_from, ...)` maps the decision back.",
        ),
        cases=top_p_cases,
    ),
    Exercise(
        sample_next_token,
        idea="sampling",
        difficulty=3,
        minutes=8,
        points=3,
        hints=(
            "Follow the docstring's order: temperature, top-k, top-p, softmax, draw. Handle temperature 0 separately.",
            "`filter_top_k` and `filter_top_p` take logits and return logits, so they can be chained.",
            "`torch.multinomial(probabilities, 1, generator=generator)` draws one index; `int(...)` makes it a number.",
        ),
        cases=sampling_cases,
        probe=draw_often,
    ),
]

PREDICTIONS = [
    Prediction(
        "where_is_the_key",
        question=(
            "`c_attn` turns the 256 numbers of a token into 768: a query, a key and a value for each of 8 heads, "
            "32 numbers each. Which of the 768 columns contain the *key of head 0*?"
        ),
        choices={
            "a": "columns 32 to 63: head 0 has the first 96 columns, its query, its key, its value",
            "b": "columns 256 to 287: all queries come first, then all keys, then all values",
            "c": "columns 1, 25, 49, ...: every 24th, with heads and kinds interleaved",
        },
        answer="b",
        explanation=(
            "The three are fused side by side, [q | k | v], and only then split into heads. Other models with one "
            "fused matrix (GPT-NeoX, BLOOM) store it head by head, so the tensor's shape does not tell you which "
            "layout it has: only the model's output does. To adapt only the queries and values of this model you have "
            "to split at columns 256 and 512."
        ),
        replies={
            "a": "That would be one head after the other. Read in this way, the same weights give other logits.",
            "c": (
                "The numbers of a head lie side by side. Read as every 24th column, the same weights give other logits."
            ),
        },
        idea="attention",
    ),
    Prediction(
        "tokens_saved",
        question=(
            "A prompt of 16 tokens is continued by 64 tokens. Without a cache the model reads the whole text again for "
            "every new token; with a cache it reads the prompt once and then one token at a time. How many times as "
            "many tokens go through the model without the cache? (Any guess within a quarter of the answer counts.)"
        ),
        answer=38.5,
        within=1.25,
        explanation=(
            "Without: 16 + 17 + ... + 79 = 3,040 tokens. With: 16 for the prompt, then 63 more (the last new token is "
            "never read) = 79. That is a factor of 38.5, and it grows with the length: the former grows quadratically, "
            "the latter linearly."
        ),
        replies={
            "below": (
                "Each of the 64 new tokens costs a reading of the whole text so far: 16 tokens at first, 79 at the end."
            ),
            "above": (
                "The texts that are read again have 16 to 79 tokens, 47.5 on average, and even with a cache 79 "
                "tokens are read in all."
            ),
        },
        idea="generation",
    ),
]
