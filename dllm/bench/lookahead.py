"""`dllm bench lookahead`: forwards and seconds of samplers with 2, 4 (in both forms), 8 and `auto` rows beside the
plain call.

The embedded model decodes test problems one by one, all settings in turn, so that each sees the same machine. The
seconds of a setting are the sum over the problems of its median over the repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from tqdm import tqdm

import dllm
from dllm.bench.runtime import Figure, Timer
from dllm.call.arguments import LookaheadSpec
from dllm.call.prompts import One
from dllm.eval.records import Decoding
from dllm.models.arguments import Checkpoint
from dllm.models.model import Model
from dllm.tasks import registry as tasks

SAMPLERS = (
    "confidence", "entropy", "threshold", "factor", "eb", "localleap", "klass", "credit", "adablock", "wino",
    "learn2pd",
)  # fmt: skip
CACHES = ("none", "dual")
Setting = int | str | None  # a lookahead; None: the plain call, one row a forward
SETTINGS: tuple[Setting, ...] = (None, 2, "4:form=memo", "4:form=chain", 8, "auto")
# a recorded table in which rows cost nothing, as on a wide machine
FREE: LookaheadSpec = {"rows": "auto", "costs": {1: 1.0, 8: 1.0}}
PROBLEMS, NEW = 3, 64


def run(
    names: Sequence[str] | None = None,
    repeats: int = 5,
    *,
    model: Model | str | Checkpoint = "tiny",
    caches: Sequence[str] = CACHES,
    problems: int = PROBLEMS,
    new: int = NEW,
    timer: Timer = time.perf_counter,
) -> list[Figure]:
    """`auto` against the plain call in seconds for each sampler and cache, with all settings in the note.

    The last row is what `auto` saves of the static schedule's forwards where the recorded costs are flat.
    """
    model = dllm.load(model) if isinstance(model, str | Checkpoint) else model
    prompts = [e.prompt for e in tasks.generate("word_problems", "test", problems)]
    cells = [(name, cache) for name in names or SAMPLERS for cache in caches]
    rows = [
        measured(model, prompts, repeats, {"max_new_tokens": new, "sampler": name, "cache": cache}, timer)
        for name, cache in tqdm(cells, "lookahead")
    ]
    plain, free = (
        [dllm.generate(model, p, lookahead=s, max_new_tokens=new, sampler="confidence", cache="none") for p in prompts]
        for s in (None, FREE)
    )
    saved = 1 - sum(o.nfe for o in free) / sum(o.nfe for o in plain)
    counts = [cast("dict[str, int]", o.stats) for o in free]
    wide = sum(count["rows"] for count in counts) / sum(count["forwards"] for count in counts)
    return [
        *rows,
        Figure("confidence, flat costs: forwards that auto saves", saved, 0.25, True, f"{wide:.1f} rows a forward"),
    ]


class Race(NamedTuple):
    """What each setting took for all prompts."""

    seconds: dict[Setting, float]
    forwards: dict[Setting, int]
    equal: int  # prompts whose answers are the same under all settings

    def shares(self, taken: Mapping[Setting, float]) -> str:
        """What the settings took, as shares of what the plain call did."""
        return ", ".join(f"{taken[s] / taken[None]:.2f}" for s in taken if s is not None)


def measured(model: Model, prompts: Sequence[str], repeats: int, call: Decoding, timer: Timer) -> Figure:
    """One sampler under one cache; answers that differ are counted."""
    found = race(model, prompts, repeats, call, SETTINGS, timer)
    total = found.seconds
    note = (
        f"R = {', '.join(map(str, SETTINGS[1:]))}: {found.shares(found.forwards)} of {found.forwards[None]} forwards, "
        f"{found.shares(total)} of {total[None]:.2f} s; {found.equal} of {len(prompts)} answers equal"
    )
    return Figure(
        f"{call['sampler']}, {call['cache']}: seconds, auto / plain", total["auto"] / total[None], 1.05, note=note
    )


def race(
    model: Model,
    prompts: Sequence[One],
    repeats: int,
    call: Decoding,
    settings: Sequence[Setting],
    timer: Timer = time.perf_counter,
) -> Race:
    """Every prompt under every setting, in turns. A first pass warms up and lets `auto` learn."""
    seconds: dict[Setting, list[list[float]]] = {s: [[] for _ in prompts] for s in settings}
    forwards, equal = dict.fromkeys(settings, 0), 0
    for turn in range(repeats + 1):
        for i, prompt in enumerate(prompts):
            answers = {}
            first = turn % len(settings)  # no setting always follows the same one
            for setting in (*settings[first:], *settings[:first]):
                began = timer()
                answers[setting] = dllm.generate(model, prompt, lookahead=setting, **call)
                if turn:
                    seconds[setting][i].append(timer() - began)
            if turn == repeats:
                equal += all(a.tokens == answers[None].tokens for a in answers.values())
                forwards = {s: forwards[s] + answers[s].nfe for s in settings}
    return Race({s: sum(statistics.median(t) for t in times) for s, times in seconds.items()}, forwards, equal)
