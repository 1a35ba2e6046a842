"""A call made ready: arguments checked, canvases laid out, sampler and cache built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dllm.call.arguments import DEFAULTS, Arguments, FamilyDefaults
from dllm.call.constrain import check as check_constraints
from dllm.call.constrain import rule_of, verdict
from dllm.call.output import Output
from dllm.call.prompts import check_ids, listed_ids, prompt_ids
from dllm.call.steering import Criteria, Processing, check_pure, listed
from dllm.decoding.cache import registry as caches
from dllm.decoding.cache.policy import Policy
from dllm.decoding.canvas import Canvas, State, mapped
from dllm.decoding.captured import CapturedRunner, setting
from dllm.decoding.constraints.bound import Bound
from dllm.decoding.engine import decode
from dllm.decoding.facts import COLUMNS
from dllm.decoding.graphs import Counts, forget, lent, usable
from dllm.decoding.guidance import Guidance
from dllm.decoding.logprobs import Logprobs, Noting
from dllm.decoding.meter import Meter, Ticket
from dllm.decoding.prediction import Law
from dllm.decoding.runner import Options, Runner, Tick
from dllm.decoding.slots import Context, Needs, Sampler
from dllm.decoding.step import step
from dllm.decoding.stopping import Stop, Stops
from dllm.decoding.trace import Trace
from dllm.errors import DllmError, TooLong, out_of_memory
from dllm.lookahead import form
from dllm.lookahead.captured import CapturedChainRunner
from dllm.lookahead.chain import ChainRunner
from dllm.lookahead.pace import ROWS
from dllm.lookahead.setting import Lookahead, Stats
from dllm.models.hub import load
from dllm.models.model import Model
from dllm.models.moe import wide
from dllm.models.native import NativeModel
from dllm.samplers import Bundle, registry
from dllm.samplers.eos_last import EosLast

MAX_NEW_TOKENS = 128
WIDE = 256  # what a group's canvases have a multiple of, where no store and no capture is laid out for their columns
ModelLike: TypeAlias = Model | str | Path | None  # a loaded one, a folder, a hub id; None: the embedded one


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
    block_length: int  # columns decoded before the next ones
    width: int  # columns of the widest canvas, which may have more padding
    lookahead: Lookahead | None = None
    criteria: Criteria = field(default_factory=Criteria)
    captured: NativeModel | None = None  # the model, where ticks become graphs
    counts: Counts | None = None  # of the captures

    def ticks(self, meter: Meter, runner: Callable[..., Runner] | None = None) -> Iterator[Tick]:
        """Decode, by `runner` where one is given. Errors: out of memory, with a batch size that may fit."""
        size = min(self.args.batch_size, self.queue.rows)
        try:
            with nullcontext(runner) if runner is not None else self.runner() as made:
                yield from decode(
                    self.model, self.sampler, self.policy, self.queue,
                    batch_size=size, options=self.options, meter=meter, runner=made,
                )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            forget(self.model)
            hint = f"try batch_size={size // 2}" if size > 1 else "try a shorter window, a cache or a smaller dtype"
            raise DllmError(f"out of memory on {self.model.device} at batch_size={size}: {hint}") from error

    @property
    def setting(self) -> Hashable:
        """What its rows are decoded by: rows of calls in which it is equal may share forwards."""
        width, captured = self.queue.canvas.ids.shape[1], self.captured is not None
        return setting(self.sampler, self.policy, self.options, self.lookahead, width, captured)

    def store_bytes(self) -> int:
        """What the keys and values of one row take; 0 without a cache."""
        if not self.policy.stored:
            return 0
        copies = 1 if self.sampler.inputs is None else self.sampler.inputs.lanes
        smallest = self.model.new_store(1, 1)  # two slots: the spare one is part of every lane
        return smallest.nbytes // 2 * (self.queue.canvas.ids.shape[1] + 1) * copies

    @property
    def row_positions(self) -> int:
        """What a forward of one row computes at most: its canvas, as often as inputs and a lookahead feed it."""
        copies, ahead = 1 if self.sampler.inputs is None else self.sampler.inputs.lanes, self.lookahead
        rows = 1 if ahead is None else ahead.max_rows or (max(ROWS) if ahead.rows == "auto" else int(ahead.rows))
        return self.width * copies * rows

    @property
    def reusable(self) -> bool:
        """Whether keys and values of its prompts are those that another call would compute."""
        return self.policy.resumes and self.sampler.inputs is None and self.lookahead is None

    @contextmanager
    def runner(self) -> Iterator[Callable[..., Runner]]:
        """What decodes this call."""
        kind, ahead = self._kind(), self.lookahead
        looking: dict[str, Any] = {} if ahead is None else {"setting": ahead}
        if self.captured is not None and issubclass(kind, CapturedRunner):
            with lent(self.captured) as graphs:
                self.counts = graphs.counts
                yield partial(kind, graphs=graphs, **looking)
        else:
            yield partial(kind, **looking)

    def _kind(self) -> type[Runner]:
        """The runner's class."""
        ahead, captured = self.lookahead, self.captured is not None
        if ahead is None:
            return CapturedRunner if captured else Runner
        kind = form.runner(ahead, self.model, self.sampler, self.policy, checked=self.args.check is not None)
        # a trace is shown steps that a replay keeps to itself, and an audit goes back to one
        whole = captured and kind is ChainRunner and ahead.mode != "fast" and not self.options.traced
        return CapturedChainRunner if whole else kind

    def output(
        self,
        ticket: Ticket,
        canvas: Canvas,
        row: int,
        trace: Trace | None = None,
        noted: Logprobs | None = None,
        most: int | None = None,
    ) -> Output:
        """What a row of the call returns that stands in this row of a canvas on the host, with what was noted of it;
        its trace is sealed. most: tokens at which a criterion ended it."""
        ahead, length, request = self.lookahead, int(canvas.length[row]), ticket.index
        ids, begin = canvas.ids[row, : length - self.tails[request]].tolist(), self.begin(request)
        written = self.written(request, canvas, row)
        text, tokens, through, stopped = self.stops.cut(written[:most])
        stopped = stopped or most is not None or ticket.halted
        if self.args.early_stop and stopped:
            ids = ids[: begin + through]
        columns = self.columns(request, canvas, row, 0, len(tokens))
        tokens = [ids[c] for c in columns]
        if trace is not None:
            hidden = self.tails[request] if self.args.early_stop else 0
            self._seal(trace, canvas.ids[row, : length - hidden].tolist(), text)
        return Output(
            text=text,
            sequences=ids,
            tokens=tokens,
            nfe=ticket.nfe,
            calls=ticket.call.calls,
            finish_reason=self._reason(ticket, stopped),
            seconds=ticket.seconds,
            queue_seconds=ticket.entered,
            prefill_seconds=ticket.first,
            positions=ticket.positions,
            canvas_length=length,
            decoded=int((~canvas.frozen[row] & ~canvas.masked[row])[:length].sum()),
            sampler=self.sampler.spec,
            cache=self.policy.name,
            seed=self.args.seed + request,
            trace=trace,
            logprobs=noted and noted.said(columns),
            lossless=None if ahead is None else ahead.lossless,
            stats=self._stats(ticket, canvas, row, tokens, written),
        )

    def written(self, request: int, canvas: Canvas, row: int) -> list[int]:
        """The ids of a request's text up to its first mask."""
        ids = canvas.ids[row, self.begin(request) : int(canvas.length[row]) - self.tails[request]].tolist()
        return ids[: next((i for i, t in enumerate(ids) if t == canvas.mask_id), None)]

    @staticmethod
    def _reason(ticket: Ticket, stopped: bool) -> str:
        """Why an answer ended."""
        if ticket.capped and not ticket.halted:
            return "cap"
        return "stop" if stopped else "length"

    def _stats(
        self, ticket: Ticket, canvas: Canvas, row: int, tokens: list[int], written: list[int]
    ) -> dict[str, object]:
        ahead, stats = self.lookahead, ticket.ahead
        found = stats.report(ahead) if ahead and isinstance(stats, Stats) else {}
        if ticket.cached:
            found["cached_tokens"] = ticket.cached
        if self.options.rule is not None:
            automaton = self.options.rule.automata[int(self.queue.memory[Bound].which[ticket.index])]
            if not automaton.free:
                start = int(canvas.start[row])
                answer = written[start:] if self.args.infill else tokens
                found["constraint"] = verdict(
                    automaton, answer, canvas.frozen[row, start:].tolist(), self.model.tokenizer
                )
        return found if self.counts is None else {**found, "graphs": dataclasses.asdict(self.counts)}

    def begin(self, request: int) -> int:
        """The first column of a request's text: behind the prompt; an infilled text is returned whole."""
        return 0 if self.args.infill else len(self.prompts[request])

    def noted(self, state: State, row: int) -> Logprobs | None:
        """What a row of a state has noted, on the host; None where the call did not ask for log-probabilities."""
        noted = None if self.args.logprobs is None else state.columns.get(Logprobs)
        return noted and mapped(lambda x: x[row : row + 1].cpu(), noted)

    def columns(self, request: int, canvas: Canvas, row: int, lo: int, hi: int) -> list[int]:
        """The columns of a request's tokens among ids `lo` to `hi` of its text: all, of an infilled one the holes."""
        begin = self.begin(request)
        columns = range(begin + lo, begin + hi)
        if not self.args.infill:
            return [*columns]
        given = canvas.frozen[row, begin + lo : begin + hi].tolist()
        return [c for c, was in zip(columns, given, strict=True) if not was]

    def new_traces(self) -> dict[int, Trace]:
        """The trace of each request, where they are asked for."""
        starts = self.queue.canvas.start.tolist() if self.args.trace else []
        return {
            request: Trace(
                list(prompt),
                self.queue.canvas.mask_id,
                self.sampler.spec,
                start=start,
                prompt_text=self.stops.decode(prompt, special=True),
                cache=self.policy.name,
                arguments=json.loads(json.dumps(self.args.given(), default=str)),
            )
            for request, (prompt, start) in enumerate(zip(self.prompts, starts, strict=False))
        }

    def _seal(self, trace: Trace, final: list[int], text: str) -> None:
        """Keep the answer, the final canvas and the text of its tokens."""
        trace.final, trace.text = final, text
        if self.model.tokenizer is not None:
            ids = {*trace.final, *trace.prompt, *(t for pairs in trace.commits for _, t in pairs)} - {trace.mask_id}
            trace.pieces = {i: self.model.tokenizer.decode([i]) for i in sorted(ids)}


