"""Put the demo's own table and figure into the README: run the demo, then `python -m benchmarks.readme`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- demo: begin [^\n]*-->\n).*?(<!-- demo: end -->)", re.DOTALL)
ALTERNATIVE_TEXT = (
    "Left: the loss of full fine-tuning and of LoRA falls over the training steps. "
    "Right: what LoRA trains, stores, takes and reaches, in per cent of full fine-tuning."
)


def main() -> None:
    demo = ROOT / "runs" / "demo"
    table = (demo / "table.md").read_text(encoding="utf-8")
    shutil.copyfile(demo / "demo.png", ROOT / "docs" / "demo.png")
    readme = ROOT / "README.md"
    block = f"{table}\n![{ALTERNATIVE_TEXT}](docs/demo.png)\n\n"
    text, count = BLOCK.subn(lambda match: match[1] + block + match[2], readme.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit("README.md must have one block between '<!-- demo: begin' and '<!-- demo: end -->'")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
