"""One set of tests for two devices: `pytest --device cpu` (default) and `pytest --device cuda`.

On the CPU the Triton kernels run in Triton's interpreter, on CUDA for real. The variable that says
so is read when triton is imported, so it is set here, before any test module is.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from torch import Tensor

settings.register_profile(
    "ci", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=600)
# nearly every example compiles a kernel: few, and the same ones each time, so that a run takes
# minutes and can be repeated. HYPOTHESIS_PROFILE=nightly has others, and more.
settings.register_profile("gpu", settings.get_profile("ci"), max_examples=12, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

os.environ.setdefault("GRAPHQUANT_VERIFY", "1")  # every graph of every test, after every pass

# Dynamo collects garbage after every compile, of which there are thousands here. Tests of what is
# freed collect it themselves.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

NEEDS_GPU = "NOT RUN: needs an NVIDIA GPU and `pytest --device cuda`"

NEEDS_RELEASE = "NOT RUN: installs torch in new environments, `make release` does it"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--release", action="store_true", help="also install the wheel: minutes, GB")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where ops run")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["GRAPHQUANT_STRICT"] = "1"  # what fails in graphquant fails the test
    os.environ["GRAPHQUANT_SELECT"] = "always"  # small models: int8 is rarely the faster one
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        return
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no NVIDIA GPU on this machine")
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are compared to 1e-5
    if "HYPOTHESIS_PROFILE" not in os.environ:
        settings.load_profile("gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))
    else:
        left_out = [item for item in items if not _uses_gpu(item)]
        items[:] = [item for item in items if _uses_gpu(item)]
        config.hook.pytest_deselected(items=left_out)
    if not config.getoption("--release"):
        for item in items:
            if item.get_closest_marker("release"):
                item.add_marker(pytest.mark.skip(reason=NEEDS_RELEASE))


def _uses_gpu(item: pytest.Item) -> bool:
    """Does a test compute anything else with --device cuda than it does without?"""
    if item.get_closest_marker("cpu"):
        return False
    uses = "device" in getattr(item, "fixturenames", ())
    return uses or item.get_closest_marker("cuda") is not None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave out what costs the same for every test, whatever it tests."""
    import torch._dynamo.guards

    if hasattr(torch._dynamo.guards, "profile_guard_manager"):
        # 20 ms of each compile: it empties the processor's cache to time the guards, for a log
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    _freeze()


@pytest.fixture(autouse=True, scope="module")
def _freeze_what_a_file_leaves() -> Iterator[None]:
    yield
    _freeze()


def _freeze() -> None:
    """Modules and torch's caches stay: collections, which tests of what is freed make many of, need
    not look through them again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = sum(NEEDS_GPU in str(report.longrepr) for report in skipped)
    if left_out:
        terminalreporter.write_line(f"{left_out} tests NOT RUN: they need a GPU", yellow=True)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" or "cuda": where this run's tensors live."""
    chosen: str = request.config.getoption("--device")
    return chosen


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that an earlier test compiled, and no autograd."""
    import torch

    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def seeded_dynamo() -> None:
    """Nothing that an earlier test compiled, and the same random numbers for each test."""
    import torch

    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def x(device: str) -> Tensor:
    """An input of tests.small.Mlp, [8, 64] float32."""
    import torch

    from tests.small import seeded

    made: Tensor = seeded(lambda: torch.randn(8, 64)).to(device)
    return made
