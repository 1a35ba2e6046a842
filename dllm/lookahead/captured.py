"""Rounds as graphs: the chain's work over the static tensors of a board, the last answers to its rows among them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.canvas import Plan, mapped
from dllm.decoding.captured import Board, CapturedRunner, Key, Unfit
from dllm.decoding.columns import marked, scatter
from dllm.decoding.meter import Ticket
from dllm.decoding.runner import Answer, Batch, Part, Stepped, Turn
from dllm.lookahead.chain import ChainRunner, Played
from dllm.models.transformer import Said, Weights


class Heard(NamedTuple):
    """The last answer to every row, by position."""

    said: Said  # (copies, B, L, ...)
    known: Tensor  # (B, L) bool


@dataclass
class ChainBoard(Board):
    """The static tensors of a layout for rounds."""

    heard: Heard | None = None  # from the first forward on


@dataclass(eq=False)
class CapturedChainRunner(ChainRunner, CapturedRunner):
    """The runner of chains that replays. It shows no steps between, so a trace and mode fast are not its own."""

    answered: dict[int, Ticket] = field(default_factory=dict)  # the request that was in each lane at its last forward

    def baked(self) -> tuple[Hashable, ...]:
        """What rounds depend on, too."""
        return *super().baked(), self.far, self.setting.cross_blocks, self.delta

    def _board(self, batch: Batch) -> ChainBoard:
        return ChainBoard(**vars(super()._board(batch)))

    def tick(self, batch: Batch) -> list[Stepped]:
        """As the chain, in the static tensors."""
        self.load(batch)
        return super().tick(batch)

    def play(self, batch: Batch, rows: list[int], alone: bool = False) -> Stepped:
        """A replay of the round, or of the plain step."""
        if not self.fits:
            return super().play(batch, rows, alone)
        facts, window = [batch.facts[i] for i in rows], self.board.rows.window
        known = any(self.answered.get(i) is batch.request[i] for i in rows)
        levels = self.levels(facts, window) if known and not alone else 1
        room = self.shape(facts, window, levels) if levels > 1 else None
        stepped = self.replay(batch, rows, room, levels)
        self.answered |= zip(rows, stepped.part.request, strict=True)
        self.played[rows[0]] = Played(levels if self.fits else 1, alone, [], [])
        return stepped

    def made(self, part: Part, key: Key) -> Turn:
        """The step, or the round, and what its rows are to be drafted from."""
        if key.levels == 1:
            turn = self.work(part, key.shape)
        else:
            play = self.round(key.levels, key.shape, part.lanes)
            out = play(part.state, part.window, self.lane(part), self.recalled(part))
            turn = Turn(part, out.state, out.state, out.window, out.flags, out.answer)
        self.hear(part, turn.answer)
        return turn

    def recalled(self, part: Part) -> Answer:
        """The last answers to these rows."""
        heard = self.own.heard
        assert heard is not None, "a row is answered before its first round"
        columns = torch.arange(heard.known.shape[1], device=part.at.device)
        pos, said = (
            torch.where(heard.known[part.at], columns, -1),
            mapped(lambda x: x[:, part.at].flatten(0, 1), heard.said),
        )
        plan = Plan(pos, pos, None, None, None, None, None, refresh=False, stored=False)
        return self.answer(part.state, part.window, plan, said, len(columns))

    def hear(self, part: Part, answer: Answer) -> None:
        """Put an answer where the next round finds it. Errors: `Unfit`."""
        said, n, pos, width = answer.said, len(part.at), answer.plan.pos, part.state.canvas.ids.shape[1]
        if said.hidden.shape[1] > answer.queries:
            raise Unfit("its inputs feed queries beside the canvas")
        new = Said(scatter(said.hidden.new_zeros(len(pos), width, said.hidden.shape[-1]), pos, said.hidden))
        if said.weights is not None:
            cols, table = said.weights
            rows = scatter(table.new_zeros(len(cols), width, width), cols, table)
            new = Said(new.hidden, Weights(scatter(torch.full_like(rows[..., 0], -1).long(), cols, cols), rows))
        heard = Heard(mapped(lambda x: x.view(-1, n, *x.shape[1:]), new), marked(pos[:n], width))
        if self.own.heard is None:
            size, copies = len(self.own.everyone), len(heard.said.hidden)
            blank = mapped(lambda x: x.new_zeros(copies, size, *x.shape[2:]), heard.said)
            self.own.heard = Heard(blank, heard.known.new_zeros(size, width))
        mapped(lambda old, x: old.index_copy_(1, part.at, x), self.own.heard.said, heard.said)
        self.own.heard.known.index_copy_(0, part.at, heard.known)

    @property
    def own(self) -> ChainBoard:
        """The board, with what rounds keep there."""
        assert isinstance(self.board, ChainBoard)
        return self.board
