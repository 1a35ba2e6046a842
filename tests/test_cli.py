"""The command line: light start, JSON, exit codes, one line for a mistake, a picture of a trace."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from golden_cases import GOLDEN

from dllm.cli import main

Dllm = Callable[..., "Shown"]

PROBLEM = "Mia has 38 coins. Half of the coins break. Mia finds 1 coins. How many coins does Mia have?<sep>"
TRAINED = str(GOLDEN / "checkpoints" / "tiny-llada-trained")


class Shown(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def dllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Runs the console script in this process: (arguments, standard input) -> exit code and what was printed."""

    def run(*args: str, stdin: str = "") -> Shown:
        monkeypatch.setattr(sys, "argv", ["dllm", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Shown(code, *capsys.readouterr())

    return run


def test_neither_the_package_nor_the_help_imports_torch() -> None:
    code = "import sys, dllm, dllm.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_and_version(dllm: Dllm) -> None:
    shown = dllm("--help")
    assert shown.returncode == 0
    for command in ("generate", "chat", "trace", "samplers", "bench", "eval", "speculate", "train", "filter"):
        assert command in shown.stdout
    assert dllm("--version").stdout.strip()


def test_generate_prints_json_and_writes_a_trace(dllm: Dllm, tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    shown = dllm(
        "generate", "12+30=", "-m", TRAINED, "-n", "8", "-s", "threshold:tau=0.8", "--json", "--trace", str(run)
    )
    assert shown.returncode == 0, shown.stderr
    row = json.loads(shown.stdout)
    assert row["sampler"] == "threshold:tau=0.8"
    assert row["nfe"] > 0
    page, picture = tmp_path / "run.html", tmp_path / "run.svg"
    assert dllm("trace", str(run), str(page)).returncode == 0
    assert dllm("trace", str(run), str(picture)).returncode == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "<svg" in picture.read_text()
    assert "forwards" in dllm("trace", str(run)).stdout


def test_standard_output_holds_the_answer_alone(dllm: Dllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "8")
    given = ("generate", PROBLEM, "-m", TRAINED, "-n", "16", "--no-early-stop")
    expected = json.loads(dllm(*given, "--json").stdout)["text"]
    shown = dllm(*given)
    assert len(expected) > 8
    assert shown.stdout == expected + "\n"
    assert "forwards" in shown.stderr


def test_watch_prints_plain_lines_without_a_terminal(dllm: Dllm) -> None:
    shown = dllm("generate", "-", "-m", TRAINED, "-n", "6", "--watch", "--no-early-stop", stdin="12+30=\n")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [str(i) for i in range(1, 7)]
    assert "\x1b" not in shown.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "-m", TRAINED, "-s", "thresold"], "did you mean 'threshold'"),
        (["generate", "x", "-m", "no/such/folder"], "no/such/folder"),
        (["generate", "x", "-m", TRAINED, "--top-p", "2"], "top_p=2.0"),
        (["trace", "missing.json"], "cannot read the trace"),
        (["generate", "x", "-m", TRAINED, "-n", "1", "--trace", "no/folder/run.json", "--json"], "no/folder/run.json"),
        (["bench", "nothing"], "unknown bench"),
        (["bench", "step", "--block-length", "8"], "--block-length belongs to the bench 'samplers', not to 'step'"),
        (["bench", "samplers", "--new", "8", "--new", "9"], "run it for each"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(dllm: Dllm, args: list[str], message: str) -> None:
    shown = dllm(*args)
    assert shown.returncode == 1
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


def test_usage_errors_exit_with_2(dllm: Dllm) -> None:
    assert dllm("generate", "--no-such-option").returncode == 2


def test_chat_answers_until_the_end_of_input(dllm: Dllm) -> None:
    shown = dllm("chat", "-n", "24", "--stop", "####", stdin=f"{PROBLEM[:-5]}\n/help\n/clear\n/quit\n")
    assert shown.returncode == 0, shown.stderr
    assert "forwards" in shown.stdout
    assert "####" not in shown.stdout
    assert "interrupt an answer" in shown.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-s", "thresold"], "did you mean 'threshold'"),
        (["--top-p", "2"], "top_p=2.0"),
        (["-m", TRAINED], "no chat template"),
    ],
)
def test_chat_says_a_mistake_before_the_first_message(dllm: Dllm, args: list[str], message: str) -> None:
    shown = dllm("chat", *args, stdin="hello\n")
    assert (shown.returncode, message in shown.stderr) == (1, True), shown
    assert not shown.stdout


@pytest.mark.parametrize("args", [["\udcff"], ["x", "--stop", "\udcff"]])
def test_bytes_that_are_no_text_are_one_line(dllm: Dllm, args: list[str]) -> None:
    shown = dllm("generate", "-m", TRAINED, *args)
    assert shown.returncode == 1
    assert "undecodable byte" in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


def test_any_console_and_any_bytes(tmp_path: Path) -> None:
    """A console without the signs of --watch, standard input that is no text, and the package run as a module."""
    command = [sys.executable, "-m", "dllm", "generate", "-", "-m", TRAINED, "-n", "4", "--watch"]
    run = {"capture_output": True, "env": {**os.environ, "PYTHONIOENCODING": "cp1252:strict"}}
    shown = subprocess.run(command, check=False, input=b"12+30=\n", **run)
    assert shown.returncode == 0, shown.stderr
    assert b"_" in shown.stdout
    run["env"] = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    refused = subprocess.run(command, check=False, input=b"\xff", **run)
    assert refused.returncode == 1
    assert b"standard input is no utf-8 text" in refused.stderr
    assert b"Traceback" not in refused.stderr


def test_a_picture_of_a_short_run_fits_its_frame(dllm: Dllm, tmp_path: Path) -> None:
    run, picture = tmp_path / "run.json", tmp_path / "run.svg"
    assert dllm("generate", PROBLEM, "-n", "32", "-s", "prophet", "--trace", str(run)).returncode == 0
    assert dllm("trace", str(run), str(picture)).returncode == 0
    svg = picture.read_text()
    frame = float(re.search(r'viewBox="0 0 ([0-9.]+)', svg)[1])
    ends = [float(x) + float(w) for x, w in re.findall(r'<text[^>]* x="([0-9.]+)"[^>]* textLength="([0-9.]+)"', svg)]
    assert ends
    assert max(ends) < frame
    assert len(re.findall("&lt;\\|eos\\|&gt;|&lt;", svg)) > 10  # every commit of the one forward is in the picture


def test_generate_shows_log_probabilities(dllm: Dllm) -> None:
    given = ("generate", "12+30=", "-m", TRAINED, "-n", "4", "--logprobs", "2")
    row = json.loads(dllm(*given, "--json").stdout)
    assert len(row["logprobs"]) == len(row["tokens"])
    first = row["logprobs"][0]
    assert first["top"][0] == [row["tokens"][0], first["logprob"]]
    shown = dllm(*given)
    assert shown.stdout == row["text"] + "\n"
    assert f"{first['logprob']:.4f}" in shown.stderr


def test_read_shows_labels_and_their_probabilities(dllm: Dllm) -> None:
    given = ("read", PROBLEM, "--template", "Tom has {a} + 7 = {b} apples.", "--slot", "a=12,13", "--slot", "b=19,20")
    row = json.loads(dllm(*given, "--json").stdout)
    assert sum(row["slots"]["b"]["p"].values()) == pytest.approx(1)
    shown = dllm(*given)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].startswith("a (mass ")
    assert dllm("read", "x", "--template", "{a}", "--slot", "a").stderr.startswith("dllm: --slot 'a' must be NAME=")
