"""Where accepted messages wait, and what is remembered of them.

The store is the queue: nothing that waits is only in a process, so a crash loses
nothing and another process goes on. The unit of work is the conversation. A row of
`conversation` exists while one of its messages is open; to claim is to take the
conversation that is due longest, and the work is its oldest open message. So a chat is
answered in order, by one worker at a time.

`Store` holds the verbs and their promises, and the end of this file their SQL, which is
the same for both engines: `SQLiteStore` below, for the processes of one machine, and
`PostgresStore` in postgres.py, for several machines. An engine says how a transaction
is made (`_write`, `_read`) and spells the few things that differ (`dialect`).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

LEASE = 12.0  # seconds a claim lasts; Tencent closes a silent stream after 15
LONGEST_DELAY = 120.0  # seconds; what is due later was written before a clock step
MAX_ATTEMPTS = 3  # claims that may end without a word before a message is failed
MINUTE = 60  # seconds over which add's `rate` counts
NO_LIMIT = 2**31 - 1
BATCH = 500  # messages deleted in one transaction
LOOK_EVERY = 0.0005  # seconds between two looks at a locked file
BUSY_TIMEOUT = 1.5  # seconds to wait for a locked file; Tencent waits 2 for an answer
TURN_TIMEOUT = 5.0  # seconds a worker lets callbacks go first, at the most
CONVERSIONS = [  # of older files; without one delete its line and its file
    "version1:convert",
]

Data = dict[str, Any]
Rows = list[tuple[Any, ...]]
Execute = Callable[[str, Data], Rows]
Step = str | Callable[[Execute, Data], Any]  # a statement's name, or what does several
logger = logging.getLogger(__name__)


class StoreError(Exception):
    """The store cannot be read or written now; it may be again later."""


class Added(StrEnum):
    """What became of a message that was given to add."""

    NEW = "new"
    KNOWN = "known"  # its id was added before
    QUEUE_FULL = "queue_full"  # `room` messages of the conversation are open
    RATE_LIMITED = "rate_limited"  # its asker added `rate` in the last MINUTE


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A message in the hands of one worker."""

    seq: int  # grows with every message the store accepts
    id: str
    conversation: str
    data: Data  # what was given to add
    token: str  # names this claim; a worker that lost it changes nothing
    reply: str | None  # what was given to add or save_reply
    progress: Data  # what was given to save_reply, perhaps by a process now dead
    accepted: float  # Unix seconds
    spent: bool  # MAX_ATTEMPTS claims ended without a word: only to be given up


