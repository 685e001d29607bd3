"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): a LoRA on a model that is stored in four bits a weight.

    y = x dequant(W_4bit)^T + b + s B A x          (eq. 5)

The frozen weight is made anew whenever it is needed, forward and backward, and thrown away at once. What is
left is a quarter of the memory of 16-bit weights, an eighth of that of 32-bit weights, for some more time a step.
A, B, the biases, the embeddings and the normalisation stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import (
    BUNDLED,
    check_fit,
    checkpoint_directory,
    load_model,
    load_tokenizer,
    model_tensors,
    read_weights,
)
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, Conv1D
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.loftq import begin_with_loftq
from lora_from_scratch.methods.lora import LoRA, inject_lora, lora_layers
from lora_from_scratch.methods.method import LearningRates, adaptation_of, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS, classifier, linear_layers
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel, find_model
from lora_from_scratch.quantization.nf4 import CODEBOOKS, NestedAbsmax
from lora_from_scratch.quantization.nf4_linear import NF4Linear, check_quantization, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import NESTED_BLOCKSIZE, QuantizedTensor, quantize_4bit
from lora_from_scratch.support.linear_layers import CONV1D, is_conv1d, keep_called, weight_of
from lora_from_scratch.support.wrapped import unwrapped

# --- Loading ---------------------------------------------------------------------------------------


def load_quantized(
    source: str | Path = BUNDLED,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quantization: bool = True,
) -> GPT2:
    """A checkpoint in four bits, in eval mode: `load_model`, then `quantize_model`, a layer at a time.

    The whole model is never in memory in full. (It is where the weights are not in one `model.safetensors`.)

    Raises:
        ValueError, OSError: as `load_model` and `quantize_model`.
    """
    check_quantization(quant_type, blocksize)
    directory = checkpoint_directory(source)
    file = directory / "model.safetensors"
    if not file.exists() or not (directory / "config.json").exists():
        model = load_model(directory)
        quantize_model(model, quant_type, blocksize, double_quantization)
        return model
    with torch.device("meta"):  # shapes without memory
        model = GPT2(GPT2Config.from_json(directory / "config.json"))
    in_file = _names_in_file(model, directory)
    for name in [name for name, _ in model.named_modules()]:  # names: a list of modules would hold the full weights
        module = model.get_submodule(name)
        for last, _ in list(module.named_parameters(recurse=False)):
            setattr(module, last, nn.Parameter(_read_tensor(file, in_file[f"{name}.{last}"])))
        if isinstance(module, Conv1D):
            try:
                quantized = NF4Linear.from_layer(module, quant_type, blocksize, double_quantization)
            except ValueError as error:
                raise ValueError(f"{directory}: {name}: {error}") from None
            inject_lora(model, {name: quantized})
    return model.eval()


def _names_in_file(model: GPT2, directory: Path) -> dict[str, str]:
    """Under which name the file has each tensor of the model, after a check that they fit.

    The file is mapped into memory, and of a mapped tensor nothing is read before its values are used.
    """
    tensors = read_weights(directory)
    check_fit(model.state_dict(), model_tensors(tensors, directory), directory)
    return {name if name.startswith("transformer.") else f"transformer.{name}": name for name in tensors}


