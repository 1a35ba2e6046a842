"""How far the logits of a cached decode are from those of a full forward on the same canvas."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from dllm.call.arguments import DecodingArguments
from dllm.call.job import ModelLike, prepare
from dllm.call.prompts import One, Prompt, Several
from dllm.decoding.canvas import Plan, Span, State
from dllm.decoding.engine import Answer, Runner
from dllm.decoding.meter import Meter
from dllm.decoding.slots import View
from dllm.errors import DllmError


class StepError(NamedTuple):
    """The candidates of one step of one row: masked columns of its window."""

    step: int  # the row's own count, from 0
    max: float  # largest absolute difference of a logit
    mean: float  # mean absolute difference
    flips: int  # candidates whose most probable token differs
    candidates: int


class Compared(Runner):
    """Runs a full forward without a store beside every forward of the policy, and notes the differences."""

    def __init__(self, *parts: Any, errors: list[list[StepError]]) -> None:
        super().__init__(*parts)
        self.errors, self.uncounted = errors, Meter(len(errors), self.model.device)

    def forward(self, state: State, window: Span, plan: Plan, requests: list[int]) -> Answer:
        """The policy's answer; the full one is compared and not counted."""
        answer = super().forward(state, window, plan, requests)
        if not plan.stored:
            return answer
        whole = self.policy.whole(state, window)
        counted, self.meter = self.meter, self.uncounted
        exact = super().forward(state, window, whole, requests)
        self.meter = counted
        self._note(state, window, answer, exact, requests)
        return answer

    def _note(self, state: State, window: Span, answer: Answer, exact: Answer, requests: list[int]) -> None:
        ours, theirs = answer.read(window.reads), exact.read(window.reads)
        assert ours is not None and theirs is not None
        live = View(state, window).live
        apart = (ours.logits - theirs.logits).abs()
        apart = torch.where(torch.isfinite(theirs.logits), apart, 0.0)  # (B, W, V)
        flips = ours.argmax != theirs.argmax
        for row, request in enumerate(requests):
            here: Tensor = apart[row][live[row]]
            if len(here):
                values = here.max().item(), here.mean().item(), int(flips[row][live[row]].sum()), len(here)
                self.errors[request].append(StepError(int(state.step[row]), *values))


@overload
def cache_error(
    model: ModelLike = None, prompt: One | None = None, *, n: Literal[1] = 1, **arguments: Unpack[DecodingArguments]
) -> list[StepError]: ...
@overload
def cache_error(
    model: ModelLike, prompt: Several, *, n: int = 1, **arguments: Unpack[DecodingArguments]
) -> list[list[StepError]]: ...
@overload
def cache_error(
    model: ModelLike = None, prompt: Prompt | None = None, *, n: int = 1, **arguments: Unpack[DecodingArguments]
) -> list[StepError] | list[list[StepError]]: ...
def cache_error(
    model: ModelLike = None, prompt: Prompt | None = None, *, n: int = 1, **arguments: Unpack[DecodingArguments]
) -> list[StepError] | list[list[StepError]]:
    """Decode as `generate` does with these arguments, and report the logit error of the cache at every step.

    Returns a list of `StepError` for one prompt, a list of such lists for a list of prompts. Differences are in logits,
    at the columns that the step could commit; a step is compared with a full forward on the canvas that it saw.
    Errors: those of `generate`, and a lookahead, which leaves forwards out.
    """
    if arguments.get("lookahead") is not None:
        raise DllmError("cache_error compares each forward with a full one, and lookahead leaves forwards out: drop it")
    job = prepare(model, prompt, {"n": n, **arguments})
    errors: list[list[StepError]] = [[] for _ in job.prompts]
    for _ in job.ticks(Meter(len(errors), job.model.device), partial(Compared, errors=errors)):
        pass
    return errors[0] if job.single else errors
