"""The judge: what is wrong with the answers of all conversations, as users see them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from math import inf

from imbot.texts import TEXTS
from simulator import Delivered, KitChat, text_body

from .load import question
from .stage import MODES
from .users import Chat, Outages

UNLOCKING = ("custom", "card")  # modes in which no phone may stay locked
LATE = 300.0  # seconds in which every message must be answered, or told why not

REPLACED = TEXTS["en"]["replaced"]
OWN_WORDS = "|".join(re.escape(text) for text in {*TEXTS["en"].values()} - {REPLACED})
# Why an answer ends where it does, or why there is none.
NOTE = re.compile(rf"\n*(\(The answer was cut: )?({OWN_WORDS})\)?\Z")
ENDS = [f"] (question {turn} of our chat)" for turn in (1, 2, 3)]  # of what the AI says


@dataclass
class Answer:
    """An answer: its messages, and what they show, joined."""

    text: str
    messages: list[Delivered]

    def is_stream(self) -> bool:
        """Return whether it began as a streaming message."""
        return self.messages[0].is_stream()

    def ended(self) -> bool:
        """Return whether it is whole, or says that it is not."""
        return bool(NOTE.search(self.text)) or self.text.endswith((*ENDS, REPLACED))

    def stays_locked(self) -> bool:
        """Return whether a phone's input stays locked after it."""
        phone = KitChat("phone")
        phone.send(text_body("a question"))
        for message in self.messages:
            phone.show(message.key, message.elements)
        return phone.locked

    def is_above(self, place: tuple[int, int] | None) -> bool:
        """Return whether clients sort a part of it above its question."""
        return any(place and message.place <= place for message in self.messages)

    def number(self) -> int | None:
        """Return the question that it names, 0 if it only says that the AI failed."""
        named = question(self.text)
        return named if named >= 0 else 0 if NOTE.search(self.text) else None

    def is_replaced(self, after: Answer | None) -> bool:
        """Return whether a dead process began it, and `after` is it from the start.

        It says so, unless Tencent had closed its stream before that could be said.
        """
        if self.text.endswith(REPLACED):
            return True
        if not self.is_stream() or self.ended() or not after:
            return False
        begun, whole = self.text, NOTE.sub("", after.text)
        return begun.startswith(whole) or whole.startswith(begun)


