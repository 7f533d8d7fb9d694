"""The store: every promise, on each kind of database."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

import store
from conftest import HERE, RedisServer, poll, redis_or_skip
from store import RedisStore, SQLiteStore, StoreError, open_store


def in_threads(count, work):
    """Run work(number) in threads that begin at the same moment; return the results."""
    results, barrier = {}, threading.Barrier(count)

    def run(number):
        barrier.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == count, "a thread failed"
    return [results[number] for number in range(count)]


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory):
    redis_or_skip()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def place(request, tmp_path):
    """Where a store is: what open_store wants to know."""
    if request.param == "sqlite":
        return str(tmp_path / "store.db"), ""
    server = request.getfixturevalue("shared_redis")
    server.cli("flushall")
    return "", server.url


@pytest.fixture
def opened(place):
    """Return a function that opens the store again, as another process would."""
    stores = []

    def again():
        stores.append(open_store(*place))
        return stores[-1]

    yield again
    for each in stores:
        each.close()


@pytest.fixture
def kept(opened):
    return opened()


@pytest.fixture
def sqlite(tmp_path):
    kept = SQLiteStore(str(tmp_path / "store.db"))
    yield kept
    kept.close()


def put(kept, *ids, to="jared"):
    for id in ids:
        assert kept.add(id, to, {"text": f"text of {id}"})


def answer(kept, reply="yes", **options):
    claim = kept.claim()
    assert kept.keep(claim, reply, **options) and kept.finish(claim)
    return claim


def fail(kept, reason="no"):
    claim = kept.claim()
    kept.set_aside(claim, reason)
    return claim


def waiting(kept, conversation):
    return kept.look_up("", conversation, "")[1]


def texts(kept, conversation="jared", limit=10):
    return [(data["text"], reply) for data, reply in kept.history(conversation, limit)]


def test_open_store_picks_redis_if_there_is_a_url(tmp_path):
    redis_or_skip()
    assert isinstance(open_store(str(tmp_path / "a.db"), ""), SQLiteStore)
    assert isinstance(open_store("nowhere/a.db", "redis://127.0.0.1:1"), RedisStore)


def test_an_id_is_accepted_once_waiting_held_answered_and_forgotten(kept):
    put(kept, "1")
    assert not kept.add("1", "jared", {})
    claim = kept.claim()
    assert not kept.add("1", "somebody else", {})
    kept.keep(claim, "yes")
    kept.finish(claim)
    assert not kept.add("1", "jared", {})
    kept.forget("jared")
    assert not kept.add("1", "jared", {})
    assert kept.claim() is None


def test_of_one_id_delivered_at_once_one_is_accepted(kept):
    added = in_threads(8, lambda _: kept.add("1", "jared", {}))
    assert sorted(added) == [False] * 7 + [True]


def test_a_claim_has_all_that_was_given(kept):
    before = time.time() - 1
    data = {"text": "你好 😀\0\ud800 \"'", "list": [1, None]}
    kept.add("a\t1", "群 {x}:1", data)
    claim = kept.claim()
    assert (claim.id, claim.conversation, claim.data) == ("a\t1", "群 {x}:1", data)
    assert (claim.reply, claim.progress) == (None, {})
    assert before < claim.accepted < time.time() + 1
    assert kept.renew([claim]) == []
    assert kept.keep(claim, "好\ud800") and kept.finish(claim)
    assert kept.history("群 {x}:1", 1) == [(data, "好\ud800")]


def test_half_a_surrogate_pair_in_a_name_hurts_nobody(kept):
    names = ["\ud800", "b", "\udfff\0", "d"]
    assert all(in_threads(4, lambda n: kept.add(names[n], names[n], {})))
    assert not kept.add("\ud800", "\ud800", {})
    assert waiting(kept, "\ud800") == 1
    for _ in names:
        kept.set_aside(kept.claim(), "\ud800")


def test_what_was_accepted_outlives_the_process(kept, opened):
    put(kept, "1", "2")
    answer(kept)
    put(kept, "3")
    kept.close()
    later = opened()
    assert not later.add("1", "jared", {})
    assert [answer(later).id, answer(later).id] == ["2", "3"]
    assert [text for text, _ in texts(later)] == [f"text of {n}" for n in (1, 2, 3)]


def test_numbers_grow_also_after_everything_was_pruned(kept):
    put(kept, "1")
    first = answer(kept)
    poll(lambda: kept.prune(0))
    put(kept, "2")
    assert kept.claim().seq > first.seq


def test_a_conversation_is_worked_in_order_one_at_a_time(kept):
    put(kept, "1", "2", "3")
    for id in ("1", "2", "3"):
        claim = kept.claim()
        assert claim.id == id
        assert kept.claim() is None
        kept.finish(claim)
    assert kept.claim() is None


def test_the_oldest_conversation_comes_first(kept):
    for id in "abc":
        put(kept, id, to=id)
    put(kept, "a2", to="a")
    assert [kept.claim().id for _ in range(3)] == ["a", "b", "c"]


def test_every_message_is_acquired_by_exactly_one_of_eight_threads(kept):
    for number in range(80):
        put(kept, str(number), to=str(number))

    def take(_):
        return [claim.id for claim in iter(kept.claim, None)]

    taken = sum(in_threads(8, take), [])
    assert sorted(taken) == sorted(str(number) for number in range(80))


def test_threads_never_share_a_conversation(kept):
    for number in range(60):
        put(kept, str(number), to=str(number % 3))
    busy, order, lock = set(), {"0": [], "1": [], "2": []}, threading.Lock()

    def work(_):
        while kept.stats()["oldest"]:
            if claim := kept.claim():
                with lock:
                    assert claim.conversation not in busy
                    busy.add(claim.conversation)
                    order[claim.conversation].append(int(claim.id))
                time.sleep(0.001)
                with lock:
                    busy.remove(claim.conversation)
                assert kept.finish(claim)

    in_threads(8, work)
    assert order == {str(n): list(range(n, 60, 3)) for n in range(3)}


WORKER = """
import json, sys, threading, time
from store import open_store

