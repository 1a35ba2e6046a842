"""Constrained calls: members come out of every sampler, rows do not know each other, and what cannot be is refused."""

from __future__ import annotations

import json
import re
import string
import threading
from typing import Any

import jsonschema
import pytest
import torch
from replay import standing_in
from scripted import tiny
from sweeps import dealt
from test_samplers_questions import ASK, BIDIRECTIONAL, GIVEN, built

import dllm
from dllm.bench.constraints import FORMS, TEMPERATURES, answers
from dllm.decoding.cache.registry import names as cache_names
from dllm.decoding.canvas import Canvas
from dllm.decoding.constraints import compiling, vocabulary
from dllm.decoding.constraints.automaton import Vocabulary
from dllm.decoding.constraints.bound import Bound, Rule
from dllm.decoding.constraints.lift import lifted
from dllm.decoding.constraints.pattern import of_pattern
from dllm.decoding.prediction import Law
from dllm.decoding.runner import Options
from dllm.errors import DllmError
from dllm.samplers import registry
from dllm.samplers.questions import questions

PROMPT = "Tom has 12 apples. He buys 7 more. How many apples does he have?"
SENTENCE = r"[A-Z][a-z]+ has [0-9]+ [+-] [0-9]+ = [0-9]+ [a-z]+\.\n#### [0-9]+"
RECORD = r'\{"answer": -?[0-9]{1,4}, "unit": "[a-z]{1,12}"\}'
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "s": {"type": "string", "maxLength": 6},
        "l": {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 2},
    },
    "required": ["n", "l"],
}
CHOICES = ["yes", "no", "maybe not", "yesterday"]
BIDIRECTIONAL_CACHES = [n for n in cache_names() if not n.startswith("block")]
SAMPLERS = [n for n in registry.names() if n not in ("editing", "fast_dllm_v2")]


@pytest.fixture(scope="module")
def model() -> Any:
    return dllm.load("tiny", dtype="float64")


def valid(kind: str, text: str) -> bool:
    if kind == "regex":
        return bool(re.fullmatch("(cat|dog)s?: [0-9]{1,3}(\\.[0-9])?", text))
    if kind == "choices":
        return text in CHOICES
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


KINDS: dict[str, dict[str, Any]] = {
    "regex": {"regex": "(cat|dog)s?: [0-9]{1,3}(\\.[0-9])?"},
    "choices": {"choices": CHOICES},
    "schema": {"json_schema": SCHEMA},
}


def members(model: Any, sampler: str, kind: str, **more: Any) -> None:
    call = {"max_new_tokens": 24, "block_length": 12, "sampler": sampler, **KINDS[kind], **more}
    outputs = dllm.generate(model, [PROMPT, "Hi"], **call)
    for output in outputs:
        assert valid(kind, output.text), output.text
        assert output.stats["constraint"]["member"]  # type: ignore[index]


@pytest.mark.parametrize(("sampler", "turn"), [(s, i) for i, s in enumerate(SAMPLERS)])
def test_every_sampler_writes_members(model: Any, sampler: str, turn: int) -> None:
    kind = list(KINDS)[turn % 3]
    members(model, sampler, kind, temperature=float(turn % 2))


