"""What outlives a text: one store for one tokenizer, bounded in memory, saved and loaded.

A call reads a store as it was when the call began, and adds what its texts taught when all of them are done, in the
order of the rows. So a row drafts the same alone and in a batch, and a call that fails teaches nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dllm.drafting.estimate import Calibrator
from dllm.drafting.suffixes import REACH, SuffixArray, Texts
from dllm.drafting.trust import Trust
from dllm.errors import DllmError, first_line
from dllm.models.files import replaced
from dllm.models.tokenizer import Tokenizer
from dllm.spec import lines

log = logging.getLogger(__name__)
BEST = 8  # tokens that the loop tells of every verified node
FORMAT = "dllm drafting store 1"
StoreLike: TypeAlias = "str | Path | Store | None"
Lesson: TypeAlias = "Successors | Grams | Trust"  # what a text taught


class Seen(NamedTuple):
    """What the verifier said behind one node of a round."""

    path: tuple[int, ...]  # tokens of the draft that lead to the node, from the text as the round found it
    best: tuple[int, ...]  # the verifier's most probable tokens there, best first
    prob: tuple[float, ...]  # their probabilities by its raw logits


class Successors:
    """The verifier's best successors of every token, as it named them last, and how often the one of each rank was
    right (Token Recycling, arXiv 2408.08696). A token takes 8 ids, so the vocabulary bounds the table.

    `prior` of rank r weighs as much as `STRENGTH` tokens; counts fade beyond `WINDOW`.
    """

    STRENGTH, WINDOW = 32, 4096
    prior = np.array([0.5 / (r + 1) ** 1.2 for r in range(BEST)])

    def __init__(self, base: Successors | None = None) -> None:
        self.base = base
        self.best: dict[int, tuple[int, ...]] = {}
        self.hits, self.tries = np.zeros(BEST), 0.0

    def after(self, token: int) -> tuple[int, ...]:
        """The successors of a token, best first; none where it was never verified."""
        return self.best.get(token) or (self.base.after(token) if self.base else ())

    def ranks(self) -> list[float]:
        """The probability of each rank."""
        hits, tries = self.hits, self.tries
        if self.base:
            hits, tries = hits + self.base.hits, tries + self.base.tries
        ranks: list[float] = ((self.STRENGTH * self.prior + hits) / (self.STRENGTH + tries)).tolist()
        return ranks

    @property
    def top(self) -> int:
        """The largest id."""
        return max((t for token, best in self.best.items() for t in (token, *best)), default=-1)

    def learn(self, before: int, emitted: Sequence[int], last: Mapping[int, tuple[int, ...]]) -> None:
        """The tokens emitted behind `before`, judged by the table as it was, then the round's own successors."""
        for token, following in zip([before, *emitted], emitted, strict=False):
            if known := self.after(token):
                self.tries += 1
                if following in known:
                    self.hits[known.index(following)] += 1
        self.best.update(last)

    def add(self, other: Successors) -> None:
        """What another table learned."""
        self.best.update(other.best)
        self.hits, self.tries = self.hits + other.hits, self.tries + other.tries
        if self.tries > self.WINDOW:
            self.hits, self.tries = self.hits / 2, self.tries / 2


class Row(NamedTuple):
    """What the verifier says behind a gram, on average over `n` times."""

    best: tuple[int, ...]
    prob: tuple[float, ...]
    n: int


