"""Evaluation: `dllm.eval.run("config.yaml")` decodes tasks under many settings and reports accuracy beside work."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import dllm

dllm.of_one_tree()

_LAZY = {
    "run": "runner",
    "read": "runner",
    "Results": "runner",
    "load": "config",
    "Config": "config",
    "compare": "comparison",
    "tune": "tuning",
}
__all__ = ["Config", "Results", "compare", "load", "read", "run", "tune"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"dllm.eval.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'dllm.eval' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
