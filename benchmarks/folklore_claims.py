"""The claims that `benchmarks/folklore.py` tests, in the order in which they are run: the cheap ones first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.folklore_runs import BATCH, SEEDS, Result, Runs, Setting, training_examples
from lora_from_scratch.compare.folklore import best_rate_ratio, matched_rank
from lora_from_scratch.finetune.accounting import predicted_memory
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.models.checkpoint import load_language_model


@dataclass(frozen=True)
class Outcome:
    """What was measured for a claim."""

    sides: Mapping[str, Sequence[float]]  # by name, one value per seed
    differences: Sequence[float]  # one per seed; see `verdict`


@dataclass(frozen=True)
class Claim:
    """A piece of advice, and the comparison that tests it."""

    key: str
    claim: str
    source: str
    compared: str
    measure: Callable[[Runs], Outcome]
    unit: str = "loss, nats per token"
    margin: float | None = None


# --- Settings ----------------------------------------------------------------------------------------

WIDTH = 256  # of the bundled model; the shapes (out, in) of a block's weights:
ATTENTION = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH)]
MLP = [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
SMALL: dict[str, Any] = {"examples": 80}  # which 40 steps of batch 8 go through four times

BASE = Setting()
FULL = Setting("full", start=7.5e-4)
ATTENTION_ONLY = Setting(rank=matched_rank(8, ATTENTION + MLP, ATTENTION), targets=("c_attn", "attn.c_proj"))
MLP_ONLY = Setting(rank=matched_rank(8, ATTENTION + MLP, MLP), targets=("c_fc", "mlp.c_proj"))
RANK_1, RANK_32 = Setting(rank=1), Setting(rank=32)
SMALL_LORA, SMALL_FULL = Setting(**SMALL), Setting("full", start=7.5e-4, **SMALL)


# --- Comparisons -------------------------------------------------------------------------------------


def losses(results: Sequence[Result]) -> list[float]:
    return [math.inf if result["loss"] is None else result["loss"] for result in results]


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def better(names: tuple[str, str], advised: Setting, other: Setting) -> Callable[[Runs], Outcome]:
    """The loss of the other setting minus that of the advised one."""

    def measure(runs: Runs) -> Outcome:
        sides = [runs.tuned(setting) for setting in (advised, other)]
        named = {f"{n}, rate {s[0]['rate']:.2g}": losses(s) for n, s in zip(names, sides, strict=True)}
        return Outcome(named, minus(losses(sides[1]), losses(sides[0])))

    return measure


def no_worse(names: tuple[str, str], advised: Setting, other: Setting) -> Callable[[Runs], Outcome]:
    """As `better`, but the advised setting may be better than the other without limit: that is no difference."""

    def measure(runs: Runs) -> Outcome:
        outcome = better(names, advised, other)(runs)
        return Outcome(outcome.sides, [min(0.0, difference) for difference in outcome.differences])

    return measure


def forgets(runs: Runs) -> Outcome:
    pair = [runs.tuned(setting) for setting in (BASE, FULL)]
    lora, full = ([r["tales"] for r in results] for results in pair)
    sides = {"LoRA, perplexity": lora, "full, perplexity": full}
    sides |= {"LoRA, loss of the cards": losses(pair[0]), "full, loss of the cards": losses(pair[1])}
    return Outcome(sides, [math.log(f / x) for f, x in zip(full, lora, strict=True)])


def lower_layers(runs: Runs) -> Outcome:
    shares = [r["blocks"] for r in runs.tuned(BASE)]
    half = len(shares[0]) // 2
    lower, upper = [fmean(s[:half]) for s in shares], [fmean(s[half:]) for s in shares]
    return Outcome({"blocks 0 to 2": lower, "blocks 3 to 5": upper}, minus(upper, lower))


def seeds(runs: Runs) -> Outcome:
    values = losses(runs.tuned(BASE))
    return Outcome({"LoRA": values}, [value - fmean(values) for value in values])


def ten_times(runs: Runs) -> Outcome:
    """Log of (best rate of LoRA / best rate of full), minus log 10, for each seed on its own."""
    ratios = []
    for seed in SEEDS:
        ratios.append(best_rate_ratio(*(sweep_of_seed(runs, setting, seed) for setting in (BASE, FULL))))
    return Outcome({"ratio of the best rates": ratios}, [math.log10(ratio / 10) for ratio in ratios])


def sweep_of_seed(runs: Runs, setting: Setting, seed: int) -> dict[float, float]:
    """The losses by learning rate of one seed, from around the tuned rate until the best is not at the edge."""
    best = runs.tuned(setting)[0]["rate"]
    middle = next(rung for rung in range(-12, 13) if setting.rate(rung) == best)
    rungs = [middle - 1, middle, middle + 1]
    while True:
        tried = {setting.rate(rung): runs.loss(setting, setting.rate(rung), seed) for rung in rungs}
        lowest = min(tried, key=lambda rate: tried[rate])
        if lowest == setting.rate(rungs[0]):
            rungs.insert(0, rungs[0] - 1)
        elif lowest == setting.rate(rungs[-1]):
            rungs.append(rungs[-1] + 1)
        else:
            return tried


def same_rate(runs: Runs) -> Outcome:
    """What ranks 1 and 32 lose at the rate that is best for rank 8; alpha is 64 for all."""
    rate = runs.tuned(BASE)[0]["rate"]
    sides = {}
    for name, setting in (("rank 1", RANK_1), ("rank 32", RANK_32)):
        own = runs.tuned(setting)
        sides[f"{name} at rate {rate:.2g} of rank 8"] = losses(runs.at_rate(setting, rate))
        sides[f"{name} at its own rate {own[0]['rate']:.2g}"] = losses(own)
    one, own_of_one, many, own_of_many = sides.values()
    return Outcome(sides, [*minus(one, own_of_one), *minus(many, own_of_many)])


def large_batches(runs: Runs) -> Outcome:
    """How much larger LoRA's distance from full fine-tuning is with batches of 32 than with batches of 8."""
    sides, gaps = {}, []
    both: tuple[dict[str, Any], ...] = ({}, {"batch": 32, "steps": 10})
    for options in both:
        pair = [runs.tuned(replace(setting, **options)) for setting in (BASE, FULL)]
        for name, results in zip(("LoRA", "full"), pair, strict=True):
            sides[f"{name}, batch {options.get('batch', BATCH)}"] = losses(results)
        gaps.append(minus(*map(losses, pair)))
    return Outcome(sides, minus(gaps[1], gaps[0]))


