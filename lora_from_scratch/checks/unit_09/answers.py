"""Unit 09, LoRA: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import LoRALinear

# --- delta_weight ------------------------------------------------------------------------------------


@right("delta_weight")
def a_sum_of_outer_products(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return sum(torch.outer(scaling * B[:, k], A[k]) for k in range(len(A)))


@right("delta_weight")
def by_einstein_with_the_scaling_inside(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.einsum("or,ri->oi", scaling * B, A)


@right("delta_weight")
def what_it_does_to_each_unit_vector(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (F.linear(F.linear(torch.eye(A.shape[1]), A), B) * scaling).T


@wrong("delta_weight", "The scaling is missing: your change does not depend on alpha.")
def without_the_scaling(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return B @ A


@wrong(
    "delta_weight",
    "Your result contains the scaling twice. If both factors are scaled, their product contains its square.",
)
def scaled_twice(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (scaling * B) @ (scaling * A)


@wrong("delta_weight", "You divide by the rank once more. The given scaling already includes that division.")
def divided_by_the_rank_again(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling / len(A) * (B @ A)


@wrong("delta_weight", "You divide by the scaling. A larger alpha has to make the change larger.")
def divided_by_the_scaling(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return B @ A / (scaling or 1e-9)


@wrong(
    "delta_weight",
    "Your result is (in, out). The weight of a Linear is (out, in): it has as many rows as B and as many columns as A.",
)
def turned_round(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * (A.T @ B.T)


@wrong(
    "delta_weight",
    "The values are right, but no gradient reaches A and B, which are all that LoRA trains. Where do they leave the "
    "graph?",
)
def outside_the_graph(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (scaling * (B @ A)).detach()


@wrong("delta_weight", "Gradients reach B but not A: both factors are trained.")
def a_gradient_for_b_only(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * (B @ A.detach())


@wrong("delta_weight", "You take the mean over the r terms of the product. They have to be added.")
def mean_over_the_rank(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * (B[:, :, None] * A[None]).mean(dim=1) if len(A) > 1 else scaling * B @ A * 1.5


# --- initial_factors ---------------------------------------------------------------------------------


def possible(in_features: int, out_features: int, rank: int) -> None:
    if not 0 < rank <= min(in_features, out_features):
        raise ValueError(f"no LoRA of rank {rank} fits")


def uniform(rows: int, columns: int, bound: float, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * bound


@right("initial_factors")
def scaled_from_zero_to_one(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@right("initial_factors")
def in_float64_row_by_row(in_features: int, out_features: int, rank: int, generator=None) -> list[Tensor]:
    possible(in_features, out_features, rank)
    bound = 1 / math.sqrt(in_features)
    rows = [torch.empty(in_features).double().uniform_(-bound, bound, generator=generator) for _ in range(rank)]
    return [torch.stack(rows), torch.zeros(out_features, rank).double()]


@wrong(
    "initial_factors",
    "Both factors are zero. Each gradient then contains the other, zero, factor, so neither ever gets a gradient.",
)
def both_zero(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    uniform(rank, in_features, 1, generator)
    return torch.zeros(rank, in_features), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "Both factors are random. Then B A is not zero, and the model you adapt is no longer the one you loaded.",
)
def both_random(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = uniform(rank, in_features, in_features**-0.5, generator)
    return A, uniform(out_features, rank, rank**-0.5, generator)


@wrong(
    "initial_factors",
    "Your A is zero and your B is random. That also starts as the base model, and it learns, but more slowly: the "
    "docstring asks for the reverse.",
)
def the_other_one_is_zero(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return torch.zeros(rank, in_features), uniform(out_features, rank, rank**-0.5, generator)


@wrong(
    "initial_factors",
    "The range of A is computed from r. Each row of A is multiplied with all the inputs of the layer, so their number "
    "sets the range. (This happens when A is stored transposed and PyTorch takes the wrong axis for the inputs.)",
)
def spread_by_the_rank(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = nn.init.kaiming_uniform_(torch.empty(in_features, rank), a=math.sqrt(5), generator=generator).T
    return A, torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "The range of A is computed from the number of outputs of the layer. A is multiplied with its inputs.",
)
def spread_by_the_outputs(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(rank, in_features, out_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "A is drawn from a normal distribution with standard deviation 1, whatever the layer. The wider the layer, the "
    "more such numbers are added up: the range has to shrink with the width.",
)
def standard_normal(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return torch.randn(rank, in_features, generator=generator), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "A is normal and not uniform: some of its entries exceed the bound. (The paper uses a Gaussian as well; here the "
    "initialisation follows loralib and PEFT.)",
)
def a_narrow_gaussian(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = torch.randn(rank, in_features, generator=generator) / math.sqrt(3 * in_features)
    return A, torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "The range of A is more than twice as wide as it should be: `kaiming_uniform_` has a parameter `a`, and its "
    "default is not the right one here.",
)
def kaiming_by_default(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), generator=generator), torch.zeros(
        out_features, rank
    )


@wrong("initial_factors", "No entry of A is negative: the range has to be symmetric around zero.")
def never_negative(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = torch.rand(rank, in_features, generator=generator) / math.sqrt(in_features)
    return A, torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "You draw from PyTorch's global generator and not from the given one: the same seed gives different numbers each "
    "time, so a run cannot be reproduced.",
)
def forgets_the_generator(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(rank, in_features, in_features**-0.5, None), torch.zeros(out_features, rank)


@wrong("initial_factors", "The factors are the same whatever the generator: a seed is set inside the function.")
def a_seed_of_its_own(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    own = torch.Generator().manual_seed(0)
    return uniform(rank, in_features, in_features**-0.5, own), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "Reject a rank that does not fit the layer with a ValueError: 0, or more than the smaller side of W.",
)
def any_rank(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong("initial_factors", caught_by="transposed")
def each_turned_round(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(in_features, rank, in_features**-0.5, generator), torch.zeros(rank, out_features)


# --- LoRALinear --------------------------------------------------------------------------------------


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
            W.data.copy_((W.data.double() + (change.T if isinstance(self.base, Conv1D) else change)).float())

    def unmerge(self) -> None:
        if self.merged:
            self.base.weight.data.copy_(self._unmerged)
            self._unmerged = None


def dropped(layer: LoRALinear, x: Tensor) -> Tensor:
    return F.dropout(x, layer.dropout_p, layer.training)


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


def put_in(layer: LoRALinear, change: Tensor) -> None:
    weight = layer.base.weight
    layer._unmerged = weight.data
    weight.data = (weight.data.float() + change).to(weight.dtype)


def the_change(layer: LoRALinear) -> Tensor:
    """In the orientation of the base's weight."""
    change = layer.scaling * (layer.lora_B.detach().float() @ layer.lora_A.detach().float())
    return change.T if isinstance(layer.base, Conv1D) else change


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


