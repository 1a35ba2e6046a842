"""FreeDave: the static schedule, drafted and verified by the model itself (arXiv 2510.00294)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm.errors import DllmError
from dllm.samplers import Blocks, Bundle, Context, Method, Presets, param, quota


@dataclass(frozen=True)
class FreeDave(Method):
    """Commit the most confident column of the block, one a step, several steps a forward: the static schedule's output.

    The verification is the toolkit's `lookahead`, which any other sampler can have too. The `reference` presets count
    forwards as the released code does: drafts from the last accepted state only, nothing kept from rejected ones.
    """

    rows: int = param(4, "query rows of a forward: the released setting for LLaDA; 8 for TraDo and Dream", low=1)
    retain: bool = param(True, "keep rejected rows for later; the released code does not")
    multi_source: bool = param(True, "draft from every accepted state; the released code drafts from the last one")
    cross_blocks: bool = param(
        True, "draft into the next block of a block-causal model; the released code does so in its eager mode only"
    )
    eager: bool = param(
        False, "True: the released eager mode of block-causal models: masks ahead as far as drafts may reach"
    )
    lone_opening: bool = param(
        False, "True: the forward that opens a block commits its first column only (shifted models)"
    )

    name: ClassVar[str] = "freedave"
    source: ClassVar[str] = "FreeDave, arXiv 2510.00294"
    cost: ClassVar[str] = "`rows` rows, the window's columns"
    presets: ClassVar[Presets] = {
        "reference": {"retain": False, "multi_source": False, "cross_blocks": False},
        "reference_eager": {"retain": False, "multi_source": False, "eager": True},
        "reference_dream": {"retain": False, "multi_source": False, "cross_blocks": False, "lone_opening": True},
    }

    def bundle(self, context: Context) -> Bundle:
        """The static schedule with a lookahead of its own. Errors: eager on a bidirectional model."""
        lookahead = {name: vars(self)[name] for name in ("rows", "retain", "multi_source", "cross_blocks")}
        if not self.retain:  # the counts of the released code, on every device
            lookahead["form"] = "memo"
        if self.eager:
            if not context.block_size:
                raise DllmError(
                    "freedave: eager=True reads masks ahead, which a bidirectional model would see: omit it"
                )
            lookahead |= {"ahead": -(-self.rows // context.block_size), "restart": True}
        return Bundle(
            window=Blocks.of(context, lone_opening=True) if self.lone_opening else None,
            assumes={"score": quota.confidence},
            lookahead=lookahead,
        )
