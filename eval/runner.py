"""`run(config)`: from a configuration to a run folder with samples, results and a report."""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from dllm.call.arguments import Arguments
from dllm.decoding.cache import registry as caches
from dllm.drafting.config import SpecConfig
from dllm.drafting.registry import is_drafter_name
from dllm.errors import DllmError
from dllm.eval import engines, metrics
from dllm.eval.config import Config, GenerateSpec, ModelSpec, Setting, TaskSpec, load
from dllm.eval.data import rehearse as examples
from dllm.eval.drafting import compared
from dllm.eval.peers import check_options
from dllm.eval.records import Environment, Sample
from dllm.eval.report import report
from dllm.eval.results import Found, Results, areas, results_of
from dllm.eval.store import Store, write, write_csv
from dllm.eval.tasks import confined
from dllm.eval.tasks.base import Task, takes
from dllm.eval.tasks.scorers import UNCONFINED_NOTE
from dllm.eval.worker import Batch, available, environment, occasion
from dllm.lookahead.setting import Lookahead
from dllm.samplers import registry
from dllm.spec import Source

log = logging.getLogger(__name__)

TINY, TWIN = ModelSpec("tiny", device="cpu"), ModelSpec("tiny-ar")
DRY_DOCUMENTS, DRY_TOKENS, DRY_BLOCK = 2, 16, 8  # enough to pass through every part of a run in seconds
REHEARSED = (
    f"a rehearsal: the embedded model, {DRY_DOCUMENTS} documents a task, {DRY_TOKENS} tokens; its figures mean nothing"
)


def run(
    config: Config | Mapping[str, object] | str | Path,
    sets: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    data: str | Path | None = None,
    dry_run: bool = False,
    retry_errors: bool = False,
    progress: bool = True,
) -> Results:
    """Evaluate a configuration (a file, a mapping, or a `Config`) and write its run folder.

    Started again on the same folder it goes on where it stopped. `dry_run` puts the embedded model, two documents
    and short answers in place, to see that a configuration holds together. Errors: everything wrong with the
    configuration, before any decoding.
    """
    given = load(config, sets, limit=limit, seed=seed, out=out and str(out), data=data and str(data))
    if given.limit is not None and given.limit < 1:
        raise given.source.error(("limit",), f"{given.limit} leaves no document; the least is 1")
    if dry_run:
        given = rehearsal(given)
    check(given)
    own, foreign = _split(given)
    own, tasks, skipped = available(own)
    if not (tasks or foreign.tasks):
        raise _nothing(skipped)
    folder = Path(given.out or Path("runs") / given.name)
    if dry_run and given.data:
        examples(given.data)
    with closing(engines.start(own, str(folder), tasks)) as engine:
        if not engine.lead:  # the lead claims the folder first
            engine.wait()
        with closing(Store(folder, given, lead=engine.lead, retry=retry_errors and engine.lead)) as store:
            if engine.lead:
                engine.wait()
            weights, keys = _decode(own, engine, store, tasks, progress and engine.lead)
            engine.wait()
            store.reload()
            env: Environment = {**environment(), "weights": weights, "engine": given.engine.kind}
            rows = [row for key, row in store.rows.items() if key in keys]
            rows = compared(own, rows, engine.worker, tasks) if engine.lead else rows
            results = results_of(own, rows, tasks, folder, env)
            if foreign.tasks:
                found: Found = _lm_eval().run_tasks(foreign, store, engine.worker, engine.lead)
                cells, all_rows = (*results.cells, *found.cells), (*rows, *found.rows)
                results, skipped = replace(results, cells=cells, rows=all_rows), skipped | found.skipped
            if engine.lead and not results.cells:
                raise _nothing(skipped)
            results = replace(results, config=given, aup=areas(given, results.cells), lead=engine.lead)
            results = replace(results, notices=(*([REHEARSED] if dry_run else []), *_notices(results, skipped)))
            if engine.lead:
                plain = json.dumps(_finite(results.plain()), indent=2, ensure_ascii=False)
                write(folder / "results.json", plain + "\n")
                write_csv(folder / "results.csv", results.cells)
                write_csv(folder / "samples.csv", results.rows)
                report(results, figures=not dry_run)
            return results


