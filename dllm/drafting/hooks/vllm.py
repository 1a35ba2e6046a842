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

vLLM takes tokens only, so every draft is a chain; its own verification is then exact. It runs such a class in its first
model runner alone, and without asynchronous scheduling. Requests move between slots unannounced and have no names here,
so what a drafter keeps of a text is found again by the text itself: the longest known one that begins it. All requests
of a step are drafted together, in one ragged forward where the drafter is a model that takes one; a dLLM keeps no keys
of its prefix, as nobody says when a request has ended. Nothing of vLLM is imported: the class is duck-typed on the
config that it is given, and it has been run against that interface only, not inside vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from dllm.drafting import EMPTY, Drafter, DraftFailure, Lattice, Need, SpecConfig, as_drafter
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Ask, Draft, asked, companies
from dllm.errors import DllmError, first_line, unknown

log = logging.getLogger(__name__)
OPTIONS = ("drafter", "search")
KEPT = 512  # texts, of requests that may come again


class Text(NamedTuple):
    """A request as it was last seen, and the drafter that knows it."""

    ids: np.ndarray
    drafter: Drafter


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
        self.need = Need(self.vocab)  # one for all: drafts are made together
        self.texts: list[Text] = []  # last seen last
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
        source, out = self._source(), [list[int]() for _ in sampled_token_ids]
        asks, places, met = list[Ask](), list[int](), list[Text]()
        for i, sampled in enumerate(sampled_token_ids):
            n = int(num_tokens_no_spec[i])
            k = min(self.k, self.max_length - n - 1)
            if sampled and n and k > 0:
                with self._missing():
                    met.append(self._known(source, np.array(token_ids_cpu[i, :n])))
                    asks.append(Ask(met[-1].drafter, met[-1].ids.tolist(), k))
                    places.append(i)
        self.texts = [*self.texts, *met][-KEPT:]
        for company in companies(asks):
            with self._missing():
                for at, draft in zip(company, asked([asks[at] for at in company]), strict=True):
                    with self._missing():
                        out[places[at]] = self._tokens(draft, asks[at])
        return out

    def _known(self, source: Drafter, ids: np.ndarray) -> Text:
        """A text with the drafter that knows its longest beginning, told what is new; a new one where none does."""
        begin = [i for i, t in enumerate(self.texts) if len(t.ids) <= len(ids) and (t.ids == ids[: len(t.ids)]).all()]
        if begin:
            known = self.texts.pop(max(begin, key=lambda i: len(self.texts[i].ids)))
            drafter = known.drafter
            drafter.observe(ids.tolist(), ids[len(known.ids) :].tolist(), ())
        else:
            drafter = source.fork()
            if isinstance(drafter, DiffusionDrafter):
                drafter.prefix_cache = "none"  # nobody says when a request ends, so its keys would stay
            drafter.reset(ids.tolist(), self.need)
        return Text(ids, drafter)

    @contextmanager
    def _missing(self) -> Iterator[None]:
        """An error inside is a missing draft."""
        try:
            yield
        except DraftFailure:
            pass
        except Exception as error:
            log.log(
                logging.DEBUG if self.failed else logging.WARNING,
                "no draft: %s (%s); further ones are logged at level debug", first_line(error), type(error).__name__,
            )  # fmt: skip
            self.failed = True

    def _tokens(self, draft: Draft | DraftFailure, asked_for: Ask) -> list[int]:
        if isinstance(draft, DraftFailure):
            return []
        if isinstance(draft, Lattice):
            draft = self.search(draft, asked_for.ids) if draft.k else EMPTY
        tokens = list(draft.within(asked_for.k).tokens) if draft.is_chain else []
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
