"""For TensorRT: `graphquant.tensorrt.qdq(program)`. Imports neither TensorRT nor Torch-TensorRT."""

from graphquant.exporters.tensorrt import qdq

__all__ = ["qdq"]
