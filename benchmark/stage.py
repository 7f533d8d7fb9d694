"""What the benchmark and the campaign run on: a stand-in, a bot and its database."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simulator import BotProcess, Simulator

from .databases import PostgresServer, SQLiteFile

Database = SQLiteFile | PostgresServer

MODES = {
    "@RBT#whole": "whole",
    "@RBT#card": "card",
    "@RBT#modify": "modify",
    "@RBT#custom": "custom",
    "@RBT#stream": "stream",
}
DATABASES: dict[str, Callable[[], Database]] = {
    "sqlite": SQLiteFile,
    # As few connections as the smallest plans of platforms have, and a log that is full
    # soon enough for a soak to see whether it grows.
    "postgres": lambda: PostgresServer(max_connections=20, max_wal_size="128MB"),
}
STORES = [*DATABASES, "gevent"]  # see stage
GEVENT = " --worker-class gevent --keep-alive 0"
OTHER_APPS = ("naive", "bare")  # of naive.py

# Python runs it at its start as sitecustomize. (Under libfaketime 0.9.10, Debian's,
# time.sleep of Python 3.11 fails: https://github.com/wolfcw/libfaketime/issues/426)
CLOCK = """
import time
from pathlib import Path
real, ahead = time.time, Path(__file__).with_name("ahead")
time.time = lambda: real() + int(ahead.read_text())
"""


@contextmanager
def stage(
    store: str,
    simulator: Simulator,
    settings: dict[str, Any],
    own_clock: bool = False,
    more_robots: str = "",
) -> Iterator[tuple[BotProcess, Database]]:
    """Run a stand-in, its bot and the bot's database; end them all.

    The store "gevent" is SQLite under another class of gunicorn's workers; one of
    OTHER_APPS is that app instead of the bot, under the same command. With a clock of
    its own, set_clock can set the bot's. `more_robots` is added to robots.toml.
    """
    database = DATABASES.get(store, SQLiteFile)()
    with simulator, database, tempfile.TemporaryDirectory() as folder:
        robots = Path(folder, "robots.toml")
        lines = [f'["{name}"]\nreply_mode = "{mode}"\n' for name, mode in MODES.items()]
        robots.write_text("".join(lines) + more_robots)
        more = {"ROBOTS": robots, "DATABASE_URL": database.url}
        bot = BotProcess(simulator, folder, **settings | more)
        if own_clock:
            Path(folder, "sitecustomize.py").write_text(CLOCK)
            bot.env["PYTHONPATH"] = folder
            set_clock(bot, 0)
        if store in OTHER_APPS:
            bot.command[-1] = f"benchmark.naive:{store}()"
        if store == "gevent":
            bot.env["GUNICORN_CMD_ARGS"] += GEVENT
        try:
            yield bot.start(), database
        finally:
            if bot.process:
                bot.stop(signal.SIGKILL)


def workers(bot: BotProcess) -> list[int]:
    """Return the process ids of gunicorn's workers."""
    assert bot.process
    pid = bot.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


def set_clock(bot: BotProcess, ahead: int) -> None:
    """Let the bot's clock be some seconds ahead of this machine's, or behind it."""
    new = bot.log.with_name("ahead.new")
    new.write_text(str(ahead))
    new.replace(bot.log.with_name("ahead"))  # all processes see it at once
