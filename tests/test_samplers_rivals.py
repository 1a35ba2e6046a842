"""The worked examples of KLASS, Hierarchy, DSB, WINO, Saber, ReMDM, PC-Sampler, SlowFast and LoPA, the identities
between them and the plain rules, their invariants and bad inputs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from scripted import Scripted, open_window, peaks, probabilities
from torch import Tensor

import dllm
from dllm.call.job import Job, prepare
from dllm.decoding.cache.policy import planned
from dllm.decoding.canvas import Span
from dllm.decoding.invariants import Checked
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import View
from dllm.decoding.step import opened, step
from dllm.errors import DllmError
from dllm.models.hub import load
from dllm.samplers import klass, pc, registry
from dllm.samplers.base import Method
from dllm.samplers.klass import Before
from dllm.samplers.lopa import Tried, surest
from dllm.samplers.remdm import Posterior, weights
from dllm.samplers.saber import Recorded
from dllm.samplers.slowfast import Cycles


@pytest.fixture(scope="module")
def random_model() -> Any:
    return load(GOLDEN / "checkpoints" / "tiny-llada-random", dtype="float64", device="cpu")


def decode(model: Any, n: int, sampler: Any, prompt: list[int] | None = None, **arguments: Any) -> Any:
    arguments = {"max_new_tokens": n, "block_length": n, "early_stop": False, "trace": True, **arguments}
    return dllm.generate(model, prompt or [0], sampler=sampler, check=Checked(), **arguments)


def writes(out: Any) -> list[set[int]]:
    """Generation-relative columns that each forward gave a token."""
    start, mask = len(out.trace.prompt), out.trace.mask_id
    return [{c - start for c, token in pairs if token != mask} for pairs in out.trace.commits]


def masked_again(out: Any) -> list[set[int]]:
    start, mask = len(out.trace.prompt), out.trace.mask_id
    return [{c - start for c, token in pairs if token == mask} for pairs in out.trace.commits]


def confident(*confidences: float, vocab: int = 8) -> Tensor:
    return peaks([(1, c) for c in confidences], vocab)


def job(n: int, sampler: Any, *, infill: list[int] | None = None, vocab: int = 8, **arguments: Any) -> Job:
    """A call on a scripted model; `infill` lists generated columns, 8 (the mask id) for a mask."""
    model = Scripted(confident(*[0.5] * n, vocab=vocab))
    given = {"max_new_tokens": n, "block_length": n, "early_stop": False, "sampler": sampler, **arguments}
    if infill is None:
        return prepare(model, [0], given)
    return prepare(model, [0, *infill], {**given, "max_new_tokens": 0, "infill": True})


def first_step(j: Job, logits: Tensor) -> tuple[View, Prediction]:
    """The view and the prediction of the first step, when the model answers `logits` (W, V) in the columns it reads."""
    state, window = open_window(j.sampler, j.queue)
    return View(state, window), Prediction(logits[None], window.reads)


def selected(sampler: Method, logits: Tensor, infill: list[int] | None = None) -> set[int]:
    """Generation-relative columns that one step from a fresh window commits."""
    j = job(len(logits), sampler, infill=infill)
    state, window = open_window(j.sampler, j.queue)
    lo = int(window.lo[0]) - 1
    logits = torch.cat([logits, torch.full((len(logits), 1), -torch.inf)], 1)  # the mask id
    after = step(j.sampler, state, window, Prediction(logits[None, lo : lo + window.reads.shape[1]], window.reads))
    changed = (after.canvas.ids != state.canvas.ids)[0]
    return {int(c) - 1 for c in changed.nonzero()[:, 0]}


# -- Hierarchy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau_low", "expected"), [(0.4, {0, 4}), (0.55, {0}), (0.7, {0})])
def test_hierarchy_splits_every_run_of_masks(tau_low: float, expected: set[int]) -> None:
    model = Scripted(confident(0.6, 0.3, 0.99, 0.45, 0.5, 0.2))
    hole = model.mask_id
    prompt = [0, hole, hole, 3, hole, hole, hole]
    out = decode(model, 0, {"name": "hierarchy", "tau_low": tau_low}, prompt, infill=True, block_length=6)
    assert {c - 1 for c, _ in out.trace.commits[0]} == expected


def test_hierarchy_takes_one_of_equals_and_all_above_the_high_bar() -> None:
    assert selected(registry.method("hierarchy")(), confident(0.6, 0.6, 0.5, 0.86, 0.9)) == {3, 4}
    assert selected(registry.method("hierarchy")(), confident(0.6, 0.6, 0.5)) == {0}


def test_hierarchy_remasks_fewer_than_it_commits() -> None:
    tables = [confident(0.95, 0.95, 0.3, 0.2), torch.cat([peaks([(2, 0.9), (2, 0.8)], 8), confident(0.5, 0.95)])]
    out = decode(Scripted(tables), 4, {"name": "hierarchy", "tau_remask": 0.3})
    assert writes(out)[0] == {0, 1}
    assert writes(out)[1] == {3} and masked_again(out)[1] == set()  # one commit leaves no room
    tables[1] = torch.cat([peaks([(2, 0.9), (2, 0.8)], 8), confident(0.95, 0.95)])
    out = decode(Scripted(tables), 4, {"name": "hierarchy", "tau_remask": 0.3})
    assert writes(out)[1] == {2, 3} and masked_again(out)[1] == {0}  # the less probable of the two, 0.1 / 7


def test_a_stop_may_still_be_taken_back_inside_an_open_block() -> None:
    """The first step closes the prefix with an end of sequence; the second finds it improbable and masks it again."""
    first = torch.cat([peaks([(1, 0.95), (3, 0.95)], 8), confident(0.3, 0.3)])
    second = torch.cat([peaks([(1, 0.95), (2, 0.95)], 8), confident(0.95, 0.95)])
    out = decode(Scripted([first, second], eos=3), 4, {"name": "hierarchy", "tau_remask": 0.3}, early_stop=True)
    assert (out.tokens, out.nfe) == ([1, 2, 1, 1], 3)
    keeps = decode(Scripted([first, second], eos=3), 4, "hierarchy", early_stop=True)
    assert (keeps.tokens, keeps.nfe, keeps.finish_reason) == ([1], 1, "stop")


def test_eotp_leaves_a_canvas_that_ends_with_its_end_alone() -> None:
    """An edit, even of no column, would cost the caches a refresh."""
    table = torch.cat([peaks([(1, 0.9), (1, 0.9), (3, 0.9)], 8), torch.full((3, 1), -torch.inf)], 1)
    j = prepare(Scripted(table[:, :8], eos=3), [0], {"sampler": "eotp", "max_new_tokens": 3})
    view, pred = first_step(j, table)
    for chosen, edits in (([2], ()), ([0, 2], ())):
        d = view.commit(torch.isin(torch.arange(3), torch.tensor(chosen))[None], pred.token)
        assert j.sampler.amend[0](view, pred, d).edits == edits


def test_eotp_cuts_behind_what_is_written_only() -> None:
    """Prophet's exit takes the place of the step's commit, an end of sequence: nothing is cut, everything is filled."""
    model = Scripted(peaks([(1, 0.9), (3, 0.99), (1, 0.9)], 8), eos=3)
    out = decode(model, 3, "prophet:high=0,mid=0,low=0,region=all+eotp")
    assert (out.trace.final, out.nfe) == ([0, 1, 3, 1], 1)


def test_eotp_looks_for_an_end_where_no_mask_is_left() -> None:
    """Editing holds a full block open for another forward."""
    out = decode(Scripted(confident(0.99, 0.99, 0.99), eos=3), 3, "editing+eotp:mode=eager")
    assert (out.tokens, out.nfe) == ([1, 1, 1], 2)


# -- DSB ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "second"), [(None, [2, 6]), (3, [2, 5])])
def test_dsb_slides_and_grows(most: int | None, second: list[int]) -> None:
    table = confident(0.95, 0.2, 0.95, 0.1, 0.1, 0.1, 0.1, 0.1)
    out = decode(Scripted(table), 8, {"name": "dsb", "max_length": most}, block_length=3)
    assert writes(out)[0] == {0, 2}
    assert out.trace.windows[:2] == [[1, 4], second]  # columns of the canvas: the prompt holds column 0


def test_dsb_refreshes_after_a_block_of_commits() -> None:
    j = job(8, "dsb", block_length=3)
    table = torch.cat([confident(*[0.95, 0.2, 0.95, 0.95, 0.95, 0.1, 0.1, 0.1]), torch.full((8, 1), -torch.inf)], 1)
    state, epochs = j.queue, []
    for _ in range(3):
        state, window = open_window(j.sampler, state)
        epochs.append(int(window.epoch[0]))
        state = step(
            j.sampler, state, window, Prediction(table[None, (window.reads[0] - 1).clamp(min=0)], window.reads)
        )
    assert epochs == [0, 0, 1]  # 2 commits, then 4: at least 3 since the last refresh


# -- KLASS ----------------------------------------------------------------------------------------------------------


def test_klass_divergence_is_new_against_old() -> None:
    old = probabilities([[0.9, 0.1], [0.9, 0.1]])
    new = Prediction(probabilities([[0.95, 0.05], [0.91, 0.09]])[None], torch.tensor([[0, 1]]))
    found = klass.divergence(new, old[None], old.logsumexp(-1)[None], new.cols)
    assert torch.allclose(found, torch.tensor([[0.016707, 0.000573]], dtype=torch.float64), atol=1e-6)


def test_klass_divergence_survives_forbidden_tokens() -> None:
    law, at = torch.tensor([[[0.0, -torch.inf, 1.0]]]), torch.tensor([[0]])
    assert klass.divergence(Prediction(law, at), law, law.logsumexp(-1), at).abs().item() < 1e-6


@pytest.mark.parametrize(("epsilon", "second"), [(0.02, {0, 1}), (0.015, {1})])
def test_klass_commits_what_stands_still(epsilon: float, second: set[int]) -> None:
    """Column 0 moves by KL .0167, column 1 not at all; column 3 never reaches kappa. The quota opens with column 2."""
    tables = [probabilities([law, [0.05, 0.95], [0.01, 0.99], [0.6, 0.4]]) for law in ([0.1, 0.9], [0.05, 0.95])]
    out = decode(Scripted(tables), 4, {"name": "klass", "kappa": 0.9, "epsilon": epsilon, "n": 1})
    assert writes(out)[:2] == [{2}, second]


def test_klass_needs_n_still_steps() -> None:
    for n, sizes in ((1, [1, 4]), (2, [1, 1, 3]), (3, [1, 1, 1, 2])):
        out = decode(Scripted(confident(0.95, 0.96, 0.97, 0.98, 0.99)), 5, {"name": "klass", "n": n})
        assert [len(w) for w in writes(out)] == sizes


def test_klass_history_starts_with_the_block_or_with_the_generation() -> None:
    table = confident(0.95, 0.96, 0.97, 0.98)
    by_window = decode(Scripted(table), 4, {"name": "klass", "history": "window"}, block_length=2)
    assert [len(w) for w in writes(by_window)] == [1, 1, 1, 1]  # the second block knows nothing of its columns yet
    whole = decode(
        Scripted(confident(0.9, 0.91, 0.92, 0.95, 0.96, 0.97)),
        6,
        {"name": "klass", "history": "generation"},
        block_length=3,
    )
    assert [len(w) for w in writes(whole)] == [1, 1, 1, 1, 2]  # still columns, but two steps inside the block


# -- WINO -----------------------------------------------------------------------------------------------------------


def wino(accept: list[float], shadow: list[float], last: int = 3) -> tuple[set[int], set[int]]:
    """Commits and re-maskings of a step in a block of 8 whose columns 0-2 were decoded: `accept` are the confidences
    of columns 3-7, `shadow` the leave-one-out probabilities of 0-2; `last` is what the step before committed."""
    tables = confident(*[0.99] * last, *[0.1] * (8 - last))
    real = confident(*[0.99] * 3, *accept)
    alone = confident(*shadow, *[0.5] * 5)
    model = Scripted([torch.cat([tables, tables]), torch.cat([real, alone])])
    out = decode(model, 8, {"name": "wino", "tau_draft": 0.6})
    assert writes(out)[0] == set(range(last))
    return writes(out)[1], masked_again(out)[1]


def test_wino_verifies_what_was_decoded_before() -> None:
    assert wino([0.7, 0.8, 0.1, 0.1, 0.1], [0.95, 0.5, 0.4]) == ({3, 4}, {1, 2})
    assert wino([0.7, 0.8, 0.1, 0.1, 0.1], [0.7, 0.5, 0.4]) == ({3, 4}, {1, 2})  # three fail, two is the bound
    assert wino([0.7, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1]) == ({3}, set())  # one commit verifies nothing
    assert wino([0.7, 0.8, 0.1, 0.1, 0.1], [0.95, 0.95, 0.95]) == ({3, 4}, set())


def test_wino_never_verifies_given_tokens() -> None:
    model = Scripted(torch.cat([confident(*[0.99] * 4), confident(*[0.01] * 4)]))
    hole = model.mask_id
    out = decode(model, 0, "wino", [0, 3, hole, 3, hole], infill=True, block_length=4)
    assert out.sequences == [0, 3, 1, 3, 1] and out.nfe == 1


def test_wino_caps_a_draft() -> None:
    table = confident(*[0.9] * 40)
    out = decode(Scripted(torch.cat([table, table])), 40, {"name": "wino", "tau_verify": 0})
    assert [len(w) for w in writes(out)] == [20, 14, 5, 1]  # min(max(int(0.7 m), 5), 20)


def test_wino_takes_back_nothing_that_it_did_not_write(random_model: Any) -> None:
    """The last block has two columns; the step before committed four, so that three could be taken back."""
    call: dict[str, Any] = {"max_new_tokens": 22, "block_length": 4, "eos": [], "check": Checked()}
    for out in dllm.generate(random_model, [[3, 14, 15, 92, 65], [35, 89]], sampler="wino:tau_draft=0.3", **call):
        assert (out.nfe, out.finish_reason) == (6, "length")


def test_wino_shadow_sees_everything_but_its_own_column(random_model: Any) -> None:
    mask, prompt = random_model.mask_id, [3, 14, 15, 92]
    j = prepare(random_model, [*prompt, mask, 7, mask, mask], {"sampler": "wino", "infill": True, "block_length": 4})
    state, window = opened(j.sampler, j.policy, j.queue)
    plan, window = planned(state, window.feeds(False)), window.cut(4)
    fed = j.sampler.inputs.expand(plan, state, window)
    hidden = random_model.forward(fed.ids, fed.pos, visible=fed.visible)
    plain = random_model.forward(plan.ids, plan.pos)
    assert torch.allclose(hidden[:, :8], plain, atol=1e-12)  # the shadow is invisible to the canvas
    assert fed.pos[0].tolist() == [*range(8), 4, 5, 6, 7] and fed.ids[0, 8:].tolist() == [mask] * 4
    seen = fed.visible[0].int()
    assert seen[:8, 8:].sum() == 0 and (seen[8:, 8:] == 1).all()
    assert (1 - seen[8:, :8]).nonzero().tolist() == [[k, 4 + k] for k in range(4)]


# -- Saber ----------------------------------------------------------------------------------------------------------


def test_saber_bar_and_backtracking() -> None:
    method = registry.method("saber")()
    j = job(5, method, infill=[3, 3, 8, 8, 8])
    state, window = open_window(j.sampler, j.queue)
    state.columns[Recorded].record[0, 1:3] = torch.tensor([0.9, 0.7], dtype=torch.float64)
    table = torch.cat([confident(0.9, 0.7, 0.85, 0.82, 0.5), torch.full((5, 1), -torch.inf)], 1)
    view = View(state, window)
    pred = Prediction(table[None, (window.reads[0] - 1).clamp(min=0)], window.reads)
    chosen = view.cols[method.select(view, pred, pred.log_confidence)].tolist()
    assert chosen == [3, 4]  # above the mean of .9 and .7
    d = method.revoke(view, pred, view.commit(method.select(view, pred, pred.log_confidence), pred.token))
    assert int((d.token[d.write] == 8).sum()) == 1  # min(max(2 // 2, ceil(2 / 8)), 2 - 1)


def test_saber_takes_back_what_fell_most() -> None:
    first, second = confident(0.9, 0.8, 0.3, 0.3, 0.3, 0.3), confident(0.85, 0.5, 0.6, 0.6, 0.3, 0.3)
    out = decode(Scripted([first, second, second]), 6, "saber")
    # step 1 commits 0 and 1; changes count from 0, so that of column 1 is the lower one: it does not stay
    assert writes(out)[0] == {0} and masked_again(out)[0] == set()
    assert out.finish_reason == "length"
    nets = [len(w) - len(m) for w, m in zip(writes(out), masked_again(out), strict=True)]
    assert all(n >= 1 for n in nets)


# -- ReMDM ----------------------------------------------------------------------------------------------------------


def test_remdm_posterior() -> None:
    law = Posterior("cap", 0.008, 4)
    sigma, unmask = law.rates(torch.tensor([2]))  # t = 1/2, s = 1/4: alpha_t = .5, alpha_s = .75
    assert sigma.item() == pytest.approx(0.008) and unmask.item() == pytest.approx(0.508)
    assert Posterior("rescale", 0.008, 4).rates(torch.tensor([2]))[0].item() == pytest.approx(0.004)
    sigma, unmask = Posterior("conf", 1.0, 4).rates(torch.tensor([2]))
    assert sigma.item() == pytest.approx(0.5) and unmask.item() == pytest.approx(0.5)
    sigma, unmask = law.rates(torch.tensor([3]))  # the last step fills everything
    assert sigma.item() == 0 and unmask.item() == pytest.approx(1)


def test_remdm_loop_holds_alpha() -> None:
    law = Posterior("loop", 0.02, 20)
    sigma, unmask = law.rates(torch.arange(20))
    assert law.alpha(torch.tensor([1.0, 0.55, 0.3, 0.05, 0.0])).tolist() == pytest.approx([0, 0.9, 0.9, 0.9, 1])
    assert law.alpha(torch.tensor([0.775, 0.025])).tolist() == pytest.approx([0.45, 0.95])  # linear before and after
    inside = (torch.arange(20) >= 9) & (torch.arange(20) < 19)
    assert torch.equal(sigma > 0, inside)
    assert unmask[12].item() == pytest.approx(0.02 * 0.9 / 0.1)
    assert ((unmask >= -1e-12) & (unmask <= 1 + 1e-12)).all()


def test_remdm_weights() -> None:
    conf = torch.tensor([[0.9, 0.6, 0.3, 0.5]], dtype=torch.float64)
    among = torch.tensor([[True, True, True, False]])
    assert weights(conf, among)[0].tolist() == pytest.approx([0.2397, 0.3236, 0.4368, 0], abs=1e-4)
    assert weights(conf, among & False).sum() == 0


def test_remdm_refine_fills_loops_and_finishes() -> None:
    out = decode(
        Scripted(confident(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)), 8, {"name": "remdm", "fill": 0.75, "loops": 2}
    )
    assert [len(w) for w in writes(out)] == [1] * 6 + [0, 1, 0, 1] + [1, 1]
    assert masked_again(out)[6:10:2] == [{5}, {5}]  # the least probable decoded token, which is also the best mask
    assert out.nfe == 8 + 2 * 2


@pytest.mark.parametrize("k", [1, 2, 5])
def test_remdm_a_loop_that_masks_everything_fills_again(k: int) -> None:
    out = decode(
        Scripted(confident(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)),
        8,
        {"name": "remdm", "fill": 0.125, "loops": 2, "k": k},
    )
    nets = [len(w) - len(m) for w, m in zip(writes(out), masked_again(out), strict=True)]
    assert nets[:5] == [k, -k, k, -k, k] and nets[5] == min(k, 8 - k)


@pytest.mark.parametrize("schedule", ["cap", "rescale", "conf", "loop"])
def test_remdm_schedules_end_with_the_budget_and_repeat(schedule: str) -> None:
    def run() -> Any:
        sampler = {"name": "remdm", "schedule": schedule, "eta": 0.2}
        return decode(Scripted(confident(*[0.5] * 12)), 12, sampler, steps=10, seed=3)

    first = run()
    assert first.nfe <= 10 and first.finish_reason == "length"
    assert first.trace.commits == run().trace.commits


def test_remdm_masks_again_at_its_rate() -> None:
    """About eta of the decoded columns a step, over many columns; none without sigma."""
    n = 400
    again = [
        sum(
            map(
                len,
                masked_again(
                    decode(
                        Scripted(confident(*[0.5] * n)), n, {"name": "remdm", "schedule": "cap", "eta": eta}, steps=10
                    )
                ),
            )
        )
        for eta in (0.0, 0.1)
    ]
    decoded = sum(n * k / 10 for k in range(1, 10))  # before each step
    assert again[0] == 0 and 0.05 * decoded < again[1] < 0.13 * decoded


# -- PC-Sampler -----------------------------------------------------------------------------------------------------


def test_pc_scores() -> None:
    tokens, frequency = [1, 2, 3, 4], [0.1, 0.001, 0.1, 1e-4]
    shares = {0: 1 - sum(frequency), **dict(zip(tokens, frequency, strict=True))}
    table = peaks(list(zip(tokens, [0.9, 0.9, 0.99, 0.5], strict=True)), 8)
    j = job(4, {"name": "pc", "frequencies": shares})
    view, pred = first_step(j, torch.cat([table, torch.full((4, 1), -torch.inf)], 1))
    score = j.sampler.score(view, pred)[0].tolist()
    assert score == pytest.approx([2.072327, 4.841788, 1.382623, 2.175326], abs=1e-5)
    assert writes(decode(Scripted(table), 4, {"name": "pc", "frequencies": shares}))[0] == {1}


def test_pc_cap_and_uniform_background() -> None:
    view, pred = first_step(j := job(2, {"name": "pc", "lam": 0, "alpha": 0.5}), torch.zeros(2, 9))
    assert j.sampler.score(view, pred)[0].tolist() == pytest.approx([0.2441, 0.2441], abs=1e-3)  # 1/9 ln 9
    view, pred = first_step(j, peaks([(1, 0.9), (1, 0.8)], 9))
    assert j.sampler.score(view, pred)[0].tolist() == [0.5, 0.5]


def test_pc_tables(tmp_path: Path) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": ["ab".index(c) + 1 for c in text]}

    path = pc.estimate(["aab", "b"], tokenizer, tmp_path / "counts.json")
    assert path.read_text() == '{"1": 2, "2": 2}\n'
    assert pc.table(path, 4).tolist() == pc.table({1: 2, 2: 2}, 4).tolist() == [0, 0.5, 0.5, 0]
    assert pc.table([0, 1, 1, 2], 4).tolist() == [0, 0.25, 0.25, 0.5]


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ("nowhere.json", "not a readable JSON file"),
        ({99: 1}, "token 99, outside the vocabulary of 9"),
        ({1: -1}, "token 1, outside"),
        ({}, "a count for each token id"),
        ({"x": 1}, "integer token ids"),
        ({1: 0}, "sum to zero"),
    ],
)
def test_pc_bad_tables(frequencies: Any, message: str) -> None:
    with pytest.raises(DllmError, match=message):
        job(2, {"name": "pc", "frequencies": frequencies})


# -- SlowFast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimates", "end"), [((7, 8), 8), ((7, 9), 0), ((9, 7), 0), ((8, 8), 8)])
def test_slowfast_settles_on_two_close_estimates(estimates: tuple[int, int], end: int) -> None:
    window = Cycles(32, tau_min=0.1, most=8, spread=1.0)
    last, new = (torch.tensor([x]) for x in estimates)
    assert window.settle(new, last, torch.tensor([2]), last + new).tolist() == [end]


def test_slowfast_takes_the_mean_of_estimates_that_never_agree() -> None:
    """Three slow steps whose surest columns end at 8, 2 and 4: the region is columns 0 to 3, the mean floored."""
    ends = [confident(*[0.6] * n, *[0.05] * (8 - n), vocab=40) for n in (8, 2, 4)]
    out = decode(Scripted(ends), 8, {"name": "slowfast", "tau_min": 0.3, "most": 3})
    assert out.trace.windows[:4] == [[1, 9], [1, 9], [1, 9], [1, 5]]


def test_slowfast_region_ends_with_a_canvas_that_was_cut() -> None:
    """Fast phase on columns 0 to 7: column 3 gets the end of the text and the canvas is cut behind it."""
    table = peaks([(1, 0.7), (1, 0.65), (1, 0.3), (3, 0.6), (1, 0.3), (1, 0.3), (1, 0.3), (1, 0.3)], 8)
    out = decode(Scripted(table, eos=3), 8, "slowfast:tau_min=0.2+eotp")
    assert out.trace.windows == [[1, 9], [1, 9], [1, 9], [1, 5]]
    assert writes(out) == [{0}, {1}, {3}, {2}]


def test_slowfast_needs_two_estimates_at_the_first_column_too() -> None:
    """Without a prompt, only the first column sure: the estimates are 1 and 1, and the region is that column."""
    model = Scripted(confident(0.5, *[0.05] * 7, vocab=40), prompt=0)
    out = dllm.generate(
        model, sampler={"name": "slowfast", "tau_min": 0.3}, max_new_tokens=8, block_length=8, trace=True
    )
    assert out.trace.windows[:3] == [[0, 8], [0, 8], [1, 8]]


def test_slowfast_region_holds_a_column_where_nothing_is_sure() -> None:
    """Each slow step estimates one column behind the cycle's start; two agree, and that column is full by then."""
    out = decode(Scripted(confident(*[0.05] * 6, vocab=40)), 6, {"name": "slowfast", "tau_min": 0.3})
    assert out.trace.windows == [[1, 7], [1, 7], [2, 7], [2, 7], [3, 7], [3, 7]]


