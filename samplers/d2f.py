"""Pipelined decoding of several blocks: D2F by confidence (arXiv 2508.09192), d3LLM by entropy (arXiv 2601.07568)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dllm.samplers import OFF, Bundle, Context, Method, Needs, Prediction, Presets, View, best, param, quota
from dllm.samplers.multiblock import OpenBlocks


@dataclass(frozen=True)
class D2F(Method):
    """Open the next block when the last one has the share tau_add of its tokens; in all open blocks commit what exceeds
    tau_conf. A block is fully activated once the one before it has the share tau_act: then it commits at least its best
    column. Before that it may commit nothing.

    Behind an end token that was written no block opens ahead of time. Among the blocks' best the score decides:
    confidence, or that of a sampler composed with it (released: `margin`, `entropy`).

    Weights: D2F's adapters of LLaDA and Dream are trained for blocks whose left neighbour is unfinished, and for
    block-causal attention in which the prompt is one block. Here these families attend to everything, and the blocks of
    block-causal families count from column 0, so that no model runs as in D2F's own code; and other weights were never
    taught to continue what is half written. The rule runs with all of them; D2F's accuracy is not to be expected.
    """

    tau_add: float = param(0.1, "released: MATH and HumanEval on LLaDA, GSM8K on Dream", above=0, high=1)
    tau_act: float = param(0.95, "released, all tasks", above=0, high=1)
    tau_conf: float = param(0.9, "released, all tasks (Dream on HumanEval: 0.95)", low=0, high=OFF)
    max_open: int | None = param(None, "None: no bound, as released; blocks that are open at once", low=1)

    name: ClassVar[str] = "d2f"
    example: ClassVar[Mapping[str, object]] = {"tau_conf": 0.999}
    source: ClassVar[str] = "D2F, arXiv 2508.09192"
    cost: ClassVar[str] = "one row, the columns of all open blocks"
    presets: ClassVar[Presets] = {
        "llada_gsm8k": {"tau_add": 0.7},
        "llada_mbpp": {"tau_add": 0.9},
        "llada_math": {"tau_add": 0.1},
        "llada_humaneval": {"tau_add": 0.1},
        "dream": {"tau_add": 0.1},
        "dream_humaneval": {"tau_add": 0.9, "tau_conf": 0.95},
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns window and selection."""
        window = OpenBlocks.of(context, self.tau_add, self.max_open)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            sure = soft.confidence > self.tau_conf
            return window.forced(view, sure, score, self.tau_act)

        return Bundle(window=window, select=select, needs=Needs(filtered=True))


@dataclass(frozen=True)
class D3LLM(Method):
    """D2F's windows with a bar on entropy: in all open blocks commit what has an entropy of tau_ent or less; a fully
    activated block commits at least its column of lowest entropy.

    `forced="first"` is the released code: only the first open block is held to that, for which tau_act has no say, and
    where no column of the row is below the bar its lowest commits too, in whichever block. `settle` full forwards
    follow where a block is finished, before its keys are read from a cache (released: cache_delay_iter). The released
    code also writes end tokens behind the first one; here a row ends once all before that is written.

    Weights: d3LLM's are distilled from trajectories to be sure early. Others run this rule with fewer tokens a forward.
    """

    tau_ent: float = param(0.5, "nats; released for LLaDA and Dream-Coder (MBPP and Dream: 0.4)", low=0)
    tau_add: float = param(0.1, "released, most tasks", above=0, high=1)
    tau_act: float = param(0.95, "released, most tasks", above=0, high=1)
    max_open: int | None = param(None, "None: no bound, as released; blocks that are open at once", low=1)
    forced: str = param("each", "every fully activated block; 'first': as released", choices=("each", "first"))
    settle: int = param(1, "released for most tasks: the forward that every cache refreshes at", low=1)

    name: ClassVar[str] = "d3llm"
    example: ClassVar[Mapping[str, object]] = {"tau_ent": 0.02}
    source: ClassVar[str] = "d3LLM, arXiv 2601.07568"
    cost: ClassVar[str] = "one row, the columns of all open blocks"
    presets: ClassVar[Presets] = {
        "released": {"forced": "first"},
        "llada_gsm8k": {"forced": "first", "settle": 2},
        "llada_math": {"forced": "first"},
        "llada_humaneval": {"forced": "first", "tau_add": 1.0, "tau_act": 1.0, "settle": 2},
        "llada_mbpp": {"forced": "first", "tau_ent": 0.4},
        "dream": {"forced": "first", "tau_ent": 0.4},
        "coder": {"forced": "first"},
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns window and selection; assumes entropy as the score."""
        window = OpenBlocks.of(context, self.tau_add, self.max_open, self.settle)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            sure = soft.negative_entropy >= -self.tau_ent
            if self.forced == "first":
                return window.forced(view, sure | best(score, view.live), score, math.inf)
            return window.forced(view, sure, score, self.tau_act)

        return Bundle(window=window, select=select, assumes={"score": quota.entropy})
