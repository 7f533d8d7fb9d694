"""Services that remember chats themselves: Dify and ADP, asked as real ones are."""

from __future__ import annotations

import json
import logging
import random
import re
import time
from contextlib import suppress

import pytest
import requests
from conftest import (
    ANSWER,
    A,
    B,
    Caller,
    ai_json,
    idle,
    json_values,
    poll,
    said_to,
    sse,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_providers import ai_answer, ai_failure, ai_service, ai_texts

from botserver import PROVIDERS, REPLIES
from imbot.ai import agents
from imbot.ai.errors import ProviderError
from imbot.ai.provider import new_memory
from imbot.http import CancelScope
from imbot.settings import Settings
from imbot.tencent import callback
from simulator.platforms import Conversation


def dify(event, **fields):
    return {"event": event, "conversation_id": "c1", "task_id": "t1", **fields}


def adp(kind, **payload):
    """Return an event of ADP's, as it is sent."""
    return f"event:{kind}\ndata:{ai_json({'type': kind, 'payload': payload})}\n\n"


def reply(content, **flags):
    return adp("reply", content=content, **{"is_from_self": False} | flags)


PING = "event: ping\n\n"
END = dify("message_end", metadata={"usage": {"total_tokens": 9}})
DONE = {"status": "succeeded", "outputs": {"answer": "x"}, "error": None}
MORE = [dify("message", answer=A), dify("message", answer=B)]
STEPS = [dify("agent_message", answer=A), PING, dify("agent_message", answer=B)]
ECHO = reply("你好", is_from_self=True, is_final=True)
THOUGHT = adp("thought", procedures=[{"debugging": {"content": "想"}}])
RECORDED = {
    "dify chatbot": sse(PING, *MORE, END, end=""),
    "dify chatflow": sse(
        dify("workflow_started", data={"id": "w", "inputs": {"message": "x"}}),
        dify("node_started", data={"title": "LLM"}),
        *MORE,
        dify("node_finished", data=DONE),
        END,
        dify("workflow_finished", data=DONE),
        end="",
    ),
    "dify chatflow, older": sse(*MORE, dify("workflow_finished", data=DONE), END),
    "dify agent": sse(
        dify("agent_thought", thought="想", tool="search", observation=""),
        *STEPS,
        dify("message_file", type="image", url="https://example.com/1.png"),
        END,
    ),
    "dify new agent": sse(*STEPS, dify("message", answer=ANSWER), END),
    "dify, all of it again": sse(*MORE, dify("message", answer=ANSWER), END),
    "dify, replaced": sse(
        dify("message", answer="no!"), dify("message_replace", answer=A), MORE[1], END
    ),
    "dify, thinking": sse(
        dify("message", answer="<think>想\n</thi"),
        dify("message", answer=f"nk>\n\n{A}"),
        MORE[1],
        dify("tts_message", audio="AA=="),
        END,
    ),
    "dify, carriage returns": sse(PING, *MORE, END, end="").replace(b"\n", b"\r\n"),
    "adp": sse(
        ECHO,
        THOUGHT,
        reply(""),
        reply(A),
        adp("token_stat", token_count=9, status_summary="processing"),
        adp("reference", references=[{"id": "1", "name": "x"}]),
        reply(ANSWER),
        reply(ANSWER, is_final=True),
        adp("token_stat", token_count=9, status_summary="success"),
        end="",
    ),
    "adp in one piece": sse(ECHO, reply(ANSWER, is_final=True), end=""),
}


@pytest.mark.parametrize("recorded", RECORDED)
def test_a_recorded_answer_is_read_wherever_its_bytes_are_split(recorded):
    body, name = RECORDED[recorded], re.match(r"\w+", recorded)[0]
    for place in range(len(body) + 1):
        pieces = [part for part in (body[:place], body[place:]) if part]
        assert ai_answer(pieces, name=name) == ANSWER, place
        assert ai_texts(pieces, interval=0, name=name) == [ANSWER], place
    assert ai_answer([body[i : i + 1] for i in range(len(body))], name=name) == ANSWER


@pytest.mark.parametrize("piece", ["哈", "--------", "1", "the same again "])
def test_a_piece_is_not_taken_for_a_repetition(piece):
    pieces = [piece, piece * 2, piece]
    body = sse(*(dify("message", answer=text) for text in pieces), END)
    assert ai_answer(body, name="dify") == piece * 4


def test_the_last_message_of_an_agent_is_its_whole_answer():
    steps = [dify("agent_message", answer=text) for text in ("H", "m")]
    assert (
        ai_answer(sse(*steps, dify("message", answer="Hi"), END), name="dify") == "Hi"
    )


KNOWN = new_memory("jared") | {"conversation_id": "c0"}
DIFY_CODES = {
    "busy": "429 too_many_requests, 500 internal_server_error",
    "quota": "429 rate_limit_error, 400 provider_quota_exceeded",
    "setup": """400 invalid_param, 400 bad_request, 400 app_unavailable,
        400 provider_not_initialize, 400 model_currently_not_support,
        400 completion_request_error, 400 not_chat_app, 401 unauthorized,
        403 forbidden, 404 not_found, 400 conversation_completed""",
}
ADP_CODES = {
    "busy": "460007 460011 460022 460031 460301 460701 460711 460712 460721 460722 500",
    "once": "460020 460401",
    "quota": "460026 460032 460037 460702 460713 460723",
    "filter": "460501 460502",
    "long": "460034 460035",
    "empty": "460025",
    "setup": """400 403 460001 460002 460004 460006 460008 460009 460010 460021 460023
        460024 460033 460036 460038 460048 460100 460105 4505004 469999""",
}
TRIES = {"busy": 3, "once": 2}  # any other kind is asked once


def rows(codes, split):
    """Return (code, kind) of a table."""
    return [(code, kind) for kind, text in codes.items() for code in split(text)]


@pytest.mark.parametrize(
    ("code", "kind"), rows(DIFY_CODES, lambda text: re.findall(r"\d+ \w+", text))
)
def test_a_code_of_dify_has_its_verdict(code, kind):
    status, name = code.split()
    error = {"status": int(status), "code": name, "message": "no"}
    caught, tries = ai_failure(ai_json(error).encode(), name="dify", status=int(status))
    assert (caught.kind, tries) == (kind, TRIES.get(kind, 1))
    assert f"HTTP {status}, code {name}" in str(caught)
    streamed = sse(PING, dify("error", **error), end="")
    caught, tries = ai_failure(streamed, name="dify")
    assert (caught.kind, tries) == (kind, TRIES.get(kind, 1))


@pytest.mark.parametrize(("code", "kind"), rows(ADP_CODES, str.split))
def test_a_code_of_adp_has_its_verdict(code, kind):
    error = {"error": {"code": int(code), "message": "no"}, "request_id": "r1"}
    for event in (error, {"type": "error", **error}):
        body = sse(ECHO, f"event:error\ndata:{ai_json(event)}\n\n", end="")
        caught, tries = ai_failure(body, name="adp")
        assert (caught.kind, tries) == (kind, TRIES.get(kind, 1))
        assert f"code {code}, trace r1" in str(caught)


@pytest.mark.parametrize(
    ("name", "event", "kind"),
    [
        (
            "dify",
            dify("error", status=400, code="invalid_param", message="no"),
            "setup",
        ),
        ("dify", dify("workflow_finished", data={"status": "failed"}), "setup"),
        ("dify", dify("human_input_required", form_token=None), "setup"),
        ("dify", "", "busy"),
        ("adp", {"type": "error", "error": {"code": 460020, "message": "n"}}, "once"),
        ("adp", reply("x", is_evil=True), "filter"),
        ("adp", "", "busy"),
    ],
)
def test_an_error_in_mid_stream_comes_after_the_text_before_it(name, event, kind):
    before = dify("message", answer="一二三") if name == "dify" else reply("一二三")
    provider, tries = ai_service([sse(before, end=""), sse(event, end="")], name=name)
    question, texts = [{"role": "user", "content": "你好"}], []
    with pytest.raises(ProviderError) as caught:
        for text in provider.chat(question, CancelScope(20), 99.0):
            texts.append(text)
    assert (texts, caught.value.kind, len(tries)) == (["一二三"], kind, 1)


def test_sensitive_content_that_adp_finds_in_the_question_is_told():
    body = sse(reply("bad", is_from_self=True, is_evil=True), end="")
    assert ai_failure(body, name="adp")[0].kind == "filter"


@settings(deadline=None, max_examples=150)
@given(
    json_values(
        "event answer task_id conversation_id data status code error type payload "
        "content is_final is_from_self is_evil message",
        *("message", "message_end", "reply", "error"),
    ),
    st.sampled_from(["dify", "adp"]),
)
def test_nothing_a_platform_sends_raises_anything_but_a_provider_error(value, name):
    provider, _ = ai_service(sse(value, value, end=""), name=name)
    with suppress(ProviderError):
        for _ in provider.chat([{"role": "user", "content": "x"}], CancelScope(0.1)):
            pass


def asked(name, messages, interval=0.0, extra=None, **fields):
    """Return the body of a request, and the headers it is sent with."""
    body = RECORDED[{"dify": "dify chatbot"}.get(name, name)]
    provider, tries = ai_service(body, name=name, key="the-key", extra=extra, **fields)
    memory = new_memory("jared") | {"session": "s1"}
    list(provider.chat(messages, CancelScope(20), interval, memory))
    [(data, headers, *_)] = tries
    return json.loads(data), headers


TALK = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": "https://example.com/2"}},
        ],
    },
]


