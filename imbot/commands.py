"""Chat commands: a decorator to add one, and the look-up of the one a user sent.

    @command("/dice", "骰子", zh="掷骰子", en="throw a die")
    def dice(chat: Chat, argument: str) -> str:
        return f"🎲 {random.randint(1, 6)}"

A command returns its answer. `argument` is what the user wrote after the name; a
command without `takes` runs only if its name is the whole text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from .chat import Chat
from .tencent import Message

LONGEST_NAME = 64  # characters
PUNCTUATION = ".。!?~…,、;:"  # after a command's name it is not part of it

Run = Callable[[Chat, str], str]


@dataclass(frozen=True)
class Command:
    """A command's function, its Chinese name, and its line in /help."""

    run: Run
    name: str
    zh: str
    en: str
    takes: str = ""  # the argument's name, if it has one


COMMANDS: dict[str, Command] = {}


def command(
    name: str, chinese: str, *, zh: str, en: str, takes: str = ""
) -> Callable[[Run], Run]:
    """Make a function a chat command."""

    def add(run: Run) -> Run:
        COMMANDS[name] = Command(run, chinese, zh, en, takes)
        return run

    return add


def find(message: Message) -> tuple[Run, str] | None:
    """Return the command that a message is, and its argument."""
    if message.kind != "question":
        return None
    first, argument = [*message.text.split(maxsplit=1), "", ""][:2]
    written = plain(first)
    for name, command in COMMANDS.items():
        if written in (name, command.name) and (command.takes or not argument):
            return command.run, argument
    return None


def plain(word: str) -> str:
    """Return a command's name as it is registered: ／HELP, /help@Nick and /help。 are
    /help."""
    word = unicodedata.normalize("NFKC", word[:LONGEST_NAME]).lower()
    if word.startswith("/"):
        word = word.partition("@")[0]
    return word.rstrip(PUNCTUATION)


def usage(language: str) -> str:
    """Return a line for each command."""
    lines = []
    for name, command in COMMANDS.items():
        about = command.zh if language == "zh" else command.en
        lines.append(f"{f'{name} {command.takes}'.strip()} ({command.name}): {about}")
    return "\n".join(lines)
