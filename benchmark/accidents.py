"""What the campaign breaks: the bot's processes, its database, the AI and Tencent.

Nothing here looks at the clock to decide what breaks next: messages and calls are
counted, and the seed says at which count what happens, and how.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from imbot.timing import NORMAL
from simulator import BotProcess, Simulator, ai_error

from .load import ROBOT, question
from .stage import Database, set_clock, workers
from .users import Users

AI_FAILS, IM_FAILS = 0.1, 0.05  # shares of all calls
REFUSED = 100  # one of so many answers
MUTE, MUTE_IN = 40, 20  # one of so many chats, anew every so many of its questions
AI_FAULTS = (
    (500, ai_error("api_error", "a failure that was asked for (1000)")),
    (429, ai_error("rate_limit_error", "rate limit (1002)")),
    (529, ai_error("overloaded_error", "overloaded")),
    None,  # the answer breaks off
)
IM_FAULTS = ("lost", "late", 20004, 60007, 90994, 91000)
WORD_FILTER = 80001  # Tencent's code for a text that it will never take
# Messages between two accidents: three accidents in one answer make it fail.
AFTER = (600, 1400)
DOWN = (0.0, 7.0)  # seconds until a bot that was stopped starts again
AWAY = (1.0, 4.0)  # seconds without a store
CUT_OFF = (50, 800)  # callbacks that do not reach the bot
CUT_OFF_LASTS = 30.0  # seconds at most, if users hold back
PAUSE = NORMAL.lease + 3  # seconds; longer than claims last
STEPS = (-9, 0, 9)  # seconds; less than catching up allows for
STEP_LASTS = 4.0  # seconds; longer than a heartbeat takes to come
SILENCE = 150  # seconds; longer than Tencent knows a repetition


@dataclass(frozen=True)
class Accident:
    """What happens `after` so many more messages; `size`, from 0 to 1, says how."""

    after: int
    kind: str
    size: float

    def between(self, low: float, high: float) -> float:
        """Return the number of that size."""
        return low + (high - low) * self.size

    def one_of(self, choices: Sequence[Any]) -> Any:
        """Return the choice of that size."""
        return choices[int(len(choices) * self.size)]


def plan(seed: int, kinds: Sequence[str]) -> Iterator[Accident]:
    """Yield the accidents of a seed, without end: each kind once, then all again."""
    chance = random.Random(f"{seed} accidents")
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Accident(chance.randint(*AFTER), kind, chance.random())


class Accidents:
    """Lets accidents happen to a bot, and remembers them."""

    def __init__(self, bot: BotProcess, database: Database, users: Users) -> None:
        self.bot, self.database, self.users = bot, database, users
        self.log: list[tuple[float, str]] = []  # Unix seconds, what happened
        self.slowest_stop = 0.0
        self.outages: list[tuple[float, float]] = []  # that the bot has to notice

    @property
    def counts(self) -> Counter[str]:
        """How often each kind happened."""
        return Counter(kind for _, kind in self.log)

    def cause(self, accident: Accident) -> None:
        """Let an accident happen, to its end."""
        self.log.append((time.time(), accident.kind))
        KINDS[accident.kind](self, accident)

    def kill_all(self, accident: Accident) -> None:
        """Kill all processes, and start them again."""
        began = time.time()
        self.bot.stop(signal.SIGKILL)
        self._start(began, accident)

    def _start(self, began: float, accident: Accident) -> None:
        """Start the bot, at once or after a while."""
        time.sleep(accident.one_of(DOWN))
        self.bot.start()
        self.outages.append((began, time.time()))

    def kill_worker(self, accident: Accident) -> None:
        """Kill one of gunicorn's workers."""
        with suppress(ProcessLookupError, IndexError):
            os.kill(accident.one_of(workers(self.bot)), signal.SIGKILL)

    def stop(self, accident: Accident) -> None:
        """Stop the bot in order, and start it again."""
        began = time.time()
        self.bot.stop()
        self.slowest_stop = max(self.slowest_stop, time.time() - began)
        self._start(began, accident)

    def reload(self, accident: Accident) -> None:
        """Let gunicorn replace its workers."""
        assert self.bot.process
        self.bot.process.send_signal(signal.SIGHUP)

    def pause(self, accident: Accident) -> None:
        """Stop all processes for longer than a lease, as when a machine is moved."""
        assert self.bot.process
        began = time.time()
        os.killpg(self.bot.process.pid, signal.SIGSTOP)
        time.sleep(PAUSE)
        os.killpg(self.bot.process.pid, signal.SIGCONT)
        self.outages.append((began, time.time()))

    def cut_off(self, accident: Accident) -> None:
        """Lose some callbacks on their way, which the bot cannot know."""
        enough = self.users.lost() + accident.between(*CUT_OFF)
        end = time.monotonic() + CUT_OFF_LASTS
        self.bot.simulator.unreachable = True
        while self.users.lost() < enough and time.monotonic() < end:
            time.sleep(0.02)
        self.bot.simulator.unreachable = False

    def step_clock(self, accident: Accident) -> None:
        """Set the bot's clock forward and back; how it is set last, it stays."""
        for ahead in accident.one_of([*itertools.permutations(STEPS)]):
            set_clock(self.bot, ahead)
            time.sleep(STEP_LASTS)

    def interrupt_store(self, accident: Accident) -> None:
        """Let the database be away for a while."""
        self.database.interrupt(accident.between(*AWAY))


