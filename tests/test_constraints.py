"""Constraints against brute force: every member of a small language is listed, and weighed."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter

import llguidance
import numpy as np
import pytest
import sweeps
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dllm.decoding import noise
from dllm.decoding.canvas import Canvas
from dllm.decoding.constraints import schema as schemas
from dllm.decoding.constraints.automaton import Vocabulary
from dllm.decoding.constraints.bound import Bound, Reach, Rule
from dllm.decoding.constraints.frame import by_class
from dllm.decoding.constraints.lift import lifted
from dllm.decoding.constraints.pattern import of_choices, of_pattern
from dllm.decoding.constraints.tables import Groups, Tables
from dllm.decoding.logprobs import Noting
from dllm.decoding.prediction import Law, Prediction
from dllm.errors import DllmError

MASK = -1


def rule_of(pattern, tokens, columns, ends=(), **more):
    automaton = lifted(of_pattern(pattern), Vocabulary.of([t.encode() for t in tokens]), ends, **more)
    return Rule((automaton,), columns, tuple(ends))


def canvas_of(rows, start=0):
    """Rows of ids, MASK where a column is open."""
    width = max(map(len, rows))
    ids = torch.tensor([[max(t, 0) for t in r] + [0] * (width - len(r)) for r in rows])
    masked = torch.tensor([[t == MASK for t in r] + [False] * (width - len(r)) for r in rows])
    length = torch.tensor([len(r) for r in rows])
    return Canvas(ids, masked, ~masked, torch.full_like(length, start), length, 10**6)


def bound_of(canvas, which=None, tail=None):
    zero = torch.zeros_like(canvas.start)
    return Bound(zero if which is None else torch.tensor(which), zero if tail is None else torch.tensor(tail))


def bind(rule, probs, rows, cols=None, law=Law(), seed=0, step=0):
    """The prediction under the rule; probs (B, L, V) of all columns, cols: those that are read."""
    canvas = canvas_of(rows)
    table = torch.as_tensor(probs, dtype=torch.float64).log()
    cols = torch.arange(table.shape[1]).expand(len(rows), -1) if cols is None else torch.tensor(cols)
    logits = table.gather(1, cols.clamp(min=0)[..., None].expand(-1, -1, table.shape[2]))
    keys = {"seed": torch.full((len(rows),), seed), "step": torch.full((len(rows),), step)}
    return rule.bind(Prediction(logits, cols, law=law, **keys), canvas, bound_of(canvas))


def alive(rule, row):
    canvas = canvas_of([row])
    return bool(rule.alive(canvas, bound_of(canvas)))


def members(accepts, probs, row):
    """Every member that agrees with a canvas, with the product of its columns' probabilities."""
    size = len(probs[0])
    choices = [range(size) if t == MASK else [t] for t in row]
    for word in itertools.product(*choices):
        if accepts(word):
            yield word, math.prod(p[v] for p, v, t in zip(probs, word, row, strict=True) if t == MASK)


ABC = ["a", "b", "c", ""]  # the last one ends
TABLE = [[0.6, 0.3, 0.05, 0.05], [0.5, 0.4, 0.05, 0.05], [0.1, 0.1, 0.5, 0.3], [0.05, 0.05, 0.2, 0.7]]


