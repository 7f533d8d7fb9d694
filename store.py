"""Where accepted messages wait, and what is remembered of them.

One row per message serves four needs: its id is the de-duplication, the row itself the
durability, its number under one claim per conversation the order, and the text and reply
of finished rows the memory of the chat. The store is the queue: what waits needs no
memory in a process, so a crash loses nothing and another process can go on.

`Store` is the interface and holds the promises; `SQLiteStore` keeps them for the
processes of one machine. Another store is another class with these verbs: add it to
STORES in test_botserver.py and the tests tell whether it keeps them.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

LEASE = 15.0  # seconds a claim lasts unless it is renewed
MAX_ATTEMPTS = 3  # claims that may end without a word before a message is set aside
BUSY_TIMEOUT = 1.5  # seconds to wait for a locked file; Tencent waits 2 for an answer

Data = dict[str, Any]
logger = logging.getLogger(__name__)


class StoreError(Exception):
    """The store cannot be read or written now; it may be again later."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A message in the hands of one worker."""

    seq: int  # grows with every message the store accepts
    id: str
    conversation: str
    data: Data  # what was given to add
    token: str  # who holds it
    reply: str | None  # what was given to keep, perhaps by a process now dead
    accepted: float  # Unix seconds


class Store(Protocol):
    """The promises. Every verb is atomic and may raise StoreError."""

    def add(self, id: str, conversation: str, data: Data) -> bool:
        """Keep a message on disk; False if this id was added before."""

    def claim(self) -> Claim | None:
        """Take the oldest message that is first in a conversation nobody holds.

        A claim lasts LEASE seconds. A message whose claims ended MAX_ATTEMPTS times
        without a finish or a release is set aside instead.
        """

    def renew(self, claims: Iterable[Claim]) -> list[Claim]:
        """Make claims last LEASE seconds from now; return those that were lost."""

    def keep(self, claim: Claim, reply: str, remember: bool = True) -> bool:
        """Store the reply before it is sent; False if the claim was lost.

        Without `remember` neither text nor reply outlives the finish.
        """

    def finish(self, claim: Claim) -> bool:
        """Mark the message answered and free its conversation; False if it was lost."""

    def release(self, claim: Claim, delay: float, failed: bool = False) -> None:
        """Give a message back, to be claimed again in `delay` seconds.

        `failed` counts this claim against MAX_ATTEMPTS.
        """

    def set_aside(self, claim: Claim, reason: str) -> None:
        """Give a message up, until an operator looks, and free its conversation."""

    def history(self, conversation: str, limit: int) -> list[tuple[Data, str]]:
        """Return the last `limit` remembered (data, reply) pairs, oldest first."""

    def forget(self, conversation: str) -> None:
        """Delete every text of the answered messages of a conversation."""

    def due(self, limit: int) -> int:
        """Return how many messages could be claimed now, counting up to `limit`."""

    def prune(self, older_than: float) -> int:
        """Delete what ended more than `older_than` seconds ago; return how many."""

    def stats(self) -> dict[str, float]:
        """Return the numbers of `waiting`, `in_work` and `set_aside` messages, and
        `oldest`, the age in seconds of the oldest that is not answered."""

    def close(self) -> None:
        """Let go of files and connections."""


# `next` is the first unanswered message of its conversation: it can be claimed once
# `due` has come. A claim moves `due` to the end of its lease, so a lease that runs out
# needs no attention. `waiting` messages stand behind it.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL,
    data TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'next', 'done', 'failed')),
    accepted REAL NOT NULL,
    due REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    reply TEXT,
    remember INTEGER NOT NULL DEFAULT 1,
    ended REAL,
    reason TEXT
);
CREATE INDEX IF NOT EXISTS message_due ON message (due) WHERE state = 'next';
CREATE INDEX IF NOT EXISTS message_turn ON message (conversation, state, seq);
CREATE INDEX IF NOT EXISTS message_ended ON message (ended) WHERE ended IS NOT NULL;
"""

_ADD = """
INSERT INTO message (id, conversation, data, state, accepted, due)
SELECT :id, :conversation, :data,
    CASE WHEN EXISTS (SELECT 1 FROM message
        WHERE conversation = :conversation AND state = 'next')
    THEN 'waiting' ELSE 'next' END,
    :now, :now
WHERE true ON CONFLICT (id) DO NOTHING
"""

_CLAIM = """
UPDATE message SET token = :token, due = :until, attempts = attempts + 1
WHERE seq = (SELECT seq FROM message WHERE state = 'next' AND due <= :now
    ORDER BY due LIMIT 1)
RETURNING seq, id, conversation, data, token, reply, accepted, attempts
"""

# Every step of a worker names its claim, so a worker that lost it changes nothing.
_HELD = "WHERE seq = :seq AND token = :token"

_PROMOTE = """
UPDATE message SET state = 'next' WHERE seq = (SELECT min(seq) FROM message
    WHERE conversation = :conversation AND state = 'waiting')
"""

_STATS = """
SELECT
    (SELECT count(*) FROM message WHERE state = 'waiting')
        + (SELECT count(*) FROM message WHERE state = 'next' AND token IS NULL),
    (SELECT count(*) FROM message WHERE state = 'next' AND token IS NOT NULL),
    (SELECT count(*) FROM message WHERE state = 'failed'),
    (SELECT min(accepted) FROM message WHERE state = 'next')
