"""Which drafted tokens stay, by exact rules, none of which needs to know the drafter.

* point (chain or tree): draw the verifier's own token and follow the edge if it was drafted. For any set of children
  this accepts with the largest probability a lossless rule can have; greedy decoding is the case where the draw is the
  argmax.
* sampled chain: accept with min(1, p / q), else emit from norm([p - q]+) (Leviathan et al., arXiv 2211.17192).
* sampled siblings without replacement: the same test one sibling after the other, on the residual (recursive
  rejection).
* sampled chain by blocks: how much of it stays is drawn at once, which keeps at least as much in the mean as any test
  token by token (block verification, Sun et al., arXiv 2403.10444).

Only nodes that are reached are looked at: behind a rejection the logits are conditioned on a token that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.drafting.proposal import Proposal, drawn, sent

Target = Callable[[int, Sequence[int]], Tensor]  # (node, tokens since the root) -> the verifier's scores or law (V,)
Processors = Callable[..., Tensor]  # (ids (1, L), scores (1, V)) -> scores (1, V), as transformers calls them


@dataclass(frozen=True)
class Acceptance:
    """`emitted` = the tokens of the accepted `path` and one more (a correction, or the bonus behind a leaf)."""

    emitted: tuple[int, ...]
    path: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Tokens of the draft that stay."""
        return len(self.path)


def walk_sample(proposal: Proposal, prob: Target, generator: torch.Generator | None = None) -> Acceptance:
    """Sample-and-match for point proposals: exact at any temperature with p alone."""
    return _match(proposal, lambda node, since: draw(prob(node, since), generator))


def _match(proposal: Proposal, token_at: Callable[[int, Sequence[int]], int]) -> Acceptance:
    """Follow the verifier's own tokens, computed only where the walk comes by."""

    def step(node: int, since: Sequence[int]) -> tuple[int, int | None]:
        token = token_at(node, since)
        return token, next((c for c in proposal.children.get(node, ()) if proposal.tokens[c] == token), None)

    return _walk(step)


def _walk(step: Callable[[int, Sequence[int]], tuple[int, int | None]]) -> Acceptance:
    """From the root as long as a step, (node, tokens since the root) -> (token, its node), stays in the draft."""
    emitted: list[int] = []
    path = [-1]
    while True:
        token, node = step(path[-1], emitted)
        emitted.append(token)
        if node is None:
            return Acceptance(tuple(emitted), tuple(path[1:]))
        path.append(node)


def reject(proposal: Proposal, prob: Target, generator: torch.Generator | None = None) -> Acceptance:
    """The ratio test for sampled chains and its recursive form for siblings drawn without replacement."""
    assert proposal.rows is not None
    rows = proposal.rows

    def step(node: int, since: Sequence[int]) -> tuple[int, int | None]:
        left, q = prob(node, since).double(), None
        for child in proposal.children.get(node, ()):
            token = proposal.tokens[child]
            q = rows.dense(child, len(left)).to(left.device) if q is None else q
            if float(torch.rand((), generator=generator, dtype=torch.float64)) * float(q[token]) < float(left[token]):
                return token, child
            left = _normalise((left - q).clamp_min(0), left)
            q = q.clone()
            q[token] = 0
            q = _normalise(q, q)
        return draw(left, generator), None

    return _walk(step)