class TestByHand:
    """(ab|ba)c*, four columns, an end token."""

    rule = rule_of("(ab|ba)c*", ABC, 4, [3])
    row = [MASK] * 4

    def test_posterior(self):
        found = bind(self.rule, [TABLE], [self.row]).logits.softmax(-1)[0]
        want = torch.tensor(
            [[0.6154, 0.3846, 0, 0], [0.3846, 0.6154, 0, 0], [0, 0, 0.6818, 0.3182], [0, 0, 0.1515, 0.8485]]
        )
        assert torch.allclose(found, want.double(), atol=5e-5)

    @pytest.mark.parametrize(
        ("law", "want"), [(Law(), [0.6154, 0.6154, 0.6818, 0.8485]), (Law(0.5, filtered=True), None)]
    )
    def test_log_probabilities_of_what_is_written(self, law, want):
        pred = bind(self.rule, [TABLE], [self.row], law=law)
        token = torch.tensor([[0, 1, 2, 3]])
        noted = Noting(0, torch.float64).columns(canvas_of([self.row])).noted(pred, pred.cols, token)
        found = [math.exp(one.constrained) for one in noted.said([0, 1, 2, 3])]
        heat = {"abcE": 0.4988, "bacE": 0.1948, "abEE": 0.1796, "baEE": 0.0701, "abcc": 0.0407, "bacc": 0.0159}
        own = [sum(p for word, p in heat.items() if word[i] == sign) for i, sign in enumerate("abcE")]
        assert found == pytest.approx(want or own, abs=2e-4)
        assert [one.logprob for one in noted.said([0, 1])] == pytest.approx([math.log(0.6), math.log(0.4)])
        free = Noting(0, torch.float64).columns(canvas_of([self.row])).noted(pred.free, pred.cols, token)
        assert [one.constrained for one in free.said([0, 1])] == [None, None]

    def test_best_member(self):
        assert bind(self.rule, [TABLE], [self.row]).token.tolist() == [[0, 1, 2, 3]]

    def test_an_end_token_cannot_stand_where_no_member_ends(self):
        assert not alive(self.rule, [MASK, 3, MASK, MASK]) and alive(self.rule, [MASK, 1, MASK, MASK])

    def test_a_committed_column_decides_others(self):
        row = [MASK, 1, MASK, MASK]
        found = bind(self.rule, [TABLE], [row])
        assert found.logits.softmax(-1)[0, 0].tolist() == [1, 0, 0, 0]

    def test_free_columns(self):
        """What nobody has read weighs nothing, and still has room for what must follow."""
        found = bind(self.rule, [TABLE], [self.row], cols=[[0, 1]]).logits.softmax(-1)[0, 0]
        assert torch.allclose(found[:2], torch.tensor([0.6154, 0.3846]).double(), atol=5e-5)
        words = rule_of("ab|abcc", ABC, 4)
        found = bind(words, [TABLE], [self.row], cols=[[0, 1]])
        assert found.token.tolist() == [[0, 1]] and found.confidence.tolist() == [[1, 1]]

    def test_exact_lengths_without_an_end_token(self):
        rule = rule_of("(ab|ba)c*", ABC, 3)
        assert [alive(rule, [MASK] * n) for n in (1, 2, 3)] == [False, True, True]
        assert alive(rule, [MASK, MASK, 2]) and not alive(rule, [MASK, 2, MASK])

    @pytest.mark.parametrize(
        ("heat", "want"),
        [
            (0.5, [0.4988, 0.1948, 0.1796, 0.0701, 0.0407, 0.0159]),
            (1.0, [0.3263, 0.2040, 0.1958, 0.1224, 0.0932, 0.0583]),
            (2.0, [0.2419, 0.1912, 0.1873, 0.1481, 0.1293, 0.1022]),
        ],
    )
    def test_draws_follow_the_law_of_the_members(self, heat, want):
        """Chi-square of 4000 rows, a seed each: the product law at the temperature, given that a member comes out."""
        words = ["abcE", "bacE", "abEE", "baEE", "abcc", "bacc"]
        n, canvas = 4000, canvas_of([self.row] * 4000)
        logits = torch.tensor(TABLE).double().log().expand(n, -1, -1)
        cols = torch.arange(4).expand(n, -1)
        raw = Prediction(logits, cols, law=Law(heat), seed=torch.arange(n), step=torch.zeros(n, dtype=torch.long))
        drawn = self.rule.bind(raw, canvas, bound_of(canvas)).token.tolist()
        counts = Counter("".join("abcE"[t] for t in row) for row in drawn)
        assert set(counts) == set(words)
        assert sum((counts[w] - n * p) ** 2 / (n * p) for w, p in zip(words, want, strict=True)) < 20.5  # 5 dof, 0.1 %

    def test_a_draw_by_its_uniforms(self, monkeypatch):
        u = torch.tensor([[0.5, 0.5, 0.9, 0.3]]).double()
        monkeypatch.setattr(noise, "uniform", lambda seed, step, position, stream=0: u)
        assert bind(self.rule, [TABLE], [self.row], law=Law(1.0)).token.tolist() == [[0, 1, 3, 3]]


