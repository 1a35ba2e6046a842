"""dllm: a decoding toolkit for masked-diffusion language models.

The public names load lazily (PEP 562): importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("dllm-toolkit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "generate": "dllm.generation",
    "stream": "dllm.generation",
    "score": "dllm.generation",
    "cache_error": "dllm.staleness",
    "Output": "dllm.generation",
    "load": "dllm.models.hub",
    "load_verifier": "dllm.models.hub",
    "Model": "dllm.models.hub",
    "speculate": "dllm.drafting.speculation",
    "spec_generate": "dllm.drafting.transformers_hook",
    "speculator": "dllm.drafting.transformers_hook",
}
__all__ = [  # noqa: PLE0604
    *_LAZY,
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in ("samplers", "eval", "training", "drafting", "models"):
        return import_module(f"dllm.{name}")
    raise AttributeError(f"module 'dllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
