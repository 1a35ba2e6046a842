"""Evaluation: `dllm.eval.run("config.yaml")` decodes tasks under many settings and reports accuracy beside work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dllm

if TYPE_CHECKING:
    from dllm.eval.comparison import compare
    from dllm.eval.config import Config, load
    from dllm.eval.results import Results, read
    from dllm.eval.runner import run
    from dllm.eval.tuning import tune

dllm.of_one_tree()

_HOMES = {
    "dllm.eval.comparison": "compare",
    "dllm.eval.config": "Config load",
    "dllm.eval.results": "Results read",
    "dllm.eval.runner": "run",
    "dllm.eval.tuning": "tune",
}
__all__ = ["Config", "Results", "compare", "load", "read", "run", "tune"]

if not TYPE_CHECKING:
    __getattr__ = dllm.lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
