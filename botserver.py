"""A chatbot server for Tencent Cloud IM.

    gunicorn 'botserver:create_app()'

Tencent calls POST /im when a user writes to a robot account (@RBT#...) or mentions one
in a group. The message goes into a queue on disk, and Tencent gets its 200 within
milliseconds. A thread of the pool asks the AI service and answers as the robot.

Follow a message through this file from top to bottom: `im`, `Bot.accept`, `Bot.answer`,
`Bot.compose` (the function to edit), `Bot.ask`, and the chat commands. The AI services
are in providers.py. What makes it reliable (the queue, retries, messages that grow) is
the package imbot/.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from flask import Flask, request

import imbot.settings
from imbot import cli, commands
from imbot.chat import Chat, Said
from imbot.commands import command
from imbot.delivery import Delivery
from imbot.engine import Engine
from imbot.growing import EditedReply, GrowingCardReply, StreamReply
from imbot.prompt import build_prompt
from imbot.replies import CardReply, PlainReply
from imbot.tencent import IMError, Message, read_mention, read_messages
from imbot.timing import NORMAL, Timing
from imbot.web import OK, read_body
from providers import PROVIDERS
from usersig import BadSignature, check_callback, gen_user_sig

REPLIES = {  # REPLY_MODE -> how an answer is shown; add yours
    "whole": PlainReply,
    "card": CardReply,
    "modify": EditedReply,
    "custom": GrowingCardReply,
    "stream": StreamReply,
}


def create_app(settings: Settings | None = None, timing: Timing = NORMAL) -> Flask:
    """Create the WSGI app and start the bot. Settings come from the environment."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20  # bytes of a callback

    @app.post("/im", strict_slashes=False)
    def im() -> dict[str, Any]:
        bot.check_signature(request.args)
        about = bot.nicks, bot.settings.serves  # for mentions; for ROBOTS_ONLY
        for message in read_messages(request.args, read_body(), *about):
            bot.accept(message)
        return OK

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        bot.check_store()
        return {"status": "ok", **bot.store.stats()}

    @app.get("/")
    def index() -> str:
        return "The bot is running. Tencent IM calls POST /im.\n"

    if cli.add_to(app, Bot, timing):
        return app  # a `flask` command runs, which serves nothing
    bot = Bot.create(settings, timing)
    bot.start(app)
    return app


class Settings(imbot.settings.Settings):
    """Every setting. Add yours: its variable is its name in capitals."""


class Bot(Engine):
    """Accepts messages and answers them in a pool of threads."""

    services = PROVIDERS
    replies = REPLIES
    settings_type = Settings
    settings: Settings
    make_sig = staticmethod(gen_user_sig)
    bad_signature = BadSignature

    def check_signature(self, query: Any) -> None:
        """Raise BadSignature unless Tencent sent this callback, for our app."""
        app = str(self.settings.im_sdkappid)  # the console's probe names none
        if tokens := self.settings.im_callback_token:
            check_callback(tokens, query.get("Sign", ""), query.get("RequestTime", ""))
        if query.get("SdkAppid", app) != app:
            raise BadSignature("SdkAppid is not this server's app")

    def accept(self, message: Message, was_missed: bool = False) -> None:
        """Put a message into the queue; a thread of the pool answers it.

        `was_missed`: no callback brought it; it was looked up after an outage.
        """
        if message.user.upper().startswith("@RBT#"):
            return  # two robots would answer each other for ever
        if message.kind == "recalled":
            return self.recall(message)
        if is_stop(message):
            return self.stop(message, was_missed)
        self.enqueue(message, was_missed)

    def answer(self, chat: Chat, delivery: Delivery) -> None:
        """Answer one message, in a pool thread; after a crash, in another process.

        Errors of the AI and of your code become a sentence for the user, in `run`.
        """
        try:
            answer = delivery.kept or delivery.run(self.compose)
            delivery.keep(answer)  # a restart resends it without asking the AI again
            delivery.show(answer)  # openim/sendmsg, or send_group_msg
        except IMError as error:
            delivery.postpone(error)
        else:
            delivery.finish(answer)

    def compose(self, chat: Chat) -> Said:
        """Return what to answer: a text, an element, or the AI's text as it grows.

        This is the function to edit. README's "Change it" has examples.
        """
        message = chat.message
        if message.kind == "recalled":
            return ""  # by its user, while it waited: nothing is sent
        if found := commands.find(message):
            run, argument = found
            return run(chat, argument)
        # Your own answers go here.
        if message.kind == "greeting":  # a bare mention
            return show_help(chat, "")
        if message.kind == "unsupported":  # a voice, a file
            return chat.texts["unsupported"]
        is_picture = not (message.text or message.quote)
        if is_picture and not self.provider(chat).service.images:
            return chat.texts["no_vision"]
        return self.ask(chat)

    def ask(self, chat: Chat) -> Iterator[str]:
        """Ask the AI service; yield the text so far, the last one is the answer."""
        provider, default = self.provider(chat), self.settings.ai_system_prompt
        talk = partial(self.talk, chat.message)  # the group's, before the mention
        prompt = build_prompt(chat, default, provider.service, talk)
        how = chat.scope, chat.update_interval, chat.memory
        try:
            for text in provider.chat(prompt, *how):
                chat.heard[1:] = [text]
                yield text
            if chat.memory:
                chat.memory |= chat.seen
        finally:
            if chat.memory:  # the service remembers the chat by it
                self.workers.when_store_works(
                    self.store.put, chat.conversation, chat.memory
                )


@command("/help", "帮助", zh="列出指令", en="list the commands")
def show_help(chat: Chat, argument: str) -> str:
    return f"{chat.texts['help']}\n{commands.usage(chat.language)}"


@command("/clear", "清空", zh="忘掉这段对话", en="forget this chat")
def clear(chat: Chat, argument: str) -> str:
    chat.store.forget(chat.conversation)
    return chat.texts["clear_group" if chat.shared else "clear"]


@command("/stop", "停止", zh="打断正在写的回答", en="stop the answer")
def confirm_stop(chat: Chat, argument: str) -> str:
    return chat.texts["stop"]  # Bot.accept stopped it when the command arrived


def is_stop(message: Message) -> bool:
    """Return whether a message stops the answer: the command, or TUIKit's button."""
    if message.kind == "mention":  # its robot's nick is not known yet
        message = read_mention(message, [(message.robot, "")])
    found = commands.find(message)
    return message.kind == "stop" or bool(found and found[0] is confirm_stop)


if __name__ == "__main__":
    sys.exit("Start it with: gunicorn 'botserver:create_app()'")
