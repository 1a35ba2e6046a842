"""What a call returns: an Output for each answer, Events while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from dllm.decoding.trace import Trace

if TYPE_CHECKING:  # the command line starts without torch
    from dllm.decoding.logprobs import TokenLogprob


@dataclass
class Output:
    """The answer to one prompt."""

    text: str
    sequences: list[int]  # ids with the prompt; what an early stop left undecoded is not in it
    tokens: list[int]  # generated ids up to the stop, without it
    nfe: int  # forwards of this row
    calls: int  # batched forwards of the whole call
    finish_reason: str  # stop | length | cap
    seconds: float  # from the start of the call to this row's last forward
    prefill_seconds: float  # of these, to the row's first answer
    positions: int  # recomputed positions: nfe_equiv = positions / canvas length
    canvas_length: int
    decoded: int  # columns that were written, those behind the stop included
    sampler: str  # with its parameters; `name:tuned,...` where they are the model's own
    cache: str
    seed: int
    trace: Trace | None = None
    # of each of `tokens` where the call asked; None of one that was given, or came with a length edit
    logprobs: list[TokenLogprob | None] | None = None
    lossless: bool | None = None  # with lookahead: whether identity with the plain call is guaranteed
    stats: dict[str, object] = field(default_factory=dict)  # of the lookahead
    queue_seconds: float = 0.0  # of prefill_seconds, to the row's lane

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens up to the stop for each forward; 0 for an empty answer."""
        return len(self.tokens) / self.nfe if self.nfe else 0.0

    @property
    def nfe_equiv(self) -> float:
        """Cost in full forwards of this row's canvas."""
        return self.positions / self.canvas_length if self.canvas_length else 0.0

    @property
    def decode_seconds(self) -> float:
        """From this row's first answer to its last forward."""
        return self.seconds - self.prefill_seconds

    def __str__(self) -> str:
        return self.text


class Event(NamedTuple):
    """One piece of a stream."""

    request: int  # which prompt of the call
    text: str  # newly final: it will not change any more
    draft: str | None  # what is written behind it and may still change; None unless asked for
    nfe: int
    output: Output | None  # with the last event of a prompt
    tokens: Sequence[int] = ()  # that `text` takes; those of a prompt's events join to `output.tokens`
    logprobs: list[TokenLogprob | None] | None = None  # of these tokens, where the call asked


class News(NamedTuple):
    """What happened to a row. Whoever follows it makes the event of it, each once and in their order: decoding does not
    wait for the text."""

    request: int  # which prompt of the call
    read: Callable[[], Event | None]  # None: nothing has to be told
    output: Output | None = None  # with the last news of a prompt
