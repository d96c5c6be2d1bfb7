"""Transformer encoders built from configs with random weights, for tests and tools.

Nothing is downloaded. Weights and inputs depend only on the name of an entry, so two builds of one
entry are equal, whatever attention implementation they use. After a model is built its parameters
are drawn again, so that a wrong bias, gamma, beta or layer scale shows up in the numbers: a fresh
model has zero biases, unit gammas and constant layer scales, which hide such mistakes.

Three tables: SMALL (two layers, small widths), EXTRA (more architectures, equally small) and
TRUE_WIDTH (the widths of published checkpoints, one or two layers, few tokens).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.zoo import audio, blocks, text, vision
from tests.zoo.entry import BOTH, Entry, Inputs, hf, seeded
from tests.zoo.inputs import image

__all__ = [
    "BOTH",
    "EXTRA",
    "SMALL",
    "TABLES",
    "TRUE_WIDTH",
    "Entry",
    "Inputs",
    "hf",
    "image",
    "load",
]

SMALL = vision.SMALL | text.SMALL | audio.SMALL | blocks.SMALL
EXTRA = text.EXTRA | vision.EXTRA | audio.EXTRA | blocks.EXTRA
TRUE_WIDTH = vision.TRUE_WIDTH
TABLES = {"small": SMALL, "extra": EXTRA, "true": TRUE_WIDTH}


def imported(spec: str, folder: str | None = None) -> Any:
    """The callable of "module:callable"; the module may lie in the folder."""
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    module, _, path = spec.partition(":")
    return attrgetter(path)(importlib.import_module(module))


def users(spec: str, folder: str | None = None) -> Entry:
    """An entry for "module:callable", which returns (module, args, kwargs).

    The callable may take the keywords "attn" and "batch". Without "batch" its inputs are used as
    they are, whatever batch is asked for. Its weights are left alone.
    """
    make = imported(spec, folder)
    taken = inspect.signature(make).parameters
    last: dict[object, Inputs] = {}  # of the last build, so that inputs() need not build again

    def key_of(batch: int, draw: int) -> object:
        return (batch if "batch" in taken else 0), draw

    def call(batch: int, attn: str | None, draw: int = 0) -> nn.Module:
        given = {"attn": attn, "batch": batch}
        with seeded(spec + f"/{draw}" * (draw > 0)):
            module, args, kwargs = make(**{k: v for k, v in given.items() if k in taken and v})
        last.clear()
        last[key_of(batch, draw)] = (tuple(args), dict(kwargs))
        return module.eval()

    def inputs(batch: int, draw: int = 0) -> Inputs:
        key = key_of(batch, draw)
        if key not in last:
            call(batch, None, draw)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, last[key])

    attns = BOTH if "attn" in taken else ("sdpa",)
    return Entry(spec, lambda attn: call(1, attn), inputs, "user", attns)


def load(spec: str, folder: str | None = None) -> Entry:
    """The entry for a name, "name@table" or the user's own "module:callable".

    A bare name is looked up in SMALL, EXTRA and TRUE_WIDTH, in this order; the tables are called
    small, extra and true. The folder is where the module of "module:callable" may lie.
    """
    if ":" in spec:
        return users(spec, folder)
    name, _, where = spec.partition("@")
    if where and where not in TABLES:
        raise KeyError(f"no table {where!r}: one of {', '.join(TABLES)}")
    for entries in [TABLES[where]] if where else TABLES.values():
        if name in entries:
            return entries[name]
    known = [f"{key}@{title}" for title, entries in TABLES.items() for key in entries]
    raise KeyError(f"no model {spec!r}: one of {', '.join(known)}, or module:callable")
