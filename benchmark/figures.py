"""The figures of one run: of the bot on a store, or of a view that does nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from simulator import BotProcess, Delivered, Simulator

from .load import PEOPLE, Post, fire, person, question
from .stage import MODES, stage, workers

SETTINGS = {"WEB_CONCURRENCY": 2, "MAX_BACKLOG": 100_000, "BOT_LANGUAGE": "en"}
NORMAL, TOO_MUCH = 200, 600  # messages a second; Tencent lets an app send 200
SETTLE = 120.0  # seconds for the last answers

Figures = dict[str, tuple[float, ...]]


class TimedSimulator(Simulator):
    """The stand-in, which notes when what came and went instead of what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.remembers = False
        self.users = {person(number) for number in range(PEOPLE)}
        self.robots = dict.fromkeys(MODES, "")
        self.im_seconds: list[float] = []
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.delivered.clear()
        self.asked: dict[int, float] = {}  # question -> when the AI got it
        self.ready: dict[int, float] = {}  # question -> when its answer begins
        self.answered: dict[int, float] = {}  # question -> when that has ended
        self.shown: dict[str, float] = {}  # user -> when a first text came

    def complete(self, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        answer = super().complete(headers, body)
        number = question(json.loads(body)["messages"][-1]["content"])
        self.ready.setdefault(number, time.time())
        return answer

    @contextmanager
    def on_wire(
        self, kind: str, url: str, body: Any, of: str | None = None, trace: str = ""
    ) -> Iterator[dict[str, Any]]:
        began = time.time()
        try:
            yield {}
        finally:
            self._note(kind, began, body)

    def _note(self, kind: str, began: float, body: Any) -> None:
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


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds."""
    ordered, count = sorted(seconds) or [math.nan], len(seconds)
    return ordered[count // 2] * 1000, ordered[count * 99 // 100] * 1000


def measure(store: str, pool: ProcessPoolExecutor) -> Figures:
    """Return the figures of one run: of the bot on a store, or of the bare view."""
    figures: Figures = {}
    simulator = TimedSimulator()
    with stage(store, simulator, SETTINGS | {"WORKER_THREADS": 16}) as (bot, _):
        figures["start-up to the first 200, s"] = (bot.seconds_to_start,)
        figures["memory of a process, idle, MB"] = (Usage(bot).memory(),)
        simulator.ai_delay = 1000  # all threads wait for it
        figures |= acknowledge(simulator, bot, pool)
    if store == "bare":
        return figures
    simulator = TimedSimulator()
    with stage(store, simulator, SETTINGS | {"WORKER_THREADS": 512}) as (bot, _):
        figures |= show_first(simulator)
        simulator.ai_delay = 2.0
        figures |= carry(simulator, bot, pool, NORMAL, 15)
        figures |= carry(simulator, bot, pool, TOO_MUCH, 6)
    return figures


def acknowledge(
    simulator: TimedSimulator, bot: BotProcess, pool: ProcessPoolExecutor
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
    simulator: TimedSimulator,
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


def show_first(simulator: TimedSimulator) -> Figures:
    """Measure the time from the AI's first chunk to the first text on the screen."""
    figures: Figures = {}
    simulator.ai_delay, simulator.ai_pace = 0.2, 0.05
    for robot, mode in MODES.items():
        simulator.begin()
        for number in range(20):
            simulator.say(person(number), robot, f"question [{number}]")
            time.sleep(0.1)
        simulator.wait_for(20)
        shown, ready = simulator.shown, simulator.ready
        waits = [shown.get(person(n), math.inf) - ready[n] for n in ready]
        name = f"AI's answer begins to a text, {mode}, p50 / max, ms"
        figures[name] = percentiles(waits)
    figures["IM call of the stand-in, p50 / p99, ms"] = percentiles(
        simulator.im_seconds
    )
    simulator.ai_pace = 0.0
    return figures
