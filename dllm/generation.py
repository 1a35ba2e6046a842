"""The front door: `generate`, `stream`, `score`. Prompts in, outputs out; the only place that tokenises."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from dllm import cache as caches
from dllm import noise
from dllm.canvas import Canvas, State
from dllm.engine import Options, Runner, Tick, decode
from dllm.errors import DllmError, nearest, out_of_memory, unknown
from dllm.guidance import Guidance
from dllm.lookahead import Lookahead, Stats, Walk
from dllm.meter import Meter
from dllm.models.diffusion_gemma import DiffusionGemma
from dllm.models.hub import Model, load
from dllm.prediction import Law, Prediction
from dllm.samplers import registry
from dllm.samplers.base import Bundle, Context, Sampler, View
from dllm.stopping import Stop
from dllm.trace import Trace, changes

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class FamilyDefaults:
    """What a call uses where it says nothing."""

    sampler: str = "confidence"
    block_length: int | None = 32  # None: the model's own block, else the whole window


# LLaDA's instruct scores use blocks; Dream decodes the whole window on its own schedule; block-causal models decode
# their own blocks by threshold, at the values of their model cards.
DEFAULTS: dict[str, FamilyDefaults] = {
    "dream": FamilyDefaults("dream", None),
    "sdar": FamilyDefaults("threshold:tau=0.85", None),
    "sdar_moe": FamilyDefaults("threshold:tau=0.85", None),
    "llada2": FamilyDefaults("threshold:tau=0.95", None),
    "fast_dllm": FamilyDefaults("fast_dllm_v2:tau=0.9", None),
}

# names of other codes -> ours
RENAMED = {
    "gen_length": "max_new_tokens",
    "max_length": "max_new_tokens",
    "remasking": "sampler",
    "alg": "sampler",
    "algorithm": "sampler",
    "diffusion_steps": "steps",
    "threshold": "sampler='threshold:tau=...'",
    "factor": "sampler='factor:f=...'",
    "use_cache": "cache='prefix'",
    "dual_cache": "cache='dual'",
    "cfg": "cfg_scale",
    "mask_id": "dllm.load(..., mask_id=...)",
    "num_return_sequences": "n",
    "do_sample": "temperature",
    "stop_strings": "stop",
    "eos_token_id": "eos",
    "generator": "seed",
    "alg_temp": "sampler='dream:alg_temp=...'",
}


class Rule(NamedTuple):
    """What an argument may be."""

    kind: type
    holds: Callable[[Any], bool]
    says: str


def _at_least(lowest: int) -> Rule:
    return Rule(Integral, lambda n: n >= lowest, f"an integer of at least {lowest}")


# None is allowed as well where it is the default
RULES: dict[str, Rule] = {
    **dict.fromkeys(("block_length", "steps", "top_k", "n", "batch_size", "max_nfe"), _at_least(1)),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens"), _at_least(0)),
    "seed": Rule(Integral, lambda n: abs(n) < 1 << 62, "an integer, below 2**62"),
    "temperature": Rule(Real, lambda x: 0 <= x < math.inf, "0 (greedy) or positive"),
    "cfg_scale": Rule(Real, lambda x: 0 <= x < math.inf, "0 (off) or positive"),
    "top_p": Rule(Real, lambda x: 0 < x <= 1, "in (0, 1]"),
    **dict.fromkeys(
        ("gumbel", "logits_eos_inf", "confidence_eos_eot_inf", "early_stop", "chat", "infill", "trace", "compile"),
        Rule(bool, lambda _: True, "True or False"),
    ),
}


@dataclass(frozen=True)
class Arguments:
    """Every decoding argument with its default. Errors name the argument and what it may be."""

    sampler: Any = None
    cache: Any = None
    max_new_tokens: int | None = None
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    gumbel: bool = False
    cfg_scale: float = 0.0
    seed: int = 0
    n: int = 1
    stop: str | Sequence[str] | None = None
    eos: int | Sequence[int] | None = None
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    early_stop: bool = True
    lookahead: int | str | dict[str, Any] | None = None
    batch_size: int = 8
    chat: bool | None = None
    infill: bool = False
    trace: bool = False
    compile: bool = False
    max_nfe: int | None = None

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            wrong = not isinstance(value, rule.kind) or (isinstance(value, bool) and rule.kind is not bool)
            if wrong or not rule.holds(value):
                raise DllmError(f"{name}={value!r} must be {rule.says}")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
            raise DllmError(f"stop={self.stop!r} must be a string, or several, and none of them empty")

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Arguments:
        known = set(cls.__dataclass_fields__)
        for name in given:
            if name not in known:
                near = nearest(name, [*known, *RENAMED])
                raise unknown("argument", name, known, hint=f": here it is {RENAMED[near]}" if near in RENAMED else "")
        return cls(**given)

    def ids(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """The token ids of an argument: one, or several. Errors: anything else, ids outside the vocabulary."""
        value = getattr(self, name)
        listed = (value,) if isinstance(value, Integral) else value
        if not isinstance(listed, Collection) or not all(isinstance(i, Integral) for i in listed):
            raise DllmError(f"{name}={value!r} must be a token id, or several")
        ids = tuple(map(int, listed))
        if bad := [i for i in ids if not 0 <= i < vocabulary]:
            raise DllmError(f"{name} holds {bad[0]}, outside the vocabulary of {vocabulary}")
        return ids


@dataclass
class Output:
    """The answer to one prompt."""

    text: str
    sequences: list[int]  # ids with the prompt; what an early stop left undecoded is not in it
    tokens: list[int]  # generated ids up to the stop, without it
    nfe: int  # forwards of this row
    calls: int  # batched forwards of the whole call
    finish_reason: str  # stop | length | cap
    seconds: float  # from the start of the call to this row's last forward
    prefill_seconds: float  # of these, to the row's first answer
    positions: int  # recomputed positions: nfe_equiv = positions / canvas length
    canvas_length: int
    decoded: int  # columns that were written, those behind the stop included
    sampler: str  # with its parameters; `name:tuned,...` where they are the model's own
    cache: str
    seed: int
    trace: Trace | None = None
    lossless: bool | None = None  # with lookahead: whether identity with the plain call is guaranteed
    stats: dict[str, Any] = field(default_factory=dict)  # of the lookahead

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens up to the stop for each forward; 0 for an empty answer."""
        return len(self.tokens) / self.nfe if self.nfe else 0.0

    @property
    def nfe_equiv(self) -> float:
        """Cost in full forwards of this row's canvas."""
        return self.positions / self.canvas_length if self.canvas_length else 0.0

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    def __str__(self) -> str:
        return self.text


