"""On a graphics card: every method trains as on the CPU, 4-bit weights are bitsandbytes', and the commands run.

Skipped where there is no card; `make test-gpu` runs only these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.cli import main
from lora_from_scratch.finetune.paged_optimizer import PagedAdamW
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.methods.method import Method
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit
from lora_from_scratch.serving.batched_lora import batched_lora
from tests.cli_calls import output_of
from tests.helpers import tiny_model
from tests.test_moved_models import METHODS
from tests.tiny_runs import run_in

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCABULARY = tiny_model().config.vocab_size


def batch_at(step: int) -> Batch:
    ids = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids)


def trained_on(device: str, method: Method) -> tuple[list[float], torch.Tensor]:
    """The losses of three steps, and the logits after them, on the CPU."""
    model = tiny_model(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).to(device)
    method.adapt(model)
    settings = TrainingSettings(steps=3, learning_rate=1e-3, precision="fp32")
    losses = Trainer(model, batch_at, settings, method=method, progress=False).run().losses
    with torch.no_grad():
        return losses, model.eval()(batch_at(9).input_ids.to(device)).cpu()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_as_on_the_cpu(name: str) -> None:
    (losses, logits), (expected_losses, expected) = (trained_on(device, METHODS[name]) for device in ("cuda", "cpu"))
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("shape", [(64,), (65,), (8, 256), (129, 33), (300, 768)])
def test_4_bit_weights_are_those_of_bitsandbytes_bit_for_bit(shape: tuple[int, ...]) -> None:
    bnb: Any = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize_4bit(weight, "nf4", 64, False)
    assert torch.equal(ours.packed.flatten(), theirs.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.packed.cpu(), quantize_4bit(weight.cpu(), "nf4", 64, False).packed)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(theirs, state))


def test_the_paged_optimiser_does_what_adamw_does(tmp_path: Path) -> None:
    results = []
    for make in (torch.optim.AdamW, lambda groups, lr: PagedAdamW(groups, lr=lr, directory=tmp_path)):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 100).cuda())
        optimizer = make([{"params": [parameter], "weight_decay": 0.01}], lr=0.1)
        for _ in range(3):
            (parameter**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(parameter.detach().cpu())
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


def test_many_adapters_in_a_batch_are_served_as_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(shape, generator=generator) for shape in ((5, 3, 8), (4, 2, 8), (4, 6, 2)))
    index = torch.tensor([0, 3, 1, 1, 2])
    expected = batched_lora(x, A, B, 0.5, index)
    found = batched_lora(x.cuda(), A.cuda(), B.cuda(), 0.5, index.cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_commands_run(cli_directory: Path, tmp_path: Path, short_evaluation: None, precision: str) -> None:
    output, device = tmp_path / "out", ["--device", "cuda", "--precision", precision]
    assert main(run_in(cli_directory, output, *device)) == 0
    places = ["--model", cli_directory / "model", "--adapter", output]
    assert output_of("generate", *places, *device, "--prompt", "hero[fox]", "--max-new-tokens", 3)
    scores = json.loads(
        output_of("evaluate", *places, *device, "--data", cli_directory / "data.csv", "--cards", 1, "--json")
    )
    assert scores["perplexity"] > 1
