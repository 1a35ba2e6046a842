"""Decoding by graphs equals decoding without: golden decodes, rows alone and in batches, draws. With the stand-in of
`replay` on the CPU, and as CUDA graphs where there is a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden_cases import ARGUMENTS, cases, decode, groups, mismatch, model
from replay import standing_in

import dllm
from dllm.decoding.graphs import Graphs

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


@pytest.mark.parametrize(("checkpoint", "method"), [c for c in cases(*ARGUMENTS) if "trained" not in c[0]])
def test_golden_decodes(checkpoint: str, method: str, device: str) -> None:
    wrong = {}
    for group in groups(checkpoint, method):
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


def test_a_later_call_of_the_same_shapes_captures_nothing(device: str) -> None:
    m = model("tiny-llada-random", device=device)
    first, second = (dllm.generate(m, PROMPTS[:2], sampler="confidence", graphs=True, **CALL)[0] for _ in range(2))
    assert first.stats["graphs"]["captures"] > 0
    assert second.stats["graphs"]["captures"] == 0
    assert second.stats["graphs"]["replays"] == second.calls
    assert second.sequences == first.sequences


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
