"""`dllm.Engine`: requests of any settings that come, wait, share forwards, fail and go, and get what they get alone.

`ByHand` has no thread, so a test says when a tick is; what concerns the thread runs the real one.
"""

from __future__ import annotations

import re
import threading
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import model
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from replay import standing_in
from scripted import tiny

import dllm
from dllm.bench.runtime import peak_extra, random_model
from dllm.call import budget as budgets
from dllm.call import engine as calls
from dllm.call.engine import OVERTAKES, Request
from dllm.call.job import Job
from dllm.decoding.canvas import Plan
from dllm.decoding.engine import Group, Waiting
from dllm.decoding.facts import COLUMNS, Facts, matched
from dllm.decoding.merging import together
from dllm.decoding.trace import BLANK
from dllm.errors import Cancelled, DllmError, QueueFull, TimedOut

PROMPTS = ("Tom has 12 apples.", "Ann has 3 cats and buys 4 more cats.", "5", "Say a number.")
LONG = "Tom has 12 apples. He buys 7 more."  # its answer comes in several pieces
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 4, "early_stop": False}


class ByHand(dllm.Engine):
    """An engine whose ticks are asked for."""

    def _start(self) -> None:
        pass

    def turns(self, n: int) -> None:
        for _ in range(n):
            self._turn()

    def finish(self) -> None:
        while self._line or self._seats:
            self._turn()


@cache
def embedded() -> Any:
    return dllm.load("tiny", dtype="float64")


@cache
def network() -> Any:
    return tiny()


