"""Unit 06, the prefix of all layers and what makes it: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.prefix_tuning import PrefixEncoder, prefix_parameter_count, seeded_linear, split_prefix

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
    "You take all keys first and all values behind them. In a row, each layer's K is followed by the same layer's V.",
)
def keys_first(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    keys, values = prefix.unflatten(1, (2, n_layer, n_head, -1)).permute(1, 2, 3, 0, 4)
    return [(k[None], v[None]) for k, v in zip(keys, values, strict=True)]


@wrong("split_prefix", "Keys and values are exchanged: K comes first.")
def values_first(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    return [(v, k) for k, v in split_prefix(prefix, n_layer, n_head)]


@wrong(
    "split_prefix",
    "The shapes are right and the numbers are mixed up: `view` and `reshape` never move an axis, they cut the numbers "
    "in the order in which they lie. Which operation moves one?",
)
def viewed_into_shape(prefix: Tensor, n_layer: int, n_head: int) -> Layers:
    parts = prefix.reshape(2 * n_layer, 1, n_head, len(prefix), -1)
    return [(parts[2 * layer], parts[2 * layer + 1]) for layer in range(n_layer)]


@wrong(
    "split_prefix",
    "You cut each key and value so that a head has every H-th column. A head's columns stand side by side.",
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


@wrong("split_prefix", "Tokens and heads are exchanged: the heads' axis stands in front of the tokens'.")
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


@wrong("prefix_parameter_count", "You count the keys or the values, and every layer has both.")
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
    "With an MLP you count the prefix that it makes, too. That is computed from the MLP and not trained.",
)
def made_and_maker(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    whole = prefix_parameter_count(n_layer, n_embd, length, hidden)
    return whole if hidden is None else whole + length * 2 * n_layer * n_embd


@wrong(
    "prefix_parameter_count",
    "You count the prefix alone, whatever makes it. That is what is kept; asked for is what is trained.",
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


# --- PrefixEncoder -----------------------------------------------------------------------------------


class Encoder(PrefixEncoder):
    """As the library's, with a start and a forward that can be exchanged one by one."""

    scale = 1.0

    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.length, self.base_config = length, None
        self.n_layer, self.n_head = config.n_layer, config.n_head
        d, out = config.n_embd, 2 * config.n_layer * config.n_embd
        width = out if hidden is None else d
        self.embedding = nn.Parameter(self.scale * torch.randn(length, width, generator=generator))
        self.transform = nn.Identity() if hidden is None else self.mlp(d, hidden, out, generator)

    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return nn.Sequential(seeded_linear(d, hidden, generator), nn.Tanh(), seeded_linear(hidden, out, generator))


