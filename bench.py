"""The campaign of faults, on the stand-in: what was acknowledged is answered, once.

    python bench.py --faults                   20,000 messages while everything breaks
    python bench.py --faults --store redis     the same on a redis-server of its own
    python bench.py --faults --seconds 60      for a time; --seed 7 for other accidents

It starts the Procfile's own command and stays on 127.0.0.1. Its exit status is 0 if
nothing was lost, answered twice, out of order or left open. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from botserver import TEXTS
from simulator import BotProcess, Delivered, Simulator, ai_error, free_port

MODES = {
    "@RBT#whole": "whole",
    "@RBT#modify": "modify",
    "@RBT#custom": "custom",
    "@RBT#stream": "stream",
}
USERS, GROUPS, SENDERS = 60, 20, 16
BACKLOG = 600  # messages not answered yet, at which users hold back
QUIET = 10.0  # seconds between two accidents; three in one answer set it aside
SETTLE = 120.0  # seconds in which everything must be answered at the end
REDELIVERED, AI_FAILS, IM_FAILS = 0.1, 0.1, 0.05  # shares of all calls
AI_FAULTS = (
    (500, ai_error("api_error", "a failure that was asked for (1000)")),
    (429, ai_error("rate_limit_error", "rate limit (1002)")),
    (529, ai_error("overloaded_error", "overloaded")),
    None,  # the answer breaks off
)
IM_FAULTS = ("lost", "late", 20004, 60007, 90994, 91000)
BROKEN = TEXTS["en"]["broken"]
OWN_WORDS = {*TEXTS["en"].values()} - {BROKEN}
MUST_BE_ZERO = ("lost", "twice", "misordered", "left open", "left in the store")
SETTINGS = {
    "WEB_CONCURRENCY": 2,
    "WORKER_THREADS": 64,
    "RATE_LIMIT": 0,
    "MAX_WAITING": 10_000,
    "HISTORY_TURNS": 2,
    "BOT_LANGUAGE": "en",
    "LOG_LEVEL": "WARNING",
}


@dataclass(eq=False)
class Chat:
    """One conversation: what was asked in it, and when that was acknowledged."""

    user: str
    robot: str
    group: str = ""
    asked: int = 0
    acknowledged: dict[int, float] = field(default_factory=dict)
    again: list[Any] = field(default_factory=list)  # callbacks to deliver once more


class Users:
    """The load: every chat asks one question after the other and counts them.

    A question whose callback brought no 200 is not asked again: it may be answered
    once or never. Only callbacks that were acknowledged are delivered once more.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.closing = simulator, threading.Event()
        self.chats = [Chat(f"user{n}", robot) for n in range(USERS) for robot in MODES]
        self.chats += [
            Chat(f"user{n}", robot, f"@TGS#{n}")
            for n in range(GROUPS)
            for robot in MODES
        ]
        simulator.users |= {chat.user for chat in self.chats}
        simulator.groups |= {c.group: {c.user} for c in self.chats if c.group}
        simulator.robots = dict.fromkeys(MODES, "")
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,), daemon=True)
            for number in range(SENDERS)
        ]

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for thread in self._threads:
            thread.join()

    def asked(self) -> int:
        """Return how many questions were asked."""
        return sum(chat.asked for chat in self.chats)

    def acknowledged(self) -> int:
        """Return how many of them were acknowledged."""
        return sum(len(chat.acknowledged) for chat in self.chats)

    def _ask_on(self, number: int) -> None:
        mine, chance = self.chats[number::SENDERS], random.Random(number)
        while not self.closing.is_set():
            late = self.acknowledged() - len(self.simulator.delivered) > BACKLOG
            try:
                if not late:
                    self._ask(chance.choice(mine), chance)
            except requests.RequestException:
                late = True
            if late:
                self.closing.wait(0.1)

    def _ask(self, chat: Chat, chance: random.Random) -> None:
        chat.asked += 1
        number, text = chat.asked, f"question [{chat.asked}]"
        if chat.group:
            say, place = self.simulator.say_in_group, (chat.user, chat.group)
            event = say(*place, text, [chat.robot])
        else:
            event = self.simulator.say(chat.user, chat.robot, text)
        chat.acknowledged[number] = time.time()
        if chance.random() < REDELIVERED:
            chat.again.append(event)
        if chat.again and chance.random() < REDELIVERED:
            self.simulator.callback(chat.again.pop())