@pytest.mark.sweep
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("cache", BIDIRECTIONAL_CACHES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sweep(model: Any, sampler: str, cache: str, temperature: float) -> None:
    """Ten patterns and three schemas, read by other readers than the automaton."""
    for name, output in unless_refused(answers, model, sampler, cache, temperature):
        form = FORMS[name]
        assert form.holds(output.text), (name, output.text)
        assert output.stats["constraint"]["member"]
        if form.constraint.json_schema is not None:
            jsonschema.validate(json.loads(output.text), form.constraint.json_schema)


@pytest.mark.sweep
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("cache", ["none", "block", "block_dual"])
@pytest.mark.parametrize("sampler", [*SAMPLERS, "fast_dllm_v2"])
def test_sweep_of_block_causal_models(sampler: str, cache: str, temperature: float) -> None:
    patterns = ["(ab|ba)(cd)*", "[a-f]{3,9}", "x?y{2,5}z", "(abc|ab)*q"]
    given = {"fast_dllm_v2": {"sub": 4}, **GIVEN}.get(sampler, {})
    call = dict(max_new_tokens=10, eos=[30], sampler={"name": sampler, **given}, cache=cache, temperature=temperature)
    asked = [dllm.Constraint(regex=p) for p in patterns]
    causal = letters(tiny(block_size=4, shift=int(sampler == "fast_dllm_v2")))
    prompts = [[1, 2, 3], [4], [5, 6], [7]]
    outputs = unless_refused(dllm.generate, causal, prompts, constraint=asked, **call)
    for pattern, output in zip(patterns, outputs, strict=True):
        assert re.fullmatch(pattern, spelt(output.tokens)), output.tokens


def unless_refused(work: Any, *args: Any, **more: Any) -> Any:
    """What it returns; skipped where a sampler does not go with a cache or a model."""
    try:
        return work(*args, **more)
    except DllmError as reason:
        if not re.search("cannot use cache|needs a bidirectional|block-causal model sees nothing", str(reason)):
            raise
        pytest.skip(str(reason))


def test_a_constraint_that_the_free_answer_meets_changes_nothing(model: Any) -> None:
    for sampler in ("confidence", "threshold:tau=0.9"):
        free, bound = (
            dllm.generate(model, PROMPT, max_new_tokens=48, block_length=48, sampler=sampler, **more)
            for more in ({}, {"regex": SENTENCE})
        )
        assert (free.text, free.tokens, free.nfe) == (bound.text, bound.tokens, bound.nfe)


def test_forced_columns_commit_at_once(model: Any) -> None:
    outputs = [
        dllm.generate(model, PROMPT, max_new_tokens=48, block_length=48, sampler=sampler, regex=RECORD)
        for sampler in ("confidence", "threshold:tau=0.9")
    ]
    assert [(o.text, o.nfe) for o in outputs] == [('{"answer": 20, "unit": "return"}', n) for n in (48, 3)]


@pytest.mark.parametrize(
    ("sampler", "cache", "temperature"), dealt(["threshold", "localleap"], [None, "prefix", "dual"], [0.0, 0.8])
)
def test_alone_in_a_batch_and_ahead(model: Any, sampler: str, cache: str | None, temperature: float) -> None:
    """Rows with constraints of their own are what they are alone; looking ahead changes no token and saves forwards."""
    prompts, asked = [PROMPT, "Hi", PROMPT], [{"regex": RECORD}, {"choices": CHOICES}, {"json_schema": SCHEMA}]
    call = dict(max_new_tokens=32, block_length=16, sampler=sampler, cache=cache, temperature=temperature)
    batch = dllm.generate(model, prompts, constraint=asked, **call)
    ahead = dllm.generate(model, prompts, constraint=asked, lookahead=4, **call)
    for i, output in enumerate(batch):
        alone = dllm.generate(model, prompts[i], constraint=asked[i], seed=i, **call)
        assert (alone.tokens, alone.nfe) == (output.tokens, output.nfe)
        assert ahead[i].tokens == output.tokens and ahead[i].nfe <= output.nfe
    chain = dllm.generate(model, prompts, constraint=asked, lookahead="4:form=chain", **call)
    assert [o.tokens for o in chain] == [o.tokens for o in batch]


def test_fills_are_members(model: Any) -> None:
    """A closing forward, and an exit that fills what is left."""
    for more in ({"max_nfe": 2}, {"sampler": "prophet:high=0.1,mid=0.1,low=0.1"}, {"max_nfe": 3, "temperature": 1.0}):
        output = dllm.generate(model, PROMPT, max_new_tokens=40, regex=RECORD, **more)
        assert re.fullmatch(RECORD, output.text) and output.nfe <= 3


def test_guidance_sees_the_constraint_behind_it(model: Any) -> None:
    assert dllm.generate(model, PROMPT, max_new_tokens=8, choices=CHOICES, cfg_scale=1.0).text in CHOICES


def test_infilling_counts_columns(model: Any) -> None:
    """The text from the first hole on is the answer, what was given included, in exactly these columns."""
    mask, ids = model.mask_id, lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]
    head, tail = ids("Tom has "), ids(" apples.")
    prompt = [*head, mask, mask, *tail]
    output = dllm.generate(model, prompt, infill=True, regex=r"[0-9]+ apples\.")
    written = model.tokenizer.decode(output.sequences[len(head) :])
    assert re.fullmatch(r"[0-9]+ apples\.", written) and output.stats["constraint"]["member"]
    with pytest.raises(DllmError, match="give the holes other lengths"):
        dllm.generate(model, prompt, infill=True, regex=r"[0-9]+ pears\.")


