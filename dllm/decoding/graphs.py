"""Graphs: work that is pure over static tensors is captured once and replayed, so the host launches one thing a tick.

    with lent(model) as graphs:
        static = graphs.at(layout, make)    # tensors of one layout, of an earlier call where there was one
        result = graphs.run(key, work)      # eagerly, then captured, then replayed

`work` takes nothing, reads and writes static tensors in place and returns what it made. A replay runs the same kernels
at the same addresses, and none of its Python: every host value that `work` uses is part of the key, and what it reads
outlives the capture (weights, what `make` gave) or is copied into a static tensor before.

All captures of a model share one pool of memory, as they replay one at a time. So what `work` returned holds until
the next `run`, of any key: that one may write over it, earlier captures over the results of later ones included. Read
it before, or copy it into a static tensor; a replay does not wait for the host, but the stream keeps the order.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple, Protocol, TypeGuard, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dllm.errors import DllmError, first_line, out_of_memory
from dllm.models.model import Model
from dllm.models.native import NativeModel
from dllm.models.transformer import Transformer

log = logging.getLogger(__name__)
T = TypeVar("T")

LAYOUTS = 8  # whose static tensors are kept: calls of other widths, batch sizes or samplers
CAPTURES = 64  # a graph of a thousand kernels takes a few MB of the driver beside the pool
SHARE = 8  # an eighth of the device's memory at most for static tensors beside those in use, and for the pool


class Capture(NamedTuple):
    """Work that was recorded."""

    replay: Callable[[], None]  # does the device's part of it again
    result: object  # what it returned: the tensors that each replay fills


class Recorder(Protocol):
    """How one kind of device captures. What its captures make lies in one pool."""

    bytes: int  # of the pool
    limit: int  # of bytes, and of static tensors

    def allocated(self) -> int:
        """Bytes of the tensors that lie on the device."""
        ...

    def watch(self, work: Callable[[], T]) -> tuple[T, str]:
        """Do the work; also where it asked the device or waited for it, "" if it did not."""
        ...

    def record(self, work: Callable[[], object]) -> Capture:
        """Record the work without doing it. Errors: RuntimeError where it cannot be captured, or memory runs out."""
        ...


_ONE = threading.RLock()  # torch captures once at a time in a process; its debug mode and warnings are global, too


class CudaRecorder:
    """`torch.cuda.CUDAGraph` on a stream of its own, replayed on the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.limit = torch.cuda.get_device_properties(device).total_memory // SHARE
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one for all: a pool gives memory to the stream that it came from
        self._pool = torch.cuda.graph_pool_handle()
        # torch takes a pool for dead when its last capture goes: this one stays
        self._anchor = self.record(lambda: torch.zeros(1, device=device))

    def allocated(self) -> int:
        """See `Recorder`."""
        return torch.cuda.memory_allocated(self.device)

    def watch(self, work: Callable[[], T]) -> tuple[T, str]:
        """See `Recorder`. The mode warns, as an error in the middle would leave work in place half done."""
        before = torch.cuda.get_sync_debug_mode()
        with _ONE, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        asked = [w for w in said if "called a synchronizing CUDA operation" in str(w.message)]
        for w in said:
            if w not in asked and "Synchronization debug mode" not in str(w.message):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return result, f"{asked[0].filename}:{asked[0].lineno}" if asked else ""

    def record(self, work: Callable[[], object]) -> Capture:
        """See `Recorder`."""
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        with _ONE, torch.cuda.device(self.device):
            try:
                with torch.cuda.stream(stream), capture:  # the outer one is left even if the capture cannot end
                    before = torch.cuda.memory_reserved()
                    result = work()
                    self.bytes += torch.cuda.memory_reserved() - before
            except RuntimeError:
                self._abandon()
                raise
        return Capture(graph.replay, result)

    def _abandon(self) -> None:
        """Close what a capture that broke leaves open: the allocator would free no memory from then on."""
        with suppress(RuntimeError):  # it ended after all
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