def random_case(rnd):
    """A language of short words over some tokens, a canvas, and probabilities."""
    tokens = ["a", "b", "ab", "ba", "c", ""][: rnd.choice([4, 5, 6])]
    ends = [len(tokens) - 1] if tokens[-1] == "" else []
    pattern = rnd.choice(["(ab|ba)c*", "a*b", "(a|ab)(c|bcb)*", "[ab]{2,5}", "(aab|ab*)c?", "((ab)*|b+)a?", "a?b?c?"])
    n = rnd.randrange(1, 6)
    probs = [[rnd.random() ** 3 + 1e-3 for _ in tokens] for _ in range(n)]
    return tokens, ends, pattern, [[p / sum(row) for p in row] for row in probs]


def text_member(pattern, tokens, ends):
    whole = re.compile(pattern)

    def accepts(word):
        said = list(itertools.takewhile(lambda t: t not in ends, word))
        rest = word[len(said) :]
        return all(t in ends for t in rest) and bool(whole.fullmatch("".join(tokens[t] for t in said)))

    return accepts


@pytest.mark.parametrize("seed", range(60))
def test_posterior_and_best_member_against_all_members(seed):
    rnd = random.Random(seed)
    tokens, ends, pattern, probs = random_case(rnd)
    rule, accepts = rule_of(pattern, tokens, len(probs), ends), text_member(pattern, tokens, ends)
    row = [MASK] * len(probs)
    found = list(members(accepts, probs, row))
    for t in rnd.sample(range(len(row)), rnd.randrange(len(row))) if found else ():
        row[t] = rnd.choice(found)[0][t]
    found = list(members(accepts, probs, row))
    assert alive(rule, row) == bool(found)
    if not found:
        return
    pred = bind(rule, [probs], [row])
    total = sum(weight for _, weight in found)
    for i, t in enumerate(row):
        if t == MASK:
            want = [sum(w for word, w in found if word[i] == v) / total for v in range(len(tokens))]
            assert pred.logits[0, i].softmax(-1).tolist() == pytest.approx(want, abs=1e-12)
    word, _ = max(found, key=lambda f: f[1])
    assert [t for t, open_ in zip(pred.token[0].tolist(), row, strict=True) if open_ == MASK] == [
        t for t, open_ in zip(word, row, strict=True) if open_ == MASK
    ]
    star = pred.token[0].tolist()
    columns = [(t, s) if t == MASK else (t,) for t, s in zip(row, star, strict=True)]
    canvas = canvas_of([list(some) for some in itertools.product(*columns)])
    assert rule.alive(canvas, bound_of(canvas)).all()  # any subset of one member may be committed


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100))
def test_draws_of_random_languages_follow_their_law(seed):
    """Chi-square of 4000 rows against all members, at a drawn temperature; members that are rare share a bin."""
    rnd = random.Random(5000 + seed)
    tokens, ends, pattern, probs = random_case(rnd)
    rule, accepts = rule_of(pattern, tokens, len(probs), ends), text_member(pattern, tokens, ends)
    n, heat, row = 4000, rnd.choice([0.5, 1.0, 2.0]), [MASK] * len(probs)
    weights = {word: weight ** (1 / heat) for word, weight in members(accepts, probs, row)}
    if len(weights) < 2:
        return
    law = {word: w / sum(weights.values()) for word, w in weights.items()}
    canvas = canvas_of([row] * n)
    logits = torch.tensor(probs).double().log().expand(n, -1, -1)
    keys = {"seed": torch.arange(n), "step": torch.zeros(n, dtype=torch.long)}
    raw = Prediction(logits, torch.arange(len(row)).expand(n, -1), law=Law(heat), **keys)
    counts = Counter(map(tuple, rule.bind(raw, canvas, bound_of(canvas)).token.tolist()))
    assert counts.keys() <= law.keys()
    bins = [(counts[w], n * p) for w, p in law.items() if n * p >= 5]
    bins.append((n - sum(c for c, _ in bins), max(n - sum(e for _, e in bins), 1e-9)))
    bins = bins if bins[-1][1] >= 5 else bins[:-1]
    statistic = sum((c - e) ** 2 / e for c, e in bins)
    assert len(bins) < 2 or chi2.sf(statistic, len(bins) - 1) > 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_draws_with_filters_are_members(seed):
    """top-p and top-k cut each column, and what they leave of all columns may have no member: one is let in."""
    rnd = random.Random(1000 + seed)
    tokens, ends, pattern, probs = random_case(rnd)
    rule, accepts = rule_of(pattern, tokens, len(probs), ends), text_member(pattern, tokens, ends)
    row = [MASK] * len(probs)
    if not alive(rule, row):
        return
    for draw in range(8):
        law = Law(rnd.choice([0.5, 1.0, 1.7]), *rnd.choice([(0.6, None), (None, 1), (0.8, 2)]), filtered=draw % 2 == 0)
        pred = bind(rule, [probs], [row], law=law, seed=draw)
        assert accepts(pred.token[0].tolist())
        assert pred.confidence.shape == (1, len(row)) and not pred.confidence.isnan().any()


