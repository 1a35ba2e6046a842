"""Cache policies: which positions a step recomputes, which keys it sees, what stays in the store.

The author of a policy imports from here what docs/adding-a-cache.md explains.
"""

from dllm.decoding.cache.policy import Policy, everything, stretch
from dllm.decoding.canvas import Cached, Canvas, Fed, Span, State
from dllm.decoding.columns import marked
from dllm.spec import param

__all__ = ["Cached", "Canvas", "Fed", "Policy", "Span", "State", "everything", "marked", "param", "stretch"]