@cache
def alone(prompt: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    return dllm.generate(embedded(), prompt, **dict(arguments))


SAMPLERS = ["confidence", "threshold:tau=0.6", "klass", "prophet", "random", "localleap+credit", "saber"]
ARGUMENTS = st.fixed_dictionaries(
    {"sampler": st.sampled_from(SAMPLERS), "max_new_tokens": st.sampled_from([6, 16]), "block_length": st.just(8)},
    optional={
        "cache": st.sampled_from(["none", "prefix", "dual"]),
        "temperature": st.just(0.8),
        "seed": st.integers(0, 2),
        "lookahead": st.just(3),
        "logprobs": st.just(1),
    },
)
GUIDED = st.sampled_from([{}, {"cfg_scale": 0.5}, {"sampler": "wino"}])  # one way to feed more rows
ENDS = st.sampled_from([{}, {}, {"stop": "7"}, {"choices": ("yes", "no", "12 apples")}, {"regex": "[0-9]{1,3} cats"}])
ARRIVALS = st.tuples(
    st.sampled_from(PROMPTS),
    st.tuples(ARGUMENTS, GUIDED, ENDS).map(lambda parts: parts[0] | parts[1] | parts[2]),
    st.integers(0, 9),  # turns before it comes
    st.none() | st.none() | st.integers(0, 6),  # and until it is cancelled
    st.sampled_from(["shared", "shared", "alone"]),
)


@given(st.lists(ARRIVALS, min_size=2, max_size=12), st.integers(1, 6))
@settings(max_examples=10, phases=[Phase.generate])  # to shrink one takes minutes
def test_every_request_gets_what_it_gets_alone(arrivals: list[Any], rows: int) -> None:
    engine, came = ByHand(embedded(), max_rows=rows), dict[int, Request[Any]]()
    for turn in range(16):
        for i, (prompt, arguments, at, until, batch) in enumerate(arrivals):
            if at == turn:
                came[i] = engine.submit(prompt, batch=batch, **arguments)
            if until is not None and at + until == turn:
                came[i].cancel()
        engine.turns(1)
    engine.finish()
    assert engine.load[:4] == (0, 0, 0, 0)
    for i, (prompt, arguments, _, until, _) in enumerate(arrivals):
        request = came[i]
        assert request.done
        if isinstance(request.error, Cancelled):
            assert until is not None
            continue
        ours, theirs = request.result(), alone(prompt, tuple(sorted(arguments.items())))
        assert (ours.tokens, ours.text, ours.finish_reason) == (theirs.tokens, theirs.text, theirs.finish_reason)
        assert (ours.nfe, ours.positions) == (theirs.nfe, theirs.positions)
        assert ours.sequences == theirs.sequences


def test_requests_of_one_setting_share_forwards_and_join_a_group_that_runs() -> None:
    engine = ByHand(network(), max_rows=4)
    first = engine.submit([1, 2, 3], **CALL)
    engine.turns(5)
    others = [engine.submit([7, 8], seed=i, **CALL) for i in range(3)]
    engine.turns(1)
    assert engine.load[:3] == (4, 0, 1)
    engine.turns(6)
    assert first.done and not any(r.done for r in others)  # 12 forwards, one token each
    engine.turns(5)
    assert all(r.done for r in others)


def test_rows_of_other_widths_are_a_group() -> None:
    """Their forwards are apart where padding would cost more than rounding up to COLUMNS does."""
    net, prompts = counting(), [[1, 2, 3], [4] * 70, [5] * 200]
    engine = ByHand(net, max_rows=4)
    requests = [engine.submit(p, **CALL) for p in prompts]
    engine.turns(1)
    assert engine.load.groups == 1
    assert sorted(net.fed) == [(1, 212), (2, 82)]
    engine.finish()
    for request, prompt in zip(requests, prompts, strict=True):
        ours, theirs = request.result(), dllm.generate(network(), prompt, **CALL)
        assert (ours.tokens, ours.nfe, ours.positions) == (theirs.tokens, theirs.nfe, theirs.positions)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([50, 68, 63], [[0, 1, 2]]),
        ([64, 65, 64], [[0, 1, 2]]),
        ([5, 100, 5], [[1], [0, 2]]),
        ([200, 10, 190, 20], [[0, 2], [1, 3]]),
    ],
)
def test_rows_of_a_group_pay_for_no_more_than_rounding_up(sizes: list[int], parts: list[list[int]]) -> None:
    facts = [Facts._make([0] * len(Facts._fields))._replace(size=n) for n in sizes]
    assert matched(range(len(sizes)), facts) == parts
    for part in parts:
        rounded = sum(-(-sizes[i] // COLUMNS) * COLUMNS for i in part)
        assert len(part) * max(sizes[i] for i in part) <= rounded


class Recording(ByHand):
    """An engine that notes when there are news (n), when they are passed on (p), and when forwards begin (f)."""

    def __init__(self, **given: Any) -> None:
        self.order = ""
        super().__init__(network(), **given)

    def _forward(self, asked: Any) -> None:
        self.order += "f"
        super()._forward(asked)


def test_what_a_tick_told_is_passed_on_once_right_before_the_next_forward() -> None:
    engine = Recording(max_rows=4)
    heard = list[Any]()

    def tell(news: Any) -> None:
        engine.order += "n"
        heard.append(news)

    def flush() -> None:
        engine.order += "p"

    requests = [engine.submit([i], **CALL) for i in range(3)]
    for request in requests:
        request.listen(tell, flush=flush)
    engine.order = ""
    engine.finish()
    assert heard.count(None) == 3 and engine.order.count("f") == 12
    assert re.fullmatch("(f(n+p)?)+", engine.order) and "ff" in engine.order  # a tick without news wakes nobody
    assert engine.order.endswith("p")  # no forward follows the last
    late = engine.submit([4], **CALL)
    late.listen(tell, flush=flush)
    engine.order = ""
    late.cancel()
    assert engine.order == "np"


def test_news_at_the_end_of_a_group_wait_for_the_next_one() -> None:
    """Who is woken up would take the interpreter from those who enter."""
    engine = Recording(max_rows=1)

    def flush() -> None:
        engine.order += "p"

    first, second = requests = [engine.submit([i], **CALL) for i in range(2)]
    for request in requests:
        request.listen(lambda news: None, flush=flush)
    while not first.done:
        engine.turns(1)
    assert engine.order.endswith("f") and not second.done
    engine.turns(1)
    assert engine.order.endswith("fpf")


def test_a_stream_that_is_read_late_is_the_same() -> None:
    """Its events are made when they are read, of what was noted then."""
    engine = ByHand(embedded(), max_rows=2)
    call: dict[str, Any] = {"block_length": 4, "sampler": "confidence", "logprobs": 1}
    requests = [engine.submit(LONG, batch="alone", **call) for _ in range(2)]
    streams = [request.stream(drafts=drafts) for request, drafts in zip(requests, (False, True), strict=True)]
    engine.finish()
    for stream, drafts in zip(streams, (False, True), strict=True):
        want = [e._replace(output=None) for e in dllm.stream(embedded(), LONG, drafts=drafts, **call)]
        assert [e._replace(output=None) for e in stream] == want and len(want) > 2


def test_the_stream_of_a_row_that_begins_anew_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net, call = embedded(), {"block_length": 4, "sampler": "confidence", "logprobs": 1}
    want = [(e.text, e.tokens, e.logprobs) for e in dllm.stream(net, LONG, **call)]
    forward, left = net.forward, iter(range(10))

    def short(*given: Any, **options: Any) -> Any:
        if next(left, None) == 9:
            raise torch.OutOfMemoryError("no memory is left")
        return forward(*given, **options)

    monkeypatch.setattr(net, "forward", short)
    engine = ByHand(net)
    request = engine.submit(LONG, batch="alone", **call)
    stream = request.stream()
    engine.finish()
    assert request.retried
    assert [(e.text, e.tokens, e.logprobs) for e in stream] == want


@pytest.mark.parametrize("infill", [False, True])
def test_an_event_has_the_tokens_that_its_text_takes_and_what_is_behind_it(infill: bool) -> None:
    net, views, sent, told = embedded(), list[Any](), "", 0
    prompt = list(net.tokenizer(LONG)["input_ids"])
    if infill:
        prompt[3:3] = prompt[8:8] = prompt[10:10] = [net.mask_id]
    begin, holes = (0, [i for i, t in enumerate(prompt) if t == net.mask_id]) if infill else (len(prompt), None)

    def text(ids: Any) -> str:
        return str(net.tokenizer.decode(list(ids), skip_special_tokens=True))

    call: dict[str, Any] = {"sampler": "confidence", "block_length": 4, "infill": infill, "on_step": views.append}
    if not infill:
        answer = dllm.generate(net, prompt, **call).text
        call["stop"] = [answer[i : i + 6] + "~" for i in range(len(answer))]  # so its last characters are held back
        views.clear()
    for event in dllm.stream(net, prompt, drafts=True, **call):
        if event.output is not None:
            break
        ids, sent, told = views[-1].ids[begin:], sent + event.text, told + len(event.tokens)
        closed = next(i for i, token in enumerate(ids) if token == net.mask_id)
        behind = "".join(BLANK if token == net.mask_id else text([token]) for token in ids[closed:])
        assert sent + str(event.draft) == text(ids[:closed]) + behind
        least = next(n for n in range(closed + 1) if text(ids[:n]).startswith(sent))
        assert told == (least if holes is None else sum(at < least for at in holes))
    assert len(views) > 2


@pytest.mark.parametrize("new", [0, 128])
def test_drafts_may_be_asked_for_when_all_is_over(new: int) -> None:
    engine = ByHand(embedded())
    request = engine.submit(LONG, block_length=4, sampler="confidence", max_new_tokens=new)
    engine.finish()
    want = [e.draft for e in dllm.stream(embedded(), LONG, drafts=True, block_length=4, max_new_tokens=new)]
    assert [e.draft for e in request.stream(drafts=True)] == want[-1:] == [""]


def test_who_is_cancelled_in_the_middle_of_a_tick_takes_nobody_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """His row has its lane for this tick already."""
    engine = ByHand(network(), max_rows=2)
    out, other = (engine.submit([i], **CALL) for i in range(2))
    ask = Group.ask

    def cancelling(group: Group) -> Any:
        out.cancel()
        return ask(group)

    monkeypatch.setattr(Group, "ask", cancelling)
    engine.finish()
    assert isinstance(out.error, Cancelled)
    assert other.result(0).tokens == dllm.generate(network(), [1], **CALL).tokens


def test_an_error_of_a_tokenizer_ends_the_request_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ByHand(embedded())
    request = engine.submit(LONG, block_length=4, sampler="confidence")
    stream = request.stream()
    engine.turns(5)
    assert not request.done

    def broken(*_: object) -> str:
        raise OverflowError("no such id")

    monkeypatch.setattr(type(request.job.stops), "settled", broken)
    with pytest.raises(OverflowError):
        next(stream)
    assert request.done
    engine.finish()
    with pytest.raises(OverflowError):
        request.result()


@pytest.mark.parametrize(("gather", "together"), [(60.0, True), (0.0, False)])
def test_a_first_forward_waits_for_requests_that_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch, gather: float, together: bool
) -> None:
    """And not for ever."""
    monkeypatch.setattr(calls, "GATHER", gather)
    net = counting()
    with dllm.Engine(net, max_rows=4) as engine:
        with engine.expecting():
            first = engine.submit([1], **CALL)
            if not together:
                first.result()
            second = engine.submit([2], **CALL)
        second.result()
    assert [rows for rows, _ in net.fed] == ([2] * 12 if together else [1] * 24)


@pytest.mark.parametrize("form", ["memo", "chain"])
def test_a_lane_that_stood_empty_does_not_hold_the_others_up(form: str) -> None:
    """With a lookahead the rows that are furthest behind have their forward first."""
    engine, call = ByHand(network(), max_rows=2), {**CALL, "lookahead": {"rows": 2, "form": form}}
    first = engine.submit([1, 2, 3], **call)
    engine.turns(4)
    second, before = engine.submit([7, 8], **call), first.told.meter.rows[0].ahead.steps
    engine.turns(3)
    assert first.told.meter.rows[0].ahead.steps > before
    engine.finish()
    assert [r.result().tokens for r in (first, second)] == [
        dllm.generate(network(), p, **CALL).tokens for p in ([1, 2, 3], [7, 8])
    ]


def test_groups_tick_together() -> None:
    engine = ByHand(network(), max_rows=4)
    rows = [engine.submit([1, 2, 3], sampler=s, **CALL) for s in ("confidence", "margin", "entropy")]
    for turn in range(1, 13):
        engine.turns(1)
        assert [r.told.meter.rows[0].nfe for r in rows] == [turn] * 3
    assert engine.load[:4] == (0, 0, 0, 0)


class Counting(type(tiny())):  # type: ignore[misc]
    """A model that notes the rows and columns of its forwards."""

    fed: list[tuple[int, int]]

    def forward(self, ids: torch.Tensor, pos: Any = None, **options: Any) -> torch.Tensor:
        self.fed.append((len(ids), ids.shape[1]))
        return super().forward(ids, pos, **options)


def counting() -> Any:
    net = tiny()
    net.__class__, net.fed = Counting, []
    return net


class Forwards:
    """An observer of the rows that each forward serves, those of guidance and its like once."""

    def __init__(self) -> None:
        self.rows = list[int]()

    def forward(self, kind: str, rows: int) -> None:
        self.rows.append(rows)

    def ticked(self, seconds: float, ticks: Any) -> None:
        pass

    def ended(self, request: Request[Any]) -> None:
        pass


MIXED: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 2, 3], {"sampler": "threshold:tau=0.2"}),
    ([7, 8, 9, 4], {"sampler": "margin", "temperature": 0.8, "seed": 3}),
    ([5], {"sampler": "wino"}),  # feeds more queries, which see some of the others
    ([6, 6], {"sampler": "confidence", "cfg_scale": 0.5}),  # and this one more rows
]


