"""The load generator: posts callbacks from a process of its own."""

from __future__ import annotations

import itertools
import json
import random
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from typing import Self

from simulator import Simulator, c2c_event

PEOPLE = 1000  # who ask; so many that RATE_LIMIT does not matter
ROBOT = "@RBT#whole"
HEADERS = {"Content-Type": "application/json"}
REST_AFTER = 60  # callbacks on a connection that is kept


@dataclass(frozen=True)
class Post:
    """A callback of the load: when it was due, sent and acknowledged, Unix seconds."""

    number: int
    due: float
    sent: float
    done: float
    ok: bool


class Crowd:
    """Threads of users who ask until the `with` is left."""

    _threads: list[threading.Thread]  # that end when `closing` is set

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.closing = simulator, threading.Event()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for thread in self._threads:
            thread.join()


def person(number: int) -> str:
    """Return who asks a question."""
    return f"user{number % PEOPLE}"


def question(text: str) -> int:
    """Return the number of the question that a text names, -1 if it names none."""
    found = re.search(r"\[(\d+)\]", text)
    return int(found[1]) if found else -1


def fire(
    port: int,
    query: str,
    count: int,
    rate: float,
    senders: int,
    robot: str = ROBOT,
    keep: bool = False,
) -> tuple[list[Post], float]:
    """Post callbacks, `rate` a second or as fast as they are taken; return them, and
    the CPU seconds that took.

    Each has a connection of its own, as nginx makes them. With `keep` a sender keeps
    its connection, and rests now and then for as long as gunicorn would by default.
    """
    numbers, began, posts = itertools.count(), time.time() + 0.1, []

    def send() -> None:
        exchange = Kept(port, query) if keep else partial(exchange_once, port, query)
        while (number := next(numbers)) < count:
            due = began + number / rate if rate else time.time()
            body = json.dumps(c2c_event(person(number), robot, f"question [{number}]"))
            time.sleep(max(0.0, due - time.time()))
            sent, ok = time.time(), exchange(body.encode())
            posts.append(Post(number, due, sent, time.time(), ok))

    used = time.process_time()
    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return posts, time.process_time() - used


def exchange_once(port: int, query: str, body: bytes) -> bool:
    """Post a body on a connection of its own; return whether a 200 came."""
    head = f"POST /im?{query} HTTP/1.0\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    answer, address = b"", ("127.0.0.1", port)
    with suppress(OSError), socket.create_connection(address, 30) as line:
        line.sendall(request)
        while piece := line.recv(4096):
            answer += piece
    return answer.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))


class Kept:
    """A connection that is kept for the next body, as a router's."""

    def __init__(self, port: int, query: str) -> None:
        self.line = HTTPConnection("127.0.0.1", port, timeout=30)
        self.path, self.posted = f"/im?{query}", 0

    def __call__(self, body: bytes) -> bool:
        """Post a body; return whether a 200 came."""
        self.posted += 1
        if self.posted % REST_AFTER == 0:
            time.sleep(random.uniform(1.9, 2.1))
        try:
            self.line.request("POST", self.path, body, HEADERS)
            answer = self.line.getresponse()
            answer.read()
            return answer.status == 200
        except (OSError, HTTPException):
            self.close()
            return False

    def close(self) -> None:
        """Close it; the next body opens another."""
        self.line.close()