@pytest.mark.parametrize("ahead", [None, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_member_in_each_hole(model: Any, temperature: float, ahead: int | None) -> None:
    """Rows with holes of their own, one that is bound as a whole, and one that is free."""
    mask, ids = model.mask_id, lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = [*ids("Tom has "), mask, mask, *ids(" apples and "), mask, mask, mask, *ids(" pears.")]
    second, each = [*ids("x"), mask, *ids("y"), mask, mask], dllm.Constraint(regex="[0-9]+|[a-z]{3}", where="holes")
    asked = [each, each, {"regex": "[0-9]y.*"}, None]
    call: dict[str, Any] = {"infill": True, "sampler": "threshold", "temperature": temperature, "lookahead": ahead}
    outputs = dllm.generate(model, [first, second, second, second], constraint=asked, **call)
    texts = [model.tokenizer.decode(o.sequences) for o in outputs]
    one = "([0-9]+|[a-z]{3})"
    assert re.fullmatch(rf"Tom has {one} apples and {one} pears\.", texts[0])
    assert re.fullmatch(f"x{one}y{one}", texts[1]) and re.fullmatch("x[0-9]y.*", texts[2])
    assert [o.stats.get("constraint", {}).get("member") for o in outputs] == [True, True, True, None]
    for i in (0, 1):
        alone = dllm.generate(model, [first, second][i], constraint=each, seed=i, **call)
        assert (alone.tokens, alone.nfe) == (outputs[i].tokens, outputs[i].nfe)


@pytest.mark.parametrize(
    ("regex", "says"),
    [
        ("[0-9]{9}", "hole 1 has 2 masks, which cannot hold a member; 9 can"),
        ("[0-9]{2}", "hole 2 has 3 masks, which cannot hold a member; 2 can"),
        ("q(0123)?", "hole 1 has 2 masks, which cannot hold a member; 1 or 5 can"),
        ("[0-9]{4,}", "hole 1 has 2 masks, which cannot hold a member; 4 or more can"),
    ],
)
def test_holes_that_hold_no_member(regex: str, says: str) -> None:
    small = letters(tiny())
    digits = [b""] * 26 + [str(i).encode() for i in range(10)] + [b""] * (small.vocab_size - 36)
    digits[16] = b"q"
    vocabulary._KNOWN[small] = Vocabulary.of(digits)
    mask = small.mask_id
    with pytest.raises(DllmError, match=says):
        dllm.generate(
            small, [1, mask, mask, 2, mask, mask, mask], infill=True, constraint={"regex": regex, "where": "holes"}
        )


def test_an_answer_may_grow(model: Any) -> None:
    """Length edits go on as long as a member is left."""
    call: dict[str, Any] = dict(
        max_new_tokens=48, block_length=16, sampler="daedal:initial=12,factor=4,tail=4,tau_low=0.5"
    )
    output = dllm.generate(model, PROMPT, regex="[A-Z][a-z ]{50,70}[.]", **call)
    assert re.fullmatch("[A-Z][a-z ]{50,70}[.]", output.text)
    with pytest.raises(DllmError, match=r"fits 12 tokens, with which sampler 'daedal' begins; the shortest needs 25"):
        dllm.generate(model, PROMPT, regex=RECORD, **call)


def test_an_early_cut_leaves_members(model: Any) -> None:
    output = dllm.generate(model, PROMPT, max_new_tokens=40, regex=RECORD, sampler="eotp:mode=eager+threshold:tau=0.3")
    assert re.fullmatch(RECORD, output.text)


def test_block_causal_models() -> None:
    model = letters(tiny(block_size=4))
    outputs = dllm.generate(model, [[1, 2, 3], [4]], max_new_tokens=10, regex="(ab|ba)(cd)*", eos=[30])
    for output in outputs:
        assert re.fullmatch("(ab|ba)(cd)*", spelt(output.tokens)), output.tokens


def letters(model: Any) -> Any:
    """A model without a tokenizer, whose ids 0 to 25 are the letters."""
    signs = [s.encode() for s in string.ascii_lowercase] + [b""] * (model.vocab_size - 26)
    vocabulary._KNOWN[model] = Vocabulary.of(signs)
    return model


def spelt(tokens: list[int]) -> str:
    return "".join(string.ascii_lowercase[t] for t in tokens)


@pytest.mark.parametrize("sampler", ["confidence", "margin", "entropy", "threshold:tau=0.5"])
def test_columns_that_decide_each_other_are_taken_in_one_order(sampler: str) -> None:
    """They are equally sure, and the last bits of a batch or of a lookahead do not order them."""
    model, asked = letters(tiny()), [{"regex": p} for p in ("(ab|cd|ef){2,4}", "a{4,8}|b{4,8}|f{6}", "(ace|bdf)*")]
    prompts = [[1, 2, 3], [4, 0], [5, 5, 1, 2, 0]]
    call: dict[str, Any] = dict(max_new_tokens=12, block_length=12, eos=[30], sampler=sampler, logprobs=0)
    batch = dllm.generate(model, prompts, constraint=asked, **call)
    alone = [dllm.generate(model, p, constraint=c, **call) for p, c in zip(prompts, asked, strict=True)]
    for others in (alone, dllm.generate(model, prompts, constraint=asked, lookahead=4, **call)):
        for a, b in zip(batch, others, strict=True):
            assert a.tokens == b.tokens and b.nfe <= a.nfe
            for one, other in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert one and other and one.logprob == pytest.approx(other.logprob, abs=1e-9)
    assert [o.nfe for o in batch] == [o.nfe for o in alone]


CAPTURED = ["threshold", "prophet:high=99,mid=99,low=9", "wino", "remdm", "credit"]


@pytest.mark.parametrize(("sampler", "temperature"), dealt(CAPTURED, [0.0, 0.9]))
def test_captured_ticks(sampler: str, temperature: float) -> None:
    model = letters(tiny())
    call: dict[str, Any] = dict(max_new_tokens=8, block_length=4, sampler=sampler, temperature=temperature, eos=[30])
    patterns = ["(ab|ba)c*", "x?y{2,5}z", None, "(ab|ba)c*"]
    asked = {"constraint": [p and {"regex": p} for p in patterns], "batch_size": 2}
    prompts = [[5, 6], [1, 2, 3], [4], [7]]
    plain = dllm.generate(model, prompts, **call, **asked)
    with standing_in():
        captured = dllm.generate(model, prompts, graphs=True, **call, **asked)
    for a, b, pattern in zip(plain, captured, patterns, strict=True):
        assert (a.sequences, a.nfe) == (b.sequences, b.nfe)
        assert pattern is None or re.fullmatch(pattern, spelt(a.tokens))
    assert captured[0].stats["graphs"]["replays"] > 0  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "law"), [("prophet", Law()), ("klass", Law(0.7)), ("remdm", Law(0.7, 0.9, filtered=True))]
)
def test_a_constrained_tick_asks_nothing(name: str, law: Law) -> None:
    signs = [s.encode() for s in string.ascii_lowercase] + [b""] * 34
    automata = tuple(lifted(of_pattern(p), Vocabulary.of(signs), [2]) for p in ("(ab|ba)c*", "[a-f]{2,30}"))
    rule, sampler = Rule(automata, 32, (2,), 1), built(name, BIDIRECTIONAL)
    assert rule.tables and name not in ASK  # made before the first tick, as in a call

    def rows(canvas: Canvas) -> Bound:
        zero = torch.zeros_like(canvas.start)
        return Bound(torch.arange(len(zero), device=zero.device), zero)

    sampler = sampler._replace(starts=(*sampler.starts, (rows, None)))
    assert questions(sampler, BIDIRECTIONAL, options=Options(law, rule=rule)) == []


