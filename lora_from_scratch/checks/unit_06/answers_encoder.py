"""Unit 06, the encoder of a prefix: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.prefix_tuning import PrefixEncoder, seeded_linear, split_prefix

Layers = list[tuple[Tensor, Tensor]]

# --- PrefixEncoder -----------------------------------------------------------------------------------


class Encoder(PrefixEncoder):
    """Like the library's encoder, with an initialisation and a forward pass that can be replaced separately."""

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
    "There is no nonlinearity between your two linear layers. Two linear maps in a row are a single linear map.",
)
class nothing_bends(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return nn.Sequential(seeded_linear(d, hidden, generator), nn.Identity(), seeded_linear(hidden, out, generator))


@wrong("PrefixEncoder", "You use a ReLU. The MLP of the prefix has a tanh.")
class bends_with_a_relu(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return nn.Sequential(seeded_linear(d, hidden, generator), nn.ReLU(), seeded_linear(hidden, out, generator))


@wrong(
    "PrefixEncoder",
    "Your tanh comes last, so no key and no value can ever be larger than 1. It belongs between the two layers.",
)
class bends_at_the_end(Encoder):
    def prefix(self) -> Tensor:
        if isinstance(self.transform, nn.Identity):
            return self.embedding
        return torch.tanh(self.transform[2](self.transform[0](self.embedding)))


@wrong(
    "PrefixEncoder",
    "`prefix` returns the right numbers, but detached from the graph: no gradient reaches the parameters, so nothing "
    "is trained.",
)
class out_of_the_graph(Encoder):
    def prefix(self) -> Tensor:
        return super().prefix().detach()


@wrong(
    "PrefixEncoder",
    "`prefix` returns the embedding itself, even if there is an MLP. It has to go through `transform`.",
)
class past_the_mlp(Encoder):
    def prefix(self) -> Tensor:
        return self.embedding


@wrong(
    "PrefixEncoder",
    "You run the MLP only once, in `__init__`: later `prefix` still returns the initial prefix, whatever has been "
    "trained since.",
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
    "The layers of your MLP are not initialised as by `seeded_linear`: their standard deviation is too large or too "
    "small.",
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
    "You draw from PyTorch's global generator instead of the one that is passed in: the same seed gives a different "
    "initialisation each time, so runs cannot be reproduced.",
)
class forgets_the_generator(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, None)


@wrong(
    "PrefixEncoder",
    "You use the generator for the embedding but not for the MLP: part of the initialisation differs each time.",
)
class forgets_it_for_the_mlp(Encoder):
    def mlp(self, d: int, hidden: int, out: int, generator: torch.Generator | None) -> nn.Module:
        return super().mlp(d, hidden, out, None)


@wrong(
    "PrefixEncoder",
    "Your embedding starts at zero. Then all of its rows get the same gradient and stay equal, so the P virtual "
    "tokens remain identical. Also, different seeds should give different numbers.",
)
class embeddings_of_zero(Encoder):
    scale = 0.0


@right("PrefixEncoder")
class drawn_into_empty_tensors(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        self.embedding = nn.Parameter(torch.empty_like(self.embedding).normal_(generator=generator))

    def prefix(self) -> Tensor:
        return self.transform(self.embedding)


@right("PrefixEncoder")
class row_by_row(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        rows = [torch.randn(self.embedding.shape[1], generator=generator) for _ in range(length)]
        self.embedding = nn.Parameter(torch.stack(rows))

    def prefix(self) -> Tensor:
        return torch.stack([self.transform(row) for row in self.embedding])


@wrong(
    "PrefixEncoder",
    "You go back to the generator's seed instead of drawing on: everything that is made with one generator gets the "
    "same numbers.",
)
class goes_back_to_the_seed(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        if generator is not None:
            generator = torch.Generator().manual_seed(generator.initial_seed())
        super().__init__(config, length, hidden, generator)


@wrong(
    "PrefixEncoder",
    "All rows of your embedding start with the same numbers. Then they get gradients alike, and P virtual tokens do no "
    "more than one.",
)
class one_row_for_all(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        row = torch.randn(self.embedding.shape[1], generator=generator)
        self.embedding = nn.Parameter(row.repeat(length, 1))


@wrong(
    "PrefixEncoder",
    "Without a generator yours starts with the same numbers every time: None means PyTorch's own generator, whose seed "
    "the caller sets.",
)
class a_seed_of_its_own(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator or torch.Generator().manual_seed(0))


@wrong("PrefixEncoder", "Your embedding is uniform. It starts as N(0, 1), with negative numbers.")
class uniform_embeddings(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        self.embedding = nn.Parameter(torch.rand(self.embedding.shape, generator=generator))


@wrong("PrefixEncoder", "Your embedding is a plain tensor. Only an `nn.Parameter` is found and trained.")
class no_parameter(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        made = self.embedding.detach()
        del self.embedding
        self.embedding = made


@wrong("PrefixEncoder", caught_by="raises")
class without_the_numbers_of_layers_and_heads(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        del self.n_layer, self.n_head


@wrong(
    "PrefixEncoder",
    "With an MLP your embedding is as long as a row of the prefix. There the MLP makes the rows, and an embedding has "
    "only d numbers.",
)
class long_embeddings_before_the_mlp(Encoder):
    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, length, hidden, generator)
        if hidden is not None:
            d, out = config.n_embd, 2 * config.n_layer * config.n_embd
            self.embedding = nn.Parameter(torch.randn(length, out, generator=generator))
            self.transform = self.mlp(out, hidden, out, generator)


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
    "What you return is still attached to the graph of the encoder: that keeps the MLP alive instead of discarding it.",
)
def still_in_the_graph(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix() * 1


@wrong(
    "fold_prefix",
    "Without an MLP you return the encoder's own memory: when the encoder is trained further, your folded prefix "
    "changes with it. `detach` does not copy.",
)
def shares_the_memory(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix().detach()


@wrong(
    "fold_prefix",
    "You return the embedding. What the layers use is the output of the MLP.",
)
def the_embedding(encoder: PrefixEncoder) -> Tensor:
    return encoder.embedding.detach().clone()


@wrong(
    "fold_prefix",
    "You return a copy of the encoder, including the MLP: return a single tensor, (P, 2 L d).",
)
def a_copy_of_the_encoder(encoder: PrefixEncoder) -> PrefixEncoder:
    return copy.deepcopy(encoder)


@wrong(
    "fold_prefix",
    "You remove the MLP from the encoder itself. The encoder should stay as it is, so that training can continue.",
)
def takes_the_mlp_out(encoder: PrefixEncoder) -> Tensor:
    folded = encoder.prefix().detach().clone()
    encoder.embedding = nn.Parameter(folded.clone())
    encoder.transform = nn.Identity()
    return folded


@wrong(
    "fold_prefix",
    "You freeze the encoder when folding: afterwards it cannot be trained any further.",
)
def freezes_the_encoder(encoder: PrefixEncoder) -> Tensor:
    folded = encoder.prefix().detach().clone()
    encoder.requires_grad_(False)
    return folded


@wrong("fold_prefix", "You return the prefix split into layers. Return it as one tensor, (P, 2 L d).")
def cut_into_layers(encoder: PrefixEncoder) -> Layers:
    whole = encoder.prefix().detach().clone()
    return split_prefix(whole, encoder.n_layer, encoder.n_head)


@wrong("fold_prefix", "You divide the prefix by sqrt(P). Folding neither averages nor scales anything.")
def scaled_down(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix().detach().clone() / math.sqrt(encoder.length)


@right("fold_prefix")
def by_the_data(encoder: PrefixEncoder) -> Tensor:
    return torch.empty_like(encoder.prefix()).copy_(encoder.prefix().data).data


@right("fold_prefix")
def as_a_new_tensor_row_by_row(encoder: PrefixEncoder) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.stack([encoder.transform(row) for row in encoder.embedding])


@wrong("fold_prefix", caught_by="dtype")
def in_float32(encoder: PrefixEncoder) -> Tensor:
    return torch.tensor(encoder.prefix().detach().tolist())


@wrong(
    "fold_prefix",
    "Folding deletes the encoder's gradients. It only reads the encoder, which may be in the middle of a training run.",
)
def forgets_the_gradients(encoder: PrefixEncoder) -> Tensor:
    encoder.zero_grad()
    return encoder.prefix().detach().clone()


@wrong(
    "fold_prefix",
    "You return the mean over the virtual tokens. All P rows are needed.",
)
def averaged_over_the_tokens(encoder: PrefixEncoder) -> Tensor:
    return encoder.prefix().detach().mean(dim=0)


@wrong(
    "fold_prefix",
    "You switch the encoder to evaluation mode and leave it there. Folding does not change it, and it can be trained "
    "further.",
)
def stays_in_evaluation_mode(encoder: PrefixEncoder) -> Tensor:
    encoder.eval()
    return encoder.prefix().detach().clone()


@wrong(
    "PrefixEncoder",
    "You compute the prefix once and keep it. When training changes the parameters, the prefix has to change, too.",
)
class kept_from_the_first_call(Encoder):
    def prefix(self) -> Tensor:
        if not hasattr(self, "made"):
            self.made = super().prefix()
        return self.made
