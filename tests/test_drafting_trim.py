"""Drafters whose work is bounded: heads of some ids, windows of a text. What is generated stays the verifier's own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drafting_kit import golden, plain, tiny_verifier
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dllm
from dllm.bench import bounds
from dllm.bench.bounds import again, far, only_dllm, trims
from dllm.cli import main
from dllm.drafting.accept import odds
from dllm.drafting.config import SpecConfig
from dllm.drafting.diffusion import DiffusionDrafter, SamplerDrafter
from dllm.drafting.drafters import Ask, Need, asked
from dllm.drafting.hidden import drafter as drafter_of_states
from dllm.drafting.reading import Readings
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.trim import as_keep, coverage, kept, ranked, sizes
from dllm.drafting.vocabulary import Vocabulary
from dllm.drafting.window import Window, as_window
from dllm.errors import DllmError
from dllm.training.answer_file import read_answers

torch.set_num_threads(1)
P = [5, 9, 33, 100, 12, 44, 7, 81, 19]
KEPT = [*range(3, 90, 2), 100]
LLADA, DREAM, SDAR = "tiny-llada-trained", "tiny-dream-random", "tiny-sdar-random"


def model(name):
    return dllm.load(str(GOLDEN / "checkpoints" / name))


def drafter(m, need=None, **kw):
    d = DiffusionDrafter(m, **{"vocabulary": "ids", **kw})
    d.reset(P, need or Need(m.vocab_size, frozenset({8})))
    return d


def same(a, b):
    assert a.tokens.tolist() == b.tokens.tolist() and a.argmax.tolist() == b.argmax.tolist()
    assert torch.allclose(a.logp, b.logp, atol=1e-5)


# -- heads of some ids


@pytest.mark.parametrize("name", [LLADA, DREAM, SDAR])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_trimmed_draft_is_the_whole_one_with_all_other_ids_banned(name, sampled, monkeypatch):
    m = model(name)
    need = Need(m.vocab_size, frozenset({8}), sampled)
    whole = drafter(m, need)
    whole.banned = whole.banned | set(range(m.vocab_size)) - {*KEPT, 8}
    expected = whole.draft(P, 5)
    trimmed = drafter(m, need, vocab_keep=KEPT)
    monkeypatch.setattr(type(m), "logits", None)  # the whole head is not computed
    found = trimmed.draft(P, 5)
    assert len(trimmed.head.rows) == len({*KEPT, 8} & set(range(m.vocab_size)))
    same(found, expected)
    assert not sampled or torch.allclose(found.rows, expected.rows, atol=1e-5)


def test_a_model_that_learns_drafts_with_what_its_head_has_become():
    m = model(LLADA)
    d = drafter(m, vocab_keep=KEPT)
    rows = d.head.rows
    with torch.no_grad():
        m.transformer.head_weight.mul_(2)
    d.reset(P, d.need)
    assert d.head.rows is rows and torch.equal(rows, m.transformer.head_weight[sorted({*KEPT, 8})])


def test_of_a_mapped_vocabulary_the_ids_are_the_verifiers():
    m = model(LLADA)
    to_verifier = torch.arange(m.vocab_size).roll(7)
    to_verifier[50:60] = -1
    need, mapped = Need(m.vocab_size, frozenset({8})), Vocabulary("strings", m.vocab_size, to_verifier)
    whole, trimmed = (drafter(m, need, vocabulary=mapped, vocab_keep=keep) for keep in (None, KEPT))
    whole.banned = whole.banned | set(range(m.vocab_size)) - {*KEPT, 8}
    for d in (whole, trimmed):
        d.vocabulary.context = list
    same(trimmed.draft(P, 5), whole.draft(P, 5))
    assert set(trimmed.head.vocabulary.shared.column) == {*KEPT, 8} & set(to_verifier.tolist())


def test_a_model_without_a_matrix_for_a_head_is_cut_behind_it(monkeypatch):
    m = model(LLADA)
    expected = drafter(m, vocab_keep=KEPT).draft(P, 4)
    monkeypatch.setattr(type(m), "head_rows", lambda self, ids: None)
    d = drafter(m, vocab_keep=[*KEPT[:-1], 100, 101])  # another list, so another head
    assert d.head.rows is None and d.draft(P, 4).tokens.max() <= 101
    same(drafter(m, Need(m.vocab_size - 1, frozenset({8})), vocab_keep=KEPT).draft(P, 4), expected)


@pytest.mark.parametrize(
    "more", [{}, {"tree": 6}, {"window": 6}, {"window": "4:sinks=2,recall=4,chunk=2"}, {"window": "auto"}], ids=str
)
def test_texts_stay_the_verifiers_own(more):
    verifier, m = golden("tiny-llama-ar-random"), model(LLADA)
    prompts = [P, P[:4], [*P, 3, 3]]
    outs = dllm.speculate(
        verifier, m, prompts, max_new_tokens=20, eos=[], length="fixed:k=5", **({"trim": KEPT} | more)
    )
    assert [o.sequences for o in outs] == [plain(verifier, p, 20) for p in prompts]
    assert all(o.n_draft for o in outs)


def test_a_trimmed_head_over_states_drafts_only_what_is_kept():
    at = GOLDEN / "checkpoints"
    verifier = as_verifier(AutoModelForCausalLM.from_pretrained(at / "tiny-qwen3-ar-deep-random", dtype=torch.float64))
    prompt = list(range(20, 40))
    text = plain(verifier.model, prompt, 16)
    for name in ("dflash-trained", "dflash-speculators-trained", "dspark-gated", "domino"):
        head = as_drafter(str(at / f"tiny-{name}-qwen3-ar-deep"))
        drafted: list[int] = []

        class Spy(type(head)):
            def together(self, asks, drafted=drafted):
                drafts = super().together(asks)
                drafted.extend(
                    t for d in drafts for t in (d.tokens.flatten().tolist() if hasattr(d, "argmax") else d.tokens)
                )
                return drafts

        head.__class__ = Spy
        keep = [*range(0, verifier.vocab, 2)]
        out = dllm.speculate(verifier, head, prompt, max_new_tokens=16, eos=[4], trim=keep, window=9, search="argmax")
        assert out.sequences == text[: len(out.sequences)]
        assert drafted and all(t % 2 == 0 or t == -1 for t in drafted)
        assert head.context.end == 0  # the fork of the text had its own


# -- heads of two factors


DEEP = GOLDEN / "checkpoints" / "tiny-qwen3-ar-deep-random"


def slim(folder, name, rank, known=None):
    """A public head with an output head of two factors, of all ids or of those `known`; and their product."""
    source = GOLDEN / "checkpoints" / f"tiny-{name}-qwen3-ar-deep"
    raw, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    hidden, vocab = raw["hidden_size"], raw["vocab_size"]
    ids, g = torch.arange(vocab) if known is None else torch.tensor(known), torch.Generator().manual_seed(rank)
    up, down = torch.randn(len(ids), rank, generator=g), torch.randn(rank, hidden, generator=g) * 0.2
    raw["dflash_config"]["head_rank"] = rank
    if known is not None:
        raw["dflash_config"]["draft_vocab_size"] = len(ids)
        marks = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": marks}
        tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][ids]
    save_file({**tensors, "lm_head.weight": up, "lm_head_down.weight": down}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    whole = torch.zeros(vocab, hidden, dtype=torch.float64).index_copy(0, ids, up.double() @ down.double())
    return as_drafter(str(folder)), whole


def deep(weight=None):
    """The verifier of the public heads in float64, with another head if one is given."""
    network = AutoModelForCausalLM.from_pretrained(DEEP, dtype=torch.float64).eval()
    if weight is not None:
        network.lm_head.weight = torch.nn.Parameter(weight)
    return as_verifier(network)


def first_draft(head, verifier, k=3, **need):
    """Behind a text whose states are some numbers."""
    d, g = head.fork(), torch.Generator().manual_seed(1)
    d.reset(P, Need(verifier.vocab, frozenset({8}), model=verifier.model, **need))
    d.take(torch.randn(len(P) - 1, len(d.taps), 48, generator=g, dtype=torch.float64), 0)
    return d.draft(P, k, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["dflash-trained", "dflash2-scaled", "dspark-dflashconfig", "domino"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_slim_head_drafts_as_rows_that_are_its_product(name, sampled, tmp_path):
    few, weight = slim(tmp_path, name, 6)
    whole = as_drafter(str(GOLDEN / "checkpoints" / f"tiny-{name}-qwen3-ar-deep"))
    for trim in (None, tuple(KEPT)):
        expected = first_draft(whole, deep(weight), sampled=sampled, trim=trim)
        found = first_draft(few, deep(), sampled=sampled, trim=trim)
        assert type(found) is type(expected)
        if hasattr(found, "logp"):  # a lattice
            assert torch.equal(found.tokens, expected.tokens)
            torch.testing.assert_close(found.logp, expected.logp, rtol=0, atol=1e-9)
        else:
            assert found.tokens == expected.tokens
            if sampled:
                laws = (draft.rows.laws(255) for draft in (found, expected))
                torch.testing.assert_close(*laws, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trim", [None, (3, 9, 40, 77)])
@torch.inference_mode()
def test_the_law_of_a_text_stays_the_verifiers_to_the_last_bit_with_a_slim_head(trim, tmp_path, monkeypatch):
    """Every draft of two tokens by two factors of a few ids, brought about by its uniforms, and all that may stay."""
    known = [3, 8, 9, 40, 51, 77]
    (head, _), verifier = slim(tmp_path, "dspark-dflashconfig", 4, known), deep()
    ids = [i for i in known if trim is None or i in trim or i == 8]  # an end is always kept
    texts = torch.arange(verifier.vocab)[:, None]
    prompt = torch.tensor(P).expand(len(texts), -1)
    logits = verifier.model(torch.cat([prompt, texts], 1)).logits[:, len(P) - 1 :]
    first, second = torch.softmax(logits[0, 0], -1), torch.softmax(logits[:, 1], -1)  # (V,), (V, V)

    def drafted(*u):
        uniforms = torch.tensor([u], dtype=torch.float64)
        monkeypatch.setattr(drafter_of_states, "uniforms", lambda *_: uniforms)
        draft = first_draft(head, verifier, 2, sampled=True, trim=trim)
        return draft.tokens, F.pad(draft.rows.laws(verifier.vocab), (0, 0, 0, 1))

    def middle(row, token):
        return float(row[:token].sum() + row[token] / 2)

    law, total = torch.zeros_like(second), 0.0
    for a in ids:
        u = middle(drafted(0.5, 0.5)[1][0], a)
        row = drafted(u, 0.5)[1][1]
        for b in ids:
            tokens, q = drafted(u, middle(row, b))
            assert [*tokens] == [a, b] and float(q[0, a] * q[1, b]) > 0
            chance = float(q[0, a] * q[1, b])
            p = torch.stack([first, second[a], second[b]])  # the last is of no matter here
            stays, rest = odds(p, q, torch.tensor([a, b]))
            neither, one, both = float((1 - stays).prod()), float(stays[0] * (1 - stays[1])), float(stays[1])
            law += chance * neither * rest[0][:, None] * second
            law[a] += chance * one * rest[1]
            law[a, b] += chance * both
            total += chance
    assert total == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(law, first[:, None] * second, rtol=0, atol=1e-14)


def test_a_slim_head_is_narrower_than_its_states(tmp_path):
    with pytest.raises(DllmError, match=r"head_rank is hosted for heads .* below their hidden_size"):
        slim(tmp_path, "domino", 48)


def test_a_kept_id_is_an_id_and_ends_are_always_kept(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("[5, 9]")
    assert as_keep(str(path)) == (5, 9) == as_keep([5, 9]) and as_keep("300") == 300 and as_keep(None) is None
    assert kept(3, 10, {7, 99}) == {0, 1, 2, 7} and kept((5, 9), 10, {7}) == {5, 7, 9}
    for wrong in (0, -3, [], [1.5], [True], {"a": 1}):
        with pytest.raises(DllmError, match="trim is a number of ids, a list of ids or a JSON file"):
            as_keep(wrong)
    with pytest.raises(DllmError, match="between 0 and 9"):
        kept((5, 10), 10, ())
    with pytest.raises(DllmError, match="cannot read"):
        as_keep(tmp_path / "absent.json")
    path.write_text("{oops")
    with pytest.raises(DllmError, match="no JSON list of ids"):
        as_keep(path)
    with pytest.raises(DllmError, match="meet in text, so that no ids can be kept"):
        Vocabulary("text", 10).trimmed([1], 10)
    with pytest.raises(DllmError, match="has none of the ids"):
        Vocabulary("ids", 10).trimmed([9], 9)


@pytest.mark.parametrize("bound", [{"trim": 20}, {"window": 20}], ids=str)
def test_bounds_are_refused_where_nothing_is_bounded(bound):
    with pytest.raises(DllmError, match="bounds a model that drafts, which suffix is not"):
        dllm.speculate(tiny_verifier(), "suffix", P[:2], **bound)


def test_an_aligned_drafter_says_what_it_keeps(tmp_path):
    m = model(LLADA)
    m.save(tmp_path, extra={"drafter.json": {"vocab_keep": KEPT, "window": {"tokens": 40, "sinks": 2}}})
    d = as_drafter(str(tmp_path))
    assert d.keep == tuple(KEPT) and d.window == Window(40, 2)
    d.reset(P, Need(m.vocab_size, trim=(5, 9), window=Window(3)))  # what a call says goes first
    assert set(d.vocabulary.shared.column) == {5, 9} and d.reads == Window(3)


def test_ids_are_ranked_by_counts_and_sizes_weigh_coverage_against_time():
    ranking = ranked([[4, 4, 4, 1], [1, 0]], 6, always=[5])
    assert ranking == [5, 4, 1, 0, 2, 3]
    shares = coverage(ranking, [[4, 1, 2, 4]])
    assert shares.tolist() == [0, 0, 0.5, 0.75, 0.75, 1, 1]
    found = sizes(shares, {2: 1.0, 6: 3.0}, 2, 0.8, 4.0, 5.0)
    assert [s.n for s in found] == [2, 6] and [s.coverage for s in found] == [0.5, 1]
    assert found[0].speedup == pytest.approx((1 + 0.4 + 0.16) * 5 / 5)
    assert found[1].speedup == pytest.approx((1 + 0.8 + 0.64) * 5 / 7)
    with pytest.raises(DllmError, match="another tokenizer's"):
        ranked([[6]], 6)


# -- windows


def test_a_window_reads_the_end_the_beginning_and_what_the_end_repeats():
    ids = list(range(100, 160))
    assert Window(10).of(ids) == ids[-10:]
    assert Window(10, sinks=3).of(ids) == [100, 101, 102, *ids[-10:]]
    assert Window(10, sinks=3).of(ids[:13]) == ids[:13]
    assert Window(10).of(ids, unit=4, hop=4) == ids[48:]  # whole units: from a multiple on
    assert Window(10, sinks=3).of(ids, 4, 4) == [*ids[:4], *ids[48:]]
    again = [*ids, 1, 2, 3, 120, 121, 122]
    found = Window(8, sinks=2, recall=8, chunk=4).of(again)
    assert found[-8:] == again[-8:] and found[:2] == ids[:2] and 123 in found and len(found) <= 18
    assert Window(8, recall=8, chunk=4).of([*ids, *range(200, 260)])[0] == 252  # nothing is repeated, nothing recalled


def test_the_beginning_of_a_window_stays_for_half_of_it_where_keys_stay():
    starts = {n: Window(8).of(list(range(n)), hop=4)[0] for n in range(8, 21)}
    assert starts == {n: (n - 8) // 4 * 4 for n in starts}


@pytest.mark.parametrize("name", [LLADA, DREAM, SDAR])
def test_a_draft_over_a_window_is_that_of_the_text_that_it_reads(name):
    m = model(name)
    unit = m.block_size or 1
    long = [int(t) for t in torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(1))]
    window = Window(9, sinks=2, recall=4, chunk=4)
    bounded, whole = (drafter(m, prefix_cache="none", window=w) for w in (window, None))
    for n in (7, 40, 60):
        same(bounded.draft(long[:n], 5), whole.draft(window.of(long[:n], unit, unit), 5))


@pytest.mark.parametrize(("name", "cache"), [(SDAR, "auto"), (LLADA, "approx")])
def test_what_is_kept_of_a_window_is_used_until_it_moves(name, cache):
    """A block-causal model's finished blocks are exact; a bidirectional one's are when all is computed anew."""
    m, ids, fed = model(name), list(P), []
    forward = m.forward
    spied = SimpleNamespace(forward=lambda i, *a, **kw: fed.append(i.shape[1]) or forward(i, *a, **kw))
    window, refresh = Window(16), 8 if cache == "auto" else 1
    kept_, anew = drafter(m, prefix_cache=cache, refresh=refresh, window=window), drafter(m, prefix_cache="none")
    unit = m.block_size or 1
    m.forward = spied.forward
    for _ in range(20):
        width = len(fed)
        lat = kept_.draft(ids, 5)
        assert sum(fed[width:]) <= 16 + 8 + 5 + 2 * unit
        same(lat, anew.draft(window.of(ids, unit, 8 // unit * unit), 5))
        new = lat.argmax[:3].tolist()
        ids += new
        for d in (kept_, anew):
            d.observe(ids, new, ())
    assert cache == "approx" or sum(n <= 5 + 2 * unit for n in fed[::2]) >= 8  # mostly what is new


def test_rows_of_a_batch_read_windows_of_their_own():
    m = model(LLADA)
    long = [int(t) for t in torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2))]
    ds = [drafter(m, prefix_cache="none", window=12) for _ in range(2)]
    together = asked([Ask(ds[0], long, 4), Ask(ds[1], long[:7], 4)])
    for found, ids in zip(together, (long, long[:7]), strict=True):
        same(found, drafter(m, prefix_cache="none").draft(ids[-12:], 4))
    assert SamplerDrafter(m).bounds == ("window",)


def test_a_head_over_states_sees_the_last_tokens_alone():
    at = GOLDEN / "checkpoints"
    verifier = as_verifier(AutoModelForCausalLM.from_pretrained(at / "tiny-qwen3-ar-deep-random", dtype=torch.float64))
    head = as_drafter(str(at / "tiny-dflash-trained-qwen3-ar-deep"))
    states = torch.randn(
        30, len(head.taps), verifier.model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    ids = list(range(20, 51))
    need = Need(verifier.vocab, verifier.eos, model=verifier.model, window=Window(6))
    seen, whole = head.fork(), head.fork()
    seen.reset(ids, need)
    for start in range(0, 30, 5):
        seen.take(states[start : start + 5].double(), start)
    whole.reset(ids, Need(verifier.vocab, verifier.eos, model=verifier.model))
    whole.take(states.double(), 0)
    whole.context.catch_up(whole._project)
    whole.context.first = 24
    whole.context.stored = [held[:, :, 24:] for held in whole.context.stored]
    same(seen.draft(ids, 4), whole.draft(ids, 4))
    with pytest.raises(DllmError, match="no sinks nor recall"):
        head.fork().reset(ids, Need(verifier.vocab, model=verifier.model, window=Window(6, sinks=1)))


def readings(seconds, beside=0.0):
    """What drafts took that fed so many tokens, each measured twice."""
    found = Readings()
    for n, taken in seconds.items():
        for _ in range(2):
            found.drafts.of(1).add(n, taken)
    found.beside.add(1, beside)
    return found


LASTING = [1, 2, 4, 8]


@pytest.mark.parametrize(("each", "beside"), [(0.001, 0.0), (0.001, 0.12), (0.0001, 0.12), (0.02, 0.12)])
def test_a_reading_is_the_widest_that_adds_a_tenth_to_the_cheapest_round(each, beside):
    cost = {n: 0.04 + each * n for n in (12, 72, 128, 256, 512, 1024)}
    taken = lambda tokens, drafts: 0.04 + each * ((tokens + 8) + (drafts - 1) * 12) / drafts  # noqa: E731
    found = readings(cost, beside).choose(5000, 8, 1, LASTING)
    every = {(64 << i, n): taken(64 << i, n) for i in range(6) for n in LASTING}
    cheapest = min(taken(64, n) for n in LASTING)
    fits = [(w, -n) for (w, n), s in every.items() if s <= cheapest + 0.1 * (cheapest + beside) + 1e-9]
    assert (found.tokens, -found.drafts) == max(fits)


def test_a_reading_at_most_doubles_and_begins_small():
    flat = {n: 0.05 for n in (12, 72)}
    assert Readings().choose(5000, 8, 1, LASTING) == (64, 8)
    assert readings(flat).choose(5000, 8, 1, LASTING) == (128, 1)
    assert readings({**flat, 128: 0.05}).choose(5000, 8, 1, LASTING) == (256, 1)
    assert readings(flat).choose(40, 8, 1, LASTING) == (40, 1)  # a short text is read whole
    assert readings({72: 0.05}).choose(40, 8, 1, LASTING)[1] == 8  # what it takes to keep a reading is tried first
    assert readings({**flat, 96: 0.05}).choose(5000, 8, 1, [1], unit=48).tokens == 192  # whole blocks


@pytest.mark.parametrize(
    ("name", "each", "least", "most"), [(LLADA, 0.0, 90, 200), (LLADA, 0.01, 0, 64), (SDAR, 0.01, 0, 72)]
)
def test_a_measured_window_costs_the_same_behind_any_text(name, each, least, most, monkeypatch):
    """A clock that only the drafter's forwards move: they take so much a token, and a tenth of a second."""
    m, fed, clock = model(name), [], [0.0]
    forward = m.forward

    def spied(ids, *a, **kw):
        fed.append(ids.shape[1])
        clock[0] += 0.1 + each * ids.shape[1]
        return forward(ids, *a, **kw)

    monkeypatch.setattr("dllm.drafting.diffusion.perf_counter", lambda: clock[0])
    m.forward = spied
    text = [int(t) for t in torch.randint(3, 90, (400,), generator=torch.Generator().manual_seed(3))]
    room = m.max_positions * 2 // 3
    means = {}
    for n in (70, min(300, room)):
        d, ids = drafter(m, window="auto"), text[:n]
        d.reset(ids, d.need)
        for _ in range(24):
            before = len(fed)
            lat = d.draft(ids, 4)
            assert lat.k == 4
            if len(fed) - before == 1 and fed[before] > d.reading.tokens:  # read anew: that of the text that it reads
                m.forward = forward
                same(lat, drafter(m, prefix_cache="none").draft(d._read(ids, False), 4))
                m.forward = spied
            ids = [*ids, *text[-2:]]
            d.observe(ids, ids[-2:], ())
        means[n] = np.mean(fed[-16:])
    assert least < d.reading.tokens <= most
    if each:
        assert means[min(300, room)] < 1.5 * means[70]


