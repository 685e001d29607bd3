"""Unit 06, prefix tuning: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_06.probes import (
    FORWARD,
    START,
    run_encoder,
    run_fold,
    run_gated,
    run_prefix_attention,
    run_share,
    same_encoder,
)
from lora_from_scratch.methods.llama_adapter import gated_prefix_attention
from lora_from_scratch.methods.prefix_tuning import (
    PrefixEncoder,
    fold_prefix,
    prefix_attention,
    prefix_parameter_count,
    prefix_share,
    split_prefix,
)

TITLE = "Prefix tuning"

# --- prefix_attention, prefix_share, gated_prefix_attention ------------------------------------------


def attention_inputs(draw: Draw, batch: int, heads: int, tokens: int, prefix: int, width: int) -> dict[str, Data]:
    """q, k, v of a text, and keys and values to prepend to every text."""
    of_text = (batch, heads, tokens, width)
    given: dict[str, Data] = {name: draw.normal(*of_text) for name in ("q", "k", "v")}
    return given | {name: draw.normal(1, heads, prefix, width) for name in ("prefix_k", "prefix_v")}


def prefix_cases(draw: Draw) -> Iterator[Case]:
    one = attention_inputs(draw, 1, 1, 1, 1, 2)
    yield Case("one token, a prefix of one", one)
    yield Case("4 tokens, a prefix of 3", attention_inputs(draw, 1, 1, 4, 3, 4))
    yield Case("a batch of 2, 3 heads, one prefix for both texts", attention_inputs(draw, 2, 3, 4, 2, 5))
    longer = attention_inputs(draw, 2, 2, 2, 6, 3)
    yield Case("a prefix that is longer than the text", longer)
    own = attention_inputs(draw, 3, 2, 3, 2, 4)
    own |= {name: draw.normal(3, 2, 2, 4) for name in ("prefix_k", "prefix_v")}
    yield Case("a prefix of its own for each text of the batch", own)


def share_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, given: dict[str, Data]) -> Case:
        return Case(name, {key: given[key] for key in ("q", "k", "prefix_k")})

    zeros = attention_inputs(draw, 1, 1, 3, 2, 4)
    yield case("3 tokens, a prefix of 2", zeros)
    yield case("a batch of 2, 3 heads, one prefix for both texts", attention_inputs(draw, 2, 3, 4, 3, 5))
    own = attention_inputs(draw, 2, 2, 3, 5, 4)
    yield case("a prefix of its own for each text", own | {"prefix_k": draw.normal(2, 2, 5, 4)})
    large = attention_inputs(draw, 1, 2, 3, 2, 4)
    large |= {key: 15 * large[key] for key in ("q", "k", "prefix_k")}  # type: ignore[operator]
    yield case("scores of several hundred, whose exp overflows", large)


def gated_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, gates: list[float] | None, *sizes: int) -> Case:
        given = attention_inputs(draw, *sizes)
        given["prompt_k"], given["prompt_v"] = given.pop("prefix_k"), given.pop("prefix_v")
        heads = sizes[1]
        gate = draw.normal(1, heads, 1, 1) if gates is None else draw.normal(1, heads, 1, 1) * 0
        for head, value in enumerate(gates or []):
            gate[0, head] = value
        return Case(name, given | {"gate": gate}, part)

    yield case("one token, a prompt of 2, a gate of 0.7", "an open gate", [0.7], 1, 1, 1, 2, 3)
    yield case("4 tokens, a prompt of 3, a gate of -2", "an open gate", [-2.0], 1, 1, 4, 3, 4)
    yield case("a batch of 2, 3 heads, each with a gate of its own", "an open gate", None, 2, 3, 4, 2, 5)
    yield case("one gate open, the other at zero", "a gate that is shut", [1.5, 0.0], 2, 2, 3, 4, 3)
    yield case("all gates at zero", "a gate that is shut", [0.0, 0.0], 1, 2, 3, 2, 4)


# --- split_prefix, prefix_parameter_count ------------------------------------------------------------


def split_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, n_layer: int, n_head: int, width: int, length: int) -> Case:
        prefix = draw.normal(length, 2 * n_layer * n_head * width)
        return Case(name, {"prefix": prefix, "n_layer": n_layer, "n_head": n_head})

    yield case("one layer, one head, a prefix of one", 1, 1, 2, 1)
    yield case("two layers, one head, a prefix of 3", 2, 1, 2, 3)
    yield case("one layer, 3 heads, a prefix of 3", 1, 3, 2, 3)
    # Equal sizes, so that swapped axes still give the right shape.
    yield case("2 layers, 2 heads, a prefix of 2, d = 4", 2, 2, 2, 2)
    yield case("3 layers, 2 heads, a prefix of 5, d = 6", 3, 2, 3, 5)


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, n_layer: int, n_embd: int, length: int, **more: Data) -> Case:
        return Case(name, {"n_layer": n_layer, "n_embd": n_embd, "length": length} | more)

    yield case("GPT-2 medium (24 layers, d = 1024), P = 5, trained directly", 24, 1024, 5)
    yield case("a small model, trained directly", draw.integer(2, 9), draw.integer(10, 60), draw.integer(3, 30))
    yield case("GPT-2 medium, P = 5, with an MLP of width 512", 24, 1024, 5, hidden=512)
    n_layer, n_embd, length = draw.integer(2, 9), draw.integer(10, 60), draw.integer(61, 90)
    yield case("a small model, a longer prefix, a narrow MLP", n_layer, n_embd, length, hidden=draw.integer(3, 9))


# --- PrefixEncoder, fold_prefix ----------------------------------------------------------------------


def encoder_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, length: int, hidden: int | None) -> Case:
        given: dict[str, Data] = {"what": part, "length": length, "hidden": hidden}
        return Case(name, given | {"seed": draw.integer(0, 10**6), "ids": draw.integers(0, 10, 2, 3)}, part)

    yield case("P = 3, trained directly", FORWARD, 3, None)
    yield case("P = 2, an MLP of width 5", FORWARD, 2, 5)
    yield case("a new encoder without an MLP", START, 40, None)
    yield case("a new encoder with an MLP of width 64", START, 90, 64)


def fold_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, length: int, hidden: int | None) -> Case:
        return Case(name, {"length": length, "hidden": hidden, "seed": draw.integer(0, 10**6)})

    yield case("with an MLP, P = 3", 3, 5)
    yield case("without an MLP, P = 2", 2, None)
    yield case("with an MLP, P = 4", 4, 3)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        prefix_attention,
        idea="prefix attention",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "The queries are those of the text only. What they attend to gets longer: the keys and the values.",
            "Prepend along the axis of the tokens, which is axis 2. The prefix may have a batch size of 1 and the "
            "text a larger one: `.expand` repeats without copying.",
            "Use `torch.cat([prefix, text], dim=...)` twice; `causal_attention` does the rest: its mask aligns the "
            "last query with the last key.",
        ),
        cases=prefix_cases,
        probe=run_prefix_attention,
    ),
    Exercise(
        prefix_share,
        idea="prefix attention",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "You need the attention weights, not the output of attention. Which lines of `causal_attention` compute "
            "them?",
            "Compute the scores of q with all keys, prefix first; set future ones to minus infinity; apply the "
            "softmax. `causal_mask(T, P + T)` is True where a query may attend.",
            "Of the weights, (B, H, T, P + T), the first P columns belong to the prefix. All that remains is one sum. "
            "`scores.masked_fill(~mask, -math.inf)` hides the future.",
        ),
        cases=share_cases,
        probe=run_share,
    ),
    Exercise(
        split_prefix,
        idea="prefix layout",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Take one row. Write below it which columns belong to which layer, which of them are keys, and which "
            "belong to which head: three splits, the outermost first.",
            "`prefix.view(P, 2 L, H, hd)` makes all splits at once. Now the axis of the layers has to move to the "
            "front and that of the tokens after the heads: this takes a permutation, not a second view.",
            "After `.permute(...)` to (2 L, H, P, hd) the entries 2 l and 2 l + 1 are K and V of layer l; `[None]` "
            "adds the batch axis of size 1.",
        ),
        cases=split_cases,
    ),
    Exercise(
        prefix_parameter_count,
        idea="cost of a prefix",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "How long is a row of the prefix? It contains a key and a value for each layer.",
            "With the MLP the prefix is no longer a parameter. The parameters are the embeddings, and the weight and "
            "bias of each linear layer.",
            "A linear layer from a to b has a b + b numbers. The MLP goes from d to m, and from m to the length of a "
            "row.",
        ),
        cases=count_cases,
    ),
    Exercise(
        PrefixEncoder,
        idea="reparametrisation",
        difficulty=4,
        minutes=15,
        points=4,
        blank=("__init__", "prefix"),
        hints=(
            "`super().__init__(length)` first; then the attributes that `enter` uses: `self.n_layer` and "
            "`self.n_head`. Then two cases: hidden is None, or it is not.",
            "In both cases there are an `embedding` and a `transform`, so that `prefix` is the same line for both: "
            "apply one to the other. What differs is the width of the embedding.",
            "`nn.Parameter(torch.randn(length, width, generator=generator))`; and `nn.Sequential(seeded_linear(...), "
            "nn.Tanh(), seeded_linear(...))`, each with the generator.",
        ),
        cases=encoder_cases,
        probe=run_encoder,
        agree=same_encoder,
    ),
    Exercise(
        fold_prefix,
        idea="reparametrisation",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "The encoder has a method that computes the current prefix.",
            "What it returns is attached to the graph. Without an MLP it is even the very tensor that is trained.",
            "`.detach()` takes it out of the graph but still shares its memory; `.clone()` does not.",
        ),
        cases=fold_cases,
        probe=run_fold,
    ),
    Exercise(
        gated_prefix_attention,
        idea="gating",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "It is the sum of two attentions, each with a softmax of its own. Which of the two has a mask?",
            "`causal_attention` is the first, the library's `prompt_attention` the second. The gate applies only to "
            "the second.",
            "The gate is trained without bounds and used between -1 and 1. Its shape, (1, H, 1, 1), broadcasts "
            "against (B, H, T, hd) as it is.",
        ),
        cases=gated_cases,
        probe=run_gated,
    ),
]

PREDICTIONS = [
    Prediction(
        "zero_prefix",
        question=(
            "You prepend a prefix of 16 virtual tokens in every layer, with all keys and all values zero, and train "
            "nothing. What happens to the model's loss?"
        ),
        choices={
            "a": "nothing: a value of zero adds nothing, and a key of zero matches no query",
            "b": "it changes: zeros take attention away from the text",
            "c": "nothing, as long as the text's positions are counted as before; only a shift of positions can matter",
        },
        answer="b",
        explanation=(
            "A key of zeros has the score 0 with every query, and exp(0) is 1, not 0. So each of the 16 gets a weight "
            "in the softmax, as large as that of a token with the score 0, and the text's weights shrink. The values "
            "add nothing to make up for that, so the output becomes (1 - lambda) times what it was."
        ),
        replies={
            "a": (
                "A key of zero does not match badly: its score is 0, which is more than the score of every key "
                "that matches worse."
            ),
            "c": (
                "A shift of positions changes something too, but with the positions left as they were the zeros "
                "still take weight from the text."
            ),
        },
        idea="prefix attention",
    ),
    Prediction(
        "who_learns_first",
        question=(
            "A LLaMA-Adapter starts with random prompts and with gates of zero. After the first backward pass, which "
            "of the two have a nonzero gradient?"
        ),
        choices={
            "a": "both: the prompts are random, so there is something to learn",
            "b": "neither: what is multiplied by zero can never learn",
            "c": "the gates, but not the prompts",
            "d": "the prompts, but not the gates",
        },
        answer="c",
        explanation=(
            "The output contains tanh(g) times the attention to the prompt. The gradient of g is proportional to the "
            "attention to the prompt, which is random and not zero. The gradient of the prompt is proportional to "
            "tanh(g), which is zero. After one step the gates are slightly open, and from then on both learn: one "
            "factor of a product may start at zero, but not both."
        ),
        replies={
            "a": "The prompts are random, but what reaches them is multiplied by tanh(g), which is zero.",
            "b": (
                "Only if both factors were zero. Here the prompts are not, and they are what the gates' gradient "
                "contains."
            ),
            "d": (
                "It is the other way round: the gradient of a factor contains the other factor, and the one that "
                "is zero is the gate."
            ),
        },
        idea="gating",
    ),
]
