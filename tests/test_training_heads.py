"""Training a head over a verifier's hidden states, on the embedded verifier."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import dllm
from dllm.bench import heads as bench
from dllm.cli import app
from dllm.drafting.drafters import Need
from dllm.drafting.hidden.config import read_head
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.tasks.registry import generate
from dllm.training import heads
from dllm.training.config import AlignConfig, HeadRecipe, PairHeadConfig, ScheduleSpec, load_recipe
from dllm.training.data import Pair
from dllm.training.trainer import encoder

ANSWERS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Problems with their solutions, which the embedded verifier gives about so itself."""
    encode = encoder(dllm.load("tiny-ar"))
    pairs = [encode(e) for e in generate("word_problems", "train", ANSWERS, 0)]
    file = tmp_path_factory.mktemp("heads") / "answers.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def recipe(data, output, **other):
    given = dict(
        verifier=Checkpoint("tiny-ar"), taps=(1, 4), mask="<mask>", block=3, rank=8, vocabulary=300, window=8,
        intermediate_size=64, held_out=0.2, batch_size=8, anchors=12, schedule=ScheduleSpec(40, 4, 20), save_every=20,
    )  # fmt: skip
    return HeadRecipe(str(output), data=str(data), **{**given, **other})


@pytest.fixture(scope="module")
def mask():
    return dllm.load_verifier("tiny-ar").tokenizer.mask_token


@pytest.fixture(scope="module")
def trained(data, mask, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    return heads.run(recipe(data, output, mask=mask))


@pytest.fixture(scope="module")
def slim(data, mask, tmp_path_factory):
    """A head whose own output head of all ids has two factors."""
    output = tmp_path_factory.mktemp("slim") / "run"
    return heads.run(recipe(data, output, mask=mask, head_rank=24, vocabulary=1000))


def test_answers_that_are_all_held_out_are_refused(data, mask, tmp_path):
    one = tmp_path / "one.jsonl"
    for line in data.read_text().splitlines(keepends=True):  # whether an answer is held out, its prompt says
        one.write_text(line)
        asked = recipe(one, tmp_path / "run", mask=mask, held_out=0.5, schedule=ScheduleSpec(1, 1, 1))
        try:
            heads.run(asked)
        except DllmError as error:
            assert str(error) == "held_out=0.5 leaves none of 1 answers to train on: make more of them"
            return
        shutil.rmtree(tmp_path / "run")
    pytest.fail("none of the answers is held out")


@pytest.mark.parametrize("kind", ["trained", "slim"])
def test_a_trained_head_drafts_what_the_verifier_says(kind, data, request):
    trained = request.getfixturevalue(kind)
    verifier = dllm.load_verifier("tiny-ar")
    prompt = json.loads(data.read_text().splitlines()[3])[0]
    plain = dllm.speculate(verifier, None, prompt, max_new_tokens=24)
    out = dllm.speculate(verifier, str(trained), prompt, max_new_tokens=24, length="fixed:k=3", carry="off")
    assert out.tokens == plain.tokens
    assert out.tau > 1.5  # without a head 1


@pytest.mark.parametrize("kind", ["trained", "slim"])
def test_what_is_saved_drafts_as_what_was_trained(kind, request):
    """The drafter's greedy walk is the training's, with the tables multiplied out and the ids mapped."""
    trained, verifier = request.getfixturevalue(kind), as_verifier("tiny-ar")
    saved = torch.load(trained.parent / "checkpoint.pt", weights_only=True)
    config = read_head(json.loads((trained / "config.json").read_text()))
    weight = verifier.model.get_output_embeddings().weight.detach()
    embed = verifier.model.get_input_embeddings().weight.detach()
    head = heads.Trained(config, embed, weight[saved["known"]], saved["known"])
    head.load_state_dict(saved["weights"])
    for parameter in head.parameters():  # as they were saved
        parameter.data = parameter.data.bfloat16().float()
    texts = heads.told(verifier, [], config.taps, trained.parent / "states")[:6]
    drafter = as_drafter(str(trained))
    for stored in texts:
        text = stored.read()
        at = text.answer + 2
        blocks = heads.blocks_of([text], [[at]], config)
        drafter.reset(text.ids[:at].tolist(), Need(verifier.vocab, verifier.eos, model=verifier.model))
        drafter.take(text.states[:at].float(), 0)
        draft = drafter.draft(text.ids[: at + 1].tolist(), 3)
        with torch.no_grad():
            walked, logits = head.walk(blocks)[0].tolist(), head(blocks)[0]
        assert [column[0][0] for column in draft.columns][:1] == walked[:1]
        first = torch.log_softmax(logits[0], -1)
        best = int(head.own[draft.columns[0][0][0]])
        rounded = 0.1 if kind == "trained" else 0.25  # the tables of pairs, which a slim head leans on more
        assert draft.columns[0][0][1] == pytest.approx(float(first[best]), abs=rounded)


def test_factors_of_a_head_give_the_nearest_logits_of_their_rank():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 12, generator=g) + 3 * torch.randn(12, generator=g)
    hidden = torch.randn(90, 12, generator=g) @ torch.randn(12, 12, generator=g)
    moment, table = hidden.T @ hidden / 90, rows - rows.mean(0)
    up, down = heads.factors(rows, 5, moment)
    singular = torch.linalg.svdvals(hidden @ table.T)
    assert (up.shape, down.shape) == ((40, 5), (5, 12))
    lost = (hidden @ (table - up @ down).T).square().sum()
    assert float(lost) == pytest.approx(float(singular[5:].square().sum()), rel=1e-2)
    up, down = heads.factors(rows, 12, moment)
    laws = (torch.softmax(x, -1) for x in (hidden @ down.T @ up.T, hidden @ rows.T))
    torch.testing.assert_close(*laws, rtol=1e-3, atol=1e-5)


