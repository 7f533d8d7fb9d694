"""Flask at the edge: a callback's body, refusals in Tencent's shape, the log."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from flask import current_app, request
from werkzeug.exceptions import HTTPException

from .outside import Secrets, printable
from .tencent.callback import BadEvent
from .timing import NORMAL

OK = {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}
CALLBACK = "/im"  # the path of the callback; /im/ is taken, too
LARGEST_REST, PIECE = 16 << 20, 1 << 16  # bytes that are read of a refused body
LONGEST_LINE = 2000  # characters of a log line
LONGEST_PATH = 60  # characters of a path that are logged

logger = logging.getLogger(__name__)


def read_body() -> bytes:
    """Return the body of a callback. Raises BadEvent if it is broken."""
    try:
        return request.get_data()
    except HTTPException:  # it is too large
        raise
    except Exception as error:  # gunicorn has an exception class for every fault
        raise BadEvent(f"the body is broken ({type(error).__name__})") from None


def refuse(status: int, error: Exception) -> tuple[dict[str, Any], int]:
    """Return an error in Tencent's shape, and log it if a callback is refused.

    The unread rest of the body is read first, so that the connection can be reused.
    """
    why = str(error)
    if isinstance(error, HTTPException):
        status, why = error.code or status, error.description or error.name
    why = printable(why)
    if is_callback():
        _warn(
            f"{status} {type(error).__name__}", f"callback refused with {status}: {why}"
        )
    elif request.method == "POST" and "CallbackCommand" in request.args:
        status, why = 404, f"the path of callbacks is {CALLBACK}"
        path = printable(request.path, LONGEST_PATH)
        hint = f"the URL under Webhook in the console must end with {CALLBACK}"
        _warn("path", f"callback to {path} refused with 404: {hint}")
    if request.environ.get("wsgi.input_terminated"):
        with suppress(Exception):  # it is broken, and gunicorn closes
            for _ in range(0, LARGEST_REST, PIECE):
                if not request.environ["wsgi.input"].read(PIECE):
                    break
    return {"ActionStatus": "FAIL", "ErrorInfo": why, "ErrorCode": 1}, status


def is_callback() -> bool:
    """Return whether the request came to the path of callbacks."""
    return request.path.rstrip("/") == CALLBACK


def _warn(kind: str, line: str) -> None:
    """Log a warning that anybody could cause: one a minute of each kind and app."""
    throttle = current_app.extensions.setdefault("throttle", Throttle())
    if (unseen := throttle.admit(kind)) is not None:
        logger.warning("%s%s", line, _more(unseen))


def _more(unseen: int) -> str:
    return f" ({unseen} more of this kind since the last line)" if unseen else ""


class Throttle:
    """Admits one event of each kind every `seconds`, and counts the others.

    There must be few kinds: none may be made of what a caller sends.
    """

    def __init__(self, seconds: float = NORMAL.log_every) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._kinds: dict[str, tuple[float, int]] = {}  # next admission, not admitted

    def admit(self, kind: str) -> int | None:
        """Admit one and return how many were not since the last, or return None."""
        now = time.monotonic()
        with self._lock:
            next_at, unseen = self._kinds.get(kind, (now, 0))
            if now < next_at:
                self._kinds[kind] = (next_at, unseen + 1)
                return None
            self._kinds[kind] = (now + self.seconds, 0)
            return unseen


class InvalidRequests(logging.Filter):
    """Admits one of gunicorn's warnings of broken HTTP a minute, and shortens it.

    Anybody can cause them, hundreds a second, each with up to 4 KB of the request.
    """

    def __init__(self, seconds: float = NORMAL.log_every) -> None:
        super().__init__()
        self._throttle = Throttle(seconds)

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.getMessage()
        if not line.startswith("Invalid request"):
            return True
        if (unseen := self._throttle.admit("")) is None:
            return False
        record.msg, record.args = printable(line) + _more(unseen), ()
        return True


INVALID_REQUESTS = InvalidRequests()  # one: a logger has each filter once


def set_up_logging(level: str, secrets: Iterable[str] = ()) -> None:
    """Log to standard output. Never log signatures, message texts, or `secrets`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter(secrets))
    logging.basicConfig(level=level, handlers=[handler])
    for name in ("urllib3", "werkzeug"):  # they log URLs, with UserSig and Sign
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("gunicorn.error").addFilter(INVALID_REQUESTS)


class LineFormatter(logging.Formatter):
    """Formats an event as one line, without secrets; a traceback follows indented.

    So no text from outside can look like an event of its own. Of an exception only its
    name is shown: its text may quote a message.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._secrets = Secrets(secrets)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = re.sub("\t+", " ", super().formatMessage(record))  # as in message ids
        return printable(self._secrets.hide(line), LONGEST_LINE)

    def formatException(self, ei: Any) -> str:
        error, shown = ei[1], ""
        while error:
            place = "".join(traceback.format_tb(error.__traceback__))
            shown = f"Traceback:\n{place}{type(error).__name__}\n{shown}"
            hidden = None if error.__suppress_context__ else error.__context__
            error = error.__cause__ or hidden
        lines = self._secrets.hide(shown).splitlines()
        return "\n".join(f"  {printable(line, LONGEST_LINE)}" for line in lines)


def log_crash(crash: threading.ExceptHookArgs) -> None:
    """Log what ended a thread; for threading.excepthook, which would print its text."""
    if crash.exc_value:
        info = (crash.exc_type, crash.exc_value, crash.exc_traceback)
        logger.error("a thread failed", exc_info=info)
