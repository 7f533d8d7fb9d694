"""Helpers for the tests of the store and of its workers."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

from conftest import HERE

from imbot.queue import Added, open_store
from imbot.timing import Timing

NEW, KNOWN = Added.NEW, Added.KNOWN
NO_TABLES = "DROP TABLE IF EXISTS message, conversation, kept, about"


def fast(**waits):
    """Return the waits of the tests; others than these are the normal ones."""
    return Timing(**{"prune_pause": 0.001, **waits})


def query(url, sql):
    """Run SQL beside the store, as another program would; return the rows."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url), isolation_level=None)) as file:
            return file.execute(sql).fetchall()
    import psycopg

    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


def path_of(url):
    return Path(url.removeprefix("sqlite:///"))


def start_script(script, url, *words):
    """Start a process that runs a script with `store`, the store of a URL."""
    beginning = (
        "import json, random, sys, threading, time\n"
        "from imbot.queue import open_store\n"
        "from imbot.timing import Timing\n"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", beginning + script, url, *words],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ADDER = """
store = open_store(sys.argv[1])
for number in range(100_000):
    store.add(str(number), "jared", {})
    print(number, flush=True)
"""


def killed_adder(url):
    """Return the ids that a process acknowledged before it was killed."""
    process = start_script(ADDER, url)
    lines = [process.stdout.readline() for _ in range(100)]
    process.kill()
    lines += process.communicate()[0].splitlines(keepends=True)
    ids = [line.strip() for line in lines if line.endswith("\n")]
    assert len(ids) >= 100
    return ids


def put(store, *ids, to="jared"):
    for id in ids:
        assert store.add(id, to, {"text": f"text of {id}"}) == NEW


def answer(store, reply="yes", remember=True):
    claim = store.claim()
    assert store.save_reply(claim, reply, {}, remember) and store.finish(claim)
    return claim


def fail(store, reason="no"):
    claim = store.claim()
    assert store.fail(claim, reason)
    return claim


def texts(store, conversation="jared", limit=10):
    return [(data["text"], reply) for data, reply in store.history(conversation, limit)]


def failed(store):
    return [id for _, id, _, _ in store.failed()]


def lost(store, *claims):
    return store.heartbeat(claims)[0]


def cancelled(store, *claims):
    return store.heartbeat(claims)[1]


def waiting(store):
    return store.stats()["waiting"]


def opened(url, wait=False, **waits):
    return open_store(url, fast(**waits), wait=wait)


@contextmanager
def full_disk(path):
    """Let no file grow beyond what the WAL has now, if there is one."""
    limits, wal = resource.getrlimit(resource.RLIMIT_FSIZE), f"{path.name}-wal"
    size = path.with_name(wal).stat().st_size if path.exists() else 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
