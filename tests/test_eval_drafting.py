"""Drafting runs: conversations, interleaved settings, peers, figures by category, equality, Spec-Bench's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dllm
from dllm.errors import DllmError
from dllm.eval import run
from dllm.eval.config import TaskSpec, load
from dllm.eval.drafting import by_category, parting
from dllm.eval.peers import assistant, check_options
from dllm.eval.specbench import export
from dllm.eval.tasks import load as load_task
from dllm.eval.worker import Batch, Worker

QUESTIONS = [
    {"question_id": 7, "category": "sums", "turns": ["Tom has 12 apples. He buys 7 more.", "Then he eats 2."]},
    {"question_id": 8, "category": "words", "turns": ["a b c a b c a b"]},
    {"question_id": 9, "category": "sums", "turns": ["Ann has 3 pens."]},
]
PLAIN = {"verifier": "tiny-ar", "drafter": "none"}
PEER = {**PLAIN, "loop": "transformers"}
MATRIX = [
    {"label": "plain", "speculate": PLAIN},
    {"label": "generate", "speculate": PEER},
    {"label": "peer", "speculate": {**PEER, "options": {"prompt_lookup_num_tokens": 4}}},
    {"label": "assisted", "speculate": {**PEER, "drafter": "tiny-ar"}},
    {"label": "suffix", "speculate": {**PLAIN, "drafter": "suffix", "options": {"length": "fixed:k=4"}}},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    return file


def config(path: Path, **changes):
    base = {
        "name": "t", "tasks": [{"name": "spec_bench", "path": str(path)}], "matrix": MATRIX, "warmup": 0,
        "generate": {"max_new_tokens": 8}, "batch_size": 1,
    }  # fmt: skip
    return {**base, **changes}


@pytest.fixture(scope="module")
def found(path, tmp_path_factory):
    return run(config(path), out=tmp_path_factory.mktemp("runs") / "r", progress=False)


def test_every_setting_decodes_a_document_before_the_next_one_begins(found):
    lines = [json.loads(line) for line in (found.folder / "samples.jsonl").read_text().splitlines()]
    assert [(r["doc"], r["setting"]) for r in lines] == [(d, s["label"]) for d in "789" for s in MATRIX]


def test_a_later_turn_follows_the_models_own_answer(found):
    verifier = dllm.load_verifier("tiny-ar")
    row = next(r for r in found.rows if r["setting"] == "suffix" and r["doc"] == "7")
    first, second = row["turns"]
    told = [{"role": "user", "content": QUESTIONS[0]["turns"][0]}]
    one = dllm.speculate(verifier, None, told, max_new_tokens=8)
    told += [{"role": "assistant", "content": one.text}, {"role": "user", "content": "Then he eats 2."}]
    two = dllm.speculate(verifier, None, told, max_new_tokens=8)
    assert (first["ids"], second["ids"]) == (one.emitted, two.emitted)
    assert row["text"] == two.text and row["tokens"] == len(one.tokens) + len(two.tokens)
    assert row["nfe"] == first["nfe"] + second["nfe"] == len(first["emitted"]) + len(second["emitted"])


def test_peers_are_transformers_own_loops_with_the_rounds_they_took(found):
    rows = {r["setting"]: r for r in found.rows if r["doc"] == "8"}
    verifier = dllm.load_verifier("tiny-ar")
    prompt = dllm.speculate(verifier, None, "a b c a b c a b", max_new_tokens=1)
    ids = torch.tensor([prompt.sequences[: prompt.prompt_length]])
    theirs = verifier.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    for row in rows.values():
        assert row["turns"][0]["ids"] == theirs[0, ids.shape[1] :].tolist()
        assert sum(row["turns"][0]["emitted"]) == row["tokens_raw"] and len(row["accepted"]) == row["nfe"]
    assert rows["generate"]["nfe"] == rows["plain"]["nfe"] == rows["plain"]["tokens_raw"]
    assert rows["assisted"]["nfe"] < rows["plain"]["nfe"] and rows["assisted"]["draft_forwards"] >= 4


def test_a_native_hidden_state_head_is_a_peer(path, tmp_path):
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    torch.manual_seed(0)
    made = MuseGlimmerAssistantConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, vocab_size=664, block_size=4, mask_token_id=1, target_layer_ids=[0, 2],
        layer_types=["full_attention"], bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    MuseGlimmerAssistantModel(made).save_pretrained(tmp_path / "head")
    matrix = [MATRIX[0], {"label": "dflash", "speculate": {**PEER, "drafter": str(tmp_path / "head")}}]
    head = run(config(path, matrix=matrix, limit=1), out=tmp_path / "r", progress=False)
    cell = head.cell("spec_bench", "dflash")
    assert cell["draft_forwards"] > 0 and cell["drafting"][""]["differ"] == 0 == head.errors


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: check_options({"prompt_lookup_tokens": 3}), "did you mean 'prompt_lookup_num_tokens'"),
        (lambda: check_options({"temperature": 1.0}), "under `generate:`"),
        (lambda: assistant(load({**config(Path("x")), "model": "suffix"}).settings[0].model), "is ours"),
    ],
)
def test_what_a_peer_cannot_take_is_refused(make, says):
    with pytest.raises(DllmError, match=says):
        make()


def test_figures_stand_by_category_against_every_plain_setting(found):
    cell = found.cell("spec_bench", "suffix")
    figures = cell["drafting"]
    assert list(figures) == ["", "sums", "words"] and [f["n"] for f in figures.values()] == [3, 2, 1]
    rows = [r for r in found.rows if r["category"] == "sums"]

    def rate(setting):
        mine = [r for r in rows if r["setting"] == setting]
        return sum(r["tokens_raw"] for r in mine) / sum(r["clock"]["seconds"] for r in mine)

    for label in ("plain", "generate"):
        value, low, high = figures["sums"]["speedup"][label]
        assert value == pytest.approx(rate("suffix") / rate(label)) and low <= value <= high
    assert all(f["compared"] == f["n"] and f["differ"] == f["ties"] == 0 for f in figures.values())
    text = (found.folder / "report.md").read_text(encoding="utf-8")
    assert "Speed-up against generate" in text and "| words | 1 | 1/1 | 1/1 | 1/1 | 1/1 |" in text
    assert "accuracy" not in text.split("## spec_bench")[1]  # nothing is graded


def test_an_answer_that_leaves_the_plain_one_is_told_from_a_tie(found, path):
    plain, row = ({**r} for r in found.rows if r["doc"] == "7" and r["setting"] in ("plain", "suffix"))
    assert parting(plain, row) is None
    ids = list(row["turns"][1]["ids"])
    ids[2] += 1
    other = {**row, "turns": [row["turns"][0], {**row["turns"][1], "ids": ids}]}
    assert parting(plain, other) == (1, 2)
    assert parting(plain, {**other, "turns": [row["turns"][0], {**row["turns"][1], "ids": ids[:1]}]}) == (1, 1)
    setting = load(config(path)).settings[4]
    gap, tie = Worker(load(config(path))).gap(setting.speculate, {"max_new_tokens": 8}, plain, 1, 2)
    assert gap > 1e-3 and not tie
    lossy = by_category([{**other, "differs": {"turn": 1, "at": 2, "gap": gap, "tie": tie}}], {}, 0.95, 0)
    close = by_category([{**other, "differs": {"turn": 1, "at": 2, "gap": 1e-6, "tie": True}}], {}, 0.95, 0)
    assert (lossy[""]["differ"], lossy[""]["ties"], close[""]["differ"], close[""]["gap"]) == (1, 0, 0, 1e-6)


def test_repeats_take_turns_and_their_median_is_the_clock(path, monkeypatch):
    calls, seconds = [], iter([5.0, 50.0, 1.0, 20.0, 3.0, 10.0])
    honest = Worker.generate

    def counted(self, setting, *rest):
        calls.append(setting.label)
        (out,) = honest(self, setting, *rest)
        out.seconds = next(seconds)
        return [out]

    monkeypatch.setattr(Worker, "generate", counted)
    worker = Worker(load(config(path, repeats=3)))
    rows = worker.all(Batch((0, 4), 0, 1, 2))
    assert calls == ["plain", "suffix"] * 3
    assert [r["clock"]["seconds"] for r in rows] == [3.0, 20.0]


def test_a_store_of_a_run_learns_from_the_documents_before_and_lies_in_its_folder(path, tmp_path):
    store = {"label": "kept", "speculate": {**MATRIX[4]["speculate"], "options": {"store": "kept.safetensors"}}}
    file = tmp_path / "twice.jsonl"
    rows = [{**QUESTIONS[1], "question_id": i} for i in (1, 2)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    kept = run(config(file, matrix=[MATRIX[0], store], warmup=1), out=tmp_path / "r", progress=False)
    first, second = (r for r in kept.rows if r["setting"] == "kept")
    assert second["nfe"] < first["nfe"] and (tmp_path / "r" / "kept.safetensors").is_file()
    with pytest.raises(DllmError, match="repeats: a store would have seen the text"):
        run(config(file, matrix=[MATRIX[0], store], repeats=2), out=tmp_path / "s", progress=False)


def drawn(path, **entry):
    return load_task(TaskSpec("spec_bench", path=str(path), **entry))


def test_a_sample_takes_of_each_category_and_a_larger_one_holds_it(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [{"question_id": i, "category": "xy"[i % 2], "turns": [str(i)]} for i in range(40)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    few, more, other = (drawn(file, sample=n, seed=s).documents for n, s in ((2, 0), (5, 0), (2, 1)))
    assert [d.category for d in few] == ["x", "y", "x", "y"] and few == more[:4] and few != other
    assert {int(d.id) % 2 for d in few if d.category == "x"} == {0}
    (note,) = drawn(file, sample=30, categories=("x",)).notes
    assert note == "fewer documents than the sample of 30 asks for: x has 20"
    with pytest.raises(DllmError, match=r"no document of the categories z \(categories there: x, y\)"):
        drawn(file, categories=("x", "z"))
    with pytest.raises(DllmError, match="name its field with `category:`"):
        load_task(TaskSpec("jsonl", path=str(file), prompt="{turns}", metric="none", sample=1))
    file.write_text('{"category": "x", "turns": "one text"}\n', encoding="utf-8")
    with pytest.raises(DllmError, match="'turns' is not a list of texts"):
        drawn(file)


def test_answers_leave_in_the_format_of_spec_bench(found, tmp_path):
    paths = export(found.folder, tmp_path)
    assert {p.name for p in paths} == {f"spec_bench-{s['label']}.jsonl" for s in MATRIX}
    answers = [json.loads(line) for line in (tmp_path / "spec_bench-suffix.jsonl").read_text().splitlines()]
    assert [(a["question_id"], a["category"]) for a in answers] == [(7, "sums"), (8, "words"), (9, "sums")]
    for answer in answers:  # as its script for speed counts
        (choice,) = answer["choices"]
        assert len(choice["turns"]) == len(choice["wall_time"]) == len(choice["new_tokens"])
        assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
    assert answers[0]["tstamp"] > 1e9


def test_the_table_on_smollm_holds_together(tmp_path):
    done = run("configs/eval/spec-bench.yaml", ["tasks.0.path=nowhere.jsonl"], out=tmp_path / "r", dry_run=True,
               progress=False)  # fmt: skip
    assert done.errors == 0 and done.cell("spec_bench", "recycle tree 16 + suffix")["drafting"][""]["differ"] == 0
