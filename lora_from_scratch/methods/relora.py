"""ReLoRA (Lialin et al. 2023, arXiv:2307.05695): the sum of several low-rank updates has a high rank.

LoRA changes W by s B A, whose rank is at most r. ReLoRA trains several such updates, one after the other. The run has N
cycles, and after each but the last (algorithm 1)

    W = W + s B A,   then A random, B = 0        A: (r, in),  B: (out, r),  W: (out, in)

so that the total change of W has rank up to N r, while gradients and the optimiser's moments are always those of one
LoRA (section 3). The moments of the old factors would push the new ones in the old directions. So at each restart

- most of the optimiser's moments are set to zero; only the entries with the largest moments keep them;
- the learning rate starts again from zero and quickly rises to the schedule's value (a "jagged" schedule).

A must be random. With A = 0 and B = 0, as in the first cycle of the authors' code (Guitaricet/relora, issue 18), both
gradients are zero and nothing is learned until the first restart.

`Restarts` contains what ReLoRA and ReMoRA share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.adapter_files import PREFIX
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.support.linear_layers import dense, refuse_tied
from lora_from_scratch.support.wrapped import unwrapped

STEPS = "steps_with_restarts"  # attribute of an adapted model: the number of steps of the run
OWN_FIELDS = ("cycles", "restart_warmup", "kept_moments")
BASE_WEIGHT = ".base_layer.weight"  # ends the key of a layer's W in an adapter directory

# --- One restart -----------------------------------------------------------------------------------------


@torch.no_grad()
def absorb(layer: LoRALinear) -> None:
    """Merge permanently: W = W + s B A, and W is not kept."""
    layer.merge()
    layer._unmerged = None


def weight_without_change(layer: LoRALinear) -> Tensor:
    """The layer's W with the changes of all earlier cycles but not of the current one, whether merged or not."""
    return dense(layer.base).data if layer._unmerged is None else layer._unmerged


@torch.no_grad()
def cut_moments(state: Mapping[str, Any], kept: float) -> None:
    """Set an optimiser's moments of one parameter to zero, in place, except for a share of the entries.

    The entries with the largest first moment keep all their moments, the others none. (The authors' code prunes each
    moment separately. An entry that keeps m but not v then changes by about m / eps in the next step.)

    Args:
        state: `optimizer.state[parameter]`; its tensors of the parameter's shape are the moments, first moment first.
        kept: the share of the entries, from 0 to 1.
    """
    moments = [value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0]
    if moments:
        order = moments[0].abs().flatten().argsort(descending=True, stable=True)
        lost = order[round(kept * len(order)) :]
        for moment in moments:
            moment.view(-1)[lost] = 0


