"""int8 for transformer encoders: `torch.compile(model, backend="graphquant")`."""

from graphquant import onnx, tensorrt
from graphquant.accuracy import AccuracyReport, OutputAccuracy, SiteAccuracy
from graphquant.api import calibrate, compare, explain, export, fit_budget, standalone
from graphquant.budget import Budget, LeftInFloat
from graphquant.calibration import Calibration
from graphquant.config import Config
from graphquant.errors import (
    CalibrationError,
    FileError,
    GraphquantError,
    MissingPackageError,
    OptionError,
    ReleasedWeightError,
    RuleError,
    UnsupportedInputError,
    VerifyError,
)
from graphquant.handover import lowering
from graphquant.handover.torchscript import torchscript
from graphquant.inplace import LiveReport, optimize_, restore_
from graphquant.packed import refresh
from graphquant.report import Outcome, Report

lowering.register()  # AOTInductor may compile a program that this process has only loaded

__version__ = "0.1.0"
__all__ = [
    "AccuracyReport",
    "Budget",
    "Calibration",
    "CalibrationError",
    "Config",
    "FileError",
    "GraphquantError",
    "LeftInFloat",
    "LiveReport",
    "MissingPackageError",
    "OptionError",
    "Outcome",
    "OutputAccuracy",
    "ReleasedWeightError",
    "Report",
    "RuleError",
    "SiteAccuracy",
    "UnsupportedInputError",
    "VerifyError",
    "calibrate",
    "compare",
    "explain",
    "export",
    "fit_budget",
    "onnx",
    "optimize_",
    "refresh",
    "restore_",
    "standalone",
    "tensorrt",
    "torchscript",
]
