"""The bot's warnings, and their tracebacks, read from its log while it writes it."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A line of the bot's logging, or of gunicorn's.
LOUD = r"WARNING|ERROR|CRITICAL"
LINE = r"\S+ \S+ (?:(?:{0}) \S+|\S+ \[\d+\] \[(?:{0})\]) (.+)"
ANY, WARNING = re.compile(LINE.format(rf"DEBUG|INFO|{LOUD}")), LINE.format(LOUD)
# The id of a message: robot, user, perhaps group and topic, MsgSeq, MsgRandom, MsgTime.
ID = re.compile(r"(@RBT#\S+) (\S+)(?: \S+){0,2} (\d+) (\d+) \d{9,}")


@contextmanager
def warnings_told(log: Path, tell: Callable[[str, str], None]) -> Iterator[None]:
    """Call `tell` with the text of each warning, and its question's name or "".

    The text goes on with the lines of a traceback: gunicorn logs them as they are, the
    bot on one line.
    """
    ended = threading.Event()

    def read() -> None:
        for record in records(follow(log, ended)):
            if found := re.match(WARNING, record, re.DOTALL):
                named = ID.search(found[1])
                text = ID.sub(r"\2 → \1", found[1]).replace("\\n", "\n")
                tell(text, f"{named[3]} {named[4]}" if named else "")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def records(pieces: Iterable[list[str]]) -> Iterator[str]:
    """Yield what is logged at once: a line, and those after it that begin otherwise."""
    for lines in pieces:
        record: list[str] = []
        for line in lines:
            if record and ANY.match(line):
                yield "\n".join(record)
                record = []
            record.append(line)
        yield "\n".join(record)


def follow(log: Path, ended: threading.Event) -> Iterator[list[str]]:
    """Yield the new lines of a log, those to come too until `ended`.

    It waits for a pause, at most a second: so a traceback is in one piece.
    """
    with log.open(encoding="utf-8", errors="replace") as file:
        text = ""
        for turn in itertools.count():
            last = ended.wait(0.1)
            more = file.read()
            *lines, rest = (text + more).split("\n")
            text += more
            if lines and (last or not more or turn % 10 == 0):
                yield lines
                text = rest
            if last:
                return
