"""Grade one submission in a container of Gradescope or PrairieLearn, and write results.json.

    python -m lora_from_scratch.grading.platforms.container gradescope KIT SUBMISSION RESULTS

The learner's code runs in another process, with the best isolation that the container allows: in bubblewrap if user
namespaces can be created; else, if run by root, as the user "nobody", who cannot read the kit or write the results;
else as the same user.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lora_from_scratch.grading import sandbox
from lora_from_scratch.grading.cohort import FILE, secret_of
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.grading.platforms.results import (
    Visibility,
    for_gradescope,
    for_prairielearn,
    found_in,
    is_readable,
)
from lora_from_scratch.grading.sandbox import Isolation
from lora_from_scratch.support.files import write_json

FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="container", description=__doc__)
    parser.add_argument("platform", choices=["gradescope", "prairielearn"])
    parser.add_argument("kit", type=Path, help="the folder with the released notebook and cohort.json")
    parser.add_argument("submission", type=Path, help="the folder with the submission")
    parser.add_argument("results", type=Path, help="the file to write")
    parser.add_argument("--visibility", choices=get_args(Visibility), default="visible")
    options = parser.parse_args(arguments)
    isolation = best_isolation()
    print(f"isolation: {isolation}")
    graded = grade_one(options.submission, options.kit, isolation)
    if options.platform == "gradescope" and not is_readable(graded):
        print(found_in(graded))  # no results: Gradescope then reports a failure instead of 0 points
        return FAILED
    document = (
        for_gradescope(graded, options.visibility) if options.platform == "gradescope" else for_prairielearn(graded)
    )
    write_json(options.results, document)
    return 0


def best_isolation() -> Isolation:
    """The best isolation that is available here."""
    if sandbox.unavailable() is None:
        return "bubblewrap"
    return "user" if os.geteuid() == 0 else "none"


def grade_one(submission: Path, kit: Path, isolation: Isolation) -> Graded:
    """Grade the notebook in a folder.

    Args:
        submission: the folder with the submission.
        kit: the folder with the released notebook unit_NN.ipynb and cohort.json.
        isolation: how to isolate the learner's code.

    Raises:
        ValueError, OSError: the kit is incomplete, or the sandbox cannot be started.
    """
    import nbformat

    from lora_from_scratch.grading.marking import Settings, mark_file
    from lora_from_scratch.grading.tasks import unit_of

    found = sorted(kit.glob("unit_*.ipynb"))
    if len(found) != 1 or not (kit / FILE).is_file():
        raise FileNotFoundError(f"{kit} should contain one released notebook and {FILE}; make the bundle again")
    released = nbformat.read(found[0], as_version=4)
    unit = unit_of(found[0].stem.removeprefix("unit_"))
    with tempfile.TemporaryDirectory(prefix="library-") as cache:
        os.chmod(cache, 0o755)  # the user "nobody" must be able to read the library from it
        settings = Settings(cache=Path(cache), isolation=isolation)
        return mark_file(submission / found[0].name, released, unit, "learner", secret_of(kit), settings)


if __name__ == "__main__":
    sys.exit(main())
