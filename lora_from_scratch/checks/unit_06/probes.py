"""Unit 06, prefix tuning: what is looked at when an answer is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.prefix_tuning import PrefixEncoder

START, FORWARD = "the start", "what it computes"
TINY = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
WIDE = GPT2Config(vocab_size=11, n_positions=200, n_embd=32, n_layer=2, n_head=2)  # numbers enough to see their spread


def gradients(value: Any, inputs: list[Tensor]) -> list[Tensor | None]:
    """Of a sum of squares of the value; None where no gradient can flow."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None for _ in inputs]
    return list(torch.autograd.grad(value.square().sum() / 2, inputs, allow_unused=True))


def in_one(gained: list[Tensor | None], inputs: list[Tensor]) -> Tensor:
    """Gradients side by side, zero where there is none: one that nearly cancels is then compared with the others."""
    pairs = zip(gained, inputs, strict=True)
    return torch.cat([torch.zeros(x.numel()) if g is None else g.flatten() for g, x in pairs])


# --- Attention ---------------------------------------------------------------------------------------


def run_prefix_attention(answer: Callable[..., Any], **given: Tensor) -> Any:
    """The result, and the gradients of the keys and values in front, which are all that is learned."""
    learned = [given[name].requires_grad_() for name in ("prefix_k", "prefix_v")]
    y = answer(**given)
    return {"y": y, "gradients": in_one(gradients(y, learned), learned)}


def run_share(answer: Callable[..., Any], **given: Tensor) -> Any:
    return answer(**given)


def run_gated(answer: Callable[..., Any], **given: Tensor) -> Any:
    """The result, and the gradients of the prompt and of the gate."""
    learned = [given[name].requires_grad_() for name in ("prompt_k", "prompt_v", "gate")]
    y = answer(**given)
    return {"y": y, "gradients": in_one(gradients(y, learned), learned)}


# --- The encoder -------------------------------------------------------------------------------------


def run_encoder(answer: Callable[..., Any], what: str, length: int, hidden: int | None, seed: int, ids: Tensor) -> Any:
    """A new encoder of a seed; or what one with given numbers makes, and what a model makes of that."""
    if what == START:
        return seen_of_start(lambda s: answer(WIDE, length, hidden, torch.Generator().manual_seed(s)), seed)
    encoder = answer(TINY, length, hidden)
    fill(encoder, seed)
    made = encoder.prefix()
    names = sorted(name for name, _ in encoder.named_parameters())
    gained = gradients(made, [encoder.get_parameter(name) for name in names])
    model = GPT2(TINY).requires_grad_(False).eval()
    fill(model, seed + 1)
    encoder.put_into(model)
    with torch.no_grad():
        logits = model(ids)
    return {"prefix": made, "gradients": dict(zip(names, gained, strict=True)), "logits": logits}


def seen_of_start(make: Callable[[int], Any], seed: int) -> Any:
    """The start of one seed, of the same again, of another."""
    first, again, other = make(seed), make(seed), make(seed + 1)
    values, repeated, others = ([p.detach() for p in encoder.parameters()] for encoder in (first, again, other))
    return {
        "values": {name: p.detach() for name, p in first.named_parameters()},
        "trained": {name: p.requires_grad for name, p in first.named_parameters()},
        "the same again": all(map(torch.equal, values, repeated)),
        "another seed differs": not any(map(torch.equal, values, others)),
    }


def fill(module: torch.nn.Module, seed: int) -> None:
    """The same numbers under the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))


def same_encoder(case: Case, seen: Seen, expected: Seen) -> bool:
    """At the start the numbers may be others, their shapes and their distribution may not."""
    one, other = seen.value, expected.value
    if case.inputs["what"] == FORWARD:
        return same(one, other)
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    if any(one[key] != other[key] for key in other if key != "values"):
        return False
    values, wanted = one["values"], other["values"]
    assert isinstance(values, dict)
    assert isinstance(wanted, dict)
    return values.keys() == wanted.keys() and all(_same_spread(values[name], wanted[name]) for name in wanted)


def _same_spread(one: Any, other: Any) -> bool:
    """As far from zero in the mean and at the most, for some hundreds of numbers or more."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    few = 0.25 if other.numel() < 1000 else 0.08  # the bias of the narrow layer has 64 numbers
    normal = float(other.abs().max()) > 2.5 * float(other.std())  # the largest of many normal numbers varies
    most = 0.35 if normal else few
    return (
        abs(float(one.std() / other.std()) - 1) < few
        and abs(float(one.abs().max() / other.abs().max()) - 1) < most
        and abs(float(one.mean() - other.mean())) < 2 * few * float(other.std())
    )


# --- Folding -----------------------------------------------------------------------------------------


def run_fold(answer: Callable[..., Any], length: int, hidden: int | None, seed: int) -> Any:
    """The folded prefix, before and after the encoder goes on learning; and whether the encoder still can."""
    encoder = PrefixEncoder(TINY, length, hidden)
    fill(encoder, seed)
    folded = answer(encoder)
    if not isinstance(folded, Tensor):
        return folded
    first = folded.detach().clone()
    seen = {"folded": first, "in the graph": folded.requires_grad}
    with torch.no_grad():
        encoder.embedding.add_(1)
    seen["folded, when the encoder has moved on"] = folded.detach()
    made = encoder.prefix()
    names = sorted(name for name, _ in encoder.named_parameters())
    gained = gradients(made, [encoder.get_parameter(name) for name in names])
    return seen | {"the encoder's": made, "its gradients": dict(zip(names, gained, strict=True))}
