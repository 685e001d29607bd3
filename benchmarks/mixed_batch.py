"""One batch, eight LoRAs: a step of generation of ours against peft's `adapter_names=`, in turns in one run.

    python -m benchmarks.mixed_batch                       # GPT-2 small, random weights, 16 rows of 1 token
    python -m benchmarks.mixed_batch --model bundled --adapters 4 --rows 32

Both sides have the same base, the same A and B on every linear layer, and the same rows; the script stops if the
logits differ. Times are taken in pairs, as in `lora_vs_peft`. Goal: at most 0.75 of peft's time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.lora_vs_peft import base_model, paired_times, report_times, with_peft
from lora_from_scratch.methods.lora import LoRA, lora_state_dict
from lora_from_scratch.serving.batched_lora import Factors, ServedAdapters, lora_factors

GOAL = 0.75


def give_values(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Random A and B of the size that training leaves; returns them under peft's names."""
    generator = torch.Generator().manual_seed(seed)
    state = lora_state_dict(model)
    for tensor in state.values():
        tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    return {f"base_model.model.{name}.weight": tensor for name, tensor in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, tiny, bundled, or a checkpoint directory")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1, help="in each row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import peft

    model, method = base_model(arguments.model).eval(), LoRA(rank=arguments.rank, alpha=16)
    method.adapt(model)
    theirs: Any = with_peft(model, method).eval()
    names = [f"task {number}" for number in range(arguments.adapters)]
    adapters: dict[str, Factors] = {}
    for seed, name in enumerate(names):
        state = give_values(model, seed)
        theirs.add_adapter(name, theirs.peft_config["default"])
        peft.set_peft_model_state_dict(theirs, state, adapter_name=name)
        adapters[name] = lora_factors(model)
    method.undo(model)
    served = ServedAdapters(model, adapters)
    rows: list[str | None] = [names[row % len(names)] for row in range(arguments.rows)]
    tokens = torch.randint(0, model.config.vocab_size, (arguments.rows, arguments.tokens))

    with served.rows(rows), torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens, adapter_names=rows).logits, atol=1e-3, rtol=1e-3)
        times = paired_times(
            lambda: model(tokens), lambda: theirs(tokens, adapter_names=rows, use_cache=False), arguments.pairs
        )
    print(f"ratio, ours / peft's; goal at most {GOAL}", flush=True)
    report_times(
        f"{arguments.model}, {arguments.adapters} adapters of rank {arguments.rank}, "
        f"{arguments.rows} rows of {arguments.tokens}",
        times,
    )


if __name__ == "__main__":
    main()