@pytest.mark.parametrize(
    ("switches", "first", "served"),
    [
        ({}, [(3, 17), (2, 14)], [3, 1]),  # with four columns of a shadow the one, and two rows of guidance the other
        ({"shift": 1}, [(4, 16)], [3]),
        ({"block_size": 4}, [(3, 4), (1, 8)], [2, 1]),
    ],
    ids=str,
)
def test_one_forward_serves_groups_of_other_samplers(
    switches: dict[str, int], first: list[tuple[int, int]], served: list[int]
) -> None:
    net = tiny(**switches)
    net.__class__, net.fed = Counting, []
    heard = Forwards()
    engine = ByHand(net, max_rows=8, observer=heard)
    mixed = [(p, {**CALL, "cache": "none", **a}) for p, a in MIXED if not switches or "wino" not in str(a)]
    requests = [engine.submit(p, **a) for p, a in mixed]
    engine.turns(1)
    assert net.fed == first and heard.rows == served
    engine.finish()
    for (prompt, arguments), request in zip(mixed, requests, strict=True):
        ours, plain = request.result(), dllm.generate(net, prompt, **arguments)
        assert (ours.tokens, ours.nfe, ours.calls, ours.positions) == (
            plain.tokens, plain.nfe, plain.calls, plain.positions
        )  # fmt: skip


@pytest.mark.parametrize("apart", [{"batch": "alone"}, {"cache": "dual"}, {"lookahead": 2}], ids=str)
def test_who_has_a_forward_of_his_own(apart: dict[str, Any]) -> None:
    """Rows that were asked to decode alone, those with a store of their own, and those that look ahead."""
    net = counting()
    engine = ByHand(net, max_rows=4)
    for sampler in ("confidence", "margin"):
        engine.submit([1, 2, 3], sampler=sampler, **CALL, **apart)
    engine.turns(1)
    assert len(net.fed) == 2


