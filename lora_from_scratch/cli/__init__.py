"""The command `lora-from-scratch`. Every command is a module here with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

COMMANDS = ("demo", "finetune", "generate", "evaluate", "pretrain", "doctor")

BAD_INPUT = 2  # the exit code when the person can mend it
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    import importlib

    from lora_from_scratch import __version__

    parser = argparse.ArgumentParser(
        prog="lora-from-scratch",
        description="Parameter-efficient fine-tuning of a GPT-2, on a laptop, without a GPU and without a network.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"lora_from_scratch.cli.{name}")
        module.add_parser(commands).set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Bad input ends with one line and exit code 2; LORA_FROM_SCRATCH_DEBUG=1 shows the traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options = build_parser().parse_args(arguments)
        return int(options.run(options) or 0)
    except (ValueError, OSError) as error:
        if os.environ.get("LORA_FROM_SCRATCH_DEBUG"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; a training run goes on from its last checkpoint when started again", file=sys.stderr)
        return INTERRUPTED


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__
