"""RandLoRA (Albert et al. 2025, arXiv:2502.00987): a sum of products of random matrices, of any rank.

All layers share one random matrix A and n random matrices B_j, which are never trained. A layer learns two diagonal
matrices for each j:

    y = W x + b + s * sum over j of B_j Lambda_j A Gamma_j x        s = alpha / r,    j = 1 ... n,    n = ceil(d / r)
    B_j: (out, r), Lambda_j: (r, r), A: (r, d), Gamma_j: (d, d)     for d = in <= out

Where out < in, d is out, and the change is the transpose of such a sum: the diagonals stand on the smaller side. A
layer learns n (r + d) numbers, about d + d^2 / r, so a larger r means fewer of them. Every Lambda_j starts at zero, so
at the start nothing changes; every Gamma_j starts at the identity divided by d.

Each product has at most rank r. The sum can have rank d. It is the product of two matrices, the B_j side by side and
the Lambda_j A Gamma_j one below the other,

    sum = B A'        B = [B_1 ... B_n]: (out, n r),    A': (n r, d)

whose common side n r is at least d. For almost all values of B, A, Lambda and Gamma it has rank d. (That A' can: let
Gamma_1 be zero but for its first r columns, Gamma_2 but for the next r, ...; then A' is block-diagonal.) But while all
Gamma_j are equal, the sum is (sum of B_j Lambda_j) A Gamma, of rank r. They are at the start, and still after the first
step, in which Gamma has no gradient because Lambda is zero.

A' is as large as a square weight. It is computed again in the backward pass, in place of being kept: on GPT-2 small
with 4 x 128 tokens a step keeps 332 MiB, and 546 without this (PEFT's: 654). The scaling is PEFT's; the authors' code
also divides it by the square root of n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.fast_product import add_product, dropout
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS, check_ranks_and_alphas
from lora_from_scratch.methods.vera import Projections, VeRA
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize

PEFT_A, PEFT_B = "base_model.randlora_A", "base_model.randlora_B"


def bases_for(side: int, rank: int) -> int:
    """n, how many products of rank r can add up to a matrix whose smaller side is `side`."""
    return math.ceil(side / rank)


def draw_bases(rank: int, small: int, large: int, seed: int) -> tuple[Tensor, Tensor]:
    """The random matrices that all layers share, from a seed: the same as PEFT's.

    Each entry is uniform with mean 0, and A and B are divided by the standard deviation of their entries. They are
    drawn in bfloat16, first A and then one B_j after the other, from `torch.Generator().manual_seed(seed)`. PyTorch's
    global generator is neither read nor changed. (Where there is no bfloat16, PEFT draws other numbers, in float16.)

    Args:
        rank: r.
        small, large: the most inputs and the most outputs of a layer, the smaller number first.
        seed: the same seed gives the same matrices in every call.

    Returns:
        A (r, 1, small) and B (large, n, r), in float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)

    A = draw(rank, 1, small)
    B = torch.cat([draw(large, 1, rank) for _ in range(bases_for(small, rank))], dim=1)
    return (A / A.std()).float(), (B / B.std()).float()


def scaled_rows(A: Tensor, lambdas: Tensor, gammas: Tensor) -> Tensor:
    """A', the rows lambda_kj (A_k * gamma_j) for each row A_k of A and each j.

    Args:
        A: (r, 1, d).
        lambdas: (r, n), column j the diagonal of Lambda_j.
        gammas: (n, d), row j the diagonal of Gamma_j.

    Returns:
        (r n, d): all j for the first row of A, then all j for the second. Gradients flow to the lambdas and the gammas.
    """
    return (lambdas[:, :, None] * A * gammas).flatten(0, 1)


