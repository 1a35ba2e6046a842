"""Log-probabilities: the raw law at the forward that wrote a token, against forwards that are run again."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
import torch
from replay import standing_in
from scripted import Scripted, peaks, probabilities, tiny
from test_compositions import EVERY_CACHE, HOLES, PROMPTS, model, spec

import dllm
from dllm.decoding.canvas import Canvas, Decision, Leaves, splice_columns
from dllm.decoding.logprobs import Logprobs, Noting, TokenLogprob
from dllm.decoding.prediction import highest
from dllm.errors import DllmError
from dllm.samplers import registry

CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 4, "eos": 124, "logprobs": 3}
# one-block-causal family; edits lengths; feeds more than the canvas where its winner answers; is a lookahead
OTHERS = {"slowfast"}  # brings a cache of its own
OTHERS |= {"sdar", "fast_dllm_v2", "daedal", "eotp", "lopa", "freedave"}


def run(sampler: Any, prompts: Any = PROMPTS, **more: Any) -> list[Any]:
    return dllm.generate(model(), prompts, sampler=sampler, batch_size=2, **{**CALL, **more})


def same(a: list[Any], b: list[Any]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.tokens == other.tokens
        for x, y in zip(one.logprobs, other.logprobs, strict=True):
            assert [t for t, _ in x.top] == [t for t, _ in y.top]
            mine, theirs = ([v.logprob, *(p for _, p in v.top)] for v in (x, y))
            assert mine == pytest.approx(theirs, abs=1e-10)


def replayed(out: Any, length: int, scale: float = 0.0) -> None:
    """Every number is that of a full forward over the canvas as it was when the final token was written."""
    trace, mask = out.trace, model().mask_id
    ids = [*trace.prompt[: trace.start], *[mask] * (length - trace.start)]
    ids[: len(trace.prompt)] = trace.prompt
    expected: dict[int, torch.Tensor] = {}
    for pairs in trace.commits:
        canvas = torch.tensor([ids])
        with torch.inference_mode():
            logits = model().logits(model().forward(canvas, None))[0]
            if scale:
                blank = canvas.clone()
                blank[0, : trace.start] = mask
                free = model().logits(model().forward(blank, None))[0]
                logits = free + (scale + 1) * (logits - free)
                logits[:, mask] = -torch.inf
        for column, token in pairs:
            expected[column], ids[column] = logits[column].log_softmax(-1), token
    columns = [c for c in range(trace.start, length) if c in expected][: len(out.tokens)]
    for column, token, said in zip(columns, out.tokens, out.logprobs, strict=True):
        law = expected[column]
        assert ids[column] == token
        assert said.logprob == pytest.approx(float(law[token]), abs=1e-10)
        best = law.topk(3)
        assert [t for t, _ in said.top] == best.indices.tolist()
        assert [p for _, p in said.top] == pytest.approx(best.values.tolist(), abs=1e-10)


@pytest.mark.parametrize("name", sorted(set(registry.names()) - OTHERS))
def test_numbers_are_those_of_the_forward_that_wrote_the_token(name: str) -> None:
    """Tokens that were taken back and written again included, and those of an exit."""
    for out in run(spec(name), trace=True, early_stop=False):
        assert len(out.logprobs) == len(out.tokens)
        assert out.cache == "none"
        replayed(out, out.canvas_length)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.9, "top_p": 0.8},
        {"cfg_scale": 0.7},
        {"max_nfe": 2},
        {"infill": True, "max_new_tokens": None},
    ],
    ids=str,
)
def test_draws_guidance_closing_forwards_and_holes(more: dict[str, Any]) -> None:
    prompts = HOLES[:2] if "infill" in more else PROMPTS
    for out in run("threshold:tau=0.6", prompts, trace=True, eos=[], **more):
        assert out.tokens
        if "max_nfe" in more:
            assert out.finish_reason == "cap"
        replayed(out, out.canvas_length, more.get("cfg_scale", 0.0))


@pytest.mark.parametrize("name", ["confidence", "wino", "lopa", "daedal", "eotp", "prophet"])
def test_a_row_says_the_same_alone(name: str) -> None:
    outs = run(spec(name))
    for i, prompt in enumerate(PROMPTS):
        same([outs[i]], [dllm.generate(model(), prompt, sampler=spec(name), seed=i, **CALL)])


@pytest.mark.parametrize("form", ["memo", "chain"])
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("name", ["confidence", "threshold", "wino", "prophet", "klass"])
def test_a_lookahead_says_the_same_with_no_more_forwards(name: str, cache: str, form: str) -> None:
    plain = run(spec(name), cache=cache)
    ahead = run(spec(name), cache=cache, lookahead={"rows": 4, "form": form})
    same(plain, ahead)
    assert all(a.nfe <= p.nfe for a, p in zip(ahead, plain, strict=True))
    without = run(spec(name), cache=cache, logprobs=None)
    assert [o.nfe for o in without] == [o.nfe for o in plain]
    assert without[0].logprobs is None


@pytest.mark.parametrize("ahead", [None, {"rows": 3, "form": "chain"}], ids=["plain", "chain"])
@pytest.mark.parametrize("sampler", ["confidence", "prophet:region=all", "wino"])
def test_captured_ticks_say_the_same(sampler: str, ahead: Any) -> None:
    small, prompts = tiny(), [[5, 6], [1, 2, 3, 30, 31], [7, 8, 9]]
    call = dict(max_new_tokens=12, block_length=4, early_stop=False, batch_size=2, sampler=sampler, logprobs=2)
    plain = dllm.generate(small, prompts, **call)
    with standing_in():
        captured = dllm.generate(small, prompts, graphs=True, lookahead=ahead, **call)
    same(plain, captured)
    if (sampler, ahead) != ("wino", {"rows": 3, "form": "chain"}):  # which no round can capture
        assert captured[0].stats["graphs"]["replays"] > 0


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(set(registry.names()) - {"fast_dllm_v2"}))
def test_sweep(name: str, seed: int) -> None:
    """Drawn calls: tokens and forwards are those without numbers; a lookahead, a stream and a row alone say what the
    batch says; and where every forward is a full one, the numbers are those of forwards run again."""
    draws = random.Random(f"{name} {seed}")
    cache = draws.choice(EVERY_CACHE)
    more: dict[str, Any] = {
        "cache": cache, "block_length": draws.choice([3, 4, 8]), "logprobs": draws.choice([0, 3]), "seed": seed,
        "temperature": draws.choice([0.0, 0.9]), "cfg_scale": draws.choice([0.0, 0.0, 0.7]), "trace": True,
    }  # fmt: skip
    try:
        outs = run(spec(name), **more)
    except DllmError as reason:
        if not re.search("cannot use cache|both decide the inputs", str(reason)):
            raise
        pytest.skip(str(reason))
    without = run(spec(name), **{**more, "logprobs": None})
    assert [(o.tokens, o.nfe) for o in outs] == [(o.tokens, o.nfe) for o in without]
    i = draws.randrange(len(PROMPTS))
    same([outs[i]], [dllm.generate(model(), PROMPTS[i], sampler=spec(name), **{**CALL, **more, "seed": seed + i})])
    events = [*dllm.stream(model(), PROMPTS[i], sampler=spec(name), **{**CALL, **more, "seed": seed + i})]
    assert [said for event in events for said in event.logprobs] == events[-1].output.logprobs
    try:
        ahead = run(
            spec(name), **more, lookahead={"rows": draws.choice([2, 4]), "form": draws.choice(["memo", "chain"])}
        )
    except DllmError as reason:
        assert "lookahead" in str(reason)
    else:
        same(outs, ahead)
    if name not in OTHERS and cache == "none" and more["logprobs"]:
        for out in outs:
            replayed(out, out.canvas_length, more["cfg_scale"])


def test_temperature_and_bans() -> None:
    """The law is that before temperature; a token that is banned takes no part in it."""
    table = probabilities([[0.5, 0.2, 0.2, 0.1]] * 2)
    hot = dllm.generate(Scripted(table), [0], max_new_tokens=2, temperature=3.0, seed=1, logprobs=4)
    for token, said in zip(hot.tokens, hot.logprobs, strict=True):
        assert said.logprob == pytest.approx(float(table[0, token]))
        assert [t for t, _ in said.top] == [0, 1, 2, 3]  # equals by their ids
    banned = dllm.generate(Scripted(table), [0], max_new_tokens=2, suppress_tokens=[0], logprobs=20)
    assert banned.tokens == [1, 1]
    assert [t for t, _ in banned.logprobs[0].top] == [1, 2, 3]  # nothing that could not stand there
    assert banned.logprobs[0].logprob == pytest.approx(math.log(0.4))


def test_a_constraint_chooses_tokens_and_changes_no_number() -> None:
    embedded = dllm.load("tiny", dtype="float64")
    call = dict(max_new_tokens=8, choices=["19", "maybe not"], logprobs=2)
    out = dllm.generate(embedded, "12+7=", sampler="confidence", trace=True, **call)
    canvas = [*out.trace.prompt, *[embedded.mask_id] * 8]
    for pairs, sure in zip(out.trace.commits, out.trace.confidence, strict=True):
        with torch.inference_mode():
            law = embedded.logits(embedded.forward(torch.tensor([canvas]), None))[0].log_softmax(-1)
        for (column, token), p in zip(pairs, sure, strict=True):
            at = column - len(out.trace.prompt)
            if at < len(out.tokens):
                assert out.logprobs[at].logprob == pytest.approx(float(law[column, token]), abs=1e-10)
                assert [t for t, _ in out.logprobs[at].top] == law[column].topk(2).indices.tolist()
            assert p == pytest.approx(float(law[column, token].exp()), abs=1e-6)
            canvas[column] = token
    ahead = dllm.generate(embedded, "12+7=", sampler="confidence", lookahead=4, **call)
    assert ahead.tokens == out.tokens and all(1e-12 > one.constrained >= one.logprob for one in out.logprobs)
    for one, other in zip(ahead.logprobs, out.logprobs, strict=True):
        assert one.constrained == pytest.approx(other.constrained, abs=1e-10)
    assert all(
        one.constrained is None for one in dllm.generate(embedded, "12+7=", max_new_tokens=4, logprobs=0).logprobs
    )
    asked, prompts = [{"choices": ["19"]}, None], ["12+7=", "Tom has 12 apples. He buys 7 more. How many are there?"]
    mixed = dllm.generate(embedded, prompts, constraint=asked, max_new_tokens=16, logprobs=0)
    assert [{one.constrained is None for one in o.logprobs} for o in mixed] == [{False}, {True}]
    with pytest.raises(DllmError, match="stopping_criteria= may cut a constrained answer short"):
        dllm.generate(embedded, "12+7=", **call, stopping_criteria=lambda ids, scores: False)


def test_tokens_end_with_the_answer() -> None:
    scripted = Scripted(peaks([(1, 0.6), (2, 0.9), (3, 0.5), (1, 0.8)], 5), eos=3)
    out = dllm.generate(scripted, [0], max_new_tokens=4, logprobs=0)
    assert out.tokens == [1, 2]
    assert [v.logprob for v in out.logprobs] == pytest.approx([math.log(0.6), math.log(0.9)])
    assert [v.top for v in out.logprobs] == [(), ()]
    assert dllm.generate(scripted, [0], max_new_tokens=0, logprobs=2).logprobs == []


def test_what_a_length_edit_brings_in_is_not_known() -> None:
    canvas = Canvas(torch.tensor([[1, 2, 9, 9]]), torch.tensor([[False, False, True, True]]),
                    torch.tensor([[True, False, False, False]]), torch.tensor([1]), torch.tensor([4]), 9)  # fmt: skip
    leaf = Noting(1, torch.float64).columns(canvas)
    leaf = leaf._replace(known=torch.tensor([[False, True, False, False]]), value=leaf.value - 0.5)
    edit = Decision(torch.zeros(1, 4, dtype=torch.bool), canvas.ids, torch.tensor([False]), edits=((0, 1, 0, (3,)),))
    after = splice_columns(Leaves().plus(leaf), edit)[Logprobs]
    assert after.said([1, 2]) == [None, TokenLogprob(-0.5, ((0, 0.0),))]


@pytest.mark.parametrize(("stop", "drafts"), [(None, False), (["apples"], False), (None, True)])
def test_the_pieces_of_a_stream_join_to_those_of_the_output(stop: Any, drafts: bool) -> None:
    prompt = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
    call = dict(max_new_tokens=32, block_length=4, logprobs=2, stop=stop)
    pieces, told, tokens = [], [], []
    for event in dllm.stream("tiny", prompt, drafts=drafts, **call):
        assert event.logprobs is not None  # of a draft that brings no text, either
        told += event.logprobs
        tokens += event.tokens
        pieces.append(event.text)
        output = event.output
    assert output is not None
    assert len(pieces) > 2
    assert told == output.logprobs == dllm.generate("tiny", prompt, **call).logprobs
    assert tokens == output.tokens
    assert len(told) == len(tokens)


@pytest.mark.parametrize("size", [7, 512, 2048, 5000, 10 * 512 + 3])
def test_the_highest_of_a_vocabulary(size: int) -> None:
    draws = torch.Generator().manual_seed(size)
    rows = torch.randint(0, 4 * size, (6, size), generator=draws).double()
    for k in (1, 3, 7):
        ids = highest(rows, k)
        best = sorted(range(size), key=lambda i: (-float(rows[0, i]), i))[:k]
        assert rows.gather(1, ids).tolist() == rows.topk(k).values.tolist()
        assert ids[0].tolist() == best


@pytest.mark.parametrize("value", [-1, 21, True, 2.0, "3"])
def test_how_many_alternatives_there_may_be(value: Any) -> None:
    with pytest.raises(DllmError, match=r"^logprobs=.* must be an integer from 0 to 20: so many alternatives"):
        dllm.generate(tiny(), [1], logprobs=value)


def test_names_of_other_codes() -> None:
    with pytest.raises(DllmError, match="here it is logprobs"):
        dllm.generate(tiny(), [1], top_logprobs=3)
    with pytest.raises(DllmError, match="logprobs=k with k alternatives"):
        dllm.generate(tiny(), [1], output_scores=True)


@pytest.mark.parametrize("sampler", ["confidence", {"name": "daedal", "initial": 4, "factor": 3, "tail": 3}])
def test_free_answers_have_no_posterior_also_where_columns_came_in(sampler: Any) -> None:
    (out,) = dllm.generate(tiny(), [[4, 6, 1, 7]], sampler=sampler, max_new_tokens=12, eos=[30], logprobs=0)
    assert out.logprobs and [x.constrained for x in out.logprobs if x is not None] == [None] * len(out.logprobs)
