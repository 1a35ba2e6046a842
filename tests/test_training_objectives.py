"""Objectives of alignment beside DEER's: what they score, that they learn, and drafters that learn from traffic."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from drafting_kit import golden, plain

import dllm
from dllm.bench import objectives as bench
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Need
from dllm.drafting.proposal import drawn as draws_of
from dllm.drafting.registry import as_drafter
from dllm.drafting.window import Window
from dllm.errors import DllmError
from dllm.models.recast import cut
from dllm.training import online
from dllm.training.alignment.loop import align, drawn
from dllm.training.alignment.objective import Learner
from dllm.training.alignment.registry import as_objective
from dllm.training.answers import Style, continuations
from dllm.training.config import AlignConfig, Stage
from dllm.training.data import Pair
from dllm.training.laws import DIVERGENCES, expected_length, kept, tvd
from dllm.training.online import OnlineDrafter, Pace
from dllm.training.traffic import Recorder, Traffic, masked

torch.set_num_threads(1)
SEP, BLOCK, NEW = 3, 6, 16
PROMPTS = [[10 + i, 40 + i, 70 + i] for i in range(4)]
FIXED = {"length": f"fixed:k={BLOCK}", "carry": "off", "search": "argmax"}


@pytest.fixture(scope="module")
def verifier():
    return golden("tiny-llama-ar-random")


@pytest.fixture(scope="module")
def data(verifier):
    return continuations(verifier, PROMPTS, Style(NEW))


@pytest.fixture
def learner(verifier):
    return Learner(cut(dllm.load("tests/golden/checkpoints/tiny-llada-trained"), 1), BLOCK, SEP, verifier)


def step(what, data, learner, seed=0):
    """The objective, its rows, and its loss."""
    objective = as_objective(what)
    texts = objective.texts(data, learner, drawn(seed, 0, 0))
    rows = learner.rows(texts)
    total, weight = objective.loss(rows, learner)
    return objective, rows, total / weight


def said(verifier, rows, clean):
    """The verifier's law of every masked token, text by text."""
    found = []
    for b, column in zip(rows.text.tolist(), rows.place.tolist(), strict=True):
        with torch.no_grad():
            found.append(verifier(input_ids=clean[b : b + 1, :column]).logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("on_policy", (False, True))
@pytest.mark.parametrize("name", ("forward-kl", "tvd"))
def test_distillation_compares_with_the_verifiers_law_behind_the_tokens_before(
    verifier, data, learner, name, on_policy
):
    what = {"name": "distillation", "divergence": name, "on_policy": on_policy, "max_suffix": 5}
    _, rows, loss = step(what, data, learner)
    with torch.no_grad():
        q = learner.logits(rows).log_softmax(-1)
    clean = rows.clean.clone()
    if on_policy:
        own = draws_of(q.exp(), rows.extra["u"])[:, 0]
        assert not torch.equal(own, rows.target)
        clean[rows.text, rows.place] = own
    p = said(verifier, rows, clean)[:, : q.shape[1]]
    by_hand = (DIVERGENCES[name](p, q) * rows.weight).sum() / rows.weight.sum()
    assert float(loss.detach()) == pytest.approx(float(by_hand), rel=1e-4)


def test_selection_keeps_the_slots_that_are_furthest_behind_the_reference(verifier, data, learner, tmp_path):
    other = dllm.load("tests/golden/checkpoints/tiny-llada-trained")
    other.save(tmp_path)
    _, rows, loss = step(f"selective:reference={tmp_path},share=0.3,max_suffix=5,alpha=1.1", data, learner)
    with torch.no_grad():
        q = learner.logits(rows).log_softmax(-1)
        before = replace(learner, model=other).logits(rows).log_softmax(-1)
    p = said(verifier, rows, rows.clean)[:, : q.shape[1]]
    nats = DIVERGENCES["forward-kl"](p, q)
    weight = rows.weight * kept(nats - DIVERGENCES["forward-kl"](p, before), 0.3)
    assert int((weight > 0).sum()) == max(1, round(0.3 * len(weight)))
    assert float(loss.detach()) == pytest.approx(float((nats * weight).sum() / weight.sum()), rel=1e-4)


def test_a_selection_names_its_reference():
    with pytest.raises(DllmError, match="reference=FOLDER"):
        as_objective("selective")


def test_the_loss_of_a_policy_is_the_total_variation(verifier, data, learner):
    _, rows, loss = step("policy:max_suffix=5", data, learner)
    q = learner.logits(rows).detach().log_softmax(-1)
    distances = tvd(said(verifier, rows, rows.clean)[:, : q.shape[1]], q) * rows.weight
    assert float(loss.detach()) == pytest.approx(float(distances.sum() / rows.weight.sum()), rel=1e-4)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_the_loss_of_a_length_is_the_share_that_is_rejected(verifier, data, learner, temperature):
    what = {"name": "length", "max_suffix": 5, "draws": 2, "temperature": temperature}
    _, rows, loss = step(what, data, learner)
    q = learner.logits(rows).detach().log_softmax(-1)
    if temperature:
        p = said(verifier, rows, rows.clean)[:, : q.shape[1]]
    else:  # the verifier's own greedy answers
        p = torch.full_like(q, float("-inf"))
        p[torch.arange(len(p)), rows.target] = 0.0
    lengths = expected_length(p, q, rows.target, rows.text, rows.place, tuple(rows.clean.shape), 2)
    assert 0 < float(lengths.sum()) < len(q)
    assert float(loss.detach()) == pytest.approx(1 - float(lengths.sum()) / len(q), rel=1e-4)


@pytest.mark.parametrize("what", ("length:max_suffix=5,temperature=1", "distillation:on_policy=true,max_suffix=5"))
def test_drafts_of_one_text_that_share_a_row_score_as_they_do_alone(verifier, what):
    model = dllm.load("tests/golden/checkpoints/tiny-sdar-random")
    assert model.block_size
    learner, objective = Learner(model, BLOCK, verifier=verifier, pack=200), as_objective(what)
    answers = [Pair([10, 11, 12], [*range(20, 50)]), Pair([13, 14], [*range(60, 80)])]
    texts = objective.texts([answers[0], *answers], learner, drawn(3, 0, 0))
    together = learner.rows(texts)
    assert len(together.clean) < len(texts) and len(together.ids) == 1  # they share
    with torch.no_grad():
        alone = [objective.loss(learner.rows([text]), learner).total for text in texts]
        torch.testing.assert_close(objective.loss(together, learner).total, torch.stack(alone).sum())


OBJECTIVES = (
    *(f"distillation:divergence={name},max_suffix=5" for name in DIVERGENCES),
    "distillation:on_policy=true,max_suffix=5",
    "policy:max_suffix=5,draws=32",
    "length:max_suffix=5",
    "length:max_suffix=5,draws=3",
    "replay:every=10",
)


@pytest.mark.parametrize("what", OBJECTIVES)
def test_every_objective_lowers_its_loss(data, learner, what):
    config = AlignConfig("unused", tasks={"word_problems": 1}, batch_size=8)
    align(learner, data, replace(config, stages=(Stage("refinement:max_suffix=5", 30, 3e-3),)))
    objective, rows, before = step(what, data * 4, learner)
    rate = 1e-3 if what.startswith("length") else 3e-3  # its gradient lives on a few slots
    align(learner, data, replace(config, stages=(Stage(what, 20, rate),)))
    with torch.no_grad():
        total, weight = objective.loss(rows, learner)
    assert float(total / weight) < 0.98 * float(before.detach())


# ----------------------------------------------------------------------------------------------------- traffic


def decode(verifier, drafter, **options):
    return dllm.speculate(verifier, drafter, PROMPTS, max_new_tokens=NEW, **{**FIXED, **options})


def test_a_recorder_keeps_what_the_verifier_said_up_to_the_rejected_slot(verifier, learner):
    traffic = Traffic(100)
    outs = decode(verifier, Recorder(learner.model, traffic, suffix_token_id=SEP))
    assert traffic.texts == len(PROMPTS)
    rejected = sum(r.accepted < r.nodes for out in outs for r in out.rounds)
    assert len(traffic.rounds) == rejected > 10
    plainly = DiffusionDrafter(learner.model, suffix_token_id=SEP)
    for ids, told in list(traffic.rounds)[::4]:
        text, m = ids[: told.start], len(told.best)
        assert ids in [out.sequences for out in outs] and 1 <= m <= told.k <= BLOCK
        assert [best[0] for best in told.best] == ids[told.start : told.start + m]  # greedy: its best token is emitted
        with torch.no_grad():
            logits = verifier(input_ids=torch.tensor([ids[: told.start + m - 1]])).logits[0, -1]
        top = logits.float().softmax(-1).topk(len(told.prob[-1]))
        assert told.best[-1] == top.indices.tolist()
        torch.testing.assert_close(torch.tensor(told.prob[-1]), top.values)
        again = dllm.speculate(verifier, plainly, text, max_new_tokens=told.k + 1, **FIXED)
        assert again.rounds[0].accepted == m - 1  # the slot was rejected
        row = masked(ids, told, learner)
        assert row.ids[: told.start] == text and len(row.ids) == told.start + told.k
        assert row.masked.nonzero()[:, 0].tolist() == list(range(told.start, told.start + told.k))
        assert row.weight.nonzero()[:, 0].tolist() == list(range(told.start, told.start + m))


def test_carried_drafts_and_trees_are_recorded_at_their_own_text_only(verifier, learner):
    traffic = Traffic(1000)
    for options in ({"carry": "always"}, {"tree": 8, "search": None}):
        outs = decode(verifier, Recorder(learner.model, traffic), **options)
        assert sum(r.k > 0 and not r.carried for out in outs for r in out.rounds) >= len(traffic.rounds) > 0
        for ids, told in traffic.rounds:
            assert [b[0] for b in told.best] == ids[told.start : told.start + len(told.best)]
        traffic.rounds.clear()


def test_memory_is_bounded_and_the_oldest_rounds_leave(verifier, learner):
    small, large = Traffic(5), Traffic(500)
    for traffic in (small, large):
        decode(verifier, Recorder(learner.model, traffic))
    assert list(small.rounds) == list(large.rounds)[-5:]
    again = Traffic(5)
    again.load_state_dict(small.state_dict())
    assert [(ids, told) for ids, told in again.rounds] == list(small.rounds) and again.texts == small.texts


def test_replays_go_on_from_their_state(data, learner):
    first = as_objective("replay:every=3")
    for i in range(2):
        first.texts(data, learner, drawn(0, 0, i))
    second = as_objective("replay:every=3")
    second.load_state_dict(first.state_dict())
    for i in range(2, 5):  # a rollout among them
        one, other = (o.texts(data, learner, drawn(0, 0, i)) for o in (first, second))
        assert [t.ids for t in one] == [t.ids for t in other]


def weights(drafter):
    return torch.cat([p.detach().flatten() for p in drafter.model.transformer.parameters()])


def test_an_online_drafter_learns_and_texts_stay_the_verifiers_own(verifier, learner):
    drafter = OnlineDrafter(learner.model, pace=Pace(every=4, steps=25, lr=3e-3), suffix_token_id=SEP)
    taus = []
    for _ in range(4):
        before = weights(drafter)
        outs = decode(verifier, drafter)
        assert [out.sequences for out in outs] == [plain(verifier, p, NEW) for p in PROMPTS]
        assert not torch.equal(before, weights(drafter))  # four texts: an update
        taus.append(sum(out.tau for out in outs) / len(outs))
    assert taus[-1] > taus[0] + 0.2
    assert all(p.grad is None for p in learner.model.transformer.parameters())


def test_an_online_drafter_learns_only_when_told_without_a_pace(verifier, learner):
    drafter = OnlineDrafter(learner.model, pace=Pace(every=0, lr=3e-3))
    assert drafter.update() == []  # it has seen nothing
    before = weights(drafter)
    with torch.inference_mode():  # as a caller may
        decode(verifier, drafter)
        assert torch.equal(before, weights(drafter))
        losses = drafter.update(20)
    assert len(losses) == 20 and losses[-1] < losses[0] and not torch.equal(before, weights(drafter))


def test_a_saved_online_drafter_goes_on_to_the_same_weights(verifier, learner, tmp_path):
    pace = Pace(every=4, steps=3)
    drafter = OnlineDrafter(learner.model, pace=pace, suffix_token_id=SEP)
    decode(verifier, drafter)
    drafter.save(tmp_path)
    again = OnlineDrafter.load(tmp_path, pace=pace)
    assert again.suffix == SEP and list(again.traffic.rounds) == list(drafter.traffic.rounds)
    for one in (drafter, again):
        decode(verifier, one)
    torch.testing.assert_close(weights(again), weights(drafter), rtol=0, atol=0)
    assert isinstance(as_drafter(str(tmp_path)), DiffusionDrafter)  # and anybody drafts with it
    slower = OnlineDrafter.load(tmp_path, pace=Pace(lr=1e-5))
    assert [group["lr"] for group in slower.student.optimizer.param_groups] == [1e-5]


def test_an_online_drafter_refuses_what_it_cannot_learn(verifier, learner):
    with pytest.raises(DllmError, match="dtype='float32'"):
        OnlineDrafter(learner.model.to(dtype=torch.bfloat16))
    with pytest.raises(DllmError, match="steps"):
        Pace(steps=0)
    with pytest.raises(DllmError, match="divergence"):
        Pace(divergence="kl")


KEPT = [*range(3, 90, 2), 100]


def test_a_trimmed_head_is_that_of_the_weights_that_were_learned(verifier, learner, tmp_path):
    drafter = OnlineDrafter(learner.model, pace=Pace(every=4, steps=5, lr=3e-3))
    for _ in range(2):  # a call whose texts end with an update, and one behind it
        outs = decode(verifier, drafter, trim=KEPT, window=9)
        assert [out.sequences for out in outs] == [plain(verifier, p, NEW) for p in PROMPTS]
    drafter.save(tmp_path)
    need = Need(verifier.config.vocab_size, frozenset({8}), trim=tuple(KEPT), window=Window(9))
    text = [*PROMPTS[0], *range(20, 40)]
    one, other = drafter.fork(), as_drafter(str(tmp_path))
    for source in (one, other):
        source.reset(text, need)
    rows = learner.model.transformer.head_weight[one.head.vocabulary.shared.drafter.on(torch.device("cpu"))]
    assert torch.equal(one.head.rows, rows) and not one.head.rows.requires_grad
    assert torch.allclose(one.draft(text, 4).logp, other.draft(text, 4).logp, atol=1e-5)


@pytest.mark.parametrize("window", [5, "5:sinks=1", "auto"])
def test_what_is_learned_reads_what_the_drafts_read(verifier, learner, window):
    drafter = OnlineDrafter(learner.model, pace=Pace(every=0, lr=3e-3))
    decode(verifier, drafter, window=window)
    seen = drafter.traffic.window
    assert seen.tokens == (5 if window != "auto" else 64)  # or as much more as cost little
    for ids, told in drafter.traffic.rounds:
        row = masked(ids, told, drafter_learner := Learner(learner.model, 0, None), seen)
        read = seen.of(ids[: told.start])
        assert row.ids[: len(read)] == read and len(row.ids) == len(read) + told.k
        assert row.masked.nonzero()[:, 0].tolist() == list(range(len(read), len(read) + told.k))
        assert row.extra["best"][len(read)].tolist() == told.best[0]
        assert drafter_learner.rows([row]).ids.shape[1] == len(row.ids)
    losses = drafter.update(12)
    assert losses[-1] < losses[0]


def test_an_update_that_does_not_fit_takes_the_same_step_in_parts(verifier, learner, tmp_path, monkeypatch):
    drafter = OnlineDrafter(learner.model, pace=Pace(every=0, batch_size=8))
    decode(verifier, drafter)
    drafter.save(tmp_path)
    again, score, most = OnlineDrafter.load(tmp_path, pace=Pace(every=0, batch_size=8)), online.loss, [3]

    def scarce(rows, learner, divergence):
        if len(rows.ids) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(rows, learner, divergence)

    (whole,) = drafter.update(1)
    monkeypatch.setattr(online, "loss", scarce)
    assert again.update(1) == pytest.approx([whole], abs=1e-5)
    torch.testing.assert_close(weights(again), weights(drafter), rtol=0, atol=2e-5)
    most[0] = 0
    with pytest.raises(DllmError, match="not even one round"):
        again.update(1)


def test_a_kill_within_a_save_leaves_what_loads(verifier, learner, tmp_path, monkeypatch):
    drafter = OnlineDrafter(learner.model, pace=Pace(every=4, steps=1))
    decode(verifier, drafter)
    drafter.save(tmp_path)
    before, write = weights(drafter), online.save_atomically
    for file in ("online.pt", "traffic.pt"):
        decode(verifier, drafter)

        def killed(value, path, file=file):
            if path.name == file:
                raise KeyboardInterrupt
            write(value, path)

        monkeypatch.setattr(online, "save_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            drafter.save(tmp_path)
        again = OnlineDrafter.load(tmp_path)
        assert again.traffic.texts == len(PROMPTS) and again.student.updates == {"online.pt": 1, "traffic.pt": 3}[file]
        assert torch.equal(weights(again), before if file == "online.pt" else weights(drafter))


def test_a_draw_is_with_replacement_and_by_its_generator_alone(verifier, learner):
    traffic = Traffic(100)
    decode(verifier, Recorder(learner.model, traffic))
    one, other = (traffic.draw(200, random.Random("a")) for _ in range(2))
    assert one == other and len(one) == 200


# ------------------------------------------------------------------------------------------------------- bench


def test_the_bench_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "START", (Stage("refinement:max_suffix=24", 1, 3e-3),))
    monkeypatch.setattr(bench, "TRAIN", {"functions": 8})
    first = list(bench.run(["selective"], n=2, steps=1, out=tmp_path))
    monkeypatch.setattr(bench, "align", None)  # nothing is trained again
    assert list(bench.run(["selective"], n=2, steps=1, out=tmp_path)) == first
    names = [f"{task}, {name}: tau" for name in ("start", "forward-kl", "selective") for task in bench.TASKS]
    assert [f.name for f in first if "above" not in f.name] == names  # with the reference of the selection
    assert all(f.note.endswith("0 texts differ") for f in first if "above" in f.name)
    with pytest.raises(DllmError, match="another number of steps"):
        list(bench.run(["selective"], n=2, steps=2, out=tmp_path))
    with pytest.raises(DllmError, match="did you mean 'jsd'"):
        next(bench.run(["jsb"], out=tmp_path))
