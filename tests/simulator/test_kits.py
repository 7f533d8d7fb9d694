"""The kits' rules, and how a message is drawn, sorted and ended."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
import requests
from conftest import APPID, FAST, in_threads, poll

from imbot.tencent import rest
from simulator import KEY, text_body
from simulator.__main__ import TEXTS, Demonstration, demo_settings
from simulator.kits import KitChat
from simulator.messages import is_finished
from simulator.page import act
from usersig import gen_user_sig


def card(text="", **fields):
    """Return a MsgBody with a chatbot element."""
    data = {"chatbotPlugin": 2, "src": 2, "chunks": [text], **fields}
    content = {"Data": json.dumps(data), "Desc": "…"}
    return [{"MsgType": "TIMCustomElem", "MsgContent": content}]


def failure(text, **fields):
    data = {"chatbotPlugin": 2, "src": 23, "errorInfo": text, **fields}
    content = {"Data": json.dumps(data), "Desc": "…"}
    return [{"MsgType": "TIMCustomElem", "MsgContent": content}]


STREAM = [{"MsgType": "TIMStreamElem", "MsgContent": {"Chunks": []}}]
OTHER = [{"MsgType": "TIMCustomElem", "MsgContent": {"Data": "{}"}}]
STOP = card(src=22, msgKey="1_2_3")


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ([], "waiting"),
        ([text_body("hi")], "plain"),
        ([STREAM], "plain"),
        ([OTHER], "plain"),
        ([card("hi", isFinished=1)], ""),
        ([card("h", isFinished=0)], "growing"),
        ([card("h", isFinished=0), card("hi", isFinished=1)], ""),
        ([card("hi")], "growing"),  # on iOS
        ([card("hi", isFinished=True)], "growing"),  # no number
        ([failure("no")], ""),
        ([failure("no", isFinished=0)], "growing"),  # on Android
        ([text_body("hi"), card("hi", isFinished=1)], ""),
        ([card("hi", isFinished=1), text_body("more")], ""),
    ],
)
def test_a_phone_is_locked_until_a_finished_chatbot_message_comes(shown, why):
    phone, vue = KitChat("phone"), KitChat("vue")
    for chat in (phone, vue):
        assert not chat.locked
        chat.send(text_body("hello"))
        for elements in shown:
            chat.show("key", elements)
    assert (phone.why, phone.locked) == (why, bool(why))
    assert not vue.locked


def test_the_stop_button_locks_nothing():
    phone = KitChat("phone")
    phone.send(STOP)
    assert not phone.locked


def test_what_a_robot_says_first_locks_nothing():
    phone = KitChat("phone")
    phone.show("key", text_body("good morning"))
    assert not phone.locked


@pytest.mark.parametrize(
    ("kit", "elements", "text"),
    [
        ("phone", text_body("**hi**"), "**hi**"),
        ("phone", STREAM, "[unsupported message]"),
        ("vue", STREAM, "[custom message]"),
        ("vue", OTHER, "[custom message]"),
        ("vue", card("hi", isFinished=0), "hi"),
        ("phone", failure("no"), "no"),
    ],
)
def test_a_kit_draws(kit, elements, text):
    chat = KitChat(kit)
    chat.show("key", elements)
    assert chat.shown == {"key": text}


def test_a_vue_kit_only_appends_to_a_chatbot_message():
    vue, phone = KitChat("vue"), KitChat("phone")
    for chat in (vue, phone):
        for text in ("The answer", "The ans", "Sorry, no answer came"):
            chat.show("key", card(text, isFinished=1))
    assert vue.shown["key"] == "The answerno answer came"
    assert phone.shown["key"] == "Sorry, no answer came"


def test_a_kit_takes_only_the_number_1_for_finished():
    for value in (0, "1", True, None, 1.0):
        assert not is_finished({"src": 2, "isFinished": value})


@pytest.fixture
def send(sim):
    """Return a function that makes a REST call of the robot's."""
    sign = partial(gen_user_sig, APPID, KEY)
    client = rest.Client(sim.url, APPID, "administrator", sign, timing=FAST)
    numbers = iter(range(1, 99))

    def call(command, elements=None, **fields):
        body = {"MsgBody": elements} if elements else {}
        if command == "openim/sendmsg":
            body |= {"MsgRandom": next(numbers), "To_Account": "jared"}
        if "friend" not in command and "GroupId" not in fields:
            body["From_Account"] = "@RBT#001"
        return client.call(command, body | fields, pauses=())

    return call


