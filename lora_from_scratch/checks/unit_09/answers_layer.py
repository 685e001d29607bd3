"""Unit 09, the LoRA layer: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import LoRALinear

# --- LoRALinear -----------------------------------------------------------------------------------


@right("LoRALinear")
class by_matrix_products(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        x_for_A = F.dropout(x, self.dropout_p, self.training)
        return self.base(x) + x_for_A @ self.lora_A.T @ self.lora_B.T * self.scaling


@right("LoRALinear")
class one_dense_weight_at_a_time(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        change = 0 if self.merged else self.scaling * self.lora_B @ self.lora_A
        return self.base(x) + F.linear(dropped(self, x), change) if not self.merged else self.base(x)

    def merge(self) -> None:
        if not self.merged:
            W = self.base.weight
            change = (self.scaling * self.lora_B.double() @ self.lora_A.double()).detach()
            self._unmerged = W.data.clone()
            W.data.copy_(W.data.double() + (change.T if isinstance(self.base, Conv1D) else change))

    def unmerge(self) -> None:
        if self.merged:
            self.base.weight.data.copy_(self._unmerged)
            self._unmerged = None


@right("LoRALinear")
class with_einsum_and_entry_by_entry(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self._unmerged is None:
            kept = nn.functional.dropout(x, p=self.dropout_p, training=self.training)
            y = y + torch.einsum("...i,ri,or->...o", kept, self.lora_A, self.lora_B) * self.scaling
        return y

    def merge(self) -> None:
        if self._unmerged is None:
            W = self.base.weight
            self._unmerged = W.detach().clone()
            for o, row in enumerate(self.lora_B.detach().float()):
                change = sum(self.scaling * b * a for b, a in zip(row, self.lora_A.detach().float()))
                place = W.data[:, o] if isinstance(self.base, Conv1D) else W.data[o]
                place.copy_(place.float() + change)

    def unmerge(self) -> None:
        if self._unmerged is not None:
            self.base.weight.data, self._unmerged = self._unmerged, None


@right("LoRALinear")
class numpy_for_merging(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        rows = dropped(self, x).reshape(-1, x.shape[-1])
        h = torch.stack([torch.mv(self.lora_A, row) for row in rows])
        change = torch.stack([torch.mv(self.lora_B, one) for one in h]).mul(self.scaling)
        return change.reshape(*x.shape[:-1], -1) + self.base(x)

    def merge(self) -> None:
        if self.merged:
            return
        B, A = (p.detach().double().numpy() for p in (self.lora_B, self.lora_A))
        change = np.tensordot(B, A, axes=1) * self.scaling
        if isinstance(self.base, Conv1D):
            change = np.swapaxes(change, 0, 1)
        weight = self.base.weight
        self._unmerged = weight.data
        weight.data = torch.from_numpy(weight.detach().double().numpy() + change).to(weight.dtype)

    def unmerge(self) -> None:
        if self.merged:
            W0, self._unmerged = self._unmerged, None
            with torch.no_grad():
                self.base.weight.copy_(W0)


def dropped(layer: LoRALinear, x: Tensor) -> Tensor:
    return F.dropout(x, layer.dropout_p, layer.training)


def the_change(layer: LoRALinear) -> Tensor:
    """In the orientation of the base's weight."""
    change = layer.scaling * (layer.lora_B.detach().float() @ layer.lora_A.detach().float())
    return change.T if isinstance(layer.base, Conv1D) else change


def thin(layer: LoRALinear, x: Tensor) -> Tensor:
    """B A x, without the scaling."""
    return F.linear(F.linear(dropped(layer, x), layer.lora_A), layer.lora_B)


