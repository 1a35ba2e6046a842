"""Draft events of the canvas, from an engine that is ticked by hand."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from test_engine_calls import CALL, ByHand

pytest.importorskip("fastapi")

from scripted import tiny

from dllm.serve.stream import Drafts, Ear


class Short(type(tiny())):  # type: ignore[misc]
    """A model that runs out of memory once, at this forward."""

    at = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        self.at -= 1
        if not self.at:
            raise RuntimeError("CUDA out of memory")
        return super().forward(*args, **options)


@pytest.mark.parametrize("at", [2, 3, 9])
@pytest.mark.parametrize("every", [1, 2])
def test_drafts_of_a_row_that_begins_anew_go_on_where_they_were(at: int, every: int) -> None:
    """Every write is told once, whether or not its step was told when memory ran out."""
    short = tiny()
    short.__class__, short.at = Short, at
    engine, told = ByHand(short, max_rows=1), list[Any]()

    async def followed() -> Any:
        ear = Ear(1 << 20)
        request = engine.submit([1, 2, 3], trace=True, on_step=ear.step, **CALL)
        ear.follow(request, True)
        reply: Any = SimpleNamespace(draft=lambda choice, said: said, piece=str)
        drafts, choice = Drafts(ear, request, reply, 0.0), SimpleNamespace(index=0)
        for turn in range(99):
            if request.done:
                break
            engine.turns(1)
            if not turn % every or request.done:
                told.extend(drafts.due(choice, all_of_them=True))
        return request

    output = asyncio.run(followed()).result()
    written = [(column, token) for event in told for column, token, *_ in event["writes"]]
    assert len(written) == len({column for column, _ in written}) == 12
    assert [token for _, token in sorted(written)] == output.tokens
    assert [event["step"] for event in told] == sorted({event["step"] for event in told})


def test_every_step_wakes_who_watches_a_canvas() -> None:
    """One that makes no text final, too."""
    engine, woken = ByHand(tiny(), max_rows=1), list[bool]()

    async def followed() -> None:
        ear = Ear(1 << 20)
        request = engine.submit([1, 2, 3], trace=True, on_step=ear.step, **{**CALL, "sampler": "wino"})
        ear.follow(request, True)
        while not request.done:
            await asyncio.sleep(0)
            ear.wake.clear()
            engine.turns(1)
            await asyncio.sleep(0)
            woken.append(ear.wake.is_set())

    asyncio.run(followed())
    assert len(woken) > 5 and all(woken[1:])  # of a step before the next forward
