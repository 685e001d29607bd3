"""Loading and saving GPT-2 checkpoints in Hugging Face's layout.

A checkpoint is a directory with `config.json` (the architecture), the weights (`model.safetensors`, or shards of it
with an index, or the older `pytorch_model.bin`), and `vocab.json` and `merges.txt` (the tokenizer).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_from_scratch.gpt2 import tokenizer_files
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.support.files import write_directory_atomically

BUNDLED = "bundled"
BUNDLED_DIRECTORY = Path(__file__).parent.parent / "assets" / "gpt2"

_HUB_FILES = ["config.json", "vocab.json", "merges.txt", "tokenizer.json", *tokenizer_files.SETTINGS_FILES]
_HUB_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_HUB_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]

# Old checkpoints contain the causal masks among the weights.
_MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


# --- Loading ---------------------------------------------------------------------------------------


def load_gpt2(source: str | Path = BUNDLED, *, dtype: torch.dtype = torch.float32) -> tuple[GPT2, Tokenizer]:
    """Load a model, in eval mode, and its tokenizer.

    Args:
        source: "bundled", a directory, or a name on the Hugging Face Hub ("gpt2", "openai-community/gpt2-medium").
        dtype: of the parameters, whatever the dtype in the file.

    Raises:
        FileNotFoundError: there is no such directory or model, or one of its files is missing.
        OSError: the hub cannot be reached and the model is not in its cache.
        ValueError: a file is damaged, does not belong to a GPT-2, or does not match the others; the message names the
            tensor.
    """
    directory = checkpoint_directory(source)
    tokenizer = Tokenizer.from_directory(directory)
    model = _load_model(directory, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, "
            f"more than the model's vocabulary of {model.config.vocab_size}"
        )
    return model, tokenizer


def load_model(source: str | Path = BUNDLED, *, dtype: torch.dtype = torch.float32) -> GPT2:
    """Load only the model, from a checkpoint that may have no tokenizer; see `load_gpt2`."""
    return _load_model(checkpoint_directory(source), dtype)


def load_tokenizer(source: str | Path = BUNDLED) -> Tokenizer:
    """Load only the tokenizer; see `load_gpt2`."""
    return Tokenizer.from_directory(checkpoint_directory(source))


def checkpoint_directory(source: str | Path = BUNDLED) -> Path:
    """The directory with the files of `source`; a model of the hub is downloaded first, with a progress bar.

    A directory takes precedence over a hub model of the same name. `./bundled` means a directory of that name.
    """
    name = str(source)
    if name == BUNDLED:
        if not BUNDLED_DIRECTORY.is_dir():
            raise FileNotFoundError(f"the bundled GPT-2 is missing ({BUNDLED_DIRECTORY}): reinstall the package")
        return BUNDLED_DIRECTORY
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ValueError(f"a model is a directory, but {name} is a file: give the directory that contains it")
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(
            f"there is no directory {name!r}; allowed: 'bundled', a directory, or a hub name (gpt2)"
        )
    return _download(name)


def _load_model(directory: Path, dtype: torch.dtype) -> GPT2:
    if not (directory / "config.json").exists():
        raise FileNotFoundError(f"{directory} has no config.json: it is not a model in Hugging Face's layout")
    config = GPT2Config.from_json(directory / "config.json")
    tensors = model_tensors(read_weights(directory), directory)
    with torch.device("meta"):  # shapes without memory: nothing is initialised only to be overwritten
        model = GPT2(config)
    check_fit(model.state_dict(), tensors, directory)
    copies = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def model_tensors(tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Rename the tensors to the model's names: a checkpoint of the bare transformer omits the prefix."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" or _MASK_BUFFER.fullmatch(name):
            continue
        full = name if name.startswith("transformer.") else f"transformer.{name}"
        if full in named:
            raise ValueError(f"the weights in {directory} contain {full} twice, with and without 'transformer.'")
        named[full] = tensor
    head, embedding = tensors.get("lm_head.weight"), named.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"the weights in {directory} have an lm_head.weight that differs from wte.weight: in a GPT-2 they are equal"
        )
    return named


def check_fit(expected: dict[str, Tensor], given: dict[str, Tensor], directory: Path) -> None:
    """Check that the tensors and their shapes are exactly those of the configuration."""
    problems = [
        ("missing", [name for name in expected if name not in given]),
        ("unexpected", [name for name in given if name not in expected]),
        (
            "wrong shape",
            [
                f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in given and given[name].shape != tensor.shape
            ],
        ),
        ("not floating-point", [n for n, tensor in given.items() if n in expected and not tensor.is_floating_point()]),
    ]
    found = "; ".join(f"{what}: {_some(names)}" for what, names in problems if names)
    if found:
        raise ValueError(f"the weights in {directory} do not match its config.json: {found}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- The weight files ------------------------------------------------------------------------------


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read all tensors from the first kind of weight file that exists (in the same order as transformers)."""
    files = weight_files(directory)
    if not files:
        raise FileNotFoundError(
            f"{directory} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_file(file)
    if not tensors:
        raise ValueError(f"there are no tensors in {', '.join(map(str, files))}")
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The files with a model's weights, in the order in which `read_weights` looks for them; none: there are none.

    Raises:
        OSError, ValueError: the index of a sharded checkpoint is damaged, or a shard is missing.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if (directory / single).exists():
            return [directory / single]
        if index.exists():
            return [directory / shard for shard in _shards(index)]
    return []


def _shards(index: Path) -> list[str]:
    """The file names in the `weight_map` (tensor name -> file name) of a sharded checkpoint's index."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint ({_first_line(error)})") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} names {shard!r}, which is not a file in the same directory")
        if not (index.parent / shard).exists():
            raise FileNotFoundError(f"{index.parent} is incomplete: {shard} is missing (named in {index.name})")
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        # A .bin file is a pickle, which could run arbitrary code: weights_only allows nothing but tensors.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated: {_first_line(error)}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or contains more than tensors and was refused for safety") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not contain named tensors")
    return tensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _download(name: str) -> Path:
    """Get a model's files from the hub or its cache. Pickles are used only if there are no safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        directory = Path(snapshot_download(name, allow_patterns=_HUB_FILES + _HUB_SAFETENSORS))
        if not any((directory / file).exists() for file in _HUB_SAFETENSORS[:2]):
            directory = Path(snapshot_download(name, allow_patterns=_HUB_FILES + _HUB_PICKLES))
        return directory
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no directory {name!r}, and the Hugging Face Hub has no public model of that name"
        ) from None
    except Exception as error:  # the network and its libraries raise many types
        raise OSError(
            f"there is no directory {name!r}, and the Hugging Face Hub cannot be reached for a model of that name (its "
            f"cache has none): check the network, or give 'bundled' or a directory ({_first_line(error)})"
        ) from None


