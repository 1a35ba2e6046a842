"""The engine: one loop, the ticks of a `Group`. Follow a token from here.

    waiting -> batch -> runner.tick: plan -> model.forward -> Prediction -> step -> opened -> flags -> facts -> done

Rows are independent: a row's window, refresh, noise, counters and exit never depend on its neighbours, so rows of any
calls that decode by the same setting share a group, and come and go between ticks. The device is waited for once a
tick: a small table says what the host must know to go on (`facts`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, repeat
from types import MappingProxyType
from typing import NamedTuple

import torch

from dllm.decoding.cache.policy import Policy
from dllm.decoding.cache.prefix import Prefixes, Stored
from dllm.decoding.canvas import State
from dllm.decoding.facts import fetch, flags
from dllm.decoding.graphs import index
from dllm.decoding.meter import Meter, Ticket, computed
from dllm.decoding.runner import Ask, Batch, Options, Part, Runner, Stepped, Tick
from dllm.decoding.slots import Sampler
from dllm.decoding.step import opened
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.transformer import Said

BROKEN = "the model returned NaN or infinite logits: load it in float32 or bfloat16, or check the checkpoint"


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
    group = Group(runner(model, s, policy, options), min(batch_size, queue.rows))
    group.submit(queue, meter.rows)
    while group.busy:
        ticks = group.tick()
        if any(row.broken for row in meter.rows):
            raise DllmError(BROKEN)
        yield from ticks


class Waiting(NamedTuple):
    """A row that waits for a lane."""

    among: Batch  # the rows that were submitted with it, windows open
    place: int
    prompt: list[int]  # what may be kept of it: whole blocks, in a group that reuses them
    found: list[Stored]  # of these, those that are there

    @property
    def ticket(self) -> Ticket:
        """Its own."""
        ticket = self.among.request[self.place]
        assert ticket is not None
        return ticket


class Group:
    """Rows that decode by one setting, that of a runner, and share their forwards.

    A group has `lanes` for so many at a time, and all of its canvases are of one width. Rows are submitted at any time,
    wait in line, enter free lanes, and leave when they are done or their ticket is halted; other lanes never notice.
    With `prefixes` the blocks that a prompt begins with are computed once (block-causal models, an exact cache).
    """

    def __init__(self, run: Runner, lanes: int, prefixes: Prefixes | None = None) -> None:
        self.run, self.lanes, self.prefixes = run, lanes, prefixes
        self.fresh = dict[int, list[int]]()  # prompts that have just entered, by lane: their blocks are to be kept
        self.line = deque[Waiting]()
        self.free = list(range(lanes))
        self.caps = [0] * lanes  # steps that the row of each lane may take
        self.batch: Batch | None = None
        self.asked: list[Ask] = []  # that others may answer, in this tick

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return self.rows > 0

    @property
    def rows(self) -> int:
        """Rows that decode, or wait. Other threads may ask while some enter and leave."""
        return len(self.line) + (0 if self.batch is None else len(self.batch.busy))

    @property
    def tickets(self) -> list[Ticket]:
        """Theirs."""
        return [*(row.ticket for row in self.line), *(() if self.batch is None else self.batch.tickets)]

    @torch.inference_mode()
    def submit(self, queue: State, tickets: Sequence[Ticket]) -> None:
        """Rows, each with its ticket, for the next ticks. All windows are opened at once: one wait tells what the first
        forward of every row needs."""
        prompts: list[list[int]] = [[] for _ in tickets]
        found: list[list[Stored]] = [[] for _ in tickets]
        if self.prefixes is not None:
            prompts = [ids[:end] for ids, end in zip(*queue.canvas.given(), strict=True)]
            found = [self.prefixes.find(ids) for ids in prompts]
            ends = [self.prefixes.block * len(blocks) or -1 for blocks in found]
            queue = queue._replace(cached=queue.cached._replace(frontier=queue.step.new_tensor(ends)))
        rows = opening(self.run.s, self.run.policy, queue, tickets)
        self.line.extend(map(Waiting, repeat(rows), range(queue.rows), prompts, found))
        if self.batch is None:
            self.batch = vacant(rows, self.lanes)
            self.run.begin(self.batch)

    def tick(self) -> list[Tick]:
        """Let rows leave and enter, then step by forwards of their own: what observers are shown of it."""
        self.turnover()
        return self.advance()

    @torch.inference_mode()
    def turnover(self) -> None:
        """Let rows leave, and others enter."""
        if self.batch is not None:
            self._leave(self.batch)
            self._enter(self.batch)

    @torch.inference_mode()
    def ask(self) -> list[Ask]:
        """The forwards that the next step waits for, if others may share them: `advance` takes what they said."""
        run, batch = self.run, self.batch
        if run.shares and batch is not None and batch.busy and not ending(batch):
            self.asked = run.asks(batch)
        return self.asked

    @torch.inference_mode()
    def advance(self, said: Mapping[int, Said] = MappingProxyType({})) -> list[Tick]:
        """Step, by what forwards `said` to what was asked, by place, and by own ones: what observers are shown of it.

        A row whose logits have no softmax ends, and its ticket says so.
        """
        run, batch = self.run, self.batch
        if batch is None or not batch.busy:
            return []
        busy, tickets, last = batch.busy, batch.tickets, ending(batch)
        asked, self.asked = self.asked, []
        if asked:
            answers = [said[i] if i in said else run.alone(ask) for i, ask in enumerate(asked)]
            parts = [batch.took(run.told(ask, own)) for ask, own in zip(asked, answers, strict=True)]
        else:
            parts = [batch.took(run.close(batch.part(last)))] if last else run.tick(batch)
        batch.facts = fetch(batch.flags)  # the wait of the tick
        self._broken(batch, busy)
        ticks = list[Tick]()
        for p in parts:
            settled(batch, p)
            ended(run.s, batch, p.part)
            facts = [batch.facts[i] for i in p.part.rows]
            computed(p.part.request, [f.fed for f in facts])
            for ticket, f in zip(p.part.request, facts, strict=True):
                if f.done:
                    ticket.finish()
            ticks += run.ticks(p.part, facts, batch.state)
        self._keep(batch)
        for i, ticket in zip(busy, tickets, strict=True):
            f = batch.facts[i]
            if f.done:
                batch.request[i] = None
                self.free.append(i)
            elif f.step >= max(1, self.caps[i] - 1) and not f.closing:  # one that has just entered steps once
                ticket.capped = True
        return ticks

    def _leave(self, batch: Batch) -> None:
        """Free the lanes of rows that were ended from outside."""
        out = [i for i, ticket in enumerate(batch.request) if ticket is not None and ticket.halted]
        over(batch, out)
        for i in out:
            batch.request[i] = None
        self.free += out

    def _enter(self, batch: Batch) -> None:
        """Put the next rows of the line into free lanes.

        With a lookahead lanes have taken different numbers of steps. A row enters a free lane once no busy lane has
        taken fewer than that one: at this step the plain call would let it in.
        """
        clock, entering = self.run.clock, list[tuple[int, Waiting]]()
        due = min(map(clock, batch.busy), default=None) if self.free else None
        for lane in [i for i in self.free if due is None or clock(i) <= due]:
            while self.line and self.line[0].ticket.halted:
                self.line.popleft()
            if not self.line:
                break
            entering.append((lane, self.line.popleft()))
        for _, some in groupby(entering, lambda pair: id(pair[1].among)):
            lanes, rows = zip(*some, strict=True)
            self._put(batch, rows[0].among, lanes, [row.place for row in rows])
        if self.prefixes is not None:
            for lane, row in entering:
                self._reuse(self.prefixes, lane, row)
        self.free = [i for i in self.free if batch.request[i] is None]
        if self.free and not self.line and due is not None:
            self.run.rest(self.free, due)

    def _put(self, batch: Batch, among: Batch, lanes: Sequence[int], places: Sequence[int]) -> None:
        at = index(places, batch.flags.device)
        batch.put(list(lanes), among.state.take(at), among.window.take(at), among.flags[at])
        for lane, place in zip(lanes, places, strict=True):
            batch.facts[lane], batch.request[lane] = among.facts[place], among.request[place]
            self.caps[lane] = self.run.options.cap(among.facts[place])
            if (ticket := among.request[place]) is not None:
                ticket.enter()

    def _reuse(self, prefixes: Prefixes, lane: int, row: Waiting) -> None:
        """Put what is known of a prompt into the lane."""
        store, lo = self.run.store, row.among.facts[row.place].lo
        assert store is not None
        if row.found:
            prefixes.load(row.found, store, lane)
        row.ticket.cached = prefixes.block * len(row.found)
        self.fresh[lane] = row.prompt[:lo]  # the store keeps what lies in front of the window

    def _keep(self, batch: Batch) -> None:
        """Take the blocks of prompts from lanes that have had their first forward."""
        for lane, ids in list(self.fresh.items()):
            f = batch.facts[lane]
            if f.step and f.finite and self.prefixes is not None and self.run.store is not None:
                self.prefixes.keep(ids, self.run.store, lane)
            if f.step or batch.request[lane] is None:
                del self.fresh[lane]

    def _broken(self, batch: Batch, busy: list[int]) -> None:
        """End the rows whose last logits had no softmax."""
        rows = list[int]()
        for i, ticket in zip(busy, batch.tickets, strict=True):
            if not batch.facts[i].finite:
                ticket.broken = True
                rows.append(i)
        if rows:
            over(batch, rows)
            self.run.forget(rows)


def ending(batch: Batch) -> list[int]:
    """Rows whose next forward fills what is left."""
    return [i for i, t in zip(batch.busy, batch.tickets, strict=True) if batch.facts[i].closing or t.capped]


def opening(s: Sampler, policy: Policy, queue: State, tickets: Sequence[Ticket]) -> Batch:
    """Rows that have not stepped yet, with open windows."""
    state, window = opened(s, policy, queue)
    no, zero = torch.zeros_like(state.done), torch.zeros_like(state.step)
    table = flags(state, window, covered=no, finite=~no, fed=zero)
    return Batch(state, window, table, fetch(table), list(tickets))


def vacant(rows: Batch, lanes: int) -> Batch:
    """Lanes for rows such as these, all of them free: what stands there is done."""
    at = index([0] * lanes, rows.flags.device)
    state = rows.state.take(at)
    state = state._replace(done=torch.ones_like(state.done))
    return Batch(state, rows.window.take(at), rows.flags[at], rows.facts[:1] * lanes, [None] * lanes)


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
