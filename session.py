"""Stand-in until the real session.py is merged."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter


class CallEnded(Exception):
    """A call was ended: `reason` is "stopped" or "slow"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CancelScope:
    """A deadline, and the means to end a call from another thread."""

    here = threading.local()
    open: set[CancelScope] = set()
    watch: threading.Thread | None = None

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.cancelled = threading.Event()
        self.socket: socket.socket | None = None

    def remaining(self) -> float:
        """Return the seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise CallEnded."""
        if self.cancelled.is_set():
            raise CallEnded("stopped")
        if not self.remaining():
            raise CallEnded("slow")

    def cancel(self) -> None:
        """End the call."""
        self.cancelled.set()
        self.abort()

    def abort(self) -> None:
        """Cut the socket."""
        if held := self.socket:
            with suppress(OSError, TypeError):
                socket.socket.shutdown(held, socket.SHUT_RDWR)

    def __enter__(self) -> CancelScope:
        self.here.call = self
        self.open.add(self)
        if not CancelScope.watch:
            CancelScope.watch = threading.Thread(target=self._watch_all, daemon=True)
            CancelScope.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.discard(self)
        self.socket = None

    @classmethod
    def _watch_all(cls) -> None:
        while True:
            time.sleep(0.25)
            for call in cls.open.copy():
                if not call.remaining():
                    call.abort()


class _Watched:
    sock: socket.socket | None

    def send(self, data: Any) -> None:
        if not self.sock:
            self.connect()  # type: ignore[attr-defined]
        CancelScope.here.call.socket = self.sock
        CancelScope.here.call.check()
        super().send(data)  # type: ignore[misc]


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _Watched):
            pool.ConnectionCls = type("_", (_Watched, pool.ConnectionCls), {})
        return pool


def open_session(url: str, threads: int = 64) -> requests.Session:
    """Return a session."""
    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=threads))
    return session
