"""Private APIs of torch are used in graphquant/_torch alone, which says in which versions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphquant

PACKAGE = Path(graphquant.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "_torch" not in path.parts]

# Attributes of torch's objects that graphquant/_torch/__init__.py lists as read elsewhere.
LISTED = {
    *("_schema", "_overloadname", "_erased", "_parameters", "_buffers"),
    *("_call_impl", "_compiled_call_impl"),
}
OTHERS = {"_asdict", "_getframe"}  # of namedtuples and sys


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own(tree: ast.Module) -> Iterator[str]:
    """Every name that a file defines, as a variable, a function, a class or an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] * (ast.unparse(node.value) in ("self", "parent"))


OWN = {name for path in FILES for name in own(ast.parse(path.read_text()))}


def found(source: str) -> list[str]:
    """What a file takes from torch by a private name."""
    tree = ast.parse(source)
    seen = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            operator = path.startswith(("torch.ops.", "aten."))
            if private(node.attr) and not operator and node.attr not in OWN | LISTED | OTHERS:
                seen.append(path)
            continue
        else:
            continue
        for path in paths:
            first, *rest = path.split(".")
            if first == "torch" and any(map(private, rest)):
                seen.append(path)
    return seen


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_a_private_name_of_torch(path: Path) -> None:
    assert found(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch._dynamo.source import ConstantSource",
        "from torch.nn.attention import _cur_sdpa_kernel_backends as backends",
        "import torch.utils._pytree",
        "from torch import _C",
        "x = torch._C._set_grad_enabled(True)",
        "isinstance(f, torch._ops.OpOverload)",
        "y.untyped_storage()._cdata",
        "model._orig_mod",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert found(source)


def test_what_is_public_or_ours_is_not() -> None:
    assert not found("from torch.fx import Node\nfrom graphquant._torch import OpOverload")
    assert not found("torch.ops.aten._to_copy.default\nop.target._schema\nx.__class__")


def test_every_attribute_that_is_listed_is_documented_and_used() -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / "_torch" / "__init__.py").read_text())) or ""
    code = "\n".join(path.read_text() for path in FILES)
    for name in LISTED:
        assert f".{name}" in docstring, f"graphquant/_torch does not list {name}"
        assert f".{name}" in code, f"nothing reads {name} any more"
