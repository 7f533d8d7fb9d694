"""Callbacks that are unusual, and what else test_botserver.py leaves out."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import STORY, Caller, idle, poll
from hypothesis import given, settings
from hypothesis import strategies as st

from botserver import PROVIDERS, REPLIES, Settings
from imbot import commands
from imbot.prompt import spoken
from imbot.settings import Persona, SettingsError
from imbot.tencent import BadEvent, Message, callback
from imbot.tencent.pictures import is_public
from imbot.texts import TEXTS
from simulator import c2c_event, group_event, text_body
from simulator.fixtures import FAST

GROUP = "@TGS#demo"
CASES = json.loads((Path(__file__).parent / "cases/poor.json").read_text("utf-8"))
[FORWARDED] = [case["input"] for case in CASES if case["id"] == "P14"]
TOPIC = "@TGS#_@TGS#c@TOPIC#_t"


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
    assert im.client.post("/elsewhere").status_code == 404
    assert im.client.get("/im").get_json()["ActionStatus"] == "FAIL"


def test_strange_text_arrives(im):
    im.say("\ud83d \0 \u2028 😀")
    assert im.sim.wait(1)[0].text.startswith("You said: ?  \u2028 😀 (")


def test_a_question_is_counted_once_however_often_it_is_tried(sim, make_app):
    im = Caller(sim, make_app(rate_limit=1, reply_mode="modify").test_client())
    faults = [60011] * 4
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("hello")
    poll(lambda: not faults and idle(im))
    assert [m.text for m in sim.delivered] == [
        "You said: hello (question 1 of our chat)"
    ]


def test_a_stop_is_refused_as_any_message_is(sim, make_app):
    im = Caller(sim, make_app(allow_users=("lin",)).test_client())
    sim.ai_answer, sim.ai_pace = (lambda messages: STORY[:80]), 0.01
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
                ["TIMTextElem", "TIMImageElem", "TIMCustomElem", "TIMRelayElem"]
            )
            | JSON,
            "MsgContent": st.dictionaries(
                st.sampled_from(
                    ["Text", "Data", "ImageInfoArray", "AbstractList", "Title"]
                ),
                JSON,
            )
            | JSON,
        }
    ),
    max_size=3,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        "CallbackCommand From_Account To_Account GroupId TopicId MsgSeq MsgRandom "
        "Random MsgTime MsgBody AtRobots_Account SendMsgResult MsgKey MsgSeqList "
        "CloudCustomData".split()
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


def recall_event(message, **fields):
    """Return the callback's JSON after a message was recalled."""
    key = "_".join(str(message[name]) for name in ("MsgSeq", "MsgRandom", "MsgTime"))
    users = {name: message[name] for name in ("From_Account", "To_Account")}
    about = {"CallbackCommand": "C2C.CallbackAfterMsgWithDraw", "MsgKey": key}
    return about | users | {"UnreadMsgNum": 7} | fields


def group_recall_event(*seqs, **fields):
    return {
        "CallbackCommand": "Group.CallbackAfterRecallMsg",
        "Operator_Account": "admin",
        "Type": "Public",
        "GroupId": GROUP,
        "MsgSeqList": [{"MsgSeq": seq} for seq in seqs],
        "EventTime": "1670574414123",
    } | fields


EVENTS = [
    c2c_event("jared", "@RBT#001", "hi"),
    group_event("jared", GROUP, 7, "hi", ["@RBT#001"]),
    recall_event(c2c_event("jared", "@RBT#001", "hi")),
    group_recall_event(7, 8),
]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, TEXT, max_size=3), st.sampled_from(EVENTS), BODIES)
def test_whatever_is_called_is_read_or_refused(query, event, body):
    if isinstance(body, tuple):
        body = event | body[1]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        messages = callback.read_messages(query, data, {"@RBT#001": None})
    except BadEvent:
        return
    for message in messages:
        assert Message.load(json.loads(json.dumps(message.data()))) == message
        assert message.conversation().isprintable() or "\t" in message.conversation()


@pytest.mark.parametrize("event", EVENTS[:2], ids=["one-to-one", "group"])
@pytest.mark.parametrize("fault", [{"MsgBody": [5]}, {"MsgSeq": "x"}, {"MsgTime": []}])
def test_a_broken_event_costs_no_thread(sim, make_app, caplog, event, fault):
    im = Caller(sim, make_app(worker_threads=2, rate_limit=0).test_client())
    for _ in range(4):
        assert im.post(event | fault).status_code == 400
    for user in ("jared", "lin"):
        im.say("hello", user=user)
    assert len(sim.wait(2)) == 2
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
    assert texts == ["1", TEXTS["zh"]["broken"]]
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("text", ["/divide 1", "/divide\n1", "/divide　1", "除  1"])
def test_a_command_and_its_argument_are_parted_by_any_space(monkeypatch, text):
    divided = commands.Command(lambda chat, n: n, "除", zh="除", en="divide", takes="n")
    monkeypatch.setitem(commands.COMMANDS, "/divide", divided)
    message = Message("id", "@RBT#001", "jared", text)
    assert commands.find(message) == (divided.run, "1")