@dataclass
class Counts:
    """What a call did with its graphs."""

    captures: int = 0
    replays: int = 0
    eager: int = 0  # runs of work that was not captured, or not yet
    seconds: float = 0.0  # of capturing
    bytes: int = 0  # that the captures of the model hold, beside static tensors


@dataclass
class Entry:
    """What is known of a key."""

    asked: int = 0  # uses in which it waited for the device
    clean: bool = False  # its last use did not
    eager: bool = False  # for good
    capture: Capture | None = None


@dataclass(eq=False)
class Graphs:
    """The captures of a model, and the static tensors that they work on: for one decode at a time (`lent`)."""

    device: torch.device
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._said: set[str] = set()
        self._layout: Hashable = None
        self.clear()

    def clear(self) -> None:
        """Forget all captures and static tensors, and begin with a new pool."""
        self._static: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()  # by layout, with bytes; last used last
        self._entries: OrderedDict[tuple[Hashable, Hashable], Entry] = OrderedDict()  # by layout and key, likewise
        self._recorder: Recorder | None = None

    @property
    def recorder(self) -> Recorder:
        """What captures on this device; the pool lives with it."""
        if self._recorder is None:
            self._recorder = RECORDERS[self.device.type](self.device)
        return self._recorder

    def at(self, layout: Hashable, make: Callable[[], T]) -> T:
        """The static tensors of a layout, made if there are none; keys that follow are of this layout.

        They keep the values of the last call, and must not hold the model: it could not be freed.
        """
        found = self._static.pop(layout) if layout in self._static else self._made(make)
        while (self._static and len(self._static) >= LAYOUTS) or self._others > self.recorder.limit:
            oldest, _ = self._static.popitem(last=False)
            for full in [full for full in self._entries if full[0] == oldest]:
                del self._entries[full]
        self._layout, self._static[layout] = layout, found
        return cast(T, found[0])

    @property
    def _others(self) -> int:
        return sum(size for _, size in self._static.values())

    def _made(self, make: Callable[[], T]) -> tuple[T, int]:
        """Static tensors and their bytes; others make room where memory is short."""
        try:
            before = self.recorder.allocated()
            return make(), self.recorder.allocated() - before
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not self._static:
                raise
        self.clear()
        return self._made(make)

    def run(self, key: Hashable, work: Callable[[], T], name: str = "this step") -> T:
        """What `work` returns. The tensors hold until the next `run`; `name` says in the log whose work it is."""
        entry = self._entries.pop((self._layout, key), None) or Entry()
        self._entries[self._layout, key] = entry
        if len(self._entries) > CAPTURES:
            self._entries.popitem(last=False)
        if entry.clean and entry.capture is None and not entry.eager:
            self._capture(entry, work, name)
        if entry.capture is not None:
            entry.capture.replay()
            self.counts.replays += 1
            return cast(T, entry.capture.result)
        self.counts.eager += 1
        return work() if entry.eager else self._watched(entry, work, name)

    def captured(self, key: Hashable) -> Capture | None:
        """What was captured for a key of the current layout."""
        entry = self._entries.get((self._layout, key))
        return None if entry is None else entry.capture

    def _watched(self, entry: Entry, work: Callable[[], T], name: str) -> T:
        """The first uses. One that asks has another try: it may have made what is kept from then on."""
        result, place = self.recorder.watch(work)
        entry.clean = not place
        entry.asked += bool(place)
        entry.eager = entry.asked > 1
        if entry.eager:
            self.say(f"{name} runs without CUDA graphs: it waits for the device at {place}; use tensors there")
        return result

    def _capture(self, entry: Entry, work: Callable[[], object], name: str) -> None:
        """Capture, or see that this key stays eager."""
        began = perf_counter()
        try:
            entry.capture = self.recorder.record(work)
            self.counts.captures += 1
            self.counts.bytes = self.recorder.bytes
        except (RuntimeError, MemoryError) as error:
            entry.eager = True
            short = any(out_of_memory(e) for e in (error, error.__context__) if isinstance(e, Exception))
            why = "memory ran out while capturing; a smaller batch_size leaves room" if short else first_line(error)
            self.say(f"{name} runs without CUDA graphs: {why}")
            if short:
                self._shed()
        self.counts.seconds += perf_counter() - began

    def _shed(self) -> None:
        """Give back the memory of all captures, and the static tensors of other layouts; captures come again."""
        for other in self._entries.values():
            other.capture = None
        self._static = OrderedDict((k, v) for k, v in self._static.items() if k == self._layout)
        self._recorder = None

    def say(self, what: str) -> None:
        """Log a line once."""
        if what not in self._said:
            self._said.add(what)
            log.warning(what)