"""


class SQLiteStore:
    """Store in one file, for the threads and processes of one machine.

    Threads that want to write at the same moment share a transaction: the first commits
    for all. A commit that holds an `add` is on the disk before it returns; the other
    verbs can be done again after a power cut and do not wait for the disk.
    """

    def __init__(self, path: str) -> None:
        self._jobs: deque[tuple[Future[Any], Callable[[], Any], bool]] = deque()
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        try:
            self._writer, self._reader = self._connect(path), self._connect(path)
            self._writer.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StoreError(f"the database {path} cannot be opened: {error}") from None

    @staticmethod
    def _connect(path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA secure_delete = FAST")
        return connection

    def _write(self, step: Callable[[], Any], durable: bool = False) -> Any:
        job: Future[Any] = Future()
        self._jobs.append((job, step, durable))
        with self._write_lock:
            if not job.done():
                self._commit([self._jobs.popleft() for _ in range(len(self._jobs))])
        return job.result()

    def _commit(self, jobs: list[tuple[Future[Any], Callable[[], Any], bool]]) -> None:
        durable = any(durable for _, _, durable in jobs)
        try:
            self._writer.execute(
                f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}"
            )
            self._writer.execute("BEGIN IMMEDIATE")
            results = [step() for _, step, _ in jobs]
            self._writer.execute("COMMIT")
        except Exception as error:
            self._roll_back()
            for job, _, _ in jobs:
                job.set_exception(
                    StoreError(f"the database cannot be written: {error}")
                )
        else:
            for (job, _, _), result in zip(jobs, results, strict=True):
                job.set_result(result)

    def _roll_back(self) -> None:
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        except sqlite3.Error:
            logger.exception("the transaction could not be rolled back")

    def _run(self, sql: str, **values: Any) -> sqlite3.Cursor:
        return self._writer.execute(sql, values)

    def _read(self, sql: str, **values: Any) -> list[Any]:
        with self._read_lock:
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(f"the database cannot be read: {error}") from None

    def add(self, id: str, conversation: str, data: Data) -> bool:
        row = {"id": id, "conversation": conversation, "data": json.dumps(data)}
        return bool(
            self._write(
                lambda: self._run(_ADD, now=time.time(), **row).rowcount, durable=True
            )
        )

    def claim(self) -> Claim | None:
        while self.due(1):
            row = self._write(self._claim)
            if row is None:
                break
            seq, id, conversation, data, token, reply, accepted, attempts = row
            claim = Claim(
                seq, id, conversation, json.loads(data), token, reply, accepted
            )
            if attempts <= MAX_ATTEMPTS:
                return claim
            self.set_aside(claim, f"its work was cut short {MAX_ATTEMPTS} times")
        return None

    def _claim(self) -> Any:
        now = time.time()
        return self._run(
            _CLAIM, token=uuid.uuid4().hex, now=now, until=now + LEASE
        ).fetchone()

    def renew(self, claims: Iterable[Claim]) -> list[Claim]:
        claims = list(claims)
        until = time.time() + LEASE
        sql = f"UPDATE message SET due = :until {_HELD}"

        def held(claim: Claim) -> bool:
            values = {"until": until, "seq": claim.seq, "token": claim.token}
            return bool(self._run(sql, **values).rowcount)

        lost = self._write(lambda: [claim for claim in claims if not held(claim)])
        return list(lost)

    def _step(
        self, claim: Claim, change: str, ends: bool = False, **values: Any
    ) -> bool:
        def step() -> bool:
            held = self._run(
                f"UPDATE message SET {change} {_HELD}",
                seq=claim.seq,
                token=claim.token,
                now=time.time(),
                **values,
            ).rowcount
            if held and ends:
                self._run(_PROMOTE, conversation=claim.conversation)
            return bool(held)

        return bool(self._write(step))

    def keep(self, claim: Claim, reply: str, remember: bool = True) -> bool:
        change = "reply = :reply, remember = :remember"
        return self._step(claim, change, reply=reply, remember=remember)

    def finish(self, claim: Claim) -> bool:
        return self._step(
            claim,
            "state = 'done', token = NULL, ended = :now, "
            "data = iif(remember, data, '{}'), reply = iif(remember, reply, NULL)",
            ends=True,
        )

    def release(self, claim: Claim, delay: float, failed: bool = False) -> None:
        change = "token = NULL, due = :now + :delay, attempts = attempts - :back"
        self._step(claim, change, delay=delay, back=not failed)

    def set_aside(self, claim: Claim, reason: str) -> None:
        logger.error("message %s set aside: %s", claim.id, reason)
        change = "state = 'failed', token = NULL, ended = :now, reason = :reason"
        self._step(claim, change, ends=True, reason=reason)

    def history(self, conversation: str, limit: int) -> list[tuple[Data, str]]:
        rows = self._read(
            "SELECT data, reply FROM message WHERE conversation = :conversation "
            "AND state = 'done' AND remember ORDER BY seq DESC LIMIT :limit",
            conversation=conversation,
            limit=limit,
        )
        return [(json.loads(data), reply) for data, reply in reversed(rows)]

    def forget(self, conversation: str) -> None:
        self._write(
            lambda: self._run(
                "UPDATE message SET data = '{}', reply = NULL, remember = 0, "
                "state = 'done' WHERE conversation = :conversation "
                "AND state IN ('done', 'failed')",
                conversation=conversation,
            )
        )

    def due(self, limit: int) -> int:
        sql = "SELECT 1 FROM message WHERE state = 'next' AND due <= :now LIMIT :limit"
        return len(self._read(sql, now=time.time(), limit=limit))

    def prune(self, older_than: float) -> int:
        sql = "DELETE FROM message WHERE ended < :before"
        before = time.time() - older_than
        return int(self._write(lambda: self._run(sql, before=before).rowcount))

    def stats(self) -> dict[str, float]:
        [(waiting, in_work, set_aside, oldest)] = self._read(_STATS)
        age = max(0.0, time.time() - oldest) if oldest else 0.0
        return {
            "waiting": waiting,
            "in_work": in_work,
            "set_aside": set_aside,
            "oldest": round(age, 3),
        }

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()
