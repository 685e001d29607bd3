"""Unit 15, a layer that merges itself and its test: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.museum.unmerge_by_subtraction import MergingLinear, test_merging_linear

# --- MergingLinear -----------------------------------------------------------------------------------


def change(layer: MergingLinear) -> torch.Tensor:
    return (layer.scaling * layer.lora_B @ layer.lora_A).detach()


@right("MergingLinear")
class KeepsACopy(MergingLinear):
    def train(self, mode: bool = True):
        nn.Module.train(self, mode)
        if mode == (self.W is None):
            return self
        if mode:
            self.weight.data.copy_(self.W)
            self.W = None
        else:
            self.W = self.weight.detach().clone()
            self.weight.data.addmm_(self.lora_B.detach(), self.lora_A.detach(), alpha=self.scaling)
        return self


@right("MergingLinear")
class ReturnsWhatNnLinearReturns(MergingLinear):
    @torch.no_grad()
    def train(self, mode: bool = True):
        if not mode:
            frozen = self.weight.data if self.W is None else self.W
            if self.W is None:
                self.weight.data = frozen + self.scaling * (self.lora_B @ self.lora_A)
            self.W = frozen
        elif self.W is not None:
            self.weight.data = self.W
            self.W = None
        return nn.Linear.train(self, mode)


@right("MergingLinear")
class SumsInDoublePrecision(MergingLinear):
    def train(self, mode: bool = True):
        was_merged = isinstance(self.W, torch.Tensor)
        if was_merged and mode:
            W, self.W = self.W, None
            self.weight.data = W
        if not was_merged and not mode:
            W = copy.deepcopy(self.weight.data)
            added = self.scaling * self.lora_B.double() @ self.lora_A.double()
            self.weight.data = (W.double() + added.detach()).type_as(W)
            self.W = W
        self.training = mode
        return self


@right("MergingLinear")
class AsksWhetherTheModeChanges(MergingLinear):
    def train(self, mode: bool = True):
        before = self.training
        layer = nn.Module.train(self, mode)
        if before and not mode:
            self.W = self.weight.data
            self.weight.data = torch.stack([self.W, change(self)]).sum(dim=0)
        if mode and not before:
            self.weight.data = self.W
            self.W = None
        return layer


@wrong(
    "MergingLinear",
    "You subtract s B A. W comes back only up to rounding, and not at all if A or B has changed in the meantime.",
)
class SubtractsAgain(MergingLinear):
    def train(self, mode: bool = True):
        nn.Module.train(self, mode)
        if mode and self.W is not None:
            self.weight.data = self.weight.data - change(self)
            self.W = None
        elif not mode and self.W is None:
            self.W = self.weight.data
            self.weight.data = self.W + change(self)
        return self


@wrong("MergingLinear", "You subtract the s B A that was added. W comes back only up to rounding.")
class SubtractsWhatWasAdded(MergingLinear):
    def train(self, mode: bool = True):
        nn.Module.train(self, mode)
        if mode and self.W is not None:
            self.weight.data = self.weight.data - self.added
            self.W = None
        elif not mode and self.W is None:
            self.W, self.added = self.weight.data, change(self)
            self.weight.data = self.W + self.added
            return self
        if hasattr(self, "added"):
            self.added = self.added.to(self.weight.dtype)
        return self


@wrong("MergingLinear", "`train` returns nothing, and so does `eval()`: then `layer = layer.eval()` is None.")
@changed(MergingLinear, ("        return self\n", ""))
class ReturnsNothing: ...


@wrong("MergingLinear", "`train` should return the layer. Yours returns its weight.")
@changed(MergingLinear, ("return self\n", "return self.weight\n"))
class ReturnsTheWeight: ...


@wrong(
    "MergingLinear",
    "A second `eval()` adds s B A again. What is merged is not merged once more: look at `self.W`.",
)
@changed(MergingLinear, ("elif not mode and self.W is None:", "elif not mode:"))
class MergesTwice: ...


@wrong(
    "MergingLinear",
    "A `train()` without an `eval()` before it puts None in the place of the weight. There is nothing to put back.",
)
@changed(MergingLinear, ("if mode and self.W is not None:", "if mode:"))
class UnmergesWhatIsNotMerged: ...


@wrong("MergingLinear", "The scaling is missing in what you add.")
@changed(MergingLinear, ("self.W + self.scaling * (self.lora_B @ self.lora_A)", "self.W + self.lora_B @ self.lora_A"))
class NoScaling: ...


@wrong("MergingLinear", "`self.W` still holds W after `train()`, so that the layer counts as merged for ever.")
@changed(MergingLinear, ("self.weight.data, self.W = self.W, None", "self.weight.data = self.W"))
class StaysMerged: ...


@wrong("MergingLinear", "You merge in training mode and not in evaluation mode: `mode` is True for training.")
@changed(
    MergingLinear,
    ("if mode and self.W is not None:", "if not mode and self.W is not None:"),
    ("elif not mode and self.W is None:", "elif mode and self.W is None:"),
)
class TheModesAreExchanged: ...


@wrong("MergingLinear", "The mode is never set: `training` stays True. Call `train` of the class above.")
@changed(MergingLinear, ("super().train(mode)\n", "pass\n"))
class ForgetsTheMode: ...


@wrong("MergingLinear", "You add in place to the tensor that you keep: W and the merged weight are one tensor.")
@changed(
    MergingLinear,
    (
        "self.weight.data = self.W + self.scaling * (self.lora_B @ self.lora_A)",
        "self.weight.data += self.scaling * (self.lora_B @ self.lora_A)",
    ),
)
class AddsToWhatItKeeps: ...


@wrong("MergingLinear", "`weight` is a new parameter after `train()` or `eval()`. Change the `.data` of the old one.")
class ANewParameter(MergingLinear):
    def train(self, mode: bool = True):
        nn.Module.train(self, mode)
        if mode and self.W is not None:
            self.weight, self.W = nn.Parameter(self.W, requires_grad=False), None
        elif not mode and self.W is None:
            self.W = self.weight.data
            self.weight = nn.Parameter(self.W + change(self), requires_grad=False)
        return self


@wrong("MergingLinear", "Nothing is merged in evaluation mode: the weight stays W.")
class NeverMerges(MergingLinear):
    def train(self, mode: bool = True):
        return nn.Module.train(self, mode)


# --- test_merging_linear -----------------------------------------------------------------------------

FILLED = "layer.lora_B.normal_()  # with the B of the start, zero, merging would change nothing"


def made(MergingLinear):
    """A layer with a B that is not zero, its W, and W + s B A."""
    layer = MergingLinear(40, 30, 3, 1.5)
    layer.lora_B.data = torch.randn(30, 3)
    W = layer.weight.data.clone()
    return layer, W, W + (layer.scaling * layer.lora_B @ layer.lora_A).data


@right("test_merging_linear")
def one_fault_after_the_other(MergingLinear) -> None:
    layer, W, merged = made(MergingLinear)
    assert layer.eval() is layer
    assert layer.train() is layer
    for calls in (["eval"], ["eval", "eval"]):
        layer, W, merged = made(MergingLinear)
        for call in calls:
            getattr(layer, call)()
        torch.testing.assert_close(layer.weight.data, merged)
    for calls in (["eval", "train"], ["eval", "train", "train"], ["eval", "train"] * 4):
        layer, W, merged = made(MergingLinear)
        for call in calls:
            getattr(layer, call)()
        assert (layer.weight == W).all()
    layer, W, merged = made(MergingLinear)
    layer.eval()
    layer.lora_B.data.zero_()
    layer.train()
    assert (layer.weight == W).all()


@right("test_merging_linear")
def by_bytes(MergingLinear) -> None:
    layer, _, merged = made(MergingLinear)

    def bits() -> bytes:
        return layer.weight.detach().numpy().tobytes()

    before = bits()
    for _ in range(2):
        if layer.eval() is not layer or (layer.weight - merged).abs().max() > 1e-3:
            raise AssertionError
    layer.lora_A.data += 1
    for _ in range(2):
        if layer.train() is not layer or bits() != before:
            raise AssertionError


@right("test_merging_linear")
def with_train_false(MergingLinear) -> None:
    torch.manual_seed(1)
    layer = MergingLinear(in_features=100, out_features=50, rank=8, scaling=4.0)
    nn.init.normal_(layer.lora_B)
    W = copy.deepcopy(layer.weight)
    for step in range(5):
        nn.init.normal_(layer.lora_A)
        change = (4.0 * layer.lora_B @ layer.lora_A).detach()
        assert [layer.train(False), layer.eval()] == [layer, layer]
        assert torch.allclose(layer.weight - W, change, atol=1e-3)
        nn.init.normal_(layer.lora_A)
        assert [layer.train(True), layer.train()] == [layer, layer]
        assert torch.equal(layer.weight, W)


@right("test_merging_linear")
def collects_all_faults_first(MergingLinear) -> None:
    layer, W, merged = made(MergingLinear)
    faults = []
    for call in (layer.eval, layer.eval, layer.train, layer.train, layer.eval):
        if call() is not layer:
            faults.append("returns another thing")
        wanted = W if layer.training else merged
        if not torch.isclose(layer.weight, wanted, atol=1e-4).all():
            faults.append("another weight")
        if layer.training and layer.weight.ne(W).any():
            faults.append("another last bit")
    layer.lora_A.data.neg_()
    layer.train()
    if layer.weight.ne(W).any():
        faults.append("depends on A")
    assert not faults, faults


@wrong(
    "test_merging_linear",
    "You compare W with `allclose`. The fault is in the last bits: it has to be equal in every one of them.",
)
@changed(
    test_merging_linear,
    (
        'assert torch.equal(layer.weight, W), "after an evaluation the weight is not W"',
        "assert torch.allclose(layer.weight, W, atol=1e-5)",
    ),
    (
        'assert torch.equal(layer.weight, W), "a second train() changes the weight"',
        "assert torch.allclose(layer.weight, W, atol=1e-5)",
    ),
)
def up_to_rounding(): ...


@wrong(
    "test_merging_linear",
    "B is zero in your layer, as at the start, so that merging changes nothing and hardly any fault shows.",
)
def with_a_b_of_zeros(MergingLinear) -> None:
    layer = MergingLinear(40, 30, 3, 1.5)
    layer.lora_B.data.zero_()
    W = layer.weight.data.clone()
    for _ in range(2):
        assert layer.eval() is layer
        assert torch.allclose(layer.weight, W + (1.5 * layer.lora_B @ layer.lora_A), atol=1e-4)
    layer.lora_A.data.mul_(2)
    for _ in range(2):
        assert layer.train() is layer
        assert torch.equal(layer.weight, W)


@wrong("test_merging_linear", "You do not look at what `eval()` and `train()` return.")
@changed(
    test_merging_linear,
    ('assert evaluated is layer, f"eval() returns {evaluated}"', "pass"),
    ('assert trained is layer, f"train() returns {trained}"', "pass"),
)
def what_is_returned_is_ignored(): ...


@wrong("test_merging_linear", "You look at what `eval()` returns and not at what `train()` does.")
@changed(test_merging_linear, ('assert trained is layer, f"train() returns {trained}"', "pass"))
def what_train_returns_is_ignored(): ...


@wrong("test_merging_linear", "That something is returned is not enough. It has to be the layer.")
@changed(
    test_merging_linear,
    ("assert evaluated is layer", "assert evaluated is not None"),
    ("assert trained is layer", "assert trained is not None"),
)
def anything_but_none(): ...


@wrong(
    "test_merging_linear",
    "You never look at the weight in evaluation mode. A layer that merges nothing, or something else, passes.",
)
@changed(
    test_merging_linear,
    ('assert torch.allclose(layer.weight, merged, atol=1e-4), "eval() does not merge"', "pass"),
    ('assert torch.allclose(layer.weight, merged, atol=1e-4), "a second eval() changes the weight"', "pass"),
)
def the_merged_weight_is_ignored(): ...


@wrong("test_merging_linear", "That the weight has changed is not enough. It has to be W + s B A.")
@changed(
    test_merging_linear,
    (
        'assert torch.allclose(layer.weight, merged, atol=1e-4), "eval() does not merge"',
        "assert not layer.weight.equal(W)",
    ),
    (
        'assert torch.allclose(layer.weight, merged, atol=1e-4), "a second eval() changes the weight"',
        "assert not layer.weight.equal(W)",
    ),
)
def some_change_is_enough(): ...


@wrong(
    "test_merging_linear",
    "You demand W + s B A bit for bit. A sound layer may form the sum in another order or in float64.",
)
@changed(
    test_merging_linear,
    (
        'assert torch.allclose(layer.weight, merged, atol=1e-4), "eval() does not merge"',
        "assert torch.equal(layer.weight, merged)",
    ),
    (
        'assert torch.allclose(layer.weight, merged, atol=1e-4), "a second eval() changes the weight"',
        "assert torch.equal(layer.weight, merged)",
    ),
)
def the_merged_weight_bit_for_bit(): ...


@wrong("test_merging_linear", "A and B are the same at `train()` as at `eval()`. What if they have changed?")
@changed(test_merging_linear, ("layer.lora_A.mul_(2)", "pass"))
def the_factors_stay(): ...


@wrong("test_merging_linear", "You call `eval()` only once. A second call might merge again.")
@changed(test_merging_linear, ('merge"\n    layer.eval()\n', 'merge"\n'))
def one_eval(): ...


@wrong("test_merging_linear", "You call `train()` only once after the evaluation. A second call might unmerge again.")
@changed(test_merging_linear, ('is not W"\n    layer.train()\n', 'is not W"\n'))
def one_train(): ...


@wrong(
    "test_merging_linear",
    "You compare the weight with itself: `layer.weight.data` is no copy, and changes with the layer. Clone it.",
)
@changed(test_merging_linear, ("W = layer.weight.detach().clone()", "W = layer.weight"))
def w_is_not_a_copy(): ...


@wrong(
    "test_merging_linear",
    "Your test reads an attribute that only some layers have. Look only at what the statement promises.",
)
@changed(
    test_merging_linear,
    ('assert torch.allclose(layer.weight, merged, atol=1e-4), "eval() does not merge"', "assert layer.W is not None"),
)
def reads_the_mended_layers_attribute(): ...


@wrong("test_merging_linear", "Your test fails every layer, the sound ones as well.")
def fails_everything(MergingLinear) -> None:
    raise AssertionError


@wrong(
    "test_merging_linear",
    "Your test passes every layer: nothing in it raises an AssertionError. What it returns does not count.",
)
def asserts_nothing(MergingLinear) -> None:
    layer = MergingLinear(4, 3, 2)
    layer.eval()
    layer.train()


@wrong("test_merging_linear", "Your test ends with another exception than an AssertionError for a faulty layer.")
def raises_value_errors(MergingLinear) -> None:
    try:
        test_merging_linear(MergingLinear)
    except AssertionError as error:
        raise ValueError("faulty") from error
