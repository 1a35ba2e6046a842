"""A stand-in for CUDA graphs on the CPU, and a spy on what would make the host wait for a device.

    with standing_in():                  # `Graphs` capture on the CPU
        dllm.generate(model, prompt, graphs=True)
    assert waits(work).total() == 1      # "_local_scalar_dense at samplers/mine.py:31", ...

A capture records every ATen call of the work with its very tensors; a replay makes exactly these calls, and no Python
of the work runs again. So what a CUDA graph bakes in is baked in here: host values, shapes, addresses. All tensors
that captures made are spoilt before the next use, as captures of one pool write over each other. What cannot be
captured is an error (`Broken`): questions to the device, constants that come from the host, inputs that moved.
`standing_in(audit=True)` also traces the work at each replay and says which call is another than the captured one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dllm.decoding import graphs
from dllm.decoding.graphs import Capture, Graphs

T = TypeVar("T")
CPU, COMPOSITE = torch._C.DispatchKey.CPU, torch._C.DispatchKey.CompositeImplicitAutograd

# ops whose result, or its shape, the host must know
QUESTIONS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}  # the values go to the host, past the dispatcher


class Broken(AssertionError):
    """What a CUDA graph could not do, or would do wrong."""


def tensors(nest: object) -> list[Tensor]:
    """Those of an argument or a result of an ATen call: one, or lists of them."""
    if isinstance(nest, Tensor):
        return [nest]
    return [t for x in nest for t in tensors(x)] if isinstance(nest, list | tuple) else []


def storage(t: Tensor) -> int:
    """Names the memory of a tensor, as long as somebody holds it."""
    return t.untyped_storage()._cdata


def place() -> str:
    """The line outside of torch and of this file that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not (file := shown(frame.f_code.co_filename)):
        frame = frame.f_back
    return f"{file}:{frame.f_lineno}"


@cache
def shown(file: str) -> str:
    """How a file is named; torch's files and this one are not."""
    return "" if any(s in file for s in ("/torch/", __file__, "contextlib")) else "/".join(Path(file).parts[-2:])


# -- the spy --------------------------------------------------------------------------------------------------------


class Calls(TorchFunctionMode):
    """What the dispatcher is not told: reads of whole tensors, and that a scalar is assigned."""

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__()
        self.told, self.assigning = told, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.told(func.__name__)
        self.assigning = func is Tensor.__setitem__
        try:
            return func(*args, **kwargs or {})
        finally:
            self.assigning = False


class Known(NamedTuple):
    """Of an ATen op."""

    composite: bool  # made of others
    indexes: bool
    writes: tuple[tuple[int, str], ...]  # the arguments that it writes to

    @classmethod
    @cache
    def of(cls, func: OpOverload) -> Known:
        composite = func.has_kernel_for_dispatch_key(COMPOSITE) and not func.has_kernel_for_dispatch_key(CPU)
        said = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments)]
        writes = tuple((i, name) for i, name, alias in said if alias is not None and alias.is_write)
        return cls(composite, func._opname.startswith(("index", "_index_put", "_unsafe_index")), writes)


