"""A model in another runtime, on the CPU: onnxruntime and OpenVINO, from the float32 model."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 4  # random ones, for static scales

Run = Callable[[list[Any]], Any]  # of the inputs' arrays, in order: the first result
Make = Callable[[nn.Module, dict[str, Tensor]], Run]


class Runtime:
    """Converts the model at the first call, for inputs of these sizes, and calls what it became,
    with as many threads as torch has then."""

    def __init__(self, make: Make, model: nn.Module) -> None:
        self._make = make
        self._model = model
        self._run: Run | None = None

    def __call__(self, **kwargs: Tensor) -> list[Tensor]:
        """The first tensor that the model returns."""
        if self._run is None:
            with torch.inference_mode(False), contextlib.redirect_stdout(sys.stderr):
                given = {k: v.clone() for k, v in kwargs.items()}  # no inference tensors
                with torch.no_grad():
                    self._run = self._make(self._model, given)
        return [torch.from_numpy(self._run([v.numpy() for v in kwargs.values()]))]


def _onnxruntime(model: nn.Module, kwargs: dict[str, Tensor]) -> Run:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        wide, int8 = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        program = torch.export.export(model, (), kwargs)
        torch.onnx.export(program, f=wide, dynamo=True, verbose=False)
        linears = ["MatMul"]  # ConvInteger is slower than the float convolution
        quantize_dynamic(wide, int8, per_channel=True, op_types_to_quantize=linears)
        session = onnxruntime.InferenceSession(int8, options)
    first = [session.get_outputs()[0].name]
    return lambda arrays: session.run(first, dict(zip(kwargs, arrays, strict=True)))[0]


def _openvino(model: nn.Module, kwargs: dict[str, Tensor], *, int8: bool) -> Run:
    import openvino

    converted = openvino.convert_model(torch.export.export(model, (), kwargs))
    settings = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    if int8:
        import nncf

        samples = [[_random_like(v).numpy() for v in kwargs.values()] for _ in range(SAMPLES)]
        how = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": SAMPLES}
        converted = nncf.quantize(converted, nncf.Dataset(samples), **how)
    else:
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    return lambda arrays: request.infer(arrays, share_inputs=True, share_outputs=True)[0]


def _random_like(v: Tensor) -> Tensor:
    """Pixels, or words among those that were given."""
    is_pixels = v.is_floating_point()
    return torch.randn_like(v) if is_pixels else torch.randint_like(v, 0, int(v.max()) + 1)


RUNTIMES: dict[str, tuple[Make, tuple[str, ...]]] = {  # with the packages that they need
    "onnxruntime-int8": (_onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    "openvino-bf16": (functools.partial(_openvino, int8=False), ("openvino",)),
    "openvino-int8": (functools.partial(_openvino, int8=True), ("openvino", "nncf")),
}
