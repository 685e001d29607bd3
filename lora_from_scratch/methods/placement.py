"""Which matrices of a model LoRA adapts, and how many parameters that takes.

Two choices determine the cost of LoRA: which matrices, and which rank. Hu et al. (2021, arXiv:2106.09685, sections 7.1
and 7.2) compare both under a fixed number of trained parameters.

The model may be any `nn.Module` with linear layers (`support/linear_layers.py`): our GPT-2, a transformers model, a
plain MLP. What a module does not reveal is declared here: which matrices are fused, and which is the output head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_from_scratch.linear_algebra.rank import low_rank_parameter_count
from lora_from_scratch.support.linear_layers import in_and_out, is_linear

T = TypeVar("T")

# Fused matrices, by the class of the parent module and the name in it: equal parts, side by side in the output.
FUSED_PARTS = {
    ("Attention", "c_attn"): ("q", "k", "v"),  # our GPT-2
    ("GPT2Attention", "c_attn"): ("q", "k", "v"),  # transformers'
}

CLASSIFIERS = ("score", "classifier")  # PEFT's SEQ_CLS_HEAD_NAMES
# Targets on our GPT-2 for random samples of methods: whole layers, and parts of c_attn.
WHOLE_LAYERS: tuple[Any, ...] = ("all-linear", ("c_attn",), ("mlp.c_proj", "c_fc"), r".*h\.0\..*c_proj")
PARTS = (("c_attn.q",), ("c_attn.q", "c_attn.v"), ("c_attn.v", "c_fc"))
MOST_NAMES = 25  # that an error message lists

# --- Which matrices --------------------------------------------------------------------------------------


def find_targets(model: nn.Module, targets: Sequence[str] | str) -> dict[str, tuple[str, ...]]:
    """The targeted linear layers, in the model's order, each with its targeted parts (empty: the whole layer).

    Args:
        targets: names, each the last component or components of a module's name, as in PEFT: "c_attn", "mlp.c_proj".
            A part of a fused layer is appended to its name: "c_attn.q". A single string is a regular expression for
            the whole name; "all-linear" means every linear layer except the output head, as in PEFT.

    Raises:
        ValueError: a name or the expression matches nothing.
    """
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    part_of = {f"{name}.{part}": (name, part) for name in layers for part in fused_parts(model, name)}
    known = [*layers, *part_of]
    if targets == "all-linear":
        chosen = set(linear_layers(model))
        if not chosen:
            raise ValueError(f"'all-linear' matches nothing; {describe_names(known)}")
    elif isinstance(targets, str):
        chosen = {name for name in known if compile_pattern(targets).fullmatch(name)}
        if not chosen:
            hint = f" (one string is a regular expression for the whole name; for a name, give ({targets!r},))"
            raise ValueError(f"the target {targets!r} matches nothing{hint}; {describe_names(known)}")
    else:
        chosen = set()
        for target in targets:
            found = {name for name in known if ends_with(name, target)}
            if not found:
                every = "; targets='all-linear' adapts all but the output head" if layers else ""
                raise ValueError(f"the target {target!r} matches nothing; {describe_names(known)}{every}")
            chosen |= found
    plan: dict[str, tuple[str, ...]] = {}
    for name in layers:
        parts = tuple(part for full, (layer, part) in part_of.items() if layer == name and full in chosen)
        if name in chosen:
            plan[name] = ()
        elif parts:
            plan[name] = parts
    return plan


def ends_with(name: str, end: str) -> bool:
    """Whether a module's name is `end`, or ends with `.end`."""
    return name == end or name.endswith(f".{end}")


def random_targets(rng: Random, with_parts: bool) -> Any:
    """Targets on our GPT-2, for random samples of methods: whole layers, or parts of c_attn as well."""
    return rng.choice([*WHOLE_LAYERS, *PARTS] if with_parts else WHOLE_LAYERS)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a model except its output head, by name: what "all-linear" means here and in PEFT."""
    head = output_head(model)
    return {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that "all-linear" leaves out, if there is one.

    In a transformers language model it is the layer that computes the logits (`get_output_embeddings`). In a model for
    sequence classification it is the first of `CLASSIFIERS` that exists, as in PEFT with the task type SEQ_CLS. Other
    models, image classifiers among them, have no head that PEFT leaves out.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and "ForSequenceClassification" in type(model).__name__:
        head = classifier(model)
    return head if isinstance(head, nn.Module) else None


def classifier(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to classes, under one of transformers' names for it."""
    found = (getattr(model, name, None) for name in CLASSIFIERS)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def fused_parts(model: nn.Module, name: str) -> tuple[str, ...]:
    """The parts of the fused matrix of that name, in the order of the output axis; empty if it is not fused."""
    parent, _, child = name.rpartition(".")
    parts = FUSED_PARTS.get((type(model.get_submodule(parent)).__name__, child), ())
    return parts if parts and in_and_out(model.get_submodule(name))[1] % len(parts) == 0 else ()


