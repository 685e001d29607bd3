"""What a check draws is never where rounding or chance would decide the verdict."""

from typing import Any

import pytest
import torch

from lora_from_scratch.checks.exercise import Case, Draw
from lora_from_scratch.checks.new_tensor import NOT_NEW, new_tensor
from lora_from_scratch.checks.unit_16.probes import run_test
from lora_from_scratch.checks.unit_17.exercises import terms_cases
from lora_from_scratch.checks.unit_17.probes import run_terms
from lora_from_scratch.checks.unit_19.cases import quantize_cases
from lora_from_scratch.methods.glora import scale_and_shift

SEEDS = range(500)


def drawn(case: Case) -> torch.Tensor:
    weight = case.inputs["weight"]
    assert isinstance(weight, torch.Tensor)
    return weight


@pytest.mark.parametrize("name", ["in bfloat16", "in float16"])
def test_no_weight_in_16_bits_lies_on_the_midpoint_of_two_codes(name: str) -> None:
    for seed in SEEDS:
        [case] = [case for case in quantize_cases(Draw(seed)) if case.name == name]
        groups = drawn(case).double().unflatten(1, (-1, 4))
        low, high = groups.aminmax(dim=2, keepdim=True)
        codes = (groups - low) / (high - low) * (2 ** int(str(case.inputs["bits"])) - 1)
        assert float((codes.frac() - 0.5).abs().min()) > 0.04


def test_the_gradient_of_a_single_number_does_not_cancel() -> None:
    for seed in SEEDS:
        [case] = [case for case in terms_cases(Draw(seed)) if "a number for each" in case.name]
        inputs: dict[str, Any] = dict(case.inputs)
        found = run_terms(scale_and_shift, **inputs)
        assert min(float(gradient) for gradient in found["gradients"].values()) > 0.1


@pytest.mark.parametrize("seed", [0, 42, 99, 1234])
def test_a_test_may_choose_the_seed_that_the_check_has_chosen(seed: int) -> None:
    """With one seed before both calls, an implementation that reads the global generator would look sound."""
    torch.manual_seed(seed)
    seeds: list[int] = []
    run_test(lambda _: seeds.append(torch.initial_seed()), "NumPy's generator")
    assert seeds[0] % 2**32 != seed  # the generator reads 32 bits


def test_a_result_is_new_unless_it_shares_memory() -> None:
    x = torch.ones(2, 3)
    assert new_tensor(lambda given: given, x) == NOT_NEW
    assert new_tensor(lambda given: given.T, x) == NOT_NEW
    assert torch.equal(new_tensor(lambda given: given.clone(), x), x)
    assert torch.equal(new_tensor(lambda given: given.mul_(2), x.clone()), 2 * x)  # modified: another message
