"""A bot dies at every step of an answer's life, and another goes on.

A step is before or after each write and read of the store, each REST call, and each
text of the AI. Two questions are asked; the bot dies at step 1, then at step 2, ...
until it lives through all of them. Each time a second bot on the same store must
answer what was acknowledged: once as a user sees it, in order, whole and not open.
In a second list the store fails at each step, for a while, and nothing dies: after a
step, the commit was made and nobody was told. In a third the first question was asked
while no bot was there, so it has to be looked up.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from benchmark.judge import judge_all
from benchmark.users import Chat
from botserver import REPLIES, Bot, Settings
from imbot.queue import StoreError
from imbot.queue.sqlite import SQLiteStore
from imbot.tencent import Client, read_messages
from simulator import c2c_event, group_event
from simulator.fixtures import APPID, FAST, TOKEN, poll
from simulator.messages import STREAM_GAP

QUESTIONS = 2
QUICK = ("whole", False, True)
AWAY = 0.15  # seconds for which the store fails
TIMING = replace(FAST, look_up=0.5, rest=0.2)  # others wait for who died meanwhile
MUST_BE_ZERO = ("lost", "twice", "misordered", "mangled", "left open", "locked")
MUST_BE_ZERO += ("above its question", "told nothing")


class Died(BaseException):
    """The process was killed here."""


class Life:
    """Counts the steps of one bot, and ends it at one of them, or its store."""

    def __init__(self, ends_at: int, dies: bool) -> None:
        self.ends_at, self.dies, self.steps = ends_at, dies, []
        self.is_over, self.fails_until = threading.Event(), 0.0
        self.asking = False

    def step(self, name: str, of_store: bool = False) -> None:
        """Raise Died from the step on at which this bot dies."""
        if self.dies and self.is_over.is_set():
            raise Died
        if of_store and time.monotonic() < self.fails_until:
            raise StoreError("the store is away")
        if not self._counts() or not (of_store or self.dies):
            return
        self.steps.append(name)
        if len(self.steps) == self.ends_at:
            self.is_over.set()
            self.fails_until = time.monotonic() + AWAY
            self.step(name, of_store)

    def _counts(self) -> bool:
        """Return whether a step has a part in an answer: in a pool thread, or in the
        callback."""
        thread = threading.current_thread()
        if thread is threading.main_thread():
            return self.asking
        return "(_run)" in thread.name


def mortal(store_type, life):
    """Return a store whose writes and reads are steps, before and after."""

    class MortalStore(store_type):
        def _write(self, step, values):
            return self.around(super()._write, step, values)

        def _read(self, step, values):
            return self.around(super()._read, step, values)

        def around(self, run, step, values):
            name = getattr(step, "__name__", step)
            life.step(f"before {name}", of_store=True)
            result = run(step, values)
            life.step(f"after {name}", of_store=True)
            return result

    return MortalStore


def mortal_bot(life):
    """Return a Bot whose calls of Tencent and of the AI are steps."""

    class MortalClient(Client):
        def call(self, command, *given, **more):
            life.step(f"before {command}")
            answer = super().call(command, *given, **more)
            life.step(f"after {command}")
            return answer

    class MortalBot(Bot):
        @classmethod
        def connect(cls, settings, timing=TIMING):
            client = super().connect(settings, timing)
            client.__class__ = MortalClient
            return client

        def ask(self, chat):
            life.step("before the AI")
            for text in super().ask(chat):
                life.step("after a text of the AI")
                yield text

    return MortalBot


class SQLite:
    """A new file for each life."""

    type = SQLiteStore

    def __init__(self, folder) -> None:
        self.numbers, self.folder, self.path = itertools.count(), folder, ""

    def new_url(self):
        self.path = f"{self.folder}/{next(self.numbers)}.db"
        return f"sqlite:///{self.path}"

    def expire(self):
        """Let the leases of a dead bot run out."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            database.execute("UPDATE conversation SET due = 0")


