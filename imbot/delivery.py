"""The way of an answer to its user: kept, shown, tried again, or given up.

    delivery = outbox.open(job, message, PlainReply)
    delivery.keep(answer)        # on disk: a restart sends it, and does not pay twice
    delivery.show(answer)        # raises IMError
    delivery.finish()            # or delivery.postpone(error)

Every try sends the same numbers, so Tencent drops what it already has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .queue.sql import Added
from .queue.store import Store, StoreError
from .queue.workers import Job, LeaseLost, Workers
from .replies import PlainReply
from .tencent.callback import Message
from .tencent.rest import Client, IMError
from .timing import NORMAL, Timing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What the user gets."""

    text: str = ""  # "" if there is none, and `note` says why
    note: str = ""  # shown below the text, e.g. why it is cut; never remembered
    remember: bool = False  # whether later questions see it
    outcome: str = "sent"  # for the log

    @property
    def shown(self) -> str:
        return "\n\n".join(filter(None, (self.text, self.note)))


class Outbox:
    """What all deliveries share."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        im: Client,
        texts: dict[str, str],
        is_absent: Callable[[Message, int, int], bool],
        room: int,
        timing: Timing = NORMAL,
    ) -> None:
        self.timing = timing
        self.store, self.workers, self.im, self.texts = store, workers, im, texts
        self.is_absent, self.room = is_absent, room

    def open(self, job: Job, message: Message, mode: type[PlainReply]) -> Delivery:
        """Begin to answer a message."""
        return Delivery(self, job, message, mode)

    def tell(self, message: Message, conversation: str, why: str) -> bool:
        """Say why messages are refused, unless it was said lately. Return whether it
        is said. It does not wait behind the answers of the chat."""
        timing = self.timing
        limited = why == Added.RATE_LIMITED
        every = timing.minute if limited else timing.notice_every
        place = (message.robot, message.group or message.user)
        id = "\t".join((why, *place, f"{time.time() // every:.0f}"))
        return self.say(message, conversation, id, self.texts[why])

    def say(self, message: Message, conversation: str, id: str, text: str) -> bool:
        """Send a sentence beside the answers of a conversation, once for each id."""
        about = replace(message, text="", quote="", images=())  # nobody needs them
        beside = f"{conversation}\tnotice"
        added = self.workers.add(id, beside, about.data(), room=self.room, reply=text)
        return added == Added.NEW


class Delivery:
    """One answer on its way."""

    def __init__(
        self, outbox: Outbox, job: Job, message: Message, mode: type[PlainReply]
    ) -> None:
        self.outbox, self.job, self.message, claim = outbox, job, message, job.claim
        self.progress = dict(
            claim.progress
        )  # of sending; another process goes on there
        numbers = (message, claim.seq, self.progress, self._save_progress)
        self.reply = mode(outbox.im, *numbers, outbox.texts["replaced"])
        self.kept: Answer | None = None  # by a process that died, or could not send it
        if claim.reply is not None:
            self.kept = Answer(claim.reply, self.progress.get("note", ""))
        self._outcome, self._began, self._asked = "sent", time.monotonic(), 0.0
        job.tick = self._keep_alive

    def _keep_alive(self) -> None:
        if time.monotonic() - self.reply.last_sent > self.reply.keep_alive_after:
            self.outbox.workers.in_background(self.reply.keep_alive)

    def keep(self, answer: Answer) -> None:
        """Save an answer before it is sent. If the store is away it waits: the answer
        was paid for."""
        if self.kept:
            return
        self.progress |= {"note": answer.note} if answer.note else {}
        self._outcome, end = (
            answer.outcome,
            time.monotonic() + self.outbox.timing.save_patience,
        )
        while True:
            try:
                return self._save(answer.text, answer.remember)
            except StoreError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def _save_progress(self, progress: Any = None) -> None:
        try:
            self._save(None, False)
        except StoreError:
            pass  # it stays in memory

    def _save(self, text: str | None, remember: bool) -> None:
        claim, progress = self.job.claim, self.progress
        if not self.outbox.store.save_reply(claim, text, progress, remember):
            raise LeaseLost

    def show(self, answer: Answer) -> None:
        """Send the answer. Raises IMError."""
        self._asked = time.monotonic()
        if answer.shown:
            self.reply.close(answer.shown, failed=not answer.text)

    def finish(self) -> None:
        """Mark the message as answered; if the store is away, as soon as it is back."""
        outbox, claim, sent = self.outbox, self.job.claim, time.monotonic()
        outbox.workers.when_store_works(outbox.store.finish, claim)
        asked = self._asked or sent
        took = (round((asked - self._began) * 1000), round((sent - asked) * 1000))
        line = "%s: %s, ai %d ms, im %d ms, %d parts"
        logger.info(line, claim.id, self._outcome, *took, self.reply.parts)

    def postpone(self, error: IMError) -> None:
        """Send the answer later, or give it up if Tencent will never take it."""
        claim, now, progress = self.job.claim, time.time(), self.progress
        since = max(progress.setdefault("failing_since", now), claim.accepted)
        timing, about_message = self.outbox.timing, error.about_message
        patience = timing.patience_with_message if about_message else timing.patience
        if not error.retry or now - since > patience:
            return self.give_up(str(error))
        delay = min(timing.longest_retry, max(timing.first_delay, now - since))
        logger.warning("%s; trying again in %.0f s: %s", claim.id, delay, error)
        if error.may_have_arrived and progress.get("at") is not None:
            progress.setdefault("unsure", {}).setdefault(str(progress["at"]), now)
        self._save_progress()
        outbox = self.outbox
        outbox.workers.when_store_works(outbox.store.release, claim, delay)

    def settle(self) -> None:
        """Decide about a call whose result is unknown, once Tencent may have forgotten
        it: it counts as sent, unless Tencent's history shows that it did not arrive."""
        unsure, part = self.progress.get("unsure", {}), str(self.progress.get("at"))
        timing, group = self.outbox.timing, self.message.group
        known = timing.duplicate_window_group if group else timing.duplicate_window
        age = time.time() - unsure.get(part, time.time())
        if part not in unsure or 0 <= age <= known:  # the clock may be set back
            return
        seq = self.job.claim.seq
        absent = self.outbox.is_absent(self.message, seq, int(part) + 1)
        del unsure[part]
        what = "did not arrive" if absent else "counts as sent, unconfirmed"
        logger.warning("%s %s", self.job.claim.id, what)
        if not absent:
            self.reply.assume_sent()

    def give_up(self, reason: str) -> None:
        """Tell the user that no answer comes, and leave the message to the operator."""
        outbox, claim = self.outbox, self.job.claim
        try:
            if self.message.kind not in ("said", "missed"):  # else nobody waits for it
                self.reply.give_up(outbox.texts["undeliverable"])
        except IMError as error:
            logger.warning("%s: the user is not told: %s", claim.id, error)
        outbox.workers.when_store_works(outbox.store.fail, claim, reason)
