"""Tasks from the user's files: any JSON lines with templates, and the shapes of the benchmarks that papers report.

Nothing is downloaded: a benchmark is a local file with the columns of its publication, and the prompt is the one
its figures were made with.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from dllm.errors import DllmError, unknown
from dllm.eval import data
from dllm.eval.config import GenerateSpec, ReadSpec, TaskSpec
from dllm.eval.data import Fields
from dllm.eval.tasks import scorers
from dllm.eval.tasks.base import Document, Graded, Task, fill, named, read_jsonl, refuse, takes


@dataclass(frozen=True)
class Shape:
    """How one benchmark asks and is graded. Templates are over its published columns."""

    prompt: str
    target: str
    metric: str
    extract: tuple[str, ...] = ()
    shot: str = ""  # how a solved example continues its prompt; "" means the target
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: bool | None = None
    prelude: str = ""  # for `python`: code before the answer
    context: str = ""  # code of the benchmark's own that the check may use
    turns: str = ""  # the field that lists the user's turns, in place of a prompt
    category: str = ""  # the field of a document's category
    derive: Callable[[Fields], Mapping[str, object]] = field(default=lambda row: {})
    clean: Callable[[Document, str], str] | None = None


def _gsm8k(row: Fields) -> Mapping[str, object]:
    final = scorers.extract(str(row["answer"]), ["gsm8k", "number"])
    if final is None:
        raise DllmError("field 'answer' holds no number after '####'")
    return {"final": final}


def _math(row: Fields) -> Mapping[str, object]:
    final = row.get("answer") or scorers.boxed(str(row.get("solution", "")))
    if not final:
        raise DllmError("no field 'answer', and no \\boxed{…} in field 'solution'")
    return {"final": final}


def _mbpp(row: Fields) -> Mapping[str, object]:
    tests = row.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise DllmError("field 'test_list' is not a list of assertions")
    imports = row.get("test_imports") or []  # of the sanitized set
    if not isinstance(imports, list):
        raise DllmError("field 'test_imports' is not a list of imports")
    return {
        "text": row.get("text") or row.get("prompt", ""),
        "tests": "\n".join(tests[:3]),  # as lm-eval asks, of the few that have more
        "check": "\n".join([row.get("test_setup_code") or "", *map(str, imports), *tests]),
        "_entries": defined(str(row.get("code", "")), "\n".join(tests)),
    }


def defined(code: str, tests: str) -> list[str]:
    """The names of the reference solution that the tests use: some are also names of Python's (`sum`)."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return []
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in names if re.search(rf"\b{name}\b", tests)]


def _complete(document: Document, text: str) -> str:
    """An instruct model's program: its code block, under the given head where it does not repeat the function."""
    code = scorers.extract(text, ["code"])
    code = text if code is None else code
    head, entry = str(document.meta["prompt"]), str(document.meta["entry_point"])
    if f"def {entry}" not in code:
        return head + code
    return head[: head.find(f"def {entry}")] + code  # the head's imports and helpers


def _block(document: Document, text: str) -> str:
    code = scorers.extract(text, ["code"])
    return text.split("[DONE]", maxsplit=1)[0] if code is None else code


