"""Unit 10, fine-tuning with LoRA: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_10.explanations import (
    explain_batched,
    explain_budget,
    explain_count,
    explain_peft,
    explain_shrunk,
    explain_switched,
)
from lora_from_scratch.checks.unit_10.probes import SIZES, run_on_sizes, run_peft, run_switch
from lora_from_scratch.methods.lora_peft import lora_state_from_peft
from lora_from_scratch.methods.placement import lora_parameter_count, rank_for_budget
from lora_from_scratch.serving.batched_lora import batched_lora, shrink, switch_task

TITLE = "Fine-tuning with LoRA"

# --- lora_parameter_count, rank_for_budget -----------------------------------------------------------


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: Sequence[Sequence[int]], rank: int, *sentences: str) -> Case:
        return Case(name, {"sizes": [list(size) for size in sizes], "rank": rank}, sentences=sentences)

    count, differ, r = "How many numbers LoRA trains", "they may differ", "rank: r, the same for all"
    pair = "sizes: of each adapted matrix, one pair (in, out)"
    yield case("one matrix, 5 inputs, 3 outputs, r = 2", [(5, 3)], 2, count, pair, r)
    yield case("r = 1 on a square matrix and on one three times as tall", [(8, 8), (8, 24)], 1, differ, count)
    yield case("r = 4 on the q and v of GPT-2 small", [(768, 768)] * 24, 4, "`sizes` has 24 pairs", r)
    many = [(draw.integer(10, 40), draw.integer(41, 90)) for _ in range(4)]
    yield case("four matrices of different sizes, r = 3", many, 3, differ, pair, r)
    yield case("wide matrices, r = 7", [(inputs + 1, outputs) for outputs, inputs in many], 7, differ, pair, r)


def budget_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: Sequence[Sequence[int]], budget: int, *sentences: str, part: str = "the rank") -> Case:
        return Case(name, {"sizes": [list(size) for size in sizes], "budget": budget}, part, sentences)

    largest, limit, most = "The largest rank, the same for all", "However large the budget", "budget: the most numbers"
    pair, least, refused = (
        "sizes: of each adapted matrix, one pair",
        "the budget is too small for r = 1",
        "what is refused",
    )
    one, rank, mixed = [(10, 20)], draw.integer(3, 6), [(16, 16), (16, 48), (64, 16)]  # 32 + 64 + 80 = 176
    yield case(
        "one matrix, 10 inputs, 20 outputs; the budget is exactly the cost of a rank", one, 30 * rank, most, largest
    )
    yield case("the same with a budget smaller by one", one, 30 * rank - 1, most, largest)
    above = 30 * 25 + draw.integer(0, 29)
    yield case("one matrix, 10 inputs, 20 outputs, and a budget above its highest rank", one, above, limit)
    yield case("three matrices of different sizes", mixed, 176 * rank + draw.integer(90, 170), largest, pair)
    second = 165 * 20 + draw.integer(0, 99)
    yield case("two matrices, the second one smaller", [(30, 40), (5, 90)], second, limit, largest)
    yield case("two matrices, the second one with few outputs", [(30, 40), (90, 5)], second, limit, largest)
    yield case("exactly the highest rank of a square matrix", [(12, 12)], 24 * 12, limit, most)
    yield case("q and v of GPT-2 small, a budget of 150,000", [(768, 768)] * 24, 150_000, largest, pair)
    yield case("budget exactly enough for r = 1", mixed, 176, most, least)
    yield case("budget one too small for r = 1", mixed, 175, least, part=refused)
    yield case("no budget", one, 0, least, part=refused)


# --- lora_state_from_peft ----------------------------------------------------------------------------

BEFORE = "base_model.model."


def peft_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, modules: Sequence[str], *sentences: str, part: str = "the names", **more: Any) -> Case:
        tensors: dict[str, Data] = {}
        for module in modules:
            factors = {"B": draw.normal(4, 2), "A": draw.normal(2, 4)}  # B first, as it is not in the alphabet
            for letter in more.get("order", "AB"):
                kind = factors[letter].to(more.get("dtype", torch.float32))
                tensors[f"{BEFORE}{module}.lora_{letter}.weight"] = kind
        tensors |= {key: draw.normal(4) for key in more.get("others", ())}
        return Case(name, {"tensors": tensors}, part, sentences)

    under, puts, shape = (
        "The tensors of a PEFT adapter file",
        "PEFT puts a prefix",
        "A is (r, in) and B is (out, r) in both",
    )
    any_name, same, example = "The name of a module may be anything", "The same tensors, in the same order", "   ->   "
    c_attn = "transformer.h.0.attn.c_attn"
    yield case("one layer of GPT-2", [c_attn], example.strip(), under, puts, shape)
    yield case("two layers of GPT-2", [c_attn, "transformer.h.11.mlp.c_proj"], under, shape)
    yield case("a Llama, whose own names begin with model.", ["model.layers.0.self_attn.q_proj"], any_name, puts)
    yield case("a model with a layer named decoder and one named embed", ["decoder.out", "embed.linear"], any_name)
    yield case("a layer with .weight in the middle of its name", ["net.weight_maker.weight.fc"], any_name)
    yield case("a layer within one named base_model.model", ["base_model.model.fc"], any_name, puts)
    yield case("the layers of a file in another order", ["h.1.fc", "h.0.fc"], same, order="BA")
    yield case("tensors in bfloat16", ["h.1.fc"], same, dtype=torch.bfloat16)
    error, refused = "a name that is not made like this", "what is refused"
    for name, modules, other in (
        ("DoRA's magnitude", [c_attn], f"{BEFORE}{c_attn}.lora_magnitude_vector"),
        ("a whole layer, saved together with the LoRA", [c_attn], f"{BEFORE}score.weight"),
        ("no prefix", [], f"{c_attn}.lora_A.weight"),
        ("no prefix, another name", [], "attn.lora_A.weight"),
        ("no suffix", [], f"{BEFORE}{c_attn}.lora_B"),
        ("an adapter's name in the key", [], f"{BEFORE}{c_attn}.lora_A.default.weight"),
        ("a parameter whose name only ends in lora_A", [], f"{BEFORE}h.0.no_lora_A.weight"),
        ("a parameter whose name only ends in lora_B", [], f"{BEFORE}h.0.no_lora_B.weight"),
    ):
        yield case(name, modules, error, part=refused, others=[other])


# --- switch_task -------------------------------------------------------------------------------------


def switch_cases(draw: Draw) -> Iterator[Case]:
    def lora(layers: Sequence[str], rank: int) -> dict[str, Data]:
        return {name: [draw.normal(rank, SIZES[name][0]), draw.normal(SIZES[name][1], rank)] for name in layers}

    def case(name: str, old: Sequence[str], new: Sequence[str], *sentences: str, ranks: Any = (2, 2)) -> Case:
        given: dict[str, Data] = {"old": lora(old, ranks[0]), "new": lora(new, ranks[1])}
        return Case(name, given | {"seed": draw.integer(0, 10**6), "steps": "switch"}, "the switch", sentences)

    def refuse(name: str, old: dict[str, Data], new: dict[str, Data]) -> Case:
        given: dict[str, Data] = {"old": old, "new": new, "seed": draw.integer(0, 10**6), "steps": "refuse"}
        sentences = "the model does not have one of the layers", "Nothing is changed in this case"
        return Case(name, given, "what is refused", sentences)

    replace, layers, base = (
        "Replace the LoRA that is merged",
        "model: its layers are `nn.Linear`",
        "{}: nothing, the base",
    )
    now, instead, nothing = "old: what is merged now", "new: what to merge instead", "{}: nothing."
    others, ranks = "Only the weights of these layers change", "may have different ranks"
    yield case("from the base to a LoRA on a Linear", [], ["head"], base, instead, replace, others)
    yield case("from the base to a LoRA on a Conv1D with 4 inputs and 6 outputs", [], ["h.0.fc"], layers, instead)
    yield case("from the base to a LoRA on a square Conv1D", [], ["h.1.proj"], layers, instead)
    yield case("from a LoRA to the base", ["h.0.proj", "head"], [], nothing, now, others)
    both = "from one LoRA to another on the same layers"
    yield case(both, ["h.0.fc", "head"], ["h.0.fc", "head"], replace, now, instead)
    fc = ["h.0.fc", "h.1.fc"]
    yield case("different ranks on the same layers", fc, fc, ranks, replace, ranks=(1, 3))
    mixed = ["h.0.fc", "h.0.proj"], ["h.0.proj", "head"]
    yield case("different layers", *mixed, ranks, others, ranks=(3, 1))
    back = case("from one LoRA to another and back", ["h.0.fc", "h.1.proj"], ["h.0.proj", "head"])
    again = "This recovers W0 up to rounding"
    yield Case(back.name, {**back.inputs, "steps": "there and back"}, back.part, (again, replace))
    yield rounded_switch(draw)
    for kind, layer, sizes in (
        ("a layer that the model does not have", "h.7.fc", (4, 6)),
        ("6 inputs and 4 outputs, and the model's layer has 4 and 6", "h.1.fc", (6, 4)),
    ):
        wrong: dict[str, Data] = {layer: [draw.normal(1, sizes[0]), draw.normal(sizes[1], 1)]}
        yield refuse(f"the new LoRA has {kind}", lora(["head"], 1), lora(["h.0.fc"], 1) | wrong)
        yield refuse(f"the old LoRA has {kind}", lora(["head"], 1) | wrong, lora(["h.0.fc"], 1))


def rounded_switch(draw: Draw) -> Case:
    """All numbers are exact in float32, so the only rounding is that of the sum to bfloat16."""

    def factors(layers: Sequence[str]) -> dict[str, Data]:
        pairs = {
            name: [draw.integers(1, 63, 2, SIZES[name][0]), draw.integers(1, 63, SIZES[name][1], 2)] for name in layers
        }
        return {name: [(one / 16).to(torch.bfloat16) for one in pair] for name, pair in pairs.items()}

    given: dict[str, Data] = {"old": factors(["h.0.fc", "head"]), "new": factors(["h.0.fc", "head"])}
    given |= {"seed": draw.integer(0, 10**6), "steps": "switch", "whole": True}
    return Case("a model in bfloat16", given, "the switch", ("The sum is formed in at least float32",))


# --- shrink, batched_lora ----------------------------------------------------------------------------


def shrink_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, ranks: Sequence[int], index: Sequence[int], *sentences: str, tokens: int = 2) -> Case:
        owner = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        given: dict[str, Data] = {"x": draw.normal(len(index), tokens, 5), "A_T": draw.normal(5, len(owner))}
        given |= {"owner": torch.tensor(owner), "adapter_index": torch.tensor(index)}
        return Case(name, given, sentences=sentences)

    keeps, row, none = (
        "Multiply every row of the batch by every A",
        "In a row whose adapter is 1",
        "-1: no adapter, and",
    )
    index, column, ranks = "adapter_index: (n,), the index", "owner: (R,), the index", "R is the sum of their ranks"
    shape = "(n, T, R)."
    yield case("two adapters of rank 1, one row each", (1, 1), (0, 1), keeps, index)
    yield case("the same two in reverse order", (1, 1), (1, 0), index, keeps)
    yield case("ranks 1 and 2, as in the example", (1, 2), (1, 0), row, ranks, tokens=3)
    yield case("three rows, all with the second of two adapters", (2, 2), (1, 1, 1), index, column)
    yield case("ranks 1, 3 and 2", (1, 3, 2), (2, 0, 1, 1), ranks, column, shape)
    yield case("two rows without an adapter", (2, 1), (-1, 1, -1), none, shape, tokens=3)
    yield case("an adapter without this layer", (2, 0, 1), (1, 0, 2), column, ranks, tokens=1)
    mixed = case("columns of three adapters in mixed order", (1, 1, 2), (2, 0, 1), column)
    yield Case(mixed.name, {**mixed.inputs, "owner": torch.tensor([2, 0, 2, 1])}, sentences=mixed.sentences)


def batch_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, index: Sequence[int], K: int, scaling: Data, *sentences: str, **more: Any) -> Case:
        rank, tokens = more.pop("rank", 2), more.pop("tokens", 2)
        given: dict[str, Data] = {"x": draw.normal(len(index), tokens, 5), "A_stack": draw.normal(K, rank, 5)}
        given |= {"B_stack": draw.normal(K, 4, rank), "scaling": scaling, "adapter_index": torch.tensor(index)}
        return Case(name, given | more, sentences=sentences)

    def each(K: int) -> Tensor:
        return 0.5 + torch.arange(K) + 0.3 * draw.normal(K).abs()

    output, added, s = (
        "The adapters' output: row i of the batch",
        "It is to be added to the base",
        "scaling: one number",
    )
    index, none, shape = (
        "adapter_index: (n,) integers",
        "-1: nothing is added to this row",
        "(n, T, out).",
    )
    stack_A, stack_B = "A_stack: (K, r, in)", "B_stack: (K, out, r)"
    yield case("one adapter, two rows, s = 2", (0, 0), 1, 2.0, output, added, s)
    yield case("two adapters, two rows, swapped, s = 0.5", (1, 0), 2, 0.5, output, index, s)
    five = "three adapters of rank 3, five rows, s = 4"
    yield case(five, (2, 0, 0, 1, 2), 3, 4.0, index, stack_A, stack_B, shape, rank=3, tokens=3)
    yield case("a scaling for each adapter", (2, 2, 0, 1), 3, each(3), s, index)
    yield case("s = 0", (1, 0), 2, 0.0, s)
    yield case("rows without an adapter", (-1, 1, 0, -1), 2, 1.5, none, index, tokens=1)
    yield case("no row has an adapter", (-1, -1), 2, 1.5, none)
    as_many = "as many rows as adapters, each adapter with its own scaling, one row without an adapter"
    yield case(as_many, (2, 0, -1), 3, each(3), none, s)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        lora_parameter_count,
        idea="where LoRA goes",
        difficulty=1,
        minutes=4,
        points=1,
        hints=(
            "Start with one matrix with `in` inputs and `out` outputs. How many parameters are in its A, and how many "
            "in its B?",
            "A has r rows, one column per input; B has one row per output, r columns.",
            "`sum(... for inputs, outputs in sizes)`; unit 01's `low_rank_parameter_count` gives the count for one "
            "pair.",
        ),
        cases=count_cases,
        probe=run_on_sizes,
        explain=explain_count,
        background=("Example: r = 4 on the q and v",),
    ),
    Exercise(
        rank_for_budget,
        idea="where LoRA goes",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "What does r = 1 cost for all the matrices together? How many times does that fit into the budget?",
            "The cost is proportional to the rank, so divide; a remainder cannot be spent. There are two limits: the "
            "rank cannot be less than 1, and it cannot exceed the smaller side of any matrix.",
            "`budget // lora_parameter_count(sizes, 1)` is the division; raise a `ValueError` if that is 0; take the "
            "`min` of it and of every side of every matrix.",
        ),
        cases=budget_cases,
        probe=run_on_sizes,
        explain=explain_budget,
        background=("at least one",),
    ),
    Exercise(
        lora_state_from_peft,
        idea="adapters as files",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Only the names change. Take one name apart: which prefix and suffix have to be removed, and which ending "
            "has to be there?",
            "Beware of string methods that remove *characters* and not a *prefix*. `replace` also matches in the "
            "middle of a name.",
            "`key.removeprefix(...)` and `key.removesuffix(...)` return the key unchanged if there is nothing to "
            "remove, so reassemble the name and compare. `name.endswith((..., ...))` accepts several endings.",
        ),
        cases=peft_cases,
        probe=run_peft,
        dtypes=True,
        explain=explain_peft,
        background=("tensors: by PEFT's names", "It belongs to something that a plain LoRA"),
    ),
    Exercise(
        switch_task,
        idea="serving many tasks",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "For each layer of the old LoRA something is subtracted from a weight, and for each layer of the new one "
            "something is added. A layer can be in the old LoRA, in the new one, or in both.",
            "The given B already contains s, so the change of a layer is its B times its A, with a sign. A `Conv1D` "
            "stores its weight transposed. Call `check_fit` on both LoRAs before you change anything.",
            "`dict(model.named_modules())[name].weight` is the parameter; inside the function no gradient is recorded, "
            "so `weight.add_(...)` or `weight.copy_(...)` changes it in place.",
        ),
        cases=switch_cases,
        probe=run_switch,
        explain=explain_switched,
        background=("When we need to switch to another", "to recover it exactly, keep a copy"),
    ),
    Exercise(
        shrink,
        idea="serving many tasks",
        difficulty=3,
        minutes=12,
        points=2,
        hints=(
            "There are two steps. First one large product: every row of the batch by the A of every adapter. Then set "
            "most of the result to zero.",
            "Draw a table with a line for each row of the batch and a column for each of the R values. Where may a "
            "value remain? Where the row's adapter owns the column.",
            "`adapter_index[:, None]` is (n, 1) and `owner` is (R,): comparing them with == gives that table. It has "
            "no token axis yet; `[:, None, :]` adds one.",
        ),
        cases=shrink_cases,
        explain=explain_shrunk,
        background=("Example: adapter 0 has rank 1", "x: (n, T, in): n rows", "A_T: (in, R), the A of all"),
    ),
    Exercise(
        batched_lora,
        idea="serving many tasks",
        difficulty=4,
        minutes=15,
        points=3,
        hints=(
            "There are two ways. Either select each row's own A and B and multiply in batches; or let `shrink` compute "
            "the first half for all adapters at once, so that the zeros cancel the other adapters' B.",
            "For the second way, put the K adapters side by side: A as (in, K r), B as (K r, out). Each B has its own "
            "scaling. A row with -1 adds nothing; remember that -1 is a valid index in Python.",
            "`A_stack.flatten(0, 1)` stacks the A on top of each other; `B_stack.mT` swaps the last two axes before "
            "you do the same with B; `torch.arange(K).repeat_interleave(r)` is the owner of each column; use "
            "`scaling[:, None, None]` if it is a tensor.",
        ),
        cases=batch_cases,
        explain=explain_batched,
        background=("x: (n, T, in)",),
    ),
]

PREDICTIONS = [
    Prediction(
        "rank_one",
        question=(
            "You train LoRA on q and v of every block of the bundled model with r = 1, 2, 4, 8 and 64, each with the "
            "same few steps, alpha and learning rate. On GPT-3, Hu et al. find no difference between these ranks. What "
            "happens here, on the held-out cards?"
        ),
        choices={
            "a": "no difference either: the ranks differ by less than seeds do",
            "b": "rank 1 is clearly worse than rank 64, by more than seeds differ",
            "c": "rank 64 is clearly worse than rank 1: it has more parameters to overfit with",
        },
        answer="b",
        explanation=(
            "Rank 1 is enough if the model nearly knows the task and only has to learn which of its skills to use. The "
            "bundled model has 6 million parameters and has been trained on 19 MB of tales; it has never seen a card. "
            "It has to learn to read one, and that takes more than one direction per matrix."
        ),
        replies={
            "a": (
                "That is what Hu et al. find for GPT-3, which nearly knows its tasks. This model does not know "
                "its task."
            ),
            "c": "To overfit, a run would have to be long enough to see the same cards many times.",
        },
        measured="24 steps on the bundled GPT-2, three seeds each for ranks 1 and 64",
        idea="which rank",
    ),
    Prediction(
        "stack_or_spread",
        question=(
            "The same budget of trained parameters can be spent in three ways in every block: r = 8 on q alone; r = 4 "
            "on q and on v; r = 1 on all four matrices (`c_attn`, both `c_proj`, `c_fc`). Which one has the lowest "
            "held-out loss after the same number of steps?"
        ),
        choices={
            "a": "r = 8 on q: the highest rank",
            "b": "r = 4 on q and v: the paper's choice",
            "c": "r = 1 everywhere: the most matrices",
        },
        answer="c",
        explanation=(
            "A matrix that is not adapted cannot change at all, and no rank elsewhere makes up for it. Hu et al. "
            "conclude the same from their table 5: it is better to adapt more matrices with a lower rank than one with "
            "a higher rank. They tried only the attention; the MLP holds two thirds of a block's weights, and there is "
            "no reason to leave it out."
        ),
        replies={
            "a": (
                "A higher rank on one matrix adds directions there; the attention's other parts and the MLP stay "
                "as they were."
            ),
            "b": (
                "Two matrices are better than one, but the paper compared places in the attention only; the MLP "
                "was left out."
            ),
        },
        measured="24 steps on the bundled GPT-2, seed 0",
        idea="where LoRA goes",
    ),
]
