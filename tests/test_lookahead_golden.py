"""FreeDave's golden decodes: ids and commits always, forwards with drafts from the last state only and no retention."""

from __future__ import annotations

from typing import Any

import pytest
from golden_cases import cases, groups, model

import dllm

METHODS = ("freedave_dual", "freedave_prefix", "freedave_block", "freedave_block_eager")


def decode(checkpoint: str, method: str, group: list[dict[str, Any]], **settings: Any) -> list[Any]:
    """A ragged batch of the cases with FreeDave's parameters."""
    p = group[0]["params"]
    arguments: dict[str, Any] = {
        "sampler": {"name": "freedave", "rows": p["draft_steps"], "lone_opening": "dream" in checkpoint, **settings},
        "block_length": p["block_length"],
        "max_new_tokens": p["max_gen_length"],
        "early_stop": False,
        "trace": True,
    }
    if "block" in method:  # the code decodes whole blocks: so do we, behind the tokens that were asked for
        arguments["cache"] = "block"
    else:
        arguments["cache"] = "dual" if p["dual_cache"] else "prefix"
    settled = {"block_size": p["block_length"]} if "block" in method else {}
    decoder = model(checkpoint, **settled)
    return dllm.generate(decoder, [c["prompt_ids"] for c in group], **arguments, batch_size=len(group))


def drafting_forwards(case: dict[str, Any]) -> int:
    """Forwards of the block-causal reference but its prefill, and the one that stores each finished block."""
    size, prompt, total = case["params"]["block_length"], len(case["prompt_ids"]), len(case["output_ids"])
    return case["nfe"] - bool(prompt // size) - (-(-total // size) - prompt // size)


WHOLE = [False, pytest.param(True, marks=pytest.mark.sweep)]  # or the last of a file's settings


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("checkpoint", "method"), cases(*METHODS))
def test_reference_counts(checkpoint: str, method: str, whole: bool) -> None:
    preset, found = "reference_eager" if "eager" in method else "reference", groups(checkpoint, method)
    for group in found if whole else found[-1:]:
        for case, out in zip(group, decode(checkpoint, method, group, preset=preset), strict=True):
            assert out.sequences == case["output_ids"][: len(out.sequences)], case["id"]
            assert out.nfe == (drafting_forwards(case) if "block" in method else case["nfe"]), case["id"]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("checkpoint", "method"), cases("freedave_dual", "freedave_prefix"))
def test_retention_only_helps(checkpoint: str, method: str, whole: bool) -> None:
    found = groups(checkpoint, method)
    for group in found if whole else found[-1:]:
        for case, out in zip(group, decode(checkpoint, method, group), strict=True):
            assert out.sequences == case["output_ids"]
            assert out.trace.commits == case["static"]["commits"]
            assert out.nfe <= case["nfe"]
