"""Windows of several open blocks: the worked examples of D2F and d3LLM, an independent loop that decodes the same, and
what holds of them in every call. No golden decode exists for these rules: the loop below is what they are held to."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from scripted import Scripted, peaks, tiny
from torch import Tensor

import dllm
from dllm.decoding.invariants import Checked
from dllm.errors import DllmError
from dllm.models.hub import load

ROWS = [0.95, 0.5, 0.4, 0.3, 0.95, 0.95, 0.2, 0.2, 0.99, 0.2, 0.2, 0.2]  # three blocks of four


def decode(sampler: str, rows: list[float] = ROWS, tokens: dict[int, int] | None = None, **arguments: Any) -> Any:
    """One row of the scripted model, which says token 1 with these probabilities, or another where `tokens` has one."""
    table = peaks([((tokens or {}).get(i, 1), c) for i, c in enumerate(rows)], 8)
    call = {"max_new_tokens": len(rows), "block_length": 4, "early_stop": False, "trace": True, **arguments}
    return dllm.generate(Scripted(table, eos=3), [0], sampler=sampler, check=Checked(), **call)


def commits(out: Any) -> list[set[int]]:
    start = len(out.trace.prompt)
    return [{c - start for c, _ in pairs} for pairs in out.trace.commits]


# -- worked out on paper --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        # the second block opens in step 3, when the first has a half, the third in step 4; each forces progress only
        # when the one before it is full
        ("d2f:tau_add=0.5,tau_act=1", [{0}, {1}, {2, 4, 5}, {3, 8}, {6}, {7}, {9}, {10}, {11}]),
        # a half of the block before it is enough
        ("d2f:tau_add=0.5,tau_act=0.5", [{0}, {1}, {2, 4, 5}, {3, 6, 8}, {7, 9}, {10}, {11}]),
        # the third block waits until the first is left
        ("d2f:tau_add=0.5,tau_act=0.5,max_open=2", [{0}, {1}, {2, 4, 5}, {3, 6}, {7, 8}, {9}, {10}, {11}]),
        # a quarter opens the next: one block a step
        ("d2f:tau_add=0.25,tau_act=1", [{0}, {1, 4, 5}, {2, 8}, {3}, {6}, {7}, {9}, {10}, {11}]),
        # entropies of 0.95 and 0.99 are 0.296 and 0.076 nats: the same columns pass
        ("d3llm:tau_ent=0.3,tau_add=0.5,tau_act=0.5", [{0}, {1}, {2, 4, 5}, {3, 6, 8}, {7, 9}, {10}, {11}]),
        # threshold among the columns of all open blocks: one at least in a step, wherever it is
        ("multiblock:tau_add=0.5", [{0}, {1}, {4, 5}, {8}, {2}, {3}, {6}, {7}, {9}, {10}, {11}]),
    ],
)
def test_worked_examples(sampler: str, expected: list[set[int]]) -> None:
    assert commits(decode(sampler)) == expected


def test_d3llm_as_released_commits_the_lowest_of_the_row_and_one_of_the_first_block() -> None:
    """In step 5 nothing is below the bar: column 9 is the lowest of all, column 6 that of the first open block."""
    rows = [*ROWS[:9], 0.3, 0.2, 0.2]
    spec = "d3llm:tau_ent=0.3,tau_add=0.5"
    released = [{0}, {1}, {2, 4, 5}, {3, 8}, {6, 9}, {7}, {10}, {11}]
    for tau_act in (0.01, 0.95):  # it has no say
        assert commits(decode(f"{spec},forced=first,tau_act={tau_act}", rows)) == released
    each = [{0}, {1}, {2, 4, 5}, {3, 8}, {6}, {7}, {9}, {10}, {11}]
    assert commits(decode(f"{spec},tau_act=1", rows)) == each


def test_no_block_opens_ahead_of_time_behind_an_end() -> None:
    """Column 4 writes the end in step 3; the third block opens by itself when the second is done."""
    spec = "d2f:tau_add=0.5,tau_act=0.5"
    assert commits(decode(spec, tokens={4: 3})) == [{0}, {1}, {2, 4, 5}, {3, 6}, {7}, {8}, {9}, {10}, {11}]
    stopped = decode(spec, tokens={4: 3}, early_stop=True)
    assert (stopped.nfe, stopped.finish_reason, len(stopped.tokens)) == (4, "stop", 4)


def test_given_tokens_count_as_a_share() -> None:
    """Two of the first block's four columns are given: the second block opens in the second step."""
    table = peaks([(1, c) for c in ROWS], 8)
    canvas = [0, 8, 1, 1, *[8] * 9]
    out = dllm.generate(
        Scripted(table), canvas, infill=True, sampler="d2f:tau_add=0.5,tau_act=1", block_length=4, max_new_tokens=0,
        early_stop=False, trace=True,
    )  # fmt: skip
    assert [{c - 1 for c, _ in pairs} for pairs in out.trace.commits][:2] == [{0}, {3, 4, 5}]


