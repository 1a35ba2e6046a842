"""`report.md`: the tables and figures of a run, with what was counted and how."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dllm.decoding.trace import Trace
from dllm.eval import metrics, plots
from dllm.eval.config import describe
from dllm.eval.records import Cell, Drafting, Interval, Sample
from dllm.eval.results import Results
from dllm.eval.store import write
from dllm.samplers.registry import TUNED

Made = tuple[str, Path | None]  # a figure: what it shows, and its file unless there is nothing to draw
COUNTING = (
    "Tokens are generated ids up to the first stop, so an empty answer is 0; `raw` counts every decoded position. "
    "NFE is a row's own number of forwards, NFE≡ the same work in full-length forwards (recomputed positions ÷ "
    "length), TPF = Σ tokens ÷ Σ NFE. AR-ness: the share of an answer's commits that took the leftmost mask, those of "
    "one forward from left to right (1: as left to right as it can be), over the answers whose commit order was kept. "
    "Tokens/s is Σ tokens ÷ Σ wall seconds of the batches; `per sample` is the mean of each "
    "sample's own speed, from the start of its call."
)


def report(results: Results, figures: bool = True) -> Path:
    """Write `report.md` and its figures into the run folder; the report's path."""
    config, folder = results.config, results.folder
    figures = figures and plots.possible()
    notices = "".join(f"\n> {notice}\n" for notice in results.notices)
    parts = [f"# {config.name}", config.about.strip(), _facts(results), notices]
    tasks = list(dict.fromkeys(cell["task"] for cell in results.cells))
    if len(tasks) > 1:
        parts.append(_overview(results, tasks))
    for task in tasks:
        parts += [f"## {task}", *_task(results, task, [r for r in results.rows if r["task"] == task], figures)]
    parts += [_areas(results), _published(results)]
    if config.unknown:
        parts.append("## Not known\n\n" + "\n".join(f"- {line}" for line in config.unknown))
    path = folder / "report.md"
    write(path, "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n")
    return path


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table; the first column is left-aligned, the others right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in [head, *lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def compact(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table without the columns that hold no value."""
    lines = list(lines)
    kept = [i for i in range(len(head)) if not lines or any(line[i] != "–" for line in lines)]
    return table([head[i] for i in kept], ([line[i] for i in kept] for line in lines))


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """A rounded number; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{scale * value:.{digits}f}"


def span(low: float | None, high: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """The ends of an interval; a dash where there is none."""
    ends = number(low, digits, scale), number(high, digits, scale)
    return "–" if ends == ("–", "–") else " … ".join(ends)


def _facts(results: Results) -> str:
    config, env = results.config, results.env
    brought = {row["sampler"]: row["setting"] for row in results.rows if f":{TUNED}" in row.get("sampler", "")}
    packages = ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items())
    weights = ", ".join(f"{name} ({mark})" for name, mark in env.get("weights", {}).items())
    n = config.repeats
    repeats = "" if n == 1 else f"; {n} times, of which seconds are the median"
    calls = f"{config.warmup} call{'s' if config.warmup != 1 else ''}"
    size = str(config.batch_size)
    if most := [row["clock"]["admitted"] for row in results.rows if "admitted" in row.get("clock", {})]:
        size += f" ({min(most)} to {max(most)} rows at a time, as memory took them)"
    lines = [
        f"- hardware: {env.get('hardware', 'unknown')}",
        f"- software: Python {env.get('python')}, {packages}",
        f"- weights: {weights or 'unknown'}",
        f"- seed {config.seed}, batches of {size}, engine {config.engine.kind}",
        f"- warm-up: {calls} before each setting decoded and left out of every figure",
        f"- every batch was decoded under all settings of its model, one after the other, before the next{repeats}",
        f"- intervals: {config.confidence:.0%} bootstrap of {metrics.RESAMPLES} (exact binomial where all agree)",
        *(f"- setting {label}: parameters of the model's own, `{spec}`" for spec, label in brought.items()),
    ]
    return "\n".join(lines) + "\n\n" + COUNTING


def _overview(results: Results, tasks: Sequence[str]) -> str:
    """All tasks beside one another, before the details of each."""
    lines = []
    for setting in results.config.settings:
        cells = {cell["task"]: cell for cell in results.cells if cell["setting"] == setting.label}
        shown = [
            f"{number(cells[t]['accuracy'], 1, 100)} · {number(cells[t].get('tpf'))}" if t in cells else "–"
            for t in tasks
        ]
        lines.append([setting.label, *shown])
    return "## Overview\n\nAccuracy in percent · tokens per forward.\n\n" + table(["setting", *tasks], lines)


def _task(results: Results, task: str, rows: Sequence[Sample], figures: bool) -> list[str]:
    cells = [cell for cell in results.cells if cell["task"] == task]
    parts = [_table(cells), _decoding(cells)]
    rows = [row for row in rows if row["correct"] is not None or "asked_by" not in row]
    if any("lm_eval" in cell for cell in cells):
        lines = [[c["setting"], k, number(v, 4)] for c in cells for k, v in c.get("lm_eval", {}).items()]
        parts.append("lm-eval's own figures:\n\n" + table(["setting", "metric", "value"], lines))
    if not rows:  # likelihoods, which lm-eval counts alone
        return parts
    parts += [_work(cells), _drafting(cells), *_by_category(results, cells), _calibration(cells)]
    parts.append(_against_first(results, task, rows))
    made = _figures(results, task, cells, rows) if figures else ()
    return parts + [f"![{label}]({path.relative_to(results.folder).as_posix()})" for label, path in made if path]


def _numbers(cell: Cell, **digits: int) -> list[str]:
    """Figures of a cell by name, each with its digits."""
    return [number(_value(cell, name), places) for name, places in digits.items()]


def _table(cells: Sequence[Cell]) -> str:
    head = [
        "setting",
        "n",
        "accuracy %",
        "interval",
        "NFE",
        "NFE≡",
        "TPF",
        "AR-ness",
        "tokens/s",
        "per sample",
        "cut",
        "errors",
    ]
    lines = []
    for c in cells:
        interval = span(c.get("low"), c.get("high"), 1, 100)
        work = _numbers(c, nfe=1, nfe_equiv=1, tpf=2, arness=2, tokens_per_second=1, tokens_per_second_sample=1)
        sizes = [c.get("cut") or "–", c.get("errors", 0)]
        lines.append([c["setting"], c["n"], number(c["accuracy"], 1, 100), interval, *work, *sizes])
    return compact(head, lines)


_NAMED = ("sampler", "cache", "max_new_tokens", "stop", "temperature")  # have columns of their own


def _decoding(cells: Sequence[Cell]) -> str:
    """What every setting was decoded with, as the order of precedence settled it."""
    lines = []
    for cell in cells:
        for used in cell.get("decoding", ()):
            rest = {k: v for k, v in used.items() if k not in _NAMED}
            methods = [describe(used[k]) if used.get(k) else "–" for k in ("sampler", "cache")]
            numbers = [used.get(k, "–") for k in ("max_new_tokens", "temperature")]
            stops = ", ".join(map(repr, used.get("stop") or ())) or "–"
            others = ", ".join(f"{k}={v}" for k, v in rest.items()) or "–"
            lines.append([cell["setting"], *methods, *numbers, stops, others])
    if not lines:
        return ""
    head = ["setting", "sampler", "cache", "new tokens", "temperature", "stop", "other"]
    return "Decoded with (a dash is the model family's own):\n\n" + compact(head, lines)


def _calibration(cells: Sequence[Cell]) -> str:
    """What the probabilities of labels are worth, where a task reads some: as they are, and at one temperature."""
    lines = []
    for c in (c for c in cells if "brier" in c):
        b, *b_ends = _numbers(c, brier=3, brier_low=3, brier_high=3)
        e, *e_ends = _numbers(c, ece=3, ece_low=3, ece_high=3)
        lines.append([c["setting"], "as read", b, " … ".join(b_ends), e, " … ".join(e_ends)])
        if "temperature" not in c:
            continue
        b, *b_ends = _numbers(c, brier_fitted=3, brier_fitted_low=3, brier_fitted_high=3)
        e, *e_ends = _numbers(c, ece_fitted=3, ece_fitted_low=3, ece_fitted_high=3)
        lines.append([c["setting"], f"T = {c['temperature']:.2f}", b, " … ".join(b_ends), e, " … ".join(e_ends)])
    if not lines:
        return ""
    note = (
        "\n\nT is the temperature that fits all labels best, for `read: {temperature: T}` on other questions; its line "
        "has each half of these at the temperature of the other half."
    )
    head = ["setting", "p", "Brier", "interval", "ECE", "interval"]
    return compact(head, lines) + (note if any(line[1] != "as read" for line in lines) else "")


def _work(cells: Sequence[Cell]) -> str:
    head = ["setting", "tokens", "raw", "empty", "ended by", "seconds", "prefill s", "decode s", "peak MB"]
    lines = []
    for c in cells:
        ended = ", ".join(f"{reason} {count}" for reason, count in c["finish"].items()) or "–"
        seconds = _numbers(c, seconds=1, prefill_seconds=1, decode_seconds=1, peak_mb=1)
        lines.append([c["setting"], c["tokens"], c["tokens_raw"], c["empty"], ended, *seconds])
    note = (
        "`seconds` is wall time; prefill and decode seconds are sums over samples, each from the start of its call. "
        "Peak memory is the accelerator's under the setting, or on a CPU the process's so far."
    )
    return compact(head, lines) + f"\n\n{note}"


def _drafting(cells: Sequence[Cell]) -> str:
    """Drafting runs: accepted drafts and forwards of both models."""
    lines = [
        [
            c["setting"],
            *_numbers(c, accepted_per_cycle=2, tpf=2, nfe=1, draft_forwards=1, own_ms=2),
            number(c.get("own_share"), 1, 100),
        ]
        for c in cells
        if "accepted_per_cycle" in c
    ]
    if not lines:
        return ""
    head = ["setting", "accepted a cycle", "tokens a cycle", "verifier forwards", "drafter forwards",
            "loop's own ms a cycle", "own %"]  # fmt: skip
    note = "In drafting runs NFE and TPF count the verifier's forwards; the drafter's stand apart."
    parts = [note, compact(head, lines)]
    shown = [(c["setting"], c["slots"][:SLOTS]) for c in cells if c.get("slots")]
    if shown:
        deepest = max(len(slots) for _, slots in shown)
        lines = [[name, *map(number, slots), *["–"] * (deepest - len(slots))] for name, slots in shown]
        parts += ["Share of each slot's judged drafts that was accepted (a slot behind a rejection is not judged):",
                  table(["setting", *(f"slot {i + 1}" for i in range(deepest))], lines)]  # fmt: skip
    return "\n\n".join(parts)


SLOTS = 8  # that the report shows


def _by_category(results: Results, cells: Sequence[Cell]) -> Iterator[str]:
    """Speed, acceptance and equality of drafting runs: a line a category, a column a setting."""
    cells = [c for c in cells if "drafting" in c]
    names = list(dict.fromkeys(name for c in cells for name in c["drafting"]))
    plain = list(dict.fromkeys(label for c in cells for label in c["drafting"][""]["speedup"]))
    if not plain:
        return

    def lines(figure: Callable[[Drafting], str], of: Sequence[Cell]) -> str:
        shown = []
        for name in [*names[1:], ""]:
            each = [c["drafting"].get(name) for c in of]
            n = max((one["n"] for one in each if one), default=0)
            shown.append([name or "**all**", n, *(figure(one) if one and one["n"] else "–" for one in each)])
        return table(["category", "n", *(c["setting"] for c in of)], shown)

    confidence = f"{results.config.confidence:.0%}"
    for label in plain:
        of = [c for c in cells if c["setting"] != label]
        if not of:
            continue
        yield f"Speed-up against {label}: ratio of tokens a second, wall clock ({confidence} interval over prompts)."
        yield lines(lambda one, label=label: _interval(one["speedup"].get(label)), of)  # type: ignore[misc]
        timed = [c["drafting"][""]["processor"].get(label) for c in of]
        if not torch.cuda.is_available() and any(one and not math.isnan(one[0]) for one in timed):
            yield f"The same against {label} by the processor's seconds, in which other work on the machine is not."
            yield lines(lambda one, label=label: _interval(one["processor"].get(label)), of)  # type: ignore[misc]
    drafted = [c for c in cells if c["setting"] not in plain]
    if drafted:
        yield f"Tokens a forward of the verifier, the bonus token with them ({confidence} interval over prompts)."
        yield lines(lambda one: _interval(one["tau"]), drafted)
    others = [c for c in cells if c["setting"] != plain[0]]
    if others and any(c["drafting"][""]["compared"] for c in others):
        yield (
            f"Greedy answers equal to those of {plain[0]}, token by token, of those compared. A *tie*: where the texts "
            "part the verifier's two best logits are within rounding, and the order of additions decides."
        )
        yield lines(_equality, others)


def _interval(figure: Interval | None) -> str:
    if figure is None or math.isnan(figure[0]):
        return "–"
    ends = span(*figure[1:])
    return number(figure[0]) if ends == "–" else f"{number(figure[0])} ({ends})"


def _equality(one: Drafting) -> str:
    if not one["compared"]:
        return "–"
    equal = one["compared"] - one["ties"] - one["differ"]
    words = [f"{equal}/{one['compared']}"]
    words += [f"{one['ties']} at ties of ≤ {one['gap']:.0e}"] if one["ties"] else []
    words += [f"**{one['differ']} differ**"] if one["differ"] else []
    return ", ".join(words)


def _against_first(results: Results, task: str, rows: Sequence[Sample]) -> str:
    """Every setting paired with the first: the same documents, so the test is much sharper than two intervals."""
    names = list(dict.fromkeys(r["setting"] for r in sorted(rows, key=lambda r: r["index"])))
    order = [s.label for s in results.config.settings if s.label in names]
    if len(order) < 2:
        return ""
    groups = {name: {r["doc"]: r for r in rows if r["setting"] == name} for name in order}
    first, config = groups[order[0]], results.config
    lines = [[name, *pair(first, groups[name], config.confidence, config.seed)] for name in order[1:]]
    return f"Against {order[0]}, document by document:\n\n" + compact(["setting", *PAIR], lines)


PAIR = ("same text", "Δ accuracy, points", "only first right", "only this right", "McNemar p", "TPF ratio", "NFE ratio")


def pair(a: Mapping[str, Sample], b: Mapping[str, Sample], confidence: float, seed: int) -> list[str]:
    """The paired columns of two groups of samples by document."""
    shared = [doc for doc in a if doc in b]
    if not shared:
        return ["–"] * len(PAIR)
    first, second = [a[d] for d in shared], [b[d] for d in shared]
    right_a, right_b = metrics.verdicts(first), metrics.verdicts(second)
    difference = metrics.paired_difference(right_a, right_b, confidence, seed)
    test = metrics.mcnemar(right_a, right_b)
    fine = [(x, y) for x, y in zip(first, second, strict=True) if not (x.get("error") or y.get("error"))]
    first, second = [x for x, _ in fine], [y for _, y in fine]
    speed = metrics.paired_ratio(first, second, "tokens", "nfe", confidence, seed)
    nfe = sum(r["nfe"] for r in second) / max(1, sum(r["nfe"] for r in first))
    same = sum(x["text"] == y["text"] for x, y in fine)
    graded = [
        f"{100 * difference[0]:+.1f} ({100 * difference[1]:+.1f} … {100 * difference[2]:+.1f})",
        str(test["only_a"]),
        str(test["only_b"]),
        f"{test['p']:.3f}",
    ]
    return [
        f"{same}/{len(fine)}",
        *(graded if any(row["correct"] is not None for row in (*a.values(), *b.values())) else ["–"] * len(graded)),
        "–" if math.isnan(speed[0]) else f"{number(speed[0])}× ({number(speed[1])} … {number(speed[2])})",
        f"{number(nfe)}×",
    ]


def _figures(results: Results, task: str, cells: Sequence[Cell], rows: Sequence[Sample]) -> Iterator[Made]:
    folder, name = results.folder / "plots", slug(task)
    labels = [s.label for s in results.config.settings]
    if graded := [c for c in cells if not math.isnan(c["accuracy"])]:
        figure = plots.accuracy_against_tpf(graded, results.config.methods(), folder / f"{name}-frontier.png", task)
        yield "accuracy against tokens per forward", figure
    spread = {s: [r["nfe"] for r in rows if r["setting"] == s and not r.get("error")] for s in labels}
    spread = {s: counts for s, counts in spread.items() if counts}
    yield "forwards of a sample", plots.forwards(spread, folder / f"{name}-forwards.png", task)
    counts = {s: [n for r in rows if r["setting"] == s for n in r.get("accepted") or ()] for s in labels}
    counts = {s: values for s, values in counts.items() if any(values)}  # plain decoding drafts nothing
    yield "accepted draft tokens", plots.accepted(counts, folder / f"{name}-accepted.png", task)
    for index in range(results.config.trace):
        mine = {r["setting"]: results.folder / "trace" / f"{r['key']}.json" for r in rows if r["index"] == index}
        files = [(label, mine[label]) for label in labels if label in mine]
        traces = [(label, Trace.load(path)) for label, path in files if path.exists()]
        path = folder / f"{name}-order-{index}.png"
        width = max((r["tokens"] for r in rows if r["index"] == index), default=0) + 4
        yield f"commit order, document {index}", plots.commit_order(traces, path, f"{task}, document {index}", width)


def slug(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^\w-]+", "_", text)


def _areas(results: Results) -> str:
    if not any(results.aup.values()):
        return ""
    methods = list(dict.fromkeys(m for areas in results.aup.values() for m in areas))
    lines = [[m, *(number(areas.get(m), 1) for areas in results.aup.values())] for m in methods]
    note = (
        "AUP (arXiv 2601.07568): area under accuracy × tokens per forward, weighted by the loss against the best "
        "setting here; higher is better. All curves of a task begin at its slowest setting; a dash: every point of the "
        f"method loses more than {metrics.KEEP:.0f} points against that, so it has no area."
    )
    return f"## Accuracy under parallelism\n\n{note}\n\n" + table(["method", *results.aup], lines)


def _published(results: Results) -> str:
    expected = results.config.expected
    if not expected:
        return ""
    lines = []
    for figure in expected:
        cells = [c for c in results.cells if c["task"] == figure.task and figure.setting in (None, c["setting"])]
        shown: Sequence[Cell | None] = cells or [None]
        for cell in shown:
            ours = _value(cell, figure.metric) if cell else None
            gap = "–" if ours is None else f"{ours - figure.value:+.2f}"
            setting = figure.setting or (cell["setting"] if cell else "–")
            lines.append([figure.task, setting, figure.metric, number(figure.value), number(ours), gap, figure.source])
    head = ["task", "setting", "figure", "published", "ours", "difference", "source"]
    model = ", ".join(dict.fromkeys(s.model.title for s in results.config.settings))
    return f"## Beside the published figures\n\nOurs with {model}; accuracies in percent.\n\n" + table(head, lines)


def _value(cell: Cell, metric: str) -> float | None:
    """A cell's figure by the name that `expected:` uses; accuracy in percent, as papers print it."""
    if metric == "accuracy":
        return 100 * cell["accuracy"]
    figures = {**cell.get("clock", {}), **cell}
    value = figures.get(metric)
    return float(value) if isinstance(value, int | float) else None
