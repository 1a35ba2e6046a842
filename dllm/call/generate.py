"""The front door: `generate` and `stream`. Prompts in, outputs out."""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch

from dllm.call.arguments import Arguments, DecodingArguments
from dllm.call.job import MAX_NEW_TOKENS, Job, ModelLike, prepare, resolve_model
from dllm.call.output import Event, News, Output
from dllm.call.prompts import Ids, One, Prompt, Several, joined, prompt_ids
from dllm.call.steering import StepView, Streamer, ending
from dllm.decoding.graphs import usable
from dllm.decoding.logprobs import TokenLogprob
from dllm.decoding.meter import Meter, Ticket, Watch
from dllm.decoding.recording import record
from dllm.decoding.runner import Tick
from dllm.decoding.trace import BLANK
from dllm.errors import DllmError
from dllm.models.model import Model, OwnDecoder


class CallArguments(DecodingArguments, total=False):
    """Those of `generate` and `stream`: a prompt may come as transformers' `generate` takes it."""

    input_ids: Ids | None
    attention_mask: Ids | None
    streamer: Streamer | None


@overload
def generate(
    model: ModelLike = None, prompt: One | None = None, *, n: Literal[1] = 1, **arguments: Unpack[DecodingArguments]
) -> Output: ...
@overload
def generate(
    model: ModelLike, prompt: Several, *, n: int = 1, **arguments: Unpack[DecodingArguments]
) -> list[Output]: ...
@overload
def generate(
    model: ModelLike = None, prompt: Prompt | None = None, *, n: int = 1, **arguments: Unpack[CallArguments]
) -> Output | list[Output]: ...
def generate(
    model: ModelLike = None, prompt: Prompt | None = None, *, n: int = 1, **arguments: Unpack[CallArguments]
) -> Output | list[Output]:
    """Decode one prompt or a list of prompts.

    model: a loaded `Model`, a folder, a hub id, or None for the embedded model. prompt: text, ids, chat messages, a
    list of any one of these (a ragged batch), or what a tokenizer returns, padded on either side; None generates
    unconditionally. input_ids (B, L) or (L,) and attention_mask (the same shape; 0 is padding) are another way to
    give ids. n: answers per prompt. Further arguments: see `Arguments`.

    streamer: a streamer of transformers for one answer; it gets the prompt, the ids of each stretch of text that
    becomes final, and its end, whatever happens (docs/steering.md).

    Returns one `Output` for one prompt, a list for a list, a tensor of two dimensions and n > 1 (prompt by prompt).
    Request i uses seed + i, so a row is the same alone and in a batch (docs/decoding.md says in which precision).
    Errors: `DllmError`, one line.
    """
    streamer = arguments.pop("streamer", None)
    with ending(streamer):
        call = _events(model, prompt, n, arguments, live=streamer is not None)
        events = call.events if streamer is None else _put(call, streamer)
        outputs = {event.request: event.output for event in events if event.output is not None}
    return answers(outputs, call.single)


def answers(outputs: Mapping[int, Output], single: bool) -> Output | list[Output]:
    """What a call returns that got these outputs, by request. `single`: it had one prompt, and no list of them."""
    calls = max(output.calls for output in outputs.values())  # of the whole call: those of the last to finish
    found = [dataclasses.replace(outputs[i], calls=calls) for i in sorted(outputs)]
    return found[0] if single else found


def _put(call: Call, streamer: Streamer) -> Iterator[Event]:
    """The events of a call, told to a streamer as they come. Errors: more than one answer."""
    if len(call.prompts) > 1:
        raise DllmError(f"streamer= follows one answer, and this call has {len(call.prompts)}: one prompt, with n=1")
    streamer.put(torch.tensor(call.prompts))
    for event in call.events:
        if event.tokens:
            streamer.put(torch.tensor(event.tokens))
        yield event


