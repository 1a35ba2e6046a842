"""The server against its own OpenAPI page, by schemathesis: whatever it is sent, it answers as the page says."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_kit import serving

from dllm.serve.config import ServeConfig

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
SLOW = ("regex", "choices", "grammar", "constraint", "response_format", "tools", "lookahead", "infill", "suffix")


@pytest.fixture(scope="module")
def site():
    with serving(config=ServeConfig(defaults={"sampler": "threshold"}, max_n=2, max_prompts=2)) as site:
        yield site


def fuzz(site, examples, light):
    page = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    for found in page.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def answers(case):
            if isinstance(case.body, dict):
                for name in SLOW if light else ():
                    case.body.pop(name, None)
                if isinstance(size := case.body.get("max_tokens", 4), int):
                    case.body["max_tokens"] = min(size, 4)
                case.body.pop("max_completion_tokens", None)
            case.call_and_validate(checks=CHECKS)

        answers()
    site.idle()


def test_answers_are_those_of_the_page(site):
    fuzz(site, 6, light=True)


@pytest.mark.sweep
def test_answers_are_those_of_the_page_at_length(site):
    fuzz(site, 100, light=False)
