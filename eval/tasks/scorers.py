"""Reading an answer out of a text and comparing it: `exact`, `contains`, `number`, `math`, `choice`, `python`, `none`.

Mathematics is compared by `math-verify`, programs are run confined; nothing here parses either by hand.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence

from dllm.errors import DllmError, unknown
from dllm.eval.tasks.base import Document, Graded
from dllm.eval.tasks.confined import last_line, run

NUMBER = r"(-?\$?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)"
UNCONFINED_NOTE = "unconfined:"  # begins the note of a verdict that a program may have made itself
# Names that `extract:` may use instead of a regular expression; of several matches the last counts.
EXTRACTORS = {
    "number": NUMBER,
    "gsm8k": r"####\s*" + NUMBER,
    "the_answer_is": r"[Aa]nswer is:?\s*\$?" + NUMBER,
    "letter": r"\b([A-J])\b",
    "line": r"^\s*(.+?)\s*$",
    "code": r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)",
    "final_answer": r"[Ff]inal [Aa]nswer:? (?:is:? )?(.+?)\.?(?: I hope|\n|\Z)",
}
_FIRST = {"line", "code"}  # where the first match is the answer and the rest is chatter


def extract(text: str, patterns: Sequence[str]) -> str | None:
    """What the first pattern that matches finds (its last match), or None. `boxed` is TeX's `\\boxed{…}`."""
    for pattern in patterns:
        if pattern == "boxed":
            found = boxed(text)
        else:
            flags = re.MULTILINE if pattern == "line" else re.DOTALL
            matches = re.findall(EXTRACTORS.get(pattern, pattern), text, flags)
            found = matches[0 if pattern in _FIRST else -1] if matches else None
        if isinstance(found, tuple):
            found = next((group for group in found if group), "")
        if found is not None:
            return found
    return None


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise for a name that is no extractor and for a text that is no regular expression."""
    for pattern in patterns:
        if pattern in EXTRACTORS or pattern == "boxed":
            continue
        if re.fullmatch(r"\w+", pattern):
            raise unknown("extractor", pattern, [*EXTRACTORS, "boxed"])
        try:
            re.compile(pattern)
        except re.error as error:
            raise DllmError(f"extract: {pattern!r} is not a regular expression: {error}") from None


def boxed(text: str) -> str | None:
    """The contents of the last `\\boxed{…}`, braces matched."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7 : end]
    return None


def _plain(text: str) -> str:
    return " ".join(text.split())


def exact(document: Document, answer: str) -> Graded:
    """Equal but for white space."""
    return Graded(float(_plain(answer) == _plain(document.target)), answer)


def contains(document: Document, answer: str) -> Graded:
    """The target is somewhere in the answer, in either case."""
    return Graded(float(_plain(document.target).lower() in _plain(answer).lower()), answer)


def choice(document: Document, answer: str) -> Graded:
    """The first letter, in either case."""
    return Graded(float(answer.strip().upper()[:1] == document.target.strip().upper()[:1] != ""), answer)


def number(document: Document, answer: str) -> Graded:
    """Equal as numbers, to a millionth."""
    try:
        mine, gold = (float(re.sub(r"[,$\s]", "", text)) for text in (answer, document.target))
    except ValueError:
        return Graded(0.0, answer, "not a number")
    return Graded(float(abs(mine - gold) <= 1e-6 * max(1.0, abs(gold))), answer)


def math(document: Document, answer: str) -> Graded:
    """Mathematical equality by math-verify (extra [eval])."""
    verify, parse = _math_verify()
    # Its time limit is a signal, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    gold, mine = (parse(f"${text.strip().strip('$')}$", parsing_timeout=seconds) for text in (document.target, answer))
    right = bool(gold) and bool(mine) and verify(gold, mine, timeout_seconds=seconds)
    return Graded(float(right), answer)


def _math_verify() -> tuple[Callable[..., bool], Callable[..., list[object]]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise DllmError("metric 'math' needs math-verify: pip install 'dllm-toolkit[eval]'") from None
    return verify, parse


def python(document: Document, answer: str) -> Graded:
    """The target is a program that checks the answer's names; each runs confined, in a process of its own."""
    meta = document.meta
    program, context = (str(meta.get(part, "")) for part in ("prelude", "context"))
    return judged(program + answer, document.target, answer, context, meta.get("entries", ()))


def judged(program: str, check: str, answer: str, context: str = "", entries: Sequence[str] = ()) -> Graded:
    """The verdict of `confined.run`, with the last word of a program that failed."""
    verdict = run(program, check, context=context, entries=entries)
    words = [verdict.status] if verdict.confined else [UNCONFINED_NOTE, verdict.status]
    words += [last_line(verdict)] if verdict.status == "failed" else []
    return Graded(float(verdict.passed), answer, " ".join(words)[:200])


def none(document: Document, answer: str) -> Graded:
    """Nothing is graded: the task is there for its prompts."""
    return Graded(0.0, answer)


Metric = Callable[[Document, str], Graded]
METRICS: dict[str, Metric] = {f.__name__: f for f in (exact, contains, number, math, choice, python, none)}


def scorer(metric: str, patterns: Sequence[str] = ()) -> Metric:
    """A rule from text to verdict: extract (where patterns are given), then compare."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if metric == "math":
        _math_verify()
    check_patterns(patterns)
    compare = METRICS[metric]

    def score(document: Document, text: str) -> Graded:
        answer = extract(text, patterns) if patterns else text
        return Graded(0.0, None, "no answer found") if answer is None else compare(document, answer)

    return score
