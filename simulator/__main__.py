"""The demonstration: the stand-in and a bot, a conversation, and the chat page.

python -m simulator                  start it with the bot, hold a conversation
python -m simulator --say "Hello"    say this instead
python -m simulator --bot URL        drive a bot that runs elsewhere
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import requests

from .ai import actor
from .bot import ROOT, bot_settings, interrupt_on_signals, running
from .page import PACE
from .standin import Simulator

# What the demonstration's bot takes from the environment, besides AI_….
SETTINGS = (
    "REPLY_MODE BOT_LANGUAGE ROBOTS HISTORY_TURNS GROUP_MEMORY RATE_LIMIT MAX_WAITING "
    "MAX_BACKLOG ALLOW_USERS ALLOW_GROUPS RETENTION_DAYS WORKER_THREADS LOG_LEVEL"
).split()


def show(simulator: Simulator, user: str, text: str, group: str = "") -> None:
    """Say something, print it, and print the answer when it comes."""
    chat, began = group or user, time.monotonic()
    known = sum(message.chat == chat for message in simulator.delivered)
    place = f"group {group}" if group else "one-to-one"
    if group:
        simulator.say_in_group(user, group, text, ["@RBT#001"])
        print(f"[{place}] {user}: @Robot {text}")
    else:
        simulator.say(user, "@RBT#001", text)
        print(f"[{place}] {user}: {text}")
    for message in simulator.wait(known + 1, 90, chat, closed=True)[known:]:
        took = (time.monotonic() - began) * 1000
        print(f"[{place}] Robot: {message.text}   ({took:.0f} ms)", flush=True)


def converse(simulator: Simulator, say: list[str]) -> None:
    """Hold the conversation of the demonstration, or say what is to be said."""
    for text in say or ["你好", "What did I say before?"]:
        show(simulator, "jared", text)
    if not say:
        show(simulator, "lin", "hello from the group", "@TGS#demo")


def type_on(simulator: Simulator) -> None:
    """Let the terminal write to the robot until its user has enough."""
    print("Write to the robot; begin with / g to write in the group; Ctrl-D ends.")
    while True:
        line = input("> ").strip()
        group = "@TGS#demo" if line.startswith("/g ") else ""
        try:
            if line:
                show(simulator, "jared", line.removeprefix("/g "), group)
        except (TimeoutError, requests.RequestException):
            print("No answer came.")


def demo_settings(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the bot's settings, and the name of the AI service if it is a real one."""
    chinese = environment.get("LANG", "").startswith("zh")
    mode = "custom" if ROOT.joinpath("growing.py").exists() else "whole"
    settings = {"REPLY_MODE": mode, "BOT_LANGUAGE": "zh" if chinese else "en"}
    for name, value in environment.items():
        if value and (name in SETTINGS or name.startswith("AI_")):
            settings[name] = value
    other = "openai-compatible" if "AI_BASE_URL" in settings else "minimax"
    service = settings.setdefault("AI_PROVIDER", other)
    theirs = {"AI_SECRET_KEY", "AI_SECRET_KEYS", "AI_BASE_URL"} & set(settings)
    if not theirs and service not in ("echo", "ollama"):
        return settings, ""
    return {"AI_SECRET_KEY": "", "AI_BASE_URL": ""} | settings, service


@contextmanager
def demonstration(bot_url: str, port: int) -> Iterator[Simulator]:
    """Run what is to be shown, with a bot or for one elsewhere; print where it is."""
    if bot_url:
        with Simulator(port=port) as simulator:
            simulator.bot_url = bot_url.rstrip("/").removesuffix("/im")
            print("The bot needs these settings (or an AI service of its own):\n")
            for name, value in bot_settings(simulator).items():
                print(f"export {name}={value}")
            yield simulator
        return
    settings, service = demo_settings(os.environ)
    with running(port, **settings) as (simulator, bot):
        simulator.ai_name = service
        mode = settings["REPLY_MODE"]
        print(f"The bot, under gunicorn: {bot.url}, REPLY_MODE={mode}")
        print("The AI:", f"the real service {service}" if service else "a stand-in")
        yield simulator


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        prog="python -m simulator", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--say", action="append", default=[], metavar="TEXT")
    parser.add_argument("--bot", default="", metavar="URL", help="of a bot elsewhere")
    parser.add_argument("--port", type=int, help="serve here, and stay till Ctrl-C")
    options = parser.parse_args()
    if options.port not in (None, *range(1, 65536)):
        parser.error("--port must be a number from 1 to 65535")
    interrupt_on_signals()
    stage = demonstration(options.bot, options.port or 0)
    try:
        with suppress(KeyboardInterrupt, EOFError), stage as simulator:
            simulator.ai_answer = actor
            print(f"The chat page: open {simulator.url} in a browser\n", flush=True)
            if options.say or not options.bot:
                converse(simulator, options.say)
            simulator.ai_pace = PACE
            if sys.stdin.isatty():
                type_on(simulator)
            elif options.bot or options.port:
                threading.Event().wait()
    except TimeoutError:
        sys.exit("No answer came.")
    except requests.RequestException as error:  # its text may hold a signature
        sys.exit(f"{options.bot} cannot be called ({type(error).__name__})")
    except OSError as error:
        sys.exit(f"Port {options.port} cannot be served: {error.strerror}")
    except RuntimeError as error:  # the bot did not start
        sys.exit(str(error))


if __name__ == "__main__":
    main()
