"""LoReFT and DiReFT (Wu et al. 2024, arXiv:2404.03592): edit hidden states instead of weights.

After some blocks, at some positions of the prompt, the hidden state h of a token is changed; the weights are frozen.
LoReFT (eq. 2) changes h only within the r-dimensional subspace spanned by the rows of R, and sets its coordinates
there:

    h' = h + R^T (W h + b - R h)        R, W: (r, d),  b: (r,),  h: (d,),  R R^T = I

so that R h' = W h + b. DiReFT (eq. 3) drops what makes this expensive, the orthonormal rows and the difference:

    h' = h + R^T (W h + b)              R, W: (r, d),  b: (r,)

After each step R is replaced by the nearest matrix with orthonormal rows, U V^T of its singular value decomposition, so
that R h' = W h + b keeps holding. (The authors' package uses PyTorch's orthogonal parametrisation instead.)

The positions are the first p and the last s tokens of the prompt, written "f7+l7" as in the authors' package, or "all".
A prompt ends with the first line break, as the prompts of the story cards and of E2E do; a text without a line break
has no last positions. Generated tokens are not edited; the edits reach them through the keys and values of the prompt.
Edits cannot be merged into the weights.

In the authors' package W is random, so LoReFT changes the model at the start; with `start="base"`, W = R and b = 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.blocks import check_layers
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.support.tape import Tape, TensorSize
from lora_from_scratch.support.wrapped import unwrapped

VARIANTS = ("loreft", "direft")
STARTS = ("base", "random")
ALL = "all"
LINE_BREAK = 198  # its id in GPT-2's vocabulary; `for_tokenizer` sets that of another tokenizer
HOOK = "loreft_hook"  # attribute of an adapted model: the handle of its hook

# --- Where: the positions --------------------------------------------------------------------------------


def first_and_last(positions: str) -> tuple[int, int]:
    """p and s of "f7+l7", "f7" or "l7".

    Raises:
        ValueError: the format is different, or both are 0.
    """
    found = re.fullmatch(r"f(\d+)(?:\+l(\d+))?|l(\d+)", positions) if isinstance(positions, str) else None
    first, last = (int(found[1] or 0), int(found[2] or found[3] or 0)) if found else (0, 0)
    if first + last == 0:
        raise ValueError(f'positions must be "all", or such as "f7+l7", "f7" or "l7", got {positions!r}')
    return first, last


def prompt_positions(input_ids: Tensor, place: Tensor, first: int, last: int, end_id: int) -> tuple[Tensor, Tensor]:
    """Masks of the first p tokens of each text and of the last s tokens of its prompt.

    A prompt ends with the first token `end_id` of its text, which belongs to it. A text without that token has no last
    positions. If a prompt is shorter than p + s, a token can be in both masks. Padding is in neither, whatever token it
    consists of, and may be on either side.

    Args:
        input_ids: (B, T), the tokens.
        place: (B, T), the position of each token in its text, from 0; negative: padding. If the beginning of the texts
            is in a cache, the places do not begin at 0.
        first, last: p and s, 0 or more.
        end_id: the token that ends a prompt.

    Returns:
        Two boolean tensors (B, T): the first positions, and the last ones.
    """
    ends = (input_ids == end_id) & (place >= 0)
    end = place.masked_fill(~ends, torch.iinfo(place.dtype).max).amin(dim=1, keepdim=True)  # (B, 1)
    before_end = torch.where(ends.any(dim=1, keepdim=True), end - place, -1)  # 0 at the end, 1 before it
    return (place >= 0) & (place < first), (place >= 0) & (before_end >= 0) & (before_end < last)


class Positions:
    """The positions to edit in the current batch, set by a hook before the model's forward pass.

    Attributes:
        masks: boolean (B, T, 1), for the first tokens and for the last; None: all positions.
    """

    def __init__(self, positions: str, end_id: int) -> None:
        self.everywhere = positions == ALL
        self.first, self.last = (0, 0) if self.everywhere else first_and_last(positions)
        self.end_id = end_id
        self.masks: tuple[Tensor, Tensor] | None = None

    def note(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A forward pre-hook of a GPT2."""
        if self.everywhere:
            return
        ids = inputs[0] if inputs else named.get("input_ids")
        if ids is None:
            raise ValueError("LoReFT finds the end of the prompt in input_ids; inputs_embeds alone do not show it")
        mask, cache = named.get("attention_mask"), named.get("cache")
        cached = len(cache) if cache is not None else 0
        if mask is None:
            place = torch.arange(cached, cached + ids.shape[1], device=ids.device).expand(len(ids), -1)
        else:
            place = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, -1)[:, cached:]
        last = 0 if cached else self.last  # the prompt has been read
        self.masks = tuple(m[..., None] for m in prompt_positions(ids, place, self.first, last, self.end_id))  # type: ignore[assignment]


