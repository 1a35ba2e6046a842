"""Benches of the runtime: ratios measured side by side in one run, median of several repeats.

`step` measures the work after a forward against the softmax that nobody can avoid; `generate` measures the loop against
its own bare forwards, and the cache policies against each other.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dllm
from dllm.call.job import prepare
from dllm.decoding.canvas import Canvas, State
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law, Prediction
from dllm.decoding.slots import Context, Sampler
from dllm.decoding.step import step as engine_step
from dllm.eval.records import Decoding
from dllm.eval.worker import hardware
from dllm.models.arguments import Checkpoint
from dllm.models.config import ModelConfig, MoEConfig
from dllm.models.model import ForwardOptions
from dllm.models.native import NativeModel
from dllm.samplers import registry

VOCABULARY, WINDOW = 126_464, 32  # LLaDA-8B's head, one block
REPEATS = 7
PROBLEM = "Tom has 12 apples. He buys 7 more. Then he gives 5 to Ann. How many apples does he have now?"


Timer = Callable[[], float]  # seconds, since whenever
Work = Callable[..., object]


@dataclass(frozen=True)
class Figure:
    """One measured ratio. `bound` is what it should stay under (`at least` when `higher_is_better`)."""

    name: str
    value: float | None  # None: not measured; the note says why
    bound: float | None = None
    higher_is_better: bool = False
    note: str = ""
    failed: bool = False  # an error kept it from being measured

    @property
    def met(self) -> bool | None:
        """Whether it is what was asked; None where nothing was asked or measured."""
        if self.bound is None or self.value is None:
            return None
        return self.value >= self.bound if self.higher_is_better else self.value <= self.bound


def machine() -> str:
    """The hardware and software of this run; no host name."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{hardware()}, {os.cpu_count()} core(s), {versions}"


def as_json(figures: Iterable[Figure]) -> str:
    """What was measured, and on which machine."""
    return json.dumps({"machine": machine(), "rows": [{**asdict(f), "met": f.met} for f in figures]}, indent=2)


