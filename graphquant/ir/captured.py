"""The captured graph that passes work on, from torch.compile and torch.export alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from graphquant._torch import FakeTensorMode
from graphquant.ir.shards import Shards


@dataclass
class Captured:
    """A model's graph and what is known about its inputs.

    gm              pre-dispatch ATen, a fake tensor in `meta["val"]` of every node
    fake_mode       the mode those fake tensors belong to
    parameters      the nodes of parameters and buffers (placeholders or get_attr), with their
                    real tensors; of a DTensor this process's shard
    names           their names in the module, "encoder.layers.0.fc1.weight"
    differentiable  graph inputs that require a gradient
    grad_enabled    whether autograd is on where the graph begins
    training        the paths of the model's modules in training mode, "" is the model itself
    elsewhere       paths of the model's linears that may be in other graphs
    inputs          the names of the model's inputs, "attention_mask"
    examples        values of inputs at compile time, where they are known
    shards          how the caller's DTensors become inputs of this graph; None if there are none
    inferred        cache of passes/verify.py: what it last inferred for a node, and from what
    """

    gm: GraphModule
    fake_mode: FakeTensorMode
    parameters: dict[Node, Tensor]
    names: dict[Node, str]
    differentiable: set[Node] = field(default_factory=set)
    grad_enabled: bool = False
    training: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    inputs: dict[Node, str] = field(default_factory=dict)
    examples: dict[Node, Tensor] = field(default_factory=dict, repr=False)
    shards: Shards | None = None
    inferred: dict[Node, tuple[Any, Any, Any]] = field(default_factory=dict, repr=False)

    def local(self, args: Sequence[Any]) -> Sequence[Any]:
        """The inputs of this graph for those of Dynamo's graph."""
        return args if self.shards is None else self.shards.local(args)

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What runs Dynamo's graph, made of what runs this one."""
        return run if self.shards is None else self.shards.around(run)