def test_rows_of_a_batch_do_not_know_each_other():
    """Automata of different sizes, windows of different lengths, prompts of different lengths."""
    tokens = ["a", "b", "ab", "c", ""]
    automata = [
        lifted(of_pattern(p), Vocabulary.of([t.encode() for t in tokens]), [4])
        for p in ("(ab|ba)c*", "a{1,3}(b|c)?", "[abc]{0,30}c")
    ]
    rnd, rows, which, starts = random.Random(0), [], [0, 2, 1, 2], [0, 2, 1, 0]
    rows = [[3] * s + [MASK] * n for s, n in zip(starts, [4, 3, 4, 6], strict=True)]
    probs = [[[rnd.random() for _ in tokens] for _ in range(6)] for _ in rows]
    for law in (Law(), Law(0.7), Law(0.7, 0.8)):

        def run(some, law=law):
            rule = Rule(tuple(automata[which[i]] for i in some), 6, (4,))
            canvas = canvas_of([rows[i] for i in some])
            canvas = canvas._replace(start=torch.tensor([starts[i] for i in some]))
            logits = torch.tensor([probs[i] for i in some]).double().log()[:, : canvas.ids.shape[1]]
            cols = torch.arange(logits.shape[1]).expand(len(some), -1)
            seed = torch.tensor([i for i in some])
            raw = Prediction(logits, torch.where(cols < canvas.length[:, None], cols, -1), law=law, seed=seed)
            pred = rule.bind(raw, canvas, bound_of(canvas, list(range(len(some)))))
            return [
                (pred.logits[k, : len(rows[i])], pred.token[k, : len(rows[i])], pred.confidence[k, : len(rows[i])])
                for k, i in enumerate(some)
            ]

        together = run([0, 1, 2, 3])
        for i, (logits, token, confidence) in enumerate(together):
            ((alone, own, sure),) = run([i])
            assert torch.equal(logits, alone) and torch.equal(token, own) and torch.equal(confidence, sure)


