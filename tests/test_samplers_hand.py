"""The worked examples of the methods, run through the engine on scripted logits, and their bad inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scripted import Scripted, open_window, peaks, probabilities
from torch import Tensor

import dllm
from dllm.call.job import Job, prepare
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import View
from dllm.decoding.step import step
from dllm.errors import DllmError
from dllm.samplers.ccd import CCD, Looked
from dllm.samplers.credit import Credit, Listed
from dllm.samplers.daedal import tail_confidence
from dllm.samplers.prophet import Prophet, Sched


def decode(model: Scripted, n: int, sampler: Any, prompt: list[int] | None = None, **arguments: Any) -> Any:
    arguments = {"max_new_tokens": n, "block_length": n, "early_stop": False, "trace": True, **arguments}
    return dllm.generate(model, prompt or [0], sampler=sampler, **arguments)


def commits(out: Any) -> list[set[int]]:
    """Generation-relative columns that each forward wrote."""
    start = len(out.trace.prompt)
    return [{c - start for c, _ in pairs} for pairs in out.trace.commits]


def job(model: Scripted, n: int, sampler: Any, **arguments: Any) -> Job:
    given = {"max_new_tokens": n, "block_length": n, "early_stop": False, "sampler": sampler, **arguments}
    return prepare(model, [0], given)


def opened(j: Job, logits: Tensor) -> tuple[View, Prediction]:
    """The view and the prediction of the first step, when the model answers `logits` (W, V) in the columns it reads."""
    state, window = open_window(j.sampler, j.queue)
    return View(state, window), Prediction(logits[None], window.reads)


# -- the plain rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "confidences", "expected"),
    [
        ("threshold", [0.95, 0.91, 0.4], {0, 1}),
        ("threshold", [0.4, 0.5, 0.3], {1}),
        ("factor", [0.99, 0.98, 0.6, 0.5], {0, 1}),
        ("factor", [0.5, 0.4], {0}),
        ("factor", [0.99, 0.98, 0.97, 0.96], {0, 1, 2, 3}),
        ("factor", [0.95, 0.9, 0.6], {0, 1}),
        ("factor:compat", [0.95, 0.9, 0.6], {0, 1, 2}),  # its first failure is the last rank
        ("factor:compat", [0.5, 0.4], {0, 1}),  # always, when two are left
        ("factor:compat", [0.99, 0.98, 0.6, 0.5], {0, 1}),  # it fails before
    ],
)
def test_parallel_rules(sampler: str, confidences: list[float], expected: set[int]) -> None:
    out = decode(Scripted(peaks([(1, c) for c in confidences], 8)), len(confidences), sampler)
    assert commits(out)[0] == expected


@pytest.mark.parametrize(("gamma", "expected"), [(0.1, {0, 1, 2}), (0.015, {0, 1}), (0.005, {0})])
def test_eb_bounds_the_entropy(gamma: float, expected: set[int]) -> None:
    """Entropies .01, .02, .5: all but the largest of a prefix sum to gamma at most."""

    def law(entropy: float) -> list[float]:
        low, high = 0.5, 1 - 1e-12
        for _ in range(100):
            p = (low + high) / 2
            surer = -p * math.log(p) - (1 - p) * math.log(1 - p) < entropy
            low, high = (low, p) if surer else (p, high)
        return [1 - p, p]

    out = decode(Scripted(probabilities([law(h) for h in (0.01, 0.02, 0.5)])), 3, {"name": "eb", "gamma": gamma})
    assert commits(out)[0] == expected


@pytest.mark.parametrize(
    ("sampler", "n", "steps", "sizes"),
    [
        ("confidence", 10, 4, [3, 3, 2, 2]),
        ("dream", 10, 4, [2, 2, 2, 4]),
        ("dream", 8, 8, [0, 1, 1, 1, 1, 1, 1, 2]),
    ],
)
def test_quotas(sampler: str, n: int, steps: int, sizes: list[int]) -> None:
    out = decode(Scripted(peaks([(1, 0.5)] * n, 8)), n, sampler, steps=steps)
    assert [len(c) for c in commits(out)] == sizes


# -- LocalLeap ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidences", "params", "expected"),
    [
        ([0.95, 0.80, 0.80, 0.60, 0.76], {"radius": 1}, {0, 1}),
        ([0.95, 0.80, 0.80, 0.60, 0.76], {"radius": 2}, {0, 1, 2}),
        ([0.95, 0.80, 0.80, 0.60, 0.76], {"radius": 4}, {0, 1, 2, 4}),
        ([0.95, 0.80, 0.80, 0.60, 0.76], {"radius": 0}, {0}),
        ([0.95, 0.80, 0.80, 0.60, 0.76], {"tau": 0.9}, {0}),
        ([0.95, 0.76, 0.78, 0.74, 0.91], {"radius": 1}, {0, 1, 4}),
        ([0.5, 0.8, 0.7], {"radius": 4}, {1}),
    ],
)
def test_localleap(confidences: list[float], params: dict[str, Any], expected: set[int]) -> None:
    model = Scripted(peaks([(1, c) for c in confidences], 8))
    out = decode(model, len(confidences), {"name": "localleap", **params})
    assert commits(out)[0] == expected


def test_localleap_decoded_tokens_are_no_anchors() -> None:
    model = Scripted(peaks([(1, 0.95), (1, 0.8), (1, 0.5)], 8))
    out = decode(model, 0, "localleap", prompt=[0, 3, model.mask_id, model.mask_id], infill=True, block_length=2)
    assert out.trace.commits[0] == [[2, 1]]


# -- CreditDecoding -------------------------------------------------------------------------------------------------


def credited(method: Credit, laws: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """(K, q) over the tokens after each step, one column that is never committed."""
    j = job(Scripted(probabilities(laws[:1])), 1, method)
    state, window = open_window(j.sampler, j.queue)
    places = torch.zeros(*state.canvas.ids.shape, 8, dtype=torch.long)  # a column alone is read once: no second place
    state = state._replace(columns=state.columns.plus(Listed(places, places.double())))
    history = []
    for law in laws:
        view = View(state, window)
        logits = torch.cat([probabilities([law]), torch.full((1, 1), -torch.inf, dtype=torch.float64)], 1)
        soft = method.fuse(view, Prediction(logits[None], window.reads))
        state = state._replace(columns=view.columns)
        held, values = (view.gather(x)[0, 0] for x in view.columns[Listed])
        k = [0.0] * len(law)
        for token, value in zip(held.tolist(), values.tolist(), strict=True):
            if token:
                k[token - 1] = value
        fused = [p * (1 + c) ** method.alpha for p, c in zip(law, k, strict=True)]
        q = [f / sum(fused) for f in fused]
        assert soft.confidence.item() == pytest.approx(max(q), abs=1e-9)  # sparse = dense
        assert soft.token.item() == q.index(max(q))
        assert soft.log_confidence.item() == pytest.approx(math.log(max(q)), abs=1e-9)
        history.append((k, q))
    return history


@pytest.mark.parametrize(
    ("preset", "credit", "fused"),
    [
        ("paper", [0.902880, 1.534897, 1.977308, 2.286996], [0.695012, 0.733033, 0.752991, 0.764759]),
        ("dinfer", [0.902880, 1.625185, 2.203028, 2.665303], [0.701787, 0.746697, 0.772122, 0.788299]),
    ],
)
def test_credit_grows_on_a_constant_prediction(preset: str, credit: list[float], fused: list[float]) -> None:
    history = credited(Credit.build(preset), [[0.6, 0.3, 0.1]] * 4)
    assert [k[0] for k, _ in history] == pytest.approx(credit, abs=1e-6)
    assert [q[0] for _, q in history] == pytest.approx(fused, abs=1e-6)


def test_credit_reaches_the_bar_at_step_five_or_three() -> None:
    paper = [q[0] for _, q in credited(Credit(), [[0.8, 0.15, 0.05]] * 5)]
    assert paper == pytest.approx([0.860866, 0.882238, 0.892883, 0.898987, 0.902756], abs=1e-6)
    dinfer = [q[0] for _, q in credited(Credit.build("dinfer"), [[0.8, 0.15, 0.05]] * 3)]
    assert dinfer == pytest.approx([0.864836, 0.889644, 0.902833], abs=1e-6)


@pytest.mark.parametrize(
    ("preset", "tau", "ever"),
    [
        ("paper", 0.9, 0.7805), ("dinfer", 0.9, 0.7271), ("paper", 0.8, 0.6179), ("dinfer", 0.8, 0.5501),
        ("paper", 0.95, 0.8812), ("dinfer", 0.95, 0.8468),
    ],
)  # fmt: skip
def test_credit_of_a_steady_prediction_has_a_limit(preset: str, tau: float, ever: float) -> None:
    """p^gamma / (1 - beta): below some p a column never commits by its credit."""
    method = Credit.build(preset)
    for p, passes in ((ever - 2e-4, False), (ever + 2e-4, True)):
        k, q = credited(method, [[p, 1 - p]] * 60)[-1]
        assert k[0] == pytest.approx(p**method.gamma / (1 - method.beta), rel=1e-5)
        assert (q[0] >= tau) is passes


@pytest.mark.parametrize(("preset", "p"), [("paper", 0.8528), ("dinfer", 0.8486)])
def test_credit_helps_on_the_first_step(preset: str, p: float) -> None:
    method = Credit.build(preset)
    [(_, below)], [(_, above)] = (credited(method, [[x, 1 - x]]) for x in (p - 2e-4, p + 2e-4))
    assert below[0] < 0.9 <= above[0]


def test_credit_may_change_the_token() -> None:
    (_, _), (k, q) = credited(Credit(), [[0.5, 0.4, 0.1], [0.4, 0.5, 0.1]])
    assert k == pytest.approx([0.609385, 0.870551, 0.0], abs=1e-6)
    assert q == pytest.approx([0.390344, 0.538032, 0.071624], abs=1e-6)


def test_credit_sparse_equals_dense_on_changing_predictions() -> None:
    generator = torch.Generator().manual_seed(3)
    laws = (torch.randn(40, 12, generator=generator, dtype=torch.float64) * 2).softmax(-1).tolist()
    credited(Credit(), laws)  # compares with the dense form at every step
    assert len({law.index(max(law)) for law in laws}) > 6  # the list had to grow


def test_credit_tuning_free_starts_as_the_plain_prediction() -> None:
    method = Credit.build("tuning-free")
    j = job(Scripted(probabilities([[0.6, 0.3, 0.1]] * 4)), 4, method)
    logits = probabilities([[0.6, 0.3, 0.1]] * 4)
    view, pred = opened(j, torch.cat([logits, torch.full((4, 1), -torch.inf)], 1))
    assert torch.allclose(method.fuse(view, pred).confidence, pred.confidence)  # nothing decoded yet: alpha = 0


def test_credit_is_gone_in_the_next_block() -> None:
    j = job(Scripted(peaks([(1, 0.5)] * 4, 8)), 4, "credit", block_length=2)
    state = j.queue
    for _ in range(2):  # the first block takes two steps
        state, window = open_window(j.sampler, state)
        state = step(j.sampler, state, window, Prediction(peaks([(1, 0.5)] * 2, 9)[None], window.reads))
    assert state.columns[Listed].value[0, 1:3].max() > 0
    assert state.columns[Listed].value[0, 3:].max() == 0


def test_credit_of_a_column_that_was_written_starts_again() -> None:
    """Two steps as a candidate, one as a token, one as a candidate again: the credit is that of a first step."""
    method, logits = Credit(), torch.cat([probabilities([[0.6, 0.4]]), torch.full((1, 1), -torch.inf)], 1)
    j = job(Scripted(logits[:, :2]), 1, method)
    state, window = open_window(j.sampler, j.queue)
    fused = []
    for live in (True, True, False, True):
        view = View(state, window)
        view.live = view.live & live
        fused.append(method.fuse(view, Prediction(logits[None], window.reads)).confidence.item())
        state = state._replace(columns=view.columns)
    assert fused[0] == fused[3] < fused[1]


# -- Prophet and SchED ----------------------------------------------------------------------------------------------


def gap_table(gap: float, n: int = 4, vocab: int = 6) -> Tensor:
    table = torch.zeros(n, vocab, dtype=torch.float64)
    table[:, 1] = 1.0
    table[3, 2] = gap  # column 3: best minus second is `gap`
    return table


@pytest.mark.parametrize(("gap", "nfe"), [(8, 1), (6, 2), (3, 3), (2, 4)])
def test_prophet_exits_when_the_gap_passes(gap: float, nfe: int) -> None:
    table = gap_table(gap)
    table[3, 1] = 0.0
    out = decode(Scripted(table), 4, {"name": "prophet", "region": (3, 1)}, steps=4)
    assert out.nfe == nfe
    assert out.trace.mask_id not in out.sequences


def test_prophet_stages_are_cut_at_33_and_67_percent() -> None:
    tau = Prophet().tau(torch.tensor([0.32, 0.33, 0.66, 0.67, 1 / 3, 2 / 3], dtype=torch.float64))
    assert tau.tolist() == [7.5, 5.0, 5.0, 2.5, 5.0, 5.0]
    assert Prophet(smooth=True).tau(torch.tensor([0.0, 1.0])).tolist() == [8.0, 3.5]


def test_prophet_averages_the_region_and_sees_raw_logit_gaps() -> None:
    logits = torch.zeros(2, 5, dtype=torch.float64)
    logits[0, 1], logits[1, 2] = 10.0, 2.0
    j = job(Scripted(logits[:, :4]), 2, "prophet:region=all")
    view, pred = opened(j, logits)
    exit_ = j.sampler.amend[0]
    mean = torch.where(exit_.inside(view, pred), pred.gap, 0).sum(1) / 2
    assert mean.item() == 6.0
    assert Prediction((logits + 3)[None], pred.cols).gap.mean() == 6.0
    assert Prediction((logits * 2)[None], pred.cols).gap.mean() == 12.0


def test_prophet_never_and_at_once() -> None:
    model = Scripted(peaks([(1, 0.5 + 0.05 * i) for i in range(6)], 8))
    base = decode(model, 6, "confidence", block_length=3)
    never = decode(model, 6, {"name": "prophet", "high": math.inf, "mid": math.inf, "low": math.inf}, block_length=3)
    assert (never.sequences, never.nfe, never.trace.commits) == (base.sequences, base.nfe, base.trace.commits)
    at_once = {"name": "prophet", "high": -math.inf, "mid": -math.inf, "low": -math.inf}
    out = decode(model, 6, at_once, block_length=3)
    assert out.nfe == 1 and out.sequences == [0] + [1] * 6


def test_prophet_reads_behind_a_planted_phrase() -> None:
    model = Scripted(gap_table(9, n=8), prompt=1)
    m = model.mask_id
    prompt = [0, m, 4, m, m, m, m, m, m]  # the phrase is column 2: skip one, the region is columns 4 to 8
    j = prepare(model, prompt, {"infill": True, "sampler": "prophet"})
    exit_ = j.sampler.amend[0]
    lo, hi = exit_.bounds(j.queue.canvas)
    assert (lo.item(), hi.item()) == (4, 9)
    no_phrase = prepare(model, [0], {"max_new_tokens": 8, "sampler": "prophet:region=suffix"})
    lo, hi = no_phrase.sampler.amend[0].bounds(no_phrase.queue.canvas)
    assert lo.item() == hi.item()  # empty: as released, no exit without a phrase


def test_prophet_counts_text_up_to_the_first_end() -> None:
    table = peaks([(1, 0.5), (1, 0.5), (3, 0.9999), (3, 0.9999)], 6)
    j = job(Scripted(table, eos=3), 4, "prophet")
    view, pred = opened(j, torch.cat([table, torch.full((4, 1), -torch.inf)], 1))
    assert j.sampler.amend[0].inside(view, pred)[0].tolist() == [True, True, True, False]


def test_prophet_exits_on_a_region_of_one_column() -> None:
    """The answer's first column is an end of sequence: the text is that column alone."""
    table = torch.zeros(4, 8, dtype=torch.float64)
    table[:, 1] = 1.0
    table[0, 3] = 9.0
    out = decode(Scripted(table, eos=3), 4, "prophet")
    assert (out.nfe, out.sequences[1]) == (1, 3)


