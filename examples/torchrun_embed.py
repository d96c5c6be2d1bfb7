"""Embed sentences on all processes of torchrun, each its share, and on one of them alone.

Each process has a model of its own, in int8 and without padding; nothing is exchanged but the
results. The exit code is 1 when the gathered embeddings differ from those of one process.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_embed.py
        [--device auto|cpu|cuda] [--inner eager|inductor] [--copies N] [--batch N]
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain

import torch
import torch.distributed as dist
from embed import embed, load_model, read_sentences, seconds
from torch import Tensor, nn
from transformers import BatchEncoding

import graphquant

RUNS = 5  # timed runs of each, after one that compiles; the fastest counts
CLOSE = 1e-5  # sentences of a batch are padded, and summed, to the longest one of it


def in_batches(texts: list[str], size: int) -> list[list[str]]:
    """Sentences of like lengths in a batch: what is left of padding is removed."""
    texts = sorted(texts, key=len)
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def embed_all(model: nn.Module, batches: list[BatchEncoding]) -> Tensor:
    return torch.cat([embed(model, batch) for batch in batches])


def best_seconds(model: nn.Module, batches: list[BatchEncoding], device: torch.device) -> float:
    return min(seconds(lambda: embed_all(model, batches), device) for _ in range(RUNS))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="inductor")
    parser.add_argument("--copies", type=int, default=8, help="of the sentences of embed.py")
    parser.add_argument("--batch", type=int, default=32, help="sentences")
    return parser.parse_args(argv)


def device_of(choice: str, rank: int) -> torch.device:
    """A GPU for each process, where there is one."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    dist.init_process_group("gloo")  # for numbers and results, which are on the CPU
    rank, size = dist.get_rank(), dist.get_world_size()
    device = device_of(args.device, rank)
    model, tokenize = load_model(device)
    report = graphquant.optimize_(model, inner=args.inner, padding="remove")

    sentences = [*chain.from_iterable(read_sentences().values())] * args.copies
    batches = in_batches(sentences, args.batch)
    every = [tokenize(batch) for batch in batches]
    own = every[rank::size]
    alone = embed_all(model, every).cpu()  # compiles, for all sizes
    one = torch.zeros(())
    if rank == 0:
        print(report.summary())
        one = torch.tensor(best_seconds(model, every, device))
    dist.broadcast(one, 0)  # the others wait, so that the first has the machine for itself
    together = torch.tensor(best_seconds(model, own, device) if own else 0.0)
    dist.all_reduce(together, dist.ReduceOp.MAX)  # done when the slowest is

    shares: list[list[Tensor]] = [[] for _ in range(size)]
    dist.all_gather_object(shares, [embed(model, batch).cpu() for batch in own])
    gathered = torch.cat([shares[i % size][i // size] for i in range(len(batches))])
    difference = float((gathered - alone).abs().max())
    if rank == 0:
        for name, took in (("1 process", float(one)), (f"{size} processes", float(together))):
            print(f"{name:<12} {len(sentences) / took:10,.0f} sentences/s")
        print(f"ratio        {float(one / together):10.2f}, the best of {RUNS} runs of each")
        print(f"difference   {difference:10.1e} of an embedding of length 1, at most")
    dist.destroy_process_group()
    return int(not difference < CLOSE)


if __name__ == "__main__":
    sys.exit(main())
