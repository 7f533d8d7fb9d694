"""The tests: every promise of the README, on a stand-in for Tencent IM and the AI.

pytest                  all of them
pytest -k signature     those whose name says signature
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import traceback
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import jwt
import pytest
import requests
import responses
from hypothesis import given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

import botserver
import providers
import store
import tim
import usersig
from botserver import TEXTS, Config, ConfigError, create_app
from providers import PROVIDERS, Call, Provider, ProviderError, Replace, joined
from simulator import (
    KEY,
    PACE,
    SETTINGS,
    BotProcess,
    Simulator,
    actor,
    free_port,
    running,
    text_body,
)
from store import RedisStore, SQLiteStore, StoreError, open_store
from wire import Wire

APPID, TOKEN = 1400000000, "stand-in-token"
HERE = Path(__file__).parent


@pytest.fixture
def sim():
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def make_app(sim, tmp_path):
    """Return a function that makes an app of the simulator's, with other settings."""
    bots = []

    def make(**settings):
        defaults = {
            "im_sdkappid": APPID,
            "im_key": KEY,
            "im_callback_token": (TOKEN,),
            "im_api_url": sim.url,
            "ai_secret_key": sim.ai_key,
            "ai_base_url": f"{sim.url}/v1",
            "database": str(tmp_path / "bot.db"),
        }
        app = create_app(Config(**{**defaults, **settings}))
        bots.append(app.extensions["bot"])
        return app

    yield make
    for bot in bots:
        bot.close(drain=5)


@pytest.fixture
def im(sim, make_app):
    return Caller(sim, make_app().test_client())


class Caller:
    """Tencent's side of the callback, through Flask's test client."""

    def __init__(self, sim, client):
        self.sim, self.client = sim, client

    def post(self, event, body=None, **query):
        signed = {**self.sim.signed(event), **query}
        data = json.dumps(event) if body is None else body
        return self.client.post("/im", query_string=signed, data=data)

    def say(self, text="hi", user="jared", robot="@RBT#001", **fields):
        return self.post(self.sim.say(user, robot, text, **fields))


def test_usersig_agrees_with_tencents_library():
    sig = usersig.gen_user_sig(APPID, KEY, "xiaojun", 15552000, now=1700000000)
    fields = usersig.check_user_sig(KEY, sig, now=1700000000)
    assert fields == {
        "TLS.ver": "2.0",
        "TLS.identifier": "xiaojun",
        "TLS.sdkappid": APPID,
        "TLS.expire": 15552000,
        "TLS.time": 1700000000,
        "TLS.sig": "LvA7d/Iw7gSsnskvVzBDPOCCDbuNCw4GHwTC0bip+B4=",
    }


@pytest.mark.parametrize(
    "made_by_tencent",
    [
        # Python: https://github.com/tencentyun/tls-sig-api-v2-python
        "eJyrVgrxCdYrSy1SslJQMtIzUNJRAItkpqTmlWSmZUIkKjIT87NK82CSxSnZiQUFmSlAKUMTAyiA"
        "yqVWFGQWpYJkTE1NjRDiJZm5YFFzNPXFmekgG3zKHM1T9D3LzdODi-OKs8vCqpxcAvydnV2SSv2c"
        "y03cPcpDnA2SMgu0nUxslWoBHdYzUg__",
        # Node: https://github.com/tencentyun/tls-sig-api-v2-node
        "eJyrVgrxCdYrSy1SslIy0jNQ0gHzM1NS80oy0zLBwhWZiflZpXlQqeKU7MSCgswUJStDEwMogMiU"
        "ZOamKlkZmqOKplYUZBaBxE1NTY3gosWZ6UpWSj5ljuYp*p7l5unBxXnF2WVhVU4uAf7Ozi5JpX7O"
        "5SbuHuUhzgZJmQXaTia2SrUAohcx8g__",
    ],
)
def test_usersig_of_tencents_libraries_is_accepted(made_by_tencent):
    fields = usersig.check_user_sig(KEY, made_by_tencent, now=1700000000)
    assert fields["TLS.identifier"] == "xiaojun"


@pytest.mark.parametrize(
    ("sig", "now", "code"),
    [
        ("", 1700000000, 70003),
        ("eJyr", 1700000000, 70003),
        ("not base64 é", 1700000000, 70003),
        (usersig.gen_user_sig(APPID, KEY, "a", 60, 1700000000)[:80], 0, 70003),
        (usersig.gen_user_sig(APPID, "other", "a", 60, 1700000000), 1700000000, 70009),
        (usersig.gen_user_sig(APPID, KEY, "a", 60, 1700000000), 1700000061, 70001),
    ],
)
def test_a_bad_usersig_is_refused_with_tencents_code(sig, now, code):
    with pytest.raises(usersig.BadSignature) as caught:
        usersig.check_user_sig(KEY, sig, now)
    assert caught.value.code == code


def test_callback_signature_agrees_with_tencents_example():
    # https://www.tencentcloud.com/document/product/1047/34354
    sign = "17773bc39a671d7b9aa835458704d2a6db81360a5940292b587d6d760d484061"
    assert usersig.sign_callback("xxxxyyyy", "1669872112") == sign
    usersig.check_callback(["xxxxyyyy"], sign, "1669872112", now=1669872112)
    usersig.check_callback(["new", "xxxxyyyy"], sign.upper(), "1669872112", 1669872171)


@pytest.mark.parametrize(
    "request_time", ["1669872051", "1669872173", "", "x", "１", "-1"]
)
def test_a_stale_or_strange_request_time_is_refused(request_time):
    sign = usersig.sign_callback("token", request_time)
    with pytest.raises(usersig.BadSignature):
        usersig.check_callback(["token"], sign, request_time, now=1669872112)


def test_a_question_is_answered_one_to_one(im):
    assert im.say("hello").get_json() == {
        "ActionStatus": "OK",
        "ErrorInfo": "",
        "ErrorCode": 0,
    }
    [answer] = im.sim.wait(1)
    assert (answer.robot, answer.chat) == ("@RBT#001", "jared")
    assert answer.text == "You said: hello (question 1 of our chat)"


def test_the_chat_is_remembered_and_thinking_is_not(im):
    im.sim.ai_answer = lambda messages: f"<think>hm</think>answer {len(messages)}"
    for number in range(1, 4):
        im.say(f"question {number}")
        im.sim.wait(number)
    turns = [(m["role"], m["content"]) for m in im.sim.ai_requests[-1]["messages"]]
    assert turns[1:] == [
        ("user", "question 1"),
        ("assistant", "answer 2"),
        ("user", "question 2"),
        ("assistant", "answer 4"),
        ("user", "question 3"),
    ]


def test_every_robot_mentioned_in_a_group_answers_without_the_mentions(im):
    robots = ["@RBT#001", "@RBT#002", "@RBT#001"]
    event = im.sim.say_in_group("jared", "@TGS#demo", "you two?", robots)
    im.post(event)
    answers = im.sim.wait(2)
    assert {answer.robot for answer in answers} == {"@RBT#001", "@RBT#002"}
    assert {answer.chat for answer in answers} == {"@TGS#demo"}
    for answer in answers:
        assert answer.text.startswith("@jared You said: jared: you two? (")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("@@RBT#001 hello", "hello"),
        ("hello @@rbt#001", "hello"),
        ("＠@RBT#001 你好", "你好"),
        ("@@RBT#001你好", "你好"),
        ("tell @@RBT#0011 hello", "tell @@RBT#0011 hello"),
        ("@Robot\u2005hello @@RBT#001 there", "hello there"),
        ("@Somebody\u2005/help", "/help"),
        ("@Somebody  @Else hello", "@Somebody  @Else hello"),
        ("@Somebody", ""),
        ("mail robot@example.com", "mail robot@example.com"),
    ],
)
def test_mentions_are_cut_from_the_text(text, cut):
    assert tim.cut_mentions(text, ["@RBT#001", "Robot"]) == cut


def test_several_text_elements_are_one_question(im):
    im.say(MsgBody=text_body("one") + [FACE] + text_body("two"))
    assert im.sim.wait(1)[0].text.startswith("You said: one\ntwo (")


FACE = {"MsgType": "TIMFaceElem", "MsgContent": {"Index": 1, "Data": "x"}}
TYPING = json.dumps({"businessID": "user_typing_status", "typingStatus": 1})
NO_QUESTIONS = {
    "from a robot": {"From_Account": "@RBT#002"},
    "not delivered": {"SendMsgResult": 20006},
    "not delivered, as text": {"SendMsgResult": "20006"},
    "not to a robot": {"To_Account": "lin"},
    "typing": {
        "MsgBody": [{"MsgType": "TIMCustomElem", "MsgContent": {"Data": TYPING}}]
    },
    "no text": {"MsgBody": text_body("  ")},
    "unknown command": {"CallbackCommand": "Profile.CallbackPortraitSet"},
    "a before callback": {"CallbackCommand": "C2C.CallbackBeforeSendMsg"},
    "the same message's other callback": {
        "CallbackCommand": "C2C.CallbackAfterSendMsg"
    },
}


@pytest.mark.parametrize("fields", NO_QUESTIONS.values(), ids=NO_QUESTIONS)
def test_what_is_no_question_is_acknowledged_and_left(im, fields):
    answer = im.say("hi", **fields)
    assert (answer.status_code, answer.get_json()["ErrorCode"]) == (200, 0)
    assert answer.get_json()["ActionStatus"] == "OK"
    im.say("a question after it")
    assert "a question after it" in im.sim.wait(1)[0].text
    assert len(im.sim.ai_requests) == 1


def test_the_consoles_probe_is_acknowledged(im):
    query = im.sim.signed({"CallbackCommand": "State.StateChange"})
    del query["SdkAppid"]
    for body in ("", "{}"):
        answer = im.client.post("/im", query_string=query, data=body)
        assert (answer.status_code, answer.get_json()["ErrorCode"]) == (200, 0)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"Sign": "0" * 64}, 403),
        ({"Sign": ""}, 403),
        ({"Sign": "é"}, 403),
        ({"RequestTime": "1669872112"}, 403),
        ({"SdkAppid": "1400000001"}, 403),
        ({"age": 61}, 403),
        ({"age": -62}, 403),
        ({"age": 50}, 200),
    ],
)
def test_a_forged_or_stale_callback_is_refused(im, query, status):
    if age := query.get("age"):
        then = str(int(time.time()) - age)
        query = {"RequestTime": then, "Sign": usersig.sign_callback(TOKEN, then)}
    answer = im.post(im.sim.say("jared", "@RBT#001", "hi"), **query)
    assert answer.status_code == status
    assert (answer.get_json()["ActionStatus"] == "OK") == (status == 200)
    assert status == 200 or answer.get_json()["ErrorInfo"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * (2 << 20), 413),
        (b"not JSON", 400),
        (b"[1, 2]", 400),
        (b'"text"', 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"a": ' + b"9" * 5000 + b"}", 400),
    ],
)
def test_a_body_that_is_no_callback_is_refused(im, body, status):
    event = im.sim.say("jared", "@RBT#001", "hi")
    answer = im.post(event, body=body)
    assert answer.status_code == status
    assert answer.get_json()["ActionStatus"] == "FAIL"


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
    answer = im.say(**{field: value})
    assert answer.status_code == 400
    info = answer.get_json()["ErrorInfo"]
    assert field in info or "TIMTextElem" in info


def test_other_methods_and_paths_are_refused_in_tencents_shape(im):
    assert im.client.get("/im").status_code == 405
    assert im.client.post("/").status_code == 404
    assert im.client.get("/im").get_json()["ActionStatus"] == "FAIL"


def test_a_redelivered_callback_is_answered_once(im):
    event = im.sim.say("jared", "@RBT#001", "once")
    for _ in range(3):
        assert im.post(event).status_code == 200
    im.say("afterwards")
    assert [m.text[:14] for m in im.sim.wait(2)] == ["You said: once", "You said: afte"]


def test_strange_text_arrives(im):
    im.say("\ud83d \0 \u2028 😀")
    assert im.sim.wait(1)[0].text.startswith("You said: ?  \u2028 😀 (")


def test_unsigned_callbacks_are_accepted_only_if_allowed(make_app, sim):
    client = make_app(im_callback_token=(), allow_unsigned=True).test_client()
    event = sim.say("jared", "@RBT#001", "hi")
    assert client.post("/im", json=event).status_code == 200
    sim.wait(1)


def test_tokens_can_be_rotated(make_app, sim):
    caller = Caller(sim, make_app(im_callback_token=("new", TOKEN)).test_client())
    assert caller.say("old token").status_code == 200
    sim.token = "new"
    assert caller.say("new token").status_code == 200


def test_the_acknowledgement_does_not_wait_for_the_ai(im):
    im.sim.ai_delay = 5
    began = time.monotonic()
    assert im.say("slow").status_code == 200
    assert time.monotonic() - began < 1
    poll(lambda: im.sim.ai_requests)
    assert not im.sim.delivered
    assert im.sim.wait(1)[0].text.startswith("You said: slow")
    assert time.monotonic() - began >= 5


def test_one_conversation_waits_and_others_do_not(im):
    im.sim.ai_delay = 1
    began = time.monotonic()
    for user in ("jared", "lin"):
        for number in range(2):
            im.say(f"{user} {number}", user=user)
    texts = [m.text.split(" (")[0][10:] for m in im.sim.wait(4)]
    assert 2 <= time.monotonic() - began < 3.5
    assert [text for text in texts if "jared" in text] == ["jared 0", "jared 1"]
    assert [text for text in texts if "lin" in text] == ["lin 0", "lin 1"]


def test_the_user_is_told_when_the_ai_fails_and_the_memory_is_not_spoilt(im):
    error = {"type": "error", "error": {"type": "x", "message": "balance (1008)"}}
    im.sim.ai_fault = lambda asked: (402, error)
    im.say("first")
    assert "额度" in im.sim.wait(1)[0].text
    im.sim.ai_fault = lambda asked: None
    im.say("second")
    assert im.sim.wait(2)[1].text == "You said: second (question 1 of our chat)"


@pytest.mark.parametrize("fault", ["lost", "late", 60007, 91000])
def test_a_failed_rest_call_is_repeated_and_shown_once(im, fault):
    faults = [fault, fault]
    im.sim.fault = lambda command, body: faults.pop() if faults else None
    im.say("hello")
    poll(lambda: not faults and im.client.get("/healthz").get_json()["in_work"] == 0)
    assert len(im.sim.wait(1)) == 1
    tries = [body for command, body in im.sim.calls if command == "openim/sendmsg"]
    assert len(tries) == 3
    assert tries[0] == tries[1] == tries[2]


def test_an_answer_outlives_a_longer_failure_of_im(im):
    faults = [20004] * 4
    im.sim.fault = lambda command, body: faults.pop() if faults else None
    im.say("hello")
    assert im.sim.wait(1)[0].text == "You said: hello (question 1 of our chat)"
    assert len(im.sim.ai_requests) == 1  # the kept answer was sent, not a new one


def test_a_final_error_of_im_sets_the_message_aside(im, caplog):
    im.sim.fault = lambda command, body: 20003
    im.say("hello")
    poll(lambda: im.client.get("/healthz").get_json()["set_aside"] == 1)
    assert "20003" in caplog.text and "does not exist" in caplog.text
    im.sim.fault = lambda command, body: None
    im.say("next")
    assert im.sim.wait(1)[0].text.startswith("You said: next")


def test_a_usersig_that_expired_is_made_anew_once(sim):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    client._sig = usersig.gen_user_sig(APPID, KEY, "administrator", 1, now=1700000000)
    client._renew_at = time.time() + 1000
    client.create_robot("@RBT#009")
    assert "@RBT#009" in sim.robots


@responses.activate
def test_a_wrong_key_is_not_tried_again():
    url = "https://console.tim.qq.com/v4/openim/sendmsg"
    refusal = {"ActionStatus": "FAIL", "ErrorCode": 70009, "ErrorInfo": "sig verify"}
    responses.post(url, json=refusal)
    client = tim.Client("https://console.tim.qq.com", APPID, "wrong", "administrator")
    with pytest.raises(tim.IMError, match="70009.*IM_KEY is not the key") as caught:
        message = tim.Message("id", "@RBT#001", "jared", "hi")
        client.send(message, text_body("hello")[0], 7, 0, True)
    assert not caught.value.retry
    [call] = responses.calls
    assert json.loads(call.request.body) == {
        "From_Account": "@RBT#001",
        "To_Account": "jared",
        "SyncOtherMachine": 2,
        "MsgSeq": 7 * tim.PARTS,
        "MsgRandom": tim.numbers("id", 7, 0)[1],
        "MsgBody": text_body("hello"),
        "ForbidCallbackControl": [
            "ForbidBeforeSendMsgCallback",
            "ForbidAfterSendMsgCallback",
        ],
    }
    query = call.request.params
    assert query["contenttype"] == "json" and query["identifier"] == "administrator"


def test_create_robot_makes_one_that_can_be_written_to(im):
    client = tim.Client(im.sim.url, APPID, KEY, "administrator")
    client.create_robot("@RBT#new", "Newcomer")
    robots = dict(im.sim.robots)
    client.create_robot("@RBT#new", "Newcomer")
    assert im.sim.robots == robots
    im.say("welcome", robot="@RBT#new")
    assert im.sim.wait(1)[0].robot == "@RBT#new"