@pytest.mark.parametrize("sampler", ["prophet", "sched"])
def test_a_suffix_is_five_columns(sampler: str) -> None:
    model = Scripted(gap_table(9, n=12))
    hole = model.mask_id
    j = prepare(model, [0, hole, 4, *[hole] * 10], {"infill": True, "sampler": {"name": sampler, "region": "suffix"}})
    lo, hi = j.sampler.amend[0].bounds(j.queue.canvas)
    assert (lo.item(), hi.item()) == (4, 9)  # behind the phrase and one column


def test_prophet_counts_the_steps_that_a_short_block_skips() -> None:
    """As released: 8 steps over two blocks of 4. The given column 1 leaves three commits to the first block, whose
    fourth step is skipped: progress is 6/8 at the fifth forward."""
    table = gap_table(3, n=8)
    table[:, 1], table[7, 2] = 1.0, 4.0  # the gap of the last column is 3: not 5.0, but 2.5
    model = Scripted(table)
    hole = model.mask_id
    prompt = [0, hole, 4, *[hole] * 6]
    spec = {"name": "prophet", "region": lambda c: torch.arange(c.ids.shape[1]).expand_as(c.ids) == 8}
    out = decode(model, 0, spec, prompt, infill=True, block_length=4, steps=8)
    assert [len(c) for c in out.trace.commits] == [1, 1, 1, 1, 3]


