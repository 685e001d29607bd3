"""A denoising diffusion model (Ho et al. 2020, arXiv:2006.11239) of digits: a transformer of 0.2 M parameters.

Noise is added to a picture in T steps, until almost only noise is left:

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,    e from a standard normal distribution           (equation 4)

where a_t decreases from almost 1 to almost 0. The model is trained to predict e from x_t and t. To sample a new
picture, start with noise and remove the noise step by step. The model is a transformer on patches, as in Peebles and
Xie 2023 (arXiv:2212.09748), because the methods of this package adapt linear layers. An embedding of t is added to
every token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.pictures.digits import SIDE
from lora_from_scratch.pictures.vit import PATCH, PATCHES, EncoderBlock, from_patches, to_patches

STEPS = 100  # T


def noise_levels() -> Tensor:
    """a_0 = 1 to a_T, (T + 1,): the share of the variance that comes from the picture.

    This is the cosine schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672, equation 17), with s = 0.008. As in the
    paper, a step removes at most 0.999 of the remaining share.
    """
    t = torch.arange(STEPS + 1) / STEPS
    curve = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    kept = (curve[1:] / curve[:-1]).clamp(min=0.001)  # alpha_t
    return torch.cat([torch.ones(1), kept.cumprod(dim=0)])


def add_noise(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Add the noise of step t to pictures: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e (Ho et al. 2020, equation 4).

    Each picture has a step of its own. At step 0 it stays what it is. The a_t are those of `noise_levels()`.

    Args:
        x: the pictures x_0 (B, H, W).
        t: their steps (B,), integers from 0 to T.
        noise: e (B, H, W).

    Returns:
        x_t (B, H, W).
    """
    a = noise_levels()[t][:, None, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


class Denoiser(nn.Module):
    """Predicts the noise in a picture.

    Args:
        width: d, the width of every token.
        depth: the number of blocks.
        heads: the number of attention heads.
    """

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.patch_embedding = nn.Linear(PATCH * PATCH, width)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, PATCHES, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, PATCH * PATCH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map noisy pictures (B, 8, 8) and their steps (B,) to the predicted noise (B, 8, 8)."""
        time = self.time_embedding(sinusoids(t, self.width))[:, None]  # (B, 1, d)
        h = self.patch_embedding(to_patches(x)) + self.position + time
        for block in self.blocks:
            h = block(h)
        return from_patches(self.output(self.norm(h)))


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t with different frequencies, (B,) to (B, width) (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def denoising_loss(model: nn.Module, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The mean squared error of the predicted noise, with a random step for each picture (equation 14).

    Args:
        model: predicts the noise, as `Denoiser` does.
        pictures: (B, 8, 8), with values from 0 to 1.
        generator: draws the steps and the noise.
    """
    x = 2 * pictures - 1
    t = torch.randint(1, STEPS + 1, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return F.mse_loss(model(add_noise(x, t, noise), t), noise)


def denoising_step(x: Tensor, predicted: Tensor, t: int, noise: Tensor) -> Tensor:
    """One step back, from x_t to x_{t - 1} (Ho et al. 2020, equations 6 and 7).

    The predicted noise e gives the predicted picture: equation 4, solved for x_0. Its pixels are clipped to the range
    from -1 to 1. Then x_{t - 1} is drawn from a normal distribution with

        mean = (sqrt(a_{t - 1}) (1 - alpha_t) x_0 + sqrt(alpha_t) (1 - a_{t - 1}) x_t) / (1 - a_t)
        variance = (1 - a_{t - 1}) (1 - alpha_t) / (1 - a_t),    alpha_t = a_t / a_{t - 1}

    At the last step, t = 1, this is the predicted picture, without noise.

    Args:
        x: x_t, of any shape.
        predicted: e, the noise that the model predicts in x_t.
        t: the step, from T to 1.
        noise: standard normal numbers, for the draw.

    Returns:
        x_{t - 1}, of the same shape. The a_t are those of `noise_levels()`.
    """
    levels = noise_levels()
    a, before = levels[t], levels[t - 1]
    kept = a / before  # alpha_t
    x_0 = ((x - (1 - a).sqrt() * predicted) / a.sqrt()).clamp(-1, 1)
    mean = (before.sqrt() * (1 - kept) * x_0 + kept.sqrt() * (1 - before) * x) / (1 - a)
    deviation = ((1 - before) / (1 - a) * (1 - kept)).sqrt()
    return mean + deviation * noise


@torch.no_grad()
def sample(model: nn.Module, count: int, seed: int = 0) -> Tensor:
    """Sample pictures (count, 8, 8), with values from 0 to 1 (algorithm 2, with the predicted x_0 clipped)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, SIDE, SIDE, generator=generator)
    for t in range(STEPS, 0, -1):
        predicted = model(x, torch.full((count,), t))
        x = denoising_step(x, predicted, t, torch.randn(x.shape, generator=generator))
    return ((x + 1) / 2).clamp(0, 1)
