"""Generation: a GPT-2 continues a text, one token after the other.

Shapes: B texts, T tokens, V = `vocab_size`. The functions above `generate` are what one step does with
one row of logits; `generate` runs them on a batch, with a cache of keys and values.

A model here is anything that is called `model(input_ids, attention_mask=..., cache=...)` and returns logits
(B, T, V) for the T tokens of `input_ids`. The mask covers all tokens that were passed since the cache was
empty, and nothing else: a method that puts entries of its own into the cache extends the mask itself. Between two
calls the rows of the batch (and of the cache, by `KVCache.reorder`) may be left out, repeated and moved.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import KVCache

# --- One step, on the logits of one position ---------------------------------------------------------


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits and set the others to minus infinity (Fan et al. 2018).

    Args:
        logits: (..., V).
        k: at least 1; more than V keeps everything. Logits equal to the k-th largest all stay.

    Returns:
        (..., V), a new tensor.
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to at least p (Holtzman et al. 2020, eq. 2).

    In the order of falling probability, a token stays if the tokens before it sum to less than p: the
    token that crosses p is kept, and so is always at least one.

    Args:
        logits: (..., V).
        p: above 0 and at most 1; 1 keeps everything.

    Returns:
        (..., V), a new tensor: the logits where they were, minus infinity where a token is dropped.

    Raises:
        ValueError: p is not above 0 and at most 1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
    if p == 1:
        return logits.clone()
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)  # both (..., V)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, token, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def sample_next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw a token from `softmax(logits / temperature)`, after the filters (first k, then p).

    Args:
        logits: (V,).
        temperature: 0 takes the most likely token (the filters change nothing then); below 1 makes likely tokens
            likelier, above 1 less likely.
        top_k: see `filter_top_k`; None: no filter.
        top_p: see `filter_top_p`; None: no filter. The probabilities are those after temperature and top-k.
        generator: the source of the randomness, on the CPU: the same state gives the same token. None: PyTorch's own.

    Returns:
        The token's id, 0 to V - 1.

    Raises:
        ValueError: the temperature is below 0, or a filter refuses its argument.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    logits = (logits - logits.max()) / temperature  # the largest is 0, so that no temperature overflows
    if top_k is not None:
        logits = filter_top_k(logits, top_k)
    if top_p is not None:
        logits = filter_top_p(logits, top_p)
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def repeated_ngram_tokens(tokens: Sequence[int], size: int) -> list[int]:
    """The tokens that would complete, as the next token, an n-gram that `tokens` already holds.

    Args:
        tokens: the text so far, the prompt included.
        size: n, the length of the n-gram; 0 forbids nothing.
    """
    if size == 0 or len(tokens) < size:
        return []
    tokens = list(tokens)
    last = tokens[len(tokens) - size + 1 :]  # the n - 1 tokens that the next one would complete
    starts = range(len(tokens) - size + 1)
    return [tokens[start + size - 1] for start in starts if tokens[start : start + size - 1] == last]


# --- The whole text --------------------------------------------------------------------------------


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_id: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt; a prompt is continued in the same way alone and in any batch.

    With temperature 0 the most likely token is taken each time (greedy), or, with `num_beams` above 1, a beam
    search looks for the most likely text. With a temperature above 0 tokens are drawn; each prompt has its
    own randomness, made from `seed`, its tokens, and how many times the same prompt stands before it in the
    batch, so that a prompt given n times is continued in n ways.

    The numbers are those of `transformers.generate`, but for the randomness and for padding, which does not count
    as text for `no_repeat_ngram_size` here.

    Args:
        model: see the head of this file; it is put into eval mode meanwhile.
        prompts: B lists of token ids, of any lengths, none empty.
        max_new_tokens: where to stop at the latest.
        temperature, top_k, top_p: see `sample_next_token`; the filters need a temperature above 0.
        num_beams: how many texts a beam search keeps; 1 is no beam search.
        length_penalty: a finished beam's score is its log-probability / (its new tokens, end included) ** this:
            above 0 favours long texts. Only for beam search.
        no_repeat_ngram_size: no n-gram of this length occurs twice, prompt included; 0: any may.
        eos_id: the token that ends a text; None: only the length does.
        seed: of the sampling.
        use_cache: False reads the whole text again at each step: the same result, slower.

    Returns:
        B lists of the new tokens alone, without the `eos_id` at the end. A text ends early where
        `no_repeat_ngram_size` leaves no token to take.

    Raises:
        ValueError: an argument is out of its range, the longest prompt and `max_new_tokens` together are longer
            than the context, or the model's logits are not numbers.
    """
    _check_sampling(max_new_tokens, temperature, top_k, top_p, num_beams, no_repeat_ngram_size)
    _check_prompts(model, prompts, max_new_tokens)
    if not prompts:
        return []
    with torch.no_grad(), _eval_mode(model):
        texts = _Texts(model, prompts, use_cache)
        if num_beams > 1:
            search = _BeamSearch(num_beams, length_penalty, no_repeat_ngram_size, eos_id, max_new_tokens)
            return _search(texts, search, prompts)
        generators = _generators(prompts, seed)

        def choose(row: int, logits: Tensor) -> int:
            return sample_next_token(logits, temperature, top_k, top_p, generators[row])

        return _continue(texts, choose, prompts, max_new_tokens, no_repeat_ngram_size, eos_id)


