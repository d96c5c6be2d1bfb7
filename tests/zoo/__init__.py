"""Transformer encoders built from configs with random weights, for tests and tools.

Nothing is downloaded. Weights and inputs depend only on the name of an entry, so two builds of one
entry are equal, whatever attention implementation they use. After a model is built its parameters
are drawn again, so that a wrong bias, gamma, beta or layer scale shows up in the numbers: a fresh
model has zero biases, unit gammas and constant layer scales, which hide such mistakes.

Three tables: SMALL (two layers, small widths), EXTRA (more architectures, equally small) and
TRUE_WIDTH (the widths of published checkpoints, one or two layers, few tokens).
"""

from __future__ import annotations

from tests.zoo import audio, blocks, text, vision
from tests.zoo.entry import BOTH, Entry, Inputs, hf
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


def load(spec: str) -> Entry:
    """The entry for a name, or "name@table".

    A bare name is looked up in SMALL, EXTRA and TRUE_WIDTH, in this order; the tables are called
    small, extra and true.
    """
    name, _, where = spec.partition("@")
    if where and where not in TABLES:
        raise KeyError(f"no table {where!r}: one of {', '.join(TABLES)}")
    for entries in [TABLES[where]] if where else TABLES.values():
        if name in entries:
            return entries[name]
    known = [f"{key}@{title}" for title, entries in TABLES.items() for key in entries]
    raise KeyError(f"no model {spec!r}: one of {', '.join(known)}")
