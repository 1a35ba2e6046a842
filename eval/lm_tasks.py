"""lm-eval's task files as they are: their prompts, shots, stops and filters, with local files for their documents and
a confined place for the programs that they have checked.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm.errors import DllmError

from . import data
from .config import TaskSpec
from .tasks.base import Unavailable
from .tasks.confined import refusal, run

try:
    import evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise DllmError(f"lm-eval is missing ({error}): pip install 'dllm-toolkit[eval]'") from None
try:
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError:  # before 0.4.11
    from lm_eval.utils import load_yaml_config as load_yaml

log = logging.getLogger(__name__)
Config = dict[str, Any]


class CodeEval:
    """What `evaluate.load("code_eval")` is for a task file, with the programs confined."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """pass@k of the programs of every reference (unbiased, arXiv 2107.03374), and which of them passed."""
        passed = {
            i: [run(program, check).passed for program in programs]
            for i, (check, programs) in enumerate(zip(references, predictions, strict=True))
        }
        return {f"pass@{n}": sum(_at(n, found) for found in passed.values()) / max(1, len(passed)) for n in k}, passed


def _at(k: int, passed: Sequence[bool]) -> float:
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


@contextlib.contextmanager
def _confined() -> Iterator[None]:
    """Task files that load `code_eval` meanwhile get ours: the published one runs programs in this process' reach."""
    published = evaluate.load
    evaluate.load = lambda path, *args, **more: CodeEval() if path == "code_eval" else published(path, *args, **more)
    try:
        yield
    finally:
        evaluate.load = published


def prepared(spec: TaskSpec, manager: TaskManager, folder: str | None) -> tuple[Any, dict[str, Any]]:
    """What `simple_evaluate` takes for a task, and options that go with it: the task with its documents from local
    files where the entry or a `folder` of local data has them, a group or tag by its name. Errors: `Unavailable`, with
    what is missing."""
    name = spec.name.removeprefix("lm-eval:")
    entry = manager.task_index.get(name)
    file = entry.get("yaml_path") if isinstance(entry, Mapping) else getattr(entry, "yaml_path", None)
    config = _read(name, Path(file)) if isinstance(file, str | Path) else {}
    if config.get("task") != name or "class" in config:
        return name, {}
    options = _code(config)
    local = _local(spec, config, folder)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    try:
        return ConfigurableTask(config={**config, **local}), options
    except Exception as error:
        log.debug("lm-eval cannot build %s", name, exc_info=True)
        hint = data.named(str(config.get("dataset_path")))
        advice = f"; `dllm data get {hint} --to FOLDER` and --data FOLDER" if hint and not local else ""
        raise Unavailable(f"its documents cannot be had: {_line(error)}{advice}") from None


def _code(config: Config) -> dict[str, Any]:
    """The consent that lm-eval asks for before it has programs checked: given where it is us who run them, confined."""
    functions = [metric["metric"] for metric in config.get("metric_list") or () if callable(metric["metric"])]
    ours = any(isinstance(value, CodeEval) for f in functions for value in f.__globals__.values())
    if not (config.get("unsafe_code") and ours):
        return {}
    if reason := refusal():
        raise Unavailable(f"it runs generated programs: {reason}")
    return {"confirm_run_unsafe_code": True}


def _read(name: str, file: Path) -> Config:
    try:
        with _confined():
            return dict(load_yaml(file))
    except Exception as error:
        log.debug("lm-eval cannot read %s", file, exc_info=True)
        raise Unavailable(f"lm-eval cannot load {name}: {_line(error)}") from None


def _local(spec: TaskSpec, config: Config, folder: str | None) -> Config:
    """The changes that give a task local files: only where its documents come from, never what is asked."""
    own = config.get("num_fewshot") or 0
    shots = own if config.get("num_fewshot") == 0 else spec.options.get("num_fewshot", own)  # lm-eval keeps a 0
    asked = config.get("test_split") or config.get("validation_split") or "test"
    drawn = config.get("fewshot_split") or config.get("training_split") or asked
    in_file = (config.get("fewshot_config") or {}).get("samples") is not None
    name = data.named(str(config.get("dataset_path")))
    files = {}
    if spec.path:
        files[asked] = Path(spec.path)
    elif folder and name:
        files[asked] = data.path(folder, name, asked)
    else:
        return {}
    if shots and not in_file:
        files[drawn] = Path(spec.shots_path) if spec.shots_path else data.path(folder or "", name or "", drawn)
    for split, file in files.items():
        if not file.is_file():
            why = (
                f"its {shots} shots are drawn from {file}, which is not there" if split != asked else f"no file {file}"
            )
            raise Unavailable(
                why + (f" (`dllm data get {name} --to {folder}` where there is a network)" if name else "")
            )
    kept = {key: config.get(key) if config.get(key) in files else None for key in _SPLITS}
    source = {"data_files": {split: str(file) for split, file in files.items()}}
    return {**kept, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}


_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
