"""The loop: draft, search, verify, commit, adapt. One loop for every drafter, search, controller and verifier.

    while rows:
        proposals = [row.propose() for row in rows]      # drafter -> lattice -> path search -> controller's trim
        logits = session.verify(proposals)               # one forward of the verifier
        row.settle(judge(proposal, logits))              # exact acceptance, cut at end tokens and stop strings
        session.commit(accepted paths)                   # the cache forgets the rest

The output is the verifier's own, whatever is drafted: token for token when greedy, in law when sampling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dllm.drafting.accept import Verdict, judge
from dllm.drafting.control import CONTROLLERS, CostAware, LengthController, RoundStats
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import DraftFailure, Lattice
from dllm.drafting.ngram import CausalProxy, NgramTable
from dllm.drafting.proposal import EMPTY, Proposal
from dllm.drafting.registry import as_drafter, as_verifier, named
from dllm.drafting.search import SEARCHES, BestFirstTree, PathSearch, Sample, graft
from dllm.drafting.verifier import Pending, Session, Verifier
from dllm.errors import DllmError, unknown

log = logging.getLogger(__name__)
Processors = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SpecConfig:
    """How to speculate. Nothing here changes what is generated, only how fast.

    search   None: `eal` when greedy, `sample` at T > 0; or a name, "name:key=value,…", a mapping, or an object.
    tree     node budget of a tree; 0 = chain.
    length   length controller, given like `search`.
    k        most slots per draft; None leaves it to the controller.
    carry    unused slots of a draft: "auto" (reused where the controller expects more from them than from a fresh
             draft), "always", "off". Exact in every case: the lattice is carried over, not the tokens.
    order    of the n-gram proxy over prompt and output; 0 = no proxy. `corpus`: id sequences to fit it on as well.
    graft    a retrieval drafter whose continuations are grafted into point trees.
    """

    search: Any = None
    tree: int = 0
    length: Any = "cost"
    k: int | None = None
    carry: str = "auto"
    reuse_min: int = 2
    order: int = 3
    decay: float = 1.0
    corpus: tuple[tuple[int, ...], ...] = ()
    tau_mass: float = 0.8
    m_max: int = 15
    graft: Any = None

    def __post_init__(self) -> None:
        if self.carry not in ("auto", "always", "off"):
            raise unknown("carry policy", str(self.carry), ("auto", "always", "off"))
        if self.tree < 0 or self.order < 0 or self.reuse_min < 1:
            raise DllmError("tree and order must not be negative, reuse_min must be at least 1")
        if self.k is not None and self.k < 0:
            raise DllmError(f"k must not be negative, got {self.k}")

    @classmethod
    def of(cls, base: SpecConfig | Mapping[str, Any] | None, options: Mapping[str, Any]) -> SpecConfig:
        """A config from an object or mapping and keyword options; an unknown key names its nearest neighbour."""
        base = cls.of(None, base) if isinstance(base, Mapping) else base or cls()
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise unknown("option of speculate", key, known)
        return replace(base, **options)

    def build_search(self, do_sample: bool) -> PathSearch:
        if self.tree:
            if isinstance(self.search, str) and self.search.split(":")[0] == "sample_tree":
                return named("search", self.search, SEARCHES)
            lam = getattr(named("search", self.search, SEARCHES), "lam", 1.0) if self.search else 0.5
            return self.search if isinstance(self.search, BestFirstTree) else BestFirstTree(self.tree, lam)
        if self.search is None:
            return Sample() if do_sample else SEARCHES["eal"]()
        return named("search", self.search, SEARCHES)

    def build_controller(self) -> LengthController:
        controller = named("length controller", self.length, CONTROLLERS)
        if self.k is not None:
            controller = controller.fork()
            controller.k_max = (
                min(controller.k_max, self.k) if not isinstance(controller, CONTROLLERS["fixed"]) else self.k
            )
        return controller


@dataclass
class SpecResult:
    """One decoded prompt. Lengths in tokens, times in seconds."""

    sequences: list[int]  # prompt and output
    prompt_length: int
    finish_reason: str = "length"  # stop | length
    text: str | None = None
    rounds: list[RoundStats] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (accepted, emitted) per round, as printed
    seconds: float = 0.0

    @property
    def tokens(self) -> list[int]:
        return self.sequences[self.prompt_length :]

    @property
    def n_verify(self) -> int:
        return len(self.rounds)

    @property
    def n_draft(self) -> int:
        return sum(r.k > 0 and not r.carried for r in self.rounds)

    @property
    def n_carried(self) -> int:
        return sum(r.carried for r in self.rounds)

    @property
    def draft_forwards(self) -> int:
        return sum(r.forwards for r in self.rounds)

    @property
    def draft_failures(self) -> int:
        return sum(r.failed for r in self.rounds)

    @property
    def tau(self) -> float:
        """Tokens emitted per verifier forward, bonus included (the papers' tau or MAT)."""
        return sum(r.emitted for r in self.rounds) / max(1, self.n_verify)

    @property
    def accepted_per_round(self) -> float:
        """Accepted drafts per verifier forward, without the bonus token."""
        return sum(r.accepted for r in self.rounds) / max(1, self.n_verify)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / submitted tokens."""
        return sum(r.accepted for r in self.rounds) / max(1, sum(r.nodes for r in self.rounds))

    @property
    def per_slot_acceptance(self) -> list[float]:
        """P(slot i is accepted | it was judged): slots behind a rejection are not counted."""
        judged: dict[int, list[bool]] = {}
        for r in self.rounds:
            for slot, _, accepted in r.observed:
                judged.setdefault(slot, []).append(accepted)
        return [sum(judged[i]) / len(judged[i]) for i in sorted(judged)]

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def wall(self) -> dict[str, float]:
        """Seconds per stage."""
        names = ("draft", "search", "verify", "commit", "other")
        return {name: sum(getattr(r, f"t_{name}") for r in self.rounds) for name in names}

    def speedup_vs(self, baseline: SpecResult | float) -> float:
        """Wall-clock ratio to a plain run of the same text (a result, or its seconds)."""
        seconds = baseline.seconds if isinstance(baseline, SpecResult) else baseline
        return seconds / self.seconds

    def metrics(self) -> dict[str, float]:
        return {
            "tokens": len(self.tokens),
            "verify calls": self.n_verify,
            "draft calls": self.n_draft,
            "draft forwards": self.draft_forwards,
            "carried drafts": self.n_carried,
            "draft failures": self.draft_failures,
            "tau (with bonus)": self.tau,
            "accepted per round": self.accepted_per_round,
            "acceptance rate": self.acceptance_rate,
            "tokens per second": self.tokens_per_s,
            **{f"seconds {k}": v for k, v in self.wall.items()},
        }


@dataclass
class Request:
    """One text to decode: ids, limits and the verifier's law."""

    ids: list[int]
    max_length: int
    eos: frozenset[int] = frozenset()
    do_sample: bool = False
    processors: Processors | None = None
    warp: Callable[[Tensor], Tensor] | None = None
    stop: Callable[[list[int]], bool] | None = None  # (all ids) -> stop behind the last one?
    generator: torch.Generator | None = None
    pad: list[int] = field(default_factory=list)  # left padding that the processors of a batch expect to see


class Row:
    """The host side of one text."""

    def __init__(
        self,
        request: Request,
        verifier: Verifier,
        drafter: Drafter | None,
        search: PathSearch,
        controller: LengthController,
        cfg: SpecConfig,
    ) -> None:
        self.request, self.verifier, self.search, self.controller, self.cfg = request, verifier, search, controller, cfg
        self.ids = list(request.ids)
        self.result = SpecResult(self.ids, len(self.ids))
        self.done = len(self.ids) >= request.max_length
        self.cached = 0
        self.drafter = drafter.fork() if drafter is not None else None
        self.retrieval = as_drafter(cfg.graft).fork() if cfg.graft is not None else None
        need = Need(
            verifier.vocab,
            request.eos,
            search.sampled,
            request.warp,
            cfg.tau_mass,
            cfg.m_max,
            cfg.tree,
            verifier.max_positions,
        )
        for d in (self.drafter, self.retrieval):
            if d is not None:
                d.reset(self.ids, need)
        self.proxy: CausalProxy | None = None
        self.counted = 0
        self.chunks: list[tuple[int, Lattice]] = []  # (offset in the draft, lattice)
        self.rest: Lattice | None = None
        self.proposal = EMPTY
        self.stats = RoundStats()

    def propose(self) -> Proposal:
        """What to verify next."""
        start = time.perf_counter()
        r = self.stats = RoundStats(pending=len(self.ids) - self.cached)
        limit = min(self.request.max_length, self.verifier.max_positions or self.request.max_length)
        room = limit - len(self.ids) - 1
        self.chunks = []
        self.proposal = EMPTY
        if self.drafter is not None and room > 0:
            before = self.drafter.forwards
            try:
                self.proposal = self._draft(room)
            except DraftFailure as failure:
                log.debug("%s: %s", self.drafter.name, failure)
                r.failed, self.chunks, self.proposal = True, [], EMPTY
            r.forwards = self.drafter.forwards - before
        self.rest = None
        r.nodes, r.kind = len(self.proposal), self.proposal.kind if len(self.proposal) else "none"
        r.t_search = time.perf_counter() - start - r.t_draft
        return self.proposal

    def _draft(self, room: int) -> Proposal:
        r = self.stats
        k = self.controller.next_k(room)
        if k <= 0:
            return EMPTY
        rest = self._carried(room)
        if rest is not None:
            r.carried, r.k = True, rest.k
            proposal = self._search(rest, 0)
        else:
            proposal = self._fresh(self.ids, k, 0)
            while (
                not self.cfg.tree and len(proposal) == r.k and (more := self.controller.more(proposal.conf, room)) > 0
            ):
                addition = self._fresh([*self.ids, *proposal.tokens], more, len(proposal))
                if not len(addition):
                    break
                proposal = proposal.then(addition)
        if self.retrieval is not None and self.cfg.tree and proposal.kind == "point":
            proposal = self._graft(proposal)
        proposal = proposal.within(room, self.request.eos)
        self._check(proposal)
        return proposal.head(max(0, self.controller.trim(proposal, r.carried, 0 if r.carried else r.k)))

    def _carried(self, room: int) -> Lattice | None:
        rest, policy = self.rest, self.cfg.carry
        if rest is None or policy == "off" or rest.k < self.cfg.reuse_min:
            return None
        rest = rest.head(room)
        return rest if policy == "always" or self.controller.keep(rest.k, rest.confidence) else None

    def _fresh(self, ids: list[int], k: int, offset: int) -> Proposal:
        assert self.drafter is not None
        r, start = self.stats, time.perf_counter()
        try:
            draft = self.drafter.draft(ids, k, generator=self.request.generator)
        finally:
            r.t_draft += time.perf_counter() - start
        if not isinstance(draft, Lattice):
            r.k += len(draft)
            r.l_gen += len(draft)
            return draft
        r.k += draft.k
        r.l_gen += draft.first_eos(self.request.eos)
        return self._search(draft, offset)

    def _search(self, lat: Lattice, offset: int) -> Proposal:
        if self.stats.carried:
            self.stats.l_gen = lat.first_eos(self.request.eos)
        if not lat.k:
            return EMPTY
        self.chunks.append((offset, lat))
        context = self.ids if not offset else [*self.ids, *self.proposal.tokens]
        return self.search(lat, context, eos=self.request.eos, proxy=self._proxy(), generator=self.request.generator)

    def _proxy(self) -> CausalProxy | None:
        if self.cfg.order < 2 or getattr(self.search, "lam", 1.0) >= 1:
            return None
        if self.proxy is None:
            base = _corpus_table(self.cfg.corpus, self.verifier.vocab, self.cfg.order) if self.cfg.corpus else None
            self.proxy = NgramTable(self.verifier.vocab, self.cfg.order, decay=self.cfg.decay, base=base)
        self.proxy.update(self.ids[self.counted :])
        self.counted = len(self.ids)
        return self.proxy

    def _graft(self, proposal: Proposal) -> Proposal:
        assert self.retrieval is not None
        extra = self.retrieval.draft(self.ids, self.cfg.tree)
        return graft(proposal, extra, self.cfg.tree) if isinstance(extra, Proposal) and len(extra) else proposal

    def _check(self, proposal: Proposal) -> None:
        assert self.drafter is not None
        for token in proposal.tokens:
            if not 0 <= token < self.verifier.vocab:
                raise DllmError(
                    f"{self.drafter.name} drafted id {token}, outside the verifier's vocabulary "
                    f"of {self.verifier.vocab}"
                )
            if token in self.drafter.banned:
                raise DllmError(
                    f"{self.drafter.name} drafted its special id {token} (mask or pad), "
                    "which must not reach the verifier"
                )

    def judge(self, logits: Tensor) -> Verdict:
        q = self.request
        return judge(
            self.proposal, logits, [*q.pad, *self.ids] if q.processors else (), q.processors, q.do_sample, q.generator
        )

    def settle(self, verdict: Verdict, successors: dict[int, list[int]]) -> tuple[list[int], tuple[int, ...]]:
        """Append what is emitted, cut at an end token or a stop string; returns it and the path to commit."""
        r, emitted = self.stats, []
        self._observe(verdict)
        for token in verdict.emitted:
            emitted.append(token)
            self.ids.append(token)
            if token in self.request.eos or (self.request.stop is not None and self.request.stop(self.ids)):
                self.done, self.result.finish_reason = True, "stop"
                break
        self.done |= len(self.ids) >= self.request.max_length
        self.cached = len(self.ids) - 1
        path = verdict.path[: len(emitted) - 1]
        r.accepted = min(verdict.accepted, len(emitted))
        r.emitted = len(emitted)
        for offset, lattice in reversed(self.chunks):
            if offset < len(emitted) < offset + lattice.k:
                self.rest = lattice.suffix(len(emitted) - offset)
                break
        if self.drafter is not None:
            self.drafter.observe(self.ids, emitted, successors)
        return emitted, path

    def _observe(self, verdict: Verdict) -> None:
        p = self.proposal
        if not p.conf:
            return
        path = [*verdict.path, -2]
        for node, following in zip([-1, *verdict.path], path, strict=True):
            for child in p.children.get(node, ()):
                self.stats.observed.append((p.depths[child] - 1, p.conf[child], child == following))

    def finish_round(self, start: float) -> None:
        r = self.stats
        r.t_other = max(0.0, time.perf_counter() - start - r.t_draft - r.t_search - r.t_verify - r.t_commit)
        self.controller.update(r)
        self.result.rounds.append(r)
        self.result.spans.append((r.accepted, r.emitted))


@lru_cache(maxsize=4)
def _corpus_table(corpus: tuple[tuple[int, ...], ...], vocab: int, order: int) -> NgramTable:
    return NgramTable(vocab, order).fit(corpus)


def decode(
    verifier: Verifier,
    drafter: Drafter | None,
    requests: Sequence[Request],
    cfg: SpecConfig,
    controller: LengthController | None = None,
    session: Session | None = None,
) -> Iterator[tuple[list[list[int]], list[Row]]]:
    """Run the loop; after each round yield the new tokens of every row, and the rows."""
    controller = controller or cfg.build_controller()
    rows = []
    for q in requests:
        verifier.check_ids(q.ids)
        if not q.ids:
            raise DllmError("the prompt is empty: give at least one token (the verifier's bos)")
        if verifier.max_positions is not None and len(q.ids) > verifier.max_positions:
            raise DllmError(f"the prompt has {len(q.ids)} tokens, the verifier takes {verifier.max_positions}")
        rows.append(Row(q, verifier, drafter, cfg.build_search(q.do_sample), controller.fork(), cfg))
    session = session or verifier.open(len(rows))
    for row in rows:
        row.cached = session.past if hasattr(session, "past") else 0
    while not all(row.done for row in rows):
        yield _round(session, rows), rows


def _round(session: Session, rows: list[Row]) -> list[list[int]]:
    start = time.perf_counter()
    pending = [None if row.done else Pending(row.ids[row.cached :], row.propose()) for row in rows]
    ready = time.perf_counter()
    logits = session.verify(pending)
    live = [row for row in rows if not row.done]
    if any(row.request.do_sample or row.request.processors for row in live):
        logits = [None if x is None else x.cpu() for x in logits]
    verified = time.perf_counter()
    emitted: list[list[int]] = []
    paths: list[tuple[int, ...] | None] = []
    for row, p, scores in zip(rows, pending, logits, strict=True):
        if p is None or scores is None:
            emitted.append([])
            paths.append(None)
            continue
        verdict = row.judge(scores)
        new, path = row.settle(verdict, _successors(row, scores))
        emitted.append(new)
        paths.append(path)
    judged = time.perf_counter()
    session.commit(paths)
    end = time.perf_counter()
    for row in live:
        row.stats.t_verify, row.stats.t_commit = verified - ready, end - judged
        row.finish_round(start)
    return emitted


def _successors(row: Row, logits: Tensor) -> dict[int, list[int]]:
    """Token -> the verifier's best eight successors, at every verified node."""
    if row.drafter is None or not row.drafter.successors:
        return {}
    best = logits.topk(min(8, logits.shape[-1]), -1).indices.tolist()
    return dict(zip([row.ids[-1], *row.proposal.tokens], best, strict=True))


def speculate(
    verifier: Any,
    drafter: Any = None,
    prompt: Any = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    logits_processor: Any = None,
    streamer: Any = None,
    tokenizer: Any = None,
    chat: bool | None = None,
    spec: SpecConfig | Mapping[str, Any] | None = None,
    controller: LengthController | None = None,
    **options: Any,
) -> Any:
    """Decode `prompt` with an autoregressive verifier, drafted by a dLLM (or anything else), without changing its
    output.

    verifier   a transformers causal LM, a `Verifier`, "tiny-ar", a folder or a Hugging Face id.
    drafter    a loaded dLLM, a transformers causal LM, a `Drafter`, "suffix" | "lookup" | "recycle", or None (plain
               decoding).
    prompt     a string (through the chat template where there is one, see `chat`), ids, chat messages, or a list of
               these (a batch; chains only).
    temperature, top_k, top_p, logits_processor, eos, stop, seed   the verifier's law and limits; request i uses seed +
    i. spec, options   `SpecConfig` or its fields: search, tree, length, k, carry, order, graft, ...
    controller   a length controller to keep its measurements from call to call.

    Returns a `SpecResult` per prompt. Raises DllmError for a verifier that cannot be rolled back and other mistakes of
    input.
    """
    cfg = SpecConfig.of(spec, options)
    v = as_verifier(verifier, tokenizer)
    d = as_drafter(drafter, v)
    ids, many = encode(v, prompt, chat)
    if len(ids) > 1 and cfg.tree:
        raise DllmError("trees are verified one prompt at a time: use tree=0 for a batch")
    if streamer is not None and len(ids) > 1:
        raise DllmError("a streamer follows one text: pass one prompt")
    law = verifier_law(temperature, top_k, top_p, logits_processor, v.device)
    end = v.eos if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if max_new_tokens < 0:
        raise DllmError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    requests = [
        Request(
            prompt_ids, len(prompt_ids) + max_new_tokens, end, temperature > 0, law.processors, law.warp,
            _stop_strings(v, stops, len(prompt_ids)), None if seed is None else torch.Generator().manual_seed(seed + i),
        )
        for i, prompt_ids in enumerate(ids)
    ]  # fmt: skip
    results = run(v, d, requests, cfg, controller or shared_controller(v, d, cfg), streamer)
    for r in results:
        r.text = _text(v, r.tokens, stops)
    return results if many else results[0]


def run(
    verifier: Verifier,
    drafter: Drafter | None,
    requests: Sequence[Request],
    cfg: SpecConfig,
    controller: LengthController | None = None,
    streamer: Any = None,
    session: Session | None = None,
) -> list[SpecResult]:
    """`decode` to the end; the streamer gets tokens as they become final."""
    start = time.perf_counter()
    rows: list[Row] = []
    for emitted, rows in decode(verifier, drafter, requests, cfg, controller, session):
        if streamer is not None:
            for token in emitted[0]:
                streamer.put(torch.tensor([token]))
        for row in rows:
            if row.done and not row.result.seconds:
                row.result.seconds = time.perf_counter() - start
    if streamer is not None:
        streamer.end()
    return [row.result for row in rows] or [SpecResult(list(q.ids), len(q.ids)) for q in requests]


def shared_controller(verifier: Verifier, drafter: Drafter | None, cfg: SpecConfig) -> LengthController:
    """The controller of a pair: costs and calibration outlive a call, kept on the verifier by drafter and length
    setting."""
    model = id(getattr(drafter, "model", None))
    key = (drafter.name if drafter else None, model, str(cfg.length), cfg.k, bool(cfg.tree))
    if isinstance(cfg.length, LengthController):
        return cfg.length
    if key not in verifier.controllers:
        verifier.controllers[key] = cfg.build_controller()
    return verifier.controllers[key]


@dataclass(frozen=True)
class Law:
    """The verifier's processors, and those of them that do not look at the text (they also shape a sampled draft)."""

    processors: Processors | None
    warp: Callable[[Tensor], Tensor] | None


PREFIX_FREE = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper",
)  # fmt: skip


