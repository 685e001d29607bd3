"""The forward pass of each module of a GPT-2, recorded on a `Tape` of tensor sizes.

There is one short function for each kind of module, in the order of the data flow, with the same operations in the same
order as in the module's own `forward`. Only what the backward pass needs is counted; see `support/tape.py` for the
rules. Each method's file registers a function for each module that the method inserts into the model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2, MLP, Attention, Block, Conv1D
from lora_from_scratch.support.tape import FP32, Step, Tape, TensorSize

# --- The modules, in the order of the data flow --------------------------------------------------------


@singledispatch
def forward(module: nn.Module, x: TensorSize, tape: Tape) -> TensorSize:
    """Record `module(x)` on the tape.

    Raises:
        ValueError: no function is registered for this kind of module.
    """
    raise ValueError(
        f"the memory use of {type(module).__name__} is unknown; register a function with activations.forward.register"
    )


@forward.register
def _(module: Conv1D, x: TensorSize, tape: Tape) -> TensorSize:
    return tape.linear(x, module.weight, module.out_features, module.bias)


@forward.register
def _(module: nn.Linear, x: TensorSize, tape: Tape) -> TensorSize:
    return tape.linear(x, module.weight, module.out_features, module.bias)


@forward.register
def _(module: Attention, x: TensorSize, tape: Tape) -> TensorSize:
    qkv = forward(module.c_attn, x, tape)
    y = attention(module, qkv, tape)
    return tape.dropout(forward(module.c_proj, y, tape), module.resid_dropout.p)


def attention(module: Attention, qkv: TensorSize, tape: Tape) -> TensorSize:
    """(rows, 3 d) to (rows, d)."""
    d, w, heads = qkv.columns // 3, qkv.width, tape.rows * module.n_head
    split = tape.like(qkv)  # views, but their gradients are concatenated into a new tensor
    sources = [split]
    if tape.prefix is not None:  # [prefix; k] and [prefix; v], new tensors
        sources.append(tape.add([split, tape.prefix], TensorSize(tape.batch * tape.keys, 2 * d, w)))
    grad = any(x.grad for x in sources)
    dropout = module.attn_pdrop if tape.training and not tape.cuda else 0.0
    output = TensorSize(tape.rows, d, w)
    if dropout or (grad and w == 2 and not tape.padded and not tape.cuda):
        return written_out_attention(qkv, sources, output, heads, dropout, tape)
    kept = [qkv, *sources[1:], output, TensorSize(heads, 1)]
    if tape.padded or tape.prefix:  # the mask, converted to numbers that are added to the scores
        kept.append(TensorSize(tape.batch if tape.padded else 1, tape.tokens * tape.keys, w))
    return tape.add(sources, output, kept)


def contiguous(x: TensorSize, tape: Tape, rows: int, columns: int) -> TensorSize:
    """What a batched matrix product keeps of heads split off x: a contiguous copy, or x itself for a single text."""
    return x if tape.batch == 1 else TensorSize(rows, columns, x.width)


def written_out_attention(
    qkv: TensorSize, sources: list[TensorSize], output: TensorSize, heads: int, dropout: float, tape: Tape
) -> TensorSize:
    """softmax(q k^T) v with its (T, S) matrices; `heads` is B T H, their number of rows."""
    w = FP32 if dropout else output.width  # with dropout PyTorch computes this in 32 bits
    d, keys = output.columns, tape.batch * tape.keys
    q, k, v = (
        TensorSize(tape.rows, d, w),
        TensorSize(keys, d, w),
        TensorSize(keys, d, w),
    )  # q is scaled, so always a new tensor
    if w == qkv.width and tape.prefix is None:
        v = contiguous(qkv, tape, keys, d)
        k = k if dropout else contiguous(qkv, tape, keys, d)
    scores = tape.add(sources, TensorSize(heads, tape.keys, w), [q, k])
    weights = tape.nonlinearity(tape.sum(scores, TensorSize(heads, tape.keys, w)))  # the sum with the mask
    if dropout:
        weights = tape.dropout(weights, dropout, noise_width=w)
    return tape.add([weights, *sources], output, [weights, v])


@forward.register
def _(module: MLP, x: TensorSize, tape: Tape) -> TensorSize:
    hidden = forward(module.c_fc, x, tape)
    return tape.dropout(forward(module.c_proj, tape.like(hidden, [hidden]), tape), module.resid_dropout.p)  # gelu


@forward.register
def _(module: Block, x: TensorSize, tape: Tape) -> TensorSize:
    x = tape.sum(x, forward(module.attn, tape.norm(x, module.ln_1), tape))
    return tape.sum(x, forward(module.mlp, tape.norm(x, module.ln_2), tape))


# --- The whole model -----------------------------------------------------------------------------------


def record(
    model: GPT2, batch: int, text: int, *, autocast: bool, padded: bool, checkpointing: bool, cuda: bool
) -> tuple[Tape, TensorSize]:
    """Record `model(input_ids)` in training for (batch, text) token ids; return the tape and the logits."""
    body, virtual = model.transformer, model.virtual_tokens
    tape = Tape(batch, text, autocast, padded, cuda, where="embeddings")
    x = embed(tape, text, body.wte.weight)
    if virtual is not None:
        x = forward(virtual, x, tape)
    prompt = tape.tokens - text  # number of virtual tokens that pass through the blocks
    places = tape.add([], TensorSize(tape.tokens, x.columns), [TensorSize(tape.tokens, 1, 8)], [body.wpe.weight])
    x = tape.dropout(tape.sum(x, places), body.drop.p)
    shared = [tape.prefix] if tape.prefix else []  # the inputs of every block besides x
    if padded:
        shared.append(TensorSize(batch, tape.tokens * tape.keys, 1))  # the boolean mask
    for layer, block in enumerate(body.h):
        tape.where = f"block {layer}"
        if checkpointing:
            inner = replace(tape, steps=[], kept={}, forward_peak=0)
            output = forward(block, x, inner)
            x = tape.checkpoint(x, shared, inner, output)
        else:
            x = forward(block, x, tape)
    tape.where = "head"
    seen = tape.add([x], TensorSize(batch * text, x.columns)) if prompt else x  # without the virtual tokens
    x = tape.norm(seen, body.ln_f, stored=x)
    return tape, tape.linear(x, body.wte.weight, len(body.wte.weight))


def embed(tape: Tape, text: int, table: Tensor) -> TensorSize:
    """The rows of the table. Its gradient is counted at the output head; here a second one and their sum are made."""
    x = TensorSize(tape.batch * text, table.shape[1], table.element_size(), grad=table.requires_grad)
    if x.grad:
        tape.steps.append(Step(tape.where, [], x, [], scratch=2 * table.nbytes))
    return x


def record_loss(tape: Tape, logits: TensorSize) -> None:
    """Record `next_token_loss` step by step, where every token except the first of a text has a label."""
    tape.where = "loss"
    rows, V = logits.rows - tape.batch, logits.columns
    shifted = tape.add([logits], TensorSize(rows, V, logits.width))
    chosen = tape.add([shifted], TensorSize(rows, V, logits.width), [TensorSize(rows, 1, 1)])
    log_probabilities = tape.nonlinearity(tape.cast(chosen, FP32))
    tape.add([log_probabilities], TensorSize(1, 1), [TensorSize(rows, 1, 8)])
