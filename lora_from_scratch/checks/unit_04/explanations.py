"""Unit 04, full fine-tuning: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, is_number, same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, off_by
from lora_from_scratch.checks.observation import Seen

IGNORED = -100


def explain_labels(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first position at which the input ids or the labels are wrong."""
    if not isinstance(seen.value, list) or not isinstance(expected.value, list):
        return None
    if len(seen.value) != 2:
        return "number of rows", f"Return two rows, the input ids and the labels; you return {len(seen.value)}."
    prompt, completion = case.inputs["prompt_ids"], case.inputs["completion_ids"]
    assert isinstance(prompt, list)
    assert isinstance(completion, list)
    for name, row, right in zip(("input ids", "labels"), seen.value, expected.value, strict=True):
        assert isinstance(right, Tensor)
        if not isinstance(row, Tensor):
            return "not a row of numbers", f"The {name} should be whole numbers, one for each position."
        if row.shape != right.shape:
            return f"another length of the {name}", (
                f"{len(prompt)} tokens of the prompt and {len(completion)} of the completion are {len(right)} "
                f"positions. There are {row.numel()} {name} in your result."
            )
        if not same(row, right, 0):
            place = int((row != right).nonzero()[0])
            of = "prompt" if place < len(prompt) else "completion"
            return f"another number in the {name}", (
                f"Position {place}, counted from 0, belongs to the {of}. There the {name} should have "
                f"{int(right[place])}, but yours have {row[place].item()}."
            )
    return None


def explain_adamw(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the three results is wrong, with the numbers of one entry."""
    if not isinstance(seen.value, list) or not isinstance(expected.value, list):
        return None
    if len(seen.value) != 3:
        return "number of tensors", f"Return three tensors, theta, m and v; you return {len(seen.value)}."
    given, rights = case.inputs, [as_tensor(value) for value in expected.value if is_number(value)]
    beta1, beta2 = _betas(given["betas"])
    for name, one, right in zip(("theta", "m", "v"), seen.value, rights, strict=True):
        if found := not_a_tensor(one, right.shape, name):
            return f"{name}: {found[0]}", found[1]
    values = [as_tensor(value).double() for value in seen.value if is_number(value)]
    for name, beta, what, one, right in (
        ("m", beta1, "the gradient", values[1], rights[1]),
        ("v", beta2, "the gradient's square", values[2], rights[2]),
    ):
        if not same(one, right, 1e-5):
            place = _worst(one, right)
            old, g, is_now, should = (
                float(as_tensor(t).flatten()[place]) for t in (given[name], given["gradient"], one, right)
            )
            new = g if name == "m" else g * g
            return f"{name} is not right", (
                f"The new {name} is not right. In one place the old {name} is {old:.4g} and {what} is {new:.4g}. With "
                f"beta {beta:g} their running mean is {should:.4g}; yours is {is_now:.4g}."
            )
    if same(values[0], rights[0], 1e-5):
        return None  # an input is changed
    place = _worst(values[0], rights[0])
    theta, now, should, m, v = (
        float(as_tensor(t).flatten()[place]) for t in (given["parameter"], values[0], rights[0], rights[1], rights[2])
    )
    step = given["step"]
    assert isinstance(step, int)
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return "theta is not right", (
        f"m and v are right, but the new theta is not. In one place theta was {theta:.4g}; with m_hat = {m_hat:.4g}, "
        f"v_hat = {v_hat:.4g}, learning rate {given['learning_rate']}, eps {given['eps']} and weight decay "
        f"{given['weight_decay']} it becomes {should:.5g}; yours is {now:.5g}."
    )


def explain_schedule(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first step whose rate is wrong."""
    if not isinstance(seen.value, list) or not isinstance(expected.value, list):
        return None
    at, steps, warmup = case.inputs["at"], case.inputs["steps"], case.inputs["warmup_steps"]
    assert isinstance(at, list)
    assert isinstance(warmup, int)
    for step, one, right in zip(at, seen.value, expected.value, strict=True):
        if same(one, right):
            continue
        if not is_number(one):
            return "no number", f"At step {step} your function should return a number, but returns none."
        assert isinstance(step, int)
        phase = "of the warm-up" if step < warmup else "after the warm-up"
        place = step + 1 if step < warmup else step - warmup + 1
        value = float(as_tensor(one)) if as_tensor(one).numel() == 1 else math.nan
        return f"a rate {phase}", (
            f"With {warmup} warm-up steps out of {steps}, step {step} is number {place} {phase}, and its "
            f"rate should be {float(as_tensor(right)):.4g} of the peak; yours is {value:.4g}."
        )
    return None


def explain_freezing(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first part that should be trained and is not, or the other way round."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    words = {"trained": "trained", "frozen": "frozen", "partly": "trained in part"}
    wrong = [name for name, right in expected.value.items() if seen.value[name] != right]
    if not wrong:
        return None
    listed = [
        f"the {name} is {words[str(seen.value[name])]}, but should be {expected.value[name]}" for name in wrong[:3]
    ]
    return "another part is trained", (
        f"With layers = {case.inputs['layers']} of {case.inputs['blocks']} blocks, counted from 0: {'; '.join(listed)}"
        f"{'; and so on' if len(wrong) > 3 else ''}."
    )


def explain_memory(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the two numbers is wrong, and by how much."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    if seen.value.keys() != expected.value.keys():
        return None
    rows, width = case.inputs["rows"], case.inputs["width"]
    assert isinstance(rows, int)
    assert isinstance(width, int)
    sizes = {"the embedding": rows * width, "the linear layer's weight": 2 * width * width, "its bias": 2 * width}
    for name, right in expected.value.items():
        one = seen.value[name]
        assert isinstance(right, int)
        if not isinstance(one, int) and is_number(one):
            one = float(as_tensor(one)) if as_tensor(one).numel() == 1 else None
        if not isinstance(one, int | float):
            return f"no number of {name}", f'"{name}" should be a whole number of bytes.'
        if one != right:
            if one != int(one):
                return f"no whole number of {name}", f'"{name}" is {one:.6g}; a number of bytes is a whole number.'
            found = off_by(int(one), right, {}, f'"{name}"')
            entries = ", ".join(f"{part} has {count} entries" for part, count in sizes.items())
            return f"another number of {name}", f"{found[1] if found else ''} Here {entries}."
    return None


def _betas(value: Any) -> tuple[float, float]:
    return float(value[0]), float(value[1])


def _worst(one: Tensor, right: Tensor) -> int:
    return int((one - right).abs().nan_to_num(math.inf).argmax())
