"""A proposer for vLLM's `custom_proposer` interface (v0.22 and later): drafts of a dLLM or of retrieval, per request.

    speculative_config = {
        "num_speculative_tokens": 8,
        "custom_proposer_backend": "dllm.drafting.vllm.DLLMProposer",
        "dllm": {"drafter": "Dream-org/Dream-v0-Instruct-7B"},     # or "suffix", "lookup"
    }

vLLM takes tokens only, so every draft is a point chain; its own verification is then exact. Nothing of vLLM is
imported: the class is duck-typed on the config that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import DraftFailure, Lattice
from dllm.drafting.loop import SpecConfig
from dllm.drafting.proposal import EMPTY, Proposal
from dllm.drafting.registry import as_drafter
from dllm.errors import DllmError


class DLLMProposer:
    """`propose` returns at most `num_speculative_tokens` ids for each request; an empty list where there is no
    draft."""

    def __init__(self, vllm_config: Any, drafter: Drafter | None = None) -> None:
        speculative = vllm_config.speculative_config
        self.k = int(_get(speculative, "num_speculative_tokens", 0))
        if self.k < 1:
            raise DllmError("speculative_config needs num_speculative_tokens of at least 1")
        self.options: Mapping[str, Any] = _get(speculative, "dllm", None) or {}
        self.vocab = int(vllm_config.model_config.get_vocab_size())
        self.max_length = int(vllm_config.model_config.max_model_len)
        self.drafter: Any = drafter
        self.search = SpecConfig(search=self.options.get("search")).build_search(do_sample=False)

    def load_model(self, *_: Any, **__: Any) -> None:
        """Called once by vLLM: loads the drafter named in the config."""
        if self.drafter is None:
            self.drafter = as_drafter(self.options.get("drafter", "suffix"))

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of a batch; `token_ids_cpu[i, :num_tokens_no_spec[i]]` is the text of request i."""
        if self.drafter is None:
            self.load_model()
        out = []
        for i, sampled in enumerate(sampled_token_ids):
            n = int(num_tokens_no_spec[i])
            room = self.max_length - n - 1
            ids = [int(t) for t in token_ids_cpu[i, :n]] if sampled else []
            out.append(self._draft(ids, min(self.k, room)) if ids and room > 0 else [])
        return out

    def _draft(self, ids: list[int], k: int) -> list[int]:
        # requests enter, leave and move between slots unannounced: a draft is a function of the text alone
        drafter = self.drafter.fork()
        try:
            drafter.reset(ids, Need(self.vocab))
            draft = drafter.draft(ids, k)
        except DraftFailure:
            return []
        if isinstance(draft, Lattice):
            draft = self.search(draft, ids) if draft.k else EMPTY
        assert isinstance(draft, Proposal)
        tokens = list(draft.within(k).tokens)
        return tokens[: next((i for i, t in enumerate(tokens) if not 0 <= t < self.vocab), len(tokens))]


def _get(config: Any, name: str, default: Any) -> Any:
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
