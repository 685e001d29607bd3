"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from lora_from_scratch.gpt2.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


class TextStream:
    """The text of tokens that come one by one, up to the first of some strings that is complete.

    What may still change is held back: the bytes of a character that is not complete, and the beginning of a string
    that would end the text. All pieces together are the text.

    Args:
        tokenizer: that the tokens are from.
        stop: non-empty strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.shown = 0  # characters that have been returned
        self.stopped = False  # whether one of the strings has come

    def add(self, token: int) -> str:
        """The new piece of text; after the end of the text it is always empty."""
        if token < self.tokenizer.vocab_size:  # a model's vocabulary may have been padded
            self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        return self._show(text, len(text.rstrip(INCOMPLETE)) - self._held_back(text.rstrip(INCOMPLETE)))

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
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
        """The characters at the end that may be the beginning of a string that ends the text."""
        lengths = (n for string in self.stop for n in range(1, len(string)) if text.endswith(string[:n]))
        return max(lengths, default=0)
