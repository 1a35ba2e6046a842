"""Who ranks: a score that is named takes the place of the one that a method would use, all of the rule goes by it, and
every name that public codes give to an order is one here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripted import Scripted, peaks, probabilities
from test_compositions import ANYWHERE, EOS, model, spec
from test_samplers_hand import commits, decode, job, opened

import dllm
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Context, best, rank
from dllm.errors import DllmError
from dllm.samplers import quota, registry
from dllm.samplers.base import SINGLE
from dllm.samplers.ccd import CCD
from dllm.samplers.sdar import leftmost

CONTEXT = Context(8, None, (32,), 159, (2,), 160, 512)
SCORES = ("confidence", "margin", "entropy", "random", "pc", "eoser")


def traces(*names: str, **more: Any) -> str:
    """The commits of ragged rows, where few columns pass a bar: most steps go by the ranking."""
    arguments = {"max_new_tokens": 16, "block_length": 8, "eos": EOS, "early_stop": False, "trace": True, **more}
    outs = dllm.generate(model(), [[3, 14, 15, 92, 65], [35, 89]], sampler=spec(*names), **arguments)
    return str([out.trace.commits for out in outs])


@pytest.mark.parametrize("name", [name for name in ANYWHERE if name not in SCORES])
def test_a_named_score_is_heard(name: str) -> None:
    """Nobody but another score refuses it, and it has a say."""
    assert len({traces(name, score) for score in SCORES}) > 1


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("other", SCORES)
def test_two_scores_clash(score: str, other: str) -> None:
    if score != other:
        with pytest.raises(DllmError, match=f"'{score}' and '{other}' both decide the score"):
            registry.build(f"{score}+{other}", CONTEXT)


@pytest.mark.parametrize(
    "name", ["eb:proxy=margin", "dream:alg=entropy", "dream:alg=origin", "sdar:sequential", "remdm:schedule=cap"]
)
def test_a_rule_that_asks_for_an_order_or_has_none_refuses_another(name: str) -> None:
    with pytest.raises(DllmError, match="both decide the score"):
        registry.build(f"{name}+margin", CONTEXT)


@pytest.mark.parametrize("name", registry.names())
def test_a_slot_is_owned_by_what_needs_it(name: str) -> None:
    """What a bundle only prefers, it assumes: none owns and assumes the same slot."""
    try:
        bundle = registry.method(name)().bundle(CONTEXT)
    except DllmError:  # it must be told something, or wants another kind of model
        return
    assert not [slot for slot in SINGLE if vars(bundle)[slot] is not None and slot in bundle.assumes]


# what public codes call the order: the spelling here, and the score that ranks then
RELEASED: dict[tuple[str, str], tuple[str, Callable[..., Any]]] = {
    ("LLaDA, remasking", "low_confidence"): ("confidence", quota.confidence),
    ("LLaDA, remasking", "random"): ("random", quota.random),
    ("Dream, alg", "origin"): ("dream:alg=origin", quota.confidence),
    ("Dream, alg", "maskgit_plus"): ("dream:alg=maskgit_plus", quota.confidence),
    ("Dream, alg", "topk_margin"): ("dream:alg=topk_margin", quota.margin),
    ("Dream, alg", "entropy"): ("dream:alg=entropy", quota.entropy),
    ("Fast-dLLM on Dream, alg", "confidence_threshold"): ("threshold", quota.confidence),
    ("Fast-dLLM on LLaDA, remasking", "random"): ("threshold+random", quota.random),
    ("CCD, alg", "maskgit_plus"): ("ccd+confidence", quota.confidence),
    ("CCD, alg", "topk_margin"): ("ccd+margin", quota.margin),
    ("CCD, alg", "entropy"): ("ccd+entropy", quota.entropy),
    ("DAWN on Dream, alg", "dawn"): ("dawn", quota.confidence),
    ("CLAD on Dream, alg", "CLAD"): ("clad", quota.confidence),
    ("KLASS, alg", "klass"): ("klass", quota.confidence),
    ("KLASS, alg", "default"): ("confidence", quota.confidence),
    ("KLASS, alg", "random"): ("random", quota.random),
    ("SDAR, remasking_strategy", "sequential"): ("sdar:sequential", leftmost),
    ("SDAR, remasking_strategy", "low_confidence_static"): ("sdar:low_confidence_static", quota.confidence),
    ("SDAR, remasking_strategy", "low_confidence_dynamic"): ("sdar:low_confidence_dynamic", quota.confidence),
    ("SDAR, remasking_strategy", "entropy_bounded"): ("sdar:entropy_bounded", quota.entropy),
    ("D2F, sampling_strategy", "default"): ("d2f", quota.confidence),
    ("D2F, sampling_strategy", "neg_entropy"): ("d2f+entropy", quota.entropy),
    ("D2F, sampling_strategy", "margin_confidence"): ("d2f+margin", quota.margin),
    ("d3LLM, alg", "entropy_threshold"): ("d3llm:max_open=1", quota.entropy),
    ("PC-Sampler, mode", "entropy"): ("entropy", quota.entropy),
    ("PC-Sampler, mode", "margin"): ("margin", quota.margin),
    ("PC-Sampler, mode", "linear_position"): ("sdar:sequential", leftmost),
    ("PC-Sampler, mode", "fast_dllm"): ("threshold", quota.confidence),
    ("PC-Sampler, mode", "eb_sampler"): ("eb", quota.entropy),
    ("PC-Sampler, mode", "remdm"): ("remdm", quota.confidence),
}


@pytest.mark.parametrize(("code", "value"), RELEASED)
def test_every_order_of_the_released_codes_is_reachable(code: str, value: str) -> None:
    here, score = RELEASED[code, value]
    assert registry.build(here, CONTEXT).score is score
    out = dllm.generate(model(), [3, 14, 15], sampler=here, max_new_tokens=8, steps=8, eos=[])
    assert len(out.tokens) == 8 and model().mask_id not in out.tokens


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("topk_margin", "margin"), ("neg_entropy", "entropy"), ("margin_confidence", "margin"), ("fast_dllm", "threshold"),
     ("low_confidence", "confidence"), ("linear_position", "sdar:sequential"), ("pc_sampler", "pc"),
     ("entropy_threshold", "d3llm:max_open=1"), ("generate_multi_block", "d3llm:released")],
)  # fmt: skip
def test_a_released_name_is_told_its_own(theirs: str, ours: str) -> None:
    registry.build(ours, CONTEXT)
    with pytest.raises(DllmError, match=f"here it is called '{ours}'"):
        registry.build(theirs, CONTEXT)


# -- CCD ------------------------------------------------------------------------------------------------------------


def laws(seed: int, columns: int, steps: int) -> list[torch.Tensor]:
    """A table of random laws over five tokens for each forward; most columns keep what they say."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.randn(columns, 5, generator=generator, dtype=torch.float64) * 2
    tables = []
    for _ in range(steps):
        moved = torch.rand(columns, 1, generator=generator) < 0.2
        law = torch.where(moved, torch.randn(columns, 5, generator=generator, dtype=torch.float64) * 2, law)
        tables.append(law)
    return tables


