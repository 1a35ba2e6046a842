"""Errors of Ray's router in OpenAI's shape: what Ray Serve puts in front of its proxy (`replicas.deploy`).

It runs where requests come in, so it loads no model code.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllm.serve.errors import ApiError

PATH = f"{__name__}:middlewares"
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # names, in every proxy's environment, what returns middlewares
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

        async def shaped(message: Message) -> None:
            nonlocal begun, refused
            if message["type"] == "http.response.start":
                begun, headers, status = True, Headers(raw=message["headers"]), message["status"]
                refused = status in SAYS and not headers.get("content-type", "").startswith("application/json")
                if refused:
                    kept = {name: headers[name] for name in ("retry-after", "x-request-id") if name in headers}
                    await ApiError(status, *SAYS[status], headers=kept).response()(scope, receive, send)
            if not refused:
                await send(message)

        await self.app(scope, receive, shaped)
        if scope["type"] == "http" and not begun:
            said = "the replica that had the request has ended: ask again"
            await ApiError(503, "unavailable", said, headers={"Retry-After": "1"}).response()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Those of a proxy."""
    return [Middleware(Shaped)]
