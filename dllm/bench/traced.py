"""What a step asks of a GPU, as torch.profiler saw it: launches, replays of graphs, copies, waits, and time at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch.profiler import profile

# calls of the host, by how their names begin or read
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
REPLAYS = ("cudaGraphLaunch", "cuGraphLaunch")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Record(NamedTuple):
    """One event: a call of the host, or a kernel or copy at work on the device; microseconds."""

    name: str
    device: bool
    start: float
    end: float


class Asked(NamedTuple):
    """Of one step."""

    launches: float
    replays: float
    copies: float
    waits: float
    busy: float  # seconds in which the device worked


def traced(work: Callable[[], object], steps: int) -> Asked:
    """What each of the `steps` asks that `work` takes."""
    with profile() as run:  # host and device, where there is one
        work()
    events = run.events() or ()
    records = (
        Record(e.name, e.device_type.name == "CUDA", e.time_range.start, e.time_range.end)
        for e in events
        if not e.is_user_annotation
    )
    return counted(records, steps)


def counted(records: Iterable[Record], steps: int) -> Asked:
    """The account of `steps` steps, divided by them."""
    known = list(records)
    host = [record.name for record in known if not record.device]
    return Asked(
        launches=sum(name.startswith(LAUNCHES) for name in host) / steps,
        replays=sum(name.startswith(REPLAYS) for name in host) / steps,
        copies=sum(name in COPIES for name in host) / steps,
        waits=sum(name in WAITS for name in host) / steps,
        busy=union(record for record in known if record.device) / 1e6 / steps,
    )


def union(records: Iterable[Record]) -> float:
    """Microseconds in which at least one of these ran."""
    total, reached = 0.0, float("-inf")
    for _, _, start, end in sorted(records, key=lambda r: r.start):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total
