"""Conversations: messages as the chat template takes them, and the formats of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm.decoding.constraints.constraint import Constraint
from dllm.serve.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
DEPTH = 4  # of an answer that is any JSON object
OBJECT = r"""
start: object
object: "{" [pair (comma pair)*] "}"
pair: STRING colon value
array: "[" [value (comma value)*] "]"
value: object | array | STRING | NUMBER | "true" | "false" | "null"
comma: /, ?/
colon: /: ?/
STRING: /"([^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"""


def conversation(messages: object) -> list[dict[str, Any]]:
    """Messages with texts as contents. Errors: no list of messages, unknown roles, parts that are no text."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages is a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise _wrong(f"{where} must be an object with role and content")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _content(given.get("content"), where)}


def _content(given: object, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise _wrong(f"{where}: content is a text, or a list of text parts")
    for part in given:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(f"{where}: a part of type {kind!r}; this model reads text alone")
    return "".join(part["text"] for part in given)


def _wrong(message: str) -> ApiError:
    return ApiError(400, "invalid_value", message, "messages")


def formatted(given: object) -> dict[str, Any]:
    """The arguments that a response_format stands for. Errors: an unknown one."""
    if given is None:
        return {}
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise _format("response_format has a type: text, json_object or json_schema")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"constraint": Constraint(grammar=OBJECT, max_depth=DEPTH)}
    said = given.get("json_schema")
    if not isinstance(said, Mapping) or not isinstance(said.get("schema"), Mapping):
        raise _format("response_format of type json_schema has a json_schema with a schema")
    return {"constraint": Constraint(json_schema=said["schema"], max_depth=said.get("max_depth"))}


def _format(message: str) -> ApiError:
    return ApiError(400, "invalid_value", message, "response_format")
