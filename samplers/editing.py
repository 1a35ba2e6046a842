"""Token editing of LLaDA2.1: while a block is open, committed tokens that the model now contradicts are replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dllm.samplers import OFF, Bundle, Canvas, Context, Decision, Hold, Method, Needs, Prediction, Presets, View, param
from dllm.samplers.blocks import Blocks
from dllm.samplers.threshold import Threshold


@dataclass(frozen=True)
class Editing(Method):
    """Commit above `tau`, and replace a committed token of the block where another one reaches `edit`.

    A block without masks stays open until a forward edits nothing, `rounds` of them at most. Prompt tokens and blocks
    that were left are never edited. Composes: `editing+NAME` edits behind the selection rule of NAME.
    """

    tau: float = param(0.95, "LLaDA2.1's code; its card names 0.7 for quality and 0.5 for speed", low=0, high=OFF)
    edit: float = param(0.9, "LLaDA2.1's editing threshold", low=0, high=OFF)
    rounds: int = param(16, "forwards on a block without masks, LLaDA2.1's max_post_steps", low=0)

    name: ClassVar[str] = "editing"
    source: ClassVar[str] = "LLaDA2.1 (released code)"
    presets: ClassVar[Presets] = {"quality": {"tau": 0.7}, "speed": {"tau": 0.5}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the window and amends; the selection is threshold's where nobody brings one."""
        return Bundle(
            window=Blocks.of(context, holds=True),
            amend=(self.amend,),
            assumes={"select": Threshold(self.tau).select},
            needs=Needs(committed=True, revises=True, edits=True),
            memory=self.memory,
        )

    def memory(self, canvas: Canvas) -> Hold:
        """No block is held at first."""
        return Hold(torch.zeros_like(canvas.start, dtype=torch.bool), canvas.start * 0)

    def amend(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision with the edits of this step; holds a block that is full for another forward."""
        frozen = view.gather(view.canvas.frozen)
        filled = view.inside & ~view.masked & ~frozen
        edits = filled & (pred.token != view.gather(view.canvas.ids)) & (pred.confidence >= self.edit)
        open_before = (view.masked & view.inside).any(1)
        open_after = (view.gather(view.canvas.apply(d).masked) & view.inside).any(1)
        rounds = torch.where(open_before, 0, view.memory[Hold].rounds + 1)
        held = ~open_after & (open_before | edits.any(1)) & (rounds < self.rounds)
        view.memory[Hold] = Hold(held, rounds)
        return d._replace(write=view.scatter(d.write, edits, edits), token=view.scatter(d.token, pred.token, edits))
