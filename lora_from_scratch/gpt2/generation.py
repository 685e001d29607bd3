"""Generation: continuing a text token by token.

Shapes: B texts, T tokens, V = `vocab_size`. The functions above `generate` perform one step on one row of logits;
`generate` runs them on a batch, with a cache of keys and values.

A model here is anything that can be called as `model(input_ids, attention_mask=..., cache=...)` and returns logits
(B, T, V) for the T tokens of `input_ids`. The mask covers exactly the tokens passed since the cache was empty: a method
that adds entries of its own to the cache must extend the mask itself. Between two calls the rows of the batch (and of
the cache, by `KVCache.reorder`) may be dropped, repeated and reordered. A model with a cache of another kind has a
method `new_cache`.
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
from lora_from_scratch.support.contention import watch

# --- One step, on the logits of one position ---------------------------------------------------------


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits and set the others to minus infinity (Fan et al. 2018).

    Args:
        logits: (..., V).
        k: at least 1; more than V keeps everything. All logits equal to the k-th largest are kept.

    Returns:
        (..., V), a new tensor.
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}")
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p (Holtzman et al. 2020, eq. 2).

    In order of decreasing probability, a token is kept if the tokens before it sum to less than p. The token that
    crosses p is therefore kept, and at least one token always is. Which of several equally likely tokens are kept is
    left open.

    Args:
        logits: (..., V).
        p: above 0 and at most 1; 1 keeps everything.

    Returns:
        (..., V), a new tensor: the logits of the kept tokens unchanged, minus infinity for the others.

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
    """Sample a token from `softmax(logits / temperature)`, after the filters (first top-k, then top-p).

    Args:
        logits: (V,).
        temperature: 0 takes the most likely token (the filters then have no effect); below 1 makes likely tokens more
            likely, above 1 less likely.
        top_k: see `filter_top_k`, or None to leave out this filter.
        top_p: see `filter_top_p`, or None to leave out this filter; it uses the probabilities after temperature and
            top-k.
        generator: the random number generator, on the CPU; the same state gives the same token. None: PyTorch's own.

    Returns:
        The token's id, 0 to V - 1.

    Raises:
        ValueError: the temperature is below 0, or a filter rejects its argument.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    logits = (logits - logits.max()) / temperature  # the largest is 0: a small temperature does not overflow
    if top_k is not None:
        logits = filter_top_k(logits, top_k)
    if top_p is not None:
        logits = filter_top_p(logits, top_p)
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def repeated_ngram_tokens(tokens: Sequence[int], size: int) -> list[int]:
    """The next tokens that would complete an n-gram that already occurs in `tokens`.

    Args:
        tokens: the text so far, including the prompt.
        size: n, the length of the n-gram; 0: no token is forbidden.
    """
    if size == 0 or len(tokens) < size:
        return []
    tokens = list(tokens)
    last = tokens[len(tokens) - size + 1 :]  # the last n - 1 tokens
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
    """Continue each prompt; the result for a prompt does not depend on the rest of the batch.

    With temperature 0 the most likely token is taken at each step (greedy decoding), or, with `num_beams` above 1, beam
    search looks for the most likely text. With a temperature above 0 tokens are sampled. Each prompt has its own random
    stream, derived from `seed`, its tokens, and the number of identical prompts before it in the batch, so a prompt
    given n times has n different continuations.

    The results equal those of `transformers.generate`, apart from the randomness, and apart from padding, which is not
    counted as text for `no_repeat_ngram_size` here.

    Args:
        model: see the module's docstring; it is put into eval mode during generation.
        prompts: B non-empty lists of token ids, of any lengths.
        max_new_tokens: the maximum number of tokens to generate.
        temperature, top_k, top_p: see `sample_next_token`; the filters need a temperature above 0.
        num_beams: the number of beams; 1: no beam search.
        length_penalty: a finished beam's score is its log-probability / (its new tokens, end included) ** this, so a
            value above 0 favours longer texts. Only for beam search.
        no_repeat_ngram_size: no n-gram of this length may occur twice, including in the prompt; 0: no restriction.
        eos_id: the token that ends a text; None: only the length does.
        seed: the seed for sampling.
        use_cache: False processes the whole text again at each step: the same result, slower.

    Returns:
        B lists of only the new tokens, without the final `eos_id`. A text ends early if `no_repeat_ngram_size` forbids
        every token.

    Raises:
        ValueError: an argument is out of range, the longest prompt and `max_new_tokens` together exceed the context, or
            the model's logits are NaN.
    """
    _check_sampling(max_new_tokens, temperature, top_k, top_p, num_beams, no_repeat_ngram_size)
    _check_prompts(model, prompts, max_new_tokens)
    if not prompts:
        return []
    watch()  # other programs may need the processors too
    with torch.no_grad(), _eval_mode(model):
        texts = _TextBatch(model, prompts, use_cache)
        if num_beams > 1:
            search = _BeamSearch(num_beams, length_penalty, no_repeat_ngram_size, eos_id, max_new_tokens)
            return _beam_search(texts, search, prompts)
        generators = _generators(prompts, seed)

        def choose(row: int, logits: Tensor) -> int:
            return sample_next_token(logits, temperature, top_k, top_p, generators[row])

        return _decode(texts, choose, prompts, max_new_tokens, no_repeat_ngram_size, eos_id)


