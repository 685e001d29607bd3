"""The protocol between the sandbox and the grader, in both directions: JSON and safetensors in frames, never a pickle.

A frame is

    length (4 bytes) | MAC (16 bytes) | length of the JSON (4 bytes) | JSON | safetensors, or nothing

The MAC (message authentication code) is keyed BLAKE2b of the frame's position and content; the grader draws the key for
each process. It rejects whatever else is written to the pipe, by accident or by a simple trick. It does not prove where
a frame comes from: the key is in the process that runs the learner's code.

Everything that is read is bounded and checked; any violation is a `ValueError` with a message of one line.
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
LARGEST_JSON = 4 * 2**20
DEEPEST = 60
MOST_ITEMS = 200_000
LONGEST_TEXT = 500_000
MOST_TENSORS = 10_000
MOST_AXES = 32

VALUES_DEEPEST = DEEPEST - 8  # a value lies in an observation, that in a list, that in a frame
LONGEST_NUMBER = 13_000  # bits; Python itself refuses to read whole numbers of more than 4,300 digits

# The dtypes that safetensors has. Complex numbers cross as pairs of real ones.
DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
)
PAIRS = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# The fields of `Seen` that are text, with the most characters.
TEXTS = {"message": 1_000, "where": 1_000, "printed": 10_000}
MOST_NAMES, LONGEST_NAME = 100, 500


# --- Plain data as bytes -----------------------------------------------------------------------------


def pack(data: Data) -> bytes:
    """Plain data as bytes. `unpack` gives the same data back, to the bit and to the order in memory of tensors.

    Raises:
        ValueError: it is too deep, too long, or not plain data.
    """
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_to_json(data, tensors, 0), separators=(",", ":")).encode()
    except (TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"this is not plain data: {error}") from None
    if len(text) > LARGEST_JSON or len(tensors) > MOST_TENSORS:
        raise ValueError(f"this is too much to send: {len(text):,} bytes of text, {len(tensors):,} tensors")
    import safetensors.torch

    return PREFIX.pack(len(text)) + text + (safetensors.torch.save(tensors) if tensors else b"")


def unpack(content: bytes) -> Data:
    """What `pack` made bytes of.

    Raises:
        ValueError: it is something else, or over one of the bounds.
    """
    if len(content) < PREFIX.size:
        raise ValueError("the frame is too short")
    (length,) = PREFIX.unpack_from(content)
    if length > LARGEST_JSON or PREFIX.size + length > len(content):
        raise ValueError(f"the frame says that its text has {length:,} bytes")
    try:
        tree = json.loads(content[PREFIX.size : PREFIX.size + length], parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError("the frame's text is not JSON") from None
    reader = _Reader(_tensors(content[PREFIX.size + length :]))
    return reader.read(tree, 0)


def _to_json(data: Data, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"this is nested more than {DEEPEST} times")
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
    """The tensor goes to `tensors`; what stays says which one, whether it is complex, and the order of its axes."""
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
    except Exception as error:  # SafetensorError, and what PyTorch makes of odd headers
        raise ValueError(f"the frame's tensors cannot be read: {' '.join(str(error).split())[:200]}") from None
    if len(tensors) > MOST_TENSORS or any(t.ndim > MOST_AXES or t.dtype not in DTYPES for t in tensors.values()):
        raise ValueError("the frame has too many tensors, or some of an unknown kind")
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
        if self.items > MOST_ITEMS or depth > DEEPEST:
            raise ValueError("the frame holds too many items, or they are nested too deeply")
        if isinstance(tree, list):
            return [self.read(item, depth + 1) for item in tree]
        if isinstance(tree, dict):
            return self.tagged(tree, depth)
        if isinstance(tree, str):
            return _short(tree)
        if isinstance(tree, float) and not math.isfinite(tree):  # 1e999
            raise ValueError("the frame has a number that is too large")
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
        raise ValueError(f"the frame has an object with the keys {', '.join(sorted(keys))[:200]}")

    def mapping(self, pairs: list[Any], depth: int) -> Data:
        read: dict[str, Data] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)) or pair[0] in read:
                raise ValueError("the frame has a mapping that is none")
            read[_short(pair[0])] = self.read(pair[1], depth + 1)
        return read

    def tensor(self, dense: Tensor, is_complex: Any, order: Any) -> Tensor:
        if is_complex is True:
            if dense.dtype not in PAIRS.values() or dense.ndim < 1 or dense.shape[-1] != 2:
                raise ValueError("the frame has complex numbers that are none")
            dense = torch.view_as_complex(dense)
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(dense.ndim))):
            raise ValueError("the frame has a tensor with another number of axes than it says")
        return dense.permute([order.index(axis) for axis in range(dense.ndim)])


def _short(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"the frame has a text of {len(text):,} characters; at most {LONGEST_TEXT:,} are taken")
    return text


# --- Seen as plain data ------------------------------------------------------------------------------


@dataclasses.dataclass
class FrameBudget:
    """What may still be sent in one frame; less than what `unpack` takes, so that nothing harmless is refused there."""

    items: int = MOST_ITEMS - 20_000
    text: int = LARGEST_JSON - 2**19
    tensors: int = MOST_TENSORS - 1_000
    bytes: int = 2**60

    def fit(self, value: Data) -> Data:
        """The value, if there is room for it; `Opaque` otherwise."""
        tried = dataclasses.replace(self)
        try:
            tried.take(value, 0)
        except ValueError:
            return Opaque("value that is too large to be looked at")
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(tried, item.name))
        return value

    def take(self, value: Data, depth: int) -> None:
        """Make the room less by what a value takes.

        Raises:
            ValueError: there is not enough.
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
        if min(self.items, self.text, self.tensors, self.bytes) < 0 or depth > VALUES_DEEPEST:
            raise ValueError("there is no room for this")
        if isinstance(value, Tensor) and value.ndim > MOST_AXES:
            raise ValueError("this has too many axes")
        if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
            raise ValueError("this number is too long")
        inner: Iterable[Data] = value if isinstance(value, list) else ()
        if isinstance(value, dict):
            self.text -= sum(map(self._length, value))
            inner = value.values()
        for item in inner:
            self.take(item, depth + 1)

    @staticmethod
    def _length(text: str) -> int:
        if len(text) > LONGEST_TEXT:
            raise ValueError("this text is too long")
        return len(json.dumps(text))


