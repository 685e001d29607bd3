"""Prompt tuning, and the laws of every method with virtual tokens (prefix tuning, LLaMA-Adapter)."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_from_scratch.finetune.completions import prompt_text
from lora_from_scratch.finetune.metrics import text_loss
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2, KVCache, next_token_loss
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.prefix_tuning import PrefixTuning
from lora_from_scratch.methods.prompt_tuning import (
    PromptTuning,
    few_shot_prompt,
    initial_prompt,
    nearest_tokens,
    prepend_prompt,
    prompt_labels,
    text_ids,
)
from lora_from_scratch.methods.registry import load_adapter
from tests.helpers import real_checkpoint, tiny_model, transformers_twin

METHODS: dict[str, Method] = {
    "prompt": PromptTuning(3, init="random"),
    "prefix": PrefixTuning(3, hidden=7),
    "prefix without MLP": PrefixTuning(3, reparametrise=False),
    "llama-adapter": LlamaAdapter(3, top_layers=1),
    "llama-adapter as peft": LlamaAdapter(3, top_layers=2, as_peft=True),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
P = 3


def tokens(rows: int = 3, length: int = 9, seed: int = 7) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def adapted(method: Method, seed: int = 0, **changes: Any) -> GPT2:
    """A tiny random GPT-2 whose learned parameters are all random, gates as well."""
    model = tiny_model(seed, **changes)
    method.adapt(model)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def without_first(labels: Tensor) -> Tensor:
    """PEFT lets the last virtual token predict the first real one; our logits begin with the text."""
    labels = labels.clone()
    labels[:, 0] = -100
    return labels


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def read_by_peft(directory: Path, trainable: bool = False) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # "found missing adapter keys" and the like
        return peft.PeftModel.from_pretrained(
            transformers_twin(tiny_model()), str(directory), is_trainable=trainable
        ).eval()


# --- Laws of every method with virtual tokens ----------------------------------------------------------


@every_method
def test_only_what_is_learned_has_gradients_and_moves_and_undo_gives_the_base_back(method: Method) -> None:
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    objects, config = [*map(id, model.parameters()), *map(id, model.modules())], model.config
    before, logits = {name: p.clone() for name, p in model.named_parameters()}, model(tokens())
    attributes = set(vars(model))
    method.adapt(model)
    learned = method.trainable(model)
    start = method.state_dict(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(3):
        next_token_loss(model(tokens()), tokens()).backward()
        optimizer.step()
    assert all(not torch.equal(parameter, start[name]) for name, parameter in learned.items())
    frozen = {name: p for name, p in model.named_parameters() if name not in learned}
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())
    assert len(frozen) == len(before)
    method.undo(model.eval())
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert [*map(id, model.parameters()), *map(id, model.modules())] == objects
    assert model.config is config
    assert set(vars(model)) == attributes
    assert torch.equal(model(tokens()), logits)


@every_method
def test_saved_then_loaded_gives_the_same_logits_bit_for_bit(method: Method, tmp_path: Path) -> None:
    model = adapted(method)
    method.save(model, tmp_path / "adapter")
    again = tiny_model()
    loaded = load_adapter(again, tmp_path / "adapter")
    assert type(loaded) is type(method)
    assert torch.equal(again(tokens()), model(tokens()))
    loaded.save(again, tmp_path / "copy")
    for file in (tmp_path / "adapter").iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


@every_method
def test_padding_on_either_side_changes_no_logit_of_the_text(method: Method) -> None:
    model, text = adapted(method), tokens(rows=1, length=6)
    alone = model(text)
    padding, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    left = model(torch.cat([padding, text], 1), attention_mask=torch.cat([padding, ones], 1))
    right = model(torch.cat([text, padding], 1), attention_mask=torch.cat([ones, padding], 1).bool())
    assert left.shape == right.shape == (1, 10, 61)  # aligned with the tokens, without the virtual ones
    assert_close(left[:, 4:], alone)
    assert_close(right[:, :6], alone)
    assert_close(model(text, position_ids=torch.arange(6)[None]), alone)


@every_method
def test_a_text_read_in_pieces_with_a_cache_has_the_logits_of_the_text_read_at_once(method: Method) -> None:
    model, text = adapted(method), tokens()
    cache = KVCache()
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in text.split([4, 1, 4], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(text))


@every_method
def test_generation_is_the_same_with_and_without_cache_in_a_batch_and_alone(method: Method) -> None:
    model = adapted(method)
    prompts = [row[:length].tolist() for row, length in zip(tokens(), (2, 9, 5), strict=True)]
    together = generate(model, prompts, max_new_tokens=8)
    assert together == generate(model, prompts, max_new_tokens=8, use_cache=False)
    assert together == [generate(model, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    beams = generate(model, prompts, max_new_tokens=6, num_beams=3)
    assert beams == generate(model, prompts, max_new_tokens=6, num_beams=3, use_cache=False)


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method: Method) -> None:
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = adapted(method).train()
        model.gradient_checkpointing = checkpointing
        model.transformer.h[-1].register_forward_pre_hook(lambda *_: runs.append(1))
        next_token_loss(model(tokens()), tokens()).backward()
        gradients.append([p.grad for p in method.trainable(model).values()])
    assert len(runs) == 3  # once, and then twice
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, checkpointed)


@every_method
def test_every_learned_tensor_gets_a_gradient_under_bf16_autocast(method: Method) -> None:
    model = adapted(method).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model(tokens()), tokens())
    loss.backward()
    for name, parameter in method.trainable(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_method
def test_a_copy_of_an_adapted_model_is_independent(method: Method) -> None:
    model = adapted(method)
    logits = model(tokens())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()), logits)
    method.undo(twin)
    assert torch.equal(twin(tokens()), tiny_model()(tokens()))
    assert torch.equal(model(tokens()), logits)
    with pytest.raises(ValueError, match="cannot be merged"):
        method.merge(model)


# --- Hard prompts and the small functions --------------------------------------------------------------


def test_a_few_shot_prompt_shows_the_examples_and_ends_where_the_answer_begins() -> None:
    prompt = few_shot_prompt([("a[1]", "One."), ("a[2]", "Two.")], "a[3]", "Say the number.")
    assert prompt == "Say the number.\n\na[1]\nOne.\n\na[2]\nTwo.\n\na[3]\n"
    assert few_shot_prompt([], "a[3]") == prompt_text("a[3]")


def test_a_prompt_is_put_in_front_of_every_row() -> None:
    prompt, inputs = torch.randn(2, 4), torch.randn(3, 5, 4)
    whole = prepend_prompt(prompt, inputs)
    assert whole.shape == (3, 7, 4)
    assert all(torch.equal(row[:2], prompt) for row in whole)
    assert torch.equal(whole[:, 2:], inputs)


def test_a_soft_prompt_begins_with_the_rows_that_were_asked_for() -> None:
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(initial_prompt(table, 5, "text", (7, 9)), table[[7, 9, 7, 9, 7]])
    assert torch.equal(initial_prompt(table, 2, "text", (7, 9, 11)), table[[7, 9]])
    drawn = nearest_tokens(initial_prompt(table, 40, "vocabulary"), table)
    assert sorted(drawn.tolist()) == list(range(40))  # rows of the table, each once
    assert initial_prompt(table, 90, "vocabulary").shape == (90, 6)
    assert initial_prompt(torch.randn(6000, 2), 5000).shape == (5000, 2)
    random = initial_prompt(table, 4000, "random")
    assert abs(float(random.mean())) < 0.05
    assert abs(float(random.std()) - 1) < 0.05


@pytest.mark.parametrize(("init", "ids"), [("zeros", (1, 2)), ("text", ())])
def test_a_start_that_does_not_exist_and_a_text_without_tokens_are_refused(init: str, ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"init must be one of vocabulary, text, random.*got '{init}'"):
        initial_prompt(torch.randn(40, 6), 3, init, ids)


def test_the_first_values_depend_on_the_seed_alone_and_are_no_view_of_the_embeddings() -> None:
    def start(seed: int) -> Tensor:
        torch.manual_seed(torch.seed())
        model = tiny_model()
        method = PromptTuning(4, seed=seed)
        method.adapt(model)
        (first,) = method.trainable(model).values()
        assert first.data_ptr() != model.transformer.wte.weight.data_ptr()
        return first

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_the_token_nearest_to_an_embedding_is_its_own_however_long_the_vector() -> None:
    table = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    assert nearest_tokens(3.0 * table[[4, 44, 0]], table).tolist() == [4, 44, 0]


def test_a_text_becomes_the_ids_of_its_tokens() -> None:
    tokenizer = Tokenizer.from_directory(real_checkpoint())
    ids = text_ids("Once upon a time", tokenizer)
    assert tokenizer.decode(list(ids)) == "Once upon a time"
    assert PromptTuning(init="text", init_ids=ids).init_ids == ids


# --- With the real peft --------------------------------------------------------------------------------


def pefts_prompt(model: GPT2) -> Any:
    """peft's prompt tuning with the same weights and the same prompt."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers_twin(tiny_model()), config).eval()
    theirs.prompt_encoder.default.embedding.weight.data.copy_(model.virtual_tokens.embeddings)  # type: ignore[union-attr]
    return theirs


