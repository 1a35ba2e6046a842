"""`dllm bench serve`: requests over HTTP against `generate` of the same, and arrivals that do not wait for answers.

Two models: `scripted`, whose forward takes 20 ms whatever it computes, as one that reads its weights does, and the
embedded one. What arrives is compared with `generate` of the same alone. Everything is bounded in number and in time.
"""

from __future__ import annotations

import http.client
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Unpack

import torch
import uvicorn
from torch import Tensor

import dllm
from dllm.bench import clients
from dllm.bench.clients import PATIENCE, Heard
from dllm.bench.runtime import Figure, seconds
from dllm.call.output import Output
from dllm.errors import DllmError
from dllm.models.model import ForwardOptions
from dllm.models.native import NativeModel
from dllm.serve.app import create_app
from dllm.serve.config import ServeConfig
from dllm.spec import Json
from dllm.tasks import registry as tasks

FORWARD = 0.02  # seconds
ROWS, REQUESTS = 8, 24  # at a time, and in all
SCALES = (1, 4, 8, 16)
RATES = (0.5, 0.9, 1.5)  # of what ROWS rows can do
CALL: Json = {"max_new_tokens": 32, "block_length": 8}
SAMPLERS = ("threshold", "klass", "confidence")


class Scripted(NativeModel):
    """A model whose forward takes `seconds`, unless it takes longer by itself."""

    seconds = FORWARD

    def forward(self, ids: Tensor, pos: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """See `Model.forward`."""
        until = time.perf_counter() + self.seconds
        hidden = super().forward(ids, pos, **options)
        time.sleep(max(0.0, until - time.perf_counter()))
        return hidden


def scripted(seconds: float = FORWARD) -> Scripted:
    """A small random model with the embedded one's tokenizer: its own forward takes a fraction of that."""
    own = dllm.load("tiny", device="cpu")
    assert isinstance(own, NativeModel)
    torch.manual_seed(0)
    config = replace(own.config, hidden_size=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, intermediate_size=64)
    model = Scripted(config, tokenizer=own.tokenizer)
    model.transformer.eval().to(torch.float64)  # rows are the same bits in any company
    model.seconds = seconds
    return model


class Ask(NamedTuple):
    """A request, in the words of `generate`."""

    prompt: str
    arguments: Json

    def alone(self, model: NativeModel) -> Output:
        """Its answer by itself."""
        out: Output = dllm.generate(model, self.prompt, chat=False, **self.arguments)
        return out

    @property
    def body(self) -> Json:
        """The same over HTTP."""
        given = dict(self.arguments)
        return {"prompt": self.prompt, "max_tokens": given.pop("max_new_tokens"), "temperature": 0.0, **given}


def asks(n: int, *, mixed: bool = False, **more: object) -> list[Ask]:
    """So many requests; mixed: of several samplers, lengths and temperatures."""
    prompts = [e.prompt for e in tasks.generate("word_problems", "test", n)]
    if not mixed:
        return [Ask(p, {**CALL, "seed": i, **more}) for i, p in enumerate(prompts)]
    return [
        Ask(p, {
            **CALL, "seed": i, "sampler": SAMPLERS[i % 3], "max_new_tokens": 16 + 8 * (i % 4),
            "temperature": 0.7 * (i % 5 == 0), "cache": ("none", "dual")[i % 7 == 0], **more,
        })
        for i, p in enumerate(prompts)
    ]  # fmt: skip


@contextmanager
def serving(model: NativeModel, max_rows: int = ROWS, max_queue: int = 512) -> Iterator[int]:
    """A server on a free port of this machine alone, ready. Errors: it is not ready within PATIENCE."""
    app = create_app(dllm.Engine(model, max_rows=max_rows, max_queue=max_queue), ServeConfig(max_queue=max_queue))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, name="bench-serve", daemon=True)
    thread.start()
    until = time.monotonic() + PATIENCE
    try:
        while not server.started or _status(_port(server)) != 200:
            if time.monotonic() > until or not thread.is_alive():
                raise DllmError("the server did not become ready")
            time.sleep(0.02)
        yield _port(server)
    finally:
        server.should_exit = True
        thread.join()


