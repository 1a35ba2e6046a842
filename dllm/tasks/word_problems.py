"""Word problems: stories of amounts, with worked lines.

Amounts stay within 1..60: they change by 1..9, by a product of at most 10, or are doubled or tripled. A model of a
million parameters learns that many sums by heart in an hour on two cores, and the worked lines are still to be found.
"""

from __future__ import annotations

import random
import re

from dllm.tasks.base import Example

MOST = 60
PRODUCTS = [(a, b) for a in range(2, 6) for b in range(2, 6) if a * b <= 10]
HE = (
    "Tom", "Ben", "Sam", "Leo", "Max", "Jack", "Omar", "Ivan", "Paul", "Luis", "Noah", "Adam", "Eric", "Hugo",
    "Liam", "Finn", "Carl", "Dan", "Karl", "Amir", "John", "Bob", "James", "Peter", "Mike", "David", "Tim", "Joe",
    "Alex", "Nick",
)  # fmt: skip
SHE = (
    "Ana", "Mia", "Eva", "Zoe", "Lily", "Emma", "Nora", "Rosa", "Sara", "Maya", "Ella", "Ruth", "Lucy", "Anna",
    "Kate", "Jane", "Lena", "Nina", "Olga", "Ines", "Alice", "Mary", "Sarah", "Julia", "Laura", "Clara", "Amy",
    "Sue", "Jill", "Betty",
)  # fmt: skip
ITEMS = (
    "apples", "pears", "books", "pens", "coins", "stamps", "marbles", "cards", "eggs", "shells", "stickers",
    "balls", "cookies", "flowers", "oranges", "lemons", "stones", "candles", "toys", "beads", "plums", "cups",
    "buttons", "pencils", "peaches", "tickets", "nuts", "keys", "roses", "muffins", "dollars", "bananas",
    "cherries", "cakes", "sweets", "dolls", "cars", "rocks", "hats", "fish",
)  # fmt: skip
BOXES = ("bags", "boxes", "packs", "baskets", "jars", "crates")
GAIN = ("buys", "finds", "gets", "wins", "collects", "receives")
LOSE = ("eats", "loses", "sells", "gives away", "drops", "uses")


class _Story:
    """Accumulates the sentences of a problem and the lines of its solution."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        he = rng.random() < 0.5
        self.name = rng.choice(HE if he else SHE)
        self.pronoun = "he" if he else "she"
        self.item = rng.choice(ITEMS)
        self.amount = rng.randint(2, 40)
        self.text = [f"{self.name} has {self.amount} {self.item}."]
        self.lines: list[str] = []
        self.key = [str(self.amount)]

    def say(self, rest: str, then: bool = True) -> None:
        """One sentence about the hero, opened by a name, a pronoun or `Then`."""
        opening = self.rng.choice((self.name, self.pronoun.capitalize(), f"Then {self.pronoun}"))
        self.text.append(f"{opening} {rest}.")

    def work(self, subject: str, a: int, op: str, b: int) -> int:
        """One worked line; the numbers and the operator enter the key."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        self.lines.append(f"{subject} {a} {op} {b} = {result} {self.item}.")
        self.key.append(f"{op}{b}")
        return result

    def change(self, op: str, by: int) -> None:
        self.amount = self.work(f"{self.name} has", self.amount, op, by)


def _gain(s: _Story) -> bool:
    k = s.rng.randint(1, 9)
    if s.amount + k > MOST:
        return False
    more = s.rng.choice(("more", s.item, f"more {s.item}"))
    s.say(f"{s.rng.choice(GAIN)} {k} {more}")
    s.change("+", k)
    return True


def _lose(s: _Story) -> bool:
    k = s.rng.randint(1, 9)
    if s.amount - k < 1:
        return False
    s.say(f"{s.rng.choice(LOSE)} {k}" + s.rng.choice(("", f" {s.item}", " of them")))
    s.change("-", k)
    return True


