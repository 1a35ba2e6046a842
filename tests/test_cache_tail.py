"""The masked tail: what a cache with `near` leaves out, that the rest is exact, and that rows are independent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from golden_cases import ARGUMENTS, PRUNED, cases, decode, groups
from replay import standing_in
from scripted import Scripted, peaks, tiny
from sweeps import dealt
from test_samplers_questions import BIDIRECTIONAL
from torch import Tensor

import dllm
from dllm.call.job import prepare
from dllm.decoding import noise
from dllm.decoding.cache.registry import policy
from dllm.decoding.cache.tail import Kept, NoCache
from dllm.decoding.invariants import Checked
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Part, Runner, Turn
from dllm.decoding.slots import View
from dllm.errors import DllmError
from dllm.samplers import Canvas, Span, State, registry
from dllm.samplers.questions import questions
from dllm.samplers.threshold import Threshold

PROMPTS = [[5, 6], [1, 2, 3, 30, 31, 32, 33], [7, 8, 9, 10]]
BASES = ["none", "prefix", "dual", "interval:left=1,right=2,warmup=2,every=3"]
TAILS = [
    "none:near=4", "none:near=9,gaussian=3:1.6", "prefix:near=3,tail=2", "prefix:near=9,uniform=3", "dual:near=0",
    "dual:near=4,left=2,right=3", "dual:near=4,recent=2", "prefix:near=4,recent=0", "interval:near=4,every=3",
    "dual:offsets=[[0, 2], [1], [3, 4, 5]]",
]  # fmt: skip


def run(model: Any, prompt: Any, **arguments: Any) -> Any:
    call = {"max_new_tokens": 23, "block_length": 5, "trace": True, "early_stop": False, "sampler": "threshold:tau=0.2"}
    return dllm.generate(model, prompt, **{**call, **arguments})


def story(out: Any) -> Any:
    return out.sequences, out.trace.commits, out.nfe, out.positions


def fed(cache: str, **arguments: Any) -> list[list[int]]:
    """The columns of every forward of one row."""
    model, seen = tiny(shift=arguments.pop("shift", 0)), []
    forward = model.forward

    def spy(ids: Tensor, pos: Tensor | None = None, **options: Any) -> Tensor:
        assert pos is not None
        seen.append([p for p in pos[0].tolist() if p >= 0])
        return forward(ids, pos, **options)

    model.forward = spy  # type: ignore[method-assign]
    run(model, list(range(1, 11)), cache=cache, sampler="confidence", **arguments)
    return seen


# -- windows say where the tail begins --------------------------------------------------------------------------------


class First(NamedTuple):
    epoch: Tensor
    end: Tensor


@dataclass(frozen=True)
class Watched(NoCache):
    """No cache, and no window that goes beyond the end that it named when its epoch began."""

    def memory(self, canvas: Canvas) -> First:
        return First(torch.full_like(canvas.start, -1), canvas.start)

    def note(self, state: State, window: Span) -> State:
        before = state.memory[First]
        end = torch.where(window.epoch != before.epoch, window.end, before.end)
        assert (window.hi <= window.end).all() and (window.end <= state.canvas.length).all()
        assert (state.done | (window.hi <= end)).all()
        return state._replace(memory=state.memory.plus(First(window.epoch, end)))


@pytest.mark.parametrize("name", [*registry.names(), "threshold:fastdllm_dream", "dsb:max_length=4", "ass:blocks=2"])
def test_no_step_commits_behind_the_end_that_the_window_named_at_its_opening(name: str) -> None:
    if registry.method(name.partition(":")[0]).name in ("learn2pd", "pc"):
        pytest.skip("fixed blocks, but must be given a filter or frequencies")
    sampler = {"adablock": "adablock:delimiters=[3]", "daedal": "daedal:initial=8"}.get(name, name)
    v2 = name == "fast_dllm_v2"
    model = tiny(block_size=8 if v2 else None, shift=int(v2))
    dllm.generate(model, PROMPTS, sampler=sampler, cache=Watched(), max_new_tokens=16, block_length=4, eos=38)


# -- what there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["none", "prefix", "dual"])
def test_the_published_example_of_a_near_window_and_the_last_column(base: str) -> None:
    """Streaming-dLLM, prompt 10, 64 new tokens, blocks of 16, window 16."""
    forwards = fed(f"{base}:near=16,tail=1", max_new_tokens=64, block_length=16)
    tails = [[*range(26, 42), 73], [*range(42, 58), 73], [*range(58, 74)], []]
    assert len(forwards) == 64
    for block, tail in enumerate(tails):
        begin, end = 10 + 16 * block, 26 + 16 * block
        opening, *later = forwards[16 * block : 16 * block + 16]
        assert opening == [*range(end), *tail]
        first = {"none": 0, "prefix": begin, "dual": begin}[base]
        assert later == [[*range(first, end), *(tail if base != "dual" else [])]] * 15
    bare = fed(f"{base}:near=0", max_new_tokens=64, block_length=16)
    assert bare[0] == [*range(26), 73] and fed(f"{base}:near=0,tail=0", max_new_tokens=64)[0] == [*range(15)]


def test_a_refresh_of_recent_columns_leaves_older_ones_as_they_are() -> None:
    """The first one computes all that there is, later ones the last block and what follows, or further left."""
    call = {"max_new_tokens": 64, "block_length": 16}
    forwards = fed("dual:near=16,tail=1,recent=16", **call)
    openings = forwards[::16]
    assert openings[0] == [*range(42), 73] and openings[1] == [*range(10, 58), 73]
    assert openings[2] == [*range(26, 74)] and openings[3] == [*range(42, 74)]
    assert fed("dual:near=16,tail=1,recent=0", **call) == forwards
    assert fed("dual:near=16,tail=1,recent=20", **call)[32] == [*range(22, 74)]
    assert fed("prefix:near=16,tail=1,recent=16", **call)[::16] == openings


def test_the_drawn_tail_is_the_published_rule_on_keyed_numbers() -> None:
    """DPad's example: u (.70, .70, .10, .50), k 3, window 4, a 2.0 keeps d = 0 and 2; and by hand on our numbers."""
    u, p = [0.70, 0.70, 0.10, 0.50], [0.7979, 0.4839, 0.1080, 0.0089]
    assert [d for d in range(4) if u[d] < p[d]] == [0, 2]
    out = fed("none:near=20,gaussian=3:2.0", max_new_tokens=64, block_length=16, seed=7)
    for block in range(4):
        begin, end = 10 + 16 * block, 26 + 16 * block
        key = torch.tensor(7), torch.tensor(begin), torch.arange(end, min(end + 20, 74)), noise.TAIL
        drawn = noise.uniform(*key).tolist() if end < 74 else []
        chance = [2.0 / (2 * torch.pi) ** 0.5 * 2.718281828459045 ** (-0.5 * (3 * d / 19) ** 2) for d in range(20)]
        tail = [end + d for d, (x, q) in enumerate(zip(drawn, chance, strict=False)) if x < q]
        assert out[16 * block : 16 * block + 16] == [[*range(end), *tail]] * 16
        assert 0 < len(tail) < 20 or block == 3
    everything = fed("none:near=20,gaussian=3:1e6", max_new_tokens=64, block_length=16)
    assert everything == fed("none:near=20,tail=0", max_new_tokens=64, block_length=16)
    assert fed("none:near=20,gaussian=3:0", max_new_tokens=64)[0] == [*range(15)]


