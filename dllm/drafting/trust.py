"""What the word of a drafter is worth beside those of others."""

from __future__ import annotations

from dllm.drafting.estimate import Calibrator


class Trust:
    """How often nodes were accepted, by who proposed them, their slot and their pooled probability: what an agreement
    is worth, and each source alone. Counts of earlier texts, as a store keeps them, weigh little beside the text's."""

    def __init__(self, base: Trust | None = None) -> None:
        kept = base.kept if base else {}
        self.kept: dict[str, Calibrator] = {who: Calibrator(parent=before) for who, before in kept.items()}
        for calibrator in self.kept.values():
            calibrator.parent = None  # told when the call is over
        self.seen: list[tuple[str, int, float, bool]] = []

    top = -1  # it holds no ids

    def of(self, who: str, slot: int, conf: float) -> float:
        """The probability that such a node is accepted where its parent was."""
        return self.kept[who](slot, conf) if who in self.kept else min(conf, 0.98)

    def learn(self, who: str, slot: int, conf: float, accepted: bool) -> None:
        """A node that was judged."""
        self.seen.append((who, slot, conf, accepted))
        self.kept.setdefault(who, Calibrator()).add(slot, conf, accepted)

    def add(self, other: Trust) -> None:
        """What another one saw."""
        for who, slot, conf, accepted in other.seen:
            self.kept.setdefault(who, Calibrator()).add(slot, conf, accepted)
