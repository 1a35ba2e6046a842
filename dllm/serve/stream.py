"""From the engine's thread to a client: events of a request, as one object or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

from sse_starlette import ServerSentEvent

from dllm.call.output import Event, News
from dllm.call.steering import StepView
from dllm.decoding.trace import BLANK, Trace
from dllm.serve.answers import Choice, Reply, about
from dllm.serve.backend import Pending
from dllm.serve.config import ServeConfig
from dllm.serve.errors import ApiError, dumps, told
from dllm.spec import Json

Told: TypeAlias = Callable[[Sequence[Choice], ApiError | None], None]  # choices, and what ended them
EVENT = 200  # bytes of JSON around the text of an event, about
TOKEN = 100  # and of a token with its log-probability


class Stepped(NamedTuple):
    """A step of a row as a draft event tells it."""

    step: int  # counted from 1
    nfe: int
    closed: int  # columns of the answer in front of its first mask
    lo: int  # where the step's window began
    length: int
    seconds: float


class Post:
    """What other threads have an event loop do, in their order: it is woken up once for all of a tick."""

    def __init__(self) -> None:
        self.loop, self.calls = asyncio.get_running_loop(), deque[Callable[[], None]]()

    def put(self, call: Callable[[], None]) -> None:
        """Something to do at the next `flush`."""
        self.calls.append(call)

    def flush(self) -> None:
        """Wake the loop up."""
        with suppress(RuntimeError):  # it is closed
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self.calls:
            self.calls.popleft()()


class Ear:
    """What an event loop hears of a request. The engine's thread never waits for it."""

    def __init__(self, most: int, post: Post | None = None) -> None:
        self.post, self.wake = post or Post(), asyncio.Event()
        self.most, self.size = most, 0
        self.events = deque[tuple[Event, float]]()
        self.steps = dict[int, list[Stepped]]()
        self.ended = self.late = False
        self.began = time.perf_counter()
        self.pending: Pending | None = None
        self.error: Exception | None = None  # of a tokenizer

    @property
    def seconds(self) -> float:
        """Since the request was read."""
        return time.perf_counter() - self.began

    def follow(self, pending: Pending, live: bool) -> None:
        """Hear this request."""
        self.pending = pending
        pending.listen(self._tell, live=live, flush=self.post.flush)

    def step(self, view: StepView) -> None:
        """A step of a row, in the engine's thread."""
        steps, size = self.steps.setdefault(view.request, []), len(view.ids)
        if steps and view.step <= steps[-1].step:  # memory ran out, and the row has begun anew
            self.steps[view.request] = steps = []
        closed = view.masked.index(True) if True in view.masked else size
        closed, lo = (max(0, at - view.start) for at in (closed, view.window[0]))
        steps.append(Stepped(view.step, view.nfe, closed, lo, size - view.start, self.seconds))
        self.post.put(self.wake.set)

    def _tell(self, news: News | None) -> None:
        self.post.put(partial(self._put, news, self.seconds))

    def _put(self, news: News | None, seconds: float) -> None:
        """In the loop's thread."""
        if news is None:
            self.ended = True
        elif not (self.late or self.error):
            try:
                event = news.read()
            except Exception as error:
                self.error, event = error, None
            if event is not None:
                self.events.append((event, seconds))
                self.size += _size(event)
                self.late = self.size > self.most and event.output is None
            if (self.late or self.error) and self.pending is not None:
                self.pending.cancel()
        self.wake.set()

    def taken(self) -> list[tuple[Event, float]]:
        """The events that have come."""
        some = list(self.events)
        self.events.clear()
        self.size = 0
        self.wake.clear()
        return some

    def failed(self) -> ApiError | None:
        """What ended the request, if it is no answer."""
        if self.late:
            return ApiError(
                408, "slow_reader", f"the reader is more than {self.most} bytes behind: the answer was cancelled"
            )
        error = self.error or (None if self.pending is None else self.pending.error)
        return None if error is None else told(error)


def _size(event: Event) -> int:
    return EVENT + len(event.text) + TOKEN * (len(event.tokens) if event.logprobs else 0)


async def whole(ear: Ear, pending: Pending, reply: Reply) -> tuple[Json, list[Choice]]:
    """The answer as one object, and its choices. Errors: what ended it."""
    while not ear.ended:
        await ear.wake.wait()
        ear.wake.clear()
    if (error := ear.failed()) is not None:
        raise error
    return reply.answered(pending, ear.taken())


