"""What every method of fine-tuning can do, and in the same way.

A method is a small frozen dataclass of hyperparameters. It changes a model in place and remembers on the model whatever
it needs to take the change back:

    method = LoRA(rank=4)
    method.adapt(model)                 # freeze the model, put in what will be learned
    method.trainable(model)             # the parameters that the optimiser gets, by name
    method.save(model, "my-adapter")    # only what was learned
    method.undo(model)                  # the base model again, bit for bit

The training loop, the memory accounting, saving and the comparison of methods use nothing else. The logits of an
adapted language model are always aligned with its `input_ids`, whatever the method puts in front of them.

A model that is compiled or wrapped (`torch.compile`, `DataParallel`, `DistributedDataParallel`), before or after it is
adapted, stands for the model inside.

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
    """A field of a method that a person may set: its default, and what the command line says of it.

    A field without a help text, such as `seed`, gets no flag of its own.
    """
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LearningRates:
    """What a method is trained with unless somebody says otherwise, and where the numbers come from.

    Attributes:
        bundled: for the bundled model (width 256), from the sweep in `benchmarks/learning_rates.md`.
        large: for models of width 512 and more, GPT-2 small among them.
        source: of `large`.
    """

    bundled: float
    large: float
    source: str

    def for_width(self, width: int) -> float:
        """The rate for a model whose hidden states are so wide."""
        return self.large if width >= LARGE else self.bundled


LARGE = 512  # the width from which on a model is treated like GPT-2 small and not like the bundled one


@dataclass
class Adaptation:
    """What an adapted model remembers: by what it was adapted, and how it was before."""

    method: Method
    base: dict[str, nn.Parameter]  # the base model's own parameters, under their own names
    required_grad: dict[str, bool]  # of each of them, before
    learned: tuple[str, ...] = ()  # the names, in the adapted model, of what is trained
    kept: dict[str, Tensor] = field(default_factory=dict)  # copies of the base parameters that are trained
    merged: bool = False


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt a model. A subclass says what goes into the model and how it comes out again."""

    name: ClassVar[str]  # what a person types
    peft_type: ClassVar[str]  # what `adapter_config.json` calls it; "": it writes a whole model
    learning_rates: ClassVar[LearningRates]
    position: ClassVar[float] = 1000  # among the methods, in tables; a variant inherits it and comes next
    can_merge: ClassVar[bool] = False  # whether the change can be put into the weights themselves
    saves_model: ClassVar[bool] = False  # whether `save` writes a whole model instead of an adapter
    needs_gpt2: ClassVar[bool] = False  # whether it reaches into our own GPT-2, so that no other model will do
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

    # --- What a subclass supplies ---

    @abstractmethod
    def _install(self, model: Any) -> None:
        """Put in what is learned. Everything is frozen at this point: new parameters are trained, and so
        are those of the base on which this sets `requires_grad` (they are copied, so that `undo` can put
        them back). Whatever is wrong must be found before the model is touched."""

    @abstractmethod
    def _uninstall(self, model: Any) -> None:
        """Take out what `_install` put in: the same module and parameter objects as before."""

    def _merge(self, model: Any) -> None:
        """Put the change into the weights; wherever `can_merge`."""
        raise NotImplementedError

    def _unmerge(self, model: Any) -> None:
        """Put the weights back, bit for bit; wherever `can_merge`."""
        raise NotImplementedError

    def _keeps_base(self) -> bool:
        """Whether the base parameters that are trained are copied for `undo`."""
        return True

    # --- During training: what the loop asks for beside the loss. Most methods leave these as they are. ---

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """What the optimiser gets: dictionaries with "params", and with "lr_scale" where a group learns faster or
        slower than the learning rate says. Together they hold every trained parameter once."""
        return [{"params": list(self.trainable(model).values())}]

    def before_training(self, model: Any, batches: Iterable[Any], steps: int) -> None:  # noqa: B027
        """Called once the model is adapted, before the optimiser is made; again when a run is resumed, before the
        checkpoint is read. So it must be a function of the model and the batches.

        Args:
            batches: those of the training, in order, each with `input_ids`, `labels` and `attention_mask`; drawn as
                they are asked for.
            steps: of the whole run.
        """

    def extra_loss(self, model: Any) -> Tensor | None:
        """A scalar that is added to the loss of every step, or None."""
        return None

    def after_step(self, model: Any, step: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Called when the weights have been updated and the gradients are still there.

        Args:
            step: how many steps have been taken, this one included.
        """

    def training_state(self, model: Any) -> dict[str, Tensor]:
        """What `after_step` changes beside the trained parameters, by name. Checkpoints keep it, and a resumed run
        copies it back into these tensors."""
        return {}

    # --- For comparing and testing methods ---

    def learning_rate(self, width: int) -> float:
        """What it is trained with on a model of this width unless somebody says otherwise."""
        return self.learning_rates.for_width(width)

    @classmethod
    def contestants(cls) -> dict[str, dict[str, Any]]:
        """What can take part in the shootout: by its name in the table, the hyperparameters that differ from the
        defaults."""
        return {cls.name: {}}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> Method:
        """Random hyperparameters that fit a GPT-2 of this shape, a tiny one included. Tests try their laws on these."""
        return cls()

    def starts_as_base(self) -> bool | None:
        """Whether an adapted model computes what the base computes, bit for bit, before the first step.

        None: nearly, with logits within 0.001 on a model whose weights are of the usual size.
        """
        return False

    def blank_model(self, config: GPT2Config) -> GPT2:
        """A GPT-2 of this shape, adapted, on the meta device: shapes without memory."""
        with torch.device("meta"):
            model = GPT2(config)
        self.adapt_blank(model)
        return model

    def adapt_blank(self, model: nn.Module) -> None:
        """`adapt`, for a model whose tensors have shapes and no values."""
        self.adapt(model)

    def bytes_for_undo(self, config: GPT2Config) -> int:
        """What is kept of the base for `undo`, beside the copies in `Adaptation.kept`."""
        return 0

    def on_full_base(self) -> Method:
        """The same method on a base whose weights are floating-point numbers."""
        return self

    def trains_of_base(self) -> str:
        """Which of the base's own parameters are trained: "nothing", "biases", "some" or "everything"."""
        return "nothing"

    # --- Before adapting ---

    def load_base(self, source: str | Path) -> tuple[LanguageModel, AnyTokenizer]:
        """`load_language_model`, in the form that costs this method the least memory. `adapt` takes the full one as
        well."""
        return load_language_model(source)

    def for_tokenizer(self, tokenizer: Any) -> Method:
        """This method with its texts, if it has any, as a tokenizer's ids.

        Raises:
            ValueError: such a text does not fit.
        """
        return self

    # --- Adapting and undoing ---

    def adapt(self, model: nn.Module) -> None:
        """Freeze `model`, put in what this method learns, in place.

        Raises:
            ValueError: the model is adapted already, or the hyperparameters do not fit it. The model is
                then as it was.
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
        model.__dict__["adaptation"] = record  # past nn.Module's own bookkeeping: this is no part of its state

    def undo(self, model: nn.Module) -> None:
        """Give the base model back, bit for bit: the same parameter objects, with `requires_grad` as it was."""
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

    # --- What was learned ---

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that this method trains, by their names in the adapted model."""
        learned = set(self._adaptation(model).learned)
        named = ((plain_name(name), p) for name, p in unwrapped(model).named_parameters())
        return {name: p for name, p in named if name in learned}

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of what was learned, and of nothing else."""
        return {name: p.detach().clone() for name, p in self.trainable(model).items()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put in what was learned before: this task's, or another's (that is how tasks are switched).

        A merged model stays merged, with the new state. Optimisers keep working: the parameters are the same objects.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape. Nothing is loaded then.
        """
        parameters = self.trainable(model)
        adapter_files.refuse_misfits({name: p.shape for name, p in parameters.items()}, state)
        merged = self._adaptation(model).merged
        self.unmerge(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
        if merged:
            self.merge(model)

    # --- Merging ---

    def merge(self, model: nn.Module) -> None:
        """Put the change into the weights, so that the model costs what the base costs. Merging is idempotent.

        Raises:
            ValueError: what this method does is not a change of the weights.
        """
        record = self._adaptation(model)
        if not self.can_merge:
            raise ValueError(f"{self.name} cannot be merged: what it adds is not a change of the model's weights")
        if not record.merged:
            self._merge(unwrapped(model))
            record.merged = True

    def unmerge(self, model: nn.Module) -> None:
        """Undo `merge` bit for bit. A model that is not merged stays as it is."""
        record = self._adaptation(model)
        if record.merged:
            self._unmerge(unwrapped(model))
            record.merged = False

    def merged_copy(self, model: M) -> M:
        """A plain model with the change in its weights and no trace of the method; `model` stays as it is.

        Raises:
            ValueError: what this method does is not a change of the weights.
        """
        plain = copy.deepcopy(unwrapped(model))
        self.merge(plain)
        self._take_out(plain, self._adaptation(plain))
        return plain

    # --- Files ---

    def save(self, model: Any, directory: str | Path, *, base_model: str | None = None, tokenizer: Any = None) -> None:
        """Write what was learned as an adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            directory: made if need be; written whole or not at all.
            base_model: the name or the place of the model that was adapted, if it is known.
            tokenizer: for methods that write a whole checkpoint; an adapter has none of its own.

        Raises:
            OSError: the place cannot be written.
        """
        config, tensors = self.to_adapter(unwrapped(model))
        if base_model:
            config["base_model_name_or_path"] = base_model
        adapter_files.write_adapter(directory, config, tensors)

    def to_adapter(self, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of the two files. A method that PEFT knows overrides this with PEFT's own fields and keys."""
        return {"peft_type": self.peft_type, **asdict(self)}, self.state_dict(model)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether this method understands an `adapter_config.json`. A subclass is asked before its base class; one that
        trains in another way and saves the same (LoRA+) leaves it to the base class to read."""
        return "peft_type" in vars(cls) and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any
    ) -> tuple[Method, dict[str, Tensor]]:
        """The inverse of `to_adapter`: the method, and the state to load once it has adapted `model`.

        Raises:
            ValueError: a field that this method does not have, or a value that it does not allow.
        """
        own = [f.name for f in fields(cls)]
        adapter_files.refuse_unknown_fields(config, understood=own)
        try:
            return cls(**{name: config[name] for name in own if name in config}), dict(tensors)
        except TypeError as error:
            raise ValueError(f"{adapter_files.CONFIG_FILE}: {error}") from None

    @classmethod
    def from_checkpoint(cls, directory: Path) -> tuple[Method, dict[str, Tensor]]:
        """The method and the weights of a whole model that `save` wrote; wherever `saves_model`."""
        raise NotImplementedError

    def _adaptation(self, model: nn.Module) -> Adaptation:
        record = adaptation_of(model)
        if record is None:
            raise ValueError(f"the model is not adapted; call adapt(model) of {self} first")
        if record.method != self:
            raise ValueError(f"the model is adapted by {record.method}, not by {self}")
        return record


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """What an adapted model remembers; None for a plain one."""
    return unwrapped(model).__dict__.get("adaptation")


def _restore_flags(record: Adaptation) -> None:
    for name, parameter in record.base.items():
        parameter.requires_grad_(record.required_grad[name])