class RandLoRALinear(LoRALinear):
    """A layer that learns `randlora_lambda` (r, n), whose columns are the Lambda_j, and `randlora_gamma` (n, d).

    Of the shared A (r, 1, ...) it uses the first d columns, and of B (..., ..., r) the first n of the B_j, and of their
    rows as many as it has outputs (inputs, if these are more).
    """

    def __init__(self, base: nn.Module, shared: Projections, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.base, self.shared = base, shared
        self.rank, self.alpha, self.dropout_p = len(shared.A), alpha, dropout
        self.scaling = alpha / self.rank
        self.register_buffer("_unmerged", None, persistent=False)
        d = min(in_and_out(base))
        n = bases_for(d, self.rank)
        self.randlora_lambda = nn.Parameter(self._like_base(torch.zeros(self.rank, n)))
        self.randlora_gamma = nn.Parameter(self._like_base(torch.full((n, d), 1 / d)))
        self.train(base.training)

    def scaled_A(self) -> Tensor:
        """A' (n r, d)."""
        d = min(in_and_out(self.base))
        return scaled_rows(self.shared.A[:, :, :d], self.randlora_lambda, self.randlora_gamma)

    def all_B(self) -> Tensor:
        """B (max(in, out), n r), a view of the shared one.

        The rows of A' are in the order of k and then j, so B_j in the equation is made of the columns j, n + j, 2 n + j
        ... of this matrix, and not of `shared.B[:, j]`. It is the same in PEFT and in the authors' code.
        """
        n = len(self.randlora_gamma)
        return self.shared.B[: max(in_and_out(self.base)), :n].flatten(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two matrices that x is multiplied by: (n r, in) and (out, n r)."""
        A, B = self.scaled_A(), self.all_B()
        inputs, outputs = in_and_out(self.base)
        return (A, B) if inputs <= outputs else (B.T, A.T)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        x = dropout(x, self.dropout_p, self.training)
        B = self.all_B().to(x.dtype)
        inputs, outputs = in_and_out(self.base)
        if inputs <= outputs:
            h = self.recomputing_A(F.linear, x)  # (..., n r)
            return add_product(y, h, B, self.scaling)  # y + s B A' x
        change = self.recomputing_A(torch.matmul, x @ B)
        return torch.add(y, change, alpha=self.scaling)  # y + s A'^T B^T x

    def recomputing_A(self, product: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """`product(x, A')`, which keeps x for the backward pass and computes A' again."""

        def run(x: Tensor) -> Tensor:
            return product(x, self.scaled_A().to(x.dtype))

        result: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return result


@dataclass(frozen=True)
class RandLoRA(VeRA):
    """RandLoRA on whole linear layers of any model; see the module for the equation.

    The random matrices are treated as VeRA's: drawn from `projection_seed`, and in the adapter directory only if
    `save_projection` says so.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(32, "r, the rank of each product of A and B; fewer parameters for a larger r")
    alpha: float = hyperparameter(640, "strength: the change is scaled by alpha / rank")

    name: ClassVar[str] = "randlora"
    peft_type: ClassVar[str] = "RANDLORA"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-3, 1e-4, "LLaMA-3.2-3B in PEFT's method_comparison; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 15.3
    use_when: ClassVar[str] = (
        "there may be only few parameters, and the change of a weight should not be limited to a low rank; on story "
        "cards it came close to LoRA with a quarter of its parameters (docs/atlas.md)"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"randlora"})
    layer: ClassVar[type[nn.Module]] = RandLoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_alphas(self.rank, {}, self.alpha, {})

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        sizes = [in_and_out(base) for base in bases.values()]
        small, large = sorted((max(inputs for inputs, _ in sizes), max(outputs for _, outputs in sizes)))
        A, B = self.projections or draw_bases(self.rank, small, large, self.projection_seed)
        weight: Any = next(iter(bases.values())).weight
        shared = Projections(A.to(weight.device), B.to(weight.device))
        return {name: RandLoRALinear(base, shared, self.alpha, self.dropout) for name, base in bases.items()}

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys.

        Random matrices are there once. PEFT writes them once more for each layer; it loads them from here, but warns
        that the copies are missing.
        """
        optional = {"projection_prng_key": self.projection_seed, "randlora_dropout": self.dropout}
        config = self.peft_config(model, r=self.rank, randlora_alpha=self.alpha)
        config |= {name: value for name, value in optional.items() if value}
        tensors = self.peft_tensors(model)
        if self.save_projection or self.projections is not None:
            shared = next(iter(self.layers(model).values())).shared
            return config, {PEFT_A: shared.A, PEFT_B: shared.B, **tensors}
        return config | {"save_projection": False}, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[RandLoRA, dict[str, Tensor]]:
        saved = PEFT_A in tensors and PEFT_B in tensors
        understood: tuple[str, ...] = ("r", "randlora_alpha", "randlora_dropout", "target_modules", "exclude_modules")
        understood += ("layers_to_transform", "layers_pattern", "projection_prng_key", "save_projection")
        understood += ("fan_in_fan_out", "init_weights", "bias")
        if saved:
            understood += ("sparse", "very_sparse")  # how they were drawn
        adapter_files.refuse_unknown_fields(config, understood)
        adapter_files.refuse_other_values(config, "bias", ("none",))
        method = cls(
            targets=targets_in_peft(config, model),
            rank=config.get("r", 32),
            alpha=config.get("randlora_alpha", 640),
            dropout=config.get("randlora_dropout", 0.0),
            projection_seed=config.get("projection_prng_key") or 0,
            save_projection=saved,
            # Cloned, because a product with a tensor that is aligned differently may round its last bit differently.
            projections=(tensors[PEFT_A].clone(), tensors[PEFT_B].clone()) if saved else None,
        )
        shared = (
            PEFT_A.removeprefix("base_model"),
            PEFT_B.removeprefix("base_model"),
        )  # PEFT repeats them in each layer
        state = {key.removeprefix(adapter_files.PREFIX): t for key, t in tensors.items() if not key.endswith(shared)}
        return method, state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> RandLoRA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 5),
            alpha=rng.uniform(0.1, 20),
            dropout=rng.choice([0.0, 0.1]),
            projection_seed=rng.randint(0, 99),
            save_projection=rng.random() < 0.5,
        )


@activations.forward.register
def _(module: RandLoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    x = tape.dropout(x, module.dropout_p, noise_width=1)
    inputs, outputs = in_and_out(module.base)
    B = module.all_B()
    if inputs <= outputs:
        h = product_with_scaled_A(module, x, B.shape[1], tape)
        kept = [TensorSize(1, B.numel(), h.width)] if h.width != B.element_size() else []  # the copy of B
        return tape.add([y, h], TensorSize(y.rows, y.columns, y.width), kept)
    change = product_with_scaled_A(module, tape.linear(x, B, B.shape[1]), outputs, tape)
    return tape.add([y, change], TensorSize(y.rows, y.columns, y.width))


def product_with_scaled_A(module: RandLoRALinear, x: TensorSize, columns: int, tape: Tape) -> TensorSize:
    """Record A' x or A'^T x, with A' computed again in the backward pass."""
    lambdas, gammas = module.randlora_lambda, module.randlora_gamma
    rows, d, width = lambdas.numel(), gammas.shape[1], gammas.element_size()
    inner = replace(tape, steps=[], kept={}, forward_peak=0)
    A = inner.add([], TensorSize(rows, d, width), [], [lambdas], scratch=rows * d * width)
    A = inner.add([A], TensorSize(rows, d, width), [A], [gammas], scratch=rows * d * width)
    used = 2 if tape.autocast else x.width
    narrow = inner.cast(x, used)
    A = inner.cast(A, used)
    y = inner.add([narrow, A], TensorSize(x.rows, columns, used), [narrow, A])
    return tape.checkpoint(x, [], inner, y)
