"""The replies that grow: an edited message, TUIKit's card, a stream."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
from conftest import STORY, Caller, idle, poll
from test_replies import (
    PLACES,
    SORRY,
    make_reply,
    refused_by_filter,
    tell_sixteen,
    word_filter,
)

from imbot.growing import CardReply, EditedReply, StreamReply
from imbot.tencent.rest import IMError

MODES = {"modify": EditedReply, "custom": CardReply, "stream": StreamReply}
each_mode = pytest.mark.parametrize("mode", MODES)
each_place = pytest.mark.parametrize("place", PLACES)


@each_place
@each_mode
def test_every_mode_ends_closed_and_true_while_im_fails(sim, make_app, mode, place):
    answers = tell_sixteen(sim, make_app, mode, place)
    assert sum(len(messages[0].states) for messages in answers) > 2 * 16  # they grew


@each_mode
def test_a_growing_mode_that_im_refuses_becomes_plain_text(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    refused = {"modify": "TIMTextElem", "custom": "TIMCustomElem"}.get(mode)

    def fault(command, body):
        kind = body["MsgBody"][0]["MsgType"]
        text = body["MsgBody"][0]["MsgContent"].get("Text")
        return (
            10004
            if kind == refused and text in (None, "…") or "Stream" in kind
            else None
        )

    sim.fault = fault
    im.say("hello")
    [answer] = sim.wait(1)
    assert answer.text == "You said: hello (question 1 of our chat)"
    assert answer.body["MsgBody"][0]["MsgType"] == "TIMTextElem"


def test_a_failure_in_custom_mode_is_shown_as_one(sim, make_app):
    im = Caller(sim, make_app(reply_mode="custom").test_client())
    sim.ai_fault = lambda asked: (401, {"error": {"message": "no (1004)"}})
    im.say("hello")
    poll(lambda: sim.delivered and idle(im))
    assert sim.delivered[0].failed and sim.delivered[0].closed


def test_a_stream_is_kept_alive_only_while_it_is_open(sim):
    stream = make_reply(sim, StreamReply)
    stream.keep_alive()
    assert not sim.calls
    stream.open()
    stream.update("half")
    assert sim.delivered[0].index == 2
    assert stream.keep_alive_after < 15
    stream.keep_alive()
    assert (sim.delivered[0].index, sim.delivered[0].text) == (3, "half")
    stream.close("half and half")
    assert stream.keep_alive_after == math.inf
    stream.keep_alive()
    assert (sim.delivered[0].index, sim.delivered[0].closed) == (4, True)
    assert len(sim.calls) == 4
    assert [m.text for m in sim.delivered] == ["half and half"]


def test_a_stream_is_not_kept_alive_while_a_chunk_is_on_its_way(sim):
    stream = make_reply(sim, StreamReply)
    stream.open()
    with stream._lock:
        stream.keep_alive()  # it would wait for ever
    assert len(sim.calls) == 1


@pytest.mark.parametrize("died", ["as it kept the answer", "as it sent the answer"])
def test_a_stream_that_a_dead_process_began_does_not_swallow_the_answer(sim, died):
    saved = {}
    make_reply(sim, StreamReply, saved=saved).open()
    if died == "as it sent the answer":
        saved |= {"said": "", "index": 1}
        sim.delivered[0].time -= 20  # Tencent has closed it meanwhile
        faults = ["lost"]
        sim.fault = lambda command, body: faults and faults.pop()
    make_reply(sim, StreamReply, progress=saved, saved=saved).close("the answer")
    assert "the answer" in sim.delivered[-1].text
    assert all(message.closed for message in sim.delivered)


def test_a_stream_that_tencent_closed_in_a_pause_swallows_no_answer(sim, monkeypatch):
    """The process stands still after the first try, which did not arrive."""
    stream, left = make_reply(sim, StreamReply), ["lost"]
    stream.open()
    real, paused = time.time, []
    clock = SimpleNamespace(time=lambda: real() + 20 * len(paused), monotonic=real)
    monkeypatch.setattr(growing, "time", clock)

    def fault(command, body):
        if left:
            paused.append(True)
            sim.delivered[0].time -= 20
        return left and left.pop()

    sim.fault = fault
    stream.close("the answer")
    assert sim.delivered[-1].text == "the answer" and sim.delivered[0].closed


def test_a_stream_that_was_left_to_die_before_its_end_swallows_no_answer(sim):
    """A process was killed as it was about to send the end."""
    saved = {}
    stream = make_reply(sim, StreamReply, saved=saved)
    stream.open()
    sim.fault = lambda command, body: 60007
    with pytest.raises(IMError):
        stream.close("the answer")
    sim.fault = lambda command, body: None
    sim.delivered[0].time -= 20
    saved["confirmed"] -= 20
    make_reply(sim, StreamReply, progress=saved, saved=saved).close("the answer")
    assert sim.delivered[-1].text == "the answer" and sim.delivered[0].closed


def test_a_stream_that_was_opened_twice_swallows_no_answer(sim):
    """Tencent confirms the second opening, but the stream is as old as the first."""
    make_reply(sim, StreamReply).open()  # and the process is killed before it saved it
    sim.delivered[0].time -= 20
    stream, faults = make_reply(sim, StreamReply), ["lost"]
    stream.open()
    sim.fault = lambda command, body: faults and faults.pop()
    stream.close("the answer")
    assert sim.delivered[-1].text == "the answer" and sim.delivered[0].closed


def test_a_refusal_of_a_last_chunk_is_never_taken_for_its_success(sim):
    stream = make_reply(sim, StreamReply)
    stream.open()
    faults = ["lost", 80001]
    sim.fault = lambda command, body: faults.pop(0) if faults else word_filter("", body)
    with refused_by_filter():
        stream.close("this is forbidden")
    stream.give_up(SORRY)
    assert SORRY in sim.delivered[-1].text and all(m.closed for m in sim.delivered)


@each_mode
def test_an_opening_that_im_took_but_did_not_confirm_is_not_left_open(
    sim, make_app, mode
):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    faults = [60007, 60007, "late"]
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("hello")
    poll(lambda: not faults and idle(im))
    assert [message.closed for message in sim.delivered] == [True]
    assert sim.delivered[0].text.startswith("You said: hello")


@each_place
@each_mode
def test_an_answer_that_im_refuses_is_closed_with_a_sentence(sim, mode, place):
    reply = make_reply(sim, MODES[mode], place)
    sim.fault = word_filter
    reply.open()
    reply.update("this is ")
    reply.update("this is forbidden")
    with refused_by_filter():
        reply.close("this is forbidden.")
    reply.give_up(SORRY)
    reply.give_up(SORRY)  # again, as after a crash
    [message] = sim.delivered
    assert message.closed and message.text.endswith(SORRY)
    assert message.failed == (mode == "custom")
    kept = "this is \n\n" if mode == "stream" else ""
    mention = "@jared " if place == "group" else ""
    assert message.text == mention + kept + SORRY


@each_place
@each_mode
def test_another_process_gives_up_what_a_dead_one_began(sim, mode, place):
    saved = {}
    dead = make_reply(sim, MODES[mode], place, saved=saved)
    dead.open()
    dead.update("this is")
    for _ in range(2):
        make_reply(sim, MODES[mode], place, progress=saved, saved=saved).give_up(SORRY)
    [message] = sim.delivered
    assert message.closed and message.text.endswith(SORRY)


@each_mode
def test_giving_up_before_there_is_a_message_sends_one(sim, mode):
    reply = make_reply(sim, MODES[mode])
    sim.fault = lambda command, body: 10004
    reply.open()
    sim.fault = lambda command, body: None
    reply.give_up(SORRY)
    reply.give_up(SORRY)
    assert [m.text for m in sim.delivered] == [SORRY]


@each_place
@pytest.mark.parametrize("mode", ["modify", "custom"])
def test_a_first_part_that_is_shown_stays_when_the_second_is_refused(sim, mode, place):
    reply = make_reply(sim, MODES[mode], place)
    sim.fault = word_filter
    reply.open()
    first = "a" * 8500
    for _ in range(2):
        with refused_by_filter():
            reply.close(f"{first}\n\nforbidden " + "b" * 8000)
    reply.give_up(SORRY)
    assert len(sim.delivered) == 2
    assert all(m.closed and not m.failed for m in sim.delivered)
    assert first in sim.delivered[0].text and sim.delivered[1].text.endswith(SORRY)


@pytest.mark.parametrize("mode", ["modify", "custom"])
def test_a_last_edit_that_im_refuses_leaves_nothing_open(sim, mode):
    reply = make_reply(sim, MODES[mode])
    reply.open()
    sim.fault = lambda command, body: (
        90054 if "modify" in command and "answer" in str(body) else None
    )
    reply.close("the answer")
    assert [m.text for m in sim.delivered] == ["(replaced)", "the answer"]
    assert all(m.closed for m in sim.delivered)


@pytest.mark.parametrize("refused", ["as it grows", "as it is closed"])
def test_a_stream_that_becomes_plain_text_says_nothing_twice_after_a_crash(
    sim, refused
):
    saved, answer = {}, STORY * 20
    faults = {"open": [None], "grow": [None, 10004], "close": [80001]}
    if refused == "as it is closed":  # which first confirms what was pending
        faults = {"open": [None], "grow": ["lost"], "close": [None, 10004, 80001]}
    plain = []

    def fault(command, body):
        if "stream" in command:
            return left.pop(0)
        plain.append(body)
        return None if len(plain) == 1 else 80001

    sim.fault = fault
    reply = make_reply(sim, StreamReply, saved=saved)
    left = faults["open"]
    reply.open()
    left = faults["grow"]
    for end in range(400, 400 * len(left) + 1, 400):
        reply.update(answer[:end])
    left = faults["close"]
    with refused_by_filter():
        reply.close(answer)
    sim.fault = lambda command, body: 10004 if "stream" in command else None
    make_reply(sim, StreamReply, progress=saved, saved=saved).close(answer)
    shown = "".join(m.text for m in sim.delivered)
    assert "".join(shown.split()) == "".join(answer.split())


@pytest.mark.parametrize("mode", ["modify", "custom"])
def test_an_edit_can_be_made_again_however_late(sim, mode):
    reply = make_reply(sim, MODES[mode])
    reply.open()
    sim.fault = lambda command, body: "late"
    with pytest.raises(IMError) as caught:
        reply.close("the answer")
    assert caught.value.retry and not caught.value.may_have_arrived


def test_a_stream_that_was_not_closed_is_closed_by_another_process(sim):
    saved = {}
    reply = make_reply(sim, StreamReply, saved=saved)
    reply.open()
    reply.update("half")
    sim.fault = lambda command, body: "late"
    with pytest.raises(IMError) as caught:
        reply.close("half and half")
    assert caught.value.retry and caught.value.may_have_arrived
    sim.fault = lambda command, body: None
    make_reply(sim, StreamReply, progress=saved, saved=saved).close("half and half")
    assert [m.text for m in sim.delivered] == ["half and half"]
    assert sim.delivered[0].closed


def test_a_text_that_takes_the_place_of_a_streams_is_sent_at_the_second_try(sim):
    stream = make_reply(sim, StreamReply)
    stream.open()
    stream.update("I think")
    sim.fault = lambda command, body: None if "stream" in command else 60007
    with pytest.raises(IMError):
        stream.close("the answer")
    sim.fault = lambda command, body: None
    stream.close("the answer")
    told = [message.text for message in sim.delivered]
    assert told == ["I think\n\n(replaced)", "the answer"]


@each_mode
def test_an_opening_that_counts_as_sent_is_not_made_again(sim, mode):
    reply = make_reply(sim, MODES[mode])
    sim.fault = lambda command, body: "late"
    with pytest.raises(IMError):
        reply.open()
    sim.fault = lambda command, body: None
    reply.assume_sent()
    tries = len(sim.calls)
    reply.open()
    assert len(sim.calls) == tries