def test_prophet_counts_one_step_a_column_over_all_blocks() -> None:
    """Eight columns in blocks of two, no budget given: the sixth forward is the first behind two thirds."""
    table = gap_table(3, n=8)
    table[:, 1], table[:, 2] = 3.0, 0.0  # the gap is 3 everywhere: not 5.0, but 2.5
    assert decode(Scripted(table), 8, "prophet:region=all", block_length=2).nfe == 6


def test_prophet_counts_tokens_where_the_steps_are_not_known() -> None:
    """Threshold takes as many columns as are sure, here one a step: six of eight are more than two thirds."""
    table = gap_table(3, n=8)
    table[:, 1], table[:, 2] = 3.0, 0.0
    assert decode(Scripted(table), 8, "threshold:tau=0.99+prophet:region=all").nfe == 7


def test_prophet_rows_exit_on_their_own() -> None:
    def script(ids: list[int]) -> Tensor:
        table = gap_table(8 if ids[0] == 1 else 3)
        table[3, 1] = 0.0
        return table

    model = Scripted(script, vocab=7)
    spec = {"name": "prophet", "region": (3, 1)}
    arguments = {"sampler": spec, "max_new_tokens": 4, "block_length": 4, "steps": 4, "early_stop": False}
    both = dllm.generate(model, [[1], [2]], **arguments)
    alone = [dllm.generate(model, [p], **arguments) for p in (1, 2)]
    assert [o.nfe for o in both] == [1, 3] == [o.nfe for o in alone]
    assert [o.sequences for o in both] == [o.sequences for o in alone]


