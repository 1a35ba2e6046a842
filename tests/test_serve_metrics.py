"""`/metrics`: Prometheus' own reader reads it, and its figures are those of the answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from prometheus_client.parser import text_string_to_metric_families
from rough_kit import Served, served

import dllm
from dllm.serve.config import ServeConfig

CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/completions", "/v1/reads", "other")
PAGE = (Path(__file__).parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")


def figures(server: Served) -> dict[tuple[str, ...], float]:
    """Value by name and the values of its labels, in the order of their names."""
    code, text = server.ask("/metrics")
    assert code == 200
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (s.name.removeprefix("dllm_"), *(value for _, value in sorted(s.labels.items()))): s.value
        for s in samples
        if "le" not in s.labels
    }


def test_figures_are_those_of_the_answers() -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Tom has 12 apples. He buys 7 more."}]}
    asked |= {"max_tokens": 24, "block_length": 8, "sampler": "threshold", "cache": "dual"}
    with served(dllm.load("tiny"), ServeConfig(max_rows=2)) as server:
        before = figures(server)
        listed = server.ask("/metrics")[1]
        code, answer = server.ask(CHAT, {**asked, "n": 2})
        assert code == 200
        assert server.ask(CHAT, {**asked, "regex": "["})[0] == 400
        assert server.ask(CHAT, {**asked, "model": "other"})[0] == 404
        assert server.ask("/v1/of/my/own/", b"{}", **{"Content-Type": "text/plain"})[0] == 415
        assert server.idle()
        after = figures(server)
    new = {key: value - before.get(key, 0) for key, value in after.items()}
    said = [choice["dllm"] for choice in answer["choices"]]
    assert new["requests_total", "ok", CHAT] == 1 and new["requests_total", "error", CHAT] == 2
    assert new["requests_total", "error", "other"] == new["errors_total", "unsupported_media_type"] == 1
    assert new["constraint_compilations_total", "refused"] == 1
    assert new["errors_total", "model_not_found"] == new["errors_total", "invalid_value"] == 1
    assert new["tokens_total", "final"] == answer["usage"]["completion_tokens"] > 0
    assert new["tokens_total", "prompt"] == answer["usage"]["prompt_tokens"] > 0
    assert new["tokens_total", "decoded"] >= new["tokens_total", "final"]
    rows = sum(value for key, value in new.items() if key[0] == "rows_total")
    forwards = sum(value for key, value in new.items() if key[0] == "forwards_total")
    assert rows == sum(facts["nfe"] for facts in said) == new["forward_rows_sum",]
    assert rows / 2 <= forwards == new["forward_rows_count",] < rows  # two rows share what both need
    assert new["rows_total", "refresh"] >= 2
    assert new["positions_total",] > 0
    for name in (
        "queue_seconds",
        "time_to_first_forward_seconds",
        "time_per_final_token_seconds",
        "tokens_per_forward",
    ):
        assert new[f"{name}_count",] == 2
    assert new["request_seconds_count",] == 1 and new["request_seconds_sum",] > 0
    assert new["block_seconds_count",] >= 2 and new["tick_seconds_sum",] > 0
    assert new["commits_per_forward_sum",] > 0
    assert (after["lanes",], after["lanes_used",], after["requests_running",]) == (2, 0, 0)
    assert any(key[0] == "build_info" and "tiny" in key for key in after)
    # `rate` sees no series begin: what the first scrape does not have, the first requests are lost of
    assert before.keys() == after.keys()
    for route in ROUTES:
        assert {before["requests_total", outcome, route] for outcome in ("ok", "cancelled", "error")} == {0}
    # as promtool asks it: a name that ends in _total is a counter's
    assert [f.name for f in text_string_to_metric_families(listed) if f.type != "counter" and "_total" in f.name] == []


def test_every_code_of_an_error_is_there_from_the_start() -> None:
    from dllm.serve.metrics import CODES

    table = PAGE.partition("| status | code |")[2].partition("\n\n")[0]
    routing = {"not_found", "method_not_allowed"}  # of no route
    assert {*re.findall(r"`([a-z_]+)`", table)} - routing == {*CODES}
    with served(dllm.load("tiny"), ServeConfig()) as server:
        found = figures(server)
    assert {key[1]: value for key, value in found.items() if key[0] == "errors_total"} == dict.fromkeys(CODES, 0)
