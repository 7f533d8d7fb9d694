"""The store in a SQLite file, for the threads and processes of one machine."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..timing import NORMAL, Timing
from .sql import SCHEMA, Data, Rows, Step, add_step
from .store import Store, StoreError

LOOK_EVERY = 0.0005  # seconds between two attempts to get a locked file
BUSY_TIMEOUT = 1.5  # seconds to wait for a locked file; Tencent waits 2 for an answer


class SQLiteStore(Store):
    """Store in one file, for the threads and processes of one machine.

    Threads that want to write at the same moment share a transaction: the first commits
    for all, so one wait for the disk serves many callbacks.
    """

    dialect: ClassVar = {
        "serial": "INTEGER PRIMARY KEY AUTOINCREMENT",
        "without_rowid": " WITHOUT ROWID",
        "now": ":now",
        "lock": "",
        "skip_locked": "",
        "each": "SELECT value FROM json_each",
        "object_of": "json_group_object",
    }

    def __init__(self, url: str, timing: Timing = NORMAL) -> None:
        """Open the file that sqlite:///relative.db or sqlite:////absolute.db names."""
        super().__init__(timing)
        scheme, slashes, self.path = url.partition(":///")
        if scheme != "sqlite" or not self.path or "?" in self.path:
            raise StoreError(
                "it is not like sqlite:///file.db or sqlite:////dir/file.db"
            )
        self._pending: deque[PendingWrite] = deque()
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        try:
            # For its owner only; its WAL will be so, too. One that is there is not
            # opened: to close it would end every lock that SQLite has on it in this
            # process, and another process would delete the WAL.
            with suppress(FileExistsError):
                Path(self.path).touch(0o600, exist_ok=False)
            self._file = os.stat(self.path)
            options: Data = {"timeout": BUSY_TIMEOUT, "isolation_level": None}
            options["check_same_thread"] = False
            self._writer = sqlite3.connect(self.path, **options)
            self._reader = sqlite3.connect(self.path, **options)
            self._execute("PRAGMA journal_mode = WAL", {})
            self._writer.execute("PRAGMA secure_delete = ON")
            schema = SCHEMA.format(**self.dialect)
            self._writer.executescript(schema)
            self._writer.execute("PRAGMA busy_timeout = 0")  # see _execute
            self._writer.execute("PRAGMA synchronous = FULL")
            self._synchronous = "FULL"
        except (OSError, sqlite3.Error) as error:
            why = f"the database {self.path} cannot be opened: {error}"
            raise StoreError(why) from None

    def _check_file(self) -> None:
        """Raise if the file was deleted or replaced: SQLite would write on, unseen."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), self._file):
                return
        raise StoreError(f"{self.path} was deleted or replaced: restart")

    def _execute(self, step: Step, values: Data) -> Any:
        """Do a step or a statement, as soon as the lock is free.

        SQLite does not always wait, and when it does, it looks so seldom that busy
        processes let others starve, and both stand idle in between.
        """
        if callable(step):
            return step(self._execute, values)
        sql, deadline = self._sql.get(step, step), time.monotonic() + BUSY_TIMEOUT
        values["now"] = time.time()
        while True:
            try:
                return self._writer.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_EVERY)

    def _write(self, step: Step, values: Data) -> Any:
        pending = PendingWrite(step, values)
        self._pending.append(pending)
        with self._write_lock:
            if not pending.done:
                self._commit(self._take_pending())
        if pending.error:
            raise StoreError(pending.error)
        return pending.result

    def _take_pending(self) -> list[PendingWrite]:
        return [self._pending.popleft() for _ in range(len(self._pending))]

    def _commit(self, writes: list[PendingWrite]) -> None:
        try:
            durable = any(write.step is add_step for write in writes)
            level = "FULL" if durable else "NORMAL"
            if level != self._synchronous:
                self._writer.execute(f"PRAGMA synchronous = {level}")
                self._synchronous = level
            if durable:
                self._check_file()
            # One statement needs no transaction, and costs less without.
            alone = len(writes) == 1 and isinstance(writes[0].step, str)
            if not alone:
                self._execute("BEGIN IMMEDIATE", {})
            for write in writes:
                write.result = self._execute(write.step, write.values)
            if not alone:
                self._writer.execute("COMMIT")
        except Exception as error:
            with suppress(sqlite3.Error):
                self._writer.rollback()
            # Those behind waited for the same lock: another wait would be too long.
            writes += self._take_pending()
            for write in writes:
                write.error = f"the database cannot be written: {error}"
        for write in writes:
            write.done = True

    def _read(self, name: str, values: Data) -> Rows:
        if not self._read_lock.acquire(timeout=BUSY_TIMEOUT):
            raise StoreError("the database cannot be read: it is busy")
        try:
            self._check_file()
            values = {**values, "now": time.time()}
            return self._reader.execute(self._sql[name], values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"the database cannot be read: {error}") from None
        finally:
            self._read_lock.release()

    def prune(self, age: float) -> int:
        total = super().prune(age)
        self._checkpoint()
        return total

    def forget(self, conversation: str) -> None:
        super().forget(conversation)
        self._checkpoint()

    def _checkpoint(self) -> None:
        """Take deleted texts off the disk; the WAL file becomes small again, too."""
        with self._write_lock, suppress(sqlite3.Error):
            self._writer.execute("PRAGMA busy_timeout = 5")  # milliseconds
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._writer.execute("PRAGMA busy_timeout = 0")

    def durability(self) -> str:
        return f"{self.path}: on this disk before a callback is acknowledged"

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()


@dataclass(slots=True, eq=False)
class PendingWrite:
    """A step that a thread wants done, perhaps by another thread."""

    step: Step
    values: Data
    done: bool = False
    result: Any = None
    error: str = ""