# --- The cycles of a run ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Restarts(Method):
    """A method with layers like `LoRALinear` that is trained in several cycles.

    At the end of a cycle its change is merged into the weights of the base. `undo` needs a copy of these weights; with
    `keep_base=False` there is no copy, and `undo` is not possible. The adapter directory contains the changed weights.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor), or a weight to be changed is tied to
            another one or is not floating-point (raised by `adapt`).
    """

    cycles: int = hyperparameter(
        4, "number of cycles; after each except the last, the update is merged into the weights"
    )
    restart_warmup: float = hyperparameter(0.1, "share of each later cycle in which the learning rate rises again")
    kept_moments: float = hyperparameter(0.1, "share of the trained parameters that keep their moments at a restart")
    keep_base: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if not isinstance(self.cycles, int) or isinstance(self.cycles, bool) or self.cycles < 1:
            raise ValueError(f"cycles must be a whole number of at least 1, got {self.cycles!r}")
        for name in ("restart_warmup", "kept_moments"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value!r}")

    def start_cycle(self, layer: Any, generator: torch.Generator) -> None:
        """Initialise a layer, whose change has just been merged, for the next cycle."""
        raise NotImplementedError

    def restarts(self, steps: int) -> list[int]:
        """The steps after which a new cycle starts, in a run of `steps` steps."""
        places = {cycle * steps // self.cycles for cycle in range(1, self.cycles)}
        return sorted(places - {0})

    # --- During training ---

    def before_training(self, model: nn.Module, batches: Iterable[Any], steps: int) -> None:
        unwrapped(model).__dict__[STEPS] = steps

    def rate_factor(self, model: nn.Module, step: int) -> float:
        """Rises to 1 at the beginning of every cycle except the first, whose warm-up is the schedule's."""
        steps = unwrapped(model).__dict__[STEPS]
        ends = [*self.restarts(steps), steps]
        begin = max((place for place in ends if place <= step), default=0)
        rising = round(self.restart_warmup * (next(end for end in ends if end > step) - begin))
        return min(1.0, (step - begin + 1) / rising) if begin and rising else 1.0

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step not in self.restarts(unwrapped(model).__dict__[STEPS]):
            return
        # A separate generator, so that all processes of a distributed run draw the same numbers.
        generator = torch.Generator().manual_seed(step + 1_000_003 * getattr(self, "seed", 0))
        for layer in lora_layers(model).values():
            absorb(layer)
            self.start_cycle(layer, generator)
            for parameter in layer.parameters(recurse=False):
                cut_moments(optimizer.state[parameter], self.kept_moments)

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        layers = lora_layers(unwrapped(model))
        return {f"{name}.base.weight": weight_without_change(layer) for name, layer in layers.items()}

    def learned(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {**self.trainable(model), **self.training_state(model)}

    # --- Adapting and undoing ---

    def _install(self, model: nn.Module) -> None:
        super()._install(model)  # type: ignore[safe-super]  # that of the method below
        layers = lora_layers(model)
        try:
            refuse_tied(model, layers)
            weights = {name: dense(layer.base) for name, layer in layers.items()}
        except ValueError:
            super()._uninstall(model)  # type: ignore[safe-super]
            raise
        if self.keep_base:
            for name, layer in layers.items():
                layer.register_buffer("pretrained", weights[name].data, persistent=False)
                weights[name].data = weights[name].data.clone()

    def _uninstall(self, model: nn.Module) -> None:
        for layer in lora_layers(model).values():
            if self.keep_base and not layer.merged:  # a merged model keeps its weights
                layer.base.weight.data = layer.pretrained
        super()._uninstall(model)  # type: ignore[safe-super]
        model.__dict__.pop(STEPS, None)

    def undo(self, model: nn.Module) -> None:
        """Restore the base model, bit for bit.

        Raises:
            ValueError: `keep_base` is False, so no copy of the base weights exists.
        """
        self._adaptation(model)
        if not self.keep_base:
            raise ValueError("cannot undo: keep_base=False kept no copy of the base model; load the model again")
        super().undo(model)

    # --- Files and tests ---

    def to_adapter(self, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The underlying method's content, the settings of the cycles, and the changed W of every layer."""
        config, tensors = super().to_adapter(model)
        config = {name: value for name, value in config.items() if name != "keep_base"}
        config |= {"peft_type": self.peft_type, **{name: getattr(self, name) for name in OWN_FIELDS}}
        layers = lora_layers(model)
        weights = {f"{PREFIX}{name}{BASE_WEIGHT}": weight_without_change(layer) for name, layer in layers.items()}
        return config, {name: t for name, t in tensors.items() if not name.endswith(".base.weight")} | weights

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        others = {name: value for name, value in config.items() if name not in OWN_FIELDS}
        weights = {name: tensor for name, tensor in tensors.items() if name.endswith(BASE_WEIGHT)}
        method, state = super().from_adapter(others, {n: t for n, t in tensors.items() if n not in weights}, model)
        method = replace(method, **{name: config[name] for name in OWN_FIELDS if name in config})
        for name, tensor in weights.items():
            state[f"{name.removeprefix(PREFIX).removesuffix(BASE_WEIGHT)}.base.weight"] = tensor
        return method, state

    @classmethod
    def random_cycles(cls, rng: Random) -> dict[str, Any]:
        """Random hyperparameters of this class, for tests."""
        return {
            "cycles": rng.randint(1, 4),
            "restart_warmup": rng.choice([0.0, 0.3]),
            "kept_moments": rng.choice([0.0, 0.1, 1.0]),
        }


# --- The method ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReLoRA(Restarts, LoRA):
    """LoRA trained in several cycles, whose updates are summed; see the module for the equation.

    It has all options of `LoRA`: targets, parts of fused layers, patterns of ranks, trained biases.

    Raises:
        ValueError: as for `Restarts` and `LoRA`.
    """

    name: ClassVar[str] = "relora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_RELORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-4, "as LoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 17
    use_when: ClassVar[str] = (
        "you pretrain or train for long, and an update of low rank is not enough; what is saved is as large as "
        "the adapted weights"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"relora"})

    def start_cycle(self, layer: LoRALinear, generator: torch.Generator) -> None:
        A, B = layer.initial_factors(generator)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return replace(super().sample(rng, config), **cls.random_cycles(rng))