def test_rows_of_few_columns_do_not_pay_for_those_of_many() -> None:
    def plan(rows: int, columns: int) -> Plan:
        pos = torch.arange(columns).expand(rows, -1)
        return Plan(pos, pos, None, None, None, None, None, refresh=False, stored=False)

    assert together([plan(1, 100), plan(1, 90), plan(1, 20)], 999) == [[0, 1]]
    assert together([plan(1, 20), plan(4, 100), plan(9, 22)], 999) == [[2, 0]]
    assert together([plan(1, 100), plan(99, 50)], 9999) == []
    assert together([], 999) == together([plan(3, 3)], 999) == []


def test_forwards_of_several_plans_have_a_bound() -> None:
    plans = [torch.zeros(1, 10, dtype=torch.long)] * 5
    made = [Plan(pos, pos, None, None, None, None, None, refresh=False, stored=False) for pos in plans]
    assert [together(made, most) for most in (50, 49, 25, 10)] == [
        [[0, 1, 2, 3, 4]],
        [[0, 1, 2, 3]],
        [[0, 1], [2, 3]],
        [],
    ]


def test_keys_of_groups_stay_where_a_forward_serves_others_too() -> None:
    """A group with a cache ticks beside groups without one."""
    engine = ByHand(network(), max_rows=4)
    calls = [{**CALL, "sampler": s, "cache": c} for s in ("confidence", "margin") for c in ("none", "dual")]
    requests = [engine.submit([3, 1, 4], **a) for a in calls]
    engine.finish()
    for arguments, request in zip(calls, requests, strict=True):
        plain = dllm.generate(network(), [3, 1, 4], **arguments)
        assert (request.result().tokens, request.result().nfe) == (plain.tokens, plain.nfe)


def test_one_prompt_gives_an_output_and_several_a_list() -> None:
    engine = ByHand(network(), max_rows=2)
    one, several = engine.submit([1, 2], **CALL), engine.submit([[1, 2], [3], [4, 5, 6]], n=2, **CALL)
    engine.finish()
    plain = dllm.generate(network(), [[1, 2], [3], [4, 5, 6]], n=2, **CALL)
    assert one.result().tokens == dllm.generate(network(), [1, 2], **CALL).tokens
    assert [(o.tokens, o.seed) for o in several.result()] == [(o.tokens, o.seed) for o in plain]


@pytest.mark.parametrize("late", [0, 3, 99])
def test_a_stream_is_whole_whenever_it_is_asked_for(late: int) -> None:
    engine = ByHand(embedded())
    request = engine.submit(LONG, sampler="confidence", max_new_tokens=16, block_length=4, logprobs=0)
    engine.turns(late)
    events = request.stream()
    engine.finish()
    heard, output = list(events), request.result()
    assert "".join(e.text for e in heard) == output.text
    assert [t for e in heard for t in e.tokens] == output.tokens
    assert [p for e in heard for p in e.logprobs] == output.logprobs
    assert len(heard) > 1 or late == 99
    with pytest.raises(DllmError, match="streamed already"):
        request.stream()


def test_drafts_are_streamed_to_those_who_ask() -> None:
    engine = ByHand(embedded())
    request = engine.submit(PROMPTS[0], sampler="confidence", max_new_tokens=8)
    drafts = request.stream(drafts=True)
    engine.finish()
    assert [e.draft for e in drafts] == [
        e.draft for e in dllm.stream(embedded(), PROMPTS[0], sampler="confidence", max_new_tokens=8, drafts=True)
    ]


def test_a_full_line_refuses_at_once_or_after_a_while() -> None:
    engine = ByHand(network(), max_queue=1, max_rows=1)
    first = engine.submit([1], **CALL)
    for wait in (0.0, 0.02):
        with pytest.raises(QueueFull, match="1 requests wait already"):
            engine.submit([2], wait=wait, **CALL)
    engine.turns(1)
    second = engine.submit([2], **CALL)
    engine.finish()
    assert first.result() and second.result()


def test_who_was_cancelled_leaves_room_in_a_full_line() -> None:
    engine = ByHand(network(), max_queue=2, max_rows=1)
    running = engine.submit([1], **CALL)
    engine.turns(1)
    waiting, gone = (engine.submit([i], **CALL) for i in (2, 3))
    gone.cancel()
    engine.turns(1)
    late = engine.submit([4], **CALL)
    engine.finish()
    assert all(r.result() for r in (running, waiting, late))


def test_a_request_waits_for_room_in_the_line() -> None:
    with dllm.Engine(network(), max_queue=1, max_rows=1) as engine:
        requests = [engine.submit([i], wait=None, **CALL) for i in range(6)]
        assert [len(r.result(60).tokens) for r in requests] == [12] * 6


def test_time_runs_out_for_a_request_or_for_who_waits() -> None:
    engine = ByHand(network(), max_rows=1)
    running, waiting = engine.submit([1], timeout=1e9, **CALL), engine.submit([2], timeout=-1.0, **CALL)
    engine.turns(2)
    with pytest.raises(TimedOut, match="not done in its time"):
        waiting.result()
    with pytest.raises(TimeoutError, match=r"no answer after 0\.01 s"):
        running.result(0.01)
    running.deadline = -1.0
    engine.finish()
    with pytest.raises(TimedOut):
        running.result()
    assert engine.load[:4] == (0, 0, 0, 0)


def test_a_cancelled_request_leaves_its_lane_to_the_next() -> None:
    engine = ByHand(network(), max_rows=1)
    first, second = engine.submit([1], **CALL), engine.submit([2], **CALL)
    engine.turns(3)
    events = first.stream()
    first.cancel()
    engine.turns(1)
    assert engine.load[:2] == (0, 1)
    engine.turns(1)
    assert engine.load[:2] == (1, 0)
    engine.finish()
    with pytest.raises(Cancelled):
        list(events)
    assert second.result().tokens == dllm.generate(network(), [2], **CALL).tokens
    second.cancel()
    assert second.result()  # what is there stays


