"""The page at `/` in a headless Chromium, in front of the local backend on a tiny checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import chromium, fake_server, gateway_server, local_gateway
from tests.support.prompts import CODE
from utils.compress.compressor import Compressor
from utils.serving.admission import PAGE_FILES
from utils.serving.selected_text import TextSelector

DONE = "document.querySelector('#status').innerText == 'Done.'"
KEY = "front door"


@pytest.fixture(scope="module")
def url(compressor: Compressor) -> Iterator[str]:
    with local_gateway.running(compressor, api_keys=(KEY,)) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.running(tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_the_page_needs_no_key_and_nothing_from_elsewhere(url: str) -> None:
    for path, (_, kind) in PAGE_FILES.items():
        got = httpx.get(url + path)
        assert got.status_code == 200
        assert got.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in got.headers["content-security-policy"]
        assert "://" not in got.text
    assert httpx.get(url + "/v1/compression").status_code == 401


@pytest.mark.slow
def test_ask_about_pasted_text_and_a_file(browser: chromium.Browser, url: str, tmp_path: Path) -> None:
    file = tmp_path / "volume.py"
    file.write_text("def volume(w, h, d):\n    return w * h * d  # é\n", encoding="utf-8")
    browser.open(url + "/")
    browser.wait_for("document.querySelector('#server').innerText.startsWith('401')")
    browser.type("#key", KEY)
    browser.evaluate("document.querySelector('#key').dispatchEvent(new Event('change'))")
    browser.wait_for("document.querySelector('#server').innerText.includes('lclm')")
    browser.complaints.clear()  # the 401 was wanted
    browser.type("#paste", CODE)
    browser.click("#add")
    browser.choose_files("#files", file)
    browser.wait_for("document.querySelectorAll('#spans li').length == 2")
    browser.type("#question", "Which is longer?")
    browser.evaluate("document.querySelector('#max-tokens').value = 12")
    browser.click("#plain")
    for cached in ("0 %", "100 %"):
        browser.click("#send")
        browser.wait_for(DONE)
        tokens = [len(CODE.encode()), file.stat().st_size]
        latents = [-(-number // 4) for number in tokens]
        assert browser.text("#total-latents").startswith(f"{sum(tokens)} → {sum(latents)}")
        assert browser.text("#total-saved").split()[0] == str(sum(tokens) - sum(latents))
        assert cached in browser.text("#total-cached")
        rows = browser.evaluate("[...document.querySelectorAll('#span-table tbody tr')].map(x => x.innerText)")
        assert ["pasted text 1" in rows[0], "volume.py" in rows[1]] == [True, True]
        assert f"{tokens[1]} → {latents[1]}" in rows[1]
        for article in ("#compressed", "#expanded", "#plain-text"):
            assert browser.text(f"{article} .answer").strip()
            assert "first token after" in browser.text(f"{article} .figures")
            assert "12 new tokens" in browser.text(f"{article} .figures")
        assert "plain text" in browser.text("#total-first")
        browser.evaluate("document.querySelector('#status').textContent = ''")
    assert browser.complaints == []


@pytest.mark.slow
def test_three_answers_and_the_text_that_was_kept(browser: chromium.Browser, url: str, tmp_path: Path) -> None:
    lines = ["red = 1  # 🎈\n", "green = 2  # 🎈🎈 é\n", "blue = 3  # 🎈\n"]
    file = tmp_path / "colours.py"
    file.write_text("".join(lines), encoding="utf-8")
    tokens = file.stat().st_size
    browser.open(url + "/")
    browser.type("#key", KEY)
    browser.evaluate("document.querySelector('#key').dispatchEvent(new Event('change'))")
    browser.wait_for("document.querySelector('#server').innerText.includes('lclm')")
    browser.complaints.clear()  # the 401 before the key was wanted
    browser.choose_files("#files", file)
    browser.wait_for("document.querySelectorAll('#spans li').length == 1")
    browser.type("#question", "What is green?")
    browser.evaluate("document.querySelector('#max-tokens').value = 4")
    browser.click("#plain")
    kept = "[...document.querySelectorAll('#kept-spans mark')].map(x => x.textContent)"
    # From 1/8, which is less than a line, to 1/2; and to all of it; and to nothing.
    for key, shown, marked in (
        ("", "1/8", []),
        ("ArrowRight " * 2, "1/2", [lines[1]]),
        ("End", "all", ["".join(lines)]),
        ("Home", "nothing", None),
    ):
        for name in key.split():
            browser.press("#budget", name)
        assert browser.text("#budget-shown") == shown
        assert browser.evaluate("document.querySelector('#budget').getAttribute('aria-valuetext')") == shown
        browser.click("#send")
        browser.wait_for(DONE)
        assert browser.evaluate("document.querySelector('#expanded').hidden") is (marked is None)
        if marked is not None:
            assert browser.evaluate(kept) == marked
            assert browser.evaluate("document.querySelector('#kept-spans pre').textContent") == "".join(lines)
            rows = len("".join(marked).encode())
            assert f"{rows} of text" in browser.text("#expanded .rows") or rows == 0
        assert f"{-(-tokens // 4)} latents" in browser.text("#compressed .rows")
        assert f"{tokens} of text), ratio 1.0×" in browser.text("#plain-text .rows")
        browser.evaluate("document.querySelector('#status').textContent = ''")
    assert browser.complaints == []


@pytest.mark.slow
def test_in_front_of_a_server_that_reads_text(browser: chromium.Browser, checkpoints: dict[str, Path]) -> None:
    selector = TextSelector.load(checkpoints["lclm"])
    with fake_server.running() as backend, gateway_server.running(selector, backend.url) as url:
        browser.open(url + "/")
        browser.wait_for("document.querySelector('#model').value == 'tiny'")
        browser.complaints.clear()
        assert browser.evaluate("document.querySelector('#chunk-size-field').hidden")
        browser.press("#budget", "Home")
        assert browser.text("#budget-shown") == "1/32"
        browser.press("#budget", "End")
        browser.press("#budget", "ArrowLeft")
        browser.type("#paste", "red = 1  # one of the colours\ngreen = 2\n")
        browser.type("#question", "What is green?")
        browser.click("#send")
        browser.wait_for(DONE)
        assert browser.evaluate("document.querySelector('#compressed').hidden")
        assert browser.text("#expanded .answer") == "fine"
        assert browser.text("#kept-spans mark").strip() == "green = 2"
        assert browser.complaints == []


@pytest.mark.slow
def test_answers_stream_and_errors_are_shown(browser: chromium.Browser, compressor: Compressor) -> None:
    shown = "document.querySelector('#compressed .answer').innerText"
    goes_on = threading.Event()

    def break_off(handler: fake_server.Handler) -> None:
        assert goes_on.wait(60)
        handler.reset()

    with fake_server.running() as backend, gateway_server.running(compressor, backend.url) as url:
        backend.script = [fake_server.stream("one ", "<b>", then=break_off)]
        browser.open(url + "/")
        browser.wait_for("document.querySelector('#model').value == 'tiny'")
        browser.type("#question", "What?")
        browser.click("#send")
        browser.wait_for(f"{shown} == 'one <b>'")  # while the stream is open
        goes_on.set()
        browser.wait_for("document.querySelector('#status').classList.contains('bad')")
        assert browser.text("#compressed .answer") == "one <b>"
        assert "dropped the connection" in browser.text("#status")
        backend.script = [fake_server.refuse(400, {"error": {"message": "too long"}})]
        browser.click("#send")
        browser.wait_for("document.querySelector('#status').innerText == '400: too long'")
        browser.type("#paste", "a <|memory|> b")
        browser.click("#send")
        browser.wait_for("document.querySelector('#status').innerText.includes('literal <|memory|>')")


@pytest.mark.slow
def test_narrow_screens_need_no_sideways_scrolling_and_fields_have_names(browser: chromium.Browser, url: str) -> None:
    browser.open(url + "/")
    browser.evaluate("document.querySelectorAll('#results [hidden]').forEach(x => x.hidden = false)")
    for width in (360, 800, 1280):
        browser.resize(width, 800)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(x => !x.labels.length).map(x => x.id)"
    assert browser.evaluate(unnamed) == []
