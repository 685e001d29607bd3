"""The protocol between the sandbox and the grader, in both directions: JSON and safetensors in frames, never a pickle.

A frame is

    length (4 bytes) | MAC (16 bytes) | length of the JSON (4 bytes) | JSON | safetensors, or nothing

The MAC (message authentication code) is keyed BLAKE2b of the frame's position and content; the grader draws the key for
each process. It rejects whatever else is written to the pipe, by accident or by a simple trick. It does not prove where
a frame comes from: the key is in the process that runs the learner's code.

Everything that is read is bounded and checked; any violation raises a `ValueError` with a one-line message.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.observation import Data, Opaque, Seen, changed

MAC_SIZE = 16
KEY_SIZE = 32
PREFIX = struct.Struct(">I")
MAX_JSON = 4 * 2**20
MAX_DEPTH = 60
MAX_ITEMS = 200_000
MAX_TEXT = 500_000
MAX_TENSORS = 10_000
MAX_DIMS = 32

MAX_VALUE_DEPTH = MAX_DEPTH - 8  # a value is nested in an observation, in a list, in a frame
MAX_INT_BITS = 13_000  # Python itself refuses to parse integers of more than 4,300 digits

# The dtypes of safetensors. Complex numbers are sent as pairs of real numbers.
DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
)
PAIRS = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# The text fields of `Seen`, with their maximum lengths in characters.
TEXTS = {"message": 1_000, "where": 1_000, "printed": 10_000}
MAX_NAMES, MAX_NAME = 100, 500


# --- Plain data as bytes -----------------------------------------------------------------------------


def pack(data: Data) -> bytes:
    """Serialise plain data. `unpack` restores it exactly, including every bit and the memory layout of tensors.

    Raises:
        ValueError: it is nested too deeply, too large, or not plain data.
    """
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_to_json(data, tensors, 0), separators=(",", ":")).encode()
    except (TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"the value is not plain data: {error}") from None
    if len(text) > MAX_JSON or len(tensors) > MAX_TENSORS:
        raise ValueError(f"the value is too large to send: {len(text):,} bytes of text, {len(tensors):,} tensors")
    import safetensors.torch

    return PREFIX.pack(len(text)) + text + (safetensors.torch.save(tensors) if tensors else b"")


def unpack(content: bytes) -> Data:
    """The inverse of `pack`.

    Raises:
        ValueError: the bytes are malformed, or exceed one of the bounds.
    """
    if len(content) < PREFIX.size:
        raise ValueError("the frame is too short")
    (length,) = PREFIX.unpack_from(content)
    if length > MAX_JSON or PREFIX.size + length > len(content):
        raise ValueError(f"the frame claims {length:,} bytes of text")
    try:
        tree = json.loads(content[PREFIX.size : PREFIX.size + length], parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError("the frame's text is not JSON") from None
    reader = _Reader(_tensors(content[PREFIX.size + length :]))
    return reader.read(tree, 0)


def _to_json(data: Data, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"the value is nested more than {MAX_DEPTH} levels deep")
    if isinstance(data, Tensor):
        return _tensor_to_json(data, tensors)
    if type(data) is Opaque:
        return {"opaque": str(data)}
    if data is None or type(data) in (bool, int, str):
        return data
    if type(data) is float:
        return data if math.isfinite(data) else {"float": repr(data)}
    if type(data) is list:
        return [_to_json(item, tensors, depth + 1) for item in data]
    if type(data) is dict:
        return {"dict": [[str(key), _to_json(item, tensors, depth + 1)] for key, item in data.items()]}
    raise TypeError(f"a {type(data).__name__}")


def _tensor_to_json(tensor: Tensor, tensors: dict[str, Tensor]) -> dict[str, Data]:
    """Put the tensor into `tensors`; return its name there, whether it is complex, and the order of its axes."""
    if tensor.dtype not in DTYPES and tensor.dtype not in PAIRS:
        return {"opaque": f"tensor of {str(tensor.dtype).removeprefix('torch.')}"}
    tensor = tensor.detach().resolve_conj().resolve_neg()
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
    dense = tensor.permute(order).clone(memory_format=torch.contiguous_format)
    name = str(len(tensors))
    tensors[name] = torch.view_as_real(dense) if tensor.dtype in PAIRS else dense
    return {"tensor": name, "complex": tensor.dtype in PAIRS, "order": list(order)}


def _tensors(content: bytes) -> dict[str, Tensor]:
    if not content:
        return {}
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # SafetensorError, and whatever PyTorch raises for malformed headers
        raise ValueError(f"the frame's tensors cannot be read: {' '.join(str(error).split())[:200]}") from None
    if len(tensors) > MAX_TENSORS or any(t.ndim > MAX_DIMS or t.dtype not in DTYPES for t in tensors.values()):
        raise ValueError("the frame has too many tensors, or tensors of an unsupported kind")
    return tensors


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


class _Reader:
    """Convert the JSON tree back to plain data, counting the items. Each tensor may be used once, as in `pack`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.items = 0

    def read(self, tree: Any, depth: int) -> Data:
        self.items += 1
        if self.items > MAX_ITEMS or depth > MAX_DEPTH:
            raise ValueError("the frame has too many items, or they are nested too deeply")
        if isinstance(tree, list):
            return [self.read(item, depth + 1) for item in tree]
        if isinstance(tree, dict):
            return self.tagged(tree, depth)
        if isinstance(tree, str):
            return _short(tree)
        if isinstance(tree, float) and not math.isfinite(tree):  # 1e999
            raise ValueError("the frame has a number that is out of range")
        return tree

    def tagged(self, tree: dict[str, Any], depth: int) -> Data:
        keys = frozenset(tree)
        if keys == {"dict"} and isinstance(tree["dict"], list):
            return self.mapping(tree["dict"], depth)
        if keys == {"opaque"} and isinstance(tree["opaque"], str):
            return Opaque(_short(tree["opaque"]))
        if keys == {"float"} and tree["float"] in ("nan", "inf", "-inf"):
            return float(tree["float"])
        if keys == {"tensor", "complex", "order"} and str(tree["tensor"]) in self.tensors:
            return self.tensor(self.tensors.pop(str(tree["tensor"])), tree["complex"], tree["order"])
        raise ValueError(f"the frame has an invalid object with the keys {', '.join(sorted(keys))[:200]}")

    def mapping(self, pairs: list[Any], depth: int) -> Data:
        read: dict[str, Data] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)) or pair[0] in read:
                raise ValueError("the frame has a malformed mapping")
            read[_short(pair[0])] = self.read(pair[1], depth + 1)
        return read

    def tensor(self, dense: Tensor, is_complex: Any, order: Any) -> Tensor:
        if is_complex is True:
            if dense.dtype not in PAIRS.values() or dense.ndim < 1 or dense.shape[-1] != 2:
                raise ValueError("the frame has malformed complex numbers")
            dense = torch.view_as_complex(dense)
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(dense.ndim))):
            raise ValueError("the frame has a tensor whose axes do not match its description")
        return dense.permute([order.index(axis) for axis in range(dense.ndim)])