@pytest.mark.parametrize("cache_", ["none", "dual"])
def test_broken_logits_end_their_own_request(cache_: str) -> None:
    """Nor do the keys and values of the broken row reach the one that takes its lane."""
    broken = tiny()
    with torch.no_grad():
        broken.transformer.embed_tokens.weight[38] = torch.nan
    call = {**CALL, "cache": cache_, "suppress_tokens": [38]}
    engine = ByHand(broken, max_rows=2)
    prompts = [[1, 2, 38, 4, 5], [1, 2, 3], [6, 7]]
    requests = [engine.submit(p, **call) for p in prompts]
    engine.finish()
    with pytest.raises(DllmError, match="NaN"):
        requests[0].result()
    for prompt, request in zip(prompts[1:], requests[1:], strict=True):
        assert request.result().tokens == dllm.generate(broken, prompt, **call).tokens


class Short(type(tiny())):  # type: ignore[misc]
    """A model that runs out of memory above so many rows, or positions; at most so many times."""

    rows, positions, times = 99, 9999, 9999

    def forward(self, ids: torch.Tensor, pos: Any = None, **options: Any) -> torch.Tensor:
        if self.times and (len(ids) > self.rows or ids.numel() > self.positions):
            self.times -= 1
            raise RuntimeError("CUDA out of memory")
        return super().forward(ids, pos, **options)


def short(**bounds: int) -> Any:
    net = tiny()
    net.__class__ = Short
    for name, bound in bounds.items():
        setattr(net, name, bound)
    return net


def test_a_forward_of_several_groups_that_fails_is_taken_apart() -> None:
    """Memory that is short for both is enough for each: nobody begins anew, and nothing as large is tried again."""
    net = short(rows=3)
    engine = ByHand(net, max_rows=4)
    calls = [([i, i + 1], {**CALL, "sampler": s}) for i in range(2) for s in ("confidence", "margin")]
    requests = [engine.submit(p, **a) for p, a in calls]
    engine.finish()
    assert net.times == 9998 and engine.load.lanes == 4
    for (prompt, arguments), request in zip(calls, requests, strict=True):
        assert not request.retried
        assert request.result().tokens == dllm.generate(net, prompt, **arguments).tokens


def test_forwards_are_shared_again_after_a_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows are too many for one forward, and every fifth tick finds out whether they still are."""
    monkeypatch.setattr(budgets, "CALM", 5)
    net = short(positions=60)
    engine = ByHand(net, max_rows=4, tick_positions=256)
    requests = [engine.submit([3, 1], **{**CALL, "max_new_tokens": 40}, sampler=s) for s in ("confidence", "margin")]
    tried = list[int]()
    for turn in range(1, 41):
        if turn == 23:  # the others have left the device
            net.positions = 9999
        before = net.times
        engine.turns(1)
        tried += [turn] * (before - net.times)
    assert tried == [1, 6, 11, 16, 21] and engine._shared.now == 256
    assert requests[0].result().calls + requests[1].result().calls == 80


def test_requests_begin_anew_with_half_the_rows_where_memory_runs_out() -> None:
    net, call = short(rows=2, times=1), {**CALL, "trace": True}
    engine = ByHand(net, max_rows=4)
    requests = [engine.submit([i, i + 1], **call) for i in range(2)]
    engine.turns(4)
    late = [engine.submit([i, i + 1], **call) for i in range(2, 4)]
    engine.finish()
    for i, request in enumerate([*requests, *late]):
        plain = dllm.generate(net, [i, i + 1], **call)
        assert (request.result().tokens, request.result().nfe) == (plain.tokens, plain.nfe)
        assert request.result().trace == plain.trace
    assert net.times == 0 and engine.load.lanes == 2


def test_load_is_told_while_rows_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ByHand(network(), max_rows=2)
    engine.submit([[1], [2]], **CALL)
    engine._seat(engine._admitted())
    (seats,) = engine._seats.values()
    ticket = Waiting.ticket.fget
    assert ticket is not None

    def asked(row: Waiting) -> Any:
        monkeypatch.undo()
        seats.group.turnover()  # of the engine's thread, while another asks
        return ticket(row)

    monkeypatch.setattr(Waiting, "ticket", property(asked))
    assert engine.load.running == 2
    monkeypatch.undo()
    engine.finish()


def test_all_who_enter_together_begin_anew_where_memory_runs_out_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    net, taken, times = network(), calls.index, [1]

    def index(rows: list[int], device: object) -> Any:
        if rows == [2] and times:  # the first request's last row, before the second one's
            times.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return taken(rows, device)

    monkeypatch.setattr(calls, "index", index)
    engine = ByHand(net, max_rows=2)
    first, second = engine.submit([[1], [2], [3]], **CALL), engine.submit([4], **CALL)
    engine.finish()
    assert not times and first.done and second.done
    assert [r.tokens for r in first.result()] == [dllm.generate(net, [i], **CALL).tokens for i in (1, 2, 3)]
    assert second.result().tokens == dllm.generate(net, [4], **CALL).tokens


def test_rows_are_halved_until_they_fit() -> None:
    net = short(rows=2)
    engine = ByHand(net, max_rows=64)
    requests = [engine.submit([i], **CALL) for i in range(16)]
    engine.finish()
    assert net.times == 9996 and engine.load.lanes == 2  # 16, 8, 4
    assert [r.result().tokens for r in requests] == [dllm.generate(net, [i], **CALL).tokens for i in range(16)]


def test_rows_are_halved_once_where_several_groups_fail_in_a_tick() -> None:
    net = short(rows=2, times=2)
    engine = ByHand(net, max_rows=8)
    requests = [engine.submit([i], **CALL, sampler=s, cache="dual") for s in ("confidence", "margin") for i in range(4)]
    engine.turns(1)
    assert net.times == 0 and engine.load.lanes == 4 and all(r.retried for r in requests)
    engine.finish()
    assert all(r.error is None for r in requests)


def test_who_began_anew_waits_while_more_rows_run_than_fit() -> None:
    net = short(positions=200)
    engine = ByHand(net, max_rows=8)
    calls = [([i], CALL) for i in range(6)]
    calls += [([i], {**CALL, "max_new_tokens": 120, "sampler": "margin"}) for i in range(2)]
    requests = [engine.submit(p, **a) for p, a in calls]
    engine.turns(2)
    assert engine.load[:3] == (6, 2, 1) and engine.load.lanes == 4
    engine.finish()
    assert net.times == 9997  # the two rows together, and so again
    for (prompt, arguments), request in zip(calls, requests, strict=True):
        assert request.result().tokens == dllm.generate(net, prompt, **arguments).tokens


def test_a_row_that_does_not_fit_by_itself_ends_its_request() -> None:
    """And nobody else's, however often it made them begin anew."""
    net = short(positions=60)
    engine = ByHand(net, max_rows=8)
    long = engine.submit([1], **{**CALL, "max_new_tokens": 80})
    others = [engine.submit([i], **CALL) for i in range(6)]
    engine.finish()
    with pytest.raises(DllmError, match="out of memory on cpu with one row by itself: shorten its canvas"):
        long.result()
    assert [r.result().tokens for r in others] == [dllm.generate(net, [i], **CALL).tokens for i in range(6)]


