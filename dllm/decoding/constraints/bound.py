"""How a constraint meets a step: the prediction of a forward becomes what may still be said.

`Rule` holds the automata of a call. `Rule.bind` gives a prediction whose logits are the posterior of the step, the
model's law given that the answer becomes a member of the language in exactly the columns that are left. Its tokens are
those of one member, so that a sampler may commit any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas, Decision
from dllm.decoding.columns import marked
from dllm.decoding.constants import Constant, constant
from dllm.decoding.constraints.automaton import DEAD, TokenAutomaton
from dllm.decoding.constraints.frame import Frame
from dllm.decoding.constraints.passes import Columns, Lattice
from dllm.decoding.constraints.tables import STAY, Tables
from dllm.decoding.prediction import Prediction, draw

KEPT = {torch.float64: 32, torch.float32: 16}  # bits of a score under a constraint
GAP = 30.0  # nats: a column that is forced has no second token, and would be sure beyond all measure


class Bound(NamedTuple):
    """Per-row leaves: the automaton of a row, and the columns at its end that are no part of the answer, (B,)."""

    which: Tensor
    tail: Tensor


class Reach(NamedTuple):
    """What the host knows of the columns of a step, from the first that is open on."""

    columns: int  # behind so many of them all are open, and none is read
    gaps: bool = True  # whether one in front of them may be open and not be read


@dataclass(frozen=True, eq=False)
class Rule:
    """The automata of a call. Equal automata make equal rules, which share captured work."""

    automata: tuple[TokenAutomaton, ...]
    columns: int  # K: of the longest answer
    ends: tuple[int, ...] = ()  # end tokens
    early: int = 0  # first columns that none of them may stand in

    @cached_property
    def tables(self) -> Constant[Tables]:
        """The automata on a device."""
        return Constant(Tables.of(self.automata, self.columns, self.ends).to)

    @cached_property
    def value(self) -> tuple[object, ...]:
        """What it is made of."""
        return tuple(a.digest for a in self.automata), self.columns, self.ends, self.early

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    # -- what a canvas may become -------------------------------------------------------------------------------------

    def alive(self, canvas: Canvas, bound: Bound) -> Tensor:
        """(B,) bool: the masks of the answer can be filled so that it is a member."""
        tables = self.tables.on(canvas.ids.device).of_rows(bound.which)
        return self.given(tables, canvas, bound, torch.full_like(canvas.ids[:, :1], -1), self.columns)[1].alive

    def given(self, tables: Tables, canvas: Canvas, bound: Bound, reads: Tensor, count: int) -> tuple[Tensor, Lattice]:
        """The columns of a canvas that matter to a step that reads `reads` (B, W), `count` at most, before anybody has
        read any; and where they begin (B,).

        They begin with the first that is open: what is closed in front is one state. They end with the last that stands
        or is read: what can follow is a table. Behind that, and behind the answer, nothing moves.
        """
        device, states, width = canvas.ids.device, tables.final.shape[2], canvas.ids.shape[1]
        cols, end = torch.arange(width, device=device), canvas.length - bound.tail
        known = marked(reads, width) | ~canvas.masked | (cols < canvas.start[:, None] + self.early)
        first = torch.where(canvas.masked, cols, width).amin(1).minimum(end)
        stop = torch.where(known & (cols < end[:, None]), cols + 1, 0).amax(1).maximum(first)
        open_, classes, ids = _standing(tables, canvas, first, stop, count)  # (N, B) each
        kinds = torch.arange(tables.leads.shape[1], device=device)
        soon = torch.arange(count, device=device)[:, None] + (first - canvas.start) < self.early  # (N, B)
        late = soon[..., None] & tables.late
        said = tables.leads < tables.classes.shape[1]  # what tokens have
        allowed = torch.where(open_[..., None], ~late & said, kinds == classes[..., None])
        weight = torch.where(allowed, 0.0, -torch.inf).double()
        token = torch.where(open_[..., None], tables.leads, ids[..., None])
        final = tables.final.gather(1, (end - stop)[:, None, None].expand(-1, 1, states))[:, 0]
        behind = torch.where(final, 0.0, -torch.inf).double()
        start = self._before(tables, canvas, first)
        return first, Lattice(tables, Columns(weight, torch.ones_like(weight), token, open_), start, behind)

    def _before(self, tables: Tables, canvas: Canvas, first: Tensor) -> Tensor:
        """(B,) the state behind what stands in front of `first`: what each column makes of each state, put together
        two and two."""
        states, size = tables.final.shape[2], 1 << (self.columns - 1).bit_length()
        _, classes, _ = _standing(tables, canvas, canvas.start, first, size)
        ways = classes.clamp(min=STAY).T[..., None].expand(-1, -1, states)
        steps = tables.follow.view(len(first), -1, states).gather(1, ways)  # (B, size, Q + 1)
        while steps.shape[1] > 1:
            steps = steps[:, 1::2].gather(2, steps[:, ::2])
        return torch.where((classes < STAY).any(0), states - 1, steps[:, 0, 0])

    # -- a prediction -------------------------------------------------------------------------------------------------

    def frame(
        self, tables: Tables, cols: Tensor, canvas: Canvas, bound: Bound, reach: Reach | None
    ) -> tuple[Frame, Tensor]:
        """The columns of a step that reads `cols` (B, W), and which of these are open, (B, W) bool."""
        count = self.columns if reach is None else min(max(reach.columns, self.early, 1), self.columns)
        first, given = self.given(tables, canvas, bound, cols, count)
        place = cols - first[:, None]  # (B, W) among the N columns
        read = (cols >= 0) & canvas.masked.gather(1, cols.clamp(min=0))
        read = read & (place < count) & (cols < (canvas.length - bound.tail)[:, None])
        gaps = reach is None or reach.gaps or self.early > 0
        return Frame(tables, given, torch.where(read, place, count).T, first, gaps), read

    def bind(self, raw: Prediction, canvas: Canvas, bound: Bound, reach: Reach | None = None) -> Restricted:
        """The prediction under the constraint, of rows with this canvas. reach: what the host knows of the columns that
        matter, None: nothing."""
        tables = self.tables.on(raw.cols.device).of_rows(bound.which)
        frame, read = self.frame(tables, raw.cols, canvas, bound, reach)
        law, heat = raw.law, raw.law.temperature or 1.0
        alone = law.greedy or law.filtered or heat == 1  # one temperature serves tokens and scores
        heard = frame.hear(raw, heat if alone else 1.0)
        logits = frame.posterior(raw, heard)
        if law.greedy:
            token = frame.best(heard)
        else:
            token = frame.draw(raw, heard if alone else frame.hear(raw, heat))
        token, free = torch.where(read, token, -1), None
        if any(a.free for a in self.automata):  # these rows say what they would say without a constraint
            frees = constant(tuple(int(a.free) for a in self.automata), raw.cols.device)
            free = frees[bound.which][:, None] > 0  # (B, 1)
            logits = torch.where(free[..., None], raw.logits, logits)
            token = torch.where(free, raw.token, token)
        return Restricted(raw, logits, heard.heat, token, self, bound, free)


def _standing(tables: Tables, canvas: Canvas, first: Tensor, stop: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` columns from `first` on, those up to `stop`: whether they are open, the class of what stands there, -1
    of a token that may not, and the token; (N, B) each. The others stay, and between holes the text begins again."""
    cols = torch.arange(count, device=first.device)[:, None] + first
    at = cols.clamp(max=canvas.ids.shape[1] - 1).T
    ids, open_ = canvas.ids.gather(1, at), canvas.masked.gather(1, at).T
    known = ids < tables.classes.shape[1]
    classes = torch.where(known, tables.classes.gather(1, torch.where(known, ids, 0)), DEAD).T
    given = canvas.frozen.gather(1, at).T
    between = given & (tables.again.T >= 0)
    behind = canvas.frozen.gather(1, (at - 1).clamp(min=0)).T
    classes = torch.where(between, torch.where(behind, STAY, tables.again.T), torch.where(classes == DEAD, -1, classes))
    inside = cols < stop
    return open_ & inside, torch.where(inside, classes, STAY), ids.T