kept, name = open_store(*sys.argv[1:3]), sys.argv[3]

def work(number):
    for i in range(25):
        kept.add(f"{name}-{number}-{i}", str(i % 7), {})
    idle = 0
    while idle < 100:
        claim = kept.claim()
        idle = 0 if claim else idle + 1
        if claim is None:
            time.sleep(0.002)
            continue
        began = time.monotonic()
        kept.keep(claim, "yes")
        ended = time.monotonic()
        if kept.finish(claim):
            work = [claim.conversation, claim.seq, claim.id, began, ended]
            sys.stdout.write(json.dumps(work) + "\\n")

threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_two_processes_of_four_threads_lose_repeat_and_mix_up_nothing(kept, place):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, *place, name],
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in outputs] == ["", ""]
    works = [json.loads(line) for out, _ in outputs for line in out.splitlines()]
    ids = [f"{p}-{t}-{i}" for p in "ab" for t in range(4) for i in range(25)]
    assert sorted(work[2] for work in works) == sorted(ids)
    for name in {work[0] for work in works}:
        mine = sorted(work[1:] for work in works if work[0] == name)
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[3] < after[2], "two were at work on one conversation"


def test_a_claim_that_is_not_renewed_goes_to_another(kept, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.05)
    put(kept, "1", "2")
    lost = kept.claim()
    kept.keep(lost, "half", progress={"sent": 1})
    again = poll(kept.claim)
    assert (again.id, again.reply, again.progress) == ("1", "half", {"sent": 1})
    assert kept.renew([lost, again]) == [lost]
    assert not kept.keep(lost, "other")
    assert not kept.finish(lost)
    kept.release(lost, 0)
    kept.set_aside(lost, "no")
    assert kept.stats()["set_aside"] == 0
    assert kept.keep(again, "mine") and kept.finish(again)
    assert texts(kept) == [("text of 1", "mine")]


def test_a_claim_that_is_renewed_stays(kept, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.3)
    put(kept, "1")
    claim = kept.claim()
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        assert kept.renew([claim]) == []
        assert kept.claim() is None
        time.sleep(0.02)
    assert kept.finish(claim)
    assert kept.renew([claim]) == [claim]


def test_a_message_whose_work_was_cut_short_three_times_is_set_aside(
    kept, monkeypatch, caplog
):
    monkeypatch.setattr(store, "LEASE", 0.02)
    put(kept, "bad", "good")
    for _ in range(3):
        assert poll(kept.claim).id == "bad"
    assert poll(kept.claim).id == "good"
    assert [id for id, _, _ in kept.failed()] == ["bad"]
    assert "bad" in caplog.text and "text of" not in caplog.text