def law_of(processors: Sequence[Any]) -> Law:
    """Split a transformers LogitsProcessorList."""
    free = [p for p in processors if type(p).__name__ in PREFIX_FREE]

    def warp(logits: Tensor) -> Tensor:
        dummy = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        for p in free:
            logits = p(dummy, logits)
        return logits

    return Law(processors if len(processors) else None, warp if free else None)  # type: ignore[arg-type]


def verifier_law(temperature: float, top_k: int | None, top_p: float | None, extra: Any, device: Any) -> Law:
    """temperature, top_k and top_p as transformers' own warpers, behind the caller's processors."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if temperature < 0:
        raise DllmError(f"temperature must not be negative, got {temperature}")
    processors = LogitsProcessorList(extra or [])
    if temperature > 0:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
    return law_of(processors)


def encode(verifier: Verifier, prompt: Any, chat: bool | None = None) -> tuple[list[list[int]], bool]:
    """Prompt ids, and whether several prompts were given."""
    if prompt is None:
        raise DllmError("speculate needs a prompt: a string, ids, chat messages, or a list of these")
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    many = isinstance(prompt, list | tuple) and bool(prompt) and not isinstance(prompt[0], int | dict)
    return [_encode_one(verifier, p, chat) for p in (prompt if many else [prompt])], many


def _encode_one(verifier: Verifier, prompt: Any, chat: bool | None) -> list[int]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple) and all(isinstance(t, int) for t in prompt):
        return list(prompt)
    tokenizer = verifier.tokenizer
    if tokenizer is None:
        raise DllmError("the verifier came without a tokenizer: pass tokenizer=..., or the prompt as ids")
    templated = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not (templated if chat is None else chat):
        return list(tokenizer(prompt)["input_ids"])
    if not templated:
        raise DllmError("the verifier's tokenizer has no chat template: pass plain text or ids")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


def _stop_strings(verifier: Verifier, stops: list[str], prompt: int) -> Callable[[list[int]], bool] | None:
    if not stops:
        return None
    tokenizer = verifier.tokenizer
    if tokenizer is None:
        raise DllmError("stop strings need a tokenizer: pass tokenizer=...")
    if not all(stops):
        raise DllmError("a stop string must not be empty")
    tail = max(len(s) for s in stops) + 8  # a token is rarely less than a character

    def stopped(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[max(prompt, len(ids) - tail) :])
        return any(s in text for s in stops)

    return stopped


def _text(verifier: Verifier, tokens: list[int], stops: list[str]) -> str | None:
    if verifier.tokenizer is None:
        return None
    text = verifier.tokenizer.decode(tokens, skip_special_tokens=True)
    cut = min((text.index(s) for s in stops if s in text), default=len(text))
    return text[:cut]


def calibrate(
    verifier: Any,
    drafter: Any = None,
    prompt: Sequence[int] | None = None,
    lengths: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64),
    repeats: int = 3,
) -> CostAware:
    """A cost controller with measured tables: the median of `repeats` forwards per length behind `prompt` (default 32
    tokens)."""
    v = as_verifier(verifier)
    d = as_drafter(drafter, v)
    ids = list(prompt or [min(5, v.vocab - 1)] * 32)
    controller = CostAware(k_max=max(lengths) or 1)
    session = v.open()
    session.verify([Pending(ids[:-1], EMPTY)])
    session.commit([()])
    for n in lengths:
        draft = Proposal(tuple(ids[:1] * n), tuple(range(-1, n - 1)))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            session.verify([Pending(ids[-1:], draft)])
            times.append(time.perf_counter() - start)
            session.commit([()])
        controller.verify.add(1 + n, sorted(times)[len(times) // 2])
        if d is not None and n:
            controller.draft.add(n, _draft_seconds(d, v, ids, n, repeats))
    return controller


def _draft_seconds(drafter: Drafter, verifier: Verifier, ids: list[int], n: int, repeats: int) -> float:
    d = drafter.fork()
    d.reset(ids, Need(verifier.vocab, verifier.eos, max_positions=verifier.max_positions))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        d.draft(ids, n)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