JSONL = Shape(prompt="", target="{answer}", metric="exact")  # the prompt is the user's
# Prompts and stops as in LLaDA's, Dream's and Fast-dLLM's evaluations (they use lm-eval's task definitions).
GSM8K = Shape(
    prompt="Question: {question}\nAnswer:",
    target="{final}",
    shot=" {answer}",
    metric="math",
    extract=("gsm8k", "number"),
    stop=("Question:",),
    derive=_gsm8k,
)
GSM8K_COT = replace(GSM8K, prompt="Q: {question}\nA:", extract=("the_answer_is", *GSM8K.extract), stop=("Q:",))
HUMANEVAL = Shape(
    prompt="{prompt}",
    target="{test}\ncheck({entry_point})",
    metric="python",
    prelude="{prompt}",
    context="{prompt}",
    derive=lambda row: {"_entries": [row["entry_point"]]},
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    max_new_tokens=512,
)
SHAPES: dict[str, Shape] = {
    "gsm8k": GSM8K,
    "gsm8k_cot": GSM8K_COT,
    "gsm8k_cot_zeroshot": replace(GSM8K_COT, prompt="Q: {question}\nA: Let's think step by step."),
    "math": Shape(
        prompt="Problem:\n{problem}\n\nSolution:",
        target="{final}",
        shot=" {solution}",
        metric="math",
        extract=("boxed", "final_answer", "number"),
        stop=("Problem:",),
        derive=_math,
    ),
    "humaneval": HUMANEVAL,
    "humaneval_instruct": replace(
        HUMANEVAL,
        prompt="Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\n{prompt}\n```\n",
        prelude="",
        stop=(),
        chat=True,
        clean=_complete,
    ),
    "mbpp": Shape(
        prompt="You are an expert Python programmer, and here is your task: {text} "
        "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
        target="{check}",
        shot="{code}\n[DONE]",
        metric="python",
        stop=("[DONE]",),
        derive=_mbpp,
        clean=_block,
    ),
    "spec_bench": Shape(prompt="", target="", metric="none", turns="turns", category="category", max_new_tokens=1024),
}
NAMES = ("jsonl", *SHAPES)

# Two documents of each shape, for rehearsals: they have the columns of the benchmark and none of its content.
_NAMES = {"math": "math500", "spec_bench": "spec_bench"}
EXAMPLES = {name: data.EXAMPLES[_NAMES.get(name, name.partition("_")[0])] for name in SHAPES}

# lm-eval's files that hold the solved examples of a benchmark; another benchmark's are drawn from its training rows.
SHOTS = {"gsm8k_cot": "gsm8k/gsm8k-cot.yaml", "math": "minerva_math/utils.py", "mbpp": "mbpp/utils.py"}


def load(spec: TaskSpec, limit: int | None) -> Task:
    """A task from `spec.path`. Errors name the file, the line and the field; an empty file is one."""
    takes(spec, "path", "shots", "shots_path", "prompt", "answer", "metric", "extract", "read", "fields", "options",
          "turns", "category", "categories", "sample", "seed")  # fmt: skip
    if not spec.path:
        raise DllmError(f"task {spec.name!r} reads a local file: set `path:` to its JSON lines")
    if spec.read is not None and (not spec.read.labels or "{answer}" not in spec.read.template):
        raise DllmError("`read:` needs `labels:`, what an answer may be, and {answer} in its `template:`")
    for key in spec.options:
        if key not in ("broken", "rehearse"):
            raise unknown("option", key, ["broken"])
    shape = _refined(SHAPES.get(spec.name, JSONL), spec)
    broken = str(spec.options.get("broken", "refuse"))
    rows, skipped = _rows(spec.path, spec, broken)
    shots = _shots(spec, shape)
    documents, absent = [], []
    for index, row in enumerate(rows):
        try:
            documents.append(_document(index, _renamed(row, spec), shape, shots))
        except DllmError as error:
            absent.append(f"line {row['_line']} ({error})")
    refuse(spec.path, absent, len(rows), broken)
    documents = _told_apart(documents)
    if not documents:
        raise DllmError(f"{spec.path}: no document in it, so task {spec.title!r} is empty")
    documents, notes = _drawn(documents, spec)
    grade = scorers.scorer(shape.metric, shape.extract)

    def score(document: Document, text: str) -> Graded:
        return grade(document, shape.clean(document, text) if shape.clean else text)

    return Task(
        name=spec.name,
        version=_version(shape, spec.read),
        documents=tuple(documents[:limit]),
        score=score,
        generate=GenerateSpec(max_new_tokens=shape.max_new_tokens, stop=shape.stop or None, chat=shape.chat),
        skipped=(*skipped, *absent),
        notes=notes,
        runs_code=shape.metric == "python",
        graded=shape.metric != "none",
    )


