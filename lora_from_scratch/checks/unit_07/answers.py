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


@wrong("adapter_parameter_count", "You count one of the two matrices. It goes down, and it has to come up again.")
def one_matrix(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (n_embd * width + (width + n_embd if bias else 0)) + 2 * norms * n_embd


@wrong("adapter_parameter_count", "You leave the biases out. They count, unless there are none.")
def no_biases(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * 2 * n_embd * width + 2 * norms * n_embd


@wrong(
    "adapter_parameter_count",
    "Both of your biases are as long as the bottleneck is wide. The second one is added to what comes out.",
)
def both_biases_narrow(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (2 * width if bias else 0)) + 2 * norms * n_embd


@wrong("adapter_parameter_count", "You count the biases even where the adapters have none.")
def biases_always(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + width + n_embd) + 2 * norms * n_embd


@wrong("adapter_parameter_count", "A LayerNorm learns a gain *and* a shift for each number that it normalises.")
def half_a_norm(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (width + n_embd if bias else 0)) + norms * n_embd


@wrong(
    "adapter_parameter_count",
    "You multiply the LayerNorms by the adapters. `norms` is their number in the whole model already.",
)
def norms_for_each_adapter(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (width + n_embd if bias else 0) + 2 * norms * n_embd)


@wrong("adapter_parameter_count", "You leave the LayerNorms out. Where there are any, they are learned as well.")
def without_norms(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return adapters * (2 * n_embd * width + (width + n_embd if bias else 0))


@wrong("adapter_parameter_count", "You count one adapter, however many there are in the model.")
def a_single_one(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    return 2 * n_embd * width + (width + n_embd if bias else 0) + 2 * norms * n_embd


# --- BottleneckAdapter -------------------------------------------------------------------------------

STD = 1e-3


def cut_off_normal(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """By the inverse of the distribution function, between -2 and 2 standard deviations."""
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
    "What came in is lost: only the way through the bottleneck comes out. At the start that is next to nothing, and "
    "the model behind the adapter reads next to nothing.",
)
class nothing_added(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x), approximate="tanh"))


@wrong(
    "BottleneckAdapter",
    "Nothing bends between your two matrices. Two linear maps behind each other are one: then it could be merged into "
    "a weight, and it could learn no more than a matrix of low rank.",
)
class straight(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


@wrong("BottleneckAdapter", "Yours bends with a relu. Houlsby's adapters have a gelu here.")
class with_relu(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


@wrong(
    "BottleneckAdapter",
    "Your gelu is the exact one, which PyTorch takes unless told otherwise. GPT-2's is the tanh approximation: the two "
    "differ in the fourth digit.",
)
class exact_gelu(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


@wrong("BottleneckAdapter", "It bends too late: behind the way up, where the numbers are as many as before.")
class bends_behind(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.up(self.down(x)), approximate="tanh")


@wrong(
    "BottleneckAdapter",
    "x is bent as well: gelu goes around the sum. What came in has to come out as it was, or the start is far from the "
    "identity.",
)
class bends_the_sum(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.up(self.down(x)), approximate="tanh")


class Starts(BottleneckAdapter):
    """Starts as `start` says, weight by weight."""

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
    "Both of your weights are zero at the start. Then each of the two waits for the other: only the last bias ever "
    "gets a gradient.",
)
class all_zero(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape) + 0 * torch.rand((), generator=generator)


@wrong(
    "BottleneckAdapter",
    "One of your weights is zero at the start. That is exactly the identity, and it learns; but here both start as "
    "small random numbers.",
)
class one_zero(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape) if name == "up" else cut_off_normal(shape, generator)


@wrong(
    "BottleneckAdapter",
    "Your numbers are not cut off: some lie beyond two standard deviations. (Also have a look at what the bounds of "
    "`trunc_normal_` mean: they are not counted in standard deviations.)",
)
class not_cut_off(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return STD * torch.randn(shape, generator=generator)


@wrong("BottleneckAdapter", "Your numbers are of the size 1e-2. That is ten times as far from the identity as asked.")
class ten_times_as_far(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return 10 * cut_off_normal(shape, generator)


@wrong(
    "BottleneckAdapter",
    "Your biases start as PyTorch has drawn them. They move every token, so that the start is not near the identity.",
)
class biases_as_drawn(Starts):
    def start_bias(self, bias: Tensor, generator: torch.Generator | None) -> None:
        bound = bias.numel() ** -0.5
        bias.copy_((2 * torch.rand(bias.shape, generator=generator) - 1) * bound)


@wrong(
    "BottleneckAdapter",
    "You draw from PyTorch's own generator and not from the one that is given: the same seed gives another start each "
    "time, and nobody can repeat a run.",
)
class forgets_the_generator_of_a_bottleneck(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return cut_off_normal(shape, None)


# --- ParallelAdapter ---------------------------------------------------------------------------------


def uniform(shape: torch.Size, bound: float, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


class Beside(ParallelAdapter):
    """Starts as `start` says."""

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
    "You add x yourself. What this is added to has its own way past: then x would count twice.",
)
class adds_x(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaling * self.up(F.relu(self.down(x)))


@wrong("ParallelAdapter", "The scaling has no effect on what comes out.")
class without_the_scaling_beside(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))


@wrong("ParallelAdapter", "Yours bends with a gelu. The parallel adapter has a relu.")
class with_gelu(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.up(F.gelu(self.down(x), approximate="tanh"))


@wrong(
    "ParallelAdapter",
    "Nothing bends between your two matrices: that is LoRA. (It has its own unit.)",
)
class straight_beside(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.up(self.down(x))


@wrong("ParallelAdapter", "The relu comes last in yours: then nothing that is negative could ever be added.")
class relu_last(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * F.relu(self.up(self.down(x)))


@wrong(
    "ParallelAdapter",
    "Both weights are zero at the start. The gradient of each has the other one in it: this adapter never learns.",
)
class both_zero_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        uniform(self.down.weight.shape, 1.0, generator)
        self.down.weight.zero_()
        self.up.weight.zero_()


@wrong(
    "ParallelAdapter",
    "In yours `down` is zero and `up` random. Nothing is added at the start, but relu's gradient at zero is zero, so "
    "neither of the two ever gets one.",
)
class the_other_is_zero(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.zero_()
        self.up.weight.copy_(uniform(self.up.weight.shape, width**-0.5, generator))


@wrong("ParallelAdapter", "Both weights are random: the adapted model is not the one that you loaded.")
class both_random_beside(Beside):
    def start(self, n_embd: int, width: int, generator: torch.Generator | None) -> None:
        self.down.weight.copy_(uniform(self.down.weight.shape, n_embd**-0.5, generator))
        self.up.weight.copy_(uniform(self.up.weight.shape, width**-0.5, generator))


@wrong(
    "ParallelAdapter",
    "`down` spreads too widely: `kaiming_uniform_` has a parameter a, and its default is another one.",
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


@wrong("AdapterBeside", "Your adapter reads what the base made: it stands behind the base and not beside it.")
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
    "The mask gets lost: the base is called with x alone. Nothing complains, and padding is read as text.",
)
class forgets_the_others(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x) + self.adapter(x)


@wrong("AdapterBeside", "You hand on the first of the other arguments only.")
class hands_on_one(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.base(x, *others[:1]) + self.adapter(x)


@wrong("AdapterBeside", "You add x as well. The block around it does that already.")
class adds_x_too(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return x + self.base(x, *others) + self.adapter(x)


@wrong("AdapterBeside", "Only the adapter comes out: the pretrained module has to have its say.")
class the_adapter_alone(AdapterAfter):
    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.adapter(x)


@wrong(
    "AdapterBeside",
    "No gradient reaches the base. It may be frozen or not, but blocks below it learn through it as well.",
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


@wrong("insert_adapters", "You make the adapters, but the model does not know of them: nothing was put into its place.")
def never_put_in(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return {name: made(model, variant, width, scaling, generator) for name in checked(model, width, variant, layers)}


@wrong(
    "insert_adapters",
    "The same adapter stands in every place: made once, before the loop. Each place needs its own.",
)
def one_for_all(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    adapter = made(model, variant, width, scaling, generator)
    for name in places:
        replace_module(model, name, wrapped(variant, model.get_submodule(name), adapter))
    return dict.fromkeys(places, adapter)


@wrong("insert_adapters", "A parallel adapter stands beside its module, and you put it behind.")
def always_behind(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, AdapterAfter(model.get_submodule(name), found[name]))
    return found


@wrong(
    "insert_adapters", "The adapter takes the place of the pretrained module, which is gone. They have to be wrapped."
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


@wrong("insert_adapters", "You put adapters into every block, whichever `layers` are named.")
def in_all_layers(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    checked(model, width, variant, layers)
    return all_made_first(model, width, variant, scaling=scaling, generator=generator)


@wrong("insert_adapters", "The scaling that you are given never reaches the adapters.")
def loses_the_scaling(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return all_made_first(model, width, variant, layers=layers, generator=generator)


@wrong(
    "insert_adapters",
    "You freeze the model. That is somebody else's business: what is trained has to stay as it was.",
)
def freezes(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    checked(model, width, variant, layers)
    model.requires_grad_(False)
    return all_made_first(model, width, variant, scaling=scaling, layers=layers, generator=generator)


@wrong("insert_adapters", "You return the wrappers. The adapters are what is asked for: they hold what is learned.")
def returns_the_wrappers(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = all_made_first(model, width, variant, scaling=scaling, layers=layers, generator=generator)
    return {name: model.get_submodule(name) for name in found}


@wrong("insert_adapters", "The generator is not handed on: the same seed gives other adapters each time.")
def draws_from_elsewhere(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return all_made_first(model, width, variant, scaling=scaling, layers=layers)


@wrong(
    "insert_adapters",
    "Your adapters are float32, whatever the model is. They have to be of the dtype that they will read.",
)
def always_float32(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = new_adapter(variant, model.config.n_embd, width, scaling, generator)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@wrong("insert_adapters", "A width that the model cannot have is to be refused: it is wider than the model here.")
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
    "You silence the adapters, and leave them where they are. The model computes as before, more slowly, and its "
    "parameters have other names than before.",
)
def silences(model: nn.Module) -> None:
    for _, wrapper in wrappers(model):
        for parameter in wrapper.adapter.parameters():
            parameter.data.zero_()


@wrong(
    "remove_adapters",
    "You put copies into the old places. Whoever holds the old modules or parameters, an optimiser for instance, holds "
    "others now: it has to be the same object.",
)
def puts_back_copies(model: nn.Module) -> None:
    for name, wrapper in reversed(wrappers(model)):
        replace_module(model, name, copy.deepcopy(wrapper.base))


@wrong("remove_adapters", "Only the first one is taken out.")
def the_first_alone(model: nn.Module) -> None:
    for name, wrapper in wrappers(model)[:1]:
        replace_module(model, name, wrapper.base)


@wrong(
    "remove_adapters", "The parallel ones stay: an `AdapterBeside` is not of the type `AdapterAfter`, but it is one."
)
def of_the_very_type(model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):
        if type(module) is AdapterAfter:
            replace_module(model, name, module.base)


@wrong("remove_adapters", "It is the base that has to stay. You keep the adapter.")
def keeps_the_wrong_one(model: nn.Module) -> None:
    for name, wrapper in reversed(wrappers(model)):
        replace_module(model, name, Alone(wrapper.adapter))


@wrong(
    "remove_adapters",
    "One adapter inside another: you take out the outer one first, and then the name of the inner one leads nowhere.",
)
def the_outer_ones_first(model: nn.Module) -> None:
    for name, wrapper in wrappers(model):
        replace_module(model, name, wrapper.base)


@wrong(
    "remove_adapters",
    "After one round there are adapters left: a wrapper can hold a wrapper, and a wrapped block can hold some.",
)
def one_layer_of_them(model: nn.Module) -> None:
    gone: list[str] = []
    for name, wrapper in wrappers(model):
        if not any(name.startswith(f"{outer}.") for outer in gone):
            replace_module(model, name, wrapper.base)
            gone.append(name)


@wrong("remove_adapters", "You look at the MLPs only. Some variants have adapters at other places too.")
def of_the_mlps_alone(model: nn.Module) -> None:
    for block in model.transformer.h:
        while isinstance(getattr(block, "mlp", None), AdapterAfter):
            block.mlp = block.mlp.base