def test_a_measured_window_is_refused_where_nothing_measures():
    at = GOLDEN / "checkpoints"
    verifier = as_verifier(AutoModelForCausalLM.from_pretrained(at / "tiny-qwen3-ar-deep-random", dtype=torch.float64))
    head = as_drafter(str(at / "tiny-dflash-trained-qwen3-ar-deep"))
    with pytest.raises(DllmError, match="give window= a number"):
        dllm.speculate(verifier, head, P, window="auto")
    with pytest.raises(DllmError, match="give window= a number"):
        dllm.speculate("tiny-ar", SamplerDrafter(dllm.load("tiny")), P, window="auto")


def test_windows_are_written_in_one_way():
    assert (
        as_window("256:sinks=4,recall=128")
        == Window(256, 4, 128)
        == as_window({"tokens": 256, "sinks": 4, "recall": 128})
    )
    assert as_window(40) == as_window("40") == Window(40)
    assert as_window("auto:sinks=4") == as_window({"tokens": "auto", "sinks": 4}) == Window(None, 4)
    for wrong, said in ((0, "at least 1"), ("x", "an integer"), ({"tokns": 3}, "tokens"), ("9:sinks=-1", "at least 0")):
        with pytest.raises(DllmError, match=said):
            as_window(wrong)
    with pytest.raises(DllmError, match="window"):
        SpecConfig(window="many")


