"""Draw which folder of the package imports which, for docs/architecture.md.

    python -m benchmarks.architecture

The folders and their order are those of the import rule in pyproject.toml; the imports are read from the code.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

from lora_from_scratch.support import plotting

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.png"
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "lora_from_scratch"


def folders() -> list[str]:
    """The folders of the package, lowest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return list(reversed(next(c["layers"] for c in settings["contracts"] if c["type"] == "layers")))


def imports() -> dict[str, list[str]]:
    """The folders that each folder imports from, including lazy imports and imports for typing; lowest first."""
    import grimp

    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    names = folders()
    found: dict[str, set[str]] = {name: set() for name in names}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            one, other = (f"{module}.".split(".")[1] for module in (importer, imported))
            if one != other and one in found and other in found:
                found[one].add(other)
    return {name: [other for other in names if other in found[name]] for name in names}


def in_words(found: dict[str, list[str]]) -> str:
    """The alternative text."""
    lines = (f"{name}: {', '.join(others) or 'nothing'}" for name, others in found.items())
    return f"What each folder imports. {'; '.join(lines)}."


def draw(found: dict[str, list[str]], path: Path = PICTURE) -> None:
    """Draw a grid with a row for each folder and a dot in the column of each folder that it imports from."""
    names = list(found)
    figure, (axes,) = plotting.panels(1, width=7.2, height=4.6)
    for row, name in enumerate(names):
        axes.axhline(row, color="0.9", linewidth=0.8, zorder=0)
        axes.axvline(row, color="0.9", linewidth=0.8, zorder=0)
        axes.plot(row, row, marker="s", color="0.75", markersize=9)
        for other in found[name]:
            axes.plot(names.index(other), row, marker="o", color=plotting.COLOURS[0], markersize=9)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="left")
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("a dot: the folder on the left imports from the folder above")
    axes.xaxis.set_label_position("bottom")
    plotting.save(figure, path, in_words(found))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = imports()
    draw(found)
    place = re.compile(r"(<!-- picture: begin [^\n]*-->\n).*?(<!-- picture: end -->)", re.DOTALL)
    text = PAGE.read_text(encoding="utf-8")
    new, count = place.subn(lambda match: f"{match[1]}![{in_words(found)}]({PICTURE.name})\n{match[2]}", text)
    if count != 1:
        raise SystemExit(f"{PAGE} must have one block between '<!-- picture: begin' and '<!-- picture: end -->'")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
