"""A report as one HTML file that opens without a network: Markdown with tables, its pictures inside.

write_html("# Scores\n\n![by length](score.png)\n", Path("out"), Path("out/report.html"))
"""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

from utils.errors import DatasetError
from utils.files import write_text

_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_PICTURE = re.compile(r'(?<=<img src=")[^":]+(?=")')
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
table { display: block; overflow-x: auto; }
th, td { border: 1px solid #d0d0d0; padding: 0.25rem 0.6rem; white-space: nowrap; }
th { background: #f3f3f3; }
img { max-width: 100%; }
blockquote { border-left: 4px solid #e69f00; margin-left: 0; padding-left: 1rem; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #e6e6e6; }
  th { background: #2a2a2a; }
  th, td { border-color: #444; }
  img { background: #fff; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def write_html(markdown: str, folder: Path, path: Path) -> None:
    """Write a Markdown text as a page of its own.

    Args:
        markdown: The text; its first heading is the page's title. HTML in it is shown, not obeyed.
        folder: Where its pictures are (PNG files, named relative to it).
        path: The HTML file.

    Raises:
        DatasetError: A picture is missing.
    """
    title = _TITLE.search(markdown)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = _PICTURE.sub(lambda match: _data_uri(folder / html.unescape(match[0])), body)
    write_text(path, _PAGE.format(title=html.escape(title[1] if title else path.stem), style=_STYLE, body=body))


def _data_uri(picture: Path) -> str:
    try:
        data = picture.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{picture}: the report shows this picture, which cannot be read: {error.strerror}"
        ) from None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
