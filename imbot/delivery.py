"""The way of an answer to its user: made, kept, shown, sent again, or given up.

    answer = delivery.kept or delivery.run(compose)
    delivery.keep(answer)        # on disk: a restart sends it, and does not pay twice
    delivery.show(answer)        # raises IMError
    delivery.finish(answer)      # or delivery.postpone(error)

Every try sends the same numbers, so Tencent drops a duplicate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from .ai import ProviderError
from .chat import Answer, Chat, Said
from .queue import Added, Job, LeaseLost, Store, StoreError, Workers, log_error
from .redact import redact
from .replies import PlainReply, Progress
from .settings import Settings
from .tencent import Client, IMError, Message
from .timing import Timing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outbox:
    """What all deliveries share."""

    settings: Settings
    store: Store
    workers: Workers
    im: Client
    texts: dict[str, str]
    timing: Timing

    def tell(self, message: Message, conversation: str, why: str) -> bool:
        """Tell the chat, from time to time, why its messages are refused.

        Return whether it is told now.
        """
        rated, timing = why == Added.RATE_LIMITED, self.timing
        every = timing.minute if rated else timing.notice_every
        place = (message.robot, message.group or message.user)
        id = "\t".join((why, *place, f"{time.time() // every:.0f}"))
        return self.say(message, conversation, id, self.texts[why]) == Added.NEW

    def say(
        self, message: Message, conversation: str, id: str, text: str, **limits: Any
    ) -> Added:
        """Send a sentence beside the answers of a conversation, once for each id."""
        about = replace(message, text="", quote="", images=())  # nobody needs them
        beside = f"{conversation}\tnotice"
        limits["room"] = self.settings.max_waiting
        return self.workers.add(id, beside, about.data(), reply=text, **limits)


class Delivery:
    """One answer on its way."""

    def __init__(
        self, outbox: Outbox, job: Job, chat: Chat, mode: type[PlainReply]
    ) -> None:
        self.outbox, self.job, self.chat = outbox, job, chat
        self.progress = Progress.load(job.claim.progress)
        self.reply = mode(
            outbox.im,
            chat.message,
            outbox.texts,
            self.progress,
            self._save_progress,
            self._is_stopped,
            outbox.settings.max_parts,
        )
        chat.update_interval = self.reply.update_interval
        # Made by a process that crashed, or could not send it.
        kept = job.claim.reply
        self.kept = None if kept is None else Answer.load(kept)
        self._began, self._asked = time.monotonic(), 0.0
        job.cancel, job.tick = chat.scope.cancel, self._keep_alive

    def _is_stopped(self) -> bool:
        """Return whether the user stopped the answer; a shutdown goes on elsewhere."""
        return self.chat.scope.cancelled.is_set() and not self.job.lost

    def _keep_alive(self) -> None:
        if time.monotonic() - self.reply.last_sent > self.reply.keep_alive_after:
            self.outbox.workers.in_background(self._add_nothing)

    def _add_nothing(self) -> None:
        with suppress(LeaseLost):  # noticed elsewhere
            self.reply.keep_alive()

    def run(self, compose: Callable[[Chat], Said]) -> Answer:
        """Return what `compose` says; while that grows, show it."""
        try:
            said = compose(self.chat)
            if isinstance(said, str):
                return Answer(said)
            if isinstance(said, dict):
                return Answer(element=said)
            return self._grow(said)
        except (StoreError, LeaseLost, IMError):
            raise
        except Exception as error:  # in the code of a fork, or in ours
            log_error(self.job.claim.id, error, redact(str(error), self.chat.said()))
            return Answer(note=self.outbox.texts["broken"], outcome="broken")

    def _grow(self, texts: Iterator[str]) -> Answer:
        """Show a text that grows, until it is whole, or breaks off."""
        scope, text = self.chat.scope, ""
        self.reply.open()  # shows that an answer is coming
        try:
            for text in texts:
                if not scope.ended:
                    self._update(text)
        except ProviderError as error:
            if self.job.lost:
                raise LeaseLost from None
            error.__traceback__ = None  # it would keep the answer, see Provider._quiet
            return self._explain(error, text)
        remember = not self.chat.memory and self.chat.turns > 0
        note = self.outbox.texts["unread"] if "pictures" in scope.left_out else ""
        return Answer(text, note, remember=remember, outcome="answered")

    def _update(self, text: str) -> None:
        """Show the text so far. What that takes is not counted as the AI's time."""
        began = time.monotonic()
        self.reply.update(text)
        self.chat.scope.deadline += time.monotonic() - began

    def _explain(self, error: ProviderError, text: str) -> Answer:
        """Turn a failure of the AI into what the user sees."""
        texts, kind = self.outbox.texts, error.kind
        said = texts.get(kind, texts["busy"])
        if kind in ("stopped", "length"):  # not failures: keep the text so far
            note = said if text else ""
            return Answer(text or said, note, remember=bool(text), outcome=kind)
        why = redact(str(error), self.chat.said())
        logger.warning("no answer for %s: %s", self.job.claim.id, why)
        note = texts["cut"].format(said) if text else said
        return Answer(text, note, outcome=kind)

    def keep(self, answer: Answer) -> None:
        """Store an answer before it is sent.

        If the store is down, wait rather than lose an answer the AI has billed.
        """
        end = time.monotonic() + self.outbox.timing.save_patience
        while not self.kept:
            try:
                self._save(answer)
                self.kept = answer
            except StoreError:
                if time.monotonic() > end:
                    raise
                time.sleep(self.outbox.timing.poll)

    def _save_progress(self) -> bool:
        try:
            self._save(None)
        except StoreError:
            return False  # it stays in memory: not worth waiting for
        return True

    def _save(self, answer: Answer | None) -> None:
        given = answer and answer.data(), self.progress.data()
        remember = bool(answer and answer.remember)
        if not self.outbox.store.save_reply(self.job.claim, *given, remember):
            raise LeaseLost

    def show(self, answer: Answer) -> None:
        """Send the answer. Raises IMError."""
        self._asked = time.monotonic()
        if answer.element:
            self.reply.close_with(answer.element)
        elif answer.shown or self.reply.must_unlock:
            self.reply.close(answer.shown, failed=bool(answer.note and not answer.text))

    def finish(self, answer: Answer) -> None:
        """Mark the message as answered; if the store is down, as soon as it is back."""
        outbox, claim, sent = self.outbox, self.job.claim, time.monotonic()
        outbox.workers.when_store_works(outbox.store.finish, claim)
        asked = self._asked or sent
        took = (round((asked - self._began) * 1000), round((sent - asked) * 1000))
        line = "%s: %s, ai %d ms, im %d ms, %d parts"
        logger.info(line, claim.id, answer.outcome, *took, self.reply.parts)

    def postpone(self, error: IMError) -> None:
        """Send the answer later, or give it up if Tencent will never take it."""
        if not self._is_postponed(error):
            self.give_up(str(error))

    def _is_postponed(self, error: IMError) -> bool:
        """Release the claim until the next try; return False if there is none."""
        claim, now, progress = self.job.claim, time.time(), self.progress
        progress.failing_since = progress.failing_since or now
        failing = now - max(progress.failing_since, claim.accepted)
        timing, about_message = self.outbox.timing, error.about_message
        patience = timing.patience_with_message if about_message else timing.patience
        if not error.retry or failing > patience:
            return False
        delay = min(timing.longest_retry, max(timing.first_delay, failing))
        logger.warning("%s; trying again in %.0f s: %s", claim.id, delay, error)
        self._save_progress()
        workers = self.outbox.workers
        workers.when_store_works(self.outbox.store.release, claim, delay)
        return True

    def settle(self) -> None:
        """Treat an unconfirmed part as sent once Tencent no longer drops duplicates."""
        if self.progress.unconfirmed and time.time() > self.reply.known_until():
            logger.warning("%s counts as sent, unconfirmed", self.job.claim.id)
            self.reply.assume_sent()

    def give_up(self, reason: str) -> None:
        """Tell the user that no answer comes, and leave the message to the operator.

        If Tencent is busy just then, the user is told later.
        """
        outbox, claim, progress = self.outbox, self.job.claim, self.progress
        if not progress.gives_up:
            progress.gives_up = reason
            progress.failing_since = progress.unconfirmed = None
        told = progress.unconfirmed and time.time() > self.reply.known_until()
        try:
            # Nobody waits for an answer to what was "said".
            if self.chat.message.kind != "said" and not told:
                self.reply.give_up(outbox.texts["undeliverable"])
        except IMError as error:
            if self._is_postponed(error):
                return
            logger.warning("%s: the user is not told: %s", claim.id, error)
        reason, progress.gives_up, progress.failing_since = progress.gives_up, "", None
        progress.confirm(progress.sent)
        self._save_progress()  # an operator may put the message back
        outbox.workers.when_store_works(outbox.store.fail, claim, reason)
