"""In-place optimization: `optimize_` makes a module run in int8, `restore_` undoes it."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import torch
from torch import nn

from graphquant._torch import is_compiled, local_of
from graphquant.config import Config
from graphquant.errors import OptionError, ReleasedWeightError, UnsupportedInputError
from graphquant.optimized.calls import OptimizedCall, overriding
from graphquant.optimized.module import LiveReport, Optimized, optimized_of
from graphquant.parts import module_of, refuse_hooks
from graphquant.report import Report
from graphquant.weights.released import is_released, move_back
from graphquant.weights.versions import forget

__all__ = ["LiveReport", "optimize_", "restore_"]

_EMBEDDED = ("inputs_embeds", "hidden_states")  # arguments of shape [batch, tokens, hidden_size]


def optimize_(
    module: Any, *, bsz: int | None = None, seqlen: int | None = None, **options: Any
) -> Report:
    """Make this module run in int8 from its next call; the code around it stays eager.

    module       any torch.nn.Module that is called, such as `model.vision_model.encoder`, or an
                 object that holds one, such as a transformers pipeline
    bsz, seqlen  optional, and not limits. With both, a module that reads embeddings [bsz, seqlen,
                 hidden_size] is compiled now, by a call on zeros, not at its first call: if its
                 only required argument is `inputs_embeds` or `hidden_states`, and it has a
                 `config.hidden_size`. Do it under the torch.inference_mode() or torch.no_grad()
                 under which it will run, or the first call compiles again.
    options      as for `torch.compile(module, backend="graphquant", options=options)`;
                 quantize=False stacks q/k/v in float, without int8

    Methods that call parts of the module instead of the module, such as CLIP's `get_image_features`
    or Whisper's `generate`, run those parts in int8. Calls with a key/value cache (arguments
    `past_key_values` or `use_cache`) stay float: of a decoder nothing is int8, of the encoder or
    vision tower that it reads everything.

    Signature, outputs and their types, parameters, state_dict, hooks and submodules do not change.
    Anything that can need a gradient stays float, so call it under torch.inference_mode() or
    torch.no_grad(). `module.forward(...)` runs in int8 as well, without hooks as usual, unless the
    instance has its own `forward`. Copies and pickles are float. If an enclosing module is
    compiled, that compilation includes this module, with its own backend.

    A second call with equal options does nothing and returns the same Report; with other options,
    they replace the old ones.

    The Report is empty until a graph is compiled (`report.ran`), and stays up to date. A graph that
    is compiled again (other sizes, other arguments) replaces its old entries. Paths begin at the
    module. Notes name the parts that were not called, and those that stayed float with a key/value
    cache. There is a WARNING if nothing has run in int8 after the first call, and at the end of the
    process if nothing was called.

    Raises UnsupportedInputError for what is not a module and does not hold exactly one, is never
    called itself (nn.ModuleList), came from torch.compile or has hooks of accelerate inside of it
    (a device map over several devices, or offloaded weights); OptionError for an unknown option and
    for an invalid bsz or seqlen; ReleasedWeightError if the options to be replaced have released
    weights.
    """
    module = module_of(module)
    _check(module)
    refuse_hooks(module)
    _check_size("bsz", bsz)
    _check_size("seqlen", seqlen)
    config = Config.of(options)
    if (now := optimized_of(module)) is not None:
        if now.config == config:
            return now.report
        _undo([now])
    if (part := overriding(module)) is not None:
        _leave(part, module)
    width = _width(module)
    optimized = Optimized(module, config, options)
    # last, because Dynamo guards on the attributes that were set
    if bsz and seqlen and width:
        weight = next(module.parameters())
        try:
            with torch.no_grad():
                optimized.call(weight.new_zeros(bsz, seqlen, width))
        except BaseException:
            _undo([optimized])
            raise
    return optimized.report


def restore_(module: Any) -> None:
    """Undo `optimize_` for this module (or what the object holds) and all its submodules.

    Their packed weights are dropped; another compilation that uses them repacks. Weights that
    free_weights="host" has moved go back to their device. Does nothing to other modules.

    Raises ReleasedWeightError, and changes nothing, if free_weights=True has released weights:
    restore those by `module.load_state_dict(values, assign=True)` first.
    """
    inside = list(module_of(module).modules())
    _undo([found for m in inside if (found := optimized_of(m)) is not None])
    for m in inside:
        if (part := overriding(m)) is not None:
            _leave(part, m)


def _undo(every: list[Optimized]) -> None:
    modules = [(one, one.module()) for one in every]
    for _, m in modules:
        _refuse_released(m)
    for optimized, m in modules:
        optimized.remove()
        forget(m)
        move_back(map(local_of, chain(m.parameters(), m.buffers())))


def _leave(part: OptimizedCall, module: nn.Module) -> None:
    """Undo `optimize_` for this part of an enclosing module."""
    _refuse_released(module)
    part.remove()


def _refuse_released(module: nn.Module) -> None:
    if released := [name for name, p in module.named_parameters() if is_released(local_of(p))]:
        raise ReleasedWeightError(
            f"free_weights=True has released {len(released)} weights, such as {released[0]}: "
            "load them first, by module.load_state_dict(values, assign=True)"
        )


def _width(module: nn.Module) -> int | None:
    """The hidden size of a module whose only required argument is embeddings, else None."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    width = getattr(getattr(module, "config", None), "hidden_size", None)
    return width if len(required) == 1 and required[0] in _EMBEDDED else None


def _check_size(name: str, size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise OptionError(f"{name} must be a number of at least 1, got {size!r}")


def _check(module: nn.Module) -> None:
    if is_compiled(module):
        raise UnsupportedInputError(
            "optimize_ needs the module itself, got the result of torch.compile, which is compiled "
            'already; torch.compile(module, backend="graphquant") does the same as optimize_'
        )
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedInputError(
            f"optimize_ needs a torch.nn.Module, got {type(module).__name__}"
        )
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise UnsupportedInputError(
            f"{type(module).__name__} has no forward, so it is never called: optimize the modules "
            "in it, or the one that calls them"
        )