def test_the_moment_is_of_the_states_that_make_the_logits(data):
    verifier = as_verifier("tiny-ar")
    pairs = [Pair(*json.loads(line)) for line in data.read_text().splitlines()[:3]]
    states = [verifier.model.model(torch.tensor([p + a])).last_hidden_state[0] for p, a in pairs]
    states = torch.cat(states)
    torch.testing.assert_close(heads.moment(verifier, pairs), states.T @ states / len(states), rtol=1e-4, atol=1e-5)


def test_states_stay_on_the_disk_and_are_those_of_the_verifier(trained):
    verifier = as_verifier("tiny-ar")
    texts = heads.told(verifier, [], (1, 4), trained.parent / "states")
    held = next(text for text in texts if len(text.ids) > 9)
    told = held.read()
    with torch.no_grad():
        out = verifier.model(told.ids[None], output_hidden_states=True)
    expected = torch.stack([out.hidden_states[i + 1][0] for i in (1, 4)], 1)
    assert torch.equal(told.ids, held.ids.long()) and told.states.shape == (len(held.ids), 2, expected.shape[-1])
    torch.testing.assert_close(told.states.float(), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(told.best[:, 0], out.logits[0].argmax(-1))
    again = heads.told(verifier, [Pair(t.ids[: t.answer].tolist(), t.ids[t.answer :].tolist()) for t in texts], (1, 4),
                       trained.parent / "states")  # fmt: skip
    assert len(again) == len(texts)  # nothing is computed twice


def test_states_that_are_added_replace_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "SHARD", 1)
    verifier, data = as_verifier("tiny-ar"), [Pair([5, 6], list(range(7, 9 + i))) for i in range(3)]
    heads.told(verifier, data[:2], (1, 4), tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    assert len(heads.told(verifier, data, (1, 4), tmp_path)) == 3
    assert [file.stem for file in sorted(tmp_path.iterdir())] == ["00001", "00002", "00003"]


def test_memory_that_runs_out_names_a_batch_that_fits(data, mask, tmp_path, monkeypatch):
    score, forward = heads.score, heads._forward

    def scored(head, blocks, decay):
        if len(blocks.block) > 30:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return score(head, blocks, decay)

    def read(verifier, some, taps):
        if len(some) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(verifier, some, taps)

    monkeypatch.setattr(heads, "score", scored)
    monkeypatch.setattr(heads, "_forward", read)  # texts are read in batches that fit
    with pytest.raises(DllmError, match=r"batch_size 8 does not fit on cpu: batch_size 2 does"):
        heads.run(recipe(data, tmp_path / "run", mask=mask))


def test_a_head_of_few_ids_can_say_the_end():
    data = [Pair([7, 7, 3], [5, 6, 5, 4]), Pair([7], [6, 5])]
    assert heads.frequent(data, 3, 9).tolist() == [4, 5, 6]
    assert heads.frequent(data, 3, 9, {8}).tolist() == [5, 6, 8]
    assert heads.frequent(data, 6, 9, {8}).tolist() == [3, 4, 5, 6, 7, 8]


def test_blocks_see_the_states_before_their_anchor():
    config = read_head(
        {
            "architectures": ["DSparkDraftModel"], "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9, "rope_theta": 100.0,
            "layer_types": ["sliding_attention"], "sliding_window": 3, "block_size": 2, "num_target_layers": 4,
            "mask_token_id": 8, "target_layer_ids": [1],
            "dflash_config": {"projector_type": "dspark", "markov_rank": 2},
        }
    )  # fmt: skip
    n = 6
    best = torch.arange(n)[:, None].expand(n, heads.BEST)
    text = heads.Told(torch.arange(n), 2, torch.zeros(n, 1, 4), best, torch.ones(n, heads.BEST))
    blocks = heads.blocks_of([text, text], [[1, 4], [3]], config)
    assert blocks.block.tolist() == [[1, 8], [4, 8], [3, 8]]
    assert blocks.pos.tolist() == [[1, 2], [4, 5], [3, 4]]
    assert blocks.before.tolist() == [[1, 2], [4, 5], [3, 4]]
    assert blocks.best[..., 0].tolist() == [[1, 2], [4, 5], [3, 4]]  # the law behind the token before
    assert blocks.real.tolist() == [[True, True], [True, False], [True, True]]  # nothing stands behind the last token
    assert [[int(blocks.at[i]) if i >= 0 else -1 for i in row] for row in blocks.seen.tolist()] == [
        [-1, 0],
        [2, 3],
        [1, 2],
    ]


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(data, mask, trained, tmp_path):
    half = recipe(data, tmp_path / "run", mask=mask, schedule=ScheduleSpec(20, 4, 0))
    heads.run(half)
    heads.run(recipe(data, tmp_path / "run", mask=mask), resume=True)
    a, b = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
        for folder in (tmp_path / "run", trained.parent)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"mask": "<nothing>"}, "'<nothing>' is no token of tiny-ar"),
        ({"taps": (1, 5)}, "layer 5 of tiny-ar cannot be read; -1 to 4 can"),
        ({"data": "nowhere.jsonl"}, "there are no answers in nowhere.jsonl"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused(data, mask, tmp_path, other, said):
    with pytest.raises(DllmError, match=said):
        heads.run(recipe(**{"data": data, "output": tmp_path / "run", "mask": mask, **other}))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny", AlignConfig), ("smollm2-diffusion", AlignConfig), ("tiny-pairs", PairHeadConfig),
     ("smollm2-head", HeadRecipe)],
)  # fmt: skip
def test_a_shipped_recipe_says_itself_what_it_is_of(name, kind):
    assert type(load_recipe(f"configs/align/{name}.yaml", ["count=3", "batch_size=2"])) is kind