def clock(device: torch.device) -> Timer:
    """Seconds at which everything that was asked of a device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def seconds(work: Work, timer: Timer = time.perf_counter) -> float:
    """What a call takes."""
    began = timer()
    work()
    return timer() - began


def side_by_side(
    a: Work, b: Work, repeats: int = REPEATS, warmup: int = 1, timer: Timer = time.perf_counter
) -> tuple[float, float]:
    """Median seconds of two callables, run in turn so that both see the same machine; the first turns do not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(warmup + repeats):
        for f, kept in zip((a, b), times, strict=True):
            kept.append(seconds(f, timer))
    return statistics.median(times[0][warmup:]), statistics.median(times[1][warmup:])


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Sums the storages that are alive, operator by operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0

    def __torch_dispatch__(
        self, func: Work, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._hold(storage.nbytes())
        weakref.finalize(storage, self._hold, -storage.nbytes())

    def _hold(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


def peak_extra(f: Work) -> int:
    """Bytes that the tensors made by `f` hold at their peak."""
    with _Allocations() as allocations:
        f()
    peak: int = allocations.peak
    return peak


def context(
    block_length: int = WINDOW, new: int = WINDOW, steps: int | None = None, vocabulary: int = VOCABULARY
) -> Context:
    """A call's context without a model: mask id last, EOS before it."""
    return Context(block_length, steps, (new,), vocabulary - 1, (vocabulary - 2,), vocabulary, 4096)


def scene(sampler: Sampler, rows: int = 1, width: int = WINDOW, mask: int = VOCABULARY - 1) -> State:
    """Rows whose whole canvas is one masked window."""
    ids = torch.full((rows, width), mask)
    masked = torch.ones_like(ids, dtype=torch.bool)
    zero = torch.zeros(rows, dtype=torch.long)
    canvas = Canvas(ids, masked, ~masked, zero, zero + width, mask)
    return State.begin(canvas, zero, canvas.length, *sampler.start(canvas))


def step(repeats: int = REPEATS) -> list[Figure]:
    """Post-forward work of one greedy step, window 32, vocabulary 126 464, float32."""
    torch.manual_seed(0)
    logits = torch.randn(1, WINDOW, VOCABULARY)
    rows = []
    cases: list[tuple[str, str, Law, float | None]] = [
        ("confidence", "confidence", Law(), 1.3),
        ("threshold", "threshold", Law(), 1.3),
        ("entropy", "entropy", Law(), None),
        ("confidence, T=0.7", "confidence", Law(0.7), None),
        ("confidence, T=0.7, top-p 0.95", "confidence", Law(0.7, 0.95), None),
    ]
    for label, name, law, bound in cases:
        sampler = registry.build(name, context())
        state = scene(sampler)

        def ours(sampler: Sampler = sampler, state: State = state, law: Law = law) -> None:
            opened, window = sampler.window.open(state)
            pred = Prediction(logits, window.reads, law=law)
            assert pred.finite
            engine_step(sampler, opened, window, pred)

        mine, base = side_by_side(ours, lambda: logits.softmax(-1).max(-1), repeats)
        rows.append(Figure(f"step / softmax-max: {label}", mine / base, bound, note=f"{mine * 1e3:.1f} ms"))
        extra = peak_extra(ours) / logits.nbytes
        rows.append(
            Figure(f"peak extra memory / window logits: {label}", 1 + extra, 2.0, note="the logits themselves count 1")
        )
    return rows


def random_model(
    width: int = 512,
    layers: int = 8,
    vocabulary: int = 32_000,
    positions: int = 2048,
    block: int | None = None,
    *,
    head_dim: int = 64,
    mlp: int | None = None,
    moe: MoEConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> NativeModel:
    """A random model of LLaDA's shape, with blocks of SDAR's, as a mixture of LLaDA2's; made where it stays.

    Cost does not depend on the weights. mlp: width of an MLP that is no mixture; None: three times that of the model.
    """
    torch.manual_seed(0)
    heads = width // head_dim
    family, architecture = ("sdar", "SDARForCausalLM") if block else ("llada", "LLaDAModelLM")
    if moe is not None:
        family, architecture = "llada2", "LLaDA2MoeModelLM"
    config = ModelConfig(
        family, architecture, vocab_size=vocabulary, embedding_rows=vocabulary, hidden_size=width, n_layers=layers,
        n_heads=heads, n_kv_heads=max(heads // 4, 1) if block else heads, head_dim=head_dim,
        intermediate_size=mlp or 3 * width, rope_full_precision=not block, qk_norm=bool(block), max_positions=positions,
        rotary_fraction=1.0 if moe is None else 0.5, mask_id=vocabulary - 1, eos_ids=(vocabulary - 2,),
        block_size=block, moe=moe,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return NativeModel(config)
    finally:
        torch.set_default_dtype(before)


class Recorder(NativeModel):
    """A model that remembers every forward and head call of a decode so that they can be run bare."""

    def __init__(self, model: NativeModel) -> None:
        vars(self).update(vars(model))
        self.fed: list[int] = []  # queries of each forward
        self.calls: list[Callable[[], Tensor]] = []

    def forward(self, ids: Tensor, pos: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """That of the model, remembered."""
        self.fed.append(ids.shape[1])
        self.calls.append(partial(super().forward, ids, pos, **options))
        return self.calls[-1]()

    def logits(self, hidden: Tensor) -> Tensor:
        """Those of the model, remembered."""
        self.calls.append(partial(super().logits, hidden))
        return self.calls[-1]()

    @torch.inference_mode()
    def replay(self) -> None:
        """Every call again, and nothing between them."""
        for call in self.calls:
            call()


def overhead(
    model: NativeModel, prompt: str | list[int], bound: float, label: str, repeats: int, **arguments: Any
) -> Figure:
    """Decode divided by the sum of its bare forwards (transformer and head on the same rows)."""
    recorder = Recorder(model)
    dllm.generate(recorder, prompt, **arguments)
    decode, bare = side_by_side(lambda: dllm.generate(model, prompt, **arguments), recorder.replay, repeats)
    note = f"{len(recorder.fed)} forwards, {decode:.2f} s"
    return Figure(f"decode / bare forwards: {label}", decode / bare, bound, note=note)


def generate(
    repeats: int = 5, length: int = 512, embedded: Checkpoint = Checkpoint("tiny"), model: NativeModel | None = None
) -> Iterator[Figure]:
    """The loop against its forwards; `dual` against `none`; cost per token as the window grows; KV memory.

    One block stands for a decode where all of its blocks cost the same: the canvas has its full length from the start.
    embedded: the checkpoint of the one row that is measured on a real model; `model`: of the other rows.
    """
    model, block = model or random_model(), 32
    common: Decoding = {"early_stop": False, "block_length": block}
    prompt = [1 + i for i in range(length)]
    for cache, steps, new, bound in (("none", 4, block, 1.02), ("dual", 16, 2 * block, 1.12)):
        call = {**common, "cache": cache, "steps": steps, "max_new_tokens": new}
        label = f"width 512, length {length}, {cache}"
        yield overhead(model, prompt[new:], bound, label, repeats, **call)
    label = "embedded model" if embedded.name == "tiny" else embedded.name
    yield overhead(dllm.load(embedded), PROBLEM, 1.3, label, repeats, max_new_tokens=64, **common)
    for steps, bound in ((32, 5.0), (8, 3.5)):
        call = {**common, "steps": steps, "max_new_tokens": block}
        full, cached = (partial(dllm.generate, model, prompt[block:], cache=c, **call) for c in ("none", "dual"))
        slow, fast = side_by_side(full, cached, repeats)
        name = f"none / dual at {steps} steps a block, length {length}"
        yield Figure(name, slow / fast, bound, True, f"{slow:.2f} and {fast:.2f} s a block")
    yield growth(model, repeats)
    c, store = model.config, model.new_store(1, length)
    expected = c.n_layers * 2 * c.n_kv_heads * c.head_dim * (length + 1) * model.dtype.itemsize
    yield Figure("KV bytes / (layers x 2 x kv heads x head dim x (length + 1) x bytes)", store.nbytes / expected, 1.0)


def growth(
    model: NativeModel,
    repeats: int,
    short: int = 128,
    long: int = 1024,
    given: int = 64,
    timer: Timer = time.perf_counter,
) -> Figure:
    """Cost per token in a window of `long` new tokens against one of `short`; `dual`, 32 steps a block, one block."""
    parts: dict[int, list[tuple[float, float]]] = {short: [], long: []}
    first_block(model, given, short)
    for _ in range(repeats):
        for new, measured in parts.items():
            measured.append(first_block(model, given, new, timer))
    median = {new: [statistics.median(part) for part in zip(*m, strict=True)] for new, m in parts.items()}
    total = {new: statistics.median(map(sum, m)) for new, m in parts.items()}
    note = "; ".join(
        f"{new}: refresh {refresh / WINDOW * 1e3:.2f} + steps {steps / WINDOW * 1e3:.2f} ms a token"
        for new, (refresh, steps) in median.items()
    )
    return Figure(f"dual, cost per token, {long} / {short} new tokens", total[long] / total[short], 2.2, note=note)


def first_block(model: NativeModel, given: int, new: int, timer: Timer = time.perf_counter) -> tuple[float, float]:
    """Seconds of the first block of a decode under `dual`: its refresh, and its other steps, one token each."""
    call = {"max_new_tokens": new, "block_length": WINDOW, "cache": "dual", "early_stop": False}
    job = prepare(model, list(range(1, 1 + given)), call)
    ticks = job.ticks(Meter(1))
    began = timer()
    next(ticks)
    refreshed = timer()
    for _ in islice(ticks, WINDOW - 1):
        pass
    return refreshed - began, timer() - refreshed
