"""A server's app inside of another one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from dllm.serve.config import ServeConfig
from dllm.serve.limits import Guard


async def answer(request: Request) -> Response:
    return Response("ok")


def status(app: Any, path: str, key: str = "") -> int:
    """Of the answer to a GET."""
    headers, sent = [(b"authorization", f"Bearer {key}".encode())] if key else [], list[Any]()
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": headers}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    found: int = sent[0]["status"]
    return found


@pytest.mark.parametrize("at", ["", "/llm", "/v1"])
def test_keys_are_asked_for_wherever_the_app_is_mounted(at: str) -> None:
    inner = Starlette(routes=[Route("/v1/models", answer), Route("/health", answer)])
    app = Starlette(routes=[Mount(at, app=Guard(inner, ServeConfig(), ["secret"], lambda *_: None))])
    assert status(app, f"{at}/v1/models") == 401
    assert status(app, f"{at}/v1/models", "wrong") == 401
    assert status(app, f"{at}/v1/models", "secret") == 200
    assert status(app, f"{at}/health") == 200
