"""Grammars: the texts of a bounded stack against all texts of a grammar, and against lark's own parser."""

from __future__ import annotations

import itertools
import json
import random
import re
from contextlib import suppress
from typing import Any

import lark
import pytest

import dllm
from dllm.decoding.constraints.automaton import ByteAutomaton
from dllm.decoding.constraints.grammar import of_grammar
from dllm.errors import DllmError

Rules = dict[str, list[list[str]]]

JSON = r"""
start: value
?value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" [pair ("," pair)*] "}"
pair: STRING ":" value
array: "[" [value ("," value)*] "]"
STRING: /"([^"\\\x00-\x1f]|\\["\\\/bfnrt])*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"""
LISTS = 'start: "[" [item ("," item)*] "]"\n?item: start | "1"'
SUM = 'start: [start "+"] atom\natom: /[0-9]+/ | "(" start ")"'


def texts(signs: str, longest: int) -> list[str]:
    return ["".join(word) for n in range(longest + 1) for word in itertools.product(signs, repeat=n)]


def members(automaton: ByteAutomaton, of: list[str]) -> set[str]:
    return {text for text in of if automaton.accepts(text.encode())}


# -- random grammars --------------------------------------------------------------------------------------------------


def random_rules(rnd: random.Random) -> Rules:
    """Rules that may call each other and themselves anywhere, and may be empty."""
    names = ["start", "p", "q"][: rnd.choice([1, 2, 3])]

    def option() -> list[str]:
        return [rnd.choice([*names, "a", "b", "a", "b"]) for _ in range(rnd.choice([0, 1, 1, 2, 2, 3]))]

    return {name: [option() for _ in range(rnd.choice([1, 2, 2, 3]))] for name in names}


def written(rules: Rules) -> str:
    def option(symbols: list[str]) -> str:
        return " ".join(s if s in rules else f'"{s}"' for s in symbols)

    return "\n".join(f"{name}: {' | '.join(map(option, options))}" for name, options in rules.items())


def language(rules: Rules, longest: int) -> set[str]:
    """Every text of at most so many signs: the least sets that hold what the rules say."""
    found = {name: set[str]() for name in rules}
    while True:
        more = {}
        for name, options in rules.items():
            more[name] = set[str]()
            for symbols in options:
                said = {""}
                for s in symbols:
                    said = {x + y for x in said for y in found.get(s, {s}) if len(x + y) <= longest}
                more[name] |= said
        if more == found:
            return found["start"]
        found = more


@pytest.mark.parametrize("seed", range(50))
def test_random_grammars_against_all_of_their_texts(seed: int) -> None:
    """Nothing else is accepted at any depth; short texts are all accepted at a depth beyond their length."""
    rules = random_rules(random.Random(seed))
    want, every = language(rules, 4), texts("ab", 4)
    for depth in (1, 4):
        got = members(of_grammar(written(rules), depth), every)
        assert got <= want
        if depth == 4:
            assert {text for text in want if len(text) < 3} <= got


def test_a_depth_counts_what_is_open() -> None:
    """How many lists are open around the innermost thing."""

    def depth_of(value: Any) -> int:
        return 1 + max(map(depth_of, value)) if isinstance(value, list) and value else 0

    every, depths = texts("[],1", 7), dict[str, int]()
    for text in every:
        with suppress(ValueError):
            value = json.loads(text)
            if isinstance(value, list) and "11" not in text:
                depths[text] = depth_of(value)
    for depth in (1, 2, 3):
        assert members(of_grammar(LISTS, depth), every) == {text for text, n in depths.items() if n <= depth}


def test_lists_of_any_length_cost_no_depth() -> None:
    """Repetition, recursion on the right, and recursion on the left, through another rule as well."""
    for grammar in (
        'start: "x" ("," "x")*',
        'start: "x" | "x" "," start',
        'start: "x" | start "," "x"',
        'start: "x" | more "x"\nmore: start ","',
    ):
        automaton = of_grammar(grammar)
        assert members(automaton, texts("x,", 5)) == {"x", "x,x", "x,x,x"}
        assert len(automaton.delta) == 2


