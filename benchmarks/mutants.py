"""Does `make test` notice when something breaks? One thing at a time is broken in a copy of the project.

    python -m benchmarks.mutants [PART ...] [--jobs N] [--write]

For each mutant the quick tests of one or two files are run, up to the first that fails. They are those that `make test`
runs, without what only says that something built is not up to date. `--write` writes mutants.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("mutants.md")
WORK = ROOT / "build"  # the sandbox hides what is in /tmp
NOT_COPIED = shutil.ignore_patterns(
    "build", ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "runs", "*.egg-info"
)
SECONDS = 900
HEAD = """# Mutants

What `python -m benchmarks.mutants --write` found: each line of the library below was broken alone, and the test named
is the first of `make test` that fails then. The tests named here state what they stated before the suite was made
quicker (commit cf90fed), with the same assertions, but for those that are new: `test_dependencies`, `test_differences`,
what `test_bank` says of a unit's own bank, top-p at exactly p, and a prediction that is too small, all of which the old
suite did not notice.

| part | file | broken | caught by |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Mutant:
    """One thing that is broken.

    Attributes:
        file: below lora_from_scratch.
        old: text that occurs in it once.
        new: what takes its place.
        tests: pytest's arguments.
    """

    part: str
    file: str
    old: str
    new: str
    tests: str


def mutants() -> list[Mutant]:
    return [Mutant(part, *mutant) for part, some in MUTANTS.items() for mutant in some]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(MUTANTS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants to try at once (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.name}")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(MUTANTS)):
        parser.error(f"there is no part {', '.join(unknown)}; there are: {', '.join(MUTANTS)}")
    chosen = [mutant for mutant in mutants() if mutant.part in (args.parts or MUTANTS)]
    copies: queue.Queue[Path] = queue.Queue()
    rows, survived = [], 0
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-", dir=WORK) as folder:
        for number in range(args.jobs):
            copies.put(shutil.copytree(ROOT, Path(folder) / str(number), ignore=NOT_COPIED))
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for mutant, caught in zip(chosen, pool.map(lambda one: try_in(copies, one), chosen), strict=True):
                survived += not caught
                rows.append(f"| {mutant.part} | `{mutant.file}` | `{shown(mutant)}` | {caught or '**survived**'} |")
                print(rows[-1], flush=True)
    print(f"{len(rows) - survived} of {len(rows)} caught")
    if args.write:
        TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return 1 if survived else 0


def shown(mutant: Mutant) -> str:
    """What is broken, in one line of a table."""
    old, new = (" ".join(text.split()).replace("|", "\\|") for text in (mutant.old, mutant.new))
    return f"{old}` → `{new or 'nothing'}"


def try_in(copies: queue.Queue[Path], mutant: Mutant) -> str:
    """The test that catches the mutant; empty: none does. A test that fails without it as well does not count."""
    copy = copies.get()
    file = copy / "lora_from_scratch" / mutant.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} has this {whole.count(mutant.old)} times, not once: {mutant.old}")
    arguments = mutant.tests.split()
    try:
        while True:
            file.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
            failed = first_failure(copy, arguments)
            file.write_text(whole, encoding="utf-8")
            if not failed or not first_failure(copy, [failed]):
                name = failed.partition("[")[0].removeprefix("tests/").replace(".py::", "::")
                return f"`{name}`" if failed else ""
            print(f"{failed} fails with nothing broken", file=sys.stderr, flush=True)
            arguments += ["--deselect", failed]
    finally:
        file.write_text(whole, encoding="utf-8")
        copies.put(copy)


