"""Every exception this library raises on purpose."""


class GraphquantError(Exception):
    """Base class: catch this to catch us."""


class OptionError(GraphquantError, ValueError):
    """An option is unknown or has a value it cannot have. The message lists what is valid."""


class CalibrationError(GraphquantError, ValueError):
    """A calibration is damaged, or of another model. The message names what differs."""


class FileError(CalibrationError, OptionError):
    """A saved Calibration, Budget or Report is damaged, or is none. The message names the file and
    the field. It is what all of their loaders raise."""


class RuleError(GraphquantError):
    """A rule broke its contract. A bug in graphquant, never in the user's model."""


class VerifyError(GraphquantError):
    """A pass broke the graph, GRAPHQUANT_VERIFY=1 has found. A bug in graphquant."""


class UnsupportedInputError(GraphquantError, TypeError):
    """Arguments for which an op has no meaning or no kernel. The message says what was seen."""


class CaptureError(GraphquantError):
    """A graph that cannot be traced into one that the rules read. It runs as it is, in float."""


class KernelBuildError(GraphquantError, RuntimeError):
    """A CUDA kernel could not be compiled at run time. The message holds the compiler's log."""


class ReleasedWeightError(GraphquantError, RuntimeError):
    """A float weight is needed that `free_weights=True` released."""


class MissingPackageError(GraphquantError, ImportError):
    """Something optional is not installed. The message says what to install."""