def _notices(results: Results, skipped: Mapping[str, str]) -> Iterator[str]:
    """What a reader of the figures has to know."""
    yield from results.notices
    for cell in results.cells:
        if lossy := cell.get("drafting", {}).get("", {}).get("differ"):
            yield f"{cell['task']}, {cell['setting']}: {lossy} answers differ from the plain ones, at no tie of floats"
    for task in dict.fromkeys(cell["task"] for cell in results.cells):
        mine = [c for c in results.cells if c["task"] == task and c.get("cut")]
        if counts := [f"{c['cut']} of {c['n']} under {c['setting']}" for c in mine]:
            yield f"{task}: prompts were cut on the left to fit the model ({'; '.join(counts)})"
    yield from (f"{task} is left out: {why}" for task, why in skipped.items())
    if free := sum(row.get("note", "").startswith(UNCONFINED_NOTE) for row in results.rows):
        yield f"{confined.UNCONFINED} ({free} samples)"  # a program may have made its own verdict
    if bad := next((row for row in results.rows if row.get("error")), None):
        first = f"{bad['task']}, {bad['setting']}, document {bad['doc']}: {bad['error']}"
        yield f"{results.errors} samples failed and count as wrong; the first is {first}"


def _nothing(skipped: Mapping[str, str]) -> DllmError:
    return DllmError("no task can run here: " + "; ".join(f"{task}: {why}" for task, why in skipped.items()))


def _split(config: Config) -> tuple[Config, Config]:
    """The tasks that run here, and those that lm-eval runs."""
    here = tuple(t for t in config.tasks if not _foreign(t))
    return replace(config, tasks=here), replace(config, tasks=tuple(filter(_foreign, config.tasks)))


def _foreign(task: TaskSpec) -> bool:
    return task.name.startswith("lm-eval:")


def _lm_eval() -> ModuleType:
    """lm-eval's side, loaded where one of its tasks is asked for: the package is optional, and slow to import."""
    return import_module("dllm.eval.harness")


def check(config: Config) -> None:
    """Every sampler, cache and drafting exists and takes its parameters, and every decoding argument may have its
    value; the error names the place in the file."""
    for setting in config.settings:
        with _placed(setting.source, "sampler"):
            registry.check(setting.sampler or "confidence")
        with _placed(setting.source, "cache"):
            caches.policy(setting.cache)
        with _placed(setting.source, "generate"):
            given = Arguments(**setting.generate.given())
        with _placed(setting.source, "generate", "lookahead"):
            Lookahead.parse(given.lookahead or 1)
        if setting.speculate:
            if setting.speculate.loop == "transformers":
                with _placed(setting.source, "speculate", "options"):
                    check_options(setting.speculate.options)
                continue
            if "store" in setting.speculate.options and config.repeats > 1:
                raise config.source.error(("repeats",), "a store would have seen the text of the first pass: say 1")
            with _placed(setting.source, "speculate", "options"):
                drafting = SpecConfig.of(None, setting.speculate.options)
                drafting.build_search(given.temperature > 0)
                drafting.build_controller()
    for i, task in enumerate(config.tasks):
        with _placed(config.source, "tasks", i, "generate"):
            Arguments(**task.generate.given())
        with _placed(config.source, "tasks", i, "sampler"):
            registry.check(task.sampler or "confidence")
        with _placed(config.source, "tasks", i):
            if _foreign(task):
                takes(task, "options", "path", "shots_path")
                _lm_eval().check_task(task)


@contextmanager
def _placed(source: Source, *key: str | int) -> Iterator[None]:
    """Errors inside name this key and where it was given."""
    try:
        yield
    except DllmError as error:
        raise source.error(key, str(error)) from None
    except TypeError as error:
        raise source.error(key, f"does not fit: {error}") from None


def rehearsal(config: Config) -> Config:
    """The same evaluation on the embedded model, two documents a task, 16 tokens each."""

    def short(setting: Setting) -> Setting:
        g = setting.generate
        block = None if g.block_length is None else max(1, min(g.block_length, DRY_BLOCK))
        generate = replace(g, max_new_tokens=DRY_TOKENS, block_length=block, steps=g.steps and DRY_TOKENS, chat=None)
        spec = setting.speculate
        if spec is not None:
            local = spec.drafter.name == "none" or is_drafter_name(spec.drafter.name)
            own = ModelSpec("model") if spec.loop == "dllm" else TWIN
            options = {k: v for k, v in spec.options.items() if k != "speculation_type"}
            spec = replace(spec, verifier=TWIN, drafter=spec.drafter if local else own, options=options)
        return replace(setting, model=TINY, sampler=_own_filter(setting.sampler), generate=generate, speculate=spec)

    settings = tuple(map(short, config.settings))

    def small(task: TaskSpec) -> TaskSpec:
        options = {**task.options, "rehearse": True}
        if _foreign(task):  # our own documents, and no shots
            task, options = replace(task, path=None, shots_path=None), {**options, "num_fewshot": 0}
        sampler = _own_filter(task.sampler)
        return replace(task, limit=DRY_DOCUMENTS, sampler=sampler, generate=GenerateSpec(), options=options)

    tasks = tuple(map(small, config.tasks))
    out = config.out or f"runs/dry/{config.name}"
    small_run = replace(config, limit=None, batch_size=2, warmup=0, trace=min(config.trace, 1))
    return replace(small_run, settings=settings, tasks=tasks, out=out, data=f"{out}/data")


