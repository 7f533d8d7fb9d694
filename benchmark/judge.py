"""The judge: what is wrong with the answers of all conversations, as users see them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
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


def judge_all(
    chats: list[Chat], delivered: list[Delivered], outages: Outages | None = None
) -> Counter[str]:
    """Count what is wrong with the answers of all conversations.

    Questions whose callback was lost in one of the `outages` have to be answered, too.
    """
    shown: dict[tuple[str, str], list[Delivered]] = {}
    for message in delivered:
        shown.setdefault((message.chat, message.robot), []).append(message)
    found: Counter[str] = Counter()
    for chat in chats:
        messages = shown.get((chat.group or chat.user, chat.robot), [])
        begun = answers_of(chat, messages)
        pairs = zip_longest(begun, begun[1:])
        answers = [one for one, after in pairs if not one.is_replaced(after)]
        found.update(judge(chat, answers, chat.owed(outages)))
        found["begun again"] += len(begun) - len(answers)
        found["left open"] += sum(not message.closed for message in messages)
        if not chat.group:
            found["misordered"] += not in_order(messages)
            found.update(judge_on_phone(chat, answers))
        found["told nothing"] += told_late(chat, answers)
        found["slowest"] = max(found["slowest"], slowest(chat, answers))
    return found


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


def judge(chat: Chat, answers: list[Answer], owed: set[int]) -> Counter[str]:
    """Count what is wrong with the answers of one conversation, which are owed.

    A text that names no question but says that the AI failed counts as the answer to
    one of the questions between those its neighbours name. Mangled are answers that
    are not whole and do not say so, and those of which a piece is shown again.
    """
    numbers = [number for one in answers if (number := one.number()) is not None]
    named, previous, silent = {*numbers} - {0}, 0, 0
    sound = [one.ended() and fits(chat, one.text) for one in answers]
    found = Counter({"mangled": sound.count(False)})
    found["twice"] = len(numbers) - numbers.count(0) - len(named)
    found["answered"] = len(named)
    found["caught up"] = len(named & chat.lost.keys())
    for number in [*numbers, chat.asked + 1]:
        if not number:
            silent += 1
            continue
        gap = set(range(previous + 1, number)) - named
        found["misordered"] += number < previous
        found["lost"] += max(0, len(gap & owed) - silent)
        found["twice"] += max(0, silent - len(gap))
        found["answered"] += min(silent, len(gap))
        previous, silent = number, 0
    return found


def judge_on_phone(chat: Chat, answers: list[Answer]) -> Counter[str]:
    """Count what is wrong with answers one-to-one as Tencent's clients show them."""
    places = chat.places
    above = sum(one.is_above(places.get(one.number() or 0)) for one in answers)
    unlocks = MODES.get(chat.robot) in UNLOCKING
    locked = sum(unlocks and one.stays_locked() for one in answers)
    return Counter({"above its question": above, "locked": locked})


def told_late(chat: Chat, answers: list[Answer]) -> int:
    """Count the messages of whose answer nothing came for long; lost are others."""
    since = chat.lost | chat.acknowledged
    waits = (
        one.messages[0].said - since.get(one.number() or 0, inf) for one in answers
    )
    return sum(wait > LATE for wait in waits)


def in_order(shown: list[Delivered]) -> bool:
    """Return whether clients, which sort a second by MsgSeq, show it as it was sent."""
    order = [message.place for message in shown]
    return order == sorted(order)


def slowest(chat: Chat, answers: list[Answer]) -> int:
    """Return the seconds the slowest answer took after its acknowledgement."""
    since = chat.acknowledged
    ends = ((one.messages[-1].time, since.get(one.number() or 0)) for one in answers)
    return int(max((end - began for end, began in ends if began), default=0))
