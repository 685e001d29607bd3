"""Laws of every method, on random models with random hyperparameters.

The methods are those of the registry, and the file of each says what the laws are tried on (`Method.sample`). What a
single method has to do beside these is in its own test file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.methods.registry import load_adapter, method_class, method_classes
from tests.helpers import tiny_config, tiny_model
from tests.test_method import assert_same, snapshot

Shape = dict[str, int]
Law = Callable[["Case"], None]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    heads = draw(st.integers(1, 3))
    return {
        "n_head": heads,
        "n_embd": heads * draw(st.sampled_from([4, 5, 8])),
        "n_layer": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(6, 30)),
    }


class Case:
    """A random base model, as often as it is wanted, a method for it, and some text."""

    def __init__(self, shape: Shape, method: Method, seed: int, rows: int, length: int) -> None:
        self.shape, self.method, self.seed = shape, method, seed
        self.tokens = torch.randint(0, shape["vocab_size"], (rows, length), generator=self.generator())

    def __repr__(self) -> str:
        return f"{self.method} on {self.shape}, seed {self.seed}, tokens {self.tokens.tolist()}"

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def base(self, std: float = 0.25) -> GPT2:
        return tiny_model(self.seed, std=std, **self.shape)

    def trained(self) -> GPT2:
        """Adapted, with whatever might have been learned: every learned number is moved at random, after a few steps
        of training where the method does something of its own after each step."""
        model, generator = self.base(), self.generator()
        self.method.adapt(model)
        if type(self.method).after_step is not Method.after_step:
            self.trainer(model).run()
            model.eval()
        with torch.no_grad():
            for parameter in self.method.trainable(model).values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def trainer(self, model: GPT2, stop: int = 0, **options: Any) -> Trainer:
        """Of a run of five steps; it is interrupted after step `stop`, if that is given."""
        batch = Batch(self.tokens, self.tokens)

        def batch_at(step: int) -> Batch:
            if stop and step == stop:
                raise KeyboardInterrupt
            return batch

        run = TrainingSettings(steps=5, learning_rate=1e-2, precision="fp32")
        return Trainer(model, batch_at, run, method=self.method, progress=False, **options)

    def logits(self, model: GPT2) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(self.tokens)
            return logits


def cases(cls: type[Method]) -> st.SearchStrategy[Case]:
    @st.composite
    def build(draw: st.DrawFn) -> Case:
        shape = draw(shapes())
        method = cls.sample(Random(draw(st.integers(0, 10**6))), tiny_config(**shape))
        return Case(shape, method, draw(st.integers(0, 999)), draw(st.integers(1, 3)), draw(st.integers(2, 8)))

    return build()


def try_law(law: Law, cls: type[Method], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None)
    @given(cases(cls))
    def holds(case: Case) -> None:
        law(case)

    holds()


LAWS: list[tuple[Law, Callable[[type[Method]], bool], int]] = []  # each with the methods that it is for, and examples


def for_every_method(examples: int, where: Callable[[type[Method]], bool] = lambda cls: True) -> Callable[[Law], Any]:
    """The law, tried on so many random cases of each method that it speaks of."""

    def decorate(law: Law) -> Any:
        LAWS.append((law, where, examples))

        @pytest.mark.parametrize("name", [name for name, cls in method_classes().items() if where(cls)])
        def test(name: str) -> None:
            try_law(law, method_classes()[name], examples)

        test.__name__, test.__doc__ = law.__name__, law.__doc__
        return test

    return decorate


@for_every_method(examples=15)
def test_at_the_start_nothing_changes_by_one_bit_where_the_method_says_so(case: Case) -> None:
    if case.method.starts_as_base() is not True:
        return
    model = case.base()
    before = case.logits(model)
    case.method.adapt(model)
    assert torch.equal(case.logits(model), before)


@for_every_method(examples=25, where=lambda cls: cls.name == "adapter")
def test_at_the_start_a_near_identity_changes_the_logits_by_less_than_a_thousandth(case: Case) -> None:
    if case.method.starts_as_base() is False:
        return
    model = case.base(std=0.1)
    before = case.logits(model)
    case.method.adapt(model)
    assert (case.logits(model) - before).abs().max() < 1e-3


@for_every_method(examples=15, where=lambda cls: cls.can_merge)
def test_merging_keeps_the_function_and_unmerging_gives_every_bit_back(case: Case) -> None:
    model, method = case.trained(), case.method
    before, logits = snapshot(model), case.logits(model)
    for _ in range(2):
        method.merge(model)
        torch.testing.assert_close(case.logits(model), logits, atol=1e-3, rtol=1e-3)
        method.unmerge(model)
        assert_same(snapshot(model), before)
        assert torch.equal(case.logits(model), logits)


@for_every_method(examples=8, where=lambda cls: cls.can_merge)
def test_a_merged_copy_computes_the_same_and_the_model_stays_as_it_was(case: Case) -> None:
    model = case.trained()
    before, logits = snapshot(model), case.logits(model)
    plain = case.method.merged_copy(model)
    torch.testing.assert_close(case.logits(plain), logits, atol=1e-3, rtol=1e-3)
    assert {name: type(m) for name, m in plain.named_modules()} == {n: type(m) for n, m in case.base().named_modules()}
    assert_same(snapshot(model), before)
    assert torch.equal(case.logits(model), logits)


@for_every_method(examples=2)
def test_a_run_that_is_interrupted_and_resumed_ends_the_same_bit_for_bit(case: Case) -> None:
    quiet, troubled, resumed = case.base(), case.base(), case.base()
    for model in (quiet, troubled, resumed):
        case.method.adapt(model)
    losses = case.trainer(quiet).run().losses
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"checkpoint": Path(directory) / "checkpoint.pt", "checkpoint_every": 1}
        with pytest.raises(KeyboardInterrupt):
            case.trainer(troubled, stop=1 + case.seed % 4, **options).run()
        assert case.trainer(resumed, **options).run().losses == losses
    assert_same(snapshot(resumed), snapshot(quiet))
    assert_same(case.method.state_dict(resumed), case.method.state_dict(quiet))


@for_every_method(examples=4)
def test_in_20_steps_frozen_tensors_have_no_gradient_and_do_not_move_by_one_bit(case: Case) -> None:
    model, method = case.base().train(), case.method
    of_the_base = {id(parameter) for parameter in model.parameters()}
    method.adapt(model)
    before, learned = snapshot(model), method.trainable(model)
    own = [name for name, parameter in learned.items() if id(parameter) in of_the_base]
    assert bool(own) == (method.trains_of_base() != "nothing")
    assert method.trains_of_base() in ("some", "everything") or all(name.endswith("bias") for name in own)
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        next_token_loss(model(case.tokens), case.tokens).backward()
        for name, parameter in model.named_parameters():
            assert name in learned or (parameter.grad is None and not parameter.requires_grad), name
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert moved <= set(learned)
    assert (set(before) == set(learned)) == (method.trains_of_base() == "everything")


@for_every_method(examples=8)
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(case: Case) -> None:
    model, again = case.trained(), case.base()
    with tempfile.TemporaryDirectory() as directory:
        case.method.save(model, directory)
        load_adapter(again, directory)
    assert torch.equal(case.logits(again), case.logits(model))


@for_every_method(examples=8)
def test_undoing_gives_the_base_back_bit_for_bit(case: Case) -> None:
    model, base = case.trained(), case.base()
    case.method.undo(model)
    assert_same(snapshot(model), snapshot(base))
    assert torch.equal(case.logits(model), case.logits(base))


# --- Directories that do not fit -------------------------------------------------------------------------

ADAPTERS = [name for name, cls in method_classes().items() if not cls.saves_model]


def saved_by(name: str, directory: Path) -> None:
    model = tiny_model()
    method = method_class(name).sample(Random(2), model.config)
    method.adapt(model)
    method.save(model, directory)


@pytest.mark.parametrize("other", [{"n_embd": 12}, {"n_layer": 1}, {"n_embd": 48, "n_layer": 3}], ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_another_model_is_refused_in_one_line_and_the_model_stays_as_it_was(
    kind: str, other: Shape, tmp_path: Path
) -> None:
    saved_by(kind, tmp_path)
    model, message = tiny_model(**other), r"another (one|model)|must be between|at most|layers must be"
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(snapshot(model), snapshot(tiny_model(**other)))
    assert [name for name, _ in model.named_modules()] == modules
    assert adaptation_of(model) is None


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_unknown_field_is_refused_with_its_value_and_the_fields_that_are_known(kind: str, tmp_path: Path) -> None:
    saved_by(kind, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"frobnicate": 3}))
    with pytest.raises(ValueError, match=r"frobnicate=3, which is not supported.*Supported fields: \w+"):
        load_adapter(tiny_model(), tmp_path)
