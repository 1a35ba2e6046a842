"""The tasks: those that the toolkit generates, any JSON lines of the user's, the shapes of the usual benchmarks."""

from __future__ import annotations

from dllm.errors import DllmError, unknown
from dllm.eval.config import TaskSpec
from dllm.eval.tasks import confined, embedded, files
from dllm.eval.tasks.base import Document, Graded, Task, Unavailable

__all__ = ["Document", "Graded", "Task", "Unavailable", "load", "names"]


def names() -> list[str]:
    """Every task name that a configuration may use, apart from `lm-eval:<task>`."""
    return [*embedded.NAMES, *files.NAMES]


def load(spec: TaskSpec, limit: int | None = None) -> Task:
    """The task a spec describes, cut to `limit` documents. Errors: unknown name, broken file, code that cannot be
    confined."""
    limit = min((n for n in (limit, spec.limit) if n is not None), default=None)
    if limit is not None and limit < 1:
        raise DllmError(f"limit {limit} leaves no document; the least is 1")
    if spec.name not in names():
        raise unknown("task", spec.name, names())
    read = embedded.load if spec.name in embedded.NAMES else files.load
    task = read(spec, limit)
    if task.runs_code and (reason := confined.refusal()):
        raise Unavailable(f"it runs generated programs: {reason}")
    return task
