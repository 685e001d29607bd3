"""What a method costs, before anything is trained, and whether that is within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_from_scratch.finetune.accounting import blank_model, predicted_memory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.qlora import QLoRA

COSTS = {
    "trained_parameters": "numbers that are trained",
    "training_memory": "bytes at the peak of a training step",
    "added_work": "multiply-adds for each token that is read, beyond the base model's",
    "saved_bytes": "bytes that have to be kept for each task",
}

BRIEFS = {
    "tenants": "1,000 customers, each with a model of their own, on one server that answers all of them in one batch",
    "latency": "one task, and no answer may come later than the base model's",
    "laptop": "a student's old laptop has to train it",
}


def cost_of(
    config: GPT2Config, method: Method, *, batch_size: int = 8, tokens: int = 96, merged: bool = False
) -> dict[str, int]:
    """What adapting a GPT-2 of this shape costs, under the names of `COSTS`. Nothing is trained or allocated.

    Args:
        batch_size, tokens: of a training step, for the memory: B texts of T tokens.
        merged: the update is put into the weights before the model is used, so that it adds no work.

    Raises:
        ValueError: the method cannot be merged, or does not fit the shape.
    """
    if merged and not method.can_merge:
        raise ValueError(f"{method.name} cannot be merged into the weights; leave `merged` out")
    model = blank_model(config, method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = 0 if merged else multiply_adds(counted(config, method)) - base_work(config)
    return {
        "trained_parameters": trained,
        "training_memory": predicted_memory(config, method, batch_size, tokens).total,
        "added_work": added,
        "saved_bytes": saved_bytes(model, method),
    }


def saved_bytes(model: GPT2, method: Method) -> int:
    """The bytes of the tensors that `save` would write: for full fine-tuning a checkpoint, otherwise an adapter."""
    if isinstance(method, FullFineTuning):
        return sum(p.nbytes for p in model.parameters())
    return sum(tensor.nbytes for tensor in method.to_adapter(model)[1].values())


def multiply_adds(model: GPT2, tokens: int = 64) -> int:
    """The multiplications with an addition that one token costs when a text of so many tokens is read.

    PyTorch counts them, operation by operation; on the meta device nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, min(tokens, model.config.n_positions), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(ids)
    return int(counter.get_total_flops()) // 2 // ids.shape[1]


def base_work(config: GPT2Config) -> int:
    """`multiply_adds` of a GPT-2 of this shape that nobody has adapted."""
    with torch.device("meta"):
        return multiply_adds(GPT2(config))


def over_budget(cost: Mapping[str, float], budget: Mapping[str, float]) -> list[str]:
    """What is too expensive: the names in the budget whose cost is above the limit, in the budget's order.

    What costs exactly the limit is within it. What the budget does not name has no limit.

    Args:
        cost: of each resource, by name.
        budget: the most that it may cost, by name; a part of the resources.

    Raises:
        ValueError: the budget names a resource whose cost is not known. Unknown is not free.
    """
    unknown = [name for name in budget if name not in cost]
    if unknown:
        raise ValueError(f"the budget limits {', '.join(unknown)}, and the cost says nothing about it")
    return [name for name, limit in budget.items() if cost[name] > limit]


def budget_of(brief: str, config: GPT2Config) -> dict[str, float]:
    """The limits of one of the `BRIEFS` for a GPT-2 of this shape.

    They are shares of what full fine-tuning costs, so that they make sense for every size of model.

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


def counted(config: GPT2Config, method: Method) -> GPT2:
    """An adapted model whose work PyTorch can count; a QLoRA's is that of the LoRA in it."""
    if isinstance(method, QLoRA):
        rank, alpha, targets = method.rank, method.alpha, method.targets
        method = replace(LoRA(), rank=rank, alpha=alpha, targets=targets)
    return blank_model(config, method)
