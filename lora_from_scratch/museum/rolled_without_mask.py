"""LongLoRA's heads are rolled, and the mask does not know it.

The authors' plain implementation (dvlab-research/LongLoRA, `llama_attn_replace.py`, forward_noflashattn) rolls the
tokens of half of the heads by half a group, and then masks each group as if it were a piece of the text. The last group
is none: its second half is the beginning of the text. Mended, it is
`lora_from_scratch.methods.long_lora.shifted_sparse_attention`, with the mask `allowed_in_groups`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.methods.long_lora import from_groups, to_groups


def faulty_shifted_sparse_attention(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    """Causal attention in groups of g tokens, shifted by g // 2 in the second half of the heads."""
    tokens = q.shape[2]
    q, k, v = (to_groups(x, group_size) for x in (q, k, v))  # (B, H, n, g, hd)
    return from_groups(F.scaled_dot_product_attention(q, k, v, is_causal=True), tokens)


def test_shifted_sparse_attention(attention: Callable[..., Tensor]) -> None:
    """Test an implementation of `attention(q, k, v, group_size)`, causal attention in groups of any kind.

    The test ends without an error if no output depends on a later token, in any head, and fails if one does. The
    output of a token may depend on its own q, k and v and on the k and v of earlier tokens.

    Which earlier tokens a token attends to is up to the implementation.

    Args:
        attention: what is tested, a function of q, k and v (B, H, T, hd) and the group size, with the result
            (B, H, T, hd). H is an even number of heads.

    Raises:
        AssertionError: an output depends on a later token.
    """
    generator = torch.Generator().manual_seed(0)
    for tokens, group_size in ((16, 4), (15, 4), (15, 5)):
        q, k, v = torch.randn(3, 1, 4, tokens, 8, generator=generator)
        before = attention(q, k, v, group_size)
        for token in range(tokens):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, token] = torch.randn(8, generator=generator)
            earlier = slice(0, token)
            after = attention(*changed, group_size)
            assert torch.allclose(after[:, :, earlier], before[:, :, earlier], atol=1e-6), (
                f"with {tokens} tokens in groups of {group_size}, token {token} changes the output of an earlier one"
            )
