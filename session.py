"""HTTP calls for many threads, each with a deadline and an end from outside.

    session = Session("https://api.example.com", threads=64)
    with CancelScope(seconds=10):
        answer = session.post(url, data, headers, timeout=(5, 10)).json()

A timeout of `requests` bounds the wait for the next byte, not for all of them, and
before the headers there is no response to close. So a connection reports its socket to
the CancelScope of its thread before it sends anything. To end the call, in whatever
state it is, another thread shuts this socket down: whoever waits for it wakes up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from socket import SHUT_RDWR, socket
from ssl import SSLWantReadError
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidURL
from requests.utils import default_user_agent
from urllib3.util import wait_for_read

WATCH_EVERY = 0.25  # seconds
LONGEST_READ = 1 << 20  # bytes, so that a flood cannot hold a reader
HEADERS = {"User-Agent": default_user_agent(), "Accept": "*/*"}


class CallEnded(Exception):
    """A call was ended before it was over: its text is "stopped" or "slow"."""


class CancelScope:
    """The deadline of some work, and the means to cancel it from another thread.

    `with scope:` goes around each wait for the network, not around a `yield`: the
    calls that the thread makes inside report to this scope and to no other.
    """

    _here = threading.local()  # .scope: the one that this thread is in
    _waiting: set[CancelScope] = set()

    def __init__(self, seconds: float, trace: str = "") -> None:
        self.deadline = time.monotonic() + seconds
        self.trace = trace  # an id by which other logs may name this work
        self.cancelled = threading.Event()
        self.socket: socket | None = None  # of a call whose answer is not read yet
        self.ended = False  # the answer is read to its end

    def remaining(self) -> float:
        """Return the seconds until the deadline, never below 0."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise CallEnded if the scope was cancelled or its time is over."""
        if self.cancelled.is_set():
            raise CallEnded("stopped")
        if not self.remaining():
            raise CallEnded("slow")

    def cancel(self) -> None:
        """End the work: the thread that does it gets CallEnded at once."""
        self.cancelled.set()
        self.abort()

    def abort(self) -> None:
        """Shut the socket down, which wakes the thread that waits for it."""
        if held := self.socket:
            with suppress(OSError, TypeError):  # closed, or TLS in a proxy's TLS
                socket.shutdown(held, SHUT_RDWR)  # SSLSocket's own disturbs a reader

    def __enter__(self) -> CancelScope:
        self.check()
        self._here.scope = self
        self._waiting.add(self)
        _start_watching(os.getpid())
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Let an error out, or CallEnded in its place if it is the scope's doing."""
        self._waiting.discard(self)
        self._here.scope = None
        if error:
            try:
                self.check()
            except CallEnded as ended:
                raise ended from None


@cache  # a forked process has another id, and no thread of its parent's
def _start_watching(process: int) -> None:
    """Start the thread that ends calls at their deadline, once in a process."""

    def watch() -> None:
        while True:
            time.sleep(WATCH_EVERY)
            for scope in CancelScope._waiting.copy():
                if not scope.remaining():
                    scope.abort()

    threading.Thread(target=watch, daemon=True).start()


class _Reporting:
    """What makes a connection report its socket to the scope of its thread."""

    sock: socket | None

    def send(self, data: Any) -> None:
        if not self.sock:
            self.connect()  # type: ignore[attr-defined]
        if scope := getattr(CancelScope._here, "scope", None):
            scope.socket = self.sock
            scope.check()
        super().send(data)  # type: ignore[misc]


class Session(HTTPAdapter):
    """The connections to one address, up to `threads` of which are kept open.

    It is what `requests` calls an adapter, used by itself: so there are no cookies, no
    redirects, and no password from .netrc or the address in the place of a key. What
    the environment says of proxies and CA bundle is read once, when it is made.
    """

    def __init__(self, url: str, threads: int = 64) -> None:
        super().__init__(pool_maxsize=threads)
        self._pool: Any = None
        self.settings: Any = {}
        with suppress(ValueError):  # an address that cannot be: calls will say so
            merge = requests.Session().merge_environment_settings
            self.settings = merge(url, {}, None, None, None)

    def get_connection_with_tls_context(
        self, request: Any, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        """Return the pool, whose connections are _Reporting, through a proxy or not.

        To look for it, and for the CA bundle, is a fifth of what a call costs.
        """
        if not self._pool:
            get_pool = super().get_connection_with_tls_context
            pool: Any = get_pool(request, verify, proxies, cert)
            super().cert_verify(pool, request.url, verify, cert)  # type: ignore[no-untyped-call]
            pool.ConnectionCls = type("_", (_Reporting, type(pool).ConnectionCls), {})
            self._pool = pool
        return self._pool

    def cert_verify(self, *_: Any) -> None:
        """Do nothing: it was done when the pool was made."""

    def post(
        self,
        url: str,
        data: bytes,
        headers: Mapping[str, str],
        timeout: tuple[float, float],
    ) -> requests.Response:
        """Return the response, its body not read yet.

        `timeout` has the seconds to connect, and between two bytes of the answer.
        Raises requests.RequestException, and CallEnded within a CancelScope.
        """
        request = requests.PreparedRequest()  # not .prepare(): it costs as much again
        request.method, request.url, request.body = "POST", url, data
        about = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        request.headers = {**HEADERS, **about, **headers}  # type: ignore[assignment]
        try:
            return self.send(request, timeout=timeout, **self.settings)
        except ValueError as error:  # an address that cannot be
            raise InvalidURL(type(error).__name__) from None


def read_arrived(response: requests.Response, scope: CancelScope) -> bytes:
    """Wait for bytes of a body, return all that have come by then; b"" is its end."""
    raw, arrived = response.raw, bytearray()
    with scope:
        while piece := raw.read1(65536, decode_content=True):
            arrived += piece
            if len(arrived) > LONGEST_READ or not has_more(raw, scope.socket):
                break
    if raw.closed:
        scope.socket = None  # from here on it may serve another call
    return bytes(arrived)


def has_more(raw: Any, held: socket | None) -> bool:
    """Return whether more of a body can be read without waiting for it."""
    if raw.closed or not held:
        return False
    timeout = held.gettimeout()
    held.settimeout(0)
    try:  # Two bytes are the end of a chunk, and the next chunk may be far.
        if len(raw._fp.fp.peek()) > 2:
            return True
    except SSLWantReadError:
        return False
    finally:
        held.settimeout(timeout)
    return wait_for_read(held, timeout=0)
