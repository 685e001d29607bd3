"""Metrics for the quality of texts and for forgetting: BLEU, slot errors, perplexity, divergence.

A model here is anything that maps token ids (B, T) to next-token logits (B, T, V). It is put into evaluation mode for
the measurement and restored afterwards.
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
BATCH_SIZE = 8  # windows per forward pass

# --- Texts -----------------------------------------------------------------------------------------


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002), 0 to 100, as sacrebleu computes it by default (Post 2018).

    Args:
        predictions: one text per meaning.
        references: one or more references for each meaning; their number may differ.

    Raises:
        ValueError: there are no texts, the numbers of texts and of references differ, or a text has no reference.
    """
    from sacrebleu.metrics import BLEU

    _check_lengths(len(predictions), len(references), "lists of references")
    if not all(references):
        where = next(i for i, refs in enumerate(references) if not refs)
        raise ValueError(f"text {where} has no reference; give at least one for each text")
    most = max(len(refs) for refs in references)
    # sacrebleu takes a list with the i-th reference of every text, or None where a text has fewer.
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def slot_error_rate(predictions: Sequence[str], mrs: Sequence[str], lexicon: Lexicon) -> float:
    """(missing + invented slots) / slots, over all texts (Wen et al. 2015, equation 14).

    A slot is missing if none of the phrases for its value is in the text. A slot with a value that the meaning does
    not have is invented. A wrong value therefore counts twice, as missing and as invented, and the rate can exceed 1.
    Repetition is not an error. Values that are not in the lexicon cannot be detected.

    Args:
        predictions: one text per meaning.
        mrs: the meaning representations.
        lexicon: slot -> value -> phrases.

    Raises:
        ValueError: there are no texts, the numbers of texts and of meanings differ, or a slot or value is not in the
            lexicon.
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
    """Finds which slots and values a text mentions, using the phrases of a lexicon.

    Case, hyphens and accents are ignored. A phrase matches whole words only. Where two phrases start at the same place,
    the longer one is taken ("king's son" is not a king).
    """

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.meanings: dict[str, set[tuple[str, str]]] = {}  # phrase -> the (slot, value) pairs it may stand for
        for slot, values in lexicon.items():
            for value, phrases in values.items():
                for phrase in phrases:
                    self.meanings.setdefault(_normalised(phrase), set()).add((slot, value))
        longest_first = sorted(self.meanings, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def mentions(self, text: str) -> list[set[tuple[str, str]]]:
        """For each phrase in the text, in order, the (slot, value) pairs that it may stand for."""
        return [self.meanings[match.group()] for match in self.pattern.finditer(_normalised(text))]

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
                invented.add(min(meanings))  # an ambiguous phrase counts once
        return {slot for slot, value in wanted.items() if (slot, value) not in said}, invented


def _normalised(text: str) -> str:
    """The text in lower case, without accents, hyphens and double spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold().replace("-", " ").replace("\u2019", "'"))
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def _check_lengths(texts: int, others: int, name: str) -> None:
    if texts != others or texts == 0:
        raise ValueError(f"give as many {name} as texts, and at least one; got {texts} texts and {others} {name}")


# --- Likelihoods -----------------------------------------------------------------------------------


def completion_loss(model: nn.Module, batches: Iterable[LabelledBatch]) -> float:
    """The mean negative log-likelihood, in nats, of the labelled tokens of all batches.

    Args:
        model: maps token ids to logits.
        batches: pairs (input_ids (B, T), labels (B, T)), padded on the right; labels of -100 are ignored. Labels are
            not shifted: the logits at position t are compared with the label at t + 1. A third field (the mask of a
            `training.Batch`) is ignored.

    Raises:
        ValueError: every label is ignored.
    """
    total, tokens = 0.0, 0
    with _evaluation_mode(model):
        for batch in batches:
            loss, count = _summed_loss(model, batch[0], batch[1])
            total, tokens = total + loss, tokens + count
    if tokens == 0:
        raise ValueError("no token to predict: the batches are empty, or all their labels are -100")
    return total / tokens


