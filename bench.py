"""The benchmark and the campaign of faults, on the stand-in.

    python bench.py                      the figures, medians of three runs, 6 minutes
    python bench.py --store sqlite       without Redis; --runs 1 for a quick look
    python bench.py --faults             20,000 messages while everything breaks
    python bench.py --faults --store redis     the same on a redis-server of its own
    python bench.py --faults --seconds 60      for a time; --seed 7 for other accidents

Both start the Procfile's own command and stay on 127.0.0.1. The exit status is 0 if no
message was lost, answered twice or out of order, or left open. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import requests

from botserver import TEXTS
from simulator import (
    BotProcess,
    Delivered,
    Simulator,
    ai_error,
    c2c_event,
    free_port,
)

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

PEOPLE = 1000  # who ask in the benchmark; so many that RATE_LIMIT does not matter
ROBOT = "@RBT#whole"
MEASURED = {"WEB_CONCURRENCY": 2, "MAX_BACKLOG": 100_000, "BOT_LANGUAGE": "en"}
NORMAL, TOO_MUCH = 200, 600  # messages a second; Tencent lets an app send 200
BARE = """
from flask import Flask
app = Flask(__name__)

@app.post("/im")
@app.get("/healthz")
def view():
    return {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}
"""


@dataclass(frozen=True)
class Post:
    """A callback of the load: when it was due, sent and acknowledged, Unix seconds."""

    number: int
    due: float
    sent: float
    done: float
    ok: bool


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
            time.sleep(max(0.0, due - time.time()))
            sent, answer = time.time(), b""
            with (
                suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 30) as line,
            ):
                line.sendall(
                    f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
                )
                while piece := line.recv(4096):
                    answer += piece
            ok = answer.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
            posts.append(Post(number, due, sent, time.time(), ok))

    used = time.process_time()
    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return posts, time.process_time() - used


def person(number: int) -> str:
    """Return who asks a question."""
    return f"user{number % PEOPLE}"


class Clock(Simulator):
    """The stand-in, which notes when what came and went instead of what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.users = {person(number) for number in range(PEOPLE)}
        self.robots = dict.fromkeys(MODES, "")
        self.im_seconds: list[float] = []
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.delivered.clear()
        self.asked: dict[int, float] = {}  # question -> when the AI got it
        self.answered: dict[int, float] = {}  # question -> when the AI was ready
        self.chunk: dict[int, float] = {}  # question -> when its first chunk went out
        self.shown: dict[str, float] = {}  # user -> when a first text came

    def record(
        self, kind: str, began: float, url: str, body: Any, status: int, answer: Any
    ) -> None:
        self.calls.clear()
        self.ai_requests.clear()
        if kind == "AI":
            number = question(body["messages"][-1]["content"])
            self.asked.setdefault(number, began)
            self.answered[number] = time.time()
        elif kind == "IM":
            self.im_seconds.append(time.time() - began)
            if "You" in json.dumps(body["MsgBody"]):
                self.shown.setdefault(body["To_Account"], began)

    def stream(self, text: str) -> Iterator[bytes]:
        for piece in super().stream(text):
            self.chunk.setdefault(question(text), time.time())
            yield piece

    def wait_for(self, count: int) -> None:
        """Wait until so many answers are complete, or some are clearly lost."""
        with suppress(TimeoutError):
            self.wait(count, SETTLE, closed=True)

    @property
    def query(self) -> str:
        """The signed query of a callback's URL."""
        return urlencode(self.signed({"CallbackCommand": "Bot.OnC2CMessage"}))


def question(text: str) -> int:
    """Return the number of the question that a text names, -1 if it names none."""
    found = re.search(r"\[(\d+)\]", text)
    return int(found[1]) if found else -1


