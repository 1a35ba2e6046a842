"""`dllm bench pairs`: what pair scores bring to the drafts of the embedded pair, by search, prompt by prompt.

Every setting decodes the same held-out prompts greedily, 12 slots a draft, no carry-over; all have to give one text.
tau counts the bonus token. Differences are of two settings over the same prompts, with a bootstrap interval over these.
Texts are kept in a file as they come: a run that is started again goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

import dllm
from dllm.bench.drafting import K12, TASKS, Options, held_out
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.errors import DllmError
from dllm.eval.metrics import paired_gain
from dllm.models.lines import append, mend, read_lines
from dllm.models.native import NativeModel

NEW = 96
SETTINGS: dict[str, Options] = {  # those "over pairs" get the head
    "eal": K12,
    "argmax over pairs": {"search": "argmax", **K12},
    "eal over pairs": K12,
    "eal:lam=1 over pairs": {"search": "eal:lam=1", **K12},  # without the n-gram proxy, as the walk
    "tree 32": {"tree": 32, **K12},
    "tree 32 over pairs": {"tree": 32, **K12},
}
# a difference, and where its interval should begin with a weak drafter: the searches can differ there
ASKED = (
    ("eal over pairs", "argmax over pairs"),
    ("eal:lam=1 over pairs", "argmax over pairs"),
    ("eal over pairs", "eal"),
    ("tree 32 over pairs", "tree 32"),
)
Counts = dict[tuple[str, str], dict[int, tuple[int, int, int]]]  # (task, setting) -> prompt -> tokens, calls, crc


def run(drafter: str, pair_head: str, *, n: int = 300, out: str | Path = "bench-pairs.jsonl") -> Iterator[Figure]:
    """Decode what `out` lacks; then tau of every setting and the differences that were asked for.

    Errors: a drafter that is no dLLM, a file of another drafter or head.
    """
    source, path = as_drafter(drafter), Path(out)
    if not (isinstance(source, DiffusionDrafter) and isinstance(source.model, NativeModel)):
        raise DllmError(f"the drafter of this bench is a dLLM, tiny or a folder, not {drafter!r}")
    settings = {name: {**o, "pair_head": pair_head} if "pairs" in name else o for name, o in SETTINGS.items()}
    found = _read(path, {"drafter": drafter, "pair_head": pair_head, "new": NEW})
    verifier = as_verifier("tiny-ar")
    for task in TASKS:
        prompts = held_out(source.model, task, n)
        missing = [(name, i) for i in range(n) for name in settings if i not in found.setdefault((task, name), {})]
        for name, i in tqdm(missing, task, unit="text", leave=False):
            got = dllm.speculate(verifier, source, prompts[i], max_new_tokens=NEW, **settings[name])
            counts = sum(r.emitted for r in got.rounds), got.n_verify, crc32(repr(got.sequences).encode())
            append(path, [{"task": task, "setting": name, "prompt": i, "counts": counts}])
            found[task, name][i] = counts
        yield from _figures(task, {name: [found[task, name][i] for i in range(n)] for name in settings})


def _read(path: Path, header: Mapping[str, object]) -> Counts:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, [header])
    mend(path)
    found: Counts = {}
    first, *rest = read_lines(path)
    if first != header:
        raise DllmError(f"{path} holds texts of another drafter or pair head: choose another --out")
    for row in rest:
        tokens, calls, crc = row["counts"]
        found.setdefault((row["task"], row["setting"]), {})[row["prompt"]] = tokens, calls, crc
    return found


def _figures(task: str, counts: Mapping[str, Sequence[tuple[int, int, int]]]) -> Iterator[Figure]:
    for name, rows in counts.items():
        divergent = sum(a[2] != b[2] for a, b in zip(rows, counts["eal"], strict=True))
        tokens, calls, _ = np.array(rows).sum(0)
        yield Figure(f"{task}, {name}: tau", tokens / calls, note=f"{calls} verify calls, {divergent} texts differ")
    for one, other in ASKED:
        first, second = ([row[:2] for row in counts[name]] for name in (other, one))
        value, low, high = paired_gain(first, second)
        yield Figure(f"{task}: tau of {one} above {other}", value, note=f"95 %: {low:+.3f} to {high:+.3f}")
