"""What pyproject.toml cannot say: the course's files in the wheel, and the README as the package index can show it."""

import os
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COURSE = ("notebooks", "solutions", "course")  # read by lora_from_scratch/support/course_files.py
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "gradebook.db")
PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)([^()\s]+)\)")
LINK = re.compile(r"\[([^\[\]]*|!\[[^\]]*\]\([^()]*\))\]\((?!https?:|#)([^()\s]+)\)")


class BuildWithCourse(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "lora_from_scratch", "course_files")
            for folder in COURSE:
                shutil.copytree(folder, target / folder, ignore=IGNORED, dirs_exist_ok=True)


def for_package_index(readme: str, address: str) -> str:
    """The README without relative links, which lead nowhere there: with the repository's address, or without links."""
    if not address:
        return LINK.sub(r"\1", PICTURE.sub("", readme))
    return LINK.sub(rf"[\1]({address}/blob/HEAD/\2)", PICTURE.sub(lambda found: at(found, address), readme))


def at(picture: re.Match[str], address: str) -> str:
    return picture[0].replace(f"({picture[1]})", f"({address}/raw/HEAD/{picture[1]})")


# Known where GitHub Actions build the package.
parts = [os.environ.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")]
address = "/".join(parts) if all(parts) else ""
pages = {"Source": "", "Changelog": "/blob/HEAD/CHANGELOG.md", "Issues": "/issues"}

setup(
    cmdclass={"build_py": BuildWithCourse},
    long_description=for_package_index(Path("README.md").read_text(encoding="utf-8"), address),
    long_description_content_type="text/markdown",
    project_urls={name: f"{address}{page}" for name, page in pages.items()} if address else {},
)