def _drawn(documents: list[Document], spec: TaskSpec) -> tuple[list[Document], tuple[str, ...]]:
    """The documents of the asked categories, `sample` of each: drawn by the seed, and the categories by turns, so that
    the first documents are of all of them. And a sentence for each category that has fewer. Errors: categories without
    documents."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.category, []).append(document)
    if absent := [name for name in spec.categories or () if name not in groups]:
        have = ", ".join(filter(None, groups)) or "none"
        raise DllmError(f"{spec.path}: no document of the categories {', '.join(absent)} (categories there: {have})")
    groups = {name: groups[name] for name in spec.categories or groups}
    if spec.sample is None:
        return [d for d in documents if d.category in groups], ()
    short = [f"{name or 'the file'} has {len(g)}" for name, g in groups.items() if len(g) < spec.sample]
    notes = (f"fewer documents than the sample of {spec.sample} asks for: {', '.join(short)}",) if short else ()
    for name, group in groups.items():
        random.Random(f"{spec.seed} {name}").shuffle(group)
    drawn = [group[: spec.sample] for group in groups.values()]  # a larger sample holds the smaller one
    return [d for rank in itertools.zip_longest(*drawn) for d in rank if d is not None], notes


def _told_apart(documents: list[Document]) -> list[Document]:
    """Documents of one id with their places behind it: comparisons go by the id."""
    times = Counter(d.id for d in documents)
    return [replace(d, id=f"{d.id}#{i}") if times[d.id] > 1 else d for i, d in enumerate(documents)]


def _rows(path: str, spec: TaskSpec, broken: str = "refuse") -> tuple[list[Fields], tuple[str, ...]]:
    """The documents of a file; in a rehearsal (`--dry-run`) two of our own where the benchmark's file is not here."""
    if spec.options.get("rehearse") and spec.name in EXAMPLES and not Path(path).exists():
        examples = [{**row, "_line": i} for i, row in enumerate(EXAMPLES[spec.name], 1)]
        return [{**row, **{mine: row[published] for published, mine in spec.fields.items()}} for row in examples], ()
    return read_jsonl(path, broken)


def _refined(shape: Shape, spec: TaskSpec) -> Shape:
    """The user's template, answer, metric and extractors in place of the shape's own."""
    if spec.prompt and spec.turns:
        raise DllmError("`prompt:` and `turns:` both say what is asked; leave one out")
    shape = replace(shape, turns=spec.turns or ("" if spec.prompt else shape.turns))
    metric, category = spec.metric or shape.metric, spec.category or shape.category
    if not (spec.prompt or shape.prompt or shape.turns):
        raise DllmError('a jsonl task needs `prompt:`, a template such as "{question}\\nAnswer:", or `turns:`')
    if (spec.sample or spec.categories) and not category:
        raise DllmError("`sample:` and `categories:` go by a document's category: name its field with `category:`")
    if spec.prompt and not named(spec.prompt):
        raise DllmError(
            f"prompt: {spec.prompt!r} names no field, so every document would ask the same; write {{field}}"
        )
    extract = spec.extract if spec.extract is not None else shape.extract
    return replace(
        shape,
        prompt=spec.prompt or shape.prompt,
        target=spec.answer or ("" if metric == "none" else shape.target),
        metric=metric,
        category=category,
        extract=(extract,) if isinstance(extract, str) else tuple(extract),
    )


def _renamed(row: Fields, spec: TaskSpec) -> Fields:
    """The row under the published column names; `fields: {question: text}` says that the user's file calls it
    `text`."""
    out = dict(row)
    for published, mine in spec.fields.items():
        if mine not in row:
            raise DllmError(f"no field {mine!r} (the document has: {', '.join(k for k in row if k != '_line')})")
        out[published] = row[mine]
    return out


