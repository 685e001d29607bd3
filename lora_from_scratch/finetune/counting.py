"""What fine-tuning costs, counted by hand: parameters, bytes in memory, bytes on disk.

Textbook arithmetic, right to within the things that nobody writes down. What a step really needs, to the byte, is
in `finetune/accounting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

PRECISIONS = ("float32", "bfloat16", "mixed")


def tensor_bytes(shape: Sequence[int], bytes_per_number: int = 4) -> int:
    """How many bytes the numbers of one tensor take.

    Example: a matrix of 3 rows and 5 columns in float32, 4 bytes a number, takes 60 bytes. A tensor with no axes,
    of shape `()`, is a single number.

    Args:
        shape: the length of each axis; whole numbers of at least 0.
        bytes_per_number: 4 in float32, 2 in bfloat16 and float16, 1 in int8.
    """
    return math.prod(shape) * bytes_per_number


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many there are.

    A tensor of shape (out, in) counts as out * in numbers. A parameter that several modules share counts once:
    GPT-2's output layer *is* its token embedding. Buffers, such as the running mean of a batch normalisation, are not
    parameters: no optimiser ever gets them.

    Returns:
        trained: of the parameters with `requires_grad`.
        total: of all parameters, frozen ones included.
    """
    parameters = list(model.parameters())  # each once, however many modules share it
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    return trained, total


def training_memory(parameters: int, trained: int, activations: int = 0, precision: str = "float32") -> dict[str, int]:
    """What training with Adam holds in memory, in bytes, by what it is for.

    Every parameter has a weight. Only a trained one has a gradient, and two running means that Adam keeps: m of the
    gradient and v of its square (Kingma and Ba 2015, algorithm 1). How large each number is depends on the precision:

    - "float32": every number is in float32.
    - "bfloat16": every number is in bfloat16.
    - "mixed": weights and gradients are in 16 bits; the optimiser's m and v are in float32, and beside them it keeps
      a copy of each trained weight in float32, because small updates vanish in 16 bits (Rajbhandari et al. 2020,
      ZeRO, arXiv:1910.02054, section 3.1). The copy counts as the optimiser's.

    Args:
        parameters: how many parameters the model has, frozen ones included.
        trained: how many of them are trained.
        activations: the bytes that the forward pass keeps for the backward pass, as `activation_bytes` counts them.
        precision: one of the three.

    Returns:
        The bytes of "weights", "gradients", "optimizer" and "activations", under these names.

    Raises:
        ValueError: more parameters are trained than there are, or there is no such precision.
    """
    if trained > parameters:
        raise ValueError(f"trained must be at most {parameters}, the number of parameters, got {trained}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    number = 4 if precision == "float32" else 2
    states = 3 * 4 if precision == "mixed" else 2 * number  # for each trained parameter
    return {
        "weights": parameters * number,
        "gradients": trained * number,
        "optimizer": trained * states,
        "activations": activations,
    }


def activation_bytes(batch: int, tokens: int, width: int, heads: int, layers: int) -> int:
    """What the blocks of a transformer keep of the forward pass until the backward pass, in bytes.

    For B texts of T tokens in a model of width d with H heads, one block keeps (Korthikanti et al. 2022,
    arXiv:2205.05198, section 4.1), with 2 bytes a number and 1 byte an entry of a dropout mask:

    - two layer normalisations: the input of each, (B, T, d);
    - attention: the input that q, k and v are made of, (B, T, d); q, k and v, (B, T, d) each; the softmax,
      (B, H, T, T); the mask of its dropout, (B, H, T, T); the softmax after dropout, (B, H, T, T); the input of the
      output projection, (B, T, d); the mask of the last dropout, (B, T, d);
    - the MLP: the input of its first product, (B, T, d); that of the activation function, (B, T, 4 d); that of its
      second product, (B, T, 4 d); the mask of its dropout, (B, T, d).

    Every block keeps its own. Embeddings and logits are left out.

    Args:
        batch: B.
        tokens: T.
        width: d.
        heads: H.
        layers: how many blocks there are.
    """
    stream = batch * tokens * width  # numbers in (B, T, d)
    scores = batch * heads * tokens * tokens  # numbers in (B, H, T, T)
    normalisations = 2 * (2 * stream)
    attention = 2 * (5 * stream) + stream + 2 * (2 * scores) + scores
    mlp = 2 * (9 * stream) + stream
    return layers * (normalisations + attention + mlp)


def checkpoint_bytes(model: nn.Module, only_trained: bool = False) -> int:
    """How many bytes of numbers a checkpoint of a model's parameters holds.

    Each parameter takes the bytes of its own dtype: one model may hold several. A parameter that several modules
    share is stored once. The names and shapes beside the numbers, a few kilobytes, are not counted.

    Args:
        only_trained: store only the parameters with `requires_grad`. That is enough for whoever has the rest already:
            what LoRA saves is a file of this kind (Hu et al. 2021, arXiv:2106.09685, section 4.2).
    """
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not only_trained)
