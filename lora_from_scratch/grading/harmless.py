"""Sanitise learners' Markdown and HTML, for all of nbgrader's pages.

Pages are opened in the instructor's browser. There, a script could change grades, a style could cover what is being
graded, and a remote picture would reveal when it was viewed. This module lists what is allowed; nh3 parses everything
as a browser does and re-serialises only what is allowed.

The result is one line without any character that is special in Markdown, in a box that cannot draw outside itself and
that MathJax ignores, except for the formulas that `mathematics.is_drawn` allows. It can therefore be used in a page and
in a Markdown cell.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import nh3
from nbconvert.filters.markdown_mistune import InvalidNotebook, IPythonRenderer, MarkdownWithMath

from lora_from_scratch.grading.mathematics import is_drawn
from lora_from_scratch.support.plain_text import plain

LONGEST = 10_000  # characters without pictures; longer texts are not formatted, since Markdown takes quadratic time
BOX = '<div class="tex2jax_ignore mathjax_ignore" style="contain: paint">'
FORMULA = '<span class="tex2jax_process mathjax_process">'
# The tags that Markdown, people, verdicts and pandas tables use.
TAGS = """
a abbr b blockquote br caption cite code col colgroup dd del details dfn div dl dt em h1 h2 h3 h4 h5 h6 hr i img ins kbd
li mark ol p pre q s samp small span strong sub summary sup table tbody td tfoot th thead tr tt u ul var
"""
LEFT_OUT = frozenset({"style"})  # removed with its contents; pandas writes one above each table
ATTRIBUTES = {
    "*": {"align", "style", "title", "valign"},
    "a": {"href"},
    "col": {"span"},
    "details": {"open"},
    "img": {"src", "alt", "width", "height"},
    "ol": {"start"},
    "table": {"border"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
}
NUMBERS = {"width", "height", "start", "border", "colspan", "rowspan", "span"}
LINK = re.compile(r"(https?://[^/\s\\]|mailto:[^\s\\]+@)[^\s\\]*", re.IGNORECASE)
FILE = re.compile(r"(?!\.)[\w ().-]+\.(png|jpe?g|gif|webp)", re.IGNORECASE)  # beside the notebook
STYLES = """
border border-collapse border-left font-family font-style font-weight line-height list-style margin max-width
overflow-wrap padding text-align text-decoration vertical-align white-space width
"""
STYLE = re.compile(r"[a-z-]+|\d{1,3}(\.\d+)?(em|px|%)?|#[0-9a-f]{3,8}")  # one word of a value
THEME = re.compile(r"var\(--jp-[\w-]+, ([\w#-]+)\)")  # a variable of JupyterLab's theme with its fallback
INLINE_PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")
TAG = re.compile(r"<\s*/?\s*([a-zA-Z][^\s/>]*|[!?])")
BEGINNINGS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
# Characters that are special in Markdown or MathJax, and line ends, are written as numeric entities.
NUMBERED = str.maketrans({character: f"&#{ord(character)};" for character in "\n\t$\\`"})

Attachments = Mapping[str, Mapping[str, str]]


def from_html(text: str) -> str:
    """Sanitised HTML."""
    return _boxed(_Allowed({}).clean(text), [])


def from_markdown(text: str, attachments: Attachments | None = None) -> str:
    """Markdown as sanitised HTML.

    Args:
        attachments: the cell's pictures, in the notebook's format.
    """
    pictures = dict(attachments or {})
    text = INLINE_PICTURE.sub(lambda found: _taken_out(found[0], pictures), plain(text))
    if len(text) > LONGEST:
        return from_text(text)
    mark = secrets.token_hex(16)  # marks our own elements; nobody else can know it
    writer = _Writer(mark)
    try:
        page = MarkdownWithMath(renderer=writer).render(text)
    except (InvalidNotebook, RecursionError, ValueError):
        return from_text(text)
    allowed = _Allowed(pictures, mark)
    return _boxed(allowed.clean(page), [(f'<span class="{mark}">{place}</span>', formula)
                                        for place, formula in enumerate(writer.formulas)])  # fmt: skip


def from_text(text: str) -> str:
    """The text as written, in a fixed-width font."""
    return _boxed(f"<pre>{html.escape(text)}</pre>", [])


def picture(encoded: str) -> tuple[str, str] | None:
    """The type of a base64 picture ("image/png", from its first bytes) and its base64, re-encoded; None if invalid."""
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    kind = next((kind for start, kind in BEGINNINGS.items() if content.startswith(start)), None)
    return (f"image/{kind}", base64.b64encode(content).decode()) if kind else None


def _boxed(clean: str, formulas: list[tuple[str, str]]) -> str:
    made = plain(clean).strip().translate(NUMBERED)
    for place, formula in formulas:
        made = made.replace(place, f"{FORMULA}{html.escape(formula, quote=False).translate(NUMBERED)}</span>")
    return f"{BOX}{made}</div>"


def _taken_out(address: str, pictures: dict[str, Any]) -> str:
    """Move a picture that is inline in the text to the attachments; returns its address."""
    name = f"inline-{len(pictures)}"
    pictures[name] = {"": address.partition(",")[2]}
    return f"attachment:{name}"


class _Allowed:
    """Calls nh3 with the allow-list, and filters attributes for it."""

    def __init__(self, pictures: Attachments, mark: str = "") -> None:
        self.pictures, self.mark = pictures, mark

    def clean(self, text: str) -> str:
        return nh3.clean(
            text,
            tags=set(TAGS.split()),
            attributes=ATTRIBUTES,
            attribute_filter=self.attribute,
            allowed_classes={"span": {self.mark}} if self.mark else {},
            clean_content_tags={"script", *LEFT_OUT},
            url_schemes={"http", "https", "mailto", "attachment", "data"},
            link_rel="noopener noreferrer nofollow",
        )

    def attribute(self, tag: str, name: str, value: str) -> str | None:
        if name == "href":
            return value if LINK.fullmatch(value) else None
        if name == "src":
            return self._source(value)
        if name == "style":
            return _style(value)
        if name in NUMBERS:
            return value if re.fullmatch(r"\d{1,4}(px)?", value) else None
        return value

    def _source(self, address: str) -> str | None:
        """A picture's source: contained in the notebook or a file beside it; anything else is removed."""
        scheme, _, rest = address.partition(":")
        if scheme == "attachment":
            files = self.pictures.get(rest) or self.pictures.get(unquote(rest)) or {}
            found = next(filter(None, map(picture, files.values())), None)
        elif scheme == "data":
            found = picture(rest.partition(",")[2])
        else:
            return address if FILE.fullmatch(unquote(address)) else None
        return f"data:{found[0]};base64,{found[1]}" if found else None


