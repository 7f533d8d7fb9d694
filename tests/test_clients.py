"""Tencent's own clients: whatever a user writes, his phone's input is unlocked again.

In the modes "custom" and "card", by the rules of the phones' kits and of the Vue kits.
"""

from __future__ import annotations

import json

import pytest
from conftest import STORY, Caller, idle, poll

from imbot.texts import TEXTS
from simulator import ai_error

ROBOT, TEXT = "@RBT#001", TEXTS["en"]
LONG = "\n\n".join(f"{number}. {STORY}" for number in range(9))  # several messages
SOUND = {"MsgType": "TIMSoundElem", "MsgContent": {"Url": "https://x.example/1"}}
EMPTY = {"MsgType": "TIMTextElem", "MsgContent": {"Text": " "}}
OTHER = {"MsgType": "TIMCustomElem", "MsgContent": {"Data": "{}"}}


def one(text, **fields):
    """Return what says a text; the bot's answer is expected to name it."""

    def say(im):
        im.say(text, **fields)

    return say


def five_quick_ones(im):
    for number in range(5):
        im.say(f"quick {number}")


def four_slow_ones(im):
    im.sim.ai_delay = 0.3
    for number in range(4):
        im.say(f"slow {number}")


def broken_ai(im):
    im.sim.ai_fault = lambda asked: (500, ai_error("api_error", "broken (1000)"))
    im.say("hello")


def spent_quota(im):
    im.sim.ai_fault = lambda asked: (402, ai_error("x", "insufficient balance (1008)"))
    im.say("hello")


def refused_edit(im):
    is_edit = "openim/modify_c2c_msg"
    im.sim.fault = lambda command, body: 20023 if command == is_edit else None
    im.say("hello")


def refused_answer(im):
    im.sim.fault = lambda command, body: (
        80001 if "question 1" in json.dumps(body) else None
    )
    im.say("hello")


def long_answer(im):
    im.sim.ai_answer = lambda messages: LONG
    im.say("a long one")


def a_stop(im):
    im.sim.ai_answer, im.sim.ai_pace = (lambda messages: STORY), 0.02
    im.say("tell me")
    poll(lambda: im.sim.ai_requests)
    im.say("/stop")


KINDS = {  # name -> (what the user does, settings, what he is told)
    "a question": (one("hello"), {}, "You said: hello (question 1 of our chat)"),
    "/help": (one("/help"), {}, TEXT["help"]),
    "/clear": (one("/clear"), {}, TEXT["clear"]),
    "voice": (one("", MsgBody=[SOUND]), {}, TEXT["unsupported"]),
    "nothing": (one("", MsgBody=[EMPTY]), {}, ""),
    "another element": (one("", MsgBody=[OTHER]), {}, ""),
    "too fast": (five_quick_ones, {"rate_limit": 3}, TEXT["rate_limited"]),
    "too many": (four_slow_ones, {"max_waiting": 2}, TEXT["queue_full"]),
    "a broken AI": (broken_ai, {}, TEXT["busy"]),
    "no quota": (spent_quota, {}, TEXT["quota"]),
    "a refused edit": (refused_edit, {}, "You said: hello (question 1 of our chat)"),
    "a refused answer": (refused_answer, {}, TEXT["undeliverable"]),
    "a long answer": (long_answer, {}, LONG),
    "a stop": (a_stop, {}, ""),
    "a stranger": (one("hello"), {"allow_users": ("lin",)}, TEXT["not_allowed"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["custom", "card"])
def test_nobody_stays_locked_and_all_is_shown_once(sim, make_app, mode, kind):
    act, settings, told = KINDS[kind]
    app = make_app(reply_mode=mode, bot_language="en", **settings)
    im = Caller(sim, app.test_client())
    phone, vue = (sim.kit_chat(kit, "jared", ROBOT) for kit in ("phone", "vue"))
    act(im)
    poll(lambda: idle(im) and not phone.locked)
    if kind != "a refused edit":  # then it cannot be closed
        assert all(message.closed for message in sim.delivered)
    for chat in (phone, vue):
        shown = "".join("".join(chat.shown.values()).split())
        assert shown.count("".join(told.split())) == 1 or not told
