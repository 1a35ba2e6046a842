"""The answers that recipes learn from: files that survive a kill, prompts of every kind, none that is held out."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafting_kit import golden

import dllm
from dllm.cli import main
from dllm.decoding.prediction import Law
from dllm.drafting.registry import as_verifier
from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.training import answers, heads, pair_heads
from dllm.training.alignment import recipe
from dllm.training.answer_file import AnswerFile, read_answers
from dllm.training.answers import Kept, Style, Turn, Users, continuations, make
from dllm.training.config import AlignConfig, HeadRecipe, PairHeadConfig, load_recipe
from dllm.training.holdout import Holdout, user_reader

torch.set_num_threads(1)
PROMPTS = [[10 + i, 40 + i, 70 + i][: 1 + i % 3] for i in range(7)]


def config_of(folder, **changes):
    return replace(AlignConfig(str(folder), data=str(folder / "a.jsonl"), max_new_tokens=6, threads=1), **changes)


SETTINGS = {"verifier": "me", "max_new_tokens": 6}


def kept(path):
    return AnswerFile(path, SETTINGS, SETTINGS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("cut", [1, 2, 30, 100_000])
def test_a_file_that_was_cut_off_anywhere_is_completed(tmp_path, name, cut, monkeypatch):
    verifier, path = golden("tiny-llama-ar-random"), tmp_path / name
    whole = continuations(verifier, PROMPTS, Style(6), 2, kept(path))
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])
    made, add = [], Kept.add
    monkeypatch.setattr(Kept, "add", lambda self, *pair: made.append(pair) or add(self, *pair))
    assert continuations(verifier, PROMPTS, Style(6), 2, kept(path)) == whole
    check = 8 if name.endswith("gz") else 1  # a line break, or the check sums of a member, are no loss
    lost = 0 if cut <= check else 7 if cut == 100_000 else None
    assert len(made) == lost if lost is not None else 1 <= len(made) < 7  # only what was lost is made again
    assert kept(path).pairs == {tuple(p): a for p, a in whole}
    if name.endswith("gz") and not made:
        return  # nothing was added, so the file is as it was
    text = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    first, *lines = map(json.loads, text.decode().splitlines())
    assert first == SETTINGS and sorted(lines) == sorted([list(p), a] for p, a in whole)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("cut", [1, 9])
def test_a_file_that_is_only_read_stays_as_it_is(tmp_path, name, cut):
    """It may be somebody's whose copy has not ended; of one gzip member, too, all whole lines are read."""
    path = tmp_path / name
    kept(path).add([((i, 9), [i]) for i in range(20)])
    path.write_bytes(path.read_bytes()[:-cut])
    before = path.read_bytes()
    read_answers(path)
    file = kept(path)
    assert path.read_bytes() == before and len(file.pairs) >= 19
    for prompt in ((50,), (51,)):
        file.add([(prompt, [1])])
    assert kept(path).pairs == file.pairs and {(50,), (51,)} <= file.pairs.keys()


@pytest.mark.parametrize("text", ["[[1],[2]]\n[[3],[4]]", "[[1],[2]]\n[[3],[4]]\n[[5],["])
def test_lines_of_a_gzip_file_of_somebodys_own_are_kept_whatever_its_end(tmp_path, text):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    file = AnswerFile(path)
    file.add([((9,), [9])])
    assert file.pairs == {(1,): [2], (3,): [4], (9,): [9]} == AnswerFile(path).pairs


def test_members_of_a_gzip_file_are_read_in_time_that_grows_with_the_file(tmp_path, monkeypatch):
    """Each byte is unpacked a bounded number of times, however many members there are."""
    path, drawn, given = tmp_path / "a.jsonl.gz", random.Random(0), []

    class Counted:
        def __init__(self, *how, **more):
            self.inner = inflate(*how, **more)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def decompress(self, piece):
            given.append(len(piece))
            return self.inner.decompress(piece)

    inflate = zlib.decompressobj
    pairs = {(i,): [drawn.randrange(50_000) for _ in range(4000)] for i in range(60)}
    file = kept(path)
    for pair in pairs.items():
        file.add([pair])
    monkeypatch.setattr(zlib, "decompressobj", Counted)
    assert kept(path).pairs == pairs and sum(given) < 3 * path.stat().st_size


