"""Brings a SQLite file of version 1.0 to the present tables.

What waits in it goes on waiting; who was told of a limit is not told again. An option:
without it, delete this file and its line in CONVERSIONS of store.py.
"""

from __future__ import annotations

import sqlite3


def convert(file: sqlite3.Connection, schema: str) -> None:
    """Convert a file, unless it has the present tables or none."""
    is_old = "SELECT 1 FROM pragma_table_info('message') WHERE name = 'due'"
    if not file.execute(is_old).fetchall():
        return
    file.execute("PRAGMA busy_timeout = 60000")  # milliseconds
    file.execute("BEGIN IMMEDIATE")
    if file.execute(is_old).fetchall():  # no other process was faster
        for statement in STATEMENTS.format(schema=schema).split(";\n"):
            file.execute(statement)
    file.execute("COMMIT")


STATEMENTS = """DROP INDEX IF EXISTS message_asked;
ALTER TABLE message RENAME TO message_1;
{schema}
INSERT INTO message (seq, id, conversation, state, data, reply, progress, remember,
        sent, accepted, ended, reason)
    SELECT seq, id, conversation,
        CASE WHEN state IN ('next', 'waiting') THEN 'open' ELSE state END,
        replace(data, '"kind": "strange"', '"kind": "unsupported"'),
        reply, progress, remember, 0, accepted, ended, reason
    FROM message_1 WHERE conversation NOT LIKE '%' || char(9) || 'notice';
INSERT INTO conversation (name, open, due)
    SELECT conversation, count(*), min(accepted) FROM message
    WHERE state = 'open' GROUP BY conversation;
DELETE FROM sqlite_sequence WHERE name = 'message';
UPDATE sqlite_sequence SET name = 'message' WHERE name = 'message_1';
DROP TABLE message_1;
"""
