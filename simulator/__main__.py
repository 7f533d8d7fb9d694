"""The demonstration: the stand-in and a bot, a conversation, and the chat page.

python -m simulator                  start it with the bot, hold a conversation
python -m simulator --say "Hello"    say this instead; without a terminal, then end
python -m simulator --bot URL        drive a bot that runs elsewhere

It serves until it is stopped. Without a terminal nobody can write there, only on the
page. The bot gets the whole environment but for what the demonstration sets.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import requests
from dotenv import find_dotenv, load_dotenv

from imbot.settings import robots_file
from providers import PROVIDERS

from .ai import actor
from .bot import ROOT, bot_settings, interrupt_on_signals, running
from .botlog import warnings_told
from .messages import Delivered
from .page import PACE
from .relay import Relay
from .server import Simulator

ROBOT, GROUP = "@RBT#001", "@TGS#demo"
MORE = 0.3  # seconds between two messages of one answer, at most
OURS = ("DATABASE_URL", "ALLOW_UNSIGNED", "PORT")  # and IM_…: the bot gets others
TEXTS: dict[str, dict[str, Any]] = {
    "en": {
        "bot": "The bot, under gunicorn: {}, REPLY_MODE={}",
        "stand-in": "The AI: a stand-in that repeats what you write",
        "real": "The AI: the real service {}; what you write is sent to it",
        "elsewhere": "The bot needs these settings (or an AI service of its own):\n",
        "page": "The chat page: open {} in a browser\n",
        "nobody": "Nobody answers at {}: start the bot with the settings above.",
        "cannot": "{} cannot be called ({})",
        "warning": "The bot warns: {}",
        "write": "Write to the robot; after /g to the group; Ctrl-D ends.",
        "no answer": "No answer came.",
        "picture": "[picture] {}",
        "one": "[one-to-one] {}: {}",
        "group": "[group {}] {}: {}",
        "say": ["Hello!", "What did I say before?"],
        "say in group": "hello from the group",
    },
    "zh": {
        "bot": "机器人（由 gunicorn 运行）：{}，REPLY_MODE={}",
        "stand-in": "AI：替身，只会重复你的话",
        "real": "AI：真正的服务 {}，你写的内容会发给它",
        "elsewhere": "机器人需要下面这些设置（AI 服务也可以用它自己的）：\n",
        "page": "聊天页面：请在浏览器中打开 {}\n",
        "nobody": "{} 没有回应：请用上面的设置启动机器人。",
        "cannot": "无法调用 {}（{}）",
        "warning": "机器人的警告：{}",
        "write": "请给机器人写消息；以 /g 开头就写到群里；按 Ctrl-D 结束。",
        "no answer": "没有等到回答。",
        "picture": "[图片] {}",
        "one": "[单聊] {}：{}",
        "group": "[群聊 {}] {}：{}",
        "say": ["你好", "我刚才说了什么？"],
        "say in group": "大家好",
    },
}


class Demonstration:
    """A conversation with the bot, printed as it is held."""

    def __init__(self, simulator: Simulator, texts: Mapping[str, Any]) -> None:
        self.simulator, self.texts = simulator, texts

    def show(self, user: str, text: str, group: str = "") -> None:
        """Say something, print it, and print the answer when it comes."""
        simulator, chat, began = self.simulator, group or user, time.monotonic()
        robot = simulator.robots[ROBOT]
        before = [m for m in simulator.delivered if m.chat == chat and m.closed]
        self._print(user, f"@{robot} {text}" if group else text, group)
        if group:
            simulator.say_in_group(user, group, text, [ROBOT])
        else:
            simulator.say(user, ROBOT, text)
        for message in self._answers(chat, len(before)):
            took = (time.monotonic() - began) * 1000
            pictures = map(self.texts["picture"].format, message.pictures)
            if shown := " ".join(filter(None, (message.text, *pictures))):
                self._print(robot, f"{shown}   ({took:.0f} ms)", group)

    def _answers(self, chat: str, known: int) -> Iterator[Delivered]:
        """Yield the messages of an answer as they come. Raises TimeoutError."""
        patience = 90.0
        while True:
            try:
                shown = self.simulator.wait(known + 1, patience, chat, closed=True)
            except TimeoutError:
                if patience == MORE:
                    return
                raise
            ended = [message for message in shown if message.closed]
            yield from ended[known:]
            known, patience = len(ended), MORE

    def _print(self, who: str, text: str, group: str) -> None:
        line = self.texts["group" if group else "one"]
        print(line.format(*filter(None, (group, who, text))), flush=True)

    def converse(self, say: list[str]) -> None:
        """Hold the conversation of the demonstration, or say what is to be said."""
        for text in say or self.texts["say"]:
            self.show("jared", text)
        if not say:
            self.show("lin", self.texts["say in group"], GROUP)

    def type_on(self) -> None:
        """Let the terminal write to the robot until its user has enough."""
        print(self.texts["write"])
        while True:
            line = input("> ").strip()
            group = GROUP if line.startswith("/g ") else ""
            try:
                if line:
                    self.show("jared", line.removeprefix("/g "), group)
            except requests.ConnectionError:
                self.miss()
            except (TimeoutError, requests.RequestException):
                print(self.texts["no answer"])

    def miss(self) -> None:
        """Say that nobody answers where the bot should be."""
        self.simulator.nobody = True
        print(self.texts["nobody"].format(self.simulator.bot_url), flush=True)

    def warn(self, text: str, of: str) -> None:
        """Print a warning of the bot's, and show it on the page."""
        if relay := self.simulator.relay:
            text = text.replace(f"{self.simulator.url}/v1", relay.url)
        print(self.texts["warning"].format(self.simulator.hide(text)), flush=True)
        self.simulator.warn(text, of)


