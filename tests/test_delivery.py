"""Answers on their way: refused, unconfirmed, cut, given up, each from end to end."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from dataclasses import replace

import pytest
from conftest import FAST, Caller, delta, idle, message, poll, said_to, sse

import simulator.tencent
from botserver import REPLIES, Bot
from imbot.delivery import Delivery
from imbot.queue import MAX_ATTEMPTS, StoreError
from imbot.texts import TEXTS

EN, ROBOT = TEXTS["en"], "@RBT#001"
SORRY = EN["undeliverable"]
FORBIDDEN = "this is forbidden, all of it"
TWO_PARTS = "a" * 8000 + "\n\n" + "b" * 8000
QUICK = replace(
    FAST, again=0.05, pauses=(0.0, 0.0), first_delay=0.02, longest_retry=0.1
)
each_mode = pytest.mark.parametrize("mode", REPLIES)


def word_filter(command, body):
    # A stream may be cut in the middle of the word; one of these is in a piece of it.
    found = any(part in str(body) for part in ("forb", "idden"))
    return 80001 if found else None


def health(im):
    return im.client.get("/healthz").get_json()


def columns(tmp_path, sql):
    with closing(sqlite3.connect(tmp_path / "bot.db", timeout=10)) as file, file:
        return file.execute(sql).fetchall()


def say_somewhere(im, place, text="tell"):
    if place == "group":
        return im.post(im.sim.say_in_group("jared", "@TGS#demo", text, [ROBOT]))
    return im.say(text)


@each_mode
def test_a_final_refusal_is_told_and_what_is_open_is_closed(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode, bot_language="en").test_client())
    sim.ai_answer, sim.ai_pace = (lambda messages: FORBIDDEN), 0.02
    sim.fault = word_filter
    im.say("tell")
    poll(lambda: health(im)["failed"] == 1)
    assert all(m.closed for m in sim.delivered)
    assert [SORRY in m.text for m in sim.delivered].count(True) == 1
    assert sim.delivered[-1].text.endswith(SORRY)
    im.say("/help")
    poll(lambda: "/clear" in sim.delivered[-1].text)


@each_mode
def test_a_message_whose_work_failed_three_times_is_told_and_closed(
    sim, make_app, mode, monkeypatch
):
    tries = []

    def answer(bot, chat, delivery):
        tries.append(chat.message.id)
        raise ValueError("a mistake in the program")

    monkeypatch.setattr(Bot, "answer", answer)
    im = Caller(sim, make_app(QUICK, reply_mode=mode, bot_language="en").test_client())
    im.say("tell")
    poll(lambda: health(im)["failed"] == 1)
    assert len(tries) == 3
    assert [m.text for m in sim.delivered] == [SORRY] and sim.delivered[0].closed


@each_mode
def test_an_answer_that_is_kept_is_sent_however_often_its_work_was_cut_short(
    sim, make_app, mode, monkeypatch
):
    real, deaths = Delivery.show, []

    def show(delivery, answer):
        if len(deaths) < MAX_ATTEMPTS:
            deaths.append(answer)
            raise ValueError("this process is killed")
        real(delivery, answer)

    monkeypatch.setattr(Delivery, "show", show)
    im = Caller(sim, make_app(QUICK, reply_mode=mode, bot_language="en").test_client())
    im.say("tell")
    poll(lambda: deaths and idle(im))
    assert [*filter(None, said_to(sim, "jared"))] == ["tell"]
    assert health(im)["failed"] == 0 and len(sim.ai_requests) == 1


@each_mode
def test_a_user_is_told_though_tencent_is_busy_just_then(sim, make_app, mode):
    """The answer is refused for good, and the sentence that says so at first."""
    im = Caller(sim, make_app(QUICK, reply_mode=mode, bot_language="en").test_client())
    sim.ai_answer, busy = (lambda messages: FORBIDDEN), [60007] * 12

    def fault(command, body):
        sorry = SORRY in json.dumps(body) or '"IsLast": true' in json.dumps(body)
        return word_filter(command, body) or (busy.pop() if sorry and busy else None)

    sim.fault = fault
    im.say("tell")
    poll(lambda: health(im)["failed"] == 1)
    assert not busy and sim.delivered[-1].text.endswith(SORRY)
    assert [SORRY in m.text for m in sim.delivered].count(True) == 1
    assert all(m.closed for m in sim.delivered)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_slow_edits_do_not_cost_the_ais_time(sim, make_app, mode):
    """The AI takes 1.8 of its 3 s; in its last ones an edit is on its way."""
    settings = {"reply_mode": mode, "ai_timeout": 3.0, "bot_language": "en"}
    im = Caller(sim, make_app(**settings).test_client())
    sim.ai_pace = 0.11
    sim.fault = lambda command, body: time.sleep(1.3 * bool(sim.delivered))
    sim.ai_answer = lambda messages: "a word or two. " * 4
    im.say("tell")
    poll(lambda: sim.delivered and idle(im))
    assert sim.delivered[0].text.strip() == ("a word or two. " * 4).strip()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_a_slow_opening_does_not_cost_the_ais_time(sim, make_app, mode):
    settings = {"reply_mode": mode, "ai_timeout": 1.0, "bot_language": "en"}
    im = Caller(sim, make_app(**settings).test_client())
    sim.im_delay = 1.2
    im.say("tell")
    poll(lambda: sim.delivered and sim.delivered[0].closed and idle(im))
    assert said_to(sim, "jared") == ["tell"]


@pytest.mark.slow
def test_a_groups_talk_that_is_slow_does_not_cost_the_ais_time(sim, make_app):
    settings = {"ai_timeout": 1.0, "group_context": 5, "bot_language": "en"}
    timing = replace(FAST, aside=1.2)
    im = Caller(sim, make_app(timing, **settings).test_client())
    sim.say_in_group("lin", "@TGS#demo", "talk", [])
    sim.fault = lambda command, body: time.sleep(1.5 * ("get_simple" in command))
    say_somewhere(im, "group")
    assert "You said" in sim.wait(1)[0].text


def test_nothing_hangs_on_a_clock_that_was_set_back(sim, make_app, tmp_path):
    im = Caller(sim, make_app(QUICK, max_waiting=3).test_client())
    for text in ("one", "two"):
        im.say(text)
    poll(lambda: len(sim.delivered) == 2 and idle(im))
    sim.fault = lambda command, body: 60007
    im.say("waits", user="lin")
    later = "SELECT 1 FROM conversation WHERE token IS NULL"
    poll(lambda: columns(tmp_path, later))
    # What a clock that was an hour ahead has left behind.
    columns(tmp_path, "UPDATE message SET accepted = accepted + 3600")
    columns(tmp_path, "UPDATE conversation SET due = due + 3600")
    sim.fault = lambda command, body: None
    im.say("three")
    poll(lambda: "three" in said_to(sim, "jared") and "waits" in said_to(sim, "lin"), 9)


@pytest.fixture
def short_windows(monkeypatch):
    """Let Tencent forget what it was sent after 0.7 s, and the bot after 0.2 s."""
    monkeypatch.setattr(simulator.tencent, "C2C_WINDOW", 0.7)
    monkeypatch.setattr(simulator.tencent, "GROUP_WINDOW", 0.7)
    return replace(QUICK, duplicate_window=0.2, duplicate_window_group=0.2)


@pytest.mark.parametrize(
    ("mode", "part", "place", "how"),  # an edit may be made again, so its part is none
    [
        ("whole", "aaa", "one-to-one", "late"),
        ("whole", "bbb", "group", "late"),
        ("whole", "aaa", "group", "lost"),
        ("whole", "bbb", "one-to-one", "lost"),
        ("card", "aaa", "one-to-one", "late"),
        ("modify", "bbb", "group", "late"),
        ("custom", "bbb", "one-to-one", "late"),
        ("not to be opened", "aaa", "one-to-one", "late"),
        ("not to be opened", "bbb", "group", "late"),
    ],
)
def test_what_may_have_arrived_is_not_sent_beyond_tencents_window(
    sim, make_app, short_windows, caplog, place, part, mode, how
):
    """It counts as sent, and what follows it is sent."""
    reply_mode = "modify" if mode == "not to be opened" else mode
    im = Caller(sim, make_app(short_windows, reply_mode=reply_mode).test_client())
    sim.ai_answer = lambda messages: TWO_PARTS

    def fault(command, body):
        if mode == "not to be opened" and "…" in str(body):
            return 10004
        return how if part in str(body) and "modify" not in command else None

    sim.fault = fault
    say_somewhere(im, place)
    poll(lambda: "counts as sent" in caplog.text)
    poll(lambda: idle(im))
    assert caplog.text.count("counts as sent") == 1
    shown = [part for part in ("aaa", "bbb") if how == "late" or part != part_of(fault)]
    assert [m.text.removeprefix("@jared ")[:3] for m in sim.delivered] == shown
    assert all(m.closed for m in sim.delivered) and health(im)["failed"] == 0


def part_of(fault):
    """Return the part that never arrives."""
    return next(p for p in ("aaa", "bbb") if fault("send", {"Text": p}) == "lost")


def test_an_answer_that_was_sent_before_the_machine_stood_still_is_not_sent_again(
    sim, make_app, monkeypatch
):
    """For longer than Tencent drops a duplicate, once the answer has arrived."""
    real, faults = time.time, ["late"]
    im = Caller(sim, make_app(QUICK).test_client())
    monkeypatch.setattr(time, "time", lambda: real() + 135 * bool(sim.delivered))
    sim.fault = lambda command, body: faults.pop() if faults else None
    im.say("tell")
    poll(lambda: not faults and idle(im))
    assert said_to(sim, "jared") == ["tell"]


@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_what_was_opened_before_the_machine_stood_still_is_not_opened_again(
    sim, make_app, monkeypatch, mode
):
    real, sent = time.time, []
    im = Caller(sim, make_app(QUICK, reply_mode=mode).test_client())
    monkeypatch.setattr(time, "time", lambda: real() + 135 * bool(sim.delivered))

    def fault(command, body):
        sent.append(json.dumps(body))
        return None if sent[1:] else "late"

    sim.fault = fault
    im.say("tell")
    poll(lambda: "tell" in sim.delivered[-1].text if sim.delivered else None)
    poll(lambda: idle(im))
    assert sent.count(sent[0]) == 1


@pytest.mark.parametrize("mode", ["whole", "card"])
def test_an_unconfirmed_answer_is_not_resent_if_the_machine_stands_still_later(
    sim, make_app, monkeypatch, mode
):
    """Between two tries of the next claim, the first of which surely failed."""
    real, ahead, tries = time.time, [0], []
    im = Caller(sim, make_app(QUICK, reply_mode=mode).test_client())

    def fault(command, body):
        tries.append(body)
        if len(tries) <= 3:  # all of the first claim
            return "late"
        if not ahead[0]:
            ahead[0] = 135
            monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
            return 60007
        return None

    sim.fault = fault
    im.say("tell")
    poll(lambda: ahead[0] and idle(im))
    assert said_to(sim, "jared") == ["tell"]


@each_mode
def test_the_sentence_that_no_answer_comes_is_shown_once(
    sim, make_app, short_windows, mode
):
    """Though no confirmation of it comes for longer than Tencent's window."""
    settings = {"reply_mode": mode, "bot_language": "en"}
    im = Caller(sim, make_app(short_windows, **settings).test_client())
    sim.ai_answer, first = (lambda messages: FORBIDDEN), []

    def fault(command, body):
        if SORRY not in json.dumps(body):
            return word_filter(command, body)
        first or first.append(time.monotonic())
        return "late" if time.monotonic() < first[0] + 2 else None

    sim.fault = fault
    im.say("tell")
    poll(lambda: health(im)["failed"] == 1)
    assert [SORRY in m.text for m in sim.delivered].count(True) == 1


