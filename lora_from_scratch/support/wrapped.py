"""A model inside the wrappers around it: compiled, in parallel, or called in another way."""

from __future__ import annotations

from typing import Any

from torch import nn

COMPILED = "_orig_mod"  # where the module that `torch.compile` returns keeps the one that it was given
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Wrapper(nn.Module):
    """A base class for modules that only change how another module is called; methods adapt the module inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside: Any = inside
        self.training = inside.training


def unwrapped(model: nn.Module) -> Any:
    """The model itself, however many wrappers are around it; a plain model comes back as it is."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def plain_name(name: str) -> str:
    """The name that a module or parameter has where nothing is compiled: compiled modules add a part to it."""
    return name.replace(f"{COMPILED}.", "").removesuffix(f".{COMPILED}")


def refuse_wrapped_parts(model: nn.Module) -> None:
    """Raise a ValueError if a module of `model`, other than `model` itself, is compiled or wrapped."""
    for name, module in model.named_modules():
        if _inside(module) is not None:
            raise ValueError(
                f"{name} is compiled or wrapped ({type(module).__name__}); adapt the model first, then its parts can be"
            )


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, PARALLEL):
        return module.module
    return module._modules.get("inside" if isinstance(module, Wrapper) else COMPILED)
