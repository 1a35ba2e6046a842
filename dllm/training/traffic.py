"""What the verifier said of a drafter's own drafts: rounds of `dllm.speculate`, kept to learn from.

`Recorder` is a drafter that writes down where its drafts were rejected. The objective `replay` and `OnlineDrafter` mask
the same slots behind the same text again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypedDict

import torch
import torch.nn.functional as F

from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Ask, Draft, Need
from dllm.drafting.lattice import DraftFailure
from dllm.drafting.store import Seen
from dllm.drafting.window import Window
from dllm.errors import DllmError
from dllm.models.native import NativeModel
from dllm.training.alignment.objective import Learner, Sum, behind
from dllm.training.alignment.rows import Masked, Rows
from dllm.training.laws import DIVERGENCES, folded


class Round(NamedTuple):
    """A draft of `k` slots behind `start` tokens of a text, and the verifier's best tokens at its first m slots with
    their probabilities, (m, n) each; that of the last of them was not the draft's."""

    start: int
    k: int
    best: list[list[int]]
    prob: list[list[float]]


Plain: TypeAlias = "tuple[int, int, list[list[int]], list[list[float]]]"  # a `Round` in a checkpoint


class Kept(TypedDict):
    """`Traffic` in a checkpoint."""

    texts: int
    rounds: list[tuple[list[int], list[Plain]]]


class Traffic:
    """The last `limit` rounds with a rejection, and their texts."""

    def __init__(self, limit: int) -> None:
        self.rounds: deque[tuple[list[int], Round]] = deque(maxlen=limit)  # each with its whole text
        self.texts = 0  # that were ever added
        self.window: Window | None = None  # what drafts last read of a text; what is learned from reads no more

    def add(self, ids: list[int], rounds: Sequence[Round]) -> None:
        """A text that is over."""
        self.texts += 1
        self.rounds.extend((ids, r) for r in rounds)

    def draw(self, n: int, rng: random.Random) -> list[tuple[list[int], Round]]:
        """`n` rounds, with replacement."""
        return rng.choices(list(self.rounds), k=n)

    def state_dict(self) -> Kept:
        """Plain values, each text once."""
        texts: list[tuple[list[int], list[Plain]]] = []
        for ids, told in self.rounds:
            if not texts or texts[-1][0] is not ids:
                texts.append((ids, []))
            texts[-1][1].append((told.start, told.k, told.best, told.prob))
        return {"texts": self.texts, "rounds": texts}

    def load_state_dict(self, state: Kept) -> None:
        """What `state_dict` gave."""
        self.rounds.clear()
        for ids, rounds in state["rounds"]:
            self.rounds.extend((ids, Round(*r)) for r in rounds)
        self.texts = state["texts"]


class Recorder(DiffusionDrafter):
    """A drafter that keeps, in `traffic`, what the verifier said where its drafts were rejected."""

    name = "recorder"
    successors = True

    def __init__(self, model: NativeModel, traffic: Traffic, **options: Any) -> None:
        super().__init__(model, **options)
        self.traffic = traffic
        self.asked: tuple[int, int] | None = None  # tokens before the first draft of the round, and its slots
        self.kept: list[Round] = []

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """As any drafter; it has to share the verifier's ids."""
        super().reset(ids, need)
        if self.vocabulary.kind != "ids":
            raise DllmError(
                "a drafter learns from a verifier with its own tokenizer: this one numbers tokens otherwise"
            )
        self.asked, self.kept = None, []

    def together(self, asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
        """As any drafter."""
        for a in asks:
            assert isinstance(a.drafter, Recorder)
            a.drafter.asked = a.drafter.asked or (len(a.ids), a.k)
        return super().together(asks)

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """Keep the round where a fresh draft was judged and not taken whole."""
        super().observe(ids, emitted, successors)
        asked, self.asked = self.asked, None
        start, m = len(ids) - len(emitted), len(emitted)
        said = {seen.path: seen for seen in successors}
        along = [said.get(tuple(emitted[:i])) for i in range(m)]
        rejected = any(len(path) >= m and path[: m - 1] == tuple(emitted[:-1]) for path in said)
        if asked is None or asked[0] != start or not m or not rejected:
            return
        judged = [seen for seen in along if seen is not None]
        if len(judged) == m and max(t for seen in judged for t in seen.best) < self.model.vocab_size:
            best, prob = [list(seen.best) for seen in judged], [list(seen.prob) for seen in judged]
            self.kept.append(Round(start, asked[1], best, prob))

    def finish(self, ids: Sequence[int]) -> None:
        """Hand over what the text taught."""
        self.traffic.window = self.looks
        self.traffic.add(list(ids), self.kept)


def masked(ids: Sequence[int], told: Round, learner: Learner, window: Window | None = None) -> Masked:
    """The draft of a round once more, behind what such a window reads: its slots masked; those that were judged weigh
    1, the others nothing."""
    start, k, m, unit = told.start, told.k, len(told.best), learner.model.block_size or 1
    read = list(ids[:start]) if window is None else window.of(ids[:start], unit, unit)
    cut = max(0, len(read) + k + (learner.sep is not None) - learner.model.max_positions)
    read = read[-(-cut // unit) * unit :]
    target = (list(ids[start : start + k]) + [learner.model.eos_ids[0]] * k)[:k]
    weight = (torch.arange(k) < m).float()
    text = behind(read, target, torch.ones(k, dtype=torch.bool), weight)
    around = (0, 0, len(read), len(text.ids) - len(read) - m)
    extra = {"best": F.pad(torch.tensor(told.best), around), "prob": F.pad(torch.tensor(told.prob), around)}
    return text._replace(extra=extra)


def loss(rows: Rows, learner: Learner, divergence: str) -> Sum:
    """The divergence of the judged slots, by the verifier's best tokens and all others as one."""
    at = rows.weight.nonzero()[:, 0]
    weight, best, prob = rows.weight[at], rows.extra["best"][at], rows.extra["prob"][at]
    rows = rows._replace(row=rows.row[at], source=rows.source[at])
    q = folded(learner.logits(rows).float().log_softmax(-1), best)
    p = torch.cat([prob, 1 - prob.sum(-1, keepdim=True)], -1).clamp_min(1e-6).log().log_softmax(-1)
    return Sum((DIVERGENCES[divergence](p, q) * weight).sum(), weight.sum())
