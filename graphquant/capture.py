"""Dynamo graph or ExportedProgram -> one IR: a pre-dispatch ATen graph whose parameters are known.

    torch.compile:  from_dynamo(gm, example_inputs)      parameters are placeholders
    torch.export:   from_export(program)                 parameters are get_attr nodes

The private surface of torch that capture needs (`example_value`, `grapharg`,
`_dynamo_static_input_type`, entering autocast regions, Dynamo's cache) is used in this file alone.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils.checkpoint import noop_context_fn

from graphquant.errors import CaptureError
from graphquant.passes.graph import LITERAL, aten
from graphquant.passes.ir import Captured

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast

_VMAP = "torch._functorch.predispatch"

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_POLICY = "_checkpoint_context_fn"  # make_fx wants one, and most checkpoints have none


def from_dynamo(gm: GraphModule, example_inputs: list[Any]) -> Captured | None:
    """Retrace what Dynamo hands to a backend. None if the graph has no tensor input.

    Raises CaptureError for a graph with a value that make_fx cannot follow.
    """
    given = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in given]
    fake_mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if fake_mode is None:
        return None
    with fake_mode, preserve_node_meta():
        retraced = make_fx(lambda *a: _Retrace(gm).run(*a), pre_dispatch=True)(*fakes)
    for module in chain(gm.modules(), retraced.modules()):
        if isinstance(module, GraphModule) and module.meta.get(_POLICY) is noop_context_fn:
            del module.meta[_POLICY]
    if why := _lost(retraced):
        raise CaptureError(why)
    captured = Captured(retraced, fake_mode, {}, {}, grad_enabled=torch.is_grad_enabled())
    for node in retraced.graph.find_nodes(op="get_attr"):
        value = getattr(retraced, str(node.target), None)
        if isinstance(value, Tensor):  # torch.tensor([1.0]) in the forward
            node.meta[LITERAL] = value
    placeholders = retraced.graph.find_nodes(op="placeholder")
    for old, new, value in zip(given, placeholders, example_inputs, strict=True):
        _keep_metadata(old, new)
        if not isinstance(value, Tensor):
            continue
        if value.requires_grad:
            captured.differentiable.add(new)
        if _is_parameter(value):
            captured.parameters[new] = value
            captured.names[new] = _module_name(old)
    # CUDA graphs treat parameters as static only if the graph says where its inputs come from
    retraced.meta.update(gm.meta)
    # constants of the forward, such as the 0 of `y[:, 0] = 0`, need a name of their own
    constants = (n for n, _ in chain(retraced.named_parameters(), retraced.named_buffers()))
    retraced._param_name_to_source = {n: ConstantSource(n) for n in constants}  # type: ignore[assignment]
    return captured


@contextmanager
def forgotten_afterwards(backend: Callable[..., Any]) -> Iterator[None]:
    """Dynamo forgets the functions that it compiles in here, for this backend and for no other.

    Else the code behind a graph break keeps what was compiled, and at the recompile_limit Dynamo
    runs that code as it is, whatever backend asks.
    """
    codes: list[CodeType] = []

    def note(code: CodeType, new_code: CodeType) -> CodeType | None:
        codes.append(code)
        return None

    hook = torch._dynamo.convert_frame.register_bytecode_hook(note)
    try:
        yield
    finally:
        hook.remove()
        for code in set(codes):
            made_for = {
                getattr(entry.backend, "compiler_fn", entry.backend)
                for entry in _debug_get_cache_entry_list(code)
            }
            if made_for == {backend}:
                reset_code(code)


def _lost(retraced: GraphModule) -> str | None:
    """What make_fx could not follow: values under torch.vmap become constants without values in one
    version of torch, and tensors that live in a vmap which is over in another."""
    for name, value in chain(retraced.named_buffers(), vars(retraced).items()):
        if isinstance(value, FakeTensor):
            return f"{name} was computed under torch.vmap from no input of the graph"
    for node in retraced.graph.nodes:
        if getattr(node.target, "__module__", None) == _VMAP:
            return f"{node.name} is a step of torch.vmap"
    return None


def from_export(program: ExportedProgram) -> Captured | None:
    """The module of an exported program, without its input checks. None if it has no tensors."""
    gm = without_checks(program)
    attributes = {
        n: value
        for n in gm.graph.find_nodes(op="get_attr")
        if isinstance(value := operator.attrgetter(str(n.target))(gm), Tensor)
    }
    fakes = (n.meta.get("val") for n in gm.graph.nodes)
    fake_mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if fake_mode is None:
        return None
    for node, value in attributes.items():
        node.meta.setdefault("val", fake_mode.from_tensor(value, static_shapes=True))
    return Captured(gm, fake_mode, attributes, {n: str(n.target) for n in attributes})


def without_checks(program: ExportedProgram) -> GraphModule:
    """The program's module, which does not check its inputs."""
    module = program.module(check_guards=False)
    return GraphModule(module, module.graph)  # a plain copy: the checks are hooks of `module`


