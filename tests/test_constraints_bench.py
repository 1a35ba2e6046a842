"""`dllm bench constraints`: validity by readers that know no automaton, accuracy beside it on the same problems."""

from __future__ import annotations

import json

import jsonschema
import pytest

import dllm
from dllm.bench import constraints
from dllm.bench.constraints import FORMS, QUESTIONS
from dllm.errors import DllmError
from dllm.tasks import registry as tasks

NEAR = {  # texts that just miss a form
    "sentence": "Tom has 12 + 7 = 19 apples.\n", "number": "12.", "date": "2026-13-01", "time": "24:00",
    "words": "yes and so", "list": "[a,b]", "colour": "#12345g", "address": "a@bc.com", "accents": "é",
    "quoted": '"a', "record": '{"n": 1, "s": "sevenly"}', "items": "[1, 2]", "nested": '{"a": {"b": 1}}',
}  # fmt: skip


def test_forms_are_ten_patterns_and_three_schemas_whose_readers_refuse_what_just_misses() -> None:
    kinds = [form.constraint.json_schema is None for form in FORMS.values()]
    assert (kinds.count(True), kinds.count(False)) == (10, 3)
    for name, form in FORMS.items():
        assert not form.holds(NEAR[name]) and not form.holds("")
        if form.constraint.json_schema is not None:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(json.loads(NEAR[name]), form.constraint.json_schema)


def test_reference_answers_have_the_form_and_are_right() -> None:
    for title in ("word problems, a pattern", "sudoku, a pattern"):
        question = QUESTIONS[title]
        for e in tasks.generate(question.task, "test", 200):
            assert question.form.holds(e.answer) and question.grade(e, e.answer)
    question = QUESTIONS["word problems, a record of lines and result"]
    (e,) = tasks.generate("word_problems", "test", 1)
    lines, result = e.answer.split("\n")[:-1], e.meta["answer"]
    assert question.grade(e, json.dumps({"work": lines, "result": result}))
    assert not question.grade(e, json.dumps({"work": lines, "result": result + 1}))
    assert not question.grade(e, json.dumps({"work": [], "result": result}))
    assert not question.grade(e, json.dumps({"result": result}))


def test_validity_counts_what_other_readers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "cache_names", lambda: ["none", "block"])
    monkeypatch.setattr(constraints, "FORMS", {name: FORMS[name] for name in ("number", "words", "items")})
    fine, refused = constraints.run(["validity"], samplers=["threshold", "editing"])
    assert (fine.value, fine.met) == (100, True) and "12 answers, caches none;" in fine.note
    assert refused.value is None and "writes over committed tokens" in refused.note
    monkeypatch.setitem(constraints.FORMS, "number", constraints.Form(FORMS["number"].constraint, lambda text: False))
    (broken,) = constraints.run(["validity"], samplers=["threshold"])
    assert broken.value == pytest.approx(100 * 8 / 12) and broken.met is False


def test_accuracy_stands_beside_validity_and_the_free_answers() -> None:
    model = dllm.load("tiny")
    found = {f.name: f for f in constraints.run(["accuracy"], n=6, model=model, samplers=["threshold"])}
    assert len(found) == len(QUESTIONS)
    pattern = found["right in %, word problems, a pattern, threshold"]
    examples = tasks.generate("word_problems", "test", 6)
    chats = [[{"role": "user", "content": e.prompt}] for e in examples]
    free = dllm.generate(model, chats, sampler="threshold", max_new_tokens=48)
    right = sum(tasks.grade("word_problems", e, o.text) for e, o in zip(examples, free, strict=True)) / 6
    assert f"right free {100 * right:.1f} %" in pattern.note and "n = 6" in pattern.note
    assert pattern.value == pytest.approx(100 * right)  # the free answers have the form already
    alone = found["right in %, word problems, a record of the result, threshold"]
    assert "valid 100.0 % (free 0.0 %)" in alone.note


def test_parts_that_there_are_not() -> None:
    with pytest.raises(DllmError, match="unknown part 'validty' of the bench constraints; did you mean 'validity'"):
        list(constraints.run(["validty"]))
