"""What a callback's JSON may hold, and what of it is read."""

from __future__ import annotations

import json

import pytest

from imbot.tencent import callback
from simulator import c2c_event


def reply(**fields):
    return json.dumps({"messageReply": fields})


@pytest.mark.parametrize(
    ("data", "quote"),
    [
        (reply(messageAbstract=" Bonjour\n", messageSender="lin"), "Bonjour"),
        (reply(messageAbstract="x" * 501), "x" * 500),
        (reply(messageAbstract="a\ud800\0b"), "a?b"),
        (reply(messageAbstract=["x"]), ""),
        (reply(messageAbstract=None), ""),
        (reply(), ""),
        (reply(messageAbstract="x")[:-1], ""),
        ('{"messageReply": "messageAbstract"}', ""),
        ('{"messageReply": null}', ""),
        ('["messageReply"]', ""),
        ("[" * 100_000, ""),
        ("1" * 5000, ""),
        ("null", ""),
        ("", ""),
        (None, ""),
        (5, ""),
        ({"messageReply": {"messageAbstract": "x"}}, ""),
    ],
)
def test_the_quoted_message_is_read_and_what_is_broken_is_ignored(data, quote):
    event = c2c_event("jared", "@RBT#001", "hi") | {"CloudCustomData": data}
    [message] = callback.parse("Bot.OnC2CMessage", event)
    assert (message.text, message.quote) == ("hi", quote)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("From_Account", None),
        ("From_Account", ["jared"]),
        ("From_Account", "a\tb"),
        ("From_Account", "\ud800"),
        ("From_Account", "x" * 2000),
        ("To_Account", 5),
        ("MsgSeq", None),
        ("MsgRandom", True),
        ("MsgTime", {"a": 1}),
        ("MsgBody", "text"),
        ("MsgBody", [1]),
        ("MsgBody", [{"MsgType": "TIMTextElem"}]),
        ("MsgBody", [{"MsgType": "TIMTextElem", "MsgContent": {"Text": 5}}]),
    ],
)
def test_a_field_of_the_wrong_type_is_named(im, field, value):
    answer = im.post(im.sim.say("jared", "@RBT#001", "hi") | {field: value})
    assert answer.status_code == 400
    info = answer.get_json()["ErrorInfo"]
    assert field in info or "TIMTextElem" in info


@pytest.mark.parametrize("robot", ["@RBT#002", "@rbt#002"])
def test_what_robots_write_is_ignored(im, robot):
    assert im.say("hello", user=robot).status_code == 200
    im.say("hello")
    [answer] = im.sim.wait(1)
    assert answer.chat == "jared" and len(im.sim.ai_requests) == 1


def test_a_button_that_stops_stops_whatever_else_is_sent():
    button = {"Data": '{"chatbotPlugin": 2, "src": 22}'}
    body = [
        {"MsgType": "TIMCustomElem", "MsgContent": button},
        {"MsgType": "TIMFaceElem", "MsgContent": {}},
    ]
    event = c2c_event("jared", "@RBT#001", "") | {"MsgBody": body}
    assert [m.kind for m in callback.parse("Bot.OnC2CMessage", event)] == ["stop"]
