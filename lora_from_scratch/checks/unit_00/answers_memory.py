"""Unit 00, memory of training: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

# --- training_memory ---------------------------------------------------------------------------------

PARTS = ("weights", "gradients", "optimizer", "activations")


def refuse(parameters, trained, precision):
    if trained > parameters or precision not in ("float32", "bfloat16", "mixed"):
        raise ValueError("impossible")


def memory(weights, gradients, optimizer, activations):
    return dict(zip(PARTS, (weights, gradients, optimizer, activations), strict=True))


@right("training_memory")
def from_a_table(parameters, trained, activations=0, precision="float32"):
    table = {"float32": (4, 4, 8), "bfloat16": (2, 2, 4), "mixed": (2, 2, 12)}
    if precision not in table:
        raise ValueError("no such precision")
    assert_possible = trained <= parameters
    if not assert_possible:
        raise ValueError("too many trained")
    weight, gradient, adam = table[precision]
    return memory(weight * parameters, gradient * trained, adam * trained, activations)


@right("training_memory")
def in_floating_point(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    bits = 32.0 if precision == "float32" else 16.0
    copy = trained * 4.0 if precision == "mixed" else 0.0
    moment = trained * (bits if precision != "mixed" else 32.0) / 8
    return memory(parameters * bits / 8, trained * bits / 8, moment + moment + copy, float(activations))


@right("training_memory")
def one_if_for_each_precision(parameters, trained, activations=0, precision="float32"):
    if parameters < trained:
        raise ValueError("more trained than there are")
    result = {"activations": activations}
    if precision == "float32":
        result |= {"weights": 4 * parameters, "gradients": 4 * trained, "optimizer": 2 * 4 * trained}
    elif precision == "bfloat16":
        result |= {"weights": 2 * parameters, "gradients": 2 * trained, "optimizer": 2 * 2 * trained}
    elif precision == "mixed":
        result |= {"weights": 2 * parameters, "gradients": 2 * trained, "optimizer": (4 + 4 + 4) * trained}
    else:
        raise ValueError(f"unknown precision {precision}")
    return result


@right("training_memory")
def from_tensors(parameters, trained, activations=0, precision="float32"):
    if trained > parameters:
        raise ValueError(f"{trained} of {parameters}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.bfloat16}
    try:
        dtype = dtypes[precision]
    except KeyError:
        raise ValueError(f"precision is one of {list(dtypes)}") from None
    weight = torch.empty(parameters, dtype=dtype, device="meta")
    gradient = torch.empty(trained, dtype=dtype, device="meta")
    state = gradient.float() if precision == "mixed" else gradient
    kept = [state, state] + [state] * (precision == "mixed")
    return memory(weight.nbytes, gradient.nbytes, sum(one.nbytes for one in kept), activations)


@wrong(
    "training_memory",
    "You give frozen parameters a gradient. What is not trained has neither a gradient nor Adam's states.",
)
def everything_has_a_gradient(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    return memory(
        number * parameters,
        number * parameters,
        (12 if precision == "mixed" else 2 * number) * trained,
        activations,
    )


@wrong(
    "training_memory",
    "You give frozen parameters Adam's states too. The optimiser keeps states for trained parameters only.",
)
def adam_for_everything(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    return memory(
        number * parameters, number * trained, (12 if precision == "mixed" else 2 * number) * parameters, activations
    )


@wrong(
    "training_memory", "Adam keeps two numbers for each trained parameter, m and v. You count one: that is momentum."
)
def one_state_as_in_momentum(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    return memory(number * parameters, number * trained, (8 if precision == "mixed" else number) * trained, activations)


@wrong("training_memory", "Frozen weights still take memory: the forward pass needs every weight, trained or not.")
def only_trained_weights(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    return memory(
        number * trained, number * trained, (12 if precision == "mixed" else 2 * number) * trained, activations
    )


@wrong(
    "training_memory",
    "In mixed precision you forget the copy of the weights: without it a small update is lost in 16 bits.",
)
def mixed_without_a_copy(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    return memory(
        number * parameters, number * trained, (8 if precision == "mixed" else 2 * number) * trained, activations
    )


@wrong(
    "training_memory",
    "In mixed precision you keep the optimiser's numbers in 16 bits. Only weights and gradients are in 16 bits.",
)
def mixed_all_in_16_bits(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    return memory(
        number * parameters, number * trained, (3 if precision == "mixed" else 2) * number * trained, activations
    )


@wrong(
    "training_memory",
    "In mixed precision you copy the frozen weights as well. Weights that are never updated need no copy.",
)
def copies_frozen_weights(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    adam = 8 * trained + 4 * parameters if precision == "mixed" else 2 * number * trained
    return memory(number * parameters, number * trained, adam, activations)


@wrong("training_memory", "Every number takes 4 bytes in your answer, whatever the precision.")
def always_in_float32(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    return memory(4 * parameters, 4 * trained, 8 * trained, activations)


@wrong("training_memory", "The activations are already given in bytes; do not multiply them by anything.")
def activations_as_numbers(parameters, trained, activations=0, precision="float32"):
    refuse(parameters, trained, precision)
    number = 4 if precision == "float32" else 2
    adam = (12 if precision == "mixed" else 2 * number) * trained
    return memory(number * parameters, number * trained, adam, number * activations)


@wrong(
    "training_memory",
    "There cannot be more trained parameters than parameters. Raise a ValueError instead of returning a number.",
)
def refuses_only_precisions(parameters, trained, activations=0, precision="float32"):
    return from_a_table(max(parameters, trained), trained, activations, precision)


@wrong(
    "training_memory",
    "An unknown precision is treated as if it were a known one. A misspelt name then silently gives a wrong number.",
)
def refuses_no_precision(parameters, trained, activations=0, precision="float32"):
    known = precision in ("float32", "bfloat16", "mixed")
    return from_a_table(parameters, trained, activations, precision if known else "bfloat16")


@wrong(
    "training_memory",
    "You look for part of a precision's name, so that a misspelt name passes. Compare the whole name.",
)
def part_of_a_name(parameters, trained, activations=0, precision="float32"):
    known = [name for name in ("float32", "bfloat16", "mixed") if name.startswith(precision)]
    return from_a_table(parameters, trained, activations, known[0] if known else precision)


@wrong(
    "training_memory",
    "You refuse training every parameter. That is full fine-tuning; only *more* trained parameters than there are is "
    "impossible.",
)
def refuses_full_fine_tuning(parameters, trained, activations=0, precision="float32"):
    if trained >= parameters:
        raise ValueError("too many trained parameters")
    return from_a_table(parameters, trained, activations, precision)


@wrong(
    "training_memory",
    "With no trained parameter at all you count as if all were trained: 0 is a number like any other, so do not test "
    "it with `or`.",
)
def zero_as_all(parameters, trained, activations=0, precision="float32"):
    return from_a_table(parameters, trained or parameters, activations, precision)


@wrong("training_memory", "The activations are missing: they are given in bytes and belong to the result.")
def no_activations(parameters, trained, activations=0, precision="float32"):
    return {**from_a_table(parameters, trained, 0, precision)}


@wrong(
    "training_memory",
    "In mixed precision you keep the weights in float32 too. The float32 copy is kept in addition, by the optimiser, "
    "and for trained weights only.",
)
def mixed_weights_in_float32(parameters, trained, activations=0, precision="float32"):
    parts = from_a_table(parameters, trained, activations, precision)
    return {**parts, "weights": 4 * parameters, "optimizer": 8 * trained} if precision == "mixed" else parts


@wrong("training_memory", "In mixed precision the gradients are in 16 bits, like the weights; m and v are not.")
def mixed_gradients_in_float32(parameters, trained, activations=0, precision="float32"):
    parts = from_a_table(parameters, trained, activations, precision)
    return {**parts, "gradients": 4 * trained} if precision == "mixed" else parts


@wrong("training_memory", "In plain bfloat16 the optimiser's m and v are in bfloat16 too: every number is.")
def states_always_in_float32(parameters, trained, activations=0, precision="float32"):
    parts = from_a_table(parameters, trained, activations, precision)
    return {**parts, "optimizer": 8 * trained} if precision == "bfloat16" else parts


@wrong(
    "training_memory",
    "The float32 copy of mixed precision belongs to the optimiser; you count it among the weights.",
)
def copy_among_the_weights(parameters, trained, activations=0, precision="float32"):
    parts = from_a_table(parameters, trained, activations, precision)
    copy = 4 * trained if precision == "mixed" else 0
    return {**parts, "weights": parts["weights"] + copy, "optimizer": parts["optimizer"] - copy}


@wrong("training_memory", caught_by="another type")
def only_the_sum(parameters, trained, activations=0, precision="float32"):
    return sum(from_a_table(parameters, trained, activations, precision).values())


# --- activation_bytes --------------------------------------------------------------------------------


@right("activation_bytes")
def the_papers_formula(batch, tokens, width, heads, layers):
    return layers * tokens * batch * width * (34 + 5 * heads * tokens / width)


@right("activation_bytes")
def line_by_line(batch, tokens, width, heads, layers):
    small, square = (batch, tokens, width), (batch, heads, tokens, tokens)
    numbers = [small] * 7 + [square] * 2 + [(batch, tokens, 4 * width)] * 2 + [small]  # all but the masks
    masks = [small, small, square]
    one_block = 2 * sum(np.prod(shape) for shape in numbers) + sum(np.prod(shape) for shape in masks)
    return one_block * layers


@right("activation_bytes")
def tensor_by_tensor(batch, tokens, width, heads, layers):
    def size(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta").nbytes

    stream, mask = (batch, tokens, width), torch.uint8
    total = 0
    for _ in range(layers):
        total += 2 * size(*stream)
        total += size(*stream) + 3 * size(*stream) + 2 * size(batch, heads, tokens, tokens) + size(*stream)
        total += size(batch, heads, tokens, tokens, dtype=mask) + size(*stream, dtype=mask)
        total += size(*stream) + 2 * size(batch, tokens, 4 * width) + size(*stream, dtype=mask)
    return total


@right("activation_bytes")
def in_floats(batch, tokens, width, heads, layers):
    per_token = np.float64(34 * width + 5 * heads * tokens)
    return layers * batch * tokens * per_token


@wrong(
    "activation_bytes", "This is one block. Each block keeps its own activations until the backward pass reaches it."
)
def one_block_only(batch, tokens, width, heads, layers):
    return the_papers_formula(batch, tokens, width, heads, 1)


@wrong(
    "activation_bytes",
    "You leave out what grows with the square of the text's length: each head keeps a (T, T) matrix of attention "
    "weights.",
)
def no_attention_matrices(batch, tokens, width, heads, layers):
    return layers * batch * tokens * width * 34


@wrong("activation_bytes", "Every head has a T x T matrix of its own; you count those of one head only.")
def tables_of_one_head(batch, tokens, width, heads, layers):
    return layers * (34 * batch * tokens * width + 5 * batch * tokens * tokens)


@wrong("activation_bytes", "A dropout mask takes 1 byte per entry, not 2: it only says kept or dropped.")
def masks_of_two_bytes(batch, tokens, width, heads, layers):
    return layers * (36 * batch * tokens * width + 6 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "The masks of the dropouts are missing: the backward pass has to know what was dropped.")
def no_masks(batch, tokens, width, heads, layers):
    return layers * (32 * batch * tokens * width + 4 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "Inside the MLP the width is 4 d, both before and after the activation function.")
def narrow_mlp(batch, tokens, width, heads, layers):
    return layers * (22 * batch * tokens * width + 5 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "q, k and v are three tensors of shape (B, T, d), and all three are kept.")
def two_of_q_k_v(batch, tokens, width, heads, layers):
    return layers * (32 * batch * tokens * width + 5 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "The inputs of the two layer normalisations are missing.")
def no_normalisations(batch, tokens, width, heads, layers):
    return layers * (30 * batch * tokens * width + 5 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "You count numbers where bytes are asked for: most numbers here take 2 bytes.")
def numbers_not_bytes(batch, tokens, width, heads, layers):
    return layers * (18 * batch * tokens * width + 3 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "You count 4 bytes per number. This exercise is about 16-bit training.")
def four_bytes_a_number(batch, tokens, width, heads, layers):
    return layers * (66 * batch * tokens * width + 9 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "You multiply by the number of heads twice: (B, T, d) already contains all heads.")
def stream_for_each_head(batch, tokens, width, heads, layers):
    return layers * (34 * batch * tokens * width * heads + 5 * batch * heads * tokens * tokens)


@wrong(
    "activation_bytes",
    "You keep only one matrix of attention weights for each head. There are two, before and after the dropout, and the "
    "mask.",
)
def softmax_once(batch, tokens, width, heads, layers):
    return layers * (34 * batch * tokens * width + 3 * batch * heads * tokens * tokens)


@wrong("activation_bytes", "A model that reads B texts at once keeps the activations of all of them.")
def one_text_only(batch, tokens, width, heads, layers):
    return the_papers_formula(1, tokens, width, heads, layers)
