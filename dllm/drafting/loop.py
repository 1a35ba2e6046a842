"""The loop: draft, search, verify, commit, adapt. One loop for every drafter, search, controller and verifier.

    while rows:
        proposals = proposed(rows)                       # drafter -> lattice -> path search -> controller's trim
        logits = session.verify(proposals)               # one forward of the verifier
        kept = judged(rows, logits)                      # exact acceptance; the one wait for the device
        row.settle(kept)                                 # cut at end tokens and stop strings
        row.take(session.commit(accepted paths))         # the cache forgets the rest; drafters may read its states

The output is the verifier's own, whatever is drafted: token for token when greedy, in law when sampling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from dllm.call.arguments import RENAMED
from dllm.decoding.graphs import granted
from dllm.drafting.accept import Acceptance, Judge, Processors
from dllm.drafting.control import CONTROLLERS, Controller, Cut, Length, RoundStats
from dllm.drafting.drafters import Ask, Draft, Drafter, Need, asked, blamed, companies
from dllm.drafting.lattice import DraftFailure, Lattice
from dllm.drafting.loans import Loans
from dllm.drafting.merge import Branches, Slots, Voice, merge
from dllm.drafting.ngram import FED, SEEN, NgramTable
from dllm.drafting.pair_head import PairHeadLike, as_pair_head
from dllm.drafting.proposal import EMPTY, Proposal, sent
from dllm.drafting.registry import DrafterLike, as_drafter, named
from dllm.drafting.search import SEARCHES, BestFirstTree, Edges, PathSearch, SampleTree
from dllm.drafting.store import BEST, Lesson, Seen, StoreLike, as_store, corpus_ids, corpus_index, keep
from dllm.drafting.suffixes import SuffixArray
from dllm.drafting.trust import Trust
from dllm.drafting.verifier import Pending, Session, Verifier
from dllm.errors import DllmError, unknown
from dllm.spec import check, param

log = logging.getLogger(__name__)


class Streamer(Protocol):
    """What follows a text as it becomes final; transformers' streamers do."""

    def put(self, value: Tensor) -> None:
        """The next id: (1,)."""

    def end(self) -> None:
        """There are no more."""


