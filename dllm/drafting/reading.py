"""How much of a text a drafter reads where that is measured, `window="auto"`: as much as costs little beside a round.

A draft feeds what it reads, or, where the keys of an earlier reading stay, what is new since. So its seconds depend on
the tokens that it feeds, whatever the text, and a few drafts say what every other reading would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dllm.drafting.control import CostTable, Shared

LEAST = 64  # tokens: as many kept tau on prompts whose facts stand far off, half of them did not
SHARE = 0.1  # of the cheapest round: what reading more may add to it
NEW = 4  # tokens that a round adds; the same in all readings that stay, so that it weighs little


class Reading(NamedTuple):
    """The last `tokens` of a text, read anew every so many drafts; 1: by each of them."""

    tokens: int
    drafts: int


class Readings:
    """What drafts of a model were measured to take, by the texts of a forward and the tokens that each of them feeds,
    and what rounds take beside, by the texts."""

    def __init__(self) -> None:
        self.drafts, self.beside = Shared(), CostTable()

    def choose(self, length: int, k: int, rows: int, lasting: Sequence[int], unit: int = 1) -> Reading:
        """What the next drafts of k slots read behind a text of `length` tokens, one of `rows` texts.

        The most tokens that add at most a tenth to the cheapest round, and of those readings the one that is made anew
        most often. What is read at most doubles, so that nothing is tried whose seconds are not known well.

        lasting   drafts that may share a reading, ascending. unit: tokens of a block; widths are whole ones.
        """
        known, least = self._known(rows), min(length, -(-LEAST // unit) * unit)
        if not known:
            return Reading(least, lasting[-1])
        widths = [least]
        while widths[-1] < (more := min(length, 2 * widths[-1])) <= 2 * max(known):
            widths.append(more)
        new = _seconds(known, NEW + k)

        def cost(tokens: int, drafts: int) -> float:
            return (_seconds(known, tokens + k) + (drafts - 1) * new) / drafts

        cheapest = min(cost(least, n) for n in lasting)
        bound = cheapest + SHARE * (cheapest + self.beside.mean.get(CostTable.bucket(rows), 0.0))
        return next(Reading(w, n) for w in reversed(widths) for n in lasting if cost(w, n) <= bound)

    def _known(self, rows: int) -> dict[int, float]:
        """Seconds of a draft by the tokens that each of its texts feeds, ascending; what was measured but once, and may
        have been slow for that, only where there is nothing else."""
        table = self.drafts.of(rows)
        sure = [n for n in table.keys if table.seen[n] >= table.TRIED]
        return {n: table.mean[n] for n in sure or table.keys}


def _seconds(known: Mapping[int, float], n: int) -> float:
    """Of n tokens: of more than were measured as the measured ones grow, of fewer in proportion, which is as good as it
    may be, so that it is tried."""
    tokens, seconds = list(known), list(known.values())
    if n < tokens[0]:
        return seconds[0] * n / tokens[0]
    if n > tokens[-1]:
        grown = seconds[-1] - seconds[0], tokens[-1] - tokens[0]
        slope = max(0.0, grown[0] / grown[1]) if grown[1] else seconds[-1] / tokens[-1]
        return seconds[-1] + slope * (n - tokens[-1])
    return float(np.interp(n, tokens, seconds))
