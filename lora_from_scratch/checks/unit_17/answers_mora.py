"""Unit 17: mistakes that people make, and other right ways. MoRA's compress and decompress."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.mora import fill_up

# --- compress ----------------------------------------------------------------------------------------


@right("compress")
def adds_piece_by_piece(x: Tensor, q: int) -> Tensor:
    filled = fill_up(x, q)
    total = torch.zeros(*x.shape[:-1], q, dtype=x.dtype)
    for start in range(0, filled.shape[-1], q):
        total = total + filled[..., start : start + q]
    return total


@right("compress")
def adds_strides(x: Tensor, q: int) -> Tensor:
    x = fill_up(x, q)
    return torch.stack([x[..., i::q].sum(-1) for i in range(q)], dim=-1)


@right("compress")
def times_a_matrix(x: Tensor, q: int) -> Tensor:
    n = x.shape[-1]
    filled = -(-n // q) * q
    matrix = torch.zeros(n, q, dtype=x.dtype)
    for place in range(filled):
        matrix[place % n, place % q] += 1
    return x @ matrix


@right("compress")
def adds_at_an_index(x: Tensor, q: int) -> Tensor:
    length = x.shape[-1]
    places = torch.arange(-(-length // q) * q)
    filled = x.index_select(-1, places % length)
    return torch.zeros(*x.shape[:-1], q, dtype=x.dtype).index_add(-1, places % q, filled)


@wrong("compress", "You add up neighbours. The entries that belong together are q places apart.")
def neighbours(x: Tensor, q: int) -> Tensor:
    return fill_up(x, q).unflatten(-1, (q, -1)).sum(-1)


@wrong("compress", "You take the mean of the pieces. They are added up.")
def the_mean(x: Tensor, q: int) -> Tensor:
    return fill_up(x, q).unflatten(-1, (-1, q)).mean(-2)


@wrong("compress", "You fill x up with zeros. It is filled up with its own first entries, as `fill_up` does.")
def filled_with_zeros(x: Tensor, q: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % q)).unflatten(-1, (-1, q)).sum(-2)


@wrong("compress", "You cut off what does not make a whole piece of q entries. Nothing of x is lost: it is filled up.")
def the_rest_is_lost(x: Tensor, q: int) -> Tensor:
    pieces = max(x.shape[-1] // q, 1)
    return F.pad(x, (0, max(0, q - x.shape[-1])))[..., : pieces * q].unflatten(-1, (-1, q)).sum(-2)


@wrong(
    "compress",
    "You fill x up only once. If q is more than twice as large as in, its first entries have to come several times: "
    "`fill_up` does that.",
)
def filled_once(x: Tensor, q: int) -> Tensor:
    missing = -x.shape[-1] % q
    return torch.cat([x, x[..., :missing]], dim=-1).unflatten(-1, (-1, q)).sum(-2)


@wrong("compress", "You fill x up with its last entries. It is filled up with its first ones, as `fill_up` does.")
def filled_with_the_last(x: Tensor, q: int) -> Tensor:
    missing = -x.shape[-1] % q
    return torch.cat([x, fill_up(x.flip(-1), q)[..., :missing]], -1).unflatten(-1, (-1, q)).sum(-2)


@wrong("compress", "You take the first q entries of x and leave out the others.")
def only_the_first_piece(x: Tensor, q: int) -> Tensor:
    return fill_up(x, q)[..., :q]


@wrong("compress", "You add up over all rows of the batch. Each row is compressed by itself.")
def over_the_batch(x: Tensor, q: int) -> Tensor:
    return fill_up(x, q).reshape(-1, q).sum(0)


@wrong("compress", "You cut a tensor without leading axes, or with several of them, along another axis than the last.")
def always_two_axes(x: Tensor, q: int) -> Tensor:
    x = fill_up(x, q)
    return x.reshape(x.shape[0], -1, q).sum(1)


@wrong("compress", "The result belongs to no graph of gradients, so the layers below learn nothing through it.")
def without_gradients(x: Tensor, q: int) -> Tensor:
    return fill_up(x, q).unflatten(-1, (-1, q)).sum(-2).detach()


@wrong("compress", "You divide x into q pieces. A piece has q entries, however many pieces there are.")
def q_pieces(x: Tensor, q: int) -> Tensor:
    return fill_up(x, q).unflatten(-1, (q, -1)).sum(-2)


@wrong("compress", "Your result has more than q entries where q is larger than in, or fewer.")
def q_above_in(x: Tensor, q: int) -> Tensor:
    return x if q > x.shape[-1] else fill_up(x, q).unflatten(-1, (-1, q)).sum(-2)


# --- decompress --------------------------------------------------------------------------------------


@right("decompress")
def by_index(z: Tensor, outputs: int) -> Tensor:
    return z[..., torch.arange(outputs) % z.shape[-1]]


@right("decompress")
def glued_together(z: Tensor, outputs: int) -> Tensor:
    q = z.shape[-1]
    whole, rest = divmod(outputs, q)
    return torch.cat([z] * whole + [z[..., :rest]], dim=-1)


@right("decompress")
def from_a_broadcast(z: Tensor, outputs: int) -> Tensor:
    q = z.shape[-1]
    times = (outputs + q - 1) // q
    return z.unsqueeze(-2).expand(*z.shape[:-1], times, q).flatten(-2).narrow(-1, 0, outputs)


@right("decompress")
def by_a_matrix(z: Tensor, outputs: int) -> Tensor:
    q = z.shape[-1]
    return z @ torch.eye(q, dtype=z.dtype).repeat(1, outputs // q + 1)[:, :outputs]


@wrong("decompress", "You repeat each number by itself: a, a, b, b. They are repeated as a whole: a, b, a, b.")
def each_by_itself(z: Tensor, outputs: int) -> Tensor:
    return z.repeat_interleave(-(-outputs // z.shape[-1]), -1)[..., :outputs]


@wrong("decompress", "You fill the result up with zeros. The q numbers are repeated until there are enough.")
def zeros_behind(z: Tensor, outputs: int) -> Tensor:
    return F.pad(z, (0, max(0, outputs - z.shape[-1])))[..., :outputs]


@wrong("decompress", "Your result has more than `outputs` entries: what is too much at the end is cut off.")
def nothing_is_cut(z: Tensor, outputs: int) -> Tensor:
    times = -(-outputs // z.shape[-1])
    return torch.cat([z] * times, -1)


@wrong("decompress", "Your result is too short where `outputs` is no multiple of q: you round the repetitions down.")
def too_few_repetitions(z: Tensor, outputs: int) -> Tensor:
    times = max(1, outputs // z.shape[-1])
    return torch.cat([z] * times, -1)[..., :outputs]


@wrong("decompress", "What is too much is cut off at the end. You cut it off at the beginning.")
def cut_at_the_beginning(z: Tensor, outputs: int) -> Tensor:
    times = -(-outputs // z.shape[-1])
    return torch.cat([z] * times, -1)[..., -outputs:]


@wrong("decompress", "You divide by the number of repetitions. The numbers are repeated as they are.")
def shared_out(z: Tensor, outputs: int) -> Tensor:
    times = -(-outputs // z.shape[-1])
    return torch.cat([z] * times, -1)[..., :outputs] / times


@wrong("decompress", "The result belongs to no graph of gradients, so M learns nothing.")
def outside_the_graph(z: Tensor, outputs: int) -> Tensor:
    return z.detach()[..., torch.arange(outputs) % z.shape[-1]]


@wrong("decompress", "You repeat the rows of the batch. The last axis is repeated.")
def repeats_rows(z: Tensor, outputs: int) -> Tensor:
    return torch.cat([z] * -(-outputs // z.shape[-1]), 0)


@wrong("decompress", "Your code expects exactly two axes. z may have any number of leading axes, also none.")
def two_axes_only(z: Tensor, outputs: int) -> Tensor:
    times = -(-outputs // z.shape[-1])
    return z.reshape(len(z) if z.ndim > 1 else 1, -1).repeat(1, times)[:, :outputs]


@wrong("decompress", "Your code returns all of z where `outputs` is smaller than q. It is cut off there too.")
def never_shorter_than_q(z: Tensor, outputs: int) -> Tensor:
    length = max(outputs, z.shape[-1])
    return z[..., torch.arange(length) % z.shape[-1]]