def test_a_score_decides_what_is_forced() -> None:
    """By confidence column 1 is the best of the first block, by margin column 0."""
    laws = torch.tensor([[0.55, 0.15, 0.15, 0.15], [0.56, 0.43, 0.005, 0.005]] * 4, dtype=torch.float64).log()
    for more, first in (("", {1}), ("+margin", {0})):
        out = dllm.generate(
            Scripted(laws), [0], sampler=f"d2f{more}", max_new_tokens=8, block_length=4, early_stop=False, trace=True
        )
        assert commits(out)[0] == first


# -- an independent loop --------------------------------------------------------------------------------------------


def law(ids: list[int]) -> Tensor:
    """(L, 6) logits of a model whose answers change with all that stands on the canvas."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % (1 << 31))
    return torch.randn(len(ids) - 1, 6, generator=generator, dtype=torch.float64) * 3


def loop(canvas: list[int], block: int, rule: dict[str, Any], eos: int, mask: int) -> list[list[int]]:
    """The columns that each forward of D2F, or of d3LLM, commits: lists and states of blocks, one row at a time."""
    frozen = {i for i, token in enumerate(canvas) if token != mask}
    start = canvas.index(mask)  # what is given before it is the prompt
    bounds = [(at, min(at + block, len(canvas))) for at in range(start, len(canvas), block)]
    states: list[tuple[int, int]] = []  # the opened blocks
    steps = []
    while mask in canvas:

        def share(lo: int, hi: int) -> float:
            return sum(token != mask for token in canvas[lo:hi]) / (hi - lo)

        ended = any(canvas[i] == eos for i in range(len(canvas)) if i not in frozen)
        done = next(k for k, b in enumerate(bounds) if mask in canvas[slice(*b)])  # blocks that are left
        room = len(states) - done < (rule["most"] or len(bounds))
        if states and len(states) < len(bounds) and share(*states[-1]) >= rule["add"] and room and not ended:
            states.append(bounds[len(states)])
        while not any(canvas[i] == mask for b in states for i in range(*b)):
            states.append(bounds[len(states)])
        probs = law(canvas).softmax(-1)
        best = {i: (float(probs[i - 1].max()), int(probs[i - 1].argmax())) for i in range(1, len(canvas))}
        entropy = {i: float(-(probs[i - 1] * probs[i - 1].log()).sum()) for i in best}
        doubt = entropy if rule["entropy"] else {i: -c for i, (c, _) in best.items()}
        masks = [[i for i in range(*b) if canvas[i] == mask] for b in states]
        everywhere = sorted(i for m in masks for i in m)
        sure = {i for i in everywhere if (doubt[i] <= rule["bar"] if rule["entropy"] else -doubt[i] > rule["bar"])}
        if rule["released"]:
            sure.add(min(everywhere, key=lambda i: doubt[i]))
        first = next(k for k, m in enumerate(masks) if m)
        for k, m in enumerate(masks):
            active = k == first if rule["released"] else k == 0 or share(*states[k - 1]) >= rule["act"]
            if m and active and not sure & set(m):
                sure.add(min(m, key=lambda i: doubt[i]))
        for i in sure:
            canvas[i] = best[i][1]
        steps.append(sorted(sure))
    return steps


CASES = range(60)


@pytest.mark.parametrize("seed", CASES)
def test_an_independent_loop_decodes_the_same(seed: int) -> None:
    draw = random.Random(seed)
    mask, eos, block = 6, 5, draw.choice([1, 2, 3, 4, 8])
    rule: dict[str, Any] = {
        "add": draw.choice([0.1, 0.25, 0.34, 0.5, 0.75, 1.0]),
        "act": draw.choice([0.1, 0.5, 0.95, 1.0]),
        "most": draw.choice([None, None, 1, 2, 3]),
        "entropy": draw.random() < 0.6,
    }
    rule["released"] = rule["entropy"] and draw.random() < 0.5
    rule["bar"] = draw.choice([0.1, 0.3, 0.6]) if rule["entropy"] else draw.choice([0.8, 0.9, 0.95])
    bar = "tau_ent" if rule["entropy"] else "tau_conf"
    sampler = {"name": "d3llm" if rule["entropy"] else "d2f", bar: rule["bar"]}
    sampler |= {"tau_add": rule["add"], "tau_act": rule["act"], "max_open": rule["most"]}
    sampler |= {"forced": "first" if rule["released"] else "each"} if rule["entropy"] else {}
    given = [draw.randrange(5) if draw.random() < 0.15 else mask for _ in range(draw.randint(3, 40))]
    row = [0, *given, mask]
    out = dllm.generate(
        Scripted(law, vocab=7, mask=mask, eos=eos), row, infill=True, sampler=sampler, block_length=block,
        max_new_tokens=0, early_stop=False, trace=True, check=Checked(),
    )  # fmt: skip
    ours = [sorted(column for column, _ in pairs) for pairs in out.trace.commits]
    assert ours == loop(list(row), block, rule, eos, mask), rule


# -- what holds in every call ---------------------------------------------------------------------------------------

PROMPTS = [[3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46, 26, 43, 38, 32]]
SPECS = ["d2f:tau_conf=0.7", "d3llm:tau_ent=1", "d3llm:released,tau_ent=1", "multiblock:tau=0.7"]


@pytest.fixture(scope="module")
def bidirectional() -> Any:
    return load(GOLDEN / "checkpoints" / "tiny-llada-random", dtype="float64", device="cpu")


def seen(model: Any, sampler: str, prompts: Any = PROMPTS, **arguments: Any) -> list[Any]:
    call = {"max_new_tokens": 22, "block_length": 4, "eos": [], "trace": True, "batch_size": 2, **arguments}
    outs = dllm.generate(model, prompts, sampler=sampler, **call)
    return [(o.sequences, o.nfe, [sorted(pairs) for pairs in o.trace.commits], o.positions) for o in outs]


@pytest.mark.parametrize("cache_", ["none", "prefix", "dual", "interval", "delayed"])
@pytest.mark.parametrize("one", ["max_open=1", "tau_add=1"])
def test_one_block_at_a_time_is_a_threshold_in_blocks(bidirectional: Any, cache_: str, one: str) -> None:
    expected = seen(bidirectional, "threshold:tau=0.7", cache=cache_)
    for spec in ("d2f:tau_conf=0.7", "multiblock:tau=0.7"):
        assert seen(bidirectional, f"{spec},{one}", cache=cache_) == expected
    assert seen(bidirectional, "d2f:tau_conf=0.7", cache=cache_) != expected


@pytest.mark.parametrize("cache_", ["none", "block", "block_dual"])
def test_one_block_at_a_time_of_a_block_causal_model(cache_: str) -> None:
    model = tiny(block_size=4)
    expected = seen(model, "threshold:tau=0.3", [[5, 6], [1, 2, 3, 30, 31]], cache=cache_)
    for one in ("max_open=1", "tau_add=1"):
        assert seen(model, f"d2f:tau_conf=0.3,{one}", [[5, 6], [1, 2, 3, 30, 31]], cache=cache_) == expected


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("spec", ["d2f:tau_conf=0.3", "d3llm:tau_ent=2", "multiblock:tau=0.3", "multiblock+saber"])
def test_a_block_cache_is_exact_with_several_blocks_open(spec: str, length: int, shift: int) -> None:
    """Blocks ahead are computed with what is open to their left; what is below the first open block is stored."""
    model = tiny(block_size=4, shift=shift)
    call: dict[str, Any] = {"prompts": [[5, 6], [1, 2, 3, 30, 31]], "block_length": length}
    plain, cached = (seen(model, spec, cache=cache_, **call) for cache_ in ("none", "block"))
    assert [row[:3] for row in plain] == [row[:3] for row in cached]
    assert sum(row[3] for row in cached) <= sum(row[3] for row in plain)
    one = seen(model, f"{spec.partition(':')[0].partition('+')[0]}:max_open=1", cache="block", **call)
    assert one != cached  # several were open
    if spec.startswith("d"):  # blocks are left while others are open: the store saves their positions
        assert sum(row[3] for row in cached) < 0.9 * sum(row[3] for row in plain)


class Watching(Checked):
    """Notes the windows of every row, and whether all before them is written."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: dict[int, list[tuple[int, int, bool]]] = {}

    def __call__(self, s: Any, state: Any, window: Any, pred: Any) -> Any:
        for row, seed in enumerate(state.seed.tolist()):
            lo, hi = int(window.lo[row]), int(window.hi[row])
            done = not bool(state.canvas.masked[row, :lo].any())
            self.windows.setdefault(seed, []).append((lo, hi, done))
        return super().__call__(s, state, window, pred)


