"""The names of the attention and MLP modules in the blocks of known architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora_from_scratch.support.linear_layers import in_and_out, is_linear


@dataclass(frozen=True)
class BlockParts:
    """Names of modules inside a block.

    Attributes:
        attn, mlp: the modules whose outputs are added to the residual stream.
        query: the linear layer that computes the queries, or queries, keys and values side by side; None if there is
            no such layer.
        middle: the first layers of the MLP: one, or two whose outputs are multiplied.
    """

    attn: str
    mlp: str
    query: str | None
    middle: tuple[str, ...]


_GPT2 = BlockParts("attn", "mlp", "attn.c_attn", ("mlp.c_fc",))
_LLAMA = BlockParts("self_attn", "mlp", "self_attn.q_proj", ("mlp.gate_proj", "mlp.up_proj"))
_BERT = BlockParts("attention.output.dense", "output.dense", "attention.self.query", ("intermediate.dense",))
BLOCKS = {  # by the class of the block
    "Block": _GPT2,  # our GPT-2
    "GPT2Block": _GPT2,  # from here on transformers'
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "SmolLM3DecoderLayer": _LLAMA,
    "GPTNeoXLayer": BlockParts("attention", "mlp", None, ("mlp.dense_h_to_4h",)),  # q, k and v are interleaved by head
    "PhiDecoderLayer": BlockParts("self_attn", "mlp", "self_attn.q_proj", ("mlp.fc1",)),
    "OPTDecoderLayer": BlockParts("self_attn", "fc2", "self_attn.q_proj", ("fc1",)),
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "ViTLayer": BlockParts("attention", "mlp", "attention.q_proj", ("mlp.fc1",)),
}


def blocks_of(model: nn.Module) -> dict[str, BlockParts]:
    """The blocks of a model by name, in its order, with the names of their parts.

    Raises:
        LookupError: none of its modules is a block listed in `BLOCKS`.
    """
    found = {}
    for name, module in model.named_modules():
        parts = BLOCKS.get(type(module).__name__)
        if parts and all(_has(module, part) for part in (parts.attn, parts.mlp)):
            found[name] = parts
    if not found:
        known = ", ".join(list(BLOCKS)[1:])
        raise LookupError(f"a {type(model).__name__} has no blocks that are known here, which are {known}")
    return found


def parts_of_blocks(model: nn.Module, parts: Sequence[str], layers: Sequence[int] = ()) -> list[str]:
    """Full names of modules, block by block.

    Args:
        parts: attributes of `BlockParts`, "attn" or "mlp"; "" is the block itself.
        layers: the blocks, counted from 0; empty: all.

    Raises:
        LookupError: the model has no blocks listed in `BLOCKS`.
        ValueError: it has no such layer.
    """
    blocks = list(blocks_of(model).items())
    check_layers(layers, len(blocks))
    chosen = [blocks[layer] for layer in sorted(set(layers)) or range(len(blocks))]
    return [f"{name}.{getattr(names, part)}" if part else name for name, names in chosen for part in parts]


def check_layers(layers: Sequence[int], n_layer: int) -> None:
    """Raise a ValueError unless all of `layers` are from 0 to n_layer - 1."""
    for layer in layers:
        if not 0 <= layer < n_layer:
            raise ValueError(f"layers must be from 0 to {n_layer - 1} (the model has {n_layer}), got {layer}")


def find_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules whose full name is one of these or ends with a dot and one of these, in the model's order.

    Raises:
        ValueError: one of the names matches no module.
    """
    every = [name for name, _ in model.named_modules()]
    for wanted in names:
        if not any(_ends(name, wanted) for name in every):
            raise ValueError(f"the model has no module {wanted!r}; print(model) shows those that it has")
    return [name for name in every if any(_ends(name, wanted) for wanted in names)]


def widths(module: nn.Module, name: str) -> tuple[int, int]:
    """The number of input and output features of a module, taken from the first and the last linear layer in it.

    Raises:
        ValueError: there is no linear layer in it.
    """
    layers = [layer for layer in module.modules() if is_linear(layer)]
    if not layers:
        raise ValueError(f"{name} is a {type(module).__name__} without linear layers, whose width is not known")
    return in_and_out(layers[0])[0], in_and_out(layers[-1])[1]


def _has(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_submodule(name), nn.Module)
    except AttributeError:
        return False


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