class Grams:
    """The verifier's own probabilities behind every gram of one to `ORDER` tokens that it was asked about (STAND,
    arXiv 2506.04708). At most `limit` grams: those that were not heard of for longest leave."""

    ORDER = 3

    def __init__(self, limit: int, base: Grams | None = None) -> None:
        self.limit, self.base = limit, base
        self.rows: dict[tuple[int, ...], Row] = {}  # the one that was heard of last at the end

    def after(self, ids: Sequence[int]) -> Row | None:
        """The row of the longest end of `ids` that is known; of one that both know, the text's own."""
        for n in range(min(self.ORDER, len(ids)), 0, -1):
            gram = tuple(ids[-n:])
            row = self.rows.get(gram) or (self.base and self.base.rows.get(gram))
            if row:
                return row
        return None

    @property
    def top(self) -> int:
        """The largest id."""
        return max((t for gram, row in self.rows.items() for t in (*gram, *row.best)), default=-1)

    def learn(self, ids: Sequence[int], seen: Sequence[Seen]) -> None:
        """A round behind the text `ids`."""
        for node in seen:
            behind = [*ids[-self.ORDER :], *node.path]
            for n in range(1, min(self.ORDER, len(behind)) + 1):
                self._put(tuple(behind[-n:]), Row(node.best, node.prob, 1))

    def add(self, other: Grams) -> None:
        """What another table learned."""
        for gram, row in other.rows.items():
            self._put(gram, row)

    def _put(self, gram: tuple[int, ...], new: Row) -> None:
        old = self.rows.pop(gram, None)
        self.rows[gram] = new if old is None else _mean(old, new)
        if len(self.rows) > self.limit:
            del self.rows[next(iter(self.rows))]


def _mean(a: Row, b: Row) -> Row:
    prob: dict[int, float] = {}
    n = a.n + b.n
    for row in (a, b):
        for token, p in zip(row.best, row.prob, strict=True):
            prob[token] = prob.get(token, 0.0) + p * row.n / n
    best = sorted(prob, key=lambda t: (-prob[t], t))[:BEST]
    return Row(tuple(best), tuple(prob[t] for t in best), n)


