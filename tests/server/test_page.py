"""The page in a headless Chromium: what it shows, by keyboard alone, under its own policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from serving import Running, running

from pydiffgguf.server.page import FILES
from pydiffgguf.server.settings import digest

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)"),
]


def test_the_pages_files_ask_for_nothing_else(server: Running) -> None:
    """No address besides its own files, no script or style within the HTML, no way from text to markup."""
    for path in FILES:
        text = server.client.get(path).text
        assert "http://" not in text and "https://" not in text and "//cdn" not in text, path
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
            assert way not in text, path
    html = server.client.get("/").text
    assert html.count("<script") == 1 and "<style" not in html and " style=" not in html and " onclick=" not in html
    for path in FILES:
        if path.endswith(".js"):
            assert server.client.get(path).headers["content-type"].startswith("text/javascript")


@pytest.fixture(scope="module")
def page(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as one:
        one.size(900, 700)
        yield one


def opened(page: Page, server: Running, tab: str = "chat") -> None:
    page.errors.clear()
    page.requests.clear()
    page.open("about:blank")  # else the same address with another fragment would keep the page
    page.open(f"{server.url}/#{tab}")
    page.until("document.getElementById('model').textContent === 'demo'")


def clean(page: Page, server: Running) -> None:
    """Nothing was complained of, and nobody else was asked."""
    assert page.errors == []
    assert all(url.startswith((server.url, "data:")) for url in page.requests), page.requests


@pytest.mark.slow
class TestInABrowser:
    """Skipped where there is none."""

    pytestmark = in_a_browser

    def test_a_chat_denoises_and_can_be_looked_back_through(self, page: Page, server: Running) -> None:
        """Enter sends; rows appear; the slider shows earlier steps; the text is the answer."""
        opened(page, server)
        page.run("document.querySelector('#ask textarea').value = ''; document.querySelector('#ask textarea').focus()")
        page.write("Which number comes after 3?")
        page.run("document.querySelector('#ask [name=seed]').value = 1")
        page.key("Enter")
        page.until("document.querySelectorAll('.canvas span').length > 2")
        page.until("document.querySelector('.cost').textContent.includes('seed 1')")
        answer = page.run("document.querySelector('.assistant .said').textContent")
        body = {"messages": [{"role": "user", "content": "Which number comes after 3?"}], "seed": 1, "max_tokens": 256}
        assert answer == server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert page.run("document.getElementById('spoken').textContent") == answer
        page.until("document.querySelector('#ask [name=stop]').disabled")  # the focus goes back to the text then
        last = page.run("document.querySelector('.canvas').textContent")
        page.run("document.querySelector('.film input').focus()")
        label = page.run("document.querySelector('.film .quiet').textContent")
        page.key("ArrowLeft")
        assert page.until(f"document.querySelector('.film .quiet').textContent !== '{label}'")
        assert label.startswith("canvas 1, step ") and last.startswith(answer)
        clean(page, server)

    def test_markup_in_text_stays_text(self, page: Page, server: Running) -> None:
        """What is typed, and so what a model may answer, never becomes an element."""
        opened(page, server)
        page.run("document.querySelector('#ask textarea').value = ''; document.querySelector('#ask textarea').focus()")
        page.write("<img src=x onerror=alert(1)><script>alert(2)</script>")
        page.key("Enter")
        page.until("document.querySelector('.cost')?.textContent")
        assert page.run("document.querySelectorAll('#turns img, #turns script').length") == 0
        assert "<img src=x" in page.run("document.querySelector('.user .said').textContent")
        clean(page, server)

    def test_gaps_are_filled_in_turn_with_candidates(self, page: Page, server: Running) -> None:
        """Each is seen between its sides, pinned rows marked; the second knows the first."""
        opened(page, server, "infill")
        page.run("document.querySelector('#fill [name=send]').focus()")
        page.key("Enter")
        page.until("document.querySelectorAll('.pinned').length > 1")
        page.until(
            "document.querySelectorAll('#filled article').length === 2 && "
            "!document.querySelector('#fill [name=send]').disabled"
        )
        gaps = page.run("[...document.querySelectorAll('.gap')].map((gap) => gap.textContent)")
        assert gaps == [" white cup", " the cup"]
        assert page.run("document.querySelectorAll('#filled li').length") >= 2
        clean(page, server)

    def test_typed_reads_show_probabilities(self, page: Page, server: Running) -> None:
        """A table for each question, whose options sum to one."""
        opened(page, server, "reads")
        page.run("document.querySelector('#read [name=send]').focus()")
        page.key("Enter")
        page.until("document.querySelectorAll('#answers table').length === 3")
        sums = page.run(
            "[...document.querySelectorAll('#answers table')].map((table) => "
            "[...table.querySelectorAll('meter')].reduce((sum, meter) => sum + meter.value, 0))"
        )
        assert sums == pytest.approx([1, 1, 1], abs=1e-4)
        clean(page, server)

    def test_stop_ends_the_work_on_the_server(self, page: Page, server: Running) -> None:
        """Escape does it too, by closing the connection."""
        opened(page, server)
        before = server.service.engine.cancelled
        page.run("document.querySelector('#ask [name=max_tokens]').value = 1900")
        page.run("document.querySelector('#ask textarea').value = 'Write a short poem'")
        page.run("document.querySelector('#ask textarea').focus()")
        page.key("Enter")
        page.until("document.querySelector('.film .quiet')?.textContent")
        page.key("Escape")
        page.until("document.querySelector('#ask [name=stop]').disabled")
        assert server.at_rest() and server.service.engine.cancelled == before + 1
        clean(page, server)

    def test_tabs_and_theme_by_keyboard(self, page: Page, server: Running) -> None:
        """Arrows go through the tabs; a button turns dark to light and back."""
        opened(page, server)
        page.run("document.getElementById('tab-chat').focus()")
        for tab in ("infill", "reads", "facts"):
            page.key("ArrowRight")
            assert page.run(f"document.activeElement.id === 'tab-{tab}' && !document.getElementById('{tab}').hidden")
        assert "2048 tokens" in page.run("document.getElementById('facts').textContent")
        page.size(900, 700, dark=True)
        dark = page.run("getComputedStyle(document.body).backgroundColor")
        page.run("document.getElementById('theme').focus()")
        page.key("Enter")
        assert page.run("getComputedStyle(document.body).backgroundColor") != dark
        page.size(900, 700)
        clean(page, server)

    def test_a_key_is_asked_for_and_kept_in_the_tab(self, page: Page) -> None:
        """The page itself is public; what it asks for is not."""
        with running(key_digests=(digest("sesame"),)) as locked:
            page.open(f"{locked.url}/")
            page.until("!document.getElementById('key').hidden")
            page.run("document.querySelector('#key input').focus()")
            page.write("sesame")
            page.key("Enter")
            page.until("document.getElementById('model').textContent === 'demo'")
            assert page.run("document.getElementById('problem').hidden")

    def test_it_waits_for_a_model_that_loads(self, page: Page, tmp_path: Path) -> None:
        """And says so meanwhile."""
        import threading

        from serving import open_demo

        go = threading.Event()

        def slow(told: object) -> object:
            assert go.wait(20)
            return open_demo(lambda part: None)

        with running(slow) as loading:  # type: ignore[arg-type]
            answer = loading.client.get("/health")
            assert answer.status_code == 503 and answer.json()["error"]["message"] == "Loading model"
            assert answer.json()["error"]["progress"] == 0.0 and int(answer.headers["retry-after"]) > 0
            page.open(f"{loading.url}/")
            page.until("document.getElementById('problem').textContent === 'Loading model'")
            go.set()
            page.until("document.getElementById('model').textContent === 'demo'")
            page.until("document.getElementById('problem').hidden")