class Store:
    """The verbs and their promises. Each may raise StoreError.

    What a verb does in SQL stands at the end of this file. A callback waits for `add`:
    while one is at the store, workers go there one at a time.
    """

    dialect: ClassVar[dict[str, str]]  # how the engine spells the {words} of the SQL

    def __init__(self) -> None:
        self._sql = {name: sql.format(**self.dialect) for name, sql in SQL.items()}
        self._callbacks: deque[None] = deque()  # at the store now; counted without lock
        self._turn = threading.Lock()

    def _write(self, step: Step, values: Data) -> Any:
        """Do one statement, or a step of several in one transaction.

        What add_step writes is on the disk before it returns; other steps are done
        again after a power cut, unless an engine can crash alone.
        """
        raise NotImplementedError

    def _read(self, name: str, values: Data) -> Rows:
        """Return the rows of a SELECT."""
        return self._write(name, values)  # type: ignore[no-any-return]

    def durability(self) -> str:
        """Say when a message is safe; raise StoreError if it is not."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and connections."""
        raise NotImplementedError

    def _write_in_turn(self, step: Step, values: Data) -> Any:
        """Write what a worker wants, and let callbacks go first."""
        held = bool(self._callbacks) and self._turn.acquire(timeout=TURN_TIMEOUT)
        try:
            return self._write(step, values)
        finally:
            if held:
                self._turn.release()

    def add(
        self,
        id: str,
        conversation: str,
        data: Data,
        asker: str = "",
        room: int = NO_LIMIT,
        rate: int = NO_LIMIT,
        reply: str | None = None,
        sent: float = 0.0,
        remember: bool = False,
    ) -> Added:
        """Keep a message on disk, once however often it is delivered.

        It is refused if `room` messages of the conversation are open, or if `asker`,
        unless empty, added `rate` in the last MINUTE. With a `reply` there is nothing
        to ask, and it is in the history only if `remember` says so. Its turn in the
        conversation is by when it was `sent`, Unix seconds, then by when it was added.
        """
        texts = {"id": id, "conversation": conversation, "asker": asker}
        values: Data = {name: storable(text) for name, text in texts.items()}
        values |= {"data": json.dumps(data), "reply": _dump(reply)}
        values |= {"room": room, "rate": rate, "minute": MINUTE, "sent": sent}
        values["remember"] = int(remember or reply is None)
        self._callbacks.append(None)
        try:
            return Added(self._write(add_step, values))
        finally:
            self._callbacks.pop()

    def claim(self) -> Claim | None:
        """Take the oldest open message of the conversation that is due longest.

        A claim lasts LEASE seconds. A message whose claims ended MAX_ATTEMPTS times
        without a word is claimed once more, as `spent`, and then failed.
        """
        token = os.urandom(16).hex()
        taken = self._write_in_turn("take", {"token": token, "lease": LEASE})
        # A statement of its own, so that it sees what ended a moment ago. Nothing of a
        # conversation ends while another worker holds it.
        rows = taken and self._write("oldest", {"conversation": taken[0][0]})
        if not rows:
            return None
        [(conversation, attempts)], [(seq, id, *texts, accepted)] = taken, rows
        data, reply, progress = map(_load, texts)
        given = (data, token, reply, progress or {}, accepted)
        claim = Claim(seq, id, conversation, *given, spent=attempts > MAX_ATTEMPTS)
        if data is not None and attempts <= MAX_ATTEMPTS + 1:
            return claim
        self.fail(claim, "its work was cut short too often, or it cannot be read")
        return self.claim()

    def state(self, id: str) -> str | None:
        """Return `open`, `done`, `gone` or `failed`, None if the id is not known."""
        rows = self._read("known", {"id": storable(id)})
        return str(rows[0][0]) if rows else None

    def heartbeat(self, claims: Collection[Claim]) -> tuple[list[Claim], list[Claim]]:
        """Make claims last LEASE seconds from now; return those that were lost, and
        those whose conversation was cancelled."""
        names = json.dumps([claim.conversation for claim in claims])
        tokens = json.dumps([claim.token for claim in claims])
        self._write("repair", {"lease": LEASE, "longest": LONGEST_DELAY})
        values = {"lease": LEASE, "names": names, "tokens": tokens}
        held = dict(self._write("heartbeat", values)) if claims else {}
        lost = [claim for claim in claims if claim.token not in held]
        return lost, [claim for claim in claims if held.get(claim.token)]

    def save_reply(
        self, claim: Claim, reply: str | None, progress: Data, remember: bool = True
    ) -> bool:
        """Keep the reply before it is sent, and how far sending has come; False if the
        claim was lost. A reply that is None stays as it is.

        Without `remember` neither text nor reply outlives finish.
        """
        values = {"reply": _dump(reply), "progress": _dump(progress)}
        values |= _held(claim, remember=int(remember))
        return bool(self._write_in_turn("save_reply", values))

    def finish(self, claim: Claim) -> bool:
        """End a message as answered and free its conversation; False if it was lost."""
        return bool(self._write_in_turn(end_step, _held(claim, end="finish")))

    def fail(self, claim: Claim, reason: str) -> bool:
        """Give a message up, until an operator looks; False if the claim was lost."""
        values = _held(claim, end="fail", reason=storable(reason))
        ended = bool(self._write_in_turn(end_step, values))
        if ended:
            logger.error("message %s failed: %s", claim.id, reason)
        return ended

    def release(self, claim: Claim, delay: float, failed: bool = False) -> None:
        """Give a message back, to be claimed again in `delay` seconds.

        `failed` counts this claim against MAX_ATTEMPTS.
        """
        self._write_in_turn("release", _held(claim, delay=delay, uncounted=1 - failed))

    def renumber(self, claim: Claim) -> None:
        """Let the seqs of what waits behind a claim grow from turn to turn. Messages
        that were worked on keep theirs."""
        self._write_in_turn(renumber_step, _held(claim))

    def cancel(self, conversation: str) -> bool:
        """Stop the work on a conversation, also if it begins later; False if there is
        none."""
        return bool(self._write("cancel", {"conversation": storable(conversation)}))

    def history(self, conversation: str, limit: int) -> list[tuple[Data, str]]:
        """Return the last `limit` remembered (data, reply) pairs, oldest first."""
        values = {"conversation": storable(conversation), "limit": limit}
        rows = self._read("history", values)
        turns = [(_load(data), _load(reply)) for data, reply in reversed(rows)]
        return [(data, reply) for data, reply in turns if data and reply]

    def forget(self, conversation: str) -> None:
        """Delete every text of the answered and the failed messages of a conversation,
        and what was put under its name. The ids stay known."""
        self._write_in_turn(forget_step, {"conversation": storable(conversation)})

    def put(self, name: str, value: Data) -> None:
        """Keep a value under a name, instead of the one before."""
        kept = {"name": storable(name), "value": json.dumps(value)}
        self._write_in_turn("put", kept)

    def get(self, name: str) -> Data | None:
        """Return what was put under a name."""
        rows = self._read("get", {"name": storable(name)})
        return _load(rows[0][0]) if rows else None

    def prune(self, age: float) -> int:
        """Delete what ended or was put more than `age` seconds ago; return how many
        messages."""
        total = 0
        self._write("prune_kept", {"age": age})
        [(first, last)] = self._read("span", {})
        for after in range(first - 1, last, BATCH):
            values = {"age": age, "after": after, "last": after + BATCH}
            total += len(self._write("prune", values))
            time.sleep(0.02)  # so that others get their turn
        return total

    def load(self) -> tuple[int, int, int]:
        """Return how many messages wait, how many are claimed, and how many could be
        claimed now."""
        [numbers] = self._read("load", {})
        return numbers

    def stats(self) -> dict[str, float]:
        """Return the numbers of `waiting`, `in_work` and `failed` messages, and
        `oldest`, the age in seconds of the oldest that is open."""
        waiting, in_work, _ = self.load()
        [(failed, oldest)] = self._read("stats", {})
        numbers = {"waiting": waiting, "in_work": in_work, "failed": failed}
        return {**numbers, "oldest": round(max(0.0, oldest), 3)}

    def failed(self) -> list[tuple[int, str, str, float]]:
        """Return (seq, id, reason, seconds since) of failed messages, oldest first."""
        rows = self._read("failed", {})
        return [(seq, id, reason, age) for seq, id, reason, age, _ in rows]

    def retry(self, seqs: Collection[int] | None = None) -> int:
        """Open failed messages again, all or these, in their turn; return how many."""
        count = 0
        for seq, *_, conversation in self._read("failed", {}):
            if seqs is None or seq in seqs:
                values = {"seq": seq, "conversation": conversation}
                count += self._write(retry_step, values)
        return count


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
    }

    def __init__(self, url: str) -> None:
        """Open the file that sqlite:///relative.db or sqlite:////absolute.db names."""
        super().__init__()
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
            for name in CONVERSIONS:
                resolve_name(name)(self._writer, schema)
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


