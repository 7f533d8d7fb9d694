"""The simulator's chat page, in a real browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
import requests

from conftest import poll
from simulator import PACE, actor, lifeline, running

CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture
def browser(tmp_path):
    """Debian's Chromium, driven by Selenium; where it is missing, only CI fails."""
    lacking = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        lacking("needs the packages chromium and chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        lacking("needs pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in [*CHROMIUM.split(), "--lang=en", f"--user-data-dir={tmp_path}/user"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(paths[1], popen_kw={"start_new_session": True})
    driver = webdriver.Chrome(options, service)
    with lifeline(service.process):
        yield driver
        driver.quit()


class Page:
    """The chat page, as its user sees it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.set_window_size(1280, 800)
        browser.get(url)
        poll(lambda: self.all("#chats button"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def click(self, selector):
        self.all(selector)[0].click()

    def text(self, selector):
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return self.browser.execute_script(script, selector)

    def write(self, text):
        self.all("#text")[0].send_keys(f"{text}\n")

    def answers(self):
        """Return the texts of the answers that are complete."""
        return [item.text for item in self.all("#log li:not(.mine, .open) .bubble")]


@pytest.mark.slow
def test_a_chat_in_a_browser(browser):
    with running(REPLY_MODE="custom", BOT_LANGUAGE="en") as (sim, bot):
        sim.ai_answer, sim.ai_pace = actor, PACE
        page = Page(browser, sim.url)

        # The answer grows, and its Markdown is shown, but never run.
        page.write("Show me some Markdown")
        lengths = set()
        poll(lambda: lengths.add(len(page.text(".open .bubble"))) or page.answers())
        assert len(lengths) > 2
        [answer] = page.answers()
        assert "<script>alert('only text')</script>" in answer and "**" not in answer
        for selector in ("b", "i", "code", "pre", "td", "a[href^='https://']"):
            assert page.all(f"#log .bubble {selector}"), selector
        assert not page.all("#log script")
        assert "✓" in page.text("#log .mine .mark")

        # The panel shows the calls, and what a second delivery brings: nothing.
        page.click("#toggle")
        asked_before = len(sim.ai_requests)
        page.click("[data-do=redelivered]")
        poll(lambda: "no second answer came" in page.text("#verdict"))
        assert 'HTTP 200 {"ActionStatus":"OK"' in page.text("#verdict")
        assert (len(page.answers()), len(sim.ai_requests)) == (1, asked_before)
        if picture := os.environ.get("PICTURE"):
            asked = {"format": "webp", "quality": 85}
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", asked)
            Path(picture).write_bytes(base64.b64decode(shot["data"]))
        page.click("[data-do=forged]")
        poll(lambda: "Forged: HTTP 403" in page.text("#verdict"))
        assert "bot → IM sendmsg" in page.text("#calls")
        assert "&usersig=•••&" in page.text("#calls")
        page.click("#close")

        # The stop button sends what TUIKit's sends.
        page.write("A long answer, please")
        poll(lambda: len(page.text(".open .bubble")) > 20)
        page.click("#stop")
        poll(lambda: len(page.answers()) == 2)
        assert page.answers()[1].endswith("(stopped)")
        [element] = sim.said[-1]["MsgBody"]
        button = {"chatbotPlugin": 2, "src": 22, "msgKey": sim.delivered[-1].key}
        assert json.loads(element["MsgContent"]["Data"]) == button

        # In a group the robot answers when it is mentioned, and only then.
        page.click("[data-to^='@TGS']")
        page.write("hello")
        poll(lambda: "@jared You said: jared: hello" in "".join(page.answers()))
        page.all("#text")[0].clear()
        page.write("without a mention")
        poll(lambda: "no robot is mentioned" in page.text("#log li:last-child"))
        assert [log for log in browser.get_log("browser")] == []


def test_another_sites_page_cannot_drive_the_stand_in(sim):
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        for path in ("/", "/page"):
            assert requests.get(sim.url + path, headers=headers).status_code == 403
        for path in ("/page", "/v4/openim/sendmsg", "/v1/chat/completions"):
            answer = requests.post(sim.url + path, headers=headers, data="{}")
            assert answer.status_code in (401, 403) or answer.json()["ErrorCode"]
    assert not sim.calls
    page = requests.get(sim.url, headers={"Origin": sim.url})
    assert page.status_code == 200
    assert "unsafe" not in page.headers["Content-Security-Policy"]
