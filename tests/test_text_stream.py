"""Text in pieces: together they are the text, up to the first string that ends it, and no piece is taken back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.serving.text_stream import TextStream
from tests.checkpoints import TOKENIZER

texts = st.text(st.sampled_from("ab \N{GRINNING FACE}\N{LATIN SMALL LETTER E WITH ACUTE}kingqueen"), max_size=30)
stops = st.lists(st.text(st.sampled_from("ab \N{GRINNING FACE}ing"), min_size=1, max_size=4), max_size=3)


@given(texts, stops)
@settings(max_examples=30, deadline=None)
def test_the_pieces_are_the_text_up_to_the_first_complete_stop(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream.add(token) for token in TOKENIZER.encode(text)]
    pieces.append(stream.finish())
    tokens = TOKENIZER.encode(text)
    ends: list[int] = []
    for count in range(len(tokens)):
        so_far = TOKENIZER.decode(tokens[: count + 1])
        ends = ends or [so_far.index(string) for string in stop if string in so_far]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_stays_incomplete_is_shown_at_the_end() -> None:
    stream = TextStream(TOKENIZER)
    (*most, _) = TOKENIZER.encode("a\N{GRINNING FACE}")
    assert "".join(stream.add(token) for token in most) == "a"
    assert stream.finish() == TOKENIZER.decode(most)[1:]


def test_a_token_of_a_padded_vocabulary_has_no_text() -> None:
    stream = TextStream(TOKENIZER)
    assert (stream.add(TOKENIZER.vocab_size + 3), stream.finish()) == ("", "")
