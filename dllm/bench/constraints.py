"""`dllm bench constraints`: whether answers have the form that was asked for, and whether they are right.

Validity: every sampler with every cache at two temperatures writes answers of ten patterns and three schemas, and each
is read by something other than the automaton that shaped it. Accuracy: tasks of the embedded model with a form for
their answers, each problem decoded with it and without. The two stand side by side because neither says anything of the
other: legal is not right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import dllm
from dllm.bench.answers import CHUNK
from dllm.bench.runtime import Figure
from dllm.call.job import prepare
from dllm.call.output import Output
from dllm.decoding.cache.registry import names as cache_names
from dllm.decoding.constraints.constraint import Constraint
from dllm.errors import DllmError, unknown
from dllm.eval.metrics import paired_difference
from dllm.models.arguments import Checkpoint
from dllm.models.model import Model
from dllm.samplers import registry
from dllm.tasks import registry as tasks
from dllm.tasks.base import Example
from dllm.tasks.word_problems import MOST

PARTS = ("validity", "accuracy")


@dataclass(frozen=True)
class Form:
    """A form of answers, and a reader of it that knows nothing of automata: true where a text has the form."""

    constraint: Constraint
    holds: Callable[[str], bool]

    @classmethod
    def pattern(cls, regex: str) -> Form:
        """Read by `re`."""
        return cls(Constraint(regex=regex), lambda text: bool(re.fullmatch(regex, text)))

    @classmethod
    def document(cls, holds: Callable[[Any], bool], /, **schema: object) -> Form:
        """Read by `json`; the document then meets `holds`."""

        def reads(text: str) -> bool:
            try:
                return holds(json.loads(text))
            except ValueError:
                return False

        return cls(Constraint(json_schema=schema), reads)


def _record(d: Any) -> bool:
    whole = isinstance(d, dict) and {"n"} <= d.keys() <= {"n", "s"} and type(d["n"]) is int
    return whole and isinstance(d.get("s", ""), str) and len(d.get("s", "")) <= 6


def _nested(d: Any) -> bool:
    outer = isinstance(d, dict) and {"a"} <= d.keys() <= {"a", "on"} and isinstance(d["a"], dict)
    date = re.fullmatch(r"\d{4}-\d{2}-\d{2}", d.get("on", "2020-01-01")) if outer else None
    return bool(date) and d["a"].keys() == {"b"} and isinstance(d["a"]["b"], bool)


def _list(d: Any) -> bool:
    return isinstance(d, list) and 1 <= len(d) <= 3 and all(json.dumps(x) in ('"x"', "1", "null", "true") for x in d)


FORMS: dict[str, Form] = {
    "sentence": Form.pattern(r"[A-Z][a-z]+ has [0-9]+ [+-] [0-9]+ = [0-9]+ [a-z]+\.\n#### [0-9]+"),
    "number": Form.pattern(r"-?[0-9]{1,4}(\.[0-9]{1,2})?"),
    "date": Form.pattern(r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
    "time": Form.pattern(r"([01][0-9]|2[0-3]):[0-5][0-9]"),
    "words": Form.pattern(r"(yes|yesterday|no|maybe not)( and so on)?"),
    "list": Form.pattern(r"\[([a-z]{1,5}(, [a-z]{1,5}){0,3})?\]"),
    "colour": Form.pattern(r"#[0-9a-f]{6}"),
    "address": Form.pattern(r"[a-z]{2,8}@[a-z]{2,8}\.(com|org)"),
    "accents": Form.pattern(r"(é|😀|ü){2,4}"),
    "quoted": Form.pattern(r'"([^"\\\n]|\\["\\n]){0,12}"'),
    "record": Form.document(
        _record,
        type="object",
        properties={"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 6}},
        required=["n"],
    ),
    "items": Form.document(_list, type="array", items={"enum": ["x", 1, None, True]}, minItems=1, maxItems=3),
    "nested": Form.document(
        _nested,
        type="object",
        properties={
            "a": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
            "on": {"type": "string", "format": "date"},
        },
        required=["a"],
    ),
}
ASKED = ("Tom has 12 apples. He buys 7 more. How many apples does he have?", "Hi")
COLUMNS, BLOCK = 40, 20  # every form fits; two blocks, so that members cross an edge
TEMPERATURES = (0.0, 1.0)


def run(
    parts: Sequence[str] | None = None,
    *,
    n: int = 300,
    model: Model | str | Checkpoint = "tiny",
    samplers: Sequence[str] | None = None,
) -> Iterator[Figure]:
    """parts: of `PARTS`. n: problems of each task. samplers: None are all for validity, `SAMPLERS` for accuracy."""
    parts = parts or PARTS
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS, of="the bench constraints")
    model = dllm.load(model) if isinstance(model, str | Checkpoint) else model
    if "validity" in parts:
        yield from validity(model, samplers or registry.names())
    if "accuracy" in parts:
        yield from accuracy(model, n, samplers or SAMPLERS)


# -- validity ---------------------------------------------------------------------------------------------------------


def validity(model: Model, samplers: Sequence[str]) -> Iterator[Figure]:
    """For each sampler the share of answers that have their form, over all caches and temperatures. A sampler that
    cannot be constrained, or does not run on this model, has its reason in place of the share."""
    for sampler in samplers:
        name = f"valid answers in %, {sampler}"
        try:
            caches = usable(model, sampler)
        except DllmError as reason:
            yield Figure(name, None, note=str(reason))
            continue
        found = [said for cache in caches for t in TEMPERATURES for said in answers(model, sampler, cache, t)]
        valid = fmean(FORMS[form].holds(output.text) for form, output in found)
        own = fmean(canonical(output) for _, output in found)
        note = f"{len(found)} answers, caches {', '.join(caches)}; {100 * own:.0f} % canonical"
        yield Figure(name, 100 * valid, 100.0, higher_is_better=True, note=note)


def usable(model: Model, sampler: str) -> list[str]:
    """The caches that a sampler can use on this model. Errors: none, or a sampler that cannot be constrained."""
    base, *others = ["none", *(name for name in cache_names() if name != "none")]
    call = {"max_new_tokens": COLUMNS, "sampler": sampler, "constraint": FORMS["number"].constraint}
    prepare(model, ["Hi"], {**call, "cache": base})
    found = [base]
    for cache in others:
        try:
            prepare(model, ["Hi"], {**call, "cache": cache})
        except DllmError:
            continue
        found.append(cache)
    return found


def answers(model: Model, sampler: str, cache: str, temperature: float) -> list[tuple[str, Output]]:
    """Answers of every form, by its name, to each prompt; all are one batch."""
    rows = [(prompt, name) for prompt in ASKED for name in FORMS]
    outputs = dllm.generate(
        model, [prompt for prompt, _ in rows], constraint=[FORMS[name].constraint for _, name in rows],
        sampler=sampler, cache=cache, temperature=temperature, max_new_tokens=COLUMNS, block_length=BLOCK,
        batch_size=len(rows),
    )  # fmt: skip
    return [(name, output) for (_, name), output in zip(rows, outputs, strict=True)]


def canonical(output: Output) -> bool:
    """Whether its tokens are those that the tokenizer would write."""
    said = output.stats["constraint"]
    return isinstance(said, Mapping) and bool(said["canonical"])


# -- accuracy ---------------------------------------------------------------------------------------------------------

SAMPLERS = ("confidence", "threshold", "localleap", "klass")
LINE = r"[A-Z][a-z]+ [a-z]+ [0-9]+ [-+*/] [0-9]+ = [0-9]+ [a-z]+\."


class Question(NamedTuple):
    """A task with a form for its answers."""

    task: str
    columns: int
    form: Form
    right: Callable[[Example, str], bool] | None = None  # of an answer with the form; None: as the task grades

    def grade(self, example: Example, text: str) -> bool:
        """Whether an answer has the form and is right."""
        right = self.right or partial(tasks.grade, self.task)
        return self.form.holds(text) and right(example, text)


def result(example: Example, text: str) -> bool:
    """Whether a record's `result` is that of a word problem."""
    return bool(json.loads(text)["result"] == example.meta["answer"])


