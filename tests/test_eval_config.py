"""Configurations: what is read, what is refused, and what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dllm.errors import DllmError
from dllm.eval.config import load
from dllm.eval.tuning import TuneSpec, candidates

CONFIGS = Path(__file__).parents[1] / "configs"


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


SWEEP = """\
tasks: [word_problems, {name: sudoku, limit: 5}]
generate: {max_new_tokens: 32}
matrix:
  sampler: [confidence, {name: threshold, tau: 0.9}]
  generate.block_length: [8, 16]
"""


def test_matrix_is_the_product_of_its_axes(tmp_path):
    config = load(write(tmp_path, SWEEP))
    assert [s.label for s in config.settings] == [
        "confidence · block_length=8",
        "confidence · block_length=16",
        "threshold(tau=0.9) · block_length=8",
        "threshold(tau=0.9) · block_length=16",
    ]
    assert config.settings[3].sampler == {"name": "threshold", "tau": 0.9}
    assert {s.generate.max_new_tokens for s in config.settings} == {32}
    assert (config.name, config.tasks[1].limit) == ("c", 5)


def test_matrix_as_a_list_is_a_union_with_labels(tmp_path):
    text = "tasks: [sudoku]\nmatrix: [{label: slow, sampler: confidence}, {sampler: threshold, cache: [none, dual]}]\n"
    config = load(write(tmp_path, text))
    assert [(s.label, s.cache) for s in config.settings] == [
        ("slow", None), ("threshold · cache=none", "none"), ("threshold · cache=dual", "dual"),
    ]  # fmt: skip


def test_extends_merges_and_another_name_drops_old_parameters(tmp_path):
    write(tmp_path, "name: base\ntasks: [sudoku]\nseed: 3\nsampler: {name: threshold, tau: 0.7}\n", "base.yaml")
    top = write(tmp_path, "extends: base.yaml\nname: top\nsampler: {name: confidence}\nlimit: 4\n")  # its own name
    config = load(top)
    assert (config.seed, config.limit, config.settings[0].sampler) == (3, 4, "confidence")
    kept = load(write(tmp_path, "extends: base.yaml\nsampler: {name: threshold}\n", "kept.yaml"))
    assert kept.settings[0].sampler == {"name": "threshold", "tau": 0.7}


def test_extends_cycle(tmp_path):
    write(tmp_path, "extends: b.yaml\ntasks: [sudoku]\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(DllmError, match="extends this file again"):
        load(tmp_path / "a.yaml")


def test_overrides(tmp_path):
    path = write(tmp_path, SWEEP)
    one = load(path, ["sampler.name=factor", "sampler.f=2", "tasks.1.limit=3"])
    assert {str(s.sampler) for s in one.settings} == {"{'name': 'factor', 'f': 2}"}  # the sweep over samplers is gone
    assert len(one.settings) == 2 and one.tasks[1].limit == 3
    assert [s.sampler for s in load(path, ["matrix.sampler=[confidence]", "generate.block_length=4"]).settings] == [
        "confidence"
    ]
    every = load(
        {"tasks": "sudoku", "matrix": {"sampler": [{"name": "threshold", "tau": t} for t in (0.7, 0.8)]}},
        ["sampler.floor=1"],
    )
    assert [s.sampler["floor"] for s in every.settings] == [1, 1]  # a parameter is set at every point of the sweep
    with pytest.raises(DllmError, match="key=value"):
        load(path, ["sampler"])
    for assignment in ("smpler.name=credit", "tasks=[{nme: x}]", "generate.block_length=x"):
        with pytest.raises(DllmError) as error:
            load(path, [assignment])
        assert str(error.value).startswith(f"--set {assignment}: ")


def test_a_saved_configuration_reads_back_as_itself(tmp_path):
    config = load(write(tmp_path, SWEEP + "trace: 2\nexpected: [{task: sudoku, value: 50}]\nunknown: [the GPU]\n"))
    path = write(tmp_path, yaml.safe_dump(config.plain(), allow_unicode=True), "saved.yaml")
    assert load(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [sudoku]\nsmapler: b\n", "line 2: smapler: unknown key 'smapler'; did you mean 'sampler'?"),
        ("tasks: [sudoku]\nseed: x\n", "line 2: seed: must be an integer, found 'x'"),
        ("tasks: [sudoku]\nengine: {kind: rey}\n", "line 2: engine.kind: unknown value 'rey'; did you mean 'ray'?"),
        ("tasks: [sudoku]\ngenerate:\n  blok_length: 3\n", "line 3: generate.blok_length: unknown key"),
        ("a: [1\n", "not valid YAML"),
        ("tasks: &a [*a]\n", "line 1, column 12: not valid YAML: the anchor 'a' refers to itself"),
        ("tasks: [sudoku]\ngenerate: &g {stop: {x: *g}}\n", "the anchor 'g' refers to itself"),
        ("tasks: [sudoku]\nabout: 2024-13-45\n", "line 2: month must be in 1..12"),
        ("tasks: [sudoku]\n[a, b]: c\n", "line 2: a key is a word"),
        ("a: " + "[" * 3000, "nested too deeply"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{c}: &{c} [{', '.join(['*' + b] * 8)}]\n" for b, c in zip("abcdef", "bcdefg", strict=True)),
            "more than 100000 values",
        ),
        ("tasks: [sudoku]\ntasks: [x]\n", "line 2: key 'tasks' is given twice"),
        ("tasks: [sudoku, sudoku]\n", "'sudoku' is there twice"),
        ("tasks: [sudoku]\nmatrix: {samplr: [b]}\n", "unknown axis 'samplr'; did you mean 'sampler'?"),
        ("tasks: [sudoku]\nmatrix: {sampler: []}\n", "the list is empty"),
        (
            "tasks: [sudoku]\nmatrix:\n  generate.steps:\n  - 1\n  - x\n",
            "line 5: generate.steps: must be an integer, found 'x'",
        ),
        ("tasks: [sudoku]\nmatrix:\n  generate.stps: [1]\n", "line 3: generate.stps: unknown key 'stps'"),
        ("tasks: [sudoku]\nexpected: [{task: sudku, value: 1}]\n", "line 2: expected.0.task: unknown task 'sudku'"),
        ("tasks: [sudoku]\nexpected: [{task: sudoku, value: 1, setting: x}]\n", "unknown setting 'x'"),
        (
            "tasks: [sudoku]\nexpected: [{task: sudoku, value: 1, metric: tpff}]\n",
            "unknown metric 'tpff'; did you mean 'tpf'?",
        ),
        ("tasks: [{limit: 3}]\n", "'name' is missing"),
        ("tasks:\n", "no tasks"),
        ("tasks: [sudoku]\nlimit: 0\n", "line 2: limit: must be at least 1, found 0"),
        ("tasks: [sudoku]\nbatch_size: 0\n", "line 2: batch_size: must be at least 1, found 0"),
        ("tasks: [sudoku]\nbatch_size: autos\n", "line 2: batch_size: 'autos' is none of an integer, 'auto'"),
        ("tasks: [sudoku]\nsampler: 3\n", "a sampler is a name"),
        ("- x\n", "expected `key: value` pairs"),
        ("", "the file is empty"),
        ("tasks: [sudoku]\nextends: nowhere.yaml\n", "there is no configuration"),
    ],
)
def test_refusals_name_line_and_key(tmp_path, text, message):
    with pytest.raises(DllmError) as error:
        load(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    text = "tasks: [sudoku]\ngenerate: {temperature: 1e-1}\nsampler: {name: threshold, tau: 8.5E-1}\n"
    for config in (load(write(tmp_path, text)), load({"tasks": ["sudoku"]}, ["generate.temperature=1e-1",
                   "sampler={name: threshold, tau: 85e-2}"])):  # fmt: skip
        (setting,) = config.settings
        assert setting.generate.temperature == 0.1 and setting.sampler == {"name": "threshold", "tau": 0.85}


def test_a_mapping_may_merge_another(tmp_path):
    text = "tasks: [sudoku]\nmatrix:\n- &one {sampler: [threshold], label: a, cache: [none]}\n- {<<: *one, label: b}\n"
    a, b = load(write(tmp_path, text)).settings
    assert (a.label, b.label) == ("a", "b") and a.sampler == b.sampler == "threshold"


def test_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path, SWEEP, "tiny.yaml")
    with pytest.raises(DllmError, match=r"did you mean 'tiny\.yaml'"):
        load(tmp_path / "tinny.yaml")


EVAL = [p for p in sorted(CONFIGS.glob("eval/*.yaml")) if p.stem != "tune"]


@pytest.mark.parametrize("path", [*EVAL, *sorted(CONFIGS.glob("papers/*.yaml"))], ids=lambda p: p.stem)
def test_shipped_configurations_load(path):
    assert load(path).settings


@pytest.mark.parametrize(("path", "n"), [("eval/tune.yaml", 11), ("tune/tiny.yaml", 47)])
def test_the_shipped_tuning_has_candidates(path, n):
    data = yaml.safe_load((CONFIGS / path).read_text())
    spec = TuneSpec(**data.pop("tune"))
    points = candidates(spec, 0)
    sweep = [{"label": str(p), "sampler": [p]} for p in points]
    assert len(points) == n and load({**data, "matrix": sweep}).settings
