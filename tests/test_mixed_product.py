"""The product of rows with adapters of different ranks: each row as if its adapter were alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.serving.mixed_product import LayerRows, PoolRows, add_lora_, plan_layer

INPUTS, OUTPUTS, SIZE = 6, 9, 18 * 40
few = settings(max_examples=40, deadline=None)


def draw_adapters(ranks: list[int], doras: int, pool: Tensor) -> list[LayerRows]:
    """A on rows in any order from the first half of the pool, B and the gains from the second; rank 0: another layer's
    adapter; the first `doras` of them have gains."""
    half = SIZE // 2
    A = torch.randperm(half // INPUTS)
    B = half // OUTPUTS + torch.randperm(half // OUTPUTS)
    adapters: list[LayerRows] = []
    used = torch.zeros(SIZE, dtype=torch.bool)
    for number, rank in enumerate(ranks):
        gains = int(number < doras)
        rows = PoolRows(A[:rank], B[:rank], B[rank : rank + gains])
        A, B = A[rank:], B[rank + gains :]
        adapters.append({"layer" if rank else "another": rows})
        used.view(-1, INPUTS)[rows.A] = True
        used.view(-1, OUTPUTS)[torch.cat(rows[1:])] = True
    pool[~used] = torch.nan  # nothing else may be touched
    return adapters


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(0, 3),
    st.lists(st.integers(-1, 5), max_size=7),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=4),
    st.integers(0, 999),
)
@few
def test_each_row_gets_the_product_of_its_own_adapter(
    ranks: list[int], doras: int, rows: list[int], segments: list[tuple[int, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    pool = torch.randn(SIZE)
    adapters = draw_adapters(ranks, doras, pool)
    owner: list[int | None] = [number % len(adapters) if number >= 0 else None for number in rows]
    slices = []
    for number, length in segments:
        slices.append((slice(len(owner), len(owner) + length), adapters[number % len(adapters)]))
        owner += [number % len(adapters)] * length
    owner.append(None)  # a row at the end that nobody plans for
    x, y, bias = torch.randn(len(owner), INPUTS), torch.randn(len(owner), OUTPUTS), torch.randn(OUTPUTS)
    gathered = [adapters[index] if index is not None else None for index in owner[: len(rows)]]
    plan = plan_layer(gathered, slices, "layer")
    expected = y.double()
    for row, index in enumerate(owner):
        if index is not None and "layer" in adapters[index]:
            A, B, gain = adapters[index]["layer"]
            if len(gain):
                expected[row] += pool.view(-1, OUTPUTS)[gain[0]] * (y[row] - bias)
            change = pool.view(-1, OUTPUTS)[B].double().T @ pool.view(-1, INPUTS)[A].double()  # (out, in)
            expected[row] += change @ x[row].double()
    if plan is None:
        assert not any("layer" in adapters[index] for index in owner if index is not None)
    else:
        add_lora_(y, x, pool, plan, bias)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
