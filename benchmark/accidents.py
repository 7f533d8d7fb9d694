"""What the campaign breaks: the bot's processes, its database, the AI and Tencent."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from imbot.timing import Timing
from simulator import BotProcess, Simulator, ai_error

from .load import ROBOT, question
from .stage import Database, set_clock, workers

AI_FAILS, IM_FAILS = 0.1, 0.05  # shares of all calls
REFUSED, MUTE = 100, 20  # one of so many answers, one of so many chats
AI_FAULTS = (
    (500, ai_error("api_error", "a failure that was asked for (1000)")),
    (429, ai_error("rate_limit_error", "rate limit (1002)")),
    (529, ai_error("overloaded_error", "overloaded")),
    None,  # the answer breaks off
)
IM_FAULTS = ("lost", "late", 20004, 60007, 90994, 91000)
WORD_FILTER = 80001  # Tencent's code for a text that it will never take
DOWN = (0.0, 7.0)  # seconds until a bot that was stopped starts again
PAUSE = Timing.lease + 3  # seconds; longer than claims last
STEPS = (-9, 0, 9)  # seconds; less than catching up allows for
STEP_LASTS = 4.0  # seconds; longer than a heartbeat takes to come
SILENCE = 150  # seconds; longer than Tencent knows a repetition


class Accidents:
    """What happens to the bot, one after the other, in a random order."""

    def __init__(self, bot: BotProcess, database: Database, seed: int) -> None:
        self.bot, self.database, self.chance = bot, database, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.slowest_stop = 0.0
        self.outages: list[tuple[float, float]] = []  # that the bot has to notice
        self._kinds: dict[str, Callable[[], None]] = {
            "kill -9 of all": self._kill_all,
            "kill -9 of a worker": self._kill_worker,
            "SIGTERM": self._stop,
            "SIGHUP": self._reload,
            "no store": self._interrupt_store,
            "pause": self._pause,
            "unreachable": self._cut_off,
            "clock steps": self._step_clock,
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
        began = time.time()
        self.bot.stop(signal.SIGKILL)
        self._start(began)

    def _start(self, began: float) -> None:
        """Start the bot, at once or after a while."""
        time.sleep(self.chance.choice(DOWN))
        self.bot.start()
        self.outages.append((began, time.time()))

    def _kill_worker(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.chance.choice(workers(self.bot)), signal.SIGKILL)

    def _stop(self) -> None:
        began = time.time()
        self.bot.stop()
        self.slowest_stop = max(self.slowest_stop, time.time() - began)
        self._start(began)

    def _reload(self) -> None:
        assert self.bot.process
        self.bot.process.send_signal(signal.SIGHUP)

    def _pause(self) -> None:
        """Stop all processes for longer than a lease, as when a machine is moved."""
        assert self.bot.process
        began = time.time()
        os.killpg(self.bot.process.pid, signal.SIGSTOP)
        time.sleep(PAUSE)
        os.killpg(self.bot.process.pid, signal.SIGCONT)
        self.outages.append((began, time.time()))

    def _cut_off(self) -> None:
        """Let Tencent not reach the bot for some seconds, which the bot cannot know."""
        self.bot.simulator.unreachable = True
        time.sleep(self.chance.uniform(1, 8))
        self.bot.simulator.unreachable = False

    def _step_clock(self) -> None:
        """Set the bot's clock forward and back; how it is set last, it stays."""
        for ahead in self.chance.sample(STEPS, len(STEPS)):
            set_clock(self.bot, ahead)
            time.sleep(STEP_LASTS)

    def _interrupt_store(self) -> None:
        self.database.interrupt(self.chance.uniform(1, 4))


def break_services(simulator: Simulator, seed: int) -> set[Any]:
    """Make a share of the calls to the AI service and to Tencent IM fail.

    Returns the answers that Tencent will never take, as far as they were sent.
    """
    chance, began = random.Random(seed), time.monotonic()
    refused: set[Any] = set()

    def ai_fault(asked: Any) -> Any:
        simulator.ai_requests.clear()  # 20,000 with their histories are too many
        fails = chance.random() < AI_FAILS
        fault = chance.choice(AI_FAULTS) if fails else None
        simulator.break_after = chance.randint(1, 9) if fails and not fault else 0
        return fault

    def im_fault(command: str, body: Any) -> Any:
        simulator.calls.clear()
        robot, chat = (
            body.get("From_Account"),
            body.get("GroupId") or body.get("To_Account"),
        )
        number = question(json.dumps(body.get("MsgBody")))
        if number > 0 and picked(REFUSED, chat, number):
            if robot:  # else a plain message will be tried, too
                refused.add((robot, chat, number))
            return WORD_FILTER
        period = int((time.monotonic() - began) // SILENCE)
        if robot == ROBOT and period % 2 and picked(MUTE, chat, period):
            return "late"
        return chance.choice(IM_FAULTS) if chance.random() < IM_FAILS else None

    simulator.ai_fault, simulator.fault = ai_fault, im_fault
    simulator.ai_delay = 0.02
    return refused


def picked(of: int, *about: Any) -> bool:
    """Return whether this is one of so many, the same at every try."""
    return zlib.crc32(repr(about).encode()) % of == 0
