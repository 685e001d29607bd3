"""How good a text is, and how much of the model was lost: BLEU, slot errors, perplexity, divergence.

A model here is anything that maps token ids (B, T) to the logits (B, T, V) of the token that follows each
of them. It is put into evaluation mode for the measurement and back afterwards.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.finetune.data import Lexicon, parse_mr
from lora_from_scratch.gpt2.model import IGNORE_INDEX

# (input ids, labels), and perhaps a mask
LabelledBatch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
ROWS_AT_ONCE = 8  # windows that go through the model together

# --- Texts -----------------------------------------------------------------------------------------


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002), 0 to 100, as sacrebleu computes it by default (Post 2018).

    Args:
        predictions: one text a meaning.
        references: the references of each meaning, one or more; their number may differ.

    Raises:
        ValueError: no texts, not as many references as texts, or a text without a reference.
    """
    from sacrebleu.metrics import BLEU

    _check_lengths(len(predictions), len(references), "lists of references")
    if not all(references):
        where = next(i for i, refs in enumerate(references) if not refs)
        raise ValueError(f"text {where} has no reference; give at least one for each text")
    most = max(len(refs) for refs in references)
    # sacrebleu wants the i-th references of all texts together; None stands where a text has fewer.
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def slot_error_rate(predictions: Sequence[str], mrs: Sequence[str], lexicon: Lexicon) -> float:
    """(missing + invented slots) / slots, over all texts (Wen et al. 2015, equation 14).

    A slot is missing if none of the phrases for its value is in the text. A slot with a value that the meaning does
    not have is invented; so a wrong value counts twice, as missing and as invented, and the rate can be above 1.
    Saying the same thing twice is no error. Values that the lexicon does not list cannot be seen.

    Args:
        predictions: one text a meaning.
        mrs: the meaning representations.
        lexicon: slot -> value -> phrases.

    Raises:
        ValueError: no texts, not as many meanings as texts, or a slot or a value that is not in the lexicon.
    """
    _check_lengths(len(predictions), len(mrs), "meaning representations")
    finder = MentionFinder(lexicon)
    errors = slots = 0
    for text, mr in zip(predictions, mrs, strict=True):
        missing, invented = finder.slot_errors(text, mr)
        errors += len(missing) + len(invented)
        slots += len(parse_mr(mr))
    return errors / slots