def steady(score: Tensor, relative: bool) -> Tensor:
    """A score without its last bits. A constraint ties columns together: what decides one decides the other, both are
    equally sure, and rounding, which is another in another batch, must not order them."""
    scale = float(1 << KEPT[score.dtype])
    part, power = score.frexp() if relative else (score, torch.zeros_like(score, dtype=torch.int32))
    return torch.where(score.isfinite(), ((part * scale).round() / scale).ldexp(power), score)


class Restricted(Prediction):
    """What may still be said: posterior logits, and at the masks the tokens of one member of the language; in rows that
    are `unbound` (B, 1) what the model says."""

    def __init__(
        self, raw: Prediction, logits: Tensor, heat: float, token: Tensor, rule: Rule, rows: Bound,
        unbound: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            logits, raw.cols, law=raw.law, seed=raw.seed, step=raw.step, more=raw.more, extra=raw.extra,
            weights=lambda: raw.weights,
        )  # fmt: skip
        self._free, self._heat, self._member = raw, heat, token
        self._rule, self._rows, self._unbound = rule, rows, unbound

    def replaced(self, token: Tensor) -> Tensor:
        """(B, W) its own, which go together, but in rows without a constraint."""
        return self.token if self._unbound is None else torch.where(self._unbound, token, self.token)

    def _either(self, free: Tensor, own: Tensor) -> Tensor:
        """A score of rows without a constraint, and of the others."""
        return own if self._unbound is None else torch.where(self._unbound, free, own)

    @property
    def free(self) -> Prediction:
        """The prediction that was bound."""
        return self._free

    @cached_property
    def token(self) -> Tensor:
        """(B, W) the tokens of one member; at columns that are committed, the most probable one."""
        return torch.where(self._member >= 0, self._member, self.argmax)

    def posterior(self, token: Tensor) -> Tensor:
        """(B, W) the logarithm of the chance of each token, at the temperature of the posterior; inf in rows without a
        constraint."""
        law = self if self._heat == 1 else Prediction(self.logits / self._heat, self.cols)
        found = law.log_probs(token[..., None])[..., 0]
        return self._either(torch.full_like(found, torch.inf), found)

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of `token`."""
        free = super().confidence
        return self._either(free, steady(free, relative=True))

    @cached_property
    def log_confidence(self) -> Tensor:
        """Same order as `confidence`, still resolved where the probability rounds to one."""
        free = super().log_confidence
        return self._either(free, steady(free, relative=True))

    @cached_property
    def margin(self) -> Tensor:
        """Probability of the best token minus that of the second."""
        free = super().margin
        return self._either(free, steady(free, relative=False))

    @cached_property
    def negative_entropy(self) -> Tensor:
        """Sum of p ln p, in nats."""
        free = super().negative_entropy
        return self._either(free, steady(free, relative=False))

    @cached_property
    def gap(self) -> Tensor:
        """Best logit minus second best; that of a column without a second one is bounded."""
        first, second = self._top2
        return self._either(first - second, (first - second).clamp(max=GAP))

    @cached_property
    def _raw(self) -> tuple[Tensor, Tensor]:
        _, best, _, odds = self._best
        log_p = self.logits.gather(-1, self.token[..., None])[..., 0] - self.lse
        first = self.token == self.argmax
        own = torch.where(first, best, log_p.exp()), torch.where(first, -odds.log1p(), log_p)
        return own if self.law.greedy else (self._either(log_p.exp(), own[0]), self._either(log_p, own[1]))

    @cached_property
    def _draw(self) -> tuple[Tensor, ...]:
        shape = self.cols.shape
        keys = self.seed[:, None].expand(shape), self.step[:, None].expand(shape), self.cols, self.token
        return self._joined(draw(z, self.law, *key) for z, *key in self.chunks(*keys))

    def lawful(self, canvas: Canvas, d: Decision) -> Decision:
        """The decision without the length edits of rows that could not become a member behind them."""
        if not d.edits:
            return d
        alive = self._rule.alive(canvas.apply(d), self._rows).tolist()
        return d._replace(edits=tuple(e for e in d.edits if alive[e[0]]))
