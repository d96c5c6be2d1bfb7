"""Torch-TensorRT as inner backend: engines between graphquant's ops.

TensorRT has no converters for these ops, so they stay in PyTorch, and each subgraph between them
that is large enough becomes an engine. Packed weights are inputs of the ops, not of engines, so
they follow the model's weights as under Inductor. For whole int8 engines: exporters/tensorrt.py.
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
    """The compiled graph: a callable that takes the graph's inputs.

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
