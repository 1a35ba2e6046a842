"""The drafting bench: what is counted and compared, on two problems a task."""

from __future__ import annotations

import pytest
import torch

from dllm.bench import batches
from dllm.bench.drafting import SETTINGS, held_out, run, tally, wall_row
from dllm.bench.retrieval import run as run_retrieval
from dllm.drafting.control import RoundStats
from dllm.drafting.request import SpecResult
from dllm.errors import DllmError

torch.set_num_threads(1)


def test_a_tally_counts_rounds_of_all_texts():
    rounds = [RoundStats(emitted=3, accepted=2, t_verify=3.0, t_search=1.0), RoundStats(emitted=1, t_verify=4.0)]
    outs = [SpecResult([1, 2, 3, 4], 0, rounds=rounds), SpecResult([5, 6], 0, rounds=rounds[:1])]
    found = tally(outs, [[1, 2, 3, 4], [5, 7]])
    assert found.tau == pytest.approx(7 / 3) and found.accepted == pytest.approx(4 / 3)
    assert (found.calls, found.tokens, found.divergent) == (3, 7, 1) and found.own == pytest.approx(2 / 12)


def test_the_embedded_pair_row_by_row():
    names = ["eal, fixed 12", "cps, fixed 12", "argmax, fixed 12", "suffix, fixed 12", "eal, cost"]
    rows = {row.name: row for row in run(names, repeats=1, n=2)}
    for task in ("word_problems", "functions"):
        tau = rows[f"{task}, eal, fixed 12: tau"]
        assert 1 <= tau.value <= 13 and tau.note.endswith(" 0 texts differ")
        assert rows[f"{task}: tau of eal to that of cps"].value == pytest.approx(
            tau.value / rows[f"{task}, cps, fixed 12: tau"].value
        )
        assert rows[f"{task}: tau of eal above the suffix automaton's"].value == pytest.approx(
            tau.value - rows[f"{task}, suffix, fixed 12: tau"].value
        )
        assert rows[f"{task}, eal, cost: wall-clock to plain"].bound == 1.0
        assert rows[f"{task}, eal, fixed 12: wall-clock to plain"].bound == 0.95
    assert len(rows) == 2 * (5 + 3 + 5)


def test_the_median_counts_and_names_are_checked():
    row = wall_row("x", [1.5, 0.5, 1.25], 0.95)
    assert row.value == 1.25 and row.met and row.note == "1.50 0.50 1.25"
    with pytest.raises(DllmError, match="did you mean 'eal, cost'"):
        next(run(["eal, cst"], n=2))
    assert SETTINGS["no drafter"] == {"drafter": None}


def test_held_out_prompts_are_test_problems():
    import dllm
    from dllm.tasks import registry as tasks

    model = dllm.load("tiny")
    wanted = [model.chat([{"role": "user", "content": e.prompt}]) for e in tasks.generate("functions", "test", 3, 1)]
    assert held_out(model, "functions", 3) == wanted


def test_batches_are_drafted_together_and_alone(monkeypatch):
    monkeypatch.setattr(batches, "TASKS", ("functions",))
    monkeypatch.setattr(batches, "ROWS", 2)
    monkeypatch.setattr(batches, "NEW", 4)
    rows = list(batches.run(repeats=1))
    assert [row.bound for row in rows] == [1.3, None, 1.3, None] and all(row.value > 0 for row in rows)


def test_stores_and_merged_trees_row_by_row(tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    rows = list(run_retrieval(out=file, n=2, tree=4, tasks=("functions",)))
    assert len(rows) == 3 * 2 + 2 * 2 and all(row.note.endswith("0 texts differ") for row in rows)
    assert {row.name.split(": ")[1] for row in rows} == {
        "tau, kept above forgetting", "tau above dLLM alone", "tau above recycle alone", "tau above stand alone"
    }  # fmt: skip
    monkeypatch.setattr("dllm.speculate", None)  # what is in the file is not decoded again
    assert list(run_retrieval(out=file, n=2, tree=4, tasks=("functions",))) == rows
    with pytest.raises(DllmError, match="the drafter of this bench is a dLLM"):
        next(run_retrieval(out=file, n=2, drafter="suffix"))
