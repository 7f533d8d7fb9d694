"""Tencent's REST API: what is retried, what may have arrived, what cannot be read."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from functools import partial

import pytest
import responses
from conftest import APPID, dribble

from imbot.tencent import rest
from imbot.tencent.callback import Message
from imbot.timing import Timing
from simulator import KEY, free_port, text_body
from usersig import gen_user_sig

ONCE = Timing(pauses=(), call_timeout=0.3)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SIGN = partial(gen_user_sig, APPID, KEY)


def connect(url, timing=ONCE, make_sig=SIGN, **options):
    return rest.Client(url, APPID, "administrator", make_sig, 64, timing, **options)


def failure(url, timing=ONCE):
    """Return the error of a call."""
    with pytest.raises(rest.IMError) as caught:
        connect(url, timing).robots()
    assert "usersig" not in str(caught.value)
    return caught.value


def answered(body, head=HEAD):
    """Return the script of a server that sends this body."""
    return b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


def test_a_usersig_that_expired_is_made_anew_once(sim):
    old, made = SIGN("administrator", 1, now=1700000000), []

    def make_sig(userid, seconds):
        made.append(userid)
        return SIGN(userid, seconds) if made[1:] else old

    client = connect(sim.url, make_sig=make_sig)
    client.call("openim_robot_http_svc/create_robot", {"UserID": "@RBT#009"})
    assert "@RBT#009" in sim.robots
    assert client.robots() and made == ["administrator"] * 2


@responses.activate
def test_a_wrong_key_is_not_tried_again():
    url = "https://console.tim.qq.com/v4/openim/sendmsg"
    refusal = {"ActionStatus": "FAIL", "ErrorCode": 70009, "ErrorInfo": "sig verify"}
    responses.post(url, json=refusal)
    wrong = partial(gen_user_sig, APPID, "wrong")
    client = connect("https://console.tim.qq.com", make_sig=wrong)
    with pytest.raises(rest.IMError, match="70009.*IM_KEY is not the key") as caught:
        message = Message("id", "@RBT#001", "jared", "hi", seq=7)
        client.send(message, text_body("hello")[0], 0, True)
    assert not caught.value.retry
    [call] = responses.calls
    assert json.loads(call.request.body) == {
        "From_Account": "@RBT#001",
        "To_Account": "jared",
        "SyncOtherMachine": 2,
        "MsgSeq": 8,
        "MsgRandom": rest.numbers(message, 0)[1],
        "MsgBody": text_body("hello"),
        "ForbidCallbackControl": [
            "ForbidBeforeSendMsgCallback",
            "ForbidAfterSendMsgCallback",
        ],
    }
    query = call.request.params
    assert query["contenttype"] == "json" and query["identifier"] == "administrator"


def test_an_answer_that_is_cut_is_none(ai_socket):
    server = ai_socket(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{")
    error = failure(server.url)
    assert error.code == rest.NETWORK and error.retry


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
def test_an_answer_that_drips_cannot_hold_a_thread(ai_socket, script):
    began = time.monotonic()
    error = failure(ai_socket(script).url)
    assert time.monotonic() - began < ONCE.call_timeout + 2
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
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        error = failure(url, Timing(pauses=(), call_timeout=20))
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
    retries = sum(fault != 70001 for fault in faults) - 1
    error = failure(sim.url, Timing(pauses=(0.0,) * retries))
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


def endless(head, piece):
    """Return a script that sends a body without end, and counts its bytes."""
    sent = []

    def script(connection):
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            sent.append(len(piece))

    return script, sent


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_an_endless_answer_is_read_up_to_a_limit(ai_socket, encoding):
    content = b"[" * 100_000
    content = gzip.compress(content) if encoding == "gzip" else content
    piece = b"%x\r\n%s\r\n" % (len(content), content)
    head = CHUNKED + f"Content-Encoding: {encoding}\r\n\r\n".encode()
    script, sent = endless(head, piece)
    error = failure(ai_socket(script).url, Timing(pauses=(), call_timeout=20))
    assert "no answer (TooLarge)" in str(error)
    assert error.retry and error.may_have_arrived
    assert sum(sent) < 10 * rest.LARGEST_ANSWER


def test_a_small_body_that_unpacks_to_a_huge_one_takes_no_memory(ai_socket):
    bomb = gzip.compress(b" " * 100 * 2**20, 1)
    url = ai_socket(answered(bomb, HEAD + b"Content-Encoding: gzip\r\n")).url
    tracemalloc.start()
    error = failure(url, Timing(pauses=(), call_timeout=20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "TooLarge" in str(error)
    assert peak < 8 * 2**20


def test_an_answer_of_almost_the_limit_is_read(ai_socket):
    robots = ["@RBT#" + "x" * 100] * 9000
    body = {"ActionStatus": "OK", "ErrorCode": 0, "Robot_Account": robots}
    url = ai_socket(answered(json.dumps(body).encode())).url
    assert connect(url, Timing(pauses=(), call_timeout=20)).robots() == robots


OK = b'{"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": %s}'


@pytest.mark.parametrize(
    "body",
    [
        *(OK % code for code in (b"Infinity", b"-1e999", b"NaN", b"true", b"null")),
        *(OK % code for code in (b"[0]", b"{}", b"0.0", b'"0x0"', b'""', b"9" * 4000)),
        OK % b"9" * 9000,
        b'{"ActionStatus": "OK"}',
        b'[{"ActionStatus": "OK", "ErrorCode": 0}]',
        b'"OK"',
        b"[" * 200_000,
        b"\xff\xfe",
        b"",
        b"<html>502</html>",
    ],
    ids=lambda body: body[-30:].decode("latin-1"),
)
def test_what_is_not_tencents_json_is_no_valid_answer(ai_socket, body):
    error = failure(ai_socket(answered(body)).url)
    assert (error.code, error.may_have_arrived) == (rest.NETWORK, True)
    assert "no valid answer (HTTP 200" in str(error)


@pytest.mark.parametrize("robots", ["null", "[]", "{}", '""'])
def test_an_app_without_robots_has_an_empty_list(ai_socket, robots):
    body = OK.replace(b"%s", b'"0", "Robot_Account": ' + robots.encode())
    assert connect(ai_socket(answered(body)).url).robots() == []


@pytest.mark.parametrize("robots", ["5", '"@RBT#1"', '{"a": 1}', "true"])
def test_a_list_of_robots_that_is_none_is_no_valid_answer(ai_socket, robots):
    """Taken as no robots, nothing would be looked up after an outage."""
    body = OK.replace(b"%s", b'"0", "Robot_Account": ' + robots.encode())
    client = connect(ai_socket(answered(body)).url)
    with pytest.raises(rest.IMError, match="get_all_robots.*no valid answer"):
        client.robots()


def test_what_tencent_says_of_an_error_cannot_forge_a_line(ai_socket):
    info = "\x1b[2J\r\n2026-11-30 INFO forged " + "x" * 10**5
    body = {"ActionStatus": "FAIL", "ErrorCode": 80001, "ErrorInfo": info}
    said = str(failure(ai_socket(answered(json.dumps(body).encode())).url))
    assert said.isprintable() and len(said) < 400
    assert "80001: \\x1b[2J 2026-11-30" in said and "sensitive-word" in said


def test_what_an_error_quotes_of_the_message_and_the_usersig_is_hidden(sim):
    quoted = []

    def refuse(command, query, body):
        quoted.append(f"{query['usersig']} in {body.decode()}")
        return {"ActionStatus": "FAIL", "ErrorCode": 80001, "ErrorInfo": quoted[0]}

    sim.rest = refuse
    message = Message("id", "@RBT#001", "lin", "")
    with pytest.raises(rest.IMError) as caught:
        connect(sim.url).send(message, text_body('my "PIN" is 4711')[0], 0)
    assert "4711" in quoted[0] and "4711" not in str(caught.value)
    assert '80001: *** in {"From_Account": "@RBT#001"' in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("Duplicate message", None),
        ("repeated Random", None),
        ("消息重复", None),
        ("rate control", 10023),
        ("a\nb" * 10**4, 10023),
        (["x"], 10023),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_group_message_dropped_as_a_duplicate_counts_as_sent(ai_socket, reason, code):
    body = {"ActionStatus": "OK", "ErrorCode": 0, "MsgDropReason": reason, "MsgSeq": 5}
    client = connect(ai_socket(answered(json.dumps(body).encode())).url)
    message = Message("id", "@RBT#001", "lin", "hi", "@TGS#demo")
    if code is None:
        assert client.send(message, text_body("hello")[0], 0)["MsgSeq"] == 5
        return
    with pytest.raises(rest.IMError) as caught:
        client.send(message, text_body("hello")[0], 0)
    assert caught.value.code == code and caught.value.retry
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ({"ResultCode": 0}, ""),
        ({"ResultCode": 30520, "ResultInfo": "already"}, ""),
        (None, ""),
        ({"ResultCode": 30003, "ResultInfo": "no such\nuser"}, "does not exist"),
        ({"ResultCode": 30001, "ResultInfo": "a\nb"}, "30001: a\\nb"),
        ({"ResultCode": []}, "no valid answer"),
        ("x", "no valid answer"),
    ],
)
def test_a_robot_becomes_the_friend_of_a_user(ai_socket, result, says):
    body = {"ActionStatus": "OK", "ErrorCode": 0}
    body |= {"ResultItem": [result]} if result else {}
    server = ai_socket(answered(json.dumps(body).encode()))
    if says:
        with pytest.raises(rest.IMError) as caught:
            connect(server.url).befriend("jared", "@RBT#001")
        assert says in str(caught.value)
    else:
        connect(server.url).befriend("jared", "@RBT#001")
    assert server.heads[0].startswith("POST /v4/sns/friend_add?")
    friend = {"To_Account": "@RBT#001", "AddSource": "AddSource_Type_Server"}
    asked = {"From_Account": "jared", "AddFriendItem": [friend], "ForceAddFlags": 1}
    assert json.loads(server.bodies[0]) == asked
