"""The hostile parties of benchmark.hostile: what they send, and what they answer.

All of it goes to 127.0.0.1, at a bounded rate and for a time. What a party sends holds
MARK, and no number in brackets, by which questions of others are known.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import (
    BaseRequestHandler,
    BaseServer,
    ThreadingMixIn,
    ThreadingTCPServer,
    UnixDatagramServer,
)
from typing import Any
from urllib.parse import quote, urlencode

from simulator import Json, c2c_event, group_event, text_body
from usersig import sign_callback

MARK = "enemyword"  # in every text of a hostile party
ODD = "oddword"  # in HTTP that quotes no text; the log may show a little of it
FORGED = "\r\n2026-11-30 00:00:00,000 ERROR forged \x1b[2J\x07\u2028\x85\u202e"
SHARED = "@TGS#shared"  # the group of the hostile member and a quiet one
RATES = {"stranger": 200, "user": 50, "member": 50, "ai": 4, "rest": 4}  # a second
USERS = {"ai": 20, "rest": 20}  # hostile accounts; else 1
SENDERS = 16
LARGEST = 1 << 20  # bytes that are read of an answer
ENDLESS = 200 << 20  # bytes
BOMB = gzip.compress(bytes(ENDLESS), 9)
DRIPS = 90  # bytes, one a second
LONGEST = 20_000  # bytes of a request that an answer may quote


@dataclass(frozen=True)
class Target:
    """The bot, what a party knows of it, and what it must not learn."""

    who: str
    port: int
    app: int
    token: str  # Tencent's: strangers only have an old signature of it
    private: tuple[str, ...]
    ai_port: int = 0  # where the hostile AI service listens
    robot: str = "@RBT#whole"
    calls: str = ""  # the socket that brings the calls to be answered badly

    @property
    def accounts(self) -> list[str]:
        """The hostile users."""
        return [f"hostile{number}" for number in range(USERS.get(self.who, 1))]

    def query(self, age: int = 0, **more: str) -> str:
        """Return the signed query of a callback."""
        now = str(int(time.time()) - age)
        about = {"SdkAppid": str(self.app), "RequestTime": now}
        return urlencode(about | {"Sign": sign_callback(self.token, now)} | more)


@dataclass
class Report:
    """The HTTP statuses that a party got, and how much of others it read in answers."""

    statuses: Counter[str] = field(default_factory=Counter)
    read: int = 0

    def note(self, answer: bytes, private: tuple[str, ...]) -> None:
        """Count an answer."""
        status = answer[9:12].decode("latin-1") if answer[:5] == b"HTTP/" else "none"
        self.statuses[status] += 1
        self.read += any(word.encode() in answer for word in private)


def attack(target: Target, seconds: float) -> Report:
    """Run a hostile party for some seconds."""
    os.nice(10)  # the machine is the bot's
    send = stranger if target.who == "stranger" else callback
    with hostile_service(target):
        return flood(target, seconds, send)


def flood(
    target: Target, seconds: float, send: Callable[[random.Random, Target], bytes]
) -> Report:
    """Send something `rate` times a second, each on a connection of its own."""
    numbers, began, report = itertools.count(), time.monotonic(), Report()
    rate, lock = RATES[target.who], threading.Lock()

    def run() -> None:
        while (due := next(numbers) / rate) < seconds:
            time.sleep(max(0.0, began + due - time.monotonic()))
            if time.monotonic() > began + seconds:
                return
            answer = exchange(target.port, send(random.Random(), target))
            with lock:
                report.note(answer, target.private)

    threads = [threading.Thread(target=run) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes on a connection of their own and return the answer."""
    answer = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 15) as line:
        with suppress(OSError):  # refused before all of it was read
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
        while len(answer) < LARGEST and (piece := line.recv(65536)):
            answer += piece
    return answer


