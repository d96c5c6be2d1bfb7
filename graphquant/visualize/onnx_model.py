"""An exported ONNX model as lines that a terminal or a page can show.

    lines = read("model.onnx")

torch.onnx.export records for each node which module called it: as metadata (`dynamo=True`) or in
the node's name, "/layers.0/mlp/fc1/MatMul" (`dynamo=False`). A node without either is placed with
its neighbors. Shapes are those in the file and what onnx's shape inference adds. Weights are not
loaded, so a model of any size opens at once. Only the main graph is shown: functions and the bodies
of If and Loop are one line each.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphquant.errors import GraphquantError, MissingPackageError
from graphquant.visualize.lines import Line, short

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto

# `rule` of a line; the names are those of graphquant.visualize.colors.KIND_COLORS
KINDS = {
    "int8 product": "MatMulInteger ConvInteger QLinearMatMul QLinearConv QGemm MatMulIntegerToFloat"
    " DynamicQuantizeMatMul QAttention",
    "quantize": "QuantizeLinear DynamicQuantizeLinear",
    "dequantize": "DequantizeLinear",
    "float product": "MatMul Gemm Conv FusedMatMul FusedGemm FusedConv",
}
_KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops.split()}

SCOPES = "pkg.torch.onnx.name_scopes"  # "['', 'layers.0', 'layers.0.mlp', 'linear']"
FEW = 8  # constants with at most this many elements are written out
LONGEST = 40  # characters of an attribute before it is cut


def read(path: str | Path) -> tuple[Line, ...]:
    """The main graph of a file. `rule` of a line is its kind, one of KINDS, or "".

    Raises MissingPackageError without onnx, OSError if there is no such file, and GraphquantError
    for a file that holds no ONNX model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as missing:
        raise MissingPackageError("--onnx needs onnx: pip install onnx") from missing
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as wrong:
        raise GraphquantError(f"{path} holds no ONNX model: {wrong}") from wrong
    if not model.graph.node:
        raise GraphquantError(f"{path} holds no ONNX model: there is no node in it")
    return tuple(_lines(model.graph, _types(model)))


def _types(model: ModelProto) -> dict[str, str]:
    """Shape and dtype of every value where known: "[2, 17, 64] float32"."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: text for value in known if (text := _type(value.type))}


def _type(kind: TypeProto) -> str:
    if not kind.HasField("tensor_type"):
        return ""
    tensor = kind.tensor_type
    shape = f"[{', '.join(map(_dim, tensor.shape.dim))}]" if tensor.HasField("shape") else ""
    return f"{shape} {_dtype(tensor.elem_type)}".strip()


def _dim(dim: TensorShapeProto.Dimension) -> str:
    if dim.HasField("dim_value"):
        return str(dim.dim_value)
    made_up = dim.dim_param.startswith("unk__")  # by shape inference
    return "?" if made_up or not dim.dim_param else dim.dim_param


def _dtype(number: int) -> str:
    """As torch writes it."""
    from onnx import TensorProto

    name: str = TensorProto.DataType.Name(number).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _lines(graph: GraphProto, types: Mapping[str, str]) -> Iterator[Line]:
    constants = {c.name: _constant(c) for c in graph.initializer}
    constants |= {
        node.output[0]: _constant(node.attribute[0].t, node.output[0])
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    owner: dict[str, str] = {}  # value -> the line that makes it
    for value in graph.input:
        if value.name not in constants:  # old files list their weights here as well
            owner[value.name] = value.name
            yield Line(value.name, (value.name,), "input", "input", _known([value.name], types))
    nodes = [node for node in graph.node if node.output[0] not in constants]
    for i, (node, path) in enumerate(zip(nodes, _paths(nodes), strict=True)):
        name = next(filter(None, node.output), f"node {i}")
        owner |= dict.fromkeys(filter(None, node.output), name)
        yield Line(
            node=name,
            names=tuple(output or "_" for output in node.output),
            op=node.op_type,
            call=f"{node.op_type}({', '.join(_arguments(node, constants))})",
            values=_known(node.output, types),
            rule=_KIND_OF.get(node.op_type, ""),
            path=path,
            reads=tuple(dict.fromkeys(owner[v] for v in node.input if v in owner)),
            weights=tuple(constants[v] for v in node.input if v in constants),
        )
    results = [value.name for value in graph.output]
    yield Line(
        node="return",
        names=(),
        op="return",
        call=f"return ({', '.join(results)})",
        reads=tuple(dict.fromkeys(owner[name] for name in results if name in owner)),
    )


def _known(names: Iterable[str], types: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(types[name] for name in names if name in types)


def _constant(tensor: TensorProto, name: str = "") -> str:
    """Its value, if that is short and stands in the file; else its name, shape and dtype."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL and len(tensor.dims) < 2:
        count = tensor.dims[0] if tensor.dims else 1
        if count <= FEW and len(text := _text(numpy_helper.to_array(tensor).tolist())) <= LONGEST:
            return text
    return f"{short(name or tensor.name)} {list(tensor.dims)} {_dtype(tensor.data_type)}"


def _arguments(node: NodeProto, constants: Mapping[str, str]) -> Iterator[str]:
    from onnx import AttributeProto, helper

    yield from (constants.get(v, v) or "None" for v in node.input)
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            yield f"{attribute.name}=..."
        elif attribute.name == "to":  # of a Cast
            yield f"to={_dtype(attribute.i)}"
        elif attribute.type == AttributeProto.TENSOR:
            yield f"{attribute.name}={_constant(attribute.t, 'tensor')}"
        else:
            yield f"{attribute.name}={_text(helper.get_attribute_value(attribute))}"


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float):
        return f"{value:g}"
    text = f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _paths(nodes: Sequence[NodeProto]) -> list[str]:
    """The module path of each node; if it has none, the common prefix of its neighbors' paths."""
    own = [_path(node) for node in nodes]
    behind: list[str | None] = [None] * len(own)
    for i in reversed(range(len(own) - 1)):
        behind[i] = own[i + 1] if own[i + 1] is not None else behind[i + 1]
    paths: list[str] = []
    last = ""
    for path, following in zip(own, behind, strict=True):
        if path is not None:
            last = path
        paths.append(_common(last, following or "") if path is None else path)
    return paths


def _common(one: str, two: str) -> str:
    parts = zip(one.split("."), two.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def _path(node: NodeProto) -> str | None:
    """ "layers.0.mlp.fc1", "" for the model itself, None if nothing says it."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return _last_scope(entry.value)
    if node.name.startswith("/"):
        return ".".join(node.name.split("/")[1:-1])
    return None


def _last_scope(text: str) -> str | None:
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        return None
    return scopes[-2] if len(scopes) > 1 else ""  # the last one is the node itself
