"""What checks with a comparison of their own let through is rounding or chance, and no more."""

import pytest
import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.unit_06.probes import START, same_encoder
from lora_from_scratch.checks.unit_13.probes import same_product
from lora_from_scratch.checks.unit_27.probes import same_loss, same_tokens

X = torch.linspace(-2, 3, 40)


@pytest.mark.parametrize(
    ("dtype", "factor", "same"),
    [
        (torch.bfloat16, 1 + 2**-8, True),
        (torch.bfloat16, 1.05, False),
        (torch.float32, 1 + 1e-6, True),
        (torch.float32, 1.005, False),
    ],
)
def test_a_gradient_and_a_product_may_differ_in_the_last_digit_of_their_dtype(
    dtype: torch.dtype, factor: float, same: bool
) -> None:
    exact, other = X.to(dtype), (X * factor).to(dtype)
    case = Case("x", {"dtype": str(dtype).removeprefix("torch.")})
    one, wanted = (Seen({"values": X, "gradient": gradient}) for gradient in (other, exact))
    assert same_tokens(case, one, wanted) == same
    assert same_product(case, Seen({"y": other}), Seen({"y": exact})) == same


@pytest.mark.parametrize(("error", "same"), [(3e-7, True), (1e-3, False)])
def test_a_loss_that_cancels_is_compared_with_its_largest_term(error: float, same: bool) -> None:
    case = Case("x", {"log_probabilities": torch.tensor([[-1.0], [-1.0]]), "advantages": torch.tensor([1.0, -1.0])})
    one, other = (Seen({"loss": torch.tensor(loss), "gradient": X}) for loss in (error, 0.0))
    assert same_loss(case, one, other) == same


def drawn(values: Tensor) -> Seen:
    return Seen({"values": {"embedding": values}})


@pytest.mark.parametrize("n", [64, 2880])
def test_initial_values_of_the_same_distribution_agree_and_others_do_not(n: int) -> None:
    case = Case("x", {"what": START})
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        normal, again = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
        uniform = 2 * torch.rand(n, generator=generator) - 1
        assert n < 1000 or same_encoder(case, drawn(again), drawn(normal))
        assert same_encoder(case, drawn(2 * torch.rand(n, generator=generator) - 1), drawn(uniform))
    for other in (1.2 * again, again + 0.2, 3**0.5 * uniform):
        assert n < 1000 or not same_encoder(case, drawn(other), drawn(normal))
    for other in (1.5 * uniform, uniform + 1, uniform * 0):
        assert not same_encoder(case, drawn(other), drawn(uniform))
