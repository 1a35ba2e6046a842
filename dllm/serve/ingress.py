"""Errors of Ray's router in OpenAI's shape: what Ray Serve puts in front of its proxy (`replicas.deploy`).

It runs where requests come in, so it loads no model code.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllm.serve.errors import ApiError

PATH = f"{__name__}:middlewares"
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # names, in every proxy's environment, what returns middlewares
ROUTELESS = b"/-/routes"  # Ray's answer to a path that it does not know names it; one of another app does not
SAYS = {
    408: ("timeout", "the request was not done in its time"),
    429: ("queue_full", "all replicas are busy, and no more requests may wait: try again later"),
    503: ("unavailable", "no replica can answer: try again later"),
}


class Shaped:
    """An ASGI middleware: answers that Ray gives itself, which are plain text, and those that nobody gives."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back."""
        begun = refused = False
        held: Message | None = None  # the beginning of an answer that says 404, until its text shows whose it is

        async def refuse(status: int, headers: MutableHeaders) -> None:
            kept = {name: headers[name] for name in ("retry-after", "x-request-id") if name in headers}
            await ApiError(status, *SAYS[status], headers=kept).response()(scope, receive, send)

        async def shaped(message: Message) -> None:
            nonlocal begun, refused, held
            if message["type"] == "http.response.start":
                begun, headers, status = True, MutableHeaders(scope=message), message["status"]
                if "x-request-id" in headers:
                    headers["x-request-id"] = headers["x-request-id"]  # the first, and no other
                plain = not headers.get("content-type", "").startswith("application/json")
                if plain and status == 404:
                    held = message
                    return
                refused = plain and status in SAYS
                if refused:
                    await refuse(status, headers)
            elif held is not None:
                start, held = held, None
                refused = ROUTELESS in message.get("body", b"")
                if refused:
                    await refuse(503, MutableHeaders(scope=start))
                else:
                    await send(start)
            if not refused:
                await send(message)

        await self.app(scope, receive, shaped)
        if scope["type"] == "http" and not begun:
            said = "the replica that had the request has ended: ask again"
            await ApiError(503, "unavailable", said, headers={"Retry-After": "1"}).response()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Those of a proxy."""
    return [Middleware(Shaped)]
