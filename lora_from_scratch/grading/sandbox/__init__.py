"""The sandbox in which a learner's notebook runs when it is graded.

    observed = observe_notebook(Job("09", (Run("cell-1", "..."), Probe("rank", seed, "check-rank")), cache))

The result is data, never objects: the observations of each exercise, which `checks.judge.judge` turns into verdicts
outside the sandbox. No learner's code runs in this process.
"""

from lora_from_scratch.grading.sandbox.job import (
    EarlyExit,
    Guess,
    Isolation,
    Job,
    Limits,
    Observations,
    Output,
    Probe,
    ProbeResult,
    Run,
    Step,
)
from lora_from_scratch.grading.sandbox.observing import SandboxError, observe_notebook, unavailable

__all__ = [
    "EarlyExit",
    "Guess",
    "Isolation",
    "Job",
    "Limits",
    "Observations",
    "Output",
    "Probe",
    "ProbeResult",
    "Run",
    "SandboxError",
    "Step",
    "observe_notebook",
    "unavailable",
]