@pytest.mark.parametrize(
    ("n", "kept"), [(0, [0, 0, 0, 0]), (5, [5, 5, 5, 0]), (16, [16, 16, 16, 0]), (32, [20, 32, 16, 0])]
)
def test_a_uniform_tail_keeps_so_many_of_the_near_ones_and_all_of_a_short_tail(n: int, kept: list[int]) -> None:
    out = fed(f"none:near=20,uniform={n}", max_new_tokens=64, block_length=16)
    for block, count in enumerate(kept):
        end = 26 + 16 * block
        tail = out[16 * block][end:]
        assert len(tail) == count and len(set(tail)) == count
        assert all(end <= t < (74 if n == 32 and block else end + 20) for t in tail)


def test_draws_differ_between_blocks_seeds_and_rows_and_not_between_calls() -> None:
    tails = {seed: fed("none:near=30,gaussian=3:1.6", max_new_tokens=64, block_length=16, seed=seed) for seed in (0, 1)}
    assert tails[0] == fed("none:near=30,gaussian=3:1.6", max_new_tokens=64, block_length=16, seed=0)
    assert [t - 26 for t in tails[0][0][26:]] != [t - 42 for t in tails[0][16][42:]]
    assert tails[0][0] != tails[1][0]
    model = tiny()
    job = prepare(model, PROMPTS, {"cache": "dual:near=8,gaussian=3:1.6", "max_new_tokens": 8, "block_length": 4})
    assert (
        job.sampler.needs.stochastic and not prepare(model, PROMPTS, {"cache": "dual:near=8"}).sampler.needs.stochastic
    )


