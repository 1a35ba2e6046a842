"""The canvas page: one HTML file that `dllm serve` offers and that shows a saved trace (`dllm/assets/canvas.html`).

Its style and its script are the only ones that a browser may run there: `POLICY` names them by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

_EMPTY = '<script type="application/json" id="saved">null</script>'


@cache
def source() -> str:
    """The page as it is served: without a trace in it."""
    return files("dllm.assets").joinpath("canvas.html").read_text(encoding="utf-8")


@cache
def policy() -> str:
    """The Content-Security-Policy of a page that stands alone; a server adds what the page may ask it."""

    def allowed(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", source(), re.DOTALL)
        assert found, f"canvas.html has no <{tag}>"
        return "'sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; style-src {allowed('style')}; script-src {allowed('script')}; "
        "base-uri 'none'; form-action 'none'"
    )


def page(trace: Mapping[str, object]) -> str:
    """The page with a trace in it, under its policy."""
    data = json.dumps(trace).replace("<", "\\u003c")  # nothing in it ends the element
    head, _, rest = source().partition("<meta")
    guarded = f'{head}<meta http-equiv="Content-Security-Policy" content="{policy()}">\n<meta{rest}'
    return guarded.replace(_EMPTY, _EMPTY.replace("null", data))
