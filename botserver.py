"""A chatbot server for Tencent Cloud IM (Tencent Cloud Chat).

Tencent calls `POST /im` when somebody writes to a robot account (@RBT#…) or mentions
one in a group. The message is checked, stored and acknowledged at once; a pool of
threads asks the AI service and answers as the robot. One message runs through this file
from top to bottom: `check`, `read_messages`, `Bot.accept`, `Bot.answer`, `Bot.ask`.

    gunicorn 'botserver:create_app()'

Settings come from the environment: see config.py and README.md.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name
from typing import Any

import click
from flask import Flask, request
from werkzeug.exceptions import HTTPException

import commands
import tim
from commands import TEXTS
from config import (
    CATCHING_UP,
    COMMAND_LINE,
    REPLIES,
    Config,
    ConfigError,
    Persona,
    load,
    misspelt,
)
from providers import Provider, ProviderError, new_memory
from questions import make_chat, news, redact
from replies import PlainReply
from session import CancelScope
from store import MAX_ATTEMPTS, MINUTE, NO_LIMIT, Added, Store, StoreError
from usersig import BadSignature, check_callback
from workers import InFlight, LeaseLost, Workers

__version__ = "1.1.0"
OK = {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}
LARGEST_CALLBACK = 1 << 20  # bytes
LARGEST_REST, PIECE = 16 << 20, 1 << 16  # bytes that are read of a refused body
NOTICE_EVERY = 600  # seconds in which a chat is told once why messages are refused
PATIENCE = 86400  # seconds in which Tencent IM is asked again to take an answer
PATIENCE_WITH_MESSAGE = 120  # the same, if it is this one message that IM refuses
# Seconds after an unsure call in which Tencent surely knows a repetition: 120 and 300,
# less what that call and the last one may take with all their tries.
KNOWN_C2C, KNOWN_GROUP = 50, 230
SAVE_PATIENCE = 10.0  # seconds in which a store that is away is asked to save an answer
DRAIN = 20.0  # seconds for answers in work when the server stops

Json = dict[str, Any]
logger = logging.getLogger(__name__)


def check(config: Config, query: Mapping[str, str]) -> None:
    """Raise BadSignature unless the callback is Tencent's and for our app."""
    if config.im_callback_token:
        sign, request_time = query.get("Sign", ""), query.get("RequestTime", "")
        check_callback(config.im_callback_token, sign, request_time)
    if query.get("SdkAppid", str(config.im_sdkappid)) != str(config.im_sdkappid):
        raise BadSignature("SdkAppid is not this server's app")


def read_messages(
    query: Mapping[str, str], body: bytes, nicks: Mapping[str, str]
) -> list[tim.Message]:
    """Return the messages to robots in a callback. Raises tim.BadEvent."""
    try:
        event = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise tim.BadEvent("the body is not JSON") from None
    if not isinstance(event, dict):
        raise tim.BadEvent("the body is not a JSON object")
    name = event.get("CallbackCommand") or query.get("CallbackCommand")
    return tim.parse(str(name), event, nicks)


@dataclass(eq=False)
class Job:
    """A message that is being answered."""

    work: InFlight
    message: tim.Message
    scope: CancelScope  # of the call to the AI
    progress: Json  # of sending; a process that takes over goes on from there
    reply: PlainReply
    outcome: str = "sent"  # for the log


