"""Mentions and commands as people write them; the nicks by which they do."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Caller, in_threads, poll

from botserver import clear, confirm_stop, show_help
from imbot import commands
from imbot.settings import Persona
from imbot.tencent import IMError, Message, Nicks, callback
from imbot.tencent.history import read
from imbot.tencent.mentions import cut_mentions, mentions, trim
from imbot.texts import TEXTS
from imbot.timing import NORMAL
from simulator import group_event, text_body

ROBOT, GROUP = "@RBT#001", "@TGS#demo"
CASES = Path(__file__).parent / "cases"
IN_CALLBACKS = json.loads((CASES / "f5_f8_mentions.json").read_text("utf-8"))["cases"]
IN_HISTORY = json.loads((CASES / "f6_f7_lookup.json").read_text("utf-8"))["cases"]
POOR = json.loads((CASES / "poor.json").read_text("utf-8"))
WRITTEN, SEEN_EMPTY = (c["input"] for c in POOR if c["id"] == "P3")


def in_group(text, nicks, robots=(ROBOT,)):
    """Return what a group message asks ROBOT, [] if nothing."""
    event = group_event("lin", GROUP, 7, "", [*robots])
    found = callback.parse(
        "Bot.OnGroupMessage", event | {"MsgBody": text_body(text)}, nicks
    )
    return [message for message in found if message.robot == ROBOT]


def name_of(message):
    """Return the name of the command that a message is, None if it is none."""
    runs = {command.run: name for name, command in commands.COMMANDS.items()}
    found = commands.find(message)
    return found and runs[found[0]]


@pytest.mark.parametrize("case", IN_CALLBACKS, ids=lambda case: case["text"])
def test_a_question_reaches_the_ai_without_the_robots_nick_and_nothing_else(case):
    [message] = in_group(case["text"], {ROBOT: case["nick"]})
    if case["expected"] == "(the help text)":
        assert name_of(message) == "/help"
    else:
        assert message.text == case["expected"]


@pytest.mark.parametrize("case", IN_HISTORY, ids=lambda case: case["text"])
def test_the_look_up_answers_what_mentions_the_robot(case):
    item = {
        "From_Account": "lin",
        "IsPlaceMsg": 0,
        "MsgSeq": 7,
        "MsgRandom": 1,
        "MsgTimeStamp": 1700000000,
        "MsgBody": text_body(case["text"]),
    }
    found = read(item, Message("", ROBOT, "", "", GROUP), {ROBOT: case["nick"]})
    assert bool(found) == (case["expected"] == "answered")


@pytest.mark.parametrize(
    "text",
    ["@Ada hi", "hi @Ada", "@@RBT#001你好", "@Ada @Echo hi", "/help@ada", "@Ada"],
)
def test_the_look_up_reads_a_mention_as_its_callback_does(text):
    nicks = {ROBOT: "Ada", "@RBT#002": "Echo"}
    robots = [ROBOT, "@RBT#002"] if "Echo" in text else [ROBOT]
    event = group_event("lin", GROUP, 7, "", robots) | {"MsgBody": text_body(text)}
    called = callback.parse("Bot.OnGroupMessage", event, nicks)[:1]
    item = event | {"MsgTimeStamp": event["MsgTime"], "MsgRandom": event["Random"]}
    chat = Message("", ROBOT, "", "", GROUP)
    assert read(item, chat, nicks) == called
    assert read(item | {"MsgFlagBits": 8}, chat, nicks) == []  # recalled


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("@@RBT#001 hello", "hello"),
        ("hello @@rbt#001", "hello"),
        ("hello@@RBT#001", "hello"),
        ("＠@RBT#001 你好", "你好"),
        ("@@RBT#001你好", "你好"),
        ("tell @@RBT#0011 hello", "tell @@RBT#0011 hello"),
        ("tell @@RBT#001.2 hello", "tell @@RBT#001.2 hello"),
        ("@@RBT#001. Hello", ". Hello"),
        ("@Robot\u2005hello @@RBT#001 there", "hello there"),
        ("@Robot\u200b/help", "/help"),
        ("@Robots are here", "are here"),  # one name that we do not know
        ("We, @Robots, are here", "We, @Robots, are here"),
        ("@Somebody\u2005/help", "/help"),
        ("@Somebody  @Else hello", "@Somebody  @Else hello"),
        ("@Somebody", ""),
        ("@Somebody mail me@there.example", "mail me@there.example"),
        ("mail robot@example.com", "mail robot@example.com"),
        ("mail me@robot", "mail me@robot"),
        ("see pkg.example/@robot", "see pkg.example/@robot"),
        ("see @robot.example", "see @robot.example"),
        ("\ufeff ／help＠robot", "／help"),
    ],
)
def test_mentions_are_cut_from_the_text(text, cut):
    assert cut_mentions(text, [(ROBOT, "Robot")]) == cut


@pytest.mark.parametrize(
    ("nick", "text", "alone", "glued"),
    [
        ("小助", "@小助 在吗", 1, 1),
        ("小助", "@小助，在吗", 1, 1),
        ("小助", "@小助手 在吗", 0, 1),
        ("小助", "@小助👩‍💻 在吗", 0, 1),
        ("小助👩", "@小助👩‍💻 在吗", 0, 0),
        ("小助👋", "@小助👋🏽 在吗", 0, 0),
        ("小助👩‍💻", "@小助👩‍💻 在吗", 1, 1),
        ("小助👩‍💻", "@小助👩‍💻帮我", 0, 1),
        ("Ada", "@Ada帮我", 0, 1),
        ("Ada", "@Adam", 0, 0),
        ("Ada", "@Ada-2", 0, 0),
        ("My Robot", "@My\u00a0Robot hi", 1, 1),
        ("My Robot", "@My hi", 0, 0),
        ("a.c", "@abc hi", 0, 0),
        ("", "@ hi", 0, 0),
    ],
)
def test_a_nick_stands_alone_or_runs_into_the_next_word(nick, text, alone, glued):
    assert len(mentions(text, ROBOT, nick)) == alone
    assert len(mentions(text, ROBOT, nick, glued=True)) == glued


def test_a_robots_nick_may_begin_anothers():
    nicks = {ROBOT: "小助", "@RBT#002": "小助手"}
    [message] = in_group("@小助手帮我 @小助看看", nicks, robots=[*nicks])
    assert message.text == "帮我 看看"


def test_long_texts_are_read_in_no_time():
    began = time.monotonic()
    for text in ("@Ada" * 20_000, " " * 90_000 + "x", "/a" * 40_000, "a@" * 40_000):
        in_group(text, {ROBOT: "Ada"})
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("text", [*SEEN_EMPTY, "", " \t\n", "\u00ad", "\ufe0f\u200b"])
def test_a_text_that_nobody_sees_is_empty(text):
    assert trim(text) == ""
    assert in_group(text, {ROBOT: ""}) == []


@pytest.mark.parametrize("text", ["❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👩‍💻", "กี่", "नमस्ते", "é"])
def test_what_is_seen_stays_whole(text):
    assert trim(f"\u200b {text}\ufeff\n") == text


@pytest.mark.parametrize(
    ("text", "run"),
    [(text, None) for text in WRITTEN]
    + [
        ("/HELP!", show_help),
        ("/help@Anybody", show_help),
        ("/help＠谁", show_help),
        ("清空。", clear),
        ("ＳＴＯＰ", None),
    ],
)
def test_a_command_is_known_as_people_write_it(text, run):
    expected = {"help": show_help, "clear": clear, "停止": confirm_stop}
    run = run or next((run for word, run in expected.items() if word in text), None)
    [message] = in_group(f"@@RBT#001 {text.removeprefix('@@RBT#001')}", {})
    found = commands.find(message)
    assert (found and found[0]) == run


@pytest.mark.parametrize(
    "text", ["what does /help do?", "/helpful", "/help me", "help", "帮助我", "!", "/"]
)
def test_what_only_looks_like_a_command_is_none(text):
    assert commands.find(Message("id", ROBOT, "jared", text)) is None


@pytest.mark.parametrize("text", ["@@RBT#001 ", "@Ada", "@@RBT#001\u200b", "@Card"])
def test_a_bare_mention_is_greeted(text):
    [message] = in_group(text, {ROBOT: "Ada"})
    assert (message.kind, message.text) == ("greeting", "")


def test_a_bare_mention_gets_the_help_text(im):
    im.post(im.sim.say_in_group("jared", GROUP, "", [ROBOT]))
    assert TEXTS["zh"]["help"] in im.sim.wait(1)[0].text
    assert not im.sim.ai_requests


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("@My Robot /clear", TEXTS["zh"]["clear_group"]),
        ("/help @My Robot", TEXTS["zh"]["help"]),
        ("/help@My Robot", TEXTS["zh"]["help"]),
        ("@lin what do you think? @My Robot", "jared: @lin what do you think?"),
        ("@My Robot", TEXTS["zh"]["help"]),
    ],
)
def test_a_nick_that_robots_toml_does_not_name_is_learned(sim, make_app, text, answer):
    sim.robots[ROBOT] = "My Robot"
    im = Caller(sim, make_app(ai_provider="echo").test_client())
    said = sim.say_in_group("jared", GROUP, "", [ROBOT], MsgBody=text_body(text))
    im.post(said)
    assert answer in sim.wait(1)[0].text


class Profiles:
    """A client that tells nicks, or raises what `nicks` is."""

    timing = replace(NORMAL, nick_life=0.2, nick_retry=0.05)

    def __init__(self, nicks):
        self.nicks, self.asked = nicks, []

    def call(self, command, body, pauses, timeout):
        assert (command, pauses, timeout) == ("profile/portrait_get", (), 2.0)
        self.asked.append(body["To_Account"])
        time.sleep(0.02)
        if isinstance(self.nicks, Exception):
            raise self.nicks
        return {"UserProfileItem": self.nicks}


def profile(robot, nick):
    item = {"Tag": "Tag_Profile_IM_Nick", "Value": nick}
    return {"To_Account": robot, "ProfileItem": [item], "ResultCode": 0}


def test_a_callback_never_waits_for_a_nick_and_a_worker_asks_once():
    im = Profiles([profile(ROBOT, "Ada"), profile("@RBT#002", "Echo")])
    nicks = Nicks(im, {"@RBT#003": "Clio"})
    robots = [ROBOT, "@RBT#002", "@RBT#003"]
    [message] = in_group("@Ada @Echo @Clio hi", nicks, robots)
    assert message.kind == "mention" and not im.asked
    settled = in_threads(4, lambda _: nicks.settle(message))
    assert {(m.kind, m.text) for m in settled} == {("question", "hi")}
    assert im.asked == [[ROBOT, "@RBT#002"]]
    [message] = in_group("@Ada @Echo hi", nicks, [ROBOT, "@RBT#002"])
    assert (message.kind, message.text) == ("question", "hi")
    assert dict(nicks) == {ROBOT: "Ada", "@RBT#002": "Echo", "@RBT#003": "Clio"}


def test_other_robots_that_a_late_question_does_not_mention_keep_their_names():
    nicks = Nicks(Profiles([profile(ROBOT, "小助手")]), {"@RBT#002": "小"})
    [message] = in_group("@小助手 hi @小明", nicks)
    assert nicks.settle(message).text == "hi @小明"


def test_a_nick_is_asked_for_again_later_and_kept_while_tencent_is_silent():
    im = Profiles([profile(ROBOT, "Ada")])
    nicks = Nicks(im, {})
    nicks.learn(ROBOT)
    im.nicks = IMError("profile/portrait_get", 91000, "busy")
    poll(lambda: nicks.learn(ROBOT) and len(im.asked) == 2)
    assert nicks[ROBOT] == "Ada"
    im.nicks = [profile(ROBOT, "Eve")]
    poll(lambda: nicks.learn(ROBOT) and nicks[ROBOT] == "Eve")


@pytest.mark.parametrize(
    "nicks",
    [
        IMError("profile/portrait_get", 40006, "no such account"),
        None,
        [{"To_Account": ROBOT}],
        [{"To_Account": ROBOT, "ProfileItem": [{}]}],
        [profile(ROBOT, None)],
        ["?"],
    ],
)
def test_without_its_nick_a_robot_is_known_by_its_id(nicks, caplog):
    learned = Nicks(Profiles(nicks), {})
    for _ in range(3):
        [message] = in_group("@@RBT#001 @lin hi", learned)
        assert learned.settle(message).text == "@lin hi"
        time.sleep(0.06)
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("busy", [0, 3])
def test_the_look_up_learns_the_nick(sim, make_app, busy):
    """Also if Tencent does not tell it at once: else the mention would not be seen."""
    sim.robots[ROBOT] = "My Robot"
    faults = [60007] * busy
    sim.fault = lambda command, body: (
        faults.pop() if "portrait_get" in command and faults else None
    )
    app = make_app(ai_provider="echo")
    app.extensions["bot"].close(drain=5)
    away = {"well": {"a server": time.time() - 60}}  # its last heartbeat
    app.extensions["bot"].store.put("servers", away)
    sim.looked_up.clear()
    text = text_body("@My Robot hi")
    sim.say_in_group("jared", GROUP, "", [ROBOT], MsgBody=text)
    sim.say_in_group("jared", GROUP, "", ["@RBT#002"], MsgBody=text_body("@Helper ho"))
    robots = {ROBOT: Persona()}
    make_app(ai_provider="echo", robots=robots, robots_only=True)
    assert sim.wait(1)[0].text == "@jared jared: hi"
    poll(lambda: not app.extensions["bot"].store.get("servers")["outages"])
    assert {m.robot for m in sim.delivered} == {ROBOT} and not faults
    assert "@RBT#002" not in {robot for robot, _ in sim.looked_up}


def test_whether_a_nick_may_be_told_later():
    for error, later in ((91000, True), (40006, False)):
        im = Profiles(IMError("profile/portrait_get", error, "why"))
        nicks = Nicks(im, {})
        assert [nicks.learn(ROBOT) for _ in range(2)] == [not later] * 2
        nicks.note(ROBOT, "Ada")
        assert nicks.learn(ROBOT) and nicks[ROBOT] == "Ada" and len(im.asked) == 1


def test_what_is_said_one_to_one_asks_for_no_nick():
    im = Profiles([])
    message = Message("id", ROBOT, "jared", "@Ada hi")
    assert Nicks(im, {}).settle(message) is message and not im.asked


def test_a_nick_of_robots_toml_is_not_asked_for(sim, make_app):
    app = make_app(ai_provider="echo", robots={ROBOT: Persona(nick="Ada")})
    im = Caller(sim, app.test_client())
    text = text_body("@Ada hi")
    im.post(sim.say_in_group("jared", GROUP, "", [ROBOT], MsgBody=text))
    assert sim.wait(1)[0].text == "@jared jared: hi"
    assert "profile/portrait_get" not in [command for command, _ in sim.calls]
