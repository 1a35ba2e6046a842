"""Compiled layers compute what plain ones do: every kind of forward, no graph break, few compilations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from scripted import tiny
from sweeps import some
from test_models_known import CASES, SWITCHES, filled, sample_ids, stored
from torch._dynamo.utils import counters

import dllm
from dllm.errors import DllmError
from dllm.models.native import NativeModel
from dllm.models.transformer import Known


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What other tests compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Compilations so far."""
    return Counter(counters["stats"])["unique_graphs"]


def pair(backend: str, switches: str) -> tuple[NativeModel, NativeModel]:
    plain, compiled = (tiny(layers=2, std=0.25, **SWITCHES[switches]) for _ in range(2))
    compiled.transformer.compile_layers(backend)
    return plain, compiled


@torch.inference_mode()  # as where the engine decodes: tensors of another kind are compiled anew
def check(plain: NativeModel, compiled: NativeModel, name: str, tolerance: float) -> None:
    """Hidden states and what is stored."""
    case = CASES[name]()
    ids, stores = sample_ids(case), [filled(plain) if case.stored else None for _ in range(2)]
    expected, found = (
        model.forward(ids, case.pos, **case.options, store=store, known=case.known)
        for model, store in zip((plain, compiled), stores, strict=True)
    )
    real = slice(None) if case.pos is None else case.pos >= 0
    assert (expected[real] - found[real]).abs().max() <= tolerance
    for first, second in zip(*map(stored, stores), strict=True):
        assert (first - second).abs().max() <= tolerance


@pytest.mark.parametrize("switches", some(["block", "mixture", "norms"], "norms".__eq__))  # the others: see below
def test_every_kind_of_forward_is_one_graph_for_all_layers(switches):
    plain, compiled = pair("eager", switches)
    for name in CASES:
        check(plain, compiled, name, 1e-12)
    assert graphs() == 7  # full, masked, stored, nothing kept, some kept, private columns, lanes gathered


def test_lengths_and_places_compile_nothing_anew():
    plain, compiled = pair("eager", "block")
    seen = []
    for q, first, slots in [(4, 4, 12), (5, 3, 13), *((w, 20 - w, 20) for w in range(6, 14))]:
        ids, pos, known = torch.arange(q)[None], torch.arange(first, first + q)[None], Known(slots=slots)
        known = known._replace(write=slice(first, first + q))
        stores = [model.new_store(1, 24) for model in (plain, compiled)]
        a, b = (m.forward(ids, pos, store=s, known=known) for m, s in zip((plain, compiled), stores, strict=True))
        assert (a - b).abs().max() < 1e-12
        seen.append(graphs())
    assert seen[-1] == seen[1] <= 2


def test_kernels_of_inductor_equal_torch_and_are_found_again(monkeypatch, tmp_path):
    """One small graph, as this takes seconds: a mixture behind a store, with padding and tokens kept or not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool that imports torch
    for hits in (0, 1):
        torch._dynamo.reset()
        check(*pair("inductor", "mixture"), "some kept", 1e-12)
        assert graphs() == 1 + hits and Counter(counters["inductor"])["fxgraph_cache_hit"] == hits


def test_a_compiled_model_decodes_the_same():
    plain, compiled = pair("eager", "full")
    for cache in ("none", "dual"):
        call = {"max_new_tokens": 8, "block_length": 4, "cache": cache}
        expected = dllm.generate(plain, [1, 2, 3], **call)
        assert dllm.generate(compiled, [1, 2, 3], compile=True, **call).tokens == expected.tokens
    assert graphs() > 0


def test_training_is_not_compiled():
    _, compiled = pair("eager", "full")
    compiled.transformer(torch.arange(4)[None]).sum().backward()
    assert graphs() == 0


def test_what_cannot_be_compiled_is_said_in_one_line():
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    model = tiny()
    model.transformer.compile_layers(broken)
    with pytest.raises(DllmError, match=r"leave compile= out: .* RuntimeError: no compiler$"):
        model.forward(torch.arange(4)[None])
