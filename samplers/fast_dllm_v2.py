"""Fast-dLLM v2 (arXiv 2509.26328): threshold decoding in sub-blocks; a block's first token comes from the left.

Logits are shifted, so the last token of a finished block predicts the first one of the next: the forward that commits
the finished block commits that token too, whatever its confidence. The other columns of the block are read afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dllm.errors import DllmError
from dllm.samplers import OFF, Blocks, Bundle, Context, Method, Needs, Span, State, param, spans
from dllm.samplers.threshold import Threshold


@dataclass(frozen=True)
class SubBlocks(Blocks):
    """Sub-blocks of `length` columns. The first column of a block of `block` columns has a step of its own."""

    block: int = field(default=32, metadata={"why": "columns of the model's block"})

    def open(self, state: State) -> tuple[State, Span]:
        """The open sub-block; the first column of a block by itself."""
        state, window = super().open(state)
        first = window.lo[:, None].clamp(max=state.canvas.ids.shape[1] - 1)
        masked = state.canvas.masked.gather(1, first)[:, 0]
        head = masked & (window.lo % self.block == 0)
        hi = torch.where(head, window.lo + 1, window.hi)
        begin = torch.where(masked, window.lo, window.lo + 1)  # a known first column is not read again
        return state, window._replace(hi=hi, reads=spans(begin, hi, window.reads.shape[1]))


@dataclass(frozen=True)
class FastDLLMv2(Method):
    """Threshold decoding in sub-blocks, for models with shifted logits and block-causal attention."""

    tau: float = param(
        0.9, "the bar where no other sampler selects: the released example; its code defaults to 1", low=0, high=OFF
    )
    sub: int = param(8, "columns of a sub-block, the released default", low=1)
    whole_block: bool = param(
        False, "as released an EOS ends the row once no mask stands before it; True: when its sub-block is complete"
    )

    name: ClassVar[str] = "fast_dllm_v2"
    source: ClassVar[str] = "Fast-dLLM v2, arXiv 2509.26328"

    def bundle(self, context: Context) -> Bundle:
        """Owns the window. Errors: no block-causal, shifted model; a `sub` that does not divide its block."""
        block = context.block_size
        if not context.shift or block is None:
            raise DllmError("sampler 'fast_dllm_v2' needs a block-causal model with shifted logits; use 'threshold'")
        if block % self.sub:
            raise DllmError(f"fast_dllm_v2: sub={self.sub} must divide the model's block of {block} columns")
        window = SubBlocks(self.sub, aligned=True, block=block)
        select = Threshold(self.tau).select
        return Bundle(window=window, assumes={"select": select}, needs=Needs(whole_block=self.whole_block))
