"""For TensorRT: `graphquant.tensorrt.qdq(program)`. Imports neither TensorRT nor Torch-TensorRT."""

from graphquant.handover.qdq import qdq

__all__ = ["qdq"]
