"""A trained pair head: what it learns, how it is stored, and that it changes no text."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from drafting_kit import VOCAB, from_columns, plain, tiny_verifier
from typer.testing import CliRunner

import dllm
from dllm.bench import pairs as bench
from dllm.bench import paths
from dllm.cli import app
from dllm.drafting import Fallback
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.hooks.candidates import assisted_by
from dllm.drafting.lattice import Lattice, build
from dllm.drafting.pair_head import PairHead, as_pair_head
from dllm.drafting.pairs import Pairs
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.training import pair_heads
from dllm.training.config import PairHeadConfig
from dllm.training.data import Pair

torch.set_num_threads(1)
PROMPT = "Tom has 12 apples. He buys 7 more."


@pytest.fixture(scope="module")
def verifier():
    return as_verifier("tiny-ar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, verifier):
    """A head of random scores, strong enough to turn every path."""
    g = torch.Generator().manual_seed(0)
    made = tmp_path_factory.mktemp("head")
    PairHead(*(10 * torch.randn(2, verifier.vocab, 4, generator=g))).save(made, {"law": "mass"})
    return str(made)


def test_a_head_adds_the_product_of_its_rows_and_keeps_the_mass():
    g = torch.Generator().manual_seed(3)
    head = PairHead(*torch.randn(2, 9, 4, generator=g))
    lat = head.over(build(torch.randn(3, 9, generator=g), 5, tau_mass=1.0, m_max=4), 7)
    lat.check()
    for j, b in ((0, 0), (2, 3)):
        a = 0 if j == 0 else 1
        before = 7 if j == 0 else int(lat.tokens[j - 1, a])
        s = lat.logp[j] + head.successor[lat.tokens[j]] @ head.predecessor[before]
        expected = (s - s.logsumexp(0) + lat.logp[j].logsumexp(0))[b]
        assert float(lat.pairs.logq[j, a, b]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"search": "argmax"}, {"tree": 4}, {"carry": "always"}])
def test_a_pair_head_changes_the_rounds_and_not_the_text(verifier, folder, options):
    own, with_head = (
        dllm.speculate(verifier, "tiny", PROMPT, max_new_tokens=24, length="fixed:k=6", pair_head=head, **options)
        for head in (None, folder)
    )
    assert with_head.sequences == own.sequences == plain(verifier.model, own.sequences[: own.prompt_length], 24)
    assert with_head.n_verify > own.n_verify, "random scores spoil the drafts"


class Ahead(Drafter):
    """Drafts as if another token came first: no candidate of its first slot is right, and a wrong token leads wherever
    the right one is the second."""

    name = "ahead"

    def __init__(self, text, wrong):
        self.text, self.wrong = text, wrong

    def draft(self, ids, k, *, generator=None):
        columns = [[(self.wrong, -0.3), (t, -1.5 if i else -20.0)] for i, t in enumerate(self.text[len(ids) :][:k])]
        return from_columns([[(self.wrong, -0.3)], *columns[1:]] if columns else [], len(ids))


def test_the_rest_of_a_draft_is_weighed_by_the_token_that_came_in_place_of_its_first():
    """FlexDraft's calibration by the bonus token: a draft that was made before it was known is mended behind it, though
    it is no candidate."""
    model = tiny_verifier()
    text = plain(model, [5, 9, 2], 24)
    wrong = next(t for t in range(3, VOCAB) if t not in text)
    follows = torch.zeros(VOCAB, VOCAB)
    follows[text[:-1], text[1:]] = 9.0
    accepted = {}
    for head in (None, PairHead(torch.eye(VOCAB), follows.T.contiguous())):
        options = {"search": "argmax", "length": "fixed:k=4", "carry": "always", "pair_head": head}
        got = dllm.speculate(model, Ahead(text, wrong), [5, 9, 2], max_new_tokens=24, **options)
        assert got.sequences == text
        accepted[head is None] = [r.accepted for r in got.rounds if r.carried]
    assert set(accepted[True]) == {0}  # the first slot of what is carried over is wrong, and ends it
    assert accepted[False] and all(n > 0 for n in accepted[False])


def test_a_sampled_draft_over_pairs_repeats_under_a_seed(verifier, folder):
    call = dict(max_new_tokens=12, temperature=0.8, seed=3, pair_head=folder, length="fixed:k=6")
    for tree in (0, 6):
        search = "sample_tree:width=2" if tree else None
        one, two = (dllm.speculate(verifier, "tiny", PROMPT, tree=tree, search=search, **call) for _ in range(2))
        assert one.sequences == two.sequences and {r.kind for r in one.rounds} <= {"sampled", "none"}


def test_every_front_takes_the_folder(verifier, folder):
    ids = torch.tensor([verifier.tokenizer(PROMPT)["input_ids"]])
    call = dict(max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids))
    text = verifier.model.generate(ids, **call)
    spec, results = {"pair_head": folder}, []
    hooked = dict(custom_generate=dllm.spec_generate, drafter="tiny", spec=spec, spec_results=results)
    assert verifier.model.generate(ids, **call, **hooked).tolist() == text.tolist() and results
    cfg = dllm.drafting.SpecConfig(length="fixed:k=4", pair_head=folder)
    with assisted_by(verifier.model, "tiny", cfg) as candidates:
        assert verifier.model.generate(ids, **call).tolist() == text.tolist()
    assert candidates.head is as_pair_head(folder)
    ran = CliRunner().invoke(app, ["speculate", PROMPT, "--pair-head", folder, "-n", "6", "--compare"])
    assert ran.exit_code == 0 and "yes" in ran.output, ran.output


def test_heads_that_cannot_be_used_are_one_clear_line(verifier, folder, tmp_path):
    def speculate(head, drafter="tiny"):
        return dllm.speculate(verifier, drafter, PROMPT, max_new_tokens=4, pair_head=head)

    with pytest.raises(DllmError, match="PairHead or the path"):
        as_pair_head(3)
    with pytest.raises(DllmError, match="no pair head in"):
        speculate(str(tmp_path))
    with pytest.raises(DllmError, match="no pair head but a"):
        speculate("dllm/assets/tiny")
    with pytest.raises(DllmError, match="knows 9 ids"):
        speculate(PairHead(torch.zeros(9, 2), torch.zeros(9, 2)))
    with pytest.raises(DllmError, match="no drafter"):
        speculate(folder, None)
    for name in (verifier.model, "suffix", "lookup", "recycle", "stand"):
        with pytest.raises(DllmError, match="drafts finished tokens, has none: leave out pair_head"):
            speculate(folder, name)
    cfg = dllm.drafting.SpecConfig(length="fixed:k=4", pair_head=folder)
    with assisted_by(verifier.model, "suffix", cfg), pytest.raises(DllmError, match="'suffix', which drafts finished"):
        verifier.model.generate(torch.tensor([[5, 9, 8]]), max_new_tokens=2, do_sample=False)
    model = as_drafter("tiny")
    mixed = dllm.speculate(verifier, Fallback(model), PROMPT, max_new_tokens=8, pair_head=folder)
    assert mixed.sequences == dllm.speculate(verifier, None, PROMPT, max_new_tokens=8).sequences
    PairHead(*torch.randn(2, 9, 4)).save(tmp_path, {})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(DllmError, match="truncated or no safetensors"):
        as_pair_head(tmp_path)
    PairHead(*torch.randn(2, 9, 4)).save(tmp_path, {"rank": 5})
    with pytest.raises(DllmError, match="damaged"):
        as_pair_head(tmp_path)


# -- training

CONFIG = PairHeadConfig("", tasks={"word_problems": 4}, block=4, steps=12, batch_size=4, candidates=4, rank=4)


@pytest.fixture(scope="module")
def drafter(verifier):
    made = as_drafter("tiny").fork()
    made.reset([], Need(verifier.vocab, verifier.eos, tokenizer=verifier.tokenizer))
    return made


def test_slots_are_the_drafters_own_and_the_verifiers_tokens(drafter):
    data = [Pair([5, 6, 7], [8, 9, 10]), Pair([11], [12, 13, 14, 15, 16])]
    slots = pair_heads.slots_of(drafter, data, [1, 0], 4, 6)
    assert slots.before.tolist() == [8, 9, 11, 12, 13, 14]
    targets = [9, 10, 12, 13, 14, 15]
    for row, target in enumerate(targets):
        column = slots.tokens[row].tolist()
        assert slots.place[row] == (column.index(target) if target in column else len(column))
    alone = replace(drafter.need, tau_mass=1.0, m_max=6)
    drafter.need = alone
    lat = drafter.draft([5, 6, 7, 8], 4)
    assert slots.tokens[:2, :6].tolist() == lat.tokens[:2, :6].tolist()
    torch.testing.assert_close(slots.logp[:2, :6], lat.logp[:2, :6], atol=1e-4, rtol=0)


def test_a_head_learns_what_follows_what(drafter, monkeypatch):
    """Two slots, each a coin, the second equal to the first: the marginals cost ln 2 a slot, pairs half of it."""
    coin = torch.full((2, drafter.need.vocab), -30.0)
    coin[:, [20, 21]] = 0.0
    monkeypatch.setattr(drafter, "columns", lambda texts, k: coin.expand(len(texts), 2, -1))
    data = [Pair([5], [t, t]) for t in (20, 21)]
    cfg = replace(CONFIG, block=2, steps=150, lr=0.05)
    monkeypatch.setattr(pair_heads.random.Random, "randrange", lambda *_: 0)
    head, losses = pair_heads.train(drafter, data, cfg)
    assert losses[0] == pytest.approx(math.log(2), abs=0.02) and losses[-1] == pytest.approx(math.log(2) / 2, abs=0.03)
    w = head.score(torch.tensor([[20, 21]]), torch.tensor([[20, 21]]))[0]
    assert w[0, 0] > w[0, 1] + 3 and w[1, 1] > w[1, 0] + 3


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_heads, "load_verifier", lambda *_, **__: as_verifier("tiny-ar").model)
    whole = replace(CONFIG, output=str(tmp_path / "whole"), max_new_tokens=12, save_every=5)
    first = as_pair_head(pair_heads.run(whole))
    cut, real = replace(whole, output=str(tmp_path / "cut")), pair_heads.nats
    calls = iter(range(8))

    def stopped(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pair_heads, "nats", stopped)
    with pytest.raises(KeyboardInterrupt):
        pair_heads.run(cut)
    monkeypatch.setattr(pair_heads, "nats", real)
    with pytest.raises(DllmError, match="--resume"):
        pair_heads.run(cut)
    again = as_pair_head(pair_heads.run(cut, resume=True))
    assert torch.equal(first.predecessor, again.predecessor) and torch.equal(first.successor, again.successor)
    assert not torch.equal(first.successor, torch.zeros_like(first.successor))


@pytest.mark.parametrize("name", ["suffix", "tiny-ar"])
def test_only_a_drafter_of_lattices_gets_a_head(name):
    with pytest.raises(DllmError, match="drafts lattices"):
        pair_heads.parts(replace(CONFIG, drafter=Checkpoint(name)))


# -- the bench


def test_the_bench_goes_on_where_it_was_stopped(tmp_path, folder, monkeypatch):
    out = tmp_path / "texts.jsonl"
    monkeypatch.setattr(bench, "TASKS", ("word_problems",))
    figures = list(bench.run("tiny", folder, n=2, out=out))
    assert [f.name for f in figures if "differ" in f.note and "0 texts" not in f.note] == []
    assert len(figures) == len(bench.SETTINGS) + len(bench.ASKED)
    monkeypatch.setattr(bench, "dllm", SimpleNamespace())  # nothing is decoded again
    assert list(bench.run("tiny", folder, n=2, out=out)) == figures
    with pytest.raises(DllmError, match="another"):
        list(bench.run("tiny", "elsewhere", n=2, out=out))


@pytest.mark.parametrize(("name", "search"), [("walk", "argmax"), ("eal", "eal:lam=1")])
def test_rounds_that_are_replayed_are_those_of_a_decode(verifier, name, search):
    head = PairHead(*(1.5 * torch.randn(2, verifier.vocab, 4, generator=torch.Generator().manual_seed(1))))
    options = {"length": "fixed:k=12", "carry": "off", "pair_head": head, "max_new_tokens": paths.NEW}
    got = dllm.speculate(verifier, "tiny", PROMPT, search=search, **options)
    drafter, text = as_drafter("tiny"), Pair(got.sequences[: got.prompt_length], got.emitted)
    drafter.reset([], Need(verifier.vocab, verifier.eos, tokenizer=verifier.tokenizer))
    rounds = paths.replay(drafter, head, text, verifier.eos)
    emitted = [r.accepted[name] + 1 for r in rounds[name]]
    assert emitted[:-1] == [r.emitted for r in got.rounds][:-1] and len(emitted) == got.n_verify > 1
    assert len({len(some) for some in rounds.values()}) > 1 and max(emitted) > 2  # the head turns some paths
    for r in rounds["walk"]:
        assert r.accepted["held"] >= max(r.accepted.values())
        assert r.expected["eal"] >= r.expected["walk"] - 1e-9


def test_paths_of_a_draft_by_hand():
    """The walk takes 1, then 2; the longest path in the mean is 2, then 1; the text holds on to neither."""
    own = torch.tensor([[0.5, 0.45], [0.6, 0.4]]).log()
    given = torch.tensor([[[0.5, 0.45], [0.0, 0.0]], [[0.4, 0.6], [0.95, 0.05]]]).log()
    tokens = torch.tensor([[1, 2], [1, 2]])
    lat = Lattice(tokens, own, tokens[:, 0], 0, pairs=Pairs(torch.tensor([[7, -1], [1, 2]]), given))
    found = paths.look(lat, 7, [2, 1, 1])
    assert found.accepted == {"walk": 0, "eal": 2, "held": 2}
    assert found.expected == pytest.approx({"walk": 0.5 + 0.5 * 0.6, "eal": 0.45 + 0.45 * 0.95})
    assert paths.look(lat, 7, [1, 3]).accepted == {"walk": 1, "eal": 0, "held": 1}


def test_paths_of_the_embedded_pair_row_by_row(folder, monkeypatch):
    monkeypatch.setattr(paths, "TASKS", ("functions",))
    rows = list(paths.run("tiny", folder, n=2))
    assert [row.name for row in rows] == [
        "functions, walk: tau", "functions, eal: tau", "functions, held: tau",
        "functions: tau of eal above the walk", "functions: accepted of the same drafts, eal above the walk",
        "functions: expected of the same drafts, eal above the walk",
    ]  # fmt: skip
    assert rows[2].value >= max(rows[0].value, rows[1].value) and rows[5].value >= -1e-9
    assert rows[3].value == pytest.approx(rows[1].value - rows[0].value)
    with pytest.raises(DllmError, match="pair head for a dLLM"):
        next(paths.run("suffix", folder))
