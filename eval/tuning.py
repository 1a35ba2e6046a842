"""`dllm tune`: the most tokens per forward within a stated loss of accuracy.

    tasks: [{name: word_problems, split: validation}]
    tune:
      baseline: confidence                                # what the loss is measured against
      loss: 1.0                                           # percentage points of accuracy, on every task
      space:                                              # a list is a choice, {low, high} a range
        - {name: threshold, tau: {low: 0.5, high: 0.95}}
        - [{name: adablock, delimiter_tau: [0.3, 0.5]}, {name: credit}]      # a composition
      trials: 24

The search is an ordinary run over the candidates (it resumes, it reports); `best.yaml` in its folder is the choice.
`save` writes the choice for every sampler of the space beside the model: there a name without parameters finds it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml
from scipy.stats import qmc

from dllm.errors import DllmError
from dllm.eval import metrics
from dllm.eval.config import Setting, build, describe, gather
from dllm.eval.config import schema as config_schema
from dllm.eval.records import Sample
from dllm.eval.report import table
from dllm.eval.results import Results
from dllm.eval.runner import run
from dllm.eval.store import write
from dllm.models.hub import locate
from dllm.models.settings import SamplerSetting, write_settings
from dllm.samplers import registry
from dllm.samplers.base import Method
from dllm.spec import Json, keys_of
from dllm.spec import build as from_mapping

Choices = list[object] | dict[str, float]  # of one parameter: values, or a range from `low` to `high`
Axes = dict[tuple[int, str], Choices]  # (part of the composition, parameter) -> what it may be


@dataclass(frozen=True)
class TuneSpec:
    """What to search."""

    space: tuple[registry.Spec, ...]
    baseline: registry.Spec = "confidence"
    loss: float = 1.0  # percentage points, on every task
    trials: int = 32  # candidates, at most


def schema() -> Json:
    """The JSON Schema of a file for `dllm tune`."""
    out = config_schema()
    return {**out, "properties": {**out["properties"], "tune": keys_of(TuneSpec)}}


@dataclass(frozen=True)
class Found:
    """The choice: its sampler, what it was measured at, the file that reproduces it, the table of all candidates, and
    the settings that were saved beside the model."""

    sampler: registry.Spec | None
    accuracy: float
    tokens_per_forward: float
    path: Path
    results: Results
    text: str
    saved: tuple[SamplerSetting, ...] = ()


def tune(
    config: str | Path | Mapping[str, object],
    sets: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    save: bool = False,
    progress: bool = True,
) -> Found:
    """Search and write `best.yaml`.

    save: also write, for every sampler of the space, its fastest candidate within the loss into `sampler_settings.json`
    beside the model; of a sampler without such a candidate nothing is written. Parts named without parameters run at
    their published defaults. Errors: no `tune:`, an empty space.
    """
    data, source = gather(config, sets)
    if "tune" not in data:
        raise source.error((), "there is no `tune:`; give it `space:`, the samplers and parameters to search")
    spec = from_mapping(TuneSpec, data.pop("tune"), source, ("tune",))
    data.update({k: v for k, v in (("limit", limit), ("seed", seed)) if v is not None})
    for axis in ("matrix", "sampler"):
        if axis in data:
            raise source.error((axis,), f"`dllm tune` chooses the sampler; move {axis!r} into `tune.space`")
    if not spec.space or spec.trials < 1:
        raise source.error(("tune",), "there is nothing to try: `space` lists samplers, `trials` is at least 1")
    points = candidates(spec, int(data.get("seed", 0)))
    baseline = {"label": "baseline", "sampler": [registry.published(spec.baseline)]}
    sweep = [baseline, *({"label": describe(point), "sampler": [registry.published(point)]} for point in points)]
    built = build({**data, "matrix": sweep}, source)
    model = built.settings[0].model
    beside = locate(model.name, **model.hub) if save else None  # what cannot be saved is said before the work
    results = run(built, out=out, progress=progress)
    found = choose(results, spec, data)
    if beside is None:
        return found
    settings = tuple(_settings(results, spec))
    notes = [f"- `{s.sampler}`: {_said(s)}" for s in settings]
    if settings:
        notes.insert(0, f"Saved in {write_settings(beside, settings)}, taken by these samplers without parameters:")
    without = sorted({_key(s.sampler) for s in results.config.settings[1:]} - {s.sampler for s in settings})
    notes += [
        f"- `{name}`: no candidate loses at most {spec.loss} points on every task; nothing saved" for name in without
    ]
    return replace(found, text=found.text + "\n" + "\n".join(notes) + "\n", saved=settings)


def candidates(spec: TuneSpec, seed: int) -> list[registry.Spec]:
    """The points to try. Every entry of the space has an even share of the trials; a grid that is no larger is searched
    whole and leaves the rest to the others, anything else is sampled evenly (Sobol)."""
    grids = [_axes(entry) for entry in spec.space]
    sizes = [math.prod(len(v) if isinstance(v, list) else math.inf for v in grid.values()) for grid in grids]
    shares, left = {}, spec.trials
    for done, i in enumerate(sorted(range(len(grids)), key=sizes.__getitem__)):
        shares[i] = int(min(sizes[i], max(1, left // (len(grids) - done))))
        left -= shares[i]
    out: list[registry.Spec] = []
    for i, (entry, grid) in enumerate(zip(spec.space, grids, strict=True)):
        picks = itertools.product(*grid.values()) if shares[i] == sizes[i] else _spread(grid, shares[i], seed)
        out += [_put(entry, dict(zip(grid, values, strict=True))) for values in picks]
    return list({describe(point): point for point in out}.values())[: spec.trials]


def _axes(entry: registry.Spec) -> Axes:
    """The free parameters of one entry."""
    parts = entry if isinstance(entry, list) else [entry]
    out: Axes = {}
    for i, part in enumerate(parts):
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, list):
                if not value:
                    raise DllmError(f"tune.space: {key}: the list of choices is empty")
                out[(i, key)] = value
            elif isinstance(value, dict):
                if set(value) != {"low", "high"} or not value["low"] < value["high"]:
                    raise DllmError(f"tune.space: {key}: a range is {{low: a, high: b}} with a < b, found {value}")
                out[(i, key)] = value
    return out


def _spread(grid: Axes, n: int, seed: int) -> Iterator[tuple[object, ...]]:
    """`n` points spread evenly over choices and ranges; a range is rounded to three digits."""
    for row in qmc.Sobol(len(grid), rng=seed).random(1 << max(0, (n - 1).bit_length()))[:n]:
        yield tuple(_at(values, float(u)) for values, u in zip(grid.values(), row, strict=True))


def _at(values: Choices, u: float) -> object:
    if isinstance(values, list):
        return values[int(u * len(values))]
    return round(values["low"] + u * (values["high"] - values["low"]), 3)


def _put(entry: registry.Spec, chosen: Mapping[tuple[int, str], object]) -> registry.Spec:
    parts = [
        {**part, **{key: value for (j, key), value in chosen.items() if j == i}} if isinstance(part, dict) else part
        for i, part in enumerate(entry if isinstance(entry, list) else [entry])
    ]
    return parts if isinstance(entry, list) else parts[0]


def choose(results: Results, spec: TuneSpec, data: Mapping[str, object]) -> Found:
    """The candidate of most tokens per forward among those that lose no more than allowed."""
    totals = {s.label: _total(results, s.label) for s in results.config.settings}
    order = sorted(totals, key=lambda label: -totals[label][1])
    within = [label for label in order if _within(results, label, spec.loss)]
    best = within[0]  # the baseline itself is always within
    setting = next(s for s in results.config.settings if s.label == best)
    about = (
        f"Found by `dllm tune`: {totals[best][1]:.2f} tokens per forward at {100 * totals[best][0]:.1f} % on "
        f"{', '.join(t.title for t in results.config.tasks)}; the baseline, {describe(spec.baseline)}, has "
        f"{totals['baseline'][1]:.2f} at {100 * totals['baseline'][0]:.1f} %. Allowed loss: {spec.loss} points."
    )
    chosen = {**{k: v for k, v in data.items() if k not in ("extends", "about", "out")}, "about": about}
    chosen.update(name=f"{results.config.name}-best", sampler=setting.sampler)
    path = results.folder / "best.yaml"
    write(path, yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    lines = []
    for label in order:
        accuracy, tpf = totals[label]
        name, allowed = f"**{label}**" if label == best else label, "yes" if label in within else "no"
        lines.append([name, f"{100 * accuracy:.1f}", f"{tpf:.2f}", allowed])
    head = ["sampler", "accuracy %", "tokens/forward", "within the loss"]
    text = f"{about}\n\n{table(head, lines)}\n\n{path}\n"
    write(results.folder / "tune.md", text)
    return Found(setting.sampler, totals[best][0], totals[best][1], path, results, text)


def _within(results: Results, label: str, loss: float) -> bool:
    """Whether a setting loses at most `loss` points against the baseline on every task."""
    accuracy = {(c["task"], c["setting"]): c["accuracy"] for c in results.cells}
    tasks = {task for task, _ in accuracy}
    return all(accuracy[task, label] >= accuracy[task, "baseline"] - loss / 100 - 1e-12 for task in tasks)


def _settings(results: Results, spec: TuneSpec) -> Iterator[SamplerSetting]:
    """For every sampler of the space the fastest of its candidates within the loss, with what it was measured at."""
    order = sorted(results.config.settings[1:], key=lambda s: -_total(results, s.label)[1])
    best: dict[str, Setting] = {}
    for setting in order:
        if _within(results, setting.label, spec.loss):
            best.setdefault(_key(setting.sampler), setting)
    for name in dict.fromkeys(_key(s.sampler) for s in results.config.settings[1:] if _key(s.sampler) in best):
        setting = best[name]
        ours, theirs = (_correct(results.rows, label) for label in (setting.label, "baseline"))
        shared = [key for key in ours if key in theirs]
        change, low, high = metrics.paired_difference([theirs[k] for k in shared], [ours[k] for k in shared])
        accuracy, tpf = _total(results, setting.label)
        yield SamplerSetting(
            sampler=name,
            parameters={m.name: _changed(m) for m in registry.parse(setting.sampler or ())},
            task=", ".join(t.title for t in results.config.tasks),
            n=len(ours),
            accuracy=round(accuracy, 4),
            interval=_rounded(metrics.interval(list(ours.values())), 4),
            tokens_per_forward=round(tpf, 2),
            baseline=registry.spell(spec.baseline),
            loss=round(-100 * change, 2),
            loss_interval=_rounded((-100 * high, -100 * low), 2),
        )


def _key(sampler: registry.Spec | None) -> str:
    return "+".join(m.name for m in registry.parse(sampler or ()))


def _changed(method: Method) -> dict[str, object]:
    """The parameters that differ from the published defaults."""
    values = vars(method)
    return {f.name: values[f.name] for f in fields(method) if values[f.name] != f.default}


def _correct(rows: Sequence[Sample], label: str) -> dict[tuple[str, str], float]:
    return {(r["task"], r["doc"]): r["correct"] or 0.0 for r in rows if r["setting"] == label}


def _rounded(values: Sequence[float], digits: int) -> tuple[float, float]:
    low, high = (round(v, digits) + 0.0 for v in values)  # no minus zero
    return low, high


def _said(s: SamplerSetting) -> str:
    return (
        f"`{s.spelled}`, {s.tokens_per_forward} tokens per forward, {100 * s.accuracy:.1f} % "
        f"[{100 * s.interval[0]:.1f}, {100 * s.interval[1]:.1f}], loses {s.loss:+.1f} points"
    )


def _total(results: Results, label: str) -> tuple[float, float]:
    """Accuracy and tokens per forward over all tasks, every document counting once."""
    cells = [c for c in results.cells if c["setting"] == label]
    n, correct = sum(c["n"] for c in cells), sum(c["n"] * c["accuracy"] for c in cells)
    fine = [c for c in cells if c["n"] > c["errors"]]
    forwards = sum(c["nfe"] * (c["n"] - c["errors"]) for c in fine)
    tpf = sum(c["tokens"] for c in fine) / forwards if forwards else math.nan
    return correct / n, tpf if fine else 0.0
