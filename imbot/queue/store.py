"""Where accepted messages wait, and what is remembered of them.

The store is the queue: a process holds nothing that is not also here, so after a crash
another process carries on. The unit of work is the conversation. A row of
`conversation` exists while one of its messages is open; to claim is to take the
conversation that has been due the longest and to work on its oldest open message. So
each chat is answered in order, by one worker at a time.

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
    SQL,
    Added,
    Data,
    Rows,
    Step,
    add_step,
    end_step,
    forget_step,
    retry_step,
    update_step,
)

MAX_ATTEMPTS = 3  # claims that may end without a result before a message fails
BATCH = 500  # messages deleted in one transaction
TURN_TIMEOUT = 5.0  # seconds a worker lets callbacks go first, at most

logger = logging.getLogger(__name__)


class StoreError(Exception):
    """The store cannot be read or written now; it may be again later."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A message in the hands of one worker."""

    seq: int  # grows with every message the store accepts
    id: str
    conversation: str
    data: Data  # what was given to add
    token: str  # names this claim; a worker that lost it changes nothing
    reply: Any  # what was given to add or save_reply
    progress: Data  # what was given to save_reply, perhaps by a process now dead
    accepted: float  # Unix seconds
    spent: bool  # MAX_ATTEMPTS claims ended without a word: only to be given up
    kept: dict[str, Data]  # what claim was asked for, by name, as far as it was put


