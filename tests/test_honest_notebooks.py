"""Ordinary lines of ordinary notebooks cost no points: magics, shell commands, settings of PyTorch, own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from lora_from_scratch.grading.building.solution import source_of
from lora_from_scratch.grading.sandbox import Job, Observations, Probe, Run, observe_notebook
from lora_from_scratch.grading.sandbox.stripped import find_unit
from lora_from_scratch.grading.submissions import definitions
from lora_from_scratch.grading.submissions.definitions import binds, is_python, statements
from lora_from_scratch.grading.submissions.handing_in import look_at
from tests.damages import by_id, released, submission
from tests.sandboxes import needs_bubblewrap, verdict_of

SEED = 7
OWN = {exercise.name: source_of(exercise.object) for exercise in find_unit("01").exercises}
PARTS = (
    "import torch\nfrom torch import Tensor\nfrom lora_from_scratch.linear_algebra.rank import *\n"
    + f"del {', '.join(OWN)}\n"
)
PARTS = "from __future__ import annotations\n" + PARTS
COUNT = OWN["low_rank_parameter_count"]

# Lines that a live kernel survives.
LINES = [
    "%matplotlib inline",
    "%matplotlib widget",
    "%matplotlib notebook",
    "%matplotlib",
    "%pylab inline",
    "%pylab",
    "%gui qt",
    "!pip install -q einops",
    "%pip install -q einops",
    "%conda install einops",
    "!ls -la",
    "files = !ls",
    "files = %system ls",
    "!!ls",
    "%sx ls",
    "%ls",
    "%cd /content",
    "%mkdir results",
    "%env CUDA_VISIBLE_DEVICES=0",
    "%load_ext autoreload",
    "%load_ext tensorboard",
    "%autoreload 2",
    "%config InlineBackend.figure_format = 'retina'",
    "%precision 3",
    "%who",
    "%whos",
    "%history",
    "%xmode plain",
    "%autosave 60",
    "%tensorflow_version 2.x",
    "%nosuchmagic at all",
    "%store -r",
    "%less helper.py",
    "%connect_info",
    "%lsmagic",
    "%timeit -n1 -r1 1 + 1",
    "%time total = 3",
    "torch?",
    "?torch",
    "get_ipython().system('ls')",
    "get_ipython().getoutput('ls')",
    "get_ipython().run_line_magic('matplotlib', 'inline')",
    "exit",
    "!echo one \\\n    two",
]
CELLS = [
    "%%bash\nls",
    "%%html\n<b>b</b>",
    "%%javascript\nalert(1)",
    "%%writefile x.py\nx = 1",
    "%%nosuchmagic\nx",
    "%%sh\nls",
]
SETTINGS = {
    "set_default_dtype": "torch.set_default_dtype(torch.float64)",
    "set_default_tensor_type": "torch.set_default_tensor_type(torch.DoubleTensor)",
    "compile": "@torch.compile(backend='eager')\ndef f(x):\n    return x + 1\n\n\nf(torch.ones(2))",
    "set_default_device": "torch.set_default_device('cpu')",
    "set_grad_enabled": "torch.set_grad_enabled(False)",
    "manual_seed": "torch.manual_seed(3)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "printoptions": "torch.set_printoptions(precision=2)",
    "float32 precision": "torch.set_float32_matmul_precision('high')",
    "own operator": "lib = torch.library.Library('mylib', 'DEF')\nlib.define('f(Tensor x) -> Tensor')\n"
    "lib.impl('f', lambda x: x + 1, 'CPU')",
    "hooks": "torch.nn.modules.module.register_module_forward_hook(lambda *a: None)",
    "numpy printoptions": "import numpy\nnumpy.set_printoptions(precision=2)",
}


@pytest.fixture(scope="module")
def observed(library_cache: Path) -> Observations:
    steps: list[Any] = [Run("imports", PARTS)]
    for number, line in enumerate(LINES):
        steps += [
            Run(f"cell {number}", f"{line}\n\n{COUNT}"),
            Probe("low_rank_parameter_count", SEED, f"line {number}"),
        ]
        steps += [Run(f"taken {number}", "del low_rank_parameter_count")]
    steps += [Run(f"whole {number}", cell) for number, cell in enumerate(CELLS)]
    steps += [Run("last", COUNT), Probe("low_rank_parameter_count", SEED, "at last")]
    return observe_notebook(Job("01", tuple(steps), library_cache))


@needs_bubblewrap
@pytest.mark.unit_01
@pytest.mark.parametrize("number", range(len(LINES)), ids=[line.split("\n")[0] for line in LINES])
def test_a_line_that_a_kernel_survives_costs_no_answer_below_it(observed: Observations, number: int) -> None:
    assert observed.outputs[f"cell {number}"].status == "ran", observed.outputs[f"cell {number}"].error
    assert verdict_of(observed, f"line {number}", SEED).passed
    assert observed.probes[f"line {number}"].changed == ()


@needs_bubblewrap
@pytest.mark.unit_01
def test_a_whole_cell_in_another_language_is_no_error(observed: Observations) -> None:
    assert [observed.outputs[f"whole {number}"].status for number in range(len(CELLS))] == ["ran"] * len(CELLS)
    assert verdict_of(observed, "at last", SEED).passed
    assert observed.early_exits == ()


@needs_bubblewrap
@pytest.mark.unit_01
def test_an_error_in_code_that_a_magic_runs_is_the_learners(library_cache: Path) -> None:
    steps = (Run("line", "%time 1 / 0\nafter = 1"), Run("cell", "%%time\n1 / 0"), Run("said", "!ls"))
    found = observe_notebook(Job("01", steps, library_cache))
    assert [found.outputs[cell].error[:17] for cell in ("line", "cell")] == ["ZeroDivisionError"] * 2
    assert found.outputs["said"].stdout == "!ls: this does nothing while a notebook is being graded.\n"


@needs_bubblewrap
@pytest.mark.unit_01
@pytest.mark.parametrize("what", SETTINGS)
def test_a_setting_of_pytorchs_own_is_no_replaced_function(library_cache: Path, what: str) -> None:
    steps = (
        Run("imports", PARTS),
        Run("setting", f"import torch\n{SETTINGS[what]}"),
        Run("own", OWN["row_echelon"]),
        Probe("row_echelon", SEED, "check"),
    )
    found = observe_notebook(Job("01", steps, library_cache))
    assert found.outputs["setting"].status == "ran", found.outputs["setting"].error
    assert found.probes["check"].changed == ()
    assert verdict_of(found, "check", SEED).passed


# --- Before it is handed in ----------------------------------------------------------------------------------

ANSWER = "def rank_deficiency(matrix, tolerance=None):\n    return min(matrix.shape) - rank(matrix, tolerance)\n"
READABLE = {
    "a continuation line with %": "%%time\ndef rank_deficiency(matrix, tolerance=None):\n"
    "    found = (rank(matrix, tolerance)\n             % 1000)\n    return min(matrix.shape) - found\n",
    "!= at the beginning": "%time\ndef rank_deficiency(matrix, tolerance=None):\n    full = (rank(matrix, tolerance)\n"
    "            != min(matrix.shape))\n    return 1 if full else 0\n",
    "a shell command with a backslash": f"!echo one \\\n    two\n\n\n{ANSWER}",
    "a magic with a backslash": f"%env ONE=1 \\\n  TWO=2\n{ANSWER}",
    "a shell command assigned": f"files = !ls\n\n\n{ANSWER}",
    "a magic assigned": f"now = %time 3\n{ANSWER}",
    "help": f"torch.linalg?\n{ANSWER}torch.linalg??\n",
    "help before": f"?torch\n{ANSWER}",
    "capture": f"%%capture out\n{ANSWER}",
    "a shell command inside": f"if True:\n    !ls\n    files = !ls\n{ANSWER}",
    "doctest prompts": ">>> def rank_deficiency(matrix, tolerance=None):\n...     return 1\n",
    "an indented cell": "    def rank_deficiency(matrix, tolerance=None):\n        return 1\n",
    "await at the top": f"import asyncio\nawait asyncio.sleep(0)\n{ANSWER}",
    "a form feed": f"\x0c\n{ANSWER}",
}


@pytest.mark.parametrize("what", READABLE)
def test_what_runs_in_jupyter_is_read_as_python_line_for_line(what: str) -> None:
    source = READABLE[what]
    assert is_python(source)
    assert binds(source)["rank_deficiency"] == "real"
    assert "\n".join(statement.text for statement in statements(source) or ()) == source


@pytest.mark.parametrize("source", ["def (", "%%time\ndef (", "x = = !ls", "rank(matrix)) # %", "'''never ended"])
def test_what_does_not_run_in_jupyter_is_not_python(source: str) -> None:
    assert not is_python(source)


def test_thousands_of_magics_are_read_without_looking_at_each_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "_transformer", lambda: pytest.fail("each magic was looked for from the start"))
    assert is_python("!ls\n" * 20_000 + ANSWER)


@pytest.fixture
def notebook(tmp_path: Path) -> Any:
    def look(source: str) -> list[str]:
        made = submission("01")
        by_id(made, "rank_deficiency").source = source
        nbformat.write(made, tmp_path / "unit_01.ipynb")
        return list(look_at(tmp_path / "unit_01.ipynb", released("01")).to_do)

    return look


@pytest.mark.unit_01
@pytest.mark.parametrize("what", READABLE)
def test_check_submission_finds_nothing_to_do_in_it(notebook: Any, what: str) -> None:
    assert notebook(READABLE[what]) == []


@pytest.mark.unit_01
@pytest.mark.parametrize(
    "source",
    [
        "from my_answers import rank_deficiency",
        "from my_answers import deficiency as rank_deficiency",
        "from my.answers import (rank_deficiency, rank)",
        "from .my_answers import rank_deficiency",
        "from my_answers import *",
        "import my_answers\nrank_deficiency = my_answers.rank_deficiency",
    ],
)
def test_an_answer_from_a_file_of_the_learners_own_is_the_learners(notebook: Any, source: str) -> None:
    assert notebook(source) == []


@pytest.mark.unit_01
@pytest.mark.parametrize(
    "source",
    [
        "from lora_from_scratch.linear_algebra.rank import rank_deficiency",
        "rank_deficiency = library('rank_deficiency')",
    ],
)
def test_an_answer_from_the_library_is_the_librarys(notebook: Any, source: str) -> None:
    assert "is the library's version, which earns no points" in notebook(source)[0]
