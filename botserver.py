"""A chatbot server for Tencent Cloud IM.

    gunicorn 'botserver:create_app()'

Tencent calls POST /im when a user writes to a robot account (@RBT#...) or mentions one
in a group. The message is stored and Tencent gets its 200 within milliseconds. A thread
of the pool then asks the AI service and sends the answer back as the robot.

Follow a message through this file from top to bottom: `im`, `Bot.accept`, `Bot.answer`,
`Bot.compose`, `Bot.ask`. The AI services are in providers.py. What makes it reliable
(the queue on disk, retries, growing messages) is in imbot/.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from flask import Flask, request
from werkzeug.exceptions import HTTPException

from imbot import cli, commands
from imbot.ai import Provider, ProviderError
from imbot.commands import Chat, command
from imbot.delivery import Answer, Outbox
from imbot.growing import CardReply, EditedReply, StreamReply
from imbot.http import CancelScope
from imbot.missed import Missed, NothingMissed
from imbot.prompt import build_prompt, redact
from imbot.queue import (
    MAX_ATTEMPTS,
    NO_LIMIT,
    Added,
    Job,
    LeaseLost,
    Store,
    StoreError,
    Workers,
    open_store,
)
from imbot.replies import PlainReply
from imbot.settings import Persona, Settings, SettingsError, misspelt
from imbot.tencent import (
    ROBOT,
    BadEvent,
    Client,
    IMError,
    Message,
    numbers,
    read_messages,
)
from imbot.texts import TEXTS
from imbot.timing import NORMAL, Timing
from imbot.web import OK, read_body, refuse, set_up_logging
from providers import PROVIDERS
from usersig import BadSignature, check_callback, gen_user_sig

__version__ = "2.0.0"
DRAIN = 20.0  # seconds to finish answers at shutdown
REPLIES = {  # REPLY_MODE -> how an answer is shown; add yours
    "whole": PlainReply,
    "modify": EditedReply,
    "custom": CardReply,
    "stream": StreamReply,
}
logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None, timing: Timing = NORMAL) -> Flask:
    """Create the WSGI app and start the bot. Settings come from the environment."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20  # bytes of a callback
    if cli.add_to(app, read_settings, connect, PROVIDERS):
        return app  # running a `flask` command, not serving
    app.extensions["bot"] = bot = make_bot(settings, timing)
    nicks = {robot: persona.nick for robot, persona in bot.settings.robots.items()}

    @app.post("/im")
    def im() -> dict[str, Any]:
        bot.check_signature(request.args)
        for message in read_messages(request.args, read_body(), nicks):
            bot.accept(message)
        return OK

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"status": "ok", **bot.store.stats()}

    app.register_error_handler(BadSignature, partial(refuse, 403))
    app.register_error_handler(BadEvent, partial(refuse, 400))
    app.register_error_handler(StoreError, bot.refuse_for_now)
    app.register_error_handler(HTTPException, partial(refuse, 500))
    set_up_logging(bot.settings.log_level)
    for line in misspelt(os.environ, bot.settings.ai_secret_keys):
        logger.warning(line)
    bot.workers.start()
    atexit.register(bot.close)
    logger.info(
        "version %s, store %s, AI service %s, replies %s",
        __version__,
        bot.settings.database_url.partition(":")[0],
        bot.settings.ai_provider,
        bot.settings.reply_mode,
    )
    return app


def make_bot(settings: Settings | None = None, timing: Timing = NORMAL) -> Bot:
    """Create a bot without starting it. Exit with a message if a setting is wrong."""
    try:
        settings = settings or read_settings()
        return Bot(settings, open_store(settings.database_url, timing), timing)
    except (SettingsError, StoreError) as error:
        at = "DATABASE_URL: {}." if isinstance(error, StoreError) else "{}"
        print(at.format(error), file=sys.stderr)
        sys.exit(3)  # gunicorn does not restart a worker that exits with 3


def read_settings() -> Settings:
    """Read the settings from the environment. Raises SettingsError."""
    return Settings.from_env(PROVIDERS, REPLIES)


