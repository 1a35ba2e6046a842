"""What constraints cost: own work of a step at a vocabulary of full size, and their first use in a fresh process.

A step reads a block of logits that are ready. Its passes are timed apart from what is linear in the vocabulary: the
classes' weights, and the logits that are moved. The vocabulary is a byte-level one of random words, numbers, signs, and
characters of several bytes, halves among them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm.bench.runtime import REPEATS, WINDOW, Figure, context, random_model, scene
from dllm.call.job import prepare
from dllm.decoding.constraints.automaton import TokenAutomaton, Vocabulary
from dllm.decoding.constraints.bound import Bound, Rule
from dllm.decoding.constraints.compiling import compiled
from dllm.decoding.constraints.constraint import Constraint
from dllm.decoding.constraints.vocabulary import alphabet
from dllm.decoding.prediction import Prediction
from dllm.errors import unknown
from dllm.samplers import registry

SIZE = 131_072  # tokens, the last four special
MASK, END, PAD, START = range(SIZE - 4, SIZE)
PARTS = ("step", "first")

SHORT = {"type": "string", "maxLength": 20}
FOUR: dict[str, Any] = {
    "name": SHORT,
    "age": {"type": "integer"},
    "active": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
}
TWELVE: dict[str, Any] = {
    **{f"text{i}": {"type": "string", "maxLength": 24} for i in range(4)},
    **{f"n{i}": {"type": "integer"} for i in range(3)},
    "ok": {"type": "boolean"},
    "when": {"type": "string", "format": "date"},
    "kind": {"enum": ["alpha", "beta", "gamma"]},
    "score": {"type": "number"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
}


def _document(properties: dict[str, Any]) -> Constraint:
    return Constraint(json_schema={"type": "object", "properties": properties, "required": list(properties)})


ASKED = {
    "a date": Constraint(regex="[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
    "choices": Constraint(choices=["yes", "no", "maybe not", "yesterday"]),
    "4 fields": _document(FOUR),
    "12 fields": _document(TWELVE),
}


def run(parts: Iterable[str] | None = None, repeats: int = REPEATS) -> Iterator[Figure]:
    """parts: of `PARTS`; None: both. Torch has as many threads as the caller gave it."""
    for part in PARTS if parts is None else list(parts):
        if part not in PARTS:
            raise unknown("part", part, PARTS, of="the bench constraint-cost")
        yield from {"step": step, "first": first}[part](repeats)


# -- a step -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def step(repeats: int) -> Iterator[Figure]:
    """Of a block of masks that is read: milliseconds of the passes, and of what is linear in the vocabulary beside the
    softmax of the same logits."""
    words = Vocabulary.of([*pieces(SIZE - 4), *[b""] * 4])
    logits = torch.randn(1, WINDOW, SIZE, generator=torch.Generator().manual_seed(0))
    for name in ("a date", "choices", "4 fields"):
        automaton = compiled(ASKED[name].asked, words, (END,), (PAD,), (MASK, START))
        work = Step(automaton, logits)
        passes, classes, moved, softmax = work.spent(repeats)
        size = f"{automaton.states} states, {automaton.count} classes, {len(automaton.src)} edges, {WINDOW} columns"
        yield Figure(f"passes of a step, ms: {name}", passes, bound=3.0, note=size)
        note = f"{classes:.1f} ms for the classes, {moved:.1f} ms for the posterior"
        yield Figure(f"beside the passes, softmaxes: {name}", (classes + moved) / softmax, note=note)


class Step:
    """A step of one row, all of whose columns are masks, cut into what is timed apart."""

    def __init__(self, automaton: TokenAutomaton, logits: torch.Tensor) -> None:
        sampler = registry.build("threshold", context(vocabulary=SIZE))
        self.canvas, zero = scene(sampler, mask=MASK).canvas, torch.zeros(1, dtype=torch.long)
        self.rule, self.bound = Rule((automaton,), WINDOW, (END,)), Bound(zero, zero)
        self.pred = Prediction(logits, torch.arange(WINDOW)[None])

    def spent(self, repeats: int) -> tuple[float, ...]:
        """CPU milliseconds of passes, classes, posterior, softmax: medians."""
        tables = self.rule.tables.on(torch.device("cpu")).of_rows(self.bound.which)
        times: list[list[float]] = [[], [], [], []]
        for _ in range(repeats + 2):
            began = time.thread_time()
            frame, _ = self.rule.frame(tables, self.pred.cols, self.canvas, self.bound, None)
            opened = time.thread_time()
            heard = frame.hear(self.pred, 1.0)
            heard_at = time.thread_time()
            heard.lattice.marginals()
            heard.lattice.member()
            passed = time.thread_time()
            frame.moved(self.pred, heard.top.transpose(0, 1).float().flatten(0, 1))
            moved = time.thread_time()
            self.pred.logits.softmax(-1)
            ended = time.thread_time()
            spent = opened - began + passed - heard_at, heard_at - opened, moved - passed, ended - moved
            for kept, one in zip(times, spent, strict=True):
                kept.append(one * 1e3)
        return tuple(statistics.median(kept[2:]) for kept in times)


# -- the first use ----------------------------------------------------------------------------------------------------


def first(repeats: int) -> Iterator[Figure]:
    """CPU seconds from a call to its first forward, those of the process that compiles among them, in one that has
    compiled nothing before."""
    for name, bound, again in (("4 fields", 1.0, min(repeats, 3)), ("12 fields", 10.0, 1)):
        runs = [_fresh(name) for _ in range(again)]
        fresh = statistics.median(r[0] for r in runs)
        later = statistics.median(r[1] for r in runs)
        yield Figure(
            f"first use, CPU s: {name}", fresh, bound=bound, note=f"{SIZE} tokens; the next call {later:.3f} s"
        )


def _fresh(name: str) -> tuple[float, float]:
    code = f"from dllm.bench import constraint_cost; constraint_cost.used({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    fresh, later = json.loads(done.stdout.splitlines()[-1])
    return fresh, later


def used(name: str) -> None:
    """Print what the first call with a constraint takes before its forward, and what the second does, in CPU seconds,
    less what a call without one takes."""
    model = random_model(64, 1, SIZE, 512)
    model.tokenizer = tokenizer()
    call: dict[str, object] = {"max_new_tokens": 96, "block_length": WINDOW}
    spent = list[float]()
    for constraint in (None, None, ASKED[name], ASKED[name]):
        began = sum(os.times()[:4])  # of this process, and of those that it has waited for
        prepare(model, [[1, 2, 3]], {**call, "constraint": constraint})
        spent.append(sum(os.times()[:4]) - began)
    _, bare, fresh, later = spent
    print(json.dumps([fresh - bare, later - bare]))


# -- a vocabulary -----------------------------------------------------------------------------------------------------

SIGNS = "{}[]()<>\"':;,.!?+-*/=_#&|\\@$%^~`"
FRONT = ("", *"bcdfghjklmnprstvwz", "ch", "sh", "th", "st", "tr", "pl", "br", "gr")
MIDDLE = (*"aeiou", "ai", "ea", "ou", "io", "ee")
BACK = ("", "", "", *"nrstl", "nd", "ng", "st", "ck")
SCRIPTS = ((0x4E00, 20_000), (0xAC00, 11_000), (0x3040, 80), (0x400, 80), (0x5D0, 27), (0x900, 80), (0xE00, 80))


def pieces(size: int) -> list[bytes]:
    """So many different tokens; with each of them all that it begins with, as merges of byte pairs leave them."""
    rnd, known = random.Random(0), {bytes([i]): None for i in range(256)}

    def add(text: str) -> None:
        whole = text.encode()
        for n in range(2, len(whole) + 1):
            if len(known) < size:
                known[whole[:n]] = None

    for n in range(1000):
        add(f"{n:03d}")
    for a, b in itertools.product(SIGNS, repeat=2):
        add(a + b)
        add(f" {a}{b}")
    for sign in (" ", "\n", "\t", "-", "="):
        add(sign * 16)
    for a in SIGNS:
        add(f"{a}\n")
        add(f"{a} ")
    for text in ('": "', '","', '", "', '"},', '"],', '["', '":[', '": {'):
        add(text)
    while len(known) < size:
        word = "".join(
            rnd.choice(FRONT) + rnd.choice(MIDDLE) + rnd.choice(BACK) for _ in range(rnd.choice((1, 2, 2, 3)))
        )
        kind = rnd.random()
        if kind < 0.88:
            word = word.capitalize() if kind < 0.1 else word
            add(f" {word}" if kind < 0.65 else word)
        else:
            base, span = rnd.choice(SCRIPTS)
            add("".join(chr(base + rnd.randrange(span)) for _ in range(rnd.choice((1, 1, 2, 3)))))
    return list(known)


def tokenizer() -> Any:
    """The same as a tokenizer of transformers."""
    signs = alphabet()
    words = ["".join(signs[b] for b in word) for word in pieces(SIZE - 4)]
    merges = [(word[:-1], word[-1]) for word in words if len(word) > 1]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"mask_token": "<mask>", "eos_token": "<end>", "pad_token": "<pad>", "bos_token": "<start>"}
    made.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)  # type: ignore[no-untyped-call]  # foreign
