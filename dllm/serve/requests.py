"""What a request asks: its fields become a prompt, arguments of `dllm.generate`, and the form of the answer."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_type_hints

from dllm.call.job import MAX_NEW_TOKENS, mask_of
from dllm.call.prompts import as_list, check_ids, encode
from dllm.decoding.constraints.constraint import Constraint
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.samplers import registry
from dllm.serve.backend import Backend
from dllm.serve.chat import conversation, formatted
from dllm.serve.config import ServeConfig
from dllm.serve.errors import ApiError
from dllm.serve.schema import Chat, Completion, Fields, Read
from dllm.serve.tools import Tools, offered
from dllm.spec import Json

# arguments that a request calls by another name
NAMES = {"max_new_tokens": "max_tokens"}
OPTIONS = {"include_usage", "include_obfuscation"}  # nothing is padded, so nothing obfuscates
SAME = (
    "temperature", "top_p", "top_k", "stop", "sampler", "cache", "block_length", "steps", "cfg_scale", "lookahead",
    "min_new_tokens", "max_nfe", "regex", "choices", "grammar", "constraint", "infill",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request, read."""

    chat: bool
    prompt: object
    n: int
    arguments: Json  # of `dllm.generate`
    stream: bool
    usage: bool  # a stream ends with it
    drafts: bool
    batch: str
    logprobs: bool
    top: int  # alternatives of a token
    echoes: tuple[str, ...] | None = None  # what stands in front of the answers to each prompt
    trace: bool = False
    tools: Tools | None = None
    holes: bool = False  # the answer is what was written into the hole of each prompt


def completion(given: Completion, backend: Backend, config: ServeConfig) -> Asked:
    """A request for completions. Errors: what cannot be honoured."""
    prompts, _ = as_list(given.prompt)
    bounded(len(prompts), config.max_prompts, "prompts", "prompt")
    if any(isinstance(p, Mapping) or (not isinstance(p, str) and p and isinstance(p[0], Mapping)) for p in prompts):
        raise ApiError(400, "invalid_value", "messages belong to /v1/chat/completions", "prompt")
    arguments = {**arguments_of(given, config), "chat": False, "logprobs": given.logprobs}
    echoes = None
    if given.echo:
        echoes = tuple(p if isinstance(p, str) else spoken(backend, p) for p in prompts)
    prompt: object = given.prompt
    if given.suffix is not None:
        model = masked(backend, "suffix")
        prompt = [holed(model, p, given.suffix, arguments.get("max_new_tokens")) for p in prompts]
        arguments |= {"infill": True, "max_new_tokens": None}
    return Asked(
        chat=False, prompt=prompt, echoes=echoes, holes=given.suffix is not None, logprobs=given.logprobs is not None,
        top=given.logprobs or 0, **shared(given, config, arguments),
    )  # fmt: skip


def conversed(given: Chat, backend: Backend, config: ServeConfig) -> Asked:
    """A request for a chat's next message. Errors: what cannot be honoured."""
    if given.top_logprobs is not None and not given.logprobs:
        raise ApiError(
            400, "invalid_value", "top_logprobs says how many: ask for them with logprobs=true", "top_logprobs"
        )
    arguments = arguments_of(given, config) | formatted(given.response_format)
    if given.max_completion_tokens is not None:
        if given.max_tokens is not None:
            raise ApiError(400, "invalid_value", "max_tokens and max_completion_tokens are one: give one", "max_tokens")
        arguments["max_new_tokens"] = given.max_completion_tokens
    tools = offered(given.tools, given.tool_choice, given.parallel_tool_calls, backend.tokenizer)
    if tools is not None and tools.bound:
        if "constraint" in arguments:
            raise ApiError(
                400, "invalid_value", "the answer is bound to a call: leave response_format out", "tool_choice"
            )
        arguments["constraint"] = Constraint(json_schema=tools.schema)
    arguments["logprobs"] = (given.top_logprobs or 0) if given.logprobs else None
    return Asked(
        chat=True, prompt=conversation(given.messages, tools, backend.tokenizer), tools=tools,
        logprobs=given.logprobs, top=given.top_logprobs or 0, **shared(given, config, arguments),
    )  # fmt: skip