@pytest.mark.parametrize("most", [None, 1, 2, 3])
@pytest.mark.parametrize("spec", [*SPECS, "multiblock+saber", "multiblock+wino:tau_draft=0.9"])
def test_blocks_open_in_order_and_none_closes(bidirectional: Any, spec: str, most: int | None) -> None:
    """A block more a step, never more than are allowed at once, and each forward commits."""
    name, _, rest = spec.partition(":")
    names = name.split("+")
    bound = "" if most is None else f"max_open={most}"
    watched = Watching()
    first = f"{names[0]}:{','.join(filter(None, (rest if len(names) == 1 else '', bound)))}".rstrip(":")
    spelled = "+".join([first, *(f"{n}:{rest}".rstrip(":") for n in names[1:])])
    dllm.generate(bidirectional, PROMPTS, sampler=spelled, max_new_tokens=22, block_length=4, eos=[], check=watched)
    widest = 0
    for steps in watched.windows.values():
        assert all(done for *_, done in steps)
        for (lo, hi, _), (then_lo, then_hi, _) in pairwise(steps):
            assert then_lo >= lo and hi <= then_hi <= max(hi, then_lo) + 4
        widest = max(widest, *(hi - lo for lo, hi, _ in steps))
    assert widest <= 4 * (most or 99) and (widest > 4 or most == 1)


