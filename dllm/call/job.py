"""A call made ready: arguments checked, canvases laid out, sampler and cache built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dllm.call.arguments import DEFAULTS, Arguments, FamilyDefaults
from dllm.call.encoding import prompt_ids
from dllm.call.output import Output
from dllm.call.prompts import check_ids, listed_ids
from dllm.decoding.cache import registry as caches
from dllm.decoding.cache.policy import Policy
from dllm.decoding.canvas import Canvas, State
from dllm.decoding.engine import Options, Runner, Tick, decode, step
from dllm.decoding.guidance import Guidance
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law
from dllm.decoding.recording import Confidences
from dllm.decoding.slots import Context, Sampler
from dllm.decoding.stopping import Stop, Stops
from dllm.decoding.trace import Trace
from dllm.errors import DllmError, out_of_memory
from dllm.lookahead.setting import Lookahead, Stats
from dllm.lookahead.walk import Walk
from dllm.models.hub import load
from dllm.models.model import Model
from dllm.samplers import registry
from dllm.samplers.base import Bundle
from dllm.samplers.eos_last import EosLast

MAX_NEW_TOKENS = 128


@dataclass
class Job:
    """A call made ready: everything `decode` needs, and what turns its states into outputs."""

    model: Model
    args: Arguments
    sampler: Sampler
    policy: Policy
    options: Options
    queue: State
    prompts: list[list[int]]
    stops: Stops
    single: bool
    tails: list[int]  # columns of each canvas that only complete its last block
    lookahead: Lookahead | None = None
    report: dict[int, Stats] = field(default_factory=dict)  # of the lookahead, by request

    def ticks(self, meter: Meter) -> Iterator[Tick]:
        size = min(self.args.batch_size, self.queue.rows)
        runner: Any = Runner
        if self.lookahead is not None:
            runner = partial(Walk, setting=self.lookahead, report=self.report)
        call = {"batch_size": size, "options": self.options, "meter": meter, "runner": runner}
        try:
            yield from decode(self.model, self.sampler, self.policy, self.queue, **call)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            hint = f"try batch_size={size // 2}" if size > 1 else "try a shorter window, a cache or a smaller dtype"
            raise DllmError(f"out of memory on {self.model.device} at batch_size={size}: {hint}") from error

    def output(self, tick: Tick, row: int, meter: Meter, trace: Trace | None) -> Output:
        request, canvas = tick.request[row], tick.state.canvas
        length = int(canvas.length[row])
        ids, begin = canvas.ids[row, : length - self.tails[request]].tolist(), self.begin(request)
        written = ids[begin : next((i for i, t in enumerate(ids[begin:], begin) if t == canvas.mask_id), None)]
        text, tokens, through, stopped = self.stops.cut(written)
        if self.args.early_stop and stopped:
            ids = ids[: begin + through]
        if self.args.infill:
            frozen = canvas.frozen[row].tolist()
            tokens = [t for t, given in zip(written, frozen[begin:], strict=False) if not given]
        reason = "cap" if request in meter.capped else "stop" if stopped else "length"
        return Output(
            text=text,
            sequences=ids,
            tokens=tokens,
            nfe=meter.nfe[request],
            calls=meter.calls,
            finish_reason=reason,
            seconds=meter.seconds[request],
            prefill_seconds=meter.first[request],
            positions=meter.positions[request],
            canvas_length=length,
            decoded=int((~canvas.frozen[row] & ~canvas.masked[row])[:length].sum()),
            sampler=self.sampler.spec,
            cache=self.policy.name,
            seed=int(tick.state.seed[row]),
            trace=trace,
            lossless=None if self.lookahead is None else self.lookahead.lossless,
            stats=self.report[request].report(self.lookahead) if self.lookahead and request in self.report else {},
        )

    def begin(self, request: int) -> int:
        """The first column of a request's text: behind the prompt; an infilled text is returned whole."""
        return 0 if self.args.infill else len(self.prompts[request])


def prepare(model: Model | str | None, prompt: Any, given: Mapping[str, Any]) -> Job:
    """Check a call and lay out its canvases."""
    args = Arguments.parse(given)
    model = resolve_model(model)
    prompts, single = prompt_ids(model, prompt, args.chat)
    if args.n > 1:
        prompts, single = [p for p in prompts for _ in range(args.n)], False
    if model.mask_id is None:
        raise DllmError("this model has no mask id: it is not a masked-diffusion model")
    if args.compile:
        model.compile()
    defaults = DEFAULTS.get(model.family, FamilyDefaults())
    canvas, windows, tails = lay_out(model, prompts, args)
    longest = max(*windows, 1)
    block = args.block_length or model.block_size or defaults.block_length or longest
    eos = model.eos_ids if args.eos is None else listed_ids("eos", args.eos, model.vocab_size)
    context = Context(
        block_length=block if model.block_size else min(block, longest),
        steps=args.steps,
        windows=tuple(sorted({max(w, 1) for w in windows})),
        mask_id=model.mask_id,
        eos_ids=eos,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        shift=model.shift,
        block_size=model.block_size,
        tokenizer=model.tokenizer,
        family=model.family,
    )
    if args.infill and args.stop:
        raise DllmError("infill=True fills every hole to its end, so stop strings do not apply: leave stop= out")
    stops = Stops.of(() if args.infill else eos, args.stop, model.tokenizer)
    sampler = build_sampler(model, args, context, stops, defaults)
    if sampler.needs.edits_length:  # what it inserts would move the tail
        canvas, _, tails = lay_out(model, prompts, args, whole=False)
    policy = caches.default(model, sampler.needs.caches) if args.cache is None else caches.policy(args.cache)
    policy = policy.bind(model)
    if sampler.needs.caches is not None and policy.name not in sampler.needs.caches:
        usable = ", ".join(map(repr, sampler.needs.caches))
        why = f": {sampler.needs.caches_why}" if sampler.needs.caches_why else ""
        raise DllmError(f"sampler {sampler.name!r} cannot use cache {policy.name!r}{why}; use {usable}")
    sampler = policy.attach(sampler)
    if args.trace:
        notes = Confidences()
        sampler = sampler._replace(amend=(*sampler.amend, notes), starts=(*sampler.starts, (None, notes.columns)))
    suppress = listed_ids("suppress_tokens", args.suppress_tokens, model.vocab_size) + (
        eos if args.logits_eos_inf else ()
    )
    law = Law(args.temperature, args.top_p, args.top_k, filtered=sampler.needs.filtered, gumbel=args.gumbel)
    blank = model.relative and any(set(p) <= {model.mask_id} for p in prompts)
    options = Options(law, suppress, args.min_new_tokens, eos, args.max_nfe, blank, args.check or step)
    seeds = torch.arange(len(prompts), device=model.device) + args.seed
    asked = torch.tensor(windows, device=model.device)
    queue = State.begin(canvas, seeds, asked, *sampler.start(canvas))
    spec = sampler.lookahead if args.lookahead is None else args.lookahead
    ahead = None if spec is None else Lookahead.parse(spec).settle(model, sampler)
    return Job(model, args, sampler, policy, options, queue, prompts, stops, single, tails, ahead)


