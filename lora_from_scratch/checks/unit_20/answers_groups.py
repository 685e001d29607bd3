"""Unit 20, longer context: mistakes that people make, and other right ways. Groups and their mask."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.long_lora import allowed_in_groups, to_groups

# --- to_groups -------------------------------------------------------------------------------------------


@right("to_groups")
def by_places(x: Tensor, group_size: int) -> Tensor:
    B, H, T, hd = x.shape
    n = (T + group_size - 1) // group_size
    x = torch.cat([x, torch.zeros(B, H, n * group_size - T, hd)], dim=2)
    moved = (torch.arange(n * group_size) + group_size // 2) % (n * group_size)
    x = torch.cat([x[:, : H // 2], x[:, H // 2 :, moved]], dim=1)
    return x.reshape(B, H, n, group_size, hd)


@right("to_groups")
def token_by_token(x: Tensor, group_size: int) -> Tensor:
    B, H, T, hd = x.shape
    n = -(-T // group_size)
    result = torch.zeros(B, H, n, group_size, hd)
    for h in range(H):
        shift = group_size // 2 if h >= H // 2 else 0
        for token in range(T):
            group, place = divmod((token - shift) % (n * group_size), group_size)
            result[:, h, group, place] = x[:, h, token]
    return result


@right("to_groups")
def head_by_head(x: Tensor, group_size: int) -> Tensor:
    missing = -x.shape[2] % group_size
    heads = []
    for h, head in enumerate(x.unbind(1)):
        head = F.pad(head, (0, 0, 0, missing))
        heads.append(head.roll(-(group_size // 2), 1) if h >= x.shape[1] // 2 else head)
    return torch.stack(heads, dim=1).unflatten(2, (-1, group_size))


@right("to_groups")
def cut_first(x: Tensor, group_size: int) -> Tensor:
    half, shift = x.shape[1] // 2, group_size // 2
    groups = F.pad(x, (0, 0, 0, -x.shape[2] % group_size)).unflatten(2, (-1, group_size))
    rolled = groups[:, half:]
    following = rolled.roll(-1, dims=2)[..., :shift, :]
    return torch.cat([groups[:, :half], torch.cat([rolled[..., shift:, :], following], dim=3)], dim=1)


@wrong("to_groups", "No head is rolled. So no token ever shares a group with the one on the other side of a border.")
@changed(to_groups, (".roll(-(group_size // 2), dims=2)", ""))
def not_rolled() -> None: ...


@wrong("to_groups", "You roll all heads: the borders are only moved.")
def all_heads(x: Tensor, group_size: int) -> Tensor:
    x = F.pad(x, (0, 0, 0, -x.shape[2] % group_size)).roll(-(group_size // 2), dims=2)
    return x.unflatten(2, (-1, group_size))


@wrong("to_groups", "You roll the first half of the heads. It is the second half that is rolled.")
def the_first_half(x: Tensor, group_size: int) -> Tensor:
    half = x.shape[1] // 2
    x = F.pad(x, (0, 0, 0, -x.shape[2] % group_size))
    x = torch.cat([x[:, :half].roll(-(group_size // 2), dims=2), x[:, half:]], dim=1)
    return x.unflatten(2, (-1, group_size))


@wrong("to_groups", "You roll in the other direction: the last tokens come to the front.")
@changed(to_groups, (".roll(-(group_size // 2)", ".roll(group_size // 2"))
def the_other_direction() -> None: ...


@wrong("to_groups", "You roll by a whole group, which only changes the order of the groups.")
@changed(to_groups, (".roll(-(group_size // 2)", ".roll(-group_size"))
def by_a_whole_group() -> None: ...


@wrong("to_groups", "You round half of an odd g up. The statement says g // 2.")
@changed(to_groups, (".roll(-(group_size // 2)", ".roll(-((group_size + 1) // 2)"))
def rounded_up() -> None: ...


@wrong("to_groups", "You leave out the tokens of a last group that is not whole. Append zeros, so that none is lost.")
def the_rest_is_lost(x: Tensor, group_size: int) -> Tensor:
    whole = x.shape[2] // group_size * group_size
    return token_by_token(x[:, :, :whole], group_size)


@wrong("to_groups", "You put the zeros in front of the text. They are appended.")
def zeros_in_front(x: Tensor, group_size: int) -> Tensor:
    return token_by_token(F.pad(x, (0, 0, -x.shape[2] % group_size, 0)), group_size)


@wrong("to_groups", "A text that fills its groups gets one group of zeros more.")
@changed(to_groups, ("-x.shape[2] % group_size)", "group_size - x.shape[2] % group_size)"))
def a_group_too_many() -> None: ...


@wrong("to_groups", "You roll before you append the zeros, so the first tokens do not come after them.")
def rolled_before_the_zeros(x: Tensor, group_size: int) -> Tensor:
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half], x[:, half:].roll(-(group_size // 2), dims=2)], dim=1)
    return F.pad(x, (0, 0, 0, -x.shape[2] % group_size)).unflatten(2, (-1, group_size))


@wrong("to_groups", "Your groups take every n-th token. A group is a piece of the text.")
def every_nth_token(x: Tensor, group_size: int) -> Tensor:
    half = x.shape[1] // 2
    x = F.pad(x, (0, 0, 0, -x.shape[2] % group_size))
    x = torch.cat([x[:, :half], x[:, half:].roll(-(group_size // 2), dims=2)], dim=1)
    return x.unflatten(2, (group_size, -1)).transpose(2, 3)


# --- allowed_in_groups -----------------------------------------------------------------------------------


@right("allowed_in_groups")
def by_the_places_in_the_text(heads: int, groups: int, group_size: int) -> Tensor:
    length = groups * group_size
    place = torch.arange(length).view(1, groups, group_size)
    rolled = ((place + group_size // 2) % length).expand(heads - heads // 2, -1, -1)
    place = torch.cat([place.expand(heads // 2, -1, -1), rolled])
    later = place[..., None, :] > place[..., :, None]
    end = torch.zeros_like(place, dtype=torch.bool)  # in which of the two pieces of the last group
    end[heads // 2 :, -1] = place[heads // 2 :, -1] >= length - group_size + group_size // 2
    return ~later & (end[..., None, :] == end[..., :, None])


@right("allowed_in_groups")
def one_entry_at_a_time(heads: int, groups: int, group_size: int) -> Tensor:
    allowed = torch.zeros(heads, groups, group_size, group_size, dtype=torch.bool)
    for h in range(heads):
        for i in range(groups):
            for query in range(group_size):
                for key in range(query + 1):
                    cut = group_size - group_size // 2
                    apart = h >= heads // 2 and i == groups - 1 and query >= cut > key
                    allowed[h, i, query, key] = not apart
    return allowed


@right("allowed_in_groups")
def blocks_on_a_diagonal(heads: int, groups: int, group_size: int) -> Tensor:
    whole = torch.ones(group_size, group_size).tril()
    begin = group_size // 2
    pieces = torch.block_diag(*(torch.ones(n, n).tril() for n in (group_size - begin, begin) if n))
    plain = whole.expand(heads // 2, groups, -1, -1)
    rolled = torch.stack([whole] * (groups - 1) + [pieces]).expand(heads - heads // 2, -1, -1, -1)
    return torch.cat([plain, rolled]).bool()


@right("allowed_in_groups")
def with_a_forbidden_block(heads: int, groups: int, group_size: int) -> Tensor:
    slot = torch.arange(group_size)
    causal = slot[None, :] <= slot[:, None]
    beginning = slot >= group_size - group_size // 2
    apart = beginning[:, None] & ~beginning[None, :]
    last = torch.zeros(heads, groups, 1, 1, dtype=torch.bool)
    last[heads // 2 :, groups - 1] = True
    return causal & ~(apart & last)


@wrong(
    "allowed_in_groups",
    "This is the fault of the code above: in the last group of the rolled heads, the first tokens of the text attend "
    "to the last ones.",
)
@changed(allowed_in_groups, ("    allowed[heads // 2 :, -1, end:, :end] = False\n", ""))
def the_leak() -> None: ...


@wrong("allowed_in_groups", "All tokens of a group see each other in your mask, the later ones too.")
@changed(allowed_in_groups, (".tril()", ""))
def the_whole_group() -> None: ...


@wrong("allowed_in_groups", "A token does not see itself in your mask. Without any key, a softmax is 0 / 0.")
@changed(allowed_in_groups, (".tril()", ".tril(-1)"))
def not_itself() -> None: ...


@wrong("allowed_in_groups", "Your triangle is the other one: each token sees those that come later.")
@changed(allowed_in_groups, (".tril()", ".triu()"))
def the_other_triangle() -> None: ...


@wrong("allowed_in_groups", "You forbid the block in every group. Only in the last one are its two pieces apart.")
@changed(allowed_in_groups, ("-1, end:, :end", ":, end:, :end"))
def in_every_group() -> None: ...


@wrong("allowed_in_groups", "You forbid the block in the first group. The roll moves the beginning to the last one.")
@changed(allowed_in_groups, ("-1, end:, :end", "0, end:, :end"))
def in_the_first_group() -> None: ...


@wrong("allowed_in_groups", "You forbid the block in all heads. The first heads // 2 are not rolled.")
@changed(allowed_in_groups, ("allowed[heads // 2 :, -1", "allowed[:, -1"))
def in_all_heads() -> None: ...


@wrong("allowed_in_groups", "You forbid the block in the first half of the heads. The others are the rolled ones.")
@changed(allowed_in_groups, ("allowed[heads // 2 :, -1", "allowed[: heads // 2, -1"))
def in_the_other_half() -> None: ...


@wrong(
    "allowed_in_groups",
    "The last group has g // 2 tokens of the beginning. With an odd g, the end of the text has one token more.",
)
@changed(allowed_in_groups, ("end = group_size - group_size // 2", "end = group_size // 2"))
def the_border_rounded_down() -> None: ...


@wrong("allowed_in_groups", "The beginning of the text sees nothing in your mask, not even itself.")
@changed(allowed_in_groups, ("end:, :end", "end:, :"))
def the_beginning_sees_nothing() -> None: ...


@wrong("allowed_in_groups", "Your mask is True where a query may *not* attend.")
@changed(allowed_in_groups, ("return allowed", "return ~allowed"))
def the_reverse() -> None: ...


@wrong("allowed_in_groups", "You have exchanged queries and keys: axis 2 has the queries and axis 3 the keys.")
@changed(allowed_in_groups, ("return allowed", "return allowed.transpose(2, 3)"))
def queries_and_keys_exchanged() -> None: ...
