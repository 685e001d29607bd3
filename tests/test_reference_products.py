"""The products that are written to be read agree with those that the server uses, and with each row alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.serving.mixed_product import PoolRows, add_lora_, plan_layer
from lora_from_scratch.serving.reference_products import gather_product, segment_product

INPUTS, OUTPUTS, CELLS = 6, 4, 24


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.lists(st.integers(-1, 3), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_both_products_are_those_of_each_row_alone_and_of_the_server(ranks: list[int], rows: list[int]) -> None:
    torch.manual_seed(len(rows))
    index = [k if k < len(ranks) else -1 for k in rows]
    A, B = torch.randn(CELLS, INPUTS), torch.randn(CELLS, OUTPUTS)
    places = torch.randperm(CELLS)
    own = torch.split(places[: sum(ranks)], ranks)
    A[places[sum(ranks) :]] = torch.nan
    x = torch.randn(len(rows), INPUTS)
    alone = torch.stack(
        [B[own[k]].T @ (A[own[k]] @ x_i) if k >= 0 else torch.zeros(OUTPUTS) for k, x_i in zip(index, x, strict=True)]
    )
    tables = [own[k] if k >= 0 else own[0][:0] for k in index]
    torch.testing.assert_close(gather_product(x, A, B, tables), alone, atol=1e-5, rtol=1e-4)
    adapters = [(A[cells], B[cells].T / (k + 2), float(k + 2)) for k, cells in enumerate(own)]
    torch.testing.assert_close(segment_product(x, adapters, torch.tensor(index)), alone, atol=1e-5, rtol=1e-4)

    pool = torch.cat([A.flatten(), B.flatten()])  # rows of both widths begin where they should: 24 * 6 = 36 * 4
    layers = [{"layer": PoolRows(cells, CELLS * INPUTS // OUTPUTS + cells, cells[:0])} for cells in own]
    y = torch.zeros(len(rows), OUTPUTS)
    plan = plan_layer([layers[k] if k >= 0 else None for k in index], [], "layer")
    if plan is not None:
        add_lora_(y, x, pool, plan)
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-4)
