"""Which ids a drafter's head computes. Most of a vocabulary is hardly ever said, and the head of a small drafter is a
large part of its work: keep the ids that are most frequent in the verifier's own outputs (VocabTrim, arXiv 2506.22694;
FR-Spec, arXiv 2502.14856, counts a corpus). All others have the probability 0 in a draft, which every rule of
acceptance allows, so the text stays the verifier's own.

How many is a matter of coverage against latency: `sizes` weighs what is accepted against what a draft takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from dllm.errors import DllmError, first_line
from dllm.models.config import is_id

Keep: TypeAlias = "tuple[int, ...] | int"  # the verifier's ids, or how many of the first
KeepLike: TypeAlias = "int | str | Path | Sequence[int] | None"


class Size(NamedTuple):
    """What a head of n ids brings."""

    n: int
    coverage: float  # share of tokens that are among them
    seconds: float  # of a draft
    speedup: float  # that is to be expected against plain decoding


def as_keep(given: KeepLike) -> Keep | None:
    """The ids to keep: a list, a file of them as JSON, or a number of ids.

    A number takes the first ids, which a tokenizer of merges learned first: better than nothing known, and worse than
    counts. Errors: anything else.
    """
    if given is None:
        return None
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if isinstance(given, str | Path):
        path = Path(given)
        try:
            return _read(path, path.stat().st_mtime_ns)
        except OSError as error:
            raise DllmError(f"trim: cannot read {path}: {first_line(error)}; `dllm trim` writes such files") from None
    if is_id(given) and given > 0:
        return given
    return _ids(given, "trim")


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int) -> tuple[int, ...]:
    try:
        return _ids(json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise DllmError(f"{path} is no JSON list of ids: {first_line(error)}") from None


def _ids(given: object, where: str) -> tuple[int, ...]:
    if isinstance(given, list | tuple | range) and given and set(map(type, given)) == {int}:
        return tuple(given)
    raise DllmError(f"{where} is a number of ids, a list of ids or a JSON file of them, not {str(given)[:60]!r}")


def kept(keep: Keep, vocab: int, eos: Iterable[int]) -> frozenset[int]:
    """The ids themselves, of a verifier of `vocab` ids, and the end tokens with them: a draft must be able to reach the
    end. Mask and separator are only ever read, by the embedding, which stays whole. Errors: ids that there are not."""
    ids = frozenset(range(min(keep, vocab))) if isinstance(keep, int) else frozenset(keep)
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise DllmError(f"trim: ids to keep lie between 0 and {vocab - 1}, the verifier's vocabulary")
    return ids | {i for i in eos if i < vocab}


def ranked(texts: Iterable[Sequence[int]], vocab: int, always: Iterable[int] = ()) -> list[int]:
    """All ids of a vocabulary, those of `always` first, then the most frequent in the texts; of equals the lowest."""
    counts = _counts(texts, vocab)
    counts[[i for i in always if i < vocab]] = counts.sum() + 1
    found: list[int] = np.argsort(-counts, kind="stable").tolist()
    return found


def coverage(ranking: Sequence[int], texts: Iterable[Sequence[int]]) -> np.ndarray:
    """(V + 1,) the share of the texts' tokens that are among the first n of a ranking of all ids."""
    counts = _counts(texts, len(ranking))[np.asarray(ranking)]
    shares: np.ndarray = np.concatenate([[0.0], counts.cumsum() / max(1, counts.sum())])
    return shares


def _counts(texts: Iterable[Sequence[int]], vocab: int) -> np.ndarray:
    pieces = [np.asarray(text, dtype=np.int64) for text in texts]
    flat = np.concatenate([np.zeros(0, np.int64), *pieces])
    if len(flat) and not 0 <= flat.min() <= flat.max() < vocab:
        raise DllmError(f"the texts hold ids outside of the verifier's {vocab}: they are another tokenizer's")
    return np.bincount(flat, minlength=vocab)


def sizes(
    shares: np.ndarray, seconds: Mapping[int, float], k: int, acceptance: float, verify: float, plain: float
) -> list[Size]:
    """What drafts of k slots bring at every measured size.

    A token that is not kept cannot be accepted: a slot is, with the chance `acceptance` times coverage, so a round
    emits sum_i (a c)^i tokens for i = 0 .. k. seconds: of a draft, by size. verify, plain: of a verifier's forward over
    k + 1 tokens and over one.
    """
    found = []
    for n, draft in seconds.items():
        emitted = sum((acceptance * shares[min(n, len(shares) - 1)]) ** i for i in range(k + 1))
        found.append(Size(n, float(shares[min(n, len(shares) - 1)]), draft, float(emitted * plain / (draft + verify))))
    return found
