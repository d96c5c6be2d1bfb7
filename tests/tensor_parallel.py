"""Cases of tests/test_tensor_parallel.py, each run by two processes:

python -m tests.tensor_parallel CASE BACKEND DEVICE FILE RANK
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import BertConfig, BertModel, InternVLVisionConfig, InternVLVisionModel

import graphquant
from graphquant._torch import local_of
from graphquant.ops import quantize
from graphquant.report import Report
from graphquant.weights.packed import packed_tensors

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
PARALLEL_BERT = {
    "attention.self.query": ColwiseParallel(),
    "attention.self.key": ColwiseParallel(),
    "attention.self.value": ColwiseParallel(),
    "attention.output.dense": RowwiseParallel(),
    "intermediate.dense": ColwiseParallel(),
    "output.dense": RowwiseParallel(),
}
PARALLEL_VIT = {
    "attention.q_proj": ColwiseParallel(),
    "attention.k_proj": ColwiseParallel(),
    "attention.v_proj": ColwiseParallel(),
    "attention.projection_layer": RowwiseParallel(),
    "mlp.fc1": ColwiseParallel(),
    "mlp.fc2": RowwiseParallel(),
}
PARALLEL_MLP = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
ON_DTENSORS = {
    "fc1": ColwiseParallel(use_local_output=False),
    "fc2": RowwiseParallel(use_local_output=False),
}


class ShardedNorm(ParallelStyle):
    """A norm over a sharded dim, as InternViT-6B has of its queries and keys. DTensor sums the
    squares over the processes: one number per token."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shard(name: str, norm: nn.Module, mesh: DeviceMesh) -> None:
            norm.weight = nn.Parameter(distribute_tensor(norm.weight, mesh, [Shard(0)]))

        return distribute_module(
            module, device_mesh, shard, None, lambda norm, y, mesh: y.to_local()
        )


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Embedded(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.words(ids))


class Inner(Mlp):
    """Takes and returns a DTensor if its layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class WithDropout(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), 0.5))


class Checkpointed(Inner):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.fc1, x, use_reentrant=False)
        return self.fc2(F.gelu(hidden))


class Sequence(nn.Module):
    """Norms and residuals on each process's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc3 = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc0(x)
        return self.fc3(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))


class Averaged(nn.Module):
    """A model whose processes have sentences of their own, and average their results."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(ids, attention_mask=attention_mask).last_hidden_state
        return collectives.all_reduce(hidden, "avg", dist.group.WORLD)


def error(got: Any, want: Any) -> float:
    got, want = (v.full_tensor() if isinstance(v, DTensor) else v for v in (got, want))
    return float((got - want).float().norm() / want.float().norm())


def exchanged(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """run(), and how often it called each collective of torch.distributed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return result, Counter(e.name for e in profile.events() if e.name.startswith("c10d::"))


class World:
    """The processes of a case, and how a model is made and compared on them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.mesh = init_device_mesh(device, (dist.get_world_size(),))
        torch.manual_seed(1)
        self.ids = torch.randint(3, 100, (4, 12), device=device)
        self.pixels = torch.randn(2, 3, 28, 28, device=device)
        self.x = torch.randn(2, 8, 64, device=device)

    def make(self, cls: Any, *args: Any) -> Any:
        torch.manual_seed(0)
        return cls(*args).eval().to(self.device)

    def bert(self, layers: int = 2) -> BertModel:
        sizes = {**SIZES, "num_hidden_layers": layers, "vocab_size": 100}
        config = BertConfig(**sizes, num_attention_heads=4, initializer_range=0.1)
        return self.make(BertModel, config, False)

    def vit(self, **options: Any) -> InternVLVisionModel:
        """InternViT: layer scale; with options as the 6B model has them, RMSNorm of q and k."""
        sizes = {**SIZES, "image_size": [28, 28], "patch_size": [7, 7], "initializer_range": 0.1}
        config = InternVLVisionConfig(**sizes, num_attention_heads=4, **options)
        return self.make(InternVLVisionModel, config)

    def sharded(
        self, model: Any, plan: dict[str, ParallelStyle], within: Iterable[Any] = ()
    ) -> Any:
        for layer in within or [model]:
            parallelize_module(layer, self.mesh, plan)
        return model

    def layers_of(self, vit: Any) -> Any:
        for layer in vit.encoder.layer:  # this model's code asks for the sizes of all heads
            layer.attention.num_heads //= self.mesh.size()
            layer.attention.embed_dim //= self.mesh.size()
        return vit.encoder.layer

    def compare(
        self, run: Callable[[Any], Any], make: Callable[[], Any], shard: Callable[[Any], Any],
        linears: int, **options: Any,
    ) -> tuple[Any, Report]:  # fmt: skip
        """Int8 in parallel against float and against int8 of one process, and its collectives
        against those of float. Returns the parallel model and its report."""
        one = make()
        want = run(one)
        graphquant.optimize_(one, inner="eager")
        lone = run(one)
        model = shard(make())
        in_float, before = exchanged(lambda: run(model))
        assert error(in_float, want) < 1e-5
        report = graphquant.optimize_(model, **{"inner": "eager", **options})
        run(model)
        got, after = exchanged(lambda: run(model))
        assert report.coverage == 1 and len(report.linears) == linears, report.summary()
        assert after == before and sum(before.values()), (before, after)
        assert 1e-5 < error(got, want) < 0.03
        # the rows of a RowwiseParallel linear have a scale for each shard, finer than one for all
        assert error(got, want) < 1.2 * error(lone, want), (error(got, want), error(lone, want))
        assert error(got, lone) < 0.03
        return model, report


def shards_only(model: nn.Module) -> None:
    """The packed weights are those of this process's shards, not of the whole model."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    shards = [local_of(m.weight) for m in linears if isinstance(m.weight, DTensor)]
    packed = sum(t.nbytes for t in packed_tensors(shards) if t.dtype == torch.int8)
    kept = sum(t.numel() for t in shards)
    assert kept <= packed < 1.1 * kept
    assert 2 * kept == sum(m.weight.numel() for m in linears if isinstance(m.weight, DTensor))