@pytest.mark.parametrize("sampler", ["threshold", "credit", "prophet", "daedal:initial=12,factor=4,tail=4"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_without_a_constraint(model: Any, sampler: str, temperature: float) -> None:
    """They are what they are alone and in a call without any."""
    prompts, asked = ["Say it.", PROMPT, "12+7="], [{"choices": CHOICES}, None, None]
    call: dict[str, Any] = dict(max_new_tokens=16, block_length=8, sampler=sampler, temperature=temperature)
    for ahead in (None, 4):
        outputs = dllm.generate(model, prompts, constraint=asked, lookahead=ahead, **call)
        assert outputs[0].text in CHOICES and outputs[0].stats["constraint"]["member"]  # type: ignore[index]
        for i in (1, 2):
            free = dllm.generate(model, prompts[i], seed=i, lookahead=ahead, **call)
            assert (free.text, free.tokens, free.nfe) == (outputs[i].text, outputs[i].tokens, outputs[i].nfe)
            assert "constraint" not in outputs[i].stats


def test_processors_come_first_and_the_constraint_behind_them(model: Any) -> None:
    """What a processor forbids is kept out where a member is left, and taken where none is."""
    yes, no = (model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("yes", "no"))
    call: dict[str, Any] = dict(max_new_tokens=8, choices=["yes", "no"])

    def forbids(*tokens: int) -> Any:
        def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, torch.tensor(tokens), -torch.inf)

        processor.pure = True  # type: ignore[attr-defined]
        return processor

    for temperature in (0.0, 1.0):
        for kept, gone in (("yes", no), ("no", yes)):
            for ahead in (None, 4):
                more: dict[str, Any] = {"temperature": temperature, "lookahead": ahead}
                out = dllm.generate(model, PROMPT, logits_processor=forbids(gone), **call, **more)
                assert out.text == kept
        assert dllm.generate(model, PROMPT, logits_processor=forbids(yes, no), **call, **more).text in ("yes", "no")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_answer_without_columns_is_the_empty_member(model: Any) -> None:
    assert [o.text for o in dllm.generate(model, [PROMPT, PROMPT], regex="[0-9]*", max_new_tokens=0)] == ["", ""]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"regex": "[0-9]+", "max_new_tokens": 0}, "no member of the constraint fits 0 tokens; the shortest needs 1"),
        ({"regex": RECORD, "max_new_tokens": 8}, "no member of the constraint fits 8 tokens; the shortest needs 25"),
        ({"regex": "a("}, "cannot be read"),
        ({"choices": []}, "must be a list of strings"),
        ({"choices": ["a", "a"]}, "choices has 'a' twice"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices constrain the same answers"),
        ({"regex": "a", "stop": "x"}, "stop= may cut a constrained answer short"),
        ({"regex": "a", "early_stop": False}, "early_stop=False decodes what lies behind"),
        ({"regex": "a", "sampler": "editing"}, "writes over committed tokens"),
        ({"regex": "a", "min_new_tokens": 3, "max_new_tokens": 8}, "without an end token in the first 3"),
        ({"regex": "a", "logits_eos_inf": True, "max_new_tokens": 8}, "must fill them all"),
        ({"constraint": [{"regex": "a"}, {"regex": "b"}]}, "2 constraints for 1 prompts"),
        ({"constraint": []}, "constraint= is an empty list"),
        ({"constraint": {"regexp": "a"}}, "did you mean 'regex'"),
        ({"constraint": "a"}, "must be a dllm.Constraint"),
        ({"constraint": {"regex": "a", "where": "holes"}}, "where='holes' speaks of the holes of a prompt"),
        ({"constraint": {"regex": "a", "where": "hole"}}, "where='hole' must be 'holes', or left out"),
        ({"choices": {"a": 1}}, "must be a list of strings"),
        ({"json_schema": {"type": "integer", "minimum": 1}}, "minimum cannot be enforced"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
    ],
)
def test_refusals(model: Any, call: dict[str, Any], says: str) -> None:
    with pytest.raises(DllmError, match=re.escape(says)) as caught:
        dllm.generate(model, PROMPT, **call)
    assert "\n" not in str(caught.value)