@pytest.mark.parametrize("score", ["margin", "confidence"])
@pytest.mark.parametrize("seek", ["true", "false"])
@pytest.mark.parametrize("seed", range(4))
def test_all_of_ccd_goes_by_the_named_score(score: str, seek: str, seed: int) -> None:
    """The released rule knows ranks and arg-maxes only: where the entropies of other laws are ordered as the score is
    here, plain CCD commits the same."""
    tables = laws(seed, 24, 24)
    alike = []
    for table in tables:
        probs = table.softmax(-1).sort(-1, descending=True).values
        value = probs[:, 0] - probs[:, 1] if score == "margin" else probs[:, 0]
        alike.append(peaks([(int(t), 0.3 + 0.6 * float(v)) for t, v in zip(table.argmax(-1), value, strict=True)], 5))
    named = decode(Scripted(tables), 24, f"ccd:seek={seek}+{score}")
    assert named.trace.commits == decode(Scripted(alike), 24, f"ccd:seek={seek}").trace.commits
    if seek == "true":
        assert max(map(len, commits(named))) > 1


def test_a_named_score_ranks_the_averages_of_ccd() -> None:
    """Column 0 has the largest margin now, but had said something else before: the margin of its average is small."""
    tables = [peaks([(1, 0.9), (1, 0.8), (1, 0.95)], 8), peaks([(2, 0.9), (1, 0.8), (1, 0.95)], 8)]
    for score in ("margin", "confidence", "entropy", "eoser", "margin+credit"):  # credit is a change of confidences
        out = decode(Scripted(tables, eos=7), 3, f"ccd:mode=mean,seek=false+{score}", steps=3)
        assert commits(out) == [{2}, {1}, {0}], score


