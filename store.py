"""Where accepted messages wait, and what is remembered of them.

One record per message serves four needs: its id is the de-duplication, the record the
durability, its number under one claim per conversation the order, and the text and
reply of answered ones the memory of the chat. The store is the queue: what waits needs
no memory in a process, so a crash loses nothing and another process can go on.

`Store` holds the verbs and their promises. `SQLiteStore` keeps them for the processes
of one machine, `RedisStore` for several machines. Another store is another `_run`, that
does the step of a verb, as `_SQL` and `_LUA` say it for these two; the tests of the
store tell whether it keeps the promises.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

LEASE = 15.0  # seconds a claim lasts unless it is renewed
MAX_ATTEMPTS = 3  # claims that may end without a word before a message is set aside
BUSY_TIMEOUT = 1.5  # seconds to wait for a locked file; Tencent waits 2 for an answer
REDIS_TIMEOUT = 0.7  # seconds to wait for a connection, and again for an answer
REMEMBERED = 50  # answered messages of one conversation whose texts Redis keeps
BATCH = 500  # messages deleted in one step
MINUTE = 60  # seconds over which add's `rate` counts
# Verbs that do not wait in line: Tencent waits for them, or they keep the claims.
URGENT = ("add", "look_up", "request_stop", "stats", "renew", "stops")
POLITE = 5.0  # seconds that the other verbs wait in line at the most
ANY = 2**31  # no limit

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
    progress: Data  # likewise
    accepted: float  # Unix seconds


class Store:
    """The promises. Every verb is one atomic step and may raise StoreError."""

    def __init__(self) -> None:
        self._urgent: deque[str] = deque()  # at the store now; counts without a lock
        self._turn = threading.Lock()

    def _run(self, verb: str, values: Data) -> Any:
        """Do the step of a verb; return rows, or how many messages it changed."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and connections."""
        raise NotImplementedError

    def _do(self, verb: str, **values: Any) -> Any:
        for name, value in values.items():
            if isinstance(value, str):  # half a surrogate pair cannot be stored
                values[name] = value.encode(errors="backslashreplace").decode()
        with self._in_line(verb):
            return self._run(verb, values)

    @contextlib.contextmanager
    def _in_line(self, verb: str) -> Iterator[None]:
        """While a callback is at the store, let the others go there one at a time: else
        it stands behind hundreds of answers when there is too much to do."""
        if verb in URGENT:
            self._urgent.append(verb)
            try:
                yield
            finally:
                self._urgent.pop()
        else:
            held = bool(self._urgent) and self._turn.acquire(timeout=POLITE)
            try:
                yield
            finally:
                if held:
                    self._turn.release()

    def _held(self, verb: str, claim: Claim, **values: Any) -> bool:
        key = {"id": claim.id, "token": claim.token, "conversation": claim.conversation}
        return bool(self._do(verb, **key, **values))

    def _tokens(self, verb: str, claims: list[Claim], **values: Any) -> set[str]:
        tokens = json.dumps({claim.id: claim.token for claim in claims})
        return {token for (token,) in self._do(verb, claims=tokens, **values)}

    def add(
        self,
        id: str,
        conversation: str,
        data: Data,
        asker: str = "",
        room: int = ANY,
        rate: int = ANY,
    ) -> bool:
        """Keep a message on disk.

        False if this id was added before, if `room` messages of the conversation are
        not answered yet, or if `asker`, unless empty, added `rate` in the last MINUTE.
        """
        values = {"id": id, "conversation": conversation, "asker": asker}
        limits = {"room": room, "rate": rate, "minute": MINUTE}
        return bool(self._do("add", **values, **limits, data=json.dumps(data)))

    def look_up(self, id: str, conversation: str, asker: str) -> tuple[bool, int, int]:
        """Return what makes add refuse: whether this id was added before, how many
        messages of a conversation are not answered, how many `asker` added lately."""
        values = {"id": id, "conversation": conversation, "asker": asker}
        [(known, waiting, asked)] = self._do("look_up", **values, minute=MINUTE)
        return bool(known), int(waiting), int(asked)

    def claim(self) -> Claim | None:
        """Take the oldest message that is first in a conversation nobody holds.

        A claim lasts LEASE seconds. A message whose claims ended MAX_ATTEMPTS times
        without a finish or a release is set aside instead.
        """
        while rows := self._do("claim", new=uuid.uuid4().hex, lease=LEASE):
            claim, spent = _read_claim(rows[0])
            if not spent:
                return claim
            self.set_aside(claim, f"its work was cut short {MAX_ATTEMPTS} times")
        return None

    def renew(self, claims: Iterable[Claim]) -> list[Claim]:
        """Make claims last LEASE seconds from now; return those that were lost."""
        claims = list(claims)
        held = self._tokens("renew", claims, lease=LEASE)
        return [claim for claim in claims if claim.token not in held]

    def keep(
        self,
        claim: Claim,
        reply: str | None,
        remember: bool = True,
        progress: Data | None = None,
    ) -> bool:
        """Store the reply before it is sent, and how far sending has come; False if
        the claim was lost. What is None stays as it is.

        Without `remember` neither text nor reply outlives the finish.
        """
        values = {"reply": _dump(reply), "progress": _dump(progress)}
        return self._held("keep", claim, remember=int(remember), **values)

    def finish(self, claim: Claim) -> bool:
        """Mark the message answered and free its conversation; False if it was lost."""
        return self._held("finish", claim, most=REMEMBERED)

    def release(self, claim: Claim, delay: float, failed: bool = False) -> None:
        """Give a message back, to be claimed again in `delay` seconds.

        `failed` counts this claim against MAX_ATTEMPTS.
        """
        self._held("release", claim, delay=delay, back=int(failed) - 1)

    def set_aside(self, claim: Claim, reason: str) -> None:
        """Give a message up, until an operator looks, and free its conversation."""
        if self._held("set_aside", claim, reason=reason):
            logger.error("message %s set aside: %s", claim.id, reason)

    def failed(self, limit: int = 100) -> list[tuple[str, str, float]]:
        """Return (id, reason, seconds since) of messages set aside, oldest first."""
        rows = self._do("failed", limit=limit)
        return [(id, reason, float(age)) for id, reason, age in rows]

    def retry(self, ids: Iterable[str] | None = None) -> int:
        """Put messages set aside, all or these, back in their turn; return how many."""
        return int(self._do("retry", ids=None if ids is None else json.dumps([*ids])))

    def request_stop(self, conversation: str) -> bool:
        """Mark the message of a conversation that is held now, by whichever process;
        False if none is."""
        return bool(self._do("request_stop", conversation=conversation))

    def stops(self, claims: Iterable[Claim]) -> list[Claim]:
        """Return those of the claims that were marked by request_stop."""
        claims = list(claims)
        marked = self._tokens("stops", claims)
        return [claim for claim in claims if claim.token in marked]

    def history(self, conversation: str, limit: int) -> list[tuple[Data, str]]:
        """Return the last `limit` remembered (data, reply) pairs, oldest first.

        A store may remember no more than REMEMBERED.
        """
        rows = self._do("history", conversation=conversation, limit=max(limit, 0))
        return [(_load(data), _load(reply)) for data, reply in reversed(rows)]

    def forget(self, conversation: str) -> None:
        """Delete every text of the answered messages of a conversation, and of those
        set aside. Their ids stay known."""
        self._do("forget", conversation=conversation)

    def due(self, limit: int) -> int:
        """Return how many messages could be claimed now, counting up to `limit`."""
        return int(self._do("due", limit=limit)[0][0])

    def prune(self, older_than: float) -> int:
        """Delete what ended more than `older_than` seconds ago; return how many."""
        total = 0
        while deleted := self._do("prune", age=older_than, most=BATCH):
            total += deleted
            time.sleep(0.02)  # so that others get their turn
        return total

    def stats(self) -> dict[str, float]:
        """Return the numbers of `waiting`, `in_work` and `set_aside` messages, and
        `oldest`, the age in seconds of the oldest that is not answered."""
        [(waiting, in_work, set_aside, oldest)] = self._do("stats")
        return {
            "waiting": waiting,
            "in_work": in_work,
            "set_aside": set_aside,
            "oldest": round(max(0.0, float(oldest or 0)), 3),
        }


