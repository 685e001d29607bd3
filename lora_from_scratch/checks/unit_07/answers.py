"""Unit 07, the bottleneck: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.adapters import BottleneckAdapter, adapter_parameter_count

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


@right("adapter_parameter_count")
def from_a_list_of_shapes(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    shapes = [(width, n_embd), (n_embd, width)]
    shapes += [(width,), (n_embd,)] if bias else []
    return sum(math.prod(shape) for shape in shapes * adapters + [(2, n_embd)] * norms)


@right("adapter_parameter_count")
def matrices_with_a_column_for_the_bias(n_embd, width, adapters=1, bias=True, norms=0):
    one = int(bias)
    return adapters * (width * (n_embd + one) + n_embd * (width + one)) + norms * (n_embd + n_embd)


@wrong("adapter_parameter_count", "One of the two biases is missing: the up projection has one, too.")
@changed(adapter_parameter_count, ("width + n_embd if bias", "width if bias"))
def no_bias_of_the_up_projection(): ...


@wrong("adapter_parameter_count", "One of the two biases is missing: the down projection has one, too.")
@changed(adapter_parameter_count, ("width + n_embd if bias", "n_embd if bias"))
def no_bias_of_the_down_projection(): ...


@wrong(
    "adapter_parameter_count", "You count the biases once, however many adapters there are. Each adapter has its own."
)
@changed(
    adapter_parameter_count, ("adapters * (2 * n_embd * width + biases)", "adapters * 2 * n_embd * width + biases")
)
def biases_once(): ...


@wrong("adapter_parameter_count", "It is the other way round: `bias=True` means that there are biases.")
@changed(adapter_parameter_count, ("if bias else", "if not bias else"))
def biases_the_other_way_round(): ...


@wrong("adapter_parameter_count", "You add d and w. A matrix from d to w numbers has d times w entries.")
@changed(adapter_parameter_count, ("2 * n_embd * width", "2 * (n_embd + width)"))
def sides_of_the_matrices(): ...


@wrong(
    "adapter_parameter_count",
    "Your LayerNorms are as wide as the bottleneck. They normalise the d numbers of the model.",
)
@changed(adapter_parameter_count, ("2 * norms * n_embd", "2 * norms * width"))
def norms_of_the_bottleneck(): ...


@wrong("adapter_parameter_count", "With `norms=0` you still count LayerNorms.")
def one_norm_at_least(n_embd, width, adapters=1, bias=True, norms=0):
    return adapter_parameter_count(n_embd, width, adapters, bias, norms or adapters)


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


@right("BottleneckAdapter")
class with_numpy_and_rejection(nn.Module):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n_embd, width), nn.Linear(width, n_embd)
        for weight in (self.down.weight, self.up.weight):
            draws = torch.randn(3 * weight.numel() // 2 + 64, generator=generator)
            kept = draws[draws.abs() < 2][: weight.numel()]
            weight.data = (STD * kept).reshape(weight.shape)
        self.down.bias.data.fill_(0)
        self.up.bias.data.fill_(0)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("...d,wd->...w", x, self.down.weight) + self.down.bias, approximate="tanh")
        return torch.einsum("...w,dw->...d", h, self.up.weight) + self.up.bias + x


@right("BottleneckAdapter")
class as_a_sequence(nn.Module):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n_embd, width), nn.Linear(width, n_embd)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0)
            else:
                nn.init.trunc_normal_(parameter, 0, STD, -2 * STD, 2 * STD, generator)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for step in (self.down, nn.GELU(approximate="tanh"), self.up):
            y = step(y)
        return y.add(x)


@wrong(
    "BottleneckAdapter",
    "You go back to the generator's seed instead of drawing on: all adapters that are made with one generator start "
    "with the same numbers.",
)
class goes_back_to_the_seed(Starts):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        if generator is not None:
            generator = torch.Generator().manual_seed(generator.initial_seed())
        super().__init__(n_embd, width, generator)


@wrong(
    "BottleneckAdapter",
    "Without a generator yours starts with the same numbers every time: None means PyTorch's own generator, whose seed "
    "the caller sets.",
)
class a_seed_of_its_own(Starts):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__(n_embd, width, generator or torch.Generator().manual_seed(0))


@wrong("BottleneckAdapter", "Your numbers beyond the limits are set to the limits. They are drawn again, not moved.")
class moved_to_the_limits(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return (STD * torch.randn(shape, generator=generator)).clamp(-2 * STD, 2 * STD)


@wrong("BottleneckAdapter", "Your weights are uniform between the limits. The distribution is a normal one, cut off.")
class uniform_weights(Starts):
    def start(self, name: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return 2 * STD * (2 * torch.rand(shape, generator=generator) - 1)


@wrong("BottleneckAdapter", "What you add to x does not depend on x.")
class always_the_same(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(0 * x), approximate="tanh"))


@wrong("BottleneckAdapter", "Your two `nn.Linear` have no biases. Here both have one.")
class without_biases(BottleneckAdapter):
    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        nn.Module.__init__(self)
        self.down, self.up = nn.Linear(n_embd, width, bias=False), nn.Linear(width, n_embd, bias=False)
        with torch.no_grad():
            for layer in (self.down, self.up):
                layer.weight.copy_(cut_off_normal(layer.weight.shape, generator))


@wrong("BottleneckAdapter", "No gradient reaches the adapter's parameters: a part of `forward` is outside the graph.")
class outside_the_graph(BottleneckAdapter):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            change = self.up(F.gelu(self.down(x), approximate="tanh"))
        return x + change