@dataclass(frozen=True)
class SpecConfig:
    """How to speculate. Nothing here changes what is generated, only how fast.

    search   None: `eal` when greedy, `sample` at T > 0; or a name, "name:key=value,…", a mapping, or an object.
    tree     node budget of a tree; 0 = chain.
    length   length controller, given like `search`.
    k        most slots per draft, whatever the controller says; None = no such limit.
    carry    unused slots of a draft: "auto" (reused where the controller expects more from them than from a fresh
             draft), "always", "off". Exact in every case: the lattice is carried over, not the tokens.
    ngrams   what the n-gram proxy counts: the "text", prompt and output, or what the "verifier" said at every verified
             node, rejected ones too, by its probabilities (ADED, arXiv 2407.12021).
    order    of the n-gram proxy; 0 = no proxy.
    corpus   texts of yours, which the proxy is fitted on as well and the drafter `suffix` copies from: id sequences, or
             a file, see `corpus_ids`.
    store    what outlives a text, see `dllm.Store`, or a file to keep it in. None: every text begins anew.
    graphs   CUDA graphs of rounds and drafts: None = where they can be captured, True = asked for, False = off.
    verify   how a sampled chain is judged: "token", each by the ratio test, or "block", all at once, which keeps at
             least as many in the mean (arXiv 2403.10444). Both are exact; where processors look at the text: "token".
    pair_head   a `PairHead` or its folder: what neighbours of the drafter's lattices say of each other; candidates are
             then the `m_max` best of each slot, whatever their mass.
    graft    another drafter, or several, whose continuations are merged into the tree (point trees only): retrieval, or
             a model; what they take is counted with the drafter.
    """

    search: str | Mapping[str, object] | PathSearch | None = None
    tree: int = param(0, "a chain", low=0)
    length: str | Mapping[str, object] | Controller = "cost"
    k: int | None = param(None, "no such limit", low=0)
    carry: str = param("auto", "never worse than a fresh draft", choices=("auto", "always", "off"))
    reuse_min: int = param(2, "a single slot is not worth a round", low=1)
    order: int = param(3, "DiffuSpec's", low=0)
    ngrams: str = param("text", "needs nothing of the verifier", choices=("text", "verifier"))
    decay: float = param(1.0, "a text does not fade", above=0, high=1)
    corpus: tuple[tuple[int, ...], ...] | str | Path = ()
    store: StoreLike = None
    tau_mass: float = param(0.8, "DiffuSpec's", above=0, high=1)
    m_max: int = param(15, "DiffuSpec's", low=1)
    graphs: bool | None = None
    verify: str = param("token", "the field's", choices=("token", "block"))
    pair_head: PairHeadLike = None
    graft: DrafterLike | Sequence[DrafterLike] = None

    def __post_init__(self) -> None:
        check(self, "speculate")
        if self.graft is not None and not self.tree:
            raise DllmError("graft adds branches to a tree: give its node budget, such as tree=32")
        if isinstance(self.corpus, str | Path):
            return
        try:
            object.__setattr__(self, "corpus", tuple(tuple(map(index, ids)) for ids in self.corpus))
        except TypeError as error:
            raise DllmError("corpus is a list of id sequences, or a file of texts") from error

    @property
    def grafts(self) -> list[Drafter]:
        """The other drafters."""
        given: Sequence[Any] = self.graft if isinstance(self.graft, list | tuple) else [self.graft]
        return [drafter for one in given if (drafter := as_drafter(one)) is not None]

    @classmethod
    def of(
        cls, base: SpecConfig | Mapping[str, object] | None, options: Mapping[str, object], beside: Sequence[str] = ()
    ) -> SpecConfig:
        """A config from an object or mapping and keyword options.

        Errors: an unknown key, with the nearest one of ours and of those that the call takes `beside`, or with the name
        that an argument of transformers has here.
        """
        base = cls.of(None, base) if isinstance(base, Mapping) else cls() if base is None else base
        if not isinstance(base, SpecConfig):
            raise DllmError(f"spec is a SpecConfig or a mapping of its fields, not {base!r}")
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                here = RENAMED.get(key)
                hint = f": here it is {here}" if here in beside else ""
                raise unknown("option of speculate", key, [*beside, *known], hint)
        return replace(base, **options)  # type: ignore[arg-type]

    def build_search(self, do_sample: bool) -> PathSearch:
        """The search of a text, a tree search where a tree is asked for."""
        given = self.search or ("sample" if do_sample and not self.tree else "eal")
        search = given if isinstance(given, PathSearch) else named("search", given, SEARCHES)
        if isinstance(search, BestFirstTree):
            return replace(search, budget=self.tree or search.budget)
        if self.tree and isinstance(search, SampleTree):
            return search.within(self.tree)
        if self.tree and not search.tree:
            return BestFirstTree(self.tree, search.lam)
        return search

    def build_controller(self) -> Controller:
        """A new length controller, or the one that was given."""
        if isinstance(self.length, Controller):
            return self.length
        return named("length controller", self.length, CONTROLLERS)


