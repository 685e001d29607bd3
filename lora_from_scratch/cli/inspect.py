"""`lora-from-scratch inspect`: list the layers of a model, and estimate the cost of a method on it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune.training import PRECISIONS

if TYPE_CHECKING:
    from lora_from_scratch.finetune.inspection import Inspection


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        usage="%(prog)s MODEL [--method NAME] [--flag value ...]",
        help="list a model's linear layers and the cost of a method",
        description="List the linear layers of a model and the cost of training it with a method, compared with full "
        "fine-tuning: trained parameters, memory, bytes on disk and multiply-adds. Only the model's configuration and "
        "the headers of its files are read, so the model may be larger than this machine's memory.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help='"bundled", "smollm2", a directory of any model that transformers supports, or a GPT-2 on the hub',
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts per training step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens per text (%(default)s)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="precision of the matrix products (%(default)s)"
    )
    shared.add_method(parser)
    parser.set_defaults(seed=0)
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.inspection import inspect_model
    from lora_from_scratch.methods.full_finetuning import FullFineTuning

    method = shared.method_from(options)
    methods = {m.name: m for m in (FullFineTuning(keep_base=False), method)}
    found = inspect_model(options.model, methods.values(), options.batch_size, options.tokens, options.precision)
    parts = [_heading(found), _layers(found), _costs(found, options)]
    if method.can_merge:
        parts.append(f"Merged into the weights, {method.name} adds no work to the forward pass.")
    print("\n\n".join(parts))
    return 0


def _heading(found: Inspection) -> str:
    from lora_from_scratch.finetune.report import size

    files = found.files
    dtypes = ", ".join(f"{count:,} numbers in {dtype}" for dtype, count in files.dtypes.items())
    where = f"{size(files.bytes)} in {', '.join(files.names[:2])}" if files.names else "no weight files"
    more = f" and {len(files.names) - 2} more" if len(files.names) > 2 else ""
    return f"{found.kind}: {found.parameters:,} parameters; {where}{more}{f' ({dtypes})' if dtypes else ''}"


def _layers(found: Inspection) -> str:
    from lora_from_scratch.finetune.report import markdown

    name = list(found.costs)[-1]
    lines = [("linear layers", "number", "in", "out", "parameters", "share", f"trained by {name}")]
    for kind in found.layers:
        inputs, outputs = (f"{side:,}" for side in kind.size) if kind.size else ("", "")
        share = f"{100 * kind.parameters / max(1, found.parameters):.1f} %"
        number = f"{kind.count}" if kind.size else ""
        lines.append((kind.name, number, inputs, outputs, f"{kind.parameters:,}", share, f"{kind.trained:,}"))
    return markdown(lines)


def _costs(found: Inspection, options: argparse.Namespace) -> str:
    from lora_from_scratch.finetune.report import markdown, size

    costs = found.costs.values()

    def work(count: int | None, base: int | None) -> str:
        if count is None or base is None:
            return "not known"
        return f"{count / 1e9:,.2f} G ({100 * (count / base - 1):+.1f} %)"

    def memory(count: int | None) -> str:
        return "not known" if count is None else size(count)

    full_step = next(iter(costs)).step
    rows = [
        ("trained parameters", *(f"{c.trained:,}" for c in costs)),
        ("share of the model", *(f"{100 * c.trained / found.parameters:.3f} %" for c in costs)),
        ("saved on disk", *(size(c.saved_bytes) for c in costs)),
        ("memory: weights", *(size(c.weights) for c in costs)),
        ("memory: gradients", *(size(c.gradients) for c in costs)),
        ("memory: optimiser (AdamW)", *(size(c.optimizer) for c in costs)),
        ("memory: kept for the backward pass", *(memory(c.activations) for c in costs)),
        ("multiply-adds, forward (against the base)", *(work(c.forward, found.base_forward) for c in costs)),
        ("multiply-adds, step (against full)", *(work(c.step, full_step) for c in costs)),
    ]
    title = f"{options.batch_size} x {found.tokens} tokens, {options.precision}"
    return markdown([(title, *found.costs), *rows])
