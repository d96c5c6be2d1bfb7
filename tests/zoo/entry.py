"""What an entry is, and how its weights and inputs are drawn."""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple, dict]
BOTH = ("sdpa", "eager")
EAGER = ("eager",)


@dataclass(frozen=True)
class Entry:
    """A model that can be built, and inputs for it."""

    name: str
    build: Callable[[str], nn.Module]  # attention implementation -> eval() module in float32
    inputs: Callable[..., Inputs]  # batch, draw=0 -> (args, kwargs); other numbers in each draw
    family: str
    attns: tuple[str, ...] = BOTH  # attention implementations that the model really switches


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed the CPU generator from a name; restore it on exit."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the accelerators, which are not restored here.
        torch.default_generator.manual_seed(zlib.crc32(name.encode()))
        yield


SCALE_NAMES = {"lambda1", "lambda2", "lambda_1", "lambda_2", "gamma", "gamma_1", "gamma_2"}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def draw(module: nn.Module, name: str, old: Tensor) -> Tensor | None:
    """New values for one direct parameter of a module, or None to keep the old ones."""
    if old.numel() == 1 or not old.is_floating_point() or not old.requires_grad:
        return None  # temperatures; fixed sinusoids
    if "parametrizations" in name or type(module).__name__ == "ParametrizationList":
        return None  # weight norm: magnitude and direction belong together
    noise = torch.randn(old.shape)
    if is_norm(module):
        if "bias" in name:
            return 0.1 * noise
        return 0.2 * noise + (0.0 if bool((old == 0).all()) else 1.0)  # "1 + weight" norms
    if name in SCALE_NAMES:
        sign = torch.where(torch.rand(old.shape) < 0.2, -1.0, 1.0)
        return sign * 10.0 ** -torch.rand(old.shape)  # 0.1 .. 1, every fifth one negative
    if "bias" in name:
        return (0.5 if "table" in name else 0.1) * noise
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            noise[module.padding_idx] = 0.0
        return 0.5 * noise
    if "weight" in name and old.dim() >= 2:
        # Unit gain, output channels of unlike size (what per-channel scales are for).
        spread = (0.3 * torch.randn(old.shape[0], *[1] * (old.dim() - 1))).exp()
        return noise * spread / math.sqrt(math.prod(old.shape[1:]))
    return 0.3 * noise  # class tokens, position tables, probes


@torch.no_grad()
def roughen(model: nn.Module) -> nn.Module:
    """Draw all parameters of a model again, with the statistics of trained ones."""
    done: set[int] = set()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if id(param) in done:  # tied
                continue
            done.add(id(param))
            new = draw(module, name, param)
            if new is not None:
                param.copy_(new)
        if isinstance(getattr(module, "running_var", None), Tensor):  # batch norm
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape))
            module.running_var.copy_((0.3 * torch.randn(module.running_var.shape)).exp())
    return model


def find_class(package: str, name: str) -> type:
    """A class of transformers.models.<package>, exported from the package or not."""
    pkg = importlib.import_module(f"transformers.models.{package}")
    if hasattr(pkg, name):
        return getattr(pkg, name)
    return getattr(importlib.import_module(f"{pkg.__name__}.modeling_{package}"), name)


def hf(
    name: str,
    where: str,
    config: dict[str, Any],
    inputs: Callable[[int], Inputs],
    attns: tuple[str, ...] = BOTH,
    tune: Callable[[nn.Module], None] | None = None,
) -> Entry:
    """An entry for a transformers class; where is "package:Config:Model"."""
    package, config_name, model_name = where.split(":")

    def build(attn: str) -> nn.Module:
        cls: Any = find_class(package, model_name)
        use = attn if attn in attns and getattr(cls, f"_supports_{attn}", True) else "eager"
        with seeded(name):
            settings = find_class(package, config_name)(**config)
            model = cls._from_config(settings, attn_implementation=use, dtype=torch.float32)
            roughen(model)
            if tune:
                tune(model)
        return model.eval()

    return Entry(name, build, partial(seeded_inputs, name, inputs), package, attns)


def own(
    name: str,
    make: Callable[[str], nn.Module],
    inputs: Callable[[int], Inputs],
    family: str,
    attns: tuple[str, ...] = BOTH,
) -> Entry:
    """An entry for a module of this file or of torch.nn."""

    def build(attn: str) -> nn.Module:
        with seeded(name):
            return roughen(make(attn)).eval()

    return Entry(name, build, partial(seeded_inputs, name, inputs), family, attns)


def seeded_inputs(name: str, make: Callable[[int], Inputs], batch: int, draw: int = 0) -> Inputs:
    """New tensors with the values that belong to a name, a batch and a draw."""
    with seeded(f"{name}/{batch}" + f"/{draw}" * (draw > 0)):
        return make(batch)


def table(*entries: Entry) -> dict[str, Entry]:
    """Entries by name."""
    named = {entry.name: entry for entry in entries}
    if len(named) != len(entries):
        raise ValueError("two entries of one name")
    return named