def _shots(spec: TaskSpec, shape: Shape) -> str:
    """Solved examples before the question: the first `shots` documents of `shots_path`, or of those that lm-eval's file
    of the benchmark holds (all of them where no number is said)."""
    if spec.shots_path and spec.shots is None:
        raise DllmError("`shots_path:` needs `shots:`, how many of its documents go before the question")
    if spec.shots == 0 or (spec.shots is None and spec.name not in SHOTS):
        return ""
    if spec.shots_path:
        rows, _ = _rows(spec.shots_path, spec)
        rows = [_renamed(row, spec) for row in rows]
    elif spec.name in SHOTS:
        rows = _published(spec.name)
    else:
        raise DllmError(f"{spec.shots} shots asked for, but no file of solved examples: set `shots_path:`")
    source, shots = spec.shots_path or f"lm-eval's {SHOTS.get(spec.name)}", spec.shots or len(rows)
    if len(rows) < shots and not spec.options.get("rehearse"):
        raise DllmError(f"{source}: {len(rows)} documents, too few for {shots} shots")
    solved = []
    for row in rows[:shots]:
        try:
            full = _filled(row, shape)
            solved.append(fill(shape.prompt, full) + fill(shape.shot or " " + shape.target, full))
        except DllmError as error:
            raise DllmError(f"{source}: line {row['_line']}: {error}") from None
    return "\n\n".join(solved) + "\n\n"


def _published(name: str) -> list[Fields]:
    """The solved examples in lm-eval's file of a benchmark, read without running it. Errors: no lm-eval."""
    package = data.home("lm_eval")
    if package is None:
        raise DllmError("its shots are in lm-eval's file: pip install 'dllm-toolkit[eval]', or say `shots: 0`")
    file = package / "tasks" / SHOTS[name]
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        found = [{**row, "answer": row["target"]} for row in yaml.safe_load(text)["fewshot_config"]["samples"]]
    else:
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        (listed,) = [f.body[-1] for f in functions if f.name == "list_fewshot_samples"]
        found = ast.literal_eval(listed.value) if isinstance(listed, ast.Return) and listed.value else []
    return [{**row, "_line": i} for i, row in enumerate(found, 1)]


def _filled(row: Fields, shape: Shape) -> Fields:
    try:
        return {**row, **shape.derive(row)}
    except KeyError as error:
        raise DllmError(f"no field {error} (the document has: {', '.join(k for k in row if k != '_line')})") from None


def _document(index: int, row: Fields, shape: Shape, shots: str) -> Document:
    full = _filled(row, shape)
    meta: Fields = {k: full[k] for k in ("prompt", "entry_point") if k in full}
    meta |= {k: fill(t, full) for k, t in (("prelude", shape.prelude), ("context", shape.context)) if t}
    target = fill(shape.target, full)
    if shape.metric == "python":
        meta["entries"] = full.get("_entries", [str(full["entry_point"])] if "entry_point" in full else ())
        if not target.strip():
            raise DllmError("the check is empty, so any program would pass it")
    ids = ("id", "task_id", "question_id")
    name = next((str(row[key]) for key in ids if row.get(key) is not None), str(index))
    category = fill(f"{{{shape.category}}}", full) if shape.category else ""
    if not shape.turns:
        return Document(name, shots + fill(shape.prompt, full), target, meta, category=category)
    turns = full.get(shape.turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise DllmError(f"field {shape.turns!r} is not a list of texts, the user's turns")
    return Document(name, shots + turns[0], target, meta, tuple(turns[1:]), category)


def _version(shape: Shape, read: ReadSpec | None) -> str:
    """A hash of everything that makes two runs of a task comparable: the templates and how answers are read."""
    parts: Sequence[object] = (shape.prompt, shape.target, shape.metric, shape.extract, shape.shot, shape.stop)
    parts = parts if not shape.turns else (*parts, shape.turns)
    parts = parts if read is None else (*parts, read)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
