"""The first LoRA that a reader meets, in README.md and in methods/lora.py, computes what the library computes."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

from lora_from_scratch.methods import lora
from lora_from_scratch.methods.lora import LoRALinear
from tests.helpers import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SOURCES = {
    "README.md": re.search(r"```python\n(class LoRA\(nn\.Module\):.*?)```", README, re.DOTALL),
    "methods/lora.py": re.search(
        r"^    class LoRA\(nn\.Module\):\n.*?\n(?=^\S)", str(inspect.getsource(lora)), re.DOTALL | re.MULTILINE
    ),
}


def ten_lines(place: str) -> str:
    found = SOURCES[place]
    assert found is not None, f"{place} has no LoRA in ten lines"
    return textwrap.dedent(found[0].removeprefix("```python\n").removesuffix("```"))


@pytest.mark.parametrize("place", SOURCES)
def test_it_is_ten_lines_and_the_equation_of_the_library(place: str) -> None:
    source = ten_lines(place)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(source, names)
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    short, ours = names["LoRA"](base, rank=2, alpha=8), LoRALinear(base, rank=2, alpha=8)
    assert torch.equal(short(x), base(x))
    assert {name for name, p in short.named_parameters() if p.requires_grad} == {"A", "B"}
    with torch.no_grad():
        for theirs, own in ((short.A, ours.lora_A), (short.B, ours.lora_B)):
            theirs.copy_(torch.randn_like(theirs))
            own.copy_(theirs)
    torch.testing.assert_close(short(x), ours(x))
    assert not torch.allclose(short(x), base(x))


def test_the_two_are_the_same_code() -> None:
    first, second = (re.sub(r" *#.*", "", ten_lines(place)).split() for place in SOURCES)
    assert first == second
