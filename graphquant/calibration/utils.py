"""Model-Optimizer's helpers: alias of `graphquant.calibration.modelopt.utils`."""

from graphquant.calibration.modelopt.utils import *  # noqa: F403