def reading(given: Read, backend: Backend) -> Json:
    """The arguments of `dllm.read`. Errors: a model that reads nothing, several prompts, labels that are no texts."""
    masked(backend, "model")
    if not as_list(given.prompt)[1]:
        raise ApiError(400, "invalid_value", "a read is of one prompt", "prompt")
    if not isinstance(given.slots, Mapping) or not all(map(texts, given.slots.values())):
        raise ApiError(400, "invalid_value", "slots is an object: lists of labels by the names of slots", "slots")
    if given.stages is not None and not (isinstance(given.stages, list) and all(map(texts, given.stages))):
        raise ApiError(400, "invalid_value", "stages is a list of lists of slots", "stages")
    return {name: value for name, value in vars(given).items() if name != "model" and value is not None}


def shared(given: Fields, config: ServeConfig, arguments: Json) -> Json:
    """What both kinds of request say alike."""
    bounded(given.n, config.max_n, "answers", "n")
    if given.draft and not given.stream:
        raise ApiError(400, "invalid_value", "draft events are a stream's: pass stream=true", "draft")
    options = given.stream_options
    if options is not None and not (
        isinstance(options, Mapping) and set(options) <= {"include_usage", "include_obfuscation"}
    ):
        raise ApiError(400, "invalid_value", "stream_options has one key, include_usage", "stream_options")
    if options is not None and not given.stream:
        raise ApiError(400, "invalid_value", "stream_options are a stream's: pass stream=true", "stream_options")
    return {
        "n": given.n,
        "arguments": {name: value for name, value in arguments.items() if value is not None},
        "stream": given.stream,
        "usage": bool(options and options.get("include_usage")),
        "drafts": given.draft,
        "trace": given.return_trace,
        "batch": given.batch,
    }


def arguments_of(given: Fields, config: ServeConfig) -> Json:
    """The arguments that fields say, over the server's own."""
    stop = given.stop
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise ApiError(400, "invalid_value", "stop is a text, or a list of some, none of them empty", "stop")
        bounded(len(stops), config.max_stops, "stop strings", "stop")
        bounded(max(map(len, stops), default=0), config.stop_length, "characters in a stop string", "stop")
    if given.sampler is not None:
        no_files(given.sampler)
    own = {name: vars(given)[name] for name in SAME if vars(given)[name] is not None}
    if given.seed is not None:
        own["seed"] = given.seed
    if given.max_tokens is not None:
        own["max_new_tokens"] = given.max_tokens
    if given.return_trace or given.draft:
        own["trace"] = True
    return {"seed": secrets.randbelow(1 << 31), **config.defaults, **own}


def texts(given: object) -> bool:
    """Whether this is a list of texts."""
    return isinstance(given, list) and all(isinstance(text, str) for text in given)


def bounded(count: int, most: int, what: str, param: str) -> None:
    """Errors: more than there may be."""
    if count > most:
        raise ApiError(400, "invalid_value", f"{count} {what}; this server takes at most {most}", param)


def no_files(sampler: registry.Spec) -> None:
    """Errors: a parameter that names a file. What a client names is never opened."""
    for method in registry.parse(sampler):
        hints = get_type_hints(type(method))
        for member in fields(method):
            if Path in get_args(hints[member.name]) and isinstance(getattr(method, member.name), str | Path):
                raise ApiError(
                    400, "unsupported", f"sampler {method.name!r}: {member.name} names a file, and a server opens none "
                    "for its clients", "sampler",
                )  # fmt: skip


def masked(backend: Backend, field: str) -> Model:
    """The masked-diffusion model. Errors: the text is another one's."""
    if backend.model is None:
        raise ApiError(
            400, "unsupported", f"{field} is for masked-diffusion models; this server drafts for another one", field
        )
    return backend.model


def holed(model: Model, prompt: str | list[int], suffix: str, columns: int | None) -> list[int]:
    """The ids of a prompt, masks for its answer, and the suffix. Errors: no room for them."""
    before = encode(model, prompt, False) if isinstance(prompt, str) else list(prompt)
    behind = encode(model, suffix, False)
    room = model.max_positions - len(before) - len(behind)
    return before + [mask_of(model)] * (min(MAX_NEW_TOKENS, max(room, 1)) if columns is None else columns) + behind


def spoken(backend: Backend, ids: list[int]) -> str:
    """The text of a prompt that came as ids."""
    if backend.tokenizer is None:
        raise DllmError("this model has no tokenizer: leave echo out")
    check_ids(ids, len(backend.tokenizer), "the prompt")
    return str(backend.tokenizer.decode(ids))
