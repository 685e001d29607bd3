"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): give the rank to the matrices that need it.

The change is written as a singular value decomposition (eq. 3):

    y = W x + b + s B diag(E) A x        A: (r, in), E: (r, 1), B: (out, r)

A and B are random and kept close to orthonormal by a penalty (eq. 4); E starts at zero, so at the start nothing
changes. A triplet is one entry of E with its row of A and its column of B. Every training step

1. updates the importance of each number w with gradient g from its sensitivity |w g|: the sensitivity is smoothed, and
   so is its distance from the smoothed value; their product is the importance (eq. 9 to 11);
2. scores a triplet by the importance of its E plus the mean ones of its row and its column (eq. 7 and 8);
3. keeps the E of the best triplets of all matrices together and sets the others to zero. How many are kept falls from
   all to `target_rank` a matrix along a cubic (eq. 12). A triplet that was cut is still trained and can come back,
   until the last phase, in which the choice is final.

The authors' code, and PEFT, leave step 3 to a function that the training loop has to call; here it is in `after_step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.rank_allocation import allocate, cubic_budget, smoothed_sensitivity, triplet_scores
from lora_from_scratch.methods.wrapped_layers import WrapsLayers
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize

INITIAL_DEVIATION = 0.02  # of the entries of A and B, as in the authors' code
EPSILON = 1e-5  # added to the rank in the scaling, as there
PARTS = ("lora_A", "lora_B", "lora_E")
ALLOCATION = "adalora_allocation"  # where an adapted model keeps its `Allocation`, past nn.Module's bookkeeping


class AdaLoRALinear(LoRALinear):
    """A LoRA layer with a diagonal E between A and B: y = W x + b + s B diag(E) A x (Zhang et al. 2023, eq. 3).

    The parameters are `lora_A` (r, in), `lora_E` (r, 1) and `lora_B` (out, r). The scaling s = alpha / r keeps the
    first rank: cutting a triplet, that is setting its E to zero, does not change what the others add.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, alpha, dropout=dropout, generator=generator)
        self.scaling = alpha / (rank + EPSILON)
        self.lora_E = nn.Parameter(self._like_base(torch.zeros(rank, 1)))

    def initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        inputs, outputs = in_and_out(self.base)
        check_rank(self.rank, min(inputs, outputs), "the smaller side of W")
        A = INITIAL_DEVIATION * torch.randn(self.rank, inputs, generator=generator)
        return A, INITIAL_DEVIATION * torch.randn(outputs, self.rank, generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(E) A (r, in) and B (out, r), whose product the layer multiplies by s. Gradients flow to A, E and B."""
        return self.lora_A * self.lora_E, self.lora_B

    def distances_from_orthonormal(self) -> Tensor:
        """How far the rows of A and the columns of B are from orthonormal: ||A A^T - I|| and ||B^T B - I|| (eq. 4).

        These are Frobenius norms. As in the authors' code, they are not squared. Gradients flow to A and B.

        Returns:
            (2,), first the distance of A, then that of B.
        """
        A, B = self.lora_A, self.lora_B
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        return torch.stack([torch.linalg.matrix_norm(gram - identity) for gram in (A @ A.T, B.T @ B)])


