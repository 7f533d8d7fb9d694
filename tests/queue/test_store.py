"""The store: every promise, on each kind of database."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from conftest import HERE, in_threads, poll

from imbot.queue import sql, sqlite, store
from imbot.queue.sql import Added
from imbot.queue.sqlite import SQLiteStore
from imbot.queue.store import StoreError
from imbot.settings import SettingsError

NEW, KNOWN = Added.NEW, Added.KNOWN
MADE_TABLES = "DROP TABLE IF EXISTS message, conversation"

# The beginning of scripts that open the store of a URL in a process of their own.
OPEN = """
import json, random, sys, threading, time
if sys.argv[1].startswith("sqlite"):
    Kind = sqlite.SQLiteStore
else:
    from postgres import PostgresStore as Kind
"""


def start_script(script, url, *words, **options):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", OPEN + script, url, *words],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def open_url(url):
    return load(STORES, url.partition(":")[0])(url)


def path_of(url):
    return Path(url.removeprefix("sqlite:///"))


def query(url, sql):
    """Do a statement of SQL beside the store; return its rows."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url), isolation_level=None)) as file:
            return file.execute(sql).fetchall()
    import psycopg

    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """The address of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    server = request.getfixturevalue("shared_postgres")
    query(server.url, MADE_TABLES)
    if request.param == "pgbouncer":
        return request.getfixturevalue("shared_bouncer").url
    return server.url


# Some tests also run through what platforms put before PostgreSQL.
and_pgbouncer = pytest.mark.parametrize(
    "url", ["sqlite", "postgres", "pgbouncer"], indirect=True
)
COUNTS = """SELECT name, open,
    (SELECT count(*) FROM message WHERE conversation = name AND state = 'open')
    FROM conversation"""


@pytest.fixture
def opened(url):
    """Return a function that opens the store again, as another process would."""
    stores, threads = [], threading.active_count()

    def again():
        stores.append(open_url(url))
        return stores[-1]

    yield again
    counts = query(url, COUNTS) if stores else []
    for each in stores:
        each.close()
    assert all(said == true > 0 for _, said, true in counts), counts
    poll(lambda: threading.active_count() <= threads)


@pytest.fixture
def kept(opened):
    return opened()


@pytest.fixture
def sqlite(tmp_path):
    kept = SQLiteStore(f"sqlite:///{tmp_path}/store.db")
    yield kept
    kept.close()


@pytest.fixture
def postgres(shared_postgres):
    query(shared_postgres.url, MADE_TABLES)
    kept = open_url(shared_postgres.url)
    yield kept
    kept.close()


def put(kept, *ids, to="jared"):
    for id in ids:
        assert kept.add(id, to, {"text": f"text of {id}"}) == NEW


def answer(kept, reply="yes", remember=True):
    claim = kept.claim()
    assert kept.save_reply(claim, reply, {}, remember) and kept.finish(claim)
    return claim


def fail(kept, reason="no"):
    claim = kept.claim()
    assert kept.fail(claim, reason)
    return claim


def texts(kept, conversation="jared", limit=10):
    return [(data["text"], reply) for data, reply in kept.history(conversation, limit)]


def failed(kept):
    return [id for _, id, _, _ in kept.failed()]


def lost(kept, *claims):
    return kept.heartbeat(claims)[0]


def cancelled(kept, *claims):
    return kept.heartbeat(claims)[1]


def waiting(kept):
    return kept.stats()["waiting"]


def test_an_id_is_accepted_once_waiting_held_answered_and_forgotten(kept):
    put(kept, "1")
    assert kept.add("1", "jared", {}) == KNOWN
    claim = kept.claim()
    assert kept.add("1", "somebody else", {}) == KNOWN
    kept.save_reply(claim, "yes", {})
    kept.finish(claim)
    assert kept.add("1", "jared", {}) == KNOWN
    kept.forget("jared")
    assert kept.add("1", "jared", {}) == KNOWN
    assert kept.claim() is None


@and_pgbouncer
def test_of_one_id_delivered_at_once_one_is_accepted(kept):
    added = in_threads(8, lambda n: kept.add("1", f"chat {n % 2}", {}))
    assert sorted(added) == [KNOWN] * 7 + [NEW]
    assert waiting(kept) == 1


def test_a_claim_has_all_that_was_given(kept):
    before = time.time() - 1
    data = {"text": "你好 😀\0\ud800 \"'%s %(id)s :id \\", "list": [1, None]}
    kept.add("a\t1", "群 {x}:1%s", data)
    claim = kept.claim()
    assert (claim.id, claim.conversation, claim.data) == ("a\t1", "群 {x}:1%s", data)
    assert (claim.reply, claim.progress, claim.spent) == (None, {}, False)
    assert before < claim.accepted < time.time() + 1
    assert kept.heartbeat([claim]) == ([], [])
    assert kept.save_reply(claim, "好\ud800\0", {}) and kept.finish(claim)
    assert kept.history("群 {x}:1%s", 1) == [(data, "好\ud800\0")]


def test_half_a_surrogate_pair_in_a_name_hurts_nobody(kept):
    names = ["\ud800", "b", "\udfff\0", "d"]
    assert in_threads(4, lambda n: kept.add(names[n], names[n], {})) == [NEW] * 4
    assert kept.add("\ud800", "\ud800", {}) == KNOWN
    assert kept.add("more", "\ud800", {}, room=1) == Added.QUEUE_FULL
    claims = [kept.claim() for _ in names]
    assert kept.heartbeat(claims) == ([], [])
    for claim in claims:
        assert kept.fail(claim, "\ud800\0")


def test_what_comes_with_a_reply_is_answered_and_not_remembered(kept):
    assert kept.add("1", "jared", {"text": "/help"}, reply="the help") == NEW
    claim = kept.claim()
    assert (claim.reply, claim.data) == ("the help", {"text": "/help"})
    assert kept.finish(claim)
    assert texts(kept) == [] and kept.add("1", "jared", {}) == KNOWN


@and_pgbouncer
def test_what_was_accepted_outlives_the_process(kept, opened):
    put(kept, "1", "2")
    answer(kept)
    put(kept, "3")
    kept.close()
    later = opened()
    assert later.add("1", "jared", {}) == KNOWN
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


@and_pgbouncer
def test_every_message_is_acquired_by_exactly_one_of_eight_threads(kept):
    for number in range(80):
        put(kept, str(number), to=str(number))

    def take(_):
        return [claim.id for claim in iter(kept.claim, None)]

    taken = sum(in_threads(8, take), [])
    assert sorted(taken) == sorted(str(number) for number in range(80))


@and_pgbouncer
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


# Eight threads, each of which adds 125 messages, delivers some twice, and works on what
# there is; of its claims it forgets some, and is too late with others.
WORKER = """
store.LEASE, store.MAX_ATTEMPTS = 0.4, 100
kept, name, lock = Kind(sys.argv[1]), sys.argv[2], threading.Lock()

