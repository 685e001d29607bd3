"""Unit 17: mistakes that people make, and other right ways. The ReLoRA layer."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.checks.unit_17.relora_layers import (
    AKept,
    BKept,
    BothRandomAtTheStart,
    BothZeroAfterARestart,
    BothZeroAtTheStart,
    BRandom,
    Layer,
    MergedWithoutScaling,
    NotMerged,
    SmallNormal,
)


class Base(Layer):
    """A sound layer that has its scaling under the name that the given `forward` uses."""

    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, scaling)
        self.scaling = scaling


# --- Right -------------------------------------------------------------------------------------------


@right("ReLoRALayer")
class uniform_in_one_method(Base):
    pass


@right("ReLoRALayer")
class zero_A_and_random_B(BRandom, Base):
    pass


@right("ReLoRALayer")
class small_normal_numbers(SmallNormal, Base):
    pass


@right("ReLoRALayer")
class orthogonal_rows_and_data(nn.Module):
    def __init__(self, W, rank, scaling=1.0):
        super().__init__()
        out, inputs = W.shape
        self.scaling = scaling
        self.W = nn.Buffer(W.detach().clone())
        self.A = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, inputs)))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return x @ self.W.T + self.scaling * (x @ self.A.T @ self.B.T)

    def restart(self):
        self.W.data.addmm_(self.B.data, self.A.data, alpha=self.scaling)
        self.A.data = torch.randn_like(self.A)
        self.B.data = self.B.data * 0


@right("ReLoRALayer")
class one_outer_product_at_a_time(nn.Module):
    def __init__(self, W, rank, scaling=1.0):
        super().__init__()
        self.scaling, self.rank = scaling, rank
        self.register_buffer("W", torch.empty_like(W).copy_(W))
        for name, factor in zip("AB", self.drawn(), strict=True):
            self.register_parameter(name, nn.Parameter(factor))

    def drawn(self):
        out, inputs = self.W.shape
        return (torch.rand(self.rank, inputs) * 2 - 1) / math.sqrt(inputs), torch.zeros(out, self.rank)

    def forward(self, x):
        return x @ self.W.T + self.scaling * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def restart(self):
        for row, column in zip(self.A, self.B.T, strict=True):
            self.W.add_(torch.outer(column, row), alpha=self.scaling)
        for parameter, factor in zip((self.A, self.B), self.drawn(), strict=True):
            parameter.copy_(factor)


# --- Wrong -------------------------------------------------------------------------------------------


@wrong(
    "ReLoRALayer",
    "At the start A and B are both zero. The gradient of each contains the other one, so neither can ever leave zero "
    "before the first restart.",
)
class both_zero_at_the_start(BothZeroAtTheStart, Base):
    pass


@wrong(
    "ReLoRALayer",
    "At the start A and B are both random, so a new layer computes something else than W x: one has to be zero.",
)
class both_random(BothRandomAtTheStart, Base):
    pass


@wrong(
    "ReLoRALayer",
    "After a restart A and B are both zero: the first cycle learns, and all later ones do not.",
)
class both_zero_after_a_restart(BothZeroAfterARestart, Base):
    pass


@wrong(
    "ReLoRALayer",
    "A restart throws away what was learned: W is what it was. It has to take up s B A before A and B start again.",
)
class not_merged(NotMerged, Base):
    pass


@wrong("ReLoRALayer", "You merge B A without the scaling: the layer itself multiplies the product by s.")
class merged_without_the_scaling(MergedWithoutScaling, Base):
    pass


@wrong(
    "ReLoRALayer",
    "B keeps its values at a restart, so the layer computes an update by a new A on top of what was merged.",
)
class B_is_kept(BKept, Base):
    pass


@wrong(
    "ReLoRALayer",
    "A keeps its values at a restart. Then all cycles change W in the same r directions of the input, and the sum has "
    "rank r only.",
)
class A_is_kept(AKept, Base):
    pass


@wrong("ReLoRALayer", "Your layer merges the update and goes on with the same A and B, so the update counts twice.")
class nothing_starts_again(Base):
    def start_again(self) -> None:
        pass


@wrong(
    "ReLoRALayer",
    "At a restart A and B become new parameters. The optimiser still holds the old ones, and trains those.",
)
class new_parameters(Base):
    def start_again(self) -> None:
        bound = self.W.shape[1] ** -0.5
        self.A = nn.Parameter(torch.empty_like(self.A).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros_like(self.B))


@wrong("ReLoRALayer", "At a restart W becomes a new tensor. Change the values of the one that is there: `+=`.")
class a_new_W(Base):
    def merge(self) -> None:
        self.W = self.W + self.factor * (self.B @ self.A)


@wrong(
    "ReLoRALayer",
    "The merging is recorded for gradients, so W belongs to a graph afterwards. It needs `torch.no_grad()`.",
)
class recorded(Base):
    def restart(self) -> None:
        self.W += self.factor * (self.B @ self.A)
        self.start()


@wrong("ReLoRALayer", caught_by="changes its input")
class the_given_W_itself(Base):
    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, scaling)
        self.W = W


@wrong("ReLoRALayer", "W is a parameter, so an optimiser would train all of it. It should be a buffer.")
class W_is_trained(Base):
    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, scaling)
        del self.W
        self.W = nn.Parameter(W.clone())


@wrong(
    "ReLoRALayer",
    "W is a plain attribute, so it is not in the `state_dict`: whoever saves the layer loses what was merged.",
)
class W_is_not_saved(Base):
    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, scaling)
        del self.W
        self.W = W.clone()


@wrong("ReLoRALayer", "A and B are plain tensors or buffers, so nothing trains them. They should be parameters.")
class nothing_is_trained(Base):
    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, scaling)
        A, B = self.A.detach(), self.B.detach()
        del self.A, self.B
        self.register_buffer("A", A)
        self.register_buffer("B", B)


@wrong(
    "ReLoRALayer",
    "Every layer starts with the same random numbers: do not seed the generator in the constructor.",
)
class seeded(Base):
    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        torch.manual_seed(0)
        super().__init__(W, rank, scaling)


@wrong(
    "ReLoRALayer",
    "Every restart draws the same numbers as the one before, so all later cycles share r directions. Do not seed the "
    "generator there.",
)
class seeded_at_each_restart(Base):
    def start_again(self) -> None:
        torch.manual_seed(0)
        self.start()


@wrong(
    "ReLoRALayer",
    "Your layer draws from a generator of its own, so `torch.manual_seed` does not determine its numbers.",
)
class a_generator_of_its_own(Base):
    @torch.no_grad()
    def start(self) -> None:
        generator = torch.Generator()
        generator.seed()
        self.A.normal_(std=0.1, generator=generator)
        self.B.zero_()


@wrong("ReLoRALayer", "The scaling is 1 in your layer, whatever is given.")
class scaling_is_forgotten(Base):
    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, 1.0)
