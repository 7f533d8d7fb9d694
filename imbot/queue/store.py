"""Where accepted messages wait, and what is remembered of them.

The store is the queue: a process holds nothing that is not also here, so after a crash
another process carries on. The unit of work is the conversation. A row of
`conversation` exists while one of its messages is open; to claim is to take the
conversation that has been due the longest and to work on its oldest open message. So
each chat is answered in order, by one worker at a time; if several users share it, they
take turns.

`Store` defines the operations and what they promise. Their SQL is in sql.py.
SQLiteStore (sqlite.py) serves the processes of one machine, PostgresStore (postgres.py)
several machines.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..timing import NORMAL, Timing
from .sql import (
    NO_LIMIT,
    ROW_VERSION,
    SQL,
    Added,
    Data,
    Execute,
    Rows,
    Step,
    add_step,
    check_step,
    claim_step,
    end_step,
    retry_step,
    update_step,
)

OPEN = "open", "begun"  # states of what is not answered yet
MAX_ATTEMPTS = 3  # claims that may expire before the message is marked failed
RECENT = 20_000  # messages among which one that was recalled is sought
CHECKED = "x" * 8192  # what `check` writes
UNREADABLE = "it cannot be read"
DURABLE = (add_step, check_step)  # on disk before they return

logger = logging.getLogger(__name__)


class StoreError(Exception):
    """The store cannot be read or written now; a later retry may succeed."""


class StoreBusy(StoreError):
    """The store works, but this step did not get its turn in time."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A message in the hands of one worker."""

    seq: int  # grows with every message the store accepts
    id: str
    conversation: str
    data: Data  # what was given to add
    token: str  # names this claim; a worker that lost it changes nothing
    reply: Any  # what was given to add or save_reply, None before
    progress: Data  # what was given to save_reply, perhaps by a process now dead
    accepted: float  # Unix seconds
    exhausted: bool  # MAX_ATTEMPTS claims expired: this one is the last
    kept: dict[str, Data]  # the kept values that claim was asked for, by name


