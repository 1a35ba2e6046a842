"""Evaluation: `dllm.eval.run("config.yaml")` decodes tasks under many settings and reports accuracy beside work."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import dllm

if TYPE_CHECKING:
    from dllm.eval.comparison import compare
    from dllm.eval.config import Config, load
    from dllm.eval.results import Results, read
    from dllm.eval.runner import run
    from dllm.eval.tuning import tune

dllm.of_one_tree()

_LAZY = {
    "run": "runner",
    "read": "results",
    "Results": "results",
    "load": "config",
    "Config": "config",
    "compare": "comparison",
    "tune": "tuning",
}
__all__ = ["Config", "Results", "compare", "load", "read", "run", "tune"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return vars(import_module(f"dllm.eval.{_LAZY[name]}"))[name]
    raise AttributeError(f"module 'dllm.eval' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
