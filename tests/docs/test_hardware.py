"""The page on hardware says what the code's table says, which `doctor` and reports print."""

from __future__ import annotations

import re

import pytest

from graphquant.ops.runtime.chips import COMPILED, GPUS, RAN, Gpu
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/hardware.md").read_text()
SOURCES = PAGE.partition("Sources, as read:")[2].partition("## ")[0]


def cells(first: str) -> list[str]:
    """The row of the table whose first cell this is."""
    row = re.search(rf"^\| {re.escape(first)} \|(.*)\|$", PAGE, re.MULTILINE)
    assert row is not None, f"no row for {first}"
    return [cell.strip() for cell in row[1].split("|")]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_gpu_has_the_same_numbers_on_the_page(gpu: Gpu) -> None:
    sm, bf16, fp8, int8, bandwidth, source, pays = cells(gpu.name)
    assert sm == f"sm_{gpu.sm}"
    assert fp8 == ("none" if gpu.fp8 is None else str(gpu.fp8))
    assert (float(bf16), float(int8), float(bandwidth)) == (gpu.bf16, gpu.int8, gpu.bandwidth)
    for letter in re.findall(r"\[(\w)\]", source):
        assert re.search(rf"\[{letter}\]\s[^|]*\]\(https://", SOURCES), "its source is linked"
    assert ("int8" in pays) == (gpu.int8 > gpu.bf16)


def test_the_page_says_where_graphquant_ran_and_for_what_it_is_compiled() -> None:
    said = re.findall(r"^\| ((?:sm_\d+(?:, )?)+) \|.*\| (.*) \|$", PAGE, re.MULTILINE)
    ran = {sm for targets, how in said if "tests run on" in how for sm in targets.split(", ")}
    never = {sm for targets, how in said if "never run on" in how for sm in targets.split(", ")}
    assert ran == {f"sm_{sm}" for sm in RAN}
    assert never == {f"sm_{sm}" for sm in COMPILED} - ran
