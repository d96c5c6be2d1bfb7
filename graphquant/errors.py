"""Exceptions of graphquant."""


class GraphquantError(Exception):
    """Base class of all exceptions of graphquant."""


class OptionError(GraphquantError, ValueError):
    """An option is unknown or has an invalid value. The message lists what is valid."""


class CalibrationError(GraphquantError, ValueError):
    """A calibration is damaged, or belongs to another model. The message names what differs."""


class FileError(CalibrationError, OptionError):
    """A file is not a valid Calibration, Budget or Report. The message names file and field."""


class RuleError(GraphquantError):
    """A rule broke its contract: a bug in graphquant, not in the user's model."""


class VerifyError(GraphquantError):
    """GRAPHQUANT_VERIFY=1 has found that a pass broke the graph: a bug in graphquant."""


class UnsupportedInputError(GraphquantError, TypeError):
    """Arguments of an unsupported type, shape or dtype. The message says what was given."""


class CaptureError(GraphquantError):
    """A graph cannot be traced to ATen. It runs in float."""


class KernelBuildError(GraphquantError, RuntimeError):
    """A CUDA kernel could not be compiled at run time. The message contains the compiler's log."""


class ReleasedWeightError(GraphquantError, RuntimeError):
    """A float weight is needed that `free_weights=True` has released."""


class MissingPackageError(GraphquantError, ImportError):
    """An optional package is not installed. The message says what to install."""
