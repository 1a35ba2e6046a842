"""The canvas page at /canvas: a prompt, its canvas step by step, two samplers side by side (docs/canvas.md)."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import HTMLResponse, RedirectResponse, Response

from dllm.decoding.page import policy, source


def add(app: FastAPI) -> None:
    """Serve the page; / leads there. It may ask this server alone, and stand in no other page."""
    headers = {
        "Content-Security-Policy": f"{policy()}; connect-src 'self'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/canvas", response_class=HTMLResponse)
    async def canvas() -> Response:
        """A page that shows how answers come about."""
        return HTMLResponse(source(), headers=headers)

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return RedirectResponse("canvas")
