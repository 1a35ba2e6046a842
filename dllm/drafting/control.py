"""How long a draft should be. A controller decides twice a round: how many slots to draft, and how much of the draft
to submit.

All of them are safe, also rules of your own: a length never changes what is generated, only how fast. The loop sees to
it where draws could tell: a sampled draft is never cut before its last chunk (see `Speculation._chunks`). Lengths count
drafted tokens; `room` is the most that the text may still take before the last token.
"""

from __future__ import annotations

import copy
import math
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from dllm.drafting.estimate import ESTIMATORS, Estimator
from dllm.drafting.proposal import Proposal, Spread
from dllm.errors import DllmError
from dllm.spec import check, param


class Judged(NamedTuple):
    """A node that the verifier judged."""

    slot: int  # 0 is the first behind the text
    conf: float
    accepted: bool
    spread: Spread | None = None  # of its row
    own: bool = True  # the drafter's, else of what is grafted


@dataclass
class RoundStats:
    """One round: lengths in tokens, times in seconds."""

    k: int = 0  # slots drafted (carried ones included)
    nodes: int = 0  # tokens submitted
    l_gen: int = 0  # first end token in the raw draft, k without one
    accepted: int = 0  # without the correction or bonus
    emitted: int = 0
    kind: str = "none"  # point, sampled, none
    carried: bool = False
    failed: bool = False
    forwards: int = 0  # of the drafter
    fellows: int = 1  # texts whose drafts were made in one go with this one's
    slots: int = 0  # of the longest of these drafts, 0 = of this one
    pending: int = 1  # text tokens fed beside the draft (the prompt in round one)
    rows: int = 1  # of the verifying forward
    width: int = 0  # tokens of its widest row, 0 = of this one
    leads: bool = True  # of the rows of a forward, the one that speaks for its seconds
    replays: int = 0  # forwards over what an earlier call left in the cache, for states that a drafter reads
    observed: list[Judged] = field(default_factory=list)
    unsent: list[Judged] = field(default_factory=list)  # drafted, not submitted, and judged by what the text said
    t_replay: float = 0.0
    t_draft: float = 0.0
    t_search: float = 0.0
    t_verify: float = 0.0
    t_commit: float = 0.0
    t_other: float = 0.0

    @property
    def judged(self) -> dict[int, bool]:
        """slot -> was a node of it accepted? Slots behind a rejection were not judged; siblings count once."""
        return _by_slot(self.observed)

    @property
    def wall(self) -> dict[str, float]:
        """Seconds per stage."""
        return {name: vars(self)[f"t_{name}"] for name in ("replay", "draft", "search", "verify", "commit", "other")}

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return sum(self.wall.values())


def _by_slot(nodes: Iterable[Judged]) -> dict[int, bool]:
    out: dict[int, bool] = {}
    for node in nodes:
        out[node.slot] = out.get(node.slot, False) or node.accepted
    return out


class Length(NamedTuple):
    """A row asks how many slots to draft, of at most `room`. `offered`: the chances of the nodes of a chain that is
    there without a forward."""

    controller: Controller
    room: int
    offered: Sequence[float] = ()


class Cut(NamedTuple):
    """A row asks how many nodes of a draft to submit, see `Controller.trim`."""

    controller: Controller
    proposal: Proposal
    carried: bool = False
    k: int = 0


