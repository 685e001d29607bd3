"""The pictures of digits: the data and its shifts, the two models, the methods on both, and surgical fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.pictures.diffusion import (
    STEPS,
    Denoiser,
    add_noise,
    denoising_loss,
    denoising_step,
    noise_levels,
    sample,
)
from lora_from_scratch.pictures.forgetting import forgotten
from lora_from_scratch.pictures.vit import ViT, from_patches, parts, to_patches

digits = pytest.importorskip("lora_from_scratch.pictures.digits")
pytest.importorskip("sklearn")

from lora_from_scratch.pictures import surgical, training  # noqa: E402


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- The data ---------------------------------------------------------------------------------------------------


def test_the_shifts_change_what_they_say_and_nothing_else() -> None:
    plain = digits.source("test")
    negative, other, renamed = (digits.shifted(kind, "train") for kind in digits.SHIFTS)
    assert torch.equal(negative.pictures, 1 - plain.pictures[:100])
    assert torch.equal(negative.labels, plain.labels[:100])
    assert torch.equal(renamed.pictures, plain.pictures[:100])
    assert torch.equal(renamed.labels, (plain.labels[:100] + 1) % 5)
    assert torch.equal(digits.nearest_digit(other.pictures), other.labels + 5)
    assert torch.equal(digits.nearest_digit(plain.pictures), plain.labels)


def test_no_picture_is_both_learned_from_and_tested_on() -> None:
    for kind in (None, *digits.SHIFTS):
        names = ("train", "test") if kind is None else ("train", "validation", "test")
        sets = [digits.source(name) if kind is None else digits.shifted(kind, name) for name in names]
        rows = [tuple(p.flatten().tolist()) for data in sets for p in data.pictures]
        assert len(set(rows)) == len(rows), kind
    learned = {tuple(p.flatten().tolist()) for p in digits.source("train").pictures}
    assert not learned & {tuple(p.flatten().tolist()) for p in digits.shifted("output", "train").pictures}


def test_grey_paper_is_a_milder_input_shift_of_the_same_pictures() -> None:
    grey, plain = digits.on_grey_paper("train"), digits.source("test")
    torch.testing.assert_close(grey.pictures, 0.4 + 0.6 * plain.pictures[:100])
    assert torch.equal(grey.labels, plain.labels[:100])


def test_a_wrong_shift_is_refused() -> None:
    with pytest.raises(ValueError, match="the shift must be one of input, feature, output, got 'colour'"):
        digits.shifted("colour", "train")


# --- The models -------------------------------------------------------------------------------------------------


def test_the_sizes_are_those_that_the_course_names() -> None:
    assert sum(p.numel() for p in ViT().parameters()) == 313_765
    assert sum(p.numel() for p in Denoiser().parameters()) == 209_988


def test_patches_are_squares_of_pixels_and_come_back() -> None:
    pictures = noise(3, 8, 8)
    assert torch.equal(to_patches(pictures)[:, 5], pictures[:, 2:4, 2:4].flatten(1))
    assert torch.equal(from_patches(to_patches(pictures)), pictures)


def test_patches_of_any_size_cover_a_picture_that_they_fill() -> None:
    pictures = noise(2, 6, 9)
    patches = to_patches(pictures, 3)
    assert patches.shape == (2, 6, 9)
    assert torch.equal(patches[1, 4], pictures[1, 3:6, 3:6].flatten())
    for sides in ((7, 9), (6, 8)):
        with pytest.raises(
            ValueError, match=f"patches of 3 x 3 pixels do not fill pictures of .{sides[0]}, {sides[1]}."
        ):
            to_patches(noise(2, *sides), 3)


def test_every_parameter_of_the_classifier_is_in_one_part() -> None:
    model = ViT()
    names = [name for part in parts(model).values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert list(parts(model)) == ["embedding", "block 1", "block 2", "block 3", "block 4", "head"]


def test_the_noise_levels_fall_from_the_picture_to_noise() -> None:
    levels = noise_levels()
    assert levels[0] == 1
    assert bool((levels[1:] < levels[:-1]).all())
    assert levels[-1] < 0.001
    x = torch.full((4000, 8, 8), 0.5)
    noisy = add_noise(x, torch.full((4000,), 50), noise(4000, 8, 8))
    assert noisy.mean().item() == pytest.approx(0.5 * levels[50].sqrt().item(), abs=0.01)
    assert noisy.var().item() == pytest.approx(1 - levels[50].item(), abs=0.01)


@pytest.mark.parametrize("t", [2, 30, 99])
def test_a_step_back_from_a_noisy_picture_gives_the_distribution_of_the_step_before(t: int) -> None:
    """If x_t is drawn given x_0, and x_{t - 1} given both, then x_{t - 1} is distributed as equation 4 says."""
    x, e = torch.full((200_000, 1, 1), 0.5), noise(200_000, 1, 1)
    back = denoising_step(add_noise(x, torch.full((len(x),), t), e), e, t, noise(200_000, 1, 1, seed=1))
    level = noise_levels()[t - 1].item()
    assert back.mean().item() == pytest.approx(0.5 * level**0.5, abs=0.01)
    assert back.var().item() == pytest.approx(1 - level, abs=0.01 + 0.01 * (1 - level))


def test_the_last_step_back_is_the_predicted_picture() -> None:
    x, e = noise(3, 8, 8), noise(3, 8, 8, seed=1)
    a = noise_levels()[1]
    wanted = ((x - (1 - a).sqrt() * e) / a.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(denoising_step(x, e, 1, noise(3, 8, 8, seed=2)), wanted)


class Oracle(torch.nn.Module):
    """Knows the picture, so it knows the noise."""

    def __init__(self, picture: torch.Tensor) -> None:
        super().__init__()
        self.picture = 2 * picture - 1

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = noise_levels()[t][:, None, None]
        return (x - a.sqrt() * self.picture) / (1 - a).sqrt()


def test_with_the_right_noise_the_loss_is_zero_and_sampling_finds_the_picture() -> None:
    picture = digits.source("test").pictures[3]
    oracle = Oracle(picture)
    loss = denoising_loss(oracle, picture.expand(64, -1, -1), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(sample(oracle, 2), picture.expand(2, -1, -1), atol=1e-3, rtol=0)
    assert STEPS == 100


# --- Pretrained, and adapted ------------------------------------------------------------------------------------


def test_the_pretrained_classifier_knows_the_digits_and_none_of_the_shifts() -> None:
    model = training.pretrained_vit()
    assert training.accuracy(model, digits.source("test")) > 0.95
    for kind in digits.SHIFTS:
        assert training.accuracy(model, digits.shifted(kind, "test")) < 0.5, kind


def test_the_pretrained_diffusion_model_draws_digits_of_many_kinds() -> None:
    made = sample(training.pretrained_denoiser(), 60)
    assert len(digits.nearest_digit(made).unique()) >= 8
    every = digits.load_digits().pictures
    rows = torch.randint(len(every), (60, 8, 8), generator=torch.Generator().manual_seed(0))
    mixed = every.gather(0, rows)  # each pixel from another picture: right pixel by pixel, and no digit
    assert digits.distance_to_digits(made).mean() < 0.9 * digits.distance_to_digits(mixed).mean()


def test_lora_teaches_the_classifier_new_classes_and_undoing_it_gives_the_old_ones_back() -> None:
    model, method = training.pretrained_vit(), LoRA(rank=4, alpha=16)
    data, before = digits.shifted("feature", "train"), training.accuracy(model, digits.source("test"))
    method.adapt(model)
    options: Any = {"steps": 100, "learning_rate": 3e-3, "batch_size": 20}
    training.train(model, data, training.classification_loss, method=method, **options)
    assert training.accuracy(model, digits.shifted("feature", "test")) > 0.7
    method.undo(model)
    assert training.accuracy(model, digits.source("test")) == before


def test_lora_moves_the_diffusion_model_to_one_digit() -> None:
    model, method = training.pretrained_denoiser(), LoRA(rank=4, alpha=8)
    every = digits.load_digits()
    sevens = every.rows(every.labels == 7)
    before = (digits.nearest_digit(sample(model, 40)) == 7).sum()
    method.adapt(model)
    training.train(model, sevens, training.diffusion_loss, steps=40, learning_rate=3e-3, method=method)
    after = (digits.nearest_digit(sample(model, 40)) == 7).sum()
    assert after > before + 10


def test_a_model_that_was_saved_and_loaded_is_the_same_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = training.pretrained_vit()
    training.save_pretrained(model, "vit", tmp_path)
    monkeypatch.setattr(training, "ASSETS", tmp_path)
    x = digits.source("test").pictures
    assert torch.equal(training.pretrained_vit()(x), model(x))  # the weights are in 16 bits already


# --- Forgetting ---


def test_only_what_was_known_can_be_forgotten() -> None:
    before, after, labels = (torch.tensor(row) for row in ([0, 0, 1, 1, 1, 2], [0, 1, 1, 0, 0, 2], [0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(forgotten(before, after, labels, 3), torch.tensor([0.5, 1.0, torch.nan]), equal_nan=True)


# --- Surgical fine-tuning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["embedding", "block 2", "head"])
def test_only_the_chosen_part_changes(choice: str) -> None:
    before, data = training.pretrained_vit().state_dict(), digits.shifted("output", "train")
    model = surgical.adapt(choice, data, 1e-3, steps=2)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [name for name, _ in model.named_parameters() if name in parts(model)[choice]]


def test_auto_rgn_changes_the_tensors_in_proportion_to_their_relative_gradients() -> None:
    model, data = training.pretrained_vit(), digits.shifted("output", "train")
    norms = surgical.relative_norms(model, data)
    assert list(norms) == [name for name, _ in model.named_parameters()]
    name, parameter = "head.weight", model.head.weight
    pieces = [data.rows(slice(i, i + surgical.BATCH_SIZE)) for i in range(0, 100, surgical.BATCH_SIZE)]
    gradients = [
        torch.autograd.grad(training.classification_loss(model, p, torch.Generator()), parameter)[0] for p in pieces
    ]
    expected = sum(g.norm() / parameter.norm() for g in gradients).item() / len(pieces)
    assert norms[name] == pytest.approx(expected, rel=1e-5)
    after = surgical.adapt("Auto-RGN", data, 1e-3, steps=1)
    moved = {n: (after.state_dict()[n] - p).abs().max().item() for n, p in model.named_parameters()}
    largest = max(norms, key=norms.__getitem__)
    assert moved[largest] == max(moved.values())


def test_the_relative_norm_of_a_part_is_that_of_all_its_tensors_together() -> None:
    model = ViT()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: -2 * p for name, p in weights.items()}
    assert surgical.relative_norm_of_parts(gradients, weights, parts(model)) == pytest.approx(
        dict.fromkeys(parts(model), 2.0)
    )
    del gradients["head.weight"]
    found = surgical.relative_norm_of_parts(gradients, weights, {"head": ["head.weight", "head.bias"]})["head"]
    size, rest = (float(weights[name].norm()) for name in ("head.weight", "head.bias"))
    assert found == pytest.approx(2 * rest / (size**2 + rest**2) ** 0.5)
    with pytest.raises(ValueError, match="all weights of nothing are zero, so its gradient has no relative size"):
        surgical.relative_norm_of_parts({}, {"a": torch.zeros(3)}, {"nothing": ["a"]})


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the choice must be one of embedding, block 1, .* got 'tail'"):
        surgical.adapt("tail", digits.shifted("output", "train"), 1e-3)
