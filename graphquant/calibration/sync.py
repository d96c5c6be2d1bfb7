"""All-reduce of calibration records over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphquant.calibration.histogram import BINS, Histogram
from graphquant.calibration.record import Record, Site
from graphquant.calibration.sample import sample_rows

SharedRecords = Sequence[tuple[tuple[Site, ...], Record]]


def all_gather(value: Any, group: Any) -> list[Any]:
    """This picklable value of every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def all_reduce_records(
    batches: int, shared: SharedRecords, group: Any
) -> tuple[int, list[tuple[tuple[Site, ...], Record]]]:
    """The number of batches and the records of all ranks together, the same on every rank.

    The ranks first exchange which sites share a record, and the exponents of the histograms. Sites
    that share a record on any rank share one in the result.
    """
    own = [(sites, record.histogram.exponent) for sites, record in shared]
    joined: list[tuple[set[Site], int]] = []
    for sites, exponent in chain(*all_gather(own, group)):
        met = [other for other in joined if not other[0].isdisjoint(sites)]
        joined = [other for other in joined if other not in met]
        merged = set(sites).union(*(paths for paths, _ in met))
        joined.append((merged, max([exponent, *(e for _, e in met)])))
    groups = sorted((tuple(sorted(sites)), exponent) for sites, exponent in joined)

    samples = all_gather({sites[0]: record.sample for sites, record in shared}, group)
    ends, counts = [], [torch.tensor([batches])]
    for sites, exponent in groups:
        parts = (record for own, record in shared if not set(own).isdisjoint(sites))
        record = sum(parts, Record.empty(sites[0].K))
        ends += [-record.low, record.high]
        counts.append(record.histogram.widen(exponent).counts)
        counts.append(torch.tensor([record.rows, record.calls, record.left_out]))
    high = _all_reduce(torch.cat(ends) if ends else torch.empty(0), dist.ReduceOp.MAX, group)
    total = _all_reduce(torch.cat(counts), dist.ReduceOp.SUM, group)

    batches, at, to = int(total[0]), 1, 0
    result = []
    for sites, exponent in groups:
        K = sites[0].K
        low, top = -high[to : to + K], high[to + K : to + 2 * K]
        histogram = Histogram(total[at : at + BINS].clone(), exponent)
        numbers = total[at + BINS : at + BINS + 3].tolist()
        rows = [rows for rank in samples for site, rows in rank.items() if site in sites]
        result.append(
            (sites, Record(low, top.clone(), histogram, sample_rows(torch.cat(rows)), *numbers))
        )
        at, to = at + BINS + 3, to + 2 * K
    return batches, result


def _all_reduce(values: Tensor, op: Any, group: Any) -> Tensor:
    """All-reduced, on the CPU. NCCL reduces on the GPU."""
    device = "cuda" if dist.get_backend(group) == dist.Backend.NCCL else "cpu"
    values = values.to(device)
    dist.all_reduce(values, op, group)
    return values.cpu()
