"""The front door: `generate`, `stream`, `score`. Prompts in, outputs out; the only place that tokenises."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch

from dllm.call.prompts import Padding, check_ids, joined, listed_ids, read, read_one
from dllm.decoding import noise
from dllm.decoding.cache import policy as caches
from dllm.decoding.canvas import Canvas, Decision, State, scatter
from dllm.decoding.engine import Options, Runner, Tick, decode
from dllm.decoding.guidance import Guidance
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law, Prediction
from dllm.decoding.stopping import Stop, Stops, stop_strings
from dllm.decoding.trace import BLANK, Trace, changes
from dllm.errors import DllmError, nearest, out_of_memory, unknown
from dllm.lookahead.walk import Lookahead, Stats, Walk
from dllm.models.diffusion_gemma import DiffusionGemma
from dllm.models.hub import Model, load
from dllm.models.model import NO_TOKENIZER
from dllm.samplers import registry
from dllm.samplers.base import Bundle, Context, Sampler, View

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class FamilyDefaults:
    """What a call uses where it says nothing."""

    sampler: str = "confidence"
    block_length: int | None = 32  # None: the model's own block, else the whole window


# LLaDA's instruct scores use blocks; Dream decodes the whole window on its own schedule; block-causal models decode
# their own blocks by threshold, at the values of their model cards (Dream's reasoner has none and takes no risk).
DEFAULTS: dict[str, FamilyDefaults] = {
    "dream": FamilyDefaults("dream", None),
    "sdar": FamilyDefaults("threshold:tau=0.85", None),
    "llada2": FamilyDefaults("threshold:tau=0.95", None),
    "fast_dllm": FamilyDefaults("fast_dllm_v2:tau=0.9", None),
}

# names of other codes -> ours
RENAMED = {
    **dict.fromkeys(("gen_length", "max_length", "max_tokens", "max_gen_toks"), "max_new_tokens"),
    **dict.fromkeys(("remasking", "alg", "algorithm"), "sampler"),
    **dict.fromkeys(("diffusion_steps", "num_steps", "gen_steps"), "steps"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("num_return_sequences", "best_of"), "n"),
    **dict.fromkeys(("eos_token_id", "stop_token_ids"), "eos"),
    **dict.fromkeys(("inputs", "prompts", "messages", "text"), "prompt"),
    "threshold": "sampler='threshold:tau=...'",
    "factor": "sampler='factor:f=...'",
    "alg_temp": "sampler='dream:alg_temp=...'",
    "use_cache": "cache='prefix'",
    "dual_cache": "cache='dual'",
    "cfg": "cfg_scale",
    "do_sample": "temperature",
    "generator": "seed",
    "min_length": "min_new_tokens",
    "output_history": "trace=True",
    **{
        name: f"dllm.load(..., {name}=...)"
        for name in ("mask_id", "tokenizer", "device", "dtype", "revision", "backend")
    },
}

_IDS = "suppress_tokens= bans single ids, and the `adjust` of a sampler changes scores (docs/adding-a-sampler.md)"
_GRAMMAR = "there is no constrained decoding; infill=True fills the holes of a given text"
_PROBABILITIES = "dllm.score bounds the likelihood of an answer, trace=True records the confidence of every commit"

# what people ask for by names that have no counterpart -> what there is
EXISTS = {
    **dict.fromkeys(("streamer", "stream"), "dllm.stream(model, prompt) yields text as it becomes final"),
    **dict.fromkeys(("logits_processor", "bad_words_ids", "repetition_penalty", "no_repeat_ngram_size"), _IDS),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "logit_bias"), _IDS),
    **dict.fromkeys(
        ("grammar", "guided_json", "guided_regex", "response_format", "prefix_allowed_tokens_fn"), _GRAMMAR
    ),
    **dict.fromkeys(("logprobs", "output_scores", "output_logits", "return_dict_in_generate"), _PROBABILITIES),
    "stopping_criteria": "stop= takes strings, eos= token ids, max_nfe= bounds the forwards",
    "generation_config": "its fields are arguments here (max_new_tokens, temperature, top_p, top_k, eos, ...)",
    **dict.fromkeys(("num_beams", "num_beam_groups"), "a canvas has no beams; n= gives several answers"),
    "assistant_model": "dllm.speculate drafts for an autoregressive model",
    "past_key_values": "cache= names a policy of the block cache, which lives for one call",
    "pad_token_id": "attention_mask= says what is padding",
    "token_type_ids": "a text needs none; the tokenizer's output is taken whole: dllm.generate(model, encoding)",
}


class Rule(NamedTuple):
    """What an argument may be."""

    kind: type
    holds: Callable[[Any], bool]
    says: str

    def check(self, name: str, value: Any) -> None:
        wrong = not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool)
        if wrong or not self.holds(value):
            raise DllmError(f"{name}={value!r} must be {self.says}")


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
    """Every decoding argument with its default (docs/decoding.md). Errors name the argument and what it may be."""

    sampler: Any = None  # a name, "name:key=value", "a+b", a mapping or a list of these; None: the family's
    cache: Any = None  # a policy, in the same forms; None: the model's (docs/caches.md)
    max_new_tokens: int | None = None  # columns behind the prompt; None: 128 or what fits, 0 with infill
    block_length: int | None = None  # columns decoded before the next ones; None: the model's, else the family's
    steps: int | None = None  # forwards over the whole window (quota samplers); None: one token a step
    temperature: float = 0.0  # 0 is greedy
    top_p: float | None = None  # nucleus
    top_k: int | None = None
    gumbel: bool = False  # draw by Gumbel noise instead of the inverse CDF: the same law, other draws
    cfg_scale: float = 0.0  # classifier-free guidance; 0 is off
    seed: int = 0  # request i uses seed + i
    n: int = 1  # answers per prompt
    stop: str | Sequence[str] | None = None  # strings that end the answer
    eos: int | Sequence[int] | None = None  # ids that end it; None: the model's
    min_new_tokens: int = 0  # no end token in the first columns
    suppress_tokens: Sequence[int] = ()  # ids that are never predicted
    logits_eos_inf: bool = False  # end tokens are never predicted (LLaDA)
    confidence_eos_eot_inf: bool = False  # columns that predict an end token are committed last (LLaDA)
    early_stop: bool = True  # False: every column is decoded, as in the public codes
    lookahead: int | str | dict[str, Any] | None = None  # rows of exact verification (docs/lookahead.md)
    batch_size: int = 8  # rows decoded at a time
    chat: bool | None = None  # whether text goes through the chat template; None: where there is one
    infill: bool = False  # fill the mask tokens inside the prompt
    trace: bool = False  # record what each forward committed
    compile: bool = False  # torch.compile of the backbone
    max_nfe: int | None = None  # forwards a row may take; None: 4 a column, and 64

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            rule.check(name, value)
        stop_strings(self.stop)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Arguments:
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise unknown("argument", name, cls.__dataclass_fields__, hint=counterpart(name))
        return cls(**given)


def counterpart(name: str) -> str:
    """What a hint says of an argument that other codes have: its name here, or what there is instead."""
    if name in RENAMED:
        return f": here it is {RENAMED[name]}"
    if name in EXISTS:
        return f": {EXISTS[name]}"
    near = nearest(name, [*Arguments.__dataclass_fields__, *RENAMED])
    return f"; did you mean {near!r}? Here that is {RENAMED[near]}" if near in RENAMED else ""


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


def prompt_ids(model: Model, prompt: Any, chat: bool | None = None) -> tuple[list[list[int]], bool]:
    """Token ids of the prompts of a call, and whether it was a single one; None starts from nothing."""
    if prompt is None:
        return [_unprompted(model)], True
    return read(prompt, partial(encode, model, chat=chat), _padding(model))


def encode(model: Model, prompt: Any, chat: bool | None) -> list[int]:
    """Token ids of text or chat messages. Text goes through the chat template where there is one (chat=None)."""
    if model.tokenizer is None:
        raise DllmError(f"this model has no tokenizer ({NO_TOKENIZER}): pass ids, or load it with tokenizer=")
    if not isinstance(prompt, str):
        return model.chat(prompt)
    if chat or (chat is None and getattr(model.tokenizer, "chat_template", None)):
        return model.chat([{"role": "user", "content": prompt}])
    return list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _padding(model: Model) -> Padding:
    return Padding.of(model.tokenizer, model.pad_id, (*model.eos_ids, model.bos_id, model.mask_id))


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
    blank = getattr(model, "relative", False) and any(set(p) <= {model.mask_id} for p in prompts)
    options = Options(law, suppress, args.min_new_tokens, eos, args.max_nfe, blank)
    seeds = torch.arange(len(prompts), device=model.device) + args.seed
    memory, columns = sampler.start(canvas)
    zero, asked = torch.zeros_like(seeds), torch.tensor(windows, device=model.device)
    queue = State(canvas, zero, seeds, asked, zero - 1, zero.bool(), zero.bool(), memory, columns)
    spec = sampler.lookahead if args.lookahead is None else args.lookahead
    ahead = None if spec is None else Lookahead.parse(spec).settle(model, sampler)
    return Job(model, args, sampler, policy, options, queue, prompts, stops, single, tails, ahead)


def resolve_model(model: Any) -> Model:
    """A loaded model as it is; anything else goes through `load`."""
    return model if hasattr(model, "mask_id") else load("tiny" if model is None else model)


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
    settings = getattr(model, "sampler_settings", {})  # a caller's own model has none
    tuned = {name: s.parameters for name, s in settings.items()}
    sampler = registry.build(spec, context, Bundle(inputs=inputs, adjust=adjust), tuned)
    if args.early_stop and not args.infill:
        sampler = sampler._replace(stop=Stop(stops, sampler.needs.revises))
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


@dataclass(frozen=True)
class Confidences:
    """Notes of a trace: per column the model's probability of the token that stands there, NaN where none is known.

    It is the last in the chain of amendments and changes nothing.
    """

    key: ClassVar[str] = "trace.confidence"

    def columns(self, canvas: Canvas) -> dict[str, torch.Tensor]:
        return {self.key: torch.full(canvas.ids.shape, torch.nan, device=canvas.ids.device)}

    def __call__(self, view: View, pred: Prediction, d: Decision) -> Decision:
        table = torch.where(view.canvas.masked | d.write, torch.nan, view.columns[self.key])
        logit = pred.logits.gather(-1, view.gather(d.token)[..., None])[..., 0]
        table = view.scatter(table, pred.probability_of(logit), view.gather(d.write) & (view.cols >= 0))
        if d.fill is not None:
            cols = caches.indices(view.canvas.apply(d).masked & d.fill[:, None])
            wide = pred.at(cols)
            table = table if wide is None else scatter(table, cols, wide.confidence.to(table.dtype))
        view.columns[self.key] = table
        return d


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


def record(trace: Trace, tick: Tick, row: int) -> None:
    """Add one forward to a row's trace."""
    pairs = changes(tick.before, tick.state.canvas, row)
    sure = tick.state.columns[Confidences.key][row].tolist()
    trace.commits.append(pairs)
    trace.confidence.append([None if math.isnan(sure[col]) else round(sure[col], 6) for col, _ in pairs])
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
    prompt: Any = None,
    answer: Any = None,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    samples: int = 128,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
) -> float:
    """Monte-Carlo lower bound of ln p(answer | prompt), in nats (LLaDA, arXiv 2502.09992, appendix B.5).

    Each sample masks l of the L answer tokens, l stratified over 1..L from a keyed offset, and weighs the log-
    probabilities at the masks by L / l. The prompt stays whole. With cfg_scale the guided distribution is scored.

    prompt, answer: one text each, as `generate` takes them; None (or an empty text) as prompt starts from nothing.

    Errors: an empty answer, mask tokens, ids outside the vocabulary, more tokens than the model has positions.
    """
    Arguments(cfg_scale=cfg_scale, seed=seed, batch_size=batch_size, chat=chat)  # checks them
    _at_least(1).check("samples", samples)
    model = resolve_model(model)
    mask = model.mask_id
    if mask is None:
        raise DllmError("this model has no mask id: it is not a masked-diffusion model")
    if answer is None:
        raise DllmError("score needs an answer: dllm.score(model, prompt, answer)")
    prompt, padding = joined(prompt, input_ids, attention_mask), _padding(model)
    reads = partial(encode, model, chat=chat)
    head = _unprompted(model) if prompt is None else read_one(prompt, reads, padding, "the prompt to score")
    tail = read_one(answer, partial(encode, model, chat=False), padding, "the answer to score")
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
    text = torch.tensor(head + tail, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    draw = noise.uniform(zero + seed, zero, zero, noise.TRANSFER)
    offset = (draw * size).long()  # of the strata: each l is as likely, whatever `samples` is
    counts = 1 + (torch.arange(samples, device=device) * size + offset) // samples  # stratified over 1..L
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
