"""Full fine-tuning: every parameter is trained. This is the baseline for all the other methods.

The module also has the oldest way to save some of its cost, which is to train only the last blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.method import LearningRates, Method
from lora_from_scratch.models.checkpoint import load_weights, save_language_model


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train all parameters.

    `undo` needs a copy of the base model, which is as large as the model itself. `keep_base=False` saves that memory,
    but then `undo` is not possible.
    """

    keep_base: bool = True

    name: ClassVar[str] = "full"
    peft_type: ClassVar[str] = ""  # no adapter: a whole checkpoint
    learning_rates: ClassVar[LearningRates] = LearningRates(2.5e-4, 5e-5, "a common choice, from no particular paper")
    position: ClassVar[float] = 0
    use_when: ClassVar[str] = (
        "you want the reference that every other method is compared with, and a whole model for each task is not "
        "too much memory while training, or too much on disk"
    )
    saves_model: ClassVar[bool] = True

    def _install(self, model: nn.Module) -> None:
        model.requires_grad_(True)

    def _uninstall(self, model: nn.Module) -> None:
        pass  # nothing was inserted

    def _keeps_base(self) -> bool:
        return self.keep_base

    def undo(self, model: nn.Module) -> None:
        """Restore the base model, bit for bit.

        Raises:
            ValueError: `keep_base` is False, so there is no base model to restore.
        """
        self._adaptation(model)
        if not self.keep_base:
            raise ValueError("cannot undo: keep_base=False kept no copy of the base model; load the model again")
        super().undo(model)

    def save(self, model: Any, directory: str | Path, *, base_model: str | None = None, tokenizer: Any = None) -> None:
        """Write the whole model, as a checkpoint directory in Hugging Face's layout."""
        self._adaptation(model)
        save_language_model(model, tokenizer, directory)

    def trains_of_base(self) -> str:
        return "everything"

    def starts_as_base(self) -> bool | None:
        return True

    @classmethod
    def from_checkpoint(cls, directory: Path) -> tuple[FullFineTuning, dict[str, Tensor]]:
        """Read the method and the weights that `save` wrote."""
        return cls(), load_weights(directory)


# --- The last blocks only ----------------------------------------------------------------------------------


def freeze_all_but_last(model: GPT2, layers: int) -> None:
    """Train the last blocks and the final LayerNorm, and freeze everything else, in place.

    Sets `requires_grad` of every parameter, whatever it was before: True in the last `layers` of the blocks
    `model.transformer.h` and in `model.transformer.ln_f`, False everywhere else. The embeddings come before the first
    block and are frozen too, even though the token embedding `wte` is also the output layer.

    With two blocks this is the "FT-Top2" of Li and Liang 2021 (arXiv:2101.00190, section 5.2) and of Hu et al. 2021
    (arXiv:2106.09685, table 3).

    Args:
        layers: from 0, which trains only the final LayerNorm, to the number of blocks.

    Raises:
        ValueError: `layers` is negative or exceeds the number of blocks.
    """
    blocks = model.transformer.h
    if not 0 <= layers <= len(blocks):
        raise ValueError(f"layers must be from 0 to {len(blocks)}, the number of blocks, got {layers}")
    model.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    for block in blocks[len(blocks) - layers :]:
        block.requires_grad_(True)