def observation_to_data(seen: Seen, after: Mapping[str, Data], budget: FrameBudget) -> dict[str, Data]:
    """An observation and what its inputs are afterwards as plain data; a value that is too much becomes `Opaque`."""
    data = {item.name: getattr(seen, item.name) for item in dataclasses.fields(seen) if item.name != "changed"}
    data["errors"] = [name[:LONGEST_NAME] for name in data["errors"][:MOST_NAMES]]
    data |= {name: data[name][:most] for name, most in TEXTS.items()}
    data["value"] = budget.fit(data["value"])
    data["after"] = {name: budget.fit(value) for name, value in after.items()}
    return data


def observation_from_data(data: Data, given: Mapping[str, Data]) -> Seen:
    """What `observation_to_data` made data of. Whether an input was changed is found out here, outside the sandbox.

    Args:
        given: the inputs as they were.

    Raises:
        ValueError: it is something else.
    """
    names = {item.name for item in dataclasses.fields(Seen)} - {"changed"} | {"after"}
    if not isinstance(data, dict) or data.keys() != names:
        raise ValueError("an observation has other fields than it should")
    fields: dict[str, Any] = dict(data)
    for name, most in TEXTS.items():
        if type(fields[name]) is not str or len(fields[name]) > most:
            raise ValueError(f"an observation's {name} is not a text of at most {most:,} characters")
    errors, after = fields["errors"], fields.pop("after")
    if not isinstance(errors, list) or len(errors) > MOST_NAMES or not all(map(_is_name, errors)):
        raise ValueError("an observation's errors is not a short list of short texts")
    if type(fields["stopped"]) is not bool:
        raise ValueError("an observation's stopped is neither true nor false")
    if not isinstance(after, dict) or after.keys() != (set() if fields["stopped"] else given.keys()):
        raise ValueError("an observation has other inputs than were given")
    fields["errors"] = tuple(errors)
    return Seen(**fields, changed=changed(given, after))


def _is_name(text: Data) -> bool:
    return type(text) is str and len(text) <= LONGEST_NAME


# --- Frames ------------------------------------------------------------------------------------------


class MACGenerator:
    """Computes the MACs of one process's frames, in order."""

    def __init__(self, key: bytes) -> None:
        self._start = hashlib.blake2b(key=key, digest_size=MAC_SIZE)
        self._place = 0

    def next(self, content: bytes) -> bytes:
        mac = self._start.copy()
        mac.update(PREFIX.pack(self._place))
        mac.update(content)
        self._place += 1
        return mac.digest()


class Writer:
    """Makes frames."""

    def __init__(self, key: bytes) -> None:
        self._macs = MACGenerator(key)

    def frame(self, data: Data) -> bytes:
        content = pack(data)
        return PREFIX.pack(len(content)) + self._macs.next(content) + content


class Reader:
    """Takes bytes as they come, and gives the frames that are complete.

    Args:
        largest: the most bytes of one frame.
        most: the most bytes altogether.
    """

    def __init__(self, key: bytes, largest: int, most: int) -> None:
        self._macs = MACGenerator(key)
        self._waiting = bytearray()
        self.largest, self.most, self.taken = largest, most, 0

    def feed(self, content: bytes) -> Iterator[Data]:
        """The frames that these bytes complete, one after the other: those before a bad one are given.

        Raises:
            ValueError: a frame is too large, has a wrong MAC or cannot be read.
        """
        self.taken += len(content)
        if self.taken > self.most:
            raise ValueError(f"more than {self.most:,} bytes were sent")
        self._waiting += content
        while len(self._waiting) >= PREFIX.size:
            (length,) = PREFIX.unpack_from(self._waiting)
            if length > self.largest:
                raise ValueError(f"a frame says that it has {length:,} bytes; at most {self.largest:,} are taken")
            end = PREFIX.size + MAC_SIZE + length
            if len(self._waiting) < end:
                break
            mac = bytes(self._waiting[PREFIX.size : PREFIX.size + MAC_SIZE])
            body = bytes(self._waiting[PREFIX.size + MAC_SIZE : end])
            del self._waiting[:end]
            if mac != self._macs.next(body):
                raise ValueError("a frame does not come from the runner")
            yield unpack(body)