class Controller:
    """Base of all length controllers, and the one that drafts as much as it may. What it decides changes how fast a
    text is written, never the text. The loop forks it for every text and batch row.

    k_max   most slots of a draft.
    rows    of the batch, set by the loop: a verify is shared by so many.
    spread  whether it reads `Proposal.spread`, which takes a moment.
    """

    k_max: int = 32
    rows: int = 1
    spread: bool = False

    def __post_init__(self) -> None:
        """The settings of one that is a dataclass. Errors: another kind, out of range."""
        check(self, type(self).__name__)

    def fork(self) -> Controller:
        """A copy for another row or another text."""
        return copy.deepcopy(self)

    def next_k(self, room: int) -> int:
        """Slots to draft now; 0 = a plain step."""
        return min(self.k_max, room)

    def more(self, conf: Sequence[float], room: int) -> int:
        """Slots to add after a chunk with these confidences (chains only)."""
        return 0

    def trim(self, proposal: Proposal, carried: bool = False, k: int = 0) -> int:
        """How many nodes to submit. Reads `proposal.told` alone: for sampled drafts it must not depend on the draws.

        Of a sampled draft that grew by `more` only the last chunk can be cut: a smaller number counts as that cut.
        """
        return len(proposal)

    def lengths(self, asked: Sequence[Length], rows: int) -> list[int]:
        """`next_k` of all rows of a batch that ask, each by itself where a rule knows nothing of batches. `rows`: those
        of the next verify that are not done."""
        return [q.controller.next_k(q.room) for q in asked]

    def cuts(self, asked: Sequence[Cut], rows: int) -> list[int]:
        """`trim` of all rows of a batch that ask, likewise."""
        return [q.controller.trim(q.proposal, q.carried, q.k) for q in asked]

    def keep(self, remaining: int, conf: Sequence[float], spread: Sequence[Spread] = ()) -> bool:
        """Is a carried-over rest worth more than a fresh draft? Without costs: if two of its tokens should pass."""
        return float(np.cumprod(np.array(conf[:remaining])).sum()) >= 2

    def update(self, r: RoundStats) -> None:
        """Learn from a finished round."""


