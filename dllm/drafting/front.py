"""The front door of drafting: prompts in, results out; the only place here that tokenises."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
import timeit
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from types import CellType, FunctionType
from typing import TypedDict, TypeVar, Unpack, overload

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dllm.call.arguments import RULES
from dllm.call.prompts import Ids, One, Padding, Prompt, Several, Text, joined, listed_ids, read
from dllm.decoding.stopping import Stops
from dllm.drafting.accept import Judge, Processors
from dllm.drafting.config import SpecConfig
from dllm.drafting.control import Controller, CostAware
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.loop import Streamer, decode
from dllm.drafting.pair_head import PairHeadLike
from dllm.drafting.proposal import EMPTY, Proposal, chain
from dllm.drafting.registry import DrafterLike, VerifierLike, as_drafter, as_verifier
from dllm.drafting.request import Request, SpecResult
from dllm.drafting.search import PathSearch
from dllm.drafting.store import StoreLike
from dllm.drafting.trim import KeepLike
from dllm.drafting.verifier import Pending, Verifier
from dllm.drafting.window import WindowLike
from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.models.tokenizer import Tokenizer, by_template

T = TypeVar("T")


class SpecOptions(TypedDict, total=False):
    """The fields of `SpecConfig` as keywords."""

    search: str | Mapping[str, object] | PathSearch | None
    tree: int
    length: str | Mapping[str, object] | Controller
    k: int | None
    carry: str
    reuse_min: int
    order: int
    ngrams: str
    decay: float
    corpus: Sequence[Sequence[int]] | str | Path
    store: StoreLike
    tau_mass: float
    m_max: int
    graphs: bool | None
    verify: str
    pair_head: PairHeadLike
    graft: DrafterLike | Sequence[DrafterLike]
    trim: KeepLike
    window: WindowLike


class SpeculateOptions(SpecOptions, total=False):
    """The keywords of `speculate` beside the prompt."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    eos: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    seed: int | None
    logits_processor: Sequence[Processors] | None
    streamer: Streamer | None
    tokenizer: Tokenizer | None
    chat: bool | None
    spec: SpecConfig | Mapping[str, object] | None
    controller: Controller | None


