"""Every method that peft has too, on the bundled model and on a random GPT-2 small: equal logits, equal gradients.

"Equal" is within 1e-5. The bundled model is compared in float64: its logits go up to 15, and in float32 rounding alone
sets even plain transformers and the same model in float64 1.5e-5 apart. The random model's logits are small, and it
is compared in float32.

The other tests with peft are on tiny models, where more cases can be tried: test_peft_format.py, test_prompt_tuning.py,
test_prefix_tuning.py, test_llama_adapter.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import load_model
from lora_from_scratch.gpt2.model import GPT2, GPT2Config, next_token_loss
from lora_from_scratch.methods.fourierft import FourierFT
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.prefix_tuning import PrefixTuning
from lora_from_scratch.methods.prompt_tuning import PromptTuning
from lora_from_scratch.methods.randlora import RandLoRA
from lora_from_scratch.methods.registry import load_adapter
from tests.helpers import real_checkpoint
from tests.test_peft_format import SMALL, hugging_face

P = 3
METHODS: dict[str, Method] = {
    "LoRA": LoRA(rank=4, alpha=8),
    "LoRA on q and v": LoRA(rank=4, alpha=8, targets=("c_attn.q", "c_attn.v")),
    "rsLoRA": LoRA(rank=4, alpha=8, targets=("c_attn", "mlp.c_proj"), rslora=True),
    "RandLoRA": RandLoRA(rank=32, alpha=32),
    "FourierFT": FourierFT(),
    "soft prompt": PromptTuning(P),
    "prefix": PrefixTuning(P, reparametrise=False),
    "LLaMA-Adapter as peft has it": LlamaAdapter(P, top_layers=3, as_peft=True),
}
AS_IN_PEFT = {name: method for name, method in METHODS.items() if name != "LoRA on q and v"}  # with the same tensors


def random_gpt2_small() -> GPT2:
    """GPT-2 small but for its context of 32, every parameter random."""
    with torch.device("meta"):
        model = GPT2(SMALL)
    model.to_empty(device="cpu")
    randomise(model.named_parameters(), seed=0)
    return model.eval()


@pytest.fixture(scope="session", params=["bundled", "random GPT-2 small"])
def base(request: pytest.FixtureRequest) -> GPT2:
    return load_model(real_checkpoint()).double() if request.param == "bundled" else random_gpt2_small()


def copy_of(base: GPT2) -> GPT2:
    """The same model with the same weights, which nothing here changes; in place of a deep copy of half a gigabyte."""
    with torch.device("meta"):
        model = GPT2(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    return model.requires_grad_(True).eval()


def randomise(parameters: Iterable[tuple[str, nn.Parameter]], seed: int, size: float = 0.03) -> None:
    """Uniform within `size`; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in parameters:
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            p.copy_(torch.empty(p.shape).uniform_(-size, size, generator=generator).add_(centre))  # fp32, as in files


def size_of(method: Method) -> float:
    """Of random values that change the logits well: two factors of a weight, or vectors of an attention layer."""
    return 0.03 if isinstance(method, LoRA | RandLoRA) else 0.3


def tokens_for(base: GPT2) -> Tensor:
    return torch.randint(0, base.config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(7))


def read_by_peft(base: GPT2, directory: Path) -> Any:
    """peft's model with what it reads there, trainable, in the base's type."""
    peft = pytest.importorskip("peft")
    prompts = peft.PeftConfig.from_pretrained(str(directory)).is_prompt_learning  # peft loads those for inference only
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # "found missing adapter keys" and the like
        warnings.filterwarnings("ignore", message="Specified to not save basis_A")  # RandLoRA's, drawn from a seed
        theirs = peft.PeftModel.from_pretrained(hugging_face(base), str(directory), is_trainable=not prompts)
    if prompts:
        theirs.prompt_encoder.requires_grad_(True)
    return theirs.to(base.transformer.wte.weight.dtype).eval()


def under_our_names(theirs: Any) -> dict[str, nn.Parameter]:
    """What peft trains, by the names that it has here."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight").removesuffix(".default")
            if name.startswith("prompt_encoder."):
                soft_prompt = theirs.peft_config["default"].peft_type == "PROMPT_TUNING"
                name = name.removeprefix("prompt_encoder.default.").replace("embedding.weight", "embedding")
                name = f"virtual_tokens.{name}s" if soft_prompt else f"virtual_tokens.{name}"
            found[name] = parameter
    return found


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def assert_same_logits(model: GPT2, theirs: Any) -> Tensor:
    """Returns peft's loss, without what its last virtual token says of the first real one: we have no such logit."""
    tokens = tokens_for(model)
    labels = tokens.clone()
    labels[:, 0] = -100
    output = theirs(tokens, labels=labels)
    with torch.no_grad():
        assert_close(model(tokens), output.logits[:, -tokens.shape[1] :])
    loss: Tensor = output.loss
    return loss


def assert_same_gradients(model: GPT2, method: Method, theirs: Any, loss: Tensor) -> None:
    next_token_loss(model(tokens_for(model)), tokens_for(model)).backward()
    loss.backward()
    ours, expected = method.trainable(model), under_our_names(theirs)
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        gradient = expected[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        largest = float(gradient.abs().max())
        assert largest > 0, name
        difference = float((parameter.grad - gradient).abs().max())
        assert difference <= min(1e-5, 1e-3 * largest), (name, difference, largest)


@pytest.mark.parametrize("name", METHODS)
def test_what_we_save_has_the_same_logits_and_gradients_in_peft(base: GPT2, name: str, tmp_path: Path) -> None:
    method, model = METHODS[name], copy_of(base)
    method.adapt(model)
    randomise(method.trainable(model).items(), 1, size_of(method))
    method.save(model, tmp_path)
    theirs = read_by_peft(base, tmp_path)
    loss = assert_same_logits(model, theirs)
    assert (model(tokens_for(base)) - base(tokens_for(base))).abs().max() > 1e-3
    if name in AS_IN_PEFT:
        assert_same_gradients(model, method, theirs, loss)


@pytest.mark.parametrize("name", AS_IN_PEFT)
def test_what_peft_saves_has_the_same_logits_and_gradients_here(base: GPT2, name: str, tmp_path: Path) -> None:
    method, model = METHODS[name], copy_of(base)
    method.adapt(model)
    method.save(model, tmp_path / "ours")
    theirs = read_by_peft(base, tmp_path / "ours")
    randomise(under_our_names(theirs).items(), 2, size_of(method))
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy_of(base)
    read = load_adapter(again, tmp_path / "theirs")
    assert type(read) is type(method)
    assert_same_gradients(again, read, theirs, assert_same_logits(again, theirs))


def test_a_prefix_that_is_made_by_its_mlp_has_the_logits_and_gradients_of_pefts(base: GPT2) -> None:
    peft = pytest.importorskip("peft")
    method, model = PrefixTuning(P, hidden=9), copy_of(base)
    method.adapt(model)
    randomise(method.trainable(model).items(), 3, size_of(method))
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=P, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=9
    )
    theirs = peft.get_peft_model(hugging_face(base), config).to(base.transformer.wte.weight.dtype).eval()
    with torch.no_grad():
        for name, parameter in under_our_names(theirs).items():
            parameter.copy_(method.trainable(model)[name])
    assert_same_gradients(model, method, theirs, assert_same_logits(model, theirs))


def test_the_random_model_has_the_shape_of_gpt2_small() -> None:
    assert GPT2Config(**{**vars(SMALL), **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)}) == (
        GPT2Config(n_positions=32)
    )