class Event(NamedTuple):
    """One piece of a stream."""

    request: int  # which prompt of the call
    text: str  # newly final: it will not change any more
    draft: str | None  # what is written behind it and may still change; None unless asked for
    nfe: int
    output: Output | None  # with the last event of a prompt


# -- prompts --------------------------------------------------------------------------------------------------------


def _kind(prompt: Any) -> str:
    if isinstance(prompt, str):
        return "text"
    if hasattr(prompt, "tolist"):  # a tensor or an array
        return _kind(prompt.tolist())
    if isinstance(prompt, Mapping):
        return "message"
    if isinstance(prompt, Integral):
        return "id"
    if isinstance(prompt, Sequence):
        kinds = {_kind(p) for p in prompt}
        if kinds == {"id"}:
            return "ids"
        if kinds == {"message"}:
            return "chat"
        return "list"
    raise _odd_prompt(type(prompt).__name__)


def _odd_prompt(what: str) -> DllmError:
    return DllmError(f"a prompt is text, a list of token ids or a list of chat messages, not {what}")


def as_list(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it was a single one. Errors: empty batch, mixed types."""
    kind = _kind(prompt)
    if kind in ("text", "ids", "chat"):
        return [prompt], True
    if kind != "list":
        raise _odd_prompt(f"one {kind}")
    prompts = list(prompt)
    if not prompts:
        raise DllmError("the list of prompts is empty")
    kinds = {_kind(p) if isinstance(p, str) or not hasattr(p, "__len__") or len(p) else "ids" for p in prompts}
    if len(kinds) > 1:
        raise DllmError(f"the prompts of one call must be of one type; got {', '.join(sorted(kinds))}")
    if kinds == {"list"}:
        raise _odd_prompt("a list of lists")
    return prompts, False


def encode(model: Model, prompt: Any, chat: bool | None) -> list[int]:
    """Token ids of one prompt. Text goes through the chat template where the tokenizer has one (chat=None)."""
    kind = _kind(prompt) if len(prompt) else ("text" if isinstance(prompt, str) else "ids")
    if kind == "ids":
        return [int(i) for i in prompt]
    if model.tokenizer is None:
        raise DllmError("this model has no tokenizer: pass the prompt as token ids")
    if kind == "chat":
        return model.chat(prompt)
    if chat or (chat is None and getattr(model.tokenizer, "chat_template", None)):
        return model.chat([{"role": "user", "content": prompt}])
    return list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _unprompted(model: Model) -> list[int]:
    """Unconditional generation starts from bos where the model is shifted, else from nothing."""
    if not model.shift:
        return []
    if model.bos_id is None:
        raise DllmError("this model predicts the next token and has no bos id: pass a prompt")
    return [model.bos_id]


# -- a call ---------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A call made ready: everything `decode` needs, and what turns its states into outputs."""

    model: Model
    args: Arguments
    sampler: Sampler
    policy: caches.Policy
    options: Options
    queue: State
    prompts: list[list[int]]
    stops: list[str]
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
        prompt, ids = self.prompts[request], canvas.ids[row, : length - self.tails[request]].tolist()
        generated = ids if self.args.infill else ids[len(prompt) :]
        begin = int(canvas.start[row]) - (0 if self.args.infill else len(prompt))
        eos = set() if self.args.infill else set(self.options.eos_ids)
        ends = eos | {canvas.mask_id}
        end = next((i for i, t in enumerate(generated[begin:], begin) if t in ends), len(generated))
        stopped = end < len(generated) and generated[end] in eos
        tokens = generated[:end]
        text = self.text(tokens)
        cut = min((at for at in map(text.find, self.stops) if at >= 0), default=-1)
        if cut >= 0:
            tokens, text, stopped = self._up_to(tokens, cut), text[:cut], True
        if self.args.early_stop and stopped:
            ids = ids[: len(ids) - len(generated) + min(end + 1, len(generated))]
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

    def text(self, tokens: list[int]) -> str:
        if self.model.tokenizer is None:
            return ""
        return self.model.tokenizer.decode(tokens, skip_special_tokens=True)

    def _up_to(self, tokens: list[int], cut: int) -> list[int]:
        """The shortest prefix of the tokens whose text reaches `cut` characters."""
        return next((tokens[:i] for i in range(len(tokens) + 1) if len(self.text(tokens[:i])) >= cut), tokens)


def prepare(model: Model | str | None, prompt: Any, given: Mapping[str, Any]) -> Job:
    """Check a call and lay out its canvases."""
    args = Arguments.parse(given)
    model = resolve_model(model)
    if prompt is None:
        prompts, single = [_unprompted(model)], True
    else:
        listed, single = as_list(prompt)
        prompts = [encode(model, p, args.chat) for p in listed]
    if args.n > 1:
        prompts, single = [p for p in prompts for _ in range(args.n)], False
    if model.mask_id is None:
        raise DllmError("this model has no mask id: it is not a masked-diffusion model")
    if args.compile:
        model.compile()
    defaults = DEFAULTS.get(model.family, FamilyDefaults())
    canvas, window, tails = lay_out(model, prompts, args)
    block = args.block_length or model.block_size or defaults.block_length or window
    eos = model.eos_ids if args.eos is None else args.ids("eos", model.vocab_size)
    context = Context(
        block_length=block if model.block_size else min(block, max(window, 1)),
        steps=args.steps,
        max_new_tokens=max(window, 1),
        mask_id=model.mask_id,
        eos_ids=eos,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        shift=model.shift,
        block_size=model.block_size,
        tokenizer=model.tokenizer,
        family=model.family,
    )
    stops = [args.stop] if isinstance(args.stop, str) else list(args.stop or ())
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
    suppress = args.ids("suppress_tokens", model.vocab_size) + (eos if args.logits_eos_inf else ())
    law = Law(args.temperature, args.top_p, args.top_k, filtered=sampler.needs.filtered, gumbel=args.gumbel)
    options = Options(law, suppress, args.min_new_tokens, eos, args.max_nfe)
    seeds = torch.arange(len(prompts), device=model.device) + args.seed
    memory, columns = sampler.start(canvas)
    no = torch.zeros_like(seeds, dtype=torch.bool)
    queue = State(canvas, torch.zeros_like(seeds), seeds, torch.full_like(seeds, -1), no, no, memory, columns)
    spec = sampler.lookahead if args.lookahead is None else args.lookahead
    ahead = None if spec is None else Lookahead.parse(spec).settle(model, sampler)
    return Job(model, args, sampler, policy, options, queue, prompts, stops, single, tails, ahead)


def resolve_model(model: Any) -> Model:
    """A loaded model as it is; anything else goes through `load`."""
    return model if hasattr(model, "mask_id") else load("tiny" if model is None else model)


def lay_out(
    model: Model, prompts: list[list[int]], args: Arguments, whole: bool = True
) -> tuple[Canvas, int, list[int]]:
    """The canvases of all requests, right-padded, the widest generation window, and the tail of each canvas.

    A block-causal model is fed `whole` blocks: masks beyond max_new_tokens fill the last one. They are decoded with
    early_stop=False only, and never part of an output: the tail.
    """
    mask = model.mask_id
    assert mask is not None
    longest = max(map(len, prompts))
    room = model.max_positions - longest
    default = 0 if args.infill else min(MAX_NEW_TOKENS, room)
    new = default if args.max_new_tokens is None else args.max_new_tokens
    if room < 0:
        raise DllmError(f"a prompt of {longest} tokens exceeds the model's {model.max_positions} positions")
    if new > room:
        raise DllmError(
            f"a prompt of {longest} tokens and max_new_tokens={new} exceed the model's {model.max_positions} "
            f"positions; at most {room} new tokens fit"
        )
    if args.min_new_tokens > new:
        raise DllmError(f"min_new_tokens={args.min_new_tokens} is more than max_new_tokens={new}")
    starts, rows = [], []
    for index, prompt in enumerate(prompts):
        check_ids(prompt, model.config.embedding_rows, f"prompt {index}")
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
    return canvas, max(len(r) - t - s for r, t, s in zip(rows, tails, starts, strict=True)), tails


def check_ids(ids: list[int], vocabulary: int, what: str) -> None:
    """Errors: ids outside the vocabulary."""
    bad = next((i for i in ids if not 0 <= i < vocabulary), None)
    if bad is not None:
        raise DllmError(f"{what} holds the id {bad}, outside the vocabulary")


def tail(model: Model, length: int) -> int:
    """Columns behind `length` that complete the last block of a block-causal model, as far as its positions reach."""
    return min(-length % (model.block_size or 1), model.max_positions - length)


def build_sampler(
    model: Model, args: Arguments, context: Context, stops: list[str], defaults: FamilyDefaults
) -> Sampler:
    """The sampler of a call: the named ones, then guidance, EOS options and stop rules."""
    spec = args.sampler if args.sampler is not None else defaults.sampler
    adjust = (EosLast(context.eos_ids),) if args.confidence_eos_eot_inf else ()
    inputs = Guidance(args.cfg_scale, context.mask_id) if args.cfg_scale else None
    tuned = {
        name: s.parameters for name, s in getattr(model, "sampler_settings", {}).items()
    }  # a caller's own has none
    sampler = registry.build(spec, context, Bundle(inputs=inputs, adjust=adjust), tuned)
    if args.early_stop and not args.infill:
        if stops and model.tokenizer is None:
            raise DllmError("stop strings need a tokenizer; this model has none")

        def stopped(ids: list[int]) -> bool:
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            return any(s in text for s in stops)

        stop = Stop(context.eos_ids, sampler.needs.revises, stopped if stops else None)
        sampler = sampler._replace(stop=stop)
    return sampler


@dataclass(frozen=True)
class EosLast:
    """Columns whose token is EOS or end-of-turn are committed last (LLaDA's `confidence_eos_eot_inf`)."""

    eos_ids: tuple[int, ...]

    def __call__(self, view: View, pred: Prediction) -> Prediction:
        ends = torch.zeros_like(pred.token, dtype=torch.bool)
        for eos in self.eos_ids:
            ends |= pred.token == eos
        return pred.rescored(torch.where(ends, 0.0, pred.confidence))


# -- the three calls ------------------------------------------------------------------------------------------------


def generate(model: Model | str | None = None, prompt: Any = None, **arguments: Any) -> Any:
    """Decode one prompt or a list of prompts.

    model: a loaded `Model`, a folder, a hub id, or None for the embedded model. prompt: text, ids, chat messages, or a
    list of any one of these (a ragged batch); None generates unconditionally. Further arguments: see `Arguments`.

    Returns one `Output` for one prompt, a list for a list (or for n > 1, prompt by prompt). Request i uses seed + i, so
    a row is the same alone and in a batch. Errors: `DllmError`, one line.
    """
    model = resolve_model(model)
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
    listed, single = as_list(prompt) if prompt is not None else ([_unprompted(model)], True)
    prompts = [ids for ids in (encode(model, p, args.chat) for p in listed) for _ in range(args.n)]
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
    model: Model | str | None = None, prompt: Any = None, *, drafts: bool = False, **arguments: Any
) -> Iterator[Event]:
    """Decode and yield an `Event` whenever more text is final (or, with drafts, after every forward)."""
    model = resolve_model(model)
    if isinstance(model, DiffusionGemma):
        for index, output in enumerate(_native(model, prompt, arguments)[0]):
            yield Event(index, output.text, "" if drafts else None, output.nfe, output)
        return
    yield from _run(prepare(model, prompt, arguments), drafts=drafts, stream=True)


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
    begin, length = len(job.prompts[request]), int(canvas.length[row]) - job.tails[request]
    end = int(canvas.first_masked()[row])
    if job.sampler.needs.revises:
        end = min(end, max(begin, int(tick.window.lo[row])))
    ids = canvas.ids[row, :length].tolist()
    final = job.text(ids[begin:end]).rstrip("\ufffd")
    holding = max((len(s) for s in job.stops), default=1) - 1  # a stop string may be half written
    final = final[: len(final) - holding] if holding else final
    if not drafts:
        return final, None
    mask = job.model.mask_id
    return final, "".join("▁" if t == mask else job.text([t]) for t in ids[end:])