@overload
def speculate(
    verifier: VerifierLike, drafter: DrafterLike = None, prompt: One = ..., **options: Unpack[SpeculateOptions]
) -> SpecResult: ...
@overload
def speculate(
    verifier: VerifierLike, drafter: DrafterLike = None, prompt: Several = ..., **options: Unpack[SpeculateOptions]
) -> list[SpecResult]: ...
@overload
def speculate(
    verifier: VerifierLike,
    drafter: DrafterLike = None,
    prompt: Prompt | None = None,
    *,
    input_ids: Ids | None = None,
    attention_mask: Ids | None = None,
    **options: Unpack[SpeculateOptions],
) -> SpecResult | list[SpecResult]: ...
def speculate(
    verifier: VerifierLike,
    drafter: DrafterLike = None,
    prompt: Prompt | None = None,
    *,
    input_ids: Ids | None = None,
    attention_mask: Ids | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    logits_processor: Sequence[Processors] | None = None,
    streamer: Streamer | None = None,
    tokenizer: Tokenizer | None = None,
    chat: bool | None = None,
    spec: SpecConfig | Mapping[str, object] | None = None,
    controller: Controller | None = None,
    **options: Unpack[SpecOptions],
) -> SpecResult | list[SpecResult]:
    """Decode `prompt` with an autoregressive verifier, drafted by a dLLM (or anything else), without changing its
    output (token for token in float64, and in float32 but for ties; docs/decoding.md).

    verifier   a transformers causal LM, a `Verifier`, "tiny-ar", a folder or a Hugging Face id.
    drafter    a loaded dLLM, a head over the verifier's states, a transformers causal LM, a `Drafter`, "suffix" |
               "lookup" | "recycle" | "stand" or the name of one from another package, a folder or a Hugging Face id, or
               None (plain decoding).
    prompt     text (through the chat template where there is one, see `chat`), ids, chat messages, a list of these (a
               batch), or what a tokenizer returns, padded on either side; or input_ids, attention_mask.
    temperature, top_k, top_p, logits_processor, eos, stop, seed   the verifier's law and limits; request i uses
               seed + i.
    spec, options   `SpecConfig` or its fields: search, tree, length, k, carry, order, graft, store, trim, ...
    controller   a length controller to keep its measurements from call to call.

    Returns a `SpecResult` per prompt. Raises DllmError for a verifier that cannot be rolled back and other mistakes of
    input.
    """
    cfg = SpecConfig.of(spec, options, [*inspect.signature(speculate).parameters][:-1])
    _check(tokenizer, streamer, logits_processor)
    optional = {"top_k": top_k or None, "top_p": top_p, "seed": seed, "chat": chat}  # 0 is no top-k, as in transformers
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {"max_new_tokens": max_new_tokens, "temperature": temperature, **given}.items():
        RULES[name].check(name, value)
    v = as_verifier(verifier, tokenizer)
    d = as_drafter(drafter)
    ids, many = encode(v, joined(prompt, input_ids, attention_mask), chat)
    if streamer is not None and len(ids) > 1:
        raise DllmError("a streamer follows one text: pass one prompt")
    end = v.eos if eos is None else frozenset(listed_ids("eos", eos, v.vocab))
    stops = Stops.of(end, stop, v.tokenizer)
    begun, requests = time.perf_counter(), []
    theirs = own_processors(v, ids, max_new_tokens)
    for i, p in enumerate(ids):
        own = separate(logits_processor or []) if len(ids) > 1 else logits_processor or []
        law = sampling(temperature, top_k, top_p, [*theirs[i], *own])
        generator = None if seed is None else torch.Generator().manual_seed(seed + i)
        stopped = partial(_stopped, stops, len(p)) if stops.strings else None
        limit = len(p) + max_new_tokens
        requests.append(Request(p, limit, end, temperature > 0, law.processors, law.warp, stopped, generator))
    controller = controller or shared_controller(v, d, cfg, temperature > 0)
    results = decode(v, d, requests, cfg, controller, streamer, begun=begun)
    for r in results:
        _end(r, stops)
    return results if many else results[0]


def _check(tokenizer: object, streamer: object, processors: object) -> None:
    """Errors: an argument that is another object than its name says."""
    if tokenizer is not None and not hasattr(tokenizer, "decode"):  # foreign
        raise DllmError(f"tokenizer= is a loaded tokenizer, not {type(tokenizer).__name__}")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):  # foreign
        raise DllmError(f"streamer= has the methods put and end, as transformers' TextStreamer; got {streamer!r}")
    if not isinstance(processors, Sequence | None) or not all(map(callable, processors or ())):
        raise DllmError(f"logits_processor is a list of processors, not {processors!r}")


def shared_controller(verifier: Verifier, drafter: Drafter | None, cfg: SpecConfig, sampled: bool) -> Controller:
    """The controller of a pair: costs and calibration outlive a call, kept while all lives that drafts are made of."""
    if isinstance(cfg.length, Controller):
        return cfg.length
    grafts: Sequence[object] = cfg.graft if isinstance(cfg.graft, list | tuple) else [cfg.graft]
    parts: list[object] = [drafter, cfg.search, cfg.pair_head, *grafts]
    parts = [p.owner if isinstance(p, Drafter) and p.owner is not None else p for p in parts]
    named = [_is_value(p) for p in parts]
    known = tuple(str(p) if name else id(p) for p, name in zip(parts, named, strict=True))
    key = known, sampled, str(cfg.length), cfg.tree, hash(cfg.trim), cfg.window
    kept = verifier.controllers
    if key not in kept:
        kept[key] = cfg.build_controller()
        for part, name in zip(parts, named, strict=True):
            if not name:  # its number goes to another object once it is gone
                weakref.finalize(part, kept.pop, key, None).atexit = False
    return kept[key]


