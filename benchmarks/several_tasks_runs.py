"""The tasks and the runs of `several_tasks`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.memorising import FULL_RATES, RATES, Result, Runs, learn, tuned
from lora_from_scratch.finetune.step_seeds import step_seed
from lora_from_scratch.finetune.training import Batch, NonFiniteLossError
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX, next_token_loss
from lora_from_scratch.linear_algebra.subspace import effective_rank
from lora_from_scratch.linear_algebra.svd import rank_for_energy
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.multilora import MultiLoRA

SYMBOLS, LENGTH, PAIRS = 16, 4, 32
TASKS = ("reverse", "reorder", "substitute", "sort", "recall")  # in the order of their tokens
BASE_TASKS = ("copy", "rotate", "swap", "next")
TOKENS = {task: SYMBOLS + place for place, task in enumerate((*TASKS, *BASE_TASKS))}
CONFIG = GPT2Config(
    vocab_size=SYMBOLS + len(TOKENS),
    n_positions=1 + 2 * LENGTH,
    n_embd=64,
    n_layer=2,
    n_head=4,
    embd_pdrop=0,
    attn_pdrop=0,
    resid_pdrop=0,
)
ROWS, BASE_ROWS, BASE_STEPS, TEST_ROWS = 12, 32, 400, 200  # of each task: rows in a batch, rows of the test
SEEDS, BASE_SEED = (1, 2, 3), 1_000
DIVERGED = 100.0  # stored as bits per token of a run that diverged
TEST = -1  # the step whose random numbers the test has


# --- The tasks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What is random in the tasks of a seed."""

    order: Tensor  # (LENGTH,), of "reorder"
    table: Tensor  # (SYMBOLS,), of "substitute"
    keys: Tensor  # (PAIRS, LENGTH), of "recall"
    values: Tensor  # (PAIRS, LENGTH)


def rules(seed: int) -> Rules:
    """The order of a seed is none of those that the base knows, nor that of "reverse"."""
    generator = torch.Generator().manual_seed(step_seed(seed, TEST, stream=1))
    places = torch.arange(LENGTH)
    known = [answers(task, places[None], None)[0] for task in ("reverse", "copy", "rotate", "swap")]
    order = places
    while any(torch.equal(order, other) for other in known):
        order = torch.randperm(LENGTH, generator=generator)
    return Rules(
        order,
        torch.randperm(SYMBOLS, generator=generator),
        torch.randint(SYMBOLS, (PAIRS, LENGTH), generator=generator),
        torch.randint(SYMBOLS, (PAIRS, LENGTH), generator=generator),
    )


