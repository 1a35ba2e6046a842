"""Alignment: what the objectives mask and weigh, that acceptance rises, and runs that go on where they were cut off."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
from drafting_kit import golden, plain

import dllm
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.registry import as_drafter
from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.models.recast import cut
from dllm.training import answers
from dllm.training.alignment import recipe
from dllm.training.alignment.continuation import Continuation
from dllm.training.alignment.loop import align, drawn
from dllm.training.alignment.objective import Learner
from dllm.training.alignment.recipe import separator
from dllm.training.alignment.refinement import Refinement
from dllm.training.alignment.registry import as_objective
from dllm.training.answers import Style, continuations
from dllm.training.config import AlignConfig, Stage, load_recipe
from dllm.training.data import Pair

torch.set_num_threads(1)
SEP, BLOCK = 3, 8


@pytest.fixture(scope="module")
def model():
    return dllm.load("tests/golden/checkpoints/tiny-llada-trained")


DATA = [Pair([10, 11, 12], [20, 21, 22, 23, 24, 2]), Pair([10], [30 + i for i in range(20)])]


def rows_of(objective, data, learner, seed):
    return learner.rows(objective.texts(data, learner, drawn(seed, 0, 0)))


def by_row(rows, b):
    at = rows.row == b
    return rows.column[at].tolist(), rows.target[at].tolist(), rows.weight[at]


def stages(*steps_and_rates):
    names = ("continuation", "refinement")
    return tuple(Stage(name, *each) for name, each in zip(names, steps_and_rates, strict=True))


def test_continuation_masks_behind_a_random_cut_and_closes_the_block(model):
    seen = set()
    for seed in range(30):
        rows = rows_of(Continuation(), DATA, Learner(model, BLOCK, SEP), seed)
        for b, c in enumerate(DATA):
            row = rows.ids[b, rows.pos[b] >= 0].tolist()
            assert row[-1] == SEP
            cut = len(row) - 1 - BLOCK - len(c.prompt)
            seen.add((b, cut))
            assert row[: len(c.prompt) + cut] == c.prompt + c.answer[:cut]  # the prefix is clean
            wanted = (c.answer[cut:] + [model.eos_ids[0]] * BLOCK)[:BLOCK]  # past its end an answer goes on with EOS
            columns, targets, weights = by_row(rows, b)
            assert columns and all(row[i] == model.mask_id for i in columns)
            assert targets == [wanted[i - len(c.prompt) - cut] for i in columns]
            assert len(set(weights.tolist())) == 1 and weights[0] >= 1  # 1 / t, one rate a row
    assert {cut for b, cut in seen if b == 0} == set(range(6))


def test_the_masking_rate_is_the_inverse_weight(model):
    many, n, expected = [DATA[1]] * 64, 0, 0.0
    for seed in range(20):
        rows = rows_of(Continuation(), many, Learner(model, BLOCK), seed)
        n += len(rows.row)
        expected += sum(BLOCK / float(rows.weight[rows.row == b][0]) for b in range(64))
    assert n / expected == pytest.approx(1.0, abs=0.06)  # at least one mask a row adds a little


def test_refinement_masks_the_end_and_weighs_its_beginning_most(model):
    lengths = set()
    for seed in range(40):
        rows = rows_of(Refinement(1.1, 5), DATA, Learner(model, BLOCK, SEP), seed)
        for b, c in enumerate(DATA):
            columns, targets, weights = by_row(rows, b)
            r = len(columns)
            lengths.add(r)
            end = columns[-1] + 1 - len(c.prompt)
            assert columns == list(range(columns[0], columns[0] + r)) and targets == c.answer[end - r : end]
            assert weights.tolist() == pytest.approx([1.1 ** (r - i) for i in range(1, r + 1)])
            assert rows.ids[b, columns[-1] + 1] == SEP
    assert lengths == {1, 2, 3, 4, 5}


def test_loss_by_hand(model):
    learner, objective = Learner(model, BLOCK, SEP), Refinement(1.5, 3)
    rows = rows_of(objective, DATA[:1], learner, 1)
    with torch.no_grad():
        hidden = model.transformer(rows.ids)
        logp = torch.log_softmax(model.transformer.head(hidden[0, rows.column]).float(), -1)
        by_hand = -(logp[torch.arange(len(rows.target)), rows.target] * rows.weight).sum()
        total, weight = objective.loss(rows, learner)
        assert float(total) == pytest.approx(float(by_hand), rel=1e-5) and weight == rows.weight.sum()


def test_the_teacher_speaks_of_the_masked_tokens_in_their_places(model):
    verifier = golden("tiny-llama-ar-random")
    learner = Learner(model, BLOCK, SEP, verifier)
    rows = rows_of(Refinement(1.5, 3), DATA, learner, 1)
    said = learner.teacher(rows)
    assert not said.requires_grad and said.shape == (len(rows.target), model.vocab_size)
    for logits, b, column in zip(said, rows.row.tolist(), rows.column.tolist(), strict=True):
        with torch.no_grad():
            alone = verifier(rows.clean[b : b + 1, :column]).logits[0, -1]
        torch.testing.assert_close(logits, alone[: model.vocab_size], rtol=1e-4, atol=1e-5)
    with pytest.raises(DllmError, match="asks the verifier"):
        Learner(model, BLOCK).teacher(rows)


def test_acceptance_rises_on_the_verifiers_own_outputs(model):
    verifier = golden("tiny-llama-ar-random")
    prompts = [[10 + i, 40 + i, 70 + i] for i in range(4)]
    data = continuations(verifier, prompts, Style(16), 2)
    for c, prompt in zip(sorted(data), sorted(prompts), strict=True):
        assert [*c.prompt, *c.answer] == plain(verifier, prompt, 16)[: len(c.prompt) + len(c.answer)]
    small = cut(model, 1)
    assert small.config.n_layers == 1
    assert torch.equal(small.transformer.embed_tokens.weight, model.transformer.embed_tokens.weight)

    def tau():
        drafter = DiffusionDrafter(small, suffix_token_id=SEP)
        outs = [dllm.speculate(verifier, drafter, p, max_new_tokens=16, length="fixed:k=6") for p in prompts]
        for out, prompt in zip(outs, prompts, strict=True):
            assert out.tokens == next(c.answer for c in data if c.prompt == prompt)
        return sum(len(o.tokens) for o in outs) / sum(o.n_verify for o in outs)

    before = tau()
    both = stages((60, 1e-2), (140, 6e-3))
    config = AlignConfig("unused", tasks={"x": 1}, block=6, stages=both, batch_size=8)
    losses = align(Learner(small, 6, SEP), data, config)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert tau() > before + 0.2


def test_recipes_and_mistakes(model, tmp_path):
    tiny = load_recipe("configs/align/tiny.yaml")
    assert tiny.verifier.name == "tiny-ar" and tiny.stages[0].steps > 0
    assert as_objective(tiny.stages[1].objective) == Refinement(alpha=1.01, max_suffix=24)
    path = tmp_path / "r.yaml"
    path.write_text("kind: drafter\noutput: x\ntasks: {word_problems: 2}\nblok: 8\n")
    with pytest.raises(DllmError, match="block"):
        load_recipe(path)
    with pytest.raises(DllmError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(DllmError, match="prompts once"):
        AlignConfig("x")
    with pytest.raises(DllmError, match="save_every=0 must be at least 1"):
        AlignConfig("x", tasks={"word_problems": 1}, save_every=0)
    with pytest.raises(DllmError, match=r"positive lr, not 3 and -1\.0"):
        Stage("continuation", 3, -1.0)
    with pytest.raises(DllmError, match=r"alpha=0\.5 must be at least 1"):
        as_objective("refinement:alpha=0.5")
    with pytest.raises(DllmError, match="did you mean 'refinement'"):
        recipe.run(AlignConfig(str(tmp_path), tasks={"word_problems": 1}, stages=(Stage("refinment", 1, 1.0),)))
    assert not any(tmp_path.glob("checkpoint*"))
    with pytest.raises(DllmError, match="layers"):
        cut(model, 99)
    with pytest.raises(DllmError, match="teacher"):
        align(Learner(model, BLOCK), [], AlignConfig("x", tasks={"word_problems": 1}))
    with pytest.raises(DllmError, match=r"no answers in .*none\.jsonl"):
        answers.make(AlignConfig("x", data=str(tmp_path / "none.jsonl")))
    assert separator(model, tiny) == SEP


def test_an_interrupted_run_goes_on_to_the_same_drafter(tmp_path, monkeypatch):
    def config(name):
        return AlignConfig(
            str(tmp_path / name), layers=1, tasks={"word_problems": 6}, max_new_tokens=12, block=4,
            stages=(Stage("continuation", 4, 1e-3), Stage("refinement:max_suffix=4", 4, 1e-3)),
            batch_size=2, save_every=3, threads=1,
        )  # fmt: skip

    whole = recipe.run(config("whole"))
    steps, logits = iter(range(99)), Learner.logits

    def interrupted(learner, rows):
        if next(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return logits(learner, rows)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Learner, "logits", interrupted)
            recipe.run(config("halves"))
    finally:
        signal.signal(signal.SIGINT, before)
    file = tmp_path / "halves" / "answers.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 7 and json.loads(lines[0])["verifier"] == "tiny-ar"
    file.write_text("\n".join(lines[:5]) + "\n[[1, 2], [3,")  # as a full disk would leave it
    with pytest.raises(DllmError, match="go on with --resume"):
        recipe.run(config("halves"))
    with pytest.raises(DllmError, match="another recipe: block"):
        recipe.run(replace(config("halves"), block=5), resume=True)
    resumed = recipe.run(config("halves"), resume=True)
    assert sorted(file.read_text().splitlines()) == sorted(lines)
    for a, b in zip(whole.transformer.parameters(), resumed.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
    drafter = as_drafter(str(tmp_path / "halves" / "model"))
    assert drafter.suffix == SEP and drafter.model.config.n_layers == 1


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_trained(tmp_path):
    config = AlignConfig(
        str(tmp_path / "out"), verifier=Checkpoint("tests/golden/checkpoints/tiny-llama-ar-random"),
        tasks={"word_problems": 2},
        stages=stages((1, 1e-3), (1, 1e-3)),
    )  # fmt: skip
    with pytest.raises(DllmError, match="share no vocabulary"):
        recipe.run(config)
    assert not (tmp_path / "out" / "answers.jsonl").exists() and not (tmp_path / "out" / "model").exists()


def test_answers_with_ids_that_the_drafter_lacks_are_left_out_with_a_word(model, caplog):
    small, odd = cut(model, 1), Pair([10], [model.vocab_size])
    config = AlignConfig("unused", tasks={"x": 1}, stages=stages((1, 1e-3), (1, 1e-3)), batch_size=2)
    with caplog.at_level("WARNING"):
        assert len(align(Learner(small, BLOCK), [*DATA, odd], config)) == 2
    assert "1 of 3 teacher answers" in caplog.text
    with pytest.raises(DllmError, match="lacks"):
        align(Learner(small, BLOCK), [odd], config)


def test_the_dtype_of_a_recipe_is_that_of_teacher_and_saved_drafter(tmp_path, monkeypatch):
    teachers = []
    made_of = answers.continuations

    def seen(verifier, *args):
        teachers.append(verifier.model.dtype)
        return made_of(verifier, *args)

    monkeypatch.setattr(answers, "continuations", seen)
    config = AlignConfig(
        str(tmp_path / "out"), layers=1, tasks={"word_problems": 3}, max_new_tokens=6, block=4,
        stages=(Stage("continuation", 2, 1e-3),), batch_size=2, dtype="bfloat16", threads=1,
        trim=300,
    )  # fmt: skip
    made = recipe.run(config)
    how = json.loads((tmp_path / "out" / "model" / "drafter.json").read_text())
    assert len(how["vocab_keep"]) == 300 and set(made.eos_ids) <= set(how["vocab_keep"])
    assert teachers == [torch.bfloat16] and made.dtype == torch.bfloat16
    assert dllm.load(str(tmp_path / "out" / "model"), dtype="auto").dtype == torch.bfloat16
    with pytest.raises(DllmError, match="dtype"):
        load_recipe("configs/align/tiny.yaml", ["dtype=float8"])
