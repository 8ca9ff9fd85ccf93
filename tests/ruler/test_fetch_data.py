"""Fetching data: a file with another sha256 never gets into the folder."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ruler.fetch_data import fetch
from utils.errors import DatasetError

CONTENT = b'{"data": []}'
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/gone" else 200)
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_the_first_place_that_works(tmp_path: Path, server: str) -> None:
    target, places = tmp_path / "squad.json", [(f"{server}/gone", DIGEST), (f"{server}/here", DIGEST)]
    assert fetch(target, places)
    assert target.read_bytes() == CONTENT
    assert not fetch(target, places)  # there already


def test_wrong_content_is_refused(tmp_path: Path, server: str) -> None:
    target, places = tmp_path / "squad.json", [(f"{server}/here", "0" * 64)]
    with pytest.raises(DatasetError, match=rf"sha256 {DIGEST[:16]}…, expected 0000"):
        fetch(target, places)
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"something else")
    with pytest.raises(DatasetError, match="is another file than RULER's"):
        fetch(target, places)