@dataclass
class SpecResult:
    """One decoded prompt. Lengths in tokens, times in seconds."""

    sequences: list[int]  # prompt and output, up to the token that completes a stop
    prompt_length: int
    finish_reason: str = "length"  # stop | length
    end: int | None = None  # where a stop begins in `sequences`
    text: str | None = None
    rounds: list[RoundStats] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (accepted, emitted) per round, as printed
    seconds: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """The output up to the stop, without it, as in `dllm.Output`."""
        return self.sequences[self.prompt_length : self.end]

    @property
    def emitted(self) -> list[int]:
        """The output with the stop."""
        return self.sequences[self.prompt_length :]

    @property
    def n_verify(self) -> int:
        """Verifier forwards."""
        return len(self.rounds)

    @property
    def n_draft(self) -> int:
        """Rounds with a fresh draft."""
        return sum(r.k > 0 and not r.carried for r in self.rounds)

    @property
    def n_carried(self) -> int:
        """Rounds with the rest of an earlier draft."""
        return sum(r.carried for r in self.rounds)

    @property
    def draft_forwards(self) -> int:
        """Forwards of the drafter and of what is grafted."""
        return sum(r.forwards for r in self.rounds)

    @property
    def draft_failures(self) -> int:
        """Rounds whose draft had unusable logits."""
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
            for slot, accepted in r.judged.items():
                judged.setdefault(slot, []).append(accepted)
        return [sum(judged[i]) / len(judged[i]) for i in sorted(judged)]

    @property
    def tokens_per_s(self) -> float:
        """Of the output without the stop."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def wall(self) -> dict[str, float]:
        """Seconds per stage."""
        return {name: sum(r.wall[name] for r in self.rounds) for name in RoundStats().wall}

    def speedup_vs(self, baseline: SpecResult | float) -> float:
        """Wall-clock ratio to a plain run of the same text (a result, or its seconds)."""
        seconds = baseline.seconds if isinstance(baseline, SpecResult) else baseline
        return seconds / max(1e-9, self.seconds)

    def metrics(self) -> dict[str, float]:
        """All figures by name, for tables."""
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
    processors: Processors | None = None  # where `warp` does not say it all, see `Judge`
    warp: Callable[[Tensor], Tensor] | None = None
    stop: Callable[[list[int]], bool] | None = None  # (all ids) -> stop behind the last one?
    generator: torch.Generator | None = None
    padded: list[int] | None = None  # `ids` with the padding that the processors of a batch expect to see
    before: int = 0  # tokens of an earlier turn in the cache that `ids` lacks

    @property
    def law(self) -> Judge:
        """How the verifier takes a token."""
        return Judge(self.do_sample, self.warp, self.processors, self.generator)

    @property
    def shown(self) -> list[int]:
        """The ids that processors see before the output."""
        return self.ids if self.padded is None else self.padded


Question: TypeAlias = Length | Ask | Cut
Answer: TypeAlias = int | Draft | None  # of an `Ask`: None where the drafter's logits are unusable
R = TypeVar("R")
Talk: TypeAlias = Generator[Question, Answer, R]  # of one text; those of a batch are answered together


class Settled(NamedTuple):
    """What a round settled."""

    kept: Acceptance
    successors: Sequence[Seen]  # what the verifier said behind each node; empty where nobody learns


@dataclass
class Speculation:
    """The host side of one text."""

    request: Request
    verifier: Verifier
    drafter: Drafter | None
    search: PathSearch
    controller: Controller
    cfg: SpecConfig
    loans: Loans | None = None
    texts: tuple[SuffixArray, ...] = ()  # of others
    cached: int = 0  # tokens in the verifier's cache
    counted: int = 0  # tokens in the proxy
    proxy: NgramTable | None = None
    chunks: list[tuple[int, Lattice]] = field(default_factory=list)  # (offset in the draft, lattice)
    rest: Lattice | None = None
    proposal: Proposal = EMPTY
    stats: RoundStats = field(default_factory=RoundStats)

    def __post_init__(self) -> None:
        request, verifier, cfg = self.request, self.verifier, self.cfg
        self.ids = list(request.ids)
        self.result = SpecResult(self.ids, len(self.ids))
        self.done = len(self.ids) >= request.max_length
        positions = verifier.max_positions
        self.end = request.max_length if positions is None else min(request.max_length, positions - request.before)
        self.drafter = forked(self.drafter)
        self.grafts = [fork for drafter in cfg.grafts if (fork := forked(drafter)) is not None]
        self.tree = cfg.tree or (self.search.budget if self.search.tree else 0)
        self.head = as_pair_head(cfg.pair_head)
        pruning = (cfg.tau_mass if self.head is None else 1.0, cfg.m_max)
        need = Need(
            verifier.vocab, request.eos, self.search.sampled, request.warp, *pruning, self.tree, verifier.tokenizer,
            self.search.draws, verifier.model, self.loans, as_store(cfg.store), self.texts,
        )  # fmt: skip
        self.trust = Trust(None if need.store is None else need.store.trust)
        self.merged: dict[tuple[int, ...], tuple[str, float]] = {}  # of the nodes of a merged tree: whose, how probable
        self.sources = [d for d in (self.drafter, *self.grafts) if d is not None]
        self.feeds = cfg.ngrams == "verifier" and cfg.order > 1 and self.search.lam < 1
        self.teaches = self.feeds or any(source.successors for source in self.sources)
        for source in self.sources:
            with blamed(source):
                source.reset(self.ids, need)
        self.taps = tuple(sorted({tap for source in self.sources for tap in source.taps}))
        self._check_tree()
        self._check_head()

    def propose(self) -> Talk[Proposal]:
        """What to verify next."""
        r = self.stats = RoundStats(pending=len(self.ids) - self.cached)
        room, turn = self.end - len(self.ids) - 1, self.verifier.turn
        if turn is not None and len(self.ids) <= turn:
            room = min(room, turn - len(self.ids))
        room = room if self.cfg.k is None else min(room, self.cfg.k)
        self.chunks, self.merged = [], {}
        self.proposal = EMPTY
        if self.drafter is not None and room > 0:
            before = self._forwards()
            self.proposal = yield from self._draft(room)
            r.forwards = self._forwards() - before
        self.rest = None
        r.nodes, r.kind = len(self.proposal), self.proposal.kind if len(self.proposal) else "none"
        return self.proposal

    def _forwards(self) -> int:
        return sum(source.forwards for source in self.sources)

    def _draft(self, room: int) -> Talk[Proposal]:
        assert self.drafter is not None
        r, eos = self.stats, self.request.eos
        longest = room if self.drafter.longest is None else min(room, self.drafter.longest)
        k = yield from _number(Length(self.controller, longest))
        if k <= 0:
            return EMPTY
        rest, settled = self._carried(room), 0
        if rest is not None:
            r.carried, r.k, r.l_gen = True, rest.k, rest.first_eos(eos)
            proposal = self._search(rest, [])
        else:
            proposal, settled = yield from self._chunks(k, longest)
        self._check(proposal.tokens, self.drafter, self.drafter.banned)
        if self.grafts and proposal.kind == "point":
            proposal = yield from self._grafted(proposal, room)
        # first how much, then the cut at end tokens: the length of a sampled draft must not depend on what was drawn
        n = yield from _number(Cut(self.controller, proposal, r.carried, 0 if r.carried else r.k))
        return proposal.head(max(settled, n)).within(room, eos)

    def _chunks(self, k: int, room: int) -> Talk[tuple[Proposal, int]]:
        """A draft of `k` slots, grown while the controller asks for more; and how much of it `trim` may not cut.

        What is drafted behind a sampled chunk is conditioned on its draws, and so is every decision that has seen it.
        Hence a chunk is submitted whole as soon as more is asked for, before its draws are looked at: then whether a
        token is submitted is settled before it is drawn, which is all that the ratio test needs. Draws that were made
        one after the other are one chunk each, of which nothing may be cut.
        """
        r, eos, settled = self.stats, self.request.eos, 0
        proposal = yield from self._fresh(k, EMPTY)
        while (
            len(proposal) == r.k
            and proposal.is_chain
            and not self.tree
            and (more := self.controller.more(proposal.conf, room)) > 0
        ):
            settled = len(proposal) if proposal.kind == "sampled" else 0
            if eos.intersection(proposal.tokens):
                break
            addition = yield from self._fresh(more, proposal)
            if not (len(addition) and addition.is_chain and addition.kind == proposal.kind):
                break
            proposal = proposal.then(addition)
        sequential = proposal.kind == "sampled" and not proposal.conf
        return proposal, len(proposal) if sequential else settled

    def _carried(self, room: int) -> Lattice | None:
        rest, policy = self.rest, self.cfg.carry
        if rest is None or policy == "off" or rest.k < self.cfg.reuse_min:
            return None
        rest = rest.head(room)
        return rest if policy == "always" or self.controller.keep(rest.k, rest.confidence) else None

    def _fresh(self, k: int, before: Proposal) -> Talk[Proposal]:
        """A draft of `k` slots behind the text and the chain `before`."""
        assert self.drafter is not None
        r = self.stats
        draft = yield from _drafted(Ask(self.drafter, [*self.ids, *before.tokens], k, self.request.generator))
        if draft is None:
            r.k += k
            return EMPTY
        if not isinstance(draft, Lattice):
            r.k += len(draft)
            r.l_gen += len(draft)
            # rows of sequential draws tell how the draws before them turned out: they must not decide what is submitted
            return replace(draft, conf=()) if draft.kind == "sampled" else draft
        r.k += draft.k
        r.l_gen += draft.first_eos(self.request.eos)
        return self._search(draft, before.tokens)

    def _search(self, lat: Lattice, before: Sequence[int]) -> Proposal:
        if not lat.k:
            return EMPTY
        self.chunks.append((len(before), lat))
        q, context = self.request, [*self.ids, *before]
        lat = self._paired(lat, context[-1])
        return self.search(lat, context, eos=q.eos, proxy=self._proxy(), generator=q.generator)

    def _paired(self, lat: Lattice, anchor: int) -> Lattice:
        """The drafter's lattice behind the token `anchor`, with what the pair head says of it."""
        if self.head is None:
            return lat
        if lat.pairs is not None:
            raise DllmError("the drafter has pair scores of its own: leave out pair_head")
        return self.head.over(lat, anchor)

    def _proxy(self) -> NgramTable | None:
        if self.cfg.order < 2 or self.search.lam >= 1:
            return None
        if self.proxy is None:
            corpus = self.cfg.corpus if isinstance(self.cfg.corpus, tuple) else ()
            base = _corpus_table(corpus, self.verifier.vocab, self.cfg.order) if corpus else None
            kappa = FED if self.feeds else SEEN
            self.proxy = NgramTable(self.verifier.vocab, self.cfg.order, decay=self.cfg.decay, kappa=kappa, base=base)
        if not self.feeds:
            self.proxy.update(self.ids[self.counted :])
            self.counted = len(self.ids)
        return self.proxy

    def _grafted(self, proposal: Proposal, room: int) -> Talk[Proposal]:
        """One tree of the proposal and of what the other sources say, retrieved texts or other models' lattices."""
        assert self.drafter is not None
        voices = [self._voice(self.drafter, self.chunks[0][1] if len(self.chunks) == 1 else proposal)]
        for source in self.grafts:
            extra = yield from _drafted(Ask(source, [*self.ids], min(self.tree, room), self.request.generator))
            if extra is not None:
                voices.append(self._voice(source, extra))
        found = merge(voices, self.tree, room, self.trust.of, self.request.eos)
        self.merged = found.origin
        # what the text itself says may well be the drafter's special, but not what the drafter says alone
        self._check(found.proposal.tokens, self.drafter, frozenset())
        alone = [path[-1] for path, (who, _) in found.origin.items() if who == voices[0].name]
        self._check(alone, self.drafter, self.drafter.banned)
        return found.proposal

    def _voice(self, source: Drafter, draft: Lattice | Proposal) -> Voice:
        names = [other.name for other in self.sources]
        name = source.name if names.count(source.name) == 1 else f"{source.name}#{self.sources.index(source)}"
        if isinstance(draft, Lattice):
            paired = self._paired(draft, self.ids[-1]) if source is self.drafter else draft
            return Slots(name, Edges(paired, self.ids, self._proxy(), self.search.lam))
        return Branches(name, draft)

    def _check_head(self) -> None:
        """Refuse a pair head that would be ignored, or knows other ids."""
        if self.head is None:
            return
        if self.drafter is None or self.drafter.chains_only:
            name = "no drafter" if self.drafter is None else f"drafter {self.drafter.name!r}, which drafts chains,"
            raise DllmError(f"a pair head weighs the candidates of a lattice, and {name} has none: leave out pair_head")
        if self.head.vocab != self.verifier.vocab:
            raise DllmError(
                f"the pair head knows {self.head.vocab} ids, the verifier has {self.verifier.vocab}: train one for it "
                "with `dllm align --pair-head`"
            )

    def _check_tree(self) -> None:
        """Refuse a tree that would be ignored."""
        if self.grafts:
            if self.drafter is None:
                raise DllmError(
                    "graft adds branches to a drafter's tree, and there is none: name one of them as drafter"
                )
            if self.search.sampled:
                raise DllmError("graft adds branches to point trees: leave out either graft or the search that samples")
        elif self.drafter is not None and self.drafter.chains_only and (self.cfg.tree or self.search.tree):
            raise DllmError(
                f"drafter {self.drafter.name!r} drafts chains here: leave out the tree, or add branches to it with "
                "graft='suffix'"
            )

    def _check(self, tokens: Iterable[int], source: Drafter, banned: frozenset[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.verifier.vocab:
                raise DllmError(
                    f"{source.name} drafted id {token}, outside the verifier's vocabulary of {self.verifier.vocab}"
                )
            if token in banned:
                raise DllmError(
                    f"{source.name} drafted its special id {token} (mask or pad), which must not reach the verifier"
                )

    @property
    def law(self) -> Judge:
        """How the verifier takes a token, and by which rule it judges."""
        return replace(self.request.law, block=self.cfg.verify == "block")

    def ask(self, logits: Tensor) -> Tensor:
        """What a round asks of the device, (n,) int64: what settles the proposal by the verifier's logits (1 + N, V),
        and before it each node's best successors where somebody learns from them."""
        answer = self.law.ask(self.proposal, logits)
        if not self.teaches:
            return answer
        best = logits.float().log_softmax(-1).topk(min(BEST, logits.shape[-1]), -1)
        prob = best.values.exp().view(torch.int32)  # whole numbers, so that the host waits once
        return torch.cat([torch.stack([best.indices, prob], 1).flatten(), answer])

    def judge(self, logits: Tensor, answer: list[int]) -> Settled:
        """What stays of the proposal by the answer to `ask`."""
        q, successors = self.request, list[Seen]()
        if self.teaches:
            told = np.array(answer[: 2 * min(BEST, logits.shape[-1]) * len(logits)]).reshape(len(logits), 2, -1)
            prob = told[:, 1].astype(np.int32).view(np.float32)
            paths = self.proposal.paths
            successors = [
                Seen(*map(tuple, seen)) for seen in zip(paths, told[:, 0].tolist(), prob.tolist(), strict=True)
            ]
            answer = answer[told.size :]
        prefix = [*q.shown, *self.ids[len(q.ids) :]] if q.processors else ()
        return Settled(self.law.judge(self.proposal, logits, answer, prefix), successors)

    def settle(self, verdict: Settled) -> tuple[list[int], tuple[int, ...]]:
        """Append what is emitted, cut at an end token or a stop string; returns it and the path to commit."""
        r, q, kept, emitted = self.stats, self.request, verdict.kept, []
        self._observe(kept)
        if self.feeds and (proxy := self._proxy()) is not None:
            for seen in verdict.successors:
                proxy.feed([*self.ids[-self.cfg.order :], *seen.path], seen.best, seen.prob)
        for token in kept.emitted:
            emitted.append(token)
            self.ids.append(token)
            if token in q.eos:
                self.result.end = len(self.ids) - 1
            if token in q.eos or (q.stop is not None and q.stop(self.ids)):
                self.done, self.result.finish_reason = True, "stop"
                break
        self.done |= len(self.ids) >= q.max_length
        self.cached = len(self.ids) - 1
        path = kept.path[: len(emitted) - 1]
        r.accepted = min(kept.accepted, len(emitted))
        r.emitted = len(emitted)
        for offset, lattice in reversed(self.chunks):
            if offset < len(emitted):
                self.rest = lattice.suffix(len(emitted) - offset)
                break
        for source in self.sources:
            with blamed(source):
                source.observe(self.ids, emitted, verdict.successors)
        return emitted, path

    def take(self, states: Tensor | None, start: int) -> None:
        """Hand on the tapped states (n, T, H) of the tokens from `start` on, to each source those that it reads."""
        for source in self.sources:
            if states is not None and source.taps and not self.done:
                own = source.taps == self.taps
                at = [] if own else [self.taps.index(tap) for tap in source.taps]
                with blamed(source):
                    source.take(states if own else states.index_select(1, sent(at, states.device)), start)

    def _observe(self, kept: Acceptance) -> None:
        p = self.proposal
        for node, following in zip([-1, *kept.path], [*kept.path, -2], strict=True):
            for child in p.children.get(node, ()):
                conf = p.conf[child] if p.conf else 0.5
                self.stats.observed.append((p.depths[child] - 1, conf, child == following))
                if self.merged:
                    who, together = self.merged[p.paths[child + 1]]
                    self.trust.learn(who, p.depths[child] - 1, together, child == following)

    def lessons(self) -> list[Lesson]:
        """What the text taught."""
        return [self.trust, *(lesson for source in self.sources for lesson in source.lessons())]

    def finish_round(self) -> None:
        """Learn from the round and record it."""
        self.controller.update(self.stats)
        self.result.rounds.append(self.stats)
        self.result.spans.append((self.stats.accepted, self.stats.emitted))


def _number(question: Length | Cut) -> Talk[int]:
    answer = yield question
    assert isinstance(answer, int)
    return answer


def _drafted(question: Ask) -> Talk[Draft | None]:
    answer = yield question
    assert not isinstance(answer, int)
    return answer


def proposed(rows: Sequence[Speculation]) -> list[Proposal]:
    """What to verify next, of every row. All rows that ask for the same are answered together: they agree upon lengths,
    and drafts of one company are made in one go."""
    talks, proposals = [row.propose() for row in rows], [EMPTY] * len(rows)
    answers: dict[int, Answer] = dict.fromkeys(range(len(rows)))
    questions: dict[int, Question] = {}
    while answers:
        for i, answer in answers.items():
            start = time.perf_counter()
            try:
                questions[i] = talks[i].send(answer)
            except StopIteration as end:
                proposals[i] = end.value
            rows[i].stats.t_search += time.perf_counter() - start
        answers = _answered(rows, questions)
        questions = {i: q for i, q in questions.items() if i not in answers}
    return proposals


def _answered(rows: Sequence[Speculation], questions: Mapping[int, Question]) -> dict[int, Answer]:
    """Answers to all questions of one kind, by the row: lengths before drafts, so that cuts are agreed upon once every
    draft is there."""
    start = time.perf_counter()
    lengths = {i: q for i, q in questions.items() if isinstance(q, Length)}
    asks = {i: q for i, q in questions.items() if isinstance(q, Ask)}
    cuts = {i: q for i, q in questions.items() if isinstance(q, Cut)}
    if asks and not lengths:
        return _drafts(rows, asks)
    together: Sequence[int] = ()
    if lengths:
        together = rows[0].controller.lengths(list(lengths.values()), len(rows))
    elif cuts:
        together = rows[0].controller.cuts(list(cuts.values()), len(rows))
    for i in questions:
        rows[i].stats.t_search += (time.perf_counter() - start) / len(questions)
    return dict(zip(lengths or cuts, together, strict=True))


def _drafts(rows: Sequence[Speculation], asks: Mapping[int, Ask]) -> dict[int, Answer]:
    """Drafts, by the row; None where the logits are unusable."""
    answers: dict[int, Answer] = {}
    places = list(asks)
    for company in companies(asks.values()):
        start, together = time.perf_counter(), [places[i] for i in company]
        drafts = asked([asks[i] for i in together])
        seconds = (time.perf_counter() - start) / len(together)
        for i, draft in zip(together, drafts, strict=True):
            r, failed = rows[i].stats, isinstance(draft, DraftFailure)
            r.t_draft, r.failed = r.t_draft + seconds, r.failed or failed
            if asks[i].drafter is rows[i].drafter:
                r.fellows, r.slots = len(together), r.slots + max(asks[j].k for j in together)
            answers[i] = None if isinstance(draft, DraftFailure) else draft
            if failed:
                log.debug("%s: %s", asks[i].drafter.name, draft)
    return answers


def forked(drafter: Drafter | None) -> Drafter | None:
    """The drafter's copy for one text."""
    if drafter is None:
        return None
    with blamed(drafter):
        return drafter.fork()


@lru_cache(maxsize=4)
def _corpus_table(corpus: tuple[tuple[int, ...], ...], vocab: int, order: int) -> NgramTable:
    return NgramTable(vocab, order).fit(corpus)


def rounds(
    verifier: Verifier,
    drafter: Drafter | None,
    requests: Sequence[Request],
    cfg: SpecConfig,
    controller: Controller | None = None,
    session: Session | None = None,
) -> Iterator[tuple[list[list[int]], list[Speculation]]]:
    """Run the loop; after each round yield the new tokens of every row, and the rows.

    session   of the verifier, fresh or over the text of an earlier turn; None: a new one.
    Errors: DllmError for prompts, trees and controllers that the verifier or the loop does not take.
    """
    controller = cfg.build_controller() if controller is None else controller
    if not isinstance(controller, Controller):
        raise DllmError(f"controller is a Controller (a name goes to length=), not {controller!r}")
    store, texts = as_store(cfg.store), list[SuffixArray]()
    if store is not None:
        store.check(verifier.vocab, verifier.tokenizer, type(verifier.model).__name__)
        texts += store.texts.levels
        cfg = replace(cfg, store=store)
    if cfg.graft is not None:  # a name is loaded once
        cfg = replace(cfg, graft=cfg.grafts)
    if isinstance(cfg.corpus, str | Path):
        cfg = replace(cfg, corpus=corpus_ids(cfg.corpus, verifier.vocab, verifier.tokenizer))
    if cfg.corpus and isinstance(cfg.corpus, tuple):
        texts.append(corpus_index(cfg.corpus))
    rows, loans = list[Speculation](), Loans(cfg.graphs)
    for q in requests:
        verifier.check_ids(q.ids)
        if not q.ids:
            raise DllmError("the prompt is empty: give at least one token (the verifier's bos)")
        if verifier.max_positions is not None and q.before + len(q.ids) > verifier.max_positions:
            raise DllmError(f"the prompt has {len(q.ids)} tokens, the verifier takes {verifier.max_positions}")
        rows.append(
            Speculation(
                q, verifier, drafter, cfg.build_search(q.do_sample), controller.fork(), cfg, loans, tuple(texts)
            )
        )
        if len(requests) > 1 and verifier.stretches and q.max_length > rows[-1].end:
            raise DllmError(
                f"{type(verifier.model).__name__} stretches its positions by the longest text so far (dynamic RoPE): "
                f"a batch may not pass {verifier.max_positions} tokens; decode row by row"
            )
    if any(cfg.tree or row.search.tree for row in rows) and not verifier.can("trees"):
        raise DllmError(
            f"{type(verifier.model).__name__} does not place keys by position_ids alone, so it cannot verify a tree: "
            "use a chain (tree=0, no tree search)"
        )
    if session is not None:
        granted(cfg.graphs, "the cache of transformers' own generate cannot be captured: call dllm.speculate")
    with loans:
        session = session or verifier.open(len(rows), graphs=verifier.graphs(loans))
        for row in rows:
            if row.taps and session.past:
                raise DllmError(
                    "the drafter reads the verifier's hidden states, and those of an earlier turn are gone: "
                    "generate without past_key_values, or with a drafter that reads the text"
                )
            row.cached = session.past
            row.controller.rows = len(rows)
        while not all(row.done for row in rows):
            yield _round(session, rows), rows
    if store is not None:
        found = [(row.ids, len(row.request.ids)) for row in rows]
        store.learn(found, [lesson for row in rows for lesson in row.lessons()])
        keep(store)


def _round(session: Session, rows: list[Speculation]) -> list[list[int]]:
    start = time.perf_counter()
    for b, row in enumerate(rows):
        if row.verifier.restarts and row.cached <= (row.verifier.turn or 0) < len(row.ids) and not row.done:
            session.restart(b)
            row.cached = 0
    live, starts = [row for row in rows if not row.done], [row.cached for row in rows]
    drafts = iter(proposed(live))
    pending = [None if row.done else Pending(row.ids[row.cached :], next(drafts)) for row in rows]
    ready = time.perf_counter()
    found = session.verify(pending, rows[0].taps)
    verdicts = iter(judged(live, [logits for logits in found if logits is not None]))
    verified = time.perf_counter()
    settled = [([], None) if row.done else row.settle(next(verdicts)) for row in rows]
    told = time.perf_counter()
    for row, states, at in zip(rows, session.commit([path for _, path in settled]), starts, strict=True):
        row.take(states, at)
    end = time.perf_counter()
    verify, commit = verified - ready, end - told
    other = end - start - verify - commit - sum(row.stats.t_draft + row.stats.t_search for row in live)
    width = max(len(p.ids) + len(p.proposal) for p in pending if p is not None)
    for row in live:
        r = row.stats
        r.t_verify, r.t_commit, r.t_other = verify, commit, max(0.0, other)
        r.rows, r.width, r.leads = len(rows), width, row is live[0]
        row.finish_round()
    return [emitted for emitted, _ in settled]


def judged(rows: Sequence[Speculation], logits: Sequence[Tensor]) -> list[Settled]:
    """What stays of each row's proposal. The host waits once for the device, and more where a law walks by itself."""
    asked = [row.ask(scores) for row, scores in zip(rows, logits, strict=True)]
    answers = iter(torch.cat(asked).tolist())
    return [
        row.judge(scores, list(islice(answers, len(question))))
        for row, scores, question in zip(rows, logits, asked, strict=True)
    ]


def decode(
    verifier: Verifier,
    drafter: Drafter | None,
    requests: Sequence[Request],
    cfg: SpecConfig,
    controller: Controller | None = None,
    streamer: Streamer | None = None,
    session: Session | None = None,
) -> list[SpecResult]:
    """All rounds: a result for each request. The streamer gets tokens as they become final."""
    start = time.perf_counter()
    rows: list[Speculation] = []
    for emitted, rows in rounds(verifier, drafter, requests, cfg, controller, session):
        if streamer is not None:
            for token in emitted[0]:
                streamer.put(torch.tensor([token]))
        for row in rows:
            if row.done and not row.result.seconds:
                row.result.seconds = time.perf_counter() - start
    if streamer is not None:
        streamer.end()
    return [row.result for row in rows] or [SpecResult(list(q.ids), len(q.ids)) for q in requests]
