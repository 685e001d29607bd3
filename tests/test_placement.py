"""What a choice of matrices and a rank cost: counted as LoRA itself counts, and against the papers' numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.placement import lora_parameter_count, rank_for_budget, target_sizes

SHAPES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}  # layers, d, heads
TARGETS = (
    ("c_attn",),
    ("c_attn.q", "c_attn.v"),
    ("c_attn.k", "attn.c_proj"),
    ("c_attn", "c_fc", "c_proj"),
    r".*h\.1.*c_attn\.[kv]",
    "all-linear",
)
few = settings(max_examples=30, deadline=None)


def blank(size: str) -> GPT2:
    n_layer, n_embd, n_head = SHAPES[size]
    with torch.device("meta"):
        return GPT2(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head))


@pytest.mark.parametrize(("size", "count"), [("small", 147_456), ("medium", 393_216), ("large", 737_280)])
def test_rank_four_on_q_and_v_of_the_gpt2s_counts_as_in_the_literature(size: str, count: int) -> None:
    assert lora_parameter_count(target_sizes(blank(size), ("c_attn.q", "c_attn.v")), rank=4) == count


def test_the_papers_budget_is_equal_for_its_seven_placements_on_gpt3() -> None:
    one_matrix = [(12288, 12288)] * 96  # GPT-3: 96 blocks of width 12,288 (Hu et al., table 5: 18M)
    counts = {lora_parameter_count(one_matrix * kinds, rank) for kinds, rank in ((1, 8), (2, 4), (4, 2))}
    assert counts == {18_874_368}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_count_is_what_lora_trains(targets: tuple[str, ...] | str, rank: int) -> None:
    model = blank("small")
    counted = lora_parameter_count(target_sizes(model, targets), rank)
    method = LoRA(rank=rank, targets=targets)
    method.adapt(model)
    assert counted == sum(p.numel() for p in method.trainable(model).values())


def test_sizes_are_in_and_out_and_a_part_is_a_matrix_of_its_own() -> None:
    model = blank("small")
    assert target_sizes(model, ("h.0.mlp.c_fc",)) == [(768, 3072)]
    assert target_sizes(model, ("h.0.mlp.c_proj",)) == [(3072, 768)]
    assert target_sizes(model, ("h.0.attn.c_attn",)) == [(768, 2304)]
    assert target_sizes(model, ("h.0.attn.c_attn.v",)) == [(768, 768)]


@few
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 400))
def test_the_rank_for_a_budget_fits_and_the_next_one_does_not(sizes: list[tuple[int, int]], budget: int) -> None:
    largest = min(min(size) for size in sizes)
    fitting = [rank for rank in range(1, largest + 1) if lora_parameter_count(sizes, rank) <= budget]
    if fitting:
        assert rank_for_budget(sizes, budget) == max(fitting)
    else:
        with pytest.raises(ValueError, match=rf"at least .*, got {budget}"):
            rank_for_budget(sizes, budget)
