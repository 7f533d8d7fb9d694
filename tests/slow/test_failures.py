"""Failures of running servers: pauses, a wrong start, broken callbacks."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from contextlib import closing
from urllib.parse import urlencode

import pytest
import requests
from conftest import poll, said_to

from benchmark.stage import workers
from imbot.timing import NORMAL
from simulator import BotProcess

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_a_pause_of_the_server_costs_nothing_but_time(sim, tmp_path, request, store):
    """Longer than a lease, with questions in work, waiting and on their way."""
    settings = {"WEB_CONCURRENCY": 2, "RATE_LIMIT": 0}
    if store == "postgres":
        server = request.getfixturevalue("postgres_server")
        settings["DATABASE_URL"] = server.url
    bot = BotProcess(sim, str(tmp_path), **settings).start()
    users = [f"user{number}" for number in range(12)]
    sim.users |= set(users)
    sim.ai_delay = 3
    try:
        for text in ("one", "two"):
            for user in users:
                sim.say(user, "@RBT#001", text)
        poll(lambda: len(sim.ai_requests) == 12)
        os.killpg(bot.process.pid, signal.SIGSTOP)
        time.sleep(NORMAL.lease + 2)
        os.kill(workers(bot)[0], signal.SIGCONT)  # one sees the others' claims lapsed
        time.sleep(1)
        os.killpg(bot.process.pid, signal.SIGCONT)
        for user in users:
            sim.say(user, "@RBT#001", "three")
        sim.wait(36, timeout=40)
        poll(lambda: requests.get(f"{bot.url}/healthz").json()["in_work"] == 0)
        for user in users:
            assert said_to(sim, user) == ["one", "two", "three"]
        assert len(sim.ai_requests) == len(sim.delivered) == 36
        assert requests.get(f"{bot.url}/healthz").json()["failed"] == 0
    finally:
        bot.stop(signal.SIGKILL)


def columns(tmp_path, sql):
    with closing(sqlite3.connect(tmp_path / "bot.db", timeout=10)) as file, file:
        return file.execute(sql).fetchall()


def test_preloading_is_refused_and_loses_nothing(sim, tmp_path):
    bot = BotProcess(sim, str(tmp_path), WEB_CONCURRENCY=2)
    usual = bot.env["GUNICORN_CMD_ARGS"]
    sim.users |= {f"user{number}" for number in range(20)}
    bot.start()
    sim.ai_delay = 30
    for number in range(20):
        sim.say(f"user{number}", "@RBT#001", "hello")
    bot.stop(signal.SIGKILL)
    sim.ai_delay = 0
    try:
        columns(tmp_path, "UPDATE conversation SET due = 0")  # no need to wait
        bot.env["GUNICORN_CMD_ARGS"] = f"{usual} --preload"
        before = len(bot.log.read_text())
        assert bot.launch().wait()
        [said] = bot.log.read_text()[before:].splitlines()
        assert "--preload (preload_app) cannot be used" in said
        bot.env["GUNICORN_CMD_ARGS"] = usual
        bot.start()
        sim.wait(20, timeout=30)
        poll(lambda: requests.get(f"{bot.url}/healthz").json()["in_work"] == 0)
        assert sorted(m.chat for m in sim.delivered) == sorted(
            f"user{number}" for number in range(20)
        )
    finally:
        if bot.alive():
            bot.stop(signal.SIGKILL)


@pytest.fixture
def bot(sim, tmp_path):
    bot = BotProcess(sim, str(tmp_path)).start()
    sim.bot_url = ""  # the tests deliver
    yield bot
    bot.stop(signal.SIGKILL)


def raw(sim, event, *body, chunked=False, path="/im", **query):
    """Return the bytes of a callback."""
    query = urlencode(sim.signed(event) | query)
    framing = f"Content-Length: {sum(map(len, body))}"
    framing = "Transfer-Encoding: chunked" if chunked else framing
    head = f"POST {path}?{query} HTTP/1.1\r\nHost: bot\r\n{framing}\r\n\r\n"
    return head.encode() + b"".join(body)


def read_status(reader):
    """Read one answer; return its status, None if the connection is closed."""
    status, length = reader.readline().split(), 0
    while line := reader.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    reader.read(length)
    return int(status[1]) if status else None


BIG = b"x" * (2 << 20)
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BIG), BIG)


@pytest.mark.parametrize(
    ("body", "status", "how"),
    [
        (BIG, 413, {}),
        (CHUNKS, 400, {"chunked": True}),
        (BIG[: 1 << 19], 403, {"Sign": "0" * 64}),
        (BIG, 404, {"path": "/nowhere"}),
    ],
    ids=["too large", "too large, in chunks", "not signed", "to nowhere"],
)
def test_a_callback_behind_a_refused_one_is_not_lost(sim, bot, body, status, how):
    """A proxy keeps its connections, and shares them among all who call."""
    event = sim.say("jared", "@RBT#001", "hi")
    with socket.create_connection(("127.0.0.1", bot.port), 10) as line:
        reader = line.makefile("rb")
        line.sendall(raw(sim, event, body, **how))
        assert read_status(reader) == status
        line.sendall(raw(sim, event, json.dumps(event).encode()))
        assert read_status(reader) == 200
    assert said_to(sim, "jared") == ["hi"] or sim.wait(1)


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloXX\r\n0\r\n\r\n",
        b"5;=\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nno trailer\r\n\r\n",
        b"5\r\nhel",
    ],
)
def test_a_body_of_broken_chunks_is_refused_without_a_traceback(sim, bot, body):
    event = sim.say("jared", "@RBT#001", "hi")
    with socket.create_connection(("127.0.0.1", bot.port), 10) as line:
        line.sendall(raw(sim, event, body, chunked=True))
        line.shutdown(socket.SHUT_WR)
        assert read_status(line.makefile("rb")) == 400
    assert "refused with 400" in bot.log.read_text()
    assert "Traceback" not in bot.log.read_text()
