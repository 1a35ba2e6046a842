"""Prometheus metrics: what the engine's thread hands over in its ticks, and what requests came to.

No text of a prompt or an answer, no key and no user is in them, and the values of every label are few.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple, get_args
from weakref import WeakKeyDictionary

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily

import dllm
from dllm.decoding.constraints import compiling
from dllm.decoding.meter import Kind, Ticket
from dllm.decoding.runner import Tick
from dllm.serve.answers import Choice
from dllm.serve.backend import Backend, Pending
from dllm.serve.requests import Asked

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SMALL = (0.0005, 0.001, 0.0025, *SECONDS[:11])  # of one tick, or one token
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEFT = "client_closed_request"
PAGE = CONTENT_TYPE_LATEST
OUTCOMES = ("ok", "cancelled", "error")
CODES = (
    "invalid_value", "invalid_json", "unknown_parameter", "missing_required_parameter", "unsupported",
    "context_length_exceeded", "constraint_unsatisfiable", "constraint_too_large", "invalid_api_key",
    "model_not_found", "timeout", "request_too_large", "unsupported_media_type", "queue_full", "too_many_requests",
    "internal_error", "loading", "draining", "out_of_memory", "unavailable",
)  # fmt: skip
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/reads")  # whatever else a client may ask for is "other"


class Ended(NamedTuple):
    """How a request ended, for those who count (`Serving.counted`)."""

    route: str
    code: str  # "ok", or that of its error
    pending: Pending | None  # None: it was refused
    choices: Sequence[Choice]  # with their outputs, as far as there are any
    seconds: float  # since it was read
    asked: Asked | None = None


def present(backend: Backend, fact: str) -> float:
    """A fact of what the engine does at the moment."""
    return float(backend.load._asdict()[fact])


class Metrics:
    """The figures of one server, in a registry of their own: an observer of its engine, which also hears of every
    request that has ended."""

    def __init__(self, backend: Backend, name: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.labels: dict[str, str] = {}  # of every figure

        def counter(name: str, what: str, **labels: Sequence[str]) -> Counter:
            made = Counter(f"dllm_{name}", what, list(labels), registry=registry)
            for values in product(*labels.values()) if labels else ():
                made.labels(*values)  # at 0: `rate` does not see what a series begins with
            return made

        def histogram(name: str, what: str, buckets: Sequence[float] = SECONDS) -> Histogram:
            return Histogram(f"dllm_{name}", what, buckets=buckets, registry=registry)

        self.requests = counter(
            "requests", "Requests by route, and how they ended", route=(*ROUTES, "other"), outcome=OUTCOMES
        )
        self.errors = counter("errors", "Requests that ended in an error, by its code", code=CODES)
        written = "Tokens: of prompts, of answers (final), and written in all (decoded)"
        self.tokens = counter("tokens", written, kind=("prompt", "final", "decoded"))
        self.forwards = counter("forwards", "Batched forwards: refresh, step, closing", kind=get_args(Kind))
        self.rows = counter("rows", "Rows that forwards served", kind=get_args(Kind))
        self.positions = counter("positions", "Positions that forwards computed")
        self.queue = histogram("queue_seconds", "From a request to its lane")
        self.first_forward = histogram(
            "time_to_first_forward_seconds", "From a request to the end of its first forward"
        )
        self.first_text = histogram("time_to_first_final_text_seconds", "From a request to its first final text")
        self.seconds = histogram("request_seconds", "From a request to its end")
        self.token = histogram("time_per_final_token_seconds", "Decoding time of an answer over its tokens", SMALL)
        self.efficiency = histogram("tokens_per_forward", "Tokens of an answer over its forwards", COUNTS)
        self.tick = histogram("tick_seconds", "Of a tick: forwards, steps, the wait for the device", SMALL)
        self.served = histogram("forward_rows", "Rows of a forward", COUNTS)
        self.padding = histogram("padding_ratio", "Share of a forward's queries that are padding", RATIOS)
        self.commits = histogram("commits_per_forward", "Columns that a forward committed", COUNTS)
        self.block = histogram("block_seconds", "That a row's window stood")
        for gauge, fact, what in (
            ("requests_running", "requests", "Requests with rows in lanes"),
            ("requests_waiting", "waiting", "Requests that are not all in lanes"),
            ("lanes_used", "running", "Rows that are being decoded"),
            ("lanes", "lanes", "Rows that may be decoded at a time, as far as memory lets"),
            ("kv_bytes", "kv_bytes", "Of stored keys and values"),
            ("groups", "groups", "Settings that are being decoded"),
        ):
            now = Gauge(f"dllm_{gauge}", what, registry=registry)
            now.set_function(partial(present, backend, fact))
        model = backend.model
        about = {} if model is None else {
            "family": model.family, "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type,
        }  # fmt: skip
        build = Info("dllm_build", "What is served", registry=registry)
        build.info({"version": dllm.__version__, "model": name, **about})
        self._pending, self._written = 0, 0  # forwards and commits since the last figure
        self._since: WeakKeyDictionary[Ticket, float] = WeakKeyDictionary()  # when a row's window opened

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """The figures, each with `labels`, as the client library asks a registry for them."""
        about = "Constraints that were asked for: made, known, refused"
        compiled = CounterMetricFamily("dllm_constraint_compilations", about, labels=["outcome"])
        for outcome in ("made", "known", "refused"):
            compiled.add_metric([outcome], compiling.OUTCOMES[outcome])
        for family in (*self.registry.collect(), compiled):
            family.samples = [s._replace(labels={**self.labels, **s.labels}) for s in family.samples]
            yield family

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def forward(self, kind: Kind, rows: int) -> None:
        """See `Observer`."""
        self.forwards.labels(kind).inc()
        self.rows.labels(kind).inc(rows)
        self.served.observe(rows)
        self._pending += 1

    def ticked(self, seconds: float, ticks: Sequence[Tick]) -> None:
        """See `Observer`."""
        now = time.monotonic()
        self.tick.observe(seconds)
        for tick in ticks:
            fed = [facts.fed for facts in tick.facts]
            self.positions.inc(sum(fed))
            if most := max(fed):  # a memo's answers feed nothing
                self.padding.observe(1 - sum(fed) / (most * len(fed)))
            for ticket, before, facts in zip(tick.request, tick.before, tick.facts, strict=True):
                self._written += max(0, before.masks - facts.masks)
                since = self._since.setdefault(ticket, now - seconds)
                if facts.done or facts.lo != before.lo:
                    self.block.observe(now - since)
                    self._since[ticket] = now
        if self._pending:
            self.commits.observe(self._written / self._pending)
            self._pending = self._written = 0

    # -- the event loop -----------------------------------------------------------------------------------------------

    def ended(self, request: Ended) -> None:
        """A request of a route has ended."""
        outcome = {"ok": "ok", LEFT: "cancelled"}.get(request.code, "error")
        self.requests.labels(request.route if request.route in ROUTES else "other", outcome).inc()
        if outcome == "error":
            self.errors.labels(request.code).inc()
        if request.pending is None:
            return
        self.seconds.observe(request.seconds)
        asked = request.asked.n if request.asked is not None else 1
        self.tokens.labels("prompt").inc(sum(map(len, request.pending.prompts[::asked])))
        for choice in request.choices:
            if (output := choice.output) is None:
                continue
            self.tokens.labels("final").inc(len(output.tokens))
            self.tokens.labels("decoded").inc(output.decoded)
            self.queue.observe(output.queue_seconds)
            self.first_forward.observe(output.prefill_seconds)
            self.efficiency.observe(output.tokens_per_forward)
            if choice.times:
                self.first_text.observe(choice.times[0][0])
            if output.tokens:
                self.token.observe((output.seconds - output.queue_seconds) / len(output.tokens))
