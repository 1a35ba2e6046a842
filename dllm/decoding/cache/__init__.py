"""Cache policies: which positions a step recomputes, which keys it sees, what stays in the store.

The author of a policy imports from here what docs/adding-a-cache.md explains.
"""

from dllm.decoding.cache.policy import Policy, full_plan, gather_plan, span_plan
from dllm.decoding.canvas import Cached, Canvas, Plan, Span, State
from dllm.decoding.columns import between, indices, marked
from dllm.spec import param

__all__ = [
    "Cached", "Canvas", "Plan", "Policy", "Span", "State", "between", "full_plan", "gather_plan", "indices", "marked",
    "param", "span_plan",
]  # fmt: skip