def test_kept_ids_survive_a_file(tmp_path):
    ids = ranked([np.arange(5)], 9)
    (tmp_path / "k.json").write_text(json.dumps(ids[:4]))
    assert SpecConfig(trim=tmp_path / "k.json").trim == (0, 1, 2, 3)


def test_trim_writes_the_ids_that_promise_most(tmp_path, capsys, monkeypatch):
    """Of the embedded pair: 512 of 664 ids, or all. What it takes is set, so that coverage decides."""
    monkeypatch.setattr(
        "dllm.bench.bounds.draft_seconds", lambda d, ids, k, needs, repeats: dict.fromkeys(needs, 0.001)
    )
    answers, out = tmp_path / "teacher.jsonl", tmp_path / "kept.json"
    answers.write_text("".join(f"{json.dumps([[5, i], [600 + i % 4, 601, 2]])}\n" for i in range(10)))
    monkeypatch.setattr("sys.argv", ["dllm", "trim", str(answers), "--out", str(out), "--repeats", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    kept_ids = json.loads(out.read_text())
    assert kept_ids[:3] == [2, 601, 600] and len(kept_ids) == 512 and "best" in capsys.readouterr().out
    assert dllm.speculate("tiny-ar", "tiny", [[5, 9, 33]], trim=out, max_new_tokens=4)[0].n_verify
    answers.write_text(f"{json.dumps([[5], [6]])}\n")
    with pytest.raises(DllmError, match="too few"):
        trims(as_verifier("tiny-ar"), only_dllm(as_drafter("tiny")), read_answers(answers), 8, 0.7, 1)
    with pytest.raises(DllmError, match="a dLLM that drafts"):
        only_dllm(as_drafter("suffix"))


def test_prompts_of_the_bench_name_their_facts_far_from_the_question():
    for lines in (far(3), again(3)):
        assert len(lines) == 3 and all(line.endswith("?") for line in lines)
    text = again(1)[0].split("\n")
    assert text[0].startswith(text[-1]) and len(text) >= 5


def test_the_bench_measures_windows_by_length_and_by_what_is_accepted(monkeypatch):
    monkeypatch.setattr(bounds, "like_smollm2", lambda: dllm.load("tiny"))
    monkeypatch.setattr(bounds, "LENGTHS", (20, 60))
    monkeypatch.setattr(bounds, "READS", {"window 32": {"window": 32}})
    rows = list(bounds.run_context(1, n=1))
    assert len(rows) == len(bounds.CONTEXTS) + 2 and all(row.value > 0 for row in rows)
    assert all("20: " in row.note for row in rows[:-2]) and "0 texts differ" in rows[-1].note
