"""The command `lora-from-scratch`. Each subcommand is a module in this package with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lora_from_scratch.cli.help_texts import translate_help
from lora_from_scratch.support.plain_text import one_line
from lora_from_scratch.support.translation import ENGLISH, language

COMMANDS = (
    "demo",
    "shootout",
    "atlas",
    "e2e",
    "finetune",
    "generate",
    "evaluate",
    "serve",
    "inspect",
    "pretrain",
    "lab",
    "progress",
    "check-submission",
    "leaderboard",
    "course",
    "build",
    "intake",
    "grade",
    "similar",
    "teaching",
    "room",
    "bundle",
    "doctor",
    "wheelhouse",
    "make",
)

BAD_INPUT = 2  # exit code for errors that the user can fix
INTERRUPTED = 130  # what a shell reports for Ctrl-C
BROKEN_PIPE = 141  # what a shell reports for a closed pipe (SIGPIPE)

EPILOG = """\
examples:
  lora-from-scratch demo                                     full fine-tuning and LoRA, side by side
  lora-from-scratch shootout                                 every core method on the same task
  lora-from-scratch atlas                                    all methods, with three seeds (hours)
  lora-from-scratch finetune --method lora --rank 4          train an adapter, saved in runs/story-cards-lora
  lora-from-scratch generate --adapter runs/story-cards-lora --card "hero[fox], wish[a crown], ending[happy]"
  lora-from-scratch evaluate --adapter runs/story-cards-lora

"lora-from-scratch COMMAND --help" describes a command.
"""


class Parser(argparse.ArgumentParser):
    """A parser that raises `ValueError` for bad arguments, so that they are reported like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Build a parser for these commands. Only their modules are imported."""
    from lora_from_scratch import __version__

    parser = Parser(
        prog="lora-from-scratch",
        description="Parameter-efficient fine-tuning of a GPT-2 on a laptop, without a GPU or a network connection.",
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
    """Run a command; bad input gives a one-line error and exit code 2.

    LORA_FROM_SCRATCH_DEBUG=1 in the environment shows the traceback instead.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail on a character that the terminal cannot show
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None or os.environ.get("LORA_FROM_SCRATCH_DEBUG"):
            raise
        if isinstance(error, OSError):
            _drop_output()
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"error: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume training from the last checkpoint", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    # Import only the module that is needed: `doctor` must run even where the others cannot be imported.
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise ValueError(_no_such_command(arguments[0]))
    known = arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS
    parser = build_parser(known)
    if language() != ENGLISH:
        translate_help(parser)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    code = int(options.run(options) or 0)
    sys.stdout.flush()  # report a full disk now, not while Python shuts down
    return code


def _no_such_command(name: str) -> str:
    alike = difflib.get_close_matches(name, COMMANDS, 1)
    meant = f"did you mean {alike[0]!r}?" if alike else f"there are {', '.join(COMMANDS)}"
    return f"there is no command {name!r}; {meant}"


def _reason(error: Exception) -> str | None:
    """The one-line message for the user, or None for a bug in the program, which shows its traceback."""
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
    """PyTorch has an exception class for a full GPU, but reports full main memory as a `RuntimeError`."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _drop_output() -> None:
    """Discard buffered output that cannot be written; Python would otherwise fail on it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
