"""The store in a SQLite file: locks, disks, files, and what is left of a text."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

import pytest
from conftest import in_threads, poll
from stores import (
    KNOWN,
    NEW,
    answer,
    fail,
    full_disk,
    opened,
    put,
    query,
    start_script,
    waiting,
)

from imbot.queue import StoreError, open_store
from imbot.queue.sql import SQL
from imbot.queue.sqlite import LONGEST_WAL, SQLiteStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
def url(path):
    return f"sqlite:///{path}"


@pytest.fixture
def store(url):
    store = opened(url)
    yield store
    store.close()


@contextmanager
def locked(path, how="EXCLUSIVE"):
    """Let another program hold the file."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as other:
        other.execute(f"BEGIN {how}")
        yield
        other.execute("ROLLBACK")


@contextmanager
def refusing(url, event, reason):
    """Let SQLite refuse a change of a table, as a file that is read-only does."""
    raised = f"SELECT RAISE(ABORT, '{reason}')"
    query(url, f"CREATE TRIGGER refuse BEFORE {event} BEGIN {raised}; END")
    yield
    query(url, "DROP TRIGGER refuse")


@pytest.mark.parametrize("more", [0, 1, 5000])
def test_what_was_acknowledged_outlives_a_power_cut(store, path, tmp_path, more):
    """Nothing of the WAL is sure to be on the disk but what the last add synced."""
    put(store, "0", "1")
    answer(store)
    put(store, "2", "3")
    synced = wal_of(path).stat().st_size
    store.release(store.claim(), 0), store.put("x", {}), fail(store)
    assert wal_of(path).stat().st_size > synced + more
    with closing(after_a_power_cut(path, tmp_path, synced + more)) as later:
        assert [later.add(id, "jared", {}) for id in "0123"] == [KNOWN] * 4
        assert [answer(later).id for _ in "123"] == ["1", "2", "3"]


def wal_of(path):
    return path.with_name(f"{path.name}-wal")


def after_a_power_cut(path, tmp_path, size):
    """Open what is left of the files if only so much of the WAL was synced."""
    after = tmp_path / "after"
    after.mkdir()
    shutil.copy(path, after)
    shutil.copy(wal_of(path), after)
    os.truncate(after / wal_of(path).name, size)
    query(f"sqlite:///{after}/{path.name}", "UPDATE conversation SET due = 0")
    return opened(f"sqlite:///{after}/{path.name}")


def traced(store):
    """Return a list that gets the SQL the store writes with."""
    seen = []
    store._writer.set_trace_callback(seen.append)
    return seen


