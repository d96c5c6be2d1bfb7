"""The model that a command line names, and inputs for it.

"module:callable" is called, and returns a torch.nn.Module, or (module, args), or (module, args,
kwargs); it may take the keywords `batch` and `attn` ("sdpa" or "eager"). A folder holds the
config.json of a transformers model, and its weights or none: then they are random. Inputs of a
model of transformers are made from its config. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graphquant._torch import tree_map
from graphquant.cli.arguments import UsageError, here

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
TOKENS = 128  # default length of a text
NEEDS_INPUTS = "return (model, args, kwargs)"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class Source(Protocol):
    """A model that can be built, and inputs for it."""

    @property
    def name(self) -> str: ...
    @property
    def build(self) -> Callable[[str], nn.Module]:
        """Attention implementation -> module in eval mode."""

    @property
    def inputs(self) -> Callable[..., Inputs]:
        """batch, draw=0 -> (args, kwargs); each draw has other random numbers."""


@dataclass(frozen=True)
class _Source:
    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[..., Inputs]


class Loaded(NamedTuple):
    """A model on its device in its dtype, and `inputs(draw)` for one call of it."""

    name: str
    model: nn.Module
    inputs: Callable[[int], Inputs]


def load(args: argparse.Namespace) -> Loaded:
    """The model that the command line names, after one call in float. Raises UsageError."""
    if args.device is not None and args.device.type == "cuda":
        count = torch.cuda.device_count()
        if (args.device.index or 0) >= count:
            raise UsageError(f"--device {args.device}: torch sees {count} NVIDIA GPUs")
    source = find(args)
    model = source.build(args.attn)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = model.to(device=args.device, dtype=dtype)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=args.device, dtype=dtype if value.is_floating_point() else None)

    def inputs(draw: int) -> Inputs:
        given, keywords = tree_map(place, source.inputs(args.batch, draw))
        return given, keywords

    given, keywords = inputs(0)
    with user_errors(f"{source.name} cannot be called"), torch.inference_mode():
        model(*given, **keywords)
    return Loaded(source.name, model, inputs)


def find(args: argparse.Namespace) -> Source:
    """The model that the command line names, not built yet. Raises UsageError."""
    if (args.name is None) == (args.model is None):
        raise UsageError("name one model: a module:callable or a folder, as MODEL or --model")
    spec: str = args.name or args.model
    folder = Path(spec).parent if Path(spec).name == "config.json" else Path(spec)
    if (folder / "config.json").is_file():
        return _of_folder(folder, args.tokens or TOKENS)
    if folder.is_dir():
        raise UsageError(f"{spec} has no config.json of a transformers model")
    if ":" in spec:
        return _of_callable(spec, args.tokens or TOKENS)
    for table in args.named.values():
        if spec in table:
            source: Source = table[spec]
            return source
    names = [name for table in args.named.values() for name in table]
    close = difflib.get_close_matches(spec, names, n=1)
    if not names:
        raise UsageError(f"unknown model {spec!r}: neither module:callable nor a folder")
    hint = f", did you mean {close[0]!r}?" if close else "."
    raise UsageError(f"unknown model {spec!r}{hint} Known:\n{known(args.named)}")


def known(named: Mapping[str, Mapping[str, Source]]) -> str:
    return "\n".join(f"{title}: {', '.join(table)}" for title, table in named.items())


def imported(spec: str) -> Any:
    """What "module:callable" names; the module may be in the working directory."""
    if (folder := here()) not in sys.path:
        sys.path.insert(0, folder)
    module, _, path = spec.partition(":")
    with user_errors(f"cannot load {spec!r}", kind=False):
        return attrgetter(path)(importlib.import_module(module))


@contextlib.contextmanager
def user_errors(what: str, *, kind: bool = True) -> Iterator[None]:
    """Turn any exception of the user's code into a one-line UsageError. kind: name its class."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        name = f"{type(error).__name__}: " * kind
        raise UsageError(f"{what}: {name}{lines[0]}") from error


@contextlib.contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Seed the CPU's generator by name, and restore its state at the end."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the accelerators, whose state is not restored here
        torch.default_generator.manual_seed(zlib.crc32(name.encode()))
        yield


# --- module:callable ------------------------------------------------------------------------------


