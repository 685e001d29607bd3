"""The interface that all fine-tuning methods share.

A method is a small frozen dataclass of hyperparameters. It adapts a model in place, and stores on the model what it
needs to undo that:

    method = LoRA(rank=4)
    method.adapt(model)                 # freeze the model and insert the trained parameters
    method.trainable(model)             # the parameters for the optimiser, by name
    method.save(model, "my-adapter")    # only the trained parameters
    method.undo(model)                  # the base model again, bit for bit

The training loop, memory accounting, saving and the comparison of methods use only this interface. The logits of an
adapted language model are always aligned with its `input_ids`, even if the method prepends something to them.

A model may be compiled or wrapped (`torch.compile`, `DataParallel`, `DistributedDataParallel`) before or after it is
adapted; every function here works on the model inside.

A new method is a new file with a subclass of `Method`; `registry` finds it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel, load_language_model
from lora_from_scratch.support.wrapped import plain_name, refuse_wrapped_parts, unwrapped

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def hyperparameter(default: T, help: str) -> T:
    """A field of a method with its default and the help text of its command-line option.

    A field without a help text, such as `seed`, gets no option.
    """
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LearningRates:
    """A method's default learning rates, and their source.

    Attributes:
        bundled: for the bundled model (width 256), from the sweep in `benchmarks/learning_rates.md`.
        large: for models of width 512 and more, GPT-2 small among them.
        source: of `large`.
    """

    bundled: float
    large: float
    source: str

    def for_width(self, width: int) -> float:
        """The rate for a model with hidden states of this width."""
        return self.large if width >= LARGE else self.bundled


LARGE = 512  # from this width on, models get the rate for GPT-2 small


@dataclass
class Adaptation:
    """Stored on an adapted model: the method, and what `undo` needs."""

    method: Method
    base: dict[str, nn.Parameter]  # the base model's own parameters, under their own names
    required_grad: dict[str, bool]  # of each of them, before
    learned: tuple[str, ...] = ()  # the names of the trained parameters in the adapted model
    kept: dict[str, Tensor] = field(default_factory=dict)  # copies of the base parameters that are trained
    merged: bool = False


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt a model. A subclass defines how its parameters are inserted and removed."""

    name: ClassVar[str]  # on the command line
    peft_type: ClassVar[str]  # in `adapter_config.json`; "": it writes a whole model
    learning_rates: ClassVar[LearningRates]
    position: ClassVar[float] = 1000  # among the methods, in tables; a variant inherits it and comes next
    use_when: ClassVar[str] = ""  # completes "Use it when ...", in the documentation
    can_merge: ClassVar[bool] = False  # whether what is trained can be added to the weights
    saves_model: ClassVar[bool] = False  # whether `save` writes a whole model instead of an adapter
    needs_gpt2: ClassVar[bool] = False  # whether it works on our own GPT-2 only
    only_on_request: ClassVar[frozenset[str]] = frozenset()  # contestants that the shootout leaves out by default

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = Method.__repr__  # type: ignore[method-assign]  # which a dataclass would replace

    def __repr__(self) -> str:
        """The hyperparameters that differ from the defaults: `LoRA(rank=4)`."""
        values = {f: getattr(self, f.name) for f in fields(self)}
        default = {f: f.default if f.default_factory is MISSING else f.default_factory() for f in values}
        own = [f"{f.name}={value!r}" for f, value in values.items() if value != default[f]]
        return f"{type(self).__name__}({', '.join(own)})"

    # --- Implemented by a subclass ---

    @abstractmethod
    def _install(self, model: Any) -> None:
        """Insert the trained parameters. Everything is frozen at this point. New parameters are trained, and so are
        those of the base on which this sets `requires_grad` (`adapt` copies them for `undo`). Errors must be raised
        before the model is changed."""

    @abstractmethod
    def _uninstall(self, model: Any) -> None:
        """Remove what `_install` inserted, leaving the same module and parameter objects as before."""

    def _merge(self, model: Any) -> None:
        """Add what is trained to the weights; required if `can_merge`."""
        raise NotImplementedError

    def _unmerge(self, model: Any) -> None:
        """Restore the weights, bit for bit; required if `can_merge`."""
        raise NotImplementedError

    def _keeps_base(self) -> bool:
        """Whether the base parameters that are trained are copied for `undo`."""
        return True

    # --- Hooks of the training loop; most methods keep these defaults ---

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: dictionaries with "params" and, optionally, "lr_scale", a factor on the
        learning rate. Each trained parameter is in exactly one group."""
        return [{"params": list(self.trainable(model).values())}]

    def before_training(self, model: Any, batches: Iterable[Any], steps: int) -> None:  # noqa: B027
        """Called after `adapt` and before the optimiser is created. It is called again when a run is resumed, before
        the checkpoint is loaded, so its effect must depend only on the model and the batches.

        Args:
            batches: the training batches in order, each with `input_ids`, `labels` and `attention_mask`; generated
                lazily.
            steps: the number of steps of the whole run.
        """

    def extra_loss(self, model: Any) -> Tensor | None:
        """A scalar to add to the loss of each step, or None."""
        return None

    def rate_factor(self, model: Any, step: int) -> float:
        """A factor on the scheduled learning rate of a step, counted from 0."""
        return 1.0

    def after_step(self, model: Any, step: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Called after the weights are updated and before the gradients are cleared.

        Args:
            step: the number of steps taken so far, including this one.
        """

    def training_state(self, model: Any) -> dict[str, Tensor]:
        """The tensors that `after_step` changes in addition to the trained parameters, by name. They are saved in
        checkpoints, and a resumed run copies the saved values into them."""
        return {}

    # --- For comparing and testing methods ---

    def learning_rate(self, width: int) -> float:
        """The default learning rate for a model of this width."""
        return self.learning_rates.for_width(width)

    @classmethod
    def contestants(cls) -> dict[str, dict[str, Any]]:
        """The shootout's contestants: by the name in the table, the hyperparameters that differ from the defaults."""
        return {cls.name: {}}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> Method:
        """Random hyperparameters that fit a GPT-2 of this shape, however small, for property tests."""
        return cls()

    def starts_as_base(self) -> bool | None:
        """Whether an adapted model's output equals the base's, bit for bit, before the first step.

        None: nearly, with logits within 0.001 for weights of the usual magnitude.
        """
        return False

    def blank_model(self, config: GPT2Config) -> GPT2:
        """An adapted GPT-2 of this shape on the meta device, which allocates no memory."""
        with torch.device("meta"):
            model = GPT2(config)
        self.adapt_blank(model)
        return model

    def adapt_blank(self, model: nn.Module) -> None:
        """Like `adapt`, for a model on the meta device."""
        self.adapt(model)

    def bytes_for_undo(self, config: GPT2Config) -> int:
        """The number of bytes kept of the base for `undo`, beside the copies in `Adaptation.kept`."""
        return 0

    def on_full_base(self) -> Method:
        """The same method on a base whose weights are floating-point numbers."""
        return self

    def trains_of_base(self) -> str:
        """Which of the base's own parameters are trained: "nothing", "biases", "some" or "everything"."""
        return "nothing"

    # --- Before adapting ---

    def load_base(self, source: str | Path) -> tuple[LanguageModel, AnyTokenizer]:
        """Like `load_language_model`, in the form that takes this method the least memory; `adapt` accepts any form."""
        return load_language_model(source)

    def for_tokenizer(self, tokenizer: Any) -> Method:
        """This method with its texts, if it has any, encoded by a tokenizer.

        Raises:
            ValueError: a text does not fit.
        """
        return self

    # --- Adapting and undoing ---

    def adapt(self, model: nn.Module) -> None:
        """Freeze `model` and insert the trained parameters, in place.

        Raises:
            ValueError: the model is already adapted, or the hyperparameters do not fit it. The model is then
                unchanged.
        """
        model = unwrapped(model)
        before = adaptation_of(model)
        if before is not None:
            raise ValueError(f"the model is already adapted by {before.method}; undo that first")
        if self.needs_gpt2 and not isinstance(model, GPT2):
            raise ValueError(
                f"{self.name} works inside the GPT-2 of lora_from_scratch.gpt2 and adapts no other model, "
                f"got a {type(model).__name__}"
            )
        refuse_wrapped_parts(model)
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
        model.__dict__["adaptation"] = record  # nn.Module does not register it

    def undo(self, model: nn.Module) -> None:
        """Restore the base model, bit for bit: the same parameter objects, with their previous `requires_grad`."""
        model = unwrapped(model)
        self.unmerge(model)
        record = self._adaptation(model)
        self._take_out(model, record)
        with torch.no_grad():
            for name, value in record.kept.items():
                record.base[name].copy_(value)

    def _take_out(self, model: nn.Module, record: Adaptation) -> None:
        self._uninstall(model)
        _restore_flags(record)
        for parameter in record.base.values():
            parameter.grad = None
        del model.__dict__["adaptation"]

    # --- Trained parameters ---

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that this method trains, by their names in the adapted model."""
        learned = set(self._adaptation(model).learned)
        named = ((plain_name(name), p) for name, p in unwrapped(model).named_parameters())
        return {name: p for name, p in named if name in learned}

    def learned(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors to save, by name: the trained parameters, and anything else that `after_step` changes and the
        model needs."""
        return self.trainable(model)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of the tensors to save (see `learned`)."""
        return {name: tensor.detach().clone() for name, tensor in self.learned(model).items()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load trained parameters, for example to switch to another task.

        A merged model stays merged, with the new state. Optimisers keep working, since the parameters remain the same
        objects.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape. Nothing is loaded then.
        """
        adapter_files.refuse_misfits({name: tensor.shape for name, tensor in self.learned(model).items()}, state)
        merged = self._adaptation(model).merged
        self.unmerge(model)
        with torch.no_grad():
            for name, tensor in self.learned(model).items():
                tensor.copy_(state[name])
        if merged:
            self.merge(model)

    def readable(self, model: nn.Module, tokenizer: Any) -> str:
        """What was learned, if it is a text; "" otherwise."""
        return ""

    # --- Merging ---

    def merge(self, model: nn.Module) -> None:
        """Add what is trained to the weights, so that the model computes as fast as the base. Merging is idempotent.

        Raises:
            ValueError: this method does not change the weights.
        """
        record = self._adaptation(model)
        if not self.can_merge:
            raise ValueError(f"{self.name} cannot be merged: what it adds is not a change of the model's weights")
        if not record.merged:
            self._merge(unwrapped(model))
            record.merged = True

    def unmerge(self, model: nn.Module) -> None:
        """Undo `merge`, bit for bit. A model that is not merged is left unchanged."""
        record = self._adaptation(model)
        if record.merged:
            self._unmerge(unwrapped(model))
            record.merged = False

    def merged_copy(self, model: M) -> M:
        """A plain copy of the model, merged, without the method's modules; `model` is not changed.

        Raises:
            ValueError: this method does not change the weights.
        """
        plain = copy.deepcopy(unwrapped(model))
        self.merge(plain)
        self._take_out(plain, self._adaptation(plain))
        return plain

    # --- Files ---

    def save(self, model: Any, directory: str | Path, *, base_model: str | None = None, tokenizer: Any = None) -> None:
        """Write an adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            directory: created if necessary; written completely or not at all.
            base_model: the name or path of the base model, if known.
            tokenizer: for methods that write a whole checkpoint; adapter directories do not contain one.

        Raises:
            OSError: the directory cannot be written.
        """
        config, tensors = self.to_adapter(unwrapped(model))
        if base_model:
            config["base_model_name_or_path"] = base_model
        adapter_files.write_adapter(directory, config, tensors)

    def to_adapter(self, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The contents of the two files. A method that PEFT has overrides this with PEFT's fields and keys."""
        return {"peft_type": self.peft_type, **asdict(self)}, self.state_dict(model)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether this method reads adapters with this `adapter_config.json`. Subclasses are asked before their base
        class. One that only trains differently (LoRA+) saves what its base class saves, which then reads it."""
        return "peft_type" in vars(cls) and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any
    ) -> tuple[Method, dict[str, Tensor]]:
        """The inverse of `to_adapter`: the method, and the state to load after it has adapted `model`.

        Raises:
            ValueError: the configuration has a field or a value that this method does not support.
        """
        own = [f.name for f in fields(cls)]
        adapter_files.refuse_unknown_fields(config, understood=own)
        try:
            return cls(**{name: config[name] for name in own if name in config}), dict(tensors)
        except TypeError as error:
            raise ValueError(f"{adapter_files.CONFIG_FILE}: {error}") from None

    @classmethod
    def from_checkpoint(cls, directory: Path) -> tuple[Method, dict[str, Tensor]]:
        """The method and the weights of a whole model that `save` wrote; required if `saves_model`."""
        raise NotImplementedError

    def _adaptation(self, model: nn.Module) -> Adaptation:
        record = adaptation_of(model)
        if record is None:
            raise ValueError(f"the model is not adapted; call adapt(model) of {self} first")
        if record.method != self:
            raise ValueError(f"the model is adapted by {record.method}, not by {self}")
        return record


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """The `Adaptation` of a model, or None if it is not adapted."""
    return unwrapped(model).__dict__.get("adaptation")


def _restore_flags(record: Adaptation) -> None:
    for name, parameter in record.base.items():
        parameter.requires_grad_(record.required_grad[name])