@pytest.mark.parametrize("mode", ["whole", "modify"])
def test_an_unconfirmed_answer_is_not_resent_after_a_late_restart(
    sim, make_app, short_windows, mode
):
    app = make_app(short_windows, reply_mode=mode)
    im, faults = Caller(sim, app.test_client()), ["late"] * 3
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("tell")
    poll(lambda: not faults and (idle(im) or health(im)["waiting"]))
    app.extensions["bot"].close(drain=1)
    forgotten = sim.delivered[0].born + simulator.tencent.C2C_WINDOW
    poll(lambda: time.time() > forgotten)
    im = Caller(sim, make_app(short_windows, reply_mode=mode).test_client())
    im.say("next")
    poll(lambda: "next" in said_to(sim, "jared") and idle(im))
    told = [m.text for m in sim.delivered if "next" not in m.text]
    assert sum("tell" in text for text in told) == 1
    assert len(told) == (1 if mode == "whole" else 2)  # one was only opened


@pytest.mark.parametrize("fault", [60007, 20004])
def test_what_surely_did_not_arrive_is_sent_beyond_tencents_window(
    sim, make_app, short_windows, fault
):
    im = Caller(sim, make_app(short_windows).test_client())
    began = time.monotonic()
    sim.fault = lambda command, body: fault if time.monotonic() < began + 0.9 else None
    im.say("tell")
    [answer] = sim.wait(1)
    assert answer.text.startswith("You said: tell") and time.monotonic() > began + 0.9