class _TextBatch:
    """The texts being continued, as one batch padded on the left, with the cache."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], use_cache: bool) -> None:
        self.model = model
        self.cache = getattr(model, "new_cache", KVCache)() if use_cache else None
        device = next(model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.ids = torch.tensor(rows, device=device)  # (B, S)
        self.mask = (torch.arange(longest)[None, :] >= torch.tensor(padding)[:, None]).long().to(device)  # (B, S)
        self.unread = longest  # number of tokens at the end that the model has not processed yet

    def next_logits(self) -> Tensor:
        """The logits (B, V) of each text's next token, in fp32."""
        unread = self.ids[:, -self.unread :] if self.cache is not None else self.ids
        logits = self.model(unread, attention_mask=self.mask, cache=self.cache)[:, -1].float()
        if bool(logits.isnan().any()):
            raise ValueError(
                "the model's logits are not numbers (NaN): its weights are damaged or its training diverged"
            )
        return logits

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Keep these rows (some may be dropped or repeated) and append one token to each."""
        index = torch.tensor(rows, device=self.ids.device)
        if self.cache is not None and list(rows) != list(range(len(self.ids))):
            self.cache.reorder(index)
        new = torch.tensor(tokens, device=self.ids.device)[:, None]  # (B', 1)
        self.ids = torch.cat([self.ids[index], new], dim=1)
        self.mask = torch.cat([self.mask[index], torch.ones_like(new)], dim=1)
        self.unread = 1


def _decode(
    texts: _TextBatch,
    choose: Callable[[int, Tensor], int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ngram: int,
    eos_id: int | None,
) -> list[list[int]]:
    """Greedy decoding and sampling: `choose(prompt, logits (V,))` picks the token. Finished texts leave the batch."""
    new: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # which prompt each row of the batch continues
    for step in range(max_new_tokens):
        logits = texts.next_logits()
        continuing: list[tuple[int, int]] = []  # (row, token)
        for row, prompt in enumerate(running):
            banned = repeated_ngram_tokens([*prompts[prompt], *new[prompt]], ngram)
            logits[row, banned] = -math.inf
            if logits[row].max() == -math.inf:
                continue
            token = choose(prompt, logits[row])
            if token != eos_id:
                new[prompt].append(token)
                continuing.append((row, token))
        if not continuing or step == max_new_tokens - 1:
            break
        running = [running[row] for row, _ in continuing]
        texts.extend([row for row, _ in continuing], [token for _, token in continuing])
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
        """Longer texts are less probable; the length penalty compensates for this (Wu et al. 2016, section 7)."""
        return log_probability / new_tokens**self.length_penalty


class _Beams:
    """The beams of one prompt: the running texts, and the best finished ones."""

    def __init__(self, search: _BeamSearch, prompt: Sequence[int]) -> None:
        self.search = search
        self.prompt = list(prompt)
        self.running: list[list[int]] = [[]]  # the new tokens of each running beam, the most likely beam first
        self.log_probability = torch.zeros(1)  # (beams,) of the running beams
        self.finished: list[tuple[float, list[int]]] = []  # (score, new tokens), the best first

    def step(self, logits: Tensor) -> list[tuple[int, int]]:
        """Extend every beam by every token and keep the best.

        The 2 * num_beams best continuations are considered. Among the first num_beams of them, those that end are
        finished; the first num_beams of all that do not end keep running. Twice as many are considered so that enough
        remain if half of them end.

        Args:
            logits: (beams, V), on the CPU.

        Returns:
            For each beam that keeps running: the beam that it extends, and its new token. Empty: the search is over.
        """
        search, width = self.search, logits.shape[1]
        logits = logits.log_softmax(dim=-1)
        for beam, tokens in enumerate(self.running):
            logits[beam, repeated_ngram_tokens([*self.prompt, *tokens], search.no_repeat_ngram_size)] = -math.inf
        total = (self.log_probability[:, None] + logits).flatten()  # (beams * V,)
        best = total.topk(min(2 * search.num_beams, len(total)))
        length = len(self.running[0]) + 1
        continuing: list[tuple[int, int]] = []
        kept: list[int] = []  # the rank of each continuing beam
        for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = divmod(index, width)
            if value == -math.inf or len(kept) == search.num_beams:
                break
            if token != search.eos_id and length < search.max_new_tokens:
                continuing.append((beam, token))
                kept.append(rank)
            elif rank < search.num_beams:
                text = self.running[beam] + ([] if token == search.eos_id else [token])
                self.finished.append((search.score(value, length), text))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[: search.num_beams]
        if not continuing and not self.finished:  # every token is forbidden: end the most likely text here
            self.finished = [(0.0, self.running[0])]
        self.running = [[*self.running[beam], token] for beam, token in continuing]
        self.log_probability = best.values[kept]
        return [] if self._settled(length) else continuing

    def _settled(self, length: int) -> bool:
        """Whether no running beam can be expected to beat the worst of num_beams finished beams."""
        if len(self.finished) < self.search.num_beams or not self.running:
            return not self.running
        return self.search.score(float(self.log_probability[0]), length) <= self.finished[-1][0]


def _beam_search(texts: _TextBatch, search: _BeamSearch, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Run the searches of all prompts in one batch. A prompt whose search is over leaves the batch."""
    beams = [_Beams(search, prompt) for prompt in prompts]
    running = beams
    while running:
        logits = texts.next_logits().cpu()
        rows: list[int] = []
        tokens: list[int] = []
        still_running, first = [], 0
        for prompt in running:
            count = len(prompt.running)
            continuing = prompt.step(logits[first : first + count])
            rows += [first + beam for beam, _ in continuing]
            tokens += [token for _, token in continuing]
            first += count
            if continuing:
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
        raise ValueError("top_k and top_p apply to sampling only: they need a temperature above 0, got 0 (greedy)")
    if num_beams < 1 or ngram < 0:
        raise ValueError(f"num_beams must be at least 1 and no_repeat_ngram_size at least 0, got {num_beams}, {ngram}")
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"beam search does not sample: num_beams={num_beams} needs temperature 0, got {temperature}")


def _check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = getattr(model, "config", None)
    vocab_size = getattr(config, "vocab_size", math.inf)
    context = getattr(config, "n_positions", math.inf)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: give at least one token, such as the end-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {number} has a token id outside 0 to {vocab_size - 1}")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that is "
                f"{len(prompt) + max_new_tokens}, more than the model's context of {context}"
            )


def _generators(prompts: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """A random number generator for each prompt, independent of the other prompts in the batch."""
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
    """Disable dropout; restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
