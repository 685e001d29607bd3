"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): train the gains and biases of the normalisations.

    y = gamma * (x - mean(x)) / std(x) + beta

gamma and beta of the chosen layers are trained where they are; a LayerNorm has both, an RMSNorm only gamma. Nothing is
added to the model, so there is nothing to merge and no added work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora_peft import task_type_of
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.methods.placement import describe_names, ends_with

PEFT_PART = ".ln_tuning_layers."  # between a module's name and its parameter's, in PEFT's keys


def normalisations(model: nn.Module) -> dict[str, nn.Module]:
    """Every LayerNorm and RMSNorm of a model, by name; transformers has RMSNorms of its own for many models."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    }


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """Train normalisation layers of any model and nothing else.

    Raises:
        ValueError: a target is no normalisation of the model, in `adapt`.
    """

    targets: Sequence[str] = hyperparameter((), "the normalisations to train, by name (ln_1); none named: all")

    name: ClassVar[str] = "layernorm"
    peft_type: ClassVar[str] = "LN_TUNING"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-1, 1e-3, "as BitFit; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 76
    use_when: ClassVar[str] = (
        "only the normalisation layers may be trained, for example because everything else is quantised; at the "
        "rate of the atlas it forgot more than any other method"
    )
    can_merge: ClassVar[bool] = True  # what is trained is in the model
    only_on_request: ClassVar[frozenset[str]] = frozenset({"layernorm"})

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"targets must be a list of names, got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The normalisations that are meant, in the model's order."""
        known = normalisations(model)
        if not known:
            raise ValueError(f"a {type(model).__name__} has no normalisation layers, and layernorm trains nothing else")
        for target in self.targets:
            if not any(ends_with(name, target) for name in known):
                raise ValueError(f"the target {target!r} matches no normalisation; {describe_names(known)}")
        ends = self.targets or tuple(known)
        return {name: module for name, module in known.items() if any(ends_with(name, end) for end in ends)}

    def _install(self, model: nn.Module) -> None:
        for module in self.chosen(model).values():
            module.requires_grad_(True)

    def _uninstall(self, model: nn.Module) -> None:
        pass

    def _merge(self, model: nn.Module) -> None:
        pass

    def _unmerge(self, model: nn.Module) -> None:
        pass

    def trains_of_base(self) -> str:
        return "some"

    def starts_as_base(self) -> bool | None:
        return True

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        task_type = task_type_of(model)
        config: dict[str, Any] = {"peft_type": self.peft_type, **({"task_type": task_type} if task_type else {})}
        config["target_modules"] = list(self.chosen(model))
        tensors = {}
        for name, tensor in self.state_dict(model).items():
            module, _, parameter = name.rpartition(".")
            tensors[f"{adapter_files.PREFIX}{module}{PEFT_PART}{parameter}"] = tensor
        return config, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LayerNormTuning, dict[str, Tensor]]:
        adapter_files.refuse_unknown_fields(config, ("target_modules", "exclude_modules"))
        names = {key: key.removeprefix(adapter_files.PREFIX) for key in tensors}
        targets = list(dict.fromkeys(name.partition(PEFT_PART)[0] for name in names.values()))
        known = normalisations(model)
        for target in targets:
            if target not in known:
                raise ValueError(
                    f"{adapter_files.WEIGHTS_FILE} has tensors of {target!r}, which is no normalisation of this model; "
                    "were they made for another one?"
                )
        return cls(targets=targets), {names[key].replace(PEFT_PART, "."): tensor for key, tensor in tensors.items()}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LayerNormTuning:
        return cls(targets=rng.choice([(), ("ln_1",), ("ln_f", "h.0.ln_2")]))
