"""The replies that grow: an edited message, TUIKit's card, a stream."""

from __future__ import annotations

import math
import random
import time

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

from imbot.growing import EditedReply, GrowingCardReply, StreamReply
from imbot.replies import measure
from imbot.tencent.rest import IMError

MODES = {"modify": EditedReply, "custom": GrowingCardReply, "stream": StreamReply}
EDITED = {name: kind for name, kind in MODES.items() if name != "stream"}
each_mode = pytest.mark.parametrize("mode", MODES)
each_edited = pytest.mark.parametrize("mode", EDITED)
each_place = pytest.mark.parametrize("place", PLACES)
FAULTS = [None, "lost", "late", 60007]


def texts(sim):
    return [message.text for message in sim.delivered]


def vue(sim):
    """Return the texts as the Vue kits show them, which only append."""
    return [*sim.kit_chat("vue", "jared", "@RBT#001").shown.values()]


@pytest.mark.parametrize(
    "place", ["one-to-one", pytest.param("group", marks=pytest.mark.slow)]
)
@each_mode
def test_every_mode_ends_closed_and_true_while_im_fails(sim, make_app, mode, place):
    answers = tell_sixteen(sim, make_app, mode, place)
    assert sum(len(messages[0].states) for messages in answers) > 2 * 16  # they grew


@each_mode
def test_a_growing_mode_that_im_refuses_becomes_plain_text(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode).test_client())

    def fault(command, body):
        unfinished = ("“…”", '"…"', '\\"isFinished\\": 0')
        shown = str(body).replace("'", '"')
        return 10004 if "tream" in command or any(u in shown for u in unfinished) else 0

    sim.fault = lambda command, body: fault(command, body) or None
    im.say("hello")
    [answer] = sim.wait(1)
    assert answer.text == "You said: hello (question 1 of our chat)"
    kind = "TIMCustomElem" if mode == "custom" else "TIMTextElem"
    assert answer.body["MsgBody"][0]["MsgType"] == kind and answer.closed


def test_a_failure_in_custom_mode_is_shown_as_one(sim, make_app):
    im = Caller(sim, make_app(reply_mode="custom").test_client())
    sim.ai_fault = lambda asked: (401, {"error": {"message": "no (1004)"}})
    im.say("hello")
    poll(lambda: sim.delivered and idle(im))
    assert sim.delivered[0].failed and sim.delivered[0].closed


@each_edited
def test_what_was_shown_never_becomes_shorter(sim, mode):
    """Not at the limit of a message either, though that breaks at a paragraph."""
    answer = "two words " * 600 + "\n\n" + "a long paragraph " * 1500
    reply = make_reply(sim, EDITED[mode])
    reply.open()
    for end in range(500, len(answer), 500):
        reply.update(answer[:end])
    reply.close(answer)
    states = [state.removesuffix("…") for state in sim.delivered[0].states]
    assert all(b.startswith(a) for a, b in zip(states, states[1:], strict=False))
    assert len(sim.delivered) > 3
    assert "".join("".join(texts(sim)).split()) == "".join(answer.split())
    if mode == "custom":
        assert vue(sim) == texts(sim)


@each_edited
def test_what_replaces_a_text_begins_with_it(sim, mode):
    """Each of these ends a card otherwise than with the whole answer."""
    for end in ("a refused end", "giving up", "giving up after a refused end"):
        sim.delivered.clear()
        reply = make_reply(sim, EDITED[mode])
        sim.fault = lambda command, body: None
        reply.message = type(reply.message)(end, *("@RBT#001", "jared", "hi"), seq=7)
        reply.open()
        reply.update("this is")
        refused = "forbidden" if end == "a refused end" else "this is forbidden"
        sim.fault = lambda command, body, refused=refused, end=end: (
            80001
            if refused in str(body) and (end != "a refused end" or "modify" in command)
            else None
        )
        if end == "a refused end":
            reply.close("this is forbidden")
            assert texts(sim) == ["this is\n\n(replaced)", "this is forbidden"]
        elif end == "giving up":
            reply.give_up(SORRY)
            assert texts(sim) == [f"this is\n\n{SORRY}"]
        else:
            with refused_by_filter():
                reply.close("this is forbidden")
            reply.give_up(SORRY)
            assert texts(sim) == ["this is\n\n(replaced)", SORRY]
        assert all(m.closed for m in sim.delivered)
        if mode == "custom":
            assert vue(sim)[-len(sim.delivered) :] == texts(sim)


