"""Unit 06, prefix tuning: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.explaining import first_difference
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_06.explanations import (
    explain_attention,
    explain_count,
    explain_gated,
    explain_share,
    explain_split,
)
from lora_from_scratch.checks.unit_06.probes import (
    FORWARD,
    START,
    run_attention,
    run_encoder,
    run_fold,
    run_share,
    run_split,
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

OWN = "or (B, H, P, hd)"  # of the sentences about a prefix for each text


def attention_inputs(
    draw: Draw, batch: int, heads: int, tokens: int, prefix: int, width: int, own: bool = False, double: bool = False
) -> dict[str, Data]:
    """q, k, v of a text, and keys and values to prepend to every text."""
    dtype = torch.float64 if double else torch.float32
    of_text = (batch, heads, tokens, width)
    given: dict[str, Data] = {name: draw.normal(*of_text, dtype=dtype) for name in ("q", "k", "v")}
    shape = (batch if own else 1, heads, prefix, width)
    return given | {name: draw.normal(*shape, dtype=dtype) for name in ("prefix_k", "prefix_v")}


def prefix_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, given: dict[str, Data], *sentences: str) -> Case:
        return Case(name, given, sentences=sentences)

    one = attention_inputs(draw, 1, 1, 1, 1, 2)
    yield case("one token, a prefix of one", one, "every token also sees the prefix")
    hides = "the causal mask hides none of it"
    yield case("4 tokens, a prefix of 3", attention_inputs(draw, 1, 1, 4, 3, 4), hides, "a single softmax over both")
    several = attention_inputs(draw, 2, 3, 4, 2, 5)
    yield case("a batch of 2, 3 heads, one prefix for both texts", several, "of the text;", "Gradients flow")
    yield case("a prefix that is longer than the text", attention_inputs(draw, 2, 2, 2, 6, 3), "has no queries")
    own = attention_inputs(draw, 3, 2, 3, 2, 4, own=True)
    yield case("a prefix of its own for each text of the batch", own, OWN)
    strided = attention_inputs(draw, 2, 2, 3, 2, 4) | {"strided": True}
    yield case("q, k and v as they come from splitting the heads", strided, "need not be contiguous")
    yield case("in float64", attention_inputs(draw, 1, 2, 3, 2, 4, double=True), "in the dtype of q")


def share_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, given: dict[str, Data], *sentences: str) -> Case:
        return Case(name, {key: given[key] for key in ("q", "k", "prefix_k")}, sentences=sentences)

    meaning = ("the sum of the weights on the prefix", "may see sum to 1", "The share of its attention")
    yield case("one token, a prefix of one", attention_inputs(draw, 1, 1, 1, 1, 2), *meaning)
    yield case("3 tokens, a prefix of 2", attention_inputs(draw, 1, 1, 3, 2, 4), *meaning)
    several = attention_inputs(draw, 2, 3, 4, 3, 5)
    yield case("a batch of 2, 3 heads, one prefix for both texts", several, "q, k: (B, H, T, hd)")
    yield case("a prefix of its own for each text", attention_inputs(draw, 2, 2, 3, 5, 4, own=True), OWN)
    large = attention_inputs(draw, 1, 2, 3, 2, 4)
    q, prefix_k = large["q"], large["prefix_k"]
    assert isinstance(q, torch.Tensor)
    assert isinstance(prefix_k, torch.Tensor)
    scores = (q @ prefix_k.mT / 2).flatten()
    large["q"] = q * (300 / scores[scores.abs().argmax()])  # one score on the prefix is 300
    yield case("scores of several hundred, whose exp overflows", large, "their exponentials overflow")
    yield case("in float64", attention_inputs(draw, 1, 2, 3, 2, 4, double=True), "in the dtype of q")


def gated_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, gates: list[float] | None, given: dict[str, Data], *sentences: str) -> Case:
        given["prompt_k"], given["prompt_v"] = given.pop("prefix_k"), given.pop("prefix_v")
        q = given["q"]
        assert isinstance(q, torch.Tensor)
        heads = q.shape[1]
        gate = draw.normal(1, heads, 1, 1, dtype=q.dtype) if gates is None else q.new_zeros(1, heads, 1, 1)
        for head, value in enumerate(gates or []):
            gate[0, head] = value
        return Case(name, given | {"gate": gate}, part, sentences)

    both = ("a separate softmax for each", "softmax(q K_a^T / sqrt(hd)) V_a", "Gradients flow")
    opened, shut = "an open gate", "a gate that is shut"
    one = attention_inputs(draw, 1, 1, 1, 2, 3)
    yield case("one token, a prompt of 2, a gate of 0.7", opened, [0.7], one, *both)
    four = attention_inputs(draw, 1, 1, 4, 3, 4)
    yield case("4 tokens, a prompt of 3, a gate of -2", opened, [-2.0], four, "sees the whole prompt", "not reduced")
    several = attention_inputs(draw, 2, 3, 4, 2, 5)
    name = "a batch of 2, 3 heads, each with a gate of its own"
    yield case(name, opened, None, several, "one number per head", "q, k, v:")
    own = attention_inputs(draw, 2, 2, 3, 4, 3, own=True)
    yield case("a prompt of its own for each text", opened, [0.4, -1.0], own, OWN)
    in_double = attention_inputs(draw, 1, 2, 3, 2, 4, double=True)
    yield case("in float64", opened, [0.4, -1.0], in_double, "in the dtype of q")
    some, none = attention_inputs(draw, 2, 2, 3, 4, 3), attention_inputs(draw, 1, 2, 3, 2, 4)
    yield case("one gate open, the other at zero", shut, [1.5, 0.0], some, "with zeros the result is")
    yield case("all gates at zero", shut, [0.0, 0.0], none, "with zeros the result is")


# --- split_prefix, prefix_parameter_count ------------------------------------------------------------


def split_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, n_layer: int, n_head: int, width: int, length: int, *sentences: str, **more: Data) -> Case:
        prefix = draw.normal(length, 2 * n_layer * n_head * width)
        given: dict[str, Data] = {"prefix": prefix, "n_layer": n_layer, "n_head": n_head}
        return Case(name, given | {"seed": draw.integer(0, 10**6)} | more, sentences=sentences)

    order, heads, pairs = "A row contains", "the heads are adjacent", "L pairs (K, V)"
    yield case("one layer, one head, a prefix of one", 1, 1, 2, 1, order, pairs, "Gradients flow")
    yield case("two layers, one head, a prefix of 3", 2, 1, 2, 3, "keys and values of each layer", order)
    yield case("one layer, 3 heads, a prefix of 3", 1, 3, 2, 3, heads)
    # Equal sizes, so that swapped axes still give the right shape.
    yield case("2 layers, 2 heads, a prefix of 2, d = 4", 2, 2, 2, 2, order, heads)
    yield case("3 layers, 2 heads, a prefix of 5, d = 6", 3, 2, 3, 5, order, heads)
    double = draw.normal(2, 8, dtype=torch.float64)
    yield case("in float64", 1, 2, 2, 2, "in the dtype of the prefix", prefix=double)


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, n_layer: int, n_embd: int, length: int, *sentences: str, **more: Data) -> Case:
        given: dict[str, Data] = {"n_layer": n_layer, "n_embd": n_embd, "length": length}
        return Case(name, given | more, sentences=sentences)

    direct, mlp = "the P keys and values of every layer", "the two linear layers"
    either = "The number of trained parameters"
    yield case("1 layer, d = 4, P = 3, trained directly", 1, 4, 3, direct, either)
    yield case("GPT-2 medium (24 layers, d = 1024), P = 5, trained directly", 24, 1024, 5, direct)
    sizes = draw.integer(2, 9), draw.integer(10, 60), draw.integer(3, 30)
    yield case("a small model, trained directly, hidden=None", *sizes, "None: no MLP", direct, hidden=None)
    yield case("2 layers, d = 4, P = 3, an MLP of width 5", 2, 4, 3, mlp, either, hidden=5)
    yield case("GPT-2 medium, P = 5, with an MLP of width 512", 24, 1024, 5, mlp, hidden=512)
    n_layer, n_embd, length = draw.integer(3, 9), draw.integer(10, 60), draw.integer(61, 90)
    longer = "the prefix itself is then computed"
    name = "a small model, a longer prefix, a narrow MLP"
    yield case(name, n_layer, n_embd, length, longer, mlp, hidden=draw.integer(3, 9))
    yield case("an MLP of width 1", n_layer, n_embd, 4, "the width of the MLP", hidden=1)


# --- PrefixEncoder, fold_prefix ----------------------------------------------------------------------


def encoder_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, length: int, hidden: int | None, *sentences: str, own: bool = False) -> Case:
        given: dict[str, Data] = {"what": part, "length": length, "hidden": hidden, "own": own}
        return Case(name, given | {"seed": draw.integer(0, 10**6), "ids": draw.integers(0, 10, 2, 3)}, part, sentences)

    current = "The current prefix, (P, 2 L d)"
    without = ("without an MLP the prefix itself", "without an MLP `nn.Identity()`", "None: no MLP", current)
    yield case("P = 3, trained directly", FORWARD, 3, None, *without, "`n_layer` and `n_head`", "config: that")
    mlp = ("with an MLP the `nn.Sequential`", "with an MLP (P, d)", current)
    yield case("P = 2, an MLP of width 5", FORWARD, 2, 5, *mlp, "The prefix of all layers", "hidden: m")
    drawn = ("initialised from N(0, 1)", "all random numbers are drawn from it")
    yield case("a new encoder without an MLP", START, 40, None, *drawn)
    yield case("a new encoder with an MLP of width 64", START, 90, 64, "made by `seeded_linear", *drawn)
    yield case("generator=None", START, 90, 64, "None: PyTorch's own generator", own=True)


def fold_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, length: int, hidden: int | None, *sentences: str, **more: Data) -> Case:
        given: dict[str, Data] = {"length": length, "hidden": hidden, "seed": draw.integer(0, 10**6)}
        return Case(name, given | more, sentences=sentences)

    apart = ("It is independent of the encoder", "not modified and can be trained further")
    yield case("with an MLP, P = 3", 3, 5, "The prefix itself", "with or without an MLP", *apart)
    yield case("without an MLP, P = 2", 2, None, *apart, "with or without an MLP")
    yield case("with an MLP, P = 4", 4, 3, *apart)
    yield case("an encoder in float64", 2, 3, "in the dtype of the encoder", double=True)


ENCODER = {  # what the messages say of each entry of the record
    "parameters": "The parameters of your encoder, or their names, are not those of the exercise. Print "
    "`[(name, p.shape) for name, p in encoder.named_parameters()]`: which are missing, and which are too many?",
    "modules": "Your `transform` consists of other modules than the exercise asks for, or in another order. Print it.",
    "prefix": "With given numbers in its parameters, `prefix()` of your encoder does not return the right prefix. "
    "Which shape does it have, and which function of `embedding` is it?",
    "gradients": "The prefix is right, but its gradients are not. Does `prefix()` compute it anew from the parameters?",
    "logits": "The prefix is right, but the model does not work with it as it should. Which attributes does `enter` "
    "read?",
    "later": "When the parameters change, as in training, `prefix()` still returns the numbers of before. It computes "
    "the prefix anew in every call.",
    "distinct": "Many of your initial numbers are equal. Each is drawn by itself.",
    "repeated": "The same seed does not give the same initial numbers. Which of your draws does not use the generator?",
    "other seed": "Two different seeds give the same numbers in some parameter.",
    "following": "Two encoders that are made one after the other with one generator have the same numbers somewhere. "
    "Draw from the generator as it is, without going back to its seed.",
    "values": "Shape or distribution of your initial numbers is not as the exercise says. Compare the standard "
    "deviation and the largest number of each parameter.",
}
FOLDED = {
    "folded": "What you return is not the current prefix of the encoder, (P, 2 L d). Which method computes it?",
    "graph": "What you return is still part of the encoder's graph.",
    "encoder": "The parameters of the encoder itself have changed. Fold without touching it.",
    "trained": "After folding, other parameters of the encoder are trained than before.",
    "gradients": "Folding has changed the gradients (`.grad`) of the encoder. It only reads the encoder.",
    "training": "After folding, the encoder is no longer in training mode. Fold without touching it.",
    "later": "When the encoder is trained further, what you have returned changes with it.",
}

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
        probe=run_attention,
        dtypes=True,
        explain=explain_attention,
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
        dtypes=True,
        explain=explain_share,
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
        probe=run_split,
        dtypes=True,
        explain=explain_split,
        background=("prefix: (P, 2 L d)", "n_layer: L", "n_head: H"),
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
        explain=explain_count,
        tolerance=0,
        background=("n_layer: L", "n_embd: d", "length: P"),
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
        explain=first_difference(ENCODER),
        background=("named as in PEFT", "`VirtualTokens.__init__`", "The model calls `enter`", "length: P"),
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
        dtypes=True,
        explain=first_difference(FOLDED),
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
        probe=run_attention,
        dtypes=True,
        explain=explain_gated,
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
