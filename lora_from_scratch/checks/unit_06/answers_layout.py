"""Unit 06, the prefix in one matrix, and its size: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.prefix_tuning import prefix_parameter_count, split_prefix

Layers = list[tuple[Tensor, Tensor]]

# --- split_prefix ------------------------------------------------------------------------------------


@right("split_prefix")
def by_slices(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    d = prefix.shape[1] // (2 * n_layer)
    width = d // n_head
    layers = []
    for layer in range(n_layer):
        pair = []
        for kind in range(2):
            start = (2 * layer + kind) * d
            heads = [prefix[:, start + h * width : start + (h + 1) * width] for h in range(n_head)]
            pair.append(torch.stack(heads)[None])
        layers.append(tuple(pair))
    return layers


@right("split_prefix")
def by_chunks(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    parts = [part.unflatten(1, (n_head, -1)).transpose(0, 1).unsqueeze(0) for part in prefix.chunk(2 * n_layer, dim=1)]
    return list(zip(parts[::2], parts[1::2], strict=True))


@wrong(
    "split_prefix",
    "You assume all keys first and then all values. In a row, each layer's K is followed by the same layer's V.",
)
def keys_first(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    keys, values = prefix.unflatten(1, (2, n_layer, n_head, -1)).permute(1, 2, 3, 0, 4)
    return [(k[None], v[None]) for k, v in zip(keys, values, strict=True)]


@wrong("split_prefix", "You have swapped keys and values: K comes first.")
def values_first(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [(v, k) for k, v in split_prefix(prefix, n_layer, n_head)]


@wrong(
    "split_prefix",
    "The shapes are right but the numbers are mixed up: `view` and `reshape` never move an axis, they split the "
    "numbers in their existing order. Which operation moves an axis?",
)
def viewed_into_shape(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    parts = prefix.reshape(2 * n_layer, 1, n_head, len(prefix), -1)
    return [(parts[2 * layer], parts[2 * layer + 1]) for layer in range(n_layer)]


@wrong(
    "split_prefix",
    "You split each key and value so that a head gets every H-th column. The columns of a head are adjacent.",
)
def every_hth_column(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    parts = prefix.unflatten(1, (2 * n_layer, -1, n_head)).permute(1, 3, 0, 2)
    return [(parts[2 * layer][None], parts[2 * layer + 1][None]) for layer in range(n_layer)]


@wrong(
    "split_prefix",
    "The axis of the batch is missing: each tensor is (1, H, P, hd), so that it expands to a batch of any size.",
)
def without_a_batch(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [(k[0], v[0]) for k, v in split_prefix(prefix, n_layer, n_head)]


@wrong("split_prefix", "You have swapped tokens and heads: the axis of the heads comes before that of the tokens.")
def tokens_before_heads(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in split_prefix(prefix, n_layer, n_head)]


@wrong("split_prefix", "Your layers come in the wrong order: the first columns belong to layer 0.")
def last_layer_first(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return split_prefix(prefix, n_layer, n_head)[::-1]


@wrong("split_prefix", "Every layer gets the keys and values of layer 0. Each has its own.")
def one_pair_for_all(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [split_prefix(prefix, n_layer, n_head)[0]] * n_layer


# --- prefix_parameter_count --------------------------------------------------------------------------


@right("prefix_parameter_count")
def from_a_list_of_shapes(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    out = n_layer * n_embd + n_layer * n_embd
    shapes = [(length, out)]
    if hidden is not None:
        shapes = [(length, n_embd), (hidden, n_embd), (hidden,), (out, hidden), (out,)]
    return sum(math.prod(shape) for shape in shapes)


@right("prefix_parameter_count")
def layer_by_layer(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    total = 0 if hidden is None else length * n_embd + n_embd * hidden + hidden
    for _ in range(n_layer):
        for _ in ("K", "V"):
            total += length * n_embd if hidden is None else hidden * n_embd + n_embd
    return total


@wrong("prefix_parameter_count", "You count either the keys or the values, but every layer has both.")
def keys_alone(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    width = n_layer * n_embd
    return length * width if hidden is None else length * n_embd + hidden * (n_embd + 1) + width * (hidden + 1)


@wrong("prefix_parameter_count", "You count one layer's keys and values. Every layer has its own.")
def a_single_layer(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    return prefix_parameter_count(1, n_embd, length, hidden)


@wrong("prefix_parameter_count", "The biases of the two linear layers are missing. They are trained as well.")
def no_biases_of_the_mlp(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    if hidden is None:
        return length * 2 * n_layer * n_embd
    return length * n_embd + n_embd * hidden + hidden * 2 * n_layer * n_embd


@wrong("prefix_parameter_count", "The P embeddings that go into the MLP are missing. They are trained as well.")
def no_embeddings(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    whole = prefix_parameter_count(n_layer, n_embd, length, hidden)
    return whole if hidden is None else whole - length * n_embd


@wrong(
    "prefix_parameter_count",
    "With an MLP you also count the prefix itself. That is computed by the MLP and not trained.",
)
def made_and_maker(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    whole = prefix_parameter_count(n_layer, n_embd, length, hidden)
    return whole if hidden is None else whole + length * 2 * n_layer * n_embd


@wrong(
    "prefix_parameter_count",
    "You count only the prefix, with or without an MLP. That is what is kept; count what is trained.",
)
def what_is_kept(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    return length * 2 * n_layer * n_embd


@wrong(
    "prefix_parameter_count",
    "You count an MLP for each virtual token. There is one, and all P embeddings go through it.",
)
def an_mlp_for_each_token(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    whole = prefix_parameter_count(n_layer, n_embd, 1, hidden)
    return length * whole


@right("split_prefix")
def with_einsum_and_stored_axes(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    parts = torch.einsum("plkhd->lkhpd", prefix.reshape(len(prefix), n_layer, 2, n_head, -1))
    return [(kv[0:1], kv[1:2]) for kv in parts]


@right("split_prefix")
def by_columns_of_an_index(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    width = prefix.shape[1] // (2 * n_layer * n_head)
    columns = torch.arange(prefix.shape[1]).view(2 * n_layer, n_head, 1, width)
    rows = torch.arange(len(prefix)).view(1, 1, -1, 1)
    parts = prefix[rows, columns]
    return [(parts[i : i + 1], parts[i + 1 : i + 2]) for i in range(0, 2 * n_layer, 2)]


@wrong(
    "split_prefix",
    "The numbers are right, but detached from the prefix: no gradient reaches it, so nothing would be trained.",
)
def out_of_the_graph(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return split_prefix(prefix.detach(), n_layer, n_head)


@wrong(
    "split_prefix",
    "Only the keys are connected to the prefix: the gradient does not reach the columns of the values.",
)
def values_out_of_the_graph(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [(k, v.detach()) for k, v in split_prefix(prefix, n_layer, n_head)]


@wrong("split_prefix", caught_by="dtype")
def always_float32(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return split_prefix(prefix.float(), n_layer, n_head)


@wrong(
    "split_prefix",
    "Each tensor you return has a batch axis of size P, with one virtual token in each row: the tokens belong to one "
    "text, and have an axis of their own.",
)
def tokens_as_a_batch(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [(k.permute(2, 1, 0, 3), v.permute(2, 1, 0, 3)) for k, v in split_prefix(prefix, n_layer, n_head)]


@right("prefix_parameter_count")
def counted_on_an_encoder(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    with torch.device("meta"):
        config = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=1)
        out = 2 * config.n_layer * config.n_embd
        if hidden is None:
            return torch.empty(length, out).numel()
        layers = [nn.Embedding(length, n_embd), nn.Linear(n_embd, hidden), nn.Linear(hidden, out)]
    return sum(p.numel() for layer in layers for p in layer.parameters())


@right("prefix_parameter_count")
def as_matrices_with_a_row_for_the_bias(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    def linear(n_in: int, n_out: int) -> int:
        return (n_in + 1) * n_out

    if hidden is None:
        return sum(2 * length * n_embd for _ in range(n_layer))
    return length * n_embd + linear(n_embd, hidden) + linear(hidden, 2 * n_layer * n_embd)


@wrong("prefix_parameter_count", "One of the two biases is missing: each of the two linear layers has one.")
@changed(prefix_parameter_count, ("hidden * (n_embd + 1)", "hidden * n_embd"))
def no_bias_in_the_first_layer(): ...


@wrong("prefix_parameter_count", "The bias of the last linear layer is missing: it is as long as a row of the prefix.")
@changed(prefix_parameter_count, ("width * (hidden + 1)", "width * hidden"))
def no_bias_in_the_last_layer(): ...


@wrong(
    "prefix_parameter_count",
    "The embeddings that go into the MLP have d numbers each. Yours are as long as a row of the prefix.",
)
@changed(prefix_parameter_count, ("return length * n_embd + ", "return length * width + "))
def long_embeddings(): ...


@wrong(
    "prefix_parameter_count",
    "The first linear layer of your MLP is missing: with it the MLP goes from d to m, and only then to a row.",
)
@changed(prefix_parameter_count, (" + hidden * (n_embd + 1)", ""))
def one_linear_layer(): ...


@wrong(
    "prefix_parameter_count",
    "The second linear layer of your MLP is missing: it makes a whole row of the prefix from m numbers.",
)
@changed(prefix_parameter_count, (" + width * (hidden + 1)", ""))
def the_first_linear_layer_only(): ...


@wrong(
    "prefix_parameter_count",
    "You count one virtual token, whatever the length. Without an MLP, each of the P has its own numbers.",
)
@changed(prefix_parameter_count, ("return length * width", "return width"))
def a_single_token(): ...


@wrong("prefix_parameter_count", "You count an MLP even if `hidden` is None. Then the prefix itself is trained.")
def an_mlp_in_any_case(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    return prefix_parameter_count(n_layer, n_embd, length, hidden or n_embd)
