"""LoRA+: B learns faster, as in peft's optimiser for it."""

from __future__ import annotations

import pytest
import torch

from lora_from_scratch.finetune.training import TrainingSettings, adamw
from lora_from_scratch.methods.lora_plus import LoRAPlus
from tests.helpers import tiny_model


def test_b_learns_at_its_own_rate_and_everything_else_at_that_of_a() -> None:
    model, method = tiny_model(), LoRAPlus(rank=2, ratio=8.0, bias="all", modules_to_save=("ln_f",))
    method.adapt(model)
    optimizer = adamw(method.parameter_groups(model), TrainingSettings(steps=1, learning_rate=1e-3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(method.trainable(model))
    for name, parameter in method.trainable(model).items():
        assert rates[id(parameter)] == pytest.approx(8e-3 if name.endswith("lora_B") else 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_rates_are_those_of_pefts_optimizer() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    from tests.any_models import model_of

    theirs = peft.get_peft_model(model_of("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    expected = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {
        n.split(".default")[0].removeprefix("base_model.model."): expected[id(p)]
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    model, method = model_of("gpt2"), LoRAPlus(rank=2, ratio=8.0, targets=("c_attn",))
    method.adapt(model)
    ours = {id(p): 1e-3 * group.get("lr_scale", 1) for group in method.parameter_groups(model) for p in group["params"]}
    assert {name: ours[id(p)] for name, p in method.trainable(model).items()} == pytest.approx(by_name)


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), "big"])
def test_a_ratio_that_is_no_positive_number_is_refused(ratio: object) -> None:
    with pytest.raises(ValueError, match="ratio must be a positive number"):
        LoRAPlus(ratio=ratio)  # type: ignore[arg-type]
