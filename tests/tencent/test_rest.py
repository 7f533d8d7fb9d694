"""Tencent IM: reading callbacks, and calling its REST API."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
import responses
from conftest import APPID, dribble

import usersig
from imbot.tencent import callback, rest
from simulator import KEY, c2c_event, free_port, text_body


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


def test_a_usersig_that_expired_is_made_anew_once(sim):
    client = rest.Client(sim.url, APPID, KEY, "administrator")
    client._sig = usersig.gen_user_sig(APPID, KEY, "administrator", 1, now=1700000000)
    client._renew_at = time.time() + 1000
    client.call("openim_robot_http_svc/create_robot", {"UserID": "@RBT#009"})
    assert "@RBT#009" in sim.robots


@responses.activate
def test_a_wrong_key_is_not_tried_again():
    url = "https://console.tim.qq.com/v4/openim/sendmsg"
    refusal = {"ActionStatus": "FAIL", "ErrorCode": 70009, "ErrorInfo": "sig verify"}
    responses.post(url, json=refusal)
    client = rest.Client("https://console.tim.qq.com", APPID, "wrong", "administrator")
    with pytest.raises(rest.IMError, match="70009.*IM_KEY is not the key") as caught:
        message = callback.Message("id", "@RBT#001", "jared", "hi")
        client.send(message, text_body("hello")[0], 7, 0, True)
    assert not caught.value.retry
    [call] = responses.calls
    assert json.loads(call.request.body) == {
        "From_Account": "@RBT#001",
        "To_Account": "jared",
        "SyncOtherMachine": 2,
        "MsgSeq": 7 * rest.PARTS,
        "MsgRandom": rest.numbers("id", 7, 0)[1],
        "MsgBody": text_body("hello"),
        "ForbidCallbackControl": [
            "ForbidBeforeSendMsgCallback",
            "ForbidAfterSendMsgCallback",
        ],
    }
    query = call.request.params
    assert query["contenttype"] == "json" and query["identifier"] == "administrator"


def test_an_answer_of_tencents_that_is_cut_is_a_call_that_brought_none(ai_socket):
    server = ai_socket(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{")
    error = failure(server.url)
    assert error.code == rest.NETWORK and error.retry


def failure(url, **options):
    client = rest.Client(url, APPID, KEY, "administrator")
    with pytest.raises(rest.IMError) as caught:
        client.call("openim_robot_http_svc/get_all_robots", {}, **options or NO_WAITS)
    assert "usersig" not in str(caught.value)
    return caught.value


NO_WAITS = {"waits": ()}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "script",
    [
        dribble(HEAD, b"X-Header: x\r\n"),
        dribble(HEAD + b"Content-Length: 9000\r\n\r\n", b" "),
        dribble(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        dribble(HEAD + b"\r\n", b" "),
        dribble(b"", b""),
    ],
    ids=["headers", "body", "chunks", "until the end", "nothing"],
)
def test_an_answer_of_tencents_that_drips_cannot_hold_a_thread(
    ai_socket, monkeypatch, script
):
    monkeypatch.setattr(tim, "CALL_TIMEOUT", 0.5)
    began = time.monotonic()
    error = failure(ai_socket(script).url)
    assert time.monotonic() - began < 2
    assert error.retry and error.may_have_arrived


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno", HEAD + b"\r\n{"],
    ids=["cut before it", "of a proxy", "cut within it"],
)
def test_a_call_without_tencents_answer_may_have_arrived(ai_socket, answer):
    error = failure(ai_socket(answer).url)
    assert error.retry and error.may_have_arrived


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{}",
        "https://127.0.0.1:{}",
        "http://no-such-host.invalid",
        "https://a..b",
        "https://.de",
        "http://[::1",
    ],
)
def test_a_call_that_finds_no_connection_has_not_arrived(monkeypatch, url):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    error = failure(url.format(free_port()))
    assert error.retry and not error.may_have_arrived


def test_a_call_that_finds_no_tls_has_not_arrived():
    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.recv(9000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        error = failure(f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert error.retry and not error.may_have_arrived


@pytest.mark.parametrize(
    ("faults", "arrived"),
    [
        ([80001], False),
        ([60007, 60007], False),
        (["late", 80001], True),
        (["lost", 60007], True),
        ([70001, 80001], False),
        (["late", 70001, 80001], True),
    ],
)
def test_a_call_may_have_arrived_if_one_of_its_tries_may(sim, faults, arrived):
    left = list(faults)
    sim.fault = lambda command, body: left.pop(0)
    error = failure(sim.url, waits=[0] * (sum(f != 70001 for f in faults) - 1))
    assert not left
    assert error.may_have_arrived == arrived


@pytest.mark.parametrize(
    ("code", "retry", "about_message"),
    [
        (rest.NETWORK, True, False),
        (60007, True, False),
        (91000, True, False),
        (90994, True, True),
        (90995, True, True),
        (20028, True, True),
        (80001, False, False),
        (70001, False, False),
        (12345, False, False),
    ],
)
def test_a_code_says_whether_to_try_again_and_whom_it_concerns(
    code, retry, about_message
):
    error = rest.IMError("openim/sendmsg", code, "")
    assert (error.retry, error.about_message) == (retry, about_message)


def test_a_button_that_stops_stops_whatever_else_is_sent():
    button = {"Data": '{"chatbotPlugin": 2, "src": 22}'}
    body = [
        {"MsgType": "TIMCustomElem", "MsgContent": button},
        {"MsgType": "TIMFaceElem", "MsgContent": {}},
    ]
    event = c2c_event("jared", "@RBT#001", "") | {"MsgBody": body}
    assert [m.kind for m in callback.parse("Bot.OnC2CMessage", event)] == ["stop"]
