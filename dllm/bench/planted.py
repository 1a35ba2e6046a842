"""A planted model: its predictions are the exact conditionals of the right answers of known problems.

What a sampler loses on it, it loses by committing columns together, and by nothing else: the model makes no mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Unpack

import torch
from einops import einsum, reduce
from torch import Tensor
from torch.nn.functional import one_hot

from dllm.errors import DllmError
from dllm.models.model import NO_CACHE, ForwardOptions, Model
from dllm.models.tokenizer import Tokenizer
from dllm.models.transformer import Outputs, Rows, Said, Weights
from dllm.tasks.base import Example
from dllm.tasks.stress import right_answers

NEVER = -1e3  # the logit of what has no probability: its exponential is zero in float64, and nothing turns into NaN


class Joint:
    """A joint distribution over answers of one length, as a table.

    answers (A, n) ids; mass (A,) the probability of each, float64, by default equal.
    """

    def __init__(self, answers: Tensor, mass: Tensor | None = None) -> None:
        even = torch.full((len(answers),), 1 / len(answers), dtype=torch.float64)
        self.answers, self.mass = answers, even if mass is None else mass

    def given(self, tokens: Tensor, masked: Tensor) -> Joint:
        """The conditional, given what stands: tokens (n,), masked (n,) bool.

        Where what stands is part of no answer, that of the answers which agree with most of it.
        """
        agree = ((self.answers == tokens) & ~masked).sum(1)  # (A,)
        kept = agree == agree.max()
        mass = self.mass[kept]
        return Joint(self.answers[kept], mass / mass.sum())

    def marginals(self, vocabulary: int) -> Tensor:
        """(n, V) the probability of each token in each column."""
        columns = self.answers.T.long()  # (n, A)
        table = torch.zeros(len(columns), vocabulary, dtype=torch.float64)
        return table.scatter_add_(1, columns, self.mass.expand_as(columns)).clamp_(max=1)

    def product(self) -> float:
        """The mass that the product of the marginals has on these answers: how often a step that draws every column
        from its own marginal is right."""
        at = self._kinds()
        alone = one_hot(at).double().mul(self.mass[:, None, None]).sum(0)  # (n, K)
        return float(alone[torch.arange(at.shape[1]), at].prod(1).sum())

    def information(self) -> Tensor:
        """(n, n) the mutual information of each pair of columns in nats, 0 on the diagonal."""
        at = self._kinds()
        hot = one_hot(at).double()  # (A, n, K)
        weighed = hot * self.mass[:, None, None]
        both = einsum(hot, weighed, "a i k, a j l -> i k j l")
        alone = reduce(weighed, "a i k -> i k", "sum")
        apart = einsum(alone, alone, "i k, j l -> i k j l")
        nats = torch.where(both > 0, both * (both / apart).log(), 0.0)
        return reduce(nats, "i k j l -> i j", "sum").fill_diagonal_(0).clamp_(min=0)

    def _kinds(self) -> Tensor:
        """(A, n) the answers with their ids numbered from 0."""
        return torch.searchsorted(torch.tensor(sorted(set(self.answers.flatten().tolist()))), self.answers.long())


class Planted(Model):
    """Full forwards without a cache. The hidden states are the logits: log-conditionals in float64.

    `problems`: task and example of every prompt that it may be asked, through the tokenizer's chat template. Behind an
    answer's last word stand end tokens, with certainty. A column that is committed predicts what stands in it. Errors:
    a prompt that it was not given.
    """

    family = "planted"
    device, dtype = torch.device("cpu"), torch.float64
    batch_invariant = True
    attention_layers = 1

    def __init__(self, tokenizer: Tokenizer, problems: Iterable[tuple[str, Example]]) -> None:
        self.tokenizer, self.known = tokenizer, tokenizer.get_vocab()
        self.vocab_size = self.embedding_rows = len(self.known)
        self.max_positions = 512
        self.mask_id, self.end = self.known["<|mask|>"], self.known["<|eos|>"]
        self.eos_ids, self.pad_id = (self.end,), self.known["<|pad|>"]
        self.separator = self.known["<|sep|>"]
        self.problems = {self._prompt(e): (name, e) for name, e in problems}
        self.joints: dict[tuple[int, ...], Joint] = {}
        self.openings: dict[tuple[int, ...], Tensor] = {}  # marginals before anything stands
        self.ties: dict[tuple[tuple[int, ...], int], Tensor] = {}  # and information, by prompt and columns

    def fingerprint(self) -> str:
        """As of a loaded model: the answers depend on nothing else."""
        return "planted"

    def joint_of(self, example: Example) -> Joint:
        """The right answers to a problem."""
        return self.joint(self._prompt(example))

    def _prompt(self, example: Example) -> tuple[int, ...]:
        return tuple(self.chat([{"role": "user", "content": example.prompt}]))

    def joint(self, prompt: tuple[int, ...]) -> Joint:
        """The right answers to a prompt."""
        if prompt not in self.joints:
            if prompt not in self.problems:
                raise DllmError("the planted model knows only the problems that it was given")
            name, example = self.problems[prompt]
            words = right_answers(name, example)
            rows = [[self.known[head], *(self.known[f"Ġ{word}"] for word in tail)] for head, *tail in words]
            self.joints[prompt] = Joint(torch.tensor(rows, dtype=torch.int16))
        return self.joints[prompt]

    def forward(self, ids: Tensor, pos: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """As `Model`, without the options: (N, Q, V) logits of whole rows that begin at position 0."""
        places = torch.arange(ids.shape[1])
        if pos is not None and not ((pos == places) | (pos < 0)).all():
            raise DllmError("the planted model takes plain rows: no columns beside the canvas (wino)")
        logits = torch.full((*ids.shape, self.vocab_size), NEVER, dtype=torch.float64)
        logits[..., self.end] = 0.0  # behind the answer, and where nobody reads
        for row, (prompt, words) in enumerate(self._parted(ids)):
            start = len(prompt)
            chances = self._marginals(prompt, words)[: len(words)]
            logits[row, start : start + len(words)] = chances.log().clamp_(min=NEVER)
            logits[row, range(start), list(prompt)] = 0.0
            logits[row, : start - 1, self.end] = NEVER
        return logits

    def _parted(self, ids: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The prompt of each row, and the columns of its answer that are there."""
        for row in ids:
            tokens = row.tolist()
            prompt = tuple(tokens[: tokens.index(self.separator) + 1])
            yield prompt, row[len(prompt) :][: self.joint(prompt).answers.shape[1]]

    def forward_with(
        self,
        ids: Tensor,
        pos: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kv: bool = False,
        **options: Unpack[ForwardOptions],
    ) -> Outputs:
        """As `Model`. The attention weights of its one layer are the mutual information of a column with each other one
        under the current conditional, over their sum: what a scheduler that reads dependence off attention hopes for. A
        column that tells of no other one attends to itself.
        """
        if kv:
            raise DllmError(NO_CACHE)
        weights = None if rows is None else Weights(rows.at, self._attention(ids, rows))
        return Outputs(Said(self.forward(ids, pos, **options), weights), [])

    def _attention(self, ids: Tensor, rows: Rows) -> Tensor:
        """(N, R, width) for the queries of `rows`."""
        found = torch.eye(ids.shape[1], rows.width, dtype=torch.float64).repeat(len(ids), 1, 1)
        for row, (prompt, words) in enumerate(self._parted(ids)):
            start, nats = len(prompt), self._information(prompt, words)
            telling = (nats.sum(1) > 1e-12).nonzero()[:, 0]  # rounding tells nothing
            place = slice(start, start + len(words))
            found[row, start + telling, place] = nats[telling] / nats[telling].sum(1, keepdim=True)
        at = rows.at.clamp(min=0)[..., None].expand(-1, -1, rows.width)
        return found.gather(1, at) * (rows.at >= 0)[..., None]

    def _marginals(self, prompt: tuple[int, ...], words: Tensor) -> Tensor:
        """(n, V) given the answer's columns `words`, of which a short window has fewer than n."""
        if not self._opened(words):
            return self._given(prompt, words).marginals(self.vocab_size)
        if prompt not in self.openings:
            self.openings[prompt] = self.joint(prompt).marginals(self.vocab_size)
        return self.openings[prompt]

    def _information(self, prompt: tuple[int, ...], words: Tensor) -> Tensor:
        """(n, n) as `Joint.information`, given the answer's columns `words`."""
        key = (prompt, len(words))
        if not self._opened(words):
            return self._given(prompt, words).information()
        if key not in self.ties:
            self.ties[key] = self._given(prompt, words).information()
        return self.ties[key]

    def _opened(self, words: Tensor) -> bool:
        """Whether nothing stands yet: then the table is at its largest, and its sums are kept."""
        return bool((words == self.mask_id).all())

    def _given(self, prompt: tuple[int, ...], words: Tensor) -> Joint:
        joint = self.joint(prompt)
        return Joint(joint.answers[:, : len(words)], joint.mass).given(words, words == self.mask_id)