# --- Saving ----------------------------------------------------------------------------------------


def save_gpt2(
    model: GPT2, tokenizer: Tokenizer | None, directory: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write a directory that `load_gpt2` and `transformers` can load; the same model always gives the same bytes.

    If the disk is full or the process is killed, `directory` is left unchanged. Other files in it are kept.

    Args:
        model: a model without adapters (merge or undo them first).
        tokenizer: None: the tokenizer's files are not written.
        dtype: of the weights on disk; None: that of the model.

    Raises:
        ValueError: the model has adapters, or a weight is too large for `dtype`.
        OSError: the directory cannot be written to.
    """
    with torch.device("meta"):
        expected = GPT2(model.config).state_dict().keys()
    state = model.state_dict()
    if different := sorted(expected ^ state.keys()):
        raise ValueError(f"only a plain GPT-2 can be saved; merge or undo its adapters first: {_some(different)}")
    weights = {name: _for_disk(name, tensor, dtype) for name, tensor in state.items()}

    def write(folder: Path) -> None:
        config = json.dumps(model.config.to_json_dict(), indent=2) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    write_directory_atomically(directory, write)


def _for_disk(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    if not torch.equal(stored.isfinite(), tensor.detach().cpu().isfinite()):
        raise ValueError(f"{name} has weights too large for {dtype}: save it as bfloat16 or float32")
    return stored