# --- Memory and time ---------------------------------------------------------------------------------

TOKENS = 80  # length of a batch of short cards


def memory(method: Method) -> Any:
    config = GPT2Config.from_json(checkpoint_directory("bundled") / "config.json")
    return predicted_memory(config, method, BATCH, TOKENS)


def optimizer_bytes(runs: Runs) -> Outcome:
    """The share of AdamW's state in the memory of a training step of LoRA with rank 8; SGD has none."""
    budget = memory(LoRA())
    share = budget.optimizer / budget.total
    return Outcome({"AdamW's state / all memory": [share] * len(SEEDS)}, [share] * len(SEEDS))


def qlora_memory(runs: Runs) -> Outcome:
    saved = 1 - memory(QLoRA(keep_base=False)).total / memory(LoRA()).total
    return Outcome({"saved memory": [saved] * len(SEEDS)}, [saved - 1 / 3] * len(SEEDS))


def qlora_time(runs: Runs) -> Outcome:
    seconds = {name: [step_seconds(runs, name, seed) for seed in SEEDS] for name in ("lora", "qlora")}
    extra = [q / x - 1 for q, x in zip(seconds["qlora"], seconds["lora"], strict=True)]
    return Outcome({"extra time": extra}, [more - 1 / 3 for more in extra])


def step_seconds(runs: Runs, name: str, seed: int) -> float:
    """CPU seconds of ten training steps."""

    def carry_out() -> Result:
        method = LoRA() if name == "lora" else QLoRA(keep_base=False)
        _, tokenizer = load_gpt2("bundled")
        model = method.load_base("bundled")[0] if name == "qlora" else load_language_model("bundled")[0]
        method.adapt(model)
        completions = Completions(training_examples(BASE, seed), tokenizer, 256)
        settings = TrainingSettings(steps=10, learning_rate=3e-3, seed=seed)
        trainer = Trainer(model, lambda step: completions.batch_at(step, BATCH, seed), settings, progress=False)
        began = time.process_time()
        trainer.run()
        return {"setting": f"time {name}", "rate": 0.0, "seed": seed, "seconds": time.process_time() - began}

    return float(runs.result(f"time {name}", 0.0, seed, carry_out)["seconds"])


# --- The list ----------------------------------------------------------------------------------------

SCHULMAN = "Schulman et al. 2025"
PRIMER = "introductions to LoRA"
RASCHKA = "Raschka 2023"
HU = "Hu et al. 2021"

