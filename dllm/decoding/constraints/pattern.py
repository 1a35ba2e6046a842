"""From what an answer must be to a byte automaton: patterns by `interegular`, lists of strings by themselves.

`interegular` knows the regular languages of patterns over characters; here its transitions are spelt in bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

import interegular
import numpy as np
from interegular.fsm import FSM, Alphabet, State
from numpy.typing import NDArray

from dllm.decoding.constraints.automaton import ByteAutomaton
from dllm.errors import DllmError, TooLarge, first_line

STATES = 20_000  # of a byte automaton
_CODES = ((0, 0xD7FF), (0xE000, 0x10FFFF))  # of characters; surrogates are none

Segments = tuple[tuple[int, int, int], ...]  # (first code, last code, next state), ascending


# -- patterns ---------------------------------------------------------------------------------------------------------

_ESCAPES = {
    "b": "a word boundary",
    "B": "a word boundary",
    "A": "an anchor inside of it",
    "Z": "an anchor inside of it",
    "p": "a Unicode property",
    "P": "a Unicode property",
    "k": "a back-reference",
    "N": "a character by its name",
    **dict.fromkeys("123456789", "a back-reference"),
}
_GROUPS = {
    **dict.fromkeys(("(?=", "(?!"), "a look-ahead"),  # of a part of the text: `interegular` lets it read beyond the end
    **dict.fromkeys(("(?<=", "(?<!"), "a look-behind"),
    "(?P=": "a back-reference",
    "(?(": "a condition",
    "(?>": "an atomic group",
    "(?#": "a comment",
}
_POSSESSIVE = re.compile(r"(?:[*+?]|\{[0-9]*,?[0-9]*\})\+")


def checked(pattern: str) -> str:
    """The pattern without its outer anchors, code points written as characters. Errors: what is no regular language, or
    means something else to the parser."""
    out, at, inside, opened = list[str](), 0, False, False

    def refuse(what: str) -> DllmError:
        return DllmError(f"regex: the pattern has {what} at position {at}, which a constraint cannot hold")

    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            opened = False
            code = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2}))").match(pattern, at)
            if code:
                number = int(next(filter(None, code.groups())), 16)
                if not any(first <= number <= last for first, last in _CODES):
                    raise refuse("half a character (a surrogate)")
                out.append(_literal(chr(number)))
                at = code.end()
                continue
            if not inside and (named := _ESCAPES.get(pattern[at + 1 : at + 2])):
                raise refuse(named)
            out.append(pattern[at : at + 2])
            at += 2
            continue
        if inside:
            if pattern.startswith("[:", at) and re.compile(r"\[:\^?\w+:\]").match(pattern, at):
                raise refuse("a POSIX class")
            if sign == "]" and opened:  # a literal one, as it comes first
                out.append("\\")
            inside, opened = sign != "]" or opened, opened and sign == "^" and pattern[at - 1] == "["
        elif sign == "[":
            inside = opened = True
        elif sign == "(" and (
            named := next((n for opening, n in _GROUPS.items() if pattern.startswith(opening, at)), "")
        ):
            raise refuse(named)
        elif (sign == "^" and at == 0) or (sign == "$" and at == len(pattern) - 1):
            at += 1
            continue
        elif pattern.startswith("{}", at):  # no count: these two signs
            out.append(r"\{\}")
            at += 2
            continue
        elif sign in "^$":
            raise refuse("an anchor inside of it")
        elif _POSSESSIVE.match(pattern, at):
            raise refuse("a possessive quantifier")
        out.append(sign)
        at += 1
    return "".join(out)


def _literal(sign: str) -> str:
    return sign if sign.isalnum() or sign.isspace() or ord(sign) > 127 else "\\" + sign


def of_pattern(pattern: str) -> ByteAutomaton:
    """The automaton of a pattern that the whole text must match. Errors: one that is none, or no regular language."""
    text = checked(pattern)
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(pattern)  # what it objects to it says better
        fsm = interegular.parse_pattern(text).to_fsm().reduce()  # type: ignore[no-untyped-call]  # foreign
    except MemoryError:
        raise
    except Exception as error:  # foreign: a bare KeyError among them
        said = first_line(error)
        if said == "InvalidSyntax":
            said = "put a backslash before signs that stand for themselves, such as { and }"
        raise DllmError(f"regex: the pattern {_short(pattern)} cannot be read: {said}") from error
    keys, live = _codes(fsm.alphabet), _live(fsm)
    number, order, rows = {fsm.initial: 0}, [fsm.initial], list[Segments]()  # by first visit: sets have no order
    for state in order:
        targets, found = fsm.map.get(state, {}), list[tuple[int, int, int]]()
        for lo, hi, key in keys:
            if key in targets and (target := targets[key]) in live:
                if target not in number:
                    number[target] = len(order)
                    order.append(target)
                found.append((lo, hi, number[target]))
        rows.append(_merged(found))
    return _Bytes(rows).made(np.array([s in fsm.finals for s in order]))


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")


def _live(fsm: FSM) -> set[State]:
    """The states from which a final one can be reached."""
    before: dict[State, set[State]] = {}
    for state, targets in fsm.map.items():
        for target in targets.values():
            before.setdefault(target, set()).add(state)
    found, todo = set[State](fsm.finals), list[State](fsm.finals)
    while todo:
        new = before.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def _codes(alphabet: Alphabet) -> list[tuple[int, int, object]]:
    """The runs of code points that its transition keys stand for: (first, last, key), ascending, surrogates apart."""
    named = {ord(s): key for s, key in alphabet.items() if isinstance(s, str)}
    other = next((key for s, key in alphabet.items() if not isinstance(s, str)), None)
    found = list[tuple[int, int, object]]()
    for first, last in _CODES:
        at = first
        for code in sorted(c for c in named if first <= c <= last):
            if at < code:
                found.append((at, code - 1, other))
            found.append((code, code, named[code]))
            at = code + 1
        if at <= last:
            found.append((at, last, other))
    return found


def _merged(runs: Iterable[tuple[int, int, int]]) -> Segments:
    """Runs that touch and lead to one state are one."""
    out = list[tuple[int, int, int]]()
    for lo, hi, state in runs:
        if out and out[-1][2] == state and out[-1][1] + 1 == lo:
            out[-1] = (out[-1][0], hi, state)
        else:
            out.append((lo, hi, state))
    return tuple(out)


def _cut(runs: Segments, base: int, size: int) -> Segments:
    """The runs within [base, base + size), counted from base."""
    return tuple(
        (max(lo - base, 0), min(hi - base, size - 1), state)
        for lo, hi, state in runs
        if hi >= base and lo < base + size
    )


class _Bytes:
    """Spells transitions over code points in UTF-8. States in the middle of a character are shared: two of them that
    read the same are one."""

    def __init__(self, rows: list[Segments]) -> None:
        self.rows, self.table, self.inner = rows, [np.full(256, -1, np.int32) for _ in rows], dict[object, int]()

    def made(self, accepting: NDArray[np.bool_]) -> ByteAutomaton:
        """The automaton. Errors: too many states."""
        for state, runs in enumerate(self.rows):
            row = self.table[state]
            for lo, hi, target in _cut(runs, 0, 0x80):
                row[lo : hi + 1] = target
            for first, last, depth, low in ((0xC2, 0xDF, 1, 0x80), (0xE0, 0xEF, 2, 0x800), (0xF0, 0xF4, 3, 0x10000)):
                some = tuple((max(lo, low), hi, target) for lo, hi, target in runs if hi >= low)
                for lead in range(first, last + 1) if some else ():
                    size = 64**depth
                    part = _cut(some, (lead & ((1 << (6 - depth)) - 1)) * size, size)
                    if part:
                        row[lead] = self._after(depth, part)
        if len(self.table) > STATES:
            raise TooLarge(f"regex: the pattern needs {len(self.table)} states; at most {STATES} are kept")
        more = np.zeros(len(self.table) - len(accepting), np.bool_)
        return ByteAutomaton(np.stack(self.table), np.concatenate([accepting, more]))

    def _after(self, depth: int, runs: Segments) -> int:
        """The state that reads `depth` more bytes of a character, whose values lead where `runs` say."""
        key = (depth, runs)
        if key not in self.inner:
            self.inner[key], row = len(self.table), np.full(256, -1, np.int32)
            self.table.append(row)
            size = 64 ** (depth - 1)
            if depth == 1:
                for lo, hi, target in runs:
                    row[0x80 + lo : 0x80 + hi + 1] = target
            else:
                for byte in range(64):
                    part = _cut(runs, byte * size, size)
                    if part:
                        row[0x80 + byte] = self._after(depth - 1, part)
        return self.inner[key]


# -- lists of strings -------------------------------------------------------------------------------------------------


def of_choices(choices: Sequence[bytes]) -> ByteAutomaton:
    """The automaton of some strings, minimal: equal endings are shared."""
    follow, final = [dict[int, int]()], [False]
    for text in choices:
        state = 0
        for byte in text:
            if byte not in follow[state]:
                follow[state][byte] = len(follow)
                follow.append({})
                final.append(False)
            state = follow[state][byte]
        final[state] = True
    same, kept = dict[object, int](), list[int]()  # children have higher numbers than their parent
    place = np.zeros(len(follow), np.int32)
    for state in range(len(follow) - 1, -1, -1):
        key = (final[state], tuple(sorted((byte, int(place[to])) for byte, to in follow[state].items())))
        if key not in same:
            same[key] = len(kept)
            kept.append(state)
        place[state] = same[key]
    if len(kept) > STATES:
        raise TooLarge(f"choices: these strings need {len(kept)} states; at most {STATES} are kept")
    count = len(kept)  # the root was kept last
    delta = np.full((count, 256), -1, np.int32)
    for number, state in enumerate(kept):
        for byte, to in follow[state].items():
            delta[count - 1 - number, byte] = count - 1 - place[to]
    return ByteAutomaton(delta, np.array([final[state] for state in reversed(kept)]))
