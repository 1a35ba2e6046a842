"""The curve of a run: one CSV row every few steps, and TensorBoard where asked for."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FIELDS = ("step", "loss", "accuracy", "rate", "rows", "seconds")
logger = logging.getLogger(__name__)


class Curve:
    """Appends rows to `curve.csv`; on resume, rows behind the checkpoint are dropped first."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "curve.csv"
        rows = [row for row in read_curve(self.path) if row["step"] <= step]
        folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0  # spent in earlier sittings
        self.board = _board(folder) if tensorboard else None

    def add(self, **row: float) -> None:
        """Write one row, of FIELDS."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, FIELDS).writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            )
        if self.board is not None:
            for name in ("loss", "accuracy", "rate"):
                self.board.add_scalar(name, row[name], row["step"])
            self.board.flush()


def read_curve(path: Path) -> list[dict[str, float]]:
    """The rows of a `curve.csv`; none where there is no file. A last line cut by a kill is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if all(r.get(name) for name in FIELDS)]
    return [{k: int(v) if k in ("step", "rows") else float(v) for k, v in r.items()} for r in rows]


def _board(folder: Path) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed: the curve goes to curve.csv only")
        return None
    return SummaryWriter(str(folder / "tensorboard"))
