"""What several files of tests use: fixtures, and helpers that are imported by name."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from benchmark import databases
from benchmark.databases import NotInstalled, PgBouncer, PostgresServer
from imbot.ai import provider
from simulator.fixtures import (
    APPID,
    FAST,
    STORY,
    TOKEN,
    Caller,
    idle,
    im,
    in_threads,
    make_app,
    poll,
    said_to,
    sim,
)

__all__ = [
    "APPID",
    "FAST",
    "STORY",
    "TOKEN",
    "Caller",
    "idle",
    "im",
    "in_threads",
    "make_app",
    "poll",
    "said_to",
    "sim",
]

HERE = Path(__file__).parent.parent  # the root of the project
# If the shell that began this ignores Ctrl-C, the programs that tests start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def lack(what):
    """Fail in CI, and skip the test elsewhere: this machine has not what it needs."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


@contextmanager
def started(database, *about):
    """Have a database server of our own, if this machine has what it needs."""
    try:
        import psycopg  # noqa: F401

        server = database(*about)
    except (ImportError, NotInstalled) as error:
        lack(str(error))
    with server:
        yield server


def newest_of(store):
    """Return the seq of the newest message of a store, 0 if there is none."""
    return store.update_at("a test", lambda old, newest: {"seq": newest})["seq"]


@pytest.fixture(scope="session")
def shared_postgres():
    """A server that tests share, so none may stop it."""
    with started(lambda: PostgresServer(**databases.FAST)) as server:
        yield server


@pytest.fixture(scope="session")
def shared_bouncer(shared_postgres):
    with started(PgBouncer, shared_postgres) as bouncer:
        yield bouncer


@pytest.fixture
def postgres_server():
    """A server that a test may stop; it keeps what it acknowledged."""
    with started(PostgresServer) as server:
        yield server


ANSWER = "你好，世界🌏！\u2028用 `<think>` 标签，2 < 3。"
QUESTION = [{"role": "user", "content": "你好"}]
AI_KEY = "sk-test-key"


def sse(*events, end="data: [DONE]\n\n"):
    """Return the bytes of a stream; a string among the events is sent as it is."""
    texts = [
        event if isinstance(event, str) else f"data: {ai_json(event)}\n\n"
        for event in events
    ]
    return ("".join(texts) + end).encode()


def ai_json(value):
    return json.dumps(value, ensure_ascii=False)


def delta(text=None, finish=None, **more):
    said = {} if text is None else {"content": text}
    return {
        "choices": [{"index": 0, "delta": {**said, **more}, "finish_reason": finish}]
    }


def message(text, finish="stop", **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **more}}
    return {"choices": [{**choice, "finish_reason": finish}]}


def json_values(names, *texts):
    """Return a strategy for JSON whose objects have these names, and these texts."""
    texts = st.sampled_from(texts) if texts else st.nothing()
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(names.split()), inner | texts, max_size=5)
        ),
        max_leaves=12,
    )


@pytest.fixture
def no_pause(monkeypatch):
    """Let the tries follow one another at once."""
    monkeypatch.setattr(provider.random, "uniform", lambda low, high: 0.0)


@pytest.fixture
def ai_socket(monkeypatch):
    """Return a function that starts a server made of scripts, one for each request.

    A script is bytes to send before the connection is closed, or a function that gets
    the connection and says whether to keep it.
    """
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    opened = []

    def start(*scripts, context=None):
        listener = socket.create_server(("127.0.0.1", 0))
        scheme, port = "https" if context else "http", listener.getsockname()[1]
        server = SimpleNamespace(
            url=f"{scheme}://127.0.0.1:{port}", port=port, heads=[], bodies=[], peers=[]
        )
        opened.append(listener)
        threading.Thread(
            target=ai_accept,
            args=(server, listener, scripts, context, opened),
            daemon=True,
        ).start()
        return server

    yield start
    for item in opened:
        with suppress(OSError):
            item.shutdown(socket.SHUT_RDWR)
        item.close()