def _own_filter(sampler: registry.Spec | None) -> registry.Spec | None:
    """A sampler without the file of a trained filter, so that the embedded model's own is taken."""
    if isinstance(sampler, list):
        return [_own_filter(part) for part in sampler]
    return {k: v for k, v in sampler.items() if k != "filter"} if isinstance(sampler, dict) else sampler


# ------------------------------------------------------------------------------------------------------------- decoding


def batches(config: Config, settings: Sequence[int], sizes: Sequence[int]) -> Iterator[Batch]:
    """Fixed batches of documents: the same whatever was finished before, so that a resumed batch is the batch it
    was."""
    for task, size in enumerate(sizes):
        for start in range(0, size, config.batch):
            yield Batch(tuple(settings), task, start, min(start + config.batch, size))


def _decode(
    config: Config, engine: engines.Engine, store: Store, tasks: Sequence[Task], progress: bool
) -> tuple[dict[str, str], set[str]]:
    """Run every batch that is not finished and append its samples as they come: model by model, and of one model every
    batch under all settings before the next, so that no setting has the machine's best hour. Marks of the weights, and
    the keys of this configuration's samples."""
    sizes = [len(task.documents) for task in tasks]
    weights: dict[str, str] = {}
    done = set(store.rows)
    keys: set[str] = set()
    new: list[Sample] = []
    total = sum(sizes) * len(config.settings)
    with tqdm(total=total, unit="sample", disable=not progress, file=sys.stderr) as bar:
        for networks in dict.fromkeys(s.networks for s in config.settings):
            settings = [i for i, s in enumerate(config.settings) if s.networks == networks]
            for setting in settings:
                weights |= engine.weights(setting)
            if engine.lead:
                store.match_weights({**environment(), **occasion(), "weights": weights})
            cut = list(batches(config, settings, sizes))
            wanted = engine.keys(cut)
            named = set(itertools.chain.from_iterable(itertools.chain(*wanted)))
            keys |= named
            _unmixed(config, store, cut, wanted)
            bar.update(len(named & done))
            left = []
            for batch, of in zip(cut, wanted, strict=True):
                open_ = [s for s, mine in zip(batch.settings, of, strict=True) if not done.issuperset(mine)]
                left += [replace(batch, settings=tuple(open_))] if open_ else []
            for rows in engine.map(left):
                fresh = [row for row in rows if row["key"] not in done]
                store.append(fresh)
                new += fresh
                bar.set_postfix(_so_far(new), refresh=False)
                bar.update(len(fresh))
    return weights, keys


def _unmixed(config: Config, store: Store, cut: Sequence[Batch], wanted: Sequence[Sequence[Sequence[str]]]) -> None:
    """Errors: a sample of the same document under the same names that is not the one wanted now."""
    have = {(row["task"], row["setting"], row["index"]): key for key, row in store.rows.items()}
    for batch, each in zip(cut, wanted, strict=True):
        task = config.tasks[batch.task].title
        for i, keys in zip(batch.settings, each, strict=True):
            label = config.settings[i].label
            for index, key in zip(range(batch.start, batch.stop), keys, strict=True):
                if have.get((task, label, index), key) != key:
                    raise DllmError(
                        f"{store.folder} holds another sample of {task}, {label!r}, document {index}: its data or "
                        "the task have changed since; choose another folder with --out"
                    )


def _so_far(rows: Sequence[Sample]) -> dict[str, str]:
    """Accuracy, forwards and speed, for the progress bar."""
    seconds, n = sum(row["clock"]["share"] for row in rows), max(len(rows), 1)
    return {
        "acc": f"{sum(metrics.verdicts(rows)) / n:.1%}",
        "nfe": f"{sum(row['nfe'] for row in rows) / n:.1f}",
        "tps": f"{sum(row['tokens'] for row in rows) / seconds:.0f}" if seconds else "–",
    }


def _finite(value: object) -> object:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
