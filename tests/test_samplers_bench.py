"""The sampler bench on made-up answers: it resumes, chooses on validation, and refuses another model's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_kit import FAKE, Played

from dllm.bench import samplers as bench_samplers
from dllm.bench.answers import Answers, Frame, Series, problems
from dllm.bench.samplers import Line
from dllm.errors import DllmError


def halves(series: Series, index: int) -> tuple[bool, int]:
    """The first four problems are solved; `localleap` takes half the forwards of the others."""
    sampler = series.sampler
    return index < 4, (5 if sampler.startswith("localleap") else 10) + 40 * sampler.endswith("tau=0.7")


def compared(answers: Answers, name: str) -> list[Line]:
    return bench_samplers.compare(answers, [name], ["sudoku"], n=8, validation=4)


def test_resumes_and_chooses(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Played(path, halves)
    lines = compared(first, "localleap")
    plain, ours = lines  # threshold:tau=0.7 is as accurate, but slower
    assert (plain.score.setting, plain.published, plain.score.accuracy) == ("threshold", True, 0.5)
    assert (plain.score.nfe, plain.score.tokens_per_forward, plain.score.seconds) == (10.0, 2.0, 0.5)
    assert (plain.against.saved, plain.own) == (1.0, None)
    assert (ours.score.setting, ours.published) == ("localleap", True)
    assert (ours.score.nfe, ours.score.tokens_per_forward) == (5.0, 4.0)
    assert (str(ours.against), ours.against.verdict) == ("+0.0 [+0.0, +0.0]", "within 2 points")
    assert ours.against.saved == 2.0  # half the forwards
    assert bench_samplers.fastest(lines, composed=False) == ours.score
    assert bench_samplers.fastest(lines, composed=True) is None
    with path.open("a") as file:
        file.write('{"task": "sud')  # stopped while it wrote
    again = Played(path, halves)
    assert compared(again, "localleap") == lines
    assert not again.asked  # nothing was decoded twice
    kept = path.read_text().splitlines()
    path.write_text("\n".join([*kept[:-2], '{"task": "sud']))  # two answers and half a line are lost
    once, twice = Played(path, halves), None
    compared(once, "localleap")
    assert sum(count for _, count in once.asked) == 2
    twice = Played(path, halves)
    assert compared(twice, "localleap") == lines
    assert not twice.asked  # both were kept


def test_an_exit_is_compared_with_what_it_cuts_short(tmp_path: Path) -> None:
    def losing(series: Series, index: int) -> tuple[bool, int]:
        sampler = series.sampler
        return index < 4 and sampler != "prophet", {"confidence": 20, "prophet": 1}.get(sampler, 10)

    lines = compared(Played(tmp_path / "answers.jsonl", losing), "prophet")
    published, chosen = (line for line in lines if line.name == "prophet")
    assert published.score.setting == "prophet"  # which loses
    assert chosen.score.setting == "prophet:high=12,mid=10,low=8"
    assert published.own and chosen.own
    assert (published.own.saved, published.own.loss, published.own.verdict) == (20.0, 50.0, "loses")
    assert (chosen.own.saved, str(chosen.own), chosen.own.verdict) == (2.0, "+0.0 [+0.0, +0.0]", "within 2 points")


def test_the_report_has_a_row_a_line(tmp_path: Path) -> None:
    lines = compared(Played(tmp_path / "answers.jsonl", halves), "localleap")
    rows = [line.split(" | ") for line in bench_samplers.report(lines, 8, 4).splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[2:]] == ["published: `threshold`", "published: `localleap`"]
    assert {len(row) for row in rows} == {9}


def test_a_frame_has_answers_of_its_own(tmp_path: Path) -> None:
    path, whole = tmp_path / "answers.jsonl", Frame("dual", 64, 64)
    played = Played(path, lambda series, index: (True, 1 if series.frame == whole else 2))
    for frame, forwards in ((Frame(), 2.0), (whole, 1.0)):
        (line,) = bench_samplers.compare(played, ["threshold:tau=0.5"], ["sudoku"], 8, 4, frame)[1:]
        assert line.score.nfe == forwards and line.score.positions == 10 * forwards
    text = bench_samplers.report([line], 8, 4, whole)
    assert "New tokens: 64 (sudoku); blocks\nof 64, cache: dual." in text
    assert Played(path, halves).done == played.done  # written and read


def test_a_frame_reaches_the_call(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.jsonl", batch_size=2)
    series = [Series("sudoku", "test", "confidence", 2, Frame("dual", new, 8)) for new in (24, 32)]
    answers.want(series)
    found = [(answers.score(one).nfe, answers.score(one).positions) for one in series]
    prompts = [len(answers.model.chat([{"role": "user", "content": e.prompt}])) for e in problems("sudoku", "test", 2)]
    mean = sum(prompts) / 2  # three blocks until the answer of 19 tokens and its EOS are there, a refresh each
    assert found == [(24, 3 * (mean + new) + 21 * 8) for new in (24, 32)]


def test_two_processes_give_the_same_answers(tmp_path: Path) -> None:
    series = [Series("sudoku", "test", sampler, 3) for sampler in ("threshold", "localleap")]
    found = []
    for workers in (1, 2):
        kept = Answers(tmp_path / f"{workers}.jsonl", "tiny", batch_size=2, workers=workers)
        kept.want(series)
        kept.want(series)  # nothing is missing any more
        found.append([{**row, "clock": {}} for one in series for row in kept.samples(one)])
        assert len((tmp_path / f"{workers}.jsonl").read_text().splitlines()) == 1 + 6
    assert found[0] == found[1]
    with pytest.raises(DllmError, match="load the model themselves"):
        Answers(tmp_path / "1.jsonl", FAKE, workers=2)  # type: ignore[arg-type]


def test_another_models_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"model": "another", "cache": "default"}) + "\n")
    with pytest.raises(DllmError, match="answers of another model"):
        bench_samplers.run(FAKE, out=path)  # type: ignore[arg-type]
    path.write_text("a letter to a friend")
    with pytest.raises(DllmError, match="is no file of answers"):
        bench_samplers.run(FAKE, out=path)  # type: ignore[arg-type]
    assert path.read_text() == "a letter to a friend"
