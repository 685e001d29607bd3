"""What fits: how large a training step can be in a given memory, as a textbook estimate.

`finetune/accounting.py` predicts the memory of a step to the byte, and says at which moment it is largest.
"""

from __future__ import annotations


def largest_batch(memory: int, weights: int, trained: int, kept: int, vocabulary: int, tokens: int) -> int:
    """How many texts fit into one training step with AdamW, all in float32.

    The memory contains, at the same time:

    - the weights;
    - for each trained parameter, its gradient and the two running means of AdamW, with 4 bytes each;
    - for each token of the batch, what the model keeps for the backward pass;
    - for each token of the batch, the logits and their gradient: one number of 4 bytes in each for every entry of the
      vocabulary.

    Args:
        memory: bytes.
        weights: bytes of all weights, in whatever format they are.
        trained: how many parameters are trained.
        kept: bytes that the model keeps for each token, without the logits.
        vocabulary: how many entries it has.
        tokens: the length of every text.

    Returns:
        The largest number of whole texts; 0 if the memory is too small for one.

    Raises:
        ValueError: the memory is too small for what does not depend on the batch.
    """
    left = memory - weights - 12 * trained
    if left < 0:
        raise ValueError(f"weights, gradients and optimiser take {memory - left:,} bytes, more than {memory:,}")
    return left // (tokens * (kept + 8 * vocabulary))