def stream(
    model: ModelLike = None,
    prompt: Prompt | None = None,
    *,
    drafts: bool = False,
    n: int = 1,
    **arguments: Unpack[CallArguments],
) -> Iterator[Event]:
    """Decode and yield an `Event` whenever more text is final (or, with drafts, after every forward).

    The pieces of a prompt join to its `output.text`. Arguments and errors are those of `generate`; mistakes are raised
    by the call itself.
    """
    if arguments.pop("streamer", None) is not None:
        raise DllmError("streamer= belongs to dllm.generate; dllm.stream yields the text itself")
    return _events(model, prompt, n, arguments, drafts, live=True).events


class Call(NamedTuple):
    """A call under way."""

    events: Iterator[Event]
    single: bool  # it had one prompt, and no list of them
    prompts: list[list[int]]  # of each answer


def _events(
    model: ModelLike, prompt: Prompt | None, n: int, arguments: CallArguments, drafts: bool = False, live: bool = False
) -> Call:
    """What a call yields; `live`: in between, too, not only at the ends of its rows."""
    prompt = joined(prompt, arguments.pop("input_ids", None), arguments.pop("attention_mask", None))
    model, given = resolve_model(model), {"n": n, **arguments}
    if model.own_decoder is None:
        job = prepare(model, prompt, given)
        return Call(_decoded(job, drafts, live), job.single, job.prompts)
    outputs, single = _own(model, model.own_decoder, prompt, given)
    events = (Event(i, o.text, "" if drafts else None, o.nfe, o, o.tokens) for i, o in enumerate(outputs))
    return Call(events, single, [o.sequences[: len(o.sequences) - len(o.tokens)] for o in outputs])


def _decoded(job: Job, drafts: bool, live: bool) -> Iterator[Event]:
    told = Told(job, drafts, live)
    ticks = job.ticks(told.meter) if told.open else ()
    decoded = (news for tick in ticks for news in told.news(tick, range(len(tick.rows))))
    for news in chain(told.blank(), decoded):
        if (event := news.read()) is not None:
            yield event


class Told:
    """What the observers of a call are told while its rows are decoded. `live`: in between, too, not only at their
    ends. watch: is told of their forwards."""

    def __init__(self, job: Job, drafts: bool = False, live: bool = True, watch: Watch | None = None) -> None:
        self.job, self.drafts, self.live = job, drafts, live
        self.meter, self.traces = Meter(len(job.prompts), watch), job.new_traces()
        self.start = job.queue.canvas.cpu()
        self.before = self.start.ids.tolist() if self.traces else []
        self.followed = [Followed(job, ticket) for ticket in self.meter.rows]
        self.watched = job.args.on_step is not None or (bool(job.criteria.criteria) and job.args.early_stop)

    @property
    def open(self) -> bool:
        """Whether there is anything to decode; max_new_tokens=0 leaves nothing."""
        return bool(self.start.masked.any())

    def blank(self) -> Iterator[News]:
        """The answers where nothing is to be decoded: the prompts come back as they are."""
        for row in () if self.open else self.meter.rows:
            output = self.job.output(row, self.start, row.index, noted=self.job.noted(self.job.queue, row.index))
            yield News(row.index, partial(self.last, self.followed[row.index], output), output)

    def again(self, rows: Iterable[int]) -> None:
        """These rows begin anew. What was told of their text stands, as they come to the same; a trace begins anew."""
        traces, ids = self.job.new_traces(), self.start.ids.tolist()
        for row in rows:
            self.meter.rows[row].again()
            if traces:
                self.traces[row], self.before[row] = traces[row], ids[row]

    def news(self, tick: Tick, rows: Sequence[int]) -> Iterator[News]:
        """Of rows of this call in a tick, which rows of others may share, by their places in it."""
        job = self.job
        for row in rows:
            ticket = tick.request[row]
            ticket.answered()
            if self.traces and not ticket.halted:
                record(self.traces[ticket.index], tick, row, self.before[ticket.index])
        for row in rows:
            done, followed = bool(tick.facts[row].done), self.followed[tick.request[row].index]
            if followed.ticket.halted or not (self.live or self.watched or done):
                continue
            halted, most = followed.halted(tick, row)
            if halted:
                followed.ticket.halt()
            if halted or done:
                noted, trace = job.noted(tick.state, tick.rows[row]), self.traces.get(followed.request)
                output = job.output(followed.ticket, tick.canvas, row, trace, noted, most)
                yield News(followed.request, partial(self.last, followed, output), output)
            elif self.live and (final := followed.final(tick, row, self.drafts)):
                yield News(followed.request, partial(followed.event, final))

    def last(self, followed: Followed, output: Output) -> Event:
        """The last event of a row. Whoever reads it may have asked for drafts after the row had ended."""
        return followed.last(output, self.drafts)


