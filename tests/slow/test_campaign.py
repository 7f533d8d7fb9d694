"""The benchmark: its databases, its commands, and a short campaign."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime
from importlib.util import find_spec

import pytest
import requests
from conftest import HERE, lack

from benchmark.accidents import KINDS, plan
from benchmark.databases import FAST, NotInstalled, PgBouncer, PostgresServer, find
from benchmark.faults import MUST_BE_ZERO
from benchmark.parties import RATES
from benchmark.stage import STORES, set_clock, stage
from simulator import Simulator

pytestmark = pytest.mark.slow


@pytest.fixture
def postgres():
    """The driver, if PostgreSQL and PgBouncer are there; else only CI fails."""
    psycopg = pytest.importorskip("psycopg")
    try:
        find("initdb"), find("pgbouncer")
    except NotInstalled as error:
        lack(str(error))
    return psycopg


@pytest.fixture
def gevent():
    if not find_spec("gevent"):
        lack("gevent is not installed")


def ask(psycopg, url, question):
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        cursor = connection.execute(question)
        return cursor.fetchone()[0] if cursor.description else None


def test_a_database_starts_stops_and_leaves_nothing(postgres):
    with PostgresServer(**FAST, max_connections=20) as server:
        with PgBouncer(server) as bouncer:
            assert ask(postgres, server.url, "SHOW fsync") == "off"
            assert ask(postgres, bouncer.url, "SHOW max_connections") == "20"
            wrong = server.url.replace(server.password, "wrong")
            with pytest.raises(postgres.OperationalError, match="password"):
                ask(postgres, wrong, "SELECT 1")
            ask(postgres, server.url, "CREATE TABLE kept AS SELECT 7")
            for mode in ("fast", "immediate"):
                server.stop(mode)
                with pytest.raises(postgres.OperationalError):
                    ask(postgres, server.url, "SELECT 1")
                server.start()
            assert ask(postgres, bouncer.url, "SELECT * FROM kept") == 7
    assert not server.folder.exists() and not bouncer.folder.exists()
    assert server.process.returncode is not None
    assert bouncer.process.returncode is not None


def test_a_database_is_durable_unless_asked_otherwise(postgres):
    with PostgresServer() as server:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            assert ask(postgres, server.url, f"SHOW {name}") == "on"


def test_a_database_that_does_not_start_says_why_and_leaves_nothing(postgres):
    server = PostgresServer(max_connections="many")
    with pytest.raises(RuntimeError, match='"max_connections": "many"'), server:
        pass
    assert not server.folder.exists() and server.process.returncode


@pytest.mark.parametrize(
    "module", ["benchmark", "benchmark.faults", "benchmark.soak", "simulator"]
)
def test_a_command_says_how_it_is_called(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    assert done.stdout.startswith(f"usage: python -m {module} [-h]"), done.stderr
    assert not done.stderr


def test_a_step_of_the_clock_reaches_the_bot():
    with stage("sqlite", Simulator(), {}, own_clock=True) as (bot, _):
        for ahead in (0, 40, -40):
            set_clock(bot, ahead)
            date = requests.get(f"{bot.url}/healthz", timeout=5).headers["Date"]
            now = parsedate_to_datetime(date).timestamp()
            assert abs(now - ahead - time.time()) < 15


def run(words):
    return subprocess.run(
        [sys.executable, "-m", *words.split()],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("store", STORES)
def test_a_short_campaign_ends_with_zeros(store, request):
    if store != "sqlite":
        request.getfixturevalue(store)
    seed, first = next(
        (seed, first)
        for seed in itertools.count()
        if (first := next(plan(seed, [*KINDS]))).kind == "no store"
    )
    how = f"--messages {first.after + 300} --seed {seed}"
    done = run(f"benchmark.faults --store {store} {how}")
    assert done.returncode == 0, done.stdout + done.stderr
    title, *lines = done.stdout.splitlines()
    assert title == f"faults, store {store}, seed {seed}"
    found = {line[:24].strip(): int(line[24:].replace(",", "")) for line in lines}
    assert found["no store"] == 1
    assert found["answered"] >= found["acknowledged"] >= first.after + 300
    assert found["callbacks lost"] >= found["caught up"]
    for name in MUST_BE_ZERO:
        assert found[name] == 0


def test_a_short_soak_prints_its_figures_and_its_verdict():
    done = run("benchmark.soak --minutes 0.1 --seed 1")
    _, names, *lines = done.stdout.splitlines()
    assert "memory, MB" in names and not done.stderr, done.stdout + done.stderr
    assert all(float(text.replace(",", "")) > 0 for text in lines[5].split())
    assert lines[-2] == "left in the store: 0"
    grew = lines[-1].startswith("grew too much: ") and not lines[-1].endswith("nothing")
    assert done.returncode == grew


@pytest.mark.parametrize("who", RATES)
def test_quiet_users_are_safe_from_a_hostile_party(who):
    done = run(f"benchmark.hostile --who {who} --minutes 0.2")
    _, statuses, _, *rows, verdict = done.stdout.splitlines()
    assert "'200': " in statuses, done.stdout + done.stderr
    wrong = [row for row in rows if row.endswith(" too much")]
    assert done.returncode == bool(wrong) == (verdict != "too much: nothing")
    # Times, and lines a minute of some seconds, are for longer runs on a machine that
    # does nothing else. Some of what a hostile AI service sends is in memory.
    aside = (", ms ", "log lines a minute", *(["memory, MB"] if who == "ai" else []))
    rest = [row for row in wrong if not any(name in row for name in aside)]
    assert not rest, done.stdout + done.stderr