def test_dify_gets_the_request_it_expects():
    picture = {"type": "image", "transfer_method": "remote_url"}
    expected = {
        "query": "What is it?",
        "inputs": {"tone": "warm"},
        "user": "jared",
        "conversation_id": "",
        "response_mode": "streaming",
        "files": [picture | {"url": "https://example.com/2"}],
    }
    for interval in (0.0, 1.0):
        given = {"interval": interval, "model": "m"}
        body, headers = asked("dify", TALK, extra={"inputs": {"tone": "warm"}}, **given)
        assert (body, headers) == (expected, {"Authorization": "Bearer the-key"})


@pytest.mark.parametrize(("interval", "stream"), [(0.0, "disable"), (1.0, "enable")])
def test_adp_gets_the_request_it_expects_and_no_authorization(interval, stream):
    body, headers = asked("adp", TALK, interval, model="m")
    assert re.fullmatch(r"[0-9a-f]{32}", body.pop("request_id"))
    assert (headers, body) == (
        {},
        {
            "bot_app_key": "the-key",
            "session_id": "s1",
            "visitor_biz_id": "jared",
            "content": "What is it?\n![](https://example.com/2)",
            "system_role": "Be brief.",
            "model_name": "m",
            "stream": stream,
            "streaming_throttle": 100,
        },
    )


