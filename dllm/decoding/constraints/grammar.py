"""From a context-free grammar to a byte automaton: its rules as automata that call one another, their stack bounded.

`lark` reads the grammar; a rule becomes an automaton over terminals and rules, a terminal one over bytes. What is left
of a rule that calls another is a frame, and a rule with nothing left leaves none: what comes last, and so every list,
costs no depth. Left recursion becomes a loop first. A text is a member if some way to cut it into terminals can be
parsed; the longest match has no right of way, and what `%ignore` names may stand around every terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias, TypeVar

import lark
import numpy as np
from numpy.typing import NDArray

from dllm.decoding.constraints.automaton import ByteAutomaton
from dllm.decoding.constraints.pattern import STATES, of_pattern
from dllm.errors import DllmError, TooLarge, first_line

START = "start"  # the rule of a whole text, and
AROUND = "%ignore"  # a terminal that may stand in front of it
STRINGS = {  # terminals of `lark` that look behind, by what they mean
    r'".*?(?<!\\)(\\\\)*?"': r'"(?:[^"\\\n]|\\.)*"',  # common.ESCAPED_STRING
}

Stack = tuple[int, ...]  # states to go on from, the next one last; ~state: where a rule calls into its own circle
Place = tuple[str, int, Stack]  # a terminal, the state within it, and the stack
END = -1  # the place behind a whole text
T = TypeVar("T", int, str)
Subset: TypeAlias = tuple[frozenset[int], dict[T, int]]


def of_grammar(text: str, max_depth: int | None = None) -> ByteAutomaton:
    """The automaton of the texts that a grammar in lark's notation parses from `start`, minimal.

    max_depth: how many calls of rules that lead back to themselves may be open at once, the last symbols of a rule
    apart. Errors: what is no grammar or no regular terminal, rules that lead back to themselves without `max_depth`,
    too many states.
    """
    try:
        read = lark.Lark(text, parser="earley", lexer="dynamic", maybe_placeholders=False)
    except Exception as error:  # foreign: those of `re` among them
        raise DllmError(f"grammar: {first_line(error) or type(error).__name__}") from error
    rules: dict[str, list[tuple[str, ...]]] = {}
    for rule in read.rules:
        rules.setdefault(rule.origin.name, []).append(tuple(symbol.name for symbol in rule.expansion))
    patterns = {t.name: STRINGS.get(t.pattern.to_regexp(), t.pattern.to_regexp()) for t in read.terminals}
    behind = "".join(f"(?:{'|'.join(patterns[i] for i in read.ignore_tokens)})*" if read.ignore_tokens else "")
    said = set(chain.from_iterable(chain.from_iterable(rules.values())))
    if undefined := sorted(said - rules.keys() - patterns.keys()):
        raise DllmError(f"grammar: nothing says what {undefined[0]} is")
    terminals = {name: _terminal(name, f"(?:{p}){behind}") for name, p in sorted(patterns.items()) if name in said}
    if behind:
        terminals[AROUND] = _terminal(AROUND, f"{behind[:-1]}+")
    return _Texts(_Rules.of(rules), terminals, max_depth).automaton()


def _terminal(name: str, pattern: str) -> ByteAutomaton:
    try:
        return of_pattern(pattern)
    except DllmError as error:
        raise DllmError(f"grammar: terminal {name}: {str(error).removeprefix('regex: ')}") from error


# -- automata over anything ------------------------------------------------------------------------------------------


def _determined(first: frozenset[int], step: Callable[[int], Mapping[T, Iterable[int]]]) -> Iterator[Subset[T]]:
    """The subset construction: sets of states, each with the number of the next one by what is read, `first` at 0."""
    number, order = {first: 0}, [first]
    for some in order:
        ahead: dict[T, set[int]] = {}
        for state in some:
            for read, found in step(state).items():
                ahead.setdefault(read, set()).update(found)
        row = dict[T, int]()
        for read, more in sorted(ahead.items()):
            after = frozenset(more)
            if after not in number:
                number[after] = len(order)
                order.append(after)
            row[read] = number[after]
        yield some, row


def _minimal(delta: NDArray[np.int64], accepting: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The least automaton of a language (Moore's refinement), states in the order of their first one."""
    part, count, first = np.unique(accepting, return_inverse=True)[1].reshape(-1), 0, np.zeros(1, np.int64)
    while int(part.max()) + 1 > count:
        count = int(part.max()) + 1
        ahead = np.where(delta >= 0, part[delta], -1)
        _, first, part = np.unique(np.column_stack([part, ahead]), axis=0, return_index=True, return_inverse=True)
        part = np.argsort(np.argsort(first))[part.reshape(-1)]
    chosen = np.sort(first)
    return np.where(delta[chosen] >= 0, part[delta[chosen]], -1), accepting[chosen]


def _table(rows: Sequence[Mapping[int, int]], width: int) -> NDArray[np.int64]:
    """(states, width) the next state, -1 where there is none."""
    delta = np.full((len(rows), width), -1, np.int64)
    for at, row in enumerate(rows):
        delta[at, list(row)] = list(row.values())
    return delta


