"""Unit 16, fewer numbers than rank one: mistakes that people make, and other right ways. Tied-LoRA's count."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import torch
from torch import nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.tied_lora import tied_lora_parameter_count


def ends(name: str) -> str:
    return ".".join(name.split(".")[-2:])


@right("tied_lora_parameter_count")
def one_kind_after_the_other(sizes: dict, rank: int) -> int:
    kinds = defaultdict(list)
    for name, (inputs, outputs) in sizes.items():
        kinds[(*name.rsplit(".", 2)[-2:], inputs, outputs)].append(name)
    return sum(rank * (i + o) + len(names) * (rank + o) for (*_, i, o), names in kinds.items())


@right("tied_lora_parameter_count")
def counted_on_tensors(sizes: dict, rank: int) -> int:
    shared: dict = {}
    own: list = []
    for name, (inputs, outputs) in sizes.items():
        with torch.device("meta"):
            pair = nn.ParameterList([torch.empty(rank, inputs), torch.empty(outputs, rank)])
            own += [torch.empty(rank), torch.empty(outputs)]
        shared.setdefault((ends(name), inputs, outputs), pair)
    return sum(p.numel() for pair in shared.values() for p in pair) + sum(map(torch.numel, own))


@right("tied_lora_parameter_count")
def sorted_and_grouped(sizes: dict, rank: int) -> int:
    total = 0
    kinds = sorted((name.split(".")[-2:], size) for name, size in sizes.items())
    for (_, (inputs, outputs)), group in itertools.groupby(kinds):
        total += rank * inputs + outputs * rank + len(list(group)) * (rank + outputs)
    return total


@right("tied_lora_parameter_count")
def with_a_list_of_what_was_seen(sizes: dict, rank: int) -> int:
    seen: list = []
    total = 0
    for name, (inputs, outputs) in sizes.items():
        total += rank + outputs
        if (ends(name), (inputs, outputs)) not in seen:
            seen.append((ends(name), (inputs, outputs)))
            total += (inputs + outputs) * rank
    return total


@right("tied_lora_parameter_count")
def with_a_counter(sizes: dict, rank: int) -> int:
    kinds = Counter((ends(name), size) for name, size in sizes.items())
    return sum(rank * sum(size) + n * (rank + size[1]) for (_, size), n in kinds.items())


@wrong(
    "tied_lora_parameter_count",
    "You count an A and a B for each matrix, as LoRA has them. Here all matrices of a kind share one pair.",
)
def nothing_is_shared(sizes: dict, rank: int) -> int:
    return sum(rank * (i + o) + rank + o for i, o in sizes.values())


@wrong("tied_lora_parameter_count", "You leave out u and v, which each matrix has for itself.")
@changed(
    tied_lora_parameter_count, ("return shared + sum(rank + outputs for _, outputs in sizes.values())", "return shared")
)
def only_the_shared_ones() -> None: ...


@wrong("tied_lora_parameter_count", "You count u and v once for each kind. Each matrix has its own.")
def vectors_once_per_kind(sizes: dict, rank: int) -> int:
    kinds = {(ends(name), size) for name, size in sizes.items()}
    return sum(rank * (i + o) + rank + o for _, (i, o) in kinds)


@wrong("tied_lora_parameter_count", "You leave out u (r,), the vector between A and B.")
@changed(tied_lora_parameter_count, ("rank + outputs for", "outputs for"))
def without_u() -> None: ...


@wrong("tied_lora_parameter_count", "You leave out v (out,), the vector on the outputs.")
@changed(tied_lora_parameter_count, ("sum(rank + outputs for _, outputs in sizes.values())", "rank * len(sizes)"))
def without_v() -> None: ...


@wrong("tied_lora_parameter_count", "v is as long as the matrix has outputs, not inputs.")
@changed(
    tied_lora_parameter_count,
    ("sum(rank + outputs for _, outputs in sizes.values())", "sum(rank + i for i, _ in sizes.values())"),
)
def v_on_the_inputs() -> None: ...


@wrong(
    "tied_lora_parameter_count",
    "You compare only the last part of the names. `attn.c_proj` and `mlp.c_proj` are two kinds, even if their sizes "
    "agree.",
)
def the_last_part_only(sizes: dict, rank: int) -> int:
    kinds = {(name.split(".")[-1], size) for name, size in sizes.items()}
    return sum(rank * (i + o) for _, (i, o) in kinds) + sum(rank + o for _, o in sizes.values())


@wrong(
    "tied_lora_parameter_count", "You compare only the names. Matrices of different sizes cannot share an A and a B."
)
def names_without_sizes(sizes: dict, rank: int) -> int:
    kinds = {ends(name): size for name, size in sizes.items()}
    return sum(rank * (i + o) for i, o in kinds.values()) + sum(rank + o for _, o in sizes.values())


@wrong("tied_lora_parameter_count", "You compare only the sizes. Matrices with different names are of different kinds.")
@changed(
    tied_lora_parameter_count,
    ("kind_of(name, size) for name, size in sizes.items()", '("", size) for size in sizes.values()'),
)
def sizes_without_names() -> None: ...


@wrong(
    "tied_lora_parameter_count",
    "You treat (in, out) and (out, in) as the same size. An A for the one does not fit the other.",
)
def sides_in_any_order(sizes: dict, rank: int) -> int:
    kinds = {(ends(name), tuple(sorted(size))) for name, size in sizes.items()}
    return sum(rank * (i + o) for _, (i, o) in kinds) + sum(rank + o for _, o in sizes.values())


@wrong("tied_lora_parameter_count", "You share one A and B among all matrices. They are shared within a kind only.")
def one_pair_for_all(sizes: dict, rank: int) -> int:
    most = max(i for i, _ in sizes.values()) + max(o for _, o in sizes.values())
    return rank * most + sum(rank + o for _, o in sizes.values())


@wrong("tied_lora_parameter_count", "You count only u and v. In Tied-LoRA A and B are trained too, unlike in VeRA.")
@changed(tied_lora_parameter_count, ("return shared + sum", "return sum"))
def as_vera() -> None: ...


@wrong("tied_lora_parameter_count", "You count only A of each kind and leave out B.")
@changed(tied_lora_parameter_count, ("rank * (inputs + outputs)", "rank * inputs"))
def without_B() -> None: ...
