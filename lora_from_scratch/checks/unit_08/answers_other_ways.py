"""Unit 08: more right ways to solve its exercises, each by another decomposition."""

# They are written differently from the library on purpose.

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods.bitfit import QueryBias


@right("select_biases")
def what_is_left_after_deleting(model: nn.Module) -> dict:
    chosen = dict(model.named_parameters())
    for name in list(chosen):
        if not f".{name}".endswith(".bias"):
            del chosen[name]
    return chosen


@right("QueryBias")
class in_a_copy(QueryBias):
    """The three parts written into a new tensor; merging exchanges the memory of the two."""

    def bias(self) -> Tensor:
        whole = torch.zeros_like(self.base.bias)
        d = len(self.bias_q)
        whole[:d] = self.bias_q
        whole[d:] = self.base.bias[d:]
        return whole

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.base.weight) + self.bias()

    def merge(self) -> None:
        if self._unmerged is not None:
            return
        merged = self.bias().detach()
        self._unmerged = self.base.bias.data
        self.base.bias.data = merged

    def unmerge(self) -> None:
        before, self._unmerged = self._unmerged, None
        if before is not None:
            self.base.bias.data = before


@right("QueryBias")
class by_a_mask(QueryBias):
    def bias(self) -> Tensor:
        d = len(self.bias_q)
        learned = torch.arange(3 * d) < d
        return torch.where(learned, self.bias_q.repeat(3), self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(self.bias(), rows, self.base.weight).reshape(*x.shape[:-1], -1)


@right("stratify")
def by_borders(n_layer, frozen_layers, bias_layers) -> tuple:
    borders = [0, frozen_layers, frozen_layers + bias_layers, n_layer]
    if borders != sorted(borders) or borders[2] == n_layer:
        raise ValueError(f"no three groups of {n_layer} layers with the borders {borders}")
    return tuple([*range(start, end)] for start, end in itertools.pairwise(borders))


@right("stratify")
def taken_from_an_iterator(n_layer, frozen_layers, bias_layers) -> list:
    if frozen_layers < 0 or bias_layers < 0:
        raise ValueError("a number of layers is not negative")
    left = iter(range(n_layer))
    groups = [list(itertools.islice(left, count)) for count in (frozen_layers, bias_layers)] + [list(left)]
    if not groups[-1]:
        raise ValueError("no layer is left")
    return groups


@right("relative_gradient_norms")
def by_backward_on_stand_ins(model, batches) -> dict:
    """The forward pass on copies of the parameters, whose `.grad` is nobody else's."""
    sums, count = Counter(), 0
    copies = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    if not copies or any(not p.count_nonzero() for p in copies.values()):
        raise ValueError("nothing to measure, or a tensor of zeros")
    for ids, labels, mask in batches:
        for p in copies.values():
            p.grad = None
        logits = torch.func.functional_call(model, copies, (ids,), {"attention_mask": mask})
        next_token_loss(logits, labels).backward()
        for n, p in copies.items():
            sums[n] += 0.0 if p.grad is None else (p.grad.norm() / p.detach().norm()).item()
        count += 1
    if not count:
        raise ValueError("no batch")
    return {n: sums[n] / count for n in copies}


@right("relative_gradient_norms")
def one_parameter_at_a_time(model, batches) -> dict:
    rows = [*batches]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not rows or not trained:
        raise ValueError("no batch, or nothing to measure")
    found = {}
    for n, p in trained:
        size = math.sqrt(p.detach().double().square().sum())
        if size == 0.0:
            raise ValueError(f"{n} is all zeros")
        norms = []
        for ids, labels, mask in rows:
            loss = next_token_loss(model(ids, attention_mask=mask), labels)
            (g,) = torch.autograd.grad(loss, p, allow_unused=True)
            norms.append(0.0 if g is None else float(torch.linalg.vector_norm(g)))
        found[n] = np.mean(norms).item() / size
    return found


@right("auto_rgn_weights")
def in_numpy(norms) -> dict:
    values = np.array(list(norms.values()), dtype=float)
    if not values.size or not np.all(np.isfinite(values)) or values.min() < 0 or not values.any():
        raise ValueError("no such norms")
    return {name: float(share) for name, share in zip(norms, values / values.max(), strict=True)}


@right("auto_rgn_weights")
def in_a_loop(norms) -> dict:
    largest = 0.0
    for name, norm in norms.items():
        if math.isnan(norm) or math.isinf(norm) or norm < 0:
            raise ValueError(f"{name} has the norm {norm}")
        largest = norm if norm > largest else largest
    if not largest:
        raise ValueError("no norm is above zero")
    shares = {}
    for name in norms:
        shares[name] = norms[name] * (1 / largest)
    return shares


@right("surgical_parameter_groups")
def by_filling_in_a_table(model, weights, learning_rate, weight_decay=0.0) -> list:
    missing = [name for name in weights if name not in {n for n, _ in model.named_parameters()}]
    if missing:
        raise ValueError(f"no such parameters: {missing}")
    table = {name: {"name": name, "lr": w * learning_rate} for name, w in weights.items()}
    for name, p in model.named_parameters():
        if name in table:
            table[name] |= {"params": [p], "weight_decay": weight_decay if len(p.size()) >= 2 else 0}
    return [*table.values()]


@right("surgical_parameter_groups")
def from_the_groups_of_an_optimizer(model, weights, learning_rate, weight_decay=0.0) -> list:
    try:
        tensors = [(n, model.get_parameter(n)) for n in weights]
    except AttributeError as error:
        raise ValueError(str(error)) from None
    if not tensors:
        return []
    given = [{"params": [p], "name": n, "lr": weights[n] * learning_rate} for n, p in tensors]
    groups = torch.optim.SGD(given, weight_decay=weight_decay).param_groups
    for group in groups:
        if group["params"][0].ndim <= 1:
            group["weight_decay"] = 0.0
    return [{key: group[key] for key in ("name", "params", "lr", "weight_decay")} for group in groups]