def resolve_model(model: Any) -> Model:
    """A loaded model as it is; anything else goes through `load`."""
    return model if isinstance(model, Model) else load("tiny" if model is None else model)


def lay_out(
    model: Model, prompts: list[list[int]], args: Arguments, whole: bool = True
) -> tuple[Canvas, list[int], list[int]]:
    """The canvases of all requests, right-padded, the generation window of each, and its tail.

    A block-causal model is fed `whole` blocks: masks beyond max_new_tokens fill the last one. They are decoded with
    early_stop=False only, and never part of an output: the tail.
    """
    mask = model.mask_id
    assert mask is not None
    starts, rows = [], []
    for index, prompt in enumerate(prompts):
        new = new_tokens(model, args, len(prompt))
        check_ids(prompt, model.embedding_rows, f"prompt {index}")
        holes = [i for i, token in enumerate(prompt) if token == mask]
        if holes and not args.infill:
            at = f"prompt {index} contains the mask token at position {holes[0]}"
            raise DllmError(f"{at}; pass infill=True to fill it")
        if args.infill and not holes and not new:
            named = mask if model.tokenizer is None else model.tokenizer.convert_ids_to_tokens(mask)
            raise DllmError(f"infill=True, but prompt {index} contains no mask token ({named})")
        if model.shift and (not prompt or (holes and holes[0] == 0)):
            raise DllmError(f"prompt {index}: with shifted logits position 0 cannot be predicted; begin with a token")
        starts.append(holes[0] if holes else len(prompt))
        rows.append(prompt + [mask] * new)
    tails = [tail(model, len(r)) if whole and not args.infill else 0 for r in rows]
    rows = [r + [mask] * extra for r, extra in zip(rows, tails, strict=True)]
    width = max(map(len, rows))
    length, start = torch.tensor([len(r) for r in rows]), torch.tensor(starts)
    decoded = length - torch.tensor(tails) if args.early_stop else length
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    masked = (ids == mask) & (torch.arange(width) < decoded[:, None])
    ids, masked, start, length = (x.to(model.device) for x in (ids, masked, start, length))
    canvas = Canvas(ids, masked, ~masked, start, length, mask)
    return canvas, [len(r) - t - s for r, t, s in zip(rows, tails, starts, strict=True)], tails


def new_tokens(model: Model, args: Arguments, given: int) -> int:
    """Masks behind a prompt of `given` tokens: what was asked for, else MAX_NEW_TOKENS as far as the positions reach.

    Errors: more than the model has positions.
    """
    room = model.max_positions - given
    default = 0 if args.infill else min(MAX_NEW_TOKENS, room)
    new = default if args.max_new_tokens is None else args.max_new_tokens
    if room < 0:
        raise DllmError(f"a prompt of {given} tokens exceeds the model's {model.max_positions} positions")
    if new > room:
        raise DllmError(
            f"a prompt of {given} tokens and max_new_tokens={new} exceed the model's {model.max_positions} "
            f"positions; at most {room} new tokens fit"
        )
    if args.min_new_tokens > new:
        raise DllmError(f"min_new_tokens={args.min_new_tokens} is more than max_new_tokens={new}")
    return new


def tail(model: Model, length: int) -> int:
    """Columns behind `length` that complete the last block of a block-causal model, as far as its positions reach."""
    return min(-length % (model.block_size or 1), model.max_positions - length)


def build_sampler(model: Model, args: Arguments, context: Context, stops: Stops, defaults: FamilyDefaults) -> Sampler:
    """The sampler of a call: the named ones, then guidance, EOS options and the early stop."""
    spec = args.sampler if args.sampler is not None else defaults.sampler
    adjust = (EosLast(context.eos_ids),) if args.confidence_eos_eot_inf else ()
    inputs = Guidance(args.cfg_scale, context.mask_id) if args.cfg_scale else None
    tuned = {name: s.parameters for name, s in model.sampler_settings.items()}
    sampler = registry.build(spec, context, Bundle(inputs=inputs, adjust=adjust), tuned)
    if args.early_stop and not args.infill:
        sampler = sampler._replace(stop=Stop(stops, sampler.needs.revises))
    return sampler