class Allocation:
    """What the choice of triplets remembers from step to step.

    Attributes:
        sensitivity, uncertainty: smoothed, by the name of each parameter; of its shape.
        kept: by the name of each layer, (r,) of ones and zeros: the last choice.
    """

    def __init__(self, layers: Mapping[str, AdaLoRALinear], steps: int) -> None:
        self.steps = steps
        named = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in PARTS}
        self.sensitivity = {name: torch.zeros_like(p, requires_grad=False) for name, p in named.items()}
        self.uncertainty = {name: torch.zeros_like(p, requires_grad=False) for name, p in named.items()}
        self.kept = {name: torch.ones(layer.rank, device=layer.lora_E.device) for name, layer in layers.items()}

    def observe(self, layers: Mapping[str, AdaLoRALinear], beta1: float, beta2: float) -> None:
        """Update sensitivity and uncertainty from the gradients (eq. 9 and 10)."""
        for name, smoothed in list(self.sensitivity.items()):
            layer, _, part = name.rpartition(".")
            parameter = getattr(layers[layer], part)
            self.sensitivity[name], self.uncertainty[name] = smoothed_sensitivity(
                parameter, parameter.grad, smoothed, self.uncertainty[name], beta1, beta2
            )

    def choose(self, layers: Mapping[str, AdaLoRALinear], budget: int) -> None:
        """Choose the best triplets of all layers together; among equals the first."""

        def of(layer: str, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {part: table[f"{layer}.{part}"] for part in PARTS}

        scores = [triplet_scores(of(name, self.sensitivity), of(name, self.uncertainty)) for name in layers]
        self.kept = dict(zip(layers, allocate(scores, budget), strict=True))

    def cut(self, layers: Mapping[str, AdaLoRALinear]) -> None:
        """Set E to zero where a triplet is not kept."""
        for name, layer in layers.items():
            layer.lora_E.mul_(self.kept[name][:, None].to(layer.lora_E.dtype))


@dataclass(frozen=True)
class AdaLoRA(WrapsLayers):
    """AdaLoRA on whole linear layers of any model; see the module for the equations.

    Args:
        rank, target_rank: of each matrix at the beginning, and on average in the end.
        initial_share, final_share: of the training steps, before the budget falls and after it has fallen.
        interval: steps from one choice to the next.
        orthogonality: weight of the penalty.
        beta1, beta2: of the smoothing of sensitivity and uncertainty.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(12, "rank of each matrix at the beginning")
    target_rank: int = hyperparameter(8, "average rank of a matrix in the end")
    alpha: float = hyperparameter(96, "strength: the change is scaled by alpha / rank")
    dropout: float = hyperparameter(0.0, "share of the inputs that is dropped in training")
    initial_share: float = hyperparameter(0.1, "share of the steps before the ranks fall")
    final_share: float = hyperparameter(0.3, "share of the steps after the ranks have fallen")
    interval: int = hyperparameter(10, "steps from one choice of ranks to the next")
    orthogonality: float = hyperparameter(0.1, "weight of the penalty that keeps A and B orthonormal")
    beta1: float = 0.85
    beta2: float = 0.85
    seed: int = 0  # of A's and B's first values

    name: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 2e-4, "as LoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 16
    use_when: ClassVar[str] = (
        "you do not know which layers need the rank, and the run is long enough to find out; the number of steps "
        "has to be known in advance"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"adalora"})
    layer: ClassVar[type[nn.Module]] = AdaLoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "target_rank", "interval"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank must be at most the rank of {self.rank}, got {self.target_rank}")
        if not isinstance(self.alpha, int | float) or self.alpha <= 0:
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}")
        for name in ("dropout", "initial_share", "final_share", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}")
        if self.initial_share + self.final_share >= 1:
            raise ValueError(
                f"initial_share and final_share must be below 1 together, got {self.initial_share + self.final_share}"
            )
        if self.orthogonality < 0:
            raise ValueError(f"orthogonality must be at least 0, got {self.orthogonality!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: AdaLoRALinear(base, self.rank, self.alpha, self.dropout, generator) for name, base in bases.items()
        }

    # --- During training ---

    def budget(self, step: int, steps: int, matrices: int) -> int:
        """How many triplets are kept after a step (eq. 12)."""
        first, last = self.phases(steps)
        return cubic_budget(step, first, last, self.rank * matrices, self.target_rank * matrices)

    def phases(self, steps: int) -> tuple[int, int]:
        """The last step before the budget falls, and the step at which it has fallen."""
        return int(self.initial_share * steps), steps - int(self.final_share * steps)

    def before_training(self, model: nn.Module, batches: Iterable[Any], steps: int) -> None:
        model.__dict__[ALLOCATION] = Allocation(self.layers(model), steps)

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """The mean over all A and B of ||P P^T - I||, the Frobenius norm (eq. 4), times `orthogonality`."""
        if self.orthogonality == 0:
            return None
        distances = [layer.distances_from_orthonormal() for layer in self.layers(model).values()]
        return self.orthogonality * torch.cat(distances).mean()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        allocation, layers = model.__dict__[ALLOCATION], self.layers(model)
        first, last = self.phases(allocation.steps)
        if step <= last:
            allocation.observe(layers, self.beta1, self.beta2)
            if step == last or (step > first and step % self.interval == 0):
                allocation.choose(layers, self.budget(step, allocation.steps, len(layers)))
                allocation.cut(layers)
        else:
            allocation.cut(layers)

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        allocation = model.__dict__.get(ALLOCATION)
        if allocation is None:
            return {}
        tables = {"sensitivity": allocation.sensitivity, "uncertainty": allocation.uncertainty, "kept": allocation.kept}
        return {f"{kind}.{name}": tensor for kind, table in tables.items() for name, tensor in table.items()}

    def _uninstall(self, model: nn.Module) -> None:
        super()._uninstall(model)
        model.__dict__.pop(ALLOCATION, None)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank that each layer has now: how many entries of its E are not zero."""
        return {name: int(layer.lora_E.count_nonzero()) for name, layer in self.layers(model).items()}

    # --- Files ---

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys. Triplets that were cut are zeros."""
        allocation = model.__dict__.get(ALLOCATION)
        steps = allocation.steps if allocation else 1
        first, last = self.phases(steps)
        config = self.peft_config(
            model,
            init_r=self.rank,
            target_r=self.target_rank,
            lora_alpha=self.alpha,
            total_step=steps,
            tinit=first,
            tfinal=steps - last,
            deltaT=self.interval,
            orth_reg_weight=self.orthogonality,
        )
        optional = {"lora_dropout": self.dropout, "beta1": self.beta1, "beta2": self.beta2}
        defaults = {"lora_dropout": 0.0, "beta1": 0.85, "beta2": 0.85}
        config |= {name: value for name, value in optional.items() if value != defaults[name]}
        return config, self.peft_tensors(model)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[AdaLoRA, dict[str, Tensor]]:
        understood = ("init_r", "target_r", "lora_alpha", "total_step", "tinit", "tfinal", "deltaT", "orth_reg_weight")
        understood += ("beta1", "beta2", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")  # type: ignore[assignment]
        understood += ("lora_dropout", "rank_pattern", "bias", "init_lora_weights")  # type: ignore[assignment]
        harmless = ("r", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config")
        adapter_files.refuse_unknown_fields(config, understood, harmless)
        adapter_files.refuse_other_values(config, "bias", ("none",))
        steps = config.get("total_step") or 1
        rank = config.get("init_r", 12)
        method = cls(
            targets=targets_in_peft(config, model),
            rank=rank,
            target_rank=min(config.get("target_r", 8), rank),
            alpha=config.get("lora_alpha", 8) or rank,
            dropout=config.get("lora_dropout", 0.0),
            initial_share=config.get("tinit", 0) / steps,
            final_share=config.get("tfinal", 0) / steps,
            interval=config.get("deltaT", 1),
            orthogonality=config.get("orth_reg_weight", 0.5),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
        )
        state = {key.removeprefix(adapter_files.PREFIX): tensor for key, tensor in tensors.items()}
        return method, {name: _with_zeros(name, tensor, rank) for name, tensor in state.items()}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> AdaLoRA:
        rank = rng.randint(1, 3)
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rank,
            target_rank=rng.randint(1, rank),
            alpha=rng.uniform(0.1, 20),
            dropout=rng.choice([0.0, 0.1]),
            interval=rng.randint(1, 3),
            orthogonality=rng.choice([0.0, 0.1]),
            seed=rng.randint(0, 99),
        )


def _with_zeros(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A tensor from which PEFT left out the triplets that were cut, in its full size again."""
    dim = 1 if name.endswith(".lora_B") else 0
    missing = rank - tensor.shape[dim]
    if missing <= 0 or tensor.ndim != 2:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


@activations.forward.register
def _(module: AdaLoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    A, B = module.factors()
    h = tape.linear(tape.dropout(x, module.dropout_p, noise_width=1), A, len(A))  # (rows, r)
    saved = [h] if h.width == B.element_size() else [h, TensorSize(1, B.numel(), h.width)]  # and the copy of B
    return tape.add([y, h], TensorSize(y.rows, y.columns, y.width), saved, [B])
