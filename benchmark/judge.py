"""The judge: what is wrong with the answers of all conversations."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

from commands import TEXTS
from simulator import Delivered

from .load import question
from .users import Chat

REPLACED = TEXTS["en"]["replaced"]
OWN_WORDS = {*TEXTS["en"].values()} - {REPLACED}


def judge_all(chats: list[Chat], delivered: list[Delivered]) -> Counter[str]:
    """Count what is wrong with the answers of all conversations."""
    shown: dict[tuple[str, str], list[Delivered]] = {}
    for message in delivered:
        shown.setdefault((message.chat, message.robot), []).append(message)
    found: Counter[str] = Counter()
    for chat in chats:
        answers = shown.get((chat.group or chat.user, chat.robot), [])
        found.update(judge(chat, answers))
        found["slowest"] = max(found["slowest"], slowest(chat, answers))
    return found


def judge(chat: Chat, shown: list[Delivered]) -> Counter[str]:
    """Count what is wrong with the answers of one conversation.

    A text that names no question but says that the AI failed counts as the answer to
    one of the questions between those its neighbours name.
    """
    whole = [m for m, after in zip_longest(shown, shown[1:]) if not begins(m, after)]
    numbers = [number for m in whole if (number := number_of(m)) is not None]
    named, previous, silent = {*numbers} - {0}, 0, 0
    found = Counter({"left open": sum(not message.closed for message in shown)})
    found["twice"] = len(numbers) - numbers.count(0) - len(named)
    found["answered"] = len(named)
    for number in [*numbers, chat.asked + 1]:
        if not number:
            silent += 1
            continue
        gap = set(range(previous + 1, number)) - named
        found["misordered"] += number < previous
        found["lost"] += max(0, len(gap & chat.acknowledged.keys()) - silent)
        found["twice"] += max(0, silent - len(gap))
        found["answered"] += min(silent, len(gap))
        previous, silent = number, 0
    order = [message.number for message in shown if not chat.group]
    found["misordered"] += order != sorted(order)
    return found


def begins(message: Delivered, after: Delivered | None) -> bool:
    """Return whether a text is the beginning of the next.

    So it is if Tencent closed the stream of a process that died before it could be
    said that the answer follows once more.
    """
    begun, whole = message.text, after.text if after else ""
    return begun not in ("", whole) and whole.startswith(begun)


def number_of(message: Delivered) -> int | None:
    """Return the question that an answer names, 0 if it says that the AI failed.

    None for what a dead process has begun, if another answer took its place.
    """
    if message.text.endswith(REPLACED):
        return None
    if (number := question(message.text)) >= 0:
        return number
    return 0 if any(text in message.text for text in OWN_WORDS) else None


def slowest(chat: Chat, shown: list[Delivered]) -> int:
    """Return the seconds the slowest answer took after its acknowledgement."""
    times = [(m.time, chat.acknowledged.get(number_of(m) or 0)) for m in shown]
    return int(max((end - began for end, began in times if began), default=0))