class Store:
    """The verbs and their promises. Each may raise StoreError.

    What a verb does in SQL stands at the end of this file. A callback waits for `add`:
    while one is at the store, workers go there one at a time.
    """

    dialect: ClassVar[dict[str, str]]  # how the engine spells the {words} of the SQL

    def __init__(self, timing: Timing = NORMAL) -> None:
        self.timing = timing
        self._sql = {name: sql.format(**self.dialect) for name, sql in SQL.items()}
        self._callbacks: deque[None] = deque()  # at the store now; counted without lock
        self._turn = threading.Lock()

    def _write(self, step: Step, values: Data) -> Any:
        """Do one statement, or a step of several in one transaction.

        What add_step writes is on the disk before it returns; other steps are done
        again after a power cut, unless an engine can crash alone.
        """
        raise NotImplementedError

    def _read(self, name: str, values: Data) -> Rows:
        """Return the rows of a SELECT."""
        return self._write(name, values)  # type: ignore[no-any-return]

    def durability(self) -> str:
        """Say when a message is safe; raise StoreError if it is not."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and connections."""
        raise NotImplementedError

    def _write_in_turn(self, step: Step, values: Data) -> Any:
        """Write what a worker wants, and let callbacks go first."""
        held = bool(self._callbacks) and self._turn.acquire(timeout=TURN_TIMEOUT)
        try:
            return self._write(step, values)
        finally:
            if held:
                self._turn.release()

    def add(
        self,
        id: str,
        conversation: str,
        data: Data,
        asker: str = "",
        room: int = NO_LIMIT,
        rate: int = NO_LIMIT,
        reply: Any = None,
        sent: float = 0.0,
        remember: bool = False,
    ) -> Added:
        """Keep a message on disk, once however often it is delivered.

        It is refused if `room` messages of the conversation are open, or if `asker`,
        unless empty, added `rate` in the last minute. With a `reply` there is nothing
        to ask, and it is in the history only if `remember` says so. Its turn in the
        conversation is by when it was `sent`, Unix seconds, then by when it was added.
        """
        texts = {"id": id, "conversation": conversation, "asker": asker}
        values: Data = {name: storable(text) for name, text in texts.items()}
        values |= {"data": json.dumps(data), "reply": _dump(reply)}
        values |= {
            "room": room,
            "rate": rate,
            "minute": self.timing.minute,
            "sent": sent,
        }
        values["remember"] = int(remember or reply is None)
        self._callbacks.append(None)
        try:
            return Added(self._write(add_step, values))
        finally:
            self._callbacks.pop()

    def claim(self, kept: Sequence[str] = ()) -> Claim | None:
        """Take the oldest open message of the conversation that is due longest.

        A claim lasts `lease` seconds. A message whose claims ended MAX_ATTEMPTS times
        without a word is claimed once more, as `spent`, and then failed. The claim
        brings what was put under the names in `kept`, where {conversation} stands for
        its conversation.
        """
        token = os.urandom(16).hex()
        taken = self._write_in_turn(
            "take", {"token": token, "lease": self.timing.lease}
        )
        # A statement of its own, so that it sees what ended a moment ago. Nothing of a
        # conversation ends while another worker holds it.
        if not taken:
            return None
        [(conversation, attempts)] = taken
        names = [storable(n.replace("{conversation}", conversation)) for n in kept]
        values = {"conversation": conversation, "kept": json.dumps(names)}
        if not (rows := self._write("oldest", values)):
            return None
        [(seq, id, *texts, accepted, found)] = rows
        data, reply, progress = map(_load, texts)
        given = (data, token, reply, progress or {}, accepted)
        found = {name: _load(text) for name, text in (_load(found) or {}).items()}
        spent = attempts > MAX_ATTEMPTS
        claim = Claim(seq, id, conversation, *given, spent=spent, kept=found)
        if data is not None and attempts <= MAX_ATTEMPTS + 1:
            return claim
        self.fail(claim, "its work was cut short too often, or it cannot be read")
        return self.claim(kept)

    def known(self, ids: Sequence[str]) -> dict[str, tuple[str, float | None]]:
        """Return the state of each id that is known: `open`, `done`, `gone` or
        `failed`, and when the message ended, in Unix seconds, None while it is open."""
        given = {storable(id): id for id in ids}
        rows = self._read("known", {"ids": json.dumps([*given])})
        return {given[id]: (state, ended) for id, state, ended in rows}

    def state(self, id: str) -> str | None:
        """Return the state of an id as `known` does, None if it is not known."""
        return self.known([id]).get(id, (None, None))[0]

    def heartbeat(self, claims: Collection[Claim]) -> tuple[list[Claim], list[Claim]]:
        """Make claims last `lease` seconds from now; return those that were lost, and
        those whose conversation was cancelled."""
        timing = self.timing
        names = json.dumps([claim.conversation for claim in claims])
        tokens = json.dumps([claim.token for claim in claims])
        self._write("repair", {"lease": timing.lease, "longest": timing.longest_delay})
        values = {"lease": timing.lease, "names": names, "tokens": tokens}
        held = dict(self._write("heartbeat", values)) if claims else {}
        lost = [claim for claim in claims if claim.token not in held]
        return lost, [claim for claim in claims if held.get(claim.token)]

    def save_reply(
        self, claim: Claim, reply: Any, progress: Data, remember: bool = True
    ) -> bool:
        """Keep the reply before it is sent, and how far sending has come; False if the
        claim was lost. A reply that is None stays as it is.

        Without `remember` neither text nor reply outlives finish.
        """
        values = {"reply": _dump(reply), "progress": _dump(progress)}
        values |= _held(claim, remember=int(remember))
        return bool(self._write_in_turn("save_reply", values))

    def finish(self, claim: Claim) -> bool:
        """End a message as answered and free its conversation; False if it was lost."""
        return bool(self._write_in_turn(end_step, _held(claim, end="finish")))

    def fail(self, claim: Claim, reason: str) -> bool:
        """Give a message up, until an operator looks; False if the claim was lost."""
        values = _held(claim, end="fail", reason=storable(reason))
        ended = bool(self._write_in_turn(end_step, values))
        if ended:
            logger.error("message %s failed: %s", claim.id, reason)
        return ended

    def release(self, claim: Claim, delay: float, failed: bool = False) -> None:
        """Give a message back, to be claimed again in `delay` seconds.

        `failed` counts this claim against MAX_ATTEMPTS.
        """
        self._write_in_turn("release", _held(claim, delay=delay, uncounted=1 - failed))

    def cancel(self, conversation: str) -> bool:
        """Stop the work on a conversation, also if it begins later; False if there is
        none."""
        return bool(self._write("cancel", {"conversation": storable(conversation)}))

    def history(self, conversation: str, limit: int) -> list[tuple[Data, Any]]:
        """Return the last `limit` remembered (data, reply) pairs, oldest first."""
        values = {"conversation": storable(conversation), "limit": limit}
        rows = self._read("history", values)
        turns = [(_load(data), _load(reply)) for data, reply in reversed(rows)]
        return [(data, reply) for data, reply in turns if data and reply]

    def forget(self, conversation: str) -> None:
        """Delete every text of the answered and the failed messages of a conversation,
        and what was put under its name. The ids stay known."""
        self._write_in_turn(forget_step, {"conversation": storable(conversation)})

    def put(self, name: str, value: Data) -> None:
        """Keep a value under a name, instead of the one before."""
        kept = {"name": storable(name), "value": json.dumps(value)}
        self._write_in_turn("put", kept)

    def get(self, name: str) -> Data | None:
        """Return what was put under a name."""
        rows = self._read("get", {"name": storable(name)})
        return _load(rows[0][0]) if rows else None

    def update(self, name: str, change: Callable[[Data], Data]) -> Data:
        """Replace the value under a name by what `change` makes of it, {} if there is
        none; return the new value. No other process changes it meanwhile.

        `change` runs inside the transaction, perhaps in another thread, and again if a
        connection breaks: it may only compute, and not wait or use the store.
        """
        values = {"name": storable(name), "change": change}
        result = self._write_in_turn(update_step, values)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    def prune(self, age: float) -> int:
        """Delete what ended or was put more than `age` seconds ago; return how many
        messages."""
        total = 0
        self._write("prune_kept", {"age": age})
        [(first, last)] = self._read("span", {})
        for after in range(first - 1, last, BATCH):
            values = {"age": age, "after": after, "last": after + BATCH}
            total += len(self._write("prune", values))
            time.sleep(0.02)  # so that others get their turn
        return total

    def load(self) -> tuple[int, int, int]:
        """Return how many messages wait, how many are claimed, and how many could be
        claimed now."""
        [numbers] = self._read("load", {})
        return numbers

    def stats(self) -> dict[str, float]:
        """Return the numbers of `waiting`, `in_work` and `failed` messages, and
        `oldest`, the age in seconds of the oldest that is open."""
        waiting, in_work, _ = self.load()
        [(failed, oldest)] = self._read("stats", {})
        numbers = {"waiting": waiting, "in_work": in_work, "failed": failed}
        return {**numbers, "oldest": round(max(0.0, oldest), 3)}

    def failed(self) -> list[tuple[int, str, str, float]]:
        """Return (seq, id, reason, seconds since) of failed messages, oldest first."""
        rows = self._read("failed", {})
        return [(seq, id, reason, age) for seq, id, reason, age, _ in rows]

    def retry(self, seqs: Collection[int] | None = None) -> int:
        """Open failed messages again, all or these, in their turn; return how many."""
        count = 0
        for seq, *_, conversation in self._read("failed", {}):
            if seqs is None or seq in seqs:
                values = {"seq": seq, "conversation": conversation}
                count += self._write(retry_step, values)
        return count


def storable(text: str) -> str:
    """Return a text without what a database cannot hold: NUL, half a surrogate pair."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def _held(claim: Claim, **values: Any) -> Data:
    """Return the values that name a claim, and others."""
    key = {"conversation": claim.conversation, "token": claim.token}
    return {"seq": claim.seq, **key, **values}


def _dump(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _load(text: str | None) -> Any:
    """Return what a text of JSON holds, None if there is none or it is broken."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None
