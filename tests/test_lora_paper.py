"""The LoRA paper's experiment on E2E, on a tiny model and tiny files: the recipe, its metrics, its table, resuming."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lora_from_scratch.cli import main
from lora_from_scratch.compare import lora_paper
from lora_from_scratch.compare.lora_paper import CHECKPOINT, RUN, SCORES, TEXTS, Recipe
from lora_from_scratch.finetune import e2e_metrics
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, references_by_mr
from lora_from_scratch.finetune.e2e import read_e2e_csv
from lora_from_scratch.finetune.e2e_metrics import E2EScores, e2e_scores, nist
from lora_from_scratch.finetune.label_smoothing import LabelSmoothing, labels_of
from lora_from_scratch.finetune.training import Trainer
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tests.cli_calls import complaint, output_of
from tests.helpers import shared
from tests.tiny_runs import make_model, write_data

HAS_PACKAGE = importlib.util.find_spec("pycocoevalcap") is not None
NEEDS_PACKAGE = pytest.mark.skipif(not HAS_PACKAGE, reason="pycocoevalcap is not installed (the extra e2e)")
NEEDS_JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")

TRAIN = [Example(f"name[N{i}], food[{f}]", f"N{i} serves {f} food.") for i in range(9) for f in ("Thai", "Greek")]
TEST = [
    Example("name[Zizzi], food[Thai]", "Zizzi serves Thai food."),
    Example("name[Zizzi], food[Thai]", "At Zizzi you get Thai food."),
    Example("name[Loch], food[Greek]", "Loch is Greek."),
]
WRITTEN = ["the cat is on the mat", "hello there"]
WANTED = [["the cat sat on the mat", "a cat is on the mat ."], ["hello there , general kenobi", "well hello there"]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 and E2E's three files, with a few meanings each."""
    folder = tmp_path_factory.mktemp("e2e")
    make_model(folder / "model")
    (folder / "data").mkdir()
    for name, pairs in (("trainset", TRAIN), ("devset", [Example("name[X]", "X.")]), ("testset_w_refs", TEST)):
        write_data(folder / "data" / f"{name}.csv", pairs)
    return folder


def flags(here: Path, output: Path, *more: object) -> list[object]:
    places = ["--model", here / "model", "--data", here / "data", "--output", output]
    return ["e2e", *places, "--seeds", "0", "--steps", "6", "--checkpoint-every", "2", *more]


def outcome(folder: Path) -> tuple[bytes, Any]:
    return (folder / WEIGHTS_FILE).read_bytes(), json.loads((folder / TEXTS).read_text())


# --- The recipe ------------------------------------------------------------------------------------


def test_the_recipe_is_the_paper_s() -> None:
    recipe = Recipe()
    assert recipe.steps_for(42_061) == 26_289  # E2E's training pairs; the authors' script names its model 26289
    settings = recipe.training(26_289, seed=1)
    assert (settings.learning_rate, settings.warmup_steps, settings.schedule) == (2e-4, 500, "linear")
    assert (settings.weight_decay, settings.clip_norm, settings.seed) == (0.01, 0, 1)
    assert (recipe.beams, recipe.length_penalty, recipe.no_repeat_ngram_size) == (10, 0.9, 4)
    method = recipe.method(seed=3)
    assert (method.rank, method.alpha, method.dropout, method.seed) == (4, 32, 0.1, 3)
    assert recipe.training(6, seed=0).warmup_steps == 3


def test_it_trains_as_many_numbers_as_the_paper_s_gpt2_medium() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        method = Recipe().method(0)
        method.adapt(model)
    assert sum(p.numel() for p in method.trainable(model).values()) == 393_216


def test_label_smoothing_is_that_of_pytorch_loss_and_gradient(here: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    batch = Completions(TRAIN, tokenizer, model.config.n_positions).batch_at(0, 4, seed=0)
    logits = model(batch.input_ids)[:, :-1]
    expected = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1), ignore_index=-100, label_smoothing=0.1
    )
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    hidden = labels_of(batch)
    assert hidden.predictions == batch.predictions
    loss = next_token_loss(LabelSmoothing(model, 0.1)(batch.input_ids), hidden.labels)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 1.0, -0.1])
def test_label_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        LabelSmoothing(torch.nn.Linear(1, 1), smoothing)


# --- The metrics -----------------------------------------------------------------------------------


def test_nist_equals_other_implementations() -> None:
    """Computed once: NLTK 3.10.4 with one reference, the challenge's own pymteval.py with several, on these tokens."""
    assert nist(WRITTEN, [texts[:1] for texts in WANTED]) == pytest.approx(2.028216582582949, rel=1e-12)
    assert nist(WRITTEN, WANTED) == pytest.approx(2.8549225369773046, rel=1e-12)
    assert nist(["The cat is on the mat", "Hello there"], WANTED) == nist(WRITTEN, WANTED)  # in lower case
    assert nist(["", ""], WANTED) == 0


def test_nist_of_two_tokens_by_hand() -> None:
    """Information: log2(4 / 2) of each token, log2(2 / 2) = 0 of the pair; the texts are not too short."""
    assert nist(["a b", "a b"], [["a b"], ["a b"]]) == pytest.approx(1)
    assert nist(["a b", "c"], [["a b"], ["a b"]]) < 2 / 3 * 1


@NEEDS_PACKAGE
@NEEDS_JAVA
def test_the_scores_of_two_texts() -> None:
    """Written down once from pycocoevalcap 1.2 with Java 17, and sacrebleu 2.6."""
    assert e2e_scores(WRITTEN, WANTED) == E2EScores(
        *(pytest.approx(x, rel=1e-6) for x in (74.20884818, 2.85492253, 41.86531586, 80.27426160, 4.61311705))  # type: ignore[arg-type]
    )


