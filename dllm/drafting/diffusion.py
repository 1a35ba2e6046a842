"""A masked-diffusion model as drafter: one forward over the text and k masks gives k columns at once.

DiffuSpec (arXiv 2510.02358) and DEER (arXiv 2512.15176) draft so; `suffix_token_id` is DEER's separator behind the
masks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain as joined
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.call.generate import generate
from dllm.decoding.graphs import Graphs, obstacle
from dllm.drafting.drafters import Ask, Draft, Need, Ragged
from dllm.drafting.lattice import DraftFailure, listed
from dllm.drafting.places import Tables, bucket
from dllm.drafting.proposal import EMPTY, Proposal, chain, fit, sent
from dllm.drafting.reading import LEAST, Reading, Readings
from dllm.drafting.store import Seen
from dllm.drafting.trim import KeepLike, as_keep, kept
from dllm.drafting.vocabulary import Vocabulary
from dllm.drafting.window import Window, WindowLike, as_window
from dllm.errors import DllmError
from dllm.models.model import ForwardOptions, Model
from dllm.models.moe import wide
from dllm.models.native import NativeModel
from dllm.models.tokenizer import Tokenizer
from dllm.models.transformer import Known, KVStore
from dllm.samplers.registry import Spec


@dataclass(eq=False)
class Head:
    """What of a model's head drafts are made with."""

    vocabulary: Vocabulary
    rows: Tensor | None  # (n, D) of the ids that are kept; None: all logits are computed

    def logits(self, model: Model, hidden: Tensor) -> Tensor:
        """Logits (..., n) of hidden states (..., D), see `Vocabulary.chosen`, in float32 at least."""
        if self.rows is None:
            return self.vocabulary.chosen(model.logits(hidden))
        logits = F.linear(hidden, self.rows)
        return logits.to(wide(logits.dtype))


# of a model: its heads, by the verifier's size and tokenizer, the choice of the caller and the ids that are kept
_KNOWN: WeakKeyDictionary[Model, dict[tuple[int, int, str | Vocabulary, frozenset[int] | None], Head]] = (
    WeakKeyDictionary()
)
_MEASURED: WeakKeyDictionary[Model, Readings] = WeakKeyDictionary()  # of drafts of a model, whatever they are for
SLOTS, READS = 1024, 16  # the least of captured drafts: texts and lengths share them, and so many cost next to nothing
ROOM = 256  # slots of a store to begin with, where nothing is captured


class Fed(NamedTuple):
    """What a draft feeds, for B texts."""

    ids: Tensor  # (B, W)
    pos: Tensor | None  # (B, W), -1 is padding; None: 0, 1, ...
    slots: Tensor  # (B, K) positions that are predicted
    first: Tensor | int  # position of the first ids, (B, 1)
    known: Known | None
    end: Tensor | None = None  # (B, 1) slots of the store that are seen; None: as `known` says
    lane: Tensor | None = None  # (B,) of the store, where it has several that are not read in a row


class Job(NamedTuple):
    """What a draft feeds of one text."""

    drafter: DiffusionDrafter
    text: list[int]  # from `first` on
    first: int
    n: int  # position of the first of the slots
    k: int
    u: Tensor | None  # of its draws
    final: int  # positions that no later round takes back

    @property
    def end(self) -> int:
        """Behind the last position."""
        return self.first + len(self.text)


@dataclass(eq=False)
class Held:
    """What stands still between drafts: what they feed, and the keys and values of each text."""

    tables: Tables
    store: KVStore | None
    slots: int  # of the store; 0: there is none

    def clear(self, lane: int) -> None:
        """What an earlier text left behind weighs nothing, but may not be NaN."""
        for stored in () if self.store is None else (*self.store.keys, *self.store.values):
            stored[lane].zero_()


