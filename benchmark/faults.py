"""The campaign of faults: 20,000 messages while everything breaks.

    python -m benchmark.faults                      on SQLite
    python -m benchmark.faults --store postgres     on a PostgreSQL of its own
    python -m benchmark.faults --store gevent       on SQLite, under gevent
    python -m benchmark.faults --seconds 60         for a time
    python -m benchmark.faults --seed 7             with other accidents

The same seed and --messages bring the same accidents, in the same order: they come
after so many messages and calls, not after a time. If something is wrong, what a user
saw around the first of each kind is printed.

The exit status is 0 if no message was lost, answered twice or out of order, mangled,
left open, or given up though Tencent would have taken its answer; if no answer stands
above its question or leaves a phone's input locked; and if every user heard something
within five minutes. Linux only.

A message whose callback failed has to be looked up and answered, too, but for what the
bot cannot notice: callbacks that were lost while it was well (Tencent did not reach it,
or one of its processes died). Such a message may be answered, in its turn, if a later
look-up finds it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass

import requests

from imbot.queue import StoreError, open_store
from simulator import BotProcess, interrupt_on_signals

from .accidents import KINDS, Accidents, BrokenServices, plan
from .judge import judge_all
from .seen import what_was_seen
from .stage import STORES, stage
from .users import Users

NOTICES = 4.0  # seconds in which the bot notices an outage when it is over
SETTLE = 240.0  # seconds in which everything must be answered at the end
MUST_BE_ZERO = (
    "lost",
    "twice",
    "misordered",
    "mangled",
    "left open",
    "locked",
    "above its question",
    "told nothing",
    "left in the store",
    "failed unduly",
)
SETTINGS = {
    "WEB_CONCURRENCY": 2,
    "WORKER_THREADS": 64,
    "RATE_LIMIT": 0,
    "MAX_WAITING": 10_000,
    "HISTORY_TURNS": 2,
    "BOT_LANGUAGE": "en",
    "LOG_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Outcome:
    """What came of a campaign: a table, and what users saw of what is wrong."""

    table: dict[str, int]
    seen: list[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.table[name] for name in MUST_BE_ZERO)


def campaign(store: str, messages: int, seconds: float, seed: int) -> Outcome:
    """Break everything while users ask; return what came of it."""
    simulator = BrokenServices(seed)
    with stage(store, simulator, SETTINGS, own_clock=True) as (bot, database):
        with Users(simulator, seed) as users:
            accidents = Accidents(bot, database, users)
            # A database starts slowly: the seconds are those of asking.
            break_all(accidents, seed, messages, time.monotonic() + seconds)
        left, failed = settle(bot)
        found = judge_all(users.chats, simulator.delivered, accidents.outages)
        found["left in the store"] = left
        found["failed unduly"] = max(0, failed - len(simulator.never_sent))
        happened = accidents.log
        seen = what_was_seen(found, MUST_BE_ZERO, simulator.delivered, happened)
        if found["left in the store"] or found["failed unduly"]:
            seen += errors_in(bot)
    table = {
        "sent": users.asked(),
        "acknowledged": users.acknowledged(),
        "callbacks lost": users.lost(),
        "caught up": found["caught up"],
        "look-ups": sum(simulator.lookups.values()),
        "answered": found["answered"],
        **{name: found[name] for name in MUST_BE_ZERO},
        "begun again": found["begun again"],
        "refused by IM": len(simulator.never_sent),
        **accidents.counts,
        "slowest answer, s": found["slowest"],
        "slowest SIGTERM, s": int(accidents.slowest_stop),
    }
    return Outcome(table, seen)


def break_all(accidents: Accidents, seed: int, messages: int, end: float) -> None:
    """Let one accident of the seed follow the other, until so many messages or the
    `end`, whichever comes first."""
    users = accidents.users
    for accident in plan(seed, [*KINDS]):
        at = users.acknowledged() + accident.after
        if not users.wait_for(min(at, messages), end) or at >= messages:
            return
        line = f"{users.acknowledged():6} {accident.kind} ({accident.size:.2f})"
        print(line, file=sys.stderr)
        accidents.cause(accident)


def errors_in(bot: BotProcess, most: int = 20) -> list[str]:
    """Return the first errors of a bot's log."""
    lines = bot.log.read_text(errors="replace").splitlines()
    return [line for line in lines if " ERROR " in line][:most]


def settle(bot: BotProcess) -> tuple[int, int]:
    """Wait for the last answers; return how many messages have none, and failed.

    A bot that has nothing to do may yet notice that it missed something, or look it up
    later, since Tencent refused to say.
    """
    now = calm = time.monotonic()
    end, left, failed = now + SETTLE, -1, 0
    while now < end and (left or now < calm + NOTICES):
        time.sleep(0.2)
        now = time.monotonic()
        with suppress(requests.RequestException, KeyError, StoreError):
            state = requests.get(f"{bot.url}/healthz", timeout=5).json()
            left, failed = state["waiting"] + state["in_work"], state["failed"]
            calm = now if left or looks_up(bot) else calm
    return left, failed


def looks_up(bot: BotProcess) -> bool:
    """Return whether a bot has not looked up all that it knows to have missed."""
    with closing(open_store(bot.env["DATABASE_URL"])) as store:
        servers = store.get("servers") or {}
        return bool(servers.get("outages") or servers.get("refused"))


def main() -> None:
    """Run the campaign and print what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.faults", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--store", choices=STORES, default="sqlite")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=1800, help="of asking at most")
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    interrupt_on_signals()
    print(f"faults, store {options.store}, seed {options.seed}", flush=True)
    came = campaign(options.store, options.messages, options.seconds, options.seed)
    for name, count in came.table.items():
        print(f"{name:24}{count:8,}")
    print(*came.seen, sep="\n", end="\n" if came.seen else "")
    sys.exit(not came.is_good)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(1)