def _is_value(part: object) -> bool:
    """Whether a text says all of it; else it is known by its identity."""
    plain = isinstance(part, str | PathLike | Mapping | Checkpoint | None)
    return plain or (isinstance(part, PathSearch) and is_dataclass(part))


@dataclass(frozen=True)
class Warp:
    """Processors that do not look at the text, one after the other: logits (n, V) -> (n, V). Those of equal `value`,
    kinds and settings, are equal, so that work which was captured for one call serves the next."""

    value: tuple[Hashable, ...]
    processors: tuple[Processors, ...] = field(compare=False)

    def __call__(self, logits: Tensor) -> Tensor:
        dummy = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        for p in self.processors:
            logits = p(dummy, logits)
        return logits


@dataclass(frozen=True)
class Processing:
    """The verifier's processors, and those of them that do not look at the text (they also shape a sampled draft);
    `processors` is None where these are all."""

    processors: LogitsProcessorList | None
    warp: Callable[[Tensor], Tensor] | None


PREFIX_FREE = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper",
)  # fmt: skip


def processing(processors: Sequence[Processors]) -> Processing:
    """Split a transformers LogitsProcessorList."""
    free = [p for p in processors if type(p).__name__ in PREFIX_FREE]
    value = tuple((type(p), *sorted(vars(p).items())) for p in free)
    whole = LogitsProcessorList(processors) if len(free) < len(processors) else None
    return Processing(whole, Warp(value, tuple(free)) if free else None)


# of transformers' own processors and criteria, those that remember what they have seen
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


def separate(things: Sequence[T]) -> list[T]:
    """Processors or criteria for one row of a batch: what may count or remember is copied, its models are shared.

    The copies start where the originals stand. Raises DllmError for an object that cannot be copied.
    """
    memo: dict[int, object] = {}
    for thing in things:
        for value in (thing, *getattr(thing, "__dict__", {}).values()):  # foreign
            if isinstance(value, nn.Module):
                memo[id(value)] = value
            elif isinstance(value, FunctionType) and value.__closure__:
                memo[id(value)] = _reclose(value, memo)
    out = []
    for thing in things:
        own = type(thing).__module__.startswith("transformers.") and type(thing).__name__ not in STATEFUL
        own = own and not any(map(callable, getattr(thing, "__dict__", {}).values()))  # foreign
        try:
            out.append(thing if own else copy.deepcopy(thing, memo))
        except Exception as error:  # whatever an attribute raises that cannot be copied
            raise DllmError(
                f"{type(thing).__name__} cannot be copied ({error}), and in a batch every row needs its own: "
                "generate row by row"
            ) from error
    return out


