"""Conversations: messages as the chat template takes them, and the formats of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dllm.decoding.constraints.constraint import Constraint
from dllm.models.tokenizer import Tokenizer, by_template
from dllm.serve.errors import ApiError
from dllm.serve.tools import Template, Tools
from dllm.spec import Json

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


def conversation(messages: object, tools: Tools | None, tokenizer: Tokenizer | None) -> list[Json] | list[int]:
    """Messages with texts as contents, or their ids where the template is told of tools.

    Errors: no list of messages, unknown roles, parts that are no text, what the template objects to.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages is a list of at least one message")
    template = Template.of(tokenizer)
    said = [_message(message, f"messages[{i}]", template.calls) for i, message in enumerate(messages)]
    if tokenizer is None or tools is None or not template.tools:
        return said
    ids = by_template(tokenizer, said, add_generation_prompt=True, tools=tools.given)
    return [*ids, *tokenizer(tools.opening, add_special_tokens=False)["input_ids"]] if tools.opening else list(ids)


def _message(given: object, where: str, calls: bool) -> Json:
    if not isinstance(given, Mapping):
        raise _wrong(f"{where} must be an object with role and content")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
    content, called = given.get("content"), given.get("tool_calls")
    if role != "assistant" or not called:
        return {"role": ROLES[role], "content": _content(content, where)}
    said = _called(called, where)
    text = "" if content is None else _content(content, where)
    if calls:
        return {"role": role, "content": text, "tool_calls": said}
    return {"role": role, "content": "\n".join([*([text] if text else []), *(json.dumps(c["function"]) for c in said)])}


def _called(given: object, where: str) -> list[Json]:
    """Calls of an earlier answer, their arguments as objects, which is what templates write."""
    if not isinstance(given, list):
        raise _wrong(f"{where}: tool_calls is a list")
    found = list[Json]()
    for call in given:
        match call:
            case {"function": {"name": str(name), "arguments": str(text)}}:
                try:
                    arguments = json.loads(text)
                except (ValueError, RecursionError):
                    raise _wrong(f"{where}: the arguments of a call are JSON") from None
                found.append({"type": "function", "function": {"name": name, "arguments": arguments}})
            case _:
                raise _wrong(f"{where}: a call has a function with a name and arguments")
    return found


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


def formatted(given: object) -> Json:
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
