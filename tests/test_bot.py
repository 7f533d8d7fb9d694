"""More of what the bot promises than the specification on top tells."""

from __future__ import annotations

import gc
import json
import re
import time

import pytest

import usersig
from botserver import Bot
from imbot.ai import ProviderError
from imbot.queue import StoreBusy, StoreError
from imbot.settings import Persona
from simulator import ai_error, text_body
from simulator.fixtures import TOKEN, Caller, idle, poll, said_to

UNSUPPORTED = (
    "TIMSoundElem TIMFileElem TIMVideoFileElem TIMFaceElem TIMLocationElem "
    "TIMRelayElem TIMSomethingNew".split()
)


def stored(folder):
    """Return all that the files of the store hold."""
    return b"".join(file.read_bytes() for file in folder.glob("bot.db*"))


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


def test_a_final_error_of_im_sets_the_message_aside(im, caplog):
    im.sim.fault = lambda command, body: 20003
    im.say("hello")
    poll(lambda: im.client.get("/healthz").get_json()["failed"] == 1)
    assert "20003" in caplog.text and "does not exist" in caplog.text
    im.sim.fault = lambda command, body: None
    im.say("next")
    assert im.sim.wait(1)[0].text.startswith("You said: next")


def test_a_command_within_a_text_is_none(im):
    im.say("what does /help do?")
    assert "You said" in im.sim.wait(1)[0].text


def test_what_is_said_alone_never_reaches_a_group(im):
    im.say("a secret")
    im.sim.wait(1)
    im.post(im.sim.say_in_group("jared", "@TGS#demo", "hello", ["@RBT#001"]))
    im.sim.wait(2)
    assert "a secret" not in json.dumps(im.sim.ai_requests[1])


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


def test_pictures_go_to_services_that_see(sim, make_app, tmp_path):
    picture = {
        "MsgType": "TIMImageElem",
        "MsgContent": {
            "UUID": "u",
            "ImageFormat": 1,
            "ImageInfoArray": [
                {
                    "Type": 1,
                    "Size": 9,
                    "Width": 1,
                    "Height": 1,
                    "URL": "https://example.com/1",
                },
                {
                    "Type": 2,
                    "Size": 9,
                    "Width": 1,
                    "Height": 1,
                    "URL": "https://example.com/2",
                },
            ],
        },
    }
    im = Caller(sim, make_app().test_client())
    im.say(MsgBody=[picture, *text_body("what is it?")])
    sim.wait(1)
    assert sim.ai_requests[0]["messages"][-1]["content"] == [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/2"}},
    ]
    another = (
        f"sqlite:///{tmp_path}/another.db"  # else the first bot may take the question
    )
    app = make_app(ai_provider="deepseek", database_url=another)
    im = Caller(sim, app.test_client())
    im.say(MsgBody=[picture])
    assert "图片" in sim.wait(2)[1].text
    assert len(sim.ai_requests) == 1


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_the_bot_cannot_read_gets_a_friendly_sentence(im, kind):
    im.say(MsgBody=[{"MsgType": kind, "MsgContent": {}}])
    assert "看不懂" in im.sim.wait(1)[0].text
    assert not im.sim.ai_requests


def test_past_the_greatest_backlog_a_callback_is_refused_and_not_kept(
    sim, make_app, caplog
):
    im = Caller(sim, make_app(max_backlog=5, rate_limit=0, catch_up=0).test_client())
    sim.ai_delay = 1
    codes = [im.say(str(number)).status_code for number in range(9)]
    assert codes[0] == 200 and codes[-1] == 503
    assert "MAX_BACKLOG" in caplog.text
    sim.ai_delay = 0
    poll(lambda: idle(im))
    assert said_to(sim, "jared") == [str(n) for n in range(9) if codes[n] == 200]
    poll(lambda: im.say("later").status_code == 200)
    poll(lambda: "later" in said_to(sim, "jared"))


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


@pytest.mark.parametrize("place", ["one-to-one", "group"])
def test_a_recalled_question_is_neither_answered_nor_remembered(im, place):
    ask = {
        "one-to-one": lambda text: im.sim.say("jared", "@RBT#001", text),
        "group": lambda text: im.sim.say_in_group(
            "jared", "@TGS#demo", text, ["@RBT#001"]
        ),
    }[place]
    remembered = ask("remembered at first")
    im.post(remembered)
    im.sim.wait(1)
    im.sim.ai_delay = 0.3
    im.post(ask("keeps the bot busy"))
    waits = ask("waits and is recalled")
    im.post(waits)
    for event in (remembered, waits):
        assert im.post(recall_of(event)).status_code == 200
    poll(lambda: len(im.sim.delivered) == 2 and idle(im))
    im.sim.ai_delay = 0
    im.post(ask("the last one"))
    im.sim.wait(3)
    poll(lambda: idle(im))
    assert len(im.sim.delivered) == 3
    assert "recalled" not in json.dumps(im.sim.ai_requests)
    assert "remembered at first" not in json.dumps(im.sim.ai_requests[-1])


def recall_of(event):
    """Return the callback of a recall."""
    if "GroupId" in event:
        return {
            "CallbackCommand": "Group.CallbackAfterRecallMsg",
            "GroupId": event["GroupId"],
            "MsgSeqList": [{"MsgSeq": event["MsgSeq"]}],
        }
    return {
        "CallbackCommand": "C2C.CallbackAfterMsgWithDraw",
        "From_Account": event["From_Account"],
        "To_Account": event["To_Account"],
        "MsgKey": event["MsgKey"],
    }


