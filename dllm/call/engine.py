"""`Engine`: a model that stays up and decodes requests as they come.

    submit -> line -> admission -> a `Group` of rows with the same setting -> a tick of all groups -> events -> request

One thread ticks. Requests with the same setting are a group (`dllm.decoding.engine`), and one forward serves several
groups where it can (`dllm.decoding.merging`); whoever submits only prepares, waits and reads. A row gets token for
token what `dllm.generate` gives it alone, so one that ran out of memory begins anew without a trace in its stream.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar, Unpack, cast, overload

import torch

from dllm.call.arguments import DecodingArguments
from dllm.call.budget import Room, budget
from dllm.call.generate import Told, answers
from dllm.call.job import Job, ModelLike, prepare, resolve_model
from dllm.call.output import Event, News, Output
from dllm.call.prompts import One, Prompt, Several, joined
from dllm.decoding.cache.prefix import Prefixes
from dllm.decoding.canvas import State
from dllm.decoding.canvas import joined as stacked
from dllm.decoding.engine import BROKEN, Group
from dllm.decoding.graphs import Counts, forget, index
from dllm.decoding.merging import merged, parted, together
from dllm.decoding.meter import Kind, Meter, Ticket, Watch, served
from dllm.decoding.runner import Ask, Tick
from dllm.decoding.trace import Trace
from dllm.errors import Cancelled, DllmError, QueueFull, TimedOut, out_of_memory
from dllm.models.transformer import Said

log = logging.getLogger(__name__)
GATHER = 0.02  # seconds that a first forward waits for requests that are on their way
OVERTAKES = 8  # younger requests that may pass one that does not fit yet
T = TypeVar("T")
Answer_co = TypeVar("Answer_co", covariant=True)


class Load(NamedTuple):
    """What an engine does at the moment."""

    running: int  # rows in lanes
    waiting: int  # requests that are not all in lanes
    groups: int  # settings that are being decoded
    kv_bytes: int  # of their stores
    requests: int  # that have rows in lanes
    lanes: int  # rows that may run at a time, as far as memory lets


class Observer(Protocol):
    """Who is told what an engine does, in the engine's thread, which waits meanwhile."""

    def forward(self, kind: Kind, rows: int) -> None:
        """A batched forward serves so many rows."""

    def ticked(self, seconds: float, ticks: Sequence[Tick]) -> None:
        """A tick of a group took so long, and these rows stepped. Copy what you keep."""


