"""The playground: one page without any other source than this server. Knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path

from fastapi.responses import HTMLResponse

_HTML = (Path(__file__).with_name("playground.html")).read_text(encoding="utf-8")


async def playground() -> HTMLResponse:
    return HTMLResponse(_HTML, headers={"Cache-Control": "no-cache"})
