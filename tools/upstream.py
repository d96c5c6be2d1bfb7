"""PyTorch's own test programs through the backend: `python -m tools.upstream --limit 300`.

The modules and operators of torch.testing._internal, in float32 on the CPU and unquantized, run in
eager, with backend="aot_eager" and with graphquant (inner "eager" and "aot_eager"). What differs
from eager in values, dtypes, shapes or strides, where aot_eager does not, is a fault of ours and
is printed; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

INNERS = ("eager", "aot_eager")
Program = tuple[str, Callable[[], Callable[..., Any]], tuple[Any, ...], dict[str, Any]]
"""name, what makes the function, its arguments"""


def of_module(info: Any) -> Iterator[Program]:
    for training in (False, True) if info.train_and_eval_differ else (False,):
        samples = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
        )
        for i, sample in enumerate(samples):
            made, given = sample.constructor_input, sample.forward_input

            def build(made: Any = made, training: bool = training) -> nn.Module:
                torch.manual_seed(0)
                module: nn.Module = info.module_cls(*made.args, **made.kwargs)
                return module.train(training)

            if given is not None:
                name = f"{info.name} {i}{' in training' * training}"
                yield name, build, given.args, given.kwargs


def of_operator(info: Any) -> Iterator[Program]:
    for i, sample in enumerate(info.sample_inputs("cpu", torch.float32)):
        for op in filter(None, (info.op, info.inplace_variant)):

            def build(op: Any = op) -> Callable[..., Any]:
                return lambda *args, **kwargs: op(*args, **kwargs)

            name = f"{info.name} {info.variant_test_name} {i}{' in place' * (op is not info.op)}"
            yield name, build, (sample.input, *sample.args), sample.kwargs


def attention() -> Iterator[Program]:
    """What Inductor's patterns of attention look for."""
    from torch._inductor.fx_passes import fuse_attention

    q, k, v = (torch.randn(2, 8, 4, 16) for _ in range(3))
    for name, pattern in vars(fuse_attention).items():
        if not name.startswith("_sfdp_pattern_"):
            continue
        names = pattern.__code__.co_varnames[: pattern.__code__.co_argcount]
        known = {
            "query": q,
            "key": k,
            "value": v,
            "inv_scale": 4.0,
            "scale_factor": 0.25,
            "inv_scale_factor": 4.0,
            "dropout_p": 0.0,
            "attn_mask": torch.zeros(1, 1, 8, 8),
            "causal_mask_value": torch.tensor(-1e9),
        }
        if all(n in known for n in names):
            yield name, lambda pattern=pattern: pattern, tuple(known[n] for n in names), {}


def outcome(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Results and arguments afterwards, or the type of the exception."""
    args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            results = function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - what is raised is a result as well
        return error
    return tree_leaves((results, args, kwargs))


def difference(got: Any, want: Any) -> str:
    """Why these outcomes are not one, or ""."""
    if isinstance(got, Exception) or isinstance(want, Exception):
        same = isinstance(got, Exception) and isinstance(want, Exception)
        return "" if same else f"{_shown(got)} instead of {_shown(want)}"
    if len(got) != len(want):
        return f"{len(got)} results instead of {len(want)}"
    for g, w in zip(got, want, strict=True):
        if not isinstance(w, Tensor):
            continue
        if (g.shape, g.dtype, g.layout) != (w.shape, w.dtype, w.layout):
            return f"{g.shape}, {g.dtype} instead of {w.shape}, {w.dtype}"
        if w.layout is torch.strided and not w.is_quantized:
            steps = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (g, w)]
            if w.numel() and steps[0] != steps[1]:
                return f"strides {steps[0]} instead of {steps[1]}"
        try:
            torch.testing.assert_close(g, w, equal_nan=True, check_stride=False)
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error).replace("\n", " ")[:200]
    return ""


def _shown(result: Any) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {str(result).strip()[:300]}"
    return "a result"


def faults(program: Program) -> Iterator[str]:
    name, build, args, kwargs = program
    want = outcome(build(), args, kwargs)
    if isinstance(want, Exception) or difference(outcome(build(), args, kwargs), want):
        return  # random, or of no meaning with these arguments
    for inner in INNERS:
        torch._dynamo.reset()
        options = {"inner": inner, "quantize": False}
        run = torch.compile(build(), backend="graphquant", options=options, dynamic=False)
        if not (why := difference(got := outcome(run, args, kwargs), want)):
            continue
        torch._dynamo.reset()
        right = outcome(torch.compile(build(), backend="aot_eager", dynamic=False), args, kwargs)
        if why := difference(got, right):
            yield f"{name}, inner {inner}: {why}"


def chosen(seed: int) -> Iterator[Program]:
    """The attention, then one program of every module and operator after the other, then another
    one of each."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    yield from attention()
    groups = [of_module(info) for info in module_db]
    groups += [
        of_operator(info)
        for info in op_db
        if torch.float32 in info.dtypes and "empty" not in info.name  # whatever lies in memory
    ]
    random.Random(seed).shuffle(groups)
    while groups:
        for group in list(groups):
            if (program := next(group, None)) is None:
                groups.remove(group)
            else:
                yield program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=10**9, help="how many programs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--seed", type=int, default=0, help="of their order")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    began, found, ran = time.monotonic(), 0, 0
    for program in itertools.islice(chosen(options.seed), options.limit):
        if time.monotonic() - began > options.seconds:
            break
        ran += 1
        for fault in faults(program):
            found += 1
            print(fault, flush=True)
    print(f"{ran} programs, {found} faults, {time.monotonic() - began:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
