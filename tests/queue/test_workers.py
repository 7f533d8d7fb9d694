"""The pool: claims are kept, lost, released and taken up as workers.py says."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from conftest import in_threads, poll
from stores import fast, opened, put, query

from imbot.queue import LeaseLost, StoreBusy, StoreError, Workers

QUICK = {"poll": 0.01, "heartbeat": 0.02, "regain": 0.05, "again": 0.01}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/bot.db"


@pytest.fixture
def store(url):
    store = opened(url)
    yield store
    store.close()


@pytest.fixture
def start(store):
    """Return a function that starts a pool which handles messages in a given way."""
    pools = []

    def start(handle, threads=4, store=store, share=None, lane_of=None, **waits):
        timing = fast(**{**QUICK, **waits})
        pools.append(Workers(store, handle, threads, retention=86400, timing=timing))
        pools[-1].share = share or threads
        pools[-1].lane_of = lane_of or pools[-1].lane_of
        pools[-1].start()
        return pools[-1]

    yield start
    for pool in pools:
        pool.close(drain=5)


class Broken:
    """A store some of whose operations a test replaces."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)


def refuse(*_):
    raise StoreError("away")


def add(store, *ids):
    for id in ids:
        put(store, id, to=f"chat of {id}")


def idle(store):
    return store.load() == (0, 0, 0)


def test_a_lane_leaves_threads_to_others(store, start):
    """Two lanes are slow and full; what has none is handled, and they go on later."""
    goes_on, done = threading.Event(), []
    begun = Counter()

    def handle(job):
        begun[job.lane] += 1
        assert not job.lane or goes_on.wait(9)
        store.finish(job.claim)
        done.append(job.claim.id)

    def claim(*asked):
        claims.append(asked)
        return store.claim(*asked)

    counting, claims = Broken(store), []
    counting.claim = claim
    lanes = {"threads": 5, "share": 2, "lane_of": lambda claim: claim.id[0].strip()}
    pool = start(handle, store=counting, **lanes)
    for number in range(4):
        for lane in "ab":
            pool.add(f"{lane}{number}", f"{lane}{number}", {})
    poll(lambda: begun["a"] == begun["b"] == 2)
    for number in range(8):
        pool.add(f" {number}", "chat", {})
    poll(lambda: len(done) == 8)
    before = len(claims)
    time.sleep(0.2)  # 20 rounds of the maintenance loop
    assert len(claims) < before + 9, "nobody looks for what may not be claimed"
    assert begun == {"a": 2, "b": 2, "": 8}
    goes_on.set()
    poll(lambda: len(done) == 16 and idle(store))
    assert begun == {"a": 4, "b": 4, "": 8}


def test_what_has_no_lane_by_mistake_is_handled(store, start):
    def fails(claim):
        raise AttributeError("a mistake in the program")

    add(store, "a")
    start(lambda job: store.finish(job.claim), lane_of=fails)
    poll(lambda: idle(store))


def test_a_lane_has_its_share_also_if_all_threads_begin_at_once(store, start):
    add(store, *(f"a{number}" for number in range(20)))
    goes_on, begun = threading.Event(), []

    def handle(job):
        begun.append(job)
        assert goes_on.wait(9)
        store.finish(job.claim)

    start(handle, threads=12, share=4, lane_of=lambda claim: "a")
    poll(lambda: len(begun) == 4)
    time.sleep(0.1)
    assert len(begun) == 4
    goes_on.set()
    poll(lambda: idle(store))


def test_what_waits_is_handled_by_as_many_threads_as_there_may_be(store, start):
    add(store, *"abcdef")
    busy, most, done = [], [], []

    def handle(job):
        busy.append(job)
        most.append(len(busy))
        poll(lambda: max(most) == 3)
        busy.remove(job)
        store.finish(job.claim)
        done.append(job.claim.id)

    start(handle, threads=3)
    poll(lambda: sorted(done) == [*"abcdef"])
    assert max(most) == 3 and idle(store)


def test_an_added_message_wakes_a_thread(store, start):
    pool = start(lambda job: store.finish(job.claim), poll=30.0)
    poll(lambda: pool.backlog == 0 and not pool.jobs)
    time.sleep(0.05)
    pool.add("a", "chat", {})
    poll(lambda: idle(store))
    assert store.state("a") == "gone"


