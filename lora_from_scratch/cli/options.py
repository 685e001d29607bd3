"""Flags that several commands share, and the flags that are made from a method's own fields."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lora_from_scratch.finetune.evaluation import CARDS
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import METHODS, method_class

# What the hyperparameters are, for the help. A method may have others; they need no line here.
HYPERPARAMETERS = {
    "rank": "r of the thin matrices A and B",
    "alpha": "strength: the change is scaled by alpha / rank",
    "targets": "the layers to adapt, by name (c_attn, mlp.c_proj), part (c_attn.q) or one regular expression",
    "dropout": "share of the inputs that is dropped in training",
    "rslora": "scale by alpha / sqrt(rank) instead",
    "width": "of the bottleneck",
    "variant": "of the method",
    "scaling": "strength of what is added",
    "layers": "the blocks to adapt, counted from 0; none named: all",
    "frozen_layers": "so many blocks at the bottom stay as they are",
    "num_virtual_tokens": "so many learned vectors stand before the text",
    "init": "what they are at the start: vocabulary, text or random",
    "init_text": "the words that they are at the start, with --init text; repeated if they are fewer",
    "double_quantization": "quantise the scales of the blocks too",
    "blocksize": "weights that share one scale",
    "quant_type": "the 4-bit code of the base weights",
    "loftq_iterations": "start A and B from what quantising lost, in so many rounds (LoftQ)",
    "top_layers": "in so many blocks, counted from the top; not given: all but the lowest two",
    "reparametrise": "let an MLP make the prefix in training",
    "hidden": "width of that MLP",
    "as_peft": "compute as PEFT does, not as the paper",
    "bias_layers": "in so many blocks above them the biases are trained",
}
METAVARS = {"init_text": "TEXT"}
# Fields without a flag of their own: --seed sets the first, the others are for programs.
NOT_FLAGS = ("seed", "keep_base", "init_ids")

Kind = tuple[type, bool]  # of what, and whether of several


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="MODEL",
        help='the GPT-2: "bundled", a directory, or a name on the Hugging Face Hub such as gpt2 (%(default)s)',
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        type=directory,
        metavar="DIRECTORY",
        help="what finetune wrote, an adapter or a whole model; or an adapter of PEFT (none)",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="story-cards",
        metavar="DATA",
        help='the task: "story-cards", an E2E CSV file, or a directory with E2E\'s three files (%(default)s)',
    )


def add_cards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cards", type=int, default=CARDS, metavar="N", help="judge by so many cards, or all if fewer (%(default)s)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, or auto: a GPU if there is one (cpu)"
    )


def add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--output",
        type=directory,
        default=Path(default) if default else None,
        metavar="DIRECTORY",
        help=f"where the result goes ({default or 'runs/DATA-METHOD'})",
    )


def add_seed(parser: Any, of: str) -> None:
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help=f"of {of}: the same seed, the same result (%(default)s)"
    )


def seed(text: str) -> int:
    """A number that every random number generator takes."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {number}")
    return number


def directory(text: str) -> Path:
    """A path that is not empty, as an unset variable of a shell would make it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the directory is empty")
    return Path(text)


def add_method(parser: argparse.ArgumentParser) -> None:
    """`--method`, and a flag for every hyperparameter that some method has."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", default="lora", choices=list(METHODS), help="what is trained (%(default)s)")
    for name, uses in _hyperparameters().items():
        defaults = "; ".join(f"{method}: {_written(default)}" for method, _, default in uses)
        kinds = [kind for _, kind, _ in uses]
        extra: dict[str, Any] = {"metavar": METAVARS.get(name, "NAME" if kinds[0][0] is str else "N")}
        if any(several for _, several in kinds):
            extra["nargs"] = "+"
        if kinds[0][0] is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        text = f"{HYPERPARAMETERS.get(name, '')} ({defaults})".strip().replace("%", "%%")
        group.add_argument(_flag(name), default=None, dest=f"method_{name}", help=text, **extra)


def method_from(options: argparse.Namespace) -> Method:
    """The method that the flags describe.

    Raises:
        ValueError: a flag that belongs to another method, or a value that the method refuses.
    """
    cls = method_class(options.method)
    own = {name: use[1] for name, uses in _hyperparameters().items() for use in uses if use[0] == options.method}
    given = {name[len("method_") :]: value for name, value in vars(options).items() if name.startswith("method_")}
    given = {name: value for name, value in given.items() if value is not None}
    foreign = [_flag(name) for name in given if name not in own]
    if foreign:
        allowed = ", ".join(map(_flag, own)) or "none"
        raise ValueError(f"method {options.method} has no {', '.join(foreign)}; its hyperparameters are: {allowed}")
    given = {name: _converted(name, value, *own[name]) for name, value in given.items()}
    fixed = {"seed": options.seed, "keep_base": False}  # `undo` is never called here: spare the memory of a copy
    given |= {f.name: fixed[f.name] for f in fields(cls) if f.name in fixed}  # type: ignore[arg-type]
    return cls(**given)


def _converted(name: str, value: Any, kind: type, several: bool) -> Any:
    """What was typed, as the method's own type: one flag may be a number for one method and several for another."""
    if isinstance(value, bool):
        return value
    words = value if isinstance(value, list) else [value]
    if name == "targets":
        return _targets(tuple(words))
    if len(words) > 1 and not several:
        raise ValueError(f"{_flag(name)} takes one value for this method, got {len(words)}: {' '.join(words)}")
    try:
        converted = tuple(kind(word) for word in words)
    except ValueError:
        wanted = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{_flag(name)} takes {wanted}, got {' '.join(words)!r}") from None
    return converted if several else converted[0]


def _targets(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """Several names are names; one word with the signs of a regular expression is a pattern."""
    if words == ("all-linear",) or (len(words) == 1 and re.search(r"[\\^$*+?()\[\]|{}]", words[0])):
        return words[0]
    return words


def _hyperparameters() -> dict[str, list[tuple[str, Kind, Any]]]:
    """Hyperparameter: the methods that have it, each with kind and default. Only what fits on a command line."""
    found: dict[str, list[tuple[str, Kind, Any]]] = {}
    for method in METHODS:
        cls = method_class(method)
        hints = typing.get_type_hints(cls)
        for f in fields(cls):  # type: ignore[arg-type]
            kind = _kind(hints[f.name])
            if kind and f.default is not MISSING and f.name not in NOT_FLAGS:
                found.setdefault(f.name, []).append((method, kind, f.default))
    return found


def _kind(hint: Any) -> Kind | None:
    """Of what a flag is (bool, int, float or str), and whether of several; None for what no flag can hold."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for choice in choices:
        if typing.get_origin(choice) in (tuple, Sequence):
            element = _kind(typing.get_args(choice)[0])
            return element and (element[0], True)
    return next(((kind, False) for kind in (bool, int, float, str) if kind in choices), None)


def _written(default: Any) -> str:
    """A default as a person would type it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None:
        return "not given"
    return (" ".join(map(str, default)) if isinstance(default, tuple) else f"{default}") or "none"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
