"""PC-Sampler: early columns first, and telling tokens before those that are everywhere (arXiv 2508.13021)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer
from dllm.samplers import Bundle, Constant, Context, Method, Prediction, Presets, View, param

Frequencies = str | Path | Mapping[int, float] | Sequence[float] | Tensor | None


@dataclass(frozen=True)
class PC(Method):
    """Rank by exp(-lam j) min(-c ln(f(x) + 1e-9), alpha): j is the distance from the window's first column, c the
    confidence of the proposed token x, f its frequency in a background corpus.

    `frequencies` gives each token id a count or a share: a mapping, a list, or a JSON file (`estimate` writes one).
    Without it the background is uniform and the second factor is the capped confidence times ln V. The fixed quota
    decides how many columns commit.
    """

    lam: float = param(0.25, "the paper's value for maths, code and GPQA; 0 for Sudoku, 0.5 for Countdown", low=0)
    alpha: float = param(10.0, "the paper's cap: no rare token outranks every position", low=0)
    frequencies: Frequencies = param(None, "no table is shipped: the law of a corpus is the user's choice")

    name: ClassVar[str] = "pc"
    source: ClassVar[str] = "PC-Sampler, arXiv 2508.13021"
    presets: ClassVar[Presets] = {"sudoku": {"lam": 0.0}, "countdown": {"lam": 0.5}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the score. Errors: frequencies that cannot be read."""
        background = Constant(table(self.frequencies, context.vocab_size).to)  # (V,) float64

        def score(view: View, soft: Prediction) -> Tensor:
            surprise = -(background.on(soft.token.device)[soft.token] + 1e-9).log()
            distance = (view.cols - view.window.lo[:, None]).clamp(min=0)
            return (-self.lam * distance).exp() * (soft.confidence * surprise).clamp(max=self.alpha)

        return Bundle(score=score)


def table(frequencies: Frequencies, vocabulary: int) -> Tensor:
    """(V,) float64 shares of the tokens. Errors: no such file, not a mapping of ids to numbers, ids out of range."""
    if frequencies is None:
        return torch.full((vocabulary,), 1 / vocabulary, dtype=torch.float64)
    given: object = frequencies
    if isinstance(given, str | Path):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DllmError(f"pc: frequencies={str(frequencies)!r} is not a readable JSON file ({error})") from None
    if isinstance(given, Sequence | Tensor):
        given = dict(enumerate(given))
    if not isinstance(given, Mapping) or not given:
        raise DllmError("pc: frequencies must hold a count for each token id, or name a JSON file that does")
    try:
        pairs = [(int(token), float(count)) for token, count in given.items()]
    except (TypeError, ValueError):
        raise DllmError("pc: frequencies must give integer token ids a number") from None
    bad = next((token for token, count in pairs if not 0 <= token < vocabulary or count < 0), None)
    if bad is not None:
        raise DllmError(f"pc: frequencies hold the token {bad}, outside the vocabulary of {vocabulary} or negative")
    shares = torch.zeros(vocabulary, dtype=torch.float64)
    shares[[token for token, _ in pairs]] = torch.tensor([count for _, count in pairs], dtype=torch.float64)
    total = shares.sum()
    if not total > 0:
        raise DllmError("pc: the frequencies sum to zero")
    return shares / total


def estimate(texts: Iterable[str], tokenizer: Tokenizer, path: str | Path) -> Path:
    """Count the tokens of `texts` and write them as the JSON file that `frequencies` takes."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not counts:
        raise DllmError("pc: the corpus holds no token")
    path = Path(path)
    path.write_text(json.dumps({str(token): n for token, n in sorted(counts.items())}) + "\n", encoding="utf-8")
    return path
