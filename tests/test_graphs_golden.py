"""Decoding by graphs equals decoding without: golden decodes, rows alone and in batches, draws. With the stand-in of
`replay` on the CPU, and as CUDA graphs where there is a device."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import pytest
import torch
from golden_cases import ARGUMENTS, cases, decode, groups, mismatch, model
from replay import StandIn, standing_in
from scripted import tiny
from typer.testing import CliRunner

import dllm
from dllm.cli import app
from dllm.decoding import graphs
from dllm.decoding.constants import constant
from dllm.decoding.graphs import Graphs
from dllm.errors import DllmError
from dllm.models.native import NativeModel
from dllm.samplers import Bundle, Context, Method, Prediction, View
from dllm.samplers.threshold import Threshold

PROMPTS = [[5, 9, 30, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 5, "steps": 8, "early_stop": False}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
    else:
        with standing_in():
            yield "cpu"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("checkpoint", "method"), [c for c in cases(*ARGUMENTS) if "trained" not in c[0]])
def test_golden_decodes(checkpoint: str, method: str, whole: bool, device: str) -> None:
    """Three prompts with one of a file's settings; the sweep has them all."""
    wrong, settings = {}, groups(checkpoint, method)
    for group in settings if whole else [settings[-1][:3]]:
        out = decode(checkpoint, method, group, batch_size=3, device=device, graphs=True)
        wrong |= {case["id"]: differs for case, o in zip(group, out, strict=True) if (differs := mismatch(case, o))}
    assert not wrong


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": "threshold:tau=0.6"},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.7, "gumbel": True, "cfg_scale": 0.7},
    ],
)
def test_rows_alone_in_a_batch_and_without_graphs(arguments: dict[str, Any], cache: str, device: str) -> None:
    m, call = model("tiny-llada-random", device=device), {**CALL, **arguments, "cache": cache, "trace": True}
    plain = dllm.generate(m, PROMPTS, batch_size=2, seed=3, graphs=False, **call)
    together = dllm.generate(m, PROMPTS, batch_size=2, seed=3, graphs=True, **call)
    for i, prompt in enumerate(PROMPTS):
        alone = dllm.generate(m, prompt, seed=3 + i, graphs=True, **call)
        for out in (together[i], alone):
            assert (out.sequences, out.nfe, out.positions) == (plain[i].sequences, plain[i].nfe, plain[i].positions)
            assert out.trace.commits == plain[i].trace.commits


@pytest.mark.parametrize(
    "sampler", ["confidence", "threshold:tau=0.6", "prophet", "klass", "ccd", "pc", "adablock:delimiters=[3]"]
)
def test_later_calls_share_what_was_captured(sampler: str, device: str) -> None:
    m = model("tiny-llada-random", device=device)
    call = {**CALL, "sampler": sampler, "early_stop": True, "graphs": True}
    first, second = (dllm.generate(m, PROMPTS[:2], seed=seed, **call) for seed in range(2))
    assert first[0].stats["graphs"]["captures"] > 0
    counts = max((o.stats["graphs"] for o in second), key=lambda counts: counts["replays"])
    assert counts["captures"] == counts["eager"] == 0
    assert counts["replays"] == max(o.calls for o in second)
    assert [o.sequences for o in second] == [o.sequences for o in first]
    prompts = [[8, 9, 7], [5, 6]]
    other, want = (dllm.generate(m, prompts, **{**call, "graphs": on}) for on in (True, False))
    assert [o.sequences for o in other] == [o.sequences for o in want]


def test_ids_that_many_calls_suppress_stay_where_captures_read_them(device: str) -> None:
    m, call = model("tiny-llada-random", device=device), {**CALL, "suppress_tokens": [3], "graphs": True}
    want = [dllm.generate(m, PROMPTS[0], **call).sequences for _ in range(2)]
    for n in range(300):
        constant((n, n), m.device)
    assert [dllm.generate(m, PROMPTS[0], **call).sequences] == want[1:]


def test_a_selection_that_is_written_anew_is_captured_anew(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def made():\n    return lambda self, view, soft, score: chosen(view, soft)\n"
    m, call, found = model("tiny-llada-random", device=device), {**CALL, "sampler": "threshold", "graphs": True}, []
    for chosen in (lambda view, soft: view.live, lambda view, soft: view.live & False):  # all at once, one by one
        cell = {"chosen": chosen}
        exec(text, cell)
        monkeypatch.setattr(Threshold, "select", cell["made"]())
        found += [
            [dllm.generate(m, PROMPTS[0], **{**call, "graphs": on}).nfe for _ in range(3)] for on in (True, False)
        ]
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]


def test_streams_at_once_and_streams_left(device: str) -> None:
    m, call = model("tiny-llada-random", device=device), {**CALL, "sampler": "threshold:tau=0.6", "cache": "dual"}
    want = [dllm.generate(m, prompt, graphs=False, **call).sequences for prompt in PROMPTS[:2]]
    left = dllm.stream(m, PROMPTS[2], drafts=True, graphs=True, **call)
    next(left)
    for _ in range(2):
        both = [dllm.stream(m, prompt, drafts=True, graphs=True, **call) for prompt in PROMPTS[:2]]
        events = [e for pair in zip_longest(*both) for e in pair if e is not None]
        assert sorted(e.output.sequences for e in events if e.output) == sorted(want)
        left.close()  # its graphs come back in the middle of a decode


