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
    "You ask whether the letters `bias` are anywhere in the name. A module may be called `bias_of`, and its weights "
    "are no biases.",
)
def anywhere_in_the_name(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if "bias" in name}


@wrong(
    "select_biases",
    "You ask whether the name ends in `bias`. A parameter called `debias` is none.",
)
def ends_with_the_letters(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if name.endswith("bias")}


@wrong(
    "select_biases",
    "A bias of the model itself is missing: its full name has no dot in it.",
)
def only_behind_a_dot(model: nn.Module) -> dict:
    return {name: p for name, p in model.named_parameters() if name.endswith(".bias")}


@wrong(
    "select_biases",
    "You take whatever has one axis. The scales of a LayerNorm have one as well, and are no biases.",
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
    "In your result are copies. Whoever trains them trains something that the model does not know of.",
)
def copies(model: nn.Module) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}


@wrong(
    "select_biases",
    "You find the biases that are trained at the moment. A frozen bias is one as well: whoever calls this is about to "
    "open it.",
)
def only_what_is_trained(model: nn.Module) -> dict:
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias" and p.requires_grad}


@wrong(
    "select_biases",
    "You freeze and open parameters on the way. Here they are only chosen; what is trained is decided by the caller.",
)
def freezes_the_rest(model: nn.Module) -> dict:
    for name, p in model.named_parameters():
        p.requires_grad_(name.rpartition(".")[2] == "bias")
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}


@wrong("select_biases", "Your names are cut: the same short name stands for many biases, and all but one are lost.")
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


@wrong("QueryBias", "You put the learned part in the place of the values. What is learned is the bias of the queries.")
class at_the_end(QueryBias):
    def bias(self) -> Tensor:
        return torch.cat([self.base.bias[: -len(self.bias_q)], self.bias_q])


@wrong("QueryBias", "You put the learned part in the place of the keys. What is learned is the bias of the queries.")
class in_the_middle(QueryBias):
    def bias(self) -> Tensor:
        q, _, v = self.base.bias.chunk(3)
        return torch.cat([q, self.bias_q, v])


@wrong(
    "QueryBias",
    "The parts of k and v are zeros in your bias. They stay what they were in the base.",
)
class zeros_for_keys_and_values(QueryBias):
    def bias(self) -> Tensor:
        return F.pad(self.bias_q, (0, 2 * len(self.bias_q)))


@wrong(
    "QueryBias",
    "You add what is learned to the bias that was there. `bias_q` begins as a copy of it: then the old bias counts "
    "twice.",
)
class added_on_top(QueryBias):
    def bias(self) -> Tensor:
        return self.base.bias + F.pad(self.bias_q, (0, 2 * len(self.bias_q)))


@wrong(
    "QueryBias",
    "The bias is added twice in `forward`: once by the base, and once more by you.",
)
class the_bias_twice(QueryBias):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.bias()


@wrong(
    "QueryBias",
    "No gradient reaches `bias_q`, and it is all that this layer learns. Where does it leave the graph?",
)
class outside_the_graph(QueryBias):
    def bias(self) -> Tensor:
        return torch.cat([self.bias_q.detach(), self.base.bias[len(self.bias_q) :]])


@wrong(
    "QueryBias",
    "`forward` writes the learned part into the base's own bias. The base has to stay as it is until somebody merges.",
)
class writes_into_the_base(QueryBias):
    def forward(self, x: Tensor) -> Tensor:
        self.base.bias.data[: len(self.bias_q)] = self.bias_q.detach()
        return F.linear(x, self.base.weight.T, self.bias())


@wrong(
    "QueryBias",
    "After a second `merge` the numbers that you have kept are the merged ones: the old ones are gone for good. A "
    "layer that is merged already has nothing to do.",
)
class merges_twice(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        self._unmerged, self.base.bias.data = self.base.bias.data, self.bias()


@wrong(
    "QueryBias",
    "What you keep in `merge` is the same memory that you then write into: it changes along. Keep a copy, or put in "
    "another tensor.",
)
class keeps_no_copy(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        if self._unmerged is None:
            self._unmerged = self.base.bias.data
            self.base.bias.data[: len(self.bias_q)] = self.bias_q


@wrong(
    "QueryBias",
    "`merge` puts a new parameter into the base. It has to stay the same one: others may hold it.",
)
class a_new_parameter(QueryBias):
    @torch.no_grad()
    def merge(self) -> None:
        if self._unmerged is None:
            self._unmerged = self.base.bias.data
            self.base.bias = nn.Parameter(self.bias(), requires_grad=False)


@wrong(
    "QueryBias",
    "`unmerge` gives the base its bias back but still says that it is merged: `_unmerged` is None when it is not.",
)
class still_says_merged(QueryBias):
    @torch.no_grad()
    def unmerge(self) -> None:
        if self._unmerged is not None:
            self.base.bias.data = self._unmerged


@wrong("QueryBias", "`merge` keeps the old bias and changes nothing: the base alone still computes what it did before.")
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
    "You count from the output: in yours the last layers are frozen. What is near the input serves every "
    "task, and stays.",
)
def from_the_output(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = n_layer - frozen_layers
    return range(end, n_layer), range(end - bias_layers, end), range(end - bias_layers)


@wrong(
    "stratify",
    "Your second group ends at layer number `bias_layers`. That is how many layers it has, not where it ends.",
)
def a_number_taken_for_a_place(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    return range(frozen_layers), range(frozen_layers, bias_layers), range(bias_layers, n_layer)


@wrong("stratify", "Your layers are counted from 1. The blocks of the model are `h[0]`, `h[1]`, ...")
def counted_from_one(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = frozen_layers + bias_layers
    return range(1, frozen_layers + 1), range(frozen_layers + 1, end + 1), range(end + 1, n_layer + 1)


@wrong("stratify", "Your groups overlap: a layer belongs to one of them only.")
def overlapping(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    end = frozen_layers + bias_layers
    return range(frozen_layers + 1), range(frozen_layers, end + 1), range(end, n_layer)


@wrong("stratify", "You return how many layers each group has. Which layers are they?")
def sizes_only(n_layer, frozen_layers, bias_layers) -> tuple:
    allowed(n_layer, frozen_layers, bias_layers)
    return frozen_layers, bias_layers, n_layer - frozen_layers - bias_layers


@wrong("stratify", "The last layer is missing from the third group: the end of a range is not in it.")
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
    "A plan that leaves no layer for the third group is accepted, and so is a negative number. Both have to be "
    "refused.",
)
def anything_goes(n_layer, frozen_layers, bias_layers) -> tuple:
    end = frozen_layers + bias_layers
    return range(frozen_layers), range(frozen_layers, end), range(end, n_layer)


@wrong(
    "stratify",
    "A plan that leaves exactly no layer for the third group is accepted. At least one has to be left.",
)
def an_empty_third_group(n_layer, frozen_layers, bias_layers) -> tuple:
    if min(frozen_layers, bias_layers) < 0 or frozen_layers + bias_layers > n_layer:
        raise ValueError("these groups do not fit")
    end = frozen_layers + bias_layers
    return range(frozen_layers), range(frozen_layers, end), range(end, n_layer)
