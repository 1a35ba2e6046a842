"""A verifier and its drafter as a server's backend: `dllm serve VERIFIER --speculate DRAFTER`.

The text is the verifier's own, that of `dllm.speculate`. Answers are decoded one at a time, in the order of the line.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Module

import dllm
from dllm.call.engine import Load
from dllm.call.output import Event, News, Output
from dllm.call.reads import Reading
from dllm.decoding.meter import Meter, Ticket
from dllm.decoding.stopping import Stops
from dllm.decoding.trace import Trace
from dllm.drafting.drafters import Drafter
from dllm.drafting.front import SpecOptions, encode, speculate
from dllm.drafting.registry import DrafterLike, VerifierLike, as_drafter, as_verifier
from dllm.drafting.request import SpecResult
from dllm.drafting.verifier import Verifier
from dllm.errors import Cancelled, DllmError, QueueFull, TimedOut
from dllm.models.native import fingerprint
from dllm.models.tokenizer import Tokenizer
from dllm.serve.backend import printed
from dllm.serve.errors import ApiError
from dllm.spec import Json

TAKEN = {"max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed", "chat"}
FIELDS = {"on_step": "draft", "trace": "return_trace"}  # what a request calls these arguments
NEW = 128  # tokens of an answer that says nothing


@dataclass(eq=False)
class Draft:
    """A request of a pair: a row for each answer."""

    prompts: list[list[int]]
    stops: Stops
    deadline: float
    arguments: Json
    error: Exception | None = None
    meter: Meter = field(init=False)
    done: bool = False
    heard: list[News | None] = field(default_factory=list)
    block_length: int = 1
    revises: bool = False

    def __post_init__(self) -> None:
        self.meter = Meter(len(self.prompts))
        self.lock = threading.Lock()
        self.tell: Callable[[News | None], None] = self.heard.append
        self.flush: Callable[[], None] = lambda: None

    @property
    def columns(self) -> list[int]:
        """Tokens of each text at most."""
        return [len(ids) + self.arguments["max_new_tokens"] for ids in self.prompts]

    @property
    def tickets(self) -> list[Ticket]:
        """What each answer has cost."""
        return self.meter.rows

    @property
    def traces(self) -> dict[int, Trace]:
        """There is no canvas."""
        return {}

    def listen(
        self, tell: Callable[[News | None], None], *, live: bool = True, flush: Callable[[], None] | None = None
    ) -> None:
        """Pass its news to a function, in the pair's thread, and None at the end, each with a `flush`."""
        with self.lock:
            for news in self.heard:
                tell(news)
            self.tell, self.flush = tell, flush or self.flush
            self.flush()

    def hear(self, event: Event) -> None:
        """Pass an event on."""
        with self.lock:
            if not self.done:
                self.tell(News(event.request, lambda: event, event.output))
                self.flush()

    def end(self, error: Exception | None = None) -> None:
        """End it, unless it has ended."""
        with self.lock:
            if not self.done:
                self.done, self.error = True, error
                self.tell(None)
                self.flush()

    def cancel(self) -> None:
        """End it: its place in line is free, and the verifier's next token is its last."""
        self.end(Cancelled("the request was cancelled"))


class Follower:
    """Tells a request what its text has become, token by token: a streamer of `speculate`."""

    def __init__(self, request: Draft, row: int) -> None:
        self.request, self.row = request, row
        self.ids, self.sent, self.told = list[int](), "", 0

    def put(self, value: Tensor) -> None:
        """The next token. Errors: the request has ended."""
        request, ticket = self.request, self.request.tickets[self.row]
        ticket.answered()
        if request.done:
            raise Cancelled("the request was cancelled")
        self.ids += value.tolist()
        firm = request.stops.settled(self.ids)
        text = firm[len(self.sent) :]
        if text:
            count = request.stops.reach(self.ids, len(firm))
            tokens, self.sent, self.told = self.ids[self.told : count], firm, count
            request.hear(Event(self.row, text, None, len(self.ids), None, tokens))

    def end(self) -> None:
        """There are no more."""


