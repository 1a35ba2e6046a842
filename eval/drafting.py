"""How drafting did, by category: speed against plain decoding and acceptance with intervals, and whether every answer
is the plain one.

Figures are ratios of sums; their intervals are bootstraps over documents, paired where two settings are compared. An
answer that leaves the plain one is looked into: the verifier's two best logits at the first other token tell a tie of
floats, where the order of additions decides, from a text that is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dllm.eval import metrics
from dllm.eval.config import Config, Setting
from dllm.eval.records import Differs, Drafting, Interval, Sample
from dllm.eval.tasks.base import Task
from dllm.eval.worker import Worker, arguments

NONE: Interval = (math.nan, math.nan, math.nan)


def plain_settings(config: Config, setting: Setting) -> list[Setting]:
    """The settings in which nobody drafts for the same verifier."""
    if setting.speculate is None:
        return []
    others = [s for s in config.settings if s.speculate and s.speculate.verifier == setting.speculate.verifier]
    return [s for s in others if s.speculate and s.speculate.plain]


def compared(config: Config, rows: Sequence[Sample], worker: Worker, tasks: Sequence[Task]) -> list[Sample]:
    """The samples, those of greedy drafting runs with where they leave the answer of the first plain setting."""
    out = []
    have = {(row["task"], row["setting"], row["doc"]): row for row in rows}
    settings = {s.label: s for s in config.settings}
    defaults = {spec.title: (spec, task.generate.given()) for spec, task in zip(config.tasks, tasks, strict=True)}
    for row in rows:
        setting = settings[row["setting"]]
        first = next(iter(plain_settings(config, setting)), setting)
        theirs = have.get((row["task"], first.label, row["doc"]))
        decoding = arguments(setting, *defaults[row["task"]])
        usable = theirs is not None and not (row.get("error") or theirs.get("error") or decoding.get("temperature"))
        if theirs is None or not usable or setting.speculate is None:
            out.append(row)
            continue
        left, place = parting(theirs, row), None
        if left is not None:
            gap, tie = worker.gap(setting.speculate, decoding, theirs, *left)
            place = Differs(turn=left[0], at=left[1], gap=gap, tie=tie)
        out.append({**row, "differs": place})
    return out


def parting(a: Sample, b: Sample) -> tuple[int, int] | None:
    """The turn and the token at which two answers part; None where they are equal."""
    for turn, (one, other) in enumerate(zip(a["turns"], b["turns"], strict=True)):
        if one["ids"] != other["ids"]:
            pairs = zip(one["ids"], other["ids"], strict=False)
            shorter = min(len(one["ids"]), len(other["ids"]))
            return turn, next((i for i, (x, y) in enumerate(pairs) if x != y), shorter)
    return None


def by_category(
    rows: Sequence[Sample], plain: Mapping[str, Sequence[Sample]], confidence: float, seed: int
) -> dict[str, Drafting]:
    """Figures of a setting's samples: of all ("") and of each category; `plain`: those of the plain settings."""
    fine = [row for row in rows if not row.get("error")]
    names = ["", *dict.fromkeys(row["category"] for row in rows if row.get("category"))]
    out = {}
    for name in names:
        mine = [row for row in fine if name in ("", row.get("category"))]
        out[name] = _figures(mine, plain, confidence, seed)
    return out


def _figures(rows: Sequence[Sample], plain: Mapping[str, Sequence[Sample]], confidence: float, seed: int) -> Drafting:
    speeds = metrics.clock(rows)
    tau = metrics.ratio_interval(rows, "emitted", "nfe", confidence, seed) if rows else NONE
    found: Drafting = {"n": len(rows), "tokens_per_second": speeds["tokens_per_second"], "tau": tau}
    found |= {"speedup": {}, "processor": {}}
    for label, theirs in plain.items():
        others = {row["doc"]: row for row in theirs if not row.get("error")}
        both = [row for row in rows if row["doc"] in others]
        pair = [others[row["doc"]] for row in both], both
        if both:
            found["speedup"][label] = metrics.paired_ratio(*pair, "emitted", "seconds", confidence, seed)
            found["processor"][label] = metrics.paired_ratio(*pair, "emitted", "processor", confidence, seed)
    judged = [row["differs"] for row in rows if "differs" in row]
    parted = [place for place in judged if place is not None]
    ties = [place["gap"] for place in parted if place["tie"]]
    found |= {"compared": len(judged), "ties": len(ties), "differ": len(parted) - len(ties)}
    return {**found, "gap": max(ties)} if ties else found