@right("PrefixEncoder")
class drawn_in_another_order(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        last = seeded_linear(hidden, out, generator)
        return nn.Sequential(seeded_linear(d, hidden, generator), nn.Tanh(), last)


@right("PrefixEncoder")
class written_out(Encoder):
    def prefix(self) -> Tensor:
        if isinstance(self.transform, nn.Identity):
            return self.embedding
        down, up = self.transform[0], self.transform[2]
        hidden = (self.embedding @ down.weight.T + down.bias).tanh()
        return hidden @ up.weight.T + up.bias


@wrong(
    "PrefixEncoder",
    "Nothing bends between your two linear layers. Two linear maps behind each other are one.",
)
class nothing_bends(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return nn.Sequential(seeded_linear(d, hidden, generator), nn.Identity(), seeded_linear(hidden, out, generator))


@wrong("PrefixEncoder", "Yours bends with a relu. The prefix's MLP has a tanh.")
class bends_with_a_relu(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return nn.Sequential(seeded_linear(d, hidden, generator), nn.ReLU(), seeded_linear(hidden, out, generator))


@wrong(
    "PrefixEncoder",
    "Your tanh comes last, so that no key and no value can ever be larger than 1. It belongs between the two layers.",
)
class bends_at_the_end(Encoder):
    def prefix(self) -> Tensor:
        if isinstance(self.transform, nn.Identity):
            return self.embedding
        return torch.tanh(self.transform[2](self.transform[0](self.embedding)))


@wrong(
    "PrefixEncoder",
    "`prefix` returns the right numbers outside of the graph: no gradient reaches what it is made of, and nothing "
    "learns.",
)
class out_of_the_graph(Encoder):
    def prefix(self) -> Tensor:
        return super().prefix().detach()


@wrong(
    "PrefixEncoder",
    "`prefix` returns the embedding as it is, also where there is an MLP. It has to go through `transform`.",
)
class past_the_mlp(Encoder):
    def prefix(self) -> Tensor:
        return self.embedding


@wrong(
    "PrefixEncoder",
    "`prefix` goes through the MLP only once, in `__init__`: what you return later is the first prefix, whatever was "
    "learned since.",
)
class made_once(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        self.made = self.transform(self.embedding).clone()

    def prefix(self) -> Tensor:
        return self.made


@wrong(
    "PrefixEncoder",
    "Your embedding starts at the scale of GPT-2's embeddings, 0.02. Here it starts as N(0, 1).",
)
class small_embeddings(Encoder):
    scale = 0.02


@wrong(
    "PrefixEncoder",
    "The layers of your MLP do not start as `seeded_linear` makes them: they spread too widely or too narrowly.",
)
class normal_layers(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        made = super().mlp(d, hidden, out, generator)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        return made


@wrong(
    "PrefixEncoder",
    "You draw from PyTorch's own generator and not from the one that is given: the same seed gives another start each "
    "time, and nobody can repeat a run.",
)
class forgets_the_generator(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, None)


@wrong(
    "PrefixEncoder",
    "The generator is used for the embedding and forgotten for the MLP: a part of the start is another one each time.",
)
class forgets_it_for_the_mlp(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return super().mlp(d, hidden, out, None)


@wrong(
    "PrefixEncoder",
    "Your embedding starts at zero. Then all of its rows get the same gradient and stay the same: P virtual tokens "
    "that are one. And the same seed should give numbers that another seed does not.",
)
class embeddings_of_zero(Encoder):
    scale = 0.0


# --- fold_prefix -------------------------------------------------------------------------------------


@right("fold_prefix")
@torch.no_grad()
def without_a_graph(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix() + 0


@right("fold_prefix")
def through_numpy(encoder: PrefixEncoder) -> Tensor:
    return torch.tensor(encoder.transform(encoder.embedding).detach().numpy())


@wrong(
    "fold_prefix",
    "What you return hangs on the graph of the encoder: the MLP is not thrown away, it is still behind every number.",
)
def still_in_the_graph(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix() * 1


@wrong(
    "fold_prefix",
    "Without an MLP you return the encoder's own memory: when the encoder learns on, your folded prefix changes with "
    "it. `detach` copies nothing.",
)
def shares_the_memory(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix().detach()


@wrong(
    "fold_prefix",
    "You return the embedding. What the layers see is what the MLP makes of it.",
)
def the_embedding(encoder: PrefixEncoder) -> Tensor:
    return encoder.embedding.detach().clone()


@wrong(
    "fold_prefix",
    "You copy the encoder, MLP and all, and fold nothing: asked for is one tensor, (P, 2 L d).",
)
def a_copy_of_the_encoder(encoder: PrefixEncoder) -> PrefixEncoder:
    return copy.deepcopy(encoder)


@wrong(
    "fold_prefix",
    "You take the MLP out of the encoder itself. It should stay as it is: perhaps somebody wants to train on.",
)
def takes_the_mlp_out(encoder: PrefixEncoder) -> Tensor:
    folded = encoder.prefix().detach().clone()
    encoder.embedding = nn.Parameter(folded.clone())
    encoder.transform = nn.Identity()
    return folded


@wrong(
    "fold_prefix",
    "Folding freezes your encoder: afterwards it cannot be trained on.",
)
def freezes_the_encoder(encoder: PrefixEncoder) -> Tensor:
    folded = encoder.prefix().detach().clone()
    encoder.requires_grad_(False)
    return folded


@wrong("fold_prefix", "You return the prefix cut into layers. Asked for is the whole, (P, 2 L d).")
def cut_into_layers(encoder: PrefixEncoder) -> Layers:
    whole = encoder.prefix().detach().clone()
    return split_prefix(whole, encoder.n_layer, encoder.n_head)


@wrong("fold_prefix", "Your prefix is divided by sqrt(P). Nothing is averaged or scaled when it is folded.")
def scaled_down(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix().detach().clone() / math.sqrt(encoder.length)