class Idle(NamedTuple):
    graphs: Graphs
    weights: tuple[int, ...]


IDLE: WeakKeyDictionary[NativeModel | nn.Module, Idle] = WeakKeyDictionary()


def forget(model: Model) -> None:
    """Free what the last captured calls of a model left on the device."""
    if isinstance(model, NativeModel):
        IDLE.pop(model, None)


@contextmanager
def lent(model: NativeModel | nn.Module) -> Iterator[Graphs]:
    """The graphs of a model for one decode, which are freed with it; a decode that runs meanwhile gets its own."""
    network = model.transformer if isinstance(model, NativeModel) else model
    weights, idle = _addresses(network), IDLE.pop(model, None)
    graphs = Graphs(next(network.parameters()).device) if idle is None or idle.weights != weights else idle.graphs
    if graphs.recorder.bytes > graphs.recorder.limit:
        graphs.clear()
    graphs.counts = Counts(bytes=graphs.recorder.bytes)
    try:
        yield graphs
    except Exception:  # a tick may be half done, or memory short
        graphs.clear()
        raise
    finally:
        IDLE[model] = Idle(graphs, weights)


def _addresses(network: nn.Module) -> tuple[int, ...]:
    """Where the weights lie, and whether layers are compiled. Quantized weights have no address of their own."""
    compiled = isinstance(network, Transformer) and network.step is None
    return compiled, *(at for p in network.parameters() for at in (id(p), p.data_ptr()))


def usable(model: Model, asked: bool | None) -> TypeGuard[NativeModel]:
    """Whether a call decodes by graphs: asked, or None and they help. Errors: asked for where there can be none."""
    if isinstance(model, NativeModel):
        return granted(asked, obstacle(model.transformer, model.device))
    return granted(asked, "CUDA graphs capture this package's own backbone, not a model that brings its own code")


def granted(asked: bool | None, why_not: str) -> bool:
    """Whether what was asked is done, where it can be. Errors: it was asked for and cannot, with the reason."""
    if asked and why_not:
        raise DllmError(f"graphs=True: {why_not}; leave graphs= out")
    return asked is not False and not why_not


def obstacle(network: nn.Module, device: torch.device) -> str:
    """Why a network on this device cannot be captured; "" if it can."""
    if device.type not in RECORDERS:
        return f"CUDA graphs need a CUDA device, and this model is on {device}"
    parameters = list(network.parameters())
    split = any(hasattr(type(p), "full_tensor") for p in parameters)  # foreign: over processes
    if split or len({p.device for p in parameters}) > 1:
        return "CUDA graphs need the whole model on one device"
    return ""


def fetch(tensor: Tensor) -> list[list[int]]:
    """The values of (B, F) on the host: the one wait of a tick. It waits for what was launched, not for a copy more."""
    if tensor.device.type != "cuda":
        rows: list[list[int]] = tensor.tolist()
        return rows
    host = tensor.to("cpu", non_blocking=True)  # into pinned memory
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    event.synchronize()
    return cast(list[list[int]], host.tolist())


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    """(len(rows),) int64 on the device without a wait; never written to, and made outside of captured work."""
    return _index(tuple(rows), device)


@lru_cache(256)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.long, device=device)
    return torch.tensor(rows, dtype=torch.long, pin_memory=True).to(device, non_blocking=True)
