"""How an answer is split into messages and shown, whatever the reply mode."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tim
from conftest import STORY, Caller, idle, poll


@pytest.mark.parametrize("place", ["one-to-one", "group"])
@pytest.mark.parametrize("mode", tim.MODES)
def test_every_mode_ends_closed_and_true_while_im_fails(sim, make_app, mode, place):
    """A twentieth of the REST calls fails, in every way."""
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
    shown = []
    for chat, story in asked.items():
        messages = [m for m in sim.delivered if m.chat == chat]
        assert "".join(m.text for m in messages) == story
        shown.append(len(messages[0].states))
        assert mode != "whole" or shown[-1] == 1
        if place == "group":
            assert messages[0].body["TopicId"] == "t"
            at = {"GroupAtAllFlag": 0, "GroupAt_Account": story[1:].split()[0]}
            assert mode == "stream" or messages[0].body["GroupAtInfo"] == [at]
    assert mode == "whole" or sum(shown) > 2 * 16  # they grew


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
    text = tim.clean("".join(pieces) * times)[:40_000]
    parts = tim.split(text, 2000)
    assert all(tim.measure(part) <= 2000 for part in parts)
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
    parts = tim.split(text)
    assert "".join(parts) == text
    assert max(tim.measure(part) for part in parts) <= tim.PART_BYTES < 11_000
    for before, after in zip(parts, parts[1:], strict=False):
        assert not after.startswith(("\u200d", "\u0301", "\u0302"))
        assert not before.endswith("\u200d")
    assert len(parts) < 1.6 * tim.measure(text) / tim.PART_BYTES


def test_code_and_tables_are_closed_and_opened_again():
    code = "Look:\n```python\n" + "print('hello')\n" * 400 + "```\nDone."
    parts = tim.split(code, 3000)
    assert all(part.count("```") == 2 for part in parts)
    assert all(part.startswith("```python\n") for part in parts[1:])
    table = "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 900
    parts = tim.split(table, 3000)
    assert len(parts) > 2
    assert all(part.startswith("| a | b |\n|---|---|\n| 1 |") for part in parts)