def _port(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def _status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def at_once(port: int, some: Sequence[Ask], delays: Sequence[float] = ()) -> tuple[list[Heard], float]:
    """The answers to requests that are made together, or each so many seconds after the beginning, and the seconds of
    all."""
    found, seconds = clients.ask(port, [ask.body for ask in some], delays=delays)
    return [heard for heard in found if heard is not None], seconds


def same(heard: Heard, output: Output) -> bool:
    """Whether a client was answered what `generate` gives."""
    told = (heard.text, heard.tokens, heard.nfe, heard.finish)
    return told == (output.text, len(output.tokens), output.nfe, "stop" if output.finish_reason == "stop" else "length")


def identity(model: NativeModel, n: int = 300, *, seed: int = 0, rows: int = ROWS) -> tuple[int, int]:
    """Requests of a mixed load that were answered as `generate` does it alone, and those that went away.

    Every ninth client goes away in the middle. Errors: another answer, with its request; one that has none.
    """
    some, draw, gone = asks(n, mixed=True), random.Random(seed), 0
    leaves = {i: draw.random() / 5 for i in range(8, n, 9)}
    with serving(model, rows) as port:
        answers, _ = clients.ask(port, [ask.body for ask in some], clients=2 * rows, leaves=leaves)
    for i, ask in enumerate(some):
        heard = answers[i]
        gone += heard is None
        if (heard is None) != (i in leaves) or (heard is not None and not same(heard, ask.alone(model))):
            raise DllmError(f"request {i} was answered otherwise than by itself: {ask}, {heard}")
    return n - gone, gone


def run(
    repeats: int = 5, *, requests: int = REQUESTS, models: Mapping[str, NativeModel] | None = None
) -> Iterator[Figure]:
    """Ratios side by side, then scaling, then arrivals."""
    models = models or {"forward of 20 ms": scripted(), "embedded": _embedded()}
    for name, model in models.items():
        asked = isinstance(model, Scripted)
        some = asks(requests)
        plain = [ask.alone(model) for ask in some]
        tokens = sum(len(output.tokens) for output in plain)
        yield from _against_generate(name, model, some, repeats, asked)
        speeds = dict[int, float]()
        for rows in SCALES:
            with serving(model, rows) as port:
                took = statistics.median(at_once(port, some)[1] for _ in range(min(repeats, 3)))
            speeds[rows] = tokens / took
            yield Figure(
                f"{name}: tokens/s of {rows} rows against those of one", speeds[rows] / speeds[1],
                note=f"{speeds[rows]:.0f} tokens/s, {requests} requests",
            )  # fmt: skip
        with serving(model) as port:
            by_one = [at_once(port, [ask])[0][0] for ask in some]
            yield Figure(
                f"{name}: tokens/s, one by one", _speed(by_one, sum(h.seconds for h in by_one)), note=_spread(by_one)
            )
            for rate in RATES:
                a_second = rate * speeds[ROWS] * requests / tokens
                came, draw = 0.0, random.Random(0)
                delays = [came := came + draw.expovariate(a_second) for _ in some]
                heard, took = at_once(port, some, delays)
                equal = f"{sum(map(same, heard, plain))} of {requests} answers as alone"
                yield Figure(
                    f"{name}: tokens/s at {a_second:.1f} arrivals a second", _speed(heard, took),
                    note=f"{_spread(heard)}; {equal}",
                )  # fmt: skip


def _against_generate(
    name: str, model: NativeModel, some: Sequence[Ask], repeats: int, asked: bool
) -> Iterator[Figure]:
    """Throughput and latency, by the engine and over HTTP."""
    prompts = [ask.prompt for ask in some]

    def batch() -> None:
        dllm.generate(model, prompts, chat=False, batch_size=ROWS, **{**CALL, "seed": 0})

    def alone() -> None:
        some[0].alone(model)

    with dllm.Engine(model, max_rows=ROWS, max_queue=len(some)) as engine:

        def direct(several: Sequence[Ask]) -> float:
            began = time.perf_counter()
            pending = [engine.submit(ask.prompt, chat=False, **ask.arguments) for ask in several]
            for request in pending:
                request.result()
            return time.perf_counter() - began

        yield from _ratios(f"{name}, dllm.Engine", batch, alone, direct, some, repeats, asked)
    with serving(model) as port:
        yield from _ratios(
            f"{name}, HTTP", batch, alone, lambda several: at_once(port, several)[1], some, repeats, asked
        )


def _ratios(
    name: str, batch: Callable[[], None], alone: Callable[[], None], ours: Callable[[Sequence[Ask]], float],
    some: Sequence[Ask], repeats: int, asked: bool,
) -> Iterator[Figure]:  # fmt: skip
    """The medians of both in turns, behind a turn that does not count."""

    def turns(theirs: Callable[[], None], several: Sequence[Ask]) -> tuple[float, float]:
        taken = [(seconds(theirs), ours(several)) for _ in range(1 + repeats)][1:]
        return statistics.median(t for t, _ in taken), statistics.median(o for _, o in taken)

    theirs, own = turns(batch, some)
    note = f"{own:.2f} s and {theirs:.2f} s, {len(some)} requests, {ROWS} rows"
    bound = 0.95 if asked else None
    yield Figure(f"{name}: throughput against generate at the same batch", theirs / own, bound, True, note)
    theirs, own = turns(alone, some[:1])
    note = f"{1e3 * own:.0f} ms and {1e3 * theirs:.0f} ms"
    yield Figure(f"{name}: latency of one request against generate", own / theirs, 1.1 if asked else None, note=note)


def _speed(heard: Sequence[Heard], seconds: float) -> float:
    return sum(h.tokens for h in heard) / seconds


def _spread(heard: Sequence[Heard]) -> str:
    """Percentiles of what clients wait for."""

    def of(what: str, values: Sequence[float]) -> str:
        cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else list(values) * 99
        return f"{what} {' / '.join(f'{1e3 * cuts[p - 1]:.0f}' for p in (50, 95, 99))}"

    parts = of("first token", [h.first for h in heard]), of("a block", [h.block for h in heard])
    return f"p50 / p95 / p99 in ms: {'; '.join((*parts, of('in line', [h.queued for h in heard])))}"


def _embedded() -> NativeModel:
    model = dllm.load("tiny", device="cpu")
    assert isinstance(model, NativeModel)
    return model
