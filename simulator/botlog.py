"""The bot's warnings, read from its log while it writes it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A line of the bot's logging, or of gunicorn's.
LOUD = r"WARNING|ERROR|CRITICAL"
WARNING = re.compile(rf"\S+ \S+ (?:(?:{LOUD}) \S+|\S+ \[\d+\] \[(?:{LOUD})\]) (.+)")
# The id of a message: robot, user, perhaps group and topic, MsgSeq, MsgRandom, MsgTime.
ID = re.compile(r"(@RBT#\S+) (\S+)(?: \S+){0,2} (\d+) (\d+) \d{9,}")


@contextmanager
def warnings_told(log: Path, tell: Callable[[str, str], None]) -> Iterator[None]:
    """Call `tell` with the text of each warning, and its question's name or ""."""
    ended = threading.Event()

    def read() -> None:
        for line in follow(log, ended):
            if found := WARNING.match(line):
                named = ID.search(found[1])
                text = ID.sub(r"\2 → \1", found[1])
                tell(text, f"{named[3]} {named[4]}" if named else "")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def follow(log: Path, ended: threading.Event) -> Iterator[str]:
    """Yield the lines of a log, those to come too until `ended`."""
    with log.open(encoding="utf-8", errors="replace") as file:
        rest, last = "", False
        while not last:
            last = ended.wait(0.1)
            *lines, rest = (rest + file.read()).split("\n")
            yield from lines
