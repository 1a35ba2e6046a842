"""The lookahead bench on a small trained model and a clock made by hand: what its rows say."""

from __future__ import annotations

from itertools import count

from golden_cases import model

from dllm.bench import lookahead as bench_lookahead


def test_rows() -> None:
    trained, timer = model("tiny-llada-trained", dtype="float32"), count(step=0.5).__next__
    call = {"caches": ["dual"], "problems": 1, "new": 12, "timer": timer}
    timed, flat = bench_lookahead.run(["confidence"], 1, model=trained, **call)
    assert (timed.name, timed.bound) == ("confidence, dual: seconds, auto / plain", 1.05)
    assert timed.value == 1.0  # every call took half a second
    assert "of 12 forwards, 1.00, 1.00, 1.00, 1.00, 1.00 of 0.50 s" in timed.note
    assert timed.note.endswith("1 of 1 answers equal")
    assert flat.met  # at least a quarter of the static schedule's forwards