# -- rules as automata ------------------------------------------------------------------------------------------------


class _Network:
    """An automaton for each rule, over names of terminals and rules. None reads the empty text: a symbol that may be
    empty is stepped over instead."""

    def __init__(self, rules: dict[str, list[tuple[str, ...]]]) -> None:
        """rules: by name, their alternatives."""
        self.edges, self.final = list[dict[str, set[int]]](), list[bool]()
        self.first: dict[str, int] = {}  # the first state of each rule; no edge leads there
        self.empty = set[str]()  # rules that may be empty
        while new := {name for name, of in rules.items() if any(self.empty.issuperset(o) for o in of)} - self.empty:
            self.empty |= new
        for name, options in rules.items():
            self.first[name] = self.state()
            rest: dict[tuple[str, ...], int] = {(): self.state(True)}  # what is left of an alternative
            for option in sorted({o[i:] for o in options for i in range(len(o))}, key=len):
                rest[option] = at = self.state()
                self.edges[at][option[0]] = {rest[option[1:]]}
                if option[0] in self.empty:
                    self.follow(at, rest[option[1:]])
            for option in options:
                if option:
                    self.follow(self.first[name], rest[option])
            self.final[self.first[name]] = False

    def state(self, final: bool = False) -> int:
        """A new one."""
        self.edges.append({})
        self.final.append(final)
        return len(self.edges) - 1

    def follow(self, at: int, to: int) -> None:
        """Have a state read what another reads."""
        for name, targets in self.edges[to].items():
            self.edges[at].setdefault(name, set()).update(targets)
        self.final[at] = self.final[at] or self.final[to]

    def within(self, rule: str) -> list[int]:
        """The states of a rule, its first one first."""
        found = [self.first[rule]]
        for at in found:
            found += sorted(set(chain.from_iterable(self.edges[at].values())) - set(found))
        return found

    def calls(self, states: Iterable[int]) -> set[str]:
        """The rules that these states call."""
        return {name for at in states for name in self.edges[at] if name in self.first}

    def unrolled(self) -> None:
        """No rule calls itself first (Paull's elimination): where A begins with A, the end of A leads to what follows
        there; of rules that begin with one another, the later ones hold copies of the earlier."""
        beginning = _closed({name: self.calls([at]) for name, at in self.first.items()})
        done = list[str]()
        for name, at in self.first.items():
            for other in done:
                if other in beginning[name] and name in beginning[other]:
                    for to in sorted(self.edges[at].pop(other, ())):
                        self.splice(at, other, to)
            again = self.state()
            for to in sorted(self.edges[at].pop(name, ())):
                self.follow(again, to)
            for end in self.within(name):
                if self.final[end]:
                    self.follow(end, again)
            done.append(name)

    def inlined(self) -> None:
        """What `lark` writes for a repetition within a rule stands in that rule: it is no call."""
        helpers = [name for name in self.first if name.startswith("__")]
        leading = _closed({name: self.calls(self.within(name)) & set(helpers) for name in helpers})
        helpers = [name for name in helpers if name not in leading[name]]
        known: dict[tuple[str, int], int] = {}
        for name in [name for name in self.first if name not in helpers]:
            while some := [(at, h) for at in self.within(name) for h in helpers if h in self.edges[at]]:
                for at, helper in some:
                    for to in sorted(self.edges[at].pop(helper, ())):
                        if (helper, to) not in known:
                            known[helper, to] = self.state()
                            self.splice(known[helper, to], helper, to)
                        self.follow(at, known[helper, to])
        for name in helpers:
            del self.first[name]

    def splice(self, at: int, rule: str, to: int) -> None:
        """Have a state read a rule, and then what the state `to` reads."""
        first, *states = self.within(rule)
        copy = {old: self.state() for old in states}
        for old, new in [(first, at), *copy.items()]:
            for name, targets in self.edges[old].items():
                self.edges[new].setdefault(name, set()).update(copy[t] for t in targets)
            if self.final[old]:
                self.follow(new, to)


