"""The training loop, used for pretraining and for every fine-tuning method.

**Everything random in step t is drawn from (seed, t)**, the batch as well as the dropout masks. This makes a run
reproducible, and an interrupted run needs only its last checkpoint (weights, optimiser state, step) to resume exactly
where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_from_scratch.finetune.distributed import World
from lora_from_scratch.finetune.step_seeds import step_seed
from lora_from_scratch.gpt2.model import IGNORE_INDEX, next_token_loss
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.contention import watch
from lora_from_scratch.support.files import write_atomically
from lora_from_scratch.support.progress_bar import tqdm

SCHEDULES = ("linear", "cosine", "trapezoid", "constant")
PRECISIONS = ("bf16", "fp32")
BEFORE_TRAINING = -1  # the random stream of `Method.before_training`; the processes have streams 0, 1, ...


class Batch(NamedTuple):
    """A batch of texts of equal length. Padding, if any, is on the right."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T): token ids where the loss is computed, -100 elsewhere
    attention_mask: Tensor | None = None  # (B, T), 1 for a token and 0 for padding; None: no padding

    def rows(self, start: int, stop: int | None, step: int = 1) -> Batch:
        pick = slice(start, stop, step)
        mask = None if self.attention_mask is None else self.attention_mask[pick]
        return Batch(self.input_ids[pick], self.labels[pick], mask)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]

    @property
    def predictions(self) -> int:
        """The number of predicted tokens: labels other than -100, without the first of each row."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


class NonFiniteLossError(ValueError):
    """The loss or the gradient became infinite or NaN."""


@dataclass(frozen=True)
class TrainingSettings:
    """Hyperparameters of a training run.

    Raises:
        ValueError: a number is out of range, or the schedule or precision is unknown.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    schedule: str = "linear"  # one of `SCHEDULES`, see `learning_rate_at`
    decay_fraction: float = 0.4  # fraction of the steps in which the trapezoid decays
    weight_decay: float = 0.01  # applied to matrices, not to vectors (biases, normalisation)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0  # maximum norm of the whole gradient; 0: no clipping
    accumulation: int = 1  # number of micro-batches per batch: less memory, same result
    precision: str = "bf16"  # of the forward pass (autocast); weights and optimiser state stay in fp32
    seed: int = 0

    def __post_init__(self) -> None:
        _need(self.steps >= 1, "steps must be at least 1", self.steps)
        _need(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "learning_rate must be a positive number",
            self.learning_rate,
        )
        _need(0 <= self.warmup_steps <= self.steps, f"warmup_steps must be from 0 to {self.steps}", self.warmup_steps)
        _need(self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}", self.schedule)
        _need(self.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", self.precision)
        _need(0 < self.decay_fraction <= 1, "decay_fraction must be above 0 and at most 1", self.decay_fraction)
        _need(self.weight_decay >= 0, "weight_decay must not be negative", self.weight_decay)
        _need(self.clip_norm >= 0, "clip_norm must not be negative", self.clip_norm)
        _need(self.accumulation >= 1, "accumulation must be at least 1", self.accumulation)


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of one step, as a fraction of the peak: linear warm-up, then half a cosine down.

    Steps are counted from 0. With W warm-up steps out of T:

    - over the first W steps it rises linearly: step 0 has 1 / W, not 0, and step W - 1 has 1;
    - from step W on it falls along half a cosine: step W still has 1, the step halfway between W and T has 1/2, and it
      would reach 0 at step T, which is no longer taken (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, for
      one restart).

    With W = 0 there is no warm-up and step 0 has 1.

    Args:
        step: 0 to T - 1.
        steps: T.
        warmup_steps: W, 0 to T.

    Raises:
        ValueError: the step or the number of warm-up steps is out of range.
    """
    if not (0 <= step < steps and 0 <= warmup_steps <= steps):
        raise ValueError(
            f"step must be from 0 to steps - 1 and warmup_steps from 0 to steps, got step {step}, steps {steps} and "
            f"warmup_steps {warmup_steps}"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / (steps - warmup_steps)  # fraction of the decay, from 0 to almost 1
    return 0.5 * (1 + math.cos(math.pi * done))


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """The learning rate of step 0, 1, ... `steps - 1`, as a fraction of the peak.

    Warm-up is linear. After it, `linear` and `cosine` decay to zero over the remaining steps, `constant` stays at the
    peak, and `trapezoid` stays there until it decays linearly over the last `decay_fraction` of the steps (Hägele et
    al. 2024, arXiv:2405.18392).
    """
    if settings.schedule == "cosine":
        return warmup_cosine(step, settings.steps, settings.warmup_steps)
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)  # fraction left, 1 to almost 0
    if settings.schedule == "trapezoid":
        return min(1.0, (settings.steps - step) / (settings.decay_fraction * settings.steps))
    return left if settings.schedule == "linear" else 1.0


def adamw(
    trainable: Mapping[str, nn.Parameter] | Sequence[Mapping[str, Any]], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only.

    Args:
        trainable: the parameters by name, or parameter groups as returned by `Method.parameter_groups`.
    """
    given: Sequence[Mapping[str, Any]] = (
        [{"params": list(trainable.values())}] if isinstance(trainable, Mapping) else trainable
    )
    groups: list[dict[str, Any]] = []
    for group in given:
        rate = settings.learning_rate * group.get("lr_scale", 1.0)
        matrices = [p for p in group["params"] if p.ndim >= 2]
        vectors = [p for p in group["params"] if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": settings.weight_decay, "lr": rate})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr": rate})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


