"""`create_app`: the routes, and what they share."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.background import BackgroundTask
from starlette.responses import Response

import dllm
from dllm.call.engine import Engine
from dllm.decoding.constraints.constraint import KINDS
from dllm.errors import first_line
from dllm.serve import canvas, errors, requests
from dllm.serve.answers import Choice, Reply
from dllm.serve.backend import Backend, Hosted, Pending
from dllm.serve.config import ServeConfig
from dllm.serve.errors import ApiError, JsonAnswer, told
from dllm.serve.limits import Guard
from dllm.serve.metrics import PAGE, Ended, Metrics
from dllm.serve.requests import Asked
from dllm.serve.schema import Body, Chat, Completion, Read
from dllm.serve.stream import Ear, Post, Told, chunks, whole
from dllm.spec import Json

log = logging.getLogger(__name__)
SSE = "text/event-stream"
THREADS = 32  # for what a request does before it is in line: templates, tokens, canvases
LONG = 1 << 16  # bytes of a body whose tokens take their time: short ones pass it
COMPILING = 4  # requests whose constraints are compiled at a time: each takes a process, and seconds
CONSTRAINTS = {*KINDS, "constraint"}


@dataclass
class Serving:
    """What the routes share: `app.state.serving`."""

    backend: Backend
    config: ServeConfig
    name: str
    fingerprint: str = ""
    warm: bool = False
    failed: str = ""  # why it will never answer
    draining: bool = False
    mean: float = 1.0  # seconds of an answer, the last ones the most
    post: Post | None = None  # of the loop, from its start on
    counted: list[Callable[[Ended], None]] = field(default_factory=list)
    # one request after the other comes to the engine sooner, as one interpreter does it all
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    preparing_long: asyncio.Lock = field(default_factory=asyncio.Lock)
    compiling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COMPILING))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def trouble(self) -> tuple[str, str]:
        """Code and reason why it takes no requests; empty: it does."""
        if self.draining:
            return "draining", "the server is shutting down"
        if not self.warm:
            return ("unavailable", self.failed) if self.failed else ("loading", "the model is being loaded")
        return ("unavailable", said) if (said := self.backend.trouble) else ("", "")

    def check(self, model: str | None) -> None:
        """Errors: it takes no requests; another model."""
        code, said = self.trouble
        if code:
            raise ApiError(503, code, said, headers={"Retry-After": "5"})
        if model is not None and model != self.name:
            raise self.unknown(model)

    def unknown(self, model: str) -> ApiError:
        """The error for another model's name."""
        said = f"there is no model {model!r}; this server has {self.name!r}"
        return ApiError(404, "model_not_found", said, "model")

    @property
    def wait(self) -> int:
        """Seconds after which a line that is full has room again, about."""
        load = self.backend.load
        return max(1, math.ceil(self.mean * (load.waiting + 1) / max(1, load.lanes)))

    def count(self, ended: Ended) -> None:
        """Tell those who count."""
        if ended.code == "ok":
            self.mean += (ended.seconds - self.mean) / 16
        for tell in self.counted:
            tell(ended)