def _nothing_to_do(job: Job, meter: Meter) -> Iterator[Event]:
    """max_new_tokens=0: the prompts come back as they are."""
    no_window = torch.zeros_like(job.queue.step)
    for i in range(len(job.prompts)):
        rows = torch.tensor([i], device=no_window.device)
        state = job.queue.take(rows)
        tick = Tick([i], state.canvas, state, None)  # type: ignore[arg-type]
        yield Event(i, "", None, 0, job.output(tick, 0, meter, None))


def new_trace(job: Job, request: int) -> Trace:
    return Trace(list(job.prompts[request]), job.queue.canvas.mask_id, job.sampler.spec)


def record(trace: Trace, tick: Tick, row: int) -> None:
    """Add one forward to a row's trace."""
    trace.commits.append(changes(tick.before, tick.state.canvas, row))
    trace.windows.append([int(tick.window.lo[row]), int(tick.window.hi[row])])
    trace.lengths.append(int(tick.state.canvas.length[row]))


def seal(trace: Trace, job: Job, tick: Tick, row: int) -> None:
    """Keep the final canvas and the text of its tokens."""
    canvas = tick.state.canvas
    hidden = job.tails[tick.request[row]] if job.args.early_stop else 0
    trace.final = canvas.ids[row, : int(canvas.length[row]) - hidden].tolist()
    if job.model.tokenizer is not None:
        ids = {*trace.final, *trace.prompt, *(t for pairs in trace.commits for _, t in pairs)} - {trace.mask_id}
        trace.pieces = {i: job.model.tokenizer.decode([i]) for i in sorted(ids)}