@pytest.fixture
def gates(sim):
    """The AI answers a question when its event is set."""
    events = defaultdict(threading.Event)

    def answer(messages):
        events[messages[-1]["content"]].wait(20)
        return "answer"

    sim.ai_answer = answer
    yield events
    for event in [*events.values()]:
        event.set()


def test_a_stop_reaches_a_question_that_still_waits(sim, make_app, gates):
    im = Caller(sim, make_app(worker_threads=1).test_client())
    im.say("first", user="lin")
    poll(lambda: sim.ai_requests)
    im.say("second")
    im.say("/stop")
    gates["first"].set()
    said = [m.text for m in sim.wait(3) if m.chat == "jared"]
    assert {*said} == {TEXTS["zh"]["stop"], TEXTS["zh"]["stopped"]}


def test_stops_without_end_do_not_fill_the_store(sim, make_app):
    app, goes_on = make_app(max_waiting=3, rate_limit=0), threading.Event()
    im, store = Caller(sim, app.test_client()), app.extensions["bot"].store
    sim.fault = lambda command, body: goes_on.wait(9) and None
    for _ in range(20):
        assert im.say("/stop").status_code == 200
    waiting = store.stats()
    goes_on.set()
    assert waiting["waiting"] + waiting["in_work"] == 3


def test_forwarded_messages_are_read_by_their_abstract():
    event = c2c_event("jared", "@RBT#001", "") | {"MsgBody": FORWARDED}
    [message] = callback.parse("Bot.OnC2CMessage", event)
    assert (message.kind, message.text) == ("question", "")
    assert message.quote == "Chat of lin and jared\nlin: when?\njared: at 9"


def test_what_is_forwarded_is_no_command_and_no_mention():
    content = {"Title": "/clear", "AbstractList": ["/clear", 5, "@Ada /clear" * 9999]}
    body = [
        *text_body("@Ada what do they say?"),
        {"MsgType": "TIMRelayElem", "MsgContent": content},
    ]
    event = group_event("jared", GROUP, 7, "", ["@RBT#001"]) | {"MsgBody": body}
    [message] = callback.parse("Bot.OnGroupMessage", event, {"@RBT#001": "Ada"})
    assert commands.find(message) is None
    assert message.text == "what do they say?"
    assert message.quote.startswith("/clear\n/clear\n@Ada /clear")
    assert len(message.quote) <= callback.LONGEST_FORWARD


def test_a_forward_without_an_abstract_is_not_read():
    content = {"Title": "Chat", "CompatibleText": "forwarded", "AbstractList": []}
    body = [{"MsgType": "TIMRelayElem", "MsgContent": content}]
    event = c2c_event("jared", "@RBT#001", "") | {"MsgBody": body}
    [message] = callback.parse("Bot.OnC2CMessage", event)
    assert message.kind == "unsupported"


def test_the_recall_of_a_message_has_its_id():
    event = c2c_event("jared", "@RBT#001", "hi")
    [asked] = callback.parse("Bot.OnC2CMessage", event)
    recall = recall_event(event)
    [recalled] = callback.parse(recall["CallbackCommand"], recall)
    assert (recalled.kind, recalled.robot) == ("recalled", "@RBT#001")
    assert recalled.id == asked.recall_id() == asked.id
    assert recalled.conversation() == asked.conversation()


@pytest.mark.parametrize("topic", ["", TOPIC])
def test_the_recall_of_a_groups_messages_is_known_by_their_numbers(topic):
    field = {"TopicId": topic} if topic else {}
    robots = ["@RBT#001", "@RBT#002"]
    event = group_event("jared", GROUP, 7, "hi", robots) | field
    asked = callback.parse("Bot.OnGroupMessage", event)
    recall = group_recall_event(6, 7, **field)
    recalled = callback.parse(recall["CallbackCommand"], recall)
    assert {message.kind for message in recalled} == {"recalled"}
    assert recalled[1].id == asked[0].recall_id() == asked[1].recall_id()
    assert recalled[0].id not in [message.recall_id() for message in asked]


@pytest.mark.parametrize(
    ("event", "count"),
    [
        (recall_event(EVENTS[0], To_Account="lin"), 0),
        (recall_event(EVENTS[0], MsgKey="1_2"), None),
        (recall_event(EVENTS[0], MsgKey=None), None),
        (recall_event(EVENTS[0], From_Account=None), None),
        (group_recall_event(), 0),
        (group_recall_event(MsgSeqList=[5]), None),
        (group_recall_event(MsgSeqList=None), None),
        (group_recall_event("x"), None),
    ],
)
def test_a_recall_that_is_none_of_ours_or_broken(event, count):
    if count is None:
        with pytest.raises(BadEvent):
            callback.parse(event["CallbackCommand"], event)
    else:
        assert len(callback.parse(event["CallbackCommand"], event)) == count