def test_a_message_does_not_wait_for_one_that_is_tried_again(store, start):
    """The thread that it woke took the other, which had been due longer."""
    goes_on, begun = threading.Event(), []

    def handle(job):
        begun.append(job.claim.id)
        if begun == ["again"]:
            store.save_reply(job.claim, None, {"tries": 1})
            store.release(job.claim, 0.1)
        else:
            assert job.claim.id == "new" or goes_on.wait(9)
            store.finish(job.claim)

    pool = start(handle, poll=30.0)
    pool.add("again", "slow", {})
    poll(lambda: begun == ["again"] and not pool.jobs)
    time.sleep(0.2)
    pool.add("new", "chat", {})
    poll(lambda: store.state("new") == "gone")
    assert begun == ["again", "again", "new"]
    goes_on.set()
    poll(lambda: idle(store))


def test_a_claim_brings_the_kept_values(store, start):
    store.put("servers", {"well": 1})
    seen = []

    def handle(job):
        seen.append(job.claim.kept)
        store.finish(job.claim)

    pool = start(handle)
    pool.kept = ("servers",)
    pool.add("a", "chat", {})
    poll(lambda: seen == [{"servers": {"well": 1}}])


@pytest.mark.parametrize("error", [ValueError("no"), StoreError("no"), LeaseLost()])
def test_a_message_whose_handler_raises_is_released(store, start, error, caplog):
    add(store, "a")
    seen = []

    def handle(job):
        seen.append(job.claim.id)
        if len(seen) == 1:
            raise error
        store.finish(job.claim)

    pool = start(handle)
    poll(lambda: len(seen) == 2 and idle(store) and not pool.jobs)
    assert ("Traceback" in caplog.text) == isinstance(error, ValueError)


@pytest.mark.parametrize("is_down", [False, True])
def test_a_message_is_not_tried_for_ever_if_only_its_own_step_fails(
    store, start, caplog, is_down
):
    """As a /clear that took too long for PostgreSQL did."""
    put(store, "a")
    broken, exhausted, tries = Broken(store), [], []
    going = threading.Event()
    if is_down:
        broken.check = refuse

    def handle(job):
        tries.append(job)
        if len(tries) > 10:
            going.wait(20)
        if job.claim.exhausted:
            exhausted.append(job.claim)
            return store.fail(job.claim, "tried too often")
        raise StoreError("canceling statement due to statement timeout")

    start(handle, store=broken)
    poll(lambda: exhausted or len(tries) > 10)
    assert (len(exhausted), len(tries)) == ((0, 11) if is_down else (1, 4))
    assert ("the store works again" in caplog.text) == is_down
    going.set()


def test_a_busy_store_is_not_down(store, start, caplog):
    add(store, "a", "b")
    broken, refused = Broken(store), []

    def claim(*asked):
        if len(refused) < 3:
            refused.append(asked)
            raise StoreBusy("slow")
        return store.claim(*asked)

    broken.claim = claim
    start(lambda job: store.finish(job.claim), store=broken)
    poll(lambda: idle(store))
    assert caplog.messages.count("slow") == 1, "once a minute"
    assert "the store works again" not in caplog.text


def test_no_message_is_given_up_because_the_store_was_busy(store, start):
    add(store, "a")
    tries = []

    def handle(job):
        tries.append(job.claim)
        if len(tries) < 6:
            raise StoreBusy("slow")
        store.finish(job.claim)

    start(handle)
    poll(lambda: idle(store))
    assert len(tries) == 6 and not tries[-1].exhausted


def test_a_message_in_flight_is_not_claimed_again_after_a_pause(store, url, start):
    """The maintenance loop stands still for longer than a lease, threads do not."""
    add(store, "a")
    broken, seen = Broken(opened(url, lease=0.2)), []
    going, stopped = threading.Event(), threading.Event()

    def handle(job):
        seen.append(job.claim.id)
        going.wait(20)
        assert store.finish(job.claim)

    def heartbeat(claims):
        stopped.wait(20)
        return broken._store.heartbeat(claims)

    pool = start(handle, store=broken, lease=0.2)
    poll(lambda: seen)
    broken.heartbeat = heartbeat
    poll(lambda: store.load()[2] == 1)  # its lease expired
    pool.wake(4)
    time.sleep(0.1)
    assert seen == ["a"]
    going.set()
    stopped.set()
    poll(lambda: idle(store))
    assert seen == ["a"]
    broken.close()


