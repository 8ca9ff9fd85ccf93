"""Ask a running gateway through its page and take the picture that the documentation shows.

python -m utils.serving.gateway --backend local &
python -m tests.support.screenshot http://127.0.0.1:8080 docs/images/gateway.png
"""

from __future__ import annotations

import argparse
import tempfile
import tracemalloc
from pathlib import Path

from tests.support import chromium

DONE = "document.querySelector('#status').innerText == 'Done.'"


def take(url: str, path: Path, memory: Path, question: str, chunk_size: int, budget: int) -> None:
    """Ask about a file in all three ways, and write the PNG file.

    Args:
        url: Of the gateway.
        path: The picture.
        memory: The file that is asked about.
        question: What is asked, with a name of the file in backticks.
        chunk_size: Encoder tokens per latent.
        budget: Place of the slider that says how much of the memory stays text.
    """
    with tempfile.TemporaryDirectory() as scratch, chromium.running(Path(scratch) / "profile") as browser:
        browser.resize(1280, 1120)
        browser.open(url + "/")
        browser.wait_for("document.querySelector('#model').value")
        browser.evaluate(f"document.querySelector('#chunk-size').value = {chunk_size}")
        browser.evaluate(f"const s = document.querySelector('#budget'); s.value = {budget}; s.oninput()")
        browser.evaluate("document.querySelector('#plain').checked = true")
        browser.type("#question", question)
        browser.choose_files("#files", memory)
        browser.wait_for(f"document.querySelector('#spans').innerText.includes('{memory.name}')")
        browser.click("#send")
        browser.wait_for(f"!({DONE})")
        browser.wait_for(DONE, seconds=300)
        browser.evaluate("document.activeElement.blur()")
        # The memory's panel, scrolled to the lines that hold what the question names.
        name = question.split("`")[1]
        browser.evaluate(
            "(() => { const panel = document.querySelector('#kept pre');"
            f" const line = [...panel.querySelectorAll('mark')].find(mark => mark.innerText.includes('{name}'));"
            " panel.scrollTop = line.getBoundingClientRect().top - panel.getBoundingClientRect().top - 20; })()"
        )
        browser.screenshot(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take the documentation's picture of the gateway's page.")
    parser.add_argument("url")
    parser.add_argument("path", type=Path)
    # A real file of 4,300 tokens that no training saw.
    parser.add_argument("--memory", type=Path, default=Path(tracemalloc.__file__))
    parser.add_argument("--question", default="Which exception does `filter_traces` raise?", help="with a `name` in it")
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--budget", type=int, default=2, help="place of the slider; default 2: a sixteenth")
    args = parser.parse_args()
    take(args.url, args.path, args.memory, args.question, args.chunk_size, args.budget)