class Pair:
    """Answers by `dllm.speculate`, in a thread of their own."""

    model = None

    def __init__(
        self, verifier: VerifierLike, drafter: DrafterLike, max_queue: int = 256, options: SpecOptions | None = None
    ) -> None:
        self.verifier: Verifier = as_verifier(verifier)
        self.drafter: Drafter | None = as_drafter(drafter)
        self.named = str(drafter)
        self.max_queue, self.options = max_queue, options or SpecOptions()
        self.line = deque[Draft]()
        self.running: Draft | None = None
        self.closing = False
        self.change = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="dllm-pair", daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch, name="dllm-pair-watch", daemon=True).start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The verifier's."""
        return self.verifier.tokenizer

    @property
    def load(self) -> Load:
        """What it does at the moment."""
        with self.change:
            busy, waiting = int(self.running is not None), len(self._waiting)
        return Load(running=busy, waiting=waiting, groups=busy, kv_bytes=0, requests=busy, lanes=1)

    @property
    def trouble(self) -> str:
        """A thread that has ended."""
        return "" if self.thread.is_alive() else "the pair has stopped"

    def about(self) -> Json:
        """The pair."""
        limit = getattr(self.verifier.config, "max_position_embeddings", None)  # foreign
        return {"family": "speculation", "drafter": self.named, "max_positions": limit, "samplers": [], "caches": [],
                "mask_id": None, "block_size": None, "defaults": {}}  # fmt: skip

    def fingerprint(self) -> str:
        """The verifier's weights, the package, precision and kind of device: the drafter decides no text."""
        network = self.verifier.model
        assert isinstance(network, Module)
        weight = next(network.parameters())
        return printed(fingerprint(network), dllm.__version__, str(weight.dtype), weight.device.type)

    def expecting(self) -> AbstractContextManager[None]:
        """Nobody waits for others."""
        return nullcontext()

    def submit(self, prompt: object, n: int, timeout: float, batch: str, arguments: Json) -> Draft:
        """Put a request in line. Errors: arguments that a verifier does not take, a full line."""
        if odd := sorted(arguments.keys() - TAKEN):
            field = FIELDS.get(odd[0], odd[0])
            raise ApiError(400, "unsupported", f"{field} is for a masked-diffusion model that writes the text", field)
        given = {"max_new_tokens": NEW, **arguments}
        ids, _ = encode(self.verifier, prompt, given.pop("chat", None))
        stops = Stops.of(self.verifier.eos, given.get("stop"), self.tokenizer)
        request = Draft([p for p in ids for _ in range(n)], stops, time.monotonic() + timeout, given)
        with self.change:
            if self.closing:
                raise Cancelled("the pair is closed")
            self.line = deque(self._waiting)
            if len(self.line) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests wait already: try again later")
            self.line.append(request)
            self.change.notify_all()
        return request

    def read(self, arguments: Json) -> Reading:
        """Errors: a verifier reads nothing."""
        raise DllmError("reads are for a masked-diffusion model")

    def warm(self) -> None:
        """One short answer."""
        self._decoded([self.verifier.vocab - 1], {"max_new_tokens": 2}, None)

    def close(self, drain: bool) -> None:
        """Take no more requests and stop: after those that were taken, or (drain=False) at once."""
        with self.change:
            self.closing = True
            if not drain:
                for request in self._held:
                    request.end(Cancelled("the pair is closed"))
            self.change.notify_all()
        self.thread.join()
        with self.change:
            self.change.notify_all()  # nothing is left to watch

    @property
    def _waiting(self) -> list[Draft]:
        """Those in line that have not ended."""
        return [request for request in self.line if not request.done]

    @property
    def _held(self) -> list[Draft]:
        """They, and the one that is answered."""
        return [*self._waiting, *([self.running] if self.running else [])]

    def _watch(self) -> None:
        """End requests whose time is over, in line or not, whatever the verifier does meanwhile."""
        with self.change:
            while self.thread.is_alive():
                now = time.monotonic()
                for request in self._held:
                    if request.deadline <= now:
                        request.end(TimedOut("the request was not done in its time"))
                due = [request.deadline - now for request in self._held if not request.done]
                self.change.wait(min([threading.TIMEOUT_MAX, *due]))

    def _run(self) -> None:
        while True:
            with self.change:
                self.running = None
                self.change.wait_for(lambda: self.line or self.closing)
                if not self.line:
                    return
                request = self.running = self.line.popleft()
            try:
                for row in range(len(request.prompts)):
                    if request.done:
                        break
                    self._answer(request, row)
                request.end()
            except Exception as error:
                request.end(error)

    def _answer(self, request: Draft, row: int) -> None:
        ticket, ids = request.tickets[row], request.prompts[row]
        ticket.enter()
        given = {**request.arguments, "seed": request.arguments["seed"] + row}
        follower = Follower(request, row)
        r = self._decoded(ids, given, follower)
        ticket.finish()
        text = r.text or ""
        output = Output(
            text=text, sequences=r.sequences, tokens=r.tokens, nfe=r.n_verify, calls=r.n_verify,
            finish_reason=r.finish_reason, seconds=ticket.seconds, prefill_seconds=ticket.first,
            positions=sum(s.nodes + s.pending for s in r.rounds), canvas_length=len(r.sequences),
            decoded=len(r.emitted), sampler=f"speculate:{self.named}", cache="", seed=given["seed"],
        )  # fmt: skip
        request.hear(Event(row, text[len(follower.sent) :], None, r.n_verify, output, r.tokens[follower.told :]))

    def _decoded(self, ids: list[int], arguments: Json, follower: Follower | None) -> SpecResult:
        made: SpecResult = speculate(self.verifier, self.drafter, ids, streamer=follower, **arguments, **self.options)
        return made