def test_a_release_counts_only_if_the_work_failed(kept):
    put(kept, "1")
    for _ in range(10):
        kept.release(kept.claim(), 0)
    for _ in range(3):
        kept.release(kept.claim(), 0, failed=True)
    assert kept.claim() is None
    assert kept.stats()["set_aside"] == 1


def test_a_released_message_waits_and_keeps_its_turn(kept):
    put(kept, "1", "2")
    put(kept, "other", to="other")
    kept.release(kept.claim(), 0.3)
    released = time.monotonic()
    assert kept.claim().id == "other"
    assert kept.claim() is None and kept.due(5) == 0
    assert poll(kept.claim).id == "1"
    assert time.monotonic() - released > 0.25


def test_progress_is_kept_without_and_beside_a_reply(kept):
    put(kept, "1")
    claim = kept.claim()
    assert kept.keep(claim, None, progress={"key": "k"})
    kept.release(claim, 0)
    claim = kept.claim()
    assert (claim.reply, claim.progress) == (None, {"key": "k"})
    assert kept.keep(claim, "yes", remember=False)
    assert kept.keep(claim, None, progress={"sent": 2})
    kept.release(claim, 0)
    claim = kept.claim()
    assert (claim.reply, claim.progress) == ("yes", {"sent": 2})
    kept.finish(claim)
    assert texts(kept) == [], "progress must not make the store remember"


def test_history_gives_the_last_turns_oldest_first(kept, monkeypatch):
    monkeypatch.setattr(store, "REMEMBERED", 6)
    for number in range(8):
        put(kept, str(number))
        answer(kept, f"reply {number}")
    put(kept, "open", to="jared")
    assert texts(kept, limit=0) == []
    assert texts(kept, limit=2) == [("text of 6", "reply 6"), ("text of 7", "reply 7")]
    assert len(texts(kept, limit=6)) == 6
    assert not kept.add("0", "jared", {})


def test_what_is_not_to_be_remembered_or_has_no_reply_is_not_in_the_history(kept):
    put(kept, "1", "2", "3")
    answer(kept, remember=False)
    kept.finish(kept.claim())
    answer(kept, "third")
    assert texts(kept) == [("text of 3", "third")]


def test_forget_deletes_answers_and_failures_of_one_conversation(kept):
    put(kept, "1", "2", "3")
    put(kept, "4", "5", to="other")
    answer(kept)
    fail(kept)
    for _ in range(2):
        claim = kept.claim()
        if claim.conversation == "other":
            kept.keep(claim, "yes")
            kept.finish(claim)
    kept.forget("jared")
    assert texts(kept) == [] and kept.failed() == []
    assert texts(kept, "other") == [("text of 4", "yes")]
    assert kept.retry() == 0
    assert waiting(kept, "jared") == 1
    assert not any(kept.add(id, "jared", {}) for id in "123")


