"""A model's graphs before and after the rewrite, as lines that a terminal or a page can show.

    found = inspect(model, args, kwargs, Config())  one Inspected per graph
    align(found[0].before, found[0].after)          rows: kept operations side by side

Parameters and expressions of them have no line of their own: they are shown in the line of their
linear, `int8({q,k,v}_proj.weight)`, since they are packed in the compiled graph. SmoothQuant's
scale is called s: `int8(fc1.weight * s)`, after `norm.weight * 1/s`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from graphquant._torch.dynamo import patch_config
from graphquant.capture.aten import from_dynamo, from_export
from graphquant.config import Config
from graphquant.ir.captured import Captured
from graphquant.ir.constants import Constants
from graphquant.ir.graph import LINEAR, aten, is_call, module_path
from graphquant.ir.rows import CASTS, ROW_VIEWS
from graphquant.ops import OPS, quantize_weight
from graphquant.passes.pipeline import rewrite
from graphquant.passes.policy.smoothing import norm_smoothing, searched_smoothing, smoothing
from graphquant.report import Report


@dataclass(frozen=True)
class Line:
    """One operation of a graph, together with the getitems that unpack its result.

    node    its name in the traced graph, the same before and after
    names   the displayed names of its results
    op      "linear", "int8_linear", ..., "input" or "return"
    call    "linear(layer_norm, q_proj.weight, q_proj.bias)"
    values  shape and dtype of each result, "[2, 50, 64] float32"
    rule    the rule that made it; "" for the model's own operations; an ONNX node's kind
    path    the module that called it, "encoder.layers.0.mlp"
    reads   the `node` of every line whose results it reads
    weights parameters and packed weights among its arguments, as written in `call`
    """

    node: str
    names: tuple[str, ...]
    op: str
    call: str
    values: tuple[str, ...] = ()
    rule: str = ""
    path: str = ""
    reads: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"{', '.join(self.names)} = {self.call}" if self.names else self.call

    @property
    def section(self) -> str:
        """The part of the model it belongs to: its path up to the first number, "encoder.layers.0",
        or the path's first name."""
        parts = self.path.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        return ".".join(parts[: number + 1])


@dataclass(frozen=True)
class Inspected:
    """One graph as captured and as rewritten, and the report on it."""

    before: tuple[Line, ...]
    after: tuple[Line, ...]
    report: Report


@dataclass(frozen=True)
class Row:
    """Lines to show side by side: the same operation, or a removed one beside a new one."""

    before: Line | None
    after: Line | None

    @property
    def kind(self) -> str:
        """ "same", "changed" (other inputs) or "replaced"."""
        if self.before is None or self.after is None or self.before.node != self.after.node:
            return "replaced"
        arguments = {line.call.partition("(")[2] for line in (self.before, self.after)}
        return "same" if len(arguments) == 1 else "changed"

    @property
    def section(self) -> str:
        return (self.before and self.before.section) or (self.after and self.after.section) or ""


def inspect(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    *,
    export: bool = False,
) -> list[Inspected]:
    """Capture `model(*args, **kwargs)` under inference mode and rewrite what was captured.

    By torch.compile, which may give several graphs or none, or by torch.export, which gives one.
    The model's own parameters are not touched; by torch.compile it also runs once, in float.
    """
    found: list[Inspected] = []
    settings = config or Config()

    def take(captured: Captured, inputs: Mapping[Node, str]) -> None:
        writer = _Writer(captured, inputs)
        before = writer.lines()
        report = rewrite(captured, settings).report
        found.append(Inspected(before, writer.lines(), report))

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = from_dynamo(gm, example_inputs)
        if captured is not None:
            old, new = (g.graph.find_nodes(op="placeholder") for g in (gm, captured.gm))
            take(captured, {n: _input_name(o.name) for o, n in zip(old, new, strict=True)})
        run: Callable[..., Any] = gm.forward
        return run

    with torch.inference_mode():
        if export:
            module: Any = model  # torch.export takes modules only
            program = torch.export.export(module, tuple(args), dict(kwargs or {}))
            if (captured := from_export(program)) is not None:
                take(captured, {})
        else:
            # each call is one more entry in Dynamo's cache of this code
            many = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}
            with patch_config(**many):
                torch.compile(model, backend=backend)(*args, **(kwargs or {}))
    return found


