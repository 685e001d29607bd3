"""GaLore (Zhao et al. 2024, arXiv:2403.03507): train whole weights with the optimiser state of a low-rank update.

The gradient G of a weight W is projected onto its own r largest singular directions, and only the projection goes
through Adam (algorithm 2). For W: (out, in) with out <= in, in step t:

    every T steps   U, S, V = svd(G),  P = U[:, :r]                 P: (out, r)
    always          N = Adam(P^T G)                                 m, v, N: (r, in)
                    W = W - lr alpha P N

For out > in, P contains the first r right singular vectors, and G P takes the place of P^T G. Each T steps change W in
one subspace; with several subspaces the total change may have any rank.

The same algorithm can be written as a LoRA. Let R: (r, in) be a trained matrix that starts at zero, and

    y = (W + P R) x + b        dL/dR = P^T G

so Adam on R alone, with the learning rate lr alpha, changes W + P R by -lr alpha P N, which is GaLore's step. Every T
steps P R is added to W, R is set to zero, and P is replaced. So **GaLore is a LoRA with one frozen factor, which comes
from the gradient, merged every T steps**. It is implemented like this here. Compared to projecting the full gradient, G
is computed only once every T steps, and where out > in, the backward pass needs r numbers of each token instead of in,
as in LoRA-FA.

**Adam's moments are not converted when P changes.** They are those of R's coordinates, which now belong to other
directions of W, and even the sign of a singular vector is arbitrary. So m and v describe the old subspace until they
have decayed: m after about 10 steps, v after about 1000, which is longer than T. ReLoRA resets them instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS, check_ranks_and_alphas, find_targets
from lora_from_scratch.methods.relora import absorb, weight_without_change
from lora_from_scratch.methods.weight_gradients import visit_weight_gradients
from lora_from_scratch.methods.wrapped_layers import WrapsLayers
from lora_from_scratch.support.linear_layers import dense, in_and_out, refuse_tied
from lora_from_scratch.support.wrapped import unwrapped

BATCHES = "galore_batches"  # attribute of an adapted model: the `Batches` of its run

# --- The layer -------------------------------------------------------------------------------------------


def projection(gradient: Tensor, rank: int) -> Tensor:
    """P: the first `rank` singular vectors of G on its smaller side (algorithm 2).

    The authors' code projects a square G from the right; algorithm 2 does it from the left, and so does this.

    Args:
        gradient: G (out, in).

    Returns:
        (out, r), the left singular vectors, if out <= in; else (r, in), the right ones. In the dtype of G, the rows or
        columns orthonormal.
    """
    outputs, inputs = gradient.shape
    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    U, _, Vh = torch.linalg.svd(precise, full_matrices=False)
    return (U[:, :rank] if outputs <= inputs else Vh[:rank]).to(gradient.dtype)


class GaLoreLinear(LoRALinear):
    """A LoRA with scaling 1 one of whose factors is the frozen P and the other the trained R.

    out <= in: `lora_B` is P (out, r), `lora_A` is R (r, in). out > in: `lora_A` is P (r, in), `lora_B` is R (out, r).
    Before the first gradient is known, P is random.
    """

    def __init__(self, base: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__(base, rank, alpha=rank, generator=generator)
        self.P.requires_grad_(False)

    def initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): R is zero, and P has orthonormal random rows or columns."""
        inputs, outputs = in_and_out(self.base)
        check_rank(self.rank, min(inputs, outputs), "the smaller side of W")
        Q, _ = torch.linalg.qr(torch.randn(min(inputs, outputs), self.rank, generator=generator))
        return (torch.zeros(self.rank, inputs), Q) if self.is_left else (Q.T, torch.zeros(outputs, self.rank))

    @property
    def is_left(self) -> bool:
        """Whether P multiplies R from the left: P is on the smaller side of W, and R has the larger one."""
        inputs, outputs = in_and_out(self.base)
        return outputs <= inputs

    @property
    def P(self) -> nn.Parameter:
        return self.lora_B if self.is_left else self.lora_A

    @property
    def R(self) -> nn.Parameter:
        return self.lora_A if self.is_left else self.lora_B

    @torch.no_grad()
    def change_subspace(self, P: Tensor) -> None:
        """W = W + P_old R, R = 0, P = P_new."""
        absorb(self)
        self.R.zero_()
        self.P.copy_(P)


# --- The gradients of the weights --------------------------------------------------------------------------


def projections(model: nn.Module, layers: Mapping[str, GaLoreLinear], batch: Any) -> dict[str, Tensor]:
    """P of each layer, from the gradient of a batch's loss with respect to its W.

    It takes a pass of its own (`visit_weight_gradients`), without dropout, so that all processes of a distributed run
    get the same P. A gradient that is not finite gives no P; the training loop reports it.

    Args:
        model: maps `input_ids` to logits; contains the layers.
        batch: with `input_ids`, `labels` and `attention_mask`.
    """
    found: dict[str, Tensor] = {}

    def project(name: str, G: Tensor) -> None:
        if G.isfinite().all():
            found[name] = projection(G, layers[name].rank)

    visit_weight_gradients(model, {name: layer.base for name, layer in layers.items()}, batch, project)
    return found


class Batches:
    """The training batches of a run, generated when they are needed. A copy of it has none."""

    def __init__(self, batches: Iterable[Any] = ()) -> None:
        self.rest = enumerate(batches)

    def at(self, step: int) -> Any:
        """The batch of a step counted from 0, which must be larger in each call."""
        return next(batch for place, batch in self.rest if place == step)

    def __reduce__(self) -> tuple[type[Batches], tuple[()]]:  # a generator cannot be copied, but a model should be
        return Batches, ()


