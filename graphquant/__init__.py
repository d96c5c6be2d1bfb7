"""int8 for transformer encoders: `torch.compile(model, backend="graphquant")`."""

from graphquant.api import explain
from graphquant.config import Config
from graphquant.errors import (
    GraphquantError,
    OptionError,
    ReleasedWeightError,
    RuleError,
    UnsupportedInputError,
)
from graphquant.packed import refresh
from graphquant.report import Outcome, Report

__version__ = "0.1.0"
__all__ = [
    "Config",
    "GraphquantError",
    "OptionError",
    "Outcome",
    "ReleasedWeightError",
    "Report",
    "RuleError",
    "UnsupportedInputError",
    "explain",
    "refresh",
]
