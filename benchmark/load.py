"""The load generator: posts callbacks from a process of its own."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from simulator import c2c_event

PEOPLE = 1000  # who ask; so many that RATE_LIMIT does not matter
ROBOT = "@RBT#whole"


@dataclass(frozen=True)
class Post:
    """A callback of the load: when it was due, sent and acknowledged, Unix seconds."""

    number: int
    due: float
    sent: float
    done: float
    ok: bool


def person(number: int) -> str:
    """Return who asks a question."""
    return f"user{number % PEOPLE}"


def question(text: str) -> int:
    """Return the number of the question that a text names, -1 if it names none."""
    found = re.search(r"\[(\d+)\]", text)
    return int(found[1]) if found else -1


def fire(
    port: int, query: str, count: int, rate: float, senders: int
) -> tuple[list[Post], float]:
    """Post callbacks, `rate` a second or as fast as they are taken; return them, and
    the CPU seconds that took. Each has a connection of its own, as nginx makes them.
    """
    head = f"POST /im?{query} HTTP/1.0\r\nContent-Type: application/json\r\n"
    numbers, began, posts = itertools.count(), time.time() + 0.1, []

    def send() -> None:
        while (number := next(numbers)) < count:
            due = began + number / rate if rate else time.time()
            body = json.dumps(c2c_event(person(number), ROBOT, f"question [{number}]"))
            request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
            time.sleep(max(0.0, due - time.time()))
            sent, answer = time.time(), exchange(port, request)
            ok = answer.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
            posts.append(Post(number, due, sent, time.time(), ok))

    used = time.process_time()
    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return posts, time.process_time() - used


def exchange(port: int, request: bytes) -> bytes:
    """Return the answer to a request, or what came of it."""
    answer, address = b"", ("127.0.0.1", port)
    with suppress(OSError), socket.create_connection(address, 30) as line:
        line.sendall(request)
        while piece := line.recv(4096):
            answer += piece
    return answer