def _read_tensor(file: Path, name: str) -> Tensor:
    """A copy in float32. The file is opened for this one tensor, so that what was read leaves the memory again."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name).to(torch.float32, copy=True)


# --- Quantising a model --------------------------------------------------------------------------------


def quantize_model(
    model: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quantization: bool = True
) -> dict[str, nn.Module]:
    """Put an `NF4Linear` in the place of every linear layer of a model but its output head, in place. Of a GPT-2 these
    are the Conv1D. All else stays the object that it is: embeddings, the head (also one that makes classes, under
    transformers' names), normalisation, and the biases, which the new layers share with the old ones.

    Args:
        model: not adapted by a method. It may be in four bits already; then there is nothing to do.
        quant_type, blocksize, double_quantization: as `NF4Linear.from_layer`.

    Returns:
        The layers that were there, by name ("transformer.h.0.attn.c_attn"). Drop them and their weights leave the
        memory; keep them, and `inject_lora(model, layers)` puts them back. Empty if the model was in four bits already.

    Raises:
        ValueError: the type or block size is unknown, a weight is not finite (the message names the layer), or
            the model is adapted (`adaptation_of` returns something). The model is then as it was.
    """
    before = adaptation_of(model)
    if before is not None:
        raise ValueError(f"the model is already adapted by {before.method}; undo that, quantise, and adapt again")
    dense = layers_to_quantize(model)
    quantized: dict[str, nn.Module] = {}
    for name, layer in dense.items():
        try:
            quantized[name] = NF4Linear.from_layer(layer, quant_type, blocksize, double_quantization)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    inject_lora(model, quantized)
    keep_called(model, quantized)
    return dense


def layers_to_quantize(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that `quantize_model` replaces, by name."""
    kept = set() if (head := classifier(model)) is None else set(head.modules())
    found = linear_layers(model).items()
    return {name: layer for name, layer in found if layer not in kept and not isinstance(layer, NF4Linear)}


class _Blank(QuantizedTensor):
    """A quantised tensor without values, on the meta device or in a `FakeTensorMode`."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)


# --- The method ----------------------------------------------------------------------------------------

# What an adapted model remembers beside its `Adaptation`, past nn.Module's own bookkeeping. So a layer that goes back
# is brought to the device and the dtype of the one that stands in its place.
_DENSE = "dense_layers"  # the layers that `adapt` replaced, by name; None: thrown away (keep_base=False)
_QUANTIZED = "quantized_layers"  # while merged: the 4-bit layers


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA on a 4-bit base model: `adapt` quantises every linear layer except the head, then inserts LoRA.

    A model that is quantised already (`load_quantized`) stays as it is, and never needs room for the full weights.

    Merging: s B A does not fit into four bits, where a change smaller than half a step would be rounded away. So
    `merge` dequantises: the merged model computes what the adapted one does, and is as large as the base was.

    An adapter directory is a LoRA's, with the same keys. How the base was quantised is in its field `loftq_config`,
    which PEFT ignores (and says so): there, quantising is up to who loads the base.

    Args:
        double_quantization, blocksize, quant_type: how the base is stored; see `NF4Linear.from_layer`.
        loftq_iterations: 0 starts where the 4-bit base is; more start nearer to the full one (`loftq.py`).
        keep_base: whether the full weights stay in memory for `undo`: as large as the model itself. `keep_base=False`
            saves that; then there is no way back (unless the model was quantised before).

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    double_quantization: bool = hyperparameter(True, "also quantise the scales of the blocks (double quantisation)")
    blocksize: int = hyperparameter(64, "number of weights per block, which share one scale")
    quant_type: str = hyperparameter("nf4", f"4-bit data type of the base weights: {', '.join(CODEBOOKS)}")
    loftq_iterations: int = hyperparameter(
        0, "LoftQ iterations that fit the initial A and B to the quantisation error; 0: LoRA's initialisation"
    )
    keep_base: bool = True

    name: ClassVar[str] = "qlora"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-4, "finetune_guanaco_7b.sh in artidoro/qlora; bundled: as LoRA"
    )
    position: ClassVar[float] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_quantization(self.quant_type, self.blocksize)
        if not isinstance(self.double_quantization, bool):
            raise ValueError(f"double_quantization must be true or false, got {self.double_quantization!r}")
        if not isinstance(self.loftq_iterations, int) or self.loftq_iterations < 0:
            raise ValueError(f"loftq_iterations must be a whole number of at least 0, got {self.loftq_iterations!r}")

    def load_base(self, source: str | Path) -> tuple[LanguageModel, AnyTokenizer]:
        """A GPT-2 in four bits, a layer at a time; in full only for LoftQ, which needs the full weights.

        Any other model is loaded in full, and `adapt` quantises it.
        """
        if self.loftq_iterations or not find_model(source).is_gpt2:
            return super().load_base(source)
        tokenizer = load_tokenizer(source)
        model = load_quantized(source, self.quant_type, self.blocksize, self.double_quantization)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {checkpoint_directory(source)} has {tokenizer.vocab_size} tokens, "
                f"more than the model's vocabulary of {model.config.vocab_size}"
            )
        return model, tokenizer

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        if not self.keep_base:
            record, present = self._adaptation(model), {id(p) for p in model.parameters()}
            record.base = {name: p for name, p in record.base.items() if id(p) in present}

    def undo(self, model: nn.Module) -> None:
        """Give the base model back, bit for bit.

        Raises:
            ValueError: `keep_base` is False and `adapt` threw the full weights away.
        """
        self._adaptation(model)
        if None in unwrapped(model).__dict__[_DENSE].values():
            raise ValueError("nothing to go back to: keep_base=False kept no full weights; load the model anew")
        super().undo(model)

    def _install(self, model: nn.Module) -> None:
        self._refuse_another_base(model)
        dense = quantize_model(model, self.quant_type, self.blocksize, self.double_quantization)
        try:
            super()._install(model)
            if self.loftq_iterations:
                self._begin_with_loftq(model, dense)
        except BaseException:
            super()._uninstall(model)
            inject_lora(model, dense)
            raise
        model.__dict__[_DENSE] = dense if self.keep_base else dict.fromkeys(dense)

    def _refuse_another_base(self, model: nn.Module) -> None:
        """Check that what is quantised already is quantised as this method says."""
        wanted = (self.quant_type, self.blocksize, self.double_quantization)
        for name, layer in nf4_layers(model).items():
            q = layer.quantized
            if (q.quant_type, q.blocksize, q.nested) != wanted:
                raise ValueError(
                    f"{name} is quantised already, with quant_type={q.quant_type}, blocksize={q.blocksize}, "
                    f"double_quantization={q.nested}; the method has to have the same, got {self}"
                )
            if self.loftq_iterations:
                raise ValueError(
                    f"loftq_iterations={self.loftq_iterations} needs the weights before they are quantised, and {name} "
                    f"is in four bits already; load the model in full, or set loftq_iterations to 0"
                )

    @torch.no_grad()
    def _begin_with_loftq(self, model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
        """New Q, A and B for every layer with a LoRA."""

        def quantize(W: Tensor) -> QuantizedTensor:
            return quantize_4bit(W, self.quant_type, self.blocksize, self.double_quantization)

        for name, layer in lora_layers(model).items():
            if name not in dense:
                continue  # the head, which is not quantised
            if layer.parts:
                raise ValueError(
                    f"{name}: LoftQ adapts whole layers, and the targets name its parts {', '.join(layer.parts)}; "
                    f"name the layer, or set loftq_iterations to 0"
                )
            begin_with_loftq(layer, weight_of(dense[name]), self.loftq_iterations, quantize)

    def _uninstall(self, model: nn.Module) -> None:
        super()._uninstall(model)
        dense = model.__dict__.pop(_DENSE)
        if model.__dict__.pop(_QUANTIZED, None) is None:
            in_place = nf4_layers(model)
            inject_lora(model, {name: layer.to(in_place[name].like) for name, layer in dense.items()})
        else:  # merged, so wanted as it is: a plain model, to be trained like the base
            flags = self._adaptation(model).required_grad
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags.get(name, True))

    def _merge(self, model: nn.Module) -> None:
        quantized = nf4_layers(model)
        model.__dict__[_QUANTIZED] = quantized
        inject_lora(model, {name: layer.dense() for name, layer in quantized.items()})
        super()._merge(model)

    def _unmerge(self, model: nn.Module) -> None:
        super()._unmerge(model)
        quantized = model.__dict__.pop(_QUANTIZED)
        inject_lora(model, {name: q.to(model.get_submodule(name).weight) for name, q in quantized.items()})

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A LoRA's, and how the base was quantised.

        A LoRA that began with LoftQ belongs to LoftQ's Q, not to the quantised W: `init_lora_weights` says so, under
        PEFT's name, and who cannot make that Q refuses it.
        """
        config, tensors = super().to_adapter(model)
        own = ("quant_type", "blocksize", "double_quantization")
        config["loftq_config"] = {"loftq_bits": 4, "loftq_iter": self.loftq_iterations}
        config["loftq_config"] |= {name: getattr(self, name) for name in own}
        bases = [layer.base for layer in lora_layers(model).values()]
        if any(isinstance(base, NF4Linear) and base.kind.__name__ == CONV1D for base in bases):
            config["fan_in_fan_out"] = True  # in the model that PEFT will have
        if self.loftq_iterations:
            config["init_lora_weights"] = "loftq"
        return config, tensors

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """A LoRA's directory whose base we quantised."""
        quantisation = config.get("loftq_config")
        return (
            config.get("peft_type") == cls.peft_type and isinstance(quantisation, dict) and "quant_type" in quantisation
        )

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LoRA, dict[str, Tensor]]:
        given = config.get("loftq_config") or {}
        known = ("loftq_bits", "loftq_iter", "quant_type", "blocksize", "double_quantization")
        if not isinstance(given, dict) or given.get("loftq_bits", 4) != 4 or set(given) - set(known):
            raise ValueError(
                f"{CONFIG_FILE} has loftq_config={given!r}; it must have loftq_bits 4 and no other fields than "
                f"{', '.join(known)}"
            )
        began_with_loftq = config.get("init_lora_weights") == "loftq"
        iterations = given.get("loftq_iter", 1) if began_with_loftq else 0
        own = {name: given[name] for name in known[2:] if name in given}
        others = {name: value for name, value in config.items() if name != "init_lora_weights" or not began_with_loftq}
        method, state = super().from_adapter(others, tensors, model)
        return replace(method, loftq_iterations=iterations, **own), state  # type: ignore[call-arg]

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> QLoRA:
        lora = super().sample(rng, config)
        assert isinstance(lora, QLoRA)
        return replace(
            lora,
            targets=rng.choice(WHOLE_LAYERS),
            quant_type=rng.choice(["nf4", "fp4"]),
            blocksize=rng.choice([32, 64]),
            double_quantization=rng.random() < 0.5,
            loftq_iterations=rng.randint(0, 1),
        )

    def starts_as_base(self) -> bool | None:
        return False  # it starts as the quantised base

    def on_full_base(self) -> LoRA:
        return LoRA(**{f.name: getattr(self, f.name) for f in fields(LoRA)})

    def bytes_for_undo(self, config: GPT2Config) -> int:
        """The weights of the Conv1D of all blocks, in fp32."""
        dense = 4 * config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.mlp_width)
        return dense if self.keep_base else 0

    def adapt_blank(self, model: nn.Module) -> None:
        """A weight without values cannot be quantised, but its size in four bits is known."""
        model = unwrapped(model)
        inject_lora(model, {name: self._blank_layer(layer) for name, layer in layers_to_quantize(model).items()})
        replace(self, loftq_iterations=0).adapt(model)

    def _blank_layer(self, layer: nn.Module) -> NF4Linear:
        shape, device, bias = weight_of(layer).shape, weight_of(layer).device, layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        blocks = -(-shape.numel() // self.blocksize)
        absmax: Tensor | NestedAbsmax = torch.empty(blocks, device=device)
        if self.double_quantization:
            codes = torch.empty(blocks, dtype=torch.uint8, device=device)
            second = torch.empty(-(-blocks // NESTED_BLOCKSIZE), device=device)
            absmax = NestedAbsmax(codes, second, torch.empty((), device=device))
        packed = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8, device=device)
        quantized = _Blank(packed, absmax, self.quant_type, self.blocksize, shape, torch.float32)
        return NF4Linear(quantized, bias, type(layer) if is_conv1d(layer) else nn.Linear)
