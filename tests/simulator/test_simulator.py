"""The simulator: how strict it is."""

from __future__ import annotations

import time
from functools import partial

import pytest
import requests
from conftest import APPID, FAST, poll

from imbot.tencent import callback, rest
from simulator import KEY, Refused, check_user_sig, free_port, text_body
from simulator.history import LOOKUPS
from usersig import gen_user_sig


def client_of(sim, sdkappid=APPID, key=KEY, admin="administrator"):
    sign = partial(gen_user_sig, sdkappid, key)
    return rest.Client(sim.url, sdkappid, admin, sign, timing=FAST)


def test_the_stand_in_checks_what_it_is_sent(sim):
    client = client_of(sim)
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
        with pytest.raises(rest.IMError) as caught:
            client.call("openim/sendmsg", body)
        assert caught.value.code == code
    for identity, code in [
        ((APPID, "wrong key", "administrator"), 70009),
        ((APPID + 1, KEY, "administrator"), 70020),
        ((APPID, KEY, "jared"), 60010),
    ]:
        with pytest.raises(rest.IMError) as caught:
            client = client_of(sim, *identity)
            client.call("openim_robot_http_svc/create_robot", {"UserID": "@RBT#x"})
        assert caught.value.code == code


LIST, ROAM, GROUP = LOOKUPS  # the calls that list conversations and messages


def listing(robot, **more):
    """Return what get_list is asked."""
    names = ("TimeStamp", "StartIndex", "TopTimeStamp", "TopStartIndex")
    return {"From_Account": robot, "AssistFlags": 7} | dict.fromkeys(names, 0) | more


def roam(operator, peer, **more):
    """Return what admin_getroammsg is asked."""
    about = {"Operator_Account": operator, "Peer_Account": peer, "MaxCnt": 100}
    return about | {"MinTime": 0, "MaxTime": 2**32} | more


def texts(messages):
    return [one["MsgBody"][0]["MsgContent"]["Text"] for one in messages]


def test_conversations_are_listed_page_by_page(sim):
    sim.users, sim.conversations_page = {f"user{n}" for n in range(5)}, 2
    for user in sorted(sim.users):
        sim.say(user, "@RBT#001", "hello", MsgTime=1000)
    sim.say("user3", "@RBT#001", "again", MsgTime=2000)
    sim.say("user4", "@RBT#002", "hello")
    sim.say_in_group("user1", "@TGS#demo", "hello", ["@RBT#001", "@RBT#002"])
    sim.say_in_group("user1", "@TGS#other", "hello", [])
    client, body, pages = client_of(sim), listing("@RBT#001"), []
    for _ in range(9):  # at most
        page = client.call(LIST, body)
        pages.append(page["SessionItem"])
        if page["CompleteFlag"]:
            break
        body |= {name: page[name] for name in body if name in page}
    assert [len(items) for items in pages] == [2, 2, 2]
    found = {item.get("To_Account") or item["GroupId"]: item for item in sum(pages, [])}
    assert found.keys() == sim.users | {"@TGS#demo"}
    assert found["user3"]["MsgTime"] == 2000 and found["user4"]["MsgTime"] == 1000
    assert found["user3"]["Type"] == 1 and found["@TGS#demo"]["Type"] == 2
    assert sim.lookups == {LIST: 3} and sim.looked_up == {("@RBT#001", ""): 1}