def prepare(model: Model, prompt: object, given: Mapping[str, Any], shared: bool = False) -> Job:
    """Check a call and lay out its canvases. shared: as wide as those of other calls that are like it, so that rows of
    all may be a group. Errors: every mistake that shows before the first forward."""
    args = Arguments.parse(given)
    captured = model if usable(model, args.graphs) else None
    grain = COLUMNS if shared or captured is not None else 1
    prompts, single = prompt_ids(model, prompt, args.chat, args.n)
    canvas, windows, tails = lay_out(model, prompts, args, grain)
    if args.compile:
        model.compile()
    context = _context(model, args, windows)
    stops = _stops(model, args, context.eos_ids)
    sampler = _sampler(model, args, context, stops)
    if sampler.needs.edits_length:  # what it inserts would move the tail
        canvas, _, tails = lay_out(model, prompts, args, grain, whole=False)
    policy = _policy(model, args, sampler.needs, sampler.name)
    sampler = policy.attach(sampler)
    if args.trace or args.logprobs is not None:
        notes = Noting(min(args.logprobs or 0, model.vocab_size), context.logits)
        sampler = sampler._replace(amend=(*sampler.amend, notes), starts=(*sampler.starts, (None, notes.columns)))
    spec = sampler.lookahead if args.lookahead is None else args.lookahead
    ahead = None if spec is None else Lookahead.parse(spec).settle(model, sampler)
    width = canvas.ids.shape[1]
    if shared and not policy.stored and ahead is None and captured is None:
        canvas = canvas.widened(-(-width // WIDE) * WIDE)
    seeds = torch.arange(len(prompts), device=model.device) + args.seed
    queue = State.begin(canvas, seeds, torch.tensor(windows, device=model.device), *sampler.start(canvas))
    process, criteria = _steering(args, ahead is not None)
    options = _options(model, args, sampler.needs, context.eos_ids, prompts, process)
    if constrained := rule_of(model, args, options, canvas, windows, tails):
        rule, bound = constrained
        if ahead is not None and ahead.mode == "guarded":
            raise DllmError(
                "lookahead mode 'guarded' trusts rules that are monotone in each confidence, and a constraint ties "
                "columns together: load the model with dtype='float64' for mode 'exact', or use mode 'fast'"
            )
        check_constraints(rule, bound, queue, sampler, args.infill)
        options = dataclasses.replace(options, rule=rule)
        queue = queue._replace(memory=queue.memory.plus(bound))
    if args.check is not None or process is not None:  # they ask the device
        captured = None
    return Job(
        model, args, sampler, policy, options, queue, prompts, stops, single, tails, context.block_length, width,
        ahead, criteria, captured,
    )  # fmt: skip


def _steering(args: Arguments, ahead: bool) -> tuple[Processing | None, Criteria]:
    """The processors and criteria of a call. Errors: what has no meaning beside them."""
    processors, criteria = listed(args.logits_processor), listed(args.stopping_criteria)
    if criteria and args.infill:
        raise DllmError("infill=True fills every hole to its end, so stopping criteria do not apply: leave them out")
    constrained = bool(args.constraints())
    if constrained and criteria:
        raise DllmError("stopping_criteria= may cut a constrained answer short of what was asked; leave it out")
    if processors and args.graphs:
        raise DllmError("logits processors run on the host, which a CUDA graph cannot ask: leave graphs=True out")
    if ahead:
        check_pure("logits processor", processors)
        check_pure("stopping criterion", criteria)
    return Processing(processors, ahead, constrained) if processors else None, Criteria(criteria, ahead)


def resolve_model(model: object) -> Model:
    """A loaded model as it is; anything else goes through `load`."""
    return model if isinstance(model, Model) else load("tiny" if model is None else model)


def mask_of(model: Model) -> int:
    """The mask id. Errors: a model that has none."""
    if model.mask_id is None:
        raise DllmError("this model has no mask id: it is not a masked-diffusion model")
    return model.mask_id


def defaults(model: Model) -> FamilyDefaults:
    """What a call uses where it says nothing."""
    return DEFAULTS.get(model.family, FamilyDefaults())


def lay_out(
    model: Model, prompts: list[list[int]], args: Arguments, grain: int = 1, whole: bool = True
) -> tuple[Canvas, list[int], list[int]]:
    """Prompts, then masks: the canvas of all requests, right-padded to a multiple of `grain`, the columns that each
    generates, and its tail.

    A block-causal model is fed `whole` blocks, as far as its positions reach: masks beyond max_new_tokens fill the last
    one. They are decoded with early_stop=False only, and never part of an output: the tail. Errors: prompts that do not
    fit, masks in them.
    """
    mask, starts, rows = mask_of(model), [], []
    for index, prompt in enumerate(prompts):
        new = new_tokens(model, args, len(prompt))
        starts.append(_start(model, prompt, index, args.infill, new))
        rows.append(prompt + [mask] * new)
    block = model.block_size if whole and not args.infill and model.block_size else 1
    tails = [min(-len(r) % block, model.max_positions - len(r)) for r in rows]
    rows = [r + [mask] * extra for r, extra in zip(rows, tails, strict=True)]
    width = -(-max(map(len, rows)) // grain) * grain
    length, start = torch.tensor([len(r) for r in rows]), torch.tensor(starts)
    decoded = length - torch.tensor(tails) if args.early_stop else length
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    masked = (ids == mask) & (torch.arange(width) < decoded[:, None])
    ids, masked, start, length = (x.to(model.device) for x in (ids, masked, start, length))
    canvas = Canvas(ids, masked, ~masked, start, length, mask)
    return canvas, [len(r) - t - s for r, t, s in zip(rows, tails, starts, strict=True)], tails


def _start(model: Model, prompt: list[int], index: int, infill: bool, new: int) -> int:
    """The first column to generate. Errors: ids outside the vocabulary, masks where none may stand, or none to fill."""
    mask = mask_of(model)
    check_ids(prompt, model.embedding_rows, f"prompt {index}")
    holes = [i for i, token in enumerate(prompt) if token == mask]
    if holes and not infill:
        at = f"prompt {index} contains the mask token at position {holes[0]}"
        raise DllmError(f"{at}; pass infill=True to fill it")
    if infill and not holes and not new:
        named = mask if model.tokenizer is None else model.tokenizer.convert_ids_to_tokens(mask)
        raise DllmError(f"infill=True, but prompt {index} contains no mask token ({named})")
    start = holes[0] if holes else len(prompt)
    if model.shift and not start:
        raise DllmError(f"prompt {index}: with shifted logits position 0 cannot be predicted; begin with a token")
    return start


def new_tokens(model: Model, args: Arguments, given: int) -> int:
    """Masks behind a prompt of `given` tokens: what was asked for, else MAX_NEW_TOKENS as far as the positions reach.

    Errors: more than the model has positions.
    """
    room = model.max_positions - given
    default = 0 if args.infill else min(MAX_NEW_TOKENS, room)
    new = default if args.max_new_tokens is None else args.max_new_tokens
    if room < 0:
        raise TooLong(f"a prompt of {given} tokens exceeds the model's {model.max_positions} positions")
    if new > room:
        raise TooLong(
            f"a prompt of {given} tokens and max_new_tokens={new} exceed the model's {model.max_positions} "
            f"positions; at most {room} new tokens fit"
        )
    if args.min_new_tokens > new:
        raise DllmError(f"min_new_tokens={args.min_new_tokens} is more than max_new_tokens={new}")
    return new


def _context(model: Model, args: Arguments, windows: list[int]) -> Context:
    longest = max(*windows, 1)
    block = args.block_length or model.block_size or defaults(model).block_length or longest
    return Context(
        block_length=block if model.block_size else min(block, longest),
        steps=args.steps,
        windows=tuple(sorted({max(w, 1) for w in windows})),
        mask_id=mask_of(model),
        eos_ids=model.eos_ids if args.eos is None else listed_ids("eos", args.eos, model.vocab_size),
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        shift=model.shift,
        block_size=model.block_size,
        tokenizer=model.tokenizer,
        family=model.family,
        logits=wide(model.dtype),
    )


def _stops(model: Model, args: Arguments, eos: tuple[int, ...]) -> Stops:
    if args.infill and args.stop:
        raise DllmError("infill=True fills every hole to its end, so stop strings do not apply: leave stop= out")
    return Stops.of(() if args.infill else eos, args.stop, model.tokenizer)


def _sampler(model: Model, args: Arguments, context: Context, stops: Stops) -> Sampler:
    """The named samplers, then guidance, EOS options and the early stop."""
    spec = args.sampler if args.sampler is not None else defaults(model).sampler
    adjust = (EosLast(context.eos_ids),) if args.confidence_eos_eot_inf else ()
    inputs = Guidance(args.cfg_scale, context.mask_id) if args.cfg_scale else None
    tuned = {name: s.parameters for name, s in model.sampler_settings.items()}
    sampler = registry.build(spec, context, Bundle(inputs=inputs, adjust=adjust), tuned)
    sampler = sampler.reading(model.attention_layers)
    if args.early_stop and not args.infill:
        stop = Stop(stops, sampler.needs.revises, sampler.needs.whole_block)
        sampler = sampler._replace(stop=stop, starts=(*sampler.starts, (stop.memory, None)))
    return sampler


def _policy(model: Model, args: Arguments, needs: Needs, name: str) -> Policy:
    """The cache that was asked for, else the model's. Errors: one that the sampler cannot use."""
    policy = caches.default(model, needs.caches) if args.cache is None else caches.policy(args.cache)
    policy = policy.bind(model)
    if needs.caches is not None and policy.name not in needs.caches:
        why = f": {needs.caches_why}" if needs.caches_why else ""
        usable = ", ".join(map(repr, needs.caches))
        raise DllmError(f"sampler {name!r} cannot use cache {policy.name!r}{why}; use {usable}")
    return policy


def _options(
    model: Model,
    args: Arguments,
    needs: Needs,
    eos: tuple[int, ...],
    prompts: list[list[int]],
    process: Processing | None,
) -> Options:
    banned = listed_ids("suppress_tokens", args.suppress_tokens, model.vocab_size)
    return Options(
        law=Law(args.temperature, args.top_p, args.top_k, filtered=needs.filtered, gumbel=args.gumbel),
        suppress=banned + eos if args.logits_eos_inf else banned,
        min_new_tokens=args.min_new_tokens,
        eos_ids=eos,
        process=process,
        max_nfe=args.max_nfe,
        blank=model.relative and any(set(p) <= {model.mask_id} for p in prompts),
        traced=args.trace or args.on_step is not None,
        step=args.check or step,
    )
