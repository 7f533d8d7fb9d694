"""A hostile party beside quiet users: do they notice it?

    python -m benchmark.hostile --who stranger      one without a token
    python -m benchmark.hostile --who user          who writes to a robot
    python -m benchmark.hostile --who member        who shares a group with a quiet one
    python -m benchmark.hostile --who ai            the AI service of another robot
    python -m benchmark.hostile --who rest          Tencent, for some users' calls
    python -m benchmark.hostile --who ai --minutes 1 --store postgres

It starts the Procfile's own command, with two processes, and stays on 127.0.0.1. Quiet
users ask two questions a second, one-to-one and in a group, first alone, then beside
the party. The exit status is 0 if every row of the table is within its limit:

* an answer takes at most twice the time, and NOISE more; each comes once and in order;
* the party reads nothing of others, and the log shows no text, key or signature. Its
  lines are short and printable. Because of the party it grows by 30 lines a minute, and
  by 3 for each of its messages that RATE_LIMIT lets through;
* in the group that the hostile member shares, a quiet member waits at most twice as
  long as for one hostile answer and the own one: members take turns. (Any member's
  /stop ends the answer in progress, whoever asked: that counts as an answer.)
* memory grows by at most 60 MB; there is no traceback and no HTTP 500; afterwards the
  threads and the open files are as before, and nothing waits.

A client that sends slowly is no party: it is what the HTTPS proxy in front is for, see
docs/operations.md. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from socket import AF_UNIX, SOCK_DGRAM, send_fds, socket
from tempfile import TemporaryDirectory
from typing import Any

import requests

from simulator import (
    BotProcess,
    Simulator,
    c2c_event,
    free_port,
    group_event,
    interrupt_on_signals,
    server,
)
from simulator.history import LOOKUPS

from .faults import settle
from .load import Crowd, question
from .parties import LONGEST, MARK, RATES, SHARED, Report, Target, attack
from .soak import usage
from .stage import DATABASES, stage, workers
from .timed import cpu_seconds, percentiles

ALONE = 60.0  # seconds of the measurement before, at most as long as the party
EVERY = 4.0  # seconds between two questions of a quiet user: within RATE_LIMIT
RATE_LIMIT = 20  # a minute, the default
NOISE = 20.0  # ms
MOST_MEMORY = 60  # MB more than before
LATER = 60.0  # seconds in which threads and files get back to what they were
AI_TAKES, HOSTILE_TAKES = 0.1, 0.5  # seconds
SECRET, NAME = "quietsecret", "quietname"  # in the texts and nicks, and the ids
NICK = f"{SECRET}-nick"
CROWD = [f"crowd{number}" for number in range(64)]
GROUP, EVIL_ROBOT = "@TGS#quiet", "@RBT#evil"
ONE, OTHERS, MEMBER = "one-to-one", "another group", "shared group"
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) [\w.]+ "
    r"|\[\d{4}-\d\d-\d\d [^]]+\] \[\d+\] \[[A-Z]+\] "
)


@dataclass(frozen=True)
class Row:
    """A row of the table: a figure before and beside the party, and its limit."""

    name: str
    before: float
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it is within its limit; nan, for no figure, is not."""
        return self.found <= self.limit


class HostileStage(Simulator):
    """Tencent and a good AI service; `hostile` calls get hostile answers on request."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.ai_key = f"token-{SECRET}", f"key-{SECRET}"
        self.ai_delay, self.is_hostile, self.leaked = AI_TAKES, False, 0
        self.party = ""  # the path of the socket that takes connections over
        self.sigs: set[str] = set()
        self.ai_fault = self._look_at
        self._server.RequestHandlerClass = Handler

    @contextmanager
    def on_wire(self, *_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {}
        self.calls.clear()
        self.ai_requests.clear()

    def _look_at(self, asked: Any) -> None:
        """Take longer for the party, and count what it would hear of others."""
        if MARK in json.dumps(asked["messages"][-1]["content"]):
            time.sleep(HOSTILE_TAKES - AI_TAKES)
            self.leaked += SECRET in json.dumps(asked)

    def spoils(self, command: str, body: bytes) -> bool:
        """Return whether a call gets a hostile answer."""
        aside = command in LOOKUPS or command == "profile/portrait_get"
        of_party = b'"To_Account": "hostile' in body
        return self.is_hostile and (of_party or aside and random.random() < 0.1)


class Handler(server.Handler):
    def _im(self, simulator: Any, command: str, query: Any, body: bytes) -> None:
        simulator.sigs.add(query.get("usersig", ""))
        if simulator.spoils(command, body):
            self.close_connection = True
            asked = query.get("usersig", "").encode() + body
            line = self.connection.detach()  # the party answers it, in its process
            with socket(AF_UNIX, SOCK_DGRAM) as party, suppress(OSError):
                send_fds(party, [asked[:LONGEST]], [line], address=simulator.party)
            os.close(line)
        else:
            super()._im(simulator, command, query, body)


@dataclass(frozen=True)
class Asked:
    """A quiet user's question, and when it was asked, Unix seconds."""

    number: int
    user: str
    where: str
    at: float


