"""DoRA (Liu et al. 2024, arXiv:2402.09353): learn magnitude and direction of the weight apart.

Every row of the weight, the weights of one output, is a length times a direction. LoRA's low-rank change turns the
direction, and the length is a parameter of its own (eq. 5):

    V = W + s B A                     (out, in)
    y = (m / ||V||) (V x) + b,        m and ||V||: (out,), the norm of each row of V

m starts as ||W|| and B at zero, so at the start nothing changes. The norm is a constant for the gradient (section 4.3):
then the backward pass need not keep V. Nor is V formed in the forward pass: the squared norm of a row is

    ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>      (row by row)

Dropout is on the way through A and B only, as in LoRA. (The authors' code and PEFT drop inputs of W too, in all but the
share m / ||V|| = 1 of it, which takes a second product with W.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.methods.adapter_files import PREFIX
from lora_from_scratch.methods.fast_product import add_product
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers
from lora_from_scratch.methods.method import LearningRates
from lora_from_scratch.support.linear_layers import weight_of
from lora_from_scratch.support.tape import Tape, TensorSize

MAGNITUDE, PEFT_MAGNITUDE = ".lora_magnitude", ".lora_magnitude_vector"


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of V = W + s B A, as DoRA needs it in every step (Liu et al. 2024, section 4.3).

    - V itself is not formed: if W is in float32, no tensor of its size is created.
    - If rounding makes a square negative, the norm is 0.
    - No gradient flows to W, A or B, so that the backward pass needs none of this.

    Args:
        W: (out, in).
        A: (r, in).
        B: (out, r).
        scaling: s.

    Returns:
        (out,), computed and returned in float32, whatever the dtypes of W, A and B.
    """
    W, A, B = W.detach().float(), A.detach().float(), B.detach().float()
    squares = torch.linalg.vector_norm(W, dim=1).square()
    cross = ((A @ W.T).T * B).sum(dim=1)  # <W A^T, B>; W @ A.T takes several times as long if W is a transpose
    own = ((B @ (A @ A.T)) * B).sum(dim=1)  # <B A A^T, B>
    return (squares + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


class DoRALinear(LoRALinear):
    """A LoRA layer that learns the length of each row of V = W + s B A beside its direction (Liu et al. 2024, eq. 5).

    - `combine(y, h, B)` is what `forward(x)` returns: (m / ||V||) (W x + s B A x') + b, from y = W x + b (..., out) of
      the base and h = A x' (..., r). The bias is not rescaled, and a base may be without one. ||V|| is a constant for
      the gradient.
    - `change(W)` is what `merge()` adds to the base's weight W (out, in): (m / ||V||) V - W, in float32.
    - A row of zeros has no direction and stays zero.

    m is `lora_magnitude`, (out,); it starts as the norms of the rows of W. `norms()` is ||V||, (out,).
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16, **options: Any) -> None:
        super().__init__(base, rank, alpha, **options)
        self.lora_magnitude = nn.Parameter(self._like_base(self.norms()))  # m

    def norms(self) -> Tensor:
        """||V||, (out,)."""
        A, B = self.factors()
        return row_norms(weight_of(self.base), A, B, self.scaling)

    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        m = self.lora_magnitude
        u = add_product(y, h, B, self.scaling)  # V x + b
        bias = getattr(self.base, "bias", None)
        Vx = u if bias is None else u - bias.to(u.dtype)
        smallest = torch.finfo(m.dtype).tiny  # instead of a norm of zero
        gain = m / self.norms().to(m.dtype).clamp_min(smallest)
        return torch.addcmul(u, Vx, (gain - 1).to(u.dtype))  # = gain V x + b, and keeps one large tensor less

    def change(self, W: Tensor) -> Tensor:
        norms = self.norms().clamp_min(torch.finfo(torch.float32).tiny)
        return (self.lora_magnitude.float() / norms)[:, None] * (W + super().change(W)) - W


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA on whole linear layers of any model; see the module for the equation.

    Raises:
        ValueError: as for `LoRA`; or a target is a part of a fused layer.
    """

    name: ClassVar[str] = "dora"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-4, "as LoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 12
    use_when: ClassVar[str] = (
        "the lengths of the weight's rows are to be learned apart from their directions; at tuned rates it was "
        "not ahead of LoRA here (unit 15), and a step takes longer"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"dora"})
    layer: ClassVar[type[LoRALinear]] = DoRALinear

    def _layer(self, model: nn.Module, name: str, parts: tuple[str, ...], generator: torch.Generator) -> LoRALinear:
        if parts:
            raise ValueError(f"DoRA adapts whole layers, got a part of {name}; give the layer as a target")
        return super()._layer(model, name, parts, generator)

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        config, tensors = super().to_adapter(model)
        for name, layer in lora_layers(model).items():
            assert isinstance(layer, DoRALinear)
            tensors[f"{PREFIX}{name}{PEFT_MAGNITUDE}"] = layer.lora_magnitude
        return config | {"use_dora": True}, tensors

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == cls.peft_type and bool(config.get("use_dora"))

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LoRA, dict[str, Tensor]]:
        magnitudes = {key: tensor for key, tensor in tensors.items() if key.endswith(PEFT_MAGNITUDE)}
        others = {key: tensor for key, tensor in tensors.items() if key not in magnitudes}
        method, state = super().from_adapter({**config, "use_dora": False}, others, model)
        for key, tensor in magnitudes.items():
            name = key.removeprefix(PREFIX).removesuffix(PEFT_MAGNITUDE)
            state[f"{name}{MAGNITUDE}"] = tensor
        return method, state


@activations.forward.register
def _(module: DoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    u = activations.forward.dispatch(LoRALinear)(module, x, tape)
    if module.merged:
        return u
    row = TensorSize(1, u.columns, u.width)
    kept = [TensorSize(u.rows, u.columns, u.width), row, row]  # u - b, m / ||V|| - 1, ||V||
    return tape.add([u], TensorSize(u.rows, u.columns, u.width), kept, [module.lora_magnitude])