class RedisServer:
    """A redis-server of our own that keeps what it has confirmed."""

    def __init__(self, folder: str) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        """Start it and return when it serves."""
        options = f"--bind 127.0.0.1 --port {self.port} --appendonly yes "
        options += "--appendfsync always --save --loglevel warning --dir"
        program = shutil.which("redis-server") or "redis-server"
        words = [program, *options.split(), self.folder]
        words.insert(words.index("--save") + 1, "")
        self.process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, start_new_session=True
        )
        while self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            time.sleep(0.02)
        raise RuntimeError("redis-server does not start")

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


class Accidents:
    """What happens to the bot, one after the other, in a random order."""

    def __init__(self, bot: BotProcess, redis: RedisServer | None, seed: int) -> None:
        self.bot, self.redis, self.chance = bot, redis, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.slowest_stop = 0.0
        self._kinds: dict[str, Callable[[], None]] = {
            "kill -9 of all": self._kill_all,
            "kill -9 of a worker": self._kill_worker,
            "SIGTERM": self._stop,
            "SIGHUP": self._reload,
            "no store": self._take_store_away,
        }
        self._next: list[str] = []

    def cause(self) -> str:
        """Let the next accident happen and return its name."""
        self._next = self._next or self.chance.sample([*self._kinds], len(self._kinds))
        name = self._next.pop()
        self._kinds[name]()
        self.counts[name] += 1
        return name

    def _kill_all(self) -> None:
        self.bot.stop(signal.SIGKILL)
        self.bot.start()

    def _kill_worker(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.chance.choice(workers(self.bot)), signal.SIGKILL)

    def _stop(self) -> None:
        began = time.monotonic()
        self.bot.stop()
        self.slowest_stop = max(self.slowest_stop, time.monotonic() - began)
        self.bot.start()

    def _reload(self) -> None:
        assert self.bot.process
        self.bot.process.send_signal(signal.SIGHUP)

    def _take_store_away(self) -> None:
        """Lock the file as another program may, or kill Redis."""
        seconds = self.chance.uniform(1, 4)
        if self.redis:
            self.redis.stop()
            time.sleep(seconds)
            self.redis.start()
        else:
            path = self.bot.env["DATABASE"]
            with closing(sqlite3.connect(path, timeout=10)) as other:
                other.execute("BEGIN EXCLUSIVE")
                time.sleep(seconds)


def workers(bot: BotProcess) -> list[int]:
    """Return the process ids of gunicorn's workers."""
    assert bot.process
    pid = bot.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


def break_services(simulator: Simulator, seed: int) -> None:
    """Make a share of the calls to the AI service and to Tencent IM fail."""
    chance = random.Random(seed)

    def ai_fault(asked: Any) -> Any:
        simulator.ai_requests.clear()  # 20,000 with their histories are too many
        fails = chance.random() < AI_FAILS
        fault = chance.choice(AI_FAULTS) if fails else None
        simulator.break_after = chance.randint(1, 9) if fails and not fault else 0
        return fault

    def im_fault(command: str, body: Any) -> Any:
        simulator.calls.clear()
        return chance.choice(IM_FAULTS) if chance.random() < IM_FAILS else None

    simulator.ai_fault, simulator.fault = ai_fault, im_fault
    simulator.ai_delay = 0.02


def judge_all(chats: list[Chat], delivered: list[Delivered]) -> Counter[str]:
    """Count what is wrong with the answers of all conversations."""
    shown: dict[tuple[str, str], list[Delivered]] = {}
    for message in delivered:
        shown.setdefault((message.chat, message.robot), []).append(message)
    found: Counter[str] = Counter()
    for chat in chats:
        answers = shown.get((chat.group or chat.user, chat.robot), [])
        found.update(judge(chat, answers))
        found["slowest"] = max(found["slowest"], slowest(chat, answers))
    return found