KINDS: dict[str, Callable[[Accidents, Accident], None]] = {
    "kill -9 of all": Accidents.kill_all,
    "kill -9 of a worker": Accidents.kill_worker,
    "SIGTERM": Accidents.stop,
    "SIGHUP": Accidents.reload,
    "no store": Accidents.interrupt_store,
    "pause": Accidents.pause,
    "unreachable": Accidents.cut_off,
    "clock steps": Accidents.step_clock,
}


class BrokenServices(Simulator):
    """A stand-in that lets a share of the calls to the AI and to Tencent IM fail.

    Which ones the seed and their numbers say. `never_sent` has the answers that
    Tencent will never take, as far as they were sent.
    """

    _thread = threading.local()  # .break_after, of the call that this thread serves

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.never_sent = seed, set[Any]()
        self.ai_fault, self.fault = self._ai_fault, self._im_fault
        self.ai_delay = 0.02
        self._ai_calls, self._im_calls = itertools.count(), itertools.count()
        self._mute_until: dict[Any, float] = {}  # chat -> time.monotonic()

    @property
    def break_after(self) -> int:
        """Chunks of this answer, after which it breaks off; 0 if it does not."""
        return getattr(self._thread, "break_after", 0)

    @break_after.setter
    def break_after(self, chunks: int) -> None:
        self._thread.break_after = chunks

    def _ai_fault(self, asked: Any) -> Any:
        chance = random.Random(f"{self.seed} AI {next(self._ai_calls)}")
        self.ai_requests.clear()  # 20,000 with their histories are too many
        fails = chance.random() < AI_FAILS
        fault = chance.choice(AI_FAULTS) if fails else None
        self.break_after = chance.randint(1, 9) if fails and not fault else 0
        return fault

    def _im_fault(self, command: str, body: Any) -> Any:
        chance = random.Random(f"{self.seed} IM {next(self._im_calls)}")
        self.calls.clear()
        robot = body.get("From_Account")
        chat = body.get("GroupId") or body.get("To_Account")
        number = question(json.dumps(body.get("MsgBody")))
        if number > 0 and picked(REFUSED, self.seed, chat, number):
            if robot:  # else a plain message will be tried, too
                self.never_sent.add((robot, chat, number))
            return WORD_FILTER
        if robot == ROBOT and self._is_mute(chat, number):
            return "late"
        return chance.choice(IM_FAULTS) if chance.random() < IM_FAILS else None

    def _is_mute(self, chat: Any, number: int) -> bool:
        """Return whether the calls of a chat get no answer for long.

        That begins with the answer to a question that the seed has picked.
        """
        turn, place = divmod(number, MUTE_IN)
        if number > 0 and place == 0 and picked(MUTE, self.seed, chat, turn):
            self._mute_until.setdefault((chat, turn), time.monotonic() + SILENCE)
        return any(
            name == chat and until > time.monotonic()
            for (name, _), until in self._mute_until.copy().items()
        )


def picked(of: int, *about: Any) -> bool:
    """Return whether this is one of so many, the same at every try."""
    return zlib.crc32(repr(about).encode()) % of == 0
