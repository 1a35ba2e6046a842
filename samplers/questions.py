"""What a call asks the device in a tick. A tick that asks nothing can be one CUDA graph; any other runs all the same,
but waits at each question until the device has done everything before.

    questions(registry.build("odd_even:tau=0.7", context), context)  # []: it asks nothing

The ticks are run on fake tensors of a device that is not there: they have shapes but no values, so what asks for a
value fails, and what is copied from the host shows. The model computes nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm.decoding import constants
from dllm.decoding.cache.policy import Policy
from dllm.decoding.cache.tail import NoCache
from dllm.decoding.canvas import Canvas, Leaves, State
from dllm.decoding.facts import Facts, Shape
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law
from dllm.decoding.runner import Options, Part, Runner
from dllm.decoding.slots import Context, Sampler
from dllm.decoding.step import opened
from dllm.models.model import Model
from dllm.models.transformer import Outputs, Rows, Said, Weights

DEVICE = torch.device("lazy", 0)  # torch makes fake tensors of it on every machine
ROWS, PROMPT = 2, 3


@cache
def _mode() -> FakeTensorMode:
    """One for all: a `Constant` keeps what it made."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def questions(s: Sampler, context: Context, policy: Policy | None = None, options: Options | None = None) -> list[str]:
    """What such a call asks in its first ticks, each question once. Behind one that needs a value a tick cannot go on,
    so there may be more. A leaf that changes its shape or type is named, too: a graph has one place for it.

    policy: None: no cache; options: None: greedy.
    """
    policy = replace(policy or NoCache(), block_size=context.block_size, shift=context.shift)
    s = s.reading(_Blank.attention_layers)
    options = options or Options(Law(filtered=s.needs.filtered))
    run, found = Runner(_Blank(context), policy.attach(s), policy, options), list[str]()
    with _mode(), _Copies(found):
        try:
            _run(run, context, found)
        except Exception as error:  # each operator has its own way to say that it wants a value
            found.append(f"{_place(traceback.extract_tb(error.__traceback__))}: {type(error).__name__}: {error}")
    return list(dict.fromkeys(found))


def _run(run: Runner, context: Context, found: list[str]) -> None:
    """A tick that refreshes and one that does not, with the narrowest and the widest table of reads."""
    width = PROMPT + context.max_new_tokens
    ids = torch.zeros(ROWS, width, dtype=torch.long, device=DEVICE)
    start, asked = (torch.full((ROWS,), n, dtype=torch.long, device=DEVICE) for n in (PROMPT, context.max_new_tokens))
    canvas = Canvas(ids, ids == 0, ids > 0, start, start + asked, context.mask_id)
    state, window = opened(run.s, run.policy, State.begin(canvas, start, asked, *run.s.start(canvas)))
    rows, lane = list(range(ROWS)), torch.arange(ROWS, device=DEVICE)
    tickets, nothing = Meter(ROWS).rows, Facts(*[0] * len(Facts._fields))
    for stale, reads in ((1, 1), (0, width)):
        part = Part(rows, lane, slice(0, ROWS), state, window, [nothing._replace(stale=stale)] * ROWS, tickets)
        before, after = state, run.work(part, Shape(width, width, reads))
        state, window = after.state, after.window
        found += [*_changed(before.memory, state.memory), *_changed(before.columns, state.columns)]


class _Blank(Model):
    """A model of the fake device that computes nothing."""

    device = DEVICE
    attention_layers = 4

    def __init__(self, context: Context) -> None:
        self.vocab_size = self.embedding_rows = context.vocab_size
        self.max_positions, self.mask_id, self.eos_ids = context.max_positions, context.mask_id, context.eos_ids
        self.shift, self.block_size, self.relative = context.shift, context.block_size, True

    def forward(self, ids: Tensor, pos: Tensor | None = None, **_: object) -> Tensor:
        """Nothing, in the shape of hidden states."""
        return torch.zeros(*ids.shape, 1, device=DEVICE)

    def forward_with(
        self, ids: Tensor, pos: Tensor | None = None, *, rows: Rows | None = None, kv: bool = False, **_: object
    ) -> Outputs:
        """Nothing, in the shape of attention weights."""
        assert pos is not None and rows is not None
        cols = torch.where(rows.at < 0, -1, pos.gather(1, rows.at.clamp(min=0)))
        weights = Weights(cols, torch.zeros(*rows.at.shape, rows.width, device=DEVICE))
        return Outputs(Said(self.forward(ids, pos), weights), [])

    def logits(self, hidden: Tensor) -> Tensor:
        """Nothing, in the shape of logits."""
        return torch.zeros(*hidden.shape[:-1], self.vocab_size, device=DEVICE)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Notes what goes from the host to the device or back; constants may, once."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if len({t.device.type for t in tensors if t.dim()}) > 1:
            stack = traceback.extract_stack()
            if all(frame.filename != constants.__file__ for frame in stack):
                self.found.append(f"{_place(stack)}: a copy between host and device")
        return out


def _place(stack: traceback.StackSummary) -> str:
    """File and line of the innermost frame that is neither torch's nor this file's, with its text."""
    *_, frame = (f for f in stack if "/torch/" not in f.filename and f.filename != __file__)
    return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"


def _changed(before: Leaves, after: Leaves) -> list[str]:
    """The leaves that changed their shape or type."""
    return [
        f"{kind.__name__}.{name} changed from {tuple(x.shape)} {x.dtype} to {tuple(y.shape)} {y.dtype}"
        for kind, leaf in after.items()
        for name, x, y in zip(vars(kind)["_fields"], before[kind], leaf, strict=True)
        if (x.shape, x.dtype) != (y.shape, y.dtype)
    ]
