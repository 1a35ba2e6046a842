"""The lookahead bench on a small random model: what its rows say."""

from __future__ import annotations

from golden_cases import model

from dllm.bench import lookahead as bench_lookahead


def test_rows() -> None:
    trained = model("tiny-llada-trained", dtype="float32")
    timed, flat = bench_lookahead.run(["confidence"], 1, model=trained, caches=["dual"], problems=1, new=12)
    assert timed.name == "confidence, dual: seconds, auto / plain"
    assert timed.bound == 1.05
    assert "of 12 forwards" in timed.note
    assert "1 of 1 answers equal" in timed.note
    assert flat.met  # at least a quarter of the static schedule's forwards
