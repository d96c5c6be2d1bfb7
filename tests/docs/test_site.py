"""The site: it builds without a warning, shows what there is, and fetches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import graphquant
from tests.docs.pages import ROOT

pytest.importorskip("mkdocstrings", reason="THE SITE IS NOT BUILT: pip install '.[docs]'")

from mkdocs.exceptions import PluginError

from tools import site
from tools.docstrings import markdown


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.slow  # `make docs` builds it as well
def test_every_public_name_has_an_entry_with_its_docstring(built: Path) -> None:
    page = (built / "reference" / "graphquant.html").read_text()
    page += (built / "reference" / "calibration.html").read_text()
    for name in graphquant.__all__:
        shown = (f'id="graphquant.{name}"', f'id="graphquant.calibration.{name}"')
        assert any(anchor in page for anchor in shown), name
    assert "Statistics of all linear inputs of a model" in page  # of Calibration


@pytest.mark.parametrize(
    ("page", "fetches"),
    [
        ('<script src="https://unpkg.com/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.googleapis.com/css">', True),
        ('<img alt="" src=http://example.com/a.png>', True),
        ("<style>@import 'https://example.com/a.css'</style>", True),
        ("<style>a { background: url(https://example.com/a.png) }</style>", True),
        ('<a href="https://example.com">', False),
        ('<link rel="canonical" href="https://example.com">', False),
        ('<script src="assets/x.js"></script><img src="a.png">', False),
    ],
)
def test_a_page_that_fetches_something_ends_the_build(
    page: str, fetches: bool, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(page)
    if fetches:
        with pytest.raises(PluginError, match="fetches from the network"):
            site.on_post_build({"site_dir": str(tmp_path)})
    else:
        site.on_post_build({"site_dir": str(tmp_path)})


def test_columns_of_a_docstring_become_a_list() -> None:
    docstring = """How far.

        model    a module, which
                 stays
        smoothed how: it fills the column
        M, N, K  sizes

        Plain text, `x`.
        """
    assert markdown(docstring) == (
        "How far.\n\n"
        "`model`\n:   a module, which stays\n\n"
        "`smoothed`\n:   how: it fills the column\n\n"
        "`M, N, K`\n:   sizes\n\n"
        "Plain text, `x`."
    )


def test_other_columns_of_a_docstring_stay_as_they_are() -> None:
    shapes = "x     [..., K]  float32\n-> y  [..., K]  int8"
    assert markdown(shapes) == "    x     [..., K]  float32\n    -> y  [..., K]  int8"
    indented = "An op.\n\n    y = f(x)    float32"
    assert markdown(indented) == indented
