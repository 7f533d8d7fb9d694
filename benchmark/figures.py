"""The figures of one run: of the bot on a store, or of what it is compared with."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from simulator import BotProcess, Delivered

from .load import Post, fire, person, question
from .stage import MODES, stage
from .timed import CHUNKS, TimedSimulator, Usage, percentiles

SETTINGS = {"WEB_CONCURRENCY": 2, "MAX_BACKLOG": 100_000, "BOT_LANGUAGE": "en"}
SENDERS = 64

Figures = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Load:
    """Callbacks at a rate, and an AI that answers after `delay`, or for `speech`."""

    rate: int  # a second; Tencent lets an app send 200
    seconds: int
    delay: float = 2.0
    speech: float = 0.0  # seconds over which a long answer is spoken
    mode: str = "whole"

    def __str__(self) -> str:
        what = f", {CHUNKS} chunks in {self.speech:.0f} s, {self.mode}"
        return f"{self.rate} messages/s{what if self.speech else ''}"


CALM, BUSY = Load(60, 5), Load(150, 4)
LONG = Load(100, 4, delay=0.0, speech=2.0)
NORMAL, TOO_MUCH = Load(200, 4), Load(600, 6)
GROWING = [Load(30, 3, delay=0.2, speech=3.0, mode=mode) for mode in MODES.values()]
LOADS = {
    "sqlite": [CALM, BUSY, LONG, NORMAL, TOO_MUCH, *GROWING],
    "postgres": [BUSY, NORMAL, TOO_MUCH],
    "gevent": [CALM, BUSY, NORMAL],
    "naive": [CALM, BUSY],
    "bare": [],
}


def measure(store: str, pool: ProcessPoolExecutor) -> Figures:
    """Return the figures of one run."""
    simulator = TimedSimulator()
    with stage(store, simulator, SETTINGS | {"WORKER_THREADS": 16}) as (bot, _):
        figures: Figures = {"start-up to the first 200, s": (bot.seconds_to_start,)}
        figures["memory of a process, idle, MB"] = (Usage(bot).memory(),)
        figures |= acknowledge(simulator, bot, pool)
    if LOADS[store]:
        simulator = TimedSimulator()
        with stage(store, simulator, SETTINGS | {"WORKER_THREADS": 512}) as (bot, _):
            figures |= carry_all(simulator, bot, pool, LOADS[store])
    return figures


def acknowledge(
    simulator: TimedSimulator, bot: BotProcess, pool: ProcessPoolExecutor
) -> Figures:
    """Measure how fast callbacks are taken, while no answer is made."""
    simulator.ai_delay = 1000  # all threads wait for it
    pool.submit(fire, bot.port, simulator.query, 300, 0, 32).result()
    posts, _ = pool.submit(fire, bot.port, simulator.query, 3000, 0, 32).result()
    seconds = max(post.done for post in posts) - min(post.sent for post in posts)
    taken = percentiles([post.done - post.sent for post in posts])
    return {
        "acknowledgements a second": (len(posts) / seconds,),
        "acknowledgement p50 / p99, ms": taken,
        "acknowledgements refused": (sum(not post.ok for post in posts),),
    }


def carry_all(
    simulator: TimedSimulator,
    bot: BotProcess,
    pool: ProcessPoolExecutor,
    loads: list[Load],
) -> Figures:
    """Measure loads, one after the other."""
    figures, wrong = carry(simulator, bot, pool, Load(60, 1, delay=0.2))
    figures.clear()  # threads, connections and files are there now
    for load in loads:
        found, more = carry(simulator, bot, pool, load)
        figures |= found
        wrong = [a + b for a, b in zip(wrong, more, strict=True)]
    figures["memory of a process after all loads, MB"] = (Usage(bot).memory(),)
    figures["refused / lost / twice / out of order"] = tuple(wrong)
    return figures


def carry(
    simulator: TimedSimulator, bot: BotProcess, pool: ProcessPoolExecutor, load: Load
) -> tuple[Figures, list[int]]:
    """Measure a load, to its last answer; return what went wrong, too."""
    simulator.begin()
    simulator.ai_delay, simulator.ai_pace = load.delay, load.speech / CHUNKS
    usage, ours, began = Usage(bot), time.process_time(), time.monotonic()
    count, robot = load.rate * load.seconds, f"@RBT#{load.mode}"
    what = (bot.port, simulator.query, count, load.rate, SENDERS, robot)
    posts, generator = pool.submit(fire, *what).result()
    simulator.wait_for(sum(post.ok for post in posts))
    spent, ours = usage.spent(), time.process_time() - ours
    passed, count = time.monotonic() - began, len(simulator.delivered) or 1
    figures: Figures = {f"{load}: CPU, ms an answer": (spent / count * 1000,)}
    if load in GROWING:
        figures[f"{load}: first text p50 / p99, ms"] = first_texts(simulator)
    else:
        figures[f"{load}: added p50 / p99, ms"] = added(simulator, posts)
        late = percentiles([post.done - post.due for post in posts])
        figures[f"{load}: ack p50 / p99, ms"] = late
    if load is BUSY:
        all_there_is = passed * (os.cpu_count() or 1) / 100
        shares = [used / all_there_is for used in (spent, ours, generator)]
        figures[f"{load}: bot / stand-in / load, % of the CPUs"] = tuple(shares)
    return figures, wrong(posts, simulator.delivered)


def added(simulator: TimedSimulator, posts: list[Post]) -> tuple[float, float]:
    """Return what the bot adds to the time that the AI takes, in milliseconds."""
    shown = {question(m.text): m.born for m in simulator.delivered}
    asked, answered = simulator.asked, simulator.answered
    return percentiles(
        [
            asked[post.number] - post.sent + shown[post.number] - answered[post.number]
            for post in posts
            if post.number in shown
        ]
    )


def first_texts(simulator: TimedSimulator) -> tuple[float, float]:
    """Return the milliseconds from the AI's first chunk to a text on the screen."""
    shown, ready = simulator.shown, simulator.ready
    return percentiles([shown.get(person(n), math.inf) - ready[n] for n in ready])


