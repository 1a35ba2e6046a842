"""The front door: `generate` and `stream`. Prompts in, outputs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Unpack, overload

from dllm.call import own
from dllm.call.arguments import DecodingArguments
from dllm.call.job import Job, ModelLike, prepare, resolve_model
from dllm.call.output import Event, Output
from dllm.call.prompts import Ids, One, Prompt, Several, joined
from dllm.decoding.engine import Tick
from dllm.decoding.meter import Meter
from dllm.decoding.recording import record
from dllm.decoding.trace import BLANK


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
    model: ModelLike = None,
    prompt: Prompt | None = None,
    *,
    input_ids: Ids | None = None,
    attention_mask: Ids | None = None,
    n: int = 1,
    **arguments: Unpack[DecodingArguments],
) -> Output | list[Output]: ...
def generate(
    model: ModelLike = None,
    prompt: Prompt | None = None,
    *,
    input_ids: Ids | None = None,
    attention_mask: Ids | None = None,
    n: int = 1,
    **arguments: Unpack[DecodingArguments],
) -> Output | list[Output]:
    """Decode one prompt or a list of prompts.

    model: a loaded `Model`, a folder, a hub id, or None for the embedded model. prompt: text, ids, chat messages, a
    list of any one of these (a ragged batch), or what a tokenizer returns, padded on either side; None generates
    unconditionally. input_ids (B, L) or (L,) and attention_mask (the same shape; 0 is padding) are another way to
    give ids. n: answers per prompt. Further arguments: see `Arguments`.

    Returns one `Output` for one prompt, a list for a list, a tensor of two dimensions and n > 1 (prompt by prompt).
    Request i uses seed + i, so a row is the same alone and in a batch (docs/decoding.md says in which precision).
    Errors: `DllmError`, one line.
    """
    events, single = _events(model, joined(prompt, input_ids, attention_mask), {"n": n, **arguments})
    outputs = {event.request: event.output for event in events if event.output is not None}
    calls = max(output.calls for output in outputs.values())  # of the whole call: those of the last to finish
    answers = [dataclasses.replace(outputs[i], calls=calls) for i in sorted(outputs)]
    return answers[0] if single else answers


def stream(
    model: ModelLike = None,
    prompt: Prompt | None = None,
    *,
    input_ids: Ids | None = None,
    attention_mask: Ids | None = None,
    drafts: bool = False,
    n: int = 1,
    **arguments: Unpack[DecodingArguments],
) -> Iterator[Event]:
    """Decode and yield an `Event` whenever more text is final (or, with drafts, after every forward).

    The pieces of a prompt join to its `output.text`. Arguments and errors are those of `generate`; mistakes are raised
    by the call itself.
    """
    prompt = joined(prompt, input_ids, attention_mask)
    return _events(model, prompt, {"n": n, **arguments}, drafts, live=True)[0]


def _events(
    model: object, prompt: object, given: Mapping[str, Any], drafts: bool = False, live: bool = False
) -> tuple[Iterator[Event], bool]:
    """The events of a call, in between and at the ends of its rows, and whether it had a single prompt."""
    model = resolve_model(model)
    if model.own_decoder is None:
        job = prepare(model, prompt, given)
        return _decoded(job, drafts, live), job.single
    outputs, single = own.answers(model, model.own_decoder, prompt, given)
    return (Event(i, o.text, "" if drafts else None, o.nfe, o) for i, o in enumerate(outputs)), single


def _decoded(job: Job, drafts: bool, live: bool) -> Iterator[Event]:
    meter, traces = Meter(len(job.prompts), job.model.device), job.new_traces()
    sent = [""] * len(job.prompts)
    if not int(job.queue.canvas.masked.sum()):  # max_new_tokens=0: the prompts come back as they are
        for request in range(len(sent)):
            output = job.output(request, job.queue, request, meter)
            yield Event(request, output.text, None, 0, output)
        return
    for tick in job.ticks(meter):
        meter.tick(tick.request)
        done = tick.state.done.tolist()
        for row, request in enumerate(tick.request):
            trace = traces.get(request)
            if trace is not None:
                record(trace, tick, row)
            if done[row]:
                meter.finish([request])
                output = job.output(request, tick.state, row, meter, trace)
                yield Event(request, output.text[len(sent[request]) :], "" if drafts else None, output.nfe, output)
            elif live:
                final, draft = _progress(job, tick, row, drafts)
                if len(final) > len(sent[request]) or drafts:
                    yield Event(request, final[len(sent[request]) :], draft, meter.nfe[request], None)
                    sent[request] = max(final, sent[request], key=len)


def _progress(job: Job, tick: Tick, row: int, drafts: bool) -> tuple[str, str | None]:
    """The final text of a row, and what is written behind it."""
    canvas = tick.state.canvas
    request = tick.request[row]
    begin, length = job.begin(request), int(canvas.length[row]) - job.tails[request]
    end = int(canvas.first_masked()[row])
    if job.sampler.needs.revises:
        end = min(end, max(begin, int(tick.window.lo[row])))
    ids = canvas.ids[row, :length].tolist()
    closed = ids[begin:end]
    final = job.stops.settled(closed)
    if not drafts:
        return final, None
    if job.stops.ended(closed):
        return final, ""
    behind = "".join(BLANK if t == canvas.mask_id else job.stops.decode([t]) for t in ids[end:])
    return final, job.stops.decode(closed)[len(final) :] + behind