@torch.inference_mode()
def score(
    model: Model | str | None,
    prompt: Any,
    answer: Any,
    *,
    samples: int = 128,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
) -> float:
    """Monte-Carlo lower bound of ln p(answer | prompt), in nats (LLaDA, arXiv 2502.09992, appendix B.5).

    Each sample masks l of the L answer tokens, l stratified over 1..L, and weighs the log-probabilities at the masks by
    L / l. The prompt stays whole. With cfg_scale the guided distribution is scored.

    Errors: an empty answer, mask tokens, ids outside the vocabulary, more tokens than the model has positions.
    """
    Arguments(cfg_scale=cfg_scale, seed=seed, batch_size=batch_size, chat=chat)  # checks them
    model = resolve_model(model)
    mask = model.mask_id
    if mask is None:
        raise DllmError("this model has no mask id: it is not a masked-diffusion model")
    head = encode(model, prompt, chat) if prompt is not None else _unprompted(model)
    tail = encode(model, answer, False)
    if not tail:
        raise DllmError("the answer to score is empty")
    device, size, room = model.device, len(tail), model.max_positions - len(head)
    check_ids(head, model.config.embedding_rows, "the prompt")
    check_ids(tail, model.vocab_size, "the answer")
    if mask in head + tail:
        raise DllmError("a prompt and an answer to score hold no mask tokens")
    if size > room:
        raise DllmError(
            f"an answer of {size} tokens behind {len(head)} exceeds the model's {model.max_positions} positions"
        )
    if model.shift and not head:
        raise DllmError("with shifted logits position 0 cannot be predicted: pass a prompt of at least one token")
    if samples < 1:
        raise DllmError(f"samples={samples} must be at least 1")
    text = torch.tensor(head + tail, device=device)
    counts = 1 + (torch.arange(samples, device=device) * size + size // 2) // samples % size  # stratified over 1..L
    columns = torch.arange(size, device=device)
    key, sample = torch.full((1, 1), seed, device=device), torch.arange(samples, device=device)[:, None]
    keys = noise.uniform(key, sample, columns[None], noise.ORDER)
    masked = keys.argsort(1).argsort(1) < counts[:, None]  # (samples, L)
    source = model.source(columns + len(head))
    total = 0.0
    for part, count in zip(masked.split(batch_size), counts.split(batch_size), strict=True):
        rows = text.repeat(len(part), 1)
        rows[:, len(head) :] = torch.where(part, mask, rows[:, len(head) :])
        logits = model.logits(model.forward(rows, None)[:, source])
        if cfg_scale:
            blank = rows.clone()
            blank[:, : len(head)] = mask
            free = model.logits(model.forward(blank, None)[:, source])
            logits = free + (cfg_scale + 1) * (logits - free)
            logits[..., mask] = -torch.inf
        log_p = logits.log_softmax(-1).gather(-1, text[len(head) :].expand(len(part), -1)[..., None])[..., 0]
        total += float(((log_p * part).sum(1).double() * size / count).sum())
    return total / samples


__all__ = ["Event", "Output", "generate", "score", "stream"]
