"""Answers in lanes: those of transformers' generate, whatever shares a forward with them."""

from __future__ import annotations

import random

import pytest
import torch

import dllm
from dllm.decoding.prediction import Law
from dllm.drafting.registry import as_verifier
from dllm.errors import DllmError
from dllm.training.sampling import Ask, Generated, Lanes, answerer

torch.set_num_threads(1)
CHECKPOINTS = "tests/golden/checkpoints/"


def verifier_of(name):
    return as_verifier(dllm.load_verifier(name, dtype="float64"))


def asks_of(verifier, law, n=13):
    rng = random.Random(0)
    ids = [tuple(rng.randrange(5, verifier.vocab) for _ in range(rng.randrange(1, 40))) for _ in range(n)]
    return [Ask(p, 7 + i % 5 * 4, law, i) for i, p in enumerate(ids)]


def queue(asks):
    left = list(asks)

    def more(n):
        taken = left[:n]
        del left[:n]
        return taken

    return more


def made(source, asks):
    found = {ask: answer for ask, answer in source.answers(queue(asks))}
    assert len(found) == len(asks)
    return [found[ask] for ask in asks]


@pytest.mark.parametrize(
    ("name", "law"),
    [
        (f"{CHECKPOINTS}tiny-llama-ar-random", Law()),
        (f"{CHECKPOINTS}tiny-qwen3-ar-random", Law()),
        ("tiny-ar", Law()),
        (f"{CHECKPOINTS}tiny-llama-ar-random", Law(1.0)),
        ("tiny-ar", Law(0.8, 0.9)),
    ],
    ids=str,
)
def test_an_answer_is_that_of_generate_in_lanes_of_any_number(name, law):
    verifier = verifier_of(name)
    asks, lanes = asks_of(verifier, law), answerer(verifier, 4)
    assert isinstance(lanes, Lanes)
    first = made(lanes, asks)
    assert first == made(Lanes(lanes.model, lanes.ends, 64), asks[::-1])[::-1]
    assert first == made(Generated(verifier.model, verifier.eos, 5), asks)
    for ask, answer in zip(asks, first, strict=True):
        assert len(answer) == ask.limit or answer[-1] in verifier.eos
    if law.greedy:
        for ask, answer in zip(asks[:4], first, strict=False):
            ids = torch.tensor([ask.prompt])
            text = verifier.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=ask.limit, do_sample=False
            )
            assert text[0, len(ask.prompt) :].tolist() == answer
    else:
        assert first != made(lanes, [Ask(a.prompt, a.limit, law, a.seed + 1) for a in asks])


def test_laws_share_a_forward_and_what_an_answer_leads_to_is_asked_next():
    verifier = verifier_of(f"{CHECKPOINTS}tiny-llama-ar-random")
    lanes, left, found = answerer(verifier, 3), [Ask((7 + i,), 5, Law(1.0, 0.9), i) for i in range(4)], {}

    def more(n):
        taken = left[:n]
        del left[:n]
        return taken

    for ask, answer in lanes.answers(more):
        found[ask] = answer
        if not ask.law.greedy:
            left.append(Ask(tuple(answer), 30))
    drawn, greedy = ([ask for ask in found if ask.law.greedy is kind] for kind in (False, True))
    assert len(drawn) == 4 and {ask.prompt for ask in greedy} == {tuple(found[ask]) for ask in drawn}
    assert [found[ask] for ask in (*drawn, *greedy)] == made(
        Generated(verifier.model, verifier.eos, 1), (*drawn, *greedy)
    )


def test_what_prompts_begin_with_is_read_once(monkeypatch):
    verifier = verifier_of(f"{CHECKPOINTS}tiny-llama-ar-random")
    head, asks, lanes = (9, 8, 7, 6, 5), asks_of(verifier, Law(), 6), answerer(verifier, 2)
    asks = [Ask((*head, *ask.prompt), ask.limit) for ask in asks] + [Ask((9, 8, 50), 5), Ask((40,), 5)]
    fed, forward = [], lanes.model.forward

    def counted(ids, pos=None, **options):
        fed.append(ids.numel() if pos is None else int((pos >= 0).sum()))
        return forward(ids, pos, **options)

    monkeypatch.setattr(lanes.model, "forward", counted)
    answers = made(lanes, asks)
    assert answers == made(Generated(verifier.model, verifier.eos, 1), asks)
    monkeypatch.setattr(lanes, "_begin", lambda texts: 0)
    once = sum(fed)
    fed.clear()
    assert made(lanes, asks) == answers
    assert sum(fed) - once == 5 * (6 - 1) + 2  # of six prompts and of one that shares two tokens


def test_memory_that_runs_out_halves_the_lanes(monkeypatch, caplog):
    verifier = verifier_of(f"{CHECKPOINTS}tiny-llama-ar-random")
    asks, lanes = asks_of(verifier, Law()), answerer(verifier, 12)
    whole, forward, store = made(lanes, asks), lanes.model.forward, lanes.model.new_store

    def fits(ids, *args, **options):
        if options["store"].keys[0].shape[0] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(ids, *args, **options)

    monkeypatch.setattr(lanes.model, "forward", fits)
    with caplog.at_level("WARNING"):
        assert made(lanes, asks) == whole
    assert "12 answers at once do not fit on cpu: going on with 6" in caplog.text and lanes.width == 3

    def none(lanes, slots):
        if lanes:
            raise RuntimeError("can't allocate memory")
        return store(lanes, slots)

    monkeypatch.setattr(lanes.model, "new_store", none)
    with pytest.raises(DllmError, match="not even one answer fits on cpu"):
        made(lanes, asks)


def test_other_verifiers_are_asked_by_their_own_generate(caplog):
    verifier = verifier_of(f"{CHECKPOINTS}tiny-llama-ar-random")
    verifier.model.generation_config.repetition_penalty = 1.3
    source = answerer(verifier, 4)
    assert isinstance(source, Generated)
    asks = asks_of(verifier, Law(), 5)
    for ask, answer in zip(asks, made(source, asks), strict=True):
        ids = torch.tensor([ask.prompt])
        text = verifier.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ask.limit)
        assert text[0, len(ask.prompt) :].tolist() == answer


def test_lanes_share_the_tensors_that_are_the_verifiers():
    verifier = verifier_of("tiny-ar")
    lanes = answerer(verifier, 2)
    assert isinstance(lanes, Lanes)
    theirs = {p.data_ptr() for p in verifier.model.parameters()}
    sizes = [(p.data_ptr() in theirs, p.nbytes) for p in lanes.model.transformer.parameters()]
    assert sum(n for own, n in sizes if own) > 0.39 * sum(n for _, n in sizes)
    before = verifier.model.lm_head.weight.clone()
    lanes.model.transformer.float()  # what is done with the one changes nothing of the other
    assert verifier.model.lm_head.weight.dtype == torch.float64 and torch.equal(verifier.model.lm_head.weight, before)
