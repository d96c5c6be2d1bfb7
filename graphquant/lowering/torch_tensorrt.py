"""Torch-TensorRT's backend runs the rewritten graph: engines around graphquant's ops.

TensorRT knows none of these ops. They stay with PyTorch, and each stretch between two of them that
is long enough becomes an engine. Packed weights are inputs of the ops and of no engine, so they
follow the model's weights as under Inductor. Whole engines in int8: exporters/tensorrt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from graphquant._torch.dynamo import lookup_backend
from graphquant.config import Config
from graphquant.errors import MissingPackageError


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """A callable with the graph's inputs as arguments.

    Raises MissingPackageError where Torch-TensorRT is not installed.
    """
    try:
        import torch_tensorrt  # noqa: F401 registers the backend
    except ModuleNotFoundError as error:
        if error.name != "torch_tensorrt":
            raise
        raise MissingPackageError(
            'inner="torch_tensorrt" needs Torch-TensorRT: pip install "graphquant[tensorrt]"'
        ) from error
    backend = lookup_backend("torch_tensorrt")
    compiled: Callable[..., Any] = backend(gm, list(example_inputs), options=dict(config.tensorrt))
    return compiled
