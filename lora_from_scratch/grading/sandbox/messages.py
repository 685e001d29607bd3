"""Messages to a learner whose code ended the process that ran it."""

from __future__ import annotations

from lora_from_scratch.grading.sandbox.job import MIB, Limits

NOT_RUN = "This was not run: the time for the whole notebook was up, or its code had ended Python too often."
TIME_IS_UP = "The time for the whole notebook was up before everything had run."
AGAIN = " The rest of the notebook was run without this."


def early_exit_message(why: str, detail: str, limits: Limits) -> str:
    """One or two sentences in the second person.

    Args:
        detail: what the supervisor knows: "SIGSEGV", "300 threads".
    """
    said = {
        "exited": f"Your code here ended Python itself ({detail}), for example with `os._exit` or a signal.",
        "crashed": f"Python crashed here ({detail}): something below Python failed, or your code sent it a signal.",
        "memory": f"Your code here needed more than {limits.memory // MIB:,} MiB of memory, which ended Python.",
        "wall time": "Your code here did not finish in time and was stopped.",
        "processor time": f"Your notebook used more than {limits.processor_seconds:,} seconds of processor time here.",
        "threads": f"Your code here started too many threads ({detail}; at most {limits.threads} are allowed).",
        "files": f"Your code here created too many files ({detail}; at most {limits.files:,} are allowed).",
        "frames": f"Your code here interfered with the grading: {detail}.",
    }
    return said[why] + AGAIN


def stopped_message(limits: Limits) -> str:
    return f"This cell was stopped after {limits.cell_seconds:g} seconds; the cells below it were run."
