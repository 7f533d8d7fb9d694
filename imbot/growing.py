"""Replies that grow in the chat: edited text, TUIKit's AI message, Tencent's stream.

To remove them delete this file and the import that then fails. Where IM refuses to let
a message grow, its text goes on in messages that do not.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .replies import PART_BYTES, CardReply, PlainReply, card, split
from .tencent.callback import Json
from .tencent.rest import MEANING, IMError, chat_fields, message_body, text_element

OPENING = -1  # instead of a part's number
KEEP_ALIVE = 8.0  # seconds without a chunk, after which one is sent
SILENCE = 14.0  # seconds without a chunk during which Tencent keeps a stream open

logger = logging.getLogger(__name__)


class GrowingReply(PlainReply):
    """What the replies below share."""

    _is_stored = False  # the store knows the growing message

    def open(self) -> None:
        if self.progress.key is None and not self.progress.plain:
            with self._or_plain():
                with self.noting(OPENING):
                    self.save()  # from now on it may be shown, also if we die here
                    self.progress.key = self.begin(self.known_until())
                self._is_stored = self._note_sent(0)

    def begin(self, until: float) -> Any:
        """Send the initial message and return the key for editing it.

        See Client.call for `until`.
        """
        raise NotImplementedError

    def grows(self) -> bool:
        """Return whether the growing message can still be changed."""
        return self.progress.key is not None and not self.progress.plain

    @contextmanager
    def _or_plain(self) -> Iterator[None]:
        """Fall back to plain messages on a final error; re-raise retryable ones."""
        try:
            yield
        except (IMError, KeyError) as error:
            if isinstance(error, IMError) and error.retry:
                raise
            logger.warning("%s is not shown growing: %s", self.message.id, error)
            self.progress.plain = True
            self.keep_alive_after = math.inf

    def assume_sent(self) -> None:
        if self.progress.sending == OPENING:
            self.progress.plain = True  # opened again, it could be shown twice
            self._note_sent(0)
        else:
            super().assume_sent()


class EditedReply(GrowingReply):
    """A message that is edited until it holds the answer, or its first part."""

    update_interval = 1.0
    _shown = ""  # the text so far, as the message shows it

    def begin(self, until: float) -> Any:
        # After a crash the same bytes are sent, and Tencent returns the same key.
        element = self.element("", finished=False)
        answer = self.client.send(self.message, element, 0, True, until)
        return answer["MsgSeq" if self.message.group else "MsgKey"]

    def update(self, text: str) -> None:
        if not self.grows():
            return
        parts, before = self._split(text), self._shown
        if not self.may_replace(parts[0]):
            return
        if len(parts) == 1:
            self._shown = parts[0]  # also if no confirmation comes
        try:
            self._modify(self.element(parts[0], finished=False), ())
        except IMError as error:  # the next edit shows this text too
            if not error.retry:
                self._shown = before

    def close(self, text: str, failed: bool = False) -> None:
        progress, parts = self.progress, self._split(text)
        if not progress.sent and self.grows() and self.may_replace(parts[0]):
            if self._finish(parts[0], failed):
                progress.confirm(1)
        if not progress.sent and not progress.ended:
            # It shows a part of the answer, which is sent again as a whole.
            self._finish(self._below(self.texts["replaced"]))
            progress.ended = True
        self._send_parts(parts, failed)

    def close_with(self, element: Json) -> None:
        if not self.progress.sent:
            self._finish(self._shown)
        super().close_with(element)

    def give_up(self, text: str) -> None:
        # Keep the part that is already shown.
        told = self._below(text) if self._shown else self._mention + text
        done = self.progress.sent or self.progress.ended
        if done or not self._finish(told, not self._shown):
            super().give_up(text)

    def may_replace(self, text: str) -> bool:
        """Return whether a text may take the place of what is shown."""
        return True

    def _split(self, text: str) -> list[str]:
        """Split the answer; what was shown never becomes shorter."""
        text = self._mention + text
        at_least = len(self._shown) if text.startswith(self._shown) else 0
        return split(text, self.limit, at_least)

    def _below(self, text: str) -> str:
        """Return what is shown with a sentence below it."""
        return "\n\n".join(filter(None, (self._shown, text)))

    def _finish(self, text: str, failed: bool = False) -> bool:
        """Edit the message for the last time; return whether it shows the text."""
        if self.progress.key is not None:
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
        body = chat_fields(self.message) | {key: self.progress.key}
        body["MsgBody"] = [element]
        try:
            self.client.call(f"openim/modify_{kind}_msg", body, pauses)
        except IMError as error:
            error.may_have_arrived = False  # an edit made twice shows the same
            raise

    def element(self, text: str, finished: bool, failed: bool = False) -> Json:
        """Return the element that shows `text`."""
        return text_element(text if finished else f"{text}…")


class GrowingCardReply(CardReply, EditedReply):
    """TUIKit's AI message, edited while the answer grows, with a stop button."""

    def close_with(self, element: Json) -> None:
        opened = self.grows()
        EditedReply.close_with(self, element)
        if not opened and self.must_unlock:
            self.client.send(self.message, card(""), 2)

    def element(self, text: str, finished: bool, failed: bool = False) -> Json:
        return card(text, finished, failed)

    def may_replace(self, text: str) -> bool:
        return text.startswith(self._shown)  # TUIKit for Vue only appends


