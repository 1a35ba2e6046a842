"""`dllm bench retrieval`: what a store brings that outlives a text, and what a tree of several sources brings.

The embedded verifier decodes the same held-out prompts greedily under every setting, one after the other, so a kept
store has read the prompts before. Every text has to be the verifier's own. Differences are paired by prompt: of tau,
the tokens of all rounds over their number, with the 95 % interval of a bootstrap over the prompts. A setting whose
answers are in the file is not decoded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import dllm
from dllm.bench.drafting import K12, TASKS, Options, Prompts, held_out, plain_text
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.store import Store
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError
from dllm.eval.metrics import paired_gain
from dllm.models.lines import append, mend, read_lines
from dllm.models.native import NativeModel

SOURCES = ("suffix", "recycle", "stand")
FEW, NEW = 50, 96  # prompts of a store; tokens


class Answers(NamedTuple):
    """One setting over the prompts of a task."""

    emitted: np.ndarray  # (n,) tokens of all rounds
    rounds: np.ndarray  # (n,)
    nodes: int  # submitted
    differ: int  # texts that are not the verifier's own

    @property
    def tau(self) -> float:
        """Tokens a round, with the bonus token."""
        return float(self.emitted.sum() / self.rounds.sum())


class Course(NamedTuple):
    """Prompts of a task, their plain texts, and the file of what was decoded."""

    verifier: Verifier
    task: str
    prompts: Prompts
    file: Path
    of: str  # the drafter that the answers are of

    def answers(self, name: str, kept: bool, options: Options) -> Answers:
        """Decoded, or read from the file."""
        key = {"task": self.task, "n": len(self.prompts), "setting": name, "drafter": self.of}
        kinds = {"task": str, "n": int, "setting": str, "drafter": str, "emitted": list, "rounds": list}
        for row in read_lines(self.file, kinds):
            if all(row[k] == value for k, value in key.items()):
                return Answers(np.array(row["emitted"]), np.array(row["rounds"]), row["nodes"], row["differ"])
        store, outs = Store() if kept else None, []
        for prompt in tqdm(self.prompts, f"{self.task}, {name}", leave=False):
            outs.append(dllm.speculate(self.verifier, prompt=list(prompt), max_new_tokens=NEW, store=store, **options))
        emitted = [sum(r.emitted for r in out.rounds) for out in outs]
        rounds, nodes = [out.n_verify for out in outs], sum(r.nodes for out in outs for r in out.rounds)
        differ = sum(out.sequences != text for out, text in zip(outs, self.plain(), strict=True))
        append(self.file, [{**key, "emitted": emitted, "rounds": rounds, "nodes": nodes, "differ": differ}])
        return Answers(np.array(emitted), np.array(rounds), nodes, differ)

    def plain(self) -> list[list[int]]:
        """The verifier's own texts, decoded once a file."""
        name = {"task": self.task, "n": len(self.prompts), "plain": True}
        found: list[list[list[int]]] = [
            row["texts"] for row in read_lines(self.file) if all(row.get(k) == v for k, v in name.items())
        ]
        if not found:
            found = [
                [plain_text(self.verifier, p, NEW) for p in tqdm(self.prompts, f"{self.task}, plain", leave=False)]
            ]
            row = {"setting": "", "drafter": "", "emitted": [], "rounds": [], "texts": found[0]}
            append(self.file, [{**name, **row}])
        return found[0]


def run(
    *, out: Path, n: int = 300, drafter: str | Drafter = "tiny", tree: int = 16, tasks: Sequence[str] = TASKS
) -> Iterator[Figure]:
    """Kept stores on 50 prompts a task, merged trees on `n`; the dLLM `drafter` drafts for the embedded verifier."""
    mend(out)
    v, source = as_verifier("tiny-ar"), as_drafter(drafter)
    if not (isinstance(source, DiffusionDrafter) and isinstance(source.model, NativeModel)):
        raise DllmError(f"the drafter of this bench is a dLLM, tiny or a folder, not {drafter!r}")
    for task in tasks:
        prompts = held_out(source.model, task, max(n, FEW))
        yield from stores(Course(v, task, prompts[: min(n, FEW)], out, ""))
        yield from trees(Course(v, task, prompts[:n], out, str(drafter)), source, tree)


def stores(course: Course) -> Iterator[Figure]:
    """Each source that forgets, and with a store."""
    for name in SOURCES:
        for shape, nodes in (("chain", {}), ("tree 32", {"tree": 32})):
            options: Options = {"drafter": name, **K12, **nodes}
            forgets = course.answers(f"{name}, {shape}, forgets", False, options)
            keeps = course.answers(f"{name}, {shape}, keeps", True, options)
            yield _row(f"{course.task}, {name}, {shape}: tau, kept above forgetting", keeps, forgets)


def trees(course: Course, source: Drafter, tree: int) -> Iterator[Figure]:
    """The dLLM's tree, trees of what a kept store holds, and trees of both, of as many nodes."""
    options: Options = {**K12, "tree": tree}
    alone = {"dLLM": course.answers(f"dLLM, tree {tree}", True, {**options, "drafter": source})}
    for name in ("recycle", "stand"):
        alone[name] = course.answers(f"{name}, tree {tree}", True, {**options, "drafter": name})
        both = course.answers(f"dLLM+{name}, tree {tree}", True, {**options, "drafter": source, "graft": name})
        for other in ("dLLM", name):
            yield _row(f"{course.task}, tree of {tree}, dLLM+{name}: tau above {other} alone", both, alone[other])


def _row(name: str, a: Answers, b: Answers) -> Figure:
    first, second = (np.stack([x.emitted, x.rounds], 1) for x in (b, a))
    gain, low, high = paired_gain(first, second)
    nodes = " and ".join(f"{x.nodes / x.rounds.sum():.1f}" for x in (a, b))
    note = f"{a.tau:.2f} against {b.tau:.2f}, 95 % {low:.2f} to {high:.2f}, {nodes} nodes a round"
    return Figure(name, gain, 0.0, True, f"{note}, {a.differ + b.differ} texts differ")
