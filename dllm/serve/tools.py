"""Tools: what a request offers, how an answer is bound to a call, and how calls are found in what a model writes.

A call is a JSON object with `name` and `arguments`, between the markers that the chat template knows. Models whose
template knows none can still be bound to one (`tool_choice="required"`, or a function).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from dllm.decoding.stopping import special_tokens
from dllm.models.tokenizer import Tokenizer
from dllm.serve.errors import ApiError
from dllm.spec import Json

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # of Qwen's templates, which Dream, SDAR and Fast-dLLM have
THINK, THOUGHT = "<think>", "</think>"
MOST = 128  # functions of a request, as at OpenAI
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([\w-]+)"\s*,\s*"arguments"\s*:\s*(?=\S)', re.A)  # of a call
Kind: TypeAlias = Literal["content", "reasoning", "call", "arguments"]


class Template(NamedTuple):
    """What a chat template knows of tools."""

    tools: bool  # it tells the model of them
    calls: bool  # and has markers for calls

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> Template:
        """That of a tokenizer."""
        text = str(getattr(tokenizer, "chat_template", None) or "")  # foreign
        tools = re.search(r"\btools\b", text) is not None
        return cls(tools, tools and OPEN in text)


@dataclass(frozen=True)
class Tools:
    """What an answer may call, or must."""

    functions: dict[str, Mapping[str, object]]  # the schema of each one's arguments
    given: Sequence[Mapping[str, object]]  # as the template takes them
    bound: bool  # the answer is one call
    parallel: bool
    template: Template

    @property
    def schema(self) -> Json:
        """That of a call, for an answer that is bound to one."""
        each = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
                "required": ["name", "arguments"],
            }
            for name in self.functions
        ]
        defs = {name: _moved(schema, f"#/$defs/{name}") for name, schema in self.functions.items()}
        return {**(each[0] if len(each) == 1 else {"anyOf": each}), "$defs": defs}

    @property
    def opening(self) -> str:
        """What stands in front of a call that an answer is bound to."""
        return f"{OPEN}\n" if self.bound and self.template.calls else ""


def _moved(schema: object, root: str) -> object:
    """A schema whose references to itself lead to where it stands now."""
    if isinstance(schema, Mapping):
        return {
            key: root + item[1:]
            if key == "$ref" and isinstance(item, str) and item.startswith("#")
            else _moved(item, root)
            for key, item in schema.items()
        }
    return [_moved(item, root) for item in schema] if isinstance(schema, list) else schema


def offered(given: object, choice: object, parallel: bool, tokenizer: Tokenizer | None) -> Tools | None:
    """The tools of a request; None: it has none. Errors: functions and choices that are none, a model that cannot."""
    if not given:
        if choice not in (None, "none", "auto"):
            raise _wrong("tool_choice asks for a call, and there are no tools", "tool_choice")
        return None
    if not isinstance(given, list) or len(given) > MOST:
        raise _wrong(f"tools is a list of at most {MOST} functions", "tools")
    functions = dict(_function(tool, f"tools[{i}]") for i, tool in enumerate(given))
    if len(functions) < len(given):
        raise _wrong("two tools have one name", "tools")
    template = Template.of(tokenizer)
    match choice:
        case "none":
            return None
        case None | "auto":
            if not template.calls:
                raise ApiError(
                    400, "unsupported", "the chat template of this model knows no tool calls: bind the answer to one "
                    "(tool_choice='required', or a function), or pass tool_choice='none'", "tool_choice",
                )  # fmt: skip
            return Tools(functions, given, False, parallel, template)
        case "required":
            return Tools(functions, given, True, parallel, template)
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in functions:
                raise _wrong(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
            return Tools({name: functions[name]}, given, True, parallel, template)
    raise _wrong("tool_choice is none, auto, required, or one function", "tool_choice")


def _function(tool: object, where: str) -> tuple[str, Mapping[str, object]]:
    match tool:
        case {"type": "function", "function": {"name": str(name), **said}} if re.fullmatch(r"[\w-]{1,64}", name, re.A):
            schema: object = said.get("parameters") or {"type": "object", "properties": {}}
            if isinstance(schema, Mapping):
                return name, schema
    raise _wrong(
        f"{where} is a function with a name of letters, digits, _ and -, and parameters as a JSON schema", "tools"
    )


def _wrong(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_value", message, param)


class Piece(NamedTuple):
    """A stretch of an answer: text, the function of a call, or what comes next of its arguments."""

    kind: Kind
    text: str


@dataclass
class Splitter:
    """Text goes in as it comes, pieces come out: however it is cut, they join to the same.

    What may be the beginning of a marker is held back, and so is a call until it is whole: only its end shows that it
    is one. Where the answer is bound to a call, and nothing may cut it, its arguments come as they become final.
    """

    tools: Tools | None
    thinks: bool
    cut: bool = False  # whether a stop string may end the answer
    kind: Kind = "content"
    held: str = ""
    calls: int = 0

    def __post_init__(self) -> None:
        if self.tools is not None and self.tools.bound:
            self.kind = "call"

    @classmethod
    def of(cls, tools: Tools | None, tokenizer: Tokenizer | None, cut: bool = False) -> Splitter | None:
        """That of a request; None where there is nothing to split."""
        thinks = tokenizer is not None and {THINK, THOUGHT} <= tokenizer.get_vocab().keys()
        return cls(tools, thinks, cut) if thinks or tools is not None else None

    @property
    def markers(self) -> dict[str, Kind]:
        """What ends the stretch, and what comes then."""
        if self.tools is not None and self.tools.bound:
            return {}
        if self.kind == "reasoning":
            return {THOUGHT: "content"}
        if self.kind == "call":
            return {CLOSE: "content"}
        found: dict[str, Kind] = {THINK: "reasoning"} if self.thinks else {}
        return found | ({OPEN: "call"} if self.tools is not None else {})

    def feed(self, text: str, end: bool) -> Iterator[Piece]:
        """What is certain now; with `end` all that is left."""
        self.held += text
        if self.tools is not None and self.tools.bound and not self.cut:
            yield from self._bound(end)
            return
        while hits := [(at, marker) for marker in self.markers if (at := self.held.find(marker)) >= 0]:
            at, marker = min(hits)
            stretch, after = self.held[:at], self.markers[marker]
            yield from self._said(stretch, marker)
            self.kind, self.held = after, self.held[at + len(marker) :]
        if end:
            rest, self.held = self.held, ""
            yield from self._said(rest, "")
        elif self.kind != "call":
            size = len(self.held) - max((_overlap(self.held, marker) for marker in self.markers), default=0)
            rest, self.held = self.held[:size], self.held[size:]
            yield from self._said(rest, "")

    def _bound(self, end: bool) -> Iterator[Piece]:
        """What is certain of a call that is the whole answer."""
        if not self.calls and (head := HEAD.match(self.held)) is not None:
            self.calls, self.held = 1, self.held[head.end() :]
            yield Piece("call", head[1])
        if self.calls:
            held, whole = self.held, self.held.rstrip().removesuffix("}")  # the last } is the call's
            firm = whole.rstrip() if end else held[: len(held.rstrip("} \n"))]
            self.held = held[len(firm) :]
            if firm:
                yield Piece("arguments", firm)
        elif end and self.held:
            yield Piece("content", self.held)

    def _said(self, text: str, marker: str) -> Iterator[Piece]:
        if self.kind != "call":
            if text:
                yield Piece(self.kind, text)
            return
        assert self.tools is not None
        call = _call(text, self.tools)
        if call is None:  # the model wrote something else there
            opening = "" if self.tools.bound else OPEN
            yield Piece("content", f"{opening}{text}{marker}")
        elif self.tools.parallel or not self.calls:
            self.calls += 1
            yield from call


def _call(text: str, tools: Tools) -> tuple[Piece, Piece] | None:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match said:
        case {"name": str(name), "arguments": dict(arguments)} if name in tools.functions:
            return Piece("call", name), Piece("arguments", json.dumps(arguments, ensure_ascii=False))
    return None


def _overlap(text: str, marker: str) -> int:
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def hidden(tokenizer: Tokenizer | None) -> bool:
    """Whether markers are tokens that a text without special tokens lacks."""
    return bool({OPEN, CLOSE, THINK, THOUGHT} & special_tokens(tokenizer))


@dataclass
class Message:
    """The deltas of a chat's answer, out of pieces, and the message that they add up to."""

    content: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)

    def deltas(self, piece: Piece) -> Iterator[Json]:
        """Those of a piece."""
        if piece.kind == "content":
            self.content += piece.text
            yield {"content": piece.text}
        elif piece.kind == "reasoning":
            self.reasoning += piece.text
            yield {"reasoning_content": piece.text}
        elif piece.kind == "call":
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
            self.calls.append({**call, "function": {"name": piece.text, "arguments": ""}})
            function = {"name": piece.text, "arguments": ""}
            yield {"tool_calls": [{"index": len(self.calls) - 1, **call, "function": function}]}
        else:
            self.calls[-1]["function"]["arguments"] += piece.text
            yield {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": piece.text}}]}

    @property
    def whole(self) -> Json:
        """The message."""
        said: Json = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            said["reasoning_content"] = self.reasoning
        return {**said, "content": self.content or None, "tool_calls": self.calls} if self.calls else said
