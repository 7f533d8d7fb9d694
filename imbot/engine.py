"""The wiring below botserver.Bot: settings, store, threads, services, limits, shutdown.

`Engine` takes the work of Bot's five verbs to where it belongs; a fork seldom edits it.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from flask import Flask, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import is_running_from_reloader

from . import commands
from .ai import Provider, Service
from .chat import Chat
from .delivery import Delivery, Outbox
from .group_context import context
from .http import CancelScope
from .missed import Missed, NothingMissed
from .queue import (
    MAX_ATTEMPTS,
    NO_LIMIT,
    Added,
    Claim,
    Job,
    Store,
    StoreBusy,
    StoreError,
    Workers,
    open_store,
)
from .replies import PlainReply
from .settings import Persona, Settings, SettingsError, misspelt
from .tencent import BadEvent, Client, Message, Nicks, numbers, read_mention
from .texts import TEXTS
from .timing import NORMAL, Timing
from .web import refuse, set_up_logging

CHECK_EVERY = 1.0  # seconds; a check writes, and anybody can ask for /healthz
DRAIN = 20.0  # seconds to finish answers at shutdown
PHONES = ("ios", "android")  # of a callback's OptPlatform
FOLDER = Path(__file__).parent.parent
NO_CONF = (
    "gunicorn.conf.py was not read, so threads and timeouts are gunicorn's own: start "
    "gunicorn in %s, or add --config %s/gunicorn.conf.py"
)

logger = logging.getLogger(__name__)


class Engine:
    """What Bot inherits. Bot gives it the tables, the settings and the signatures."""

    services: ClassVar[Mapping[str, Service]]
    replies: ClassVar[Mapping[str, type[PlainReply]]]
    settings_type: ClassVar[type[Settings]] = Settings
    make_sig: ClassVar[Callable[..., str]]
    bad_signature: ClassVar[type[Exception]]

    def __init__(self, settings: Settings, store: Store, timing: Timing) -> None:
        self.settings, self.store = settings, store
        self._checked_at = -CHECK_EVERY  # time.monotonic()
        self.texts = TEXTS[settings.bot_language]
        self.im = self.connect(settings, timing)
        self.nicks = Nicks(self.im, {r: p.nick for r, p in settings.robots.items()})
        personas = {Persona(), *settings.robots.values()}
        self.providers = {
            p: settings.provider(p, self.services, timing) for p in personas
        }
        seconds = settings.retention_days * 86400
        self.workers = Workers(store, self.work, settings.threads(), seconds, timing)
        self.workers.share, self.workers.lane_of = settings.worker_threads, self.lane
        shared = settings, store, self.workers, self.im
        self.outbox = Outbox(*shared, self.texts, timing)
        self.missed: Missed | NothingMissed = NothingMissed()
        self._advised = False  # see _advise
        if settings.catch_up:
            accept = partial(self.accept, was_missed=True)
            self.missed = Missed(*shared, accept, self.nicks, timing)

    @classmethod
    def create(cls, settings: Settings | None = None, timing: Timing = NORMAL) -> Self:
        """Create a bot without starting it. Exit with a sentence if it cannot work."""
        try:
            settings = settings or cls.read_settings()
            url, app = settings.database_url, settings.im_sdkappid
            store = open_store(url, timing, app, settings.database_wait)
            return cls(settings, store, timing)
        except (SettingsError, StoreError) as error:
            at = "DATABASE_URL: {}." if isinstance(error, StoreError) else "{}"
            print(at.format(error), file=sys.stderr)
            # gunicorn does not restart a worker that exits with 3; flask's reloader
            # would restart it at once, for ever.
            sys.exit(1 if is_running_from_reloader() else 3)

    @classmethod
    def read_settings(cls) -> Settings:
        """Read the settings from the environment. Raises SettingsError."""
        return cls.settings_type.from_env(cls.services, cls.replies)

    @classmethod
    def connect(cls, settings: Settings, timing: Timing = NORMAL) -> Client:
        """Create the REST client. Its calls are signed with a UserSig made here."""
        sign = partial(cls.make_sig, settings.im_sdkappid, settings.im_key)
        about = settings.im_sdkappid, settings.im_admin, sign, settings.threads()
        return Client(settings.im_api_url, *about, timing)

    def start(self, app: Flask) -> None:
        """Start the threads; turn errors into Tencent's JSON."""
        app.extensions["bot"] = self
        app.register_error_handler(self.bad_signature, partial(refuse, 403))
        app.register_error_handler(BadEvent, partial(refuse, 400))
        app.register_error_handler(StoreError, self.refuse_for_now)
        app.register_error_handler(HTTPException, partial(refuse, 500))
        settings = self.settings
        set_up_logging(settings.log_level, settings.secrets())
        for line in misspelt(os.environ, settings.ai_secret_keys, type(settings)):
            logger.warning(line)
        under_gunicorn = "gunicorn" in os.environ.get("SERVER_SOFTWARE", "")
        if under_gunicorn and "GUNICORN_CONF_READ" not in os.environ:
            logger.warning(NO_CONF, FOLDER, FOLDER)
        with suppress(StoreError):  # the threads notice that, and wait
            # Before any callback: other servers may work on what this one takes.
            self.missed.beat()
        self.workers.start()
        atexit.register(self.close)
        store, _, _ = settings.database_url.partition(":")
        about = store, settings.ai_provider, settings.reply_mode
        logger.info("store %s, AI service %s, replies %s", *about)

    def close(self, drain: float = DRAIN) -> None:
        """Finish what fits into `drain` seconds; leave the rest to the next process."""
        self.workers.close(drain)
        with suppress(StoreError):
            self.missed.beat()  # what was refused meanwhile is for others

    def check_store(self) -> None:
        """Raise StoreError if no message can be stored. A slow store is not down."""
        if time.monotonic() > self._checked_at + CHECK_EVERY:
            with suppress(StoreBusy):
                self.store.check()
            self._checked_at = time.monotonic()

    def refuse_for_now(self, error: Exception) -> Any:
        """Answer 503. Tencent repeats no callback: the message is looked up later."""
        if request.path != "/healthz":
            self.missed.note_refusal()
            return refuse(503, error)
        logger.warning("no health: %s", error)
        return {"status": "the store does not work"}, 503

    def accept(self, message: Message, was_missed: bool = False) -> None:
        """See Bot."""
        raise NotImplementedError

    def answer(self, chat: Chat, delivery: Delivery) -> None:
        """See Bot."""
        raise NotImplementedError

    def enqueue(self, message: Message, was_missed: bool = False) -> None:
        """Put a message into the queue, or tell the chat which limit it hit.

        Raises StoreError, so that Tencent gets a 503.
        """
        if not was_missed and self.workers.backlog >= self.settings.max_backlog:
            raise StoreError("too many messages wait (MAX_BACKLOG)")
        self._advise(message)
        if message.kind == "blank":
            self.unlock(message)
        elif not self.may_ask(message):
            self.refuse(message, "not_allowed")
        elif limit := self._add(message, self.conversation(message)):
            self.refuse(message, limit)

    def recall(self, recalled: Message) -> None:
        """Forget what a user took back; if it still waits, it is not answered."""
        escaped = re.sub(r"([\\%_])", r"\\\1", recalled.id)  # group, topic, MsgSeq
        id = f"%\t{escaped}\t%" if recalled.group else recalled.id
        self.store.recall(id, recalled.data())

    def refuse(self, message: Message, why: str) -> None:
        """Tell the chat why, unless it was told a moment ago."""
        if not self.outbox.tell(message, self.conversation(message), why):
            self.unlock(message)

    def unlock(self, message: Message) -> None:
        """Answer with an empty message if TUIKit's input would stay locked."""
        if not message.group and self._reply_mode(message).unlocks:
            self.outbox.say(message, self.conversation(message), message.id, "")

    def _add(self, message: Message, chat: str) -> str:
        """Add a message to the store; return the limit it hit, or "".

        A member has a quarter of what a group may have waiting.
        """
        room = self.settings.max_waiting
        added = self.workers.add(
            message.id,
            chat,
            message.data(),
            room=room,
            share=max(1, room // 4) if message.group else None,
            **self._rate(message),
        )
        return "" if added in (Added.NEW, Added.KNOWN) else added

    def _rate(self, message: Message) -> dict[str, Any]:
        """Return what RATE_LIMIT counts a message by."""
        rate = self.settings.rate_limit or NO_LIMIT
        return {"asker": message.user, "sent": message.sent, "rate": rate}

    def may_ask(self, message: Message) -> bool:
        """Check ALLOW_USERS and ALLOW_GROUPS."""
        users, groups = self.settings.allow_users, self.settings.allow_groups
        known_user = not users or message.user in users
        return known_user and (not groups or message.group in ("", *groups))

    def stop(self, message: Message, was_missed: bool = False) -> None:
        """Stop the answer in progress in a chat."""
        if not self.may_ask(message):
            return self.refuse(message, "not_allowed")
        if was_missed:
            return self.unlock(message)  # that answer ended long ago
        chat = self.conversation(message)
        by_button = message.kind == "stop"  # whoever pressed it sees that it worked
        text = "" if by_button else self.texts["stop"]
        limits = self._rate(message)
        added = self.outbox.say(message, chat, message.id, text, **limits)
        if added == Added.RATE_LIMITED:
            self.refuse(message, added)
        if added != Added.KNOWN:
            self.workers.cancel(chat)

    def conversation(self, message: Message) -> str:
        """Return the key of a message's conversation."""
        return message.conversation(self.settings.group_memory == "member")

    def talk(self, message: Message, after: int) -> str:
        """Return what the group wrote before a mention (GROUP_CONTEXT)."""
        nick = self.nicks.get(message.robot) or ""
        return context(self.im, message, self.settings.group_context, nick, after)

    def provider(self, chat: Chat) -> Provider:
        """Return the AI service of the robot that was addressed."""
        return self.providers[chat.persona]

    def work(self, job: Job) -> None:
        """Do what a claimed message needs, in a thread of the pool."""
        message = self.nicks.settle(Message.load(job.claim.data))
        chat = self._chat(message, job.claim.conversation)
        delivery = Delivery(self.outbox, job, chat, self._reply_mode(message))
        # An answer that is kept is sent: only making one may end the process again.
        too_often = job.claim.exhausted and not delivery.kept
        if too_often or delivery.progress.gives_up:
            return delivery.give_up(f"its work was cut short {MAX_ATTEMPTS} times")
        if not self.missed.comes_first(job.claim, message):
            delivery.settle()
            self.answer(chat, delivery)

    def lane(self, claim: Claim) -> str:
        """Return which AI service a message has to wait for, "" if for none.

        Commands, and answers that are only sent again, go past a slow service. It is a
        hash, since an address may hold a key.
        """
        message = Message.load(claim.data)
        if message.kind == "mention":  # its robot's nick is not known yet
            message = read_mention(message, [(message.robot, "")])
        asks = message.kind == "question" and not commands.find(message)
        if not asks or claim.exhausted or claim.reply is not None:
            return ""
        url = self.providers[self.settings.persona(message.robot)].url
        return hashlib.sha256(url.encode()).hexdigest()[:8]

    def _chat(self, message: Message, conversation: str) -> Chat:
        settings = self.settings
        first = 0 if self._reply_mode(message).update_interval else 1  # part sent
        scope = CancelScope(settings.ai_timeout, str(numbers(message, first)[1]))
        shared = bool(message.group) and settings.group_memory == "group"
        persona, language = settings.persona(message.robot), settings.bot_language
        about = persona, language, self.texts, shared, settings.history_turns, scope
        return Chat(message, conversation, self.store, *about)

    def _reply_mode(self, message: Message) -> type[PlainReply]:
        """Return how this client is shown answers."""
        persona, settings = self.settings.persona(message.robot), self.settings
        mode = persona.reply_mode or settings.reply_mode
        if is_on_phone(message):
            mode = persona.reply_mode_mobile or settings.reply_mode_mobile or mode
        return self.replies[mode]

    def _advise(self, message: Message) -> None:
        """Log once what to set if phones' TUIKit would stay locked."""
        if self._advised or not is_on_phone(message):
            return
        self._advised = True
        if not self._reply_mode(message).unlocks:
            logger.info(
                "a user writes from %s: if that app uses TUIKit, set "
                "REPLY_MODE_MOBILE=card or custom, or its input stays locked after "
                "the first question",
                message.platform,
            )


def is_on_phone(message: Message) -> bool:
    """Return whether a message comes from a phone, and from no group's member."""
    return not message.group and message.platform.lower() in PHONES