def _dump(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _load(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        raise StoreError("the store holds a text that is not JSON") from None


def _read_claim(row: Iterable[Any]) -> tuple[Claim, bool]:
    seq, id, conversation, *texts, token, accepted, attempts = row
    spent = int(attempts) > MAX_ATTEMPTS  # perhaps because its texts cannot be read
    data, reply, progress = (None if spent else _load(text) for text in texts)
    given = data or {}, token, reply, progress or {}, float(accepted)
    return Claim(int(seq), id, conversation, *given), spent


def open_store(database: str, redis_url: str = "") -> Store:
    """Return the store at `redis_url` if there is one, else that in a file."""
    return RedisStore(redis_url) if redis_url else SQLiteStore(database)


# `next` is the first unanswered message of its conversation: it can be claimed once
# `due` has come. A claim moves `due` to the end of its lease, so a lease that runs out
# needs no attention. `waiting` messages stand behind it. `done` ones are remembered, of
# `gone` ones only the id is left; `failed` ones are set aside. Every step of a message
# that waits or is answered is a single statement, as a transaction costs several.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL,
    data TEXT,
    asker TEXT,
    state TEXT NOT NULL,
    accepted REAL NOT NULL,
    due REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    reply TEXT,
    progress TEXT,
    remember INTEGER NOT NULL DEFAULT 1,
    stop INTEGER NOT NULL DEFAULT 0,
    ended REAL,
    reason TEXT
);
CREATE INDEX IF NOT EXISTS message_due ON message (due, token, accepted)
    WHERE state = 'next';
CREATE INDEX IF NOT EXISTS message_turn ON message (state, conversation, seq);
CREATE INDEX IF NOT EXISTS message_ended ON message (ended) WHERE ended IS NOT NULL;
CREATE INDEX IF NOT EXISTS message_asked ON message (asker, accepted)
    WHERE asker IS NOT NULL;
CREATE TRIGGER IF NOT EXISTS message_ends AFTER UPDATE OF state ON message
    WHEN old.state = 'next' AND new.state != 'next' BEGIN
    UPDATE message SET state = 'next' WHERE seq = (SELECT min(seq) FROM message
        WHERE state = 'waiting' AND conversation = new.conversation);
END;
"""

# Every step of a worker names its claim, so a worker that lost it changes nothing.
_HELD = "WHERE id = :id AND token = :token"
_WAITING = """(SELECT count(*) FROM message
    WHERE state IN ('waiting', 'next') AND conversation = :conversation)"""
_ASKED = """(SELECT count(*) FROM message
    WHERE asker = :asker AND accepted > :now - :minute)"""
_SQL = {
    "add": (
        f"""INSERT INTO message (id, conversation, data, asker, accepted, due, state)
        SELECT :id, :conversation, :data, nullif(:asker, ''), :now, :now,
            iif(EXISTS (SELECT 1 FROM message WHERE state = 'next'
                AND conversation = :conversation), 'waiting', 'next')
        WHERE {_WAITING} < :room AND {_ASKED} < :rate ON CONFLICT (id) DO NOTHING""",
    ),
    "look_up": (
        f"SELECT EXISTS (SELECT 1 FROM message WHERE id = :id), {_WAITING}, {_ASKED}",
    ),
    "claim": (
        """UPDATE message SET token = :new, due = :now + :lease,
            attempts = attempts + 1
        WHERE seq = (SELECT seq FROM message INDEXED BY message_due
            WHERE state = 'next' AND due <= :now ORDER BY due LIMIT 1)
        RETURNING seq, id, conversation, data, reply, progress, token, accepted,
            attempts""",
    ),
    "renew": (
        """UPDATE message SET due = :now + :lease WHERE (id, token) IN
        (SELECT key, value FROM json_each(:claims)) RETURNING token""",
    ),
    "keep": (
        f"""UPDATE message SET reply = ifnull(:reply, reply),
            remember = iif(:reply IS NULL, remember, :remember),
            progress = ifnull(:progress, progress) {_HELD}""",
    ),
    "finish": (
        f"""UPDATE message SET token = NULL, progress = NULL, ended = :now,
            state = iif(remember AND reply IS NOT NULL, 'done', 'gone'),
            data = iif(remember AND reply IS NOT NULL, data, NULL),
            reply = iif(remember, reply, NULL) {_HELD}""",
    ),
    "release": (
        f"""UPDATE message SET token = NULL, due = :now + :delay,
            attempts = attempts + :back {_HELD}""",
    ),
    "set_aside": (
        f"""UPDATE message SET state = 'failed', token = NULL, ended = :now,
            reason = :reason {_HELD}""",
    ),
    "failed": (
        """SELECT id, reason, :now - ended FROM message WHERE state = 'failed'
        ORDER BY seq LIMIT :limit""",
    ),
    "retry": (
        """UPDATE message SET state = 'waiting', due = accepted, attempts = 0, stop = 0,
            ended = NULL, reason = NULL
        WHERE state = 'failed'
            AND (:ids IS NULL OR id IN (SELECT value FROM json_each(:ids)))""",
        "UPDATE message SET state = 'waiting' WHERE state = 'next' AND token IS NULL",
        """UPDATE message SET state = 'next' WHERE seq IN (SELECT min(seq) FROM message
            WHERE state = 'waiting' GROUP BY conversation)
        AND NOT EXISTS (SELECT 1 FROM message AS head WHERE head.state = 'next'
            AND head.conversation = message.conversation)""",
    ),
    "request_stop": (
        """UPDATE message SET stop = 1 WHERE state = 'next' AND token IS NOT NULL
        AND conversation = :conversation""",
    ),
    "stops": (
        """SELECT token FROM message WHERE stop AND (id, token) IN
        (SELECT key, value FROM json_each(:claims))""",
    ),
    "history": (
        """SELECT data, reply FROM message WHERE state = 'done'
        AND conversation = :conversation ORDER BY seq DESC LIMIT :limit""",
    ),
    "forget": (
        """UPDATE message SET state = 'gone', data = NULL, reply = NULL,
            progress = NULL, reason = NULL
        WHERE state IN ('done', 'failed') AND conversation = :conversation""",
    ),
    "due": (
        """SELECT count(*) FROM (SELECT 1 FROM message INDEXED BY message_due
        WHERE state = 'next' AND due <= :now LIMIT :limit)""",
    ),
    "prune": (
        """DELETE FROM message WHERE seq IN (SELECT seq FROM message
            WHERE ended < :now - :age ORDER BY ended LIMIT :most)""",
    ),
    "stats": (
        """SELECT waiting + heads - held, held, failed, :now - oldest FROM
        (SELECT count(*) AS heads, count(token) AS held, min(accepted) AS oldest
            FROM message INDEXED BY message_due WHERE state = 'next'),
        (SELECT count(*) AS waiting FROM message WHERE state = 'waiting'),
        (SELECT count(*) AS failed FROM message WHERE state = 'failed')""",
    ),
}


@dataclass(slots=True, eq=False)
class Step:
    """A verb that a thread wants done, perhaps by another thread."""

    verb: str
    values: Data
    done: bool = False
    result: Any = None
    error: str = ""


class SQLiteStore(Store):
    """Store in one file, for the threads and processes of one machine.

    Threads that want to write at the same moment share a transaction: the first commits
    for all. A commit that holds an `add` is on the disk before it returns; the other
    verbs can be done again after a power cut and do not wait for the disk.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._steps: deque[Step] = deque()
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        try:
            self._writer, self._reader = self._connect(path), self._connect(path)
            self._insist("PRAGMA journal_mode = WAL")
            # A file from before limits were kept there lacks it.
            with contextlib.suppress(sqlite3.OperationalError):
                self._writer.execute("ALTER TABLE message ADD COLUMN asker TEXT")
            self._writer.executescript(_SCHEMA)
            self._writer.execute("PRAGMA secure_delete = ON")
            self._writer.execute("PRAGMA busy_timeout = 5")  # milliseconds
            self._sync("FULL")
        except sqlite3.Error as error:
            raise StoreError(f"the database {path} cannot be opened: {error}") from None

    @staticmethod
    def _connect(path: str) -> sqlite3.Connection:
        return sqlite3.connect(
            path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )

    def _sync(self, level: str) -> None:
        self._writer.execute(f"PRAGMA synchronous = {level}")
        self._level = level

    def _insist(self, sql: str, values: Data | None = None) -> Any:
        """Do it when the lock is free. SQLite does not always wait, and when it does,
        it looks so seldom that busy processes let others starve."""
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                cursor = self._writer.execute(sql, values or {})
                return cursor.fetchall() if cursor.description else cursor.rowcount
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise

    def _run(self, verb: str, values: Data) -> Any:
        reads = _SQL[verb][0].startswith("SELECT")
        return self._read(verb, values) if reads else self._write(verb, values)

    def _write(self, verb: str, values: Data) -> Any:
        step = Step(verb, values)
        self._steps.append(step)
        with self._write_lock:
            if not step.done:
                self._commit(self._take())
        if step.error:
            raise StoreError(step.error)
        return step.result

    def _take(self) -> list[Step]:
        return [self._steps.popleft() for _ in range(len(self._steps))]

    def _commit(self, steps: list[Step]) -> None:
        level = "FULL" if any(step.verb == "add" for step in steps) else "NORMAL"
        try:
            if level != self._level:
                self._sync(level)
            self._do_all(steps)
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                self._writer.rollback()
            # Those behind waited for the same lock: another wait would be too long.
            steps += self._take()
            for step in steps:
                step.error = f"the database cannot be written: {error}"
        for step in steps:
            step.done = True

    def _do_all(self, steps: list[Step]) -> None:
        alone = len(steps) == 1 == len(_SQL[steps[0].verb])
        if not alone:
            self._insist("BEGIN IMMEDIATE")
        for step in steps:
            values = {**step.values, "now": time.time()}
            step.result, *_ = [self._insist(sql, values) for sql in _SQL[step.verb]]
        if not alone:
            self._writer.execute("COMMIT")

    def _read(self, verb: str, values: Data) -> list[Any]:
        if not self._read_lock.acquire(timeout=BUSY_TIMEOUT):
            raise StoreError("the database cannot be read: it is busy")
        try:
            values = {**values, "now": time.time()}
            return self._reader.execute(_SQL[verb][0], values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"the database cannot be read: {error}") from None
        finally:
            self._read_lock.release()

    def claim(self) -> Claim | None:
        return super().claim() if self.due(1) else None  # looking needs no lock

    def prune(self, older_than: float) -> int:
        total = super().prune(older_than)
        self._checkpoint()
        return total

    def forget(self, conversation: str) -> None:
        super().forget(conversation)
        self._checkpoint()

    def _checkpoint(self) -> None:
        """Take deleted texts off the disk; the WAL file becomes small again, too."""
        with self._write_lock, contextlib.suppress(sqlite3.Error):
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()


# A hash per message. `turn`, a sorted set of seqs per conversation, has all that are
# not answered, `head` says which of them is first. `next` has the heads by due, `held`
# those with a claim, `open` all by accepted. `ended` keeps the ids, `done` the memory.
_LUA = """
local call, verbs, a = redis.call, {}, cjson.decode(ARGV[2])
local time = call('TIME')
local now = time[1] + time[2] / 1e6
local function key(...) return table.concat({KEYS[1], ...}, ':') end
local NEXT, HELD, OPEN = key('next'), key('held'), key('open')
local ENDED, FAILED, HEAD = key('ended'), key('failed'), key('head')
local TURN = key('turn', a.conversation or '')
local DONE, ASKED = key('done', a.conversation or ''), key('asked', a.asker or '')
local function message(id) return key('message', id) end
local function get(id, ...) return call('HMGET', message(id), ...) end
local function set(id, ...) return call('HSET', message(id), ...) end
local function held(id, token) return get(id, 'token')[1] == token end
local function drop(id)
    call('ZREM', FAILED, id)
    call('DEL', message(id))
end
local function promote(conversation)
    local id = call('ZRANGE', key('turn', conversation), 0, 0)[1]
    if not id then return call('HDEL', HEAD, conversation) end
    call('HSET', HEAD, conversation, id)
    call('ZADD', NEXT, get(id, 'accepted')[1], id)
end
local function close(id)
    call('HDEL', message(id), 'token')
    call('SREM', HELD, id)
    for _, from in ipairs({TURN, OPEN, NEXT}) do call('ZREM', from, id) end
    call('ZADD', ENDED, now, id)
    promote(a.conversation)
end
local function each_held(change)
    local rows = {}
    for id, token in pairs(cjson.decode(a.claims)) do
        if held(id, token) and change(id) then table.insert(rows, {token}) end
    end
    return rows
end
local function known(id)
    return call('EXISTS', message(id)) == 1 or call('ZSCORE', ENDED, id)
end
local function asked() return call('ZCOUNT', ASKED, '(' .. now - a.minute, '+inf') end
function verbs.look_up()
    return {{known(a.id) and 1 or 0, call('ZCARD', TURN), asked()}}
end
function verbs.add()
    if known(a.id) or call('ZCARD', TURN) >= a.room or asked() >= a.rate then
        return 0
    end
    local seq = call('INCR', key('seq'))
    set(a.id, 'seq', seq, 'id', a.id, 'conversation', a.conversation,
        'data', a.data, 'accepted', now, 'attempts', 0, 'remember', 1)
    if a.asker ~= '' then
        call('ZADD', ASKED, now, a.id)
        call('ZREMRANGEBYSCORE', ASKED, '-inf', now - a.minute)
        call('EXPIRE', ASKED, a.minute)
    end
    call('ZADD', TURN, seq, a.id)
    call('ZADD', OPEN, now, a.id)
    if call('HEXISTS', HEAD, a.conversation) == 0 then promote(a.conversation) end
end
function verbs.claim()
    local id = call('ZRANGEBYSCORE', NEXT, '-inf', now, 'LIMIT', 0, 1)[1]
    if not id then return {} end
    call('ZADD', NEXT, now + a.lease, id)
    call('SADD', HELD, id)
    call('HINCRBY', message(id), 'attempts', 1)
    set(id, 'token', a.new)
    return {get(id, 'seq', 'id', 'conversation', 'data', 'reply', 'progress', 'token',
        'accepted', 'attempts')}
end
function verbs.renew()
    return each_held(function(id) return call('ZADD', NEXT, now + a.lease, id) end)
end
function verbs.keep()
    local reply, progress = a.reply ~= cjson.null, a.progress ~= cjson.null
    if reply then set(a.id, 'reply', a.reply, 'remember', a.remember) end
    if progress then set(a.id, 'progress', a.progress) end
end
function verbs.finish()
    local reply, remember = unpack(get(a.id, 'reply', 'remember'))
    close(a.id)
    call('HDEL', message(a.id), 'progress')
    if not reply or remember == '0' then drop(a.id)
    elseif call('RPUSH', DONE, a.id) > a.most then drop(call('LPOP', DONE)) end
end
function verbs.release()
    call('HDEL', message(a.id), 'token')
    call('SREM', HELD, a.id)
    call('HINCRBY', message(a.id), 'attempts', a.back)
    call('ZADD', NEXT, now + a.delay, a.id)
end
function verbs.set_aside()
    set(a.id, 'reason', a.reason)
    call('ZADD', FAILED, get(a.id, 'seq')[1], a.id)
    close(a.id)
end
function verbs.failed()
    local rows = {}
    for _, id in ipairs(call('ZRANGE', FAILED, 0, a.limit - 1)) do
        local age = now - call('ZSCORE', ENDED, id)
        table.insert(rows, {id, get(id, 'reason')[1], tostring(age)})
    end
    return rows
end
local function reopen(id)
    local seq, accepted, conversation =
        unpack(get(id, 'seq', 'accepted', 'conversation'))
    call('ZREM', ENDED, id)
    call('HDEL', message(id), 'reason', 'stop')
    set(id, 'attempts', 0)
    call('ZADD', key('turn', conversation), seq, id)
    call('ZADD', OPEN, accepted, id)
    local head = call('HGET', HEAD, conversation)
    if head and call('SISMEMBER', HELD, head) == 1 then return end
    if head then call('ZREM', NEXT, head) end
    promote(conversation)
end
function verbs.retry()
    local ids, count = a.ids ~= cjson.null and cjson.decode(a.ids), 0
    for _, id in ipairs(ids or call('ZRANGE', FAILED, 0, -1)) do
        if call('ZREM', FAILED, id) == 1 then
            reopen(id)
            count = count + 1
        end
    end
    return count
end
function verbs.request_stop()
    local id = call('HGET', HEAD, a.conversation)
    if not id or call('SISMEMBER', HELD, id) == 0 then return 0 end
    set(id, 'stop', 1)
end
function verbs.stops()
    return each_held(function(id) return get(id, 'stop')[1] end)
end
function verbs.history()
    local rows = {}
    for i = 1, math.min(a.limit, call('LLEN', DONE)) do
        table.insert(rows, get(call('LINDEX', DONE, -i), 'data', 'reply'))
    end
    return rows
end
function verbs.forget()
    for _, id in ipairs(call('LRANGE', DONE, 0, -1)) do drop(id) end
    call('DEL', DONE)
    for _, id in ipairs(call('ZRANGE', FAILED, 0, -1)) do
        if get(id, 'conversation')[1] == a.conversation then drop(id) end
    end
end
function verbs.due()
    return {{#call('ZRANGEBYSCORE', NEXT, '-inf', now, 'LIMIT', 0, a.limit)}}
end
function verbs.prune()
    local before = string.format('(%.6f', now - a.age)
    local ids = call('ZRANGEBYSCORE', ENDED, '-inf', before, 'LIMIT', 0, a.most)
    for _, id in ipairs(ids) do
        local conversation = get(id, 'conversation')[1]
        if conversation then call('LREM', key('done', conversation), 1, id) end
        drop(id)
        call('ZREM', ENDED, id)
    end
    return #ids
end
function verbs.stats()
    local open, held = call('ZCARD', OPEN), call('SCARD', HELD)
    local oldest = call('ZRANGE', OPEN, 0, 0, 'WITHSCORES')[2] or now
    return {{open - held, held, call('ZCARD', FAILED), tostring(now - oldest)}}
end
-- When memory is full a script may still write once it has deleted something: so only
-- add is refused, and what waits can be answered.
if ARGV[1] ~= 'add' then call('DEL', key('nothing')) end
if a.token and not held(a.id, a.token) then return 0 end
return verbs[ARGV[1]]() or 1
"""


class RedisStore(Store):
    """Store in Redis, for any number of machines. Its clock counts."""

    def __init__(self, url: str) -> None:
        super().__init__()
        try:
            from redis import Redis, RedisError
        except ImportError:
            raise StoreError(
                "REDIS_URL is set but the package redis is missing: enable the line "
                "redis>=5,<9 of requirements.txt and install it"
            ) from None
        self._errors = (RedisError, OSError, ValueError)
        try:
            self._redis: Any = Redis.from_url(
                url,
                decode_responses=True,
                protocol=2,
                socket_timeout=REDIS_TIMEOUT,
                socket_connect_timeout=REDIS_TIMEOUT,
                max_connections=2**31,  # threads are bounded already
            )
        except ValueError:  # it may say a part of the password
            raise StoreError(
                "REDIS_URL is not like redis://:password@host:6379/0"
            ) from None
        self._script = self._redis.register_script(_LUA)

    def _run(self, verb: str, values: Data) -> Any:
        try:
            return self._script(keys=["{bot}"], args=[verb, json.dumps(values)])
        except self._errors as error:
            # Redis may repeat a command it does not know, with text or password.
            why = str(error).partition(", with args")[0]
            raise StoreError(f"Redis cannot be used: {why}") from None

    def close(self) -> None:
        self._redis.close()
