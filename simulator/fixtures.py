"""What tests are made of: a simulator, an app of it with short waits, a caller.

The fixtures are imported by name where they are used; tests/conftest.py imports them
for all files of tests/.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from botserver import Settings, create_app
from imbot.timing import Timing

from .messages import Json
from .server import Simulator
from .tencent import KEY

T = TypeVar("T")
APPID, TOKEN = 1400000000, "stand-in-token"
STORY = "".join(
    f"第{number}句话，很短。 It is short. 😀\n\n" for number in range(40)
).strip()
# Short, but long enough for a machine that is busy with something else.
FAST = Timing(
    lease=3.0,
    poll=0.05,
    heartbeat=0.2,
    regain=0.3,
    again=0.05,
    pauses=(0.02, 0.05),
    backoff=0.02,
    read_every=0.02,
    grace=0.2,
    patience_with_message=2.0,
    first_delay=0.05,
    longest_retry=0.5,
    save_patience=3.0,
    duplicate_window=10.0,
    duplicate_window_group=10.0,
    look_up_every=0.002,
)


class Caller:
    """Tencent's side of the callback, through Flask's test client."""

    def __init__(self, sim: Simulator, client: FlaskClient) -> None:
        self.sim, self.client = sim, client

    def post(self, event: Json, body: str | None = None, **query: Any) -> TestResponse:
        """Post a callback, signed, with other fields in its query."""
        signed = {**self.sim.signed(event), **query}
        data = json.dumps(event) if body is None else body
        return self.client.post("/im", query_string=signed, data=data)

    def say(
        self,
        text: str = "hi",
        user: str = "jared",
        robot: str = "@RBT#001",
        **fields: Any,
    ) -> TestResponse:
        """Write to a robot, and post the callback of it."""
        return self.post(self.sim.say(user, robot, text, **fields))


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """A simulator that serves."""
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def make_app(sim: Simulator, tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Return a function that makes an app of the simulator's, with other settings."""
    bots = []

    def make(timing: Timing = FAST, **settings: Any) -> Flask:
        defaults = {
            "im_sdkappid": APPID,
            "im_key": KEY,
            "im_callback_token": (TOKEN,),
            "im_api_url": sim.url,
            "ai_secret_key": sim.ai_key,
            "ai_base_url": f"{sim.url}/v1",
            "database_url": f"sqlite:///{tmp_path}/bot.db",
        }
        app = create_app(Settings(**{**defaults, **settings}), timing)
        bots.append(app.extensions["bot"])
        return app

    yield make
    for bot in bots:
        bot.close(drain=5)


@pytest.fixture
def im(sim: Simulator, make_app: Callable[..., Flask]) -> Caller:
    """A caller of an app."""
    return Caller(sim, make_app().test_client())


def idle(im: Caller) -> bool:
    """Return whether the bot has nothing to do."""
    state = im.client.get("/healthz").get_json()
    return bool(state["waiting"] == state["in_work"] == 0)


def poll(condition: Callable[[], T], timeout: float = 20) -> T:
    """Wait until a condition holds, at most `timeout` seconds; return its value."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return value


def said_to(sim: Simulator, chat: str) -> list[str]:
    """Return the questions that the answers in a chat repeat."""
    return [
        message.text.split(" (")[0].removeprefix("You said: ")
        for message in sim.delivered
        if message.chat == chat
    ]


def in_threads(count: int, work: Callable[[int], T]) -> list[T]:
    """Run work(number) in threads that begin at the same moment; return the results."""
    results: dict[int, T] = {}
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == count, "a thread failed"
    return [results[number] for number in range(count)]
