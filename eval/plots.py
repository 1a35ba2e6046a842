"""The figures of a report: accuracy against tokens per forward, commit order, accepted drafts, forwards per sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dllm.decoding.trace import Trace
from dllm.eval.metrics import frontier
from dllm.eval.records import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Okabe and Ito's colours, told apart by every eye; markers repeat the distinction for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D3B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def possible() -> bool:
    """Whether matplotlib is installed; a warning where it is not."""
    if not (found := find_spec("matplotlib") is not None):
        log.warning("no figures: matplotlib is missing (pip install 'dllm-toolkit[plots]')")
    return found


def _canvas(width: float, height: float, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches, with axes below one another. It needs no display, and no state is shared."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True, sharey=True, squeeze=False)[:, 0]


def accuracy_against_tpf(cells: Sequence[Cell], methods: Mapping[str, str], path: Path, title: str) -> Path | None:
    """One point a setting with its interval, the settings of a method (`methods`: setting -> method) in one colour and
    joined, the frontier drawn through the points that none beats."""
    shown = [c for c in cells if c["tpf"] is not None and not math.isnan(c["tpf"])]
    if not shown:
        return None
    points = [(c["tpf"], 100 * c["accuracy"]) for c in shown]
    figure, (axes,) = _canvas(7.2, 4.6)
    best = [points[i] for i in frontier(points)]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color="0.7", lw=1.5, zorder=1, label="frontier")
    for i, name in enumerate(dict.fromkeys(methods[c["setting"]] for c in shown)):
        curve = [(c, p) for c, p in zip(shown, points, strict=True) if methods[c["setting"]] == name]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(*zip(*sorted(p for _, p in curve), strict=True), color=colour, lw=1, ls=":", zorder=1)
        for j, (cell, (x, y)) in enumerate(curve, i + i // len(COLOURS)):  # where colours begin again, other markers
            error = [[max(0.0, y - 100 * cell["low"])], [max(0.0, 100 * cell["high"] - y)]]
            style = {"color": colour, "marker": MARKERS[j % len(MARKERS)], "label": cell["setting"]}
            axes.errorbar(x, y, yerr=error, ms=7, lw=1, capsize=2, ls="none", zorder=2, **style)
    axes.set(xlabel="tokens per forward", ylabel="accuracy, %", title=title)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _save(figure, path)


def panels(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path, columns: int) -> Path:
    """Accuracy in percent against tokens per forward: a panel for each title, in it a curve for each method, through
    its points in their order."""
    from matplotlib.figure import Figure

    rows = -(-len(curves) // columns)
    figure = Figure((3.4 * columns, 0.6 + 3.0 * rows), layout="constrained")
    methods = list(dict.fromkeys(name for panel in curves.values() for name in panel))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, curves.items(), strict=False):
        for name, points in panel.items():
            again, i = divmod(methods.index(name), len(COLOURS))  # where colours begin again: other markers, dashes
            style = {"color": COLOURS[i], "marker": MARKERS[(i + again) % len(MARKERS)], "ls": "--" if again else "-"}
            axes.plot(*zip(*points, strict=True), ms=5, lw=1, alpha=0.8, label=name, **style)
        axes.set(title=title, xlabel="tokens per forward")
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.set_ylim(-3, 103)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy, %")
    known = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return _save(figure, path)


def commit_order(traces: Sequence[tuple[str, Trace]], path: Path, title: str, width: int | None = None) -> Path | None:
    """One line a setting, one column a position: the colour is the forward that wrote it, on a logarithmic scale, since
    one setting takes two forwards where another takes forty. Grey was never written.

    `width` cuts the columns, since behind the longest answer there is only padding.
    """
    if not traces:
        return None
    from matplotlib import colormaps

    orders = [written(trace) for _, trace in traces]
    longest = max(len(order) for order in orders)
    width = min(longest, width or longest)
    grid = np.full((len(traces), width), np.nan)
    for line, order in enumerate(orders):
        grid[line, : len(order)] = order[:width]
    figure, (axes,) = _canvas(max(6.0, 2.6 + 0.1 * width), 1.3 + 0.42 * len(traces))
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    last = max(2.0, float(np.nanmax(grid, initial=1)))
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=colours, norm="log", vmin=1, vmax=last)
    counts = [len(trace.commits) for _, trace in traces]
    names = [f"{name}  ({n} forward{'s' if n != 1 else ''})" for (name, _), n in zip(traces, counts, strict=True)]
    axes.set_yticks(range(len(traces)), names, fontsize=8)
    axes.set(xlabel="position in the answer", title=title)
    ticks = [2**i for i in range(int(math.log2(last)) + 1)]
    bar = figure.colorbar(image, ax=axes, label="written by forward")
    bar.set_ticks(ticks, labels=list(map(str, ticks)), minor=False)
    bar.minorticks_off()
    return _save(figure, path)


def written(trace: Trace) -> list[float]:
    """The forward (from 1) that wrote each column behind the prompt; NaN where none did."""
    order, start = trace.order, len(trace.prompt)
    end = max([len(trace.final), *(column + 1 for column in order)], default=start)
    return [order[column] + 1 if column in order else math.nan for column in range(start, end)]


def accepted(counts: Mapping[str, Sequence[int]], path: Path, title: str) -> Path | None:
    """How many draft tokens the verifier took in each cycle, one histogram a setting below one another."""
    if not counts:
        return None
    top = max(max(values) for values in counts.values())
    figure, rows = _canvas(7.2, 1.0 + 1.5 * len(counts), len(counts))
    for i, (axes, (name, values)) in enumerate(zip(rows, counts.items(), strict=True)):
        axes.hist(values, np.arange(-0.5, top + 1.5), density=True, rwidth=0.85, color=COLOURS[i % len(COLOURS)])
        axes.axvline(np.mean(values), color="0.3", lw=1, ls="--")
        axes.set_title(f"{name}  (mean {np.mean(values):.2f})", fontsize=9, loc="left")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    figure.supxlabel("accepted draft tokens in a cycle", fontsize=10)
    figure.supylabel("share of cycles", fontsize=10)
    return _save(figure, path)


def forwards(rows: Mapping[str, Sequence[int]], path: Path, title: str) -> Path | None:
    """The spread of forwards over samples, one box a setting."""
    if not rows:
        return None
    figure, (axes,) = _canvas(7.2, 1.2 + 0.38 * len(rows))
    axes.boxplot(
        list(rows.values())[::-1], orientation="horizontal", tick_labels=list(rows)[::-1], flierprops={"ms": 3}
    )
    axes.set(xlabel="forwards of a sample", title=title)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
