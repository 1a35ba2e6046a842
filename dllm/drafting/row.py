"""The host side of one text: `Speculation` asks for drafts, searches them, and settles what the verifier says."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from dllm.drafting.accept import Acceptance, Judge
from dllm.drafting.config import SpecConfig
from dllm.drafting.control import Controller, Cut, Judged, Length, RoundStats
from dllm.drafting.drafters import Ask, Draft, Drafter, Need, blamed
from dllm.drafting.lattice import Lattice
from dllm.drafting.loans import Loans
from dllm.drafting.merge import Branches, Merged, Slots, Voice, best_chain, merge
from dllm.drafting.ngram import FED, SEEN, NgramTable
from dllm.drafting.pair_head import as_pair_head, check_head
from dllm.drafting.proposal import EMPTY, Proposal, sent
from dllm.drafting.request import Request, SpecResult
from dllm.drafting.search import Edges, PathSearch
from dllm.drafting.store import BEST, Lesson, Seen, as_store
from dllm.drafting.suffixes import SuffixArray
from dllm.drafting.trim import as_keep
from dllm.drafting.trust import Trust
from dllm.drafting.verifier import Verifier
from dllm.drafting.window import as_window
from dllm.errors import DllmError

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
    told: int = 0  # tokens whose states the drafters were handed
    counted: int = 0  # tokens in the proxy
    proxy: NgramTable | None = None
    chunks: list[tuple[int, Lattice]] = field(default_factory=list)  # (offset in the draft, lattice)
    rest: Lattice | None = None
    proposal: Proposal = EMPTY
    unsent: Proposal = EMPTY  # a chain that was drafted behind the proposal, or earlier, and not submitted
    unsent_at: int = 0  # of its nodes how many the text has said
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
            self.search.draws, verifier.model, self.loans, as_store(cfg.store), self.texts, as_keep(cfg.trim),
            as_window(cfg.window),
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
        check_head(self.head, self.drafter, verifier.vocab)
        self._check_bounds()

    def propose(self) -> Talk[Proposal]:
        """What to verify next."""
        r = self.stats = RoundStats(pending=len(self.ids) - self.cached)
        room, turn = self.end - len(self.ids) - 1, self.verifier.turn
        if turn is not None and len(self.ids) <= turn:
            room = min(room, turn - len(self.ids))
        room = room if self.cfg.k is None else min(room, self.cfg.k)
        self.chunks, self.proposal = [], EMPTY
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
        offers = (yield from self._offers(room)) if self.grafts and not self.tree else []
        offered, origin = self._joined(offers, room)
        k = yield from _number(Length(self.controller, longest, offered.survival()))
        if k <= 0 and not len(offered):
            return EMPTY
        rest, settled = self._carried(room) if k > 0 else None, 0
        self.unsent, self.merged = EMPTY, {}
        if k <= 0:
            proposal, self.merged = offered, origin
        elif rest is not None:
            r.carried, r.k, r.l_gen = True, rest.k, rest.first_eos(eos)
            proposal = self._search(rest, [])
        else:
            proposal, settled = yield from self._chunks(k, longest)
        self._check(proposal.tokens, self.drafter, self.drafter.banned if k > 0 else frozenset())
        if self.tree and self.grafts and proposal.kind == "point":
            proposal = yield from self._grafted(proposal, room)
        elif offers and k > 0 and proposal.kind == "point":
            proposal, self.merged = self._joined([Branches(self._name(self.drafter), proposal), *offers], room)
        # first how much, then the cut at end tokens: the length of a sampled draft must not depend on what was drawn
        n = yield from _number(Cut(self.controller, proposal, r.carried, 0 if r.carried else r.k))
        submitted = proposal.head(max(settled, n)).within(room, eos)
        if proposal.told_by_text and not r.carried:
            self.unsent, self.unsent_at = proposal, len(submitted)
        return submitted

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
        spread = rest.spread if self.controller.spread else ()
        return rest if policy == "always" or self.controller.keep(rest.k, rest.confidence, spread) else None

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
        found = self.search(lat, context, eos=q.eos, proxy=self._proxy(), generator=q.generator)
        return lat.marked(found) if self.controller.spread else found

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

    def _offers(self, room: int) -> Talk[list[Branches]]:
        """What the other sources of a chain say."""
        voices = list[Branches]()
        for source in self.grafts:
            found = yield from _drafted(Ask(source, [*self.ids], min(room, self.controller.k_max)))
            if isinstance(found, Proposal) and len(found):
                self._check(found.tokens, source, source.banned)
                voices.append(Branches(self._name(source), found))
        return voices

    def _joined(self, voices: Sequence[Branches], room: int) -> Merged:
        """The best chain of what sources say, by what the word of each is worth."""
        nodes = sum(len(voice.behind) for voice in voices)
        found = merge(voices, nodes, room, self.trust.of, self.request.eos)
        return Merged(best_chain(found.proposal), found.origin)

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
        name = self._name(source)
        if isinstance(draft, Lattice):
            paired = self._paired(draft, self.ids[-1]) if source is self.drafter else draft
            return Slots(name, Edges(paired, self.ids, self._proxy(), self.search.lam))
        return Branches(name, draft)

    def _name(self, source: Drafter | None) -> str:
        names = [other.name for other in self.sources]
        if source is None or names.count(source.name) == 1:
            return source.name if source else ""
        return f"{source.name}#{self.sources.index(source)}"

    def _check_bounds(self) -> None:
        """Refuse a trim or a window that would be ignored."""
        for name in ("trim", "window"):
            if getattr(self.cfg, name) is not None and not any(name in source.bounds for source in self.sources):
                names = " and ".join(source.name for source in self.sources) or "no drafter"
                raise DllmError(f"{name} bounds a model that drafts, which {names} is not: leave it out")

    def _check_tree(self) -> None:
        """Refuse a tree that would be ignored."""
        if self.grafts:
            if self.drafter is None:
                raise DllmError("graft adds to what a drafter says, and there is none: name one of them as drafter")
            if self.search.sampled:
                raise DllmError("graft merges points: leave out either graft or the search that samples")
            dear = next((source.name for source in self.grafts if not source.free), None)
            if dear is not None and not self.tree:
                raise DllmError(
                    f"a chain takes grafts that cost no forward, which {dear} is not: make it the drafter, or give a "
                    "tree's node budget, such as tree=32"
                )
        elif self.drafter is not None and self.drafter.chains_only and (self.cfg.tree or self.search.tree):
            raise DllmError(
                f"drafter {self.drafter.name!r} drafts chains here: leave out the tree, or add branches to it with "
                "graft='suffix'"
            )

    def _check(self, tokens: Iterable[int], source: Drafter, banned: frozenset[int]) -> None:
        vocab = self.verifier.vocab
        for token in tokens:
            if not 0 <= token < vocab:
                raise DllmError(f"{source.name} drafted id {token}, outside the verifier's vocabulary of {vocab}")
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
        if self.feeds and self.proxy is not None:
            self.proxy.age(len(emitted))
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
        self.told = start if states is None else start + len(states)
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
                self.stats.observed.append(self._judged(p, child, child == following))

        if len(kept.path) < len(p):
            self.unsent = EMPTY
        for token in kept.emitted[len(kept.path) :]:
            if self.unsent_at < len(self.unsent):
                said = self.unsent.tokens[self.unsent_at] == token
                self.stats.unsent.append(self._judged(self.unsent, self.unsent_at, said))
                self.unsent, self.unsent_at = self.unsent if said else EMPTY, self.unsent_at + 1

    def _judged(self, p: Proposal, node: int, accepted: bool) -> Judged:
        """A node that was judged; what its sources are worth is learned."""
        slot, conf, spread = p.told[node]
        who, together = self.merged.get(p.paths[node + 1], ("", conf))
        if who:
            self.trust.learn(who, slot, together, accepted)
        own = not who or bool(self.tree) or f"{who}+".startswith(f"{self._name(self.drafter)}+")  # its voice is first
        return Judged(slot, conf, accepted, spread, own)

    def finish(self) -> None:
        """Tell the sources that the text is over."""
        for source in self.sources:
            with blamed(source):
                source.finish(self.ids)

    def lessons(self) -> list[Lesson]:
        """What the text taught. All sources saw the same rounds, so those of one kind learned the same."""
        found: dict[type[Lesson], Lesson] = {}
        for lesson in (self.trust, *(lesson for source in self.sources for lesson in source.lessons())):
            found.setdefault(type(lesson), lesson)
        return [*found.values()]

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


def forked(drafter: Drafter | None) -> Drafter | None:
    """The drafter's copy for one text."""
    if drafter is None:
        return None
    with blamed(drafter):
        return drafter.fork()


@lru_cache(maxsize=4)
def _corpus_table(corpus: tuple[tuple[int, ...], ...], vocab: int, order: int) -> NgramTable:
    return NgramTable(vocab, order).fit(corpus)
