"""Answers in OpenAI's shapes: whole objects and chunks, log-probabilities, usage, and what `dllm` adds to them."""

from __future__ import annotations

import itertools
import secrets
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

from dllm.call.output import Event, Output
from dllm.decoding.logprobs import TokenLogprob
from dllm.decoding.stopping import UNFINISHED
from dllm.models.tokenizer import Detokenizer, Tokenizer
from dllm.serve.backend import Backend, Pending
from dllm.serve.requests import Asked
from dllm.serve.tools import Message, Piece, Splitter, hidden
from dllm.spec import Json

LEAST = -9999.0  # a logarithm: JSON has no infinity
Said: TypeAlias = Sequence[tuple[int, TokenLogprob | None]]  # tokens, with what the model said of them


@dataclass
class Choice:
    """One answer as it becomes final: the events of its row go in, pieces of text come out.

    However the events cut an answer, its pieces join to the same text.
    """

    asked: Asked
    index: int
    tokenizer: Tokenizer | None
    echo: str = ""
    splitter: Splitter | None = None
    message: Message = field(default_factory=Message)
    count: int = 0  # of its tokens
    waiting: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)  # tokens whose text is held back
    before: Sequence[int] = ()  # the prompt's ids in front of a hole
    heard: int = 0  # characters of the engine's text
    sent: int = 0  # characters of the text, where it is that of the ids
    offset: int = 0  # where the next token's text begins, where log-probabilities are asked for
    output: Output | None = None
    times: list[tuple[float, int]] = field(default_factory=list)  # seconds, and tokens that were final then
    shown: Detokenizer | None = field(init=False, default=None)  # where its text is not the engine's: that of its ids
    plain: Detokenizer | None = field(init=False, default=None)  # and the engine's
    ends: frozenset[int | None] = field(init=False, default=frozenset())  # tokens that are never shown

    def __post_init__(self) -> None:
        self.offset, holes = len(self.echo), self.asked.holes
        if self.tokenizer is not None and (holes or (self.splitter is not None and hidden(self.tokenizer))):
            self.shown, self.plain = Detokenizer(self.tokenizer, special=not holes), Detokenizer(self.tokenizer)
            self.plain.feed(self.before)
            ends = [getattr(self.tokenizer, f"{name}_token_id", None) for name in ("eos", "pad")]  # foreign
            self.ends = frozenset() if holes else frozenset(ends)

    def feed(self, event: Event, seconds: float) -> tuple[list[Json | str], Said]:
        """What an event adds, deltas of a chat's message or text, and its tokens."""
        self.waiting += zip(event.tokens, event.logprobs or [None] * len(event.tokens), strict=True)
        self.count += len(event.tokens)
        self.output = event.output or self.output
        if event.text:
            self.times.append((seconds, self.count))
        new, end = self._new(self._text(event), event.output is not None), event.output is not None
        if not new and not end:
            return [], []
        said, self.waiting = self.waiting, []
        return new, said

    def _new(self, text: str, end: bool) -> list[Json | str]:
        if not self.asked.chat:
            return [text] if text else []
        plain = [Piece("content", text)] if text else []
        pieces = plain if self.splitter is None else self.splitter.feed(text, end)
        return [delta for piece in pieces for delta in self.message.deltas(piece)]

    def _text(self, event: Event) -> str:
        """What is new of the text. It is that of the ids where the engine's own has more than the answer, or less: the
        prompt around a hole, markers that are special tokens. What the engine's lacks of a last token, which a stop
        string begins in or bytes leave unfinished, it lacks as well."""
        self.heard += len(event.text)
        if self.shown is None or self.plain is None:
            return event.text
        text = self.shown.feed(token for token in event.tokens if token not in self.ends)
        firm = text[: max(0, len(text) - max(0, len(self.plain.feed(event.tokens)) - self.heard))]
        new, self.sent = firm[self.sent :], max(self.sent, len(firm))
        return new

    @property
    def reason(self) -> str:
        """Why it ended."""
        assert self.output is not None
        if self.message.calls:
            return "tool_calls"
        return "stop" if self.output.finish_reason == "stop" else "length"