def test_a_model_is_freed_with_what_was_captured(device: str) -> None:
    m = tiny().to(device)
    dllm.generate(m, [1, 2, 3], graphs=True, sampler="threshold", cache="dual", eos=[], **CALL)
    dead = weakref.ref(m)
    del m
    gc.collect()
    assert dead() is None


def test_a_sampler_that_asks_the_device_decodes_and_is_named_once(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    m, call, select = model("tiny-llada-random", device=device), {**CALL, "sampler": "threshold"}, Threshold.select
    want = dllm.generate(m, PROMPTS, graphs=False, **call)

    def asks(self: Threshold, view: Any, soft: Any, score: Any) -> Any:
        return select(self, view, soft, score) if view.live.any() else view.live

    monkeypatch.setattr(Threshold, "select", asks)
    with caplog.at_level(logging.WARNING):
        out = dllm.generate(m, PROMPTS, graphs=True, **call)
    assert [o.sequences for o in out] == [o.sequences for o in want]
    assert out[0].stats["graphs"]["captures"] == 0
    [line] = [r.message for r in caplog.records]
    place = f"tests/test_graphs_golden.py:{asks.__code__.co_firstlineno + 1}"
    assert (
        line.startswith("sampler 'threshold' runs without CUDA graphs: it waits for the device at ") and place in line
    )


class Steps(NamedTuple):
    """One number more in every step: no static tensor has room for that."""

    table: torch.Tensor


class Grows(Method):
    name = "grows"

    def bundle(self, context: Context) -> Bundle:
        def select(view: View, soft: Prediction, score: torch.Tensor) -> torch.Tensor:
            old = view.memory[Steps].table
            view.memory[Steps] = Steps(torch.cat([old, old[:, :1]], 1))
            return score > soft.confidence * 0 - 1.5

        return Bundle(select=select, memory=lambda canvas: Steps(canvas.ids[:, :1]))


def test_a_shape_that_changes_in_mid_call(caplog: pytest.LogCaptureFixture) -> None:
    m, call = model("tiny-llada-random"), {**CALL, "sampler": Grows(), "batch_size": 2, "cache": "dual"}
    plain = dllm.generate(m, PROMPTS, **call)
    with standing_in():
        captured = dllm.generate(m, PROMPTS, graphs=True, **call)
    assert [(o.sequences, o.nfe, o.positions) for o in captured] == [(o.sequences, o.nfe, o.positions) for o in plain]
    said = "sampler 'grows' runs without CUDA graphs: a leaf of its state changes from [2, 1] to [2, 2]"
    assert [r.message for r in caplog.records].count(said) == 1


def test_a_sampler_that_edits_lengths_decodes_without_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    m, call = model("tiny-llada-random"), {**CALL, "sampler": "daedal", "early_stop": True}
    plain = dllm.generate(m, PROMPTS, **call)
    with standing_in():
        outs = [dllm.generate(m, PROMPTS, graphs=True, **call) for _ in range(2)]
    assert all([o.sequences for o in out] == [o.sequences for o in plain] for out in outs)
    line = "sampler 'daedal' runs without CUDA graphs: it edits the length of the canvas"
    assert [r.message for r in caplog.records].count(line) == 1


def test_memory_that_runs_out_while_capturing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(self: StandIn, work: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    m, call = model("tiny-llada-random"), {**CALL, "sampler": "threshold"}
    want = dllm.generate(m, PROMPTS, graphs=False, **call)
    monkeypatch.setattr(StandIn, "record", record)
    with standing_in(), caplog.at_level(logging.WARNING):
        out = dllm.generate(m, PROMPTS, graphs=True, **call)
    assert [o.sequences for o in out] == [o.sequences for o in want]
    assert {r.message for r in caplog.records} == {
        "sampler 'threshold' runs without CUDA graphs: memory ran out while capturing; a smaller batch_size leaves room"
    }


def test_a_call_that_runs_out_of_memory_frees_what_graphs_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    m = tiny()
    with standing_in():
        dllm.generate(m, [1, 2, 3], graphs=True, **CALL)
        assert m in graphs.IDLE
        monkeypatch.setattr(NativeModel, "forward", full)
        with pytest.raises(DllmError, match="out of memory"):
            dllm.generate(m, [1, 2, 3], graphs=False, **CALL)
        assert m not in graphs.IDLE


def test_graphs_on_a_cpu_are_an_error_of_one_line() -> None:
    line = "graphs=True: CUDA graphs need a CUDA device, and this model is on cpu; leave graphs= out"
    with pytest.raises(DllmError) as error:
        dllm.generate(model("tiny-llada-random"), [1], graphs=True)
    assert str(error.value) == line
    for option, code in (("--graphs", 1), ("--no-graphs", 0)):
        done = CliRunner().invoke(app, ["generate", "2 + 2 =", "-n", "2", "--device", "cpu", option])
        assert done.exit_code == code
        assert (str(done.exception) == line) == bool(code)


def test_how_a_call_runs_is_checked() -> None:
    with pytest.raises(DllmError, match="graphs=1 must be True or False"):
        dllm.generate(model("tiny-llada-random"), [1], graphs=1)  # type: ignore[arg-type]


@pytest.mark.gpu
@GPU
def test_a_replay_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Graphs.run

    def strict(self: Graphs, key: Any, work: Any, name: str = "") -> Any:
        if self.captured(key) is None:
            return run(self, key, work, name)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, key, work, name)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Graphs, "run", strict)
    for cache in ("none", "dual"):
        dllm.generate(model("tiny-llada-random", device="cuda"), PROMPTS, cache=cache, graphs=True, **CALL)
