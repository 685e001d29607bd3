"""What crosses between the sandbox and the grader: exactly what was seen, and nothing but plain data."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.checks.observation import Data, Opaque, Seen, identical
from lora_from_scratch.checks.units import units
from lora_from_scratch.grading.sandbox import seccomp, wire

KEY = bytes(range(32))
NAN = float("nan")

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
plain_data = st.recursive(
    scalars | st.builds(Opaque, st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)

TENSORS = [
    torch.zeros(0),
    torch.zeros(2, 0, 3, dtype=torch.int64),
    torch.tensor(3.5),
    torch.tensor([True, False]),
    torch.tensor([1.5, NAN, float("inf"), -0.0], dtype=torch.bfloat16),
    torch.tensor([2**62, -1]),
    torch.tensor([7, 8], dtype=torch.uint8),
    torch.tensor([0.1], dtype=torch.float64),
    torch.tensor([1 + 2j, 3 - 1j]),
    torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    torch.arange(6.0).expand(3, 6),
    torch.arange(10)[::2],
]


def frame(tree: object, tensors: bytes = b"") -> bytes:
    """The content of a frame that says whatever one likes."""
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack(">I", len(text)) + text + tensors


def same(one: Data, other: Data) -> bool:
    return identical(one, other) and type(one) is type(other)


@settings(max_examples=60, deadline=None)
@given(plain_data)
def test_plain_data_comes_back_as_it_was(data: Data) -> None:
    assert same(wire.unpack(wire.pack(data)), data)


@pytest.mark.parametrize("tensor", TENSORS, ids=str)
def test_a_tensor_comes_back_to_the_bit_with_its_dtype_and_shape(tensor: Tensor) -> None:
    back = wire.unpack(wire.pack({"t": [tensor, tensor]}))
    assert isinstance(back, dict)
    assert isinstance(back["t"], list)
    assert len(back["t"]) == 2
    for read in back["t"]:
        assert isinstance(read, Tensor)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        bits = {torch.bfloat16: torch.int16, torch.complex64: torch.complex64}.get(tensor.dtype, tensor.dtype)
        assert (
            torch.equal(read.contiguous().view(bits), tensor.contiguous().view(bits)) or tensor.dtype.is_floating_point
        )
        assert identical(read, tensor)


def test_the_order_in_memory_of_a_transposed_matrix_is_kept() -> None:
    matrix = torch.arange(6.0).reshape(2, 3).T
    back = wire.unpack(wire.pack(matrix))
    assert isinstance(back, Tensor)
    assert back.stride() == matrix.stride()


def test_a_dtype_that_does_not_cross_becomes_its_name() -> None:
    assert wire.unpack(wire.pack([torch.zeros(2, dtype=torch.float8_e5m2)])) == ["tensor of float8_e5m2"]


@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.number)
def test_the_inputs_of_every_exercise_cross_unchanged(unit: object) -> None:
    for exercise in unit.exercises:  # type: ignore[attr-defined]
        for case in exercise.inputs(3):
            assert same(wire.unpack(wire.pack(dict(case.inputs))), dict(case.inputs)), f"{exercise.name}: {case.name}"


GIVEN: dict[str, Data] = {"x": torch.ones(2), "n": 3}


def sent(seen: Seen, after: dict[str, Data] | None = None) -> dict[str, Data]:
    """An observation as it leaves the sandbox, through the wire."""
    data = wire.unpack(wire.pack(wire.observation_to_data(seen, GIVEN if after is None else after, wire.FrameBudget())))
    assert isinstance(data, dict)
    return data


def test_an_observation_comes_back_as_it_was() -> None:
    seen = Seen({"a": torch.ones(2), "b": Opaque("Thing")}, ("KeyError", "LookupError"), "m", "f, line 2", (), "p")
    back = wire.observation_from_data(sent(seen), GIVEN)
    assert same(back.value, seen.value)
    assert [getattr(back, name) for name in ("errors", "message", "where", "changed", "printed", "stopped")] == [
        ("KeyError", "LookupError"), "m", "f, line 2", (), "p", False
    ]  # fmt: skip


@pytest.mark.parametrize("after", [torch.zeros(2), torch.ones(3), torch.ones(2, dtype=torch.int64), [1.0, 1.0], None])
def test_whether_an_input_was_changed_is_found_out_from_what_it_is_afterwards(after: Data) -> None:
    assert wire.observation_from_data(sent(Seen(1)), GIVEN).changed == ()
    assert wire.observation_from_data(sent(Seen(1), {"x": after, "n": 3}), GIVEN).changed == ("x",)


def test_a_value_that_is_too_large_is_said_to_be() -> None:
    assert isinstance(wire.observation_from_data(sent(Seen("x" * 10_000_000)), GIVEN).value, Opaque)


def deep(depth: int) -> Data:
    value: Data = 1
    for _ in range(depth):
        value = [value]
    return value


# What a learner may return without disturbing anything, one value a case.
HARMLESS: dict[str, list[Data]] = {
    "lists in lists": [deep(depth) for depth in range(40, 70)],
    "many numbers": [[1] * 199_000, [2] * 199_000, [3.5] * 199_000],
    "long texts": ["é" * 400_000] * 9,
    "long whole numbers": [10**4_299, 10**4_300, -(10**9_999)],
    "many tensors": [[torch.ones(1)] * 4_000] * 5,
    "many keys": [{str(n): n for n in range(90_000)}, {"k" * 600_000: 1}],
    "large tensors": [torch.ones(1_000_000)] * 9,
    "many axes": [torch.ones((1,) * 40), torch.ones((1,) * 32)],
    "not numbers": [float("nan"), float("inf"), torch.tensor(float("nan"))],
    "halves of characters": ["\ud800", {"\udfff": "\x00"}],
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_sent_can_be_read_whatever_the_values_are(what: str) -> None:
    budget = wire.FrameBudget(bytes=16 * 2**20)
    frame: Data = {
        "kind": "tried",
        "seen": [wire.observation_to_data(Seen(value), {}, budget) for value in HARMLESS[what]],
    }
    writer, reader = wire.Writer(KEY), wire.Reader(KEY, 22 * 2**20, 44 * 2**20)
    (read,) = reader.feed(writer.frame(frame))
    assert isinstance(read, dict)
    assert isinstance(read["seen"], list)
    assert len(read["seen"]) == len(HARMLESS[what])


def test_a_tensor_that_is_named_in_two_places_is_refused() -> None:
    text = b'[{"tensor":"0","complex":false,"order":[0]},{"tensor":"0","complex":false,"order":[0]}]'
    tensors = wire.pack(torch.ones(2))
    (length,) = wire.PREFIX.unpack_from(tensors)
    with pytest.raises(ValueError, match="an invalid object with the keys"):
        wire.unpack(wire.PREFIX.pack(len(text)) + text + tensors[wire.PREFIX.size + length :])


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        frame(b"{")[:-1],
        frame(b"nonsense"),
        frame(b"NaN"),
        frame(b"1e999"),
        frame(b"\xff\xfe"),
        frame(b"9" * 10_000),
        frame(nested(100)),
        frame(nested(100_000)),
        frame([0] * 300_000),
        frame("x" * 600_000),
        frame({"pickle": "gASV"}),
        frame({"float": "1e5"}),
        frame({"dict": [["a", 1], ["a", 2]]}),
        frame({"dict": [[1, 2]]}),
        frame({"dict": {"a": 1}}),
        frame({"opaque": 3}),
        frame({"tensor": "0", "complex": False, "order": []}),
        frame({"tensor": ["0"], "complex": False, "order": []}),
        frame(1, b"not tensors at all, whatever they are"),
        frame(1, struct.pack("<Q", 2**60) + b"{}"),
        wire.pack(torch.ones(2))[:-3],
        wire.pack(torch.ones(2, 2)).replace(b'"order":[0,1]', b'"order":[0,9]'),
        wire.pack(torch.ones(2, 2)).replace(b'"order":[0,1]', b'"order":[0,0]'),
        wire.pack(torch.ones(2)).replace(b'"complex":false', b'"complex":true '),
        struct.pack(">I", 2**31) + b"{}",
    ],
    ids=range(27),
)
def test_whatever_is_malformed_is_a_value_error_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        wire.unpack(content)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_frame_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    content = bytearray(wire.pack({"a": torch.arange(3.0), "b": [1, 2.5, "t", None], "c": {"d": Opaque("x")}}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        wire.unpack(bytes(content))


@pytest.mark.parametrize(
    "change",
    [
        {"value": None, "more": 1},
        {"errors": "KeyError"},
        {"errors": ["x"] * 101},
        {"errors": ["x" * 501]},
        {"errors": [Opaque("KeyError")]},
        {"message": "x" * 1_001},
        {"message": Opaque("x")},
        {"printed": None},
        {"stopped": 1},
        {"changed": ["x"]},
        {"after": {}},
        {"after": {"x": 1}},
        {"after": [1]},
    ],
    ids=str,
)
def test_an_observation_with_other_fields_is_refused(change: dict[str, Data]) -> None:
    with pytest.raises(ValueError, match="observation"):
        wire.observation_from_data(sent(Seen(1)) | change, GIVEN)
    with pytest.raises(ValueError, match="observation"):
        wire.observation_from_data([1], GIVEN)


def test_frames_are_read_whatever_the_pieces_they_come_in() -> None:
    writer, reader = wire.Writer(KEY), wire.Reader(KEY, 10_000, 100_000)
    sent: list[Data] = [1, "two", {"three": [3]}]
    content = b"".join(writer.frame(data) for data in sent)
    assert [frame for byte in content for frame in reader.feed(bytes([byte]))] == sent


@pytest.mark.parametrize("what", ["another key", "twice", "out of order", "changed", "too large", "too much"])
def test_a_frame_that_the_runner_did_not_send_now_is_refused(what: str) -> None:
    writer, reader = wire.Writer(KEY), wire.Reader(KEY, 1_000, 3_000)
    one, two = writer.frame("one"), writer.frame("two")
    bad = {
        "another key": wire.Writer(bytes(32)).frame("one"),
        "twice": one + one,
        "out of order": two,
        "changed": one.replace(b"one", b"One"),
        "too large": writer.frame("x" * 2_000),
        "too much": one * 200,
    }
    with pytest.raises(ValueError, match=r"frame|bytes"):
        list(reader.feed(bad[what]))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_threads_start_and_no_processes(machine: str) -> None:
    column, architecture = seccomp.ARCHITECTURES[machine]

    def allowed(number: int, first: int = 0, arch: int = architecture, starting: bool = False) -> bool:
        return _run_bpf(seccomp.program(machine, starting), number, arch, first) == seccomp.ALLOW

    clone, socket = seccomp.CLONE[column], seccomp.SOCKET[column]
    assert allowed(clone, 0x3D0F00)  # what the C library says for a thread: CLONE_THREAD and others
    assert not allowed(clone, 17)  # SIGCHLD: a process
    assert not allowed(seccomp.CLONE3[column])
    assert [allowed(socket, family) for family in (1, 2, 10, 16, 17, 38, 40)] == [True] * 3 + [False] * 4
    assert not any(allowed(numbers[column]) for numbers in seccomp.FORBIDDEN.values() if numbers[column] >= 0)
    silent = [numbers[column] for numbers in seccomp.IGNORED.values() if numbers[column] >= 0]
    assert {_run_bpf(seccomp.program(machine), number, architecture, 0) for number in silent} == {seccomp.REFUSE}
    (prctl, ioctl) = (seccomp.WITH_ARGUMENTS[name][0][column] for name in ("prctl", "ioctl"))
    assert (allowed(prctl, 1), allowed(prctl, 15)) == (False, True)  # PR_SET_PDEATHSIG, PR_SET_NAME
    requests = (0x40086602, 0x401C5820, 0x5401)  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, TCGETS
    found = [_run_bpf(seccomp.program(machine), ioctl, architecture, 0, request) for request in requests]
    assert [value == seccomp.ALLOW for value in found] == [False, False, True]
    execve = seccomp.STARTING["execve"][column]
    assert (allowed(execve), allowed(execve, starting=True)) == (False, True)
    assert all(allowed(number) for number in {"x86_64": (0, 1, 9, 11, 12, 202, 231), "aarch64": (63, 64, 98)}[machine])
    assert not allowed(1, arch=0x40000003)  # the 32-bit calls of the same machine
    assert not allowed(seccomp.X32 + 1)


def _run_bpf(program: bytes, number: int, architecture: int, first: int, second: int = 0) -> int:
    """A small interpreter of the few instructions that the filter has (Linux, include/uapi/linux/filter.h)."""
    memory = struct.pack("<IIQQQ", number, architecture, 0, first, second)
    lines = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    place = value = 0
    while True:
        code, yes, no, k = lines[place]
        place += 1
        if code == seccomp.RETURN:
            return k
        if code == seccomp.LOAD:
            (value,) = struct.unpack_from("<I", memory, k)
            continue
        holds = {seccomp.EQUAL: value == k, seccomp.AT_LEAST: value >= k, seccomp.ANY_BIT: bool(value & k)}[code]
        place += yes if holds else no
