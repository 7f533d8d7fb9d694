"""The plain reply and the card, how an answer is split, what every mode promises."""

from __future__ import annotations

import json
import random
import time
from contextlib import contextmanager
from functools import partial

import pytest
from conftest import APPID, FAST, STORY, Caller, idle, poll
from hypothesis import given, settings
from hypothesis import strategies as st

from botserver import REPLIES
from imbot import replies
from imbot.replies import CardReply, PlainReply, Progress
from imbot.settings import Settings
from imbot.tencent import callback, rest
from simulator import KEY
from simulator.tencent import C2C_WINDOW, GROUP_WINDOW
from usersig import gen_user_sig

PLACES = {"one-to-one": {}, "group": {"group": "@TGS#demo", "topic": "t"}}
TEXTS = {"replaced": "(replaced)", "stopped": "(stopped)", "length": "(length)"}
SORRY = "I cannot say this."
PICTURE = {"MsgType": "TIMImageElem", "MsgContent": {"UUID": "u", "ImageFormat": 1}}


def make_reply(sim, kind, place="one-to-one", saved=None, **more):
    """Return a reply; what it saves goes into `saved`, as for after a crash."""
    client = rest.Client(
        sim.url, APPID, "administrator", partial(gen_user_sig, APPID, KEY), timing=FAST
    )
    message = callback.Message("id", "@RBT#001", "jared", "hi", seq=7, **PLACES[place])
    saved = {} if saved is None else saved
    progress = Progress.load(json.loads(json.dumps(saved)))

    def save():
        saved.clear()
        saved.update(progress.data())
        return True

    return kind(client, message, TEXTS, progress, save, **more)


def word_filter(command, body):
    """Refuse a message with a certain word, for good."""
    return 80001 if "forbidden" in str(body) else None


@contextmanager
def refused_by_filter():
    """Expect that an answer is refused for good."""
    with pytest.raises(rest.IMError, match="80001.*word filter") as caught:
        yield
    assert not caught.value.retry


def tell_sixteen(sim, make_app, mode, place):
    """Let a twentieth of the REST calls fail, in every way; return the answers."""
    client = make_app(reply_mode=mode, rate_limit=0, max_waiting=99).test_client()
    im, chance = Caller(sim, client), random.Random(f"{mode} {place}")
    faults = ["lost", "late", 60007, 91000, 20028, 10002]
    sim.fault = lambda command, body: (
        chance.choice(faults) if chance.random() < 0.05 else None
    )
    sim.ai_answer, sim.ai_pace = (lambda messages: STORY), 0.004
    asked = {}
    for number in range(16):
        user, group = f"user{number}", f"@TGS#{number}"
        if place == "group":
            sim.groups[group] = {user}
            im.post(sim.say_in_group(user, group, "tell", ["@RBT#001"], TopicId="t"))
            asked[group] = f"@{user} {STORY}"
        else:
            sim.users.add(user)
            im.say("tell", user=user)
            asked[user] = STORY
    poll(lambda: len({m.chat for m in sim.delivered}) == 16 and idle(im), 60)
    assert all(message.closed and not message.failed for message in sim.delivered)
    answers = [[m for m in sim.delivered if m.chat == chat] for chat in asked]
    for messages, story in zip(answers, asked.values(), strict=True):
        assert "".join(m.text for m in messages) == story
        if place == "group":
            assert messages[0].body["TopicId"] == "t"
            at = {"GroupAtAllFlag": 0, "GroupAt_Account": story[1:].split()[0]}
            assert mode == "stream" or messages[0].body["GroupAtInfo"] == [at]
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "place"),
    [("whole", "one-to-one"), ("card", "one-to-one"), ("card", "group")],
)
def test_an_answer_is_whole_and_true_while_im_fails(sim, make_app, mode, place):
    answers = tell_sixteen(sim, make_app, mode, place)
    assert all(len(messages[0].states) == 1 for messages in answers)
    if mode == "card":
        kind = "TIMTextElem" if place == "group" else "TIMCustomElem"
        assert {m["MsgType"] for [a] in answers for m in a.elements} == {kind}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [PlainReply, CardReply])