class Store:
    """Texts of a verifier with their counts (drafter `suffix`), its successors of every token (`recycle`), its
    probabilities behind grams (`stand`), and what the word of each source of a merged tree is worth (`graft=`), for all
    verifiers of one tokenizer.

    tokens   most tokens of texts; then the oldest texts leave. 2^20 take about 20 MB.
    grams    most grams; then those that were not heard of for longest leave. 2^16 take about 50 MB.
    path     where it is saved after every call; None: only where `save` is called.

    Prompts are kept only as far as a match can reach. A store never changes what is generated, but at T > 0 a seed
    repeats a text only with the same store.
    """

    def __init__(self, tokens: int = 1 << 20, grams: int = 1 << 16, path: str | Path | None = None) -> None:
        for name, limit in (("tokens", tokens), ("grams", grams)):
            if not isinstance(limit, int) or limit < 1:
                raise DllmError(f"{name}={limit!r} of a store must be a whole number, at least 1")
        self.path = None if path is None else Path(path)
        self.texts, self.successors, self.grams, self.trust = Texts(tokens), Successors(), Grams(grams), Trust()
        self.tokenizer = ""  # what it numbers tokens by; empty: not known yet
        self.top = -1  # the largest id
        self.lock = threading.Lock()

    def check(self, vocab: int, tokenizer: Tokenizer | None, name: str = "the verifier") -> None:
        """The first verifier settles the tokenizer. Errors: another tokenizer, ids that the verifier does not have."""
        own = "" if tokenizer is None else fingerprint(tokenizer)
        if self.tokenizer and own and own != self.tokenizer:
            raise DllmError(
                f"{self._what} holds texts of another tokenizer than {name} has: a store belongs to one tokenizer, "
                "give this verifier a store of its own"
            )
        if self.top >= vocab:
            raise DllmError(f"{self._what} holds id {self.top}, and {name} has {vocab} tokens: give it its own store")
        self.tokenizer = self.tokenizer or own

    @property
    def _what(self) -> str:
        return "the store" if self.path is None else f"the store {self.path}"

    def learn(self, texts: Iterable[tuple[Sequence[int], int]], lessons: Iterable[Lesson]) -> None:
        """Texts, each with the length of its prompt, and what drafters learned of them."""
        with self.lock:
            kept = [[*ids[max(0, begin - REACH) :]] for ids, begin in texts if len(ids) > begin]
            self.texts.add(kept)
            self.top = max([self.top, *map(max, kept)])
            for lesson in lessons:
                if isinstance(lesson, Successors):
                    self.successors.add(lesson)
                elif isinstance(lesson, Grams):
                    self.grams.add(lesson)
                else:
                    self.trust.add(lesson)
                self.top = max(self.top, lesson.top)

    def save(self, path: str | Path | None = None) -> None:
        """Write it, whole or not at all. Errors: no path, a folder that there is not."""
        path = self.path if path is None else Path(path)
        if path is None:
            raise DllmError("where to? store.save(path), or dllm.Store(path=...)")
        with self.lock:
            tensors, grams = self._tensors(), self.grams
        about = {"format": FORMAT, "tokenizer": self.tokenizer, "top": self.top, "tries": self.successors.tries}
        limits = {"tokens": self.texts.limit, "grams": grams.limit, "trust": [*self.trust.kept]}
        try:
            with replaced(path) as draft:
                save_file(tensors, draft, {"store": json.dumps({**about, **limits})})
        except OSError as error:
            raise DllmError(f"the store cannot be written to {path}: {error.strerror or first_line(error)}") from error

    def _tensors(self) -> dict[str, np.ndarray]:
        texts, best, rows = self.texts.texts, self.successors.best, self.grams.rows
        return {
            "texts": np.concatenate([np.zeros(0, np.int32), *texts]),
            "lengths": np.array([len(text) for text in texts], np.int32),
            "tokens": np.array([*best], np.int32),
            "successors": _padded(best.values(), BEST),
            "hits": self.successors.hits,
            "grams": _padded(rows, Grams.ORDER),
            "best": _padded((row.best for row in rows.values()), BEST),
            "prob": _padded((row.prob for row in rows.values()), BEST).astype(np.float32),
            "n": np.array([row.n for row in rows.values()], np.int64),
            "trust": np.array([(c.hits, c.tries) for c in self.trust.kept.values()]).reshape(
                -1, 2, *Calibrator().hits.shape
            ),
        }

    @classmethod
    def load(cls, path: str | Path) -> Store:
        """A saved store, which is saved there again after every call. Errors: no file, no store, a damaged one."""
        path = Path(path)
        if not path.is_file():
            raise DllmError(f"there is no store {path}")
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["store"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["format"] != FORMAT:
                raise ValueError(f"it is a {about['format']}, and this release reads a {FORMAT}")
            store = cls(about["tokens"], about["grams"], path)
            store._fill(about, found)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise DllmError(f"{path} is no store, or is damaged ({said}): remove it, and a new one begins") from error
        return store

    def _fill(self, about: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> None:
        ids, lengths, prob, hits = found["texts"], found["lengths"], found["prob"], found["hits"]
        names = ("texts", "lengths", "tokens", "successors", "grams", "best", "n")
        sizes = [len(found[a]) - len(found[b]) for a, b in (("tokens", "successors"), ("grams", "n"), ("best", "n"))]
        sums = int(lengths.sum()) - len(ids)
        whole = all(found[name].dtype.kind == "i" for name in names) and not (sums or any(sizes))
        top = max(int(found[name].max(initial=-1)) for name in ("texts", "tokens", "successors", "grams", "best"))
        sound = whole and prob.shape == found["best"].shape and hits.shape == (BEST,) and top <= int(about["top"])
        if not (sound and (lengths > 0).all() and (ids >= 0).all() and ((prob >= 0) | (found["best"] < 0)).all()):
            raise ValueError("its parts do not fit together")
        for who, counts in zip(list(about["trust"]), found["trust"], strict=True):
            self.trust.kept[str(who)] = Calibrator.of(*counts)
        self.tokenizer, self.top = str(about["tokenizer"]), int(about["top"])
        self.texts.add(np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else [])
        following = map(_stripped, found["successors"].tolist())
        self.successors.best = dict(zip(found["tokens"].tolist(), following, strict=True))
        self.successors.hits, self.successors.tries = hits.astype(float), float(about["tries"])
        for gram, best, p, n in zip(
            found["grams"].tolist(), found["best"].tolist(), prob.tolist(), found["n"].tolist(), strict=True
        ):
            kept = _stripped(best)
            self.grams.rows[_stripped(gram)] = Row(kept, tuple(p[: len(kept)]), n)


def _padded(rows: Iterable[Sequence[float]], width: int) -> np.ndarray:
    """Rows of at most `width` numbers, (n, width), -1 where they end."""
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    kind = np.int32 if all(isinstance(x, int) for row in padded[:1] for x in row) else np.float64
    return np.array(padded, kind).reshape(len(padded), width)


def _stripped(row: Sequence[int]) -> tuple[int, ...]:
    return tuple(t for t in row if t >= 0)


_OPEN: dict[Path, tuple[tuple[int, int], Store]] = {}  # stores by file, with the file's state when they last were equal


def as_store(what: StoreLike) -> Store | None:
    """A `Store` of itself or of a file; where there is none yet, a new one that is saved there. A file that nobody else
    wrote is read once a process."""
    if what is None or isinstance(what, Store):
        return what
    if not isinstance(what, str | PathLike):
        raise DllmError(f"store is a dllm.Store or the path of a file, not {type(what).__name__}")
    path = Path(what).resolve()
    state, store = _OPEN.get(path, (None, None))
    if store is None or state != _state(path):
        if not path.parent.is_dir():  # said before anything is decoded
            raise DllmError(f"there is no folder {path.parent} for the store {path.name}")
        store = Store.load(path) if path.exists() else Store(path=path)
        _OPEN[path] = _state(path), store
    return store


def keep(store: Store) -> None:
    """Save a store where it has a file."""
    if store.path is not None:
        store.save()
        path = store.path.resolve()
        _OPEN[path] = _state(path), store


def _state(path: Path) -> tuple[int, int]:
    if not path.exists():
        return (0, 0)
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


_PRINTS: dict[int, tuple[Tokenizer, str]] = {}  # of the last few tokenizers, by object


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells tokenizers that number tokens differently apart; read once a tokenizer."""
    kept = _PRINTS.get(id(tokenizer))
    if kept is None or kept[0] is not tokenizer:
        told = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
        while len(_PRINTS) >= 8:
            del _PRINTS[next(iter(_PRINTS))]
        kept = _PRINTS[id(tokenizer)] = tokenizer, hashlib.sha256(told.encode()).hexdigest()
    return kept[1]


@lru_cache(maxsize=4)
def corpus_index(corpus: tuple[tuple[int, ...], ...], vocab: int) -> SuffixArray:
    """The sorted places of a corpus. Errors: ids that the verifier does not have."""
    if bad := [t for text in corpus for t in text if not 0 <= t < vocab]:
        raise DllmError(f"the corpus holds id {bad[0]}: ids lie in 0..{vocab - 1}, those of the verifier")
    return SuffixArray([text for text in corpus if text])


def corpus_ids(path: str | Path, vocab: int, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """The texts of a file as ids: a text file is one text; in a `.jsonl` file every line is a text, a list of ids, or
    an object with either under "text" or "ids". Errors: no such file, other content, texts without a tokenizer."""
    path = Path(path)
    try:
        whole = path.read_text(encoding="utf-8")
        found = [json.loads(line) for line in lines(whole) if line.strip()] if path.suffix == ".jsonl" else [whole]
    except (OSError, ValueError, RecursionError) as error:
        raise DllmError(f"the corpus {path} cannot be read: {first_line(error)}") from error
    texts = []
    for i, entry in enumerate(found):
        text = entry.get("ids", entry.get("text")) if isinstance(entry, dict) else entry
        if isinstance(text, str):
            if tokenizer is None:
                raise DllmError(f"the corpus {path} holds text, and the verifier came without a tokenizer: give ids")
            text = tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            ids = tuple(map(index, text))  # type: ignore[arg-type]
        except TypeError:
            raise DllmError(f"the corpus {path}, line {i + 1}: neither a text nor a list of ids") from None
        if any(not 0 <= t < vocab for t in ids):
            raise DllmError(f"the corpus {path}, line {i + 1}: ids lie in 0..{vocab - 1}, those of the verifier")
        texts.append(ids)
    return tuple(texts)
