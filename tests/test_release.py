"""What is published: the sdist, the wheel, their metadata, and that the wheel runs by itself.

`make release` runs all of it; without `--release` nothing is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import graphquant
from tests.docs.pages import ROOT

CACHE = Path(os.environ.get("GRAPHQUANT_RELEASE_CACHE") or ROOT / "build" / "release")
TORCH = {  # version -> the Triton that fits, for CPU builds, which bring none
    "2.11.0": "triton==3.6.*",
    "2.13.0": "triton==3.7.1",
}
VERSION = graphquant.__version__
BUILD = "from hatchling.build import {0}; import sys; print({0}(sys.argv[1]))"
# What hatchling takes from the tree; of a checkout, git knows it. Nothing that is generated.
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h", ".c", ".html", ".typed")

RUNS = """
import sys, torch
assert not any("graphquant" in name for name in sys.modules)  # found by its entry point alone
assert "graphquant" in torch.compiler.list_backends()
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
x, reports = torch.randn(4, 16, 64), []
options = {"select": "always", "on_report": reports.append}
with torch.inference_mode():
    want = model(x)
    got = torch.compile(model, backend="graphquant", options=options)(x)
import graphquant
error = ((got - want).norm() / want.norm()).item()
coverage = graphquant.Report.merge(reports).coverage
print(torch.__version__, graphquant.__file__, coverage, error)
assert coverage == 1.0 and 0 < error < 0.02, (coverage, error)
"""


def ran(*words: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints, in an environment in which this checkout is not found."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def built(kind: str, tree: Path, into: Path) -> Path:
    """The `wheel` or `sdist` of a source tree."""
    if find_spec("hatchling") is None:
        pytest.skip("NOT RUN: needs hatchling, which pip install '.[test]' brings")
    code = BUILD.format(f"build_{kind}")
    out = ran(sys.executable, "-c", code, into, cwd=tree, PYTHONPATH=os.pathsep.join(sys.path))
    return into / out.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def files(wheel: Path) -> dict[str, bytes]:
    return contents(wheel)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist's tree, away from this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"graphquant-{VERSION}"


@pytest.fixture(scope="module")
def metadata(files: dict[str, bytes]) -> Message:
    return Parser().parsestr(files[f"graphquant-{VERSION}.dist-info/METADATA"].decode())


# --- files ----------------------------------------------------------------------------------------


def sources(tree: Path) -> set[str]:
    package = tree / "graphquant"
    return {str(f.relative_to(tree)) for f in package.rglob("*") if f.suffix in SOURCES}


def test_the_wheel_has_every_source_of_the_package_and_nothing_else(
    files: dict[str, bytes],
) -> None:
    info = f"graphquant-{VERSION}.dist-info"
    rest = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert set(files) == sources(ROOT) | {f"{info}/{name}" for name in rest}
    kinds = {Path(name).suffix for name in files}
    assert {".cu", ".cuh", ".cpp", ".h", ".c"} <= kinds and "graphquant/py.typed" in files
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_a_wheel_from_the_sdist_is_the_wheel_from_the_tree(
    files: dict[str, bytes], unpacked: Path, tmp_path: Path
) -> None:
    again = contents(built("wheel", unpacked, tmp_path))
    assert set(again) == set(files)
    assert not [name for name in files if again[name] != files[name]]


def test_the_sdist_has_the_tests_and_pages_and_nothing_generated(unpacked: Path) -> None:
    there = {f.relative_to(unpacked).as_posix() for f in unpacked.rglob("*") if f.is_file()}
    assert sources(unpacked) == sources(ROOT)
    for name in ("LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile", "tests/conftest.py",
                 "tests/test_release.py", "tools/mutants.py", "docs/index.md"):  # fmt: skip
        assert name in there
    assert not [n for n in there if re.search(r"__pycache__|\.pyc$|^build/|^dist/|\.venv", n)]


# --- metadata -------------------------------------------------------------------------------------


def test_the_version_is_in_one_place_and_the_changelog_begins_with_it(metadata: Message) -> None:
    assert metadata["Version"] == VERSION
    assert VERSION not in (ROOT / "pyproject.toml").read_text()
    first = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == VERSION


def test_the_metadata_is_what_an_index_shows(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    classifiers = set(metadata.get_all("Classifier", ()))
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= classifiers


def test_few_packages_come_with_it(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist", ())
    always = {re.split(r"[^\w-]", r)[0] for r in required if "extra ==" not in r}
    assert always == {"torch", "filelock", "numpy", "rich", "safetensors", "tqdm"}


def test_extras_are_those_that_the_first_page_and_the_makefile_name(metadata: Message) -> None:
    page, makefile = ((ROOT / name).read_text() for name in ("docs/index.md", "Makefile"))
    table = page.partition("| extra | for |")[2].partition("\n\n")[0]
    cells = (row.split("|")[1] for row in table.splitlines() if row)
    told = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    made = set(",".join(re.findall(r"'\.\[([\w,]+)\]'", makefile)).split(","))
    assert set(metadata.get_all("Provides-Extra", ())) == told | made


def test_torch_finds_the_backend_by_its_entry_point(files: dict[str, bytes]) -> None:
    text = files[f"graphquant-{VERSION}.dist-info/entry_points.txt"].decode()
    assert text.split("\n")[:2] == [
        "[torch_dynamo_backends]",
        "graphquant = graphquant.backend:graphquant",
    ]


# --- installed ------------------------------------------------------------------------------------


@pytest.mark.release
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("torch", TORCH)
def test_the_wheel_installs_and_runs_in_an_environment_of_its_own(
    torch: str, wheel: Path, tmp_path: Path
) -> None:
    """int8 by the entry point, with every linear in it and a result near float."""
    folder = CACHE / f"torch-{torch}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    has_torch = f"torch=={torch}"
    ran(*pip, has_torch, TORCH[torch], cwd=tmp_path)
    ran(*pip, "--force-reinstall", "--no-deps", wheel, cwd=tmp_path)
    ran(*pip, wheel, has_torch, cwd=tmp_path)  # its dependencies, and they agree
    said = ran(python, "-c", RUNS, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    version, file, *_ = said.split()
    assert version.partition("+")[0] == torch and Path(file).is_relative_to(folder)
    ran(python, "-m", "graphquant", "--help", cwd=tmp_path)
