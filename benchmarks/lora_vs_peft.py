"""Our LoRA against peft's: the memory that a training step keeps, and the time that it takes.

    python -m benchmarks.lora_vs_peft                     # GPT-2 small, random weights, LoRA on every linear layer
    python -m benchmarks.lora_vs_peft --model bundled
    python -m benchmarks.lora_vs_peft --what memory --dropout 0.1

`benchmarks/README.md` describes what is measured and gives the results.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2, Conv1D, GPT2Config, next_token_loss
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_state_dict

MiB = 2**20
Step = Callable[[], Tensor]  # one forward pass; returns the loss


def saved_activations(step: Step, parameters: Iterable[nn.Parameter]) -> int:
    """The bytes that a forward pass keeps for the backward pass: every storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept until the graph is freed, so that no address is reused

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    loss.backward()
    return sum(sizes.values())


def paired_times(ours: Callable[[], None], theirs: Callable[[], None], pairs: int) -> list[tuple[float, float]]:
    """The seconds of ours and theirs, measured immediately after each other, in alternating order.

    With one thread the processor time is taken, so that other programs on the machine count less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for pair in range(-2, pairs):  # two pairs to warm up
        seconds: dict[Callable[[], None], float] = {}
        for run in (ours, theirs) if pair % 2 else (theirs, ours):
            started = clock()
            run()
            seconds[run] = clock() - started
        if pair >= 0:
            times.append((seconds[ours], seconds[theirs]))
    return times


def report_memory(what: str, ours: int, theirs: int) -> None:
    print(f"{what:<58} saved {ours / theirs:6.3f}  ({ours / MiB:.1f} against {theirs / MiB:.1f} MiB)", flush=True)


def report_times(what: str, times: list[tuple[float, float]]) -> None:
    ratios = sorted(a / b for a, b in times)
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    print(
        f"{what:<58} time  {statistics.median(ratios):6.3f}  from {ratios[0]:.3f} to {ratios[-1]:.3f} "
        f"in {len(ratios)} pairs ({1e3 * seconds[0]:.1f} against {1e3 * seconds[1]:.1f} ms)",
        flush=True,
    )


# --- (a) whole models, as they are normally used ---------------------------------------------------------


def base_model(name: str) -> GPT2:
    """A GPT-2 small or tiny GPT-2 with random weights, or a checkpoint; without dropout, which blurs the comparison."""
    torch.manual_seed(0)
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    if name == "small":
        return GPT2(GPT2Config(**off))  # type: ignore[arg-type]
    if name == "tiny":
        return GPT2(GPT2Config(vocab_size=128, n_positions=128, n_embd=64, n_layer=2, n_head=4, **off))  # type: ignore[arg-type]
    from lora_from_scratch.gpt2.checkpoint import load_model

    loaded = load_model(name)
    model = GPT2(GPT2Config(**{**vars(loaded.config), **off}))
    model.load_state_dict(loaded.state_dict())
    return model


def with_peft(model: GPT2, method: LoRA) -> Any:
    """peft's LoRA on transformers' GPT-2, with the same weights, A and B as `model`, which `method` has adapted."""
    import peft
    import transformers

    plain = {n.replace(".base.", "."): p for n, p in model.named_parameters() if "lora_" not in n}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_json_dict(), use_cache=False))
    theirs.load_state_dict({**plain, "lm_head.weight": plain["transformer.wte.weight"]})
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.targets if isinstance(method.targets, str) else list(method.targets),
        lora_dropout=method.dropout,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(theirs, config)
    state = {f"base_model.model.{name}.weight": tensor for name, tensor in lora_state_dict(model).items()}
    peft.set_peft_model_state_dict(wrapped, state)
    return wrapped


def training_step(step: Step, parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run() -> None:
        step().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def whole_models(arguments: argparse.Namespace, dropout: float) -> None:
    model, method = base_model(arguments.model), LoRA(rank=arguments.rank, alpha=16, dropout=dropout)
    method.adapt(model)
    theirs = with_peft(model, method)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.tokens))
    model.train()
    theirs.train()

    def our_loss() -> Tensor:
        return next_token_loss(model(tokens), tokens)

    def their_loss() -> Tensor:
        loss: Tensor = theirs(input_ids=tokens, labels=tokens).loss
        return loss

    if not dropout:
        assert torch.allclose(our_loss(), their_loss(), atol=1e-4), "not the same model"
    what = f"(a) {arguments.model}, {arguments.batch} x {arguments.tokens}, r = {arguments.rank}, dropout {dropout:g}"
    if "memory" in arguments.what:
        sizes = [saved_activations(f, m.parameters()) for f, m in ((our_loss, model), (their_loss, theirs))]
        report_memory(what, *sizes)
    if "time" in arguments.what:
        ours = training_step(our_loss, list(method.trainable(model).values()))
        peft = training_step(their_loss, [p for p in theirs.parameters() if p.requires_grad])
        report_times(what, paired_times(ours, peft, arguments.pairs))


# --- (b) the layer alone ---------------------------------------------------------------------------------


def one_layer(arguments: argparse.Namespace, dropout: float, width: int, outputs: int) -> None:
    """Our LoRALinear on our Conv1D against peft's layer on transformers' Conv1D, with the same weights and input."""
    import peft
    from transformers.pytorch_utils import Conv1D as TheirConv1D

    torch.manual_seed(0)
    base = Conv1D(width, outputs)
    nn.init.normal_(base.weight, std=0.02)
    base.requires_grad_(False)
    layer = LoRALinear(base, arguments.rank, 16, dropout=dropout).train()
    holder = nn.Sequential(TheirConv1D(outputs, width))
    holder[0].load_state_dict(base.state_dict())
    config = peft.LoraConfig(
        r=arguments.rank, lora_alpha=16, target_modules=["0"], lora_dropout=dropout, fan_in_fan_out=True
    )
    theirs: Any = peft.get_peft_model(holder, config).train()
    state = {"base_model.model.0.lora_A.weight": layer.lora_A, "base_model.model.0.lora_B.weight": layer.lora_B}
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(arguments.batch, arguments.tokens, width, requires_grad=True)

    def our_loss() -> Tensor:
        return layer(x.clone()).sum()  # the clone stands for the output of another layer

    def their_loss() -> Tensor:
        loss: Tensor = theirs(x.clone()).sum()
        return loss

    what = f"(b) layer {width} to {outputs}, dropout {dropout:g}"
    if "memory" in arguments.what:
        sizes = [saved_activations(f, m.parameters()) for f, m in ((our_loss, layer), (their_loss, theirs))]
        report_memory(what, *sizes)
    if "time" in arguments.what:
        report_times(
            what,
            paired_times(lambda: our_loss().backward(), lambda: their_loss().backward(), 4 * arguments.pairs),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, tiny, bundled, or a checkpoint directory")
    parser.add_argument("--what", nargs="+", choices=["memory", "time"], default=["memory", "time"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1], help="of LoRA's input")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("ratios, ours / peft's; below 1 is better for us", flush=True)
    for dropout in arguments.dropout:
        whole_models(arguments, dropout)
        width = {"small": 768, "tiny": 64}.get(arguments.model, 256)
        one_layer(arguments, dropout, width, 3 * width)
        one_layer(arguments, dropout, 4 * width, width)


if __name__ == "__main__":
    main()
