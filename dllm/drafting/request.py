"""One text to decode, `Request`, and what came of it, `SpecResult`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm.drafting.accept import Judge, Processors
from dllm.drafting.control import RoundStats


@dataclass
class Request:
    """One text to decode: ids, limits and the verifier's law."""

    ids: list[int]
    max_length: int
    eos: frozenset[int] = frozenset()
    do_sample: bool = False
    processors: Processors | None = None  # where `warp` does not say it all, see `Judge`
    warp: Callable[[Tensor], Tensor] | None = None
    stop: Callable[[list[int]], bool] | None = None  # (all ids) -> stop behind the last one?
    generator: torch.Generator | None = None
    padded: list[int] | None = None  # `ids` with the padding that the processors of a batch expect to see
    before: int = 0  # tokens of an earlier turn in the cache that `ids` lacks

    @property
    def law(self) -> Judge:
        """How the verifier takes a token."""
        return Judge(self.do_sample, self.warp, self.processors, self.generator)

    @property
    def shown(self) -> list[int]:
        """The ids that processors see before the output."""
        return self.ids if self.padded is None else self.padded


@dataclass
class SpecResult:
    """One decoded prompt. Lengths in tokens, times in seconds."""

    sequences: list[int]  # prompt and output, up to the token that completes a stop
    prompt_length: int
    finish_reason: str = "length"  # stop | length
    end: int | None = None  # where a stop begins in `sequences`
    text: str | None = None
    rounds: list[RoundStats] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (accepted, emitted) per round, as printed
    seconds: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """The output up to the stop, without it, as in `dllm.Output`."""
        return self.sequences[self.prompt_length : self.end]

    @property
    def emitted(self) -> list[int]:
        """The output with the stop."""
        return self.sequences[self.prompt_length :]

    @property
    def n_verify(self) -> int:
        """Verifier forwards: one a round, and those over what was in the cache already."""
        return sum(1 + r.replays for r in self.rounds)

    @property
    def n_draft(self) -> int:
        """Rounds with a fresh draft."""
        return sum(r.k > 0 and not r.carried for r in self.rounds)

    @property
    def n_carried(self) -> int:
        """Rounds with the rest of an earlier draft."""
        return sum(r.carried for r in self.rounds)

    @property
    def draft_forwards(self) -> int:
        """Forwards of the drafter and of what is grafted."""
        return sum(r.forwards for r in self.rounds)

    @property
    def draft_failures(self) -> int:
        """Rounds whose draft had unusable logits."""
        return sum(r.failed for r in self.rounds)

    @property
    def tau(self) -> float:
        """Tokens emitted per verifier forward, bonus included (the papers' tau or MAT)."""
        return sum(r.emitted for r in self.rounds) / max(1, self.n_verify)

    @property
    def accepted_per_round(self) -> float:
        """Accepted drafts per verifier forward, without the bonus token."""
        return sum(r.accepted for r in self.rounds) / max(1, self.n_verify)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / submitted tokens."""
        return sum(r.accepted for r in self.rounds) / max(1, sum(r.nodes for r in self.rounds))

    @property
    def per_slot_acceptance(self) -> list[float]:
        """P(slot i is accepted | it was judged): slots behind a rejection are not counted."""
        judged: dict[int, list[bool]] = {}
        for r in self.rounds:
            for slot, accepted in r.judged.items():
                judged.setdefault(slot, []).append(accepted)
        return [sum(judged[i]) / len(judged[i]) for i in sorted(judged)]

    @property
    def tokens_per_s(self) -> float:
        """Of the output without the stop."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def wall(self) -> dict[str, float]:
        """Seconds per stage."""
        return {name: sum(r.wall[name] for r in self.rounds) for name in RoundStats().wall}

    def speedup_vs(self, baseline: SpecResult | float) -> float:
        """Wall-clock ratio to a plain run of the same text (a result, or its seconds)."""
        seconds = baseline.seconds if isinstance(baseline, SpecResult) else baseline
        return seconds / max(1e-9, self.seconds)

    def metrics(self) -> dict[str, float]:
        """All figures by name, for tables."""
        return {
            "tokens": len(self.tokens),
            "verify calls": self.n_verify,
            "draft calls": self.n_draft,
            "draft forwards": self.draft_forwards,
            "carried drafts": self.n_carried,
            "draft failures": self.draft_failures,
            "tau (with bonus)": self.tau,
            "accepted per round": self.accepted_per_round,
            "acceptance rate": self.acceptance_rate,
            "tokens per second": self.tokens_per_s,
            **{f"seconds {k}": v for k, v in self.wall.items()},
        }
