"""Calling the command line in this process."""

from __future__ import annotations

import contextlib
import io

from lora_from_scratch.cli import main


def call(*arguments: object) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def complaint(*arguments: object) -> str:
    """The one-line error message for bad input."""
    code, _, err = call(*arguments)
    assert code == 2
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum("error: " in line for line in lines) == 1
    return lines[-1]


def output_of(*arguments: object) -> str:
    code, out, err = call(*arguments)
    assert code == 0, err
    return out
