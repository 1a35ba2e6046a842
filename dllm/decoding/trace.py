"""Trace: what was committed when. JSON in and out; what the terminal and the page show of it."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dllm.decoding.page import page
from dllm.errors import DllmError

BLANK = "▁"  # a masked column


@dataclass
class Trace:
    """The history of one row. Columns are absolute: column 0 is the first prompt token.

    `commits[k]` lists the `[column, token]` pairs that forward k wrote; a pair with the mask id is a re-masking.
    `confidence[k]` has the model's probability of each of these tokens, None where a closing forward filled it, and
    `posterior[k]` that under the constraint of the answer; it is empty where there is none.
    `windows[k]` is the half-open window of that forward, [0, 0] of a closing one; `lengths[k]` the canvas length after.
    """

    prompt: list[int]
    mask_id: int
    sampler: str
    commits: list[list[list[int]]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    final: list[int] = field(default_factory=list)  # the canvas at the end
    confidence: list[list[float | None]] = field(default_factory=list)
    start: int | None = None  # the first generated column; None: behind the prompt
    prompt_text: str = ""
    cache: str = ""
    arguments: dict[str, object] = field(default_factory=dict)  # of the call, as far as they are no defaults
    pieces: dict[int, str] = field(default_factory=dict)  # text of each token id, where a tokenizer is known
    text: str = ""  # the answer, as it was returned
    seconds: list[float] = field(default_factory=list, compare=False)  # in its lane, at each forward's end
    posterior: list[list[float | None]] = field(default_factory=list)

    @property
    def order(self) -> dict[int, int]:
        """Column -> the last forward that wrote it (0-based)."""
        return {col: k for k, pairs in enumerate(self.commits) for col, token in pairs if token != self.mask_id}

    def arness(self, k: int = 1, tokens: int | None = None) -> float | None:
        """Global AR-ness@k (arXiv 2506.20639): the share of commits that were among the k leftmost masks.

        tokens: only the first so many generated columns count, by default all. Commits of one forward are taken from
        left to right: a forward that fills the first masks is a stretch of left-to-right decoding. So a decode in one
        forward has 1: read it beside the tokens a forward. A column that was re-masked counts at each commit. None:
        nothing was committed.
        """
        masks, near, commits = sorted({col for col, _ in self._writes(tokens)}), 0, 0
        for col, token in self._writes(tokens):
            at = bisect_left(masks, col)
            masked = at < len(masks) and masks[at] == col
            if token == self.mask_id:
                if not masked:
                    masks.insert(at, col)
            elif masked:
                near, commits = near + (at < k), commits + 1
                del masks[at]
        return near / commits if commits else None

    def local_arness(self, k: int = 1, tokens: int | None = None) -> float | None:
        """Local AR-ness@k (arXiv 2506.20639): the share of commits that close k steps from a column to the next one.

        A commit with fewer than k before it is left out. `tokens` and the order within a forward: as for `arness`.
        """
        written = [col for col, token in self._writes(tokens) if token != self.mask_id]
        runs = [all(written[i - j] == written[i] - j for j in range(1, k + 1)) for i in range(k, len(written))]
        return sum(runs) / len(runs) if runs else None

    def _writes(self, tokens: int | None) -> Iterator[tuple[int, int]]:
        """Column and token of every write to the first `tokens` generated columns, in the order of `arness`."""
        end = math.inf if tokens is None else self._start + tokens
        return ((col, token) for pairs in self.commits for col, token in sorted(pairs) if self._start <= col < end)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a saved trace. Errors: a missing file, or one that is no trace."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            data["pieces"] = {int(key): value for key, value in data.get("pieces", {}).items()}
            return cls(**data)
        except OSError as error:
            raise DllmError(f"cannot read the trace {path}: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DllmError(f"{path} is not a trace written by dllm") from error

    def piece(self, token: int) -> str:
        """The text of a token id, the id itself without a tokenizer."""
        return self.pieces.get(token, f"{token} ")

    def cells(self) -> list[tuple[str, int | None]]:
        """The text of each column from the first generated one on, and the forward that wrote it (None: it was given or
        is still masked). Masks at the end are left out; `undecoded` counts them."""
        order, end = self.order, len(self.final)
        while end > self._start and self.final[end - 1] == self.mask_id:
            end -= 1
        return [
            (BLANK if token == self.mask_id else self.piece(token), order.get(col) if token != self.mask_id else None)
            for col, token in enumerate(self.final[self._start : end], self._start)
        ]

    @property
    def undecoded(self) -> int:
        """Columns that are still masked at the end."""
        return self.final.count(self.mask_id)

    @property
    def summary(self) -> str:
        """What the colours mean, and what is not shown."""
        left = f"; {self.undecoded} columns were never decoded" if self.undecoded else ""
        cache = f", cache {self.cache}" if self.cache else ""
        return f"{self.sampler}{cache}: {len(self.commits)} forwards; blue came first, red last{left}"

    def to_html(self) -> str:
        """The canvas page with this trace in it: one file that asks no host for anything (docs/canvas.md)."""
        return page(asdict(self))

    @property
    def _start(self) -> int:
        return len(self.prompt) if self.start is None else self.start