def test_figures() -> None:
    """JSON doubles with every level, as objects and arrays must be told apart; brackets alone cost a little each."""
    assert [len(of_grammar(JSON, depth).delta) for depth in (1, 2, 3, 4)] == [101, 243, 527, 1095]
    assert len(of_grammar(SUM, 16).delta) <= 32
    deep = of_grammar(JSON, 4)
    assert deep.accepts(b'{"a":[1,{"b":[true]}]}') and deep.accepts(b"[" + b"1," * 50 + b"2]")
    assert not deep.accepts(b"[[[[[1]]]]]") and not deep.accepts(b'{"a":1,}')


WORDS = r"""
start: (word | call)+ [END]
call: word "(" [start ("," start)*] ")"
word: /[a-c]+/ | ESCAPED_STRING | "if"i
END: "." | "!"~2..3
%import common.ESCAPED_STRING
%import common.WS
%ignore WS
"""


@pytest.mark.parametrize(
    ("grammar", "seeds"),
    [
        (WORDS, ['ab "x\\"y" ( c , IF(a) )!!', "a(b(c)).", " a b\n", "iF if."]),
        (SUM, ["1+(2+3)+45", "((1))"]),
    ],
    ids=["words", "sum"],
)
def test_lark_parses_what_is_accepted(grammar: str, seeds: list[str]) -> None:
    """Texts that are members up to a change somewhere."""
    parser, automaton = lark.Lark(grammar, parser="earley", lexer="dynamic_complete"), of_grammar(grammar, 4)
    rnd, some = random.Random(0), set[str]()
    for text in seeds * 20:
        at = rnd.randrange(len(text) + 1)
        some |= {text, text[:at] + rnd.choice("".join(seeds)) + text[at + rnd.randrange(2) :]}

    def parsed(text: str) -> bool:
        try:
            parser.parse(text)
        except lark.LarkError:
            return False
        return True

    found = {text for text in sorted(some) if automaton.accepts(text.encode())}
    assert found == {text for text in sorted(some) if parsed(text)} and 2 < len(found) < len(some) - 2


@pytest.mark.parametrize(
    ("grammar", "depth", "says"),
    [
        (SUM, None, "start leads back to itself through atom; say how deep with max_depth"),
        ("start: word", 1, "Rule 'word' used but not defined"),
        ('begin: "a"', 1, "undefined rule"),
        ('start "a"', 1, "missing colon"),
        ("start: X\n%declare X", 1, "nothing says what X is"),
        ("start: /a(?=b)./", 1, "a look-ahead"),
        ("start: /[/", 1, "unterminated character set"),
        (JSON, 9, "more than 20000 states at max_depth=9"),
    ],
)
def test_refusals(grammar: str, depth: int | None, says: str) -> None:
    with pytest.raises(DllmError, match=re.escape(says)) as caught:
        of_grammar(grammar, depth)
    assert str(caught.value).startswith("grammar: ") and "\n" not in str(caught.value)


# -- calls ------------------------------------------------------------------------------------------------------------

PROMPT = "Tom has 12 apples. He buys 7 more. How many apples does he have?"


@pytest.fixture(scope="module")
def model() -> Any:
    return dllm.load("tiny", dtype="float64")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_a_grammar(model: Any, temperature: float) -> None:
    asked = [dllm.Constraint(grammar=SUM, max_depth=4), dllm.Constraint(grammar=JSON, max_depth=2)]
    call: dict[str, Any] = {"max_new_tokens": 12, "sampler": "threshold", "temperature": temperature}
    sums, document = dllm.generate(model, [PROMPT, PROMPT], constraint=asked, **call)
    assert re.fullmatch(r"[0-9+()]+", sums.text) and eval(re.sub(r"\b0+(?=[0-9])", "", sums.text)) >= 0
    json.loads(document.text)
    assert sums.stats["constraint"]["member"] and document.stats["constraint"]["member"]


def test_what_a_call_refuses(model: Any) -> None:
    for call, says in (
        ({"grammar": SUM}, "say how deep with max_depth"),
        ({"grammar": 3}, "must be the text of a grammar"),
        ({"constraint": {"grammar": 'start: "a" start "b"', "max_depth": 3}}, "has no member within max_depth=3"),
        ({"constraint": {"grammar": JSON, "max_depth": 0}}, "must be an integer of at least 1"),
        ({"grammar": "a" * 70_000}, "a text of 70000 bytes; at most 65536 are read"),
    ):
        with pytest.raises(DllmError, match=re.escape(says)):
            dllm.generate(model, PROMPT, max_new_tokens=4, **call)
