"""The one reader: specifications and their text, numbers on every front, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from dllm.cli import app
from dllm.decoding.cache.registry import policy
from dllm.drafting.config import SpecConfig
from dllm.errors import DllmError
from dllm.eval.config import load
from dllm.lookahead.setting import Lookahead
from dllm.models.arguments import LoadArguments
from dllm.samplers import registry
from dllm.spec import Loader, keys_of, named, render, settings, show, split, value
from dllm.training.config import AlignConfig, HeadRecipe, PairHeadConfig, load_config, load_recipe

WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.integers() | st.text(), inner))


@given(WORDS, st.none() | WORDS, st.dictionaries(WORDS.filter(lambda key: key != "name"), VALUES))
def test_a_specification_as_text_reads_back_as_itself(name: str, preset: str | None, params: dict[str, Any]) -> None:
    text = render(name, *([preset] if preset else []), **params)
    assert named(text, "sampler", presets=True) == (name, preset, params) and "\n" not in text
    assert split(f"{text}+{text}", "+") == [text, text]  # in a composition too


@given(VALUES)
def test_a_value_as_text_reads_back_as_itself(said: Any) -> None:
    assert value(show(said)) == said


@pytest.mark.parametrize("word", ["2020-13-45", "2020-12-24", "1e-3", "true", "null", "12:30:45"])
def test_a_word_that_yaml_takes_for_another_kind_is_quoted(word: str) -> None:
    assert named(render("name", key=word), "sampler").params == {"key": word}


NUMBERS = [("1e-3", 0.001), ("1E-3", 0.001), ("0.001", 0.001), (".1e-2", 0.001), ("+1e-3", 0.001), ("1e+0", 1.0)]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
@pytest.mark.parametrize(
    "read",
    [
        lambda text: registry.parse(f"threshold:tau={text}")[0].tau,  # type: ignore[attr-defined]
        lambda text: registry.parse(f"credit+threshold:tau={text}+ccd")[1].tau,  # type: ignore[attr-defined]
        lambda text: registry.parse({"name": "threshold", "tau": text})[0].tau,  # type: ignore[attr-defined]
        lambda text: policy(f"dllm_cache:rho={text}").rho,  # type: ignore[attr-defined]
        lambda text: policy({"name": "dllm_cache", "rho": text}).rho,  # type: ignore[attr-defined]
        lambda text: Lookahead.parse(f"4:delta={text}").delta,
        lambda text: Lookahead.parse({"delta": text}).delta,
        lambda text: SpecConfig(length=f"cost:margin={text}").build_controller().margin,
        lambda text: SpecConfig(search=f"eal:lam={text}").build_search(False).lam,
        lambda text: SpecConfig(decay=text).decay,
    ],
)
def test_a_number_reads_the_same_everywhere(read: Callable[[str], float], text: str, number: float) -> None:
    assert read(text) == number and isinstance(read(text), float)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (registry.parse, "sampler 'threshold': tau='x' must be a number (default 0.9)"),
        (lambda text: policy(text.replace("threshold:tau", "dllm_cache:rho")), "cache 'dllm_cache': rho='x' must be"),
        (lambda text: Lookahead.parse(text.replace("threshold:tau", "4:delta")), "lookahead: delta='x' must be a num"),
        (lambda text: SpecConfig(length=text.replace("threshold:tau", "cost:margin")).build_controller(), "margin='x'"),
    ],
)
def test_refusals_are_alike(read: Callable[[str], object], said: str) -> None:
    with pytest.raises(DllmError) as error:
        read("threshold:tau=x")
    assert said in str(error.value)
    with pytest.raises(DllmError, match=r"='\[' is no value: a number, a word, or a list in brackets"):
        read("threshold:tau=[")
    with pytest.raises(DllmError, match="'b' is not of the form key=value"):
        read("threshold:tau=0.5,a,b" if read is registry.parse else "threshold:tau=0.5,b")


@pytest.mark.parametrize("text", ["a:b=[1, 2],c={d: 1, e: [2, 3]}", 'a:b=[1,2],c={"d":1,e:[2,3]}'])
def test_lists_and_mappings_nest(text: str) -> None:
    assert named(text, "thing").params == {"b": [1, 2], "c": {"d": 1, "e": [2, 3]}}


# -- files ------------------------------------------------------------------------------------------------------------

EVALUATION = "tasks: [sudoku]\ngenerate: {{temperature: {0}}}\nsampler: {{name: threshold, tau: {0}}}\n"
RECIPE = "output: o\ndata: {{tasks: {{sudoku: 1}}}}\noptimizer: {{lr: {0}}}\n"


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_a_number_reads_the_same_in_files_and_on_the_command_line(tmp_path: Path, text: str, number: float) -> None:
    evaluation, recipe = tmp_path / "e.yaml", tmp_path / "r.yaml"
    for said, sets in ((text, []), ("0.5", [f"generate.temperature={text}", f"sampler.tau={text}"])):
        evaluation.write_text(EVALUATION.format(said))
        (setting,) = load(evaluation, sets).settings
        assert setting.generate.temperature == number and setting.sampler == {"name": "threshold", "tau": number}
    for said, sets in ((text, []), ("0.5", [f"optimizer.lr={text}"])):
        recipe.write_text(RECIPE.format(said))
        assert load_config(recipe, sets).optimizer.lr == number
    assert LoadArguments.read({"mask_id": "10"}).mask_id == 10
    with pytest.raises(DllmError, match=r"mask_id is an id \(a whole number\), not "):
        LoadArguments.read({"mask_id": text})  # read as a number, which is no id


def test_a_recipe_extends_another_and_says_where_a_key_was_given(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE.format("1e-3"))
    (tmp_path / "top.yaml").write_text(
        "extends: base.yaml\noptimizer: adamw\nmodel: {start: {name: m, subfolder: a}}\n"
    )
    config = load_config(tmp_path / "top.yaml", ["schedule.steps=3", "schedule.decay=1"])
    assert (config.optimizer.name, config.schedule.steps) == ("adamw", 3)
    assert config.model.start is not None and config.model.start.given() == {"subfolder": "a"}
    for said, what in (("optimizer.lr=x", "must be a number, found 'x'"), ("model.start.dtyp=1", "unknown key")):
        with pytest.raises(DllmError) as error:
            load_config(tmp_path / "top.yaml", [said])
        assert str(error.value).startswith(f"--set {said}: {said.partition('=')[0]}: {what}")
    (tmp_path / "base.yaml").write_text(RECIPE.format("0"))
    with pytest.raises(DllmError, match=r"base\.yaml, line 3: optimizer\.lr: must be more than 0, found 0"):
        load_config(tmp_path / "base.yaml")


def test_a_drafting_run_loads_its_models_with_arguments(tmp_path: Path) -> None:
    both = {"verifier": {"name": "tiny-ar", "dtype": "float64"}, "drafter": {"name": "tiny", "subfolder": "a"}}
    config = load({"tasks": ["sudoku"], "speculate": both})
    drafting = config.settings[0].speculate
    assert drafting is not None and (drafting.verifier.title, drafting.drafter.subfolder) == (
        "tiny-ar(dtype=float64)",
        "a",
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.plain()))
    assert load(tmp_path / "c.yaml").settings == config.settings


# -- JSON Schema ------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*/*.yaml"))


@cache
def validator(kind: str) -> Draft202012Validator:
    shown = CliRunner().invoke(app, ["schema", kind])
    schema = json.loads(shown.stdout)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def kind_of(path: Path) -> str:
    if path.parent.name == "align":
        return {AlignConfig: "align", PairHeadConfig: "pair-head", HeadRecipe: "head"}[type(load_recipe(path))]
    return "tune" if "tune:" in path.read_text() else {"train": "train"}.get(path.parent.name, "eval")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_files_fit_the_schema_and_with_a_typo_they_do_not(path: Path) -> None:
    said = yaml.load(path.read_text(), Loader)
    schema = validator(kind_of(path))
    assert [error.message for error in schema.iter_errors(said)] == []
    for key, item in said.items():
        typo = {k: v for k, v in said.items() if k != key} | {f"{key}x": item}
        assert not schema.is_valid(typo), f"{key}x"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("eval", "tasks: [sudoku]\nbatch_size: 0"),
        ("eval", "tasks: [sudoku]\nseed: x"),
        ("eval", "tasks: [{name: sudoku, limt: 3}]"),
        ("eval", "tasks: [sudoku]\nsampler: treshold"),
        ("eval", "tasks: [sudoku]\nsampler: {name: threshold, tua: 0.9}"),
        ("eval", "tasks: [sudoku]\nsampler: {name: threshold, tau: 7}"),
        ("eval", "tasks: [sudoku]\ncache: {name: dual, lef: 1}"),
        ("eval", "tasks: [sudoku]\nmatrix: {generate.stps: [1]}"),
        ("eval", "tasks: [sudoku]\nmodel: {name: tiny, dtyp: float32}"),
        ("eval", "tasks: [sudoku]\nengine: {kind: rey}"),
        ("eval", "tasks: [sudoku]\nspeculate: {verifer: tiny-ar}"),
        ("tune", "tasks: [sudoku]\ntune: {spac: [threshold]}"),
        ("train", "output: o\nobjective: diffusio"),
        ("train", "output: o\noptimizer: {lr: 0}"),
        ("train", "data: {tasks: {sudoku: 1}}"),
        ("align", "kind: drafter\noutput: o\none: {steps: 3}"),
        ("align", "output: o"),
        ("head", "kind: pair-head\noutput: o"),
        ("samplers", "{name: nobody}"),
        ("samplers", "threshold+nobody:tau=1e+0"),
    ],
)
def test_the_schema_refuses(kind: str, text: str) -> None:
    assert not validator(kind).is_valid(yaml.load(text, Loader))


@pytest.mark.parametrize("text", ["threshold:tau=1e+0+credit", "prophet:published", "[credit, {name: factor, f: 2}]"])
def test_the_schema_takes_every_notation_of_a_sampler(text: str) -> None:
    assert validator("samplers").is_valid(yaml.load(text, Loader))


def test_a_class_of_another_package_may_say_more_of_its_fields() -> None:
    @dataclass
    class Theirs:
        size: int = field(default=1, metadata={"why": "ours", "unit": "theirs"})
        filter: Unknown = None  # type: ignore[name-defined]  # noqa: F821

    assert settings("it", Theirs, {"size": 2}) == {"size": 2}
    assert keys_of(Theirs)["properties"]["size"]["description"] == "ours"
