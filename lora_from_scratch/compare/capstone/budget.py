"""What a method costs, computed before training, and whether that is within a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_from_scratch.finetune.accounting import predicted_memory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.method import Method

COSTS = {
    "trained_parameters": "number of trained parameters",
    "training_memory": "peak bytes of a training step",
    "added_work": "multiply-adds per token read, in addition to the base model's",
    "saved_bytes": "bytes stored per task",
}

BRIEFS = {
    "tenants": "1,000 customers, each with their own model, on one server that answers all of them in one batch",
    "latency": "one task, and no answer may take longer than the base model's",
    "laptop": "the model has to be trained on a student's old laptop",
}


def cost_of(
    config: GPT2Config, method: Method, *, batch_size: int = 8, tokens: int = 96, merged: bool = False
) -> dict[str, int]:
    """The costs of adapting a GPT-2 of this shape, by the names in `COSTS`. Nothing is trained or allocated.

    Args:
        batch_size, tokens: B texts of T tokens per training step, for the memory.
        merged: whether the update is merged into the weights for inference, so that it adds no work.

    Raises:
        ValueError: the method cannot be merged, or does not fit the shape.
    """
    if merged and not method.can_merge:
        raise ValueError(f"{method.name} cannot be merged into the weights; use merged=False")
    model = method.blank_model(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = 0 if merged else multiply_adds(method.on_full_base().blank_model(config)) - base_work(config)
    return {
        "trained_parameters": trained,
        "training_memory": predicted_memory(config, method, batch_size, tokens).total,
        "added_work": added,
        "saved_bytes": saved_bytes(model, method),
    }


def saved_bytes(model: GPT2, method: Method) -> int:
    """The bytes of the tensors that `save` would write: for full fine-tuning a checkpoint, otherwise an adapter."""
    if method.saves_model:
        return sum(p.nbytes for p in model.parameters())
    return sum(tensor.nbytes for tensor in method.to_adapter(model)[1].values())


def multiply_adds(model: GPT2, tokens: int = 64) -> int:
    """Multiply-adds per token when a text of this many tokens is read.

    PyTorch counts them, operation by operation; on the meta device nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, min(tokens, model.config.n_positions), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(ids)
    return int(counter.get_total_flops()) // 2 // ids.shape[1]


def base_work(config: GPT2Config) -> int:
    """`multiply_adds` of an unadapted GPT-2 of this shape."""
    with torch.device("meta"):
        return multiply_adds(GPT2(config))


def over_budget(cost: Mapping[str, float], budget: Mapping[str, float]) -> list[str]:
    """The names in the budget whose cost exceeds the limit, in the budget's order.

    A cost equal to the limit is within it. Costs that the budget does not name are not limited.

    Args:
        cost: the cost of each resource, by name.
        budget: the limit of some or all of the resources, by name.

    Raises:
        ValueError: the budget names a resource whose cost is not known. Unknown is not free.
    """
    unknown = [name for name in budget if name not in cost]
    if unknown:
        raise ValueError(f"the budget limits {', '.join(unknown)}, whose cost is not given")
    return [name for name, limit in budget.items() if cost[name] > limit]


def budget_of(brief: str, config: GPT2Config) -> dict[str, float]:
    """The limits of one of the `BRIEFS` for a GPT-2 of this shape.

    They are shares of the costs of full fine-tuning, so that they suit models of every size.

    Raises:
        ValueError: there is no such brief.
    """
    if brief not in BRIEFS:
        raise ValueError(f"there is no brief {brief!r}; there are {', '.join(BRIEFS)}")
    full = cost_of(config, FullFineTuning(keep_base=False))
    work = base_work(config)
    limits: dict[str, dict[str, float]] = {
        "tenants": {"saved_bytes": full["saved_bytes"] // 75, "added_work": work // 40},
        "latency": {"added_work": 0, "trained_parameters": full["trained_parameters"] // 20},
        "laptop": {"training_memory": full["training_memory"] * 5 // 8},
    }
    return limits[brief]