def test_a_table_says_what_stays_of_each_block() -> None:
    out = fed("dual:offsets=[[0, 2], [], [1, 99]]", max_new_tokens=64, block_length=16)
    assert [columns[-3:] for columns in out[::16]] == [[25, 26, 28], [39, 40, 41], [56, 57, 59], [71, 72, 73]]
    assert len(out[16]) == 42 and out[1] == [*range(10, 26)]


def test_text_that_stands_behind_the_block_is_never_left_out() -> None:
    """Only masks are: the tokens of an infilled text are context, wherever they stand."""
    model, mask = tiny(), 39
    canvas = [1, 2, *[mask] * 6, 7, *[mask] * 6, 9, 9, *[mask] * 4]
    seen = []
    forward = model.forward
    model.forward = lambda ids, pos=None, **o: (seen.append(pos[0].tolist()), forward(ids, pos, **o))[1]
    call = {"infill": True, "max_new_tokens": 0, "block_length": 4, "sampler": "confidence"}
    dllm.generate(model, canvas, cache="none:near=1,tail=0", **call)
    assert seen[0] == [0, 1, 2, 3, 4, 5, 6, 8, 15, 16]  # the first block begins with the first mask


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("base", BASES)
def test_a_tail_that_is_kept_whole_changes_nothing(base: str, shift: int) -> None:
    """To the last bit, in as many positions, alone and in ragged batches; and so where one block takes everything."""
    more = f"{base}{',' if ':' in base else ':'}near="
    for kept, block in ((23, 5), (0, 23)):
        for batch in (1, 3):
            call = {"batch_size": batch, "block_length": block}
            plain, cut = (run(tiny(shift=shift), PROMPTS, cache=cache, **call) for cache in (base, f"{more}{kept}"))
            assert [story(o) for o in plain] == [story(o) for o in cut]


class Against(Runner):
    """Compares every forward without a store, and every refresh, with the model on just those tokens."""

    compared = 0

    def turn(self, part: Part) -> Turn:
        turn, window = super().turn(part), part.reading
        if part.stale or not self.policy.stored:
            there = part.state.columns[Kept].there
            ours = turn.answer.logits(window.reads)
            for row in range(part.state.rows):
                cols = there[row].nonzero().flatten()
                alone = self.model.forward(part.state.canvas.ids[row, cols][None], cols[None])
                at = {c: i for i, c in enumerate(cols.tolist())}
                for w, column in enumerate(window.reads[row].tolist()):
                    if column < 0 or (window.aside is not None and window.aside[row, w]):
                        continue
                    want = self.model.logits(alone[:, at[max(column - self.model.shift, 0)]])[0]
                    assert torch.allclose(ours[row, w], want, atol=1e-12, rtol=0)
                    Against.compared += 1
        return turn


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", [c for c in TAILS if "recent" not in c])
def test_logits_are_those_of_the_model_on_what_there_is(cache: str, shift: int) -> None:
    """Exactly, with absolute positions: at every step without a store, at every refresh with one."""
    call = {
        "max_new_tokens": 23,
        "block_length": 5,
        "sampler": "threshold:tau=0.2",
        "early_stop": False,
        "cache": cache,
    }
    Against.compared = 0
    for _ in prepare(tiny(shift=shift), PROMPTS, {**call, "batch_size": 2}).ticks(Meter(3), Against):
        pass
    assert Against.compared > 50