def test_slowfast_phases() -> None:
    """Slow: the window is the block, one commit each; the estimates 3 and 3 agree; fast: columns 0-2 until full."""
    table = confident(0.5, 0.45, 0.4, 0.05, 0.05, 0.05, 0.05, 0.05, vocab=40)
    out = decode(Scripted(table), 8, {"name": "slowfast", "tau_min": 0.3})
    assert out.trace.windows[:3] == [[1, 9], [1, 9], [1, 4]]
    assert writes(out)[:3] == [{0}, {1}, {2}]
    assert out.trace.windows[3] == [4, 9]  # the next cycle
    assert out.finish_reason == "length"


def test_slowfast_feeds_what_a_later_link_reads() -> None:
    """The exit of Prophet watches the last column, which lies behind every region but the last."""
    table = confident(0.5, 0.45, 0.44, 0.43, 0.42, 0.05, 0.05, 0.05, vocab=40)
    spec = [
        {"name": "slowfast", "tau_min": 0.3},
        {"name": "prophet", "region": (7, 1), "high": 99, "mid": 99, "low": 99},
    ]
    out, alone = decode(Scripted(table), 8, spec), decode(Scripted(table), 8, spec[0])
    assert out.trace.commits == alone.trace.commits and out.trace.windows == alone.trace.windows