def _normalise(x: Tensor, otherwise: Tensor) -> Tensor:
    """Rows (..., V) over their sums; a vanishing residual means p = q up to rounding, where the law before it is the
    right one."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 1e-12, x / total, otherwise)


def draw(prob: Tensor, generator: torch.Generator | None = None) -> int:
    """One token from (V,) probabilities by the inverse CDF in float64; a zero entry is never drawn."""
    return int(drawn(prob[None], torch.rand(1, 1, generator=generator, dtype=torch.float64).to(prob.device)))


@dataclass(frozen=True)
class Judge:
    """How the verifier takes a token from its logits.

    sample      whether it is drawn, else it is the arg-max.
    warp        of float32 scores (n, V), each row by itself: temperature, top-k, top-p.
    processors  in place of `warp` where one of them looks at the text. They are called as transformers calls them, on
                (1, L) ids and (1, V) scores with the prefix of the node itself: drafted tokens that a processor forbids
                are rejected by construction. Some count their calls, so only nodes that the walk reaches are shown.
    """

    sample: bool = False
    warp: Callable[[Tensor], Tensor] | None = None
    processors: Processors | None = None
    generator: torch.Generator | None = None
    block: bool = False  # sampled chains by blocks; not where processors look at the text, node after node

    def ask(self, proposal: Proposal, logits: Tensor) -> Tensor:
        """What settles a proposal by its raw logits (N + 1, V), row 0 after the root, row i + 1 after node i: (n,)
        int64 on their device, so that the host waits once. Empty where the walk itself asks, node after node: for
        processors, and for siblings, of which each is tested on what the one before left over."""
        if self.processors is not None or not (proposal.kind == "point" or proposal.is_chain):
            return logits.new_zeros(0, dtype=torch.long)
        scores = self._scores(logits)
        if not self.sample:
            return scores.argmax(-1)
        prob, u = torch.softmax(scores, -1), sent(self._ahead(len(proposal) + 2), logits.device)
        if proposal.kind == "sampled":
            return (_blocks if self.block else _ratio)(proposal, prob.double(), u)
        return drawn(prob, u[sent((0, *proposal.depths), logits.device)][:, None])[:, 0]

    def judge(self, proposal: Proposal, logits: Tensor, answer: Sequence[int], prefix: Sequence[int]) -> Acceptance:
        """What stays, by the answer to `ask`; where that is empty, by a walk behind the text `prefix`."""
        if not answer:
            return self._walked(proposal, logits, prefix)
        if self.sample and proposal.kind == "sampled":
            n, token = answer
            self._draws(1 + len(proposal) if self.block else n + 1 + (n < len(proposal)))
            return Acceptance((*proposal.tokens[:n], token), tuple(range(n)))
        kept = _match(proposal, lambda node, _: answer[node + 1])
        if self.sample:
            self._draws(len(kept.emitted))
        return kept

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.float() if self.warp is None else self.warp(logits.float())

    def _walked(self, proposal: Proposal, logits: Tensor, prefix: Sequence[int]) -> Acceptance:
        text = torch.tensor([*prefix], device=logits.device)

        def scores(node: int, since: Sequence[int]) -> Tensor:
            rows = logits[node + 1 : node + 2]
            if self.processors is None:
                return self._scores(rows)[0]
            ids = torch.cat([text, text.new_tensor(list(since))]) if since else text
            return self.processors(ids[None], rows.float().clone())[0]

        def prob(node: int, since: Sequence[int]) -> Tensor:
            return torch.softmax(scores(node, since), -1).cpu()  # the draws are made on the host, in float64

        if not self.sample:
            return _match(proposal, lambda node, since: int(scores(node, since).argmax()))
        return (reject if proposal.kind == "sampled" else walk_sample)(proposal, prob, self.generator)

    def _draws(self, n: int) -> Tensor:
        """The next n uniforms."""
        return torch.rand(n, generator=self.generator, dtype=torch.float64)

    def _ahead(self, n: int) -> Tensor:
        """The same, for a look: how many of them count shows later."""
        generator = torch.default_generator if self.generator is None else self.generator
        state = generator.get_state()
        u = self._draws(n)
        generator.set_state(state)
        return u


def _ratio(proposal: Proposal, p: Tensor, u: Tensor) -> Tensor:
    """`reject` of a sampled chain by laws p (N + 1, V) and uniforms u (N + 2,), without a question: (2,) int64, the
    number of accepted tokens and the one behind them."""
    assert proposal.rows is not None
    n = len(proposal)
    q = F.pad(proposal.rows.laws(p.shape[-1]).to(p.device), (0, 0, 0, 1))  # (N + 1, V); no draft behind the last
    tokens = sent(proposal.tokens, p.device)[:, None]
    passed = u[:n] * q[:n].gather(1, tokens)[:, 0] < p[:n].gather(1, tokens)[:, 0]
    at = passed.long().cumprod(0).sum(0, keepdim=True)  # (1,)
    left = p.index_select(0, at)
    rest = _normalise((left - q.index_select(0, at)).clamp_min(0), left)
    token = drawn(torch.where(at < n, rest, left), u.gather(0, at + (at < n))[:, None])
    return torch.cat([at, token[:, 0]])


def _blocks(proposal: Proposal, p: Tensor, u: Tensor) -> Tensor:
    """As `_ratio`, by block verification."""
    assert proposal.rows is not None
    n = len(proposal)
    q = F.pad(proposal.rows.laws(p.shape[-1]).to(p.device), (0, 0, 0, 1))
    stays, rest = odds(p, q, sent(proposal.tokens, p.device))
    numbers = torch.arange(1, n + 1, device=p.device)
    at = (numbers * (u[:n] < stays)).amax(0, keepdim=True)  # the longest prefix whose draw lets it stay
    return torch.cat([at, drawn(rest.index_select(0, at), u[n : n + 1, None])[:, 0]])


def odds(p: Tensor, q: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of a chain of n tokens by laws p, q (n + 1, V), the last of q zero: the chance (n,) with which a prefix of 1..n
    tokens stays, whatever shorter ones did, and the law (n + 1, V) of the token behind 0..n of them.

    w_i = min(1, w_{i-1} p / q) is how much of a prefix the verifier's law covers; h_i is the mass that it has left
    there above the draft's, over that mass and what is not covered, and w_n at the end.
    """
    n, head = len(tokens), tokens[:, None]
    steps = p[:n].gather(1, head)[:, 0].log() - q[:n].gather(1, head)[:, 0].log()
    total = F.pad(steps.cumsum(0), (1, 0))  # (n + 1,) log of the product so far
    covered = (total - total.cummax(0).values).exp()
    left = (covered[:, None] * p - q).clamp_min(0)
    mass = left.sum(-1)
    stays = mass / (mass + 1 - covered).clamp_min(1e-300)
    return torch.cat([stays[1:n], covered[n:]]), _normalise(left, p)
