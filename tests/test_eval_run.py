"""Whole runs: resuming after a kill, refusing to mix, error rows, and a second count of the work."""

from __future__ import annotations

import csv
import datetime
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dllm
from dllm.call import budget
from dllm.errors import DllmError
from dllm.eval import read, run
from dllm.eval.config import load
from dllm.eval.store import Store
from dllm.eval.worker import Batch, Worker

MODEL = str(Path(__file__).parent / "golden" / "checkpoints" / "tiny-llada-trained")


def config(**changes):
    base = {
        "name": "t",
        "tasks": ["word_problems"],
        "model": {"name": MODEL, "device": "cpu"},
        "generate": {"max_new_tokens": 8, "block_length": 4},
        "matrix": {"sampler": ["confidence", {"name": "threshold", "tau": 0.6}]},
        "limit": 6,
        "batch_size": 2,
        "warmup": 0,
    }
    return {**base, **changes}


def outcome(folder: Path) -> list[dict]:
    """The samples without what a clock had a part in, in the order of the work."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted(
        ({k: v for k, v in r.items() if k != "clock"} for r in rows),
        key=lambda r: (r["setting"], r["task"], r["index"]),
    )


def figures(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in c.items() if k != "clock"} for c in json.loads((folder / "results.json").read_text())["cells"]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, with everything a run folder holds."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    results = run(config(tasks=["word_problems", "sudoku"], trace=1), out=folder, progress=False)
    assert results.exit_code == 0
    return folder


def test_run_folder(whole):
    assert {p.name for p in whole.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "env.json", "samples.jsonl", "samples.csv", "results.json", "results.csv", "report.md",
        "plots", "trace",
    }  # fmt: skip
    env = json.loads((whole / "env.json").read_text())
    assert env["hardware"] and env["weights"][MODEL] and env["packages"]["torch"]
    assert datetime.datetime.fromisoformat(env["date"]).tzinfo and "commit" in env and env["command"]
    with open(whole / "samples.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["key"] for row in table} == {row["key"] for row in outcome(whole)} and len(table) == 24
    assert all(row["prompt"] and float(row["correct"]) in (0, 1) and row["clock.seconds"] for row in table)
    with open(whole / "results.csv", encoding="utf-8", newline="") as file:
        assert [(c["task"], c["n"]) for c in csv.DictReader(file)] == [
            (t, "6") for t in ("word_problems",) * 2 + ("sudoku",) * 2
        ]
    text = (whole / "report.md").read_text(encoding="utf-8")
    assert "## word_problems" in text and "| confidence |" in text and "left out of every figure" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (whole / line.split("(")[1].rstrip(")")).stat().st_size > 5000
    assert len(list((whole / "trace").iterdir())) == 4  # one document, two tasks, two settings
    results, rows, again = read(whole)
    assert (
        len(rows) == 24
        and len(results["cells"]) == 4
        and again.identity() == load(config(tasks=["word_problems", "sudoku"], trace=1)).identity()
    )


def test_a_run_is_the_same_for_a_seed(whole, tmp_path):
    run(config(tasks=["word_problems", "sudoku"], trace=1), out=tmp_path / "again", progress=False)
    assert outcome(tmp_path / "again") == outcome(whole)
    assert figures(tmp_path / "again") == figures(whole)


def test_keys_are_identities(whole, tmp_path):
    keys = {row["key"] for row in outcome(whole)}
    assert len(keys) == 24
    other = config(generate={"max_new_tokens": 8, "block_length": 4, "temperature": 0.5})
    run(other, ["seed=5"], out=tmp_path / "a", progress=False)
    run(other, ["seed=6"], out=tmp_path / "b", progress=False)
    other["generate"]["graphs"] = False  # how it runs decides nothing
    run(other, ["seed=5"], out=tmp_path / "c", progress=False)
    a, b, c = ({row["key"] for row in outcome(tmp_path / name)} for name in "abc")
    assert not a & b and not a & keys and a == c
    configs = [load(tmp_path / name / "config.yaml") for name in "ac"]
    assert configs[0].identity() == configs[1].identity() and configs[0].cells() == configs[1].cells()


RUN = """
import sys
import torch
from dllm.eval import run
torch.set_num_threads(1)
run(sys.argv[1], out=sys.argv[2], progress=False)
"""


def test_kill_and_resume(tmp_path):
    """Killed with -9 twice, once with the last line cut short as well: nothing lost, nothing twice, the same
    results."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config(limit=20)), encoding="utf-8")  # JSON is YAML
    folder = tmp_path / "killed"
    counts = []
    for kill in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(path), str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        before = count(folder)
        while count(folder) < before + 4 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(count(folder))
        if kill == 1:
            with open(folder / "samples.jsonl", "rb+") as file:
                file.truncate(file.seek(0, os.SEEK_END) - 40)
    assert 0 < counts[0] < 40, "the run was over before it was killed"
    run(path, out=folder, progress=False)
    run(path, out=tmp_path / "smooth", progress=False)
    assert outcome(folder) == outcome(tmp_path / "smooth")
    assert figures(folder) == figures(tmp_path / "smooth")
    assert len(outcome(folder)) == len({row["key"] for row in outcome(folder)}) == 40


