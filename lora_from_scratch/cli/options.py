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

from lora_from_scratch.method import METHODS, Method, method_class


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="MODEL",
        help='"bundled", a directory, or a name on the hub such as gpt2 (%(default)s)',
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="story-cards",
        metavar="DATA",
        help='"story-cards" or an E2E CSV file or its directory (%(default)s)',
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto (%(default)s)")


def add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=default,
        metavar="DIRECTORY",
        help=f"where the result goes ({default or 'runs/DATA-METHOD'})",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """`--method`, and a flag for every hyperparameter that some method has."""
    parser.add_argument("--method", default="lora", choices=list(METHODS), help="(%(default)s)")
    group = parser.add_argument_group("hyperparameters of the methods")
    for flag, uses in _hyperparameters().items():
        kind = uses[0][1]
        defaults = "; ".join(f"{method}: {default}" for method, _, default in uses)
        extra: dict[str, Any] = {"nargs": "+", "type": str} if kind is tuple else {"type": kind}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        group.add_argument(_flag(flag), default=None, dest=f"method_{flag}", help=f"({defaults})", **extra)


def method_from(options: argparse.Namespace) -> Method:
    """The method that the flags describe.

    Raises:
        ValueError: a flag that belongs to another method, or a value that the method refuses.
    """
    cls = method_class(options.method)
    own = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    given = {name[len("method_") :]: value for name, value in vars(options).items() if name.startswith("method_")}
    given = {name: value for name, value in given.items() if value is not None}
    foreign = [_flag(name) for name in given if name not in own]
    if foreign:
        allowed = ", ".join(_flag(name) for name in _hyperparameters() if name in own) or "none"
        raise ValueError(f"method {options.method} has no {', '.join(foreign)}; its hyperparameters are: {allowed}")
    if "targets" in given:
        given["targets"] = _targets(given["targets"])
    return cls(**given)


def _targets(words: list[str]) -> str | tuple[str, ...]:
    """Several names are names; one word with the signs of a regular expression is a pattern."""
    if len(words) == 1 and re.search(r"[\\^$*+?()\[\]|{}]", words[0]):
        return words[0]
    return tuple(words)


def _hyperparameters() -> dict[str, list[tuple[str, type, Any]]]:
    """Hyperparameter: the methods that have it, each with type and default. Only what fits on a command line."""
    found: dict[str, list[tuple[str, type, Any]]] = {}
    for method in METHODS:
        cls = method_class(method)
        hints = typing.get_type_hints(cls)
        for f in fields(cls):  # type: ignore[arg-type]
            kind = _plain_type(hints[f.name])
            if kind and f.default is not MISSING and f.name != "seed":
                default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
                found.setdefault(f.name, []).append((method, kind, default))
    return found


def _plain_type(hint: Any) -> type | None:
    """What a flag can hold: bool, int, float, str, or tuple for several words; None for anything else."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if any(typing.get_origin(choice) in (tuple, Sequence) for choice in choices):
        return tuple
    return next((kind for kind in (bool, int, float, str) if kind in choices), None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
