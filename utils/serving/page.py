"""The page at `/`: three static files, served to everyone; what they ask the API for needs the API's key."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

_FOLDER = Path(__file__).parent / "page_files"
# Address → file, media type.
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {"Cache-Control": "no-cache"}


def add_page(app: FastAPI) -> None:
    """Serve the page's files."""
    for address, (name, media_type) in PAGE_FILES.items():
        _add_file(app, address, (_FOLDER / name).read_bytes(), media_type)


def _add_file(app: FastAPI, address: str, content: bytes, media_type: str) -> None:
    @app.get(address)
    async def page_file() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)