# --- The method ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaLore(WrapsLayers):
    """GaLore on whole linear layers of any model; see the module for the algorithm.

    - By default only the projected weights are trained, as with the other methods here. The authors train all other
      parameters too, in full, as `rest=True` does. Their learning rate is that of the run, without alpha, so it must
      be as small as for full fine-tuning, and alpha larger: the authors' value for fine-tuning is 4.
    - In steps 0, T, 2 T, ... P is computed from the gradient of the whole batch of that step, in an additional pass
      without autocast and dropout. `predicted_memory` is that of the other steps; this pass needs more: one full
      gradient at a time, the activations of full fine-tuning, and all of them at once even if the run divides its
      batches (`accumulation`) or recomputes activations.
    - Weight decay acts on R, the change since P was last replaced. (Algorithm 2 has none; the authors' code decays W.)
      Clipping sees the projected gradients.
    - `undo` needs a copy of the projected weights; with `keep_base=False` there is no copy, and `undo` is not possible.
      The adapter directory contains the changed weights, P and R.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor); or, raised by `adapt`, the rank does
            not fit a layer, or a weight to be changed is tied to another one or is not floating-point; or as for
            `WrapsLayers`.
    """

    rank: int = hyperparameter(8, "rank r of the projected gradients")
    alpha: float = hyperparameter(0.25, "the update is multiplied by alpha")
    refresh_every: int = hyperparameter(200, "number of steps after which the projection is computed again")
    rest: bool = hyperparameter(False, "also train all parameters that are not projected")
    keep_base: bool = True
    seed: int = 0  # of the P that is used before there is a gradient

    name: ClassVar[str] = "galore"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_GALORE"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-2, 5e-4, "RoBERTa on GLUE in jiaweizzhao/GaLore, 3e-5 with alpha 4; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 18.7
    use_when: ClassVar[str] = (
        "you would train the whole weights, and the optimiser's state does not fit in memory; what is saved is as "
        "large as the adapted weights, and on story cards LoRA of the same rank learned more (docs/atlas.md)"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"galore"})
    layer: ClassVar[type[nn.Module]] = GaLoreLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_alphas(self.rank, {}, self.alpha, {})
        if not isinstance(self.refresh_every, int) or isinstance(self.refresh_every, bool) or self.refresh_every < 1:
            raise ValueError(f"refresh_every must be a whole number of at least 1, got {self.refresh_every!r}")

    # --- During training ---

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """R with the learning rate lr alpha, everything else with lr."""
        projected = [layer.R for layer in self.layers(model).values()]
        known = {id(R) for R in projected}
        others = [p for p in self.trainable(model).values() if id(p) not in known]
        return [{"params": projected, "lr_scale": self.alpha}, {"params": others}]

    def before_training(self, model: nn.Module, batches: Iterable[Any], steps: int) -> None:
        unwrapped(model).__dict__[BATCHES] = Batches(batches), steps
        self._refresh(model, 0)

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step % self.refresh_every == 0:
            self._refresh(model, step)

    def _refresh(self, model: nn.Module, step: int) -> None:
        """Replace P before this step, unless the run is at its end."""
        batches, steps = unwrapped(model).__dict__[BATCHES]
        if step < steps:
            layers = self.layers(model)
            for name, P in projections(model, layers, batches.at(step)).items():
                layers[name].change_subspace(P)

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, layer in self.layers(unwrapped(model)).items():
            state[f"{name}.base.weight"] = weight_without_change(layer)
            state[f"{name}.lora_{'B' if layer.is_left else 'A'}"] = layer.P.data
        return state

    def learned(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {**self.trainable(model), **self.training_state(model)}

    # --- Adapting and undoing ---

    def _install(self, model: nn.Module) -> None:
        bases = {name: model.get_submodule(name) for name in find_targets(model, self.targets)}
        refuse_tied(model, bases)
        projected = {id(dense(base)) for base in bases.values()}
        others = [p for p in model.parameters() if id(p) not in projected]
        super()._install(model)
        if self.keep_base:
            for layer in self.layers(model).values():
                layer.register_buffer("pretrained", layer.base.weight.data, persistent=False)
                layer.base.weight.data = layer.base.weight.data.clone()
        if self.rest:
            for parameter in others:
                parameter.requires_grad_(True)

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: GaLoreLinear(base, self.rank, generator) for name, base in bases.items()}

    def _uninstall(self, model: nn.Module) -> None:
        for layer in self.layers(model).values():
            if self.keep_base and not layer.merged:  # a merged model keeps its weights
                layer.base.weight.data = layer.pretrained
        super()._uninstall(model)
        model.__dict__.pop(BATCHES, None)

    def _keeps_base(self) -> bool:
        return self.keep_base

    def undo(self, model: nn.Module) -> None:
        """Restore the base model, bit for bit.

        Raises:
            ValueError: `keep_base` is False, so no copy of the base weights exists.
        """
        self._adaptation(model)
        if not self.keep_base:
            raise ValueError("cannot undo: keep_base=False kept no copy of the base model; load the model again")
        super().undo(model)

    def trains_of_base(self) -> str:
        return "some" if self.rest else "nothing"

    # --- Files and tests ---

    def to_adapter(self, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Our own fields and names; what is only about the copy of the base is left out."""
        fields = {name: value for name, value in asdict(self).items() if name != "keep_base"}
        return {"peft_type": self.peft_type, **fields}, self.state_dict(model)

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> GaLore:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 4),
            refresh_every=rng.randint(1, 4),
            rest=rng.random() < 0.5,
            seed=rng.randint(0, 99),
        )
