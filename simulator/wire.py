"""What goes over the wire, for the page: calls, those that run too, and whose they are.

A call is matched by numbers, not by time. The bot makes those of an answer from the id
of its question (rest.numbers), and an AI call carries the first of them as its trace.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from imbot.tencent import callback, rest

from .messages import Json, name_of
from .tencent import Tencent

KEPT = 500  # callbacks and calls that are remembered
PARTS = range(rest.SORRY - 64, 64)  # of an answer


class Wire(Tencent):
    """Tencent IM, with what users said and every call, without the calls' secrets."""

    def __init__(self, sdkappid: int, key: str) -> None:
        super().__init__(sdkappid, key)
        self.said: deque[Json] = deque(maxlen=KEPT)  # callbacks of what users did
        self.wire: deque[Json] = deque(maxlen=KEPT)
        self.called: set[str] = set()  # names of what Tencent called the bot for
        self.warned: deque[Json] = deque(maxlen=KEPT)  # what the bot warned of
        self.secret = ""  # the AI's key, which is not shown
        self._recorded = 0  # calls and warnings
        self._questions: dict[Any, str] = {}

    @contextmanager
    def on_wire(
        self, kind: str, url: str, body: Any, of: str | None = None, trace: str = ""
    ) -> Iterator[Json]:
        """Show a call while it is made; the caller adds its `status` and `answer`.

        `kind` is "IM", "AI", or how a callback is sent; `of` its question, if known.
        """
        began = time.time()
        line = "POST " + re.sub("(Sign|usersig)=[^&]*", r"\1=•••", url)
        call: Json = {"kind": kind, "time": began * 1000, "line": self.hide(line)}
        call |= {"of": of, "trace": trace, "body": self.hide(body)}
        call |= {"status": 0, "answer": None, "ms": None, "left": False}
        with self.changed:
            self._recorded += 1
            call["id"] = f"call {self._recorded}"
            self.wire.append(call)
            if kind == "delivered":
                self.called.add(str(of))
            self.changed.notify_all()
        try:
            yield call
        except ConnectionError:
            call["left"] = True  # by who made it
            raise
        finally:
            with self.changed:
                call["answer"] = self.hide(call["answer"])
                call["ms"] = (time.time() - began) * 1000
                self.changed.notify_all()

    def warn(self, text: str, of: str) -> None:
        """Show a warning of the bot's, about a question if it is `of` one."""
        failed = re.match("message .* failed: ", text) is not None
        text = self.hide(text)
        with self.changed:
            self._recorded += 1
            told = {"id": f"warning {self._recorded}", "time": time.time() * 1000}
            self.warned.append(told | {"warning": text, "of": of, "failed": failed})
            self.changed.notify_all()

    def hide(self, value: Any) -> Any:
        """Return a value, such as JSON, without the AI's key."""
        if isinstance(value, str) and self.secret:
            return value.replace(self.secret, "•••")
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {name: self.hide(item) for name, item in value.items()}
        return value

    def calls_on_wire(self) -> list[Json]:
        """Return the calls as they are now, each `of` its question or ""."""
        for call in self.wire:
            if call["of"] is None:
                call["of"] = self._matched(call["trace"], call["body"])
        return [dict(call) for call in self.wire]

    def _matched(self, trace: str, body: Any) -> str:
        if trace.isdecimal():
            return self._question(int(trace), "")
        return self.question_of(body) if isinstance(body, dict) else ""

    def question_of(self, body: Json) -> str:
        """Return the name of the question that a REST call answers, "" if none."""
        chat = str(body.get("GroupId") or body.get("To_Account"))
        number = body.get("MsgRandom", body.get("Random"))
        if isinstance(number, int):
            return self._question(number, chat)
        key = body.get("MsgKey") or body.get("MsgSeq")  # an edit names the message
        for message in reversed(self.delivered):
            if key and (message.chat, message.key) == (chat, key):
                return self.question_of(message.body)
        return ""

    def _question(self, number: int, chat: str) -> str:
        key = (number, chat)
        if key not in self._questions:
            named = (
                name_of(event)
                for event in reversed(self.said)
                if chat in ("", event.get("GroupId"), event["From_Account"])
                and number in _numbers(event)
            )
            self._questions[key] = next(named, "")
        return self._questions[key]


def _numbers(event: Json) -> list[int]:
    """Return the MsgRandoms that answers to an event's message may have."""
    messages: list[callback.Message] = []
    with suppress(callback.BadEvent):
        messages = callback.parse(event["CallbackCommand"], event)
    return [rest.numbers(m, part)[1] for m in messages for part in PARTS]