@pytest.mark.parametrize("layers", [1, 2])
def test_a_tail_that_is_cut_is_not_exact_for_any_depth(layers: int) -> None:
    """Unlike a stale cache, which one layer does not notice; and the errors are reported without a store, too."""
    call = {"max_new_tokens": 23, "block_length": 5}
    for cache in ("none:near=2", "dual:near=2"):
        assert max(e.max for e in dllm.cache_error(tiny(layers=layers), PROMPTS[0], cache=cache, **call)) > 1e-3
    near = dllm.cache_error(tiny(layers=layers), PROMPTS[0], cache="none:near=23", **call)
    assert max((e.max for e in near), default=0) < 1e-12


ALONE = ["threshold:tau=0.2", "threshold:fastdllm_dream,tau=0.2", "prophet:region=last_k"]


@pytest.mark.parametrize(("sampler", "cache"), dealt(ALONE, TAILS))
def test_a_row_alone_equals_a_row_in_a_ragged_batch(sampler: str, cache: str) -> None:
    model = tiny(shift=int("dream" in sampler))
    together = run(model, PROMPTS, cache=cache, sampler=sampler, batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        assert story(run(model, prompt, cache=cache, sampler=sampler, seed=i)) == story(together[i])


@pytest.mark.parametrize("cache", ["none:near=4", "prefix:near=4", "dual:near=4", "dual:near=4,recent=0"])
def test_slots_that_are_left_out_are_seen_by_nobody(cache: str) -> None:
    """Whatever they hold from earlier epochs: spoilt after every forward, they change nothing."""
    model = tiny()
    plain, forward = run(model, PROMPTS, cache=cache), model.forward

    def spoils(ids: Tensor, pos: Tensor | None = None, **options: Any) -> Tensor:
        hidden, store = forward(ids, pos, **options), options.get("store")
        if store is not None and (visible := options["visible"]) is not None:
            unseen = ~visible.expand(-1, ids.shape[1], -1).any(1)[:, : store.slots]
            for side in (*store.keys, *store.values):
                for row, lane in enumerate(options["lane"].tolist()):
                    side[lane][:, unseen[row].nonzero().flatten()] = 1e3
        return hidden

    model.forward = spoils  # type: ignore[method-assign]
    assert [story(o) for o in run(model, PROMPTS, cache=cache)] == [story(o) for o in plain]


@pytest.mark.parametrize("cache", ["none:near=4", "dual:near=4", "prefix:near=4,tail=0", "dual:near=6,recent=0"])
def test_columns_that_a_sampler_only_looks_at_are_private(cache: str) -> None:
    """An exit that never fires changes no token, though its region lies in what is left out."""
    plain = run(tiny(), PROMPTS, cache=cache, sampler="threshold:tau=0.2")
    watched = run(
        tiny(), PROMPTS, cache=cache, sampler="threshold:tau=0.2+prophet:region=last_k,high=1e9,mid=1e9,low=1e9"
    )
    assert [o.trace.commits for o in plain] == [o.trace.commits for o in watched]
    assert sum(o.positions for o in watched) > sum(o.positions for o in plain)


def test_a_closing_forward_sees_all_of_the_tail() -> None:
    """What an exit fills right of the block comes from another context than the block did."""
    sampler = "threshold:tau=0.2+prophet:high=0,mid=0,low=0,region=last_k"
    wide, cut = (run(tiny(), PROMPTS[0], cache=cache, sampler=sampler) for cache in ("none", "none:near=2"))
    assert wide.nfe == 1 and cut.nfe == 2 and cut.positions == 10 + 4 + cut.canvas_length


# -- sampler by sampler -----------------------------------------------------------------------------------------------

REFUSED = {
    "dream": "whole generation for a window", "saber": "whole generation for a window", "ccd": "whole generation",
    "remdm": "whole generation", "eoser": "whole generation", "ass": "whole generation", "eotp": "edits the length",
    "daedal": "edits the length", "klass:paper": "every column of the generation",
}  # fmt: skip


@pytest.mark.parametrize(("sampler", "why"), REFUSED.items())
def test_samplers_whose_work_is_the_tail_refuse_with_their_reason(sampler: str, why: str) -> None:
    with pytest.raises(DllmError, match=why) as error:
        prepare(tiny(), PROMPTS, {"sampler": sampler, "cache": "none:near=4", "eos": 38, "max_new_tokens": 16})
    assert "leave near= out" in str(error.value) and "\n" not in str(error.value)
    prepare(tiny(), PROMPTS, {"sampler": sampler, "cache": "none", "eos": 38, "max_new_tokens": 16})


@pytest.mark.parametrize("sampler", ["saber+dsb", "eoser:whole=false", "ass:blocks=2", "klass"])
def test_a_window_of_another_owner_lets_them_in(sampler: str) -> None:
    prepare(tiny(), PROMPTS, {"sampler": sampler, "cache": "none:near=4", "max_new_tokens": 16})


CAPTURED = ["threshold:streaming,tau=0.3", "prophet:region=last_k", "adablock:delimiters=[3]"]
SERVED = [
    "threshold:tau=0.3", "confidence", "localleap", "adablock:delimiters=[3]", "dsb", "slowfast:truncate=false", "wino",
    "hierarchy", "klass", "lopa", "editing", "prophet:region=last_k", "wino+prophet:region=all", "saber+dsb", "sched",
    "eb", "pc", "ass:blocks=2", "threshold:streaming", "freedave",
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "cache"), dealt(SERVED, ["none:near=3", "dual:near=3,recent=0"]))
def test_every_sampler_that_is_served_decodes_rows_as_alone(sampler: str, cache: str) -> None:
    """With every step checked; also those that take tokens back, and move their window to the left."""
    call = {"cache": cache, "sampler": sampler, "max_new_tokens": 16, "block_length": 4, "check": Checked()}
    together = run(tiny(), PROMPTS, **call, batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        assert story(run(tiny(), prompt, **call, seed=i)) == story(together[i])


@pytest.mark.parametrize("sampler", ["dsb", "wino", "threshold:tau=0.3"])
def test_with_one_layer_recent_columns_are_all_that_changed(sampler: str) -> None:
    """First-layer keys depend on the token alone, so a refresh of the recent ones must equal one of all."""
    for near in (3, 16):
        call = {"sampler": sampler, "max_new_tokens": 16, "block_length": 4}
        all_, recent = (
            run(tiny(layers=1), PROMPTS, cache=f"dual:near={near}{more}", **call) for more in ("", ",recent=0")
        )
        assert [o.trace.commits for o in all_] == [o.trace.commits for o in recent]
        assert sum(o.positions for o in recent) < sum(o.positions for o in all_)


@pytest.mark.parametrize(("cache", "form"), dealt(TAILS, ["chain", "memo"]))
def test_a_lookahead_gives_the_same_tokens_in_no_more_forwards(cache: str, form: str) -> None:
    for sampler in ("threshold:tau=0.3", "threshold:tau=0.3,decay=0.5"):
        call = {"cache": cache, "sampler": sampler}
        plain, ahead = (run(tiny(), PROMPTS, **call, lookahead=k) for k in (None, {"rows": 4, "form": form}))
        assert [o.sequences for o in plain] == [o.sequences for o in ahead]
        assert all(b.nfe <= a.nfe for a, b in zip(plain, ahead, strict=True))
        assert sum(b.nfe for b in ahead) < sum(a.nfe for a in plain)


@pytest.mark.parametrize(("sampler", "cache"), list(zip(cycle(CAPTURED), TAILS, strict=False)))
def test_captured_ticks_decode_what_eager_ones_do(sampler: str, cache: str) -> None:
    plain = run(tiny(), PROMPTS, cache=cache, sampler=sampler, batch_size=2)
    with standing_in():
        captured = run(tiny(), PROMPTS, cache=cache, sampler=sampler, batch_size=2, graphs=True)
    assert [story(o) for o in plain] == [story(o) for o in captured]
    assert captured[0].stats["graphs"]["replays"] > 0


ASKED = ["threshold:streaming", "prophet:region=last_k", "adablock", "dsb", "wino"]


@pytest.mark.parametrize(("sampler", "cache"), dealt(ASKED, TAILS))
def test_a_tick_asks_the_device_nothing(sampler: str, cache: str) -> None:
    spec = {"name": "adablock", "delimiters": [3, 5]} if sampler == "adablock" else sampler
    assert questions(registry.build(spec, BIDIRECTIONAL), BIDIRECTIONAL, policy(cache)) == []


# -- the decaying threshold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "tail", "left", "want"),
    [
        (0.3, 97, 20, 0.87488), (0.6, 97, 20, 0.84977), (0.3, 97, 1, 0.83512), (0.6, 97, 1, 0.77023),
        (0.3, 0, 20, 0.79875), (0.6, 0, 20, 0.69750), (0.3, 0, 1, 0.63844), (0.6, 0, 1, 0.37688),
        (0.3, 33, 1, 0.77123), (0.6, 33, 1, 0.64246), (0.3, 97, 32, 0.9), (0.0, 97, 1, 0.9),
    ],
)  # fmt: skip
def test_the_published_bars_of_a_block_of_32(decay: float, tail: int, left: int, want: float) -> None:
    job = prepare(tiny(), [[1, 2]], {"max_new_tokens": 160, "block_length": 32, "cache": f"prefix:near={tail},tail=0"})
    state, window = job.sampler.window.open(job.queue)
    state = job.policy.note(state, window)
    filled = torch.arange(state.canvas.ids.shape[1])[None] < 2 + 32 - left
    state = state._replace(canvas=state.canvas.write(filled, torch.ones_like(state.canvas.ids)))
    state, window = job.sampler.window.open(state)
    view = View(job.policy.note(state, window), window)
    assert Threshold(tau=0.9, decay=decay).bar(view).item() == pytest.approx(want, abs=6e-6)
    alone = 0.9 * (1 - decay * (1 - left / 32))
    assert Threshold(tau=0.9, decay=decay, tail_counts=False).bar(view).item() == pytest.approx(alone, abs=1e-12)


