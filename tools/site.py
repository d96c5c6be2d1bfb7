"""The site loads nothing from the network: a hook of MkDocs, named in mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

# What a browser fetches by itself when it opens a page. Links are for readers to follow.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|embed)\b[^>]*\ssrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\shref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|(?:@import\s+|url\()\s*["']?(?:https?:)?//[^"')\s]+"""
)


def on_post_build(config: Any, **_: Any) -> None:
    """Raise PluginError, which ends the build, if a page or style sheet fetches something."""
    for file in sorted(Path(config["site_dir"]).rglob("*")):
        if file.suffix in (".html", ".css") and (hit := FETCHED.search(file.read_text())):
            raise PluginError(f"{file} fetches from the network: {hit[0]}")
