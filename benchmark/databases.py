"""Throw-away databases on this machine, for the benchmark and for the tests.

    with PostgresServer() as server, PgBouncer(server) as bouncer:
        psycopg.connect(bouncer.url)

Each keeps its files in a temporary folder and, if it is a server, serves a free port
of 127.0.0.1. It is stopped and its files are removed when the `with` ends. PostgreSQL
keeps what it has confirmed, as it does by default; PostgresServer(**FAST) does not,
and is faster. Servers started by root run as the user `postgres`, as they must.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

from simulator import free_port, lifeline

PLACES = "/usr/lib/postgresql/*/bin"  # of Debian, which leaves them out of PATH
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
LIMIT = 30.0  # seconds for a start or a stop
USER = "bot"
MODES = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class NotInstalled(Exception):
    """A program that this machine does not have."""


def find(name: str) -> str:
    """Return the path of a database's program; raise NotInstalled."""
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin"]
    newest = sorted(glob.glob(PLACES), key=lambda p: int(p.split("/")[4]), reverse=True)
    path = shutil.which(name, path=os.pathsep.join([*places, *newest]))
    if not path:
        raise NotInstalled(f"{name} is not installed")
    return path


class SQLiteFile:
    """A file for SQLite, which whoever opens it makes."""

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.path = Path(self._temporary.name, "bot.db")
        self.url = f"sqlite:///{self.path}"
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def interrupt(self, seconds: float) -> None:
        """Lock it for some seconds, as another program may."""
        with closing(sqlite3.connect(self.path, timeout=10)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of the database and of its write-ahead log."""
        log = self.path.with_name(f"{self.path.name}-wal")
        return self.path.stat().st_size, log.stat().st_size if log.exists() else 0


class _Server:
    """A program that serves a port from a folder of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._account: dict[str, Any] = {}  # to run it as
        if os.getuid() == 0:
            name = "postgres"
            self._account = {"user": name, "group": name, "extra_groups": []}

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._temporary.cleanup()

    def start(self) -> None:
        """Start it, also once more after a stop; return when it serves."""
        end = time.monotonic() + LIMIT
        with self.folder.joinpath("log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, **self._ours()
            )
        self._lifeline = lifeline(self.process)
        while self.process.poll() is None and time.monotonic() < end:
            if self._serves():
                return
            time.sleep(0.02)
        self._end(signal.SIGKILL)
        said = self.folder.joinpath("log").read_text()
        raise RuntimeError(f"{self._command()[0]} does not start:\n{said}")

    def stop(self) -> None:
        """End it."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if not self.process:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._lifeline.close()

    def _ours(self) -> dict[str, Any]:
        """Return how its programs are run: in its folder, as who may run them."""
        env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        ours = {"cwd": self.folder, "env": env, "start_new_session": True}
        return ours | self._account

    def _own(self, name: str, text: str) -> Path:
        """Write a file that the program may read; return its path."""
        path = self.folder / name
        path.write_text(text)
        self._give(path)
        return path

    def _give(self, path: Path) -> None:
        if self._account:
            shutil.chown(path, self._account["user"], self._account["group"])

    def _prepare(self) -> None:
        self._give(self.folder)

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _serves(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


class PostgresServer(_Server):
    """PostgreSQL with one user, who must give a password, and an empty database."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self._programs = Path(find("initdb")).resolve().parent
        self._settings = settings
        self.password = secrets.token_hex(16)
        self.url = f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/postgres"

    def stop(self, mode: str = "fast") -> None:
        """End it in order ("fast"), or as a crash does ("immediate")."""
        self._end(MODES[mode])

    def interrupt(self, seconds: float) -> None:
        """Stop it as a crash does, and start it again after some seconds."""
        self.stop("immediate")
        time.sleep(seconds)
        self.start()

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of the database and of its write-ahead log."""
        data = self.folder / "data"
        return size_of(data / "base"), size_of(data / "pg_wal")

    def _prepare(self) -> None:
        super()._prepare()
        password = self._own("password", self.password)
        words = f"--auth=scram-sha-256 --username={USER} --pwfile={password} --no-sync"
        places = ["--encoding=UTF8", "--locale=C", "-D", str(self.folder / "data")]
        done = subprocess.run(
            [self._programs / "initdb", *words.split(), *places],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **self._ours(),
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stderr.decode()}")

    def _command(self) -> list[str]:
        here = {"listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        settings = here | {"port": self.port} | self._settings
        words = [word for k, v in settings.items() for word in ("-c", f"{k}={v}")]
        program = str(self._programs / "postgres")
        return [program, "-D", str(self.folder / "data"), *words]

    def _serves(self) -> bool:
        words = f"-q -t 1 -h 127.0.0.1 -p {self.port}".split()
        ready = [str(self._programs / "pg_isready"), *words]
        return subprocess.run(ready, **self._ours()).returncode == 0


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, which may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


class PgBouncer(_Server):
    """PgBouncer in transaction mode, with its other settings as they come."""

    def __init__(self, server: PostgresServer) -> None:
        super().__init__()
        self._program, self._server = find("pgbouncer"), server
        self.url = server.url.replace(f":{server.port}/", f":{self.port}/")

    def _prepare(self) -> None:
        super()._prepare()
        users = self._own("users", f'"{USER}" "{self._server.password}"\n')
        lines = f"""
            [databases]
            * = host=127.0.0.1 port={self._server.port}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = scram-sha-256
            auth_file = {users}
            pool_mode = transaction
        """
        self._own("settings", "\n".join(line.strip() for line in lines.splitlines()))

    def _command(self) -> list[str]:
        return [self._program, str(self.folder / "settings")]
