"""What becomes of a graph when graphquant itself fails: it runs in float, and says what failed.

A fault in a pass, a kernel that cannot be built, memory that does not suffice for the int8 weights:
none of them is the user's, and the model as it stands still runs. GRAPHQUANT_STRICT=1 raises
instead. What the user asked for and cannot be is always raised.
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

# What is no failure: mistakes in what was asked for, and torch.compile's own ways to start again.
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
    """A part of what graphquant does when it compiles.

    An exception that leaves this block says where it comes from: `what_failed` tells. How long it
    took is in `torch._dynamo.utils.compile_times()`, as "graphquant: normalize".
    """
    try:
        with dynamo_timed(f"graphquant: {name}"):
            yield
    except Exception as error:
        if not hasattr(error, _STAGE):
            setattr(error, _STAGE, name)
        raise


def what_failed(error: Exception) -> str:
    """ "normalize failed: ValueError: ... (passes/normalize.py:87)"."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}{': ' if lines else ''}{lines[0] if lines else ''}"
    steps = ((Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__))
    ours = [
        f"{file.relative_to(_HERE).as_posix()}:{n}" for file, n in steps if _HERE in file.parents
    ]
    where = f" ({ours[-1]})" if ours else ""
    return f"{getattr(error, _STAGE, 'the rewrite')} failed: {said}{where}"


def what_to_do(error: Exception) -> str:
    """The end of a message about it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "With more free memory it would be int8"
    if isinstance(error, KernelBuildError):
        return "The message says what is needed to build graphquant's kernels"
    return (
        "This is a bug in graphquant: please report it, with the model and the traceback that "
        "GRAPHQUANT_STRICT=1 raises"
    )


@contextmanager
def promised(entry: str) -> Iterator[None]:
    """For entries that promise int8: a failure in here is raised as one error that says so."""
    try:
        yield
    except Exception as error:
        cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        if not entry or strict() or not hasattr(cause, _STAGE) or isinstance(cause, NEVER_CAUGHT):
            raise
        raise GraphquantError(f"{entry}: {what_failed(cause)}. {what_to_do(cause)}") from error
