"""The course's files in another language."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_from_scratch.support.course_files import IGNORED, install_command
from lora_from_scratch.support.translated_notebook import translated
from lora_from_scratch.support.translation import ENGLISH, translated_units


@contextlib.contextmanager
def files_in(language: str, source: Path, inside: tuple[str, ...] = ("",)) -> Iterator[Path]:
    """A folder with the files of `source` in a language: `source` itself, or a temporary copy of it.

    Only the units' notebooks are translated, and only those of the units that have a catalogue.

    Args:
        inside: the folders of `source` that are needed.

    Raises:
        ImportError: Babel, which reads the translations, is not installed.
    """
    if language == ENGLISH:
        yield source
        return
    if importlib.util.find_spec("babel") is None:
        raise ImportError(f"Babel, which reads the translations, is not installed; run: {install_command('[course]')}")
    units = translated_units(language)
    with tempfile.TemporaryDirectory() as place:
        for name in inside:
            shutil.copytree(source / name, Path(place, "files", name), ignore=shutil.ignore_patterns(*IGNORED))
        for file in sorted(Path(place, "files").rglob("unit_*.ipynb")):
            if file.stem in units:
                notebook = translated(json.loads(file.read_bytes()), language)
                file.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        yield Path(place, "files")
