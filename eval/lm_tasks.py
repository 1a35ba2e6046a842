"""lm-eval's task files as they are: their prompts, shots, stops and filters, with local files for their documents and
a confined place for the programs that they have checked.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dllm.errors import DllmError
from dllm.eval import data
from dllm.eval.config import TaskSpec
from dllm.eval.records import Decoding, Sample
from dllm.eval.tasks import Unavailable, confined
from dllm.eval.tasks.files import defined
from dllm.eval.tasks.scorers import UNCONFINED_NOTE

try:
    import evaluate
    from lm_eval import evaluator
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.api.task import Task as LMTask
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise DllmError(f"lm-eval is missing ({error}): pip install 'dllm-toolkit[eval]'") from None
try:
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError:  # before 0.4.11
    from lm_eval.utils import load_yaml_config as load_yaml

log = logging.getLogger(__name__)
T = TypeVar("T")
Theirs = Mapping[str, Any]  # of lm-eval: a task file, its results, a sample that it logged
TaskFile = dict[str, Any]


class CodeEval:
    """What `evaluate.load("code_eval")` is for a task file, with the programs confined.

    heads     beginnings of functions that benchmarks gave (`learn`): of a program that begins with one, its helpers
              are the benchmark's, and only the function that it leaves open is the program's
    names     of checks of MBPP's shape: what the reference solution defines is the program's, also Python's own names
    """

    heads: ClassVar[set[str]] = set()
    names: ClassVar[dict[str, list[str]]] = {}

    @classmethod
    def learn(cls, doc: object) -> None:
        """Note the head of a document of HumanEval's shape, the names of one of MBPP's."""
        if isinstance(doc, Mapping) and isinstance(doc.get("prompt"), str) and "entry_point" in doc:
            cls.heads.add(doc["prompt"])
        elif isinstance(doc, Mapping) and isinstance(doc.get("test_list"), list) and isinstance(doc.get("code"), str):
            check = "\n".join(map(str, doc["test_list"][:3]))  # as MBPP's task files join them
            cls.names[check] = defined(doc["code"], check)

    def passes(self, program: str, check: str) -> bool:
        """Whether a program stands its check."""
        head = max((head for head in self.heads if program.startswith(head)), key=len, default="")
        asked = re.search(r"^check\((\w+)\)\s*\Z", check, re.MULTILINE)
        entries = [asked[1]] if head and asked else self.names.get(check, [])
        return confined.run(program, check, context=head, entries=entries).passed

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: object
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """pass@k of the programs of every reference (unbiased, arXiv 2107.03374), and which of them passed."""
        passed = {
            i: [self.passes(program, check) for program in programs]
            for i, (check, programs) in enumerate(zip(references, predictions, strict=True))
        }
        enough = [n for n in k if all(len(found) >= n for found in passed.values())]  # `evaluate` leaves out others too
        scores = {f"pass@{n}": sum(_at(n, found) for found in passed.values()) / max(1, len(passed)) for n in enough}
        return scores, passed


def _at(k: int, passed: Sequence[bool]) -> float:
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


@functools.cache
def confine() -> None:
    """From here on `code_eval` is ours for every task file that this process loads, and a task that runs programs by
    itself is refused without leave: the published ones run them with all that this process may do."""
    evaluate.load = functools.partial(_loaded, evaluate.load)
    evaluator.evaluate = _guarded(evaluator.evaluate)


def _loaded(published: Callable[..., object], path: str, *arguments: object, **more: object) -> object:
    """`evaluate.load` with our `code_eval`."""
    return CodeEval() if path == "code_eval" else published(path, *arguments, **more)


def _guarded(published: Callable[..., T]) -> Callable[..., T]:
    """lm-eval's `evaluate`: programs that we run need no consent, others need ours besides lm-eval's."""

    @functools.wraps(published)
    def evaluate(lm: LM, task_dict: Theirs, *arguments: object, **more: object) -> T:
        for name, task in _members(task_dict):
            if ours(task):
                if reason := confined.refusal():
                    raise Unavailable(f"{name} runs generated programs: {reason}")
                task.UNSAFE_CODE = False
            elif not confined.unconfined_allowed():
                raise Unavailable(f"{name} runs generated programs itself, unconfined; --allow-unconfined-code lets it")
            else:
                log.warning("%s", confined.UNCONFINED)
        return published(lm, task_dict, *arguments, **more)

    return evaluate


def _members(tasks: Theirs) -> Iterator[tuple[str, LMTask]]:
    """The tasks that have programs checked, those of groups too."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _members(task)
        elif getattr(task, "UNSAFE_CODE", False):  # foreign
            yield str(name), task


def ours(task: LMTask) -> bool:
    """Whether it is us who run a task's programs."""
    kept = getattr(task, "_metric_fn_list", {}).values()  # foreign
    return _call_ours([getattr(f, "__self__", f) for f in kept])  # foreign: it keeps f.__call__


def _call_ours(functions: Iterable[object]) -> bool:
    names = [getattr(f, "__globals__", {}) for f in functions]  # foreign
    return any(isinstance(value, CodeEval) for own in names for value in own.values())


def prepared(spec: TaskSpec, manager: TaskManager, folder: str | None) -> tuple[ConfigurableTask | str, Decoding]:
    """What `simple_evaluate` takes for a task, and options that go with it: the task with its documents from local
    files where the entry or a `folder` of local data has them, a group or tag by its name. Errors: `Unavailable`, with
    what is missing."""
    name = spec.name.removeprefix("lm-eval:")
    entry = manager.task_index.get(name)
    file = entry.get("yaml_path") if isinstance(entry, Mapping) else getattr(entry, "yaml_path", None)  # foreign
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
        raise Unavailable(f"its documents cannot be had: {one_line(error)}{advice}") from None


def _code(config: TaskFile) -> Decoding:
    """The consent that lm-eval asks for before it has programs checked: given where it is us who run them, confined."""
    functions = [metric["metric"] for metric in config.get("metric_list") or () if callable(metric["metric"])]
    if not (config.get("unsafe_code") and _call_ours(functions)):
        return {}
    if reason := confined.refusal():
        raise Unavailable(f"it runs generated programs: {reason}")
    return {"confirm_run_unsafe_code": True}


def note(options: Mapping[str, object]) -> Sample:
    """What the samples of a prepared task say of their verdicts: nothing, or that no program was confined."""
    free = options.get("confirm_run_unsafe_code") and isinstance(confined.sandbox(), confined.Unconfined)
    return {"note": UNCONFINED_NOTE} if free else {}


def _read(name: str, file: Path) -> TaskFile:
    try:
        return dict(load_yaml(file))
    except Exception as error:
        log.debug("lm-eval cannot read %s", file, exc_info=True)
        raise Unavailable(f"lm-eval cannot load {name}: {one_line(error)}") from None


def _local(spec: TaskSpec, config: TaskFile, folder: str | None) -> TaskFile:
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
            hint = f" (`dllm data get {name} --to {folder}` where there is a network)" if name else ""
            drawn_from = f"its {shots} shots are drawn from {file}, which is not there"
            raise Unavailable((f"no file {file}" if split == asked else drawn_from) + hint)
    kept = {key: config.get(key) if config.get(key) in files else None for key in _SPLITS}
    source = {"data_files": {split: str(file) for split, file in files.items()}}
    return {**kept, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}


_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def one_line(error: Exception) -> str:
    """What another library's error says, with its class."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
