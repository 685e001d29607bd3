"""The command `lora-from-scratch`. Every command is a module here with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lora_from_scratch.support.plain_text import one_line

COMMANDS = (
    "demo",
    "shootout",
    "finetune",
    "generate",
    "evaluate",
    "pretrain",
    "lab",
    "progress",
    "check-submission",
    "leaderboard",
    "build",
    "grade",
    "doctor",
)

BAD_INPUT = 2  # the exit code when the person can mend it
INTERRUPTED = 130  # what a shell reports for Ctrl-C
NOBODY_READS = 141  # and for a pipe that was closed

EPILOG = """\
examples:
  lora-from-scratch demo                                     full fine-tuning and LoRA, side by side
  lora-from-scratch shootout                                 every core method on the same task
  lora-from-scratch finetune --method lora --rank 4          your own adapter, in runs/story-cards-lora
  lora-from-scratch generate --adapter runs/story-cards-lora --card "hero[fox], wish[a crown], ending[happy]"
  lora-from-scratch evaluate --adapter runs/story-cards-lora

"lora-from-scratch COMMAND --help" explains a command. Every flag has a default that works.
"""


class Parser(argparse.ArgumentParser):
    """A parser that raises what it does not understand, so that it ends in one line like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line with these commands. Only their modules are imported."""
    from lora_from_scratch import __version__

    parser = Parser(
        prog="lora-from-scratch",
        description="Parameter-efficient fine-tuning of a GPT-2, on a laptop, without a GPU and without a network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in commands:
        module = importlib.import_module(f"lora_from_scratch.cli.{name.replace('-', '_')}")
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Bad input ends with one line and exit code 2; LORA_FROM_SCRATCH_DEBUG=1 shows the traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that this terminal cannot show is no reason to stop
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None or os.environ.get("LORA_FROM_SCRATCH_DEBUG"):
            raise
        if isinstance(error, OSError):
            _drop_output()
        if isinstance(error, BrokenPipeError):
            return NOBODY_READS
        print(f"error: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; a training run goes on from its last checkpoint when started again", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    # Only the module that is needed: `doctor` has to run where nothing else does.
    known = arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS
    parser = build_parser(known)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    code = int(options.run(options) or 0)
    sys.stdout.flush()  # a full disk shows now, and not when Python ends
    return code


def _reason(error: Exception) -> str | None:
    """What to say to the person, in one line; None: a mistake of the program, which shows its traceback."""
    if isinstance(error, ImportError):
        return f"{error}; the installation is incomplete, see: lora-from-scratch doctor"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    if _is_out_of_memory(error):
        return "not enough memory; try a smaller batch, --gradient-checkpointing or a smaller model"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch reports a GPU's memory by a class of its own, the computer's by a sentence."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _drop_output() -> None:
    """If standard output is what failed, Python would try to write the rest of it once more at the end, and fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
