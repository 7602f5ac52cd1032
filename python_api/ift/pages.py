"""Pages of one file each: no script, nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

# Below 40 rem a row of a table is a block whose cells carry the name of their column.
STYLE = """
:root{color-scheme:light}
body{font:16px/1.45 system-ui,sans-serif;color:#222;background:#fff;margin:0 auto;padding:1rem;
 max-width:76rem;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}.quiet{color:#666}
img{display:block;width:100%;height:auto}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
.grid img{border:1px solid #eee;border-radius:4px}
.grid+pre{margin-top:1.5rem}
.card{border:1px solid #ddd;border-radius:4px;padding:.6rem .8rem}
pre{white-space:pre-wrap;margin:.3rem 0;font:14px/1.4 ui-monospace,monospace}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;padding:0;list-style:none}
.key i{display:inline-block;width:2rem;margin-right:.5rem;vertical-align:middle}
table{border-collapse:collapse;width:100%}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}
th{font-weight:600}th:first-child,td:first-child{text-align:left}
th,td:first-child{overflow-wrap:normal}td:first-child{font-weight:600}
.wide{overflow-x:auto}.wide img{min-width:40rem}
@media(max-width:40rem){thead{display:none}table,tbody{display:block}
 tr{display:block;border-bottom:1px solid #bbb;padding:.4rem 0}
 td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0}
 td::before{content:attr(data-label);color:#666;text-align:left;flex:none;max-width:60%}
 td:first-child::before{content:none}td:first-child{overflow-wrap:anywhere}
 td:empty{display:none}}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML; the title is text."""
    name = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first row its head."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    cells = (
        "".join(f'<td data-label="{n}">{cell}</td>' for n, cell in zip(head, row, strict=True))
        for row in body
    )
    names = "".join(f"<th>{name}</th>" for name in head)
    return wide(
        f"<table><thead><tr>{names}</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in cells)
        + "</tbody></table>"
    )


def image(png: bytes, about: str) -> str:
    """A picture inside the page, and what it shows for who cannot see it."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(about)}" src="data:image/png;base64,{data}">'


def wide(part: str) -> str:
    """A part that scrolls by itself where it is wider than the page."""
    return f'<div class="wide">{part}</div>'


def grid(parts: Iterable[str]) -> str:
    """Parts beside each other where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'
