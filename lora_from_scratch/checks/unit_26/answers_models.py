"""Unit 26: mistakes that people make, and other right ways. LoRA on any model, and the labels of chats."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re

import torch
from torch import nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.chats import assistant_labels
from lora_from_scratch.methods.lora_by_name import add_lora

# --- add_lora ----------------------------------------------------------------------------------------


@right("add_lora")
def name_by_name(model, targets, make_layer):
    names = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if targets == "all-linear":
            get = getattr(model, "get_output_embeddings", None)
            if get is not None and get() is module:
                continue
            names.append(name)
        else:
            for target in targets:
                if name == target or name.endswith("." + target):
                    names.append(name)
                    break
    if targets != "all-linear":
        for target in targets:
            if not [name for name in names if f".{name}".endswith(f".{target}")]:
                raise ValueError(target)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name in names:
        *path, last = name.split(".")
        parent = model
        for part in path:
            parent = getattr(parent, part)
        setattr(parent, last, make_layer(getattr(parent, last)))
    return names


@right("add_lora")
def with_parts_of_names(model, targets, make_layer):
    def is_meant(name, target):
        wanted = target.split(".")
        return name.split(".")[-len(wanted) :] == wanted

    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        head = model.get_output_embeddings() if "get_output_embeddings" in dir(model) else object()
        chosen = [name for name in everything if model.get_submodule(name) is not head]
    else:
        found = {target: [name for name in everything if is_meant(name, target)] for target in targets}
        if not all(found.values()):
            raise ValueError("a name matches no layer")
        chosen = sorted({name for names in found.values() for name in names}, key=everything.index)
    model.requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        place = model.get_submodule(parent)
        place._modules[child] = make_layer(place._modules[child])
    return chosen


@right("add_lora")
def with_a_pattern(model, targets, make_layer):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if targets == "all-linear":
        if hasattr(model, "get_output_embeddings"):
            layers = {name: layer for name, layer in layers.items() if id(layer) != id(model.get_output_embeddings())}
    else:
        patterns = [re.compile(rf"(.*\.)?{re.escape(target)}") for target in targets]
        if not all(any(pattern.fullmatch(name) for name in layers) for pattern in patterns):
            raise ValueError("a name matches no layer")
        layers = {name: layer for name, layer in layers.items() if any(p.fullmatch(name) for p in patterns)}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, make_layer(layer))
    return list(layers)


@right("add_lora")
def through_parents(model, targets, make_layer):
    head = getattr(model, "get_output_embeddings", lambda: None)()
    places, hit = [], set()
    for path, parent in model.named_modules():
        for child, module in parent.named_children():
            full = f"{path}.{child}" if path else child
            if type(module) is nn.Linear:
                if targets == "all-linear":
                    meant = module is not head
                else:
                    matching = {t for t in targets if full == t or full.endswith(f".{t}")}
                    hit |= matching
                    meant = bool(matching)
                if meant:
                    places.append((full, parent, child))
    if targets != "all-linear" and set(targets) - hit:
        raise ValueError(f"nothing is called {(set(targets) - hit).pop()}")
    order = [name for name, _ in model.named_modules()]
    model.requires_grad_(False)
    for _, parent, child in places:
        setattr(parent, child, make_layer(getattr(parent, child)))
    return sorted((full for full, _, _ in places), key=order.index)


@wrong("add_lora", "You replace the output head as well. With all-linear it is left out.")
@changed(add_lora, ("if module is not head]", "]"))
def the_head_too(): ...


@wrong("add_lora", "You recognise the head by a name. Models call it differently: ask `get_output_embeddings()`.")
@changed(add_lora, ("if module is not head]", 'if not ends_with(name, "lm_head")]'))
def a_head_by_its_name(): ...


@wrong("add_lora", "You leave out the last layer, whatever it is. A model without the method has no head to leave out.")
@changed(
    add_lora, ("chosen = [name for name, module in linear.items() if module is not head]", "chosen = list(linear)[:-1]")
)
def without_the_last_layer(): ...


@wrong("add_lora", "You expect `get_output_embeddings` of every model. A classifier does not have it.")
@changed(add_lora, (' if hasattr(model, "get_output_embeddings") else None', ""))
def every_model_has_a_head(): ...


@wrong(
    "add_lora",
    "You choose every name that ends with the letters of a target. The target has to be the whole name, or to come "
    "after a dot.",
)
@changed(
    add_lora,
    ("if any(ends_with(name, target) for target in targets)", "if any(name.endswith(target) for target in targets)"),
)
def the_last_letters(): ...


@wrong("add_lora", "You choose every name that contains a target anywhere. It has to stand at the end.")
@changed(
    add_lora,
    ("if any(ends_with(name, target) for target in targets)", "if any(target in name for target in targets)"),
)
def anywhere_in_the_name(): ...


@wrong("add_lora", "You compare only the last part of the name. A target may have several parts, as in attn.k_proj.")
@changed(
    add_lora,
    (
        "if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:",
        "if lost := [t for t in targets if t not in {name.split('.')[-1] for name in linear}]:",
    ),
    ("if any(ends_with(name, target) for target in targets)", "if name.split('.')[-1] in targets"),
)
def one_part_of_the_name(): ...


@wrong("add_lora", "You choose modules that are no `nn.Linear`, such as an embedding or a convolution.")
@changed(add_lora, ("if isinstance(module, nn.Linear)}", 'if hasattr(module, "weight")}'))
def everything_with_a_weight(): ...


@wrong("add_lora", "The old weights are still trained. Only what `make_layer` adds should be.")
@changed(add_lora, ("    model.requires_grad_(False)\n", ""))
def nothing_is_frozen(): ...


@wrong("add_lora", "You freeze only the layers that you replace. The rest of the model is trained along.")
@changed(
    add_lora,
    ("    model.requires_grad_(False)\n", "    for name in chosen:\n        linear[name].requires_grad_(False)\n"),
)
def only_the_replaced_are_frozen(): ...


@wrong("add_lora", "You freeze the model after the replacement, and with it what `make_layer` has added.")
def frozen_last(model, targets, make_layer):
    names = add_lora(model, targets, make_layer)
    model.requires_grad_(False)
    return names


@wrong("add_lora", "A name that matches nothing should raise a ValueError: a typing error would train less than meant.")
@changed(
    add_lora,
    (
        "if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:",
        "if lost := []:",
    ),
)
def no_error(): ...


@wrong("add_lora", "You raise the error only if nothing at all is chosen. Each name has to match a layer.")
@changed(
    add_lora,
    (
        "if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:",
        "if lost := targets if not any(ends_with(n, t) for t in targets for n in linear) else []:",
    ),
)
def an_error_if_nothing_matches(): ...


@wrong("add_lora", "After the error the model has changed: look at the names before you freeze or replace anything.")
def an_error_too_late(model, targets, make_layer):
    model.requires_grad_(False)
    return add_lora(model, targets, make_layer)


@wrong("add_lora", "You call `make_layer` again for a layer that two targets mean, so that it is wrapped twice.")
def target_by_target(model, targets, make_layer):
    if targets == "all-linear":
        return add_lora(model, targets, make_layer)
    chosen = {target: [] for target in targets}
    for target in targets:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f".{name}".endswith(f".{target}"):
                chosen[target].append(name)
        if not chosen[target]:
            raise ValueError(target)
    order = [name for name, _ in model.named_modules()]
    model.requires_grad_(False)
    for names in chosen.values():
        for name in names:
            model.set_submodule(name, make_layer(model.get_submodule(name)))
    return sorted({name for names in chosen.values() for name in names}, key=order.index)


@wrong("add_lora", "The names that you return are in another order than in `model.named_modules()`.")
def sorted_by_name(model, targets, make_layer):
    return sorted(add_lora(model, targets, make_layer))


@wrong("add_lora", "You return something else than the list of names.")
def returns_the_model(model, targets, make_layer):
    add_lora(model, targets, make_layer)
    return model


@wrong("add_lora", "You make the new layers and do not put them into the model.")
@changed(
    add_lora,
    (
        "inject_lora(model, {name: make_layer(linear[name]) for name in chosen})",
        "[make_layer(linear[name]) for name in chosen]",
    ),
)
def made_and_forgotten(): ...


# --- assistant_labels --------------------------------------------------------------------------------


@right("assistant_labels")
def from_reply_to_reply(input_ids, attention_mask, opening, end_id):
    labels = torch.full(input_ids.shape, -100)
    n = len(opening)
    for row in range(len(input_ids)):
        ids = input_ids[row][attention_mask[row] == 1].tolist()
        place = 0
        while place + n <= len(ids):
            if ids[place : place + n] != list(opening):
                place += 1
                continue
            place += n
            rest = ids[place:]
            length = rest.index(end_id) + 1 if end_id in rest else len(rest)
            labels[row, place : place + length] = input_ids[row, place : place + length]
            place += length
    return labels


@right("assistant_labels")
def with_a_mask(input_ids, attention_mask, opening, end_id):
    reply = torch.zeros_like(input_ids, dtype=torch.bool)
    wanted = torch.tensor(opening)
    for row, ids in enumerate(input_ids):
        on = False
        for place in range(int(attention_mask[row].sum())):
            reply[row, place] = on
            if on and ids[place] == end_id:
                on = False
            elif not on and place + 1 >= len(wanted):
                on = torch.equal(ids[place + 1 - len(wanted) : place + 1], wanted)
    return input_ids.masked_fill(~reply, -100)


@right("assistant_labels")
def with_windows(input_ids, attention_mask, opening, end_id):
    n, (rows, length) = len(opening), input_ids.shape
    labels = torch.where(attention_mask.bool(), input_ids, -100)
    starts = torch.zeros(rows, length + 1, dtype=torch.bool)
    if length >= n:
        starts[:, n:] = (input_ids.unfold(1, n, 1) == torch.tensor(opening)).all(dim=2)
    ends = input_ids == end_id
    on = torch.zeros(rows, dtype=torch.bool)
    for place in range(length):
        on = on | starts[:, place]
        labels[~on, place] = -100
        on = on & ~ends[:, place]
    return labels


@right("assistant_labels")
def as_text(input_ids, attention_mask, opening, end_id):
    labels = []
    for row, mask in zip(input_ids.tolist(), attention_mask.tolist()):
        ids = row[: sum(mask)]
        text = "".join(map(chr, ids))
        pattern = re.escape("".join(map(chr, opening))) + f"([^{re.escape(chr(end_id))}]*{re.escape(chr(end_id))}?)"
        made = [-100] * len(row)
        for found in re.finditer(pattern, text, re.DOTALL):
            made[found.start(1) : found.end(1)] = ids[found.start(1) : found.end(1)]
        labels.append(made)
    return torch.tensor(labels)


@wrong(
    "assistant_labels",
    "The end of a reply is not learned, so that the model never learns to stop. It belongs to the reply.",
)
@changed(
    assistant_labels,
    (
        "labels[row, place] = token\n                inside = token != end_id",
        "inside = token != end_id\n                labels[row, place] = token if inside else -100",
    ),
)
def without_the_end(): ...


@wrong(
    "assistant_labels",
    "You take every token with the padding's id for padding. In SmolLM2 it is the id of the end, which is then never "
    "learned: look at `attention_mask`.",
)
def every_end_is_padding(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row, mask in enumerate(attention_mask):
        if int(mask.sum()) < len(mask):
            labels[row, input_ids[row] == input_ids[row, -1]] = -100
    return labels


@wrong("assistant_labels", "You do not look at the mask: the padding after a reply that was cut off is learned.")
def without_the_mask(input_ids, attention_mask, opening, end_id):
    return assistant_labels(input_ids, torch.ones_like(input_ids), opening, end_id)


@wrong("assistant_labels", "You label whole turns: the opening is written by the template, not by the model.")
def with_the_opening(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    n = len(opening)
    for row in range(len(labels)):
        for place in range(n, labels.shape[1]):
            if labels[row, place] != -100 and labels[row, place - 1] == -100:
                labels[row, place - n : place] = input_ids[row, place - n : place]
    return labels


@wrong("assistant_labels", "You label everything after the first opening, the later questions too.")
@changed(assistant_labels, ("inside = token != end_id", "inside = True"))
def everything_after_the_first_opening(): ...


@wrong("assistant_labels", "Only the last reply of a row is learned. All of its replies are.")
def only_the_last_reply(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row in labels:
        replies = [p for p in range(1, len(row)) if row[p] != -100 and row[p - 1] == -100]
        if replies:
            row[: replies[-1]] = -100
    return labels


@wrong("assistant_labels", "Only the first reply of a row is learned. All of its replies are.")
def only_the_first_reply(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row in labels:
        replies = [p for p in range(1, len(row)) if row[p] != -100 and row[p - 1] == -100]
        if len(replies) > 1:
            row[replies[1] :] = -100
    return labels


@wrong("assistant_labels", "You learn the questions as well: every turn counts in your labels.")
def all_turns(input_ids, attention_mask, opening, end_id):
    return torch.where(attention_mask.bool(), input_ids, -100)


@wrong("assistant_labels", "A reply without an end is not labelled at all. It counts up to the end of the row.")
def only_whole_replies(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    for row in labels:
        learned = (row != -100).nonzero().flatten().tolist()
        if learned and row[learned[-1]] != end_id:
            place = learned[-1]
            while place >= 0 and row[place] != -100:
                row[place] = -100
                place -= 1
    return labels


@wrong("assistant_labels", "Your labels are shifted by one place. The loss shifts them; a label stands at its token.")
def shifted(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


@wrong("assistant_labels", "The first token of each reply is missing from your labels.")
def without_the_first_token(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    before = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], dim=1)
    return torch.where(before == -100, -100, labels)


@wrong("assistant_labels", "You look only for the first token of the opening. It begins the turns of others too.")
@changed(
    assistant_labels,
    ("inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening", "inside = token == opening[0]"),
)
def the_first_token_of_the_opening(): ...


@wrong("assistant_labels", "You look only for the last token of the opening, which may occur elsewhere.")
@changed(
    assistant_labels,
    ("inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening", "inside = token == opening[-1]"),
)
def the_last_token_of_the_opening(): ...


@wrong("assistant_labels", "You look for two tokens of the opening at most. It may have any number of tokens.")
@changed(
    assistant_labels,
    (
        "inside = ids[max(0, place + 1 - len(opening)) : place + 1] == opening",
        "inside = ids[max(0, place - 2) : max(0, place - 2) + 2] == opening[:2]",
    ),
)
def two_tokens_of_the_opening(): ...


@wrong("assistant_labels", "What is not learned has to be -100, which the loss ignores. 0 is the id of a token.")
def zero_instead(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    return torch.where(labels == -100, 0, labels)


@wrong("assistant_labels", caught_by="changes its input")
def in_place(input_ids, attention_mask, opening, end_id):
    labels = assistant_labels(input_ids, attention_mask, opening, end_id)
    input_ids.copy_(labels)
    return input_ids
