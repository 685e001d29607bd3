"""Unit 00, start here: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
import operator
from collections import Counter
from functools import reduce

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


@right("tensor_bytes")
def reduced(shape, bytes_per_number=4):
    return reduce(operator.mul, shape, bytes_per_number)


@right("tensor_bytes")
def axis_by_axis(shape, bytes_per_number=4):
    return bytes_per_number if len(shape) == 0 else shape[0] * axis_by_axis(shape[1:], bytes_per_number)


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


@wrong("tensor_bytes", "An axis of length 0 leaves no numbers at all. Your code treats that 0 as if it were not there.")
def skips_an_axis_of_zero(shape, bytes_per_number=4):
    total = bytes_per_number
    for size in shape:
        total *= size or 1
    return total


@wrong("tensor_bytes", "You take the first axis only. How many numbers are in a matrix with that many rows?")
def the_first_axis(shape, bytes_per_number=4):
    return (shape[0] if len(shape) else 1) * bytes_per_number


@wrong("tensor_bytes", "You add the size of a number to their count. How many bytes do so many numbers take together?")
def adds_the_size_of_a_number(shape, bytes_per_number=4):
    return int(np.prod(shape)) + bytes_per_number


@wrong(
    "tensor_bytes", "You divide by the size of a number. If each takes several bytes, all take more bytes, not fewer."
)
def divides_by_the_size(shape, bytes_per_number=4):
    return int(np.prod(shape)) / bytes_per_number


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


@right("count_parameters")
def in_numpy(model):
    sizes = np.array([p.numel() for _, p in model.named_parameters()])
    trained = np.array([p.requires_grad for _, p in model.named_parameters()])
    return int(sizes @ trained), int(sizes.sum())


@right("count_parameters")
def frozen_subtracted(model):
    total = frozen = 0
    for p in set(model.parameters()):
        total += math.prod(p.size())
        if not p.requires_grad:
            frozen += math.prod(p.size())
    return torch.tensor(total - frozen), total


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


@wrong(
    "count_parameters",
    "You recognise a shared parameter by where its numbers are in memory. On the device meta there are no numbers, and "
    "every parameter looks like the same one.",
)
def by_place_in_memory(model):
    seen = {p.data_ptr(): p for p in model.parameters()}.values()
    return sum(p.numel() for p in seen if p.requires_grad), sum(p.numel() for p in seen)


@wrong("count_parameters", "You count matrices as rows * columns. A parameter can also have one axis, three, or none.")
def rows_times_columns(model):
    def size(p):
        return ([*p.shape, 1, 1][0]) * ([*p.shape, 1, 1][1])

    return sum(size(p) for p in model.parameters() if p.requires_grad), sum(size(p) for p in model.parameters())


@wrong(
    "count_parameters",
    "You look at the model's own parameters and its children's, but a child can contain modules too.",
)
def children_only(model):
    own = list(model.parameters(recurse=False))
    own += [p for child in model.children() for p in child.parameters(recurse=False) if not any(p is o for o in own)]
    return sum(p.numel() for p in own if p.requires_grad), sum(p.numel() for p in own)


@wrong("count_parameters", caught_by="length")
def only_one_number(model):
    return [sum(p.numel() for p in model.parameters() if p.requires_grad)]


# --- checkpoint_bytes --------------------------------------------------------------------------------


@right("checkpoint_bytes")
def by_identity_of_parameters(model, only_trained=False):
    chosen = {id(p): p.nbytes for p in model.parameters() if p.requires_grad >= only_trained}
    return sum(chosen.values())


@right("checkpoint_bytes")
def in_bits(model, only_trained=False):
    parameters = [p for p in model.parameters() if p.requires_grad] if only_trained else list(model.parameters())
    return sum(torch.finfo(p.dtype).bits * math.prod(p.shape) for p in parameters) // 8


@right("checkpoint_bytes")
def dtype_by_dtype(model, only_trained=False):
    numbers = Counter()
    for p in model.parameters():
        numbers[p.dtype] += p.numel() * (p.requires_grad or not only_trained)
    return sum(dtype.itemsize * count for dtype, count in numbers.items())


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


@wrong(
    "checkpoint_bytes",
    "You count the memory behind a parameter. A slice of a larger tensor shares the memory of the whole, but only its "
    "own numbers are stored.",
)
def by_storage(model, only_trained=False):
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trained]
    return sum(p.untyped_storage().nbytes() for p in chosen)


@wrong(
    "checkpoint_bytes",
    "You recognise a shared parameter by where its numbers are in memory. On the device meta there are no numbers, and "
    "every parameter looks like the same one.",
)
def by_place_in_memory_too(model, only_trained=False):
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trained]
    return sum({p.data_ptr(): p.nbytes for p in chosen}.values())


@wrong(
    "checkpoint_bytes",
    "You count parameters that are slices of one tensor as one parameter. Each stores its own numbers.",
)
def one_for_each_storage(model, only_trained=False):
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trained]
    return sum({p.untyped_storage()._cdata: p.nbytes for p in chosen}.values())


@wrong("checkpoint_bytes", "You count buffers too; here only the parameters are asked for.")
def with_the_buffers(model, only_trained=False):
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trained]
    return sum(p.nbytes for p in chosen) + sum(b.nbytes for b in model.buffers())
