"""Registers graphquant's lowerings when Inductor is imported, without importing it earlier.

A process that loads an exported program imports graphquant for its ops, and may then compile the
program with Inductor, which only looks into its own table of lowerings. Importing that table takes
two seconds, too long for `import graphquant`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "torch._inductor.lowering"


OURS = "graphquant.lowering.inductor"  # registers itself at the end of its import


def when_inductor_is_imported() -> None:
    """Register our lowerings: now if Inductor's are imported, else at the end of their import."""
    if TABLE in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Import hook that registers our lowerings after Inductor's module has executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            if "graphquant._torch.inductor" not in sys.modules:  # else OURS is importing Inductor
                importlib.import_module(OURS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