def test_an_answer_that_im_refuses_is_replaced_by_a_sentence(sim, kind, place):
    saved = {}
    sim.fault = word_filter
    for _ in range(2):  # the second is another process, after a crash
        reply = make_reply(sim, kind, place, saved)
        with refused_by_filter():
            reply.close("first\n\n" + "a" * 8500 + "\n\nforbidden " + "b" * 8500)
        reply.give_up(SORRY)
    assert len(sim.delivered) == 2  # the first part, and the sentence, each once
    mention = "@jared " if place == "group" else ""
    assert sim.delivered[0].text.startswith(f"{mention}first")
    assert sim.delivered[1].text == mention + SORRY
    assert sim.delivered[0].number < sim.delivered[1].number  # so clients sort them
    [before, sentence] = [message.body for message in sim.delivered]
    number = "Random" if place == "group" else "MsgRandom"
    assert before[number] != sentence[number]
    if place == "group":
        assert sentence["GroupAtInfo"] and sentence["TopicId"] == "t"


def test_every_part_of_an_answer_has_numbers_of_its_own():
    message = callback.Message("id", "@RBT#001", "jared", "hi", seq=2**32 - 3)
    most = Settings.__dataclass_fields__["max_parts"].metadata["high"]
    numbers = [rest.numbers(message, p) for p in range(rest.SORRY - most, most + 1)]
    assert len({chance for _, chance in numbers}) == len(numbers)
    assert all(0 <= seq < 2**32 for seq, _ in numbers)


@pytest.mark.parametrize("mode", REPLIES)
def test_no_quick_answer_sorts_above_its_question(sim, make_app, mode):
    """Clients sort the messages of a second by their MsgSeq."""
    users = [f"user{number}" for number in range(60)]
    sim.users |= {*users}
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    chance, asked, now = random.Random(1), {}, int(time.time())
    for user in users:
        seq = chance.choice([1, 350821200, 2**31 - 2, 2**32 - 9])
        im.say("hi", user=user, MsgSeq=seq, MsgTime=now)
        asked[user] = (now, seq)
    sim.wait(60, closed=True)
    # Whichever second it is in: those of the question's are sorted by these numbers.
    assert all((now, m.number) > asked[m.chat] for m in sim.delivered)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", REPLIES)
def test_an_element_is_an_answer(sim, mode, place):
    saved, faults = {}, ["lost", 60007, 60007, 60007]
    sim.fault = lambda command, body: faults and faults.pop()
    with pytest.raises(rest.IMError):
        make_reply(sim, REPLIES[mode], place, saved).close_with(PICTURE)
    for _ in range(2):  # again, as after a crash
        make_reply(sim, REPLIES[mode], place, saved).close_with(PICTURE)
    assert sim.delivered[0].elements == [PICTURE]
    unlocks = mode in ("card", "custom") and place == "one-to-one"
    assert len(sim.delivered) == 1 + unlocks
    assert [m.closed for m in sim.delivered] == [True] * len(sim.delivered)


@pytest.mark.parametrize("mode", REPLIES)
def test_an_answer_has_a_cap_on_its_parts(sim, mode):
    reply = make_reply(sim, REPLIES[mode], max_parts=3)
    reply.close(("a" * 5000 + "\n\n") * 60)
    texts = [message.text for message in sim.delivered]
    assert len(texts) == 3 and texts[-1] == "(length)"
    assert all("aaa" in text for text in texts[:-1])


@pytest.mark.parametrize("mode", REPLIES)
def test_a_stop_ends_the_sending_of_parts(sim, mode):
    stops = []
    reply = make_reply(sim, REPLIES[mode], is_stopped=lambda: bool(stops))
    sim.fault = lambda command, body: (
        stops.append(1) if len(sim.delivered) == 2 else None
    )
    reply.close(("a" * 5000 + "\n\n") * 60)
    texts = [message.text for message in sim.delivered]
    assert len(texts) == 4 and texts[-1] == "(stopped)"


