"""Every error of the server: OpenAI's body, `{"error": {"message", "type", "param", "code"}}`, and the right status."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from dllm.errors import (
    Cancelled,
    DllmError,
    QueueFull,
    TimedOut,
    TooLarge,
    TooLong,
    Unsatisfiable,
    out_of_memory,
)

log = logging.getLogger(__name__)
INVALID = "invalid_request_error"
KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # of a status; else by its hundred
RULES = ("regex", "choices", "grammar", "constraint", "response_format", "tool_choice")  # fields that bind an answer
NO_RETRY = {"x-should-retry": "false"}  # the official client would decode it all again


class JsonAnswer(JSONResponse):
    """A JSON answer. A lone surrogate, which no UTF-8 can say, stays the escape that it came as."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return dumps(content).encode("utf-8", "backslashreplace")


def dumps(content: object) -> str:
    """As JSON. Errors: NaN and infinity."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ApiError(Exception):
    """What a client is told: a status, a code, one line, and the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's body."""
        kind = KINDS.get(self.status, INVALID if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonAnswer:
        """The whole answer."""
        return JsonAnswer(self.body, self.status, self.headers)


def told(error: BaseException, fields: Collection[str] = (), names: Mapping[str, str] | None = None) -> ApiError:
    """What a client is told of an error.

    fields: of its request; the first that the message of a mistake names is the one that it is about. names: what
    arguments of `dllm.generate` are called in a request, where that is another name.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, QueueFull):
        return ApiError(429, "queue_full", message, headers={"Retry-After": "1"})
    if isinstance(error, TimedOut):
        return ApiError(504, "timeout", message, headers=NO_RETRY)
    if isinstance(error, Cancelled):
        return ApiError(503, "draining", "the server is shutting down", headers={"Retry-After": "5"})
    if out_of_memory(error) if isinstance(error, Exception) else False:
        return ApiError(503, "out_of_memory", "the server ran out of memory", headers={"Retry-After": "5"})
    if isinstance(error, DllmError):
        for argument, field in (names or {}).items():
            message = re.sub(rf"\b{argument}\b", field, message)
        words = re.findall(r"\w+", message)
        bound = RULES if {"constraint", "json_schema"} & set(words) else ()
        named = (*words, *(word.removesuffix("s") for word in words), *bound)
        param = next((word for word in named if word in fields), None)
        codes = {
            TooLong: "context_length_exceeded",
            Unsatisfiable: "constraint_unsatisfiable",
            TooLarge: "constraint_too_large",
        }
        return ApiError(400, codes.get(type(error), "invalid_value"), message, param)
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "internal_error", "the server failed; its log says why", headers=NO_RETRY)


def install(app: FastAPI) -> None:
    """Have all errors of an app answered in this shape."""

    async def ours(_: Request, error: Exception) -> Response:
        return told(error).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, code, str(error.detail), headers=error.headers).response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(DllmError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, ours)
