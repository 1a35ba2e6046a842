"""A masked-diffusion model as drafter: one forward over the text and k masks gives k columns at once.

DiffuSpec (arXiv 2510.02358) and DEER (arXiv 2512.15176) draft so; `suffix_token_id` is DEER's separator behind the
masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dllm.call.generate import generate
from dllm.decoding.graphs import Graphs, obstacle
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import DraftFailure, Lattice, listed
from dllm.drafting.places import Tables, bucket
from dllm.drafting.proposal import EMPTY, Proposal, chain, sent
from dllm.drafting.store import Seen
from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError
from dllm.models.model import ForwardOptions, Model
from dllm.models.native import NativeModel
from dllm.models.tokenizer import Tokenizer
from dllm.models.transformer import Known, KVStore
from dllm.samplers.registry import Spec

# of a model: what its ids are to a verifier's, by that one's size and tokenizer and by the choice of the caller
_KNOWN: WeakKeyDictionary[Model, dict[tuple[int, int, str], Vocabulary]] = WeakKeyDictionary()
SLOTS, READS = 1024, 16  # the least of captured drafts: texts and lengths share them, and so many cost next to nothing
ROOM = 256  # slots of a store to begin with, where nothing is captured


class Fed(NamedTuple):
    """What a draft feeds."""

    ids: Tensor  # (1, W)
    pos: Tensor | None  # (1, W), -1 is padding; None: 0, 1, ...
    slots: Tensor  # (K,) positions that are predicted
    first: Tensor | int  # position of the first id, (1,)
    known: Known | None
    end: Tensor | None = None  # (1, 1) slots of the store that are seen; None: as `known` says
    lane: Tensor | None = None  # (1,) of the store, where it has several


@dataclass(eq=False)
class Held:
    """What stands still between drafts: what they feed, and the keys and values of each text."""

    tables: Tables
    store: KVStore | None
    slots: int  # of the store; 0: there is none

    def clear(self, lane: int) -> None:
        """What an earlier text left behind weighs nothing, but may not be NaN."""
        for kept in () if self.store is None else (*self.store.keys, *self.store.values):
            kept[lane].zero_()


@cache
def _banned(ids: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
    """(V,) bool: ids that are never drafted, on the device once, as captured work reads it where it lies."""
    with torch.inference_mode(False):
        return torch.zeros(vocab, dtype=torch.bool).index_fill(0, torch.tensor(ids, dtype=torch.long), True).to(device)


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
        self.held: Held | None = None
        self.lane = 0  # of this text in a store of several
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
        self.held, self.final = None, len(ids)
        if need.loans is not None:
            self.lane = need.loans.lane(self.model)

    def _vocabulary(self, need: Need) -> Vocabulary:
        if isinstance(self.choice, Vocabulary):
            return self.choice
        tokenizer = self.verifier_tokenizer or need.tokenizer
        known, key = _KNOWN.setdefault(self.model, {}), (need.vocab, id(tokenizer), self.choice)
        if key not in known:
            sizes = self.model.vocab_size, need.vocab
            known[key] = Vocabulary.between(self.model.tokenizer, tokenizer, *sizes, self.choice)
        return known[key]

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """What was emitted is final: a prefix cache may keep it."""
        self.final = len(ids)

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Lattice | Proposal:
        """One forward over the text and `k` masks: a lattice, or a chain where the vocabularies meet in text only."""
        context = self.vocabulary.context(ids)
        k = min(k, self.model.max_positions - self._extra(k) - 1)
        if k < 1:
            return EMPTY
        bridged = self.vocabulary.kind == "text"
        u = None if bridged else self.need.uniforms(k, generator)
        table, rows = self._told(context, k, u)
        table = table.cpu()  # the one wait for a draft
        if bridged:
            return self._bridged(ids, table)
        return listed(table, rows, len(ids), 0 if u is None else u.shape[1])

    def _bridged(self, ids: Sequence[int], table: Tensor) -> Proposal:
        """The chain of a table (k, 2) of probabilities and tokens."""
        best, draft = table[:, 0], table[:, 1].long().tolist()
        if not bool(torch.isfinite(best).all()):
            raise DraftFailure("the drafter returned NaN or infinite logits")
        end = next((i for i, t in enumerate(draft) if t in self.model.eos_ids), len(draft))
        tokens = self.vocabulary.chain(ids, draft[:end], len(draft))
        return chain(tokens, [float(best[:end].mean())] * len(tokens))

    def _extra(self, k: int) -> int:
        return self.lookahead + (self.suffix is not None) + (self.model.block_size or 0)

    @torch.no_grad()
    def _told(self, context: list[int], k: int, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a forward says of the k positions behind `context`, see `_work`: nothing waits for the device."""
        self.forwards += 1
        row, n, stored = self._row(context, k)
        loans, device = self.need.loans, self.model.device
        graphs = None if loans is None else loans.drafting(self.model, self._obstacle)
        held = self._hold(len(row) if stored else 0, graphs)
        first = self._first(n) if stored else 0
        if graphs is None:
            known = Known(lanes=slice(0, 1), write=slice(first, len(row)), slots=len(row)) if stored else None
            pos = torch.arange(first, len(row), device=device)[None] if stored else None
            slots = torch.arange(n, n + k, device=device)
            fed = Fed(sent([row[first:]], device), pos, slots, first, known)
            told = self._work(fed, None if u is None else sent(u, device))
        else:
            told = self._replayed(graphs, held, row[first:], first, n, k, u)
        if stored:
            self.valid = max(self.valid, self._settled(n))
        return told

    def _row(self, context: list[int], k: int) -> tuple[list[int], int, bool]:
        """Ids of a forward, the position of the first slot among them, and whether a store keeps those before it."""
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
        reused = self.prefix_cache == "approx" or (self.prefix_cache == "auto" and block is not None)
        stored = reused and not cut and self.vocabulary.kind == "ids"
        return [*context, *[self.mask_id] * (end - n), *tail], n, stored

    def _hold(self, length: int, graphs: Graphs | None) -> Held:
        """Where such a row finds what stands still; with a store of other slots it begins anew."""
        least = max(ROOM if graphs is None else SLOTS, 0 if self.held is None else self.held.slots)
        slots = min(self.model.max_positions, max(least, 1 << (length - 1).bit_length())) if length else 0
        lanes = 1 if graphs is None or self.need.loans is None else self.need.loans.lanes(self.model)

        def make() -> Held:
            return Held(Tables(), self.model.new_store(lanes, slots) if slots else None, slots)

        if graphs is not None:
            held = graphs.at(("draft", lanes if slots else 0, slots), make)
        else:
            held = self.held if self.held is not None and self.held.slots == slots else make()
        if held is not self.held:
            self.held, self.valid, self.age = held, 0, 0
            if graphs is not None:
                held.clear(self.lane)
        return held

    def _first(self, n: int) -> int:
        """The first position that the store lacks. What is fed from there is stored, and fed again until it is final
        (and, for blocks, finished)."""
        if not self.model.block_size and self.age >= self.refresh:
            self.valid, self.age = 0, 0
        self.age += 1
        return max(0, min(self.valid, n - 1))

    def _settled(self, n: int) -> int:
        """Positions whose keys and values no later round changes."""
        final, block = min(self.final, n), self.model.block_size
        return final // block * block if block else final

    def _obstacle(self) -> str:
        """Why drafts cannot be captured; "" if they can."""
        if not isinstance(self.model, NativeModel):
            return "the drafter brings its own code"
        return obstacle(self.model.transformer, self.model.device)

    def _replayed(
        self, graphs: Graphs, held: Held, ids: list[int], first: int, n: int, k: int, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same work over static tensors, padded to sizes that many drafts share."""
        width, reads, end = bucket(len(ids), READS), bucket(k, READS), first + len(ids)
        rest, positions = width - len(ids), [*range(n, n + k), *[n + k - 1] * (reads - k)]
        numbers = [*ids, *[0] * rest, *range(first, end), *[-1] * rest, *positions, first, end, self.lane]
        table = held.tables.tell("fed", [numbers], self.model.device)
        lanes = 0 if held.store is None else len(held.store.keys[0])
        known = Known(padded=True, lanes=slice(0, 1) if lanes == 1 else None, slots=held.slots)
        ids_, pos, slots = table[:, :width], table[:, width : 2 * width], table[0, 2 * width : -3]
        end_, lane = (table[:, -2:-1] if lanes else None), (table[0, -1:] if lanes > 1 else None)
        fed = Fed(ids_, pos, slots, table[0, -3:-2], known, end_, lane)
        if u is not None:
            flat = torch.nn.functional.pad(u, (0, 0, 0, reads - k)).view(1, -1)
            u = held.tables.tell("u", flat, self.model.device).view(reads, -1)
        # strings are read where they lie, so the vocabulary lives as long as what was captured
        vocabulary = self.vocabulary if self.vocabulary.kind == "strings" else self.vocabulary.kind
        key = (width, reads, self.temperature, self.banned, vocabulary, self.need.law)
        table, rows = graphs.run(key, partial(self._work, fed, u), "drafting")
        return table[:k].clone(), None if rows is None else rows[:k].clone()  # the next draft writes over them

    def _work(self, fed: Fed, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The forward of a draft and all that its host is told: a table of `Need.told` and full rows, or, where the
        vocabularies meet in text, best probabilities and tokens (K, 2)."""
        model, options = self.model, ForwardOptions()
        assert self.held is not None
        if fed.known is not None:
            options["known"] = fed.known
        if self.held.store is not None:
            options["store"] = self.held.store
        if fed.end is not None:
            options["visible"] = (torch.arange(self.held.slots, device=fed.end.device) < fed.end)[:, None]
        if fed.lane is not None:
            options["lane"] = fed.lane
        hidden = model.forward(fed.ids, fed.pos, **options)
        logits = model.logits(hidden[0].index_select(0, model.source(fed.slots) - fed.first)) / self.temperature
        if self.vocabulary.kind == "text":
            return torch.stack([t.float() for t in torch.softmax(logits.float(), -1).max(-1)], 1), None
        banned = _banned(tuple(sorted(self.banned)), self.need.vocab, logits.device)
        return self.need.told(self.vocabulary.logits(logits), banned, u)


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