def first_failure(copy: Path, arguments: list[str]) -> str:
    """The first quick test that fails there, by its whole name; empty: none."""
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode in (0, 5):  # 5: nothing was selected, as the test is a slow one unless its unit has changed
        return ""
    if found is None or done.returncode != 1:
        raise SystemExit(f"pytest {arguments} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


MUTANTS: dict[str, list[tuple[str, str, str, str]]] = {
    "linear algebra": [
        (
            "linear_algebra/rank.py",
            "return rank * (out_features + in_features)",
            "return rank * out_features * in_features",
            "tests/test_rank.py",
        ),
        ("linear_algebra/rank.py", "echelon[k:, k:].abs().argmax()", "echelon[k:, k:].argmax()", "tests/test_rank.py"),
        (
            "linear_algebra/rank.py",
            "return max(matrix.shape) *",
            "return 1e3 * max(matrix.shape) *",
            "tests/test_rank.py",
        ),
        ("linear_algebra/svd.py", "return float(left_out[0]) if", "return float(left_out[-1]) if", "tests/test_svd.py"),
        (
            "linear_algebra/svd.py",
            "return int((kept < enough).sum()) + 1",
            "return int((kept < enough).sum())",
            "tests/test_svd.py",
        ),
        ("linear_algebra/subspace.py", "/ min(i, j))  #", "/ max(i, j))  #", "tests/test_subspace.py"),
        (
            "linear_algebra/subspace.py",
            "return update / before if",
            "return before / update if",
            "tests/test_subspace.py",
        ),
    ],
    "gpt2": [
        (
            "gpt2/model.py",
            "key_position[None, :] <= query_position[:, None]",
            "key_position[None, :] < query_position[:, None] + 2",
            "tests/test_gpt2_model.py",
        ),
        ("gpt2/model.py", "0.044715 * x**3", "0.044715 * x**2", "tests/test_gpt2_model.py"),
        ("gpt2/model.py", "return x + mlp(norm_2(x))", "return x + mlp(x)", "tests/test_gpt2_model.py"),
        (
            "gpt2/model.py",
            "return total / counts.sum().clamp(min=1)",
            "return total / counts.numel()",
            "tests/test_gpt2_model.py",
        ),
        ("gpt2/generation.py", "before >= p)", "before > p)", "tests/test_gpt2_generation.py"),
        (
            "gpt2/generation.py",
            "(logits - logits.max()) / temp",
            "(logits - logits.max()) * temp",
            "tests/test_gpt2_generation.py",
        ),
    ],
    "quantisation": [
        (
            "quantization/nf4.py",
            "(pairs[:, :1] << 4) | pairs[:, 1:]",
            "(pairs[:, 1:] << 4) | pairs[:, :1]",
            "tests/test_nf4.py",
        ),
        (
            "quantization/nf4.py",
            "\n    p = 0.9677083",
            "\n    p = 0.9677",
            "tests/test_nf4.py tests/test_nf4_bitsandbytes.py",
        ),
        ("quantization/int8.py", "torch.round(x * scale)", "torch.floor(x * scale)", "tests/test_nf4.py"),
        (
            "quantization/int8.py",
            "return q.float() / 127 * absmax",
            "return q.float() / 128 * absmax",
            "tests/test_nf4.py",
        ),
    ],
    "methods": [
        ("methods/lora.py", "alpha / math.sqrt(rank) if rslora", "alpha / rank if rslora", "tests/test_lora.py"),
        (
            "methods/lora.py",
            "return A, torch.zeros(out_features, rank)",
            "return A, torch.ones(out_features, rank)",
            "tests/test_lora.py",
        ),
        ("methods/adapters.py", "return self.scaling * self.up(", "return self.up(", "tests/test_adapters.py"),
        (
            "methods/bitfit.py",
            "torch.cat([self.bias_q, self.base.bias[len(self.bias_q) :]])",
            "self.base.bias",
            "tests/test_bitfit.py",
        ),
        (
            "methods/prefix_tuning.py",
            "[(parts[2 * layer][None], parts[2 * layer + 1][None])",
            "[(parts[2 * layer + 1][None], parts[2 * layer][None])",
            "tests/test_prefix_tuning.py",
        ),
    ],
    "finetune": [
        ("finetune/training.py", "math.cos(math.pi * done)", "math.cos(2 * math.pi * done)", "tests/test_training.py"),
        (
            "finetune/training.py",
            '{"params": vectors, "weight_decay": 0.0,',
            '{"params": vectors, "weight_decay": settings.weight_decay,',
            "tests/test_training.py",
        ),
        ("finetune/training.py", "(piece.predictions / predictions)", "(1 / parts)", "tests/test_training.py"),
        (
            "finetune/completions.py",
            "[IGNORE_INDEX] * len(prompt_ids) + list(completion_ids)",
            "[*prompt_ids, *completion_ids]",
            "tests/test_completions.py",
        ),
        ("finetune/adamw.py", "v_hat = v / (1 - beta2**step)", "v_hat = v", "tests/test_adamw.py"),
        ("finetune/metrics.py", "return errors / slots", "return errors / max(1, errors)", "tests/test_metrics.py"),
    ],
    "serving": [
        (
            "serving/batched_lora.py",
            "own = adapter_index[:, None] == owner",
            "own = adapter_index[:, None] >= owner",
            "tests/test_batched_lora.py",
        ),
        (
            "serving/batched_lora.py",
            "(A.detach().clone(), (layer.scaling * B).detach())",
            "(A.detach().clone(), B.detach())",
            "tests/test_batched_lora.py",
        ),
    ],
    "checks": [
        (
            "checks/comparing.py",
            "if seen.stopped or set(seen.changed) - set(expected.changed):",
            "if seen.stopped:",
            "tests/test_judge.py",
        ),
        (
            "checks/comparing.py",
            "atol=tolerance * scale + 1e-12",
            "atol=1000 * tolerance * scale",
            "tests/test_judge.py",
        ),
        (
            "checks/judge.py",
            "exercise.points * len(earned) / len(parts)",
            "exercise.points * bool(earned)",
            "tests/test_judge.py",
        ),
        (
            "checks/observation.py",
            "theirs = copy.deepcopy(dict(given))",
            "theirs = dict(given)",
            "tests/test_observation.py",
        ),
        ("checks/diagnosis.py", "if answer.message and not", "if not answer.message and not", "tests/test_judge.py"),
        ("checks/notebook.py", "elif answer is exercise.object:", "elif answer is exercise:", "tests/test_check.py"),
        (
            "checks/exercise.py",
            "return max(given / answer, answer / given) <=",
            "return given / answer <=",
            "tests/test_judge.py tests/test_check.py",
        ),
        ("checks/units.py", '{unit}/{pattern}"', 'unit_??/{pattern}"', "tests/test_bank.py -k own_unit"),
    ],
    "exercises and bank": [
        (
            "checks/unit_01/exercises.py",
            "draw.normal(2, 5)[[0, 1, 0, 1]]",
            "draw.normal(4, 5)",
            "tests/test_bank.py -k rank",
        ),
        (
            "checks/unit_01/answers.py",
            '("echelon[k:, k:].abs()", "echelon[k:, k:]")',
            '("echelon[k:, k:].abs()", "echelon[k:, k:].abs().abs()")',
            "tests/test_bank.py -k row_echelon",
        ),
    ],
    "building": [
        (
            "grading/building/refusals.py",
            "if squeeze(line) in shown:",
            "if line == shown:",
            "tests/test_build_refusals.py",
        ),
        (
            "grading/building/build.py",
            "if cell.volatile and node.source in old:",
            "if node.source in old:",
            "tests/test_build.py",
        ),
        (
            "grading/building/dependencies.py",
            'value[1:] if name == "body" else value',
            "value",
            "tests/test_dependencies.py",
        ),
        (
            "grading/building/dependencies.py",
            "new = {path for module in modules for path in _files(module)} - found",
            "new = set[Path]()",
            "tests/test_dependencies.py",
        ),
        (
            "grading/building/differences.py",
            "return found if same_processor or",
            "return found if not same_processor and",
            "tests/test_differences.py",
        ),
        (
            "grading/building/assemble.py",
            "return f'\"{answer}\"' if isinstance(answer, str)",
            "return answer if isinstance(answer, str)",
            "tests/test_build.py",
        ),
    ],
    "sandbox": [
        (
            "grading/sandbox/forkserver.py",
            "env=dict(environment),",
            "env=os.environ | dict(environment),",
            "tests/test_sandbox_walls.py",
        ),
        ("grading/sandbox/lockdown.py", '"FSIZE": file,', '"FSIZE": 100 * file,', "tests/test_sandbox_walls.py"),
        (
            "grading/sandbox/wire.py",
            '"order": list(order)}',
            '"order": list(range(tensor.ndim))}',
            "tests/test_sandbox_wire.py",
        ),
    ],
    "marking": [
        ("grading/marking.py", '"human" if early_exit.why == "frames" else "note"', '"note"', "tests/test_marking.py"),
        (
            "grading/marking.py",
            "Verdict(item.name, status, 0.0, item.points",
            "Verdict(item.name, status, item.points, item.points",
            "tests/test_marking.py",
        ),
        (
            "grading/cohort.py",
            "json.dumps([unit, name])",
            "json.dumps([name])",
            "tests/test_marking.py",
        ),
    ],
    "gradebook": [
        (
            "grading/gradebook.py",
            "grade.needs_manual_grade or solution in changed",
            "grade.needs_manual_grade",
            "tests/test_gradebook.py tests/test_grade.py",
        ),
        (
            "grading/gradebook.py",
            "score = None if graded.open_questions.get(name, True) else 0.0",
            "score = None",
            "tests/test_gradebook.py tests/test_grade.py",
        ),
    ],
    "cli": [
        ("cli/build.py", "return 2 if refused else 0", "return 0", "tests/test_build.py -k command"),
        ("cli/doctor.py", "return 0 if healthy else 1", "return 0", "tests/test_doctor.py"),
        ("cli/check_submission.py", "return INCOMPLETE", "return COMPLETE", "tests/test_check_submission.py"),
    ],
}

if __name__ == "__main__":
    sys.exit(main())
