"""Full fine-tuning: every parameter is trained. What all the other methods are measured against.

And its oldest economy: to train the last blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.method import Method


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train everything.

    `undo` needs a copy of the base model, as large as the model itself. `keep_base=False` saves that memory;
    then there is no way back.
    """

    keep_base: bool = True

    name: ClassVar[str] = "full"
    peft_type: ClassVar[str] = ""  # no adapter: a whole checkpoint

    def _install(self, model: GPT2) -> None:
        model.requires_grad_(True)

    def _uninstall(self, model: GPT2) -> None:
        pass  # nothing was put in

    def _keeps_base(self) -> bool:
        return self.keep_base

    def undo(self, model: GPT2) -> None:
        """Give the base model back, bit for bit.

        Raises:
            ValueError: `keep_base` is False, so that there is no base to give back.
        """
        self._adaptation(model)
        if not self.keep_base:
            raise ValueError("nothing to go back to: keep_base=False kept no copy of the base; load the model anew")
        super().undo(model)

    def save(self, model: GPT2, directory: str | Path, *, base_model: str | None = None, tokenizer: Any = None) -> None:
        """Write the whole model, as a checkpoint directory in Hugging Face's layout."""
        from lora_from_scratch.gpt2.checkpoint import save_gpt2

        self._adaptation(model)
        save_gpt2(model, tokenizer, directory)

    @classmethod
    def from_checkpoint(cls, directory: Path) -> tuple[FullFineTuning, dict[str, Tensor]]:
        """The method and the weights that `save` wrote."""
        from lora_from_scratch.gpt2.checkpoint import load_model

        return cls(), {name: p.detach() for name, p in load_model(directory.resolve()).named_parameters()}


# --- The last blocks only ----------------------------------------------------------------------------------


def freeze_all_but_last(model: GPT2, layers: int) -> None:
    """Train the last blocks and the last LayerNorm, and freeze the rest, in place.

    Sets `requires_grad` of every parameter, whatever it was before: True in the last `layers` of the blocks
    `model.transformer.h` and in `model.transformer.ln_f`, False in everything else. The embeddings stand before the
    first block, so they are frozen with it; that the token embedding `wte` is the output layer too changes nothing.

    With the last two blocks it is the "FT-Top2" of Li and Liang 2021 (arXiv:2101.00190, section 5.2) and of Hu et al.
    2021 (arXiv:2106.09685, table 3).

    Args:
        layers: from 0, which trains the last LayerNorm alone, to the number of blocks.

    Raises:
        ValueError: there are not so many blocks, or the number is negative.
    """
    blocks = model.transformer.h
    if not 0 <= layers <= len(blocks):
        raise ValueError(f"layers must be from 0 to {len(blocks)}, the number of blocks, got {layers}")
    model.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    for block in blocks[len(blocks) - layers :]:
        block.requires_grad_(True)