def storable(text: str) -> str:
    """Return a text without what a database cannot hold: NUL, half a surrogate pair."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def _held(claim: Claim, **values: Any) -> Data:
    """Return the values that name a claim, and others."""
    key = {"conversation": claim.conversation, "token": claim.token}
    return {"seq": claim.seq, **key, **values}


def _dump(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _load(text: str | None) -> Any:
    """Return what a text of JSON holds, None if there is none or it is broken."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


# The state of a message is `open`, `done` (remembered), `gone` (only its id is left) or
# `failed`. `due` is when a conversation may be claimed: at once, after a pause, or when
# the lease of a claim has run out. `attempts` counts the claims of its oldest message.
SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    seq {serial},
    id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL,
    asker TEXT,
    state TEXT NOT NULL DEFAULT 'open',
    data TEXT,
    reply TEXT,
    progress TEXT,
    remember INTEGER NOT NULL,
    sent DOUBLE PRECISION NOT NULL,
    accepted DOUBLE PRECISION NOT NULL,
    ended DOUBLE PRECISION,
    reason TEXT
);
CREATE TABLE IF NOT EXISTS conversation (
    name TEXT PRIMARY KEY,
    open INTEGER NOT NULL,
    due DOUBLE PRECISION NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    cancelled INTEGER NOT NULL DEFAULT 0
){without_rowid};
CREATE TABLE IF NOT EXISTS kept (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    put_at DOUBLE PRECISION NOT NULL
){without_rowid};
CREATE INDEX IF NOT EXISTS conversation_due ON conversation (due);
CREATE INDEX IF NOT EXISTS message_of ON message (conversation, state, sent, seq);
CREATE INDEX IF NOT EXISTS message_failed ON message (seq) WHERE state = 'failed';
CREATE INDEX IF NOT EXISTS message_asked ON message (asker, accepted)
    WHERE asker IS NOT NULL;
