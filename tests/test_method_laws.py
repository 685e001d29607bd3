"""Laws of every method, on random models with random hyperparameters.

Each law is tried on every method that it speaks of, by hypothesis. What a single method has to do beside these is in
its own test file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_from_scratch.methods.registry import METHODS, load_adapter, method_class
from lora_from_scratch.methods.spafit import SPAFIT
from torch import Tensor

from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.methods.prefix_tuning import PrefixTuning
from lora_from_scratch.methods.prompt_tuning import PromptTuning
from lora_from_scratch.methods.qlora import QLoRA
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot

Shape = dict[str, int]

WHOLE_LAYERS: list[Any] = ["all-linear", ("c_attn",), ("mlp.c_proj", "c_fc"), r".*h\.0\..*c_proj"]
PARTS: list[Any] = [("c_attn.q",), ("c_attn.q", "c_attn.v"), ("c_attn.v", "c_fc")]


def a_lora(draw: Any, targets: list[Any]) -> dict[str, Any]:
    """Hyperparameters; the width is at least 4, so that a rank of 2 fits even two parts of c_attn."""
    return {
        "rank": draw(st.integers(1, 2)),
        "alpha": draw(st.floats(0.1, 20)),
        "targets": draw(st.sampled_from(targets)),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "rslora": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def a_qlora(draw: Any) -> QLoRA:
    return QLoRA(
        **a_lora(draw, WHOLE_LAYERS),
        quant_type=draw(st.sampled_from(["nf4", "fp4"])),
        blocksize=draw(st.sampled_from([32, 64])),
        double_quantization=draw(st.booleans()),
        loftq_iterations=draw(st.integers(0, 1)),
    )


def a_prompt(draw: Any) -> PromptTuning:
    return PromptTuning(draw(st.integers(1, 4)), init=draw(st.sampled_from(["random", "vocabulary"])))


def a_prefix(draw: Any) -> PrefixTuning:
    return PrefixTuning(draw(st.integers(1, 4)), reparametrise=draw(st.booleans()), hidden=draw(st.integers(1, 5)))


def a_llama_adapter(draw: Any, shape: Shape) -> LlamaAdapter:
    layers = draw(st.one_of(st.none(), st.integers(1, shape["n_layer"])))
    return LlamaAdapter(draw(st.integers(1, 4)), layers, as_peft=draw(st.booleans()))


def an_adapter(draw: Any, shape: Shape, variants: list[str]) -> Adapter:
    return Adapter(width=draw(st.integers(1, shape["n_embd"])), variant=draw(st.sampled_from(variants)))


def a_spafit(draw: Any, shape: Shape) -> SPAFIT:
    biased = draw(st.integers(0, shape["n_layer"] - 1))
    frozen = draw(st.integers(0, shape["n_layer"] - 1 - biased))
    return SPAFIT(frozen_layers=frozen, bias_layers=biased, rank=draw(st.integers(1, 2)))


KINDS: dict[str, Callable[[Any, Shape], Method]] = {
    "full": lambda draw, shape: FullFineTuning(),
    "lora": lambda draw, shape: LoRA(**a_lora(draw, WHOLE_LAYERS + PARTS)),
    "qlora": lambda draw, shape: a_qlora(draw),
    "prompt": lambda draw, shape: a_prompt(draw),
    "prefix": lambda draw, shape: a_prefix(draw),
    "llama-adapter": a_llama_adapter,
    "adapter": lambda draw, shape: an_adapter(draw, shape, ["houlsby", "pfeiffer", "lin", "parallel"]),
    "parallel adapter": lambda draw, shape: an_adapter(draw, shape, ["parallel"]),
    "bitfit": lambda draw, shape: BitFit(variant=draw(st.sampled_from(["all", "two"]))),
    "spafit": a_spafit,
}
EXACT_AT_THE_START = ["full", "lora", "llama-adapter", "parallel adapter", "bitfit", "spafit"]
EVERY = [kind for kind in KINDS if kind != "parallel adapter"]


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
        """Adapted, with whatever might have been learned: every learned number is moved at random."""
        model, generator = self.base(), self.generator()
        self.method.adapt(model)
        with torch.no_grad():
            for parameter in self.method.trainable(model).values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def logits(self, model: GPT2) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(self.tokens)
            return logits


def cases(kind: str) -> st.SearchStrategy[Case]:
    @st.composite
    def build(draw: st.DrawFn) -> Case:
        shape = draw(shapes())
        return Case(
            shape, KINDS[kind](draw, shape), draw(st.integers(0, 999)), draw(st.integers(1, 3)), draw(st.integers(2, 8))
        )

    return build()


def for_each(kinds: list[str], examples: int) -> Callable[[Callable[[Case], None]], Any]:
    """The law, tried on so many random cases of each kind of method."""

    def decorate(law: Callable[[Case], None]) -> Any:
        @pytest.mark.parametrize("kind", kinds)
        def test(kind: str) -> None:
            @settings(max_examples=examples, deadline=None, database=None)
            @given(cases(kind))
            def holds(case: Case) -> None:
                law(case)

            holds()

        test.__name__, test.__doc__ = law.__name__, law.__doc__
        return test

    return decorate


def test_every_method_is_put_to_these_laws() -> None:
    assert set(METHODS) == set(EVERY)


@for_each(EXACT_AT_THE_START, examples=15)
def test_at_the_start_nothing_changes_by_one_bit(case: Case) -> None:
    model = case.base()
    before = case.logits(model)
    case.method.adapt(model)
    assert torch.equal(case.logits(model), before)


@for_each(["adapter"], examples=25)
def test_at_the_start_a_near_identity_changes_the_logits_by_less_than_a_thousandth(case: Case) -> None:
    model = case.base(std=0.1)
    before = case.logits(model)
    case.method.adapt(model)
    assert (case.logits(model) - before).abs().max() < 1e-3


@for_each(["lora", "qlora", "bitfit", "spafit"], examples=15)
def test_merging_keeps_the_function_and_unmerging_gives_every_bit_back(case: Case) -> None:
    model, method = case.trained(), case.method
    before, logits = snapshot(model), case.logits(model)
    for _ in range(2):
        method.merge(model)
        torch.testing.assert_close(case.logits(model), logits, atol=1e-3, rtol=1e-3)
        method.unmerge(model)
        assert_same(snapshot(model), before)
        assert torch.equal(case.logits(model), logits)


@for_each(EVERY, examples=4)
def test_in_20_steps_frozen_tensors_have_no_gradient_and_do_not_move_by_one_bit(case: Case) -> None:
    model, method = case.base().train(), case.method
    of_the_base = {id(parameter) for parameter in model.parameters()}
    method.adapt(model)
    before, learned = snapshot(model), method.trainable(model)
    if not isinstance(method, FullFineTuning):  # of the base's own, the two that train biases train those and no other
        own = [name for name, parameter in learned.items() if id(parameter) in of_the_base]
        assert all(name.endswith("bias") for name in own)
        assert not own or isinstance(method, BitFit | SPAFIT)
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
    assert (set(before) == set(learned)) == isinstance(method, FullFineTuning)


@for_each(EVERY, examples=8)
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(case: Case) -> None:
    model, again = case.trained(), case.base()
    with tempfile.TemporaryDirectory() as directory:
        case.method.save(model, directory)
        load_adapter(again, directory)
    assert torch.equal(case.logits(again), case.logits(model))


@for_each(EVERY, examples=8)
def test_undoing_gives_the_base_back_bit_for_bit(case: Case) -> None:
    model, base = case.trained(), case.base()
    case.method.undo(model)
    assert_same(snapshot(model), snapshot(base))
    assert torch.equal(case.logits(model), case.logits(base))


# --- Directories that do not fit -------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {  # that fit a tiny model; the others' defaults do
    "lora": {"rank": 2},
    "qlora": {"rank": 2},
    "llama-adapter": {"top_layers": 2},
    "adapter": {"width": 4},
    "spafit": {"frozen_layers": 0, "bias_layers": 1},
}


def saved_by(kind: str, directory: Path) -> None:
    model, method = tiny_model(), method_class(kind)(**OPTIONS.get(kind, {}))
    method.adapt(model)
    method.save(model, directory)


@pytest.mark.parametrize("other", [{"n_embd": 12}, {"n_layer": 1}, {"n_embd": 48, "n_layer": 3}], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "full"])
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


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "full"])  # full writes a model, not an adapter
def test_an_unknown_field_is_refused_with_its_value_and_the_fields_that_are_known(kind: str, tmp_path: Path) -> None:
    saved_by(kind, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"frobnicate": 3}))
    with pytest.raises(ValueError, match=r"frobnicate=3, which is not supported.*Supported fields: \w+"):
        load_adapter(tiny_model(), tmp_path)