def _short(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"the frame has a text of {len(text):,} characters; at most {MAX_TEXT:,} are allowed")
    return text


# --- Seen as plain data ------------------------------------------------------------------------------


@dataclasses.dataclass
class FrameBudget:
    """What may still be sent in one frame: less than `unpack` accepts, so that it never refuses anything harmless."""

    items: int = MAX_ITEMS - 20_000
    text: int = MAX_JSON - 2**19
    tensors: int = MAX_TENSORS - 1_000
    bytes: int = 2**60

    def fit(self, value: Data) -> Data:
        """The value if it fits into the budget, which it then reduces; otherwise `Opaque`."""
        left = dataclasses.replace(self)
        try:
            left.spend(value, 0)
        except ValueError:
            return Opaque("value that is too large to be looked at")
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(left, item.name))
        return value

    def spend(self, value: Data, depth: int) -> None:
        """Reduce the budget by the size of a value.

        Raises:
            ValueError: the value does not fit.
        """
        self.items -= 1
        self.text -= 30
        if isinstance(value, Tensor):
            self.tensors -= 1
            self.text -= 100 + 8 * value.ndim
            self.bytes -= 1000 + value.numel() * value.element_size()
        elif isinstance(value, str):
            self.text -= self._length(value)
        elif isinstance(value, int):
            self.text -= value.bit_length() // 3
        if min(self.items, self.text, self.tensors, self.bytes) < 0 or depth > MAX_VALUE_DEPTH:
            raise ValueError("the value does not fit into the frame")
        if isinstance(value, Tensor) and value.ndim > MAX_DIMS:
            raise ValueError("the tensor has too many axes")
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise ValueError("the integer is too large")
        inner: Iterable[Data] = value if isinstance(value, list) else ()
        if isinstance(value, dict):
            self.text -= sum(map(self._length, value))
            inner = value.values()
        for item in inner:
            self.spend(item, depth + 1)

    @staticmethod
    def _length(text: str) -> int:
        if len(text) > MAX_TEXT:
            raise ValueError("the text is too long")
        return len(json.dumps(text))


