"""Unit 03, GPT-2: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_03.explanations import (
    explain_attention,
    explain_block,
    explain_draws,
    explain_gelu,
    explain_heads,
    explain_loss,
    explain_mask,
    explain_top_p,
)
from lora_from_scratch.checks.unit_03.probes import (
    draw_often,
    run_block,
    run_loss,
    run_top_p,
    same_nucleus,
    same_stream,
)
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

# --- Attention ---------------------------------------------------------------------------------------


def heads_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, x: Tensor, n_head: int, *sentences: str) -> Case:
        return Case(name, {"x": x, "n_head": n_head}, sentences=sentences)

    split, columns, shape = "Split the last axis into heads", "head h has the columns", "with hd = d / H"
    counting = torch.arange(12.0).view(1, 2, 6)  # two tokens: 0 to 5, and 6 to 11
    yield case("the numbers 0 to 11: 2 tokens of width 6, 3 heads", counting, 3, columns, split, shape)
    yield case("3 tokens of width 8, 2 heads", draw.normal(1, 3, 8), 2, split, shape)
    yield case("a batch of 2", draw.normal(2, 5, 6), 3, split, columns)
    yield case("a single token", draw.normal(2, 1, 8), 4, columns)
    yield case("a single head", draw.normal(2, 3, 4), 1, shape)
    yield case("an x that is not contiguous", draw.normal(2, 6, 3).transpose(1, 2), 3, "need not be contiguous")


def mask_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, tokens: int, keys: int, *sentences: str) -> Case:
        part = "without a cache" if tokens == keys else "with a cache"
        return Case(name, {"tokens": tokens, "keys": keys}, part, sentences)

    sees, aligned = "its own position and the ones before it", "with S > T the first S - T keys"
    kind, last = "(T, S) of booleans", "The last row is all True"
    yield case("3 tokens, no cache", 3, 3, sees, kind)
    tokens = draw.integer(4, 7)
    yield case(f"{tokens} tokens, no cache", tokens, tokens, sees, kind, last)
    yield case("a single token, no cache", 1, 1, sees, last)
    yield case("2 tokens after 3 cached ones", 2, 5, aligned, sees, kind, last)
    cached = draw.integer(2, 5)
    yield case(f"1 token after {cached} cached ones", 1, 1 + cached, last, aligned)


def attention_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: tuple[int, int, int, int, int], *sentences: str, split: bool = False) -> Case:
        batch, heads, tokens, keys, width = sizes
        q = 2 * draw.normal(batch, heads, tokens, width)
        k, v = 2 * draw.normal(batch, heads, keys, width), draw.normal(batch, heads, keys, width)
        if split:  # the heads behind the tokens in memory, as `split_heads` leaves them
            q, k, v = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (q, k, v))
        part = "without a cache" if tokens == keys else "with a cache"
        return Case(name, {"q": q, "k": k, "v": v}, part, sentences)

    causal, formula = "in which no token sees a later one", "with the softmax over the keys"
    aligned, shape = "also sees the S - T cached keys", "(B, H, T, hd)."
    yield case("one head, 3 tokens, head width 2", (1, 1, 3, 3, 2), formula, causal, shape)
    yield case("2 texts, 3 heads, 5 tokens, head width 6", (2, 3, 5, 5, 6), formula, causal, shape)
    yield case("a single token", (1, 2, 1, 1, 3), causal)
    name = "q, k and v as they come from splitting the heads"
    yield case(name, (2, 2, 3, 3, 4), "needs to be contiguous", split=True)
    yield case("2 tokens after 3 cached ones", (1, 2, 2, 5, 3), aligned, causal, shape)
    yield case("1 token after 4 cached ones", (2, 2, 1, 5, 3), aligned, shape)


# --- The block ---------------------------------------------------------------------------------------


def gelu_cases(draw: Draw) -> Iterator[Case]:
    formula, shape = "0.5 x (1 + tanh", "for any shape"
    yield Case("-2, -1, 0, 1 and 2", {"x": torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])}, sentences=(formula, shape))
    negative = {"x": -0.5 - 3 * torch.rand(2, 8, generator=draw.generator)}
    yield Case("negative numbers", negative, sentences=(formula,))
    yield Case("random numbers, three axes", {"x": draw.normal(2, 3, 4)}, sentences=(shape, formula))
    yield Case("a single number, without axes", {"x": torch.tensor(draw.number(0.5, 1.5))}, sentences=(shape,))
    yield Case("large numbers", {"x": torch.tensor([[-1e4, -50.0], [50.0, 1e4]])}, sentences=(formula,))


def block_cases(draw: Draw) -> Iterator[Case]:
    order, own, pre = "One block of GPT-2", "The first normalisation belongs", "Each of the two takes the normalised"
    includes, kept, after = "includes what the attention has added", "it is not modified", "after the block"
    for name, batch, tokens, width in (("1 text of 2 tokens", 1, 2, 4), ("2 texts of 3 tokens", 2, 3, 6)):
        inputs = {"x": 3 * draw.normal(batch, tokens, width) + 1}
        inputs |= {norm: draw.normal(2, width) for norm in ("norm_1", "norm_2")}
        inputs |= {"attention": 0.5 * draw.normal(width, width), "mlp": 0.5 * draw.normal(width, width)}
        yield Case(name, dict(inputs), sentences=(order, pre, includes, own, kept, after))
    silent = dict(inputs) | {"attention": torch.zeros(width, width), "mlp": torch.zeros(width, width)}
    yield Case("an attention and an MLP that return zeros", dict(silent), sentences=(pre, after))
    yield Case(
        "only the MLP returns zeros", dict(inputs) | {"mlp": torch.zeros(width, width)}, sentences=(pre, own, after)
    )


# --- The loss ----------------------------------------------------------------------------------------


def loss_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, labels: Tensor, *sentences: str, size: float = 2) -> Case:
        return Case(name, {"logits": size * draw.normal(*labels.shape, 7), "labels": labels}, part, sentences)

    shift, some = "the shift", "labels that do not count"
    mean, at, ignored = "The mean cross-entropy", "are compared with the label at t + 1", "are ignored, both in the sum"
    weight, scalar = "have equal weight", "A differentiable scalar"
    first = draw.permutation(6)[None, :4] + 1  # four different tokens, none of them 0
    yield case("1 text of 4 tokens", shift, first, at, mean, scalar)
    second = draw.integers(0, 6, 2, 5)
    second[0, 2] = second[1, 4] = 0
    yield case("2 texts of 5 tokens, with token 0 among them", shift, second, mean, at)
    yield case("logits of several hundred", shift, draw.integers(0, 6, 1, 5), mean, size=300)
    uneven = draw.integers(0, 6, 2, 6)
    uneven[0, 2:] = IGNORE_INDEX
    yield case("2 texts, one padded at its end", some, uneven, ignored, weight)
    prompts = draw.integers(0, 6, 3, 6)
    for row, length in enumerate((1, 3, 4)):
        prompts[row, :length] = IGNORE_INDEX
    yield case("3 texts whose prompts do not count", some, prompts, ignored, weight)
    one = torch.full((2, 4), IGNORE_INDEX)
    one[1, 2] = draw.integer(0, 6)
    yield case("a single label counts", some, one, ignored)
    yield case("no label counts", some, torch.full((2, 3), IGNORE_INDEX), "0 if all labels are ignored", scalar)


# --- Drawing a token ---------------------------------------------------------------------------------


def top_p_cases(draw: Draw) -> Iterator[Case]:
    one, several, refused = "one row", "several rows", "what is refused"
    smallest, before = "Keep the smallest set", "if the tokens before it sum to less than p"
    everything, kept, error = "1 keeps everything", "the logits of the kept tokens unchanged", "ValueError: p is not"

    def case(name: str, part: str, logits: Tensor, p: float, *sentences: str) -> Case:
        return Case(name, {"logits": logits, "p": p}, part, sentences)

    order = draw.permutation(5)
    likely = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])[order].log()
    name = "probabilities 0.4, 0.3, 0.15, 0.1, 0.05 in some order, p = 0.6"
    yield case(name, one, likely, 0.6, before, smallest, kept)
    sure = torch.tensor([6.0, 1.0, 0.5, 0.0, -1.0])[order]
    yield case("one token with a probability above p", one, sure, 0.5, before, smallest)
    # Equal logits: their probabilities and sums are exact in every precision.
    count = draw.choice((1, 2, 3))
    alike = torch.full((4,), draw.number(-2, 2))
    exact = "Which of several equally likely tokens"
    name = f"four equally likely tokens, p = {count / 4:g}, which {count} of them reach exactly"
    yield case(name, one, alike, count / 4, before, smallest, exact)
    yield case("random logits, p = 0.9", one, 2 * draw.normal(12), 0.9, smallest, kept)
    yield case("p = 1 keeps everything", one, draw.normal(6), 1.0, everything, kept)
    certain = torch.tensor([20.0, 1.0, 0.0])[draw.permutation(3)]
    yield case("p = 1, and a token whose probability is rounded to 1", one, certain, 1.0, everything)
    yield case("several rows", several, 2 * draw.normal(2, 3, 8), draw.number(0.5, 0.8), "logits: (..., V)", smallest)
    for p in (0.0, 1.5, -0.5):
        yield case(f"p = {p:g}, out of range", refused, draw.normal(4), p, error, "above 0 and at most 1;")


def sampling_cases(draw: Draw) -> Iterator[Case]:
    order = draw.permutation(6)
    temperature, filters, refused = "temperature", "the filters", "what is refused"

    def case(name: str, part: str, logits: list[float], *sentences: str, **options: Data) -> Case:
        given: dict[str, Data] = {"logits": torch.tensor(logits)[order], "seed": draw.integer(0, 10**6)}
        return Case(name, given | options, part, sentences)

    def logs(*probabilities: float) -> list[float]:
        return torch.tensor(probabilities).log().tolist()

    sample, same, own = "Sample a token from", "the same state gives the same token", "None: PyTorch's own"
    zero, below, token = "0 takes the most likely token", "below 1 makes likely tokens", "The token's id"
    k, p, after = "top_k: see", "top_p: see", "it uses the probabilities after"
    even = [9.0, 9.0, -20.0, -20.0, -21.0, -22.0]
    yield case("two equally likely tokens, the others negligible", temperature, even, sample, same, token)
    yield case("the same, without a generator", temperature, even, own, token, own=True)
    low = [1.0, 0.5, -20.0, -20.5, -21.0, -21.5]
    yield case("temperature 0.02", temperature, low, below, sample, temperature=0.02)
    high = [0.0, -30.0, -1e4, -1e4, -1e4, -1e4]
    yield case("temperature 100", temperature, high, below, sample, temperature=100)
    yield case("temperature 0", temperature, [1.0, 0.9, 0.8, 0.0, 0.0, 0.0], zero, temperature=0)
    falling = [1.0, 0.9, 0.7, 0.6, 0.5, 0.4]
    yield case("the 2 most likely", filters, falling, k, sample, top_k=2)
    yield case("p = 0.6", filters, logs(0.4, 0.35, 0.1, 0.05, 0.05, 0.05), p, sample, top_p=0.6)
    name, both = "the 3 most likely, then p = 0.45", logs(0.4, 0.21, 0.19, 0.1, 0.06, 0.04)
    yield case(name, filters, both, after, sample, top_k=3, top_p=0.45)
    hot = [0.0, -5.0, -10.0, -1e4, -1e4, -1e4]
    yield case("temperature 50 and p = 0.5", filters, hot, after, temperature=50, top_p=0.5)
    name = "temperature 0, with both filters"
    yield case(name, filters, [1.0, 0.9, 0.8, 0.0, 0.0, 0.0], zero, temperature=0, top_k=2, top_p=0.9)
    error = "ValueError: the temperature is below 0"
    yield case("a temperature below 0", refused, falling, error, temperature=-1)
    yield case("the 0 most likely", refused, falling, error, top_k=0)
    yield case("p = 0", refused, falling, error, top_p=0.0)


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
        explain=explain_heads,
        background=("x: (B, T, d);", "n_head: the number of heads"),
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
        dtypes=True,
        explain=explain_mask,
        background=("tokens: T", "keys: S", "the device of the mask", "None: the CPU"),
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
        explain=explain_attention,
        background=("q: (B, H, T, hd)", "k: (B, H, S, hd)", "v: (B, H, S, hd)"),
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
        explain=explain_gelu,
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
        agree=same_stream,
        explain=explain_block,
        background=("x: (B, T, d), the residual stream;", "functions from a (B, T, d)"),
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
        explain=explain_loss,
        background=("logits: (B, T, V)", "labels: (B, T)"),
    ),
    Exercise(
        filter_top_p,
        idea="sampling",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Sort, decide in the sorted order, and map the decision back to the tokens' original positions.",
            "Whether a token is kept depends on the sum of the probabilities *before* it, excluding its own. For p = 1 "
            "no sum is needed, and a rounded one can be wrong.",
            "`sort(descending=True)` gives the values and where they came from; `cumsum(dim=-1)` minus the "
            "probability is the sum before it; `scatter(-1, where_from, ...)` maps the decision back.",
        ),
        cases=top_p_cases,
        probe=run_top_p,
        agree=same_nucleus,
        explain=explain_top_p,
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
        explain=explain_draws,
        background=("logits: (V,)", "generator: the random number generator"),
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
