"""A proposer for vLLM's `custom_class` method: drafts of a dLLM or of retrieval, per request.

    speculative_config={
        "method": "custom_class",
        "model": "dllm.drafting.hooks.vllm.DLLMProposer",
        "num_speculative_tokens": 8,
    },
    additional_config={"dllm": {"drafter": "Dream-org/Dream-v0-Instruct-7B"}},     # or "suffix", "lookup"

`speculative_config` takes no keys of ours, so the options (`drafter`, `search`) come from `additional_config`, or from
the environment (DLLM_DRAFTER, DLLM_SEARCH). The interface is young (vLLM pull request 39487; its first release spelled
it `custom_proposer_backend`).

vLLM takes tokens only, so every draft is a chain; its own verification is then exact. Requests move between slots
unannounced, hence a draft is a function of the text alone: what a drafter indexes (`suffix`, `lookup`) is built anew at
every step, in time that grows with the text. Nothing of vLLM is imported: the class is duck-typed on the config that it
is given, and it has been run against that interface only, not inside vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dllm.drafting import EMPTY, Drafter, DraftFailure, Lattice, Need, SpecConfig, as_drafter
from dllm.drafting.drafters import ask
from dllm.errors import DllmError, first_line, unknown

log = logging.getLogger(__name__)
OPTIONS = ("drafter", "search")


class DLLMProposer:
    """`propose` returns at most `num_speculative_tokens` ids for each request; an empty list where there is no
    draft. An error of the drafter is a missing draft: it is logged, and the engine goes on."""

    def __init__(self, vllm_config: Any, drafter: Drafter | None = None) -> None:
        self.k = int(_get(vllm_config.speculative_config, "num_speculative_tokens", 0) or 0)
        if self.k < 1:
            raise DllmError("speculative_config needs num_speculative_tokens of at least 1")
        self.options = _options(vllm_config)
        self.vocab = int(vllm_config.model_config.get_vocab_size())
        self.max_length = int(vllm_config.model_config.max_model_len)
        self.search = SpecConfig(search=self.options.get("search")).build_search(do_sample=False)
        if self.search.tree:
            raise DllmError("vLLM verifies chains: leave out the search that makes trees")
        self.drafter = drafter
        self.failed = False  # said so in the log

    def load_model(self, *_: object, **__: object) -> None:
        """Called once by vLLM: loads the drafter named in the options. Errors in the options end the start."""
        self._source()

    def _source(self) -> Drafter:
        drafter = self.drafter = self.drafter or as_drafter(self.options.get("drafter", "suffix"))
        assert drafter is not None
        if drafter.successors or drafter.taps:
            raise DllmError(
                f"{drafter.name} learns from the verifier's logits or states, which vLLM does not show: use 'suffix', "
                "'lookup' or a model"
            )
        return drafter

    def dummy_run(self, *_: object, **__: object) -> None:
        """Nothing of a proposer takes part in vLLM's memory profile."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Sequence[int] | np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Drafts of a batch; `token_ids_cpu[i, :num_tokens_no_spec[i]]` is the text of request i."""
        drafter, out = self._source(), []
        for i, sampled in enumerate(sampled_token_ids):
            n = int(num_tokens_no_spec[i])
            room = self.max_length - n - 1
            ids = [int(t) for t in token_ids_cpu[i, :n]] if sampled else []
            out.append(self._draft(drafter, ids, min(self.k, room)) if ids and room > 0 else [])
        return out

    def _draft(self, source: Drafter, ids: list[int], k: int) -> list[int]:
        try:
            return self._tokens(source, ids, k)
        except DraftFailure:
            return []
        except Exception as error:
            log.log(
                logging.DEBUG if self.failed else logging.WARNING,
                "no draft: %s (%s); further ones are logged at level debug", first_line(error), type(error).__name__,
            )  # fmt: skip
            self.failed = True
            return []

    def _tokens(self, source: Drafter, ids: list[int], k: int) -> list[int]:
        drafter = source.fork()
        drafter.reset(ids, Need(self.vocab))
        draft = ask(drafter, ids, k)
        if isinstance(draft, Lattice):
            draft = self.search(draft, ids) if draft.k else EMPTY
        tokens = list(draft.within(k).tokens) if draft.is_chain else []
        return tokens[: next((i for i, t in enumerate(tokens) if not 0 <= t < self.vocab), len(tokens))]


def _options(vllm_config: object) -> dict[str, str]:
    """`additional_config["dllm"]`, and the environment where it is silent."""
    given = _get(getattr(vllm_config, "additional_config", None) or {}, "dllm", None) or {}  # foreign
    for key in given:
        if key not in OPTIONS:
            raise unknown("option of additional_config['dllm']", str(key), OPTIONS)
    environment = {key: os.environ[f"DLLM_{key.upper()}"] for key in OPTIONS if os.environ.get(f"DLLM_{key.upper()}")}
    return {**environment, **given}


def _get(config: object, name: str, default: object) -> Any:
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)  # foreign
