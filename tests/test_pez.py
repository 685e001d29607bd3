"""PEZ: a prompt of real tokens, whatever the soft rows behind it are, and the best one that was seen.

Compared outside this repository with YuxinWenRick/hard-prompts-made-easy (commit f22a1be): for 200 random rows and a
table of 1,000 x 32 its `nn_project` (whose neighbours, from sentence-transformers, were computed as a plain product)
gives the tokens and the rows of `project` bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_from_scratch.cli import main
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.pez import PEZ, hard_prompt, hard_prompt_search, project
from lora_from_scratch.methods.registry import load_adapter
from tests.helpers import tiny_model
from tests.tiny_runs import run_in

STEPS = 30


def batch_at(step: int) -> Batch:
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids)


def trained(method: PEZ, rate: float = 0.3) -> tuple[GPT2, list[float]]:
    model = tiny_model()
    method.adapt(model)
    settings = TrainingSettings(steps=STEPS, learning_rate=rate, precision="fp32")
    losses = Trainer(model, batch_at, settings, method=method, progress=False).run().losses
    return model.eval(), losses


def with_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The base's logits for the text with real tokens in front of it."""
    texts = torch.cat([tokens.expand(len(ids), -1), ids], dim=1)
    logits: torch.Tensor = tiny_model()(texts)
    return logits[:, len(tokens) :]