def observation_to_data(seen: Seen, after: Mapping[str, Data], budget: FrameBudget) -> dict[str, Data]:
    """An observation, and its inputs after the call, as plain data; values that do not fit become `Opaque`."""
    data = {item.name: getattr(seen, item.name) for item in dataclasses.fields(seen) if item.name != "changed"}
    data["errors"] = [name[:MAX_NAME] for name in data["errors"][:MAX_NAMES]]
    data |= {name: data[name][:most] for name, most in TEXTS.items()}
    data["value"] = budget.fit(data["value"])
    data["after"] = {name: budget.fit(value) for name, value in after.items()}
    return data


def observation_from_data(data: Data, given: Mapping[str, Data]) -> Seen:
    """The inverse of `observation_to_data`. Whether an input was changed is determined here, outside the sandbox.

    Args:
        given: the inputs before the call.

    Raises:
        ValueError: the data are malformed.
    """
    names = {item.name for item in dataclasses.fields(Seen)} - {"changed"} | {"after"}
    if not isinstance(data, dict) or data.keys() != names:
        raise ValueError("an observation has the wrong fields")
    fields: dict[str, Any] = dict(data)
    for name, most in TEXTS.items():
        if type(fields[name]) is not str or len(fields[name]) > most:
            raise ValueError(f"the field {name} of an observation is not a text of at most {most:,} characters")
    errors, after = fields["errors"], fields.pop("after")
    if not isinstance(errors, list) or len(errors) > MAX_NAMES or not all(map(_is_name, errors)):
        raise ValueError("the field errors of an observation is not a short list of short texts")
    if type(fields["stopped"]) is not bool:
        raise ValueError("the field stopped of an observation is not a boolean")
    if not isinstance(after, dict) or after.keys() != (set() if fields["stopped"] else given.keys()):
        raise ValueError("the inputs of an observation are not those that were given")
    fields["errors"] = tuple(errors)
    return Seen(**fields, changed=changed(given, after))


def _is_name(text: Data) -> bool:
    return type(text) is str and len(text) <= MAX_NAME


# --- Frames ------------------------------------------------------------------------------------------


class MACGenerator:
    """Computes the MACs of one process's frames, in order."""

    def __init__(self, key: bytes) -> None:
        self._start = hashlib.blake2b(key=key, digest_size=MAC_SIZE)
        self._position = 0

    def next(self, content: bytes) -> bytes:
        mac = self._start.copy()
        mac.update(PREFIX.pack(self._position))
        mac.update(content)
        self._position += 1
        return mac.digest()


class Writer:
    """Writes frames."""

    def __init__(self, key: bytes) -> None:
        self._macs = MACGenerator(key)

    def frame(self, data: Data) -> bytes:
        content = pack(data)
        return PREFIX.pack(len(content)) + self._macs.next(content) + content


class Reader:
    """Reads frames from bytes that arrive in pieces.

    Args:
        largest: maximum size of a frame in bytes.
        most: maximum total size in bytes.
    """

    def __init__(self, key: bytes, largest: int, most: int) -> None:
        self._macs = MACGenerator(key)
        self._buffer = bytearray()
        self.largest, self.most, self.received = largest, most, 0

    def feed(self, content: bytes) -> Iterator[Data]:
        """Yield the frames that these bytes complete, in order; those before a malformed frame are yielded too.

        Raises:
            ValueError: a frame is too large, has a wrong MAC or cannot be read.
        """
        self.received += len(content)
        if self.received > self.most:
            raise ValueError(f"more than {self.most:,} bytes were sent")
        self._buffer += content
        while len(self._buffer) >= PREFIX.size:
            (length,) = PREFIX.unpack_from(self._buffer)
            if length > self.largest:
                raise ValueError(f"a frame claims {length:,} bytes; at most {self.largest:,} are allowed")
            end = PREFIX.size + MAC_SIZE + length
            if len(self._buffer) < end:
                break
            mac = bytes(self._buffer[PREFIX.size : PREFIX.size + MAC_SIZE])
            body = bytes(self._buffer[PREFIX.size + MAC_SIZE : end])
            del self._buffer[:end]
            if mac != self._macs.next(body):
                raise ValueError("a frame does not come from the runner")
            yield unpack(body)