def _of_callable(spec: str, tokens: int) -> Source:
    """A callable without the keyword `batch` keeps its own inputs. Weights are not changed."""
    make = imported(spec)
    taken: Any = {}
    if not isinstance(make, nn.Module):
        with user_errors(f"{spec!r} is not a callable that returns a model"):
            taken = inspect.signature(make).parameters
    last: dict[object, Inputs] = {}  # of the last build, so that inputs() need not build again

    def key_of(batch: int, draw: int) -> object:
        return (batch if "batch" in taken else 0), draw

    def call(batch: int, attn: str | None, draw: int = 0) -> nn.Module:
        given = {"attn": attn, "batch": batch}
        with _seeded(spec + f"/{draw}" * (draw > 0)), user_errors(f"{spec} failed"):
            made = make
            if not isinstance(make, nn.Module):
                made = make(**{k: v for k, v in given.items() if k in taken and v})
        module, inputs = _parts(spec, made)
        last.clear()
        last[key_of(batch, draw)] = inputs or made_inputs(module, batch, draw, tokens, spec)
        return module.eval()

    def inputs(batch: int, draw: int = 0) -> Inputs:
        key = key_of(batch, draw)
        if key not in last:
            call(batch, None, draw)
        found: Inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, last[key])
        return found

    return _Source(spec, lambda attn: call(1, attn), inputs)


def _parts(spec: str, made: Any) -> tuple[nn.Module, Inputs | None]:
    module, *rest = made if isinstance(made, tuple) and made else (made,)
    fits = isinstance(module, nn.Module) and len(rest) <= 2
    if fits and not rest:
        return module, None
    args, kwargs = (*rest, {})[:2] if rest else ((), {})
    if not fits or not isinstance(args, Sequence) or not isinstance(kwargs, Mapping):
        names = ", ".join(type(part).__name__ for part in (module, *rest))
        raise UsageError(f"{spec} returned ({names}), needs a torch.nn.Module: {NEEDS_INPUTS}")
    return module, (tuple(args), dict(kwargs))


# --- models of transformers -----------------------------------------------------------------------


def _of_folder(folder: Path, tokens: int) -> Source:
    try:
        from transformers import AutoConfig, AutoModel
    except ModuleNotFoundError as missing:
        raise UsageError("a folder needs transformers: pip install transformers") from missing
    with user_errors(f"{folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    last: list[nn.Module] = []  # for the inputs

    def build(attn: str) -> nn.Module:
        with _seeded(folder.name), user_errors(f"{folder}"):
            if any(next(folder.glob(name), None) for name in WEIGHTS):
                model = AutoModel.from_pretrained(
                    folder,
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype="auto",
                    attn_implementation=attn,
                )
            else:
                make: Any = AutoModel.from_config  # not annotated
                model = make(config, attn_implementation=attn)
            if config.is_encoder_decoder:
                model = model.get_encoder()
        last[:] = [model.eval()]
        return last[0]

    def inputs(batch: int, draw: int = 0) -> Inputs:
        return made_inputs(last[0], batch, draw, tokens, str(folder))

    return _Source(str(folder), build, inputs)


def made_inputs(module: nn.Module, batch: int, draw: int, tokens: int, name: str) -> Inputs:
    """Random images or token ids in the sizes of a transformers config. Raises UsageError."""
    config = getattr(module, "config", None)
    takes = inspect.signature(module.forward).parameters
    found: dict[str, Any] = {}
    vision = getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    with _seeded(f"{name}/{batch}/{draw}"):
        if "pixel_values" in takes and (side := getattr(vision, "image_size", None)):
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            frames = [n] if (n := getattr(vision, "num_frames", None)) else []
            shape = (batch, *frames, getattr(vision, "num_channels", 3), height, width)
            found["pixel_values"] = torch.randn(shape)
        if "input_ids" in takes and (vocab := getattr(text, "vocab_size", None)):
            length = tokens
            if limit := getattr(text, "max_position_embeddings", None):
                # RoBERTa's position ids start after its padding id
                length = max(1, min(length, limit - 1 - (getattr(text, "pad_token_id", None) or 0)))
            found["input_ids"] = torch.randint(min(10, vocab // 2), vocab, (batch, length))
            if "attention_mask" in takes:
                found["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
    if not found:
        raise UsageError(
            f"{name}: no inputs can be made for {type(module).__name__}: it takes no pixel_values "
            f"or input_ids whose sizes a config says; give a module:callable, and {NEEDS_INPUTS}"
        )
    return (), found
