"""Replies that grow in the chat: edited text, TUIKit's AI card, Tencent's own stream.

An option: without it, delete this file and its lines in REPLIES. Where IM refuses to
let a message grow, its text goes as plain messages, as PlainReply sends it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .replies import PlainReply, split
from .tencent.callback import Json
from .tencent.rest import (
    MEANING,
    IMError,
    chat_fields,
    message_body,
    text_element,
)

OPENING = -1  # instead of a part's number
KEEP_ALIVE = 8.0  # seconds without a chunk, after which one is sent
SILENCE = 14.0  # seconds without a chunk in which Tencent surely keeps a stream open
# Chunks of a stream are numbered from 1. A last chunk that has to be the same at each
# try, also by a process that does not know what was sent before, begins here.
ORPHANED, GIVEN_UP = 100_000, 200_000

logger = logging.getLogger(__name__)


class GrowingReply(PlainReply):
    """What the replies below share."""

    def open(self) -> None:
        if not {"key", "plain"} & self.progress.keys():
            with self._or_plain():
                self.progress["at"] = OPENING
                self._note(key=self.begin(), at=None)

    def begin(self) -> Any:
        """Send a message that can grow, and return by what Tencent knows it."""
        raise NotImplementedError

    @contextmanager
    def _or_plain(self) -> Iterator[None]:
        """Go on with plain messages if IM refuses; raise what another try may mend."""
        try:
            yield
        except (IMError, KeyError) as error:
            if isinstance(error, IMError) and error.retry:
                raise
            logger.warning("%s is not shown growing: %s", self.message.id, error)
            self.progress["plain"] = True
            self.keep_alive_after = math.inf

    def assume_sent(self) -> None:
        if self.progress["at"] != OPENING:
            return super().assume_sent()
        self._note(plain=True, at=None)  # to open it once more could show it twice


class EditedReply(GrowingReply):
    """A message that is edited until it holds the answer, or its first part."""

    update_interval = 1.0

    def begin(self) -> Any:
        # After a crash the same bytes are sent, and Tencent returns the same key.
        element = self.element("", finished=False)
        answer = self.client.send(self.message, element, self.order, 0, mention=True)
        return answer["MsgSeq" if self.message.group else "MsgKey"]

    def update(self, text: str) -> None:
        if "key" in self.progress:
            with suppress(IMError):  # the next edit shows this text too
                self._modify(self.element(self._split(text)[0], finished=False), ())

    def close(self, text: str, failed: bool = False) -> None:
        parts = self._split(text)
        if "sent" not in self.progress:
            if self._finish(parts[0], failed):
                self.progress["sent"] = 1
            else:
                self._finish(self.replaced, failed=False)
        self._send_parts(parts)

    def give_up(self, text: str) -> None:
        # A part of the answer that is shown stays.
        if "sent" in self.progress or not self._finish(self._mention + text, True):
            super().give_up(text)

    def _finish(self, text: str, failed: bool) -> bool:
        """Edit the message for the last time; return whether it shows the text."""
        if "key" in self.progress:
            with self._or_plain():
                self._modify(self.element(text, True, failed), None)
                return True
        return False

    def _modify(self, element: Json, pauses: Sequence[float] | None) -> None:
        """Replace what the message shows.

        https://www.tencentcloud.com/document/product/1047/47722 (one-to-one)
        https://www.tencentcloud.com/document/product/1047/47948 (group)
        """
        kind, key = ("group", "MsgSeq") if self.message.group else ("c2c", "MsgKey")
        body = chat_fields(self.message) | {key: self.progress["key"]}
        body["MsgBody"] = [element]
        try:
            self.client.call(f"openim/modify_{kind}_msg", body, pauses)
        except IMError as error:
            error.may_have_arrived = False  # an edit made twice shows the same
            raise

    def element(self, text: str, finished: bool, failed: bool = False) -> Json:
        """Return the element that shows `text`."""
        return text_element(text if finished else f"{text}…")


class CardReply(EditedReply):
    """The element that Tencent's TUIKit draws as an AI's answer, with a stop button.

    https://cloud.tencent.com/document/product/269/122036
    """

    def element(self, text: str, finished: bool, failed: bool = False) -> Json:
        data: Json = {"chatbotPlugin": 2, "src": 2, "chunks": [text] if text else []}
        if failed:
            data = {"chatbotPlugin": 2, "src": 23, "errorInfo": text}
        shown = json.dumps(data | {"isFinished": int(finished)}, ensure_ascii=False)
        content = {"Data": shown, "Desc": text[:50] or "…"}
        return {"MsgType": "TIMCustomElem", "MsgContent": content}


class StreamReply(GrowingReply):
    """Tencent's own streaming message, to which text can only be added."""

    update_interval = 0.4
    keep_alive_after = KEEP_ALIVE
    limit = 100_000  # bytes; Tencent refuses a stream of 128 KB

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lock = threading.Lock()  # held while a chunk is on its way
        self._said = self.progress.get("said", "")  # and confirmed by Tencent
        self._pending: str | None = None  # sent, but not confirmed
        self._index = self.progress.get("index", 0)
        # When Tencent last took a chunk, Unix seconds.
        self._confirmed = self.progress.get("confirmed", 0.0)

    def open(self) -> None:
        super().open()
        if self._grows() and self._index == 0:
            with self._or_plain():  # it is a dead process's: who knows what it has said
                self._close_with(self.replaced, ORPHANED)
                self.progress["plain"] = True

    def begin(self) -> Any:
        return self._push("", pauses=None)["StreamMsgID"]

    def update(self, text: str) -> None:
        text = self._split(text)[0]
        with self._lock:
            if text != self._said and text.startswith(self._said):
                self._add(text.removeprefix(self._said))

    def keep_alive(self) -> None:
        if self._lock.acquire(blocking=False):  # else a chunk is on its way
            try:
                self._add("")
            finally:
                self._lock.release()

    def close(self, text: str, failed: bool = False) -> None:
        parts = self._split(text)
        with self._lock:
            self.keep_alive_after = math.inf
            if self._grows():
                self.open()  # if a process died after the answer was saved
            tried = "confirmed" in self.progress
            if "key" in self.progress:
                now = {"said": self._said, "index": self._index}
                self._note(**now, confirmed=self._confirmed)
            if self._grows() and "sent" not in self.progress:
                with self._or_plain():
                    self._complete(parts[0], tried)
        if not self._grows():  # what the stream does not show goes as plain messages
            self.progress["said"] = self._said
            parts = split("".join(parts).removeprefix(self._said))
        self._send_parts(parts)

    def give_up(self, text: str) -> None:
        with self._lock:
            self.keep_alive_after = math.inf
            if "key" in self.progress:
                with self._or_plain():
                    return self._close_with(text, GIVEN_UP)
        super().give_up(text)

    def _grows(self) -> bool:
        return "key" in self.progress and "plain" not in self.progress

    def _add(self, text: str) -> None:
        """Push what is pending, else `text`; if it fails, the next one tries again."""
        closed = self.keep_alive_after == math.inf  # or is being closed
        if self._grows() and not closed:
            with suppress(IMError), self._or_plain():
                self._push(text if self._pending is None else self._pending)

    def _complete(self, text: str, tried: bool) -> None:
        """Send the rest and close the stream; go plain if it has said another text.

        A stream that is closed although it was not silent was closed by an earlier try.
        If nobody knows, the rest is sent once more: shown twice is better than never.
        """
        fits = text.startswith(self._said + (self._pending or ""))
        try:
            if self._pending is not None:
                self._push(self._pending, pauses=None)
            rest = text.removeprefix(self._said) if fits else f"\n\n{self.replaced}"
            self._push(rest, last=True, pauses=None)
        except IMError as error:  # perhaps after a pause
            fresh = 0 <= time.time() - self._confirmed < SILENCE
            closed = not error.retry and error.code not in MEANING
            if not (closed and fresh and (tried or error.may_have_arrived)):
                raise
        self.progress |= {"sent": 1} if fits else {"plain": True}

    def _close_with(self, text: str, index: int) -> None:
        """Close the stream with one more paragraph, whatever was said before."""
        self._index, self._pending = index, None
        self._push(f"\n\n{text}", last=True, pauses=None)

    def _push(
        self, text: str, last: bool = False, pauses: Sequence[float] | None = ()
    ) -> Json:
        """Send a chunk and return Tencent's answer.

        https://cloud.tencent.com/document/product/269/128596 (one-to-one)
        https://cloud.tencent.com/document/product/269/128597 (group)
        """
        if self._pending is None:
            self._index += 1
        self._pending, self.last_sent = text, time.monotonic()
        chunk: Json = {"EventType": "data", "Index": self._index}
        chunk |= {"Markdown": text, "IsLast": last}
        # Clients that know no streams show the CompatibleText.
        content: Json = {"CompatibleText": "…", "Chunks": [chunk]}
        if "key" in self.progress:
            content["StreamMsgID"] = self.progress["key"]
        element = {"MsgType": "TIMStreamElem", "MsgContent": content}
        body = message_body(self.message, element, self.order, 0)
        kind = "group" if self.message.group else "c2c"
        answer = self.client.call(f"stream_msg/send_{kind}_stream_msg", body, pauses)
        self._said, self._pending = self._said + text, None
        if self._index > 1:  # who opened it may have been another process, long ago
            self._confirmed = time.time()
        return answer
