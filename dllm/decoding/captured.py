"""Ticks as graphs: `Runner`'s own work over static tensors, captured once a shape and replayed.

The batch lives in tensors that stay where they are, a `Board`. Work reads it, does what `Runner.work` does (plan,
forward, step, next window), and writes the rows back, so a tick is one replay and one small copy to the host. Rows that
are done step along as long as that needs no other forward. Eager code is the oracle: it is the same function.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding.cache.policy import Policy
from dllm.decoding.canvas import Plan, Span, State, mapped
from dllm.decoding.facts import Facts, Shape
from dllm.decoding.graphs import Graphs, index
from dllm.decoding.meter import served
from dllm.decoding.prediction import Prediction
from dllm.decoding.runner import Answer, Batch, Options, Part, Runner, Stepped, Turn
from dllm.decoding.slots import Sampler
from dllm.models.transformer import KVStore, Said


class Rows(NamedTuple):
    """What is known of every row of a batch."""

    state: State
    window: Span
    flags: Tensor  # (B, F)


class Key(NamedTuple):
    """Which work of a board is captured."""

    stale: int
    some: int | None  # rows in `Board.some`; None: all rows
    shape: Shape
    levels: int = 1  # of a round of the lookahead


class Kept(NamedTuple):
    """What a fill needs of a forward."""

    state: State  # before the step
    pos: Tensor  # (N, Q)
    hidden: Tensor  # (copies N, Q, D)


@dataclass
class Board:
    """The static tensors of a layout."""

    rows: Rows
    everyone: Tensor  # (B,) 0, 1, ...
    some: Tensor  # (B,) rows of a part, in front
    store: KVStore | None
    sampler: Sampler  # its constants are read by what was captured
    kept: dict[Key, Kept] = field(default_factory=dict)

    def part(self, count: int | None, facts: list[Facts]) -> Part:
        """All rows, or the first `count` of `some`."""
        if count is None:
            lanes = slice(0, len(self.everyone))
            return Part([], self.everyone, lanes, self.rows.state, self.rows.window, facts, [])
        at = self.some[:count]
        return Part([], at, None, self.rows.state.take(at), self.rows.window.take(at), facts, [])

    def write(self, count: int | None, rows: Rows) -> None:
        """Put these rows back. Errors: `Unfit`."""
        if count is None:
            overwrite(self.rows, rows)
            return
        mapped(_fits, self.rows, rows)
        mapped(lambda old, new: old.index_copy_(0, self.some[:count], new), self.rows, rows)


class Unfit(RuntimeError):
    """A state that does not keep its shapes has no static tensors."""


def setting(s: Sampler, policy: Policy, options: Options, *more: Hashable) -> tuple[Hashable, ...]:
    """What rows are decoded by: rows for which it is equal may share forwards, and captures."""
    try:
        slots = _named(s._replace(starts=(), lookahead=None))
        hash((slots, policy, options, more))
    except (TypeError, ValueError, RecursionError):  # of a part that has no value: it equals itself alone
        return (object(),)
    return slots, policy, options, *more


def _named(part: object) -> Hashable:
    """What a slot is, by value: equal functions over equal values are equal, and so are methods of equal samplers.

    Code that was compiled anew counts as other code: what it calls by name may have changed.
    """
    if isinstance(part, MethodType):
        return _named(part.__func__), _named(part.__self__)
    if isinstance(part, FunctionType):
        held = [cell.cell_contents for cell in part.__closure__ or ()]
        return id(part.__code__), part.__code__, _named(held), _named(part.__defaults__), _named(part.__kwdefaults__)
    if isinstance(part, tuple | list):
        return type(part), *map(_named, part)
    if isinstance(part, dict):
        return tuple((key, _named(value)) for key, value in part.items())
    if is_dataclass(part) and type(part).__eq__ is not object.__eq__:
        return type(part), *(_named(vars(part)[f.name]) for f in fields(part))
    return part


def _fits(old: Tensor, new: Tensor, beyond: int = 1) -> Tensor:
    if old.shape[beyond:] != new.shape[beyond:] or old.dtype != new.dtype:
        raise Unfit(f"a leaf of its state changes from {list(old.shape)} to {list(new.shape)}")
    return new


def overwrite(old: Rows, new: Rows) -> None:
    """Copy all tensors into those of `old`. One that is another of these is read before that changes."""
    places = set[int]()

    def place(x: Tensor) -> Tensor:
        places.add(x.untyped_storage().data_ptr())
        return x

    def apart(x: Tensor, y: Tensor) -> Tensor:
        _fits(x, y)
        return y.clone() if y is not x and y.untyped_storage().data_ptr() in places else y

    mapped(place, old)
    own = mapped(apart, old, new)
    mapped(lambda x, y: x if x is y else x.copy_(y), old, own)


@dataclass(eq=False)
class CapturedRunner(Runner):
    """The runner that replays."""

    shares: ClassVar[bool] = False
    graphs: Graphs

    def begin(self, batch: Batch) -> None:
        """Take the static tensors of such a batch, of an earlier call where there was one."""
        if self.s.needs.edits_length:
            super().begin(batch)
            self.eagerly("it edits the length of the canvas")
            return
        rows, columns = batch.state.canvas.ids.shape
        self.board = self.graphs.at((rows, columns, *self.baked()), partial(self._board, batch))
        self.store, self.columns, self.fits = self.board.store, columns, True
        self.s = self.board.sampler

    def baked(self) -> tuple[Hashable, ...]:
        """What captured work depends on beside shapes; calls in which it is equal share their captures."""
        return setting(self.s, self.policy, self.options)

    def _board(self, batch: Batch) -> Board:
        super().begin(batch)
        rows = mapped(
            lambda x: x.clone(memory_format=torch.contiguous_format), Rows(batch.state, batch.window, batch.flags)
        )
        everyone = torch.arange(len(batch.request), device=batch.flags.device)
        return Board(rows, everyone, everyone.clone(), self.store, self.s)

    def tick(self, batch: Batch) -> list[Stepped]:
        """One step of every row: a replay for those that refresh, and one for the others."""
        self.load(batch)
        return super().tick(batch)

    def play(self, batch: Batch, rows: list[int]) -> Stepped:
        """See `Runner`."""
        return self.replay(batch, rows)

    def eagerly(self, reason: str) -> None:
        """Leave graphs out of the rest of this call."""
        self.fits = False
        self.graphs.say(f"sampler {self.s.name!r} runs without CUDA graphs: {reason}")

    def load(self, batch: Batch) -> None:
        """Have the batch live in the static tensors, where somebody has changed it."""
        if self.fits and batch.state is not self.board.rows.state:
            overwrite(self.board.rows, Rows(batch.state, batch.window, batch.flags))
            batch.state, batch.window, batch.flags = self.board.rows

    def replay(self, batch: Batch, rows: list[int], room: Shape | None = None, levels: int = 1) -> Stepped:
        """One step of rows that all refresh, or all do not, or a round of `levels`. room: None: what they need."""
        if not self.fits:
            return batch.took(self.turn(batch.part(rows)))
        facts, size = [batch.facts[i] for i in rows], len(batch.request)
        count = min(1 << (len(rows) - 1).bit_length(), size)
        whole = count == size and len(rows) == len(batch.busy)
        if not whole:  # a row that stands twice is computed twice
            self.board.some[:count].copy_(index(rows + rows[:1] * (count - len(rows)), batch.flags.device))
        shape = room or Shape.of(facts, self.board.rows.window.feeds(bool(facts[0].stale)))
        key = Key(facts[0].stale, None if whole else count, shape.static(self.columns), levels)
        try:
            self.graphs.run(key, partial(self.static, key, facts[:1]), f"sampler {self.s.name!r}")
        except Unfit as reason:
            self.eagerly(str(reason))
            return self.replay(batch, rows)
        request = [r for r in (batch.request[i] for i in rows) if r is not None]
        part = Part(rows, self.board.some, None, self.board.rows.state, self.board.rows.window, facts, request)
        served(request, part.kind)
        return Stepped(part, partial(self.fill, key, rows if whole else list(range(len(rows)))))

    def static(self, key: Key, facts: list[Facts]) -> None:
        """The work that is captured: the step of some rows of the board, or of all, in place."""
        part = self.board.part(key.some, facts)
        turn = self.made(part, key)
        if turn.after.closing is not part.state.closing:  # an exit may ask for a fill
            self._keep(key, turn.answer)
        self.board.write(key.some, Rows(turn.state, turn.window, turn.flags))

    def made(self, part: Part, key: Key) -> Turn:
        """What the work makes of these rows."""
        return self.work(part, key.shape)

    def _keep(self, key: Key, answer: Answer) -> None:
        """The next replay may write over the answer, and the board has changed by then."""
        new = Kept(answer.state, answer.plan.pos[:, : answer.queries], answer.said.hidden)
        if key not in self.board.kept:
            self.board.kept[key] = mapped(torch.clone, new)
        mapped(lambda x, y: x.copy_(_fits(x, y, 0)), self.board.kept[key], new)

    def fill(self, key: Key, places: list[int], state: State, rows: Tensor, width: int) -> tuple[State, Prediction]:
        """`Answer.filled` for the rows at these places of what was kept."""
        kept, window, at = self.board.kept[key], self.board.rows.window, index(places, rows.device)
        count = kept.state.rows
        pos, hidden = (x.view(-1, count, *x.shape[1:])[:, at].flatten(0, 1) for x in (kept.pos, kept.hidden))
        dense = window.feeds(bool(key.stale)).dense
        plan = Plan(pos, pos, None, None, None, None, None, refresh=False, stored=False, dense=dense)
        answer = self.answer(kept.state.take(at), window, plan, Said(hidden), pos.shape[1])
        return answer.filled(state, rows, width)