def test_guarded_lookahead_is_refused_and_fast_is_not() -> None:
    single = dllm.load("tiny")
    with pytest.raises(DllmError, match="lookahead mode 'guarded'"):
        dllm.generate(single, PROMPT, choices=CHOICES, lookahead=4)
    assert dllm.generate(single, PROMPT, choices=CHOICES, max_new_tokens=8, lookahead="4:mode=fast").text in CHOICES


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(DllmError, match="without a tokenizer"):
        dllm.generate(tiny(), [1, 2], max_new_tokens=4, regex="a")


def test_a_pattern_that_explodes_is_killed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SECONDS", 2)
    with pytest.raises(DllmError, match="was not compiled within 2 s"):
        dllm.generate(model, PROMPT, regex="[ab]*a[ab]{16}")


def test_a_pattern_makes_one_automaton_in_every_process(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = vocabulary.vocabulary(model)
    asked = {
        "kind": "regex",
        "what": "(a|bc|d[ef]){2,4}x?",
        "max_depth": None,
        "ends": [],
        "pads": [],
        "banned": [],
        "seconds": 9,
    }
    made = set[bytes]()
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        made.add(compiling._made(json.dumps(asked), words).digest)
    assert len(made) == 1


def test_one_process_for_calls_that_ask_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, wait = list[str](), threading.Event()
    real = compiling._made

    def counted(text: str, words: Vocabulary) -> Any:
        made.append(text)
        wait.wait(10)
        return real(text, words)

    monkeypatch.setattr(compiling, "_made", counted)
    found, asked = list[Any](), {"kind": "regex", "what": "[0-9]{3}q", "max_depth": None}
    words = vocabulary.vocabulary(model)
    threads = [
        threading.Thread(target=lambda: found.append(compiling.compiled(asked, words, [2], [0], [1]))) for _ in range(4)
    ]
    for t in threads:
        t.start()
    wait.set()
    for t in threads:
        t.join()
    assert len(made) == 1 and len(found) == 4 and all(a is found[0] for a in found)
