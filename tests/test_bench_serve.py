"""The bench of the server: every answer of a mixed load over HTTP is that of `generate` alone, and what is measured."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

import dllm
from dllm.bench import clients, serve
from dllm.bench.runtime import seconds
from dllm.errors import DllmError


@pytest.mark.parametrize("n", [24, pytest.param(300, marks=pytest.mark.sweep)])
def test_a_mixed_load_over_http_is_answered_as_each_request_is_alone(n: int) -> None:
    """Samplers, lengths, seeds, temperatures and caches at once, in float64; every ninth client goes away."""
    answered, gone = serve.identity(dllm.load("tiny", device="cpu", dtype="float64"), n)
    assert (answered, gone) == (n - n // 9, n // 9)


def test_another_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = serve.scripted(0.0)
    monkeypatch.setattr(serve.Ask, "alone", lambda ask, model: dllm.generate(model, "5", chat=False, **serve.CALL))
    with pytest.raises(DllmError, match="request 0 was answered otherwise than by itself"):
        serve.identity(model, 2)


def test_requests_are_measured_by_the_engine_and_over_http() -> None:
    model = serve.scripted(0.0)
    figures = {f.name: f for f in serve.run(1, requests=3, models={"m": model})}
    ratios = [f"m, {way}: {what}" for way in ("dllm.Engine", "HTTP") for what in (
        "throughput against generate at the same batch", "latency of one request against generate"
    )]  # fmt: skip
    assert [figures[name].bound for name in ratios] == [0.95, 1.1] * 2
    assert all(figures[name].value > 0 for name in ratios)
    assert [name for name in figures if "rows against" in name] == [
        f"m: tokens/s of {rows} rows against those of one" for rows in serve.SCALES
    ]
    assert sum("arrivals a second" in name for name in figures) == len(serve.RATES)
    assert all("first token" in f.note for name, f in figures.items() if "arrivals" in name or "one by one" in name)


def test_a_forward_takes_the_seconds_of_the_script() -> None:
    model = serve.scripted(0.03)
    assert seconds(lambda: dllm.generate(model, "5", max_new_tokens=2, steps=2, early_stop=False)) >= 0.06


def test_what_goes_wrong_over_http_is_said() -> None:
    asks = [ask.body for ask in serve.asks(2)]
    with serve.serving(serve.scripted(0.0)) as port, pytest.raises(DllmError, match=r"1 of 2 requests failed; .* 400"):
        clients.ask(port, [{**asks[0], "sampler": "klas"}, asks[1]])