def test_a_torn_end_that_cannot_be_mended_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    kept(path).add([((i, 9), [i]) for i in range(20)])
    path.write_bytes(path.read_bytes()[:-9])
    before, file = path.read_bytes(), kept(path)

    def full(self, data):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DllmError, match=r"could not write .*No space left on device; what is in it stays"):
        file.add([((50,), [1])])
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_file_that_was_made_otherwise_is_no_answer(tmp_path, caplog):
    config = config_of(tmp_path, tasks={"word_problems": 2})
    made = make(config)
    path = tmp_path / "a.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"verifier": "tiny-ar", "dtype": "float32", "max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0,
                     "seed": 0}  # fmt: skip
    for changes, said in (
        ({"max_new_tokens": 7}, r"a\.jsonl were made with max_new_tokens 6, not 7: set that, or name another file"),
        ({"dtype": "bfloat16", "temperature": 0.5}, "dtype 'float32', not 'bfloat16'; temperature 0.0, not 0.5:"),
        (
            {"verifier": Checkpoint("tests/golden/checkpoints/tiny-llama-ar-random"), "tasks": {}},
            "verifier 'tiny-ar', not",
        ),
    ):
        with pytest.raises(DllmError, match=said):
            make(replace(config, **changes))
    assert sorted(make(replace(config, tasks={}, max_new_tokens=99))) == sorted(
        made
    )  # what is there, and nothing to add
    assert len(make(replace(config, seed=1))) == 2  # greedy: other problems of the same law
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with caplog.at_level("WARNING"):
        assert make(replace(config, max_new_tokens=7)) == made
    assert "does not say what its answers were made with" in caplog.text


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    kept(path).add([((1, 2), [3])])
    before = path.read_bytes()

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            self.file.write(text[:5])
            raise OSError("No space left on device")

    opens = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: Full(opens(self, mode)))
    file = kept(path)
    with pytest.raises(DllmError, match=r"could not write .*No space left"):
        file.add([((4,), [5])])
    assert path.read_bytes() == before and (4,) not in file.pairs


@pytest.mark.parametrize(
    "line", ['[[1, 2], ["a"]]', "[[], [5]]", "[[3], [-1]]", "[[3], [true]]", "[[3]]", '{"prompt": [3]}', "no JSON"]
)
def test_a_line_that_is_no_prompt_and_answer_is_named(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text(f"[[1, 2], [3]]\n\n{line}\n")
    with pytest.raises(DllmError, match=r"own\.jsonl, line 3: "):
        read_answers(path)
    assert path.read_text().endswith(f"{line}\n")  # somebody else's file stays as it is


def test_sampled_answers_depend_on_the_seed_alone():
    verifier = golden("tiny-llama-ar-random")
    one, again, other = (
        continuations(verifier, PROMPTS, Style(8, Law(1.0), seed), n) for seed, n in ((0, 3), (0, 7), (1, 3))
    )
    assert one == again != other and one != continuations(verifier, PROMPTS, Style(8))


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


@pytest.mark.parametrize("kind", [AlignConfig, PairHeadConfig, HeadRecipe])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("prompts", r"p\.txt \('Tom has 3 apples\.'\) is held out"),
        ("answers", r"a\.jsonl \('Tom has 3 apples\.'\) is held out"),
        ("lengths", r"longer than|no answer that fits|no answer of two tokens"),
    ],
)
def test_a_recipe_that_is_refused_has_written_nothing(tmp_path, kind, where, said):
    measured, file, made = (tmp_path / name for name in ("m.txt", "p.txt", "a.jsonl"))
    file.write_text("Tom has 3 apples.\n")
    measured.write_text("Ann has 5.\n" if where == "lengths" else file.read_text())
    verifier, length = as_verifier("tiny-ar"), 1 if kind is HeadRecipe else 9999
    (ids,), _ = answers.encode(verifier, ["Tom has 3 apples."])
    made.write_text(json.dumps([ids, [5] * (length if where == "lengths" else 2)]) + "\n")
    given = {"prompts": str(file)} if where == "prompts" else {"data": str(made)}
    run = {AlignConfig: recipe.run, PairHeadConfig: pair_heads.run, HeadRecipe: heads.run}[kind]
    more = {"taps": (1,), "mask": verifier.tokenizer.mask_token} if kind is HeadRecipe else {}
    before = {*tmp_path.iterdir()}
    with pytest.raises(DllmError, match=said):
        run(kind(str(tmp_path / "out"), holdout=(str(measured),), **given, **more))
    assert {*tmp_path.iterdir()} == before


class Played:
    """In the verifier's place: users say the next of some lines, and answers are one token."""

    def __init__(self, verifier, lines):
        self.verifier, self.lines, self.turns = verifier, iter(lines), []

    def answers(self, more):
        end = next(iter(self.verifier.eos))
        while some := more(3):
            for ask in some:
                if isinstance(ask, Turn):
                    self.turns.append(ask)
                    line = next(self.lines)
                    made = list(self.verifier.tokenizer(line, add_special_tokens=False)["input_ids"])
                    yield ask, [*made, end] if line[-1] in ".?" else made  # others are cut off
                else:
                    yield ask, [end]