def test_rows_grow_back_after_a_calm_but_not_under_who_began_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "CALM", 5)
    net = short(rows=2, times=1)
    engine = ByHand(net, max_rows=6)
    for i in range(4):
        engine.submit([i], **CALL)
    lanes = list[int]()
    for _ in range(26):  # one that fails, twelve for each two
        engine.turns(1)
        lanes.append(engine.load.lanes)
    assert set(lanes[:25]) == {2}
    engine.submit([5], **{**CALL, "max_new_tokens": 40})
    engine.turns(30)
    assert engine.load.lanes == 6  # at most what was asked for


def test_an_error_in_a_callback_ends_its_own_request() -> None:
    def fails(view: Any) -> bool:
        raise KeyError("mine")

    engine = ByHand(network())
    bad, good = engine.submit([1], on_step=fails, **CALL), engine.submit([2], **CALL)
    engine.finish()
    with pytest.raises(KeyError, match="mine"):
        bad.result()
    assert good.result().tokens == dllm.generate(network(), [2], **CALL).tokens


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_whose_thread_was_ended() -> None:
    submitted = threading.Event()

    def leaves(view: Any) -> bool:
        submitted.wait()
        raise SystemExit

    with dllm.Engine(network()) as engine:
        requests = [engine.submit([1], on_step=f, **CALL) for f in (leaves, None)]
        submitted.set()
        for request in requests:
            with pytest.raises(Cancelled, match="closed"):
                request.result(60)


def test_stores_stay_within_their_bytes() -> None:
    lane = network().new_store(1, 64).nbytes
    engine = ByHand(network(), max_rows=4, kv_bytes=3 * lane + 5)
    call = {**CALL, "cache": "dual"}
    requests = [engine.submit([i], sampler=s, **call) for i in range(3) for s in ("confidence", "margin")]
    while not all(r.done for r in requests):
        engine.turns(1)
        assert engine.load.kv_bytes <= 3 * lane
    with pytest.raises(DllmError, match=r"needs .* bytes for keys and values"):
        engine.submit([1], **{**call, "max_new_tokens": 200})
    assert [r.result().tokens for r in requests] == [
        dllm.generate(network(), [i], sampler=s, **call).tokens for i in range(3) for s in ("confidence", "margin")
    ]


def test_a_tick_stays_within_its_positions() -> None:
    """Canvases have 64 columns or 128 here, and guidance feeds them twice."""
    engine = ByHand(network(), max_rows=8, tick_positions=200)
    calls = [CALL, {**CALL, "sampler": "margin"}, {**CALL, "cfg_scale": 0.5}, {**CALL, "max_new_tokens": 100}]
    requests = [engine.submit([i], **call) for i in range(3) for call in calls]
    rows = set()
    while not all(r.done for r in requests):
        engine.turns(1)
        seats = engine._seats.values()
        assert sum(s.positions for s in seats) <= 200
        rows.add(sum(s.rows for s in seats))
    assert max(rows) == 3
    assert [r.result().tokens for r in requests] == [
        dllm.generate(network(), [i], **call).tokens for i in range(3) for call in calls
    ]


def test_a_row_that_no_tick_has_room_for_decodes_by_itself() -> None:
    engine = ByHand(network(), max_rows=8, tick_positions=100)
    wide, narrow = engine.submit([1], **{**CALL, "max_new_tokens": 100}), engine.submit([2], **CALL)
    engine.turns(1)
    assert engine.load[:2] == (1, 1)
    engine.finish()
    assert wide.result() and narrow.result()


def test_bounds_are_a_share_of_the_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "left", lambda device: 1 << 30)
    engine, given = ByHand(embedded()), ByHand(embedded(), kv_bytes=1 << 20, tick_positions=500)
    position, each = embedded().new_store(1, 1).nbytes // 2, budgets.forward_bytes(embedded())
    assert engine.budget.kv_bytes == int(0.35 * 2**30)
    assert engine.budget.positions == int(0.15 * 2**30) // each
    assert given.budget[2:] == (1 << 20, 500, position, each)
    assert given.describe() == (
        "at most 8 rows; cpu: 1.00 GiB left beside the weights; keys and values 0.00 GiB, "
        f"{position / 1024:.4g} KiB a position: {(1 << 20) // (512 * position)} rows of 512 columns; "
        f"a tick 500 positions, {each / 1024:.4g} KiB each, {500 * each / 2**30:.2f} GiB"
    )