@pytest.mark.parametrize("mode", ["whole", "custom", "stream"])
@pytest.mark.parametrize("away", ["in the middle", "after the last part"])
def test_a_store_away_as_an_answer_is_sent_lets_nothing_be_sent_again(
    sim, make_app, mode, away
):
    app = make_app(reply_mode=mode)
    im, store = Caller(sim, app.test_client()), app.extensions["bot"].store
    sim.ai_answer, back = (lambda messages: TWO_PARTS), []
    ends = "aaa" if away == "in the middle" else "bbb"

    def shown():
        return any(m.closed and ends in m.text for m in sim.delivered)

    def gone(verb):
        def act(*values):
            if shown() and not back:
                raise StoreError("away")
            return verb(*values)

        return act

    for name in ("finish", "save_reply", "load", "heartbeat"):
        if hasattr(store, name):
            setattr(store, name, gone(getattr(store, name)))
    im.say("tell")
    poll(lambda: shown())
    time.sleep(0.4)  # time to send it again
    calls = len(sim.calls)
    back.append(True)
    poll(lambda: idle(im))
    time.sleep(0.2)
    assert len(sim.calls) == calls and len(sim.ai_requests) == 1
    assert "bbb" in sim.delivered[-1].text and health(im)["failed"] == 0
    texts = [json.dumps(body) for command, body in sim.calls if "modify" not in command]
    assert len(texts) == len(set(texts))


