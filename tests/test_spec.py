"""The one reader: specifications and their text, numbers on every front, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.decoding.cache.registry import policy
from dllm.drafting.loop import SpecConfig
from dllm.errors import DllmError
from dllm.lookahead.setting import Lookahead
from dllm.samplers import registry
from dllm.spec import named, render, show, split, value

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
