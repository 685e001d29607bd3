"""ReMoRA: its groups, and what changing them does to the rank of the sum.

Compared outside this repository with kongds/MoRA (commit de5df31): what its `_apply_mora` adds to the output with types
1 to 4 equals ours in cycles 0 to 3 bit for bit, for layers of 24 x 24, 24 x 72, 96 x 24, 20 x 30 and 17 x 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.methods.lora import lora_layers
from lora_from_scratch.methods.mora import MoRA
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.remora import ReMoRA, ReMoRALinear, add_up_neighbours, repeat_for_neighbours
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot
from tests.test_relora import batch_at, changes_of, rank_of, trained

sizes = st.integers(1, 40)


def layer_of(inputs: int, outputs: int, rank: int, restarts: int) -> ReMoRALinear:
    layer = ReMoRALinear(nn.Linear(inputs, outputs), rank)
    layer.restarts.fill_(restarts)
    with torch.no_grad():
        layer.mora_M.normal_(generator=torch.Generator().manual_seed(0))
    return layer


def change_of(layer: Any) -> Tensor:
    """What the layer adds for each unit vector: (out, in)."""
    units = torch.eye(layer.base.in_features)
    return (layer(units) - layer.base(units)).detach().T


@given(sizes, sizes)
def test_groups_of_neighbours_are_those_of_an_even_split(count: int, groups: int) -> None:
    x = torch.randn(2, count, dtype=torch.float64)
    parts = x.tensor_split(groups, dim=-1)
    torch.testing.assert_close(add_up_neighbours(x, groups), torch.stack([part.sum(-1) for part in parts], dim=-1))
    z = torch.randn(2, groups)
    expected = torch.cat([z[:, i : i + 1].expand(-1, part.shape[1]) for i, part in enumerate(parts)], dim=1)
    assert torch.equal(repeat_for_neighbours(z, count), expected)


def test_four_kinds_of_cycle_take_turns_and_the_first_is_moras_sharing() -> None:
    changes = [change_of(layer_of(24, 48, 2, restarts)) for restarts in range(5)]
    mora: Any = MoRA(variant="sharing", rank=2).make_layers({"": nn.Linear(24, 48)})[""]
    mora.mora_M.data = layer_of(24, 48, 2, 0).mora_M.data
    torch.testing.assert_close(changes[0], change_of(mora), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(changes[4], changes[0], atol=1e-5, rtol=1e-4)
    assert all(not torch.allclose(changes[i], changes[j], atol=0.1) for i in range(4) for j in range(i))


@given(sizes, sizes, st.integers(0, 3))
def test_merging_adds_what_the_layer_adds(inputs: int, outputs: int, restarts: int) -> None:
    layer = layer_of(inputs, outputs, 1, restarts)
    torch.testing.assert_close(layer.change(layer.base.weight), change_of(layer), atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cycles", "rank"), [(1, 8), (2, 14), (4, 14)])
def test_the_sum_has_nearly_twice_the_rank_of_one_cycle(cycles: int, rank: int) -> None:
    """2 q, less one for each set of groups that have places in common: here i // 4 is even for half of the i mod 8."""
    method = ReMoRA(targets=("attn.c_proj",), rank=1, cycles=cycles)
    model = tiny_model(n_embd=32, n_head=2)
    method.adapt(model)
    layers: Any = lora_layers(model)
    assert {layer.q for layer in layers.values()} == {8}
    method.before_training(model, [], 8)
    optimizer = torch.optim.SGD(method.trainable(model).values(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        with torch.no_grad():
            for layer in layers.values():
                layer.mora_M.normal_(generator=generator)
        method.after_step(model, step, optimizer)
    base = tiny_model(n_embd=32, n_head=2)
    assert {rank_of(change / 100) for change in changes_of(model, method, base).values()} == {rank}


def test_without_other_groups_the_sum_would_be_one_mora() -> None:
    one, two = layer_of(24, 48, 2, 0), layer_of(24, 48, 2, 0)
    with torch.no_grad():
        two.mora_M.copy_(one.mora_M.flip(0))
    total = change_of(one) + change_of(two)
    with torch.no_grad():
        one.mora_M.add_(two.mora_M)
    torch.testing.assert_close(change_of(one), total, atol=1e-5, rtol=1e-4)


def test_a_directory_knows_how_many_restarts_there_were(tmp_path: Path) -> None:
    method = ReMoRA(rank=2, cycles=3)
    model, _ = trained(method)
    method.save(model, tmp_path)
    back = tiny_model()
    loaded = load_adapter(back, tmp_path)
    assert loaded == method
    layers: Any = lora_layers(back)
    assert {int(layer.restarts) for layer in layers.values()} == {2}
    ids = batch_at(0).input_ids
    assert torch.equal(back(ids), model(ids))
    loaded.undo(back)
    assert_same(snapshot(back), snapshot(tiny_model()))


def test_it_trains_as_many_numbers_as_moras_square() -> None:
    method = ReMoRA(rank=2, targets=("c_attn",))
    model, _ = trained(method, steps=1)
    assert sum(p.numel() for p in method.trainable(model).values()) == 2 * 14**2  # q = round(sqrt(96 * 2)) = 14