def test_slowfast_truncates_the_input_of_later_fast_steps() -> None:
    lengths = []

    class Counting(Scripted):
        def forward(self, ids: Tensor, pos: Tensor | None = None, **more: Any) -> Tensor:
            lengths.append(int((pos >= 0).sum()) if pos is not None else ids.shape[1])
            return super().forward(ids, pos, **more)

    table = confident(0.5, 0.45, 0.44, 0.43, 0.42, 0.05, 0.05, 0.05, vocab=40)
    out = decode(Counting(table), 8, {"name": "slowfast", "tau_min": 0.3})
    # two slow steps, then three fast ones on columns 0-4: only the first of them reads the whole canvas
    assert lengths[:5] == [9, 9, 9, 6, 6]
    assert out.positions == sum(lengths)
    whole = []
    lengths = whole
    decode(Counting(table), 8, {"name": "slowfast", "tau_min": 0.3, "truncate": False})
    assert set(whole) == {9}


# -- LoPA -----------------------------------------------------------------------------------------------------------


def test_lopa_follows_the_surest_branch() -> None:
    """Remaining means .50, .62, .58: branch 1."""
    rows = [confident(0.5, 0.5, 0.5), confident(0.9, 0.62, 0.62), confident(0.58, 0.9, 0.58)]
    state, window = (
        job(3, "lopa").queue,
        Span(torch.tensor([1]), *(torch.tensor([4]),) * 2, torch.tensor([[1, 2, 3]]), torch.tensor([0])),
    )

    def followed(branch: list[int], masked: list[bool] | None = None) -> int:
        """The branch that wins, when these fill the columns, 0 for none."""
        tried = Tried(torch.tensor([branch]), torch.zeros(1, 4, dtype=torch.long))
        canvas = state.canvas if masked is None else state.canvas._replace(masked=torch.tensor([masked]))
        now = state._replace(canvas=canvas, columns=state.columns.plus(tried))
        return surest(torch.stack(rows)[:, None], window.reads, now, window).item()

    assert followed([0, 1, 2, 0]) == 1
    assert followed([0, 0, 2, 0]) == 2  # the first branch has no column to try
    assert followed([0, 0, 2, 0], [False, False, True, False]) == 2  # the second branch fills the last mask