def test_logits_and_gradients_of_a_soft_prompt_equal_pefts() -> None:
    method = PromptTuning(P, init="random")
    model = adapted(method)
    theirs = pefts_prompt(model)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    labels = without_first(torch.where(mask.bool(), tokens(), -100))
    output = theirs(tokens(), attention_mask=mask, labels=labels)
    ours = model(tokens(), attention_mask=mask)
    assert_close(ours[mask.bool()], output.logits[:, P:][mask.bool()])
    next_token_loss(ours, labels).backward()
    output.loss.backward()
    (parameter,) = method.trainable(model).values()
    assert parameter.grad is not None
    assert parameter.grad.any()
    assert_close(parameter.grad, theirs.prompt_encoder.default.embedding.weight.grad)


def test_the_labels_of_a_prompt_give_pefts_loss() -> None:
    theirs = pefts_prompt(adapted(PromptTuning(P)))
    output = theirs(tokens(), labels=tokens())
    assert_close(next_token_loss(output.logits, prompt_labels(tokens(), P)), output.loss)


def test_soft_prompts_travel_to_peft_and_back(tmp_path: Path) -> None:
    method = PromptTuning(P)
    model = adapted(method)
    method.save(model, tmp_path / "ours")
    assert_close(read_by_peft(tmp_path / "ours")(tokens()).logits[:, P:], model(tokens()))
    theirs = pefts_prompt(adapted(method, seed=3))
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model()
    assert load_adapter(again, tmp_path / "theirs") == PromptTuning(P)
    assert_close(again(tokens()), theirs(tokens()).logits[:, P:])