class Quiet(Crowd):
    """Users who ask a question every few seconds each, in places of three kinds."""

    def __init__(self, simulator: Simulator, is_member: bool) -> None:
        super().__init__(simulator)
        self.asked: list[Asked] = []
        self.users = {f"{NAME}{n}": ONE if n < 4 else OTHERS for n in range(8)}
        if is_member:
            self.users |= {"member0": MEMBER}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(user, n * EVERY / 8))
            for n, user in enumerate(self.users)
        ]

    def _ask_on(self, user: str, wait: float) -> None:
        due = time.monotonic() + wait
        while not self.closing.wait(max(0.0, due - time.monotonic())):
            due += EVERY
            with self._lock:
                number = len(self.asked)
                self.asked.append(Asked(number, user, self.users[user], time.time()))
                event = self._event(self.asked[-1])
            with suppress(requests.RequestException):  # else it is not answered
                self.simulator.deliver(event)

    def _event(self, asked: Asked) -> Any:
        if asked.where == ONE:
            return c2c_event(asked.user, "@RBT#whole", f"{SECRET} [{asked.number}]")
        group, robot, word = GROUP, "@RBT#card", f"@{NICK} {SECRET}"
        if asked.where == MEMBER:
            group, robot, word = SHARED, "@RBT#whole", "question"
        seq = self.simulator.next_seq(group)
        text = f"{word} [{asked.number}]"
        return group_event(asked.user, group, seq, text, [robot])

    def answered(self) -> list[tuple[int, float]]:
        """Return the questions that were answered, and when, in this order."""
        places = {*self.users, GROUP, SHARED}
        shown = [m for m in self.simulator.delivered if m.chat in places]
        named = [(question(message.text), message.time) for message in shown]
        return [one for one in named if one[0] >= 0]

    def times(self, where: str, since: float, until: float) -> list[float]:
        """Return the seconds that the answers to questions of a time took."""
        ended = dict(reversed(self.answered()))
        return [
            ended[one.number] - one.at
            for one in self.asked
            if one.where == where and since <= one.at < until and one.number in ended
        ]

    def stopped(self) -> int:
        """Return how many answers to the quiet member were stopped by the party."""
        shown = [m.text for m in self.simulator.delivered if m.chat == SHARED]
        ours = [text for text in shown if text.startswith("@member0 ")]
        return sum("(stopped)" in text and question(text) < 0 for text in ours)

    def faults(self) -> dict[str, int]:
        """Count what was not answered once and in order."""
        found = [number for number, _ in self.answered()]
        users = {one.number: one.user for one in self.asked}
        per_user = [[n for n in found if users.get(n) == user] for user in self.users]
        return {
            "lost": len(users.keys() - {*found}) - self.stopped(),
            "twice": len(found) - len({*found}),
            "misordered": sum(numbers != sorted(numbers) for numbers in per_user),
        }


class Others:
    """The share of the machine that other programs take: they slow answers, too."""

    def __init__(self, bot: BotProcess) -> None:
        assert bot.process
        self.pids = [bot.process.pid, *workers(bot), os.getpid()]
        self.pids += [child.pid or 0 for child in active_children()]
        self.began = self._seconds()

    def _seconds(self) -> tuple[float, float]:
        """Return the CPU seconds of others, and those that there were."""
        line = Path("/proc/stat").read_text().splitlines()[0]
        ticks = [int(text) for text in line.split()[1:9]]
        total = sum(ticks) / os.sysconf("SC_CLK_TCK")
        idle = (ticks[3] + ticks[4]) / os.sysconf("SC_CLK_TCK")
        return total - idle - cpu_seconds(self.pids), total

    def share(self) -> float:
        """Return the percentage since the start; nan if a process has ended."""
        with suppress(OSError):
            pairs = zip(self._seconds(), self.began, strict=True)
            others, total = (now - before for now, before in pairs)
            return 100 * others / total
        return math.nan


