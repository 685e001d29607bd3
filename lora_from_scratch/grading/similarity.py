"""Find answers that are the same code apart from names and layout, by winnowing.

Source: S. Schleimer, D. S. Wilkerson and A. Aiken, "Winnowing: Local Algorithms for Document Fingerprinting", SIGMOD
2003. Every sequence of `GRAM` tokens is hashed, and the smallest of every `WINDOW` successive hashes is kept (the
rightmost if several are equal). Therefore two answers that share GRAM + WINDOW - 1 successive tokens share a
fingerprint.

Before hashing, all names that the answer defines are replaced by the same token, and layout, comments, docstrings and
annotations are removed. Fingerprints of the released notebook are ignored, and so are those that many answers in the
class contain, since they belong to the obvious solution.
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

GRAM = 6  # tokens per hash
WINDOW = 4  # successive hashes, of which one is kept
SAME = 0.8  # two answers are reported if they share at least this fraction of their fingerprints
LEAST = 12  # the minimum number of fingerprints; shorter answers may agree by chance
COMMON = 0.25  # a fingerprint is ignored if more than this fraction of the class has it
FEW = 5  # a fingerprint that at most this many learners have is never ignored
CHOSEN = "name"  # the token that replaces a name defined by the answer
LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Pair:
    """Two learners' answers to an exercise that share at least `SAME` of their fingerprints.

    Attributes:
        exercise: the name of the exercise.
        learners: the two learners.
        similarity: the share of common fingerprints.
        published: whether both answers are also similar to the library's own answer, which is public.
    """

    exercise: str
    learners: tuple[str, str]
    similarity: float
    published: bool


def tokens_of(source: str) -> list[str]:
    """The tokens of an answer, independent of its names and layout; empty if it is not valid Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    chosen = _simplified(tree)
    try:
        found = list(tokenize.generate_tokens(io.StringIO(ast.unparse(tree)).readline))
    except (tokenize.TokenError, RecursionError, SyntaxError, ValueError):  # ValueError: what `unparse` cannot write
        return []
    before = [None, *found]
    return [
        CHOSEN if token.string in chosen and not (last is not None and last.string == ".") else token.string
        for last, token in zip(before, found, strict=False)
        if token.type not in LAYOUT
    ]


def _simplified(tree: ast.AST) -> set[str]:
    """Remove docstrings and annotations from the tree, and return the names that the code binds."""
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
    """The fingerprints selected by winnowing."""
    hashes = [_hash(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    if len(hashes) < WINDOW:
        return set(hashes)
    return {min(reversed(hashes[at : at + WINDOW])) for at in range(len(hashes) - WINDOW + 1)}


def _hash(gram: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(gram).encode(), digest_size=8).digest(), "big")


def similarity(one: set[int], other: set[int]) -> float:
    """The share of common fingerprints; 0 if one of the answers is too short to compare."""
    if min(len(one), len(other)) < LEAST:
        return 0.0
    return len(one & other) / len(one | other)


def similar_pairs(exercise: str, answers: Mapping[str, str], given: str, published: str) -> list[Pair]:
    """The pairs of learners whose answers are the same apart from names and layout.

    Args:
        exercise: the name of the exercise.
        answers: learner -> source code of the answer.
        given: the source code in the released notebook.
        published: the source code of the library's own answer.
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
    """How often independent right answers in the bank are the same by this measure.

    Attributes:
        pairs: the number of pairs.
        same: the number of pairs that would be reported.
        short: the number of pairs that cannot be compared, because one of the answers is too short.
    """

    pairs: int
    same: int
    short: int


def honest_rate(exercises: Iterable[Exercise]) -> HonestRate:
    """Compare all right answers to each exercise with each other: those in the bank and the library's own."""
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
    """The source code of the library's own answer."""
    return _source(inspect.unwrap(exercise.object))


def _source(answer: object) -> str:
    try:
        return inspect.getsource(answer)  # type: ignore[arg-type]
    except (OSError, TypeError):  # the object was generated by other code
        return ""


def _undecorated(source: str) -> str:
    """The source code without the decorator with which answers in the bank start."""
    lines = inspect.cleandoc("\n" + source).split("\n")
    start = next((n for n, line in enumerate(lines) if line.startswith(("def ", "class ", "async def "))), 0)
    return "\n".join(lines[start:])
