"""The plain reply, how an answer is split, and what every way to show one promises."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
from conftest import APPID, STORY, Caller, idle, poll
from hypothesis import given, settings
from hypothesis import strategies as st

from imbot import replies
from imbot.ai import stream
from imbot.replies import PlainReply
from imbot.tencent import callback, rest
from simulator import KEY

PLACES = {"one-to-one": {}, "group": {"group": "@TGS#demo", "topic": "t"}}
SORRY = "I cannot say this."


def make_reply(sim, kind, place="one-to-one", progress=None, saved=None):
    """Return a reply; what it saves goes into `saved`, as after a crash."""
    client = rest.Client(sim.url, APPID, KEY, "administrator")
    message = callback.Message("id", "@RBT#001", "jared", "hi", **PLACES[place])
    saved = {} if saved is None else saved
    progress = dict(progress or {})
    return kind(client, message, 7, progress, saved.update, "(replaced)")


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
    client = make_app(reply_mode=mode, rate_limit=0).test_client()
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


@pytest.mark.parametrize("place", PLACES)
def test_a_plain_reply_is_whole_and_true_while_im_fails(sim, make_app, place):
    answers = tell_sixteen(sim, make_app, "whole", place)
    assert all(len(messages[0].states) == 1 for messages in answers)


@pytest.mark.parametrize("place", PLACES)
def test_an_answer_that_im_refuses_is_replaced_by_a_sentence(sim, place):
    saved = {}
    sim.fault = word_filter
    for _ in range(2):  # the second is another process, after a crash
        reply = make_reply(sim, PlainReply, place, progress=saved, saved=saved)
        with refused_by_filter():
            reply.close("first\n\n" + "a" * 8500 + "\n\nforbidden " + "b" * 8500)
        reply.give_up(SORRY)
    assert len(sim.delivered) == 2  # the first part, and the sentence, each once
    mention = "@jared " if place == "group" else ""
    assert sim.delivered[0].text.startswith(f"{mention}first")
    assert sim.delivered[1].text == mention + SORRY
    [before, sentence] = [message.body for message in sim.delivered]
    number = "Random" if place == "group" else "MsgRandom"
    assert before[number] != sentence[number]
    if place == "group":
        assert sentence["GroupAtInfo"] and sentence["TopicId"] == "t"


def test_the_sentence_of_a_refusal_has_numbers_that_no_part_has():
    parts = stream.LONGEST_ANSWER // replies.PART_BYTES
    assert parts < replies.LAST_PART < rest.PARTS


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