def test_one_answer_that_im_will_not_take_does_not_hold_a_chat_up(sim, make_app):
    timing = replace(QUICK, patience_with_message=0.5)
    im = Caller(sim, make_app(timing, bot_language="en").test_client())
    sim.fault = lambda command, body: 90994 if "unlucky" in str(body) else None
    im.say("unlucky")
    im.say("next")
    sim.wait(2)
    poll(lambda: idle(im))
    assert said_to(sim, "jared") == [SORRY, "next"]
    assert health(im)["failed"] == 1


def test_a_rate_limit_of_ims_keeps_the_long_patience(sim, make_app):
    timing = replace(QUICK, patience_with_message=0.2)
    im = Caller(sim, make_app(timing).test_client())
    began = time.monotonic()
    sim.fault = lambda command, body: 60018 if time.monotonic() < began + 0.8 else None
    im.say("tell")
    sim.wait(1)
    assert said_to(sim, "jared") == ["tell"]


def served(body, kind="application/json"):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


@pytest.mark.parametrize("mode", ["whole", "modify"])
def test_an_answer_cut_by_its_length_says_so_and_goes_on(
    sim, make_app, ai_socket, mode
):
    half, rest = "The half of it", "And the rest."
    if mode == "whole":
        answers = [served(json.dumps(message(half, "length")).encode())]
        answers += [served(json.dumps(message(rest)).encode())]
    else:
        answers = [served(sse(delta(half), delta("", "length")), "text/event-stream")]
        answers += [served(sse(delta(rest), delta("", "stop")), "text/event-stream")]
    service = ai_socket(*answers)
    settings = {"reply_mode": mode, "bot_language": "en", "ai_base_url": service.url}
    im = Caller(sim, make_app(**settings).test_client())
    im.say("tell")
    poll(lambda: sim.delivered and idle(im))
    assert sim.delivered[0].text == f"{half}\n\n{EN['length']}"
    im.say("go on")
    poll(lambda: len(sim.delivered) == 2 and idle(im))
    assert sim.delivered[1].text == rest
    turns = json.loads(service.bodies[1])["messages"]
    assert [turn["content"] for turn in turns[1:]] == ["tell", half, "go on"]


