"""The fields of requests: one table a route, that reads them, says what they may be, and is their OpenAPI schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

from dllm.errors import DllmError, first_line, unknown
from dllm.serve.errors import ApiError
from dllm.spec import Json, Source, fit, keys_of, limits_of, param

HERE = Source("the request")
T = TypeVar("T", bound="Body")
Plain = Any  # what its own reader checks

# Fields that say nothing at these values. Other ones are refused: an answer would not be what was asked for.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "audio": (),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


hints_of = cache(get_type_hints)  # a request needs them, and to find them takes most of the time that it is read


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a route reads."""

    model: str | None = param(None, "the served name, or nothing")

    @property
    def given(self) -> list[str]:
        """The fields that say something."""
        return [f.name for f in fields(self) if vars(self)[f.name] != f.default]

    @classmethod
    def read(cls: type[T], body: bytes) -> T:
        """The fields of a body. Errors: no JSON object, an unknown field with the nearest one, a value that misfits."""
        given = {name: value for name, value in mapping(body).items() if value is not None}
        known = {f.name: f for f in fields(cls)}
        for name in [name for name in given if name in NEUTRAL and name not in known]:
            value = given.pop(name)
            if isinstance(value, bool) != (name == "store") or value not in NEUTRAL[name]:
                raise ApiError(400, "unsupported", f"{name}={value!r} is not supported: leave it out", name)
        hints, read = hints_of(cls), Json()  # type: ignore[arg-type]  # a class is hashable
        for name, value in given.items():
            if name not in known:
                raise ApiError(400, "unknown_parameter", str(unknown("field", name, (*known, *NEUTRAL))), name)
            try:
                read[name] = fit(hints[name], value, HERE, (name,), limits_of(known[name]))
            except DllmError as error:
                raise ApiError(400, "invalid_value", str(error), name) from None
        try:
            return cls(**read)
        except TypeError:
            lacks = next(n for n, f in known.items() if n not in read and n in cls.required())
            raise ApiError(400, "missing_required_parameter", f"{lacks!r} is missing", lacks) from None

    @classmethod
    def required(cls) -> list[str]:
        """Fields without a default."""
        found: list[str] = keys_of(cls)["required"]
        return found

    @classmethod
    def schema(cls) -> Json:
        """Its JSON Schema, for OpenAPI."""
        known = keys_of(cls)
        for name, member in known["properties"].items():
            if member.get("type") and name not in known["required"]:
                known["properties"][name] = {**member, "type": [member["type"], "null"]}
            known["properties"][name].update(SHAPES.get(name, {}))
        return known


@dataclass(frozen=True, kw_only=True)
class Fields(Body):
    """What is asked of an answer."""

    stream: bool = param(False, "server-sent events in place of one object")
    stream_options: Plain = param(None, "include_usage: a last chunk with the usage")
    temperature: float | None = param(None, "0 is greedy", low=0)
    top_p: float | None = param(None, "nucleus", above=0, high=1)
    seed: int | None = param(None, "drawn, and told, where it is absent; choice i has seed + i")
    n: int = param(1, "answers to a prompt", low=1)
    max_tokens: int | None = param(None, "columns of the answer", low=0)
    stop: Plain = param(None, "strings that end the answer")
    user: str | None = param(None, "not read")
    metadata: Plain = param(None, "not read")
    # the extension
    sampler: Plain = param(None, "a specification, as dllm.generate takes it")
    cache: Plain = param(None, "a policy of the block cache")
    block_length: int | None = param(None, "columns decoded before the next ones", low=1)
    steps: int | None = param(None, "forwards over the whole window (quota samplers)", low=1)
    top_k: int | None = param(None, "keep the k best tokens", low=1)
    cfg_scale: float | None = param(None, "classifier-free guidance", low=0)
    lookahead: Plain = param(None, "rows of exact verification")
    min_new_tokens: int | None = param(None, "no end token in the first columns", low=0)
    max_nfe: int | None = param(None, "forwards that an answer may take", low=1)
    regex: str | None = param(None, "the answer matches it fully")
    choices: Plain = param(None, "the answer is one of these strings")
    grammar: str | None = param(None, "the answer is a text of this grammar")
    constraint: Plain = param(None, "the same with max_depth or where")
    infill: bool | None = param(None, "fill the mask tokens inside the prompt")
    draft: bool = param(False, "draft events beside the text of a stream")
    batch: str = param("shared", "alone: forwards of its own", choices=("shared", "alone"))
    return_trace: bool = param(False, "what each forward committed")


