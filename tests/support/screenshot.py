"""Ask a running gateway through its page and take the picture that the documentation shows.

python -m utils.serving.gateway --backend local &
python -m tests.support.screenshot http://127.0.0.1:8080 docs/images/gateway.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support import chromium
from utils.inference.inference import TEST_DATA, read_test_data

# Small files, as the embedded checkpoint knows them from training.
FILES = {
    "store.py": read_test_data(TEST_DATA)[0]["code"],
    "settings.py": 'TIMEOUT_S = 30\nREGION = "north"\n\n\ndef address(host, port=8080):\n    return f"{host}:{port}"\n',
    "shapes.py": "class Square(Shape):\n    # sides in metres\n    def area(self):\n        return self.side ** 2\n",
}
DONE = "document.querySelector('#status').innerText == 'Done.'"


def take(url: str, path: Path, question: str, chunk_size: int) -> None:
    """Ask about two files, then about three, so that some of the memory comes from the cache; write the PNG file."""
    with tempfile.TemporaryDirectory() as scratch, chromium.running(Path(scratch) / "profile") as browser:
        sources = []
        for name, text in FILES.items():
            sources.append(Path(scratch) / name)
            sources[-1].write_text(text, encoding="utf-8")
        browser.resize(1280, 760)
        browser.open(url + "/")
        browser.wait_for("document.querySelector('#model').value")
        browser.evaluate(f"document.querySelector('#chunk-size').value = {chunk_size}")
        browser.type("#question", question)
        for files in (sources[:2], sources[2:]):
            browser.choose_files("#files", *files)
            browser.wait_for(f"document.querySelector('#spans').innerText.includes('{files[-1].name}')")
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
    parser.add_argument("--question", default="What is the access code?")
    parser.add_argument("--chunk-size", type=int, default=4)
    args = parser.parse_args()
    take(args.url, args.path, args.question, args.chunk_size)