def request(
    path: str, body: bytes = b"", head: str = "", method: str = "POST", size: int = -1
) -> bytes:
    """Return the bytes of a request; its Content-Length may lie."""
    size = len(body) if size < 0 else size
    lines = f"{method} {path} HTTP/1.1\r\nHost: bot\r\nConnection: close\r\n{head}"
    return f"{lines}Content-Length: {size}\r\n\r\n".encode("utf-8", "replace") + body


def chunked(path: str, pieces: int) -> bytes:
    """Return a request with a chunked body of so many times 64 KiB."""
    head = f"POST {path} HTTP/1.1\r\nHost: bot\r\nTransfer-Encoding: chunked\r\n\r\n"
    return (
        head.encode() + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * pieces + b"0\r\n\r\n"
    )


def stranger(chance: random.Random, target: Target) -> bytes:
    """Return something from somebody without a token."""
    body = json.dumps(c2c_event("hostile0", target.robot, MARK)).encode()
    old, bad = f"/im?{target.query(age=300)}", f"/im?Sign={ODD}&RequestTime=1"
    named = f"/{quote(ODD + FORGED)}?CallbackCommand=Bot.OnC2CMessage"
    head = chance.choice(HEADERS)
    method = chance.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", ODD])
    path = chance.choice(["/", "/im", "/healthz", named, "//im/..", "/" + ODD * 900])
    kinds: list[Callable[[], bytes]] = [
        lambda: request("/im", body),
        lambda: request(bad, body),
        lambda: request(old, body),
        lambda: request(old, body, head),
        lambda: request(f"/im?Sign={quote(ODD + FORGED)}", b"{" + body),
        lambda: request(old, b"[" * 100_000),
        lambda: request(path, body, head, method),
        lambda: request(named, body),
        lambda: request(old, body, size=1 << 40),
        lambda: request(old, body, size=len(body) * 2),
        lambda: chance.choice(BROKEN),
        lambda: b"",  # it says nothing and closes
    ]
    if chance.random() < 0.02:
        return (
            request(old, bytes(2 << 20)) if chance.random() < 0.5 else chunked(old, 40)
        )
    return chance.choice(kinds)()


HEADERS = [
    f"X-Forwarded-For: {ODD}\r\nX-Forwarded-Proto: https\r\nForwarded: {ODD}\r\n",
    f"X-{ODD}: 1\r\n" * 99,
    f"Cookie: {ODD * 800}\r\n",
    f"Content-Type: {ODD}; charset={ODD}\r\nContent-Encoding: gzip\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: gzip, identity\r\n",
    "Expect: 100-continue\r\n",
    "Content-Length: 7\r\n",
    f"X-Bad: {ODD}\0\x1b[2J\r\n",
    f"{ODD} : \r\n folded\r\n",
    f"Upgrade: {ODD}\r\nRange: bytes=0-{'9' * 99}\r\n",
]
BROKEN = [
    f"{ODD}\r\n\r\n".encode(),
    f"{ODD * 400}\r\n\r\n".encode(),
    f"GET / HTTP/9.9\r\n{ODD}\r\n\r\n".encode(),
    f"GET /{ODD}\x1b[2J\x85 HTTP/1.1\r\n\r\n".encode("latin-1"),
    b"GET /" + ODD.encode() * 9999,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n" * 999,
    b"POST /im HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /im HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST /im HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 999,
    b"POST /im HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + ODD.encode(),
]


def callback(chance: random.Random, target: Target) -> bytes:
    """Return a callback with what a hostile user wrote."""
    user, platform = chance.choice(target.accounts), chance.choice(PLATFORMS)
    event = c2c_event(user, target.robot, f"{MARK} asks")
    if target.who == "member":
        seq = int(time.time() * 1000)
        event = group_event(user, SHARED, seq, f"{MARK} asks", [target.robot])
    if target.who in ("user", "member"):
        event |= chance.choice(changes(chance))
    body = json.dumps(event).encode()
    return request(f"/im?{target.query(OptPlatform=platform)}", body)


