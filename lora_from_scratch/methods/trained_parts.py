"""What can be trained in full beside a LoRA: biases, and whole modules such as the embeddings of new tokens.

The names are PEFT's: `bias` and `modules_to_save` of its `LoraConfig`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.method import Method, hyperparameter
from lora_from_scratch.methods.placement import ends_with
from lora_from_scratch.support.wrapped import plain_name

BIAS = ("none", "all", "lora_only")


class TrainedCopy(nn.Module):
    """A copy of a module, which is trained in its place; the module itself is kept, unchanged, as `base`.

    It is for a module that shares a tensor with another place, as GPT-2's token embedding with its output head. There
    the tensor stays what it was, so the copy cannot be merged.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copy = copy.deepcopy(base).requires_grad_(True)
        self.train(base.training)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.copy(*arguments, **named)

    @property
    def weight(self) -> Tensor | nn.Module:
        """The base's, for the place that shares it."""
        return self.base.weight


class TrainedTokens(nn.Module):
    """An embedding in which the rows of some tokens are trained; the embedding itself is kept, frozen, as `base`.

    Args:
        base: the embedding, (V, d).
        tokens: their ids, n of them.
    """

    def __init__(self, base: nn.Embedding, tokens: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.tokens: Tensor
        self.register_buffer("tokens", torch.tensor(tokens, device=base.weight.device), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(base.weight.detach()[self.tokens])  # (n, d), PEFT's name
        self._unmerged: Tensor | None
        self.register_buffer("_unmerged", None, persistent=False)  # the rows as they were, while merged
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """(V, d), with the trained rows: an output head that uses it is trained too."""
        if self._unmerged is not None:
            return self.base.weight
        return self.base.weight.index_copy(0, self.tokens, self.trainable_tokens_delta)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight, self.base.padding_idx)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the trained rows into the base, and keep those that were there."""
        if self._unmerged is None:
            self._unmerged = self.base.weight[self.tokens]
            self.base.weight.data[self.tokens] = self.trainable_tokens_delta

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what was there, bit for bit."""
        if self._unmerged is not None:
            self.base.weight.data[self.tokens] = self._unmerged
            self._unmerged = None


@dataclass(frozen=True, kw_only=True)
class TrainsParts(Method):
    """A method that can train parts of the base in full.

    `trainable_token_indices` means rows of the token embedding, and so of an output head that is tied to it.

    Raises:
        ValueError: `bias` is not one of "none", "all" and "lora_only", when it is made; or a module or a token is not
            in the model, in `adapt`.
    """

    bias: str = hyperparameter("none", "biases to train too: none, all, or lora_only (of adapted layers)")
    modules_to_save: Sequence[str] = hyperparameter(
        (), "modules to train in full and to save with the adapter, by name (ln_f, wpe)"
    )
    trainable_token_indices: Sequence[int] = hyperparameter(
        (), "ids of tokens whose embeddings are trained too, such as those of new tokens"
    )

    def __post_init__(self) -> None:
        if self.bias not in BIAS:
            raise ValueError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        for name in ("modules_to_save", "trainable_token_indices"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name} must be a list, got {given!r}")
            object.__setattr__(self, name, tuple(given))
        if len(set(self.trainable_token_indices)) < len(self.trainable_token_indices):
            raise ValueError(f"trainable_token_indices has a token twice: {self.trainable_token_indices}")

    def parts_to_train(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that `modules_to_save` and `trainable_token_indices` mean, by their full names.

        Raises:
            ValueError: the model has no such module or token.
        """
        found: dict[str, nn.Module] = {}
        for name in self.modules_to_save:
            modules = {full: module for full, module in model.named_modules() if ends_with(full, name)}
            if not modules:
                raise ValueError(f"modules_to_save names {name!r}, and a {type(model).__name__} has no such module")
            found |= modules
        if self.trainable_token_indices:
            name, embedding = token_embedding(model)
            least, most = min(self.trainable_token_indices), max(self.trainable_token_indices)
            if least < 0 or most >= len(embedding.weight):
                raise ValueError(f"the tokens must be from 0 to {len(embedding.weight) - 1}, got {least} to {most}")
            if name in found:
                raise ValueError(f"modules_to_save names {name}, so all its tokens are trained; leave it out")
            found[name] = embedding
        return found

    def train_parts(self, model: nn.Module, layers: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
        """Train these modules, and the biases that `bias` means.

        Args:
            layers: the adapted ones, by name, each with the layer that it adapts as `base`.
            modules: from `parts_to_train`, found before the model was touched.
        """
        for name, module in modules.items():
            if not any(ends_with(name, end) for end in self.modules_to_save):
                assert isinstance(module, nn.Embedding)
                model.set_submodule(name, TrainedTokens(module, self.trainable_token_indices))
            elif is_tied(model, module):
                model.set_submodule(name, TrainedCopy(module))
            else:
                module.requires_grad_(True)
        if self.bias == "all":
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.requires_grad_(True)
        elif self.bias == "lora_only":
            for layer in layers.values():
                if isinstance(layer.base.bias, nn.Parameter):
                    layer.base.bias.requires_grad_(True)

    @classmethod
    def random_parts(cls, rng: Random) -> dict[str, Any]:
        """Random hyperparameters of this class for a GPT-2, for tests."""
        return {
            "bias": rng.choice(BIAS),
            "modules_to_save": rng.choice([(), ("ln_f",)]),
            "trainable_token_indices": rng.choice([(), (0, 2)]),
        }

    def trains_of_base(self) -> str:
        return "some" if self.modules_to_save else "biases" if self.bias != "none" else "nothing"

    def _uninstall(self, model: nn.Module) -> None:
        """Put back the modules that `train_parts` replaced: the same objects."""
        parts: dict[str, Any] = {**_copies(model), **trained_tokens(model)}
        for name, module in parts.items():
            model.set_submodule(name, module.base)

    def _merge(self, model: nn.Module) -> None:
        for name in _copies(model):
            raise ValueError(
                f"cannot merge the trained {name}: its weight is tied to another module's, which keeps the old values"
            )
        for embedding in trained_tokens(model).values():
            embedding.merge()

    def _unmerge(self, model: nn.Module) -> None:
        for embedding in trained_tokens(model).values():
            embedding.unmerge()


def token_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    """The token embedding of a model and its name.

    Raises:
        ValueError: it has none that is known, or an output head shares its weight as a parameter of its own.
    """
    get = getattr(model, "get_input_embeddings", None)  # of transformers
    embedding = model.transformer.wte if isinstance(model, GPT2) else get() if callable(get) else None
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"a {type(model).__name__} has no token embedding that is known here")
    if not isinstance(model, GPT2) and is_tied(model, embedding):
        raise ValueError(
            f"trainable_token_indices does not fit this {type(model).__name__}: its output head is tied to its token "
            "embedding and would keep the old values"
        )
    return next(name for name, module in model.named_modules() if module is embedding), embedding


def is_tied(model: nn.Module, module: nn.Module) -> bool:
    """Whether a parameter of the module is used by another module too, as the token embedding is by GPT-2's head."""
    if isinstance(model, GPT2) and module is model.transformer.wte:
        return True
    own = {id(parameter) for parameter in module.parameters()}
    inside = set(module.modules())
    others = (m for m in model.modules() if m not in inside)
    return any(id(parameter) in own for other in others for parameter in other.parameters(recurse=False))


def trained_tokens(model: nn.Module) -> dict[str, TrainedTokens]:
    """The embeddings with trained tokens, by name."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, TrainedTokens)}


def _copies(model: nn.Module) -> dict[str, nn.Module]:
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, TrainedCopy)}
