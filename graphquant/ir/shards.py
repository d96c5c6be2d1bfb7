"""What ties a graph on this process's shards to the DTensors that its caller has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphquant._torch import local_of


@dataclass(frozen=True)
class Shards:
    """How a Dynamo graph with DTensors is called by its local graph (capture/local.py).

    kept     which of Dynamo's inputs the local graph has; it has no device meshes
    sharded  which of the local graph's inputs are local tensors of DTensors
    wrapped  result number -> makes the DTensor of it from its local tensor
    linears  how many linears have a sharded weight
    groups   names of the process groups over which tensors are sharded
    """

    kept: tuple[int, ...]
    sharded: frozenset[int]
    wrapped: Mapping[int, Callable[[Any], Any]]
    linears: int
    groups: frozenset[str]

    def local(self, args: Sequence[Any]) -> list[Any]:
        """The local graph's inputs, for these inputs of Dynamo's graph."""
        given = [args[i] for i in self.kept]
        for i in self.sharded:
            given[i] = local_of(given[i])
        return given

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What runs Dynamo's graph, made of what runs the local one."""

        def on_shards(*args: Any) -> Any:
            results = run(*self.local(args))
            if not self.wrapped:
                return results
            wrap = self.wrapped
            return type(results)(wrap[i](r) if i in wrap else r for i, r in enumerate(results))

        return on_shards