def test_the_margin_of_two_contexts() -> None:
    """(0.9, 0.1) and (0.3, 0.7) are (0.6, 0.4) on average: a margin of 0.2, where each alone has 0.8 and 0.4."""
    j = job(Scripted(probabilities([[0.9, 0.1]])), 1, CCD(mode="mean", depth=2))
    [blend] = j.sampler.adjust
    view, pred = opened(j, torch.cat([probabilities([[0.9, 0.1]]), torch.full((1, 1), -torch.inf)], 1))
    assert blend(view, pred).margin.item() == pytest.approx(0.8)
    logits = torch.cat([probabilities([[0.3, 0.7]]), torch.full((1, 1), -torch.inf)], 1)
    assert blend(view, Prediction(logits[None], view.cols)).margin.item() == pytest.approx(0.2)


# -- the others -----------------------------------------------------------------------------------------------------


def test_the_share_of_a_block_is_the_best_by_the_named_score() -> None:
    """By confidence columns 1 and 0, by margin 0 and 2."""
    model = Scripted(probabilities([[0.55, 0.15, 0.15, 0.15], [0.56, 0.43, 0.005, 0.005], [0.5, 0.2, 0.2, 0.1]]))
    by_confidence = decode(model, 3, "sdar:low_confidence_static,steps=3")
    assert commits(by_confidence) == [{1}, {0}, {2}]
    for rule in ("low_confidence_static", "low_confidence_dynamic"):
        assert commits(decode(model, 3, f"sdar:{rule},steps=3+margin")) == [{0}, {2}, {1}]


def test_a_factor_holds_for_the_least_sure_of_a_prefix() -> None:
    """Margins rank column 1 first. (n + 1)(1 - c) of its confidence 0.56 is 0.88 alone and 1.32 with a second one; by
    confidence columns 2 and 0 go together, as 3 (1 - 0.7) = 0.9."""
    rows = [[0.7, 0.3, 0, 0, 0], [0.56, 0.11, 0.11, 0.11, 0.11], [0.72, 0.28, 0, 0, 0]]
    model = Scripted(probabilities(rows).clamp(min=-40))
    assert commits(decode(model, 3, "factor"))[0] == {0, 2}
    assert commits(decode(model, 3, "factor+margin"))[0] == {1}


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy", "eb", "dream", "ccd:paper"])
def test_ends_go_last_whatever_ranks(score: str) -> None:
    """`confidence_eos_eot_inf`: the surest column says 3, the end."""
    model = Scripted(peaks([(3, 0.99), (1, 0.8), (1, 0.7)], 8), eos=3)
    order = [columns for columns in commits(decode(model, 3, score, confidence_eos_eot_inf=True)) if columns]
    assert order[0] == {1} and 0 in order[-1]  # Dream's last step takes all that is left


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "threshold", "factor", "d2f", "sdar", "saber"])
def test_columns_that_all_predict_an_end_still_commit(name: str) -> None:
    """Their confidence is 0, so its logarithm is -inf, as where there is no candidate."""
    net = Scripted(peaks([(1, 0.9), (3, 0.8), (3, 0.7), (3, 0.6)], 4), eos=3)
    call: dict[str, Any] = {"max_new_tokens": 4, "block_length": 4, "early_stop": False, "confidence_eos_eot_inf": True}
    out = dllm.generate(net, [0], sampler=name, **call)
    assert (out.sequences, out.finish_reason) == ([0, 1, 3, 3, 3], "stop")
    assert out.nfe <= 4


def test_a_candidate_of_score_minus_infinity_comes_behind_others_and_before_none() -> None:
    score, among = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0]]), torch.tensor([[False, False, True, True]])
    assert rank(score, among).tolist() == [[4, 4, 1, 0]]
    last = among & (score == -torch.inf)
    assert rank(score, last).tolist() == [[4, 4, 0, 4]]
    assert best(score, last).tolist() == [[False, False, True, False]]
