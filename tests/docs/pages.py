"""The README and the pages of docs/, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# in the order in which somebody reads them, and the commands run
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "quickstart", "concepts", "data", "training", "clusters", "scaling", "evaluation", "report"
)))  # fmt: skip
_FENCE = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.M | re.S)
_INLINE = re.compile(r"`(msmil [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    language: str
    title: str | None
    text: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(page, m["language"], m["title"], m["text"]) for m in _FENCE.finditer(text_of(page))]


def commands(page: str) -> list[str]:
    """The command lines of a page's bash blocks, each as one line without comments."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
            found += [line for text in lines if (line := re.sub(r"(^|\s+)# .*$", "", text).strip())]
    return found


def mentions(page: str) -> list[str]:
    """`msmil ...` in running text and tables: whole commands, and names of commands with options."""
    prose = _FENCE.sub("", text_of(page))
    return [" ".join(found.split()) for found in _INLINE.findall(prose)]
