"""What the benchmark measures with: a stand-in that notes times, and /proc."""

from __future__ import annotations

import json
import math
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from simulator import BotProcess, Simulator
from simulator.ai import DONE, parrot, sse

from .load import PEOPLE, person, question
from .stage import MODES, workers

CHUNKS = 150  # of a long answer's stream
FILLING = "and so on, as AIs do when they are asked for more than they know. " * 10
OPENSSL = (
    "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 "
    "-addext subjectAltName=IP:127.0.0.1"
)
SETTLE = 120.0  # seconds for the last answers


class TimedSimulator(Simulator):
    """The stand-in, which notes when what came and went instead of what it was.

    With an `ai_pace` its answers are long: CHUNKS chunks, or the same text in one piece
    after the same time. Nothing of it wakes up for a chunk that nobody reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.remembers = False
        self.users = {person(number) for number in range(PEOPLE)}
        self.robots = dict.fromkeys(MODES, "")
        self.ai_answer = self.speak
        self.connections = 0  # that callers opened
        self._here = threading.local()  # .streams: whether a stream was asked for
        self._count_connections()
        self.begin()

    def _count_connections(self) -> None:
        process = self._server.process_request

        def count(*args: Any) -> None:
            self.connections += 1
            process(*args)

        self._server.process_request = count  # type: ignore[method-assign,assignment]

    def encrypt(self, folder: Path) -> Path:
        """Serve HTTPS; return the file of a certificate that is made for it."""
        certificate, key = folder / "certificate", folder / "key"
        subprocess.run(
            [*OPENSSL.split(), "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.url = self.url.replace("http:", "https:")
        return certificate

    def begin(self) -> None:
        """Forget what was."""
        self.delivered.clear()
        self.connections = 0
        self.asked: dict[int, float] = {}  # question -> when the AI got it
        self.ready: dict[int, float] = {}  # question -> when its answer begins
        self.answered: dict[int, float] = {}  # question -> when that has ended
        self.shown: dict[str, float] = {}  # user -> when a first text came

    def speak(self, messages: list[dict[str, Any]]) -> str:
        """Return a short answer or a long one."""
        text = parrot(messages)
        return f"{text} {FILLING}"[: CHUNKS * 4] if self.ai_pace else text

    def complete(self, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        answer, asked = super().complete(headers, body), json.loads(body)
        number = question(asked["messages"][-1]["content"])
        self.ready.setdefault(number, time.time())
        self._here.streams = asked.get("stream", False)
        if not self._here.streams:
            time.sleep(self.ai_pace * CHUNKS)
        return answer

    def stream(self, text: str) -> Iterator[bytes]:
        if self._here.streams:
            began = time.monotonic()
            for number in range(CHUNKS):
                delta = {"content": text[number * 4 : number * 4 + 4]}
                yield sse({"choices": [{"index": 0, "delta": delta}]})
                due = began + (number + 1) * self.ai_pace
                time.sleep(max(0.0, due - time.monotonic()))
            yield sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield DONE

    @contextmanager
    def on_wire(
        self, kind: str, url: str, body: Any, of: str | None = None, trace: str = ""
    ) -> Iterator[dict[str, Any]]:
        began = time.time()
        if kind == "IM" and "You" in json.dumps(body.get("MsgBody")):
            self.shown.setdefault(body["To_Account"], began)
        try:
            yield {}
        finally:
            self.calls.clear()
            self.ai_requests.clear()
            if kind == "AI":
                number = question(body["messages"][-1]["content"])
                self.asked.setdefault(number, began)
                self.answered[number] = time.time()

    def wait_for(self, count: int) -> None:
        """Wait until so many answers are complete, or some are clearly lost."""
        with suppress(TimeoutError):
            self.wait(count, SETTLE, closed=True)

    @property
    def query(self) -> str:
        """The signed query of a callback's URL."""
        return urlencode(self.signed({"CallbackCommand": "Bot.OnC2CMessage"}))


class Usage:
    """CPU seconds and memory of a bot's processes, from /proc."""

    def __init__(self, bot: BotProcess) -> None:
        assert bot.process
        self.pids = [bot.process.pid, *workers(bot)]
        self.began = self.cpu()

    def cpu(self) -> float:
        """Return the CPU seconds they have used."""
        return cpu_seconds(self.pids)

    def spent(self) -> float:
        """Return the CPU seconds they have used since this was made."""
        return self.cpu() - self.began

    def memory(self) -> float:
        """Return the resident megabytes of the largest worker."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids[1:]]
        return max(int(t.split("VmRSS:")[1].split()[0]) for t in texts) / 1024


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU seconds that processes have used."""
    stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    ticks = sum(int(values[11]) + int(values[12]) for values in fields)
    return ticks / os.sysconf("SC_CLK_TCK")


def percentiles(seconds: Sequence[float], tail: int = 99) -> tuple[float, float]:
    """Return p50 and another percentile in milliseconds."""
    ordered, count = sorted(seconds) or [math.nan], len(seconds)
    return ordered[count // 2] * 1000, ordered[count * tail // 100] * 1000
