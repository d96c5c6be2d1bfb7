"""Records of several processes become those of all their data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphquant.calibration.histogram import BINS, Histogram
from graphquant.calibration.record import Record, Site
from graphquant.calibration.sample import smallest

Shared = Sequence[tuple[tuple[Site, ...], Record]]


def gathered(value: Any, group: Any) -> list[Any]:
    """This picklable value of every rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group)
    return found


def all_reduced(
    batches: int, shared: Shared, group: Any
) -> tuple[int, list[tuple[tuple[Site, ...], Record]]]:
    """The batches of all ranks, and the records: the same on every rank.

    The ranks first tell each other which sites share a record and the exponents of the histograms.
    Sites that share one on any rank share one now.
    """
    mine = [(sites, record.histogram.exponent) for sites, record in shared]
    joined: list[tuple[set[Site], int]] = []
    for sites, exponent in chain(*gathered(mine, group)):
        met = [other for other in joined if not other[0].isdisjoint(sites)]
        joined = [other for other in joined if other not in met]
        merged = set(sites).union(*(paths for paths, _ in met))
        joined.append((merged, max([exponent, *(e for _, e in met)])))
    every = sorted((tuple(sorted(sites)), exponent) for sites, exponent in joined)

    samples = gathered({sites[0]: record.sample for sites, record in shared}, group)
    ends, counts = [], [torch.tensor([batches])]
    for sites, exponent in every:
        own = (record for mine, record in shared if not set(mine).isdisjoint(sites))
        record = sum(own, Record.empty(sites[0].K))
        ends += [-record.low, record.high]
        counts.append(record.histogram.over(exponent).counts)
        counts.append(torch.tensor([record.rows, record.calls, record.left_out]))
    high = _reduced(torch.cat(ends) if ends else torch.empty(0), dist.ReduceOp.MAX, group)
    total = _reduced(torch.cat(counts), dist.ReduceOp.SUM, group)

    batches, at, to = int(total[0]), 1, 0
    made = []
    for sites, exponent in every:
        K = sites[0].K
        low, top = -high[to : to + K], high[to + K : to + 2 * K]
        histogram = Histogram(total[at : at + BINS].clone(), exponent)
        numbers = total[at + BINS : at + BINS + 3].tolist()
        kept = [rows for rank in samples for site, rows in rank.items() if site in sites]
        made.append(
            (sites, Record(low, top.clone(), histogram, smallest(torch.cat(kept)), *numbers))
        )
        at, to = at + BINS + 3, to + 2 * K
    return batches, made


def _reduced(values: Tensor, op: Any, group: Any) -> Tensor:
    """On every rank the same; NCCL reduces on the GPU."""
    device = "cuda" if dist.get_backend(group) == dist.Backend.NCCL else "cpu"
    values = values.to(device)
    dist.all_reduce(values, op, group)
    return values.cpu()
