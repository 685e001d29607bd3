"""Create the zip file with which Gradescope or PrairieLearn grades a unit, using this course's checks."""

from __future__ import annotations

import importlib.metadata
import json
import re
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lora_from_scratch.checks.units import PACKAGE as CHECKS
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.cohort import FILE
from lora_from_scratch.grading.platforms.results import Visibility
from lora_from_scratch.support.files import write_atomically

Platform = Literal["gradescope", "prairielearn"]
PACKAGE = CHECKS.parent
BESIDES = ("nbformat", "ipython")  # packages that grading needs in addition to the library's requirements
DATE = (2020, 1, 1, 0, 0, 0)  # the date of every file, so that equal contents give equal bundles

SETUP = """\
#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image. Choose the base image Ubuntu 24.04 or newer.
# PyTorch's CPU build is a tenth of the size: set PIP_EXTRA_INDEX_URL here to its own index of CPU builds.
set -euo pipefail
apt-get update
apt-get install -y bubblewrap python3-venv
python3 -m venv /opt/lora-from-scratch
/opt/lora-from-scratch/bin/pip install --no-cache-dir -r /autograder/source/requirements.txt
"""

RUN_AUTOGRADER = """\
#!/usr/bin/env bash
# Gradescope runs this for each submission, as root. What the learner's code must not see or change is for root only.
set -euo pipefail
ROOT="${{AUTOGRADER_ROOT:-/autograder}}"
mkdir -p "$ROOT/results"
chmod -R go= "$ROOT/source" "$ROOT/results"
export PYTHONPATH="$ROOT/source"
"${{PYTHON:-/opt/lora-from-scratch/bin/python}}" -m lora_from_scratch.grading.platforms.container \\
    gradescope "$ROOT/source/kit" "$ROOT/submission" "$ROOT/results/results.json" --visibility {visibility}
"""

GRADE_SH = """\
#!/usr/bin/env bash
# PrairieLearn runs this for each submission. What the learner's code must not see or change is for its owner only.
set -euo pipefail
ROOT="${GRADE_ROOT:-/grade}"
mkdir -p "$ROOT/results"
chmod -R go= "$ROOT"
"${PYTHON:-python3}" -m lora_from_scratch.grading.platforms.container \\
    prairielearn "$ROOT/tests" "$ROOT/student" "$ROOT/results/results.json"
"""

DOCKERFILE = """\
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /tmp/
RUN pip install --no-cache-dir -r /tmp/requirements.txt
COPY lora_from_scratch /opt/course/lora_from_scratch
ENV PYTHONPATH=/opt/course
"""

QUESTION = """\
<pl-question-panel>
  <p>Hand in your notebook of unit {number}, {title}.</p>
  <pl-file-upload file-names="{name}.ipynb"></pl-file-upload>
</pl-question-panel>
<pl-submission-panel>
  <pl-external-grader-results></pl-external-grader-results>
</pl-submission-panel>
"""


def write_bundle(
    platform: Platform, unit: Unit, released: Path, secret: str, path: Path, visibility: Visibility, image: str
) -> None:
    """Write the bundle.

    Args:
        platform: "gradescope" or "prairielearn".
        unit: the unit.
        released: the released notebook.
        secret: the cohort's secret.
        path: the zip file to write.
        visibility: for Gradescope, when learners see the results.
        image: for PrairieLearn, the name of the image in the container registry.

    Raises:
        ValueError: the unit is not one of the library's own.
        OSError: the file cannot be written.
    """
    if not (CHECKS / f"unit_{unit.number}").is_dir():
        raise ValueError(f"only the library's own units can be bundled, and unit {unit.number} is defined elsewhere")
    kit = {f"unit_{unit.number}.ipynb": released.read_bytes(), FILE: f"{json.dumps({'secret': secret})}\n".encode()}
    files = _gradescope(kit, visibility) if platform == "gradescope" else _prairielearn(unit, kit, image)
    write_atomically(path, lambda temporary: _write(temporary, dict(files)))


def requirements() -> str:
    """The packages needed for grading, pinned to the versions installed here."""
    declared = [name for name in importlib.metadata.requires("lora-from-scratch") or () if "extra ==" not in name]
    names = [re.split(r"[^\w.-]", name)[0] for name in declared]
    return "".join(f"{name}=={_version(name)}\n" for name in sorted({*names, *BESIDES}))


def _version(name: str) -> str:
    return importlib.metadata.version(name).partition("+")[0]  # not every index has builds such as "+cpu"


def _gradescope(kit: dict[str, bytes], visibility: Visibility) -> Iterator[tuple[str, bytes]]:
    yield "setup.sh", SETUP.encode()
    yield "run_autograder", RUN_AUTOGRADER.format(visibility=visibility).encode()
    yield "requirements.txt", requirements().encode()
    yield from ((f"kit/{name}", content) for name, content in kit.items())
    yield from _library("lora_from_scratch")


def _prairielearn(unit: Unit, kit: dict[str, bytes], image: str) -> Iterator[tuple[str, bytes]]:
    name = f"unit_{unit.number}"
    question = f"questions/lora_from_scratch_{name}"
    info = {
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"lora-from-scratch.{name}")),
        "title": f"Unit {unit.number}: {unit.title}",
        "topic": "LoRA from scratch",
        "type": "v3",
        "gradingMethod": "External",
        "externalGradingOptions": {
            "enabled": True,
            "image": image,
            "entrypoint": "/grade/tests/grade.sh",
            "timeout": 600,
            "enableNetworking": False,
        },
    }
    yield f"{question}/info.json", f"{json.dumps(info, indent=2)}\n".encode()
    text = QUESTION.format(number=unit.number, title=unit.title, name=name)
    yield f"{question}/question.html", text.encode()
    yield f"{question}/tests/grade.sh", GRADE_SH.encode()
    yield from ((f"{question}/tests/{name}", content) for name, content in kit.items())
    yield "image/Dockerfile", DOCKERFILE.encode()
    yield "image/requirements.txt", requirements().encode()
    yield from _library("image/lora_from_scratch")


def _library(to: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{to}/{path.relative_to(PACKAGE).as_posix()}", path.read_bytes()


def _write(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, DATE)
            runs = content.startswith(b"#!")
            info.external_attr = (0o100755 if runs else 0o100600 if name.endswith(FILE) else 0o100644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
