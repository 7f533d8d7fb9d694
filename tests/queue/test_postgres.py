"""The store in PostgreSQL: outages, locks, connections, TLS and URLs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest
from conftest import in_threads, poll, started
from stores import (
    KNOWN,
    NEW,
    NO_TABLES,
    answer,
    killed_adder,
    opened,
    put,
    query,
    texts,
    waiting,
)

from benchmark.databases import PgBouncer
from imbot.queue import StoreBusy, StoreError, open_store

postgres = pytest.importorskip("imbot.queue.postgres")


@pytest.fixture
def url(shared_postgres):
    query(shared_postgres.url, NO_TABLES)
    return shared_postgres.url


@pytest.fixture
def store(url):
    store = opened(url)
    yield store
    store.close()


@contextmanager
def hanging(server):
    """Let all processes of a PostgreSQL stand still."""
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


@contextmanager
def beside(url, sql):
    """Let another program be in the middle of a transaction."""
    import psycopg

    with psycopg.connect(url) as other:
        other.execute(sql)
        yield


def timed_errors(store, count):
    """Return how long `count` callbacks at once took to be refused."""

    def add(number):
        began = time.monotonic()
        with pytest.raises(StoreError):
            store.add(f"refused {number}", "jared", {})
        return time.monotonic() - began

    return in_threads(count, add)


@pytest.mark.slow
def test_gone_it_is_an_error_in_time_and_over_when_it_is_back(postgres_server):
    with closing(opened(postgres_server.url)) as store:
        in_threads(8, lambda n: put(store, str(n)))
        for mode in ("fast", "immediate"):
            postgres_server.stop(mode)
            assert max(timed_errors(store, 12)) < 1.5
            with pytest.raises(StoreError, match="PostgreSQL cannot be used"):
                store.stats()
            postgres_server.start()
            put(store, mode)
        assert store.add("0", "jared", {}) == KNOWN
        assert store.load() == (10, 0, 1)


@pytest.mark.slow
def test_gone_it_costs_the_callbacks_of_a_server_no_time(postgres_server):
    """Eight threads must refuse more callbacks than come, or sockets pile up."""
    with closing(opened(postgres_server.url)) as store:
        put(store, "1")
        postgres_server.stop()
        timed_errors(store, 1)
        refused = sorted(sum((timed_errors(store, 8) for _ in range(3)), []))
        assert refused[20] < 0.5, "all but the three that tried"


@pytest.mark.slow
def test_what_was_acknowledged_outlives_a_crash(postgres_server):
    ids = killed_adder(postgres_server.url)
    postgres_server.interrupt(0)
    store = opened(postgres_server.url)
    assert "before a callback is acknowledged" in store.durability()
    assert [answer(store).id for _ in ids] == ids
    postgres_server.interrupt(0)  # what may be lost now can be done again
    assert all(texts(store, limit=5))
    assert {store.add(id, "jared", {}) for id in ids} == {KNOWN}
    store.close()


@pytest.mark.slow
def test_what_was_finished_or_to_be_sent_outlives_a_crash(postgres_server):
    """While the bot lives on, nobody would know that it was answered."""
    with closing(opened(postgres_server.url)) as store:
        for number in range(20):
            put(store, str(number))
            answer(store)
        put(store, "answered")
        claim = store.claim()
        store.save_reply(claim, "the answer", {})
        postgres_server.stop("immediate")
        postgres_server.start()
        assert waiting(store) == 0
        store.release(claim, 0)
        assert store.claim().reply == "the answer"


@pytest.mark.slow
def test_a_restart_is_no_error(postgres_server):
    with closing(opened(postgres_server.url)) as store:
        in_threads(8, lambda n: put(store, str(n)))
        for mode in ("fast", "immediate"):
            postgres_server.stop(mode)
            postgres_server.start()
            in_threads(8, lambda n, mode=mode: put(store, f"{mode} {n}"))
        assert waiting(store) == 24


@pytest.mark.slow
def test_hanging_it_is_an_error_in_time(postgres_server):
    with closing(opened(postgres_server.url)) as store:
        in_threads(8, lambda n: put(store, str(n)))
        with hanging(postgres_server):
            assert max(timed_errors(store, 12)) < 2
            late = opened(postgres_server.url)  # starts all the same
            assert max(timed_errors(late, 12)) < 2
        put(store, "new")
        put(late, "newer")
        late.close()


@pytest.mark.slow
def test_read_only_it_refuses_and_says_so(store, url):
    put(store, "1")
    read_only = "options=-cdefault_transaction_read_only%3Don"
    with closing(opened(f"{url}?{read_only}")) as after_a_failover:
        for verb in (
            after_a_failover.check,
            lambda: after_a_failover.add("2", "jared", {}),
        ):
            with pytest.raises(StoreError, match="read-only transaction: name the ser"):
                verb()
        assert waiting(after_a_failover) == 1
    store.check()


@pytest.mark.slow
def test_a_lock_is_an_error_in_time_and_costs_no_more(store, url):
    put(store, "1")
    with beside(url, "LOCK TABLE message IN EXCLUSIVE MODE"):
        assert max(timed_errors(store, 8)) < 2
        assert store.history("jared", 5) == []
        poll(lambda: not query(url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
    put(store, "2")
    assert waiting(store) == 2


@pytest.mark.slow
def test_workers_that_wait_leave_callbacks_and_heartbeats_a_connection(url):
    with closing(opened(url, turn=0.3, step=5.0)) as store:
        put(store, "1")
        claim = store.claim()
        with beside(url, "LOCK TABLE kept IN EXCLUSIVE MODE"):
            workers = [
                threading.Thread(target=store.put, args=("x", {})) for _ in range(3)
            ]
            for worker in workers:
                worker.start()
            waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
            poll(lambda: len(query(url, waits)) == 3)
            with pytest.raises(StoreBusy):
                store.put("y", {})
            put(store, "2")
            assert store.heartbeat([claim]) == ([], [])
            assert store.load() == (1, 1, 0)
        for worker in workers:
            worker.join()


@pytest.mark.slow
def test_a_full_pool_is_busy_and_not_down(url):
    with closing(opened(url, connection=0.2, step=5.0)) as store:
        put(store, "1")
        with beside(url, "LOCK TABLE message IN EXCLUSIVE MODE"):
            adders = [
                threading.Thread(target=store.add, args=(str(n), f"chat {n}", {}))
                for n in range(4)
            ]
            for adder in adders:
                adder.start()
            waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
            poll(lambda: len(query(url, waits)) == 4)
            with pytest.raises(StoreBusy):
                store.load()
        for adder in adders:
            adder.join()
        assert waiting(store) == 4


@pytest.mark.slow
def test_a_claim_waits_for_nobody_who_writes_to_a_conversation(store, url):
    put(store, "1", to="jared")
    put(store, "2", to="lin")
    with beside(url, "UPDATE conversation SET open = open WHERE name = 'jared'"):
        assert store.claim().id == "2"
        assert store.claim() is None
    assert store.claim().id == "1"


@pytest.mark.slow
def test_what_is_retried_while_it_is_to_be_forgotten_stays_open(store, url):
    put(store, "1")
    store.fail(store.claim(), "no")
    retried = """UPDATE message SET state = 'open', ended = NULL;
        INSERT INTO conversation (name, open, due) VALUES ('jared', 1, 0)"""
    forgetting = threading.Thread(target=store.forget, args=("jared",))
    with beside(url, retried):
        forgetting.start()
        poll(lambda: query(url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
    forgetting.join()
    assert store.state("1") == "open" and store.claim().data["text"] == "text of 1"


@pytest.mark.slow
def test_a_start_waits_for_nobody_who_looks_after_the_tables(store, url):
    with beside(url, "LOCK TABLE message IN SHARE UPDATE EXCLUSIVE MODE"):  # vacuum
        with closing(opened(url)) as another:
            put(another, "1")
    assert waiting(store) == 1


@pytest.mark.slow
def test_it_starts_later_than_the_bot(postgres_server):
    postgres_server.stop()
    with closing(opened(postgres_server.url)) as store:
        with pytest.raises(StoreError, match="failed: Connection refused$"):
            store.load()
        postgres_server.start()
        assert set(in_threads(8, lambda n: store.add(str(n), "jared", {}))) == {NEW}


@pytest.mark.slow
def test_another_apps_database_is_found_out_also_if_it_starts_later(postgres_server):
    open_store(postgres_server.url, app=1).close()
    postgres_server.stop()
    with closing(open_store(postgres_server.url, app=2)) as store:
        postgres_server.start()
        for verb in (store.claim, store.load, lambda: store.add("1", "jared", {})):
            with pytest.raises(StoreError, match="IM_SDKAPPID 1, and this server's"):
                verb()


@pytest.mark.slow
def test_a_process_has_at_most_four_connections_and_leaves_none(url):
    def count():
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ours'"
        return query(url, sql)[0][0]

    with closing(opened(f"{url}?application_name=ours")) as store:
        in_threads(40, lambda n: put(store, str(n)))
        assert waiting(store) == 40 and 1 <= count() <= 4
    poll(lambda: count() == 0)


@pytest.mark.slow
def test_other_habits_of_a_platform_are_no_trouble(shared_postgres):
    """An old encoding, another isolation."""
    url = shared_postgres.url
    query(url, "DROP DATABASE IF EXISTS odd")
    query(url, "CREATE DATABASE odd ENCODING 'SQL_ASCII' TEMPLATE template0")
    for setting in (
        "default_transaction_isolation = serializable",
        "standard_conforming_strings = off",
    ):
        query(url, f"ALTER DATABASE odd SET {setting}")
    with closing(opened(url.replace("/postgres", "/odd"))) as store:
        in_threads(8, lambda n: [put(store, f"你好\\' {n} {i}") for i in range(10)])
        assert answer(store, "好").id.startswith("你好\\' ")
        assert texts(store)[0][1] == "好"


@pytest.mark.slow
def test_pgbouncer_may_restart_and_its_server_too(postgres_server):
    with (
        started(PgBouncer, postgres_server) as bouncer,
        closing(opened(bouncer.url)) as store,
    ):
        in_threads(8, lambda n: put(store, str(n)))
        bouncer.stop()
        bouncer.start()
        in_threads(8, lambda n: put(store, f"again {n}"))
        postgres_server.interrupt(0)
        in_threads(8, lambda n: put(store, f"once more {n}"))
        assert waiting(store) == 24


@pytest.mark.slow
def test_a_wrong_password_is_an_error_that_does_not_say_it(shared_postgres):
    # A password that is in the text of the error, as if the driver had quoted it.
    url = shared_postgres.url.replace(shared_postgres.password, "authentication")
    with pytest.raises(StoreError, match="password .* failed") as caught:
        opened(url)
    assert "authentication" not in str(caught.value)


@pytest.mark.slow
def test_an_error_quotes_no_message(store, url):
    query(url, "ALTER TABLE message ADD CONSTRAINT small CHECK (length(data) < 20)")
    with pytest.raises(StoreError, match="violates check constraint") as caught:
        store.add("1", "jared", {"text": "a text of a user"})
    assert "jared" not in str(caught.value) and "a text" not in str(caught.value)


@pytest.mark.slow
def test_a_public_host_without_tls_is_an_error(shared_postgres):
    with pytest.raises(StoreError, match="SSL"):
        opened(shared_postgres.url + "?sslmode=require")


@pytest.mark.slow
def test_a_server_that_promises_nothing_is_an_error_of_durability(store):
    with pytest.raises(StoreError, match="fsync off"):
        store.durability()


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imbot.queue.postgres", None)
    with pytest.raises(StoreError, match="postgres.*see requirements.txt"):
        opened("postgresql://127.0.0.1/d")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://x:Hunter@2Tail@db.example.com/d", "write %40 for @"),
        ("postgresql://x:Hunter%Tail@db.example.com/d", "write %25 for %"),
        ("postgresql://x:Hunter%zzTail@h/d", "write %25 for %"),
        ("postgresql://x:Hunter/Tail@h/d", "write %2F for /"),
        ("postgresql://x:12/Tail@h/d", "write %2F for /"),
        ("postgresql://x:Hunter/?Tail=1@h/d", "write %2F for /"),
        ("postgres://[Hunter/d", "not like postgresql://"),
        ("postgres://x:Hunter@h/d?pgbouncer=true", "pgbouncer is not a parameter"),
        ("postgres://x:Hunter@h/d?schema=public", "schema is not a parameter"),
    ],
)
def test_a_url_that_cannot_work_is_an_error_without_its_password(url, why):
    with pytest.raises(StoreError, match=why) as caught:
        opened(url)
    said = str(caught.value)
    assert "Hunter" not in said and "Tail" not in said and "12" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://x:pa%2fsswor@127.0.0.1:1/d",
        "postgresql://x:passwor@h:port/d",
        "postgresql://x:passwor@no.such.host.invalid/d",
    ],
)
def test_a_url_that_leads_nowhere_is_an_error_without_its_password(url):
    with pytest.raises(StoreError) as caught:
        with closing(opened(url, wait=True)) as store:
            store.claim()
    assert "passwor" not in str(caught.value) and "sswor" not in str(caught.value)


def test_a_host_without_an_address_stops_the_start_unless_it_may_wait():
    url = "postgresql://x:passwor@no.such.host.invalid/d"
    with pytest.raises(StoreError, match="no.such.host.invalid.*DATABASE_WAIT=1"):
        opened(url)
    opened(url, wait=True).close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://x:p%40%25%2F@h:5432/d?application_name=bot&sslmode=disable",
        "postgresql://h/d?user=x@cloud&password=p",
        "postgresql://x:p@[::1]:5432,h2/d?target_session_attrs=read-write&ssl=true",
        "postgresql:///d?host=/var/run",
    ],
)
def test_a_url_that_can_work_is_taken(url):
    assert postgres.conninfo_of(url)


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
        ("10.1.2.3,10.1.2.4", True),
        ("db1.internal:5432,db2.internal:5432", True),
        ("localhost", True),
        ("db", True),
        ("db.internal", True),
        ("", True),
        ("%2Fvar%2Frun", True),
    ],
)
def test_tls_is_required_unless_every_host_is_private(host, private):
    said, password = postgres.conninfo_of(f"postgresql://bot:p%40ss@{host}/d")
    assert ("sslmode=require" not in said) == private and password == "p@ss"


def test_a_certificate_is_verified_by_those_of_the_machine_or_by_ones_own():
    url = "postgres://db.example.com/d?sslmode=verify-full"
    assert "sslrootcert=system" in postgres.conninfo_of(url)[0]
    assert "sslrootcert=my.crt" in postgres.conninfo_of(f"{url}&sslrootcert=my.crt")[0]
