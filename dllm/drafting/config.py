"""How to speculate: `SpecConfig`, the settings of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from pathlib import Path
from typing import Any

from dllm.call.arguments import RENAMED
from dllm.drafting.control import CONTROLLERS, Controller
from dllm.drafting.drafters import Drafter
from dllm.drafting.pair_head import PairHeadLike
from dllm.drafting.registry import DrafterLike, as_drafter, named
from dllm.drafting.search import SEARCHES, BestFirstTree, PathSearch, SampleTree
from dllm.drafting.store import StoreLike
from dllm.drafting.trim import KeepLike, as_keep
from dllm.drafting.window import WindowLike, as_window
from dllm.errors import DllmError, unknown
from dllm.spec import check, param


@dataclass(frozen=True)
class SpecConfig:
    """How to speculate. Nothing here changes what is generated, only how fast.

    search   None: `eal` when greedy, `sample` at T > 0; or a name, "name:key=value,…", a mapping, or an object.
    tree     node budget of a tree; 0 = chain.
    length   length controller, given like `search`.
    k        most slots per draft, whatever the controller says; None = no such limit.
    carry    unused slots of a draft: "auto" (reused where the controller expects more from them than from a fresh
             draft), "always", "off". Exact in every case: the lattice is carried over, not the tokens.
    ngrams   what the n-gram proxy counts: the "text", prompt and output, or what the "verifier" said at every verified
             node, rejected ones too, by its probabilities (ADED, arXiv 2407.12021).
    order    of the n-gram proxy; 0 = no proxy.
    corpus   texts of yours, which the proxy is fitted on as well and the drafter `suffix` copies from: id sequences, or
             a file, see `corpus_ids`.
    store    what outlives a text, see `dllm.Store`, or a file to keep it in. None: every text begins anew.
    graphs   CUDA graphs of rounds and drafts: None = where they can be captured, True = asked for, False = off.
    verify   how a sampled chain is judged: "token", each by the ratio test, or "block", all at once, which keeps at
             least as many in the mean (arXiv 2403.10444). Both are exact; where processors look at the text: "token".
    pair_head   a `PairHead` or its folder: what neighbours of the drafter's lattices say of each other; candidates are
             then the `m_max` best of each slot, whatever their mass.
    graft    another drafter, or several, whose continuations are merged with the drafter's (points only): retrieval, or
             a model; what they take is counted with the drafter. Into one tree; without a tree the best chain of all is
             taken, and the drafter is asked where `length` expects more of it than of what was retrieved.
    trim     the verifier's ids that drafts are made of: a list, a file of `dllm trim`, or how many of the first. Of a
             drafter's head no more is computed. None: all, or what the drafter came with.
    window   what of the text drafters read: the last tokens, or "256:sinks=4,recall=128", see `Window`; "auto": as much
             as costs little by what drafts take. None: all of it, or as the drafter came.
    """

    search: str | Mapping[str, object] | PathSearch | None = None
    tree: int = param(0, "a chain", low=0)
    length: str | Mapping[str, object] | Controller = "cost"
    k: int | None = param(None, "no such limit", low=0)
    carry: str = param("auto", "never worse than a fresh draft", choices=("auto", "always", "off"))
    reuse_min: int = param(2, "a single slot is not worth a round", low=1)
    order: int = param(3, "DiffuSpec's", low=0)
    ngrams: str = param("text", "needs nothing of the verifier", choices=("text", "verifier"))
    decay: float = param(1.0, "a text does not fade", above=0, high=1)
    corpus: tuple[tuple[int, ...], ...] | str | Path = ()
    store: StoreLike = None
    tau_mass: float = param(0.8, "DiffuSpec's", above=0, high=1)
    m_max: int = param(15, "DiffuSpec's", low=1)
    graphs: bool | None = None
    verify: str = param("token", "the field's", choices=("token", "block"))
    pair_head: PairHeadLike = None
    graft: DrafterLike | Sequence[DrafterLike] = None
    trim: KeepLike = None
    window: WindowLike = None

    def __post_init__(self) -> None:
        check(self, "speculate")
        object.__setattr__(self, "trim", as_keep(self.trim))
        object.__setattr__(self, "window", as_window(self.window))
        if isinstance(self.corpus, str | Path):
            return
        try:
            object.__setattr__(self, "corpus", tuple(tuple(map(index, ids)) for ids in self.corpus))
        except TypeError as error:
            raise DllmError("corpus is a list of id sequences, or a file of texts") from error

    @property
    def grafts(self) -> list[Drafter]:
        """The other drafters."""
        given: Sequence[Any] = self.graft if isinstance(self.graft, list | tuple) else [self.graft]
        return [drafter for one in given if (drafter := as_drafter(one)) is not None]

    @classmethod
    def of(
        cls, base: SpecConfig | Mapping[str, object] | None, options: Mapping[str, object], beside: Sequence[str] = ()
    ) -> SpecConfig:
        """A config from an object or mapping and keyword options.

        Errors: an unknown key, with the nearest one of ours and of those that the call takes `beside`, or with the name
        that an argument of transformers has here.
        """
        base = cls.of(None, base) if isinstance(base, Mapping) else cls() if base is None else base
        if not isinstance(base, SpecConfig):
            raise DllmError(f"spec is a SpecConfig or a mapping of its fields, not {base!r}")
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                here = RENAMED.get(key)
                hint = f": here it is {here}" if here in beside else ""
                raise unknown("option of speculate", key, [*beside, *known], hint)
        return replace(base, **options)  # type: ignore[arg-type]

    def build_search(self, do_sample: bool) -> PathSearch:
        """The search of a text, a tree search where a tree is asked for."""
        given = self.search or ("sample" if do_sample and not self.tree and self.graft is None else "eal")
        search = given if isinstance(given, PathSearch) else named("search", given, SEARCHES)
        if isinstance(search, BestFirstTree):
            return replace(search, budget=self.tree or search.budget)
        if self.tree and isinstance(search, SampleTree):
            return search.within(self.tree)
        if self.tree and not search.tree:
            return BestFirstTree(self.tree, search.lam)
        return search

    def build_controller(self) -> Controller:
        """A new length controller, or the one that was given."""
        if isinstance(self.length, Controller):
            return self.length
        return named("length controller", self.length, CONTROLLERS)
