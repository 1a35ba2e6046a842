"""Trace: what was committed when. JSON in and out; terminal and HTML views."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dllm.canvas import Canvas
from dllm.errors import DllmError


@dataclass
class Trace:
    """The history of one row. Columns are absolute: column 0 is the first prompt token.

    `commits[k]` lists the `[column, token]` pairs that forward k wrote; a pair with the mask id is a re-masking.
    `windows[k]` is the half-open window of that forward, `lengths[k]` the canvas length after it.
    """

    prompt: list[int]
    mask_id: int
    sampler: str
    commits: list[list[list[int]]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    final: list[int] = field(default_factory=list)  # the canvas at the end
    pieces: dict[int, str] = field(default_factory=dict)  # text of each token id, where a tokenizer is known

    @property
    def order(self) -> dict[int, int]:
        """Column -> the last forward that wrote it (0-based)."""
        return {col: k for k, pairs in enumerate(self.commits) for col, token in pairs if token != self.mask_id}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a saved trace. Errors: a missing file, or one that is no trace."""
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            data["pieces"] = {int(key): value for key, value in data.get("pieces", {}).items()}
            return cls(**data)
        except OSError as error:
            raise DllmError(f"cannot read the trace {path}: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DllmError(f"{path} is not a trace written by dllm") from error

    def piece(self, token: int) -> str:
        return self.pieces.get(token, f"{token} ")

    def cells(self) -> list[tuple[str, int | None]]:
        """The generated part: text of each column, and the forward that wrote it (None: given or never written)."""
        order = self.order
        start = len(self.prompt)
        return [
            ("▁" if token == self.mask_id else self.piece(token), order.get(col))
            for col, token in enumerate(self.final[start:], start)
        ]

    def to_html(self) -> str:
        """A page that stands alone: every token coloured by the forward that committed it, with a slider over time."""
        steps = max(len(self.commits), 1)
        spans = []
        for text, k in self.cells():
            shown = html.escape(text).replace("\n", "⏎<br>")
            hue = 0 if k is None else 250 - 220 * k / max(steps - 1, 1)
            title = "given" if k is None else f"forward {k + 1}"
            data = f'data-k="{-1 if k is None else k}" title="{title}" style="--h:{hue:.0f}"'
            spans.append(f'<span class="t" {data}>{shown}</span>')
        prompt = html.escape("".join(self.piece(t) for t in self.prompt))
        return _PAGE.format(sampler=html.escape(self.sampler), steps=steps, prompt=prompt, cells="".join(spans))


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Decoding trace</title>
<style>
body{{font:16px/1.9 ui-monospace,monospace;max-width:60em;margin:2em auto;padding:0 1em;color:#222}}
.p{{color:#777;white-space:pre-wrap}} .t{{background:hsl(var(--h) 75% 82%);border-radius:3px;white-space:pre-wrap}}
.t.off{{background:#eee;color:transparent}} input{{width:100%}}
</style>
<h1>{sampler}</h1><p><output id="o">{steps}</output> of {steps} forwards; blue tokens came first, red ones last.</p>
<input id="s" type="range" min="0" max="{steps}" value="{steps}"><p class="p">{prompt}</p><p>{cells}</p>
<script>
const s=document.getElementById("s"),o=document.getElementById("o");
s.oninput=()=>{{o.value=s.value;document.querySelectorAll(".t").forEach(t=>
t.classList.toggle("off",+t.dataset.k>=+s.value))}};
</script></html>
"""


def changes(before: Canvas, after: Canvas, row: int) -> list[list[int]]:
    """The `[column, token]` pairs that differ between two canvases of equal length."""
    start, length = int(after.start[row]), int(after.length[row])
    old, new = before.ids[row, :length].tolist(), after.ids[row, :length].tolist()
    return [[c, new[c]] for c in range(start, length) if old[c] != new[c]]