@dataclass
class History:
    """The record of a run: the loss of every step, and the results of the evaluations."""

    losses: list[float] = field(default_factory=list)  # nats per predicted token
    evaluations: list[dict[str, float]] = field(default_factory=list)  # each with its "step"
    tokens: int = 0  # predicted tokens in the whole run
    seconds: float = 0.0  # spent in training steps, including those before a resume
    peak_memory: int = 0  # bytes; of a resumed run, the largest of all its processes


class Trainer:
    """Trains a model on batches that are a function of the step.

    Args:
        model: any module with `model(input_ids, attention_mask=...) -> logits (B, T, V)`; its parameters
            with `requires_grad` are trained.
        batch_at: maps a step to its whole batch; must always return the same batch for the same step.
        settings: see `TrainingSettings`.
        method: the method that adapted the model, if any; its hooks are called (see `methods/method.py`).
        optimizers: used instead of AdamW on everything; optimisers, or a function that makes them.
        checkpoint: a file, written every `checkpoint_every` steps; if it exists, the run resumes from it.
        evaluate: called every `evaluate_every` steps and after the last; its results are recorded.
        settings_tag: identifies the data, the model and the method; a checkpoint with another tag is refused.
        peak_memory: returns this process's peak memory so far in bytes; called after each step and recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_at: Callable[[int], Batch],
        settings: TrainingSettings,
        *,
        method: Method | None = None,
        optimizers: Callable[[], list[torch.optim.Optimizer]] | list[torch.optim.Optimizer] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        evaluate: Callable[[], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        settings_tag: str = "",
        peak_memory: Callable[[], int] = lambda: 0,
        progress: bool = True,
        description: str = "training",
    ) -> None:
        self.model, self.batch_at, self.settings = model, batch_at, settings
        self.method = method
        if method is not None:
            torch.manual_seed(step_seed(settings.seed, 0, stream=BEFORE_TRAINING))
            method.before_training(model, (batch_at(step) for step in range(settings.steps)), settings.steps)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("nothing to train: no parameter of the model has requires_grad=True")
        self.device = next(iter(self.trainable.values())).device
        if callable(optimizers):  # only now, since `before_training` may have created parameters
            optimizers = optimizers()
        groups = self.trainable if method is None else method.parameter_groups(model)
        self.optimizers = optimizers or [adamw(groups, settings)]
        self.peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.checkpoint_every, self.evaluate, self.evaluate_every = checkpoint_every, evaluate, evaluate_every
        self.tag, self.peak_memory = settings_tag, peak_memory
        self.progress, self.description = progress, description
        self.world = World.from_environment()
        self.history = History()
        self.step = 0

    def run(self) -> History:
        """Train to the last step (from the checkpoint, if there is one) and return the history.

        Raises:
            NonFiniteLossError: the loss or gradient is not finite; the last checkpoint is kept.
            ValueError: the checkpoint belongs to another run or is damaged.
        """
        watch()  # other programs may need the processors too
        if self.checkpoint and self.checkpoint.exists():
            self._load()
        hidden = not self.progress or self.world.rank != 0
        quiet: dict[str, Any] = {"disable": True} if hidden else {}  # if unset, TQDM_DISABLE in the environment decides
        self.model.train()
        with tqdm(
            total=self.settings.steps,
            initial=self.step,
            desc=self.description,
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
            **quiet,
        ) as bar:
            while self.step < self.settings.steps:
                started = time.perf_counter()
                loss, tokens = self._one_step(self.step)
                self.history.seconds += time.perf_counter() - started
                self.history.losses.append(loss)
                self.history.tokens += tokens
                self.history.peak_memory = max(self.history.peak_memory, self.peak_memory())
                self.step += 1
                rate = self.history.tokens / self.history.seconds
                bar.set_postfix_str(
                    f"loss {_recent_mean(self.history.losses):.3f}, {rate:,.0f} tokens/s", refresh=False
                )
                bar.update()
                self._after_step(bar)
        return self.history

    def _one_step(self, step: int) -> tuple[float, int]:
        """Forward, backward, update. Returns the loss of the whole batch and the number of predicted tokens."""
        torch.manual_seed(step_seed(self.settings.seed, step, self.world.rank))
        batch = self.batch_at(step)
        predictions = max(1, batch.predictions)
        mine = batch.rows(self.world.rank, None, self.world.size)
        parts = min(self.settings.accumulation, len(mine.input_ids))
        loss = torch.zeros((), device=self.device)
        for part in range(parts):
            piece = mine.rows(part, None, parts).to(self.device)
            with autocast(self.device, self.settings.precision):
                logits = self.model(piece.input_ids, attention_mask=piece.attention_mask)
            # Weighted to give the mean over the whole batch: the gradient does not depend on how the batch is split.
            share = next_token_loss(logits, piece.labels) * (piece.predictions / predictions)
            share.backward()
            loss += share.detach()
        extra = None if self.method is None else self.method.extra_loss(self.model)
        if extra is not None:
            (extra / self.world.size).backward()  # the recorded loss remains the task's
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        self.world.all_reduce([loss, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        self._stop_unless_finite(step, float(loss), float(norm))
        if self.settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trainable.values(), self.settings.clip_norm, norm)
        fraction = learning_rate_at(step, self.settings)
        if self.method is not None:
            fraction *= self.method.rate_factor(self.model, step)
        for optimizer, peaks in zip(self.optimizers, self.peak_rates, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
            optimizer.step()
            if self.method is not None:
                self.method.after_step(self.model, step + 1, optimizer)
            optimizer.zero_grad(set_to_none=True)
        return float(loss), predictions

    def _stop_unless_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rate = self.settings.learning_rate * learning_rate_at(step, self.settings)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        kept = (
            f" The last good checkpoint is {self.checkpoint}." if self.checkpoint and self.checkpoint.exists() else ""
        )
        raise NonFiniteLossError(
            f"stopped at step {step}: {what} at learning rate {rate:.3g}. Try a learning rate ten times smaller, "
            f"more warm-up steps, or precision fp32.{kept}"
        )

    def _after_step(self, bar: Any) -> None:
        last = self.step == self.settings.steps
        if self.evaluate and (last or (self.evaluate_every and self.step % self.evaluate_every == 0)):
            result = {"step": self.step, **self.evaluate()}
            self.model.train()
            self.history.evaluations.append(result)
            if self.world.rank == 0 and self.progress:
                bar.write(", ".join(f"{name} {value:,.4g}" for name, value in result.items()))
        if self.checkpoint and (last or self.step % self.checkpoint_every == 0) and self.world.rank == 0:
            self.save()

    # --- Checkpoints: a single file, replaced atomically ---

    def save(self) -> None:
        """Write the checkpoint atomically: if this is interrupted, the previous one remains."""
        assert self.checkpoint is not None
        state = {
            "step": self.step,
            "settings": asdict(self.settings),
            "tag": self.tag,
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "method": {} if self.method is None else self.method.training_state(self.model),
            "history": asdict(self.history),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def _load(self) -> None:
        assert self.checkpoint is not None
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            step, saved = (
                state["step"],
                TrainingSettings(**{**state["settings"], "betas": tuple(state["settings"]["betas"])}),
            )
        except Exception as error:  # torch.load raises many types for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.checkpoint} is not a readable checkpoint ({reason}); delete it to start over"
            ) from None
        self._refuse_another_run(saved, step, state["tag"], state["trainable"])
        for name, value in state["trainable"].items():
            self.trainable[name].data.copy_(value)
        kept = {} if self.method is None else self.method.training_state(self.model)
        for name, value in state["method"].items():
            kept[name].data.copy_(value)
        for optimizer, saved_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        self.history, self.step = History(**state["history"]), step

    def _refuse_another_run(self, saved: TrainingSettings, step: int, tag: str, tensors: dict[str, Tensor]) -> None:
        now = self.settings
        if now.schedule == saved.schedule == "trapezoid" and step <= min(_decay_start(now), _decay_start(saved)):
            saved = replace(saved, steps=now.steps)  # until the decay begins, the number of steps may still be changed
        different = [k for k, v in asdict(saved).items() if v != asdict(now)[k]]
        if tag != self.tag:
            different.append("data, model or method")
        if {n: p.shape for n, p in self.trainable.items()} != {n: t.shape for n, t in tensors.items()}:
            different.append("trained tensors")
        if different:
            raise ValueError(
                f"{self.checkpoint} is the checkpoint of another run (different: {', '.join(different)}); "
                "use the same settings to resume it, or delete it to start over"
            )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """For bf16, autocast: bf16 where it is safe (matrix products), fp32 elsewhere (sums, norms). No-op for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _decay_start(settings: TrainingSettings) -> float:
    return (1 - settings.decay_fraction) * settings.steps


def _recent_mean(values: list[float], window: int = 50) -> float:
    recent = values[-window:]
    return sum(recent) / len(recent)


def _need(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {value!r}")
