"""`dllm bench reads`: how many prompts a second have the labels of one slot read, one by one and eight at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import dllm
from dllm.bench.runtime import Figure, Timer
from dllm.models.arguments import Checkpoint
from dllm.models.model import Model
from dllm.tasks import registry as tasks

ASKED = 25.0  # a second, eight at a time
LABELS = tuple(map(str, range(10, 30)))


def run(
    repeats: int = 5, *, model: Model | str | Checkpoint = "tiny", n: int = 64, timer: Timer = time.perf_counter
) -> Iterator[Figure]:
    """The median over the repeats, both ways in turn, after one read of each that is not counted."""
    model = dllm.load(model) if isinstance(model, str | Checkpoint) else model
    prompts = [e.prompt for e in tasks.generate("word_problems", "test", n)]

    def seconds(batches: Sequence[list[str]]) -> float:
        began = timer()
        for batch in batches:
            dllm.read(model, batch, "#### {n}", slots={"n": LABELS}, batch_size=len(batch))
        return timer() - began

    ways = {size: [prompts[i : i + size] for i in range(0, n, size)] for size in (1, 8)}
    for batches in ways.values():
        seconds(batches[:1])
    taken = [{size: seconds(batches) for size, batches in ways.items()} for _ in range(repeats)]
    one, eight = (n / statistics.median(t[size] for t in taken) for size in (1, 8))
    note = f"{len(LABELS)} labels of one token, {n} prompts"
    yield Figure("reads a second, one by one", one, note=note)
    yield Figure("reads a second, 8 at a time", eight, ASKED, higher_is_better=True, note=note)
