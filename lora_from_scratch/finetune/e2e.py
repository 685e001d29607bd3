"""The E2E data set (Novikova, Dusek and Rieser 2017): reading its CSV files, splitting one by meaning, its slots.

A file has a header with the columns `mr` and `ref` (others are ignored) and one pair per record. Meanings are written
`name[The Eagle], food[English]`; a quoted field may contain commas and line breaks.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from lora_from_scratch.finetune.data import Dataset, Example, Lexicon, format_mr, parse_mr

COLUMNS = ("mr", "ref")
VALIDATION_SHARE = TEST_SHARE = 0.1  # fractions of the meanings when a single file is split
SPLIT_FILES = (("trainset.csv",), ("devset.csv",), ("testset_w_refs.csv", "testset.csv"))

# --- Reading ---------------------------------------------------------------------------------------


def read_e2e_csv(path: str | Path) -> list[Example]:
    """Read all pairs of a CSV file, in order.

    The file must be UTF-8, with or without a byte order mark; lines may end in LF or CRLF.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed. The message begins with "path:line:", where line is the line of the file
            (from 1) on which the record starts.
    """
    text = _read_text(Path(path))
    records = _records(text, path)
    header_line, header = next(records, (1, []))
    header = [name.strip() for name in header]
    for column in COLUMNS:
        if header.count(column) != 1:
            found = f"found {', '.join(header)}" if header else "the file is empty"
            raise ValueError(
                f"{path}:{header_line}: the header must name the column {column!r} exactly once, {found}; "
                "begin the file with the line mr,ref"
            )
    mr_column, ref_column = (header.index(column) for column in COLUMNS)
    examples = []
    for line, record in records:
        if len(record) != len(header):
            raise ValueError(
                f"{path}:{line}: {_fields(len(record))}, but the header has {_fields(len(header))}; "
                "put quotes around a field that contains commas"
            )
        examples.append(_example(record[mr_column], record[ref_column], f"{path}:{line}"))
    if not examples:
        raise ValueError(f"{path}:{header_line}: there are no records after the header; add lines with mr and ref")
    return examples


def _fields(count: int) -> str:
    return f"{count} field" if count == 1 else f"{count} fields"


def _example(mr: str, ref: str, place: str) -> Example:
    try:
        parse_mr(mr)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not ref.strip():
        raise ValueError(f"{place}: the reference is empty; write a text for {mr!r} or delete the record")
    return Example(mr, ref)


def _read_text(path: Path) -> str:
    """The file's text, which must be UTF-8 without NUL bytes."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path of an E2E CSV file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        raise ValueError(
            f"{path}:{_line_at(before)}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = _line_at(text[: text.index("\0")])
        raise ValueError(f"{path}:{line}: NUL byte; save the file as UTF-8 text")
    return text


def _line_at(before: str) -> int:
    """The number of the line in which `before` ends."""
    return 1 + len(re.findall(r"\r\n|\r|\n", before))


def _records(text: str, path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it starts; empty lines are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: not a CSV record ({error}); close every quote, and double a quote inside a field"
            ) from None
        if record:
            yield line, record


# --- Splits ----------------------------------------------------------------------------------------


