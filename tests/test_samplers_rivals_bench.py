"""The bench of a sampler's own work: it measures what it says, and head rows are counted where they are read. And what
keeps that work small."""

from __future__ import annotations

import pytest
import torch

from dllm.bench import step as bench_step
from dllm.decoding.canvas import Span
from dllm.decoding.prediction import best_two
from dllm.decoding.slots import widen
from dllm.errors import DllmError
from dllm.samplers import registry

NARROW = 512  # a vocabulary: the shape of the numbers, not their size


def test_rows_of_the_bench() -> None:
    rows = {r.name: r for r in bench_step.run(["threshold", "klass", "wino", "lopa"], 5, NARROW)}
    assert rows["klass"].bound == 2.5 and rows["wino"].bound == 1.5
    reads = {name: int(r.note.split(", ")[1].split()[0]) for name, r in rows.items()}
    assert reads["threshold"] == 32
    assert reads["wino"] > 32  # the shadow's rows, in the steps that verify
    assert reads["lopa"] > 3 * 32  # four branches, in all but the first step


def test_every_sampler_is_measured_or_says_why_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_step.runnable() == registry.names()
    special = ["fast_dllm_v2", "learn2pd", "clad"]  # of blocks, with a filter, with attention weights
    assert [r.name for r in bench_step.run(special, 5, NARROW)] == special
    monkeypatch.setattr(bench_step, "SHIFTED", ())
    assert "fast_dllm_v2" not in bench_step.runnable()
    assert "'fast_dllm_v2' needs a block-causal model" in caplog.messages[0]


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(DllmError, match="must be at least 5"):
        bench_step.run(["threshold"], repeats=3)


@pytest.mark.parametrize("size", [5, 2048, 2049, 4000])
def test_best_two_logits(size: int) -> None:
    """In every place: both in one stretch, in two, in the tail; equal values; forbidden tokens."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(64, size, generator=generator).round(decimals=1)
    rows[::3] = -torch.inf
    rows[::3, size // 2 :: 7] = 1.0
    rows[1, -2:] = 9.0
    first, second = best_two(rows)
    assert torch.equal(torch.stack([first, second], 1), rows.topk(2).values)


def test_a_window_that_reads_more_has_its_columns_in_front() -> None:
    window = Span(*(torch.zeros(2, dtype=torch.long),) * 3, torch.tensor([[3, 4], [5, -1]]), torch.zeros(2))
    wider = widen(window, torch.tensor([[3, 7, 4], [5, -1, 6]]), 8)
    assert wider.reads.tolist() == [[3, 4, 7, *[-1] * 5], [5, 6, *[-1] * 6]]