def test_lopa_commits_a_candidate_beside_the_winners_column() -> None:
    """The winner had filled column 1; its forward is sure of another token there, which is no candidate any more."""

    def script(ids: list[int]) -> Tensor:
        if ids[1:3] == [1, 2]:
            return peaks([(1, 0.9), (5, 0.95), (3, 0.7), (4, 0.6)], 8)
        return peaks([(1, 0.6), (2, 0.5), (3, 0.4), (4, 0.3)], 8)

    out = decode(Scripted(script, vocab=9), 4, {"name": "lopa", "b": 3})
    assert writes(out)[:2] == [{0}, {1, 2}]
    assert out.tokens[:3] == [1, 2, 3]


def test_lopa_commits_the_winners_column_and_goes_on_from_its_logits() -> None:
    """Filling column 2 with token 3 makes everything certain; nothing else does. The branches find it."""

    def script(ids: list[int]) -> Tensor:
        lucky = ids[3] == 3
        return peaks(
            [(1, 0.97 if lucky else 0.3), (1, 0.96 if lucky else 0.25), (3, 0.28), (1, 0.95 if lucky else 0.2)], 8
        )

    out = decode(Scripted(script, vocab=9), 4, {"name": "lopa", "b": 3})
    plain = decode(Scripted(script, vocab=9), 4, "threshold")
    # forward 1 commits column 0 and sets up branches for 2 and 1; forward 2 answers with the branch that filled 2
    assert writes(out) == [{0}, {1, 2, 3}]
    assert plain.nfe == 3 and out.nfe == 2
    assert out.tokens == [1, 1, 3, 1]
    assert out.positions == 5 + 3 * 5  # the second forward had three rows


