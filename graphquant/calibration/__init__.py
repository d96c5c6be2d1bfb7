"""Statistics of linear inputs, collected by `graphquant.calibrate`."""

from graphquant.calibration.calibration import Calibration
from graphquant.calibration.record import Record

__all__ = ["Calibration", "Record"]
