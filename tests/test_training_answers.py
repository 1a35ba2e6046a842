"""The answers that recipes learn from: files that survive a kill, prompts of every kind, none that is held out."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from drafting_kit import golden

import dllm
from dllm.cli import main
from dllm.drafting.registry import as_verifier
from dllm.errors import DllmError
from dllm.training import answers
from dllm.training.answers import continuations, make
from dllm.training.config import AlignConfig, load_config
from dllm.training.holdout import Holdout, user_reader

torch.set_num_threads(1)
PROMPTS = [[10 + i, 40 + i, 70 + i][: 1 + i % 3] for i in range(7)]


def config_of(folder, **changes):
    return replace(AlignConfig(str(folder), data=str(folder / "a.jsonl"), max_new_tokens=6, threads=1), **changes)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("cut", [1, 2, 30, 100_000])
def test_a_file_that_was_cut_off_anywhere_is_completed(tmp_path, name, cut):
    verifier, path = golden("tiny-llama-ar-random"), tmp_path / name
    whole = continuations(verifier, PROMPTS, 6, 2, path)
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])
    calls, generate = [], verifier.generate
    verifier.generate = lambda ids, **options: calls.append(len(ids)) or generate(ids, **options)
    assert continuations(verifier, PROMPTS, 6, 2, path) == whole
    lost = 0 if cut == 1 and not name.endswith("gz") else 7 if cut == 100_000 else None  # a line break alone is no loss
    assert sum(calls) == lost if lost is not None else 1 <= sum(calls) < 7  # only what was lost is made again
    text = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    assert sorted(map(json.loads, text.decode().splitlines())) == sorted([list(p), a] for p, a in whole)


@pytest.mark.parametrize(
    "line", ['[[1, 2], ["a"]]', "[[], [5]]", "[[3], [-1]]", "[[3], [true]]", "[[3]]", '{"prompt": [3]}', "no JSON"]
)
def test_a_line_that_is_no_prompt_and_answer_is_named(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text(f"[[1, 2], [3]]\n\n{line}\n")
    with pytest.raises(DllmError, match=r"own\.jsonl, line 3: "):
        answers.read_answers(path)
    assert path.read_text().endswith(f"{line}\n")  # somebody else's file stays as it is


def test_sampled_answers_depend_on_the_seed_alone():
    verifier = golden("tiny-llama-ar-random")
    one, again, other = (continuations(verifier, PROMPTS, 8, 3, None, 1.0, seed) for seed in (0, 0, 1))
    assert one == again != other and one != continuations(verifier, PROMPTS, 8, 3)


def test_prompts_of_every_kind(tmp_path):
    file = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "Tom has 3 apples."}]
    file.write_text("\n".join(map(json.dumps, [chat, {"messages": chat}, {"prompt": "Ann has 5."}, "Bob has 2."])))
    found = make(config_of(tmp_path, prompts=str(file)))
    said = [user_reader(as_verifier("tiny-ar"))(p.prompt).strip() for p in found]
    assert said == ["Tom has 3 apples.", "Tom has 3 apples.", "Ann has 5.", "Bob has 2."]
    file.write_text('{"text": 3}\n')
    with pytest.raises(DllmError, match=r'p\.jsonl, line 1: expected a list of {"role"'):
        make(config_of(tmp_path, prompts=str(file)))
    alone = make(config_of(tmp_path))  # the file that is there, and no prompts
    assert sorted(alone) == sorted({tuple(map(tuple, p)): p for p in found}.values())


def test_what_is_held_out_is_never_learned_from(tmp_path, monkeypatch):
    measured, file = tmp_path / "m.jsonl", tmp_path / "p.txt"
    measured.write_text(json.dumps({"turns": ["Tom  has 3 APPLES.\n"], "id": 7}) + "\n")
    file.write_text("Ann has 5.\ntom has 3 apples.\n")
    held = {"holdout": (str(measured),)}
    with pytest.raises(DllmError, match=r"prompt 2 of .*p\.txt \('tom has 3 apples\.'\) is held out by .*m\.jsonl"):
        make(config_of(tmp_path, prompts=str(file), **held))
    assert not (tmp_path / "a.jsonl").exists()
    make(config_of(tmp_path, prompts=str(file)))
    with pytest.raises(DllmError, match=r"of .*a\.jsonl \('tom has 3 apples\.'\) is held out"):
        make(config_of(tmp_path, **held))  # answers that somebody made before
    with pytest.raises(DllmError, match=r"m\.jsonl is held out"):
        config_of(tmp_path, prompts=str(measured), **held)
    with pytest.raises(DllmError, match="holdout: cannot read"):
        Holdout.of(["nowhere.jsonl"])


def test_the_verifier_makes_up_prompts_without_those_that_are_held_out(tmp_path, monkeypatch, caplog):
    measured = tmp_path / "m.txt"
    measured.write_text("Tom has 0.\n")
    rounds = iter(range(99))
    monkeypatch.setattr(answers, "_users", lambda verifier, n, seed: [f"Tom has {i}." for i in range(next(rounds) + 2)])
    config = config_of(tmp_path, prompts="free", count=3, holdout=(str(measured),))
    with caplog.at_level("WARNING"):
        found = make(config)
    said = [user_reader(as_verifier("tiny-ar"))(p.prompt).strip() for p in found]
    assert said == ["Tom has 1.", "Tom has 2.", "Tom has 3."] and "held out" in caplog.text
    assert make(config) == found  # nothing left to do
    with pytest.raises(DllmError, match="makes up nothing new after 3 prompts"):
        monkeypatch.setattr(answers, "_users", lambda *_: ["Tom has 2."])
        make(replace(config, count=4))


def test_the_user_is_played_up_to_the_end_of_the_turn(monkeypatch):
    verifier = as_verifier("tiny-ar")
    ids, end = verifier.tokenizer("Tom has 3 apples.")["input_ids"], next(iter(verifier.eos))
    seen = []

    def drawn(model, prompts, *rest):
        seen.extend(prompts)
        return [[*ids, end], [*ids], [end]]

    monkeypatch.setattr(answers, "_drawn", drawn)
    assert [said.strip() for said in answers._users(verifier, 3, "0")] == ["Tom has 3 apples."]
    (whole,), _ = answers.encode(verifier, ["Tom has 3 apples."])
    assert len(seen) == 3 and seen[0] == whole[: len(seen[0])] and len(seen[0]) < len(whole)


@pytest.mark.parametrize("name", ["smollm2-drafter", "smollm2-diffusion"])
def test_the_recipes_for_smollm2_run_on_a_small_stand_in(tmp_path, monkeypatch, capsys, name):
    """Ten steps of each with the embedded causal model in SmolLM2's place, from the command line."""
    changes = {
        "output": tmp_path / "out", "data": tmp_path / "a.jsonl.gz", "drafter": "tiny-ar", "verifier": "tiny-ar",
        "recast.mask": '"<mask>"', "prompts": '""', "tasks": "{word_problems: 6}", "max_new_tokens": 12,
        "batch_size": 4, "pack": 128, "lora.rank": 4, "threads": 1,
    }  # fmt: skip
    recipe = f"configs/align/{name}.yaml"
    known = load_config(recipe, kind=AlignConfig)
    for i, _ in enumerate(known.stages):
        changes[f"stages.{i}.steps"] = 10 // len(known.stages)
    if known.layers:
        changes["layers"] = 2
    mask = dllm.load("tiny-ar").tokenizer.mask_token
    changes["recast.mask"] = json.dumps(mask)
    given = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr("sys.argv", ["dllm", "align", recipe, "--problems", "2", *given])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown
    made = dllm.load(str(tmp_path / "out" / "model"))
    assert (made.block_size, made.shift) == (known.recast.block_size, 1)
    if name == "smollm2-diffusion":
        out = dllm.generate(made, "Tom has 3 apples.", max_new_tokens=32)
        assert len(out.tokens) > 0 and made.mask_id not in out.sequences
