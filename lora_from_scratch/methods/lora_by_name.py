"""LoRA on any module whose layers are `nn.Linear`, chosen by name: the rule of PEFT's `target_modules` in a few lines.

`LoRA` and `find_targets` do the same with patterns, fused matrices, and a record with which everything can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lora_from_scratch.methods.lora import inject_lora
from lora_from_scratch.methods.placement import ends_with


def add_lora(model: nn.Module, targets: Sequence[str] | str, make_layer: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Put a LoRA beside some linear layers of a model, which are chosen by their names. The model changes in place.

    - Only an `nn.Linear` can be chosen. It is chosen if its full name is a target, or ends with a dot and a target:
      "k_proj" and "attn.k_proj" mean `h.0.attn.k_proj`, and "proj" does not.
    - With "all-linear" as `targets`, every `nn.Linear` is chosen except the output head (PEFT's rule). The head is the
      module that `model.get_output_embeddings()` returns; a model without that method has none to leave out.
    - In the place of each chosen layer, the model then has what `make_layer` returns for it. It is called once for
      each.
    - Only what `make_layer` adds is trained: `requires_grad` is False on every parameter that the model had before.

    Args:
        model: any module.
        targets: a list of names, or "all-linear".
        make_layer: such as `LoRALinear`: a function of the layer, which returns a module that contains it.

    Returns:
        The full names of the layers, in the order of `model.named_modules()`.

    Raises:
        ValueError: a name in the list matches no layer. The model is then unchanged.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if targets == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = None if get_head is None else get_head()
        chosen = [name for name, module in linear.items() if module is not head]
    else:
        if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:
            raise ValueError(f"no linear layer has a name that ends with {lost[0]!r}")
        chosen = [name for name in linear if any(ends_with(name, target) for target in targets)]
    model.requires_grad_(False)
    inject_lora(model, {name: make_layer(linear[name]) for name in chosen})
    return chosen