def one_of(given: Sequence[str]) -> Form:
    """One of these texts."""
    return Form(Constraint(choices=given), given.__contains__)


def record(*names: str) -> Form:
    """`work`, the worked lines of a word problem, and its `result`, or one of them, as a document."""
    parts = {
        "work": {"type": "array", "items": {"type": "string", "pattern": f"^{LINE}$"}, "minItems": 1, "maxItems": 4},
        "result": {"type": "integer"},
    }

    def holds(d: Any) -> bool:
        work = d.get("work", [])
        worked = ("work" in names) <= len(work) <= 4 and all(re.fullmatch(LINE, x) for x in work)
        return d.keys() == {*names} and worked and type(d["result"]) is int

    return Form.document(holds, type="object", properties={name: parts[name] for name in names}, required=[*names])


QUESTIONS: dict[str, Question] = {
    "word problems, a pattern": Question("word_problems", 48, Form.pattern(rf"({LINE}\n){{1,4}}#### [0-9]+")),
    "sudoku, a pattern": Question("sudoku", 24, Form.pattern(r"([1-4]{4}\n){3}[1-4]{4}")),
    "word problems, one of all results": Question(
        "word_problems", 48, one_of([f"#### {n}" for n in range(1, MOST + 1)])
    ),
    "word problems, a record of lines and result": Question("word_problems", 96, record("work", "result"), result),
    "word problems, a record of the result": Question("word_problems", 48, record("result"), result),
}


