"""Links between the pages lead somewhere."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import DOCS, NAMES, ROOT, headings, links


def anchor(heading: str) -> str:
    """Of a heading, as GitHub and MkDocs both make it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", NAMES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page: str) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, fragment = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f"{page} links to {link}: there is no {path}"
        if fragment:
            name = str(file.resolve().relative_to(ROOT))
            assert fragment in map(anchor, headings(name)), f"{page} links to {link}: no heading"


@pytest.mark.parametrize("page", [p for p in NAMES if p.startswith("docs/")])
def test_pages_of_the_site_link_to_nothing_outside_of_it(page: str) -> None:
    for link in links(page):
        if not re.match(r"https?://|#", link):
            file = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            assert file.is_relative_to(DOCS), f"{page} links to {link}, which the site has not"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for page in NAMES:
        if page.startswith("docs/"):
            assert page.removeprefix("docs/") in site, f"mkdocs.yml does not name {page}"