PLATFORMS = ["RESTAPI", "iOS", "Android", "Web", FORGED + MARK, MARK * 99, ""]
TEXTS = [
    f"{MARK} asks",
    "/stop",
    "/clear",
    "/help",
    "/" + MARK,
    MARK + "x" * 12_000,
    MARK + "汉" * 4_000,
    MARK + FORGED + "\0\ud800",
    f"@RBT#card @everybody {MARK}" * 99,
    "<think>" * 999 + MARK,
    "\n" * 5_000 + MARK,
    " ",
]
KINDS = ["Face", "Location", "Sound", "File", "VideoFile", "Stream", "GroupTip", MARK]
DATA = ["[" * 50_000, "x" * 12_000, 7, None, {"a": []}, FORGED, "NaN", '{"src": 1e999}']
STOP = json.dumps({"chatbotPlugin": 2, "src": 22, "msgKey": MARK})
URLS = ["http://169.254.169.254/", "http://127.0.0.1:1/", "file:///etc/passwd", FORGED]
URLS += [f"https://example.com/{MARK}?{'a' * 9000}", "https://[::1]/", "https://a@b/"]
NUMBERS = [-1, 0, 2**32, 2**64, 10**19, "7", "x", 1.5, 1e308, None, [], True]


def changes(chance: random.Random) -> list[Json]:
    """Return what hostile messages have in place of a plain question."""
    one = {"Type": chance.choice([1, 2, 3, "x"]), "URL": chance.choice(URLS)}
    abstract = [chance.choice(TEXTS)] * chance.choice([1, 300])
    said = json.dumps({"messageReply": {"messageAbstract": chance.choice(TEXTS)}})
    elements: list[Json] = [
        {"MsgType": f"TIM{chance.choice(KINDS)}Elem", "MsgContent": {"Text": MARK}},
        {"MsgType": "TIMCustomElem", "MsgContent": {"Data": chance.choice(DATA)}},
        {"MsgType": "TIMCustomElem", "MsgContent": {"Data": STOP}},
        {"MsgType": "TIMImageElem", "MsgContent": {"ImageInfoArray": [one] * 9}},
        {"MsgType": "TIMRelayElem", "MsgContent": {"AbstractList": abstract}},
        {"MsgType": "TIMTextElem", "MsgContent": {"Text": chance.choice(NUMBERS)}},
    ]
    command = chance.choice(
        ["C2C.CallbackAfterMsgWithDraw", "Group.CallbackAfterRecallMsg"]
    )
    recall = {"CallbackCommand": command, "MsgKey": "1_%_1", "GroupId": SHARED}
    return [
        *[{"MsgBody": text_body(chance.choice(TEXTS))}] * 8,
        *[{"MsgBody": [element]} for element in elements],
        {"MsgBody": chance.choices(elements, k=30)},
        {"MsgBody": chance.choice([None, [], [[]], [None], {}, MARK])},
        {"CloudCustomData": said},
        {"CloudCustomData": chance.choice(DATA)},
        {chance.choice(["MsgSeq", "MsgRandom", "Random"]): chance.choice(NUMBERS)},
        recall | {"MsgSeqList": [{"MsgSeq": chance.choice(NUMBERS)}]},
        recall | {"MsgKey": f"{chance.randrange(2**32)}_1_1"},
        {"OnlineOnlyFlag": 1},
    ]


