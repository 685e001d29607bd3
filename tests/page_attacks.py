r"""What learners could write so that a page does something when a person opens it. All of it is Markdown.

A script that runs marks the page and presses the formgrader's button for full credit (`RAN`). Beside scripts there is
what covers the page, sends the reader elsewhere, loads from elsewhere, or takes the place of the page's own elements.
"""

from __future__ import annotations

RAN = "document.documentElement.dataset.ran='yes';window.$&&$('.full-credit').click()"
ELSEWHERE = "127.0.0.1:9"  # nobody answers there

ATTACKS = {
    # Comments that end where html.parser does not see it.
    "comment ended at once": f'<!--><img src=x onerror="{RAN}">-->',
    "comment ended by a dash": f'<!---><img src=x onerror="{RAN}">-->',
    "comment ended with a bang": f'<!-- a --!><img src=x onerror="{RAN}"><!-- -->',
    "comment inside a paragraph": f'Because <!--><svg onload="{RAN}">--> of it.',
    "comment over several lines": f'<!--\n\n--!>\n\n<img src=x onerror="{RAN}">\n\n-->',
    "bogus comment": f'<!x><img src=x onerror="{RAN}">',
    "processing instruction": f'<?x ><img src=x onerror="{RAN}">?>',
    "CDATA": f'<![CDATA[><img src=x onerror="{RAN}">]]>',
    "comment in an end tag": f'</ ><!--></ x><img src=x onerror="{RAN}">-->',
    # Scripts and handlers.
    "script": f"<script>{RAN}</script>",
    "script in capitals with a slash": f"<SCRIPT/x>{RAN}</SCRIPT/x>",
    "handler after a slash": f'<img/src="x"/onerror="{RAN}">',
    "handler on a new line": f'<details open\nontoggle="{RAN}">x</details>',
    "handler after a quote too many": f'<img alt="x""onerror="{RAN}" src=x>',
    "handler in backticks": f"<img src=x alt=`onerror={RAN.split(';')[0]}`>",
    "handler of an animation": f'<b style="animation: rotate 1s" onanimationstart="{RAN}">x</b>',
    "handler with focus": f'<b tabindex=0 autofocus onfocus="{RAN}">x</b>',
    "svg": f'<svg><animate onbegin="{RAN}" attributeName=x dur=1s></svg>',
    "svg with a style that closes": f'<svg><style><img title="</style><img src=x onerror=&quot;{RAN}&quot;>"></svg>',
    "MathML namespace": f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={RAN}">',
    "noscript": f'<noscript><p title="</noscript><img src=x onerror=&quot;{RAN}&quot;>">',
    "textarea": f'<textarea><p title="</textarea><img src=x onerror=&quot;{RAN}&quot;>">',
    "template": f'<template><script>{RAN}</script></template><img src=x onerror="{RAN}">',
    "xmp": f'<xmp><p title="</xmp><img src=x onerror=&quot;{RAN}&quot;>">',
    "foster-parented": f'<table><td><form><table><img src=x onerror="{RAN}">',
    # What Markdown itself, or reading it twice, could make active.
    "formula inside an attribute": f'<a title="$">a<b title="$" onmouseover="{RAN}">x</b>',
    "formula over two tags": f'<b title="$$"> <img src=x onerror="{RAN}" title="$$">',
    "code span over a tag": f'` <img title="`" src=x onerror="{RAN}"> `',
    "fence that does not end": f'~~~\n<img src=x onerror="{RAN}">',
    "blank line in a tag": f'<div\n\n><img src=x onerror="{RAN}">',
    "heading with a handler": f'# <img src=x onerror="{RAN}">',
    "picture whose text is a tag": f'![<img src=x onerror="{RAN}">](x.png "a\\" onerror=\\"{RAN}")',
    "title that closes": f"[x](https://example.org '\" onmouseover=\"{RAN}')",
    "mermaid": f'```mermaid\ngraph TD; A["<img src=x onerror=\\"{RAN}\\">"]\n```',
    "table cell": f'| a |\n|---|\n| <img src=x onerror="{RAN}"> |',
    "definition of a reference": f'[x][y] ![z][y]\n\n[y]: javascript:{RAN.split(";")[0]}',
    # Links and what is loaded.
    "javascript link": f"[x](javascript:{RAN.split(';')[0]})",
    "javascript link with a tab": f'<a href="java\tscript:{RAN}">x</a>',
    "javascript link in entities": f'<a href="&#106;avascript&colon;{RAN}">x</a>',
    "link to a page of data": "[x](<data:text/html,<script>alert(1)</script>>)",
    "link without a scheme": f"[Full credit](//{ELSEWHERE}/login)",
    "link with backslashes": f'<a href="https:\\\\{ELSEWHERE}">x</a> <a href="/\\{ELSEWHERE}">x</a>',
    "link into the formgrader": "[x](/formgrader/api/grades) [y](../../manage_students/x/) [z](?index=1)",
    "link to a file": "[x](file:///etc/passwd) [y](vbscript:x) [z](blob:https://x/y)",
    "picture from elsewhere": f"![x](http://{ELSEWHERE}/x.png) <img src='//{ELSEWHERE}/y.png'>",
    "picture with several sources": f"<img srcset='http://{ELSEWHERE}/x.png 2x' src='http://{ELSEWHERE}/y.png'>",
    "picture of SVG": "![x](data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4=)",
    "iframe": f'<iframe srcdoc="<script>parent.{RAN}</script>"></iframe>',
    "object and embed": f'<object data="data:text/html,x"></object><embed src="http://{ELSEWHERE}/x.swf">',
    "meta": f'<meta http-equiv="refresh" content="0;url=http://{ELSEWHERE}/">',
    "base": f"<base href='//{ELSEWHERE}/'>",
    "link to a style sheet": f"<link rel=stylesheet href=http://{ELSEWHERE}/x.css>",
    "video and audio": f'<video poster=http://{ELSEWHERE}/x.png><source onerror="{RAN}"></video><audio src=x onerror="{RAN}">',
    "form": "<form action=/formgrader/x><input name=y><button>Full credit</button></form>",
    "dialog": "<dialog open>Session over. <input type=password></dialog>",
    # What covers, hides or takes the place of the page's own elements.
    "fixed position": '<div style="position:fixed;inset:0;background:#fff;z-index:9999">Session over</div>',
    "fixed position in capitals": '<div style="POSITION : FIXED ;top:0;left:0">x</div>',
    "fixed position after a comment": '<div style="/**/position/**/:fixed;top:0">x</div>',
    "fixed position after an escape": '<div style="po\\73ition:fixed;top:0">x</div>',
    "negative margin": '<div style="margin:-3000px;position:relative;top:-99em">x</div>',
    "picture in a style": f'<b style="list-style:url(//{ELSEWHERE}/x);background:url(http://{ELSEWHERE}/y)">x</b>',
    "style": "<style>.score{display:none} *{position:fixed}</style>x",
    "classes of the page": '<div class="modal-backdrop navbar-fixed-top">x</div>',
    "the page's own ids": '<b id="why_count">x</b><img name="MathJax"><a id=statusmessage></a>',
    "classes of the page's buttons": '<b class="full-credit" data-toggle=tooltip data-html=true title="<img src=x>">x</b>',
    "tags that close the cell": f'</div></div></div></div><div style="position:fixed">x</div><img src=x onerror="{RAN}">',
    # Mathematics.
    "link in mathematics": r"$\href{https://example.org/login}{\text{Full credit}}$",
    "link in displayed mathematics": "$$\n\\href{javascript:" + RAN.split(";")[0] + "}{x}\n$$",
    "link in an environment": r"\begin{align}\href{https://example.org}{x}\end{align}",
    "link in mathematics of HTML": r"<b>$\href{https://example.org}{x}$</b> <pre>y</pre> \(\href{https://example.org}{x}\)",
    "link by a definition": r"$\def\x#1{\href#1}\x{https://example.org}{x}$ $\let\y=\href \y{https://example.org}{x}$",
    "extension": r"$\require{html}\require{action} x$ $\unicode[serif]{x41} \mmlToken{mi}[href=https://example.org]{x}$",
    "style in mathematics": r"$\style{position:fixed;top:0}{x}$ $\class{full-credit}{x}$ $\cssId{why_count}{x}$",
    "box in mathematics": r"$\bbox[position:fixed,9999px]{x} \rule{999em}{999em} \kern-99em x$",
    "script of MathJax": r'<script type="math/tex">\href{https://example.org}{x}</script>',
    "escaped dollars": r"\$\href{https://example.org}{x}\$ &#36;\href{https://example.org}{x}&#36;",
}  # fmt: skip

