"""What a sampler costs beside the model: own work of a step for each head row, against plain `threshold`.

A tick runs through the real engine on a model that computes nothing: its logits are tables of LLaDA-8B's width. The CPU
time of what is left (window, plan, inputs, prediction, scores, selection, amends) is divided by the head rows that were
read. One thread, one row, float32; all samplers take turns in one run, and medians are compared.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from dllm.bench.runtime import REPEATS, VOCABULARY, WINDOW, Figure, context, scene
from dllm.decoding.cache.tail import NoCache
from dllm.decoding.engine import opening
from dllm.decoding.facts import fetch
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law
from dllm.decoding.runner import Batch, Options, Runner
from dllm.decoding.slots import Context, Sampler
from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.native import NativeModel
from dllm.models.transformer import Outputs, Rows, Said, Weights
from dllm.samplers import registry
from dllm.samplers.learn2pd import Filter

log = logging.getLogger(__name__)

BASE = "threshold"
STEPS = 4  # consecutive steps of one block: history has begun, and both halves of a remasking loop are among them
BOUND = 1.5
BOUNDS = {**dict.fromkeys(("entropy", "eb", "dream", "ccd", "credit"), 2.0), "klass": 2.5}


def identity(size: int) -> Filter:
    """A Learn2PD filter of the usual shape: it accepts a column above its confidence."""
    eye, no = torch.eye(size), torch.zeros(size)
    weights = {"linear1.weight": eye, "linear1.bias": no, "linear2.weight": 10 * eye, "linear2.bias": no - 5}
    return Filter(weights, size)


# beside each `example` of a method: what this bench lacks (a tokenizer, a filter of its window), and settings that show
# both halves of a remasking loop within its steps
GIVEN: dict[str, dict[str, object]] = {
    "adablock": {"delimiters": [198]},
    "learn2pd": {"filter": identity(WINDOW)},
    "remdm": {"fill": 0.0},
}
SHIFTED = ("fast_dllm_v2",)  # for block-causal models with shifted logits


class Tables(NativeModel):
    """Stands where the model stands. Its logits are ready: the table of the running step, read without a copy."""

    def __init__(self, tables: list[Tensor]) -> None:
        size, device = tables[0].shape[1], tables[0].device
        config = ModelConfig(
            "llada", "LLaDAModelLM", vocab_size=size, embedding_rows=size, hidden_size=1, n_layers=1, n_heads=1,
            n_kv_heads=1, head_dim=1, intermediate_size=1, max_positions=5 * WINDOW, mask_id=size - 1,
            eos_ids=(size - 2,),
        )  # fmt: skip
        super().__init__(config)
        self.to(device)
        self.tables = tables  # each (rows, V); read again from the top where a step reads more
        places = 5 * WINDOW
        weights = torch.rand(1, places, places, generator=torch.Generator().manual_seed(1)).softmax(2)
        self.weights = weights.to(device)
        self.step = self.rows = 0  # which table; head rows read so far

    def forward(self, ids: Tensor, pos: Tensor | None = None, **_: object) -> Tensor:
        """Nothing, in the shape of hidden states."""
        return torch.zeros(*ids.shape, 1, device=ids.device)

    def forward_with(
        self, ids: Tensor, pos: Tensor | None = None, *, rows: Rows | None = None, kv: bool = False, **_: object
    ) -> Outputs:
        """The same, and attention weights that are ready, too: those of the first rows of a table."""
        assert rows is not None and pos is not None
        cols = torch.where(rows.at < 0, -1, pos.gather(1, rows.at.clamp(min=0)))
        return Outputs(Said(self.forward(ids, pos), Weights(cols, self.weights[:, : cols.shape[1], : rows.width])), [])

    def logits(self, hidden: Tensor) -> Tensor:
        """As many rows of the step's table as are asked for, counted."""
        n = hidden.shape[0] * hidden.shape[1]
        self.rows += n
        table = self.tables[self.step]
        table = table.repeat(-(-n // len(table)), 1) if n > len(table) else table
        return table[:n].view(*hidden.shape[:2], -1)


class Lap:
    """A sampler with the states of its first steps, ready to be stepped again."""

    def __init__(self, name: str, model: Tables) -> None:
        self.name, self.model = name, model
        frame = call(name, model.vocab_size)
        sampler = build(name, frame).reading(model.attention_layers)
        policy, law = NoCache(block_size=frame.block_size, shift=frame.shift), Law(filtered=sampler.needs.filtered)
        self.run = Runner(model, sampler, policy, Options(law))
        queue = scene(sampler, mask=model.vocab_size - 1)
        batch, self.states = opening(sampler, policy, queue, Meter(1).rows), list[Batch]()
        for k in range(STEPS):
            self.states.append(batch)
            batch = self.tick(k)
            if batch.facts[0].done:
                break
        model.rows = 0
        self.time()
        self.rows = model.rows

    def tick(self, k: int) -> Batch:
        """The row behind step `k`."""
        self.model.step = k
        batch = dataclasses.replace(self.states[k])
        self.run.tick(batch)
        batch.facts = fetch(batch.flags)
        return batch

    @torch.inference_mode()
    def time(self) -> float:
        """CPU seconds of all steps."""
        began = time.thread_time()
        for k in range(len(self.states)):
            self.tick(k)
        return time.thread_time() - began


def call(name: str, vocabulary: int = VOCABULARY) -> Context:
    """The call in which a sampler is measured."""
    frame = context(vocabulary=vocabulary)
    return dataclasses.replace(frame, shift=1, block_size=WINDOW) if name in SHIFTED else frame


def spec(name: str) -> dict[str, object]:
    """A sampler at its defaults, but for what it must be told."""
    return {"name": name, **registry.method(name).example, **GIVEN.get(name, {})}


def build(name: str, frame: Context) -> Sampler:
    """A sampler that runs in this bench."""
    return registry.build(spec(name), frame)


def run(names: Iterable[str] | None = None, repeats: int = REPEATS, vocabulary: int = VOCABULARY) -> list[Figure]:
    """One row a sampler: own work of a step and head row, divided by that of `threshold`.

    names: samplers to measure; None for all that are registered and can be built. Errors: fewer than 5 repeats, unknown
    names.
    """
    if repeats < 5:
        raise DllmError(f"own work: repeats={repeats} must be at least 5, a median of fewer says little")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(runnable() if names is None else list(names), repeats, vocabulary)
    finally:
        torch.set_num_threads(threads)


def runnable() -> list[str]:
    """The registered samplers that can be built here; the others are logged with their reason."""
    found = []
    for name in registry.names():
        try:
            build(name, call(name))
            found.append(name)
        except DllmError as reason:
            log.warning("not measured: %s", reason)
    return found


def _run(names: list[str], repeats: int, vocabulary: int) -> list[Figure]:
    model = Tables(tables(vocabulary))
    base, laps = Lap(BASE, model), [Lap(name, model) for name in names]
    turns = [[(lap.time() / lap.rows, base.time() / base.rows) for lap in laps] for _ in range(repeats)]
    rows = []
    for lap, pairs in zip(laps, zip(*turns, strict=True), strict=True):
        spent, read = statistics.median(mine for mine, _ in pairs), lap.rows / len(lap.states)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        note = f"{spent * 1e6:.0f} us a head row, {read:.0f} rows a step"
        rows.append(Figure(lap.name, ratio, BOUNDS.get(lap.name, BOUND), note=note))
    return rows


def tables(vocabulary: int = VOCABULARY, steps: int = STEPS) -> list[Tensor]:
    """A table for each step: random logits, three more columns sure of their token (so that a step commits several)."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(5 * WINDOW, vocabulary, generator=generator) for _ in range(steps)]
    for k, logits in enumerate(made):
        logits[4 * k : 4 * k + 3, 100] += 30
    return made