@pytest.mark.parametrize(("most", "left"), [("1000000", 700_000), ("200000", 0), ("max", None)])
def test_a_container_bounds_the_memory_and_its_cache_of_files_is_free(
    most: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.current").write_text("999000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 300000\nfile 699000\ninactive_anon 5\ninactive_file 500000\nactive_file 199000\n"
    )
    found = budgets.left(torch.device("cpu"))
    assert found == left if left is not None else found > 1_000_000


def test_a_position_needs_what_its_tensors_take() -> None:
    """Over a forward with its logits, in bytes that are held at the peak."""
    net, n = random_model(width=256, layers=2, vocabulary=3000, positions=512), 400
    ids = torch.zeros(1, n, dtype=torch.long)
    held = peak_extra(lambda: net.logits(net.forward(ids)).softmax(-1).max(-1))
    assert held <= n * budgets.forward_bytes(net) <= 4 * held


def test_who_does_not_fit_is_passed_a_few_times_only() -> None:
    lane = network().new_store(1, 64).nbytes
    engine = ByHand(network(), max_rows=2, kv_bytes=2 * lane)
    call = {**CALL, "cache": "dual"}
    small = [engine.submit([1], **call)]
    engine.turns(1)
    other = engine.submit([1], sampler="margin", **call)  # the store of the first group has all the bytes
    small += [engine.submit([1], seed=i, **call) for i in range(20)]
    engine.finish()
    ends = [r.told.meter.rows[0].seconds + r.told.meter._began for r in small]
    assert sum(end < other.told.meter.rows[0].seconds + other.told.meter._began for end in ends) == 1 + OVERTAKES


def test_rows_alone_have_the_bits_of_generate_in_float32() -> None:
    net = model("tiny-llada-random", "float32")
    call: dict[str, Any] = {**CALL, "cache": "dual", "logprobs": 2}
    engine = ByHand(net, max_rows=4)
    requests = [engine.submit([5, 9, i], batch="alone", **call) for i in range(3)]
    others = [engine.submit([7] * 9, **call) for _ in range(2)]
    engine.finish()
    assert all(r.done for r in others)
    for i, request in enumerate(requests):
        plain = dllm.generate(net, [5, 9, i], **call)
        assert (request.result().tokens, request.result().logprobs) == (plain.tokens, plain.logprobs)