def create_app(engine: Engine | Backend, config: ServeConfig = ServeConfig(), name: str = "") -> FastAPI:
    """The server's app over an engine that is up: any ASGI server runs it. `name`: what the model is called where the
    configuration does not say."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # streams end with their answers
    backend = Hosted(engine) if isinstance(engine, Engine) else engine
    serving = Serving(backend, config, config.name or name or "dllm")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        serving.post = Post()
        warming = asyncio.create_task(asyncio.to_thread(_warm, serving))
        yield
        serving.draining = True
        await warming
        await asyncio.to_thread(backend.close, False)
        gc.unfreeze()  # the process may go on without this server

    app = FastAPI(
        title="dllm", version=dllm.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="OpenAI-compatible access to a masked-diffusion language model.",
    )  # fmt: skip
    app.state.serving = serving
    errors.install(app)

    def refused(path: str, error: ApiError) -> None:
        serving.count(Ended(path, error.code, None, (), 0.0))

    app.add_middleware(Guard, config=config, keys=config.keys(), refused=refused)
    if config.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.origins, allow_methods=["GET", "POST"],
            expose_headers=["X-Request-Id"], allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        )  # fmt: skip
    _status(app, serving)
    _answers(app, serving)
    _metrics(app, serving)
    if config.canvas:
        canvas.add(app)
    return app


def _warm(serving: Serving) -> None:
    """The first answer, which shows whether the model answers at all."""
    try:
        serving.backend.warm()
        serving.fingerprint = serving.backend.fingerprint()
        gc.collect()
        gc.freeze()  # a collection that walks over all that was imported stops every stream for a tenth of a second
        serving.warm = True
    except Exception as error:
        log.exception("the model gives no answer")
        serving.failed = f"the model gives no answer: {first_line(error)}"


def _status(app: FastAPI, serving: Serving) -> None:
    """Routes that say how the server is."""

    @app.get("/health/live", response_class=JsonAnswer)
    async def live() -> Response:
        """The process answers."""
        return JsonAnswer({"status": "ok"})

    @app.get("/health", response_class=JsonAnswer, responses=failures(503))
    async def ready() -> Response:
        """It takes requests."""
        code, said = serving.trouble
        load = serving.backend.load._asdict()
        return JsonAnswer(
            {"status": code or "ok", **({"reason": said} if said else {}), "load": load}, 503 if code else 200
        )

    def entry() -> Json:
        limits = {k: v for k, v in asdict(serving.config).items() if isinstance(v, int | float) and k != "port"}
        said = {**serving.backend.about(), "limits": limits}
        said["defaults"] = {**said.get("defaults", {}), **serving.config.defaults}
        return {
            "id": serving.name, "object": "model", "created": serving.created, "owned_by": "dllm", "dllm": said,
        }  # fmt: skip

    @app.get("/v1/models", response_class=JsonAnswer, responses=failures(401))
    async def models() -> Response:
        """The model that is served."""
        return JsonAnswer({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{name:path}", response_class=JsonAnswer, responses=failures(401, 404))
    async def model(name: str) -> Response:
        """The model of this name."""
        if name != serving.name:
            raise serving.unknown(name)
        return JsonAnswer(entry())


def _metrics(app: FastAPI, serving: Serving) -> None:
    """Count what is served, and the route that says it."""
    backend = serving.backend
    app.state.metrics = metrics = Metrics(backend, serving.name)
    serving.counted.append(metrics.ended)
    if isinstance(backend, Hosted):
        backend.engine.observer = metrics

    @app.get("/metrics", responses={200: {"content": {PAGE: {}}}})
    async def scrape() -> Response:
        """What Prometheus reads."""
        return Response(metrics.page(), media_type=PAGE)


def _answers(app: FastAPI, serving: Serving) -> None:
    """Routes that answer."""
    said: Json = {
        "response_class": JsonAnswer,
        "responses": failures(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
    }
    streams: Json = {"responses": {200: {"content": {SSE: {}}}, **said["responses"]}}

    @app.post("/v1/chat/completions", openapi_extra=body_of(Chat), **{**said, **streams})
    async def chat(http: Request) -> Response:
        """The next message of a conversation."""
        return await _answered(serving, http, Chat, requests.conversed)

    @app.post("/v1/completions", openapi_extra=body_of(Completion), **{**said, **streams})
    async def completions(http: Request) -> Response:
        """What follows a text."""
        return await _answered(serving, http, Completion, requests.completion)

    @app.post("/v1/reads", openapi_extra=body_of(Read), **said)
    async def reads(http: Request) -> Response:
        """Probabilities of labels at the open slots of an answer, in one forward."""
        ear, given = Ear(serving.config.event_buffer, serving.post), Read.read(await http.body())
        try:
            serving.check(given.model)
            found = await asyncio.to_thread(serving.backend.read, requests.reading(given, serving.backend))
        except Exception as error:
            raise told(error, given.given) from error
        serving.count(Ended(http.url.path, "ok", None, (), ear.seconds))
        slots = {name: {**asdict(slot), "best": slot.best, "margin": slot.margin} for name, slot in found.slots.items()}
        return JsonAnswer({
            "object": "reading", "model": serving.name, "system_fingerprint": serving.fingerprint, "slots": slots,
            "nfe": found.nfe, "sees_suffix": found.sees_suffix,
            "usage": {"prompt_tokens": len(found.canvas), "completion_tokens": 0, "total_tokens": len(found.canvas)},
        })  # fmt: skip


async def _answered(serving: Serving, http: Request, kind: type[Body], reader: Callable[..., Asked]) -> Response:
    """The answer to a request, as one object or as a stream."""
    body, ear, route = await http.body(), Ear(serving.config.event_buffer, serving.post), http.url.path
    fields = Body()

    def submit(asked: Asked) -> Pending:
        arguments = {**asked.arguments, "on_step": ear.step} if asked.drafts else asked.arguments
        timeout = serving.config.request_timeout
        return serving.backend.submit(asked.prompt, asked.n, timeout, asked.batch, arguments)

    def prepared(coming: ExitStack, fields: Body) -> tuple[Asked, Pending | None]:
        """A request, read, and put in line unless its constraint is to be compiled."""
        with coming:
            asked = reader(fields, serving.backend, serving.config)
            return asked, None if asked.arguments.keys() & CONSTRAINTS else submit(asked)

    try:
        fields = kind.read(body)
        serving.check(fields.model)
        with ExitStack() as coming:
            coming.enter_context(serving.backend.expecting())
            async with serving.preparing if len(body) < LONG else serving.preparing_long:
                asked, submitted = await asyncio.to_thread(prepared, coming, fields)
        if submitted is None:
            async with serving.compiling:
                submitted = await asyncio.to_thread(submit, asked)
        pending = submitted
    except Exception as error:
        refused = told(error, fields.given, requests.NAMES)
        if refused.code == "queue_full":
            refused.headers["Retry-After"] = str(serving.wait)
        serving.count(Ended(route, refused.code, None, (), ear.seconds))
        raise refused from error
    reply = Reply(asked, serving.name, serving.fingerprint, serving.backend)

    def ended(choices: Sequence[Choice], error: ApiError | None) -> None:
        serving.count(Ended(route, "ok" if error is None else error.code, pending, choices, ear.seconds, asked))

    ear.follow(pending, asked.stream)
    if asked.stream:
        config = serving.config
        return EventSourceResponse(
            chunks(ear, pending, reply, config, ended), ping=config.ping_seconds, send_timeout=config.send_seconds,
            ping_message_factory=partial(ServerSentEvent, comment="ping", sep="\n"),
            background=BackgroundTask(pending.cancel),  # the client may have left before the first event
        )  # fmt: skip
    return await _whole(http, ear, pending, reply, ended)


async def _whole(http: Request, ear: Ear, pending: Pending, reply: Reply, ended: Told) -> Response:
    """One object, unless the client leaves first."""
    answer, left = asyncio.create_task(whole(ear, pending, reply)), asyncio.create_task(_left(http))
    error: ApiError | None = ApiError(499, "client_closed_request", "the client left")
    choices: Sequence[Choice] = ()
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)
        said, choices = answer.result()
        made = JsonAnswer(said)
        error = None
        return made
    except Exception as fault:
        error = told(fault)
        raise error from fault
    finally:
        pending.cancel()
        answer.cancel()
        left.cancel()
        await asyncio.gather(answer, left, return_exceptions=True)
        ended(choices, error)


async def _left(http: Request) -> None:
    """Wait until the client leaves."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def failures(*statuses: int) -> dict[int | str, Json]:
    """Answers with these statuses, for OpenAPI."""
    return {
        status: {"description": "An error", "content": {"application/json": {"schema": ERROR}}} for status in statuses
    }


def body_of(kind: type[Body]) -> Json:
    """What a route reads, for OpenAPI."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.schema()}}}}
