"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): LoRA on a base model stored with four bits per weight.

    y = x dequant(W_4bit)^T + b + s B A x          (eq. 5)

The frozen weight is dequantised each time it is needed, in the forward and in the backward pass, and never stored. The
weights take a quarter of the memory of 16-bit weights and an eighth of that of 32-bit weights, and each step takes
somewhat longer. A, B, the biases, the embeddings and the normalisation layers are not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from lora_from_scratch.methods.lora import LoRA, inject_lora, lora_layers
from lora_from_scratch.methods.method import LearningRates, adaptation_of, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.quantized_lora import QuantizedLoRA, layers_to_quantize
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel, find_model
from lora_from_scratch.quantization.nf4 import CODEBOOKS, NestedAbsmax
from lora_from_scratch.quantization.nf4_linear import NF4Linear, check_quantization, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import NESTED_BLOCKSIZE, QuantizedTensor
from lora_from_scratch.support.linear_layers import CONV1D, is_conv1d, keep_called, weight_of
from lora_from_scratch.support.wrapped import unwrapped

# --- Loading ---------------------------------------------------------------------------------------


def load_quantized(
    source: str | Path = BUNDLED,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quantization: bool = True,
) -> GPT2:
    """Load a checkpoint in four bits, in eval mode: like `load_model` and `quantize_model`, but one layer at a time.

    The full-precision model is never in memory as a whole, unless the weights are not in a single `model.safetensors`.

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
    """The name in the file of each tensor of the model, after checking that they fit.

    The file is memory-mapped, so the values of a tensor are read only when they are used.
    """
    tensors = read_weights(directory)
    check_fit(model.state_dict(), model_tensors(tensors, directory), directory)
    return {name if name.startswith("transformer.") else f"transformer.{name}": name for name in tensors}


def _read_tensor(file: Path, name: str) -> Tensor:
    """A copy in float32. The file is opened for this tensor only, so that the pages read are released afterwards."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name).to(torch.float32, copy=True)


# --- Quantising a model --------------------------------------------------------------------------------


def quantize_model(
    model: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quantization: bool = True
) -> dict[str, nn.Module]:
    """Put an `NF4Linear` in the place of every linear layer of a model but its output head, in place.

    `linear_layers(model)` finds these layers; of a GPT-2 they are the Conv1D. All else stays the object that it is:
    embeddings, the head (also one that makes classes: `classifier(model)`, and what is in it), normalisation, and the
    biases, which the new layers share with the old ones.

    Args:
        model: not adapted by a method. It may be in four bits already; then there is nothing to do.
        quant_type, blocksize, double_quantization: as `NF4Linear.from_layer`.

    Returns:
        The layers that were there, by name ("transformer.h.0.attn.c_attn").
        Drop them and their weights leave the memory; keep them, and `inject_lora(model, layers)` puts them back.
        Empty if the model was in four bits already.

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


class _Blank(QuantizedTensor):
    """A quantised tensor without values, on the meta device or in a `FakeTensorMode`."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)


# --- The method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QLoRA(QuantizedLoRA):
    """LoRA on a 4-bit base model: `adapt` quantises every linear layer except the head, then inserts LoRA.

    A model that is already quantised (`load_quantized`) is left as it is, so the full weights are never in memory.

    Merging: in four bits, any change smaller than half a quantisation step would be lost in rounding. So `merge`
    dequantises: the merged model computes what the adapted one does and is as large as the full-precision base.

    The adapter directory is that of LoRA, with the same keys. Its field `loftq_config` records how the base was
    quantised. PEFT ignores that field, with a warning: with PEFT, whoever loads the base decides how to quantise it.

    Args:
        double_quantization, blocksize, quant_type: how the base is stored; see `NF4Linear.from_layer`.
        keep_base: see `QuantizedLoRA`.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor), or does not fit the model (raised by
            `adapt`).
    """

    double_quantization: bool = hyperparameter(True, "also quantise the scales of the blocks (double quantisation)")
    blocksize: int = hyperparameter(64, "number of weights per block, which share one scale")
    quant_type: str = hyperparameter("nf4", f"4-bit data type of the base weights: {', '.join(CODEBOOKS)}")

    name: ClassVar[str] = "qlora"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-4, "finetune_guanaco_7b.sh in artidoro/qlora; bundled: as LoRA"
    )
    position: ClassVar[float] = 20
    use_when: ClassVar[str] = (
        "the frozen weights are what does not fit in memory: 4 bits instead of 16 or 32 for each, at the price "
        "of time for dequantising"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_quantization(self.quant_type, self.blocksize)
        if not isinstance(self.double_quantization, bool):
            raise ValueError(f"double_quantization must be true or false, got {self.double_quantization!r}")

    def load_base(self, source: str | Path) -> tuple[LanguageModel, AnyTokenizer]:
        """Load a GPT-2 in four bits, one layer at a time; any other model in full, which `adapt` then quantises."""
        if not find_model(source).is_gpt2:
            return super().load_base(source)
        tokenizer = load_tokenizer(source)
        model = load_quantized(source, self.quant_type, self.blocksize, self.double_quantization)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {checkpoint_directory(source)} has {tokenizer.vocab_size} tokens, "
                f"more than the model's vocabulary of {model.config.vocab_size}"
            )
        return model, tokenizer

    def quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        self._refuse_another_base(model)
        return quantize_model(model, self.quant_type, self.blocksize, self.double_quantization)

    def _refuse_another_base(self, model: nn.Module) -> None:
        """Check that layers which are already quantised have this method's settings."""
        wanted = (self.quant_type, self.blocksize, self.double_quantization)
        for name, layer in nf4_layers(model).items():
            q = layer.quantized
            if (q.quant_type, q.blocksize, q.nested) != wanted:
                raise ValueError(
                    f"{name} is quantised already, with quant_type={q.quant_type}, blocksize={q.blocksize}, "
                    f"double_quantization={q.nested}; the method has to have the same, got {self}"
                )

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As LoRA's, with a field that records how the base was quantised."""
        config, tensors = super().to_adapter(model)
        own = ("quant_type", "blocksize", "double_quantization")
        config["loftq_config"] = {"loftq_bits": 4, **{name: getattr(self, name) for name in own}}
        bases = [layer.base for layer in lora_layers(model).values()]
        if any(isinstance(base, NF4Linear) and base.kind.__name__ == CONV1D for base in bases):
            config["fan_in_fan_out"] = True  # in the model that PEFT will have
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
        method, state = super().from_adapter(config, tensors, model)
        return replace(method, **{name: given[name] for name in known[2:] if name in given}), state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return replace(
            super().sample(rng, config),
            targets=rng.choice(WHOLE_LAYERS),
            quant_type=rng.choice(["nf4", "fp4"]),  # type: ignore[call-arg]
            blocksize=rng.choice([32, 64]),
            double_quantization=rng.random() < 0.5,
        )

    def bytes_for_undo(self, config: GPT2Config) -> int:
        """The weights of the Conv1D of all blocks, in fp32."""
        dense = 4 * config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.mlp_width)
        return dense if self.keep_base else 0

    def adapt_blank(self, model: nn.Module) -> None:
        """A weight without values cannot be quantised, but its size in four bits is known."""
        model = unwrapped(model)
        inject_lora(model, {name: self._blank_layer(layer) for name, layer in layers_to_quantize(model).items()})
        self.adapt(model)

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
