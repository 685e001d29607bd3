"""Copy the table and the figure of a command into the README.

python -m benchmarks.readme             # the demo's, from runs/demo
python -m benchmarks.readme shootout    # the shootout's, from runs/shootout
python -m benchmarks.readme atlas       # the atlas's figure, from runs/atlas; its table goes into docs/atlas.md
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_from_scratch.compare import atlas

ROOT = Path(__file__).parents[1]
ATLAS = ROOT / "benchmarks" / "atlas.json"
DEMO = (
    "Left: the loss of full fine-tuning and of LoRA falls over the training steps. "
    "Right: LoRA's trained parameters, bytes on disk, peak memory, seconds and BLEU, in per cent of full fine-tuning."
)


def block(runs: Path, name: str) -> str:
    """The table, and the figure with its alternative text (the shootout writes its own)."""
    table, _, picture = (runs / "table.md").read_text(encoding="utf-8").partition("\n![")
    said = picture.partition("](")[0] or DEMO
    return f"{table}\n![{said}](docs/{name}.png)\n\n"


def atlas_block(results: Mapping[str, Any]) -> str:
    """The atlas's table and figure, for docs/atlas.md."""
    return f"{atlas.page(results)}\n"


def atlas_picture(results: Mapping[str, Any]) -> str:
    """The atlas's figure, for the README."""
    return f"[![{atlas.alternative_text(results)}](docs/atlas.png)](docs/atlas.md)\n\n"


def replace_block(page: Path, name: str, text: str) -> None:
    """Replace what is between the two comments in a page that name a command.

    Raises:
        SystemExit: the page does not have exactly one such block.
    """
    place = re.compile(rf"(<!-- {name}: begin [^\n]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    new, count = place.subn(lambda match: match[1] + text + match[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{page.name} must have one block between '<!-- {name}: begin' and '... end -->'")
    page.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="demo", choices=["demo", "shootout", "atlas"])
    parser.add_argument("--runs", type=Path, help="the command's output folder (runs/NAME)")
    options = parser.parse_args()
    runs = options.runs or ROOT / "runs" / options.name
    readme = ROOT / "README.md"
    if options.name == "atlas":
        results = json.loads((runs / "atlas.json").read_text(encoding="utf-8"))
        replace_block(readme, "atlas", atlas_picture(results))
        replace_block(ROOT / "docs" / "atlas.md", "atlas", atlas_block(results))
        shutil.copyfile(runs / "atlas.json", ATLAS)
    else:
        replace_block(readme, options.name, block(runs, options.name))
    shutil.copyfile(runs / f"{options.name}.png", ROOT / "docs" / f"{options.name}.png")


if __name__ == "__main__":
    main()