def test_the_stand_in_knows_what_the_users_kits_show(sim, send):
    sim.say("jared", "@RBT#001", "hello")
    phone = sim.kit_chat("phone", "jared", "@RBT#001")
    assert sim.locked()["phone"] == {"jared @RBT#001": "waiting"}
    assert sim.locked()["vue"] == sim.locked()["react"] == {}
    key = send("openim/sendmsg", card("h", isFinished=0))["MsgKey"]
    assert phone.why == "growing" and not sim.delivered[0].closed
    about = {"To_Account": "jared", "MsgKey": key}
    send("openim/modify_c2c_msg", card("hi", isFinished=1), **about)
    assert not phone.locked and phone.shown == {key: "hi"}
    assert sim.delivered[0].closed and sim.locked()["phone"] == {}


def test_in_a_group_no_kit_locks(sim, send):
    sim.say_in_group("jared", "@TGS#demo", "hello", ["@RBT#001"])
    group = {"GroupId": "@TGS#demo", "Random": 1, "From_Account": "@RBT#001"}
    send("group_open_http_svc/send_group_msg", text_body("hi"), **group)
    assert not sim.kit_chat("phone", "@TGS#demo", "@RBT#001").shown
    assert not any(sim.locked().values())


@pytest.mark.parametrize(
    ("kit", "platform", "drawn"),
    [
        ("phone", "iOS", "hi"),
        ("vue", "Web", "hi"),
        ("react", "Web", "[custom message]"),
    ],
)
def test_a_client_says_what_it_runs_on_and_draws_a_card(sim, kit, platform, drawn):
    act(sim, {"say": "hi", "as": "jared", "to": "@RBT#001", "robots": [], "kit": kit})
    assert sim.signed(sim.said[0])["OptPlatform"] == platform
    chat = KitChat(kit)
    chat.show(1, card("hi", isFinished=1))
    assert chat.shown == {1: drawn}


PICTURE = {"Type": 1, "Size": 1, "Width": 1, "Height": 1, "URL": "https://x.example/a"}
IMAGE = {"UUID": "1", "ImageFormat": 1, "ImageInfoArray": [PICTURE]}


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        ([{"MsgType": "TIMImageElem", "MsgContent": IMAGE}], ""),
        (
            [{"MsgType": "TIMCustomElem", "MsgContent": {"Data": '{"a":1}'}}],
            'TIMCustomElem\n```\n{\n  "a": 1\n}\n```',
        ),
        (
            [{"MsgType": "TIMCustomElem", "MsgContent": {"Data": "no JSON"}}],
            'TIMCustomElem\n```\n{\n  "Data": "no JSON"\n}\n```',
        ),
        (
            [{"MsgType": "TIMFaceElem", "MsgContent": {"Index": 1, "Data": "x"}}],
            'TIMFaceElem\n```\n{\n  "Index": 1,\n  "Data": "x"\n}\n```',
        ),
        (card(isFinished=1), ""),
    ],
)
def test_any_element_is_drawn(sim, send, elements, text):
    send("openim/sendmsg", elements)
    [message] = sim.delivered
    is_picture = elements[0]["MsgType"] == "TIMImageElem"
    assert (message.text, message.closed) == (text, True)
    assert message.pictures == ["https://x.example/a"] * is_picture


@pytest.mark.parametrize(
    "element",
    [
        "text",
        {"MsgType": "TIMTextElem", "MsgContent": {"text": "x"}},
        {"MsgType": "TIMTextElem", "MsgContent": {"Text": 1}},
        {"MsgType": "TIMCustomElem", "MsgContent": {"Data": {}}},
        {"MsgType": "TIMImageElem", "MsgContent": []},
        {"MsgType": "TIMTextElem", "MsgContent": {"Text": "x"}, "More": 1},
    ],
)
def test_a_wrong_element_is_refused(send, element):
    with pytest.raises(rest.IMError, match="90002"):
        send("openim/sendmsg", [element])


