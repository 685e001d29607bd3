"""Unit 06, prefix tuning: what the checks observe of an answer."""

from __future__ import annotations

import math
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
TINY = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=3, n_head=2)
WIDE = GPT2Config(
    vocab_size=11, n_positions=200, n_embd=32, n_layer=2, n_head=2
)  # large enough to estimate their spread
DISTINCT = 0.98  # of many random numbers in float32, a few may be equal by chance


def gradients(value: Any, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of half the sum of squares of the value; None where no gradient can flow."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None for _ in inputs]
    return list(torch.autograd.grad(value.square().sum() / 2, inputs, allow_unused=True))


def in_one(gained: list[Tensor | None], inputs: list[Tensor]) -> Tensor:
    """All gradients in one vector, zero where there is none, so that nearly cancelling ones are compared in context."""
    pairs = zip(gained, inputs, strict=True)
    return torch.cat([x.new_zeros(x.numel()) if g is None else g.flatten() for g, x in pairs])


# --- Attention ---------------------------------------------------------------------------------------


def run_attention(answer: Callable[..., Any], strided: bool = False, **given: Tensor) -> Any:
    """The result, and the gradients of what is trained: the prefix or the prompt, and the gate.

    Args:
        strided: give q, k and v as they come from splitting the heads, which is not contiguous.
    """
    learned = [tensor.requires_grad_() for name, tensor in given.items() if name not in ("q", "k", "v")]
    if strided:
        given |= {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    y = answer(**given)
    return {"y": y, "gradients": in_one(gradients(y, learned), learned)}


def run_share(answer: Callable[..., Any], **given: Tensor) -> Any:
    return {"share": answer(**given)}


def run_split(answer: Callable[..., Any], prefix: Tensor, n_layer: int, n_head: int, seed: int) -> Any:
    """The pairs, and the gradient of a random weighted sum of all their numbers."""
    prefix.requires_grad_()
    pairs = answer(prefix, n_layer, n_head)
    gradient = None
    if isinstance(pairs, list | tuple):
        tensors = [t for pair in pairs if isinstance(pair, list | tuple) for t in pair if isinstance(t, Tensor)]
        generator = torch.Generator().manual_seed(seed)
        total = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors)
        if isinstance(total, Tensor) and total.requires_grad:
            gradient = torch.autograd.grad(total, prefix, allow_unused=True)[0]
    return {"pairs": pairs, "gradient": gradient}


# --- The encoder -------------------------------------------------------------------------------------


def run_encoder(
    answer: Callable[..., Any], what: str, length: int, hidden: int | None, seed: int, ids: Tensor, own: bool = False
) -> Any:
    """A new encoder for a seed; or the prefix of an encoder with given numbers, and the logits of a model with it.

    Args:
        own: the seed is that of PyTorch's own generator.
    """
    if what == START:
        return seen_of_start(lambda generator: answer(WIDE, length, hidden, generator), seed, own)
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
        now = made.clone() if isinstance(made, Tensor) else made
        fill(encoder, seed + 2)  # as after some training
        later = encoder.prefix().clone()
    return {
        "parameters": names,
        "modules": [type(module).__name__ for module in encoder.transform.modules()],
        "prefix": now,
        "gradients": dict(zip(names, gained, strict=True)),
        "logits": logits,
        "later": later,
    }


def seen_of_start(make: Callable[[Any], Any], seed: int, own: bool) -> Any:
    """The initialisation for one seed, for the same seed again, for another one, and the next one of a generator."""

    def at(s: int) -> Any:
        if own:
            torch.manual_seed(s)
        return None if own else torch.Generator().manual_seed(s)

    first, again, other = make(at(seed)), make(at(seed)), make(at(seed + 1))
    generator = at(seed)
    make(generator)
    following = make(generator)
    values, repeated, others, next_ones = (
        [p.detach() for p in encoder.parameters()] for encoder in (first, again, other, following)
    )
    return {
        "parameters": {name: p.requires_grad for name, p in first.named_parameters()},
        "distinct": all(len(p.unique()) > DISTINCT * p.numel() for p in values),
        "repeated": all(map(torch.equal, values, repeated)),
        "other seed": not any(map(torch.equal, values, others)),
        "following": not any(map(torch.equal, values, next_ones)),
        "values": {name: p.detach() for name, p in first.named_parameters()},
    }


def fill(module: torch.nn.Module, seed: int) -> None:
    """The same numbers under the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))


def same_encoder(case: Case, seen: Seen, expected: Seen) -> bool:
    """At initialisation the numbers may differ, but not their shapes or their distribution."""
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
    """Whether spread, largest number and mean agree, within five standard errors of the difference of two samples."""
    if one.shape != other.shape:
        return False
    one, other, n = one.double(), other.double(), other.numel()
    normal = float(other.abs().max()) > 2.5 * float(other.std())  # else uniform, whose kurtosis is 1.8 and not 3
    spread = (5.0 if normal else 3.2) / math.sqrt(n)
    largest = math.log(1.75) if normal else 18 / n  # the largest of many normal numbers varies; of uniform ones, hardly
    return (
        abs(float(one.std() / other.std()) - 1) < spread
        and abs(math.log(max(float(one.abs().max() / other.abs().max()), 1e-9))) < largest
        and abs(float(one.mean() - other.mean())) < 5 * math.sqrt(2 / n) * float(other.std())
    )


# --- Folding -----------------------------------------------------------------------------------------


def run_fold(answer: Callable[..., Any], length: int, hidden: int | None, seed: int, double: bool = False) -> Any:
    """The folded prefix, before and after further training of the encoder, and what has become of the encoder."""
    encoder = PrefixEncoder(TINY, length, hidden)
    fill(encoder, seed)
    if double:
        encoder.double()
    encoder.prefix().sum().backward()  # as in the middle of a training run
    gained = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    folded = answer(encoder)
    if not isinstance(folded, Tensor):
        return {"folded": folded}
    seen = {"folded": folded.detach().clone(), "graph": folded.requires_grad}
    after = dict(encoder.named_parameters())
    seen["encoder"] = {name: p.detach() for name, p in after.items()}
    seen["trained"] = [p.requires_grad for p in after.values()]
    seen["gradients"] = [p.grad is not None and torch.equal(p.grad, gained.get(n, p)) for n, p in after.items()]
    seen["training"] = encoder.training
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    seen["later"] = folded.detach()
    return seen