def _reclose(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """The function over copies of the variables that it closes over."""
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    cells = tuple(CellType(x if isinstance(x, nn.Module) else copy.deepcopy(x, memo)) for x in held)
    own = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def sampling(temperature: float, top_k: int | None, top_p: float | None, before: Sequence[Processors]) -> Processing:
    """temperature, top_k and top_p as transformers' own warpers, behind the processors `before`."""
    processors = [*before]
    if temperature > 0:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
    return processing(processors)


SILENT = {
    "eos_token_id", "pad_token_id", "bos_token_id", "max_length", "max_new_tokens", "do_sample", "temperature", "top_k",
    "top_p", "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
}  # fmt: skip


def own_processors(verifier: Verifier, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[Processors]]:
    """What the model's generation config adds to its greedy law (Qwen2.5's repetition penalty, suppressed tokens, ...),
    by the prompt."""
    config = getattr(verifier.model, "generation_config", None)  # foreign
    if config is None or not max_new_tokens or SILENT.issuperset(config.to_diff_dict()):
        return [[] for _ in prompts]
    return [_prepared(verifier, prompt, max_new_tokens) if prompt else [] for prompt in prompts]


def _prepared(verifier: Verifier, prompt: Sequence[int], max_new_tokens: int) -> list[Processors]:
    """`generate` is asked, which prepares its processors for a custom decoding loop; this one only takes them."""
    taken: list[Processors] = []

    def take(model: object, input_ids: Tensor, logits_processor: Iterable[Processors] = (), **_: object) -> Tensor:
        taken.extend(logits_processor)
        return input_ids

    ids = torch.tensor([list(prompt)], device=verifier.device)
    limits = dict(attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens)
    verifier.model.generate(ids, do_sample=False, custom_generate=take, **limits)
    return taken


def encode(verifier: Verifier, prompt: object, chat: bool | None = None) -> tuple[list[list[int]], bool]:
    """Prompt ids, and whether several prompts were given."""
    if prompt is None:
        raise DllmError("speculate needs a prompt: a string, ids, chat messages, or a list of these")
    config = getattr(verifier.model, "generation_config", None)  # foreign
    pad, bos = (getattr(config, name, None) for name in ("pad_token_id", "bos_token_id"))  # foreign
    padding = Padding.of(verifier.tokenizer, pad, (*verifier.eos, bos))
    ids, single = read(prompt, partial(_encode_one, verifier, chat), padding)
    return ids, not single


def _encode_one(verifier: Verifier, chat: bool | None, prompt: Text) -> list[int]:
    tokenizer = verifier.tokenizer
    if tokenizer is None:
        raise DllmError("the verifier came without a tokenizer: pass tokenizer=..., or the prompt as ids")
    templated = bool(getattr(tokenizer, "chat_template", None))  # foreign
    if isinstance(prompt, str) and not (templated if chat is None else chat):
        return list(tokenizer(prompt)["input_ids"])
    if not templated:
        raise DllmError("the verifier's tokenizer has no chat template: pass plain text or ids")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return list(by_template(tokenizer, messages, add_generation_prompt=True))


def _stopped(stops: Stops, prompt: int, ids: list[int]) -> bool:
    """Whether the last id completes a stop string."""
    return stops.ended(ids[prompt:], len(ids) - 1 - prompt)


def _end(result: SpecResult, stops: Stops) -> None:
    """Text, tokens and reason by the contract of all front doors."""
    begin = result.prompt_length
    cut = stops.cut(result.emitted)
    result.text = None if stops.tokenizer is None else cut.text
    if cut.stopped:
        result.finish_reason, result.end = "stop", begin + len(cut.tokens)
        del result.sequences[begin + cut.through :]


def calibrate(
    verifier: VerifierLike,
    drafter: DrafterLike = None,
    prompt: Sequence[int] | None = None,
    lengths: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64),
    repeats: int = 3,
    timer: Callable[[], float] = timeit.default_timer,
) -> CostAware:
    """A cost controller with measured tables: the median of `repeats` forwards per length behind `prompt` (default 32
    tokens)."""
    v = as_verifier(verifier)
    d = as_drafter(drafter)
    ids = list(prompt or [min(5, v.vocab - 1)] * 32)
    controller = CostAware(k_max=max(lengths) or 1)
    session = v.open()
    session.verify([Pending(ids[:-1], EMPTY)], () if d is None else d.taps)
    (states,) = session.commit([()])

    def verify(draft: Proposal) -> None:
        (logits,) = session.verify([Pending(ids[-1:], draft)])
        assert logits is not None
        Judge().ask(draft, logits).tolist()  # until the device is done
        session.commit([()])

    if d is not None:
        d = d.fork()
        d.reset(ids, Need(v.vocab, v.eos, tokenizer=v.tokenizer, model=v.model))
        if states is not None:
            d.take(states, 0)
    for n in lengths:
        controller.verify.add(1 + n, _median_seconds(partial(verify, chain(ids[:1] * n)), repeats, timer))
        if d is not None and n:
            controller.draft.add(n, _median_seconds(partial(d.draft, ids, n), repeats, timer))
    return controller


def _median_seconds(call: Callable[[], object], repeats: int, timer: Callable[[], float]) -> float:
    return statistics.median(timeit.repeat(call, repeat=repeats, number=1, timer=timer))