@pytest.mark.parametrize("place", PLACES)
def test_a_card_is_not_replaced_by_an_answer_that_begins_otherwise(sim, place):
    """Some AI services send another text at the end than they streamed."""
    reply = make_reply(sim, GrowingCardReply, place)
    reply.open()
    for text in ("Let me", "Let me see", "The answer", "The answer is"):
        reply.update(text)
    reply.close("The answer is 42.")
    mention = "@jared " if place == "group" else ""
    shown = [f"{mention}Let me see\n\n(replaced)", f"{mention}The answer is 42."]
    assert texts(sim) == shown and all(m.closed for m in sim.delivered)
    assert place == "group" or vue(sim) == shown


def check_indexes(sim, faults):
    """Let calls fail, and check that each chunk follows the last one in its stream."""
    seen = []

    def fault(command, body):
        if "stream" in command:
            [chunk] = body["MsgBody"][0]["MsgContent"]["Chunks"]
            last = max((m.index for m in sim.delivered if m.index), default=0)
            assert chunk["Index"] <= last + 1, "a gap, after which clients see nothing"
            seen.append(chunk["Index"])
        return faults(command)

    sim.fault = fault
    return seen


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_has_no_gap_and_loses_no_text_however_calls_fail(sim, seed):
    chance, saved, stopped = random.Random(seed), {}, False
    final = seed % 4 == 3
    codes = [*FAULTS, 80001] if final else FAULTS
    share = 0.15 if final else 0.5
    seen = check_indexes(
        sim, lambda _: chance.choice(codes) if chance.random() < share else None
    )
    reply, kept = make_reply(sim, StreamReply, saved=saved), STORY

    def until_it_works(act):
        for _ in range(60):
            try:
                return act()
            except IMError as error:
                if not error.retry:
                    return None
        raise AssertionError("it never works")

    until_it_works(reply.open)
    for end in range(20, len(kept), 40):
        reply.update(kept[:end])
        if chance.random() < 0.2:
            reply.keep_alive()
    for _ in range(80):
        try:
            reply.close(kept)
            break
        except IMError:
            reply.save()
            reply = make_reply(sim, StreamReply, saved=saved)  # a later try
    else:
        stopped = True
    assert not stopped and (final or len(seen) > 10)
    shown = "".join(texts(sim))
    if not final:
        assert texts(sim) == [kept] and sim.delivered[0].closed
    else:  # in doubt a piece is shown twice, but none is lost
        assert all(line in shown for line in kept.split("\n\n"))


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
    assert texts(sim) == ["half and half"]