def test_what_may_have_arrived_is_not_sent_again_beyond_tencents_window(sim):
    """The machine stood still in the middle of a call: its next try would be shown."""
    for place in PLACES:
        reply, tries = make_reply(sim, PlainReply, place), []
        window = reply.known_until() - time.time()
        assert window == pytest.approx(FAST.duplicate_window, abs=0.1)

        def fault(command, body, tries=tries):
            tries.append(body)
            return "late"

        sim.fault = fault
        reply.progress.unconfirmed = time.time() - window + 0.01
        with pytest.raises(rest.IMError) as caught:
            reply.close("the answer")
        assert caught.value.may_have_arrived and len(tries) == 1


def test_the_last_try_of_an_unsure_call_is_within_tencents_window():
    timing = rest.NORMAL
    longest = 2 * timing.call_timeout
    assert timing.duplicate_window + longest <= C2C_WINDOW
    assert timing.duplicate_window_group + longest <= GROUP_WINDOW


def test_a_progress_survives_the_store():
    progress = Progress(key=5, sending=0, pending="", index=3, sent=1)
    stored = json.loads(json.dumps(progress.data()))
    assert Progress.load(stored) == progress
    assert Progress.load(stored | {"of a newer version": 1}) == progress


PIECES = st.one_of(
    st.sampled_from(["\n", "\n\n", "。", "，", ". ", " ", '"', "\\", "\t", "\r\n"]),
    st.sampled_from(["👨‍👩‍👧‍👦", "👍🏽", "🇨🇳", "e\u0301", "1️⃣", "각", "好" * 50]),
    st.text(max_size=30),
    st.sampled_from(
        ["\n```python\nx = 1\n", "\n```\n", "\n| a | b |\n|---|---|\n| 1 | 2 |\n"]
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=60), st.integers(1, 400))
def test_parts_are_under_the_limit_and_together_the_text(pieces, times):
    text = callback.clean("".join(pieces) * times)[:40_000]
    parts = replies.split(text, 2000)
    assert all(replies.measure(part) <= 2000 for part in parts)
    assert all(part for part in parts) or not text
    assert unfenced("".join(parts), text)


def unfenced(joined, text):
    """Say whether `joined` is `text` with nothing but fences and table heads added."""
    place = 0
    for character in text:
        place = joined.find(character, place) + 1
        if not place:
            return False
    return True


def test_a_million_characters_are_split_and_whole():
    chance = random.Random(4)
    words = [
        "你好，世界。",
        "plain words ",
        "👨‍👩‍👧‍👦",
        "🇨🇳🇩🇪",
        '"quoted" \\ ',
        "e\u0301\u0302",
        "\n",
        "\n\n",
    ]
    text = "".join(chance.choices(words, k=250_000))[:1_000_000]
    parts = replies.split(text)
    assert "".join(parts) == text
    assert max(replies.measure(part) for part in parts) <= replies.PART_BYTES < 11_000
    for before, after in zip(parts, parts[1:], strict=False):
        assert not after.startswith(("\u200d", "\u0301", "\u0302"))
        assert not before.endswith("\u200d")
    assert len(parts) < 1.6 * replies.measure(text) / replies.PART_BYTES


def test_code_and_tables_are_closed_and_opened_again():
    code = "Look:\n```python\n" + "print('hello')\n" * 400 + "```\nDone."
    parts = replies.split(code, 3000)
    assert all(part.count("```") == 2 for part in parts)
    assert all(part.startswith("```python\n") for part in parts[1:])
    table = "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 900
    parts = replies.split(table, 3000)
    assert len(parts) > 2
    assert all(part.startswith("| a | b |\n|---|---|\n| 1 |") for part in parts)
