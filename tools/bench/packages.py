"""A model in an AOTInductor package: compiled ahead, as a server without Python loads it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import graphquant
from graphquant import Report


def _float(model: nn.Module, kwargs: dict[str, Tensor], _: Any) -> ExportedProgram:
    return torch.export.export(model, (), kwargs)


def _with_ops(model: nn.Module, kwargs: dict[str, Tensor], on_report: Any) -> ExportedProgram:
    return graphquant.export(model, (), kwargs, on_report=on_report)


def _standalone(model: nn.Module, kwargs: dict[str, Tensor], on_report: Any) -> ExportedProgram:
    return graphquant.standalone(_with_ops(model, kwargs, on_report))


Kind = tuple[Callable[[nn.Module, dict[str, Tensor], Any], ExportedProgram], dict[str, Any]]
_TUNED = {"max_autotune": True}
FLOAT_PACKAGES: dict[str, Kind] = {
    "bf16-aoti": (_float, {}),
    "bf16-aoti-max-autotune": (_float, _TUNED),
}
INT8_PACKAGES: dict[str, Kind] = {
    "graphquant-aoti": (_with_ops, {}),
    "graphquant-standalone": (_standalone, {}),
    "graphquant-standalone-max-autotune": (_standalone, _TUNED),
}
PACKAGES = FLOAT_PACKAGES | INT8_PACKAGES


class Package:
    """Makes the package at the first call, for inputs of these sizes, and calls it."""

    def __init__(self, variant: str, model: nn.Module, reports: list[Report]) -> None:
        self._program, self._configs = PACKAGES[variant]
        self._model = model
        self._reports = reports
        self._run: Callable[..., Any] | None = None
        self.weight_bytes = 0

    def __call__(self, **kwargs: Tensor) -> list[Any]:
        """The tensors that the model returns, in order."""
        if self._run is None:
            self._run = self._made(kwargs)
        return tree_leaves(self._run(**kwargs))

    def _made(self, kwargs: dict[str, Tensor]) -> Callable[..., Any]:
        program = self._program(self._model, kwargs, self._reports.append)
        tensors = (*program.state_dict.values(), *program.constants.values())
        self.weight_bytes = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "model.pt2"))
            torch._inductor.aoti_compile_and_package(
                program, package_path=path, inductor_configs=dict(self._configs)
            )
            run: Callable[..., Any] = torch._inductor.aoti_load_package(path)
        return run
