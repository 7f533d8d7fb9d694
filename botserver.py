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
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple

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
from providers import Provider, ProviderError, new_memory, words
from replies import PlainReply
from session import CancelScope
from store import MAX_ATTEMPTS, MINUTE, NO_LIMIT, Added, Store, StoreError
from usersig import BadSignature, check_callback
from workers import InFlight, LeaseLost, Workers, log_failure

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
HISTORY_CHARACTERS = 24_000  # of old turns in one question

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


class Said(NamedTuple):
    """What is to be sent as the answer to a message; an empty text is not sent."""

    text: str
    note: str = ""  # what is shown below the text, but never remembered
    remember: bool = False  # the text, in the memory of the chat
    failed: bool = False  # it says why there is no answer

    def shown(self) -> str:
        """Return all that the user sees."""
        return "\n\n".join(filter(None, (self.text, self.note)))


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
        self._providers: dict[Persona, Provider] = {}
        modes = {config.reply_mode, *(p.reply_mode for p in config.robots.values())}
        self._replies = {mode: load(REPLIES, mode) for mode in modes if mode}
        self.missed: Any = None  # what looks for messages whose callbacks failed
        for name in CATCHING_UP if config.catch_up else ():
            parts = (config, store, im, self.workers, self.accept_missed)
            self.missed = resolve_name(name)(*parts)

    def provider(self, robot: str) -> Provider:
        """Return the AI service of a robot."""
        persona = self.config.persona(robot)
        if persona not in self._providers:
            self._providers[persona] = self.config.provider(persona)
        return self._providers[persona]

    def accept(self, message: tim.Message) -> None:
        """Store a message and wake a thread for it. Raises StoreError."""
        if self.workers.backlog >= self.config.max_backlog:
            raise StoreError("too many messages wait (MAX_BACKLOG)")
        chat = message.conversation(per_member=not self.shared_memory)
        if not self._allows(message):
            self._refuse(message, chat, "not_allowed")
        elif commands.is_stop(message):
            self._stop(message, chat)
        else:
            if self.missed:
                self.missed.guard(message, chat)
            added = self._add(message, chat)
            if added in (Added.QUEUE_FULL, Added.RATE_LIMITED):
                self._refuse(message, chat, added)

    def accept_missed(self, message: tim.Message) -> None:
        """Store a message that came by no callback; nobody is told if it is refused."""
        if self._allows(message) and not commands.is_stop(message):
            chat = message.conversation(per_member=not self.shared_memory)
            self._add(message, chat)

    def _add(self, message: tim.Message, chat: str) -> Added:
        room, rate = self.config.max_waiting, self.config.rate_limit or NO_LIMIT
        limits, sent = (message.user, room, rate), message.sent
        added = self.store.add(message.id, chat, message.data(), *limits, sent=sent)
        self._wake(added)
        return added

    def _allows(self, message: tim.Message) -> bool:
        users, groups = self.config.allow_users, self.config.allow_groups
        known_user = not users or message.user in users
        return known_user and (not groups or message.group in ("", *groups))

    def _refuse(self, message: tim.Message, chat: str, reason: str) -> None:
        """Tell a chat why messages are refused, unless it was told lately.

        The answer is there already, and does not wait behind those of the chat.
        """
        every = MINUTE if reason == Added.RATE_LIMITED else NOTICE_EVERY
        place = (message.robot, message.group or message.user)
        id = "\t".join((reason, *place, f"{time.time() // every:.0f}"))
        empty = replace(message, text="", quote="", images=())  # nobody needs them
        text = self.texts[reason]
        self._wake(self.store.add(id, f"{chat}\tnotice", empty.data(), reply=text))

    def _stop(self, message: tim.Message, chat: str) -> None:
        """Stop the answer of a chat. The confirmation does not wait behind it."""
        text = "" if message.kind == "stop" else self.texts["stop"]
        data, beside = message.data(), f"{chat}\tstop"
        room = self.config.max_waiting
        added = self.store.add(message.id, beside, data, room=room, reply=text)
        if added == Added.NEW:
            self.workers.cancel(chat)
        self._wake(added)

    def _wake(self, added: Added) -> None:
        if added == Added.NEW:
            self.workers.backlog += 1
            self.workers.wake()

    def answer(self, work: InFlight) -> None:
        """Answer a message that a thread of the pool has claimed.

        Raises LeaseLost, StoreError; the pool gives the message back then.
        """
        job, began = self._begin(work), time.monotonic()
        if self._missed_first(job):
            return
        try:
            if work.claim.spent:
                return self._give_up(
                    job, f"its work was cut short {MAX_ATTEMPTS} times"
                )
            self._forget_unsure(job)
            said = self._saved(job) or self._say(job)
            asked = time.monotonic()
            if text := said.shown():
                job.reply.close(text, said.failed)
        except tim.IMError as error:
            return self._not_sent(job, error)
        # It is sent: if the store is away now, it must not be sent again.
        self.workers.when_store_works(self.store.finish, work.claim)
        sent = time.monotonic()
        took = (round((asked - began) * 1000), round((sent - asked) * 1000))
        line = "%s: %s, ai %d ms, im %d ms, %d parts"
        logger.info(line, work.claim.id, job.outcome, *took, job.reply.parts)

    def _missed_first(self, job: Job) -> bool:
        """Look up what was missed, if that is the work, or has to come before it."""
        message, claim = job.message, job.work.claim
        if message.kind == "missed":
            if self.missed and not claim.spent:
                self.missed.run(job.work, message)
            else:
                self.workers.when_store_works(self.store.finish, claim)
            return True
        begun = claim.reply is not None or claim.progress
        if (
            begun
            or not self.missed
            or not self.missed.guard(message, claim.conversation)
        ):
            return False
        self.store.release(claim, 0.0)
        self.workers.wake()
        return True

    def _begin(self, work: InFlight) -> Job:
        message, progress = read_message(work.claim.data), dict(work.claim.progress)
        mode = self.config.persona(message.robot).reply_mode or self.config.reply_mode
        reply: PlainReply = self._replies[mode](
            self.im,
            message,
            work.claim.seq,
            progress,
            partial(self._note, work),
            self.texts["replaced"],
        )
        trace = tim.numbers(message.id, work.claim.seq, 0)[1]
        scope = CancelScope(self.config.ai_timeout, str(trace))
        work.cancel, work.tick = scope.cancel, partial(self._keep_alive, reply)
        return Job(work, message, scope, progress, reply)

    def _save(
        self, work: InFlight, text: str | None, progress: Json, remember: bool = False
    ) -> None:
        if not self.store.save_reply(work.claim, text, progress, remember):
            raise LeaseLost

    def _note(self, work: InFlight, progress: Json) -> None:
        """Keep how far sending has come; if the store is away, it stays in memory."""
        with suppress(StoreError):
            self._save(work, None, progress)

    def _keep_alive(self, reply: PlainReply) -> None:
        if time.monotonic() - reply.last_sent > reply.keep_alive_after:
            self.workers.in_background(reply.keep_alive)

    def _saved(self, job: Job) -> Said | None:
        """Return the answer that was saved before, perhaps by a process now dead."""
        text, progress = job.work.claim.reply, job.progress
        note, failed = progress.get("note", ""), bool(progress.get("failed"))
        return None if text is None else Said(text, note, failed=failed)

    def _say(self, job: Job) -> Said:
        """Return the answer, saved: a restart sends it, and does not pay for it again.

        Raises tim.IMError if the reply cannot be opened.
        """
        if builtin := self._builtin_reply(job):
            said = Said(builtin)
        else:
            job.reply.open()
            said = self.ask(job)
        job.progress |= {"note": said.note, "failed": said.failed}
        remember = said.remember and self.config.history_turns > 0
        self._save_patiently(job, said.text, remember)
        return said

    def _save_patiently(self, job: Job, text: str, remember: bool) -> None:
        """Save an answer, also if the store is away for a moment: it was paid for."""
        end = time.monotonic() + SAVE_PATIENCE
        while True:
            try:
                return self._save(job.work, text, job.progress, remember)
            except StoreError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def _builtin_reply(self, job: Job) -> str:
        """Return what the bot itself says; "" to ask the AI."""
        message = job.message
        if message.kind == "unsupported":
            return self.texts["unsupported"]
        if found := commands.find(message):
            return self._run_command(job, *found)
        sees = self.provider(message.robot).service.images
        readable = message.text or message.quote or sees
        return "" if readable else self.texts["no_vision"]

    def _run_command(self, job: Job, command: commands.Command, argument: str) -> str:
        message, chat = job.message, job.work.claim.conversation
        shared = bool(message.group) and self.shared_memory
        where = (message, chat, self.store, self.config.bot_language, shared)
        try:
            return command.run(commands.Chat(*where), argument)
        except StoreError:
            raise
        except Exception as error:
            log_failure(f"{job.work.claim.id}: the command", error)
            return self.texts["command_failed"]

    def ask(self, job: Job) -> Said:
        """Return the AI's answer, shown while it grows, or why there is none."""
        job.outcome, text = "answered", ""
        provider = self.provider(job.message.robot)
        memory = self._memory(job) if provider.service.remembers else None
        chat, interval = self._chat(job, provider, memory), job.reply.update_interval
        try:
            for text in provider.chat(chat, job.scope, interval, memory):
                if not job.scope.ended:  # else it is saved and closed at once
                    job.reply.update(text)
            said = Said(text, remember=True)
        except ProviderError as error:
            if job.work.lost:
                raise LeaseLost from None
            said = self._cut(job, error, text, chat)
        if not memory:
            return said
        name = job.work.claim.conversation
        self.workers.when_store_works(self.store.put, name, memory)
        return said._replace(remember=False)  # the service does

    def _memory(self, job: Job) -> Json:
        """Return what a service that remembers knows the chat by."""
        message, name = job.message, job.work.claim.conversation
        memory = self.store.get(name)
        if not memory:
            shared = message.group if self.shared_memory else ""
            memory = new_memory(shared or message.user)
            self.store.put(name, memory)  # after a crash the session is the same
        return memory

    def _cut(self, job: Job, error: ProviderError, text: str, chat: list[Json]) -> Said:
        """Return what to show instead of an answer, or after half of one."""
        job.outcome, why = error.kind, self.texts.get(error.kind, self.texts["busy"])
        if error.kind in ("stopped", "length"):
            return Said(text, why, remember=bool(text))
        details = redact(str(error), chat)
        logger.warning("no answer for %s: %s", job.work.claim.id, details)
        if not text:
            return Said(why, failed=True)
        return Said(text, self.texts["cut"].format(why))

    def _chat(self, job: Job, provider: Provider, memory: Json | None) -> list[Json]:
        """Return the question as the AI service gets it: prompt, old turns, new one."""
        message, chat = job.message, job.work.claim.conversation
        turns = [{"role": "user", "content": self._question(message, provider)}]
        room, history = HISTORY_CHARACTERS, self._history(chat, memory)
        for old, reply in history[::-1]:
            asked = self._spoken(old)
            room -= len(asked) + len(reply)
            if room < 0:
                break
            turns.append({"role": "assistant", "content": reply})
            turns.append({"role": "user", "content": asked})
        prompt = self.config.persona(message.robot).system_prompt
        prompt = prompt or self.config.ai_system_prompt
        if memory and prompt == Config.ai_system_prompt:
            prompt = ""  # nobody set it, and the service has one of its own
        return [*turns, {"role": "system", "content": prompt}][::-1]

    def _history(self, chat: str, memory: Json | None) -> list[tuple[tim.Message, str]]:
        """Return the old turns of a chat. A service that remembers does not know those
        that began with the robot since it was asked last."""
        found = self.store.history(chat, self.config.history_turns)
        turns = [(read_message(data), reply) for data, reply in found]
        if memory:
            turns = [turn for turn in turns if turn[0].kind == "said"]
            ids = [message.id for message, _ in turns]
            if memory.get("told") in ids:
                turns = turns[ids.index(memory["told"]) + 1 :]
            memory["told"] = ids[-1] if ids else ""
        return turns

    def _spoken(self, message: tim.Message) -> str:
        """Return a question as a turn of the chat. In a group its first line says who
        asked; the others are indented, so that none looks like another member's."""
        text = message.text or ("[image]" if message.images else "")
        if message.quote:
            lines = [f"> {line}" for line in message.quote.splitlines()]
            text = "\n".join([*lines, "", text]).rstrip()
        if not (text and message.group and self.shared_memory):
            return text
        return f"{message.user}: {text}".replace("\n", "\n    ")

    def _question(self, message: tim.Message, provider: Provider) -> Any:
        text = self._spoken(message)
        if not message.images or not provider.service.images:
            return text
        urls = [{"type": "image_url", "image_url": {"url": u}} for u in message.images]
        return [{"type": "text", "text": text}, *urls]

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
        self._note(job.work, progress)
        self.workers.when_store_works(self.store.release, claim, delay)

    def _forget_unsure(self, job: Job) -> None:
        """Count as sent what may have arrived, once Tencent may have forgotten it, but
        for a part that Tencent's history surely lacks."""
        unsure, part = job.progress.get("unsure", {}), str(job.progress.get("at"))
        known = KNOWN_GROUP if job.message.group else KNOWN_C2C
        age = time.time() - unsure.get(part, time.time())
        if part in unsure and not 0 <= age <= known:  # the clock may be set back
            again = self._is_absent(job, int(part))
            del unsure[part]
            what = "did not arrive" if again else "counts as sent, unconfirmed"
            logger.warning("%s %s", job.work.claim.id, what)
            if not again:
                job.reply.assume_sent()

    def _is_absent(self, job: Job, part: int) -> bool:
        """Return whether Tencent's history surely lacks a part of an answer."""
        if part < 0 or job.message.topic or not self.missed:
            return False  # nobody knows
        found = self.missed.is_absent(job.message, job.work.claim.seq, part + 1)
        return bool(found)

    def _give_up(self, job: Job, reason: str) -> None:
        """Tell the user that no answer comes, and leave the message to the operator."""
        try:
            if job.message.kind != "said":  # else nobody waits for it
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


