"""Answers what was written while no server took callbacks: Tencent repeats none.

The store holds when each server was last well. A process that finds that callbacks may
have failed, or that had to refuse one, opens a window: a job in the store. The job asks
Tencent for the conversations with news, and puts a task into the queue of each, before
all that waits there. Whoever claims the task looks the conversation up and adds what
the store does not know. A message has the id that its callback would have given it, so
nothing is answered twice.

An option: without it, delete this file and its line in CATCHING_UP.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tim
from config import Config
from store import Added, Store
from tim import IMError, Json, Message
from workers import InFlight, LeaseLost, Workers

GAP = 5.0  # seconds without a beat, after which this server was not well
OTHERS_GAP = 1.5  # the same for another, in whose place this one may have started
AWAY = 600.0  # seconds after which a silent server is not expected back
MARGIN = 10  # seconds by which clocks may differ
RATE = 10  # calls a second of one process, and tasks a second, at the most
LONGEST_WAIT = 1.0  # seconds for which a thread waits for its turn to call
PAGES = 100  # of one list, at the most
PATIENCE = 120.0  # seconds in which a look-up that gets no answer is tried again
RECALLED = 8  # in MsgFlagBits
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)  # not as documented

logger = logging.getLogger(__name__)


class History:
    """What Tencent has stored. Methods raise IMError, or one of UNREADABLE."""

    def __init__(self, im: tim.Client) -> None:
        self.im = im
        self._lock = threading.Lock()
        self._free_at = self._queue_ends = 0.0  # time.monotonic()

    def delay(self) -> float:
        """Return the seconds after which a look-up should come again; 0 if it may
        begin, and wait for its turn."""
        now = time.monotonic()
        with self._lock:
            if self._free_at - now < LONGEST_WAIT:
                return 0.0
            self._queue_ends = max(self._queue_ends, now + LONGEST_WAIT) + 1 / RATE
            return min(self._queue_ends - now, 60.0)

    def _call(self, command: str, body: Json) -> Json:
        with self._lock:
            turn = max(self._free_at, time.monotonic())
            self._free_at = turn + 1 / RATE
        time.sleep(max(0.0, turn - time.monotonic()))
        return self.im.call(command, body)

    def conversations(self, robot: str, since: float) -> Iterator[tuple[str, str]]:
        """Yield the user and the group of each conversation of a robot with news.

        https://www.tencentcloud.com/document/product/1047/43087
        """
        names = ("TimeStamp", "StartIndex", "TopTimeStamp", "TopStartIndex")
        page = dict.fromkeys(names, 0)
        for _ in range(PAGES):
            body = {"From_Account": robot, **page, "AssistFlags": 7}
            answer = self._call("recentcontact/get_list", body)
            for item in answer.get("SessionItem") or []:
                if item["MsgTime"] >= since:
                    yield item.get("To_Account", ""), item.get("GroupId", "")
            if answer["CompleteFlag"]:
                return
            page = {name: answer[name] for name in names}

    def messages(self, chat: Message, since: int) -> list[Json]:
        """Return the messages of a message's conversation, the oldest first."""
        if chat.group:
            items = [*self._in_group(chat.group, since)]
        else:
            try:  # from the user's side: the robot's lacks SyncOtherMachine 2
                items = [*self._one_to_one(chat.user, chat.robot, since)]
            except IMError as error:
                if error.retry:
                    raise
                items = [*self._one_to_one(chat.robot, chat.user, since)]
        return sorted(items, key=lambda item: (item["MsgTimeStamp"], item["MsgSeq"]))

    def _one_to_one(self, account: str, peer: str, since: int) -> Iterator[Json]:
        """https://www.tencentcloud.com/document/product/1047/35478"""
        body: Json = {"Operator_Account": account, "Peer_Account": peer, "MaxCnt": 100}
        body |= {"MinTime": since, "MaxTime": int(time.time()) + MARGIN}
        for _ in range(PAGES):
            answer = self._call("openim/admin_getroammsg", body)
            yield from answer.get("MsgList") or []
            if answer["Complete"]:
                return
            body["MaxTime"] = answer["LastMsgTime"]
            body["LastMsgKey"] = answer["LastMsgKey"]

    def _in_group(self, group: str, since: int) -> Iterator[Json]:
        """https://www.tencentcloud.com/document/product/1047/34971"""
        body: Json = {"GroupId": group, "ReqMsgNumber": 20}
        for _ in range(PAGES):
            answer = self._call("group_open_http_svc/group_msg_get_simple", body)
            page = answer.get("RspMsgList") or []
            there = [item for item in page if not item["IsPlaceMsg"]]
            yield from (item for item in there if item["MsgTimeStamp"] >= since)
            first = min((item["MsgSeq"] for item in page), default=1)
            if first <= 1 or any(item["MsgTimeStamp"] < since for item in there):
                return
            body["ReqMsgSeq"] = first - 1