def _style(value: str) -> str | None:
    """The style declarations that only change an element's own look in its place."""
    kept = []
    for declaration in value.split(";"):
        name, _, given = declaration.strip().partition(":")
        words = THEME.sub(r"\1", given).replace(",", " ").split()
        if name in STYLES.split() and words and all(map(STYLE.fullmatch, words)):
            kept.append(declaration.strip())
    return "; ".join(kept) or None


class _Writer(IPythonRenderer):
    """Renders Markdown as HTML with a placeholder for each formula; tags that are not allowed become text."""

    def __init__(self, mark: str) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.mark = mark
        self.formulas: list[str] = []

    def block_code(self, code: str, info: str | None = None) -> str:
        return f"<pre><code>{html.escape(code)}</code></pre>\n"

    def block_html(self, html: str) -> str:
        return self.inline_html(html) + "\n"

    def inline_html(self, html: str) -> str:
        names = {name.lower() for name in TAG.findall(html)}
        return html if names <= {*TAGS.split(), *LEFT_OUT} else self.escape_html(html)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if LINK.fullmatch(url):  # a remote picture becomes a link
            return f'<a href="{html.escape(url)}">{text or html.escape(url)}</a>'
        return f'<img src="{html.escape(url)}" alt="{html.escape(html.unescape(text))}">'

    def block_math(self, body: str) -> str:
        return self._formula(f"$${body}$$")

    def inline_math(self, body: str) -> str:
        return self._formula(f"${body}$")

    def latex_environment(self, name: str, body: str) -> str:
        return self._formula(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def _formula(self, formula: str) -> str:
        if not is_drawn(formula):
            return f"<code>{html.escape(formula)}</code>"
        self.formulas.append(formula)
        return f'<span class="{self.mark}">{len(self.formulas) - 1}</span>'
