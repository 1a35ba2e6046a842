"""What every step of every sampler must hold: I1 to I11 of docs/testing.md, checked in a call that is given `Checked`.

    dllm.generate(model, prompts, sampler="adablock+credit+prophet", check=Checked())

Every step is then taken twice and checked: about twice the time of the samplers' own work. For tests and new samplers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.decoding.canvas import Span, State
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Sampler, View
from dllm.decoding.step import step


class Broken(AssertionError):
    """A step that breaks an invariant; the message names sampler, invariant and rows."""


@dataclass(eq=False)
class Checked:
    """Takes steps as `engine.step` does, and checks each of them. Guesses of the lookahead are no steps of a call."""

    steps: int = 0  # taken so far, over all calls

    def __call__(self, s: Sampler, state: State, window: Span, pred: Prediction) -> State:
        """The state after the step. Errors: `Broken`."""
        kept, random = state.take(torch.arange(state.rows, device=state.step.device)), torch.get_rng_state()
        after = step(s, state, window, pred)
        self.steps += 1
        _require(s, "the step wrote into the state it was given", _same(kept, state))
        _require(s, "the step drew global random numbers", torch.equal(random, torch.get_rng_state()))
        _require(s, "the step is not a function of its arguments", _same(after, step(s, state, window, pred)))
        check(s, state, window, pred, after)
        return after


def check(s: Sampler, before: State, window: Span, pred: Prediction, after: State) -> None:
    """Compare the states around one step. Errors: `Broken`."""
    view = View(before, window)
    s.window.narrow(view, pred)
    old, new = before.canvas, after.canvas
    cols = torch.arange(old.ids.shape[1], device=old.ids.device)
    edited = new.length != old.length
    _require(s, "the length changed without edits_length", ~edited | torch.tensor(s.needs.edits_length))
    _require(s, "a length edit kept the cache", ~edited | (torch.stack(after.cached) == -1).all(0))
    same = ~edited[:, None]
    changed = (old.ids != new.ids) & same
    commits, back = old.masked & ~new.masked & same, ~old.masked & new.masked & same
    inside = view.window.inside(cols)
    filled = after.done & ~new.masked.any(1)
    _require(s, "I1: a commit outside the window", ~(commits & ~inside).any(1) | filled)
    _require(s, "I2: the mask was written as a token", (new.masked == ((new.ids == new.mask_id) & ~new.frozen)) | ~same)
    _require(s, "I2: a token outside the vocabulary", new.ids < pred.logits.shape[-1])
    _require(s, "I3: a given token changed", ~(changed & old.frozen))
    _require(s, "I3: the prompt changed", (old.ids == new.ids) | (cols >= old.start[:, None]))
    rewritten = changed & ~commits
    _require(s, "a token was taken back without `revises`", ~rewritten | torch.tensor(s.needs.revises))
    net = commits.sum(1) - back.sum(1)
    excused = edited | after.closing | after.done | view.held | torch.tensor(s.needs.may_idle or s.needs.edits_length)
    # one that takes tokens back has a budget of its own over several steps: it must still write something
    progress = commits.sum(1) >= 1 if s.needs.revises else net >= 1
    _require(s, "I4: a step without progress", progress | excused)
    _require(s, "I7: a finished row was forwarded", ~before.done)
    _require(s, "the step counter", after.step == before.step + 1)
    if s.adjust and not s.needs.edits_length:  # I9: the exit looks at the raw prediction (a cut, at what was committed)
        _require(
            s,
            "I9: `adjust` moved an exit",
            (_raw_exit(s, before, window, pred) == _exits(view, before, after)) | edited,
        )
    if before.rows > 1:
        first = torch.zeros(1, dtype=torch.long, device=cols.device)
        rest = torch.arange(1, before.rows, device=cols.device)
        _require(s, "I11: the state is not sliceable", _same(after, after.take(first).cat(after.take(rest))))


def _exits(view: View, before: State, after: State) -> Tensor:
    """(B,) rows that left by an exit: they ask for a closing forward, or were filled beyond their window."""
    cols = torch.arange(before.canvas.ids.shape[1], device=before.step.device)
    outside = ~view.window.inside(cols)
    return after.closing | (before.canvas.masked & ~after.canvas.masked & outside).any(1)


def _raw_exit(s: Sampler, before: State, window: Span, pred: Prediction) -> Tensor:
    """The exits of the same step without the adjust chain."""
    s = s._replace(adjust=(), score=lambda view, soft: soft.confidence, select=lambda view, soft, score: view.live)
    view = View(before, window)
    s.window.narrow(view, pred)
    return _exits(view, before, step(s, before, window, pred))


def _require(s: Sampler, what: str, holds: Tensor | bool) -> None:
    if isinstance(holds, bool):
        holds = torch.tensor([holds])
    broken = ~holds.view(len(holds), -1).all(1)
    if bool(broken.any()):
        raise Broken(f"{s.name}: {what} (rows {broken.nonzero().flatten().tolist()})")


def _same(a: object, b: object) -> bool:
    """Whether two nests hold equal tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(v, b[key]) for key, v in a.items())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
