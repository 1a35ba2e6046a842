"""dllm: a decoding toolkit for masked-diffusion language models.

The public names load lazily (PEP 562): importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING

from dllm.errors import DllmError as DllmError

if TYPE_CHECKING:  # the same names for checkers and editors
    from dllm.call.arguments import DecodingArguments as DecodingArguments
    from dllm.call.cache_error import cache_error as cache_error
    from dllm.call.engine import Engine as Engine
    from dllm.call.generate import generate as generate
    from dllm.call.generate import stream as stream
    from dllm.call.output import Event as Event
    from dllm.call.output import Output as Output
    from dllm.call.prompts import Prompt as Prompt
    from dllm.call.reads import Reading as Reading
    from dllm.call.reads import read as read
    from dllm.call.score import score as score
    from dllm.call.transformers import generation_arguments as generation_arguments
    from dllm.call.transformers import text_pipeline as text_pipeline
    from dllm.decoding.constraints.constraint import Constraint as Constraint
    from dllm.decoding.trace import Trace as Trace
    from dllm.drafting.front import speculate as speculate
    from dllm.drafting.hooks.transformers import spec_generate as spec_generate
    from dllm.drafting.hooks.transformers import speculator as speculator
    from dllm.drafting.store import Store as Store
    from dllm.models.hub import load as load
    from dllm.models.hub import load_verifier as load_verifier
    from dllm.models.model import Model as Model

try:
    __version__ = version("dllm-toolkit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HERE = Path(__file__).resolve().parent
__path__ = [str(_HERE)]  # an editable install is a tree of links: files go by their own names

_HOMES = {
    "dllm.call.arguments": "DecodingArguments",
    "dllm.call.cache_error": "cache_error",
    "dllm.call.engine": "Engine",
    "dllm.call.generate": "generate stream",
    "dllm.call.output": "Event Output",
    "dllm.call.prompts": "Prompt",
    "dllm.call.reads": "Reading read",
    "dllm.call.score": "score",
    "dllm.call.transformers": "generation_arguments text_pipeline",
    "dllm.decoding.constraints.constraint": "Constraint",
    "dllm.decoding.trace": "Trace",
    "dllm.drafting.front": "speculate",
    "dllm.drafting.hooks.transformers": "spec_generate speculator",
    "dllm.drafting.store": "Store",
    "dllm.models.hub": "load load_verifier",
    "dllm.models.model": "Model",
}
_ROOMS = ("models", "decoding", "samplers", "lookahead", "call", "drafting", "training", "eval", "bench", "tasks")
__all__ = [*" ".join(_HOMES.values()).split(), "DllmError", "__version__"]  # noqa: PLE0604


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


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names load when they are first asked for; `homes` has them by module."""
    home = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return vars(import_module(home[name]))[name]

    return find


if not TYPE_CHECKING:  # a checker would take every misspelt name for one of these
    _find = lazy("dllm", _HOMES)

    def __getattr__(name: str) -> object:
        if name in _ROOMS or name in __all__:
            of_one_tree()
        return import_module(f"dllm.{name}") if name in _ROOMS else _find(name)


def __dir__() -> list[str]:
    return sorted(__all__)


# -- former places (assets/moved.json): they work for one release, with a warning -------------------------------------


@functools.cache
def _moves() -> dict[str, dict[str, list[str]]]:
    """By former module, and by former name where that has changed too: the places to look."""
    table: dict[str, dict[str, list[str]]] = json.loads((_HERE / "assets" / "moved.json").read_text(encoding="utf-8"))
    return table


def moved(former: str) -> Callable[[str], object]:
    """The `__getattr__` of a module that has lost names: finds them where they are now, and warns."""

    def find(name: str) -> object:
        places = [f"{place}.{name}" for place in _moves()["modules"][former]]
        for place in [] if name.startswith("__") else _moves()["names"].get(f"{former}.{name}", places):
            module, _, attribute = place.rpartition(".")
            if attribute in (found := vars(import_module(module))):
                warnings.warn(f"{former}.{name} is now {place}", DeprecationWarning, stacklevel=2)
                return found[attribute]
        raise AttributeError(f"module {former!r} has no attribute {name!r}")

    return find


class _Thinned(SourceFileLoader):
    """Loads a module that has lost names, and lets it find them."""

    def exec_module(self, module: ModuleType) -> None:
        """Before its own `__getattr__`, if it has one."""
        vars(module)["__getattr__"] = moved(module.__name__)
        super().exec_module(module)


class _Former(MetaPathFinder, Loader):
    """Finds modules under their former names, and those that have only lost names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of the module that stands in for the former one, unless that is still there."""
        if not name.startswith("dllm.") or name not in _moves()["modules"]:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        found = next(filter(None, others), None) or ModuleSpec(name, self)
        if isinstance(found.loader, SourceFileLoader):
            found.loader = _Thinned(name, str(found.loader.path))
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Let it find its names."""
        places = ", ".join(_moves()["modules"][module.__name__])
        warnings.warn(f"{module.__name__} is now {places}", DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = moved(module.__name__)

    def get_code(self, name: str) -> CodeType:
        """For `python -m`: the program that stands in the new place."""
        place = _moves()["modules"][name][-1]
        warnings.warn(f"python -m {name} is now python -m {place}", FutureWarning, stacklevel=2)
        return compile(f"import runpy\nrunpy.run_module({place!r}, run_name='__main__', alter_sys=True)", name, "exec")


sys.meta_path[:] = [_Former(), *(f for f in sys.meta_path if type(f).__name__ != "_Former")]  # one, after a reload too
