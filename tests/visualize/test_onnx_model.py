"""graphquant.visualize.onnx_model: nodes as lines, by the modules that they come from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphquant.errors import GraphquantError, MissingPackageError
from graphquant.visualize import html, onnx_model
from graphquant.visualize.colors import KIND_COLORS
from graphquant.visualize.lines import Line
from tools import show_graph

onnx = pytest.importorskip("onnx", reason="NOT CHECKED: ONNX models. It needs onnx")


def scoped(node: Any, *scopes: str) -> Any:
    """As torch.onnx.export(dynamo=True) writes it; the last scope is the node itself."""
    node.metadata_props.add(key=onnx_model.SCOPES, value=str(["", *scopes]))
    return node


def saved(path: Path, nodes: Sequence[Any], *, large: bool = False) -> Path:
    """x [B, 8] -> y, with a weight w [8, 4] int8."""
    h, floats = onnx.helper, onnx.TensorProto.FLOAT
    w = onnx.numpy_helper.from_array(np.ones((8, 4), np.int8), "block.0.fc.weight")
    half = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half")
    graph = h.make_graph(
        nodes,
        "graph",
        [h.make_tensor_value_info("x", floats, ["batch", 8])],
        [h.make_tensor_value_info("y", floats, None)],
        [w, half],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)])
    outside = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model, path, **(outside if large else {}))
    return path


def int8_nodes() -> list[Any]:
    make = onnx.helper.make_node
    return [
        make("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"], name="/block.0/fc/Quantize"),
        make("MatMulInteger", ["xq", "block.0.fc.weight", "z"], ["acc"], name="/block.0/fc/MatMul"),
        make("Cast", ["acc"], ["f"], name="cast", to=1),
        make("Mul", ["f", "half"], ["m"], name="/block.0/fc/Mul"),
        make("Add", ["m", "m"], ["y"], name="/Add"),
    ]


def by_op(lines: Sequence[Line]) -> dict[str, Line]:
    return {line.op: line for line in lines}


def test_lines_have_calls_types_kinds_and_what_they_read(tmp_path: Path) -> None:
    lines = onnx_model.read(saved(tmp_path / "m.onnx", int8_nodes()))
    found = by_op(lines)
    assert (lines[0].op, lines[-1].op) == ("input", "return")
    assert found["input"].values == ("[batch, 8] float32",)
    product = found["MatMulInteger"]
    assert product.call == "MatMulInteger(xq, fc.weight [8, 4] int8, z)"
    assert product.values == ("[batch, 4] int32",)
    assert product.reads == ("xq",) and product.weights == ("fc.weight [8, 4] int8",)
    assert found["DynamicQuantizeLinear"].names == ("xq", "s", "z")
    assert found["Mul"].call == "Mul(f, 0.5)" and found["Cast"].call == "Cast(acc, to=float32)"
    assert found["Add"].reads == ("m",) and found["return"].reads == ("y",)
    kinds = {line.op: line.rule for line in lines if line.rule}
    assert kinds == {"DynamicQuantizeLinear": "quantize", "MatMulInteger": "int8 product"}


def test_names_of_nodes_tell_the_module_and_a_node_without_stands_with_its_neighbors(
    tmp_path: Path,
) -> None:
    found = by_op(onnx_model.read(saved(tmp_path / "m.onnx", int8_nodes())))
    assert found["MatMulInteger"].path == found["Cast"].path == "block.0.fc"
    assert found["Add"].path == ""


def test_metadata_tells_the_module(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    nodes = [
        scoped(make("Relu", ["x"], ["a"]), "layers.0", "layers.0.act", "relu"),
        make("Neg", ["a"], ["b"]),
        scoped(make("Abs", ["b"], ["c"]), "layers.0", "layers.0.fc", "abs"),
        scoped(make("Exp", ["c"], ["y"]), "exp"),
    ]
    nodes[1].metadata_props.add(key=onnx_model.SCOPES, value="no list")
    found = by_op(onnx_model.read(saved(tmp_path / "m.onnx", nodes)))
    paths = {op: found[op].path for op in ("Relu", "Neg", "Abs", "Exp")}
    assert paths == {"Relu": "layers.0.act", "Neg": "layers.0", "Abs": "layers.0.fc", "Exp": ""}


def test_every_kind_has_a_color() -> None:
    assert onnx_model.KINDS.keys() == KIND_COLORS.keys()


def test_weights_in_another_file_are_not_read(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.onnx", int8_nodes(), large=True)
    (tmp_path / "weights.bin").unlink()
    found = by_op(onnx_model.read(file))
    assert found["MatMulInteger"].weights == ("fc.weight [8, 4] int8",)
    assert found["Mul"].call == "Mul(f, half [] float32)"  # its value is in the other file


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.norm(x))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_a_model_that_torch_exported_opens_by_its_modules(tmp_path: Path, dynamo: bool) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="NOT CHECKED: the exporter. It needs onnxscript")
    file = tmp_path / "blocks.onnx"
    model = nn.Sequential(Block(), Block()).eval()
    torch.onnx.export(model, (torch.randn(3, 8),), file, dynamo=dynamo)
    lines = onnx_model.read(file)
    products = [line for line in lines if line.rule == "float product"]
    assert [line.path for line in products] == ["0.fc", "1.fc"]
    assert {line.values for line in products} == {("[3, 8] float32",)}
    assert [line.path for line in lines if line.op == "LayerNormalization"] == ["0.norm", "1.norm"]
    assert "like 0" in html.one_sided("blocks", lines)


def test_the_tool_prints_the_model_and_writes_the_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, page = saved(tmp_path / "m.onnx", int8_nodes()), tmp_path / "m.html"
    assert show_graph.main(["--onnx", str(file), "--html", str(page), "--width", "200"]) == 0
    out = capsys.readouterr().out
    assert "acc = MatMulInteger(xq, fc.weight [8, 4] int8, z)  [batch, 4] int32" in out
    assert f"wrote {page}" in out
    assert "<title>m.onnx · graphquant</title>" in page.read_text()


def test_what_is_no_onnx_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("this is not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(GraphquantError, match="holds no ONNX model"):
            onnx_model.read(tmp_path / f"{name}.onnx")
    for argv, said in (
        (["--onnx", str(tmp_path / "text.onnx")], "holds no ONNX model"),
        (["--onnx", str(tmp_path / "none.onnx")], "No such file"),
        (["--onnx", str(tmp_path / "text.onnx"), "vit"], "without a model"),
        (["--onnx", str(tmp_path / "text.onnx"), "--compare"], "goes with --html"),
    ):
        assert show_graph.main(argv) == 2
        assert said in capsys.readouterr().err


def test_without_onnx_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match="pip install onnx"):
        onnx_model.read(tmp_path / "m.onnx")
