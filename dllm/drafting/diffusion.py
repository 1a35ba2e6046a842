"""A masked-diffusion model as drafter: one forward over the text and k masks gives k columns at once.

DiffuSpec (arXiv 2510.02358) and DEER (arXiv 2512.15176) draft so; `suffix_token_id` is DEER's separator behind the
masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dllm.call.generate import generate
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import DraftFailure, Lattice
from dllm.drafting.proposal import EMPTY, Proposal, chain, sent
from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.tokenizer import Tokenizer
from dllm.models.transformer import Known, KVStore
from dllm.samplers.registry import Spec

# of a model: what its ids are to a verifier's, by that one's size and tokenizer and by the choice of the caller
_KNOWN: WeakKeyDictionary[Model, dict[tuple[int, int, str], Vocabulary]] = WeakKeyDictionary()


class DiffusionDrafter(Drafter):
    """Any loaded dLLM, shifted or not, bidirectional or block-causal.

    suffix_token_id   a token of the drafter behind the masks (DEER's SEP), None = nothing.
    lookahead_masks   masks behind the ones that are used: against end tokens that only mark the end of the canvas.
    prefix_cache      "auto": exact keys and values of finished blocks for a block-causal model; for a bidirectional
                      one the prefix is recomputed ("none") or, with "approx", reused although it never saw the tokens
                      after it, and recomputed every `refresh` drafts. Draft quality may suffer, correctness cannot.
    vocabulary        "auto", "ids", "strings" or "text": see `Vocabulary`. Text makes chains of point tokens only.
    verifier_tokenizer   None: the one that the verifier came with (inside `generate` it has none: give it here).
    temperature       of the drafter's own rows, on top of the verifier's warpers.
    """

    name = "dllm"

    def __init__(
        self,
        model: Model,
        *,
        suffix_token_id: int | None = None,
        lookahead_masks: int = 0,
        prefix_cache: str = "auto",
        refresh: int = 8,
        vocabulary: str | Vocabulary = "auto",
        verifier_tokenizer: Tokenizer | None = None,
        temperature: float = 1.0,
    ) -> None:
        if model.mask_id is None:
            raise DllmError("this model has no mask token, so it cannot draft in one forward; load it with mask_id=...")
        if prefix_cache not in ("auto", "none", "approx"):
            raise DllmError(f"prefix_cache is 'auto', 'none' or 'approx', not {prefix_cache!r}")
        if lookahead_masks < 0 or refresh < 1 or temperature <= 0:
            raise DllmError("lookahead_masks must not be negative; refresh and temperature must be positive")
        self.model, self.suffix, self.lookahead = model, suffix_token_id, lookahead_masks
        self.mask_id: int = model.mask_id
        self.prefix_cache, self.refresh, self.temperature = prefix_cache, refresh, temperature
        self.choice, self.verifier_tokenizer = vocabulary, verifier_tokenizer
        self.store: KVStore | None = None
        self.slots = 0
        self.valid = 0  # positions whose stored keys and values are usable
        self.final = 0  # positions that no later round takes back
        self.age = 0

    @property
    def chains_only(self) -> bool:
        """Text that is tokenised anew has no columns of candidates."""
        return self.vocabulary.kind == "text"

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """Relate the vocabularies, ban the drafter's own special tokens, forget the store."""
        super().reset(ids, need)
        self.vocabulary = self._vocabulary(need)
        specials = [self.model.mask_id, self.model.pad_id, self.model.bos_id, self.suffix]
        self.banned = self.vocabulary.banned(specials) - need.eos
        self._bans = torch.zeros(need.vocab, dtype=torch.bool, device=self.model.device)
        self._bans[sorted(self.banned)] = True
        self.store, self.final = None, len(ids)

    def _vocabulary(self, need: Need) -> Vocabulary:
        if isinstance(self.choice, Vocabulary):
            return self.choice
        tokenizer = self.verifier_tokenizer or need.tokenizer
        known, key = _KNOWN.setdefault(self.model, {}), (need.vocab, id(tokenizer), self.choice)
        if key not in known:
            sizes = self.model.vocab_size, need.vocab
            known[key] = Vocabulary.between(self.model.tokenizer, tokenizer, *sizes, self.choice)
        return known[key]

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: dict[int, list[int]]) -> None:
        """What was emitted is final: a prefix cache may keep it."""
        self.final = len(ids)

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Lattice | Proposal:
        """One forward over the text and `k` masks: a lattice, or a chain where the vocabularies meet in text only."""
        context = self.vocabulary.context(ids)
        k = min(k, self.model.max_positions - self._extra(k) - 1)
        if k < 1:
            return EMPTY
        logits = self._forward(context, k) / self.temperature  # (k, V_d)
        if self.vocabulary.kind == "text":
            return self._bridged(ids, logits, k)
        return self.need.lattice(self.vocabulary.logits(logits), len(ids), self._bans)

    def _bridged(self, ids: Sequence[int], logits: Tensor, k: int) -> Proposal:
        best, at = torch.stack([t.float() for t in torch.softmax(logits.float(), -1).max(-1)]).cpu()  # the one wait
        if not bool(torch.isfinite(best).all()):
            raise DraftFailure("the drafter returned NaN or infinite logits")
        draft = at.long().tolist()
        end = next((i for i, t in enumerate(draft) if t in self.model.eos_ids), k)
        tokens = self.vocabulary.chain(ids, draft[:end], k)
        return chain(tokens, [float(best[:end].mean())] * len(tokens))

    def _extra(self, k: int) -> int:
        return self.lookahead + (self.suffix is not None) + (self.model.block_size or 0)

    def _forward(self, context: list[int], k: int) -> Tensor:
        """Logits (k, V_d) of the k positions behind `context`."""
        self.forwards += 1
        room = self.model.max_positions - k - self._extra(k)
        cut = max(0, len(context) - room)
        block = self.model.block_size
        if cut and block:
            cut = -(-cut // block) * block  # whole blocks, so that the rest keeps its phase
        context = context[cut:]
        n = len(context)
        end = n + k + self.lookahead
        tail = [] if self.suffix is None else [self.suffix]
        if block:
            end = -(-end // block) * block
        row = [*context, *[self.mask_id] * (end - n), *tail]
        reused = self.prefix_cache == "approx" or (self.prefix_cache == "auto" and block is not None)
        cached = reused and not cut and self.vocabulary.kind == "ids"
        slots = torch.arange(n, n + k, device=self.model.device)
        hidden, first = self._cached(row, n) if cached else (self.model.forward(sent([row], self.model.device)), 0)
        return self.model.logits(hidden[0, self.model.source(slots) - first])

    def _cached(self, row: list[int], n: int) -> tuple[Tensor, int]:
        """Recompute from the first position that the store lacks; keep what is final (and, for blocks, finished)."""
        block, device = self.model.block_size, self.model.device
        if self.store is None or self.slots < len(row):  # twice the text: a context of 128 k positions is rarely filled
            self.slots = min(self.model.max_positions, max(256, 2 * len(row)))
            self.store, self.valid, self.age = self.model.new_store(1, self.slots), 0, 0
        if not block and self.age >= self.refresh:
            self.valid, self.age = 0, 0
        self.age += 1
        first = max(0, min(self.valid, n - 1))
        final = min(self.final, n)
        final = final // block * block if block else final
        pos = torch.arange(first, len(row), device=device)[None]
        known = Known(lanes=slice(0, 1), slots=len(row))
        hidden = self.model.forward(sent([row[first:]], device), pos, keep=pos < final, store=self.store, known=known)
        self.valid = max(self.valid, final)
        return hidden, first


class SamplerDrafter(DiffusionDrafter):
    """Any dLLM sampler, with as many refinement steps as it takes, as a source of point chains.

    The order of its commits is not left to right, so its rows are not laws of the tokens given the ones before them:
    the draft is a point mass, whatever the sampler draws. `arguments` go to `dllm.generate`; no sampler: the family's.
    """

    chains_only = True

    def __init__(
        self,
        model: Model,
        sampler: Spec | None = None,
        *,
        vocabulary: str | Vocabulary = "auto",
        verifier_tokenizer: Tokenizer | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, vocabulary=vocabulary, verifier_tokenizer=verifier_tokenizer)
        self.sampler, self.arguments = sampler, arguments
        self.name = f"sampler {sampler or 'of the family'}"

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """The answer of `dllm.generate`, as a chain."""
        k = min(k, self.model.max_positions - 1)
        if k < 1:
            return EMPTY
        context = self.vocabulary.context(ids)[k - self.model.max_positions :]
        arguments = {"block_length": k, **self.arguments}
        out = generate(self.model, context, sampler=self.sampler, max_new_tokens=k, **arguments)
        self.forwards += out.nfe
        tokens = self.vocabulary.chain(ids, [int(t) for t in out.tokens], k)
        tokens = tokens[: next((i for i, t in enumerate(tokens) if t in self.banned), k)]
        return chain(tokens, [0.8] * len(tokens))
