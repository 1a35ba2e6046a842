"""The front door: `generate`, `stream`, `score`. Prompts in, outputs out; the only place that tokenises."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch

from dllm.call.arguments import Arguments
from dllm.call.encoding import prompt_ids
from dllm.call.job import MAX_NEW_TOKENS, Job, prepare, resolve_model
from dllm.call.output import Event, Output
from dllm.call.prompts import joined
from dllm.decoding.engine import Tick
from dllm.decoding.meter import Meter
from dllm.decoding.recording import record
from dllm.decoding.trace import BLANK, Trace
from dllm.errors import DllmError
from dllm.models.diffusion_gemma import DiffusionGemma
from dllm.models.model import Model

log = logging.getLogger(__name__)


def generate(
    model: Model | str | None = None,
    prompt: Any = None,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    **arguments: Any,
) -> Any:
    """Decode one prompt or a list of prompts.

    model: a loaded `Model`, a folder, a hub id, or None for the embedded model. prompt: text, ids, chat messages, a
    list of any one of these (a ragged batch), or what a tokenizer returns, padded on either side; None generates
    unconditionally. input_ids (B, L) or (L,) and attention_mask (the same shape; 0 is padding) are another way to
    give ids. Further arguments: see `Arguments`.

    Returns one `Output` for one prompt, a list for a list, a tensor of two dimensions and n > 1 (prompt by prompt).
    Request i uses seed + i, so a row is the same alone and in a batch (docs/decoding.md says in which precision).
    Errors: `DllmError`, one line.
    """
    model, prompt = resolve_model(model), joined(prompt, input_ids, attention_mask)
    if isinstance(model, DiffusionGemma):
        answers, single = _native(model, prompt, arguments)
        return answers[0] if single else answers
    job = prepare(model, prompt, arguments)
    outputs: dict[int, Output] = {}
    for event in _run(job, drafts=False):
        if event.output is not None:
            outputs[event.request] = event.output
    for output in outputs.values():
        output.calls = max(o.calls for o in outputs.values())
    return outputs[0] if job.single else [outputs[i] for i in range(len(outputs))]


def _native(model: DiffusionGemma, prompt: Any, given: Mapping[str, Any]) -> tuple[list[Output], bool]:
    """The answers of a model that decodes itself, one prompt at a time, and whether the call had a single prompt.

    Arguments that it cannot honour are errors.
    """
    args = Arguments.parse(given)
    taken = {"sampler", "max_new_tokens", "seed", "n", "chat", "batch_size"}
    for name, value in given.items():
        if name not in taken and value != Arguments.__dataclass_fields__[name].default:
            raise DllmError(f"{name}={value!r} does not apply to DiffusionGemma, which decodes itself; leave it out")
    options = model.options(args.sampler)
    listed, single = prompt_ids(model, prompt, args.chat)
    prompts = [ids for ids in listed for _ in range(args.n)]
    outputs = []
    for index, ids in enumerate(prompts):
        began = time.perf_counter()
        new = MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
        done = model.decode(ids, new, args.seed + index, options)
        outputs.append(
            Output(
                text="" if model.tokenizer is None else model.tokenizer.decode(done.tokens, skip_special_tokens=True),
                sequences=ids + done.tokens,
                tokens=done.tokens,
                nfe=done.nfe,
                calls=done.nfe,
                finish_reason="stop" if done.stopped else "length",
                seconds=time.perf_counter() - began,
                prefill_seconds=0.0,
                positions=done.nfe * (model.block_size or 0),
                canvas_length=len(ids) + new,
                decoded=len(done.tokens),
                sampler="native",
                cache="native",
                seed=args.seed + index,
            )
        )
    return outputs, single and args.n == 1


def stream(
    model: Model | str | None = None,
    prompt: Any = None,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    drafts: bool = False,
    **arguments: Any,
) -> Iterator[Event]:
    """Decode and yield an `Event` whenever more text is final (or, with drafts, after every forward).

    The pieces of a prompt join to its `output.text`. Arguments and errors are those of `generate`; mistakes are raised
    by the call itself.
    """
    model, prompt = resolve_model(model), joined(prompt, input_ids, attention_mask)
    if isinstance(model, DiffusionGemma):
        return _native_stream(_native(model, prompt, arguments)[0], drafts)
    return _run(prepare(model, prompt, arguments), drafts=drafts, stream=True)


def _native_stream(outputs: list[Output], drafts: bool) -> Iterator[Event]:
    for index, output in enumerate(outputs):
        yield Event(index, output.text, "" if drafts else None, output.nfe, output)


def _run(job: Job, drafts: bool, stream: bool = False) -> Iterator[Event]:
    meter = Meter(len(job.prompts), job.model.device)
    traces = {i: new_trace(job, i) for i in range(len(job.prompts))} if job.args.trace else {}
    sent = [""] * len(job.prompts)
    if not int(job.queue.canvas.masked.sum()):
        yield from _nothing_to_do(job, meter)
        return
    for tick in job.ticks(meter):
        meter.tick(tick.request)
        done = tick.state.done.tolist()
        for row, request in enumerate(tick.request):
            if traces:
                record(traces[request], tick, row)
            if done[row]:
                meter.finish([request])
                if traces:
                    seal(traces[request], job, tick, row)
                output = job.output(tick, row, meter, traces.get(request))
                yield Event(request, output.text[len(sent[request]) :], "" if drafts else None, output.nfe, output)
            elif stream:
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


def _nothing_to_do(job: Job, meter: Meter) -> Iterator[Event]:
    """max_new_tokens=0: the prompts come back as they are."""
    for i in range(len(job.prompts)):
        rows = torch.tensor([i], device=job.queue.step.device)
        state = job.queue.take(rows)
        tick = Tick([i], state.canvas, state, None)  # type: ignore[arg-type]
        output = job.output(tick, 0, meter, None)
        yield Event(i, output.text, None, 0, output)


def new_trace(job: Job, request: int) -> Trace:
    given = {f.name: v for f in fields(job.args) if (v := getattr(job.args, f.name)) != f.default}
    prompt = list(job.prompts[request])
    return Trace(
        prompt,
        job.queue.canvas.mask_id,
        job.sampler.spec,
        start=int(job.queue.canvas.start[request]),
        prompt_text=job.stops.decode(prompt, special=True),
        cache=job.policy.name,
        arguments=json.loads(json.dumps(given, default=str)),
    )


def seal(trace: Trace, job: Job, tick: Tick, row: int) -> None:
    """Keep the final canvas and the text of its tokens."""
    canvas = tick.state.canvas
    hidden = job.tails[tick.request[row]] if job.args.early_stop else 0
    trace.final = canvas.ids[row, : int(canvas.length[row]) - hidden].tolist()
    if job.model.tokenizer is not None:
        ids = {*trace.final, *trace.prompt, *(t for pairs in trace.commits for _, t in pairs)} - {trace.mask_id}
        trace.pieces = {i: job.model.tokenizer.decode([i]) for i in sorted(ids)}