@dataclass(frozen=True, kw_only=True)
class Completion(Fields):
    """`POST /v1/completions`."""

    prompt: Plain
    suffix: str | None = param(None, "text behind the answer, which is written between the two")
    echo: bool = param(False, "the prompt in front of the answer")
    logprobs: int | None = param(None, "log-probabilities of the tokens, with so many alternatives", low=0, high=20)


@dataclass(frozen=True, kw_only=True)
class Chat(Fields):
    """`POST /v1/chat/completions`."""

    messages: Plain
    max_completion_tokens: int | None = param(None, "the same as max_tokens", low=0)
    logprobs: bool = param(False, "log-probabilities of the tokens")
    top_logprobs: int | None = param(None, "with so many alternatives", low=0, high=20)
    response_format: Plain = param(None, "text, json_object, or json_schema with its schema")
    tools: Plain = param(None, "functions that the answer may call")
    tool_choice: Plain = param(None, "none, auto, required, or a function")
    parallel_tool_calls: bool = param(True, "false: one call at most")


@dataclass(frozen=True, kw_only=True)
class Read(Body):
    """`POST /v1/reads`: the arguments of `dllm.read`."""

    prompt: Plain
    template: str
    slots: Plain
    stages: Plain = param(None, "slots that are read together; later stages see the best labels")
    labels: str = param("auto", "of several tokens", choices=("auto", "chain", "product"))
    lengths: str = param("refuse", "labels of different numbers of tokens", choices=("refuse", "condition"))
    null: str | None = param(None, "a prompt without content, to calibrate by")
    cfg_scale: float = param(0.0, "classifier-free guidance", low=0)
    temperature: float = param(1.0, "of the p of labels", above=0)
    chat: bool | None = param(None, "whether text goes through the chat template; absent: where there is one")


TEXTS: Json = {"type": "array", "items": {"type": "string"}}
IDS: Json = {"type": "array", "items": {"type": "integer"}}
PARTS: Json = {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}}}}
SPECIFIED: Json = {"type": ["string", "object", "null"]}
SHAPES: Mapping[str, Json] = {  # of fields that have a reader of their own
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                "content": {"anyOf": [{"type": ["string", "null"]}, PARTS]},
            },
        },
    },
    "prompt": {"anyOf": [{"type": "string"}, TEXTS, IDS, {"type": "array", "items": IDS}]},
    "stop": {"anyOf": [{"type": ["string", "null"]}, TEXTS]},
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
    "metadata": {"type": ["object", "null"]},
    "sampler": SPECIFIED,
    "cache": SPECIFIED,
    "lookahead": {"type": ["string", "integer", "object", "null"]},
    "choices": {**TEXTS, "type": ["array", "null"]},
    "constraint": {"type": ["object", "null"]},
    "response_format": {"type": ["object", "null"]},
    "tools": {"type": ["array", "null"], "items": {"type": "object"}},
    "tool_choice": {"type": ["string", "object", "null"]},
    "slots": {"type": "object", "additionalProperties": TEXTS},
    "stages": {"type": ["array", "null"], "items": TEXTS},
}


def mapping(body: bytes) -> Json:
    """A body as a JSON object. Errors: no UTF-8, no JSON (NaN and Infinity are none), no object."""
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {first_line(error)}") from None
    if not isinstance(given, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return given


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
