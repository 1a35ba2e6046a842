"""The bench of a sampler's own work: it measures what it says, and head rows are counted where they are read."""

from __future__ import annotations

import pytest

from dllm.eval import bench_step


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow vocabulary: the shape of the numbers, not their size."""
    from dllm.eval import bench

    for module in (bench, bench_step):
        monkeypatch.setattr(module, "VOCABULARY", 512)
    monkeypatch.setattr(bench_step, "context", lambda: bench.context(vocabulary=512))
    monkeypatch.setattr(bench_step, "scene", lambda s: bench.scene(s, mask=511))
    monkeypatch.setattr(bench_step.Tables, "mask_id", 511)
    monkeypatch.setitem(bench_step.GIVEN, "adablock", {"delimiters": [7]})


def test_rows_of_the_bench(small: None) -> None:
    rows = {r.name: r for r in bench_step.run(["threshold", "klass", "wino", "lopa"], repeats=5)}
    assert 0.5 < rows["threshold"].value < 2
    assert rows["klass"].bound == 2.5 and rows["wino"].bound == 1.5
    reads = {name: int(r.note.split(", ")[1].split()[0]) for name, r in rows.items()}
    assert reads["threshold"] == 32
    assert reads["wino"] > 32  # the shadow's rows, in the steps that verify
    assert reads["lopa"] > 3 * 32  # four branches, in all but the first step
    assert all(len(line.split("|")) == 7 for line in bench_step.table(list(rows.values())).splitlines())


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="median of fewer than 5"):
        bench_step.run(["threshold"], repeats=3)