# --- Real tokens ---------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 6), st.integers(0, 999))
def test_projecting_gives_rows_of_the_table_and_passes_the_gradient_on(p: int, size: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(size, d, generator=generator)
    prompt = torch.randn(p, d, generator=generator, requires_grad=True)
    rows = project(prompt, table)
    for i in range(p):
        cosines = [float(torch.cosine_similarity(prompt[i], row, dim=0).detach()) for row in table]
        best = max(range(size), key=lambda t: cosines[t])
        assert any(
            torch.equal(rows[i], row)
            for row, cosine in zip(table, cosines, strict=True)
            if cosine > cosines[best] - 1e-6
        )
    weights = torch.randn(p, d, generator=generator)
    (rows * weights).sum().backward()
    assert torch.equal(prompt.grad, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_search_is_descent_with_straight_through_gradients_whose_best_prompt_is_kept(make: Any) -> None:
    torch.manual_seed(0)
    table, target, start = torch.randn(30, 6), torch.randn(3, 6), torch.randn(3, 6)
    rows = start.clone().requires_grad_()
    tokens, loss = hard_prompt_search(lambda E: (E - target).square().sum(), rows, table, 25, make([rows], lr=0.2))
    P = start.clone().requires_grad_()
    optimizer = make([P], lr=0.2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        one = (project(P, table) - target).square().sum()
        losses.append(one.item())
        one.backward()
        optimizer.step()
    torch.testing.assert_close(rows, P)
    assert loss == pytest.approx(min(losses))
    assert loss < losses[0]
    assert (table[tokens] - target).square().sum().item() == pytest.approx(loss)


def test_before_during_and_after_training_the_model_is_the_base_with_real_tokens_in_front() -> None:
    method = PEZ(3, judged_batches=1)
    ids = batch_at(99).input_ids
    start = tiny_model()
    method.adapt(start)
    end, _ = trained(method)
    with torch.no_grad():
        hard_prompt(start).embeddings.add_(1.0)  # somewhere between the tokens
    for model in (start, end):
        torch.testing.assert_close(model(ids), with_tokens(hard_prompt(model).tokens(), ids), atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_the_embeddings_of_the_tokens() -> None:
    method, ids = PEZ(3), batch_at(0).input_ids
    model = tiny_model()
    method.adapt(model)
    with torch.no_grad():
        hard_prompt(model).embeddings.add_(0.1)
    next_token_loss(model(ids), ids).backward()
    base = tiny_model().requires_grad_(False)
    rows = base.transformer.wte.weight[hard_prompt(model).tokens()].clone().requires_grad_(True)
    inputs = torch.cat([rows.expand(len(ids), -1, -1), base.transformer.wte(ids)], dim=1)
    next_token_loss(base(inputs_embeds=inputs)[:, 3:], ids).backward()
    torch.testing.assert_close(hard_prompt(model).embeddings.grad, rows.grad, atol=1e-6, rtol=1e-4)


# --- The search ----------------------------------------------------------------------------------------------


def test_the_prompt_that_is_kept_is_the_best_of_those_that_were_judged() -> None:
    method = PEZ(2, judged_batches=3, judge_every=1)
    seen: dict[tuple[int, ...], float] = {}

    class Watched(PEZ):
        def before_training(self, model: Any, batches: Any, steps: int) -> None:
            note(model)
            super().before_training(model, batches, steps)

        def after_step(self, model: Any, step: int, optimizer: Any) -> None:
            note(model)
            super().after_step(model, step, optimizer)

    @torch.no_grad()
    def note(model: GPT2) -> None:
        tokens = hard_prompt(model).tokens()
        losses = [next_token_loss(with_tokens(tokens, ids), ids) for ids in (batch_at(s).input_ids for s in range(3))]
        seen[tuple(tokens.tolist())] = float(torch.stack(losses).mean())

    model, _ = trained(Watched(2, judged_batches=3, judge_every=1))
    assert len(seen) > 5
    kept = tuple(hard_prompt(model).tokens().tolist())
    assert seen[kept] == pytest.approx(min(seen.values()), abs=1e-5)
    twin, _ = trained(method)
    assert tuple(hard_prompt(twin).tokens().tolist()) == kept
    assert len({*seen.values()}) > 5


@pytest.mark.parametrize("place", [4, 11, 25])
def test_a_run_that_is_interrupted_still_knows_its_best_prompt(place: int, tmp_path: Path) -> None:
    method = PEZ(2, judged_batches=1, judge_every=1)
    quiet, _ = trained(method)

    def trainer(model: GPT2, stop: int) -> Trainer:
        def interrupted(step: int) -> Batch:
            if step == stop:
                raise KeyboardInterrupt
            return batch_at(step)

        settings = TrainingSettings(steps=STEPS, learning_rate=0.3, precision="fp32")
        options: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint.pt", "checkpoint_every": 1}
        return Trainer(model, interrupted, settings, method=method, progress=False, **options)

    troubled, resumed = tiny_model(), tiny_model()
    method.adapt(troubled)
    method.adapt(resumed)
    with pytest.raises(KeyboardInterrupt):
        trainer(troubled, place).run()
    trainer(resumed, -1).run()
    assert method.training_state(resumed).keys() == {"best_tokens", "best_loss"}
    for name, tensor in method.training_state(quiet).items():
        assert torch.equal(method.training_state(resumed)[name], tensor), name


def test_the_token_that_was_in_front_of_the_texts_is_found() -> None:
    """The texts are the base's own after token 17, which none of the other 60 explains as well."""
    base, wanted = tiny_model(std=0.5), 17
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((64, 1), wanted)
    for _ in range(8):
        ids = torch.cat([ids, torch.multinomial(base(ids)[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    texts = ids[:, 1:]
    method = PEZ(1, judged_batches=1, judge_every=1)
    model = tiny_model(std=0.5)
    method.adapt(model)
    assert hard_prompt(model).tokens().tolist() != [wanted]
    settings = TrainingSettings(steps=60, learning_rate=0.3, precision="fp32", schedule="constant")
    Trainer(model, lambda step: Batch(texts, texts), settings, method=method, progress=False).run()
    assert hard_prompt(model).tokens().tolist() == [wanted]


# --- Files and texts -----------------------------------------------------------------------------------------


def test_a_directory_has_the_tokens_and_nothing_else(tmp_path: Path) -> None:
    model, method = tiny_model(), PEZ(5)
    method.adapt(model)
    method.save(model, tmp_path)
    (name, tensor), *others = load_file(tmp_path / WEIGHTS_FILE).items()
    assert (name, tensor.dtype, tensor.shape, others) == ("tokens", torch.int64, (5,), [])
    assert sum(p.numel() for p in method.trainable(model).values()) == 5 * 24


@pytest.mark.parametrize("tokens", [[61, 0], [-1, 0], [0.5, 1.0], [[1, 2]]], ids=str)
def test_tokens_that_are_not_the_models_are_refused_in_one_line(tokens: list[Any], tmp_path: Path) -> None:
    model, method = tiny_model(), PEZ(2)
    method.adapt(model)
    method.save(model, tmp_path)
    save_file({"tokens": torch.tensor(tokens)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="tokens") as error:
        load_adapter(tiny_model(), tmp_path)
    assert "\n" not in str(error.value)


def test_finetune_and_generate_show_the_prompt(
    quiet_run: Path, short_evaluation: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = run_in(quiet_run, tmp_path / "out", "--method", "pez", "--num-virtual-tokens", "3")
    place = flags.index("--rank")
    assert main([*flags[:place], *flags[place + 2 :]]) == 0
    model, tokenizer = load_gpt2(quiet_run / "model")
    method = load_adapter(model, tmp_path / "out")
    text = tokenizer.decode(hard_prompt(model).tokens().tolist())
    assert method.readable(model, tokenizer).startswith(repr(text))
    assert f"Learned by pez: {text!r}" in capsys.readouterr().out
    assert repr(text) in json.loads((tmp_path / "out" / "report.json").read_text())["report"]["learned_text"]
    places = ["--model", str(quiet_run / "model"), "--adapter", str(tmp_path / "out")]
    assert main(["generate", *places, "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert repr(text) in capsys.readouterr().err


def test_a_prompt_that_would_be_encoded_into_other_tokens_says_so() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "ab" if ids == [1, 2] else "c"

        def encode(self, text: str) -> list[int]:
            return [3] if text == "ab" else [4]

    model, method = tiny_model(), PEZ(2)
    method.adapt(model)
    tokenizer: Any = Letters()
    for tokens, expected in (([1, 2], "'ab' (a text that is encoded into other tokens)"), ([4, 4], "'c' (a t")):
        with torch.no_grad():
            hard_prompt(model).embeddings.copy_(model.transformer.wte.weight[tokens])
        assert method.readable(model, tokenizer).startswith(expected)
    tokenizer.encode = lambda text: [4, 4]
    assert method.readable(model, tokenizer) == "'c'"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judged_batches": 0}, "judged_batches must be a whole number of at least 1"),
        ({"judge_every": 0.5}, "judge_every must be a whole number of at least 1"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEZ(**fields)