def test_a_claim_that_this_process_took_from_itself_goes_on(store, url, start):
    """As when the pause came between the look at the clock and the claim."""
    broken, seen = Broken(opened(url, lease=0.0)), []
    broken.heartbeat = lambda claims: ([], [])
    add(store, "a")

    def handle(job):
        first = job.claim
        seen.append(first.id)
        poll(lambda: job.claim is not first)
        while not store.finish(job.claim):
            pass

    start(handle, store=broken)
    poll(lambda: seen and idle(store))
    assert seen == ["a"]
    broken.close()


def test_what_ended_as_this_process_claimed_it_again_is_not_left_alone(
    store, url, start
):
    """The claim that it ended had just become invalid."""
    broken, ended = Broken(store), []
    broken.heartbeat = lambda claims: ([], [])
    add(store, "a")

    def handle(job):
        first = job.claim
        if not ended:
            query(url, "UPDATE conversation SET due = 0")  # its lease expires
            poll(lambda: job.claim is not first)
        ended.append(store.finish(first))

    start(handle, store=broken)
    poll(lambda: ended == [False, True], timeout=9)  # its lease would last 12
    assert idle(store)


def test_an_operation_that_the_store_refused_is_retried_when_it_works(
    store, start, caplog
):
    add(store, "a")
    broken, started = Broken(store), threading.Event()
    broken.finish = broken.check = refuse

    def handle(job):
        started.wait(20)
        pool.when_store_works(lambda: broken.finish(job.claim))

    pool = start(handle, store=broken)
    started.set()
    poll(lambda: "away" in caplog.text)
    assert store.state("a") == "open"
    del broken.finish, broken.check
    poll(lambda: idle(store))
    poll(lambda: "the store works again" in caplog.text)


def test_after_an_outage_what_was_answered_is_finished_before_it_is_claimed_again(
    store, url, start
):
    """Its lease expired during the outage: it would be answered twice."""
    add(store, "a")
    broken, seen = Broken(opened(url, lease=0.0)), []
    ready = threading.Event()

    def slow_finish(claim):
        if "heartbeat" in vars(broken):
            raise StoreError("away")
        time.sleep(0.1)
        return store.finish(claim)

    def handle(job):
        ready.wait(20)
        seen.append(job.claim.id)
        broken.heartbeat = broken.load = broken.check = refuse
        pool.when_store_works(slow_finish, job.claim)

    pool = start(handle, store=broken)
    ready.set()
    poll(lambda: seen and not pool.jobs)
    del broken.heartbeat, broken.load, broken.check
    poll(lambda: idle(store))
    assert seen == ["a"]
    broken.close()


def test_after_an_outage_nothing_is_claimed_before_other_processes_took_note_of_it(
    store, start, caplog
):
    """They may have refused callbacks, which come before what is acknowledged now."""
    broken, handled = Broken(store), []

    def handle(job):
        store.finish(job.claim)
        handled.append(time.monotonic())

    add(store, "before")
    start(handle, store=broken, regain=0.4)
    poll(lambda: handled)
    broken.heartbeat = refuse
    poll(lambda: "away" in caplog.text)
    add(store, "after")
    del broken.heartbeat
    poll(lambda: "the store works again" in caplog.text)
    back = time.monotonic()
    poll(lambda: len(handled) == 2)
    assert handled[1] - back > 0.3


def test_a_store_that_was_locked_for_a_moment_counts_as_an_outage_and_a_slow_one_not(
    store, start
):
    broken, beats, handled = Broken(store), [], []

    def wait(claims):
        beats.append(time.monotonic())
        time.sleep(0.15)
        return store.heartbeat(claims)

    def handle(job):
        store.finish(job.claim)
        handled.append(time.monotonic())

    add(store, "before")
    start(handle, store=broken, regain=0.6, locked=0.3)
    poll(lambda: handled)
    broken.heartbeat = wait
    poll(lambda: len(beats) == 2)
    add(store, "after")
    poll(lambda: len(handled) == 2)
    assert 0.4 < handled[1] - beats[0] < 5.0


