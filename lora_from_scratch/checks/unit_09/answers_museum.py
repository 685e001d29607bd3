"""Unit 09: tests that people write of how a LoRA layer starts."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch

from lora_from_scratch.checks.bank import right, wrong

WIDE, TALL = (3000, 40, 5), (200, 600, 40)  # more inputs than outputs, and more outputs than inputs


def width(A, in_features) -> float:
    """How wide A is, as a multiple of what it should be."""
    return float(A.detach().std()) * (3 * in_features) ** 0.5


def width_is_right(layer, in_features) -> None:
    assert 0.8 < width(layer.A, in_features) < 1.25


# --- Right -------------------------------------------------------------------------------------------


@right("test_lora_start")
def by_the_mean_square(LoRALayer):
    for in_features, out_features, rank in (WIDE, TALL):
        layer = LoRALayer(in_features, out_features, rank, 8)
        mean_square = layer.A.square().mean().item() * 3 * in_features
        assert abs(mean_square - 1) < 0.4
        assert layer.B.count_nonzero() == 0


@right("test_lora_start")
def by_what_A_gives(LoRALayer):
    torch.manual_seed(5)
    for in_features, out_features, rank in ((50, 1000, 20), (1000, 50, 20)):
        layer = LoRALayer(in_features, out_features, rank, 3.0)
        A = layer.A if layer.A.shape[1] == in_features else layer.A.T
        h = torch.randn(2000, in_features) @ A.T
        assert 0.25 < float(h.var()) < 0.42
        assert torch.equal(layer.B, torch.zeros_like(layer.B))


@right("test_lora_start")
def over_many_shapes(LoRALayer):
    faults = []
    for in_features in (64, 256, 2048):
        for out_features in (16, 4096):
            for rank in (8, 16):
                layer = LoRALayer(in_features, out_features, rank, 32)
                numbers = layer.A.flatten().tolist()
                deviation = math.sqrt(sum(number**2 for number in numbers) / len(numbers))
                if not 0.8 < deviation * math.sqrt(3 * in_features) < 1.25:
                    faults.append(f"A: {in_features}, {out_features}, {rank}")
                if any(number != 0 for number in layer.B.flatten().tolist()):
                    faults.append(f"B: {in_features}, {out_features}, {rank}")
    assert not faults, faults


@right("test_lora_start")
def as_a_class_of_checks(LoRALayer):
    class Start:
        def __init__(self, *sizes):
            self.inputs = sizes[0]
            self.layer = LoRALayer(*sizes, alpha=2)

        def wide(self):
            return width(self.layer.A, self.inputs) > 1.3

        def narrow(self):
            return width(self.layer.A, self.inputs) < 0.75

        def moved(self):
            return bool((self.layer.B != 0).any())

    for start in (Start(*WIDE), Start(*TALL)):
        if start.wide() or start.narrow() or start.moved():
            raise AssertionError(vars(start))


@right("test_lora_start")
def against_a_linear_layer(LoRALayer):
    """`nn.Linear` starts with the same bound."""
    torch.manual_seed(1)
    for sizes in (WIDE, TALL):
        linear, layer = torch.nn.Linear(sizes[0], 100), LoRALayer(*sizes, 7)
        assert 0.8 < layer.A.std() / linear.weight.std() < 1.25
        torch.testing.assert_close(layer.B, torch.zeros_like(layer.B), rtol=0, atol=0)


# --- Wrong -------------------------------------------------------------------------------------------


@wrong("test_lora_start", "Your test passes every layer, the faulty ones too: it never raises an AssertionError.")
def never_fails(LoRALayer):
    layer = LoRALayer(*WIDE, 8)
    return 0.8 < width(layer.A, WIDE[0]) < 1.25 and not layer.B.any()


@wrong(
    "test_lora_start", "Your test refuses every layer, the sound ones too. Do you compare random numbers for equality?"
)
def always_fails(LoRALayer):
    layer = LoRALayer(*WIDE, 8)
    assert layer.A.std().item() == (3 * WIDE[0]) ** -0.5


@wrong(
    "test_lora_start",
    "Your test looks only at B, or at the output, which does not show A as long as B is zero. The fault is in A.",
)
def only_B(LoRALayer):
    for sizes in (WIDE, TALL):
        assert not LoRALayer(*sizes, 8).B.any()


@wrong("test_lora_start", "Your test looks only at A. If B is not zero, the layer does not start as the base model.")
def only_A(LoRALayer):
    for sizes in (WIDE, TALL):
        width_is_right(LoRALayer(*sizes, 8), sizes[0])


@wrong(
    "test_lora_start",
    "Your test finds an A that is too wide, but not one that is too narrow, such as an A of zeros.",
)
def only_too_wide(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        assert width(layer.A, sizes[0]) < 1.25
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test demands that every entry of A is between -1/sqrt(in) and 1/sqrt(in). Normal numbers of the right "
    "standard deviation may be larger, and an A that is too narrow stays inside. Measure the standard deviation.",
)
def only_the_bound(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        assert layer.A.abs().max().item() <= sizes[0] ** -0.5 + 1e-6
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test measures the largest entry of A. For numbers that are not uniform it says little about their width: "
    "measure the standard deviation.",
)
def the_largest_entry(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        assert 0.8 < layer.A.abs().max().item() * sizes[0] ** 0.5 < 1.25
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test expects the standard deviation 1/sqrt(in). That is the bound; uniform numbers up to a bound have a "
    "standard deviation of bound / sqrt(3).",
)
def the_bound_is_the_deviation(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        assert 0.8 < layer.A.std().item() * sizes[0] ** 0.5 < 1.25
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test tries only layers with more inputs than outputs. A width that is computed from the larger of the two is "
    "right there.",
)
def more_inputs_than_outputs(LoRALayer):
    for sizes in (WIDE, (600, 100, 40)):
        layer = LoRALayer(*sizes, 8)
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test tries only layers with more outputs than inputs. A width that is computed from the smaller of the two "
    "is right there.",
)
def more_outputs_than_inputs(LoRALayer):
    for sizes in (TALL, (400, 2000, 20)):
        layer = LoRALayer(*sizes, 8)
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test tries only square layers. There a width that is computed from the outputs looks right.",
)
def square_layers(LoRALayer):
    for sizes in ((400, 400, 10), (1600, 1600, 20)):
        layer = LoRALayer(*sizes, 8)
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test uses a rank as large as the number of inputs, with which a width that is computed from the rank looks "
    "right.",
)
def the_rank_is_the_width(LoRALayer):
    for sizes in ((200, 600, 200), (200, 100, 200)):
        layer = LoRALayer(*sizes, 8)
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test uses an alpha of 1, with which a width that is divided by alpha looks right.",
)
def alpha_is_one(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 1)
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test demands that A is stored as (r, in). A sound layer may store it as (in, r) too.",
)
def a_certain_shape(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        assert layer.A.shape == (sizes[2], sizes[0])
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test demands that the entries of A are uniform or normal. A sound layer may draw them otherwise, as long as "
    "their standard deviation is right.",
)
def many_different_numbers(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        assert len(set(layer.A.flatten().tolist())) > 100
        width_is_right(layer, sizes[0])
        assert not layer.B.any()


@wrong(
    "test_lora_start",
    "Your test looks at the mean of B, which may be about zero although B is not.",
)
def the_mean_of_B(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        width_is_right(layer, sizes[0])
        assert abs(layer.B.mean().item()) < 0.1


@wrong("test_lora_start", caught_by="raises")
def another_exception(LoRALayer):
    for sizes in (WIDE, TALL):
        layer = LoRALayer(*sizes, 8)
        if not 0.8 < width(layer.A, sizes[0]) < 1.25 or layer.B.any():
            raise ValueError("a wrong start")
