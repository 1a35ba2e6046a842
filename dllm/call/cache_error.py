"""How far the logits of a cached decode are from those of a full forward on the same canvas."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from dllm.call.arguments import DecodingArguments
from dllm.call.job import ModelLike, prepare, resolve_model
from dllm.call.prompts import One, Prompt, Several
from dllm.decoding.cache.policy import planned
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Answer, Part, Runner, Turn
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
        self.errors = errors

    def turn(self, part: Part) -> Turn:
        """The policy's step; the full forward is compared and not counted."""
        turn = super().turn(part)
        if turn.answer.plan.stored or not (turn.answer.plan.dense or (self.policy.exact and self.policy.block_size)):
            whole = planned(part.state, self.policy.whole(part.state, part.window))
            self._note(part, turn.answer, self.forward(part.state, part.reading, whole))
        return turn

    def _note(self, part: Part, answer: Answer, exact: Answer) -> None:
        window = part.reading
        ours, theirs = answer.read(window.reads), exact.read(window.reads)
        live = View(part.state, window).live
        apart = (ours.logits - theirs.logits).abs()
        apart = torch.where(torch.isfinite(theirs.logits), apart, 0.0)  # (B, W, V)
        flips = ours.argmax != theirs.argmax
        for row, ticket in enumerate(part.request):
            here: Tensor = apart[row][live[row]]
            if len(here):
                values = here.max().item(), here.mean().item(), int(flips[row][live[row]].sum()), len(here)
                self.errors[ticket.index].append(StepError(int(part.state.step[row]), *values))


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
    job = prepare(resolve_model(model), prompt, {"n": n, **arguments})
    errors: list[list[StepError]] = [[] for _ in job.prompts]
    for _ in job.ticks(Meter(len(errors)), partial(Compared, errors=errors)):
        pass
    return errors[0] if job.single else errors
