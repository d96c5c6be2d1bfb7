"""The version of graphquant's source, in the key of Inductor's disk cache."""

from __future__ import annotations

from pathlib import Path

from graphquant.ops.runtime.cache import source_digest


def version() -> str:
    """Hash of graphquant's source: compiled code calls our functions, so code that another version
    left in the cache must not be reused."""
    return f"graphquant {source_digest(Path(__file__).parents[1], '.py', '.cpp', '.h')}"
