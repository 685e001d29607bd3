"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) for pictures of 8 x 8 pixels, 0.3 M parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.pictures.digits import CLASSES, SIDE

PATCH = 2  # pixels on each side
PATCHES = (SIDE // PATCH) ** 2


def to_patches(pictures: Tensor) -> Tensor:
    """(B, 8, 8) to (B, 16, 4): the pixels of each square of 2 x 2, row by row."""
    return F.unfold(pictures[:, None], PATCH, stride=PATCH).transpose(1, 2)


def from_patches(patches: Tensor) -> Tensor:
    """The inverse of `to_patches`."""
    return F.fold(patches.transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)[:, 0]


class SelfAttention(nn.Module):
    """Multi-head attention in which every patch sees every other."""

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
    """Attention and an MLP, each behind a LayerNorm and beside a residual connection."""

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
    """A classifier: patches, a token for the class in front of them, blocks, and a linear layer on that token.

    Args:
        width: d, of every token.
        depth: the number of blocks.
        heads: of each attention.
        classes: C.
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
        """(B, 8, 8) to logits (B, C)."""
        patches = self.patch_embedding(to_patches(pictures))  # (B, 16, d)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def parts(model: ViT) -> dict[str, list[str]]:
    """The names of the parameters of each part that surgical fine-tuning may choose, from the input to the output."""
    names = [name for name, _ in model.named_parameters()]
    found = {"embedding": [n for n in names if n.startswith(("patch_embedding", "class_token", "position"))]}
    for number in range(len(model.blocks)):
        found[f"block {number + 1}"] = [n for n in names if n.startswith(f"blocks.{number}.")]
    found["head"] = [n for n in names if n.startswith(("norm.", "head."))]
    return found
