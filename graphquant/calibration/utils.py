"""Model-Optimizer's helpers: the names of `graphquant.calibration.modelopt.utils`."""

from graphquant.calibration.modelopt.utils import *  # noqa: F403