def test_a_forward_that_opens_a_block_has_the_whole_bar_and_a_cut_tail_raises_later_ones() -> None:
    table = peaks([(1, 0.8), (2, 0.7), (3, 0.6), (4, 0.5)] * 3, vocab=6)

    def counts(sampler: str, cache: str) -> list[int]:
        call = {"max_new_tokens": 12, "block_length": 4, "trace": True}
        out = dllm.generate(Scripted(table), [0], sampler=sampler, cache=cache, **call)
        return [len(c) for c in out.trace.commits]

    # tau .9, then .7875, .675 and .5625 for 3, 2 and 1 of 4: always the best alone
    assert counts("threshold:tau=0.9,decay=0.5", "none") == [1] * 12
    # tau .75 takes .8; 3 of 4 left: .5625 takes .7 and .6
    assert counts("threshold:tau=0.75,decay=1", "none") == [1, 2, 1] * 3
    # 8 kept: .6875 for 11 of 12 takes .7, .625 for 10 takes the best; 4 kept: .65625, .5625; at last nothing is kept
    assert counts("threshold:tau=0.75,decay=1", "none:near=8") == [1] * 8 + [1, 2, 1]


# -- the exit of the released codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("checkpoint", "method"), [c for c in cases(*PRUNED) if "trained" not in c[0]])
def test_the_early_stop_is_the_released_exit_or_sooner(checkpoint: str, method: str, every: int) -> None:
    """They end when a complete block holds an EOS. The early stop returns the same tokens in no more forwards, and
    `whole_block` the same forwards, commits and canvas: no step before the exit differs."""
    exits = 0
    for case in (case for group in groups(checkpoint, method) for case in group[::every]):
        p, extra = case["params"], case["extra"]
        call = {"early_stop": True, "eos": p["eos_id"]}
        [out] = decode(checkpoint, method, [case], **call)
        commits = [sorted(pairs) for pairs in case["commits"]]
        end = len(out.sequences)
        assert out.sequences == case["output_ids"][:end] and out.nfe <= case["nfe"]
        assert [sorted(pairs) for pairs in out.trace.commits] == commits[: out.nfe]
        assert p["eos_id"] not in out.tokens and (end == len(case["output_ids"]) or out.sequences[-1] == p["eos_id"])
        sampler = ARGUMENTS[method](p)["sampler"]
        if sampler["name"] == "threshold":
            [out] = decode(checkpoint, method, [case], **call, sampler={**sampler, "whole_block": True})
            assert [sorted(pairs) for pairs in out.trace.commits] == commits
            assert out.trace.final == extra.get("final_canvas", case["output_ids"])
            exits += "final_canvas" in extra
    assert exits > 2


