"""ONNX export of an exported program, in the operator patterns that runtimes have kernels for."""

from __future__ import annotations

import logging
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument

from graphquant._torch import has_vnni, tree_leaves_with_path, tree_unflatten
from graphquant.errors import MissingPackageError, OptionError, UnsupportedInputError
from graphquant.exporters.onnx_ops import Form, translations
from graphquant.exporters.program import require_program, unpack_weights
from graphquant.exporters.scales import dynamic_linears

log = logging.getLogger(__name__)

PROFILES = ("cpu", "portable", "qdq")
WEIGHT_BITS = (7, 8)
OPSET = 20  # the first with Gelu
ROUNDING = ("Cast", "Mul", "Round")  # operators that round 8-bit weights to 7 in a translated graph
KEPT = {"namespace", "pkg.torch.onnx.name_scopes"}  # metadata of a node: the modules it is in
_HALF_DTYPES = (torch.float16, torch.bfloat16)


def save(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    profile: str = "cpu",
    weight_bits: int = 8,
    external_data: bool = False,
) -> None:
    """Write an exported program as an ONNX file of standard operators (opset 20).

    program      what `graphquant.export` returned; not modified
    path         of the file, usually *.onnx
    profile      "cpu": uint8 activations, int8 weights, in the patterns that onnxruntime's CPU
                 execution provider fuses; float32 models only
                 "portable": int8 activations, int8 weights: correct wherever MatMulInteger is
                 supported, and rarely fast
                 "qdq": float products between QuantizeLinear and DequantizeLinear, one symmetric
                 scale per activation and one per output channel, as TensorRT expects; float32
                 models, exported with `activation="static"` and a calibration
    weight_bits  8, or 7 for profile "cpu" on x86 without VNNI: see below
    external_data  write the weights to a separate file, path + ".data"; always done above 2 GB

    Inputs have the names of the model's arguments, outputs those of the fields of what it returns
    ("last_hidden_state"), "output" for a single tensor and "output_0", ... for a tuple. Sizes that
    are dynamic in the export are dynamic in the file.

    On x86 without VNNI (before Cascade Lake and Zen 4) onnxruntime adds pairs of uint8 x int8
    products in 16 bits, which can overflow: results are then silently wrong. For such machines
    either save with `weight_bits=7`, which cannot overflow and rounds weights twice as coarsely, or
    set the session option session.x64quantprecision to "1" there, which selects other instructions:
    correct with 8 bits, and a third slower. A warning is logged on such a machine.

    Raises OptionError for an invalid option, also for one that this profile does not take;
    UnsupportedInputError for anything but an ExportedProgram, for float16 or bfloat16 where float32
    is needed, and under "qdq" for linears with dynamic scales; MissingPackageError without
    onnxscript; and what torch.onnx.export raises for operators that it cannot translate.
    """
    if profile not in PROFILES:
        raise OptionError(f"profile={profile!r} is not one of {', '.join(map(repr, PROFILES))}")
    if weight_bits not in WEIGHT_BITS or isinstance(weight_bits, bool):
        raise OptionError(f"weight_bits={weight_bits!r} is neither 7 nor 8")
    if weight_bits == 7 and profile != "cpu":
        raise OptionError(f"weight_bits=7 is for profile 'cpu', not {profile!r}: nothing overflows")
    require_program("onnx.save", program)
    program = unpack_weights(program)
    if profile != "portable":
        _require_float32(program, profile)
    if profile == "qdq":
        _require_static(program)
    if profile == "cpu" and weight_bits == 8 and _overflows_here():
        log.warning(
            "this processor has no VNNI: onnxruntime's products of 8-bit weights overflow on it. "
            'Save with weight_bits=7, or set the session option session.x64quantprecision to "1"'
        )
    try:
        from onnxscript import opset20
    except ImportError as missing:
        raise MissingPackageError("ONNX files need pip install graphquant[onnx]") from missing

    form = Form(unsigned=profile == "cpu", weight_bits=weight_bits, static=profile == "qdq")
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=dict(translations(form, opset20)),
        output_names=_output_names(program),
        optimize=False,  # done below, after weights are named
        verbose=False,
    )
    assert onnx_program is not None
    _name_weights(onnx_program.model.graph)
    onnx_program.optimize()
    if weight_bits == 7:
        _round_weights(onnx_program.model)
    _drop_source_metadata(onnx_program.model.graph)
    onnx_program.save(path, external_data=external_data)


def _name_weights(graph: Any) -> None:
    """Name transposed weights after the weight: "layers.0.fc1.wq.T"."""
    for node in graph:
        if node.op_type != "Transpose":
            continue
        value, producer = node.inputs[0], node.inputs[0].producer()
        while producer is not None and producer.op_type in ROUNDING:
            value, producer = producer.inputs[0], producer.inputs[0].producer()
        if value.is_initializer() and value.dtype.name == "INT8":
            node.outputs[0].name = f"{value.name}.T"


def _round_weights(model: Any) -> None:
    """Fold the rounding to 7 bits into the weights: by default large constants are not folded."""
    from onnxscript.optimizer import fold_constants

    fold_constants(model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)


def _drop_source_metadata(graph: Any) -> None:
    """Remove the Python source lines and local paths that torch.onnx attaches to every node: most
    of a small file, and private."""
    for node in graph:
        for key in node.metadata_props.keys() - KEPT:
            del node.metadata_props[key]


def _output_names(program: ExportedProgram) -> list[str]:
    """The name of each output tensor: "last_hidden_state", "hidden_states.0"."""
    signature, spec = program.graph_signature, program.call_spec.out_spec
    assert spec is not None
    outputs = [s.arg for s in signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    paths = [
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        for path, output in tree_leaves_with_path(tree_unflatten(outputs, spec))
        if isinstance(output, TensorArgument)
    ]
    names = [f"output_{p}".rstrip("_") if not p or p[0].isdigit() else p for p in paths]
    return [f"{name}_out" if name in signature.user_inputs else name for name in names]


def _require_float32(program: ExportedProgram, profile: str) -> None:
    """Refuse fp16 and bf16: onnxruntime's CPU kernels are float32, and TensorRT picks its own
    precision."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in _HALF_DTYPES:
            short = str(value.dtype).removeprefix("torch.")
            raise UnsupportedInputError(
                f"profile {profile!r} needs a float32 model, but {node.name} is {short}: export "
                "model.float(), or use profile='portable'"
            )


def _require_static(program: ExportedProgram) -> None:
    """Refuse dynamic scales, naming their linears."""
    if dynamic := list(dynamic_linears(program)):
        raise UnsupportedInputError(
            f"profile 'qdq' needs static scales, but those of {', '.join(dynamic)} are dynamic: "
            'export with activation="static" and a calibration that has seen them, or with '
            "exclude= to leave them in float"
        )


def _overflows_here() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return x86 and not has_vnni()
