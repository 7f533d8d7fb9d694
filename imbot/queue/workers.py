"""A pool of threads that work on what waits in a store.

    workers = Workers(store, handle, threads=64, retention=7 * 86400)
    workers.start()
    workers.add(id, conversation, data)     # as store.add, and wakes a thread
    workers.close(drain=20)

`handle` gets each message as an Job and ends its claim by a verb of the store; if
it raises, the message is given back. One more thread, the maintenance loop, prolongs
the claims in flight, finds what other processes left behind, and deletes what is old.
Nothing here knows of chats, AI or Tencent.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from ..timing import NORMAL, Timing
from .sql import Added, Data
from .store import Claim, Store, StoreError

PRUNE_EVERY = 3600.0  # seconds

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process has taken the message over."""


def do_nothing() -> None:
    """Be the default of what a handler may set."""


@dataclass(eq=False)
class Job:
    """A claim in the hands of a thread of this process."""

    claim: Claim
    lost: bool = False  # it is left to another process
    cancel: Callable[[], None] = do_nothing  # the handler's means to end the work soon
    tick: Callable[[], None] = (
        do_nothing  # is called every `poll` seconds; may not block
    )


class Workers:
    """The threads, and the claims they have in flight."""

    def __init__(
        self,
        store: Store,
        handle: Callable[[Job], None],
        threads: int,
        retention: float,
        timing: Timing = NORMAL,
    ) -> None:
        self.timing = timing
        self.store, self.handle = store, handle
        self.threads, self.retention = threads, retention  # a number, seconds
        self.backlog = 0  # messages that wait in the store, as last seen
        self.draining = False  # claim no more
        self.kept: Sequence[str] = ()  # names of kept values that each claim brings
        self.beat: Callable[[], None] = do_nothing  # is called with each heartbeat
        self._wake_ups: SimpleQueue[None] = SimpleQueue()  # idle threads wait for it
        self._in_flight: dict[int, Job] = {}  # by seq
        self._ended = threading.Condition()  # one is not in flight now; guards them
        self._store_down = False
        self._unfinished: deque[Callable[[], Any]] = deque()  # see when_store_works
        self._beat = (0.0, 0.0)  # the clocks at the last heartbeat
        self._prune_at = 0.0  # time.monotonic()
        self._claim_from = 0.0  # time.monotonic() before which nothing is claimed
        self._hurries = 0  # calls of hurry() since the last heartbeat
        self._loop_wakes, self._closed = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin to work: first on what an earlier process left behind."""
        self.in_background(self._maintain)
        with suppress(RuntimeError):  # the system has no more: fewer will do
            for _ in range(self.threads):
                self.in_background(self._run)

    def add(self, id: str, conversation: str, data: Data, **more: Any) -> Added:
        """Add a message to the store, and wake a thread for it."""
        added = self.store.add(id, conversation, data, **more)
        if added == Added.NEW:
            self.backlog += 1
            self.wake()
        return added

    def wake(self, count: int = 1) -> None:
        """Let threads look for work that was added."""
        for _ in range(min(count, self.threads - self._wake_ups.qsize())):
            self._wake_ups.put(None)

    def hold(self, seconds: float) -> None:
        """Claim nothing for some seconds."""
        self._claim_from = max(self._claim_from, time.monotonic() + seconds)

    def hurry(self) -> None:
        """Claim nothing until the next heartbeat, and let that come at once."""
        self._hurries += 1
        self._loop_wakes.set()

    def cancel(self, conversation: str) -> None:
        """End the work on a conversation soon, in whichever process it is."""
        for work in self._flying():
            if work.claim.conversation == conversation:
                work.cancel()
        self.when_store_works(self.store.cancel, conversation)

    def when_store_works(self, verb: Callable[..., Any], *values: Any) -> None:
        """Do a step at the store: if it does not work now, as soon as it does."""
        try:
            verb(*values)
        except StoreError as error:
            self._note_down(error)
            self._unfinished.append(partial(verb, *values))

    @staticmethod
    def in_background(act: Callable[..., None], *values: Any) -> None:
        """Run a function in a thread of its own."""
        threading.Thread(target=act, args=values, daemon=True).start()

    def _run(self) -> None:
        """Be a thread of the pool."""
        while not self.draining:
            self._wake_ups.get()
            while claim := self._claim():
                self._work(claim)

    def _claim(self) -> Claim | None:
        if self.draining or self._store_down or not self._may_claim():
            return None
        try:
            claim = self.store.claim(self.kept)
        except StoreError as error:
            self._note_down(error)
            return None
        with self._ended:
            ours = claim and self._in_flight.get(claim.seq)
        if claim and ours:  # its lease ran out, but we still work on it
            ours.claim = claim
            return None
        return claim

    def _may_claim(self) -> bool:
        """Return whether all processes had the time to prolong their claims."""
        return (
            not self._hurries
            and self._since_heartbeat() < self.timing.pause
            and time.monotonic() >= self._claim_from
        )

    def _since_heartbeat(self) -> float:
        """Return the seconds since the last heartbeat, by the clock that says more: one
        jumps when it is set, the other stands still while the machine sleeps."""
        return max(now - then for now, then in zip(_clocks(), self._beat, strict=True))

    def _work(self, claim: Claim) -> None:
        """Have one message handled, whatever happens."""
        work = Job(claim)
        with self._ended:
            self._in_flight[claim.seq] = work
        try:
            self.handle(work)
        except LeaseLost:
            logger.info("%s is left to another process", claim.id)
            self._release(work, 0.0)  # changes nothing, unless we claimed it again
        except StoreError as error:  # not the message's fault
            self._note_down(error)
            self._release(work, 1.0)
        except Exception as error:
            log_error(claim.id, error)
            self._release(work, 1.0, failed=True)
        finally:
            with self._ended:
                del self._in_flight[claim.seq]
                self._ended.notify_all()

    def _release(self, work: Job, delay: float, failed: bool = False) -> None:
        self.when_store_works(self.store.release, work.claim, delay, failed)

    def _note_down(self, error: StoreError) -> None:
        if not self._store_down:
            logger.error("%s", error)
        self._store_down = True

    def _flying(self) -> list[Job]:
        with self._ended:
            return list(self._in_flight.values())

    def _maintain(self) -> None:
        """Be the maintenance loop."""
        while not self._closed.is_set():
            try:
                self._look_after()
            except StoreError as error:
                self._note_down(error)
            except Exception as error:
                log_error("the maintenance loop", error)
            poll = self.timing.poll
            self._loop_wakes.wait(poll / 5 if self._hurries else poll)
            self._loop_wakes.clear()

    def _look_after(self) -> None:
        is_due = self._since_heartbeat() > self.timing.heartbeat - self.timing.poll / 2
        hurries = self._hurries
        if is_due or hurries or self._store_down or not self._may_claim():
            self._heartbeat()
        if hurries == self._hurries:  # nobody hurried meanwhile
            self._hurries = 0
        while self._unfinished:
            self._unfinished[0]()
            self._unfinished.popleft()
        self.backlog, _, due = self.store.load()
        if self._store_down:
            logger.warning("the store works again")
        self._store_down = False
        self.wake(due)
        if time.monotonic() >= self._prune_at:
            self._prune_at = time.monotonic() + PRUNE_EVERY
            self.in_background(self._prune)
        for work in self._flying():
            if not work.lost:
                work.tick()

    def _prune(self) -> None:
        with suppress(StoreError):  # it is done again in an hour
            self.store.prune(self.retention)

    def _heartbeat(self) -> None:
        paused, works = self._since_heartbeat() > self.timing.pause, self._flying()
        lost, cancelled = self.store.heartbeat([work.claim for work in works])
        if paused and any(self._beat):
            if not self._store_down:
                logger.warning("this process was paused, or the clock was set")
            self.hold(self.timing.regain)
        for work in works:
            work.lost = work.lost or work.claim in lost
            if work.claim in lost or work.claim in cancelled:
                work.cancel()
        self.beat()  # before anything is claimed after a start, a pause, an outage
        self._beat = _clocks()

    def close(self, drain: float) -> None:
        """Claim no more, finish what `drain` seconds allow, release the rest."""
        if self._closed.is_set():
            return
        with self._ended:
            self.draining = True
            self._ended.wait_for(lambda: not self._in_flight, drain)
            left = list(self._in_flight.values())
        for work in left:
            work.lost = True
            with suppress(StoreError):
                self.store.release(work.claim, 0.0)
            work.cancel()
        self._closed.set()
        self._loop_wakes.set()
        for _ in range(self.threads):
            self._wake_ups.put(None)  # its thread ends
        logger.info("stopped; %d messages were left to others", len(left))


def log_error(what: str, error: Exception, text: str = "") -> None:
    """Log where an error came from, and `text`.

    Its own text is not logged unless the caller gives it: it may quote a message.
    """
    place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    name = ": ".join(filter(None, (type(error).__name__, text)))
    logger.error("%s failed with %s. Traceback:\n%s", what, name, place)


def _clocks() -> tuple[float, float]:
    return time.time(), time.monotonic()
