"""A cache policy that joins from another package: the one of docs/adding-a-cache.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_kit import installed
from test_block_decoding import tiny as blocks
from test_cache import PROMPTS, recomputed, run, story, tiny

import dllm
from dllm.decoding.cache import registry
from dllm.errors import DllmError

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-cache.md"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's package, installed beside dllm; yields the file of the policy."""
    with installed("adding-a-cache.md", tmp_path, monkeypatch, registry.OTHERS.refresh) as file:
        yield file


def test_it_decodes_by_its_rule(outside):
    """Prompt of 4, 10 new tokens: all of it every third step, and the response at the others."""
    seen, _ = recomputed("prompt:every=3")
    assert [columns[0] for columns in seen] == [0, 4, 4, 0, 4, 4, 0, 4, 4, 0]
    assert {columns[-1] for columns in seen} == {13}


@pytest.mark.parametrize("shift", [0, 1])
def test_it_is_a_policy_like_the_others(outside, shift):
    """Rows are independent, one layer is exact, and lookahead foresees its forwards."""
    arguments = {"cache": {"name": "prompt", "every": 4}, "sampler": "threshold:tau=0.2"}
    model = tiny(shift=shift)
    together = run(model, PROMPTS, **arguments, batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        assert story(run(model, prompt, **arguments, seed=i)) == story(together[i])
    errors = dllm.cache_error(tiny(layers=1, shift=shift), PROMPTS, **arguments, max_new_tokens=13, block_length=5)
    assert max(e.max for row in errors for e in row) < 1e-12
    ahead = run(model, PROMPTS, **arguments, batch_size=2, lookahead=4)
    assert [o.sequences for o in ahead] == [o.sequences for o in together]


def test_it_is_read_like_the_others(outside):
    assert registry.policy("prompt").every == 32 and "prompt" in registry.names()
    for spec, said in [
        ("prompt:every=0", "every=0 must be at least 1"),
        ("prompt:evry=2", "every"),
        ("promt", "did you mean 'prompt'"),
    ]:
        with pytest.raises(DllmError, match=said):
            registry.policy(spec)
    with pytest.raises(DllmError, match="does not fit a block-causal model"):
        dllm.generate(blocks(), [5], cache="prompt")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_thing", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("PromptCache = 3", "is no class of dllm.decoding.cache.Policy"),
        ("class PromptCache: pass", "is no class of dllm.decoding.cache.Policy"),
    ],
)
def test_a_broken_one_breaks_nothing_else(outside, code, said):
    outside.write_text(code, encoding="utf-8")
    assert registry.policy("dual").name == "dual" and "prompt" not in registry.names()
    with pytest.raises(DllmError, match=f"cache 'prompt' of the package 'my-package' {re.escape(said)}"):
        registry.policy("prompt:every=3")


def test_one_without_a_step_is_named(outside):
    outside.write_text(outside.read_text(encoding="utf-8").replace("def step(", "def stop("), encoding="utf-8")
    with pytest.raises(DllmError, match=r"cache 'prompt' of the package 'my-package' failed: TypeError.*step"):
        registry.policy("prompt")