class Store:
    """The operations and their promises. Each may raise StoreError.

    A callback waits for `add`, so workers let it go first: while one is at the store,
    they write one at a time. The price: with callbacks all the time, their commits
    are not shared, and one may wait `turn` seconds.
    """

    dialect: ClassVar[dict[str, str]]  # how the engine spells the {words} of the SQL
    batch = 500  # messages changed in one transaction
    row_version = ROW_VERSION

    def __init__(self, timing: Timing = NORMAL, app: int = 0) -> None:
        """Prepare the SQL. `app` owns the database; 0 asks for nobody's."""
        self.timing, self.app = timing, app
        self._sql = {name: sql.format(**self.dialect) for name, sql in SQL.items()}
        self._callbacks: deque[None] = deque()  # at the store now; counted without lock
        self._turn = threading.Lock()
        self._outage = ""  # why the last callback could not be stored
        # Held by the one callback that tries during an outage.
        self._retry = threading.Lock()
        self._warned: set[str] = set()  # said once by this process

    def _write(self, step: Step, values: Data) -> Any:
        """Run one statement, or a step of several in one transaction.

        DURABLE steps are on disk before this returns. Others may be lost in a power
        cut, unless the database server can crash while this process lives on.
        """
        raise NotImplementedError

    def _read(self, name: str, values: Data) -> Rows:
        """Return the rows of a SELECT."""
        return self._write(name, values)  # type: ignore[no-any-return]

    def durability(self) -> str:
        """Describe when a message is safe; raise StoreError if it never is."""
        raise NotImplementedError

    def close(self) -> None:
        """Close files and connections."""
        raise NotImplementedError

    def _check_owner(self, execute: Execute) -> None:
        """Note whose the database is at its first start, or raise StoreError if it is
        another app's."""
        if self.app:
            values = {"app": str(self.app)}
            [(owner,)] = execute("owner", values) or execute("own", values)
            check_owner(int(owner), self.app)

    def _run(self, step: Step, /, **values: Any) -> Any:
        """Run a step for a callback, for maintenance or for an operator."""
        return self._write(step, _storable(values))

    def _run_in_turn(self, step: Step, /, **values: Any) -> Any:
        """Run a step for a worker, and let callbacks go first."""
        turn = bool(self._callbacks) and self._turn.acquire(timeout=self.timing.turn)
        try:
            return self._run(step, **values)
        finally:
            if turn:
                self._turn.release()

    def _select(self, statement: str, /, **values: Any) -> Rows:
        return self._read(statement, _storable(values))

    def add(
        self,
        id: str,
        conversation: str,
        data: Data,
        asker: str = "",
        room: int = NO_LIMIT,
        share: int | None = None,
        rate: int = NO_LIMIT,
        reply: Any = None,
        sent: float = 0.0,
        remember: bool = False,
    ) -> Added:
        """Keep a message on disk, once however often it is delivered.

        It is refused if `room` messages of the conversation are open, or `share` of
        `asker`, or if `asker`, unless empty, sent `rate` in the minute before. With a
        `reply` there is nothing to ask, and it is in the history only if `remember`
        says so. Messages of a conversation are ordered by when they were `sent`, Unix
        seconds, then by when they were added.
        """
        values: Data = {"id": id, "conversation": conversation, "asker": asker}
        values |= {"data": json.dumps(data), "reply": _dump(reply), "sent": sent}
        values |= {
            "room": room,
            "share": share,
            "rate": rate,
            "minute": self.timing.minute,
        }
        values |= {"remember": int(remember or reply is None)}
        values |= {"version": self.row_version}
        self._callbacks.append(None)
        try:
            return Added(self._add(values))
        finally:
            self._callbacks.pop()

    def _add(self, values: Data) -> Any:
        """Run add_step. During an outage one callback at a time waits for the store;
        the others are refused at once, or they would fill the server's threads."""
        outage = self._outage
        if outage and not self._retry.acquire(timeout=self.timing.recheck):
            raise StoreError(outage)
        try:
            added = self._run(add_step, **values)
            self._outage = ""
            return added
        except StoreBusy:
            raise
        except StoreError as error:
            self._outage = str(error)
            raise
        finally:
            if outage:
                self._retry.release()

    def claim(self, kept: Sequence[str] = (), full: Sequence[str] = ()) -> Claim | None:
        """Take the conversation that has been due longest, among those that were not
        released into a lane that is `full`, and the message whose turn it is there.

        That is the oldest; but if several askers share the conversation they take
        turns, as long as nothing older is added. A claim lasts `lease` seconds. A
        message whose claims expired MAX_ATTEMPTS times is claimed once more, as
        `exhausted`, and then failed. The claim brings the values kept under the names
        `kept`, where {conversation} stands for its conversation.
        """
        values: Data = {"lease": self.timing.lease, "version": self.row_version}
        values |= {"kept": [storable(name) for name in kept]}
        values |= {"full": json.dumps([*full])}
        while True:
            token = os.urandom(16).hex()
            found = self._run_in_turn(claim_step, **values, token=token)
            if found is None:
                return None
            conversation, attempts, rows = found
            if not rows:
                self._warn_once("messages wait for a newer version of this program")
            elif claim := self._read_claim(conversation, attempts, token, rows[0]):
                return claim

    def _read_claim(
        self, conversation: str, attempts: int, token: str, row: tuple[Any, ...]
    ) -> Claim | None:
        """Return a claim, or fail its message if nobody can work on it."""
        seq, id, *texts, accepted, found = row
        data, reply, progress = map(_load, texts)
        kept = {name: _load(text) for name, text in (_load(found) or {}).items()}
        given = (data, token, reply, progress or {}, accepted, attempts > MAX_ATTEMPTS)
        claim = Claim(seq, id, conversation, *given, kept)
        if data is None:
            self._end(claim, "fail", UNREADABLE)
            self._warn_once("messages that cannot be read are failed")
        elif attempts > MAX_ATTEMPTS + 1:
            self.fail(claim, "its work was cut short too often")
        else:
            return claim
        return None

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", what)

    def known(self, ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Return the state of each known id: `open`, `begun`, `done`, `gone` or
        `failed`, and its seq, which grows with every message that is added.

        What is begun is open, too, but a part of its answer may have been shown.
        """
        given = {storable(id): id for id in ids}
        rows = self._select("known", ids=json.dumps([*given]))
        return {given[id]: (state, seq) for id, state, seq in rows}

    def is_claimed(self, conversation: str) -> bool:
        """Return whether a worker has a conversation now, or one whose name goes on
        after a tab."""
        return bool(self._select("is_claimed", conversation=conversation, tab="\t"))

    def sent(self, seq: int) -> float:
        """Return when the message of a seq was sent, 0 if no user sent it."""
        rows = self._select("sent", seq=seq)
        return float(rows[0][0]) if rows else 0.0

    def state(self, id: str) -> str | None:
        """Return the state of an id as `known` does, None if it is not known."""
        return self.known([id]).get(id, (None, None))[0]

    def heartbeat(self, claims: Collection[Claim]) -> tuple[list[Claim], list[Claim]]:
        """Make claims last `lease` seconds from now.

        Return those that expired, and those whose conversation was cancelled.
        """
        lease, longest = self.timing.lease, self.timing.longest_delay
        names = json.dumps([claim.conversation for claim in claims])
        tokens = json.dumps([claim.token for claim in claims])
        self._run("repair", lease=lease, longest=longest)
        values = {"lease": lease, "names": names, "tokens": tokens}
        held = dict(self._run("heartbeat", **values)) if claims else {}
        lost = [claim for claim in claims if claim.token not in held]
        return lost, [claim for claim in claims if held.get(claim.token)]

    def save_reply(
        self, claim: Claim, reply: Any, progress: Data, remember: bool = True
    ) -> bool:
        """Keep the reply before it is sent, and the progress of sending it.

        A reply that is None stays as it is. Without `remember` neither text nor reply
        outlives finish. Return False if the claim was lost.
        """
        values = _held(claim) | {"progress": _dump(progress)}
        if reply is None:
            return bool(self._run_in_turn("save_progress", **values))
        values |= {"reply": _dump(reply), "remember": int(remember)}
        return bool(self._run_in_turn("save_reply", **values))

    def finish(self, claim: Claim) -> bool:
        """End a message as answered and free its conversation.

        Return False if the claim was lost.
        """
        return self._end(claim, "finish")

    def fail(self, claim: Claim, reason: str) -> bool:
        """End a message as failed, for an operator to look at and perhaps to retry.

        Return False if the claim was lost.
        """
        ended = self._end(claim, "fail", reason)
        if ended:
            logger.error("message %s failed: %s", claim.id, storable(reason))
        return ended

    def _end(self, claim: Claim, how: str, reason: str = "") -> bool:
        values = _held(claim) | {"end": how, "reason": reason}
        return bool(self._run_in_turn(end_step, **values))

    def release(
        self, claim: Claim, delay: float, attempted: bool = False, lane: str = ""
    ) -> None:
        """Give a message back, to be claimed again in `delay` seconds, unless its
        `lane` is full then.

        `attempted` counts this claim against MAX_ATTEMPTS, like one that expired.
        """
        values = _held(claim) | {"delay": delay, "uncounted": 1 - attempted}
        values |= {"lane": lane}
        self._run_in_turn("release", **values)

    def cancel(self, conversation: str) -> bool:
        """Cancel the work on a conversation, also if it starts later.

        Return False if there is none.
        """
        return bool(self._run("cancel", conversation=conversation))

    def history(self, conversation: str, limit: int) -> list[tuple[Data, Any]]:
        """Return the last `limit` remembered (data, reply) pairs, oldest first."""
        values: Data = {"conversation": conversation, "limit": limit}
        rows = self._select("history", **values, version=self.row_version)
        turns = [(_load(data), _load(reply)) for data, reply in reversed(rows)]
        return [(data, reply) for data, reply in turns if data and reply]

    def forget(self, conversation: str) -> None:
        """Delete every text of the answered and the failed messages of a conversation,
        and what was put under its name. The ids stay known."""
        values = {"conversation": conversation, "batch": self.batch}
        while len(self._run_in_turn("forget", **values)) == self.batch:
            pass
        self._run_in_turn("drop_kept", name=conversation)

    def recall(self, id: str, data: Data) -> None:
        """Forget a message; if it is open, its worker gets `data` in its place.

        An `id` with % is a pattern of LIKE, sought among the last RECENT messages.
        """
        step = "recall_like" if "%" in id else "recall"
        self._run(step, id=id, data=json.dumps(data), recent=RECENT)

    def put(self, name: str, value: Data) -> None:
        """Keep a value under a name, instead of the one before."""
        self._run_in_turn("put", name=name, value=json.dumps(value))

    def get(self, name: str) -> Data | None:
        """Return what was put under a name."""
        rows = self._select("get", name=name)
        return _load(rows[0][0]) if rows else None

    def update(self, name: str, change: Callable[[Data], Data]) -> Data:
        """Replace the value under a name by what `change` makes of it, {} if there is
        none; return the new value. No other process changes it meanwhile.

        `change` runs inside the transaction, perhaps in another thread, and again if a
        connection breaks: it may only compute, and not wait or use the store.
        """
        return self.update_at(name, lambda old, newest: change(old))

    def update_at(self, name: str, change: Callable[[Data, int], Data]) -> Data:
        """Do the same; `change` gets the seq of the newest message at that point, too.

        Who claims a later message finds the new value; on PostgreSQL not if that is
        added and claimed before this transaction commits.
        """
        result = self._run_in_turn(update_step, name=name, change=change)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    def check(self) -> None:
        """Write something and delete it. Raises StoreError if messages cannot be kept:
        the disk is full, the database read-only, damaged or another app's."""
        self._run(check_step, name="check", value=CHECKED)

    def prune(self, age: float) -> int:
        """Delete what ended or was put more than `age` seconds ago.

        Return how many messages.
        """
        total, after = 0, 0
        self._run("prune_kept", age=age)
        while True:
            [(last,)] = self._select("batch", after=after, batch=self.batch)
            if last is None:
                return total
            total += len(self._run("prune", age=age, after=after, last=last))
            after = last
            time.sleep(self.timing.prune_pause)

    def load(self, full: Sequence[str] = ()) -> tuple[int, int, int]:
        """Return how many messages wait, how many are claimed, and how many could be
        claimed now, see claim."""
        [numbers] = self._select("load", full=json.dumps([*full]))
        return numbers

    def stats(self) -> dict[str, float]:
        """Return the numbers of `waiting`, `in_work` and `failed` messages, and
        `oldest`, the age in seconds of the oldest that is open."""
        waiting, in_work, _ = self.load()
        [(failed, oldest)] = self._select("stats")
        numbers = {"waiting": waiting, "in_work": in_work, "failed": failed}
        return {**numbers, "oldest": round(max(0.0, oldest), 3)}

    def failed(self) -> list[tuple[int, str, str, float]]:
        """Return (seq, id, reason, seconds since) of failed messages, oldest first."""
        rows = self._select("failed")
        return [(seq, id, reason, age) for seq, id, reason, age, _ in rows]

    def retry(self, seqs: Collection[int] | None = None) -> int:
        """Open failed messages again, all or these, in their turn; return how many."""
        count = 0
        for seq, *_, conversation in self._select("failed"):
            if seqs is None or seq in seqs:
                count += self._run(retry_step, seq=seq, conversation=conversation)
        return count

    def owner(self) -> int | None:
        """Return the app whose database it is, None if that was never noted."""
        rows = self._select("owner")
        return int(rows[0][0]) if rows else None


def check_owner(owner: int | None, app: int) -> None:
    """Raise StoreError if a database belongs to another app."""
    if owner not in (None, app):
        raise StoreError(
            f"it belongs to the app with IM_SDKAPPID {owner}, and this server's is "
            f"{app}: give each app a database of its own"
        )


def storable(text: str) -> str:
    """Return a text without what a database cannot hold: NUL, half a surrogate pair."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def _storable(values: Data) -> Data:
    return {n: storable(v) if isinstance(v, str) else v for n, v in values.items()}


def _held(claim: Claim) -> Data:
    """Return the values that name a claim."""
    key = {"conversation": claim.conversation, "token": claim.token}
    return {"seq": claim.seq, **key}


def _dump(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _load(text: str | None) -> Any:
    """Return what a text of JSON holds, None if there is none or it is broken."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None
