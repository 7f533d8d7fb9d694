"""The tables, and the SQL of every store operation, for SQLite and PostgreSQL alike.

{words} in braces are spelled by each engine (see `dialect`). A step is one statement,
or a function that runs several in one transaction. A step of several statements locks
its conversation first, so that no two of them wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol

NO_LIMIT = 2**31 - 1
# Of what `data`, `reply` and `progress` hold. Raise it when the code of before could
# not read them: after a rollback it leaves such messages to the newer code.
ROW_VERSION = 1

Data = dict[str, Any]
Rows = list[tuple[Any, ...]]


class Execute(Protocol):
    """Runs a statement inside the transaction and returns its rows.

    `last` means that no other follows, so the commit may travel with it.
    """

    def __call__(self, name: str, values: Data, /, last: bool = False) -> Rows: ...


Step = str | Callable[[Execute, Data], Any]  # the name of one statement, or several


class Added(StrEnum):
    """The result of add."""

    NEW = "new"
    KNOWN = "known"  # the id was added before
    QUEUE_FULL = "queue_full"  # `room` messages are open, or `share` of the asker's
    RATE_LIMITED = "rate_limited"  # the asker sent `rate` in the minute before


# The state of a message is `open`, `done` (remembered), `gone` (only its id is left) or
# `failed`. `due` is when a conversation may be claimed: at once, after a delay, or when
# the lease of a claim expires. `next` is the seq of the message whose turn it is, once
# one has ended; else it is the oldest's. `attempts` counts its claims, and `lane` is
# what it waits for, if a worker saw it. `about` says of what app the database is.
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
    reason TEXT,
    version INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE IF NOT EXISTS conversation (
    name TEXT PRIMARY KEY,
    open INTEGER NOT NULL,
    due DOUBLE PRECISION NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    cancelled INTEGER NOT NULL DEFAULT 0,
    lane TEXT NOT NULL DEFAULT '',
    next BIGINT
){without_rowid};
CREATE TABLE IF NOT EXISTS kept (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    put_at DOUBLE PRECISION NOT NULL
){without_rowid};
CREATE INDEX IF NOT EXISTS conversation_due ON conversation (due);
CREATE INDEX IF NOT EXISTS message_of ON message (conversation, state, sent, seq);
CREATE INDEX IF NOT EXISTS message_failed ON message (seq) WHERE state = 'failed';
CREATE INDEX IF NOT EXISTS message_asked ON message (asker, sent)
    WHERE asker IS NOT NULL;
CREATE TABLE IF NOT EXISTS about (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
){without_rowid};
"""
# For tables that were made before they had these columns, the newest last.
ADD_COLUMNS = {
    ("message", "version"): "INTEGER NOT NULL DEFAULT 1",
    ("conversation", "lane"): "TEXT NOT NULL DEFAULT ''",
    ("conversation", "next"): "BIGINT",
}

_OWN = """SELECT count(*) FROM message
    WHERE conversation = :conversation AND state = 'open' AND asker = :asker"""
_LAST = """SELECT conversation, ended FROM message
    WHERE asker = waiting.asker AND state <> 'open' ORDER BY sent DESC LIMIT 20"""
_HELD = "name = :conversation AND token = :token"
# What a user recalled: the worker finds `data` instead, or the memory nothing.
_RECALL = """UPDATE message SET reply = NULL, remember = 0,
    state = CASE WHEN state = 'open' THEN 'open' ELSE 'gone' END,
    data = CASE WHEN state = 'open' THEN :data END"""