def stream(index, text, last=False, **content):
    chunk = {"EventType": "data", "Index": index, "Markdown": text, "IsLast": last}
    content |= {"CompatibleText": "…", "Chunks": [chunk]}
    return [{"MsgType": "TIMStreamElem", "MsgContent": content}]


def test_the_chunks_of_a_stream_must_follow_one_another(sim, send):
    command = "stream_msg/send_c2c_stream_msg"
    about = {"To_Account": "jared", "MsgRandom": 7, "MsgSeq": 1}
    id = {"StreamMsgID": send(command, stream(1, "a"), **about)["StreamMsgID"]}
    [message] = sim.delivered
    send(command, stream(1, "a"), **about)  # once more
    for index in (3, 0, 100):
        send(command, stream(index, "lost", last=True, **id), **about)
    assert (message.text, message.closed) == ("a", False)
    send(command, stream(2, "b", **id), **about)
    send(command, stream(2, "b", **id), **about)
    send(command, stream(3, "c", last=True, **id), **about)
    assert (message.text, message.closed) == ("abc", True)
    with pytest.raises(rest.IMError, match="10004"):
        send(command, stream(4, "d", **id), **about)


def test_a_silent_stream_is_closed(sim, send):
    command = "stream_msg/send_c2c_stream_msg"
    about = {"To_Account": "jared", "MsgRandom": 7, "MsgSeq": 1}
    id = {"StreamMsgID": send(command, stream(1, "a"), **about)["StreamMsgID"]}
    [message] = sim.delivered
    assert not message.closed
    message.time -= 16
    assert message.closed
    with pytest.raises(rest.IMError, match="10004"):
        send(command, stream(2, "b", **id), **about)
    assert (message.text, message.closed) == ("a", True)


def test_an_answer_that_ends_in_an_ellipsis_is_an_answer(sim, send):
    sim.ai_answer = lambda messages: "Well…"
    sim.reply_to([])
    key = send("openim/sendmsg", text_body("…"))["MsgKey"]
    [message] = sim.delivered
    assert not message.closed
    about = {"To_Account": "jared", "MsgKey": key}
    for text, closed in [("We…", False), ("Well……", False), ("Well…", True)]:
        send("openim/modify_c2c_msg", text_body(text), **about)
        assert message.closed == closed
    send("openim/sendmsg", text_body("To be continued…"))
    assert sim.delivered[1].closed


def test_a_message_has_a_place_by_which_clients_sort(sim, send):
    answer = send("openim/sendmsg", text_body("hi"), MsgSeq=7, MsgTimeStamp=1)
    [message] = sim.delivered
    assert message.place == (answer["MsgTime"], 7)
    assert message.key == f"7_1_{answer['MsgTime']}"
    assert not message.said > message.time


def test_the_old_names_of_a_look_up_are_taken(sim, send):
    sim.say("jared", "@RBT#001", "hello")
    about = {"MaxCnt": 9, "MinTime": 0, "MaxTime": 2**32}
    found = send("openim/admin_getroammsg", To_Account="jared", **about)
    assert [one["From_Account"] for one in found["MsgList"]] == ["jared"]


def test_a_robot_is_made_a_users_friend(sim, send):
    item = {"To_Account": "@RBT#001", "AddSource": "AddSource_Type_Server"}
    about = {"From_Account": "jared", "ForceAddFlags": 1}
    answer = send("sns/friend_add", AddFriendItem=[item], **about)
    assert sim.friends == {"jared": {"@RBT#001"}} and answer["Fail_Account"] == []
    answer = send("sns/friend_add", AddFriendItem=[item], **about)
    assert answer["ResultItem"][0]["ResultCode"] == 30520  # they are already
    nobody = item | {"To_Account": "@RBT#none"}
    answer = send("sns/friend_add", AddFriendItem=[nobody], **about)
    assert answer["Fail_Account"] == ["@RBT#none"]
    for wrong, code in [
        ({"From_Account": "nobody", "AddFriendItem": [item]}, 30003),
        ({"AddFriendItem": [item | {"AddSource": "x"}]}, 30001),
    ]:
        with pytest.raises(rest.IMError, match=str(code)):
            send("sns/friend_add", **about | wrong)


