"""Outages of running servers: what was written meanwhile is answered, and soon."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import pytest
import requests
from conftest import Caller, poll, said_to

from imbot.timing import NORMAL
from simulator import BotProcess
from simulator.history import LOOKUPS

pytestmark = pytest.mark.slow

ROBOT = "@RBT#001"
USERS = [f"user{number}" for number in range(60)]
MESSAGES, A_SECOND = 600, 50


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "postgres":
        return request.getfixturevalue("postgres_server").url
    return f"sqlite:///{tmp_path}/bot.db"


@pytest.fixture
def start_bots(sim, tmp_path, url):
    """Return a function that starts servers which share a store."""
    started = []
    sim.users |= {*USERS}
    sim.ai_delay = 0.05

    def start(count, **settings):
        settings = {"RATE_LIMIT": 0, "MAX_WAITING": MESSAGES} | settings
        for number in range(count):
            folder = tmp_path / str(number)
            folder.mkdir()
            bot = BotProcess(sim, str(folder), DATABASE_URL=url, **settings)
            started.append(bot.start())
        return started

    yield start
    for bot in started:
        if bot.alive():
            bot.stop(signal.SIGKILL)


def say_all(sim, bots, act):
    """Let users write, each to its server by turns, and after 3 s do something.

    Returns how many callbacks failed.
    """
    failed, began, sim.bot_url = [], time.monotonic(), ""

    def write(numbers):
        for number in numbers:
            time.sleep(max(0.0, began + number / A_SECOND - time.monotonic()))
            user = number % len(USERS)
            event = sim.say(USERS[user], ROBOT, str(number))
            about = {"params": sim.signed(event), "json": event, "timeout": 5}
            try:
                url = bots[user % len(bots)].url
                requests.post(f"{url}/im", **about).raise_for_status()
            except requests.RequestException:
                failed.append(number)

    shares = [range(first, MESSAGES, 20) for first in range(20)]
    threads = [threading.Thread(target=write, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    time.sleep(3)
    act()
    for thread in threads:
        thread.join()
    return len(failed)


def interrupt(bot, how, seconds=5.2):
    bot.stop(how)
    time.sleep(seconds)
    bot.start()
    bot.simulator.bot_url = ""


OUTAGES = {  # servers, processes of each, how one is stopped
    "stopped": (1, 1, signal.SIGTERM),
    "two processes killed": (1, 2, signal.SIGKILL),
    "one of two servers killed": (2, 1, signal.SIGKILL),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_of_600_messages_none_is_missed_while_a_server_is_away(sim, start_bots, outage):
    servers, processes, how = OUTAGES[outage]
    bots, calls = start_bots(servers, WEB_CONCURRENCY=processes), []
    sim.fault = lambda command, _: calls.append((command, time.monotonic()))
    failed = say_all(sim, bots, lambda: interrupt(bots[0], how))
    assert failed > 100
    with suppress(TimeoutError):  # it would name all
        sim.wait(MESSAGES, timeout=20)
    poll(lambda: requests.get(f"{bots[0].url}/healthz").json()["waiting"] == 0)
    for number, user in enumerate(USERS):
        numbers = range(number, MESSAGES, len(USERS))
        assert said_to(sim, user) == [str(n) for n in numbers]
    assert len(sim.delivered) == MESSAGES
    assert how == signal.SIGKILL or len(sim.ai_requests) == MESSAGES
    assert set(sim.looked_up.values()) == {1} and sum(sim.lookups.values()) < 400
    looked = [at for command, at in calls if command in LOOKUPS]
    a_second = len(looked) / (max(looked) - min(looked))
    assert a_second <= 1.5 / NORMAL.look_up_every * servers * processes
    for bot in bots:
        log = bot.log.read_text()
        assert "Traceback" not in log and "WARNING" not in log


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_if_tencent_refuses_the_rest_is_answered_all_the_same(sim, start_bots):
    bots = start_bots(1)
    sim.refused = {*LOOKUPS}
    failed = say_all(sim, bots, lambda: interrupt(bots[0], signal.SIGKILL))
    sim.wait(MESSAGES - failed)
    poll(lambda: requests.get(f"{bots[0].url}/healthz").json()["waiting"] == 0)
    assert len(sim.delivered) == MESSAGES - failed
    for user in USERS:
        numbers = [int(number) for number in said_to(sim, user)]
        assert numbers == sorted({*numbers})
    log = bots[0].log.read_text()
    refusals = [line for line in log.splitlines() if "cannot be looked up" in line]
    assert len(refusals) == 1 and "10004" in refusals[0]
    assert requests.get(f"{bots[0].url}/healthz").json()["failed"] == 0


@pytest.mark.parametrize("fault", ["hang", 91000])
def test_300_users_do_not_wait_for_a_history_that_fails(sim, make_app, fault):
    """With the waits of production: the first answer within 15 s, the last in 60."""
    users = [f"user{number}" for number in range(300)]
    sim.users |= {*users}
    app = make_app(NORMAL)
    Caller(sim, app.test_client()).say("before")
    sim.wait(1)
    app.extensions["bot"].close(drain=5)
    well = {"a server": time.time() - 60}
    app.extensions["bot"].store.put("servers", {"well": well})
    sim.history_fault = fault
    im = Caller(sim, make_app(NORMAL).test_client())
    began = time.time()
    for user in users:
        assert im.say("after", user=user).status_code == 200
    sim.wait(301, timeout=60)
    sim.history_fault = ""
    waited = sorted(m.born - began for m in sim.delivered if m.chat != "jared")
    print(f"{fault}: first answer {waited[0]:.1f} s, last {waited[-1]:.1f} s")
    assert waited[0] < 15 and waited[-1] < 60