def wrong(posts: list[Post], delivered: list[Delivered]) -> list[int]:
    """Count what was refused, lost, answered twice and out of order."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for message in delivered:
        numbers[message.chat].append(question(message.text))
    answered = [number for chat in numbers.values() for number in chat]
    lost = {post.number for post in posts if post.ok} - {*answered}
    misordered = sum(a > b for n in numbers.values() for a, b in itertools.pairwise(n))
    refused, twice = sum(not p.ok for p in posts), len(answered) - len({*answered})
    return [refused, len(lost), twice, misordered]


def measure_once(store: str, pool: ProcessPoolExecutor) -> Figures:
    """Return the figures that one run shows well enough."""
    figures: Figures = {}
    if store in ("sqlite", "gevent"):
        simulator = TimedSimulator()
        simulator.ai_delay = 1000
        with stage(store, simulator, SETTINGS) as (bot, _):
            what = (bot.port, simulator.query, 10_000, 0, SENDERS)
            posts, _ = pool.submit(fire, *what, keep=True).result()
        refused = sum(not post.ok for post in posts)
        figures["refused of 10,000 on kept connections"] = (refused,)
    if store in ("sqlite", "naive"):
        figures |= over_tls(store, pool)
    return figures


def over_tls(store: str, pool: ProcessPoolExecutor) -> Figures:
    """Measure a load whose AI and IM are reached by HTTPS."""
    with TemporaryDirectory() as folder:
        simulator = TimedSimulator()
        try:
            certificate = simulator.encrypt(Path(folder))
        except FileNotFoundError:  # without openssl
            return {}
        settings = SETTINGS | {"REQUESTS_CA_BUNDLE": certificate}
        with stage(store, simulator, settings | {"WORKER_THREADS": 512}) as (bot, _):
            figures, _ = carry(simulator, bot, pool, CALM)
        cpu = figures[f"{CALM}: CPU, ms an answer"]
        return {
            f"{CALM}, over TLS: CPU, ms an answer": cpu,
            "handshakes / answers of that": (
                simulator.connections,
                len(simulator.delivered),
            ),
        }
