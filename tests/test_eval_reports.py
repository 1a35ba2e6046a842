"""Reports, comparisons, tuning: on made-up samples, so that every number is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dllm.cli import app
from dllm.decoding.trace import Trace
from dllm.errors import DllmError
from dllm.eval import compare, plots, tune
from dllm.eval.config import load, method
from dllm.eval.report import compact, report, table
from dllm.eval.results import Results, areas, results_of
from dllm.eval.store import Store
from dllm.eval.tasks import Task
from dllm.eval.tuning import TuneSpec, candidates, choose

PLAIN = {"name": "made-up", "tasks": ["sudoku"], "matrix": {"sampler": ["confidence", "threshold", "credit"]}}


def rows(setting: str, correct: list[float], tokens: int, nfe: int, **more) -> list[dict]:
    out = []
    for i, right in enumerate(correct):
        clock = {"seconds": 2.0, "share": 1.0, "prefill_seconds": 0.5, "decode_seconds": 1.5, "peak_mb": 7.0}
        row = {"key": f"{setting}{i}", "task": "sudoku", "setting": setting, "index": i, "doc": str(i), "text": "x"}
        counts = {"tokens": tokens, "tokens_raw": tokens + 2, "nfe": nfe, "nfe_equiv": nfe / 2, "finish": "stop"}
        out.append({**row, **counts, "target": f"t{i}", "correct": right, "error": None, "clock": clock, **more})
    return out


ALL = [
    *rows("confidence", [1, 1, 1, 1, 1, 1, 0, 0], 20, 20),
    *rows("threshold", [1, 1, 1, 1, 1, 1, 0, 0], 20, 10),
    *rows("credit", [1, 1, 0, 0, 0, 0, 0, 0], 20, 5),
]


def folder_of(folder: Path, samples: list[dict], **changes) -> Results:
    """A finished run folder around given samples."""
    config = load({**PLAIN, **changes})
    store = Store(folder, config)
    store.append(samples)
    tasks = [Task("sudoku", "1", (), lambda d, t: None)]
    results = results_of(config, samples, tasks, folder, {"weights": {"tiny": "abc"}, "packages": {}})
    (folder / "results.json").write_text(json.dumps(results.plain()))
    if changes.get("expected"):
        report(results)
    store.close()
    return results


def test_report_puts_published_figures_beside_ours(tmp_path):
    expected = [
        {"task": "sudoku", "setting": "threshold", "value": 70.0, "source": "a table"},
        {"task": "sudoku", "setting": "credit", "metric": "tpf", "value": 5.0},
        {"task": "sudoku", "setting": "credit", "metric": "tokens_per_second", "value": 10.0},
    ]
    results = folder_of(tmp_path, ALL, expected=expected, unknown=["the weather"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| sudoku | threshold | accuracy | 70.00 | 75.00 | +5.00 | a table |" in text
    assert "| sudoku | credit | tpf | 5.00 | 4.00 | -1.00 |" in text
    assert "| sudoku | credit | tokens_per_second | 10.00 | 20.00 | +10.00 |" in text
    assert "- the weather" in text
    assert "| threshold | 8/8 | +0.0 (+0.0 … +0.0) | 0 | 0 | 1.000 | 2.00× (2.00 … 2.00) | 0.50× |" in text
    assert "| credit | 8/8 | -50.0" in text and "| 4 | 0 | 0.125 | 4.00× " in text
    assert results.cell("sudoku", "threshold")["tpf"] == 2.0
    assert "## Overview" not in text  # of one task
    # all begin at the slowest, confidence; credit loses more than 5 points, so it has no area
    assert results.aup["sudoku"] == pytest.approx(
        {"confidence": 75.0, "threshold": 150.0, "credit": math.nan}, nan_ok=True
    )
    assert "| threshold | 150.0 |" in text and "| credit | – |" in text


def test_methods_name_curves():
    settings = load(
        {
            **PLAIN,
            "matrix": {
                "sampler": [{"name": "threshold", "tau": 0.8}, "adablock:tau=1+credit"],
                "cache": ["none", "dual"],
            },
        }
    )
    assert [method(s) for s in settings.settings][:2] == ["threshold", "threshold dual"]
    two = [
        {"task": "sudoku", "setting": s.label, "tpf": 1.0 + i, "accuracy": 0.5} for i, s in enumerate(settings.settings)
    ]
    assert len(areas(settings, two)["sudoku"]) == 4


def test_several_tasks_begin_with_an_overview(tmp_path):
    both = [*ALL, *({**row, "key": row["key"] + "w", "task": "word_problems", "correct": 1.0} for row in ALL)]
    config = load({**PLAIN, "tasks": ["sudoku", "word_problems"]})
    tasks = [Task(name, "1", (), lambda d, t: None) for name in ("sudoku", "word_problems")]
    store = Store(tmp_path, config)
    store.append(both)
    results = results_of(config, list(store.rows.values()), tasks, tmp_path, {})
    store.close()
    text = report(results, figures=False).read_text(encoding="utf-8")
    assert "| setting | sudoku | word_problems |" in text and "| credit | 25.0 · 4.00 | 100.0 · 4.00 |" in text


def test_tables_escape_bars():
    assert table(["a|b"], [["c|d"]]) == "| a\\|b |\n| --- |\n| c\\|d |"
    assert compact(["a", "b"], [["x", "–"], ["y", "–"]]) == table(["a"], [["x"], ["y"]])


def test_compare(tmp_path):
    folder_of(tmp_path / "a", ALL)
    worse = [{**r, "correct": 0.0} if r["setting"] == "threshold" and r["index"] < 3 else r for r in ALL]
    folder_of(tmp_path / "b", worse, seed=4)
    done = json.loads((tmp_path / "b" / "results.json").read_text())
    done["env"]["weights"]["tiny"] = "xyz"
    (tmp_path / "b" / "results.json").write_text(json.dumps(done))
    text = compare(tmp_path / "a", tmp_path / "b")
    assert "| seed | 0 | 4 |" in text and "| weights.tiny | abc | xyz |" in text
    line = next(line for line in text.splitlines() if line.startswith("| threshold"))
    assert "| 8 | 75.0 | 37.5 |" in line and "| 3 | 0 | 0.250 | 1.00×" in line
    assert "| 37.5 | 8/8 | -37.5" in line  # the texts are the same, the verdicts are not
    shell = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert shell.exit_code == 0 and "| seed | 0 | 4 |" in shell.stdout
    other = [{**r, "target": "?"} for r in ALL]
    folder_of(tmp_path / "c", other)
    with pytest.raises(DllmError, match="not the same data"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(DllmError, match="no evaluation run"):
        compare(tmp_path / "a", tmp_path)


def test_single_settings_are_compared_whatever_their_names(tmp_path):
    folder_of(tmp_path / "a", rows("confidence", [1, 0], 4, 4), matrix={"sampler": ["confidence"]})
    folder_of(tmp_path / "b", rows("threshold", [1, 1], 4, 2), matrix={"sampler": ["threshold"]})
    assert "| confidence → threshold | 2 | 50.0 | 100.0 | 2/2 | +50.0" in compare(tmp_path / "a", tmp_path / "b")


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    trace = Trace([1, 2], 9, "x", commits=[[[2, 5]], [[3, 6], [4, 7]]], final=[1, 2, 5, 6, 7, 9])
    assert plots.written(trace)[:3] == [1, 2, 2] and plots.written(trace)[3] != plots.written(trace)[3]
    assert plots.commit_order([("a", trace), ("b", trace)], tmp_path / "order.png", "t").stat().st_size > 5000
    assert plots.accepted({"a": [1, 2, 3], "b": [0]}, tmp_path / "accepted.png", "t").stat().st_size > 5000
    assert plots.accuracy_against_tpf([], {}, tmp_path / "none.png", "t") is None


def test_candidates_are_the_grid_or_an_even_sample_of_it():
    grid = TuneSpec(
        (
            {"name": "threshold", "tau": [0.6, 0.8]},
            [{"name": "adablock", "tau_delimiter": [0.3, 0.5]}, {"name": "credit"}],
        )
    )
    assert candidates(grid, 0) == [
        {"name": "threshold", "tau": 0.6},
        {"name": "threshold", "tau": 0.8},
        [{"name": "adablock", "tau_delimiter": 0.3}, {"name": "credit"}],
        [{"name": "adablock", "tau_delimiter": 0.5}, {"name": "credit"}],
    ]
    ranged = TuneSpec(({"name": "threshold", "tau": {"low": 0.5, "high": 0.9}},), trials=8)
    taus = [point["tau"] for point in candidates(ranged, 1)]
    assert len(taus) == 8 and taus == [p["tau"] for p in candidates(ranged, 1)]
    assert min(taus) < 0.6 and max(taus) > 0.8 and all(0.5 <= tau <= 0.9 for tau in taus)
    small = {"name": "credit", "alpha": [0.5, 0.65]}
    mixed = candidates(TuneSpec((*ranged.space, small), trials=8), 1)
    assert mixed[6:] == [{"name": "credit", "alpha": a} for a in (0.5, 0.65)] and len(mixed) == 8
    with pytest.raises(DllmError, match="a range is"):
        candidates(TuneSpec(({"name": "threshold", "tau": {"lo": 1}},)), 0)


@pytest.mark.parametrize(("loss", "choice"), [(1.0, "threshold"), (60.0, "credit")])
def test_the_choice_is_the_fastest_within_the_loss(tmp_path, loss, choice):
    matrix = [{"label": "baseline", "sampler": "confidence"}, {"sampler": "threshold"}, {"sampler": [["credit"]]}]
    samples = [{**r, "setting": {"confidence": "baseline"}.get(r["setting"], r["setting"])} for r in ALL]
    results = folder_of(tmp_path, samples, matrix=matrix)
    found = choose(results, TuneSpec((), loss=loss), {"name": "made-up", "tasks": ["sudoku"]})
    assert found.sampler in (choice, [choice])
    best = load(found.path)
    assert [s.sampler for s in best.settings] == [found.sampler] and "points" in best.about
    assert yaml.safe_load(found.path.read_text())["tasks"] == ["sudoku"]
    assert f"**{choice}**" in found.text


def test_tuning_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(DllmError, match="there is no `tune:`"):
        tune({"tasks": ["sudoku"]})
    with pytest.raises(DllmError, match="chooses the sampler"):
        tune({"tasks": ["sudoku"], "sampler": "credit", "tune": {"space": ["threshold"]}})
    with pytest.raises(DllmError, match="unknown key 'spaces'; did you mean 'space'"):
        tune({"tasks": ["sudoku"], "tune": {"spaces": []}})
    with pytest.raises(DllmError, match="for `dllm tune`"):
        load({"tasks": ["sudoku"], "tune": {}})


def test_command_line_mistakes(tmp_path):
    shell = CliRunner().invoke(app, ["eval", str(tmp_path / "none.yaml")])
    assert isinstance(shell.exception, DllmError) and "there is no configuration" in str(shell.exception)
    shell = CliRunner().invoke(app, ["eval", "--help"])
    assert shell.exit_code == 0 and "compare" in shell.stdout


def test_tune_counts_the_work_of_answers_only(tmp_path, monkeypatch):
    """A prompt that failed did no forwards: it is no work of the candidate's."""

    def measured(config, **options):
        cells = [
            {"task": "sudoku", "setting": "baseline", "n": 4, "errors": 0, "accuracy": 0.5, "tokens": 40, "nfe": 10.0},
            {"task": "sudoku", "setting": "credit", "n": 4, "errors": 2, "accuracy": 0.5, "tokens": 40, "nfe": 10.0},
        ]
        return Results(tmp_path, config, tuple(cells))

    monkeypatch.setattr("dllm.eval.tuning.run", measured)
    found = tune({"tasks": ["sudoku"], "tune": {"space": ["credit"]}})
    assert "credit" in str(found.sampler)
    assert found.tokens_per_forward == pytest.approx(2.0)  # 40 tokens in the 2 × 10 forwards that were made
