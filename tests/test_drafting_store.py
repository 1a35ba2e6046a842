"""What outlives a text: counts of others' texts, a kept table, stored rows; saved, loaded, bounded; texts unchanged."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from drafting_kit import VOCAB, plain, tiny_verifier
from safetensors.numpy import load_file, save_file
from test_drafting_cli import PROMPT as PLAIN_PROMPT
from test_drafting_cli import run  # noqa: F401
from test_drafting_law import by_the_loop, pvalue

import dllm
from dllm.drafting import EMPTY, Drafter, Need, Seen, StandDrafter, Store, SuffixDrafter, TokenRecycling
from dllm.drafting.search import Sample, SampleTree
from dllm.drafting.store import Grams, Row, Successors, as_store, corpus_ids
from dllm.drafting.suffixes import REACH, SuffixArray, Texts, counted, longest
from dllm.errors import DllmError

torch.set_num_threads(1)
PROMPTS = [[3, 17, 5, 9, 22], [3, 17, 5, 9], [8, 2, 11, 3, 17, 5], [3, 17, 5, 9, 22]]
SOURCES = ("suffix", "recycle", "stand")
K4 = {"length": "fixed:k=4", "max_new_tokens": 20}


# -- counts


def test_an_order_of_places_finds_and_counts_as_reading_does():
    rng = random.Random(0)
    texts = [[rng.randrange(4) for _ in range(rng.randrange(1, 90))] for _ in range(12)]
    array = SuffixArray(texts)
    for _ in range(400):
        gram = [rng.randrange(4) for _ in range(rng.randrange(1, 7))]
        ends = [(text, i + len(gram)) for text in texts for i in range(len(text)) if text[i : i + len(gram)] == gram]
        low, high = array.find(gram)
        assert high - low == len(ends) and array.holds(gram) == bool(ends)
        if ends:
            behind = Counter(text[end] for text, end in ends if end < len(text))
            assert {token: end - start for token, start, end, _ in array.following(low, high, len(gram))} == behind


def test_continuations_are_the_most_frequent_over_all_levels():
    levels = [SuffixArray([[1, 2, 3, 4], [1, 2, 3, 5]]), SuffixArray([[9, 1, 2, 3, 5, 6], [1, 2, 7]])]
    assert longest(levels, [9, 1, 2]) == 3 and longest(levels, [8, 1, 2]) == 2 and longest(levels, [8]) == 0
    tree = counted(levels, [8, 1, 2], 2, 4, 9, least=0.05)
    third = 1 / 2  # of a match of two
    assert dict(zip(tree.paths[1:], tree.conf, strict=True)) == pytest.approx(
        {
            (3,): 3 / (4 + third),
            (3, 5): 2 / (3 + third),
            (3, 5, 6): 1 / (2 + third),
            (7,): 1 / (4 + third),
            (3, 4): 1 / (3 + third),
        }
    )
    assert sorted(tree.survival(), reverse=True) == tree.survival()
    assert counted(levels, [8, 1, 2], 2, 4, 9, width=1).tokens == (3, 5, 6)
    assert counted(levels, [8, 1, 2], 2, 4, 9, width=1, least=0.3).tokens == (3, 5)
    assert counted(levels, [8, 1, 2], 2, 4, 9, width=1, ends={5}.__contains__).tokens == (3, 5)
    assert len(counted(levels, [8, 1, 2], 2, 4, 2)) == 2 and not len(counted(levels, [8, 1], 1, 0, 2))
    assert counted([SuffixArray([[1, 2, 3], [1, 2, 4]])], [1, 2], 2, 1, 1).tokens == (4,)  # seen last


def test_the_oldest_texts_leave_and_levels_stay_few():
    texts, rng = Texts(100), random.Random(1)
    came = []
    for i in range(60):
        came.append([i % 30, *(rng.randrange(30) for _ in range(rng.randrange(12)))])
        texts.add([came[-1]])
        kept = [text.tolist() for text in texts.texts]
        assert kept == came[len(came) - len(kept) :] and texts.size <= 100 and len(texts.levels) <= 4
        assert longest(texts.levels, came[-1]) == len(came[-1])
    assert texts.size > 60
    texts.add([[1] * 250])
    assert texts.size == 100
    with pytest.raises(DllmError, match="tokens=0 of a store"):
        Store(tokens=0)


def test_a_longer_or_a_more_frequent_match_is_copied():
    drafter = SuffixDrafter()
    drafter.reset([1, 2], Need(VOCAB, texts=(SuffixArray([[1, 2, 3, 4], [1, 2, 3, 5], [7, 1, 2, 3, 5]]),)))
    assert drafter.draft([1, 2], 4).tokens == (3, 5) and drafter.match == 2
    text = [5, 1, 2, 9, 9, 5, 1, 2]  # three of its own tokens agree, of others two
    drafter.reset(text, drafter.need)
    assert drafter.draft(text, 1).tokens == (3,)  # it followed three times of three
    drafter.reset(text, Need(VOCAB, texts=(SuffixArray([[1, 2, 3, 4]]),)))
    assert drafter.draft(text, 2).tokens == (9, 9)
    drafter.reset(text, Need(VOCAB, texts=drafter.need.texts, tree=4))
    assert {(9,), (9, 9), (3,)} <= set(drafter.draft(text, 2).paths)


def test_a_chunk_that_was_rejected_is_forgotten():
    drafter = SuffixDrafter()
    drafter.reset([1, 2, 3, 1, 2], Need(VOCAB))
    assert drafter.draft([1, 2, 3, 1, 2], 1).tokens == (3,)
    drafter.draft([1, 2, 3, 1, 2, 3], 1)  # a controller asks for more behind the chunk
    assert drafter.draft([1, 2, 3, 1, 2, 7, 1, 2], 1).tokens == (7,)


# -- tables


def test_ranks_are_learned_and_a_table_lies_on_another():
    kept = Successors()
    kept.best.update({1: (2, 3), 5: (6,)})
    own = Successors(kept)
    assert own.after(1) == (2, 3) and own.after(4) == ()
    own.learn(1, [3, 5], {1: (3, 2)})  # 3 was second behind 1; 3 has no row; of 5 nothing follows yet
    assert own.tries == 1 and own.hits[1] == 1 and own.after(1) == (3, 2) and kept.after(1) == (2, 3)
    assert own.ranks()[1] == pytest.approx((32 * Successors.prior[1] + 1) / 33)
    kept.add(own)
    assert kept.after(1) == (3, 2) and kept.tries == 1
    kept.tries = 5000.0
    kept.add(Successors())
    assert kept.tries == 2500 and kept.hits[1] == 0.5


def test_rows_are_averaged_bounded_and_the_longest_gram_counts():
    grams = Grams(4)
    grams.learn([7, 1], [Seen((), (2, 3), (0.75, 0.25)), Seen((2,), (4,), (1.0,))])
    assert grams.after([7, 1]) == Row((2, 3), (0.75, 0.25), 1) and grams.after([1, 2]).best == (4,)
    assert len(grams.rows) == 4 and grams.after([9, 1]) is None  # of five the oldest left
    grams = Grams(100)
    grams.learn([1], [Seen((), (2, 3), (0.75, 0.25)), Seen((), (3,), (0.75,))])
    assert grams.after([1]) == Row((3, 2), (0.5, 0.375), 2)
    grams.learn([5, 1], [Seen((), (4,), (1.0,))])
    assert grams.after([5, 1]).best == (4,) and grams.after([6, 1]).best == (3, 4, 2)


# -- texts are the verifier's own


@pytest.mark.parametrize("tree", [0, 6])
@pytest.mark.parametrize("source", SOURCES)
def test_texts_are_the_same_and_calls_fewer(source, tree):
    model, store = tiny_verifier(), Store()
    again = []
    for prompt in PROMPTS:
        out = dllm.speculate(model, source, prompt, store=store, tree=tree, **K4)
        assert out.sequences == plain(model, prompt, 20)
        again.append(out.n_verify)
    forgetting = dllm.speculate(model, source, PROMPTS[-1], tree=tree, **K4)
    assert again[-1] < forgetting.n_verify  # the same text came before
    assert store.texts.size and (source == "suffix" or store.successors.best or store.grams.rows)


@pytest.mark.parametrize("source", SOURCES)
def test_rows_of_a_batch_read_the_store_as_the_call_found_it(source):
    model, batch, alone = tiny_verifier(), Store(), Store()
    for store in (batch, alone):
        dllm.speculate(model, source, PROMPTS[0], store=store, **K4)
    frozen = [dllm.speculate(model, source, prompt, store=copied(alone), **K4) for prompt in PROMPTS]
    rows = dllm.speculate(model, source, PROMPTS, store=batch, **K4)
    assert [row.spans for row in rows] == [one.spans for one in frozen]
    assert [row.sequences for row in rows] == [plain(model, prompt, 20) for prompt in PROMPTS]
    assert len(batch.texts.texts) == 5
    sampled = {**K4, "store": copied(batch), "temperature": 1.0, "seed": 3}
    rows = dllm.speculate(model, source, PROMPTS, **sampled)
    last = dllm.speculate(model, source, PROMPTS[2], **{**sampled, "store": copied(batch), "seed": 5})
    assert rows[2].sequences == last.sequences


def copied(store):
    twin = Store()
    twin.texts.add(store.texts.texts)
    twin.successors.add(store.successors)
    twin.grams.add(store.grams)
    return twin


class Breaks(Drafter):
    name = "breaks"

    def draft(self, ids, k, *, generator=None):
        if len(ids) > 12:
            raise ValueError("no more")
        return EMPTY


def test_a_call_that_fails_teaches_nothing():
    store = Store()
    with pytest.raises(DllmError, match="no more"):
        dllm.speculate(tiny_verifier(), Breaks(), PROMPTS[0], store=store, **K4)
    assert store.texts.size == 0


def test_of_a_prompt_only_what_a_match_can_reach_is_kept():
    store = Store()
    store.learn([([1] * 100 + [2, 3], 100), ([1] * 50, 50)], [])
    assert [text.tolist() for text in store.texts.texts] == [[1] * REACH + [2, 3]]


def test_inside_generate(tmp_path):
    model, file = tiny_verifier(), tmp_path / "kept.safetensors"
    ids = torch.tensor([PROMPTS[0]])
    results = []
    for _ in range(2):
        fast = dllm.speculator("recycle", store=file, results=results, length="fixed:k=4")
        out = model.generate(ids, custom_generate=fast, max_new_tokens=20, do_sample=False)
        assert out[0].tolist() == plain(model, PROMPTS[0], 20)
    assert results[1].n_verify < results[0].n_verify


# -- the law at T > 0


def law_of(search, n, drafter=None, **kw):
    g, store = torch.Generator().manual_seed(4), Store()
    texts = []
    for _ in range(n):
        source = (drafter or StandDrafter)()
        source.fork = lambda source=source: source
        texts.append(by_the_loop(search, SHORT.fork(), g, source, store=store, **kw))
        store.learn([], source.lessons())
    assert sum(row.n for row in store.grams.rows.values()) > n or store.successors.tries > 1000
    return pvalue(texts)


SHORT = dllm.drafting.Fixed(3)


class Sharpened(StandDrafter):
    """Draws from other rows than those that it hands over."""

    def _law(self, row):
        return super()._law([(t, p**3) for t, p in row]) if self.drawing else super()._law(row)

    drawing = True

    def draft(self, ids, k, *, generator=None):
        self.drawing = True
        found = super().draft(ids, k, generator=generator)
        self.drawing = False
        if not len(found):
            return found
        index, prob = zip(*(self._law(self._after(ids, path[:-1])) for path in found.paths[1:]), strict=True)
        rows = type(found.rows)(torch.cat(prob), torch.stack(index))
        return type(found)(found.tokens, found.parents, "sampled", rows)


def test_stored_rows_are_sampled_exactly():
    assert law_of(Sample(), 1000) > 1e-3


@pytest.mark.sweep
def test_stored_rows_are_sampled_exactly_in_trees_and_as_points():
    assert law_of(SampleTree(2, 2), 6000, tree=5) > 1e-3
    assert law_of(dllm.drafting.BestFirstTree(5), 6000, tree=5) > 1e-3
    assert law_of(Sample(), 6000, TokenRecycling) > 1e-3


def test_other_rows_than_those_drawn_from_are_caught():
    assert law_of(Sample(), 700, Sharpened) < 1e-6


def test_draws_follow_the_warped_rows():
    drafter, store = StandDrafter(), Store()
    store.grams.learn([1], [Seen((), (2, 3, 4), (0.5, 0.3, 0.2))])
    top2 = lambda scores: scores.masked_fill(scores < scores.topk(2).values[:, -1:], float("-inf"))  # noqa: E731
    drafter.reset([1], Need(VOCAB, sampled=True, store=store, warp=top2))
    g = torch.Generator().manual_seed(0)
    drafts = [drafter.draft([1], 1, generator=g) for _ in range(2000)]
    seen = Counter(d.tokens[0] for d in drafts)
    assert set(seen) == {2, 3} and seen[2] / 2000 == pytest.approx(5 / 8, abs=0.03)
    assert drafts[0].rows.dense(0, VOCAB)[[2, 3, 4]].tolist() == pytest.approx([5 / 8, 3 / 8, 0])
    drafter.reset([1], Need(VOCAB, sampled=True, store=store, tree=3, draws=3))
    tree = drafter.draft([1], 8, generator=g)
    assert sorted(tree.tokens) == [2, 3, 4] and tree.parents == (-1, -1, -1)
    drafter.reset([1], Need(VOCAB, frozenset(), store=store))
    assert drafter.draft([1], 3).kind == "point" and drafter.draft([1], 3).conf == (0.5,)


# -- files


def test_what_is_saved_is_loaded(tmp_path):
    model, file = tiny_verifier(), tmp_path / "kept.safetensors"
    for source in SOURCES:
        dllm.speculate(model, source, PROMPTS[0], store=file, **K4)
    store, again = as_store(file), Store.load(file)
    assert as_store(str(file)) is store and store is not again
    assert [t.tolist() for t in store.texts.texts] == [t.tolist() for t in again.texts.texts]
    assert store.successors.best == again.successors.best and list(store.grams.rows) == list(again.grams.rows)
    assert store.successors.ranks() == again.successors.ranks() and store.top == again.top
    for a, b in zip(store.grams.rows.values(), again.grams.rows.values(), strict=True):
        assert a.best == b.best and a.n == b.n and a.prob == pytest.approx(b.prob, abs=1e-7)
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    Store().save(file)  # somebody else's
    assert as_store(file) is not store and as_store(file).texts.size == 0


def spoiled(file, how):
    tensors = load_file(file)
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "other content":
        file.write_bytes(b"no store at all")
    elif how == "no settings":
        save_file(tensors, file)
    else:
        about = {"format": "dllm drafting store 1", "tokenizer": "", "top": 39, "tries": 0.0, "tokens": 9, "grams": 9}
        about |= {"format": "dllm drafting store 7"} if how == "a later format" else {}
        if how == "a part is gone":
            del tensors["grams"]
        if how == "lengths":
            tensors["lengths"] = tensors["lengths"] + 1
        if how == "ids":
            tensors["texts"] = np.full_like(tensors["texts"], 40)
        save_file(tensors, file, {"store": json.dumps(about)})


@pytest.mark.parametrize(
    "how", ["cut short", "other content", "no settings", "a later format", "a part is gone", "lengths", "ids"]
)
def test_a_damaged_file_is_one_line(tmp_path, how):
    model, file = tiny_verifier(), tmp_path / "kept.safetensors"
    dllm.speculate(model, "recycle", PROMPTS[0], store=file, **K4)
    spoiled(file, how)
    with pytest.raises(DllmError, match=r"kept.safetensors is no store, or is damaged \(.*remove it") as error:
        dllm.speculate(model, "recycle", PROMPTS[0], store=file, **K4)
    assert "\n" not in str(error.value)


class Words:
    chat_template = None

    def __init__(self, *words):
        self.words = {word: i for i, word in enumerate(words)}

    def get_vocab(self):
        return self.words

    def decode(self, ids, **kw):
        return " ".join(str(i) for i in ids)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.words[word] for word in text.split()]}


def test_a_store_belongs_to_a_tokenizer(tmp_path):
    model, store = tiny_verifier(), Store(path=tmp_path / "kept")
    dllm.speculate(model, "suffix", [1, 2], tokenizer=Words("a", "b"), store=store, **K4)
    dllm.speculate(model, "suffix", [1, 2], tokenizer=Words("a", "b"), store=store, **K4)
    with pytest.raises(DllmError, match=r"store .*kept holds texts of another tokenizer than LlamaForCausalLM has"):
        dllm.speculate(model, "suffix", [1, 2], tokenizer=Words("b", "a"), store=store, **K4)
    store.learn([([1, 99], 1)], [])
    with pytest.raises(DllmError, match=r"holds id 99, and LlamaForCausalLM has 40 tokens"):
        dllm.speculate(model, "suffix", [1, 2], store=store, **K4)


@pytest.mark.parametrize(
    ("store", "says"),
    [("no/such/folder/kept", "no folder .*folder for the store kept"), (7, "a dllm.Store or the path"), (True, "path")],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, store, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DllmError, match=says):
        dllm.speculate(tiny_verifier(), "suffix", [1, 2], store=store, **K4)
    with pytest.raises(DllmError, match="where to"):
        Store().save()


# -- a corpus


def test_a_corpus_is_copied_from(tmp_path):
    model = tiny_verifier()
    text = plain(model, PROMPTS[0], 20)
    out = dllm.speculate(model, "suffix", PROMPTS[0], corpus=[text], **K4)
    assert out.sequences == text and out.n_verify <= 5
    file = tmp_path / "corpus.jsonl"
    file.write_text(json.dumps(text) + "\n\n" + json.dumps({"ids": [1, 2]}) + "\n")
    assert corpus_ids(file, VOCAB, None) == (tuple(text), (1, 2))
    again = dllm.speculate(model, "suffix", PROMPTS[0], corpus=file, **K4)
    assert again.spans == out.spans
    words = tmp_path / "corpus.txt"
    words.write_text("a b\na")
    assert corpus_ids(words, VOCAB, Words("a", "b")) == ((0, 1, 0),)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('"text"', "holds text, and the verifier came without a tokenizer"),
        ("[1, 40]", r"line 1: ids lie in 0..39"),
        ("[1]\n{}", "line 2: neither a text nor a list of ids"),
        ("[1", "cannot be read"),
    ],
)
def test_a_corpus_that_is_none_is_one_line(tmp_path, content, says):
    file = tmp_path / "corpus.jsonl"
    file.write_text(content)
    with pytest.raises(DllmError, match=says):
        dllm.speculate(tiny_verifier(), "suffix", [1, 2], corpus=file, **K4)
    with pytest.raises(DllmError, match=r"holds id -5: ids lie in 0..39"):
        dllm.speculate(tiny_verifier(), "suffix", [1, 2], corpus=[[3, -5]], **K4)
    with pytest.raises(DllmError, match="cannot be read"):
        corpus_ids(tmp_path / "none.txt", VOCAB, None)


def test_the_command_keeps_a_store(run, tmp_path):  # noqa: F811
    file, corpus = tmp_path / "kept", tmp_path / "corpus.txt"
    corpus.write_text("Tom has 12 + 7 = 19 apples.")
    command = (
        "speculate",
        PLAIN_PROMPT,
        "-n",
        "12",
        "--drafter",
        "suffix",
        "--length",
        "fixed:k=6",
        "--compare",
        "--tree",
        "6",
        "--graft",
        "recycle",
        "--graft",
        "stand",
    )
    calls = []
    for _ in range(2):
        code, shown, error = run(*command, "--store", str(file), "--corpus", str(corpus))
        assert code == 0, error
        assert [line.split()[-1] for line in shown.splitlines() if "equal to plain" in line] == ["yes"]
        calls.append(next(int(line.split()[-1]) for line in shown.splitlines() if "verify calls" in line))
    assert file.is_file() and calls[1] < calls[0]
