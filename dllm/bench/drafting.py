"""`dllm bench drafting` and `drafting-smollm`: verify calls, tau with and without the bonus token, wall-clock.

Every setting decodes the same held-out prompts greedily and has to give the verifier's own text. A wall-clock figure is
the median over `repeats` rounds of plain `generate` against the setting, all settings of a round after one plain run.
The first pass over the prompts, which counts, is also the one in which a cost controller learns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import dllm
from dllm.bench.runtime import Figure, seconds
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter
from dllm.drafting.front import encode
from dllm.drafting.lattice import Lattice
from dllm.drafting.proposal import EMPTY, Proposal
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.request import SpecResult
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError, unknown
from dllm.models.model import Model
from dllm.models.native import NativeModel
from dllm.tasks.registry import generate

TASKS = ("word_problems", "functions")
Options = dict[str, Any]  # arguments of `dllm.speculate`
Prompts = Sequence[Sequence[int]]
K12 = {"length": "fixed:k=12", "carry": "off"}
SETTINGS: dict[str, Options] = {
    "argmax, fixed 12": {"search": "argmax", **K12},
    "cps, fixed 12": {"search": "cps", **K12},
    "eal, fixed 12": {"search": "eal", **K12},
    "eal, fixed 12, carry": {"search": "eal", "length": "fixed:k=12"},
    "tree 32, fixed 12": {"tree": 32, **K12},
    "cps, adl (DiffuSpec)": {"search": "cps", "length": "adl"},
    "eal, cost": {},
    "eal, cost, head": {"length": "cost:accept=head"},
    "eal, rejection, head": {"length": "rejection:accept=head"},
    "tree 32, cost": {"tree": 32},
    "suffix, fixed 12": {"drafter": "suffix", **K12},
    "suffix, cost": {"drafter": "suffix"},
    "no drafter": {"drafter": None},
}
SMOLLM: dict[str, Options] = {
    "suffix, cost": {"drafter": "suffix"},
    "lookup, cost": {"drafter": "lookup"},
    "tiny dLLM, cost": {"drafter": "tiny"},
    "rehearsed, eal, fixed 8": {"search": "eal", "length": "fixed:k=8", "carry": "off"},
    "rehearsed, cps, fixed 8": {"search": "cps", "length": "fixed:k=8", "carry": "off"},
    "rehearsed, tree 16, fixed 8": {"tree": 16, "length": "fixed:k=8", "carry": "off"},
    "rehearsed, cost": {},
    "no drafter": {"drafter": None},
}
QUESTIONS = (
    "List the first ten prime numbers, then repeat the list.",
    "Write a Python function that adds two numbers. Then write it again with type hints.",
    "Why is the sky blue?",
)


class Rehearsed(Drafter):
    """Drafts one of the known texts, every seventh token wrong: a good drafter that takes no time.

    The loop's own work shows, and wall-clock is the most that such drafts can bring.
    """

    name = "rehearsed"

    def __init__(self, texts: Sequence[Sequence[int]], vocab: int) -> None:
        self.texts, self.size = [list(t) for t in texts], vocab

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Lattice | Proposal:
        """What the text that begins so goes on with, but for every seventh token."""
        at = len(ids)
        text = next((t for t in self.texts if t[:at] == list(ids)), None)
        if text is None or k < 1:  # a tie in rounding: nobody knows how this text goes on
            return EMPTY
        logits = torch.full((min(k, len(text) - at), self.size), -8.0)
        for i in range(len(logits)):
            logits[i, text[at + i] if (at + i) % 7 else 5] = 8.0
        return self.need.lattice(logits, at)


class Tally(NamedTuple):
    """One setting over all prompts."""

    tau: float  # with the bonus token
    accepted: float  # a round, without it
    calls: int
    tokens: int
    own: float  # share of the loop's own work in the time of a round
    divergent: int  # texts that leave the plain one: ties in rounding

    @property
    def note(self) -> str:
        """The figures beside tau in words."""
        return (
            f"{self.accepted:.2f} accepted a round, {self.calls} verify calls for {self.tokens} tokens, "
            f"own work {self.own:.1%}, {self.divergent} texts differ"
        )


def run(
    names: Sequence[str] | None = None, repeats: int = 5, *, n: int = 300, drafter: str | Drafter = "tiny"
) -> Iterator[Figure]:
    """The embedded pair on `n` held-out prompts a task; the clock runs over the first twenty of them."""
    v, source, settings = as_verifier("tiny-ar"), as_drafter(drafter), pick(SETTINGS, names)
    if not (isinstance(source, DiffusionDrafter) and isinstance(source.model, NativeModel)):
        raise DllmError(f"the drafter of this bench is a dLLM, tiny or a folder, not {drafter!r}")
    for task in TASKS:
        prompts = held_out(source.model, task, n)
        tau = {}
        for name, tally in Course(v, source, prompts, settings, 96).tallies():
            tau[name] = tally.tau
            bound = 6.0 if (task, name) == ("word_problems", "eal, fixed 12") else None
            yield Figure(f"{task}, {name}: tau", tally.tau, bound, True, tally.note)
        for one, other in (("eal", "cps"), ("cps", "argmax")):
            if {f"{one}, fixed 12", f"{other}, fixed 12"} <= tau.keys():
                ratio = tau[f"{one}, fixed 12"] / tau[f"{other}, fixed 12"]
                yield Figure(f"{task}: tau of {one} to that of {other}", ratio, 1.0, True)
        if {"eal, fixed 12", "suffix, fixed 12"} <= tau.keys():
            gain = tau["eal, fixed 12"] - tau["suffix, fixed 12"]
            yield Figure(f"{task}: tau of eal above the suffix automaton's", gain, 0.5, True)
        for name, ratios in Course(v, source, prompts[:20], settings, 96).clock(repeats).items():
            pays = name.endswith("cost") and "drafter" not in settings[name]
            yield wall_row(f"{task}, {name}", ratios, 1.0 if pays else 0.95)


def run_smollm(names: Sequence[str] | None = None, repeats: int = 5, *, new: int = 40) -> Iterator[Figure]:
    """SmolLM2-135M-Instruct: what drafting costs and brings where no drafter was made for it, and with `Rehearsed`."""
    v, tiny = as_verifier("smollm2"), as_drafter("tiny")  # loaded once
    settings = {
        name: {**o, "drafter": tiny} if o.get("drafter") == "tiny" else o for name, o in pick(SMOLLM, names).items()
    }
    prompts, _ = encode(v, [[{"role": "user", "content": question}] for question in QUESTIONS])
    source = Rehearsed([plain_text(v, p, new) for p in prompts], v.vocab)
    course = Course(v, source, prompts, settings, new)
    for name, tally in course.tallies():
        yield Figure(f"SmolLM2, {name}: tau", tally.tau, note=tally.note)
        yield Figure(f"SmolLM2, {name}: own work", tally.own, 0.1)
    for name, ratios in course.clock(repeats).items():
        yield wall_row(f"SmolLM2, {name}", ratios, 0.95)


def wall_row(name: str, ratios: Sequence[float], bound: float | None, rival: str = "plain") -> Figure:
    """The median of a setting's ratios, with all of them in the note."""
    runs = " ".join(f"{r:.2f}" for r in ratios)
    return Figure(f"{name}: wall-clock to {rival}", statistics.median(ratios), bound, True, runs)