"""

_HELD = "name = :conversation AND token = :token"

# A step of several statements locks its conversation first: no two wait for each other.
SQL = {
    # Count a message in. What waits for this lock gets a later seq.
    "enter": """INSERT INTO conversation (name, open, due)
        VALUES (:conversation, 1, {now})
        ON CONFLICT (name) DO UPDATE SET open = conversation.open + 1
        RETURNING open""",
    # Keep a message, unless it is known or a limit is reached.
    "insert": """INSERT INTO message
            (id, conversation, asker, data, reply, remember, sent, accepted)
        SELECT :id, :conversation, nullif(:asker, ''), :data, :reply,
            :remember, :sent, {now}
        WHERE :open <= :room AND :rate > (SELECT count(*) FROM message
            WHERE asker = :asker AND accepted BETWEEN {now} - :minute AND {now})
        ON CONFLICT (id) DO NOTHING RETURNING 1""",
    # Count a message out that was not kept.
    "leave": "UPDATE conversation SET open = open - 1 WHERE name = :conversation",
    "known": "SELECT state FROM message WHERE id = :id",
    "drop": "DELETE FROM conversation WHERE name = :conversation AND open = 0",
    # Take the conversation that is due longest.
    "take": """UPDATE conversation
        SET token = :token, due = {now} + :lease, attempts = attempts + 1
        WHERE name = (SELECT name FROM conversation WHERE due <= {now}
            ORDER BY due LIMIT 1 {skip_locked})
        RETURNING name, attempts""",
    "oldest": """SELECT seq, id, data, reply, progress, accepted
        FROM message WHERE conversation = :conversation AND state = 'open'
        ORDER BY sent, seq LIMIT 1""",
    # Prolong leases, and say which of them still are.
    "heartbeat": """UPDATE conversation SET due = {now} + :lease
        WHERE name IN ({each}(:names)) AND token IN ({each}(:tokens))
        RETURNING token, cancelled""",
    # After the clock was set back, nothing waits for it to catch up.
    "repair": """UPDATE conversation
        SET due = {now} + CASE WHEN token IS NULL THEN 0 ELSE :lease END
        WHERE due > {now} + :longest""",
    "save_reply": f"""UPDATE message SET reply = coalesce(:reply, reply),
            remember = CASE WHEN :reply IS NULL THEN remember ELSE :remember END,
            progress = coalesce(:progress, progress)
        WHERE seq = :seq
            AND EXISTS (SELECT 1 FROM conversation WHERE {_HELD} {{lock}})
        RETURNING 1""",
    # End a claim: of a conversation's only open message, or of one of several.
    "free_only": f"DELETE FROM conversation WHERE {_HELD} AND open = 1 RETURNING 1",
    "free": f"""UPDATE conversation
        SET open = open - 1, token = NULL, due = {{now}}, attempts = 0, cancelled = 0
        WHERE {_HELD} RETURNING 1""",
    "finish": """UPDATE message SET ended = {now}, progress = NULL,
            state = CASE WHEN remember = 1 AND reply <> '' THEN 'done' ELSE 'gone' END,
            data = CASE WHEN remember = 1 AND reply <> '' THEN data END,
            reply = CASE WHEN remember = 1 AND reply <> '' THEN reply END
        WHERE seq = :seq""",
    "fail": """UPDATE message SET state = 'failed', ended = {now}, reason = :reason
        WHERE seq = :seq""",
    "release": f"""UPDATE conversation SET token = NULL, due = {{now}} + :delay,
            attempts = attempts - :uncounted
        WHERE {_HELD}""",
    "held": f"SELECT 1 FROM conversation WHERE {_HELD} {{lock}}",
    "unbegun": """SELECT seq FROM message
        WHERE conversation = :conversation AND state = 'open' AND seq <> :seq
            AND reply IS NULL AND progress IS NULL ORDER BY sent, seq""",
    "number": "UPDATE message SET seq = :new WHERE seq = :old",
    "cancel": """UPDATE conversation SET cancelled = 1
        WHERE name = :conversation RETURNING 1""",
    "history": """SELECT data, reply FROM message
        WHERE conversation = :conversation AND state = 'done'
        ORDER BY sent DESC, seq DESC LIMIT :limit""",
    "forget": """UPDATE message SET state = 'gone',
            data = NULL, reply = NULL, progress = NULL, reason = NULL
        WHERE conversation = :conversation AND state IN ('done', 'failed')""",
    "put": """INSERT INTO kept (name, value, put_at) VALUES (:name, :value, {now})
        ON CONFLICT (name) DO UPDATE SET value = excluded.value, put_at = {now}""",
    "get": "SELECT value FROM kept WHERE name = :name",
    "drop_kept": "DELETE FROM kept WHERE name = :conversation",
    "prune_kept": "DELETE FROM kept WHERE put_at < {now} - :age",
    "span": """SELECT coalesce((SELECT min(seq) FROM message), 0),
        coalesce((SELECT max(seq) FROM message), 0)""",
    "prune": """DELETE FROM message WHERE ended < {now} - :age
        AND seq > :after AND seq <= :last RETURNING 1""",
    "load": """SELECT coalesce(sum(open), 0) - count(token), count(token),
            count(CASE WHEN due <= {now} THEN 1 END)
        FROM conversation""",
    "stats": """SELECT (SELECT count(*) FROM message WHERE state = 'failed'),
        coalesce((SELECT {now} - min(message.accepted)
            FROM conversation CROSS JOIN message
            WHERE conversation = name AND state = 'open'), 0)""",
    "failed": """SELECT seq, id, reason, {now} - ended, conversation
        FROM message WHERE state = 'failed' ORDER BY seq""",
    # Open a failed message again; its age counts from now.
    "reopen": """UPDATE message
        SET state = 'open', accepted = {now}, ended = NULL, reason = NULL
        WHERE seq = :seq AND state = 'failed' RETURNING 1""",
}


def add_step(execute: Execute, values: Data) -> Added:
    """Count the message in and keep it; if it is refused, count it out and say why."""
    [(open,)] = execute("enter", values)
    if execute("insert", values | {"open": open}):
        return Added.NEW
    execute("leave", values)
    execute("drop", values)
    if execute("known", values):
        return Added.KNOWN
    return Added.QUEUE_FULL if open > values["room"] else Added.RATE_LIMITED


def end_step(execute: Execute, values: Data) -> bool:
    """Free the conversation, then end the message; nothing if the claim was lost."""
    if not (execute("free_only", values) or execute("free", values)):
        return False
    execute(values["end"], values)
    return True


def renumber_step(execute: Execute, values: Data) -> None:
    """Exchange the seqs of messages; nothing if the claim was lost."""
    rows = execute("unbegun", values) if execute("held", values) else []
    olds = [seq for (seq,) in rows]
    moves = [
        (old, new) for old, new in zip(olds, sorted(olds), strict=True) if old != new
    ]
    for old, _ in moves:  # out of the way
        execute("number", {"old": old, "new": -old})
    for old, new in moves:
        execute("number", {"old": -old, "new": new})


def forget_step(execute: Execute, values: Data) -> None:
    """Delete the texts of a conversation, and what was put under its name."""
    execute("forget", values)
    execute("drop_kept", values)


def retry_step(execute: Execute, values: Data) -> bool:
    """Count the message in and open it; count it out if another process was faster."""
    execute("enter", values)
    if execute("reopen", values):
        return True
    execute("leave", values)
    execute("drop", values)
    return False
