"""The front door: `generate` and `stream`. Prompts in, outputs out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Unpack, overload

from dllm.call.arguments import Arguments, DecodingArguments
from dllm.call.job import MAX_NEW_TOKENS, Job, ModelLike, prepare, resolve_model
from dllm.call.output import Event, Output
from dllm.call.prompts import Ids, One, Prompt, Several, joined, prompt_ids
from dllm.decoding.canvas import Canvas
from dllm.decoding.graphs import usable
from dllm.decoding.meter import Meter
from dllm.decoding.recording import record
from dllm.decoding.trace import BLANK
from dllm.errors import DllmError
from dllm.models.model import Model, OwnDecoder


class CallArguments(DecodingArguments, total=False):
    """Those of `generate` and `stream`: a prompt may come as transformers' `generate` takes it."""

    input_ids: Ids | None
    attention_mask: Ids | None


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

    Returns one `Output` for one prompt, a list for a list, a tensor of two dimensions and n > 1 (prompt by prompt).
    Request i uses seed + i, so a row is the same alone and in a batch (docs/decoding.md says in which precision).
    Errors: `DllmError`, one line.
    """
    events, single = _events(model, prompt, n, arguments)
    outputs = {event.request: event.output for event in events if event.output is not None}
    calls = max(output.calls for output in outputs.values())  # of the whole call: those of the last to finish
    answers = [dataclasses.replace(outputs[i], calls=calls) for i in sorted(outputs)]
    return answers[0] if single else answers


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
    return _events(model, prompt, n, arguments, drafts, live=True)[0]


def _events(
    model: ModelLike, prompt: Prompt | None, n: int, arguments: CallArguments, drafts: bool = False, live: bool = False
) -> tuple[Iterator[Event], bool]:
    """The events of a call, in between and at the ends of its rows, and whether it had a single prompt."""
    prompt = joined(prompt, arguments.pop("input_ids", None), arguments.pop("attention_mask", None))
    model, given = resolve_model(model), {"n": n, **arguments}
    if model.own_decoder is None:
        job = prepare(model, prompt, given)
        return _decoded(job, drafts, live), job.single
    outputs, single = _own(model, model.own_decoder, prompt, given)
    return (Event(i, o.text, "" if drafts else None, o.nfe, o) for i, o in enumerate(outputs)), single


def _decoded(job: Job, drafts: bool, live: bool) -> Iterator[Event]:
    meter, traces, start = Meter(len(job.prompts)), job.new_traces(), job.queue.canvas.cpu()
    sent = [""] * len(job.prompts)
    if not start.masked.any():  # max_new_tokens=0: the prompts come back as they are
        for request in range(len(sent)):
            output = job.output(request, start, request, meter)
            yield Event(request, output.text, None, 0, output)
        return
    before = start.ids.tolist() if traces else []
    for tick in job.ticks(meter):
        meter.tick(tick.request)
        done = [row for row, f in enumerate(tick.facts) if f.done]
        rows = list(range(len(tick.facts))) if live else done
        for row, request in enumerate(tick.request if traces else []):
            record(traces[request], tick, row, before[request])
        if not rows:
            continue
        canvas = tick.canvas(rows)
        for at, row in enumerate(rows):
            request = tick.request[row]
            if row in done:
                output = job.output(request, canvas, at, meter, traces.get(request))
                yield Event(request, output.text[len(sent[request]) :], "" if drafts else None, output.nfe, output)
                continue
            low = tick.before[row].lo if job.sampler.needs.revises else None
            final, draft = _progress(job, request, canvas, at, low, drafts)
            if len(final) > len(sent[request]) or drafts:
                yield Event(request, final[len(sent[request]) :], draft, meter.nfe[request], None)
                sent[request] = max(final, sent[request], key=len)


def _progress(
    job: Job, request: int, canvas: Canvas, row: int, low: int | None, drafts: bool
) -> tuple[str, str | None]:
    """The final text of a row, and what is written behind it; from `low` on a sampler may revise what it wrote."""
    begin, length = job.begin(request), int(canvas.length[row]) - job.tails[request]
    end = int(canvas.first_masked()[row])
    if low is not None:
        end = min(end, max(begin, low))
    ids = canvas.ids[row, :length].tolist()
    closed = ids[begin:end]
    final = job.stops.settled(closed)
    if not drafts:
        return final, None
    if job.stops.ended(closed):
        return final, ""
    behind = "".join(BLANK if t == canvas.mask_id else job.stops.decode([t]) for t in ids[end:])
    return final, job.stops.decode(closed)[len(final) :] + behind


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