def accuracy(model: Model, n: int, samplers: Sequence[str]) -> Iterator[Figure]:
    """For each question and sampler the share of right answers under the constraint, beside validity, and beside what
    the same problems give without it (which the task grades as ever, whatever the form)."""
    free = dict[tuple[str, str], list[Output]]()
    for title, question in QUESTIONS.items():
        examples = tasks.generate(question.task, "test", n)
        for sampler in samplers:
            if (question.task, sampler) not in free:
                free[question.task, sampler] = decoded(model, question, examples, sampler)
            bound = decoded(model, question, examples, sampler, constraint=question.form.constraint)
            value, note = compared(question, examples, bound, free[question.task, sampler])
            yield Figure(f"right in %, {title}, {sampler}", value, note=note)


def decoded(
    model: Model, question: Question, examples: Sequence[Example], sampler: str, **more: object
) -> list[Output]:
    """The answers to some problems."""
    chats = [[{"role": "user", "content": e.prompt}] for e in examples]
    given = {"sampler": sampler, "max_new_tokens": question.columns, "batch_size": CHUNK, **more}
    return [*dllm.generate(model, chats, **given)]  # type: ignore[call-overload]


def compared(
    question: Question, examples: Sequence[Example], bound: Sequence[Output], free: Sequence[Output]
) -> tuple[float, str]:
    """The share of right answers with the constraint in %, and what stands beside it: validity, and both without the
    constraint on the same problems."""
    formed, loose = ([question.form.holds(o.text) for o in outputs] for outputs in (bound, free))
    right = [float(question.grade(e, o.text)) for e, o in zip(examples, bound, strict=True)]
    before = [float(tasks.grade(question.task, e, o.text)) for e, o in zip(examples, free, strict=True)]
    change, low, high = (100 * x for x in paired_difference(before, right))
    note = (
        f"valid {100 * fmean(formed):.1f} % (free {100 * fmean(loose):.1f} %), right free {100 * fmean(before):.1f} %, "
        f"difference {change:+.1f} [{low:+.1f}, {high:+.1f}], n = {len(examples)}, "
        f"{fmean(o.nfe for o in bound):.1f} forwards (free {fmean(o.nfe for o in free):.1f})"
    )
    return 100 * fmean(right), note
