"""Pieces of a page: escaped text, tables that stack on a narrow screen, pictures that lie in the page itself."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from msmil.evaluation.results import number
from msmil.reporting.figures import png

_CSS_PIXELS = 96 / 150  # of a figure's pixels, drawn at 150 per inch
_TAG = re.compile(r"</?code>")  # the one that headings of columns may have


class Markup(str):
    """HTML that is not escaped again."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `id` is its anchor, unique in the page. Collapsed, it opens on demand."""

    id: str
    title: str
    body: Markup
    collapsed: bool = False


class Budget:
    """Bytes of pictures that a part of the page may still take."""

    def __init__(self, num_bytes: int) -> None:
        self.left_bytes = num_bytes

    def fits(self, data: Sequence[bytes]) -> bool:
        """Whether pictures fit together; if so, their bytes are taken."""
        needed = sum(encoded_bytes(one) for one in data)
        if needed > self.left_bytes:
            return False
        self.left_bytes -= needed
        return True

    @contextmanager
    def share(self, parts: int) -> Iterator[Budget]:
        """One of so many equal parts of what is left; what is not used of it comes back."""
        part = Budget(self.left_bytes // parts)
        self.left_bytes -= part.left_bytes
        yield part
        self.left_bytes += part.left_bytes


def encoded_bytes(data: bytes) -> int:
    """The length of a picture inside a page, with some room for the tag around it."""
    return 4 * (len(data) + 2) // 3 + 400


def esc(value: object) -> Markup:
    """A value as HTML."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Sequence[str]) -> Markup:
    """Pieces of HTML one after another."""
    return Markup("\n".join(parts))


def element(name: str, content: object, **attributes: str) -> Markup:
    """An element with escaped content and attributes; `class_` stands for class."""
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{esc(content)}</{name}>")


def paragraph(text: object, class_: str = "") -> Markup:
    """A paragraph of text."""
    return element("p", text, class_=class_) if class_ else element("p", text)


def missing(text: str, command: str = "") -> Markup:
    """What stands in the place of something that is not there, and the command that makes it."""
    how = Markup(f" To make it: <code>{esc(command)}</code>") if command else Markup("")
    return element("p", Markup(f"{esc(text)}{how}"), class_="missing")


def table(head: Sequence[object], rows: Sequence[Sequence[object]], *, left: int = 1, class_: str = "") -> Markup:
    """A table; the first `left` columns are flush left. On a narrow screen a row becomes a block of named values."""
    cells = [f"<th scope=col{_side(i, left)}>{esc(name)}</th>" for i, name in enumerate(head)]
    names = [html.escape(_TAG.sub("", str(name))) for name in head]
    lines = [f'<div class="table"><table class="{html.escape(class_)}"><thead><tr>{"".join(cells)}</tr></thead><tbody>']
    for row in rows:
        first = f"<th scope=row{_side(0, left)}>{esc(row[0])}</th>"
        rest = [f'<td{_side(i, left)} data-name="{names[i]}">{_cell(cell)}</td>' for i, cell in enumerate(row) if i > 0]
        lines.append(f"<tr>{first}{''.join(rest)}</tr>")
    return Markup("\n".join([*lines, "</tbody></table></div>"]))


def _cell(cell: object) -> str:
    """In a box of its own, beside the column's name where rows are stacked; an empty cell stays empty."""
    return f"<div>{esc(cell)}</div>" if cell != "" else ""


def _side(column: int, left: int) -> str:
    return ' class="l"' if column < left else ""


def figures(items: Sequence[tuple[Any, str]], budget: Budget) -> Markup:
    """Drawn figures beside each other; (figure, alternative text). What does not fit is said."""
    parts = []
    for figure, alternative in items:
        data = png(figure)
        if budget.fits([data]):
            parts.append(f"<figure>{picture(data, alternative, scale=_CSS_PIXELS)}</figure>")
        else:
            parts.append(missing(f"A figure is left out for the size of this file: {alternative}"))
    return Markup(f'<div class="figures">{"".join(parts)}</div>') if parts else Markup("")


def picture(data: bytes, alternative: str, *, scale: float = 1.0) -> Markup:
    """A picture in the page itself, with its size, so that nothing moves while the page opens."""
    with Image.open(io.BytesIO(data)) as image:
        kind, (width_px, height_px) = str(image.format).lower(), image.size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    size = f'width="{round(width_px * scale)}" height="{round(height_px * scale)}"'
    return Markup(f'<img src="{source}" {size} alt="{html.escape(alternative)}">')


def details(summary: str, body: Markup) -> Markup:
    """A part that opens on demand, and in print."""
    return Markup(f"<details><summary>{esc(summary)}</summary>{body}</details>")


def with_bounds(value: float | None, bounds: tuple[float, float] | None, digits: int = 3) -> Markup:
    """A number and, smaller, its interval."""
    text = number(value, digits)
    if bounds is None or value is None:
        return esc(text)
    interval = f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
    return Markup(f'{text} <span class="ci">{interval}</span>')


def page(title: str, intro: Markup, sections: Sequence[tuple[Section, Sequence[Section]]], css: str) -> str:
    """The whole page: table of contents and sections, each with the sections below it."""
    entries, parts = [], []
    for section, below in sections:
        links = Markup(" ".join(f'<li><a href="#{one.id}">{esc(one.title)}</a></li>' for one in below))
        entries.append(f'<li><a href="#{section.id}">{esc(section.title)}</a></li>')
        within = [f'<section id="{one.id}"><h3>{esc(one.title)}</h3>\n{one.body}</section>' for one in below]
        if section.collapsed:
            within = [details("All about this run", join([f'<ul class="links">{links}</ul>', *within]))]
        heading = f"<h2>{esc(section.title)}</h2>"
        parts.append(f'<section id="{section.id}">{heading}\n{section.body}{join(within)}</section>')
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(title)}</title>
<link rel="icon" href="data:,">
<style>
{css}
</style>
</head>
<body>
<nav aria-label="Contents"><h2>Contents</h2><ul>{"".join(entries)}</ul></nav>
<main>
<h1>{esc(title)}</h1>
{intro}
{join(parts)}
</main>
<script>
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => {{ d.open = true; }}));
function reveal() {{
  const target = document.getElementById(location.hash.slice(1));
  for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  if (target) target.scrollIntoView();
}}
addEventListener("hashchange", reveal);
reveal();
</script>
</body>
</html>
"""
