"""Copy the table and the figure of a command into the README.

python -m benchmarks.readme             # the demo's, from runs/demo
python -m benchmarks.readme shootout    # the shootout's, from runs/shootout
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = (
    "Left: the loss of full fine-tuning and of LoRA falls over the training steps. "
    "Right: LoRA's trained parameters, bytes on disk, peak memory, seconds and BLEU, in per cent of full fine-tuning."
)


def block(runs: Path, name: str) -> str:
    """The table, and the figure with its alternative text (the shootout writes its own)."""
    table, _, picture = (runs / "table.md").read_text(encoding="utf-8").partition("\n![")
    said = picture.partition("](")[0] or DEMO
    return f"{table}\n![{said}](docs/{name}.png)\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="demo", choices=["demo", "shootout"])
    parser.add_argument("--runs", type=Path, help="the command's output folder (runs/NAME)")
    options = parser.parse_args()
    runs = options.runs or ROOT / "runs" / options.name
    text = block(runs, options.name)
    place = re.compile(rf"(<!-- {options.name}: begin [^\n]*-->\n).*?(<!-- {options.name}: end -->)", re.DOTALL)
    readme = ROOT / "README.md"
    new, count = place.subn(lambda match: match[1] + text + match[2], readme.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"README.md must have one block between '<!-- {options.name}: begin' and '... end -->'")
    shutil.copyfile(runs / f"{options.name}.png", ROOT / "docs" / f"{options.name}.png")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