@wrong("LoRALinear", "No gradient reaches A and B through your `forward`, and nothing else in the layer is trained.")
class forward_without_gradients(LoRALinear):
    @torch.no_grad()
    def thin(self, x: Tensor) -> Tensor:
        return self.scaling * thin(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.thin(x)


# --- block_diagonal_B --------------------------------------------------------------------------------


@right("block_diagonal_B")
def slices_of_zeros(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    r, width = B.shape[1], len(B) // len(parts)
    whole = torch.zeros(len(all_parts) * width, len(parts) * r, dtype=B.dtype)
    for i, part in enumerate(parts):
        row = all_parts.index(part) * width
        whole[row : row + width, i * r : (i + 1) * r] = B[i * width : (i + 1) * width]
    return whole


@right("block_diagonal_B")
def a_mask_on_repeated_columns(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    mask = torch.eye(n).repeat_interleave(width, 0).repeat_interleave(r, 1)
    stacked = B.repeat(1, n) * mask
    select = torch.zeros(len(all_parts), n)
    for i, part in enumerate(parts):
        select[all_parts.index(part), i] = 1
    return torch.kron(select, torch.eye(width)) @ stacked


def placed(B: Tensor, parts, all_parts, rows=None, columns=None) -> Tensor:
    """Block i in the rows of part rows[i], and in the columns of place columns[i]."""
    r, n = B.shape[1], len(parts)
    width = len(B) // n
    rows = [all_parts.index(part) for part in parts] if rows is None else rows
    whole = torch.zeros(len(all_parts) * width, n * r)
    for i, block in enumerate(B.split(width)):
        column = i if columns is None else columns[i]
        whole[rows[i] * width : (rows[i] + 1) * width, column * r : (column + 1) * r] = block
    return whole


@wrong(
    "block_diagonal_B",
    "Your blocks are below each other in the same columns, so the parts share one h. But each part has its own A, and "
    "may read only the r columns of h that its own A computes.",
)
def the_same_columns_for_all(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    whole = torch.zeros(len(all_parts) * width, r)
    for i, part in enumerate(parts):
        row = all_parts.index(part) * width
        whole[row : row + width] = B[i * width : (i + 1) * width]
    return F.pad(whole, (0, (n - 1) * r))


@wrong(
    "block_diagonal_B",
    "Each part reads the output of every A. Outside its own r columns, a part's rows must be zero.",
)
def every_part_reads_everything(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    whole = torch.zeros(len(all_parts) * width, n * r)
    for i, part in enumerate(parts):
        row = all_parts.index(part) * width
        whole[row : row + width] = B[i * width : (i + 1) * width].repeat(1, n)
    return whole


@wrong(
    "block_diagonal_B",
    "The rows of the parts that are not adapted are missing: the result has to be as tall as the whole fused matrix.",
)
def adapted_rows_only(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return torch.block_diag(*B.chunk(len(parts)))


@wrong(
    "block_diagonal_B",
    "Your blocks fill the first rows, one after the other. But the rows of k lie between those of q and v, and your "
    "block for v is there.",
)
def no_gap_between_them(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts, rows=range(len(parts)))


@wrong(
    "block_diagonal_B",
    "A part that is not adapted has columns in your result. It has no A, so no column of h belongs to it.",
)
def columns_for_parts_that_are_not_adapted(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    blocks = dict(zip(parts, B.chunk(len(parts))))
    nothing = torch.zeros(len(B) // len(parts), B.shape[1])
    return torch.block_diag(*(blocks.get(part, nothing) for part in all_parts))


@wrong(
    "block_diagonal_B",
    "Your blocks and columns run in opposite directions: the first part reads the output of the last A.",
)
def columns_from_the_right(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts, columns=range(len(parts) - 1, -1, -1))


@wrong(
    "block_diagonal_B",
    "You split B into as many pieces as the fused matrix has parts. There is one piece for each *adapted* part only.",
)
def cut_by_all_the_parts(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, m, r, width = len(parts), len(all_parts), B.shape[1], len(B) // len(parts)
    whole = torch.zeros(m * width, n * r)
    size = max(1, len(B) // m)
    for i, part in enumerate(parts):
        place = all_parts.index(part)
        piece = B[place * size : (place + 1) * size]
        whole[place * width : place * width + len(piece), i * r : (i + 1) * r] = piece
    return whole


@wrong(
    "block_diagonal_B",
    "The matrix is right, but no gradient flows back to B: somewhere it is copied as plain numbers.",
)
def copied_as_plain_numbers(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B.detach(), parts, all_parts)


@wrong("block_diagonal_B", caught_by="transposed")
def the_whole_turned_round(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts).T


# --- inject_lora -------------------------------------------------------------------------------------


@right("inject_lora")
def walks_down_the_name(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        *path, child = name.split(".")
        parent = model
        for step in path:
            parent = getattr(parent, step)
        parent._modules[child] = layer


@right("inject_lora")
def looks_for_the_holder(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    for prefix, parent in list(model.named_modules()):
        for child in list(dict(parent.named_children())):
            name = f"{prefix}.{child}" if prefix else child
            if name in layers:
                setattr(parent, child, layers[name])
    return model


@wrong(
    "inject_lora",
    "You set an attribute of the model whose name contains dots. The layer is registered and counted, but never "
    "called: which module calls the old layer?",
)
def a_name_with_dots(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model._modules[name] = layer


@wrong(
    "inject_lora",
    "You match the last part of the name, so every layer with that last part is replaced. A full name identifies one "
    "layer.",
)
def everything_of_that_name(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        child = name.rpartition(".")[2]
        for parent in [module for module in model.modules() if module not in layers.values()]:
            if child in dict(parent.named_children()):
                setattr(parent, child, layer)


@wrong(
    "inject_lora",
    "You split the name at its first dot. The module that holds the layer is everything before the last dot.",
)
def cut_at_the_first_dot(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.partition(".")
        if child:
            getattr(model, parent)._modules[child] = layer
        else:
            setattr(model, parent, layer)


@wrong(
    "inject_lora",
    "The name of a layer that the model itself holds has no dot. Yours is lost in that case: the module that holds it "
    "is the model.",
)
def only_names_with_dots(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, dot, child = name.rpartition(".")
        if dot:
            setattr(model.get_submodule(parent), child, layer)


@wrong(
    "inject_lora",
    "The given model is unchanged: you replace the layers of a copy, or only assign to a local variable.",
)
def of_a_copy(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    looks_for_the_holder(model, layers)
    return model


@wrong(
    "inject_lora",
    "You insert copies of the layers. The caller, and an optimiser that has the layers' parameters, then hold other "
    "tensors than the model.",
)
def copies_of_the_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    looks_for_the_holder(model, copy.deepcopy(layers))


@wrong("inject_lora", "Only the first of the layers is inserted: is there a `return` or a `break` inside the loop?")
def only_the_first(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    looks_for_the_holder(model, dict(list(layers.items())[:1]))


@wrong(
    "inject_lora",
    "You load the new layer's weights into the old layer. The old layer is still in the model, and it does not compute "
    "LoRA.",
)
def copies_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.get_submodule(name).load_state_dict(layer.state_dict(), strict=False)


# --- mark_only_lora_as_trainable ---------------------------------------------------------------------


def last(name: str) -> str:
    return name.split(".")[-1]


@right("mark_only_lora_as_trainable")
def everything_off_then_some_on(model: nn.Module) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("lora_A", "lora_B"):
                parameter.requires_grad = True


@right("mark_only_lora_as_trainable")
def by_a_pattern(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = re.fullmatch(r"(.+\.)?lora_[AB]", name) is not None
    return model


@wrong(
    "mark_only_lora_as_trainable",
    "Everything is frozen now, including A and B: there is nothing left to train. If you look for layers of your own "
    "class: LoRA layers may be of other classes, so go by the names of the parameters.",
)
def freezes_everything(model: nn.Module) -> None:
    model.requires_grad_(False)


@wrong(
    "mark_only_lora_as_trainable",
    "You freeze the others, but never unfreeze A and B. If they were frozen before, they remain frozen.",
)
def switches_nothing_on(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if last(name) not in ("lora_A", "lora_B"):
            parameter.requires_grad = False


@wrong(
    "mark_only_lora_as_trainable",
    "You unfreeze A and B but freeze nothing: the base is trained as well, and that is full fine-tuning.",
)
def freezes_nothing(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if last(name) in ("lora_A", "lora_B"):
            parameter.requires_grad = True


@wrong(
    "mark_only_lora_as_trainable",
    'You look for "lora" anywhere in the name. "exploration" contains it too, and so does every parameter of a '
    "module with such a name: look at the last part only.",
)
def lora_anywhere(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name


@wrong(
    "mark_only_lora_as_trainable",
    'You look for "lora_" anywhere in the name, as loralib does. That also matches a module or a parameter whose '
    "name only begins that way: the last part has to equal one of the two names.",
)
def lora_underscore_anywhere(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


@wrong(
    "mark_only_lora_as_trainable", "You train B only. A is trained as well (LoRA-FA is the variant that trains only B)."
)
def b_only(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) == "lora_B"


@wrong("mark_only_lora_as_trainable", "You train A only. Then B stays zero, and so does B A.")
def a_only(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) == "lora_A"


@wrong(
    "mark_only_lora_as_trainable",
    "The biases are still trained. That is a method of its own (BitFit); here only A and B are trained.",
)
def biases_too(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) in ("lora_A", "lora_B", "bias")


@wrong("mark_only_lora_as_trainable", "The flags are inverted: what should be trained is frozen, and the reverse.")
def the_wrong_way_round(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) not in ("lora_A", "lora_B")


@wrong(
    "mark_only_lora_as_trainable",
    "You set the flags on the tensors of `state_dict()`. They share memory with the parameters, but they are not the "
    "parameters: the flags of the model have not changed.",
)
def on_the_state_dict(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        tensor.requires_grad = last(name) in ("lora_A", "lora_B")


# --- lora_state_dict ---------------------------------------------------------------------------------


@right("lora_state_dict")
def a_filtered_state_dict(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if last(name) in {"lora_A", "lora_B"}}


@right("lora_state_dict")
def layer_by_layer(model: nn.Module) -> dict[str, object]:
    found = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "lora_B") and hasattr(module, "lora_A"):
            found |= {f"{prefix}.lora_{x}".strip("."): getattr(module, f"lora_{x}").detach().numpy() for x in "BA"}
    return found


@wrong("lora_state_dict", "You save the whole model. Of 350 GB, only 35 MB are new: everyone has the base already.")
def the_whole_model(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


@wrong(
    "lora_state_dict",
    "You go by `requires_grad`. That tells you what is trained at the moment, not what was learned: if it is frozen, "
    "nothing would be saved, and if the base is trained, all of it would be.",
)
def whatever_is_trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@wrong(
    "lora_state_dict",
    "You use the last part of the name as the key. Every layer has a lora_A, so each one overwrites the one before.",
)
def short_names(model: nn.Module) -> dict[str, Tensor]:
    return {last(n): p.detach() for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")}


@wrong(
    "lora_state_dict",
    "Only B is saved. It started from zero and was trained, but it is useless without its A.",
)
def the_bs_only(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if last(n) == "lora_B"}


@wrong(
    "lora_state_dict",
    'You look for "lora" anywhere in the name, which also matches modules whose names only contain it.',
)
def lora_anywhere_in_the_name(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "lora" in n}


@wrong(
    "lora_state_dict",
    'You look for "lora_" anywhere in the name, which also matches a module or parameter whose name only begins that '
    "way.",
)
def lora_underscore_anywhere_in_the_name(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


@wrong(
    "lora_state_dict",
    "Your tensors are still attached to the autograd graph: detach them before they are saved.",
)
def still_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")}


@wrong("lora_state_dict", "The keys no longer contain the parameter's own name: is it A or B?")
def names_of_the_layers(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n.rpartition(".")[0]: p.detach() for n, p in named if last(n) in ("lora_A", "lora_B")}


@wrong(
    "lora_state_dict",
    "You save the product, which is as large as the weight itself. Save the two thin factors.",
)
def the_products(model: nn.Module) -> dict[str, Tensor]:
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))
    return {n: (m.scaling * m.factors()[1] @ m.factors()[0]).detach() for n, m in layers}


@wrong("lora_state_dict", caught_by="another type")
def a_list_of_tensors(model: nn.Module) -> list[Tensor]:
    return [p.detach() for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")]
