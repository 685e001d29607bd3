"""Find answers that are the same code apart from names and layout, by winnowing.

Source: S. Schleimer, D. S. Wilkerson and A. Aiken, "Winnowing: Local Algorithms for Document Fingerprinting", SIGMOD
2003. Every sequence of `GRAM` tokens is hashed, and of every `WINDOW` successive hashes the smallest is kept (the
rightmost of equal ones). So two answers that share GRAM + WINDOW - 1 tokens in a row share a fingerprint.

Before, names that the answer itself chooses become the same token, and layout, comments, docstrings and annotations are
dropped. What the release gives is subtracted, and so is what many in the class have, because it is the obvious way.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import itertools
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_from_scratch.checks.bank import right_answers
from lora_from_scratch.checks.exercise import Exercise

GRAM = 6  # tokens in a hash
WINDOW = 4  # hashes of which one is kept
SAME = 0.8  # share of common fingerprints from which on two answers are reported
LEAST = 12  # fingerprints of an answer; shorter ones are alike by chance
COMMON = 0.25  # share of the class that has a fingerprint, from which on it is not counted
FEW = 5  # learners with the same fingerprint who are never too many
CHOSEN = "name"  # the token for a name that the answer chooses
LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Pair:
    """Two learners' answers to an exercise that share at least `SAME` of their fingerprints.

    Attributes:
        published: whether both are also the library's own answer, which everybody can read.
    """

    exercise: str
    learners: tuple[str, str]
    similarity: float
    published: bool


def tokens_of(source: str) -> list[str]:
    """The tokens of an answer that names and layout do not change; none if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    chosen = _simplified(tree)
    try:
        found = list(tokenize.generate_tokens(io.StringIO(ast.unparse(tree)).readline))
    except (tokenize.TokenError, RecursionError, SyntaxError):
        return []
    before = [None, *found]
    return [
        CHOSEN if token.string in chosen and not (last is not None and last.string == ".") else token.string
        for last, token in zip(before, found, strict=False)
        if token.type not in LAYOUT
    ]


def _simplified(tree: ast.AST) -> set[str]:
    """Drop docstrings and annotations from the tree; returns the names that the code binds."""
    chosen: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            if node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
            chosen.add(getattr(node, "name", ""))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
            chosen.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            chosen.add(node.id)
    return chosen


def fingerprints(tokens: list[str]) -> set[int]:
    """The fingerprints that winnowing selects."""
    hashes = [_hash(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    if len(hashes) < WINDOW:
        return set(hashes)
    return {min(reversed(hashes[at : at + WINDOW])) for at in range(len(hashes) - WINDOW + 1)}


def _hash(gram: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(gram).encode(), digest_size=8).digest(), "big")


def similarity(one: set[int], other: set[int]) -> float:
    """The share of common fingerprints; 0 for answers that are too short to say."""
    if min(len(one), len(other)) < LEAST:
        return 0.0
    return len(one & other) / len(one | other)


def similar_pairs(exercise: str, answers: Mapping[str, str], given: str, published: str) -> list[Pair]:
    """The pairs of learners whose answers are the same apart from names and layout.

    Args:
        answers: by learner, the source of the answer.
        given: the source in the release, which everybody has.
        published: the source of the library's own answer.
    """
    start = fingerprints(tokens_of(given))
    own = fingerprints(tokens_of(published)) - start
    prints = {learner: fingerprints(tokens_of(source)) - start for learner, source in answers.items()}
    counts = Counter(itertools.chain.from_iterable(prints.values()))
    most = max(FEW, COMMON * len(answers))
    kept = {learner: {one for one in found if counts[one] <= most} for learner, found in prints.items()}
    holders: dict[int, list[str]] = defaultdict(list)
    for learner, found in kept.items():
        for one in found:
            holders[one].append(learner)
    shared = Counter(pair for names in holders.values() for pair in itertools.combinations(sorted(names), 2))
    public = {learner for learner, found in prints.items() if similarity(found, own) >= SAME}
    return [
        Pair(exercise, pair, alike, published=public.issuperset(pair))
        for pair in sorted(shared)
        if (alike := similarity(kept[pair[0]], kept[pair[1]])) >= SAME
    ]


@dataclass(frozen=True)
class HonestRate:
    """How often independent right answers of the bank are the same by this measure.

    Attributes:
        pairs: how many pairs were compared.
        same: how many of them would have been reported.
        short: how many could not be compared, because one of the two is too short.
    """

    pairs: int
    same: int
    short: int


def honest_rate(exercises: Iterable[Exercise]) -> HonestRate:
    """Compare the bank's alternative right answers to each exercise, and the library's own, with each other."""
    pairs = same = short = 0
    for exercise in exercises:
        sources = [published(exercise), *(_source(answer.object) for answer in right_answers(exercise.name))]
        prints = [fingerprints(tokens_of(_undecorated(source))) for source in sources]
        for one, other in itertools.combinations(prints, 2):
            pairs += 1
            short += min(len(one), len(other)) < LEAST
            same += similarity(one, other) >= SAME
    return HonestRate(pairs, same, short)


def published(exercise: Exercise) -> str:
    """The source of the library's own answer."""
    return _source(inspect.unwrap(exercise.object))


def _source(answer: object) -> str:
    try:
        return inspect.getsource(answer)  # type: ignore[arg-type]
    except (OSError, TypeError):  # it was made by other code
        return ""


def _undecorated(source: str) -> str:
    """The source from "def" or "class" on; an answer of the bank begins with a decorator."""
    lines = inspect.cleandoc("\n" + source).split("\n")
    start = next((n for n, line in enumerate(lines) if line.startswith(("def ", "class ", "async def "))), 0)
    return "\n".join(lines[start:])
