"""Text of others as it is shown: nothing of it is obeyed."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.support.plain_text import in_html, in_markdown, one_line, plain, table_cell

OBEYED = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: controls, halves of characters, ends of lines and paragraphs
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters()))
def test_no_character_that_is_obeyed_is_left(text: str) -> None:
    shown = plain(text)
    shown.encode()
    assert {unicodedata.category(c) for c in shown if c not in "\n\t"}.isdisjoint(OBEYED)
    assert not set(shown) & set(BIDI)


@pytest.mark.parametrize(
    "text", ["a\tb\n", "Zoë, 因为, נכון, ж", "👩\u200d💻", "mi\u0301o", "قال\u200cها", "½ − ∑ \u00a0x"]
)
def test_what_people_write_stays(text: str) -> None:
    assert plain(text) == text


def test_every_character_that_is_obeyed_leaves_a_mark() -> None:
    assert plain("\x1b[31mred\x00\x9b\u202e") == "\N{REPLACEMENT CHARACTER}[31mred" + 3 * "\N{REPLACEMENT CHARACTER}"
    assert plain("a\r\nb\rc") == "a\nb\N{REPLACEMENT CHARACTER}c"


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_a_line_is_one_line(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_a_cell_of_a_table_is_no_formula(text: str) -> None:
    assert not table_cell(text).lstrip().startswith(tuple("=+-@"))


@pytest.mark.parametrize("text", ["Lovelace, Ada", "O'Brien", "a=b", "ada@example.org", "Jean-Luc", "4711", ""])
def test_a_cell_that_is_no_formula_stays(text: str) -> None:
    assert table_cell(text) == text


def test_code_in_backticks_stays_code() -> None:
    assert in_html("`a < b` & `") == "<code>a &lt; b</code> &amp; `"
    assert in_markdown("`a < b` & [x] `") == "`a < b` &amp; \\[x\\] \\`"


@settings(max_examples=100, deadline=None)
@given(st.text("`\\\\<>[]()!$&ab\n", max_size=30))
def test_markdown_makes_no_tag_and_no_link_of_it(text: str) -> None:
    filters = pytest.importorskip("nbconvert.filters")
    page = filters.markdown2html(f"x {in_markdown(text)}")
    for tag in ("<p>", "</p>", "<code>", "</code>"):
        page = page.replace(tag, "")
    assert "<" not in page