class MentionFinder:
    """Finds which slots and values a text mentions, by the phrases of a lexicon.

    Upper and lower case, hyphens and accents do not count; a phrase has to be whole words; where two phrases begin at
    one place the longer one is taken ("king's son" is no king).
    """

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.meanings: dict[str, set[tuple[str, str]]] = {}  # phrase -> what it may mean
        for slot, values in lexicon.items():
            for value, phrases in values.items():
                for phrase in phrases:
                    self.meanings.setdefault(_plain(phrase), set()).add((slot, value))
        longest_first = sorted(self.meanings, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def mentions(self, text: str) -> list[set[tuple[str, str]]]:
        """For each phrase in the text, in order, the (slot, value) pairs that it may stand for."""
        return [self.meanings[match.group()] for match in self.pattern.finditer(_plain(text))]

    def slot_errors(self, text: str, mr: str) -> tuple[set[str], set[tuple[str, str]]]:
        """The slots of the meaning that the text leaves out, and the (slot, value) pairs that it invents."""
        wanted = parse_mr(mr)
        for slot, value in wanted.items():
            if value not in self.lexicon.get(slot, {}):
                raise ValueError(f"the lexicon has no phrases for {slot}[{value}], so its errors cannot be counted")
        said: set[tuple[str, str]] = set()
        invented: set[tuple[str, str]] = set()
        for meanings in self.mentions(text):
            right = meanings & set(wanted.items())
            said |= right
            if not right:
                invented.add(min(meanings))  # a phrase with several readings is one invention
        return {slot for slot, value in wanted.items() if (slot, value) not in said}, invented


def _plain(text: str) -> str:
    """Without case, accents, hyphens and double spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold().replace("-", " ").replace("\u2019", "'"))
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def _check_lengths(texts: int, others: int, name: str) -> None:
    if texts != others or texts == 0:
        raise ValueError(f"give as many {name} as texts, and at least one; got {texts} texts and {others} {name}")


# --- Likelihoods -----------------------------------------------------------------------------------


def completion_loss(model: nn.Module, batches: Iterable[LabelledBatch]) -> float:
    """The mean negative log-likelihood, in nats, of every labelled token of all batches together.

    Args:
        model: token ids to logits.
        batches: pairs (input_ids (B, T), labels (B, T)), padded on the right; a label of -100 does not count.
            Labels are not shifted: the logits at position t are compared with the label at t + 1. A third
            field (the mask of a `training.Batch`) is not needed here and is not read.

    Raises:
        ValueError: no label counts.
    """
    total, tokens = 0.0, 0
    with _measuring(model):
        for batch in batches:
            loss, count = _summed_loss(model, batch[0], batch[1])
            total, tokens = total + loss, tokens + count
    if tokens == 0:
        raise ValueError("no token to predict: the batches are empty, or all their labels are -100")
    return total / tokens


def completion_perplexity(model: nn.Module, batches: Iterable[LabelledBatch]) -> float:
    """`exp(completion_loss)`: how many tokens the model hesitates between, on average."""
    return math.exp(completion_loss(model, batches))


def text_loss(model: nn.Module, token_ids: Tensor, context: int) -> float:
    """The mean negative log-likelihood, in nats per token, of running text.

    The text is cut into windows of `context` tokens, each of which begins with the last token of the one before. So
    every token but the very first is predicted exactly once. A token sees only what stands before it in its
    window, little at the window's beginning: the loss is somewhat higher than with a sliding window.

    Args:
        model: token ids to logits.
        token_ids: (N,), N >= 2.
        context: the length of a window, at least 2 and at most what the model takes.

    Raises:
        ValueError: the text or the context is too short.
    """
    if token_ids.dim() != 1 or len(token_ids) < 2 or context < 2:
        raise ValueError(
            "text_loss needs token ids of shape (N,) with N of at least 2 and a context of at least 2, "
            f"got shape {tuple(token_ids.shape)} and context {context}"
        )
    # The window at `start` predicts the tokens start + 1 to start + context - 1.
    windows = [token_ids[start : start + context] for start in range(0, len(token_ids) - 1, context - 1)]
    batches = [torch.stack(windows[:-1][i : i + ROWS_AT_ONCE]) for i in range(0, len(windows) - 1, ROWS_AT_ONCE)]
    batches.append(windows[-1][None])  # the last one may be shorter
    return completion_loss(model, ((batch, batch) for batch in batches))


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """How far a prediction has moved from the base model's, at every position: `KL(p || q) = sum_v p_v ln(p_v / q_v)`.

    p is what the base model predicts, `softmax(base_logits)`, and q what the other one does; v runs over the
    vocabulary. In words: how many nats worse than p itself q predicts a token that is drawn from p. It is 0 where
    p = q and positive elsewhere, and it is not symmetric (Kullback and Leibler 1951). It stays finite where a
    probability is too small for a float, since no logarithm of a probability is taken.

    Args:
        base_logits: (..., V).
        logits: (..., V).

    Returns:
        (...), in nats.
    """
    log_p = F.log_softmax(base_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def divergence_from_base(model: nn.Module, base_model: nn.Module, token_ids: Tensor) -> float:
    """`mean_t KL(p_base(. | x_<=t) || p_model(. | x_<=t))` in nats per token: how far the model has moved.

    With texts drawn from the base model this estimates the divergence between the two models over whole texts, per
    token. It is 0 if and only if they agree on these texts.

    Args:
        model: the adapted model.
        base_model: the model before; a separate copy.
        token_ids: (B, T), or (T,) for one text.

    Raises:
        ValueError: there is no token.
    """
    if token_ids.numel() == 0:
        raise ValueError("divergence_from_base needs at least one token, got none")
    rows = token_ids.reshape(-1, token_ids.shape[-1])  # (B, T)
    total = 0.0
    with _measuring(base_model), _measuring(model):
        for part in rows.split(ROWS_AT_ONCE):
            base_logits = base_model(part.to(_device(base_model)))  # (B, T, V)
            logits = model(part.to(_device(model))).to(base_logits.device)
            total += kl_divergence(base_logits, logits).double().sum().item()
    return max(0.0, total / rows.numel())  # rounding may leave -1e-9


def _summed_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[float, int]:
    """The summed loss of a batch, in nats, and the number of tokens that count."""
    shifted = labels[:, 1:].reshape(-1).to(_device(model))
    logits = model(input_ids.to(_device(model)))[:, :-1].float()  # (B, T - 1, V)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), shifted, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss.item(), int((shifted != IGNORE_INDEX).sum())


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every module's mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


# --- The project's own tales -----------------------------------------------------------------------


def load_tales() -> list[str]:
    """The tales that ship with the project and that no model has read, one string each, paragraphs on lines.

    A model that is fine-tuned on something else predicts them worse than before: that is what it forgot.
    """
    path = resources.files("lora_from_scratch").joinpath("assets", "tales.txt")
    return [tale.strip() for tale in path.read_text(encoding="ascii").split("\n\n") if tale.strip()]
