"""torch.compile(DDP(model)) and FSDP, in a group of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphquant
from graphquant import Report
from graphquant.passes.eligibility import NEEDS_GRADIENT
from tests.small import FAR, NEAR, Mlp, error, int8, seeded

LINEARS = {f"blocks.{i}.{fc}" for i in range(3) for fc in ("fc1", "fc2")}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp() for _ in range(3)])
        self.register_buffer("scale", torch.full((64,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) * self.scale
        return x


@pytest.fixture
def one_process(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        world_size=1,
        rank=0,
        init_method=f"file://{tmp_path}/group",
    )
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2**14)  # else a bucket holds it all
    yield
    dist.destroy_process_group()


def parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=0.03)


def int8_paths(reports: list[Report]) -> list[str]:
    return [o.path for r in reports for o in r.linears if o.int8]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_every_piece_of_a_model_under_ddp_is_int8(inner: str, device: str, x: Tensor) -> None:
    model, reports = seeded(Blocks).to(device).eval(), list[Report]()
    run = int8(parallel(model), reports, inner=inner)
    with torch.no_grad():
        want = model(x)
        for _ in range(2):
            assert 0 < error(run(x), want) < NEAR
        assert len(reports) > 2  # DDP's optimizer has cut the graph
        assert sorted(int8_paths(reports)) == sorted(f"module.{path}" for path in LINEARS)
        for p in model.parameters():
            p.mul_(1.5)
        changed = model(x)
        assert error(want, changed) > FAR
        assert error(run(x), changed) < NEAR


@pytest.mark.usefixtures("one_process")
def test_training_under_ddp_is_eagers(device: str, x: Tensor) -> None:
    model, twin = (seeded(Blocks).to(device) for _ in range(2))
    reports: list[Report] = []
    int8(parallel(model), reports)(x).square().mean().backward()
    twin(x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert {o.refused for r in reports for o in r.linears} == {NEEDS_GRADIENT}


@pytest.mark.usefixtures("one_process")
def test_explain_of_a_model_under_ddp_finds_its_linears(device: str, x: Tensor) -> None:
    with torch.no_grad():
        report = graphquant.explain(parallel(seeded(Blocks).to(device).eval()), x)
    assert {o.path for o in report.linears if o.int8} == {f"module.{path}" for path in LINEARS}


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_parameters_are_followed(device: str, x: Tensor) -> None:
    model = seeded(Blocks).to(device).eval()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    run = int8(model)
    with torch.no_grad():
        assert error(run(x), model(x)) < NEAR
        before = model(x)
        for p in model.parameters():
            p.mul_(1.5)
        assert error(before, model(x)) > FAR
        assert error(run(x), model(x)) < NEAR