def bert(world: World, inner: str = "eager", layers: int = 2) -> None:
    """Everything about the usual plan, on the usual encoder."""
    model, report = world.compare(
        lambda m: m(world.ids).last_hidden_state,
        lambda: world.bert(layers),
        lambda m: world.sharded(m, PARALLEL_BERT, m.encoder.layer),
        linears=6 * layers,
        inner=inner,
    )
    _, counted = exchanged(lambda: model(world.ids))
    assert counted == {"c10d::allreduce_": 2 * layers}  # of attention and of the MLP
    sizes = {o.path: (o.N, o.K) for o in report.linears}
    assert sizes["encoder.layer.0.attention.self.query"] == (64, 128)
    assert sizes["encoder.layer.0.output.dense"] == (128, 128)
    rules = {o.path: o.rules for o in report.linears}
    assert rules["encoder.layer.0.attention.self.key"] == ("stack_siblings", "norm_linear")
    assert rules["encoder.layer.0.output.dense"] == ("act_linear",)
    assert any(f"{6 * layers} linears have weights sharded" in n for n in report.notes), (
        report.notes
    )
    shards_only(model)
    before = model(world.ids).last_hidden_state
    weight = model.encoder.layer[-1].output.dense.weight
    weight.copy_(-weight)  # each process's shard, in place
    after = model(world.ids).last_hidden_state
    graphquant.restore_(model)
    assert error(after, before) > 0.1
    assert error(after, model(world.ids).last_hidden_state) < 0.03


def vit(world: World, inner: str = "eager") -> None:
    model, _ = world.compare(
        lambda m: m(world.pixels).last_hidden_state,
        world.vit,
        lambda m: world.sharded(m, PARALLEL_VIT, world.layers_of(m)),
        linears=12,
        inner=inner,
    )
    _, counted = exchanged(lambda: model(world.pixels))
    assert counted == {"c10d::allreduce_": 4}
    shards_only(model)


def qk_norm(world: World) -> None:
    """InternViT-6B's norms over all heads of a token: sharded, or of gathered queries and keys."""
    make = partial(world.vit, norm_type="rms_norm", use_qk_norm=True)
    on_dtensors = ColwiseParallel(use_local_output=False)
    sharded = {
        **PARALLEL_VIT,
        **dict.fromkeys(("attention.q_proj", "attention.k_proj"), on_dtensors),
        **dict.fromkeys(("attention.q_norm", "attention.k_norm"), ShardedNorm()),
    }
    projections = [f"attention.{name}_proj" for name in "qkv"]
    gathered = {
        **PARALLEL_VIT,
        **dict.fromkeys(projections, ColwiseParallel(output_layouts=Replicate())),
        "attention.projection_layer": RowwiseParallel(input_layouts=Replicate()),
    }

    def run(model: Any) -> Any:
        return model(world.pixels).last_hidden_state

    world.compare(run, make, lambda m: world.sharded(m, sharded, world.layers_of(m)), 12)
    world.compare(run, make, lambda m: world.sharded(m, gathered, m.encoder.layer), 12)