def judge(chat: Chat, shown: list[Delivered]) -> Counter[str]:
    """Count what is wrong with the answers of one conversation.

    A text that names no question but says that the AI failed counts as the answer to
    one of the questions between those its neighbours name.
    """
    numbers = [number for m in shown if (number := number_of(m)) is not None]
    named, previous, silent = {*numbers} - {0}, 0, 0
    found = Counter({"left open": sum(not message.closed for message in shown)})
    found["twice"] = len(numbers) - numbers.count(0) - len(named)
    found["answered"] = len(named)
    for number in [*numbers, chat.asked + 1]:
        if not number:
            silent += 1
            continue
        gap = set(range(previous + 1, number)) - named
        found["misordered"] += number < previous
        found["lost"] += max(0, len(gap & chat.acknowledged.keys()) - silent)
        found["twice"] += max(0, silent - len(gap))
        found["answered"] += min(silent, len(gap))
        previous, silent = number, 0
    order = [message.number for message in shown if not chat.group]
    found["misordered"] += order != sorted(order)
    return found


def number_of(message: Delivered) -> int | None:
    """Return the question that an answer names, 0 if it says that the AI failed.

    None for what a dead process has begun, if another answer took its place.
    """
    if message.text.endswith(BROKEN):
        return None
    if name := re.search(r"\[(\d+)\]", message.text):
        return int(name[1])
    return 0 if any(text in message.text for text in OWN_WORDS) else None


def slowest(chat: Chat, shown: list[Delivered]) -> int:
    """Return the seconds the slowest answer took after its acknowledgement."""
    times = [(m.time, chat.acknowledged.get(number_of(m) or 0)) for m in shown]
    return int(max((end - began for end, began in times if began), default=0))


def settle(bot: BotProcess) -> int:
    """Wait for the last answers and return how many messages have none."""
    end, left = time.monotonic() + SETTLE, -1
    while left and time.monotonic() < end:
        time.sleep(0.2)
        with suppress(requests.RequestException, KeyError):
            state = requests.get(f"{bot.url}/healthz", timeout=5).json()
            left = state["waiting"] + state["in_work"] + state["set_aside"]
    return left


@contextmanager
def stage(store: str) -> Iterator[tuple[Simulator, BotProcess, RedisServer | None]]:
    """Run the stand-in, the bot and a redis-server if asked for; end them all."""
    with Simulator() as simulator, tempfile.TemporaryDirectory() as folder:
        robots = Path(folder, "robots.toml")
        lines = [f'["{name}"]\nreply_mode = "{mode}"\n' for name, mode in MODES.items()]
        robots.write_text("".join(lines))
        redis = RedisServer(folder) if store == "redis" else None
        settings = SETTINGS | {
            "ROBOTS": robots,
            "REDIS_URL": redis.url if redis else "",
        }
        bot = BotProcess(simulator, folder, **settings)
        try:
            if redis:
                redis.start()
            yield simulator, bot.start(), redis
        finally:
            if bot.process:
                bot.stop(signal.SIGKILL)
            if redis:
                redis.stop()


def campaign(store: str, messages: int, seconds: float, seed: int) -> bool:
    """Break everything while users ask; print the table; return if all was well."""
    end = time.monotonic() + seconds
    with stage(store) as (simulator, bot, redis):
        break_services(simulator, seed)
        accidents = Accidents(bot, redis, seed)
        with Users(simulator) as users:
            while users.acknowledged() < messages and time.monotonic() < end:
                users.closing.wait(QUIET)
                print(f"{users.acknowledged():6} {accidents.cause()}", file=sys.stderr)
        left = settle(bot)
        found = judge_all(users.chats, simulator.delivered)
    found |= {"sent": users.asked(), "acknowledged": users.acknowledged()}
    found |= {"left in the store": left, **accidents.counts}
    wrong = sum(found[name] for name in MUST_BE_ZERO)
    for name in ("sent", "acknowledged", "answered", *MUST_BE_ZERO, *accidents.counts):
        print(f"{name:24}{found[name]:8,}")
    print(f"{'slowest answer':24}{found['slowest']:8,} s")
    print(f"{'slowest SIGTERM':24}{accidents.slowest_stop:8.0f} s")
    return not wrong


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", action="store_true", required=True)
    parser.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument(
        "--seconds", type=float, default=1800, help="of asking, at the most"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end the bot, too
        signal.signal(number, signal.default_int_handler)
    print(f"faults, store {options.store}, seed {options.seed}")
    try:
        well = campaign(options.store, options.messages, options.seconds, options.seed)
    except KeyboardInterrupt:
        well = False
    sys.exit(not well)


if __name__ == "__main__":
    main()