@pytest.fixture
def flask(sim, tmp_path):
    """Return a function that runs a command of `flask --app botserver`."""
    env = BotProcess(sim, str(tmp_path)).env

    def run(*words, **settings):
        settings = {name: str(value) for name, value in settings.items()}
        return subprocess.run(
            [sys.executable, "-m", "flask", "--app", "botserver", *words],
            cwd=HERE,
            env={**env, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_robots_are_made_listed_and_deleted_by_command(sim, flask):
    done = flask("create-robot", "@RBT#cli", "--nick", "Clio")
    assert done.returncode == 0 and sim.robots["@RBT#cli"] == "Clio", done.stderr
    assert flask("robots").stdout.split() == ["@RBT#001", "@RBT#002", "@RBT#cli"]
    assert flask("delete-robot", "@RBT#cli").returncode == 0
    assert "@RBT#cli" not in sim.robots
    done = flask("create-robot", "robot")
    assert done.returncode == 1
    assert "must start with @RBT#" in done.stderr and "Traceback" not in done.stderr
    done = flask("create-robot", "@RBT#x", IM_KEY="wrong")
    assert done.returncode == 1 and "IM_KEY is not the key" in done.stderr


def test_the_ai_can_be_asked_by_command(sim, flask):
    done = flask("ask", "hello")
    assert done.stdout.strip() == "You said: hello (question 1 of our chat)"
    done = flask("ask", "hello", AI_SECRET_KEY="wrong")
    assert done.returncode == 1
    assert "HTTP 401" in done.stderr and "2049" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_usersig_is_made_by_command(flask):
    sig = flask("usersig", "jared", "--expire", "60").stdout.strip()
    assert usersig.check_user_sig(KEY, sig)["TLS.identifier"] == "jared"


def test_what_was_set_aside_is_listed_and_put_back_by_command(sim, flask, tmp_path):
    sim.fault = lambda command, body: 20003
    bot = BotProcess(sim, str(tmp_path)).start()
    try:
        event = sim.say("jared", "@RBT#001", "hello")
        health = f"{bot.url}/healthz"
        poll(lambda: requests.get(health).json()["set_aside"] == 1)
        done = flask("failed")
        assert str(event["MsgRandom"]) in done.stdout and "20003" in done.stdout
        assert done.stdout.startswith("$'@RBT#001\\tjared\\t")
        sim.fault = lambda command, body: None
        assert flask("retry").stdout == "1 put back.\n"
        assert sim.wait(1)[0].text == "You said: hello (question 1 of our chat)"
    finally:
        bot.stop()


def test_the_doctor_finds_nothing_wrong_with_a_good_set_up(flask):
    done = flask("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok  ") == 5 and "FAIL" not in done.stdout
    assert "/im" in done.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"IM_SDKAPPID": ""}, "IM_SDKAPPID is missing"),
        ({"IM_CALLBACK_TOKEN": ""}, "IM_CALLBACK_TOKEN is missing"),
        ({"IM_CALLBACK_TOKEN": "", "ALLOW_UNSIGNED": 1}, "anybody can spend"),
        ({"IM_KEY": "wrong"}, "70009"),
        ({"IM_SDKAPPID": 1400000009}, "70020"),
        ({"IM_ADMIN": "jared"}, "60010"),
        ({"IM_API_URL": "http://127.0.0.1:1"}, "no answer (ConnectionError)"),
        ({"AI_SECRET_KEY": "wrong"}, "2049"),
        ({"AI_BASE_URL": "http://127.0.0.1:1"}, "ConnectionError"),
        ({"AI_PROVIDER": "nobody"}, "AI_PROVIDER must be one of"),
        ({"DATABASE": "/nowhere/bot.db"}, "/nowhere/bot.db cannot be made there"),
        ({"fault": 60026}, "set IM_API_URL to that region's domain"),
        ({"fault": 60020}, "the package has expired or is unpaid"),
        ({"robots": {}}, "there is no robot yet"),
        ({"skew": 3600}, "this server's clock is"),
        ({"ROBOTS": "/nowhere.toml"}, "/nowhere.toml, which is not there"),
    ],
    ids=str,
)
def test_the_doctor_names_the_fault(sim, flask, settings, says):
    settings = dict(settings)
    if code := settings.pop("fault", None):
        sim.fault = lambda command, body: code
    sim.robots = settings.pop("robots", sim.robots)
    sim.skew = settings.pop("skew", 0)
    done = flask("doctor", **settings)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_stand_in_checks_what_it_is_sent(sim):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    for body, code in [
        ({"To_Account": "jared", "MsgBody": text_body("x")}, 10004),
        ({"To_Account": "jared", "MsgRandom": "1", "MsgBody": text_body("x")}, 10004),
        ({"To_Account": "nobody", "MsgRandom": 1, "MsgBody": text_body("x")}, 90012),
        ({"To_Account": "jared", "MsgRandom": 1, "MsgBody": []}, 90002),
        (
            {"To_Account": "jared", "MsgRandom": 1, "MsgBody": text_body("好" * 5000)},
            93000,
        ),
        ({"To_Account": "jared", "MsgRandom": 1, "MsgBody": [], "Extra": 1}, 10004),
    ]:
        with pytest.raises(tim.IMError) as caught:
            client.call("openim/sendmsg", body)
        assert caught.value.code == code
    for identity, code in [
        ((APPID, "wrong key", "administrator"), 70009),
        ((APPID + 1, KEY, "administrator"), 70020),
        ((APPID, KEY, "jared"), 60010),
    ]:
        with pytest.raises(tim.IMError) as caught:
            tim.Client(sim.url, *identity).create_robot("@RBT#x")
        assert caught.value.code == code


def test_every_missing_or_wrong_setting_is_named_at_once():
    env = {
        "IM_SDKAPPID": "abc",
        "IM_KEY": " ",
        "AI_PROVIDER": "nobody",
        "WORKER_THREADS": "0",
        "AI_TIMEOUT": "nan",
        "AI_EXTRA_BODY": "[1]",
        "GROUP_MEMORY": "all",
        "IM_API_URL": "console.tim.qq.com",
    }
    with pytest.raises(ConfigError) as caught:
        Config.from_env(env)
    for name in (*env, "IM_CALLBACK_TOKEN"):
        assert name in str(caught.value)
    assert "minimax" in str(caught.value)  # the names that would be right
    with pytest.raises(ConfigError, match="AI_SECRET_KEY is missing"):
        Config.from_env({"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"})


def test_settings_are_read_and_secrets_are_not_shown():
    config = Config.from_env(
        {
            "IM_SDKAPPID": "1400000000",
            "IM_KEY": "the key\n",
            "IM_CALLBACK_TOKEN": "one, two",
            "AI_SECRET_KEY": "the ai key",
            "AI_MODEL": "",
            "AI_EXTRA_BODY": '{"temperature": 0.5}',
        }
    )
    assert config.im_key == "the key"
    assert config.im_callback_token == ("one", "two")
    assert config.ai_extra_body == {"temperature": 0.5}
    assert config.ai_timeout == 60
    for secret in ("the key", "the ai key", "one"):
        assert secret not in repr(config)


@pytest.mark.parametrize(
    "settings", [{"IM_KEY": "", "AI_TIMEOUT": "x"}, {"DATABASE": "/"}]
)
def test_a_wrong_setting_stops_the_start(sim, tmp_path, settings):
    bot = BotProcess(sim, str(tmp_path), **settings).launch()
    assert bot.process.wait(20) != 0
    log = bot.log.read_text()
    assert all(name in log for name in settings)
    assert "Traceback" not in log


STORY = "".join(
    f"第{number}句话，很短。 It is short. 😀\n\n" for number in range(40)
).strip()


@pytest.mark.parametrize("place", ["one-to-one", "group"])
@pytest.mark.parametrize("mode", tim.MODES)
def test_every_mode_ends_closed_and_true_while_im_fails(sim, make_app, mode, place):
    """A twentieth of the REST calls fails, in every way."""
    client = make_app(reply_mode=mode, rate_limit=0).test_client()
    im, chance = Caller(sim, client), random.Random(f"{mode} {place}")
    faults = ["lost", "late", 60007, 91000, 20028, 10002]
    sim.fault = lambda command, body: (
        chance.choice(faults) if chance.random() < 0.05 else None
    )
    sim.ai_answer, sim.ai_pace = (lambda messages: STORY), 0.004
    asked = {}
    for number in range(16):
        user, group = f"user{number}", f"@TGS#{number}"
        if place == "group":
            sim.groups[group] = {user}
            im.post(sim.say_in_group(user, group, "tell", ["@RBT#001"], TopicId="t"))
            asked[group] = f"@{user} {STORY}"
        else:
            sim.users.add(user)
            im.say("tell", user=user)
            asked[user] = STORY
    poll(lambda: len({m.chat for m in sim.delivered}) == 16 and idle(im), 60)
    assert all(message.closed and not message.failed for message in sim.delivered)
    shown = []
    for chat, story in asked.items():
        messages = [m for m in sim.delivered if m.chat == chat]
        assert "".join(m.text for m in messages) == story
        shown.append(len(messages[0].states))
        assert mode != "whole" or shown[-1] == 1
        if place == "group":
            assert messages[0].body["TopicId"] == "t"
            at = {"GroupAtAllFlag": 0, "GroupAt_Account": story[1:].split()[0]}
            assert mode == "stream" or messages[0].body["GroupAtInfo"] == [at]
    assert mode == "whole" or sum(shown) > 2 * 16  # they grew


def idle(im):
    state = im.client.get("/healthz").get_json()
    return state["waiting"] == state["in_work"] == 0


@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_a_growing_mode_that_im_refuses_becomes_plain_text(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    refused = {"modify": "TIMTextElem", "custom": "TIMCustomElem"}.get(mode)

    def fault(command, body):
        kind = body["MsgBody"][0]["MsgType"]
        text = body["MsgBody"][0]["MsgContent"].get("Text")
        return (
            10004
            if kind == refused and text in (None, "…") or "Stream" in kind
            else None
        )

    sim.fault = fault
    im.say("hello")
    [answer] = sim.wait(1)
    assert answer.text == "You said: hello (question 1 of our chat)"
    assert answer.body["MsgBody"][0]["MsgType"] == "TIMTextElem"


def test_answers_cut_by_a_crash_end_closed_and_true(tmp_path):
    """kill -9 while three robots speak, each in its own mode; then a restart."""
    modes = {"@RBT#001": "modify", "@RBT#002": "custom", "@RBT#003": "stream"}
    toml = "".join(f'["{name}"]\nreply_mode = "{modes[name]}"\n' for name in modes)
    tmp_path.joinpath("robots.toml").write_text(toml)
    with running(ROBOTS=tmp_path / "robots.toml", BOT_LANGUAGE="en") as (sim, bot):
        sim.robots |= dict.fromkeys(modes, "")
        sim.ai_answer, sim.ai_pace = (lambda messages: STORY), 0.05
        for robot in modes:
            sim.say("jared", robot, "tell")
        poll(lambda: len(sim.delivered) == 3)
        poll(lambda: all(len(m.text) > 20 for m in sim.delivered))
        bot.stop(signal.SIGKILL)
        sim.ai_pace = 0
        assert not any(message.closed for message in sim.delivered)
        bot.start()
        health = f"{bot.url}/healthz"
        poll(lambda: requests.get(health).json()["oldest"] == 0, 30)
        assert all(message.closed for message in sim.delivered)
        by_robot = {m.robot: m for m in sim.delivered}  # the last of each
        assert {m.text for m in by_robot.values()} == {STORY}
        assert len(sim.delivered) == 4
        broken = next(m for m in sim.delivered if m.text != STORY)
        assert broken.robot == "@RBT#003"
        assert broken.text.endswith("(The answer was cut. Here it is again.)")


@pytest.mark.parametrize("mode", tim.MODES)
def test_an_answer_that_breaks_off_says_so(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode, bot_language="en").test_client())
    sim.ai_answer, sim.ai_pace = (lambda messages: STORY), 0.01
    sim.break_after = 30
    im.say("tell")
    poll(lambda: sim.delivered and idle(im))
    [message] = sim.delivered
    assert message.closed
    if mode == "whole":
        assert message.text == "The AI service is busy. Please try again in a moment."
    else:
        assert message.text.startswith(STORY[:40])
        assert message.text.endswith(
            "(The answer was cut: The AI service is busy. "
            "Please try again in a moment.)"
        )
    sim.break_after = 0
    im.say("again")
    poll(lambda: len(sim.delivered) > 1 and idle(im))
    assert [m["role"] for m in sim.ai_requests[-1]["messages"]] == ["system", "user"]


def test_a_failure_in_custom_mode_is_shown_as_one(sim, make_app):
    im = Caller(sim, make_app(reply_mode="custom").test_client())
    sim.ai_fault = lambda asked: (401, {"error": {"message": "no (1004)"}})
    im.say("hello")
    poll(lambda: sim.delivered and idle(im))
    assert sim.delivered[0].failed and sim.delivered[0].closed


@pytest.mark.parametrize("how", ["/stop", "停止", "button"])
@pytest.mark.parametrize("mode", tim.MODES)
def test_a_stop_ends_the_answer_within_a_second(sim, make_app, mode, how):
    im = Caller(sim, make_app(reply_mode=mode, bot_language="en").test_client())
    sim.ai_answer, sim.ai_pace = (lambda messages: STORY), 0.05
    im.say("tell")
    poll(
        lambda: sim.ai_requests and (mode == "whole" or len(sim.delivered[0].text) > 8)
    )
    im.say("next question")
    began = time.monotonic()
    if how == "button":
        press = {"chatbotPlugin": 2, "src": 22, "msgKey": "x"}
        content = {"Data": json.dumps(press)}
        im.say(MsgBody=[{"MsgType": "TIMCustomElem", "MsgContent": content}])
    else:
        im.say(how)
    poll(lambda: sim.ai_ended == 1)
    assert time.monotonic() - began < 1
    sim.ai_pace = 0
    poll(lambda: len(sim.ai_requests) == 2 and idle(im))
    assert all(message.closed for message in sim.delivered)
    stopped = next(m for m in sim.delivered if "(stopped)" in m.text)
    assert mode == "whole" or stopped.text.startswith(STORY[:8])
    told = [m for m in sim.delivered if m.text == "I have stopped."]
    assert len(told) == (how != "button")


def test_a_stop_reaches_an_answer_in_another_process(tmp_path):
    with running(WEB_CONCURRENCY=2, BOT_LANGUAGE="en") as (sim, bot):
        sim.ai_delay = 10
        users = [f"user{number}" for number in range(8)]
        sim.users |= set(users)
        for user in users:
            sim.say(user, "@RBT#001", "slow")
        poll(lambda: len(sim.ai_requests) == 8)
        began = time.monotonic()
        for user in users:
            sim.say(user, "@RBT#001", "/stop")
        sim.wait(16)
        assert time.monotonic() - began < 5


def test_long_answers_arrive_in_order_and_whole(im):
    story = STORY * 30
    im.sim.ai_answer = lambda messages: story
    im.say("tell")
    poll(lambda: im.sim.delivered and idle(im))
    parts = im.sim.delivered
    assert len(parts) > 3
    assert [m.number for m in parts] == sorted({m.number for m in parts})
    assert "".join("".join(m.text.split()) for m in parts) == "".join(story.split())


PIECES = st.one_of(
    st.sampled_from(["\n", "\n\n", "。", "，", ". ", " ", '"', "\\", "\t", "\r\n"]),
    st.sampled_from(["👨‍👩‍👧‍👦", "👍🏽", "🇨🇳", "e\u0301", "1️⃣", "각", "好" * 50]),
    st.text(max_size=30),
    st.sampled_from(
        ["\n```python\nx = 1\n", "\n```\n", "\n| a | b |\n|---|---|\n| 1 | 2 |\n"]
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=60), st.integers(1, 400))
def test_parts_are_under_the_limit_and_together_the_text(pieces, times):
    text = tim.clean("".join(pieces) * times)[:40_000]
    parts = tim.split(text, 2000)
    assert all(tim.measure(part) <= 2000 for part in parts)
    assert all(part for part in parts) or not text
    assert unfenced("".join(parts), text)


def unfenced(joined, text):
    """Say whether `joined` is `text` with nothing but fences and table heads added."""
    place = 0
    for character in text:
        place = joined.find(character, place) + 1
        if not place:
            return False
    return True


def test_a_million_characters_are_split_and_whole():
    chance = random.Random(4)
    words = [
        "你好，世界。",
        "plain words ",
        "👨‍👩‍👧‍👦",
        "🇨🇳🇩🇪",
        '"quoted" \\ ',
        "e\u0301\u0302",
        "\n",
        "\n\n",
    ]
    text = "".join(chance.choices(words, k=250_000))[:1_000_000]
    parts = tim.split(text)
    assert "".join(parts) == text
    assert max(tim.measure(part) for part in parts) <= tim.PART_BYTES < 11_000
    for before, after in zip(parts, parts[1:], strict=False):
        assert not after.startswith(("\u200d", "\u0301", "\u0302"))
        assert not before.endswith("\u200d")
    assert len(parts) < 1.6 * tim.measure(text) / tim.PART_BYTES


def test_code_and_tables_are_closed_and_opened_again():
    code = "Look:\n```python\n" + "print('hello')\n" * 400 + "```\nDone."
    parts = tim.split(code, 3000)
    assert all(part.count("```") == 2 for part in parts)
    assert all(part.startswith("```python\n") for part in parts[1:])
    table = "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 900
    parts = tim.split(table, 3000)
    assert len(parts) > 2
    assert all(part.startswith("| a | b |\n|---|---|\n| 1 |") for part in parts)


@pytest.mark.parametrize(
    ("text", "says"),
    [("/help", "/clear"), ("帮助", "/clear"), (" /HELP ", "/clear"), ("清空", "忘掉")],
)
def test_commands_are_answered_without_the_ai(im, text, says):
    im.say(text)
    assert says in im.sim.wait(1)[0].text
    assert not im.sim.ai_requests


def test_a_command_within_a_text_is_none(im):
    im.say("what does /help do?")
    assert "You said" in im.sim.wait(1)[0].text


def test_clear_forgets_this_chat_and_no_other(im):
    for number, (user, text) in enumerate(
        [
            ("jared", "one"),
            ("lin", "two"),
            ("jared", "/clear"),
            ("jared", "3"),
            ("lin", "4"),
        ]
    ):
        im.say(text, user=user)
        im.sim.wait(number + 1)
    assert im.sim.delivered[3].text == "You said: 3 (question 1 of our chat)"
    assert im.sim.delivered[4].text == "You said: 4 (question 2 of our chat)"


@pytest.mark.parametrize(("memory", "count"), [("group", 2), ("member", 1)])
def test_group_memory_is_the_groups_or_each_members(sim, make_app, memory, count):
    im = Caller(sim, make_app(group_memory=memory).test_client())
    for number, user in enumerate(["jared", "lin"]):
        im.post(sim.say_in_group(user, "@TGS#demo", f"I am {number}", ["@RBT#001"]))
        sim.wait(number + 1)
    said = f"You said: {'lin: ' if count == 2 else ''}I am 1 (question {count} of"
    assert sim.delivered[1].text.startswith(f"@lin {said}")


def test_what_is_said_alone_never_reaches_a_group(im):
    im.say("a secret")
    im.sim.wait(1)
    im.post(im.sim.say_in_group("jared", "@TGS#demo", "hello", ["@RBT#001"]))
    im.sim.wait(2)
    assert "a secret" not in json.dumps(im.sim.ai_requests[1])