HONEST = {
    "formatting": ("**Because** of `a < b`.", "<strong>Because</strong> of <code>a &lt; b</code>."),
    "link": ("See [the paper](https://arxiv.org/abs/2106.09685).", '<a href="https://arxiv.org/abs/2106.09685"'),
    "address": ("See https://arxiv.org/abs/2106.09685 too.", '<a href="https://arxiv.org/abs/2106.09685"'),
    "table": ("| a | b |\n|---|---|\n| 1 | 2 |", "<td>1</td>"),
    "table of pandas": (
        "<div>\n<style scoped>\n.dataframe th { text-align: right; }\n</style>\n"
        '<table border="1" class="dataframe"><thead><tr style="text-align: right;"><th>loss</th></tr></thead></table></div>',
        '<table border="1"><thead><tr style="text-align: right"><th>loss</th></tr></thead></table>',
    ),
    "code": ("```python\nif a < b:\n\n    print('<b>')\n```", "if a &lt; b:&#10;&#10;    print('&lt;b&gt;')&#10;</code></pre>"),
    "comparison": ("1 < 2, and x<y too", "1 &lt; 2, and x&lt;y too"),
    "mathematics": (r"$W + \frac{\alpha}{r} B A$", "process\">&#36;W + &#92;frac{&#92;alpha}{r} B A&#36;</span>"),
    "displayed mathematics": ("$$\n\\sum_i x_i < 1\n$$", "process\">&#36;&#36;&#10;&#92;sum_i x_i &lt; 1&#10;&#36;&#36;</span>"),
    "environment": (
        "\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}",
        "a &amp;= b &#92;&#92;&#10;c &amp;= d&#10;&#92;end{align}</span>",
    ),
    "picture beside the notebook": (
        '<img src="drawing.png" alt="mine" width="200">',
        '<img src="drawing.png" alt="mine" width="200">',
    ),
    "list": ("1. one\n2. two\n   - three", "<li>three</li>"),
    "other scripts": ("Weil נכון, ж, 因为 👩‍💻.", "Weil נכון, ж, 因为 👩‍💻."),
}  # fmt: skip