@pytest.mark.slow
@NEEDS_PACKAGE
@NEEDS_JAVA
def test_people_s_own_texts_on_the_real_development_set() -> None:
    """The last reference of each meaning against the others; NIST was compared with pymteval.py (equal to 1e-15)."""
    groups = list(references_by_mr(read_e2e_csv(shared("data/e2e/devset.csv"))).values())
    scores = e2e_scores([texts[-1] for texts in groups], [texts[:-1] for texts in groups])
    expected = (60.0465, 8.63233, 45.3763, 64.4647, 1.86907)
    assert scores == E2EScores(*(pytest.approx(x, rel=1e-4) for x in expected))  # type: ignore[arg-type]


@NEEDS_PACKAGE
def test_without_java_there_is_no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e_metrics, "has_java", lambda: False)
    scores = e2e_scores(WRITTEN, WANTED)
    assert scores.meteor is None
    assert scores.rouge_l == pytest.approx(80.27426160)
    assert "METEOR needs Java" in e2e_metrics.missing()[0]


def test_without_the_package_there_are_bleu_and_nist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e_metrics, "has_pycocoevalcap", lambda: False)
    scores = e2e_scores(WRITTEN, WANTED)
    assert (scores.meteor, scores.rouge_l, scores.cider) == (None, None, None)
    assert scores.bleu == pytest.approx(74.20884818)
    assert "python -m pip install" in e2e_metrics.missing()[0]


# --- The command -----------------------------------------------------------------------------------


@pytest.fixture
def quick_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR's Java program takes ten seconds to start."""
    monkeypatch.setattr(e2e_metrics, "has_java", lambda: False)


@pytest.mark.usefixtures("quick_scores")
def test_one_command_trains_writes_and_prints_ours_beside_the_paper_s(here: Path, tmp_path: Path) -> None:
    out = output_of(*flags(here, tmp_path / "out", "--meanings", "2"))
    assert "ours: LoRA" in out
    assert "paper: LoRA, GPT-2 medium" in out
    assert "70.4 ± 0.1" in out
    assert "Not the paper's recipe: steps 6" in out
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[0].split("|")[2].strip() == "BLEU"
    seed = tmp_path / "out" / "seed-0"
    assert {file.name for file in seed.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, RUN, TEXTS}  # no scores: no METEOR
    assert set(json.loads((seed / TEXTS).read_text())) == {example.mr for example in TEST}
    assert json.loads((seed / CONFIG_FILE).read_text())["lora_dropout"] == 0.1


@pytest.mark.usefixtures("quick_scores")
@pytest.mark.parametrize("moment", ["training", "writing"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    here: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_paper, "CHUNK", 1)
    output_of(*flags(here, tmp_path / "quiet"))
    steps: list[int] = []

    def interrupt(*args: Any, **keywords: Any) -> Any:
        steps.append(1)
        if len(steps) == (4 if moment == "training" else 2):
            raise KeyboardInterrupt
        return real(*args, **keywords)

    place, name = (Trainer, "_one_step") if moment == "training" else (lora_paper, "generate")
    real = getattr(place, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, interrupt)
        assert main([str(flag) for flag in flags(here, tmp_path / "troubled")]) == 130
    seed = tmp_path / "troubled" / "seed-0"
    assert (seed / CHECKPOINT).exists() == (moment == "training")
    before = (seed / WEIGHTS_FILE).stat().st_mtime_ns if moment == "writing" else None
    output_of(*flags(here, tmp_path / "troubled"))
    assert outcome(seed) == outcome(tmp_path / "quiet" / "seed-0")
    assert before in (None, (seed / WEIGHTS_FILE).stat().st_mtime_ns)  # not trained again


def test_a_finished_seed_is_not_repeated_and_its_folder_not_given_to_another_run(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([E2EScores(60, 8, 40, 65, 2.0), E2EScores(62, 9, 42, 67, 2.2)])
    monkeypatch.setattr(lora_paper, "e2e_scores", lambda texts, references: next(scores))
    output_of(*flags(here, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "seed-0" / SCORES).read_text())["nist"] == 8
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again") if self.settings.seed == 0 else None)
    out = output_of(*flags(here, tmp_path / "out", "--seeds", "0", "1"))
    assert "61.0 (60.0 to 62.0)" in out
    assert "2.10 (2.00 to 2.20)" in out
    assert "different: steps" in complaint(*flags(here, tmp_path / "out", "--steps", "8"))


def test_bad_input_is_refused_in_one_line(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--data" in complaint("e2e", "--model", here / "model")
    assert "no such data set" in complaint(*flags(here, out, "--data", tmp_path / "nothing"))
    (tmp_path / "devset.csv").write_text("mr,text\nname[x],fine\n")
    assert "must name the column 'ref'" in complaint(*flags(here, out, "--data", tmp_path / "devset.csv"))
    (tmp_path / "half").mkdir()
    shutil.copy(here / "data" / "trainset.csv", tmp_path / "half")
    assert "no devset.csv" in complaint(*flags(here, out, "--data", tmp_path / "half"))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert "not a GPT-2" in complaint(*flags(here, out, "--model", tmp_path / "llama"))
    assert "no directory" in complaint(*flags(here, out, "--model", tmp_path / "none" / "here"))
    assert "each seed once" in complaint(*flags(here, out, "--seeds", "1", "1"))
    assert "steps must be at least 1" in complaint(*flags(here, out, "--steps", "0"))
    assert not out.exists()
