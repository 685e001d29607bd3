"""Decoding a stream of tokens into text."""

from __future__ import annotations

from collections.abc import Sequence

from lora_from_scratch.models.checkpoint import AnyTokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the decoding of an incomplete character


class TextStream:
    """Decodes tokens that arrive one at a time, up to the first stop string.

    Text that may still change is held back: the bytes of an incomplete character, and a suffix that may be the start of
    a stop string. The concatenation of all returned pieces is the text.

    Args:
        tokenizer: the tokenizer of the tokens.
        stop: non-empty strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: AnyTokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.shown = 0  # the number of characters returned so far
        self.stopped = False  # whether a stop string was found

    def add(self, token: int) -> str:
        """The new piece of text. It is always empty after a stop string."""
        if token < self.tokenizer.vocab_size:  # the model's vocabulary may be padded
            self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        return self._show(text, len(text.rstrip(INCOMPLETE)) - self._held_back(text.rstrip(INCOMPLETE)))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        text = self.tokenizer.decode(self.tokens)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        if self.stopped:
            return ""
        found = [place for place in (text.find(string, self.shown) for string in self.stop) if place >= 0]
        if found:
            self.stopped = True
            end = min(found)
        piece = text[self.shown : end]
        self.shown = max(self.shown, end)
        return piece

    def _held_back(self, text: str) -> int:
        """The number of characters at the end of the text that may be the start of a stop string."""
        lengths = (n for string in self.stop for n in range(1, len(string)) if text.endswith(string[:n]))
        return max(lengths, default=0)
