"""Internal failures: the graph runs in float instead, and the report says what failed.

A bug in a pass, a kernel that cannot be built or too little memory for the int8 weights is not the
user's fault, and the float model still runs. GRAPHQUANT_STRICT=1 raises instead. Requests that
cannot be met are always raised.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from graphquant._torch.dynamo import (
    BackendCompilerFailed,
    RestartAnalysis,
    SkipFrame,
    dynamo_timed,
)
from graphquant.config import strict
from graphquant.errors import (
    CalibrationError,
    GraphquantError,
    KernelBuildError,
    MissingPackageError,
    OptionError,
    ReleasedWeightError,
)
from graphquant.utils.progress import phase

# Not failures: invalid requests, and torch.compile's own control flow.
NEVER_CAUGHT: tuple[type[Exception], ...] = (
    CalibrationError,
    MissingPackageError,
    OptionError,
    ReleasedWeightError,
    RestartAnalysis,
    SkipFrame,
)
_STAGE = "_graphquant_stage"
_HERE = Path(__file__).parent


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Label exceptions that leave this block with the stage, for `what_failed`, record its time as
    "graphquant: normalize" in `torch._dynamo.utils.compile_times()`, and show it (`progress`)."""
    try:
        with dynamo_timed(f"graphquant: {name}"), phase(name):
            yield
    except Exception as error:
        if not hasattr(error, _STAGE):
            setattr(error, _STAGE, name)
        raise


def what_failed(error: Exception) -> str:
    """ "normalize failed: ValueError: ... (passes/normalize.py:87)"."""
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}{': ' if lines else ''}{lines[0] if lines else ''}"
    frames = ((Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__))
    ours = [
        f"{file.relative_to(_HERE).as_posix()}:{n}" for file, n in frames if _HERE in file.parents
    ]
    where = f" ({ours[-1]})" if ours else ""
    return f"{getattr(error, _STAGE, 'the rewrite')} failed: {message}{where}"


def what_to_do(error: Exception) -> str:
    """Advice for the end of a message about a failure."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "With more free memory it would be int8"
    if isinstance(error, KernelBuildError):
        return "The message says what is needed to build graphquant's kernels"
    return (
        "This is a bug in graphquant: please report it, with the model and the traceback that "
        "GRAPHQUANT_STRICT=1 raises"
    )


@contextmanager
def raise_failures(entry: str) -> Iterator[None]:
    """Raise failures as GraphquantError, for entry points without a fallback (`entry` not "")."""
    try:
        yield
    except Exception as error:
        cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        if not entry or strict() or not hasattr(cause, _STAGE) or isinstance(cause, NEVER_CAUGHT):
            raise
        raise GraphquantError(f"{entry}: {what_failed(cause)}. {what_to_do(cause)}") from error
