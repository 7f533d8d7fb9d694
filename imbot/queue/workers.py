"""A pool of threads that work on what waits in a store.

    workers = Workers(store, handle, threads=64, retention=7 * 86400)
    workers.start()
    workers.add(id, conversation, data)     # as store.add, and wakes a thread
    workers.close(drain=20)

`handle` gets each message as a Job and ends its claim with finish, fail or release; if
it raises, the message is released. Messages that wait for the same slow thing are in
one lane, which has at most `share` of the threads, so that others do not wait for it,
too. One more thread, the maintenance loop, sends the heartbeats, wakes threads for what
other processes left behind, and prunes what is old. Nothing here knows of chats, AI or
Tencent.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from ..timing import NORMAL, Timing
from .sql import Added, Data
from .store import Claim, Store, StoreBusy, StoreError

MAX_TRIES = 5  # of a deferred operation that fails although the store works

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process has taken the message over."""


@dataclass(eq=False)
class Job:
    """A claim in the hands of a thread of this process."""

    claim: Claim
    lane: str = ""  # what it may wait for long, if anything
    lost: bool = False  # left to another process
    cancel: Callable[[], None] | None = None  # set by the handler: stop the work early
    tick: Callable[[], None] | None = None  # the same: called every `poll` seconds


@dataclass(eq=False)
class Deferred:
    """A store operation that failed and is retried."""

    run: Callable[[], Any]
    tries: int = 1


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
        self.share = threads  # of one lane, at most
        self.lane_of: Callable[[Claim], str] = lambda claim: ""
        self.kept: Sequence[str] = ()  # names of kept values that each claim brings
        self.beat: Callable[[], None] | None = None  # called with each heartbeat
        self._pool: list[threading.Thread] = []
        self._wake_ups: SimpleQueue[None] = SimpleQueue()  # idle threads wait for it
        self._in_flight: dict[int, Job] = {}  # by seq
        self._ended = threading.Condition()  # guards _in_flight; notified when one ends
        self._store_down = False
        self._deferred: deque[Deferred] = deque()  # see when_store_works
        self._beat = (0.0, 0.0)  # the clocks at the last heartbeat
        self._slow = False  # the store let the last heartbeat wait
        self._deferring = threading.Lock()  # held by the thread that retries them
        self._prune_at = self._warn_at = 0.0  # time.monotonic()
        self._claim_from = 0.0  # time.monotonic() before which nothing is claimed
        self._hurries = 0  # calls of hurry() since the last heartbeat
        self._loop_wakes, self._closed = threading.Event(), threading.Event()

    @property
    def jobs(self) -> list[Job]:
        """The claims in flight."""
        with self._ended:
            return list(self._in_flight.values())

    def start(self) -> None:
        """Start the threads. They begin with the messages a previous process left."""
        self.in_background(self._maintain)  # which fills the pool

    def _fill_pool(self) -> None:
        """Start the threads that are missing, e.g. in place of one that died."""
        self._pool = [thread for thread in self._pool if thread.is_alive()]
        with suppress(RuntimeError):  # thread limit reached: carry on with fewer
            while len(self._pool) < self.threads and not self.draining:
                self._pool.append(self.in_background(self._run))

    def add(self, id: str, conversation: str, data: Data, **more: Any) -> Added:
        """Add a message to the store, and wake a thread for it."""
        added = self.store.add(id, conversation, data, **more)
        if added == Added.NEW:
            self.backlog += 1
            self.wake()
        return added

    def wake(self, count: int = 1) -> None:
        """Wake idle threads, which then look for messages to claim."""
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
        """Cancel the work on a conversation, in whichever process it is."""
        for job in self.jobs:
            if job.claim.conversation == conversation and job.cancel:
                job.cancel()
        self.when_store_works(self.store.cancel, conversation)

    def when_store_works(self, operation: Callable[..., Any], *values: Any) -> None:
        """Run a store operation; if the store is down, queue it and retry when it is
        back."""
        run = partial(operation, *values)
        try:
            run()
        except StoreError as error:
            self._note(error)
            self._deferred.append(Deferred(run))

    @staticmethod
    def in_background(run: Callable[..., None], *values: Any) -> threading.Thread:
        """Run a function in a thread of its own."""
        thread = threading.Thread(target=run, args=values, daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        """Run in each pool thread: claim and handle messages until draining."""
        while not self.draining:
            self._wake_ups.get()
            while job := self._claim():
                self._work(job)

    def _claim(self) -> Job | None:
        try:
            while not (self.draining or self._store_down) and self._may_claim():
                claim = self.store.claim(self.kept, self._full_lanes())
                if not claim or self._renews(claim):
                    return None
                if claim.progress:  # a retry: perhaps this thread was woken for another
                    self.wake()
                job = Job(claim, self._lane(claim))
                if self._takes(job):
                    return job
        except StoreError as error:
            self._note(error)
        return None

    def _lane(self, claim: Claim) -> str:
        try:
            return self.lane_of(claim)
        except Exception:  # the handler fails, too, and that is counted
            return ""

    def _full_lanes(self) -> list[str]:
        """Return the lanes that have their share of the threads."""
        if len(self._in_flight) < self.share:
            return []
        lanes = Counter(job.lane for job in self.jobs)
        return [lane for lane in lanes if lane and lanes[lane] >= self.share]

    def _renews(self, claim: Claim) -> bool:
        """Return whether we still work on the message: only its lease expired."""
        with self._ended:
            if ours := self._in_flight.get(claim.seq):
                ours.claim = claim
        return bool(ours)

    def _takes(self, job: Job) -> bool:
        """Put a job in flight. If its lane is full, let others go first."""
        with self._ended:
            if not self.draining and job.lane not in self._full_lanes():
                self._in_flight[job.claim.seq] = job
                return True
        self._release(job, 0.0, lane=job.lane)
        return False

    def _may_claim(self) -> bool:
        """Return whether it is safe to claim: not just after a pause or a missed
        heartbeat."""
        return (
            not self._hurries
            and self._since_heartbeat() < self.timing.pause
            and time.monotonic() >= self._claim_from
        )

    def _since_heartbeat(self) -> float:
        """Return the seconds since the last heartbeat: the larger of wall-clock and
        monotonic time. The wall clock can be set, the monotonic clock stops during
        suspend."""
        return max(now - then for now, then in zip(_clocks(), self._beat, strict=True))

    def _work(self, job: Job) -> None:
        """Handle one message; release it if that fails, or if it may still be open."""
        claim, again = job.claim, self.timing.again
        try:
            self.handle(job)
        except LeaseLost:
            logger.info("%s is left to another process", claim.id)
        except StoreError as error:
            its_fault = self._is_its_fault(error)
            if its_fault:
                logger.error("%s failed: %s", claim.id, error)
            else:
                self._note(error)
            self._release(job, again, attempted=its_fault)
        except Exception as error:
            log_error(claim.id, error)
            self._release(job, again, attempted=True)
        finally:
            # This process claimed it again meanwhile: the handler perhaps ended the
            # older claim, in vain. A deferred operation may still end the new one.
            if job.claim is not claim and not self._deferred:
                self._release(job, 0.0)
            with self._ended:
                del self._in_flight[claim.seq]
                self._ended.notify_all()

    def _is_its_fault(self, error: StoreError) -> bool:
        """Return whether an operation fails although the store works.

        Then it is not tried for ever: the error may not pass.
        """
        if isinstance(error, StoreBusy):
            return False
        try:
            self.store.check()
        except StoreError:
            return False
        return True

    def _release(
        self, job: Job, delay: float, attempted: bool = False, lane: str = ""
    ) -> None:
        values = job.claim, delay, attempted, lane
        self.when_store_works(self.store.release, *values)

    def _note(self, error: StoreError) -> None:
        """Remember that the store is down, and log it once; busy is not down."""
        if isinstance(error, StoreBusy):
            if time.monotonic() >= self._warn_at:
                self._warn_at = time.monotonic() + self.timing.minute
                logger.warning("%s", error)
            return
        if not self._store_down:
            logger.error("%s", error)
        self._store_down = True

    def _maintain(self) -> None:
        """Run the maintenance loop until close()."""
        while not self._closed.is_set():
            try:
                self._look_after()
            except StoreError as error:
                self._note(error)
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
        if self._store_down:  # before the messages can be claimed again
            self._run_deferred()
        elif self._deferred:
            self.in_background(self._run_deferred)
        self.backlog, _, due = self.store.load(self._full_lanes())
        if self._store_down:
            logger.warning("the store works again")
        self._store_down = False
        self._fill_pool()
        self.wake(due)
        if time.monotonic() >= self._prune_at:
            self._prune_at = time.monotonic() + self.timing.prune_every
            self.in_background(self._prune)
        for job in self.jobs:
            if job.tick and not job.lost:
                job.tick()

    def _run_deferred(self) -> None:
        """Retry the deferred operations in their order, as far as the store works."""
        if not self._deferring.acquire(blocking=False):
            return
        try:
            for _ in range(len(self._deferred)):
                self._retry(self._deferred[0])
                self._deferred.popleft()
        except StoreError as error:
            self._note(error)
        finally:
            self._deferring.release()

    def _retry(self, operation: Deferred) -> None:
        """Run a deferred operation. If it fails although the store works, put it
        behind the others, and drop it after some tries."""
        try:
            operation.run()
        except StoreError as error:
            if not self._is_its_fault(error):
                raise
            operation.tries += 1
            if operation.tries < MAX_TRIES:
                self._deferred.append(operation)
            else:
                logger.error("given up after %d tries: %s", operation.tries, error)

    def _prune(self) -> None:
        with suppress(StoreError):  # retried in an hour
            self.store.prune(self.retention)

    def _heartbeat(self) -> None:
        paused, jobs = self._since_heartbeat() > self.timing.pause, self.jobs
        began, was_slow = time.monotonic(), self._slow
        lost, cancelled = self.store.heartbeat([job.claim for job in jobs])
        self._slow = time.monotonic() - began > self.timing.locked / 3
        if paused and any(self._beat) and not self._store_down:
            logger.warning("this process was paused, or the clock was set")
        # A store that is always slow must not hold up everything.
        away = self._store_down or (self._slow and not was_slow)
        if any(self._beat) and (paused or away):
            self.hold(self.timing.regain)  # others may have refused callbacks
        for job in jobs:
            job.lost = job.lost or job.claim in lost
            if job.cancel and (job.claim in lost or job.claim in cancelled):
                job.cancel()
        if self.beat:
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
        for job in left:
            job.lost = True
            with suppress(StoreError):
                self.store.release(job.claim, 0.0)
            if job.cancel:
                job.cancel()
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
