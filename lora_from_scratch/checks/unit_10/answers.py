"""Unit 10, fine-tuning with LoRA: mistakes that people make, and other right ways. The costs, and the files."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
import re

import torch
from torch import nn

from lora_from_scratch.checks.bank import right, wrong

# --- lora_parameter_count ----------------------------------------------------------------------------


@right("lora_parameter_count")
def counted_on_tensors(sizes: list, rank: int) -> int:
    with torch.device("meta"):
        pairs = [(nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)) for i, o in sizes]
    return sum(layer.weight.numel() for pair in pairs for layer in pair)


@right("lora_parameter_count")
def rank_times_all_sides(sizes: list, rank: int) -> int:
    return rank * sum(map(sum, sizes))


@wrong(
    "lora_parameter_count",
    "You multiply in and out: that is the number of entries of the full change. Only its factors are trained.",
)
def multiplied_out(sizes: list, rank: int) -> int:
    return sum(rank * i * o for i, o in sizes)


@wrong("lora_parameter_count", "That is the number of weights in the matrices themselves, which LoRA leaves unchanged.")
def the_frozen_weights(sizes: list, rank: int) -> int:
    return sum(i * o for i, o in sizes)


@wrong("lora_parameter_count", "You count A and leave out B.")
def only_the_first(sizes: list, rank: int) -> int:
    return sum(rank * i for i, _ in sizes)


@wrong("lora_parameter_count", "You count B and leave out A.")
def only_the_second(sizes: list, rank: int) -> int:
    return sum(rank * o for _, o in sizes)


@wrong(
    "lora_parameter_count",
    "You count the inputs twice, as if every matrix were square. A depends on the number of inputs, B on the number of "
    "outputs.",
)
def all_square(sizes: list, rank: int) -> int:
    return sum(2 * rank * i for i, _ in sizes)


@wrong("lora_parameter_count", "You count an r x r matrix between A and B. LoRA does not have one.")
def a_core_between(sizes: list, rank: int) -> int:
    return sum(rank * (i + o) + rank * rank for i, o in sizes)


@wrong(
    "lora_parameter_count",
    "You multiply the count of the first matrix by the number of matrices. They may differ in size.",
)
def the_first_for_all(sizes: list, rank: int) -> int:
    return len(sizes) * rank * sum(sizes[0]) if len(sizes) > 1 else rank * sum(sizes[0])


@wrong("lora_parameter_count", "You count a bias for each matrix. LoRA's two matrices have none.")
def with_biases(sizes: list, rank: int) -> int:
    return sum(rank * (i + o) + o for i, o in sizes)


# --- rank_for_budget ---------------------------------------------------------------------------------


def cost(sizes: list, rank: int = 1) -> int:
    return rank * sum(i + o for i, o in sizes)


def payable(sizes: list, budget: int) -> None:
    if budget < cost(sizes):
        raise ValueError(f"not even r = 1 fits into {budget}")


def smallest_side(sizes: list) -> int:
    return min(min(size) for size in sizes)


@right("rank_for_budget")
def one_rank_after_the_other(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    rank = 1
    while rank < smallest_side(sizes) and cost(sizes, rank + 1) <= budget:
        rank += 1
    return rank


@right("rank_for_budget")
def the_best_of_all_that_fit(sizes: list, budget: int) -> int:
    fitting = [rank for rank in range(1, smallest_side(sizes) + 1) if cost(sizes, rank) <= budget]
    if not fitting:
        raise ValueError("the budget is too small")
    return fitting[-1]


@wrong(
    "rank_for_budget",
    "Your rank exceeds the budget when the division has a remainder: round down.",
)
def rounded_up(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(math.ceil(budget / cost(sizes)), smallest_side(sizes))


@wrong("rank_for_budget", "You round to the nearest integer. If that rounds up, the budget is exceeded.")
def rounded(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(math.floor(budget / cost(sizes) + 0.5), smallest_side(sizes))


@wrong("rank_for_budget", "A budget that is met exactly is not exceeded: one rank more than yours is allowed.")
def never_the_whole_budget(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return max(1, min((budget - 1) // cost(sizes), smallest_side(sizes)))


@wrong(
    "rank_for_budget", "With a large budget your rank exceeds the highest possible rank of a matrix, its smaller side."
)
def without_the_limit_of_the_matrix(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return budget // cost(sizes)


@wrong("rank_for_budget", "You limit the rank by the larger side of a matrix. The limit is the smaller side.")
def limited_by_the_larger_side(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), *(max(size) for size in sizes))


@wrong(
    "rank_for_budget",
    "You use only the first matrix to find the highest possible rank. All of the matrices get this rank.",
)
def limited_by_the_first_matrix(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(budget // cost(sizes), *sizes[0])


@wrong("rank_for_budget", "You give the whole budget to each matrix. They share it.")
def a_budget_for_each(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return min(min(budget // (i + o), i, o) for i, o in sizes)


@wrong(
    "rank_for_budget",
    "You divide the budget into equal parts. At the same rank a larger matrix costs more: add up the costs of all "
    "matrices.",
)
def equal_shares(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return max(1, min(min(budget // len(sizes) // (i + o), i, o) for i, o in sizes))


@wrong(
    "rank_for_budget",
    "You compute the cost as if each rank needed in x out parameters. The change is stored as two factors.",
)
def as_if_multiplied_out(sizes: list, budget: int) -> int:
    payable(sizes, budget)
    return max(1, min(budget // sum(i * o for i, o in sizes), smallest_side(sizes)))


@wrong(
    "rank_for_budget",
    "Raise a ValueError if the budget is too small for r = 1: a LoRA of rank 0 would silently learn nothing.",
)
def zero_is_a_rank(sizes: list, budget: int) -> int:
    return min(budget // cost(sizes), smallest_side(sizes))


@wrong("rank_for_budget", "You return at least rank 1, whatever the budget. Raise a ValueError if it is too small.")
def at_least_one(sizes: list, budget: int) -> int:
    return max(1, min(budget // cost(sizes), smallest_side(sizes)))


# --- lora_state_from_peft ----------------------------------------------------------------------------

PREFIX = "base_model.model."


def refuse(key: str) -> None:
    if not re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key):
        raise ValueError(f"{key} is not the name of a LoRA's tensor")


@right("lora_state_from_peft")
def by_regular_expression(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+\.lora_[AB])\.weight", key)
        if found is None:
            raise ValueError(key)
        state[found[1]] = tensor
    return state


@right("lora_state_from_peft")
def by_counting_characters(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key[len(PREFIX) : -len(".weight")]: tensor.clone() for key, tensor in tensors.items()}


@right("lora_state_from_peft")
def by_splitting_at_the_dots(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        first, second, *name, last = key.split(".")
        if (first, second, last) != ("base_model", "model", "weight") or name[-1] not in ("lora_A", "lora_B"):
            raise ValueError(key)
        state[".".join(name)] = tensor
    return state


@wrong("lora_state_from_peft", "The names still end in .weight: no parameter of the model has such a name.")
def keeps_the_ending(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


@wrong("lora_state_from_peft", "You remove base_model. but leave model. in front. Both are PEFT's prefixes.")
def half_of_the_prefix(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix("base_model.").removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "`lstrip` removes any of these *characters* from the left, and continues into a module's name that begins with "
    "some of them. Remove a prefix instead.",
)
def stripped_by_characters(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.lstrip(PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong("lora_state_from_peft", "You replace .weight everywhere, also in the middle of a module's name.")
def replaced_everywhere(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX).replace(".weight", ""): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You keep what comes after the last model. in the name. Some models have a part of that name themselves.",
)
def behind_the_last_model(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.split("model.")[-1].removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You transpose the tensors. GPT-2 stores its own weights transposed, but A and B are (r, in) and (out, r) in the "
    "file as well.",
)
def turned_round(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX).removesuffix(".weight"): tensor.T for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You skip names that you do not know. The rest loads without an error but is a different adapter from the one that "
    "was saved: raise a ValueError.",
)
def leaves_out_what_it_does_not_know(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        try:
            refuse(key)
        except ValueError:
            continue
        state[key.removeprefix(PREFIX).removesuffix(".weight")] = tensor
    return state


@wrong(
    "lora_state_from_peft",
    "You accept every name. A name that a plain LoRA does not have belongs to something else: raise a ValueError.",
)
def takes_everything(tensors: dict) -> dict:
    return {key.removeprefix(PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "The names in your result are not full names: if two layers have an A each, one of them is lost.",
)
def the_last_part_only(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removesuffix(".weight").split(".")[-1]: tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You insert the adapter's name, default, into the names. PEFT does that in memory; the files and this model do not "
    "contain it.",
)
def with_the_adapters_name(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX).replace(".weight", ".default"): tensor for key, tensor in tensors.items()}
