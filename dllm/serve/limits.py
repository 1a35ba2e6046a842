"""What stands between the network and the routes: who may ask, how much, how long, how many at a time."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import Counter
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllm.serve.config import ServeConfig
from dllm.serve.errors import ApiError


class Gone(Exception):
    """The client left before its body was there."""


class Guard:
    """An ASGI middleware. It reads bodies whole, within their bounds, before a route sees anything of a request.

    uvicorn bounds neither the time nor the size of a body. Headers are the reverse proxy's (docs/serve.md).
    `refused` is told the path and the error of what it answers itself.
    """

    def __init__(
        self, app: ASGIApp, config: ServeConfig, keys: Sequence[str], refused: Callable[[str, ApiError], None]
    ) -> None:
        self.app, self.config = app, config
        self.keys = [key.encode() for key in keys]
        self.refused = refused
        self.busy = Counter[bytes]()  # requests of each key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        identity = named(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = identity

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        key, asks = b"", routed(scope).startswith("/v1/") and scope["method"] != "OPTIONS"
        try:
            if asks:
                key = self._key(headers)
                if self.busy[key] >= self.config.per_key:
                    whose = " of this key" if self.keys else ""
                    raise ApiError(
                        429, "too_many_requests", f"{self.config.per_key} requests{whose} are under way: "
                        "wait for one of them", headers={"Retry-After": "1"},
                    )  # fmt: skip
            self.busy[key] += asks
            try:
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    receive = replayed(await self._body(headers, receive), receive)
                await self.app(scope, receive, marked)
            finally:
                self.busy[key] -= asks
                if not self.busy[key]:
                    del self.busy[key]
        except ApiError as error:
            self.refused(scope["path"], error)
            await error.response()(scope, receive, marked)
        except Gone:
            return

    def _key(self, headers: Headers) -> bytes:
        """The key of a request, empty where none is asked for. Errors: a missing one, a wrong one."""
        if not self.keys:
            return b""
        kind, _, given = headers.get("authorization", "").partition(" ")
        said = given.strip().encode()
        # every key is compared, so that the time says nothing
        if kind.lower() == "bearer" and sum([hmac.compare_digest(said, key) for key in self.keys]):
            return said
        raise ApiError(
            401, "invalid_api_key", "this server asks for an API key: Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Errors: too large, as declared or as counted, too slow, no JSON by its type."""
        most = self.config.body_bytes
        big = ApiError(413, "request_too_large", f"the body exceeds {most} bytes", headers={"Connection": "close"})
        if (declared := headers.get("content-length", "")).isdigit() and int(declared) > most:
            raise big
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "unsupported_media_type", f"Content-Type is {kind!r}: send application/json")
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.config.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise big
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            said = f"the body was not complete after {self.config.body_seconds:g} s"
            raise ApiError(408, "timeout", said, headers={"Connection": "close"}) from None


def routed(scope: Scope) -> str:
    """The path that routes are found by: behind where the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path.startswith(f"{root}/") else path


def named(given: str) -> str:
    """The id of a request: the client's where it is short printable ASCII, else ours."""
    return given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else f"req-{secrets.token_hex(8)}"


def replayed(body: bytes, receive: Receive) -> Receive:
    """What an app receives: a body that was read, then whatever comes, which is the client's leave."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
