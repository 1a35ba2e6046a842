"""Sampler settings that belong to a model: a bare name takes them and says so; published ones stay a preset away."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from typer.testing import CliRunner

import dllm
from dllm.cli import app
from dllm.errors import DllmError
from dllm.eval import tune
from dllm.eval.config import load as configured
from dllm.eval.worker import Batch, Worker
from dllm.models.hub import load
from dllm.models.settings import FILE, SamplerSetting, read_settings, write_settings
from dllm.samplers import registry

OWN = {
    "prophet": {"prophet": {"high": 12, "mid": 12, "low": 12}},
    "threshold": {"threshold": {}},  # the published defaults are the choice
    "localleap+credit": {"localleap": {"tau": 0.85}, "credit": {}},
    "factor": {"factor": {"f": 0.02}},
}


def setting(sampler: str, parameters: dict[str, dict[str, Any]]) -> SamplerSetting:
    return SamplerSetting(sampler, parameters, "sudoku", 100, 0.9, (0.82, 0.95), 3.0, "confidence", 0.5, (0.0, 1.5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model's weights in a folder of their own, without settings."""
    model = load("tiny")
    model.sampler_settings = {}
    return model.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("spec", "runs"),
    [
        ("prophet", "prophet:tuned,high=12,mid=12,low=12"),
        ({"name": "prophet"}, "prophet:tuned,high=12,mid=12,low=12"),
        ("prophet:published", "prophet:published"),
        ({"name": "prophet", "preset": "published"}, "prophet:published"),
        ("prophet:low=3", "prophet:low=3"),
        ("prophet:tuned,low=4", "prophet:tuned,high=12,mid=12,low=4"),
        ("prophet:tuned,low=2.5", "prophet:tuned,high=12,mid=12,low=2.5"),  # a published value over the model's own
        ("prophet:maths", "prophet:high=8.0,low=3.5"),
        ("threshold", "threshold:tuned"),
        ("threshold:tau=0.9", "threshold:published"),  # that is what it means
        ("credit", "credit"),  # the model brings nothing for it
        ("localleap+credit", "localleap:tuned,tau=0.85+credit:tuned"),  # settings of the whole
        (["localleap", "credit"], "localleap:tuned,tau=0.85+credit:tuned"),
        ("localleap:tau=0.6+credit", "localleap:tau=0.6+credit"),
        ("prophet+factor", "prophet:tuned,high=12,mid=12,low=12+factor:tuned,f=0.02"),  # each part its own
        ("prophet+factor:f=2", "prophet:tuned,high=12,mid=12,low=12+factor:f=2"),
        ("adablock:delimiters=[8, 85],tau=0.8", "adablock:delimiters=[8, 85],tau=0.8"),
    ],
)
def test_what_a_name_means(spec: Any, runs: str) -> None:
    assert registry.spell(spec, OWN) == runs
    assert registry.spell(runs, OWN) == runs  # what an output says can be passed again
    assert registry.parse(runs, OWN) == registry.parse(spec, OWN)


def test_without_settings_a_name_means_the_published_defaults() -> None:
    assert registry.parse("prophet") == registry.parse("prophet:published") == registry.parse({"name": "prophet"})
    assert registry.spell("prophet:published") == "prophet"
    with pytest.raises(DllmError, match=r"no settings of its own for 'prophet' .* prophet:published"):
        registry.parse("prophet:tuned")
    with pytest.raises(DllmError, match=r"unknown preset 'tund' of sampler 'prophet'.*published"):
        registry.parse("prophet:tund", OWN)
    with pytest.raises(DllmError, match=r"the model's own sampler settings: .*did you mean 'high'"):
        registry.parse("prophet", {"prophet": {"prophet": {"hihg": 3}}})


def test_a_folder_brings_its_settings(folder: Path) -> None:
    text, call = "Tom has 12 apples. He buys 7 more. How many apples does he have?", {"max_new_tokens": 48}
    bare = load(folder)
    assert bare.sampler_settings == {} and dllm.generate(bare, text, sampler="factor", **call).sampler == "factor"
    write_settings(folder, [setting(name, values) for name, values in OWN.items()])
    model = load(folder)
    own, published = (dllm.generate(model, text, sampler=s, **call) for s in ("factor", "factor:published"))
    assert own.sampler == "factor:tuned,f=0.02" and published.sampler == "factor:published"
    same, plain = (
        dllm.generate(bare, text, sampler="factor:f=0.02", **call),
        dllm.generate(bare, text, sampler="factor", **call),
    )
    assert (own.tokens, own.nfe) == (same.tokens, same.nfe)
    assert (published.tokens, published.nfe) == (plain.tokens, plain.nfe) and own.nfe > published.nfe
    again = load(model.save(folder.parent / "copy"))
    assert again.sampler_settings == model.sampler_settings and again.fingerprint() == bare.fingerprint()
    assert again.identity() == model.identity() != bare.identity()  # an answer depends on them


def test_settings_of_other_samplers_stay(folder: Path) -> None:
    write_settings(folder, [setting("factor", {"factor": {"f": 0.02}}), setting("eb", {"eb": {"gamma": 0.05}})])
    write_settings(folder, [setting("factor", {"factor": {"f": 0.5}})])
    found = read_settings(folder)
    assert list(found) == ["factor", "eb"] and found["factor"].parameters == {"factor": {"f": 0.5}}
    assert found["eb"].interval == (0.82, 0.95) and [p.name for p in folder.glob("*.new")] == []


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", '{"settings": 3}', '{"settings": [3]}', '{"settings": [{}]}', '{"settings": {"factor": {}}}',
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "parameters": {"factor": {}}}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "parameters": ["eb"]}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "interval": 3}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "extra": 3}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "sampler": 3}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "accuracy": None}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "n": "100"}]}),
        json.dumps({"settings": [{**vars(setting("eb", {"eb": {}})), "task": 3}]}),
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(DllmError, match=f"{FILE} holds no sampler settings") as error:
        load(folder)
    assert "\n" not in str(error.value)


