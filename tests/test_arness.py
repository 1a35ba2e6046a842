"""AR-ness of traces (arXiv 2506.20639): hand examples, and the column of a report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_eval_run import config

import dllm
from dllm.decoding.trace import Trace
from dllm.eval import run

MASK = 9


def trace(*forwards: list[int], prompt: int = 2) -> Trace:
    """Forwards that commit generated columns (0 is the first); a negative one, -1 - column, re-masks it."""
    commits = [[[prompt + (c if c >= 0 else -1 - c), 5 if c >= 0 else MASK] for c in columns] for columns in forwards]
    return Trace([1] * prompt, MASK, "x", commits=commits, final=[1] * prompt + [5] * 4)


@pytest.mark.parametrize(
    "forwards,by_k",
    [
        (([0], [1], [2], [3]), (1, 1, 1)),
        (([3], [2], [1], [0]), (1 / 4, 2 / 4, 3 / 4)),
        (([1], [0], [3], [2]), (2 / 4, 1, 1)),
        (([0, 1], [3], [2]), (3 / 4, 1, 1)),
        (([0, 1, 2, 3],), (1, 1, 1)),
        (([0, 2], [1, 3]), (3 / 4, 1, 1)),
        (([2, 3], [0, 1]), (2 / 4, 2 / 4, 1)),
        (([0], [1], [-1], [0], [2], [3]), (1, 1, 1)),  # column 0 again, when it is the leftmost mask again
        (([0], [1], [-1], [2], [0], [3]), (4 / 5, 1, 1)),
        (([0], [0], [1]), (1, 1, 1)),  # an edit is no commit
    ],
)
def test_global_arness_by_hand(forwards, by_k) -> None:
    assert [trace(*forwards).arness(k) for k in (1, 2, 3)] == pytest.approx(by_k)


@pytest.mark.parametrize(
    "forwards,by_k",
    [
        (([0], [1], [2], [3]), (1, 1)),
        (([3], [2], [1], [0]), (0, 0)),
        (([1], [2], [0], [3]), (1 / 3, 0)),
        (([2, 3], [0, 1]), (2 / 3, 0)),
        (([3], [0, 1, 2]), (2 / 3, 1 / 2)),
    ],
)
def test_local_arness_by_hand(forwards, by_k) -> None:
    assert [trace(*forwards).local_arness(k) for k in (1, 2)] == pytest.approx(by_k)


def test_only_the_answer_counts() -> None:
    late = trace([3], [0], [1], [2])
    assert late.arness() == 3 / 4 and late.arness(tokens=3) == 1
    assert trace().arness() is None and trace([0]).local_arness() is None and trace([3]).arness(tokens=2) is None


def test_arguments_of_a_trace_keep_their_order() -> None:
    assert Trace([1], MASK, "x", [], [], [], [], [], 1, "a prompt").prompt_text == "a prompt"


@given(st.permutations(range(6)), st.integers(1, 6))
def test_it_grows_with_k_to_one(order: list[int], k: int) -> None:
    made = trace(*([c] for c in order))
    assert made.arness(k) <= made.arness(k + 1) <= made.arness(6) == 1
    if made.arness(1) == 1:
        assert order == sorted(order) and made.local_arness(5) == 1


def test_left_to_right_has_one() -> None:
    """Blocks of one column leave no choice; the most confident first has one."""
    prompt = "Tom has 12 apples. He buys 7 more."
    plain, free = (
        dllm.generate(prompt=prompt, sampler="confidence", max_new_tokens=24, block_length=b, trace=True)
        for b in (1, 24)
    )
    assert plain.trace.arness() == plain.trace.local_arness(4) == 1
    assert free.trace.arness(tokens=len(free.tokens)) < 1


def test_a_report_has_the_column_where_orders_are_kept(tmp_path) -> None:
    kept = run(config(trace=2, limit=3), out=tmp_path / "kept", progress=False)
    rows = [row for row in kept.rows if row["index"] < 2]
    assert rows and all(0 < row["arness"] <= 1 for row in rows)
    assert all("arness" not in row for row in kept.rows if row["index"] == 2)
    cell = kept.cells[0]
    mine = [r["arness"] for r in rows if (r["task"], r["setting"]) == (cell["task"], cell["setting"])]
    assert cell["arness"] == pytest.approx(sum(mine) / len(mine))
    assert "AR-ness |" in (tmp_path / "kept" / "report.md").read_text(encoding="utf-8")
    run(config(trace=0, limit=3), out=tmp_path / "none", progress=False)
    assert "AR-ness |" not in (tmp_path / "none" / "report.md").read_text(encoding="utf-8")