def test_graphs_serve_several_groups() -> None:
    call = {**CALL, "cache": "dual", "graphs": True}
    with standing_in():
        engine = ByHand(network(), max_rows=4)
        requests = [engine.submit([i, 5], sampler=s, **call) for i in range(3) for s in ("confidence", "klass")]
        engine.finish()
    for request, (i, s) in zip(requests, ((i, s) for i in range(3) for s in ("confidence", "klass")), strict=True):
        plain = dllm.generate(network(), [i, 5], sampler=s, **{**call, "graphs": False})
        assert (request.result().tokens, request.result().nfe) == (plain.tokens, plain.nfe)
        assert request.result().stats["graphs"]["replays"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 2}, "leave batch_size= out"),
        ({"batch": "both"}, "must be 'shared' or 'alone'"),
        ({"sampler": "confidense"}, "did you mean 'confidence'"),
        ({"max_new_tokens": 10**6}, "exceed"),
        ({"streamer": None}, "unknown argument 'streamer'"),
    ],
)
def test_mistakes_are_said_by_the_call(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(DllmError, match=says):
        ByHand(network()).submit([1], **arguments)


def test_an_engine_that_had_nothing_to_do_is_not_late() -> None:
    """Requests that come together after a pause: the second finds the engine at work, not stuck."""
    engine = ByHand(network())
    engine.ticked -= 100
    engine.submit([1], **CALL)
    assert time.monotonic() - engine.ticked < 50
    engine.ticked -= 100
    engine.submit([2], **CALL)
    assert time.monotonic() - engine.ticked > 50  # it has work, and does not do it


def test_bounds_are_at_least_one() -> None:
    for name in ("max_rows", "max_queue", "kv_bytes", "tick_positions"):
        with pytest.raises(DllmError, match=f"{name}=0 must be at least 1"):
            ByHand(network(), **{name: 0})


def test_nothing_to_decode_comes_back_at_once() -> None:
    engine = ByHand(network())
    request = engine.submit([1, 2], max_new_tokens=0)
    assert request.result(0).sequences == [1, 2]
    several = engine.submit([[1, 2], [3]], n=2, max_new_tokens=0, logprobs=1, trace=True)
    assert [output.sequences for output in several.result(0)] == [[1, 2], [1, 2], [3], [3]]
    assert [(event.request, event.text, event.logprobs) for event in several.stream()] == [
        (row, "", []) for row in range(4)
    ]
    heard = list[Any]()
    request.listen(heard.append, flush=lambda: heard.append("passed on"))
    assert heard[0].read().output == request.result(0) and heard[1:] == [None, "passed on"]


def test_an_answer_without_decoding_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made while others may submit, and the engine may tick."""
    engine, output = ByHand(network()), Job.output

    def slow(*given: Any, **named: Any) -> Any:
        other = threading.Thread(target=engine.submit, args=([3],), kwargs=CALL)
        other.start()
        other.join(20)
        assert not other.is_alive()
        return output(*given, **named)

    monkeypatch.setattr(Job, "output", slow)
    assert engine.submit([1, 2], max_new_tokens=0).result(0).sequences == [1, 2]
    assert engine.load.waiting == 1


# -- prompts that begin alike -----------------------------------------------------------------------------------------


@cache
def blocks() -> Any:
    return tiny(block_size=4)


@pytest.mark.parametrize("switches", [{}, {"shift": 1}], ids=["plain", "shifted"])
@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.2"])
def test_blocks_of_a_prompt_are_computed_once(sampler: str, switches: dict[str, int]) -> None:
    net = tiny(block_size=4, **switches)
    engine, call = ByHand(net, max_rows=2), {**CALL, "sampler": sampler}
    system = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    prompts = [[*system, 7], [*system, 8, 8, 8, 8], system, [7, *system], [*system, 8, 8, 8, 9], [*system, 8, 8, 8]]
    known = [0, 8, 8, 0, 12, 12]
    for prompt, cached in zip(prompts, known, strict=True):
        request, plain = engine.submit(prompt, **call), dllm.generate(net, prompt, **call)
        engine.finish()
        ours = request.result()
        assert ours.stats.get("cached_tokens", 0) == cached
        assert (ours.tokens, ours.nfe, ours.finish_reason) == (plain.tokens, plain.nfe, plain.finish_reason)
        whole = cached and cached == len(prompt) // 4 * 4
        before = net.shift if whole else 0  # what predicts the first column of the window is computed again
        assert ours.positions == plain.positions - cached + before
    assert engine.prefixes is not None
    assert engine.prefixes.reuse[:3] == (15, 10, 0)


@pytest.mark.parametrize("graphs", [False, True])
def test_rows_of_a_batch_reuse_what_others_left(graphs: bool) -> None:
    prompts = [[i % 2] * 8 + [i] for i in range(8)]
    with standing_in():
        engine = ByHand(blocks(), max_rows=3)
        requests = [engine.submit(p, temperature=0.5, seed=i, graphs=graphs, **CALL) for i, p in enumerate(prompts)]
        engine.finish()
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        plain = dllm.generate(blocks(), prompt, temperature=0.5, seed=i, **CALL)
        assert (request.result().tokens, request.result().nfe) == (plain.tokens, plain.nfe)
    assert [r.result().stats.get("cached_tokens", 0) for r in requests] == [0, 0, 0, *[8] * 5]


def test_blocks_that_were_used_last_stay_within_their_bytes() -> None:
    block = blocks().new_store(1, 3).nbytes
    engine = ByHand(blocks(), prefix_bytes=3 * block)
    assert engine.prefixes is not None

    def cached(prompt: list[int]) -> int:
        request = engine.submit(prompt, **CALL)
        engine.finish()
        assert engine.prefixes is not None and engine.prefixes.reuse.nbytes <= 3 * block
        return request.result().stats.get("cached_tokens", 0)

    a, b = [1] * 8, [2] * 8
    assert [cached(a), cached(a), cached([*a[:4], 5, 5, 5, 5])] == [0, 8, 4]
    assert cached(b) == 0  # two blocks: of three one stays, the one that others begin with
    assert [cached(b), cached(a)] == [8, 4]
    assert engine.prefixes.reuse.evicted > 0


def test_nothing_is_kept_where_no_bytes_are_given() -> None:
    assert ByHand(blocks(), prefix_bytes=0).prefixes is None and ByHand(network()).prefixes is None


@pytest.mark.parametrize("arguments", [{"cache": "none"}, {"cfg_scale": 0.5}, {"lookahead": 3}, {"batch": "alone"}])
def test_what_cannot_share_a_prompt_computes_its_own(arguments: dict[str, Any]) -> None:
    engine = ByHand(blocks())
    for _ in range(2):
        request = engine.submit([1] * 8, **CALL, **arguments)
        engine.finish()
        assert "cached_tokens" not in request.result().stats


# -- the thread -------------------------------------------------------------------------------------------------------


def test_threads_submit_together() -> None:
    plain = [dllm.generate(network(), [i], **CALL).tokens for i in range(8)]
    found: dict[int, Any] = {}
    with dllm.Engine(network(), max_rows=3) as engine:

        def ask(i: int) -> None:
            found[i] = engine.submit([i], **CALL).result(60).tokens

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert [found[i] for i in range(8)] == plain


def test_a_block_that_ends_well_drains_and_one_that_does_not_stops() -> None:
    with dllm.Engine(network(), max_rows=1) as engine:
        requests = [engine.submit([i], **CALL) for i in range(3)]
    assert all(len(r.result(0).tokens) == 12 for r in requests)
    with pytest.raises(Cancelled, match="closed"):
        engine.submit([1], **CALL)
    with pytest.raises(KeyboardInterrupt), dllm.Engine(network(), max_rows=1) as engine:
        done = engine.submit([1], **CALL)
        done.result(60)
        cut = [engine.submit([i], **{**CALL, "max_new_tokens": 400}) for i in range(3)]
        raise KeyboardInterrupt
    assert done.result(0)  # what was done stays
    for request in cut:
        with pytest.raises(Cancelled, match="closed"):
            request.result(0)


def test_a_fault_of_the_engine_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: dllm.Engine) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(dllm.Engine, "_turn", fails)
    engine = dllm.Engine(network())
    with pytest.raises(ZeroDivisionError, match="ours"):
        engine.submit([1], **CALL).result(60)
    with pytest.raises(Cancelled, match="closed"):
        engine.submit([1], **CALL)
    engine.close()


def test_a_stream_comes_while_it_is_decoded() -> None:
    with dllm.Engine(embedded()) as engine:
        request = engine.submit(LONG, sampler="confidence", max_new_tokens=16, block_length=4)
        steps = [event.nfe for event in request.stream()]
    assert len(steps) > 1 and all(a <= b for a, b in pairwise(steps))


def test_an_observer_is_told_of_every_forward_and_tick() -> None:
    told = list[Any]()

    class Told:
        def forward(self, kind: str, rows: int) -> None:
            told.append((kind, rows))

        def ticked(self, seconds: float, ticks: Any) -> None:
            assert seconds > 0
            told.append(sum(len(tick.rows) for tick in ticks))

    engine = ByHand(network(), max_rows=2, observer=Told())
    first, second, third = (engine.submit([1, 2, 3], seed=i, cache="dual", **CALL) for i in range(3))
    third.cancel()
    engine.finish()
    assert told == [("refresh", 2), 2, *[("step", 2), 2] * 3] * 3
    for output in (first.result(), second.result()):
        assert output.seconds > output.prefill_seconds > output.queue_seconds > 0
