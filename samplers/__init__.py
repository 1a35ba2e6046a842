"""The samplers, one file a method, and everything that the author of one imports (docs/adding-a-sampler.md).

The names load lazily; `registry` has those of the samplers.
"""

# ruff: noqa: F401, I001  # the imports are for type checkers
from importlib import import_module
from typing import TYPE_CHECKING

import dllm

if TYPE_CHECKING:
    from dllm.decoding.canvas import Canvas, Decision, Leaf, Leaves, Plan, Span, State
    from dllm.decoding.columns import spans
    from dllm.decoding.noise import ORDER, REMASK, TRANSFER, uniform
    from dllm.decoding.prediction import Law, Prediction
    from dllm.decoding.slots import (
        Adjust, Amend, Context, Forward, Hold, Inputs, Needs, Schedule, Score, Select, View, Window, best, rank,
    )  # fmt: skip
    from dllm.samplers.base import OFF, Assumed, Bundle, Method, Presets, param
    from dllm.samplers.blocks import BlockMemory, Blocks

_NAMES = {
    "decoding.canvas": "Canvas Decision Leaf Leaves Plan Span State",
    "decoding.columns": "spans",
    "decoding.noise": "ORDER REMASK TRANSFER uniform",
    "decoding.prediction": "Law Prediction",
    "decoding.slots": "Adjust Amend Context Forward Hold Inputs Needs Schedule Score Select View Window best rank",
    "samplers.base": "OFF Assumed Bundle Method Presets param",
    "samplers.blocks": "BlockMemory Blocks",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOME]  # noqa: PLE0604
dllm.of_one_tree()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return vars(import_module(f"dllm.{_HOME[name]}"))[name]
