"""Graphs: captured work equals eager work, results hold until the next run, memory is bounded, and who cannot be
captured decodes eagerly and is told once. On the CPU by the stand-in of `replay`; what that one cannot show is marked
`gpu`."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import Broken, standing_in, trace, waits
from scripted import Scripted, peaks, tiny
from torch import Tensor

from dllm.decoding import graphs
from dllm.decoding.graphs import CAPTURES, LAYOUTS, Graphs, fetch, index, lent, usable
from dllm.errors import DllmError
from dllm.models.native import NativeModel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    with standing_in():
        yield


def thrice(run: Graphs, key: object, work: Callable[[], Any], name: str = "this step") -> Any:
    """Eagerly, captured and replayed, replayed."""
    run.run(key, work, name)
    run.run(key, work, name)
    return run.run(key, work, name)


# -- the stand-in: what a CUDA graph would do -------------------------------------------------------------------------


def test_a_replay_makes_the_calls_again_and_no_python() -> None:
    x, seen, graph = torch.zeros(3), [], Graphs(CPU)

    def work() -> Tensor:
        seen.append(1)
        x.add_(1)
        return x * 2

    assert thrice(graph, 0, work).tolist() == [6.0] * 3
    assert len(seen) == 2  # eagerly, and while it was captured
    assert x.tolist() == [3.0] * 3  # the capture itself left nothing
    counts = graph.counts
    assert (counts.eager, counts.captures, counts.replays) == (1, 1, 2)
    assert counts.seconds > 0
    assert counts.bytes == 12


def test_a_host_value_is_baked_in() -> None:
    x, graph = torch.zeros(()), Graphs(CPU)
    got = [float(graph.run(0, partial(torch.add, x, step))) for step in range(4)]
    assert got == [0, 1, 1, 1]


def test_the_audit_names_the_call_with_the_host_value() -> None:
    x = torch.zeros(())

    def work(step: int) -> Tensor:
        return x.add(step)

    with standing_in(audit=True):
        graph = Graphs(CPU)
        thrice(graph, 0, lambda: work(5))
        with pytest.raises(Broken, match=r"captured as aten.add.Tensor .* 5\] at tests/test_graphs.py:\d+ and is now"):
            graph.run(0, lambda: work(6))


def test_the_audit_sees_another_input_of_the_same_shape() -> None:
    held = [torch.zeros(2), torch.ones(2)]
    with standing_in(audit=True):
        graph = Graphs(CPU)
        thrice(graph, 0, lambda: held[0] + 1)
        with pytest.raises(Broken, match="is now"):
            graph.run(0, lambda: held[1] + 1)
        with pytest.raises(Broken, match="1 calls were captured, and now there are 2"):
            graph.run(0, lambda: held[0] + 1 + 1)


def moved(x: Tensor) -> None:
    x.data = x.clone()


def grown(x: Tensor) -> None:
    x.resize_(500_000)


@pytest.mark.parametrize("change", [moved, grown])
def test_an_input_that_moved_is_an_error(change: Callable[[Tensor], None]) -> None:
    x, graph = torch.zeros(4), Graphs(CPU)
    thrice(graph, 0, lambda: x + 1)
    change(x)
    with pytest.raises(Broken, match=r"an input of shape \(4,\) (moved|was freed)"):
        graph.run(0, lambda: x + 1)


def test_a_tensor_that_the_caller_dropped_is_an_error() -> None:
    x, graph = torch.zeros(4), Graphs(CPU)

    def tick() -> None:
        rows = torch.arange(2)  # a new one a tick
        graph.run(0, lambda: x[rows])

    tick()
    tick()
    with pytest.raises(Broken, match="freed"):
        tick()


def test_a_result_holds_until_the_next_run() -> None:
    x, flags, graph = torch.zeros(2), torch.zeros(2, dtype=torch.bool), Graphs(CPU)
    both = thrice(graph, "both", lambda: (x + 1, x.long() + 2, ~flags))
    assert [t.tolist() for t in both] == [[1, 1], [2, 2], [True, True]]
    thrice(graph, "other", lambda: x + 5)
    assert both[0].isnan().all()
    assert both[1].tolist() != [2, 2]
    assert both[2].tolist() != [True, True]


QUESTIONS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "masked assignment": lambda x: x.clone().__setitem__(x > 1, 0),
    "index by a tensor": lambda x: list(range(9))[x.long()[0]],
    "slice by a tensor": lambda x: x[: x.long()[1]],
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "unique": lambda x: x.unique(),
    "tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "scalar tensor": lambda x: x + torch.tensor(1.0),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "list as an index": lambda x: x[[0, 2]],
    "assignment by a list": lambda x: x.clone().__setitem__([0, 2], 1.0),
    "another device": lambda x: x.to("meta"),
}
ANSWERS: dict[str, Callable[[Tensor], object]] = {
    "assignment of a scalar": lambda x: x.clone().__setitem__(0, 1.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "gather": lambda x: x[x.long().clamp(max=2)],
    "repeat": lambda x: x.repeat_interleave(2),
    "put": lambda x: x.clone().index_put_((x.long().clamp(max=2),), x),
    "views": lambda x: x.view(3, 1).expand(3, 2).reshape(-1).to(torch.float32),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_seen(question: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert waits(lambda: QUESTIONS[question](x)).total() == 1
    with pytest.raises(Broken, match="cannot ask the device"):
        trace(lambda: QUESTIONS[question](x))


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_stays_on_the_device_is_no_question(answer: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    for inference in (True, False):
        with torch.inference_mode(inference):
            assert not waits(lambda: ANSWERS[answer](x))
            trace(lambda: ANSWERS[answer](x))


def test_waits_say_where() -> None:
    assert set(waits(lambda: torch.zeros(2).tolist())) == {
        f"tolist at tests/test_graphs.py:{test_waits_say_where.__code__.co_firstlineno + 1}"
    }


# what the engine and the backbones use beside arithmetic: x (4, 6) float, i (4, 6) int64 of 0..5
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": lambda x, i: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None] * 2)[0, 0],
    "masked attention": lambda x, i: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], attn_mask=(i[:, :4] > 1) | torch.eye(4, dtype=torch.bool)
    )[0, 0],
    "linear": lambda x, i: F.linear(x, x[:, :6].repeat(2, 1)[:6]),
    "norm": lambda x, i: F.rms_norm(x, (6,)),
    "silu": lambda x, i: F.silu(x) * x,
    "einsum": lambda x, i: torch.einsum("ij,kj->ik", x, x).repeat(1, 2)[:, :6],
    "softmax": lambda x, i: x.softmax(-1),
    "sort": lambda x, i: x.sort(dim=1, descending=True, stable=True).values,
    "argsort": lambda x, i: x.argsort(1).to(x.dtype),
    "topk": lambda x, i: x.topk(3, dim=1).values.repeat(1, 2),
    "cumsum": lambda x, i: x.cumsum(1) * 0.1,
    "searchsorted": lambda x, i: torch.searchsorted(x.sort(1).values, x).to(x.dtype),
    "gather": lambda x, i: x.gather(1, i),
    "scatter": lambda x, i: torch.zeros_like(x).scatter(1, i, x),
    "reduce": lambda x, i: torch.zeros_like(x).scatter_reduce(1, i, x, "amax", include_self=False),
    "put": lambda x, i: x.index_put((torch.arange(4)[:, None].expand_as(i), i), -x),
    "take": lambda x, i: x[torch.arange(4)[:, None], i],
    "one hot": lambda x, i: torch.zeros_like(x).scatter_(1, i[:, :1], 1.0),
    "pad": lambda x, i: F.pad(x, (1, 1))[:, 1:-1].clone(),
    "cat": lambda x, i: torch.cat([x[:, 3:], x[:, :3]], 1),
    "split": lambda x, i: torch.cat(x.split([2, 4], 1)[::-1], 1),
    "reshape": lambda x, i: x.t().contiguous().reshape(4, 6),
    "in place": lambda x, i: x.clone().mul_(0.5).add_(i),
    "row": lambda x, i: x.clone().index_copy_(0, i[0, :1].clamp(max=3), x[:1]),
    "assign": lambda x, i: _assigned(x),
    "grouped": lambda x, i: _grouped(x),
    "foreach": lambda x, i: torch._foreach_add([x, x], 1.0)[1],
}


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = -1.0
    y[..., 2:4] = x[..., :2]
    return y


def _grouped(x: Tensor) -> Tensor:
    wide, ends = x.repeat(1, 4)[:, :16].contiguous(), torch.arange(2, 5, 2, dtype=torch.int32)
    weights = x.repeat(8, 16)[:32, :16].reshape(2, 16, 16).contiguous()
    return F.grouped_mm(wide, weights, offs=ends)[:, :6] * 0.01


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_replayed(op: str, inference: bool) -> None:
    values = [torch.rand(4, 6) for _ in range(3)]
    x, i, graph = torch.zeros(4, 6), (torch.rand(4, 6) * 6).long(), Graphs(CPU)
    got = []
    with torch.inference_mode(inference), torch.no_grad():
        for value in values:
            x.copy_(value)
            got.append(graph.run(0, lambda: OPS[op](x, i)).clone())
    assert graph.counts.replays == 2
    for value, mine in zip(values, got, strict=True):
        assert torch.equal(mine, OPS[op](value, i))


WRITES: list[Callable[[Tensor, Tensor], object]] = [
    lambda y, x: y.copy_(x),
    lambda y, x: y.add_(x),
    lambda y, x: y.masked_fill_(x > y, 0.25),
    lambda y, x: y[:, 1:].mul_(x[:, :-1]),
    lambda y, x: y.clamp_(-3, 3),
]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPS)), st.sampled_from(range(5)), st.integers(0, 2)), max_size=6),
    st.integers(0, 99),
)
def test_a_program_equals_itself_captured(program: list[tuple[str, int, int]], seed: int) -> None:
    def begin() -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        many = [torch.rand(4, 6, generator=generator) for _ in range(3)]
        return many, (torch.rand(4, 6, generator=generator) * 6).long()

    def step(state: list[Tensor], i: Tensor) -> list[Tensor]:
        made = []
        for op, write, at in program:
            made.append(OPS[op](state[at], i))
            WRITES[write](state[(at + 1) % 3], made[-1])
        return [*made, state[0] + 1]

    mine, eager, graph = begin(), begin(), Graphs(CPU)
    for _ in range(4):
        got, want = graph.run(0, lambda: step(*mine)), step(*eager)
        for a, b in zip([*got, *mine[0]], [*want, *eager[0]], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert graph.counts.replays == 3


# -- Graphs -----------------------------------------------------------------------------------------------------------


def test_the_capture_that_was_used_least_lately_goes() -> None:
    x, graph = torch.zeros(1), Graphs(CPU)
    for key in range(CAPTURES):
        thrice(graph, key, lambda: x + 1)
    graph.run(0, lambda: x + 1)
    thrice(graph, "new", lambda: x + 1)
    assert graph.captured(0)
    assert graph.captured("new")
    assert not graph.captured(1)
    assert len([k for k in range(CAPTURES) if graph.captured(k)]) == CAPTURES - 1


def test_static_tensors_are_kept_by_layout_and_go_with_their_captures() -> None:
    graph, made = Graphs(CPU), []

    def at(layout: int) -> Tensor:
        def make() -> Tensor:
            made.append(layout)
            return torch.zeros(layout + 1)

        return graph.at(layout, make)

    for layout in range(LAYOUTS):
        x = at(layout)
        thrice(graph, "key", lambda: x + 1)  # noqa: B023
    assert at(0) is at(0)
    assert graph.captured("key")
    at(LAYOUTS)  # 1 goes
    assert made == list(range(LAYOUTS + 1))
    at(1)
    assert made[-1] == 1
    assert not graph.captured("key")


def test_static_tensors_beyond_their_share_go(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, sizes = Graphs(CPU), iter([0, 60, 60, 100, 100, 190])  # before and after each is made: 60, 40, 90
    monkeypatch.setattr(type(graph.recorder), "allocated", lambda _: next(sizes))
    monkeypatch.setattr(type(graph.recorder), "limit", 100)
    first, second = (graph.at(layout, lambda: torch.zeros(1)) for layout in "ab")
    graph.at("c", lambda: torch.zeros(1))  # 60 + 40 stay beside it
    assert graph.at("a", lambda: torch.zeros(1)) is first  # and now 40 + 90 are beside this one
    sizes = iter([0, 40])
    assert graph.at("b", lambda: torch.zeros(1)) is not second


def test_static_tensors_find_room_where_others_lie() -> None:
    graph = Graphs(CPU)
    x = graph.at("old", lambda: torch.zeros(1))
    thrice(graph, "key", lambda: x + 1)

    def make() -> Tensor:
        if graph.captured("key"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(1)

    assert graph.at("new", make).item() == 1

    def never() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        graph.at("huge", never)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, after: int = 0) -> None:
    """Captures fail, but the first `after` of them."""
    stand_in = graphs.RECORDERS["cpu"]
    captures = []

    def recorder(device: torch.device) -> Any:
        made: Any = stand_in(device)
        record = made.record

        def fails(work: Callable[[], object]) -> Any:
            captures.append(1)
            if len(captures) > after:
                raise error
            return record(work)

        made.record = fails
        return made

    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)


def test_out_of_memory_in_a_capture_leaves_the_key_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), after=1)
    x, graph = torch.zeros(1), Graphs(CPU)
    graph.at("elsewhere", lambda: torch.zeros(9))
    graph.at("here", lambda: x)
    thrice(graph, "small", lambda: x + 1)
    assert graph.captured("small")
    with caplog.at_level(logging.WARNING):
        assert thrice(graph, "large", lambda: x + 2).tolist() == [2.0]
        thrice(graph, "large", lambda: x + 2)
    assert [r.message for r in caplog.records] == [
        "this step runs without CUDA graphs: memory ran out while capturing; a smaller batch_size leaves room"
    ]
    assert not graph.captured("small")  # its memory was given back
    assert graph.counts.eager == 7
    remade = []
    graph.at("elsewhere", lambda: remade.append(1))
    assert remade


def test_what_cannot_be_captured_runs_eagerly_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore of it"))
    x, graph = torch.zeros(1), Graphs(CPU)
    with caplog.at_level(logging.WARNING):
        for key in range(3):
            thrice(graph, key, lambda: x.add_(1), "sampler 'mine'")
    assert x.item() == 9
    assert [r.message for r in caplog.records] == [
        "sampler 'mine' runs without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_a_mistake_in_the_work_is_no_failed_capture() -> None:
    graph = Graphs(CPU)

    def work() -> Tensor:
        raise DllmError("wrong")

    for _ in range(3):
        with pytest.raises(DllmError):
            graph.run(0, work)


def test_work_that_asks_runs_eagerly_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x, graph = torch.zeros(1), Graphs(CPU)

    def work() -> int:
        x.add_(1)
        return int(x)

    with caplog.at_level(logging.WARNING):
        assert [graph.run("key", work, "sampler 'mine'") for _ in range(5)] == [1, 2, 3, 4, 5]
    line = work.__code__.co_firstlineno + 2
    assert [r.message for r in caplog.records] == [
        f"sampler 'mine' runs without CUDA graphs: it waits for the device at tests/test_graphs.py:{line} "
        "(_local_scalar_dense); use tensors there"
    ]
    assert (graph.counts.eager, graph.counts.captures) == (5, 0)


def test_work_that_makes_a_constant_once_is_captured() -> None:
    x, made, graph = torch.zeros(2), list[Tensor](), Graphs(CPU)

    def work() -> Tensor:
        if not made:
            made.append(torch.tensor([1.0, 2.0]))
        return x + made[0]

    assert [graph.run(0, work).tolist() for _ in range(4)] == [[1.0, 2.0]] * 4
    assert (graph.counts.eager, graph.counts.captures, graph.counts.replays) == (2, 1, 2)


# -- of a model -------------------------------------------------------------------------------------------------------


def test_graphs_stay_with_their_model_and_are_freed_with_it() -> None:
    def decode() -> weakref.ref[NativeModel]:
        model = tiny()
        with lent(model) as first:
            x = first.at("layout", lambda: torch.zeros(1, 3, dtype=torch.long))
            thrice(first, "key", lambda: model.transformer.embed_tokens(x))
        with lent(model) as again:
            assert again is first
            assert again.at("layout", lambda: torch.ones(1)) is x
            assert again.captured("key")
            assert again.counts.captures == 0
            assert again.counts.bytes > 0
        return weakref.ref(model)

    model = decode()
    gc.collect()
    assert model() is None
    assert not graphs.IDLE


def test_a_decode_that_runs_meanwhile_has_its_own() -> None:
    model = tiny()
    with lent(model) as first, lent(model) as second:
        assert first is not second


def test_a_model_that_moved_is_captured_anew() -> None:
    model = tiny()
    with lent(model) as first:
        pass
    model.to(dtype=torch.float32)
    with lent(model) as second:
        assert first is not second


def test_a_model_that_was_compiled_since_is_captured_anew() -> None:
    model = tiny()
    with lent(model) as first:
        pass
    model.compile()
    with lent(model) as second:
        assert first is not second


def test_captures_beyond_their_share_go_before_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(), torch.zeros(4)
    with lent(model) as graph:
        thrice(graph, "key", lambda: x + 1)
        monkeypatch.setattr(type(graph.recorder), "limit", 15)
    with lent(model) as again:
        assert not again.captured("key")


def test_an_error_in_a_decode_clears_its_graphs() -> None:
    model, x = tiny(), torch.zeros(4)
    with pytest.raises(DllmError), lent(model) as graph:
        thrice(graph, "key", lambda: x + 1)
        raise DllmError("NaN")
    with lent(model) as again:
        assert not again.captured("key")


# -- the flag ---------------------------------------------------------------------------------------------------------


def test_where_graphs_help_they_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    assert usable(model, None)
    assert usable(model, True)
    assert not usable(model, False)
    assert not usable(Scripted(peaks([(1, 0.5)], 4)), None)


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_asked_for_on_another_device_is_an_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    model = tiny()
    monkeypatch.setattr(type(model), "device", torch.device(kind))
    assert not usable(model, None)
    with pytest.raises(DllmError) as error:
        usable(model, True)
    assert str(error.value) == (
        f"graphs=True: CUDA graphs need a CUDA device, and this model is on {kind}; leave graphs= out"
    )


def test_asked_for_a_foreign_model_is_an_error() -> None:
    with pytest.raises(DllmError, match=r"own backbone, not a model that brings its own code; leave graphs= out$"):
        usable(Scripted(peaks([(1, 0.5)], 4)), True)


def test_asked_for_a_model_on_several_devices_is_an_error() -> None:
    model = tiny()
    model.transformer.norm.to("meta")
    assert not usable(model, None)
    with pytest.raises(DllmError, match="need the whole model on one device; leave"):
        usable(model, True)


# -- one wait ---------------------------------------------------------------------------------------------------------


def test_flags_come_in_one_wait_and_rows_go_without() -> None:
    flags = torch.arange(6).view(2, 3)
    assert waits(lambda: fetch(flags)).total() == 1
    assert fetch(flags) == [[0, 1, 2], [3, 4, 5]]
    assert index([2, 0], CPU).tolist() == [2, 0]
    assert index(range(2), CPU) is index((0, 1), CPU)
    assert index([], CPU).dtype == torch.long
