"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) for pictures of 8 x 8 pixels, 0.3 M parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.pictures.digits import CLASSES, SIDE

PATCH = 2  # pixels on each side
PATCHES = (SIDE // PATCH) ** 2


def to_patches(pictures: Tensor, size: int = PATCH) -> Tensor:
    """Divide pictures into square patches, the tokens of a vision transformer (Dosovitskiy et al. 2021, section 3.1).

    The patches of a picture are in the order of reading: row by row, each row from left to right. The pixels of a patch
    are in the same order.

    Args:
        pictures: (B, H, W).
        size: the side of a patch in pixels.

    Returns:
        (B, N, size * size), with N = (H / size) * (W / size) patches.

    Raises:
        ValueError: H or W is not a multiple of `size`.
    """
    if pictures.shape[1] % size or pictures.shape[2] % size:
        raise ValueError(f"patches of {size} x {size} pixels do not fill pictures of {tuple(pictures.shape[1:])}")
    return F.unfold(pictures[:, None], size, stride=size).transpose(1, 2)


def from_patches(patches: Tensor) -> Tensor:
    """The inverse of `to_patches`."""
    return F.fold(patches.transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)[:, 0]


class SelfAttention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, hd)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class EncoderBlock(nn.Module):
    """Self-attention and an MLP, each with a LayerNorm before it and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = x + self.attention(self.norm_1(x))
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y


class ViT(nn.Module):
    """A classifier that prepends a class token to the patches, applies the blocks, and classifies the class token.

    Args:
        width: d, the width of every token.
        depth: the number of blocks.
        heads: the number of attention heads.
        classes: C, the number of classes.
    """

    def __init__(self, width: int = 80, depth: int = 4, heads: int = 4, classes: int = CLASSES) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(PATCH * PATCH, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + PATCHES, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map pictures (B, 8, 8) to logits (B, C)."""
        patches = self.patch_embedding(to_patches(pictures))  # (B, 16, d)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def parts(model: ViT) -> dict[str, list[str]]:
    """The parts that surgical fine-tuning can tune, from the input to the output, with their parameter names."""
    names = [name for name, _ in model.named_parameters()]
    found = {"embedding": [n for n in names if n.startswith(("patch_embedding", "class_token", "position"))]}
    for number in range(len(model.blocks)):
        found[f"block {number + 1}"] = [n for n in names if n.startswith(f"blocks.{number}.")]
    found["head"] = [n for n in names if n.startswith(("norm.", "head."))]
    return found
