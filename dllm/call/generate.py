"""The front door: `generate` and `stream`. Prompts in, outputs out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch

from dllm.call.arguments import Arguments, DecodingArguments
from dllm.call.job import MAX_NEW_TOKENS, Job, ModelLike, prepare, resolve_model
from dllm.call.output import Event, Output
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
    yield from told.blank()
    for tick in job.ticks(told.meter) if told.open else ():
        yield from told.events(tick)


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

    def blank(self) -> Iterator[Event]:
        """The answers where nothing is to be decoded: the prompts come back as they are."""
        for row in () if self.open else self.meter.rows:
            output = self.job.output(row, self.start, row.index, noted=self.job.noted(self.job.queue, row.index))
            yield Event(row.index, output.text, None, 0, output, output.tokens, output.logprobs)

    def again(self, rows: Iterable[int]) -> None:
        """These rows begin anew. What was told of their text stands, as they come to the same; a trace begins anew."""
        traces, ids = self.job.new_traces(), self.start.ids.tolist()
        for row in rows:
            self.meter.rows[row].again()
            if traces:
                self.traces[row], self.before[row] = traces[row], ids[row]

    def events(self, tick: Tick) -> Iterator[Event]:
        """Those of this call's rows in a tick that rows of others may share."""
        job, own = self.job, [r for r, ticket in enumerate(tick.request) if ticket.call is self.meter]
        for row in own:
            ticket = tick.request[row]
            ticket.answered()
            if self.traces and not ticket.halted:
                record(self.traces[ticket.index], tick, row, self.before[ticket.index])
        for row in own:
            done, followed = bool(tick.facts[row].done), self.followed[tick.request[row].index]
            if followed.ticket.halted or not (self.live or self.watched or done):
                continue
            halted, most = followed.halted(tick, row)
            if halted:
                followed.ticket.halt()
            if halted or done:
                noted, trace = job.noted(tick.state, tick.rows[row]), self.traces.get(followed.request)
                yield followed.last(job.output(followed.ticket, tick.canvas, row, trace, noted, most), self.drafts)
            elif self.live and (event := followed.event(tick, row, self.drafts)):
                yield event


@dataclass
class Followed:
    """What was told of a row while it is decoded."""

    job: Job
    ticket: Ticket
    sent: str = ""  # its final text so far
    told: int = 0  # its tokens in that
    reached: int = 0  # ids that write it
    settled: int = 0  # ids that were final when it was looked at last
    asked: int = 0  # ids about which the criteria were asked

    @property
    def request(self) -> int:
        """Which of the call."""
        return self.ticket.index

    def halted(self, tick: Tick, row: int) -> tuple[bool, int | None]:
        """Whether a row that goes on is ended from outside; and how many ids stand where a criterion first holds."""
        job, done = self.job, bool(tick.facts[row].done)
        stop = job.args.on_step is not None and bool(job.args.on_step(self.view(tick, row)))
        if not (job.criteria.criteria and (done or job.args.early_stop)):
            return stop and not done, None
        ids = job.written(self.request, tick.canvas, row) if done else self.ids(tick, row, self.closed(tick, row))
        cut = job.stops.cut(ids)
        ids = ids[: cut.through - 1] if cut.stopped else ids
        most = job.criteria.first(job.prompts[self.request], ids, self.asked)
        self.asked = max(self.asked, len(ids))
        return (stop or most is not None) and not done, most

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

    def ids(self, tick: Tick, row: int, count: int) -> list[int]:
        """The first so many ids of its text."""
        begin = self.job.begin(self.request)
        return tick.canvas.ids[row, begin : begin + count].tolist()

    def event(self, tick: Tick, row: int, drafts: bool) -> Event | None:
        """What became final in this step; None where nobody has to be told."""
        job, count = self.job, self.closed(tick, row)
        if count == self.settled and not drafts:
            return None
        closed, self.settled = self.ids(tick, row, count), count
        final = job.stops.settled(closed)
        text, columns = final[len(self.sent) :], list[int]()
        said: list[TokenLogprob | None] | None = None if job.args.logprobs is None else []
        if text:
            self.reached = job.stops.reach(closed, len(final), least=self.reached)
            columns = job.columns(self.request, tick.canvas, row, self.reached)[self.told :]
            noted = job.noted(tick.state, tick.rows[row])
            said = said if noted is None else noted.said(columns)
        elif not drafts:
            return None
        self.sent, self.told = self.sent + text, self.told + len(columns)
        tokens, draft = tick.canvas.ids[row, columns].tolist(), self.draft(tick, row, closed) if drafts else None
        return Event(self.request, text, draft, self.ticket.nfe, None, tokens, said)

    def draft(self, tick: Tick, row: int, closed: list[int]) -> str:
        """What is written behind the final text, and may still change."""
        job, end = self.job, self.job.begin(self.request) + len(closed)
        if job.stops.ended(closed):
            return ""
        ids = tick.canvas.ids[row, end : self.length(tick, row)].tolist()
        behind = "".join(BLANK if t == tick.canvas.mask_id else job.stops.decode([t]) for t in ids)
        return job.stops.decode(closed)[len(self.sent) :] + behind

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
