"""How likely a drafted node is accepted once its parent was: what length controllers go by.

The data are censored: nodes behind a rejection were never judged and are not fed.
"""

from __future__ import annotations

import math
from operator import mul

import numpy as np

from dllm.drafting.proposal import Spread


class Estimator:
    """Base of all estimators, and the one that believes the draft.

    Everything that it is told of a node is settled before the node's token is drawn. `spread`: whether it reads that.
    """

    spread = False

    def fork(self) -> Estimator:
        """One for another text; what it learns is known to the next ones."""
        return self

    def add(self, slot: int, conf: float, accepted: bool, spread: Spread | None = None) -> None:
        """A judged node: its slot, 0 the first behind the text, and what the draft says of it."""

    def __call__(self, slot: int, conf: float, spread: Spread | None = None) -> float:
        """The probability that such a node is accepted."""
        return conf


class Calibrator(Estimator):
    """Acceptance probability of a node from its slot and confidence: Beta counts per bin, prior = the confidence
    itself.

    The data are censored: nodes behind a rejection were never judged and are not fed. Prior strength 4, clipped to
    [0.02, 0.98]. Counts fade beyond `WINDOW` trials of a bin. A text's own calibrator starts from those of the texts
    before it, which weigh at most `TRUST` trials a bin: enough to know a pair, little enough to see that texts differ.
    """

    EDGES = (1, 2, 4, 8, 16)
    WINDOW, TRUST = 128, 16

    def __init__(self, strength: float = 4.0, parent: Calibrator | None = None) -> None:
        self.strength, self.parent = strength, parent
        self.hits = np.zeros((len(self.EDGES) + 1, 10))
        self.tries = np.zeros_like(self.hits)
        if parent is not None:
            weight = np.minimum(1.0, self.TRUST / np.maximum(parent.tries, 1.0))
            self.hits, self.tries = parent.hits * weight, parent.tries * weight

    @classmethod
    def of(cls, hits: np.ndarray, tries: np.ndarray) -> Calibrator:
        """One with counts that were kept. Errors (ValueError): of another shape, no counts."""
        calibrator = cls()
        if hits.shape != calibrator.hits.shape or not ((hits >= 0) & (hits <= tries)).all():
            raise ValueError("counts of a calibration are no counts")
        calibrator.hits, calibrator.tries = hits.astype(float), tries.astype(float)
        return calibrator

    def _bin(self, slot: int, conf: float) -> tuple[int, int]:
        return sum(slot >= e for e in self.EDGES), min(9, int(conf * 10))

    def fork(self) -> Calibrator:
        """One for a text, which starts from these counts."""
        return Calibrator(self.strength, self)

    def add(self, slot: int, conf: float, accepted: bool, spread: Spread | None = None) -> None:
        """A judged node, also for the parent."""
        if self.parent is not None:
            self.parent.add(slot, conf, accepted)
        where = self._bin(slot, conf)
        if self.tries[where] >= self.WINDOW:
            self.hits[where] /= 2
            self.tries[where] /= 2
        self.tries[where] += 1
        self.hits[where] += accepted

    def __call__(self, slot: int, conf: float, spread: Spread | None = None) -> float:
        """The calibrated probability of a node of this slot and confidence."""
        where = self._bin(slot, conf)
        a = (self.strength * conf + self.hits[where]) / (self.strength + self.tries[where])
        return float(min(max(a, 0.02), 0.98))


class AcceptanceHead(Estimator):
    """Logistic regression on what a draft says of a node: confidence, slot, and of its row the margin and the entropy
    (in the manner of the acceptance heads of SpecDec++, arXiv 2405.19715, and SpecKV).

    It begins at the confidence itself and learns from every judged node, of all texts, by Laplace's approximation of
    the posterior (Spiegelhalter and Lauritzen, 1990): no rate to choose, and equal nodes in equal order give equal
    weights. Clipped to [0.02, 0.98].

    mean, cov   of the weights: (F,), (F, F).
    """

    spread = True
    PRIOR, DRIFT = 1.0, 1e-5  # variance of a weight to begin with, and what every node adds: texts change

    def __init__(self) -> None:
        size = len(_features(0, 0.5, None))
        self.mean, self.cov = np.zeros(size), np.eye(size) * self.PRIOR
        self.mean[1] = 1.0
        self.known: list[float] = self.mean.tolist()  # for single nodes lists are faster

    def add(self, slot: int, conf: float, accepted: bool, spread: Spread | None = None) -> None:
        """One step of the posterior."""
        x = np.array(_features(slot, conf, spread))
        p, g = _sigmoid(float(self.mean @ x)), self.cov @ x
        weight = max(p * (1 - p), 1e-4)
        gain = g / (1 + weight * float(x @ g))
        self.cov -= (weight * gain)[:, None] * g
        self.cov.flat[:: len(x) + 1] += self.DRIFT
        self.mean += gain * (accepted - p)
        self.known = self.mean.tolist()

    def __call__(self, slot: int, conf: float, spread: Spread | None = None) -> float:
        """The probability by the weights as they are."""
        z = sum(map(mul, self.known, _features(slot, conf, spread)))
        return min(max(_sigmoid(z), 0.02), 0.98)


def _features(slot: int, conf: float, spread: Spread | None) -> list[float]:
    """About one in size; nothing of a row that nobody knows."""
    conf = min(max(conf, 0.02), 0.98)
    logit = math.log(conf / (1 - conf))
    first = [1.0, logit, logit * logit / 4, float(slot == 0), math.log1p(slot) - 1]
    if spread is None:
        return [*first, 0.0, 0.0, 0.0]
    entropy = spread.entropy - 1
    return [*first, min(spread.margin, 6.0) / 2 - 1, entropy, logit * entropy]


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-max(z, -30.0)))


ESTIMATORS: dict[str, type[Estimator]] = {
    "draft": Estimator,
    "counts": Calibrator,
    "head": AcceptanceHead,
}
