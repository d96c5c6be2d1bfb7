"""What a model's linears read, gathered over data: `graphquant.calibrate`."""

from graphquant.calibration.calibration import Calibration
from graphquant.calibration.record import Record

__all__ = ["Calibration", "Record"]
