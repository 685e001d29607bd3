"""Unit 10, fine-tuning with LoRA: what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora_peft import lora_state_from_peft
from lora_from_scratch.methods.placement import lora_parameter_count, rank_for_budget
from lora_from_scratch.serving.batched_lora import batched_lora, shrink, switch_task

TITLE = "Fine-tuning with LoRA"

# --- lora_parameter_count, rank_for_budget -----------------------------------------------------------


def count_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: Sequence[Sequence[int]], rank: int) -> Case:
        return Case(name, {"sizes": [list(size) for size in sizes], "rank": rank})

    yield case("one matrix, 5 inputs, 3 outputs, r = 2", [(5, 3)], 2)
    yield case("r = 1 on a square matrix and on one three times as tall", [(8, 8), (8, 24)], 1)
    yield case("r = 4 on the q and v of GPT-2 small", [(768, 768)] * 24, 4)
    many = [(draw.integer(10, 40), draw.integer(41, 90)) for _ in range(4)]
    yield case("four matrices of different sizes, r = 3", many, 3)
    yield case("wide matrices, r = 7", [(inputs + 1, outputs) for outputs, inputs in many], 7)


def run_on_sizes(answer: Callable[..., Any], sizes: list[list[int]], **given: Any) -> Any:
    return answer([(inputs, outputs) for inputs, outputs in sizes], **given)


def budget_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: Sequence[Sequence[int]], budget: int, part: str = "the rank") -> Case:
        return Case(name, {"sizes": [list(size) for size in sizes], "budget": budget}, part)

    rank = draw.integer(3, 6)
    yield case("one matrix, 10 inputs, 20 outputs; the budget is exactly the cost of a rank", [(10, 20)], 30 * rank)
    yield case("the same with a budget smaller by one", [(10, 20)], 30 * rank - 1)
    yield case(
        "one matrix, 10 inputs, 20 outputs, and a budget above its highest rank",
        [(10, 20)],
        30 * 25 + draw.integer(0, 29),
    )
    mixed = [(16, 16), (16, 48), (64, 16)]  # 32 + 64 + 80 = 176
    yield case("three matrices of different sizes", mixed, 176 * rank + draw.integer(90, 170))
    yield case("two matrices, the second one smaller", [(30, 40), (5, 90)], 165 * 20 + draw.integer(0, 99))
    yield case("q and v of GPT-2 small, a budget of 150,000", [(768, 768)] * 24, 150_000)
    yield case("budget exactly enough for r = 1", mixed, 176)
    yield case("budget one too small for r = 1", mixed, 175, "what is refused")
    yield case("no budget", [(10, 20)], 0, "what is refused")


# --- lora_state_from_peft ----------------------------------------------------------------------------

BEFORE = "base_model.model."


def peft_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, modules: Sequence[str], part: str = "the names", more: Sequence[str] = ()) -> Case:
        tensors: dict[str, Data] = {}
        for module in modules:
            tensors[f"{BEFORE}{module}.lora_A.weight"] = draw.normal(2, 4)
            tensors[f"{BEFORE}{module}.lora_B.weight"] = draw.normal(4, 2)  # square, transposed or not
        tensors |= {key: draw.normal(4) for key in more}
        return Case(name, {"tensors": tensors}, part)

    yield case("one layer of GPT-2", ["transformer.h.0.attn.c_attn"])
    yield case("two layers of GPT-2", ["transformer.h.0.attn.c_attn", "transformer.h.11.mlp.c_proj"])
    yield case("a Llama, whose own names begin with model.", ["model.layers.0.self_attn.q_proj"])
    yield case("a model with a layer named decoder and one named embed", ["decoder.out", "embed.linear"])
    yield case("a layer with .weight in the middle of its name", ["net.weight_maker.weight.fc"])
    name = "transformer.h.0.attn.c_attn"
    yield case("DoRA's magnitude", [name], "what is refused", [f"{BEFORE}{name}.lora_magnitude_vector"])
    yield case("a whole layer, saved together with the LoRA", [name], "what is refused", [f"{BEFORE}score.weight"])
    yield case("no prefix", [], "what is refused", [f"{name}.lora_A.weight"])
    yield case("an adapter's name in the key", [], "what is refused", [f"{BEFORE}{name}.lora_A.default.weight"])


def run_peft(answer: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """The tensors by name, and the order of the names."""
    state = answer(tensors)
    return {"state": state, "order": list(state)} if isinstance(state, dict) else state


# --- switch_task -------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two kinds of layers, one of them square, and a layer without LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"fc": Conv1D(4, 6), "proj": Conv1D(4, 4)}) for _ in range(2)])
        self.head = nn.Linear(4, 3)


SIZES = {"h.0.fc": (4, 6), "h.0.proj": (4, 4), "h.1.fc": (4, 6), "h.1.proj": (4, 4), "head": (4, 3)}


def switch_cases(draw: Draw) -> Iterator[Case]:
    def lora(layers: Sequence[str], rank: int) -> dict[str, Data]:
        return {name: [draw.normal(rank, SIZES[name][0]), draw.normal(SIZES[name][1], rank)] for name in layers}

    def case(name: str, old: Sequence[str], new: Sequence[str], part: str = "the switch", ranks: Any = (2, 2)) -> Case:
        given: dict[str, Data] = {"old": lora(old, ranks[0]), "new": lora(new, ranks[1])}
        return Case(name, given | {"seed": draw.integer(0, 10**6), "steps": "switch"}, part)

    yield case("from the base to a LoRA on a Linear", [], ["head"])
    yield case("from the base to a LoRA on a Conv1D with 4 inputs and 6 outputs", [], ["h.0.fc"])
    yield case("from the base to a LoRA on a square Conv1D", [], ["h.1.proj"])
    yield case("from a LoRA to the base", ["h.0.proj", "head"], [])
    yield case("from one LoRA to another on the same layers", ["h.0.fc", "head"], ["h.0.fc", "head"])
    yield case("different ranks on the same layers", ["h.0.fc", "h.1.fc"], ["h.0.fc", "h.1.fc"], ranks=(1, 3))
    yield case("different layers", ["h.0.fc", "h.0.proj"], ["h.0.proj", "head"], ranks=(3, 1))
    given = case("from one LoRA to another and back", ["h.0.fc", "h.1.proj"], ["h.0.proj", "head"]).inputs
    yield Case("from one LoRA to another and back", dict(given) | {"steps": "there and back"}, "the switch")
    missing: dict[str, Data] = {"h.7.fc": [draw.normal(1, 4), draw.normal(6, 1)]}
    given = {"old": lora(["head"], 1), "new": lora(["h.0.fc"], 1) | missing, "seed": 1, "steps": "refuse"}
    yield Case("the new LoRA has a layer that the model does not have", given, "what is refused")
    turned: dict[str, Data] = {"h.1.fc": [draw.normal(1, 6), draw.normal(4, 1)]}
    given = {"old": lora(["head"], 1), "new": lora(["h.0.fc"], 1) | turned, "seed": 1, "steps": "refuse"}
    yield Case("the new LoRA is for 6 inputs and 4 outputs, the layer has 4 and 6", given, "what is refused")


def run_switch(
    answer: Callable[..., Any], old: dict[str, Any], new: dict[str, Any], seed: int, steps: str
) -> dict[str, Any]:
    """All the values of the model afterwards, and whether invalid input raised."""
    torch.manual_seed(seed)
    model = Small()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        nn.init.normal_(parameter)
    theirs = [{name: (A, B) for name, (A, B) in factors.items()} for factors in (old, new)]
    error = ""
    try:
        answer(model, *theirs)
        if steps == "there and back":
            answer(model, *reversed(theirs))
    except ValueError:
        if steps != "refuse":
            raise
        error = "ValueError"
    after = dict(model.named_parameters())
    return {
        "weights": after,
        "the same parameters": {name: after.get(name) is parameter for name, parameter in parameters.items()},
        "still trained": all(p.requires_grad and p.grad_fn is None for p in after.values()),
        "refused": error,
    }


# --- shrink, batched_lora ----------------------------------------------------------------------------


def shrink_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, ranks: Sequence[int], index: Sequence[int], tokens: int = 2) -> Case:
        owner = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        given: dict[str, Data] = {"x": draw.normal(len(index), tokens, 5), "A_T": draw.normal(5, len(owner))}
        return Case(name, given | {"owner": torch.tensor(owner), "adapter_index": torch.tensor(index)})

    yield case("two adapters of rank 1, one row each", (1, 1), (0, 1))
    yield case("the same two in reverse order", (1, 1), (1, 0))
    yield case("three rows, all with the first of two adapters", (2, 2), (1, 1, 1))
    yield case("ranks 1, 3 and 2", (1, 3, 2), (2, 0, 1, 1))
    yield case("two rows without an adapter", (2, 1), (-1, 1, -1), 3)
    yield case("an adapter without this layer", (2, 0, 1), (1, 0, 2), 1)


def batch_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, index: Sequence[int], K: int, scaling: Data, rank: int = 2, tokens: int = 2) -> Case:
        stacks: dict[str, Data] = {"A_stack": draw.normal(K, rank, 5), "B_stack": draw.normal(K, 4, rank)}
        given = {"x": draw.normal(len(index), tokens, 5)} | stacks
        return Case(name, given | {"scaling": scaling, "adapter_index": torch.tensor(index)})

    def each(K: int) -> Tensor:
        return 0.5 + torch.arange(K) + 0.3 * draw.normal(K).abs()

    yield case("one adapter, two rows, s = 2", (0, 0), 1, 2.0)
    yield case("two adapters, two rows, swapped, s = 0.5", (1, 0), 2, 0.5)
    yield case("three adapters of rank 3, five rows, s = 4", (2, 0, 0, 1, 2), 3, 4.0, 3, 3)
    yield case("a scaling for each adapter", (2, 2, 0, 1), 3, each(3))
    yield case("rows without an adapter", (-1, 1, 0, -1), 2, 1.5, 1)
    yield case(
        "as many rows as adapters, each adapter with its own scaling, one row without an adapter",
        (2, 0, -1),
        3,
        each(3),
    )


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
