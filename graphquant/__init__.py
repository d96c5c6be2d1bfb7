"""int8 for transformer encoders: `torch.compile(model, backend="graphquant")`."""

from graphquant import onnx, tensorrt
from graphquant.accuracy.budget import Budget, LeftInFloat
from graphquant.accuracy.report import AccuracyReport, OutputAccuracy, SiteAccuracy
from graphquant.api import calibrate, compare, explain, export, fit_budget, standalone
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
from graphquant.exporters.torchscript import torchscript
from graphquant.inplace import LiveReport, optimize_, restore_
from graphquant.lowering import inductor as lowering
from graphquant.report import Outcome, Report
from graphquant.weights.versions import refresh

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
