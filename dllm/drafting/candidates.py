"""For users who stay in transformers' own assisted generation: a `CandidateGenerator` over any drafter of this package.

Chains only, batch 1, point proposals without logits: transformers then samples its own token and compares, which is
exact. (Sampled ids with soft logits would be exact too; argmax ids with soft logits, as some generators return them,
are not.)

    with assisted_by(verifier, drafter):
        ids = verifier.generate(**inputs, max_new_tokens=64)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from dllm.drafting.control import LengthController, RoundStats
from dllm.drafting.drafters import Drafter, Need, ask
from dllm.drafting.lattice import DraftFailure, Lattice
from dllm.drafting.loop import SpecConfig
from dllm.drafting.ngram import NgramTable
from dllm.drafting.proposal import EMPTY, Proposal
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError


class DraftCandidates(CandidateGenerator):
    """Candidates of a drafter in the protocol of `assistant_model`."""

    def __init__(
        self, drafter: Drafter, verifier: Verifier, spec: SpecConfig | None = None, max_length: int | None = None
    ):
        cfg = spec or SpecConfig(length="heuristic")
        self.search = cfg.build_search(do_sample=False)
        if self.search.tree:
            raise DllmError("assisted generation verifies chains: use custom_generate=dllm.spec_generate for trees")
        if drafter.successors:
            raise DllmError(f"{drafter.name} learns from the verifier's logits, which assisted generation hides")
        self.verifier, self.drafter, self.max_length = verifier, drafter.fork(), max_length
        self.controller: LengthController = cfg.build_controller().fork()
        self.need = Need(verifier.vocab, verifier.eos, tokenizer=verifier.tokenizer)
        self.proxy = NgramTable(verifier.vocab, cfg.order) if cfg.order > 1 else None
        self.known: list[int] = []
        self.drafted = EMPTY
        self.k = 0

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """(1, n) ids -> (1, n + k) ids and no logits; k = 0 is a plain step."""
        if len(input_ids) != 1:
            raise DllmError("assisted generation is for batch size 1: use custom_generate=dllm.spec_generate")
        ids = input_ids[0].tolist()
        self._follow(ids)
        limits = [x for x in (self.max_length, self.verifier.max_positions) if x is not None]
        room = min(limits, default=len(ids) + 1000) - len(ids) - 1
        self.k = max(0, min(self.controller.next_k(room), room))
        self.drafted = self._draft(ids) if self.k else EMPTY
        draft = input_ids.new_tensor([list(self.drafted.tokens)])
        return (torch.cat([input_ids, draft], 1) if len(self.drafted) else input_ids), None

    def _follow(self, ids: list[int]) -> None:
        """Start a text, or learn what the round added."""
        if not self.known or ids[: len(self.known)] != self.known:
            self.drafter.reset(ids, self.need)
            fresh = ids
        else:
            fresh = ids[len(self.known) :]
            self.drafter.observe(ids, fresh, {})
        if self.proxy is not None:
            self.proxy.update(fresh)
        self.known = ids

    def _draft(self, ids: list[int]) -> Proposal:
        try:
            draft = ask(self.drafter, ids, self.k)
        except DraftFailure:
            return EMPTY
        if isinstance(draft, Lattice):
            draft = self.search(draft, ids, eos=self.need.eos, proxy=self.proxy) if draft.k else EMPTY
        draft = draft.within(self.k, self.need.eos)
        return draft.head(self.controller.trim(draft, False, self.k))

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        n = len(self.drafted)
        judged = min(n, num_matches + 1)
        observed = [(i, c, i < num_matches) for i, c in enumerate(self.drafted.conf[:judged])]
        self.controller.update(
            RoundStats(self.k, n, self.k, num_matches, num_matches + 1, "point", pending=2, observed=observed)
        )


@contextmanager
def assisted_by(model: Any, drafter: Any, spec: SpecConfig | None = None) -> Iterator[DraftCandidates]:
    """Inside the block `model.generate` drafts with `drafter` through assisted generation. One thread at a time.

    transformers has no registry of generators, so one of its private methods is replaced for the time of the block,
    and prompt lookup is switched on as the trigger.
    """
    verifier = as_verifier(model)
    source = as_drafter(drafter)
    if source is None:
        raise DllmError("assisted_by needs a drafter")
    made = DraftCandidates(source, verifier, spec)
    config = model.generation_config
    before = config.prompt_lookup_num_tokens

    def choose(generation_config: Any = None, **_: Any) -> DraftCandidates:
        made.max_length = getattr(generation_config, "max_length", None)
        made.known = []
        return made

    model._get_candidate_generator = choose
    config.prompt_lookup_num_tokens = 1
    try:
        yield made
    finally:
        config.prompt_lookup_num_tokens = before
        del model._get_candidate_generator
