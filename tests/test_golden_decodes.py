"""Golden decodes of the public codes: ids, forwards and commits, alone and as ragged batches.

The suite has every code: alone each setting with one of its prompts, as batches one setting with all of its prompts,
and on the trained checkpoint half of the codes. Which ones is drawn once for each file; the sweep has them all.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from golden_cases import ARGUMENTS, cases, decode, groups, mismatch
from sweeps import some

# rows alone on the random checkpoints; the trained one, whose answers are long, as batches only
ALONE = [c for c in cases(*ARGUMENTS) if "trained" not in c[0]]
BATCHES = cases(*ARGUMENTS)
TRAINED = [c for c in BATCHES if "trained" in c[0]]
SHORT = {*BATCHES} - {*random.Random(0).sample(TRAINED, len(TRAINED) // 2)}
Groups = list[list[dict[str, Any]]]


def drawn(checkpoint: str, method: str) -> random.Random:
    return random.Random(f"{checkpoint}/{method}")


def agree(checkpoint: str, method: str, chosen: Groups, batch_size: int) -> None:
    wrong = {}
    for group in chosen:
        for case, out in zip(group, decode(checkpoint, method, group, batch_size=batch_size), strict=True):
            if (difference := mismatch(case, out)) is not None:
                wrong[case["id"]] = difference
    assert not wrong


@pytest.mark.parametrize(("checkpoint", "method"), ALONE)
def test_alone(checkpoint: str, method: str) -> None:
    draw = drawn(checkpoint, method)
    agree(checkpoint, method, [[draw.choice(group)] for group in groups(checkpoint, method)], 1)


@pytest.mark.parametrize(("checkpoint", "method"), some(BATCHES, SHORT.__contains__))
def test_as_ragged_batches(checkpoint: str, method: str) -> None:
    agree(checkpoint, method, [drawn(checkpoint, method).choice(groups(checkpoint, method))], 3)


@pytest.mark.sweep
@pytest.mark.parametrize(("checkpoint", "method"), ALONE)
def test_all_alone(checkpoint: str, method: str) -> None:
    agree(checkpoint, method, [[case] for group in groups(checkpoint, method) for case in group], 1)


@pytest.mark.sweep
@pytest.mark.parametrize(("checkpoint", "method"), BATCHES)
def test_all_as_ragged_batches(checkpoint: str, method: str) -> None:
    agree(checkpoint, method, groups(checkpoint, method), 3)
