"""What of an object `optimize_` can compile: the module that it holds, and the parts of a module
that its methods call by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from graphquant._torch import is_compiled
from graphquant.errors import UnsupportedInputError

_STACKS = (nn.ModuleList, nn.Sequential)  # of layers, which their owner calls


def module_of(owner: Any) -> Any:
    """The one module that an object such as a transformers pipeline holds; else the object itself.

    Raises UnsupportedInputError if it holds several.
    """
    if isinstance(owner, nn.Module | type):
        return owner
    attributes = getattr(owner, "__dict__", {}).items()
    held = {name: value for name, value in attributes if isinstance(value, nn.Module)}
    if len({id(module) for module in held.values()}) > 1:
        raise UnsupportedInputError(
            f"{type(owner).__name__} holds several modules ({', '.join(held)}): "
            "optimize those that count, one by one"
        )
    return next(iter(held.values()), owner)


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Modules in it that its methods may call without calling the module, by path.

    Such as the towers and projections of CLIP, which `get_image_features` calls, and the encoder
    that `generate` calls. Not the layers of a stack, of which there are many.
    """
    found: dict[str, nn.Module] = {}
    if type(module) is not nn.Sequential:
        _visit(module, "", found)
    return found


def _visit(module: nn.Module, path: str, found: dict[str, nn.Module]) -> None:
    if not _holds_stack(module):
        return
    for name, child in module.named_children():
        if not _is_part(child) or any(child is one for one in found.values()):
            continue
        found[path + name] = child
        if type(child) is not nn.Sequential:
            _visit(child, f"{path}{name}.", found)


def _is_part(module: nn.Module) -> bool:
    return (
        not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and not is_compiled(module)
        and getattr(module.forward, "__func__", None) is type(module).forward
        and any(_linears(module))
    )


def _holds_stack(module: nn.Module) -> bool:
    inside = (m for m in module.modules() if m is not module)
    return any(isinstance(m, _STACKS) and any(_linears(m)) for m in inside)


def _linears(module: nn.Module) -> Iterator[bool]:
    return (True for m in module.modules() if isinstance(m, nn.Linear))


HOOK, UNHOOKED = "_hf_hook", "_old_forward"  # attributes that accelerate sets on a module


def is_hooked(module: nn.Module) -> bool:
    """Has accelerate replaced the module's `forward` by one that calls its hook and `UNHOOKED`?"""
    return HOOK in vars(module) and UNHOOKED in vars(module)


def refuse_hooks(module: nn.Module) -> None:
    """Raises UnsupportedInputError if accelerate's hooks are on submodules, since torch.compile
    cannot trace them and would leave the module float piece by piece, or if they load weights."""
    hooks = {name: vars(m)[HOOK] for name, m in module.named_modules() if is_hooked(m)}
    what = f"{type(module).__name__} has hooks of accelerate"
    if loading := [name for name, hook in hooks.items() if getattr(hook, "offload", False)]:
        raise UnsupportedInputError(
            f"{what} that load weights for every call ({len(loading)} modules, such as "
            f"{loading[0] or 'itself'}), which cannot be kept packed in int8: optimize only blocks "
            "that stay on a device"
        )
    if inside := [name for name in hooks if name]:
        raise UnsupportedInputError(
            f"{what} on {len(inside)} modules inside of it, such as {inside[0]}, which "
            "torch.compile cannot trace: optimize blocks that are on one device each, one by one "
            "and without the hooks inside of them (docs/recipes/accelerate.md)"
        )


def fills_cache(kwargs: Mapping[str, Any]) -> bool:
    """Does a call with these arguments decode token by token, with a key/value cache?"""
    return bool(kwargs.get("use_cache")) or kwargs.get("past_key_values") is not None
