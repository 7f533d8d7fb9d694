"""The judge of the campaign looks at a chat as its user does."""

from __future__ import annotations

import json

import pytest

from benchmark.judge import judge_all
from benchmark.users import Chat
from simulator import Delivered, text_body


def said(number, turn=1, who=""):
    """Return what the AI of the campaign answers to a question."""
    return f"You said: {who}question [{number}] (question {turn} of our chat)"


CUT = "\n\n(The answer was cut: The AI service is busy. Please try again in a moment.)"
BUSY = "The AI service is busy. Please try again in a moment."
AGAIN = "\n\n(The answer was cut. Here it is again.)"


def judged(*shown, chat=None, group="", outages=None):
    """Return what the judge finds if these texts are shown, a "~" begins a stream."""
    chat = chat or Chat("jared", "@RBT#x", group, 2, {1: 0.0, 2: 0.0})
    stream, delivered = [{"MsgType": "TIMStreamElem"}], []
    for number, text in enumerate(shown):
        body = {"MsgBody": stream if text[:1] == "~" else text_body(text)}
        message = Delivered("@RBT#x", group or "jared", number, body)
        message.show(text.removeprefix("~"), closed=True)
        message.said = 0.0  # at once
        delivered.append(message)
    found = judge_all([chat], delivered, outages)
    unasked = ("slowest", "begun again")
    return {name: n for name, n in found.items() if n and name not in unasked}


GOOD = {"answered": 2}


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ([said(1), said(2, 2)], GOOD),
        ([BUSY, said(2, 2)], GOOD),
        ([said(1)[:15] + CUT, said(2)], GOOD),
        # A stream that Tencent closed, and its rest in a message of its own:
        (["~" + said(1)[:9], said(1)[9:], said(2, 2)], GOOD),
        (["~" + said(1)[:20], said(1)[20:], said(2, 2)], GOOD),
        (["~" + said(1)[:20], said(1)[20:30], said(1)[30:], said(2, 2)], GOOD),
        (["~" + said(1)[:30], CUT.strip(), said(2)], GOOD),
        (["~" + said(1)[:30], said(1)[30:40] + CUT, said(2)], GOOD),
        # An answer that a dead process began, from its start by another:
        (["~" + said(1)[:30] + AGAIN, said(1), said(2, 2)], GOOD),
        (["~" + said(1)[:30], said(1), said(2, 2)], GOOD),
        (["~" + said(1)[:30], said(1)[:20] + CUT, said(2, 2)], GOOD),
        # What a user would see twice:
        ([said(1), said(1), said(2, 2)], GOOD | {"twice": 1}),
        (["~" + said(1), said(1), said(2, 2)], GOOD | {"twice": 1}),
        ([said(1)[:30] + CUT, said(1), said(2)], GOOD | {"twice": 1}),
        ([said(1), BUSY, said(2)], GOOD | {"twice": 1}),
        (
            ["~" + said(1)[:30], said(1)[24:], said(2, 2)],
            GOOD | {"mangled": 2},
        ),
        (
            ["~" + said(1)[:30], said(1)[30:], said(1)[30:], said(2, 2)],
            GOOD | {"mangled": 1},
        ),
        ([said(1)[:30], said(1), said(2, 2)], GOOD | {"mangled": 1, "twice": 1}),
        # What is missing, or in another order:
        ([said(2)], {"answered": 1, "lost": 1}),
        ([said(1), said(2)[:30]], GOOD | {"mangled": 1}),
        (["~" + said(1)[:30], said(1)[34:], said(2)], GOOD | {"mangled": 2}),
        ([said(2), said(1)], GOOD | {"misordered": 1}),
        ([], {"lost": 2}),
    ],
)
def test_the_judge_looks_at_what_a_user_sees(shown, found):
    assert judged(*shown) == found


def test_the_judge_knows_answers_in_groups():
    mention, first, second = "@jared ", said(1, 1, "jared: "), said(2, 2, "jared: ")
    shown = ["~" + mention + first[:12], first[12:], mention + second]
    assert judged(*shown, group="@TGS#demo") == GOOD
    assert judged(mention + BUSY, mention + second, group="@TGS#demo") == GOOD
    found = judged(first, mention + second, group="@TGS#demo")  # nobody is mentioned
    assert found == GOOD | {"mangled": 1}


