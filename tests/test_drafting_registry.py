"""Names of drafters, and one that joins from another package: the page docs/adding-a-drafter.md, word for word."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from drafting_kit import VOCAB, Script, plain, tiny_verifier
from plugin_kit import installed

import dllm
from dllm.drafting import Controller, Drafter, Need, PathSearch, RoundStats, as_drafter, chain, param
from dllm.drafting.registry import OTHERS, is_drafter_name
from dllm.errors import DllmError

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-drafter.md").read_text(encoding="utf-8")
PROMPT = [3, 4, 5, 3, 4]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package of the page, installed beside dllm; yields its module."""
    with installed("adding-a-drafter.md", tmp_path, monkeypatch, OTHERS.refresh) as file:
        yield file


@pytest.mark.parametrize("how", ["bigram", "bigram:smoothing=0.5", {"name": "bigram", "smoothing": 2}])
def test_a_drafter_from_another_package(outside: Path, how: str | dict[str, object]) -> None:
    model = tiny_verifier()
    out = dllm.speculate(model, how, PROMPT, max_new_tokens=30, length="fixed:k=4")
    assert out.sequences == plain(model, PROMPT, 30) and out.n_draft > 0
    tree = dllm.speculate(model, how, PROMPT, max_new_tokens=30, length="fixed:k=4", tree=6)
    assert tree.sequences == out.sequences
    grafted = dllm.speculate(model, "suffix", PROMPT, max_new_tokens=30, tree=6, graft=how)
    assert grafted.sequences == out.sequences
    sampled = dllm.speculate(model, how, PROMPT, max_new_tokens=8, temperature=1.0, seed=1)
    assert len(sampled.tokens) == 8


def test_its_drafts_are_what_followed(outside: Path) -> None:
    drafter = as_drafter("bigram")
    assert drafter is not None and is_drafter_name("bigram:smoothing=1") and not is_drafter_name("bigrams")
    fork = drafter.fork()
    fork.reset([1, 2, 3, 1], Need(VOCAB))
    assert fork.draft([1, 2, 3, 1], 3).argmax.tolist() == [2, 3, 1]
    assert len(fork.draft([1, 2, 3, 1, 9], 3)) == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("bigram:smooting=1", "unknown .* 'smooting' of drafter 'bigram'; did you mean 'smoothing'"),
        ("bigram:smoothing=wide", "smoothing='wide' must be a number"),
        (
            "bigram:smoothing=0",
            "drafter 'bigram' of the package 'my-package' failed: ValueError: smoothing is positive",
        ),
        ("bigarm", "unknown drafter 'bigarm'; did you mean 'bigram'"),
        ({"name": "bigarm"}, "unknown drafter 'bigarm'"),
    ],
)
def test_mistakes_are_named(outside: Path, how: str | dict[str, object], said: str) -> None:
    with pytest.raises(DllmError, match=said):
        as_drafter(how)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_thing", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("class Bigram: pass", "is no class of dllm.drafting.Drafter"),
    ],
)
def test_a_broken_drafter_of_another_package_breaks_nothing_else(outside: Path, code: str, said: str) -> None:
    outside.write_text(code, encoding="utf-8")
    assert as_drafter("suffix") is not None
    with pytest.raises(DllmError, match=f"drafter 'bigram' of the package 'my-package' {re.escape(said)}"):
        as_drafter("bigram")


def test_a_controller_of_your_own() -> None:
    code = re.search(r"```python\n(class Patient.*?)```", PAGE, re.DOTALL)
    assert code
    scope: dict[str, type[Controller]] = {"Controller": Controller, "RoundStats": RoundStats}
    exec(code[1], scope)
    model = tiny_verifier()

    class Right(Drafter):
        text = plain(model, PROMPT, 30)

        def draft(self, ids, k, *, generator=None):
            return chain(self.text[len(ids) : len(ids) + k])

    out = dllm.speculate(model, Right(), PROMPT, max_new_tokens=30, length=scope["Patient"]())
    assert out.sequences == Right.text and [r.k for r in out.rounds[:4]] == [1, 2, 3, 4]


def test_a_search_of_your_own() -> None:
    @dataclass(frozen=True)
    class Rank(PathSearch):
        """The token of this rank in every slot."""

        rank: int = param(1, "the best one is everybody's", low=0)

        def find(self, edges, eos, generator):
            return chain([column[min(self.rank, len(column) - 1)][0] for column in edges.lat.columns])

    model = tiny_verifier()
    text = plain(model, PROMPT, 20)
    kw = dict(max_new_tokens=20, length="fixed:k=4")
    for search, agrees in ((Rank(0), True), (Rank(), False)):
        out = dllm.speculate(model, Script(text), PROMPT, search=search, **kw)
        assert out.sequences == text and (out.tau > 3) == agrees
        tree = dllm.speculate(model, Script(text), PROMPT, search=search, tree=6, **kw)
        assert tree.sequences == text and tree.tau > 3  # a budget makes a tree of the lattice, whatever the path
    with pytest.raises(DllmError, match="Rank: rank=-1 must be at least 0"):
        Rank(-1)


def test_nothing_is_written_on_models_and_they_are_let_go() -> None:
    model = tiny_verifier()
    before = set(vars(model))
    dllm.speculate(model, model, PROMPT, max_new_tokens=4)
    assert set(vars(model)) == before
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_public_names_are_there() -> None:
    import dllm.drafting as public

    for name in public.__all__:
        assert getattr(public, name) is not None
    with pytest.raises(AttributeError):
        _ = public.Draftr
    assert torch.is_tensor(public.Rows(torch.ones(1, 1)).prob)
