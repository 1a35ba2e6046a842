"""The engine: one `decode` loop. Follow a token from here.

    batch -> runner.tick: plan -> model.forward -> Prediction -> step -> opened -> flags -> facts -> retire, refill

Rows are independent: a row's window, refresh, noise, counters and exit never depend on its neighbours. The device is
waited for once a tick: a small table says what the host must know to go on (`facts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dllm.decoding.cache.policy import Policy
from dllm.decoding.canvas import State
from dllm.decoding.facts import fetch, flags
from dllm.decoding.graphs import index
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Batch, Options, Part, Runner, Stepped, Tick
from dllm.decoding.slots import Sampler
from dllm.decoding.step import opened
from dllm.errors import DllmError
from dllm.models.model import Model


@torch.inference_mode()  # as a decorator it is left at every yield
def decode(
    model: Model,
    s: Sampler,
    policy: Policy,
    queue: State,
    *,
    batch_size: int,
    options: Options,
    meter: Meter,
    runner: Callable[..., Runner] = Runner,
) -> Iterator[Tick]:
    """Decode every row of `queue`, at most `batch_size` at a time; a finished row makes room for the next one.

    Yields the rows that stepped. Errors: NaN logits in mid-decode.
    """
    run = runner(model, s, policy, options, meter)
    waiting = Waiting.of(s, policy, queue)
    caps = [options.cap(f) for f in waiting.all.facts]
    batch = waiting.first(min(batch_size, queue.rows))
    run.begin(batch)
    free = list[int]()
    while busy := batch.busy:
        ending = [i for i in busy if batch.facts[i].closing or batch.request[i] in meter.capped]
        parts = [batch.took(run.close(batch.part(ending)))] if ending else run.tick(batch)
        batch.facts = fetch(batch.flags)  # the wait of the tick
        if not all(batch.facts[i].finite for i in busy):
            raise DllmError(
                "the model returned NaN or infinite logits: load it in float32 or bfloat16, or check the checkpoint"
            )
        for p in parts:
            settled(batch, p)
            ended(s, batch, p.part)
            facts = [batch.facts[i] for i in p.part.rows]
            meter.computed(p.part.request, [f.fed for f in facts])
            meter.finish(r for r, f in zip(p.part.request, facts, strict=True) if f.done)
            yield from run.ticks(p.part, facts, batch.state)
        over(batch, [i for i in busy if batch.request[i] in meter.halted and not batch.facts[i].done])
        for i in busy:
            request, f = batch.request[i], batch.facts[i]
            assert request is not None
            if f.done:
                batch.request[i] = None
                free.append(i)
            elif f.step >= max(1, caps[request] - 1) and not f.closing:  # one that has just entered steps once
                meter.capped.add(request)
        # With a lookahead lanes have taken different numbers of steps. A waiting row enters a free lane once no busy
        # lane has taken fewer than that one: at this step the plain call would let it in.
        due = min((run.clock(i) for i in busy if batch.request[i] is not None), default=None)
        entered = waiting.enter(batch, [i for i in free if due is None or run.clock(i) <= due])
        free = [i for i in free if i not in entered]


def settled(batch: Batch, p: Stepped) -> None:
    """Rows that an exit ends are filled from the forward that they just had, if it covered all that this takes."""
    rows = [j for j, i in enumerate(p.part.rows) if batch.facts[i].closing and batch.facts[i].covered]
    if not rows:
        return
    now = batch.part(p.part.rows)
    which = torch.zeros_like(now.state.done).index_fill(0, index(rows, now.at.device), True)
    state, _ = p.fill(now.state, which, max(now.facts[j].masks for j in rows))
    finished(batch, now._replace(state=state), rows)


def ended(s: Sampler, batch: Batch, part: Part) -> None:
    """Rows end where a stop string stands in what became final. `part`: as they were before the step."""
    if s.stop is None:
        return
    new = [batch.facts[i] for i in part.rows]
    grown = [j for j, (was, f) in enumerate(zip(part.facts, new, strict=True)) if f.closed > was.closed and not f.done]
    if not grown:
        return
    texts = batch.part([part.rows[j] for j in grown]).state.canvas.ids.tolist()
    stopped = [
        part.rows[j]
        for j, ids in zip(grown, texts, strict=True)
        if s.stop.over(ids[new[j].start : new[j].closed], part.facts[j].closed - new[j].start)
    ]
    over(batch, stopped)


def over(batch: Batch, rows: list[int]) -> None:
    """End these rows."""
    if rows:
        now = batch.part(rows)
        state = now.state._replace(done=torch.ones_like(now.state.done))
        finished(batch, now._replace(state=state), list(range(len(rows))))


def finished(batch: Batch, now: Part, rows: list[int]) -> None:
    """Put back rows of which some, by their places, ended by what the host found out after the tick's wait."""
    batch.put(now.rows, now.state, now.window, batch.flags[now.at])
    for i in (now.rows[j] for j in rows):
        batch.facts[i] = batch.facts[i]._replace(done=1, closing=0)


class Waiting:
    """The requests of a call, windows open, and how many of them have entered a row so far."""

    def __init__(self, everything: Batch) -> None:
        self.all, self.entered = everything, 0

    @classmethod
    def of(cls, s: Sampler, policy: Policy, queue: State) -> Waiting:
        """All windows are opened at once: one wait tells what the first forward of every row needs."""
        state, window = opened(s, policy, queue)
        no, zero = torch.zeros_like(state.done), torch.zeros_like(state.step)
        table = flags(state, window, covered=no, finite=~no[0], fed=zero)
        return cls(Batch(state, window, table, fetch(table), list(range(queue.rows))))

    def first(self, size: int) -> Batch:
        """A batch of the first requests."""
        self.entered = size
        at = index(range(size), self.all.flags.device)
        state, window = self.all.state.take(at), self.all.window.take(at)
        return Batch(state, window, self.all.flags[at], self.all.facts[:size], list(range(size)))

    def enter(self, batch: Batch, rows: list[int]) -> list[int]:
        """Put the next requests into these free rows, in order; which of the rows they took."""
        taken = rows[: len(self.all.request) - self.entered]
        if not taken:
            return taken
        requests = list(range(self.entered, self.entered + len(taken)))
        at = index(requests, batch.flags.device)
        batch.put(taken, self.all.state.take(at), self.all.window.take(at), self.all.flags[at])
        for row, request in zip(taken, requests, strict=True):
            batch.facts[row], batch.request[row] = self.all.facts[request], request
        self.entered += len(taken)
        return taken
