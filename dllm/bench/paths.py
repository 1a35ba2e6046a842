"""`dllm bench paths`: why searches over one pair head differ or tie, by the lattices of the verifier's own texts.

A greedy text is the verifier's own under every search, so its rounds can be replayed from the lattices behind each of
its prefixes: the greedy walk over the pairs, the exact maximum of the expected accepted length, and the longest prefix
of the text itself that the lattice holds, which no search can beat. Beside what each path brings stands what the pairs
say that it brings: the most by which a better search can be better, as far as the pairs are right. Nothing is verified,
which takes a minute where decoding takes an hour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dllm.bench.drafting import TASKS, held_out
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Need
from dllm.drafting.lattice import Lattice, build
from dllm.drafting.pair_head import PairHead, as_pair_head
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.search import EAL, Argmax, Edges
from dllm.errors import DllmError
from dllm.eval.metrics import paired_gain
from dllm.models.native import NativeModel
from dllm.training.answers import Style, continuations
from dllm.training.data import Pair

NEW, SLOTS, WIDTH, ROWS = 96, 12, 15, 128  # tokens a text, slots a draft, candidates a slot, texts a forward
PATHS = {"walk": Argmax(), "eal": EAL(lam=1.0)}


class Round(NamedTuple):
    """What a draft behind a prefix brings: tokens that stay, and how many the pairs expect, a path."""

    accepted: dict[str, int]
    expected: dict[str, float]


def look(lat: Lattice, anchor: int, follow: Sequence[int], eos: frozenset[int] = frozenset()) -> Round:
    """Both paths, and the longest that the lattice `held`, beside the tokens that follow the `anchor`."""
    edges = Edges(lat, [anchor], None, 1.0)
    paths = {name: search.find(edges, eos, None) for name, search in PATHS.items()}
    held = [t if any(t == token for token, _ in c) else -1 for t, c in zip(follow, lat.columns, strict=False)]
    accepted = {name: _common(path.tokens, follow) for name, path in paths.items()}
    return Round({**accepted, "held": _common(held, follow)}, {n: sum(p.survival()) for n, p in paths.items()})


def _common(path: Sequence[int], text: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, text, strict=False)) if a != b), min(len(path), len(text)))


def run(drafter: str, pair_head: str, *, n: int = 300) -> Iterator[Figure]:
    """Both searches over `n` held-out prompts a task. Errors: a drafter that is no dLLM."""
    source, head, verifier = as_drafter(drafter), as_pair_head(pair_head), as_verifier("tiny-ar")
    if head is None or not (isinstance(source, DiffusionDrafter) and isinstance(source.model, NativeModel)):
        raise DllmError(f"this bench compares paths over a pair head for a dLLM, tiny or a folder, not {drafter!r}")
    source.reset([], Need(verifier.vocab, verifier.eos, tokenizer=verifier.tokenizer))
    for task in TASKS:
        texts = continuations(verifier, held_out(source.model, task, n), Style(NEW))
        found: list[dict[str, list[Round]]] = []
        for text in tqdm(texts, task, unit="text", leave=False):
            found.append(replay(source, head, text, verifier.eos))
        yield from _figures(task, texts, found)


def replay(source: DiffusionDrafter, head: PairHead, text: Pair, eos: frozenset[int]) -> dict[str, list[Round]]:
    """The rounds of a text under each path."""
    prefixes = [[*text.prompt, *text.answer[:at]] for at in range(len(text.answer))]
    logits = torch.cat([source.columns(prefixes[i : i + ROWS], SLOTS) for i in range(0, len(prefixes), ROWS)])

    @cache
    def behind(at: int) -> Round:
        room = min(SLOTS, NEW - at - 1)
        lat = build(logits[at, :room], at, tau_mass=1.0, m_max=WIDTH, keep=eos)
        return look(head.over(lat, prefixes[at][-1]), prefixes[at][-1], text.answer[at:], eos)

    rounds: dict[str, list[Round]] = {}
    for name in (*PATHS, "held"):
        at, some = 0, rounds.setdefault(name, [])
        while at < len(text.answer):
            some.append(behind(at))
            at += some[-1].accepted[name] + 1
    return rounds


def _figures(task: str, texts: Sequence[Pair], found: Sequence[dict[str, list[Round]]]) -> Iterator[Figure]:
    counts = {
        name: np.array([(len(text.answer), len(rounds[name])) for text, rounds in zip(texts, found, strict=True)])
        for name in (*PATHS, "held")
    }
    for name, rows in counts.items():
        tokens, calls = rows.sum(0)
        yield Figure(f"{task}, {name}: tau", tokens / calls, note=f"{calls} rounds")
    value, low, high = paired_gain(counts["walk"], counts["eal"])
    yield Figure(f"{task}: tau of eal above the walk", value, note=f"{value:+.4f}, 95 %: {low:+.4f} to {high:+.4f}")
    rounds = [r for text in found for r in text["walk"]]  # both paths of the same drafts
    for kind in ("accepted", "expected"):
        walk, eal = (float(np.mean([getattr(r, kind)[name] for r in rounds])) for name in PATHS)
        yield Figure(
            f"{task}: {kind} of the same drafts, eal above the walk", eal - walk, note=f"{walk:.4f}, {eal:.4f}"
        )
