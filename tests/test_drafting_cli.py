"""`dllm speculate` and `dllm align`: what is shown, and one line for a mistake."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from drafting_kit import plain

import dllm
from dllm.cli import main
from dllm.cli.speculate import CORRECTION, coloured
from dllm.drafting.registry import as_verifier
from dllm.tasks.registry import generate
from dllm.training.online import OnlineDrafter

torch.set_num_threads(1)
PROMPT = "Tom has 12 apples. He buys 7 more."


@pytest.fixture
def run(monkeypatch, capsys):
    def go(*args):
        monkeypatch.setattr(sys, "argv", ["dllm", *args])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return go


def test_options_reach_the_call(run):
    asked = ("--k", "2", "--verify", "block", "--ngrams", "verifier", "--length", "fixed:k=8")
    code, shown, error = run("speculate", PROMPT, "-n", "8", *asked)
    assert code == 0 and int(re.search(r"verify calls\s+(\d+)", shown)[1]) >= 3, error  # at most three tokens each
    code, _, error = run("speculate", PROMPT, "--verify", "blocks")
    assert code == 1 and "verify" in error and "'block'" in error
    code, _, error = run("speculate", PROMPT, "--ngrams", "texts")
    assert code == 1 and "ngrams" in error


@pytest.mark.parametrize("options", [[], ["--tree", "8", "--drafter", "suffix"], ["--drafter", "none", "--stop", "12"]])
def test_text_and_metrics_are_shown(run, options):
    code, shown, error = run("speculate", PROMPT, "-n", "12", "--compare", *options)
    v = as_verifier("tiny-ar")
    out = dllm.speculate(v, None, PROMPT, max_new_tokens=12, stop="12" if "--stop" in options else None)
    assert code == 0, error
    assert " ".join(out.text.split()) in " ".join(shown.split())
    for metric in ("tau (with bonus)", "accepted per round", "verify calls", "speed-up"):
        assert metric in shown
    assert [line.split()[-1] for line in shown.splitlines() if "equal to plain" in line] == ["yes"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search", "viterby"], "did you mean 'viterbi'"),
        (["--length", "fixed:q=3"], "unknown parameter 'q' of length controller 'fixed'"),
        (["--drafter", "sufix"], "unknown drafter 'sufix'; did you mean 'suffix'?"),
        (["--top-p", "2", "-t", "1"], "top_p"),
    ],
)
def test_mistakes_take_one_line(run, options, says):
    code, _, error = run("speculate", PROMPT, *options)
    assert code == 1 and says in error.strip().splitlines()[-1]


def test_a_drafter_learns_from_the_texts_and_goes_on_where_it_was(run, tmp_path, monkeypatch):
    folder = str(tmp_path / "online")
    asked = ("-n", "12", "--learn", folder, "--pace", "every=2", "--pace", "steps=1")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\nAnn has 3 pens.\n"))
    code, shown, error = run("speculate", "-", *asked)
    assert code == 0 and "1 texts, 0 updates" in shown and "2 texts, 1 updates" in shown, error

    finish = OnlineDrafter.finish

    def struck(self, ids):  # Ctrl-C while it writes
        os.kill(os.getpid(), signal.SIGINT)
        finish(self, ids)

    monkeypatch.setattr(OnlineDrafter, "finish", struck)
    monkeypatch.setattr("sys.stdin", io.StringIO("Bob has 2 books.\nAnn has 3 pens.\n"))
    code, shown, error = run("speculate", "-", *asked)
    assert code == 130 and "3 texts, 1 updates" in shown and "go on with the same command" in error
    assert OnlineDrafter.load(folder).traffic.texts == 3
    for more, says in (
        (["--drafter", "suffix"], "dLLM that drafts, which 'suffix' is not"),
        (["--drafter", "tiny-ar"], "began as 'tiny'"),
        (["--pace", "evry=2"], "did you mean 'every'"),
        (["--learn", str(tmp_path)], "not a folder of a drafter that learns"),
        (["--learn", str(tmp_path / "new"), "--drafter", "tiny-ar"], "no masked-diffusion model"),
    ):
        code, _, error = run("speculate", PROMPT, *asked[:4], *more)
        assert code == 1 and says in error.strip().splitlines()[-1]
    code, _, error = run("speculate", PROMPT, "--pace", "every=2")
    assert code == 1 and "give --learn FOLDER" in error


def test_signs_of_several_tokens_keep_their_colour():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: bytes(ids).decode(errors="replace"))
    text = "aé\N{DUCK}b"
    out = SimpleNamespace(prompt_length=2, sequences=[1, 2, *text.encode()], spans=[(2, 3), (4, 5)], text=text)
    shown = coloured(out, tokenizer)
    assert shown.plain == text
    assert [shown.plain[s.start : s.end] for s in shown.spans if s.style == CORRECTION] == ["é", "b"]


def test_align_trains_and_measures(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"kind: drafter\noutput: {tmp_path}/out\nlayers: 1\n"
        "tasks: {word_problems: 4}\nmax_new_tokens: 12\nbatch_size: 2\n"
        "stages: [{objective: continuation, steps: 1, lr: 1e-3}, {objective: refinement, steps: 1, lr: 1e-3}]\n"
        "block: 4\n"
    )
    code, shown, error = run("data", "make", str(recipe))
    assert code == 0 and re.search(r"answers\.jsonl  4 answers, \d+ tokens", shown), error
    code, shown, error = run("align", str(recipe), "--problems", "2")
    assert code == 0, error
    assert "before" in shown and "after" in shown
    drafter, v = dllm.load(str(tmp_path / "out" / "model")), as_verifier("tiny-ar")
    ids = list(v.tokenizer(PROMPT)["input_ids"])
    assert drafter.config.n_layers == 1
    assert dllm.speculate(v, drafter, ids, max_new_tokens=8).sequences == plain(v.model, ids, 8)
    code, _, error = run("align", str(recipe))
    assert code == 1 and "go on with --resume" in error
    code, again, error = run("align", str(recipe), "--problems", "2", "--resume")
    taus = [re.findall(r"after: tau [\d.]+", text) for text in (shown, again)]
    assert code == 0 and taus[0] == taus[1] != [], error  # nothing left to do but to measure
    (tmp_path / "out" / "model" / "drafter.json").write_text('{"sufix_token_id": 3}')
    code, _, error = run("speculate", PROMPT, "--drafter", str(tmp_path / "out" / "model"))
    assert code == 1 and "sufix_token_id" in error.strip().splitlines()[-1]
    assert run("align", str(tmp_path / "none.yaml"))[0] == 1


def test_align_measures_nothing_for_a_recipe_that_is_refused(run, tmp_path):
    measured = generate("word_problems", "train", 2, 0)[1].prompt
    (tmp_path / "m.json").write_text(json.dumps([measured]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"kind: drafter\noutput: {tmp_path}/out\ntasks: {{word_problems: 2}}\nholdout: {tmp_path}/m.json\n"
    )
    code, shown, error = run("align", str(recipe), "--problems", "2")
    assert code == 1 and "prompt 2 of tasks" in error and not shown and not (tmp_path / "out").exists()