class Request(Generic[Answer_co]):
    """A request of an engine: its stream, its answer, its end."""

    def __init__(
        self, job: Job, alone: bool, deadline: float | None, wake: Callable[[], None], watch: Watch | None = None
    ) -> None:
        self.job, self.deadline = job, deadline
        self.told = Told(job, live=False, watch=watch)
        self.left = deque(range(len(job.prompts)))  # rows that have no lane yet
        self.alone, self.setting = alone, object() if alone else job.setting
        self.row_bytes, self.row_positions = job.store_bytes(), job.row_positions
        self.passed = 0  # younger requests that went before it
        self.retried = False  # memory ran out
        self.error: Exception | None = None
        self._outputs: dict[int, Output] = {}
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()  # None: the end
        self._tell: Callable[[News | None], None] = self._news.put
        self.flush: Callable[[], None] | None = None  # passes on what was told since the last time
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._wake, self._streamed = wake, False

    @property
    def prompts(self) -> list[list[int]]:
        """The ids in front of each answer."""
        return self.job.prompts

    @property
    def block_length(self) -> int:
        """Columns that are decoded before the next ones."""
        return self.job.block_length

    @property
    def columns(self) -> list[int]:
        """Of each canvas at first: the prompt, and what is to be written."""
        lengths: list[int] = self.told.start.length.tolist()
        return [length - tail for length, tail in zip(lengths, self.job.tails, strict=True)]

    @property
    def revises(self) -> bool:
        """Whether a column of the open block may change once it is written."""
        return self.job.sampler.needs.revises

    @property
    def tickets(self) -> list[Ticket]:
        """What each answer has cost so far."""
        return self.told.meter.rows

    @property
    def traces(self) -> dict[int, Trace]:
        """Those of the answers so far, where the call asked."""
        return self.told.traces

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> Answer_co:
        """The answer, an `Output` for one prompt, else a list, as soon as it is there; `timeout` in seconds.

        Errors: what ended the request (`Cancelled`, `TimedOut`, broken logits, ...); `TimedOut` also where the wait
        ends first, and then the request goes on.
        """
        if not self._ended.wait(timeout):
            raise TimedOut(f"no answer after {timeout:g} s: wait longer, or cancel the request")
        if self.error is not None:
            raise self.error
        return cast(Answer_co, answers(self._outputs, self.job.single))

    def stream(self, *, drafts: bool = False) -> Iterator[Event]:
        """Events as `dllm.stream` yields them, from the beginning, whenever it is called; once a request.

        Errors: those of `result`, behind the events that came before.
        """
        if self._streamed:
            raise DllmError("this request is streamed already: its events come once")
        self._streamed, self.told.drafts, self.told.live = True, drafts, True
        return self._stream()

    def listen(
        self, tell: Callable[[News | None], None], *, live: bool = True, flush: Callable[[], None] | None = None
    ) -> None:
        """Pass news of the same to a function, in the engine's thread, and None at the end, whatever it was (`error`).

        live: in between, too, not only the last one of each answer. flush: is called when the thread is about to wait
        for the next forward, once for all requests that have been told something and have an equal one: what wakes
        other threads costs nothing then. Neither may raise.
        """
        self.stream()
        self.told.live = live
        with self._lock:
            while not self._news.empty():
                tell(self._news.get())
            self._tell, self.flush = tell, flush
        if flush is not None:
            flush()

    def _stream(self) -> Iterator[Event]:
        while (news := self._news.get()) is not None:
            try:
                event = news.read()
            except Exception as error:  # of a tokenizer
                self.fail(error)
                raise
            if event is not None:
                yield event
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End it; its lanes are free at the next tick. An answer that is there stays."""
        self.fail(Cancelled("the request was cancelled"))
        self._wake()

    # -- the engine's side --------------------------------------------------------------------------------------------

    def hear(self, several: Iterator[News]) -> bool:
        """Pass news on; whether it was told anything. What a callback of the request raises ends it."""
        told = self.job.args.on_step is not None
        try:
            for news in several:
                told = True
                with self._lock:
                    self._tell(news)
                if news.output is not None:
                    self._outputs[news.request] = news.output
        except Exception as error:
            self.fail(error)
        if len(self._outputs) == len(self.job.prompts):
            self._end()
        return told

    def fail(self, error: Exception) -> None:
        """End it by an error, unless it has ended."""
        self._end(error)
        if self.flush is not None:
            self.flush()

    def _end(self, error: Exception | None = None) -> None:
        with self._lock:  # a caller may cancel at the same time
            if self.done:
                return
            self.error = error
            for ticket in self.told.meter.rows if error is not None else ():
                ticket.halt()
            self._ended.set()
            self._tell(None)

    def again(self) -> None:
        """Begin the rows anew that have no answer yet. What was streamed of them stays: they come to the same."""
        self.retried = True
        self.left = deque(i for i in range(len(self.job.prompts)) if i not in self._outputs)
        self.told.again(self.left)


@dataclass(eq=False)
class Seats:
    """A group, and what the engine knows of it."""

    group: Group
    held: ExitStack  # what its runner holds
    row_bytes: int
    counts: Counts | None  # of its graphs
    alone: bool  # its forwards are its own
    requests: list[Request[object]] = field(default_factory=list)
    said: dict[int, Said] = field(default_factory=dict)  # in this tick to what its group asked, by place
    seconds: float = 0.0  # of this tick so far, whole forwards that it shares among them

    @property
    def room(self) -> int:
        """Lanes for further rows."""
        return self.group.lanes - self.rows

    @property
    def rows(self) -> int:
        """Rows that have a lane, or are about to get one."""
        return self.group.rows

    @property
    def positions(self) -> int:
        """What a forward of these rows computes at most."""
        each = {request.told.meter: request.row_positions for request in self.requests}
        return sum(each.get(ticket.call, 0) for ticket in self.group.tickets)  # rows of a request that is done leave


class Engine:
    """A model that decodes requests as they come, in a thread of its own.

    model: as `dllm.generate` takes it. max_rows: rows decoded at a time, all requests together. kv_bytes: bytes for
    their keys and values; tick_positions: columns of all rows that decode at a time, copies counted; None: a share of
    the memory that is left beside the weights (`budget`). max_queue: requests that may wait. prefix_bytes: bytes for
    keys and values of prompts that may come again (block-causal models). observer: is told of forwards and ticks.
    Use it in a `with` block, or `close` it.

    with dllm.Engine(model) as engine:
        requests = [engine.submit(prompt, sampler="klass") for prompt in prompts]
        outputs = [request.result() for request in requests]

    Errors: a model that decodes by no sampler of ours.
    """

    def __init__(
        self,
        model: ModelLike = None,
        *,
        max_rows: int = 8,
        kv_bytes: int | None = None,
        tick_positions: int | None = None,
        max_queue: int = 256,
        prefix_bytes: int = 1 << 28,
        observer: Observer | None = None,
    ) -> None:
        bounds = {"max_rows": max_rows, "max_queue": max_queue, "tick_positions": tick_positions, "kv_bytes": kv_bytes}
        for name, bound in bounds.items():
            if bound is not None and bound < 1:
                raise DllmError(f"{name}={bound!r} must be at least 1")
        self.model = resolve_model(model)
        if self.model.own_decoder is not None:
            raise DllmError("this model decodes itself, one prompt at a time: use dllm.generate")
        self.max_rows, self.max_queue, self.observer = max_rows, max_queue, observer
        self.budget = budget(self.model, kv_bytes, tick_positions)
        log.info("engine: %s", self.describe())
        block = self.model.block_size
        self.prefixes = Prefixes(block, prefix_bytes) if block and prefix_bytes > 0 else None
        self.ticked = time.monotonic()  # when the last tick began, or work came for the next one
        self._works = deque[Callable[[], None]]()  # what is to be done between ticks
        self._coming = 0  # requests that are on their way
        self._flushes = dict[Callable[[], None], None]()  # of requests that were told something
        self.most = 0  # rows that have decoded at a time
        self._rows = Room(max_rows)  # as far as memory lets
        self._shared = Room(self.budget.positions)  # of a forward that serves several groups
        self._running = 0  # rows in this tick
        self._line = deque[Request[object]]()
        self._seats: dict[Hashable, Seats] = {}
        self._closing: Literal["", "drain", "abort"] = ""
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="dllm-engine", daemon=True)
        self._start()

    @overload
    def submit(
        self,
        prompt: One | None = None,
        *,
        n: Literal[1] = 1,
        timeout: float | None = None,
        wait: float | None = 0.0,
        batch: Literal["shared", "alone"] = "shared",
        **arguments: Unpack[DecodingArguments],
    ) -> Request[Output]: ...
    @overload
    def submit(
        self,
        prompt: Several,
        *,
        n: int = 1,
        timeout: float | None = None,
        wait: float | None = 0.0,
        batch: Literal["shared", "alone"] = "shared",
        **arguments: Unpack[DecodingArguments],
    ) -> Request[list[Output]]: ...
    @overload
    def submit(
        self,
        prompt: Prompt | None = None,
        *,
        n: int = 1,
        timeout: float | None = None,
        wait: float | None = 0.0,
        batch: Literal["shared", "alone"] = "shared",
        **arguments: Unpack[DecodingArguments],
    ) -> Request[Output | list[Output]]: ...
    def submit(
        self,
        prompt: Prompt | None = None,
        *,
        n: int = 1,
        timeout: float | None = None,
        wait: float | None = 0.0,
        batch: Literal["shared", "alone"] = "shared",
        **arguments: Unpack[DecodingArguments],
    ) -> Request[Output | list[Output]]:
        """Put a request in line; prompt, n and further arguments are those of `dllm.generate`.

        timeout: seconds until it has to be done. wait: seconds to wait for room where the line is full, None: as long
        as it takes. batch: "alone" gives every row forwards of its own, and so the very bits of `generate` in any
        precision; "shared" rows equal it as rows of a batch do (docs/decoding.md says in which precision).

        Errors: every mistake that shows before the first forward; a request that can never fit; `QueueFull`.
        """
        if "batch_size" in arguments:
            raise DllmError("an engine decides itself how many rows it decodes (max_rows=): leave batch_size= out")
        if batch not in ("shared", "alone"):
            raise DllmError(f"batch={batch!r} must be 'shared' or 'alone'")
        until = None if timeout is None else time.monotonic() + timeout
        alone = batch == "alone"
        given = {"n": n, **arguments}
        with self.expecting():
            job = prepare(self.model, joined(prompt, None, None), given, shared=not alone)
            watch = None if self.observer is None else self.observer.forward
            request = Request[Output | list[Output]](job, alone, until, self._notify, watch)
            if request.row_bytes > self.budget.kv_bytes:
                raise DllmError(
                    f"a canvas of {job.queue.canvas.ids.shape[1]} columns needs {request.row_bytes} bytes for keys and "
                    f"values, and kv_bytes={self.budget.kv_bytes}: shorten it, or give the engine more"
                )
            with self._change:
                if not self._change.wait_for(lambda: self._closing or len(self._line) < self.max_queue, wait):
                    raise QueueFull(f"{self.max_queue} requests wait already: try again later, or wait= for room")
                if self._closing:
                    raise Cancelled("the engine is closed")
                if request.told.open:
                    if not (self._line or self._seats):  # it had nothing to do, and is not late
                        self.ticked = time.monotonic()
                    self._line.append(request)
                    self._change.notify_all()
        if not request.told.open:  # without the lock, as the pieces of a long trace take their time
            request.hear(request.told.blank())
        return request

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Meanwhile a request is on its way: if nothing is being decoded, the first forward waits for it, GATHER
        seconds at most. Requests that come together so begin, and end, together."""
        with self._change:
            self._coming += 1
        try:
            yield
        finally:
            with self._change:
                self._coming -= 1
                self._change.notify_all()

    def run(self, work: Callable[[], T]) -> T:
        """Do something with the model in the engine's thread, between two ticks, and return what it returns.

        Errors: those of `work`; `Cancelled` where the engine closes first.
        """
        done = Future[T]()

        def do() -> None:
            if self._closing == "abort":
                done.set_exception(Cancelled("the engine is closed"))
                return
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        with self._change:
            if self._closing:
                raise Cancelled("the engine is closed")
            self._works.append(do)
            self._change.notify_all()
        return done.result()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def describe(self) -> str:
        """How much it decodes at a time, and how that was found, in one line."""
        return f"at most {self.max_rows} rows; {self.budget.describe()}"

    @property
    def load(self) -> Load:
        """What it does at the moment."""
        with self._change:
            seats = list(self._seats.values())
            kv = sum(s.row_bytes * s.group.lanes for s in seats)
            requests = len({id(r) for s in seats for r in s.requests})
            return Load(sum(s.rows for s in seats), len(self._line), len(seats), kv, requests, self._rows.now)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests and stop: after those that were taken, or (drain=False) at once, which cancels them."""
        with self._change:
            self._closing = "drain" if drain and self._closing != "abort" else "abort"
            self._change.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _notify(self) -> None:
        with self._change:
            self._change.notify_all()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._thread.start()
        atexit.register(self.close, drain=False)  # a daemon that is in the middle of a forward would crash the exit

    def _run(self) -> None:
        error: Exception = Cancelled("the engine is closed")
        try:
            while self._await():
                self._turn()
        except Exception as fault:  # one of ours
            error = fault
        finally:  # whatever ends the thread, SystemExit in a callback too: nobody shall wait for ever
            with self._change:
                self._closing = "abort"
                rest = [*self._line, *(r for s in self._seats.values() for r in s.requests)]
                works = [*self._works]
                self._line.clear()
                self._works.clear()
                self._change.notify_all()
            for work in works:
                work()
            for request in rest:
                request.fail(error)
            for key in list(self._seats):
                self._drop(key)
            self._flush()

    def _await(self) -> bool:
        """Wait for something to do; whether the thread goes on."""
        with self._change:
            self._change.wait_for(lambda: self._closing or self._line or self._seats or self._works)
            if self._line and not self._seats:
                self._change.wait_for(lambda: self._closing or self._works or not self._coming or self._full, GATHER)
            return self._closing != "abort" and bool(self._line or self._seats or self._works)

    @property
    def _full(self) -> bool:
        """Whether those in line are as many rows as may run."""
        return sum(len(request.left) for request in self._line) >= self._rows.now

    def _turn(self) -> None:
        """One tick of every group, and what comes before and after it."""
        now = self.ticked = time.monotonic()
        if self._works:
            self._flush()
        while self._works:
            self._works.popleft()()
        with self._change:
            known = [*self._line, *(r for s in self._seats.values() for r in s.requests)]
        for request in known:
            if request.deadline is not None and now > request.deadline:
                request.fail(TimedOut("the request was not done in its time: give it a longer timeout="))
        admitted = dict[Hashable, list[tuple[Request[object], list[int]]]]()
        for request, rows in self._admitted():
            admitted.setdefault(request.setting, []).append((request, rows))
        for several in admitted.values():
            self._seat(several)
        asked = list[tuple[Seats, int, Ask]]()
        for key in list(self._seats):
            self._guarded(key, partial(self._ask, asked))
        self._flush()
        self._forward(asked)
        for key in list(self._seats):
            self._guarded(key, self._tick)
        self._shared.ticked()
        if not any(request.retried for request in known):  # more rows could end who has begun anew at fewer
            self._rows.ticked()
        if not (self._seats or self._line):  # no forward follows
            self._flush()

    def _hear(self, request: Request[object], several: Iterator[News]) -> None:
        """Pass news on to a request."""
        if request.hear(several) and request.flush is not None:
            self._flushes[request.flush] = None

    def _flush(self) -> None:
        """Have passed on what requests were told."""
        flushes, self._flushes = self._flushes, {}
        for flush in flushes:
            flush()

    def _ask(self, asked: list[tuple[Seats, int, Ask]], seats: Seats) -> None:
        """Let rows of this group leave and enter, and note the forwards that others may share with it."""
        began, seats.said = time.perf_counter(), {}
        seats.group.turnover()
        if not seats.alone:
            asked += [(seats, place, ask) for place, ask in enumerate(seats.group.ask())]
        seats.seconds = time.perf_counter() - began

    @torch.inference_mode()
    def _forward(self, asked: Sequence[tuple[Seats, int, Ask]]) -> None:
        """Run the forwards that serve several groups. Who gets no answer has one of its own, where an error hits nobody
        else."""
        for some in together([ask.plan for *_, ask in asked], self._shared.now):
            own = [asked[i] for i in some]
            plans, began = [ask.plan for *_, ask in own], time.perf_counter()
            try:
                said = parted(own[0][0].group.run.said(merged(plans)), plans)
            except Exception as error:
                log.debug("a forward of several groups failed, each has one of its own: %s", error)
                if out_of_memory(error):
                    self._shared.short(sum(len(p.pos) for p in plans) * max(p.pos.shape[1] for p in plans))
                continue
            served([ticket for *_, ask in own for ticket in ask.part.request], own[0][2].part.kind)
            for seats in {id(seats): seats for seats, *_ in own}.values():
                seats.seconds += time.perf_counter() - began
            for (seats, place, _), part in zip(own, said, strict=True):
                seats.said[place] = part

    def _admitted(self) -> list[tuple[Request[object], list[int]]]:
        """Rows that get a lane now, in the order of the line."""
        with self._change:
            for request in [r for r in self._line if r.done]:  # cancelled, or out of time: room for others
                self._line.remove(request)
            running = sum(s.rows for s in self._seats.values())
            free = self._rows.now - running  # more may run than fit by now
            taken = self._fitting(free) if self._line and free > 0 else []
            self._running = running + sum(len(rows) for _, rows in taken)
            self.most = max(self.most, self._running)
            self._change.notify_all()  # the line may have room
        return taken

    def _fitting(self, free: int) -> list[tuple[Request[object], list[int]]]:
        """At most so many of them, as far as they fit; who does not is passed by others a few times."""
        taken, blocked = list[tuple[Request[object], list[int]]](), list[Request[object]]()
        lanes = {key: seats.room for key, seats in self._seats.items()}
        kv = sum(s.row_bytes * s.group.lanes for s in self._seats.values())
        taking = sum(s.positions for s in self._seats.values())
        for request in list(self._line):
            if free == 0 or any(other.passed >= OVERTAKES for other in blocked):
                break
            if request.setting not in lanes:
                lanes[request.setting] = self._lanes(request, kv)
                kv += lanes[request.setting] * request.row_bytes
            fits = (self.budget.positions - taking) // request.row_positions
            fits = fits if taking else max(1, fits)  # a row that no tick has room for decodes by itself
            count = min(free, lanes[request.setting], len(request.left), max(0, fits))
            if count:
                taking += count * request.row_positions
                taken.append((request, [request.left.popleft() for _ in range(count)]))
                free, lanes[request.setting] = free - count, lanes[request.setting] - count
                for other in blocked:
                    other.passed += 1
            if request.left:
                blocked.append(request)
            else:
                self._line.remove(request)
        return taken

    def _lanes(self, request: Request[object], kv: int) -> int:
        """Lanes of a new group for this setting, beside stores that take `kv` bytes."""
        most = 1 if request.alone else self._rows.now
        return min(most, (self.budget.kv_bytes - kv) // request.row_bytes) if request.row_bytes else most

    def _seat(self, several: Sequence[tuple[Request[object], list[int]]]) -> None:
        """Give rows of requests of one setting to its group, all together: their windows are opened at once."""
        request, _ = several[0]
        key, job = request.setting, request.job

        def enter(seats: Seats) -> None:
            queues, tickets = list[State](), list[Ticket]()
            seats.requests += [each for each, _ in several if each not in seats.requests]  # an error is told to all
            for each, rows in several:
                queue, own = each.job.queue, each.told.meter.rows
                each.job.counts = seats.counts
                queues.append(queue if len(rows) == queue.rows else queue.take(index(rows, job.model.device)))
                tickets += [own[i] for i in rows]
            seats.group.submit(stacked(queues), tickets)

        if key not in self._seats:
            held, kv = ExitStack(), sum(s.row_bytes * s.group.lanes for s in self._seats.values())
            try:
                make = held.enter_context(job.runner())
                shared = self.prefixes if job.reusable and not request.alone else None
                group = Group(make(job.model, job.sampler, job.policy, job.options), self._lanes(request, kv), shared)
            except Exception as error:
                held.close()
                self._failed([each for each, _ in several], error)
                return
            with self._change:
                self._seats[key] = Seats(group, held, request.row_bytes, job.counts, request.alone)
        self._guarded(key, enter)

    def _guarded(self, key: Hashable, work: Callable[[Seats], None]) -> None:
        """Do something with a group. An error ends it."""
        seats = self._seats[key]
        try:
            work(seats)
        except Exception as error:
            self._drop(key, error)
            self._failed(seats.requests, error)
            return
        with self._change:
            seats.requests = [r for r in seats.requests if not r.done]
        if not seats.group.busy:
            self._drop(key)

    def _failed(self, requests: Sequence[Request[object]], error: Exception) -> None:
        """An error ends these requests. Where memory ran out they begin anew among half as many rows, unless it ran out
        again for one row by itself."""
        short = out_of_memory(error)
        for request in reversed(requests):  # the first to the front of the line
            if short and (self._running > 1 or not request.retried):
                request.again()
                with self._change:
                    if request not in self._line:
                        self._line.appendleft(request)
            elif short:
                where = f"out of memory on {self.model.device} with one row by itself"
                request.fail(DllmError(f"{where}: shorten its canvas, or give the engine fewer kv_bytes"))
            else:
                request.fail(error)
        if short:
            self._rows.short(self._running)
            if self.prefixes is not None:
                self.prefixes.clear()
            forget(self.model)

    def _drop(self, key: Hashable, error: Exception | None = None) -> None:
        """Let a group go, with all that it holds."""
        with self._change:
            seats = self._seats.pop(key)
        if error is None:
            seats.held.close()
        else:  # what it holds may be half done
            seats.held.__exit__(type(error), error, error.__traceback__)

    def _tick(self, seats: Seats) -> None:
        """A tick of this group, and what its requests are told of it."""
        began = time.perf_counter()
        ticks = seats.group.advance(seats.said)
        if self.observer is not None:
            self.observer.ticked(seats.seconds + time.perf_counter() - began, ticks)
        calls = {request.told.meter: request for request in seats.requests}
        for request in seats.requests:
            if any(ticket.broken for ticket in request.told.meter.rows):
                request.fail(DllmError(BROKEN))
        for tick in ticks:
            own = defaultdict[Meter, list[int]](list)
            for row, ticket in enumerate(tick.request):
                own[ticket.call].append(row)
            for call, rows in own.items():
                owner = calls.get(call)  # None: it was cancelled after its rows had taken their lanes for this tick
                if owner is not None and not owner.done:
                    self._hear(owner, owner.told.news(tick, rows))
