"""The simulator's chat page, in a real browser."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import lack, poll

from imbot.tencent.rest import Client
from simulator import PACE, actor, lifeline, running
from simulator.botlog import warnings_told
from simulator.messages import name_of, text_body
from usersig import gen_user_sig

pytestmark = pytest.mark.slow
TAB = "\ue004"  # the key, as WebDriver names it
CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture
def browser(tmp_path):
    """Debian's Chromium, driven by Selenium; where it is missing, only CI fails."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        lack("needs the packages chromium and chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        lack("needs pip install selenium")
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

    def __init__(self, browser, url, width=1280):
        self.browser = browser
        self.resize(width)
        browser.get(url)
        poll(lambda: self.all("#chats button"))

    def resize(self, width, height=800):
        """Have a page of this size; a window has at least 500 pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        asked = size | {"mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", asked)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def click(self, selector):
        self.all(selector)[0].click()

    def text(self, selector):
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return self.browser.execute_script(script, selector)

    def write(self, text):
        self.all("#text")[0].send_keys(f"{text}\n")

    def draft(self):
        return self.all("#text")[0].get_attribute("value")

    def choose(self, choice, value):
        self.click(f"#{choice} [value='{value}']")

    def answers(self):
        """Return the texts of the answers that are complete."""
        return [item.text for item in self.all("#log li:not(.mine, .open) .bubble")]


@pytest.fixture
def stage(browser):
    """A page, its stand-in and its bot, whose warnings are shown."""
    with running(REPLY_MODE="custom", BOT_LANGUAGE="en") as (sim, bot):
        with warnings_told(bot.log, sim.warn):
            sim.ai_answer, sim.ai_pace = actor, PACE
            yield SimpleNamespace(page=Page(browser, sim.url), sim=sim, bot=bot)
    assert [line for line in browser.get_log("browser")] == []


def test_a_chat_in_a_browser(stage, browser):
    page, sim = stage.page, stage.sim

    # What to try is said; the panel with the calls is open on a wide screen.
    assert "press one of the suggestions" in page.text("#log .empty")
    assert page.all("#panel")[0].is_displayed()

    # The answer grows, and its Markdown is shown, but never run.
    page.click("[data-say^='Show me']")
    lengths = set()
    poll(lambda: lengths.add(len(page.text(".open .bubble"))) or page.answers())
    assert len(lengths) > 2
    [answer] = page.answers()
    assert "<script>alert('only text')</script>" in answer and "**" not in answer
    for selector in ("b", "i", "code", "pre", "td", "a[href^='https://']"):
        assert page.all(f"#log .bubble {selector}"), selector
    assert not page.all("#log script")
    assert "delivered" in page.text("#log .mine .mark")

    # The panel shows the calls, and what a second delivery brings: nothing.
    asked_before = len(sim.ai_requests)
    page.click("[data-do=redelivered]")
    poll(lambda: "no second answer came" in page.text("#verdict"))
    assert 'HTTP 200 {"ActionStatus":"OK"' in page.text("#verdict")
    assert (len(page.answers()), len(sim.ai_requests)) == (1, asked_before)
    assert "bot → IM sendmsg" in page.text("#calls")
    assert "&usersig=•••&" in page.text("#calls")
    if picture := os.environ.get("PICTURE"):
        page.resize(1280, 920)
        asked = {"format": "webp", "quality": 60}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", asked)
        Path(picture).write_bytes(base64.b64decode(shot["data"]))

    # The stop button sends what TUIKit's sends.
    page.write("A long answer, please")
    poll(lambda: len(page.text(".open .bubble")) > 20)
    page.click("#stop")
    poll(lambda: len(page.answers()) == 2)
    assert page.answers()[1].endswith("(stopped)")
    [element] = sim.said[-1]["MsgBody"]
    button = {"chatbotPlugin": 2, "src": 22, "msgKey": sim.delivered[1].key}
    assert json.loads(element["MsgContent"]["Data"]) == button

    # The page and the stand-in's answers can be Chinese.
    page.click("[data-do=language]")
    page.click("[data-say='你好！']")
    poll(lambda: page.answers()[2:] == ["你说：你好！（这段对话的第 3 个问题）"])


def test_the_panel_tells_what_went_wrong_and_nothing_that_did_not_happen(stage):
    page = stage.page

    # An AI call is there while it runs, and its failures say why.
    page.choose("ai", "slow")
    page.write("one")
    poll(lambda: "AI completions" in page.text("#calls"))
    assert page.text("#calls .runs").startswith("runs")
    poll(page.answers)
    poll(lambda: not page.all("#calls .runs"))
    page.choose("ai", "fail")
    page.write("two")
    poll(lambda: len(page.answers()) == 2)
    poll(lambda: "HTTP 500" in page.text("#log .mine .bad"))
    assert "a failure that was asked for" in page.text("#calls .bad + p, #calls p.bad")

    # What Tencent refuses for good has its code and meaning, and the message failed.
    page.choose("ai", "")
    page.choose("im", "refuse")
    page.write("three")
    poll(lambda: "failed" in page.text("#log li:last-child .mark"))
    assert "80001" in page.text("#calls span.bad")
    assert "sensitive-word filter" in page.text("#calls p.bad")
    page.choose("im", "")

    # A forgery is refused: nobody claims that a second answer did not come.
    page.click("[data-do=forged]")
    poll(lambda: "Forged: HTTP 403" in page.text("#verdict"))
    poll(lambda: "callback refused with 403" in page.text("#others"))
    assert "second answer" not in page.text("#verdict")

    # A tap on another message, or on its answer, shows its calls.
    page.all("#log .mine .bubble")[0].click()
    assert page.text("#which") == "one"
    assert "HTTP 500" not in page.text("#calls")
    page.all("#log li:not(.mine) .bubble")[1].click()
    assert page.text("#calls").count("HTTP 500") >= 3


def test_what_is_written_while_the_bot_is_down_is_found_later(stage):
    page, bot = stage.page, stage.bot
    page.write("one")
    poll(page.answers)
    page.choose("bot", "down")
    poll(lambda: not bot.alive())
    down_at = time.monotonic()
    page.write("two")
    poll(lambda: "could not reach the bot" in page.text("#log li:last-child .mark"))
    assert not page.all("#calls li")
    poll(lambda: time.monotonic() > down_at + 3)  # sooner, it has missed nothing
    page.choose("bot", "")
    poll(lambda: len(page.answers()) == 2)
    assert "found it later" in page.text("#log .mine:nth-last-child(2) .mark")
    assert "bot → IM admin_getroammsg" in page.text("#others")
    assert "bot → AI completions" in page.text("#calls")


def test_writing_in_a_group_and_replying_to_a_message(stage):
    sim = stage.sim
    sim.robots["@RBT#002"] = "Dr. No"  # a persona's nick
    page = Page(stage.page.browser, sim.url)

    # A draft survives a change of chat, and the box grows with it.
    box = page.all("#text")[0]
    low = box.size["height"]
    box.send_keys("first line")
    page.browser.execute_script("arguments[0].value += '\\nsecond\\nthird'", box)
    box.send_keys("!")
    assert box.size["height"] > low + 20
    page.click("[data-to^='@TGS']")
    assert (page.draft(), box.size["height"]) == ("@Robot ", low)
    page.click("[data-to='@RBT#001']")
    assert page.draft() == "first line\nsecond\nthird!"

    # In a group a robot answers when it is mentioned, in small letters too.
    page.click("[data-to^='@TGS']")
    box.clear()
    box.send_keys("so, @DR")
    poll(lambda: page.text("#tips") == "@Dr. No")
    box.send_keys(f"{TAB}hello")
    assert page.draft() == "so, @Dr. No hello"
    box.send_keys("\n")
    poll(lambda: "@jared You said: jared: so, hello" in "".join(page.answers()))
    assert sim.delivered[-1].robot == "@RBT#002"
    box.clear()
    page.write("@ROBOT hello")
    poll(lambda: len(page.answers()) == 2 and sim.delivered[-1].robot == "@RBT#001")
    box.clear()
    page.write("without a mention")
    poll(lambda: "no robot is mentioned" in page.text("#log li:last-child"))

    # A message that is replied to goes along, as TUIKit sends it.
    page.all("#log li:not(.mine) .bubble")[0].click()
    page.click("[data-do=reply]")
    assert page.text("#quoted").startswith("Dr. No: @jared You said")
    page.write("@Robot what is that?")
    poll(lambda: "You said" in page.text("#log .mine:nth-last-child(2) blockquote"))
    reply = json.loads(sim.said[-1]["CloudCustomData"])["messageReply"]
    assert reply["messageSender"] == "@RBT#002"
    assert reply["messageAbstract"].startswith("@jared You said: jared: so, hello")
    assert (reply["messageType"], reply["version"]) == (1, 1)
    assert not page.all("#quote")[0].is_displayed()


def test_on_a_phone_what_can_be_touched_is_large(stage):
    page = Page(stage.page.browser, stage.sim.url, width=390)
    page.write("Hello!")
    poll(page.answers)
    # A machine may have no fonts but Latin ones.
    words = page.browser.execute_script("return document.body.innerText")
    assert not re.search("[^\0-\xff…“”→]", words)
    assert not page.all("#panel")[0].is_displayed()
    page.all("#log .bubble")[0].click()
    assert page.all("#panel")[0].is_displayed()
    page.browser.execute_script("arguments[0].scrollTop = 1e6", page.all("#panel")[0])
    assert page.all("#close")[0].rect["y"] < 400
    for item in page.all("button, select, summary"):
        assert not item.is_displayed() or item.size["height"] >= 40, item.text

    # What takes two lines does not lie on the message.
    page.resize(320)
    page.click("#close")
    page.click("[data-to^='@TGS']")
    stage.sim.say_in_group("lin", "@TGS#demo", "without a mention", [])
    poll(lambda: "no robot is mentioned" in page.text("#log .mark"))
    script = """const range = document.createRange();
        range.selectNodeContents(document.querySelector("#log .mark"));
        const bubble = document.querySelector("#log .bubble").getBoundingClientRect();
        const mark = range.getBoundingClientRect();
        return [range.getClientRects().length, mark.top - bubble.bottom]"""
    lines, apart = page.browser.execute_script(script)
    assert lines >= 2 and apart >= 0


def test_every_call_belongs_to_its_question():
    with running(REPLY_MODE="modify") as (sim, bot):
        sim.ai_delay = 0.2  # so that the same is asked in several chats at once
        said = [sim.say(*who, "same") for who in PAIRS for _ in range(2)]
        said.append(sim.say_in_group("lin", "@TGS#demo", "same", [*sim.robots]))
        sim.wait(len(said) + 1)
        poll(lambda: all(message.closed for message in sim.delivered))
        poll(lambda: all(call["ms"] for call in sim.wire))
        calls = [call for call in sim.calls_on_wire() if call["kind"] != "delivered"]
    for event in said:
        robots = event.get("AtRobots_Account", [event.get("To_Account")])
        chat = event.get("GroupId", event["From_Account"])
        own = [call for call in calls if call["of"] == name_of(event)]
        assert [call["kind"] for call in own].count("AI") == len(robots)
        sent = [call["body"] for call in own if call["kind"] == "IM"]
        assert len(sent) >= 2 * len(robots)
        for body in sent:
            assert chat == body.get("GroupId", body.get("To_Account"))
            assert body.get("From_Account", robots[0]) in robots
        answers = [
            m.text for m in sim.delivered if sim.question_of(m.body) == own[0]["of"]
        ]
        assert len(answers) == len(robots)
    others = [call["line"] for call in calls if not call["of"]]
    assert all("portrait_get" in line for line in others)  # the robots' names


PAIRS = [("jared", "@RBT#001"), ("jared", "@RBT#002"), ("lin", "@RBT#001")]


def send(sim, elements, **fields):
    """Send elements as the robot."""
    sign = partial(gen_user_sig, sim.sdkappid, sim.key)
    body = {"From_Account": "@RBT#001", "To_Account": "jared", "MsgBody": elements}
    body["MsgRandom"] = random.getrandbits(32)
    client = Client(sim.url, sim.sdkappid, sim.admin, sign)
    return client.call("openim/sendmsg", body | fields)


def test_a_phones_input_is_locked_as_the_kit_locks_it(stage):
    page, sim = stage.page, stage.sim
    page.choose("kit", "phone")

    # A finished chatbot message unlocks it; Markdown keeps its stars.
    page.click("[data-say^='Show me']")
    poll(lambda: "until the answer is finished" in page.text("#lock"))
    assert not page.all("#send")[0].is_displayed()
    assert page.all("#stop")[0].is_displayed()
    page.all("#text")[0].send_keys("too early\n")
    poll(page.answers)
    poll(lambda: page.all("#send")[0].is_displayed())
    assert page.draft() == "too early" and len(sim.said) == 1
    assert "**Markdown**" in page.answers()[0]

    # A plain text does not, and the page says why. Other clients are not locked.
    sim.bot_url = ""
    page.click("[data-say='Hello!']")
    poll(lambda: "waits for a finished chatbot message" in page.text("#lock"))
    send(sim, text_body("a plain text"))
    poll(lambda: "what came is no chatbot message" in page.text("#lock"))
    assert page.text("#waits .bubble") == "…"
    page.all("#text")[0].send_keys("!")
    assert not page.all("#tips [data-say]")[0].is_enabled()
    for kit in ("vue", ""):
        page.choose("kit", kit)
        assert page.all("#send")[0].is_displayed() and not page.text("#lock")
    assert page.all("#log .bubble b")


def test_trouble_is_seen_on_the_chat_and_can_be_undone(stage):
    page, sim, bot = stage.page, stage.sim, stage.bot
    assert not page.all("#troubled")[0].is_displayed()
    page.choose("ai", "slow")
    page.choose("bot", "down")
    text = "Trouble: The AI service is slow, The bot is down"
    poll(lambda: page.text("#troubled span") == text)
    page.browser.refresh()
    poll(lambda: page.text("#troubled span") == text)
    page.click("[data-do=undo]")
    poll(lambda: not page.all("#troubled")[0].is_displayed())
    assert not any(sim.trouble.values()) and sim.ai_delay == 0.0
    poll(lambda: bot.alive() and not sim.unreachable)


def test_the_end_of_a_chat_stays_in_sight(stage):
    page = stage.page
    script = """const log = document.getElementById("log");
        return log.scrollHeight - log.scrollTop - log.clientHeight"""
    below = partial(page.browser.execute_script, script)
    for number in range(1, 3):
        page.click("[data-say^='Show me']")
        poll(lambda number=number: len(page.answers()) == number)
    poll(lambda: below() < 2)
    page.choose("ai", "slow")  # a banner comes
    poll(lambda: page.all("#troubled")[0].is_displayed())
    poll(lambda: below() < 2)
    page.browser.execute_script("write('line\\n'.repeat(9))")
    poll(lambda: below() < 2)

    # It is left to its user to read what is above, until they write.
    page.browser.execute_script("document.getElementById('log').scrollTop = 0")
    poll(lambda: not page.browser.execute_script("return low"))
    page.browser.execute_script("write('')")
    page.choose("ai", "")
    poll(lambda: not page.all("#troubled")[0].is_displayed())
    assert below() > 80
    page.click("[data-say='Hello!']")
    poll(lambda: len(page.answers()) == 3 and below() < 2)


def test_a_reply_to_a_long_message_leaves_room_to_write_it(stage):
    page = stage.page
    script = "say(`${'one long line '.repeat(40)}\\n${'a line\\n'.repeat(60)}`)"
    page.browser.execute_script(script)
    poll(lambda: page.all("#log .mine"))
    for width in (1280, 768, 390):
        page = Page(page.browser, stage.sim.url, width)
        page.all("#log .mine .mark")[0].click()
        page.click("[data-do=reply]")
        poll(lambda page=page: page.text("#quoted"))
        box = page.all("#form")[0].rect
        for button in ("#send", "#quote button"):
            rect = page.all(button)[0].rect
            assert rect["x"] + rect["width"] <= box["x"] + box["width"]
        assert box["height"] < 250 and page.all("#log")[0].size["width"] > 350


def test_the_page_can_be_used_by_keyboard_and_by_ear(stage):
    page = stage.page
    for button in ("[data-to='@RBT#002']", "[data-me=lin]"):
        page.all(button)[0].send_keys("\n")
        poll(lambda button=button: page.all(f"{button}:focus"))
    page.all("#text")[0].send_keys("hello")
    page.click("#send")
    poll(page.answers)
    assert page.all("#text:focus")
    names = [face.accessible_name for face in page.all("#log .face")]
    assert names == ["lin", "Helper"]

    # What is written while the stand-in is away is kept.
    page.browser.execute_script("news.onerror()")
    page.write("nobody hears me")
    assert page.draft() == "nobody hears me" and len(stage.sim.said) == 1


def test_the_requests_of_a_message_are_easy_to_read(stage):
    page, sim = stage.page, stage.sim
    assert page.browser.title == "Tencent IM stand-in"
    page.click("[data-say^='A long']")
    poll(lambda: "modify_c2c_msg × " in page.text("#calls"))
    folded = page.all("#calls > li")
    assert len(folded) == 4 and not page.all("#calls details[open]")
    folded[-1].click()  # and it stays open while more comes
    open_with = len(page.all("#calls ol li"))
    poll(lambda: len(page.all("#calls ol li")) > open_with)
    assert page.all("#calls > li > details[open]")

    # The first AI call shows what was asked, with the persona.
    prompt = page.text("#calls blockquote")
    assert prompt.startswith("system: You are a helpful assistant")
    assert prompt.endswith("user: A long answer, please")

    page.click("[data-do=language]")
    assert page.browser.title == "腾讯云 IM 模拟器"
    page.click("[data-to^='@TGS']")
    assert page.text("#tips button") == "@Robot 你好！"
    page.click("#tips button")
    poll(lambda: "你好" in "".join(page.answers()))
    assert sim.delivered[-1].chat == "@TGS#demo"


def test_a_chat_is_sorted_as_tencents_clients_sort_it(stage):
    page, sim = stage.page, stage.sim
    sim.bot_url = ""
    told = send(sim, text_body("second"), MsgSeq=70)
    for text, seq, later in [("first", 69, 0), ("third", 71, 0), ("fourth", 1, 1)]:
        at = told["MsgTime"] + later
        sim.say("jared", "@RBT#001", text, MsgSeq=seq, MsgTime=at)
    poll(lambda: len(page.all("#log .bubble")) == 4)
    shown = [item.text for item in page.all("#log .bubble")]
    assert shown == ["first", "second", "third", "fourth"]


def test_any_element_of_a_robot_is_drawn(stage):
    page, sim = stage.page, stage.sim
    url = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='9'/>"
    order = json.dumps({"businessID": "order", "id": 7})
    picture = {"ImageInfoArray": [{"URL": url}]}
    send(sim, [{"MsgType": "TIMImageElem", "MsgContent": picture}])
    send(sim, [{"MsgType": "TIMCustomElem", "MsgContent": {"Data": order}}])
    poll(lambda: page.all("#log .bubble img"))
    assert page.all("#log .bubble img")[0].size["width"] == 9
    assert '"businessID": "order"' in page.text("#log .bubble pre")


def test_a_bot_that_is_not_there_is_missed(stage):
    page, bot = stage.page, stage.bot
    bot.stop()
    page.write("hello?")
    poll(lambda: "Nobody answers at http:" in page.text("#banner"))
    bot.start()
    page.write("hello!")
    poll(lambda: "stand-in that repeats" in page.text("#banner"))