# -- identities -----------------------------------------------------------------------------------------------------


PROMPTS = [[3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46, 26, 43, 38, 32]]


def traces(model: Any, sampler: Any, **arguments: Any) -> list[Any]:
    arguments = {"max_new_tokens": 24, "block_length": 8, "early_stop": False, "trace": True, **arguments}
    return [(o.sequences, o.nfe, o.trace.commits) for o in dllm.generate(model, PROMPTS, sampler=sampler, **arguments)]


class Strict(registry.method("threshold")):  # type: ignore[misc]
    """threshold with a strict comparison."""

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        return soft.confidence > self.tau


@pytest.mark.parametrize(
    ("sampler", "base", "arguments", "cached"),
    [
        ("dsb:tau=0.8", "threshold:tau=0.8", {"block_length": 24}, False),  # a cache recomputes a narrower window
        ("hierarchy:tau_low=1,tau_high=0.8", Strict(0.8), {}, True),
        ("klass:epsilon=0", "confidence", {"steps": 12}, True),
        ("klass:epsilon=0,history=generation", "confidence", {"steps": 12}, False),  # recomputes what it follows
        ("wino:tau_draft=0.8,tau_verify=0,most=24,share=1", Strict(0.8), {}, True),
        ("lopa:b=1", "threshold", {}, True),
        ("slowfast:truncate=false,most=1,tau_min=0,tau=0.8", "threshold:tau=0.8", {}, True),
        ("remdm:loops=0", "confidence", {"block_length": 24}, True),
        ("pc:lam=0,alpha=1000", "confidence", {}, True),
    ],
)
def test_identities(random_model: Any, sampler: Any, base: Any, arguments: Any, cached: bool) -> None:
    for cache in ("none", "dual") if cached else ("none",):
        ours, theirs = (traces(random_model, s, cache=cache, **arguments) for s in (sampler, base))
        assert ours == theirs


