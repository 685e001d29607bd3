"""Unit 03, GPT-2, the block: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

Part = Callable[[Tensor], Tensor]

# --- gelu --------------------------------------------------------------------------------------------

ROOT = math.sqrt(2 / math.pi)


@right("gelu")
def pytorchs_tanh_approximation(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@right("gelu")
def numpy_in_float64(x: Tensor) -> np.ndarray:
    x64 = x.numpy().astype(np.float64)
    return 0.5 * x64 * (1 + np.tanh(ROOT * (x64 + 0.044715 * np.power(x64, 3))))


@right("gelu")
def a_sigmoid_of_twice_the_argument(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * ROOT * (x + 0.044715 * x**3))


@right("gelu")
def number_by_number(x: Tensor) -> Tensor:
    numbers = [0.5 * z * (1 + math.tanh(ROOT * (z + 0.044715 * z**3))) for z in x.flatten().tolist()]
    return torch.tensor(numbers).view(x.shape)


@right("gelu")
def half_of_x_and_a_tanh_with_one_factor_x(x: Tensor) -> Tensor:
    half = 0.5 * x
    return torch.addcmul(half, half, torch.tanh(x * (ROOT + ROOT * 0.044715 * x.square())))


@wrong("gelu", "x enters the tanh with the power 2 in your code. The formula has its cube, which keeps the sign of x.")
def a_square_for_the_cube(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2)))


@wrong("gelu", "In your formula the 1 is inside the tanh. It is added to the tanh.")
def one_inside_the_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * torch.tanh(1 + ROOT * (x + 0.044715 * x**3))


@wrong(
    "gelu",
    "This is the exact GELU, defined by the normal distribution. GPT-2 was trained with its tanh approximation, and "
    "the two differ in the fourth decimal: enough to change the logits.",
)
def the_exact_one(x: Tensor) -> Tensor:
    return F.gelu(x)


@wrong("gelu", "This is the sigmoid approximation, which is coarser. GPT-2 uses the one with the tanh.")
def the_sigmoid_approximation(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@wrong(
    "gelu", "The factor in front is missing: for a large x the result should be x, but yours is about twice as large."
)
def no_half(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3)))


@wrong("gelu", "The cubic term is missing, or it is outside the tanh: check the parentheses.")
def no_cube(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(ROOT * x))


@wrong("gelu", "The cubic term has to be inside the parentheses that are multiplied by the square root.")
def cube_outside_the_bracket(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(ROOT * x + 0.044715 * x**3))


@wrong("gelu", "The constant is a square root; yours is 2 / pi itself.")
def no_root(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(2 / math.pi * (x + 0.044715 * x**3)))


@wrong("gelu", "That is the fraction of x that passes. It still has to be multiplied by x.")
def only_the_gate(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3)))


@wrong(
    "gelu", "You set negative numbers to zero, like a ReLU. A GELU lets a little of them through: its curve is smooth."
)
def a_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@wrong(
    "gelu",
    "For large numbers the exponential of your tanh overflows, and infinity divided by infinity is NaN. PyTorch's own "
    "tanh handles this.",
)
def a_tanh_that_overflows(x: Tensor) -> Tensor:
    z = ROOT * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()))


# --- transformer_block -------------------------------------------------------------------------------


@right("transformer_block")
def on_a_copy_in_place(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    stream = x.clone()
    stream += attention(norm_1(stream))
    stream += mlp(norm_2(stream))
    return stream


@right("transformer_block")
def as_a_loop_in_float64(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    stream = x.double()
    for norm, part in ((norm_1, attention), (norm_2, mlp)):
        stream = stream + part(norm(stream.float())).double()
    return stream


@right("transformer_block")
def as_a_chain_of_functions(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    def residual(part: Part) -> Part:
        return lambda stream: torch.add(stream, part(stream))

    steps = [residual(lambda h: attention(norm_1(h))), residual(lambda h: mlp(norm_2(h)))]
    return functools.reduce(lambda stream, step: step(stream), steps, x)


@right("transformer_block")
def the_sum_of_all_three(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    added = attention(norm_1(x))
    return torch.stack([x, added, mlp(norm_2(added + x))]).sum(dim=0)


@right("transformer_block")
def in_numpy_between_the_parts(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> np.ndarray:
    middle = x.numpy() + attention(norm_1(x)).numpy()
    return middle + mlp(norm_2(torch.from_numpy(middle))).numpy()


@wrong(
    "transformer_block",
    "The two normalisations are exchanged. The first one belongs to the attention, the second to the MLP.",
)
def norms_exchanged(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + attention(norm_2(x))
    return x + mlp(norm_1(x))


@wrong("transformer_block", "Nothing is normalised before the attention reads it.")
def first_norm_forgotten(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + attention(x)
    return x + mlp(norm_2(x))


@wrong(
    "transformer_block",
    "You add what the MLP returns to the stream as it came in: what the attention has added is lost at the end.",
)
def added_to_the_stream_before_the_attention(
    x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part
) -> Tensor:
    return x + mlp(norm_2(x + attention(norm_1(x))))


@wrong(
    "transformer_block",
    "You normalise the sum, after each part: that is the original Transformer (post-norm). In GPT-2 the normalisation "
    "comes first, and the stream itself is never normalised.",
)
def normalised_afterwards(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = norm_1(x + attention(x))
    return norm_2(x + mlp(x))


@wrong(
    "transformer_block",
    "The residual connections are missing: the stream itself does not pass through the block.",
)
def no_residual(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    return mlp(norm_2(attention(norm_1(x))))


@wrong("transformer_block", "The attention replaces the stream; it should be added to it.")
def no_residual_around_the_attention(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = attention(norm_1(x))
    return x + mlp(norm_2(x))


@wrong("transformer_block", "The MLP replaces the stream; it should be added to it.")
def no_residual_around_the_mlp(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    return mlp(norm_2(x + attention(norm_1(x))))


@wrong(
    "transformer_block",
    "Your MLP reads what the attention read. It should read the stream after the attention has added to it; only some "
    "other models (such as GPT-J) run the two in parallel.",
)
def side_by_side(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    return x + attention(norm_1(x)) + mlp(norm_2(x))


@wrong(
    "transformer_block",
    "You add to the normalised stream. Each part reads the normalised stream, but its result is added to the stream "
    "itself.",
)
def added_to_the_normalised(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = norm_1(x)
    x = x + attention(x)
    x = norm_2(x)
    return x + mlp(x)


@wrong("transformer_block", "Both parts get the same normalisation. Each has its own, with its own weights.")
def one_norm_for_both(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + attention(norm_1(x))
    return x + mlp(norm_1(x))


@wrong("transformer_block", "The MLP comes first in your block. The attention has to come before it.")
def mlp_first(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + mlp(norm_2(x))
    return x + attention(norm_1(x))


@wrong("transformer_block", "Nothing is normalised before the MLP reads it.")
def second_norm_forgotten(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x = x + attention(norm_1(x))
    return x + mlp(x)


@wrong("transformer_block", caught_by="changes its input")
def added_in_the_callers_tensor(x: Tensor, norm_1: Part, attention: Part, norm_2: Part, mlp: Part) -> Tensor:
    x += attention(norm_1(x))
    x += mlp(norm_2(x))
    return x