def count(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_full_disk_and_resume(tmp_path):
    """The file may not grow past 2 kB: a clear line, no half sample, and the rest follows when there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DllmError, match="the samples so far are safe"):
            run(config(), out=tmp_path / "full", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    text = (tmp_path / "full" / "samples.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") and all(map(json.loads, text.splitlines())) and 0 < len(text) <= 2000
    run(config(), out=tmp_path / "full", progress=False)
    run(config(), out=tmp_path / "room", progress=False)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "room")


def test_a_changed_configuration_refuses_to_mix(whole):
    for change, name in (
        ({"seed": 1}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"generate": {"max_new_tokens": 8, "block_length": 2}}, "setting"),
        ({"tasks": [{"name": "word_problems", "seed": 1}]}, "task"),
    ):
        with pytest.raises(DllmError, match=rf"different configuration \(changed: {name}\)"):
            run(config(**change), out=whole, progress=False)


def test_more_documents_settings_and_tasks_go_on_in_the_same_folder(tmp_path, monkeypatch):
    """Each figure is that of the asked documents, what is there is not decoded again, nothing is counted twice."""
    honest, decoded = dllm.generate, []

    def counts(model, prompts, **arguments):
        decoded.extend(prompts)
        return honest(model, prompts, **arguments)

    monkeypatch.setattr(dllm, "generate", counts, raising=False)
    one = {"sampler": ["confidence"]}
    two = {"sampler": ["confidence", {"name": "threshold", "tau": 0.6}]}
    steps = [  # changes, documents decoded by them, cells
        ({"limit": 2, "matrix": one}, 2, 1),
        ({"limit": 6, "matrix": one}, 4, 1),
        ({"limit": 6, "matrix": two}, 6, 2),
        ({"limit": 6, "matrix": two, "tasks": ["word_problems", "sudoku"]}, 12, 4),
        ({"limit": 3, "matrix": one}, 0, 1),
        ({"limit": 6, "matrix": two, "tasks": ["word_problems", "sudoku"]}, 0, 4),
    ]
    for changes, new, cells in steps:
        decoded.clear()
        results = run(config(**changes), out=tmp_path / "grown", progress=False)
        assert len(decoded) == new and len(results.cells) == cells
        assert {c["n"] for c in results.cells} == {changes["limit"]}
        assert len(read(tmp_path / "grown")[1]) == cells * changes["limit"] == len(results.rows)
    run(config(**steps[-1][0]), out=tmp_path / "at-once", progress=False)
    assert outcome(tmp_path / "grown") == outcome(tmp_path / "at-once")
    assert figures(tmp_path / "grown") == figures(tmp_path / "at-once")


def test_traces_follow_their_samples_when_a_folder_grows(tmp_path):
    for sampler in (["margin"], ["confidence", "margin"]):
        results = run(config(matrix={"sampler": sampler}, trace=1, limit=1), out=tmp_path, progress=False)
        assert {row["key"] for row in results.rows} == {p.stem for p in (tmp_path / "trace").iterdir()}


def test_a_file_that_has_changed_is_not_mixed(tmp_path):
    data = tmp_path / "d.jsonl"
    one = config(tasks=[{"name": "jsonl", "path": str(data), "prompt": "{q}"}], matrix={"sampler": ["confidence"]})
    data.write_text('{"q": "a", "answer": "b"}\n{"q": "c", "answer": "d"}\n')
    run(one, out=tmp_path / "r", progress=False)
    data.write_text('{"q": "a", "answer": "b"}\n{"q": "c", "answer": "e"}\n')
    with pytest.raises(DllmError, match="holds another sample of jsonl, 'confidence', document 1"):
        run(one, out=tmp_path / "r", progress=False)


def test_a_row_is_the_same_in_batches_of_any_size_when_tokens_are_drawn(tmp_path):
    """Document i draws with the run's seed + i, wherever its batch begins."""
    drawn = {"max_new_tokens": 8, "block_length": 4, "temperature": 1.0}
    texts = {}
    for size in (1, 4, 6):
        run(config(generate=drawn, batch_size=size), out=tmp_path / str(size), progress=False)
        texts[size] = [(row["setting"], row["index"], row["text"], row["nfe"]) for row in outcome(tmp_path / str(size))]
    assert texts[1] == texts[4] == texts[6] and len({text for *_, text, _ in texts[1]}) > 6
    run(config(generate=drawn, seed=3, limit=3), out=tmp_path / "later", progress=False)  # document 0 draws as 3 does
    assert outcome(tmp_path / "later")[0]["text"] != texts[1][0][2]


def test_an_automatic_batch_decodes_what_memory_takes_and_changes_no_answer(tmp_path, monkeypatch):
    """As many rows at a time as an engine admits: here two canvases of 64 columns, the third waits."""
    monkeypatch.setattr(budget, "left", lambda device: int(2.5 * 64 / 0.15 * budget.forward_bytes(dllm.load(MODEL))))
    drawn = {"max_new_tokens": 8, "block_length": 4, "temperature": 1.0}
    for size in (1, "auto"):
        run(config(generate=drawn, batch_size=size), out=tmp_path / str(size), progress=False)
    one, several = (
        [(row["setting"], row["index"], row["text"], row["tokens"], row["nfe"]) for row in outcome(tmp_path / size)]
        for size in ("1", "auto")
    )
    assert one == several
    assert "batches of auto (2 to 2 rows at a time, as memory took them)" in (tmp_path / "auto/report.md").read_text()


def test_other_weights_are_other_samples(tmp_path):
    """The same folder name, task and arguments, but one weight differs: no key is shared, so nothing is reused."""
    model = dllm.load(MODEL, device="cpu")
    keys = []
    for name in ("one", "two"):
        model.save(tmp_path / "model")
        run(config(model=str(tmp_path / "model")), out=tmp_path / name, progress=False)
        keys.append({row["key"] for row in outcome(tmp_path / name)})
        next(model.transformer.parameters()).data.mul_(1.5)
    assert not keys[0] & keys[1]
    with pytest.raises(DllmError, match="other weights"):
        run(config(model=str(tmp_path / "model")), out=tmp_path / "one", progress=False)


def test_a_run_that_decoded_nothing_holds_nobody_to_its_configuration(tmp_path):
    with pytest.raises(DllmError, match="absent"):
        run(config(model="./absent"), out=tmp_path, progress=False)
    assert run(config(limit=1), out=tmp_path, progress=False).exit_code == 0


def test_one_run_at_a_time(tmp_path):
    store = Store(tmp_path, load(config()))
    with pytest.raises(DllmError, match="another run is writing"):
        Store(tmp_path, load(config()))
    store.close()
    Store(tmp_path, load(config())).close()


def test_samples_without_configuration_are_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(DllmError, match=r"no config\.yaml"):
        Store(tmp_path, load(config()))


def test_a_broken_line_in_the_middle_is_named(whole, tmp_path):
    for name in ("config.yaml", "samples.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    lines[2] = lines[2][:30]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DllmError, match=r"samples\.jsonl, line 3: not a sample"):
        Store(tmp_path, load(tmp_path / "config.yaml"))


@pytest.mark.parametrize("damage", [b"\x80\x00\xff", b"{", b"[1, 2]", b"{}", b"null", b"[" * 100_000])
@pytest.mark.parametrize("name", ["results.json", "env.json", "samples.jsonl", "config.yaml"])
def test_damaged_files_of_a_run_are_one_line(whole, tmp_path, name, damage):
    for part in ("config.yaml", "samples.jsonl", "results.json", "env.json"):
        (tmp_path / part).write_bytes((whole / part).read_bytes())
    (tmp_path / name).write_bytes(damage + b"\n")
    with pytest.raises(DllmError) as error:
        read(tmp_path)
        store = Store(tmp_path, load(whole / "config.yaml"))
        try:
            store.match_weights({"weights": {}})
            assert (name, damage) == ("env.json", b"{}")  # weights that nobody noted hold nobody to them
            raise DllmError("nothing to say")
        finally:
            store.close()
    assert "\n" not in str(error.value)


def test_it_imports_where_locks_and_limits_are_of_another_kind():
    """Windows has neither fcntl nor resource, and no process groups."""
    code = """
import os, sys
from types import SimpleNamespace as Some
for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None
for name in ("geteuid", "killpg"): delattr(os, name)
import dllm.cli.eval, dllm.eval.runner, dllm.eval.tuning, dllm.eval.comparison, dllm.eval.report
from dllm.eval.worker import memory
used = Some(memory_info=lambda: Some(rss=1, peak_wset=3 * 2**20))  # as there
sys.modules["psutil"] = Some(Process=lambda: used)
assert memory() == {"peak_mb": 3.0}
print("imported")
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "imported\n", found.stderr


def test_a_model_that_fails_on_one_prompt(tmp_path, monkeypatch, caplog):
    """An error row, the other rows of its batch are decoded, the exit code says so; --retry-errors mends it."""
    victim = Worker(load(config())).tasks[0].documents[3].prompt
    honest = dllm.generate

    def fails(model, prompts, **arguments):
        if victim in prompts:
            raise RuntimeError("the model does not like this one")
        return honest(model, prompts, **arguments)

    monkeypatch.setattr(dllm, "generate", fails, raising=False)
    with caplog.at_level(logging.ERROR):
        results = run(config(), out=tmp_path / "r", progress=False)
    bad = [row for row in outcome(tmp_path / "r") if row["error"]]
    assert [(row["index"], row["error"]) for row in bad] == [(3, "RuntimeError: the model does not like this one")] * 2
    assert (results.exit_code, results.errors, len(outcome(tmp_path / "r"))) == (3, 2, 12)
    assert "count as wrong" in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert run(config(), out=tmp_path / "r", progress=False).exit_code == 3  # finished is finished
    mended = run(config(), out=tmp_path / "r", progress=False, retry_errors=True)
    assert mended.exit_code == 0 and mended.cells[0]["n"] == 6


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_second_count_by_hooks_agrees_with_the_meter(cache):
    """Forward hooks on the network see every row and position that it was given; the meter must have said the same."""
    worker = Worker(load(config(cache=cache, tasks=["sudoku"])))
    model = worker.model(worker.config.settings[0].model)
    seen = {"calls": 0, "rows": 0, "positions": 0}

    def hook(module, args, kwargs, output):
        ids, pos = args[0], args[1] if len(args) > 1 else kwargs.get("pos")
        seen["calls"] += 1
        seen["rows"] += ids.shape[0]
        seen["positions"] += ids.numel() if pos is None else int((pos >= 0).sum())

    handle = model.transformer.register_forward_hook(hook, with_kwargs=True)
    try:
        for setting in range(2):
            seen.update(calls=0, rows=0, positions=0)
            rows = worker.all(Batch((setting,), 0, 0, 2)) + worker.all(Batch((setting,), 0, 2, 5))
            assert seen["rows"] == sum(row["nfe"] for row in rows) > 0
            lengths = [len(dllm.call.prompts.encode(model, d.prompt, None)) + 8 for d in worker.tasks[0].documents[:5]]
            assert seen["positions"] == round(sum(r["nfe_equiv"] * n for r, n in zip(rows, lengths, strict=True)))
            for row, length in zip(rows, lengths, strict=True):
                assert row["tokens"] <= row["tokens_raw"] <= 8 and row["nfe_equiv"] <= row["nfe"] + 1e-9, length
            alone = worker.all(Batch((setting,), 0, 4, 5))[0]
            assert (alone["nfe"], alone["text"]) == (rows[4]["nfe"], rows[4]["text"])
    finally:
        handle.remove()


def test_mistakes_are_found_before_any_decoding(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"tasks: [sudoku]\nmodel: {MODEL}\nmatrix:\n  sampler:\n    - confidence\n    - treshold\n", encoding="utf-8"
    )
    with pytest.raises(DllmError, match=r"c\.yaml, line 6: .*unknown sampler 'treshold'; did you mean 'threshold'"):
        run(path, out=tmp_path / "r", progress=False)
    for key, value, message in (
        ("generate", {"block_length": -4}, "generate.block_length: must be at least 1, found -4"),
        ("generate", {"lookahead": {"row": 2}}, r"generate\.lookahead: unknown parameter 'row' of lookahead"),
        (
            "tasks",
            [{"name": "sudoku", "generate": {"top_p": 3}}],
            r"generate\.top_p: must be in \(0, 1\], found 3",
        ),
        ("speculate", {"verifier": "tiny-ar", "options": {"serch": "cps"}}, "did you mean 'search'"),
        ("speculate", {"verifier": "tiny-ar", "options": {"length": "adll"}}, "did you mean 'adl'"),
    ):
        with pytest.raises(DllmError, match=message):
            run(config(**{key: value}), out=tmp_path / "r", progress=False)
    with pytest.raises(DllmError, match="cache: unknown cache 'duall'"):
        run(config(cache="duall"), out=tmp_path / "r", progress=False)
    with pytest.raises(DllmError, match=r"tasks\.0.*unknown task 'soduku'; did you mean 'sudoku'"):
        run(config(tasks=["soduku"]), out=tmp_path / "r", progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("stop", [None, "\n"])
def test_drafted_answers_are_counted_like_all_others(tmp_path, stop):
    """Every setting says the same; the end token and a stop string are no part of the answer, but were decoded."""
    drafting = {"verifier": "tiny-ar", "options": {"search": "argmax", "length": "fixed:k=8"}}
    sweep = [{"label": "plain", "speculate": {"verifier": "tiny-ar", "drafter": "none"}}, {"speculate": drafting}]
    changes = {"model": {"name": "tiny", "device": "cpu"}, "matrix": sweep, "limit": 3}
    generate = {"max_new_tokens": 64, **({"stop": [stop]} if stop else {})}
    results = run(config(**changes, generate=generate), out=tmp_path, progress=False)
    tokenizer, rows = dllm.load("tiny").tokenizer, outcome(tmp_path)
    for one, two in zip(rows[:3], rows[3:], strict=True):
        assert one["text"] == two["text"] and one["tokens"] == two["tokens"]
        plain = one if one["setting"] == "plain" else two
        if plain["finish"] == "stop":
            assert plain["nfe"] == plain["tokens_raw"] == plain["tokens"] + 1
            assert plain["tokens"] == len(tokenizer(plain["text"])["input_ids"])
    assert {row["finish"] for row in rows} >= {"stop"}
    assert set(json.loads((tmp_path / "env.json").read_text())["weights"]) == {"tiny", "tiny-ar"}
    assert set(results.aup["word_problems"]) == {"plain", "drafted: model argmax fixed"}


@pytest.mark.parametrize("spec", ["tiny-ar", {"verifier": "tiny-ar"}, {"verifier": {"name": "tiny-ar"}}])
def test_a_network_by_its_name_alone_is_that_name(spec):
    """However it is spelt: finished samples go by it."""
    (depends,) = load(config(model="tiny", matrix={"speculate": [spec]})).cells().values()
    assert depends["setting"]["speculate"] == {"verifier": "tiny-ar", "drafter": "model"}


def test_an_aligned_drafter_has_weights_of_its_own(tmp_path):
    """Other weights, or another separator, in the folder of the drafter are not mixed with the samples so far."""
    folder = tmp_path / "drafter"
    dllm.load("tiny", device="cpu").save(folder)
    spec = {"verifier": "tiny-ar", "drafter": str(folder)}
    changes = {"model": {"name": "tiny", "device": "cpu"}, "matrix": [{"speculate": spec}], "limit": 1}
    run(config(**changes), out=tmp_path / "run", progress=False)
    (folder / "drafter.json").write_text('{"suffix_token_id": 3}')
    with pytest.raises(DllmError, match="weights"):
        run(config(**changes), out=tmp_path / "run", progress=False)


def test_one_model_in_two_precisions(tmp_path):
    """Their weights have different marks and their settings are different curves."""
    model = [{"name": MODEL, "device": "cpu", "dtype": dtype} for dtype in ("float32", "float64")]
    sweep = {"model": model, "sampler": ["confidence"]}
    results = run(config(model="tiny", matrix=sweep, limit=1), out=tmp_path, progress=False)
    marks = json.loads((tmp_path / "env.json").read_text())["weights"]
    assert list(marks) == [f"{MODEL}(dtype={dtype})" for dtype in ("float32", "float64")]
    assert len(set(marks.values())) == len(results.aup["word_problems"]) == 2


def test_raw_counts_what_was_written_behind_the_stop(tmp_path):
    """One token a forward: as many positions as forwards, however early the answer ends."""
    changes = {"model": {"name": "tiny", "device": "cpu"}, "matrix": {"sampler": ["confidence"]}, "limit": 3}
    run(config(**changes, generate={"block_length": 16}), out=tmp_path, progress=False)
    rows = outcome(tmp_path)
    assert all(row["tokens_raw"] == row["nfe"] for row in rows)
    assert any(row["tokens_raw"] > row["tokens"] + 1 for row in rows)


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(DllmError, match="no evaluation run"):
        read(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(DllmError, match="has not finished"):
        read(tmp_path)