@pytest.mark.parametrize(
    ("outages", "shown", "found"),
    [
        (None, [said(1)], {"answered": 1}),  # it cannot look anything up
        ([], [said(1)], {"answered": 1, "lost": 1}),  # what it refused
        ([(40, 60)], [said(1)], {"answered": 1, "lost": 2}),
        ([(10, 20), (40, 60)], [said(1), said(3)], GOOD | {"caught up": 1, "lost": 1}),
        ([(40, 60)], [said(1), BUSY, said(3)], {"answered": 3, "caught up": 1}),
        (
            [],
            [said(1), said(3), said(2)],
            {"answered": 3, "misordered": 1, "caught up": 2},
        ),
        ([], [said(1), said(2), said(3)], {"answered": 3, "caught up": 2}),
    ],
)
def test_the_judge_knows_what_has_to_be_looked_up(outages, shown, found):
    chat = Chat("jared", "@RBT#x", "", 3, {1: 40.0}, {2: 50.0, 3: 70.0}, {3})
    assert judged(*shown, chat=chat, outages=outages) == found


def test_the_judge_sorts_as_a_client_does():
    """Two answers of one second stand in the order of their MsgSeq."""
    chat = Chat("jared", "@RBT#x", "", 2, {1: 0.0, 2: 0.0})
    first = Delivered("@RBT#x", "jared", 7, {"MsgBody": text_body("")}, born=10.2)
    second = Delivered("@RBT#x", "jared", 5, {"MsgBody": text_body("")}, born=10.7)
    first.show(said(1), closed=True), second.show(said(2), closed=True)
    assert judge_all([chat], [first, second])["misordered"] == 1
    second.born = 11.0
    assert judge_all([chat], [first, second])["misordered"] == 0


def card(text, **fields):
    data = {"chatbotPlugin": 2, "src": 2, "chunks": [text], "isFinished": 1, **fields}
    content = {"Data": json.dumps(data), "Desc": "…"}
    return [{"MsgType": "TIMCustomElem", "MsgContent": content}]


@pytest.mark.parametrize(
    ("robot", "shown", "locked"),
    [
        ("@RBT#card", [card(said(1)), card(said(2, 2))], 0),
        ("@RBT#card", [text_body(said(1)), card(said(2, 2))], 1),
        ("@RBT#custom", [text_body(BUSY), text_body(said(2))], 2),
        ("@RBT#custom", [card(said(1), isFinished=0), card(said(2))], 1),
        ("@RBT#custom", [card(said(1)[:30]), text_body(said(1)[30:])], 0),
        ("@RBT#whole", [text_body(said(1)), text_body(said(2, 2))], 0),
    ],
)
def test_the_judge_knows_whose_phone_stays_locked(robot, shown, locked):
    chat, delivered = Chat("jared", robot, "", 2, {1: 0.0, 2: 0.0}), []
    for number, elements in enumerate(shown):
        message = Delivered(robot, "jared", number, {"MsgBody": elements}, key=number)
        message.draw(elements, is_growing=False)
        delivered.append(message)
    assert judge_all([chat], delivered)["locked"] == locked
    chat.group = "@TGS#demo"  # there nothing locks
    assert judge_all([chat], delivered)["locked"] == 0


@pytest.mark.parametrize(
    ("born", "number", "above"),
    [(9.9, 99, 1), (10.1, 3, 1), (10.1, 7, 1), (10.9, 8, 0), (11.0, 1, 0)],
)
def test_the_judge_knows_what_clients_show_above_its_question(born, number, above):
    chat = Chat("jared", "@RBT#x", "", 1, {1: 10.0}, places={1: (10, 7)})
    body = {"MsgBody": text_body("")}
    message = Delivered("@RBT#x", "jared", number, body, born=born)
    message.show(said(1), closed=True)
    assert judge_all([chat], [message])["above its question"] == above


def test_the_judge_knows_who_was_told_nothing_for_five_minutes():
    chat = Chat("jared", "@RBT#x", "", 1, {1: 1000.0})
    message = Delivered("@RBT#x", "jared", 1, {"MsgBody": text_body("")})
    message.show(said(1), closed=True)
    for at, count in ((1299.0, 0), (1301.0, 1)):
        message.said = at
        assert judge_all([chat], [message])["told nothing"] == count
