"""The relay between the bot and a real AI service, so that its calls can be seen.

What the service sends is passed on as it comes, and a call that the bot ends is ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import requests
from urllib3.exceptions import HTTPError

from imbot.http import CallEnded, CancelScope, Session, read_arrived

LONGEST = 600  # seconds; the bot has a limit of its own
OF_ONE_CONNECTION = (  # headers that are not passed on
    "host connection keep-alive content-length content-encoding transfer-encoding "
    "accept-encoding date server"
).split()


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that concern both sides."""
    return {k: v for k, v in headers.items() if k.lower() not in OF_ONE_CONNECTION}


class Unreachable(Exception):
    """The service gave no answer; the text says why."""


class Relay:
    """The real AI service at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = Session(self.url)

    @contextmanager
    def post(
        self,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        left: Callable[[], bool],
    ) -> Iterator[tuple[requests.Response, Iterator[bytes]]]:
        """Make the bot's call; give the response, and its body piece by piece.

        If the bot has `left`, the call is ended. Raises Unreachable.
        """
        scope, done = CancelScope(LONGEST), threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                if left():
                    scope.cancel()

        threading.Thread(target=watch, daemon=True).start()
        try:
            url, about = self.url + path, passed_on(headers)
            with scope:
                response = self._session.post(url, body, about, (5, LONGEST))
            with response:
                yield response, iter(lambda: read_arrived(response, scope), b"")
        except CallEnded:
            raise ConnectionAbortedError from None
        except (requests.RequestException, HTTPError) as error:
            why = f"{self.url} gave no answer: {first_cause(error)}"
            raise Unreachable(why) from None
        finally:
            done.set()


def first_cause(error: BaseException) -> BaseException:
    """Return the error that others were made of: it says the reason in short."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error