class Usage:
    """CPU seconds and memory of a bot's processes, from /proc."""

    def __init__(self, bot: BotProcess) -> None:
        assert bot.process
        self.pids = [bot.process.pid, *workers(bot)]
        self.began = self.cpu()

    def cpu(self) -> float:
        """Return the CPU seconds they have used."""
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in self.pids]
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        ticks = sum(int(values[11]) + int(values[12]) for values in fields)
        return ticks / os.sysconf("SC_CLK_TCK")

    def spent(self) -> float:
        """Return the CPU seconds they have used since this was made."""
        return self.cpu() - self.began

    def memory(self) -> float:
        """Return the resident megabytes of the largest worker."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids[1:]]
        return max(int(t.split("VmRSS:")[1].split()[0]) for t in texts) / 1024


Figures = dict[str, tuple[float, ...]]


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds."""
    ordered, count = sorted(seconds) or [math.nan], len(seconds)
    return ordered[count // 2] * 1000, ordered[count * 99 // 100] * 1000


def measure(store: str, pool: ProcessPoolExecutor) -> Figures:
    """Return the figures of one run: of the bot on a store, or of the bare view."""
    figures: Figures = {}
    with stage(store, Clock(), MEASURED | {"WORKER_THREADS": 16}) as (
        simulator,
        bot,
        _,
    ):
        figures["start-up to the first 200, s"] = (bot.seconds_to_start,)
        figures["memory of a process, idle, MB"] = (Usage(bot).memory(),)
        simulator.ai_delay = 1000  # all threads wait for it
        figures |= acknowledge(simulator, bot, pool)
    if store == "bare":
        return figures
    with stage(store, Clock(), MEASURED | {"WORKER_THREADS": 512}) as (
        simulator,
        bot,
        _,
    ):
        figures |= show_first(simulator)
        simulator.ai_delay = 2.0
        figures |= carry(simulator, bot, pool, NORMAL, 15)
        figures |= carry(simulator, bot, pool, TOO_MUCH, 6)
    return figures


def acknowledge(
    simulator: Clock, bot: BotProcess, pool: ProcessPoolExecutor
) -> Figures:
    """Measure how fast callbacks are taken, while no answer is made."""
    pool.submit(fire, bot.port, simulator.query, 300, 0, 32).result()
    posts, _ = pool.submit(fire, bot.port, simulator.query, 6000, 0, 32).result()
    seconds = max(post.done for post in posts) - min(post.sent for post in posts)
    taken = percentiles([post.done - post.sent for post in posts])
    return {
        "acknowledgements a second": (len(posts) / seconds,),
        "acknowledgement p50 / p99, ms": taken,
        "acknowledgements refused": (sum(not post.ok for post in posts),),
    }


def carry(
    simulator: Clock,
    bot: BotProcess,
    pool: ProcessPoolExecutor,
    rate: int,
    seconds: int,
) -> Figures:
    """Measure a load, to its last answer."""
    simulator.begin()
    usage, ours = Usage(bot), time.process_time()
    load = pool.submit(fire, bot.port, simulator.query, rate * seconds, rate, 64)
    posts, generator = load.result()
    memory = usage.memory()
    simulator.wait_for(sum(post.ok for post in posts))
    born = [message.born for message in simulator.delivered] or [0.0]
    ours, count = time.process_time() - ours, len(born)
    shown = {question(m.text): m.born for m in simulator.delivered}
    asked, answered = simulator.asked, simulator.answered
    added = [
        asked[post.number] - post.sent + shown[post.number] - answered[post.number]
        for post in posts
        if post.number in shown
    ]
    late = percentiles([post.done - post.due for post in posts])
    what = f"{rate} messages/s: "
    lost, twice, misordered = wrong(posts, simulator.delivered)
    return {
        what + "answers a second": (count / (max(born) - min(born) or 1),),
        what + "added p50 / p99, ms": percentiles(added),
        what + "ack p50 / p99, ms": late,
        what + "CPU of the bot, ms an answer": (usage.spent() / count * 1000,),
        what + "CPU of load / stand-in, ms": (
            generator / count * 1000,
            ours / count * 1000,
        ),
        what + "memory of a process, MB": (memory,),
        what + "refused / lost / twice / out of order": (
            sum(not post.ok for post in posts),
            *(lost, twice, misordered),
        ),
    }


def wrong(posts: list[Post], delivered: list[Delivered]) -> tuple[int, int, int]:
    """Count what was lost, answered twice and out of order."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for message in delivered:
        numbers[message.chat].append(question(message.text))
    answered = [number for chat in numbers.values() for number in chat]
    lost = {post.number for post in posts if post.ok} - {*answered}
    misordered = sum(a > b for n in numbers.values() for a, b in itertools.pairwise(n))
    return len(lost), len(answered) - len({*answered}), misordered


def show_first(simulator: Clock) -> Figures:
    """Measure the time from the AI's first chunk to the first text on the screen."""
    figures: Figures = {}
    simulator.ai_delay, simulator.ai_pace = 0.2, 0.05
    for robot, mode in MODES.items():
        simulator.begin()
        for number in range(20):
            simulator.say(person(number), robot, f"question [{number}]")
            time.sleep(0.1)
        simulator.wait_for(20)
        shown, chunk = simulator.shown, simulator.chunk
        waits = [shown.get(person(n), math.inf) - chunk[n] for n in chunk]
        name = f"AI's first chunk to a text, {mode}, p50 / max, ms"
        figures[name] = percentiles(waits)
    figures["IM call of the stand-in, p50 / p99, ms"] = percentiles(
        simulator.im_seconds
    )
    simulator.ai_pace = 0.0
    return figures


def benchmark(stores: list[str], runs: int) -> bool:
    """Measure everything; print the table; return if nothing was lost."""
    found: dict[str, list[Figures]] = defaultdict(list)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for run in range(runs):
            for store in [*stores, "bare"]:
                print(f"run {run + 1} of {runs}: {store}", file=sys.stderr)
                found[store].append(measure(store, pool))
    cores, version = os.cpu_count(), sys.version.split()[0]
    print(f"{f'{cores} cores, Python {version}, medians of {runs}':50}", end="")
    print("".join(f"{store:>17}" for store in found))
    for name in found[stores[0]][0]:
        every = [[run[name] for run in each if name in run] for each in found.values()]
        cells = [told(runs, max if "refused" in name else median) for runs in every]
        print(f"{name:50}" + "".join(f"{cell:>17}" for cell in cells))
    runs_of_all = [run.items() for each in found.values() for run in each]
    return not any(any(v) for run in runs_of_all for n, v in run if "refused" in n)


def told(
    runs: list[tuple[float, ...]], choose: Callable[[Iterable[float]], float]
) -> str:
    """Return the figures of some runs as the table shows them."""
    values = [choose(column) for column in zip(*runs, strict=True)]
    digits = [0 if value >= 100 or not value % 1 else 1 for value in values]
    return " / ".join(f"{v:,.{d}f}" for v, d in zip(values, digits, strict=True))


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
    if (number := question(message.text)) >= 0:
        return number
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
def stage(
    store: str, simulator: Any, settings: dict[str, Any]
) -> Iterator[tuple[Any, BotProcess, RedisServer | None]]:
    """Run the stand-in, the bot and a redis-server if asked for; end them all.

    The store "bare" means a Flask view that does nothing, under the same command.
    """
    with simulator, tempfile.TemporaryDirectory() as folder:
        robots = Path(folder, "robots.toml")
        lines = [f'["{name}"]\nreply_mode = "{mode}"\n' for name, mode in MODES.items()]
        robots.write_text("".join(lines))
        redis = RedisServer(folder) if store == "redis" else None
        url = redis.url if redis else ""
        more = {"ROBOTS": robots, "REDIS_URL": url}
        bot = BotProcess(simulator, folder, **settings | more)
        if store == "bare":
            Path(folder, "bare.py").write_text(BARE)
            bot.command[-1], bot.folder = "bare:app", Path(folder)
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
    with stage(store, Simulator(), SETTINGS) as (simulator, bot, redis):
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
    parser.add_argument("--store", choices=("sqlite", "redis"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument(
        "--seconds", type=float, default=1800, help="of asking, at the most"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end the bot, too
        signal.signal(number, signal.default_int_handler)
    try:
        if options.faults:
            store = options.store or "sqlite"
            print(f"faults, store {store}, seed {options.seed}")
            well = campaign(store, options.messages, options.seconds, options.seed)
        else:
            both = ["sqlite", "redis"] if shutil.which("redis-server") else ["sqlite"]
            well = benchmark([options.store] if options.store else both, options.runs)
    except KeyboardInterrupt:
        well = False
    sys.exit(not well)


if __name__ == "__main__":
    main()