def test_sched_is_prophet_over_everything_with_a_smooth_bar() -> None:
    sched = Sched(high=8.0, low=2.0)
    at = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert sched.tau(at).tolist() == [8.0, 5.0, 2.0]
    assert Sched(high=8.0, low=2.0, shape="cosine").tau(at).tolist() == pytest.approx([8.0, 5.0, 2.0])
    assert Sched(high=8.0, low=2.0, shape="exponential").tau(at).tolist() == pytest.approx(
        [8.0, 2 + 6 * math.exp(-1), 2 + 6 * math.exp(-2)]
    )
    model = Scripted(peaks([(1, 0.5 + 0.05 * i) for i in range(6)], 8))
    flat = decode(model, 6, "sched:high=2.5,low=2.5")
    prophet = decode(model, 6, "prophet:high=2.5,mid=2.5,low=2.5,region=all")
    assert flat.trace.commits == prophet.trace.commits


# -- AdaBlock -------------------------------------------------------------------------------------------------------


def first_block(delimiters: dict[int, float], decoded: int = 0, tau: float = 0.3) -> int:
    """Length of the block that opens after `decoded` columns; G = 16, block 8, delimiter id 5."""
    rows = [(5, delimiters[i]) if i in delimiters else (1, 0.9) for i in range(16 - decoded)]
    table = torch.cat([peaks(rows, 8), torch.full((16 - decoded, 1), -torch.inf)], 1)
    model = Scripted(table[:, :8])
    j = job(model, 16, {"name": "adablock", "delimiters": [5], "tau_delimiter": tau}, block_length=8)
    canvas, state = j.queue.canvas, j.queue
    if decoded:
        ids = canvas.ids.clone()
        ids[0, 1 : 1 + decoded] = 1
        state = state._replace(canvas=canvas._replace(ids=ids, masked=ids == model.mask_id))
    state, window = open_window(j.sampler, state)
    view = View(state, window)
    j.sampler.window.narrow(view, Prediction(table[None, : window.reads.shape[1]], window.reads))
    return int(view.window.hi - view.window.lo)


