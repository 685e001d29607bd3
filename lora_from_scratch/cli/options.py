"""Flags that several commands share, and flags generated from the fields of the methods."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_from_scratch.finetune.evaluation import CARDS
from lora_from_scratch.finetune.training import PRECISIONS
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import for_training, method_class, method_classes

METAVARS = {"init_text": "TEXT"}
Kind = tuple[type, bool]  # the type of a value, and whether the flag takes several


def add_gpt2(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="MODEL",
        help='the GPT-2: "bundled", a directory, or a name on the Hugging Face Hub such as gpt2 (%(default)s)',
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="MODEL",
        help='the model: "bundled", "smollm2", the directory of a causal language model that transformers can load, or '
        "a GPT-2 on the Hugging Face Hub, such as gpt2 (%(default)s)",
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        type=directory,
        metavar="DIRECTORY",
        help="an adapter or a whole model written by finetune, or a PEFT adapter (none)",
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
        "--cards", type=int, default=CARDS, metavar="N", help="maximum number of cards to evaluate on (%(default)s)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, or auto for a GPU if there is one (cpu)"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="precision of the matrix products; weights are fp32 (%(default)s)",
    )


def add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--output",
        type=directory,
        default=Path(default) if default else None,
        metavar="DIRECTORY",
        help=f"where to write the result ({default or 'runs/DATA-METHOD'})",
    )


def add_seed(parser: Any) -> None:
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="random seed (%(default)s)")


def seed(text: str) -> int:
    """Parse a seed, a number that every random number generator accepts."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {number}")
    return number


def directory(text: str) -> Path:
    """Parse a path that is not empty, as an unset shell variable would make it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the directory is empty")
    return Path(text)


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add `--method`, and a flag for each hyperparameter of each method."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", default="lora", choices=list(method_classes()), help="fine-tuning method (%(default)s)"
    )
    for name, uses in _hyperparameters().items():
        defaults = "; ".join(f"{method}: {_written(default)}" for method, _, default in uses)
        kinds = [kind for _, kind, _ in uses]
        extra: dict[str, Any] = {"metavar": METAVARS.get(name, "NAME" if kinds[0][0] is str else "N")}
        if any(several for _, several in kinds):
            extra["nargs"] = "+"
        if kinds[0][0] is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        text = f"{_help(name, uses)} ({defaults})".replace("%", "%%")
        group.add_argument(_flag(name), default=None, dest=f"method_{name}", help=text, **extra)


def method_from(options: argparse.Namespace) -> Method:
    """Build the method that the flags describe.

    Raises:
        ValueError: a flag belongs to another method, or the method rejects a value.
    """
    cls = method_class(options.method)
    own = {name: use[1] for name, uses in _hyperparameters().items() for use in uses if use[0] == options.method}
    given = {name[len("method_") :]: value for name, value in vars(options).items() if name.startswith("method_")}
    given = {name: value for name, value in given.items() if value is not None}
    foreign = [_flag(name) for name in given if name not in own]
    if foreign:
        allowed = ", ".join(map(_flag, own)) or "none"
        raise ValueError(f"method {options.method} does not take {', '.join(foreign)}; its flags are: {allowed}")
    given = {name: _converted(name, value, *own[name]) for name, value in given.items()}
    return for_training(cls, options.seed, **given)


def _converted(name: str, value: Any, kind: type, several: bool) -> Any:
    """Convert a flag's value to the method's own type; one method may take one number where another takes several."""
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
    """Several words are names; a single word with characters special to regular expressions is a pattern."""
    if words == ("all-linear",) or (len(words) == 1 and re.search(r"[\\^$*+?()\[\]|{}]", words[0])):
        return words[0]
    return words


def _hyperparameters() -> dict[str, list[tuple[str, Kind, Any]]]:
    """For each hyperparameter with a help text: the methods that have it, each with its kind and default."""
    found: dict[str, list[tuple[str, Kind, Any]]] = {}
    for method, cls in method_classes().items():
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            kind = _kind(hints[f.name])
            if kind and "help" in f.metadata:
                found.setdefault(f.name, []).append((method, kind, f.default))
    return found


def _help(name: str, uses: list[tuple[str, Kind, Any]]) -> str:
    """The help text of a hyperparameter, joined from those of the methods that have one of this name."""
    texts = [f.metadata["help"] for method, _, _ in uses for f in fields(method_class(method)) if f.name == name]
    return "; or ".join(dict.fromkeys(texts))


def _kind(hint: Any) -> Kind | None:
    """The type of a flag (bool, int, float or str) and whether it takes several; None if no flag can hold it."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for choice in choices:
        if typing.get_origin(choice) in (tuple, Sequence):
            element = _kind(typing.get_args(choice)[0])
            return element and (element[0], True)
    return next(((kind, False) for kind in (bool, int, float, str) if kind in choices), None)


def _written(default: Any) -> str:
    """Format a default value as a user would type it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None:
        return "not given"
    return (" ".join(map(str, default)) if isinstance(default, tuple) else f"{default}") or "none"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
