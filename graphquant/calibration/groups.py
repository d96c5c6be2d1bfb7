"""Shared scales: alias of `graphquant.calibration.modelopt.groups`."""

from graphquant.calibration.modelopt.groups import *  # noqa: F403
