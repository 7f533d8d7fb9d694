"""When callbacks may have failed: what heartbeats make of the value "servers"."""

from __future__ import annotations

import pytest

from imbot.outages import Heartbeat
from imbot.timing import NORMAL

A, B, NEXT = "server 1", "server 2", "next 3"  # processes, two of them of one server


class Servers:
    """The value in the store, which processes renew one after the other."""

    def __init__(self):
        self.state, self.last = {}, {}

    def beat(self, process, now, newest, **about):
        before = self.last.get(process, (now, newest))
        heartbeat = Heartbeat(process, now, newest, before, **about)
        self.state = heartbeat.renew(self.state, NORMAL, catch_up=3600.0)
        if not (about.get("refused") and about.get("busy")):
            self.last[process] = now, newest
        return self.state

    @property
    def outages(self):
        return self.state["outages"]


@pytest.fixture
def servers():
    """Two processes of a server that are well; the newest message is number 7."""
    found = Servers()
    found.beat(A, 1000.0, 7)
    found.beat(B, 1000.5, 7)
    return found


SHED = {"refused": True, "busy": True}


def test_what_a_process_refused_is_an_outage_from_its_last_heartbeat_on(servers):
    servers.beat(A, 1001.0, 9, refused=True)
    assert servers.outages == [[1, 1000.0, 1001.0, 7, 9]]
    servers.beat(A, 1002.0, 9)
    assert len(servers.outages) == 1 and servers.state["refused"] == {}


def test_what_is_put_off_is_noted_later_from_its_first_refusal_on(servers):
    for second in range(1, 60):
        servers.beat(A, 1000.0 + second, 7 + second, **SHED)
        servers.beat(B, 1000.5 + second, 7 + second)
    assert servers.outages == []
    servers.beat(A, 1060.0, 67, refused=True)
    assert servers.outages == [[1, 1000.0, 1060.0, 7, 67]]


def test_what_a_process_put_off_that_died_is_noted_by_another_one(servers):
    servers.beat(A, 1001.0, 9, **SHED)
    for second in range(1, 6):
        servers.beat(B, 1000.5 + second, 9)
        assert servers.outages == []  # A may be alive
    servers.beat(B, 1006.5, 11)
    assert servers.outages == [[1, 1000.0, 1006.5, 7, 11]]
    assert servers.state["refused"] == {}


def test_a_process_that_has_no_time_itself_leaves_that_to_later(servers):
    servers.beat(A, 1001.0, 9, **SHED)
    for second in range(1, 9):
        servers.beat(B, 1000.5 + second, 9, **SHED)
    assert servers.outages == [] and {*servers.state["refused"]} == {A, B}


@pytest.mark.parametrize("ahead", [0.0, 8.0])
def test_what_a_living_process_puts_off_is_not_noted_by_others(servers, ahead):
    """Though the clock of another server is ahead of its own."""
    for second in range(1, 30):
        servers.beat(A, 1000.0 + second, 9, **SHED)
        servers.beat(NEXT, 1000.5 + second + ahead, 9, busy=True)
    after_its_start = 1007.0 + ahead
    assert not [outage for outage in servers.outages if outage[2] > after_its_start]


def test_what_a_server_missed_that_another_thought_gone_is_an_outage(servers):
    """It was paused, a third server noted its silence, and it slept on."""
    servers.last.pop(B)
    servers.beat("other 9", 1000.5, 7)
    servers.beat(NEXT, 1003.0, 8)
    [_, since, *_] = servers.outages[-1]
    assert since == 1000.5 and "server" not in servers.state["well"]
    servers.beat(A, 1060.0, 20)
    assert servers.outages[-1] == [2, 1000.0, 1060.0, 7, 20]
    servers.beat(A, 1061.0, 21)
    assert len(servers.outages) == 2


def test_what_a_server_put_off_is_in_the_outage_of_its_death(servers):
    servers.beat(A, 1001.0, 9, **SHED)
    servers.beat(B, 1001.5, 9)  # which refused nothing
    servers.beat(NEXT, 1004.0, 9)
    assert servers.outages == [[1, 1000.0, 1004.0, 7, 9]]


def test_what_a_process_refuses_while_it_ends_is_left_to_others(servers):
    servers.beat(A, 1001.0, 9, refused=True, busy=True, draining=True)
    assert servers.outages == [] and servers.state["well"] == {"server": 1000.5}
    servers.beat(B, 1001.5, 9)
    assert servers.outages == [[1, 1000.0, 1001.5, 7, 9]]


def test_an_older_version_knew_less(servers):
    """Its servers are well in the store, and its `good` is not read."""
    servers.state = {"well": {"old": 990.0}, "good": {"old": [990.0, 3]}, "number": 4}
    servers.beat(NEXT, 1000.0, 7)
    assert servers.outages == [[5, 990.0, 1000.0, 7, 7]]
