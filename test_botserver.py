"""The tests: every promise of the README, on a stand-in for Tencent IM and the AI.

pytest                  all of them
pytest -k signature     those whose name says signature
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import requests
import responses
from hypothesis import given, settings
from hypothesis import strategies as st

import providers
import store
import tim
import usersig
from botserver import TEXTS, Config, ConfigError, create_app
from simulator import KEY, BotProcess, Simulator, running, text_body
from store import RedisStore, SQLiteStore, StoreError, open_store

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
        ("@Somebody @Else hello", "@Somebody @Else hello"),
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
        ({"DATABASE": "/nowhere/bot.db"}, "/nowhere/bot.db cannot be opened"),
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
    texts = [m.text for m in sim.delivered if m.chat == "jared"]
    assert [text[:11] for text in texts[:3]] == [f"You said: {n}" for n in range(3)]
    assert "太快" in texts[3]


def test_a_conversation_that_is_full_is_told_once(sim, make_app):
    im = Caller(sim, make_app(max_waiting=2).test_client())
    sim.ai_delay = 1
    for number in range(6):
        im.say(str(number))
    [notice] = sim.wait(1)
    assert "消息太多" in notice.text
    poll(lambda: len(sim.delivered) == 3 and idle(im))


def test_pictures_go_to_services_that_see(sim, make_app):
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
    im = Caller(sim, make_app(ai_provider="deepseek").test_client())
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
    names |= {"Service": providers.Service, "openai_stream": providers.openai_stream}
    names |= {"SQLiteStore": store.SQLiteStore}
    for block in blocks:
        exec(block, names)
    mine = providers.Provider(names["PROVIDERS"]["mine"])
    assert mine.body([])["temperature"] == 0.5
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
    assert kept.waiting("\ud800") == 1
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
    assert kept.waiting("jared") == 1
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
    assert (kept.waiting("jared"), kept.waiting("other")) == (2, 1)
    assert kept.waiting("nobody") == 0
    kept.release(claim, 0)
    assert kept.stats()["in_work"] == 0
    assert (kept.due(10), kept.due(1)) == (2, 1)


def test_events_are_counted_in_windows_shared_by_processes(kept, opened):
    other = opened()
    numbers = in_threads(8, lambda n: (kept, other)[n % 2].count("jared", 3600))
    assert sorted(numbers) == list(range(1, 9))
    assert kept.count("other", 3600) == 1
    assert kept.count("soon over", 1) >= 1
    poll(lambda: kept.count("soon over", 1) == 1, 3)


def test_old_windows_vanish(kept, place, request):
    kept.count("jared", 1)

    def gone():
        kept.prune(0)
        if place[1]:
            server = request.getfixturevalue("shared_redis")
            return server.cli("keys", "*count*") == ""
        with sqlite3.connect(place[0]) as file:
            [(count,)] = file.execute("SELECT count(*) FROM counter")
        file.close()
        return count == 0

    poll(gone, 5)


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
    assert kept.waiting("jared") >= len(numbers) >= 100


def test_sqlite_syncs_what_it_adds_and_shares_the_commit(sqlite):
    seen = []
    sqlite._writer.set_trace_callback(seen.append)
    sqlite.add("0", "jared", {})
    sqlite.release(sqlite.claim(), 0)
    levels = [line for line in seen if "synchronous" in line]
    assert [level.split()[-1] for level in levels] == ["FULL", "NORMAL", "NORMAL"]
    seen.clear()
    with sqlite._write_lock:  # as if a commit went on
        threads = [
            threading.Thread(target=sqlite.add, args=(str(n), "jared", {}))
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        poll(lambda: len(sqlite._jobs) == 8)
    for thread in threads:
        thread.join()
    assert seen.count("COMMIT") == 1 and sqlite.waiting("jared") == 9


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
    assert sqlite.waiting("jared") == 2


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
        patch.setitem(store._SQL, "count", ("INSERT INTO message (seq) VALUES (1)",))
        with pytest.raises(StoreError):
            sqlite.count("jared", 60)
    put(sqlite, "1")


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
    values |= {name: None for name in ("id", "token", "most", "new", "lease", "key")}
    values |= {name: None for name in ("reason", "reply", "progress", "remember")}
    values |= {name: None for name in ("delay", "back", "data", "seconds")}
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