def add(number, chance):
    for i in range(125):
        chat = str(chance.randrange(40))
        for _ in range(1 + (chance.random() < 0.1)):
            kept.add(f"{name}-{number}-{i:03}", chat, {})
        if i % 5 == 0:
            yield

def work(number):
    chance = random.Random(f"{name}{number}")
    adding = add(number, chance)
    while True:
        more = next(adding, "all") is None
        began = time.monotonic()
        claim = kept.claim()
        if claim is None:
            if not more and kept.load()[:2] == (0, 0):
                return
            time.sleep(0.002)
            continue
        claimed, ended, finished = time.monotonic(), None, False
        fate = chance.random()
        if fate > 0.02:
            if fate < 0.03:
                time.sleep(store.LEASE * 1.2)
            kept.save_reply(claim, "yes", {})
            ended = time.monotonic()
            finished = kept.finish(claim)
        holds = min(ended or began + store.LEASE, began + store.LEASE)
        seen = [claim.conversation, claim.seq, claim.id, claimed, holds, ended]
        with lock:
            print(json.dumps([*seen, finished]))

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
kept.close()
"""


@pytest.mark.slow
@and_pgbouncer
def test_two_processes_of_eight_threads_lose_repeat_and_mix_up_nothing(kept, url):
    """2,000 messages of 40 conversations; claims are forgotten, leases run out."""
    processes = [start_script(WORKER, url, name) for name in ("a", "b")]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in outputs] == ["", ""]
    claims = [json.loads(line) for out, _ in outputs for line in out.splitlines()]
    ended = sorted(claim for claim in claims if claim[-1])
    ids = [f"{p}-{t}-{i:03}" for p in "ab" for t in range(8) for i in range(125)]
    assert sorted(claim[2] for claim in ended) == ids, "each ended once"
    assert len(claims) > 2010, "some were claimed again"
    for name in {claim[0] for claim in claims}:
        held = sorted(claim[3:5] for claim in claims if claim[0] == name)
        for before, after in zip(held, held[1:], strict=False):
            assert before[1] < after[0], "two held one conversation"
        mine = [claim for claim in ended if claim[0] == name]  # by seq
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[5] < after[3], "ended in another order than accepted"
    for adder in (f"{p}-{t}-" for p in "ab" for t in range(8)):
        mine = [claim for claim in ended if claim[2].startswith(adder)]
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[0] < after[0] or before[2] < after[2], "numbered in order"
    assert kept.load() == (0, 0, 0)


MAKER = """
print("ready", flush=True)
input()
kept = Kind(sys.argv[1])
kept.add(sys.argv[2], "", {})
kept.close()
"""


def eight_processes_open(url):
    processes = [start_script(MAKER, url, str(number)) for number in range(8)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 8


def test_eight_processes_make_the_tables_at_once(url):
    eight_processes_open(url)
    assert query(url, "SELECT open FROM conversation") == [(8,)]


def test_a_claim_without_a_heartbeat_goes_to_another(kept, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.05)
    put(kept, "1", "2")
    first = kept.claim()
    kept.save_reply(first, "half", {"sent": 1})
    again = poll(kept.claim)
    assert (again.id, again.reply, again.progress) == ("1", "half", {"sent": 1})
    assert lost(kept, first, again) == [first]
    assert not kept.save_reply(first, "other", {})
    assert not kept.finish(first)
    kept.release(first, 0)
    assert not kept.fail(first, "no")
    assert kept.stats()["failed"] == 0
    assert kept.save_reply(again, "mine", {}) and kept.finish(again)
    assert texts(kept) == [("text of 1", "mine")]


def test_a_claim_with_a_heartbeat_stays(kept, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 0.3)
    put(kept, "1")
    claim = kept.claim()
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        assert lost(kept, claim) == []
        assert kept.claim() is None
        time.sleep(0.02)
    assert kept.finish(claim)
    assert lost(kept, claim) == [claim]


def test_a_message_whose_work_was_cut_short_three_times_is_to_be_given_up(
    kept, monkeypatch
):
    monkeypatch.setattr(store, "LEASE", 0.02)
    put(kept, "bad", "good")
    for _ in range(3):
        claim = poll(kept.claim)
        assert (claim.id, claim.spent) == ("bad", False)
    claim = poll(kept.claim)
    assert (claim.id, claim.spent) == ("bad", True)
    assert kept.fail(claim, "cut short")
    claim = poll(kept.claim)
    assert (claim.id, claim.spent) == ("good", False)
    assert failed(kept) == ["bad"]


def test_a_message_that_nobody_could_give_up_is_failed(kept, monkeypatch, caplog):
    monkeypatch.setattr(store, "LEASE", 0.02)
    put(kept, "bad", "good")
    for _ in range(4):
        assert poll(kept.claim).id == "bad"
    assert poll(kept.claim).id == "good"
    assert failed(kept) == ["bad"]
    assert "bad" in caplog.text and "text of" not in caplog.text


def test_a_release_counts_only_if_the_work_failed(kept):
    put(kept, "1")
    for _ in range(10):
        kept.release(kept.claim(), 0)
    for _ in range(3):
        claim = kept.claim()
        assert not claim.spent
        kept.release(claim, 0, failed=True)
    assert kept.claim().spent


def test_attempts_of_one_message_are_not_those_of_the_next(kept):
    put(kept, "1", "2")
    for _ in range(3):
        kept.release(kept.claim(), 0, failed=True)
    assert fail(kept).spent
    assert not kept.claim().spent


def test_a_released_message_waits_and_keeps_its_turn(kept):
    put(kept, "1", "2")
    put(kept, "other", to="other")
    kept.release(kept.claim(), 0.3)
    released = time.monotonic()
    assert kept.claim().id == "other"
    put(kept, "3")
    assert kept.claim() is None and kept.load() == (3, 1, 0)
    assert poll(kept.claim).id == "1"
    assert time.monotonic() - released > 0.25


def test_progress_is_kept_without_and_beside_a_reply(kept):
    put(kept, "1")
    claim = kept.claim()
    assert kept.save_reply(claim, None, {"key": "k"})
    kept.release(claim, 0)
    claim = kept.claim()
    assert (claim.reply, claim.progress) == (None, {"key": "k"})
    assert kept.save_reply(claim, "yes", {"key": "k"}, remember=False)
    assert kept.save_reply(claim, None, {"sent": 2})
    kept.release(claim, 0)
    claim = kept.claim()
    assert (claim.reply, claim.progress) == ("yes", {"sent": 2})
    kept.finish(claim)
    assert texts(kept) == [], "progress must not make the store remember"


def test_a_turn_that_begins_with_its_reply_is_remembered_on_request(kept):
    kept.add("1", "jared", {"n": 1}, reply="unasked", remember=True)
    kept.add("2", "jared", {"n": 2}, reply="a notice")
    kept.add("3", "jared", {"n": 3})
    assert [kept.state(id) for id in ("1", "0")] == ["open", None]
    for reply in (None, None, "three"):
        claim = kept.claim()
        if reply:
            kept.save_reply(claim, reply, {})
        kept.finish(claim)
    assert kept.history("jared", 9) == [({"n": 1}, "unasked"), ({"n": 3}, "three")]
    assert [kept.state(id) for id in ("1", "2", "3")] == ["done", "gone", "done"]
    kept.add("4", "jared", {}, reply="unsent", remember=True)
    kept.fail(kept.claim(), "why")
    assert kept.state("4") == "failed" and len(kept.history("jared", 9)) == 2


def test_history_gives_the_last_turns_oldest_first(kept):
    for number in range(8):
        put(kept, str(number))
        answer(kept, f"reply {number}")
    put(kept, "open", to="jared")
    assert texts(kept, limit=0) == []
    assert texts(kept, limit=2) == [("text of 6", "reply 6"), ("text of 7", "reply 7")]
    assert len(texts(kept, limit=9)) == 8
    assert kept.add("0", "jared", {}) == KNOWN


def test_what_is_not_to_be_remembered_or_has_no_reply_is_not_in_the_history(kept):
    put(kept, "1", "2", "3", "4")
    answer(kept, remember=False)
    kept.finish(kept.claim())
    answer(kept, "third")
    answer(kept, "")
    assert texts(kept) == [("text of 3", "third")]


def test_nothing_is_left_of_a_text_that_is_not_to_be_remembered(kept, url):
    put(kept, "1", "2")
    answer(kept, remember=False)
    kept.finish(kept.claim())
    left = query(url, "SELECT data, reply, progress FROM message")
    assert left == [(None, None, None)] * 2


def test_messages_of_a_conversation_have_their_turn_by_when_they_were_sent(kept):
    for number, sent in (("3", 30.0), ("1", 10.0), ("4", 30.0), ("2", 20.0)):
        kept.add(number, "jared", {"text": number}, sent=sent)
    assert [answer(kept).id for _ in range(4)] == ["1", "2", "3", "4"]
    turns = kept.history("jared", 3)
    assert [data["text"] for data, _ in turns] == ["2", "3", "4"]


def test_seqs_can_be_made_to_grow_from_turn_to_turn(kept, url):
    kept.add("begun", "jared", {}, sent=25.0)
    begun = kept.claim()
    assert kept.save_reply(begun, None, {"key": "k"})
    kept.release(begun, 0)
    for number in ("4", "2", "3"):
        kept.add(number, "jared", {}, sent=10.0 * int(number))
    kept.add("look-up", "jared", {})
    lost = kept.claim()
    kept.release(lost, 0)
    turns = "SELECT id, seq FROM message ORDER BY sent, seq"
    was = dict(query(url, turns))
    kept.renumber(lost)
    assert dict(query(url, turns)) == was
    held = kept.claim()
    kept.renumber(held)
    now = dict(query(url, turns))
    assert [*now] == ["look-up", "2", "begun", "3", "4"]
    assert now["2"] < now["3"] < now["4"] and {*now.values()} == {*was.values()}
    assert (now["begun"], now["look-up"]) == (was["begun"], was["look-up"])
    kept.add("5", "jared", {}, sent=50.0)
    kept.finish(held)
    claims = [answer(kept) for _ in range(5)]
    assert [claim.id for claim in claims] == ["2", "begun", "3", "4", "5"]
    assert claims[-1].seq > max(was.values())


def test_what_was_put_under_a_name_is_there_until_it_is_forgotten_or_old(kept):
    assert kept.get("jared") is None
    kept.put("jared", {"id": 1})
    kept.put("jared", {"id": "二"})
    kept.put("lin", {})
    assert kept.get("jared") == {"id": "二"}
    kept.forget("jared")
    assert kept.get("jared") is None and kept.get("lin") == {}
    kept.prune(60)
    assert kept.get("lin") == {}
    kept.prune(0)
    assert kept.get("lin") is None


def test_forget_deletes_answers_and_failures_of_one_conversation(kept):
    put(kept, "1", "2", "3")
    put(kept, "4", "5", to="other")
    answer(kept)
    for _ in range(3):
        claim = kept.claim()
        if claim.id == "2":
            assert kept.fail(claim, "no")
        elif claim.id == "4":
            kept.save_reply(claim, "yes", {})
            kept.finish(claim)
    kept.forget("jared")
    assert texts(kept) == [] and kept.failed() == []
    assert texts(kept, "other") == [("text of 4", "yes")]
    assert kept.retry() == 0
    assert [kept.add(id, "jared", {}) for id in "123"] == [KNOWN] * 3
    assert kept.add("6", "jared", {}, room=2) == NEW


def test_what_ended_is_pruned_in_time_and_what_is_open_never(kept, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    put(kept, *"12345")
    for _ in range(3):
        answer(kept)
    fail(kept)
    assert kept.prune(60) == 0
    assert kept.add("1", "jared", {}) == KNOWN
    assert poll(lambda: kept.prune(0)) == 4
    assert kept.prune(0) == 0
    assert texts(kept) == [] and kept.failed() == []
    assert kept.claim().id == "5"
    put(kept, "1")


def test_what_is_open_for_long_hides_nothing_from_prune(kept, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    put(kept, *"abcde", to="long")
    put(kept, *"12345")
    held = kept.claim()
    while (claim := kept.claim()) and kept.finish(claim):
        pass
    assert poll(lambda: kept.prune(0)) == 5
    assert held.id == "a" and kept.load()[:2] == (4, 1)


def test_stats_say_how_much_waits_is_held_and_failed(kept):
    zero = {"waiting": 0, "in_work": 0, "failed": 0, "oldest": 0.0}
    assert kept.stats() == zero and kept.load() == (0, 0, 0)
    put(kept, "1", "2", "3")
    put(kept, "4", to="other")
    fail(kept)
    claim = kept.claim()
    seen = kept.stats()
    assert 0 < seen.pop("oldest") < 5
    assert seen == {"waiting": 2, "in_work": 1, "failed": 1}
    assert kept.load() == (2, 1, 1)
    kept.release(claim, 0)
    assert kept.load() == (3, 0, 2)
    assert kept.stats()["in_work"] == 0


def test_what_users_asked_is_counted_once_and_for_a_minute(kept, monkeypatch):
    for id, asker in (("1", "jared"), ("1", "jared"), ("2", "jared"), ("3", "")):
        kept.add(id, "chat", {}, asker)
    kept.finish(kept.claim())
    assert kept.add("4", "chat", {}, "jared", rate=2) == Added.RATE_LIMITED
    assert kept.add("4", "chat", {}, "jared", rate=3) == NEW
    assert kept.add("5", "chat", {}, "lin", rate=1) == NEW
    assert kept.add("6", "chat", {}, "", rate=1) == NEW
    assert kept.add("1", "chat", {}, "jared", rate=1) == KNOWN, "rather than limited"
    monkeypatch.setattr(store, "MINUTE", 1)
    poll(lambda: kept.add("7", "chat", {}, "jared", rate=1) == NEW)


def test_a_refused_message_leaves_no_trace(kept, url):
    assert kept.add("1", "jared", {}, room=0) == Added.QUEUE_FULL
    assert kept.add("1", "jared", {}, "jared", rate=0) == Added.RATE_LIMITED
    assert query(url, "SELECT * FROM conversation") == []
    assert query(url, "SELECT * FROM message") == []
    put(kept, "1", "2")
    assert kept.add("3", "jared", {}, room=2) == Added.QUEUE_FULL
    kept.finish(kept.claim())
    assert kept.add("3", "jared", {}, room=2) == NEW


@and_pgbouncer
def test_limits_hold_for_all_processes_at_once(kept, opened):
    stores = (kept, opened())

    def add(number):
        where, asker = ("chat", "jared") if number < 16 else ("full", "")
        limits = {"room": 3} if number >= 16 else {"rate": 5}
        return stores[number % 2].add(str(number), where, {}, asker, **limits)

    added = in_threads(32, add)
    assert sorted(added[:16]) == [NEW] * 5 + [Added.RATE_LIMITED] * 11
    assert sorted(added[16:]) == [NEW] * 3 + [Added.QUEUE_FULL] * 13


def test_workers_go_to_the_store_one_at_a_time_while_a_callback_is_there(
    kept, monkeypatch
):
    write, there, seen, free = kept._write, [], [], threading.Event()

    def watched(step, values):
        if step is sql.add_step:
            free.wait(20)
        else:
            there.append(step)
            seen.append(len(there))
            time.sleep(0.05)
            there.pop()
        return write(step, values)

    monkeypatch.setattr(kept, "_write", watched)
    callback = threading.Thread(target=kept.add, args=("1", "jared", {}))
    callback.start()
    poll(lambda: kept._callbacks)
    in_threads(4, lambda _: kept.claim())
    assert max(seen) == 1
    free.set()
    callback.join()
    in_threads(4, lambda _: kept.claim())
    assert max(seen) > 1


@and_pgbouncer
def test_a_cancel_reaches_the_oldest_message_only_and_every_process(kept, opened):
    assert not kept.cancel("jared")
    put(kept, "1", "2")
    put(kept, "3", to="other")
    claims = [kept.claim(), kept.claim()]
    assert opened().cancel("jared")
    assert kept.heartbeat(claims) == ([], claims[:1])
    kept.finish(claims[0])
    later = kept.claim()
    assert later.id == "2" and cancelled(kept, *claims, later) == []


def test_a_cancel_outlives_the_process_that_was_to_stop(kept, monkeypatch):
    put(kept, "1")
    with monkeypatch.context() as patch:
        patch.setattr(store, "LEASE", 0.02)
        first = kept.claim()
    kept.cancel("jared")
    again = poll(kept.claim)
    assert kept.heartbeat([first, again]) == ([first], [again])


def test_failed_messages_are_listed_and_come_back_in_their_turn(kept):
    put(kept, *"12345")
    first = fail(kept, "first")
    claim = kept.claim()
    kept.save_reply(claim, "reply", {"sent": 1})
    kept.fail(claim, "second")
    [one, two] = kept.failed()
    assert one[:3] == (first.seq, "1", "first") and two[1:3] == ("2", "second")
    assert 0 <= two[3] <= one[3] < 5
    held = kept.claim()
    assert kept.retry([claim.seq, held.seq, 10**9]) == 1
    assert kept.claim() is None, "one claim for a conversation"
    assert kept.finish(held)
    assert kept.retry() == 1
    assert kept.failed() == [] and kept.load() == (4, 0, 1)
    ids = [answer(kept, "yes").id for _ in range(4)]
    assert ids == list("1245")


def test_a_retried_message_has_its_reply_and_all_its_attempts(kept):
    put(kept, "1")
    for _ in range(2):
        kept.release(kept.claim(), 0, failed=True)
    claim = kept.claim()
    kept.save_reply(claim, "reply", {"sent": 1})
    kept.cancel("jared")
    kept.fail(claim, "no")
    kept.retry()
    for _ in range(3):
        claim = kept.claim()
        assert not claim.spent
        assert (claim.reply, claim.progress) == ("reply", {"sent": 1})
        assert cancelled(kept, claim) == []
        kept.release(claim, 0, failed=True)
    assert kept.claim().spent


@and_pgbouncer
def test_retries_and_ends_at_once_count_right(kept, opened):
    """What is left of `open` is compared with the messages when the test ends."""
    stores = (kept, opened())
    for number in range(60):
        put(kept, str(number), to=str(number % 6))

    def work(number):
        mine = stores[number % 2]
        for turn in range(20):
            if claim := mine.claim():
                mine.heartbeat([claim])
                mine.fail(claim, "no") if turn % 2 else mine.finish(claim)
            if turn % 5 == number % 5:
                mine.retry()
            if turn % 7 == 0:
                mine.forget(str(number % 6))
            mine.add(f"more {number} {turn}", str(turn % 6), {}, room=8)

    in_threads(8, work)
    kept.retry()
    while claim := kept.claim():
        assert kept.finish(claim)
    assert kept.stats()["oldest"] == 0 == kept.stats()["failed"]


def test_a_record_that_cannot_be_read_is_failed(kept, url):
    put(kept, "1", "2", "3")
    query(url, "UPDATE message SET data = 'not json', progress = '{' WHERE id = '1'")
    query(url, "UPDATE message SET reply = 'not json' WHERE id = '2'")
    assert (answer(kept).id, failed(kept)) == ("2", ["1"])
    query(url, "UPDATE message SET reply = 'not json' WHERE id = '2'")
    assert texts(kept) == []


def test_after_the_clock_was_set_back_nothing_waits_for_it(kept, url):
    put(kept, "held", "behind it", to="jared")
    held = kept.claim()
    put(kept, "1", to="lin")
    query(url, "UPDATE conversation SET due = due + 3000")
    assert kept.claim() is None
    kept.heartbeat([])  # of another process
    assert answer(kept).id == "1"
    assert kept.claim() is None, "who holds a claim has the time to prolong it"
    assert lost(kept, held) == [] and kept.finish(held)
    assert answer(kept).id == "behind it"


def test_a_closed_store_says_so(kept):
    kept.close()
    began = time.monotonic()
    for verb in (kept.claim, kept.stats, lambda: kept.add("1", "jared", {})):
        with pytest.raises(StoreError):
            verb()
    assert time.monotonic() - began < 0.2


ADDER = """
kept = Kind(sys.argv[1])
for number in range(100_000):
    kept.add(str(number), "jared", {})
    print(number, flush=True)
