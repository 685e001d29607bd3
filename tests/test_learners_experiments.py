"""In each unit from 04 to 13 the learner designs an experiment, whose outcome is judged."""

import json
import re
from pathlib import Path

import pytest

SOLUTIONS = Path(__file__).resolve().parents[1] / "solutions"
VERDICT = re.compile(r"\b(wins|loses|Undecided)\b|change `\w+`")  # the last: the line has not been changed yet


@pytest.mark.parametrize("number", [f"{number:02}" for number in range(4, 14)])
def test_what_the_learner_designs_is_judged(number: str) -> None:
    notebook = json.loads((SOLUTIONS / f"unit_{number}" / f"unit_{number}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    [cell] = [cell for cell in cells if re.search(r"Change this( line)?\b", "".join(cell["source"]))]
    printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
    assert VERDICT.search(printed)