def read_e2e(path: str | Path, seed: int = 0) -> Dataset:
    """Read a directory with the official split, or a single CSV file, which is split by meaning.

    Raises:
        FileNotFoundError: the path or one of the three files does not exist.
        ValueError: a file is malformed, or two files of a directory share a meaning.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(
                f"no such data set: {path}; give story-cards, an E2E CSV file, or a directory with trainset.csv, "
                "devset.csv and testset.csv"
            )
        return split_by_meaning(str(path), read_e2e_csv(path), seed)
    files = [_first_existing(path, names) for names in SPLIT_FILES]
    splits = [read_e2e_csv(file) for file in files]
    owner: dict[str, Path] = {}
    for file, examples in zip(files, splits, strict=True):
        for example in examples:
            if owner.setdefault(meaning_key(example.mr), file) != file:
                raise ValueError(
                    f"{file} and {owner[meaning_key(example.mr)]} share the meaning {example.mr!r}, which would make "
                    "the scores meaningless; keep it in only one of them"
                )
    return _dataset(str(path), splits)


def _first_existing(directory: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise FileNotFoundError(f"there is no {' or '.join(names)} in {directory}; to split one CSV file, give its path")


def meaning_key(mr: str) -> str:
    """A canonical form of a meaning, independent of the order of its slots."""
    return format_mr(dict(sorted(parse_mr(mr).items())))


def split_by_meaning(name: str, examples: Sequence[Example], seed: int = 0) -> Dataset:
    """Use 80 % of the meanings for training, 10 % for validation and 10 % for testing.

    All references of a meaning stay together. The meanings are ordered by a SHA-256 of (seed, meaning), so the split is
    the same on every machine.

    Raises:
        ValueError: there are fewer than three meanings.
    """

    def place(key: str) -> bytes:
        return hashlib.sha256(f"{seed}|{key}".encode()).digest()

    keys = sorted({meaning_key(example.mr) for example in examples}, key=place)
    if len(keys) < 3:
        raise ValueError(f"{name} has {len(keys)} different meanings; a split into three needs at least 3")
    test = max(1, round(TEST_SHARE * len(keys)))
    validation = max(1, round(VALIDATION_SHARE * len(keys)))
    split_of = dict.fromkeys(keys, 0)
    split_of.update(dict.fromkeys(keys[:test], 2))
    split_of.update(dict.fromkeys(keys[test : test + validation], 1))
    splits: list[list[Example]] = [[], [], []]
    for example in examples:
        splits[split_of[meaning_key(example.mr)]].append(example)
    return _dataset(name, splits)


# --- Slots -----------------------------------------------------------------------------------------

_CHEAP = ("cheap", "inexpensive", "low price", "low priced", "low prices", "low cost", "affordable")
_MODERATE = (
    "moderate",
    "moderately priced",
    "mid price",
    "mid priced",
    "mid range",
    "average price",
    "average priced",
    "average prices",
    "medium priced",
    "reasonably priced",
    "reasonable prices",
)
_EXPENSIVE = ("expensive", "high price", "high priced", "high prices", "highly priced", "high end", "pricey", "costly")
_GOOD = (
    "highly rated",
    "high rating",
    "high ratings",
    "high customer rating",
    "high customer ratings",
    "rated high",
    "rated highly",
    "rating is high",
    "rating of high",
)
_FAIR = (
    "average rating",
    "average ratings",
    "average customer rating",
    "average customer ratings",
    "rated average",
    "average rated",
    "rating is average",
    "rating of average",
)
_BAD = (
    "low rating",
    "low ratings",
    "low customer rating",
    "low customer ratings",
    "low rated",
    "poorly rated",
    "rated low",
    "poor rating",
    "poor ratings",
    "poor reviews",
    "rating is low",
    "rating of low",
)


def _stars(digit: str, word: str) -> tuple[str, ...]:
    starred = [f"{n}{tail}" for n in (digit, word) for tail in (" out of 5", " out of five", " star", " stars")]
    return (*starred, f"{digit}/5", f"{digit} of 5")


_FRIENDLY = [
    *(f"{who} friendly" for who in ("family", "families", "child", "children", "childrens", "kid", "kids")),
    *(f"{verb} {who}" for verb, who in product(("welcomes", "for", "good for"), ("families", "children", "kids"))),
    *(f"{who} are welcome" for who in ("families", "children", "kids")),
]
_NOT = ("not", "not a", "non", "isn't", "isn't a", "no", "not very", "nor", "isn't very", "not really", "not the most")

# slot -> value -> other phrases for it. A phrase may belong to several values ("cheap" and "less than £20"); it then
# counts for whichever of them the meaning has.
_ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "eatType": {"coffee shop": ("coffee house", "coffee place"), "pub": ("pubs",), "restaurant": ("restaurants",)},
    "food": {"English": ("british",), "Fast food": ("burgers",), "Japanese": ("sushi",), "Italian": ("pasta",)},
    "priceRange": {
        "cheap": _CHEAP,
        "less than £20": ("under £20", "below £20", "less than 20 pounds", *_CHEAP),
        "moderate": _MODERATE,
        "£20-25": ("£20 to £25", "£20 £25", "20 25 pounds", "between £20 and £25", *_MODERATE),
        "high": _EXPENSIVE,
        "more than £30": ("over £30", "above £30", "more than 30 pounds", *_EXPENSIVE),
    },
    "customer rating": {
        "high": (*_GOOD, *_stars("5", "five")),
        "5 out of 5": (*_stars("5", "five"), *_GOOD),
        "average": (*_FAIR, *_stars("3", "three")),
        "3 out of 5": (*_stars("3", "three"), *_FAIR),
        "low": (*_BAD, *_stars("1", "one")),
        "1 out of 5": (*_stars("1", "one"), *_BAD),
    },
    "area": {
        "city centre": ("city center", "centre of the city", "center of the city", "centre of town"),
        "riverside": ("river",),
    },
    "familyFriendly": {
        "yes": tuple(_FRIENDLY),
        "no": (*(f"{no} {phrase}" for no, phrase in product(_NOT, _FRIENDLY)), "adult", "adults", "adults only"),
    },
}
_AMBIGUOUS = {"high", "average", "low", "yes", "no"}  # values that could belong to any slot when they stand alone


def _dataset(name: str, splits: Sequence[list[Example]]) -> Dataset:
    train, validation, test = splits
    lexicon = e2e_lexicon(example.mr for split in splits for example in split)
    return Dataset(name, train, validation, test, lexicon)


def e2e_lexicon(mrs: Iterable[str]) -> Lexicon:
    """The phrases for every slot and value that occurs in the meanings, for `metrics.slot_error_rate`.

    Names (`name`, `near`), areas, foods and kinds of place must occur in the text verbatim (names without a leading
    "The"). Prices, ratings and family-friendliness are also found by a list of common phrases, but never by the bare
    words "high", "average", "low", "yes" and "no". No list covers every way to express a value, and the human authors
    left slots out and added others. E2E's own references therefore have a rate of 0.12 on the development set: compare
    models with that, not with 0.
    """
    lexicon: dict[str, dict[str, tuple[str, ...]]] = {}
    for mr in mrs:
        for slot, value in parse_mr(mr).items():
            values = lexicon.setdefault(slot, {})
            if value not in values:
                values[value] = _phrases(slot, value)
    return lexicon


def _phrases(slot: str, value: str) -> tuple[str, ...]:
    aliases = _ALIASES.get(slot, {}).get(value, ())
    if slot in ("name", "near"):
        aliases = (value.removeprefix("The "),)
    itself = () if value in _AMBIGUOUS and aliases else (value,)
    return tuple(dict.fromkeys((*itself, *aliases)))
