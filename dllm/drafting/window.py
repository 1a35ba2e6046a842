"""What of a text a drafter reads: its end, its beginning, and earlier pieces that the end goes back to. So a draft
costs the same behind any prompt. The verifier reads everything, so the text stays its own.

What is read is put together and numbered anew: to the drafter it is one text, of a length that it knows, whose blocks
keep their bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dllm import spec
from dllm.spec import check, param

AUTO = "auto"
RECENT, LEAST, MOST = 32, 2, 8  # tokens that pieces are looked up by; of a run that agrees: too few, and no better


@dataclass(frozen=True)
class Window:
    """The last `tokens`, None for as many as `Readings` finds to cost little, the first `sinks`, and up to `recall`
    tokens in pieces of `chunk` that hold what followed the runs of the last 32 tokens elsewhere: retrieval that looks
    at ids alone, where RAPID (arXiv 2502.20330) embeds and SpecPC (arXiv 2506.08373) asks a drafter's attention."""

    tokens: int | None = param(512, "as much as the embedded dLLM has positions", low=1)
    sinks: int = param(0, "dLLMs were not seen to need them", low=0)
    recall: int = param(0, "pays where a text repeats its beginning", low=0)
    chunk: int = param(32, "two drafts of sixteen", low=1)

    def __post_init__(self) -> None:
        check(self, "window")

    def of(self, ids: Sequence[int], unit: int = 1, hop: int = 1) -> list[int]:
        """What is read of a text, in whole units but for its end, whose beginning moves by `hop`, a multiple of the
        unit: until then the tokens that are read stay where they are."""
        assert self.tokens is not None  # whoever measures says how many
        sinks = -(-self.sinks // unit) * unit
        start = max(0, len(ids) - self.tokens - sinks) // hop * hop + sinks
        if start <= sinks:
            return list(ids)
        size = -(-self.chunk // unit) * unit
        pieces = _recalled(ids[sinks:start], ids[-min(RECENT, self.tokens) :], self.recall // size, size)
        recalled = [token for piece in pieces for token in ids[sinks + piece * size : sinks + (piece + 1) * size]]
        return [*ids[:sinks], *recalled, *ids[start:]]


WindowLike: TypeAlias = int | str | Mapping[str, object] | Window | None


def as_window(given: WindowLike) -> Window | None:
    """A window of a number of tokens or "auto", "256:sinks=4,recall=128" or a mapping. Errors: anything else."""
    if given is None or isinstance(given, Window):
        return given
    if isinstance(given, str):
        name, _, options = spec.named(given, "window")
        given = {"tokens": name, **options}
    elif not isinstance(given, Mapping):
        given = {"tokens": given}
    given = {key: None if key == "tokens" and value == AUTO else value for key, value in given.items()}
    return Window(**spec.settings("window", Window, given))


def _recalled(older: Sequence[int], recent: Sequence[int], n: int, size: int) -> list[int]:
    """The `n` whole pieces of `size` older tokens that are most likely to say how the recent ones go on, in order.

    A run that ends at an older place and at a recent one says where the text's next token would stand. The place gets
    the length of the run over the distance from there to the end.
    """
    count = len(older) // size
    if not n or not count:
        return []
    text = np.asarray(older, dtype=np.int64)
    score, run = np.zeros(len(text) + len(recent) + 1), np.zeros(len(text) + 1, dtype=np.int64)
    for behind, token in zip(range(len(recent), 0, -1), recent, strict=True):
        run[1:] = np.where(text == token, run[:-1] + 1, 0)
        score[behind : behind + len(text)] += np.where(run[1:] >= LEAST, np.minimum(run[1:], MOST), 0) / behind
    wanted = np.stack([score[: count * size].reshape(count, size).max(1), np.zeros(count)])
    late = score[size // 2 : size // 2 + count * size].reshape(count, size)[:, : size - size // 2].max(1)
    wanted[1, 1:] = late[:-1]  # where the next token stands late in a piece, those that follow are in the next one
    value = wanted.max(0)
    best = np.argsort(-value[::-1], kind="stable")[:n]  # of equals the latest
    return sorted(count - 1 - int(i) for i in best if value[count - 1 - i] > 0)
