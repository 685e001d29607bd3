"""Unit 08, BitFit and selective tuning: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.bitfit import QueryBias

# --- select_biases -----------------------------------------------------------------------------------


@right("select_biases")
def module_by_module(model: nn.Module) -> dict:
    return {
        f"{prefix}.{name}".lstrip("."): p
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias"
    }


@right("select_biases")
def by_a_regular_expression(model: nn.Module) -> dict:
    chosen = {}
    for name, p in model.named_parameters():
        if re.search(r"(^|\.)bias$", name):
            chosen[name] = p
    return chosen


@right("select_biases")
def by_splitting_the_name(model: nn.Module) -> dict:
    return dict(pair for pair in model.named_parameters() if pair[0].split(".")[-1] == "bias")


@wrong(
    "select_biases",
    "You check whether `bias` occurs anywhere in the name. A module may be called `bias_of`, and its weights are not "
    "biases.",
)
def anywhere_in_the_name(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if "bias" in name}


@wrong(
    "select_biases",
    "You check whether the name ends in `bias`. A parameter called `debias` is not a bias.",
)
def ends_with_the_letters(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if name.endswith("bias")}


@wrong(
    "select_biases",
    "A bias of the model itself is missing: its full name has no dot.",
)
def only_behind_a_dot(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if name.endswith(".bias")}


@wrong(
    "select_biases",
    "You select every parameter with one axis. The scales of a LayerNorm have one axis too, but they are not biases.",
)
def every_vector(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if p.ndim == 1}


@wrong(
    "select_biases",
    "The biases of the LayerNorms are missing. They are biases like any other.",
)
def without_the_norms(model: nn.Module) -> dict:
    return {
        f"{prefix}.{name}".lstrip("."): p
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.LayerNorm)
        for name, p in module.named_parameters(recurse=False)
        if name == "bias"
    }


@wrong(
    "select_biases",
    "Your result contains copies. Training a copy does not change the model.",
)
def copies(model: nn.Module) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}


@wrong(
    "select_biases",
    "You select only the biases that are trained at the moment. A frozen bias is a bias too: the caller is about to "
    "unfreeze it.",
)
def only_what_is_trained(model: nn.Module) -> dict:
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias" and p.requires_grad}


@wrong(
    "select_biases",
    "You freeze and unfreeze parameters along the way. This function only selects; the caller decides what is trained.",
)
def freezes_the_rest(model: nn.Module) -> dict:
    for name, p in model.named_parameters():
        p.requires_grad_(name.rpartition(".")[2] == "bias")
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}


@wrong(
    "select_biases", "Your names are truncated: the same short name stands for many biases, and all but one are lost."
)
def short_names(model: nn.Module) -> dict:
    return {".".join(n.split(".")[-2:]): p for n, p in model.named_parameters() if n.split(".")[-1] == "bias"}


# --- QueryBias ---------------------------------------------------------------------------------------


@right("QueryBias")
class as_a_sum(QueryBias):
    """The base's own output, and what the queries' bias has changed by."""

    def bias(self) -> Tensor:
        change = self.bias_q - self.base.bias[: len(self.bias_q)]
        return self.base.bias + F.pad(change, (0, 2 * len(change)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight + self.bias()

    def merge(self) -> None:
        if self._unmerged is None:
            self._unmerged = self.base.bias.detach().clone()
            self.base.bias.data.copy_(self.bias().detach())

    def unmerge(self) -> None:
        if self._unmerged is not None:
            self.base.bias.data.copy_(self._unmerged)
            self._unmerged = None


@right("QueryBias")
class part_by_part(QueryBias):
    def bias(self) -> Tensor:
        _, k, v = self.base.bias.chunk(3)
        return torch.cat((self.bias_q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.base(x).tensor_split([len(self.bias_q)], dim=-1)
        return torch.cat([q - self.base.bias[: len(self.bias_q)] + self.bias_q, kv], dim=-1)


@wrong("QueryBias", "You put the learned part where the values' bias belongs. What is learned is the queries' bias.")
class at_the_end(QueryBias):
    def bias(self) -> Tensor:
        return torch.cat([self.base.bias[: -len(self.bias_q)], self.bias_q])


@wrong("QueryBias", "You put the learned part where the keys' bias belongs. What is learned is the queries' bias.")
class in_the_middle(QueryBias):
    def bias(self) -> Tensor:
        q, _, v = self.base.bias.chunk(3)
        return torch.cat([q, self.bias_q, v])


@wrong(
    "QueryBias",
    "In your bias the parts of k and v are zeros. They must stay as they are in the base.",
)
class zeros_for_keys_and_values(QueryBias):
    def bias(self) -> Tensor:
        return F.pad(self.bias_q, (0, 2 * len(self.bias_q)))


@wrong(
    "QueryBias",
    "You add the learned part to the bias that is already there. `bias_q` starts as a copy of it, so the old bias "
    "counts twice.",
)
class added_on_top(QueryBias):
    def bias(self) -> Tensor:
        return self.base.bias + F.pad(self.bias_q, (0, 2 * len(self.bias_q)))


@wrong(
    "QueryBias",
    "`forward` adds the bias twice: once in the base, and once more afterwards.",
)
class the_bias_twice(QueryBias):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.bias()


@wrong(
    "QueryBias",
    "No gradient reaches `bias_q`, the only parameter that this layer trains. Where does it leave the graph?",
)
class outside_the_graph(QueryBias):
    def bias(self) -> Tensor:
        return torch.cat([self.bias_q.detach(), self.base.bias[len(self.bias_q) :]])


@wrong(
    "QueryBias",
    "`forward` writes the learned part into the base's own bias. The base must not change until `merge` is called.",
)
class writes_into_the_base(QueryBias):
    def forward(self, x: Tensor) -> Tensor:
        self.base.bias.data[: len(self.bias_q)] = self.bias_q.detach()
        return F.linear(x, self.base.weight.T, self.bias())


@wrong(
    "QueryBias",
    "A second `merge` saves the merged values as if they were the original ones, which are then lost. If the layer is "
    "already merged, `merge` has nothing to do.",
)
class merges_twice(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        self._unmerged, self.base.bias.data = self.base.bias.data, self.bias()


@wrong(
    "QueryBias",
    "`merge` saves a reference to the same memory that it then writes into, so the saved values change too. Save a "
    "copy, or assign a new tensor.",
)
class keeps_no_copy(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        if self._unmerged is None:
            self._unmerged = self.base.bias.data
            self.base.bias.data[: len(self.bias_q)] = self.bias_q


@wrong(
    "QueryBias",
    "`merge` puts a new parameter into the base. It must remain the same parameter object, because others may hold a "
    "reference to it.",
)
class a_new_parameter(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        if self._unmerged is None:
            self._unmerged = self.base.bias.data
            self.base.bias = nn.Parameter(self.bias(), requires_grad=False)


@wrong(
    "QueryBias",
    "`unmerge` restores the base's bias, but the layer still counts as merged: `_unmerged` must be None when it is "
    "not.",
)
class still_says_merged(QueryBias):
    @torch.no_grad()
    def unmerge(self) -> None:
        if self._unmerged is not None:
            self.base.bias.data = self._unmerged


@wrong("QueryBias", "`merge` saves the old bias but changes nothing: the base alone still computes what it did before.")
class merges_nothing(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        if self._unmerged is None:
            self._unmerged = self.base.bias.data.clone()


# --- stratify ----------------------------------------------------------------------------------------


def allowed(n_layer, frozen_layers, bias_layers) -> None:
    if min(frozen_layers, bias_layers) < 0 or frozen_layers + bias_layers >= n_layer:
        raise ValueError("these groups do not fit")


@right("stratify")
def three_lists(n_layer, frozen_layers, bias_layers) -> list:
    allowed(n_layer, frozen_layers, bias_layers)
    layers = list(range(n_layer))
    end = frozen_layers + bias_layers
    return [layers[:frozen_layers], layers[frozen_layers:end], layers[end:]]


@right("stratify")
def dealt_out_one_by_one(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    groups = [], [], []
    for layer in range(n_layer):
        place = 0 if layer < frozen_layers else 1 if layer - frozen_layers < bias_layers else 2
        groups[place].append(layer)
    return groups


@wrong(
    "stratify",
    "You count from the output: your last layers are frozen. The layers near the input are the ones that serve every "
    "task, and stay frozen.",
)
def from_the_output(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = n_layer - frozen_layers
    return range(end, n_layer), range(end - bias_layers, end), range(end - bias_layers)


@wrong(
    "stratify",
    "Your second group ends at layer number `bias_layers`. That is the number of layers in the group, not the index of "
    "its end.",
)
def a_number_taken_for_a_place(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    return range(frozen_layers), range(frozen_layers, bias_layers), range(bias_layers, n_layer)


@wrong("stratify", "You number the layers from 1. The blocks of the model are `h[0]`, `h[1]`, ...")
def counted_from_one(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = frozen_layers + bias_layers
    return range(1, frozen_layers + 1), range(frozen_layers + 1, end + 1), range(end + 1, n_layer + 1)


@wrong("stratify", "Your groups overlap: each layer belongs to exactly one of them.")
def overlapping(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = frozen_layers + bias_layers
    return range(frozen_layers + 1), range(frozen_layers, end + 1), range(end, n_layer)


@wrong("stratify", "You return how many layers each group has. Return which layers they are.")
def sizes_only(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    return frozen_layers, bias_layers, n_layer - frozen_layers - bias_layers


@wrong("stratify", "The last layer is missing from the third group: a range excludes its end.")
def without_the_last_layer(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = frozen_layers + bias_layers
    return range(frozen_layers), range(frozen_layers, end), range(end, n_layer - 1)


@wrong("stratify", "The first two groups are swapped: the frozen layers come first.")
def the_first_two_swapped(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = frozen_layers + bias_layers
    return range(bias_layers), range(bias_layers, end), range(end, n_layer)


@wrong(
    "stratify",
    "You accept a plan that leaves no layer for the third group, and negative numbers. Both must raise a ValueError.",
)
def anything_goes(n_layer, frozen_layers, bias_layers) -> tuple:
    end = frozen_layers + bias_layers
    return range(frozen_layers), range(frozen_layers, end), range(end, n_layer)


@wrong(
    "stratify",
    "You accept a plan that leaves no layer at all for the third group. At least one has to be left.",
)
def an_empty_third_group(n_layer, frozen_layers, bias_layers) -> tuple:
    if min(frozen_layers, bias_layers) < 0 or frozen_layers + bias_layers > n_layer:
        raise ValueError("these groups do not fit")
    end = frozen_layers + bias_layers
    return range(frozen_layers), range(frozen_layers, end), range(end, n_layer)