def _groups(s: _Story) -> bool:
    a, b = s.rng.choice(PRODUCTS)
    gain = s.rng.random() < 0.6
    if not 1 <= s.amount + (a * b if gain else -a * b) <= MOST:
        return False
    box = s.rng.choice(BOXES)
    s.say(f"{s.rng.choice(GAIN if gain else LOSE)} {a} {box} of {b} {s.item} each")
    total = s.work("They hold", a, "*", b)
    s.change("+" if gain else "-", total)
    return True


def _times(s: _Story) -> bool:
    k = s.rng.choice((2, 3))
    if s.amount * k > MOST:
        return False
    s.say(s.rng.choice((f"{('doubles', 'triples')[k - 2]} the number of {s.item}", f"ends up with {k} times as many")))
    s.change("*", k)
    return True


EVENTS = (_gain, _gain, _gain, _lose, _lose, _lose, _groups, _groups, _times)


def _question(s: _Story, question: str, optional: bool = True) -> None:
    if not (optional and s.rng.random() < 0.25):
        s.text.append(question)


def _chain(s: _Story) -> int:
    """Events that change one amount; sometimes it is shared out at the end."""
    target = s.rng.choices((1, 2, 3), (20, 45, 35))[0]
    done = 0
    while done < target and len(s.lines) < 4:
        if len(s.lines) == 3 or ((event := s.rng.choice(EVENTS)) is _groups and len(s.lines) > 2):
            event = s.rng.choice((_gain, _lose))
        done += event(s)
    shares = [k for k in (2, 3, 4, 5) if s.amount % k == 0]
    if shares and len(s.lines) < 4 and s.rng.random() < 0.2:
        k = s.rng.choice(shares)
        s.say(f"shares them equally among {k} friends")
        _question(s, f"How many {s.item} does each friend get?")
        return s.work("Each gets", s.amount, "/", k)
    ending = s.rng.choice(("have now", "have left", "have in the end", "have"))
    _question(s, f"How many {s.item} does {s.name} {ending}?")
    return s.amount


def _compare(s: _Story) -> int:
    """Two people; the second amount is told by the first; sometimes both are added."""
    other = s.rng.choice([n for n in HE + SHE if n != s.name])
    mine = s.rng.randint(2, 12)
    s.text, s.key, s.amount = [f"{s.name} has {mine} {s.item}."], ["compare", str(mine)], mine
    kind = s.rng.choice(("more", "fewer", "times"))
    if kind == "fewer" and mine < 3:
        kind = "more"
    if kind == "times":
        k = s.rng.choice((2, 3))
    else:
        k = s.rng.randint(1, min(9, mine - 1) if kind == "fewer" else 9)
    how = f"{k} times as many {s.item} as" if kind == "times" else f"{k} {kind} {s.item} than"
    s.text.append(f"{other} has {how} {s.name}.")
    theirs = s.work(f"{other} has", mine, {"more": "+", "fewer": "-", "times": "*"}[kind], k)
    if s.rng.random() < 0.6:
        they = s.rng.choice(("they", f"{s.name} and {other}"))
        _question(s, f"How many {s.item} do {they} have together?", optional=False)
        return s.work("They have", mine, "+", theirs)
    _question(s, f"How many {s.item} does {other} have?")
    return theirs


def draw_word_problem(rng: random.Random) -> Example:
    """One to four worked lines, then `#### result`, as in GSM8K (arXiv 2110.14168)."""
    s = _Story(rng)
    result = (_compare if rng.random() < 0.2 else _chain)(s)
    answer = "\n".join([*s.lines, f"#### {result}"])
    return Example(" ".join(s.text), answer, {"key": " ".join(s.key), "answer": result, "steps": len(s.lines)})


def grade_word_problem(example: Example, text: str) -> bool:
    """True where the last `#### number` is the result."""
    found = re.findall(r"####\s*(-?\d+)", text)
    return bool(found) and int(found[-1]) == example.meta["answer"]
