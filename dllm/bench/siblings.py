"""`dllm bench siblings`: how far the rule for drawn siblings is from the best that any lossless rule could do.

At one position k tokens are drawn without replacement from the drafter's law q and tested one after the other
(recursive rejection, `dllm.drafting.accept`). Whatever the rule, the token that is emitted has the verifier's law p, so
a rule is a transport between the k draws and p, and the largest chance that it emits one of the draws is a linear
programme (SpecTr, arXiv 2310.15141). By max-flow min-cut its value is

    1 + min over sets T of tokens of  p(T) - P(all k draws in T),

and a minimum is found among the sets of the tokens with the smallest p / q (Hu et al., arXiv 2502.18779). Beside it
stands the chance of the k likeliest tokens as points, p of them, which is the best for that draft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

import dllm
from dllm.bench.drafting import TASKS, held_out
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Need
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError
from dllm.models.native import NativeModel

NEW, SLOTS, TOP_K = 48, 4, 20  # tokens a text, slots a draft; the top_k that Qwen3 is sampled with
SIBLINGS = (1, 2, 3)
TINY = 1e-12  # less is nothing


def recursive(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The chance (...) that recursive rejection keeps one of k tokens drawn without replacement, by laws p, q (..., V)
    float64.

    Every token is drawn and rejected with the chance (q - p)+, and what is left of p does not depend on which it was.
    """
    kept = torch.minimum(p, q).sum(-1)
    if k > 1:
        over, left = (q - p).clamp_min(0), (p - q).clamp_min(0)
        left = left / left.sum(-1, keepdim=True).clamp_min(TINY)
        rest = q[..., None, :] * (1 - torch.eye(q.shape[-1], dtype=q.dtype))  # (..., V, V) behind each token
        rest = rest / rest.sum(-1, keepdim=True).clamp_min(TINY)
        kept = kept + (over * recursive(left[..., None, :], rest, k - 1)).sum(-1)
    return kept


def optimum(p: Tensor, q: Tensor, k: int) -> float:
    """The largest chance that a lossless rule keeps one of such draws."""
    order = torch.argsort(p / q.clamp_min(1e-300))
    return 1 + min(0.0, float((p[order].cumsum(0) - within(q[order], k)).min()))


def within(q: Tensor, k: int) -> Tensor:
    """The chances (V,) that k tokens drawn without replacement from q (V,) are all among the first 1..V."""
    place = torch.arange(len(q))
    chance, taken, last = q.new_ones(()), q.new_zeros(()), place.new_full((), -1)  # of the first k - 1 draws, in order
    for n in range(k - 1):
        chance = chance[..., None] * q / (1 - taken).clamp_min(TINY)[..., None]
        for earlier in range(n):
            chance.diagonal(dim1=earlier, dim2=n).zero_()
        taken, last = taken[..., None] + q, torch.maximum(last[..., None], place)
    left, some = 1 - taken, (1 - taken) > TINY  # else there is no k-th token
    scale = torch.where(some, chance / left.clamp_min(TINY), 0.0)
    fixed = torch.where(some, -scale * taken, chance)
    at = last.flatten().clamp_min(0)
    scales, fixes = (q.new_zeros(len(q)).index_add(0, at, x.flatten()).cumsum(0) for x in (scale, fixed))
    return scales * q.cumsum(0) + fixes


def run(n: int = 20, *, drafter: str = "tiny") -> Iterator[Figure]:
    """The chances by task and number of siblings, over `n` sampled texts a task. Errors: a drafter that is no dLLM."""
    source, verifier = as_drafter(drafter), as_verifier("tiny-ar")
    if not (isinstance(source, DiffusionDrafter) and isinstance(source.model, NativeModel)):
        raise DllmError(f"the drafter of this bench is a dLLM, tiny or a folder, not {drafter!r}")
    source.reset([], Need(verifier.vocab, verifier.eos, tokenizer=verifier.tokenizer))
    for task in TASKS:
        found: dict[int, list[tuple[float, float, float]]] = {k: [] for k in SIBLINGS}
        for i, prompt in enumerate(tqdm(held_out(source.model, task, n), task, unit="text", leave=False)):
            for every in zip(*laws(source, verifier, prompt, seed=i), strict=True):
                some = torch.stack(every).sum(0).nonzero()[:, 0]
                p, q = (law[some] for law in every)
                for k, rows in found.items():
                    best = float(p[q.topk(min(k, len(q))).indices].sum())
                    rows.append((float(recursive(p, q, k)), optimum(p, q, k), best))
        yield from _figures(task, found)


def _figures(task: str, found: Mapping[int, list[tuple[float, float, float]]]) -> Iterator[Figure]:
    for k, rows in found.items():
        ours, most, points = torch.tensor(rows).mean(0).tolist()
        note = f"{most:.4f} at most, gap {most - ours:.4f}; the likeliest as points {points:.4f}; {len(rows)} positions"
        yield Figure(f"{task}, {k} drawn: kept", ours, note=note)


@torch.no_grad()
def laws(source: DiffusionDrafter, verifier: Verifier, prompt: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Laws p and q (n, V) of the slots of drafts behind every prefix of a text that the verifier samples."""
    text = dllm.speculate(verifier, None, prompt, temperature=1.0, top_k=TOP_K, seed=seed, max_new_tokens=NEW).sequences
    first, cuts = len(prompt), range(len(prompt), len(text))
    q = _law(source.columns([text[:at] for at in cuts], SLOTS))  # (n, SLOTS, V)
    p = _law(verifier.model(torch.tensor([text])).logits[0, :-1, : verifier.vocab])  # (L - 1, V)
    known = [(at - first, slot, at + slot - 1) for at in cuts for slot in range(SLOTS) if at + slot < len(text)]
    row, slot, at = torch.tensor(known).T
    return p[at], q[row, slot]


def _law(logits: Tensor) -> Tensor:
    """Of logits (..., V): float64."""
    least = logits.topk(TOP_K).values[..., -1:]
    return torch.softmax(logits.double().masked_fill(logits < least, float("-inf")), -1)