def connect(settings: Settings, timing: Timing = NORMAL) -> Client:
    """Create the REST client. Its calls are signed with a UserSig generated here."""
    sign = partial(gen_user_sig, settings.im_sdkappid, settings.im_key)
    app, admin = settings.im_sdkappid, settings.im_admin
    threads = settings.worker_threads
    return Client(settings.im_api_url, app, admin, sign, threads, timing)


class Bot:
    """Accepts messages and answers them in a pool of threads."""

    def __init__(self, settings: Settings, store: Store, timing: Timing) -> None:
        self.settings, self.store = settings, store
        self.texts = TEXTS[settings.bot_language]
        self.im = connect(settings, timing)
        personas = {Persona(), *settings.robots.values()}
        self.providers = {p: settings.provider(p, PROVIDERS) for p in personas}
        days, threads = settings.retention_days, settings.worker_threads
        self.workers = Workers(store, self.answer, threads, days * 86400, timing)
        self.missed: Missed | NothingMissed = NothingMissed()
        if settings.catch_up:
            accept = partial(self.accept, was_missed=True)
            self.missed = Missed(settings, store, self.im, self.workers, accept)
        about = (self.texts, self.missed.is_absent, settings.max_waiting, timing)
        self.outbox = Outbox(store, self.workers, self.im, *about)

    def check_signature(self, query: Any) -> None:
        """Raise BadSignature unless the callback comes from Tencent, for our app."""
        app = str(self.settings.im_sdkappid)
        if tokens := self.settings.im_callback_token:
            check_callback(tokens, query.get("Sign", ""), query.get("RequestTime", ""))
        if query.get("SdkAppid", app) != app:
            raise BadSignature("SdkAppid is not this server's app")

    def accept(self, message: Message, was_missed: bool = False) -> None:
        """Store a message and wake a thread for it. Raises StoreError.

        If a limit refuses it, the chat is told, except for messages of the look-up.
        """
        if message.user.upper().startswith(ROBOT):
            return  # two robots would answer each other for ever
        if not was_missed and self.workers.backlog >= self.settings.max_backlog:
            raise StoreError("too many messages wait (MAX_BACKLOG)")
        chat = message.conversation(self.settings.group_memory == "member")
        if not self.may_ask(message):
            refused = "not_allowed"
        elif is_stop(message):
            refused = ""
            if not was_missed:
                self.stop(message, chat)
        else:
            if not was_missed:
                self.missed.guard(message, chat)
            refused = self.enqueue(message, chat)
        if refused and not was_missed:
            self.outbox.tell(message, chat, refused)

    def enqueue(self, message: Message, chat: str) -> str:
        """Add a message to the queue; return the limit it hit, or ""."""
        settings = self.settings
        added = self.workers.add(
            message.id,
            chat,
            message.data(),
            asker=message.user,
            sent=message.sent,
            room=settings.max_waiting,
            rate=settings.rate_limit or NO_LIMIT,
        )
        return "" if added in (Added.NEW, Added.KNOWN) else added

    def may_ask(self, message: Message) -> bool:
        """Check ALLOW_USERS and ALLOW_GROUPS."""
        users, groups = self.settings.allow_users, self.settings.allow_groups
        known_user = not users or message.user in users
        return known_user and (not groups or message.group in ("", *groups))

    def stop(self, message: Message, chat: str) -> None:
        """Stop the answer in progress in a chat."""
        by_button = message.kind == "stop"  # whoever pressed it sees that it worked
        text = "" if by_button else self.texts["stop"]
        if self.outbox.say(message, chat, message.id, text):
            self.workers.cancel(chat)

    def answer(self, job: Job) -> None:
        """Answer one message, in a pool thread; after a crash, in another process."""
        message = Message.load(job.claim.data)
        settings = self.settings
        mode = settings.persona(message.robot).reply_mode or settings.reply_mode
        delivery = self.outbox.open(job, message, REPLIES[mode])
        if job.claim.spent:
            return delivery.give_up(f"its work was cut short {MAX_ATTEMPTS} times")
        try:
            delivery.settle()
            answer = delivery.kept or self.compose(job, message, delivery.reply)
            delivery.keep(answer)  # a restart resends it without asking the AI again
            delivery.show(answer)  # openim/sendmsg, or send_group_msg
        except IMError as error:
            delivery.postpone(error)
        else:
            delivery.finish()

    def compose(self, job: Job, message: Message, reply: PlainReply) -> Answer:
        """Return a fixed reply, the output of a command, or the AI's answer."""
        if message.kind == "unsupported":
            return Answer(self.texts["unsupported"])
        if found := commands.find(message):
            shared = bool(message.group) and self.settings.group_memory == "group"
            where = (message, job.claim.conversation, self.store)
            about = (self.settings.bot_language, self.texts, shared)
            return Answer(commands.run(*found, Chat(*where, *about)))
        sees = self.provider(message).service.images
        if not (message.text or message.quote or sees):
            return Answer(self.texts["no_vision"])
        reply.open()  # shows that an answer is coming
        return self.ask(job, message, reply)

    def provider(self, message: Message) -> Provider:
        """Return the AI service of the robot that was addressed."""
        return self.providers[self.settings.persona(message.robot)]

    def ask(self, job: Job, message: Message, reply: PlainReply) -> Answer:
        """Ask the AI service and show the answer as it grows."""
        provider, chat, text = self.provider(message), job.claim.conversation, ""
        about = (chat, self.settings, provider.service, self.store)
        prompt, memory = build_prompt(message, *about)
        trace = numbers(message.id, job.claim.seq, 0)[1]
        scope = CancelScope(self.settings.ai_timeout, str(trace))
        job.cancel = scope.cancel  # called by /stop and at shutdown
        try:
            for text in provider.chat(prompt, scope, reply.update_interval, memory):
                if not scope.ended:
                    reply.update(text)
            answer = Answer(text, remember=True, outcome="answered")
        except ProviderError as error:
            if job.lost:
                raise LeaseLost from None
            answer = self.explain(error, text, redact(str(error), prompt), job)
        if memory:
            self.workers.when_store_works(self.store.put, chat, memory)
        if memory or not self.settings.history_turns:
            answer = replace(answer, remember=False)  # off, or the service does
        return answer

    def explain(self, error: ProviderError, text: str, why: str, job: Job) -> Answer:
        """Turn a failure of the AI into what the user sees."""
        kind, said = error.kind, self.texts.get(error.kind, self.texts["busy"])
        if kind in ("stopped", "length"):  # not failures: keep the text so far
            return Answer(text or said, said if text else "", bool(text), kind)
        logger.warning("no answer for %s: %s", job.claim.id, why)
        note = self.texts["cut"].format(said) if text else said
        return Answer(text, note, outcome=kind)

    def refuse_for_now(self, error: Exception) -> Any:
        """Answer 503. Tencent repeats no callback: the message is looked up later."""
        if request.path == "/im":
            self.missed.note_refusal()
            return refuse(503, error)
        logger.warning("no health: %s", error)
        return {"status": "the store does not work"}, 503

    def close(self, drain: float = DRAIN) -> None:
        """Finish what fits into `drain` seconds; leave the rest to the next process."""
        self.workers.close(drain)


@command("/help", "帮助", zh="列出指令", en="list the commands")
def show_help(chat: Chat, argument: str) -> str:
    return f"{chat.texts['help']}\n{commands.usage(chat.language)}"


@command("/clear", "清空", zh="忘掉这段对话", en="forget this chat")
def clear(chat: Chat, argument: str) -> str:
    chat.store.forget(chat.conversation)
    return chat.texts["clear_group" if chat.shared else "clear"]


@command("/stop", "停止", zh="打断正在写的回答", en="stop the answer")
def stop(chat: Chat, argument: str) -> str:
    return chat.texts["stop"]  # Bot.stop did the work when the command arrived


def is_stop(message: Message) -> bool:
    """Return whether a message stops the answer: the command, or TUIKit's button."""
    found = commands.find(message)
    return message.kind == "stop" or bool(found and found[0] is stop)
