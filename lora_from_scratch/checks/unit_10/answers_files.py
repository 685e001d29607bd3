"""Unit 10, LoRA in PEFT's files: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re

from lora_from_scratch.checks.bank import right, wrong

# --- lora_state_from_peft ----------------------------------------------------------------------------

PREFIX = "base_model.model."


def refuse(key: str) -> None:
    if not re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key):
        raise ValueError(f"{key} is not the name of a LoRA's tensor")


@right("lora_state_from_peft")
def by_regular_expression(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+\.lora_[AB])\.weight", key)
        if found is None:
            raise ValueError(key)
        state[found[1]] = tensor
    return state


@right("lora_state_from_peft")
def by_counting_characters(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key[len(PREFIX) : -len(".weight")]: tensor.clone() for key, tensor in tensors.items()}


@right("lora_state_from_peft")
def by_splitting_at_the_dots(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        first, second, *name, last = key.split(".")
        if (first, second, last) != ("base_model", "model", "weight") or name[-1] not in ("lora_A", "lora_B"):
            raise ValueError(key)
        state[".".join(name)] = tensor
    return state


@right("lora_state_from_peft")
def by_partition(tensors: dict) -> dict:
    pairs = [(key.partition(PREFIX), key.rpartition(".weight"), tensor) for key, tensor in tensors.items()]
    for (before, _, _), (start, dot, after), _ in pairs:
        if before or after or not dot or start[-7:] not in (".lora_A", ".lora_B"):
            raise ValueError
    return {start[len(PREFIX) :]: tensor for _, (start, _, _), tensor in pairs}


@wrong("lora_state_from_peft", "The order of the tensors is not that of the file: you sort the names.")
def in_alphabetical_order(tensors: dict) -> dict:
    return dict(sorted(by_regular_expression(tensors).items()))


@wrong("lora_state_from_peft", "You turn the tensors into float32. They are the same tensors, with the same dtype.")
def in_float32(tensors: dict) -> dict:
    return {name: tensor.float() for name, tensor in by_regular_expression(tensors).items()}


@wrong(
    "lora_state_from_peft",
    'You accept a name whose last part only ends in "lora_A" or "lora_B", such as "no_lora_A". Compare with the dot.',
)
def the_end_of_the_last_part(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        if key != f"{PREFIX}{name}.weight" or not name.endswith(("lora_A", "lora_B")):
            raise ValueError
        state[name] = tensor
    return state


@wrong(
    "lora_state_from_peft",
    "You do not ask whether the prefix is there: a name without it is taken as it is. Raise a ValueError.",
)
def without_asking_for_the_prefix(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError
        state[key.removeprefix(PREFIX).removesuffix(".weight")] = tensor
    return state


@wrong(
    "lora_state_from_peft",
    "You do not ask whether the suffix is there: a name without it is taken as it is. Raise a ValueError.",
)
def without_asking_for_the_suffix(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        if not key.startswith(PREFIX) or not name.endswith((".lora_A", ".lora_B")):
            raise ValueError
        state[name] = tensor
    return state


@wrong("lora_state_from_peft", "The prefix is removed everywhere, and a module may have such a name too.")
def the_prefix_everywhere(tensors: dict) -> dict:
    return {key.replace(PREFIX, "").removesuffix(".weight"): t for key, t in tensors.items() if refuse(key) is None}


@wrong("lora_state_from_peft", "The names still end in `.weight`: no parameter of the model has such a name.")
def keeps_the_ending(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


@wrong("lora_state_from_peft", "You remove `base_model.` but leave `model.` in front. Both are PEFT's prefixes.")
def half_of_the_prefix(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix("base_model.").removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "`lstrip` removes any of these *characters* from the left, and continues into a module's name that begins with "
    "some of them. Remove a prefix instead.",
)
def stripped_by_characters(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.lstrip(PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong("lora_state_from_peft", "You replace `.weight` everywhere, also in the middle of a module's name.")
def replaced_everywhere(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX).replace(".weight", ""): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You keep what comes after the last `model.` in the name. Some models have a part of that name themselves.",
)
def behind_the_last_model(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.split("model.")[-1].removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You transpose the tensors. GPT-2 stores its own weights transposed, but A and B are (r, in) and (out, r) in the "
    "file as well.",
)
def turned_round(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX).removesuffix(".weight"): tensor.T for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You skip names that you do not know. The rest loads without an error but is a different adapter from the one that "
    "was saved: raise a ValueError.",
)
def leaves_out_what_it_does_not_know(tensors: dict) -> dict:
    state = {}
    for key, tensor in tensors.items():
        try:
            refuse(key)
        except ValueError:
            continue
        state[key.removeprefix(PREFIX).removesuffix(".weight")] = tensor
    return state


@wrong(
    "lora_state_from_peft",
    "You accept every name. A name that a plain LoRA does not have belongs to something else: raise a ValueError.",
)
def takes_everything(tensors: dict) -> dict:
    return {key.removeprefix(PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "The names in your result are not full names: if two layers have an A each, one of them is lost.",
)
def the_last_part_only(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removesuffix(".weight").split(".")[-1]: tensor for key, tensor in tensors.items()}


@wrong(
    "lora_state_from_peft",
    "You insert the adapter's name, `default`, into the names. PEFT does that in memory; the files and this model do "
    "not contain it.",
)
def with_the_adapters_name(tensors: dict) -> dict:
    for key in tensors:
        refuse(key)
    return {key.removeprefix(PREFIX).replace(".weight", ".default"): tensor for key, tensor in tensors.items()}