@pytest.mark.parametrize("name", ["x" * 64, "x" * 65, "你" * 22, "@TGS#" + "g" * 120])
def test_a_visitor_of_adps_has_at_most_64_bytes_and_is_always_the_same(name):
    def visitor():
        provider, tries = ai_service(RECORDED["adp"], name="adp")
        talk = [{"role": "user", "content": "x"}]
        list(provider.chat(talk, CancelScope(20), 0.0, new_memory(name)))
        return json.loads(tries[0][0])["visitor_biz_id"]

    assert visitor() == visitor() and len(visitor().encode()) <= 64
    assert (visitor() == name) == (len(name.encode()) <= 64)


def test_a_conversation_that_dify_has_forgotten_is_begun_anew_once():
    gone = {"status": 404, "code": "not_found", "message": "Conversation Not Exists."}
    provider, tries = ai_service(ai_json(gone).encode(), name="dify", status=404)
    memory = dict(KNOWN)
    with pytest.raises(ProviderError) as caught:
        list(provider.chat(TALK, CancelScope(20), 0.0, memory))
    sent = [json.loads(body)["conversation_id"] for body, *_ in tries]
    assert (sent, caught.value.kind) == (["c0", ""], "setup")


ASK_DIFY = {"query": "x", "inputs": {}, "user": "jared", "response_mode": "streaming"}
ASK_ADP = {"content": "x", "session_id": "s1", "visitor_biz_id": "jared"}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, ""),
        ({"query": ""}, "invalid_param"),
        ({"user": None}, "invalid_param"),
        ({"model": "m"}, "invalid_param"),
        ({"response_mode": "blocking"}, "invalid_param"),
        ({"files": [{"type": "image", "url": "https://a/b"}]}, "invalid_param"),
        ({"conversation_id": "unknown"}, "not_found"),
        ({"conversation_id": "of lin"}, "not_found"),
        ({"session_id": "s 1"}, "400"),
        ({"visitor_biz_id": "x" * 65}, "400"),
        ({"incremental": 1}, "400"),
        ({"bot_app_key": "wrong"}, "4505004"),
        ({"session_id": "of-lin"}, "460010"),
    ],
)
def test_the_stand_ins_are_strict(sim, fields, code):
    sim.dify_conversations["of lin"] = sim.adp_sessions["of-lin"] = Conversation("lin")
    if code.isdigit():
        asked = ASK_ADP | {"bot_app_key": sim.adp_key} | fields
        answer = requests.post(f"{sim.url}/v1/qbot/chat/sse", json=asked)
    else:
        key = {"Authorization": f"Bearer {sim.dify_key}"}
        asked = ASK_DIFY | fields
        answer = requests.post(f"{sim.url}/v1/chat-messages", json=asked, headers=key)
    assert code in answer.text and answer.ok == (code.isdigit() or not code)


