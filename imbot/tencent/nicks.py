"""The robots' nicks, by which users mention them in groups.

robots.toml may name them. Others are learned from Tencent, by a worker thread: a
callback, which has 2 seconds, never waits for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping

from .callback import Json, Message, clean, read_mention
from .mentions import mentions
from .rest import UNREADABLE, Client, IMError

NICK = "Tag_Profile_IM_Nick"
PROFILES = 100  # accounts in one call, at most

logger = logging.getLogger(__name__)


class Nicks(Mapping[str, str | None]):
    """Robots' nicks: "" if a robot has none, None if it is not known yet."""

    def __init__(self, im: Client, named: Mapping[str, str]) -> None:
        self._im, self._timing = im, im.timing
        self._nicks: dict[str, str | None] = {r: n for r, n in named.items() if n}
        self._due: dict[str, float] = {}  # robot -> time.monotonic() of the next call
        self._lock = threading.Lock()
        self._untold: set[str] = set()  # robots whose nick Tencent may tell later
        self._warned = False

    def __getitem__(self, robot: str) -> str | None:
        """Return a robot's nick at once. One that is not known is asked for later."""
        if robot not in self._nicks:
            self._due.setdefault(robot, 0.0)
        return self._nicks.setdefault(robot, None)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._nicks])

    def __len__(self) -> int:
        return len(self._nicks)

    def settle(self, message: Message) -> Message:
        """Return a message without the mention of its robot, whose nick is learned now
        if it must be: for a worker thread."""
        if not message.group:
            return message
        self.learn(message.robot)
        if message.kind != "mention":
            return message
        named = [(robot, nick or "") for robot, nick in self.items()]
        text, own = message.text, message.robot
        named = [names for names in named if names[0] == own or mentions(text, *names)]
        return read_mention(message, named)

    def learn(self, robot: str) -> bool:
        """Ask Tencent for a robot's nick if it is not known or old, and for others'.

        Nothing is raised: without its nick a robot is known by its UserID. Return False
        if Tencent did not answer, but may do so later.
        """
        if not robot:  # of a recall in a group
            return True
        _ = self[robot]
        with self._lock:
            now = time.monotonic()
            due = [one for one, at in [*self._due.items()] if at <= now]
            if robot in due:
                self._ask([robot, *(one for one in due if one != robot)][:PROFILES])
            return robot not in self._untold

    def note(self, robot: str, nick: str) -> None:
        """Note a nick that Tencent told, "" if the robot has none."""
        with self._lock:
            self._keep(robot, nick, self._timing.nick_life)
            self._untold.discard(robot)

    def _keep(self, robot: str, nick: str, life: float) -> None:
        """Keep a nick, or the one before, and ask again after some seconds."""
        self._nicks[robot] = nick or self._nicks.get(robot) or ""
        self._due[robot] = time.monotonic() + life

    def _ask(self, robots: list[str]) -> None:
        """Ask for the nicks of robots; log why if Tencent tells none."""
        found, wait = {}, self._timing.nick_life
        self._untold -= {*robots}
        try:
            command, body = asking_for(robots)
            answer = self._im.call(command, body, (), self._timing.aside)
            found, self._warned = nicks_of(answer), False
        except (IMError, *UNREADABLE) as error:
            wait = self._timing.nick_retry
            why = error if isinstance(error, IMError) else type(error).__name__
            if isinstance(error, IMError) and error.retry:
                self._untold |= {one for one in robots if not self._nicks.get(one)}
            if not self._warned:
                logger.warning("the robots' nicks are not known: %s", why)
            self._warned = True
        for one in robots:
            self._keep(one, found.get(one, ""), wait)


def asking_for(robots: list[str]) -> tuple[str, Json]:
    """Return the call, and its body, that asks Tencent for the nicks of robots.

    https://www.tencentcloud.com/document/product/1047/34917
    """
    return "profile/portrait_get", {"To_Account": robots, "TagList": [NICK]}


def nicks_of(answer: Json) -> dict[str, str]:
    """Return the nicks that Tencent told. Raises one of UNREADABLE."""
    return {
        profile["To_Account"]: clean(item["Value"])
        for profile in answer["UserProfileItem"]
        for item in profile.get("ProfileItem") or []
        if item["Tag"] == NICK
    }