class Ops(TorchDispatchMode):
    """Every ATen call, composite ones in their parts; `told` of each that waits."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap each call to keep its compiler away

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__()
        self.told, self.calls = told, Calls(told)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Known.of(func).composite:
            with self:
                return func.decompose(*args, **kwargs)
        if self._waits(func, args, kwargs):
            self.told(func._opname)
        return self.call(func, args, kwargs)

    def call(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _waits(self, func: OpOverload, args: Any, kwargs: Any) -> bool:
        name = func._opname
        if name == "lift_fresh":  # a tensor made of host data; a scalar that is assigned travels with the launch
            return not (self.calls.assigning and args[0].dim() == 0)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if Known.of(func).indexes and len(args) > 1 and isinstance(args[1], list):
            return any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        if name in ("_to_copy", "copy_"):
            given = tensors([*args, *kwargs.values()])
            devices = {t.device for t in given if t.dim()} | {kwargs.get("device") or args[0].device}
            return len(devices) > 1
        return name in QUESTIONS


def waits(work: Callable[[], object]) -> Counter[str]:
    """How often `work` would wait for a device, by what and where."""
    found: Counter[str] = Counter()
    ops = Ops(lambda what: found.update([f"{what} at {place()}"]))
    with ops.calls, ops:
        work()
    return found


# -- the capture ----------------------------------------------------------------------------------------------------


class Outside(NamedTuple):
    """A tensor that a capture reads or writes and did not make: where it lies. The capture does not keep it alive."""

    ref: StorageWeakRef
    address: int
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, t: Tensor) -> Outside:
        s = t.untyped_storage()
        layout = tuple(t.shape), t.stride(), int(t.storage_offset())
        return cls(StorageWeakRef(s), s.data_ptr(), s.nbytes(), t.dtype, *layout)

    def tensor(self) -> Tensor:
        now = torch.UntypedStorage._new_with_weak_ptr(self.ref.cdata)
        if now is None:
            raise Broken(f"an input of shape {self.size} was freed after its capture")
        if (now.data_ptr(), now.nbytes()) != (self.address, self.nbytes):
            raise Broken(f"an input of shape {self.size} moved or changed its size after its capture")
        return torch.empty(0, dtype=self.dtype).set_(now, self.offset, self.size, self.stride)


class Call(NamedTuple):
    """One ATen call: its arguments, and which tensors of its result it made."""

    func: OpOverload
    args: list[object]
    kwargs: dict[str, object]
    names: list[object]  # of the arguments, to compare with those of another trace
    made: list[tuple[int, Tensor]]
    place: str

    def again(self) -> None:
        out = self.func(*map(now, self.args), **{name: now(x) for name, x in self.kwargs.items()})
        if self.made:
            new = tensors(out)
            for i, old in self.made:
                old.copy_(new[i])


def now(x: object) -> object:
    """An argument of a replay."""
    if isinstance(x, list):
        return [now(y) for y in x]
    return x.tensor() if isinstance(x, Outside) else x


class Recording(Ops):
    """The calls of some work, undone when they are recorded."""

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__(told)
        self.done: list[Call] = []
        self.made: dict[int, tuple[int, Tensor]] = {}  # by memory: a number, and a tensor that holds it
        self.scalars: dict[int, Tensor] = {}  # that were assigned: a launch carries them
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # what was written to, and was
        self.pool: WeakSet[Recording] = WeakSet()  # that it shares

    def call(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if func._opname == "lift_fresh":
            self.scalars[storage(args[0])] = args[0]
        given = [*args, *kwargs.values()]
        names, kept = [self._name(x) for x in given], [self._kept(x) for x in given]
        written = self._written(func, args, kwargs)
        for t in written:
            if storage(t) not in self.made and storage(t) not in self.before:
                self.before[storage(t)] = t.untyped_storage(), t.untyped_storage().clone()
        out = func(*args, **kwargs)
        known = {storage(t) for t in tensors(given)}
        made = [(i, t) for i, t in enumerate(tensors(out)) if storage(t) not in known]
        for _, t in made:
            self.made[storage(t)] = len(self.made), t
        if made or written:
            n, named = len(args), dict(zip(kwargs, kept[len(args) :], strict=True))
            self.done.append(Call(func, kept[:n], named, names, made, place()))
        return out

    def undo(self) -> None:
        for now, before in self.before.values():
            now.copy_(before, non_blocking=False)
        self.before.clear()

    def close(self) -> None:
        """Nothing is made from now on: what will be written over numbers; flags are turned."""
        made = [t for _, t in self.made.values()]
        numbers, self.flags = ([t for t in made if (t.dtype == torch.bool) == flag] for flag in (False, True))
        values = [torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max // 3 for t in numbers]
        wrong = [torch.full((), x, dtype=t.dtype).expand_as(t) for t, x in zip(numbers, values, strict=True)]
        self.numbers = numbers, wrong

    def spoil(self) -> None:
        """Overwrite everything that the capture made."""
        if self.numbers[0]:
            torch._foreach_copy_(*self.numbers)
        for t in self.flags:
            t.logical_not_()

    @torch.inference_mode()
    def replay(self) -> None:
        spoil(self.pool)
        for call in self.done:
            call.again()

    def compare(self, other: Recording) -> None:
        """Errors: the first call of `other` that is not what was captured."""
        for n, (mine, new) in enumerate(zip(self.done, other.done, strict=False)):
            if (mine.func, repr(mine.names)) != (new.func, repr(new.names)):
                was, now = (f"{c.func} {c.names} at {c.place}" for c in (mine, new))
                raise Broken(f"call {n} was captured as {was} and is now {now}")
        if len(self.done) != len(other.done):
            raise Broken(f"{len(self.done)} calls were captured, and now there are {len(other.done)}")

    def _kept(self, x: object) -> object:
        if isinstance(x, list):
            return [self._kept(y) for y in x]
        outside = isinstance(x, Tensor) and storage(x) not in self.made and storage(x) not in self.scalars
        return Outside.of(x) if outside else x

    def _name(self, x: object) -> object:
        if isinstance(x, list):
            return [self._name(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        if storage(x) in self.scalars:
            return x.item()
        made = self.made.get(storage(x))
        memory = hex(x.untyped_storage().data_ptr()) if made is None else f"#{made[0]}"
        return memory, x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset())

    @staticmethod
    def _written(func: OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
        return tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in Known.of(func).writes])


@torch.inference_mode()
def spoil(pool: WeakSet[Recording]) -> None:
    for recording in pool:
        recording.spoil()


class StandIn:
    """A `Recorder` for the CPU."""

    limit = sys.maxsize

    def __init__(self, device: torch.device) -> None:
        self.pool: WeakSet[Recording] = WeakSet()

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for recording in self.pool for _, t in recording.made.values())

    def allocated(self) -> int:
        return 0

    def watch(self, work: Callable[[], T]) -> tuple[T, str]:
        spoil(self.pool)
        found: list[str] = []
        ops = Ops(lambda what: found.append(f"{place()} ({what})"))
        with ops.calls, ops:
            result = work()
        return result, "".join(found[:1])

    def record(self, work: Callable[[], object]) -> Capture:
        recording, result = trace(work)
        recording.close()
        recording.pool = self.pool
        self.pool.add(recording)
        return Capture(recording.replay, result)


def trace(work: Callable[[], T]) -> tuple[Recording, T]:
    """What the work calls and returns; nothing of it lasts. Errors: what cannot be captured."""

    def told(what: str) -> None:
        raise Broken(f"{what} at {place()}: a capture cannot ask the device, or bring values from the host")

    recording = Recording(told)
    try:
        with recording.calls, recording:
            result = work()
    finally:
        recording.undo()
    return recording, result


@contextmanager
def standing_in(audit: bool = False) -> Iterator[None]:
    """`Graphs` on the CPU; with `audit` every replay is compared with what its work would do now."""
    run = Graphs.run

    def audited(self: Graphs, key: Hashable, work: Callable[[], T], name: str = "this step") -> T:
        capture = self.captured(key)
        if capture is not None:
            recording: Recording = capture.replay.__self__  # type: ignore[attr-defined]
            recording.compare(trace(work)[0])
        return run(self, key, work, name)

    with (
        mock.patch.dict(graphs.RECORDERS, {"cpu": StandIn}),
        mock.patch.object(graphs, "IDLE", WeakKeyDictionary()),
        mock.patch.object(Graphs, "run", audited if audit else run),
    ):
        yield
