"""The repository's Markdown pages, and what tests look for in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.rglob("*.md")),
)
NAMES = tuple(str(page.relative_to(ROOT)) for page in PAGES)

# <!-- not run: needs a GPU --> in front of a block: readers do not see it, tests list it
MARK = re.compile(r"<!-- not (?:run|compared): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    kind     the word behind the fence: "python", "bash", "text" and "diff" (what the block before
             prints), "schema" (of an op), or "" for a figure, in which nothing can be run
    line     of its fence, from 1
    not_run  why it is not run or not compared; "" if it is
    """

    page: str
    line: int
    kind: str
    text: str
    not_run: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def tokens(page: str) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text()))


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, from top to bottom."""
    before: Token | None = None
    for token in tokens(page):
        if token.type == "fence":
            assert token.map is not None
            said = MARK.search(before.content) if before and before.type == "html_block" else None
            reason = said[1] if said else ""
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, reason)
        before = token


def rows(page: str) -> Iterator[list[str]]:
    """The cells of each row of each table of a page, as they are written."""
    row: list[str] = []
    for token, inside in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type == "tr_open":
            row = []
        elif token.type in ("td_open", "th_open"):
            row.append(inside.content)
        elif token.type == "tr_close":
            yield row


def headings(page: str) -> Iterator[str]:
    """The text of each heading, without its marks."""
    for token, inside in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type == "heading_open":
            yield "".join(t.content for t in inside.children or ())


def links(page: str) -> Iterator[str]:
    """Where the links and images of a page lead."""
    for token in tokens(page):
        for part in token.children or ():
            target = part.attrGet("href") or part.attrGet("src")
            if target is not None:
                yield str(target)