def answers(task: str, x: Tensor, rules: Rules | None) -> Tensor:
    """The right outputs (rows, LENGTH) for the inputs x (rows, LENGTH). Those of "recall" must be keys.

    Args:
        rules: for "reorder", "substitute" and "recall".
    """
    if task in ("reorder", "substitute", "recall"):
        assert rules is not None
        if task == "recall":
            return rules.values[(x[:, None] == rules.keys).all(dim=2).int().argmax(dim=1)]
        return x[:, rules.order] if task == "reorder" else rules.table[x]
    return {
        "reverse": lambda: x.flip(1),
        "sort": lambda: x.sort(dim=1).values,
        "copy": lambda: x,
        "rotate": lambda: x.roll(-1, dims=1),
        "swap": lambda: x.view(-1, LENGTH // 2, 2).flip(2).flatten(1),  # each with its neighbour
        "next": lambda: (x + 1) % SYMBOLS,
    }[task]()


def examples(task: str, rows: int, seed: int, step: int, rules: Rules) -> Tensor:
    """(rows, 1 + 2 LENGTH): the token of the task, the input and the output."""
    generator = torch.Generator().manual_seed(step_seed(seed, step, stream=2 + TOKENS[task]))
    if task == "recall":
        x = rules.keys[torch.randint(PAIRS, (rows,), generator=generator)]
    else:
        x = torch.randint(SYMBOLS, (rows, LENGTH), generator=generator)
    return torch.cat([torch.full((rows, 1), TOKENS[task]), x, answers(task, x, rules)], dim=1)


def batch_of(tasks: Sequence[str], rows: int, seed: int, rules: Rules, step: int) -> Batch:
    """`rows` examples of each task, with labels only for the outputs. A task has the same examples in any company."""
    ids = torch.cat([examples(task, rows, seed, step, rules) for task in tasks])
    labels = ids.clone()
    labels[:, : 1 + LENGTH] = IGNORE_INDEX
    return Batch(ids, labels)


# --- Runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A method, and where the search for its learning rate begins."""

    label: str
    method: Method
    rates: tuple[float, ...] = FULL_RATES
    most: int = 64  # the rank that the update of every matrix can have
    alone: bool = False  # whether it also learns each task alone


# A scale for each output costs as much as rank 0.56, so that three LoRAs of rank r with their scales have exactly as
# many parameters as one LoRA of rank 3 r + 2 whose rank is 3 r + 1 on mlp.c_proj.
SMALLER = {"mlp.c_proj": 7}
SETTINGS = (
    Setting("lora, r = 8", LoRA(rank=8, alpha=64, rank_pattern=SMALLER), most=8, alone=True),
    Setting("rslora, r = 8", LoRA(rank=8, alpha=64, rank_pattern=SMALLER, rslora=True), most=8),
    Setting("multilora, 3 of r = 2", MultiLoRA(modules=3, rank=2), RATES, most=6, alone=True),
    Setting("full", FullFineTuning(keep_base=False)),
)


@cache
def base_weights() -> dict[str, Tensor]:
    """The weights of the base, which has learned other tasks."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    batch_at = partial(batch_of, BASE_TASKS, BASE_ROWS, BASE_SEED, rules(BASE_SEED))
    learn(model, FullFineTuning(keep_base=False), batch_at, BASE_STEPS, 3e-3)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def base() -> GPT2:
    model = GPT2(CONFIG)
    model.load_state_dict(base_weights())
    return model


@torch.no_grad()
def tested(model: GPT2, tasks: Sequence[str], seed: int) -> Result:
    """The accuracy for each task, and in "bits" the loss in bits per token for each."""
    model.eval()
    found: Result = {}
    for task in tasks:
        batch = batch_of([task], TEST_ROWS, seed, rules(seed), TEST)
        logits = model(batch.input_ids)
        right = logits[:, LENGTH:-1].argmax(dim=-1) == batch.input_ids[:, 1 + LENGTH :]
        found[task] = float(right.float().mean())
        found[f"bits {task}"] = float(next_token_loss(logits, batch.labels)) / math.log(2)
    return found


def spectrum(changes: Sequence[Tensor]) -> Result:
    """Means over the matrices of a change: effective rank, share of the largest singular value in the energy (the sum
    of the squares), and number of directions that have 90 % of it."""
    energies = [torch.linalg.svdvals(change).square() for change in changes]
    return {
        "effective rank": statistics.mean(map(effective_rank, changes)),
        "largest": statistics.mean(float(energy[0] / energy.sum()) for energy in energies),
        "directions": statistics.mean(rank_for_energy(change, 0.9) for change in changes),
    }


def block_changes(before: GPT2, after: GPT2) -> list[Tensor]:
    """What was added to each matrix in the blocks."""
    new = dict(after.named_parameters())
    return [
        (new[name] - old).detach()
        for name, old in before.named_parameters()
        if name.startswith("transformer.h.") and old.ndim == 2
    ]


def run(method: Method, groups: Sequence[Sequence[str]], steps: int, seed: int, rate: float) -> Result:
    """Learn each group of tasks from the base. Accuracies are those of each task, the rest are means over the models.

    "bits" is the mean loss over the tasks, and `DIVERGED` if a run diverges.
    """
    found: Result = {"rate": rate}
    spectra: list[Result] = []
    for tasks in groups:
        model = base()
        try:
            learn(model, method, partial(batch_of, tasks, ROWS, seed, rules(seed)), steps, rate)
        except NonFiniteLossError:
            return {"rate": rate, "bits": DIVERGED}
        found |= tested(model, tasks, seed)
        found["parameters"] = sum(p.numel() for p in method.trainable(model).values())
        spectra.append(spectrum(block_changes(base(), method.merged_copy(model) if method.can_merge else model)))
    for key in spectra[0]:
        found[key] = statistics.mean(one[key] for one in spectra)
    tasks = [task for group in groups for task in group]
    found["accuracy"] = statistics.mean(found[task] for task in tasks)
    found["bits"] = statistics.mean(found.pop(f"bits {task}") for task in tasks)
    return {key: value if key == "rate" else float(f"{value:.6g}") for key, value in found.items()}


TOGETHER, ALONE = "together", "alone"
Carry = Callable[[Setting, str, int, float], Result]
Measured = tuple[list[Result], list[Result]]  # the sweep of seed 0, and the results of `SEEDS`
Found = dict[tuple[str, str], Measured]  # by label and company


def measured(runs: Runs, setting: Setting, company: str, steps: int, carry_out: Carry) -> Measured:
    """The runs of seed 0 in order of the rate, and those of `SEEDS` with the best rate.

    Args:
        company: `TOGETHER` or `ALONE`.
        carry_out: makes the run of a setting, company, seed and rate that is not stored.
    """
    name = f"{setting.label}, {company}, {steps} steps"
    tried = tuned(runs, name, lambda seed, rate: carry_out(setting, company, seed, rate), setting.rates)
    best = min(tried, key=lambda result: result["bits"])["rate"]
    return tried, [
        runs.result(f"{name}, seed {seed}, rate {best:.2e}", partial(carry_out, setting, company, seed, best))
        for seed in SEEDS
    ]


def carry_out(steps: int, setting: Setting, company: str, seed: int, rate: float) -> Result:
    groups = [TASKS] if company == TOGETHER else [(task,) for task in TASKS]
    return run(setting.method, groups, steps, seed, rate)


def all_results(runs: Runs, steps: int, carry_out: Carry) -> Found:
    """What `measured` returns, for each label and company."""
    plan = [(setting, TOGETHER) for setting in SETTINGS] + [(setting, ALONE) for setting in SETTINGS if setting.alone]
    return {(setting.label, company): measured(runs, setting, company, steps, carry_out) for setting, company in plan}


def untrained_accuracy() -> Result:
    """The accuracy of the base, a mean over `SEEDS`."""
    found = [tested(base(), TASKS, seed) for seed in SEEDS]
    means = {task: statistics.mean(one[task] for one in found) for task in TASKS}
    return means | {"accuracy": statistics.mean(means.values())}
