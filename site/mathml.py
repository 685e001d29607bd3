"""Equations as MathML, which browsers draw themselves: no script, no network connection, and read by screen readers."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

DOTS = re.compile(r"\\dots(?![a-z])")  # docutils knows it by its other name


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    equation = mathml(node, as_block=True)
    translator.body.append(f'<div class="equation" tabindex="0" role="group" aria-label="equation">{equation}</div>\n')
    raise nodes.SkipNode


def mathml(node: nodes.Element, as_block: bool) -> str:
    try:
        return str(tex2mathml(DOTS.sub(r"\\ldots", node.astext()), as_block=as_block))
    except MathError as error:
        raise SphinxError(
            f"{node.source}: the equation {node.astext()!r} cannot be written as MathML: {error}"
        ) from None