CLAIMS = (
    Claim(
        "optimizer-bytes",
        "At a small rank, AdamW's state costs hardly more memory than SGD, which has none",
        RASCHKA,
        "AdamW's state as a share of a training step's predicted memory, rank 8",
        optimizer_bytes,
        "share of the memory",
        0.05,
    ),
    Claim(
        "qlora-memory",
        "QLoRA saves a third of the memory",
        RASCHKA,
        "predicted memory of a training step with QLoRA and with LoRA on fp32 weights, minus one third",
        qlora_memory,
        "share of the memory",
        0.05,
    ),
    Claim(
        "qlora-time",
        "QLoRA takes a third more time",
        RASCHKA,
        "CPU seconds of ten training steps with QLoRA and with LoRA: the extra time, minus one third",
        qlora_time,
        "share of the time",
        0.1,
    ),
    Claim(
        "seed",
        "The result hardly depends on the seed",
        RASCHKA,
        "each seed's loss and the mean of all",
        seeds,
        margin=0.05,
    ),
    Claim(
        "lower-layers",
        "Lower layers change less than higher ones",
        PRIMER,
        "relative change of the weights, mean of the upper minus mean of the lower three blocks",
        lower_layers,
        "relative change",
    ),
    Claim(
        "forgets",
        "LoRA forgets less than full fine-tuning",
        "Biderman et al. 2024",
        "log perplexity of the tales, each method at its tuned rate; the losses of the cards are not equal",
        forgets,
        "nats per token of the tales",
    ),
    Claim(
        "ten-times",
        "LoRA's best learning rate is ten times that of full fine-tuning",
        SCHULMAN,
        "the ratio of the best rates of each seed, in powers of ten from 10; margin: a factor of 2",
        ten_times,
        "powers of ten",
        round(math.log10(2), 4) + 0.001,
    ),
    Claim(
        "alpha",
        "alpha = 2 r is the best choice",
        RASCHKA,
        "rank 8: alpha 16 (2 r), and alpha 64 (8 r)",
        better(("alpha 16", "alpha 64"), Setting(alpha=16, start=1.2e-2), BASE),
    ),
    Claim(
        "all-layers",
        "Adapt all layers rather than the attention only",
        f"{SCHULMAN}; {RASCHKA}",
        f"the same number of parameters: all matrices with rank 8, attention with rank {ATTENTION_ONLY.rank}",
        better(("all", "attention"), BASE, ATTENTION_ONLY),
    ),
    Claim(
        "mlp",
        "Adapt the MLP rather than the attention",
        SCHULMAN,
        f"the same number of parameters: MLP with rank {MLP_ONLY.rank}, attention with rank {ATTENTION_ONLY.rank}",
        better(("MLP", "attention"), MLP_ONLY, ATTENTION_ONLY),
    ),
    Claim(
        "epochs",
        "Several epochs over a static data set hurt",
        RASCHKA,
        "80 cards: once (10 steps), and four times (40 steps)",
        better(("once", "four times"), Setting(**SMALL, steps=10), SMALL_LORA),
    ),
    Claim(
        "regulariser",
        "The low rank acts as a regulariser",
        PRIMER,
        "80 cards, four epochs: LoRA with rank 8, and full fine-tuning",
        better(("LoRA", "full"), SMALL_LORA, SMALL_FULL),
    ),
    Claim(
        "overfit",
        "Higher ranks overfit",
        PRIMER,
        "80 cards, four epochs: rank 1, and rank 32",
        better(("rank 1", "rank 32"), Setting(rank=1, **SMALL), Setting(rank=32, **SMALL)),
    ),
    Claim(
        "dropout",
        "Dropout on LoRA helps when there is little data",
        PRIMER,
        "80 cards, four epochs: dropout 0.1, and none",
        better(("dropout 0.1", "no dropout"), Setting(dropout=0.1, **SMALL), SMALL_LORA),
    ),
    Claim(
        "few-good",
        "Few but good examples beat many",
        f"{PRIMER}, after LIMA",
        "80 right cards four times, and 320 cards once of which a quarter has the text of another card",
        better(("80 right", "320, a quarter wrong"), SMALL_LORA, Setting(wrong=0.25)),
    ),
    Claim(
        "reverse",
        "A random and B zero, rather than the reverse",
        f"{PRIMER}; Hayou et al. 2024",
        "which factor is random at the start",
        better(("A random", "B random"), BASE, Setting(reverse=True)),
    ),
    Claim(
        "cosine",
        "A cosine schedule is better than a linear one",
        PRIMER,
        "both from the same warm-up of two steps to zero",
        better(("cosine", "linear"), Setting(schedule="cosine"), BASE),
    ),
    Claim(
        "decay",
        "A learning rate that decays is better than a constant one",
        PRIMER,
        "linear, and constant after the warm-up",
        better(("linear", "constant"), BASE, Setting(schedule="constant")),
    ),
    Claim(
        "rank-and-rate",
        "With alpha fixed, the best learning rate hardly depends on the rank",
        SCHULMAN,
        "what ranks 1 and 32 lose at the best rate of rank 8, alpha 64 for all (two differences per seed)",
        same_rate,
        margin=0.05,
    ),
    Claim(
        "rank-1",
        "Rank 1 is often enough",
        HU,
        "rank 1 and rank 8, alpha 64",
        no_worse(("rank 1", "rank 8"), RANK_1, BASE),
        margin=0.05,
    ),
    Claim(
        "large-batches",
        "Large batches suit LoRA less than full fine-tuning",
        SCHULMAN,
        "how much LoRA is behind full fine-tuning, at batch 32 (10 steps) and at batch 8 (40 steps)",
        large_batches,
    ),
    Claim(
        "sgd",
        "SGD is as good as AdamW",
        RASCHKA,
        "SGD without momentum, and AdamW",
        no_worse(("SGD", "AdamW"), Setting(optimizer="sgd", start=0.3, factor=4), BASE),
        margin=0.05,
    ),
    Claim(
        "language",
        "A low rank does not suffice for another language",
        PRIMER,
        "first sentences with every letter replaced by another: rank 32, and rank 1",
        better(("rank 32", "rank 1"), Setting(rank=32, cipher=True), Setting(rank=1, cipher=True)),
    ),
)
