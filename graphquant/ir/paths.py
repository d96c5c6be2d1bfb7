"""Module paths of a model's linears: one for each, the same from every entry point.

The path of a linear is that of its weight, if the weight is inside the module that calls it, else
that of the module:

    nn.Linear fc                                            fc
    weight_norm, spectral_norm or pruning of fc             fc
    nn.MultiheadAttention attn                              attn.in_proj, attn.out_proj
    F.linear(x, self.w) in block                            block.w
    decoder, an nn.Linear with the embedding's weight       decoder

So two modules that share a weight have two paths, and several linears of one module differ.
Paths begin at the module that was given to torch.compile, also behind a graph break.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from graphquant._torch import local_of
from graphquant.ir.graph import MODULE

_LOCAL = re.compile(r"^[LG]\[(?:'[^']*'|\"[^\"]*\")\]")
_STEP = re.compile(
    r"\.__dict__\['_modules'\]"
    r"|\._(?:modules|parameters|buffers)(?=\[)"
    r"|\[(?P<key>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d+)\]"
    r"|\.(?P<name>[^.\[]+)"
)
_WRAPPED = ("cell_contents", "__self__", "_orig_mod")  # attributes that lead to the model


def linear_path(module: str, weights: Sequence[str]) -> str:
    """The path of a linear that this module calls.

    weights  the names of the parameters that its weight is computed from, the one that names it
             first: "encoder.layers.0.fc1.weight"
    """
    inside = [name for name in weights if not module or name.startswith(f"{module}.")]
    return weight_path(inside[0], weights) if inside else module


def weight_path(weight: str, others: Sequence[str] = ()) -> str:
    """ "layers.0.fc1" for the weight "layers.0.fc1.weight", "attn.in_proj" for a packed one.

    others  the names of all parameters that form one weight with it, as in torch.nn.utils'
            weight normalization and pruning
    """
    plain = re.sub(r"(^|\.)parametrizations\.([^.]+)\.original\d*$", r"\1\2", weight)
    for suffix in ("_orig", "_mask", "_v", "_g"):
        base = plain.removesuffix(suffix)
        if base != plain and (
            f"{base}_orig" in others or {f"{base}_v", f"{base}_g"}.issubset(others)
        ):
            plain = base
            break
    return plain.removesuffix(".weight").removesuffix("_weight")


def moved_path(path: str, old: str, new: str) -> str:
    """The path of a linear whose weight is called `old`, for another instance of the same code,
    where it is called `new`: ("layers.0.fc", "layers.0.fc.weight", "layers.1.fc.weight") is
    "layers.1.fc"."""
    ours, theirs = old.split("."), new.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    steps = path.split(".")
    if steps[: len(ours)] != ours:
        return path  # the weight is not inside this module
    return ".".join(theirs + steps[len(ours) :])


class Places:
    """Names of a model's modules and tensors: several for shared ones. A DTensor and its local
    tensor have the same ones.

    root  what was given to torch.compile; None if that is not a module
    """

    def __init__(self, root: nn.Module | None) -> None:
        self._modules: dict[int, list[str]] = {}
        self._tensors: dict[int, list[str]] = {}
        self._matrices: dict[int, list[str]] = {}  # those that may be weights
        self._training: list[str] = []
        for path, module in () if root is None else _walk(root):
            self._modules.setdefault(id(module), []).append(path)
            if module.training:
                self._training.append(path)
            for name, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None:
                    names = self._tensors.setdefault(key := id(local_of(tensor)), [])
                    names.append(_join(path, name))
                    if tensor.dim() > 1:
                        self._matrices[key] = names

    @property
    def training(self) -> tuple[str, ...]:
        """The paths of modules in training mode."""
        return tuple(self._training)

    def elsewhere(self, read: Iterable[Tensor]) -> frozenset[str]:
        """The paths of linears with other weights than these."""
        ids = {id(local_of(t)) for t in read}
        others = (names for key, names in self._matrices.items() if key not in ids)
        return frozenset(weight_path(name) for names in others for name in names)

    def names(self, tensor: Any) -> list[str]:
        """All names of a parameter or buffer, such as "encoder.layers.0.fc1.weight"."""
        return self._tensors.get(id(local_of(tensor)), [])

    def tensor(self, tensor: Tensor, text: str) -> str:
        """The name under which a graph reads this tensor. text: how Dynamo spells it."""
        return _nearest(self.names(tensor), _join(*_steps(text))) or text

    def mark(self, gm: GraphModule) -> None:
        """Record in every node's meta which module calls it (`module_path`)."""
        for inner in gm.modules():
            if isinstance(inner, GraphModule):
                for node in inner.graph.nodes:
                    stack = node.meta.get("nn_module_stack")
                    if stack:
                        node.meta[MODULE] = self._module(*list(stack.items())[-1])

    def _module(self, key: str, entry: Any) -> str:
        """key: the module's id, in Dynamo; entry: (its path, its class)."""
        text = re.sub(r"@\d+$", "", str(entry[0]))  # fc@1 is the second call of fc
        if not _LOCAL.match(text):  # a path already: torch.export writes those
            return text
        number = str(key).partition("@")[0]
        known = self._modules.get(int(number), []) if number.isdecimal() else []
        return _nearest(known, _join(*_steps(text)))


def _nearest(known: Sequence[str], spelled: str) -> str:
    """The known name that matches this spelling, maybe from inside the model; else the first."""
    if spelled in known or not known:
        return spelled
    return next((name for name in known if name.endswith(f".{spelled}")), known[0])


def _steps(text: str) -> list[str]:
    """["encoder", "0", "weight"] for "L['self']._modules['encoder'][0]._parameters['weight']"."""
    steps: list[str] = []
    for found in _STEP.finditer(_LOCAL.sub("", text)):
        if found["key"] is not None:
            steps.append(str(ast.literal_eval(found["key"])))
        elif found["name"] in _WRAPPED:
            steps.clear()
        elif found["name"] is not None:
            steps.append(found["name"])
    return steps


def _walk(module: nn.Module, path: str = "", above: tuple[int, ...] = ()) -> Iterator[Any]:
    """(path, module) of a module and its descendants; shared ones once for each path."""
    if id(module) in above:
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, _join(path, name), (*above, id(module)))


def _join(*steps: str) -> str:
    return ".".join(step for step in steps if step)
