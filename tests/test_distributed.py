"""Inference in several processes: docs/recipes/distributed.md."""

from __future__ import annotations

import pytest

from tests.processes import in_a_group

pytestmark = pytest.mark.slow  # two processes that compile

CODE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel
import graphquant

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100}
CONFIG = BertConfig(**SIZES, num_attention_heads=4)

def make():
    torch.manual_seed(0)
    return BertModel(CONFIG, add_pooling_layer=False).eval()

def shard(model):
    mesh = init_device_mesh("cpu", (2,))  # by default FSDP2 takes a GPU, if there is one
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

def check(model, optimized, ids, want, linears):
    report = graphquant.optimize_(optimized, inner="eager")
    got = model(ids).last_hidden_state
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 0.03, error
    assert report.coverage == 1 and len(report.linears) == linears, report.summary()

def work(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        want = make()(ids).last_hidden_state
        wrapped = DistributedDataParallel(make()).eval()
        check(wrapped, wrapped, ids, want, 12)
        inside = make()
        check(DistributedDataParallel(inside).eval(), inside, ids, want, 12)
        sharded = shard(make())
        check(sharded, sharded, ids, want, 6)  # the layers share a graph
    dist.destroy_process_group()

if __name__ == "__main__":
    work(int(sys.argv[2]), sys.argv[1])
"""


def test_two_processes_run_int8_under_ddp_and_fsdp2(tmp_path: object) -> None:
    in_a_group(["-c", CODE, tmp_path], 2)
