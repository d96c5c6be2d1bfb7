"""What runs the rewritten graph under torch.compile: Inductor, aot_eager or plain eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from graphquant.config import Config


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """A callable with the graph's inputs as arguments."""
    if config.inner == "eager":
        return gm.forward
    if config.inner == "aot_eager":
        aot_eager = torch._dynamo.lookup_backend("aot_eager")
        return aot_eager(gm, list(example_inputs))
    mode = config.mode or "default"
    options = {**torch._inductor.list_mode_options(mode), **config.inductor}
    compiled: Callable[..., Any] = torch._inductor.compile(
        gm, list(example_inputs), options=options
    )
    return compiled