def test_an_empty_chunk_that_is_unconfirmed_leaves_no_gap_for_a_later_try(sim):
    saved, faults = {}, [None, "lost", "lost", "lost", "lost"]
    seen = check_indexes(sim, lambda _: faults.pop(0) if faults else None)
    stream = make_reply(sim, StreamReply, saved=saved)
    stream.open()
    stream.keep_alive()
    with pytest.raises(IMError):
        stream.close("the answer")
    make_reply(sim, StreamReply, saved=saved).close("the answer")
    assert texts(sim) == ["the answer"] and sim.delivered[0].closed
    assert seen == [1, 2, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("fault", [60007, 80001])
def test_a_chunk_that_was_refused_gives_its_index_back(sim, fault):
    faults = [None, None, fault]
    seen = check_indexes(sim, lambda _: faults.pop(0) if faults else None)
    stream = make_reply(sim, StreamReply)
    stream.open()
    stream.update("one")
    stream.update("one two")
    stream.give_up(SORRY)
    assert texts(sim) == [f"one\n\n{SORRY}"] and seen == [1, 2, 3, 3]


@pytest.mark.parametrize("fault", ["late", "lost"])
def test_a_stream_is_given_up_behind_its_unconfirmed_chunk(sim, fault):
    faults = [None, fault]
    seen = check_indexes(sim, lambda _: faults.pop(0) if faults else None)
    stream = make_reply(sim, StreamReply)
    stream.open()
    stream.update("one")
    stream.give_up(SORRY)
    assert texts(sim) == [f"one\n\n{SORRY}"] and seen == [1, 2, 2, 3]
    assert sim.delivered[0].closed


@pytest.mark.parametrize("died", ["as it asked the AI", "as it sent the answer"])
def test_a_stream_that_a_dead_process_began_does_not_swallow_the_answer(sim, died):
    """Its process alone knows what it shows: it is left, and the answer sent whole."""
    saved = {}
    dead = make_reply(sim, StreamReply, saved=saved)
    dead.open()
    dead.update("the an")
    if died == "as it sent the answer":
        sim.fault = lambda command, body: "lost" if "swer" in str(body) else None
        with pytest.raises(IMError):
            dead.close("the answer")
        dead.save()
        sim.fault = lambda command, body: None
        sim.delivered[0].time -= 20  # Tencent has closed it meanwhile
        saved["taken"] -= 20
    reply = make_reply(sim, StreamReply, saved=saved)
    reply.open()
    reply.update("another")
    before = len(sim.calls)
    reply.close("the answer")
    if died == "as it asked the AI":
        assert texts(sim) == ["the an", "the answer"] and len(sim.calls) == before + 1
    else:
        assert "".join(texts(sim)) == "the answer"


@pytest.mark.parametrize("long", [5, 20])
def test_a_stream_that_tencent_closed_in_a_pause_swallows_no_answer(
    sim, monkeypatch, long
):
    """The process stands still after the first try, which did not arrive."""
    stream, left, real, ahead = make_reply(sim, StreamReply), ["lost"], time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    stream.open()
    stream.update("the")

    def fault(command, body):
        if left:
            ahead[0] = long
        return left and left.pop()

    sim.fault = fault
    stream.close("the answer")
    assert "".join(texts(sim)) == "the answer" and len(texts(sim)) == 1 + (long > 15)


@pytest.mark.parametrize("fault", [None, "late"])
@pytest.mark.parametrize("told", [None, 10004])
def test_a_stream_whose_process_died_when_tencent_had_its_end_is_not_shown_again(
    sim, fault, told
):
    """Also if a chunk before was unconfirmed then. If Tencent says to the end's
    repetition that the stream is closed, it had the end."""
    saved = {}
    dead = make_reply(sim, StreamReply, saved=saved)
    dead.open()
    faults = [fault]
    sim.fault = lambda command, body: faults and faults.pop()
    dead.update("the")
    call = dead.client.call

    def die(command, body, *about, **more):
        answer = call(command, body, *about, **more)
        if body["MsgBody"][0]["MsgContent"]["Chunks"][0]["IsLast"]:
            raise SystemExit
        return answer

    dead.client.call = die
    with pytest.raises(SystemExit):
        dead.close("the answer")
    sim.fault = lambda command, body: told if "stream" in command else None
    make_reply(sim, StreamReply, saved=saved).close("the answer")
    assert texts(sim) == ["the answer"]


def test_a_stream_that_the_store_does_not_know_yet_is_not_added_to(sim):
    """Another process opens it again: its first chunk would be taken for this one."""
    dead, known = make_reply(sim, StreamReply), []
    dead.save = lambda: bool(known)
    dead.open()
    dead.keep_alive()
    dead.update("the")
    assert sim.delivered[0].index == 1
    make_reply(sim, StreamReply).close("the answer")
    assert texts(sim) == ["the answer"]
    late = make_reply(sim, StreamReply)
    late.message = type(late.message)("another", "@RBT#001", "jared", "hi", seq=8)
    late.save = lambda: bool(known)
    late.open()
    known.append("it works again")
    late.update("the")
    assert texts(sim)[-1] == "the"


@each_mode
def test_what_is_about_to_be_opened_is_noted_before(sim, mode):
    """A process that dies just then leaves a message that was perhaps shown."""
    saved, seen = {}, []
    sim.fault = lambda command, body: seen.append(dict(saved))
    make_reply(sim, MODES[mode], saved=saved).open()
    assert seen == [{"sending": -1}] and saved.keys() >= {"key"}


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
    make_reply(sim, StreamReply, saved=saved).close("the answer")
    assert texts(sim)[-1] == "the answer" and sim.delivered[0].closed


def test_a_stream_that_was_opened_twice_swallows_no_answer(sim):
    """Tencent confirms the second opening, but the stream is as old as the first."""
    make_reply(sim, StreamReply).open()  # and the process is killed before it saved it
    sim.delivered[0].time -= 20
    stream, faults = make_reply(sim, StreamReply), ["lost"]
    stream.open()
    sim.fault = lambda command, body: faults and faults.pop()
    stream.close("the answer")
    assert texts(sim)[-1] == "the answer" and sim.delivered[0].closed


def test_a_refusal_of_a_last_chunk_is_never_taken_for_its_success(sim):
    stream = make_reply(sim, StreamReply)
    stream.open()
    stream.update("this")
    faults = ["lost", 80001]
    sim.fault = lambda command, body: faults.pop(0) if faults else word_filter("", body)
    with refused_by_filter():
        stream.close("this is forbidden")
    stream.give_up(SORRY)
    assert SORRY in texts(sim)[-1]


def test_a_last_chunk_that_arrived_unconfirmed_is_not_shown_twice(sim):
    """If Tencent says of its repetition that the stream is closed."""
    saved = {}
    stream = make_reply(sim, StreamReply, saved=saved)
    stream.open()
    stream.update("the")
    faults = ["late", 10004]
    sim.fault = lambda command, body: faults and faults.pop(0)
    stream.close("the answer")
    assert texts(sim) == ["the answer"] and not faults


def test_a_paragraph_does_not_make_a_stream_shorter_than_it_was_shown(sim):
    answer = "two words " * 6000 + "\n\n" + "a long paragraph " * 4000
    stream = make_reply(sim, StreamReply)
    stream.open()
    for end in range(10_000, len(answer), 9_000):
        stream.update(answer[:end])
    stream.close(answer)
    assert "(replaced)" not in texts(sim)[0] and len(texts(sim)[0]) > 90_000
    assert "".join("".join(texts(sim)).split()) == "".join(answer.split())


@pytest.mark.parametrize("rest", [15_000, 60_000])
def test_what_a_stream_cannot_hold_follows_in_messages(sim, rest):
    """A stream of over 100 kB; its text is code, which is closed and opened again."""
    answer = "```\n" + "x = 'plain text'\n" * ((100_000 + rest) // 17) + "```"
    stream = make_reply(sim, StreamReply)
    stream.open()
    for end in range(20_000, len(answer), 7_000):
        stream.update(answer[:end])
        stream.keep_alive()
    stream.close(answer)
    assert sim.delivered[0].closed and measure(texts(sim)[0]) > 90_000
    assert len(texts(sim)) > 2 and "(replaced)" not in texts(sim)[0]
    assert all(measure(text) < 10_000 for text in texts(sim)[1:])
    lines = "".join(texts(sim)).replace("```", "").split("\n")
    assert len([line for line in lines if line]) == answer.count("\n") - 1


@each_mode
def test_an_opening_that_im_took_but_did_not_confirm_is_not_left_open(
    sim, make_app, mode
):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    faults = [60007, 60007, "late"]
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("hello")
    poll(lambda: not faults and sim.delivered and idle(im))
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
    mention = "@jared " if place == "group" else ""
    begun = f"{mention}this is "
    begun += "" if mode == "stream" else "\n\n(replaced)"
    assert texts(sim) == [begun, mention + SORRY]
    assert all(message.closed for message in sim.delivered)


@each_place
@each_mode
def test_another_process_gives_up_what_a_dead_one_began(sim, mode, place):
    saved = {}
    dead = make_reply(sim, MODES[mode], place, saved=saved)
    dead.open()
    dead.update("this is")
    for _ in range(2):
        make_reply(sim, MODES[mode], place, saved=saved).give_up(SORRY)
    assert texts(sim)[-1].endswith(SORRY) and sim.delivered[-1].closed
    assert len(texts(sim)) == (2 if mode == "stream" else 1)


@each_mode
def test_giving_up_before_there_is_a_message_sends_one(sim, mode):
    reply = make_reply(sim, MODES[mode])
    sim.fault = lambda command, body: 10004
    reply.open()
    sim.fault = lambda command, body: None
    reply.give_up(SORRY)
    reply.give_up(SORRY)
    assert texts(sim) == [SORRY]


@each_place
@each_edited
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
    assert all(m.closed for m in sim.delivered)
    assert first in sim.delivered[0].text and texts(sim)[1].endswith(SORRY)


@each_edited
@pytest.mark.parametrize("tries", [1, 2])
def test_a_last_edit_that_im_refuses_leaves_nothing_open(sim, mode, tries):
    saved, busy = {}, [60007] * 3 * (tries - 1)

    def fault(command, body):
        if "modify" in command:
            return 90054 if "answer" in str(body) else None
        return busy.pop() if busy and "answer" in str(body) else None

    reply = make_reply(sim, MODES[mode], saved=saved)
    reply.open()
    sim.fault = fault
    if busy:
        with pytest.raises(IMError):
            reply.close("the answer")
        reply.save()
        sim.fault = lambda command, body: None  # and now it would take that edit
        reply = make_reply(sim, MODES[mode], saved=saved)
    reply.close("the answer")
    assert texts(sim) == ["(replaced)", "the answer"]
    assert all(m.closed for m in sim.delivered)


@pytest.mark.parametrize("refused", ["as it grows", "as it is closed"])
def test_a_stream_that_becomes_plain_text_says_nothing_twice_after_a_crash(
    sim, refused
):
    saved, answer, plain = {}, STORY * 20, []
    reply = make_reply(sim, StreamReply, saved=saved)
    reply.open()
    reply.update(answer[:400])
    left = [10004] if refused == "as it grows" else ["lost", None, 10004]

    def fault(command, body):
        if "stream" in command:
            return left.pop(0) if left else None
        plain.append(body)
        return None if len(plain) == 1 else 80001

    sim.fault = fault
    reply.update(answer[:800])
    with refused_by_filter():
        reply.close(answer)
    sim.fault = lambda command, body: 10004 if "stream" in command else None
    make_reply(sim, StreamReply, saved=saved).close(answer)
    assert "".join("".join(texts(sim)).split()) == "".join(answer.split())


@each_edited
def test_an_edit_can_be_made_again_however_late(sim, mode):
    reply = make_reply(sim, MODES[mode])
    reply.open()
    sim.fault = lambda command, body: "late"
    with pytest.raises(IMError) as caught:
        reply.close("the answer")
    assert caught.value.retry and not caught.value.may_have_arrived
    assert reply.progress.unconfirmed is None


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
    make_reply(sim, StreamReply, saved=saved).close("half and half")
    assert texts(sim) == ["half and half"] and sim.delivered[0].closed


def test_a_text_that_takes_the_place_of_a_streams_is_sent_at_the_second_try(sim):
    stream = make_reply(sim, StreamReply)
    stream.open()
    stream.update("I think")
    sim.fault = lambda command, body: None if "stream" in command else 60007
    with pytest.raises(IMError):
        stream.close("the answer")
    sim.fault = lambda command, body: None
    stream.close("the answer")
    assert texts(sim) == ["I think\n\n(replaced)", "the answer"]


@each_mode
def test_an_opening_that_counts_as_sent_is_not_made_again(sim, mode):
    reply = make_reply(sim, MODES[mode])
    sim.fault = lambda command, body: "late"
    with pytest.raises(IMError):
        reply.open()
    assert reply.progress.unconfirmed
    sim.fault = lambda command, body: None
    reply.assume_sent()
    tries = len(sim.calls)
    reply.open()
    assert len(sim.calls) == tries