@pytest.mark.parametrize("cache_", ["none", "prefix", "dual"])
@pytest.mark.parametrize("spec", SPECS)
def test_rows_lookahead_and_early_stops(bidirectional: Any, spec: str, cache_: str) -> None:
    """A row is what it is alone and under a lookahead; a stop cuts what would have been written anyway."""
    eos = 124
    call: dict[str, Any] = {"cache": cache_, "eos": eos}
    together = seen(bidirectional, spec, **call)
    for i, prompt in enumerate(PROMPTS):
        assert seen(bidirectional, spec, [prompt], seed=i, **call) == [together[i]]
    ahead = seen(bidirectional, spec, lookahead=3, **call)
    assert [row[0] for row in ahead] == [row[0] for row in together]
    assert all(a[1] <= b[1] for a, b in zip(ahead, together, strict=True))
    whole = seen(bidirectional, spec, early_stop=False, **call)
    for prompt, (ids, nfe, order, _), (all_ids, forwards, all_order, _) in zip(PROMPTS, together, whole, strict=True):
        assert nfe <= forwards and order == all_order[:nfe]
        generated = ids[len(prompt) :]
        until = generated.index(eos) + 1 if eos in generated else len(generated)
        assert generated[:until] == all_ids[len(prompt) :][:until]


def test_full_forwards_settle_a_finished_block() -> None:
    """Two prompt columns and two blocks of four, a column a step: 10 columns are fed at a refresh, 8 and then 4 from
    the first open block on."""
    call: dict[str, Any] = {"prompts": [[5, 6]], "max_new_tokens": 8, "cache": "prefix"}
    once, twice = (seen(tiny(), f"d3llm:tau_ent=0,max_open=1,settle={n}", **call) for n in (1, 2))
    assert once[0][3] == 10 + 3 * 8 + 10 + 3 * 4
    assert twice[0][3] == 2 * 10 + 2 * 8 + 2 * 10 + 2 * 4


@pytest.mark.parametrize("rule", ["confidence", "learn2pd", "sdar:steps=2", "klass", "eb", "localleap", "wino", "ccd"])
def test_other_selections_sit_on_the_windows(bidirectional: Any, rule: str) -> None:
    """Those that count a block's steps take the plain share, as no single block is open."""
    if rule == "learn2pd":
        bidirectional = dllm.load("tiny", dtype="float64")
    for out in dllm.generate(
        bidirectional, PROMPTS, sampler=f"multiblock+{rule}", max_new_tokens=16, steps=8, block_length=8, eos=[],
        check=Checked(),
    ):  # fmt: skip
        assert out.finish_reason == "length" and bidirectional.mask_id not in out.tokens


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("d2f:tau_add=0", r"tau_add=0 must be in \(0, 1\]"),
        ("d3llm:tau_add=1.5", r"tau_add=1.5 must be in \(0, 1\]"),
        ("multiblock:tau_add=-1", r"tau_add=-1 must be in \(0, 1\]"),
        ("d2f:tau_act=0", r"tau_act=0 must be in \(0, 1\]"),
        ("d2f:max_open=0", "max_open=0 must be"),
        ("d3llm:forced=last", "'each', 'first'"),
        ("d3llm:settle=0", "settle=0 must be"),
        ("d2f+adablock", "'d2f' and 'adablock' both decide the window"),
        ("d2f+d3llm", "both decide the window"),
        ("multiblock+dsb", "both decide the window"),
        ("d3llm+threshold", "both decide the select"),
    ],
)
def test_bad_input(spec: str, message: str) -> None:
    with pytest.raises(DllmError, match=message):
        decode(spec.replace("adablock", "adablock:delimiters=[3]"))