class Watch:
    """The bot's memory, sampled while a party is at work."""

    def __init__(self, bot: BotProcess) -> None:
        self.bot, self.idle, self.pids = bot, usage(bot), workers(bot)
        self.log_from = bot.log.stat().st_size
        self.most = self.idle["memory, MB"]

    def until(self, done: Future[Report]) -> None:
        """Sample until the party has ended."""
        while not done.done():
            time.sleep(2)
            with suppress(OSError, IndexError):  # a worker has just died
                self.most = max(self.most, usage(self.bot)["memory, MB"])

    def rows(self, left: int) -> Iterator[Row]:
        """Yield what is as before when all is calm."""
        idle, end, now = self.idle, time.monotonic() + LATER, usage(self.bot)
        # gunicorn starts its threads, two times eight, when it first needs them.
        limits = {name: idle[name] + 16 for name in ("threads", "open files")}
        while time.monotonic() < end and any(now[n] > limits[n] for n in limits):
            time.sleep(1)
            now = usage(self.bot)
        name, memory = "memory, MB", idle["memory, MB"]
        yield Row(f"{name}, at most", memory, self.most, memory + MOST_MEMORY)
        yield Row(f"{name}, afterwards", memory, now[name], memory + MOST_MEMORY)
        for name, limit in limits.items():
            yield Row(f"{name}, afterwards", idle[name], now[name], limit)
        yield Row("left in the queue", 0, left, 0)
        yield Row("processes replaced", 0, len({*self.pids} - {*workers(self.bot)}), 0)
        health = requests.get(f"{self.bot.url}/healthz", timeout=10)
        yield Row("/healthz, status", 200, health.status_code, 200)

    def log_rows(
        self, secrets: Sequence[str], quiet: float, minutes: float, most: float
    ) -> Iterator[Row]:
        """Yield what is wrong with the log, with `quiet` lines a minute before."""
        text = self.bot.log.read_bytes()[self.log_from :].decode("utf-8", "replace")
        lines = text.split("\n")[:-1]
        wrong = [one for one in lines if len(one) > 2000 or not LINE.match(one)]
        wrong += [one for one in lines if not one.isprintable()]
        told = [one for one in lines if any(word in one for word in secrets)]
        for line in [*wrong, *told][:9]:
            print(f"log: {line[:300]!r}", file=sys.stderr)
        yield Row("log lines with a text or a key", 0, len(told), 0)
        yield Row("log lines that are long, odd or forged", 0, len(wrong), 0)
        yield Row("tracebacks in the log", 0, text.count("Traceback"), 0)
        yield Row("log lines a minute", quiet, len(lines) / minutes, quiet + most)


def time_rows(
    quiet: Quiet, began: float, until: float, hostile: float
) -> Iterator[Row]:
    """Yield how long answers took, before and beside the party."""
    for where in dict.fromkeys(quiet.users.values()):
        before = percentiles(quiet.times(where, 0.0, began), tail=95)
        found = percentiles(quiet.times(where, began, until), tail=95)
        for name, alone, beside in zip(("median", "p95"), before, found, strict=True):
            most = 2 * (alone + hostile * (where == MEMBER)) + NOISE
            yield Row(f"{where}: {name}, ms", alone, beside, most)
        longest = max(quiet.times(where, began, until), default=math.nan) * 1000
        yield Row(f"{where}: longest, ms", math.nan, longest, math.inf)


def one_hostile_answer(simulator: Simulator) -> float:
    """Return the milliseconds that one answer to the hostile member takes by itself."""
    times, text = [], f"{MARK} {'x' * 11_000}"
    for _ in range(3):
        known = sum(message.chat == SHARED for message in simulator.delivered)
        began = time.time()
        simulator.say_in_group("hostile0", SHARED, text, ["@RBT#whole"])
        simulator.wait(known + 1, chat=SHARED)
        time.sleep(1)
        last = max(m.time for m in simulator.delivered if m.chat == SHARED)
        times.append((last - began) * 1000)
    return sorted(times)[1]


def burst(simulator: HostileStage) -> None:
    """Let many ask at once: the threads and connections that this takes are kept."""
    fault, simulator.fault = simulator.fault, lambda *_: time.sleep(HOSTILE_TAKES)
    for user in CROWD:
        simulator.say(user, "@RBT#whole", MARK)
    simulator.wait(len(CROWD))
    simulator.fault = fault


def read_by_party(simulator: HostileStage, report: Report) -> int:
    """Count what of others came to the party: in its chats, its prompts, over HTTP."""
    places = ("hostile", SHARED)
    theirs = [m for m in simulator.delivered if m.chat.startswith(places)]
    texts = [json.dumps([m.body, m.states]) for m in theirs]
    in_chats = sum(SECRET in text or NAME in text for text in texts)
    return in_chats + simulator.leaked + report.read