def exact(world: World) -> None:
    """Which numbers are those of one process."""
    x, rank, size = world.x.flatten(0, 1), dist.get_rank(), dist.get_world_size()

    def in_int8(linear: Any, x: Tensor) -> Tensor:
        report = graphquant.optimize_(linear, inner="eager")
        result: Tensor = linear(x)
        assert report.coverage == 1, report.summary()
        return result

    whole = in_int8(world.make(nn.Linear, 64, 96), x)
    columns = in_int8(world.sharded(world.make(nn.Linear, 64, 96), ColwiseParallel()), x)
    assert torch.equal(columns, whole.chunk(size, dim=1)[rank])

    halves = torch.zeros(16, 96, device=world.device)
    for part in range(size):
        half = nn.Linear(32, 96).to(world.device)
        linear = world.make(nn.Linear, 64, 96)
        half.weight = nn.Parameter(linear.weight.chunk(size, dim=1)[part])
        half.bias = nn.Parameter(linear.bias / size)
        halves += in_int8(half, x.chunk(size, dim=1)[part].contiguous())
    rowwise = RowwiseParallel(input_layouts=Replicate())
    rows = in_int8(world.sharded(world.make(nn.Linear, 64, 96), rowwise), x)
    assert error(rows, halves) < 1e-6


def updates(world: World) -> None:
    """Packed weights follow the shards. The parameters that are written are DTensors."""
    model = world.sharded(world.make(Mlp), PARALLEL_MLP)
    graphquant.optimize_(model, inner="eager")
    last = model(world.x)

    def check(what: str) -> None:
        nonlocal last
        now = model(world.x)
        assert error(now, last) > 0.05, what
        assert error(now, Mlp.forward(model, world.x)) < 0.03, what
        last = now

    model.fc2.weight.copy_(model.fc2.weight * 3)
    check("copy_")
    model.fc1.weight.to_local().mul_(-1)
    check("a write to the shard")
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    check("load_state_dict")
    shards = [Shard(0)]
    new = torch.randn(128, 64, device=world.device) / 8
    model.fc1.weight = nn.Parameter(distribute_tensor(new, world.mesh, shards))
    check("another parameter")
    weights = [model.fc1.weight, model.fc2.weight]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=0.1, fused=True).step()
    check("a fused optimizer")
    model.fc2.weight.data.mul_(-1)
    graphquant.refresh(model)
    check("refresh")


def freed(world: World) -> None:
    """free_weights=True frees the shards."""
    model = world.sharded(world.make(Mlp), PARALLEL_MLP)
    want = model(world.x)
    graphquant.optimize_(model, inner="eager", free_weights=True)
    model(world.x)
    assert error(model(world.x), want) < 0.03
    for linear in (model.fc1, model.fc2):
        assert linear.weight.to_local().untyped_storage().nbytes() == 0
    with pytest.raises(graphquant.ReleasedWeightError, match=r"fc1\.weight"):
        graphquant.restore_(model)


def plans(world: World) -> None:
    """Less usual plans, of which DTensor's own rules compute some parts."""
    run, on_ids = (lambda m: m(world.x)), (lambda m: m(world.ids))
    fc1_whole = {
        "fc1": RowwiseParallel(input_layouts=Replicate()),
        "fc2": ColwiseParallel(output_layouts=Replicate()),
    }
    by_rows = {**PARALLEL_MLP, "words": RowwiseParallel(input_layouts=Replicate())}
    by_columns = {**PARALLEL_MLP, "words": ColwiseParallel(output_layouts=Replicate())}
    for cls, plan, call in (
        (Mlp, {"fc1": ON_DTENSORS["fc1"], "fc2": RowwiseParallel()}, run),
        (Mlp, fc1_whole, run),
        (Embedded, by_rows, on_ids),
        (Embedded, by_columns, on_ids),
        (Inner, ON_DTENSORS, run),
    ):
        make = partial(world.make, cls)
        world.compare(call, make, lambda m, plan=plan: world.sharded(m, plan), 2)