def _is_parameter(value: Tensor) -> bool:
    """A parameter or buffer of a module, as opposed to an argument of the call."""
    return isinstance(value, torch.nn.Parameter) or bool(
        getattr(value, "_dynamo_static_input_type", None)
    )


def _module_name(placeholder: Node) -> str:
    """`L['self']._modules['encoder']._parameters['weight']` -> "encoder.weight"."""
    argument = placeholder.meta.get("grapharg")
    if argument is None or argument.source is None:
        return placeholder.name
    name = argument.source.name
    text = name() if callable(name) else str(name)
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", text)
    return ".".join(parts) or text


def _keep_metadata(old: Node, new: Node) -> None:
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source
    if "tensor_dict" in old.meta:
        new.meta["tensor_dict"] = old.meta["tensor_dict"]


def mark_static(placeholder: Node) -> None:
    """Tell CUDA graphs that this input keeps its address from call to call."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


class _Retrace(Interpreter):
    """Runs a Dynamo graph under make_fx.

    Autocast regions are recorded by pre-dispatch tracing but not executed, so that the dtypes of
    fake values inside them would be wrong: they are entered for real as well. Fused inference ops
    of torch.nn.Transformer are opened, so that their linears can be found.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self._autocast: list[Any] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _OPENED:
            return _OPENED[target](*args, **kwargs)
        if target is _CHECKPOINT:
            args[0].meta.setdefault(_POLICY, noop_context_fn)
        result = super().call_function(target, args, kwargs)
        if target is _ENTER:
            with torch._C.DisableTorchFunction():
                self._autocast.append(_ENTER(*args, **kwargs))
        elif target is _EXIT:
            with torch._C.DisableTorchFunction():
                _EXIT(self._autocast.pop())
        return result


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What aten._transformer_encoder_layer_fwd computes, from parts that rules know.

    mask_type: 0 a mask [T, T] of attention, 1 a key padding mask [B, T], 2 a full mask; True (or
    -inf) means "do not attend", as in torch.nn.MultiheadAttention.
    """

    def attention(x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            t.reshape(batch, tokens, num_heads, embed_dim // num_heads).transpose(1, 2)
            for t in F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        )
        allowed = None
        if mask is not None:
            allowed = mask[:, None, None, :] if mask_type == 1 else mask
            if allowed.dtype == torch.bool:
                allowed = ~allowed
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return F.linear(y.transpose(1, 2).reshape(batch, tokens, embed_dim), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        act = F.gelu if use_gelu else F.relu
        return F.linear(act(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))


_OPENED: dict[Any, Callable[..., Tensor]] = {
    # make_fx takes `x.data` for a constant
    torch._C._autograd._get_data_attr: Tensor.detach,  # type: ignore[attr-defined]
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
