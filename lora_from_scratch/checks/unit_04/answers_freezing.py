"""Unit 04, full fine-tuning, freezing: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

from lora_from_scratch.checks.bank import right, wrong

# --- freeze_all_but_last -----------------------------------------------------------------------------


def refuse_layers(model, layers):
    if not 0 <= layers <= len(model.transformer.h):
        raise ValueError(f"{layers} layers of {len(model.transformer.h)}")


def open_only(model, modules):
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)


@right("freeze_all_but_last")
def by_name(model, layers):
    refuse_layers(model, layers)
    first = len(model.transformer.h) - layers
    for name, p in model.named_parameters():
        parts = name.split(".")
        p.requires_grad = parts[1] == "ln_f" or (parts[1] == "h" and int(parts[2]) >= first)


@right("freeze_all_but_last")
def closing_one_by_one(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    for p in model.parameters():
        p.requires_grad_(True)
    for part in (body.wte, body.wpe, *body.h[: len(body.h) - layers]):
        for p in part.parameters():
            p.requires_grad_(False)


@right("freeze_all_but_last")
def by_set(model, layers):
    refuse_layers(model, layers)
    blocks = list(model.transformer.h)
    chosen = [*blocks[len(blocks) - layers :], model.transformer.ln_f]
    kept = {id(p) for module in chosen for p in module.parameters()}
    for p in model.parameters():
        p.requires_grad = id(p) in kept
    return model


@right("freeze_all_but_last")
def counted_from_the_end(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    flags = [place < layers for place in reversed(range(len(body.h)))]
    for module, flag in zip([body.wte, body.wpe, body.ln_f, *body.h], [False, False, True, *flags], strict=True):
        module.requires_grad_(flag)


@wrong(
    "freeze_all_but_last",
    "You train the first blocks and freeze the last ones: it should be the ones near the output that learn.",
)
def the_first_blocks(model, layers):
    refuse_layers(model, layers)
    open_only(model, [*model.transformer.h[:layers], model.transformer.ln_f])


@wrong("freeze_all_but_last", "One block too many is trained.")
def one_too_many(model, layers):
    refuse_layers(model, layers)
    first = max(0, len(model.transformer.h) - layers - 1)
    open_only(model, [*model.transformer.h[first:], model.transformer.ln_f])


@wrong("freeze_all_but_last", "You always train exactly one block, whatever the number of layers.")
def only_one_block(model, layers):
    refuse_layers(model, layers)
    open_only(model, [model.transformer.h[len(model.transformer.h) - max(layers, 1)], model.transformer.ln_f])


@wrong("freeze_all_but_last", "With 0 layers you train every block: a slice that starts at -0 starts at the front.")
def minus_zero(model, layers):
    refuse_layers(model, layers)
    open_only(model, [*model.transformer.h[-layers:], model.transformer.ln_f])


@wrong("freeze_all_but_last", "The last LayerNorm comes after the last block, and is trained with it.")
def forgets_the_last_norm(model, layers):
    refuse_layers(model, layers)
    open_only(model, model.transformer.h[len(model.transformer.h) - layers :])


@wrong("freeze_all_but_last", "Both embeddings are still trained, although they come before all blocks.")
def embeddings_open(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    open_only(model, [body.wte, body.wpe, *body.h[len(body.h) - layers :], body.ln_f])


@wrong(
    "freeze_all_but_last",
    "You train the token embedding, perhaps because it is also the output layer. But it is the input too, below every "
    "block that you freeze: here it stays frozen.",
)
def output_layer_open(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    open_only(model, [body.wte, *body.h[len(body.h) - layers :], body.ln_f])


@wrong(
    "freeze_all_but_last", "The position embedding is still trained. Like the token embedding, it is part of the input."
)
def positions_open(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    open_only(model, [body.wpe, *body.h[len(body.h) - layers :], body.ln_f])


@wrong(
    "freeze_all_but_last",
    "You only freeze. In a model that was already frozen, perhaps by a run with fewer layers, the last blocks have to "
    "be unfrozen.",
)
def only_freezes(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    for part in (body.wte, body.wpe, *body.h[: len(body.h) - layers]):
        part.requires_grad_(False)


@wrong(
    "freeze_all_but_last",
    "Nothing has changed. `requires_grad` belongs to parameters; setting it on a module only creates a new attribute "
    "that nothing reads.",
)
def attribute_of_the_module(model, layers):
    refuse_layers(model, layers)
    model.requires_grad = False
    for block in model.transformer.h[len(model.transformer.h) - layers :]:
        block.requires_grad = True


@wrong(
    "freeze_all_but_last",
    "You select by the beginning of names. The prefix of block 1 also matches blocks 10 and 11.",
)
def names_that_begin_alike(model, layers):
    refuse_layers(model, layers)
    frozen = [f"transformer.h.{i}" for i in range(len(model.transformer.h) - layers)]
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith(("transformer.wte", "transformer.wpe", *frozen))


@wrong(
    "freeze_all_but_last",
    "You select by shape, and treat biases and norms differently from matrices. A block is trained as a whole.",
)
def only_matrices(model, layers):
    refuse_layers(model, layers)
    open_only(model, [*model.transformer.h[len(model.transformer.h) - layers :], model.transformer.ln_f])
    for p in model.parameters():
        p.requires_grad = p.requires_grad and p.ndim >= 2


@wrong("freeze_all_but_last", "Everything is frozen: the blocks that should learn have to be unfrozen again.")
def freezes_everything(model, layers):
    refuse_layers(model, layers)
    model.requires_grad_(False)


@wrong(
    "freeze_all_but_last", "The number of blocks cannot be negative or larger than the model has: raise a ValueError."
)
def any_number_will_do(model, layers):
    first = max(0, len(model.transformer.h) - max(layers, 0))
    open_only(model, [*model.transformer.h[first:], model.transformer.ln_f])


@wrong("freeze_all_but_last", "A negative number of blocks has to raise a ValueError as well.")
def negative_will_do(model, layers):
    if layers > len(model.transformer.h):
        raise ValueError("too many")
    open_only(model, [*model.transformer.h[len(model.transformer.h) - max(layers, 0) :], model.transformer.ln_f])