# --- Bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a whole number of at least 1, got 0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be a whole number"),
        ({"init": "zeros"}, "init must be one of vocabulary, text, random, got 'zeros'"),
        ({"init": "text"}, r'init="text" requires init_text or init_ids \(the token ids of the text\)'),
        ({"init_ids": (1, 2)}, "got init='vocabulary' and 2 init_ids"),
        ({"init": "text", "init_ids": ("one",)}, "init_ids must be token ids"),
    ],
)
def test_a_bad_hyperparameter_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTuning(**arguments)


@pytest.mark.parametrize("cls", [PromptTuning, PrefixTuning])
def test_virtual_tokens_leave_room_for_text_or_are_refused(cls: type[PromptTuning | PrefixTuning]) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="between 1 and 31, to leave room for text in the model's context of 32"):
        cls(32).adapt(model)
    cls(31).adapt(model)
    assert model(tokens(length=1)).shape == (3, 1, 61)
    with pytest.raises(ValueError, match="2 tokens and the 31 virtual tokens before them"):
        model(tokens(length=2))
    cls(31).undo(model)
    cls(P).adapt(model)
    assert model.config.n_positions == 29
    assert text_loss(model, tokens(1, 60)[0], model.config.n_positions) > 0
    assert len(generate(model, [[1] * 20], max_new_tokens=9)[0]) == 9
    with pytest.raises(ValueError, match="that is 30, more than the model's context of 29"):
        generate(model, [[1] * 20], max_new_tokens=10)


def test_a_token_outside_the_vocabulary_is_refused_and_the_model_stays_as_it_was() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="init_ids must be token ids from 0 to 60, got 3 to 61"):
        PromptTuning(init="text", init_ids=(3, 61)).adapt(model)
    assert model.virtual_tokens is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [PromptTuning(P), PrefixTuning(P, hidden=5)], ids=["prompt", "prefix"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_attention_heads", 4, "num_attention_heads=4: made for another model; this one has 3"),
        ("modules_to_save", ["wte"], "modules_to_save=.*not supported"),
        ("num_transformer_submodules", 2, "num_transformer_submodules=2, which is not supported"),
        ("num_virtual_tokens", 4, "embedding"),
        ("num_virtual_tokens", None, "num_virtual_tokens must be a whole number, got None"),
        ("num_virtual_tokens", 40, "num_virtual_tokens must be between 1 and 31"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    method: Method, field: str, value: Any, message: str, tmp_path: Path
) -> None:
    method.save(adapted(method), tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(tokens()), tiny_model()(tokens()))