@pytest.mark.parametrize("seed", range(20))
def test_holes_each_hold_a_member(seed):
    """Against all that holes may hold, some columns of them committed: posterior and best, and what is possible."""
    rnd = random.Random(2000 + seed)
    tokens, _, pattern, _ = random_case(rnd)
    tokens = [t for t in tokens if t]
    sizes = [rnd.randrange(1, 4) for _ in range(rnd.randrange(1, 4))]
    given = [x for size in sizes for x in [False] * size + [True] * rnd.randrange(1, 3)][: rnd.choice([-1, 99])]
    one = lifted(of_pattern(pattern), Vocabulary.of([t.encode() for t in tokens]))
    rule, whole = Rule((one.for_holes(),), len(given)), text_member(pattern, tokens, [])
    probs = [[rnd.random() + 1e-3 for _ in tokens] for _ in given]
    row = [rnd.randrange(len(tokens)) if g or rnd.random() < 0.2 else MASK for g in given]
    tail = len(given) - max(i + 1 for i, g in enumerate(given) if not g)
    canvas = canvas_of([row])._replace(frozen=torch.tensor([given]))
    bound = bound_of(canvas, tail=[tail])

    def accepts(word):
        runs = itertools.groupby(zip(word, given, strict=True), key=lambda pair: pair[1])
        return all(frozen or whole([t for t, _ in run]) for frozen, run in runs)

    found = list(members(accepts, probs, row))
    assert bool(rule.alive(canvas, bound)) == bool(found)
    assert one.lengths(3) == [n for n in range(4) if any(map(whole, itertools.product(range(len(tokens)), repeat=n)))]
    if not found:
        return
    table, cols = torch.tensor([probs], dtype=torch.float64).log(), torch.arange(len(given))[None]
    pred, total = rule.bind(Prediction(table, cols), canvas, bound), sum(weight for _, weight in found)
    best = max(found, key=lambda f: f[1])[0]
    for i in [i for i, t in enumerate(row) if t == MASK]:
        want = [sum(w for word, w in found if word[i] == v) / total for v in range(len(tokens))]
        assert pred.logits[0, i].softmax(-1).tolist() == pytest.approx(want, abs=1e-12)
        assert int(pred.token[0, i]) == best[i]
    word = [int(t) if own == MASK else own for t, own in zip(pred.token[0], row, strict=True)]
    left = [MASK if own == MASK and rnd.random() < 0.5 else t for t, own in zip(word, row, strict=True)]
    assert accepts(word) and bool(rule.alive(canvas_of([left])._replace(frozen=canvas.frozen), bound))


def test_half_characters_and_their_other_halves():
    """Tokens may end inside of a character; the column beside it then has to finish it."""
    pieces = [
        "é".encode()[:1],
        "é".encode()[1:],
        "😀".encode()[:2],
        "😀".encode()[2:],
        "é".encode(),
        "😀".encode(),
        b"a",
    ]
    automaton = lifted(of_pattern("(😀|é){1,3}"), Vocabulary.of(pieces))
    rule = Rule((automaton,), 3)
    assert automaton.accepts([0, 1]) and automaton.accepts([2, 3, 4]) and not automaton.accepts([2, 1])
    pred = bind(rule, [[[1 / 7] * 7] * 3], [[MASK, 3, MASK]])
    assert pred.token[0, 0] == 2 and pred.confidence[0, 0] == 1
    assert not alive(rule, [3, MASK, MASK])


