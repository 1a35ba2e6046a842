"""Golden decodes of the public codes: ids, forwards and commits, alone and as ragged batches."""

from __future__ import annotations

import pytest
from golden_cases import ARGUMENTS, cases, decode, groups, mismatch, read


# rows alone on the random checkpoints; the trained one, whose answers are long, as batches only
@pytest.mark.parametrize(("checkpoint", "method"), [c for c in cases(*ARGUMENTS) if "trained" not in c[0]])
def test_alone(checkpoint: str, method: str) -> None:
    wrong = {}
    for case in read(checkpoint, method):
        [out] = decode(checkpoint, method, [case])
        if (difference := mismatch(case, out)) is not None:
            wrong[case["id"]] = difference
    assert not wrong


@pytest.mark.parametrize(("checkpoint", "method"), cases(*ARGUMENTS))
def test_as_ragged_batches(checkpoint: str, method: str) -> None:
    wrong = {}
    for group in groups(checkpoint, method):
        for case, out in zip(group, decode(checkpoint, method, group, batch_size=3), strict=True):
            if (difference := mismatch(case, out)) is not None:
                wrong[case["id"]] = difference
    assert not wrong
