"""The samplers, one file a method, and everything that the author of one imports (docs/adding-a-sampler.md).

`registry` has the names of the samplers.
"""

# ruff: noqa: E402, I001
# fmt: off
import dllm

dllm.of_one_tree()  # before anything of another copy loads

from dllm.decoding.canvas import Canvas, Decision, Fed, Leaf, Leaves, Plan, Span, State
from dllm.decoding.columns import spans
from dllm.decoding.constants import Constant
from dllm.decoding.noise import ORDER, REMASK, TRANSFER, uniform
from dllm.decoding.prediction import Law, Prediction
from dllm.decoding.slots import (
    Adjust, Amend, Attention, Context, Forward, Hold, Inputs, Needs, Schedule, Score, Select, View, Window, best,
    best_each, rank,
)
from dllm.samplers.base import OFF, Assumed, Bundle, Method, Presets, Sized, param
from dllm.samplers.blocks import BlockMemory, Blocks

__all__ = [
    "OFF", "ORDER", "REMASK", "TRANSFER", "Adjust", "Amend", "Assumed", "Attention", "BlockMemory", "Blocks", "Bundle",
    "Canvas", "Constant", "Context", "Decision", "Fed", "Forward", "Hold", "Inputs", "Law", "Leaf", "Leaves", "Method",
    "Needs", "Plan", "Prediction", "Presets", "Schedule", "Score", "Select", "Sized", "Span", "State", "View",
    "Window", "best", "best_each", "param", "rank", "spans", "uniform",
]