class _Texts:
    """The texts that are being continued: what the model has read, as one batch padded on the left."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], use_cache: bool) -> None:
        self.model = model
        self.cache = KVCache() if use_cache else None
        device = next(model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.ids = torch.tensor(rows, device=device)  # (B, S)
        self.mask = (torch.arange(longest)[None, :] >= torch.tensor(padding)[:, None]).long().to(device)  # (B, S)
        self.unread = longest  # how many of the last tokens the model has not seen yet

    def next_logits(self) -> Tensor:
        """(B, V), in fp32: what each text's next token may be."""
        unread = self.ids[:, -self.unread :] if self.cache is not None else self.ids
        logits = self.model(unread, attention_mask=self.mask, cache=self.cache)[:, -1].float()
        if bool(logits.isnan().any()):
            raise ValueError(
                "the model's logits are not numbers (NaN): its weights are damaged or its training diverged"
            )
        return logits

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with these rows (some may be left out, some may be there twice) and one new token each."""
        index = torch.tensor(rows, device=self.ids.device)
        if self.cache is not None and list(rows) != list(range(len(self.ids))):
            self.cache.reorder(index)
        new = torch.tensor(tokens, device=self.ids.device)[:, None]  # (B', 1)
        self.ids = torch.cat([self.ids[index], new], dim=1)
        self.mask = torch.cat([self.mask[index], torch.ones_like(new)], dim=1)
        self.unread = 1


def _continue(
    texts: _Texts,
    choose: Callable[[int, Tensor], int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ngram: int,
    eos_id: int | None,
) -> list[list[int]]:
    """Greedy decoding and sampling: `choose(prompt, logits (V,))` takes the token. A text that has ended leaves the
    batch."""
    new: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the batch continues
    for step in range(max_new_tokens):
        logits = texts.next_logits()
        going_on: list[tuple[int, int]] = []  # (row, token)
        for row, prompt in enumerate(running):
            banned = repeated_ngram_tokens([*prompts[prompt], *new[prompt]], ngram)
            logits[row, banned] = -math.inf
            if logits[row].max() == -math.inf:
                continue
            token = choose(prompt, logits[row])
            if token != eos_id:
                new[prompt].append(token)
                going_on.append((row, token))
        if not going_on or step == max_new_tokens - 1:
            break
        running = [running[row] for row, _ in going_on]
        texts.extend([row for row, _ in going_on], [token for _, token in going_on])
    return new


# --- Beam search -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BeamSearch:
    """The settings of a beam search."""

    num_beams: int
    length_penalty: float
    no_repeat_ngram_size: int
    eos_id: int | None
    max_new_tokens: int

    def score(self, log_probability: float, new_tokens: int) -> float:
        """Long texts have a smaller probability: the penalty makes up for it (Wu et al. 2016, section 7)."""
        return log_probability / new_tokens**self.length_penalty


class _Beams:
    """The beams of one prompt: the texts that go on, and the best that have ended."""

    def __init__(self, search: _BeamSearch, prompt: Sequence[int]) -> None:
        self.search = search
        self.prompt = list(prompt)
        self.running: list[list[int]] = [[]]  # the new tokens of each beam, the most likely beam first
        self.log_probability = torch.zeros(1)  # (beams,) of the running ones
        self.finished: list[tuple[float, list[int]]] = []  # (score, new tokens), the best first

    def step(self, logits: Tensor) -> list[tuple[int, int]]:
        """Extend every beam by every token and keep the best.

        Of the 2 * num_beams best continuations, those of the first num_beams that end become finished, and the first
        num_beams that do not end go on: twice as many, so that enough are left if half of them end.

        Args:
            logits: (beams, V), on the CPU.

        Returns:
            For each beam that goes on: the beam that it continues, and its new token. Empty: the search is over.
        """
        search, width = self.search, logits.shape[1]
        logits = logits.log_softmax(dim=-1)
        for beam, tokens in enumerate(self.running):
            logits[beam, repeated_ngram_tokens([*self.prompt, *tokens], search.no_repeat_ngram_size)] = -math.inf
        total = (self.log_probability[:, None] + logits).flatten()  # (beams * V,)
        best = total.topk(min(2 * search.num_beams, len(total)))
        length = len(self.running[0]) + 1
        going_on: list[tuple[int, int]] = []
        kept: list[int] = []  # the rank of each that goes on
        for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = divmod(index, width)
            if value == -math.inf or len(kept) == search.num_beams:
                break
            if token != search.eos_id and length < search.max_new_tokens:
                going_on.append((beam, token))
                kept.append(rank)
            elif rank < search.num_beams:
                text = self.running[beam] + ([] if token == search.eos_id else [token])
                self.finished.append((search.score(value, length), text))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[: search.num_beams]
        if not going_on and not self.finished:  # every token is forbidden: the most likely text ends here
            self.finished = [(0.0, self.running[0])]
        self.running = [[*self.running[beam], token] for beam, token in going_on]
        self.log_probability = best.values[kept]
        return [] if self._settled(length) else going_on

    def _settled(self, length: int) -> bool:
        """Whether no running beam can be expected to beat the worst of num_beams finished ones."""
        if len(self.finished) < self.search.num_beams or not self.running:
            return not self.running
        return self.search.score(float(self.log_probability[0]), length) <= self.finished[-1][0]


def _search(texts: _Texts, search: _BeamSearch, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """All prompts' beams share the batch. A prompt whose search is over leaves it."""
    beams = [_Beams(search, prompt) for prompt in prompts]
    running = beams
    while running:
        logits = texts.next_logits().cpu()
        rows: list[int] = []
        tokens: list[int] = []
        still_running, first = [], 0
        for prompt in running:
            count = len(prompt.running)
            going_on = prompt.step(logits[first : first + count])
            rows += [first + beam for beam, _ in going_on]
            tokens += [token for _, token in going_on]
            first += count
            if going_on:
                still_running.append(prompt)
        running = still_running
        if running:
            texts.extend(rows, tokens)
    return [prompt.finished[0][1] for prompt in beams]


# --- Checks and small helpers ----------------------------------------------------------------------


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_beams: int, ngram: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p filter what is drawn: they need a temperature above 0, got 0 (greedy)")
    if num_beams < 1 or ngram < 0:
        raise ValueError(f"num_beams must be at least 1 and no_repeat_ngram_size at least 0, got {num_beams}, {ngram}")
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"a beam search draws nothing: num_beams={num_beams} needs temperature 0, got {temperature}")


def _check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = getattr(model, "config", None)
    vocab_size = getattr(config, "vocab_size", math.inf)
    context = getattr(config, "n_positions", math.inf)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: give at least one token, for example the end-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {number} has a token id outside 0 to {vocab_size - 1}")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, with max_new_tokens={max_new_tokens} that is "
                f"{len(prompt) + max_new_tokens}: more than the model's context of {context}"
            )


def _generators(prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """A random stream for each prompt, which does not depend on the other prompts of the batch."""
    seen: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in map(tuple, prompts):
        key = repr((seed, prompt, seen[prompt])).encode()
        seen[prompt] += 1
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        generators.append(torch.Generator().manual_seed(number))
    return generators


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
