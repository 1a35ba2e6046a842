"""Benches of the runtime: ratios measured side by side in one run, median of several repeats.

`step` measures the work after a forward against the softmax that nobody can avoid; `generate` measures the loop against
its own bare forwards, and the cache policies against each other.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dllm
from dllm import cache as caches
from dllm.canvas import Canvas, State
from dllm.engine import step as engine_step
from dllm.models.config import ModelConfig
from dllm.models.model import Model
from dllm.prediction import Law, Prediction
from dllm.samplers import registry
from dllm.samplers.base import Context, Sampler

VOCABULARY, WINDOW = 126_464, 32  # LLaDA-8B's head, one block
REPEATS = 7


@dataclass(frozen=True)
class Row:
    """One measured ratio. `bound` is what it should stay under (`at least` when `higher_is_better`)."""

    name: str
    value: float
    bound: float | None = None
    higher_is_better: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value >= self.bound if self.higher_is_better else self.value <= self.bound


def machine() -> str:
    """The hardware and software of this run, without names."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return (
        f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, Python {platform.python_version()}"
    )


def side_by_side(a: Callable[[], Any], b: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """Median seconds of two callables, run in turn so that both see the same machine."""
    a(), b()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for f, kept in zip((a, b), times, strict=True):
            began = time.perf_counter()
            f()
            kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


class _Allocations(TorchDispatchMode):
    """Sums the storages that are alive, operator by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self.held -= size
            self.alive.pop(key, None)

        self.alive[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


def peak_extra(f: Callable[[], Any]) -> int:
    """Bytes that the tensors made by `f` hold at their peak."""
    with _Allocations() as allocations:
        f()
    return allocations.peak


def context(
    block_length: int = WINDOW, new: int = WINDOW, steps: int | None = None, vocabulary: int = VOCABULARY
) -> Context:
    """A call's context without a model: mask id last, EOS before it."""
    return Context(block_length, steps, new, vocabulary - 1, (vocabulary - 2,), vocabulary, 4096)


def scene(sampler: Sampler, rows: int = 1, width: int = WINDOW, mask: int = VOCABULARY - 1) -> State:
    """Rows whose whole canvas is one masked window."""
    ids = torch.full((rows, width), mask)
    masked = torch.ones_like(ids, dtype=torch.bool)
    zero = torch.zeros(rows, dtype=torch.long)
    canvas = Canvas(ids, masked, ~masked, zero, zero + width, mask)
    no = zero.bool()
    return State(canvas, zero, zero, zero - 1, no, no, *sampler.start(canvas))


def step(repeats: int = REPEATS) -> list[Row]:
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
        rows.append(Row(f"step / softmax-max: {label}", mine / base, bound, note=f"{mine * 1e3:.1f} ms"))
        extra = peak_extra(ours) / logits.nbytes
        rows.append(
            Row(f"peak extra memory / window logits: {label}", 1 + extra, 2.0, note="the logits themselves count 1")
        )
    return rows


def random_model(width: int = 512, layers: int = 8, vocabulary: int = 32_000, positions: int = 2048) -> Model:
    """A random LLaDA-shaped model in float32 on the CPU."""
    torch.manual_seed(0)
    config = ModelConfig(
        family="llada", architecture="LLaDAModelLM", vocab_size=vocabulary, embedding_rows=vocabulary,
        hidden_size=width, n_layers=layers, n_heads=width // 64, n_kv_heads=width // 64, head_dim=64,
        intermediate_size=3 * width, max_positions=positions, mask_id=vocabulary - 1, eos_ids=(vocabulary - 2,),
    )  # fmt: skip
    return Model(config)


class Recorder:
    """Wraps a model: remembers every forward and head call of a decode so that they can be run bare."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls: list[tuple[str, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(("forward", args, kwargs))
        return self.model.forward(*args, **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        self.calls.append(("logits", (hidden,), {}))
        return self.model.logits(hidden)

    @torch.inference_mode()
    def replay(self) -> None:
        for name, args, kwargs in self.calls:
            getattr(self.model, name)(*args, **kwargs)


def overhead(model: Model, prompt: list[int], bound: float, label: str, repeats: int, **arguments: Any) -> Row:
    """Decode divided by the sum of its bare forwards (transformer and head on the same rows)."""
    recorder = Recorder(model)
    dllm.generate(recorder, prompt, **arguments)  # type: ignore[arg-type]
    decode, bare = side_by_side(lambda: dllm.generate(model, prompt, **arguments), recorder.replay, repeats)
    forwards = sum(name == "forward" for name, *_ in recorder.calls)
    return Row(f"decode / bare forwards: {label}", decode / bare, bound, note=f"{forwards} forwards, {decode:.2f} s")


def generate(repeats: int = 5) -> list[Row]:
    """The loop against its forwards; `dual` against `none`; cost per token as the window grows; KV memory."""
    model = random_model()
    prompt = list(range(1, 257))
    common: dict[str, Any] = {"early_stop": False, "block_length": 32}
    rows = [
        overhead(model, prompt, 1.02, "width 512, length 512, none", repeats, max_new_tokens=256, steps=16, **common),
        overhead(
            model,
            prompt,
            1.12,
            "width 512, length 512, dual",
            repeats,
            max_new_tokens=256,
            steps=64,
            cache="dual",
            **common,
        ),
        overhead(dllm.load("tiny"), prompt[:40], 1.3, "embedded model", repeats, max_new_tokens=64, **common),
    ]
    for per_block, bound in ((32, 5.0), (8, 3.5)):
        one = {**common, "max_new_tokens": 64, "steps": 2 * per_block}
        long = prompt + prompt[:192]

        def run(cache: str, one: dict[str, Any] = one, long: list[int] = long) -> Any:
            return dllm.generate(model, long, **one, cache=cache)

        slow, fast = side_by_side(partial(run, "none"), partial(run, "dual"), repeats)
        rows.append(
            Row(f"none / dual at {per_block} steps a block, length 512", slow / fast, bound, True, f"{fast:.2f} s")
        )
    rows += growth(model, repeats)
    policy = caches.policy("dual")
    assert policy.stored
    store = model.new_store(1, 512)
    c: ModelConfig = model.config
    expected = c.n_layers * 2 * c.n_kv_heads * c.head_dim * 512 * 4
    rows.append(Row("KV bytes / (layers x 2 x kv heads x head dim x length x bytes)", store.nbytes / expected, 1.0))
    return rows


def growth(model: Model, repeats: int) -> list[Row]:
    """Cost per token at 1024 new tokens against 128, `dual`, 32 steps a block, with refresh and step parts."""
    times: dict[int, tuple[float, float]] = {}
    for new in (128, 1024):
        refresh, stepping = parts(model, new)
        times[new] = refresh / new, stepping / new
    total = {new: sum(t) for new, t in times.items()}
    note = "; ".join(f"{new}: refresh {r * 1e3:.2f} + step {s * 1e3:.2f} ms/token" for new, (r, s) in times.items())
    return [Row("dual, cost per token, 1024 / 128 new tokens", total[1024] / total[128], 2.2, note=note)]


def parts(model: Model, new: int) -> tuple[float, float]:
    """Seconds of one decode spent in refreshing and in stepping forwards."""

    class Timed(Recorder):
        spent = [0.0, 0.0]  # noqa: RUF012

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            began = time.perf_counter()
            hidden = self.model.forward(*args, **kwargs)
            self.spent[args[0].shape[1] <= WINDOW] += time.perf_counter() - began
            return hidden

        def logits(self, hidden: Tensor) -> Tensor:
            return self.model.logits(hidden)

    timed = Timed(model)
    timed.spent = [0.0, 0.0]
    began = time.perf_counter()
    dllm.generate(timed, list(range(1, 65)), max_new_tokens=new, block_length=32, cache="dual", early_stop=False)  # type: ignore[arg-type]
    total = time.perf_counter() - began
    refresh = timed.spent[0]
    return refresh, total - refresh


def cache(**options: Any) -> list[Row]:
    """See bench_cache, which builds on this module."""
    return import_module("dllm.eval.bench_cache").cache(**options)


BENCHES: dict[str, Callable[..., list[Row]]] = {"step": step, "generate": generate, "cache": cache}


def as_json(rows: list[Row]) -> str:
    return json.dumps({"machine": machine(), "rows": [{**asdict(r), "met": r.met} for r in rows]}, indent=2)
