"""Callbacks that are unusual, and what else test_botserver.py leaves out."""

from __future__ import annotations

import json
import time

import pytest
from conftest import STORY, Caller, idle, poll
from hypothesis import given, settings
from hypothesis import strategies as st

import botserver
from imbot import commands
from imbot.tencent import callback
from imbot.texts import TEXTS
from simulator import text_body


def test_several_text_elements_are_one_question(im):
    im.say(MsgBody=text_body("one") + [FACE] + text_body("two"))
    assert im.sim.wait(1)[0].text.startswith("You said: one\ntwo (")


FACE = {"MsgType": "TIMFaceElem", "MsgContent": {"Index": 1, "Data": "x"}}


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


def test_other_methods_and_paths_are_refused_in_tencents_shape(im):
    assert im.client.get("/im").status_code == 405
    assert im.client.post("/").status_code == 404
    assert im.client.get("/im").get_json()["ActionStatus"] == "FAIL"


def test_strange_text_arrives(im):
    im.say("\ud83d \0 \u2028 😀")
    assert im.sim.wait(1)[0].text.startswith("You said: ?  \u2028 😀 (")


@pytest.mark.slow
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


def test_every_text_is_there_in_every_language():
    assert set(TEXTS["zh"]) == set(TEXTS["en"])
    assert all(text.strip() for texts in TEXTS.values() for text in texts.values())


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
                ["TIMTextElem", "TIMImageElem", "TIMCustomElem"]
                + sorted(callback.UNSUPPORTED)
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
            st.sampled_from(["CallbackCommand", "OptPlatform"])
            | TEXT.filter(lambda name: name not in ("Sign", "RequestTime", "SdkAppid")),
            TEXT,
            max_size=3,
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


def test_a_command_that_fails_is_told_at_once(sim, make_app, monkeypatch, caplog):
    def divide(chat, argument):
        return str(1 // int(argument))

    divided = commands.Command(divide, "除", zh="除", en="divide", takes="n")
    monkeypatch.setitem(commands.COMMANDS, "/divide", divided)
    im = Caller(sim, make_app().test_client())
    im.say("/divide 1")
    im.say("/divide 0")
    texts = [m.text for m in sim.wait(2)]
    assert texts == ["1", TEXTS["zh"]["command_failed"]]
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("text", ["/divide 1", "/divide\n1", "/divide　1", "除  1"])
def test_a_command_and_its_argument_are_parted_by_any_space(text):
    divided = commands.Command(lambda chat, n: n, "除", zh="除", en="divide", takes="n")
    message = callback.Message("id", "@RBT#001", "jared", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(commands.COMMANDS, "/divide", divided)
        assert commands.find(message) == (divided, "1")


def test_a_stop_reaches_a_question_that_still_waits(sim, make_app):
    im = Caller(sim, make_app(worker_threads=1).test_client())
    sim.ai_delay = 3
    im.say("first", user="lin")
    poll(lambda: sim.ai_requests)
    im.say("second")
    im.say("/stop")
    said = [m.text for m in sim.wait(3) if m.chat == "jared"]
    assert {*said} == {TEXTS["zh"]["stop"], TEXTS["zh"]["stopped"]}


def test_stops_without_end_do_not_fill_the_store(sim, make_app):
    app = make_app(max_waiting=3, worker_threads=1)
    im, store = Caller(sim, app.test_client()), app.extensions["bot"].store
    sim.ai_delay = 2
    im.say("first", user="lin")
    poll(lambda: sim.ai_requests)
    for _ in range(20):
        assert im.say("/stop").status_code == 200
    assert store.stats()["waiting"] == 3


@pytest.mark.slow
def test_im_that_refuses_for_minutes_gets_the_answer_later(sim, make_app, monkeypatch):
    """20004 is a sure refusal: nothing may have arrived, so nothing counts as sent."""
    app = make_app(catch_up=0)
    im, store = Caller(sim, app.test_client()), app.extensions["bot"].store
    sim.fault, clock = (lambda command, body: 20004), time.time
    im.say("hello")
    poll(lambda: len(sim.calls) >= 3 and store.load()[1] == 0)
    release, delays = store.release, []

    def at_once(claim, delay, failed=False):
        delays.append(delay)
        release(claim, 0.0, failed)

    monkeypatch.setattr(store, "release", at_once)
    monkeypatch.setattr(botserver.time, "time", lambda: clock() + 300)
    poll(lambda: len(delays) >= 2, 30)
    assert store.stats()["failed"] == 0 and delays[-1] == 60
    sim.fault = lambda command, body: None
    assert sim.wait(1)[0].text.startswith("You said: hello")