def test_what_ended_is_pruned_in_time_and_what_is_open_never(kept, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    put(kept, *"12345")
    for _ in range(3):
        answer(kept)
    fail(kept)
    assert kept.prune(60) == 0
    assert not kept.add("1", "jared", {})
    assert poll(lambda: kept.prune(0)) == 4
    assert kept.prune(0) == 0
    assert texts(kept) == [] and kept.failed() == []
    assert kept.claim().id == "5"
    put(kept, "1")


def test_stats_say_how_much_waits_is_held_and_failed(kept):
    zero = {"waiting": 0, "in_work": 0, "set_aside": 0, "oldest": 0.0}
    assert kept.stats() == zero
    put(kept, "1", "2", "3")
    put(kept, "4", to="other")
    fail(kept)
    claim = kept.claim()
    seen = kept.stats()
    assert 0 < seen.pop("oldest") < 5
    assert seen == {"waiting": 2, "in_work": 1, "set_aside": 1}
    assert (waiting(kept, "jared"), waiting(kept, "other")) == (2, 1)
    assert waiting(kept, "nobody") == 0
    kept.release(claim, 0)
    assert kept.stats()["in_work"] == 0
    assert (kept.due(10), kept.due(1)) == (2, 1)


def test_what_users_asked_is_counted_once_and_for_a_minute(kept, monkeypatch):
    for id, asker in (("1", "jared"), ("1", "jared"), ("2", "jared"), ("3", "")):
        kept.add(id, "chat", {}, asker)
    kept.finish(kept.claim())
    assert kept.look_up("2", "chat", "jared") == (True, 2, 2)
    assert kept.look_up("4", "chat", "lin") == (False, 2, 0)
    assert kept.look_up("1", "elsewhere", "") == (True, 0, 0)
    monkeypatch.setattr(store, "MINUTE", 1)
    poll(lambda: kept.look_up("2", "chat", "jared") == (True, 2, 0))


def test_limits_hold_for_all_processes_at_once(kept, opened):
    stores = (kept, opened())

    def add(number):
        where = f"chat {number % 8}" if number < 16 else "full"
        asker = "jared" if number < 16 else ""
        limits = {"room": 3, "rate": 5}
        return stores[number % 2].add(str(number), where, {}, asker, **limits)

    added = in_threads(32, add)
    assert added[:16].count(True) == 5 and added[16:].count(True) == 3
    refused = added.index(False)
    assert kept.look_up(str(refused), "full", "jared") == (False, 3, 5)


def test_workers_go_to_the_store_one_at_a_time_while_a_callback_is_there(
    kept, monkeypatch
):
    run, there, seen, free = kept._run, [], [], threading.Event()

    def watched(verb, values):
        if verb == "add":
            free.wait(20)
        else:
            there.append(verb)
            seen.append(len(there))
            time.sleep(0.05)
            there.pop()
        return run(verb, values)

    monkeypatch.setattr(kept, "_run", watched)
    callback = threading.Thread(target=kept.add, args=("1", "jared", {}))
    callback.start()
    poll(lambda: kept._urgent)
    in_threads(4, lambda _: kept.due(1))
    assert max(seen) == 1
    free.set()
    callback.join()
    in_threads(4, lambda _: kept.due(1))
    assert max(seen) > 1


def test_redis_keeps_no_list_of_what_was_asked_long_ago(shared_redis, monkeypatch):
    monkeypatch.setattr(store, "MINUTE", 1)
    shared_redis.cli("flushall")
    kept = RedisStore(shared_redis.url)
    kept.add("1", "chat", {}, "jared")
    assert shared_redis.cli("keys", "*asked*")
    poll(lambda: not shared_redis.cli("keys", "*asked*"))
    kept.close()


def test_a_stop_reaches_the_held_message_only_and_every_process(kept, opened):
    assert not kept.request_stop("jared")
    put(kept, "1", "2")
    put(kept, "3", to="other")
    assert not kept.request_stop("jared")
    claims = [kept.claim(), kept.claim()]
    assert opened().request_stop("jared")
    assert kept.stops(claims) == claims[:1]
    kept.finish(claims[0])
    later = kept.claim()
    assert later.id == "2" and kept.stops([*claims, later]) == []


def test_a_stop_outlives_the_process_that_was_to_stop(kept, monkeypatch):
    put(kept, "1")
    with monkeypatch.context() as patch:
        patch.setattr(store, "LEASE", 0.02)
        lost = kept.claim()
    kept.request_stop("jared")
    again = poll(kept.claim)
    assert kept.stops([lost, again]) == [again]


def test_failed_messages_are_listed_and_come_back_in_their_turn(kept):
    put(kept, *"12345")
    fail(kept, "first")
    claim = kept.claim()
    kept.keep(claim, "reply", progress={"sent": 1})
    kept.set_aside(claim, "second")
    [one, two] = kept.failed()
    assert (one[:2], two[:2]) == (("1", "first"), ("2", "second"))
    assert 0 <= two[2] <= one[2] < 5
    assert kept.failed(1) == [kept.failed()[0][:2] + (pytest.approx(one[2], abs=1),)]
    held = kept.claim()
    assert kept.retry(["2", "3", "unknown"]) == 1
    assert kept.claim() is None, "one claim for a conversation"
    assert kept.finish(held)
    assert kept.retry() == 1
    assert kept.failed() == []
    assert kept.due(5) == 1, "one next for a conversation"
    ids = [answer(kept, "yes").id for _ in range(4)]
    assert ids == list("1245")


def test_a_retried_message_has_its_reply_and_all_its_attempts(kept):
    put(kept, "1")
    for _ in range(2):
        kept.release(kept.claim(), 0, failed=True)
    claim = kept.claim()
    kept.keep(claim, "reply", progress={"sent": 1})
    kept.request_stop("jared")
    kept.set_aside(claim, "no")
    kept.retry()
    for _ in range(3):
        claim = kept.claim()
        assert (claim.reply, claim.progress) == ("reply", {"sent": 1})
        assert kept.stops([claim]) == []
        kept.release(claim, 0, failed=True)
    assert kept.claim() is None


def test_a_record_that_cannot_be_read_is_an_error_then_set_aside(
    kept, place, request, monkeypatch
):
    monkeypatch.setattr(store, "LEASE", 0.02)
    put(kept, "1", "2")
    if place[1]:
        server = request.getfixturevalue("shared_redis")
        server.cli("hset", "{bot}:message:1", "data", "not json")
    else:
        with sqlite3.connect(place[0]) as file:
            file.execute("UPDATE message SET data = 'not json' WHERE id = '1'")
        file.close()

    def taken():
        try:
            return kept.claim()
        except StoreError:
            return None

    assert poll(taken).id == "2"
    assert [id for id, _, _ in kept.failed()] == ["1"]


def test_a_closed_store_says_so(sqlite):
    sqlite.close()
    for verb in (sqlite.claim, sqlite.stats, lambda: sqlite.add("1", "jared", {})):
        with pytest.raises(StoreError):
            verb()


ADDER = """
import sys
from store import open_store
kept = open_store(*sys.argv[1:3])
for number in range(100_000):
    kept.add(str(number), "jared", {})
    print(number, flush=True)
"""


def test_what_was_acknowledged_outlives_a_kill(place, opened):
    process = subprocess.Popen(
        [sys.executable, "-c", ADDER, *place], cwd=HERE, stdout=subprocess.PIPE
    )
    lines = [process.stdout.readline() for _ in range(100)]
    process.kill()
    lines += process.communicate()[0].splitlines(keepends=True)
    numbers = [line.strip().decode() for line in lines if line.endswith(b"\n")]
    kept = opened()
    assert not any(kept.add(number, "jared", {}) for number in numbers)
    assert waiting(kept, "jared") >= len(numbers) >= 100


def test_sqlite_syncs_what_it_adds_and_shares_the_commit(sqlite):
    seen, verbs = [], []
    sqlite._writer.set_trace_callback(seen.append)
    sqlite.add("0", "jared", {})
    sqlite.release(sqlite.claim(), 0)
    sqlite.add("-1", "jared", {})
    for line in seen:
        verbs.append(line.split()[-1] if "synchronous" in line else line.split()[0])
    assert verbs == ["INSERT", "NORMAL", "UPDATE", "UPDATE", "FULL", "INSERT"]
    seen.clear()
    with sqlite._write_lock:  # as if a commit went on
        threads = [
            threading.Thread(target=sqlite.add, args=(str(n), "jared", {}))
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        poll(lambda: len(sqlite._steps) == 8)
    for thread in threads:
        thread.join()
    assert seen.count("COMMIT") == 1 and waiting(sqlite, "jared") == 10


def test_sqlite_opens_in_eight_processes_at_once(tmp_path):
    script = "import sys; from store import SQLiteStore as S; S(sys.argv[1]).stats()"
    command = [sys.executable, "-c", script, str(tmp_path / "new.db")]
    processes = [subprocess.Popen(command, cwd=HERE) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8


def test_sqlite_gets_its_turn_beside_a_program_that_writes_all_the_time(
    sqlite, tmp_path
):
    locked, done = threading.Event(), threading.Event()

    def hog():
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None, timeout=5)
        while not done.is_set():
            other.execute("BEGIN IMMEDIATE")
            locked.set()
            time.sleep(0.04)
            locked.clear()
            other.execute("COMMIT")
            time.sleep(0.001)
        other.close()

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        for id in "0123456789":
            locked.wait()
            put(sqlite, id)
    finally:
        done.set()
        thread.join()


def test_sqlite_waits_for_whoever_makes_a_new_file(tmp_path):
    other = sqlite3.connect(
        tmp_path / "new.db", isolation_level=None, check_same_thread=False
    )
    other.executescript("CREATE TABLE t (x); BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: other.execute("ROLLBACK"))
    timer.start()
    SQLiteStore(str(tmp_path / "new.db")).close()
    timer.join()
    other.close()


def test_sqlite_locked_by_another_program_fails_soon_and_works_after(sqlite, tmp_path):
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    def add(number):
        time.sleep(number / 10)
        began = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            sqlite.add(str(number), "jared", {})
        return time.monotonic() - began

    assert max(in_threads(8, add)) < 2
    assert sqlite.claim() is None and sqlite.stats()["waiting"] == 0
    other.execute("ROLLBACK")
    other.close()
    put(sqlite, "1")


def test_sqlite_locked_even_for_readers_fails_soon_and_works_after(tmp_path):
    kept = SQLiteStore(str(tmp_path / "store.db"))
    put(kept, "1")
    kept._read_lock.acquire()  # as if another thread waited for the file

    def read(_):
        began = time.monotonic()
        with pytest.raises(StoreError):
            kept.stats()
        return time.monotonic() - began

    assert max(in_threads(8, read)) < 2
    kept._read_lock.release()
    assert kept.stats()["waiting"] == 1
    kept.close()


def test_sqlite_on_a_full_disk_refuses_and_works_after(sqlite):
    put(sqlite, "1")
    [(pages,)] = sqlite._writer.execute("PRAGMA page_count")
    sqlite._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    for id in "23":
        with pytest.raises(StoreError, match="full"):
            sqlite.add(id, "jared", {"text": "x" * 100_000})
    assert sqlite.claim().id == "1"
    sqlite._writer.execute("PRAGMA max_page_count = 100000").fetchall()
    assert sqlite.add("2", "jared", {"text": "x" * 100_000})
    assert waiting(sqlite, "jared") == 2


def test_sqlite_that_is_read_only_refuses_and_works_after(sqlite):
    put(sqlite, "1")
    sqlite._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="readonly"):
        sqlite.add("2", "jared", {})
    assert sqlite.stats()["waiting"] == 1
    sqlite._writer.execute("PRAGMA query_only = OFF")
    put(sqlite, "2")


def test_sqlite_goes_on_after_a_step_that_failed(sqlite, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(store._SQL, "forget", ("INSERT INTO message (seq) VALUES (1)",))
        with pytest.raises(StoreError):
            sqlite.forget("jared")
    put(sqlite, "1")


def test_sqlite_opens_a_file_from_before_limits_were_kept_there(tmp_path):
    path = str(tmp_path / "store.db")
    with closing(sqlite3.connect(path)) as old:
        old.executescript(store._SCHEMA)
        old.execute("DROP INDEX message_asked")
        old.execute("ALTER TABLE message DROP COLUMN asker")
    kept = SQLiteStore(path)
    assert kept.add("1", "jared", {}, "jared") and answer(kept).id == "1"
    kept.close()


def test_sqlite_that_cannot_be_opened_says_which_file(tmp_path):
    with pytest.raises(StoreError, match="missing/store.db cannot be opened"):
        SQLiteStore(str(tmp_path / "missing/store.db"))


def test_sqlite_leaves_no_byte_of_what_was_forgotten(sqlite, tmp_path):
    long = "SECRET" * 5000
    for number in range(40):
        put(sqlite, f"open {number}", to=f"other {number}")
        sqlite.add(f"short {number}", "jared", {"text": "SECRET question"})
        sqlite.add(f"long {number}", "jared", {"text": long})
    while claim := sqlite.claim():
        if claim.conversation == "jared":
            remember = claim.seq % 3 > 0
            sqlite.keep(claim, "SECRET reply " + long, remember, {"at": "SECRET"})
            if claim.seq % 5:
                sqlite.finish(claim)
            else:
                sqlite.set_aside(claim, "SECRET reason")
    sqlite.forget("jared")
    sqlite.prune(60)
    files = list(tmp_path.glob("store.db*"))
    assert len(files) == 3
    assert not any(b"SECRET" in file.read_bytes() for file in files)
    assert b"text of open" in (tmp_path / "store.db").read_bytes()


def test_sqlite_answers_its_questions_from_indexes(sqlite):
    values = {name: None for name in ("claims", "conversation", "limit", "now", "age")}
    values |= {name: None for name in ("id", "token", "most", "new", "lease", "asker")}
    values |= {name: None for name in ("reason", "reply", "progress", "remember")}
    values |= {
        name: None for name in ("delay", "back", "data", "minute", "room", "rate")
    }
    for verb, statements in store._SQL.items():
        for sql in statements if verb != "retry" else ():
            plan = sqlite._reader.execute(f"EXPLAIN QUERY PLAN {sql}", values)
            steps = [step for *_, step in plan]
            scans = [step for step in steps if step.startswith("SCAN message")]
            assert all("message_due" in step for step in scans), (verb, steps)
            if verb in ("claim", "due"):
                assert any("message_due (due<?)" in step for step in steps), steps


def test_redis_gone_is_an_error_at_once_and_over_when_it_is_back(redis_server):
    kept = RedisStore(redis_server.url)
    put(kept, "1", "2")
    answer(kept)
    redis_server.stop()
    began = time.monotonic()
    for verb in (kept.claim, kept.stats, lambda: kept.add("3", "jared", {})):
        with pytest.raises(StoreError, match="Redis cannot be used"):
            verb()
    assert time.monotonic() - began < 1.5
    redis_server.start()  # it has forgotten the script
    assert not kept.add("1", "jared", {}) and answer(kept).id == "2"
    kept.close()


def test_redis_that_hangs_is_an_error_in_time(redis_server):
    kept = RedisStore(redis_server.url)
    in_threads(8, lambda n: put(kept, str(n)))
    redis_server.send(signal.SIGSTOP)

    def add(number):
        began = time.monotonic()
        with pytest.raises(StoreError):
            kept.add(f"again {number}", "jared", {})
        return time.monotonic() - began

    assert max(in_threads(12, add)) < 1.5
    redis_server.send(signal.SIGCONT)
    put(kept, "new")
    kept.close()


def test_redis_with_a_full_memory_refuses_only_new_messages(redis_server):
    kept = RedisStore(redis_server.url)
    put(kept, "1", "2")
    redis_server.cli("config", "set", "maxmemory", "1")
    with pytest.raises(StoreError, match="maxmemory"):
        kept.add("3", "jared", {})
    assert [answer(kept).id, answer(kept).id] == ["1", "2"]
    redis_server.cli("config", "set", "maxmemory", "0")
    put(kept, "3")
    kept.close()


def test_redis_keeps_nothing_for_ever(shared_redis, monkeypatch):
    shared_redis.cli("flushall")
    kept = RedisStore(shared_redis.url)
    monkeypatch.setattr(store, "REMEMBERED", 3)
    for number in range(10):
        put(kept, str(number), to=str(number % 2))
    for _ in range(9):
        answer(kept, "SECRET", remember=True)
    fail(kept)
    messages = shared_redis.cli("keys", "*:message:*").split()
    assert len(messages) == 3 + 3 + 1
    assert all(
        key.startswith("{bot}:") for key in shared_redis.cli("keys", "*").split()
    )
    kept.forget("0")
    assert len(shared_redis.cli("keys", "*:message:*").split()) < 5
    poll(lambda: kept.prune(0))
    assert shared_redis.cli("keys", "*") == "{bot}:seq"
    kept.close()


@pytest.mark.parametrize(
    "url",
    ["redis://:pa/sswor@127.0.0.1:1", "http://:passwor@h", "redis://:passwor@h:port"]
    + ["redis://:passwor@127.0.0.1:1", "redis://x:passwor@no.such.host.invalid"],
)
def test_an_unusable_redis_url_is_an_error_without_its_password(url):
    redis_or_skip()
    with pytest.raises(StoreError) as caught:
        RedisStore(url).claim()
    assert "pa" not in str(caught.value).replace("password", "").split()
    assert "sswor" not in str(caught.value).replace("password", "")


def test_redis_that_repeats_what_it_was_told_is_not_quoted(tmp_path):
    redis_or_skip()
    server = RedisServer(tmp_path, "--rename-command", "EVALSHA", "")
    kept = RedisStore(server.url)
    try:
        with pytest.raises(StoreError, match="unknown command") as caught:
            kept.add("1", "jared", {"text": "a text"})
    finally:
        kept.close()
        server.stop()
    assert "jared" not in str(caught.value)


def test_a_wrong_redis_password_is_an_error_that_does_not_say_it(shared_redis):
    kept = RedisStore(shared_redis.url.replace("hush-hush", "wrong-hush"))
    with pytest.raises(StoreError, match="invalid username") as caught:
        kept.claim()
    assert "wrong-hush" not in str(caught.value)
    kept.close()


def test_a_missing_redis_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match="requirements.txt"):
        open_store("", "redis://127.0.0.1:1")
