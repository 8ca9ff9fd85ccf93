"""Fetching data: a file with another sha256 never gets into the folder."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ruler.fetch_data import Source, build_parser, fetch, run
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


def test_the_first_place_that_works(tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = Source("squad.json", ((f"{server}/gone", DIGEST), (f"{server}/here", DIGEST)))
    args = build_parser().parse_args(["--data-dir", str(tmp_path)])
    assert run(args, [source]) == 0
    assert (tmp_path / "squad.json").read_bytes() == CONTENT
    assert run(args, [source]) == 0
    assert "fetched" in capsys.readouterr().out


def test_wrong_content_is_refused(tmp_path: Path, server: str) -> None:
    with pytest.raises(DatasetError, match=rf"gave sha256 {DIGEST[:16]}…, expected 0000"):
        fetch(Source("squad.json", ((f"{server}/here", "0" * 64),)), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "squad.json").write_bytes(b"something else")
    with pytest.raises(DatasetError, match="is another file than RULER's"):
        fetch(Source("squad.json", ((f"{server}/here", DIGEST),)), tmp_path)
