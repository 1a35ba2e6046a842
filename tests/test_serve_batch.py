"""`dllm run-batch`: a file of requests becomes a file of answers, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import dllm
from dllm.errors import DllmError
from dllm.serve.batch import Batch
from dllm.serve.config import ServeConfig
from dllm.serve.pair import Pair

TOM = "Tom has 12 apples. He buys 7 more. How many apples does he have?"
CONFIG = ServeConfig(max_rows=3, defaults={"max_new_tokens": 24, "block_length": 8, "sampler": "threshold"})


@cache
def embedded() -> Any:
    return dllm.load("tiny")


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(source: Path, target: Path, config: ServeConfig = CONFIG, **more: Any) -> tuple[int, int]:
    with dllm.Engine(embedded(), max_rows=config.max_rows) as engine:
        return Batch(source, target, config, "tiny").run(engine, **more)


def asked(name: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def content(row: dict[str, Any]) -> str:
    choice = row["response"]["body"]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_a_batch_waits_for_room_in_the_line(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"prompt": f"{i}", "max_tokens": 2} for i in range(12)])
    with dllm.Engine(embedded(), max_rows=2, max_queue=1) as engine:
        assert Batch(source, target, replace(CONFIG, max_rows=2, max_queue=1), "tiny").run(engine) == (12, 0)


def test_every_line_has_its_answer_or_its_error_in_its_place(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[tuple[Any, int]] = [
        (asked("a", messages=chat(TOM), model="tiny"), 200),
        (asked("b", "/v1/completions", prompt="Tom has", max_tokens=8), 200),
        ({"prompt": TOM, "temperature": 0.9}, 200),
        ({"prompt": TOM, "temperature": 0.9}, 200),
        ({"messages": chat(TOM), "custom_id": "e", "n": 2}, 200),
        ("{not json", 400),
        ("[1, 2]", 400),
        (asked("c", messages=chat(TOM), temprature=1), 400),
        (asked("d", "/v1/embeddings", input="x"), 400),
        (asked("f", messages=chat(TOM), stream=True), 400),
        (asked("g", messages=chat(TOM), model="gpt"), 404),
        ({"text": "?"}, 400),
        ("", 0),
        ({"prompt": "\ud800", "max_tokens": 4}, 400),
    ]
    write(source, [row for row, _ in rows])
    assert answer(source, target) == (5, 8)
    out = read(target)
    assert [row["response"]["status_code"] for row in out] == [status for _, status in rows if status]
    assert [row["custom_id"] for row in out] == ["a", "b", None, None, "e", None, None, *"cdfg", None, None]
    assert [row["error"] is None for row in out] == [row["response"]["status_code"] == 200 for row in out]
    assert "temperature" in out[7]["error"]["message"]  # the nearest field
    assert len({row["id"] for row in out}) == len(out)
    alone = dllm.generate(embedded(), TOM, **CONFIG.defaults)
    assert content(out[0]) == alone.text and len(out[4]["response"]["body"]["choices"]) == 2
    seeds = [row["response"]["body"]["choices"][0]["dllm"]["seed"] for row in out[2:4]]
    assert seeds[0] != seeds[1]  # the same request, twice: two draws, each what its seed gives
    for row, seed in zip(out[2:4], seeds, strict=True):
        assert content(row) == dllm.generate(embedded(), TOM, temperature=0.9, seed=seed, **CONFIG.defaults).text


def test_what_has_its_answer_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, started = tmp_path / "in.jsonl", tmp_path / "out.jsonl", list[str]()
    start = Batch._start
    monkeypatch.setattr(Batch, "_start", lambda self, line: (started.append(str(line.name)), start(self, line)))
    first, second, wrong = asked("1", messages=chat("Say 5.")), asked("2", messages=chat(TOM)), asked("3", messages=[])
    write(source, [first, wrong])
    assert answer(source, target) == (1, 1)
    kept = read(target)[0]
    write(source, [second, {**first, "custom_id": "one"}, wrong])  # one more, another order, another name
    assert answer(source, target) == (2, 1)
    assert started == ["1", "3", "2", "3"]  # what failed is tried again
    assert [row["custom_id"] for row in read(target)] == ["2", "one", "3"]
    assert read(target)[1] == {**kept, "custom_id": "one"}
    write(source, [second])
    with pytest.raises(DllmError, match="1 answers to requests that are not among these"):
        answer(source, target)
    assert len(read(target)) == 3
    assert answer(source, target, prune=True) == (1, 0)
    assert [row["custom_id"] for row in read(target)] == ["2"]
    with pytest.raises(DllmError, match="1 answers to requests"):  # other settings, other answers
        answer(source, target, ServeConfig(defaults={**CONFIG.defaults, "block_length": 4}))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path, kill: signal.Signals) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [asked(str(i), messages=chat(f"Tom has {i} apples. He buys {i % 7} more."), steps=24) for i in range(60)]
    write(source, rows)
    sets = [f"--set={key}={value}" for key, value in {"max_rows": 2, "defaults.max_new_tokens": 24}.items()]
    command = [sys.executable, "-m", "dllm", "run-batch", str(source), str(target), *sets]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while time.monotonic() < until and not (target.exists() and target.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(kill)
    process.communicate(timeout=300)
    assert process.returncode == (-kill if kill == signal.SIGKILL else 130)
    there = target.read_bytes()
    assert 2 < there.count(b"\n") < len(rows)
    target.write_bytes(there + b'{"id": "batch_req_cut sh')  # a kill in the middle of a line
    config = ServeConfig(max_rows=2, defaults={"max_new_tokens": 24})
    assert answer(source, target, config) == (len(rows), 0)
    assert [row["custom_id"] for row in read(target)] == [row["custom_id"] for row in rows]
    assert set(there.splitlines()) <= set(target.read_bytes().splitlines())  # none was answered twice


def test_a_verifier_and_its_drafter_answer_a_file(tmp_path: Path) -> None:
    """Each line is what `dllm.speculate` says alone; another drafter finds every answer there."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = {"prompt": ["12 + 7 =", "Ann has"], "max_tokens": 6, "stop": "19"}
    rows = [
        {"prompt": TOM, "max_tokens": 24},
        {"messages": chat("Say 5."), "max_tokens": 8, "temperature": 0.8, "seed": 3, "n": 2},
        {"prompt": TOM, "sampler": "klass"},
        asked("t", "/v1/completions", **text),
    ]
    write(source, rows)
    command = [sys.executable, "-m", "dllm", "run-batch", str(source), str(target), "--model", "tiny-ar", "--set"]
    done = subprocess.run([*command, "speculate=suffix"], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "3 answers and 1 errors" in done.stderr, done.stderr
    said = read(target)
    error = said[2]["response"]["body"]["error"]
    assert (error["param"], error["message"]) == (
        "sampler", "sampler is for a masked-diffusion model that writes the text"
    )  # fmt: skip
    verifier = dllm.load_verifier("tiny-ar")
    want = [
        [dllm.speculate(verifier, None, TOM, max_new_tokens=24)],
        [dllm.speculate(verifier, None, "Say 5.", max_new_tokens=8, temperature=0.8, seed=3 + i) for i in range(2)],
        [dllm.speculate(verifier, None, p, max_new_tokens=6, stop="19", chat=False) for p in text["prompt"]],
    ]
    choices = [row["response"]["body"]["choices"] for i, row in enumerate(said) if i != 2]
    got = [[c["message"]["content"] if "message" in c else c["text"] for c in some] for some in choices]
    assert got == [[one.text for one in some] for some in want]
    pair = Pair("tiny-ar", None)
    try:
        before = target.read_bytes().splitlines()
        assert Batch(source, target, ServeConfig(speculate="none"), "tiny-ar").run(pair) == (3, 1)
    finally:
        pair.close(drain=False)
    after = target.read_bytes().splitlines()
    assert [after[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(DllmError, match="cannot read"):
        Batch(source, target, CONFIG, "tiny")
    write(source, [{"prompt": TOM}])
    with pytest.raises(DllmError, match="holds the requests"):
        Batch(source, source, CONFIG, "tiny")
    write(target, ["what is this"])
    with pytest.raises(DllmError, match="line 1: no answer of a batch"):
        answer(source, target)