def test_saber_without_backtracking_is_a_mean_confidence_threshold(random_model: Any) -> None:
    for (ids, _, commits), prompt in zip(traces(random_model, "saber:backtrack=false,n=1"), PROMPTS, strict=True):
        canvas, seen = prompt + [random_model.mask_id] * 24, []
        for pairs in commits:
            logits = random_model.logits(random_model.forward(torch.tensor([canvas])))[0, len(prompt) :]
            conf = logits.softmax(-1).amax(-1)
            bar = sum(seen) / len(seen) if seen else 1.0
            masked = [i for i in range(24) if canvas[len(prompt) + i] == random_model.mask_id]
            expected = {i for i in masked if conf[i] > bar} or {max(masked, key=lambda i: (float(conf[i]), -i))}
            assert {c - len(prompt) for c, _ in pairs} == expected
            seen += [float(conf[i]) for i in expected]
            for c, token in pairs:
                canvas[c] = token
        assert canvas == ids


@pytest.mark.parametrize(
    "sampler", ["hierarchy:tau_high={}", "klass:kappa={},epsilon=10,n=1", "wino:tau_draft={}", "dsb:tau={}"]
)
def test_a_higher_bar_never_commits_more(sampler: str) -> None:
    """I10, from the same logits."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.cat([4 * torch.randn(12, 8, generator=generator), torch.full((12, 1), -torch.inf)], 1)
        chosen = []
        for tau in (0.3, 0.5, 0.7, 0.9):
            j = job(12, sampler.format(tau))
            state, window = open_window(j.sampler, j.queue)
            if sampler.startswith("klass"):
                lse = logits.logsumexp(-1)[None]
                before = Before(logits[None], lse, window.reads + 1, state.canvas.length)
                state = state._replace(memory=state.memory.plus(before))
            view = View(state, window)
            pred = Prediction(logits[None], window.reads)
            chosen.append(j.sampler.select(view, pred, pred.log_confidence) & view.live)
        assert all((b <= a).all() for a, b in pairwise(chosen))


NINE = [
    "klass",
    "klass:paper",
    "hierarchy:tau_remask=0.3",
    "dsb",
    "wino",
    "saber",
    "remdm:loops=3",
    "remdm:schedule=cap",
    "pc",
]


@pytest.mark.parametrize("sampler", [*NINE, "slowfast", "slowfast:truncate=false", "lopa"])
def test_rows_are_independent_and_invariants_hold(random_model: Any, sampler: str) -> None:
    common = {"max_new_tokens": 12, "block_length": 6, "trace": True, "eos": 124, "sampler": sampler}
    for cache in ("none", "dual:left=2", "dllm_cache"):
        checked = Checked()
        try:
            together = dllm.generate(random_model, PROMPTS, cache=cache, batch_size=2, check=checked, **common)
        except DllmError as refusal:
            refused = f"cannot use cache {cache.split(':')[0]!r}: with truncate=true"
            assert sampler == "slowfast" and refused in str(refusal)
            continue
        assert checked.steps > 0
        for i, out in enumerate(together):
            alone = dllm.generate(random_model, PROMPTS[i], cache=cache, seed=i, **common)
            assert (alone.sequences, alone.nfe, alone.trace.commits) == (out.sequences, out.nfe, out.trace.commits)


@pytest.mark.parametrize("sampler", ["wino", "lopa", "saber", "klass", "dsb"])
def test_composes_with_an_exit(random_model: Any, sampler: str) -> None:
    common = {"max_new_tokens": 16, "block_length": 8, "early_stop": False}
    left = dllm.generate(random_model, PROMPTS, sampler=f"{sampler}+sched:high=2,low=1", **common)
    stayed = dllm.generate(random_model, PROMPTS, sampler=f"{sampler}+sched:high=1e9,low=1e9", **common)
    plain = dllm.generate(random_model, PROMPTS, sampler=sampler, **common)
    assert all(random_model.mask_id not in out.sequences for out in left)
    assert sum(out.nfe for out in left) < sum(out.nfe for out in plain)
    assert [out.sequences for out in stayed] == [out.sequences for out in plain]


@pytest.mark.parametrize("window", ["dsb", "slowfast"])
def test_a_quota_on_a_window_without_blocks(random_model: Any, window: str) -> None:
    """KLASS falls back on the quota: 16 columns in 8 steps are two a step."""
    common = {"max_new_tokens": 16, "block_length": 8, "early_stop": False, "steps": 8}
    out = dllm.generate(random_model, PROMPTS[0], sampler=f"{window}+klass:epsilon=0", **common)
    assert out.nfe == 8


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("klass:n=0", "n=0 must be at least 1"),
        ("klass:history=block", "must be one of 'window', 'generation'"),
        ("hierarchy:tau_remask=2", r"must be in \[0, 1\]"),
        ("dsb:max_length=0", "must be at least 1"),
        ("wino:share=1.5", r"must be in \[0, 1\]"),
        ("saber:n=0", "must be at least 1"),
        ("remdm:schedule=none", "must be one of 'refine'"),
        ("slowfast:most=0", "must be at least 1"),
        ("lopa:b=0", "must be at least 1"),
        ("wino+lopa", "both decide the inputs"),
        ("wino+slowfast", "both decide the inputs"),
        ("dsb+slowfast", "both decide the window"),
        ("wino+hierarchy", "both decide the select"),
    ],
)
def test_bad_parameters_and_clashes(spec: str, message: str) -> None:
    with pytest.raises(DllmError, match=message):
        job(4, spec)


def test_wino_refuses_shifted_models() -> None:
    model = load(GOLDEN / "checkpoints" / "tiny-dream-random", dtype="float64", device="cpu")
    with pytest.raises(DllmError, match="predicts the next token"):
        dllm.generate(model, [1, 2, 3], sampler="wino", max_new_tokens=4)
