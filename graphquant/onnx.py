"""ONNX files of exported programs: `graphquant.onnx.save(graphquant.export(model, args), path)`."""

from graphquant.exporters.onnx import PROFILES, save

__all__ = ["PROFILES", "save"]
