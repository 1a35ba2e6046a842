"""AdaBlock: a block ends where a semantic unit ends (arXiv 2509.26432)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer
from dllm.samplers import BlockMemory, Canvas, Constant, Context, Prediction, Span, State, View, Window, best, spans
from dllm.samplers.base import OFF, Bundle, Method, param
from dllm.samplers.threshold import Threshold

# The released delimiter sets: ids of the families' own vocabularies whose text holds a new line.
PUBLISHED: dict[str, tuple[int, ...]] = {
    "llada": (198,),
    "dream": (
        198, 271, 280, 319, 340, 382, 401, 532, 624, 630, 692, 698, 921, 1248, 1837, 1939, 2219, 2533, 3276, 3876, 4894,
        5267, 14750, 68327,
    ),
}  # fmt: skip


class AheadMemory(NamedTuple):
    """Per-row leaves of the open block beside its `BlockMemory`, both (B,); -1 before the first."""

    hi: Tensor  # its end, exclusive
    ahead: Tensor  # in the step that opens it: the end of where a delimiter is looked for, else -1

    @classmethod
    def start(cls, canvas: Canvas) -> Self:
        """No block is open yet."""
        unset = torch.full_like(canvas.start, -1)
        return cls(unset, unset)


@dataclass(frozen=True)
class AdaptiveBlocks(Window):
    """The window slot: a block is opened by a forward that reads a stretch ahead of it, and `narrow` ends the block at
    the surest delimiter predicted there, or after `length` columns. The opening forward commits too."""

    length: int
    delimiters: Constant[Tensor]  # (V,) bool
    tau: float
    window: str

    def memory(self, canvas: Canvas) -> BlockMemory:
        """No block is open yet."""
        return BlockMemory.start(canvas)

    def open(self, state: State) -> tuple[State, Span]:
        """The open block, or the stretch that the forward which opens one reads."""
        canvas, before, end = state.canvas, state.memory[BlockMemory], state.memory[AheadMemory].hi
        first = canvas.first_masked()
        new = (first < before.lo) | (first >= end)
        lo = torch.where(new, first, before.lo)
        ahead = torch.minimum(lo + self._reach(canvas, lo), canvas.length)
        read = torch.maximum(ahead, torch.minimum(lo + self.length, canvas.length))
        hi = torch.minimum(torch.where(new, read, end), canvas.length)  # the canvas may have been cut
        opened = before._replace(lo=lo, step=torch.where(new, state.step, before.step))
        state = state._replace(memory=state.memory.plus(opened, AheadMemory(hi, torch.where(new, ahead, -1))))
        return state, Span(lo=lo, hi=hi, end=hi, reads=spans(lo, hi, canvas.ids.shape[1]), epoch=lo)

    def _reach(self, canvas: Canvas, lo: Tensor) -> Tensor:
        """(B,) columns in which a delimiter is looked for."""
        if self.window == "budget":
            return (canvas.length - canvas.start) // 4
        return ((lo - canvas.start) // 4).clamp(min=1)

    def narrow(self, view: View, pred: Prediction) -> None:
        """End the block that this forward opened."""
        canvas, window, ahead = view.canvas, view.window, view.memory[AheadMemory].ahead
        opening = ahead >= 0
        sought = (view.cols >= window.lo[:, None]) & (view.cols < ahead[:, None])  # (B, W), nothing where not opening
        token = torch.where(view.masked, pred.token, view.gather(canvas.ids))
        conf = torch.where(view.masked, pred.confidence, 1.0)  # a delimiter that is written already is certain
        ends = sought & self.delimiters.on(token.device)[token]
        end = best(conf, ends) & (conf >= self.tau)
        found, last = end.any(1), torch.where(end, view.cols, -1).amax(1)
        fixed = torch.minimum(window.lo + self.length, canvas.length)
        hi = torch.where(opening, torch.where(found, last + 1, fixed), window.hi)
        view.narrow(window.lo, hi)
        opened = view.memory[BlockMemory]
        masks = torch.where(opening, view.live.sum(1), opened.masks)
        view.memory = view.memory.plus(opened._replace(masks=masks), AheadMemory(hi, ahead))


@dataclass(frozen=True)
class AdaBlock(Method):
    """Open each block with a look ahead: end it at the most confident delimiter there, if that is confident enough.

    The look-ahead is a quarter of the generation window (`budget`, as released) or of what was generated so far
    (`progress`, as in the paper's algorithm 1). Ties go to the leftmost delimiter. A block may be longer than
    `block_length`. It is the forward at which the caches refresh, so it costs no forward of its own.
    """

    delimiters: int | str | list[int | str] | None = param(
        None, "None: the family's released ids, else every id whose text holds a new line"
    )
    tau_delimiter: float | None = param(
        None, "None: 0.5 for Dream, 0.3 for the others, as published; inf: no delimiter ends a block", low=0
    )
    window: str = param("budget", "the released code's look-ahead", choices=("budget", "progress"))
    tau: float = param(0.9, "the bar where no other sampler selects (Fast-dLLM's default)", low=0, high=OFF)

    name: ClassVar[str] = "adablock"
    source: ClassVar[str] = "AdaBlock-dLLM, arXiv 2509.26432"
    cost: ClassVar[str] = "one row; a block's first forward reads a quarter of the generation"

    def bundle(self, context: Context) -> Bundle:
        """Owns the window; assumes threshold's selection. Errors: delimiters that are not there."""
        tau = self.tau_delimiter
        if tau is None:
            tau = 0.5 if context.family == "dream" else 0.3
        table = torch.zeros(context.vocab_size, dtype=torch.bool)
        table[list(self._ids(context))] = True
        window = AdaptiveBlocks(context.block_length, Constant(table.to), tau, self.window)
        return Bundle(window=window, assumes={"select": Threshold(tau=self.tau).select}, memory=AheadMemory.start)

    def _ids(self, context: Context) -> tuple[int, ...]:
        """The delimiter ids. Errors: ids outside the vocabulary, texts that the tokenizer does not have."""
        given = self.delimiters
        if given is None:
            return self._derived(context)
        given = [given] if isinstance(given, str | int) else list(given)
        texts = tuple(d for d in given if isinstance(d, str))
        ids = tuple(int(d) for d in given if not isinstance(d, str))
        outside = [i for i in ids if not 0 <= i < context.vocab_size]
        if outside or not given:
            what = (
                f"id {outside[0]} is outside the vocabulary of {context.vocab_size}" if outside else "the list is empty"
            )
            raise DllmError(f"adablock: delimiters={given!r}: {what}; give token ids or texts such as '\\n'")
        for text in texts:
            ids += self._search(context, text)
        return ids

    def _derived(self, context: Context) -> tuple[int, ...]:
        published = PUBLISHED.get(context.family, ())
        tokenizer = context.tokenizer
        fits = published and max(published) < context.vocab_size
        if tokenizer is not None and fits and all("\n" in tokenizer.decode([i]) for i in published):
            return published
        return self._search(context, "\n")

    def _search(self, context: Context, text: str) -> tuple[int, ...]:
        if context.tokenizer is None:
            raise DllmError("adablock: this model has no tokenizer to find delimiters in: give delimiters=[token ids]")
        found = holding(context.tokenizer, text)  # type: ignore[arg-type]  # tokenizers have a hash, their protocol none
        ids = tuple(i for i in found if i < context.vocab_size)
        if not ids:
            raise DllmError(
                f"adablock: no token of this tokenizer holds {text!r}: give delimiters=[...], texts or ids that it has"
            )
        return ids


@lru_cache(maxsize=32)
def holding(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a tokenizer whose decoded text holds `text`."""
    return tuple(i for i in range(len(tokenizer)) if text in tokenizer.decode([i]))
