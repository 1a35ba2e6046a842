"""Texts with masked tokens as rows of one forward: a text a row, or several packed into one.

A learner that attends in blocks reads what lies before a block as it is, so several texts that begin alike share that
beginning: a row holds it once, clean, and behind it the block of each text with what follows there. A learner that
attends to everything reads its masks everywhere, so each of its texts stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Masked(NamedTuple):
    """One text of T tokens for a step, on the host. The separator is no part of it."""

    ids: list[int]  # clean: the prompt, the answer so far, what is to be predicted
    masked: Tensor  # (T,) bool: what is to be predicted, at least one token and not the first
    weight: Tensor  # (T,) float, read where it is masked
    extra: Mapping[str, Tensor] = NOTHING  # further values of every token, each (T,), for the loss


class Reader(NamedTuple):
    """What the rows must know of who reads them."""

    mask_id: int
    shift: int
    block: int | None  # None: it attends to everything
    tail: Sequence[int] = ()  # what stands behind the masks
    pack: int = 0  # tokens of a row that several texts share; 0: a text a row


class Rows(NamedTuple):
    """B rows of T tokens with M masked ones among them, and the N clean texts of those."""

    ids: Tensor  # (B, T) noisy
    pos: Tensor  # (B, T), -1 for padding
    visible: Tensor | None  # (B, T, T), beside the model's own rule; None: all of the row
    row: Tensor  # (M,)
    column: Tensor  # (M,) where it is masked
    source: Tensor  # (M,) whose hidden state predicts it
    target: Tensor  # (M,)
    weight: Tensor  # (M,)
    clean: Tensor  # (N, L) right-padded
    text: Tensor  # (M,) its row in `clean`
    place: Tensor  # (M,) its column there
    extra: Mapping[str, Tensor]  # each (M,)

    @classmethod
    def of(cls, texts: Sequence[Masked], reader: Reader) -> Rows:
        """The texts as rows. Those that may share a beginning stand one after another."""
        parts, cleans = list[_Part](), list[list[int]]()
        for text in texts:
            first = int(text.masked.int().argmax())
            start = first // reader.block * reader.block if reader.block else 0
            if not (parts and reader.block and parts[-1].takes(text.ids[:start])):
                parts.append(_Part())
            parts[-1].add(text, start, cleans)
        lines = [_line(some, reader) for some in _packed(parts, reader)]
        ids, pos, part, group, begin = (
            pad_sequence([torch.tensor(line.tokens)[:, i] for line in lines], batch_first=True, padding_value=filler)
            for i, filler in enumerate((0, -1, -1, -1, 0))
        )  # (B, T) each
        visible = None
        if bool((group > 0).any()):
            alike, begun = part[:, None] == part[..., None], (pos[:, None] < begin[..., None]) & (group[:, None] >= 0)
            stream = (group == part)[:, None]  # the group of a part's clean tokens has its number
            visible = (group[:, None] == group[..., None]) | (alike & begun & stream)  # (B, T, T)
        row = torch.tensor([b for b, line in enumerate(lines) for _ in line.holes])
        column, source = torch.tensor([hole[:2] for line in lines for hole in line.holes]).T
        held = [hole for line in lines for hole in line.holes]
        target = torch.tensor([h.text.ids[h.place] for h in held])
        weight = torch.stack([h.text.weight[h.place] for h in held])
        extra = {name: torch.stack([h.text.extra[name][h.place] for h in held]) for name in texts[0].extra}
        clean = pad_sequence([torch.tensor(c) for c in cleans], batch_first=True)
        text, place = torch.tensor([(h.clean, h.place) for h in held]).T
        return cls(ids, pos, visible, row, column, source, target, weight, clean, text, place, extra)

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        moved = {name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**moved, extra={name: value.to(device) for name, value in self.extra.items()})


class _Block(NamedTuple):
    """What one text adds to its part: its tokens from `start` on, and which of `cleans` it is."""

    text: Masked
    start: int
    clean: int


@dataclass
class _Part:
    """Texts that share a clean beginning."""

    stream: list[int] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)

    def takes(self, begin: Sequence[int]) -> bool:
        """Whether a text that begins so shares what is here."""
        return _alike(self.stream, begin)

    def add(self, text: Masked, start: int, cleans: list[list[int]]) -> None:
        """Take a text in; its clean ids join `cleans`, where they may continue those of a text that is here."""
        begin = text.ids[:start]
        self.stream = max(self.stream, begin, key=len)
        mine = [b.clean for b in self.blocks if _alike(cleans[b.clean], text.ids)]
        if mine:
            cleans[mine[0]] = max(cleans[mine[0]], text.ids, key=len)
        else:
            cleans.append(text.ids)
        self.blocks.append(_Block(text, start, mine[0] if mine else len(cleans) - 1))

    def size(self, reader: Reader) -> int:
        """Tokens of it in a row."""
        return len(self.stream) + sum(len(b.text.ids) - b.start + len(reader.tail) for b in self.blocks)


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one of them begins with the other."""
    n = min(len(one), len(other))
    return list(one[:n]) == list(other[:n])


class _Hole(NamedTuple):
    """A masked token: its column, the column that predicts it, and where it comes from."""

    column: int
    source: int
    text: Masked
    place: int
    clean: int


class _Line(NamedTuple):
    """A row: of each token id, position, part, group and how much of the part's stream it sees; its holes."""

    tokens: list[tuple[int, int, int, int, int]]
    holes: list[_Hole]


def _line(parts: Sequence[_Part], reader: Reader) -> _Line:
    tokens, holes, groups = list[tuple[int, int, int, int, int]](), list[_Hole](), 0
    for part in parts:
        own, first = groups, len(tokens)  # the group of the stream, and its first column
        tokens += [(token, pos, own, own, 0) for pos, token in enumerate(part.stream)]
        groups += bool(part.stream)
        for text, start, clean in part.blocks:
            shift = len(tokens) - start  # from a place in the text to its column
            masked = text.masked.tolist()
            noisy = [reader.mask_id if hole else token for token, hole in zip(text.ids, masked, strict=True)]
            for pos, token in enumerate([*noisy, *reader.tail][start:], start):
                tokens.append((token, pos, own, groups, start))
            for place in (i for i, hole in enumerate(masked) if hole):
                read = place - reader.shift
                source = read + shift if read >= start else first + read
                holes.append(_Hole(place + shift, source, text, place, clean))
            groups += 1
    return _Line(tokens, holes)


def _packed(parts: Sequence[_Part], reader: Reader) -> list[list[_Part]]:
    """The parts of each row: the longest first, each where it fits first."""
    if not reader.pack:
        return [[part] for part in parts]
    rows, room = list[list[_Part]](), list[int]()
    for part in sorted(parts, key=lambda p: -p.size(reader)):
        size = part.size(reader)
        at = next((i for i, left in enumerate(room) if size <= left), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(max(size, reader.pack))
        rows[at].append(part)
        room[at] -= size
    return rows