class Bot:
    """Accepts messages, and answers them in the threads of its Workers."""

    def __init__(self, config: Config, store: Store, im: tim.Client) -> None:
        self.config, self.store, self.im = config, store, im
        self.texts = TEXTS[config.bot_language]
        self.shared_memory = config.group_memory == "group"
        retention = config.retention_days * 86400
        self.workers = Workers(store, self.answer, config.worker_threads, retention)
        personas = {Persona(), *config.robots.values()}
        self._providers = {persona: config.provider(persona) for persona in personas}
        modes = {config.reply_mode, *(persona.reply_mode for persona in personas)}
        self._replies = {mode: load(REPLIES, mode) for mode in modes if mode}
        self.missed: Any = None  # what looks for messages whose callbacks failed
        for name in CATCHING_UP if config.catch_up else ():
            found = partial(self.accept, was_missed=True)
            self.missed = resolve_name(name)(config, store, im, self.workers, found)

    def provider(self, robot: str) -> Provider:
        """Return the AI service of a robot."""
        return self._providers[self.config.persona(robot)]

    def accept(self, message: tim.Message, was_missed: bool = False) -> None:
        """Store a message and wake a thread for it. Raises StoreError.

        If it is refused, the chat is told why, unless it `was_missed`.
        """
        if not was_missed and self.workers.backlog >= self.config.max_backlog:
            raise StoreError("too many messages wait (MAX_BACKLOG)")
        chat = message.conversation(per_member=not self.shared_memory)
        if not self._allows(message):
            why = "not_allowed"
        elif commands.is_stop(message):
            why = "stop"
        else:
            if self.missed and not was_missed:
                self.missed.guard(message, chat)
            rate, room = self.config.rate_limit or NO_LIMIT, self.config.max_waiting
            limits: Json = {"asker": message.user, "room": room, "rate": rate}
            limits["sent"] = message.sent
            why = self.workers.add(message.id, chat, message.data(), **limits)
        if why not in (Added.NEW, Added.KNOWN) and not was_missed:
            self._tell(message, chat, why)

    def _allows(self, message: tim.Message) -> bool:
        users, groups = self.config.allow_users, self.config.allow_groups
        known_user = not users or message.user in users
        return known_user and (not groups or message.group in ("", *groups))

    def _tell(self, message: tim.Message, chat: str, why: str) -> None:
        """Say that an answer is stopped, or, unless it was said lately, why messages
        are refused. It does not wait behind the answers of the chat."""
        id, text = message.id, self.texts[why]
        if why != "stop":
            every = MINUTE if why == Added.RATE_LIMITED else NOTICE_EVERY
            place = (message.robot, message.group or message.user)
            id = "\t".join((why, *place, f"{time.time() // every:.0f}"))
        elif message.kind == "stop":
            text = ""  # who presses the button sees that
        about = replace(message, text="", quote="", images=())  # nobody needs them
        beside, room = f"{chat}\tnotice", self.config.max_waiting
        added = self.workers.add(id, beside, about.data(), room=room, reply=text)
        if why == "stop" and added == Added.NEW:
            self.workers.cancel(chat)

    def answer(self, work: InFlight) -> None:
        """Answer a message that a thread of the pool has claimed.

        Raises LeaseLost, StoreError; the pool gives the message back then.
        """
        message = read_message(work.claim.data)
        if self.missed and self.missed.comes_first(work, message):
            return
        job, began = self._begin(work, message), time.monotonic()
        try:
            if work.claim.spent:
                return self._give_up(
                    job, f"its work was cut short {MAX_ATTEMPTS} times"
                )
            self._forget_unsure(job)
            text = work.claim.reply  # of a process that is dead, or could not send it
            if text is None:
                text = self._say(job)
            asked = time.monotonic()
            if shown := "\n\n".join(filter(None, (text, job.progress.get("note")))):
                job.reply.close(shown, failed=not text)
        except tim.IMError as error:
            return self._not_sent(job, error)
        # It is sent: if the store is away now, it must not be sent again.
        self.workers.when_store_works(self.store.finish, work.claim)
        sent = time.monotonic()
        took = (round((asked - began) * 1000), round((sent - asked) * 1000))
        line = "%s: %s, ai %d ms, im %d ms, %d parts"
        logger.info(line, work.claim.id, job.outcome, *took, job.reply.parts)

    def _begin(self, work: InFlight, message: tim.Message) -> Job:
        progress = dict(work.claim.progress)
        mode = self.config.persona(message.robot).reply_mode or self.config.reply_mode
        reply: PlainReply = self._replies[mode](
            self.im,
            message,
            work.claim.seq,
            progress,
            partial(self._save, work, None),
            self.texts["replaced"],
        )
        trace = tim.numbers(message.id, work.claim.seq, 0)[1]
        scope = CancelScope(self.config.ai_timeout, str(trace))
        work.cancel, work.tick = scope.cancel, partial(self._keep_alive, reply)
        return Job(work, message, scope, progress, reply)

    def _save(
        self, work: InFlight, text: str | None, progress: Json, remember: bool = False
    ) -> None:
        """Save an answer, and how far it is sent.

        If the store is away, an answer waits for it: it was paid for. Progress without
        one stays in memory.
        """
        end = time.monotonic() + SAVE_PATIENCE
        while True:
            try:
                if not self.store.save_reply(work.claim, text, progress, remember):
                    raise LeaseLost
                return
            except StoreError:
                if text is None:
                    return
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def _keep_alive(self, reply: PlainReply) -> None:
        if time.monotonic() - reply.last_sent > reply.keep_alive_after:
            self.workers.in_background(reply.keep_alive)

    def _say(self, job: Job) -> str:
        """Return the answer, saved: a restart sends it, and does not pay for it again.

        Raises tim.IMError if the reply cannot be opened.
        """
        remember = False
        if not (text := self._builtin_reply(job)):
            job.reply.open()
            text, remember = self.ask(job)
        remember = remember and self.config.history_turns > 0
        self._save(job.work, text, job.progress, remember)
        return text

    def _builtin_reply(self, job: Job) -> str:
        """Return what the bot itself says; "" to ask the AI."""
        message, chat = job.message, job.work.claim.conversation
        if message.kind == "unsupported":
            return self.texts["unsupported"]
        shared = bool(message.group) and self.shared_memory
        where = (message, chat, self.store, self.config.bot_language, shared)
        if said := commands.answer(commands.Chat(*where)):
            return said
        sees = self.provider(message.robot).service.images
        readable = message.text or message.quote or sees
        return "" if readable else self.texts["no_vision"]

    def ask(self, job: Job) -> tuple[str, bool]:
        """Return the AI's answer, shown while it grows, and whether to remember it.

        If there is none, or half of one, `progress` has a note that says why.
        """
        job.outcome, text, remember = "answered", "", True
        provider, name = self.provider(job.message.robot), job.work.claim.conversation
        memory = self._memory(job) if provider.service.remembers else None
        chat, interval = self._chat(job, provider, memory), job.reply.update_interval
        try:
            for text in provider.chat(chat, job.scope, interval, memory):
                if not job.scope.ended:  # else it is saved and closed at once
                    job.reply.update(text)
        except ProviderError as error:
            if job.work.lost:
                raise LeaseLost from None
            text, remember = self._cut(job, error, text, chat)
        if memory:
            self.workers.when_store_works(self.store.put, name, memory)
        return text, remember and not memory  # or the service remembers it

    def _memory(self, job: Job) -> Json:
        """Return what a service that remembers knows the chat by."""
        message, name = job.message, job.work.claim.conversation
        memory = self.store.get(name)
        if not memory:
            shared = message.group if self.shared_memory else ""
            memory = new_memory(shared or message.user)
            self.store.put(name, memory)  # after a crash the session is the same
        return memory

    def _cut(
        self, job: Job, error: ProviderError, text: str, chat: list[Json]
    ) -> tuple[str, bool]:
        """Note why an answer is not whole; return it, and whether to remember it."""
        job.outcome, why = error.kind, self.texts.get(error.kind, self.texts["busy"])
        wanted = error.kind in ("stopped", "length")
        if wanted and not text:
            return why, False  # it is no failure
        if not wanted:
            details = redact(str(error), chat)
            logger.warning("no answer for %s: %s", job.work.claim.id, details)
        half = text and not wanted
        job.progress["note"] = self.texts["cut"].format(why) if half else why
        return text, wanted

    def _chat(self, job: Job, provider: Provider, memory: Json | None) -> list[Json]:
        """Return the question as the AI service gets it, with what came before."""
        message, config = job.message, self.config
        found = self.store.history(job.work.claim.conversation, config.history_turns)
        turns = [(read_message(data), reply) for data, reply in found]
        prompt = config.persona(message.robot).system_prompt or config.ai_system_prompt
        if memory:
            turns = news(turns, memory)
            if prompt == Config.ai_system_prompt:
                prompt = ""  # nobody set it, and the service has one of its own
        images = provider.service.images
        return make_chat(prompt, turns, message, self.shared_memory, images)

    def _not_sent(self, job: Job, error: tim.IMError) -> None:
        """Send an answer later that IM did not take, or give it up."""
        claim, now, progress = job.work.claim, time.time(), job.progress
        since = max(progress.setdefault("failing_since", now), claim.accepted)
        patience = PATIENCE_WITH_MESSAGE if error.about_message else PATIENCE
        if not error.retry or now - since > patience:
            return self._give_up(job, str(error))
        delay = min(60.0, max(1.0, now - since))
        logger.warning("%s; trying again in %.0f s: %s", claim.id, delay, error)
        if error.may_have_arrived and progress.get("at") is not None:
            progress.setdefault("unsure", {}).setdefault(str(progress["at"]), now)
        self._save(job.work, None, progress)
        self.workers.when_store_works(self.store.release, claim, delay)

    def _forget_unsure(self, job: Job) -> None:
        """Count as sent what may have arrived, once Tencent may have forgotten it, but
        for a part that Tencent's history surely lacks."""
        unsure, part = job.progress.get("unsure", {}), str(job.progress.get("at"))
        known = KNOWN_GROUP if job.message.group else KNOWN_C2C
        age = time.time() - unsure.get(part, time.time())
        if part not in unsure or 0 <= age <= known:  # the clock may be set back
            return
        again = self.missed and self.missed.is_absent(
            job.message, job.work.claim.seq, int(part) + 1
        )
        del unsure[part]
        what = "did not arrive" if again else "counts as sent, unconfirmed"
        logger.warning("%s %s", job.work.claim.id, what)
        if not again:
            job.reply.assume_sent()

    def _give_up(self, job: Job, reason: str) -> None:
        """Tell the user that no answer comes, and leave the message to the operator."""
        try:
            if job.message.kind not in ("said", "missed"):  # else nobody waits for it
                job.reply.give_up(self.texts["undeliverable"])
        except tim.IMError as error:
            logger.warning("%s: the user is not told: %s", job.work.claim.id, error)
        self.workers.when_store_works(self.store.fail, job.work.claim, reason)

    def close(self, drain: float = DRAIN) -> None:
        """Finish what `drain` seconds allow; leave the rest to the next process."""
        self.workers.close(drain)


