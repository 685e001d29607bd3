"""Unit 07, adapters: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.adapters import (
    AdapterAfter,
    AdapterBeside,
    BottleneckAdapter,
    ParallelAdapter,
    adapter_places,
    new_adapter,
    replace_module,
)

# --- adapter_parameter_count -------------------------------------------------------------------------


@right("adapter_parameter_count")
def counted_on_tensors(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    with torch.device("meta"):
        one = [nn.Linear(n_embd, width, bias=bias), nn.Linear(width, n_embd, bias=bias)]
        norm = nn.LayerNorm(n_embd)
    each = sum(p.numel() for layer in one for p in layer.parameters())
    return adapters * each + norms * sum(p.numel() for p in norm.parameters())


@right("adapter_parameter_count")
def one_addition_at_a_time(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    total = 0
    for _ in range(adapters):
        total += n_embd * width + width * n_embd
        if bias:
            total += width
            total += n_embd
    for _ in range(norms):
        total += n_embd + n_embd
    return total


@wrong(
    "adapter_parameter_count",
    "You count only one of the two matrices: there is a down projection and an up projection.",
)
def one_matrix(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (n_embd * width + (width + n_embd if bias else 0)) + 2 * norms * n_embd


@wrong("adapter_parameter_count", "You leave out the biases. They count, unless `bias` is False.")
def no_biases(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * 2 * n_embd * width + 2 * norms * n_embd


@wrong(
    "adapter_parameter_count",
    "Both of your biases are as long as the bottleneck is wide. The second one is added to the output, which has d "
    "numbers.",
)
def both_biases_narrow(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (2 * width if bias else 0)) + 2 * norms * n_embd


@wrong("adapter_parameter_count", "You count the biases even where the adapters have none.")
def biases_always(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + width + n_embd) + 2 * norms * n_embd


@wrong("adapter_parameter_count", "A LayerNorm has a gain *and* a shift for each number that it normalises.")
def half_a_norm(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (width + n_embd if bias else 0)) + norms * n_embd


@wrong(
    "adapter_parameter_count",
    "You multiply the LayerNorms by the adapters. `norms` is already their number in the whole model.",
)
def norms_for_each_adapter(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (width + n_embd if bias else 0) + 2 * norms * n_embd)


@wrong("adapter_parameter_count", "You leave out the LayerNorms. If there are any, they are trained as well.")
def without_norms(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (width + n_embd if bias else 0))


@wrong("adapter_parameter_count", "You count one adapter, however many there are in the model.")
def a_single_one(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return 2 * n_embd * width + (width + n_embd if bias else 0) + 2 * norms * n_embd


# --- BottleneckAdapter -------------------------------------------------------------------------------

STD = 1e-3


def cut_off_normal(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """A truncated normal, between -2 and 2 standard deviations, drawn by inverting the distribution function."""
    low = 0.5 * (1 + math.erf(-math.sqrt(2)))
    u = low + (1 - 2 * low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return (STD * torch.special.ndtri(u)).float()


@right("BottleneckAdapter")
class drawn_by_the_inverse(nn.Module):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(n_embd, width)
        self.up = nn.Linear(width, n_embd)
        for layer in (self.down, self.up):
            layer.weight.data = cut_off_normal(layer.weight.shape, generator)
            layer.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(nn.GELU("tanh")(self.down(x))) + x


@right("BottleneckAdapter")
class written_out(nn.Module):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, n_embd), nn.Linear(n_embd, width)
        with torch.no_grad():
            for layer in (self.up, self.down):
                draw = torch.randn(layer.weight.shape, generator=generator)
                while (far := draw.abs() > 2).any():
                    draw[far] = torch.randn(int(far.sum()), generator=generator)
                layer.weight.copy_(STD * draw)
                layer.bias.copy_(torch.zeros_like(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.down.weight.T + self.down.bias
        h = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return x + (h @ self.up.weight.T + self.up.bias)


@wrong(
    "BottleneckAdapter",
    "The input is lost: you return only the output of the bottleneck. At initialisation that is almost zero, so the "
    "rest of the model gets almost no input.",
)
class nothing_added(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x), approximate="tanh"))


@wrong(
    "BottleneckAdapter",
    "There is no nonlinearity between your two matrices. Two linear maps in a row are a single one: it could be "
    "merged into a weight, and could learn no more than a matrix of low rank.",
)
class straight(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


@wrong("BottleneckAdapter", "You use a relu. Houlsby's adapters have a gelu here.")
class with_relu(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


@wrong(
    "BottleneckAdapter",
    "Your gelu is the exact one, which is PyTorch's default. GPT-2 uses the tanh approximation: the two differ in the "
    "fourth digit.",
)
class exact_gelu(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


@wrong("BottleneckAdapter", "Your gelu comes too late: after the up projection instead of before it.")
class bends_behind(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.up(self.down(x)), approximate="tanh")


@wrong(
    "BottleneckAdapter",
    "You apply the gelu to the sum, so x goes through it as well. x has to be passed on unchanged, or the adapter "
    "does not start close to the identity.",
)
class bends_the_sum(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.up(self.down(x)), approximate="tanh")


class Starts(BottleneckAdapter):
    """Initialised weight by weight by the function `start`."""

    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        nn.Module.__init__(self)
        self.down, self.up = nn.Linear(n_embd, width), nn.Linear(width, n_embd)
        with torch.no_grad():
            for name, layer in (("down", self.down), ("up", self.up)):
                layer.weight.copy_(self.start(name, layer.weight.shape, generator))
                self.start_bias(layer.bias, generator)

    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return cut_off_normal(shape, generator)

    def start_bias(self, bias: Tensor, generator: torch.Generator | None) -> None:
        bias.zero_()


@wrong(
    "BottleneckAdapter",
    "Both of your weights start at zero. Then neither of them ever gets a gradient, because each is multiplied by the "
    "other: only the last bias does.",
)
class all_zero(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape) + 0 * torch.rand((), generator=generator)


@wrong(
    "BottleneckAdapter",
    "One of your weights starts at zero. That is exactly the identity, and it does learn; but here both start as "
    "small random numbers.",
)
class one_zero(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape) if name == "up" else cut_off_normal(shape, generator)


@wrong(
    "BottleneckAdapter",
    "Your numbers are not truncated: some lie beyond two standard deviations. (Also check what the bounds of "
    "`trunc_normal_` mean: they are not given in standard deviations.)",
)
class not_cut_off(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return STD * torch.randn(shape, generator=generator)


@wrong(
    "BottleneckAdapter",
    "Your numbers have a standard deviation of 1e-2. That is ten times as far from the identity as it should be.",
)
class ten_times_as_far(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return 10 * cut_off_normal(shape, generator)


@wrong(
    "BottleneckAdapter",
    "Your biases keep the values that PyTorch has drawn. They change every token, so the adapter does not start close "
    "to the identity.",
)
class biases_as_drawn(Starts):
    def start_bias(self, bias: Tensor, generator: torch.Generator | None) -> None:
        bound = bias.numel() ** -0.5
        bias.copy_((2 * torch.rand(bias.shape, generator=generator) - 1) * bound)


@wrong(
    "BottleneckAdapter",
    "You draw from PyTorch's global generator instead of the one that is passed in: the same seed gives different "
    "numbers each time, so runs cannot be reproduced.",
)
class forgets_the_generator_of_a_bottleneck(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return cut_off_normal(shape, None)


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


# --- insert_adapters ---------------------------------------------------------------------------------


def checked(model: nn.Module, width: int, variant: str, layers: tuple) -> list[str]:
    names = adapter_places(model.config.n_layer, variant, layers)
    if width < 1 or width > model.config.n_embd:
        raise ValueError("no such width")
    return names


def made(model: nn.Module, variant: str, width: int, scaling: float, generator) -> nn.Module:
    adapter = new_adapter(variant, model.config.n_embd, width, scaling, generator)
    return adapter.to(model.transformer.wte.weight.dtype)


def wrapped(variant: str, base: nn.Module, adapter: nn.Module) -> nn.Module:
    return {"parallel": AdapterBeside}.get(variant, AdapterAfter)(base, adapter)


@right("insert_adapters")
def through_the_blocks(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    found = {}
    for number, block in enumerate(model.transformer.h):
        for part in ("attn", "mlp"):
            name = f"transformer.h.{number}.{part}"
            if name in places:
                found[name] = made(model, variant, width, scaling, generator)
                setattr(block, part, wrapped(variant, getattr(block, part), found[name]))
    return found


@right("insert_adapters")
def all_made_first(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    found = {name: made(model, variant, width, scaling, generator) for name in places}
    for name, adapter in found.items():
        replace_module(model, name, wrapped(variant, model.get_submodule(name), adapter))
    return found


@wrong("insert_adapters", "You create the adapters, but do not insert them: the model is unchanged.")
def never_put_in(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return {name: made(model, variant, width, scaling, generator) for name in checked(model, width, variant, layers)}


@wrong(
    "insert_adapters",
    "You use the same adapter in every place: it is created once, before the loop. Each place needs its own.",
)
def one_for_all(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    adapter = made(model, variant, width, scaling, generator)
    for name in places:
        replace_module(model, name, wrapped(variant, model.get_submodule(name), adapter))
    return dict.fromkeys(places, adapter)


@wrong("insert_adapters", "A parallel adapter runs in parallel with its module, but you put it after the module.")
def always_behind(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, AdapterAfter(model.get_submodule(name), found[name]))
    return found


@wrong(
    "insert_adapters", "The adapter replaces the pretrained module, which is lost. The two have to be wrapped together."
)
def in_place_of_the_base(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, Alone(found[name]))
    return found


class Alone(nn.Module):
    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.adapter(x)


@wrong("insert_adapters", "You insert adapters into every block, whatever `layers` says.")
def in_all_layers(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    checked(model, width, variant, layers)
    return all_made_first(model, width, variant, scaling=scaling, generator=generator)


@wrong("insert_adapters", "You do not pass the scaling on to the adapters.")
def loses_the_scaling(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return all_made_first(model, width, variant, layers=layers, generator=generator)


@wrong(
    "insert_adapters",
    "You freeze the model. That is not this function's job: what is trained has to stay as it was.",
)
def freezes(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    checked(model, width, variant, layers)
    model.requires_grad_(False)
    return all_made_first(model, width, variant, scaling=scaling, layers=layers, generator=generator)


@wrong("insert_adapters", "You return the wrappers. Return the adapters, which hold what is trained.")
def returns_the_wrappers(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = all_made_first(model, width, variant, scaling=scaling, layers=layers, generator=generator)
    return {name: model.get_submodule(name) for name in found}


@wrong("insert_adapters", "You do not pass the generator on: the same seed gives different adapters each time.")
def draws_from_elsewhere(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return all_made_first(model, width, variant, scaling=scaling, layers=layers)


@wrong(
    "insert_adapters",
    "Your adapters are float32, whatever the model's dtype. They need the dtype of their inputs.",
)
def always_float32(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = new_adapter(variant, model.config.n_embd, width, scaling, generator)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@wrong("insert_adapters", "An invalid width has to raise a ValueError: here it is larger than the width of the model.")
def any_width(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in adapter_places(model.config.n_layer, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


# --- remove_adapters ---------------------------------------------------------------------------------


@right("remove_adapters")
def one_at_a_time_until_none_is_left(model: nn.Module) -> None:
    while True:
        found = [name for name, module in model.named_modules() if isinstance(module, AdapterAfter)]
        if not found:
            return
        replace_module(model, found[0], model.get_submodule(found[0]).base)


@right("remove_adapters")
def by_walking_down(model: nn.Module) -> None:
    for name, child in list(model.named_children()):
        while isinstance(child, AdapterAfter):
            child = child.base
        setattr(model, name, child)
        by_walking_down(child)


def wrappers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdapterAfter)]


@wrong(
    "remove_adapters",
    "You disable the adapters but leave them in place. The model computes the same as before, but more slowly, and "
    "its parameters have different names.",
)
def silences(model: nn.Module) -> None:
    for _, wrapper in wrappers(model):
        for parameter in wrapper.adapter.parameters():
            parameter.data.zero_()


@wrong(
    "remove_adapters",
    "You put back copies. An optimiser, for instance, would still hold the old parameters: put back the same objects.",
)
def puts_back_copies(model: nn.Module) -> None:
    for name, wrapper in reversed(wrappers(model)):
        replace_module(model, name, copy.deepcopy(wrapper.base))


@wrong("remove_adapters", "You remove only the first one.")
def the_first_alone(model: nn.Module) -> None:
    for name, wrapper in wrappers(model)[:1]:
        replace_module(model, name, wrapper.base)


@wrong(
    "remove_adapters",
    "You leave the parallel ones: the type of an `AdapterBeside` is not `AdapterAfter`, but it is an instance of it.",
)
def of_the_very_type(model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):
        if type(module) is AdapterAfter:
            replace_module(model, name, module.base)


@wrong("remove_adapters", "You keep the adapter. Keep the base instead.")
def keeps_the_wrong_one(model: nn.Module) -> None:
    for name, wrapper in reversed(wrappers(model)):
        replace_module(model, name, Alone(wrapper.adapter))


@wrong(
    "remove_adapters",
    "If one adapter is inside another, you remove the outer one first, and then the name of the inner one no longer "
    "exists.",
)
def the_outer_ones_first(model: nn.Module) -> None:
    for name, wrapper in wrappers(model):
        replace_module(model, name, wrapper.base)


@wrong(
    "remove_adapters",
    "After one pass there are adapters left: a wrapper can contain another wrapper, and a wrapped block can contain "
    "some.",
)
def one_layer_of_them(model: nn.Module) -> None:
    gone: list[str] = []
    for name, wrapper in wrappers(model):
        if not any(name.startswith(f"{outer}.") for outer in gone):
            replace_module(model, name, wrapper.base)
            gone.append(name)


@wrong("remove_adapters", "You look only at the MLPs. Some variants also have adapters in other places.")
def of_the_mlps_alone(model: nn.Module) -> None:
    for block in model.transformer.h:
        while isinstance(getattr(block, "mlp", None), AdapterAfter):
            block.mlp = block.mlp.base