@wrong(
    "LoRALinear", "The scaling is missing from `forward`: alpha has no effect there, although it has one in `merge`."
)
class forward_without_scaling(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + thin(self, x)


@wrong(
    "LoRALinear",
    "`forward` divides by the rank once more: `self.scaling` is already alpha / r.",
)
class divides_by_the_rank_again(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.scaling / self.rank * thin(self, x)


@wrong("LoRALinear", "`forward` multiplies by alpha instead of alpha / r, which the layer stores as `scaling`.")
class multiplies_by_alpha(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.alpha * thin(self, x)


@wrong(
    "LoRALinear",
    "`forward` computes alpha / r again. Read `self.scaling`: with `rslora=True` it is alpha / sqrt(r), and it can be "
    "changed after the layer is made.",
)
class computes_the_scaling_again(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.alpha / self.rank * thin(self, x)


@wrong(
    "LoRALinear",
    "`forward` adds the change to the base's weight and leaves it there. Only `merge` changes the base.",
)
class forward_changes_the_base(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        self.base.weight.data += the_change(self)
        return y + self.scaling * thin(self, x)


@wrong("LoRALinear", "While the layer is merged, no gradient reaches x. It should be the one of base(x).")
class merged_without_gradients(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).detach() if self.merged else self.base(x) + self.scaling * thin(self, x)


@wrong("LoRALinear", "`forward` returns the base's output alone, whether the layer is merged or not.")
class always_the_base_alone(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


@wrong("LoRALinear", "`forward` returns the change alone. It has to be added to the base's output.")
class the_change_alone(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.scaling * thin(self, x)


@wrong(
    "LoRALinear",
    "`forward` scales the base's output as well: check the parentheses. Only the change is scaled.",
)
class scales_everything(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.scaling * (self.base(x) + thin(self, x))


@wrong(
    "LoRALinear",
    "After `merge` the change is applied twice: the weight already contains it, and `forward` adds it again.",
)
class adds_it_again_when_merged(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * thin(self, x)


@wrong(
    "LoRALinear",
    "Your dropout also affects the base's input. The pretrained layer always sees the whole x; only the input of A is "
    "dropped.",
)
class drops_the_input_of_the_base(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        x = dropped(self, x)
        return (
            self.base(x)
            if self.merged
            else self.base(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        )


@wrong(
    "LoRALinear",
    "Your dropout comes after A or B. It belongs on the input of A, where each element of x is dropped independently.",
)
class drops_what_comes_out(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        h = F.dropout(F.linear(x, self.lora_A), self.dropout_p, self.training)
        return self.base(x) + self.scaling * F.linear(h, self.lora_B)


@wrong("LoRALinear", "`forward` does not apply dropout: `self.dropout_p` has no effect.")
class without_dropout(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        return self.base(x) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


@wrong(
    "LoRALinear",
    "Your dropout is always active. In evaluation (`model.eval()`), a model has to give the same output every time.",
)
class drops_in_evaluation_too(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        h = F.linear(F.dropout(x, self.dropout_p, True), self.lora_A)
        return self.base(x) + self.scaling * F.linear(h, self.lora_B)


@wrong(
    "LoRALinear",
    "You use one dropout mask for the whole batch: every row loses the same inputs. Each element is dropped "
    "independently. (One LoRA library does drop whole columns of A.)",
)
class one_mask_for_all(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        mask = F.dropout(torch.ones(x.shape[-1]), self.dropout_p, self.training)
        return self.base(x) + self.scaling * F.linear(F.linear(x * mask, self.lora_A), self.lora_B)


@wrong("LoRALinear", "No gradient reaches A and B through your `forward`, and nothing else in the layer is trained.")
class forward_without_gradients(LoRALinear):
    @torch.no_grad()
    def thin(self, x: Tensor) -> Tensor:
        return self.scaling * thin(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.thin(x)


@wrong(
    "LoRALinear",
    "You keep W0 in float32. After `unmerge`, a weight that was in half precision is then in float32.",
)
class keeps_float32(LoRALinear):
    def merge(self) -> None:
        if not self.merged:
            super().merge()
            self._unmerged = self._unmerged.float()