def read_message(data: Json) -> tim.Message:
    """Return the message that the store kept as `data`."""
    return tim.Message(**data | {"images": tuple(data["images"])})


def make_bot(config: Config | None = None) -> Bot:
    """Return a bot that is not at work; if the settings are wrong, say so and exit."""
    try:
        config = config or Config.from_env()
        return Bot(config, config.open_store(), config.im_client())
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(3)  # by which gunicorn knows not to start the worker again


def create_app(config: Config | None = None) -> Flask:
    """Return the WSGI app, its bot at work; the environment has the settings."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_CALLBACK
    context = click.get_current_context(silent=True)
    if context:
        for name in COMMAND_LINE:
            for command in resolve_name(name):
                app.cli.add_command(command)
    if context and context.info_name != "run":
        return app  # a command of `flask` makes what it needs
    app.extensions["bot"] = bot = make_bot(config)
    config = bot.config
    set_up_logging(config.log_level)
    for line in misspelt(os.environ, config.ai_secret_keys):
        logger.warning(line)
    add_routes(app, bot)
    atexit.register(bot.close)
    sys.setswitchinterval(0.002)  # seconds; with 0.005 callbacks wait for threads
    gc.freeze()  # what is there now stays, and need not be looked through
    gc.set_threshold(10_000)  # objects; with 700 it takes 2 % of the CPU
    bot.workers.start()
    line = "version %s, store %s, AI service %s, replies %s"
    scheme = config.database_url.partition(":")[0]
    logger.info(line, __version__, scheme, config.ai_provider, config.reply_mode)
    return app


def add_routes(app: Flask, bot: Bot) -> None:
    """Add what Tencent and an operator call."""
    nicks = {robot: persona.nick for robot, persona in bot.config.robots.items()}

    @app.post("/im")
    def im() -> tuple[Json, int]:
        try:
            check(bot.config, request.args)
            for message in read_messages(request.args, read_body(), nicks):
                bot.accept(message)
        except BadSignature as error:
            return refuse(403, str(error))
        except tim.BadEvent as error:
            return refuse(400, str(error))
        except StoreError as error:
            if bot.missed:
                bot.missed.refused_at = time.time()
            return refuse(503, str(error))
        return OK, 200

    @app.get("/healthz")
    def healthz() -> tuple[Json, int]:
        try:
            return {"status": "ok", **bot.store.stats()}, 200
        except StoreError as error:
            logger.warning("no health: %s", error)
            return {"status": "the store does not work"}, 503

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[Json, int]:
        return refuse(error.code or 500, error.description or error.name)


def read_body() -> bytes:
    """Return the body of a callback. Raises tim.BadEvent if it is broken."""
    try:
        return request.get_data()
    except HTTPException:  # it is too large
        raise
    except Exception as error:  # gunicorn has a class of its own for every fault
        raise tim.BadEvent(f"the body is broken ({type(error).__name__})") from None


def refuse(status: int, why: str) -> tuple[Json, int]:
    """Return an error in Tencent's shape.

    What was not read of the body is read, or the connection would be of no use.
    """
    if request.path == "/im":
        logger.warning("callback refused with %d: %s", status, why)
    if request.environ.get("wsgi.input_terminated"):
        with suppress(Exception):  # it is broken, and gunicorn closes
            for _ in range(0, LARGEST_REST, PIECE):
                if not request.environ["wsgi.input"].read(PIECE):
                    break
    return {"ActionStatus": "FAIL", "ErrorInfo": why, "ErrorCode": 1}, status


def set_up_logging(level: str) -> None:
    """Log to standard output, without what holds a signature or a text."""
    handler = logging.StreamHandler(sys.stdout)
    line = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler.setFormatter(LineFormatter(line))
    logging.basicConfig(level=level, handlers=[handler])
    for name in ("urllib3", "werkzeug"):  # they log URLs, with UserSig and Sign
        logging.getLogger(name).setLevel(logging.WARNING)


class LineFormatter(logging.Formatter):
    """Shows the parts of a message's id, which tabs separate, with spaces."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub("\t+", " ", super().format(record))
