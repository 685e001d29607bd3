"""scikit-learn's digits: 1,797 pictures of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI), and shifts of this data set.

The classifier learns five classes from the digits 0 to 4. There are three shifted tasks, one for each of the levels
that Lee et al. 2023 (arXiv:2210.11466, section 2) distinguish:

    input     the same digits with inverted pixel values: only p(x) changes, as with a different camera
    feature   the digits 5 to 9 in the same five classes: each class contains a new kind of example
    output    the same digits with permuted class numbers: only the meaning of the output changes
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 8  # pixels
CLASSES = 5
SHIFTS = ("input", "feature", "output")


class Pictures(NamedTuple):
    """Pictures and their classes."""

    pictures: Tensor  # (N, 8, 8), 0 for paper and 1 for ink
    labels: Tensor  # (N,)

    def rows(self, index: Tensor | slice) -> Pictures:
        return Pictures(self.pictures[index], self.labels[index])


@functools.cache
def load_digits() -> Pictures:
    """All pictures with their digits, in scikit-learn's order.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError(
            "the pictures of digits come with scikit-learn: python -m pip install -e '.[pictures]' -c constraints.txt"
        ) from None
    found = datasets.load_digits()
    return Pictures(torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target))


def source(part: str) -> Pictures:
    """The digits 0 to 4, on which the classifier is trained. `part` is "train" (600 pictures) or "test" (301)."""
    return _split(_digits(0), 600)[part]


def shifted(kind: str, part: str) -> Pictures:
    """A shifted task. It has no picture in common with the training data of the classifier.

    Args:
        kind: one of `SHIFTS`.
        part: "train" (100 pictures), "validation" (50) or "test" (150).

    Raises:
        ValueError: `kind` is not one of `SHIFTS`.
    """
    if kind not in SHIFTS:
        raise ValueError(f"the shift must be one of {', '.join(SHIFTS)}, got {kind!r}")
    unseen = _digits(5) if kind == "feature" else source("test")
    pictures, labels = unseen
    if kind == "input":
        pictures = 1 - pictures
    if kind == "output":
        labels = (labels + 1) % CLASSES
    places = {"train": slice(0, 100), "validation": slice(100, 150), "test": slice(150, 300)}
    return Pictures(pictures, labels).rows(places[part])


def on_grey_paper(part: str) -> Pictures:
    """The pictures of `shifted("input", part)` in grey, 0.4 for paper and 1 for ink: a milder input-level shift."""
    inverted = shifted("input", part)
    return Pictures(1 - 0.6 * inverted.pictures, inverted.labels)


def _digits(first: int) -> Pictures:
    """Five successive digits from `first`, with labels from 0 to 4, in a fixed random order."""
    every = load_digits()
    chosen = every.rows((every.labels >= first) & (every.labels < first + CLASSES))
    order = torch.randperm(len(chosen.labels), generator=torch.Generator().manual_seed(first))
    return Pictures(chosen.pictures[order], chosen.labels[order] - first)


def _split(data: Pictures, train: int) -> dict[str, Pictures]:
    return {"train": data.rows(slice(0, train)), "test": data.rows(slice(train, None))}


def nearest_digit(pictures: Tensor) -> Tensor:
    """The digit of the nearest picture in the data set, by Euclidean distance. This needs no trained classifier.

    Args:
        pictures: (N, 8, 8).

    Returns:
        (N,), integers from 0 to 9.
    """
    every = load_digits()
    distance = torch.cdist(pictures.flatten(1), every.pictures.flatten(1))  # (N, 1797)
    return every.labels[distance.argmin(dim=1)]


def distance_to_digits(pictures: Tensor) -> Tensor:
    """The Euclidean distance of each picture to the nearest one in the data set: (N, 8, 8) to (N,)."""
    return torch.cdist(pictures.flatten(1), load_digits().pictures.flatten(1)).amin(dim=1)
