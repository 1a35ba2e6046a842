"""How products of parameters are dealt out between the suite and the sweeps."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from sweeps import dealt, some

AXES = [range(7), "abc", (True, False)]


def suite(cases: list[Any]) -> set[tuple[Any, ...]]:
    assert {mark.name for case in cases for mark in case.marks} <= {"sweep"}
    return {case.values for case in cases if not case.marks}


@pytest.mark.parametrize("ways", [1, 2])
def test_the_suite_has_each_choice_and_the_sweep_the_rest(ways: int) -> None:
    cases = dealt(*AXES, ways=ways)
    assert [case.values for case in cases] == list(product(*AXES))
    assert cases == dealt(*AXES, ways=ways)  # in every process
    for chosen in combinations(range(3), ways):
        assert {tuple(case[i] for i in chosen) for case in suite(cases)} == set(product(*(AXES[i] for i in chosen)))
    assert len(suite(cases)) == {1: 7, 2: 21}[ways]


def test_values_of_short_axes_take_turns() -> None:
    for axis in (1, 2):
        counts = [[case[axis] for case in suite(dealt(*AXES))].count(value) for value in AXES[axis]]
        assert max(counts) - min(counts) <= 1


def test_a_rule_names_the_cases_of_the_suite() -> None:
    assert suite(some(["a", "b"], "b".__eq__)) == {("b",)}
    assert suite(some(product("ab", [1, 2]), lambda case: case == ("a", 2))) == {("a", 2)}
