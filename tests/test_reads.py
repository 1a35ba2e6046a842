"""Reads: labels at open slots against full forwards and full enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scripted import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dllm
from dllm.bench import reads as bench
from dllm.call.reads import chained
from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.native import NativeModel

PROBLEM = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
TEMPLATE = "Tom has {a} + 7 = {b} apples."
SLOTS = {"a": ["12", "13"], "b": ["19", "20", "23"]}


@pytest.fixture(scope="module")
def embedded() -> Any:
    return dllm.load("tiny", dtype="float64")


@pytest.fixture(scope="module")
def small() -> Any:
    """A random model over the signs 0-9 a-z, one token each, and the piece "yz"."""
    signs = [*"0123456789abcdefghijklmnopqrstuvwxyz", ":", "yz"]
    inner = Tokenizer(models.BPE({s: i for i, s in enumerate(signs)}, [("y", "z")]))
    inner.decoder = decoders.Fuse()
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made = tiny()
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    return made


def law(model: Any, ids: list[int]) -> torch.Tensor:
    """(L, V) log-softmax of a full forward."""
    with torch.inference_mode():
        return model.logits(model.forward(torch.tensor([ids]), None)[:, model.source(torch.arange(len(ids)))])[
            0
        ].log_softmax(-1)


def test_a_label_of_one_token_is_the_log_softmax_at_its_slot(embedded: Any) -> None:
    r = dllm.read(embedded, PROBLEM, TEMPLATE, slots=SLOTS)
    log_p = law(embedded, r.canvas)
    assert (r.nfe, r.sees_suffix) == (1, True)
    for name, labels in SLOTS.items():
        said = r[name]
        (column,) = said.columns
        assert r.canvas[column] == embedded.mask_id
        for label in labels:
            (token,) = said.tokens[label]
            assert embedded.tokenizer.decode([token]).strip() == label
            assert said.logp[label] == pytest.approx(float(log_p[column, token]), abs=1e-12)
        assert sum(said.p.values()) == pytest.approx(1)
        assert said.mass == pytest.approx(sum(map(math.exp, said.logp.values())))
        assert said.exact == "slot"
    assert (r["a"].best, r["b"].best) == ("12", "19")
    values = sorted(r["b"].p.values())
    assert r["b"].margin == pytest.approx(values[-1] - values[-2])
    text = embedded.tokenizer.decode([t for t in r.canvas if t != embedded.mask_id])
    assert "apples" in text


def test_a_chain_is_a_normalised_law_over_all_labels(small: Any) -> None:
    """All 36**2 pairs of signs, and one by one against forwards of their own."""
    labels = [a + b for a, b in itertools.product("abcd0123", repeat=2)]
    r = dllm.read(small, "abc", "q:{x}:9", slots={"x": labels})
    at, second = r["x"].columns
    assert (r.nfe, r["x"].exact, at) == (2, "chain", 5)
    for label in labels[:6] + labels[-3:]:
        first, last = (small.tokenizer.get_vocab()[s] for s in label)
        written = [*r.canvas[:at], first, *r.canvas[at + 1 :]]
        expected = law(small, r.canvas)[at, first] + law(small, written)[second, last]
        assert r["x"].logp[label] == pytest.approx(float(expected), abs=1e-12)
    product = dllm.read(small, "abc", "q:{x}:9", slots={"x": labels}, labels="product")
    assert (product.nfe, product["x"].exact) == (1, "product")
    marginal = law(small, r.canvas)
    first, last = (small.tokenizer.get_vocab()[s] for s in labels[3])
    assert product["x"].logp[labels[3]] == pytest.approx(float(marginal[at, first] + marginal[second, last]), abs=1e-12)
    # over the whole vocabulary both laws sum to one
    every = [a + b for a, b in itertools.product("0123456789abcdefghijklmnopqrstuvwxyz:", repeat=2) if a + b != "yz"]
    whole = dllm.read(small, "abc", "q:{x}:9", slots={"x": every}, batch_size=64)
    rest = law(small, r.canvas)[at].exp()
    assert whole["x"].mass < 1
    missing = float(rest[37:].sum())  # beginnings that no label has
    assert 1 - whole["x"].mass >= missing - 1e-12


@pytest.mark.parametrize("more", [{}, {"cfg_scale": 0.8}, {"null": "N/A"}, {"stages": [["b"], ["a"]]}], ids=str)
def test_a_batch_says_what_each_prompt_says_alone(embedded: Any, more: Any) -> None:
    prompts = [PROBLEM, "What is 2+3?", "Ann has 5 pens. She buys 14 more. How many pens does Ann have in all?"]
    together = dllm.read(embedded, prompts, TEMPLATE, slots=SLOTS, batch_size=2, **more)
    for prompt, r in zip(prompts, together, strict=True):
        alone = dllm.read(embedded, prompt, TEMPLATE, slots=SLOTS, **more)
        assert alone.canvas == r.canvas
        for name in SLOTS:
            assert list(alone[name].logp.values()) == pytest.approx(list(r[name].logp.values()), abs=1e-10)
            assert list(alone[name].p.values()) == pytest.approx(list(r[name].p.values()), abs=1e-10)


def test_a_stage_reads_what_the_stage_before_wrote(embedded: Any) -> None:
    slots = {"a": ["12", "13"], "b": ["19", "20", "23"]}
    r = dllm.read(embedded, PROBLEM, TEMPLATE, slots=slots, stages=[["a"], ["b"]])
    (a,), (b,) = r["a"].columns, r["b"].columns
    assert r.nfe == 2
    assert r.canvas[a] == r["a"].tokens["12"][0]
    assert r["b"].logp["19"] == pytest.approx(float(law(embedded, r.canvas)[b, r["b"].tokens["19"][0]]), abs=1e-12)


def test_guidance_and_a_null_prompt(embedded: Any) -> None:
    r = dllm.read(embedded, PROBLEM, TEMPLATE, slots=SLOTS, cfg_scale=0.5)
    (b,), token = r["b"].columns, r["b"].tokens["19"][0]
    given = len(r.canvas) - len(dllm.read(embedded, "", TEMPLATE, slots=SLOTS, chat=False).canvas)
    blank = [embedded.mask_id] * given + r.canvas[given:]
    with torch.inference_mode():
        c, u = (embedded.logits(embedded.forward(torch.tensor([ids]), None))[0, b] for ids in (r.canvas, blank))
    guided = u + 1.5 * (c - u)
    guided[embedded.mask_id] = -torch.inf
    assert r["b"].logp["19"] == pytest.approx(float(guided.log_softmax(-1)[token]), abs=1e-10)
    plain, null = (dllm.read(embedded, p, TEMPLATE, slots=SLOTS)["b"].logp for p in (PROBLEM, "N/A"))
    calibrated = dllm.read(embedded, PROBLEM, TEMPLATE, slots=SLOTS, null="N/A")["b"]
    scores = torch.tensor([plain[l] - null[l] for l in SLOTS["b"]], dtype=torch.float64).softmax(0).tolist()
    assert list(calibrated.p.values()) == pytest.approx(scores, abs=1e-10)
    assert calibrated.logp == pytest.approx(plain)


def test_a_continuation_is_scored_by_its_chain(embedded: Any) -> None:
    head, tail = embedded.tokenizer("Tom has")["input_ids"], embedded.tokenizer(" 19 apples.")["input_ids"]
    total = 0.0
    for j, token in enumerate(tail):
        ids = [*head, *tail[:j], *[embedded.mask_id] * (len(tail) - j)]
        total += float(law(embedded, ids)[len(head) + j, token])
    assert chained(embedded, head, tail) == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize(
    ("template", "slots", "more", "message"),
    [
        ("q {x}", {}, {}, "has a slot 'x' without labels"),
        ("q {mod}", {"mood": ["a"]}, {}, "slot 'mod' without labels; did you mean 'mood'"),
        ("q {x}", {"x": ["a"], "y": ["b"]}, {}, r"has no slot \{y\}"),
        ("q {x} {x}", {"x": ["a"]}, {}, "has a slot twice"),
        ("q", {}, {}, "has at least one slot"),
        ("q {x", {"x": ["a"]}, {}, "a brace of the text is written twice"),
        ("q {x}", {"x": []}, {}, "slot 'x' needs a list of labels, none of them empty"),
        ("q {x}", {"x": "ab"}, {}, "slot 'x' needs a list of labels"),
        ("q {x}", {"x": ["a", ""]}, {}, "none of them empty"),
        ("q {x}", {"x": ["a", "a"]}, {}, "slot 'x' has a label twice"),
        ("q {x}", {"x": ["a", "ab"]}, {}, "label 'a' begins label 'ab'"),
        (
            "q {x}",
            {"x": ["a", "bc"]},
            {},
            r"have no common canvas \('a' 1, 'bc' 2\)",
        ),
        ("q{x}z", {"x": ["a", "y"]}, {}, "its labels change how the text around them is written"),
        ("q {x}{y}", {"x": ["y"], "y": ["z"]}, {}, "slots 'x' and 'y' share a token: put text between them"),
        ("q {x}", {"x": ["a"]}, {"lengths": "any"}, "lengths='any' must be one of refuse, condition"),
        ("q {x}", {"x": ["a"]}, {"temperature": 0}, "temperature=0 must be a number above 0"),
        ("q {x}", {"x": ["a"]}, {"labels": "sum"}, "labels='sum' must be one of auto, chain, product"),
        ("q {x}", {"x": ["a"]}, {"stages": [["y"]]}, "must name each of the slots once: x"),
        ("q {x}", {"x": ["a"]}, {"stages": [["x"], []]}, "must be lists of slots"),
        ("q {x}", {"x": ["a"]}, {"stages": "x"}, "must be lists of slots"),
        ("q {x}", {"x": ["a"]}, {"cfg_scale": -1}, "cfg_scale=-1 must be"),
        ("q {x}", {"x": ["a"]}, {"null": ["?", "!"]}, "null= is one prompt without content"),
        ("q {x}", {"x": {"a", "b"}}, {}, "slot 'x' needs a list of labels"),
        ("q {x}", ["x"], {}, "must be a mapping from the names of slots"),
        ("q {x:>3}", {"x": ["a"]}, {}, r"slot 'x' has a format, and a label stands as it is: \{x\}"),
        (3, {"x": ["a"]}, {}, "template=3 must be a text with slots"),
    ],
)
def test_mistakes_get_one_clear_line(small: Any, template: str, slots: Any, more: Any, message: str) -> None:
    with pytest.raises(DllmError, match=message) as error:
        dllm.read(small, "abc", template, slots=slots, **more)
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_read() -> None:
    with pytest.raises(DllmError, match="a template is text, and this model has no tokenizer"):
        dllm.read(tiny(), [1], "q {x}", slots={"x": ["a"]})


def test_block_causal_models_may_not_see_the_suffix(small: Any) -> None:
    causal = tiny(block_size=4)
    causal.tokenizer = small.tokenizer
    assert not dllm.read(causal, "abc", "{x}bcdefgh", slots={"x": ["a", "b"]}).sees_suffix
    assert dllm.read(causal, "abcd", "{x}bc", slots={"x": ["a", "b"]}).sees_suffix


# -- against full enumeration -----------------------------------------------------------------------------------------

SIGNS = "abcd:"  # ids 0 to 4, and 5 is the mask: every text is a label


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def whole(request: Any) -> Any:
    """A random model whose vocabulary the signs are, and how near its reads are to sums in float64."""
    inner = Tokenizer(models.BPE({s: i for i, s in enumerate(SIGNS)}, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(5)
    made = NativeModel(ModelConfig("llada", "LLaDAModelLM", 6, 6, 32, 2, 4, 2, 8, 48, mask_id=5))
    for parameter in made.transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    return made.to(dtype=request.param), 1e-12 if request.param == torch.float64 else 1e-5


def summed(model: Any, canvas: list[int], writes: list[tuple[int, int]], joint: bool = False) -> float:
    """log p of tokens at columns, one after the other and each by a forward of its own; joint: all by the first."""
    canvas, total, first = [*canvas], 0.0, law(model, canvas)
    for column, token in writes:
        total += float((first if joint else law(model, canvas))[column, token])
        canvas[column] = token
    return total


@pytest.mark.parametrize("how", ["chain", "product"])
def test_labels_of_a_whole_vocabulary_are_a_law(whole: Any, how: str) -> None:
    """All 125 texts of three signs: each is what forwards of its own say, and together they have all of the mass."""
    model, near = whole
    texts = ["".join(x) for x in itertools.product(SIGNS, repeat=3)]
    r = dllm.read(model, "ab", "c{x}d", slots={"x": texts}, labels=how, batch_size=64)
    assert (r.nfe, r["x"].exact, r["x"].columns) == (3 if how == "chain" else 1, how, (3, 4, 5))
    assert r.canvas == [0, 1, 2, 5, 5, 5, 3]
    for text in texts:
        writes = [(3 + j, SIGNS.index(sign)) for j, sign in enumerate(text)]
        assert r["x"].logp[text] == pytest.approx(summed(model, r.canvas, writes, how == "product"), abs=near)
    assert r["x"].mass == pytest.approx(1, abs=10 * near)
    assert list(r["x"].p.values()) == pytest.approx([math.exp(v) for v in r["x"].logp.values()], abs=10 * near)


def test_stages_of_a_whole_vocabulary(whole: Any) -> None:
    """The second stage is a law given what the first one wrote, the first one given that both are open."""
    model, near = whole
    pairs = ["".join(x) for x in itertools.product(SIGNS, repeat=2)]
    r = dllm.read(model, "ab", "{x}:{y}", slots={"x": pairs, "y": [*SIGNS]}, stages=[["y"], ["x"]], batch_size=64)
    opened = [0, 1, 5, 5, 4, 5]
    y = {sign: summed(model, opened, [(5, i)]) for i, sign in enumerate(SIGNS)}
    assert r["y"].logp == pytest.approx(y, abs=near) and r["y"].best == max(y, key=lambda sign: y[sign])
    opened[5] = SIGNS.index(r["y"].best)
    x = {t: summed(model, opened, [(2, SIGNS.index(t[0])), (3, SIGNS.index(t[1]))]) for t in pairs}
    assert r["x"].logp == pytest.approx(x, abs=near) and r.canvas == opened and r.nfe == 3
    assert (r["x"].mass, r["y"].mass) == pytest.approx((1, 1), abs=10 * near)


def test_labels_of_different_lengths_are_read_given_their_length(whole: Any) -> None:
    """Each number of columns has a canvas and a law of its own, all in the same forwards."""
    model, near = whole
    every = [*SIGNS, *("".join(x) for x in itertools.product(SIGNS, repeat=2))]
    call = {"slots": {"x": every, "y": ["a", "b"]}, "lengths": "condition", "null": "d", "batch_size": 64}
    r = dllm.read(model, "ab", "{x}:{y}", **call)
    assert list(r.slots) == ["y", "x:1", "x:2"] and r.nfe == 2
    for size in (1, 2):
        said, labels = r[f"x:{size}"], [t for t in every if len(t) == size]
        alone = dllm.read(model, "ab", "{x}:{y}", slots={"x": labels, "y": ["a", "b"]}, null="d", batch_size=64)
        assert said.columns == alone["x"].columns == tuple(range(2, 2 + size))
        assert said.logp == pytest.approx(alone["x"].logp, abs=near) and said.p == pytest.approx(alone["x"].p, abs=near)
        assert said.mass == pytest.approx(1, abs=10 * near) and said.exact == ("slot" if size == 1 else "chain")
    assert r["y"].logp == pytest.approx(
        dllm.read(model, "ab", "{x}:{y}", slots={"x": [*SIGNS], "y": ["a", "b"]})["y"].logp, abs=near
    )
    with pytest.raises(DllmError, match="slot 'x' have different numbers of columns and are read apart: x:1, x:2"):
        r["x"]
    with pytest.raises(DllmError, match="slot 'x' has labels of different numbers of tokens, so there is no best one"):
        dllm.read(model, "ab", "{x}:{y}", stages=[["x"], ["y"]], **call)


def test_a_temperature_sharpens_or_flattens_p_alone(whole: Any) -> None:
    model, near = whole
    plain, flat = (dllm.read(model, "ab", ":{x}", slots={"x": [*SIGNS]}, temperature=t)["x"] for t in (1.0, 2.0))
    assert flat.logp == plain.logp and flat.mass == plain.mass and flat.best == plain.best
    want = (torch.tensor([*plain.logp.values()], dtype=torch.float64) / 2).softmax(0).tolist()
    assert list(flat.p.values()) == pytest.approx(want, abs=10 * near)


def test_a_bench_divides_prompts_by_seconds() -> None:
    ticks = itertools.count(step=0.5)
    one, eight = bench.run(3, n=16, timer=lambda: next(ticks))
    assert (one.value, eight.value) == (32, 32) and eight.met  # each pass takes 0.5 s on this clock
