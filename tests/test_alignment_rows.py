"""Rows of alignment: packed or sharing a beginning, texts are read as each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drafting_kit import golden

import dllm
from dllm.models.native import NativeModel
from dllm.models.transformer import Transformer
from dllm.training.alignment.continuation import Continuation
from dllm.training.alignment.diffusion import Diffusion
from dllm.training.alignment.loop import drawn
from dllm.training.alignment.objective import Learner
from dllm.training.data import Pair

torch.set_num_threads(1)
DATA = [Pair([10, 11, 12], [20, 21, 22, 23, 24, 2]), Pair([10], [30 + i for i in range(20)]), Pair([10], [31, 9])]
KINDS = [(None, 0), (None, 1), (4, 0), (4, 1), (1, 1)]


def learner_of(block_size, shift, **options):
    model = dllm.load("tests/golden/checkpoints/tiny-llada-trained")
    config = replace(model.config, block_size=block_size, shift=shift)
    network = Transformer(config)
    network.load_state_dict(model.transformer.state_dict())
    return Learner(NativeModel(config, network.double()), 6, 3, golden("tiny-llama-ar-random").double(), **options)


def several(learner, seed=0):
    """Three cuts of each answer, one after another."""
    return Continuation().texts([c for c in DATA for _ in range(3)], learner, drawn(seed, 0, 0))


@pytest.mark.parametrize("pack", [0, 40, 1000])
@pytest.mark.parametrize(("block_size", "shift"), KINDS)
def test_texts_in_one_row_are_read_as_each_alone(block_size, shift, pack):
    learner = learner_of(block_size, shift, pack=pack)
    alone = learner_of(block_size, shift)
    texts = several(learner)
    rows = learner.rows(texts)
    each = [alone.rows([text]) for text in texts]
    if block_size and not pack:
        assert len(rows.ids) <= len(DATA)  # the cuts of an answer share its beginning
        begins = [int(text.masked.int().argmax()) // block_size * block_size for text in texts]
        saved = sum(sum(begins[i : i + 3]) - max(begins[i : i + 3]) for i in range(0, len(begins), 3))
        assert (rows.pos >= 0).sum() <= sum((r.pos >= 0).sum() for r in each) - saved and saved > 0
    if pack == 1000:
        assert len(rows.ids) == 1
    found, expected = learner.logits(rows), torch.cat([alone.logits(r) for r in each])
    said, behind = learner.teacher(rows), torch.cat([alone.teacher(r) for r in each])
    held = torch.cat([torch.stack([r.target, r.place], 1) for r in each])
    order = sorted(range(len(held)), key=lambda i: (*held[i].tolist(), expected[i, 0].detach().item()))
    mine = torch.stack([rows.target, rows.place], 1)
    others = sorted(range(len(mine)), key=lambda i: (*mine[i].tolist(), found[i, 0].detach().item()))
    torch.testing.assert_close(mine[others], held[order])
    torch.testing.assert_close(found[others], expected[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said[others], behind[order], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        total, weight = Continuation().loss(rows, learner)
        sums = [Continuation().loss(r, alone) for r in each]
    expected = sum(float(s.total) for s in sums) / sum(float(s.weight) for s in sums)
    assert float(total / weight) == pytest.approx(expected, rel=1e-6)


def test_a_masked_token_is_read_where_it_would_be_drafted():
    learner = learner_of(1, 1)
    text = several(learner)[0]
    rows = learner.rows([text])
    first = int(text.masked.int().argmax())
    ids = torch.where(text.masked, learner.model.mask_id, torch.tensor(text.ids))
    drafted = learner.model.forward(ids[None])[0, int(first) - 1]
    hidden = learner.model.transformer(rows.ids, rows.pos, visible=rows.visible)[rows.row, rows.source]
    torch.testing.assert_close(hidden[0], drafted)


@pytest.mark.parametrize("block_size", [4, None])
def test_blocks_and_their_complements_mask_every_token_of_an_answer_once(block_size):
    learner = learner_of(block_size, 1, pack=1000)
    texts = Diffusion(complementary=True).texts(DATA, learner, drawn(0, 0, 0))
    assert all(text.masked.any() for text in texts)
    size, end = block_size or learner.block, learner.model.eos_ids[0]
    for pair in DATA:
        ids = [*pair.prompt, *pair.answer]
        ids += [end] * (-len(ids) % size)
        times = torch.zeros(len(ids))
        for text in texts:
            if text.ids == ids[: len(text.ids)]:
                times[: len(text.ids)] += text.masked
        assert times.tolist() == [0.0] * len(pair.prompt) + [1.0] * (len(ids) - len(pair.prompt))
    half = Diffusion().texts(DATA, learner, drawn(0, 0, 0))
    assert len(half) < len(texts) and all(any(torch.equal(t.masked, h.masked) for t in texts) for h in half)