@contextmanager
def a_process() -> Iterator[ProcessPoolExecutor]:
    """Give the party a process of its own, which an error or a signal ends, too."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            for child in active_children():
                child.terminate()
            raise


def run(who: str, store: str, seconds: float) -> list[Row]:
    """Let quiet users ask, alone and beside a party; return the table."""
    simulator, ai_port = HostileStage(), free_port() if who == "ai" else 0
    prepare(simulator)
    evil = f'["{EVIL_ROBOT}"]\nbase_url = "http://127.0.0.1:{ai_port or 1}/v1"\n'
    settings: dict[str, Any] = {"WEB_CONCURRENCY": 2, "BOT_LANGUAGE": "en"}
    if who == "rest":
        settings["GROUP_CONTEXT"] = 5  # a look-up for each question in a group
    staged = stage(store, simulator, settings, more_robots=evil)
    with a_process() as pool, staged as (bot, _), TemporaryDirectory() as folder:
        simulator.party = f"{folder}/party"
        burst(simulator)
        target = target_of(simulator, bot, who, ai_port)
        hostile = one_hostile_answer(simulator) if who == "member" else 0.0
        log_from = bot.log.read_bytes().count(b"\n")
        with Quiet(simulator, who == "member") as quiet:
            alone, others = min(ALONE, seconds), Others(bot)
            time.sleep(alone)
            calm = (bot.log.read_bytes().count(b"\n") - log_from) * 60 / alone
            watch, began, before = Watch(bot), time.time(), others.share()
            simulator.is_hostile = who == "rest"
            party = pool.submit(attack, target, seconds)
            others = Others(bot)
            watch.until(party)
            until, simulator.is_hostile = time.time(), False
            beside = others.share()
        left, _ = settle(bot)
        report, minutes = party.result(), (until - began) / 60
        print("HTTP statuses that the party got:", dict(report.statuses))
        words = [SECRET, MARK, simulator.key, *filter(None, simulator.sigs)]
        most = 30 + 3 * min(60 * RATES[who], RATE_LIMIT * len(target.accounts))
        return [
            *time_rows(quiet, began, until, hostile),
            Row("CPU of other programs, %", before, beside, math.inf),
            Row("answers stopped by another member", 0, quiet.stopped(), math.inf),
            *(Row(f"quiet questions {n}", 0, c, 0) for n, c in quiet.faults().items()),
            Row("read by the party", 0, read_by_party(simulator, report), 0),
            Row("HTTP 500", 0, report.statuses["500"], 0),
            *watch.log_rows(words, calm, minutes, most),
            *watch.rows(left),
        ]


def target_of(
    simulator: HostileStage, bot: BotProcess, who: str, ai_port: int
) -> Target:
    """Return what a party is told."""
    private = SECRET, NAME, simulator.key, simulator.token
    robot = EVIL_ROBOT if who == "ai" else "@RBT#whole"
    calls = simulator.party if who == "rest" else ""
    about = simulator.sdkappid, simulator.token, private, ai_port, robot, calls
    return Target(who, bot.port, *about)


def prepare(simulator: HostileStage) -> None:
    """Make the accounts and groups."""
    users = [f"{NAME}{n}" for n in range(8)]
    hostile = [f"hostile{n}" for n in range(20)]
    simulator.users |= {*users, *hostile, *CROWD, "member0"}
    simulator.groups |= {GROUP: {*users[4:]}, SHARED: {"hostile0", "member0"}}
    simulator.robots = {"@RBT#whole": "", EVIL_ROBOT: "", "@RBT#card": NICK}


def main() -> None:
    """Run what is asked for, print the table and the verdict."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.hostile", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--who", choices=RATES, required=True)
    parser.add_argument("--store", choices=DATABASES, default="sqlite")
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    interrupt_on_signals()
    print(f"hostile, who {options.who}, store {options.store}", flush=True)
    rows = run(options.who, options.store, options.minutes * 60)
    print(f"{'':44}{'before':>10}{'beside':>10}{'limit':>10}")
    for row in rows:
        figures = (f"{value:10,.0f}" for value in (row.before, row.found, row.limit))
        print(f"{row.name:44}", *figures, "" if row.holds else " too much", sep="")
    wrong = [row.name for row in rows if not row.holds]
    print("too much:", ", ".join(wrong) or "nothing")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(1)