def by_pattern(values: Mapping[str, T], name: str, otherwise: T) -> T:
    """The value of the first pattern that matches the end of the name, as PEFT reads `rank_pattern`."""
    return next((value for pattern, value in values.items() if matches_end(pattern, name)), otherwise)


def check_patterns(patterns: Sequence[str], names: Sequence[str] | Mapping[str, Any]) -> None:
    """Raise a ValueError if a pattern matches the end of no name."""
    for pattern in patterns:
        if not any(matches_end(pattern, name) for name in names):
            raise ValueError(f"the pattern {pattern!r} matches none of the targets; {describe_names(names)}")


def matches_end(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a module's whole name, or everything after one of its dots."""
    return compile_pattern(rf"(.*\.)?({pattern})").fullmatch(name) is not None


def check_ranks_and_alphas(
    rank: int, rank_pattern: Mapping[str, int], alpha: float, alpha_pattern: Mapping[str, float]
) -> None:
    """Raise a ValueError if a rank is not a whole number of at least 1, or an alpha not a positive number."""
    ranks = {"rank": rank} | {f"rank of the pattern {p!r}": r for p, r in rank_pattern.items()}
    for name, r in ranks.items():
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {r!r}")
    alphas = {"alpha": alpha} | {f"alpha of the pattern {p!r}": a for p, a in alpha_pattern.items()}
    for name, a in alphas.items():
        if not isinstance(a, int | float) or not math.isfinite(a) or a <= 0:
            raise ValueError(f"{name} must be a positive number, got {a!r}")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def describe_names(names: Sequence[str] | Mapping[str, Any]) -> str:
    """The names that exist, with the indices of the blocks written as (n)."""
    kinds = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?=\.)", "(n)", name) for name in names))
    more = f" and {len(kinds) - MOST_NAMES} more" if len(kinds) > MOST_NAMES else ""
    return f"the model has {', '.join(kinds[:MOST_NAMES])}{more}" if kinds else "the model has no linear layers"


# --- Fused matrices ------------------------------------------------------------------------------------


def block_diagonal_B(B: Tensor, parts: Sequence[str], all_parts: Sequence[str]) -> Tensor:
    """The B of one LoRA on a whole fused matrix that does what n LoRAs on n of its parts do.

    A fused matrix makes several outputs side by side, each `width` wide: GPT-2's `c_attn` makes q, then k, then v. n
    of them are adapted, each by an A (r, in) and a B (width, r) of its own. With their A below each other as one
    (n r, in), h = A x holds n times r numbers, and part i may read its own r of them only:

        for q and v of q, k, v:   B_q   0        rows of q
                                   0    0        rows of k, which is not adapted
                                   0   B_v       rows of v

    This is what loralib's `MergedLinear` computes. Gradients flow to B.

    Args:
        B: (n * width, r): the B of the adapted parts below each other, in the order of the output axis.
        parts: the names of those n parts, in the same order.
        all_parts: the names of all the parts of the fused matrix, in the order of the output axis.

    Returns:
        (len(all_parts) * width, n * r), in the dtype of B and on its device.
    """
    blocks = dict(zip(parts, B.chunk(len(parts)), strict=True))  # each (width, r)
    nothing = B.new_zeros(len(B) // len(parts), 0)  # the rows of a part that is not adapted, and no column
    return torch.block_diag(*(blocks.get(part, nothing) for part in all_parts))


# --- What they cost --------------------------------------------------------------------------------------


def target_sizes(model: nn.Module, targets: Sequence[str] | str) -> list[tuple[int, int]]:
    """The matrices that these targets mean (see `find_targets`), each as (in, out), in the model's order.

    A part of a fused layer is a matrix of its own: "c_attn.q" of GPT-2 is (d, d), "c_attn" is (d, 3 d).

    Raises:
        ValueError: a target matches nothing.
    """
    sizes = []
    for name, parts in find_targets(model, targets).items():
        inputs, outputs = in_and_out(model.get_submodule(name))
        if parts:
            sizes += [(inputs, outputs // len(fused_parts(model, name)))] * len(parts)
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
