"""Copies the course's notebooks, solutions and documents into the wheel. pyproject.toml contains everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COURSE = ("notebooks", "solutions", "course")  # read by lora_from_scratch/support/course_files.py
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "gradebook.db")


class BuildWithCourse(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "lora_from_scratch", "course_files")
            for folder in COURSE:
                shutil.copytree(folder, target / folder, ignore=IGNORED, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithCourse})