def demo_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the bot gets: the environment but for what we set, and defaults."""
    chinese = environment.get("LANG", "").startswith("zh")
    settings = {"REPLY_MODE": "custom", "BOT_LANGUAGE": "zh" if chinese else "en"}
    ours: tuple[str, ...] = ("IM_",)
    stand_in = environment.get("IM_API_URL", "") + "/v1"
    if environment.get("AI_BASE_URL") == stand_in:  # as --bot prints it for .env
        ours = ("IM_", "AI_")
    for name, value in environment.items():
        if value and name not in OURS and not name.startswith(ours):
            settings[name] = value
    other = "openai-compatible" if "AI_BASE_URL" in settings else "minimax"
    settings.setdefault("AI_PROVIDER", other)
    return settings


def real_service(settings: dict[str, str]) -> tuple[Relay, str] | None:
    """Return a relay to the AI service that is set, and its name; None for ours.

    The relay takes its place in the settings.
    """
    name = settings["AI_PROVIDER"]
    service = PROVIDERS[name] if name in PROVIDERS else None
    if not {"AI_SECRET_KEY", "AI_BASE_URL"} & set(settings) and name != "ollama":
        return None
    settings.setdefault("AI_SECRET_KEY", "")
    url = settings.get("AI_BASE_URL") or (service.url if service else "")
    if not service or not url.startswith(("https://", "http://")):
        settings.setdefault("AI_BASE_URL", "")
        return None  # the bot says what is wrong
    settings.pop("AI_BASE_URL", "")
    model = settings.get("AI_MODEL") or service.model
    return Relay(url), f"{url} ({', '.join(filter(None, (name, model)))})"


def ai_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that win over those of the stand-in for the AI."""
    return {name: text for name, text in settings.items() if name.startswith("AI_")}


@contextmanager
def elsewhere(url: str, port: int, texts: Mapping[str, Any]) -> Iterator[Demonstration]:
    """Show a bot that runs elsewhere."""
    with Simulator(port=port) as simulator:
        simulator.bot_url = url.rstrip("/").removesuffix("/im")
        print(texts["elsewhere"])
        about = {"BOT_LANGUAGE": "zh" if texts is TEXTS["zh"] else "en"}
        for name, value in (bot_settings(simulator) | about).items():
            print(f"{name}={value}")
        shown = Demonstration(simulator, texts)
        try:
            requests.get(simulator.bot_url, timeout=5)
        except requests.ConnectionError:
            shown.miss()
        yield shown


@contextmanager
def here(
    settings: dict[str, str], port: int, texts: Mapping[str, Any]
) -> Iterator[Demonstration]:
    """Run a bot and show it."""
    real = real_service(settings)
    with running(port, settings, **ai_settings(settings)) as (simulator, bot):
        shown = Demonstration(simulator, texts)
        if real:
            simulator.relay, simulator.ai_name = real
            simulator.secret = settings["AI_SECRET_KEY"].removeprefix("Bearer ").strip()
        robots = ROOT / settings.get("ROBOTS", "robots.toml")
        for id, persona in robots_file(f"{robots}").items() if robots.exists() else ():
            simulator.robots[id] = persona.nick or simulator.robots.get(id, id)
        with warnings_told(bot.log, shown.warn):
            print(texts["bot"].format(bot.url, settings["REPLY_MODE"]))
            print(texts["real"].format(real[1]) if real else texts["stand-in"])
            yield shown


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        prog="python -m simulator", description=__doc__.splitlines()[0]
    )
    told = "a message of the conversation, in place of ours; once for each"
    parser.add_argument("--say", action="append", default=[], metavar="TEXT", help=told)
    parser.add_argument("--bot", default="", metavar="URL", help="of a bot elsewhere")
    parser.add_argument("--port", type=int, help="of the chat page")
    options = parser.parse_args()
    if options.port not in (None, *range(1, 65536)):
        parser.error("--port must be a number from 1 to 65535")
    interrupt_on_signals()
    load_dotenv(find_dotenv(usecwd=True))
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    settings, port = demo_settings(os.environ), options.port or 0
    texts = TEXTS["zh" if settings["BOT_LANGUAGE"] == "zh" else "en"]
    bot = options.bot
    stage = elsewhere(bot, port, texts) if bot else here(settings, port, texts)
    try:
        with suppress(KeyboardInterrupt, EOFError), stage as shown:
            shown.simulator.ai_answer = actor
            print(texts["page"].format(shown.simulator.url), flush=True)
            if options.say or not bot:
                shown.converse(options.say)
            shown.simulator.ai_pace = PACE
            if sys.stdin.isatty():
                shown.type_on()
            elif bot or options.port or not options.say:
                threading.Event().wait()
    except TimeoutError:
        sys.exit(texts["no answer"])
    except requests.RequestException as error:  # its text may hold a signature
        sys.exit(texts["cannot"].format(bot or "the bot", type(error).__name__))
    except OSError as error:
        sys.exit(f"Port {options.port} cannot be served: {error.strerror}")
    except RuntimeError as error:  # the bot did not start
        sys.exit(str(error))


if __name__ == "__main__":
    main()