async def chunks(
    ear: Ear,
    pending: Pending,
    reply: Reply,
    config: ServeConfig,
    ended: Callable[[Sequence[Choice], ApiError | None], None],
) -> AsyncIterator[ServerSentEvent]:
    """The same as server-sent events, while it becomes final. `ended` is told how it went."""
    choices = reply.choices(pending.prompts)
    drafts = Drafts(ear, pending, reply, config.draft_seconds) if reply.asked.drafts else None
    error: ApiError | None = ApiError(499, "client_closed_request", "the client left")
    try:
        for choice in choices:
            if (opening := reply.opening(choice)) is not None:
                yield _data(opening)
            if drafts is not None:
                yield _draft(drafts.start(choice))
        while True:
            over = ear.ended
            for event, seconds in ear.taken():
                choice = choices[event.request]
                new, said = choice.feed(event, seconds)
                if drafts is not None:
                    for one in drafts.due(choice, all_of_them=event.output is not None):
                        yield _draft(one)
                if new or event.output is not None:
                    for one in reply.chunks(pending, choice, new, said, seconds, event.nfe):
                        yield _data(one)
                if drafts is not None and event.output is not None:
                    yield _draft(drafts.end(choice))
            if over:
                break
            for choice in choices if drafts is not None else ():
                assert drafts is not None
                for one in drafts.due(choice):
                    yield _draft(one)
            with suppress(TimeoutError):
                await asyncio.wait_for(ear.wake.wait(), None if drafts is None else drafts.wait)
        error = ear.failed()
        if error is not None:
            yield _data(error.body)
            return
        if reply.asked.usage:
            yield _data(reply.last(pending, choices))
        yield ServerSentEvent(data="[DONE]", sep="\n")
    except Exception as fault:
        error = told(fault)
        yield _data(error.body)
    finally:
        pending.cancel()  # the client may have left
        ended(choices, error)


def _data(said: object) -> ServerSentEvent:
    return ServerSentEvent(data=dumps(said), sep="\n")


def _draft(said: object) -> ServerSentEvent:
    return ServerSentEvent(data=dumps(said), event="draft", sep="\n")


class Drafts:
    """What happens on the canvases of a request: the traces of its rows, as far as they have come, in pieces."""

    def __init__(self, ear: Ear, pending: Pending, reply: Reply, pause: float) -> None:
        self.ear, self.pending, self.reply, self.pause = ear, pending, reply, pause
        self.told = dict[int, int]()  # steps that were told, by row
        self.at = dict[int, float]()  # when

    @property
    def wait(self) -> float | None:
        """Seconds until something is due; None: nothing is."""
        behind = [row for row in self.ear.steps if self._known(row)[2] > self.told.get(row, 0)]
        return min((max(0.0, self.at.get(row, 0.0) + self.pause - self.ear.seconds) for row in behind), default=None)

    def start(self, choice: Choice) -> Json:
        """The canvas before the first step."""
        row, trace = choice.index, self.pending.traces[choice.index]
        return self.reply.draft(choice, {
            "kind": "start", "choice": row, "length": self._length(row), "block_length": self.pending.block_length,
            "mask_id": trace.mask_id, "mask_piece": BLANK, "prompt_tokens": len(self.pending.prompts[row]),
            "prompt": self.pending.prompts[row], "prompt_text": trace.prompt_text, "start": self._start(row),
            "sampler": trace.sampler, "cache": trace.cache,
            "seed": self.reply.asked.arguments["seed"] + row,
        })  # fmt: skip

    def due(self, choice: Choice, all_of_them: bool = False) -> list[Json]:
        """The steps of a row since the last time, as one event; none where that was just now."""
        row, now = choice.index, self.ear.seconds
        first, (trace, steps, end) = self.told.get(row, 0), self._known(row)
        if end <= first or (not all_of_them and now < self.at.get(row, -1.0) + self.pause):
            return []
        self.told[row], self.at[row] = end, now
        start, last = self._start(row), steps[end - 1]
        written = dict[int, tuple[int, tuple[float | None, ...]]]()
        for k in range(first, end):
            sure = zip(*filter(None, (trace.confidence[k], trace.posterior[k])), strict=True)
            for (column, token), said in zip(trace.commits[k], sure, strict=True):
                written.pop(column, None)
                written[column] = (token, said)
        before = steps[first - 1].seconds if first else self.pending.tickets[row].entered
        lo, hi = trace.windows[end - 1]
        return [self.reply.draft(choice, {
            "kind": "draft", "choice": row, "step": end, "nfe": last.nfe,
            "window": [max(0, lo - start), max(0, hi - start)],
            "length": last.length, "final": min(last.closed, last.lo) if self.pending.revises else last.closed,
            "writes": [
                [column - start, token, self.reply.piece(token), *said]
                for column, (token, said) in written.items() if token != trace.mask_id
            ],
            "masked_again": [column - start for column, (token, _) in written.items() if token == trace.mask_id],
            "ms": round(1000 * (last.seconds - before), 3),
        })]  # fmt: skip

    def end(self, choice: Choice) -> Json:
        """The totals of a row."""
        assert choice.output is not None
        totals = about(self.pending, choice, self.reply.asked)
        totals.pop("trace", None)  # the last chunk of the text has it
        return self.reply.draft(choice, {
            "kind": "end", "choice": choice.index, "tokens": len(choice.output.tokens), "text": choice.output.text,
            **totals,
        })  # fmt: skip

    def _known(self, row: int) -> tuple[Trace, list[Stepped], int]:
        """Trace and steps of a row, and how many are in both: where memory ran out, the trace begins anew before the
        steps do."""
        trace, steps = self.pending.traces[row], self.ear.steps.get(row, [])
        return trace, steps, min(len(steps), len(trace.seconds))

    def _start(self, row: int) -> int:
        start = self.pending.traces[row].start
        return len(self.pending.prompts[row]) if start is None else start

    def _length(self, row: int) -> int:
        steps = self.ear.steps.get(row)
        return steps[0].length if steps else self.pending.columns[row] - self._start(row)
