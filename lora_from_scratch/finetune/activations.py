"""What each module of a GPT-2, plain or adapted, does in its forward pass, noted on a `Tape` of sizes.

One short function for each kind of module, in the order of the data, with the same operations in the same order as the
module's own `forward`. Only what the backward pass needs is counted; see `tape.py` for the rules.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2, MLP, Attention, Block, Conv1D
from lora_from_scratch.methods.adapters import (
    AdapterAfter,
    AdapterBeside,
    BottleneckAdapter,
    NormedAdapter,
    ParallelAdapter,
)
from lora_from_scratch.methods.bitfit import QueryBias
from lora_from_scratch.methods.llama_adapter import GatedPrefixAttention
from lora_from_scratch.methods.lora import FusedLoRALinear, LoRALinear
from lora_from_scratch.methods.prefix_tuning import PrefixEncoder
from lora_from_scratch.methods.prompt_tuning import SoftPrompt
from lora_from_scratch.quantization.nf4 import CHUNK
from lora_from_scratch.quantization.nf4_linear import NF4Linear
from lora_from_scratch.support.tape import FP32, Shadow, Step, Tape

# --- The modules, in the order of the data: each says what its forward pass does ------------------------------


@singledispatch
def forward(module: nn.Module, x: Shadow, tape: Tape) -> Shadow:
    """Note on the tape what `module(x)` does. A new module of a method needs a function of its own here.

    Raises:
        ValueError: nothing is known of this kind of module.
    """
    raise ValueError(f"the memory of a {type(module).__name__} is not known; teach it to {__name__}.forward")


@forward.register
def _(module: Conv1D, x: Shadow, tape: Tape) -> Shadow:
    return tape.linear(x, module.weight, module.out_features, module.bias)


@forward.register
def _(module: nn.Linear, x: Shadow, tape: Tape) -> Shadow:
    return tape.linear(x, module.weight, module.out_features, module.bias)


@forward.register
def _(module: QueryBias, x: Shadow, tape: Tape) -> Shadow:
    return tape.linear(x, module.base.weight, module.base.out_features, module.bias_q)


@forward.register
def _(module: NF4Linear, x: Shadow, tape: Tape) -> Shadow:
    x = tape.cast(x, 2) if tape.autocast else x
    n = module.in_features * module.out_features
    on_the_way_to_W = min(n, CHUNK) * 6 + 8 * n // module.quantized.blocksize  # gone when dL/dx is made
    scratch = n * x.width + max(0, on_the_way_to_W - x.nbytes)
    return tape.add([x], Shadow(x.rows, module.out_features, x.width), trained=[module.bias], scratch=scratch)


@forward.register
def _(module: LoRALinear, x: Shadow, tape: Tape) -> Shadow:
    y = forward(module.base, x, tape)
    if module.merged:
        return y
    A, B = module.lora_A, module.lora_B
    h = tape.linear(tape.dropout(x, module.dropout_p, noise_width=1), A, A.shape[0])  # (rows, r)
    saved = [h] if B.requires_grad else []
    if isinstance(module, FusedLoRALinear):
        saved.append(Shadow(y.columns, h.columns, h.width))  # B on a block diagonal
    elif h.width != B.element_size():
        saved.append(Shadow(1, B.numel(), h.width))  # the copy of B
    return tape.add([y, h], Shadow(y.rows, y.columns, y.width), saved, [B])


@forward.register
def _(module: Attention, x: Shadow, tape: Tape) -> Shadow:
    qkv = forward(module.c_attn, x, tape)
    y = attention(module, qkv, tape)
    return tape.dropout(forward(module.c_proj, y, tape), module.resid_dropout.p)


@forward.register
def _(module: GatedPrefixAttention, x: Shadow, tape: Tape) -> Shadow:
    base, prompt, gate = module.base, module.adaption_prompt, module.adaption_gate
    heads, length, d = base.n_head, prompt.shape[1], prompt.shape[2]
    qkv = forward(base.c_attn, x, tape)
    own = forward(base.c_attn, tape.parameter(prompt), tape)  # (P, 3 d)
    w, rows = qkv.width, tape.rows
    prompts = tape.batch * length
    saved = [in_order(qkv, tape, rows, d), *([in_order(own, tape, prompts, d)] if qkv.grad else [])]
    weights = tape.bends(tape.like(tape.add([qkv, own], Shadow(rows * heads, length, w), saved)))
    seen = tape.add([weights, own], Shadow(rows, d, w), [weights, in_order(own, tape, prompts, d)])
    gated = tape.add([seen], Shadow(rows, d, w), [seen], [gate])
    text = attention(base, qkv, tape)
    if module.as_peft:
        return tape.sum(forward(base.c_proj, text, tape), gated)
    return tape.dropout(forward(base.c_proj, tape.sum(text, gated), tape), base.resid_dropout.p)


def attention(module: Attention, qkv: Shadow, tape: Tape) -> Shadow:
    """(rows, 3 d) to (rows, d)."""
    d, w, heads = qkv.columns // 3, qkv.width, tape.rows * module.n_head
    split = tape.like(qkv)  # views; but their gradients are put together anew
    sources = [split]
    if tape.prefix is not None:  # [prefix; k] and [prefix; v], new tensors
        sources.append(tape.add([split, tape.prefix], Shadow(tape.batch * tape.keys, 2 * d, w)))
    grad = any(x.grad for x in sources)
    dropout = module.attn_pdrop if tape.training and not tape.cuda else 0.0
    output = Shadow(tape.rows, d, w)
    if dropout or (grad and w == 2 and not tape.padded and not tape.cuda):
        return written_out_attention(qkv, sources, output, heads, dropout, tape)
    kept = [qkv, *sources[1:], output, Shadow(heads, 1)]
    if tape.padded or tape.prefix:  # as numbers to be added to the scores
        kept.append(Shadow(tape.batch if tape.padded else 1, tape.tokens * tape.keys, w))
    return tape.add(sources, output, kept)


def in_order(x: Shadow, tape: Tape, rows: int, columns: int) -> Shadow:
    """What a batched matrix product keeps of heads cut from x: a copy in its order; of a single text x itself."""
    return x if tape.batch == 1 else Shadow(rows, columns, x.width)


def written_out_attention(
    qkv: Shadow, sources: list[Shadow], output: Shadow, heads: int, dropout: float, tape: Tape
) -> Shadow:
    """softmax(q k^T) v with its (T, S) matrices; `heads` is B T H, their rows."""
    w = FP32 if dropout else output.width  # with dropout PyTorch computes this in 32 bits
    d, keys = output.columns, tape.batch * tape.keys
    q, k, v = Shadow(tape.rows, d, w), Shadow(keys, d, w), Shadow(keys, d, w)  # q is scaled, so always a new tensor
    if w == qkv.width and tape.prefix is None:
        v = in_order(qkv, tape, keys, d)
        k = k if dropout else in_order(qkv, tape, keys, d)
    scores = tape.add(sources, Shadow(heads, tape.keys, w), [q, k])
    weights = tape.bends(tape.sum(scores, Shadow(heads, tape.keys, w)))  # the sum with the mask
    if dropout:
        weights = tape.dropout(weights, dropout, noise_width=w)
    return tape.add([weights, *sources], output, [weights, v])


@forward.register
def _(module: MLP, x: Shadow, tape: Tape) -> Shadow:
    hidden = forward(module.c_fc, x, tape)
    return tape.dropout(forward(module.c_proj, tape.like(hidden, [hidden]), tape), module.resid_dropout.p)  # gelu


@forward.register
def _(module: Block, x: Shadow, tape: Tape) -> Shadow:
    x = tape.sum(x, forward(module.attn, tape.norm(x, module.ln_1), tape))
    return tape.sum(x, forward(module.mlp, tape.norm(x, module.ln_2), tape))


@forward.register
def _(module: AdapterAfter, x: Shadow, tape: Tape) -> Shadow:
    return forward(module.adapter, forward(module.base, x, tape), tape)


@forward.register
def _(module: AdapterBeside, x: Shadow, tape: Tape) -> Shadow:
    return tape.sum(forward(module.base, x, tape), forward(module.adapter, x, tape))


@forward.register
def _(module: BottleneckAdapter, x: Shadow, tape: Tape) -> Shadow:
    h = forward(module.down, x, tape)
    return tape.sum(x, forward(module.up, tape.like(h, [h]), tape))  # gelu


@forward.register
def _(module: NormedAdapter, x: Shadow, tape: Tape) -> Shadow:
    h = tape.bends(forward(module.down, tape.norm(x, module.norm), tape))
    return tape.sum(x, forward(module.up, h, tape))


@forward.register
def _(module: ParallelAdapter, x: Shadow, tape: Tape) -> Shadow:
    return tape.like(forward(module.up, tape.bends(forward(module.down, x, tape)), tape))


@forward.register
def _(module: PrefixEncoder, x: Shadow, tape: Tape) -> Shadow:
    """The prefix, (P, 2 L d): it does not depend on x."""
    made = tape.parameter(module.embedding)
    if isinstance(module.transform, nn.Sequential):
        down, _, up = module.transform
        made = forward(up, tape.bends(forward(down, made, tape)), tape)
    return made


@forward.register
def _(module: SoftPrompt, x: Shadow, tape: Tape) -> Shadow:
    return tape.add([x], Shadow(tape.rows, x.columns, x.width), trained=[module.embeddings])


# --- The whole model -----------------------------------------------------------------------------------


def record(
    model: GPT2, batch: int, text: int, *, autocast: bool, padded: bool, checkpointing: bool, cuda: bool
) -> tuple[Tape, Shadow]:
    """The tape of `model(input_ids)` in training, for (batch, text) token ids, and the logits."""
    body, virtual = model.transformer, model.virtual_tokens
    prompt = virtual.length if isinstance(virtual, SoftPrompt) else 0
    tape = Tape(batch, prompt + text, autocast, padded, cuda, where="embeddings")
    x = embed(tape, text, body.wte.weight)
    if isinstance(virtual, PrefixEncoder):
        tape.prefix = forward(virtual, x, tape)
    elif virtual is not None:
        x = forward(virtual, x, tape)
    places = tape.add([], Shadow(tape.tokens, x.columns), [Shadow(tape.tokens, 1, 8)], [body.wpe.weight])
    x = tape.dropout(tape.sum(x, places), body.drop.p)
    shared = [tape.prefix] if tape.prefix else []  # what every block is given beside x
    if padded:
        shared.append(Shadow(batch, tape.tokens * tape.keys, 1))  # the mask, of booleans
    for layer, block in enumerate(body.h):
        tape.where = f"block {layer}"
        if checkpointing:
            inner = replace(tape, steps=[], kept={}, forward_peak=0)
            output = forward(block, x, inner)
            x = tape.checkpoint(x, shared, inner, output)
        else:
            x = forward(block, x, tape)
    tape.where = "head"
    seen = tape.add([x], Shadow(batch * text, x.columns)) if prompt else x  # without the virtual tokens
    x = tape.norm(seen, body.ln_f, stored=x)
    return tape, tape.linear(x, body.wte.weight, len(body.wte.weight))


def embed(tape: Tape, text: int, table: Tensor) -> Shadow:
    """The rows of the table. Its gradient is the head's, counted there; another one is made here, and their sum."""
    x = Shadow(tape.batch * text, table.shape[1], table.element_size(), grad=table.requires_grad)
    if x.grad:
        tape.steps.append(Step(tape.where, [], x, [], scratch=2 * table.nbytes))
    return x


def record_loss(tape: Tape, logits: Shadow) -> None:
    """`next_token_loss`, step by step, where every token but the first of a text is a label that counts."""
    tape.where = "loss"
    rows, V = logits.rows - tape.batch, logits.columns
    shifted = tape.add([logits], Shadow(rows, V, logits.width))
    chosen = tape.add([shifted], Shadow(rows, V, logits.width), [Shadow(rows, 1, 1)])
    log_probabilities = tape.bends(tape.cast(chosen, FP32))
    tape.add([log_probabilities], Shadow(1, 1), [Shadow(rows, 1, 8)])