# --- What: the edit --------------------------------------------------------------------------------------


def orthonormal_rows(R: Tensor) -> Tensor:
    """The matrix with orthonormal rows that is nearest to R in the Frobenius norm.

    If the rows of R are orthonormal already, the result is R. The order of the rows does not matter, in contrast to
    Gram-Schmidt and QR, which keep the direction of the first row.

    Args:
        R: (r, d), r at most d, with linearly independent rows.

    Returns:
        (r, d), a new tensor with the dtype of R; dtypes of 16 bits are computed in float32.
    """
    U, _, Vh = torch.linalg.svd(R.float(), full_matrices=False)
    return (U @ Vh).to(R.dtype)


def reft_change(
    h: Tensor, R: Tensor, W: Tensor, b: Tensor, where: Tensor | None = None, variant: str = "loreft"
) -> Tensor:
    """What LoReFT or DiReFT adds to hidden states (Wu et al. 2024, equations 2 and 3).

    LoReFT adds R^T (W h + b - R h), DiReFT adds R^T (W h + b). At positions that are not edited the change is zero.

    Args:
        h: (B, T, d), the hidden states, B texts of T tokens.
        R, W: (r, d).
        b: (r,).
        where: boolean (B, T, 1), True at the positions that are edited; None: at all positions.
        variant: "loreft" or "direft".

    Returns:
        (B, T, d), the change alone, without h. Gradients flow to R, W, b and h.
    """
    down = W - R if variant == "loreft" else W  # (r, d)
    z = F.linear(h, down, b)  # (B, T, r)
    if where is not None:
        z = z * where.to(z.dtype)
    return F.linear(z, R.T)


