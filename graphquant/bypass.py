"""A warning when a method is called through what torch.compile returned for a module.

torch.compile compiles calls of the module. Every other method of the result is the original's and
runs eagerly: `torch.compile(clip).get_image_features`, `torch.compile(sentences).encode`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from graphquant._torch import tree_leaves

log = logging.getLogger(__name__)

_told: set[tuple[type, str]] = set()


def telling(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The method of an original module; the first call that computes something is a warning.

    name  by which it was looked up
    """
    cls = type(method.__self__)  # type: ignore[attr-defined]
    if (cls, name) in _told:
        return method

    @functools.wraps(method)
    def tell(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if (cls, name) not in _told and _computed(result):
            _told.add((cls, name))
            log.warning(
                "%s.%s ran eagerly, in float: torch.compile compiles calls of the module, and all "
                "other methods of its result are the original's; graphquant.optimize_(model) "
                "reaches them",
                cls.__name__,
                name,
            )
        return result

    return tell


def _computed(result: Any) -> bool:
    """Is there a tensor or an array in it? Getters and setters return other things."""
    return any(isinstance(leaf, Tensor | np.ndarray | np.floating) for leaf in tree_leaves(result))
