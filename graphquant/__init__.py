"""int8 for transformer encoders: `torch.compile(model, backend="graphquant")`.

Importing this registers the ops, which programs that were exported by graphquant need, and no more:
each public name is imported when it is first used, because torch._dynamo takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from graphquant import ops as ops
from graphquant.lowering.register import when_inductor_is_imported as _register_lowerings

if TYPE_CHECKING:
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
    from graphquant.report import Outcome, Report
    from graphquant.weights.versions import refresh

_register_lowerings()

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

if not TYPE_CHECKING:  # type checkers read the imports above, and see unknown names as errors
    _NAMES = {
        "accuracy.budget": "Budget LeftInFloat",
        "accuracy.report": "AccuracyReport OutputAccuracy SiteAccuracy",
        "api": "calibrate compare explain export fit_budget standalone",
        "calibration": "Calibration",
        "config": "Config",
        "errors": "CalibrationError FileError GraphquantError MissingPackageError OptionError "
        "ReleasedWeightError RuleError UnsupportedInputError VerifyError",
        "exporters.torchscript": "torchscript",
        "inplace": "LiveReport optimize_ restore_",
        "report": "Outcome Report",
        "weights.versions": "refresh",
    }
    _MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
    # `graphquant.onnx.save`, without an import of graphquant.onnx
    _MODULES = ("calibration", "config", "errors", "metrics", "onnx", "report", "tensorrt")

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"graphquant.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'graphquant' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"graphquant.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value

    def __dir__() -> list[str]:
        return sorted({*__all__, *_MODULES, "__version__", "ops"})