class Postgres:
    """A new schema of one server for each life."""

    def __init__(self, url) -> None:
        from imbot.queue.postgres import PostgresStore

        self.type, self.url = PostgresStore, url

    def new_url(self):
        self._execute("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        return self.url

    def expire(self):
        self._execute("UPDATE conversation SET due = 0")

    def _execute(self, *statements):
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as database:
            for statement in statements:
                database.execute(statement)


@pytest.fixture
def live_through(sim, monkeypatch):
    """Return a function that ends a bot at a step; it returns what is wrong then."""
    numbers, hook = itertools.count(), threading.excepthook
    monkeypatch.setattr(
        threading, "excepthook", lambda e: e.exc_type is Died or hook(e)
    )

    def live_through(database, mode, in_group, dies, ends_at, missed=False):
        number = next(numbers)
        user, group, robot = f"user{number}", "", f"@RBT#{number}"
        sim.users.add(user)
        sim.robots = {robot: "Robot"}  # of this life: a look-up finds no other's chats
        if in_group:
            group = f"@TGS#{user}"
            sim.groups[group] = {user}
        chat, asked_before = Chat(user, robot, group), len(sim.ai_requests)
        settings = make_settings(sim, mode, database.new_url())
        if missed:
            miss_a_question(sim, chat, database.type(settings.database_url))
        life = Life(ends_at, dies)
        live(sim, settings, mortal(database.type, life), mortal_bot(life), chat, life)
        if dies and life.is_over.is_set():
            database.expire()
            live(sim, settings, database.type, Bot, chat)
        found = verdict(sim, chat)
        asked = len(sim.ai_requests) - asked_before
        kept = "end_step" in life.steps[-1]  # and was sent: the AI is not asked again
        if asked > QUESTIONS + (not kept):
            found["asked the AI"] = asked
        return life, found

    return live_through


def make_settings(sim, mode, url):
    return Settings(
        im_sdkappid=APPID,
        im_key=sim.key,
        im_callback_token=(TOKEN,),
        im_api_url=sim.url,
        ai_secret_key=sim.ai_key,
        ai_base_url=f"{sim.url}/v1",
        database_url=url,
        reply_mode=mode,
        bot_language="en",
        history_turns=2,
    )


def miss_a_question(sim, chat, store):
    """Ask while the server is away."""
    store.put("servers", {"well": {"a server": time.time() - 9}})
    store.close()
    chat.asked += 1
    sim.remember_event(next_event(sim, chat))
    chat.lost[chat.asked] = time.time()


def live(sim, settings, store_type, bot_type, chat, life=None):
    """Let a bot live until it has nothing to do, or dies."""
    store = store_type(settings.database_url, TIMING)
    bot = bot_type(settings, store, TIMING)
    bot.workers.threads = 1  # so that steps have their numbers
    try:
        bot.workers.start()
        ask(sim, bot, chat, life)
        poll(lambda: is_done(bot, sim, chat))
    except Died:
        pass
    finally:
        with suppress(Died):
            bot.close(drain=0)
        for thread in threading.enumerate():
            if "(_" in thread.name:  # a thread of the bot
                thread.join(10)
        store.close()


def ask(sim, bot, chat, life):
    """Ask what was not asked yet; Tencent repeats no callback."""
    while chat.asked < QUESTIONS:
        chat.asked += 1
        event = next_event(sim, chat)
        sim.remember_event(event)
        if life:
            life.asking = True
        try:
            for message in read_messages({}, json.dumps(event).encode(), bot.nicks):
                bot.accept(message)
            chat.acknowledged[chat.asked] = time.time()
        except StoreError:  # Tencent gets a 503
            bot.missed.note_refusal()
            chat.refused.add(chat.asked)
        finally:
            if life:
                life.asking = False


def next_event(sim, chat):
    text = f"question [{chat.asked}]"
    if not chat.group:
        return c2c_event(chat.user, chat.robot, text)
    return group_event(
        chat.user, chat.group, sim.next_seq(chat.group), text, [chat.robot]
    )


def shown_to(sim, chat):
    place = chat.group or chat.user
    return [message for message in sim.delivered if message.chat == place]


def is_done(bot, sim, chat):
    """Return whether all is answered, and nothing is left to do."""
    with suppress(StoreError):
        waiting, in_work, _ = bot.store.load()
        owed = len(chat.acknowledged) + len(chat.refused) + len(chat.lost)
        return waiting == in_work == 0 and len(shown_to(sim, chat)) >= owed
    return False


def verdict(sim, chat):
    """Return what is wrong for the user, {} if nothing is."""
    shown = shown_to(sim, chat)
    for message in shown:
        message.time -= STREAM_GAP + 1  # after which Tencent has closed any stream
    found = judge_all([chat], shown, [(0.0, time.time())])
    return {name: found[name] for name in MUST_BE_ZERO if found[name]}


def walk(live_through, database, mode, in_group, dies, missed=False):
    """End at every step; the life that does not reach its end is the last."""
    wrong = {}
    for ends_at in itertools.count(1):
        life, found = live_through(database, mode, in_group, dies, ends_at, missed)
        if found:
            wrong[ends_at, life.steps[-1]] = found
        if not life.is_over.is_set():
            break
    print(f"{len(life.steps)} points, {mode}, {in_group=}, {dies=}, {missed=}")
    assert not wrong


CASES = [
    pytest.param(
        *(mode, in_group, dies),
        id=f"{mode}-{'group' if in_group else 'one'}-{'dies' if dies else 'fails'}",
        marks=() if (mode, in_group, dies) == QUICK else pytest.mark.slow,
    )
    for mode in REPLIES
    for in_group in (False, True)
    for dies in (True, False)
]


@pytest.mark.parametrize(("mode", "in_group", "dies"), CASES)
def test_every_crash_point_on_sqlite(live_through, tmp_path, mode, in_group, dies):
    walk(live_through, SQLite(tmp_path), mode, in_group, dies)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "in_group", "dies"), CASES)
def test_every_crash_point_on_postgres(
    live_through, shared_postgres, mode, in_group, dies
):
    walk(live_through, Postgres(shared_postgres.url), mode, in_group, dies)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "in_group", "dies"), CASES)
def test_every_crash_point_of_a_look_up(live_through, tmp_path, mode, in_group, dies):
    walk(live_through, SQLite(tmp_path), mode, in_group, dies, missed=True)


@pytest.mark.slow
@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("dies", [True, False])
def test_every_crash_point_of_a_look_up_on_postgres(
    live_through, shared_postgres, in_group, dies
):
    database = Postgres(shared_postgres.url)
    walk(live_through, database, "whole", in_group, dies, missed=True)
