"""Compare the outputs of two executions of a notebook."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterable
from typing import Any

from lora_from_scratch.grading.building.assemble import Cell

PICTURE = "image/png"
INSIDE = re.compile(r"data:image/png;base64,[^\"]*")  # the same picture again, in HTML
NUMBER = re.compile(r"[-+−]?\d+([,.]\d+)*(e[-+]?\d+)?")
LEVELS = 16  # of 255: the difference that every pixel may have
PIXELS = 0.002  # the share of the pixels that may differ by more
OTHER_LINES = 0.1  # the share of the lines that may differ, because training ended differently


def differences(cells: Iterable[Cell], before: Any, now: Any, same_processor: bool = True) -> list[str]:
    """The cells whose output has changed, one message each; volatile cells are not compared.

    Text must be identical; pictures may differ by `LEVELS` in every channel, and by more in `PIXELS` of the pixels.
    Another processor rounds differently, so training and drawing have different results there: then pictures only have
    to exist, and text without its numbers must be the same in all but `OTHER_LINES` of the lines.
    """
    found: list[str] = []
    lines = 0
    for cell, old, new in zip(cells, before.cells, now.cells, strict=True):
        if cell.kind != "code" or cell.volatile:
            continue
        if [kind_of(output) for output in old.outputs] != [kind_of(output) for output in new.outputs]:
            return [f"{cell.place}: it has other outputs: {len(old.outputs)} before, {len(new.outputs)} now"]
        for one, other in zip(old.outputs, new.outputs, strict=True):
            lines += len(_lines(one, same_processor))
            found += [f"{cell.place}: {what}" for what in _differs(one, other, same_processor)]
    return found if same_processor or len(found) > OTHER_LINES * lines else []


def kind_of(output: Any) -> tuple[str, ...]:
    return (output.output_type, output.get("name", ""), *sorted(output.get("data", {})))


def _differs(before: Any, now: Any, same_processor: bool) -> Iterable[str]:
    for old, new in itertools.zip_longest(_lines(before, same_processor), _lines(now, same_processor)):
        if old != new:
            yield f"before: {old and old[:150]!r}; now: {new and new[:150]!r}"
    pictures = [output.data[PICTURE] for output in (before, now) if PICTURE in output.get("data", {})]
    if same_processor and pictures and not same_picture(*pictures):
        yield "the picture has changed"


def _lines(output: Any, same_processor: bool) -> list[str]:
    """Everything in an output except its picture."""
    texts = [output.get("text", ""), *(alt for alt in output.get("metadata", {}).values())]
    texts += [value for kind, value in sorted(output.get("data", {}).items()) if kind != PICTURE]
    lines = [line for text in texts for line in INSIDE.sub("", str(text)).splitlines()]
    return lines if same_processor else [" ".join(NUMBER.sub("#", line).split()) for line in lines]


def same_picture(one: str, other: str) -> bool:
    """Whether two PNGs (base64) have equal bytes or look the same."""
    import numpy as np
    from PIL import Image

    if one.strip() == other.strip():
        return True
    a, b = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), dtype=np.int16)
        for text in (one, other)
    )
    return a.shape == b.shape and bool((abs(a - b).max(axis=-1) > LEVELS).mean() <= PIXELS)
