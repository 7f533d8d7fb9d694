"""The store in PostgreSQL, for several machines or a platform without a disk.

    DATABASE_URL=postgresql://user:password@host:5432/name

The verbs and their SQL are those of store.py. Here is what PostgreSQL needs: row locks,
the server's clock, a pool of few connections, and a limit to every wait. Nothing lives
in a session, so PgBouncer may stand between in transaction mode. To do without this
file delete it, its line in STORES and psycopg in requirements.txt.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import re
import time
from collections.abc import Generator
from typing import Any, ClassVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolTimeout

from store import SCHEMA, Data, Step, Store, StoreError, add_step, end_step

CONNECTIONS = 4  # of one process at the most: the smallest plans allow 20 in all
POOL_TIMEOUT = 0.6  # seconds to wait for a connection; Tencent waits 2 for an answer
STEP_TIMEOUT = 1.0  # seconds for a whole transaction
STALE_TIMEOUT = 0.3  # seconds in which a step is tried on another connection
SCHEMA_LOCK = 1380076593  # names the advisory lock under which tables are made
# What is in the reason of a failed connection that will not be well by itself.
HOPELESS = (
    "authentication failed|no password|does not exist|no such|pg_hba|"
    "support SSL|certificate"
)
# SQLSTATEs of a connection that was closed: none, by the end of the server, by a crash.
CLOSED = (None, "57P01", "57P02")
DEFAULTS = {"connect_timeout": "2", "client_encoding": "utf8"}
PRIVATE_NAMES = (".internal", ".local", ".localhost", ".svc", ".flycast", ".lan")

BEGIN = f"""BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL statement_timeout = {STEP_TIMEOUT * 1000:.0f}; """
DURABILITY = """SELECT reset_val FROM pg_settings
    WHERE name IN ('fsync', 'synchronous_commit') ORDER BY name"""

logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # StoreError says it better


class BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose waits end at a deadline, also if the server hangs."""

    deadline = math.inf  # time.monotonic()
    refusal: ClassVar[psycopg.Error | None] = None  # why the last attempt failed

    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            connection = super().connect(*args, **kwargs)
        except psycopg.Error as error:
            BoundedConnection.refusal = error
            raise
        BoundedConnection.refusal = None
        return connection

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Any) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if time.monotonic() > self.deadline:
                    raise psycopg.errors.QueryCanceled("no answer in time")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


class PostgresStore(Store):
    """Store in PostgreSQL, for any number of machines. Its clock counts."""

    dialect: ClassVar = {
        "serial": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
        "without_rowid": "",
        "now": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
        "lock": "FOR UPDATE",
        "skip_locked": "FOR UPDATE SKIP LOCKED",
        "each": "SELECT value FROM jsonb_array_elements_text",
    }

    def __init__(self, url: str) -> None:
        super().__init__()
        self._sql = {n: re.sub(r":(\w+)", r"%(\1)s", s) for n, s in self._sql.items()}
        conninfo, self._password = _conninfo(url)
        # Cursors that put the values in: one message for a whole short transaction.
        options: Data = {"autocommit": True, "prepare_threshold": None}
        options |= {"cursor_factory": psycopg.ClientCursor}
        self._ready = False  # the tables are there
        try:
            with BoundedConnection.connect(conninfo, **options) as first:
                self._make_schema(first)
        except psycopg.Error as error:
            passing = isinstance(error, psycopg.OperationalError)
            if not passing or re.search(HOPELESS, str(error)):
                raise StoreError(self._redacted(error)) from None
        self._pool = ConnectionPool(
            conninfo,
            connection_class=BoundedConnection,
            kwargs=options,
            min_size=0,
            max_size=CONNECTIONS,
            timeout=POOL_TIMEOUT,
            reconnect_timeout=1,
            open=True,
        )

    def _make_schema(self, connection: BoundedConnection) -> None:
        """Make the tables, unless they are there; other processes wait meanwhile."""
        # Looked for first: to create what exists waits for whoever vacuums a table, and
        # all who write wait behind.
        connection.deadline = time.monotonic() + STEP_TIMEOUT
        last = "SELECT to_regclass('message_asked') IS NOT NULL"
        if connection.execute(last).fetchone() != (True,):
            lock = f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})"
            schema = SCHEMA.format(**self.dialect)
            connection.execute(f"BEGIN; {lock}; {schema}; COMMIT")
        self._ready = True

    def _write(self, step: Step, values: Data) -> Any:
        began = time.monotonic()
        while True:
            try:
                return self._transact(step, values)
            except psycopg.Error as error:
                # What the server closed while it was idle tells it now, at once.
                stale = error.sqlstate in CLOSED and not self._pool.closed
                if not stale or time.monotonic() > began + STALE_TIMEOUT:
                    raise StoreError(self._redacted(error)) from None

    def _transact(self, step: Step, values: Data) -> Any:
        durable = step in (add_step, end_step)
        begin = BEGIN + ("" if durable else "SET LOCAL synchronous_commit = off; ")
        commit = "; COMMIT" if isinstance(step, str) else ""

        def execute(step: Step, values: Data) -> Any:
            if callable(step):
                return step(execute, values)
            # One message to the server opens the transaction and does the statement.
            idle = connection.info.transaction_status == TransactionStatus.IDLE
            sql = (begin if idle else "") + self._sql.get(step, step) + commit
            results = connection.execute(sql, values).results()
            return [row for each in results if each.description for row in each]

        with self._pool.connection() as connection:  # which commits at its end
            try:
                if not self._ready:
                    self._make_schema(connection)
                connection.deadline = time.monotonic() + STEP_TIMEOUT
                return execute(step, values)
            except BaseException:
                connection.close()  # it may be in the middle of something
                raise

    def _redacted(self, error: psycopg.Error) -> str:
        if isinstance(error, PoolTimeout):
            error = BoundedConnection.refusal or error
        # The rest of a text may quote what was to be stored.
        text = error.diag.message_primary or (str(error) or "?").splitlines()[0]
        if self._password:
            text = text.replace(self._password, "***")
        return f"PostgreSQL cannot be used: {text}"

    def durability(self) -> str:
        settings = [value for (value,) in self._read(DURABILITY, {})]
        if "off" in settings:
            raise StoreError(
                "PostgreSQL has fsync {} and synchronous_commit {}: a power cut can "
                "lose what was acknowledged".format(*settings)
            )
        return "PostgreSQL: on its disk before a callback is acknowledged"

    def close(self) -> None:
        self._pool.close()


def _conninfo(url: str) -> tuple[str, str]:
    """Return what libpq wants to know, and the password. TLS is required unless the URL
    says otherwise or the host is this machine or in a private network."""
    try:
        info = {**DEFAULTS, **conninfo_to_dict(url)}
    except psycopg.Error:  # its text may hold a part of the password
        raise StoreError(
            "it is not like postgresql://user:password@host:5432/name"
        ) from None
    if not _is_private(str(info.get("host", ""))):
        info.setdefault("sslmode", "require")
    return make_conninfo("", **info), str(info.get("password", ""))


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:  # a name; one without a dot is of the same network
        return "." not in host or host.endswith(PRIVATE_NAMES) or host[0] == "/"
