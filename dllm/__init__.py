"""dllm: a decoding toolkit for masked-diffusion language models.

The public names load lazily (PEP 562): importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm.errors import DllmError

try:
    __version__ = version("dllm-toolkit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HERE = Path(__file__).resolve().parent
__path__ = [str(_HERE)]  # an editable install is a tree of links: files go by their own names

_LAZY = {
    "generate": "dllm.call.generate",
    "stream": "dllm.call.generate",
    "score": "dllm.call.score",
    "cache_error": "dllm.call.cache_error",
    "Output": "dllm.call.output",
    "load": "dllm.models.hub",
    "load_verifier": "dllm.models.hub",
    "Model": "dllm.models.hub",
    "speculate": "dllm.drafting.front",
    "spec_generate": "dllm.drafting.hooks.transformers",
    "speculator": "dllm.drafting.hooks.transformers",
}
__all__ = [  # noqa: PLE0604
    *_LAZY,
    "__version__",
]


@functools.cache
def of_one_tree() -> None:
    """Errors: samplers or evaluation of another copy of the toolkit than this package. A checkout in the working folder
    hides the installed `dllm`, but not the installed `dllm.samplers`, which in a checkout lies beside it."""
    for name in ("samplers", "eval"):
        spec = find_spec(f"dllm.{name}")
        there = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if there is None:
            raise DllmError(f"dllm comes from {_HERE}, where dllm.{name} is missing: install it (pip install -e .)")
        if there.parent not in (_HERE, _HERE.parent):
            raise DllmError(
                f"dllm comes from {_HERE} but dllm.{name} from {there}: two copies are mixed. Install the one you mean "
                "(pip install -e .), or start Python outside of the other's folder"
            )


def __getattr__(name: str) -> Any:
    if name in _LAZY or name in ("samplers", "eval"):
        of_one_tree()
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in ("samplers", "eval", "training", "drafting", "models"):
        return import_module(f"dllm.{name}")
    raise AttributeError(f"module 'dllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
