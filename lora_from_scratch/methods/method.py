"""What every method of fine-tuning can do, and in the same way.

A method is a small frozen dataclass of hyperparameters. It changes a GPT-2 in place and remembers on the
model whatever it needs to take the change back:

    method = LoRA(rank=4)
    method.adapt(model)                 # freeze the model, put in what will be learned
    method.trainable(model)             # the parameters that the optimiser gets, by name
    method.save(model, "my-adapter")    # only what was learned
    method.undo(model)                  # the base model again, bit for bit

The training loop, the memory accounting, saving and the comparison of methods use nothing else. The logits
of an adapted model are always aligned with its `input_ids`, whatever the method puts in front of them.

A new method is a new file with a subclass of `Method` and one line in `METHODS`.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods import adapter_files

METHODS: dict[str, str] = {  # name: where its class is; imported when it is asked for
    "full": "lora_from_scratch.methods.full_finetuning.FullFineTuning",
    "lora": "lora_from_scratch.methods.lora.LoRA",
    "qlora": "lora_from_scratch.methods.qlora.QLoRA",
    "prompt": "lora_from_scratch.methods.prompt_tuning.PromptTuning",
    "prefix": "lora_from_scratch.methods.prefix_tuning.PrefixTuning",
    "llama-adapter": "lora_from_scratch.methods.llama_adapter.LlamaAdapter",
    "adapter": "lora_from_scratch.methods.adapters.Adapter",
    "bitfit": "lora_from_scratch.methods.bitfit.BitFit",
    "spafit": "lora_from_scratch.methods.bitfit.SPAFIT",
}


def method_class(name: str) -> type[Method]:
    """The class of a method, by its name in `METHODS`.

    Raises:
        ValueError: there is no method of that name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    module, _, class_name = METHODS[name].rpartition(".")
    found: type[Method] = getattr(importlib.import_module(module), class_name)
    return found


@dataclass
class Adaptation:
    """What an adapted model remembers: by what it was adapted, and how it was before."""

    method: Method
    base: dict[str, nn.Parameter]  # the base model's own parameters, under their own names
    required_grad: dict[str, bool]  # of each of them, before
    learned: tuple[str, ...] = ()  # the names, in the adapted model, of what is trained
    kept: dict[str, Tensor] = field(default_factory=dict)  # copies of the base parameters that are trained
    merged: bool = False