@pytest.fixture
def agent(sim, make_app):
    """Return a function that makes a bot of an agent platform's."""

    def make(name="dify", **settings):
        defaults = {"ai_provider": name, "rate_limit": 0, "max_waiting": 100}
        return Caller(sim, make_app(**defaults | settings).test_client())

    return make


def users(sim, count):
    names = [f"user{number}" for number in range(count)]
    sim.users |= {*names}
    return names


def all_say(im, names, text):
    """Let all users ask, and wait until all are answered."""
    count = len(im.sim.delivered) + len(names)
    for name in names:
        im.say(text, user=name)
    im.sim.wait(count, timeout=60)


def shown(sim, chat):
    """Return the numbers of the questions in a chat, as the service counts them."""
    texts = [m.text for m in sim.delivered if m.chat == chat]
    return [int(re.search(r"question (\d+) of", text)[1]) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dify", "adp"])
def test_fifty_users_have_fifty_conversations_that_last(sim, agent, name):
    im, names = agent(name), users(sim, 50)
    for number in range(10):
        all_say(im, names, f"q{number}")
    begun = sim.dify_begun if name == "dify" else sim.adp_sessions
    assert len(begun) == 50 and len(sim.delivered) == len(sim.ai_requests) == 500
    for user in names:
        assert said_to(sim, user) == [f"q{number}" for number in range(10)]
        assert shown(sim, user) == [*range(1, 11)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["forgotten", "completed"])
def test_conversations_that_dify_forgets_cost_no_question(sim, agent, how):
    im, names, lost = agent(), users(sim, 50), 0
    for number in range(10):
        all_say(im, names, f"q{number}")
        for id in random.sample([*sim.dify_conversations], 20):
            lost += number < 9
            if how == "forgotten":
                del sim.dify_conversations[id]
            elif id in sim.dify_completed:
                lost -= number < 9
            else:
                sim.dify_completed.add(id)
    assert len(sim.delivered) == len(sim.ai_requests) == 500
    for user in names:
        assert said_to(sim, user) == [f"q{number}" for number in range(10)]
    assert len(sim.dify_begun) <= 50 + lost
    assert how == "completed" or len(sim.dify_begun) == 50 + lost


WRONG = "a-key-that-is-wrong"


def bot_of(im):
    return im.client.application.extensions["bot"]


@pytest.mark.parametrize("name", ["dify", "adp"])
@pytest.mark.parametrize("turns", [20, 0])
def test_a_chat_goes_on_after_a_restart_and_begins_anew_after_clear(
    sim, agent, tmp_path, name, turns
):
    im = agent(name, history_turns=turns)
    im.say("the-text-of-a-user")
    sim.wait(1)
    poll(lambda: idle(im))
    bot_of(im).store.prune(86400)
    stored = b"".join(file.read_bytes() for file in tmp_path.glob("bot.db*"))
    assert b"the-text-of-a-user" not in stored
    bot_of(im).close(5)
    im = agent(name, history_turns=turns)
    for number, text in enumerate(["two", "/clear", "three"], 2):
        im.say(text)
        sim.wait(number)
    assert said_to(sim, "jared")[1::2] == ["two", "three"]
    counted = [m.text for m in sim.delivered if "(question" in m.text]
    assert [re.findall(r"\d", text)[-1] for text in counted] == ["1", "2", "1"]


def test_a_crash_in_the_first_question_asks_the_same_session_again(sim, agent):
    im, kept = agent("adp"), []
    chat = "c2c\t@RBT#001\tjared"
    sim.ai_fault = lambda asked: kept.append(bot_of(im).store.get(chat)["session"])
    im.say("hello")
    sim.wait(1)
    assert kept == [asked["session_id"] for asked in sim.ai_requests]


@pytest.mark.slow
def test_what_a_service_is_known_by_is_kept_as_long_as_it_is_used(sim, agent):
    im = agent()
    store = bot_of(im).store
    for number in range(1, 4):
        im.say("again")
        sim.wait(number)
        poll(lambda: idle(im))
        store.prune(86400)
        old = "UPDATE kept SET put_at = put_at - 80000"
        store._write(old, {})
    assert shown(sim, "jared") == [1, 2, 3]
    store._write(old, {})
    store.prune(86400)
    assert not store.get("c2c\t@RBT#001\tjared")


@pytest.mark.parametrize(
    ("memory", "owners"), [("group", ["@TGS#demo"]), ("member", ["jared", "lin"])]
)
@pytest.mark.parametrize("name", ["dify", "adp"])
def test_in_a_group_the_conversation_is_the_groups_or_each_members(
    sim, agent, name, memory, owners
):
    im = agent(name, group_memory=memory)
    for number, user in enumerate(["jared", "lin"]):
        im.post(sim.say_in_group(user, "@TGS#demo", "hello", ["@RBT#001"]))
        sim.wait(number + 1)
    known = sim.dify_conversations if name == "dify" else sim.adp_sessions
    assert [conversation.user for conversation in known.values()] == owners
    first = next(iter(known.values())).messages
    said = [m["content"] for m in first if m["role"] == "user"]
    shared = ["jared: hello", "lin: hello"]
    assert said == (shared if memory == "group" else ["hello"])


@pytest.mark.parametrize("app", ["chatbot", "agent", "new agent", "chatflow"])
@pytest.mark.parametrize(
    "mode", ["whole", pytest.param("modify", marks=pytest.mark.slow)]
)
def test_every_kind_of_dify_app_is_understood(sim, agent, app, mode):
    sim.dify_app, sim.ai_pace = app, 0.15 if mode == "modify" else 0
    im = agent(reply_mode=mode)
    im.say("hello")
    [answer] = sim.wait(1, closed=True)
    assert answer.text == "You said: hello (question 1 of our chat)"
    assert len(answer.states) > 2 or mode == "whole"


@pytest.fixture
def events_read(monkeypatch):
    """What the bot has read of Dify's answers."""
    read, seen = agents.read_dify, []

    def spy(event, *given):
        seen.append(event)
        return read(event, *given)

    monkeypatch.setattr(agents, "read_dify", spy)
    return seen


@pytest.mark.parametrize("mode", ["whole", "modify"])
def test_a_stop_stops_dify_too_and_the_conversation_goes_on(
    sim, agent, events_read, mode
):
    im = agent(reply_mode=mode, bot_language="en")
    sim.ai_answer, sim.ai_pace = (lambda messages: "word " * 300), 0.05
    im.say("tell")
    poll(lambda: events_read)
    im.say("/stop")
    poll(lambda: sim.dify_stopped)
    sim.ai_pace = 0
    poll(lambda: len(sim.delivered) == 2 and idle(im))
    im.say("next")
    sim.wait(3, closed=True)
    assert len(sim.dify_begun) == 1


def test_a_stop_that_dify_does_not_take_holds_nobody_up(sim, agent, events_read):
    im = agent(bot_language="en")
    sim.ai_answer, sim.ai_pace = (lambda messages: "word " * 300), 0.05
    im.say("tell")
    poll(lambda: events_read)
    [path] = [path for path in sim.services if path.endswith("/stop")]
    called = []
    sim.services[path] = lambda *_: called.append(1) or time.sleep(20) or (500, {})
    began = time.monotonic()
    im.say("/stop")
    sim.wait(2)
    poll(lambda: idle(im) and called)
    assert time.monotonic() - began < 4


def test_the_prompt_of_an_adp_app_is_replaced_only_on_request(sim, agent):
    for number, prompt in enumerate([{}, {"ai_system_prompt": "You are Ada."}], 1):
        im = agent("adp", **prompt)
        im.say("hello")
        sim.wait(number)
        bot_of(im).close(5)
    assert [asked.get("system_role") for asked in sim.ai_requests] == [
        None,
        "You are Ada.",
    ]


@pytest.mark.parametrize("name", ["dify", "adp"])
def test_no_key_of_a_platform_is_in_a_log_at_debug(sim, agent, caplog, name):
    caplog.set_level(logging.DEBUG)
    sim.adp_key = sim.dify_key = "the-right-key"
    for number, key in enumerate(["the-right-key", WRONG], 1):
        im = agent(name, ai_secret_key=key, log_level="DEBUG")
        logging.getLogger("urllib3").setLevel(logging.DEBUG)
        im.say("the-text-of-a-user")
        answer = sim.wait(number)[-1]
        assert ("You said" in answer.text) == (key != WRONG)
        bot_of(im).close(5)
    assert "code 4505004" in caplog.text or "code unauthorized" in caplog.text
    assert "DEBUG" in caplog.text
    for secret in ("the-right-key", WRONG, "the-text-of-a-user"):
        assert secret not in caplog.text


def test_a_persona_on_dify_beside_one_on_minimax(sim, make_app, tmp_path):
    file = tmp_path / "robots.toml"
    file.write_text(
        f"""
        ["@RBT#002"]
        provider = "dify"
        base_url = "{sim.url}/v1"
        secret_key_env = "SUPPORT_KEY"
        """
    )
    sim.dify_key = "app-support"
    env = {"IM_SDKAPPID": "1400000000", "IM_KEY": sim.key, "AI_PROVIDER": "minimax"}
    env |= {"AI_SECRET_KEY": sim.ai_key, "AI_BASE_URL": f"{sim.url}/v1"}
    env |= {"IM_CALLBACK_TOKEN": sim.token, "IM_API_URL": sim.url}
    env |= {"ROBOTS": str(file), "SUPPORT_KEY": "app-support"}
    own = vars(Settings.from_env(PROVIDERS, REPLIES, env)) | {
        "database_url": f"sqlite:///{tmp_path}/b.db"
    }
    im = Caller(sim, make_app(**own).test_client())
    for number in (1, 2):
        both = ["@RBT#001", "@RBT#002"]
        im.post(sim.say_in_group("lin", "@TGS#demo", "you two?", both))
        answers = {m.robot: m.text for m in sim.wait(2 * number)[-2:]}
        said = f"@lin You said: lin: you two? (question {number} of our chat)"
        assert answers == {"@RBT#001": said, "@RBT#002": said}
    assert len(sim.dify_begun) == 1


@pytest.mark.parametrize("name", ["dify", "adp"])
def test_what_a_robot_says_first_is_told_once_to_a_service_that_remembers(
    sim, agent, name
):
    im, told = agent(name, history_turns=5), []
    for number, said in enumerate([["shipped"], [], ["sold", "gone"], ["paid"]]):
        for text in said:
            message = callback.Message(
                f"say {text}", "@RBT#001", "jared", "", kind="said"
            )
            about = {"reply": text, "sent": time.time(), "remember": True}
            chat = message.conversation()
            bot_of(im).store.add(message.id, chat, message.data(), **about)
        im.say(f"q{number}", MsgTime=int(time.time()) + 1)
        poll(lambda number=number: len(sim.ai_requests) > number and idle(im))
        told.append(sim.ai_requests[-1].get("query") or sim.ai_requests[-1]["content"])
    assert told == [
        "assistant: shipped\nuser: q0",
        "q1",
        "assistant: sold\nassistant: gone\nuser: q2",
        "assistant: paid\nuser: q3",
    ]
    assert [m.text for m in sim.delivered].count("paid") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_robot_said_unasked_is_told_after_a_question_that_failed(
    sim, agent, fails
):
    im = agent("dify", history_turns=5)
    said = callback.Message("say 1", "@RBT#001", "jared", "", kind="said")
    more = {"reply": "your parcel was shipped", "remember": True}
    bot_of(im).workers.add(said.id, said.conversation(), said.data(), **more)
    sim.wait(1)
    poll(lambda: idle(im))
    if fails:
        sim.ai_fault = lambda body: (401, {"code": "unauthorized", "message": "no"})
        im.say("hello")
        sim.wait(2)
        poll(lambda: idle(im))
        sim.ai_fault = lambda body: None
    im.say("and?")
    sim.wait(2 + fails)
    poll(lambda: idle(im))
    assert "shipped" in sim.ai_requests[-1]["query"]