@pytest.mark.parametrize(
    ("delimiters", "decoded", "length"),
    [
        ({1: 0.4, 3: 0.6}, 0, 4),
        ({1: 0.6, 3: 0.4}, 0, 2),
        ({1: 0.25}, 0, 8),
        ({}, 0, 8),
        ({4: 0.99}, 0, 8),  # outside of the look-ahead of 4
        ({0: 0.9}, 0, 1),
        ({1: 0.4, 3: 0.4}, 0, 2),  # a tie: the leftmost
        ({}, 12, 4),
        ({1: 0.99}, 12, 2),
    ],
)
def test_adablock_length(delimiters: dict[int, float], decoded: int, length: int) -> None:
    assert first_block(delimiters, decoded) == length


def test_adablock_ends_a_block_at_a_delimiter_that_was_given() -> None:
    """Whatever the model now thinks of that column."""
    model = Scripted(peaks([(1, 0.95)] * 8, 8))
    hole = model.mask_id
    spec = {"name": "adablock", "delimiters": [5]}
    out = decode(model, 0, spec, [0, hole, 5, *[hole] * 6], infill=True, block_length=4)
    assert out.trace.commits[0] == [[1, 1]]


def test_adablock_without_an_attainable_bar_is_fixed_blocks() -> None:
    model = Scripted(peaks([(5 if i % 3 else 1, 0.5 + 0.02 * i) for i in range(16)], 8))
    fixed = decode(model, 16, "threshold", block_length=8)
    ada = decode(model, 16, "adablock:delimiters=[5],tau_delimiter=2", block_length=8)
    assert (ada.nfe, ada.trace.commits) == (fixed.nfe, fixed.trace.commits)


# -- CCD ------------------------------------------------------------------------------------------------------------


def averaged(first: list[float], second: list[float]) -> float:
    """Entropy of the averaged prediction after two steps on one column."""
    method = CCD(mode="mean", depth=2)
    j = job(Scripted(probabilities([first])), 1, method)
    state, window = open_window(j.sampler, j.queue)
    [blend] = j.sampler.adjust
    for law in (first, second):
        view = View(state, window)
        logits = torch.cat([probabilities([law]), torch.full((1, 1), -torch.inf, dtype=torch.float64)], 1)
        soft = blend(view, Prediction(logits[None], window.reads))
        state = state._replace(memory=view.memory)
    return -soft.negative_entropy.item()