def test_strings_to_choose_from():
    automaton = of_choices([b"yes", b"no", b"yesterday", b"maybe not"])
    assert all(automaton.accepts(t) for t in (b"yes", b"yesterday", b"maybe not"))
    assert not any(automaton.accepts(t) for t in (b"", b"yest", b"nono", b"maybe"))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("(a|ab)c?", "a ab ac abc", "b c"),  # the longer branch counts, too
        ("(yes|yesterday)", "yes yesterday", "yest"),
        ("[0-9]+(\\.[0-9]+)?", "1 1.0", "1. .5"),
        ("[]a]+", "] a]", "b"),
        ("[^]a]+", "b é", "] a"),
        ("^a\\$$", "a$", "a"),
        ("\\u00e9|\\x41", "é A", "x"),
        ("(?i:ab)c", "ABc aBc", "abC"),
        (".{2}", "éa 中😀", "a\n"),
        ("a*?b", "b aab", "a"),
        ("a{}{1,2}", "a{} a{}}", "a aa"),
    ],
)
def test_patterns(pattern, yes, no):
    automaton = of_pattern(pattern)
    assert [t for t in yes.split(" ") if not automaton.accepts(t.encode())] == []
    assert [t for t in no.split(" ") if automaton.accepts(t.encode())] == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"\bfoo", "a word boundary at position 0"),
        (r"(a)\1", "a back-reference at position 3"),
        ("a^b", "an anchor inside of it at position 1"),
        ("[[:alpha:]]", "a POSIX class at position 1"),
        ("x(?<=a)b", "a look-behind at position 1"),
        ("(?!a)b", "a look-ahead at position 0"),
        (r"\p{L}", "a Unicode property at position 0"),
        ("(?#c)a", "a comment at position 0"),
        ("(?>ab)", "an atomic group at position 0"),
        ("a++", "a possessive quantifier at position 1"),
        ("[a+]{2}+", "a possessive quantifier at position 4"),
        ("a**", "multiple repeat at position 2"),
        ("a(?i)b", "global flags not at the start"),
        (r"\ud83d\ude00", "half a character (a surrogate) at position 0"),
        ("a{x}", "put a backslash before signs that stand for themselves"),
        ("[]", "unterminated character set at position 0"),
        ("(", "missing ), unterminated subpattern at position 0"),
    ],
)
def test_patterns_that_are_refused(pattern, says):
    with pytest.raises(DllmError, match=re.escape(says)) as caught:
        of_pattern(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"anyOf": []}, "anyOf must be a list that is not empty"),
        ({"oneOf": [{"type": "null"}]}, "oneOf cannot be enforced here (anyOf can); leave it out"),
        ({"type": "array", "prefixItems": []}, "prefixItems cannot be enforced"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}},
            "at a: minimum cannot be enforced",
        ),
        ({"type": "string", "const": 3}, 'const has no value of type "string"'),
        ({"type": "object", "properties": ["a"]}, "properties must be a mapping"),
        ({"type": "object", "required": "a"}, "required must be a list of names"),
        ({"type": "string", "minLength": "x"}, "minLength='x' must be an integer of at least 0"),
        ({"type": "string", "pattern": 3}, "pattern 3 must begin with ^"),
        ({"type": "string", "pattern": "^a\\$"}, "must begin with ^ and end with $"),
        ({"type": "string", "format": "date", "pattern": "^a$"}, "pattern cannot be enforced"),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, "'#a' is no path within the schema"),
        ({"const": math.nan}, "nan is no value of JSON"),
        ({"$ref": "#"}, "# refers to itself; say how deep with max_depth"),
        ({"type": "nul"}, "not 'nul'"),
    ],
)
def test_schemas_that_are_refused(schema, says):
    with pytest.raises(DllmError, match=re.escape(says)) as caught:
        schemas.pattern(schema)
    assert str(caught.value).startswith("json_schema") and "\n" not in str(caught.value)


def test_a_type_holds_beside_listed_values():
    assert schemas.pattern({"type": ["string", "null"], "enum": ["a", 1, True, None]}) == r"(?:\"a\"|null)"


# -- patterns against another reader of them --------------------------------------------------------------------------

ATOMS = st.sampled_from(["a", "b", "é", "😀", ".", "[ab]", "[^a]", "[^é]", "[0-9]", "ab", "(?:a|ab)", "(?:b|bé)"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(lambda x: f"(?:{x[0]}){x[1]}"),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda x: f"(?:{x[0]}|{x[1]})"),
    ),
    max_leaves=6,
)
BYTES = llguidance.LLTokenizer("byte")


