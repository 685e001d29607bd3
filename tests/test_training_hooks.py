"""What a method may do during training (`Method.parameter_groups`, `before_training`, `extra_loss`, `after_step`).

Each hook is used by a small variant of LoRA. Whatever it does, a run that is stopped and resumed ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.lora import LoRA, lora_layers
from tests.helpers import tiny_model

STEPS = 7


class StoppedError(Exception):
    """The process that trains is gone."""


@dataclass(frozen=True)
class Groups(LoRA):
    """B learns four times as fast as A."""

    name: ClassVar[str] = "groups"

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        trained = self.trainable(model)
        return [
            {"params": [p for name, p in trained.items() if name.endswith(part)], "lr_scale": scale}
            for part, scale in (("lora_A", 1.0), ("lora_B", 4.0))
        ]


@dataclass(frozen=True)
class DrivenByData(LoRA):
    """A starts as random numbers, scaled by how often the first batches have each token; the base changes as well."""

    name: ClassVar[str] = "data"

    def before_training(self, model: nn.Module, batches: Iterable[Batch], steps: int) -> None:
        assert steps == STEPS
        tokens = torch.cat([batch.input_ids.flatten() for batch in islice(batches, 3)])
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_A.copy_(torch.randn_like(layer.lora_A) * tokens.float().mean() / 100)
                layer.base.weight.mul_(1 + tokens.float().std() / 1000)  # type: ignore[operator]


@dataclass(frozen=True)
class Orthogonal(LoRA):
    """The rows of every A are pulled towards orthogonality."""

    name: ClassVar[str] = "orthogonal"

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        return sum(  # type: ignore[return-value]
            (A @ A.T - torch.eye(len(A))).square().sum()
            for A in (layer.lora_A for layer in lora_layers(model).values())
        )


@dataclass(frozen=True)
class Restarting(LoRA):
    """Every third step the product goes into the base weight, A and B start anew, and their optimiser state is cut."""

    name: ClassVar[str] = "restarting"

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        assert all(p.grad is not None for p in self.trainable(model).values())
        if step % 3:
            return
        with torch.no_grad():
            for layer in lora_layers(model).values():
                weight = layer.base.weight
                assert isinstance(weight, Tensor)
                weight.add_(layer.change(weight).T)  # a Conv1D stores (in, out)
                layer.lora_A.copy_(torch.randn_like(layer.lora_A))
                layer.lora_B.zero_()
                for factor in (layer.lora_A, layer.lora_B):
                    optimizer.state[factor]["exp_avg"].mul_(0.1)
                    optimizer.state[factor]["exp_avg_sq"].mul_(0.1)

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {f"{name}.base": layer.base.weight for name, layer in lora_layers(model).items()}  # type: ignore[misc]


METHODS = [Groups, DrivenByData, Orthogonal, Restarting]


def batch_at(step: int) -> Batch:
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids)


def adapted(method: LoRA) -> GPT2:
    model = tiny_model()
    method.adapt(model)
    return model


def trainer(model: GPT2, method: LoRA, checkpoint: Path | None = None, stop: int = 0, **changes: Any) -> Trainer:
    settings = TrainingSettings(steps=STEPS, learning_rate=1e-2, precision="fp32", **changes)
    made: Trainer

    def perhaps_stop() -> dict[str, float]:
        if made.step == stop:
            raise StoppedError
        return {}

    made = Trainer(
        model, batch_at, settings, method=method, checkpoint=checkpoint, checkpoint_every=2, evaluate=perhaps_stop,
        evaluate_every=1, progress=False,
    )  # fmt: skip
    return made


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit(cls: type[LoRA], stop: int, tmp_path: Path) -> None:
    method = cls(rank=2, dropout=0.1)
    quiet = adapted(method)
    losses = trainer(quiet, method).run().losses
    with pytest.raises(StoppedError):
        trainer(adapted(method), method, tmp_path / "checkpoint.pt", stop).run()
    resumed = adapted(method)
    history = trainer(resumed, method, tmp_path / "checkpoint.pt").run()
    assert history.losses == losses
    for name, tensor in quiet.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("cls", METHODS)
def test_each_hook_changes_what_is_learned(cls: type[LoRA]) -> None:
    plain, method = LoRA(rank=2), cls(rank=2)
    models = [adapted(plain), adapted(method)]
    for each, model in zip((plain, method), models, strict=True):
        trainer(model, each).run()
    assert not torch.equal(models[0](batch_at(0).input_ids), models[1](batch_at(0).input_ids))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_extra_loss_counts_once_a_step_and_not_in_the_history(accumulation: int) -> None:
    seen: dict[str, Tensor] = {}

    class Watched(Orthogonal):
        def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
            if step == 1:
                seen.update({name: p.grad.clone() for name, p in self.trainable(model).items() if p.grad is not None})

    method = Watched(rank=2)
    model, twin = adapted(method), adapted(method)
    losses = trainer(model, method, accumulation=accumulation, clip_norm=0.0).run().losses
    batch = batch_at(0)
    task = next_token_loss(twin(batch.input_ids), batch.labels)
    extra = method.extra_loss(twin)
    assert extra is not None
    (task + extra).backward()
    for name, parameter in method.trainable(twin).items():
        torch.testing.assert_close(seen[name], parameter.grad, atol=1e-5, rtol=1e-4)
    assert losses[0] == pytest.approx(float(task.detach()), rel=1e-5)


def test_a_checkpoint_of_the_state_of_a_method_holds_it_and_nothing_else_of_the_base(tmp_path: Path) -> None:
    for cls, kept in ((Restarting, 4 * 2), (Orthogonal, 0)):  # four matrices in each of two blocks
        path = tmp_path / f"{cls.name}.pt"
        method = cls(rank=2)
        trainer(adapted(method), method, path).run()
        assert len(torch.load(path, weights_only=True)["method"]) == kept