@pytest.mark.parametrize(
    ("first", "second", "entropy"),
    [
        ([0.9, 0.1], [0.1, 0.9], 0.693147),
        ([0.9, 0.1], [0.9, 0.1], 0.325083),
        ([0.7, 0.2, 0.1], [0.5, 0.4, 0.1], 0.897946),
    ],
)
def test_ccd_averages_contexts(first: list[float], second: list[float], entropy: float) -> None:
    assert averaged(first, second) == pytest.approx(entropy, abs=1e-6)
    own = [-sum(p * math.log(p) for p in law) for law in (first, second)]
    assert averaged(first, second) >= sum(own) / 2 - 1e-9  # mutual information is not negative


def test_ccd_agree_commits_one_a_step_for_five_steps_then_what_is_stable() -> None:
    model = Scripted(peaks([(1, 0.95 - 0.02 * i) for i in range(20)], 8))
    out = decode(model, 20, "ccd")
    sizes = [len(c) for c in commits(out)]
    assert sizes[:5] == [1] * 5 and max(sizes) > 1 and sum(sizes) == 20
    plain = decode(model, 20, "entropy")
    fixed = decode(model, 20, "ccd:seek=false")
    assert fixed.trace.commits == plain.trace.commits  # on a steady model the order is that of the entropy


def test_ccd_ranks_by_its_averages_whatever_comes_after_it() -> None:
    """Column 0 is surer now, but had said something else before: its average is less certain than that of column 1."""
    tables = [peaks([(1, 0.9), (1, 0.8), (1, 0.95)], 8), peaks([(2, 0.9), (1, 0.8), (1, 0.95)], 8)]
    for more in ("", "+credit"):
        out = decode(
            Scripted(tables, eos=3), 3, f"ccd:mode=mean,seek=false{more}", confidence_eos_eot_inf=True, steps=3
        )
        assert commits(out) == [{2}, {1}, {0}]


@pytest.mark.parametrize(
    ("surest", "left", "changed", "expected"),
    [
        ([3, 7], {7}, set(), {3}),  # the best column was not among those left over
        ([7, 3], {7}, set(), {7}),
        ([3, 7], {3, 7}, set(), {3, 7}),
        ([3, 7], {3, 7}, {7}, {3}),
    ],
)
def test_ccd_commits_what_two_steps_agree_on(
    surest: list[int], left: set[int], changed: set[int], expected: set[int]
) -> None:
    """u = 1; two columns are compared: `surest` now, best first; `left` were the best that the last step left over."""
    rows = [(1, 0.9 - 0.1 * surest.index(i) if i in surest else 0.3) for i in range(8)]
    j = job(Scripted(peaks(rows, 8)), 8, "ccd:expand=1")
    view, pred = opened(j, torch.cat([peaks(rows, 8), torch.full((8, 1), -torch.inf)], 1))
    view.state = view.state._replace(step=torch.tensor([5]))
    for column in range(8):
        view.columns[Looked].runner_up[0, 1 + column] = column in left
        view.columns[Looked].token[0, 1 + column] = 2 if column in changed else 1
    chosen = j.sampler.select(view, pred, j.sampler.score(view, pred))
    assert {c for c in range(8) if chosen[0, c]} == expected


def test_ccd_agreement_widens_a_step_within_the_budget_only() -> None:
    """23 columns in 8 steps are 2 a step. Steady predictions agree from the seventh step on; the eighth is the budget's
    last, from where on the base rate holds, as released."""
    out = decode(Scripted(peaks([(1, 0.9 - 0.01 * i) for i in range(23)], 8)), 23, "ccd", steps=8)
    assert [len(columns) for columns in commits(out)] == [2] * 6 + [3] + [2] * 4


def test_ccd_mean_commits_what_it_has_seen_before() -> None:
    """All columns are sure. The first step knows none of them from before; the second knows three of the best four."""
    out = decode(Scripted(peaks([(1, 0.9999)] * 6, 8)), 6, "ccd:mode=mean")
    assert commits(out)[0] == {0} and {1, 2, 3} <= commits(out)[1]
    out = decode(Scripted(peaks([(1, 0.9999)] * 6, 8)), 6, "ccd:mode=mean,seek=false")
    assert [len(columns) for columns in commits(out)] == [1] * 6


# -- EOSER and ASS --------------------------------------------------------------------------------------------------


def test_eoser_demotes_the_end_early() -> None:
    table = peaks([(3, 0.9), (1, 0.5), (3, 0.6)], 8)
    j = job(Scripted(table, eos=3), 3, "eoser", steps=5)
    score = j.sampler.score
    state, window = open_window(j.sampler, j.queue)
    factors, ranked = [], []
    for n in range(5):
        view = View(state._replace(step=torch.tensor([n])), window)
        pred = Prediction(torch.cat([table, torch.full((3, 1), -torch.inf)], 1)[None], window.reads)
        factors.append(score.factor(view).item())
        ranked.append(score(view, pred)[0].exp().tolist())
    assert factors == pytest.approx([0.4, 0.55, 0.7, 0.85, 1.0])
    assert ranked[0] == pytest.approx([0.36, 0.5, 0.24])
    assert ranked[2] == pytest.approx([0.63, 0.5, 0.42])