TEXTS = st.lists(st.text("abé😀0\n", max_size=7), min_size=8, max_size=8)


@given(PATTERNS, TEXTS)
@settings(max_examples=60)
def test_patterns_against_llguidance_and_re(pattern, texts):
    agree(pattern, texts)


@pytest.mark.sweep
def test_many_patterns_against_llguidance_and_re():
    given(PATTERNS, TEXTS)(settings(max_examples=sweeps.size(3000, 200))(agree))()


def agree(pattern, texts):
    """Ours, llguidance's and Python's reading of the same texts."""
    automaton, grammar = of_pattern(pattern), llguidance.LLMatcher.grammar_from_regex(pattern)
    for text in texts:
        matcher = llguidance.LLMatcher(BYTES, grammar)
        read = matcher.try_consume_tokens(list(text.encode()))
        theirs = read == len(text.encode()) and matcher.is_accepting()
        assert automaton.accepts(text.encode()) == theirs == bool(re.fullmatch(pattern, text)), (pattern, text)


VOCABULARY = ["a", "b", "ab", "ba", "é", "bé", "0", ""]


@given(PATTERNS, st.lists(st.integers(0, 6), max_size=5))
@settings(max_examples=80)
def test_tokens_spell_what_bytes_do(pattern, word):
    automaton = of_pattern(pattern)
    tokens = lifted(automaton, Vocabulary.of([t.encode() for t in VOCABULARY]), [7])
    whole = automaton.accepts("".join(VOCABULARY[t] for t in word).encode())
    assert tokens.accepts(word) == tokens.accepts([*word, 7, 7]) == whole


@given(PATTERNS, st.integers(1, 5), st.data())
@settings(max_examples=80)
def test_no_dead_canvas_after_commits_and_remasks(pattern, columns, data):
    """Whatever subset of a member is committed, and whatever is masked again, a member is still possible."""
    rule = rule_of(pattern, VOCABULARY, columns, [7])
    row = [MASK] * columns
    if not alive(rule, row):
        return
    for step in range(4):
        cols = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, max_size=columns, unique=True))
        probs = [[data.draw(st.floats(0.01, 1)) for _ in VOCABULARY] for _ in range(columns)]
        law = data.draw(st.sampled_from([Law(), Law(0.7), Law(1.0, 0.5)]))
        pred = bind(rule, [probs], [row], cols=[sorted(cols)], law=law, step=step)
        for i, token in zip(sorted(cols), pred.token[0].tolist(), strict=True):
            if row[i] == MASK and data.draw(st.booleans()):
                row[i] = token
        assert alive(rule, row), row
        row = [MASK if data.draw(st.integers(0, 4)) == 0 else t for t in row]
        assert alive(rule, row), row


# -- what a step looks at ---------------------------------------------------------------------------------------------


def document(tokens):
    """An automaton with sets of many classes, states that many edges enter, and strings of several lengths."""
    pattern = '\\{"n": -?[0-9]{1,4}, "s": "[a-z ]{0,6}"\\}'
    return lifted(of_pattern(pattern), Vocabulary.of([t.encode() for t in tokens]), [len(tokens) - 1])


JSON = [*'{}":, -0123456789abcdef', "ab", "cde", "a b", '{"', '": ', '", "', '"}', "12", "345", "e f", "n", "s", ""]


def seen(rule, rows, reads, logits, reach, law=Law()):
    canvas = canvas_of(rows)
    cols = torch.tensor(reads)
    z = logits.gather(1, cols.clamp(min=0)[..., None].expand(-1, -1, logits.shape[2]))
    raw = Prediction(z, cols, law=law, seed=torch.arange(len(rows)), step=torch.zeros(len(rows), dtype=torch.long))
    pred = rule.bind(raw, canvas, bound_of(canvas), reach)
    return [x[cols >= 0] for x in (pred.logits, pred.token, pred.confidence)]