# -- specifications ---------------------------------------------------------------------------------------------------


def test_specifications_and_presets() -> None:
    assert policy("prefix:near=96,tail=1") == policy({"name": "prefix", "near": 96, "tail": 1})
    assert (
        policy("dual:near=8,gaussian=3:1.6").gaussian == (3.0, 1.6) == policy("dual:near=8,gaussian=[3, 1.6]").gaussian
    )
    assert policy("dual:offsets=[[0, 2], []]").offsets == ((0, 2), ())
    assert policy("dual:streaming") == policy("dual:near=96,tail=1")
    assert policy("prefix:streaming_llada15_gsm8k_512") == policy("prefix:near=128,tail=1")
    assert policy("none:dpad_llada_humaneval") == policy("none:near=512,tail=0,gaussian=3:2.3")
    assert policy("dual:streaming,near=32,left=2") == policy("dual:near=32,tail=1,left=2")
    assert policy({"name": "dual", "near": 8, "gaussian": "3:1.6"}) == policy("dual:near=8,gaussian=3:1.6")
    assert not policy("dual").cuts and policy("dual") == policy("dual:near=-1")
    assert replace(policy("dual:dpad"), shift=1).gaussian == (4.0, 2.0)


def test_a_table_of_no_blocks_keeps_nothing_of_the_tail() -> None:
    net, call = tiny(), {"max_new_tokens": 12, "block_length": 4}
    none, empty = (dllm.generate(net, PROMPTS, cache=f"dual:offsets={table}", **call) for table in ("[]", "[[], []]"))
    assert [o.sequences for o in none] == [o.sequences for o in empty]
    assert [o.positions for o in none] == [o.positions for o in empty]