class Found(Counter[str]):
    """How often each thing is wrong, and the question near which it was first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, tuple[float, Chat, int]] = {}  # asked when, where

    def note(self, what: str, chat: Chat, number: int, count: int = 1) -> None:
        """Count something that is wrong near a question."""
        self[what] += count
        asked = (chat.acknowledged | chat.lost).get(number, 0.0)
        if what not in self.first or asked < self.first[what][0]:
            self.first[what] = asked, chat, number


def judge_all(
    chats: list[Chat], delivered: list[Delivered], outages: Outages | None = None
) -> Found:
    """Count what is wrong with the answers of all conversations.

    Questions whose callback was lost in one of the `outages` have to be answered, too.
    """
    found, shown = Found(), by_chat(delivered)
    for chat in chats:
        messages = shown_in(chat, shown)
        begun = answers_of(chat, messages)
        pairs = zip_longest(begun, begun[1:])
        answers = [one for one, after in pairs if not one.is_replaced(after)]
        judge(chat, answers, chat.owed(outages), found)
        if not chat.group:
            judge_on_phone(chat, messages, answers, found)
        judge_times(chat, messages, answers, found)
        found["begun again"] += len(begun) - len(answers)
    return found


Shown = dict[tuple[str, str], list[Delivered]]


def by_chat(delivered: list[Delivered]) -> Shown:
    """Return the messages of each conversation, by its user or group, and robot."""
    shown: Shown = {}
    for message in delivered:
        shown.setdefault((message.chat, message.robot), []).append(message)
    return shown


def shown_in(chat: Chat, shown: Shown) -> list[Delivered]:
    """Return the messages of one conversation."""
    return shown.get((chat.group or chat.user, chat.robot), [])


def answers_of(chat: Chat, shown: list[Delivered]) -> list[Answer]:
    """Return the answers of a conversation, also those that a dead process began.

    A message that goes on where the one before it ended belongs to the same answer;
    one that shows again what was shown does not.
    """
    found: list[Answer] = []
    for message in filter(lambda message: message.text, shown):
        joined = (found[-1].text if found else "") + message.text
        if found and not found[-1].ended() and fits(chat, joined):
            found[-1].text = joined
            found[-1].messages.append(message)
        else:
            found.append(Answer(message.text, [message]))
    return found


def fits(chat: Chat, text: str) -> bool:
    """Return whether a text is what the AI says, or begins so, with or without a note
    that says why it ends there."""
    who = f"{chat.user}: " if chat.group else ""
    start = f"@{chat.user} " if chat.group else ""
    start += f"You said: {who}question ["
    said = NOTE.sub("", text)
    if not said.startswith(start):
        return start.startswith(said)
    rest = said.removeprefix(start)
    end = rest.lstrip("0123456789")
    return not end or end != rest and any(whole.startswith(end) for whole in ENDS)


def judge(chat: Chat, answers: list[Answer], owed: set[int], found: Found) -> None:
    """Count what is wrong with the answers of one conversation, which are owed.

    A text that names no question but says that the AI failed counts as the answer to
    one of the questions between those its neighbours name. Mangled are answers that
    are not whole and do not say so, and those of which a piece is shown again.
    """
    for near, one in placed(chat, answers):
        if not (one.ended() and fits(chat, one.text)):
            found.note("mangled", chat, near)
    numbers = [number for one in answers if (number := one.number()) is not None]
    named = {*numbers} - {0}
    found["answered"] += len(named)
    found["caught up"] += len(named & chat.lost.keys())
    for number, times in Counter(filter(None, numbers)).items():
        if times > 1:
            found.note("twice", chat, number, times - 1)
    previous, silent = 0, 0
    for number in [*numbers, chat.asked + 1]:
        if not number:
            silent += 1
            continue
        if number < previous:
            found.note("misordered", chat, number)
        gap = sorted({*range(previous + 1, number)} - named)
        for unanswered in [n for n in gap if n in owed][silent:]:
            found.note("lost", chat, unanswered)
        if silent > len(gap):
            found.note("twice", chat, previous or 1, silent - len(gap))
        found["answered"] += min(silent, len(gap))
        previous, silent = number, 0


def placed(chat: Chat, answers: list[Answer]) -> Iterator[tuple[int, Answer]]:
    """Yield the answers with the question that each stands for: the one it names, else
    the next that was acknowledged."""
    last = 0
    for one in answers:
        after = (number for number in chat.acknowledged if number > last)
        last = one.number() or min(after, default=last or 1)
        yield last, one


def judge_on_phone(
    chat: Chat, messages: list[Delivered], answers: list[Answer], found: Found
) -> None:
    """Count what is wrong with answers one-to-one as Tencent's clients show them.

    They sort the messages of a second by MsgSeq.
    """
    unlocks = MODES.get(chat.robot) in UNLOCKING
    for near, one in placed(chat, answers):
        if one.is_above(chat.places.get(one.number() or 0)):
            found.note("above its question", chat, near)
        if unlocks and one.stays_locked():
            found.note("locked", chat, near)
    for before, after in pairwise(messages):
        if after.place < before.place:
            found.note("misordered", chat, max(1, question(after.text)))
            break


def judge_times(
    chat: Chat, messages: list[Delivered], answers: list[Answer], found: Found
) -> None:
    """Count what stays open, and who waited long for a first word; lost are others."""
    for message in messages:
        if not message.closed:
            found.note("left open", chat, max(1, question(message.text)))
    since = chat.lost | chat.acknowledged
    for near, one in placed(chat, answers):
        if one.messages[0].said - since.get(near, inf) > LATE:
            found.note("told nothing", chat, near)
        waited = one.messages[-1].time - chat.acknowledged.get(near, inf)
        found["slowest"] = max(found["slowest"], int(waited) if waited > 0 else 0)
