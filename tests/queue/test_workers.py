"""The pool: claims are kept, lost, given back and taken up as workers.py says."""

from __future__ import annotations

import threading
import time

import pytest
from conftest import poll

from imbot.queue.sqlite import SQLiteStore
from imbot.queue.store import StoreError
from imbot.queue.workers import LeaseLost, Workers


@pytest.fixture
def kept(tmp_path):
    kept = SQLiteStore(f"sqlite:///{tmp_path}/bot.db")
    yield kept
    kept.close()


@pytest.fixture
def start(kept):
    """Return a function that starts a pool which handles messages in a given way."""
    pools = []

    def start(handle, threads=4):
        pools.append(Workers(kept, handle, threads, retention=86400))
        pools[-1].start()
        return pools[-1]

    yield start
    for pool in pools:
        pool.close(drain=5)


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.3)
    monkeypatch.setattr(workers, "PAUSE", 0.2)
    monkeypatch.setattr(workers, "REGAIN", 0.1)


def add(kept, *ids):
    for id in ids:
        kept.add(id, f"chat of {id}", {"id": id})


def test_what_waits_is_handled_by_as_many_threads_as_there_may_be(kept, start):
    add(kept, *"abcdef")
    busy, most, done = [], [], []

    def handle(work):
        busy.append(work)
        most.append(len(busy))
        time.sleep(0.05)
        busy.remove(work)
        kept.finish(work.claim)
        done.append(work.claim.id)

    start(handle, threads=3)
    poll(lambda: sorted(done) == [*"abcdef"])
    assert max(most) == 3
    assert kept.load() == (0, 0, 0)


@pytest.mark.parametrize("error", [ValueError("no"), StoreError("no"), LeaseLost()])
def test_a_message_whose_handler_raises_is_given_back(kept, start, error, caplog):
    add(kept, "a")
    seen = []

    def handle(work):
        seen.append(work.claim.id)
        if len(seen) == 1:
            raise error
        kept.finish(work.claim)

    start(handle)
    poll(lambda: len(seen) == 2 and kept.load() == (0, 0, 0))
    assert ("Traceback" in caplog.text) == isinstance(error, ValueError)


def test_a_message_in_flight_is_not_claimed_again_after_a_pause(
    kept, start, short_lease, monkeypatch
):
    """The maintenance loop stands still for longer than a lease, threads do not."""
    add(kept, "a")
    seen, going = [], threading.Event()

    def handle(work):
        seen.append(work.claim.id)
        going.wait(20)
        assert kept.finish(work.claim)

    pool = start(handle)
    poll(lambda: seen)
    heartbeat, stopped = kept.heartbeat, threading.Event()
    monkeypatch.setattr(kept, "heartbeat", lambda claims: stopped.wait(20))
    time.sleep(0.4)
    pool.wake(4)
    time.sleep(0.2)
    assert seen == ["a"]
    monkeypatch.setattr(kept, "heartbeat", heartbeat)
    stopped.set()
    going.set()
    poll(lambda: kept.load() == (0, 0, 0))
    assert seen == ["a"]


def test_a_claim_that_this_process_took_from_itself_goes_on(
    kept, start, short_lease, monkeypatch
):
    """As when the pause came between the look at the clock and the claim."""
    monkeypatch.setattr(Workers, "_may_claim", lambda self: True)
    monkeypatch.setattr(kept, "heartbeat", lambda claims: ([], []))
    add(kept, "a")
    seen = []

    def handle(work):
        first = work.claim
        seen.append(first.id)
        poll(lambda: work.claim is not first)
        assert kept.finish(work.claim)

    start(handle)
    poll(lambda: seen and kept.load() == (0, 0, 0))
    assert seen == ["a"]


def test_a_step_that_the_store_refused_is_done_when_it_works(kept, start, caplog):
    add(kept, "a")
    broken = [True]

    def finish(claim):
        if broken:
            raise StoreError("away")
        return kept.finish(claim)

    pool = None

    def handle(work):
        poll(lambda: pool)
        pool.when_store_works(finish, work.claim)

    pool = start(handle)
    poll(lambda: "away" in caplog.text)
    broken.clear()
    poll(lambda: kept.load() == (0, 0, 0))


def test_a_drain_waits_for_work_and_gives_the_rest_back(kept, start):
    add(kept, "short", "long")
    ended, cancelled = threading.Event(), threading.Event()

    def handle(work):
        work.cancel = cancelled.set
        if work.claim.id == "short":
            time.sleep(0.2)
            kept.finish(work.claim)
            return
        cancelled.wait(20)
        assert work.lost
        ended.set()

    pool = start(handle)
    poll(lambda: len(pool._in_flight) == 2)
    pool.close(drain=0.5)
    assert ended.wait(5)
    assert kept.claim().id == "long"


def test_a_cancel_of_another_process_reaches_the_work(kept, start):
    add(kept, "a")
    cancelled = threading.Event()

    def handle(work):
        work.cancel = cancelled.set
        cancelled.wait(20)
        kept.finish(work.claim)

    pool = start(handle)
    poll(lambda: pool._in_flight)
    kept.cancel("chat of a")
    assert cancelled.wait(5)


def test_work_that_was_lost_is_left_alone(kept, start, monkeypatch):
    """Else it would keep a stream alive that another process writes to."""
    add(kept, "a")
    ticks, going = [], threading.Event()

    def handle(work):
        work.tick = lambda: ticks.append(work.lost)
        going.wait(20)
        raise LeaseLost

    pool = start(handle)
    poll(lambda: ticks)
    monkeypatch.setattr(kept, "heartbeat", lambda claims: (list(claims), []))
    poll(lambda: pool._flying()[0].lost)
    before = len(ticks)
    time.sleep(1.2)
    going.set()
    assert len(ticks) <= before + 1 and not any(ticks)