def completion_perplexity(model: nn.Module, batches: Iterable[LabelledBatch]) -> float:
    """`exp(completion_loss)`: the effective number of tokens that the model chooses between."""
    return math.exp(completion_loss(model, batches))


def text_loss(model: nn.Module, token_ids: Tensor, context: int) -> float:
    """The mean negative log-likelihood, in nats per token, of running text.

    The text is cut into windows of `context` tokens, each of which begins with the last token of the previous one, so
    every token except the first is predicted exactly once. A token sees only the earlier tokens of its own window,
    few of them near its beginning, so the loss is somewhat higher than with a sliding window.

    Args:
        model: maps token ids to logits.
        token_ids: (N,), N >= 2.
        context: the length of a window, at least 2 and at most the model's context.

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
    batches = [torch.stack(windows[:-1][i : i + BATCH_SIZE]) for i in range(0, len(windows) - 1, BATCH_SIZE)]
    batches.append(windows[-1][None])  # the last one may be shorter
    return completion_loss(model, ((batch, batch) for batch in batches))


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """How far the predictions moved from the base model's, at each position: `KL(p || q) = sum_v p_v ln(p_v / q_v)`.

    p is the base model's prediction, `softmax(base_logits)`, and q the other model's; v runs over the vocabulary. It
    measures how much worse, in nats, q predicts a token drawn from p than p itself does. It is 0 where p = q and
    positive elsewhere, and it is not symmetric (Kullback and Leibler 1951). Logits in half precision are converted to
    float32 first. The result is finite even where a probability is too small for a float, since no logarithm of a
    probability is taken.

    Args:
        base_logits: (..., V), with any number of axes before the last, even none.
        logits: (..., V), the same shape.

    Returns:
        (...), in nats.
    """
    log_p = F.log_softmax(base_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def divergence_from_base(model: nn.Module, base_model: nn.Module, token_ids: Tensor) -> float:
    """`mean_t KL(p_base(. | x_<=t) || p_model(. | x_<=t))` in nats per token: how far the model has moved.

    With texts sampled from the base model this estimates the divergence, per token, between the two models'
    distributions over whole texts. It is 0 if and only if they agree on these texts.

    Args:
        model: the adapted model.
        base_model: the model before adaptation; a separate copy.
        token_ids: (B, T), or (T,) for one text.

    Raises:
        ValueError: there are no tokens.
    """
    if token_ids.numel() == 0:
        raise ValueError("divergence_from_base needs at least one token, got none")
    rows = token_ids.reshape(-1, token_ids.shape[-1])  # (B, T)
    total = 0.0
    with _evaluation_mode(base_model), _evaluation_mode(model):
        for part in rows.split(BATCH_SIZE):
            base_logits = base_model(part.to(_device(base_model)))  # (B, T, V)
            logits = model(part.to(_device(model))).to(base_logits.device)
            total += kl_divergence(base_logits, logits).double().sum().item()
    return max(0.0, total / rows.numel())  # rounding may give -1e-9


def _summed_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[float, int]:
    """The summed loss of a batch, in nats, and the number of labelled tokens."""
    shifted = labels[:, 1:].reshape(-1).to(_device(model))
    logits = model(input_ids.to(_device(model)))[:, :-1].float()  # (B, T - 1, V)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), shifted, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss.item(), int((shifted != IGNORE_INDEX).sum())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients; restore the mode of every module afterwards."""
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
    """The tales that ship with the project, one string each, one paragraph per line. No model was trained on them.

    A model that is fine-tuned on something else predicts them worse than before, which measures its forgetting.
    """
    path = resources.files("lora_from_scratch").joinpath("assets", "tales.txt")
    return [tale.strip() for tale in path.read_text(encoding="ascii").split("\n\n") if tale.strip()]
