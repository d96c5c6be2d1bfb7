"""Graphs are made as in the tests of the passes."""

from tests.passes.conftest import _seeded_inference as _seeded_inference
