"""Ask a running gateway through its page and take the picture that the documentation shows.

python -m utils.serving.gateway --backend local &
python -m tests.support.screenshot http://127.0.0.1:8080 docs/images/gateway.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support import chromium
from utils.files import PROJECT_ROOT

FILES = ("utils/model/splice.py", "utils/errors.py", "utils/serving/upstream.py")
DONE = "document.querySelector('#status').innerText == 'Done.'"


def take(url: str, path: Path, question: str, chunk_size: int) -> None:
    """Ask about two files, then about three, so that some of the memory comes from the cache; write the PNG file."""
    with tempfile.TemporaryDirectory() as profile, chromium.running(Path(profile)) as browser:
        browser.resize(1280, 760)
        browser.open(url + "/")
        browser.wait_for("document.querySelector('#model').value")
        browser.evaluate(f"document.querySelector('#chunk-size').value = {chunk_size}")
        browser.type("#question", question)
        for files in (FILES[:2], FILES[2:]):
            browser.choose_files("#files", *(PROJECT_ROOT / file for file in files))
            browser.wait_for(f"document.querySelector('#spans').innerText.includes('{Path(files[-1]).name}')")
            browser.click("#send")
            browser.wait_for(f"!({DONE})")
            browser.wait_for(DONE, seconds=300)
            browser.evaluate("document.querySelector('#plain').checked = true")
        browser.evaluate("document.activeElement.blur()")
        browser.screenshot(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take the documentation's picture of the gateway's page.")
    parser.add_argument("url")
    parser.add_argument("path", type=Path)
    parser.add_argument("--question", default="What does this code do? Answer in one sentence.")
    parser.add_argument("--chunk-size", type=int, default=8)
    args = parser.parse_args()
    take(args.url, args.path, args.question, args.chunk_size)
