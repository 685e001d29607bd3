"""What fine-tuning costs, counted by hand: parameters, bytes in memory, bytes on disk.

These are textbook estimates. What a training step needs to the byte is in `finetune/accounting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

NUMBER_FORMATS = ("float32", "bfloat16", "mixed")


def tensor_bytes(shape: Sequence[int], bytes_per_number: int = 4) -> int:
    """Number of bytes that the numbers of one tensor take.

    Example: a matrix of 3 rows and 5 columns in float32, with 4 bytes per number, takes 60 bytes. A tensor without
    axes, whose shape is empty, is a single number.

    Args:
        shape: the length of each axis; it may be 0.
        bytes_per_number: 4 in float32, 2 in bfloat16 and float16, 1 in int8.
    """
    return math.prod(shape) * bytes_per_number


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trained parameters of a model, and number of all its parameters.

    A tensor of shape (out, in) counts as out * in numbers. A parameter that several modules share counts once: GPT-2's
    output layer *is* its token embedding. Buffers, such as the running mean of a batch normalisation, are not
    parameters: an optimiser never updates them. The model may be on PyTorch's device "meta", where a tensor has a
    shape but no numbers.

    Returns:
        trained: how many numbers the parameters with `requires_grad` hold.
        total: how many numbers all parameters hold, including frozen ones.
    """
    parameters = list(model.parameters())  # each once, however many modules share it
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    return trained, total


def training_memory(parameters: int, trained: int, activations: int = 0, precision: str = "float32") -> dict[str, int]:
    """Memory that training with Adam takes, in bytes, by purpose.

    Every parameter has a weight. Only a trained one also has a gradient and two running means that Adam keeps: m of the
    gradient and v of its square (Kingma and Ba 2015, algorithm 1). The size of each number depends on the precision:

    - "float32": every number is in float32.
    - "bfloat16": every number is in bfloat16.
    - "mixed": weights and gradients are in 16 bits; the optimiser's m and v are in float32, and it also keeps a float32
      copy of each trained weight, because small updates would be lost in 16 bits (Rajbhandari et al. 2020, ZeRO,
      arXiv:1910.02054, section 3.1). The copy counts towards "optimizer".

    Args:
        parameters: how many parameters the model has, including frozen ones.
        trained: how many of them are trained.
        activations: the bytes that the forward pass keeps for the backward pass, as counted by `activation_bytes`.
        precision: one of the three names above.

    Returns:
        The bytes of "weights", "gradients", "optimizer" and "activations", under these names.

    Raises:
        ValueError: `trained` is larger than `parameters`, or the precision is unknown.
    """
    if trained > parameters:
        raise ValueError(f"trained must be at most {parameters}, the number of parameters, got {trained}")
    if precision not in NUMBER_FORMATS:
        raise ValueError(f"precision must be one of {', '.join(NUMBER_FORMATS)}, got {precision!r}")
    number = 4 if precision == "float32" else 2
    states = 3 * 4 if precision == "mixed" else 2 * number  # for each trained parameter
    return {
        "weights": parameters * number,
        "gradients": trained * number,
        "optimizer": trained * states,
        "activations": activations,
    }


def activation_bytes(batch: int, tokens: int, width: int, heads: int, layers: int) -> int:
    """Bytes of the activations that the blocks of a transformer keep for the backward pass.

    For B texts of T tokens in a model of width d with H heads, one block keeps (Korthikanti et al. 2022,
    arXiv:2205.05198, section 4.1), with 2 bytes per number and 1 byte per entry of a dropout mask:

    - two layer normalisations: the input of each, (B, T, d);
    - attention: the input from which q, k and v are computed, (B, T, d); q, k and v, (B, T, d) each; the softmax, (B,
      H, T, T); the mask of its dropout, (B, H, T, T); the softmax after dropout, (B, H, T, T); the input of the output
      projection, (B, T, d); the mask of the last dropout, (B, T, d);
    - the MLP: the input of its first product, (B, T, d); that of the activation function, (B, T, 4 d); that of its
      second product, (B, T, 4 d); the mask of its dropout, (B, T, d).

    Every block keeps its own activations. Embeddings and logits are not counted.

    Args:
        batch: B.
        tokens: T.
        width: d.
        heads: H.
        layers: the number of blocks.
    """
    stream = batch * tokens * width  # numbers in (B, T, d)
    scores = batch * heads * tokens * tokens  # numbers in (B, H, T, T)
    normalisations = 2 * (2 * stream)
    attention = 2 * (5 * stream) + stream + 2 * (2 * scores) + scores
    mlp = 2 * (9 * stream) + stream
    return layers * (normalisations + attention + mlp)


def checkpoint_bytes(model: nn.Module, only_trained: bool = False) -> int:
    """Number of bytes that a model's parameters take in a checkpoint.

    Each parameter takes the bytes of its own dtype: a model may mix several. A parameter that several modules share is
    stored once. Of a parameter that is a slice of a larger tensor, only its own numbers are stored. The names and
    shapes that are stored with them, a few kilobytes, are not counted.

    Args:
        model: it may be on the device "meta".
        only_trained: store only the parameters with `requires_grad`. That is enough if the rest is available elsewhere:
            LoRA saves a file of this kind (Hu et al. 2021, arXiv:2106.09685, section 4.2).
    """
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not only_trained)