class Final(NamedTuple):
    """What a step made final in a row's text, on the host."""

    ids: list[int]
    own: list[int]  # places in the text of those that the answer's tokens are: an infilled one has others
    said: list[TokenLogprob | None] | None  # of these, where the call asked
    behind: list[int] | None  # ids that may still change; None: nobody asks for drafts
    nfe: int


@dataclass
class Followed:
    """A row while it is decoded. What becomes final is noted at once, and made an event by whoever follows the row."""

    job: Job
    ticket: Ticket
    settled: int = 0  # ids that were final when it was looked at last
    asked: int = 0  # ids about which the criteria were asked
    most: int | None = None  # ids that stand where one of them holds first
    # of those who follow
    ids: list[int] = field(default_factory=list)  # of its text so far
    own: list[int] = field(default_factory=list)  # places of its tokens in these
    said: list[TokenLogprob | None] = field(default_factory=list)  # of these tokens
    sent: str = ""  # its text in the events so far
    reached: int = 0  # ids that write it
    told: int = 0  # tokens among them

    @property
    def request(self) -> int:
        """Which of the call."""
        return self.ticket.index

    def halted(self, tick: Tick, row: int) -> tuple[bool, int | None]:
        """Whether a row that goes on is ended from outside; and how many ids stand where a criterion first holds."""
        job, done = self.job, bool(tick.facts[row].done)
        stop = job.args.on_step is not None and bool(job.args.on_step(self.view(tick, row)))
        if job.criteria.criteria and self.most is None:
            ids = job.written(self.request, tick.canvas, row) if done else self.first(tick, row, self.closed(tick, row))
            cut = job.stops.cut(ids)
            ids = ids[: cut.through - 1] if cut.stopped else ids
            self.most = job.criteria.first(job.prompts[self.request], ids, self.asked)
            self.asked = max(self.asked, len(ids))
        ends = stop or (self.most is not None and job.args.early_stop)
        return ends and not done, self.most

    def view(self, tick: Tick, row: int) -> StepView:
        """The row after this step, as a callback sees it."""
        f, was, end = tick.facts[row], tick.before[row], self.length(tick, row)
        ids, masked = (tuple(leaf[row, :end].tolist()) for leaf in (tick.canvas.ids, tick.canvas.masked))
        return StepView(self.request, f.step, self.ticket.nfe, ids, masked, f.start, (was.lo, was.hi))

    def length(self, tick: Tick, row: int) -> int:
        """Columns of its prompt and its text."""
        return tick.facts[row].length - self.job.tails[self.request]

    def closed(self, tick: Tick, row: int) -> int:
        """How many ids of its text change no more; what a sampler may revise is not among them."""
        begin = self.job.begin(self.request)
        end = min(tick.ends[row], self.length(tick, row))
        if self.job.sampler.needs.revises:
            end = min(end, max(begin, tick.before[row].lo))
        return max(0, end - begin)

    def first(self, tick: Tick, row: int, count: int) -> list[int]:
        """The first so many ids of its text."""
        begin = self.job.begin(self.request)
        return tick.canvas.ids[row, begin : begin + count].tolist()

    def final(self, tick: Tick, row: int, drafts: bool) -> Final | None:
        """What this step made final; None where nobody has to be told."""
        job, begin, lo = self.job, self.job.begin(self.request), self.settled
        hi = self.closed(tick, row) if self.most is None else self.most
        hi = max(lo, hi)  # a row that began anew comes to the same
        if lo == hi and not drafts:
            return None
        ids, columns = tick.canvas.ids[row], job.columns(self.request, tick.canvas, row, lo, hi)
        noted = job.noted(tick.state, tick.rows[row])
        said = None if noted is None else noted.said(columns)
        behind = ids[begin + hi : self.length(tick, row)].tolist() if drafts else None
        self.settled = hi
        return Final(ids[begin + lo : begin + hi].tolist(), [c - begin for c in columns], said, behind, self.ticket.nfe)

    def event(self, final: Final) -> Event | None:
        """The next piece of its text; None where nobody has to be told."""
        stops, end = self.job.stops, self.told
        self.ids += final.ids
        self.own += final.own
        self.said += final.said or ()
        text = stops.settled(self.ids)
        new = text[len(self.sent) :]
        if new:
            self.reached = stops.reach(self.ids, len(text), least=self.reached)
            end = bisect_left(self.own, self.reached)
        elif final.behind is None:
            return None
        draft = None if final.behind is None else self.draft(len(text), final.behind)
        tokens = [self.ids[i] for i in self.own[self.told : end]]
        said = None if final.said is None else self.said[self.told : end]
        self.sent, self.told = text, end
        return Event(self.request, new, draft, final.nfe, None, tokens, said)

    def draft(self, known: int, behind: list[int]) -> str:
        """What is written behind so many characters of its text, and may still change."""
        stops, mask = self.job.stops, self.job.queue.canvas.mask_id
        if stops.ended(self.ids):
            return ""
        return stops.decode(self.ids)[known:] + "".join(BLANK if t == mask else stops.decode([t]) for t in behind)

    def last(self, output: Output, drafts: bool) -> Event:
        """The last event of a request."""
        text, rest = output.text[len(self.sent) :], output.logprobs and output.logprobs[self.told :]
        return Event(self.request, text, "" if drafts else None, output.nfe, output, output.tokens[self.told :], rest)