def test_eoser_follows_the_schedule_of_ass() -> None:
    j = job(Scripted(peaks([(1, 0.5)] * 8, 8), eos=3), 8, "eoser+ass")
    state, window = open_window(j.sampler, j.queue)
    views = (View(state._replace(step=torch.tensor([n])), window, j.sampler.schedule) for n in range(3))
    factors = [j.sampler.score.factor(view).item() for view in views]
    assert factors == pytest.approx([0.13375, 0.38125, 0.87625])


@pytest.mark.parametrize(
    ("n", "blocks", "sizes"),
    [
        (128, 4, [1, 2, 4, 8, 16, 32, 65]),
        (16, 1, [1, 2, 4, 9]),
        (16, 2, [1, 2, 4, 9]),
        (20, 1, [1, 2, 4, 13]),
        (20, 2, [1, 2, 4, 13]),
    ],
)
def test_ass_doubles(n: int, blocks: int, sizes: list[int]) -> None:
    model = Scripted(peaks([(1, 0.3 + 0.5 * (i % 7) / 7) for i in range(n)], 8))
    out = decode(model, n, {"name": "ass", "blocks": blocks})
    assert [len(c) for c in commits(out)] == sizes
    if blocks > 1:
        edge = 2 ** (len(sizes) - blocks + 1) - 1
        assert set().union(*commits(out)[: len(sizes) - blocks + 1]) == set(range(edge))


# -- DAEDAL ---------------------------------------------------------------------------------------------------------


def test_daedal_traces_the_worked_example() -> None:
    tail = peaks([(1, 0.9), (4, 0.8), (4, 0.99)], 6)
    script = [
        peaks([(1, 0.5)] * 4, 6),
        peaks([(1, 0.5)] * 4 + [(4, 0.6), (4, 0.8)], 6),
        torch.cat([peaks([(1, 0.95), (2, 0.25), (2, 0.5), (3, 0.92)], 6), tail]),
        peaks([(1, 0.95)] * 8, 6),
    ]
    model = Scripted(script, eos=4, prompt=2)
    m, out = model.mask_id, []
    spec = {"name": "daedal", "initial": 4, "tau_low": 0.3, "factor": 2, "tail": 2}
    j = prepare(model, [0, 0], {"max_new_tokens": 8, "block_length": 4, "early_stop": False, "sampler": spec})
    meter = Meter(1)
    for tick in j.ticks(meter):
        canvas = tick.state.canvas
        out.append(canvas.ids[0, 2 : int(canvas.length[0])].tolist())
    assert out == [
        [m] * 6,
        [m] * 6 + [4],
        [1, m, m, m, 3, m, m, 4],
        [1, 1, 1, 1, 3, m, m, 4],
        [1, 1, 1, 1, 3, 1, 1, 4],
    ]
    assert meter.rows[0].nfe == 5


def test_daedal_tail_confidence_skips_other_columns() -> None:
    table = torch.cat([peaks([(1, 0.5), (4, 0.7), (1, 0.5), (4, 0.8), (4, 0.9)], 6), torch.full((5, 1), -torch.inf)], 1)
    j = job(Scripted(table[:, :6], eos=4), 5, "daedal:tail=4,initial=5")
    view, pred = opened(j, table)
    assert tail_confidence(view, pred, 4, 4).item() == pytest.approx((0.9 + 0.8 + 0.7) / 4)


def test_daedal_grows_into_the_last_column() -> None:
    out = decode(Scripted(peaks([(1, 0.5)] * 6, 8), eos=3), 6, "daedal:initial=5,tail=2,tau_low=0")
    assert out.trace.lengths[:2] == [7, 7]  # one column short of the ceiling, and the prompt
    assert out.trace.final == [0] + [1] * 6  # a column to decode, not the end token behind the answer


def test_daedal_pushes_out_what_the_ceiling_leaves_no_room_for() -> None:
    """Six columns and an end token behind them; the fourth becomes four masks, of which the ceiling of nine lets two
    push the others on: the end token goes."""

    def script(ids: list[int]) -> Tensor:
        rows = [(2, 0.95), *[(1, 0.5)] * (len(ids) - 2)]
        rows[3], rows[-2:] = (1, 0.2), [(3, 0.6)] * 2
        return peaks(rows, 8)

    spec = {"name": "daedal", "initial": 6, "tail": 2, "factor": 4, "tau_low": 0.4}
    out = decode(Scripted(script, vocab=9, eos=3), 9, spec)
    assert out.trace.lengths[:3] == [8, 10, 10]
    assert out.trace.commits[:2] == [[[7, 3]], [[1, 2], [7, 8], [8, 8], [9, 8]]]  # 8 is the mask
    assert out.trace.final == [0, 2, 1, 1, 1, 1, 1, 1, 3, 3]
    out = decode(Scripted(script, vocab=9, eos=3), 8, {**spec, "tail": 1})  # without an end token a mask goes
    assert (out.trace.lengths[:2], out.trace.lengths[-1], out.finish_reason) == ([7, 9], 9, "stop")
    assert out.nfe <= 10 and 8 not in out.trace.final
    out = decode(Scripted(script, vocab=9, eos=3), 8, {**spec, "tail": 1, "factor": 8})  # masks that reach the ceiling
    assert (out.trace.lengths[:2], out.trace.lengths[-1]) == ([7, 9], 9) and 8 not in out.trace.final


