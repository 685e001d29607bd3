"""Unit 07, parallel adapters: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.adapters import AdapterAfter, ParallelAdapter

# --- ParallelAdapter ---------------------------------------------------------------------------------


def uniform(shape: torch.Size, bound: float, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


class Beside(ParallelAdapter):
    """Initialised by the function `start`."""

    def __init__(self, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None) -> None:
        nn.Module.__init__(self)
        self.scaling = scaling
        self.down, self.up = nn.Linear(n_embd, width, bias=False), nn.Linear(width, n_embd, bias=False)
        with torch.no_grad():
            self.start(n_embd, width, generator)

    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.copy_(uniform(self.down.weight.shape, n_embd**-0.5, generator))
        self.up.weight.zero_()


@right("ParallelAdapter")
class scaled_in_between(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return (self.scaling * F.linear(x, self.down.weight).clamp(min=0)) @ self.up.weight.T


@right("ParallelAdapter")
class kept_in_a_sequence(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(self.down, nn.ReLU(), self.up)(self.scaling * x)


@wrong(
    "ParallelAdapter",
    "You add x yourself. The block already has a skip connection, so x would be added twice.",
)
class adds_x(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaling * self.up(F.relu(self.down(x)))


@wrong("ParallelAdapter", "The scaling has no effect on your result.")
class without_the_scaling_beside(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))


@wrong("ParallelAdapter", "You use a gelu. The parallel adapter has a relu.")
class with_gelu(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.up(F.gelu(self.down(x), approximate="tanh"))


@wrong(
    "ParallelAdapter",
    "There is no nonlinearity between your two matrices: that is LoRA. (It has its own unit.)",
)
class straight_beside(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.up(self.down(x))


@wrong("ParallelAdapter", "Your relu comes last: then nothing negative could ever be added.")
class relu_last(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * F.relu(self.up(self.down(x)))


@wrong(
    "ParallelAdapter",
    "Both weights start at zero. The gradient of each contains the other as a factor, so this adapter never learns.",
)
class both_zero_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        uniform(self.down.weight.shape, 1.0, generator)
        self.down.weight.zero_()
        self.up.weight.zero_()


@wrong(
    "ParallelAdapter",
    "Your `down` starts at zero and `up` is random. Nothing is added at first, but the relu's gradient at zero is "
    "zero, so neither weight ever gets a gradient.",
)
class the_other_is_zero(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.zero_()
        self.up.weight.copy_(uniform(self.up.weight.shape, width**-0.5, generator))


@wrong("ParallelAdapter", "Both weights are random, so the adapted model does not start as the one that you loaded.")
class both_random_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.copy_(uniform(self.down.weight.shape, n_embd**-0.5, generator))
        self.up.weight.copy_(uniform(self.up.weight.shape, width**-0.5, generator))


@wrong(
    "ParallelAdapter",
    "The standard deviation of `down` is too large: `kaiming_uniform_` has a parameter a, whose default is a "
    "different value.",
)
class kaiming_by_default_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.copy_(uniform(self.down.weight.shape, (6 / n_embd) ** 0.5, generator))
        self.up.weight.zero_()


@wrong("ParallelAdapter", "Yours has biases. This kind of adapter has none.")
class with_biases(Beside):
    def __init__(self, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__(n_embd, width, scaling, generator)
        self.down.bias, self.up.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(n_embd))


@right("ParallelAdapter")
class with_einsum_and_where(Beside):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("...d,wd->...w", x, self.down.weight)
        h = torch.where(z > 0, z, torch.zeros_like(z))
        return torch.einsum("...w,dw->...d", h, self.scaling * self.up.weight)


@right("ParallelAdapter")
class initialised_by_pytorch(nn.Module):
    def __init__(self, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n_embd, width, bias=False), nn.Linear(width, n_embd, bias=False)
        nn.init.uniform_(self.down.weight, -1 / math.sqrt(n_embd), 1 / math.sqrt(n_embd), generator=generator)
        self.up.weight.data = torch.zeros(n_embd, width)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.up(nn.functional.relu(self.down(x))).mul(self.scaling)


@wrong(
    "ParallelAdapter",
    "You use the scaling as it was when the adapter was made. `forward` reads the attribute `scaling`, which may have "
    "been changed since.",
)
class scaling_of_the_first_day(Beside):
    def __init__(self, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__(n_embd, width, scaling, generator)
        self.s = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.s * self.up(F.relu(self.down(x)))


@wrong("ParallelAdapter", "You scale twice: your result contains the square of s.")
class scaled_twice(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.up(F.relu(self.down(self.scaling * x)))


@wrong("ParallelAdapter", "You divide by s. It multiplies.")
class divided_by_the_scaling(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x))) / self.scaling


@wrong("ParallelAdapter", "Your scaling is a parameter, so it is trained. It is a number that stays as it is.")
class trains_the_scaling(Beside):
    def __init__(self, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__(n_embd, width, scaling, generator)
        del self.scaling
        self.s = nn.Parameter(torch.tensor(float(scaling)))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * self.up(F.relu(self.down(x)))


@wrong("ParallelAdapter", "Your `down` is normal. It is uniform between two limits.")
class normal_down(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=generator) / (3 * n_embd) ** 0.5)
        self.up.weight.zero_()


@wrong(
    "ParallelAdapter",
    "The limits of your `down` come from the width of the bottleneck. d is the number of its inputs.",
)
class limits_of_the_bottleneck(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.copy_(uniform(self.down.weight.shape, width**-0.5, generator))
        self.up.weight.zero_()


@wrong("ParallelAdapter", "You draw `down` without the generator: the same seed gives different numbers each time.")
class forgets_the_generator_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        super().start(n_embd, width, None)


@wrong(
    "ParallelAdapter",
    "You go back to the generator's seed instead of drawing on: all adapters that are made with one generator start "
    "with the same numbers.",
)
class goes_back_to_the_seed_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        again = None if generator is None else torch.Generator().manual_seed(generator.initial_seed())
        super().start(n_embd, width, again)


@wrong(
    "ParallelAdapter",
    "Without a generator yours starts with the same numbers every time: None means PyTorch's own generator, whose seed "
    "the caller sets.",
)
class a_seed_of_its_own_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        super().start(n_embd, width, generator or torch.Generator().manual_seed(0))


# --- AdapterBeside -----------------------------------------------------------------------------------


@right("AdapterBeside")
class summed_in_a_list(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return sum([self.adapter(x), self.base(x, *others)])


@right("AdapterBeside")
class made_from_nothing(nn.Module):
    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, x: Tensor, *others: object, **named: object) -> Tensor:
        return torch.add(self.base(x, *others, **named), self.adapter(x))


@wrong(
    "AdapterBeside",
    "Your adapter reads the output of the base: it comes after the base instead of running in parallel.",
)
class behind_and_added(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        y = self.base(x, *others)
        return y + self.adapter(y)


@wrong("AdapterBeside", "That is `AdapterAfter`: the output of the base goes through the adapter. Nothing is added.")
class behind(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.adapter(self.base(x, *others))


@wrong(
    "AdapterBeside",
    "The mask is lost: you call the base with x only. There is no error, but padding is read as text.",
)
class forgets_the_others(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x) + self.adapter(x)


@wrong("AdapterBeside", "You pass on only the first of the other arguments.")
class hands_on_one(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others[:1]) + self.adapter(x)


@wrong("AdapterBeside", "You also add x. The block around it already does that.")
class adds_x_too(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return x + self.base(x, *others) + self.adapter(x)


@wrong("AdapterBeside", "You return only the adapter's output: the output of the pretrained module is missing.")
class the_adapter_alone(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.adapter(x)


@wrong(
    "AdapterBeside",
    "No gradient reaches the base. Whether or not it is frozen, gradients have to pass through it to what is below.",
)
class cuts_the_graph(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        with torch.no_grad():
            y = self.base(x, *others)
        return y + self.adapter(x)


@right("AdapterBeside")
class with_the_adapter_first(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        total = self.adapter(x)
        return total + self.base(*(x, *others))


@right("AdapterBeside")
class added_in_place(nn.Module):
    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        nn.Module.__init__(self)
        self.add_module("base", base)
        self.add_module("adapter", adapter)

    def forward(self, *inputs: object) -> Tensor:
        y = self.base(*inputs)
        y += self.adapter(inputs[0])
        return y


@wrong(
    "AdapterBeside",
    "You leave out arguments that are None. Those behind them then take their place: a cache becomes the mask.",
)
class leaves_out_none(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *(other for other in others if other is not None)) + self.adapter(x)


@wrong("AdapterBeside", "You pass everything on to the adapter, which takes x and nothing else.")
class everything_to_the_adapter(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others) + self.adapter(x, *others)


@wrong("AdapterBeside", "The adapter is missing from your result.")
class the_base_alone(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others)


@wrong("AdapterBeside", "You subtract the adapter's output. The two are added.")
class subtracted(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others) - self.adapter(x)


@wrong("AdapterBeside", "You multiply the two outputs. They are added.")
class multiplied(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others) * self.adapter(x)


@wrong(
    "AdapterBeside",
    "You wrap copies of the modules. An optimiser, for instance, would still have the parameters of the originals.",
)
class of_copies(AdapterAfter):
    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__(copy.deepcopy(base), copy.deepcopy(adapter))

    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others) + self.adapter(x)


@wrong("AdapterBeside", "No gradient reaches the adapter, which is what is to be trained.")
class cuts_the_adapter_off(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others) + self.adapter(x).detach()