SQL = {
    # The first app owns the database; return the owner.
    "own": """INSERT INTO about (name, value) VALUES ('app', :app)
        ON CONFLICT (name) DO UPDATE SET value = about.value RETURNING value""",
    "owner": "SELECT value FROM about WHERE name = 'app'",
    # Count a message in, which goes before what was sent later. What waits for this
    # lock gets a later seq.
    "enter": """INSERT INTO conversation (name, open, due)
        VALUES (:conversation, 1, {now})
        ON CONFLICT (name) DO UPDATE SET open = conversation.open + 1,
            next = (SELECT seq FROM message
                WHERE seq = conversation.next AND sent <= :sent)
        RETURNING open""",
    # Keep a message, unless it is known or a limit is reached. Messages of one second
    # come in any order.
    "insert": f"""INSERT INTO message
            (id, conversation, asker, data, reply, remember, sent, accepted, version)
        SELECT :id, :conversation, nullif(:asker, ''), :data, :reply,
            :remember, :sent, {{now}}, :version
        WHERE :open <= :room AND (:share IS NULL OR :share > ({_OWN}))
            AND :rate > (SELECT count(*) FROM message
            WHERE asker = :asker AND sent BETWEEN :sent - :minute AND :sent + 1)
        ON CONFLICT (id) DO NOTHING RETURNING 1""",
    "own_open": _OWN,
    # Count a message out that was not kept.
    "leave": "UPDATE conversation SET open = open - 1 WHERE name = :conversation",
    "is_known": "SELECT 1 FROM message WHERE id = :id",
    # An answer that was begun may have been shown.
    "known": """SELECT id, CASE WHEN state = 'open' AND progress IS NOT NULL
            THEN 'begun' ELSE state END, seq
        FROM message WHERE id IN ({each}(:ids))""",
    "is_claimed": """SELECT 1 FROM conversation WHERE token IS NOT NULL
        AND due > {now} AND (name = :conversation
            OR substr(name, 1, length(:conversation) + 1) = :conversation || :tab)""",
    "newest": "SELECT coalesce(max(seq), 0) FROM message",
    "sent": "SELECT sent FROM message WHERE seq = :seq AND asker IS NOT NULL",
    "drop": "DELETE FROM conversation WHERE name = :conversation AND open = 0",
    # Take the conversation that is due longest, unless its lane is full.
    "take": """UPDATE conversation
        SET token = :token, due = {now} + :lease, attempts = attempts + 1
        WHERE name = (SELECT name FROM conversation WHERE due <= {now}
                AND lane NOT IN ({each}(:full))
            ORDER BY due LIMIT 1 {skip_locked})
        RETURNING name, attempts, next""",
    # The message to work on, and the kept values that its worker asked for.
    "oldest": """SELECT seq, id, data, reply, progress, accepted, (
            SELECT CAST({object_of}(name, value) AS text)
            FROM kept WHERE name IN ({each}(:kept)))
        FROM message WHERE conversation = :conversation AND state = 'open'
            AND version <= :version
        ORDER BY CASE seq WHEN :next THEN 0 ELSE 1 END, sent, seq LIMIT 1""",
    # Extend leases; return those that did not expire.
    "heartbeat": """UPDATE conversation SET due = {now} + :lease
        WHERE name IN ({each}(:names)) AND token IN ({each}(:tokens))
        RETURNING token, cancelled""",
    # After the clock was set back, nothing waits until it catches up.
    "repair": """UPDATE conversation
        SET due = {now} + CASE WHEN token IS NULL THEN 0 ELSE :lease END
        WHERE due > {now} + :longest""",
    "save_reply": f"""UPDATE message
        SET reply = :reply, remember = remember * :remember, progress = :progress
        WHERE seq = :seq
            AND EXISTS (SELECT 1 FROM conversation WHERE {_HELD} {{lock}})
        RETURNING 1""",
    "save_progress": f"""UPDATE message SET progress = :progress
        WHERE seq = :seq
            AND EXISTS (SELECT 1 FROM conversation WHERE {_HELD} {{lock}})
        RETURNING 1""",
    # Free the conversation of its only open message, or of one of several. If several
    # askers share it, it is the turn of one who was not answered here lately, else of
    # the one whose answer is the longest ago. What has no asker, as what a robot says
    # unasked, comes when it is the oldest.
    "free_only": f"DELETE FROM conversation WHERE {_HELD} AND open = 1 RETURNING 1",
    "free": f"""UPDATE conversation
        SET open = open - 1, token = NULL, due = {{now}}, attempts = 0, cancelled = 0,
            lane = '', next = (SELECT seq FROM message AS waiting
                WHERE conversation = :conversation AND state = 'open' AND seq <> :seq
                ORDER BY CASE
                    WHEN asker IS NULL AND sent = (SELECT min(sent) FROM message
                        WHERE conversation = :conversation AND state = 'open'
                            AND seq <> :seq) THEN -1
                    WHEN coalesce(
                        asker = (SELECT asker FROM message WHERE seq = :seq), TRUE)
                    THEN 1e18 ELSE coalesce((SELECT max(ended) FROM ({_LAST}) AS last
                        WHERE conversation = :conversation), 0) END, sent, seq LIMIT 1)
        WHERE {_HELD} RETURNING 1""",
    "finish": """UPDATE message SET ended = {now}, progress = NULL,
            state = CASE WHEN remember = 1 AND reply <> '' THEN 'done' ELSE 'gone' END,
            data = CASE WHEN remember = 1 AND reply <> '' THEN data END,
            reply = CASE WHEN remember = 1 AND reply <> '' THEN reply END
        WHERE seq = :seq""",
    "fail": """UPDATE message SET state = 'failed', ended = {now}, reason = :reason
        WHERE seq = :seq""",
    "release": f"""UPDATE conversation SET token = NULL, due = {{now}} + :delay,
            attempts = attempts - :uncounted, lane = :lane
        WHERE {_HELD}""",
    "cancel": """UPDATE conversation SET cancelled = 1
        WHERE name = :conversation RETURNING 1""",
    "history": """SELECT data, reply FROM message
        WHERE conversation = :conversation AND state = 'done' AND version <= :version
        ORDER BY sent DESC, seq DESC LIMIT :limit""",
    "forget": """UPDATE message SET state = 'gone',
            data = NULL, reply = NULL, progress = NULL, reason = NULL
        WHERE seq IN (SELECT seq FROM message WHERE conversation = :conversation
            AND state IN ('done', 'failed') LIMIT :batch)
            AND state IN ('done', 'failed')  -- one may have been retried meanwhile
        RETURNING 1""",
    "recall": f"{_RECALL} WHERE id = :id AND state <> 'failed'",
    "recall_like": f"""{_RECALL} WHERE id LIKE :id ESCAPE '\\' AND state <> 'failed'
        AND seq > (SELECT max(seq) FROM message) - :recent""",
    "put": """INSERT INTO kept (name, value, put_at) VALUES (:name, :value, {now})
        ON CONFLICT (name) DO UPDATE SET value = excluded.value, put_at = {now}""",
    "put_first": """INSERT INTO kept (name, value, put_at) VALUES (:name, '{{}}', {now})
        ON CONFLICT (name) DO NOTHING""",
    "get": "SELECT value FROM kept WHERE name = :name",
    "get_locked": "SELECT value FROM kept WHERE name = :name {lock}",
    "drop_kept": "DELETE FROM kept WHERE name = :name",
    "prune_kept": "DELETE FROM kept WHERE put_at < {now} - :age",
    # The last of the next messages, whatever numbers are missing in between.
    "batch": """SELECT max(seq) FROM (SELECT seq FROM message
        WHERE seq > :after ORDER BY seq LIMIT :batch) AS rows""",
    "prune": """DELETE FROM message WHERE ended < {now} - :age
        AND seq > :after AND seq <= :last RETURNING 1""",
    "load": """SELECT coalesce(sum(open), 0) - count(token), count(token),
            count(CASE WHEN due <= {now} AND lane NOT IN ({each}(:full)) THEN 1 END)
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
    if execute("is_known", values):
        return Added.KNOWN
    [(own,)] = execute("own_open", values)
    full = open > values["room"] or own >= (values["share"] or NO_LIMIT)
    return Added.QUEUE_FULL if full else Added.RATE_LIMITED


def claim_step(execute: Execute, values: Data) -> tuple[str, int, Rows] | None:
    """Take a conversation; return its name, its attempts and its oldest message.

    Without a message that this code can read the conversation is put off.
    """
    # Two statements: the second one sees what was finished before the first.
    if not (taken := execute("take", values)):
        return None
    [(name, attempts, next)] = taken
    kept = [one.replace("{conversation}", name) for one in values["kept"]]
    values = values | {"conversation": name, "kept": json.dumps(kept), "next": next}
    rows = execute("oldest", values)
    if not rows:
        put_off = {"delay": values["lease"], "uncounted": 1, "lane": ""}
        execute("release", values | put_off, last=True)
    return name, attempts, rows


def end_step(execute: Execute, values: Data) -> bool:
    """Free the conversation, then end the message; nothing if the claim was lost."""
    if not (execute("free_only", values) or execute("free", values)):
        return False
    execute(values["end"], values, last=True)
    return True


def update_step(execute: Execute, values: Data) -> Data | Exception:
    """Change a kept value; if `change` raises, return its error and change nothing.

    An error is not raised here: other steps may share the transaction.
    """
    execute("put_first", values)  # a row that is not there cannot be locked
    [(text,)] = execute("get_locked", values)
    [(newest,)] = execute("newest", values)
    try:
        value: Data = values["change"](json.loads(text), newest)
        new = json.dumps(value)
    except Exception as error:
        return error
    execute("put", values | {"value": new}, last=True)
    return value


def check_step(execute: Execute, values: Data) -> None:
    """Write as much as a long message takes, and delete it."""
    execute("put", values)
    execute("drop_kept", values, last=True)


def retry_step(execute: Execute, values: Data) -> bool:
    """Count the message in and open it; count it out if another process was faster."""
    execute("enter", values | {"sent": -1.0})  # it is perhaps the oldest again
    if execute("reopen", values):
        return True
    execute("leave", values)
    execute("drop", values)
    return False
