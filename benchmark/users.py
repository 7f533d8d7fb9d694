"""The load of the campaign: users who ask one question after the other."""

from __future__ import annotations

import itertools
import random
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import requests

from simulator import Json, Simulator, c2c_event, group_event

from .load import Crowd
from .stage import MODES

USERS, GROUPS, SENDERS = 60, 10, 16
BACKLOG = 600  # messages not answered yet, at which users hold back
REDELIVERED = 10  # one of so many callbacks

Outages = Sequence[tuple[float, float]]  # when they began and ended, Unix seconds


@dataclass(eq=False)
class Chat:
    """One conversation: what was asked in it, and when that was acknowledged or lost.

    A question is lost if its callback brought no 200. Its place is what clients sort
    it by: MsgTime, then MsgSeq.
    """

    user: str
    robot: str
    group: str = ""
    asked: int = 0
    acknowledged: dict[int, float] = field(default_factory=dict)
    lost: dict[int, float] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)  # of those: the bot said so
    again: list[Any] = field(default_factory=list)  # callbacks to deliver once more
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # one-to-one

    def owed(self, outages: Outages | None) -> set[int]:
        """Return the questions that have to be answered.

        They are those that were acknowledged, and those that the bot has to look up: it
        refused the callback, or was not there. With None for the outages it looks
        nothing up.
        """
        if outages is None:
            return {*self.acknowledged}
        missed = {
            number
            for number, at in self.lost.items()
            if any(began <= at <= ended for began, ended in outages)
        }
        return {*self.acknowledged, *self.refused, *missed}


class Users(Crowd):
    """The load: every chat asks one question after the other and counts them.

    No lost question is asked again, and only callbacks that were acknowledged are
    delivered once more: the bot has to look up the rest. The seed says who asks in
    which order, and what is delivered once more. With a `rate` they ask that many a
    second together, else as fast as they are answered.
    """

    def __init__(self, simulator: Simulator, seed: int = 0, rate: float = 0) -> None:
        super().__init__(simulator)
        self.seed, self.rate = seed, rate
        self._turns, self._began = itertools.count(), time.monotonic()
        self._backlog = 0  # of the bot, also of what it looked up
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
        self._threads.append(threading.Thread(target=self._watch, daemon=True))

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return super().__enter__()

    def asked(self) -> int:
        """Return how many questions were asked."""
        return sum(chat.asked for chat in self.chats)

    def acknowledged(self) -> int:
        """Return how many of them were acknowledged."""
        return sum(len(chat.acknowledged) for chat in self.chats)

    def lost(self) -> int:
        """Return how many of them were lost."""
        return sum(len(chat.lost) for chat in self.chats)

    def wait_for(self, count: int, end: float) -> bool:
        """Wait until so many were acknowledged; return False if `end` comes first."""
        while self.acknowledged() < count:
            if time.monotonic() > end:
                return False
            self.closing.wait(0.05)
        return True

    def _ask_on(self, sender: int) -> None:
        mine = self.chats[sender::SENDERS]
        chance = random.Random(f"{self.seed} sender {sender}")
        while not self.closing.wait(self._pause()):
            try:
                late = self._backlog > BACKLOG or not self._ask(chance.choice(mine))
            except requests.RequestException:
                late = True
            if late:
                self.closing.wait(0.1)

    def _watch(self) -> None:
        """Ask the bot now and then how much waits, if it answers."""
        while not self.closing.wait(0.5):
            with suppress(requests.RequestException, KeyError, ValueError):
                url = f"{self.simulator.bot_url}/healthz"
                state = requests.get(url, timeout=5).json()
                self._backlog = state["waiting"] + state["in_work"]

    def _pause(self) -> float:
        """Return the seconds until it is the next question's turn."""
        if not self.rate:
            return 0.0
        due = self._began + next(self._turns) / self.rate
        return max(0.0, due - time.monotonic())

    def _ask(self, chat: Chat) -> bool:
        """Ask the next question; return whether Tencent could tell the bot."""
        number = chat.asked + 1
        event = self._event(chat, f"question [{number}]")
        if not chat.group:
            chat.places[number] = event["MsgTime"], event["MsgSeq"]
        chat.lost[number] = time.time()
        chat.asked = number
        try:
            if not self.simulator.deliver(event):
                return False
        except requests.HTTPError:
            chat.refused.add(number)
            raise
        chat.acknowledged[number] = time.time()
        del chat.lost[number]
        if self._picked("kept", chat, number):
            chat.again.append(event)
        if chat.again and self._picked("again", chat, number):
            self.simulator.callback(chat.again.pop())
        return True

    def _picked(self, what: str, chat: Chat, number: int) -> bool:
        about = (self.seed, what, chat.user, chat.robot, chat.group, number)
        return zlib.crc32(repr(about).encode()) % REDELIVERED == 0

    def _event(self, chat: Chat, text: str) -> Json:
        if not chat.group:
            return c2c_event(chat.user, chat.robot, text)
        seq = self.simulator.next_seq(chat.group)
        return group_event(chat.user, chat.group, seq, text, [chat.robot])