class StreamReply(GrowingReply):
    """Tencent's own streaming message, to which text can only be added.

    A chunk has the Index that follows the last one: clients ignore any other. So only
    the process that opened a stream adds to it. A stream of a crashed process is left
    to Tencent, which closes it after 15 s, and the answer is sent whole.
    """

    update_interval = 0.4
    keep_alive_after = KEEP_ALIVE
    limit = 100_000  # bytes; Tencent refuses a stream of 128 KB

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lock = threading.Lock()  # held while a chunk is on its way
        self._said = self.progress.said  # and confirmed by Tencent
        self._index = self.progress.index
        self._pending = self.progress.pending  # sent, but not confirmed
        self._is_stored = self.progress.key is not None

    def open(self) -> None:
        super().open()
        if self._index == 0:  # another process opened it
            self.progress.plain = True

    def begin(self, until: float) -> Any:
        return self._push("", pauses=None, until=until)["StreamMsgID"]

    def update(self, text: str) -> None:
        with self._lock:
            first, *rest = self._split(text)
            # What the stream cannot hold is shown when the answer is complete.
            if not rest and first != self._said and first.startswith(self._said):
                self._add(first.removeprefix(self._said))

    def keep_alive(self) -> None:
        if self._lock.acquire(blocking=False):  # else a chunk is on its way
            try:
                self._add("")
            finally:
                self._lock.release()

    def close(self, text: str, failed: bool = False) -> None:
        with self._lock:
            self.keep_alive_after = math.inf
            self.open()
            parts = self._split(text)
            if self.grows() and not self.progress.sent:
                with self._or_plain():
                    self._complete(parts[0])
                self._note_said()
        if not self.grows():  # what the stream does not show follows as messages
            self._end("")
            self._note_said()
            parts = split((self._mention + text).removeprefix(self._said))
        self._send_parts(parts, failed)

    def close_with(self, element: Json) -> None:
        with self._lock:
            self.keep_alive_after = math.inf
            self._end("")
        super().close_with(element)

    def give_up(self, text: str) -> None:
        with self._lock:
            self.keep_alive_after = math.inf
            shown = self._said or self._pending
            if not self._end(f"\n\n{text}" if shown else self._mention + text):
                super().give_up(text)

    def _split(self, text: str) -> list[str]:
        """Return what the stream shows, then the messages that follow it."""
        text, said = self._mention + text, self._said + (self._pending or "")
        at_least = len(said) if text.startswith(said) else 0
        first, *rest = split(text, self.limit, at_least)
        return [first, *(split("".join(rest), PART_BYTES) if rest else ())]

    def _end(self, text: str) -> bool:
        """Close the stream with a text, if this process may; return whether it has."""
        progress = self.progress
        if not self._index or progress.key is None or progress.sent or progress.ended:
            return False
        progress.ended = True
        try:
            if self._pending is not None:
                self._push(self._pending, pauses=None)
            self._push(text, last=True, pauses=None)
        except IMError as error:
            if error.retry:
                progress.ended = False
                raise
            return False
        return True

    def _note_said(self) -> None:
        """Save how far the stream is, so that a later try goes on there."""
        self.progress.said, self.progress.index = self._said, self._index
        self.progress.pending = self._pending
        self.save()

    def _add(self, text: str) -> None:
        """Push what is pending, else `text`; if it fails, the next one tries again."""
        closed = self.keep_alive_after == math.inf  # or is being closed
        # Another process, which does not know the stream, would open it again, and its
        # first chunk would pass for a repetition of ours.
        if self.grows() and not closed and (self._is_stored or self.save()):
            self._is_stored = True
            with suppress(IMError), self._or_plain():
                self._push(text if self._pending is None else self._pending)

    def _complete(self, text: str) -> None:
        """Send the rest and close the stream; fall back if it has said another text.

        If Tencent says the stream is closed although we sent a chunk a moment ago, an
        earlier try of the last chunk succeeded. In doubt its text is sent again: twice
        is better than never.
        """
        progress = self.progress
        fits = text.startswith(self._said + (self._pending or ""))
        try:
            if self._pending is not None:
                self._note_said()
                self._push(self._pending, pauses=None)
            closing, progress.closing = progress.closing, True  # if we die there
            self._note_said()
            progress.closing = closing
            replaced = f"\n\n{self.texts['replaced']}"
            rest = text.removeprefix(self._said) if fits else replaced
            self._push(rest, last=True, pauses=None)
        except IMError as error:
            progress.closing = progress.closing or error.may_have_arrived
            fresh = 0 <= time.time() - progress.taken < SILENCE
            closed = not error.retry and error.code not in MEANING
            if not (closed and fresh and progress.closing):
                raise
        if fits:
            progress.confirm(1)
        else:
            progress.plain, progress.ended, self._said = True, True, ""

    def _push(
        self,
        text: str,
        last: bool = False,
        pauses: Sequence[float] | None = (),
        until: float = math.inf,
    ) -> Json:
        """Send a chunk and return Tencent's answer.

        https://cloud.tencent.com/document/product/269/128596 (one-to-one)
        https://cloud.tencent.com/document/product/269/128597 (group)
        """
        again = self._pending is not None
        if not again:
            self._index += 1
        self._pending, self.last_sent = text, time.monotonic()
        chunk: Json = {"EventType": "data", "Index": self._index}
        chunk |= {"Markdown": text, "IsLast": last}
        # Clients that know no streams show the CompatibleText.
        content: Json = {"CompatibleText": "…", "Chunks": [chunk]}
        if self.progress.key is not None:
            content["StreamMsgID"] = self.progress.key
        element = {"MsgType": "TIMStreamElem", "MsgContent": content}
        body = message_body(self.message, element, 0)
        kind = "group" if self.message.group else "c2c"
        command = f"stream_msg/send_{kind}_stream_msg"
        try:
            answer = self.client.call(command, body, pauses, until=until)
        except IMError as error:
            if not (again or error.may_have_arrived):  # another text may have its Index
                self._index, self._pending = self._index - 1, None
            raise
        self._said, self._pending = self._said + text, None
        if self._index > 1:  # an opening may be the repetition of an old one
            self.progress.taken = time.time()
        return answer
