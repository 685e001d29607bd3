"""Relatives of LoRA against peft's: the time of a training step, and the activations that it keeps.

    python -m benchmarks.family_vs_peft                # GPT-2 small, random weights, every linear layer, 4 x 128 tokens
    python -m benchmarks.family_vs_peft --model tiny --pairs 1 --output /tmp/table.md

Writes `benchmarks/family_vs_peft.md`. peft loads the adapter that we save, so both start from the same weights. A step
is forward, backward and AdamW, and in AdaLoRA also the choice of ranks. Steps of ours and of peft's alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lora_vs_peft import MiB, base_model, paired_times, saved_activations, training_step
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.adalora import AdaLoRA
from lora_from_scratch.methods.dora import DoRA
from lora_from_scratch.methods.fourierft import FourierFT
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.lora_fa import LoRAFA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.randlora import RandLoRA
from lora_from_scratch.methods.vera import VeRA
from lora_from_scratch.support.files import write_atomically

METHODS: dict[str, Method] = {
    "DoRA, dropout 0.1": DoRA(rank=8, alpha=16, dropout=0.1),
    "VeRA, r = 256": VeRA(),
    "AdaLoRA, r = 12": AdaLoRA(),
    "RandLoRA, r = 32": RandLoRA(),
    "FourierFT, n = 1000": FourierFT(),
}
STEPS = 1000  # of the run that the measured steps of AdaLoRA belong to
PLACE = Path(__file__).with_suffix(".md")
HEAD = """\
# Relatives of LoRA against peft's

`python -m benchmarks.family_vs_peft` writes this file. {model}, all linear layers, batch {batch} x {tokens}, fp32, \
{threads} thread(s), torch {torch}, peft {peft}. A ratio is ours / peft's; below 1 is better for us. Time, \
of the processor if there is one thread: the median of {pairs} alternating pairs (smallest to largest).

| | time | ours / peft, s | saved activations | ours / peft, MiB |
|---|---:|---:|---:|---:|
"""
LORA_FA = """
LoRA-FA trains only B, so it needs only A x, not x, for the backward pass. It keeps {ours:.1f} MiB where LoRA keeps \
{lora:.1f} MiB, a ratio of {ratio:.3f}. What is left does not belong to LoRA: attention, normalisations and the \
activation function keep their inputs in both.
"""


def in_peft(model: GPT2, method: Method) -> Any:
    """peft's version on transformers' GPT-2, with the same weights as `model`, which `method` has adapted."""
    import peft
    import transformers

    plain = method.merged_copy(model).state_dict()  # at the start the adapter changes nothing
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_json_dict(), use_cache=False))
    theirs.load_state_dict({**plain, "lm_head.weight": plain["transformer.wte.weight"]})
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that VeRA's matrices are drawn again from their seed
        method.save(model, directory)
        return peft.PeftModel.from_pretrained(theirs, directory, is_trainable=True)


def compare(name: str, method: Method, arguments: argparse.Namespace) -> str:
    """A row of the table."""
    model = base_model(arguments.model)
    method.adapt(model)
    method.before_training(model, [], STEPS)
    theirs = in_peft(model, method)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.tokens))

    def our_loss() -> Tensor:
        loss = next_token_loss(model(tokens), tokens)
        extra = method.extra_loss(model)
        return loss if extra is None else loss + extra

    def their_loss() -> Tensor:
        loss: Tensor = theirs(input_ids=tokens, labels=tokens).loss
        return loss

    model.eval()
    theirs.eval()
    assert torch.allclose(our_loss(), their_loss(), atol=1e-4), "not the same model"
    model.train()
    theirs.train()
    ours, peft = (saved_activations(f, m.parameters()) for f, m in ((our_loss, model), (their_loss, theirs)))
    times = paired_times(our_step(model, method, our_loss), their_step(theirs, method, their_loss), arguments.pairs)
    ratios = sorted(a / b for a, b in times)
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    return (
        f"| {name} | {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) | "
        f"{seconds[0]:.2f} / {seconds[1]:.2f} | {ours / peft:.3f} | {ours / MiB:.1f} / {peft / MiB:.1f} |"
    )


def our_step(model: GPT2, method: Method, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(method.trainable(model).values(), lr=1e-4, fused=True)
    steps = iter(range(STEPS // 2, STEPS))  # while the budget falls

    def run() -> None:
        loss().backward()
        optimizer.step()
        method.after_step(model, next(steps), optimizer)
        optimizer.zero_grad(set_to_none=True)

    return run


def their_step(theirs: Any, method: Method, loss: Callable[[], Tensor]) -> Callable[[], None]:
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    if not isinstance(method, AdaLoRA):
        return training_step(loss, parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    steps = iter(range(STEPS // 2, STEPS))

    def run() -> None:
        loss().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(next(steps))
        optimizer.zero_grad(set_to_none=True)

    return run


def lora_fa(arguments: argparse.Namespace) -> tuple[int, int]:
    """The saved activations of LoRA-FA and of LoRA."""
    sizes = []
    for method in (LoRAFA(rank=8, alpha=16), LoRA(rank=8, alpha=16)):
        model = base_model(arguments.model)
        method.adapt(model)
        tokens = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.tokens))
        sizes.append(saved_activations(lambda: next_token_loss(model(tokens), tokens), model.parameters()))  # noqa: B023
    return sizes[0], sizes[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, tiny, bundled, or a checkpoint directory")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=PLACE)
    arguments = parser.parse_args()
    import peft

    torch.set_num_threads(arguments.threads)
    known = {"small": "GPT-2 small with random weights", "tiny": "A tiny GPT-2 with random weights"}
    text = HEAD.format(
        model=known.get(arguments.model, arguments.model), batch=arguments.batch, tokens=arguments.tokens,
        threads=arguments.threads, torch=torch.__version__, peft=peft.__version__, pairs=arguments.pairs,
    )  # fmt: skip
    for name, method in METHODS.items():
        row = compare(name, method, arguments)
        print(row, flush=True)
        text += f"{row}\n"
    ours, lora = lora_fa(arguments)
    text += LORA_FA.format(ours=ours / MiB, lora=lora / MiB, ratio=ours / lora)
    write_atomically(arguments.output, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
