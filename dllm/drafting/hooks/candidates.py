"""For users who stay in transformers' own assisted generation: a `CandidateGenerator` over any drafter of this package.

Chains only, batch 1, point proposals without logits: transformers then samples its own token and compares, which is
exact. (Sampled ids with soft logits would be exact too; argmax ids with soft logits, as some generators return them,
are not.) transformers asks stopping criteria once a block: no draft goes past the token at which one of them holds.

    with assisted_by(verifier, drafter):
        ids = verifier.generate(**inputs, max_new_tokens=64)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria
from transformers.generation.candidate_generator import CandidateGenerator

from dllm.drafting import CausalLM, Controller, Drafter, DraftFailure, Judged, Lattice, Need, RoundStats, SpecConfig
from dllm.drafting.drafters import ask, blamed
from dllm.drafting.front import STATEFUL, separate
from dllm.drafting.ngram import NgramTable
from dllm.drafting.pair_head import as_pair_head, check_head
from dllm.drafting.proposal import EMPTY, Proposal
from dllm.drafting.registry import DrafterLike, as_drafter, as_verifier
from dllm.drafting.trim import as_keep
from dllm.drafting.verifier import Verifier, bare
from dllm.drafting.window import as_window
from dllm.errors import DllmError


class DraftCandidates(CandidateGenerator):
    """Candidates of a drafter in the protocol of `assistant_model`."""

    def __init__(
        self,
        drafter: Drafter,
        verifier: Verifier,
        spec: SpecConfig | None = None,
        max_length: int | None = None,
        controller: Controller | None = None,
    ) -> None:
        cfg = spec or SpecConfig(length="heuristic")
        self.search = cfg.build_search(do_sample=False)
        if self.search.tree:
            raise DllmError("assisted generation verifies chains: use custom_generate=dllm.spec_generate for trees")
        given = {"store": cfg.store, "corpus": cfg.corpus, "ngrams": cfg.ngrams != "text"}
        if unread := [name for name, value in given.items() if value]:
            raise DllmError(
                f"{', '.join(unread)}: not read in assisted generation: use custom_generate=dllm.spec_generate"
            )
        if drafter.successors or drafter.taps:
            raise DllmError(
                f"{drafter.name} learns from the verifier's logits or states, which assisted generation hides: "
                "use custom_generate=dllm.spec_generate"
            )
        self.verifier, self.drafter, self.max_length = verifier, drafter.fork(), max_length
        self.controller: Controller = (controller or cfg.build_controller()).fork()
        self.head, self.most = as_pair_head(cfg.pair_head), cfg.k
        mass = cfg.tau_mass if self.head is None else 1.0
        self.need = Need(
            verifier.vocab, verifier.eos, tau_mass=mass, m_max=cfg.m_max, tokenizer=verifier.tokenizer,
            trim=as_keep(cfg.trim), window=as_window(cfg.window),
        )  # fmt: skip
        self.proxy = NgramTable(verifier.vocab, cfg.order) if cfg.order > 1 else None
        self.criteria: list[StoppingCriteria] = []  # what ends the text
        self.known: list[int] = []
        self.drafted = EMPTY
        self.k = 0
        self.pending = 2  # as `RoundStats` counts it: the first round of a text also reads the prompt
        self.t_draft = self.sent = 0.0

    def get_candidates(self, input_ids: Tensor, **_: object) -> tuple[Tensor, None]:  # type: ignore[override]
        """(1, n) ids -> (1, n + k) ids and no logits; k = 0 is a plain step."""
        if len(input_ids) != 1:
            raise DllmError("assisted generation is for batch size 1: use custom_generate=dllm.spec_generate")
        ids, start = input_ids[0].tolist(), time.perf_counter()
        self._follow(ids)
        limits = [x for x in (self.max_length, self.verifier.max_positions) if x is not None]
        room = min(limits, default=len(ids) + 1000) - len(ids) - 1
        room = room if self.most is None else min(room, self.most)
        self.k = max(0, min(self.controller.next_k(room), room))
        self.drafted = self._draft(ids) if self.k else EMPTY
        draft = input_ids.new_tensor([list(self.drafted.tokens)])
        self.sent = time.perf_counter()
        self.t_draft = self.sent - start
        return (torch.cat([input_ids, draft], 1) if len(self.drafted) else input_ids), None

    def _follow(self, ids: list[int]) -> None:
        """Start a text, or learn what the round added."""
        fresh = ids
        with blamed(self.drafter):
            if not self.known or ids[: len(self.known)] != self.known:
                self.drafter.reset(ids, self.need)
                check_head(self.head, self.drafter, self.verifier.vocab)
                self.pending = 2
            else:
                fresh = ids[len(self.known) :]
                self.drafter.observe(ids, fresh, ())
        if self.proxy is not None:
            self.proxy.update(fresh)
        self.known = ids

    def _draft(self, ids: list[int]) -> Proposal:
        try:
            draft = ask(self.drafter, ids, self.k)
        except DraftFailure:
            return EMPTY
        if isinstance(draft, Lattice):
            draft = self._searched(draft, ids) if draft.k else EMPTY
        draft = draft.within(self.k, self.need.eos)
        draft = draft.head(self.controller.trim(draft, False, self.k))
        return draft.head(self._before_stop(ids, draft.tokens))

    def _searched(self, lat: Lattice, ids: list[int]) -> Proposal:
        lat = lat if self.head is None else self.head.over(lat, ids[-1])
        found = self.search(lat, ids, eos=self.need.eos, proxy=self.proxy)
        return lat.marked(found) if self.controller.spread else found

    def _before_stop(self, ids: list[int], draft: Sequence[int]) -> int:
        """How many drafted tokens come before the first one that ends the text: the verifier adds that one itself, and
        then transformers asks the criteria."""
        text, ahead = torch.tensor([[*ids, *draft]], device=self.verifier.device), separate(self.criteria)
        for n in range(len(draft)):
            if any([bool(c(text[:, : len(ids) + n + 1], None).all()) for c in ahead]):
                return n
        return len(draft)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """What transformers accepted of the last draft."""
        observed = [Judged(slot, c, slot < num_matches, s) for slot, c, s in self.drafted.told[: num_matches + 1]]
        r = RoundStats(self.k, len(self.drafted), self.k, num_matches, num_matches + 1, "point", pending=self.pending)
        r.observed, r.t_draft, r.t_verify = observed, self.t_draft, time.perf_counter() - self.sent
        self.controller.update(r)
        self.pending = 1


class EveryToken(StoppingCriteria):
    """A criterion that is asked after every token of a block, in order, as plain decoding asks it."""

    def __init__(self, inner: StoppingCriteria) -> None:
        self.inner, self.asked = inner, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kw: Any) -> Tensor:
        """(B,) bool: the rows that end at any token since the last call."""
        done = input_ids.new_zeros(len(input_ids), dtype=torch.bool)
        for n in range(self.asked + 1, input_ids.shape[1] + 1):
            done = done | self.inner(input_ids[:, :n], scores, **kw)
        self.asked = input_ids.shape[1]
        return done


@contextmanager
def assisted_by(model: CausalLM, drafter: DrafterLike, spec: SpecConfig | None = None) -> Iterator[DraftCandidates]:
    """Inside the block `model.generate` drafts with `drafter` through assisted generation; yields the generator of its
    first call. Blocks may be nested (the innermost drafts), calls may run side by side.

    transformers has no registry of generators, so three of its private methods are replaced on this model for the time
    of the block. Nothing is written to its generation config.
    """
    verifier, source = as_verifier(model), as_drafter(drafter)
    if source is None:
        raise DllmError("assisted_by needs a drafter")
    first = DraftCandidates(source, verifier, spec)
    free, target = [first], bare(model)
    kind = type(target)

    def prepare(*args: Any, **kw: Any) -> Any:
        config, rest = kind._prepare_generation_config(target, *args, **kw)
        config.prompt_lookup_num_tokens = 1  # what makes transformers assist
        return config, rest

    def stopping(*args: Any, **kw: Any) -> Any:
        found = kind._get_stopping_criteria(target, *args, **kw)
        plain = (MaxLengthCriteria, EosTokenCriteria)
        kw["generation_config"]._criteria = type(found)(c if type(c) in plain else EveryToken(c) for c in found)
        return kw["generation_config"]._criteria

    def choose(
        generation_config: Any,
        input_ids: Tensor,
        assistant_model: object = None,
        logits_processor: Sequence[object] = (),
        **_: object,
    ) -> DraftCandidates:
        if assistant_model is not None:
            raise DllmError("assistant_model= and assisted_by both draft: drop one of them")
        counting = [type(p).__name__ for p in logits_processor if type(p).__name__ in STATEFUL]
        if counting:
            raise DllmError(
                f"{counting[0]} remembers what it has seen, and assisted generation shows it rejected tokens: "
                "use custom_generate=dllm.spec_generate"
            )
        made = free.pop() if free else DraftCandidates(source, verifier, spec, controller=first.controller)
        made.max_length, made.criteria = generation_config.max_length, []
        for c in generation_config._criteria:
            if isinstance(c, EveryToken):
                c.asked = input_ids.shape[1]
            made.criteria.append(c.inner if isinstance(c, EveryToken) else c)
        return made

    methods = {
        "_prepare_generation_config": prepare,
        "_get_stopping_criteria": stopping,
        "_get_candidate_generator": choose,
    }
    before = {name: vars(target)[name] for name in methods if name in vars(target)}
    vars(target).update(methods)
    try:
        yield first
    finally:
        for name in methods:
            del vars(target)[name]
        vars(target).update(before)