# -- a model that decodes itself (`Model.own_decoder`): one prompt at a time, by no sampler of ours --------------------

_TAKEN = {"sampler", "max_new_tokens", "seed", "n", "chat", "batch_size", "graphs"}


def _own(model: Model, decoder: OwnDecoder, prompt: object, given: Mapping[str, Any]) -> tuple[list[Output], bool]:
    """The answers, and whether the call had a single prompt. Errors: arguments that the decoder cannot honour."""
    args = Arguments.parse(given)
    for name, value in args.given().items():
        if name not in _TAKEN:
            raise DllmError(f"{name}={value!r} does not apply to DiffusionGemma, which decodes itself; leave it out")
    usable(model, args.graphs)  # refuses them
    options = decoder.options(args.sampler)
    prompts, single = prompt_ids(model, prompt, args.chat, args.n)
    new = MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    outputs: list[Output] = []
    for seed, ids in enumerate(prompts, args.seed):
        began = time.perf_counter()
        done = decoder.decode(ids, new, seed, options)
        output = Output(
            text="" if model.tokenizer is None else model.tokenizer.decode(done.tokens, skip_special_tokens=True),
            sequences=ids + done.tokens,
            tokens=done.tokens,
            nfe=done.nfe,
            calls=done.nfe + sum(output.nfe for output in outputs),  # of the call so far
            finish_reason="stop" if done.stopped else "length",
            seconds=time.perf_counter() - began,
            prefill_seconds=0.0,
            positions=done.nfe * (model.block_size or 0),
            canvas_length=len(ids) + new,
            decoded=len(done.tokens),
            sampler="native",
            cache="native",
            seed=seed,
        )
        outputs.append(output)
    return outputs, single
