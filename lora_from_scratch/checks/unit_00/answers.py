"""Unit 00, start here: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

# --- tensor_bytes ------------------------------------------------------------------------------------


@right("tensor_bytes")
def with_a_loop(shape, bytes_per_number=4):
    total = bytes_per_number
    for size in shape:
        total = total * size
    return total


@right("tensor_bytes")
def with_numpy(shape, bytes_per_number=4):
    return np.prod(shape) * bytes_per_number


@right("tensor_bytes")
def asks_a_tensor(shape, bytes_per_number=4):
    return torch.empty(tuple(shape)).numel() * bytes_per_number


@wrong("tensor_bytes", "You add the lengths of the axes. Count the numbers inside the matrix, not along its edges.")
def adds_the_sizes(shape, bytes_per_number=4):
    return sum(shape) * bytes_per_number


@wrong("tensor_bytes", "This is how many numbers there are. Each of them takes more than one byte.")
def counts_numbers(shape, bytes_per_number=4):
    result = 1
    for size in shape:
        result *= size
    return result


@wrong("tensor_bytes", "This is the size in bits. A byte has eight bits, and the argument is already in bytes.")
def answers_in_bits(shape, bytes_per_number=4):
    return int(np.prod(shape)) * bytes_per_number * 8


@wrong("tensor_bytes", "You always count 4 bytes per number. Not every model is in float32: use the argument.")
def always_float32(shape, bytes_per_number=4):
    return int(np.prod(shape)) * 4


@wrong("tensor_bytes", "You look at the first two axes only: a tensor may have one axis, three, or none at all.")
def first_two_axes(shape, bytes_per_number=4):
    rows, columns = [*shape, 1, 1][:2]
    return rows * columns * bytes_per_number


@wrong("tensor_bytes", "A tensor with no axes still holds one number. What should a product start from?")
def nothing_without_axes(shape, bytes_per_number=4):
    return int(np.prod(shape)) * bytes_per_number if len(shape) else 0


@wrong("tensor_bytes", "You multiply by the size of a number once per axis; multiply by it only once in all.")
def bytes_for_each_axis(shape, bytes_per_number=4):
    total = 1
    for size in shape:
        total *= size * bytes_per_number
    return total


@wrong("tensor_bytes", caught_by="prints")
def prints_it(shape, bytes_per_number=4):
    print(int(np.prod(shape)) * bytes_per_number)


# --- count_parameters --------------------------------------------------------------------------------


@right("count_parameters")
def by_identity(model):
    seen = {id(p): p for p in model.parameters()}.values()
    trained = [p.numel() for p in seen if p.requires_grad]
    return sum(trained), sum(p.numel() for p in seen)


@right("count_parameters")
def module_by_module(model):
    counted, trained, total = set(), 0, 0
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p in counted:
                continue
            counted.add(p)
            total += int(np.prod(p.shape))
            trained += int(np.prod(p.shape)) if p.requires_grad else 0
    return np.int64(trained), float(total)


@right("count_parameters")
def trained_and_frozen(model):
    count = {True: 0, False: 0}
    for _, p in model.named_parameters():
        count[p.requires_grad] += p.nelement()
    return [count[True], count[True] + count[False]]


@wrong("count_parameters", "You count tensors. A parameter of shape (out, in) is one tensor but many numbers.")
def counts_tensors(model):
    parameters = list(model.parameters())
    return sum(p.requires_grad for p in parameters), len(parameters)


@wrong("count_parameters", "The two numbers are in the wrong order: what is trained comes first.")
def the_other_order(model):
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)


@wrong("count_parameters", "You count the frozen parameters instead of the trained ones.")
def counts_the_frozen(model):
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return frozen, sum(p.numel() for p in model.parameters())


@wrong(
    "count_parameters",
    "A state dict lists a shared tensor under each of its names, and buffers as well. Neither belongs in this count.",
)
def counts_the_state_dict(model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(t.numel() for t in model.state_dict().values())


@wrong("count_parameters", "A parameter that two modules share is one parameter: you count it once for each module.")
def shared_ones_twice(model):
    named = list(model.named_parameters(remove_duplicate=False))
    return sum(p.numel() for _, p in named if p.requires_grad), sum(p.numel() for _, p in named)


@wrong("count_parameters", "Buffers are not parameters: an optimiser never updates them.")
def with_buffers(model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers())
    return trained, sum(p.numel() for p in model.parameters()) + buffers


@wrong("count_parameters", "You leave out the biases. They are small, but they are parameters just like the matrices.")
def only_matrices(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return sum(p.numel() for p in matrices if p.requires_grad), sum(p.numel() for p in matrices)


@wrong("count_parameters", "The `len` of a tensor is the length of its first axis only. How many numbers are in it?")
def only_the_first_axis(model):
    parameters = list(model.parameters())
    return sum(len(p) for p in parameters if p.requires_grad), sum(len(p) for p in parameters)


@wrong("count_parameters", "This is the number of bytes. How many numbers are there?")
def counts_bytes(model):
    parameters = list(model.parameters())
    return sum(p.nbytes for p in parameters if p.requires_grad), sum(p.nbytes for p in parameters)


@wrong("count_parameters", "You count every parameter as trained: freezing one has to lower the first number.")
def everything_is_trained(model):
    total = sum(p.numel() for p in model.parameters())
    return total, total


@wrong("count_parameters", caught_by="number of results")
def only_one_number(model):
    return [sum(p.numel() for p in model.parameters() if p.requires_grad)]


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


@wrong("activation_bytes", "A model that reads B texts at once keeps the activations of all of them.")
def one_text_only(batch, tokens, width, heads, layers):
    return the_papers_formula(1, tokens, width, heads, layers)


# --- checkpoint_bytes --------------------------------------------------------------------------------


@right("checkpoint_bytes")
def by_storage(model, only_trained=False):
    stored = {}
    for p in model.parameters():
        if not only_trained or p.requires_grad:
            stored[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    return sum(stored.values())


@right("checkpoint_bytes")
def two_branches(model, only_trained=False):
    total = 0
    for _, p in model.named_parameters():
        if only_trained and not p.requires_grad:
            continue
        total += p.numel() * p.dtype.itemsize
    return float(total)


@wrong("checkpoint_bytes", "You count 4 bytes for every number. A model may hold some tensors in 16 bits.")
def four_bytes_each(model, only_trained=False):
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trained)


@wrong("checkpoint_bytes", "You take the dtype of the first parameter for all of them; each has its own.")
def dtype_of_the_first(model, only_trained=False):
    first = next(model.parameters())
    return first.element_size() * sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trained)


@wrong("checkpoint_bytes", "You ignore `only_trained`: you always store the whole model.")
def always_everything(model, only_trained=False):
    return sum(p.nbytes for p in model.parameters())


@wrong("checkpoint_bytes", "You always leave out the frozen parameters; a complete checkpoint needs them.")
def never_the_frozen(model, only_trained=False):
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


@wrong(
    "checkpoint_bytes",
    "You have the argument the wrong way round: `only_trained=True` asks for the trained parameters only.",
)
def the_argument_reversed(model, only_trained=False):
    return sum(p.nbytes for p in model.parameters() if p.requires_grad or only_trained)


@wrong("checkpoint_bytes", "When only the trained parameters are asked for, you count the frozen ones.")
def gives_the_frozen(model, only_trained=False):
    return sum(p.nbytes for p in model.parameters() if not (only_trained and p.requires_grad))


@wrong("checkpoint_bytes", "A tensor that two modules share is stored once; you count it under each of its names.")
def shared_tensors_twice(model, only_trained=False):
    named = model.named_parameters(remove_duplicate=False)
    return sum(p.nbytes for _, p in named if p.requires_grad or not only_trained)


@wrong("checkpoint_bytes", "This is how many numbers are stored, not how many bytes they take.")
def stores_numbers(model, only_trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trained)


@wrong(
    "checkpoint_bytes",
    "Adam's states and the gradients are needed to continue training, not to use the model: they are not counted here.",
)
def with_adam(model, only_trained=False):
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trained]
    return sum(p.nbytes for p in chosen) + 3 * sum(p.nbytes for p in chosen if p.requires_grad)