TUNE = {
    "name": "small",
    "tasks": [{"name": "sudoku", "split": "validation", "limit": 12}],
    "batch_size": 12,
    "tune": {
        "baseline": "threshold:tau=0.99",
        "loss": 20.0,
        "space": [{"name": "factor", "f": [0.05, 1.0]}, ["credit", {"name": "factor"}], {"name": "prophet", "low": 99}],
    },
}


def test_tune_saves_the_fastest_within_the_loss_beside_the_model(folder: Path, tmp_path: Path) -> None:
    config = {**TUNE, "model": str(folder)}
    config["tune"] = {**TUNE["tune"], "space": [{"name": "factor", "f": [0.05, 1.0]}, {"name": "credit"}]}
    more = {**config, "tasks": [{**TUNE["tasks"][0], "limit": 13}]}  # one document that the second run does not count
    untouched = tune(more, out=tmp_path / "run", progress=False)
    assert untouched.saved == () and not (folder / FILE).exists()
    found = tune(config, out=tmp_path / "run", save=True, progress=False)
    saved = {s.sampler: s for s in found.saved}
    assert saved == read_settings(folder) and set(saved) == {"factor", "credit"}
    cells = {f: found.results.cell("sudoku", f"factor(f={f})") for f in (0.05, 1.0)}
    fine = [f for f in cells if cells[f]["accuracy"] >= found.results.cell("sudoku", "baseline")["accuracy"] - 0.2]
    best = max(fine, key=lambda f: cells[f]["tpf"])
    assert saved["factor"].parameters == {"factor": {} if best == 1.0 else {"f": best}}  # 1.0 is the published one
    assert saved["credit"].parameters == {"credit": {}}
    assert (
        saved["factor"].n == 12
        and saved["factor"].task == "sudoku"
        and saved["factor"].baseline == "threshold:tau=0.99"
    )
    low, high = saved["factor"].interval
    assert low <= saved["factor"].accuracy <= high
    assert saved["factor"].accuracy == pytest.approx(cells[best]["accuracy"], abs=1e-4)
    assert str(folder / FILE) in found.text
    assert dllm.generate(load(folder), [5, 9], sampler="credit", max_new_tokens=4).sampler == "credit:tuned"
    # a bare candidate is measured at its published defaults, even where the model brings others
    write_settings(folder, [setting("credit", {"credit": {"tau": 0.1}})])
    again = tune(config, out=tmp_path / "again", save=True, progress=False)
    assert {s.sampler: s.parameters for s in again.saved}["credit"] == {"credit": {}}


def test_nothing_is_saved_for_a_sampler_that_loses_too_much(folder: Path, tmp_path: Path) -> None:
    config = {**TUNE, "model": str(folder)}
    exits = {"name": "prophet", "high": -99, "mid": -99, "low": -99}  # leaves after its first forward
    config["tune"] = {"baseline": "confidence", "loss": 0.0, "space": [exits, {"name": "threshold", "tau": [1.0]}]}
    path = tmp_path / "tune.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    done = CliRunner().invoke(app, ["tune", str(path), "--save", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "`prophet`: no candidate loses at most 0.0 points on every task; nothing saved" in done.output
    assert set(read_settings(folder)) == {"threshold"}


def test_a_configuration_may_ask_for_the_models_own() -> None:
    registry.check("prophet:tuned,low=3+credit")  # whether the model has some is seen when it is loaded
    for spec in ("prophet:tund", "prophet:tuned,lo=3", {"name": "nobody"}):
        with pytest.raises(DllmError, match="unknown"):
            registry.check(spec)


def test_samples_of_other_settings_have_another_key(folder: Path) -> None:
    def keys() -> list[str]:
        config = configured({"model": str(folder), "tasks": [{"name": "sudoku", "limit": 2}], "sampler": "factor"})
        (found,) = Worker(config).keys(Batch((0,), 0, 0, 2))
        return found

    before = keys()
    write_settings(folder, [setting("factor", {"factor": {"f": 0.02}})])
    assert not set(before) & set(keys()) and keys() == keys()


def test_published_says_so_wherever_no_parameter_is_named() -> None:
    own = registry.method("threshold")(tau=0.5)
    assert registry.published("threshold + credit:alpha=0.5") == "threshold:published+ credit:alpha=0.5"
    assert registry.published({"name": "eb"}) == {"name": "eb", "preset": "published"}
    assert registry.published({"name": "eb", "gamma": 1}) == {"name": "eb", "gamma": 1}
    assert registry.published(["eb", own]) == ["eb:published", own]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": None},
        {"name": 5},
        {"name": ["threshold"]},
        {"name": "threshold", "preset": 3},
        {"name": "threshold", "preset": ["a"]},
        {"name": "threshold", 5: 0.5},
        [None],
        [],
        b"threshold",
        7,
        registry.method("threshold"),
        "prophet:low=" + "9" * 400,
    ],
    ids=lambda spec: repr(spec)[:40],
)
def test_what_is_no_specification_is_said_in_one_line(spec: Any) -> None:
    for read in (registry.check, registry.spell, lambda s: registry.check(registry.published(s))):
        with pytest.raises(DllmError) as error:
            read(spec)
        assert "\n" not in str(error.value)


def test_any_mapping_is_a_specification() -> None:
    assert registry.spell(MappingProxyType({"name": "prophet"}), OWN) == "prophet:tuned,high=12,mid=12,low=12"
    assert registry.spell(registry.published(MappingProxyType({"name": "prophet"})), OWN) == "prophet:published"