def test_a_recipe_is_of_what_it_says_whichever_keys_it_has(tmp_path):
    (tmp_path / "base.yaml").write_text("output: x\ndata: a.jsonl\nkind: pair-head\n")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nblock: 4\n")
    assert type(load_recipe(tmp_path / "r.yaml")) is PairHeadConfig
    assert type(load_recipe(tmp_path / "r.yaml", ["kind=drafter"])) is AlignConfig
    with pytest.raises(DllmError, match=r"--set kind=heads: kind: unknown kind of recipe 'heads'; did you mean 'head'"):
        load_recipe(tmp_path / "r.yaml", ["kind=heads"])
    with pytest.raises(DllmError, match="--set kind=\\[\\]: kind: unknown kind of recipe"):
        load_recipe(tmp_path / "r.yaml", ["kind=[]"])
    with pytest.raises(DllmError, match=r"--set rank=3: rank: unknown key 'rank'"):
        load_recipe(tmp_path / "r.yaml", ["kind=drafter", "rank=3"])
    (tmp_path / "r.yaml").write_text("output: x\ndata: a.jsonl\ntaps: [1]\nmask: <mask>\n")
    with pytest.raises(DllmError) as found:
        load_recipe(tmp_path / "r.yaml")
    assert str(found.value) == f"{tmp_path / 'r.yaml'}: 'kind' is missing: drafter, pair-head or head"


def test_the_command_line_reads_such_a_recipe(tmp_path, data):
    file = tmp_path / "recipe.yaml"
    file.write_text("kind: head\noutput: x\nverifier: tiny-ar\ndata: nowhere.jsonl\ntaps: [1]\n")
    out = CliRunner().invoke(app, ["align", str(file)])
    assert out.exit_code and "taps" in str(out.exception) + out.output
    file.write_text(f"kind: head\noutput: x\nverifier: tiny-ar\ndata: {data}\ntaps: [1]\nmask: <mask>\n")
    out = CliRunner().invoke(app, ["data", "make", str(file)])
    assert not out.exit_code and f"{ANSWERS} answers" in out.output


def test_a_trimmed_head_takes_the_orders_of_dspark():
    raw = {"architectures": ["DFlashDraftModel"], "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
           "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9, "block_size": 4, "shift_label": True,
           "mask_token_id": 8, "target_layer_ids": [1], "draft_vocab_size": 4,
           "dflash_config": {"projector_type": "domino", "emb_dim": 2, "gru_hidden_dim": 2, "pure_draft_prefix_len": 1,
                             "shift_label": True}}  # fmt: skip
    with pytest.raises(DllmError, match="draft_vocab_size is hosted for"):
        read_head(raw)


def test_the_bench_measures_heads_by_ids_and_rank(monkeypatch):
    monkeypatch.setattr(bench, "VOCAB", 60)
    monkeypatch.setattr(bench, "COSTS", ((60, 0), (20, 0), (60, 8)))
    monkeypatch.setattr(bench, "WORTH", ((664, 0), (100, 8)))
    monkeypatch.setattr(bench, "ANSWERS", {"word_problems": 8})
    monkeypatch.setattr(bench, "NEW", 8)
    rows = list(bench.run(1, n=2, steps=2))
    costs, worth = rows[:3], rows[3:]
    assert [row.name for row in costs] == [f"{name}: ms of a head" for name in ("all ids", "20 ids", "all ids, rank 8")]
    assert all(row.value > 0 for row in costs)
    assert len(worth) == 4 and all(row.value >= 1 and " 0 texts differ" in row.note for row in worth)
    assert all("above all ids" in row.note for row in worth[2:])
