"""Every paper's configuration runs: the embedded model, two documents, and its published figures in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm.eval import load, run
from dllm.eval.tasks import confined

PAPERS = sorted(
    p for p in (Path(__file__).parents[1] / "configs" / "papers").glob("*.yaml") if not p.name.startswith("_")
)
NAMED = {
    "prophet",
    "localleap",
    "credit",
    "adablock",
    "freedave",
    "learn2pd",
    "diffuspec",
    "deer",
    "fast-dllm",
    "daedal",
}


def test_there_is_one_for_each_headline_table():
    assert {path.stem for path in PAPERS} >= NAMED


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_dry_run(path, tmp_path):
    config = load(path)
    assert config.expected and config.unknown and config.about
    if any(t.name in ("humaneval", "humaneval_instruct", "mbpp") for t in config.tasks) and confined.refusal():
        pytest.skip("programs cannot be confined here")
    results = run(path, dry_run=True, out=tmp_path, progress=False)
    assert results.exit_code == 0 and len(results.cells) == len(config.tasks) * len(config.settings)
    assert all(cell["n"] == 2 for cell in results.cells)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Beside the published figures" in text and all(line in text for line in config.unknown)
    assert "> a rehearsal" in text
