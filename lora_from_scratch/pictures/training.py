"""Training the classifier and the diffusion model, from scratch or with a method; loading the pretrained models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.finetune.step_seeds import shuffled_places, step_seed
from lora_from_scratch.methods.method import Method
from lora_from_scratch.pictures.diffusion import Denoiser, denoising_loss
from lora_from_scratch.pictures.digits import Pictures
from lora_from_scratch.pictures.vit import ViT

ASSETS = Path(__file__).parent.parent / "assets" / "pictures"
WARMUP = 0.1  # share of all steps

Loss = Callable[[nn.Module, Pictures, torch.Generator], Tensor]


def classification_loss(model: nn.Module, batch: Pictures, generator: torch.Generator) -> Tensor:
    return F.cross_entropy(model(batch.pictures), batch.labels)


def diffusion_loss(model: nn.Module, batch: Pictures, generator: torch.Generator) -> Tensor:
    return denoising_loss(model, batch.pictures, generator)


def train(
    model: nn.Module,
    data: Pictures,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    method: Method | None = None,
    groups: Iterable[dict[str, Any]] | None = None,
    batch_size: int = 50,
    seed: int = 0,
) -> list[float]:
    """Train the parameters with `requires_grad`, using AdamW with warm-up and linear decay.

    Args:
        method: the method that adapted the model, if any. Its parameter groups and its `after_step` are used.
        groups: parameter groups for AdamW, each with its own "lr". They replace the method's.

    Returns:
        The loss of every step.
    """
    model.train()
    if groups is None:
        own: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        groups = [
            {"params": group["params"], "lr": learning_rate * group.get("lr_scale", 1.0)}
            for group in (own if method is None else method.parameter_groups(model))
        ]
    optimizer = torch.optim.AdamW(list(groups), lr=learning_rate, weight_decay=0.01, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        torch.manual_seed(step_seed(seed, step))
        places = [item for _, item in shuffled_places(len(data.labels), batch_size, seed, step)]
        value = loss(model, data.rows(torch.tensor(places)), generator)
        optimizer.zero_grad()
        value.backward()
        fraction = min((step + 1) / (WARMUP * steps), (steps - step) / steps, 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * fraction
        optimizer.step()
        if method is not None:
            method.after_step(model, step + 1, optimizer)
        losses.append(value.item())
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Pictures) -> float:
    """The share of pictures that are classified correctly."""
    return (model(data.pictures).argmax(dim=1) == data.labels).float().mean().item()


# --- The pretrained models, trained by `python -m benchmarks.pictures pretrain` ---


def pretrained_vit() -> ViT:
    """The classifier of the digits 0 to 4."""
    return _load(ViT(), "vit")


def pretrained_denoiser() -> Denoiser:
    """The diffusion model of all ten digits."""
    return _load(Denoiser(), "denoiser")


def save_pretrained(model: nn.Module, name: str, directory: Path = ASSETS) -> None:
    """Save the weights in float16."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half().contiguous() for n, t in model.state_dict().items()}, directory / f"{name}.safetensors")


def _load(model: Any, name: str) -> Any:
    file = ASSETS / f"{name}.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"the pretrained model is missing ({file}): reinstall the package")
    model.load_state_dict({n: t.float() for n, t in load_file(file).items()})
    return model.eval()
