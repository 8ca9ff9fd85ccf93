"""Reports as single HTML files."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from utils.errors import DatasetError
from utils.html_report import write_html

TEXT = "# A < B\n\n![the curve](curve.png)\n\n| arm | score |\n|---|---|\n| full | 0.8 |\n\n<script>alert(1)</script>\n"


def test_a_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"picture")
    write_html(TEXT, tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>A &lt; B</title>" in page
    assert f'src="data:image/png;base64,{base64.b64encode(b"picture").decode()}"' in page
    assert "<td>full</td>" in page
    # Names of models and tasks stand in reports: they are text.
    assert "<script>" not in page
    assert "http" not in page


def test_a_picture_that_is_missing_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"curve\.png"):
        write_html(TEXT, tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