class Intervention(nn.Module):
    """The edit of LoReFT or of DiReFT.

    Args:
        width: d.
        rank: r, from 1 to d.
        variant: "loreft" or "direft".
        start: "base": h' = h at the start; "random": W and b (and for DiReFT also R) initialised like a linear layer in
            PyTorch, as in the authors' package.
        generator: for the initial values; None: PyTorch's default generator.
    """

    def __init__(
        self, width: int, rank: int, variant: str, start: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.variant = variant
        bound = 1 / math.sqrt(width)
        R = torch.empty(rank, width)
        W = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        b = torch.empty(rank).uniform_(-bound, bound, generator=generator)
        if variant == "loreft":
            nn.init.orthogonal_(R, generator=generator)
        else:
            R.uniform_(-bound, bound, generator=generator)
        if start == "base":
            b.zero_()
            (W.copy_(R) if variant == "loreft" else R.zero_())
        self.loreft_R, self.loreft_W, self.loreft_b = nn.Parameter(R), nn.Parameter(W), nn.Parameter(b)

    def forward(self, h: Tensor, where: Tensor | None) -> Tensor:
        """The change of h (B, T, d): (B, T, d), zero outside `where` (B, T, 1)."""
        return reft_change(h, self.loreft_R, self.loreft_W, self.loreft_b, where, self.variant)

    @torch.no_grad()
    def project(self) -> None:
        """Make the rows of LoReFT's R orthonormal again."""
        if self.variant == "loreft":
            self.loreft_R.copy_(orthonormal_rows(self.loreft_R))

    def extra_repr(self) -> str:
        return f"variant={self.variant}, rank={len(self.loreft_R)}"


class EditedBlock(nn.Module):
    """A block, kept unchanged as `base`, whose output is edited.

    Args:
        base: the block; it returns (B, T, d).
        interventions: one for all positions, or one for the first tokens of the prompt and one for the last.
        positions: the positions in the current batch; shared by all blocks.
    """

    def __init__(self, base: nn.Module, interventions: Sequence[Intervention], positions: Positions) -> None:
        super().__init__()
        self.base, self.positions = base, positions
        self.interventions = nn.ModuleList(interventions)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        h: Tensor = self.base(x, *others)
        edits = [edit(h, where) for edit, where in zip(self.interventions, self.places(), strict=True)]
        for edit in edits:
            h = h + edit
        return h

    def places(self) -> list[Tensor | None]:
        """The positions of each intervention: boolean (B, T, 1), or None for all."""
        if self.positions.everywhere:
            return [None]
        assert self.positions.masks is not None
        first, last = self.positions.masks
        return [first | last] if len(self.interventions) == 1 else [first, last & ~first]


# --- The method ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoReFT(Method):
    """LoReFT or DiReFT on a GPT-2; see the module for the equations.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor), or does not fit the model (raised by
            `adapt`).
    """

    rank: int = hyperparameter(8, "dimension r of the subspace in which hidden states are edited")
    variant: str = hyperparameter("loreft", "loreft, or direft, whose R is not kept orthonormal")
    positions: str = hyperparameter("f7+l7", "f7+l7: the first 7 and last 7 tokens of the prompt; or f7, l7, all")
    share_weights: bool = hyperparameter(
        True, "use one intervention per block for first and last tokens, instead of two"
    )
    layers: Sequence[int] = hyperparameter((), "blocks after which to edit, counted from 0; all if none is given")
    start: str = hyperparameter("base", "base: nothing changes at the start; random: as in the authors' package")
    end_id: int = LINE_BREAK  # the token that ends a prompt
    seed: int = 0  # of the initial values

    name: ClassVar[str] = "loreft"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_LOREFT"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 9e-4, "stanfordnlp/pyreft, for LLaMA-7B; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 40
    use_when: ClassVar[str] = (
        "hidden states are to be edited with few numbers; it cannot be merged. Edits at the ends of the prompt were "
        "far behind LoRA in the atlas; edits at all positions were ahead of LoRA of rank 1 on the same task (unit 21)"
    )
    needs_gpt2: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"loreft", "direft"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        for name, value, allowed in (("variant", self.variant, VARIANTS), ("start", self.start, STARTS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.positions != ALL:
            first_and_last(self.positions)

    def for_tokenizer(self, tokenizer: Tokenizer) -> LoReFT:
        """A copy that knows the tokenizer's line break."""
        return replace(self, end_id=tokenizer.encode("\n")[0])

    def _install(self, model: GPT2) -> None:
        blocks, d = model.transformer.h, model.config.n_embd
        check_layers(self.layers, len(blocks))
        check_rank(self.rank, d, "the model's width")
        generator = torch.Generator().manual_seed(self.seed)
        positions = Positions(self.positions, self.end_id)
        count = 1 if self.share_weights or min(positions.first, positions.last) == 0 else 2
        like = model.transformer.ln_f.weight
        for layer in sorted(set(self.layers)) or range(len(blocks)):
            edits = [Intervention(d, self.rank, self.variant, self.start, generator).to(like) for _ in range(count)]
            blocks[layer] = EditedBlock(blocks[layer], edits, positions).train(blocks[layer].training)
        model.__dict__[HOOK] = model.register_forward_pre_hook(positions.note, with_kwargs=True)

    def _uninstall(self, model: GPT2) -> None:
        model.__dict__.pop(HOOK).remove()
        for layer, block in enumerate(model.transformer.h):
            if isinstance(block, EditedBlock):
                model.transformer.h[layer] = block.base

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        for edit in interventions(unwrapped(model)):
            edit.project()

    @classmethod
    def contestants(cls) -> dict[str, dict[str, Any]]:
        return {variant: {"variant": variant} for variant in VARIANTS}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoReFT:
        return cls(
            rank=rng.randint(1, 3),
            variant=rng.choice(VARIANTS),
            positions=rng.choice([ALL, "f2", "l3", "f1+l2"]),
            share_weights=rng.random() < 0.5,
            layers=rng.choice([(), (0,), (config.n_layer - 1,)]),
            start=rng.choice(STARTS),
            end_id=rng.randrange(config.vocab_size),
            seed=rng.randint(0, 99),
        )

    def starts_as_base(self) -> bool | None:
        return self.start == "base"


def interventions(model: nn.Module) -> list[Intervention]:
    """All interventions of a model, block by block."""
    return [module for module in model.modules() if isinstance(module, Intervention)]


@activations.forward.register
def _(module: EditedBlock, x: TensorSize, tape: Tape) -> TensorSize:
    h = activations.forward(module.base, x, tape)
    edits = []
    for edit in module.interventions:
        assert isinstance(edit, Intervention)
        down = edit.loreft_W - edit.loreft_R if edit.variant == "loreft" else edit.loreft_W
        z = tape.linear(h, down, len(edit.loreft_W), edit.loreft_b)
        if not module.positions.everywhere:
            z = tape.like(z, [TensorSize(z.rows, 1, z.width)])  # the mask
        edits.append(tape.linear(z, edit.loreft_R, h.columns))
    for y in edits:
        h = tape.sum(h, y)
    return h