def sequence(world: World) -> None:
    """SequenceParallel: norms on a part of the tokens, gathered for the linears."""
    plan = {
        "fc0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "fc1": ColwiseParallel(input_layouts=Shard(1)),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
        "fc3": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    world.compare(
        lambda m: m(world.x), partial(world.make, Sequence), lambda m: world.sharded(m, plan), 4
    )


def reasons(world: World) -> None:
    """What stays float, and why; its results are those of float."""

    def check(model: Any, reason: str, *inputs: Any) -> None:
        torch._dynamo.reset()  # the sizes that it has seen
        want = [model(x) for x in inputs][-1]
        report = graphquant.optimize_(model, inner="aot_eager")
        got = [model(x) for x in inputs][-1]
        assert error(got, want) < 1e-5, reason
        assert not report.coverage, report.summary()
        assert any(reason in o.refused for o in report.linears), report.summary()

    with torch.enable_grad():
        model = world.sharded(world.make(Mlp), PARALLEL_MLP)
        check(model, "can need a gradient", world.x)
        model(world.x).sum().backward()
        got = model.fc1.weight.grad.full_tensor()
        alone = world.make(Mlp)
        alone(world.x).sum().backward()
        assert error(got, alone.fc1.weight.grad) < 1e-4

    def given(x: Tensor) -> DTensor:
        return DTensor.from_local(x, world.mesh, [Replicate()])

    # the first size is int8, the second makes Dynamo compile for all sizes
    model = world.sharded(world.make(Inner), ON_DTENSORS)
    check(model, "a DTensor of varying sizes", *(given(world.x.repeat(n, 1, 1)) for n in (1, 2)))

    with pytest.raises(NotImplementedError, match="sharding strategy"):  # called by hand
        quantize(given(world.x))

    model = world.sharded(world.make(Checkpointed), ON_DTENSORS)
    check(model, "a higher-order op on DTensors", given(world.x))

    model = world.sharded(world.make(WithDropout), ON_DTENSORS)
    model(given(world.x))
    report = graphquant.optimize_(model, inner="aot_eager")
    model(given(world.x))
    assert "draws random numbers" in report.linears[0].refused, report.summary()


def tools(world: World) -> None:
    """explain, compare and calibrate with sharded weights."""
    model = world.bert()
    world.sharded(model, PARALLEL_BERT, model.encoder.layer)
    batches = [{"input_ids": world.ids}]
    assert graphquant.explain(model, world.ids).coverage == 1
    calibration = graphquant.calibrate(model, batches, progress=False)
    options = {"calibration": calibration, "activation": "static"}
    comparison = graphquant.compare(model, batches, options=options)
    assert len(comparison.sites) == 12
    assert all(site.local.relative < 0.05 for site in comparison.sites)
    want = model(world.ids).last_hidden_state
    report = graphquant.optimize_(model, inner="eager", **options)
    assert error(model(world.ids).last_hidden_state, want) < 0.05
    assert report.coverage == 1
    assert all(calibration.range(linear.path) for linear in report.linears)
    # a calibration of the whole model, which saw all channels of each row
    whole = graphquant.calibrate(world.bert(), batches, progress=False)
    model = world.sharded(again := world.bert(), PARALLEL_BERT, again.encoder.layer)
    report = graphquant.explain(model, world.ids, options={"calibration": whole, "smooth": "auto"})
    assert report.coverage == 1
    assert any("the calibration saw 128 channels, it has 64" in n for n in report.notes)
    columns = [o for o in report.linears if "output" not in o.path]
    assert len(columns) == 8 and all(o.smoothed for o in columns), report.summary()


def padding(world: World) -> None:
    """Processes that share each token may leave out padding; others may have more tokens."""
    mask = torch.ones(4, 12, dtype=torch.long, device=world.device)
    mask[:2, 5:] = 0
    valid = mask.bool()
    model, report = world.compare(
        lambda m: m(world.ids, attention_mask=mask).last_hidden_state[valid],
        world.bert,
        lambda m: world.sharded(m, PARALLEL_BERT, m.encoder.layer),
        linears=12,
        padding="remove",
    )
    assert any(note.startswith("padding removed") for note in report.notes), report.notes
    assert not model(world.ids, attention_mask=mask).last_hidden_state[~valid].any()
    averaged = Averaged(world.bert()).eval()
    report = graphquant.optimize_(averaged, inner="eager", padding="remove")
    averaged(world.ids, mask)
    assert any("may have other sentences" in note for note in report.notes), report.notes


CASES = {
    "bert": bert,
    "bert of one layer": partial(bert, layers=1),
    "bert, Inductor": partial(bert, inner="inductor"),
    "vit": vit,
    "vit, Inductor": partial(vit, inner="inductor"),
    **{
        case.__name__: case
        for case in (
            *(qk_norm, exact, updates, freed, plans, sequence, reasons, tools, padding),
        )
    },
}  # fmt: skip


def main(case: str, backend: str, device: str, file: str, rank: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(backend, f"file://{file}", rank=int(rank), world_size=2)
    with torch.no_grad():
        CASES[case](World(device))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