def test_daedal_without_growth_keeps_its_length() -> None:
    model = Scripted(peaks([(1, 0.6)] * 40, 8), eos=3)
    out = decode(model, 40, "daedal:initial=8,tau_eos=0,tau_expand=0,tail=4", block_length=4)
    assert out.trace.lengths[0] == out.trace.lengths[-1] == 1 + 8 + 2  # one forward of stage 1, then the guard
    assert out.nfe == 1 + 8


def test_daedal_never_passes_its_ceiling_and_grows_geometrically() -> None:
    model = Scripted(peaks([(1, 0.05 + 0.2 * (i % 3)) for i in range(64)], 40), eos=3)
    linear = decode(model, 50, "daedal:initial=4,tau_low=0.3,factor=5", block_length=8)
    fast = decode(model, 50, "daedal:initial=4,tau_low=0.3,factor=5,growth=geometric", block_length=8)
    assert max(linear.trace.lengths) == max(fast.trace.lengths) == 51
    assert fast.trace.lengths[:4] == [9, 17, 33, 51]
    assert model.mask_id not in linear.sequences


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("localleap:radius=-1", "radius=-1 must be at least 0"),
        ("localleap:radius=2.5", "radius=2.5 must be an integer"),
        ("localleap:kappa=null", "kappa=None must be a number"),
        ("localleap:kappa=nan", "kappa=nan must be a number"),
        ("localleap:kapa=0.9", "did you mean 'kappa'"),
        ("credit:beta=1.5", r"beta=1.5 must be in \[0, 1\]"),
        ("credit:papre", "did you mean 'paper'"),
        ("prophet:region=middle", "region='middle' must be one of"),
        ("prophet:region=[2, x]", r"must be a pair \[start, length\]"),
        ("prophet:smooth=maybe", "smooth='maybe' must be true or false"),
        ("prophet:high=x", "high='x' must be a number"),
        ("prophet:region=span,start=40", "outside the window of 8 columns"),
        ("prophet:progress=time", "must be one of 'auto', 'steps', 'tokens'"),
        ("adablock", "no tokenizer to find delimiters in"),
        ("adablock:delimiters=[900]", "id 900 is outside the vocabulary"),
        ("adablock:delimiters=[]", "the list is empty"),
        ("ccd:mode=median", "'agree', 'mean'"),
        ("ass:blocks=9", "blocks=9 exceed the 3 steps that 8 tokens take"),
        ("daedal:initial=20", "initial=20 exceeds the ceiling max_new_tokens=8"),
        ("daedal", "pass eos="),
        ("threshold+localleap", "both decide the select, which columns commit; keep one"),
        ("localleap+localleap", "named twice"),
        ("profet", "did you mean 'prophet'"),
    ],
)
def test_bad_input_is_one_clear_line(sampler: str, message: str) -> None:
    model = Scripted(peaks([(1, 0.5)] * 8, 8))
    with pytest.raises(DllmError, match=message) as error:
        decode(model, 8, sampler)
    assert "\n" not in str(error.value)


def test_a_delimiter_that_the_tokenizer_does_not_have() -> None:
    class Letters:
        def __len__(self) -> int:
            return 8

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(97 + i) for i in ids)

    model = Scripted(peaks([(1, 0.5)] * 8, 8))
    model.tokenizer = Letters()
    with pytest.raises(DllmError, match="no token of this tokenizer holds"):
        decode(model, 8, "adablock")
    assert decode(model, 8, "adablock:delimiters=[b]").nfe > 0


def test_daedal_beyond_the_positions_of_the_model() -> None:
    model = Scripted(peaks([(1, 0.5)] * 8, 8), eos=3, max_positions=32)
    with pytest.raises(DllmError, match="exceed the model's 32 positions; at most 31 new tokens fit"):
        decode(model, 40, "daedal")


def test_ass_has_its_own_number_of_steps() -> None:
    with pytest.raises(DllmError, match="its schedule has 3 steps for 8 tokens"):
        decode(Scripted(peaks([(1, 0.5)] * 8, 8)), 8, "ass", steps=5)
