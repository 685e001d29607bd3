"""LoReFT and DiReFT: the edit, the positions, and rows that stay orthonormal.

pyreft 0.1.0 wants transformers 4.45.1 and no other, so it cannot be installed beside ours. Compared outside this
repository with its `interventions.py` (stanfordnlp/pyreft, commit dafd099; d 128, r 4, float32, the same R, W and b,
R a plain parameter): the outputs of its LoreftIntervention differ by at most 3.6e-7 and the gradients of R by 1.9e-9,
those of W and b are equal bit for bit, and so is everything for its NodireftIntervention, the DiReFT of the paper.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2, KVCache
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.loreft import (
    Intervention,
    LoReFT,
    first_and_last,
    interventions,
    orthonormal_rows,
    reft_change,
)
from tests.helpers import real_checkpoint, tiny_model

END = 7  # ends a prompt


def edited(**fields: Any) -> tuple[GPT2, LoReFT]:
    """A model whose interventions do something."""
    method = LoReFT(rank=2, start="random", end_id=END, **fields)
    model = tiny_model()
    method.adapt(model)
    return model, method


def changed(model: GPT2, ids: list[list[int]], **named: Any) -> list[list[int]]:
    """At which positions the first block's output differs from the base's, for each text."""
    outputs: list[Tensor] = []
    for each in (model, tiny_model()):
        handle = each.transformer.h[0].register_forward_hook(lambda block, inputs, output: outputs.append(output))
        each(torch.tensor(ids), **named)
        handle.remove()
    return [row.nonzero().flatten().tolist() for row in (outputs[0] != outputs[1]).any(dim=-1)]


# --- The edit ------------------------------------------------------------------------------------------------


def test_loreft_sets_the_coordinates_in_the_subspace_and_leaves_the_rest_of_h() -> None:
    edit = Intervention(12, 3, "loreft", "random", torch.Generator().manual_seed(0))
    R, W, b = edit.loreft_R, edit.loreft_W, edit.loreft_b
    h = torch.randn(5, 2, 12)
    after = h + edit(h, None)
    torch.testing.assert_close(after, h + (h @ W.T + b - h @ R.T) @ R, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after @ R.T, h @ W.T + b, atol=1e-5, rtol=1e-5)
    outside = torch.eye(12) - R.T @ R
    torch.testing.assert_close(after @ outside, h @ outside, atol=1e-5, rtol=1e-5)


def test_direft_adds_what_r_makes_of_w_h_plus_b() -> None:
    edit = Intervention(12, 3, "direft", "random", torch.Generator().manual_seed(0))
    h = torch.randn(5, 2, 12)
    expected = (h @ edit.loreft_W.T + edit.loreft_b) @ edit.loreft_R
    torch.testing.assert_close(edit(h, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_the_change_is_zero_where_nothing_is_edited_and_the_formula_elsewhere(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(shape, generator=generator) for shape in ((2, 4, 6), (3, 6), (3,)))
    R = orthonormal_rows(torch.randn(3, 6, generator=generator))
    where = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()[..., None]
    change = reft_change(h, R, W, b, where, variant)
    for i in range(2):
        for j in range(4):
            z = W @ h[i, j] + b - (R @ h[i, j] if variant == "loreft" else 0)
            torch.testing.assert_close(change[i, j], R.T @ z if where[i, j] else torch.zeros(6))


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_a_start_as_the_base_is_not_dead_and_a_random_one_changes_the_hidden_states(variant: str) -> None:
    h = torch.randn(4, 6, 128, generator=torch.Generator().manual_seed(1))
    base = Intervention(128, 4, variant, "base", torch.Generator().manual_seed(0))
    assert not base(h, None).any()
    base(h, None).square().sum().backward()
    (base(h, None) * h).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in base.parameters())
    random = Intervention(128, 4, variant, "random", torch.Generator().manual_seed(0))
    share = float((random(h, None).norm() / h.norm()).detach())
    assert share == pytest.approx(0.2, abs=0.05) if variant == "loreft" else 0 < share < 0.2


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 999))
def test_the_nearest_matrix_with_orthonormal_rows(r: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(r, r + more, generator=generator)
    nearest = orthonormal_rows(R)
    torch.testing.assert_close(nearest @ nearest.T, torch.eye(r), atol=1e-5, rtol=0)
    for _ in range(5):  # none of some others is nearer
        other = torch.linalg.qr(torch.randn(r + more, r, generator=generator)).Q.T
        assert (R - nearest).norm() <= (R - other).norm() + 1e-5
    torch.testing.assert_close(orthonormal_rows(nearest), nearest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_after_training_the_rows_of_r_are_orthonormal_and_have_moved(variant: str) -> None:
    method = LoReFT(rank=3, variant=variant, positions="f2+l2", end_id=END)
    model = tiny_model()
    method.adapt(model)
    before = [edit.loreft_R.detach().clone() for edit in interventions(model)]
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    settings = TrainingSettings(steps=10, learning_rate=0.05, precision="fp32")
    Trainer(model, lambda step: Batch(ids, ids), settings, method=method, progress=False).run()
    for edit, old in zip(interventions(model), before, strict=True):
        R = edit.loreft_R.detach()
        assert (R - old).abs().max() > 0.01
        assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-5) == (variant == "loreft")


# --- The positions -------------------------------------------------------------------------------------------

TEXT = [1, 2, 3, 4, END, 5, 6, END, 8]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("f2", [0, 1]),
        ("l2", [3, 4]),  # up to the first END
        ("f1+l2", [0, 3, 4]),
        ("f3+l4", [0, 1, 2, 3, 4]),
        ("l9", [0, 1, 2, 3, 4]),
        ("all", list(range(9))),
    ],
)
@pytest.mark.parametrize("share_weights", [False, True])
def test_only_these_positions_of_the_prompt_are_edited(
    positions: str, expected: list[int], share_weights: bool
) -> None:
    model, _ = edited(positions=positions, share_weights=share_weights)
    assert changed(model, [TEXT]) == [expected]


def test_a_text_without_an_end_has_no_last_positions_and_padding_has_none() -> None:
    model, _ = edited(positions="f2+l2")
    assert changed(model, [[1, 2, 3, 4, 5]]) == [[0, 1]]
    padded, mask = [[END, END, 1, 2, 3, END, 4], [1, 2, 3, 4, END, 5, 6]], torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    assert changed(model, padded, attention_mask=mask) == [[2, 3, 4, 5], [0, 1, 3, 4]]


def test_two_edits_are_for_the_first_and_for_the_last_tokens() -> None:
    model, method = edited(positions="f2+l2", share_weights=False)
    assert sum(p.numel() for p in method.trainable(model).values()) == 2 * 2 * (2 * 2 * 24 + 2)  # blocks, edits
    with torch.no_grad():
        for edit in interventions(model)[::2]:
            edit.loreft_b.zero_()
            edit.loreft_W.copy_(edit.loreft_R)
    assert changed(model, [TEXT]) == [[3, 4]]
    one, shared = edited(positions="f2+l2")
    assert sum(p.numel() for p in shared.trainable(one).values()) == 2 * (2 * 2 * 24 + 2)


def test_only_the_chosen_blocks_are_edited() -> None:
    model, method = edited(positions="all", layers=(1,))
    assert changed(model, [TEXT]) == [[]]
    assert {name.split(".")[2] for name in method.trainable(model)} == {"1"}


def test_with_a_cache_the_logits_are_those_of_the_whole_text() -> None:
    model, _ = edited(positions="f6+l2")
    ids = torch.tensor([TEXT])
    cache = KVCache()
    with torch.no_grad():
        prompt, *others = model(ids[:, :5], cache=cache), *(model(ids[:, [i]], cache=cache) for i in range(5, 9))
        torch.testing.assert_close(torch.cat([prompt, *others], dim=1), model(ids), atol=1e-4, rtol=1e-4)


def test_generating_a_batch_gives_what_each_text_gives_alone() -> None:
    model, _ = edited(positions="f2+l2", share_weights=False)
    prompts = [[1, 2, 3, END], [4, END], [9, 10, 11, 12, 13, END]]
    together = generate(model, prompts, max_new_tokens=6)
    assert together == [generate(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_a_prompt_of_a_card_ends_with_the_tokenizers_line_break() -> None:
    tokenizer = Tokenizer.from_directory(real_checkpoint())
    method = LoReFT().for_tokenizer(tokenizer)
    assert tokenizer.encode("hero[fox]\n")[-1] == method.end_id
    assert tokenizer.decode([method.end_id]) == "\n"


def test_a_deep_copy_has_positions_of_its_own_and_undoing_it_leaves_no_hook() -> None:
    model, method = edited(positions="f2+l2")
    expected = model(torch.tensor([TEXT]))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(torch.tensor([TEXT])), expected)
    twin(torch.tensor([[END, 1]]))
    assert changed(model, [TEXT]) == [[0, 1, 3, 4]]
    method.undo(twin)
    assert not twin._forward_pre_hooks
    assert torch.equal(twin(torch.tensor([TEXT])), tiny_model()(torch.tensor([TEXT])))
    assert torch.equal(model(torch.tensor([TEXT])), expected)


def test_embeddings_without_ids_are_refused() -> None:
    model, _ = edited()
    with pytest.raises(ValueError, match="finds the end of the prompt in input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 24))


# --- What is refused -----------------------------------------------------------------------------------------


def test_the_notation_of_positions() -> None:
    assert [first_and_last(text) for text in ("f7+l7", "f1", "l3", "f0+l2")] == [(7, 7), (1, 0), (0, 3), (0, 2)]
    for text in ("", "f0", "f7l7", "l7+f7", "7", "f-1", "+l3"):
        with pytest.raises(ValueError, match="positions must be"):
            first_and_last(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 25}, "rank .* 24"),
        ({"variant": "noreft"}, "variant must be one of loreft, direft, got 'noreft'"),
        ({"start": "zero"}, "start must be one of base, random, got 'zero'"),
        ({"positions": "first"}, "positions must be"),
        ({"layers": (2,)}, "layers must be from 0 to 1"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LoReFT(**fields).adapt(tiny_model())
    assert "\n" not in str(error.value)
