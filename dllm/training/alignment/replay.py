"""Draft-OPD (arXiv 2605.29343): replay the drafter's own drafts where the verifier rejected them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from dllm.drafting.front import speculate
from dllm.drafting.registry import as_verifier
from dllm.drafting.verifier import CausalLM
from dllm.errors import DllmError
from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Objective, Sum
from dllm.training.alignment.rows import Masked, Rows
from dllm.training.data import Pair
from dllm.training.laws import DIVERGENCES
from dllm.training.traffic import Kept, Recorder, Traffic, loss, masked


@dataclass(frozen=True)
class Replay(Objective):
    """Every `every` steps the drafter drafts for the verifier on the prompts of that step. What the verifier said up to
    the rejected slot of each draft is learned, at the text and the slots of that draft."""

    every: int = param(50, "steps between two rollouts: drafts get old as the drafter learns", low=1)
    divergence: str = param("forward-kl", "as of distillation", choices=tuple(DIVERGENCES))
    limit: int = param(8192, "rounds that are kept", low=1)

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`; the answers are not read, but their lengths."""
        if self._clock["step"] % self.every == 0:
            self._roll_out(data, learner)
        self._clock["step"] += 1
        if not self._traffic.rounds:
            raise DllmError("nothing to replay: the verifier takes every draft of these prompts")
        return [masked(ids, told, learner) for ids, told in self._traffic.draw(len(data), draw.rng)]

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """The divergence up to the rejected slots."""
        return loss(rows, learner, self.divergence)

    def state_dict(self) -> dict[str, object]:
        """The rounds that are kept, and the steps since the start."""
        return {"step": self._clock["step"], "traffic": self._traffic.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """What `state_dict` gave."""
        self._clock["step"] = cast(int, state["step"])
        self._traffic.load_state_dict(cast(Kept, state["traffic"]))

    @cached_property
    def _traffic(self) -> Traffic:
        return Traffic(self.limit)

    @cached_property
    def _clock(self) -> dict[str, int]:
        return {"step": 0}

    def _roll_out(self, data: Sequence[Pair], learner: Learner) -> None:
        if learner.verifier is None:
            raise DllmError("this objective drafts for the verifier, and none was given")
        drafter = Recorder(learner.model, self._traffic, suffix_token_id=learner.sep, vocabulary="ids")
        new, verifier = max(len(c.answer) for c in data), as_verifier(cast(CausalLM, learner.verifier))
        speculate(
            verifier,
            drafter,
            [c.prompt for c in data],
            max_new_tokens=new,
            length=f"fixed:k={learner.block}",
            carry="off",
            search="argmax",
        )
