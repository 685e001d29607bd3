"""Unit 20, longer context: mistakes that people make, and other right ways. Positions, and back from the groups."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.long_lora import from_groups, stretch_positions

# --- stretch_positions -----------------------------------------------------------------------------------


def mixed(table: Tensor, places: Tensor) -> Tensor:
    """The table at these places, which may lie between rows."""
    before = places.floor().long().clamp(0, len(table) - 1)
    after = (before + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[before], table[after], (places - before).to(table.dtype)[:, None])


@right("stretch_positions")
def places_on_a_line(table: Tensor, factor: int) -> Tensor:
    return mixed(table, torch.linspace(0, len(table) - 1, factor * len(table), dtype=torch.float64))


@right("stretch_positions")
def numpy_column_by_column(table: Tensor, factor: int) -> Tensor:
    old = np.arange(len(table))
    new = np.linspace(0, len(table) - 1, factor * len(table))
    columns = [np.interp(new, old, column) for column in table.T.numpy()]
    return torch.from_numpy(np.stack(columns, axis=1)).to(table.dtype)


@right("stretch_positions")
def a_matrix_of_weights(table: Tensor, factor: int) -> Tensor:
    n = len(table)
    places = torch.arange(factor * n, dtype=torch.float64) * (n - 1) / (factor * n - 1)
    weights = (1 - (places[:, None] - torch.arange(n)).abs()).clamp(min=0)
    return (weights @ table.double()).to(table.dtype)


@right("stretch_positions")
def one_row_at_a_time(table: Tensor, factor: int) -> Tensor:
    rows, steps = [], factor * len(table) - 1
    for i in range(steps + 1):
        whole, rest = divmod(i * (len(table) - 1), steps)
        following = table[min(whole + 1, len(table) - 1)]
        rows.append(table[whole] * (1 - rest / steps) + following * (rest / steps))
    return torch.stack(rows)


@wrong("stretch_positions", "You repeat each row. Rows between two old ones should be mixtures of them.")
def each_row_repeated(table: Tensor, factor: int) -> Tensor:
    return table.repeat_interleave(factor, dim=0)


@wrong("stretch_positions", "You put copies of the table behind one another: position n begins again at 0.")
def the_table_repeated(table: Tensor, factor: int) -> Tensor:
    return table.repeat(factor, 1)


@wrong(
    "stretch_positions",
    "New row i lies at i / factor in your table, so the last rows lie beyond the last old one. The ends should meet.",
)
def at_a_fraction_of_the_index(table: Tensor, factor: int) -> Tensor:
    return mixed(table, torch.arange(factor * len(table)).double() / factor)


@wrong(
    "stretch_positions",
    "You interpolate as for pixels (`align_corners=False`): the first and the last row stand for cells, and the ends "
    "do not meet.",
)
@changed(stretch_positions, ("align_corners=True", "align_corners=False"))
def as_pixels() -> None: ...


@wrong("stretch_positions", "You take the nearest old row. Rows in between should be mixtures.")
def the_nearest_row(table: Tensor, factor: int) -> Tensor:
    return table[torch.linspace(0, len(table) - 1, factor * len(table), dtype=torch.float64).round().long()]


@wrong("stretch_positions", "You stretch the columns: the table has another width, and the positions are as many.")
def along_the_other_axis(table: Tensor, factor: int) -> Tensor:
    return F.interpolate(table[None].float(), scale_factor=factor, mode="linear", align_corners=True)[0].to(table)


@wrong("stretch_positions", "You add rows of zeros. They are the positions that the model has never seen.")
def zeros_behind(table: Tensor, factor: int) -> Tensor:
    return torch.cat([table, table.new_zeros((factor - 1) * len(table), table.shape[1])])


@wrong("stretch_positions", "Each mixture is the wrong way round: the closer row should count more.")
def weights_exchanged(table: Tensor, factor: int) -> Tensor:
    places = torch.linspace(0, len(table) - 1, factor * len(table), dtype=torch.float64)
    before = places.floor().long()
    after = places.ceil().long()
    return torch.lerp(table[after], table[before], (places - before).to(table.dtype)[:, None])


@wrong("stretch_positions", "The result is in float32, whatever the dtype of the table.")
@changed(stretch_positions, (".T.to(table)", ".T"))
def in_float32() -> None: ...


@wrong("stretch_positions", "Your table has n + factor - 1 rows, or another number: it should have factor times n.")
def only_between_neighbours(table: Tensor, factor: int) -> Tensor:
    return mixed(table, torch.linspace(0, len(table) - 1, factor * (len(table) - 1) + 1, dtype=torch.float64))


# --- from_groups -----------------------------------------------------------------------------------------


@right("from_groups")
def by_places(x: Tensor, tokens: int) -> Tensor:
    half, length, g = x.shape[1] // 2, x.shape[2] * x.shape[3], x.shape[3]
    x = x.reshape(*x.shape[:2], length, x.shape[4])
    moved = (torch.arange(length) - g // 2) % length
    return torch.cat([x[:, :half], x[:, half:, moved]], dim=1)[:, :, :tokens]


@right("from_groups")
def into_an_empty_tensor(x: Tensor, tokens: int) -> Tensor:
    B, H, n, g, hd = x.shape
    result = x.new_empty(B, H, n * g, hd)
    for place in range(n * g):
        group, slot = divmod(place, g)
        result[:, : H // 2, place] = x[:, : H // 2, group, slot]
        result[:, H // 2 :, (place + g // 2) % (n * g)] = x[:, H // 2 :, group, slot]
    return result[:, :, :tokens]


@right("from_groups")
def head_by_head(x: Tensor, tokens: int) -> Tensor:
    heads = []
    for h, head in enumerate(x.flatten(2, 3).unbind(1)):
        heads.append(head.roll(x.shape[3] // 2, 1) if h >= x.shape[1] // 2 else head)
    return torch.stack(heads, dim=1).narrow(2, 0, tokens)


@right("from_groups")
def two_pieces(x: Tensor, tokens: int) -> Tensor:
    half, shift = x.shape[1] // 2, x.shape[3] // 2
    flat = x.flatten(2, 3)
    rolled = flat[:, half:]
    cut = rolled.shape[2] - shift
    return torch.cat([flat[:, :half], torch.cat([rolled[:, :, cut:], rolled[:, :, :cut]], dim=2)], dim=1)[:, :, :tokens]


@wrong("from_groups", "The rolled heads are not rolled back.")
@changed(from_groups, (".roll(group_size // 2, dims=2)", ""))
def not_rolled_back() -> None: ...


@wrong("from_groups", "You roll in the same direction as `to_groups`, so the tokens are now twice as far off.")
@changed(from_groups, (".roll(group_size // 2", ".roll(-(group_size // 2)"))
def the_same_direction() -> None: ...


@wrong("from_groups", "You roll all heads back. The first half was never rolled.")
def all_heads(x: Tensor, tokens: int) -> Tensor:
    return x.flatten(2, 3).roll(x.shape[3] // 2, dims=2)[:, :, :tokens]


@wrong("from_groups", "You roll the first half of the heads. It is the second half that was rolled.")
def the_first_half(x: Tensor, tokens: int) -> Tensor:
    half, g = x.shape[1] // 2, x.shape[3]
    x = x.flatten(2, 3)
    return torch.cat([x[:, :half].roll(g // 2, dims=2), x[:, half:]], dim=1)[:, :, :tokens]


@wrong("from_groups", "What was appended to fill the last group is still in the result.")
@changed(from_groups, ("[:, :, :tokens]", ""))
def with_the_appended() -> None: ...


@wrong(
    "from_groups",
    "You leave out the appended places before you roll back. In a rolled head they are not at the end.",
)
def cut_before_rolling(x: Tensor, tokens: int) -> Tensor:
    half, g = x.shape[1] // 2, x.shape[3]
    x = x.flatten(2, 3)[:, :, :tokens]
    return torch.cat([x[:, :half], x[:, half:].roll(g // 2, dims=2)], dim=1)


@wrong("from_groups", "You roll by g // 2 groups, and not by g // 2 tokens.")
def whole_groups(x: Tensor, tokens: int) -> Tensor:
    half, g = x.shape[1] // 2, x.shape[3]
    rolled = x[:, half:].roll(g // 2, dims=2)
    return torch.cat([x[:, :half], rolled], dim=1).flatten(2, 3)[:, :, :tokens]


@wrong("from_groups", "You roll within each group. The tokens move from one group to the next.")
def within_the_groups(x: Tensor, tokens: int) -> Tensor:
    half, g = x.shape[1] // 2, x.shape[3]
    rolled = x[:, half:].roll(g // 2, dims=3)
    return torch.cat([x[:, :half], rolled], dim=1).flatten(2, 3)[:, :, :tokens]


@wrong("from_groups", "You round half of an odd g up. `to_groups` rolls by g // 2.")
@changed(from_groups, (".roll(group_size // 2", ".roll((group_size + 1) // 2"))
def rounded_up() -> None: ...
