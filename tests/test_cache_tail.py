"""The masked tail: what a cache with `near` leaves out, that the rest is exact, and that rows are independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from scripted import tiny
from torch import Tensor

import dllm
from dllm.decoding.cache.policy import NoCache
from dllm.samplers import Canvas, Span, State, registry

PROMPTS = [[5, 6], [1, 2, 3, 30, 31, 32, 33], [7, 8, 9, 10]]


class First(NamedTuple):
    epoch: Tensor
    end: Tensor


@dataclass(frozen=True)
class Watched(NoCache):
    """No cache, and no window that goes beyond the end that it named when its epoch began."""

    def memory(self, canvas: Canvas) -> First:
        return First(torch.full_like(canvas.start, -1), canvas.start)

    def note(self, state: State, window: Span) -> State:
        before = state.memory[First]
        end = torch.where(window.epoch != before.epoch, window.end, before.end)
        assert (window.hi <= window.end).all() and (window.end <= state.canvas.length).all()
        assert (state.done | (window.hi <= end)).all()
        return state._replace(memory=state.memory.plus(First(window.epoch, end)))


@pytest.mark.parametrize("name", [*registry.names(), "threshold:fastdllm_dream", "dsb:max_length=4", "ass:blocks=2"])
def test_no_step_commits_behind_the_end_that_the_window_named_at_its_opening(name: str) -> None:
    if registry.method(name.partition(":")[0]).name in ("learn2pd", "pc"):
        pytest.skip("fixed blocks, but must be given a filter or frequencies")
    sampler = {"adablock": "adablock:delimiters=[3]", "daedal": "daedal:initial=8"}.get(name, name)
    v2 = name == "fast_dllm_v2"
    model = tiny(block_size=8 if v2 else None, shift=int(v2))
    dllm.generate(model, PROMPTS, sampler=sampler, cache=Watched(), max_new_tokens=16, block_length=4, eos=38)