@pytest.mark.parametrize("law", [Law(), Law(0.8)])
def test_what_the_host_knows_of_a_step_changes_no_bit(law):
    """Rows whose columns begin and end elsewhere, in tables that are cut to them, rounded up, or of all columns."""
    rule, columns = Rule((document(JSON),), 40, (len(JSON) - 1,)), 40
    logits = torch.randn(2, columns, len(JSON), generator=torch.Generator().manual_seed(0)).double()
    rows = [[JSON.index(t) for t in ('{"', "n", '": ', "1")] + [MASK] * 36, [MASK] * columns]
    reads = [[*range(4, 14)], [*range(10)]]
    whole = seen(rule, rows, reads, logits, None, law)
    for reach in (Reach(10, False), Reach(16, False), Reach(10), Reach(40, False)):
        assert all(torch.equal(a, b) for a, b in zip(whole, seen(rule, rows, reads, logits, reach, law), strict=True))
    for i in range(2):
        alone = seen(rule, rows[i : i + 1], reads[i : i + 1], logits[i : i + 1], Reach(10, False))
        together = seen(rule, rows, reads, logits, Reach(24, False))
        assert all(torch.equal(a, b[10 * i : 10 * i + 10]) for a, b in zip(alone, together, strict=True))


def test_what_is_read_behind_columns_that_are_not():
    """Of them the better branch counts, not the one with more completions; the others there are legal, and weighed."""
    rule = rule_of("a(bb|cc|dd|ee)x|f(bb)y", [*"abcdefxy"], 4)
    probs = [[1 / 8] * 8 for _ in range(4)]
    probs[3][7] = 3 / 8  # y
    found = bind(rule, [probs], [[MASK] * 4], cols=[[0, 3]])
    assert found.logits.softmax(-1)[0, 0, [0, 5]].tolist() == pytest.approx([0.25, 0.75])
    assert found.token.tolist() == [[5, 7]]


def test_sums_of_groups_are_in_one_order_on_every_device():
    index = np.random.default_rng(0).integers(0, 9, (2, 2, 400))
    x = torch.rand(3, 2, 2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = Groups.of(index, 10)
    want = (x[..., None] * F.one_hot(torch.from_numpy(index), 10)).sum(3)
    for found in (groups.sum(x), groups.folded(x)):
        assert torch.allclose(found, want, rtol=1e-14, atol=0)
    padded = Groups.of(np.pad(index[:1], ((0, 0), (0, 0), (0, 70)), constant_values=9), 10)
    more = torch.cat([x[:, :1], torch.zeros(3, 1, 2, 70).double()], 3)
    for way in (Groups.sum, Groups.folded):
        assert torch.equal(way(padded, more), way(Groups.of(index[:1], 10), x[:, :1]))


@pytest.mark.parametrize("heat", [1.0, 0.7])
def test_classes_of_a_forward_against_each_of_their_tokens(heat):
    tokens = [f"{i:03d}" for i in range(300)] + ["a", "b", "ab", ""]
    automaton = lifted(of_pattern("[0-9]+(ab?)?"), Vocabulary.of([t.encode() for t in tokens]), [303])
    tables, z = (
        Tables.of([automaton], 4, [303]).of_rows(torch.zeros(2, dtype=torch.long)),
        torch.randn(2, 304).double().round(decimals=1),
    )  # with ties
    z[1, :40] = -torch.inf
    z[1, 300] = -torch.inf  # all that this class has
    top, times, token = by_class(z, tables.places, tables.absent, tables.runs, heat)
    for row in range(2):
        for c in range(1, automaton.count):
            own = np.flatnonzero(automaton.classes == c)
            best = z[row, own].max()
            assert top[row, c] == best / heat
            if best > -torch.inf:
                assert times[row, c].item() == pytest.approx(((z[row, own] - best) / heat).exp().sum().item())
                assert token[row, c] == own[int((z[row, own] == best).nonzero()[0, 0])]
