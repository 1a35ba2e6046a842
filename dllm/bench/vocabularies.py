"""`dllm bench drafting-vocabularies`: a drafter whose tokens are parts of the verifier's, by how the two are related.

The verifier is the embedded one, greedy, that tells its answers in a vocabulary of its own: the most frequent pairs of
tokens of its answers to other problems are one token there, then pairs of these. What it accepts of a draft follows
from its answer, so that no forward of it is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import numpy as np

import dllm
from dllm.bench.drafting import TASKS, held_out
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter, Need, ask
from dllm.drafting.lattice import Lattice
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.errors import DllmError
from dllm.eval.metrics import paired_gain
from dllm.models.tokenizer import Tokenizer

K, NEW, MERGES, LEARNED = 12, 96, 32, 100  # slots, tokens of an answer, pairs, answers that they are counted in
SETTINGS = {
    "strings": ("strings", 0),
    "text": ("text", 0),
    "ngrams": ("ngrams", 0),
    "ngrams, tree of 24": ("ngrams", 24),
}


class Merged:
    """A tokenizer whose vocabulary has further tokens behind another's: pairs of tokens, of which some are pairs. It
    does what relating vocabularies asks of one."""

    def __init__(self, base: Tokenizer, size: int, texts: Sequence[Sequence[int]], merges: int) -> None:
        self.base, self.size, self.pairs = base, size, dict[tuple[int, int], int]()
        texts = [list(text) for text in texts]
        for token in range(size, size + merges):
            counts = Counter(pair for text in texts for pair in pairwise(text))
            if not counts:
                break
            ((best, _),) = counts.most_common(1)
            self.pairs[best] = token
            texts = [self._merge(text, best) for text in texts]
        self.parts = {token: pair for pair, token in self.pairs.items()}

    def __len__(self) -> int:
        return self.size + len(self.pairs)

    def _merge(self, ids: Sequence[int], pair: tuple[int, int]) -> list[int]:
        out = list[int]()
        for token in ids:
            if out and (out[-1], token) == pair:
                out[-1] = self.pairs[pair]
            else:
                out.append(token)
        return out

    def merged(self, ids: Sequence[int]) -> list[int]:
        """Ids of the other tokenizer as these."""
        out = list(ids)
        for pair in self.pairs:
            out = self._merge(out, pair)
        return out

    def split(self, ids: Sequence[int]) -> list[int]:
        """The other way round."""
        return [d for i in ids for d in (self.split(self.parts[i]) if i in self.parts else [i])]

    def get_vocab(self) -> dict[str, int]:
        """Strings with their ids; a pair's is that of its parts."""
        names = {i: name for name, i in self.base.get_vocab().items()}
        return {"".join(names[i] for i in self.split([token])): token for token in (*names, *self.parts)}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return str(self.base.decode(self.split(ids), skip_special_tokens=skip_special_tokens))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The ids of a text under "input_ids"."""
        return {"input_ids": self.merged(self.base(text, add_special_tokens=add_special_tokens)["input_ids"])}


def run(n: int = 100, *, drafter: str = "tiny") -> Iterator[Figure]:
    """tau of drafts of 12 slots over n held-out prompts a task; differences to the string map, paired by prompt."""
    verifier, source = as_verifier("tiny-ar"), as_drafter(drafter)
    if not isinstance(source, DiffusionDrafter) or source.model.tokenizer is None:
        raise DllmError("vocabularies are related for a dLLM that drafts: tiny, or the folder of an aligned one")
    base = source.model.tokenizer
    for task in TASKS:
        prompts = held_out(source.model, task, n + LEARNED)
        outs = dllm.speculate(verifier, "suffix", prompts, max_new_tokens=NEW)
        texts = [(out.sequences[: out.prompt_length], out.emitted) for out in outs]
        theirs = Merged(base, source.model.vocab_size, [answer for _, answer in texts[n:]], MERGES)
        cases = [(theirs.merged(prompt), theirs.merged(answer)) for prompt, answer in texts[:n]]
        found: dict[str, list[tuple[int, int]]] = {}
        for name, (kind, tree) in SETTINGS.items():
            one = DiffusionDrafter(
                source.model, vocabulary=kind, verifier_tokenizer=cast(Tokenizer, theirs), suffix_token_id=source.suffix
            )
            need = Need(len(theirs), verifier.eos, tree=tree)
            found[name] = [_rounds(one.fork(), need, *case) for case in cases]
            tokens, rounds = np.array(found[name]).sum(0)
            note = f"{rounds} verify calls"
            if name != "strings":
                gain, low, high = paired_gain(found["strings"], found[name])
                note += f", {gain:+.2f} ({low:+.2f} to {high:+.2f}) above strings"
            yield Figure(f"{task}, {name}: tau", tokens / rounds, note=note)


def _rounds(drafter: Drafter, need: Need, prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """Tokens and rounds of a greedy text that is known."""
    ids, at, rounds = list(prompt), 0, 0
    drafter.reset(ids, need)
    while at < len(answer):
        draft = ask(drafter, ids, K)
        tokens = draft.argmax.tolist() if isinstance(draft, Lattice) else []
        paths = {tuple(tokens[:i]) for i in range(K + 1)} if isinstance(draft, Lattice) else {*draft.paths}
        kept = max(i for i in range(len(answer) - at + 1) if tuple(answer[at : at + i]) in paths)
        emitted = answer[at : at + kept + 1]
        ids, at, rounds = [*ids, *emitted], at + len(emitted), rounds + 1
        drafter.observe(ids, emitted, ())
    return len(answer), rounds