class Reply:
    """The answer to one HTTP request."""

    def __init__(self, asked: Asked, model: str, fingerprint: str, backend: Backend) -> None:
        self.asked, self.model, self.fingerprint, self.tokenizer = asked, model, fingerprint, backend.tokenizer
        self.mask = None if backend.model is None else backend.model.mask_id
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def choices(self, prompts: Sequence[list[int]]) -> list[Choice]:
        """Nothing is written yet: a choice for each prompt of a request under way."""
        asked, echoes = self.asked, self.asked.echoes
        return [
            Choice(
                asked,
                row,
                self.tokenizer,
                "" if echoes is None else echoes[row // asked.n],
                Splitter.of(asked.tools, self.tokenizer, "stop" in asked.arguments) if asked.chat else None,
                before=tuple(itertools.takewhile(lambda token: token != self.mask, ids)) if asked.holes else (),
            )
            for row, ids in enumerate(prompts)
        ]

    # -- whole --------------------------------------------------------------------------------------------------------

    def answered(self, pending: Pending, events: Iterable[tuple[Event, float]]) -> tuple[Json, list[Choice]]:
        """The object of an answer whose events have all come, each with its seconds, and its choices."""
        choices = self.choices(pending.prompts)
        said: list[tuple[list[Json | str], Said]] = [([], ())] * len(choices)
        for event, seconds in events:
            (before, tokens), (new, more) = said[event.request], choices[event.request].feed(event, seconds)
            said[event.request] = [*before, *new], [*tokens, *more]
        return self.whole(pending, choices, said), choices

    def whole(self, pending: Pending, choices: Sequence[Choice], said: Sequence[tuple[list[Json | str], Said]]) -> Json:
        """The object of an answer that was not streamed."""
        kind = "chat.completion" if self.asked.chat else "text_completion"
        answers = [
            self._whole(choice, new, tokens) | {"dllm": about(pending, choice, self.asked)}
            for choice, (new, tokens) in zip(choices, said, strict=True)
        ]
        return {**self._head(kind), "choices": answers, "usage": self.usage(pending, choices)}

    def _whole(self, choice: Choice, new: Sequence[Json | str], said: Said) -> Json:
        logprobs = self._logprobs(choice, said) if self.asked.logprobs else None
        end = {"index": choice.index, "logprobs": logprobs, "finish_reason": choice.reason}
        if not self.asked.chat:
            return {**end, "text": choice.echo + "".join(map(str, new))}
        return {**end, "message": choice.message.whole}

    # -- chunks -------------------------------------------------------------------------------------------------------

    def opening(self, choice: Choice) -> Json | None:
        """The first chunk of a choice."""
        if self.asked.chat:
            return self._chunk([self._part(choice, {"role": "assistant", "content": ""})])
        return self._chunk([self._part(choice, choice.echo)]) if choice.echo else None

    def chunks(
        self, pending: Pending, choice: Choice, new: Sequence[Json | str], said: Said, seconds: float, nfe: int
    ) -> Iterator[Json]:
        """What became final; the last one says how the choice ended."""
        logprobs = self._logprobs(choice, said) if self.asked.logprobs and said else None
        first, *others = new or [{} if self.asked.chat else ""]
        parts = [self._part(choice, first, logprobs), *(self._part(choice, other) for other in others)]
        if choice.output is not None:
            parts[-1] |= {"finish_reason": choice.reason, "dllm": about(pending, choice, self.asked)}
        for part in parts:
            yield self._chunk([part]) | {"dllm": {"tokens": len(said), "step": nfe, "t": round(seconds, 6)}}
            said = ()

    def draft(self, choice: Choice, said: Json) -> Json:
        """What happens on a canvas: a chunk that adds no text."""
        return self._chunk([self._part(choice, {} if self.asked.chat else "")]) | {"dllm": said}

    def last(self, pending: Pending, choices: Sequence[Choice]) -> Json:
        """The chunk with the usage, behind all others."""
        timeline = times(pending, choices)
        return self._chunk([]) | {"usage": self.usage(pending, choices), "dllm": {"timeline": timeline}}

    def _part(self, choice: Choice, what: Json | str, logprobs: Json | None = None) -> Json:
        said = {"delta": what} if self.asked.chat else {"text": what}
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": None}

    def _chunk(self, parts: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return {**self._head(kind), "choices": parts, "usage": None}

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    # -- parts --------------------------------------------------------------------------------------------------------

    def usage(self, pending: Pending, choices: Sequence[Choice]) -> Json:
        """Tokens: of each prompt once, of answers up to their stop."""
        prompt = sum(token != self.mask for ids in pending.prompts[:: self.asked.n] for token in ids)
        answer = sum(len(choice.output.tokens) for choice in choices if choice.output is not None)
        cached = sum(ticket.cached for ticket in pending.tickets[:: self.asked.n])
        return {
            "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _logprobs(self, choice: Choice, said: Said) -> Json:
        return self._of_chat(said) if self.asked.chat else self._of_completion(choice, said)

    def piece(self, token: int) -> str:
        """The text of a token."""
        return str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))

    def _of_chat(self, said: Said) -> Json:
        def entry(token: int, logprob: float | None) -> Json:
            piece = self.piece(token)
            return {
                "token": piece,
                "logprob": None if logprob is None else max(logprob, LEAST),
                "bytes": None if UNFINISHED in piece else list(piece.encode()),
            }

        return {
            "content": [
                {
                    **entry(token, None if one is None else one.logprob),
                    "top_logprobs": [entry(*pair) for pair in (one.top if one else ())],
                    **({} if bound is None else {"dllm": {"constrained_logprob": max(bound, LEAST)}}),
                }
                for token, one, bound in ((token, one, None if one is None else one.constrained) for token, one in said)
            ],
            "refusal": None,
        }

    def _of_completion(self, choice: Choice, said: Said) -> Json:
        pieces = [self.piece(token) for token, _ in said]
        *offsets, choice.offset = itertools.accumulate(map(len, pieces), initial=choice.offset)
        top = [{self.piece(t): p for t, p in one.top} if one and one.top else None for _, one in said]
        return {
            "tokens": pieces,
            "token_logprobs": [one and max(one.logprob, LEAST) for _, one in said],
            "top_logprobs": top if self.asked.top else None,
            "text_offset": offsets,
        }


def about(pending: Pending, choice: Choice, asked: Asked) -> Json:
    """What the toolkit says of an answer."""
    output, ticket = choice.output, pending.tickets[choice.index]
    assert output is not None
    constraint = output.stats.get("constraint")
    said: Json = {
        "seed": output.seed,
        "nfe": output.nfe,
        "tokens_per_forward": output.tokens_per_forward,
        "nfe_equiv": output.nfe_equiv,
        "calls": output.calls,
        "sampler": output.sampler,
        "cache": output.cache,
        "block_length": pending.block_length,
        "canvas_length": output.canvas_length,
        "decoded": output.decoded,
        "finish": output.finish_reason,
        "queue_seconds": ticket.entered,
        "prefill_seconds": max(0.0, output.prefill_seconds - ticket.entered),
        "decode_seconds": max(0.0, output.decode_seconds),
        "lossless": output.lossless,
        "canonical": constraint["canonical"] if isinstance(constraint, dict) else None,
    }
    if asked.trace and output.trace is not None:
        trace = asdict(output.trace)
        trace["arguments"].pop("on_step", None)
        said["trace"] = trace
    return said


def times(pending: Pending, choices: Sequence[Choice]) -> Json:
    """When what came, in seconds from the request's admission: forwards, text, blocks of the canvas."""
    texts = sorted(seconds for choice in choices for seconds, _ in choice.times)
    blocks = list[float]()
    for choice in choices:
        before, done = 0.0, 0
        for seconds, tokens in choice.times:
            if tokens // pending.block_length > done:
                blocks.append(seconds - before)
                before, done = seconds, tokens // pending.block_length
    first = min((t.first for t in pending.tickets if t.first), default=None)
    return {
        "first_forward": first,
        "first_text": texts[0] if texts else None,
        "last_text": texts[-1] if texts else None,
        "chunks": len(texts),
        "blocks": len(blocks),
        "median_block_seconds": statistics.median(blocks) if blocks else None,
    }