def test_the_messages_of_both_sides_are_listed_page_by_page(sim):
    sim.messages_page = 3
    events = [
        sim.say("jared", "@RBT#001", f"{n}", MsgTime=1000 + n // 3) for n in range(10)
    ]
    [message] = callback.parse(events[-1]["CallbackCommand"], events[-1])
    client = client_of(sim)
    client.send(message, rest.text_element("answer"), 0)
    sim.say("lin", "@RBT#001", "another's"), sim.say("jared", "@RBT#002", "another")
    sim.say("jared", "@RBT#001", "seen and gone", OnlineOnlyFlag=1)
    sim.recall(events[4])
    body, found, pages = roam("jared", "@RBT#001"), [], 0
    for _ in range(9):  # at most
        page = client.call(ROAM, body)
        found, pages = page["MsgList"] + found, pages + 1  # an earlier time each
        if page["Complete"]:
            break
        body["MaxTime"], body["LastMsgKey"] = page["LastMsgTime"], page["LastMsgKey"]
    assert texts(found) == [*map(str, range(10)), "answer"] and pages == 4
    for event, one in zip(events, found, strict=False):
        assert (event["MsgSeq"], event["MsgRandom"]) == (
            one["MsgSeq"],
            one["MsgRandom"],
        )
        assert event["MsgTime"] == one["MsgTimeStamp"]
    assert [one["MsgFlagBits"] for one in found] == [0] * 4 + [8] + [0] * 6
    last = found[-1]["From_Account"], found[-1]["MsgSeq"]
    assert last == ("@RBT#001", events[-1]["MsgSeq"] + 1)
    for sides in (("@RBT#001", "jared"), ("jared", "@RBT#001")):
        some = client.call(ROAM, roam(*sides, MinTime=1001, MaxTime=1001))
        assert texts(some["MsgList"]) == ["3", "4", "5"] and some["Complete"] == 1
    assert client.call(ROAM, roam("@RBT#002", "lin"))["MsgList"] == []
    assert sim.looked_up["@RBT#001", "jared"] == 3
    # It was sent with SyncOtherMachine 2: the sender's side does not have it.
    late = {"MinTime": 1004}
    assert client.call(ROAM, roam("@RBT#001", "jared", **late))["MsgList"] == []
    body = {"From_Account": "@RBT#001", "To_Account": "jared", "MsgRandom": 1}
    client.call("openim/sendmsg", body | {"MsgBody": text_body("both sides have it")})
    found = client.call(ROAM, roam("@RBT#001", "jared", **late))["MsgList"]
    assert texts(found) == ["both sides have it"]


def test_the_messages_of_a_group_are_listed_from_the_newest_with_gaps(sim):
    robots = ["@RBT#001"]
    events = [sim.say_in_group("lin", "@TGS#demo", f"{n}", robots) for n in range(6)]
    sim.say_in_group("lin", "@TGS#demo", "of a topic", robots, TopicId="topic")
    client, body = client_of(sim), {"GroupId": "@TGS#demo", "ReqMsgNumber": 3}
    sim.recall(events[4])
    [gap, last, recalled] = client.call(GROUP, body)["RspMsgList"]
    assert [one["IsPlaceMsg"] for one in (gap, last, recalled)] == [1, 0, 1]
    assert texts([last]) == ["@@RBT#001 5"] and recalled["MsgBody"] == []
    assert last["MsgRandom"] == events[5]["Random"]
    assert last["MsgTimeStamp"] == events[5]["MsgTime"]
    older = client.call(GROUP, body | {"ReqMsgSeq": recalled["MsgSeq"] - 1})
    assert [one["MsgSeq"] for one in older["RspMsgList"]] == [4, 3, 2]
    rest = client.call(GROUP, body | {"ReqMsgSeq": 1})
    assert [one["MsgSeq"] for one in rest["RspMsgList"]] == [1]
    told = client.call(GROUP, body | {"WithRecalledMsg": 1})["RspMsgList"]
    assert [one["IsPlaceMsg"] for one in told] == [1, 0, 2]
    sim.messages_page = 2
    assert client.call(GROUP, body)["IsFinished"] == 0


@pytest.mark.parametrize(
    ("command", "body", "code"),
    [
        (LIST, {"From_Account": "@RBT#001"}, 10004),
        (LIST, listing("@RBT#001", StartIndex="0"), 10004),
        (LIST, listing("@RBT#001", MaxCnt=5), 10004),
        (LIST, listing("@RBT#001", AssistFlags=16), 10004),
        (LIST, listing("@RBT#001", StartIndex=30), 10004),  # not what was returned
        (LIST, listing("@RBT#none"), 70107),
        (ROAM, roam("@RBT#001", "jared", MaxCnt=101), 10004),
        (ROAM, roam("@RBT#001", "jared", MaxCnt=0), 10004),
        (ROAM, roam("@RBT#001", "jared", MaxTime=1.5), 10004),
        (ROAM, roam("@RBT#001", "jared", From_Account="jared"), 10004),
        (ROAM, roam("@RBT#001", "jared", LastMsgKey="1_2_3"), 10004),
        (ROAM, roam("@RBT#001", "nobody"), 70107),
        (GROUP, {"GroupId": "@TGS#none", "ReqMsgNumber": 20}, 10015),
        (GROUP, {"GroupId": "@TGS#demo", "ReqMsgNumber": 21}, 10004),
        (GROUP, {"GroupId": "@TGS#demo", "ReqMsgNumber": 20, "ReqMsgSeq": 0}, 10004),
        (GROUP, {"GroupId": "@TGS#demo"}, 10004),
    ],
)
def test_a_wrong_look_up_is_refused(sim, command, body, code):
    with pytest.raises(rest.IMError) as caught:
        client_of(sim).call(command, body)
    assert caught.value.code == code


def test_the_last_key_goes_with_the_last_time(sim):
    event = sim.say("jared", "@RBT#001", "hello", MsgTime=1000)
    client, key = client_of(sim), f"{event['MsgSeq']}_{event['MsgRandom']}_1000"
    body = roam("@RBT#001", "jared", LastMsgKey=key)
    assert client.call(ROAM, body | {"MaxTime": 1000})["MsgList"] == []
    with pytest.raises(rest.IMError, match="10004"):
        client.call(ROAM, body)


def test_an_app_may_be_refused_a_look_up_and_ask_too_often(sim, monkeypatch):
    client, body = client_of(sim), listing("@RBT#001")
    monkeypatch.setattr("simulator.history.RATE", 2)
    client.call(LIST, body), client.call(LIST, body)
    with pytest.raises(rest.IMError, match="60007"):
        client.call(LIST, body, pauses=())
    sim.refused.add(ROAM)
    with pytest.raises(rest.IMError, match="10004"):
        client.call(ROAM, roam("@RBT#001", "jared"))
    assert sim.lookups == {LIST: 3, ROAM: 1}


def test_what_is_said_while_the_bot_cannot_be_reached_is_in_the_history(sim):
    sim.bot_url = f"http://127.0.0.1:{free_port()}"  # nothing listens there
    with pytest.raises(requests.ConnectionError):
        sim.say("jared", "@RBT#001", "while it was down")
    sim.unreachable = True
    event = sim.say("jared", "@RBT#001", "while it was out of reach")
    sim.say_in_group("jared", "@TGS#demo", "in a group", ["@RBT#001"])
    assert event["MsgBody"] == text_body("while it was out of reach")
    found = client_of(sim).call(ROAM, roam("@RBT#001", "jared"))["MsgList"]
    assert texts(found) == ["while it was down", "while it was out of reach"]
    body = {"GroupId": "@TGS#demo", "ReqMsgNumber": 20}
    found = client_of(sim).call(GROUP, body)["RspMsgList"]
    assert texts(found) == ["@@RBT#001 in a group"]


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
    fields = check_user_sig(KEY, made_by_tencent, now=1700000000)
    assert fields["TLS.identifier"] == "xiaojun"


@pytest.mark.parametrize(
    ("sig", "now", "code"),
    [
        ("", 1700000000, 70003),
        ("eJyr", 1700000000, 70003),
        ("not base64 é", 1700000000, 70003),
        (gen_user_sig(APPID, KEY, "a", 60, 1700000000)[:80], 0, 70003),
        (gen_user_sig(APPID, "other", "a", 60, 1700000000), 1700000000, 70009),
        (gen_user_sig(APPID, KEY, "a", 60, 1700000000), 1700000061, 70001),
    ],
)
def test_a_bad_usersig_is_refused_with_tencents_code(sig, now, code):
    with pytest.raises(Refused) as caught:
        check_user_sig(KEY, sig, now)
    assert caught.value.code == code


def test_an_answer_in_one_piece_takes_as_long_as_a_stream_and_breaks_off_too(sim):
    url, asked = f"{sim.url}/v1/chat/completions", [{"role": "user", "content": "hi"}]
    call = {"json": {"messages": asked, "thinking": {"type": "disabled"}}}
    call["headers"] = {"Authorization": f"Bearer {sim.ai_key}"}
    sim.ai_pace = 0.02
    began = time.monotonic()
    answer = requests.post(url, **call, timeout=10).json()
    said = answer["choices"][0]["message"]["content"]
    assert said.startswith("You said: hi")
    assert time.monotonic() - began > sim.ai_pace * len(said) / 4
    sim.break_after = 2
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.post(url, **call, timeout=10)
    sim.break_after, sim.ai_pace = 0, 0.2
    with pytest.raises(requests.ReadTimeout):
        requests.post(url, **call, timeout=0.1)  # and that is noticed
    poll(lambda: sim.ai_ended == 3, timeout=1)