def test_two_robots_answer_each_in_its_persona(sim, make_app, tmp_path):
    file = tmp_path / "robots.toml"
    file.write_text(
        """
        ["@RBT#001"]
        nick = "Ada"
        system_prompt = "You are Ada."
        ["@RBT#002"]
        nick = "Echo"
        provider = "echo"
        """
    )
    env = {
        "IM_SDKAPPID": "1",
        "IM_KEY": "k",
        "ALLOW_UNSIGNED": "1",
        "AI_SECRET_KEY": "k",
    }
    robots = Config.from_env({**env, "ROBOTS": str(file)}).robots
    im = Caller(sim, make_app(robots=robots).test_client())
    text = text_body("＠Ada @Echo what is your name?")
    both = ["@RBT#001", "@RBT#002"]
    im.post(sim.say_in_group("jared", "@TGS#demo", "", both, MsgBody=text))
    answers = {m.robot: m.text for m in sim.wait(2)}
    assert answers["@RBT#002"] == "@jared jared: what is your name?"
    assert "what is your name? (question 1" in answers["@RBT#001"]
    [asked] = sim.ai_requests
    assert asked["messages"][0] == {"role": "system", "content": "You are Ada."}


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('[robot]\nnick = "x"', "robot is not a robot"),
        ('["@RBT#1"]\ncolour = "x"', "unknown key colour"),
        ('["@RBT#1"]\nprovider = "nobody"', "@RBT#1: provider must be one of: minimax"),
        ('["@RBT#1"]\nreply_mode = 5', "@RBT#1: reply_mode must be a text"),
        ("[", "cannot be read"),
        (None, "is not there"),
    ],
)
def test_a_wrong_robots_file_stops_the_start(tmp_path, toml, says):
    file = tmp_path / "personas.toml"
    if toml:
        file.write_text(toml)
    with pytest.raises(ConfigError, match=re.escape(says)):
        Config.from_env({"ROBOTS": str(file)})


def test_strangers_are_told_once_and_not_answered(sim, make_app):
    app = make_app(allow_users=("lin",), allow_groups=("@TGS#ours",))
    im = Caller(sim, app.test_client())
    for _ in range(3):
        im.say("hello")
    im.post(sim.say_in_group("lin", "@TGS#demo", "hello", ["@RBT#001"]))
    im.say("hello", user="lin")
    sim.wait(3)
    poll(lambda: idle(im))
    assert [m.text.split("，")[0] for m in sim.delivered if m.chat == "jared"] == [
        "抱歉"
    ]
    assert len(sim.delivered) == 3 and len(sim.ai_requests) == 1


def test_a_user_who_is_too_fast_is_told_once(sim, make_app):
    im = Caller(sim, make_app(rate_limit=3).test_client())
    for number in range(8):
        im.say(str(number))
    im.say("another user", user="lin")
    poll(lambda: len(sim.delivered) == 5 and idle(im))
    said = [m.text for m in sim.delivered if m.chat == "jared"]
    assert [text[:11] for text in said if "You" in text] == [
        f"You said: {number}" for number in range(3)
    ]
    assert ["太快" in text for text in said].count(True) == 1


def test_what_there_is_room_for_again_is_taken(sim, make_app, monkeypatch):
    app = make_app()
    kept, tries = app.extensions["bot"].store, []
    add = kept.add

    def full_at_first(*values):
        tries.append(values)
        return len(tries) > 1 and add(*values)

    monkeypatch.setattr(kept, "add", full_at_first)
    Caller(sim, app.test_client()).say("hello")
    assert "hello" in sim.wait(1)[0].text and len(tries) == 2


def test_a_question_is_counted_once_however_often_it_is_tried(sim, make_app):
    im = Caller(sim, make_app(rate_limit=1, reply_mode="modify").test_client())
    faults = [60011] * 6
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("hello")
    poll(lambda: not faults and idle(im))
    assert [m.text for m in sim.delivered] == [
        "You said: hello (question 1 of our chat)"
    ]


def test_a_stop_is_refused_as_any_message_is(sim, make_app):
    im = Caller(sim, make_app(allow_users=("lin",)).test_client())
    sim.ai_answer, sim.ai_pace = (lambda messages: STORY[:80]), 0.05
    im.post(sim.say_in_group("lin", "@TGS#demo", "tell", ["@RBT#001"]))
    poll(lambda: sim.ai_requests)
    for _ in range(5):
        im.post(sim.say_in_group("jared", "@TGS#demo", "/stop", ["@RBT#001"]))
    poll(lambda: len(sim.delivered) == 2 and idle(im))
    assert {m.text.split("，")[0] for m in sim.delivered} == {
        "@jared 抱歉",
        f"@lin {STORY[:80]}".split("，")[0],
    }
    assert not any("已停止" in m.text for m in sim.delivered)


def test_a_stream_is_kept_alive_only_while_it_is_open(sim, monkeypatch):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    message = tim.Message("id", "@RBT#001", "jared", "hi")
    stream = tim.Streamed(client, message, 1, {}, lambda progress: None)
    stream.nudge()
    assert not sim.calls
    stream.open()
    stream.grow("half")
    stream.nudge()
    assert sim.delivered[0].index == 2
    monkeypatch.setattr(stream, "idle", 0.0)
    stream.nudge()
    assert (sim.delivered[0].index, sim.delivered[0].text) == (3, "half")
    stream.close("half and half")
    stream.nudge()
    assert (sim.delivered[0].index, sim.delivered[0].closed) == (4, True)
    assert [m.text for m in sim.delivered] == ["half and half"]


def test_a_conversation_that_is_full_is_told_once(sim, make_app):
    im = Caller(sim, make_app(max_waiting=2).test_client())
    sim.ai_delay = 1
    for number in range(6):
        im.say(str(number))
    [notice] = sim.wait(1)
    assert "消息太多" in notice.text
    poll(lambda: len(sim.delivered) == 3 and idle(im))


def test_pictures_go_to_services_that_see(sim, make_app, tmp_path):
    picture = {
        "MsgType": "TIMImageElem",
        "MsgContent": {
            "UUID": "u",
            "ImageFormat": 1,
            "ImageInfoArray": [
                {"Type": 1, "Size": 9, "Width": 1, "Height": 1, "URL": "https://x/1"},
                {"Type": 2, "Size": 9, "Width": 1, "Height": 1, "URL": "https://x/2"},
            ],
        },
    }
    im = Caller(sim, make_app().test_client())
    im.say(MsgBody=[picture, *text_body("what is it?")])
    sim.wait(1)
    assert sim.ai_requests[0]["messages"][-1]["content"] == [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "https://x/2"}},
    ]
    another = str(tmp_path / "another.db")  # else the first bot may take the question
    app = make_app(ai_provider="deepseek", database=another)
    im = Caller(sim, app.test_client())
    im.say(MsgBody=[picture])
    assert "图片" in sim.wait(2)[1].text
    assert len(sim.ai_requests) == 1


@pytest.mark.parametrize("kind", sorted(tim.STRANGE))
def test_what_the_bot_cannot_read_gets_a_friendly_sentence(im, kind):
    im.say(MsgBody=[{"MsgType": kind, "MsgContent": {}}])
    assert "看不懂" in im.sim.wait(1)[0].text
    assert not im.sim.ai_requests


def test_every_text_is_there_in_every_language():
    assert set(TEXTS["zh"]) == set(TEXTS["en"])
    assert all(text.strip() for texts in TEXTS.values() for text in texts.values())


READMES = [HERE / "README.md", HERE / "README.zh-CN.md"]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_setting_is_in_the_readme_and_no_other(readme):
    settings = {item.name.upper() for item in fields(Config)}
    settings = settings - {"AI_SECRET_KEYS"} | {"AI_SECRET_KEY_"}
    rows = re.findall(r"^\| (`[A-Z].*?) \|", readme.read_text("utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([A-Z_]+)…?`", row)}
    assert named - {"REPLY_MODE"} == settings - {"REPLY_MODE"}
    defaults = {
        item.name.upper(): str(item.default)
        for item in fields(Config)
        if isinstance(item.default, int | float | str) and str(item.default)
    }
    for row in readme.read_text("utf-8").splitlines():
        if match := re.match(r"\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", row):
            name, default = match.groups()
            if name in defaults and re.fullmatch(r"[a-z0-9.:/_]+", default):
                assert float_or_text(default) == float_or_text(defaults[name]), name


