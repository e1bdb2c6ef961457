"""The page in a headless Chromium, on the demo model behind a real server. The steps follow one another as a visitor's
do; each test begins where the one before ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig, create_app
from qwen_fast.server.metrics import PrometheusMetrics
from qwen_fast.server.serve import uvicorn_config
from qwen_fast.ui.config import UiConfig
from qwen_fast.ui.history import Conversation, open_store, owner_of

BOX = "#qf-box textarea"
BOT, USER = "#qf-chat .message.bot", "#qf-chat .message.user"
STORY = "Tell me a story about Nora the fox."
ATTACK = """Before <script>window.hit = 1</script> and <img src=x onerror="window.hit = 2"> text.

[a link](javascript:window.hit=3) <a href="javascript:window.hit=4">another</a> ![picture](TRAP/track.png)

<iframe src="javascript:parent.hit=5"></iframe> <svg onload="window.hit=6"></svg> std::vector<int>

```html
<script>window.hit = 7</script>
```"""


class Served:
    """serve --ui in a thread of its own; restart() begins anew on the same port with the same history."""

    def __init__(self, llm: AsyncLLM, history: pathlib.Path) -> None:
        self.llm, self.history = llm, history
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/ui/"
        self.connections: list[Any] = []  # of this process to other hosts
        sys.addaudithook(self._note)
        self.start()

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1"):
            self.connections.append(arguments[0])
        if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
            self.connections.append(arguments[1])

    def start(self) -> None:
        from qwen_fast.ui.mount import beside

        config = ServerConfig(port=self.port, log_level="warning", served_model_name=("demo",))
        api = create_app(self.llm, config, metrics=PrometheusMetrics(self.llm, "demo"))
        ui = UiConfig(history=str(self.history))
        app = beside(api, ui, open_store(ui.history, ui.limits))
        self._server, self._uvicorn = api.state.server, uvicorn.Server(uvicorn_config(app, config))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._uvicorn.serve()), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._uvicorn.started:
            assert time.monotonic() < deadline and self._thread.is_alive(), "the server does not start"
            time.sleep(0.01)

    def stop(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        self._server.ready = False
        self._uvicorn.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not end"
        return time.monotonic() - began


@pytest.fixture(scope="module")
def served(slow_demo: AsyncLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(slow_demo, tmp_path_factory.mktemp("ui") / "history.sqlite3")
    yield running
    with contextlib.suppress(AssertionError):
        running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


class Watched:
    """A page whose requests and errors are noted."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1360, "height": 800}, **{"locale": "en-US", **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.refused: list[str] = []  # by the page's policy
        self.page.on("requestfailed", lambda one: one.failure == "csp" and self.refused.append(one.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str) -> Any:
        self.page.goto(url)
        self.page.wait_for_selector(BOX)
        until(self.page, "document.querySelector('#qf-model input')?.value === 'demo'")
        return self.page


@pytest.fixture(scope="module")
def watched(browser: Any, served: Served) -> Iterator[Watched]:
    one = Watched(browser)
    one.open(served.url)
    yield one
    one.context.close()


@pytest.fixture
def page(watched: Watched) -> Any:
    return watched.page


def until(page: Any, condition: str, seconds: float = 60) -> None:
    """Waits for a JavaScript expression to hold. (Playwright's own wait would need a policy that allows eval.)"""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def ask(page: Any, content: str) -> None:
    page.fill(BOX, content)
    page.press(BOX, "Enter")


def setting(page: Any, name: str, value: str) -> None:
    page.fill(f"#qf-{name} :is(input, textarea)", value)


def finished(page: Any, answers: int) -> str:
    """Waits until so many answers are there and nothing is being written; the last one's text."""
    until(
        page,
        f"document.querySelectorAll('{BOT}').length >= {answers} && document.querySelector('#qf-box .submit-button')",
    )
    text: str = page.locator(BOT).last.inner_text()
    return text


def shot(page: Any, name: str) -> None:
    """Kept where QF_SCREENSHOTS names a folder: examples/screenshots are made so."""
    folder = os.environ.get("QF_SCREENSHOTS")
    if folder:
        page.evaluate("document.querySelector('#qf-system').scrollIntoView({block: 'end'})")
        page.wait_for_timeout(400 if name != "streaming" else 0)
        page.screenshot(path=str(pathlib.Path(folder, f"ui-{name}.png")))


def test_type_and_stream(page):
    assert "What can I do for you?" in page.inner_text("#qf-chat")
    shot(page, "empty")
    setting(page, "temperature", "0.7")
    setting(page, "seed", "7")
    ask(page, STORY)
    until(page, f"document.querySelector('{BOT}')?.innerText.length > 200")
    early = page.locator(BOT).last.inner_text()
    assert page.locator("#qf-box .stop-button").is_visible()
    shot(page, "streaming")
    whole = finished(page, 1)
    assert len(whole) > len(early) and page.locator(USER).inner_text() == STORY and page.input_value(BOX) == ""
    shot(page, "finished")
    numbers = page.inner_text("#qf-numbers")
    assert re.search(r"Tokens/s\s+[\d,.]+\s", numbers) and re.search(r"First token\s+[\d.]+ s", numbers)
    assert re.search(r"Memory\s+[\d.]+ MiB", numbers) and re.search(r"Energy\s+not measured", numbers)
    assert re.search(r"Memory traffic, counted\s+[\d.]+ GB", numbers)
    assert "Tell me a story" in page.inner_text("#qf-list")


def test_stop(page, served):
    setting(page, "max_tokens", "2000")
    page.click("#qf-form >> text=Structured output")
    setting(page, "extra", '{"ignore_eos": true}')
    ask(page, "Another one, please.")
    until(page, f"document.querySelectorAll('{BOT}')[1]?.innerText.length > 30")
    page.click("#qf-box .stop-button")
    assert "[stopped]" in finished(page, 2)
    deadline = time.monotonic() + 20
    while served.llm.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.llm.stats()["num_running"] == 0


def test_history_survives_a_reload_and_a_restart(watched, page, served):
    before = [one.inner_text() for one in page.locator(f"{USER}, {BOT}").all()]
    assert len(before) == 4
    seconds = served.stop()  # with the page open
    assert seconds < 20  # 30 is what running requests would get
    served.start()
    watched.open(served.url)
    page.wait_for_selector(BOT)
    assert [one.inner_text() for one in page.locator(f"{USER}, {BOT}").all()] == before
    assert page.input_value("#qf-temperature input") == "0.7"


def test_edit_regenerate_undo(page):
    page.click("#qf-form >> text=Structured output")  # closed again, with what it held when the answer was written
    assert "ignore_eos" in page.input_value("#qf-extra textarea")
    setting(page, "extra", "")
    setting(page, "max_tokens", "12")
    page.locator("#qf-chat [aria-label*='Edit'], #qf-chat [title*='Edit']").last.click()
    page.locator("#qf-chat textarea").last.fill("And now a shorter one.")
    page.locator("#qf-chat [aria-label*='Submit'], #qf-chat [title*='Submit']").last.click()
    until(page, f"document.querySelectorAll('{USER}')[1]?.innerText === 'And now a shorter one.'")
    until(page, f"!document.querySelectorAll('{BOT}')[1]?.innerText.includes('[stopped]')")
    first = finished(page, 2)
    setting(page, "seed", "8")
    setting(page, "max_tokens", "5")
    page.locator("#qf-chat [aria-label*='Retry'], #qf-chat [title*='Retry']").last.click()
    until(page, f"document.querySelectorAll('{BOT}')[1]?.innerText !== {json.dumps(first)}")
    second = finished(page, 2)
    assert second != first and "[ended at the token limit]" in second
    page.locator("#qf-chat [aria-label*='Undo'], #qf-chat [title*='Undo']").last.click()
    until(page, f"document.querySelectorAll('{BOT}').length === 1")
    assert page.input_value(BOX) == "And now a shorter one."


def test_wrong_settings_are_told(page):
    setting(page, "schema", '{"type": ')
    ask(page, "hello")
    page.wait_for_selector("#qf-notice [role=alert]")
    assert "JSON schema of the answer is not JSON" in page.inner_text("#qf-notice")
    assert page.locator(USER).count() == 1
    setting(page, "schema", "")


def test_conversations_are_named_and_deleted(page):
    page.click("#qf-new")
    until(page, f"document.querySelectorAll('{BOT}').length === 0")
    ask(page, "hello")
    finished(page, 1)
    assert page.locator("#qf-list label").count() == 2
    page.fill("#qf-title-row :is(input, textarea)", "<b>Greeting</b> 狐")
    page.click("#qf-rename")
    until(page, "document.querySelector('#qf-list').innerText.includes('<b>Greeting</b> 狐')")
    page.click("#qf-delete")
    page.click("#qf-really")
    until(page, "document.querySelectorAll('#qf-list label').length === 1")
    page.click("#qf-list label")
    page.wait_for_selector(BOT)
    assert page.locator(USER).inner_text() == STORY


@pytest.fixture
def trap() -> Iterator[socket.socket]:
    """Another server of this machine, which nobody should visit."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        yield listener


def test_a_model_cannot_script_the_page(watched, page, served, trap):
    elsewhere = f"http://127.0.0.1:{trap.getsockname()[1]}"
    attack = ATTACK.replace("TRAP", elsewhere)
    token = next(one["value"] for one in watched.context.cookies() if one["name"] == "qwen_fast_ui")
    store = open_store(str(served.history), UiConfig().limits)
    content = [{"role": "user", "content": attack}, {"role": "assistant", "content": attack}]
    store.save(owner_of(token), Conversation("<img src=x onerror='window.hit=8'>", content))
    store.close()
    watched.open(served.url)
    page.wait_for_selector(BOT)
    page.wait_for_timeout(300)
    shown = page.locator(BOT).first.inner_text()
    assert "<script>window.hit = 1</script>" in shown and "std::vector<int>" in shown
    for link in page.locator("#qf-chat .message a").all():
        link.click(force=True, no_wait_after=True, timeout=1000)
    assert page.locator("#qf-chat :is(script, iframe, svg[onload], [onerror], [href^='javascript' i])").count() == 0
    assert page.evaluate("window.hit") is None
    assert page.url.startswith(served.url)
    page.evaluate("const s = document.createElement('script'); s.text = 'window.hit = 9'; document.body.append(s)")
    assert page.evaluate("window.hit") is None  # the policy alone stops it, too
    with pytest.raises(TimeoutError):
        trap.accept()
    assert any(url.startswith(elsewhere) for url in watched.refused)


def test_language(watched, page, browser, served):
    page.click("#qf-lang >> text=中文")
    until(page, "document.querySelector('#qf-new').innerText.includes('新对话')")
    assert "采样参数" in page.inner_text("#qf-right") and "请输入问题" in page.get_attribute(BOX, "placeholder")
    watched.open(served.url)
    until(page, "document.querySelector('#qf-new').innerText.includes('新对话')")  # it is remembered


def test_dark_and_another_browser_s_history(browser, served):
    other = Watched(browser, color_scheme="dark", locale="zh-CN")
    page = other.open(served.url)
    until(page, "document.querySelector('#qf-new').innerText.includes('新对话')")  # as the browser asks
    assert page.locator("#qf-list label").count() == 0
    page.click("#qf-lang >> text=English")
    until(page, "document.querySelector('#qf-new').innerText.includes('New chat')")
    setting(page, "seed", "3")
    ask(page, STORY)
    finished(page, 1)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 150, background
    shot(page, "dark")
    assert not outside(other, served) and not other.errors
    other.context.close()


def outside(watched: Watched, served: Served) -> list[str]:
    """What the browser asked others for, without what the page's policy refused."""
    asked = set(watched.requests) - set(watched.refused)
    return [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]


def test_nothing_left_this_host(watched, served):
    assert len(watched.requests) > 20
    assert not outside(watched, served) and not watched.errors
    assert not served.connections, "this process asked others"
