"""Unit 09, merging and unmerging the LoRA layer: mistakes that people make."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose.

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import wrong
from lora_from_scratch.checks.unit_09.answers_layer import the_change
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import LoRALinear

# --- LoRALinear -------------------------------------------------------------------------------------


def put_in(layer: LoRALinear, change: Tensor) -> None:
    weight = layer.base.weight
    layer._unmerged = weight.data
    weight.data = (weight.data.float() + change).to(weight.dtype)


@wrong(
    "LoRALinear",
    "`merge` computes alpha / r again. Read `self.scaling`: with `rslora=True` it is alpha / sqrt(r), and it can be "
    "changed after the layer is made.",
)
class merges_with_a_scaling_of_its_own(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            put_in(self, the_change(self) * (self.alpha / self.rank / self.scaling))


@wrong(
    "LoRALinear",
    "Your `merge` always adds a change of shape (out, in). A Conv1D stores its weight transposed: if it is square, "
    "there is no error, and the model is wrong.",
)
class forgets_conv1d(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            put_in(self, self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float()))


@wrong(
    "LoRALinear", "Your `merge` always transposes. A Linear stores its weight as (out, in), only a Conv1D as (in, out)."
)
class always_transposes(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            put_in(self, (self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())).T)


@wrong(
    "LoRALinear",
    "Your `merge` does not apply the scaling: the merged and the unmerged layer compute different outputs.",
)
class merges_without_scaling(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            put_in(self, the_change(self) / self.scaling)


@wrong(
    "LoRALinear",
    "Your `merge` multiplies B and A in the weight's dtype, which rounds the product. Turn both into float32 first, "
    "and round once, at the end.",
)
class multiplies_in_the_weights_dtype(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            change = self.scaling * (self.lora_B.detach() @ self.lora_A.detach()).float()
            put_in(self, change.T if isinstance(self.base, Conv1D) else change)


@wrong(
    "LoRALinear",
    "After `merge` the base's weight is in float32, whatever it was before. Round the sum to the weight's own dtype.",
)
class stays_in_float32(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            weight = self.base.weight
            self._unmerged = weight.data
            weight.data = weight.data.float() + the_change(self)


@wrong("LoRALinear", "Your `merge` subtracts the change from W0. It is added.")
class merges_the_opposite(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            put_in(self, -the_change(self))


@wrong("LoRALinear", "Your `merge` puts s B A into the base in place of W0. The weight should be their sum.")
class the_change_in_place_of_W0(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            weight = self.base.weight
            self._unmerged = weight.data
            weight.data = the_change(self).to(weight.dtype)


@wrong(
    "LoRALinear",
    "You keep W0 in an attribute of your own, which does not move with the module to another dtype or device. "
    "`self._unmerged` is registered as a buffer, and does.",
)
class keeps_W0_elsewhere(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            self.kept = [self.base.weight.data]
            put_in(self, the_change(self))
            self._unmerged = torch.zeros(())

    def unmerge(self) -> None:
        if self.merged:
            self.base.weight.data = self.kept.pop()
            self._unmerged = None


@wrong(
    "LoRALinear",
    "W0 is kept once and for all: when the base has changed between two mergings, `unmerge` brings back the first W0.",
)
class keeps_the_first_W0_for_ever(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            if not hasattr(self, "W0"):
                self.W0 = self.base.weight.data.clone()
            put_in(self, the_change(self))

    def unmerge(self) -> None:
        if self.merged:
            self.base.weight.data = self.W0.clone().to(self._unmerged.dtype)
            self._unmerged = None


@wrong(
    "LoRALinear",
    "The change is computed at the first `merge` and kept. When A and B have been trained further, the old one is "
    "added.",
)
class keeps_the_first_change_for_ever(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            if not hasattr(self, "first"):
                self.first = the_change(self)
            put_in(self, self.first)


@wrong(
    "LoRALinear",
    "Your `merge` rounds the change to the weight's dtype before adding it. Form the sum in float32 and round once, at "
    "the end.",
)
class rounds_the_change_first(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            weight = self.base.weight
            self._unmerged = weight.data
            weight.data = weight.data + the_change(self).to(weight.dtype)


@wrong("LoRALinear", "Merging twice adds the change twice. A layer that is already merged must be left unchanged.")
class merges_twice(LoRALinear):
    def merge(self) -> None:
        W0 = self._unmerged
        put_in(self, the_change(self))
        self._unmerged = self._unmerged if W0 is None else W0


@wrong(
    "LoRALinear",
    "Your `unmerge` subtracts what `merge` added. Rounding cannot be reversed: bits are lost in both directions. What "
    "would restore W0 exactly?",
)
class subtracts_to_unmerge(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            self._unmerged = torch.zeros(())
            weight = self.base.weight
            weight.data = (weight.data.float() + the_change(self)).to(weight.dtype)

    def unmerge(self) -> None:
        if self.merged:
            weight = self.base.weight
            weight.data = (weight.data.float() - the_change(self)).to(weight.dtype)
            self._unmerged = None


@wrong(
    "LoRALinear",
    "You save W0, but then add the change in place, to the very tensor that you saved, so there is no copy left. "
    "`unmerge` restores the merged weight.",
)
class keeps_no_copy(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            self._unmerged = self.base.weight.data
            self.base.weight.data += the_change(self).to(self.base.weight.dtype)


@wrong(
    "LoRALinear",
    "`merge` does not change the base's weight, or only marks the layer as merged: the model is then the base alone.",
)
class only_says_it_is_merged(LoRALinear):
    def merge(self) -> None:
        self._unmerged = self.base.weight.data


@wrong(
    "LoRALinear", "After `unmerge` the layer still counts as merged, so `forward` leaves the change out from then on."
)
class stays_merged(LoRALinear):
    def unmerge(self) -> None:
        if self.merged:
            self.base.weight.data = self._unmerged


@wrong(
    "LoRALinear",
    "You put a new parameter into the base. An optimiser, or anyone else who holds the old one, then holds a parameter "
    "that is no longer in the model: replace the values of the parameter, not the parameter.",
)
class another_parameter(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            weight = self.base.weight
            self._unmerged = weight.data
            self.base.weight = nn.Parameter((weight.data.float() + the_change(self)).to(weight.dtype))


@wrong(
    "LoRALinear",
    "Unmerging a layer that is not merged should do nothing; yours uses a saved weight that does not exist.",
)
class unmerges_without_asking(LoRALinear):
    def unmerge(self) -> None:
        self.base.weight.data = self._unmerged
        self._unmerged = None
