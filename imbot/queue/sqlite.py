"""The store in a SQLite file, for the threads and processes of one machine."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..timing import NORMAL, Timing
from .sql import ADD_COLUMNS, SCHEMA, Data, Rows, Step
from .store import DURABLE, Store, StoreError

SMALLEST = 512  # bytes of a file with tables; SQLite notices if other pages are missing
LONGEST_WAL = 4 << 20  # bytes that its file keeps; SQLite checkpoints at about that
NOT_OURS = "the bot must be allowed to write to it and to its folder"
HINTS = {  # what an operator can do, by the kind of SQLite's error
    sqlite3.SQLITE_READONLY: NOT_OURS,
    sqlite3.SQLITE_CANTOPEN: NOT_OURS,
    sqlite3.SQLITE_FULL: "make room on its disk",
}
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
REPAIR = "stop the server, move the file and its -wal away, and start again"
HAS_COLUMN = "SELECT 1 FROM pragma_table_info(:table) WHERE name = :column"


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

    def __init__(self, url: str, timing: Timing = NORMAL, app: int = 0) -> None:
        """Open the file that sqlite:///relative.db or sqlite:////absolute.db names."""
        super().__init__(timing, app)
        self.path = path_of(url)
        self._pending: deque[PendingWrite] = deque()
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        self._connections = ExitStack()
        self._damage = ""  # what SQLite found wrong with the file
        try:
            self._open()
            self._check_owner(self._execute)
        except OSError as error:
            self.close()
            why = f"{self.path} cannot be opened: {error.strerror}: {NOT_OURS}"
            raise StoreError(why) from None
        except sqlite3.Error as error:
            self.close()
            raise StoreError(self._explain("opened", error)) from None
        except StoreError:
            self.close()
            raise

    def _open(self) -> None:
        """Create the file and the tables unless they exist, and check what is there."""
        # For its owner only; its WAL will be so, too. A file that exists is not opened
        # here: closing it would drop all locks that SQLite has on it in this process,
        # and another process would delete the WAL.
        with suppress(FileExistsError):
            Path(self.path).touch(0o600, exist_ok=False)
        self._writer, self._reader = self._connect(), self._connect()
        self._execute("PRAGMA journal_mode = WAL", {})
        self._writer.execute("PRAGMA secure_delete = ON")
        self._writer.execute(f"PRAGMA journal_size_limit = {LONGEST_WAL}")
        self._writer.executescript(SCHEMA.format(**self.dialect))
        for (table, column), kind in ADD_COLUMNS.items():
            if not self._execute(HAS_COLUMN, {"table": table, "column": column}):
                self._add_column(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
        [(found,)] = self._reader.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {found}")
        self._writer.execute("PRAGMA busy_timeout = 0")  # see _execute
        self._writer.execute("PRAGMA synchronous = FULL")
        self._synchronous = "FULL"
        self._file = os.stat(self.path)

    def _add_column(self, sql: str) -> None:
        try:
            self._execute(sql, {})
        except sqlite3.OperationalError as error:
            if "duplicate column" not in str(error):  # another process was faster
                raise

    def _connect(self) -> sqlite3.Connection:
        options: Data = {"timeout": self.timing.locked, "isolation_level": None}
        connection = sqlite3.connect(self.path, check_same_thread=False, **options)
        return self._connections.enter_context(closing(connection))

    def _check_file(self) -> None:
        """Raise StoreError if the file is not the one that was opened, or damaged.

        SQLite would write on, to a file that nobody can read again.
        """
        if self._damage:
            raise StoreError(self._damage)
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            now = None
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}") from None
        if not now or not os.path.samestat(now, self._file):
            raise StoreError(f"{self.path} was deleted or replaced: restart")
        if now.st_size < SMALLEST:
            raise StoreError(f"{self.path} was truncated: {REPAIR}")

    def _explain(self, what: str, error: Exception) -> str:
        """Return what an operator needs to know; remember that the file is damaged."""
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if kind in DAMAGED:
            self._damage = f"{self.path} is damaged ({error}): {REPAIR}"
        hint = f": {HINTS[kind]}" if kind in HINTS else ""
        return self._damage or f"{self.path} cannot be {what}: {error}{hint}"

    def _execute(self, step: Step, values: Data, last: bool = False) -> Any:
        """Run a step or a statement as soon as the lock is free.

        SQLite's own busy handler backs off so long that a busy process starves the
        others.
        """
        if callable(step):
            return step(self._execute, values)
        sql = self._sql.get(step, step)
        values["now"], deadline = time.time(), time.monotonic() + self.timing.locked
        while True:
            try:
                return self._writer.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(self.timing.look)

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
            durable = any(write.step in DURABLE for write in writes)
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
            # Those behind waited for the same lock: a second wait would be too long.
            writes += self._take_pending()
            for write in writes:
                write.error = self._explain("written", error)
        for write in writes:
            write.done = True

    def _read(self, name: str, values: Data) -> Rows:
        if not self._read_lock.acquire(timeout=self.timing.locked):
            raise StoreError(f"{self.path} cannot be read: it is busy")
        try:
            self._check_file()
            values = {**values, "now": time.time()}
            return self._reader.execute(self._sql[name], values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(self._explain("read", error)) from None
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
            self._connections.close()


def path_of(url: str) -> str:
    """Return the path of the file that a URL names. Raises StoreError."""
    scheme, _, path = url.partition(":///")
    if scheme != "sqlite" or not path or "?" in path:
        raise StoreError("it is not like sqlite:///file.db or sqlite:////dir/file.db")
    if path == ":memory:":
        raise StoreError("sqlite:///:memory: keeps nothing: name a file")
    return path


@dataclass(slots=True, eq=False)
class PendingWrite:
    """A step that a thread wants run, perhaps by another thread."""

    step: Step
    values: Data
    done: bool = False
    result: Any = None
    error: str = ""