@cache
def _banned(ids: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
    """(V,) bool: ids that are never drafted, on the device once, as captured work reads it where it lies."""
    with torch.inference_mode(False):
        return torch.zeros(vocab, dtype=torch.bool).index_fill(0, torch.tensor(ids, dtype=torch.long), True).to(device)


class DiffusionDrafter(Ragged):
    """Any loaded dLLM, shifted or not, bidirectional or block-causal.

    suffix_token_id   a token of the drafter behind the masks (DEER's SEP), None = nothing.
    lookahead_masks   masks behind the ones that are used: against end tokens that only mark the end of the canvas.
    prefix_cache      "auto": exact keys and values of finished blocks for a block-causal model; for a bidirectional
                      one the prefix is recomputed ("none") or, with "approx", reused although it never saw the tokens
                      after it, and recomputed every `refresh` drafts. Draft quality may suffer, correctness cannot.
    vocabulary        "auto", "ids", "strings", "ngrams" or "text": see `Vocabulary`. Text makes chains of point tokens
                      only, n-grams chains and trees of them.
    verifier_tokenizer   None: the one that the verifier came with (inside `generate` it has none: give it here).
    vocab_keep        the verifier's ids that drafts are made of, see `as_keep`: of the head no more is computed.
    window            what of a text is read, see `Window`; None: as much as there are positions. Where a prefix is
                      reused its beginning moves by half a window at a time. "auto": how much, and whether it is reused,
                      by what drafts take, see `Readings`. `trim` and `window` of a call go first.
    temperature       of the drafter's own rows, on top of the verifier's warpers.
    """

    name = "dllm"
    bounds: tuple[str, ...] = ("trim", "window")

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
        vocab_keep: KeepLike = None,
        window: WindowLike = None,
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
        self.keep, self.window = as_keep(vocab_keep), as_window(window)
        self.held: Held | None = None
        self.lane = 0  # of this text in a store of several
        self.fed: list[int] = []  # ids at the positions whose stored keys and values are usable
        self.final = 0  # tokens of the text that no later round takes back
        self.age = 0  # drafts since all was read
        self.reading: Reading | None = None  # by what was measured
        self.begun = 0  # tokens of the text when that was chosen
        self.drafted = 0.0  # when the last draft was there
        self.fellows = 1  # texts that were drafted for together then

    @property
    def chains_only(self) -> bool:
        """Text that is tokenised anew has no columns of candidates."""
        return self.vocabulary.kind == "text"

    @property
    def lattices(self) -> bool:
        """Where drafts are points alone there are none."""
        return not self.vocabulary.points

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """Relate the vocabularies, ban the drafter's own special tokens, forget the store."""
        super().reset(ids, need)
        self.head = self._head(need)
        self.vocabulary, self.reads = self.head.vocabulary, self.window if need.window is None else need.window
        specials = [self.model.mask_id, self.model.pad_id, self.model.bos_id, self.suffix]
        self.banned = self.vocabulary.banned(specials) - need.eos
        self.held, self.fed, self.final = None, [], len(ids)
        self.reading, self.drafted = None, 0.0
        if self.vocabulary.kind == "ngrams":
            self.vocabulary.bridge_of_ngrams.learn(ids, len(ids))
        if need.loans is not None:
            self.lane = need.loans.lane(self.model)

    def _head(self, need: Need) -> Head:
        tokenizer, keep = self.verifier_tokenizer or need.tokenizer, self.keep if need.trim is None else need.trim
        ids = None if keep is None else kept(keep, need.vocab, need.eos)
        known, key = _KNOWN.setdefault(self.model, {}), (need.vocab, id(tokenizer), self.choice, ids)
        if key not in known:
            vocabulary, size = self.choice, self.model.vocab_size
            if not isinstance(vocabulary, Vocabulary):
                vocabulary = Vocabulary.between(self.model.tokenizer, tokenizer, size, need.vocab, vocabulary)
            vocabulary = vocabulary if ids is None else vocabulary.trimmed(ids, size)
            known[key] = Head(vocabulary, None if ids is None else self._rows(vocabulary))
        head = known[key]
        if head.rows is not None and (rows := self._rows(head.vocabulary)) is not None:
            head.rows.copy_(rows)  # the model may have learned since
        return head

    @torch.inference_mode(False)
    def _rows(self, vocabulary: Vocabulary) -> Tensor | None:
        assert vocabulary.shared is not None
        return self.model.head_rows(vocabulary.shared.drafter.on(self.model.device))

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """What was emitted is final: a prefix cache may keep it."""
        self.final = len(ids)
        if self.vocabulary.kind == "ngrams":
            self.vocabulary.bridge_of_ngrams.learn(ids, len(emitted))
        if self.drafted:
            self._measured.beside.add(self.fellows, (perf_counter() - self.drafted) / self.fellows)
            self.drafted = 0.0

    @property
    def company(self) -> Hashable:
        """Texts that are drafted in one forward: of one model, by one law."""
        return (
            id(self.model), id(self.need.loans), self.suffix, self.lookahead, self.temperature, self.banned,
            self._words, self.need.law,
        )  # fmt: skip

    @property
    def _words(self) -> Hashable:
        """What vocabulary work reads. Tables are read where they lie, so they live as long as what was captured."""
        return self.vocabulary.kind if self.vocabulary.shared is None else self.head

    def together(self, asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
        """One ragged forward over all texts and their masks: lattices, or chains where the vocabularies meet in text
        only. Those that outgrew the positions are one of their own, as no store keeps them."""
        drafts: list[Draft | DraftFailure] = [EMPTY] * len(asks)
        fed: dict[bool, dict[int, Job]] = {}
        for i, a in enumerate(asks):
            assert isinstance(a.drafter, DiffusionDrafter)
            a.drafter.fellows = len(asks)
            stored, job = a.drafter._job(a)
            if job is not None:
                fed.setdefault(stored, {})[i] = job
        for stored, jobs in fed.items():
            start, mine = perf_counter(), list(jobs.values())
            table, rows = self._told(mine, stored)
            table = table.cpu()  # the one wait for a draft
            self._measure(mine, perf_counter() - start)
            for at, (i, job) in enumerate(jobs.items()):
                row = None if rows is None else rows[at, : job.k]
                try:
                    drafts[i] = self._listed(asks[i].ids, job, table[at, : job.k], row)
                except DraftFailure as failure:
                    drafts[i] = failure
        return drafts

    def _job(self, a: Ask) -> tuple[bool, Job | None]:
        """What such a draft feeds, all of it, and whether a store keeps what is known."""
        context = self.vocabulary.context(a.ids)
        k = min(a.k, self.model.max_positions - self._extra(a.k) - 1)
        if k < 1 or not context:
            return False, None
        u = None if self.vocabulary.points else self.need.uniforms(k, a.generator)
        self._look(len(context), k)
        row, n, stored = self._row(context, k)
        return stored, Job(self, row, 0, n, k, u, max(0, self.final - (len(context) - n)))

    def _look(self, length: int, k: int) -> None:
        """Choose how much of a text of `length` tokens is read, where that is measured and the last reading is over."""
        window, block, last = self.reads, self.model.block_size, self.reading
        if window is None or window.tokens is not None:
            return
        room = self.model.max_positions - k - self._extra(k)
        if last is not None and last.drafts > 1 and last.tokens + length - self.begun <= room:
            lasts = length - self.begun < last.tokens // 2 if block else self.age < last.drafts
            if lasts:
                return
        most = max(1, min(length, room * 2 // 3 - window.sinks - window.recall))
        lasting = [self.refresh]  # blocks that are over stay as they are, so that none is read anew for freshness
        if self.prefix_cache == "none" or self.vocabulary.kind != "ids":
            lasting = [1]
        elif not block:
            lasting = [*(1 << i for i in range(self.refresh.bit_length()) if 1 << i < self.refresh), self.refresh]
        self.reading = self._measured.choose(most, k, self.fellows, lasting, block or 1)
        self.begun, self.age = length, self.reading.drafts  # what is kept is read anew

    @property
    def looks(self) -> Window | None:
        """What is read of such texts now, in tokens; None: all of it."""
        window, reading = self.reads, self.reading
        if window is None or window.tokens is not None:
            return window
        return None if reading is None else replace(window, tokens=max(LEAST, reading.tokens))

    @property
    def _measured(self) -> Readings:
        return _MEASURED.setdefault(self.model, Readings())

    def _measure(self, jobs: Sequence[Job], seconds: float) -> None:
        """Note what a draft took, where that decides how much is read. A text's first round reads the prompt: what
        stands beside it is no other round's."""
        if self.reads is None or self.reads.tokens is not None:
            return
        self._measured.drafts.of(len(jobs)).add(max(len(job.text) for job in jobs), seconds)
        for job in jobs:
            job.drafter.drafted = perf_counter() if job.drafter.forwards > 1 else 0.0

    def _listed(self, ids: Sequence[int], job: Job, table: Tensor, rows: Tensor | None) -> Draft:
        """The draft of a text by what its host is told, see `_work`."""
        if self.vocabulary.points:
            return self._bridged(ids, table)
        return listed(table, rows, len(ids), 0 if job.u is None else job.u.shape[1])

    @torch.no_grad()
    def columns(self, texts: Sequence[Sequence[int]], k: int) -> Tensor:
        """Logits of the `k` slots behind each of these texts, in one forward without a store: (B, k, V) in verifier
        ids, those that are never drafted at -inf. For whoever learns from drafts; needs `reset`."""
        model, rows = self.model, [self._row(self.vocabulary.context(ids), k)[:2] for ids in texts]
        ids = pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True).to(model.device)  # (B, W)
        each = [torch.arange(len(row)) for row, _ in rows]
        pos = pad_sequence(each, batch_first=True, padding_value=-1).to(model.device)
        hidden = model.forward(ids, pos)  # (B, W, D)
        slots = torch.tensor([n for _, n in rows], device=model.device)[:, None] + torch.arange(k, device=model.device)
        source = model.source(slots)[:, :, None].expand(-1, -1, hidden.shape[-1])
        logits = model.logits(hidden.gather(1, source).flatten(0, 1)) / self.temperature
        banned = _banned(tuple(sorted(self.banned)), self.need.vocab, logits.device)
        logits = fit(self.vocabulary.logits(logits), self.need.vocab).masked_fill(banned, float("-inf"))
        return logits.view(len(texts), k, -1)

    def _bridged(self, ids: Sequence[int], table: Tensor) -> Proposal:
        """The proposal of a table (k, 2 m) of best probabilities and tokens."""
        if not bool(torch.isfinite(table).all()):
            raise DraftFailure("the drafter returned NaN or infinite logits")
        best, tokens = (half.tolist() for half in table.chunk(2, 1))
        if self.vocabulary.kind == "ngrams":
            slots = [dict(zip(map(int, ids), prob, strict=True)) for ids, prob in zip(tokens, best, strict=True)]
            return self.vocabulary.bridge_of_ngrams.proposal(slots, self.need.tree, self.banned)
        draft = [int(ids[0]) for ids in tokens]
        end = next((i for i, t in enumerate(draft) if t in self.model.eos_ids), len(draft))
        found = self.vocabulary.chain(ids, draft[:end], len(draft))
        return chain(found, [float(table[:end, 0].mean())] * len(found))

    def _extra(self, k: int) -> int:
        return self.lookahead + (self.suffix is not None) + (self.model.block_size or 0)

    @torch.no_grad()
    def _told(self, jobs: list[Job], stored: bool) -> tuple[Tensor, Tensor | None]:
        """What a forward says of the k positions behind each text, see `_work`: nothing waits for the device."""
        loans = self.need.loans
        graphs = None if loans is None else loans.drafting(self.model, self._obstacle)
        held = self._hold(jobs, stored, graphs)
        for i, job in enumerate(jobs):
            job.drafter.forwards += 1
            first = job.drafter._first(job.text[: job.n]) if stored else 0
            jobs[i] = job._replace(text=job.text[first:], first=first)
        told = self._eager(jobs, held) if graphs is None else self._replayed(jobs, held, graphs)
        for job in jobs if stored else ():
            settled = job.drafter._settled(job)
            job.drafter.fed += job.text[len(job.drafter.fed) - job.first : settled - job.first]
        return told

    def _row(self, context: list[int], k: int) -> tuple[list[int], int, bool]:
        """Ids of a forward, the position of the first slot among them, and whether a store keeps those before it."""
        room = self.model.max_positions - k - self._extra(k)
        block = self.model.block_size
        if self.reading is None:
            reused = self.prefix_cache == "approx" or (self.prefix_cache == "auto" and block is not None)
        else:
            reused = self.reading.drafts > 1
        context = self._read(context, reused)
        cut = max(0, len(context) - room)
        if cut and block:
            cut = -(-cut // block) * block  # whole blocks, so that the rest keeps its phase
        context = context[cut:]
        n = len(context)
        end = n + k + self.lookahead
        tail = [] if self.suffix is None else [self.suffix]
        if block:
            end = -(-end // block) * block
        stored = reused and not cut and self.vocabulary.kind == "ids"
        return [*context, *[self.mask_id] * (end - n), *tail], n, stored

    def _read(self, context: list[int], stays: bool) -> list[int]:
        """What is read of a text. Where keys and values stay, it begins anew by half a window at a time, or, where it
        is measured, with every reading."""
        unit, window, hop = self.model.block_size or 1, self.reads, self.model.block_size or 1
        if window is None or (window.tokens is None and self.reading is None):
            return context
        if window.tokens is None and self.reading is not None:
            window = replace(window, tokens=max(1, self.reading.tokens + len(context) - self.begun))
        elif window.tokens is not None and stays:
            hop = max(unit, window.tokens // 2 // unit * unit)
        return window.of(context, unit, hop)

    def _hold(self, jobs: Sequence[Job], stored: bool, graphs: Graphs | None) -> Held:
        """Where such texts find what stands still; in a store of other slots they begin anew."""
        drafters, loans = [job.drafter for job in jobs], self.need.loans
        least = max([ROOM if graphs is None else SLOTS, *(d.held.slots for d in drafters if d.held is not None)])
        length = max(len(job.text) for job in jobs)
        slots = min(self.model.max_positions, max(least, 1 << (length - 1).bit_length())) if stored else 0
        lanes = 1 if loans is None else loans.lanes(self.model)

        def make() -> Held:
            return Held(Tables(), self.model.new_store(lanes, slots) if slots else None, slots)

        key = "draft", lanes if slots else 0, slots
        if graphs is not None:
            held = graphs.at(key, make)
        elif loans is not None:
            held = loans.kept(self.model, key, make)
        else:
            held = self.held if self.held is not None and self.held.slots == slots else make()
        for d in drafters:
            if held is not d.held:
                d.held, d.fed, d.age = held, [], 0
                held.clear(d.lane)
        return held

    def _first(self, context: list[int]) -> int:
        """The first position that the store lacks of what is read. What is fed from there is stored, and fed again
        until it is final (and, for blocks, finished)."""
        lasting = self.refresh if self.reading is None else self.reading.drafts
        if not self.model.block_size and self.age >= lasting:
            self.fed, self.age = [], 0
        self.age += 1
        last = max(0, len(context) - 1)
        if self.fed[:last] != context[: min(last, len(self.fed))]:  # the window has moved
            pairs = enumerate(zip(self.fed, context, strict=False))
            self.fed = self.fed[: self._whole(next(i for i, (a, b) in pairs if a != b))]
        return min(len(self.fed), last)

    def _settled(self, job: Job) -> int:
        """Positions whose keys and values no later round changes."""
        return self._whole(min(job.final, job.n))

    def _whole(self, n: int) -> int:
        """Positions of finished blocks among the first n."""
        block = self.model.block_size
        return n // block * block if block else n

    def _obstacle(self) -> str:
        """Why drafts cannot be captured; "" if they can."""
        if not isinstance(self.model, NativeModel):
            return "the drafter brings its own code"
        return obstacle(self.model.transformer, self.model.device)

    def _eager(self, jobs: Sequence[Job], held: Held) -> tuple[Tensor, Tensor | None]:
        """The work on just what it needs."""
        device, lanes = self.model.device, [job.drafter.lane for job in jobs]
        width, reads, end = max(len(job.text) for job in jobs), max(job.k for job in jobs), max(job.end for job in jobs)
        padded = any(len(job.text) < width for job in jobs)
        ids, pos, slots = (
            sent(numbers, device) for numbers in zip(*(_padded(j, width, reads) for j in jobs), strict=True)
        )
        run = slice(lanes[0], lanes[0] + len(lanes)) if lanes == list(range(lanes[0], lanes[0] + len(lanes))) else None
        if held.store is None:
            fed = Fed(ids, pos if padded else None, slots, 0, Known(padded=True) if padded else None)
        elif len(jobs) == 1:
            known = Known(lanes=run, write=slice(jobs[0].first, end), slots=end)
            fed = Fed(ids, pos, slots, jobs[0].first, known)
        else:
            first, ends = sent([[job.first, job.end] for job in jobs], device).chunk(2, 1)
            known = Known(padded=padded, lanes=run, slots=end)
            fed = Fed(ids, pos, slots, first, known, ends, None if run is not None else sent(lanes, device))
        u = None if jobs[0].u is None else sent(_uniforms(jobs, reads), device)
        return self._work(fed, u)

    def _replayed(self, jobs: Sequence[Job], held: Held, graphs: Graphs) -> tuple[Tensor, Tensor | None]:
        """The same work over static tensors, padded to sizes that many drafts share; texts are repeated for that."""
        texts, device = len(jobs), self.model.device
        jobs = [*jobs, *[jobs[-1]] * (bucket(texts) - texts)]
        width, reads = bucket(max(len(j.text) for j in jobs), READS), bucket(max(j.k for j in jobs), READS)
        numbers = [[*joined.from_iterable(_padded(j, width, reads)), j.first, j.end, j.drafter.lane] for j in jobs]
        table = held.tables.tell("fed", numbers, device)
        lanes = 0 if held.store is None else len(held.store.keys[0])
        known = Known(padded=True, lanes=slice(0, 1) if lanes == 1 else None, slots=held.slots)
        ids, pos, slots = table[:, :width], table[:, width : 2 * width], table[:, 2 * width : -3]
        end, lane = (table[:, -2:-1] if lanes else None), (table[:, -1] if lanes > 1 else None)
        fed = Fed(ids, pos, slots, table[:, -3:-2], known, end, lane)
        u = None
        if jobs[0].u is not None:
            every = _uniforms(jobs, reads)
            u = held.tables.tell("u", every.flatten(1), device).view(every.shape)
        key = (len(jobs), width, reads, self.temperature, self.banned, self._words, self.need.law)
        told, rows = graphs.run(key, partial(self._work, fed, u), "drafting")
        return told[:texts].clone(), None if rows is None else rows[:texts].clone()  # the next draft writes over them

    def _work(self, fed: Fed, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The forward of a draft and all that its host is told, u (B, K, n): a table of `Need.told` (B, K, .) and full
        rows (B, K, V), or, where drafts are points, the best probabilities and tokens (B, K, 2 m)."""
        model, options = self.model, ForwardOptions()
        assert self.held is not None
        if fed.known is not None:
            options["known"] = fed.known
        if self.held.store is not None:
            options["store"] = self.held.store
        if fed.end is not None and fed.known is not None:
            options["visible"] = (torch.arange(fed.known.slots, device=fed.end.device) < fed.end)[:, None]
        if fed.lane is not None:
            options["lane"] = fed.lane
        hidden = model.forward(fed.ids, fed.pos, **options)
        at = (model.source(fed.slots) - fed.first)[..., None]  # (B, K, 1)
        read = hidden.gather(1, at.expand(-1, -1, hidden.shape[-1]))  # (B, K, D)
        if self.vocabulary.points:
            prob = torch.softmax(model.logits(read).float() / self.temperature, -1)
            best = prob.topk(1 if self.vocabulary.kind == "text" else self.need.m_max, -1)
            return torch.cat([best.values, best.indices.float()], -1), None
        logits, shared = self.head.logits(model, read) / self.temperature, self.vocabulary.shared
        size, ids = (
            (self.need.vocab, self.banned) if shared is None else (len(shared.column), shared.columns(self.banned))
        )
        banned = _banned(tuple(sorted(ids)), size, logits.device)
        told = [
            self.need.told(text, banned, None if u is None else u[i], shared=shared) for i, text in enumerate(logits)
        ]
        rows = [row for _, row in told if row is not None]
        return torch.stack([table for table, _ in told]), torch.stack(rows) if rows else None


def _padded(job: Job, width: int, reads: int) -> tuple[list[int], list[int], list[int]]:
    """Ids, positions and slots of a text, padded."""
    rest, last = width - len(job.text), job.n + job.k - 1
    slots = [*range(job.n, job.n + job.k), *[last] * (reads - job.k)]
    return [*job.text, *[0] * rest], [*range(job.first, job.end), *[-1] * rest], slots


def _uniforms(jobs: Sequence[Job], reads: int) -> Tensor:
    """Of all draws, (B, reads, n)."""
    given = [job.u for job in jobs if job.u is not None]
    return torch.stack([torch.nn.functional.pad(u, (0, 0, 0, reads - len(u))) for u in given])


class SamplerDrafter(DiffusionDrafter):
    """Any dLLM sampler, with as many refinement steps as it takes, as a source of point chains.

    The order of its commits is not left to right, so its rows are not laws of the tokens given the ones before them:
    the draft is a point mass, whatever the sampler draws. `arguments` go to `dllm.generate`; no sampler: the family's.
    """

    chains_only = True
    bounds = ("window",)

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

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """As any drafter. Errors: a window that is measured."""
        super().reset(ids, need)
        if self.reads is not None and self.reads.tokens is None:
            raise DllmError(
                "the drafts of a sampler are of several forwards, which nothing measures: give window= a number"
            )

    @property
    def company(self) -> Hashable:
        """Texts whose drafts one call of `dllm.generate` makes: those of forks of one drafter."""
        return id(self.arguments), self.reads

    def together(self, asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
        """The answers of `dllm.generate`, as chains; those of one length are a batch."""
        drafts: list[Draft | DraftFailure] = [EMPTY] * len(asks)
        lengths = [min(a.k, self.model.max_positions - 1) for a in asks]
        for k in sorted({k for k in lengths if k >= 1}):
            room = self.model.max_positions - k
            mine = [i for i, length in enumerate(lengths) if length == k]
            texts = [self._read(self.vocabulary.context(asks[i].ids), False)[-room:] for i in mine]
            arguments = {"block_length": k, **self.arguments}
            outs = generate(self.model, texts, sampler=self.sampler, max_new_tokens=k, **arguments)
            for i, out in zip(mine, outs, strict=True):
                asks[i].drafter.forwards += out.nfe
                tokens = self.vocabulary.chain(asks[i].ids, [int(t) for t in out.tokens], k)
                tokens = tokens[: next((at for at, t in enumerate(tokens) if t in self.banned), k)]
                drafts[i] = chain(tokens, [0.8] * len(tokens))
        return drafts
