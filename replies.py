"""How an answer is shown: split into messages that IM takes, and sent when complete.

PlainReply is the whole contract of a reply: the bot calls `open`, then `update` at
every `update_interval`, then `close`. Another way to show an answer is a subclass, and
a line in REPLIES; growing.py has three. What a reply needs after a crash stands in
`progress`, and every message has the same numbers at each try, so that Tencent drops
what it has already.
"""

from __future__ import annotations

import json
import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tim import PARTS, Client, Json, Message, text_element

PART_BYTES = 9000  # of UTF-8 JSON in one message; Tencent refuses more than 12 KB
LAST_PART = PARTS - 1  # its numbers are for the sentence of give_up

# What belongs to the character before it: parts of emoji and flags, accents, jamo.
_JOINED = (
    "\u200d\u20e3\ufe00-\ufe0f\u0300-\u036f\u1100-\u11ff"
    "\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f"
)
_ANYWHERE = rf"[\s\S](?<!\u200d)(?=[^{_JOINED}])"
_BREAKS = [r"\n\s*\n", r"\n", r"[。！？!?；;]+|\.\s", r"[，,、\s]", _ANYWHERE]
_FENCE = re.compile(r"^ {0,3}(?:```+|~~~+)[^`\n]*$", re.MULTILINE)
_TABLE = re.compile(r"(?:^|\n)(\|.*\n\|[ :|-]+\n)(?:\|.*\n)*\Z")


@dataclass(eq=False)
class PlainReply:
    """A reply that is sent when it is complete, in as many messages as it needs.

    `open`, `close` and `give_up` raise IMError; if its `retry` says so, the same call
    may be made again, also by another process.
    """

    update_interval = 0.0  # seconds between two updates; 0 if it does not grow
    keep_alive_after = math.inf  # seconds of silence, after which keep_alive is due
    limit = PART_BYTES

    client: Client
    message: Message
    order: int
    progress: Json  # what an earlier process did, and what we do
    save: Callable[[Json], None]
    replaced: str  # what to say below text that another text replaces

    def __post_init__(self) -> None:
        user = self.message.user if self.message.group else ""
        self._mention = f"@{user} " if user else ""
        self.last_sent = time.monotonic()
        self.parts = 0  # of the answer, when it is closed

    def open(self) -> None:
        """Show that an answer is coming."""

    def update(self, text: str) -> None:
        """Show the answer so far."""

    def keep_alive(self) -> None:
        """Send something, before Tencent closes the message for its silence."""

    def close(self, text: str, failed: bool = False) -> None:
        """Show the whole answer, marked as complete.

        If it `failed`, the text is no answer but says why there is none.
        """
        self._send_parts(self._split(text))

    def give_up(self, text: str) -> None:
        """Show this sentence instead of an answer that IM refuses for good."""
        self._send(self._mention + text, LAST_PART, mention=True)

    def assume_sent(self) -> None:
        """Do not repeat the call that may have arrived: Tencent would not know it."""
        self._note(sent=self.progress["at"] + 1)

    def _split(self, text: str) -> list[str]:
        return split(self._mention + text, self.limit)

    def _send_parts(self, parts: list[str]) -> None:
        self.parts = len(parts)
        for number in range(self.progress.get("sent", 0), len(parts)):
            if text := parts[number].strip("\n"):
                self.progress["at"] = number
                # Number 0 is that of a growing message.
                self._send(text, number + 1, mention=number == 0)
            if number + 1 < len(parts):
                self._note(sent=number + 1)

    def _send(self, text: str, number: int, mention: bool) -> None:
        element = text_element(text)
        self.client.send(self.message, element, self.order, number, mention)

    def _note(self, **progress: Any) -> None:
        self.progress |= progress
        self.save(self.progress)


def split(text: str, limit: int = PART_BYTES) -> list[str]:
    """Return the text in parts of at most `limit` bytes as `measure` counts them.

    It breaks at paragraphs, lines, sentences, words or characters, whichever is found
    first in the second half of a part. A code block or a table that is cut is closed
    and opened again; apart from that the parts are the text.
    """
    parts, again = [], ""
    while len(text) > limit or measure(again + text) > limit:
        end = _break(text, _fitting(again, text, limit - 20))
        part, text = again + text[:end], text[end:]
        closing, again = _reopen(part, limit)
        parts.append(part + closing)
    return [*parts, again + text]


def measure(text: str) -> int:
    """Return the bytes of a text in JSON within JSON, as a custom element holds it."""
    inner = json.dumps(text, ensure_ascii=False)
    return len(json.dumps(inner, ensure_ascii=False).encode("utf-8", "replace"))


def _fitting(again: str, text: str, limit: int) -> int:
    """Return how many characters of the text fit, at least one."""
    counts = range(1, min(len(text), limit) + 1)
    return max(1, bisect_right(counts, limit, key=lambda n: measure(again + text[:n])))


def _break(text: str, end: int) -> int:
    """Return the best place to cut, at most `end`."""
    half = text[end // 2 : end]
    for pattern in _BREAKS:
        if found := [*re.finditer(pattern, half)]:
            return end // 2 + found[-1].end()
    return end


def _reopen(part: str, limit: int) -> tuple[str, str]:
    """Return what closes a code block or table that a part cuts, what reopens it."""
    fences, closing, again = _FENCE.findall(part), "", ""
    if len(fences) % 2:
        mark, again = fences[-1].strip()[:3], f"{fences[-1]}\n"
        closing = mark if part.endswith("\n") else f"\n{mark}"
    elif table := _TABLE.search(part):
        again = table[1]
    return closing, again if measure(again) < limit // 4 else ""
