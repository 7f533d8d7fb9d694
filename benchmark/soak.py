"""The soak: hours of questions at a steady rate, with faults; does anything grow?

    python -m benchmark.soak --minutes 60
    python -m benchmark.soak --minutes 60 --store postgres

Twice a minute it notes the bot's memory, threads and open files, and the size of its
database. The exit status is 0 if nothing grew by more than 5 % after the first ten
minutes, or after the first third of a shorter run. The database keeps messages for
RETENTION_DAYS, so what counts is its size per message. The faults are those that leave
the processes running: a new process would begin with new figures. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from simulator import BotProcess, interrupt_on_signals

from .accidents import Accidents, BrokenServices, plan
from .faults import SETTINGS, settle
from .stage import DATABASES, Database, stage, workers
from .users import Users

RATE = 50  # messages a second
EVERY = 30.0  # seconds between two samples
SAMPLES = 12  # at least, also in a short run
WARM_UP = 600.0  # seconds, or a third of a shorter run
MOST = 1.05  # growth after that
GENTLE = ("no store", "unreachable", "pause")  # accidents
MAY_GROW = "messages"

Sample = dict[str, float]


def sample(bot: BotProcess, database: Database, users: Users) -> Sample:
    """Return the figures of this moment."""
    size, log = database.sizes()
    messages = users.acknowledged() or 1
    return {
        MAY_GROW: messages,
        **usage(bot),
        "database, bytes a message": size / messages,
        "WAL, MB": log / 1e6,
    }


def usage(bot: BotProcess) -> Sample:
    """Return what the bot's processes use together."""
    assert bot.process
    places = [Path(f"/proc/{pid}") for pid in (bot.process.pid, *workers(bot))]
    states = [place.joinpath("status").read_text() for place in places]
    return {
        "memory, MB": sum(field(state, "VmRSS") for state in states) / 1024,
        "threads": sum(field(state, "Threads") for state in states),
        "open files": sum(len(os.listdir(place / "fd")) for place in places),
    }


def field(status: str, name: str) -> int:
    """Return a number of /proc/<pid>/status."""
    return int(status.partition(f"{name}:")[2].split()[0])


def growth(samples: list[Sample]) -> dict[str, float]:
    """Return how much each figure grew: the median of its last quarter by that of its
    first."""
    count = max(1, len(samples) // 4)
    first, last = samples[:count], samples[-count:]
    return {
        name: median(one[name] for one in last)
        / (median(one[name] for one in first) or 1.0)
        for name in samples[0]
        if name != MAY_GROW
    }


@contextmanager
def breaking(accidents: Accidents, seed: int) -> Iterator[None]:
    """Let accidents happen in the background."""
    over = threading.Event()

    def run() -> None:
        for accident in plan(seed, GENTLE):
            at = accidents.users.acknowledged() + accident.after
            while accidents.users.acknowledged() < at:
                if over.wait(0.5):
                    return
            accidents.cause(accident)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def soak(store: str, seconds: float, seed: int) -> tuple[list[Sample], int]:
    """Let users ask; return the samples after the warm-up, and what stayed open."""
    simulator, kept = BrokenServices(seed), []
    every, warm = min(EVERY, seconds / SAMPLES), min(WARM_UP, seconds / 3)
    with stage(store, simulator, SETTINGS, own_clock=True) as (bot, database):
        users = Users(simulator, seed, RATE)
        with users, breaking(Accidents(bot, database, users), seed):
            for number in range(1, round(seconds / every) + 1):
                time.sleep(every)
                figures = sample(bot, database, users)
                print_row(number * every, figures, with_names=number == 1)
                if number * every > warm:
                    kept.append(figures)
        left, _ = settle(bot)
    return kept, left


def print_row(seconds: float, figures: Sample, with_names: bool = False) -> None:
    """Print a row of the table, below its head."""
    if with_names:
        print(f"{'seconds':>8}", *(f"{name:>26}" for name in figures))
    values = (f"{value:26,.1f}" for value in figures.values())
    print(f"{seconds:8,.0f}", *values, flush=True)


def main() -> None:
    """Run the soak, print its table and its verdict."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--store", choices=DATABASES, default="sqlite")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    interrupt_on_signals()
    print(f"soak, store {options.store}, seed {options.seed}, {RATE} messages a second")
    samples, left = soak(options.store, options.minutes * 60, options.seed)
    grown = growth(samples)
    for name, by in grown.items():
        print(f"{name:26}{by:8.3f}")
    too_much = [name for name, by in grown.items() if by > MOST]
    print("left in the store:", left)
    print("grew too much:", ", ".join(too_much) or "nothing")
    sys.exit(bool(too_much or left))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(1)