class Method(ABC):
    """A way to adapt a GPT-2. A subclass says what goes into the model and how it comes out again."""

    name: ClassVar[str]  # what a person types
    peft_type: ClassVar[str]  # what `adapter_config.json` calls it
    can_merge: ClassVar[bool] = False  # whether the change can be put into the weights themselves

    # --- What a subclass supplies ---

    @abstractmethod
    def _install(self, model: GPT2) -> None:
        """Put in what is learned. Everything is frozen at this point: new parameters are trained, and so
        are those of the base on which this sets `requires_grad` (they are copied, so that `undo` can put
        them back). Whatever is wrong must be found before the model is touched."""

    @abstractmethod
    def _uninstall(self, model: GPT2) -> None:
        """Take out what `_install` put in: the same module and parameter objects as before."""

    def _merge(self, model: GPT2) -> None:
        """Put the change into the weights; wherever `can_merge`."""
        raise NotImplementedError

    def _unmerge(self, model: GPT2) -> None:
        """Put the weights back, bit for bit; wherever `can_merge`."""
        raise NotImplementedError

    def _keeps_base(self) -> bool:
        """Whether the base parameters that are trained are copied for `undo`."""
        return True

    # --- Before adapting ---

    def load_base(self, source: str | Path) -> tuple[GPT2, Tokenizer]:
        """`load_gpt2`, in the form that costs this method the least memory. `adapt` takes the full one as well."""
        return load_gpt2(source)

    def for_tokenizer(self, tokenizer: Tokenizer) -> Method:
        """This method with its texts, if it has any, as a tokenizer's ids.

        Raises:
            ValueError: such a text does not fit.
        """
        return self

    # --- Adapting and undoing ---

    def adapt(self, model: GPT2) -> None:
        """Freeze `model`, put in what this method learns, in place.

        Raises:
            ValueError: the model is adapted already, or the hyperparameters do not fit it. The model is
                then as it was.
        """
        before = adaptation_of(model)
        if before is not None:
            raise ValueError(f"the model is already adapted by {before.method}; undo that first")
        base = dict(model.named_parameters())
        record = Adaptation(self, base, {name: p.requires_grad for name, p in base.items()})
        model.requires_grad_(False)
        try:
            self._install(model)
        except BaseException:
            _restore_flags(record)
            raise
        record.learned = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        if self._keeps_base():
            record.kept = {name: p.detach().clone() for name, p in base.items() if p.requires_grad}
        model.__dict__["adaptation"] = record  # past nn.Module's own bookkeeping: this is no part of its state

    def undo(self, model: GPT2) -> None:
        """Give the base model back, bit for bit: the same parameter objects, with `requires_grad` as it was."""
        self.unmerge(model)
        record = self._adaptation(model)
        self._take_out(model, record)
        with torch.no_grad():
            for name, value in record.kept.items():
                record.base[name].copy_(value)

    def _take_out(self, model: GPT2, record: Adaptation) -> None:
        self._uninstall(model)
        _restore_flags(record)
        for parameter in record.base.values():
            parameter.grad = None
        del model.__dict__["adaptation"]

    # --- What was learned ---

    def trainable(self, model: GPT2) -> dict[str, nn.Parameter]:
        """The parameters that this method trains, by their names in the adapted model."""
        learned = set(self._adaptation(model).learned)
        return {name: p for name, p in model.named_parameters() if name in learned}

    def state_dict(self, model: GPT2) -> dict[str, Tensor]:
        """Copies of what was learned, and of nothing else."""
        return {name: p.detach().clone() for name, p in self.trainable(model).items()}

    def load_state_dict(self, model: GPT2, state: Mapping[str, Tensor]) -> None:
        """Put in what was learned before: this task's, or another's (that is how tasks are switched).

        A merged model stays merged, with the new state. Optimisers keep working: the parameters are the same objects.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape. Nothing is loaded then.
        """
        parameters = self.trainable(model)
        refuse_misfits({name: p.shape for name, p in parameters.items()}, state)
        merged = self._adaptation(model).merged
        self.unmerge(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
        if merged:
            self.merge(model)

    # --- Merging ---

    def merge(self, model: GPT2) -> None:
        """Put the change into the weights, so that the model costs what the base costs. Twice is like once.

        Raises:
            ValueError: what this method does is not a change of the weights.
        """
        record = self._adaptation(model)
        if not self.can_merge:
            raise ValueError(f"{self.name} cannot be merged: what it adds is not a change of the model's weights")
        if not record.merged:
            self._merge(model)
            record.merged = True

    def unmerge(self, model: GPT2) -> None:
        """Undo `merge` bit for bit. A model that is not merged stays as it is."""
        record = self._adaptation(model)
        if record.merged:
            self._unmerge(model)
            record.merged = False

    def merged_copy(self, model: GPT2) -> GPT2:
        """A plain GPT-2 with the change in its weights and no trace of the method; `model` stays as it is.

        Raises:
            ValueError: what this method does is not a change of the weights.
        """
        plain = copy.deepcopy(model)
        self.merge(plain)
        self._take_out(plain, self._adaptation(plain))
        return plain

    # --- Files ---

    def save(self, model: GPT2, directory: str | Path, *, base_model: str | None = None, tokenizer: Any = None) -> None:
        """Write what was learned as an adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            directory: made if need be; written whole or not at all.
            base_model: the name or the place of the model that was adapted, if it is known.
            tokenizer: for methods that write a whole checkpoint; an adapter has none of its own.

        Raises:
            OSError: the place cannot be written.
        """
        config, tensors = self.to_adapter(model)
        if base_model:
            config["base_model_name_or_path"] = base_model
        peft_format.write_adapter(directory, config, tensors)

    def to_adapter(self, model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of the two files. A method that PEFT knows overrides this with PEFT's own fields and keys."""
        return {"peft_type": self.peft_type, **asdict(self)}, self.state_dict(model)  # type: ignore[call-overload]

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[Method, dict[str, Tensor]]:
        """The inverse of `to_adapter`: the method, and the state to load once it has adapted `model`.

        Raises:
            ValueError: a field that this method does not have, or a value that it does not allow.
        """
        own = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        peft_format.refuse_unknown_fields(config, understood=own)
        try:
            return cls(**{name: config[name] for name in own if name in config}), dict(tensors)
        except TypeError as error:
            raise ValueError(f"{peft_format.CONFIG_FILE}: {error}") from None

    def _adaptation(self, model: GPT2) -> Adaptation:
        record = adaptation_of(model)
        if record is None:
            raise ValueError(f"the model is not adapted; call adapt(model) of {self} first")
        if record.method != self:
            raise ValueError(f"the model is adapted by {record.method}, not by {self}")
        return record


def adaptation_of(model: GPT2) -> Adaptation | None:
    """What an adapted model remembers; None for a plain one."""
    return model.__dict__.get("adaptation")


def load_adapter(model: GPT2, directory: str | Path) -> Method:
    """Adapt `model` as a directory says that `save` wrote, ours or PEFT's, and return the method.

    Raises:
        FileNotFoundError: there is no such directory, or a file is not in it.
        ValueError: damaged, of a method that is not here, or made for another model. The model is then as it was.
    """
    try:
        method, state = _read(Path(directory), model)
        method.adapt(model)
        try:
            method.load_state_dict(model, state)
        except ValueError:
            method.undo(model)
            raise
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return method


def _read(directory: Path, model: GPT2) -> tuple[Method, dict[str, Tensor]]:
    """The method and the state that a directory holds."""
    if (directory / "config.json").exists() and not (directory / peft_format.CONFIG_FILE).exists():
        from lora_from_scratch.methods.full_finetuning import FullFineTuning

        return FullFineTuning.from_checkpoint(directory)
    config, tensors = peft_format.read_adapter(directory)
    quantisation = config.get("loftq_config")
    if isinstance(quantisation, dict) and "quant_type" in quantisation:  # a LoRA on a base that we quantised
        return method_class("qlora").from_adapter(config, tensors, model)
    classes: dict[str, type[Method]] = {}
    for cls in filter(lambda cls: cls.peft_type, map(method_class, METHODS)):
        classes.setdefault(cls.peft_type, cls)  # LORA is LoRA's: a QLoRA's own directory has been recognised above
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in classes:
        raise ValueError(f"peft_type {peft_type!r} is not supported; supported are {', '.join(classes)}")
    return classes[peft_type].from_adapter(config, tensors, model)


def refuse_misfits(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Check that `state` has exactly the tensors that are expected.

    Raises:
        ValueError: names what is missing, unexpected and of another shape, in one line.
    """
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": misshapen,
    }
    said = [f"{len(names)} {problem} ({_some(names)})" for problem, names in problems.items() if names]
    if said:
        raise ValueError(f"the tensors do not fit this model; were they made for another one? {'; '.join(said)}")


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _restore_flags(record: Adaptation) -> None:
    for name, parameter in record.base.items():
        parameter.requires_grad_(record.required_grad[name])