@pytest.mark.parametrize("said", [{"content": None, "refusal": "No."}, None])
def test_a_refusal_is_shown_and_a_call_of_tools_is_no_answer(
    sim, make_app, ai_socket, said
):
    said = said or {"content": None, "tool_calls": [{"id": "1"}]}
    body = {"choices": [{"message": said, "finish_reason": "stop"}]}
    service = ai_socket(served(json.dumps(body).encode()))
    im = Caller(sim, make_app(bot_language="en", ai_base_url=service.url).test_client())
    im.say("tell")
    assert sim.wait(1)[0].text == said.get("refusal", EN["empty"])


def test_after_a_retry_an_answer_has_all_its_patience_again(sim, make_app, tmp_path):
    app = make_app(QUICK)
    im, store = Caller(sim, app.test_client()), app.extensions["bot"].store
    sim.fault = lambda command, body: 20004
    im.say("tell")
    since = """SELECT json_extract(progress, '$.failing_since') FROM message
        JOIN conversation ON name = conversation WHERE token IS NULL"""
    poll(lambda: any(row[0] for row in columns(tmp_path, since)))
    old = """UPDATE message SET accepted = accepted - 2e5, progress = json_set(
        progress, '$.failing_since', json_extract(progress, '$.failing_since') - 2e5)"""
    columns(tmp_path, old)
    poll(lambda: "gives_up" in str(columns(tmp_path, "SELECT progress FROM message")))
    columns(tmp_path, old)
    poll(lambda: health(im)["failed"] == 1)
    faults = [20004] * 3
    sim.fault = lambda command, body: faults and faults.pop()
    assert store.retry() == 1
    poll(lambda: sim.delivered and idle(im))
    assert not faults and health(im)["failed"] == 0
    assert said_to(sim, "jared") == ["tell"]


def test_an_answer_has_as_many_messages_as_max_parts_allows(sim, make_app):
    im = Caller(sim, make_app(max_parts=3, bot_language="en").test_client())
    sim.ai_answer = lambda messages: "long. " * 20_000
    im.say("tell")
    poll(lambda: sim.delivered and idle(im))
    assert len(sim.delivered) == 3 and sim.delivered[-1].text == EN["length"]


@pytest.mark.parametrize("mode", ["whole", "custom", "stream"])
def test_a_stop_ends_the_sending_of_a_long_answer(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode, bot_language="en").test_client())
    sim.ai_answer, sim.im_delay = (lambda messages: "long. " * 20_000), 0.05
    im.say("tell")
    first = 1 if mode == "stream" else 2
    poll(lambda: len(sim.delivered) > first)
    im.say("/stop")
    poll(lambda: idle(im))
    texts = [m.text for m in sim.delivered]
    assert texts.count(EN["stopped"]) == texts.count(EN["stop"]) == 1
    assert len(texts) < 12 and all(m.closed for m in sim.delivered)
