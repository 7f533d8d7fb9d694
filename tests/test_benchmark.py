"""The campaign and the soak: what a seed decides, and what a report says."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest

from benchmark import soak
from benchmark.accidents import AFTER, KINDS, BrokenServices, plan
from benchmark.faults import MUST_BE_ZERO, Outcome
from benchmark.judge import judge_all
from benchmark.seen import what_was_seen
from benchmark.stage import MODES
from benchmark.users import SENDERS, Chat, Users
from botserver import REPLIES
from simulator import Delivered, text_body

ASKED = {"messages": [{"role": "user", "content": "question [1]"}]}


def planned(seed, count=40):
    return [*islice(plan(seed, [*KINDS]), count)]


def test_a_seed_brings_the_same_accidents_and_another_seed_others():
    assert planned(7) == planned(7) != planned(8)
    kinds = [accident.kind for accident in planned(7)]
    for turn in range(0, 40, len(KINDS)):  # each kind once before one comes again
        assert {*kinds[turn : turn + len(KINDS)]} == {*KINDS}
    assert all(AFTER[0] <= accident.after <= AFTER[1] for accident in planned(7))


def test_the_size_of_an_accident_chooses_from_all_there_is():
    choices = {accident.one_of("abc") for accident in planned(7)}
    assert choices == {*"abc"}
    assert all(2 <= accident.between(2, 5) <= 5 for accident in planned(7))


def faults(seed, name, *call):
    """Return what becomes of 300 calls."""
    with BrokenServices(seed) as services:
        fault = getattr(services, name)
        return [(fault(*call), services.break_after) for _ in range(300)]


@pytest.mark.parametrize(
    ("name", "call"),
    [("ai_fault", (ASKED,)), ("fault", ("openim/sendmsg", {"To_Account": "x"}))],
)
def test_a_seed_breaks_the_same_calls(name, call):
    found = faults(7, name, *call)
    assert found == faults(7, name, *call) != faults(8, name, *call)
    assert 5 < len([fault for fault in found if fault != (None, 0)]) < 60


def asked_by(seed, count=50):
    """Return the order in which one sender's users ask, if all are answered."""
    order = []
    with BrokenServices(seed) as services:
        users = Users(services, seed)
        mine = {(chat.user, chat.group, chat.robot) for chat in users.chats[3::SENDERS]}

        def note(event, what="asked"):
            robot = event.get("To_Account") or event["AtRobots_Account"][0]
            place = event["From_Account"], event.get("GroupId", ""), robot
            if place in mine:
                order.append((what, *place))
            if len(order) >= count:
                users.closing.set()
            return True

        services.deliver, services.callback = note, partial(note, what="again")
        services.delivered = range(10**6)  # nobody holds back
        with users:
            assert users.closing.wait(20)
    return order[:count]


def test_a_seed_decides_who_asks_and_what_is_delivered_once_more():
    assert asked_by(7) == asked_by(7) != asked_by(8)
    assert 0 < len([what for what, *_ in asked_by(7) if what == "again"]) < 20


def test_every_mode_of_answers_is_tried():
    assert {*MODES.values()} == {*REPLIES}


def test_a_report_shows_what_a_user_saw_around_the_first_fault_of_each_kind():
    asked = {number: number * 10.0 for number in range(1, 9)}
    chat = Chat("jared", "@RBT#x", "", 8, asked)
    chat.lost[5], chat.refused = chat.acknowledged.pop(5), {5}
    delivered = []
    for number in (1, 2, 3, 6, 6, 7, 8):  # 4 and 5 are missing, 6 comes twice
        body = {"MsgBody": text_body("")}
        message = Delivered("@RBT#x", "jared", number, body, born=number * 10 + 1.0)
        message.show(f"You said: question [{number}] (question 1 of our chat)", True)
        delivered.append(message)
    found = judge_all([chat], delivered)
    accidents = [(34.0, "no store"), (75.0, "SIGHUP")]
    lines = what_was_seen(found, MUST_BE_ZERO, delivered, accidents)
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles[:2] == [
        "The first lost: jared @RBT#x, question [4]",
        "The first twice: jared @RBT#x, question [6]",
    ]
    shown = [line[16:] for line in lines[1 : lines.index(titles[1])]]
    assert shown[1:5] == [
        "> question [3]",
        "< You said: question [3] (question 1 of our chat) (TIMTextElem, MsgSeq 3)",
        "-- no store",
        "> question [4]",
    ]
    assert "> question [5] (its callback was refused by the bot)" in shown
    assert not any("SIGHUP" in line for line in shown)


def test_one_row_that_is_not_0_makes_a_campaign_fail():
    good = dict.fromkeys(MUST_BE_ZERO, 0)
    assert Outcome(good, []).is_good
    for row in MUST_BE_ZERO:
        assert not Outcome(good | {row: 1}, []).is_good


def test_a_soak_compares_the_end_with_the_beginning():
    values = [100, 101, 300, 100, 107, 101, 108, 109]  # one peak means nothing
    samples = [
        {soak.MAY_GROW: n, "memory": one, "files": 7} for n, one in enumerate(values)
    ]
    grown = soak.growth(samples)
    assert grown["files"] == 1.0 and soak.MAY_GROW not in grown
    assert grown["memory"] == pytest.approx(108.5 / 100.5)