class Missed:
    """Notices that messages were missed, looks them up, gives them to `accept`."""

    def __init__(
        self,
        config: Config,
        store: Store,
        im: tim.Client,
        workers: Workers,
        accept: Callable[[Message], None],
    ) -> None:
        self.config, self.store, self.workers = config, store, workers
        self.history, self._accept = History(im), accept
        self.refused_at = 0.0  # when this process last refused a callback
        self.window: Json | None = None  # that is open: its id, since when, opened at
        self._well_at = time.time()  # when this process was last well
        self._began = 0.0  # when this process found that its server had begun
        self._warned: set[str] = set()  # of which a refusal was logged
        workers.beat = self.beat

    def beat(self) -> None:
        """Note that this server is well; open a window if callbacks may have failed."""
        if self.workers.draining:
            return
        server, now = server_name(), time.time()
        well, last = self.store.get("well") or {}, self.store.get("missed") or {}
        is_open = bool(last) and self.store.state(last["id"]) in (None, "open")
        window, silent = last if is_open else {}, self._silent(server, well, now)
        if self.window is None and not silent and well.keys() - {server}:
            self.workers.hold(OTHERS_GAP)  # until it is clear whether others are well
        if now < self._well_at:  # the clock was set back, and older times say nothing
            self.refused_at = min(self.refused_at, now)
            silent.append(now - GAP)
        if self.refused_at > max(self._well_at, last.get("at", 0.0)):
            if not self._is_calm():
                self.window = window
                return  # later
            silent.append(self._well_at)
        # What the last window is about to look up is looked up in the next one.
        recent = is_open or now - last.get("at", 0.0) < PATIENCE
        if silent:
            window = self._open(silent, last if recent else {}, now)
        self.window = window
        well = {s: at for s, at in well.items() if now - at < AWAY and at not in silent}
        self.store.put("well", well | {server: now})
        self._well_at = now

    def _is_calm(self) -> bool:
        return self.workers.backlog <= self.config.max_backlog / 2

    def _silent(self, server: str, well: dict[str, float], now: float) -> list[float]:
        """Return when the servers were last well that have to be looked back for: this
        one, and those that were gone when it started. Others will return."""
        if now - well.get(server, 0.0) > GAP:
            self._began = now  # it starts, or wakes up
        if now > self._began + GAP:
            return []
        return [at for at in well.values() if at < min(self._began, now - OTHERS_GAP)]

    def _open(self, silent: list[float], last: Json, now: float) -> Json:
        """Open a window for what was missed since the first of these times, and for
        all that the last one was opened for; return it."""
        began = int(max(min(silent), now - self.config.catch_up))
        since = min(began, last.get("since", began))
        job = Message(f"missed\t{max(silent)}", "", "", "", kind="missed", sent=since)
        window = {"id": job.id, "since": since, "began": began, "at": now}
        self.store.put("missed", window)
        added = self.workers.add(job.id, "missed", job.data(), reply="", sent=now)
        if added == Added.NEW:
            logger.info("callbacks may have failed in the last %.0f s", now - began)
        return window

    def guard(self, message: Message, conversation: str) -> bool:
        """Return whether a conversation has to be looked up before it goes on."""
        refused = self.refused_at > self._well_at and self._is_calm()
        if self.window is None or refused:
            self.beat()
        if not self.window or message.topic:
            return False
        return self._add_task(self.window, message, conversation)

    def _add_task(self, window: Json, chat: Message, conversation: str) -> bool:
        """Have a conversation looked up once in a window; return whether it is to be,
        perhaps since another process just said so."""
        id, since = f"{window['id']}\t{conversation}", window["since"]
        state = self.store.state(id)
        if state is None and not self._is_looked_up(window, conversation):
            place = (chat.robot, chat.user, "", chat.group)
            task = Message(id, *place, kind="missed", sent=since)
            self.workers.add(id, conversation, task.data(), reply="")
            return True
        return state == "open"

    def _is_looked_up(self, window: Json, conversation: str) -> bool:
        """Return whether it was since the window was opened, if for an earlier one."""
        last = self.store.get(f"looked up\t{conversation}") or {}
        return bool(last.get("window", "") == window.get("id"))

    def comes_first(self, work: InFlight, message: Message) -> bool:
        """Do a job or a task, or put a message back that one has to come before."""
        claim = work.claim
        if message.kind == "missed":
            self._run(work, message)
            return True
        begun = claim.reply is not None or claim.progress
        if begun or not self.guard(message, claim.conversation):
            return False
        self.store.release(claim, 0.0)
        self.workers.wake()
        return True

    def _run(self, work: InFlight, message: Message) -> None:
        claim, last = work.claim, self.store.get("missed") or {}
        if message.robot:
            is_done = self._is_looked_up(last, claim.conversation)
        else:
            is_done = self._is_superseded(message)
        if is_done:
            return self.workers.when_store_works(self.store.finish, claim)
        if message.robot and (delay := self.history.delay()):
            return self.store.release(claim, delay)
        try:
            with self._or_warning(message.id):
                if claim.spent:
                    logger.warning("%s is given up", claim.id)
                elif message.robot:
                    self._look_up(message, last, claim.conversation)
                    # Clients sort a second by MsgSeq, which is made of seq.
                    self.store.renumber(claim)
                    if (self.store.get("missed") or {}) != last:  # one was opened
                        return self.store.release(claim, 0.0)
                else:
                    self._list(work, message)
        except IMError as error:
            now = time.time()  # it may have waited long for its first try
            failing = {"since": claim.progress.get("since", now)}
            if now - failing["since"] < PATIENCE:
                self.store.save_reply(claim, None, failing)
                return self.store.release(claim, 2.0)
            logger.warning("%s is given up: %s", claim.id, error)
        self.workers.when_store_works(self.store.finish, claim)

    @contextmanager
    def _or_warning(self, id: str) -> Iterator[None]:
        """Log what Tencent refuses, once in a window; raise what it may take later."""
        try:
            yield
        except (IMError, *UNREADABLE) as error:
            if isinstance(error, IMError) and error.retry:
                raise
            window = id.split("\t")[1]
            if window not in self._warned:
                self._warned.add(window)
                why = error if isinstance(error, IMError) else type(error).__name__
                logger.warning("what was missed cannot be looked up: %s", why)

    def _is_superseded(self, job: Message) -> bool:
        """Return whether a later window begins no later: its job does this work."""
        last = self.store.get("missed") or {"id": job.id, "since": 0}
        return bool(last["id"] != job.id and last["since"] <= job.sent)

    def _list(self, work: InFlight, job: Message) -> None:
        """Add a task for each conversation with news since the window began."""
        for robot in self.history.im.robots():
            with self._or_warning(job.id):
                self._list_one(work, job, robot)

    def _list_one(self, work: InFlight, job: Message, robot: str) -> None:
        window = {"id": job.id, "since": job.sent}
        for user, group in self.history.conversations(robot, job.sent - MARGIN):
            if work.lost or self.workers.draining or self._is_superseded(job):
                raise LeaseLost
            chat = Message("", robot, user, "", group)
            key = chat.conversation(self.config.group_memory == "member")
            if self._add_task(window, chat, key):
                time.sleep(1 / RATE)

    def _look_up(self, task: Message, last: Json, conversation: str) -> None:
        """Give what was missed in a conversation to `accept`, the oldest first. It
        serves the last window, whichever the task is of."""
        found: list[Message] = []
        name, now = f"looked up\t{conversation}", time.time()
        looked_up_at = (self.store.get(name) or {}).get("at", 0.0)
        since = min(task.sent, last.get("since", task.sent))
        if looked_up_at <= now:  # else the clock was set back
            since = max(since, looked_up_at)
        for item in self.history.messages(task, int(since) - MARGIN):
            with suppress(tim.BadEvent):
                found += self._read(item, task)
        states = {message.id: self.store.state(message.id) for message in found}
        # While a conversation is to be looked up, nothing in it is answered. So what an
        # answered message overtook before the last outage was not missed in any.
        began = max(task.sent, last.get("began", 0.0))
        answered = [m for m in found if states[m.id] not in (None, "open")]
        overtaken = max((m.sent for m in answered if m.sent < began), default=0.0)
        for message in found:
            if not states[message.id] and message.sent > overtaken:
                self._accept(message)
        self.store.put(name, {"window": last.get("id"), "at": now})

    def _read(self, item: Json, task: Message) -> list[Message]:
        """Return what a message of the history wants of the robot, as a callback."""
        if item.get("MsgFlagBits", 0) & RECALLED:
            return []
        event = item | {"MsgTime": item["MsgTimeStamp"], "Random": item["MsgRandom"]}
        if not task.group:
            return tim.parse("Bot.OnC2CMessage", event)
        nick, text = self.config.persona(task.robot).nick, str(item["MsgBody"])
        if not any(tim.is_mentioned(name, text) for name in (task.robot, nick)):
            return []
        event |= {"GroupId": task.group, "AtRobots_Account": [task.robot]}
        return tim.parse("Bot.OnGroupMessage", event, {task.robot: nick})

    def is_absent(self, message: Message, order: int, part: int) -> bool:
        """Return whether Tencent surely does not have a part of an answer: it lists the
        question and not this part. Raises IMError if it may say so later."""
        if part < 1 or message.topic:
            return False  # nobody knows
        _, chance = tim.numbers(message.id, order, part)
        asked = message.id.split("\t")[-3:-1]
        with self._or_warning("\tanswers"):
            items = self.history.messages(message, int(message.sent))
            sent = [i["MsgRandom"] for i in items if i["From_Account"] == message.robot]
            there = [[str(i["MsgSeq"]), str(i["MsgRandom"])] for i in items]
            return chance not in sent and asked in there
        return False

    @staticmethod
    def probe(im: tim.Client) -> str:
        """Say whether an app may look up what was missed. Raises IMError."""
        history, now = History(im), int(time.time())
        try:
            for robot in im.robots():
                for user, group in history.conversations(robot, 0):
                    if not group:
                        history.messages(Message("", robot, user, ""), now)
                        return "what is missed can be looked up"
        except UNREADABLE as error:
            raise ValueError(f"an unknown answer ({type(error).__name__})") from None
        return "conversations can be listed, but there is none yet"


def server_name() -> str:
    """Return a name that all processes of this gunicorn have, and no other, nor it
    after a restart: the same container may give it the same process id."""
    parent, since = os.getppid(), ""
    with suppress(OSError, IndexError):
        stat = Path(f"/proc/{parent}/stat").read_text()
        since = stat.rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {parent} {since}"
