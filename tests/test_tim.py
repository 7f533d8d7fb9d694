"""Tencent IM: reading callbacks, and calling its REST API."""

from __future__ import annotations

import json
import time

import pytest
import responses

import tim
import usersig
from conftest import APPID
from simulator import KEY, text_body


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


def test_an_answer_of_tencents_that_is_cut_is_a_call_that_brought_none(ai_socket):
    server = ai_socket(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{")
    client = tim.Client(server.url, APPID, KEY, "administrator")
    with pytest.raises(tim.IMError) as caught:
        client.call("openim/sendmsg", {}, waits=())
    assert caught.value.code == tim.NETWORK and caught.value.retry
