"""A pair head of its own: w(a, b) = <P[a], S[b]> over the verifier's ids, for any drafter whose drafts are lattices.

DSpark's Markov head (arXiv 2607.05147, rank 256) outside of a drafter's network: `dllm align` trains one
for a drafter that is frozen. It needs the ids of a lattice alone, so it weighs them where the search is, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm.drafting.drafters import Drafter
from dllm.drafting.lattice import Lattice
from dllm.drafting.pairs import Pairs, before_of, conditional
from dllm.errors import DllmError
from dllm.models.checkpoint import opened
from dllm.models.files import current, optional_json, replaced_checkpoint, write_json

WEIGHTS, ABOUT = "model.safetensors", "config.json"
KIND = "dllm_pair_head"


@dataclass(frozen=True, eq=False)
class PairHead:
    """predecessor P and successor S, (V, r) float32 on the host, V the verifier's vocabulary."""

    predecessor: Tensor
    successor: Tensor

    @property
    def vocab(self) -> int:
        """Ids that it knows."""
        return len(self.predecessor)

    @classmethod
    def fresh(cls, vocab: int, rank: int, generator: torch.Generator) -> PairHead:
        """One that says nothing yet: w = 0."""
        return cls(torch.randn(vocab, rank, generator=generator), torch.zeros(vocab, rank))

    def score(self, before: Tensor, ids: Tensor) -> Tensor:
        """w of ids before (..., A) and ids (..., M): (..., A, M)."""
        return self.predecessor[before] @ self.successor[ids].mT

    def over(self, lat: Lattice, anchor: int) -> Lattice:
        """The lattice behind the token `anchor` with its pairs, in the law "mass"."""
        before = before_of(lat.tokens, torch.tensor([anchor]))
        s = lat.logp[:, None] + self.score(before.clamp_min(0), lat.tokens.clamp_min(0))
        return replace(lat, pairs=Pairs(before, conditional(lat.logp, s, "mass")))

    def save(self, folder: str | Path, about: Mapping[str, object]) -> None:
        """Write safetensors and JSON; `about` says what it was trained for."""
        with replaced_checkpoint(folder) as draft:
            tensors = {"predecessor": self.predecessor, "successor": self.successor}
            save_file({name: t.float().contiguous() for name, t in tensors.items()}, draft / WEIGHTS)
            size = {"vocab_size": self.vocab, "rank": self.predecessor.shape[1]}
            write_json(draft / ABOUT, {"model_type": KIND, **size, **about})


PairHeadLike: TypeAlias = str | Path | PairHead | None


def as_pair_head(what: PairHeadLike) -> PairHead | None:
    """The head of a folder, read once; None: none. Errors: no such folder, no pair head in it, damaged weights."""
    if what is None or isinstance(what, PairHead):
        return what
    if not isinstance(what, str | PathLike):
        raise DllmError(f"pair_head is a PairHead or the path of its folder, not {type(what).__name__}")
    folder = current(Path(what))
    try:
        written = (folder / WEIGHTS).stat().st_mtime_ns
    except OSError:
        raise DllmError(f"no pair head in {what}: give a folder that `dllm align` has written") from None
    return _read(folder, written)


def check_head(head: PairHead | None, drafter: Drafter | None, vocab: int) -> None:
    """Refuse a head that would be ignored, or knows other ids than the verifier's `vocab`."""
    if head is None:
        return
    if drafter is None or not drafter.lattices:
        what = "no drafter" if drafter is None else f"drafter {drafter.name!r}, which drafts finished tokens,"
        raise DllmError(f"a pair head weighs the candidates of a lattice, and {what} has none: leave out pair_head")
    if head.vocab != vocab:
        raise DllmError(
            f"the pair head knows {head.vocab} ids, the verifier has {vocab}: train one for it with `dllm align`"
        )


@lru_cache(maxsize=8)
def _read(folder: Path, written: int) -> PairHead:
    about = optional_json(folder / ABOUT)
    if about.get("model_type") != KIND:
        raise DllmError(f"{folder} holds no pair head but a {about.get('model_type')!r}: see `dllm align`")
    shape = about.get("vocab_size"), about.get("rank")
    with opened(folder / WEIGHTS) as file:
        found = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  # no mapping
    if {name: tuple(t.shape) for name, t in found.items()} != {"predecessor": shape, "successor": shape}:
        raise DllmError(f"{folder} does not hold predecessor and successor of shape {shape}: it is damaged")
    return PairHead(found["predecessor"], found["successor"])