def _closed(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What each node leads to, in any number of steps."""
    while True:
        more = {name: to.union(*(graph[t] for t in to)) for name, to in graph.items()}
        if more == graph:
            return graph
        graph = more


@dataclass
class _Rules:
    """The rules, an automaton each, deterministic and minimal; and a state that reads a whole text."""

    edges: list[dict[str, int]]
    final: list[bool]
    rule: list[str]  # of each state
    first: dict[str, int]

    @classmethod
    def of(cls, rules: dict[str, list[tuple[str, ...]]]) -> _Rules:
        """Those of a grammar, by their alternatives. State 0 is that of a whole text."""
        network = _Network(rules)
        network.unrolled()
        network.inlined()
        made = cls([{START: 1}, {}], [START in network.empty, True], ["", ""], {})
        for name, at in network.first.items():
            subsets = list(_determined(frozenset([at]), network.edges.__getitem__))
            symbols = list(dict.fromkeys(symbol for _, row in subsets for symbol in row))
            place = {symbol: k for k, symbol in enumerate(symbols)}
            delta, final = _minimal(
                _table([{place[s]: to for s, to in row.items()} for _, row in subsets], len(symbols)),
                np.array([any(network.final[state] for state in some) for some, _ in subsets]),
            )
            made.first[name] = offset = len(made.edges)
            made.edges += [
                {s: offset + t for s, t in zip(symbols, row, strict=True) if t >= 0} for row in delta.tolist()
            ]
            made.final += final.tolist()
            made.rule += [name] * len(final)
        return made

    def circles(self) -> dict[str, set[str]]:
        """For each rule, those that it leads to and that lead back to it."""
        calls = {name: set[str]() for name in self.first}
        for name, row in zip(self.rule, self.edges, strict=True):
            calls.get(name, set()).update(row.keys() & self.first.keys())
        leading = _closed(calls)
        return {name: {other for other in to if name in leading[other]} for name, to in leading.items()}


# -- texts ------------------------------------------------------------------------------------------------------------


class _Texts:
    """The places that a text may have come to, byte by byte."""

    def __init__(self, rules: _Rules, terminals: dict[str, ByteAutomaton], depth: int | None) -> None:
        self.rules, self.circles, self.depth = rules, rules.circles(), depth
        table = np.concatenate([t.delta for t in terminals.values()] or [np.full((1, 256), -1, np.int32)])
        columns, kind = np.unique(table, axis=1, return_inverse=True)  # bytes that behave alike are one kind
        self.kind = kind.reshape(-1)
        begins = np.cumsum([0, *(len(t.delta) for t in terminals.values())]).tolist()
        self.moves = {  # by terminal and state: (kind, next state)
            name: [[(k, to) for k, to in enumerate(row) if to >= 0] for row in columns[begin:end].tolist()]
            for name, begin, end in zip(terminals, begins, begins[1:], strict=False)
        }
        self.accepting = {name: t.accepting.tolist() for name, t in terminals.items()}
        self.number: dict[Place, int] = {}
        self.places = list[Place]()
        self.entering: dict[tuple[int, Stack], frozenset[int]] = {}
        self.known: dict[int, dict[int, frozenset[int]]] = {END: {}}

    def automaton(self) -> ByteAutomaton:
        """The automaton. Errors: a depth that nobody said, too many states."""
        first = self.completed((0,))
        if AROUND in self.moves:
            first |= {self.place(AROUND, 0, (0,))}
        accepting, rows = list[bool](), list[dict[int, int]]()
        for some, row in _determined(first, self.step):
            accepting.append(END in some)
            rows.append(row)
            if len(rows) > STATES:
                depth = "" if self.depth is None else f" at max_depth={self.depth}"
                raise TooLarge(f"grammar: more than {STATES} states{depth}, which are not kept; make it smaller")
        delta, final = _minimal(_table(rows, int(self.kind.max()) + 1), np.array(accepting))
        return ByteAutomaton(np.ascontiguousarray(delta[:, self.kind], np.int32), final)

    def place(self, terminal: str, state: int, stack: Stack) -> int:
        """The number of a place."""
        key = terminal, state, stack
        if key not in self.number:
            self.number[key] = len(self.places)
            self.places.append(key)
        return self.number[key]

    def step(self, at: int) -> dict[int, frozenset[int]]:
        """The places behind one, by kind of byte."""
        if at not in self.known:
            terminal, state, stack = self.places[at]
            found = self.known[at] = {}
            for kind, to in self.moves[terminal][state]:
                within = [self.place(terminal, to, stack)] if self.moves[terminal][to] else []
                over = self.completed(stack) if self.accepting[terminal][to] else ()
                found[kind] = frozenset([*within, *over])
        return self.known[at]

    def completed(self, stack: Stack) -> frozenset[int]:
        """The places where the next symbol begins, or the end."""
        if not stack:
            return frozenset([END])
        at = max(stack[-1], ~stack[-1])
        found = self.entered(at, stack[:-1])
        return found | self.completed(stack[:-1]) if self.rules.final[at] else found

    def entered(self, at: int, stack: Stack) -> frozenset[int]:
        """The places where the symbols begin that a state of a rule may read."""
        key = at, stack
        if key not in self.entering:
            found = set[int]()
            for name, to in self.rules.edges[at].items():
                below = self.called(at, name, to, stack)
                if below is not None and name in self.rules.first:
                    found |= self.entered(self.rules.first[name], below)
                elif below is not None:
                    found.add(self.place(name, 0, below))
            self.entering[key] = frozenset(found)
        return self.entering[key]

    def called(self, at: int, name: str, to: int, stack: Stack) -> Stack | None:
        """The stack below a symbol behind which a rule goes on at `to`; None where it has no room. Errors: a rule that
        calls into its own circle, and nobody said how deep."""
        rule = self.rules.rule[at]
        circle = name in self.circles.get(rule, ())
        if not self.rules.edges[to]:
            return stack
        if circle and self.depth is None:
            through = "" if name == rule else f" through {name}"
            raise DllmError(f"grammar: {rule} leads back to itself{through}; say how deep with max_depth")
        if not circle or sum(frame < 0 for frame in stack) < (self.depth or 0):
            return (*stack, ~to if circle else to)
        return stack if self.rules.final[to] else None
