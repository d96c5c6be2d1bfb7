"""Buffers of an export get free names, whatever the model's own parameters are called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import graphquant
from tests import zoo
from tests.small import NEAR, Model, error, seeded


def test_a_weight_that_is_a_parameter_of_the_model_itself_is_exported() -> None:
    model = seeded(
        lambda: Model(lambda m, x: F.linear(x, m.w), w=nn.Parameter(torch.randn(32, 64)))
    )
    x = torch.randn(4, 64)
    program = graphquant.export(model, (x,))
    assert list(program.state_dict) == ["w_1.wq", "w_1.w_scale", "w_1.w_sum"]
    assert error(program.module()(x), model(x)) < NEAR


def test_a_linear_that_reads_a_parameter_is_named_after_its_weight() -> None:
    """The pooling head of SigLIP: at a fixed batch its query is a constant, already in int8."""
    entry = zoo.SMALL["siglip"]
    args, kwargs = entry.inputs(2)
    program = graphquant.export(entry.build("sdpa"), args, kwargs)
    assert "head.attention.in_proj.xq" in program.state_dict
    assert "head.probe" not in program.state_dict