@dataclass(eq=False)
class Fixed(Controller):
    """Always `k`."""

    k: int = param(8, "pays with most pairs", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.k_max = self.k


@dataclass(eq=False)
class ADL(Controller):
    """Adaptive draft length of DiffuSpec (arXiv 2510.02358): k follows a moving average of the generated length.

    k = clip(floor(Gbar) + delta [Abar >= Gbar], k_min, k_max), both averages with weight rho. Defaults are the paper's.
    `count_bonus` counts the correction token in L_acc: without it Abar can never pass Gbar and k never grows.
    `ema_init` "zero" is the printed rule, "first" starts both averages at the first round.
    """

    k_min: int = param(20, "the paper's", low=1)
    k_max: int = param(30, "the paper's", low=1)
    delta: int = param(10, "the paper's", low=0)
    rho: float = param(0.5, "the paper's", above=0, high=1)
    count_bonus: bool = param(True, "without it k never grows")
    ema_init: str = param("zero", "the printed rule", choices=("zero", "first"))
    k_first: int | None = param(None, "k_max", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_min > self.k_max:
            raise DllmError(f"adl needs 1 <= k_min <= k_max, got {self.k_min} and {self.k_max}")
        self.k = self.k_max if self.k_first is None else self.k_first
        self.gen = self.acc = 0.0
        self.rounds = 0

    def next_k(self, room: int) -> int:
        """The k that the last round left."""
        return min(self.k, room)

    def update(self, r: RoundStats) -> None:
        """Move both averages and k; a round without a draft says nothing."""
        if not r.k:
            return
        accepted = r.emitted if self.count_bonus else r.accepted
        rho = 1.0 if self.ema_init == "first" and not self.rounds else self.rho
        self.gen += rho * (r.l_gen - self.gen)
        self.acc += rho * (accepted - self.acc)
        self.rounds += 1
        grow = self.delta if self.acc >= self.gen else 0
        self.k = min(max(math.floor(self.gen) + grow, self.k_min), self.k_max)


@dataclass(eq=False)
class FailFast(Controller):
    """Draft chunk after chunk while every new token is confident (FailFast, arXiv 2512.20573; defaults as released).

    The chunk that holds the first doubtful token is still submitted.
    """

    chunk: int = param(10, "as released", low=1)
    tau: float = param(0.45, "as released", low=0, high=1)
    k_max: int = param(60, "as released", low=1)

    def next_k(self, room: int) -> int:
        """One chunk."""
        return min(self.chunk, room)

    def more(self, conf: Sequence[float], room: int) -> int:
        """Another chunk where every token of the last one is likely enough."""
        new = conf[-self.chunk :]
        if not new or min(new) < self.tau or len(conf) % self.chunk:
            return 0
        return max(0, min(self.chunk, self.k_max - len(conf), room - len(conf)))


@dataclass(eq=False)
class Heuristic(Controller):
    """The rule of transformers' assisted generation: two more after a full acceptance, else one less."""

    k: int = param(5, "transformers' first one", low=1)
    k_max: int = param(64, "a draft as long as a paragraph", low=1)

    def next_k(self, room: int) -> int:
        """The k that the last round left."""
        return min(self.k, self.k_max, room)

    def update(self, r: RoundStats) -> None:
        """Two more, or one less."""
        if r.nodes:
            self.k = min(self.k + 2, self.k_max) if r.accepted == r.nodes else max(1, self.k - 1)


@dataclass(eq=False)
class RejectionThreshold(Controller):
    """Stop where the chance that something was rejected passes `h` (SpecDec++, arXiv 2405.19715).

    For a one-forward drafter the slots are already paid for: the rule trims what is submitted. `accept` says how likely
    a node is accepted: the paper's head is "head", learned while decoding.
    """

    h: float = param(0.7, "the paper's", above=0, high=1)
    k_max: int = param(32, "as every controller's", low=1)
    accept: str = param("draft", "nothing to learn", choices=tuple(ESTIMATORS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pair = self.estimate = ESTIMATORS[self.accept]()
        self.spread = self.estimate.spread

    def fork(self) -> RejectionThreshold:
        """What is learned belongs to the pair."""
        twin = copy.copy(self)
        twin.estimate = self.pair.fork()
        return twin

    def trim(self, proposal: Proposal, carried: bool = False, k: int = 0) -> int:
        """The nodes before the threshold, at least one."""
        if not proposal.conf:
            return len(proposal)
        survival = proposal.survival([self.estimate(*node) for node in proposal.told])
        return max(1, next((i for i, s in enumerate(survival) if 1 - s > self.h), len(survival)))

    def update(self, r: RoundStats) -> None:
        """Learn from the judged nodes."""
        for node in r.observed:
            self.estimate.add(node.slot, node.conf, node.accepted, node.spread)


class CostTable:
    """Measured seconds by length: a moving average per bucket, as it was measured. A longer forward may be the faster
    one, since matrix kernels are made for some shapes. Between the measured lengths stands the lower hull of all of
    them: a length that nobody tried counts as good as it may be, so that it is tried where that would pay.

    rate    of the moving average.
    beyond  seconds a token behind the longest length that was measured, as a share of the shortest one's; None: as
            between the two.
    """

    TRIED = 2  # times that a length was measured before a slow reading is believed

    def __init__(self, rate: float = 0.1, beyond: float | None = None) -> None:
        self.rate, self.beyond = rate, beyond
        self.keys: list[int] = []
        self.mean: dict[int, float] = {}
        self.seen: dict[int, int] = {}
        self._table: np.ndarray | None = None

    @staticmethod
    def bucket(n: int) -> int:
        """Fine where lengths are short, coarse where they are long."""
        if n <= 8:
            return n
        return 4 * round(n / 4) if n <= 32 else 16 * round(n / 16)

    def add(self, n: int, seconds: float) -> None:
        """A measurement of length `n`."""
        n, seconds = self.bucket(n), max(seconds, 1e-9)
        if n not in self.mean:
            insort(self.keys, n)
        mean, seen = self.mean.get(n, seconds), self.seen.get(n, 0) + 1
        if seen <= 3:  # warm-up only ever makes a forward look slower
            mean = min(mean, seconds)
        else:  # a hiccup of the machine is no cost of the model
            mean += max(self.rate, 1 / seen) * (min(seconds, 3 * mean) - mean)
        self.mean[n], self.seen[n] = mean, seen
        self._table = None

    def table(self, n: int) -> np.ndarray:
        """Seconds for lengths 0..n: (n + 1,)."""
        if self._table is None or len(self._table) <= n:
            self._table = self._build(max(n, 64))
        table: np.ndarray = self._table[: n + 1]
        return table

    def _build(self, n: int) -> np.ndarray:
        x = np.arange(n + 1, dtype=float)
        if not self.keys:
            return 1.0 + 0.02 * x  # unmeasured: a forward with a mild slope, in arbitrary units
        keys, values = self._hull()
        slope = 0.02 * values[0]
        if len(keys) > 1:
            slope = max(1e-9, (values[-1] - values[0]) / (keys[-1] - keys[0]))
        out: np.ndarray = np.interp(x, keys, values)
        low = x < keys[0]
        out[low] = np.maximum(values[0] * 0.5, values[0] - slope * (keys[0] - x[low]))
        high = x > keys[-1]
        slope = slope if self.beyond is None else self.beyond * values[0]
        out[high] = values[-1] + slope * (x[high] - keys[-1])
        for length in range(1, n + 1):
            where = self.bucket(length)
            if self.seen.get(where, 0) >= self.TRIED:
                out[length] = self.mean[where]
        return out

    def _hull(self) -> tuple[list[int], list[float]]:
        """The lower convex hull of what was measured, made not to decrease."""
        keys: list[int] = []
        values: list[float] = []
        best = np.minimum.accumulate([self.mean[k] for k in reversed(self.keys)])[::-1]
        for key, value in zip(self.keys, best.tolist(), strict=True):
            while len(keys) > 1 and (values[-1] - values[-2]) * (key - keys[-1]) >= (value - values[-1]) * (
                keys[-1] - keys[-2]
            ):
                keys.pop()
                values.pop()
            keys.append(key)
            values.append(value)
        return keys, values


class Shared:
    """Seconds of work that rows of a batch share, by their number and the longest of them; `beyond` of each table."""

    def __init__(self, beyond: float | None = None) -> None:
        self.beyond = beyond
        self.tables: dict[int, CostTable] = {}

    def of(self, rows: int) -> CostTable:
        """The table of so many rows."""
        return self.tables.setdefault(rows, CostTable(beyond=self.beyond))

    @property
    def measured(self) -> bool:
        """Whether anything is known."""
        return any(table.keys for table in self.tables.values())

    def seconds(self, rows: int, n: int) -> np.ndarray:
        """Of lengths 0..n; by the share of a row where the nearest number of rows that was seen is another."""
        seen = [r for r, table in self.tables.items() if table.keys]
        nearest = min(seen, key=lambda r: abs(r - rows), default=rows)
        return self.of(nearest).table(n) * (rows / nearest)


class Costs:
    """What outlives a text, because it belongs to the pair of verifier and drafter: seconds and calibration.

    A verify is measured by the rows of its batch and the tokens of the widest one, a draft by the texts that it is made
    for and the slots of the longest: sixteen rows are no sixteen times one row.
    """

    MILD = 0.02  # of a forward, a further token's share until it is measured: weights are read but once

    def __init__(self, make: Callable[[], Estimator]) -> None:
        self.verifies, self.drafts = Shared(self.MILD), Shared()
        self.overhead = 0.0  # of a round with a draft, for one row
        self.calib, self.stale = make(), make()
        self.hits, self.tries = 3.2, 4.0  # of judged slots, over all texts; begins hopeful
        self.spent = self.lost = 0.0  # seconds of all texts; of them what drafts that were probes did not bring in


@dataclass(eq=False)
class CostAware(Controller):
    """Maximise expected tokens per second: argmax over all k of E(k) / T(k), with k = 0 allowed.
    Rows of a batch share one T: they compete for the width that all of them pay for (SmartSpec's goodput, arXiv
    2406.14066).

    E(k) = 1 + sum_i prod_{j<=i} a_j from calibrated confidences, T(k) from measured tables: real costs are staircases,
    so every k is tried. Two decisions a round: slots to draft (from the acceptance record of each slot), nodes to
    submit (from this draft's confidences, all of them scaled by how far the text's last ten judged nodes kept what was
    expected of them). `accept` says how confidences are calibrated: by counts, or by an `AcceptanceHead`.

    Seconds and calibration (`Costs`) belong to the pair, the record of the slots and the pause to one text: `fork`
    begins it anew. Where no k beats plain decoding, drafting pauses and is probed with one slot, as often as the probes
    of all texts have lost at most `probe` of their time. A probe of points that does not pay is not submitted: what the
    text says next judges it all the same, so it costs a draft and no wider verify. A drafter whose cost is not known
    yet is probed as well. A draft that takes under a percent of a verify is always made: its confidences decide what
    is submitted.

    The tables are learned while decoding; `calibrate` (dllm.drafting.front) fills them beforehand.
    """

    FREE = 0.01  # of a verify
    FADE, LENIENT = 0.9, 2.0  # of the record of hopes: a memory of ten nodes, and nodes that it begins with

    k_max: int = param(32, "as every controller's", low=1)
    probe: float = param(0.02, "what a useless drafter may cost", low=0)
    margin: float = param(0.02, "a pause ends where drafting pays this much", low=0)
    accept: str = param("counts", "as fast, and simpler", choices=("counts", "head"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe >= 1 or self.margin == math.inf:
            raise DllmError(f"probe is a share of the time below 1, margin finite: got {self.probe} and {self.margin}")
        self.costs = Costs(ESTIMATORS[self.accept])
        self.spread = self.costs.calib.spread
        self._begin()

    def _begin(self) -> None:
        self.calib, self.stale = self.costs.calib.fork(), self.costs.stale.fork()
        self.hits, self.tries = np.zeros(self.k_max + 1), np.zeros(self.k_max + 1)
        self.passed = self.hoped = self.LENIENT  # recent judged nodes that passed, and how many should have
        self.paused = self.probing = False
        self.fellows = 1  # of the last draft

    @property
    def verify(self) -> CostTable:
        """Seconds of a verify of this batch, by the tokens of its widest row."""
        return self.costs.verifies.of(self.rows)

    @property
    def draft(self) -> CostTable:
        """Seconds of a draft of so many texts as were drafted for together last, by the slots of the longest."""
        return self.costs.drafts.of(self.fellows)

    def fork(self) -> CostAware:
        """The controller of another text or row of the same pair."""
        twin = copy.copy(self)
        twin._begin()
        return twin

    def slots(self) -> np.ndarray:
        """Acceptance of each slot 1..k_max given that the ones before were accepted."""
        pooled = (4 * self.costs.hits / self.costs.tries + self.hits.sum()) / (4 + self.tries.sum())
        slots: np.ndarray = np.clip((4 * pooled + self.hits[1:]) / (4 + self.tries[1:]), 0.02, 0.98)
        return slots

    def _verified(self, n: int) -> np.ndarray:
        """Seconds of a verify of the batch with 0..n drafted tokens in its widest row."""
        return self.costs.verifies.seconds(self.rows, n + 1)[1:]

    def _drafted(self, n: int) -> np.ndarray:
        """A row's share of the seconds of drafts of 0..n slots."""
        return self.costs.drafts.seconds(self.fellows, n) / self.fellows

    def next_k(self, room: int) -> int:
        """The best k by the record of the slots, 0 where none beats plain decoding and no probe is due; other rows of
        the batch are taken to be as this one."""
        return self.lengths([Length(self, room)] * self.rows, self.rows)[0]

    def lengths(self, asked: Sequence[Length], rows: int) -> list[int]:
        """The k that is best for all: each row's tokens count, and the widest row is what the verify costs."""
        mine = [_own(q.controller) for q in asked]
        rooms = [max(0, min(q.room, self.k_max)) for q in asked]
        for c in mine:
            c.probing = False
        widest = max(rooms)
        if not widest:
            return rooms
        if not self.costs.drafts.measured:
            return [min(room, c._probe()) for c, room in zip(mine, rooms, strict=True)]
        plain, drafted = float(self._verified(0)[0]), self._drafted(widest)
        there = _together([_hopes(np.asarray(q.offered)) for q in asked], rows)
        least = float((there / self._verified(len(there) - 1)).max())  # tokens a second without a draft
        if drafted[widest] <= self.FREE * plain / self.rows:
            for c in mine:
                c.paused = False
            return rooms
        hopes = [_hopes(np.cumprod(c.slots()[:room])) for c, room in zip(mine, rooms, strict=True)]
        rate = _together(hopes, rows) / (len(mine) * (drafted + self.costs.overhead) + self._verified(widest))
        best = 1 + int(np.argmax(rate[1:]))
        gain = float(rate[best]) / least
        return [min(room, c._chosen(best, gain)) for c, room in zip(mine, rooms, strict=True)]

    def _chosen(self, best: int, gain: float) -> int:
        """The best k where it gains on plain decoding, else a probe."""
        self.paused = gain < 1 + self.margin * self.paused
        return self._probe() if self.paused else best

    def _probe(self) -> int:
        """A slot where probes may lose more, else none."""
        self.probing = self.costs.lost <= self.probe * self.costs.spent
        return int(self.probing)

    def trim(self, proposal: Proposal, carried: bool = False, k: int = 0) -> int:
        """The best number of nodes by the calibrated confidences of this draft, whose seconds are spent; other rows of
        the batch are taken to be as this one."""
        return self.cuts([Cut(self, proposal, carried, k)] * self.rows, self.rows)[0]

    def cuts(self, asked: Sequence[Cut], rows: int) -> list[int]:
        """The width that is best for all, of which each row submits what it has. A draft without confidences is
        submitted whole."""
        mine, whole = [_own(q.controller) for q in asked], [not q.proposal.conf for q in asked]
        hopes = [c._expected(q) for c, q in zip(mine, asked, strict=True)]
        spent = sum(0.0 if q.carried or not q.k else float(self._drafted(q.k)[q.k]) for q in asked)
        reward = _together(hopes, rows)
        rate = reward / (spent + len(asked) * self.costs.overhead + self._verified(len(reward) - 1))
        least = max((len(q.proposal) for q, w in zip(asked, whole, strict=True) if w), default=0)
        best = least + int(np.argmax(rate[least:]))
        return [
            len(q.proposal) if w or not len(q.proposal) else c._submitted(min(best, len(q.proposal)), q.proposal)
            for c, q, w in zip(mine, asked, whole, strict=True)
        ]

    def _expected(self, q: Cut) -> np.ndarray:
        """Tokens that 0..N nodes of a draft should bring, the verifier's own included."""
        calib, trust, p = self.stale if q.carried else self.calib, self.passed / self.hoped, q.proposal
        a = [min(0.98, trust * calib(*node)) for node in p.told]
        return _hopes(np.array(p.survival(a))) if p.conf else np.ones(len(p) + 1)

    def _submitted(self, best: int, p: Proposal) -> int:
        """The best number of nodes. Of trees and draws nothing is learned that is not submitted: there a probe takes
        the number that is verified fastest."""
        if p.told_by_text or not (self.probing or (not best and self.costs.spent and self._probe())):
            return best
        return max(best, 1 + int(np.argmin(self._verified(len(p))[1:])))

    def keep(self, remaining: int, conf: Sequence[float], spread: Sequence[Spread] = ()) -> bool:
        """Whether the rest promises at least as many tokens per second as the best fresh draft."""
        told = zip_longest(conf[:remaining], spread[:remaining])
        a = np.array([self.stale(i, c, s) for i, (c, s) in enumerate(told)])
        reuse, fresh = _hopes(np.cumprod(a)), _hopes(np.cumprod(self.slots()))
        share = self._verified(max(len(a), self.k_max)) / self.rows + self.costs.overhead
        best = (fresh / (self._drafted(self.k_max) + share[: len(fresh)])).max()
        return bool((reuse / share[: len(reuse)]).max() >= best)

    def update(self, r: RoundStats) -> None:
        """Book seconds, confidences and slots of a round."""
        if r.pending == 1 and not r.replays:
            self._book(r)
        calib = self.stale if r.carried else self.calib
        nodes = [*r.observed, *r.unsent]
        for node in nodes:
            hoped = calib(node.slot, node.conf, node.spread)
            self.passed = self.FADE * self.passed + (1 - self.FADE) * self.LENIENT + node.accepted
            self.hoped = self.FADE * self.hoped + (1 - self.FADE) * self.LENIENT + hoped
            calib.add(node.slot, node.conf, node.accepted, node.spread)
        own = [node for node in nodes if node.own]
        judged = {0: False} if r.failed and not r.nodes else _by_slot(own)
        if any(node.own and node.accepted for node in r.unsent):  # a probe that was right earns another at once
            self.costs.lost = min(self.costs.lost, self.probe * self.costs.spent)
        for slot, accepted in judged.items():
            if not r.carried and slot < self.k_max:
                self.tries[slot + 1] += 1
                self.hits[slot + 1] += accepted
                self.costs.tries += 1
                self.costs.hits += accepted
        if self.tries[1] > 128:  # forget slowly: texts change
            self.hits, self.tries = self.hits / 2, self.tries / 2
        if self.costs.tries > 128:
            self.costs.hits, self.costs.tries = self.costs.hits / 2, self.costs.tries / 2

    def _book(self, r: RoundStats) -> None:
        """The seconds of a round. The first one is left out: it also reads the prompt."""
        costs = self.costs
        if r.leads:
            costs.verifies.of(r.rows).add(r.width or 1 + r.nodes, r.t_verify)
        if r.k and not r.carried:
            self.fellows = r.fellows
            costs.drafts.of(r.fellows).add(r.slots or r.k, r.t_draft * r.fellows)
        if r.k:
            costs.overhead += 0.1 * (r.t_search + (r.t_commit + r.t_other) / r.rows - costs.overhead)
        share = costs.verifies.seconds(r.rows, 1 + r.nodes) / r.rows
        plain = float(share[1])
        costs.spent += r.t_draft + r.t_verify / r.rows
        if self.probing:
            draft = float(self._drafted(r.k)[r.k]) if r.k and not r.carried else 0.0
            wider = float(share[1 + r.nodes]) - plain
            costs.lost = max(0.0, costs.lost + draft + wider + costs.overhead - r.accepted * plain)


def _own(controller: Controller) -> CostAware:
    """A row's controller, which is a fork of the one that was given."""
    assert isinstance(controller, CostAware)
    return controller


def _hopes(survival: np.ndarray) -> np.ndarray:
    """Tokens that 0..n drafted ones should bring, by the chance that each of them (n,) stays: (n + 1,)."""
    out: np.ndarray = 1 + np.concatenate([[0.0], np.cumsum(survival)])
    return out


def _together(hopes: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """The sum over rows, a shorter one staying at its last; rows that have none bring a token each."""
    width = max(map(len, hopes))
    total: np.ndarray = np.sum([np.pad(h, (0, width - len(h)), mode="edge") for h in hopes], axis=0)
    return total + rows - len(hopes)


CONTROLLERS: dict[str, type[Controller]] = {
    "fixed": Fixed,
    "adl": ADL,
    "failfast": FailFast,
    "heuristic": Heuristic,
    "rejection": RejectionThreshold,
    "cost": CostAware,
}
