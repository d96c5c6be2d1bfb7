"""What the pages list is what there is: options, names, rules, ops."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import graphquant
import graphquant.calibration
from graphquant.ops import OPS
from graphquant.passes import rules
from graphquant.passes.pipeline import INT8_RULES
from tests.docs.pages import DOCS, ROOT, blocks, headings, rows

OPTIONS = "docs/options.md"
CODE = re.compile(r"`([^`]+)`")


def defaults() -> dict[str, Any]:
    """Of every option."""
    config = graphquant.Config()
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def shown(page: str) -> Iterator[tuple[str, str]]:
    """(option, default) of each row of the page's table of options: | `include` | `()` | ... |"""
    for names, default in (row[:2] for row in rows(page) if len(row) == 3):
        if value := CODE.fullmatch(default):
            for name in CODE.findall(names):
                yield name, value[1]


def test_every_option_has_a_row_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHQUANT_SELECT", raising=False)
    table = dict(shown(OPTIONS))
    for name, value in defaults().items():
        assert name in table, f"{OPTIONS} has no row for {name}"
        assert eval(table[name]) == value, f"{OPTIONS} says that {name} is {table[name]}"
    assert table.keys() == defaults().keys()


def test_the_readme_is_short_and_shows_no_option_that_does_not_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    shown = {
        name
        for block in re.findall(r"options(?: = |=)\{(.*?)\}", text)
        for name in re.findall(r'"(\w+)":', block)
    }
    assert shown and shown <= defaults().keys()


def test_every_option_has_a_paragraph() -> None:
    documented = {name for heading in headings(OPTIONS) for name in re.findall(r"\w+", heading)}
    assert defaults().keys() <= documented


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    identifiers = re.findall(r"^::: (\S+)$", pages, re.M)
    assert len(identifiers) == len(set(identifiers))
    documented = [pkgutil.resolve_name(identifier) for identifier in identifiers]
    for module in (graphquant, graphquant.calibration):
        for name in module.__all__:
            public = getattr(module, name)
            assert any(public is one for one in documented), f"{module.__name__}.{name}"


def test_every_module_of_calibration_that_users_call_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "calibration.md").read_text()
    for name in ("groups", "quantizer", "utils"):
        assert f"::: graphquant.calibration.modelopt.{name}\n" in page


def test_every_rule_has_a_section() -> None:
    files = {module.name for module in pkgutil.iter_modules(rules.__path__)}
    documented = set(headings("docs/rules.md"))
    assert files == {rule.name for rule in INT8_RULES}
    assert files <= documented, f"docs/rules.md has no section for {sorted(files - documented)}"


def test_every_op_has_a_section_with_its_schema() -> None:
    folders = {op.reference.__module__.split(".")[-2] for op in OPS.values()}
    every = {path.parent.name for path in (ROOT / "graphquant" / "ops").glob("*/op.py")}
    assert folders == every
    documented = set(headings("docs/ops.md"))
    assert every <= documented, f"docs/ops.md has no section for {sorted(every - documented)}"
    schemas = [b.text for b in blocks("docs/ops.md") if b.kind == "schema"]
    said = [" ".join(schema.split()) for text in schemas for schema in text.strip().split("\n\n")]
    assert sorted(said) == sorted(str(op.target._schema) for op in OPS.values())


def test_every_kernel_is_named_in_its_op() -> None:
    table = {CODE.findall(row[0])[0]: row[1] for row in rows("docs/ops.md") if "`" in row[0]}
    for op in OPS.values():
        assert tuple(CODE.findall(table[op.name])) == op.files, op.name