def align(before: Sequence[Line], after: Sequence[Line]) -> list[Row]:
    """Rows in graph order: kept operations are aligned, replaced ones beside their replacements."""
    left, right = ([(line.node, line.values) for line in side] for side in (before, after))
    rows: list[Row] = []
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        old, new = list(before[i:i_end]), list(after[j:j_end])
        while old or new:  # section by section, so that a layer stands beside itself
            section = (old or new)[0].section
            if old and new and section not in {line.section for line in new}:
                pair: tuple[list[Line], list[Line]] = _first(old, section), []
            elif old and new and new[0].section not in {line.section for line in old}:
                pair = [], _first(new, new[0].section)
            else:
                pair = _first(old, section), _first(new, section)
            rows += [Row(*lines) for lines in zip_longest(*pair)]
    return rows


def _first(lines: list[Line], section: str) -> list[Line]:
    """Remove the leading lines of one section and return them."""
    taken = list(takewhile(lambda line: line.section == section, lines))
    del lines[: len(taken)]
    return taken


def _input_name(placeholder: str) -> str:
    """The name of the model's argument: "l_pixel_values_" -> "pixel_values"."""
    return re.sub(r"^[lL]_(?:kwargs_)?(.*?)_?$", r"\1", placeholder) or placeholder


class _Writer:
    """Formats one captured graph before and after the rewrite; kept nodes keep their names."""

    def __init__(self, captured: Captured, inputs: Mapping[Node, str]) -> None:
        self._captured = captured
        self._labels: dict[Node, str] = {n: short(name) for n, name in captured.names.items()}
        self._used = {n.name for n in captured.gm.graph.nodes}
        self._owner: dict[Node, str] = {}  # node -> the line that shows it
        for node, name in inputs.items():
            if node not in captured.parameters and name.isidentifier():
                self._labels[node] = self._free(name)

    def lines(self) -> tuple[Line, ...]:
        graph = self._captured.gm.graph
        folded = _folded(self._captured)
        unpacked: set[Node] = set()
        owner = self._owner = {}
        made: list[Line] = []
        for node in graph.nodes:
            if node in self._captured.parameters or node in unpacked:
                continue
            if node in folded:
                self._labels[node] = self._expression(node)
                continue
            parts = _unpacking(node)
            unpacked |= parts.keys()
            names = self._names(node, parts)
            owner |= dict.fromkeys([node, *parts], node.name)
            read = dict.fromkeys(owner[n] for n in node.all_input_nodes if n in owner)
            made.append(
                Line(
                    node=node.name,
                    names=names,
                    op=_op(node),
                    call=self._call(node),
                    values=tuple(_values(node)),
                    rule=node.meta.get("graphquant", ""),
                    path=module_path(node),
                    reads=tuple(read),
                    weights=tuple(self._text(n) for n in node.all_input_nodes if n not in owner),
                )
            )
        return tuple(made)

    def _names(self, node: Node, parts: Mapping[Node, int]) -> tuple[str, ...]:
        """The names of a line's results; also labels every node of the line."""
        if node.op == "output":
            return ()
        if not parts:
            return (self._label(node, _op(node)),)
        words = _result_names(node) or [part.name for part in parts]
        names = ["_"] * len(node.meta["val"])
        for part, i in parts.items():
            if names[i] == "_":
                names[i] = self._label(part, words[i] if len(words) > i else part.name)
            self._labels[part] = names[i]
        return tuple(names)

    def _label(self, node: Node, word: str) -> str:
        """Traced nodes keep their names, to be found again; nodes made by rules get short ones."""
        if node not in self._labels:
            self._labels[node] = self._free(word) if node.meta.get("graphquant") else node.name
        return self._labels[node]

    def _free(self, word: str) -> str:
        name, i = word, 0
        while name in self._used:
            i += 1
            name = f"{word}_{i}"
        self._used.add(name)
        return name

    def _call(self, node: Node) -> str:
        if node.op == "placeholder":
            return "input"
        if node.op == "output":
            return f"return {self._text(node.args[0])}"
        if node.op == "get_attr":
            return f"self.{node.target}"
        return f"{_op(node)}({', '.join(self._arguments(node))})"

    def _arguments(self, node: Node) -> Iterator[str]:
        schema: Any = getattr(node.target, "_schema", None)
        ours = getattr(node.target, "namespace", "") == "graphquant"
        skipped = False
        for i, value in enumerate(node.args):
            if value is None and schema is not None:
                skipped = True
            elif skipped or (ours and self._is_option(schema.arguments[i], value)):
                yield f"{schema.arguments[i].name}={self._text(value)}"
            else:
                yield self._text(value)
        for name, value in node.kwargs.items():
            if value is not None:
                yield f"{name}={self._text(value)}"

    def _is_option(self, argument: torch.Argument, value: Any) -> bool:
        """An argument that is easier to read with its name: a number, a residual."""
        if not isinstance(value, Node):
            return True
        return value in self._owner and isinstance(argument.type, torch.OptionalType)

    def _expression(self, node: Node) -> str:
        """The expression of a packed weight: `int8({q,k,v}_proj.weight)`."""
        inputs = node.all_input_nodes
        if node.target is operator.getitem and is_call(inputs[0], quantize_weight.target):
            part: Any = node.args[1]
            return f"{('int8', 'scale', 'sum')[part]}({self._text(inputs[0].args[0])})"
        if is_call(node, *CASTS, *ROW_VIEWS):
            return self._text(inputs[0])
        if is_call(node, aten.new_zeros.default):
            return "0"
        if is_call(node, aten.cat.default):
            return self._braces(node.args[0])
        if is_call(node, norm_smoothing, searched_smoothing, smoothing):
            return "s"
        if is_call(node, aten.reciprocal.default):
            return f"1/{self._text(inputs[0])}"
        if is_call(node, aten.mul.Tensor):
            return " * ".join(map(self._text, node.args))
        return self._call(node)

    def _braces(self, nodes: Any) -> str:
        """`q_proj.weight`, `k_proj.weight` -> `{q,k}_proj.weight`."""
        texts = [self._text(n) for n in nodes]
        if len(set(texts)) < len(texts):  # of two layers, say
            texts = [self._captured.names.get(n, self._text(n)) for n in nodes]
        head = _head(texts)
        tail = _head([text[len(head) :][::-1] for text in texts])[::-1]
        middle = (text[len(head) : len(text) - len(tail)] for text in texts)
        return f"{head}{{{','.join(middle)}}}{tail}"

    def _text(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._labels.get(value, value.name)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {self._text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            left, right = "()" if isinstance(value, tuple) else "[]"
            return left + ", ".join(map(self._text, value)) + right
        if isinstance(value, slice):
            return f"slice{self._text((value.start, value.stop, value.step))}"
        return str(value).removeprefix("torch.")


def short(name: str) -> str:
    """ "layers.0.attention.q_proj.weight" -> "q_proj.weight"."""
    return ".".join(name.split(".")[-2:])


def _head(texts: Sequence[str]) -> str:
    """The common prefix of all texts, up to a dot or underscore."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return re.sub(r"[^._]*$", "", "".join(letters[0] for letters in same))


def _folded(captured: Captured) -> set[Node]:
    """Nodes that are computed from parameters for linears and our ops: prepack removes them."""
    constants = Constants(captured.parameters)
    readers_of_packed = {LINEAR, *(op.target for op in OPS.values())}
    folded: set[Node] = set()
    for node in reversed(captured.gm.graph.nodes):
        if node in constants and node not in constants.roots and node.users:
            readers = node.users
            if all(u in folded or u.target in readers_of_packed for u in readers):
                folded.add(node)
    return folded


def _unpacking(node: Node) -> dict[Node, int]:
    """The getitems that unpack a tuple, with their indices; {} if anything else reads it."""
    if not isinstance(node.meta.get("val"), (list, tuple)):
        return {}
    parts: dict[Node, Any] = {u: u.args[1] for u in node.users if u.target is operator.getitem}
    return parts if len(parts) == len(node.users) else {}


def _result_names(node: Node) -> list[str]:
    """The names of the results in graphquant's schemas; [] for other ops."""
    if getattr(node.target, "namespace", "") != "graphquant":
        return []
    target: Any = node.target
    return [r.name for r in target._schema.returns]


def _op(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "return"}[node.op]
    if node.op == "get_attr":
        return "attribute"
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def _values(node: Node) -> Iterator[str]:
    value = node.meta.get("val")
    for v in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(v, Tensor):
            sizes = ", ".join(map(str, v.shape))
            yield f"[{sizes}] {str(v.dtype).removeprefix('torch.')}"
