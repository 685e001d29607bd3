"""The five metrics of the E2E challenge (Dusek, Novikova and Rieser 2020, arXiv:1901.07931, section 4).

- BLEU: sacrebleu, in lower case, as mteval-v13a has it.
- NIST: here (`nist`). NLTK's `corpus_nist` compares with one reference at a time, mteval-v13a with all of them at once;
  with one reference for each text they agree.
- METEOR 1.5, ROUGE-L and CIDEr: the package pycocoevalcap, the code that the challenge used. METEOR is a Java program
  in that package, and so is the Stanford tokenizer, which makes the tokens of all three. Without Java there is no
  METEOR, and ROUGE-L and CIDEr get the tokens of mteval-v13a instead. On E2E's development set (the last reference of
  each meaning against the others) that changes CIDEr from 1.869 to 1.857 and ROUGE-L from 64.46 to 64.43.

NLTK's METEOR is another version of the metric, needs WordNet's files, and gives other numbers; it is not used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_from_scratch.finetune.metrics import bleu

NIST_ORDER = 5  # of the longest n-grams
NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # a text with 2/3 of the references' tokens gets half the score
PUNCTUATION = frozenset(("''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"))


@dataclass(frozen=True)
class E2EScores:
    """The metrics of one model, in the units of the LoRA paper. None: the package or Java is missing."""

    bleu: float  # 0 to 100
    nist: float  # 0 and above
    meteor: float | None  # 0 to 100
    rouge_l: float | None  # 0 to 100
    cider: float | None  # 0 to 10


def e2e_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> E2EScores:
    """All five metrics; those that cannot be computed on this computer are None (see `missing`).

    Args:
        predictions: one text per meaning.
        references: one or more references for each meaning; their number may differ.

    Raises:
        ValueError: there are no texts, the numbers of texts and of references differ, or a text has no reference.
    """
    lower = [text.lower() for text in predictions]
    score = bleu(lower, [[text.lower() for text in texts] for texts in references])  # checks the arguments
    meteor, rouge_l, cider = _coco_scores(predictions, references) if has_pycocoevalcap() else (None, None, None)
    return E2EScores(score, nist(predictions, references), meteor, rouge_l, cider)


def has_pycocoevalcap() -> bool:
    return importlib.util.find_spec("pycocoevalcap") is not None


def has_java() -> bool:
    return shutil.which("java") is not None


def missing() -> list[str]:
    """What cannot be computed on this computer, and what to install; empty if all five metrics can be."""
    if not has_pycocoevalcap():
        return ["METEOR, ROUGE-L and CIDEr need the package pycocoevalcap: python -m pip install -e '.[e2e]'"]
    if not has_java():
        return ["METEOR needs Java (the command java); without it ROUGE-L and CIDEr use mteval's tokens"]
    return []


# --- NIST ------------------------------------------------------------------------------------------


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The NIST score (Doddington 2002, equations 2 and 3) with the conventions of mteval-v13a.

    The information of an n-gram is log2 of how often its first n - 1 tokens occur in the references, divided by how
    often all n do; for a single token the first is the number of all tokens. For each n up to 5, the information of the
    n-grams that a text shares with its references is divided by the number of n-grams in the texts; an n-gram counts as
    often as it occurs in the text, but at most as often as in the reference that has it most often. The sum over n is
    multiplied by a penalty if the texts are shorter than the references are on average.

    Args:
        predictions: one text per meaning.
        references: one or more references for each.

    Returns:
        0 or more; 0 if no text has a token.
    """
    texts = [_mteval_tokens(text) for text in predictions]
    others = [[_mteval_tokens(text) for text in group] for group in references]
    occurrences = _occurrences(others)
    words = sum(len(tokens) for group in others for tokens in group)

    def information(ngram: tuple[str, ...]) -> float:
        return math.log2((occurrences[ngram[:-1]] if len(ngram) > 1 else words) / occurrences[ngram])

    score = 0.0
    for n in range(1, NIST_ORDER + 1):
        shared = total = 0.0
        for tokens, group in zip(texts, others, strict=True):
            counts, most = _ngrams(tokens, n), Counter[tuple[str, ...]]()
            for reference in group:
                most |= _ngrams(reference, n)
            shared += sum(count * information(ngram) for ngram, count in (counts & most).items())
            total += counts.total()
        score += shared / max(total, 1)
    length = sum(map(len, texts))
    expected = sum(sum(map(len, group)) / len(group) for group in others)
    ratio = min(length / expected, 1.0) if expected else 1.0
    return score * math.exp(NIST_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _occurrences(references: Sequence[Sequence[Sequence[str]]]) -> Counter[tuple[str, ...]]:
    """How often every n-gram occurs in all references."""
    counts: Counter[tuple[str, ...]] = Counter()
    for group in references:
        for tokens in group:
            for n in range(1, NIST_ORDER + 1):
                counts.update(_ngrams(tokens, n))
    return counts


def _mteval_tokens(text: str) -> list[str]:
    """The tokens of mteval-v13a, in lower case."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokens: list[str] = Tokenizer13a()(text.lower()).split()
    return tokens


# --- METEOR, ROUGE-L, CIDEr ------------------------------------------------------------------------


def _coco_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float | None, float | None, float | None]:
    """METEOR (None without Java), ROUGE-L and CIDEr."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    tokens = _coco_tokens([*references, *([text] for text in predictions)])
    wanted = dict(enumerate(tokens[: len(references)]))
    written = dict(enumerate(tokens[len(references) :]))
    rouge_l = 100 * float(Rouge().compute_score(wanted, written)[0])
    cider = float(Cider().compute_score(wanted, written)[0])
    return _meteor(wanted, written) if has_java() else None, rouge_l, cider


def _meteor(wanted: dict[int, list[str]], written: dict[int, list[str]]) -> float | None:
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        return 100 * float(Meteor().compute_score(wanted, written)[0])
    except (OSError, ValueError):  # Java does not start, or the program in it stopped
        return None


def _coco_tokens(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each text as its tokens in lower case, without punctuation (which these metrics ignore), spaces between them."""
    lines = [[" ".join(text.split()) for text in group] for group in groups]
    if has_java():
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        captions: dict[int, Any] = {i: [{"caption": text} for text in group] for i, group in enumerate(lines)}
        with contextlib.suppress(OSError):  # Java does not start, or the folder of the package cannot be written
            tokens: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
            if [len(tokens.get(i, ())) for i in captions] == list(map(len, lines)):
                return [tokens[i] for i in captions]
    return [
        [" ".join(token for token in _mteval_tokens(text) if token not in PUNCTUATION) for text in group]
        for group in lines
    ]