def test_stops_count_against_the_rate_and_stop_all_the_same(sim, make_app):
    im = Caller(sim, make_app(rate_limit=3, bot_language="en").test_client())
    for _ in range(12):
        im.post(sim.say_in_group("jared", "@TGS#demo", "/stop", ["@RBT#001"]))
    poll(lambda: len(sim.delivered) == 4 and idle(im))
    assert [m.text for m in sim.delivered].count("@jared I have stopped.") == 3
    sim.ai_delay = 20
    im.post(sim.say_in_group("lin", "@TGS#demo", "a question", ["@RBT#001"]))
    poll(lambda: sim.ai_requests)
    im.post(sim.say_in_group("jared", "@TGS#demo", "/stop", ["@RBT#001"]))
    poll(lambda: "(stopped)" in sim.delivered[-1].text and idle(im))


@pytest.mark.parametrize("status", [400, 500])
def test_what_came_of_a_failed_answer_is_gone_at_once(im, status):
    im.sim.ai_fault = lambda asked: (status, ai_error("x", "it fails"))
    gc.collect()
    gc.disable()
    try:
        im.say("a question")
        im.sim.wait(1)
        poll(lambda: idle(im))
        assert not [one for one in gc.get_objects() if isinstance(one, ProviderError)]
    finally:
        gc.enable()


def test_a_member_has_a_quarter_of_a_groups_queue(sim, make_app):
    im = Caller(sim, make_app(max_waiting=8).test_client())
    sim.ai_delay = 0.3
    for number in range(6):
        im.post(sim.say_in_group("jared", "@TGS#demo", f"j{number}", ["@RBT#001"]))
    im.post(sim.say_in_group("lin", "@TGS#demo", "l", ["@RBT#001"]))
    poll(lambda: len(sim.delivered) == 4 and idle(im))
    texts = [message.text for message in sim.delivered]
    assert ["消息太多" in text for text in texts].count(True) == 1
    asked = [re.search(r"said: \w+: (\w+)", text) for text in texts]
    assert [found[1] for found in asked if found] == ["j0", "l", "j1"]


def test_members_of_a_group_take_turns(sim, make_app):
    im = Caller(sim, make_app(rate_limit=0).test_client())
    sim.ai_delay = 0.3
    for user, text in [("jared", f"j{n}") for n in range(4)] + [("lin", "l")]:
        im.post(sim.say_in_group(user, "@TGS#demo", text, ["@RBT#001"]))
    poll(lambda: len(sim.delivered) == 5 and idle(im))
    order = [re.search(r"said: \w+: (\w+)", m.text)[1] for m in sim.delivered]
    assert order == ["j0", "l", "j1", "j2", "j3"]


def test_a_slow_service_holds_up_neither_commands_nor_another_service(sim, make_app):
    robots = {"@RBT#002": Persona(provider="echo")}
    app = make_app(worker_threads=2, robots=robots, bot_language="en")
    im = Caller(sim, app.test_client())
    sim.ai_delay = 1.5
    users = [f"user{number}" for number in range(6)]
    sim.users |= {*users}
    for user in users:
        im.post(sim.say(user, "@RBT#001", "slow"))
    poll(lambda: len(sim.ai_requests) == 2)
    im.post(sim.say("lin", "@RBT#001", "/help"))
    im.post(sim.say("jared", "@RBT#002", "quick"))
    quick = {message.chat: message.text for message in sim.wait(2)}
    assert quick.keys() == {"lin", "jared"} and "help" in quick["lin"]
    assert len(sim.ai_requests) == 2, "the service has its two threads"
    sim.ai_delay = 0
    poll(lambda: len(sim.delivered) == 8 and idle(im))


@pytest.mark.parametrize(
    ("error", "status"),
    [(StoreError("the disk is full"), 503), (StoreBusy("slow"), 200)],
)
def test_a_store_that_cannot_be_written_is_not_healthy(
    make_app, monkeypatch, error, status
):
    app = make_app()
    client, store = app.test_client(), app.extensions["bot"].store

    def fails():
        raise error

    monkeypatch.setattr(store, "check", fails)
    assert client.get("/healthz").status_code == status


def test_a_question_recalled_while_it_is_answered_is_not_remembered(im):
    im.sim.ai_delay = 0.3
    event = im.sim.say("jared", "@RBT#001", "my PIN is 4711")
    im.post(event)
    poll(lambda: im.sim.ai_requests)
    im.post(recall_of(event))
    im.sim.wait(1)
    poll(lambda: idle(im))
    im.say("next")
    im.sim.wait(2)
    assert "4711" not in json.dumps(im.sim.ai_requests[-1])


def test_a_stop_works_before_the_robots_nick_is_known(sim, make_app):
    callers = [Caller(sim, make_app().test_client()) for _ in range(2)]
    sim.ai_delay = 20
    callers[0].post(sim.say_in_group("lin", "@TGS#demo", "tell", ["@RBT#001"]))
    poll(lambda: sim.ai_requests)
    for caller in callers:  # one of these processes has not asked for the nick
        caller.post(sim.say_in_group("lin", "@TGS#demo", "/stop", ["@RBT#001"]))
    poll(lambda: any("（已停止）" in message.text for message in sim.delivered), 5)


def test_an_error_in_a_forks_code_does_not_bring_the_ais_answer_into_the_log(
    im, monkeypatch, caplog
):
    def compose(self, chat):
        return str(int([*self.ask(chat)][-1]))

    monkeypatch.setattr(Bot, "compose", compose)
    im.sim.ai_answer = lambda messages: "Your diagnosis is diabetes"
    im.say("what do I have?")
    im.sim.wait(1)
    poll(lambda: idle(im))
    assert "ValueError" in caplog.text and "diabetes" not in caplog.text