def float_or_text(text):
    try:
        return float({"False": "0"}.get(text, text))
    except ValueError:
        return text


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_examples_of_the_readme_work(readme, sim, make_app, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)
    names = {
        "random": random,
        "replace": replace,
        "PROVIDERS": dict(providers.PROVIDERS),
    }
    names |= {"MODES": dict(tim.MODES), "Whole": tim.Whole}
    names |= {"Service": providers.Service, "openai_chat": providers.openai_chat}
    names |= {"SQLiteStore": store.SQLiteStore}
    for block in blocks:
        exec(block, names)
    mine = providers.Provider(names["PROVIDERS"]["mine"])
    assert mine.body()["temperature"] == 0.5
    dice = providers.Provider(
        names["PROVIDERS"]["dice"], sim.ai_key, url=f"{sim.url}/v1"
    )
    for text, answer in [("/dice", r"🎲 [1-6]"), ("hello", r"You said: hello .*")]:
        chat = dice.chat([{"role": "user", "content": text}], providers.Call(5))
        assert re.fullmatch(answer, providers.joined(chat))
    monkeypatch.setattr(tim, "MODES", names["MODES"])
    monkeypatch.chdir(tmp_path)
    app = make_app(reply_mode="signed")
    app.extensions["bot"].store = names["AuditedStore"](str(tmp_path / "audited.db"))
    Caller(sim, app.test_client()).say("hello")
    assert sim.wait(1)[0].text.endswith("\n\n— written by an AI")
    poll(lambda: (tmp_path / "answered.txt").exists())
    toml = re.search(r"```toml\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)[1]
    tmp_path.joinpath("robots.toml").write_text(toml)
    config = Config.from_env(
        {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1", "AI_SECRET_KEY": "k"}
    )
    assert config.robots["@RBT#002"].provider == "ollama"


def test_both_readmes_hold_the_same_code():
    blocks = [
        re.findall(r"```.*?```", readme.read_text("utf-8"), re.DOTALL)
        for readme in READMES
    ]
    assert blocks[0] == blocks[1]
    procfile = HERE.joinpath("Procfile").read_text()
    options = "--worker-class gthread --threads 8 --graceful-timeout 25"
    for text in [procfile, *blocks[0][3:4], *blocks[0][7:8]]:
        assert options in text


def test_two_processes_answer_each_message_once_and_in_order(tmp_path):
    """500 messages of 100 users, every callback delivered twice."""
    with running(WEB_CONCURRENCY=2) as (sim, bot):
        sim.users |= {f"user{number}" for number in range(100)}
        sim.ai_delay = 0.05
        sim.bot_url = ""  # the events first: they are delivered below
        events = {
            user: [sim.say(f"user{user}", "@RBT#001", f"q{n}") for n in range(5)]
            for user in range(100)
        }
        sim.bot_url = bot.url

        def deliver(share):
            with requests.Session() as http:
                for number in range(5):
                    for user in share:
                        for _ in range(2):
                            answer = sim.callback(events[user][number], http)
                            assert answer.json()["ActionStatus"] == "OK"

        threads = [
            threading.Thread(target=deliver, args=(range(start, 100, 4),))
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sim.wait(500, timeout=60)
        poll(lambda: requests.get(f"{bot.url}/healthz").json()["in_work"] == 0)
        assert len(sim.delivered) == 500
        for user in range(100):
            answers = [m for m in sim.delivered if m.chat == f"user{user}"]
            texts = [m.text.split(" (")[0] for m in answers]
            assert texts == [f"You said: q{number}" for number in range(5)]
            assert [m.number for m in answers] == sorted(m.number for m in answers)
        assert len(sim.ai_requests) == 500
        assert set(pids(bot)) and "Traceback" not in bot.log.read_text()


def pids(bot):
    return [line for line in bot.log.read_text().splitlines() if "Booting" in line]


def test_the_demonstration_shows_questions_and_answers():
    done = subprocess.run(
        [sys.executable, "simulator.py"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "[one-to-one] jared: 你好" in done.stdout
    assert "[one-to-one] Robot: You said: 你好" in done.stdout
    assert "[group @TGS#demo] Robot: @lin You said: lin: hello from" in done.stdout
    assert not done.stderr


def poll(condition, timeout=20):
    """Wait until a condition holds, at most `timeout` seconds; return its value."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return value


def in_threads(count, work):
    """Run work(number) in threads that begin at the same moment; return the results."""
    results, barrier = {}, threading.Barrier(count)

    def run(number):
        barrier.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == count, "a thread failed"
    return [results[number] for number in range(count)]


class RedisServer:
    """A real redis-server of our own."""

    def __init__(self, folder, *options):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.options = folder, options
        self.url = f"redis://:hush-hush@127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
            + ["--dir", str(self.folder), "--requirepass", "hush-hush", "--save", ""]
            + ["--appendonly", "yes", "--appendfsync", "always", *self.options],
            stdout=subprocess.DEVNULL,
        )
        poll(self.answers)

    def answers(self):
        assert self.process.poll() is None, "redis-server did not start"
        return self.cli("ping") == "PONG"

    def cli(self, *words):
        command = ["redis-cli", "-p", str(self.port), "-a", "hush-hush", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip()

    def send(self, number):
        self.process.send_signal(number)

    def stop(self):
        self.send(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def redis_or_skip():
    try:
        import redis  # noqa: F401

        missing = "" if shutil.which("redis-server") else "redis-server"
    except ImportError:
        missing = "the package redis"
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"{missing} is not installed")
    elif missing:
        pytest.skip(f"{missing} is not installed")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory):
    redis_or_skip()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_server(tmp_path):
    """A server that a test may stop."""
    redis_or_skip()
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def place(request, tmp_path):
    """Where a store is: what open_store wants to know."""
    if request.param == "sqlite":
        return str(tmp_path / "store.db"), ""
    server = request.getfixturevalue("shared_redis")
    server.cli("flushall")
    return "", server.url


@pytest.fixture
def opened(place):
    """Return a function that opens the store again, as another process would."""
    stores = []

    def again():
        stores.append(open_store(*place))
        return stores[-1]

    yield again
    for each in stores:
        each.close()


@pytest.fixture
def kept(opened):
    return opened()


@pytest.fixture
def sqlite(tmp_path):
    kept = SQLiteStore(str(tmp_path / "store.db"))
    yield kept
    kept.close()


def put(kept, *ids, to="jared"):
    for id in ids:
        assert kept.add(id, to, {"text": f"text of {id}"})


def answer(kept, reply="yes", **options):
    claim = kept.claim()
    assert kept.keep(claim, reply, **options) and kept.finish(claim)
    return claim


def fail(kept, reason="no"):
    claim = kept.claim()
    kept.set_aside(claim, reason)
    return claim


def waiting(kept, conversation):
    return kept.look_up("", conversation, "")[1]


def texts(kept, conversation="jared", limit=10):
    return [(data["text"], reply) for data, reply in kept.history(conversation, limit)]


def test_open_store_picks_redis_if_there_is_a_url(tmp_path):
    redis_or_skip()
    assert isinstance(open_store(str(tmp_path / "a.db"), ""), SQLiteStore)
    assert isinstance(open_store("nowhere/a.db", "redis://127.0.0.1:1"), RedisStore)


def test_an_id_is_accepted_once_waiting_held_answered_and_forgotten(kept):
    put(kept, "1")
    assert not kept.add("1", "jared", {})
    claim = kept.claim()
    assert not kept.add("1", "somebody else", {})
    kept.keep(claim, "yes")
    kept.finish(claim)
    assert not kept.add("1", "jared", {})
    kept.forget("jared")
    assert not kept.add("1", "jared", {})
    assert kept.claim() is None


def test_of_one_id_delivered_at_once_one_is_accepted(kept):
    added = in_threads(8, lambda _: kept.add("1", "jared", {}))
    assert sorted(added) == [False] * 7 + [True]


def test_a_claim_has_all_that_was_given(kept):
    before = time.time() - 1
    data = {"text": "你好 😀\0\ud800 \"'", "list": [1, None]}
    kept.add("a\t1", "群 {x}:1", data)
    claim = kept.claim()
    assert (claim.id, claim.conversation, claim.data) == ("a\t1", "群 {x}:1", data)
    assert (claim.reply, claim.progress) == (None, {})
    assert before < claim.accepted < time.time() + 1
    assert kept.renew([claim]) == []
    assert kept.keep(claim, "好\ud800") and kept.finish(claim)
    assert kept.history("群 {x}:1", 1) == [(data, "好\ud800")]


def test_half_a_surrogate_pair_in_a_name_hurts_nobody(kept):
    names = ["\ud800", "b", "\udfff\0", "d"]
    assert all(in_threads(4, lambda n: kept.add(names[n], names[n], {})))
    assert not kept.add("\ud800", "\ud800", {})
    assert waiting(kept, "\ud800") == 1
    for _ in names:
        kept.set_aside(kept.claim(), "\ud800")


def test_what_was_accepted_outlives_the_process(kept, opened):
    put(kept, "1", "2")
    answer(kept)
    put(kept, "3")
    kept.close()
    later = opened()
    assert not later.add("1", "jared", {})
    assert [answer(later).id, answer(later).id] == ["2", "3"]
    assert [text for text, _ in texts(later)] == [f"text of {n}" for n in (1, 2, 3)]


def test_numbers_grow_also_after_everything_was_pruned(kept):
    put(kept, "1")
    first = answer(kept)
    poll(lambda: kept.prune(0))
    put(kept, "2")
    assert kept.claim().seq > first.seq


def test_a_conversation_is_worked_in_order_one_at_a_time(kept):
    put(kept, "1", "2", "3")
    for id in ("1", "2", "3"):
        claim = kept.claim()
        assert claim.id == id
        assert kept.claim() is None
        kept.finish(claim)
    assert kept.claim() is None


def test_the_oldest_conversation_comes_first(kept):
    for id in "abc":
        put(kept, id, to=id)
    put(kept, "a2", to="a")
    assert [kept.claim().id for _ in range(3)] == ["a", "b", "c"]


def test_every_message_is_acquired_by_exactly_one_of_eight_threads(kept):
    for number in range(80):
        put(kept, str(number), to=str(number))

    def take(_):
        return [claim.id for claim in iter(kept.claim, None)]

    taken = sum(in_threads(8, take), [])
    assert sorted(taken) == sorted(str(number) for number in range(80))


def test_threads_never_share_a_conversation(kept):
    for number in range(60):
        put(kept, str(number), to=str(number % 3))
    busy, order, lock = set(), {"0": [], "1": [], "2": []}, threading.Lock()

    def work(_):
        while kept.stats()["oldest"]:
            if claim := kept.claim():
                with lock:
                    assert claim.conversation not in busy
                    busy.add(claim.conversation)
                    order[claim.conversation].append(int(claim.id))
                time.sleep(0.001)
                with lock:
                    busy.remove(claim.conversation)
                assert kept.finish(claim)

    in_threads(8, work)
    assert order == {str(n): list(range(n, 60, 3)) for n in range(3)}


WORKER = """
import json, sys, threading, time
from store import open_store

kept, name = open_store(*sys.argv[1:3]), sys.argv[3]

def work(number):
    for i in range(25):
        kept.add(f"{name}-{number}-{i}", str(i % 7), {})
    idle = 0
    while idle < 100:
        claim = kept.claim()
        idle = 0 if claim else idle + 1
        if claim is None:
            time.sleep(0.002)
            continue
        began = time.monotonic()
        kept.keep(claim, "yes")
        ended = time.monotonic()
        if kept.finish(claim):
            work = [claim.conversation, claim.seq, claim.id, began, ended]
            sys.stdout.write(json.dumps(work) + "\\n")

threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_two_processes_of_four_threads_lose_repeat_and_mix_up_nothing(kept, place):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, *place, name],
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in outputs] == ["", ""]
    works = [json.loads(line) for out, _ in outputs for line in out.splitlines()]
    ids = [f"{p}-{t}-{i}" for p in "ab" for t in range(4) for i in range(25)]
    assert sorted(work[2] for work in works) == sorted(ids)
    for name in {work[0] for work in works}:
        mine = sorted(work[1:] for work in works if work[0] == name)
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[3] < after[2], "two were at work on one conversation"


def test_a_claim_that_is_not_renewed_goes_to_another(kept, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.05)
    put(kept, "1", "2")
    lost = kept.claim()
    kept.keep(lost, "half", progress={"sent": 1})
    again = poll(kept.claim)
    assert (again.id, again.reply, again.progress) == ("1", "half", {"sent": 1})
    assert kept.renew([lost, again]) == [lost]
    assert not kept.keep(lost, "other")
    assert not kept.finish(lost)
    kept.release(lost, 0)
    kept.set_aside(lost, "no")
    assert kept.stats()["set_aside"] == 0
    assert kept.keep(again, "mine") and kept.finish(again)
    assert texts(kept) == [("text of 1", "mine")]


def test_a_claim_that_is_renewed_stays(kept, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.3)
    put(kept, "1")
    claim = kept.claim()
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        assert kept.renew([claim]) == []
        assert kept.claim() is None
        time.sleep(0.02)
    assert kept.finish(claim)
    assert kept.renew([claim]) == [claim]


def test_a_message_whose_work_was_cut_short_three_times_is_set_aside(
    kept, monkeypatch, caplog
):
    monkeypatch.setattr(store, "LEASE", 0.02)
    put(kept, "bad", "good")
    for _ in range(3):
        assert poll(kept.claim).id == "bad"
    assert poll(kept.claim).id == "good"
    assert [id for id, _, _ in kept.failed()] == ["bad"]
    assert "bad" in caplog.text and "text of" not in caplog.text


def test_a_release_counts_only_if_the_work_failed(kept):
    put(kept, "1")
    for _ in range(10):
        kept.release(kept.claim(), 0)
    for _ in range(3):
        kept.release(kept.claim(), 0, failed=True)
    assert kept.claim() is None
    assert kept.stats()["set_aside"] == 1


def test_a_released_message_waits_and_keeps_its_turn(kept):
    put(kept, "1", "2")
    put(kept, "other", to="other")
    kept.release(kept.claim(), 0.3)
    released = time.monotonic()
    assert kept.claim().id == "other"
    assert kept.claim() is None and kept.due(5) == 0
    assert poll(kept.claim).id == "1"
    assert time.monotonic() - released > 0.25


def test_progress_is_kept_without_and_beside_a_reply(kept):
    put(kept, "1")
    claim = kept.claim()
    assert kept.keep(claim, None, progress={"key": "k"})
    kept.release(claim, 0)
    claim = kept.claim()
    assert (claim.reply, claim.progress) == (None, {"key": "k"})
    assert kept.keep(claim, "yes", remember=False)
    assert kept.keep(claim, None, progress={"sent": 2})
    kept.release(claim, 0)
    claim = kept.claim()
    assert (claim.reply, claim.progress) == ("yes", {"sent": 2})
    kept.finish(claim)
    assert texts(kept) == [], "progress must not make the store remember"


def test_history_gives_the_last_turns_oldest_first(kept, monkeypatch):
    monkeypatch.setattr(store, "REMEMBERED", 6)
    for number in range(8):
        put(kept, str(number))
        answer(kept, f"reply {number}")
    put(kept, "open", to="jared")
    assert texts(kept, limit=0) == []
    assert texts(kept, limit=2) == [("text of 6", "reply 6"), ("text of 7", "reply 7")]
    assert len(texts(kept, limit=6)) == 6
    assert not kept.add("0", "jared", {})


def test_what_is_not_to_be_remembered_or_has_no_reply_is_not_in_the_history(kept):
    put(kept, "1", "2", "3")
    answer(kept, remember=False)
    kept.finish(kept.claim())
    answer(kept, "third")
    assert texts(kept) == [("text of 3", "third")]


def test_forget_deletes_answers_and_failures_of_one_conversation(kept):
    put(kept, "1", "2", "3")
    put(kept, "4", "5", to="other")
    answer(kept)
    fail(kept)
    for _ in range(2):
        claim = kept.claim()
        if claim.conversation == "other":
            kept.keep(claim, "yes")
            kept.finish(claim)
    kept.forget("jared")
    assert texts(kept) == [] and kept.failed() == []
    assert texts(kept, "other") == [("text of 4", "yes")]
    assert kept.retry() == 0
    assert waiting(kept, "jared") == 1
    assert not any(kept.add(id, "jared", {}) for id in "123")


def test_what_ended_is_pruned_in_time_and_what_is_open_never(kept, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    put(kept, *"12345")
    for _ in range(3):
        answer(kept)
    fail(kept)
    assert kept.prune(60) == 0
    assert not kept.add("1", "jared", {})
    assert poll(lambda: kept.prune(0)) == 4
    assert kept.prune(0) == 0
    assert texts(kept) == [] and kept.failed() == []
    assert kept.claim().id == "5"
    put(kept, "1")


def test_stats_say_how_much_waits_is_held_and_failed(kept):
    zero = {"waiting": 0, "in_work": 0, "set_aside": 0, "oldest": 0.0}
    assert kept.stats() == zero
    put(kept, "1", "2", "3")
    put(kept, "4", to="other")
    fail(kept)
    claim = kept.claim()
    seen = kept.stats()
    assert 0 < seen.pop("oldest") < 5
    assert seen == {"waiting": 2, "in_work": 1, "set_aside": 1}
    assert (waiting(kept, "jared"), waiting(kept, "other")) == (2, 1)
    assert waiting(kept, "nobody") == 0
    kept.release(claim, 0)
    assert kept.stats()["in_work"] == 0
    assert (kept.due(10), kept.due(1)) == (2, 1)


def test_what_users_asked_is_counted_once_and_for_a_minute(kept, monkeypatch):
    for id, asker in (("1", "jared"), ("1", "jared"), ("2", "jared"), ("3", "")):
        kept.add(id, "chat", {}, asker)
    kept.finish(kept.claim())
    assert kept.look_up("2", "chat", "jared") == (True, 2, 2)
    assert kept.look_up("4", "chat", "lin") == (False, 2, 0)
    assert kept.look_up("1", "elsewhere", "") == (True, 0, 0)
    monkeypatch.setattr(store, "MINUTE", 1)
    poll(lambda: kept.look_up("2", "chat", "jared") == (True, 2, 0))


def test_limits_hold_for_all_processes_at_once(kept, opened):
    stores = (kept, opened())

    def add(number):
        where = f"chat {number % 8}" if number < 16 else "full"
        asker = "jared" if number < 16 else ""
        limits = {"room": 3, "rate": 5}
        return stores[number % 2].add(str(number), where, {}, asker, **limits)

    added = in_threads(32, add)
    assert added[:16].count(True) == 5 and added[16:].count(True) == 3
    refused = added.index(False)
    assert kept.look_up(str(refused), "full", "jared") == (False, 3, 5)


def test_workers_go_to_the_store_one_at_a_time_while_a_callback_is_there(
    kept, monkeypatch
):
    run, there, seen, free = kept._run, [], [], threading.Event()

    def watched(verb, values):
        if verb == "add":
            free.wait(20)
        else:
            there.append(verb)
            seen.append(len(there))
            time.sleep(0.05)
            there.pop()
        return run(verb, values)

    monkeypatch.setattr(kept, "_run", watched)
    callback = threading.Thread(target=kept.add, args=("1", "jared", {}))
    callback.start()
    poll(lambda: kept._urgent)
    in_threads(4, lambda _: kept.due(1))
    assert max(seen) == 1
    free.set()
    callback.join()
    in_threads(4, lambda _: kept.due(1))
    assert max(seen) > 1


def test_redis_keeps_no_list_of_what_was_asked_long_ago(shared_redis, monkeypatch):
    monkeypatch.setattr(store, "MINUTE", 1)
    shared_redis.cli("flushall")
    kept = RedisStore(shared_redis.url)
    kept.add("1", "chat", {}, "jared")
    assert shared_redis.cli("keys", "*asked*")
    poll(lambda: not shared_redis.cli("keys", "*asked*"))
    kept.close()


def test_a_stop_reaches_the_held_message_only_and_every_process(kept, opened):
    assert not kept.request_stop("jared")
    put(kept, "1", "2")
    put(kept, "3", to="other")
    assert not kept.request_stop("jared")
    claims = [kept.claim(), kept.claim()]
    assert opened().request_stop("jared")
    assert kept.stops(claims) == claims[:1]
    kept.finish(claims[0])
    later = kept.claim()
    assert later.id == "2" and kept.stops([*claims, later]) == []


def test_a_stop_outlives_the_process_that_was_to_stop(kept, monkeypatch):
    put(kept, "1")
    with monkeypatch.context() as patch:
        patch.setattr(store, "LEASE", 0.02)
        lost = kept.claim()
    kept.request_stop("jared")
    again = poll(kept.claim)
    assert kept.stops([lost, again]) == [again]


def test_failed_messages_are_listed_and_come_back_in_their_turn(kept):
    put(kept, *"12345")
    fail(kept, "first")
    claim = kept.claim()
    kept.keep(claim, "reply", progress={"sent": 1})
    kept.set_aside(claim, "second")
    [one, two] = kept.failed()
    assert (one[:2], two[:2]) == (("1", "first"), ("2", "second"))
    assert 0 <= two[2] <= one[2] < 5
    assert kept.failed(1) == [kept.failed()[0][:2] + (pytest.approx(one[2], abs=1),)]
    held = kept.claim()
    assert kept.retry(["2", "3", "unknown"]) == 1
    assert kept.claim() is None, "one claim for a conversation"
    assert kept.finish(held)
    assert kept.retry() == 1
    assert kept.failed() == []
    assert kept.due(5) == 1, "one next for a conversation"
    ids = [answer(kept, "yes").id for _ in range(4)]
    assert ids == list("1245")


def test_a_retried_message_has_its_reply_and_all_its_attempts(kept):
    put(kept, "1")
    for _ in range(2):
        kept.release(kept.claim(), 0, failed=True)
    claim = kept.claim()
    kept.keep(claim, "reply", progress={"sent": 1})
    kept.request_stop("jared")
    kept.set_aside(claim, "no")
    kept.retry()
    for _ in range(3):
        claim = kept.claim()
        assert (claim.reply, claim.progress) == ("reply", {"sent": 1})
        assert kept.stops([claim]) == []
        kept.release(claim, 0, failed=True)
    assert kept.claim() is None


def test_a_record_that_cannot_be_read_is_an_error_then_set_aside(
    kept, place, request, monkeypatch
):
    monkeypatch.setattr(store, "LEASE", 0.02)
    put(kept, "1", "2")
    if place[1]:
        server = request.getfixturevalue("shared_redis")
        server.cli("hset", "{bot}:message:1", "data", "not json")
    else:
        with sqlite3.connect(place[0]) as file:
            file.execute("UPDATE message SET data = 'not json' WHERE id = '1'")
        file.close()

    def taken():
        try:
            return kept.claim()
        except StoreError:
            return None

    assert poll(taken).id == "2"
    assert [id for id, _, _ in kept.failed()] == ["1"]


def test_a_closed_store_says_so(sqlite):
    sqlite.close()
    for verb in (sqlite.claim, sqlite.stats, lambda: sqlite.add("1", "jared", {})):
        with pytest.raises(StoreError):
            verb()


ADDER = """
import sys
from store import open_store
kept = open_store(*sys.argv[1:3])
for number in range(100_000):
    kept.add(str(number), "jared", {})
    print(number, flush=True)
"""


def test_what_was_acknowledged_outlives_a_kill(place, opened):
    process = subprocess.Popen(
        [sys.executable, "-c", ADDER, *place], cwd=HERE, stdout=subprocess.PIPE
    )
    lines = [process.stdout.readline() for _ in range(100)]
    process.kill()
    lines += process.communicate()[0].splitlines(keepends=True)
    numbers = [line.strip().decode() for line in lines if line.endswith(b"\n")]
    kept = opened()
    assert not any(kept.add(number, "jared", {}) for number in numbers)
    assert waiting(kept, "jared") >= len(numbers) >= 100


def test_sqlite_syncs_what_it_adds_and_shares_the_commit(sqlite):
    seen, verbs = [], []
    sqlite._writer.set_trace_callback(seen.append)
    sqlite.add("0", "jared", {})
    sqlite.release(sqlite.claim(), 0)
    sqlite.add("-1", "jared", {})
    for line in seen:
        verbs.append(line.split()[-1] if "synchronous" in line else line.split()[0])
    assert verbs == ["INSERT", "NORMAL", "UPDATE", "UPDATE", "FULL", "INSERT"]
    seen.clear()
    with sqlite._write_lock:  # as if a commit went on
        threads = [
            threading.Thread(target=sqlite.add, args=(str(n), "jared", {}))
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        poll(lambda: len(sqlite._steps) == 8)
    for thread in threads:
        thread.join()
    assert seen.count("COMMIT") == 1 and waiting(sqlite, "jared") == 10


def test_sqlite_opens_in_eight_processes_at_once(tmp_path):
    script = "import sys; from store import SQLiteStore as S; S(sys.argv[1]).stats()"
    command = [sys.executable, "-c", script, str(tmp_path / "new.db")]
    processes = [subprocess.Popen(command, cwd=HERE) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8


def test_sqlite_gets_its_turn_beside_a_program_that_writes_all_the_time(
    sqlite, tmp_path
):
    locked, done = threading.Event(), threading.Event()

    def hog():
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None, timeout=5)
        while not done.is_set():
            other.execute("BEGIN IMMEDIATE")
            locked.set()
            time.sleep(0.04)
            locked.clear()
            other.execute("COMMIT")
            time.sleep(0.001)
        other.close()

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        for id in "0123456789":
            locked.wait()
            put(sqlite, id)
    finally:
        done.set()
        thread.join()


def test_sqlite_waits_for_whoever_makes_a_new_file(tmp_path):
    other = sqlite3.connect(
        tmp_path / "new.db", isolation_level=None, check_same_thread=False
    )
    other.executescript("CREATE TABLE t (x); BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: other.execute("ROLLBACK"))
    timer.start()
    SQLiteStore(str(tmp_path / "new.db")).close()
    timer.join()
    other.close()


def test_sqlite_locked_by_another_program_fails_soon_and_works_after(sqlite, tmp_path):
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    def add(number):
        time.sleep(number / 10)
        began = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            sqlite.add(str(number), "jared", {})
        return time.monotonic() - began

    assert max(in_threads(8, add)) < 2
    assert sqlite.claim() is None and sqlite.stats()["waiting"] == 0
    other.execute("ROLLBACK")
    other.close()
    put(sqlite, "1")


def test_sqlite_locked_even_for_readers_fails_soon_and_works_after(tmp_path):
    kept = SQLiteStore(str(tmp_path / "store.db"))
    put(kept, "1")
    kept._read_lock.acquire()  # as if another thread waited for the file

    def read(_):
        began = time.monotonic()
        with pytest.raises(StoreError):
            kept.stats()
        return time.monotonic() - began

    assert max(in_threads(8, read)) < 2
    kept._read_lock.release()
    assert kept.stats()["waiting"] == 1
    kept.close()


def test_sqlite_on_a_full_disk_refuses_and_works_after(sqlite):
    put(sqlite, "1")
    [(pages,)] = sqlite._writer.execute("PRAGMA page_count")
    sqlite._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    for id in "23":
        with pytest.raises(StoreError, match="full"):
            sqlite.add(id, "jared", {"text": "x" * 100_000})
    assert sqlite.claim().id == "1"
    sqlite._writer.execute("PRAGMA max_page_count = 100000").fetchall()
    assert sqlite.add("2", "jared", {"text": "x" * 100_000})
    assert waiting(sqlite, "jared") == 2


def test_sqlite_that_is_read_only_refuses_and_works_after(sqlite):
    put(sqlite, "1")
    sqlite._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="readonly"):
        sqlite.add("2", "jared", {})
    assert sqlite.stats()["waiting"] == 1
    sqlite._writer.execute("PRAGMA query_only = OFF")
    put(sqlite, "2")


def test_sqlite_goes_on_after_a_step_that_failed(sqlite, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(store._SQL, "forget", ("INSERT INTO message (seq) VALUES (1)",))
        with pytest.raises(StoreError):
            sqlite.forget("jared")
    put(sqlite, "1")


def test_sqlite_opens_a_file_from_before_limits_were_kept_there(tmp_path):
    path = str(tmp_path / "store.db")
    with closing(sqlite3.connect(path)) as old:
        old.executescript(store._SCHEMA)
        old.execute("DROP INDEX message_asked")
        old.execute("ALTER TABLE message DROP COLUMN asker")
    kept = SQLiteStore(path)
    assert kept.add("1", "jared", {}, "jared") and answer(kept).id == "1"
    kept.close()


def test_sqlite_that_cannot_be_opened_says_which_file(tmp_path):
    with pytest.raises(StoreError, match="missing/store.db cannot be opened"):
        SQLiteStore(str(tmp_path / "missing/store.db"))


def test_sqlite_leaves_no_byte_of_what_was_forgotten(sqlite, tmp_path):
    long = "SECRET" * 5000
    for number in range(40):
        put(sqlite, f"open {number}", to=f"other {number}")
        sqlite.add(f"short {number}", "jared", {"text": "SECRET question"})
        sqlite.add(f"long {number}", "jared", {"text": long})
    while claim := sqlite.claim():
        if claim.conversation == "jared":
            remember = claim.seq % 3 > 0
            sqlite.keep(claim, "SECRET reply " + long, remember, {"at": "SECRET"})
            if claim.seq % 5:
                sqlite.finish(claim)
            else:
                sqlite.set_aside(claim, "SECRET reason")
    sqlite.forget("jared")
    sqlite.prune(60)
    files = list(tmp_path.glob("store.db*"))
    assert len(files) == 3
    assert not any(b"SECRET" in file.read_bytes() for file in files)
    assert b"text of open" in (tmp_path / "store.db").read_bytes()


def test_sqlite_answers_its_questions_from_indexes(sqlite):
    values = {name: None for name in ("claims", "conversation", "limit", "now", "age")}
    values |= {name: None for name in ("id", "token", "most", "new", "lease", "asker")}
    values |= {name: None for name in ("reason", "reply", "progress", "remember")}
    values |= {
        name: None for name in ("delay", "back", "data", "minute", "room", "rate")
    }
    for verb, statements in store._SQL.items():
        for sql in statements if verb != "retry" else ():
            plan = sqlite._reader.execute(f"EXPLAIN QUERY PLAN {sql}", values)
            steps = [step for *_, step in plan]
            scans = [step for step in steps if step.startswith("SCAN message")]
            assert all("message_due" in step for step in scans), (verb, steps)
            if verb in ("claim", "due"):
                assert any("message_due (due<?)" in step for step in steps), steps


def test_redis_gone_is_an_error_at_once_and_over_when_it_is_back(redis_server):
    kept = RedisStore(redis_server.url)
    put(kept, "1", "2")
    answer(kept)
    redis_server.stop()
    began = time.monotonic()
    for verb in (kept.claim, kept.stats, lambda: kept.add("3", "jared", {})):
        with pytest.raises(StoreError, match="Redis cannot be used"):
            verb()
    assert time.monotonic() - began < 1.5
    redis_server.start()  # it has forgotten the script
    assert not kept.add("1", "jared", {}) and answer(kept).id == "2"
    kept.close()


def test_redis_that_hangs_is_an_error_in_time(redis_server):
    kept = RedisStore(redis_server.url)
    in_threads(8, lambda n: put(kept, str(n)))
    redis_server.send(signal.SIGSTOP)

    def add(number):
        began = time.monotonic()
        with pytest.raises(StoreError):
            kept.add(f"again {number}", "jared", {})
        return time.monotonic() - began

    assert max(in_threads(12, add)) < 1.5
    redis_server.send(signal.SIGCONT)
    put(kept, "new")
    kept.close()


def test_redis_with_a_full_memory_refuses_only_new_messages(redis_server):
    kept = RedisStore(redis_server.url)
    put(kept, "1", "2")
    redis_server.cli("config", "set", "maxmemory", "1")
    with pytest.raises(StoreError, match="maxmemory"):
        kept.add("3", "jared", {})
    assert [answer(kept).id, answer(kept).id] == ["1", "2"]
    redis_server.cli("config", "set", "maxmemory", "0")
    put(kept, "3")
    kept.close()


def test_redis_keeps_nothing_for_ever(shared_redis, monkeypatch):
    shared_redis.cli("flushall")
    kept = RedisStore(shared_redis.url)
    monkeypatch.setattr(store, "REMEMBERED", 3)
    for number in range(10):
        put(kept, str(number), to=str(number % 2))
    for _ in range(9):
        answer(kept, "SECRET", remember=True)
    fail(kept)
    messages = shared_redis.cli("keys", "*:message:*").split()
    assert len(messages) == 3 + 3 + 1
    assert all(
        key.startswith("{bot}:") for key in shared_redis.cli("keys", "*").split()
    )
    kept.forget("0")
    assert len(shared_redis.cli("keys", "*:message:*").split()) < 5
    poll(lambda: kept.prune(0))
    assert shared_redis.cli("keys", "*") == "{bot}:seq"
    kept.close()


@pytest.mark.parametrize(
    "url",
    ["redis://:pa/sswor@127.0.0.1:1", "http://:passwor@h", "redis://:passwor@h:port"]
    + ["redis://:passwor@127.0.0.1:1", "redis://x:passwor@no.such.host.invalid"],
)
def test_an_unusable_redis_url_is_an_error_without_its_password(url):
    redis_or_skip()
    with pytest.raises(StoreError) as caught:
        RedisStore(url).claim()
    assert "pa" not in str(caught.value).replace("password", "").split()
    assert "sswor" not in str(caught.value).replace("password", "")


def test_redis_that_repeats_what_it_was_told_is_not_quoted(tmp_path):
    redis_or_skip()
    server = RedisServer(tmp_path, "--rename-command", "EVALSHA", "")
    kept = RedisStore(server.url)
    try:
        with pytest.raises(StoreError, match="unknown command") as caught:
            kept.add("1", "jared", {"text": "a text"})
    finally:
        kept.close()
        server.stop()
    assert "jared" not in str(caught.value)


def test_a_wrong_redis_password_is_an_error_that_does_not_say_it(shared_redis):
    kept = RedisStore(shared_redis.url.replace("hush-hush", "wrong-hush"))
    with pytest.raises(StoreError, match="invalid username") as caught:
        kept.claim()
    assert "wrong-hush" not in str(caught.value)
    kept.close()


def test_a_missing_redis_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match="requirements.txt"):
        open_store("", "redis://127.0.0.1:1")


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
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
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


def test_the_demonstrations_bot_takes_every_setting_but_the_stand_ins():
    names = {item.name.upper() for item in dataclasses.fields(Config)}
    names = {name for name in names if not name.startswith(("AI_", "IM_"))}
    assert set(SETTINGS) == names - {"ALLOW_UNSIGNED", "DATABASE", "REDIS_URL"}


def news(url):
    """Yield what the stand-in tells the page."""
    with requests.get(f"{url}/page", stream=True, timeout=30) as stream:
        for line in stream.iter_lines(chunk_size=1):
            if line:
                yield from json.loads(line.removeprefix(b"data: "))


def demonstration(*arguments):
    """Start simulator.py, and return it when it has a page, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "simulator.py", *arguments],
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "The chat page" in line:
            break
    return process, "".join(printed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demonstration_and_its_bot(number):
    process, printed = demonstration("--port", str(free_port()))
    bot = printed.split("gunicorn: ")[1].split(",")[0]
    assert requests.get(f"{bot}/healthz").ok
    process.send_signal(number)
    _, complaints = process.communicate(timeout=40)
    assert (process.returncode, complaints) == (0, "")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{bot}/healthz")


def test_a_bot_elsewhere_is_driven_with_the_settings_that_are_printed(sim, tmp_path):
    bot, port = BotProcess(sim, str(tmp_path)), str(free_port())
    process, printed = demonstration("--bot", f"{bot.url}/im", "--port", port)
    lines = [line for line in printed.splitlines() if line.startswith("export ")]
    bot.env |= dict(line.removeprefix("export ").split("=", 1) for line in lines)
    page = f"http://127.0.0.1:{port}"
    try:
        bot.start()
        wish = {"say": "hello", "as": "lin", "to": "@RBT#002", "robots": []}
        assert requests.post(f"{page}/page", json=wish).ok
        for item in news(page):
            if item.get("robot") and item["closed"]:
                break
        assert item["text"].startswith("You said: hello")
    finally:
        bot.stop()
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0


ANSWER = "你好，世界🌏！\u2028用 `<think>` 标签，2 < 3。"
QUESTION = [{"role": "user", "content": "你好"}]
AI_KEY = "sk-test-key"


def sse(*events, end="data: [DONE]\n\n"):
    """Return the bytes of a stream; a string among the events is sent as it is."""
    texts = [
        event if isinstance(event, str) else f"data: {ai_json(event)}\n\n"
        for event in events
    ]
    return ("".join(texts) + end).encode()


def ai_json(value):
    return json.dumps(value, ensure_ascii=False)


def delta(text=None, finish=None, **more):
    said = {} if text is None else {"content": text}
    return {
        "choices": [{"index": 0, "delta": {**said, **more}, "finish_reason": finish}]
    }


def message(text, finish="stop", **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **more}}
    return {"choices": [{**choice, "finish_reason": finish}]}


def ai_service(*bodies, name="openai", status=200, key=AI_KEY, headers=None, **fields):
    """Return a Provider whose service answers the tries with `bodies`, and the tries.

    A body is bytes, or a list of the pieces in which they arrive.
    """
    tries = []

    def post(url, *given):
        body = bodies[min(len(tries), len(bodies) - 1)]
        tries.append(given)
        pieces = iter([body] if isinstance(body, bytes) else body)
        raw = SimpleNamespace(read1=lambda *_, **__: next(pieces, b""))
        head = CaseInsensitiveDict(headers or {})
        return nullcontext(SimpleNamespace(status_code=status, headers=head, raw=raw))

    wire = SimpleNamespace(post=post)
    return Provider(PROVIDERS[name], key, wire=wire, **fields), tries


def ai_answer(*bodies, seconds=20.0, whole=False, **options):
    provider, _ = ai_service(*bodies, **options)
    return joined(provider.chat(QUESTION, Call(seconds), whole))


def ai_chunks(*events):
    return list(ai_service(sse(*events))[0].chat(QUESTION, Call(20)))


def ai_failure(*bodies, seconds=20.0, whole=False, **options):
    """Return the error of a chat and how often the service was asked."""
    provider, tries = ai_service(*bodies, **options)
    with pytest.raises(ProviderError) as caught:
        list(provider.chat(QUESTION, Call(seconds), whole))
    return caught.value, len(tries)


@pytest.fixture
def no_pause(monkeypatch):
    """Let the tries follow one another at once."""
    monkeypatch.setattr(providers.random, "uniform", lambda low, high: 0.0)


@pytest.fixture
def ai_socket(monkeypatch):
    """Return a function that starts a server made of scripts, one for each request.

    A script is bytes to send before the connection is closed, or a function that gets
    the connection and says whether to keep it.
    """
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    opened = []

    def start(*scripts, context=None):
        listener = socket.create_server(("127.0.0.1", 0))
        scheme, port = "https" if context else "http", listener.getsockname()[1]
        server = SimpleNamespace(
            url=f"{scheme}://127.0.0.1:{port}", port=port, heads=[], bodies=[], peers=[]
        )
        opened.append(listener)
        threading.Thread(
            target=ai_accept,
            args=(server, listener, scripts, context, opened),
            daemon=True,
        ).start()
        return server

    yield start
    for item in opened:
        with suppress(OSError):
            item.shutdown(socket.SHUT_RDWR)
        item.close()


def ai_accept(server, listener, scripts, context, opened):
    while True:
        try:
            connection, peer = listener.accept()
        except OSError:
            return
        server.peers.append(peer)
        opened.append(connection)
        threading.Thread(
            target=ai_serve, args=(server, connection, scripts, context), daemon=True
        ).start()


def ai_serve(server, connection, scripts, context):
    with suppress(OSError):
        if context:
            connection = context.wrap_socket(connection, server_side=True)
        with closing(connection), connection.makefile("rb") as reader:
            while head := b"\n".join(iter(lambda: reader.readline().strip(), b"")):
                server.heads.append(head.decode())
                length = head.lower().partition(b"content-length:")[2].split()
                server.bodies.append(reader.read(int(length[0]) if length else 0))
                script = scripts[min(len(server.heads), len(scripts)) - 1]
                if isinstance(script, bytes):
                    return connection.sendall(script)
                if not script(connection):
                    return None


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def ai_chunked(body):
    return b"%x\r\n%b\r\n" % (len(body), body)


def dribble(head, drop, tail=b""):
    """Return a script that sends `head`, then `drop` ten times a second for long."""

    def script(connection):
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(drop)
            time.sleep(0.1)

    return script


def silent(head):
    """Return a script that sends `head` and then nothing for long."""

    def script(connection):
        connection.sendall(head)
        connection.recv(1)

    return script


def ask_socket(url, seconds=20.0, name="openai", key=AI_KEY, whole=False, **fields):
    provider = Provider(PROVIDERS[name], key, url, **fields)
    return list(provider.chat(QUESTION, Call(seconds), whole))


# What each family of services sends for ANSWER; made after providers.md.
HALF = len(ANSWER) // 2
A, B = ANSWER[:HALF], ANSWER[HALF:]
USAGE = {"choices": [], "usage": {"total_tokens": 9}}
BASE = {"base_resp": {"status_code": 0, "status_msg": "ok"}}
RECORDED = {
    "minimax": sse(
        {**delta("", role="assistant", name="MiniMax AI"), **BASE},
        {**delta(A), **BASE, "input_sensitive": False},
        delta(B),
        {**delta(finish="stop"), **BASE},
        {**USAGE, **BASE},
    ),
    "minimax with inline thinking": sse(
        delta("<think>\n他说你好。"), delta("\n</think>\n\n" + A), delta(B, "stop")
    ),
    "minimax, cumulative": sse(
        delta(A[:2]), delta(A), delta(ANSWER), delta("", "stop")
    ),
    "minimax, split thinking": sse(
        delta(reasoning_content="他说你好", reasoning_details=[{"text": "他说你好"}]),
        delta(A, reasoning_content="他说你好"),
        delta(B, "stop"),
    ),
    "minimax v2": sse(
        delta(A),
        delta(B),
        {**message(ANSWER), **BASE, "object": "chat.completion"},
        end="",
    ),
    "minimax-completion": ai_json({"reply": ANSWER, **BASE}).encode(),
    "zhipu": sse(
        delta("", role="assistant", reasoning_content="想"),
        delta(A),
        {**delta(B, "stop"), "usage": {"total_tokens": 9}},
    ),
    "deepseek": sse(
        ": keep-alive\n\n",
        delta(None, role="assistant", content=None, reasoning_content="想一想"),
        ": keep-alive\n\n",
        delta(A),
        delta(B),
        delta("", "stop"),
    ),
    "deepseek, waiting for its turn": b"\n\n\n" + ai_json(message(ANSWER)).encode(),
    "openai": sse(
        delta("", role="assistant"), delta(A), delta(B), delta(None, "stop"), USAGE
    ),
    "openrouter": sse(
        ": OPENROUTER PROCESSING\n\n", delta(A, reasoning="think"), delta(B, "stop")
    ),
    "ollama": sse(delta("", reasoning="想"), delta(A), delta(B), delta("", "stop")),
    "with carriage returns": sse(delta(A), delta(B, "stop")).replace(b"\n", b"\r\n"),
    "with event and id": sse(
        "event: message\nid: 1\nretry: 3000\n", delta(A), delta(B), delta("", "stop")
    ),
    "without a space": sse(delta(A), delta(B), "data:[DONE]\n\n", end=""),
    "plain JSON": json.dumps(
        message(ANSWER, reasoning_content="想"), indent=1
    ).encode(),
    "plain JSON without a finish": ai_json(message(ANSWER, None)).encode(),
    "emoji in two halves": sse(
        delta(A[: A.index("🌏")]),
        "".join(
            'data: {"choices":[{"delta":{"content":"' + half + '"}}]}\n\n'
            for half in ("\\ud83c", "\\udf0f")
        ),
        delta((A + B)[A.index("🌏") + 1 :], "stop"),
    ),
}


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_a_recorded_answer_is_read_wherever_its_bytes_are_split(recorded):
    for place in range(len(recorded) + 1):
        pieces = [part for part in (recorded[:place], recorded[place:]) if part]
        assert ai_answer(pieces) == ANSWER, place
    assert ai_answer([recorded[i : i + 1] for i in range(len(recorded))]) == ANSWER


OFF = {"thinking": {"type": "disabled"}}
ASKED = {
    "minimax": ("https://api.minimaxi.com/v1", "MiniMax-M3", OFF),
    "zhipu": ("https://open.bigmodel.cn/api/paas/v4", "glm-4.7-flash", OFF),
    "deepseek": ("https://api.deepseek.com", "deepseek-flash", OFF),
    "qwen": (
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        "qwen3.8-flash",
        {"enable_thinking": False},
    ),
    "tokenhub": ("https://tokenhub.tencentmaas.com/v1", "hy3", OFF),
    "moonshot": ("https://api.moonshot.cn/v1", "kimi-k2.6", OFF),
    "ark": (
        "https://ark.cn-beijing.volces.com/api/v3",
        "doubao-seed-2-1-lite-260915",
        OFF,
    ),
    "siliconflow": (
        "https://api.siliconflow.cn/v1",
        "deepseek-ai/DeepSeek-V4-Flash",
        {"enable_thinking": False},
    ),
    "openai": ("https://api.openai.com/v1", "gpt-6-luna", {"reasoning_effort": "none"}),
    "openrouter": (
        "https://openrouter.ai/api/v1",
        "minimax/minimax-m3",
        {"reasoning": {"enabled": False}},
    ),
    "ollama": ("http://localhost:11434/v1", "qwen3", {"reasoning_effort": "none"}),
}


@responses.activate
@pytest.mark.parametrize("name", ASKED)
def test_each_service_gets_the_request_it_expects(name):
    url, model, extra = ASKED[name]
    cap = "max_completion_tokens" if name in ("minimax", "openai") else "max_tokens"
    mock = responses.post(f"{url}/chat/completions", body=RECORDED["openai"])
    key = "" if name == "ollama" else AI_KEY
    turns = [{"role": "system", "content": "Be brief."}, *QUESTION]
    chunks = Provider(PROVIDERS[name], key).chat(turns, Call(20))
    assert joined(chunks) == ANSWER
    request = mock.calls[0].request
    assert json.loads(request.body) == {
        "model": model,
        "messages": turns,
        "stream": True,
        cap: 8192,
        **extra,
    }
    assert "你好".encode() in request.body
    assert request.headers.get("Authorization") == (f"Bearer {key}" if key else None)
    assert request.headers["Content-Type"] == "application/json"


def test_the_registry_names_every_service():
    assert set(PROVIDERS) == {*ASKED, "minimax-completion", "echo"}
    assert {name for name in PROVIDERS if PROVIDERS[name].keyless} == {"ollama", "echo"}


@responses.activate
def test_address_model_and_extras_of_the_operator_come_last():
    mock = responses.post("http://here/api/chat/completions", body=RECORDED["openai"])
    extra = {"temperature": 0.5, "thinking": None, "max_completion_tokens": 10}
    provider = Provider(PROVIDERS["minimax"], AI_KEY, "http://here/api/", "M9", extra)
    assert joined(provider.chat(QUESTION, Call(20))) == ANSWER
    assert json.loads(mock.calls[0].request.body) == {
        "model": "M9",
        "messages": QUESTION,
        "stream": True,
        "max_completion_tokens": 10,
        "temperature": 0.5,
    }


@pytest.mark.parametrize("pasted", ["Bearer sk-1", " sk-1\n", "Bearer  sk-1 "])
@responses.activate
def test_a_key_is_sent_as_one_bearer_however_it_was_pasted(pasted):
    mock = responses.post("http://here/chat/completions", body=RECORDED["openai"])
    joined(
        Provider(PROVIDERS["openai"], pasted, "http://here").chat(QUESTION, Call(20))
    )
    assert mock.calls[0].request.headers["Authorization"] == "Bearer sk-1"


@responses.activate
def test_empty_turns_are_not_sent_and_lone_surrogates_are_cleaned():
    mock = responses.post("http://here/chat/completions", body=RECORDED["openai"])
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a\ud83db"},
        {"role": "assistant", "content": " \n"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": picture},
    ]
    provider = Provider(PROVIDERS["openai"], AI_KEY, "http://here")
    joined(provider.chat(turns, Call(20)))
    assert json.loads(mock.calls[0].request.body)["messages"] == [
        {"role": "user", "content": "a?b"},
        {"role": "user", "content": picture},
    ]


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_question_without_any_text_is_not_sent(name):
    provider, tries = ai_service(b"", name=name)
    with pytest.raises(ProviderError) as caught:
        list(provider.chat([{"role": "user", "content": " "}], Call(20)))
    assert (caught.value.kind, tries) == ("empty", [])


def old_key(**claims):
    """Return a key as MiniMax once gave out: a JWT; nothing in it is secret."""
    parts = [{"alg": "RS256", "typ": "JWT"}, claims]
    encoded = [base64.urlsafe_b64encode(ai_json(part).encode()) for part in parts]
    return b".".join([*encoded, b"AAAA"]).decode().replace("=", "")


@pytest.mark.parametrize(
    ("key", "query"),
    [
        (
            old_key(GroupID="1780000000000000001", iss="minimax"),
            "?GroupId=1780000000000000001",
        ),
        (old_key(group_id=178), "?GroupId=178"),
        (old_key(iss="minimax"), ""),
        ("sk-api-new", ""),
        ("a.b.c", ""),
    ],
)
@responses.activate
def test_the_tutorials_endpoint_gets_a_prompt_and_the_group_of_the_key(key, query):
    url = "https://api.minimax.chat/v1/text/completion"
    body = ai_json({"reply": "你好！", **BASE})
    mock = responses.post(url, body=body, content_type="application/json")
    provider = Provider(PROVIDERS["minimax-completion"], key)
    assert list(provider.chat(QUESTION, Call(20))) == ["你好！"]
    request = mock.calls[0].request
    assert request.url == url + query
    assert request.headers["Authorization"] == f"Bearer {key}"
    assert json.loads(request.body) == {
        "model": "abab5-completion",
        "prompt": "你好",
        "tokens_to_generate": 8192,
    }


PICTURE = {"type": "image_url", "image_url": {"url": "https://a/b.png"}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is this?"}, PICTURE]},
]


@responses.activate
def test_the_tutorials_endpoint_gets_a_whole_talk_as_one_prompt():
    url = "https://api.minimax.chat/v1/text/completion"
    mock = responses.post(url, json={"reply": "A tree."})
    provider = Provider(PROVIDERS["minimax-completion"], "sk-api-new")
    assert joined(provider.chat(TALK, Call(20))) == "A tree."
    prompt = json.loads(mock.calls[0].request.body)["prompt"]
    assert prompt == "system: Be brief.\nuser: What is this?\nassistant:"


def test_echo_says_the_users_words_as_they_are():
    provider, tries = ai_service(b"", name="echo", key="")
    assert list(provider.chat(TALK, Call(20))) == ["What is this?"]
    said = "<think>a</think>\nb</think>c"
    turns = [{"role": "user", "content": said}]
    assert joined(provider.chat(turns, Call(20), whole=True)) == said
    assert not tries


@responses.activate
def test_zhipu_gets_a_fresh_token_in_milliseconds_for_every_try(no_pause):
    error = {"error": {"code": "1003", "message": "expired"}}
    url = "https://open.bigmodel.cn/api/paas/v4/chat/completions"
    first = responses.post(url, status=401, json=error)
    second = responses.post(url, body=RECORDED["zhipu"])
    minted = []

    def mint(key):
        minted.append(providers.zhipu_token(key))
        return minted[-1]

    service = replace(PROVIDERS["zhipu"], token=mint)
    provider = Provider(service, "an-id.a-short-secret")
    assert joined(provider.chat(QUESTION, Call(20))) == ANSWER
    tokens = [
        mock.calls[0].request.headers["Authorization"].removeprefix("Bearer ")
        for mock in (first, second)
    ]
    assert tokens == minted
    assert PROVIDERS["zhipu"].token is providers.zhipu_token
    header = json.loads(base64.urlsafe_b64decode(tokens[1].split(".")[0] + "=="))
    assert header == {"alg": "HS256", "sign_type": "SIGN", "typ": "JWT"}
    # The millisecond `exp` is no time PyJWT could check.
    secret = b"a-short-secret".ljust(32, b"\0")
    unchecked = {"verify_exp": False}
    claims = jwt.decode(tokens[1], secret, ["HS256"], options=unchecked)
    assert claims.keys() == {"api_key", "exp", "timestamp"}
    assert claims["api_key"] == "an-id"
    assert claims["exp"] - claims["timestamp"] == 300_000
    assert abs(claims["timestamp"] - time.time() * 1000) < 60_000


def test_a_zhipu_token_is_what_hmac_makes_of_the_short_secret():
    signed, _, signature = providers.zhipu_token("id.secret").rpartition(".")
    mac = hmac.new(b"secret", signed.encode(), hashlib.sha256).digest()
    assert base64.urlsafe_b64decode(signature + "=") == mac
    assert providers.zhipu_token("sk-without-a-dot") == "sk-without-a-dot"


RETRIES = {"busy": 3, "once": 2}  # tries in all; any other kind is asked once


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, "busy") for code in (1000, 1001, 1002, 1013, 1024, 1033, 1041, 2045)),
        (1039, "once"),
        *((code, "filter") for code in (1026, 1027)),
        *((code, "quota") for code in (1008, 1028, 1030, 2054, 2056, 2061)),
        *((code, "setup") for code in (1004, 1042, 1043, 1044, 20132, 2037, 2039)),
        *((code, "setup") for code in (2042, 2048, 2013, 2038, 2049, 9999, 5021)),
    ],
)
@pytest.mark.parametrize("name", ["minimax", "minimax-completion"])
def test_a_code_of_minimax_decides_about_another_try(no_pause, name, code, kind):
    base = {"base_resp": {"status_code": code, "status_msg": "something"}}
    body = ai_json({"choices": None, **base}).encode()
    error, tries = ai_failure(body, name=name)
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))
    assert error.retry == (kind in RETRIES)
    streamed, _ = ai_failure(sse(delta("hm"), {"choices": None, **base}), name=name)
    assert streamed.kind == kind
    text = f"something ({code})"
    inner = {"type": "error", "error": {"type": "api_error", "message": text}}
    refused, tries = ai_failure(ai_json(inner).encode(), name=name, status=429)
    assert (refused.kind, tries) == (kind, RETRIES.get(kind, 1))


@pytest.mark.parametrize(
    ("status", "name", "code", "kind"),
    [
        (400, "bad_request_error", 2013, "setup"),
        (401, "authorized_error", 1004, "setup"),
        (401, "authorized_error", 2049, "setup"),
        (402, "insufficient_balance_error", 1008, "quota"),
        (422, "unprocessable_entity_error", 1026, "filter"),
        (429, "rate_limit_error", 1002, "busy"),
        (429, "rate_limit_error", 2045, "busy"),
        (429, "rate_limit_error", 2056, "quota"),
        (500, "api_error", 1000, "busy"),
        (500, "api_error", 1013, "busy"),
        (500, "api_error", 1033, "busy"),
        (500, "api_error", 1026, "filter"),
        (529, "overloaded_error", None, "busy"),
    ],
)
def test_an_http_error_of_minimax_is_read(no_pause, status, name, code, kind):
    text = f"no luck ({code})" if code else "no luck"
    inner = {"type": name, "message": text, "http_code": str(status)}
    body = {"type": "error", "error": inner, "request_id": "r1"}
    data = ai_json(body).encode()
    error, tries = ai_failure(data, name="minimax", status=status)
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))
    assert str(error).startswith(f"HTTP {status}, code {code or name}, trace ")
    assert "r1" in str(error)


def rows(text):
    return [(code, kind) for kind, *codes in map(str.split, text) for code in codes]


@pytest.mark.parametrize(
    ("code", "kind"),
    rows(
        [
            "busy 500 1120 1234 1302 1303 1305 1312",
            "once 1003 1230",
            "filter 1300 1301",
            "quota 1113 1304 1308 1309 1310 1311 1313",
            "long 1261",
            "setup 1000 1001 1002 1004 1100 1110 1111 1112 1121 1200 1210 1211 1212",
            "setup 1213 1214 1215 1220 1221 1222 1231",
        ]
    ),
)
@pytest.mark.parametrize("status", [200, 400, 401, 429, 434, 500])
def test_a_code_of_zhipu_decides_whatever_the_status(no_pause, status, code, kind):
    body = ai_json({"error": {"code": code, "message": "错误"}}).encode()
    error, tries = ai_failure(body, name="zhipu", status=status, key="id.secret")
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, "busy") for status in (408, 409, 429, 500, 502, 503, 504, 524, 529)),
        *((status, "setup") for status in (201, 204, 400, 401, 403, 404, 422)),
        *((status, "setup") for status in (301, 302, 303, 307, 308)),
        (402, "quota"),
        (413, "long"),
        (451, "filter"),
    ],
)
@pytest.mark.parametrize("name", ["minimax", "zhipu", "deepseek"])
def test_an_http_status_decides_where_no_code_is_known(no_pause, name, status, kind):
    for body in (
        b"",
        b"404 page not found",
        b"<html>",
        b'{"error": "no"}',
        b'"no"',
        b"[",
    ):
        error, tries = ai_failure(body, name=name, status=status)
        assert (error.kind, tries) == (kind, RETRIES.get(kind, 1)), body
        assert str(error).startswith(f"HTTP {status}, ")


@pytest.mark.parametrize(
    ("name", "status", "body", "kind"),
    [
        ("openai", 429, {"error": {"code": "insufficient_quota"}}, "quota"),
        ("openai", 429, {"error": {"code": "rate_limit_exceeded"}}, "busy"),
        (
            "openai",
            400,
            {"error": {"code": "context_length_exceeded", "message": "over (8192)"}},
            "long",
        ),
        ("openai", 200, {"error": {"type": "server_error", "code": None}}, "busy"),
        ("moonshot", 429, {"error": {"type": "engine_overloaded_error"}}, "busy"),
        ("moonshot", 429, {"error": {"type": "rate_limit_reached_error"}}, "busy"),
        ("moonshot", 429, {"error": {"type": "exceeded_current_quota_error"}}, "quota"),
        ("moonshot", 400, {"error": {"type": "content_filter"}}, "filter"),
        ("moonshot", 401, {"error": {"type": "invalid_authentication_error"}}, "setup"),
        ("qwen", 400, {"error": {"code": "Arrearage"}}, "quota"),
        ("qwen", 401, {"error": {"code": "InvalidApiKey"}}, "setup"),
        ("qwen", 403, {"error": {"code": "AccessDenied.Unpurchased"}}, "quota"),
        ("qwen", 408, {"error": {"code": "RequestTimeOut"}}, "once"),
        ("qwen", 429, {"error": {"code": "Throttling.RateQuota"}}, "busy"),
        ("qwen", 429, {"error": {"code": "Throttling.AllocationQuota"}}, "quota"),
        ("qwen", 400, {"code": "DataInspectionFailed", "message": "no"}, "filter"),
        ("siliconflow", 400, {"code": 20012, "message": "no", "data": None}, "setup"),
        ("siliconflow", 200, {"code": 20012, "message": "no", "data": None}, "setup"),
        ("siliconflow", 403, "no balance", "setup"),
        ("siliconflow", 503, "busy", "busy"),
        ("ark", 403, {"error": {"code": "AccountOverdueError"}}, "quota"),
        ("ark", 404, {"error": {"code": "ModelNotOpen"}}, "setup"),
        (
            "ark",
            400,
            {"error": {"code": "InputTextSensitiveContentDetected"}},
            "filter",
        ),
        ("ark", 429, {"error": {"code": "RateLimitExceeded.EndpointRPM"}}, "busy"),
        ("ark", 429, {"error": {"code": "ServerOverloaded"}}, "busy"),
        ("ark", 429, {"error": {"code": "QuotaExceeded"}}, "quota"),
        ("ark", 429, {"error": {"code": "SetLimitExceeded"}}, "quota"),
        ("openrouter", 402, {"error": {"code": 402, "message": "credits"}}, "quota"),
        ("openrouter", 200, {"error": {"code": 502, "message": "no"}}, "busy"),
        ("openrouter", 200, {"error": {"code": 403, "message": "no"}}, "setup"),
        ("tokenhub", 200, {"error": {"code": 429001, "message": "no"}}, "busy"),
        ("tokenhub", 200, {"error": {"code": 401002, "message": "no"}}, "setup"),
        ("tokenhub", 451, {"error": {"code": 451001, "message": "no"}}, "filter"),
        ("tokenhub", 502, {"error": {"code": 502001, "message": "no"}}, "busy"),
        ("ollama", 404, {"error": "model not found"}, "setup"),
        ("ollama", 200, {"error": "this is a string"}, "setup"),
        ("openai", 200, "<html>not an API</html>", "setup"),
    ],
)
def test_the_errors_of_other_services_are_read(no_pause, name, status, body, kind):
    data = (body if isinstance(body, str) else ai_json(body)).encode()
    error, tries = ai_failure(data, name=name, status=status)
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": {"code": 502}, "choices": [{"finish_reason": "error"}]}, "busy"),
        ({"error": {"message": "down", "type": "server_error"}}, "busy"),
        ({"error": "a string"}, "setup"),
        ({"choices": None, "base_resp": {"status_code": 1027}}, "filter"),
        ({"code": "DataInspectionFailed", "message": "no"}, "filter"),
        (delta(finish="sensitive"), "filter"),
        (delta("", "content_filter"), "filter"),
        (delta(finish="network_error"), "busy"),
        (delta(finish="error"), "busy"),
        (delta(finish="model_context_window_exceeded"), "long"),
        ("data: {half\n\n", "busy"),
        ('data: "text"\n\n', "setup"),
        ("", "busy"),
    ],
)
def test_an_error_in_mid_stream_is_raised_after_the_text_before_it(event, kind):
    provider, tries = ai_service(sse(delta("一二三"), event, end=""), name="minimax")
    chunks = []
    with pytest.raises(ProviderError) as caught:
        for chunk in provider.chat(QUESTION, Call(20)):
            chunks.append(chunk)
    assert (chunks, caught.value.kind, len(tries)) == (["一二三"], kind, 1)


def test_a_cut_answer_is_asked_for_again_unless_some_of_it_was_shown(no_pause):
    cut, good = sse(delta("一"), end=""), RECORDED["openai"]
    assert ai_answer(cut, cut, good, whole=True) == ANSWER
    error, tries = ai_failure(cut, whole=True)
    assert (error.kind, tries) == ("busy", 3)
    error, tries = ai_failure(cut, good)
    assert (error.kind, tries) == ("busy", 1)
    plain = RECORDED["plain JSON"]
    assert ai_answer(plain[:-9], plain) == ANSWER


def test_every_recorded_answer_is_an_error_when_cut_before_its_end(no_pause):
    recorded = RECORDED["openai"]
    end = recorded.index(b'"finish_reason": "stop"') + len(
        b'"finish_reason": "stop"}]}'
    )
    for place in range(end):
        error, _ = ai_failure(recorded[:place], whole=True)
        assert error.kind == "busy", place
    assert ai_answer(recorded[:end]) == ANSWER


@pytest.mark.parametrize(
    "body",
    [
        sse(),
        sse(delta("", "stop")),
        sse(delta("<think>only this", "length")),
        sse(delta("only this\n</think>\n"), delta(None, "stop")),
        sse(delta(tool_calls=[]), delta(None, "tool_calls")),
        ai_json(message(None)).encode(),
        ai_json(message("  ")).encode(),
        ai_json({"choices": [], "base_resp": {"status_code": "0"}}).encode(),
        ai_json({"choices": None}).encode(),
        ai_json({"reply": "", **BASE}).encode(),
    ],
)
def test_an_answer_without_text_is_an_error_that_is_not_tried_again(body):
    for whole in (False, True):
        error, tries = ai_failure(body, whole=whole)
        assert (error.kind, tries) == ("empty", 1)


@settings(deadline=None, max_examples=150)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    "choices delta message content finish_reason error code type "
                    "base_resp status_code reply".split()
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from([200, 400, 429]),
)
def test_nothing_a_service_sends_raises_anything_but_a_provider_error(value, status):
    provider, _ = ai_service(ai_json(value).encode(), status=status, name="minimax")
    with suppress(ProviderError):
        for _ in provider.chat(QUESTION, Call(0.1), whole=True):
            pass


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9),
        ({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, 3600),
        ({"Retry-After": formatdate(time.time() - 3600, usegmt=True)}, None),
        ({"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"}, None),
        *(
            ({"Retry-After": text}, None)
            for text in ("0", "-3", "nan", "inf", "-inf", "later", "", "1e999", "一")
        ),
        ({}, None),
    ],
)
def test_retry_after_is_understood_in_every_spelling(headers, wait):
    read = providers.retry_after(CaseInsensitiveDict(headers))
    slack = 600 if wait == 3600 else 0.001  # a date was written when this was collected
    assert read == (wait if wait is None else pytest.approx(wait, abs=slack))


@pytest.mark.parametrize(
    ("wait", "seconds", "tries"), [("0.05", 20, 3), ("61", 90, 1), ("5", 3, 1)]
)
def test_a_wait_that_is_too_long_is_not_begun(wait, seconds, tries):
    began = time.monotonic()
    error, asked = ai_failure(
        b"", status=429, headers={"Retry-After": wait}, seconds=seconds
    )
    assert (error.kind, asked, error.wait) == ("busy", tries, float(wait))
    assert time.monotonic() - began < 1


def test_the_pauses_between_tries_grow_and_vary():
    began = time.monotonic()
    ai_failure(b"", status=503)
    assert 0.375 + 0.75 <= time.monotonic() - began < 2.5


THINKING = {
    "<think>a</think>b": "b",
    "<think>\n想\n</think>\n\n答": "答",
    "\n <mm:think>a\nb</mm:think> \n答": "答",
    "<think></think>答": "答",
    "<think>a</think><think>b</think>\n答": "答",
    "<think>a <think> b</think>答": "答",
    "</think>\n\n答": "答",
    "想一想\n</think>\n\n答": "答",
    "想一想。</think>答": "答",
    "let me see</think>hello": "hello",
    "想 </think>\n答": "答",
    "a\n</think>\nb </mm:think>\nc": "c",
    "用 `</think>` 想\n</think>\n答": "答",
    "The <think> tag.": "The <think> tag.",
    "用 `<think>` 和 `</think>`": "用 `<think>` 和 `</think>`",
    "the tag </think> closes it": "the tag </think> closes it",
    "Like this:\n<think>\na\n</think>\nb": "Like this:\n<think>\na\n</think>\nb",
    "“</think>”是结束": "“</think>”是结束",
    "a < b <thi <thinking> </thin": "a < b <thi <thinking> </thin",
    "<thinking> is no tag": "<thinking> is no tag",
    "<th": "<th",
    "a<": "a<",
}


@pytest.mark.parametrize(("text", "answer"), THINKING.items())
def test_thinking_is_taken_out_wherever_the_text_is_split(text, answer):
    assert ai_answer(sse(delta(text, "stop"))) == answer
    assert ai_answer(sse(*map(delta, text))) == answer
    for place in range(len(text)):
        for other in range(place, len(text)):
            parts = text[:place], text[place:other], text[other:]
            chunks = providers.visible(part for part in parts if part)
            assert joined(chunks) == answer, parts
    for whole in (False, True):
        assert ai_answer(ai_json(message(text)).encode(), whole=whole) == answer


def test_thinking_without_an_opening_is_replaced_in_a_stream_and_absent_in_a_whole():
    body = sse(
        delta("I think"), delta(" so.\n</think>\n"), delta("\n答"), delta("案", "stop")
    )
    chunks = list(ai_service(body)[0].chat(QUESTION, Call(20)))
    assert chunks == ["I think", " so.\n", "答", "案"]
    assert [type(chunk) for chunk in chunks] == [str, str, Replace, str]
    whole = list(ai_service(body)[0].chat(QUESTION, Call(20), whole=True))
    assert whole == ["答案"]


@pytest.mark.parametrize(
    ("contents", "chunks"),
    [
        (["你", "好", "吗"], ["你", "好", "吗"]),
        (["你", "你好", "你好吗"], ["你", "好", "吗"]),
        (["你", "你好", "你好吗？我很好，谢谢。", "你好吗？我很好，谢谢。再"], None),
        (["哈", "哈", "哈"], ["哈", "哈", "哈"]),
        (["哈", "哈哈", "！"], ["哈", "哈", "哈！"]),
        (["1", "10", "0"], ["1", "0", Replace("1100")]),
        (["12345678", "12345678", "9"], ["12345678", "9"]),
        (["一二三四五六七八", "一二三四五六七八九", "一二三四五六七八九"], None),
        (["一二三四五六七八", "一二三四五六七八九", "另一个答案"], None),
    ],
)
def test_words_that_repeat_all_before_them_are_shown_once(contents, chunks):
    shown = ai_chunks(*map(delta, contents), delta(finish="stop"))
    if chunks is None:
        assert joined(shown) == contents[-1]
    else:
        assert shown == chunks
        assert [type(chunk) for chunk in shown] == [type(chunk) for chunk in chunks]


def test_a_last_event_with_the_full_text_is_not_added():
    full = {**message(ANSWER, None), "object": "chat.completion"}
    assert "".join(ai_chunks(delta(A), delta(B), full)) == ANSWER
    assert "".join(ai_chunks(delta(A), delta(B), delta(ANSWER))) == ANSWER
    assert joined(ai_chunks(delta(A), delta("x"), full)) == ANSWER


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("哈a\n", min_size=4, max_size=4), min_size=1), st.booleans())
def test_pieces_of_one_size_are_never_taken_for_repetitions(pieces, cumulative):
    text, sent = "".join(pieces), pieces
    if cumulative:
        sent = ["".join(pieces[: index + 1]) for index in range(len(pieces))]
    chunks = providers.new_text((piece, False) for piece in sent)
    assert joined(chunks) == text


def test_halves_of_an_emoji_come_together_and_a_lone_one_is_replaced():
    def read(*contents):
        return joined(providers.visible(contents))

    assert read("a\ud83d", "\ude00b") == "a😀b"
    assert read("a\ud83d", "b\ude00") == "a\ufffdb\ufffd"
    assert read("a\ud83d") == "a\ufffd"


@pytest.mark.parametrize("part", ["abcd", "我们的", "<b>x", "</p>", "a <", "</thi\n"])
def test_a_long_answer_costs_little(part):
    body = sse(*[delta(part)] * 50_000, delta(finish="stop"))
    limit, providers.LONGEST_ANSWER = providers.LONGEST_ANSWER, 1 << 30
    try:
        pieces = [body[i : i + 65536] for i in range(0, len(body), 65536)]
        chunks = providers.events(
            SimpleNamespace(
                raw=SimpleNamespace(
                    read1=lambda *_, **__: pieces.pop(0) if pieces else b""
                )
            ),
            Call(60),
        )
        contents = [
            event["choices"][0]["delta"].get("content", "") for event in chunks if event
        ]
    finally:
        providers.LONGEST_ANSWER = limit
    began = time.process_time()
    text = joined(
        providers.visible(providers.new_text((content, False) for content in contents))
    )
    assert time.process_time() - began < 1
    assert text == part * 50_000


def test_too_much_is_refused(no_pause):
    endless = (b"data: " + b"x" * 60_000 for _ in range(10**6))
    assert ai_failure(endless)[0].kind == "setup"
    lines = (sse(delta("x" * 60_000), end="") for _ in range(10**6))
    assert ai_failure(lines, whole=True)[0].kind == "setup"


DRIBBLES = {
    "slow headers": dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "a slow status line": dribble(b"HTTP/1.1 200 ", b"O"),
    "many slow headers": dribble(b"HTTP/1.1 200 OK\r\n", b"X-Slow: x\r\n"),
    "no headers": silent(b""),
    "no body": silent(OK + b"\r\n"),
    "keep-alives": dribble(OK + b"\r\n", b": keep-alive\n\n"),
    "chunked keep-alives": dribble(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", ai_chunked(b": keep-alive\n\n")
    ),
    "a chunk size without end": dribble(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"
    ),
    "a slow body": dribble(OK + b"Content-Length: 9999\r\n\r\ndata: ", b"x"),
    "blank lines": dribble(OK + b"Content-Length: 9999\r\n\r\n", b"\n"),
    "a line without end": dribble(OK + b"\r\ndata: ", b"x" * 100),
    "a slow error": dribble(b"HTTP/1.1 500 Oops\r\n\r\n", b"x"),
    "a slow answer": dribble(OK + b"\r\n", sse(delta("字"), end="")),
}


@pytest.mark.parametrize("script", DRIBBLES.values(), ids=DRIBBLES)
def test_a_server_that_dribbles_cannot_hold_a_call(ai_socket, script):
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        ask_socket(ai_socket(script).url, 0.3)
    assert caught.value.kind == "slow"
    assert 0.2 < time.monotonic() - began < 1.5


def test_an_address_nobody_answers_at_cannot_hold_a_call():
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as full:
        address = full.getsockname()
        with closing(socket.create_connection(address)):
            began = time.monotonic()
            with pytest.raises(ProviderError) as caught:
                ask_socket(f"http://127.0.0.1:{address[1]}", 1.0)
    assert caught.value.kind in ("slow", "busy")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "cut",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nConte",
        OK + b"\r\n" + sse(delta("一"), end=""),
        OK + b"Content-Length: 999\r\n\r\n" + sse(delta("一"), end=""),
        OK
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + ai_chunked(sse(delta("一"), end="")),
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"not HTTP at all\r\n\r\n",
    ],
)
def test_a_cut_connection_is_an_error_and_tried_again(ai_socket, no_pause, cut):
    server = ai_socket(cut, cut, OK + b"\r\n" + RECORDED["openai"])
    assert "".join(ask_socket(server.url, whole=True)) == ANSWER
    assert len(server.heads) == 3


def test_nobody_listening_is_busy_and_tried_again(no_pause, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ProviderError) as caught:
        ask_socket(f"http://127.0.0.1:{port}")
    assert caught.value.kind == "busy"


@pytest.mark.parametrize(
    "url", ["http://", "nonsense", "http://[::1", "ftp://a", "http://a b"]
)
def test_an_address_that_is_none_is_a_matter_of_the_setup(url):
    with pytest.raises(ProviderError) as caught:
        ask_socket(url, 5)
    assert caught.value.kind == "setup"


STOPPED = {
    "before the headers": silent(b""),
    "in the body": silent(OK + b"\r\n" + sse(delta("一"), end="")),
    "among keep-alives": dribble(OK + b"\r\n", b": keep-alive\n\n"),
    "in a chunked body": silent(OK + b"Transfer-Encoding: chunked\r\n\r\n"),
    "in the back-off": b"HTTP/1.1 503 Busy\r\nRetry-After: 20\r\n\r\n",
}


@pytest.mark.parametrize("script", STOPPED.values(), ids=STOPPED)
def test_a_call_is_ended_from_another_thread(ai_socket, script):
    server, call = ai_socket(script), Call(30)
    provider = Provider(PROVIDERS["openai"], AI_KEY, server.url)
    timer = threading.Timer(0.3, call.stop)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        list(provider.chat(QUESTION, call))
    timer.join()
    assert caught.value.kind == "stopped"
    assert not caught.value.retry
    assert 0.2 < time.monotonic() - began < 1


def test_a_stopped_call_asks_nobody(ai_socket):
    server, call = ai_socket(b""), Call(30)
    call.stop()
    with pytest.raises(ProviderError) as caught:
        list(Provider(PROVIDERS["openai"], AI_KEY, server.url).chat(QUESTION, call))
    assert (caught.value.kind, server.heads) == ("stopped", [])


def test_leaving_the_loop_ends_the_call(ai_socket):
    gone = threading.Event()

    def script(connection):
        connection.sendall(OK + b"\r\n" + sse(delta("一"), end=""))
        if not connection.recv(1):
            gone.set()

    provider = Provider(PROVIDERS["openai"], AI_KEY, ai_socket(script).url)
    chunks = provider.chat(QUESTION, Call(30))
    assert next(chunks) == "一"
    chunks.close()
    assert gone.wait(5)


def keeping(body, framing=ai_chunked):
    def script(connection):
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(ai_chunked(body) + b"0\r\n\r\n")
        return True

    return script


@pytest.mark.parametrize("recorded", ["openai", "without a space", "plain JSON"])
def test_a_connection_serves_one_answer_after_another(ai_socket, recorded):
    server = ai_socket(keeping(RECORDED[recorded]))
    provider = Provider(PROVIDERS["openai"], AI_KEY, server.url)
    for _ in range(3):
        call = Call(20)
        assert joined(provider.chat(QUESTION, call)) == ANSWER
        call.stop()  # it is over, so this must not cut what the next one uses
    assert len(server.heads) == 3
    assert len(server.peers) == 1


def test_stopping_a_call_does_not_cut_the_one_that_has_its_connection_now(ai_socket):
    def late(connection):
        time.sleep(0.4)
        return keeping(RECORDED["openai"])(connection)

    server = ai_socket(keeping(RECORDED["plain JSON"]), late)
    provider = Provider(PROVIDERS["openai"], AI_KEY, server.url)
    first = Call(20)
    chunks = provider.chat(QUESTION, first)
    assert next(chunks)  # it was read to its end, but its reader is not through
    timer = threading.Timer(0.2, first.stop)
    timer.start()
    assert joined(provider.chat(QUESTION, Call(20))) == ANSWER
    timer.join()
    chunks.close()
    assert (len(server.heads), len(server.peers)) == (2, 1)


def test_an_answer_is_complete_though_the_connection_stays_open(ai_socket):
    server = ai_socket(silent(OK + b"\r\n" + sse(delta("一", "stop"), end="")))
    began = time.monotonic()
    assert ask_socket(server.url, 10, whole=True) == ["一"]
    assert time.monotonic() - began < 2


def test_threads_without_end_do_not_pile_up(ai_socket):
    server = ai_socket(keeping(RECORDED["openai"]))
    provider = Provider(PROVIDERS["openai"], AI_KEY, server.url)
    before = threading.active_count()
    for _ in range(20):
        joined(provider.chat(QUESTION, Call(600)))
    deadline = time.monotonic() + 5
    while threading.active_count() > before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 2


def test_an_answer_of_tencents_that_is_cut_is_a_call_that_brought_none(ai_socket):
    server = ai_socket(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{")
    client = tim.Client(server.url, APPID, KEY, "administrator")
    with pytest.raises(tim.IMError) as caught:
        client.call("openim/sendmsg", {}, waits=())
    assert caught.value.code == tim.NETWORK and caught.value.retry


@pytest.mark.parametrize("url", ["https://.de", "http://[::1", "https://a..b"])
def test_an_address_that_cannot_be_is_an_error_of_requests(url):
    with pytest.raises(requests.RequestException):
        Wire(url).post(f"{url}/x", b"{}", {}, (1, 1))


def test_netrc_does_not_replace_the_key(ai_socket, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server = ai_socket(OK + b"\r\n" + RECORDED["openai"])
    assert requests.utils.get_netrc_auth(server.url)  # so requests would have used it
    for name, key in (("openai", AI_KEY), ("ollama", "")):
        assert "".join(ask_socket(server.url, name=name, key=key)) == ANSWER
    assert f"\nAuthorization: Bearer {AI_KEY}" in server.heads[0]
    assert "Authorization" not in server.heads[1]


def test_a_proxy_of_the_environment_is_used(ai_socket, monkeypatch):
    proxy = ai_socket(OK + b"\r\n" + RECORDED["openai"])
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    assert "".join(ask_socket("http://ai.example/v1")) == ANSWER
    assert proxy.heads[0].startswith("POST http://ai.example/v1/chat/completions HTTP")
    assert f"\nAuthorization: Bearer {AI_KEY}" in proxy.heads[0]


def test_a_proxy_that_tunnels_is_used_and_cannot_hold_a_call(ai_socket, monkeypatch):
    proxy = ai_socket(dribble(b"", b"H"))
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        ask_socket("https://ai.example/v1", 0.5)
    assert proxy.heads[0].startswith("CONNECT ai.example:443 HTTP/1.")
    assert AI_KEY not in proxy.heads[0]
    assert caught.value.kind == "slow"
    assert time.monotonic() - began < 1.5


def test_a_redirect_is_not_followed(ai_socket):
    other = ai_socket(OK + b"\r\n" + RECORDED["openai"])
    for status in (301, 302, 303, 307, 308):
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/x\r\n\r\n"
        server = ai_socket(head.encode())
        with pytest.raises(ProviderError) as caught:
            ask_socket(server.url)
        assert (caught.value.kind, len(server.heads)) == ("setup", 1)
    assert not other.heads


@pytest.mark.parametrize(
    "key", ["sk-se\ncret", "sk-se\r\n cret", "sk-secret密钥", "sk-\0secret"]
)
@pytest.mark.parametrize("name", ["openai", "minimax-completion"])
def test_a_key_that_no_header_can_hold_is_not_told(ai_socket, caplog, name, key):
    server = ai_socket(b"")
    with pytest.raises(ProviderError) as caught:
        ask_socket(server.url, key=key, name=name)
    try:
        raise RuntimeError("what follows") from caught.value
    except RuntimeError:
        logging.exception("it failed")
    told = caplog.text + "".join(traceback.format_exception(caught.value))
    told += repr(caught.value) + repr(Provider(PROVIDERS[name], key))
    assert caught.value.kind == "setup"
    assert "it failed" in caplog.text
    assert "cret" not in told.replace("secret(", "")
    assert not server.heads


def test_an_error_is_told_in_short_and_without_the_key():
    text = f"bad key {AI_KEY}\n" + "x" * 10_000
    body = ai_json({"error": {"message": text}}).encode()
    error, _ = ai_failure(body, status=401, headers={"Trace-Id": "t-1"})
    assert AI_KEY not in str(error)
    assert "\n" not in str(error)
    assert "t-1" in str(error)
    assert 500 < len(str(error)) < 600


def test_tls_is_read_and_stopped_and_ended_like_any_other(
    ai_socket, tmp_path, monkeypatch
):
    made = subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
        "-addext basicConstraints=critical,CA:TRUE "
        "-addext keyUsage=critical,keyCertSign,digitalSignature",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert"))
    server = ai_socket(
        keeping(RECORDED["openai"]),
        keeping(RECORDED["openai"]),
        dribble(OK + b"\r\n", b": x\n"),
        dribble(OK, b"X: x\r\n"),
        silent(b""),
        context=context,
    )
    provider = Provider(PROVIDERS["openai"], AI_KEY, server.url)
    for _ in range(2):
        assert joined(provider.chat(QUESTION, Call(20))) == ANSWER
    assert len(server.peers) == 1
    for seconds, stop, kind in (
        (0.5, 9, "slow"),
        (0.5, 9, "slow"),
        (9, 0.3, "stopped"),
    ):
        call, began = Call(seconds), time.monotonic()
        timer = threading.Timer(stop, call.stop)
        timer.start()
        with pytest.raises(ProviderError) as caught:
            list(provider.chat(QUESTION, call))
        timer.cancel()
        assert caught.value.kind == kind
        assert time.monotonic() - began < 1.5


@pytest.fixture
def start_bot(sim, tmp_path):
    """Return a function that starts the bot as the Procfile does."""
    bots = []

    def start(**settings):
        bots.append(BotProcess(sim, str(tmp_path), **{"RATE_LIMIT": 0} | settings))
        return bots[-1].start()

    yield start
    for bot in bots:
        if bot.process:
            bot.stop(signal.SIGKILL)


def workers(bot):
    """Return the process ids of gunicorn's workers."""
    log = bot.log.read_text()
    return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", log)]


def let_claims_lapse(path):
    """Do what LEASE seconds do to the claims of processes that died."""
    with closing(sqlite3.connect(path, timeout=10)) as other, other:
        other.execute("UPDATE message SET due = 0 WHERE token IS NOT NULL")


def said_to(sim, chat):
    return [
        m.text.split(" (")[0].removeprefix("You said: ")
        for m in sim.delivered
        if m.chat == chat
    ]


def questions(sim):
    """Return what the AI was asked."""
    return [asked["messages"][-1]["content"] for asked in sim.ai_requests]


def stand(url):
    return requests.get(f"{url}/healthz", timeout=5).json()


def test_after_kill_9_all_is_answered_in_30_s_and_a_kept_answer_sent_again(
    sim, start_bot
):
    bot = start_bot(WEB_CONCURRENCY=2, WORKER_THREADS=4)
    sim.users |= {"kept"} | {f"user{n}" for n in range(6)}
    # An answer that was shown, but the bot never hears of it.
    sim.fault = lambda command, body: "late" if body["To_Account"] == "kept" else None
    sim.say("kept", "@RBT#001", "kept")
    poll(lambda: sim.calls)
    sim.ai_delay = 60
    for text in ("first", "second", "third"):
        for number in range(6):
            sim.say(f"user{number}", "@RBT#001", text)
    poll(lambda: len(sim.ai_requests) >= 6)
    bot.stop(signal.SIGKILL)
    assert len(sim.delivered) == 1
    sim.ai_delay, sim.fault = 0, lambda command, body: None
    before = len(sim.calls)
    bot.start()
    sim.wait(19, timeout=30)
    poll(lambda: stand(bot.url)["in_work"] == 0)
    for number in range(6):
        assert said_to(sim, f"user{number}") == ["first", "second", "third"]
    sent = [body for _, body in sim.calls if body["To_Account"] == "kept"]
    assert len({json.dumps(body) for body in sent}) == 1 and len(sim.calls) > before
    assert sent[0] in [body for _, body in sim.calls[before:]]
    assert said_to(sim, "kept") == ["kept"]
    assert questions(sim).count("kept") == 1


def test_a_message_that_kills_its_process_three_times_is_set_aside(
    sim, start_bot, tmp_path
):
    bot, kills = start_bot(), []

    def kill(asked):
        if asked["messages"][-1]["content"] == "deadly":
            kills.append(workers(bot)[-1])
            os.kill(kills[-1], signal.SIGKILL)

    sim.ai_fault = kill
    event = sim.say("jared", "@RBT#001", "deadly")

    def set_aside():
        if len(workers(bot)) > len(kills):
            let_claims_lapse(tmp_path / "bot.db")
        return "set aside" in bot.log.read_text()

    poll(set_aside, 30)
    assert len({*kills}) == 3
    [line] = [x for x in bot.log.read_text().splitlines() if "set aside" in x]
    assert str(event["MsgRandom"]) in line and "3 times" in line
    poll(lambda: stand(bot.url)["set_aside"] == 1)
    sim.say("jared", "@RBT#001", "harmless")
    assert sim.wait(1)[0].text.startswith("You said: harmless")


def test_sigterm_finishes_what_it_can_and_leaves_the_rest_to_the_next(sim, start_bot):
    """It takes what botserver.DRAIN says: the AI needs a minute for one answer."""
    bot, seconds = start_bot(), {"long": 60, "short": 6}
    hurry = threading.Event()

    def answer(messages):
        text = messages[-1]["content"]
        hurry.wait(seconds.get(text, 0))
        return f"You said: {text}"

    sim.ai_answer = answer
    sim.say("jared", "@RBT#001", "long")
    sim.say("lin", "@RBT#001", "short")
    poll(lambda: len(sim.ai_requests) == 2)
    sim.say("lin", "@RBT#001", "next")
    began = time.monotonic()
    assert bot.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < botserver.DRAIN + 4
    assert said_to(sim, "lin") == ["short"] and not said_to(sim, "jared")
    assert sorted(questions(sim)) == ["long", "short"]
    assert "1 messages were left to others" in bot.log.read_text()
    seconds.clear()
    hurry.set()
    bot.start()
    sim.wait(3, timeout=5)  # and not only when a claim has lapsed
    assert said_to(sim, "lin") == ["short", "next"] and said_to(sim, "jared") == [
        "long"
    ]


def test_sighup_reloads_without_a_refused_callback(sim, start_bot):
    bot = start_bot(WEB_CONCURRENCY=2, MAX_WAITING=10**6)
    sim.users |= {f"user{n}" for n in range(4)}
    sim.bot_url, done = "", threading.Event()
    answers, asked = [], [0] * 4

    def ask_on(user):
        while not done.is_set():
            event = sim.say(f"user{user}", "@RBT#001", str(asked[user]))
            signed = sim.signed(event)
            answers.append(requests.post(f"{bot.url}/im", params=signed, json=event))
            asked[user] += 1

    threads = [threading.Thread(target=ask_on, args=(user,)) for user in range(4)]
    for thread in threads:
        thread.start()
    for booted in (2, 4, 6):
        poll(lambda booted=booted: len(workers(bot)) == booted and len(answers) > 99)
        answers_before = len(answers)
        bot.process.send_signal(signal.SIGHUP)
        poll(lambda before=answers_before: len(answers) > before + 100)
    poll(lambda: len(workers(bot)) == 8)
    done.set()
    for thread in threads:
        thread.join()
    assert len(answers) == sum(asked) > 400
    assert {answer.status_code for answer in answers} == {200}
    sim.wait(len(answers), timeout=40)
    for user in range(4):
        assert said_to(sim, f"user{user}") == [str(n) for n in range(asked[user])]


def memory(pid):
    """Return the bytes a process holds in memory."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_three_times_too_much_is_acknowledged_quickly_and_worked_off_in_order(
    sim, start_bot
):
    """Six threads and an AI of about 0.1 s answer 60 a second; 180 come."""
    bot = start_bot(WORKER_THREADS=6, MAX_WAITING=1000)
    users = [f"user{n}" for n in range(6)]
    sim.users |= {*users}
    began, took, chance = time.monotonic(), [], random.Random(1)

    def answer(messages):
        time.sleep(chance.uniform(0, 0.2))
        return f"You said: {messages[-1]['content']}"

    sim.ai_answer = answer

    def ask(user):
        for number in range(120):
            time.sleep(max(0, began + number / 30 - time.monotonic()))
            start = time.monotonic()
            sim.say(user, "@RBT#001", str(number))
            took.append(time.monotonic() - start)

    threads = [threading.Thread(target=ask, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stand(bot.url)["waiting"] > 200
    assert memory(workers(bot)[-1]) < 120e6
    sim.wait(720, timeout=60)
    assert sorted(took)[int(len(took) * 0.99)] < 1
    for user in users:
        assert said_to(sim, user) == [str(number) for number in range(120)]


def test_past_the_greatest_backlog_a_callback_is_refused_and_not_kept(
    sim, make_app, caplog
):
    im = Caller(sim, make_app(max_backlog=5, rate_limit=0).test_client())
    sim.ai_delay = 1
    codes = [im.say(str(number)).status_code for number in range(9)]
    assert codes[0] == 200 and codes[-1] == 503
    assert "MAX_BACKLOG" in caplog.text
    sim.ai_delay = 0
    poll(lambda: idle(im))
    assert said_to(sim, "jared") == [str(n) for n in range(9) if codes[n] == 200]
    poll(lambda: im.say("later").status_code == 200)
    poll(lambda: "later" in said_to(sim, "jared"))


@contextmanager
def locked(path, bot):
    with closing(sqlite3.connect(path, timeout=10)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def read_only(path, bot):
    for switch in ("ON", "OFF"):
        with bot.store._write_lock:
            bot.store._writer.execute(f"PRAGMA query_only = {switch}")
        if switch == "ON":
            yield


@contextmanager
def full(path, bot):
    """Let no file of this process grow, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("broken", [locked, read_only, full])
def test_a_store_that_fails_costs_nothing_but_time(
    sim, make_app, tmp_path, caplog, broken
):
    app, path = make_app(), tmp_path / "bot.db"
    im, bot = Caller(sim, app.test_client()), app.extensions["bot"]
    sim.ai_delay = 0.5
    im.say("before")
    poll(lambda: sim.ai_requests)
    with broken(path, bot):
        answer = im.say("during")
        assert answer.status_code == 503 and answer.get_json()["ActionStatus"] == "FAIL"
        poll(lambda: "cannot be written" in caplog.text)
        assert im.say("during").status_code == 503
        poll(lambda: not bot._work)
    poll(lambda: im.say("after").status_code == 200)
    let_claims_lapse(path)
    poll(lambda: len(sim.delivered) == 2 and idle(im))
    assert said_to(sim, "jared") == ["before", "after"]
    assert "Traceback" not in caplog.text


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(2**64), 1e308, float("nan"), "\0", "\ud800", "@RBT#"])
    | st.floats()
    | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
ELEMENTS = st.lists(
    st.fixed_dictionaries(
        {
            "MsgType": st.sampled_from(
                ["TIMTextElem", "TIMImageElem", "TIMCustomElem", *sorted(tim.STRANGE)]
            )
            | JSON,
            "MsgContent": st.dictionaries(
                st.sampled_from(["Text", "Data", "ImageInfoArray", "UUID"]), JSON
            )
            | JSON,
        }
    ),
    max_size=3,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        "CallbackCommand From_Account To_Account GroupId TopicId MsgSeq MsgRandom "
        "Random MsgTime MsgBody AtRobots_Account SendMsgResult EventTime".split()
    ),
    JSON,
    max_size=3,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
BODIES = (
    st.binary(max_size=200)
    | JSON
    | st.tuples(st.booleans(), FIELDS)
    | st.tuples(st.booleans(), st.fixed_dictionaries({"MsgBody": ELEMENTS}))
    | st.integers(1, 200_000).map(lambda depth: b'{"MsgBody":' + b"[" * depth)
    | st.integers(1, 20_000).map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth)
)


def test_nothing_that_is_called_makes_an_error_or_costs_a_thread(sim, make_app, caplog):
    app = make_app(rate_limit=0, max_waiting=10**6)
    im, bot = Caller(sim, app.test_client()), app.extensions["bot"]
    examples = [
        sim.say("jared", "@RBT#001", "hi"),
        sim.say_in_group("jared", "@TGS#demo", "hi", ["@RBT#001"]),
    ]

    calls = []  # made later: Hypothesis wants nobody else to use random meanwhile

    @settings(max_examples=400, deadline=None)
    @given(
        query=st.dictionaries(
            st.sampled_from(["CallbackCommand", "OptPlatform"]) | TEXT, TEXT, max_size=3
        ),
        body=BODIES,
    )
    def collect(query, body):
        calls.append((query, body))

    collect()
    for query, body in calls:
        if isinstance(body, tuple):
            body = examples[body[0]] | body[1]
        data = body if isinstance(body, bytes) else json.dumps(body)
        answer = im.post(examples[0], body=data, **query)
        assert answer.status_code in (200, 400), (query, data)
        said = answer.get_json()
        assert (said["ActionStatus"] == "OK") == (answer.status_code == 200)
    poll(lambda: idle(im))
    many = bot.config.worker_threads
    sim.users |= {f"afterwards{n}" for n in range(many)}
    sim.ai_delay = 0.5  # so that each needs a thread of its own
    for number in range(many):
        assert im.say("hello", user=f"afterwards{number}").status_code == 200
    poll(lambda: sum(m.chat.startswith("afterw") for m in sim.delivered) == many, 10)
    assert not [record for record in caplog.records if record.exc_info]


def test_secrets_and_texts_are_in_nothing_that_is_printed(sim, start_bot, tmp_path):
    """At DEBUG, gunicorn too, through successes and failures of every kind."""
    sim.token, sim.ai_key = "the-token-of-callbacks", "the-key-of-the-ai"
    sigs, rest, seen = set(), sim.rest, []

    def listen(path, query, body):
        sigs.add(query["usersig"])
        return rest(path, query, body)

    sim.rest = listen
    loud = {"LOG_LEVEL": "DEBUG", "AI_TIMEOUT": 2}

    def start(**settings):
        bot = start_bot(**loud | settings)
        bot.stop()
        bot.env["GUNICORN_CMD_ARGS"] += " --log-level debug"
        return bot.start()

    def say(text="the-text-of-a-user", wait=1, **fields):
        count = len(sim.delivered)
        event = sim.say("jared", "@RBT#001", text, **fields)
        if wait:
            sim.wait(count + wait)
        return event

    bot = start()
    event = say()
    echo = {"type": "error", "error": {"type": "x", "message": f"no: {sim.ai_key} (2)"}}
    for status in (400, 401, 500):
        sim.ai_fault = lambda asked, status=status: (status, echo)
        say()
    sim.ai_fault = lambda asked: None
    for fault in ("lost", "late", 60007):
        faults = [fault]
        sim.fault = lambda command, body, faults=faults: faults and faults.pop()
        say()
    sim.fault = lambda command, body: 20003
    say(wait=0)
    poll(lambda: stand(bot.url)["set_aside"] == 1)
    sim.fault = lambda command, body: None
    im, sim.bot_url = requests, ""
    for query in ({"Sign": "0" * 64}, {"RequestTime": "1"}, {"SdkAppid": "1"}):
        signed = sim.signed(event) | query
        seen.append(im.post(f"{bot.url}/im", params=signed, json=event))
    for body in (b"the-text-of-a-user", b'{"Text": "the-text-of-a-user', b"x" * 2**21):
        signed = sim.signed(event)
        seen.append(im.post(f"{bot.url}/im", params=signed, data=body))
    wrong = event | {"MsgBody": "the-text-of-a-user"}
    seen.append(im.post(f"{bot.url}/im", params=sim.signed(wrong), json=wrong))
    seen += [im.get(f"{bot.url}/{path}") for path in ("", "im", "healthz")]
    with locked(tmp_path / "bot.db", None):
        event = sim.say("jared", "@RBT#001", "the-text-of-a-user")
        seen.append(im.post(f"{bot.url}/im", params=sim.signed(event), json=event))
    assert seen[-1].status_code == 503
    bot.stop()
    nowhere = "http://127.0.0.1:1"
    for changes in (
        {"REPLY_MODE": "stream"},
        {"REPLY_MODE": "modify", "AI_SECRET_KEY": "the-key-that-is-wrong"},
        {"AI_BASE_URL": nowhere},
        {"IM_API_URL": nowhere},
        {"IM_KEY": "the-key-that-is-wrong"},
    ):
        bot = start(**changes)
        deaf = "IM_API_URL" in changes or "IM_KEY" in changes
        event = say(wait=not deaf)
        if deaf:
            number = str(event["MsgRandom"])
            log = bot.log
            poll(lambda log=log, number=number: f"{number}\t" in log.read_text())
        seen.append(requests.get(f"{bot.url}/healthz"))
        bot.stop(signal.SIGKILL if deaf else signal.SIGTERM)
    printed = bot.log.read_text() + "".join(
        f"{answer.status_code} {answer.headers} {answer.text}" for answer in seen
    )
    assert "DEBUG" in printed and "refused with 503" in printed and len(sigs) >= 2
    hidden = {sim.key, sim.token, sim.ai_key, "the-key-that-is-wrong"}
    for secret in {*hidden, *sigs, "the-text-of-a-user", "You said"}:
        assert secret not in printed
    assert not re.search(r"eJ[\w*-]{60}", printed)  # a UserSig of any second


def stored(folder):
    """Return all that the files of the store hold."""
    return b"".join(file.read_bytes() for file in folder.glob("bot.db*"))


def test_without_memory_no_text_of_an_answered_message_stays_on_disk(
    sim, make_app, tmp_path
):
    app = make_app(history_turns=0)
    im = Caller(sim, app.test_client())
    im.say("the-text-of-a-user")
    assert "the-text-of-a-user" in sim.wait(1)[0].text
    poll(lambda: idle(im))
    app.extensions["bot"].store.prune(86400)  # as the patrol does each hour
    assert b"the-text-of-a-user" not in stored(tmp_path)
    assert b"jared" in stored(tmp_path)  # the id, by which a redelivery is known


def test_clear_leaves_no_text_on_disk(sim, make_app, tmp_path):
    app = make_app()
    im = Caller(sim, app.test_client())
    im.say("the-text-of-a-user")
    sim.wait(1)
    poll(lambda: idle(im))
    assert b"the-text-of-a-user" in stored(tmp_path)
    im.say("/clear")
    sim.wait(2)
    poll(lambda: idle(im))
    app.extensions["bot"].store.prune(86400)
    assert b"the-text-of-a-user" not in stored(tmp_path)


@pytest.mark.parametrize("turns", [20, 0])
def test_a_callback_that_is_replayed_later_is_answered_once(sim, make_app, turns):
    app = make_app(history_turns=turns)
    im = Caller(sim, app.test_client())
    events = [sim.say("jared", "@RBT#001", text) for text in ("once", "/clear")]
    events.append(sim.say_in_group("jared", "@TGS#demo", "once", ["@RBT#001"]))
    for event in events:
        assert im.post(event).status_code == 200
    sim.wait(3)
    poll(lambda: idle(im))
    app = make_app(history_turns=turns)  # and after a restart
    for again in (im, Caller(sim, app.test_client())):
        for event in events:
            assert again.post(event).status_code == 200
    im.say("afterwards")
    poll(lambda: "afterwards" in said_to(sim, "jared") and idle(im))
    assert len(sim.delivered) == 4 and len(sim.ai_requests) == 3


@pytest.mark.parametrize("died", ["as it kept the answer", "as it sent the answer"])
def test_a_stream_that_a_dead_process_began_does_not_swallow_the_answer(sim, died):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    message, saved = tim.Message("id", "@RBT#001", "jared", "hi"), {}
    tim.Streamed(client, message, 7, {}, saved.update).open()
    if died == "as it sent the answer":
        saved |= {"said": "", "index": 1}
        sim.delivered[0].time -= 20  # Tencent has closed it meanwhile
        faults = ["lost"]
        sim.fault = lambda command, body: faults and faults.pop()
    tim.Streamed(client, message, 7, dict(saved), saved.update).close("the answer")
    assert "the answer" in sim.delivered[-1].text
    assert all(message.closed for message in sim.delivered)


@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_an_opening_that_im_took_but_did_not_confirm_is_not_left_open(
    sim, make_app, mode
):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    faults = [60007, 60007, "late"]
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("hello")
    poll(lambda: not faults and idle(im))
    assert [message.closed for message in sim.delivered] == [True]
    assert sim.delivered[0].text.startswith("You said: hello")


def test_a_service_that_repeats_the_question_does_not_bring_it_into_the_log(im, caplog):
    said = {"message": "invalid content: '今天的密码是什么' (2013)"}
    im.sim.ai_fault = lambda asked: (400, {"type": "error", "error": said})
    im.say("告诉我，今天的密码是什么？")
    im.sim.wait(1)
    poll(lambda: idle(im))
    assert "HTTP 400, code 2013" in caplog.text and "密码" not in caplog.text
    im.sim.ai_fault = lambda asked: (529, {"error": {"message": "overloaded (2064)"}})
    im.say("hello")
    assert "正忙" in im.sim.wait(2)[1].text
    assert "overloaded (2064)" in caplog.text


def test_a_server_that_is_killed_for_good_is_replaced_by_another(
    sim, tmp_path, redis_server
):
    """Two servers, as on two machines, share a Redis; one dies in the middle."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    bots = [BotProcess(sim, str(f), REDIS_URL=redis_server.url) for f in folders]
    users = [f"user{number}" for number in range(40)]
    sim.users |= set(users)
    sim.ai_delay = 2
    try:
        dying, living = (bot.start() for bot in bots)
        for number, user in enumerate(users):
            sim.bot_url = bots[number % 2].url
            sim.say(user, "@RBT#001", f"first {user}")
            sim.say(user, "@RBT#001", f"second {user}")
        poll(lambda: len(sim.ai_requests) >= 20)
        dying.stop(signal.SIGKILL)
        killed = time.monotonic()
        sim.wait(80, timeout=30)
        assert time.monotonic() - killed < 30
        poll(lambda: stand(living.url)["in_work"] == 0)
        assert len(sim.delivered) == 80
        for user in users:
            assert said_to(sim, user) == [f"first {user}", f"second {user}"]
    finally:
        for bot in bots:
            if bot.alive():
                bot.stop(signal.SIGKILL)