def bad_answers(asked: bytes, of_ai: bool) -> list[Callable[[], Iterator[bytes]]]:
    """Return the hostile HTTP answers to a request, which they may quote."""
    echo = asked.decode("utf-8", "replace") + FORGED + ODD
    head = "HTTP/1.1 {}\r\nContent-Type: {}\r\n{}\r\n"
    ok, stream = "200 OK", "text/event-stream"

    def start(
        status: str = ok, kind: str = "application/json", more: str = ""
    ) -> bytes:
        return head.format(status, kind, more).encode()

    def whole(value: object, status: str = ok) -> Iterator[bytes]:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        yield start(status, more=f"Content-Length: {len(body)}\r\n") + body

    def endless(begin: bytes, piece: bytes) -> Iterator[bytes]:
        yield begin
        yield from itertools.repeat(piece, ENDLESS // len(piece))

    def drip(begin: bytes, piece: bytes) -> Iterator[bytes]:
        yield begin
        for _ in range(DRIPS):
            yield piece
            time.sleep(1)

    delta = json.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 900}}]})
    event = f"data: {delta}\n\n".encode()
    codes = [float("inf"), [], {}, "x", 10**400, True, -(2**63), 60007, 20003, 80001]
    refusals: list[Json] = [{"error": {"message": echo, "code": c}} for c in codes]
    if not of_ai:
        refusals = [
            {"ActionStatus": random.choice(["FAIL", "OK", []]), "ErrorCode": code}
            | {"ErrorInfo": echo, "MsgKey": FORGED, "MsgDropReason": echo}
            for code in codes
        ]
    refusal, status = (
        random.choice(refusals),
        random.choice(["400 x", "401 x", "500 x"]),
    )
    return [
        lambda: endless(start(), b"x" * 65536),
        lambda: endless(start(), b"\n" * 65536),
        lambda: endless(start(kind=stream), event * 64),
        lambda: endless(start(kind=stream), b"data: " + b"x" * 65536),
        lambda: endless(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536),
        lambda: endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 9999),
        lambda: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999),
        lambda: iter([start(more="Content-Encoding: gzip\r\n"), BOMB]),
        lambda: iter([start("500 x", more="Content-Encoding: gzip\r\n"), BOMB]),
        lambda: drip(start(), b" "),
        lambda: drip(start(kind=stream), event),
        lambda: drip(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
        lambda: whole(b"<html>" + echo.encode() * 99),
        lambda: whole(b"[" * 500_000),
        lambda: whole(b'{"ErrorCode": ' + b"9" * 5000 + b"}"),
        lambda: whole(refusal),
        lambda: whole(refusal, status),
        lambda: whole(FORGED.encode() * 9, status),
        lambda: iter([start(more="Transfer-Encoding: chunked\r\n"), b"f" * 9999]),
        lambda: iter([start("302 x", more="Location: http://127.0.0.1:1/\r\n")]),
        lambda: iter([start(more="Content-Length: -5\r\n"), b"{}"]),
        lambda: iter([FORGED.encode() * 9]),
        lambda: iter([]),
    ]


def answer_badly(line: socket.socket, asked: bytes, of_ai: bool) -> None:
    """Answer a request in one of the hostile ways."""
    with suppress(OSError):  # the bot has read enough
        line.settimeout(20)
        for piece in random.choice(bad_answers(asked, of_ai))():
            line.sendall(piece)


class _Service(BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(20)
        asked = b""
        with suppress(OSError):
            while b"\r\n\r\n" not in asked and (piece := self.request.recv(65536)):
                asked += piece
        answer_badly(self.request, asked[:LONGEST], of_ai=True)


class _Server(ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024
    block_on_close = False


class _Call(BaseRequestHandler):
    def handle(self) -> None:
        asked, line = self.request
        with line:
            answer_badly(line, asked, of_ai=False)


class _Calls(ThreadingMixIn, UnixDatagramServer):
    """Takes connections over, with what was asked on them."""

    daemon_threads = True
    block_on_close = False

    def get_request(self) -> Any:
        asked, lines, *_ = socket.recv_fds(self.socket, LONGEST, 1)
        return (asked, socket.socket(fileno=lines[0])), ""


@contextmanager
def hostile_service(target: Target) -> Iterator[None]:
    """Answer badly what asks a party's AI service, or the calls that it is given."""
    if target.ai_port:
        server: BaseServer = _Server(("127.0.0.1", target.ai_port), _Service)
    elif target.calls:
        server = _Calls(target.calls, _Call)
    else:
        yield
        return
    with server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield
        server.shutdown()
