"""Flask at the edge: a callback's body, refusals in Tencent's shape, the log."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import suppress
from typing import Any

from flask import request
from werkzeug.exceptions import HTTPException

from .tencent.callback import BadEvent

OK = {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}
LARGEST_CALLBACK = 1 << 20  # bytes
LARGEST_REST, PIECE = 16 << 20, 1 << 16  # bytes that are read of a refused body

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
    """Return an error in Tencent's shape.

    The unread rest of the body is read first, so that the connection can be reused.
    """
    why = str(error)
    if isinstance(error, HTTPException):
        status, why = error.code or status, error.description or error.name
    if request.path == "/im":
        logger.warning("callback refused with %d: %s", status, why)
    if request.environ.get("wsgi.input_terminated"):
        with suppress(Exception):  # it is broken, and gunicorn closes
            for _ in range(0, LARGEST_REST, PIECE):
                if not request.environ["wsgi.input"].read(PIECE):
                    break
    return {"ActionStatus": "FAIL", "ErrorInfo": why, "ErrorCode": 1}, status


def set_up_logging(level: str) -> None:
    """Log to standard output. Never log signatures or message texts."""
    handler = logging.StreamHandler(sys.stdout)
    line = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler.setFormatter(LineFormatter(line))
    logging.basicConfig(level=level, handlers=[handler])
    for name in ("urllib3", "werkzeug"):  # they log URLs, with UserSig and Sign
        logging.getLogger(name).setLevel(logging.WARNING)


class LineFormatter(logging.Formatter):
    """Shows the tabs between the parts of a message's id as spaces."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub("\t+", " ", super().format(record))