"""


def killed_adder(url):
    """Return what a process acknowledged before it was killed."""
    process = start_script(ADDER, url)
    lines = [process.stdout.readline() for _ in range(100)]
    process.kill()
    lines += process.communicate()[0].splitlines(keepends=True)
    ids = [line.strip() for line in lines if line.endswith("\n")]
    assert len(ids) >= 100
    return ids


@and_pgbouncer
def test_what_was_acknowledged_outlives_a_kill(url, opened):
    ids = killed_adder(url)
    kept = opened()
    assert waiting(kept) >= len(ids)
    assert {kept.add(id, "jared", {}) for id in ids} == {KNOWN}


def test_what_was_acknowledged_outlives_a_crash_of_postgresql(postgres_server):
    ids = killed_adder(postgres_server.url)
    postgres_server.interrupt(0)
    kept = open_url(postgres_server.url)
    assert "before a callback is acknowledged" in kept.durability()
    assert [answer(kept).id for _ in ids] == ids
    postgres_server.interrupt(0)  # what may be lost now can be done again
    assert all(texts(kept, limit=5))
    assert {kept.add(id, "jared", {}) for id in ids} == {KNOWN}
    kept.close()


@pytest.mark.parametrize("more", [0, 1, 5000])
def test_what_was_acknowledged_outlives_a_power_cut_of_sqlite(sqlite, tmp_path, more):
    """Nothing of the WAL is sure to be on the disk but what the last add synced."""
    put(sqlite, "0", "1")
    answer(sqlite)
    put(sqlite, "2", "3")
    wal = tmp_path / "store.db-wal"
    synced = wal.stat().st_size
    answer(sqlite), answer(sqlite), fail(sqlite)
    assert wal.stat().st_size > synced + more
    after = tmp_path / "after"
    after.mkdir()
    shutil.copy(tmp_path / "store.db", after)
    shutil.copy(wal, after)
    os.truncate(after / wal.name, synced + more)
    kept = SQLiteStore(f"sqlite:///{after}/store.db")
    assert [kept.add(id, "jared", {}) for id in "0123"] == [KNOWN] * 4
    assert [answer(kept).id for _ in "123"] == ["1", "2", "3"]
    kept.close()


def test_sqlite_syncs_what_it_adds_and_shares_the_commit(sqlite):
    seen = []
    sqlite._writer.set_trace_callback(seen.append)
    sqlite.add("0", "jared", {})
    sqlite.release(sqlite.claim(), 0)
    sqlite.add("-1", "jared", {})
    verbs = [
        line.split()[-1] if "synchronous" in line else line.split()[0] for line in seen
    ]
    add = ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert verbs == add + ["NORMAL", "UPDATE", "SELECT", "UPDATE", "FULL"] + add
    seen.clear()
    with sqlite._write_lock:  # as if a commit went on
        threads = [
            threading.Thread(target=sqlite.add, args=(str(n), "jared", {}))
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        poll(lambda: len(sqlite._pending) == 8)
    for thread in threads:
        thread.join()
    assert seen.count("COMMIT") == 1 and waiting(sqlite) == 10


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
    SQLiteStore(f"sqlite:///{tmp_path}/new.db").close()
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
    assert sqlite.stats()["waiting"] == 0
    other.execute("ROLLBACK")
    other.close()
    put(sqlite, "1")


def test_sqlite_locked_even_for_readers_fails_soon_and_works_after(sqlite):
    put(sqlite, "1")
    sqlite._read_lock.acquire()  # as if another thread waited for the file

    def read(_):
        began = time.monotonic()
        with pytest.raises(StoreError):
            sqlite.stats()
        return time.monotonic() - began

    assert max(in_threads(8, read)) < 2
    sqlite._read_lock.release()
    assert waiting(sqlite) == 1


def test_sqlite_on_a_full_disk_refuses_and_works_after(sqlite):
    put(sqlite, "1")
    [(pages,)] = sqlite._writer.execute("PRAGMA page_count")
    sqlite._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    for id in "23":
        with pytest.raises(StoreError, match="full"):
            sqlite.add(id, "jared", {"text": "x" * 100_000})
    assert sqlite.claim().id == "1"
    sqlite._writer.execute("PRAGMA max_page_count = 100000").fetchall()
    assert sqlite.add("2", "jared", {"text": "x" * 100_000}) == NEW
    assert waiting(sqlite) == 1


def test_sqlite_that_is_read_only_refuses_and_works_after(sqlite):
    put(sqlite, "1")
    sqlite._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="readonly"):
        sqlite.add("2", "jared", {})
    assert waiting(sqlite) == 1
    sqlite._writer.execute("PRAGMA query_only = OFF")
    put(sqlite, "2")


def test_a_store_goes_on_after_a_step_that_failed(kept, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(kept._sql, "forget", "INSERT INTO message (seq) VALUES (1)")
        with pytest.raises(StoreError):
            kept.forget("jared")
    put(kept, "1")


def test_an_error_within_a_shared_commit_acknowledges_nothing(sqlite, monkeypatch):
    with sqlite._write_lock:  # as if a commit went on
        monkeypatch.setitem(sqlite._sql, "cancel", "no SQL")
        answers = []

        def run(verb, *values):
            try:
                answers.append(verb(*values))
            except StoreError as error:
                answers.append(error)

        steps = [(sqlite.add, "1", "a", {}), (sqlite.cancel, "a")]
        threads = [threading.Thread(target=run, args=step) for step in steps]
        for number, thread in enumerate(threads, 1):
            thread.start()
            poll(lambda number=number: len(sqlite._pending) == number)
    for thread in threads:
        thread.join()
    assert all(isinstance(each, StoreError) for each in answers), answers
    put(sqlite, "1", to="a")


def version_1(path, sql=None):
    """Make a file as version 1.0 did."""
    with closing(sqlite3.connect(path)) as old:
        old.execute("PRAGMA journal_mode = WAL").fetchall()
        old.executescript(sql or (HERE / "tests/version_1.sql").read_text())
    return SQLiteStore(f"sqlite:///{path}")


def test_a_file_of_version_1_goes_on_with_what_waits(tmp_path):
    kept = version_1(tmp_path / "store.db")
    jared, lin = "c2c\t@RBT#001\tjared", "c2c\t@RBT#001\tlin"
    assert kept.load() == (5, 0, 2)
    assert [each[:3] for each in kept.failed()] == [
        (3, "failed", "IM 20003: no such user")
    ]
    assert texts(kept, jared) == [("text of done", "an answer")]
    ids = ("done", "gone", "failed", "half sent", "waiting 1", "waiting 2", "held")
    assert {kept.add(id, "anywhere", {}) for id in ids} == {KNOWN}
    claims = [kept.claim(), kept.claim()]
    assert sorted(claim.id for claim in claims) == ["half sent", "held"]
    half = next(claim for claim in claims if claim.id == "half sent")
    assert (half.conversation, half.reply, half.seq) == (jared, "a long answer", 4)
    assert half.progress == {"sent": 2} and half.data["user"] == "jared"
    for claim in claims:
        assert kept.finish(claim)
    rest = [answer(kept) for _ in range(3)]
    assert [each.id for each in rest if each.conversation == lin] == ["behind it"]
    mine = [each for each in rest if each.conversation == jared]
    assert [each.id for each in mine] == ["waiting 1", "waiting 2"]
    assert [each.data["kind"] for each in mine] == ["question", "unsupported"]
    assert kept.retry() == 1 and answer(kept).reply == "unsent"
    assert kept.claim() is None, "who was refused is not told again"
    kept.close()
    SQLiteStore(f"sqlite:///{tmp_path}/store.db").close()


def test_who_comes_second_waits_until_a_file_of_version_1_is_converted(
    tmp_path, monkeypatch
):
    path = tmp_path / "store.db"
    with closing(sqlite3.connect(path, check_same_thread=False)) as first:
        first.execute("PRAGMA journal_mode = WAL").fetchall()
        first.executescript((HERE / "tests/version_1.sql").read_text())
        first.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(store, "BUSY_TIMEOUT", 0.01)
        timer = threading.Timer(0.2, first.rollback)
        timer.start()
        kept = SQLiteStore(f"sqlite:///{path}")
        timer.join()
    assert kept.load() == (5, 0, 2)
    kept.close()


def test_a_file_of_version_1_gives_no_number_twice(tmp_path):
    kept = version_1(tmp_path / "store.db")
    put(kept, "new")
    [(last,)] = query(f"sqlite:///{tmp_path}/store.db", "SELECT max(seq) FROM message")
    assert last == 11, "10 was a message that is not told again"
    kept.close()


def test_eight_processes_open_a_file_of_version_1_at_once(tmp_path):
    sql = (HERE / "tests/version_1.sql").read_text()
    with closing(sqlite3.connect(tmp_path / "store.db")) as old:
        old.executescript(sql)
    eight_processes_open(f"sqlite:///{tmp_path}/store.db")


def test_a_file_from_before_limits_were_kept_there_is_opened(tmp_path):
    sql = (HERE / "tests/version_1.sql").read_text()
    sql = re.sub(r"CREATE INDEX message_asked[^;]*;|    asker TEXT,\n", "", sql)
    kept = version_1(tmp_path / "store.db", re.sub(r"INSERT INTO \"message.*", "", sql))
    assert kept.add("1", "jared", {}, "jared") == NEW and answer(kept).id == "1"
    kept.close()


@pytest.mark.parametrize(
    "url", ["sqlite://store.db", "sqlite:///", "sqlite:///a.db?mode=ro"]
)
def test_an_unusable_sqlite_url_is_an_error_that_says_how(url):
    with pytest.raises(StoreError, match="not like sqlite:///file.db"):
        SQLiteStore(url)


def test_a_relative_sqlite_url_is_a_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SQLiteStore("sqlite:///here.db").close()
    assert (tmp_path / "here.db").exists()


def test_sqlite_that_cannot_be_opened_says_which_file(tmp_path):
    with pytest.raises(StoreError, match="missing/store.db cannot be opened"):
        SQLiteStore(f"sqlite:///{tmp_path}/missing/store.db")


def test_sqlite_files_are_readable_by_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        kept = SQLiteStore(f"sqlite:///{tmp_path}/store.db")
        put(kept, "1")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {f"store.db{end}": 0o600 for end in ("", "-wal", "-shm")}
    kept.close()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_sqlite_file_that_is_deleted_or_replaced_is_noticed(sqlite, tmp_path, how):
    put(sqlite, "1")
    if how == "replaced":
        SQLiteStore(f"sqlite:///{tmp_path}/other.db").close()
        (tmp_path / "other.db").replace(tmp_path / "store.db")
    else:
        (tmp_path / "store.db").unlink()
    with pytest.raises(StoreError, match="store.db was deleted or replaced: restart"):
        sqlite.add("2", "jared", {})


LOOK = "kept = Kind(sys.argv[1]); print(kept.stats()['waiting']); kept.close()"


def test_a_second_store_on_a_file_does_not_take_the_locks_of_the_first(
    sqlite, tmp_path
):
    """If it did, the next process that closes the file would delete its WAL."""
    url = f"sqlite:///{tmp_path}/store.db"
    put(sqlite, "1")
    with closing(SQLiteStore(url)):
        assert start_script(LOOK, url).communicate(timeout=20) == ("1\n", "")
        put(sqlite, "2")
        assert start_script(LOOK, url).communicate(timeout=20) == ("2\n", "")


def left_of_a_secret(folder):
    files = list(folder.glob("store.db*"))
    assert len(files) == 3
    return [file.name for file in files if b"SECRET" in file.read_bytes()]


def test_sqlite_leaves_no_byte_of_what_was_forgotten(sqlite, tmp_path):
    long = "SECRET" * 5000
    for number in range(40):
        put(sqlite, f"open {number}", to=f"other {number}")
        sqlite.add(f"short {number}", "jared", {"text": "SECRET question"})
        sqlite.add(f"long {number}", "jared", {"text": long})
    held = []
    while claim := sqlite.claim():
        if claim.conversation != "jared":
            held.append(claim)
            continue
        remember = claim.seq % 3 > 0
        sqlite.save_reply(claim, "SECRET " + long, {"at": "SECRET"}, remember)
        if claim.seq % 5:
            sqlite.finish(claim)
        else:
            sqlite.fail(claim, "SECRET reason")
    assert len(held) == 40
    sqlite.forget("jared")
    sqlite.prune(60)
    assert left_of_a_secret(tmp_path) == []
    assert b"text of open" in (tmp_path / "store.db").read_bytes()


def test_nor_does_the_file_of_version_1_that_it_was(tmp_path):
    sql = (HERE / "tests/version_1.sql").read_text()
    kept = version_1(tmp_path / "store.db", sql.replace("text of", "SECRET"))
    for conversation in ("c2c\t@RBT#001\tjared", "c2c\t@RBT#001\tlin"):
        while claim := kept.claim():
            kept.finish(claim)
        kept.forget(conversation)
    assert left_of_a_secret(tmp_path) == []
    kept.close()


# What SQLite reads from one end to the other, and why it may.
FAILED = "SCAN message USING INDEX message_failed"  # which holds nothing else
ALL_OPEN = "SEARCH conversation USING INDEX conversation_due"
MEANT_SCANS = {
    "load": {"SCAN conversation"},  # counts all of it; it holds only what is open
    "stats": {ALL_OPEN, FAILED},  # finds the oldest of what is open
    "failed": {FAILED},
    "span": {"SEARCH message"},  # for its first and its last
}


def test_sqlite_answers_its_questions_from_indexes(sqlite):
    assert set(MEANT_SCANS) <= set(sqlite._sql)
    for name, sql in sqlite._sql.items():
        values = dict.fromkeys(re.findall(r":(\w+)", sql))
        plan = sqlite._reader.execute(f"EXPLAIN QUERY PLAN {sql}", values)
        # Whether an index covers all that is asked depends on SQLite's version.
        plan = [step.replace(" COVERING", "") for *_, step in plan]
        steps = [step for step in plan if re.match(".* (message|conversation)", step)]
        scans = {step for step in steps if not re.search(r"[(].*[)]", step)}
        assert scans == MEANT_SCANS.get(name, set()), name


@contextmanager
def hanging(server):
    """Have all processes of a PostgreSQL stand still."""
    postmaster = str(server.process.pid)
    command = ["ps", "-o", "pid=", "--pid", postmaster, "--ppid", postmaster]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in found.stdout.split()]

    def send(number):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    send(signal.SIGSTOP)
    try:
        yield
    finally:
        send(signal.SIGCONT)


def timed_errors(kept, count):
    """Return how long `count` callbacks at once took to be refused."""

    def add(number):
        began = time.monotonic()
        with pytest.raises(StoreError):
            kept.add(f"refused {number}", "jared", {})
        return time.monotonic() - began

    return in_threads(count, add)


def test_postgresql_gone_is_an_error_in_time_and_over_when_it_is_back(postgres_server):
    with closing(open_url(postgres_server.url)) as kept:
        in_threads(8, lambda n: put(kept, str(n)))
        for mode in ("fast", "immediate"):
            postgres_server.stop(mode)
            assert max(timed_errors(kept, 12)) < 1.5
            with pytest.raises(StoreError, match="PostgreSQL cannot be used"):
                kept.stats()
            postgres_server.start()
            put(kept, mode)
        assert kept.add("0", "jared", {}) == KNOWN
        assert kept.load() == (10, 0, 1)


def test_what_was_finished_stays_so_if_postgresql_crashes(postgres_server):
    """While the bot lives on, nobody would know that it was answered."""
    with closing(open_url(postgres_server.url)) as kept:
        for number in range(20):
            put(kept, str(number))
            answer(kept)
        postgres_server.stop("immediate")
        postgres_server.start()
        assert waiting(kept) == 0


def test_a_restart_of_postgresql_is_no_error(postgres_server):
    with closing(open_url(postgres_server.url)) as kept:
        in_threads(8, lambda n: put(kept, str(n)))
        for mode in ("fast", "immediate"):
            postgres_server.stop(mode)
            postgres_server.start()
            in_threads(8, lambda n, mode=mode: put(kept, f"{mode} {n}"))
        assert waiting(kept) == 24


def test_postgresql_that_hangs_is_an_error_in_time(postgres_server):
    with closing(open_url(postgres_server.url)) as kept:
        in_threads(8, lambda n: put(kept, str(n)))
        with hanging(postgres_server):
            assert max(timed_errors(kept, 12)) < 2
            late = open_url(postgres_server.url)  # starts all the same
            assert max(timed_errors(late, 12)) < 2
        put(kept, "new")
        put(late, "newer")
        late.close()


def test_a_lock_in_postgresql_is_an_error_in_time_and_costs_no_more(
    postgres, shared_postgres
):
    import psycopg

    put(postgres, "1")
    with psycopg.connect(shared_postgres.url) as other:
        other.execute("LOCK TABLE message IN EXCLUSIVE MODE")
        assert max(timed_errors(postgres, 8)) < 2
        assert postgres.history("jared", 5) == []
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
        poll(lambda: not query(shared_postgres.url, waits))
    put(postgres, "2")
    assert waiting(postgres) == 2


def test_a_claim_waits_for_nobody_who_writes_to_a_conversation(
    postgres, shared_postgres
):
    import psycopg

    put(postgres, "1", to="jared")
    put(postgres, "2", to="lin")
    with psycopg.connect(shared_postgres.url) as other:
        other.execute("UPDATE conversation SET open = open WHERE name = 'jared'")
        assert postgres.claim().id == "2"
        assert postgres.claim() is None
    assert postgres.claim().id == "1"


def test_a_start_waits_for_nobody_who_looks_after_the_tables(postgres, shared_postgres):
    import psycopg

    with psycopg.connect(shared_postgres.url) as other:
        other.execute("LOCK TABLE message IN SHARE UPDATE EXCLUSIVE MODE")  # vacuum
        with closing(open_url(shared_postgres.url)) as kept:
            put(kept, "1")
    assert waiting(postgres) == 1


def test_postgresql_starts_later_than_the_bot(postgres_server):
    postgres_server.stop()
    with closing(open_url(postgres_server.url)) as kept:
        with pytest.raises(StoreError, match="failed: Connection refused$"):
            kept.load()
        postgres_server.start()
        assert set(in_threads(8, lambda n: kept.add(str(n), "jared", {}))) == {NEW}


def test_a_process_has_four_connections_at_the_most_and_leaves_none(
    postgres, shared_postgres
):
    def count():
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ours'"
        return query(shared_postgres.url, sql)[0][0]

    with closing(open_url(f"{shared_postgres.url}?application_name=ours")) as kept:
        in_threads(40, lambda n: put(kept, str(n)))
        assert waiting(kept) == 40 and 1 <= count() <= 4
    poll(lambda: count() == 0)


def test_postgresql_of_other_habits_will_do(shared_postgres):
    """An old encoding, another isolation, as a platform may have set them."""
    query(shared_postgres.url, "DROP DATABASE IF EXISTS odd")
    query(
        shared_postgres.url,
        "CREATE DATABASE odd ENCODING 'SQL_ASCII' TEMPLATE template0",
    )
    for setting in (
        "default_transaction_isolation = serializable",
        "standard_conforming_strings = off",
    ):
        query(shared_postgres.url, f"ALTER DATABASE odd SET {setting}")
    with closing(open_url(shared_postgres.url.replace("/postgres", "/odd"))) as kept:
        in_threads(8, lambda n: [put(kept, f"你好\\' {n} {i}") for i in range(10)])
        assert answer(kept, "好").id.startswith("你好\\' ")
        assert texts(kept)[0][1] == "好"


def test_pgbouncer_may_restart_and_its_server_too(postgres_server):
    from conftest import started

    from benchmark.databases import PgBouncer

    with (
        started(PgBouncer, postgres_server) as bouncer,
        closing(open_url(bouncer.url)) as kept,
    ):
        in_threads(8, lambda n: put(kept, str(n)))
        bouncer.stop()
        bouncer.start()
        in_threads(8, lambda n: put(kept, f"again {n}"))
        postgres_server.interrupt(0)
        in_threads(8, lambda n: put(kept, f"once more {n}"))
        assert waiting(kept) == 24


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://x:pa%zzsswor@h/d",
        "postgresql://x:pa%2fsswor@127.0.0.1:1/d",
        "postgresql://x:pa/sswor@h/d",
        "postgresql://x:passwor@h:port/d",
        "postgresql://x:passwor@no.such.host.invalid/d",
        "postgres://[passwor/d",
        "postgres://x:passwor@h/d?nothing=1",
    ],
)
def test_an_unusable_postgresql_url_is_an_error_without_its_password(url):
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as caught:
        with closing(open_url(url)) as kept:
            kept.claim()
    said = str(caught.value).replace("user:password", "")
    assert "pa" not in said.split() and "sswor" not in said


def test_a_wrong_postgresql_password_is_an_error_that_does_not_say_it(shared_postgres):
    # A password that is in the text of the error, as if the driver had quoted it.
    url = shared_postgres.url.replace(shared_postgres.password, "authentication")
    with pytest.raises(StoreError, match="password .* failed") as caught:
        open_url(url)
    assert "authentication" not in str(caught.value)


def test_an_error_of_postgresql_quotes_no_message(postgres, shared_postgres):
    query(
        shared_postgres.url,
        "ALTER TABLE message ADD CONSTRAINT small CHECK (length(data) < 20)",
    )
    with pytest.raises(StoreError, match="violates check constraint") as caught:
        postgres.add("1", "jared", {"text": "a text of a user"})
    assert "jared" not in str(caught.value) and "a text" not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "postgres", raising=False)
    with pytest.raises(SettingsError, match="psycopg.*see requirements.txt"):
        open_url("postgresql://127.0.0.1/d")


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("db.example.com", False),
        ("8.8.8.8", False),
        ("[2001:4860:4860::8888]", False),
        ("db.example.com,db", False),
        ("127.0.0.1", True),
        ("[::1]", True),
        ("10.1.2.3", True),
        ("localhost", True),
        ("db", True),
        ("db.internal", True),
        ("", True),
        ("%2Fvar%2Frun", True),
    ],
)
def test_tls_is_required_unless_the_host_is_private(host, private):
    _conninfo = pytest.importorskip("postgres")._conninfo
    said, password = _conninfo(f"postgresql://bot:p%40ss@{host}/d")
    assert ("sslmode=require" not in said) == private and password == "p@ss"
    assert (
        "sslmode=verify-full"
        in _conninfo(f"postgres://{host}/d?sslmode=verify-full")[0]
    )


def test_postgresql_for_a_public_host_without_tls_is_an_error(shared_postgres):
    with pytest.raises(StoreError, match="SSL"):
        open_url(shared_postgres.url + "?sslmode=require")


def test_durability_says_what_a_store_promises(sqlite, postgres):
    assert "before a callback is acknowledged" in sqlite.durability()
    with pytest.raises(StoreError, match="fsync off"):
        postgres.durability()


@and_pgbouncer
def test_a_cancel_reaches_a_message_that_is_claimed_later(kept):
    put(kept, "1", "2")
    assert kept.cancel("jared")
    claim = kept.claim()
    assert cancelled(kept, claim) == [claim]
    kept.finish(claim)
    assert cancelled(kept, kept.claim()) == []