def test_it_syncs_what_it_adds_and_shares_the_commit(store, path):
    seen = traced(store)
    store.add("0", "jared", {})
    store.release(store.claim(), 0)
    store.add("-1", "jared", {})
    verbs = [
        line.split()[-1] if "synchronous" in line else line.split()[0] for line in seen
    ]
    add = ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    claim = ["BEGIN", "UPDATE", "SELECT", "COMMIT"]
    assert verbs == add + ["NORMAL", *claim, "UPDATE", "FULL"] + add
    seen.clear()
    with locked(path):  # the first one waits, and seven behind it
        threads = [
            threading.Thread(target=store.add, args=(str(n), "jared", {}))
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        poll(lambda: "BEGIN IMMEDIATE" in seen)
        time.sleep(0.1)  # for the others to get in line
    for thread in threads:
        thread.join()
    assert seen.count("COMMIT") < 8 and waiting(store) == 10


def test_an_error_within_a_shared_commit_acknowledges_nothing(store, url, path):
    put(store, "0", to="a")
    answers = {}

    def run(name, verb, *values):
        try:
            answers[name] = verb(*values)
        except StoreError as error:
            answers[name] = error

    steps = {"first": (store.put, "x", {}), "cancel": (store.cancel, "a")}
    steps |= {id: (store.add, id, "b", {}) for id in "1234"}
    threads = [
        threading.Thread(target=run, args=(name, *step)) for name, step in steps.items()
    ]
    with refusing(url, "UPDATE OF cancelled ON conversation", "no"):
        with locked(path):
            for thread in threads:
                thread.start()
                time.sleep(0.02)  # for it to get in line
        for thread in threads:
            thread.join()
    assert isinstance(answers["cancel"], StoreError)
    for id in "1234":
        assert (store.state(id) == "open") == (answers[id] == NEW), answers
    put(store, "5", to="b")


def test_it_gets_its_turn_beside_a_program_that_writes_all_the_time(store, path):
    in_use, done = threading.Event(), threading.Event()

    def hog():
        while not done.is_set():
            with locked(path, "IMMEDIATE"):
                in_use.set()
                time.sleep(0.02)
                in_use.clear()
            time.sleep(0.001)

    thread = threading.Thread(target=hog)
    thread.start()
    try:
        for id in "0123456789":
            in_use.wait()
            put(store, id)
    finally:
        done.set()
        thread.join()


def test_a_start_waits_for_whoever_creates_the_file(url, path):
    with closing(sqlite3.connect(path)) as other:
        other.executescript("CREATE TABLE t (x)")
    with locked(path, "IMMEDIATE"):
        starting = threading.Thread(target=lambda: opened(url).close())
        starting.start()
        time.sleep(0.1)
        assert starting.is_alive()
    starting.join(20)
    assert query(url, "SELECT * FROM message") == []


def test_locked_by_another_program_it_fails_soon_and_works_after(url, path):
    store = opened(url, locked=0.8)

    def add(number):
        began = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            store.add(str(number), "jared", {})
        return time.monotonic() - began

    with closing(store):
        with locked(path):
            assert max(in_threads(8, add)) < 1.5, "one wait for all of them"
            assert store.stats()["waiting"] == 0
        put(store, "1")


def test_reads_wait_for_one_another_only_so_long(url):
    with closing(opened(url, locked=0.1)) as store:
        put(store, "1")
        with store._read_lock:  # as if another thread waited for the disk
            with pytest.raises(StoreError, match="busy"):
                store.stats()
        assert waiting(store) == 1


def test_on_a_full_disk_it_refuses_and_works_after(store, path):
    put(store, "1")
    with full_disk(path):
        for verb in (
            lambda: store.add("2", "jared", {"text": "x" * 100_000}),
            store.check,
        ):
            with pytest.raises(StoreError, match="written: (disk I/O|.* full)"):
                verb()
    assert store.state("2") is None
    store.check()
    assert store.add("2", "jared", {"text": "x" * 100_000}) == NEW
    assert waiting(store) == 2


def test_that_is_read_only_it_refuses_and_works_after(store, url):
    put(store, "1")
    with refusing(url, "INSERT ON message", "readonly"):
        with pytest.raises(StoreError, match="readonly"):
            store.add("2", "jared", {})
        assert waiting(store) == 1
    put(store, "2")


@pytest.mark.parametrize(
    ("pragma", "hint"),
    [("query_only = 1", "must be allowed to write"), ("max_page_count = 1", "room")],
)
def test_an_error_says_what_an_operator_can_do(store, pragma, hint):
    store._writer.execute(f"PRAGMA {pragma}")
    with pytest.raises(StoreError, match=hint):
        store.add("1", "jared", {"text": "x" * 100_000})


@pytest.mark.parametrize(
    "url", ["sqlite://store.db", "sqlite:///", "sqlite:///a.db?mode=ro"]
)
def test_an_unusable_url_is_an_error_that_says_how(url):
    with pytest.raises(StoreError, match="not like sqlite:///file.db"):
        open_store(url)


def test_a_database_in_memory_is_refused():
    """Each connection would have its own, and answer nothing."""
    with pytest.raises(StoreError, match="keeps nothing: name a file"):
        open_store("sqlite:///:memory:")


def test_a_relative_url_is_a_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_store("sqlite:///here.db").close()
    assert (tmp_path / "here.db").exists()


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(StoreError, match="missing/store.db cannot be opened"):
        open_store(f"sqlite:///{tmp_path}/missing/store.db")


def test_files_are_readable_by_their_owner_only(url, tmp_path):
    before = os.umask(0)
    try:
        store = opened(url)
        put(store, "1")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {f"store.db{end}": 0o600 for end in ("", "-wal", "-shm")}
    store.close()


def all_refuse(store, why):
    for verb in (
        lambda: store.add("2", "jared", {}),
        lambda: store.state("1"),
        store.stats,
        store.check,
    ):
        with pytest.raises(StoreError, match=why):
            verb()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_is_deleted_or_replaced_is_noticed(store, path, how):
    put(store, "1")
    if how == "replaced":
        opened(f"sqlite:///{path}.other").close()
        path.with_name("store.db.other").replace(path)
    else:
        path.unlink()
    all_refuse(store, "store.db was deleted or replaced: restart")


def test_a_folder_that_becomes_a_file_is_an_error_of_the_store(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with closing(opened(f"sqlite:///{folder}/store.db")) as store:
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("a file")
        all_refuse(store, "data/store.db cannot be read: Not a directory")


def test_a_truncated_file_is_noticed(store, path):
    put(store, "1")
    os.truncate(path, 100)
    all_refuse(store, "store.db was truncated: stop the server, move")


def test_an_operator_may_vacuum_the_file(store, url, path):
    for number in range(50):
        store.add(str(number), "jared", {"text": "x" * 10_000})
        store.save_reply(claim := store.claim(), "yes", {}, remember=False)
        store.finish(claim)
    store.prune(60)  # writes the WAL back
    before = path.stat().st_size
    query(url, "VACUUM")
    query(url, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.stat().st_size < before
    put(store, "new")
    store.check()
    assert waiting(store) == 1


def damage(path):
    """Overwrite the page on which a table begins."""
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        pages = "SELECT rootpage FROM sqlite_master WHERE name = 'kept'"
        [(page,)], [(size,)] = file.execute(pages), file.execute("PRAGMA page_size")
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xee" * size)


def test_a_damaged_file_is_not_opened(url, path):
    with closing(opened(url)) as store:
        put(store, "1")
    damage(path)
    with pytest.raises(StoreError, match="store.db cannot be opened: it is damaged"):
        open_store(url)


def test_a_file_that_turns_out_to_be_damaged_takes_no_more_messages(url, path):
    """SQLite would acknowledge them into the WAL, and nobody could read them."""
    with closing(opened(url)) as earlier:
        put(earlier, "1")
    with closing(opened(url)) as store:
        damage(path)
        query(url, "INSERT INTO about VALUES ('x', 'y')")  # so nothing is cached
        with pytest.raises(StoreError, match="malformed"):
            store.get("x")
        all_refuse(store, "store.db is damaged .*: stop the server, move")


LOOK = """store = open_store(sys.argv[1])
print(store.stats()['waiting']); store.close()"""


@pytest.mark.slow
def test_a_second_store_on_a_file_does_not_take_the_locks_of_the_first(store, url):
    """If it did, the next process that closes the file would delete its WAL."""
    put(store, "1")
    with closing(opened(url)):
        assert start_script(LOOK, url).communicate(timeout=20) == ("1\n", "")
        put(store, "2")
        assert start_script(LOOK, url).communicate(timeout=20) == ("2\n", "")


def test_no_byte_is_left_of_what_was_forgotten(store, path):
    long = "SECRET" * 5000
    for number in range(10):
        put(store, f"open {number}", to=f"other {number}")
        store.add(f"short {number}", "jared", {"text": "SECRET question"})
        store.add(f"long {number}", "jared", {"text": long})
    claims = 0
    while claim := store.claim():
        claims += 1
        if claim.conversation != "jared":
            continue
        remember = claim.seq % 3 > 0
        store.save_reply(claim, "SECRET " + long, {"at": "SECRET"}, remember)
        if claim.seq % 5:
            store.finish(claim)
        else:
            store.fail(claim, "SECRET reason")
    assert claims == 30
    store.forget("jared")
    store.prune(60)
    files = list(path.parent.glob("store.db*"))
    assert len(files) == 3
    assert [f.name for f in files if b"SECRET" in f.read_bytes()] == []
    assert b"text of open" in path.read_bytes()


def test_its_wal_becomes_small_again_after_a_long_read(store, path):
    wal = path.with_name(f"{path.name}-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM message").fetchall()
        for number in range(8):
            store.add(str(number), "jared", {"text": "x" * 1_000_000})
        assert wal.stat().st_size > LONGEST_WAL
    for number in range(8, 11):
        store.add(str(number), "jared", {})
    assert wal.stat().st_size <= LONGEST_WAL


# What SQLite reads from one end to the other, and why it may.
FAILED = "SCAN message USING INDEX message_failed"  # which holds nothing else
ALL_OPEN = "SEARCH conversation USING INDEX conversation_due"
MEANT_SCANS = {
    "load": {"SCAN conversation"},  # counts all of it; it holds only what is open
    "stats": {ALL_OPEN, FAILED},  # finds the oldest of what is open
    "failed": {FAILED},
    "recall_like": {"SEARCH message"},  # for its last
    "newest": {"SEARCH message"},  # the last one
}


def test_questions_are_answered_from_indexes(store, path):
    assert MEANT_SCANS.keys() <= SQL.keys()
    with closing(sqlite3.connect(path)) as reader:
        for name, text in SQL.items():
            sql = text.format(**SQLiteStore.dialect)
            values = dict.fromkeys(re.findall(r":(\w+)", sql))
            plan = reader.execute(f"EXPLAIN QUERY PLAN {sql}", values)
            # Whether an index covers all that is asked depends on SQLite's version.
            steps = [step.replace(" COVERING", "") for *_, step in plan]
            ours = [s for s in steps if re.match(".* (message|conversation)\\b", s)]
            scans = {step for step in ours if not re.search(r"[(].*[)]", step)}
            assert scans == MEANT_SCANS.get(name, set()), name


def test_a_file_that_is_locked_while_a_column_is_added_is_not_opened(store, path):
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("ALTER TABLE conversation DROP COLUMN next")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="opened: database is locked"):
            opened(f"sqlite:///{path}", locked=0.1)
    opened(f"sqlite:///{path}").close()


def test_durability_says_what_it_promises(store):
    assert "before a callback is acknowledged" in store.durability()