def played(monkeypatch, lines):
    made = Played(as_verifier("tiny-ar"), lines)
    monkeypatch.setattr(answers, "answerer", lambda *_: made)
    return made


def said_in(pairs):
    return sorted(user_reader(as_verifier("tiny-ar"))(p.prompt).strip() for p in pairs)


def test_the_verifier_makes_up_prompts_without_those_that_are_held_out(tmp_path, monkeypatch, caplog):
    measured = tmp_path / "m.txt"
    measured.write_text("Tom has 0.\n")
    config = config_of(tmp_path, prompts="free", count=3, holdout=(str(measured),), openings=("Tom",))
    lines = [
        "Tom has 0.",
        "Tom has 1.",
        "Tom has 1.",
        "Tom has 2",
        "Tom.",
        "Tom has <eos> 8.",
        "Tom has 3.",
        "Tom has 4.",
        *["Tom has 5."] * 9,
    ]
    lines = [line[3:].replace("<eos>", as_verifier("tiny-ar").tokenizer.eos_token) for line in lines]
    made = played(monkeypatch, lines)
    with caplog.at_level("WARNING"):
        found = make(config)
    assert (
        said_in(found) == ["Tom has 1.", "Tom has 3.", "Tom has 4."] and "1 made-up prompts are held out" in caplog.text
    )
    (whole,), _ = answers.encode(made.verifier, ["Tom has 3 apples."])
    assert all(t.prompt == tuple(whole[: len(t.prompt)]) and len(t.prompt) < len(whole) for t in made.turns)
    assert len({t.seed for t in made.turns}) == len(made.turns)
    played(monkeypatch, [])
    assert make(config) == found  # nothing left to do
    monkeypatch.setattr(answers, "PATIENCE", 20)
    played(monkeypatch, [" has 1."] * 20)
    with pytest.raises(DllmError, match="makes up nothing new after 3 prompts"):
        make(replace(config, count=4))


def test_openings_begin_some_of_the_made_up_prompts(tmp_path, monkeypatch):
    config = config_of(tmp_path, prompts="free", count=30, openings=("Tom has", "Ann has"))
    made = played(monkeypatch, [f" {i} apples." for i in range(99)])
    found = said_in(make(config))
    assert len(found) == 30 and {s[:7] for s in found} == {"Tom has", "Ann has"}
    assert all(made.verifier.tokenizer.decode(t.prompt[-t.said :]).strip() in config.openings for t in made.turns)
    users = Users(made.verifier, config.openings, Holdout(), AnswerFile(), Style(6))
    users.opened = answers.OPENED  # as where a template has something before the user's words
    assert 0.5 < sum(users._turn().said > 0 for _ in range(300)) / 300 < 0.7
    with pytest.raises(DllmError, match="begins with what the user says: prompts: free needs openings"):
        make(replace(config, openings=(), data=str(tmp_path / "b.jsonl")))
    measured = tmp_path / "m.txt"
    measured.write_text("ann  has\n")
    with pytest.raises(DllmError, match=r"prompt 2 of openings \('Ann has'\) is held out"):
        make(replace(config, holdout=(str(measured),)))
    with pytest.raises(DllmError, match="how made-up prompts begin"):
        replace(config, prompts="", tasks={"word_problems": 1})


def test_users_are_played_by_the_verifier_itself(tmp_path):
    config = config_of(tmp_path, prompts="free", count=2, openings=("Tom has 3 apples. He buys",), sampling_batch=4)
    first = make(config)
    assert len(first) == 2 and all(pair.answer for pair in first)
    assert make(replace(config, count=3))[:2] == first  # goes on from there


@pytest.mark.parametrize("name", ["smollm2-drafter", "smollm2-diffusion"])
def test_the_recipes_for_smollm2_run_on_a_small_stand_in(tmp_path, monkeypatch, capsys, name):
    """Ten steps of each with the embedded causal model in SmolLM2's place, from the command line."""
    changes = {
        "output": tmp_path / "out", "data": tmp_path / "a.jsonl.gz", "drafter": "tiny-ar", "verifier": "tiny-ar",
        "recast.mask": '"<mask>"', "prompts": '""', "openings": "[]", "tasks": "{word_problems: 6}",
        "max_new_tokens": 12,
        "batch_size": 4, "pack": 128, "lora.rank": 4, "threads": 1,
    }  # fmt: skip
    recipe = f"configs/align/{name}.yaml"
    known = load_recipe(recipe)
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