def test_robots_that_others_answer_for_are_left_alone(sim, make_app):
    """P5: robots.toml names @RBT#001 only."""
    robots = {"@RBT#001": Persona(nick="Ada")}
    app = make_app(robots=robots, robots_only=True, ai_provider="echo")
    im = Caller(sim, app.test_client())
    assert im.say("hi", robot="@RBT#002").status_code == 200
    im.post(sim.say_in_group("jared", GROUP, "to both", ["@RBT#002", "@RBT#001"]))
    im.say("hi", robot="@RBT#001")
    assert {m.robot for m in sim.wait(2)} == {"@RBT#001"}
    poll(lambda: idle(im))
    assert len(sim.delivered) == 2


def test_a_groups_recalls_name_no_robot_and_are_read_all_the_same():
    body, nobody = json.dumps(group_recall_event(7)).encode(), lambda robot: False
    assert len(callback.read_messages({}, body, {}, nobody)) == 1


def test_robots_only_needs_a_robot():
    env = {"IM_SDKAPPID": "1", "IM_KEY": "k", "AI_PROVIDER": "echo"}
    env |= {"ALLOW_UNSIGNED": "1", "ROBOTS_ONLY": "1"}
    with pytest.raises(SettingsError, match="ROBOTS_ONLY is 1, but robots.toml"):
        Settings.from_env(PROVIDERS, REPLIES, env)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/1",
        "https://EXAMPLE.com:443/x?y=@z",
        "https://cos.ap-shanghai.myqcloud.com/a%20b",
        "https://a-b.c_d.example.com/#x",
        "https://例子.中国/图.png",
        "https://xn--fsqu00a.xn--fiqs8s/",
        "https://1.example.com./",
        "https://example。com/x",
        "https://example.com?x=1",
    ],
)
def test_pictures_on_the_web_may_be_fetched(url):
    assert is_public(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/1.png",
        "file:///etc/passwd",
        "https:///x",
        "https://2852039166/",
        "https://0xa9fea9fe/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://127.0.0.1./",
        "https://127.0.0.0x1/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://①27.0.0.1/",
        "https://127.0。0.1/",
        "https://127．0｡0.1/",
        "https://١٢٧.٠.٠.١/",
        "https://127.0.0\u200b.1/",
        "https://127.0.0\u00ad.1/",
        "https://%31%32%37.0.0.1/",
        "https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
        "https://db.ｉnternal/",
        "https://db。internal。/",
        "https://db.internal\u200b/",
        "https://foo.LOCALHOST/",
        "https://example.com:8443/",
        "https://example.com:x/",
        "https://user@example.com/",
        "https://:pw@example.com/",
        "https://good.example\\@127.0.0.1/",
        "https://exam\tple.com/",
        "https://exa mple.com/",
        "https://example..com/",
        "https://[broken/",
    ],
)
def test_the_address_of_a_picture_that_is_not_on_the_web_is_not_passed_on(url):
    assert not is_public(url)
    element = {
        "MsgType": "TIMImageElem",
        "MsgContent": {"ImageInfoArray": [{"Type": 1, "URL": url}]},
    }
    event = c2c_event("jared", "@RBT#001", "") | {"MsgBody": [element]}
    [message] = callback.parse("Bot.OnC2CMessage", event)
    assert (message.kind, message.images) == ("blank", ())


@pytest.mark.parametrize("text", ["a{}lin: I owe you", "a\n{}b"])
@pytest.mark.parametrize(
    "end", "\n \r \r\n \v \f \x1c \x1d \x1e \x85 \u2028 \u2029".split(" ")
)
def test_no_line_of_a_shared_chat_looks_like_another_members(text, end):
    message = Message("id", "@RBT#001", "jared", text.format(end), GROUP)
    first, *others = spoken(message, shared=True).splitlines()
    assert first == "jared: a" and all(line.startswith("    ") for line in others)
    assert others


def test_im_that_refuses_for_long_gets_the_answer_later(sim, make_app):
    """20004 is a sure refusal: nothing may have arrived, so nothing counts as sent."""
    quick = {"first_delay": 0.02, "longest_retry": 0.1, "duplicate_window": 0.2}
    app = make_app(replace(FAST, pauses=(), **quick))
    im, refused = Caller(sim, app.test_client()), []
    sim.fault = lambda command, body: refused.append(time.monotonic()) or 20004
    im.say("hello")
    poll(lambda: len(refused) > 4 and refused[-1] > refused[0] + 0.5)
    assert app.extensions["bot"].store.stats()["failed"] == 0
    sim.fault = lambda command, body: None
    assert sim.wait(1)[0].text.startswith("You said: hello")
