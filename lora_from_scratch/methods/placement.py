"""Where a LoRA goes: which matrices of a model are meant by a name, and what they cost.

LoRA's cost is decided by two choices, which matrices and which rank. Hu et al. (2021, arXiv:2106.09685, sections 7.1
and 7.2) ask for the best of both under a fixed number of trained parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_from_scratch.linear_algebra.rank import low_rank_parameter_count

FUSED_PARTS = {"c_attn": ("q", "k", "v")}  # equal parts, side by side on the output axis

# --- Which matrices --------------------------------------------------------------------------------------


def find_targets(model: nn.Module, targets: Sequence[str] | str) -> dict[str, tuple[str, ...]]:
    """The linear layers that are meant, in the model's order, each with its parts (none: the whole layer).

    Args:
        targets: names, each the end of a module's name at a dot, as in PEFT: "c_attn", "mlp.c_proj". A part
            of a fused layer is written behind its name: "c_attn.q". One string is a regular expression
            for the whole name; "all-linear" means every linear layer.

    Raises:
        ValueError: a name or the expression matches nothing.
    """
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    part_of = {f"{name}.{part}": (name, part) for name in layers for part in FUSED_PARTS.get(last_part(name), ())}
    known = [*layers, *part_of]
    if targets == "all-linear":
        chosen = set(layers)
    elif isinstance(targets, str):
        chosen = {name for name in known if compile_pattern(targets).fullmatch(name)}
        if not chosen:
            hint = f" (one string is a regular expression for the whole name; for a name, give ({targets!r},))"
            raise ValueError(f"the target {targets!r} matches nothing{hint}; {describe_names(known)}")
    else:
        chosen = set()
        for target in targets:
            found = {name for name in known if name == target or name.endswith(f".{target}")}
            if not found:
                raise ValueError(f"the target {target!r} matches nothing; {describe_names(known)}")
            chosen |= found
    plan: dict[str, tuple[str, ...]] = {}
    for name in layers:
        parts = tuple(part for full, (layer, part) in part_of.items() if layer == name and full in chosen)
        if name in chosen:
            plan[name] = ()
        elif parts:
            plan[name] = parts
    return plan


def is_linear(module: nn.Module) -> bool:
    """Linear, Conv1D, or another layer that says what it takes and gives; a LoRA around one is not one itself."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def describe_names(names: Sequence[str] | Mapping[str, Any]) -> str:
    """The names that exist, those of all blocks together."""
    return "the model has " + ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".(n).", name) for name in names))


# --- What they cost --------------------------------------------------------------------------------------


def target_sizes(model: nn.Module, targets: Sequence[str] | str) -> list[tuple[int, int]]:
    """The matrices that these targets mean (see `find_targets`), each as (in, out), in the model's order.

    A part of a fused layer is a matrix of its own: "c_attn.q" of GPT-2 is (d, d), "c_attn" is (d, 3 d).

    Raises:
        ValueError: a target matches nothing.
    """
    sizes = []
    for name, parts in find_targets(model, targets).items():
        layer: Any = model.get_submodule(name)
        inputs, outputs = layer.in_features, layer.out_features
        if parts:
            sizes += [(inputs, outputs // len(FUSED_PARTS[last_part(name)]))] * len(parts)
        else:
            sizes.append((inputs, outputs))
    return sizes


def lora_parameter_count(sizes: Sequence[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA trains: the A (r, in) and the B (out, r) of every matrix that it adapts.

    Example: r = 4 on the q and v of GPT-2 small, 12 blocks of width 768. `sizes` has 24 pairs (768, 768), and the count
    is 147,456.

    Args:
        sizes: of each adapted matrix, one pair (in, out); they may differ.
        rank: r, the same for all of them.
    """
    return sum(low_rank_parameter_count(outputs, inputs, rank) for inputs, outputs in sizes)


def rank_for_budget(sizes: Sequence[tuple[int, int]], budget: int) -> int:
    """The largest rank, the same for all these matrices, whose A and B together have at most `budget` numbers.

    However large the budget, it is never above the smallest of all the matrices' sides: the rank of a matrix is at most
    its smaller side.

    Args:
        sizes: of each adapted matrix, one pair (in, out); at least one.
        budget: the most numbers that may be trained.

    Raises:
        ValueError: the budget is too small for r = 1.
    """
    smallest = lora_parameter_count(sizes, rank=1)
    if budget < smallest:
        raise ValueError(f"budget must be at least {smallest:,}, which r = 1 takes on these matrices, got {budget:,}")
    return min(budget // smallest, *(min(size) for size in sizes))