def test_a_look_up_hangs_or_is_refused_if_that_is_asked_for(sim, send):
    command, about = "group_open_http_svc/group_msg_get_simple", {"ReqMsgNumber": 1}
    about["GroupId"] = "@TGS#demo"
    sim.history_fault = 91000
    with pytest.raises(rest.IMError, match="91000"):
        send(command, **about)
    sim.history_fault = "hang"

    def look_up(number):
        if number:
            poll(lambda: sim.lookups[command] == 2)
            send("openim/sendmsg", text_body("answered meanwhile"))
            sim.history_fault = ""
        else:
            with pytest.raises(rest.IMError, match="no answer"):
                send(command, **about)
        return len(sim.delivered)

    assert in_threads(2, look_up) == [1, 1]
    assert "RspMsgList" in send(command, **about)


def test_a_repeated_group_message_may_be_answered_with_a_reason(sim, send):
    group = {"GroupId": "@TGS#demo", "Random": 1, "From_Account": "@RBT#001"}
    command = "group_open_http_svc/send_group_msg"
    first = send(command, text_body("hi"), **group)
    assert send(command, text_body("hi"), **group) == first
    sim.drop_reason = "duplicate"
    again = send(command, text_body("hi"), **group)
    assert again == first | {"MsgDropReason": "duplicate"}
    assert len(sim.delivered) == 1


def test_the_bot_gets_the_environment_but_what_the_demonstration_sets():
    environment = {"LANG": "zh_CN.UTF-8", "MY_KEY": "x", "REPLY_MODE": "whole"}
    ours = {"IM_KEY": "y", "DATABASE_URL": "postgres:", "PORT": "1", "AI_MODEL": ""}
    more = {"BOT_LANGUAGE": "zh", "AI_PROVIDER": "minimax"}
    assert demo_settings(environment | ours) == environment | more


def test_trouble_ends_when_the_last_page_is_left(sim):
    sim.news_every = sim.trouble_lasts = 0.05
    trouble = {"ai": "fail", "im": "busy", "bot": "down"}
    with requests.get(f"{sim.url}/page", stream=True, timeout=5):
        poll(lambda: sim.visitors == 1)
        act(sim, {"trouble": trouble})
        assert sim.trouble == trouble and sim.unreachable
        assert sim.fault("openim/sendmsg", {}) == 90994
    poll(lambda: not any(sim.trouble.values()))
    poll(lambda: not sim.unreachable)
    assert sim.fault("openim/sendmsg", {}) is None and not sim.visitors


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
    name = "name-8080.app.github.dev"  # a container elsewhere, whose port is forwarded
    forwarded = {"Origin": f"https://{name}", "X-Forwarded-Host": name}
    assert requests.get(sim.url, headers=forwarded).status_code == 200
    assert "unsafe" not in page.headers["Content-Security-Policy"]


def test_the_terminal_shows_all_messages_of_an_answer(sim, send, capsys, monkeypatch):
    def answer(*about):
        send("openim/sendmsg", card("part 1", isFinished=1))
        image = {"MsgType": "TIMImageElem", "MsgContent": IMAGE}
        send("openim/sendmsg", [image])
        send("openim/sendmsg", card("", isFinished=1))  # unlocks a phone
        threading.Timer(0.05, send, ["openim/sendmsg", text_body("part 2")]).start()

    monkeypatch.setattr(sim, "say", answer)
    Demonstration(sim, TEXTS["en"]).show("jared", "hello")
    lines = [line.split("   (")[0] for line in capsys.readouterr().out.splitlines()]
    name = f"[one-to-one] {sim.robots['@RBT#001']}"
    picture = f"[picture] {PICTURE['URL']}"
    assert lines[1:] == [f"{name}: {text}" for text in ("part 1", picture, "part 2")]