def ai_accept(server, listener, scripts, context, opened):
    while True:
        try:
            connection, peer = listener.accept()
        except OSError:
            return
        server.peers.append(peer)
        opened.append(connection)
        threading.Thread(
            target=ai_serve, args=(server, connection, scripts, context), daemon=True
        ).start()


def ai_serve(server, connection, scripts, context):
    with suppress(OSError):
        if context:
            connection = context.wrap_socket(connection, server_side=True)
        with closing(connection), connection.makefile("rb") as reader:
            while head := b"\n".join(iter(lambda: reader.readline().strip(), b"")):
                server.heads.append(head.decode())
                length = head.lower().partition(b"content-length:")[2].split()
                server.bodies.append(reader.read(int(length[0]) if length else 0))
                script = scripts[min(len(server.heads), len(scripts)) - 1]
                if isinstance(script, bytes):
                    return connection.sendall(script)
                if not script(connection):
                    return None


# What each family of services sends for ANSWER; made after providers.md.
HALF = len(ANSWER) // 2
A, B = ANSWER[:HALF], ANSWER[HALF:]
USAGE = {"choices": [], "usage": {"total_tokens": 9}}
BASE = {"base_resp": {"status_code": 0, "status_msg": "ok"}}
RECORDED = {
    "minimax": sse(
        {**delta("", role="assistant", name="MiniMax AI"), **BASE},
        {**delta(A), **BASE, "input_sensitive": False},
        delta(B),
        {**delta(finish="stop"), **BASE},
        {**USAGE, **BASE},
    ),
    "minimax with inline thinking": sse(
        delta("<think>\n他说你好。"), delta("\n</think>\n\n" + A), delta(B, "stop")
    ),
    "minimax, split thinking": sse(
        delta(reasoning_content="他说你好", reasoning_details=[{"text": "他说你好"}]),
        delta(A, reasoning_content="他说你好"),
        delta(B, "stop"),
    ),
    "minimax v2": sse(
        delta(A),
        delta(B),
        {**message(ANSWER), **BASE, "object": "chat.completion"},
        end="",
    ),
    "minimax-completion": ai_json({"reply": ANSWER, **BASE}).encode(),
    "zhipu": sse(
        delta("", role="assistant", reasoning_content="想"),
        delta(A),
        {**delta(B, "stop"), "usage": {"total_tokens": 9}},
    ),
    "deepseek": sse(
        ": keep-alive\n\n",
        delta(None, role="assistant", content=None, reasoning_content="想一想"),
        ": keep-alive\n\n",
        delta(A),
        delta(B),
        delta("", "stop"),
    ),
    "deepseek, waiting for its turn": b"\n\n\n" + ai_json(message(ANSWER)).encode(),
    "openai": sse(
        delta("", role="assistant"), delta(A), delta(B), delta(None, "stop"), USAGE
    ),
    "openrouter": sse(
        ": OPENROUTER PROCESSING\n\n", delta(A, reasoning="think"), delta(B, "stop")
    ),
    "ollama": sse(delta("", reasoning="想"), delta(A), delta(B), delta("", "stop")),
    "with carriage returns": sse(delta(A), delta(B, "stop")).replace(b"\n", b"\r\n"),
    "with event and id": sse(
        "event: message\nid: 1\nretry: 3000\n", delta(A), delta(B), delta("", "stop")
    ),
    "without a space": sse(delta(A), delta(B), "data:[DONE]\n\n", end=""),
    "plain JSON": json.dumps(
        message(ANSWER, reasoning_content="想"), indent=1
    ).encode(),
    "plain JSON without a finish": ai_json(message(ANSWER, None)).encode(),
    "emoji in two halves": sse(
        delta(A[: A.index("🌏")]),
        "".join(
            'data: {"choices":[{"delta":{"content":"' + half + '"}}]}\n\n'
            for half in ("\\ud83c", "\\udf0f")
        ),
        delta((A + B)[A.index("🌏") + 1 :], "stop"),
    ),
}


def dribble(head, drop, tail=b""):
    """Return a script that sends `head`, then `drop` ten times a second for long."""

    def script(connection):
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(drop)
            time.sleep(0.1)

    return script
