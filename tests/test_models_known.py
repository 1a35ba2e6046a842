"""A forward that is told what the host knows: it asks the device nothing, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from scripted import tiny
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from dllm.models.config import MoEConfig
from dllm.models.model import ForwardOptions
from dllm.models.native import NativeModel
from dllm.models.transformer import Known, KVStore

N, Q, L = 3, 4, 16
SWITCHES = {
    "full": {},
    "block": {"block_size": 4},
    "causal": {"causal": True},
    "mixture": {"moe": MoEConfig(8, 2, 5)},  # rows that the grouped product does not take
    "norms": {"qk_norm": True, "rotary_fraction": 0.5},
}


class Case(NamedTuple):
    """The tensors of a forward, and what the host knows of them; the store is added."""

    pos: Tensor | None
    options: ForwardOptions
    known: Known
    stored: bool = True


def whole(length: int = Q) -> Tensor:
    return torch.arange(4, 4 + length).expand(N, -1)


def coins(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def moved() -> Tensor:
    """Rows at different positions, the last of them padded."""
    return torch.tensor([[4, 5, 6, 7], [0, 9, 8, 1], [2, 15, -1, -1]])


def private() -> Case:
    """Fresh tokens that stay or do not, private ones, and padding."""
    pos, fresh = moved(), torch.tensor([[True, True, False, False], [True, False, True, False], [True, False] * 2])
    visible = coins(N, Q, 12 + Q, seed=1)
    visible[:, torch.arange(Q), 12 + torch.arange(Q)] = True
    keep = fresh & coins(N, Q, seed=3)
    return Case(pos, {"fresh": fresh, "keep": keep, "visible": visible}, Known(True, True, None, None, 12))


def lanes(lane: list[int], known: slice | None) -> Case:
    keep = coins(N, Q, seed=2)
    return Case(whole(), {"keep": keep, "lane": torch.tensor(lane)}, Known(False, False, known, None, L))


CASES: dict[str, Callable[[], Case]] = {
    "full": lambda: Case(None, {}, Known(), stored=False),
    "padded": lambda: Case(moved(), {}, Known(True), stored=False),
    "visible": lambda: Case(whole(), {"visible": coins(N, Q, Q) | torch.eye(Q).bool()}, Known(), stored=False),
    "refresh": lambda: Case(torch.arange(L).expand(N, -1), {}, Known(False, False, None, slice(0, L), L)),
    "window": lambda: Case(whole(), {}, Known(False, False, None, slice(4, 8), 12)),
    "ragged": lambda: Case(moved(), {}, Known(True, False, None, None, L)),
    "kept nowhere": lambda: Case(
        whole(), {"keep": torch.zeros(N, Q, dtype=torch.bool)}, Known(False, False, None, slice(0, 0), L)
    ),
    "some kept": lambda: Case(moved(), {"keep": coins(N, Q)}, Known(True, False, None, None, L)),
    "private": private,
    "a run of lanes": lambda: lanes([1, 2, 3], slice(1, 4)),
    "lanes": lambda: lanes([2, 0, 3], None),
}


def filled(model: NativeModel) -> KVStore:
    store, g = model.new_store(N + 1, L), torch.Generator().manual_seed(5)
    for t in (*store.keys, *store.values):
        t.normal_(generator=g)
    return store


def stored(store: KVStore | None) -> list[Tensor]:
    return [] if store is None else [t[:, :, : store.slots] for t in (*store.keys, *store.values)]


def sample_ids(case: Case) -> Tensor:
    width = L if case.pos is None else case.pos.shape[1]
    return torch.randint(0, 39, (N, width), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_whether_the_device_is_asked_or_not(name, switches):
    case, model = CASES[name](), tiny(layers=2, std=0.25, **SWITCHES[switches])
    ids, stores = sample_ids(case), [filled(model) if case.stored else None for _ in range(2)]
    full = {"visible": torch.ones(N, 1, case.known.slots, dtype=torch.bool)} if case.stored else {}
    asked = model.forward(ids, case.pos, **{**full, **case.options}, store=stores[0])
    told = model.forward(ids, case.pos, **case.options, store=stores[1], known=case.known)
    real = slice(None) if case.pos is None else case.pos >= 0
    assert told.isfinite().all() and torch.equal(asked[real], told[real])
    for first, second in zip(*map(stored, stores), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", CASES)
def test_a_forward_that_is_told_asks_the_device_nothing(name, switches):
    case, model = CASES[name](), tiny(layers=2, std=0.25, **SWITCHES[switches])
    ids, store = sample_ids(case), filled(model) if case.stored else None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: object) -> object:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        options = {key: fake(value) for key, value in case.options.items()}
        if store is not None:
            options["store"] = KVStore(*(tuple(map(mode.from_tensor, side)) for side in store))
        arguments = (fake(ids), fake(case.pos))
        out = model.forward(*arguments, **options, known=case.known)
        assert out.shape == (*ids.shape, 32)
        if case.options or case.pos is not None:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                model.forward(*arguments, **options)
