"""The commands `generate` and `evaluate`: what they say, and how wrong input ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from lora_from_scratch.gpt2.checkpoint import load_gpt2, save_gpt2
from lora_from_scratch.methods.registry import load_adapter
from tests.cli_calls import call, complaint, output_of

CARD = "hero[fox], trait[wise], place[on an island], wish[a crown], ending[happy]"


@pytest.fixture
def here(cli_directory: Path, short_evaluation: None) -> Path:
    return cli_directory


# --- Generating -------------------------------------------------------------------------------------


def test_generating_with_an_adapter_equals_generating_from_the_merged_model(here: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    method = load_adapter(model, here / "adapter")
    save_gpt2(method.merged_copy(model), tokenizer, tmp_path / "merged")
    drawing = ["--card", CARD, "--max-new-tokens", "20", "--temperature", "0.8", "--seed", "3"]
    adapted = output_of("generate", "--model", here / "model", "--adapter", here / "adapter", *drawing)
    assert adapted == output_of("generate", "--model", tmp_path / "merged", *drawing)
    assert adapted != output_of("generate", "--model", here / "model", *drawing)
    assert adapted.startswith(f"{CARD}\n")


def test_a_card_of_another_task_may_have_any_slots(here: Path) -> None:
    card = "name[Alimentum], food[Chinese]"
    assert output_of("generate", "--model", here / "model", "--card", card, "--max-new-tokens", "3").startswith(card)


def test_a_card_for_a_model_that_was_never_trained_on_cards_gets_a_warning(here: Path) -> None:
    _, _, warned = call("generate", "--card", CARD, "--max-new-tokens", "2")
    assert warned == (
        "warning: the bundled model has not been trained on cards; give the adapter that has: --adapter DIR\n"
    )
    assert call("generate", "--model", here / "model", "--card", CARD, "--max-new-tokens", "2")[2] == ""


def test_prompts_come_from_flags_or_else_from_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", "--model", here / "model", "--max-new-tokens", "3"]
    out = output_of(*command, "--prompt", "Once", "--prompt", "Then")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\r\n\nThen\n"))
    assert output_of(*command) == out
    for nothing in (io.StringIO(""), None):
        monkeypatch.setattr(sys, "stdin", nothing)
        assert "no text to continue" in complaint(*command)


def test_an_empty_prompt_is_the_beginning_of_a_text(here: Path) -> None:
    assert len(output_of("generate", "--model", here / "model", "--prompt", "", "--max-new-tokens", "3")) > 1


def test_a_prompt_may_fill_all_but_one_token_of_the_context_and_no_more(here: Path) -> None:
    _, tokenizer = load_gpt2(here / "model")
    token = tokenizer.encode("x")
    assert len(token) == 1
    command = ["generate", "--model", here / "model", "--prompt"]
    assert output_of(*command, "x" * 159).startswith("x" * 159)  # the default of 80 new tokens gives way
    assert "more than the model's context of 160" in complaint(*command, "x" * 160)
    assert "more than the model's context of 160" in complaint(*command, "x" * 100, "--max-new-tokens", "61")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--top-k", "3"], "need a temperature above 0"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--temperature", "1", "--top-p", "0"], "top_p must be above 0"),
        (["--temperature", "1", "--beams", "2"], "beam search does not sample"),
        (["--beams", "0"], "num_beams must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size"),
        (["--card", "heroine[queen]"], "a story card has no slot 'heroine' (in 'heroine[queen]'); did you mean hero?"),
        (["--card", "hero[fox], colour[red]"], "a story card has no slot 'colour'"),
        (["--card", "hero[fox"], "the bracket of slot 'hero' is not closed"),
        (["--card", ""], "the meaning representation is empty"),
        (["--prompt", "\udcff"], "surrogates not allowed"),
        (["--adapter", ""], "the name of the directory is empty"),
    ],
)
def test_a_wrong_flag_of_generate_ends_in_one_line(here: Path, flags: list[str], said: str) -> None:
    assert said in complaint("generate", "--model", here / "model", "--prompt", "a", *flags)


def test_a_model_of_weights_that_are_not_numbers_is_refused(here: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    save_gpt2(model, tokenizer, tmp_path)
    assert "the model's logits are not numbers" in complaint("generate", "--model", tmp_path, "--prompt", "a")


# --- Evaluating -------------------------------------------------------------------------------------


def test_evaluate_gives_the_numbers_of_the_report(here: Path) -> None:
    command = ["evaluate", "--model", here / "model", "--data", here / "data.csv", "--cards", "1", "--adapter"]
    scores = json.loads(output_of(*command, here / "adapter", "--json"))
    assert set(scores) == {"bleu", "slot_errors", "perplexity", "tale_perplexity", "divergence"}
    assert scores == json.loads((here / "adapter" / "report.json").read_text())["report"]["scores"]
    said = output_of(*command, here / "adapter")
    for number in (f"{scores['bleu']:.2f}", f"{scores['perplexity']:.2f}", f"{scores['divergence']:.3f}"):
        assert number in said


def test_the_base_model_has_no_divergence_from_itself(here: Path) -> None:
    base = ["evaluate", "--model", here / "model", "--data", here / "data.csv", "--cards", "1", "--json"]
    assert json.loads(output_of(*base))["divergence"] == pytest.approx(0, abs=1e-6)


def test_a_perplexity_beyond_all_numbers_is_null_in_json(here: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e6)
    save_gpt2(model, tokenizer, tmp_path)
    command = ["evaluate", "--model", tmp_path, "--data", here / "data.csv", "--cards", "1"]
    assert json.loads(output_of(*command, "--json"))["perplexity"] is None
    assert "perplexity             inf" in output_of(*command)


def test_bf16_changes_the_numbers_a_little(here: Path) -> None:
    asked = ["evaluate", "--model", here / "model", "--data", here / "data.csv", "--cards", 1, "--json"]
    exact, rounded = (json.loads(output_of(*asked, "--precision", precision)) for precision in ("fp32", "bf16"))
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)
    assert rounded["perplexity"] != exact["perplexity"]
    text = output_of(
        "generate", "--model", here / "model", "--precision", "bf16", "--prompt", "a", "--max-new-tokens", 3
    )
    assert text.startswith("a")
