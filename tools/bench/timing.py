"""How calls are timed.

All variants of one row take turns, A B C A B C ..., so that a GPU that gets warm, or shares its
power, does so for all of them. Medians count.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

Call = Callable[[], object]
TURN = 5  # timed calls of one variant before the next has its turn
MIN_TURNS = 3
PEAK_CALLS = 3  # with CUDA graphs the second call of a compiled model records: that is its peak


@dataclass(frozen=True)
class Sample:
    """One call that starts on an idle device.

    ms               until the device has finished; host time counts as far as the device waits
    host_ms          until the call returns
    cpu_ms           time of the processor in all threads, which neighbors on the machine change
                     less
    back_to_back_ms  per call, of several that start without waiting for the one before
    """

    ms: float
    host_ms: float | None = None
    cpu_ms: float | None = None
    back_to_back_ms: float | None = None


class Timer:
    """CUDA; tests have one for the CPU without threads of its own."""

    device = "cuda"
    threads: int | None = None
    fastest = False  # does the fastest call count, rather than the median?

    @property
    def cache_bytes(self) -> int:
        """Of the last cache before memory."""
        return int(torch.cuda.get_device_properties().L2_cache_size)

    def wait(self) -> None:
        """Until the device has finished all work."""
        torch.cuda.synchronize()

    def sample(self, call: Call) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end), 1000 * (after - before))

    def back_to_back(self, call: Call, calls: int) -> float | None:
        """Milliseconds per call, of so many that start without waiting for the one before."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls

    def peak(self, call: Call) -> int | None:
        """The most bytes that were allocated during the call, beyond those before it, if known."""
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def sequence(self, calls: Sequence[Call]) -> Call:
        """One call that does the work of all of these in order, each into memory of its own, with
        as little host time as the device can do with: a CUDA graph, with which its results stay."""
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for call in (*calls, *calls):  # compile, then see that nothing is left to compile
                call()
        here.wait_stream(side)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]

        def replay(_keep: object = results) -> None:
            graph.replay()

        return replay

    def forget(self) -> None:
        """Give back what compiled models that nobody holds any more have left."""
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        torch._dynamo.reset()
        reset_cudagraph_trees()
        gc.collect()
        torch.cuda.empty_cache()


class CpuTimer(Timer):
    """Calls on `threads` threads of the CPU. The minimum counts: all that can happen to a call
    there, on a machine that others use too, makes it slower."""

    device = "cpu"
    fastest = True

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def wait(self) -> None: ...

    def sample(self, call: Call) -> Sample:
        wall, busy = time.perf_counter(), time.process_time()
        call()
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        return Sample(1000 * wall, cpu_ms=1000 * busy)

    def back_to_back(self, call: Call, calls: int) -> None:
        """The same as single calls, which this device never waits for."""

    def peak(self, call: Call) -> None:
        call()

    def forget(self) -> None:
        torch._dynamo.reset()
        gc.collect()


def interleaved(
    timer: Timer, calls: Mapping[str, Call], seconds: float
) -> dict[str, list[Sample] | Exception]:
    """Samples of every call, taken in turns for about `seconds` each; or what it raised."""
    found: dict[str, list[Sample] | Exception] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    start = time.perf_counter()
    turns = 0
    while samples and (turns < MIN_TURNS or time.perf_counter() - start < seconds * len(samples)):
        for name in list(samples):
            try:
                calls[name]()  # what another variant left in the caches is not its fault
                timer.wait()
                new = [timer.sample(calls[name]) for _ in range(TURN)]
                together = timer.back_to_back(calls[name], TURN)
                samples[name] += [replace(s, back_to_back_ms=together) for s in new]
            except Exception as error:  # noqa: BLE001 - one variant must not stop the others
                found[name] = error
                del samples[name]
        turns += 1
    return {**found, **samples}


def host_us(timer: Timer, call: Call, calls: int = 20, times: int = 5) -> float:
    """Microseconds of host time for one call, while the device is not waited for."""
    call()
    taken = []
    for _ in range(times):
        timer.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls)
    timer.wait()
    return 1e6 * statistics.median(taken)


def spread(values: Sequence[float]) -> float:
    """How far the 10th and the 90th percentile are apart, relative to the median."""
    tenths = statistics.quantiles(values, n=10)
    return (tenths[-1] - tenths[0]) / statistics.median(values)
