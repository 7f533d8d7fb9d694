"""The specification: what the bot promises, on a stand-in for Tencent IM and the AI.

pytest                        all tests, those of tests/ too
pytest test_botserver.py      these only
pytest -k signature           those whose name says signature
"""

from __future__ import annotations

import json
import time

import pytest

import tim
import usersig
from botserver import REPLIES, Config, create_app
from simulator import KEY, Simulator, text_body

APPID, TOKEN = 1400000000, "stand-in-token"
STORY = "".join(
    f"第{number}句话，很短。 It is short. 😀\n\n" for number in range(40)
).strip()


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
            "database_url": f"sqlite:///{tmp_path}/bot.db",
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


def idle(im):
    state = im.client.get("/healthz").get_json()
    return state["waiting"] == state["in_work"] == 0


def poll(condition, timeout=20):
    """Wait until a condition holds, at most `timeout` seconds; return its value."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return value


def said_to(sim, chat):
    return [
        m.text.split(" (")[0].removeprefix("You said: ")
        for m in sim.delivered
        if m.chat == chat
    ]


def stored(folder):
    """Return all that the files of the store hold."""
    return b"".join(file.read_bytes() for file in folder.glob("bot.db*"))


def test_a_question_is_answered_one_to_one(im):
    assert im.say("hello").get_json() == {
        "ActionStatus": "OK",
        "ErrorInfo": "",
        "ErrorCode": 0,
    }
    [answer] = im.sim.wait(1)
    assert (answer.robot, answer.chat) == ("@RBT#001", "jared")
    assert answer.text == "You said: hello (question 1 of our chat)"


def test_what_was_missed_while_no_server_ran_is_answered(sim, make_app):
    app = make_app()
    Caller(sim, app.test_client()).say("before")
    sim.wait(1)
    app.extensions["bot"].close(drain=5)
    away = {"a server": time.time() - 60}  # when it was last well
    app.extensions["bot"].store.put("well", away)
    sim.say("jared", "@RBT#001", "meanwhile")
    make_app()
    sim.wait(2)
    assert said_to(sim, "jared") == ["before", "meanwhile"]


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


def test_a_redelivered_callback_is_answered_once(im):
    event = im.sim.say("jared", "@RBT#001", "once")
    for _ in range(3):
        assert im.post(event).status_code == 200
    im.say("afterwards")
    assert [m.text[:14] for m in im.sim.wait(2)] == ["You said: once", "You said: afte"]


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
    im.sim.ai_delay = 2
    began = time.monotonic()
    assert im.say("slow").status_code == 200
    assert time.monotonic() - began < 1
    poll(lambda: im.sim.ai_requests)
    assert not im.sim.delivered
    assert im.sim.wait(1)[0].text.startswith("You said: slow")
    assert time.monotonic() - began >= 2


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
    poll(lambda: im.client.get("/healthz").get_json()["failed"] == 1)
    assert "20003" in caplog.text and "does not exist" in caplog.text
    im.sim.fault = lambda command, body: None
    im.say("next")
    assert im.sim.wait(1)[0].text.startswith("You said: next")


@pytest.mark.parametrize("mode", REPLIES)
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


@pytest.mark.parametrize("how", ["/stop", "停止", "button"])
@pytest.mark.parametrize("mode", REPLIES)
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


def test_long_answers_arrive_in_order_and_whole(im):
    story = STORY * 30
    im.sim.ai_answer = lambda messages: story
    im.say("tell")
    poll(lambda: im.sim.delivered and idle(im))
    parts = im.sim.delivered
    assert len(parts) > 3
    assert [m.number for m in parts] == sorted({m.number for m in parts})
    assert "".join("".join(m.text.split()) for m in parts) == "".join(story.split())


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


@pytest.mark.parametrize("kind", sorted(tim.UNSUPPORTED))
def test_what_the_bot_cannot_read_gets_a_friendly_sentence(im, kind):
    im.say(MsgBody=[{"MsgType": kind, "MsgContent": {}}])
    assert "看不懂" in im.sim.wait(1)[0].text
    assert not im.sim.ai_requests


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