def test_an_operation_that_always_fails_holds_up_nothing_and_is_dropped(
    store, start, caplog
):
    tries, done = [], []

    def fails():
        tries.append(len(done))
        raise StoreError("violates a constraint")

    def works():
        if not done:
            done.append(None)
            raise StoreError("once")
        done.append("now")

    pool = start(lambda job: store.finish(job.claim))
    pool.when_store_works(fails)
    pool.when_store_works(works)
    pool.add("a", "chat", {})
    poll(lambda: len(done) == 2 and idle(store))
    poll(lambda: "given up after 5 tries: violates a constraint" in caplog.text)
    time.sleep(0.1)
    assert len(tries) == 5


def test_threads_that_died_are_replaced(store, start, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    deaths, done = [], []

    def handle(job):
        if len(deaths) < 2:
            deaths.append(threading.get_ident())
            raise SystemExit
        done.append(job.claim.id)
        store.finish(job.claim)

    add(store, *"abcd")
    start(handle, threads=2)
    poll(lambda: len(deaths) == 2 and len(done) == 2)
    query(f"sqlite:///{store.path}", "UPDATE conversation SET due = 0")
    poll(lambda: sorted(done) == [*"abcd"])


def test_a_drain_waits_for_work_and_releases_the_rest(store, start):
    add(store, "short", "long")
    ended, cancelled = threading.Event(), threading.Event()
    short = threading.Event()

    def handle(job):
        job.cancel = cancelled.set
        if job.claim.id == "short":
            short.wait(20)
            store.finish(job.claim)
            return
        cancelled.wait(20)
        assert job.lost
        ended.set()

    pool = start(handle)
    poll(lambda: len(pool.jobs) == 2)
    threading.Timer(0.1, short.set).start()
    pool.close(drain=0.3)
    assert ended.wait(5)
    assert store.state("short") == "gone"
    assert store.claim().id == "long"


def test_a_claim_that_comes_while_the_pool_is_closed_is_released(store, start):
    """Else it waits for its lease, with nobody to work on it."""
    broken, claimed, closed = Broken(store), threading.Event(), threading.Event()

    def claim(*asked):
        if taken := store.claim(*asked):
            claimed.set()
            closed.wait(20)
        return taken

    broken.claim = claim
    pool = start(lambda job: None, threads=1, store=broken)
    pool.add("a", "chat", {})
    assert claimed.wait(20)
    pool.close(drain=0)
    closed.set()
    assert poll(store.claim, timeout=5).id == "a"


def test_a_cancel_of_another_process_reaches_the_work(store, start):
    add(store, "a")
    cancelled = threading.Event()

    def handle(job):
        job.cancel = cancelled.set
        cancelled.wait(20)
        store.finish(job.claim)

    pool = start(handle)
    poll(lambda: pool.jobs)
    store.cancel("chat of a")
    assert cancelled.wait(5)
    poll(lambda: idle(store))


def test_work_without_a_cancel_or_a_tick_is_cancelled_all_the_same(store, start):
    add(store, "a")
    going = threading.Event()

    def handle(job):
        going.wait(20)
        store.finish(job.claim)

    pool = start(handle)
    poll(lambda: pool.jobs)
    in_threads(2, lambda _: pool.cancel("chat of a"))
    going.set()
    poll(lambda: idle(store))


def test_work_that_was_lost_is_left_alone(store, start):
    """Else it would keep a stream alive that another process writes to."""
    add(store, "a")
    ticks, beats, going, broken = [], [], threading.Event(), Broken(store)

    def handle(job):
        job.tick = lambda: ticks.append(job.lost)
        going.wait(20)
        raise LeaseLost

    def heartbeat(claims):
        beats.append(claims)
        return list(claims), []

    pool = start(handle, store=broken)
    poll(lambda: ticks)
    broken.heartbeat = heartbeat
    poll(lambda: pool.jobs[0].lost)
    before, beats_before = len(ticks), len(beats)
    poll(lambda: len(beats) > beats_before + 3)
    going.set()
    assert len(ticks) <= before + 1 and not any(ticks)