@pytest.mark.parametrize(("spec", "words"), [
    ("dual:near=-2", "at least -1"), ("dual:near=x", "an integer"), ("dual:near=4,tail=-1", "at least 0"),
    ("dual:tail=1", "give near="), ("dual:gaussian=3:1", "give near="), ("dual:recent=4", "give near="),
    ("dual:near=4,gaussian=3", "two numbers"), ("dual:near=4,gaussian=-1:2", "two numbers"),
    ("dual:near=4,gaussian=[1, 2, 3]", "two numbers"), ("dual:near=4,gaussian=a:b", "two numbers"),
    ("dual:near=4,gaussian=3:1,uniform=2", "keep one"), ("dual:near=4,uniform=-1", "at least 0"),
    ("dual:offsets=[1, 2]", "a list of distances"), ("dual:offsets=[[-1]]", "a list of distances"),
    ("none:near=4,recent=2", "unknown parameter 'recent'"), ("block:near=4", "unknown parameter 'near'"),
    ("delayed:near=4", "unknown parameter 'near'"), ("dllm_cache:near=4", "unknown parameter 'near'"),
    ("dual:streeming", "streaming"), ("delayed:streaming", "key=value"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(DllmError, match=words) as error:
        policy(spec)
    assert "\n" not in str(error.value)


def test_a_block_causal_model_has_no_tail_to_cut() -> None:
    with pytest.raises(DllmError, match="sees nothing behind its block"):
        dllm.generate(tiny(block_size=4), PROMPTS, cache="none:near=4", max_new_tokens=8)