def pick(settings: Mapping[str, Options], names: Sequence[str] | None) -> dict[str, Options]:
    """The named settings, or all of them. Errors: an unknown name."""
    for name in names or ():
        if name not in settings:
            raise unknown("setting", name, settings)
    return {name: settings[name] for name in names or settings}


@dataclass(frozen=True)
class Course:
    """Prompts that a verifier decodes plainly and under every setting, `new` tokens each."""

    verifier: Verifier
    source: Drafter | None
    prompts: Prompts
    settings: Mapping[str, Options]
    new: int

    def plain(self) -> list[list[int]]:
        """The verifier's own texts."""
        return [plain_text(self.verifier, prompt, self.new) for prompt in tqdm(self.prompts, "plain", leave=False)]

    def drafted(self, name: str) -> list[SpecResult]:
        """The texts under a setting."""
        call = {"drafter": self.source, "max_new_tokens": self.new, **self.settings[name]}
        prompts = tqdm(self.prompts, name, leave=False)
        return [dllm.speculate(self.verifier, prompt=list(prompt), **call) for prompt in prompts]

    def tallies(self) -> Iterator[tuple[str, Tally]]:
        """Acceptance over all prompts; every text is compared with the verifier's own."""
        texts = self.plain()
        for name in self.settings:
            yield name, tally(self.drafted(name), texts)

    def clock(self, repeats: int) -> dict[str, list[float]]:
        """Plain seconds over a setting's seconds, a figure a round."""
        ratios: dict[str, list[float]] = {name: [] for name in self.settings}
        for _ in tqdm(range(repeats), "clock", leave=False):
            plain = seconds(self.plain)
            for name, kept in ratios.items():
                kept.append(plain / seconds(partial(self.drafted, name)))
        return ratios


def tally(outs: Sequence[SpecResult], texts: Sequence[Sequence[int]]) -> Tally:
    """The rounds of all outputs together, which are compared with the verifier's own `texts`."""
    rounds = [r for out in outs for r in out.rounds]
    emitted, accepted = sum(r.emitted for r in rounds), sum(r.accepted for r in rounds)
    own = sum(r.t_search + r.t_commit + r.t_other for r in rounds) / max(1e-9, sum(r.seconds for r in rounds))
    divergent = sum(list(text) != out.sequences for out, text in zip(outs, texts, strict=True))
    calls = max(1, len(rounds))
    return Tally(emitted / calls, accepted / calls, len(rounds), emitted, own, divergent)


def plain_text(v: Verifier, prompt: Sequence[int], new: int) -> list[int]:
    """The model's own greedy `generate`."""
    ids = torch.tensor([list(prompt)], device=v.device)
    mask = torch.ones_like(ids)
    text: list[int] = v.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[0].tolist()
    return text


def held_out(model: Model, task: str, n: int, seed: int = 1) -> list[list[int]]:
    """Prompt ids of test problems: no key of theirs is in the training data."""
    return [model.chat([{"role": "user", "content": e.prompt}]) for e in generate(task, "test", n, seed)]


def tau_rows(
    name: str, v: Verifier, drafter: str | NativeModel | Drafter, prompts: Mapping[str, Prompts], new: int, length: str
) -> Iterator[Figure]:
    """tau of a drafter on held-out prompts, by task."""
    source, settings = as_drafter(drafter), {name: {"length": length, "carry": "off"}}
    for task, some in prompts.items():
        for _, found in Course(v, source, some, settings, new).tallies():
            yield Figure(f"{task}, {name}: tau", found.tau, note=found.note)
