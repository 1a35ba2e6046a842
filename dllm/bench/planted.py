"""A planted model: its predictions are the exact conditionals of the right answers of known problems.

What a sampler loses on it, it loses by committing columns together, and by nothing else: the model makes no mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from einops import einsum, reduce
from torch import Tensor
from torch.nn.functional import one_hot

from dllm.errors import DllmError
from dllm.models.model import ForwardOptions, Model
from dllm.models.tokenizer import Tokenizer
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
        for row, tokens in enumerate(ids.tolist()):
            start = tokens.index(self.separator) + 1
            prompt = tuple(tokens[:start])
            words = ids[row, start : start + self.joint(prompt).answers.shape[1]]
            chances = self._marginals(prompt, words)[: len(words)]
            logits[row, start : start + len(words)] = chances.log().clamp_(min=NEVER)
            logits[row, range(start), tokens[:start]] = 0.0
            logits[row, : start - 1, self.end] = NEVER
        return logits

    def _marginals(self, prompt: tuple[int, ...], words: Tensor) -> Tensor:
        """(n, V) given the answer's columns `words`, of which a short window has fewer than n."""
        joint, masked = self.joint(prompt), words == self.mask_id
        if not masked.all():
            cut = Joint(joint.answers[:, : len(words)], joint.mass)
            return cut.given(words, masked).marginals(self.vocab_size)
        if prompt not in self.openings:
            self.openings[prompt] = joint.marginals(self.vocab_size)
        return self.openings[prompt]
