"""Maxima and sums along dims, against numpy and against what NVIDIA Model-Optimizer gives."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphquant import UnsupportedInputError
from graphquant.calibration.utils import (
    convert_quantization_axis_to_reduce_axis,
    reduce_amax,
    reduce_sum,
)

X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        (None, None),
        (0, [1, 2]),
        (-1, [0, 1]),
        (-2, [0, 2]),
        ([0, -1], [1]),
        ((0, 1, 2), []),
        ((), [0, 1, 2]),
        ((0, -3), [1, 2]),
        (torch.tensor(1), [0, 2]),
    ],
)
def test_all_other_dims_are_reduced(axis: Any, want: list[int] | None) -> None:
    assert convert_quantization_axis_to_reduce_axis(X, axis) == want


def test_a_scale_for_every_element_is_one() -> None:
    """The dims to reduce are none then, which torch takes for all."""
    x = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    axis = convert_quantization_axis_to_reduce_axis(x, (0, 1))
    assert axis == [] and torch.equal(reduce_amax(x, axis), x.abs())
    assert torch.equal(reduce_sum(x, axis), x)
    assert convert_quantization_axis_to_reduce_axis(torch.tensor(3.0), ()) == []


@pytest.mark.parametrize(
    "function", [convert_quantization_axis_to_reduce_axis, reduce_amax, reduce_sum]
)
@pytest.mark.parametrize(
    ("axis", "error"),
    [
        (5, IndexError),
        (-7, IndexError),
        ((0, 5), IndexError),
        (2.0, TypeError),
        ("a", TypeError),
        (True, TypeError),
        (torch.tensor(True), TypeError),
        ((0, 1.0), TypeError),
    ],
)
def test_axes_that_are_none_are_errors(function: Any, axis: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="axis"):
        function(X, axis)
    with pytest.raises(IndexError):
        function(torch.tensor(1.0), 3)
    with pytest.raises(UnsupportedInputError, match="input is a list, needs a tensor"):
        function([1.0], 0)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.data(), shapes, st.booleans())
def test_reductions_are_those_of_numpy(data: Any, shape: list[int], keepdims: bool) -> None:
    dims = st.integers(-len(shape), len(shape) - 1)
    axis = data.draw(st.lists(dims, unique_by=lambda d: d % len(shape), max_size=len(shape)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    want = np.abs(x.numpy()).max(axis=tuple(axis), keepdims=keepdims)
    got = reduce_amax(x, axis, keepdims, squeeze_scalar=False)
    assert np.array_equal(got.numpy(), want)
    squeezed = reduce_amax(x, tuple(axis), keepdims)
    assert squeezed.shape == (() if want.size == 1 else want.shape)
    total = reduce_sum(x.double(), axis, keepdims)
    np.testing.assert_allclose(total, x.double().numpy().sum(axis=tuple(axis), keepdims=keepdims))
    assert float(reduce_amax(x, None, keepdims)) == float(x.abs().max())
    assert reduce_sum(x, None, keepdims).shape == ()


def test_results_of_one_element_are_squeezed_by_default() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0]])
    assert reduce_amax(x, 1).shape == ()
    assert reduce_amax(x, 1, squeeze_scalar=False).shape == (1, 1)
    assert reduce_amax(x, 0).shape == (1, 3) and reduce_amax(x, 0, keepdims=False).shape == (3,)
    assert reduce_sum(x, (0, 1)).shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_the_least_integer_has_a_magnitude(dtype: torch.dtype) -> None:
    least = torch.iinfo(dtype).min
    x = torch.tensor([least, 3], dtype=dtype)
    assert int(reduce_amax(x)) == int(reduce_amax(x, 0)) == -least
    assert reduce_amax(x, ()).tolist() == [-least, 3]
    assert reduce_amax(x.new_tensor([3, -5])).dtype == torch.int64


def test_other_types() -> None:
    assert int(reduce_amax(torch.tensor([-(2**63), 0]))) == 2**63 - 1
    assert reduce_amax(torch.tensor([3, 250], dtype=torch.uint8)).dtype == torch.uint8
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert reduce_amax(X.to(dtype), 0).dtype == dtype
    eight = torch.tensor([1.0, -6.0]).to(torch.float8_e4m3fn)
    assert reduce_amax(eight).dtype == reduce_sum(eight).dtype == torch.get_default_dtype()
    assert float(reduce_amax(eight)) == 6 and float(reduce_sum(eight)) == -5
    for bad in (torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(UnsupportedInputError, match="no order of magnitude"):
            reduce_amax(bad)
    assert int(reduce_sum(torch.tensor([True, True]))) == 2
    assert reduce_sum(torch.ones(2, dtype=torch.int8), 0).dtype == torch.int64
    assert reduce_sum(torch.ones(70000, dtype=torch.float16)) == math.inf


def test_nan_inf_and_gradients() -> None:
    x = torch.tensor([[1.0, math.nan], [-math.inf, 2.0]], requires_grad=True)
    assert reduce_amax(x, 1).flatten().isnan().tolist() == [True, False]
    assert float(reduce_amax(x, 1)[1]) == math.inf and reduce_amax(x).isnan()
    assert not reduce_amax(x).requires_grad and not reduce_sum(x).requires_grad
    for axis in (None, 0, -1):
        if axis is None:
            assert float(reduce_amax(torch.tensor(-3.0), axis)) == 3
    assert reduce_amax(torch.empty(3, 2, device="meta"), 0).shape == (1, 2)


def test_empty_tensors_and_dims_that_are_named_twice() -> None:
    none = torch.empty(0, 3)
    assert reduce_amax(none, 1).shape == (0, 1) and reduce_sum(none).item() == 0
    with pytest.raises(RuntimeError):
        reduce_amax(none)
    with pytest.raises(IndexError):
        reduce_amax(none, 0)
    for function in (reduce_amax, reduce_sum):
        with pytest.raises(RuntimeError, match="multiple times"):
            function(X, (0, -3))


@pytest.mark.parametrize("name", ["groups", "utils"])
def test_the_names_of_model_optimizer_have_a_short_path_too(name: str) -> None:
    short = importlib.import_module(f"graphquant.calibration.{name}")
    long = importlib.import_module(f"graphquant.calibration.modelopt.{name}")
    public = [n for n in vars(long) if not n.startswith("_")]
    assert all(getattr(short, n) is getattr(long, n) for n in getattr(long, "__all__", public))