def redact(details: str, chat: list[Json]) -> str:
    """Return an error's details for the log, in short if they repeat what was said."""
    said = [words(turn) for turn in chat if turn["role"] != "system"]
    told, all_said = details.encode(), "\n".join(said).encode()
    pieces = (told[start : start + 12] for start in range(len(told) - 11))
    quotes = any(piece in all_said for piece in pieces)
    if quotes or any(len(text) > 2 and text in details for text in said):
        return f"{details.split(': ')[0]}: (it repeats the chat)"
    return details


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
    leave_on_sigterm(bot)
    atexit.register(bot.close)
    sys.setswitchinterval(0.002)  # seconds; with 0.005 callbacks wait for threads
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
    """Return an error in Tencent's shape."""
    if request.path == "/im":
        logger.warning("callback refused with %d: %s", status, why)
    read_rest()
    return {"ActionStatus": "FAIL", "ErrorInfo": why, "ErrorCode": 1}, status


def read_rest() -> None:
    """Read a body to its end, or the connection would be of no use afterwards."""
    if request.environ.get("wsgi.input_terminated"):
        with suppress(Exception):  # it is broken, and gunicorn closes
            for _ in range(0, LARGEST_REST, PIECE):
                if not request.environ["wsgi.input"].read(PIECE):
                    break


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


def leave_on_sigterm(bot: Bot) -> None:
    """Claim no more when gunicorn stops a worker, not seconds later at its exit."""
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, frame: Any) -> None:
        bot.workers.draining = True
        before(number, frame)  # type: ignore[operator,misc]

    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
